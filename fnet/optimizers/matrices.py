"""Optimizers that look at a whole leaf: LAMB, Adafactor, Muon.

Legend: p parameter, g gradient, m and v moments, t the update from 1, λ weight decay, R rows, C columns, RMS root mean
square over a leaf.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from fnet.core.checks import require_counts, require_state
from fnet.core.numerics import wide
from fnet.core.trees import named_leaves, on_each_copy, stacked_axes
from fnet.layers.dense import product
from fnet.optimizers.common import (
    about,
    advance,
    check_like,
    check_variant,
    correction,
    elementwise,
    global_norm,
    norm,
    root,
    split,
    start,
)
from fnet.optimizers.schedules import check_numbers
from fnet.optimizers.which import Mask, check_mask, decaying
from fnet.types import Optimizer, PyTree, Schedule


class LambHyper(NamedTuple):
    """Numbers of `lamb`."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any


class LambState(NamedTuple):
    """State of `lamb`."""

    step: jax.Array
    hyper: LambHyper
    rate: jax.Array
    mu: PyTree
    nu: PyTree


def lamb(
    learning_rate: ArrayLike | Schedule = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    *,
    weight_decay: ArrayLike = 0.0,
    mask: Mask = None,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """Adam's step (arXiv:1412.6980) made as long as the leaf it moves, for very large batches.

        u = m̂ / (√v̂ + eps) + λ p            p −= rate · ‖p‖ / ‖u‖ · u

    The norms are over the leaf, of stacked layers over each copy's (`fnet.layers.Copies`); where one of them is 0 their
    ratio is 1. λ is ``weight_decay`` at the leaves of the ``mask`` (as in `adamw`), inside the step that is scaled. The
    paper's φ(‖p‖) is ‖p‖, as in optax. Source: You et al., arXiv:1904.00962.
    """
    check_numbers("lamb", below=1, b1=b1, b2=b2)
    check_numbers("lamb", eps=eps)

    def rule(p, g, m, v, rate, b1, b2, eps, c1, c2, decay):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        u = m / c1 / (root(v) / jnp.sqrt(c2) + eps) + decay * p  # v / c2 may overflow where v does not
        of_p, of_u = norm(p), norm(u)
        ratio = jnp.where((of_p > 0) & (of_u > 0), of_p / jnp.where(of_u > 0, of_u, 1), 1)
        return p - rate * ratio * u, m, v

    return elementwise(
        "lamb",
        LambState,
        LambHyper(learning_rate, b1, b2, eps, weight_decay),
        rule,
        lambda h, rate, t: (rate, h.b1, h.b2, h.eps, correction(h.b1, t), correction(h.b2, t)),
        {"mu": 0.0, "nu": 0.0},
        narrow=("mu",),
        moment_dtype=moment_dtype,
        mask=mask,
        inside=True,
        whole=True,
    )


# --- Adafactor -------------------------------------------------------------------------------------------------------


class AdafactorHyper(NamedTuple):
    """Numbers of `adafactor`."""

    learning_rate: Any
    decay_power: Any
    eps: Any
    least_scale: Any
    clip: Any
    weight_decay: Any


class AdafactorState(NamedTuple):
    """State of `adafactor`: ``rows (..., R)`` and ``columns (..., C)`` of matrices, ``nu`` of all other leaves.

    What a leaf does not use is an empty array.
    """

    step: jax.Array
    hyper: AdafactorHyper
    rate: jax.Array
    rows: PyTree
    columns: PyTree
    nu: PyTree


def adafactor(
    learning_rate: ArrayLike | Schedule = 0.01,
    decay_power: ArrayLike = 0.8,
    eps: ArrayLike = 1e-30,
    *,
    least_scale: ArrayLike = 1e-3,
    clip: ArrayLike = 1.0,
    relative: bool = True,
    scaled: bool = True,
    weight_decay: ArrayLike | Schedule | None = None,
    mask: Mask = None,
) -> Optimizer:
    """Second moments of a matrix from its row and column means: R + C numbers in the place of R · C.

        β = 1 − t^(−decay_power)            r = β r + (1 − β) mean_columns(g² + eps)        c likewise over rows
        v = r cᵀ / mean(r)                  u = g / √v        u = u / max(1, RMS(u) / clip)
        α = min(rate, 1/√t) · max(least_scale, RMS(p))                                      p −= α u

    The matrices are a leaf's last two axes, of stacked layers each copy's (`fnet.layers.Copies`), over which the RMS is
    taken too; leaves with fewer axes keep all of v. ``relative=False`` takes the rate as it
    is, ``scaled=False`` leaves out the factor ``max(least_scale, RMS(p))``. ``weight_decay`` and ``mask`` as in `sgd`,
    the rate there being the learning rate before α. No first moment, as in the paper's main form. torch has the same
    numbers, and adds eps where it divides instead of to g²; optax factors only axes of at least 128.
    Source: Shazeer and Stern, arXiv:1804.04235.
    """
    check_numbers("adafactor", positive=True, decay_power=decay_power, eps=eps, clip=clip)  # 0 / 0 without an eps
    check_numbers("adafactor", least_scale=least_scale)
    check_mask("adafactor", mask, weight_decay)
    rate_fn, learning_rate = split("adafactor", learning_rate=learning_rate)
    decay_fn, weight_decay = (None, None) if weight_decay is None else split("adafactor", weight_decay=weight_decay)
    hyper = AdafactorHyper(learning_rate, decay_power, eps, least_scale, clip, weight_decay)

    def init(params):
        first = start("adafactor", params, rate_fn, hyper)
        decaying("adafactor", mask, params)

        leaves, structure = jax.tree.flatten(params)

        def zeros(shape_of):
            shapes = [(s[:n], s[n:]) for s, n in zip(map(jnp.shape, leaves), stacked_axes(params), strict=True)]
            new = [(*copies, *shape_of(shape)) for copies, shape in shapes]
            return structure.unflatten(jnp.zeros(s, wide(jnp.result_type(p))) for s, p in zip(new, leaves, strict=True))

        rows, columns = (
            zeros(lambda s: s[:-1] if len(s) > 1 else (0,)),
            zeros(lambda s: (*s[:-2], s[-1]) if len(s) > 1 else (0,)),
        )
        return AdafactorState(*first, rows, columns, zeros(lambda s: (0,) if len(s) > 1 else s))

    def update(grads, opt_state, params, *, value=None):
        require_state("adafactor", opt_state, AdafactorState)
        check_like(params, "gradient", grads)
        step, hyper, rate = advance(opt_state, rate_fn)
        t = step.astype(rate.dtype)
        beta, bound = 1 - t**-hyper.decay_power, jnp.minimum(rate, 1 / jnp.sqrt(t)) if relative else rate
        shrink = None if decay_fn is None else rate * decay_fn(hyper.weight_decay, opt_state.step)

        def one(decays, p, g, r, c, v):  # of one copy
            dtype = r.dtype
            new_p, g, b = p.astype(dtype), g.astype(dtype), beta.astype(dtype)
            # no more than what sums do not make infinite: a gradient of 1e20 is one small step, and no NaN; one that is
            # infinite makes its parameters NaN all the same
            most, eps = jnp.asarray(jnp.finfo(dtype).max / max(1, g.size), dtype), hyper.eps.astype(dtype)
            if p.ndim > 1:
                r = b * r + (1 - b) * (jnp.minimum((g * g).mean(-1), most) + eps)
                c = b * c + (1 - b) * (jnp.minimum((g * g).mean(-2), most) + eps)
                # the roots apart: r cᵀ itself would underflow, and so would r / mean(r)
                of_rows, of_columns = jnp.sqrt(r.mean(-1, keepdims=True)) / jnp.sqrt(r), 1 / jnp.sqrt(c)
                u = g * of_rows[..., None] * of_columns[..., None, :]
            else:
                v = b * v + (1 - b) * (jnp.minimum(g * g, most) + eps)
                u = g / jnp.sqrt(v)
            u = u / jnp.maximum(1, rms(u) / hyper.clip.astype(dtype))
            alpha = bound.astype(dtype)
            if scaled:
                alpha = alpha * jnp.maximum(hyper.least_scale.astype(dtype), rms(new_p))
            taken = 0 if shrink is None or not decays else shrink.astype(dtype) * new_p
            return (new_p - alpha * u - taken).astype(p.dtype), r, c, v

        leaves, structure = jax.tree.flatten(params)
        trees = (grads, opt_state.rows, opt_state.columns, opt_state.nu)
        rows = zip(leaves, *map(jax.tree.leaves, trees), strict=True)
        how = zip(decaying("adafactor", mask, params), stacked_axes(params), rows, strict=True)
        new = [on_each_copy(partial(one, decays), copies)(*map(jnp.asarray, row)) for decays, copies, row in how]
        params, *rest = (structure.unflatten([row[i] for row in new]) for i in range(4))
        return params, AdafactorState(step, hyper, rate, *rest)

    return Optimizer(init, update, lambda params: about("adafactor", hyper, params, mask))


def rms(x: jax.Array) -> jax.Array:
    """``√mean(x²)``, 0 of no entries."""
    return norm(x) / math.sqrt(max(x.size, 1))


# --- Muon ------------------------------------------------------------------------------------------------------------


class MuonHyper(NamedTuple):
    """Numbers of `muon`."""

    learning_rate: Any
    decay: Any
    eps: Any
    weight_decay: Any


class MuonState(NamedTuple):
    """State of `muon`."""

    step: jax.Array
    hyper: MuonHyper
    rate: jax.Array
    velocity: PyTree


def muon(
    learning_rate: ArrayLike | Schedule = 0.02,
    decay: ArrayLike = 0.95,
    eps: ArrayLike = 1e-7,
    *,
    nesterov: bool = True,
    iterations: int = 5,
    scale: str = "shape",
    weight_decay: ArrayLike | Schedule | None = None,
    mask: Mask = None,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """Momentum whose step is the nearest matrix with orthonormal rows or columns, for matrices ``(R, C)``.

        v = μ v + g         u = g + μ v (``nesterov``) or v         p −= rate · scale · orthogonalize(u)

    ``orthogonalize`` brings all singular values near 1 by ``iterations`` of Newton and Schulz (`orthogonalize`). The
    ``scale`` is ``"shape"``, √max(1, C / R), C being the features out (Jordan), or ``"adam"``, 0.2 √max(R, C), whose
    entries are about as large as Adam's (Liu et al., arXiv:2502.16982). ``weight_decay`` and ``mask`` as in `sgd`: it
    is not scaled.

    Hidden layers' weights are meant; biases, embeddings, convolutions and the last layer belong to another optimizer:
    ``groups({"dense_*/w": muon()}, adamw())``. Leaves that are not matrices raise TypeError; of those that
    `fnet.layers.repeat` stacks each copy is one. torch's ``Muon`` has (1 − μ) g in the place of g,
    which is the same direction. Source: Jordan et al., "Muon: an optimizer for hidden layers", 2024.
    """
    check_numbers("muon", below=1, decay=decay)
    check_numbers("muon", positive=True, eps=eps)
    check_variant("muon", scale, ("shape", "adam"), "scale")
    require_counts("muon", iterations=iterations)

    def check(params):
        for (path, leaf), copies in zip(named_leaves(params), stacked_axes(params), strict=True):
            if len(jnp.shape(leaf)) - copies != 2:
                raise TypeError(
                    f"muon: parameter {path or '()'} has shape {jnp.shape(leaf)[copies:]}; expected a matrix. Give "
                    "other leaves to another optimizer by groups; stacks of matrices belong in a fnet.layers.Copies"
                )

    def rule(p, g, v, rate, decay, eps):
        v = decay * v + g
        rows, columns = p.shape[-2:]
        factor = math.sqrt(max(1, columns / max(1, rows))) if scale == "shape" else 0.2 * math.sqrt(max(rows, columns))
        return p - rate * factor * orthogonalize(g + decay * v if nesterov else v, iterations, eps), v

    return elementwise(
        "muon",
        MuonState,
        MuonHyper(learning_rate, decay, eps, weight_decay),
        rule,
        lambda hyper, rate, t: (rate, hyper.decay, hyper.eps),
        {"velocity": 0.0},
        narrow=("velocity",),
        moment_dtype=moment_dtype,
        mask=mask,
        whole=True,
        check=check,
    )


def orthogonalize(x: jax.Array, iterations: int = 5, eps: ArrayLike = 1e-7) -> jax.Array:
    """A matrix ``(..., R, C)`` with the singular vectors of ``x`` and singular values within about 0.7 to 1.2.

    ``x = x / (‖x‖ + eps)``, then ``iterations`` times ``x = 3.4445 x − 4.7750 (x xᵀ) x + 2.0315 (x xᵀ)² x``: odd
    polynomials act on the singular values alone. A matrix of zeros stays one. Source: as `muon`.
    """
    wide_matrix = x.shape[-2] <= x.shape[-1]
    x = x if wide_matrix else x.swapaxes(-1, -2)  # the smaller Gram matrix
    x = x / (global_norm(x, (-2, -1)) + eps)
    for _ in range(iterations):
        gram = product(x, x.swapaxes(-1, -2))
        x = 3.4445 * x + product(-4.7750 * gram + 2.0315 * product(gram, gram), x)
    return x if wide_matrix else x.swapaxes(-1, -2)
