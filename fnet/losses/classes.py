"""Losses of logits ``(..., K)`` against integer labels ``(...)`` or floating probabilities ``(..., K)``.

Legend: K classes; in derivations z logits, q = softmax(z), p targets, ℓ the value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import is_whole, require
from fnet.core.numerics import wide
from fnet.losses.checks import (
    above_0,
    as_array,
    as_probabilities,
    check_classes,
    check_real,
    one_hot,
    require_range,
    step,
)
from fnet.types import Loss

# --- what is read of outputs and targets -----------------------------------------------------------------------------


def _reader(name, smoothing=None, class_weights=None, ignore_index=None) -> tuple[Callable, Callable | None]:
    """``read(logits, targets)`` to logits, their greatest subtracted, and weighted probabilities; and a loss' count."""
    weights = None if class_weights is None else _checked_weights(name, class_weights)
    require(
        ignore_index is None or is_whole(ignore_index, ignore_index),
        f"{name}: ignore_index = {ignore_index!r}; expected a label, such as -100, or None",
    )

    def ignored(targets):
        """Where labels are the one to ignore, known where they are; None where none is."""
        if ignore_index is None:
            return None
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(
                f"{name}: targets are {targets.dtype}, among which there is no label {ignore_index} to ignore; "
                "expected integer labels, or probabilities and ignore_index=None"
            )
        return _labels(targets) == ignore_index

    def read(logits, targets):
        targets = as_array(name, "targets", targets)
        out = ignored(targets)
        if out is not None:
            targets = _numpy(targets).where(out, 0, targets)
        z, targets = check_classes(name, logits, targets)
        z = z.astype(wide(z.dtype))
        if out is not None:
            z = jnp.where(out[..., None], 0, z)
        p = as_probabilities(targets, z)
        if smoothing is not None:
            a = jnp.asarray(smoothing, z.dtype)
            p = (1 - a) * p + a / z.shape[-1]
        if weights is not None:
            if len(weights) != z.shape[-1]:
                raise ValueError(
                    f"{name}: class_weights ({len(weights)},) do not go with outputs {z.shape}; expected a weight for "
                    f"each of {z.shape[-1]} classes"
                )
            p = p * jnp.asarray(weights, z.dtype).reshape((1,) * (z.ndim - 1) + (-1,))
        if out is not None:
            p = jnp.where(out[..., None], 0, p)
        return z - jax.lax.stop_gradient(z.max(-1, keepdims=True)), p

    def count(targets):
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            return np.ones(targets.shape[:-1], np.float32)
        out, labels = ignored(targets), _labels(targets)
        counts = np.ones(labels.shape, np.float32)
        if weights is not None:  # a label out of range counts, so that it is refused, or its NaN seen
            xp = _numpy(labels, weights)
            inside = (labels >= 0) & (labels < len(weights))
            counts = xp.where(inside, xp.asarray(weights)[xp.clip(labels, 0, len(weights) - 1)], 1)
        return counts if out is None else _numpy(out, counts).where(out, 0, counts)

    return read, None if weights is None and ignore_index is None else count


def _numpy(*arrays) -> Any:
    """NumPy where all of these are known, so that labels stay known and are checked; else jax' form of it."""
    return jnp if any(isinstance(array, Tracer) for array in arrays) else np


def _labels(targets):
    """Labels in a dtype that holds any number of classes, and what is to be ignored."""
    xp = _numpy(targets)
    return xp.asarray(targets).astype(np.int64 if xp is np else jnp.int32)


def _checked_weights(name, given) -> Any:
    weights = given if isinstance(given, Tracer) else np.asarray(given)
    expected = "expected a number of at least 0 for each class, (K,)"
    require(weights.ndim == 1, f"{name}: class_weights of shape {weights.shape}; {expected}")
    require((weights >= 0).all(), f"{name}: class_weights = {weights}; {expected}")
    return weights


# --- cross-entropies -------------------------------------------------------------------------------------------------


def _cross_entropy(name, smoothing=None, class_weights=None, ignore_index=None) -> Loss:
    read, count = _reader(name, smoothing, class_weights, ignore_index)

    def value(logits, targets):  # Σ p (log Σ e^z − z), in which any shift of z cancels
        z, p = read(logits, targets)
        z_counted = jnp.where((p == 0) & (z == -jnp.inf), 0, z)  # 0 · log 0 = 0
        return p.sum(-1) * jnp.log(jnp.exp(z).sum(-1)) - (p * z_counted).sum(-1)

    def gradient(logits, targets):  # ℓ = (Σ p) log Σ e^z − Σ p z:  ∂ℓ/∂z_k = (Σ p) e^z_k / Σ e^z − p_k
        z, p = read(logits, targets)
        e = jnp.exp(z)
        return (p.sum(-1, keepdims=True) * (e / e.sum(-1, keepdims=True)) - p).astype(jnp.asarray(logits).dtype)

    return Loss(value, gradient, count)


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
    return _cross_entropy("smoothed_cross_entropy", _checked_smoothing("smoothed_cross_entropy", label_smoothing))


