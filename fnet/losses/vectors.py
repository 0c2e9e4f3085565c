"""Losses of an example's whole output: how it overlaps a mask, which way it points, how near it is to others.

Legend: B batch, D features of an embedding; ℓ the value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fnet.core.checks import require
from fnet.core.numerics import wide
from fnet.losses.checks import above_0, as_array, check_binary, check_real, require_floating, step
from fnet.types import Loss

# --- overlaps --------------------------------------------------------------------------------------------------------


def dice(smooth=1.0) -> Loss:
    """``1 − (2 Σ q y + s) / (Σ q + Σ y + s)`` with ``q = σ(z)``, over all entries of an example, however many axes.

    ``outputs (B, ...)`` are logits, targets as in `binary_cross_entropy`; one value per example, ``(B,)``. ``smooth``
    is s: an example without a mask is right where it has none. Sudre et al., arXiv:1707.03237; Milletari et al.,
    arXiv:1606.04797, have Σ q² + Σ y² beneath. optax' ``dice_loss`` has twice its ``smooth`` for s; Keras' ``Dice``
    takes probabilities and sums over the batch too by default. ``smooth`` may be traced. Raises ValueError for one that
    is not positive.

    >>> [f"{v:.2f}" for v in dice(1.0)(jnp.array([[9.0, -9.0], [-9.0, -9.0]]), jnp.array([[1, 0], [1, 0]]))]
    ['0.00', '0.50']
    """
    require(smooth > 0, f"dice: expected smooth > 0, got {smooth}")

    def read(outputs, targets):
        z, y = check_binary("dice", outputs, targets)
        if not z.ndim:
            raise ValueError("dice: outputs have no axes; expected (B, ...)")
        z, y = z.astype(wide(z.dtype)), y.astype(wide(z.dtype))
        q, s, over = jax.nn.sigmoid(z), jnp.asarray(smooth, z.dtype), tuple(range(1, z.ndim))
        overlap, whole = (2 * (q * y).sum(over, keepdims=True) + s, (q + y).sum(over, keepdims=True) + s)
        return z, y, q, overlap, whole

    def value(outputs, targets):
        _, _, _, overlap, whole = read(outputs, targets)
        return (1 - overlap / whole).reshape(overlap.shape[0])

    def gradient(outputs, targets):  # ℓ = 1 − a/b, where a has the slope 2 y by q and b has 1; and q has q (1 − q) by z
        z, y, q, overlap, whole = read(outputs, targets)
        dq = (overlap / whole - 2 * y) / whole
        return (dq * q * jax.nn.sigmoid(-z)).astype(jnp.asarray(outputs).dtype)

    return Loss(value, gradient)


# --- directions ------------------------------------------------------------------------------------------------------


def _direction(v):
    """``v / ‖v‖`` and ``1 / ‖v‖`` over the last axis, whatever v's scale; at v = 0 both are 0, and the slope too."""
    largest = jax.lax.stop_gradient(jnp.abs(v).max(-1, keepdims=True))  # a direction does not depend on it
    zero = largest == 0
    scaled = v / jnp.where(zero, 1, largest)
    norm = jnp.sqrt(jnp.where(zero, 1, jnp.square(scaled).sum(-1, keepdims=True)))
    return jnp.where(zero, 0, scaled / norm), jnp.where(zero, 0, 1 / norm / jnp.where(zero, 1, largest))


def _cosine(outputs, targets):
    z, y = check_real("cosine_distance", outputs, targets)
    if not z.ndim:
        raise ValueError("cosine_distance: outputs have no axes; expected vectors (..., D)")
    z, y = z.astype(wide(z.dtype)), y.astype(wide(z.dtype))
    (u, over_norm), (t, _) = _direction(z), _direction(y)
    return u, t, over_norm, (u * t).sum(-1, keepdims=True)


def _cosine_gradient(outputs, targets):  # u = z/‖z‖ has du = (dz − (dz·u) u)/‖z‖:  ∂(−u·t)/∂z = −(t − (u·t) u)/‖z‖
    u, t, over_norm, cosine = _cosine(outputs, targets)
    return (-(t - cosine * u) * over_norm).astype(jnp.asarray(outputs).dtype)


cosine_distance = Loss(lambda outputs, targets: 1 - _cosine(outputs, targets)[-1].squeeze(-1), _cosine_gradient)
"""``1 − z·y / (‖z‖ ‖y‖)`` of vectors ``(..., D)``: 0 where they point the same way, 2 where they are opposite.

A vector of zeros has no direction: value 1 and gradient 0. optax' ``cosine_distance``; PyTorch's
``CosineEmbeddingLoss`` at targets of 1, whose lengths are at least 1e-8; Keras' ``CosineSimilarity`` is without the 1.
"""


# --- embeddings of several views -------------------------------------------------------------------------------------


