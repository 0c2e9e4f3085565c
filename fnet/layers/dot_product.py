"""Attention itself, ``softmax(q kᵀ · scale) v``, with its backward by hand: all at once, or in blocks.

Legend: B batch, T queries, S positions of the memory, H heads, K heads of keys and values, G = H/K heads that share
one, D features of a head, E of its values; c, b queries and positions in a block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnet.core.checks import described, require, require_counts, require_layer
from fnet.core.numerics import wide
from fnet.layers.activation import without_parameters
from fnet.layers.children import show, watched
from fnet.layers.jax_attention import Form, by_jax, by_jax_backward, require_form
from fnet.types import Layer, LayerError


def dot_product_attention(
    q,
    k,
    v,
    mask=None,
    bias=None,
    *,
    causal=False,
    window=None,
    offset=0,
    softcap=None,
    score=None,
    dropout_rate=None,
    key=None,
    scale=None,
    block_size=None,
    form: Form = None,
):
    """``o = softmax(scale · q kᵀ + bias) v`` over the positions that each query may attend to: ``o, residuals``.

    ``q (B, T, H, D)``, ``k (B, S, K, D)``, ``v (B, S, K, E)``, ``o (B, T, H, E)``; head h has the keys and values
    ``h // G``. Scores, exponentials and their sums are in float32 at least.

    - ``mask``: boolean, True = may be attended to: ``(B, S)``, ``(B, T, S)`` or, for each head, ``(B, H, T, S)``.
    - ``bias``: floating ``(H, T, S)`` or ``(B or 1, H, T, S)``, added to the scores; −∞ leaves a pair out.
    - ``offset``: query t stands at the position ``offset + t`` of the memory; it may be traced. This is what the next
      two go by: with ``causal`` it attends to positions up to its own, with ``window`` w to those less than w away, so
      that with both it sees the last w, its own among them.
    - ``score``: f of a layer without parameters, ``f(scale · q kᵀ) + bias`` in the place of a score; its backward is
      what the backward here calls, for each block. It acts on each number by itself (which is not looked into), and is
      finite at 0 too, which stands in padding. What goes by positions as well is a bias, a mask or a window.
    - ``softcap``: the score function ``softcap · tanh(score / softcap)`` (Gemma 2).
    - ``dropout_rate``: p; with a ``key`` each probability is 0 with probability p and else divided by ``1 − p``. What
      is drawn depends on the key and the shape, and not on ``block_size``. Without a key nothing is dropped.
    - ``scale``: ``1/√D`` by default. ``block_size``: None, or the positions of a block, as in `attention`.
    - ``form``: None, or whose kernel takes the place of what is here, as in `attention`.

    Raises `LayerError` for shapes, masks and biases that do not fit, ValueError for numbers that do not.

    Blockwise, the softmax goes over the memory a block at a time with the largest score ``m`` so far, the sum ``l`` of
    ``exp(s - m)`` and the mean not yet divided by it, both rescaled as ``m`` grows (Milakov and Gimelshein,
    arXiv:1805.02867; Rabe and Staats, arXiv:2112.05682). The backward by hand computes each block of probabilities anew
    from ``lse = m + log l`` (FlashAttention, Dao et al., arXiv:2205.14135). Blocks that ``causal`` or ``window`` leave
    empty are skipped. Autodiff of this forward is right too, but keeps the scores of every block: its memory is not
    linear. A bias is an array of T · S numbers, in the blockwise form too.

    | here | torch's ``scaled_dot_product_attention`` | flax' ``dot_product_attention`` |
    |---|---|---|
    | ``(B, T, H, D)`` | ``(B, H, T, D)`` | same |
    | ``mask`` and ``bias`` | one ``attn_mask``, of either kind, that broadcasts | both, to ``(B, H, T, S)`` |
    | ``causal``: query t at ``offset + t`` | ``is_causal``: at t | a mask |
    | K heads are shared by H | with ``enable_gqa=True`` | H = K |
    | ``window``, ``softcap`` | in ``flex_attention`` | a mask; no |
    | ``score``: a layer, of the score alone | in ``flex_attention``: ``score_mod``, of indices too, by autodiff | no |
    | nothing to attend to: 0, and gradients of 0 | NaN before 2.5 | the mean of all values |
    | dropout draws for each example and head | same | one draw for all, by ``broadcast_dropout`` |

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))  # B 2, T and S 10, H and K 4, D 8
    >>> plain, _ = dot_product_attention(q, k, v, causal=True)
    >>> blockwise, _ = dot_product_attention(q, k, v, causal=True, block_size=4)
    >>> bool(jnp.allclose(plain, blockwise, atol=1e-6))
    True
    """
    if (
        q.ndim != 4
        or k.shape[:3] != v.shape[:3]
        or v.ndim != 4
        or k.shape != (q.shape[0], *k.shape[1:3], q.shape[3])
        or q.shape[2] % k.shape[2]
    ):
        raise LayerError(
            "expected q (B, T, H, D), k (B, S, K, D) and v (B, S, K, E) where K divides H, "
            f"got {q.shape}, {k.shape} and {v.shape}"
        )
    require_mask(mask, q.shape[0], q.shape[1], k.shape[1], q.shape[2])
    require_bias(bias, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    require_scores("dot_product_attention", window, softcap, dropout_rate, score)
    beside = {"window": window, "softcap": softcap, "score": score, "dropout_rate": dropout_rate}
    require_form("dot_product_attention", form, offset, scale, **beside, block_size=block_size)
    if form is not None:
        return by_jax(q, k, v, four_axes(mask), four_axes(bias), causal, scale, form)
    rule = Rule(mask, bias, causal, window, in_int32(offset), function_of(score, softcap), dropout_rate, key, scale)
    if block_size is None:
        return plain(q, k, v, rule)
    return blockwise(q, k, v, rule, block_size)


def dot_product_attention_backward(
    residuals,
    do,
    mask=None,
    bias=None,
    *,
    causal=False,
    window=None,
    offset=0,
    softcap=None,
    score=None,
    dropout_rate=None,
    key=None,
    scale=None,
    block_size=None,
    form: Form = None,
):
    """``dq, dk, dv, dbias`` for the gradient ``do (B, T, H, E)`` by ``o``; all else as it was given to the forward."""
    if form is not None:
        *found, dbias = by_jax_backward(residuals, do, four_axes(mask), four_axes(bias), causal, scale, form)
        return *found, None if bias is None else dbias.reshape(bias.shape)
    rule = Rule(mask, bias, causal, window, in_int32(offset), function_of(score, softcap), dropout_rate, key, scale)
    if block_size is None:
        return plain_backward(residuals, do, rule)
    return blockwise_backward(residuals, do, rule, block_size)


class Rule(NamedTuple):
    """Which pairs count and what becomes of their scores: the arguments of `dot_product_attention`."""

    mask: Any
    bias: Any
    causal: bool
    window: int | None
    offset: Any
    score: Layer | None
    rate: Any
    key: Any
    scale: Any


class Plain(NamedTuple):
    """What the plain form keeps: all by heads, and the probabilities, which take more time to compute than to read."""

    q: jax.Array  # (B, K, G T, D)
    k: jax.Array  # (B, K, S, D)
    v: jax.Array  # (B, K, S, E)
    p: jax.Array  # (B, K, G T, S)
    kept: Any  # boolean like p, None without dropout


def plain(q, k, v, rule: Rule):
    """All scores at once."""
    (length, heads), groups = q.shape[1:3], q.shape[2] // k.shape[2]
    rule = rule._replace(mask=four_axes(rule.mask), bias=four_axes(rule.bias))
    q, k, v = blocks(q, length, groups)[0], blocks(k, k.shape[1])[0], blocks(v, v.shape[1])[0]
    s, _ = scores(q, k, rule, 0, 0, groups)
    e = jnp.exp(s - finite(lax.stop_gradient(s.max(-1, keepdims=True))))
    p = by_heads(e / nonzero(e.sum(-1, keepdims=True)), length)
    kept = drawn(rule, 0, q, groups, k.shape[2])
    o = einsum("bkts,bksd->bktd", dropped(p, kept, rule).astype(v.dtype), v).astype(v.dtype)
    return unblocked(o[None], length, heads), Plain(q, k, v, p, kept)


def plain_backward(residuals, do, rule: Rule):
    """Of all scores at once."""
    # o = (P ⊙ m) v with m of dropout,  P = softmax(s),  s = f(z) + bias,  z = scale · q kᵀ, P = 0 where masked:
    #   dv = (P ⊙ m)ᵀ do,  dP = m ⊙ (do vᵀ),  ds = P ⊙ (dP − Σ_s dP ⊙ P),  dbias = ds (summed over B if it is shared)
    #   dz = f'(z) ds, by the backward of f;  dq = scale · dz k,  dk = scale · dzᵀ q
    q, k, v, p, kept = residuals
    (length, heads), groups = do.shape[1:3], do.shape[2] // k.shape[1]
    do = blocks(do, length, groups)[0]
    dv = einsum("bkts,bktd->bksd", dropped(p, kept, rule).astype(do.dtype), do).astype(v.dtype)
    dp = by_heads(dropped(einsum("bktd,bksd->bkts", do, v), kept, rule), length, is_gradient=True)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True))
    of_score = None if rule.score is None else scores(q, k, rule._replace(mask=None, bias=None), 0, 0, groups)[1]
    dz = by_products(ds, of_score, rule, q)
    dq = einsum("bkts,bksd->bktd", dz, k).astype(q.dtype)
    dk = einsum("bkts,bktd->bksd", dz, q).astype(k.dtype)
    memory, dbias = (k.shape[2], k.shape[1]), None
    if rule.bias is not None:
        dbias = of_bias(ds, rule.bias).reshape(rule.bias.shape).astype(rule.bias.dtype)
    return unblocked(dq[None], length, heads), unblocked(dk[None], *memory), unblocked(dv[None], *memory), dbias


def by_heads(p: jax.Array, length: int, *, is_gradient: bool = False) -> jax.Array:
    """``p (B, K, G T, S)`` itself; who watches sees the probabilities as ``(B, H, T, S)``."""
    batch, kv_heads, rows, positions = p.shape
    each = batch, kv_heads * rows // length, length, positions
    return show("attention", p.reshape(each), is_gradient=is_gradient).reshape(p.shape) if watched() else p


class Blockwise(NamedTuple):
    """What the blockwise form keeps: all as they came, and the logarithm of each query's sum of exponentials."""

    q: jax.Array  # (B, T, H, D)
    k: jax.Array  # (B, S, K, D)
    v: jax.Array  # (B, S, K, E)
    o: jax.Array  # (B, T, H, E)
    lse: jax.Array  # (blocks of queries, B, K, G c, 1)


