"""Attention: every position asks, with a query, what it needs of the others, and is given a mean of their values.

`attention` is the layer, with its projections; `dot_product_attention` is what it computes between them, with
`dot_product_attention_backward` beneath it. Both are plain, all scores at once, or blockwise, in memory linear in the
lengths.

Legend: B batch, T queries, S positions of the memory, H heads, K heads of keys and values, G = H/K heads that share
one, D features of a head, I features of the query, M of the memory, O out; c, b queries and positions in a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnet.layers.children import inside
from fnet.layers.dense import affine, affine_backward
from fnet.layers.embedding import rotate
from fnet.layers.initializers import glorot_uniform, require_initializers, zeros
from fnet.layers.masks import is_masked, with_mask
from fnet.types import Layer, LayerError, require_array, require_counts, stateless, stream, wide


def attention(
    heads: int,
    *,
    features: int | None = None,
    head_features: int | None = None,
    kv_heads: int | None = None,
    causal: bool = False,
    block_size: int | None = None,
    rotary=None,
    scale=None,
    weights=glorot_uniform(),
    bias=zeros(),
) -> Layer:
    """Multi-head attention: ``y = concat_h(softmax(scale · Q_h K_hᵀ) V_h) w_out + b_out``, ``y (B, T, O)``.

    ``Q = query w_query + b_query``, ``K`` and ``V`` likewise of the memory, each cut into heads of D features. Inputs:

    - ``x (B, T, I)``: self-attention, the memory is ``x``;
    - ``(x, mask)``: the same with padding; ``x`` counts as 0 where a mask ``(B, T)`` is False; it gives ``(y, mask)``;
    - ``(query (B, T, I), memory (B, S, M))``, or with a third, ``mask``: cross-attention. The mask is the memory's, and
      ends here.

    A mask is boolean, True = may be attended to: ``(B, S)`` for the memory's padding, or ``(B, T, S)`` for each pair.
    With ``causal`` position t attends to positions ``s <= t`` alone, besides. What may not be attended to has gradients
    of exactly 0. What a mask hides from every query has no effect at all, whatever it holds; NaN or infinity at a
    position that some query may attend to reaches the others too, as 0 · NaN. A query that may attend to nothing is
    given 0, before the output's projection.

    - ``features``: O, that of the query by default. ``head_features``: D, ``O / heads`` by default.
    - ``kv_heads``: K, ``heads`` by default; fewer are shared by G heads in a row (grouped queries, 1 is multi-query).
    - ``block_size``: None computes all scores at once and keeps the probabilities ``(B, H, T, S)`` for the backward; a
      number takes blocks of so many positions, and memory linear in T and S both ways.
    - ``rotary``: base of `rotate`, applied to queries and keys at the positions 0, 1, …; None for none.
    - ``scale``: ``1/√D`` by default. ``weights``, ``bias``: initializers of all four projections; None for no biases.

    Raises ValueError for heads that do not divide, `LayerError` for shapes, dtypes and parameters that do not fit.

    Sources: Vaswani et al., arXiv:1706.03762; grouped queries, Ainslie et al., arXiv:2305.13245; blocks,
    `dot_product_attention`. PyTorch's masks for ``nn.MultiheadAttention`` say True = left out, and a query that may
    attend to nothing gives NaN in inference there. flax' parameters have an axis per head.

    >>> layer = attention(4, kv_heads=2, causal=True, bias=None)
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 16, 32), "float32"))
    >>> {name: leaf["w"].shape for name, leaf in params.items()}
    {'query': (32, 32), 'key': (32, 16), 'value': (32, 16), 'out': (32, 32)}
    >>> layer.forward(params, state, jnp.ones((8, 16, 32)))[0].shape
    (8, 16, 32)
    """
    kv_heads = heads if kv_heads is None else kv_heads
    given = {"heads": heads, "kv_heads": kv_heads, "features": features, "head_features": head_features}
    require_counts("attention", **given, block_size=block_size)
    require_initializers("attention", "bias", weights=weights, bias=bias)
    if isinstance(rotary, bool):
        raise ValueError(f"attention: rotary = {rotary}; expected the base, such as 10000.0, or None")
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} heads cannot share kv_heads = {kv_heads}; it must divide heads")
    if features is not None and head_features is None and features % heads:
        raise ValueError(f"attention: {heads} heads do not divide features = {features}; give head_features")
    options = {"causal": causal, "block_size": block_size, "scale": scale}

    def init(key, x):
        query, memory, _ = inputs(x)
        out = query.shape[-1] if features is None else features
        if head_features is None and out % heads:
            raise LayerError(f"{heads} heads do not divide the query's {out} features: give head_features")
        size = out // heads if head_features is None else head_features
        if not query.shape[-1] or not memory.shape[-1]:
            raise LayerError(f"expected features, got shapes {query.shape} and {memory.shape}")
        if rotary is not None and size % 2:
            raise LayerError(f"rotary needs heads of an even number of features, got {size}: give head_features")
        widths = {
            "query": (query.shape[-1], heads * size),
            "key": (memory.shape[-1], kv_heads * size),
            "value": (memory.shape[-1], kv_heads * size),
            "out": (heads * size, out),
        }
        params = {}
        for name, shape in widths.items():
            params[name] = {"w": weights(stream(stream(key, name), "w"), shape, query.dtype)}
            if bias is not None:
                params[name]["b"] = bias(stream(stream(key, name), "b"), shape[1:], query.dtype)
        return params

    def forward(params, x):
        query, memory, mask = clean(x)
        q = project(params, "query", query, heads)  # (B, T, H, D)
        k = project(params, "key", memory, kv_heads)  # (B, S, K, D)
        v = project(params, "value", memory, kv_heads)
        if rotary is not None:
            q, k = rotate(q, positions(q), rotary), rotate(k, positions(k), rotary)
        o, kept = dot_product_attention(q, k, v, mask, **options)
        o = o.reshape(*o.shape[:2], q.shape[2] * q.shape[3])  # (B, T, H D)
        return with_mask(project(params, "out", o), x[1] if is_masked(x) else None), (x, o, kept)

    def backward(params, residuals, dy):
        x, o, kept = residuals
        dy = dy[0] if isinstance(dy, tuple) else dy
        query, memory, mask = clean(x)
        dparams = {}
        dparams["out"], do = project_backward(params["out"], o, dy)
        do = do.reshape(*do.shape[:2], heads, do.shape[2] // heads)
        dq, dk, dv = dot_product_attention_backward(kept, do, mask, **options)
        if rotary is not None:  # a rotation's transpose is the rotation back
            dq, dk = rotate(dq, -positions(dq), rotary), rotate(dk, -positions(dk), rotary)
        dparams["query"], dquery = project_backward(params["query"], query, dq)
        dparams["key"], by_key = project_backward(params["key"], memory, dk)
        dparams["value"], by_value = project_backward(params["value"], memory, dv)
        return dparams, clean_backward(x, dquery, by_key + by_value)

    return stateless("attention", init, forward, backward, several=True)


# --- the inputs and the projections of the layer ---------------------------------------------------------------------


def inputs(x):
    """``query, memory, mask`` of any form of the inputs, checked; in self-attention query and memory are one array."""
    parts = list(x) if isinstance(x, tuple) else [x]
    for part in parts:
        if part is not None:
            require_array(part)
    mask = parts.pop() if has_mask(x) else None
    if len(parts) not in (1, 2):
        dtypes = ", ".join(str(part.dtype) for part in parts)
        raise LayerError(
            f"expected x, (x, mask), (query, memory) or (query, memory, mask) with a boolean mask, got {dtypes}"
        )
    query, memory = parts[0], parts[-1]
    for name, part in (("query", query), ("memory", memory)):
        if len(part.shape) != 3:
            raise LayerError(f"expected a {name} of axes (batch, length, features), got shape {part.shape}")
        if not part.shape[1]:
            raise LayerError(f"expected a {name} of at least one step, got shape {part.shape}")
        if not jnp.issubdtype(part.dtype, jnp.floating):
            raise LayerError(f"expected a floating {name}, got {part.dtype}: convert it, say to float32")
    if (query.shape[0], query.dtype) != (memory.shape[0], memory.dtype):
        raise LayerError(
            f"expected query and memory of one batch and dtype, got {query.shape[0]} of {query.dtype} "
            f"and {memory.shape[0]} of {memory.dtype}"
        )
    require_mask(mask, query.shape[0], query.shape[1], memory.shape[1])
    return query, memory, mask


def has_mask(x) -> bool:
    """Whether the last of the inputs is a mask, or None in its place."""
    return isinstance(x, tuple) and len(x) > 1 and (x[-1] is None or x[-1].dtype == bool)


def is_self(x) -> bool:
    """Whether the inputs are one array, with or without a mask."""
    return not isinstance(x, tuple) or len(x) - has_mask(x) == 1


def seen(mask) -> jax.Array:
    """The positions ``(B, S, 1)`` of the memory that some query may attend to."""
    return (mask if mask.ndim == 2 else mask.any(1))[:, :, None]


def asking(x, mask):
    """The queries ``(B, T, 1)`` that count: all (None), but for those that may attend to nothing or are padding."""
    if mask.ndim == 3:
        return mask.any(2)[:, :, None]
    return seen(mask) if is_self(x) else None


def clean(x):
    """`inputs` with 0 wherever no query may look, so that whatever stands there has no effect, not even NaN."""
    query, memory, mask = inputs(x)
    if mask is not None:
        memory, asks = jnp.where(seen(mask), memory, 0), asking(x, mask)
        query = query if asks is None else jnp.where(asks, query, 0)
    return query, memory, mask


def clean_backward(x, dquery, dmemory):
    """The gradients in the form of the inputs."""
    mask = inputs(x)[2]
    if mask is not None:
        dmemory, asks = jnp.where(seen(mask), dmemory, 0), asking(x, mask)
        dquery = dquery if asks is None else jnp.where(asks, dquery, 0)
    dx = (dquery + dmemory,) if is_self(x) else (dquery, dmemory)
    return (*dx, *([None] if has_mask(x) else [])) if isinstance(x, tuple) else dx[0]


def positions(x: jax.Array) -> jax.Array:
    """0, 1, … along the second axis."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)


