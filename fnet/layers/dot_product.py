"""Attention itself, ``softmax(q kᵀ · scale) v``, with its backward by hand: all at once, or in blocks.

Legend: B batch, T queries, S positions of the memory, H heads, K heads of keys and values, G = H/K heads that share
one, D features of a head; c, b queries and positions in a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnet.core.numerics import wide
from fnet.layers.children import show, watched
from fnet.types import LayerError


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
    p = by_heads(e / nonzero(e.sum(-1, keepdims=True)), length)
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
    dp = by_heads(einsum("bktd,bksd->bkts", do, v), length, is_gradient=True)
    ds = (p * (dp - (dp * p).sum(-1, keepdims=True)) * jnp.asarray(scale, p.dtype)).astype(q.dtype)
    dq = einsum("bkts,bksd->bktd", ds, k).astype(q.dtype)
    dk = einsum("bkts,bktd->bksd", ds, q).astype(k.dtype)
    memory = k.shape[2], k.shape[1]
    return unblocked(dq[None], length, heads), unblocked(dk[None], *memory), unblocked(dv[None], *memory)


def by_heads(p: jax.Array, length: int, *, is_gradient: bool = False) -> jax.Array:
    """``p (B, K, G T, S)`` itself; who watches sees the probabilities as ``(B, H, T, S)``."""
    batch, kv_heads, rows, positions = p.shape
    each = batch, kv_heads * rows // length, length, positions
    return show("attention", p.reshape(each), is_gradient=is_gradient).reshape(p.shape) if watched() else p


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