def blockwise(q, k, v, rule: Rule, block_size):
    """For each block of queries, one block of the memory after the other."""
    given, dtype = (q, k, v), wide(q.dtype)
    c, b, groups, rule = tiling(q, k, rule, block_size)
    memory, q, k, v = k.shape[1], blocks(q, c, groups), blocks(k, b), blocks(v, b)
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)  # autodiff adds up their gradients over the blocks

    def attend(block):
        i, q = block
        kept = drawn(rule, i, q, groups, memory, len(k) * b)

        def visit(carry, block):
            j, k, v = block
            k, v = k.astype(given[1].dtype), v.astype(given[2].dtype)

            def update(m, l, o):
                s, _ = scores(q.astype(given[0].dtype), k, rule, i, j, groups)
                top = lax.stop_gradient(jnp.maximum(m, s.max(-1, keepdims=True)))
                e, shrink = jnp.exp(s - finite(top)), jnp.exp(m - finite(top))
                more = einsum("bkts,bksd->bktd", dropped(e, part_of(kept, j, b), rule).astype(v.dtype), v)
                return top, shrink * l + e.sum(-1, keepdims=True), shrink * o + more

            return unless_empty(rule, i * c, c, j * b, b, update, lambda *carry: carry, *carry), None

        column = jnp.zeros((*q.shape[:-1], 1), dtype)
        start = jnp.full_like(column, -jnp.inf), column, jnp.zeros((*q.shape[:-1], v.shape[-1]), dtype)
        (m, l, o), _ = lax.scan(visit, start, (numbers(k), k, v))
        return (o / nonzero(l)).astype(given[0].dtype), finite(m) + jnp.log(nonzero(l))

    o, lse = lax.map(attend, (numbers(q), q))
    o = unblocked(o, *given[0].shape[1:3])
    return o, Blockwise(*given, o, lse)


