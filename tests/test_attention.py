"""Attention: plain and blockwise, forward and backward, masks, causality, grouped and rotary heads, memory, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.core.platforms import traced_for
from fnet.gradcheck import check_layer
from fnet.layers.activation import identity, softplus, softsign, tanh
from fnet.layers.attention import attention
from fnet.layers.children import apply, init, parameter_paths, watch
from fnet.layers.combinators import serial
from fnet.layers.decoding import apply_cached
from fnet.layers.dot_product import dot_product_attention, dot_product_attention_backward
from fnet.layers.dropout import dropout
from fnet.layers.embedding import rotate
from fnet.layers.initializers import normal
from fnet.layers.pooling import global_max_pool
from fnet.layers.rectifiers import prelu
from fnet.layers.relative import alibi, biased, relative_positions
from fnet.layers.wrappers import stateless
from fnet.types import LayerError
from tests.oracles import assert_leaves_close, numerical_gradient

# --- the formulas in NumPy -------------------------------------------------------------------------------------------


FUNCTIONS = {  # of scores, by the layer's name
    "softsign": lambda z: z / (1 + np.abs(z)),
    "softplus": lambda z: np.log1p(np.exp(z)),
}


def numpy_core(
    q,
    k,
    v,
    mask=None,
    causal=False,
    scale=None,
    bias=None,
    window=None,
    offset=0,
    softcap=None,
    score=None,
    kept=None,
    rate=0,
):
    """One query after another, one head after another."""
    (batch, queries, heads, size), (_, memory, kv_heads, _) = q.shape, k.shape
    o, s = np.zeros((*q.shape[:3], v.shape[3])), np.arange(memory)
    for b, t, h in np.ndindex(batch, queries, heads):
        at = offset + t
        counts = np.ones(memory, bool)
        if mask is not None:
            counts = mask[{2: (b,), 3: (b, t), 4: (b, h, t)}[mask.ndim]]
        counts = counts & (s <= at) if causal else counts
        counts = counts & (np.abs(s - at) < window) if window is not None else counts
        if counts.any():
            keys, values = k[b, counts, h // (heads // kv_heads)], v[b, counts, h // (heads // kv_heads)]
            z = keys @ q[b, t, h] * (size**-0.5 if scale is None else scale)
            z = z if softcap is None else softcap * np.tanh(z / softcap)
            z = z if score is None else FUNCTIONS[score.name](z)
            z = z if bias is None else z + (bias[h, t] if bias.ndim == 3 else bias[b % len(bias), h, t])[counts]
            e = np.exp(z - z.max())
            p = e / e.sum()
            o[b, t, h] = (p if kept is None else np.where(kept[b, t, h, counts], p / (1 - rate), 0)) @ values
    return o


def numpy_t5(p, queries, memory, buckets, furthest, bidirectional):
    """T5's bias by its code: one pair after another."""
    found = np.zeros((p["relative"]["table"].shape[1], queries, memory))
    for t, s in np.ndindex(queries, memory):
        far, first, own = s - t, 0, buckets
        if bidirectional:
            own = buckets // 2
            far, first = abs(far), own if far > 0 else 0
        else:
            far = max(-far, 0)
        half = own // 2
        if far >= half:
            far = min(half + int(np.log(far / half) / np.log(furthest / half) * (own - half)), own - 1)
        found[:, t, s] = p["relative"]["table"][first + far]
    return found


def numpy_alibi(slopes, queries, memory):
    return -np.asarray(slopes)[:, None, None] * np.abs(np.arange(queries)[:, None] - np.arange(memory))


def numpy_rotate(x, base, interleaved=False):
    """Pairs of features as complex numbers, turned by ``exp(i t base^(-2j/D))``, or by frequencies; others stay."""
    half = x.shape[-1] // 2
    frequencies = base ** (-np.arange(half) / half) if np.ndim(base) == 0 else np.asarray(base)
    turn = np.exp(1j * np.arange(x.shape[1])[:, None] * frequencies)[:, None]
    half, y = len(frequencies), x.copy()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    z = (x[..., first] + 1j * x[..., second]) * turn
    y[..., first], y[..., second] = z.real, z.imag
    return y


def numpy_attention(
    p,
    values,
    mask,
    heads,
    kv_heads=None,
    causal=False,
    rotary=None,
    scale=None,
    interleaved=False,
    relative=None,
    **rest,
):
    query, memory = values[0], values[-1]
    if len(values) == 1 and mask is not None and mask.ndim == 2:  # padding counts as 0
        query = memory = query * mask[:, :, None]

    def project(name, x, n):
        y = x @ p[name]["w"] + p[name].get("b", 0)
        return y.reshape(*x.shape[:2], n, y.shape[-1] // n)

    kv_heads = kv_heads or heads
    q, k, v = project("query", query, heads), project("key", memory, kv_heads), project("value", memory, kv_heads)
    if rotary is not None:
        q, k = numpy_rotate(q, rotary, interleaved), numpy_rotate(k, rotary, interleaved)
    bias = None if relative is None else relative(p, q.shape[1], k.shape[1])
    o = numpy_core(q, k, v, mask, causal, scale, bias, **rest)
    return o.reshape(*o.shape[:2], -1) @ p["out"]["w"] + p["out"].get("b", 0)


# --- every form of the layer against them ----------------------------------------------------------------------------

PADDING = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)  # (2, 5)
MEMORY_PADDING = np.array([[1, 0, 1], [1, 1, 0]], bool)  # (2, 3)
PAIRS = np.random.default_rng(2).random((2, 5, 5)) < 0.6
BY_HEADS = np.random.default_rng(3).random((2, 2, 5, 5)) < 0.6
PAIRS[0, 3] = False  # one query that may attend to nothing

# name: form of the inputs, mask, options
LAYERS = {
    "self": ("self", None, {"heads": 2}),
    "causal": ("self", None, {"heads": 2, "causal": True}),
    "padded": ("self", PADDING, {"heads": 2}),
    "pairs, causal": ("self", PAIRS, {"heads": 2, "causal": True}),
    "grouped, rotary, scaled": (
        "self",
        None,
        {"heads": 4, "kv_heads": 2, "rotary": 50.0, "scale": 0.3, "head_features": 2},
    ),
    "part of each head turned by neighbours": (
        "self",
        None,
        {"heads": 2, "rotary": np.array([1.0, 0.3]), "head_features": 5, "interleaved": True},
    ),
    "cross": ("cross", None, {"heads": 2, "features": 6, "bias": None}),
    "cross, padded, rotary": ("cross", MEMORY_PADDING, {"heads": 2, "head_features": 4, "rotary": 50.0}),
    "multi-query": ("cross", MEMORY_PADDING, {"heads": 4, "kv_heads": 1}),
    "windowed, capped, of wide values": (
        "self",
        None,
        {"heads": 2, "causal": True, "window": 3, "softcap": 1.5, "value_features": 3},
    ),
    "a mask for each head": ("self", BY_HEADS, {"heads": 2}),
    "offset": ("cross", None, {"heads": 2, "causal": True, "offset": 1, "head_features": 3, "value_features": 1}),
    "relative positions": ("self", None, {"heads": 2, "relative": relative_positions(2, buckets=8, max_distance=4)}),
    "relative positions, causal, blockwise": (
        "self",
        PADDING,
        {
            "heads": 4,
            "kv_heads": 2,
            "scale": 1.0,
            "causal": True,
            "block_size": 2,
            "relative": relative_positions(4, buckets=4, max_distance=3, bidirectional=False),
        },
    ),
    "alibi": ("cross", MEMORY_PADDING, {"heads": 6, "head_features": 2, "relative": alibi(6)}),
    "blockwise": ("self", None, {"heads": 4, "kv_heads": 2, "causal": True, "block_size": 2}),
    "blockwise, pairs": ("self", PAIRS, {"heads": 2, "block_size": 3}),
    "blockwise cross, padded": ("cross", MEMORY_PADDING, {"heads": 2, "block_size": 2}),
}
RELATIVE = {
    "relative positions": lambda p, t, s: numpy_t5(p, t, s, 8, 4, True),
    "relative positions, causal, blockwise": lambda p, t, s: numpy_t5(p, t, s, 4, 3, False),
    # those of four heads and, for the other two, the first and third of eight
    "alibi": lambda p, t, s: numpy_alibi([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], t, s),
}
OPTIONS = ("window", "offset", "softcap", "heads", "kv_heads", "causal", "rotary", "scale", "interleaved")
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(options):
    options = {"bias": normal(1.0), **options}
    return attention(options.pop("heads"), **options)


