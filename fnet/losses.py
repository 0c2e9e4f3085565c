"""Losses: one value per example, and by hand its gradient by the outputs.

Classes: ``outputs (..., K)`` are logits; targets are integer labels ``(...)`` or floating probabilities ``(..., K)``.
The rest: ``outputs (B,)`` or ``(B, ..., F)`` with targets of the same shape, **summed** over the features F. Keras
takes the mean over F and PyTorch over all entries: with the mean over examples that follows, gradients F times smaller.

Bfloat16 and float16 outputs are computed in float32: values are float32, gradients have the outputs' dtype. Values are
written so that plain autodiff of them takes the same subgradients as the gradients by hand, and so that NaN passes.

>>> logits = jnp.array([[3.2, 1.1, 0.8, 2.9]])
>>> f"{softmax_cross_entropy(logits, jnp.array([0]))[0]:.4f}"
'0.6699'
>>> [f"{g:.4f}" for g in softmax_cross_entropy.gradient(logits, jnp.array([0]))[0]]
['-0.4882', '0.0627', '0.0464', '0.3791']
>>> print(huber(1.0)(jnp.array([[0.5, 3.0]]), jnp.zeros((1, 2))))
[2.625]

All raise ValueError, before anything is computed, for outputs that are not floating, for targets of a wrong dtype or
shape, and for labels out of range where they are known (not traced, even if the outputs are); a traced label out of
range makes value and gradient NaN. There is no label to ignore: give such an example any valid label and the weight 0.

Legend: B batch, K classes, F features; in derivations z outputs, y or p targets, σ(z) = 1/(1 + e^−z), ℓ the value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import refuse_masked, require
from fnet.core.numerics import wide
from fnet.layers.masks import is_masked
from fnet.types import Loss

# --- classes ---------------------------------------------------------------------------------------------------------


def _cross_entropy(name, smoothing=None) -> Loss:
    def read(logits, targets):
        z, targets = check_classes(name, logits, targets)
        z = z.astype(wide(z.dtype))
        p = _probabilities(targets, z)
        if smoothing is not None:
            a = jnp.asarray(smoothing, z.dtype)
            p = (1 - a) * p + a / z.shape[-1]
        return z - jax.lax.stop_gradient(z.max(-1, keepdims=True)), p

    def value(logits, targets):  # Σ p (log Σ e^z − z), in which any shift of z cancels
        z, p = read(logits, targets)
        z_counted = jnp.where((p == 0) & (z == -jnp.inf), 0, z)  # 0 · log 0 = 0
        return p.sum(-1) * jnp.log(jnp.exp(z).sum(-1)) - (p * z_counted).sum(-1)

    def gradient(logits, targets):  # ℓ = (Σ p) log Σ e^z − Σ p z:  ∂ℓ/∂z_k = (Σ p) e^z_k / Σ e^z − p_k
        z, p = read(logits, targets)
        e = jnp.exp(z)
        return (p.sum(-1, keepdims=True) * (e / e.sum(-1, keepdims=True)) - p).astype(jnp.asarray(logits).dtype)

    return Loss(value, gradient)


softmax_cross_entropy = _cross_entropy("softmax_cross_entropy")
"""Categorical cross-entropy of logits: ``−Σ_k p_k log softmax(z)_k``.

Labels count as p = 1 at the label; probabilities need not sum to 1. Exact at large logits, and finite at a logit of
−inf whose probability is 0. PyTorch's ``cross_entropy`` has the classes on axis 1.
"""


def smoothed_cross_entropy(label_smoothing) -> Loss:
    """Categorical cross-entropy of logits against ``(1 − a) p + a/K``, where a is ``label_smoothing``, from 0 to 1.

    The true class takes part in the a/K, as in optax, Keras and PyTorch; in Müller et al., arXiv:1906.02629, too.
    ``label_smoothing`` may be traced. Raises ValueError for one outside 0..1.
    """
    require(
        (label_smoothing >= 0) & (label_smoothing <= 1),
        f"smoothed_cross_entropy: expected label_smoothing from 0 to 1, got {label_smoothing}",
    )
    return _cross_entropy("smoothed_cross_entropy", label_smoothing)


def _negative_log_likelihood() -> Loss:
    def read(outputs, targets):
        y, targets = check_classes("negative_log_likelihood", outputs, targets)
        y = y.astype(wide(y.dtype))
        return y, _probabilities(targets, y)

    def value(outputs, targets):
        y, p = read(outputs, targets)
        return -(p * jnp.where((p == 0) & (y == -jnp.inf), 0, y)).sum(-1)  # 0 · log 0 = 0

    def gradient(outputs, targets):  # ℓ = −Σ p y:  ∂ℓ/∂y_k = −p_k
        return -read(outputs, targets)[1].astype(jnp.asarray(outputs).dtype)

    return Loss(value, gradient)


negative_log_likelihood = _negative_log_likelihood()
"""``−Σ_k p_k y_k`` of log-probabilities ``y``, such as `fnet.layers.log_softmax` gives; labels count as p = 1 there.

