"""Embeddings of integer ids, and encodings of positions.

Legend: B batch, T length, H heads, D features of a position or a head, V vocabulary; `...` any further axes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from fnet.core.checks import is_whole, require, require_array, require_counts, require_layer, require_params
from fnet.core.contexts import place_of
from fnet.core.numerics import stream, wide
from fnet.core.splitting import by_examples
from fnet.layers.children import backward_child, forward_child, init_child
from fnet.layers.decoding import begin, is_decoding
from fnet.layers.dense import plus, product, rows, wide_product
from fnet.layers.initializers import normal, require_initializers
from fnet.layers.masks import by_position
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


def embedding(
    vocabulary: int, features: int, *, padding_idx: int | None = None, weights=normal(0.02), dtype=jnp.float32
) -> Layer:
    """``y = table[ids]`` with integer ``ids (B, ...)``, ``table (V, D)``, ``y (B, ..., D)``; D is ``features``.

    Raises `LayerError` where ids are not integers and, if they are concrete, where one is not from 0 to V − 1. Traced
    ids out of that range, negative ones too, give NaN and have no gradient: nothing is clamped or wrapped (flax wraps
    negative ids). PyTorch's initial table is normal with standard deviation 1, flax' ``1/√D``, GPT-2's 0.02.

    The row ``padding_idx``, an id, is 0 at the start and has the gradient 0, by hand and by autodiff; ``y`` is the row
    as it stands. (So the audit, which knows of nothing held, calls that row wrong where an id meets it.) PyTorch the
    same; it also takes −V to −1 for rows counted from the end, which are refused here, by ValueError. `tied_embedding`
    has no such row, since its logits would move it.

    >>> layer = embedding(100, 4)
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 16), "int32"))
    >>> params["table"].shape, layer.forward(params, state, jnp.zeros((8, 16), int))[0].shape
    ((100, 4), (8, 16, 4))
    """
    require_counts("embedding", vocabulary=vocabulary, features=features)
    require_initializers("embedding", weights=weights)
    if padding_idx is not None and not (is_whole(padding_idx, 0) and padding_idx < vocabulary):
        raise ValueError(
            f"embedding: padding_idx = {padding_idx!r}; expected an id from 0 to {vocabulary - 1}, or None"
        )

    def init(key, ids):
        require_ids(ids, vocabulary)
        table = weights(stream(key, "table"), (vocabulary, features), dtype)
        return {"table": table if padding_idx is None else table.at[padding_idx].set(0)}

    def forward(params, ids):
        require_params(params, table=(vocabulary, features))
        y = lookup(params["table"], ids)
        if padding_idx is not None:
            y = jnp.where((ids.astype(jnp.int32) == padding_idx)[..., None], jax.lax.stop_gradient(y), y)
        return y, ids

    # y_i = table[ids_i]:  dtable[v] = Σ_{i: ids_i = v} dy_i, and 0 for the row that is held; ids have no gradient
    def backward(params, ids, dy):
        dtable = scatter(ids, dy, vocabulary).astype(params["table"].dtype)
        return {"table": dtable if padding_idx is None else dtable.at[padding_idx].set(0)}, None

    def outer(params, ids, dy):  # of a row that is 1 at the id, and dy
        steps = math.prod(ids.shape[1:])
        ids = ids.astype(jnp.int32)
        counted = (ids >= 0) & (ids < vocabulary)
        known = jnp.where(counted if padding_idx is None else counted & (ids != padding_idx), ids, -1)
        return {"table": (known.reshape(ids.shape[0], steps), dy.reshape(ids.shape[0], steps, features))}

    return by_position(stateless("embedding", init, forward, backward)._replace(outer=outer))


def tied_embedding(
    vocabulary: int, features: int, body: Layer, *, weights=normal(0.02), bias=None, dtype=jnp.float32
) -> Layer:
    """``logits = body(table[ids]) tableᵀ (+ b)``: one table ``(V, D)`` embeds the ids and reads the logits out.

    ``ids (B, ...)`` to ``logits (B, ..., V)``; ``body`` maps ``(B, ..., D)`` to ``(B, ..., D)``. ``params`` are
    ``{"table", "body"}``, and ``"b" (V,)`` with an initializer ``bias``. If the inputs are a tuple ``(ids, ...)``, the
    rest goes to the body beside the vectors (a mask, a carry), and what the body returns beside its features comes out
    beside the logits. Ids and errors as in `embedding`; `LayerError` also where the body does not return D features.

    Source: Press and Wolf, arXiv:1608.05859; Inan et al., arXiv:1611.01462.

    >>> from fnet.layers.dense import dense
    >>> model = tied_embedding(100, 4, dense(4))
    >>> params, state = model.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 16), "int32"))
    >>> model.forward(params, state, jnp.zeros((8, 16), int))[0].shape
    (8, 16, 100)
    """
    require_counts("tied_embedding", vocabulary=vocabulary, features=features)
    require_initializers("tied_embedding", "bias", weights=weights, bias=bias)
    require_layer("tied_embedding: body", body)

    def init(key, x):
        ids, rest = head_of(x)
        require_ids(ids, vocabulary)
        params = {"table": weights(stream(key, "table"), (vocabulary, features), dtype)}
        vectors = jax.ShapeDtypeStruct((*ids.shape, features), dtype)
        params["body"], state = init_child("body", body, key, beside(vectors, rest))
        if bias is not None:
            params["b"] = bias(stream(key, "b"), (vocabulary,), dtype)
        return params, {"body": state}

    def forward(params, state, x, *, key=None, train=False):
        ids, rest = head_of(x)
        if not isinstance(params, dict) or getattr(params.get("table"), "shape", None) != (vocabulary, features):
            raise LayerError(f"expected params with a table {(vocabulary, features)}: pass what init returned")
        table = params["table"]
        vectors = beside(by_examples(lookup(table, ids)), rest)
        out, body_state, residuals = forward_child(
            "body", body, params["body"], state["body"], vectors, key=key, train=train
        )
        h, others = head_of(out)
        if h.shape != (*ids.shape, features) or h.dtype != table.dtype:
            raise LayerError(
                f"expected {table.dtype} {(*ids.shape, features)} of the body, as the table has, "
                f"got {h.dtype} {h.shape}"
            )
        logits = wide_product(rows(h), table.T)
        if "b" in params:
            logits = plus(logits, params["b"])
        y = beside(logits.astype(h.dtype).reshape(*ids.shape, vocabulary), others)
        return y, {"body": body_state}, {"ids": ids, "h": h, "body": residuals}

    def backward(params, residuals, dy):
        table, ids, h = params["table"], residuals["ids"], residuals["h"]
        dlogits, dothers = head_of(dy)
        d = rows(dlogits)
        # logits = h tableᵀ + b:  dh = dlogits table,  db = Σ_rows dlogits,  and through the output dtable = dlogitsᵀ h
        dh = by_examples(product(d, table).reshape(h.shape))
        from_output = jnp.matmul(d.T, rows(h), preferred_element_type=wide(h.dtype))
        dbody, dx = backward_child("body", body, params["body"], residuals["body"], beside(dh, dothers))
        dvectors, drest = head_of(dx)
        # the table stands twice in the formula, so its gradient is the sum of both
        from_input = scatter(ids, dvectors, vocabulary)
        dparams = {"table": (from_input + from_output).astype(table.dtype), "body": dbody}
        if "b" in params:
            dparams["b"] = d.astype(wide(d.dtype)).sum(0).astype(params["b"].dtype)
        return dparams, beside(None, drest)

    return Layer("tied_embedding", init, forward, backward, (("body", body),))


def head_of(x):
    """The first of a tuple, and the tuple of the rest; of anything else itself and None."""
    return (x[0], x[1:]) if isinstance(x, tuple) else (x, None)


def beside(first, rest):
    """What `head_of` took apart."""
    return first if rest is None else (first, *rest)


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]``; an id out of range is refused if it is concrete, and else its row is NaN and has no gradient."""
    require_ids(ids, table.shape[0])
    ids = within_int32(ids, table.shape[0])
    # widened before its rows are taken: autodiff adds up their gradients in the dtype in which they are taken
    rows = table.astype(wide(table.dtype)).at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows.astype(table.dtype)