@functools.cache
def at_random(name, by=None):
    """The layer in float64 with random parameters and inputs; outputs and gradients, by hand and by autodiff."""
    form, mask, options = LAYERS[name]
    layer = make({**options, "form": by})
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x = rng.standard_normal((2, 5, 4))
        values = (x,) if form == "self" else (x, rng.standard_normal((2, 3, 6)))
        x = jax.tree.map(jnp.asarray, (*values, mask) if mask is not None else values if len(values) > 1 else x)
        params, state = jax.jit(lambda key: layer.init(key, x))(jax.random.key(7))

        @jax.jit
        def run(params, values, dy):
            def join(values):
                return (*values, x[-1]) if mask is not None else values if form == "cross" else values[0]

            masked = form == "self" and mask is not None  # (x, mask) gives (y, mask)
            y, _, residuals = layer.forward(params, state, join(values))
            y = y[0] if masked else y
            dy = jnp.broadcast_to(dy, y.shape)

            def outputs(p, values):
                y = apply(layer, p, state, join(values))
                return y[0] if masked else y

            by_autodiff = jax.vjp(outputs, params, values)[1](dy)
            return y, dy, layer.backward(params, residuals, (dy, None) if masked else dy), by_autodiff

        # a cotangent whose entries all differ, whatever O is
        dy = jnp.asarray(rng.standard_normal((2, 5, 1)))
        y, dy, by_hand, by_autodiff = run(params, tuple(map(jnp.asarray, values)), dy)
    oracle = functools.partial(
        numpy_attention,
        mask=mask,
        relative=RELATIVE.get(name),
        **{name: options[name] for name in OPTIONS if name in options},
    )
    params = jax.tree.map(np.asarray, params)
    return oracle, params, values, np.asarray(y), np.asarray(dy), by_hand, by_autodiff


@every_layer
def test_forward_equals_the_formula_in_numpy(name):
    oracle, params, values, y, *_ = at_random(name)
    np.testing.assert_allclose(y, oracle(params, values), rtol=1e-12, atol=1e-13)


@every_layer
def test_backward_equals_finite_differences_of_the_numpy_formula(name):
    oracle, params, values, _, dy, (dparams, dx), _ = at_random(name)
    leaves, tree = jax.tree.flatten((params, values))

    def total(index, leaf):
        return (oracle(*jax.tree.unflatten(tree, [*leaves[:index], leaf, *leaves[index + 1 :]])) * dy).sum()

    for i, claimed in enumerate(jax.tree.leaves((dparams, dx))):
        expected = numerical_gradient(functools.partial(total, i), leaves[i])
        np.testing.assert_allclose(claimed, expected, rtol=1e-7, atol=1e-7)


@every_layer
def test_backward_equals_autodiff_in_float64(name):
    *_, by_hand, by_autodiff = at_random(name)
    for hand, auto in zip(jax.tree.leaves(by_hand), jax.tree.leaves(by_autodiff), strict=True):
        np.testing.assert_allclose(hand, auto, rtol=1e-11, atol=1e-13)  # entries are of order 1; the keys' bias has 0


@pytest.mark.parametrize("name", ["pairs, causal", "grouped, rotary, scaled", "blockwise"])
def test_the_audit_finds_every_gradient_right_in_both_modes(name, key):
    _, mask, options = LAYERS[name]
    x = jax.random.normal(key, (1, 3, 4))
    x = x if mask is None else (x, jnp.asarray(mask[1:, :3, :3]))
    report = check_layer(make(options), x, key=key, precisions=(), cost=False)
    assert report.ok, report


def test_the_full_audit_in_float32_finds_every_gradient_right(key):
    report = check_layer(
        attention(2, causal=True), jax.random.normal(key, (1, 3, 4)), key=key, precisions=("float32",), cost=False
    )
    assert report.ok, report


forms = pytest.mark.parametrize("block_size", [None, 2], ids=["plain", "blockwise"])

# --- blockwise is plain ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("causal", "window", "score", "scale", "block_size", "form"))
def core(q, k, v, do, mask=None, bias=None, **options):
    o, residuals = dot_product_attention(q, k, v, mask, bias, **options)
    return o, *dot_product_attention_backward(residuals, do, mask, bias, **options)


def drawn_core(queries, memory, heads=4, kv_heads=2, bias=None, mask=None):
    """``q, k, v, do``, values wider than keys, and a mask and a bias of these shapes (or with −∞), in float64."""
    rng = np.random.default_rng(6)
    q, k = rng.standard_normal((2, queries, heads, 3)), rng.standard_normal((2, memory, kv_heads, 3))
    v, do = rng.standard_normal((2, memory, kv_heads, 5)), rng.standard_normal((2, queries, heads, 5))
    bias = None if bias is None else rng.standard_normal(bias)
    return q, k, v, do, None if mask is None else rng.random(mask) < 0.6, bias


