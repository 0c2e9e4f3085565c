"""Biases of scores by how far apart two positions stand, for `attention`'s ``relative``.

They are layers of positions, ``(t (B, T), s (B, S))`` of queries and memory, integers, to a bias ``(B, H, T, S)``. Each
attention has its own, or by `biased` many have one.

Legend: B batch, T queries, S positions of the memory, H heads.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import require_array, require_counts, require_layer, require_params
from fnet.core.numerics import stream, wide
from fnet.layers.children import backward_child, forward_child, init_child
from fnet.layers.combinators import output_shape, require_children
from fnet.layers.embedding import lookup, scatter
from fnet.layers.initializers import normal, require_initializers
from fnet.layers.masks import split_bias, split_mask, with_bias
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


def relative_positions(
    heads: int,
    *,
    buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
    weights=normal(0.02),
    dtype=jnp.float32,
) -> Layer:
    """``bias[h, t, s] = table[bucket(s − t), h]`` with a learned ``table (buckets, H)``: T5's relative positions.

    A distance ``n = |s − t|`` has a bucket of its own below ``half = buckets / 2``, and then one of as many again that
    grow by powers up to ``max_distance``: ``half + ⌊half · ln(n / half) / ln(max_distance / half)⌋``, at most the last.
    With ``bidirectional`` the first half of all buckets is for ``s <= t`` and the second for ``s > t``, each laid out
    so; without, for causal attention, all are for ``s <= t``, and ``s > t`` counts as 0.

    T5 scales no scores (``scale=1.0``) and has one table for all layers: `biased`.
    Raises ValueError for buckets that do not fit. Source: Raffel et al., arXiv:1910.10683; the formula is their code's.

    >>> layer = relative_positions(2, buckets=8)
    >>> at = jnp.arange(5)[None], jnp.arange(7)[None]
    >>> params, state = layer.init(jax.random.key(0), at)
    >>> params["table"].shape, layer.forward(params, state, at)[0].shape
    ((8, 2), (1, 2, 5, 7))
    """
    require_counts("relative_positions", heads=heads, buckets=buckets, max_distance=max_distance)
    require_initializers("relative_positions", weights=weights)
    own = buckets // 2 if bidirectional else buckets  # of one direction
    half = own // 2
    if half < 1 or (bidirectional and buckets % 2) or max_distance <= half:
        raise ValueError(
            f"relative_positions: buckets = {buckets}, max_distance = {max_distance}; expected at least "
            f"{'4 and an even number' if bidirectional else '2'}, and a max_distance above {half}, where they grow"
        )
    # of every distance up to the largest, on the host: no rounding of a logarithm on a device moves a border
    far = [half + int((own - half) * math.log(n / half) / math.log(max_distance / half) + 1e-9)
           for n in range(half, max_distance + 1)]  # fmt: skip
    bucket_of = np.minimum(np.asarray([*range(half), *far], np.int32), own - 1)

    def ids(x):
        t, s = require_positions(x)
        ahead = s[:, None] - t[:, :, None]  # (B, T, S)
        n = jnp.abs(ahead) if bidirectional else jnp.maximum(-ahead, 0)
        found = jnp.asarray(bucket_of)[jnp.minimum(n, max_distance)]
        return found + own * (ahead > 0).astype(found.dtype) if bidirectional else found

    def init(key, x):
        require_positions(x)
        return {"table": weights(stream(key, "table"), (buckets, heads), dtype)}

    def forward(params, x):
        require_params(params, table=(buckets, heads))
        found = ids(x)
        return jnp.moveaxis(lookup(params["table"], found), 3, 1), found

    def backward(params, ids, dy):  # dtable[u, h] = Σ_{b, t, s: bucket = u} dy[b, h, t, s]; positions have no gradient
        dtable = scatter(ids, jnp.moveaxis(dy, 1, 3), buckets)
        return {"table": dtable.astype(params["table"].dtype)}, (None, None)

    return stateless("relative_positions", init, forward, backward, several=True)


def relative_positions_2d(heads: int, window: int, *, weights=normal(0.02), dtype=jnp.float32) -> Layer:
    """``bias[h, t, s] = table[(Δi + M − 1)(2M − 1) + Δj + M − 1, h]``, Swin's bias by the offsets of two pixels.

    Positions are those of a window of M × M pixels row by row, ``t = i M + j``; M is ``window``, ``Δi, Δj`` what t has
    more than s, and ``table ((2M − 1)², H)``. Positions that are not in the window are refused or, where they are
    traced, have the bias NaN. Source: Liu et al., arXiv:2103.14030; the table stands as in their code.

    >>> layer = relative_positions_2d(3, 2)
    >>> at = jnp.arange(4)[None]
    >>> params, state = layer.init(jax.random.key(0), (at, at))
    >>> params["table"].shape, layer.forward(params, state, (at, at))[0].shape
    ((9, 3), (1, 3, 4, 4))
    """
    require_counts("relative_positions_2d", heads=heads, window=window)
    require_initializers("relative_positions_2d", weights=weights)
    side = 2 * window - 1

    def ids(x):
        t, s = require_positions(x)
        if max(t.shape[1], s.shape[1]) > window * window:
            raise LayerError(f"expected at most {window}² positions, got {max(t.shape[1], s.shape[1])}")
        t, s = t[:, :, None], s[:, None]
        down, right = t // window - s // window, t % window - s % window  # (B, T, S)
        inside = (t >= 0) & (t < window * window) & (s >= 0) & (s < window * window)
        return jnp.where(inside, (down + window - 1) * side + right + window - 1, side * side)

    def init(key, x):
        require_positions(x)
        return {"table": weights(stream(key, "table"), (side * side, heads), dtype)}

    def forward(params, x):
        require_params(params, table=(side * side, heads))
        found = ids(x)
        return jnp.moveaxis(lookup(params["table"], found), 3, 1), found

    def backward(params, ids, dy):  # dtable[u, h] = Σ_{b, t, s: the offset is u} dy[b, h, t, s], as above
        dtable = scatter(ids, jnp.moveaxis(dy, 1, 3), side * side)
        return {"table": dtable.astype(params["table"].dtype)}, (None, None)

    return stateless("relative_positions_2d", init, forward, backward, several=True)


def alibi(heads: int, slopes=None) -> Layer:
    """``bias[h, t, s] = −slope_h · |t − s|``, attention with linear biases; no parameters.

    The slopes are ``2^(−8 h / H)`` for h = 1 … H where H is a power of two; else those of the power below, and then
    every second of twice as many. ``slopes (H,)``: one's own, data without a gradient.
    Source: Press et al., arXiv:2108.12409, who have it causal, where ``|t − s| = t − s``; the slopes are their code's.

    >>> at = jnp.arange(3)[None], jnp.arange(3)[None]
    >>> alibi(2).forward((), (), at)[0][0, 0].tolist()
    [[-0.0, -0.0625, -0.125], [-0.0625, -0.0, -0.0625], [-0.125, -0.0625, -0.0]]
    """
    require_counts("alibi", heads=heads)
    if slopes is not None and np.shape(slopes) != (heads,):
        raise ValueError(f"alibi: slopes of shape {np.shape(slopes)}; expected {(heads,)}, one a head")

    def powers(count):
        return [2.0 ** (-8 * h / count) for h in range(1, count + 1)]

    below = 2 ** (heads.bit_length() - 1)
    given = powers(below) + powers(2 * below)[::2][: heads - below] if slopes is None else slopes

    def forward(params, x):
        t, s = require_positions(x)
        distances = jnp.abs(s[:, None] - t[:, :, None]).astype(float)
        return -jnp.asarray(given, float)[None, :, None, None] * distances[:, None], ()

    def backward(params, residuals, dy):  # nothing that it is of has a gradient
        return (), (None, None)

    return stateless("alibi", lambda key, x: (), forward, backward, several=True)


def biased(relative: Layer, body: Layer) -> Layer:
    """``body(x, bias)`` with the bias of ``relative`` at the positions 0, 1, … of ``x (B, T, ...)``, computed once.

    The body is given ``(x, bias)``, or ``(x, mask, bias)`` of ``(x, mask)``. It is an `attention`, or layers that each
    take the bias and hand it on, ``(x, bias)`` to ``(y, bias)``, as ``fnet.models.t5_block`` does; here the bias ends.
    It is in float32 at least, since the gradients of all who read it are added up. Raises `LayerError` for inputs
    without a time axis. Source: Raffel et al., arXiv:1910.10683.

    >>> from fnet.layers.attention import attention
    >>> x = jnp.ones((1, 5, 4))
    >>> params, state = biased(relative_positions(2), attention(2)).init(jax.random.key(0), x)
    >>> sorted(params), params["relative"]["table"].shape
    (['body', 'relative'], (32, 2))
    """
    require_layer("biased: relative", relative)
    require_layer("biased: body", body)
    children = (("relative", relative), ("body", body))

    def places(x):
        values = split_mask(x)[0]
        require_array(values)
        if len(values.shape) < 3:
            raise LayerError(f"expected inputs (batch, length, features), got shape {tuple(values.shape)}")
        at = jnp.arange(values.shape[1], dtype=jnp.int32)[None]
        return at, at

    def widened(bias):
        return bias.astype(wide(bias.dtype))

    def init(key, x):
        at, params, state = places(x), {}, {}
        params["relative"], state["relative"] = init_child("relative", relative, key, at)
        bias = output_shape(relative, params["relative"], state["relative"], at)
        bias = jax.ShapeDtypeStruct(bias.shape, wide(bias.dtype))
        params["body"], state["body"] = init_child("body", body, key, with_bias(x, bias))
        return params, state

    def forward(params, state, x, *, key=None, train=False):
        require_children("params", params, children)
        require_children("state", state, children)
        run, new_state, residuals = {"key": key, "train": train}, {}, {}
        bias, new_state["relative"], residuals["relative"] = forward_child(
            "relative", relative, params["relative"], state["relative"], places(x), **run
        )
        given = with_bias(x, widened(bias))
        y, new_state["body"], residuals["body"] = forward_child(
            "body", body, params["body"], state["body"], given, **run
        )
        y, passed = split_bias(y)
        # beside them the bias' dtype in an empty array, and what is handed on, if anything is
        return y, new_state, (residuals, jnp.zeros(0, bias.dtype), passed)

    def backward(params, residuals, dy):
        # y = f(x, b(θ)):  dx and db by f's backward, 0 having come for the bias at its end;  dθ by b's of db
        residuals, like, passed = residuals
        dy = dy if passed is None else with_bias(dy, jnp.zeros_like(passed))
        dbody, dx = backward_child("body", body, params["body"], residuals["body"], dy)
        dx, dbias = split_bias(dx)
        dbias = dbias.astype(like.dtype)
        drelative, _ = backward_child("relative", relative, params["relative"], residuals["relative"], dbias)
        return {"relative": drelative, "body": dbody}, dx

    return Layer("biased", init, forward, backward, children)


def require_positions(x) -> tuple[jax.Array, jax.Array]:
    """``t (B, T), s (B, S)``; raises `LayerError` unless both are signed integers."""
    fits = isinstance(x, tuple) and len(x) == 2 and all(len(getattr(part, "shape", ())) == 2 for part in x)
    if not fits or not all(jnp.issubdtype(part.dtype, jnp.signedinteger) for part in x):
        raise LayerError("expected positions of queries and memory, signed integers (B, T) and (B, S)")
    return x