def project(params, name: str, x: jax.Array, heads: int | None = None) -> jax.Array:
    """``x w + b`` by the parameters called ``name``, with the features cut into heads."""
    if name not in params:
        raise LayerError(f"expected params of query, key, value and out, got {sorted(params)}: pass what init returned")
    with inside(name):
        y, _ = affine(params[name], x)
        if heads is None:
            return y
        if y.shape[-1] % heads:
            raise LayerError(f"{heads} heads do not divide the {y.shape[-1]} columns of w: pass what init returned")
    return y.reshape(*x.shape[:-1], heads, y.shape[-1] // heads)


def project_backward(params, x: jax.Array, dy: jax.Array):
    """The same backwards: the heads are laid side by side again."""
    return affine_backward(params, x, dy.reshape(*x.shape[:-1], params["w"].shape[1]))


# --- attention itself ------------------------------------------------------------------------------------------------


def dot_product_attention(q, k, v, mask=None, *, causal=False, scale=None, block_size=None):
    """``o = softmax(scale · q kᵀ) v`` over the positions that each query may attend to; returns ``o, residuals``.

    ``q (B, T, H, D)``, ``k`` and ``v (B, S, K, D)``, ``o`` like ``q``; head h has the keys and values ``h // G``.
    ``mask``, ``causal``, ``scale`` and ``block_size`` are those of `attention`. Scores, exponentials and their sums are
    in float32 at least. Raises `LayerError` for shapes and masks that do not fit.

    Blockwise, the softmax goes over the memory a block at a time with the largest score ``m`` so far, the sum ``l`` of
    ``exp(s - m)`` and the mean not yet divided by it, both rescaled as ``m`` grows (Milakov and Gimelshein,
    arXiv:1805.02867; Rabe and Staats, arXiv:2112.05682). The backward by hand computes each block of probabilities anew
    from ``lse = m + log l`` (FlashAttention, Dao et al., arXiv:2205.14135). Blocks that ``causal`` leaves empty are
    skipped. Autodiff of this forward is right too, but keeps the scores of every block: its memory is not linear.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))  # B 2, T and S 10, H and K 4, D 8
    >>> plain, _ = dot_product_attention(q, k, v, causal=True)
    >>> blockwise, _ = dot_product_attention(q, k, v, causal=True, block_size=4)
    >>> bool(jnp.allclose(plain, blockwise, atol=1e-6))
    True
    """
    if (
        q.ndim != 4
        or k.shape != v.shape
        or k.shape != (q.shape[0], *k.shape[1:3], q.shape[3])
        or q.shape[2] % k.shape[2]
    ):
        raise LayerError(
            f"expected q (B, T, H, D), k and v (B, S, K, D) where K divides H, got {q.shape}, {k.shape} and {v.shape}"
        )
    require_mask(mask, q.shape[0], q.shape[1], k.shape[1])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if block_size is None:
        return plain(q, k, v, mask, causal, scale)
    return blockwise(q, k, v, mask, causal, scale, block_size)


def dot_product_attention_backward(residuals, do, mask=None, *, causal=False, scale=None, block_size=None):
    """``dq, dk, dv`` for the gradient ``do (B, T, H, D)`` by ``o``; the other arguments are those of the forward."""
    scale = do.shape[3] ** -0.5 if scale is None else scale
    if block_size is None:
        return plain_backward(residuals, do, scale)
    return blockwise_backward(residuals, do, mask, causal, scale, block_size)


class Plain(NamedTuple):
    """What the plain form keeps: all by heads, and the probabilities, which take more time to compute than to read."""

    q: jax.Array  # (B, K, G T, D)
    k: jax.Array  # (B, K, S, D)
    v: jax.Array
    p: jax.Array  # (B, K, G T, S)


def plain(q, k, v, mask, causal, scale):
    """All scores at once."""
    (length, heads), groups = q.shape[1:3], q.shape[2] // k.shape[2]
    if mask is not None:
        mask = rows_of_mask(mask)
    q, k, v = blocks(q, length, groups)[0], blocks(k, k.shape[1])[0], blocks(v, v.shape[1])[0]
    s = scores(q, k, scale, allowed(mask, causal, 0, 0, length, k.shape[2], groups))
    e = jnp.exp(s - finite(lax.stop_gradient(s.max(-1, keepdims=True))))
    p = e / nonzero(e.sum(-1, keepdims=True))
    o = einsum("bkts,bksd->bktd", p.astype(v.dtype), v).astype(v.dtype)
    return unblocked(o[None], length, heads), Plain(q, k, v, p)


def plain_backward(residuals, do, scale):
    """Of all scores at once."""
    # o = P v,  P = softmax(s),  s = scale · q kᵀ, with P = 0 where a score is masked:
    #   dv = Pᵀ do,  dP = do vᵀ,  ds = P ⊙ (dP − Σ_s dP ⊙ P),  dq = scale · ds k,  dk = scale · dsᵀ q
    q, k, v, p = residuals
    (length, heads), groups = do.shape[1:3], do.shape[2] // k.shape[1]
    do = blocks(do, length, groups)[0]
    dv = einsum("bkts,bktd->bksd", p.astype(do.dtype), do).astype(v.dtype)
    dp = einsum("bktd,bksd->bkts", do, v)
    ds = (p * (dp - (dp * p).sum(-1, keepdims=True)) * jnp.asarray(scale, p.dtype)).astype(q.dtype)
    dq = einsum("bkts,bksd->bktd", ds, k).astype(q.dtype)
    dk = einsum("bkts,bktd->bksd", ds, q).astype(k.dtype)
    memory = k.shape[2], k.shape[1]
    return unblocked(dq[None], length, heads), unblocked(dk[None], *memory), unblocked(dv[None], *memory)


class Blockwise(NamedTuple):
    """What the blockwise form keeps: all as they came, and the logarithm of each query's sum of exponentials."""

    q: jax.Array  # (B, T, H, D)
    k: jax.Array  # (B, S, K, D)
    v: jax.Array
    o: jax.Array  # (B, T, H, D)
    lse: jax.Array  # (blocks of queries, B, K, G c, 1)


def blockwise(q, k, v, mask, causal, scale, block_size):
    """For each block of queries, one block of the memory after the other."""
    given, dtype = (q, k, v), wide(q.dtype)
    c, b, groups, mask = tiling(q, k, mask, block_size)
    q, k, v = blocks(q, c, groups), blocks(k, b), blocks(v, b)
    k, v = k.astype(dtype), v.astype(dtype)  # autodiff adds up their gradients over the blocks of queries

    def attend(block):
        i, q = block

        def visit(carry, block):
            j, k, v = block
            k, v = k.astype(q.dtype), v.astype(q.dtype)

            def update(m, l, o):
                s = scores(q, k, scale, allowed(mask, causal, i, j, c, b, groups))
                top = lax.stop_gradient(jnp.maximum(m, s.max(-1, keepdims=True)))
                e, shrink = jnp.exp(s - finite(top)), jnp.exp(m - finite(top))
                more = einsum("bkts,bksd->bktd", e.astype(v.dtype), v)
                return top, shrink * l + e.sum(-1, keepdims=True), shrink * o + more

            return unless_future(causal, i * c + c - 1, j * b, update, lambda *carry: carry, *carry), None

        column = jnp.zeros((*q.shape[:-1], 1), dtype)
        start = jnp.full_like(column, -jnp.inf), column, jnp.zeros(q.shape, dtype)
        (m, l, o), _ = lax.scan(visit, start, (numbers(k), k, v))
        return (o / nonzero(l)).astype(q.dtype), finite(m) + jnp.log(nonzero(l))

    o, lse = lax.map(attend, (numbers(q), q))
    o = unblocked(o, *given[0].shape[1:3])
    return o, Blockwise(*given, o, lse)


def blockwise_backward(residuals, do, mask, causal, scale, block_size):
    """Block by block as in the forward: each block of queries adds to the gradients of all keys and values."""
    # as in the plain form, with P = exp(s − lse); Σ_s dP ⊙ P = Σ_d do ⊙ o, which needs no whole row of P
    q, k, v, o, lse = residuals
    dtype, shapes = wide(q.dtype), (q.shape, k.shape)
    c, b, groups, mask = tiling(q, k, mask, block_size)
    q, do, o, k, v = blocks(q, c, groups), blocks(do, c, groups), blocks(o, c, groups), blocks(k, b), blocks(v, b)
    mean = (do.astype(dtype) * o.astype(dtype)).sum(-1, keepdims=True)

    def of_queries(totals, block):
        i, q, do, lse, mean = block

        def visit(dq, block):
            j, k, v = block

            def update(dq):
                p = jnp.exp(scores(q, k, scale, allowed(mask, causal, i, j, c, b, groups)) - lse)
                dp = einsum("bktd,bksd->bkts", do, v)
                ds = (p * (dp - mean) * jnp.asarray(scale, dtype)).astype(q.dtype)
                dk = einsum("bkts,bktd->bksd", ds, q)
                dv = einsum("bkts,bktd->bksd", p.astype(do.dtype), do)
                return dq + einsum("bkts,bksd->bktd", ds, k), (dk, dv)

            nothing = jnp.zeros(k.shape, dtype)
            return unless_future(causal, i * c + c - 1, j * b, update, lambda dq: (dq, (nothing, nothing)), dq)

        dq, parts = lax.scan(visit, jnp.zeros(q.shape, dtype), (numbers(k), k, v))
        return jax.tree.map(jnp.add, totals, parts), dq.astype(q.dtype)

    zeros_kv = jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)
    (dk, dv), dq = lax.scan(of_queries, zeros_kv, (numbers(q), q, do, lse, mean))
    (_, *queries, _), (_, *memory, _) = shapes
    return unblocked(dq, *queries), *(unblocked(d.astype(k.dtype), *memory) for d in (dk, dv))