SCORES = {  # queries, memory, shapes of bias and mask, options
    "bias for all": (5, 5, (4, 5, 5), None, {}),
    "bias of one": (3, 7, (1, 4, 3, 7), (2, 7), {}),
    "bias of each, capped": (4, 6, (2, 4, 4, 6), None, {"softcap": 0.7, "scale": 1.0}),
    "masks by heads, causal": (7, 7, None, (2, 4, 7, 7), {"causal": True}),
    "window": (9, 9, None, None, {"window": 3}),
    "window, causal, offset, bias": (4, 9, (4, 4, 9), None, {"window": 4, "causal": True, "offset": 4}),
    "score": (5, 6, None, None, {"score": softplus(), "scale": 1.5}),
    "score, all else": (
        6,
        7,
        (4, 6, 7),
        (2, 4, 6, 7),
        {"window": 5, "causal": True, "offset": 1, "score": softsign(), "scale": 0.4},
    ),
    "offset before the memory": (5, 4, None, None, {"causal": True, "offset": -2}),
    "all": (
        6,
        7,
        (4, 6, 7),
        (2, 4, 6, 7),
        {"window": 5, "causal": True, "offset": 1, "softcap": 2.0, "scale": 0.4},
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_biases_masks_windows_caps_and_offsets_are_the_formula_forward_and_backward(name, x64):
    queries, memory, bias, mask, options = SCORES[name]
    q, k, v, do, mask, bias = drawn_core(queries, memory, bias=bias, mask=mask)
    given = [q, k, v, *([] if bias is None else [bias])]
    arrays = [jnp.asarray(a) for a in (q, k, v, do)]
    arrays += [None if a is None else jnp.asarray(a) for a in (mask, bias)]

    def formula(*given):
        return numpy_core(*given[:3], mask=mask, bias=given[3] if given[3:] else None, **options)

    @functools.partial(jax.jit, static_argnums=0)
    def by_autodiff(block_size, *given):
        def run(q, k, v, bias=None):
            return dot_product_attention(q, k, v, arrays[4], bias, block_size=block_size, **options)[0]

        return jax.vjp(run, *given)[1](arrays[3])

    o, *plain = core(*arrays, **options)
    np.testing.assert_allclose(o, formula(*given), rtol=1e-12, atol=1e-13)
    assert (plain[3] is None) == (bias is None)
    for i, claimed in enumerate(jax.tree.leaves(plain)):
        slope = numerical_gradient(lambda a, i=i: (formula(*given[:i], a, *given[i + 1 :]) * do).sum(), given[i])
        np.testing.assert_allclose(claimed, slope, rtol=1e-7, atol=1e-8)
    for size in (2, 4) if name == "all" else (2,):  # they do not divide all lengths
        assert_leaves_close(core(*arrays, **options, block_size=size), (o, *plain), 1e-13)
    for size in (None, 2) if "all" in name else (None,):
        claimed = tuple(jax.tree.leaves(plain))
        assert_leaves_close(by_autodiff(size, *map(jnp.asarray, given)), claimed, 1e-12)


def test_a_softcap_is_the_score_function_of_its_formula_and_its_backward_is_the_layers(x64):
    capped = stateless(
        "capped",
        lambda key, z: (),
        lambda params, z: (2 * jnp.tanh(z / 2), z),
        lambda params, z, dy: ((), dy / jnp.cosh(z / 2) ** 2),
    )
    q, k, v, do, *_ = map(lambda a: a if a is None else jnp.asarray(a), drawn_core(5, 6))
    for block_size in (None, 2):
        expected = core(q, k, v, do, softcap=2.0, block_size=block_size)
        for score in (capped, serial(identity(), capped)):
            assert_leaves_close(core(q, k, v, do, score=score, block_size=block_size), expected, 1e-13)
        flat = capped._replace(backward=lambda params, z, dy: ((), 0 * dy))  # so says its backward, which is called
        o, dq, dk, dv, _ = core(q, k, v, do, score=flat, block_size=block_size)
        assert_leaves_close((o, dv), (expected[0], expected[3]), 1e-13)
        assert not dq.any() and not dk.any()


@forms
def test_a_bias_of_minus_infinity_is_a_mask(block_size, x64):
    q, k, v, do, mask, _ = map(lambda a: a if a is None else jnp.asarray(a), drawn_core(5, 6, mask=(2, 4, 5, 6)))
    mask = mask.at[0, 1, 2].set(False)  # nothing for one query
    o, dq, dk, dv, _ = core(q, k, v, do, mask, block_size=block_size)
    *same, dbias = core(q, k, v, do, None, jnp.where(mask, 0.0, -jnp.inf), block_size=block_size)
    assert_leaves_close(tuple(same), (o, dq, dk, dv), 1e-13)
    assert not np.asarray(dbias)[~np.asarray(mask)].any() and np.isfinite(dbias).all()


def test_dropout_draws_once_for_every_form_and_its_gradients_are_the_formulas(key, x64):
    rate, options = 0.4, {"causal": True, "dropout_rate": 0.4, "key": key}
    q, k, v, do, _, bias = drawn_core(6, 6, bias=(4, 6, 6))
    # values that are the rows of 1 show the probabilities: which of them are 0 is all that the formula takes
    unit = jnp.broadcast_to(jnp.eye(6)[None, :, None], (2, 6, 2, 6))
    shown = core(jnp.asarray(q), jnp.asarray(k), unit, jnp.zeros((2, 6, 4, 6)), None, jnp.asarray(bias), **options)[0]
    kept = np.asarray(shown) > 0
    seen = np.tril(np.ones((6, 6), bool))
    # of 8 · 21 that count 0.6 ± 0.04 stay, and no example or head has the draws of another
    assert abs(kept.sum() / (8 * seen.sum()) - 0.6) < 0.15
    assert len({kept[b, :, h].tobytes() for b, h in np.ndindex(2, 4)}) == 8
    given = (q, k, v, bias)

    def formula(*given):
        *qkv, bias = given
        return numpy_core(*qkv, causal=True, bias=bias, kept=kept, rate=rate)

    arrays = [*map(jnp.asarray, (q, k, v, do)), None, jnp.asarray(bias)]
    o, *plain = core(*arrays, **options)
    np.testing.assert_allclose(o, formula(*given), rtol=1e-12, atol=1e-13)
    for i, claimed in enumerate(plain):
        slope = numerical_gradient(lambda a, i=i: (formula(*given[:i], a, *given[i + 1 :]) * do).sum(), given[i])
        np.testing.assert_allclose(claimed, slope, rtol=1e-7, atol=1e-8)
    for size in (1, 4):
        assert_leaves_close(core(*arrays, **options, block_size=size), (o, *plain), 1e-13)
    other = core(*arrays, **{**options, "key": jax.random.key(9)})[0]
    assert not np.allclose(other, o)


@forms
def test_dropout_has_the_mean_of_none_and_acts_in_training_alone(block_size, key):
    layer = attention(2, dropout_rate=0.5, block_size=block_size)
    x = jax.random.normal(key, (1, 4, 4))
    params = drawn(layer, x)
    run = lambda key: layer.forward(params, (), x, key=key, train=True)[0]  # noqa: E731
    y = jax.jit(jax.vmap(run))(jax.random.split(key, 4000))
    exact = apply(attention(2), params, (), x)
    np.testing.assert_array_equal(
        apply(layer, params, (), x), apply(attention(2, block_size=block_size), params, (), x)
    )
    assert (np.abs(y.mean(0) - exact) < 5 * y.std(0) / 4000**0.5 + 1e-6).all() and (y.std(0) > 0).all()
    with pytest.raises(LayerError, match="expected a key in training, got None"):
        layer.forward(params, (), x, train=True)


def test_who_watches_sees_the_probabilities_of_every_head_whatever_changes_them(key):
    layer, seen = attention(2, window=2, softcap=1.0, relative=alibi(2)), {}
    x = jax.random.normal(key, (1, 4, 4))
    with watch(lambda call, y: y, inner=lambda path, value, _: seen.setdefault("/".join(path), value)):
        layer.forward(drawn(layer, x), (), x)
    assert list(seen) == ["attention"] and seen["attention"].shape == (1, 2, 4, 4)
    near = np.abs(np.arange(4)[:, None] - np.arange(4)) < 2
    np.testing.assert_array_equal(seen["attention"][0, 0] > 0, near)


@pytest.mark.parametrize("form", ["self", "self, padded", "cross", "cross, padded"])
def test_a_bias_after_the_inputs_is_the_formulas_and_has_its_gradient(form, x64):
    rng = np.random.default_rng(8)
    values = tuple(rng.standard_normal((2, n, 4)) for n in ((5,) if "self" in form else (5, 3)))
    mask = None if "padded" not in form else PADDING if "self" in form else MEMORY_PADDING
    bias = rng.standard_normal((1 if "self" in form else 2, 2, 5, values[-1].shape[1]))
    layer = attention(2, bias=None, scale=1.0, block_size=2 if "padded" in form else None)
    params = layer.init(jax.random.key(7), (*map(jnp.asarray, (*values, bias)),))[0]
    dy = rng.standard_normal((2, 5, 4))

    def joined(values, bias):
        return (*values, *([] if mask is None else [jnp.asarray(mask)]), bias)

    @jax.jit
    def run(params, values, bias):
        y, _, residuals = layer.forward(params, (), joined(values, bias))
        d = (jnp.asarray(dy), None) if isinstance(y, tuple) else jnp.asarray(dy)
        by_hand = layer.backward(params, residuals, d)
        outputs = lambda *a: jax.tree.leaves(layer.forward(a[0], (), joined(*a[1:]))[0])[0]  # noqa: E731
        return jax.tree.leaves(y)[0], by_hand, jax.vjp(outputs, params, values, bias)[1](jnp.asarray(dy))

    y, (dparams, dx), by_autodiff = run(params, tuple(map(jnp.asarray, values)), jnp.asarray(bias))
    assert len(dx) == len(joined(values, bias))
    p = jax.tree.map(np.asarray, params)

    def formula(bias):
        def of_pairs(p, queries, memory):
            return np.broadcast_to(bias, (2, *bias.shape[1:]))

        return numpy_attention(p, values, mask, 2, scale=1.0, relative=of_pairs)

    np.testing.assert_allclose(y, formula(bias), rtol=1e-12, atol=1e-13)
    slope = numerical_gradient(lambda b: (formula(b) * dy).sum(), bias)
    np.testing.assert_allclose(dx[-1], slope, rtol=1e-7, atol=1e-8)
    assert_leaves_close((dparams, tuple(d for d in dx[:-1] if d is not None), dx[-1]), by_autodiff, 1e-12)


def test_attention_biased_is_attention_with_a_relative_of_its_own(key, x64):
    x, dy = jax.random.normal(key, (2, 2, 5, 4))
    relative = relative_positions(2, buckets=8, max_distance=4)
    own, apart = attention(2, relative=relative), biased(relative, attention(2))
    params = drawn(own, x)
    y, dparams, dx = compiled(own, params, x, dy)
    body = {name: p for name, p in params.items() if name != "relative"}
    given = {"relative": params["relative"], "body": body}

    @jax.jit
    def run(params, x, dy):
        y, _, residuals = apart.forward(params, {"relative": (), "body": ()}, x)
        return y, *apart.backward(params, residuals, dy)

    z, dgiven, dz = run(given, x, dy)
    assert_leaves_close((z, {**dgiven["body"], "relative": dgiven["relative"]}, dz), (y, dparams, dx), 1e-13)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_buckets_of_distances_are_t5s(buckets, furthest, bidirectional, x64):
    layer = relative_positions(1, buckets=buckets, max_distance=furthest, bidirectional=bidirectional)
    table = np.arange(buckets, dtype=np.float64)[:, None]
    n = 2 * furthest
    at = jnp.arange(n)[None], jnp.arange(n)[None]
    y = layer.forward({"table": jnp.asarray(table)}, (), at)[0][0]
    expected = numpy_t5({"relative": {"table": table}}, n, n, buckets, furthest, bidirectional)
    np.testing.assert_array_equal(y, expected)
    assert set(np.unique(expected)) >= {0, buckets - 1}


def test_an_offset_may_be_traced_and_moves_all_that_goes_by_positions(key, x64):
    # the last two queries of seven, alone
    rest = {"causal": True, "window": 5, "rotary": 50.0, "relative": relative_positions(2)}
    x = jax.random.normal(key, (2, 7, 4))
    params = drawn(attention(2, **rest), x)
    whole = apply(attention(2, **rest), params, (), x)
    run = jax.jit(lambda n: apply(attention(2, **rest, offset=n), params, (), (x[:, 5:], x)))
    np.testing.assert_allclose(run(5), whole[:, 5:], rtol=1e-12, atol=1e-13)
    assert not np.allclose(run(4), whole[:, 5:])


@pytest.mark.parametrize(
    ("queries", "memory", "block", "causal", "mask"),
    [
        (7, 7, 3, True, "padding"),
        (5, 9, 4, False, None),
        (6, 3, 2, True, "pairs"),
        (4, 6, 1, False, "pairs"),
        (1, 7, 3, False, "pairs"),
    ],
)
def test_blockwise_equals_plain_forward_and_backward(queries, memory, block, causal, mask, x64):
    rng = np.random.default_rng(3)
    q, do = jnp.asarray(rng.standard_normal((2, 2, queries, 4, 3)))
    k, v = jnp.asarray(rng.standard_normal((2, 2, memory, 2, 3)))
    shape = {None: None, "padding": (2, memory), "pairs": (2, queries, memory)}[mask]
    mask = None if shape is None else jnp.asarray(rng.random(shape) < 0.5)

    options = {"mask": mask, "causal": causal}
    plain, blockwise = (core(q, k, v, do, **options, block_size=size) for size in (None, block))
    assert_leaves_close(blockwise, plain, 1e-14)
    expected = numpy_core(
        np.asarray(q), np.asarray(k), np.asarray(v), None if mask is None else np.asarray(mask), causal
    )
    np.testing.assert_allclose(plain[0], expected, rtol=1e-12, atol=1e-14)


def temporary_bytes(length, block_size):
    layer = attention(4, causal=True, block_size=block_size)
    x = jax.ShapeDtypeStruct((1, length, 64), jnp.float32)
    params, state = jax.eval_shape(lambda key: layer.init(key, x), jax.random.key(0))

    def run(params, x, dy):
        y, _, residuals = layer.forward(params, state, x)
        return y, layer.backward(params, residuals, dy)

    return jax.jit(run).lower(params, x, x).compile().memory_analysis().temp_size_in_bytes


def test_blockwise_memory_doubles_with_the_length_where_the_plain_forms_quadruples():
    short, long = (temporary_bytes(length, 64) for length in (1024, 2048))
    assert 1.8 < long / short < 2.1
    plain_short, plain_long = (temporary_bytes(length, None) for length in (512, 1024))
    assert 3.8 < plain_long / plain_short < 4.2
    assert long < plain_long / 5  # at twice the length


def test_blockwise_residuals_are_linear_in_the_length_and_plain_ones_are_the_probabilities():
    def kept(length, block_size):
        q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        return sum(
            leaf.size
            for leaf in jax.tree.leaves(
                jax.eval_shape(lambda q: dot_product_attention(q, q, q, block_size=block_size)[1], q)
            )
        )

    assert kept(256, 32) == 2 * kept(128, 32) == 256 * 2 * (4 * 8 + 1)
    assert kept(256, None) == 256 * 2 * 3 * 8 + 2 * 256**2


# --- what must not matter does not -----------------------------------------------------------------------------------


def drawn(layer, x):
    return init(layer, jax.random.key(0), x)[0]


def forward_and_backward(layer, params, x, dy):
    y, _, residuals = layer.forward(params, (), x)
    return y, *layer.backward(params, residuals, dy)


@functools.partial(jax.jit, static_argnames="layer")
def compiled(layer, params, x, dy):
    return forward_and_backward(layer, params, x, dy)


@forms
def test_gradients_do_not_reach_the_future(block_size, key):
    layer = attention(2, causal=True, block_size=block_size, rotary=100.0)
    x = jax.random.normal(key, (1, 5, 4))
    params = drawn(layer, x)
    one_position = jnp.eye(5)[:, None, :, None] * jnp.ones((1, 1, 1, 4))  # (5, 1, T, O): dy at one position each
    dx = jax.jit(jax.vmap(lambda dy: forward_and_backward(layer, params, x, dy)[2]))(one_position)
    reached = np.abs(dx).max((1, 3)) > 0  # (position of dy, position of x)
    np.testing.assert_array_equal(reached, np.tril(np.ones((5, 5), bool)))


@forms
@pytest.mark.parametrize("garbage", [1e30, np.nan])
def test_masked_positions_have_no_effect_and_a_gradient_of_zero_whatever_they_hold(block_size, garbage, key):
    layer = attention(2, block_size=block_size)
    query, memory = jax.random.normal(key, (2, 2, 5, 4))
    params = drawn(layer, (query, memory))
    run = functools.partial(compiled, layer, params)
    for mask in (jnp.asarray(PADDING), jnp.asarray(PADDING[:, None] & PAIRS)):
        spoiled = jnp.where(PADDING[:, :, None], memory, garbage)
        dy = jax.random.normal(key, query.shape)
        y, dparams, (dquery, dmemory, dmask) = run((query, memory, mask), dy)
        spoilt = run((query, spoiled, mask), dy)
        jax.tree.map(np.testing.assert_array_equal, spoilt, (y, dparams, (dquery, dmemory, dmask)))
        assert dmask is None and not dmemory[~PADDING].any() and dmemory[PADDING].all()
    # self-attention with padding: neither as memory nor as a query
    _, dparams, (dx, _) = run((jnp.where(PADDING[:, :, None], memory, garbage), jnp.asarray(PADDING)), dy)
    assert not dx[~PADDING].any() and dx[PADDING].all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dparams))