def blockwise_backward(residuals, do, rule: Rule, block_size):
    """Block by block as in the forward: each block of queries adds to the gradients of all keys and values."""
    # as in the plain form, with P = exp(s − lse); Σ_s dP ⊙ P = Σ_d do ⊙ o, which needs no whole row of P
    q, k, v, o, lse = residuals
    bias, dtype, queries, memory = rule.bias, wide(q.dtype), q.shape[1:3], k.shape[1:3]
    c, b, groups, rule = tiling(q, k, rule, block_size)
    q, do, o, k, v = blocks(q, c, groups), blocks(do, c, groups), blocks(o, c, groups), blocks(k, b), blocks(v, b)
    mean = (do.astype(dtype) * o.astype(dtype)).sum(-1, keepdims=True)

    def of_queries(totals, block):
        i, q, do, lse, mean = block
        kept = drawn(rule, i, q, groups, memory[0], len(k) * b)

        def visit(dq, block):
            j, k, v = block

            def update(dq):
                s, of_score = scores(q, k, rule, i, j, groups)
                p, m = jnp.exp(s - lse), part_of(kept, j, b)
                ds = p * (dropped(einsum("bktd,bksd->bkts", do, v), m, rule) - mean)
                dz = by_products(ds, of_score, rule, q)
                dk = einsum("bkts,bktd->bksd", dz, q)
                dv = einsum("bkts,bktd->bksd", dropped(p, m, rule).astype(do.dtype), do)
                dbias = None if bias is None else of_bias(ds, rule.bias)
                return dq + einsum("bkts,bksd->bktd", dz, k), (dk, dv, dbias)

            def skip(dq):
                return dq, jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), jax.eval_shape(update, dq)[1])

            return unless_empty(rule, i * c, c, j * b, b, update, skip, dq)

        dq, (dk, dv, dbias) = lax.scan(visit, jnp.zeros(q.shape, dtype), (numbers(k), k, v))
        return jax.tree.map(jnp.add, totals, (dk, dv)), (dq.astype(q.dtype), dbias)

    zeros_kv = jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)
    (dk, dv), (dq, dbias) = lax.scan(of_queries, zeros_kv, (numbers(q), q, do, lse, mean))
    if bias is not None:  # (n, m, B or 1, K, G c, b)
        n, m, batch, kv_heads, _, _ = dbias.shape
        dbias = dbias.reshape(n, m, batch, kv_heads * groups, c, b).transpose(2, 3, 0, 4, 1, 5)
        dbias = dbias.reshape(batch, -1, n * c, m * b)[:, :, : queries[0], : memory[0]]
        dbias = dbias.reshape(bias.shape).astype(bias.dtype)
    return unblocked(dq, *queries), *(unblocked(d.astype(k.dtype), *memory) for d in (dk, dv)), dbias


