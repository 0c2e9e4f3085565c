"""A causal model some positions at a time, its keys and values in a cache: ``(x, carry) -> (y, carry)``, in inference.

`apply_cached` runs any model of layers that act by position (`by_position`), causal attention and encodings of
positions, with the parameters that it has. Attention finds here the keys and values of the positions before, and what
counts positions finds where they begin. Nothing of it is left in a program without a cache.

Legend: B batch, T positions that are new, L positions that the cache holds, K heads of keys, D their features, E those
of values.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnet.core.checks import require_counts, require_layer
from fnet.core.contexts import holding
from fnet.layers.children import Call, forward_of, path_here, watch
from fnet.types import Layer, LayerError, PyTree


class Cache(NamedTuple):
    """What a model carries from one call to the next."""

    position: jax.Array  # int32: how many were before
    kept: dict[str, tuple[jax.Array, jax.Array]]  # by each attention's path keys (B, L, K, D), values (B, L, K, E)


class Decoding(NamedTuple):
    """The call that is traced: the cache before, what becomes of it, and the paths that know what they do here."""

    length: int
    before: Cache
    after: dict
    known: set


_decoding: ContextVar[Decoding | None] = ContextVar("decoding", default=None)


def apply_cached(model: Layer, params: PyTree, state: PyTree, x: PyTree, carry: Cache | None = None, *, length: int):
    """``y, carry`` of inputs ``x (B, T, ...)`` that follow on those which ``carry`` has seen; None: on nothing.

    ``y`` is what `apply` gives at these positions of all inputs so far, to rounding, at the cost of T positions that
    attend to ``length`` (L): the cache has room for so many, and further ones are the caller's mistake, since the
    position may be traced. What it costs is counted in Shazeer, arXiv:1911.02150.

    Raises `LayerError` for layers that look at other positions without a cache (recurrent layers have a carry of their
    own; convolutions and pools have none), attention that is not causal, and masks.

    >>> from fnet.layers.children import apply
    >>> from fnet.layers.models import gpt
    >>> model, ids = gpt(10, length=8, layers=1, features=8, heads=2), jnp.arange(5)[None]
    >>> params, state = model.init(jax.random.key(0), ids)
    >>> _, carry = apply_cached(model, params, state, ids[:, :4], length=8)
    >>> last, carry = apply_cached(model, params, state, ids[:, 4:], carry, length=8)
    >>> bool(jnp.allclose(last[:, 0], apply(model, params, state, ids)[:, 4], atol=1e-5)), int(carry.position)
    (True, 5)
    """
    require_layer("apply_cached: model", model)
    require_counts("apply_cached", length=length)
    carry = Cache(jnp.asarray(0, jnp.int32), {}) if carry is None else carry
    new = jax.tree.leaves(x)[0].shape[1]
    if new > length:
        raise LayerError(f"expected at most {length} positions, which the cache has room for, got {new}")
    decoding = Decoding(length, carry, {}, set())

    def require_known(call: Call, y):
        known = any(call.path[:n] in decoding.known for n in range(len(call.path) + 1))
        if not call.layer.children and not known:
            raise LayerError(
                f"{call.layer.name} may look at other positions, of which it has no cache; expected layers that act by "
                "position, causal attention and encodings of positions: fnet.layers.by_position(layer) says so of one"
            )
        return y

    with watch(require_known), holding(_decoding, decoding):  # watched, no scan hides a layer's cache
        y = forward_of(model, params, state, x, key=None, train=False)[0]
        y = require_known(Call((), model, params, state, x, None, False), y)
    return y, Cache(carry.position + new, decoding.after)


def is_decoding() -> bool:
    """Whether a model is run with a cache."""
    return _decoding.get() is not None


def acts_by_position() -> None:
    """The layer that is running gives at each position what it is given there, so that it needs no cache."""
    decoding = _decoding.get()
    if decoding is not None:
        decoding.known.add(path_here())


def begin(limit: int | None = None):
    """The position at which the inputs of the running layer begin: 0, or in decoding how many were before.

    Raises `LayerError` where the cache holds more than ``limit`` positions.
    """
    decoding = _decoding.get()
    if decoding is None:
        return 0
    acts_by_position()
    if limit is not None and decoding.length > limit:
        raise LayerError(f"expected at most {limit} positions, got a cache of {decoding.length}: give it a length less")
    return decoding.before.position


def remembered(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values ``(B, L, ...)`` of all positions, these ``(B, T, ...)`` among them; 0 where nothing is yet."""
    decoding = _decoding.get()
    if decoding is None:
        return k, v
    path, (position, kept) = "/".join(path_here()), decoding.before

    def after(new, old):
        return lax.dynamic_update_slice_in_dim(old, new, position, 1)

    empty = [jnp.zeros((new.shape[0], decoding.length, *new.shape[2:]), new.dtype) for new in (k, v)]
    keys, values = map(after, (k, v), kept.get(path, empty))
    decoding.after[path] = keys, values
    return keys, values