@forms
def test_a_query_that_may_attend_to_nothing_gives_zero_and_no_gradient(block_size, key):
    layer = attention(2, block_size=block_size, bias=normal(1.0))
    x = jax.random.normal(key, (1, 3, 4))
    params = drawn(layer, x)
    mask = jnp.ones((1, 3, 3), bool).at[0, 1].set(False)
    dy = jnp.zeros_like(x).at[0, 1].set(1.0)
    y, dparams, (dquery, dmemory, _) = compiled(layer, params, (x, x, mask), dy)
    np.testing.assert_array_equal(y[0, 1], params["out"]["b"])
    by_autodiff = jax.jit(lambda p, x, dy: jax.vjp(lambda p, x: apply(layer, p, (), (x, x, mask)), p, x)[1](dy))(
        params, x, dy
    )
    for tree in ((dparams, dquery, dmemory), by_autodiff):
        leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        assert [name for name, leaf in leaves.items() if np.asarray(leaf).any()] == ["[0]['out']['b']"]
    for row in compiled(layer, params, (x, x, mask & False), dy)[0][0]:
        np.testing.assert_array_equal(row, params["out"]["b"])


@pytest.mark.parametrize("causal", [False, True])
def test_without_positions_attention_is_equivariant_to_permutations_unless_causal(causal, key, x64):
    layer = attention(2, causal=causal)
    x, dy = jax.random.normal(key, (2, 2, 5, 4))
    params = drawn(layer, x)
    order = np.array([3, 0, 4, 1, 2])
    run = functools.partial(compiled, layer, params)
    y, dparams, dx = run(x, dy)
    permuted = run(x[:, order], dy[:, order])
    same = [
        np.allclose(a, b, rtol=1e-12, atol=1e-13)
        for a, b in zip(jax.tree.leaves(permuted), jax.tree.leaves((y[:, order], dparams, dx[:, order])), strict=True)
    ]
    assert all(same) != causal


