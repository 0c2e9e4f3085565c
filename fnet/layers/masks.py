"""Masks travel: what comes in as ``(x, mask)`` goes on as ``(y, mask)``, until a layer says that it ends there.

A mask is boolean, True where something stands and False where it is padding, over leading axes of ``x``: ``(B,)``,
``(B, T)``; attention also takes one for each pair of positions, ``(B, T, T)``, and for each pair and head, ``(B, H, T,
T)``. A layer that acts on each position by itself hands it on (`by_position`); one that looks at several positions
reads it, and hands it on too; a layer that reduces the positions to one ends it, and so does `drop_mask`.

Legend: B batch, T length; `...` any further axes.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fnet.core.checks import require_array, require_layer
from fnet.layers.decoding import acts_by_position
from fnet.types import Layer, LayerError, PyTree


def is_masked(x: PyTree) -> bool:
    """Whether inputs are a pair ``(x, mask)``."""
    return isinstance(x, tuple) and len(x) == 2 and getattr(x[1], "dtype", None) == jnp.bool_


def split_mask(x: PyTree) -> tuple[Any, Any]:
    """``x, mask`` of a pair, ``x, None`` of anything else; raises `LayerError` for a mask that does not fit."""
    if not is_masked(x):
        return x, None
    x, mask = x
    if hasattr(x, "shape"):
        over = tuple(mask.shape)
        pairs = (*x.shape[:2], *x.shape[1:2])
        of_pairs = len(over) in (3, 4) and (over[0], *over[-2:]) == pairs
        if not over or (over != tuple(x.shape[: len(over)]) and not of_pairs):
            raise LayerError(f"expected a mask over leading axes of {tuple(x.shape)}, got shape {over}")
    return x, mask


def with_mask(y: PyTree, mask) -> PyTree:
    """What `split_mask` took apart."""
    return y if mask is None else (y, mask)


def split_bias(x: PyTree) -> tuple[Any, Any]:
    """``x, bias`` where a tuple ends with a bias of scores, floating with four axes; else ``x, None``."""
    last: Any = x[-1] if isinstance(x, tuple) and len(x) > 1 else None
    if len(getattr(last, "shape", ())) != 4 or not jnp.issubdtype(last.dtype, jnp.floating):
        return x, None
    return (x[0] if len(x) == 2 else x[:-1]), last


def with_bias(x: PyTree, bias) -> PyTree:
    """What `split_bias` took apart."""
    return x if bias is None else (*x, bias) if isinstance(x, tuple) else (x, bias)


def by_position(layer: Layer) -> Layer:
    """The layer, which acts on each position by itself, on ``(x, mask)`` as well: it returns ``(y, mask)``.

    What stands where the mask is False is computed like the rest: the layers that read the mask leave it out.

    >>> from fnet.layers import dense
    >>> layer, x, mask = dense(3), jnp.ones((2, 5, 4)), jnp.ones((2, 5), bool)
    >>> import jax
    >>> params, state = layer.init(jax.random.key(0), (x, mask))
    >>> y, same = layer.forward(params, state, (x, mask))[0]
    >>> y.shape, same is mask
    ((2, 5, 3), True)
    """

    require_layer("by_position: layer", layer)

    def init(key, x):
        return layer.init(key, split_mask(x)[0])

    def forward(params, state, x, *, key=None, train=False):
        acts_by_position()
        x, mask = split_mask(x)
        y, state, residuals = layer.forward(params, state, x, key=key, train=train)
        return with_mask(y, mask), state, residuals

    def backward(params, residuals, dy):  # a mask has no gradient
        if not isinstance(dy, tuple):
            return layer.backward(params, residuals, dy)
        dparams, dx = layer.backward(params, residuals, dy[0])
        return dparams, (dx, None)

    def outer(params, residuals, dy):
        assert layer.outer is not None
        return layer.outer(params, residuals, dy[0] if isinstance(dy, tuple) else dy)

    own = None if layer.outer is None else outer
    return layer._replace(init=init, forward=forward, backward=backward, outer=own)


def drop_mask() -> Layer:
    """``(x, mask)`` to ``x``: here the mask ends. An array without a mask stays as it is.

    For the end of a model whose loss is taken at every position; the mask is then the batch's ``weights``.

    >>> drop_mask().forward((), (), (jnp.ones((2, 5, 4)), jnp.ones((2, 5), bool)))[0].shape
    (2, 5, 4)
    """

    def forward(params, state, x, *, key=None, train=False):
        x, mask = split_mask(x)
        require_array(x)
        # the residual says whether there was a mask by its structure
        return x, state, None if mask is None else ()

    def backward(params, masked, dy):  # y = x:  dx = dy, and a mask has no gradient
        return (), dy if masked is None else (dy, None)

    return Layer("drop_mask", lambda key, x: ((), ()), forward, backward)