Of logits it is no loss, having no least value: they go to `softmax_cross_entropy`. Finite at a log-probability of −inf
whose probability is 0. PyTorch: ``nll_loss``, a mean, with the classes on axis 1.
"""

# --- entry by entry, summed over the features ------------------------------------------------------------------------


def _by_entry(name, check, value, gradient) -> Loss:
    """The loss with entries ``value(z, y)``, whose derivatives by z are ``gradient(z, y)``."""

    def read(outputs, targets):
        z, y = check(name, outputs, targets)
        return z.astype(wide(z.dtype)), y.astype(wide(z.dtype))

    def summed(outputs, targets):
        entries = value(*read(outputs, targets))
        return entries.sum(-1) if entries.ndim > 1 else entries

    def by_hand(outputs, targets):
        return gradient(*read(outputs, targets)).astype(jnp.asarray(outputs).dtype)

    return Loss(summed, by_hand)


def check_real(name, outputs, targets):
    """Both as arrays; raises unless they are floating and of one shape."""
    outputs, targets = _array(name, "outputs", outputs), _array(name, "targets", targets)
    _require_floating(name, outputs)
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(f"{name}: targets are {targets.dtype}; expected floating: convert them, say to float32")
    _require_same_shape(name, outputs, targets)
    return jnp.asarray(outputs), jnp.asarray(targets)


def check_binary(name, outputs, targets):
    """Both as arrays, 0/1 targets as floats; raises unless shapes agree and known targets are from 0 to 1."""
    outputs, targets = _array(name, "outputs", outputs), _array(name, "targets", targets)
    _require_floating(name, outputs)
    _require_same_shape(name, outputs, targets)
    _require_range(name, "target", targets, 1)
    z, y = jnp.asarray(outputs), jnp.asarray(targets)
    if jnp.issubdtype(y.dtype, jnp.floating):
        return z, y
    if not (jnp.issubdtype(y.dtype, jnp.integer) or y.dtype == jnp.bool_):
        raise ValueError(f"{name}: targets are {y.dtype}; expected bool, integer or floating")
    y = y.astype(jnp.float32)
    return z, jnp.where((y == 0) | (y == 1), y, jnp.nan)


def _binary_cross_entropy(z, y):
    # 0 · log 0 = 0 at logits of ±inf that the target agrees with
    z_if_0 = jnp.where((y == 1) & (z == jnp.inf), 0, z)
    z_if_1 = jnp.where((y == 0) & (z == -jnp.inf), 0, z)
    return y * jax.nn.softplus(-z_if_1) + (1 - y) * jax.nn.softplus(z_if_0)


binary_cross_entropy = _by_entry(
    "binary_cross_entropy",
    check_binary,
    _binary_cross_entropy,
    # −log σ(z) = log(1 + e^−z) has derivative −σ(−z), and −log σ(−z) has σ(z); together σ(z) − y
    lambda z, y: (1 - y) * jax.nn.sigmoid(z) - y * jax.nn.sigmoid(-z),
)
"""Binary cross-entropy of logits: ``−y log σ(z) − (1 − y) log σ(−z)``, summed over the last of two or more axes.

Targets have the outputs' shape: bool, integers 0 and 1, or floating from 0 to 1. Gradient ``½ − y`` at z = 0; finite at
logits of ±inf that the target agrees with. PyTorch: ``binary_cross_entropy_with_logits``, a mean.
"""

squared_error = _by_entry(
    "squared_error",
    check_real,
    lambda z, y: jnp.square(z - y),
    lambda z, y: 2 * (z - y),  # ∂(z − y)²/∂z
)
"""``Σ (z − y)²``, without the ½: exactly twice `half_squared_error`. PyTorch's ``MSELoss`` and Keras divide it."""

half_squared_error = _by_entry(
    "half_squared_error",
    check_real,
    lambda z, y: jnp.square(z - y) / 2,
    lambda z, y: z - y,  # ∂½(z − y)²/∂z
)
"""``½ Σ (z − y)²``, whose gradient is the plain difference: exactly half of `squared_error`; optax' ``l2_loss``."""

absolute_error = _by_entry(
    "absolute_error",
    check_real,
    lambda z, y: (z - y) * jnp.sign(z - y),  # |d| = d sign d, which autodiff gives derivative 0 at 0, and `abs` 1
    lambda z, y: jnp.sign(z - y),  # ∂|z − y|/∂z, and 0 at z = y
)
"""``Σ |z − y|``, with subgradient 0 where z = y."""