def test_rotary_scores_depend_on_the_distance_of_positions_alone(key, x64):
    q, k = jax.random.normal(key, (2, 1, 4, 2, 6))
    at = jnp.arange(4, dtype=jnp.int32)
    scores = [jnp.einsum("bthd,bshd->bhts", rotate(q, at + n, 50.0), rotate(k, at + n, 50.0)) for n in (0, 9)]
    np.testing.assert_allclose(*scores, rtol=1e-12, atol=1e-13)
    # so in the layer: three positions of padding in front change nothing
    layer = attention(2, rotary=50.0)
    x = jax.random.normal(key, (1, 4, 8))
    params = drawn(layer, x)
    padded = jnp.pad(x, ((0, 0), (3, 0), (0, 0)), constant_values=5.0)
    y, _ = apply(layer, params, (), (padded, jnp.arange(7)[None] >= 3))
    np.testing.assert_allclose(y[:, 3:], apply(layer, params, (), x), rtol=1e-12, atol=1e-13)
    assert not np.allclose(apply(layer, params, (), x), apply(attention(2), params, (), x))


@forms
def test_grouped_queries_are_heads_whose_keys_and_values_are_repeated(block_size, key, x64):
    grouped = attention(4, kv_heads=2, causal=True, block_size=block_size)
    full = attention(4, causal=True, block_size=block_size)
    x, dy = jax.random.normal(key, (2, 2, 5, 8))
    params = drawn(grouped, x)

    def repeated(leaf):  # (..., K D) -> (..., H D)
        return jnp.repeat(leaf.reshape(*leaf.shape[:-1], 2, 2), 2, -2).reshape(*leaf.shape[:-1], 8)

    def summed(leaf):
        return leaf.reshape(*leaf.shape[:-1], 2, 2, 2).sum(-2).reshape(*leaf.shape[:-1], 4)

    many = {name: jax.tree.map(repeated, leaf) if name in ("key", "value") else leaf for name, leaf in params.items()}
    y, dparams, dx = compiled(full, many, x, dy)
    dparams = {name: jax.tree.map(summed, d) if name in ("key", "value") else d for name, d in dparams.items()}
    of_grouped = compiled(grouped, params, x, dy)
    for a, b in zip(jax.tree.leaves(of_grouped), jax.tree.leaves((y, dparams, dx)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_self_attention_is_cross_attention_of_an_array_with_itself(key):
    layer = attention(2)
    x, dy = jax.random.normal(key, (2, 2, 5, 4))
    params = drawn(layer, x)
    y, dparams, dx = compiled(layer, params, x, dy)
    y_cross, dparams_cross, (dquery, dmemory) = compiled(layer, params, (x, x), dy)
    jax.tree.map(np.testing.assert_array_equal, (y, dparams, dx), (y_cross, dparams_cross, dquery + dmemory))
    y_none, _, (*dx_none, nothing) = compiled(layer, params, (x, x, None), dy)
    np.testing.assert_array_equal(y_none, y)
    assert nothing is None and len(dx_none) == 2


# --- precisions, transformations -------------------------------------------------------------------------------------


@forms
def test_scores_of_ten_thousand_neither_overflow_nor_lose_the_largest(block_size):
    q = jnp.asarray([[[[100.0, 0.0]]] * 3])  # (1, 3, 1, 2)
    k = jnp.asarray([[[[100.0, 0.0]], [[99.0, 0.0]], [[-100.0, 0.0]]]])
    v = jnp.asarray([[[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]]])
    o, *grads = core(q, k, v, jnp.ones_like(q), scale=1.0, block_size=block_size)
    np.testing.assert_array_equal(o, np.broadcast_to(v[:, :1], o.shape))  # exp(-100) is 0 beside 1 in float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@forms
def test_bfloat16_keeps_its_dtypes_and_differs_from_float64_by_its_rounding(block_size, key):
    layer = attention(4, kv_heads=2, causal=True, block_size=block_size, rotary=100.0)
    x, dy = jax.random.normal(key, (2, 2, 5, 16), jnp.bfloat16)
    params = drawn(layer, x)
    low = functools.partial(compiled, layer)(params, x, dy)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, low))} == {jnp.dtype(jnp.bfloat16)}
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, x, dy))
        high = functools.partial(compiled, layer)(*exact)
    assert_leaves_close(low, high, 8 * 2.0**-8)  # some eight roundings of 2^-9 on the way, with what they are added to