def _views(name, outputs, what: str):
    """Embeddings ``(B, views, D)`` in float32 at least, one array for each view."""
    z = as_array(name, "outputs", outputs)
    require_floating(name, z)
    views = what.count(",") + 1
    if len(z.shape) != 3 or z.shape[1] != views:
        raise ValueError(f"{name}: outputs {z.shape}; expected (B, {views}, D), the embeddings of {what}")
    z = jnp.asarray(z)
    return tuple(jnp.moveaxis(z.astype(wide(z.dtype)), 1, 0))


def triplet(margin=1.0) -> Loss:
    """``max(0, ‖a − p‖² − ‖a − n‖² + margin)`` of the embeddings of an anchor, a positive and a negative.

    ``outputs (B, 3, D)`` are those three of each example; targets are not read. Schroff et al., arXiv:1503.03832.
    PyTorch's ``TripletMarginLoss`` has distances that are not squared. ``margin`` may be traced. Raises ValueError for
    one below 0.

    >>> [f"{v:.2f}" for v in triplet(1.0)(jnp.array([[[0.0], [1.0], [1.2]], [[0.0], [1.0], [2.0]]]), None)]
    ['0.56', '0.00']
    """
    require(margin >= 0, f"triplet: expected margin of at least 0, got {margin}")

    def read(outputs):
        a, p, n = _views("triplet", outputs, "an anchor, a positive, a negative")
        return a, p, n, (jnp.square(a - p) - jnp.square(a - n)).sum(-1) + jnp.asarray(margin, a.dtype)

    def value(outputs, targets):
        return above_0(read(outputs)[-1])

    def gradient(outputs, targets):  # of (a − p)² − (a − n)²:  2 (n − p) by a, 2 (p − a) by p, 2 (a − n) by n
        a, p, n, missed = read(outputs)
        by_view = jnp.stack([n - p, p - a, a - n], 1)
        return (2 * step(missed)[:, None, None] * by_view).astype(jnp.asarray(outputs).dtype)

    return Loss(value, gradient)


def info_nce(temperature=0.1) -> Loss:
    """``−log softmax_j(u_i · v_j / τ)_i`` with directions u, v: to know one's own other view among the batch's.

    ``outputs (B, 2, D)`` are the embeddings of two views of each example, the first looking for the second; targets are
    not read. van den Oord et al., arXiv:1807.03748, with the cosines of Chen et al., arXiv:2002.05709 (whose negatives
    are both views of the others). The value of an example depends on the outputs of all. An example whose second view
    is 0 is not there, in its own value (0) nor in the others': so are those of weight 0. The batch is what is seen at
    once: the parts of `fnet.accumulate` have negatives of their own. ``temperature`` may be traced. Raises ValueError
    for one that is not positive.

    >>> views = jnp.array([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]])
    >>> [f"{v:.4f}" for v in info_nce(1.0)(views, None)]  # log(1 + 1/e)
    ['0.3133', '0.3133']
    """
    require(temperature > 0, f"info_nce: expected temperature > 0, got {temperature}")

    def read(outputs):
        seeking, sought = _views("info_nce", outputs, "one view, another")
        tau = jnp.asarray(temperature, seeking.dtype)
        (u, over_u), (v, over_v) = _direction(seeking), _direction(sought)
        here = (sought != 0).any(-1)
        s = jnp.where(here[None], u @ v.T / tau, -2 / tau)  # cosines are from −1
        s = s - jax.lax.stop_gradient(s.max(-1, keepdims=True, initial=-jnp.inf))  # of no examples too
        e = jnp.where(here[None], jnp.exp(s), 0)
        total = jnp.where(here, e.sum(-1), 1)
        return (u, over_u), (v, over_v), tau, here, s, e, total

    def value(outputs, targets):
        *_, here, s, _, total = read(outputs)
        return jnp.where(here, jnp.log(total) - s.diagonal(), 0)

    # with S = u vᵀ/τ, of Σ_i g_i ℓ_i:  dS_ij = g_i (softmax(S)_ij − δ_ij), du = dS v/τ and dv = dSᵀ u/τ
    def backward(outputs, targets, dvalues):
        (u, over_u), (v, over_v), tau, here, _, e, total = read(outputs)
        share = jnp.where(here, dvalues.astype(tau.dtype), 0)[:, None] / tau
        ds = share * (e / total[:, None] - jnp.eye(len(e), dtype=e.dtype))
        du, dv = ds @ v, ds.T @ u
        along = lambda d, w: d - (d * w).sum(-1, keepdims=True) * w  # noqa: E731
        dz = jnp.stack([along(du, u) * over_u, along(dv, v) * over_v], 1)
        return dz.astype(jnp.asarray(outputs).dtype)

    def gradient(outputs, targets):
        return backward(outputs, targets, jnp.ones(len(outputs), jnp.float32))

    return Loss(value, gradient, backward=backward)