def scatter(ids: jax.Array, dy: jax.Array, vocabulary: int) -> jax.Array:
    """``(V, D)``: the rows of ``dy (B, ..., D)`` summed by id, in float32 at least; ids out of range are dropped.

    On CPU this is many times faster than sorting first or a product with one-hot rows.
    """
    dtype = wide(dy.dtype)
    sums = jnp.zeros((vocabulary, dy.shape[-1]), dtype).at[within_int32(ids, vocabulary).ravel()]
    return sums.add(rows(dy).astype(dtype), mode="drop", wrap_negative_indices=False)


def within_int32(ids: jax.Array, vocabulary: int) -> jax.Array:
    """Ids of 64 bits as int32, those out of range as V, which jax would wrap into the range."""
    if ids.dtype.itemsize < 8:
        return ids
    return jnp.where((ids >= 0) & (ids < vocabulary), ids, vocabulary).astype(jnp.int32)


def require_ids(ids, vocabulary: int) -> None:
    """Raise `LayerError` unless ids are integers ``(B, ...)`` and, where they are concrete, below ``vocabulary``."""
    require_array(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise LayerError(f"expected integer ids, got {ids.dtype}: convert them, say to int32")
    if len(ids.shape) < 1:
        raise LayerError("expected ids with a batch axis, got a scalar")
    if isinstance(ids, Tracer | jax.ShapeDtypeStruct):
        return
    found = np.asarray(ids)
    wrong = np.argwhere((found < 0) | (found >= vocabulary))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise LayerError(
            f"expected ids from 0 to {vocabulary - 1}, got {found[place]} {place_of(place, found.shape)}, "
            f"{len(wrong)} such of {found.size}: map what is unknown to an id of its own"
        )


# --- positions -------------------------------------------------------------------------------------------------------


def learned_positions(length: int, *, weights=normal(0.02)) -> Layer:
    """``y_t = x_t + table_t`` with ``x (B, T, D)``, ``table (length, D)``, T at most ``length``.

    Raises `LayerError` for a longer input, and where ``x`` is not floating ``(B, T, D)`` with the table's features.
    Source: Gehring et al., arXiv:1705.03122; as in GPT-2.

    >>> layer = learned_positions(16)
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 16, 4), "float32"))
    >>> layer.forward(params, state, jnp.zeros((8, 9, 4)))[0].shape
    (8, 9, 4)
    """
    require_counts("learned_positions", length=length)
    require_initializers("learned_positions", weights=weights)

    def check(x, features):
        require_sequence(x)
        if x.shape[1] > length:
            raise LayerError(
                f"expected at most {length} positions, got {x.shape[1]}: shorten it or give a longer table"
            )
        if x.shape[2] != features:
            raise LayerError(f"expected {features} features, got {x.shape[2]}")

    def init(key, x):
        require_sequence(x)
        check(x, x.shape[2])
        return {"table": weights(stream(key, "table"), (length, x.shape[2]), x.dtype)}

    def forward(params, x):
        check(x, params["table"].shape[1])
        dtype = wide(x.dtype)  # as in `lookup`
        rows = params["table"][: x.shape[1]]
        if is_decoding():
            rows = jax.lax.dynamic_slice_in_dim(params["table"], begin(length), x.shape[1])
        return (x.astype(dtype) + rows[None].astype(dtype)).astype(x.dtype), ()

    def backward(params, residuals, dy):  # dtable_t = Σ_B dy_t, and 0 beyond T;  dx = dy
        table = params["table"]
        dtable = jnp.zeros(table.shape, wide(dy.dtype)).at[: dy.shape[1]].set(dy.astype(wide(dy.dtype)).sum(0))
        return {"table": dtable.astype(table.dtype)}, dy

    return by_position(stateless("learned_positions", init, forward, backward))


def sinusoidal_positions(base=10000.0) -> Layer:
    """``y_t = x_t + p_t``, ``x (B, T, D)``: ``p_{t,2i} = sin(t / base^(2i/D))``, ``p_{t,2i+1} = cos(t / base^(2i/D))``.

    No parameters, any length. Source: Vaswani et al., arXiv:1706.03762, 3.5.

    >>> y, _, _ = sinusoidal_positions().forward((), (), jnp.zeros((1, 2, 4)))
    >>> y[0].round(4).tolist()[0]
    [0.0, 1.0, 0.0, 1.0]
    """
    require(base > 0, f"sinusoidal_positions: base = {base}; expected a number above 0")

    def forward(params, x):
        require_sequence(x)
        _, length, features = x.shape
        dtype = wide(x.dtype)
        exponents = jnp.arange(0, features, 2, dtype=dtype) / -features
        steps = (jnp.arange(length, dtype=jnp.int32) + begin()).astype(dtype)
        angles = steps[:, None] * (jnp.asarray(base, dtype) ** exponents)[None]
        waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1)  # (T, ⌈D/2⌉, 2), read row by row
        encoding = waves.reshape(length, 2 * exponents.size)[:, :features]
        return (x.astype(dtype) + encoding[None]).astype(x.dtype), ()

    # y_t = x_t + p_t, and p does not depend on x:  dx = dy
    layer = stateless("sinusoidal_positions", lambda key, x: (), forward, lambda params, residuals, dy: ((), dy))
    return by_position(layer)