@forms
def test_vmap_and_scan_over_inputs_give_what_a_loop_gives_also_for_a_batch_of_one(block_size, key):
    layer = attention(2, causal=True, block_size=block_size)
    x, dy = jax.random.normal(key, (2, 3, 1, 5, 4))
    mask = jax.random.uniform(key, (3, 1, 5)) < 0.7
    params = drawn(layer, x[0])

    def run(x, mask, dy):
        return forward_and_backward(layer, params, (x, mask), dy)

    once = jax.jit(run)
    loop = [once(x[i], mask[i], dy[i]) for i in range(3)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    for found in (
        jax.jit(jax.vmap(run))(x, mask, dy),
        jax.lax.scan(lambda carry, args: (carry, run(*args)), 0, (x, mask, dy))[1],
    ):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_scale_and_rotary_base_may_be_traced(key):
    x = jax.random.normal(key, (1, 3, 4))
    params = drawn(attention(2), x)
    y = jax.jit(lambda scale, base: apply(attention(2, scale=scale, rotary=base), params, (), x))(0.5, 100.0)
    np.testing.assert_allclose(y, apply(attention(2, scale=0.5, rotary=100.0), params, (), x), rtol=1e-5, atol=1e-6)


# --- against PyTorch -------------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_gradients_are_those_of_torchs_multihead_attention(block_size, causal, x64):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(theirs.in_proj_bias)
    w, b = theirs.in_proj_weight.detach().numpy(), theirs.in_proj_bias.detach().numpy()
    names = ("query", "key", "value")
    params = {name: {"w": w[8 * i : 8 * i + 8].T, "b": b[8 * i : 8 * i + 8]} for i, name in enumerate(names)}
    params["out"] = {"w": theirs.out_proj.weight.detach().numpy().T, "b": theirs.out_proj.bias.detach().numpy()}
    query, memory, dy = rng.standard_normal((3, 2, 5, 8))
    tensors = [torch.tensor(a, requires_grad=True) for a in (query, memory)]
    future = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1) if causal else None
    # the first position of the memory stays, since a query that may attend to nothing gives NaN there
    mask = PADDING | (np.arange(5) == 0)
    y, _ = theirs(tensors[0], tensors[1], tensors[1], key_padding_mask=torch.tensor(~mask), attn_mask=future)
    y.backward(torch.tensor(dy))

    layer = attention(2, causal=causal, block_size=block_size)
    x = jnp.asarray(query), jnp.asarray(memory), jnp.asarray(mask)
    run = functools.partial(compiled, layer)
    ours, dparams, (dquery, dmemory, _) = run(jax.tree.map(jnp.asarray, params), x, jnp.asarray(dy))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    close(ours, y.detach().numpy())
    for a, tensor in zip((dquery, dmemory), tensors, strict=True):
        close(a, tensor.grad.numpy())
    close(np.concatenate([dparams[name]["w"].T for name in names]), theirs.in_proj_weight.grad.numpy())
    close(np.concatenate([dparams[name]["b"] for name in names]), theirs.in_proj_bias.grad.numpy())
    close(dparams["out"]["w"].T, theirs.out_proj.weight.grad.numpy())
    close(dparams["out"]["b"], theirs.out_proj.bias.grad.numpy())


@forms
def test_grouped_attention_itself_is_torchs_scaled_dot_product_attention(block_size, x64):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    q, do = rng.standard_normal((2, 2, 5, 4, 3))
    k, v = rng.standard_normal((2, 2, 5, 2, 3))
    tensors = [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
    o = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in tensors), is_causal=True, scale=0.7, enable_gqa=True
    ).transpose(1, 2)
    o.backward(torch.tensor(do))
    options = {"causal": True, "scale": 0.7, "block_size": block_size}
    ours, *grads = core(*map(jnp.asarray, (q, k, v, do)), **options)
    np.testing.assert_allclose(ours, o.detach().numpy(), rtol=1e-11, atol=1e-13)
    for a, tensor in zip(grads[:3], tensors, strict=True):
        np.testing.assert_allclose(a, tensor.grad.numpy(), rtol=1e-11, atol=1e-13)


@forms
@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 4, 5, 6)])
def test_a_bias_and_its_gradient_are_those_of_torchs_attention_mask(block_size, shape, x64):
    torch = pytest.importorskip("torch")
    q, k, v, do, _, bias = drawn_core(5, 6, bias=shape)
    tensors = [torch.tensor(a, requires_grad=True) for a in (q, k, v, bias)]
    heads_first = [t.transpose(1, 2) for t in tensors[:3]]
    o = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=tensors[3], enable_gqa=True)
    o.transpose(1, 2).backward(torch.tensor(do))
    arrays = [*map(jnp.asarray, (q, k, v, do)), None, jnp.asarray(bias)]
    ours, *grads = core(*arrays, block_size=block_size)
    np.testing.assert_allclose(ours, o.transpose(1, 2).detach().numpy(), rtol=1e-11, atol=1e-13)
    for a, tensor in zip(grads, tensors, strict=True):
        np.testing.assert_allclose(a, tensor.grad.numpy(), rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@forms
def test_a_score_function_is_that_of_torchs_flex_attention(block_size, x64):
    torch = pytest.importorskip("torch")
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    q, k, v, do, *_ = drawn_core(5, 6)
    tensors = [torch.tensor(a).transpose(1, 2) for a in (q, k, v)]
    options = {"score_mod": lambda s, b, h, t, at: s / (1 + s.abs()), "scale": 0.7, "enable_gqa": True}
    expected = flex_attention(*tensors, **options).transpose(1, 2)  # on a CPU it has no backward
    ours = core(*map(jnp.asarray, (q, k, v, do)), score=softsign(), scale=0.7, block_size=block_size)[0]
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-11, atol=1e-13)