# --- blocks, masks and scores ----------------------------------------------------------------------------------------


def tiling(q, k, mask, block_size: int):
    """``c, b, G`` and the mask as ``(B or 1, 1 or T, S)`` up to whole blocks; what is added there does not count."""
    c, b = min(block_size, q.shape[1]), min(block_size, k.shape[1])
    if mask is None and k.shape[1] % b:
        mask = jnp.ones((1, k.shape[1]), bool)
    if mask is not None:
        mask = rows_of_mask(mask)
        mask = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % c if mask.shape[1] > 1 else 0), (0, -k.shape[1] % b)))
    return c, b, q.shape[2] // k.shape[2], mask


def rows_of_mask(mask: jax.Array) -> jax.Array:
    """``(B, S)`` as ``(B, 1, S)``; one for each pair as it is."""
    return mask if mask.ndim == 3 else mask[:, None]


def blocks(x: jax.Array, size: int, groups: int = 1) -> jax.Array:
    """``(B, T, K G, D)`` to ``(n, B, K, G size, D)``: on CPU products want their batch axes first and few of them."""
    batch, length, heads, features = x.shape
    n = -(-length // size)
    if n * size > length:
        x = jnp.pad(x, ((0, 0), (0, n * size - length), (0, 0), (0, 0)))
    x = x.reshape(batch, n, size, heads, features).transpose(1, 0, 3, 2, 4)
    return x.reshape(n, batch, heads // groups, groups * size, features)


def unblocked(x: jax.Array, length: int, heads: int) -> jax.Array:
    """``(n, B, K, G size, D)`` back to ``(B, T, K G, D)``."""
    n, batch, kv_heads, several, features = x.shape
    size = several * kv_heads // heads
    x = x.reshape(n, batch, heads, size, features).transpose(1, 0, 3, 2, 4)
    return x.reshape(batch, n * size, heads, features)[:, :length]


def allowed(mask, causal: bool, i, j, c: int, b: int, groups: int):
    """Which pairs of queries' block i and memory's block j count, ``(B or 1, 1, G c or 1, b)``; None for all."""
    parts = []
    if causal:
        t = i * c + jnp.arange(groups * c, dtype=jnp.int32) % c
        s = j * b + jnp.arange(b, dtype=jnp.int32)
        parts.append((s[None] <= t[:, None])[None, None])
    if mask is not None:
        part = lax.dynamic_slice_in_dim(mask, j * b, b, 2)
        if mask.shape[1] > 1:  # each query has its own
            part = jnp.tile(lax.dynamic_slice_in_dim(part, i * c, c, 1), (1, groups, 1))
        parts.append(part[:, None])
    return parts[0] & parts[1] if len(parts) == 2 else parts[0] if parts else None


def scores(q, k, scale, count) -> jax.Array:
    """``scale · q kᵀ`` in float32 at least, −∞ where a pair does not count."""
    s = einsum("bktd,bksd->bkts", q, k)
    s = s * jnp.asarray(scale, s.dtype)
    return s if count is None else jnp.where(count, s, -jnp.inf)


def unless_future(causal: bool, last_query, first_key, update, skip, *operands):
    """``update(*operands)``, or ``skip`` where causality leaves nothing of the block."""
    return lax.cond(first_key <= last_query, update, skip, *operands) if causal else update(*operands)


def einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in the operands' dtype, summed and returned in float32 at least."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide(a.dtype))


def finite(m: jax.Array) -> jax.Array:
    """The largest score, 0 for a query that may attend to nothing, whose largest is −∞."""
    return jnp.where(m == -jnp.inf, 0, m)


def nonzero(l: jax.Array) -> jax.Array:
    """The sum of exponentials, 1 for a query that may attend to nothing."""
    return jnp.where(l == 0, 1, l)


def numbers(x: jax.Array) -> jax.Array:
    """0, 1, … along the first axis."""
    return jnp.arange(x.shape[0], dtype=jnp.int32)


def require_mask(mask, batch: int, queries: int, memory: int) -> None:
    """Raise `LayerError` unless the mask is None or boolean and of one of the two shapes."""
    if mask is None:
        return
    if mask.dtype != bool:
        raise LayerError(f"expected a boolean mask, True = may be attended to, got {mask.dtype}")
    if mask.shape not in ((batch, memory), (batch, queries, memory)):
        raise LayerError(f"expected a mask of shape {(batch, memory)} or {(batch, queries, memory)}, got {mask.shape}")