def rotary_positions(base=10000.0, *, interleaved: bool = False) -> Layer:
    """`rotate` by the positions 0 .. T − 1: ``x (B, T, H, D)`` to ``y`` alike; no parameters.

    ``base`` is a number or frequencies of one's own, as there.

    >>> rotary_positions().forward((), (), jnp.ones((1, 2, 1, 2)))[0].round(4)[0, :, 0].tolist()[0]
    [1.0, 1.0]
    """
    require_rotary("rotary_positions", base)

    def forward(params, x):
        return rotate(
            x, jnp.arange(x.shape[1] if x.ndim > 1 else 0, dtype=jnp.int32) + begin(), base, interleaved=interleaved
        ), ()

    def backward(params, residuals, dy):  # y_t = R(t) x_t with a rotation R(t):  dx_t = R(t)ᵀ dy_t = R(−t) dy_t
        return (), rotate(dy, -jnp.arange(dy.shape[1]), base, interleaved=interleaved)

    return by_position(stateless("rotary_positions", lambda key, x: (), forward, backward))


def rotate(x: jax.Array, positions: jax.Array, base: ArrayLike = 10000.0, *, interleaved: bool = False) -> jax.Array:
    """Rotary encoding: pair i of each head's features, turned by the angle ``position · base^(-2i/D)``.

    ``x (B, T, H, D)``, ``positions`` signed integers ``(T,)`` or ``(B, T)``, ``y`` like ``x``; D is even and pair i is
    ``(x_i, x_{i + D/2})``, or with ``interleaved`` the neighbours ``(x_2i, x_{2i+1})``. The inner product of two
    rotated vectors depends on the difference of their positions only. It is linear in ``x`` and orthogonal, so its
    inverse and its backward is ``rotate(dy, -positions)``. Angles are taken in float32 at least.

    In the place of the base may stand frequencies ``(R/2,)``, an array, for the angles ``position · frequencies_i``:
    those of `rotary_frequencies`, `llama3_frequencies`, `yarn_frequencies` or one's own. They are data: constants that
    may be traced, without a gradient. Where R is less than D, the first R features of each head are turned, as if they
    were all, and the others stay (GPT-NeoX' ``rotary_pct``, ``partial_rotary_factor`` of Hugging Face).

    Raises `LayerError` for an odd D with a base, more frequencies than pairs, and positions that do not fit.

    Source: Su et al., arXiv:2104.09864, whose pairs are neighbours, as in Meta's files of LLaMA; the halves are
    GPT-NeoX' and Hugging Face's form, the same up to a permutation of the features.

    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> rotate(x, jnp.array([1])).round(4).ravel().tolist()
    [0.5403000116348267, 0.8414999842643738]
    """
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating) or (jnp.ndim(base) == 0 and x.shape[-1] % 2):
        raise LayerError(
            "expected floating (batch, length, heads, features) with an even number of features, "
            f"got {x.dtype} {x.shape}"
        )
    if not jnp.issubdtype(positions.dtype, jnp.signedinteger):
        raise LayerError(f"expected positions that are signed integers, got {positions.dtype}")
    if positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise LayerError(f"expected positions of shape {x.shape[1:2]} or {x.shape[:2]}, got {positions.shape}")
    dtype = wide(x.dtype)
    frequencies = rotary_frequencies(x.shape[-1], base, dtype) if jnp.ndim(base) == 0 else jnp.asarray(base, dtype)
    half, features = frequencies.size, x.shape[-1]
    if 2 * half > features:
        raise LayerError(f"expected at most {features // 2} frequencies for heads of {features} features, got {half}")
    angles = positions.astype(dtype).reshape(*positions.shape[:-1] or (1,), x.shape[1], 1, 1)
    angles = angles * frequencies[None, None, None]
    return rotate_by(x, jnp.cos(angles), jnp.sin(angles), interleaved=interleaved)