def tiling(q, k, rule: Rule, block_size: int):
    """``c, b, G`` and the rule with mask and bias up to whole blocks; what is added there does not count."""
    c, b = min(block_size, q.shape[1]), min(block_size, k.shape[1])
    mask = jnp.ones((1, k.shape[1]), bool) if rule.mask is None and k.shape[1] % b else rule.mask

    def padded(a):
        a = four_axes(a)
        rows = 0 if a is None or a.shape[2] == 1 else -a.shape[2] % c
        return a if a is None else jnp.pad(a, ((0, 0), (0, 0), (0, rows), (0, -k.shape[1] % b)))

    # autodiff adds up the bias' gradient over the blocks in the dtype in which they are cut
    bias = None if rule.bias is None else rule.bias.astype(wide(q.dtype))
    return c, b, q.shape[2] // k.shape[2], rule._replace(mask=padded(mask), bias=padded(bias))


def four_axes(a):
    """A mask or a bias as ``(B or 1, H or 1, T or 1, S)``; None as it is."""
    if a is None:
        return None
    if a.dtype != bool and a.ndim == 3:  # a bias for all examples
        return a[None]
    return a[:, None, None] if a.ndim == 2 else a[:, None] if a.ndim == 3 else a


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


def cut(a: jax.Array, i, j, c: int, b: int, groups: int) -> jax.Array:
    """Of a mask or a bias by `four_axes` the blocks i of queries and j of memory, ``(B or 1, K or 1, G c or 1, b)``."""
    part = lax.dynamic_slice_in_dim(a, j * b, b, 3)
    if a.shape[2] > 1:
        part = lax.dynamic_slice_in_dim(part, i * c, c, 2)
    if a.shape[1] > 1:
        return part.reshape(a.shape[0], a.shape[1] // groups, groups * part.shape[2], b)
    return jnp.tile(part, (1, 1, groups, 1)) if a.shape[2] > 1 else part


def allowed(rule: Rule, i, j, c: int, b: int, groups: int):
    """Which pairs of queries' block i and memory's block j count, ``(B or 1, K or 1, G c or 1, b)``; None for all."""
    parts = []
    t = rule.offset + i * c + jnp.arange(groups * c, dtype=jnp.int32) % c
    s = j * b + jnp.arange(b, dtype=jnp.int32)
    ahead = (s[None] - t[:, None])[None, None]
    if rule.causal:
        parts.append(ahead <= 0)
    if rule.window is not None:
        parts.append(jnp.abs(ahead) < rule.window)
    if rule.mask is not None:
        parts.append(cut(rule.mask, i, j, c, b, groups))
    return functools.reduce(jnp.logical_and, parts) if parts else None


def scores(q, k, rule: Rule, i, j, groups: int):
    """``s = f(scale · q kᵀ) + bias`` in float32 at least, −∞ where a pair does not count; and f's residuals."""
    c, b = q.shape[2] // groups, k.shape[2]
    s, of_score = einsum("bktd,bksd->bkts", q, k), None
    s = s * scale_of(rule, q, s.dtype)
    if rule.score is not None:
        s, _, of_score = rule.score.forward((), (), s)
    if rule.bias is not None:
        s = s + cut(rule.bias.astype(s.dtype), i, j, c, b, groups)
    count = allowed(rule, i, j, c, b, groups)
    return s if count is None else jnp.where(count, s, -jnp.inf), of_score


def scale_of(rule: Rule, q: jax.Array, dtype) -> jax.Array:
    """The scale, 1/√D by default."""
    return jnp.asarray(q.shape[-1] ** -0.5 if rule.scale is None else rule.scale, dtype)


def by_products(ds, of_score, rule: Rule, q) -> jax.Array:
    """``scale · f' ds``, the gradient by ``q kᵀ``, in the dtype of the products."""
    ds = ds if rule.score is None else rule.score.backward((), of_score, ds)[1]
    return (ds * scale_of(rule, q, ds.dtype)).astype(q.dtype)


def function_of(score: Layer | None, softcap) -> Layer | None:
    """The score function f, None for ``f(z) = z``; that of a ``softcap`` is ``cap · tanh(z / cap)``."""
    if score is not None:
        params, state = kept_by(score)

        def run(z):
            y, _, residuals = score.forward(params, state, z)
            return y, residuals

        return without_parameters(score.name, run, lambda residuals, ds: score.backward(params, residuals, ds)[1])
    if softcap is None:
        return None

    def forward(z):
        cap = jnp.asarray(softcap, z.dtype)
        turned = jnp.tanh(z / cap)
        return cap * turned, turned

    def backward(turned, ds):  # f' = 1 − tanh²(z / cap)
        return ds * (1 - turned * turned)

    return without_parameters("softcap", forward, backward)


def of_bias(ds: jax.Array, bias: jax.Array) -> jax.Array:
    """The gradient by a bias: that by the scores, summed over the examples that share it."""
    return ds.sum(0, keepdims=True) if bias.ndim == 3 or bias.shape[0] == 1 else ds


def drawn(rule: Rule, i, q: jax.Array, groups: int, memory: int, padded: int | None = None):
    """Which probabilities of queries' block i dropout keeps, ``(B, K, G c, S)``, S ``padded``; None for all.

    The rows of each query are drawn by its own number, so that blocks of any size have the same.
    """
    if rule.rate is None or rule.key is None:
        return None
    batch, kv_heads, rows, _ = q.shape
    c, share = rows // groups, jnp.asarray(1 - rule.rate, jnp.float32)

    def of_query(t):
        return jax.random.bernoulli(jax.random.fold_in(rule.key, t), share, (batch, kv_heads, groups, memory))

    kept = jax.vmap(of_query, out_axes=3)(i * c + jnp.arange(c, dtype=jnp.int32))  # (B, K, G, c, S)
    kept = kept.reshape(batch, kv_heads, rows, memory)
    return kept if padded is None else jnp.pad(kept, ((0, 0), (0, 0), (0, 0), (0, padded - memory)))


def part_of(kept, j, b: int):
    """Of what `drawn` gives, memory's block j."""
    return None if kept is None else lax.dynamic_slice_in_dim(kept, j * b, b, 3)


def dropped(p: jax.Array, kept, rule: Rule) -> jax.Array:
    """``p m / (1 − rate)``, and p itself where nothing is dropped."""
    if kept is None:
        return p
    share = jnp.asarray(1 - rule.rate, p.dtype)
    return jnp.where(kept, p / jnp.where(share > 0, share, 1), 0)  # a traced rate of 1 drops everything


def unless_empty(rule: Rule, t, c: int, s, b: int, update, skip, *operands):
    """``update(*operands)``, or ``skip`` where the rule leaves nothing of c queries from t and b positions from s."""
    t, parts = t + rule.offset, []
    if rule.causal:
        parts.append(s <= t + c - 1)
    if rule.window is not None:
        parts.append((t - (s + b - 1) < rule.window) & (s - (t + c - 1) < rule.window))
    return lax.cond(functools.reduce(jnp.logical_and, parts), update, skip, *operands) if parts else update(*operands)


def einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in the operands' dtype, summed and returned in float32 at least."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide(a.dtype))


def finite(m: jax.Array) -> jax.Array:
    """The largest score, 0 for a query that may attend to nothing, whose largest is −∞."""
    return jnp.where(m == -jnp.inf, 0, m)


def nonzero(l: jax.Array) -> jax.Array:
    """The sum of exponentials, 1 for a query that may attend to nothing."""
    return jnp.where(l == 0, 1, l)


def in_int32(offset):
    """The offset, a number of Python or int32 whatever it came in."""
    return offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32)