def huber(delta=1.0) -> Loss:
    """``Σ h(z − y)`` with ``h(d) = ½ d²`` for ``|d| <= delta``, and ``delta (|d| − ½ delta)`` beyond.

    Huber, 1964; PyTorch's ``huber_loss``, whose ``smooth_l1_loss`` is this divided by delta. ``delta`` may be traced.
    Raises ValueError for one that is not positive.
    """
    require(delta > 0, f"huber: expected delta > 0, got {delta}")

    def clipped(z, y):
        d, limit = z - y, jnp.asarray(delta, z.dtype)
        return jnp.where(jnp.abs(d) <= limit, d, jnp.sign(d) * limit)

    def value(z, y):  # with c = d clipped to ±delta, both branches are c d − ½ c²
        c = clipped(z, y)
        return c * (z - y - c / 2)

    # h′ = c + c′ (d − c), and where c′ is not 0, c = d
    return _by_entry("huber", check_real, value, clipped)


# --- targets of classes, and what is required of all ------------------------------------------------------------------


def check_classes(name, logits, targets):
    """Both as arrays; raises unless targets are labels ``(...)`` or probabilities ``(..., K)`` for ``(..., K)``."""
    logits, targets = _array(name, "outputs", logits), _array(name, "targets", targets)
    _require_floating(name, logits)
    if not logits.shape:
        raise ValueError(f"{name}: outputs have no axes; expected (..., K), the logits of K classes")
    *rows, classes = logits.shape
    is_label = jnp.issubdtype(targets.dtype, jnp.integer)
    fits = targets.shape == tuple(rows) if is_label else targets.shape == logits.shape
    if not fits or not (is_label or jnp.issubdtype(targets.dtype, jnp.floating)):
        raise ValueError(
            f"{name}: outputs {logits.shape} do not go with {targets.dtype} targets {targets.shape}; "
            f"expected integer labels {tuple(rows)} or floating probabilities {logits.shape}: reshape or convert them"
        )
    if is_label:
        _require_range(name, "label", targets, classes - 1, f" (outputs have {classes} classes)")
    return jnp.asarray(logits), jnp.asarray(targets)


def _array(name, what, given):
    """``given``, or an array of a list of numbers; raises for anything else, such as outputs beside their mask."""
    if isinstance(given, np.ma.MaskedArray):
        refuse_masked(f"{name}: {what} have", given, "or give their examples the weight 0")
        return np.asarray(given)
    if isinstance(given, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return given
    numbers = isinstance(given, list | tuple) and not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(given))
    if numbers or isinstance(given, int | float):
        try:
            array = np.asarray(given)
        except ValueError:  # rows of unequal length
            array = None
        if array is not None and array.dtype.kind in "biuf":
            return array
    leaves = [leaf for leaf in jax.tree.leaves(given) if hasattr(leaf, "shape")]
    parts = ", ".join(f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(leaf.shape)}" for leaf in leaves)
    remedy = "take its parts apart"
    if is_masked(given):
        remedy = "end the model with drop_mask() and give the mask as the batch's weights"
    if len(leaves) == 1 and leaves[0] is given:  # a table, a tensor of another library
        remedy = "of a table take .to_numpy(), of a tensor numpy.asarray"
    raise ValueError(
        f"{name}: {what} are a {type(given).__name__} of {parts or repr(given)[:60]}; expected one array: {remedy}"
    )


def _probabilities(targets, z):
    """Targets of classes as probabilities, shaped like the outputs ``z`` and in their dtype."""
    return targets.astype(z.dtype) if targets.ndim == z.ndim else _one_hot(targets, z.shape[-1], z.dtype)


def _one_hot(labels, classes, dtype):
    """Probability 1 at the label; NaN throughout where there is no such class, so that it cannot pass unseen."""
    if labels.dtype.itemsize < 4:  # an int8 cannot be compared with 200 classes
        labels = labels.astype(jnp.int32)
    known = (labels >= 0) & (labels < classes)
    return jnp.where(known[..., None], jax.nn.one_hot(labels, classes, dtype=dtype), jnp.nan)


def _require_range(name, what, targets, high, note=""):
    """Raise for the first target that is not from 0 to ``high``; traced ones are not known."""
    if isinstance(targets, Tracer):
        return
    known = np.asarray(targets)
    inside = (known >= 0) & (known <= high)
    if not inside.all():
        at = tuple(np.argwhere(~inside)[0].tolist())
        raise ValueError(f"{name}: {what} {known[at]} at {at} is outside 0..{high}{note}")


def _require_floating(name, outputs):
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"{name}: outputs are {outputs.dtype}; expected floating: convert them, say to float32")


def _require_same_shape(name, outputs, targets):
    if outputs.shape != targets.shape:
        raise ValueError(
            f"{name}: outputs {outputs.shape} and targets {targets.shape} must have one shape, since broadcasting "
            f"would pair examples with each other's targets: reshape the targets to {outputs.shape}"
        )
