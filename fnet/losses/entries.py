"""Losses entry by entry: ``outputs (B,)`` or ``(B, ..., F)``, targets of the same shape, summed over the features F.

Legend: B batch, F features; in derivations z outputs, y targets, σ(z) = 1/(1 + e^−z).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import require
from fnet.core.numerics import wide
from fnet.losses.checks import (
    above_0,
    as_array,
    check_binary,
    check_real,
    require_floating,
    require_range,
    require_same_shape,
    step,
)
from fnet.types import Loss


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


def per_output(loss: Loss) -> Loss:
    """The loss of each entry on its own, ``(B, ..., F)`` for outputs ``(B, ..., F)``, where ``loss`` adds up F of them.

    With ``Batch.weights (B, ..., F)``, 0 where a target is missing (and may be NaN), the mean is over the entries that
    are there; weights ``(B,)`` hold for all entries of an example. Either way the mean is over entries, PyTorch's, and
    gradients are F times smaller than the sum's. A metric has to give a value per entry too, which ``per_output(loss)``
    is. Raises ValueError for a loss that is no sum over entries, such as softmax_cross_entropy.

    >>> import fnet
    >>> y = jnp.array([[1.0, jnp.nan], [3.0, 2.0]])
    >>> batch = fnet.Batch(jnp.zeros((2, 2)), y, weights=jnp.where(jnp.isnan(y), 0.0, 1.0))
    >>> gradient = fnet.backprop(fnet.layers.identity(), per_output(squared_error), inputs=True)
    >>> (_, dz), _, metrics = gradient((), (), batch, None)
    >>> f"{metrics['loss'].value:.4f} = {(1 + 9 + 4) / 3:.4f}"
    '4.6667 = 4.6667'
    >>> [[f"{d:.4f}" for d in row] for row in dz]
    [['-0.6667', '0.0000'], ['-2.0000', '-1.3333']]
    """

    def value(outputs, targets):
        return loss.value(*map(_alone, (outputs, targets)))

    def gradient(outputs, targets):  # of an entry's own value, which the others' do not depend on
        return loss.gradient(*map(_alone, (outputs, targets)))[..., 0]

    if loss.count is not None or loss.backward is not None:
        raise ValueError("per_output: the loss counts or mixes examples; expected a sum over entries: squared_error")
    with jax.ensure_compile_time_eval():  # a loss that compares entries shows it in any two of them
        z, y = np.array([[0.4, -0.7]], np.float32), np.array([[0, 1]], np.float32)
        whole, parts = loss.value(z, y), value(z, y)
        known = not isinstance(whole, Tracer)
        if parts.shape != z.shape or (known and not np.allclose(whole, parts.sum(-1), 1e-5)):
            raise ValueError(
                "per_output: the loss of two entries is not the sum of the losses of each; expected a loss that adds "
                "up entries, such as squared_error: classes are weighted by their example"
            )
    return Loss(value, gradient)


def _alone(array):
    """Each entry as an example of one feature; what is known stays known."""
    return array[..., None]


# --- real targets ----------------------------------------------------------------------------------------------------

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


def pinball(quantile=0.5) -> Loss:
    """``Σ q d⁺ + (1 − q) d⁻`` with ``d = y − z``, least where z is the quantile q of y.

    Koenker and Bassett, 1978. At q = ½ half of `absolute_error`. ``quantile`` is a number or ``(F,)``, one for each
    output; it may be traced. The subgradient at z = y is ½ − q, halfway. Raises ValueError outside 0 < q < 1.

    >>> [f"{v:.2f}" for v in pinball(0.9)(jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0]))]
    ['0.90', '0.10']
    """
    given: Any = quantile if isinstance(quantile, jax.Array) else np.asarray(quantile)
    require(((given > 0) & (given < 1)).all(), f"pinball: expected quantile between 0 and 1, got {quantile}")

    def lean(z):  # q − ½
        if given.ndim and given.shape != z.shape[-1:]:
            raise ValueError(
                f"pinball: quantile {given.shape} does not go with outputs {z.shape}; expected a number, or one for "
                "each output, on the last axis"
            )
        q = jnp.asarray(given, z.dtype)
        return q.reshape((1,) * (z.ndim - q.ndim) + q.shape) - 0.5

    return _by_entry(
        "pinball",
        check_real,
        lambda z, y: (y - z) * (lean(z) + jnp.sign(y - z) / 2),  # q d⁺ + (1 − q) d⁻ = (q − ½) d + ½ |d|
        lambda z, y: -(lean(z) + jnp.sign(y - z) / 2),  # ∂d/∂z = −1:  −(q − ½) − ½ sign d
    )


def _check_counts(name, outputs, targets):
    """Both as arrays, counts as floats; raises unless shapes agree and known targets are at least 0."""
    outputs, targets = as_array(name, "outputs", outputs), as_array(name, "targets", targets)
    require_floating(name, outputs)
    if not (jnp.issubdtype(targets.dtype, jnp.integer) or jnp.issubdtype(targets.dtype, jnp.floating)):
        raise ValueError(f"{name}: targets are {targets.dtype}; expected integer or floating counts")
    require_same_shape(name, outputs, targets)
    require_range(name, "target", targets, np.inf)
    z, y = jnp.asarray(outputs), jnp.asarray(targets)
    return z, y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(wide(z.dtype))


poisson = _by_entry(
    "poisson",
    _check_counts,
    lambda z, y: jnp.exp(z) - y * jnp.where((y == 0) & (z == -jnp.inf), 0, z),  # 0 · log 0 = 0
    lambda z, y: jnp.exp(z) - y,  # ∂(e^z − y z)/∂z
)
"""``Σ e^z − y z``: minus the log-likelihood of counts y at the rate e^z, but for ``log y!``, which z does not change.