def numbers(x: jax.Array) -> jax.Array:
    """0, 1, … along the first axis."""
    return jnp.arange(x.shape[0], dtype=jnp.int32)


def require_mask(mask, batch: int, queries: int, memory: int, heads: int | None = None) -> None:
    """Raise `LayerError` unless the mask is None or boolean and of one of the three shapes; ``heads`` None: any."""
    if mask is None:
        return
    if mask.dtype != bool:
        raise LayerError(f"expected a boolean mask, True = may be attended to, got {mask.dtype}")
    shapes = [(batch, memory), (batch, queries, memory)]
    if len(mask.shape) == 4:
        shapes.append((batch, mask.shape[1] if heads is None else heads, queries, memory))
    if mask.shape not in shapes:
        one = mask.shape == (queries, memory)
        remedy = f": one for all examples goes in by jnp.broadcast_to(mask, {shapes[1]})" if one else ""
        raise LayerError(f"expected a mask of shape {' or '.join(map(str, shapes))}, got {mask.shape}{remedy}")


def require_bias(bias, batch: int, heads: int, queries: int, memory: int) -> None:
    """Raise `LayerError` unless the bias is None or floating and of one of its shapes."""
    if bias is None:
        return
    each = heads, queries, memory
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise LayerError(f"expected a floating bias, got {bias.dtype}: a boolean one is a mask")
    if bias.shape not in (each, (1, *each), (batch, *each)):
        raise LayerError(f"expected a bias of shape {each} or {(batch, *each)}, got {bias.shape}")