def cross_entropy(class_weights=None, ignore_index: int | None = None, *, label_smoothing=None) -> Loss:
    """``−Σ_k c_k p_k log softmax(z)_k``, with ``class_weights`` c ``(K,)``; 0 where the label is ``ignore_index``.

    The mean is by weight, ``Σ w ℓ / Σ w c_y`` over a batch with labels y and weights w: for labels the numbers of a
    `Batch` whose weights are ``w c_y``, and 0 where a label is ignored. Metrics leave out what is ignored, and do not
    see c. So does PyTorch's ``cross_entropy``; Keras' ``class_weight`` divides by the examples instead, optax has
    neither. Against probabilities an example counts 1 whatever c is, as in PyTorch; none can be ignored.

    ``label_smoothing`` is that of `smoothed_cross_entropy`, before c as in PyTorch. It and c may be traced. Raises
    ValueError for weights below 0 or of another length than the classes, and for smoothing outside 0..1.

    >>> import fnet
    >>> loss = cross_entropy(jnp.array([1.0, 3.0]), ignore_index=-100)
    >>> logits, labels = jnp.array([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]]), jnp.array([0, 1, -100])
    >>> [f"{v:.4f}" for v in loss(logits, labels)], loss.count(labels).tolist()
    (['0.6931', '3.9398', '0.0000'], [1.0, 3.0, 0.0])
    >>> mean = fnet.make_evaluate(fnet.layers.identity(), loss)((), (), fnet.Batch(logits, labels))["loss"].value
    >>> f"{mean:.4f} = {(0.69315 + 3.93979) / 4:.4f}"
    '1.1582 = 1.1582'
    """
    if label_smoothing is not None:
        _checked_smoothing("cross_entropy", label_smoothing)
    return _cross_entropy("cross_entropy", label_smoothing, class_weights, ignore_index)


def _checked_smoothing(name, label_smoothing):
    require(
        (label_smoothing >= 0) & (label_smoothing <= 1),
        f"{name}: expected label_smoothing from 0 to 1, got {label_smoothing}",
    )
    return label_smoothing


def focal_cross_entropy(gamma=2.0, class_weights=None, ignore_index: int | None = None) -> Loss:
    """``−Σ_k c_k p_k (1 − q_k)^γ log q_k`` with ``q = softmax(z)``: what is right already counts little.

    Lin et al., arXiv:1708.02002; Keras' ``CategoricalFocalCrossentropy``, whose ``alpha`` is c. At γ = 0 it is
    `cross_entropy`, whose other arguments and mean it has; the paper and Keras do not divide by c. ``gamma`` may be
    traced. Raises ValueError for one below 0.

    >>> f"{focal_cross_entropy(2.0)(jnp.array([[0.0, 0.0]]), jnp.array([1]))[0]:.4f}"  # log 2 / 4
    '0.1733'
    """
    name = "focal_cross_entropy"
    require(gamma >= 0, f"{name}: expected gamma of at least 0, got {gamma}")
    read, count = _reader(name, None, class_weights, ignore_index)

    def parts(logits, targets):
        """``p``, ``l = log q``, and ``(1 − q)^γ``; with l = −1 where q is 1 or p is 0, and where that is."""
        z, p = read(logits, targets)
        log_q = z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))
        nothing = (log_q == 0) | ((p == 0) & (log_q == -jnp.inf))
        safe = jnp.where(nothing, -1, log_q)
        return p, log_q, safe, (-jnp.expm1(safe)) ** jnp.asarray(gamma, z.dtype), nothing

    def value(logits, targets):
        p, _, log_q, factor, nothing = parts(logits, targets)
        return -(p * jnp.where(nothing, 0, factor * log_q)).sum(-1)

    # ∂(−(1 − q)^γ log q)/∂log q = u = (1 − q)^γ (γ q log q / (1 − q) − 1), which is 0 at q = 1 but for γ = 0, where
    # it cancels below; and ∂log q_k/∂z_j = δ_kj − q_j:  ∂ℓ/∂z_j = p_j u_j − q_j Σ_k p_k u_k
    def gradient(logits, targets):
        p, log_q, safe, factor, nothing = parts(logits, targets)
        u = factor * (-jnp.asarray(gamma, p.dtype) * jnp.exp(safe) * safe / jnp.expm1(safe) - 1)
        pu = p * jnp.where(nothing, 0, u)
        return (pu - jnp.exp(log_q) * pu.sum(-1, keepdims=True)).astype(jnp.asarray(logits).dtype)

    return Loss(value, gradient, count)


# --- of log-probabilities --------------------------------------------------------------------------------------------


def _read_log_probabilities(outputs, targets):
    y, targets = check_classes("negative_log_likelihood", outputs, targets)
    y = y.astype(wide(y.dtype))
    return y, as_probabilities(targets, y)


def _likelihood(outputs, targets):
    y, p = _read_log_probabilities(outputs, targets)
    return -(p * jnp.where((p == 0) & (y == -jnp.inf), 0, y)).sum(-1)  # 0 · log 0 = 0


