"""Transforms: gradients to gradients, for `fnet.optimizers.chain`.

    grads, state = transform.update(grads, transform.init(params), params)

Their numbers are data in their states, as an optimizer's are. Norms are taken in float32 at least, and anew of smaller
numbers where their squares overflow. Gradients in 16 bits are computed in float32 and rounded once. What is not finite
does not become finite (a clipped infinity stays one or becomes NaN, and an infinite norm makes the rest 0):
`fnet.optimizers.skip_nonfinite` is what looks for it.

Legend: g gradient of a leaf, p parameter, ‖·‖ the root of a sum of squares.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fnet.core.numerics import wide
from fnet.core.trees import on_each_copy, stacked_axes
from fnet.optimizers.common import as_arrays, count_on, global_norm
from fnet.optimizers.schedules import check_numbers
from fnet.optimizers.which import Mask, check_mask_kind, decaying
from fnet.types import PyTree, Transform


class TransformState(NamedTuple):
    """State of most transforms: their numbers alone."""

    hyper: Any


class NoiseState(NamedTuple):
    """State of `gradient_noise`."""

    hyper: Any
    key: jax.Array
    count: jax.Array


class LimitHyper(NamedTuple):
    """The number of the clippings."""

    limit: Any


class AdaptiveHyper(NamedTuple):
    """Numbers of `adaptive_clip`."""

    limit: Any
    eps: Any


class DecayHyper(NamedTuple):
    """The number of `l2_decay`."""

    l2: Any


class NoiseHyper(NamedTuple):
    """Numbers of `gradient_noise`."""

    scale: Any
    power: Any


class NoHyper(NamedTuple):
    """No numbers."""


def clip_by_value(limit: ArrayLike) -> Transform:
    """Each entry within ``±limit``, save infinities. (torch's ``clip_grad_value_`` and optax's ``clip`` clip them.)"""
    check_numbers("clip_by_value", positive=True, limit=limit)
    return _stateless("clip_by_value", LimitHyper(limit), _clip_values)


def _clip_values(grads, params, hyper):
    def clipped(g, limit):
        return jnp.where(jnp.isinf(g), g, jnp.clip(g, -limit, limit))

    return jax.tree.map(lambda g: _computed(clipped, g, hyper.limit), grads)


def clip_by_leaf_norm(limit: ArrayLike) -> Transform:
    """Each leaf (of stacked layers each copy) scaled down to ``‖g‖ ≤ limit``: ``g · min(1, limit / ‖g‖)``. (optax's
    ``clip_by_block_rms`` divides by the root mean square instead; Keras' ``clipnorm`` is this.)"""
    check_numbers("clip_by_leaf_norm", positive=True, limit=limit)
    return _stateless("clip_by_leaf_norm", LimitHyper(limit), _clip_leaves)


def _clip_leaves(grads, params, hyper):
    return _each_tensor(lambda g: _scaled(g, _within(hyper.limit, global_norm(g))), grads)


def clip_by_global_norm(limit: ArrayLike) -> Transform:
    """All gradients scaled by one factor down to ``‖g‖ ≤ limit`` over all leaves: ``g · min(1, limit / ‖g‖)``.

    As optax's; torch's ``clip_grad_norm_`` adds 1e-6 to the norm. Source: Pascanu et al., arXiv:1211.5063.

    >>> transform = clip_by_global_norm(1.0)
    >>> grads, _ = transform.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, transform.init(()), ())
    >>> print(grads["a"].round(3), grads["b"].round(3))
    [0.6] [0.8]
    """
    check_numbers("clip_by_global_norm", positive=True, limit=limit)
    return _stateless("clip_by_global_norm", LimitHyper(limit), _clip_globally)


def _clip_globally(grads, params, hyper):
    factor = _within(hyper.limit, global_norm(grads))
    return jax.tree.map(lambda g: _scaled(g, factor), grads)


def adaptive_clip(limit: ArrayLike = 0.01, eps: ArrayLike = 1e-3) -> Transform:
    """Each unit's gradient scaled down to ``limit`` times the norm of its weights, at least ``eps``.

    ``g · min(1, limit · max(‖p‖, eps) / ‖g‖)``, the norms over all axes but the last, which is a unit's (features out);
    of a vector or a number each entry is a unit. Source: Brock et al., arXiv:2102.06171.
    """
    check_numbers("adaptive_clip", positive=True, limit=limit, eps=eps)
    return _stateless("adaptive_clip", AdaptiveHyper(limit, eps), _clip_units)


def _clip_units(grads, params, hyper):
    def clipped(g, p):
        dtype = wide(g.dtype, p.dtype)
        of_g, of_p = (_unit_norm(a.astype(dtype)) for a in (g, p))
        most = hyper.limit.astype(dtype) * jnp.maximum(of_p, hyper.eps.astype(dtype))
        return _scaled(g, _within(most, of_g))

    return _each_tensor(clipped, grads, params)


def l2_decay(l2: ArrayLike, mask: Mask = None) -> Transform:
    """``g + l2 · p``: the gradient of ½ l2 ‖p‖² beside the loss', at the leaves of the ``mask``.

    In an adaptive optimizer this is not decoupled weight decay, which is the optimizer's own ``weight_decay``. torch's
    ``Adam(weight_decay=...)`` and ``SGD(weight_decay=...)`` are this. A mask is None (all), path patterns such as
    ``"*/w"``, a tree of True and False like the parameters, or a function ``(path, leaf) -> bool``.
    """
    check_numbers("l2_decay", l2=l2)
    check_mask_kind("l2_decay", mask)

    def update(grads, params, hyper):
        leaves, structure = jax.tree.flatten(grads)
        marks = decaying("l2_decay", mask, params)
        pairs = zip(leaves, jax.tree.leaves(params), marks, strict=True)
        return structure.unflatten(
            [_computed(lambda g, l2, p: g + l2 * p, g, hyper.l2, p) if on else g for g, p, on in pairs]
        )

    touched = partial(decaying, "l2_decay", mask)
    return _stateless("l2_decay", DecayHyper(l2), update, touched)._replace(touched=touched)


def centralize() -> Transform:
    """``g − mean(g)`` over all axes but the last, for leaves of two axes and more: no unit's weights move along.

    Source: Yong et al., arXiv:2004.01461.
    """

    def centred(g):
        if g.ndim < 2:
            return g
        return (g - g.astype(wide(g.dtype)).mean(range(g.ndim - 1), keepdims=True)).astype(g.dtype)

    return _stateless("centralize", NoHyper(), lambda grads, params, hyper: _each_tensor(centred, grads))


def gradient_noise(key: jax.Array, scale: ArrayLike = 0.1, power: ArrayLike = 0.55) -> Transform:
    """``g + σ ε`` with ``σ² = scale² / (1 + count)^power`` and ε standard normal, drawn anew for each count and leaf.

    ``key`` stands in the state, so that the same run has the same noise. In the paper η is ``scale²``, from 0.01, 0.3
    and 1. Source: Neelakantan et al., arXiv:1511.06807.
    """
    check_numbers("gradient_noise", scale=scale, power=power)
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise TypeError(f"gradient_noise: key = {key!r}; expected a key, such as jax.random.key(0)")

    def init(params):
        return NoiseState(as_arrays(NoiseHyper(scale, power)), jnp.copy(key), jnp.zeros((), jnp.int32))

    def update(grads, state, params):
        hyper, leaves = state.hyper, list(map(jnp.asarray, jax.tree.leaves(grads)))
        sigma = hyper.scale * (1 + state.count.astype(hyper.scale.dtype)) ** (-hyper.power / 2)
        keys = jax.random.split(jax.random.fold_in(state.key, state.count), max(len(leaves), 1))
        noisy = [
            _computed(lambda g, sigma, noise: g + sigma * noise, g, sigma, jax.random.normal(k, g.shape, wide(g.dtype)))
            for g, k in zip(leaves, keys, strict=False)
        ]
        state = NoiseState(hyper, state.key, count_on(state.count))
        return jax.tree.unflatten(jax.tree.structure(grads), noisy), state

    return Transform("gradient_noise", init, update)


def _stateless(name: str, hyper, function: Callable, check: Callable[[PyTree], Any] = lambda params: None) -> Transform:
    """The transform ``function(grads, params, hyper) -> grads``."""

    def init(params):
        check(params)
        return TransformState(as_arrays(hyper))

    def update(grads, state, params):
        grads, params = jax.tree.map(jnp.asarray, (grads, params))  # numbers of Python, arrays of NumPy
        return function(grads, params, state.hyper), state

    return Transform(name, init, update)


def _each_tensor(function: Callable, grads: PyTree, *trees: PyTree) -> PyTree:
    """``function(g, *others)`` of each leaf, of stacked layers of each copy."""
    leaves, structure = jax.tree.flatten(grads)
    rows = zip(stacked_axes(grads), leaves, *map(jax.tree.leaves, trees), strict=True)
    return structure.unflatten(on_each_copy(function, copies)(*map(jnp.asarray, row)) for copies, *row in rows)


def _unit_norm(a: jax.Array) -> jax.Array:
    return jnp.abs(a) if a.ndim < 2 else global_norm(a, range(a.ndim - 1))


def _within(limit: jax.Array, norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``min(1, limit / norm)``, 1 for a norm of 0, as a power of two and another factor.

    By itself it may be too small a number for its dtype, which XLA makes 0; the power of two is 1 elsewhere.
    """
    limit = limit.astype(norm.dtype)
    over, least = norm > limit, float(jnp.finfo(norm.dtype).tiny) ** 0.5
    limit, norm = jnp.where(over, limit, 1), jnp.where(over, norm, 1)
    first = jnp.where(limit / norm < least, least, 1).astype(norm.dtype)
    return first, limit / (norm * first)


def _scaled(g: jax.Array, factors: tuple[jax.Array, jax.Array]) -> jax.Array:
    return _computed(lambda g, first, second: g * first * second, g, *factors)


def _computed(function: Callable, g: jax.Array, *others: jax.Array) -> jax.Array:
    """``function(g, *others)``, computed wide: 16 bits may not hold the numbers beside a gradient in them."""
    return function(*(jnp.asarray(a, wide(g.dtype)) for a in (g, *others))).astype(g.dtype)