# --- parameters and errors -------------------------------------------------------------------------------------------


def test_parameters_have_readable_paths_their_own_keys_and_the_dtype_of_the_inputs():
    x = jax.ShapeDtypeStruct((1, 3, 8), jnp.bfloat16)
    names = ("query", "key", "value", "out")
    assert parameter_paths(attention(2), x) == [f"{name}/{leaf}" for name in names for leaf in ("w", "b")]
    assert parameter_paths(attention(2, bias=None), x) == [f"{name}/w" for name in names]
    params, state = attention(2).init(jax.random.key(0), x)
    assert state == () and all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    drawn = [np.asarray(params[name]["w"], np.float32) for name in names]
    assert len({w.tobytes() for w in drawn}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads = 0; expected at least 1"),
        ({"heads": 2, "block_size": 0}, "block_size = 0; expected at least 1"),
        ({"heads": 4, "kv_heads": 3}, "4 heads cannot share kv_heads = 3; it must divide heads"),
        ({"heads": 2, "window": 0}, "window = 0; expected at least 1"),
        ({"heads": 2, "softcap": 0.0}, "softcap = 0.0; expected above 0, or None for none"),
        ({"heads": 2, "softcap": 1.0, "score": tanh()}, "softcap beside score = the layer tanh; expected one"),
        ({"heads": 2, "score": prelu()}, "score is the layer prelu; expected a function of each score, without param"),
        ({"heads": 2, "score": dropout(0.1)}, "score is the layer dropout; expected a function of each score"),
        ({"heads": 2, "score": global_max_pool()}, "score is the layer global_max_pool; expected a function"),
        ({"heads": 2, "dropout_rate": 1.0}, "dropout_rate = 1.0; expected 0 <= dropout_rate < 1"),
        ({"heads": 2, "value_features": 0}, "value_features = 0; expected at least 1"),
        ({"heads": 3, "features": 8}, "3 heads do not divide features = 8; give head_features"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        make(options)


X, MEMORY = jnp.zeros((2, 5, 4)), jnp.zeros((2, 3, 4))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.zeros((2, 4)), r"expected a query of axes \(batch, length, features\), got shape \(2, 4\)"),
        (jnp.zeros((2, 5, 4), jnp.int32), "expected a floating query, got int32: convert it"),
        ((X, jnp.zeros((2, 5))), r"expected a memory of axes \(batch, length, features\), got shape \(2, 5\)"),
        ((X, MEMORY, X), r"expected x, \(x, mask\), .* with a boolean mask, got float32, float32, float32"),
        ((X, MEMORY[:1]), "expected query and memory of one batch and dtype, got 2 of float32 and 1 of float32"),
        ((X, X[None]), r"expected a bias of shape \(2, 5, 5\) or \(2, 2, 5, 5\), got \(1, 2, 5, 4\)"),
        ((X, X > 0), r"expected a mask of shape \(2, 5\) or \(2, 5, 5\), got \(2, 5, 4\)"),
        ((X, MEMORY, jnp.ones((2, 5), bool)), r"expected a mask of shape \(2, 3\) or \(2, 5, 3\), got \(2, 5\)"),
        (jnp.zeros((2, 5, 6)), "query: expected 4 features, got 6"),
        ((X, jnp.zeros((2, 3, 6))), "key: expected 4 features, got 6"),
        (X.astype(jnp.bfloat16), "query: expected float32 features like its parameters, got bfloat16"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, message):
    layer = attention(2)
    params = drawn(layer, X)
    with pytest.raises(LayerError, match=f"^{message}"):
        apply(layer, params, (), x)


def test_parameters_and_head_sizes_that_do_not_fit_are_refused():
    params = drawn(attention(2), X)
    with pytest.raises(LayerError, match=r"expected params of query, key, value and out, got \['key'"):
        apply(attention(2), {name: p for name, p in params.items() if name != "value"}, (), X)
    with pytest.raises(LayerError, match="query: 3 heads do not divide the 4 columns of w"):
        apply(attention(3), params, (), X)
    with pytest.raises(LayerError, match="3 heads do not divide the query's 4 features: give head_features"):
        attention(3).init(jax.random.key(0), X)
    with pytest.raises(LayerError, match="rotary needs heads of an even number of features, got 1"):
        attention(4, rotary=100.0).init(jax.random.key(0), X)
    with pytest.raises(LayerError, match="expected at most 1 frequencies for heads of 2, got 3"):
        attention(2, rotary=np.ones(3)).init(jax.random.key(0), X)
    with pytest.raises(LayerError, match=r"where K divides H, got \(1, 2, 4, 3\), \(1, 2, 3, 3\)"):
        dot_product_attention(jnp.zeros((1, 2, 4, 3)), jnp.zeros((1, 2, 3, 3)), jnp.zeros((1, 2, 3, 3)))
    with pytest.raises(LayerError, match="expected a boolean mask, True = may be attended to, got int32"):
        q = jnp.zeros((1, 2, 1, 3))
        dot_product_attention(q, q, q, jnp.ones((1, 2), jnp.int32))
    with pytest.raises(LayerError, match=r"expected a mask of shape .* or \(1, 1, 2, 2\), got \(1, 2, 2, 2\)"):
        dot_product_attention(q, q, q, jnp.ones((1, 2, 2, 2), bool))
    with pytest.raises(LayerError, match=r"expected a bias of shape \(1, 2, 2\) or \(1, 1, 2, 2\), got \(2, 2\)"):
        dot_product_attention(q, q, q, None, jnp.ones((2, 2)))
    with pytest.raises(LayerError, match="expected a floating bias, got bool: a boolean one is a mask"):
        dot_product_attention(q, q, q, None, jnp.ones((1, 2, 2), bool))
    layer = attention(2, relative=relative_positions(2))
    with pytest.raises(LayerError, match="expected params of relative too, got"):
        apply(layer, params, (), X)
    with pytest.raises(LayerError, match="expected one bias, got one in the inputs beside relative"):
        layer.init(jax.random.key(0), (X, jnp.zeros((1, 2, 5, 5))))
    with pytest.raises(LayerError, match=r"expected a bias of shape \(2, 5, 5\) .* got \(1, 3, 5, 5\)"):
        attention(2).init(jax.random.key(0), (X, jnp.zeros((1, 3, 5, 5))))
    with pytest.raises(LayerError, match=r"expected inputs \(batch, length, features\), got shape \(2, 5\)"):
        biased(relative_positions(2), attention(2)).init(jax.random.key(0), X[:, :, 0])
    with pytest.raises(LayerError, match="expected positions of queries and memory, signed integers"):
        apply(alibi(2), (), (), X)
    for make, message in (
        (lambda: relative_positions(2, buckets=3), "buckets = 3, max_distance = 128; expected at least 4 and an even"),
        (lambda: relative_positions(2, max_distance=8), "and a max_distance above 8, where they grow"),
        (lambda: alibi(2, [1.0]), r"alibi: slopes of shape \(1,\); expected \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_query_that_is_hidden_and_sees_nothing_may_hold_nan(key):
    # position 3 is hidden from all and its own row of the mask is empty
    layer = attention(2)
    x = jax.random.normal(key, (1, 4, 6)).at[0, 3].set(jnp.nan)
    mask = jnp.ones((1, 4, 4), bool).at[:, :, 3].set(False).at[:, 3].set(False)
    params, state = layer.init(key, (x, mask))
    (y, _), _, residuals = layer.forward(params, state, (x, mask))
    dparams, (dx, _) = layer.backward(params, residuals, (jnp.ones_like(y), None))
    assert jnp.isfinite(y).all()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((dparams, dx)))
    assert (dx[0, 3] == 0).all()
    clean = x.at[0, 3].set(7.0)
    (again, _), _, residuals = layer.forward(params, state, (clean, mask))
    assert_leaves_close(dparams, layer.backward(params, residuals, (jnp.ones_like(y), None))[0], 0)
    assert_leaves_close(y, again, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary": True}, "rotary = True; expected the base"),
        ({"block_size": 2.5}, "block_size = 2.5; expected a whole number of at least 1"),
        ({"kv_heads": 0}, "kv_heads = 0; expected at least 1"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attention(2, **options)


# --- by jax's own function -------------------------------------------------------------------------------------------

# its softmax is in float32, of float64 too: a few roundings of 2^-24 each, of sums over some ten entries of order 1
SINGLE = 32 * 2.0**-24


@pytest.mark.parametrize(
    "name",
    [
        *("causal", "padded", "pairs, causal", "grouped, rotary, scaled", "multi-query", "cross, padded, rotary"),
        *("a mask for each head", "relative positions"),
    ],
)
def test_by_jax_outputs_and_both_engines_gradients_are_fnets_own(name):
    _, _, _, own, dy, gradients, _ = at_random(name)
    _, _, _, y, same_dy, by_hand, by_autodiff = at_random(name, "xla")
    np.testing.assert_array_equal(dy, same_dy)
    np.testing.assert_allclose(y, own, rtol=0, atol=SINGLE * np.abs(own).max())
    scale = max(np.abs(g).max() for g in jax.tree.leaves(gradients))  # the keys' bias has 0
    for expected, hand, auto in zip(*map(jax.tree.leaves, (gradients, by_hand, by_autodiff)), strict=True):
        np.testing.assert_allclose(hand, expected, rtol=0, atol=SINGLE * scale)
        np.testing.assert_allclose(hand, auto, rtol=0, atol=SINGLE * scale)


@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 4, 5, 6), (2, 4, 5, 6)])
def test_by_jax_a_bias_has_its_gradient_and_a_query_that_minus_infinity_hides_from_all_gives_zero(shape, x64):
    q, k, v, do, mask, bias = drawn_core(5, 6, bias=shape, mask=(2, 5, 6))
    v, do = v[..., :3], do[..., :3]
    bias[..., 2, :4] = bias[..., 3, :] = -np.inf
    expected = core(q, k, v, do, mask, bias, causal=True)
    found = core(q, k, v, do, mask, bias, causal=True, form="xla")
    assert (np.asarray(found[0])[:, 3] == 0).all() and np.abs(found[4]).max() > 0.01
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=SINGLE * np.abs(b).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_by_jax_dtypes_are_kept_and_numbers_differ_by_their_rounding(dtype):
    arrays = [jnp.asarray(a[..., :3], dtype) for a in drawn_core(5, 6)[:4]]
    expected = core(*(np.asarray(a, np.float32) for a in arrays), causal=True)
    with jax.numpy_dtype_promotion("standard"):  # in 16 bits jax' own derivative does not compile under "strict"
        found = core(*arrays, causal=True, form="xla")[:4]
    for a, b in zip(found, expected[:4], strict=True):
        assert a.dtype == dtype
        tolerance = 16 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=tolerance * np.abs(b).max())