def require_scores(who: str, window, softcap, dropout_rate, score) -> None:
    """Raise ValueError unless each is None or what it may be; TypeError for a score that is no layer."""
    require_counts(who, window=window)
    require(softcap is None or softcap > 0, f"{who}: softcap = {softcap}; expected above 0, or None for none")
    fits = dropout_rate is None or (dropout_rate >= 0) & (dropout_rate < 1)
    require(fits, f"{who}: dropout_rate = {dropout_rate}; expected 0 <= dropout_rate < 1")
    if score is None:
        return
    require_layer(f"{who}: score", score)
    if softcap is not None:
        raise ValueError(f"{who}: softcap beside score = {described(score)}; expected one, since both are f of a score")
    if not is_function(score):
        raise ValueError(
            f"{who}: score is {described(score)}; expected a function of each score, without parameters, state or "
            "key, such as softsign()"
        )


SOME_SCORES = jax.ShapeDtypeStruct((1, 1, 2, 3), jnp.float32)


def is_function(layer: Layer) -> bool:
    """Whether a layer needs nothing but its inputs, and returns outputs like them."""
    try:
        params, state = kept_by(layer)
        if jax.tree.leaves((params, state)):
            return False
        y = jax.eval_shape(lambda z: layer.forward(params, state, z, train=True)[0], SOME_SCORES)
    except LayerError:
        return False
    return (y.shape, y.dtype) == (SOME_SCORES.shape, SOME_SCORES.dtype)


def kept_by(layer: Layer):
    """Parameters and state of a layer of scores: trees without a leaf, if it is a function."""
    return jax.eval_shape(lambda z: layer.init(jax.random.key(0), z), SOME_SCORES)
