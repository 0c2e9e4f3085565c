"""Attention: every position asks, with a query, what it needs of the others, and is given a mean of their values.

`attention` is the layer, with its projections; `dot_product_attention` is what it computes between them, with
`dot_product_attention_backward` beneath it. Both are plain, all scores at once, or blockwise, in memory linear in the
lengths; or a library's (`fnet.layers.jax_attention`).

Legend: B batch, T queries, S positions of the memory, H heads, K heads of keys and values, G = H/K heads that share
one, D features of a head, E of its values, I features of the query, M of the memory, O out; c, b queries and positions
in a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fnet.core.checks import require_array, require_counts, require_key, require_layer
from fnet.core.numerics import stream, wide
from fnet.core.splitting import are_features_split
from fnet.layers.children import backward_child, forward_child, init_child, inside
from fnet.layers.decoding import begin, is_decoding, remembered
from fnet.layers.dense import affine, affine_backward
from fnet.layers.dot_product import (
    dot_product_attention,
    dot_product_attention_backward,
    in_int32,
    require_bias,
    require_mask,
    require_scores,
)
from fnet.layers.embedding import require_rotary, rotate
from fnet.layers.initializers import glorot_uniform, require_initializers, zeros
from fnet.layers.jax_attention import Form, require_form
from fnet.layers.masks import is_masked, split_bias, with_bias, with_mask
from fnet.types import Layer, LayerError


def attention(
    heads: int,
    *,
    features: int | None = None,
    head_features: int | None = None,
    value_features: int | None = None,
    kv_heads: int | None = None,
    causal: bool = False,
    window: int | None = None,
    offset=0,
    block_size: int | None = None,
    rotary=None,
    interleaved: bool = False,
    relative: Layer | None = None,
    softcap=None,
    score: Layer | None = None,
    dropout_rate=None,
    scale=None,
    weights=glorot_uniform(),
    bias=zeros(),
    form: Form = None,
) -> Layer:
    """Multi-head attention: ``y = concat_h(softmax(scale · Q_h K_hᵀ + bias_h) V_h) w_out + b_out``, ``y (B, T, O)``.

    ``Q = query w_query + b_query``, ``K`` and ``V`` likewise of the memory, each cut into heads of D features. Inputs:

    - ``x (B, T, I)``: self-attention, the memory is ``x``;
    - ``(x, mask)``: the same with padding; ``x`` counts as 0 where a mask ``(B, T)`` is False; it gives ``(y, mask)``;
    - ``(query (B, T, I), memory (B, S, M))``, or with a third, ``mask``: cross-attention. The mask is the memory's, and
      ends here;
    - any of these with a bias of the scores last, ``(B or 1, H, T, S)``, known by its four axes: ``(x, bias)``, ``(x,
      mask, bias)`` and so on. It ends here and has a gradient; `biased` gives one to many layers.

    A mask is boolean, True = may be attended to: ``(B, S)`` for the memory's padding, ``(B, T, S)`` for each pair, or
    ``(B, H, T, S)`` for each head's. With ``causal`` position t attends to positions ``s <= t`` alone, besides. What
    may not be attended to has gradients of exactly 0. What a mask hides from every query has no effect at all, whatever
    it holds; NaN or infinity at a position that some query may attend to reaches the others too, as 0 · NaN. A query
    that may attend to nothing is given 0, before the output's projection.

    - ``features``: O, that of the query by default. ``head_features``: D, ``O / heads`` by default.
      ``value_features``: E, D by default.
    - ``kv_heads``: K, ``heads`` by default; fewer are shared by G heads in a row (grouped queries, 1 is multi-query).
    - ``window``, ``offset``, ``softcap``, ``score``: those of `dot_product_attention`. The offset, where queries begin,
      counts for ``rotary`` and ``relative`` too.
    - ``relative``: a layer of the positions of queries and memory to a bias, `relative_positions` or `alibi`, of which
      the parameters are those called ``relative``.
    - ``dropout_rate``: which probabilities are 0 in training, as there; it needs a key.
    - ``block_size``: None computes all scores at once and keeps the probabilities ``(B, H, T, S)`` for the backward; a
      number takes blocks of so many positions, and memory linear in T and S both ways.
    - ``rotary``: base or frequencies of `rotate`, applied to queries and keys at the positions 0, 1, …; None for none.
      ``interleaved``: its pairs are neighbours.
    - ``scale``: ``1/√D`` by default. ``weights``, ``bias``: initializers of all four projections; None for no biases.
    - ``form``: None is fnet's own, with its backward by hand. ``"cudnn"`` is `jax.nn.dot_product_attention` by cuDNN's
      fused kernel, for NVIDIA's GPUs, bfloat16 or float16 and heads of a multiple of 8 features; ``"xla"`` the same
      function by XLA, anywhere. **Of these two the backward between the projections is not by hand**: it is jax' own
      derivative of its function, which runs the forward a second time, and an audit there holds jax against jax. They
      take causal, masks, biases, ``relative``, ``kv_heads``, ``rotary`` and a ``scale`` that is not traced, and none of
      the other options; their softmax is in float32, of float64 too; and they run with no cache.

    Raises ValueError for heads that do not divide and options that ``form`` does not take, `LayerError` for shapes,
    dtypes and parameters that do not fit, and for a platform without cuDNN.

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
    require_counts("attention", **given, value_features=value_features, block_size=block_size)
    require_scores("attention", window, softcap, dropout_rate, score)
    beside = {"window": window, "softcap": softcap, "score": score, "dropout_rate": dropout_rate}
    require_form("attention", form, offset, scale, **beside, block_size=block_size, value_features=value_features)
    if relative is not None:
        require_layer("attention: relative", relative)
    require_initializers("attention", "bias", weights=weights, bias=bias)
    require_rotary("attention", rotary)
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} heads cannot share kv_heads = {kv_heads}; it must divide heads")
    if features is not None and head_features is None and features % heads:
        raise ValueError(f"attention: {heads} heads do not divide features = {features}; give head_features")
    options = {"causal": causal, "window": window, "offset": offset, "softcap": softcap, "dropout_rate": dropout_rate}
    options |= {"score": score, "scale": scale, "block_size": block_size, "form": form}

    def without_bias(x):
        x, bias = split_bias(x)
        if bias is not None and relative is not None:
            raise LayerError("expected one bias, got one in the inputs beside relative")
        return x, bias

    def turn(x, at):
        return x if rotary is None else rotate(x, at, rotary, interleaved=interleaved)

    def init(key, x):
        x, given = without_bias(x)
        query, memory, _ = inputs(x)
        require_bias(given, query.shape[0], heads, query.shape[1], memory.shape[1])
        out = query.shape[-1] if features is None else features
        if head_features is None and out % heads:
            raise LayerError(f"{heads} heads do not divide the query's {out} features: give head_features")
        size = out // heads if head_features is None else head_features
        if not query.shape[-1] or not memory.shape[-1]:
            raise LayerError(f"expected features, got shapes {query.shape} and {memory.shape}")
        if rotary is not None and jnp.ndim(rotary) == 0 and size % 2:
            raise LayerError(f"rotary needs heads of an even number of features, got {size}: give head_features")
        if rotary is not None and jnp.size(rotary) > max(1, size // 2):
            raise LayerError(f"expected at most {size // 2} frequencies for heads of {size}, got {jnp.size(rotary)}")
        widths = {
            "query": (query.shape[-1], heads * size),
            "key": (memory.shape[-1], kv_heads * size),
            "value": (memory.shape[-1], kv_heads * (value_features or size)),
            "out": (heads * (value_features or size), out),
        }
        params = {}
        for name, shape in widths.items():
            params[name] = {"w": weights(stream(stream(key, name), "w"), shape, query.dtype)}
            if bias is not None:
                params[name]["b"] = bias(stream(stream(key, name), "b"), shape[1:], query.dtype)
        if relative is not None:
            params["relative"], state = init_child("relative", relative, key, (places(query, offset), places(memory)))
            if jax.tree.leaves(state):
                raise LayerError(f"relative: {relative.name} has a state; expected a layer without")
        return params, ()

    def forward(params, state, x, *, key=None, train=False):
        x, bias = without_bias(x)
        query, memory, mask = clean(x)
        if dropout_rate is None or not train:
            key = None
        elif key is None:
            raise LayerError("expected a key in training, got None: pass forward(..., key=key, train=True)")
        else:
            require_key("attention", key)
        if is_joined(params, x):
            q, k, v = project_all(params, query, heads)
        else:
            q = project(params, "query", query, heads)  # (B, T, H, D)
            k = project(params, "key", memory, kv_heads)  # (B, S, K, D)
            v = project(params, "value", memory, kv_heads)
        before = begin()  # 0, unless a cache holds positions before these
        first = in_int32(offset) + before
        q, k = turn(q, positions(q) + first), turn(k, positions(k) + (before if is_self(x) else 0))
        if is_decoding() and is_self(x):
            require_causal(causal, mask)
            if form is not None:
                raise LayerError(
                    f"form = {form!r} runs with no cache: make the model without; its parameters are the same"
                )
            k, v = remembered(k, v)
        of_relative = None
        if relative is not None:
            require_relative(params)
            at = places(query, first), places(k)
            bias, _, of_relative = forward_child("relative", relative, params["relative"], (), at, key=key, train=train)
        o, kept = dot_product_attention(q, k, v, mask, bias, key=key, **{**options, "offset": first})
        o = o.reshape(*o.shape[:2], o.shape[2] * o.shape[3])  # (B, T, H E)
        y = with_mask(project(params, "out", o), x[1] if is_masked(x) else None)
        return y, state, (x, o, kept, key, bias, of_relative)

    def backward(params, residuals, dy):
        # y = o w_out + b_out, o = attention(q, k, v), with the memory m and rotations R: q = R (x w_query + b_query),
        # k = R (m w_key + b_key), v = m w_value + b_value. The chain rule through each: R's transpose is the rotation
        # back, a product's backward stands in `dense`, dm is the sum by k and by v; in self-attention dx gains it
        x, o, kept, key, bias, of_relative = residuals
        dy = dy[0] if isinstance(dy, tuple) else dy
        query, memory, mask = clean(x)
        dparams = {}
        dparams["out"], do = project_backward(params["out"], o, dy)
        do = do.reshape(*do.shape[:2], heads, do.shape[2] // heads)
        dq, dk, dv, dbias = dot_product_attention_backward(kept, do, mask, bias, key=key, **options)
        given = None if relative is not None else dbias
        dq, dk = turn(dq, -(positions(dq) + in_int32(offset))), turn(dk, -positions(dk))
        if relative is not None:
            dparams["relative"], _ = backward_child("relative", relative, params["relative"], of_relative, dbias)
        if is_joined(params, x):
            own, dx = project_all_backward(params, query, dq, dk, dv)
            return {**dparams, **own}, with_bias(clean_backward(x, dx, None), given)
        dparams["query"], dquery = project_backward(params["query"], query, dq)
        dparams["key"], by_key = project_backward(params["key"], memory, dk)
        dparams["value"], by_value = project_backward(params["value"], memory, dv)
        return dparams, with_bias(clean_backward(x, dquery, by_key + by_value), given)

    return Layer("attention", init, forward, backward, () if relative is None else (("relative", relative),))


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
    return (mask if mask.ndim == 2 else mask.any(tuple(range(1, mask.ndim - 1))))[:, :, None]


def asking(x, mask):
    """The queries ``(B, T, 1)`` that count: all (None), but for those that may attend to nothing or are padding."""
    if mask.ndim > 2:
        return (mask if mask.ndim == 3 else mask.any(1)).any(2)[:, :, None]
    return seen(mask) if is_self(x) else None


def clean(x):
    """`inputs` with 0 wherever no query may look, so that whatever stands there has no effect, not even NaN."""
    query, memory, mask = inputs(x)
    if mask is not None:
        memory, asks = jnp.where(seen(mask), memory, 0), asking(x, mask)
        query = query if asks is None else jnp.where(asks, query, 0)
    return query, memory, mask


def clean_backward(x, dquery, dmemory):
    """The gradients in the form of the inputs; in self-attention ``dquery`` may be all of it, and ``dmemory`` None."""
    mask = inputs(x)[2]
    if mask is not None:
        asks = asking(x, mask)
        dmemory = dmemory if dmemory is None else jnp.where(seen(mask), dmemory, 0)
        dquery = dquery if asks is None else jnp.where(asks, dquery, 0)
    dx = (dquery if dmemory is None else dquery + dmemory,) if is_self(x) else (dquery, dmemory)
    return (*dx, *([None] if has_mask(x) else [])) if isinstance(x, tuple) else dx[0]


def positions(x: jax.Array) -> jax.Array:
    """0, 1, … along the second axis."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)


def places(x: jax.Array, offset: jax.Array | int = 0) -> jax.Array:
    """`positions` as a batch of one, ``(1, T)``."""
    return (positions(x) + in_int32(offset))[None]


def require_causal(causal: bool, mask) -> None:
    """Raise `LayerError` unless attention can be run with a cache."""
    if not causal or mask is not None:
        given = "one that is not causal" if mask is None else "a mask"
        raise LayerError(f"expected causal attention without a mask, to be run with a cache, got {given}")


def require_relative(params) -> None:
    """Raise `LayerError` unless there is an entry for ``relative``."""
    if "relative" not in params:
        raise LayerError(f"expected params of relative too, got {sorted(params)}: pass what init returned")


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


PROJECTIONS = ("query", "key", "value")


def is_joined(params, x) -> bool:
    """Whether the projections are one product: where the heads are split over devices, of one array to equal heads.

    Then its gradient is summed over these devices once, not thrice. Elsewhere there is nothing to gain.
    """
    if not are_features_split() or not is_self(x) or not params.keys() >= {*PROJECTIONS}:
        return False
    query, _, mask = inputs(x)
    if mask is not None and mask.ndim > 2:  # by pairs, queries and memory are cleaned apart
        return False
    kinds = {tuple((name, leaf.shape, leaf.dtype) for name, leaf in params[part].items()) for part in PROJECTIONS}
    w = params["query"]["w"]
    return len(kinds) == 1 and (query.shape[-1], query.dtype) == (w.shape[0], w.dtype)


def project_all(params, x: jax.Array, heads: int) -> list[jax.Array]:
    """`project` by query, key and value as one product."""
    y = tensordot(x, side_by_side(params), (2,), (0,))  # (B, T, 3, H D)
    if "b" in params["query"]:
        y = y + jnp.stack([params[name]["b"] for name in PROJECTIONS]).astype(y.dtype)[None, None]
    y = y.astype(x.dtype)
    return [y[:, :, i].reshape(*x.shape[:-1], heads, y.shape[-1] // heads) for i in range(3)]


def side_by_side(params) -> jax.Array:
    """The three matrices as ``(I, 3, H D)``, which both products take as it is."""
    return jnp.stack([params[name]["w"] for name in PROJECTIONS], 1)


def tensordot(a: jax.Array, b: jax.Array, of_a: tuple[int, ...], of_b: tuple[int, ...]) -> jax.Array:
    """The sum over these axes, in float32 at least."""
    return jax.lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=wide(a.dtype))


def project_all_backward(params, x: jax.Array, *dys: jax.Array):
    """The three backwards as one product each way."""
    w = side_by_side(params)
    dy = jnp.stack([d.reshape(*x.shape[:-1], w.shape[2]) for d in dys], 2)  # (B, T, 3, H D)
    dw = tensordot(x, dy, (0, 1), (0, 1)).astype(w.dtype)
    dx = tensordot(dy, w, (2, 3), (1, 2)).astype(x.dtype)
    dparams = {name: {"w": dw[:, i]} for i, name in enumerate(PROJECTIONS)}
    if "b" in params["query"]:
        db = dy.sum((0, 1))
        dparams = {name: {**dparams[name], "b": db[i]} for i, name in enumerate(PROJECTIONS)}
    return dparams, dx


def project_backward(params, x: jax.Array, dy: jax.Array):
    """The same backwards: the heads are laid side by side again."""
    return affine_backward(params, x, dy.reshape(*x.shape[:-1], params["w"].shape[1]))