def rotate_by(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """`rotate` by tables of one's own: pair ``(a, b)`` of each head becomes ``(a cos − b sin, b cos + a sin)``.

    ``x (B, T, H, D)``; ``cos`` and ``sin`` are ``(B or 1, T, 1 or H, R/2)``, R at most D, data without a gradient. It
    is linear in ``x``, and its backward is ``rotate_by(dy, cos, -sin)``. ONNX' RotaryEmbedding, whose caches they are.

    >>> x, quarter = jnp.array([1.0, 2.0]).reshape(1, 1, 1, 2), jnp.ones((1, 1, 1, 1))
    >>> rotate_by(x, 0 * quarter, quarter).ravel().tolist()
    [-2.0, 1.0]
    """
    half, features = cos.shape[-1], x.shape[-1]
    fits = (
        all(a in (1, b) for a, b in zip(cos.shape[:3], x.shape[:3], strict=True)) if cos.ndim == x.ndim == 4 else False
    )
    if not fits or cos.shape != sin.shape or 2 * half > features:
        raise LayerError(
            f"expected cos and sin (B or 1, T, 1 or H, up to {features // 2}) for {x.shape}, got {cos.shape} and "
            f"{sin.shape}"
        )
    dtype = wide(x.dtype)
    cos, sin = jax.lax.stop_gradient((cos.astype(dtype), sin.astype(dtype)))
    turned = x[..., : 2 * half].astype(dtype)
    pairs = turned.reshape(*x.shape[:3], *((half, 2) if interleaved else (2, half)))
    axis = -1 if interleaved else -2
    a, b = jnp.moveaxis(pairs, axis, 0)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis).reshape(turned.shape).astype(x.dtype)
    return turned if 2 * half == features else jnp.concatenate([turned, x[..., 2 * half :]], -1)