def test_cudnn_is_refused_where_there_is_none_with_the_remedy(key):
    layer, x = attention(2, form="cudnn"), jnp.ones((1, 3, 16), jnp.bfloat16)
    params, state = layer.init(key, x)  # which may be made anywhere
    with pytest.raises(
        LayerError, match=r"form = 'cudnn': expected a GPU .* got the platform cpu: form='xla' is the same"
    ):
        layer.forward(params, state, x)
    with traced_for("cuda"):
        with pytest.raises(LayerError, match=r"expected bfloat16 or float16 .* got float32 and 8: mixed_precision"):
            dot_product_attention(*jnp.ones((3, 1, 4, 2, 8)), form="cudnn")
        with pytest.raises(LayerError, match="a multiple of 8 features, got bfloat16 and 4"):
            dot_product_attention(*jnp.ones((3, 1, 4, 2, 4), jnp.bfloat16), form="cudnn")


def test_cudnn_is_handed_whole_masks_and_finite_biases_in_the_dtype_of_the_queries(monkeypatch):
    given, by_xla = [], jax.nn.dot_product_attention

    def seen(q, k, v, bias, mask, *, implementation, **options):
        given.append((bias, mask, implementation, options))
        return by_xla(q, k, v, bias, mask, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", seen)
    q, bias = jnp.ones((2, 3, 2, 8), jnp.bfloat16), jnp.zeros((2, 3, 3)).at[:, 1, 0].set(-jnp.inf)
    with traced_for("cuda"):
        dot_product_attention(q, q, q, jnp.ones((2, 3), bool), bias, causal=True, form="cudnn", scale=0.5)
    ((bias, mask, implementation, options),) = given
    assert (implementation, options) == ("cudnn", {"scale": 0.5, "is_causal": True})
    assert (bias.shape, bias.dtype) == ((1, 2, 3, 3), jnp.bfloat16) and bool(jnp.isfinite(bias).all())
    assert mask.shape == (2, 2, 3, 3) and not mask[:, :, 1, 0].any() and mask.sum() == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "flash"}, "form = 'flash'; expected 'cudnn', 'xla' or None for fnet's own"),
        ({"form": "xla", "block_size": 2}, "block_size = 2 beside form = 'xla'"),
        ({"form": "xla", "window": 2}, "window = 2 beside form = 'xla'"),
        ({"form": "xla", "softcap": 2.0}, "softcap = 2.0 beside"),
        ({"form": "xla", "score": tanh()}, "score = .* beside"),
        ({"form": "xla", "dropout_rate": 0.1}, "dropout_rate = 0.1 beside"),
        ({"form": "xla", "offset": 1}, "offset = 1 beside form = 'xla'; expected 0"),
        (
            {"form": "xla", "scale": np.float32(1)},
            "scale = .* beside form = 'xla'; expected None or a number of Python",
        ),
        ({"form": "xla", "value_features": 2}, "value_features = 2 beside"),
    ],
)
def test_by_jax_options_that_it_does_not_take_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        attention(2, **options)


def test_by_jax_wide_values_and_a_cache_are_refused(key):
    with pytest.raises(LayerError, match="expected values of as many features as keys, got 5 and 3"):
        dot_product_attention(*map(jnp.asarray, drawn_core(5, 6)[:3]), form="xla")
    layer, x = attention(2, causal=True, form="xla"), jnp.ones((1, 3, 4))
    params, state = layer.init(key, x)
    with pytest.raises(LayerError, match="form = 'xla' runs with no cache: make the model without; its parameters"):
        apply_cached(layer, params, state, x, length=8)