Targets are counts of at least 0, integer or floating. PyTorch's ``PoissonNLLLoss`` by default, which takes the mean
over entries; Keras' ``Poisson`` takes the rate itself for z.
"""


# --- targets of two classes ------------------------------------------------------------------------------------------


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


def _of_two(name, term, slope, positive, negative) -> Loss:
    """``Σ positive · y · term(z) + negative · (1 − y) · term(−z)``, where ``slope`` is the derivative of ``term``."""

    def parts(z, y):  # 0 · log 0 = 0, as above
        a, b = (jnp.asarray(weight, z.dtype) for weight in (positive, negative))
        z_if_1 = jnp.where((y == 0) & (z == -jnp.inf), 0, z)
        z_if_0 = jnp.where((y == 1) & (z == jnp.inf), 0, z)
        return a * y, z_if_1, b * (1 - y), -z_if_0

    def value(z, y):
        a, z_if_1, b, z_if_0 = parts(z, y)
        return a * term(z_if_1) + b * term(z_if_0)

    def gradient(z, y):  # ∂(a term(z) + b term(−z))/∂z
        a, z_if_1, b, z_if_0 = parts(z, y)
        return a * slope(z_if_1) - b * slope(z_if_0)

    return _by_entry(name, check_binary, value, gradient)


def weighted_binary_cross_entropy(positive_weight) -> Loss:
    """``−c y log σ(z) − (1 − y) log σ(−z)``, with c the ``positive_weight``: above 1 it finds more, and errs more.

    PyTorch's ``pos_weight``: like there, the mean over examples does not divide by c. ``positive_weight`` may be
    traced. Raises ValueError for one that is not positive.

    >>> [f"{v:.4f}" for v in weighted_binary_cross_entropy(3.0)(jnp.zeros(2), jnp.array([0, 1]))]  # log 2, 3 log 2
    ['0.6931', '2.0794']
    """
    name = "weighted_binary_cross_entropy"
    require(positive_weight > 0, f"{name}: expected positive_weight > 0, got {positive_weight}")
    # −log σ(z) = log(1 + e^−z), whose derivative is −σ(−z)
    return _of_two(name, lambda z: jax.nn.softplus(-z), lambda z: -jax.nn.sigmoid(-z), positive_weight, 1)


def binary_focal_cross_entropy(gamma=2.0, alpha=None) -> Loss:
    """``−y (1 − q)^γ log q − (1 − y) q^γ log(1 − q)`` with ``q = σ(z)``: what is right already counts little.

    ``alpha`` weights the positive term, and ``1 − alpha`` the negative one. Lin et al., arXiv:1708.02002, where γ = 2
    goes with alpha = ¼; Keras' ``BinaryFocalCrossentropy`` and torchvision's ``sigmoid_focal_loss``, equal for targets
    of 0 and 1. γ and alpha may be traced. Raises ValueError for γ below 0 and for alpha outside 0..1.

    >>> [f"{v:.5f}" for v in binary_focal_cross_entropy(2.0)(jnp.array([0.0, 3.0]), jnp.array([1, 1]))]
    ['0.17329', '0.00011']
    """
    name = "binary_focal_cross_entropy"
    require(gamma >= 0, f"{name}: expected gamma of at least 0, got {gamma}")
    if alpha is not None:
        require((alpha >= 0) & (alpha <= 1), f"{name}: expected alpha from 0 to 1, got {alpha}")

    def missing(z):  # (1 − q)^γ = σ(−z)^γ, which is 1 at γ = 0 however small σ(−z)
        return jnp.exp(-jnp.asarray(gamma, z.dtype) * jax.nn.softplus(z))

    def term(z):
        return missing(z) * jax.nn.softplus(-z)

    # (σ(−z)^γ)′ = −γ σ(−z)^γ σ(z), and with s = softplus(−z), s′ = −σ(−z):  (σ(−z)^γ s)′ = −σ(−z)^γ (γ σ(z) s + σ(−z))
    def slope(z):
        missed = jax.nn.sigmoid(z) * jax.nn.softplus(-z)
        return -missing(z) * (jnp.asarray(gamma, z.dtype) * missed + jax.nn.sigmoid(-z))

    return _of_two(name, term, slope, *((1, 1) if alpha is None else (alpha, 1 - alpha)))


# --- margins ---------------------------------------------------------------------------------------------------------

hinge = _by_entry(
    "hinge",
    check_binary,
    lambda z, y: above_0(1 - (2 * y - 1) * z),
    lambda z, y: -(2 * y - 1) * step(1 - (2 * y - 1) * z),  # ∂max(0, 1 − t z)/∂z, and 0 where t z = 1
)
"""``Σ max(0, 1 − t z)`` with ``t = 2 y − 1``: 0 from a margin of 1 on, with subgradient 0 there.

Targets are those of `binary_cross_entropy`, 0 and 1; optax' and Keras' are −1 and 1, and Keras takes the mean over F.
PyTorch's ``HingeEmbeddingLoss`` is another. Cortes and Vapnik, 1995.
"""

squared_hinge = _by_entry(
    "squared_hinge",
    check_binary,
    lambda z, y: jnp.square(above_0(1 - (2 * y - 1) * z)),
    lambda z, y: -2 * (2 * y - 1) * above_0(1 - (2 * y - 1) * z),  # ∂max(0, 1 − t z)²/∂z
)
"""``Σ max(0, 1 − t z)²`` with ``t = 2 y − 1``; targets as in `hinge`."""