def rotary_frequencies(features: int, base: ArrayLike = 10000.0, dtype: DTypeLike = float) -> jax.Array:
    """``base^(-2i/R)`` for the pairs ``i`` of R ``features``, ``(R/2,)``: radians a position, for `rotate`.

    With R less than the features of a head, the others are not turned. Raises ValueError for an odd R.

    >>> print(rotary_frequencies(4, 16.0))
    [1.   0.25]
    """
    require_counts("rotary_frequencies", features=features)
    require(features % 2 == 0, f"rotary_frequencies: features = {features}; expected an even number, two a pair")
    half = features // 2
    return jnp.asarray(base, dtype) ** (jnp.arange(half, dtype=dtype) / -half)


def llama3_frequencies(
    features: int,
    base=500000.0,
    *,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_length=8192,
) -> jax.Array:
    """`rotary_frequencies` f for texts ``factor`` times longer than trained on, by Llama 3.1's formula, ``(R/2,)``.

    Pair i turns ``r = original_length · f_i / 2π`` times over the original length. With ``low <= r <= high``
    (``low_freq_factor``, ``high_freq_factor``) and ``g = (r − low) / (high − low)`` it is ``g f + (1 − g) f / factor``;
    faster ones stay, and slower ones are divided by the factor. The defaults are those of Llama 3.1 8B; Llama 3.2 has
    ``factor=32``. All numbers may be traced. Raises ValueError for ``high <= low`` and what is not above 0.

    Source: ``apply_scaling`` of Meta's llama-models, ``rope_type = "llama3"`` of Hugging Face; `yarn_frequencies` is
    the same formula with other numbers.

    >>> print(llama3_frequencies(4, 1e8), 1e-4 / 8)  # 0.13 turns of 8192
    [1.00e+00 1.25e-05] 1.25e-05
    """
    require_above_0("llama3_frequencies", base=base, factor=factor, original_length=original_length)
    low, high = low_freq_factor, high_freq_factor
    require(high > low, f"llama3_frequencies: high_freq_factor = {high}; expected above low_freq_factor = {low}")
    frequencies = rotary_frequencies(features, base)
    return stretched(frequencies, factor, turned_often(frequencies, original_length, low, high))