def _likelihood_gradient(outputs, targets):  # ℓ = −Σ p y:  ∂ℓ/∂y_k = −p_k
    return -_read_log_probabilities(outputs, targets)[1].astype(jnp.asarray(outputs).dtype)


negative_log_likelihood = Loss(_likelihood, _likelihood_gradient)
"""``−Σ_k p_k y_k`` of log-probabilities ``y``, such as `fnet.layers.log_softmax` gives; labels count as p = 1 there.

Of logits it is no loss, having no least value: they go to `softmax_cross_entropy`. Finite at a log-probability of −inf
whose probability is 0. PyTorch: ``nll_loss``, a mean, with the classes on axis 1.
"""


# --- divergences -----------------------------------------------------------------------------------------------------


def _divergence(name, read) -> Loss:
    """``Σ p (log p − log softmax(z))`` of ``p, log p = read(targets)``."""

    def checked(logits, targets):
        z, y = check_real(name, logits, targets)
        if not z.shape:
            raise ValueError(f"{name}: outputs have no axes; expected (..., K), the logits of K classes")
        z = z.astype(wide(z.dtype))
        return z - jax.lax.stop_gradient(z.max(-1, keepdims=True)), *read(targets, y.astype(z.dtype))

    def value(logits, targets):
        z, p, log_p = checked(logits, targets)
        log_q = z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))
        nothing = (p == 0) & ~jnp.isnan(log_q)  # 0 · log 0 = 0
        return (p * jnp.where(nothing, 0, log_p - log_q)).sum(-1)

    def gradient(logits, targets):  # of z only the cross-entropy −Σ p log q:  (Σ p) q − p
        z, p, _ = checked(logits, targets)
        e = jnp.exp(z)
        return (p.sum(-1, keepdims=True) * (e / e.sum(-1, keepdims=True)) - p).astype(jnp.asarray(logits).dtype)

    return Loss(value, gradient)


def _probabilities(targets, p):
    require_range("kl_divergence", "target", targets, np.inf)
    return p, jnp.log(jnp.where(p == 0, 1, p))


def _from_logits(_, y):
    log_p = jax.nn.log_softmax(y)
    return jnp.exp(log_p), log_p


kl_divergence = _divergence("kl_divergence", _probabilities)
"""``Σ_k p_k log (p_k / softmax(z)_k)``, of probabilities p from what the logits z say; gradient ``softmax(z) − p``.

Kullback and Leibler, 1951; softmax_cross_entropy less the entropy of p, so with the same gradient. PyTorch's
``KLDivLoss`` takes log-probabilities for z and its "mean" is over all entries, its "batchmean" fnet's mean; Keras takes
probabilities. Raises ValueError for known probabilities below 0.
"""

kl_divergence_from_logits = _divergence("kl_divergence_from_logits", _from_logits)
"""`kl_divergence` of ``p = softmax(targets)``, exact for logits however far apart: what a student learns of a teacher.

Hinton et al., arXiv:1503.02531. PyTorch: ``KLDivLoss(log_target=True)`` of log-probabilities.
"""


# --- margins ---------------------------------------------------------------------------------------------------------


def _margin(logits, targets):
    """The margin missed ``1 + max_{k ≠ y} z_k − z_y``, and one-hot the rival that has the maximum and the label."""
    targets = as_array("multiclass_hinge", "targets", targets)
    z, labels = check_classes("multiclass_hinge", logits, targets)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"multiclass_hinge: targets are {labels.dtype}; expected integer labels {z.shape[:-1]}")
    z = z.astype(wide(z.dtype))
    label = one_hot(labels, z.shape[-1], z.dtype)
    z = z * (1 + 0 * label[..., :1])  # NaN for a label out of range
    others = jnp.where(label == 1, -jnp.inf, z)
    rival = jax.nn.one_hot(others.argmax(-1), z.shape[-1], dtype=z.dtype)
    of = lambda k: jnp.where(k == 1, z, 0).sum(-1)  # noqa: E731
    return 1 + of(rival) - of(label), rival, label


def _multiclass_hinge(logits, targets):
    margin, rival, label = _margin(logits, targets)
    alone = rival * label  # one class has no rival
    return jnp.where(alone.sum(-1) > 0, 0, above_0(margin))


def _multiclass_hinge_gradient(logits, targets):  # ℓ = max(0, 1 + z_rival − z_y): 0, or 1 at the rival and −1 at y
    margin, rival, label = _margin(logits, targets)
    return (step(margin)[..., None] * (rival - label)).astype(jnp.asarray(logits).dtype)


multiclass_hinge = Loss(_multiclass_hinge, _multiclass_hinge_gradient)
"""``max(0, 1 + max_{k ≠ y} z_k − z_y)`` of logits and labels y; 0 where y leads by 1 at least.

Crammer and Singer, 2001; optax' ``multiclass_hinge_loss`` and Keras' ``CategoricalHinge``. PyTorch's
``MultiMarginLoss`` is another: the mean over all k of their own hinges (Weston and Watkins). The subgradient at 0 is 0,
and of equal rivals the first has it.
"""