def yarn_frequencies(
    features: int, base=10000.0, *, factor, original_length, slow=1.0, fast=32.0, variant: str = "paper"
) -> jax.Array:
    """`rotary_frequencies` f for texts ``factor`` times longer than trained on, as YaRN stretches them, ``(R/2,)``.

    ``g f + (1 − g) f / factor`` ("NTK by parts"), where g is 0 for pairs that turn less than ``slow`` times over
    ``original_length``, 1 for those that turn more than ``fast`` times, and rises between, by ``variant``:

    - ``"paper"``: linearly in the number of turns ``r = original_length · f_i / 2π``
    - ``"code"``: linearly in the pair's number i, from the pair below that which turns ``fast`` times to the one above
      that which turns ``slow`` times; so in the authors' code and in Hugging Face, hence in what was trained by them

    ``slow`` and ``fast`` are the paper's α and β, 1 and 32 for LLaMA. The temperature of the scores, which belongs to
    it, is `yarn_scale`. All numbers may be traced. Raises ValueError for numbers that do not fit.

    Source: Peng et al., arXiv:2309.00071, 3.2.

    >>> print(yarn_frequencies(4, factor=4.0, original_length=512))  # 81 turns stay, and 0.8 are divided
    [1.     0.0025]
    """
    if variant not in ("paper", "code"):
        raise ValueError(f"yarn_frequencies: variant = {variant!r}; expected 'paper' or 'code'")
    require_above_0("yarn_frequencies", base=base, factor=factor, original_length=original_length, slow=slow)
    require(fast > slow, f"yarn_frequencies: fast = {fast}; expected above slow = {slow}")
    frequencies = rotary_frequencies(features, base)
    if variant == "paper":
        return stretched(frequencies, factor, turned_often(frequencies, original_length, slow, fast))

    def pair(turns):  # the i, not whole, with original_length · base^(-2i/R) / 2π = turns
        return features / 2 * jnp.log(original_length / (turns * 2 * jnp.pi)) / jnp.log(jnp.asarray(base, float))

    first = jnp.maximum(jnp.floor(pair(fast)), 0)
    last = jnp.minimum(jnp.ceil(pair(slow)), features - 1)
    i = jnp.arange(features // 2, dtype=frequencies.dtype)
    return stretched(
        frequencies, factor, 1 - jnp.clip((i - first) / jnp.where(last == first, 1e-3, last - first), 0, 1)
    )


def yarn_scale(features: int, factor) -> jax.Array:
    """``(0.1 ln factor + 1)² / √D``, the ``scale`` of `attention` that goes with `yarn_frequencies`; D is ``features``.

    The paper's ``1 / (t √D)`` with ``√(1/t) = 0.1 ln factor + 1``. Hugging Face multiplies cos and sin by ``√(1/t)``
    instead (``attention_factor``), the same where all features of a head are turned. 1/√D for a factor up to 1.

    >>> print((yarn_scale(64, 16.0) * 8).round(4))
    1.6314
    """
    require_counts("yarn_scale", features=features)
    require_above_0("yarn_scale", factor=factor)
    return (0.1 * jnp.log(jnp.maximum(jnp.asarray(factor, float), 1)) + 1) ** 2 / features**0.5


def turned_often(frequencies: jax.Array, length, low, high) -> jax.Array:
    """0 for pairs that turn ``low`` times or less over the length, 1 for ``high`` times or more, and linear between."""
    return jnp.clip((length * frequencies / (2 * jnp.pi) - low) / (high - low), 0, 1)


def stretched(frequencies: jax.Array, factor, kept: jax.Array) -> jax.Array:
    """``g f + (1 − g) f / factor``, where ``kept`` is g."""
    return kept * frequencies + (1 - kept) * frequencies / factor


def require_above_0(who: str, **numbers) -> None:
    """Raise ValueError for a number that is not above 0."""
    for name, number in numbers.items():
        require(number > 0, f"{who}: {name} = {number}; expected above 0")


def require_rotary(who: str, rotary) -> None:
    """Raise ValueError unless this is None, a base or an array of frequencies."""
    shape = getattr(rotary, "shape", () if isinstance(rotary, int | float) else None)
    if rotary is not None and (isinstance(rotary, bool) or shape is None or len(shape) > 1):
        given = f"an array of shape {shape}" if shape else f"{rotary!r:.60}"
        raise ValueError(
            f"{who}: rotary = {given}; expected the base, such as 10000.0, or frequencies (R/2,), such as "
            "fnet.layers.llama3_frequencies(64)"
        )
    if isinstance(rotary, int | float):
        require_above_0(who, rotary=rotary)


def require_sequence(x) -> None:
    """Raise `LayerError` unless ``x`` is floating ``(B, T, D)``."""
    if len(x.shape) != 3:
        raise LayerError(f"expected (batch, length, features), got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError(f"expected floating features, got {x.dtype}: embed the ids first")
