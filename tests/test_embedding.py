"""Embeddings (ids in and out of range, scatter, tied tables) and positions (learned, sinusoidal, rotary)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.gradcheck import check_layer
from fnet.layers import dense, serial, stateless, tanh
from fnet.layers.children import init
from fnet.layers.embedding import (
    embedding,
    learned_positions,
    llama3_frequencies,
    rotary_frequencies,
    rotary_positions,
    rotate,
    rotate_by,
    sinusoidal_positions,
    tied_embedding,
    yarn_frequencies,
    yarn_scale,
)
from fnet.layers.initializers import normal
from fnet.types import Layer, LayerError
from tests.oracles import assert_leaves_close, numerical_gradient

IDS = np.array([[2, 0, 2], [1, 4, 2]])  # 2 stands three times, 3 never


def numpy_rotate(x, positions, base):
    """Each pair as a complex number times exp(i angle)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    angles = np.broadcast_to(positions, x.shape[:2])[:, :, None, None] / base ** (2 * np.arange(half) / x.shape[-1])
    z = z * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


OWN = np.array([1.3, 0.2])  # frequencies


def numpy_turned(x, positions, frequencies, interleaved=False):
    """The first features of each head, pair after pair, by a matrix of two rows; the others as they are."""
    y, n = x.copy(), len(frequencies)
    for i, frequency in enumerate(frequencies):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + n)
        for t, position in enumerate(positions):
            cos, sin = np.cos(position * frequency), np.sin(position * frequency)
            turn = np.array([[cos, -sin], [sin, cos]])
            y[:, t, :, [first, second]] = np.einsum(
                "ij,jbh->ibh", turn, np.moveaxis(x[:, t][..., [first, second]], 2, 0)
            )
    return y


def numpy_sinusoids(length, features, base):
    encoding = np.zeros((length, features))
    for t in range(length):
        for d in range(features):
            angle = t / base ** ((d - d % 2) / features)
            encoding[t, d] = np.cos(angle) if d % 2 else np.sin(angle)
    return encoding


BODY = serial(dense(4, bias=normal(1.0)), tanh())


def numpy_tied(p, ids):
    h = np.tanh(p["table"][ids] @ p["body"]["dense_0"]["w"] + p["body"]["dense_0"]["b"])
    return h @ p["table"].T + p.get("b", 0.0)


# name: layer, the inputs (float ones are a shape), the forward in NumPy from the formula
LAYERS = {
    "embedding": (embedding(5, 4), IDS, lambda p, ids: p["table"][ids]),
    "embedding of single ids": (embedding(5, 3), IDS[:, 0], lambda p, ids: p["table"][ids]),
    "tied_embedding": (tied_embedding(5, 4, BODY), IDS, numpy_tied),
    "tied_embedding with bias": (tied_embedding(5, 4, BODY, bias=normal(1.0)), IDS, numpy_tied),
    "learned_positions": (learned_positions(5), (2, 3, 4), lambda p, x: x + p["table"][:3]),
    "learned_positions, full": (learned_positions(3), (2, 3, 4), lambda p, x: x + p["table"]),
    "sinusoidal_positions": (sinusoidal_positions(), (2, 5, 6), lambda p, x: x + numpy_sinusoids(5, 6, 1e4)),
    "sinusoidal_positions, odd": (sinusoidal_positions(50.0), (2, 5, 3), lambda p, x: x + numpy_sinusoids(5, 3, 50)),
    "rotary_positions": (rotary_positions(), (2, 5, 3, 4), lambda p, x: numpy_rotate(x, np.arange(5), 1e4)),
    "rotary_positions, frequencies": (
        rotary_positions(OWN),
        (2, 5, 3, 4),
        lambda p, x: numpy_turned(x, np.arange(5), OWN),
    ),
    "rotary_positions, interleaved": (
        rotary_positions(50.0, interleaved=True),
        (2, 5, 1, 4),
        lambda p, x: numpy_turned(x, np.arange(5), [1, 50**-0.5], True),
    ),
    "rotary_positions, partial": (
        rotary_positions(OWN),
        (2, 4, 2, 7),
        lambda p, x: numpy_turned(x, np.arange(4), OWN),
    ),
    "rotary_positions, partial, interleaved": (
        rotary_positions(OWN, interleaved=True),
        (2, 4, 1, 6),
        lambda p, x: numpy_turned(x, np.arange(4), OWN, True),
    ),
    "rotary_positions, base": (rotary_positions(50.0), (1, 4, 1, 6), lambda p, x: numpy_rotate(x, np.arange(4), 50)),
}


def drawn(name, dtype=jnp.float64):
    """The layer with random parameters and state, inputs and cotangent."""
    layer, x, oracle = LAYERS[name]
    rng = np.random.default_rng(5)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), dtype)

    x = jnp.asarray(rng.normal(size=x), dtype) if isinstance(x, tuple) else jnp.asarray(x)
    params, state = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))
    y = jax.eval_shape(lambda p: layer.forward(p, state, x)[0], params)
    return layer, oracle, jax.tree.map(draw, params), state, x, draw(y)


@partial(jax.jit, static_argnames="layer")
def by_hand(layer, params, state, x, dy):
    """Outputs, and the gradients by hand."""
    y, _, residuals = layer.forward(params, state, x, train=True)
    return y, layer.backward(params, residuals, dy)


@partial(jax.jit, static_argnames="layer")
def by_autodiff(layer, params, state, x, dy):
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.vjp(lambda p, x: layer.forward(p, state, x, train=True)[0], params, x)[1](dy)
    return jax.vjp(lambda p: layer.forward(p, state, x, train=True)[0], params)[1](dy)[0], None


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward_equal_the_formula_in_numpy_and_autodiff(name, x64):
    layer, oracle, params, state, x, dy = drawn(name)
    p = jax.tree.map(np.asarray, params)
    y, (dparams, dx) = by_hand(layer, params, state, x, dy)
    np.testing.assert_allclose(y, oracle(p, np.asarray(x)), rtol=1e-12, atol=1e-13)
    assert_leaves_close((dparams, dx), by_autodiff(layer, params, state, x, dy), 1e-13)
    if dx is not None:
        slope = numerical_gradient(lambda v: (oracle(p, v) * dy).sum(), x)
        np.testing.assert_allclose(dx, slope, rtol=1e-7, atol=1e-8)
    leaves, tree = jax.tree.flatten(p)
    for i, claimed in enumerate(jax.tree.leaves(dparams)):

        def along(leaf, i=i):
            return (oracle(jax.tree.unflatten(tree, [*leaves[:i], leaf, *leaves[i + 1 :]]), np.asarray(x)) * dy).sum()

        np.testing.assert_allclose(claimed, numerical_gradient(along, leaves[i]), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["embedding", "tied_embedding", "learned_positions", "rotary_positions"])
def test_the_audit_finds_nothing(name, key):
    layer, _, _, _, x, _ = drawn(name, jnp.float32)
    report = check_layer(layer, x, key=key, precisions=(), cost=False)
    assert report.ok and all(leaf.verdict == "ok" for leaf in report.leaves), report


def test_the_whole_audit_of_a_tied_embedding_with_bias_finds_nothing_in_float32_either(key):
    layer, _, _, _, x, _ = drawn("tied_embedding with bias", jnp.float32)
    report = check_layer(layer, x, key=key)
    assert report.ok, report


@pytest.mark.parametrize("name", LAYERS)
def test_low_precision_keeps_dtypes_and_is_the_float32_result_up_to_its_rounding(name):
    layer, _, params, state, x, dy = drawn(name, jnp.bfloat16)
    y, grads = by_hand(layer, params, state, x, dy)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, grads))} == {jnp.dtype(jnp.bfloat16)}
    up = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, (params, x, dy))
    expected = by_hand(layer, up[0], state, *up[1:])
    # one rounding is 2^-9; a tied model has some ten in a row
    assert_leaves_close((y, grads), expected, 0.03 if "tied" in name else 2**-8)


# --- ids -------------------------------------------------------------------------------------------------------------


def test_repeated_ids_add_up_and_ids_that_are_not_there_get_zero():
    _, (dparams, dids) = by_hand(embedding(5, 4), {"table": jnp.zeros((5, 4))}, (), IDS, jnp.ones((2, 3, 4)))
    np.testing.assert_array_equal(dparams["table"], np.array([1, 1, 3, 0, 1], np.float32)[:, None] * np.ones((1, 4)))
    assert dids is None


def test_gradients_of_a_low_precision_table_are_summed_in_float32():
    # 300 ones: in bfloat16, which has 8 bits, the sum would stop at 256
    layer = embedding(2, 1, dtype=jnp.bfloat16)
    params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((300,), jnp.int32))
    _, (dparams, _) = by_hand(layer, params, state, jnp.zeros(300, int), jnp.ones((300, 1), jnp.bfloat16))
    assert dparams["table"].dtype == jnp.bfloat16 and dparams["table"].tolist() == [[300.0], [0.0]]


def test_concrete_ids_out_of_range_are_refused_with_path_position_value_and_range():
    model = serial(("words", embedding(5, 4)))
    params, state = model.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 3), jnp.int32))
    for bad in (5, -1):
        ids = IDS.copy()
        ids[1, 2] = bad
        message = rf"^words: expected ids from 0 to 4, got {bad} at \(1, 2\), 1 such of 6: map"
        for given in (ids, jnp.asarray(ids)):
            with pytest.raises(LayerError, match=message):
                model.forward(params, state, given)
    with pytest.raises(LayerError, match=r"^expected ids from 0 to 4, got 9 at \(0,\)"):
        tied_embedding(5, 4, dense(4)).init(jax.random.key(0), jnp.array([9]))


@pytest.mark.parametrize("name", ["embedding", "tied_embedding"])
def test_concrete_ids_of_no_examples_give_outputs_of_none(name, key):
    layer = {"embedding": embedding(5, 2), "tied_embedding": tied_embedding(5, 2, dense(2))}[name]
    params, state = init(layer, key, jnp.zeros((2, 3), int))
    assert layer.forward(params, state, jnp.zeros((0, 3), int))[0].shape == (0, 3, 2 if name == "embedding" else 5)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
@pytest.mark.parametrize("vocabulary", [5, 300])
def test_traced_ids_out_of_range_are_nan_and_have_no_gradient_and_nothing_is_wrapped(dtype, vocabulary):
    layer = embedding(vocabulary, 2)
    table = jnp.ones((vocabulary, 2))
    last = int(min(vocabulary - 1, jnp.iinfo(dtype).max))
    wrong = [v for v in (-1, -5, vocabulary, 120) if jnp.iinfo(dtype).min <= v <= jnp.iinfo(dtype).max]
    wrong = [v for v in wrong if not 0 <= v < vocabulary]
    ids = jnp.array([0, last, *wrong], dtype)
    dy = jnp.ones((len(ids), 2))
    y, (dparams, _) = by_hand(layer, {"table": table}, (), ids, dy)
    np.testing.assert_array_equal(y[:, 0], [1, 1] + [np.nan] * len(wrong))
    expected = np.zeros((vocabulary, 2))
    expected[[0, last]] = 1
    np.testing.assert_array_equal(dparams["table"], expected)
    np.testing.assert_array_equal(by_autodiff(layer, {"table": table}, (), ids, dy)[0]["table"], expected)


def test_embedding_under_jit_vmap_and_scan_is_the_plain_one(key):
    layer = embedding(5, 4)
    params, state = init(layer, key, jax.ShapeDtypeStruct((2, 3), jnp.int32))
    ids = jnp.asarray(np.stack([IDS, IDS[::-1], IDS[:, ::-1]]))
    expected = np.asarray(params["table"])[np.asarray(ids)]
    one = lambda ids: layer.forward(params, state, ids)[0]  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(ids), expected)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, ids: (c, one(ids)), (), ids)[1], expected)


# --- tied tables -----------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_tied_table_is_the_sum_of_that_of_two_tables(x64):
    layer, _, params, state, ids, dy = drawn("tied_embedding")
    _, (dparams, _) = by_hand(layer, params, state, ids, dy)

    def untied(first, second):
        h = BODY.forward(params["body"], state["body"], first[ids])[0]
        return (h @ second.T * dy).sum()

    first, second = jax.grad(untied, (0, 1))(params["table"], params["table"])
    assert np.abs(first).max() > 0.1 and np.abs(second).max() > 0.1
    np.testing.assert_allclose(dparams["table"], first + second, rtol=1e-12)
    assert set(params) == {"table", "body"}


def carrying():
    """A body with a carry: ``h = a v + c``, and ``c`` comes out as ``c + Σ_t v``."""

    def forward(params, state, x, *, key=None, train=False):
        v, carry = x
        return (params["a"] * v + carry[:, None], carry + v.sum(1)), state, v

    def backward(params, v, dy):
        dh, dcarry = dy
        dv = params["a"] * dh + dcarry[:, None]
        return {"a": (dh * v).sum()}, (dv, dh.sum(1) + dcarry)

    return Layer("carrying", lambda key, x: ({"a": jnp.asarray(2, x[0].dtype)}, ()), forward, backward)


def test_a_tied_embedding_hands_masks_and_carries_through_its_body(key):
    layer = tied_embedding(5, 4, carrying(), weights=normal(1.0))
    x = (jnp.asarray(IDS), jax.random.normal(key, (2, 4)))
    params, state = layer.init(key, x)
    (logits, carry), _, _ = layer.forward(params, state, x)
    v = np.asarray(params["table"])[IDS]
    np.testing.assert_allclose(carry, x[1] + v.sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, (2 * v + x[1][:, None]) @ params["table"].T, rtol=1e-5, atol=1e-5)
    report = check_layer(layer, x, key=key, params=params, state=state, precisions=(), cost=False)
    assert report.ok and "inputs/1" in {leaf.path for leaf in report.leaves}, report


@pytest.mark.parametrize(
    ("body", "got"),
    [
        (dense(3), r"float32 \(2, 3, 3\)"),
        (
            stateless("low", lambda key, x: (), lambda p, x: (x.astype("bfloat16"), ()), lambda p, r, dy: ((), dy)),
            r"bfloat16 \(2, 3, 4\)",
        ),
    ],
    ids=["width", "dtype"],
)
def test_a_body_of_another_width_or_dtype_is_refused(body, got):
    layer = tied_embedding(5, 4, body)
    params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 3), jnp.int32))
    with pytest.raises(LayerError, match=rf"expected float32 \(2, 3, 4\) of the body, as the table has, got {got}"):
        layer.forward(params, state, IDS)


def test_errors_inside_the_body_carry_its_path():
    layer = serial(tied_embedding(5, 4, serial(dense(3), dense(4))))
    params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 3), jnp.int32))
    params["tied_embedding_0"]["body"]["dense_1"]["w"] = jnp.zeros((7, 4))
    with pytest.raises(LayerError, match=r"^tied_embedding_0/body/dense_1: expected 7 features, got 3"):
        layer.forward(params, state, IDS)


# --- positions -------------------------------------------------------------------------------------------------------


def test_inner_products_of_rotated_vectors_depend_on_the_difference_of_positions_alone(x64):
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 8))

    def score(m, n):
        return (rotate(q, np.array([m])) * rotate(k, np.array([n]))).sum(-1)

    np.testing.assert_allclose(score(3, 1), score(12, 10), rtol=1e-11)
    np.testing.assert_allclose(score(1, 3), score(1001, 1003), rtol=1e-9)
    assert np.abs(score(3, 1) - score(1, 3)).max() > 1e-3


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_by_tables_is_that_of_its_pairs_and_its_transpose_turns_back(interleaved, x64):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 2, 3, 2, 5))
    cos, sin = rng.standard_normal((2, 1, 3, 2, 2))
    expected = x.copy()
    for i in range(2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 2)
        expected[..., a] = x[..., a] * cos[..., i] - x[..., b] * sin[..., i]
        expected[..., b] = x[..., b] * cos[..., i] + x[..., a] * sin[..., i]
    turn = partial(rotate_by, interleaved=interleaved)
    y, pull = jax.vjp(lambda x: turn(x, jnp.asarray(cos), jnp.asarray(sin)), jnp.asarray(x))
    np.testing.assert_allclose(y, expected, atol=1e-15)
    by_hand = turn(jnp.asarray(dy), jnp.asarray(cos), jnp.asarray(-sin))
    np.testing.assert_allclose(by_hand, pull(jnp.asarray(dy))[0], atol=1e-15)
    with pytest.raises(LayerError, match=r"expected cos and sin \(B or 1, T, 1 or H, up to 2\)"):
        turn(jnp.asarray(x), jnp.asarray(cos), jnp.asarray(sin[..., :1]))


def test_rotation_keeps_norms_and_is_undone_by_the_negative_positions(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3, 6)))
    positions = jnp.array([[0, 1, 2, 3], [7, 7, 0, 1000]])
    turn = jax.jit(rotate)
    y = turn(x, positions, 100.0)
    np.testing.assert_allclose(y, numpy_rotate(np.asarray(x), np.asarray(positions), 100.0), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose((y * y).sum(-1), (x * x).sum(-1), rtol=1e-13)
    np.testing.assert_allclose(turn(y, -positions, 100.0), x, rtol=1e-12, atol=1e-13)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))
    np.testing.assert_allclose(
        turn(dy, -positions), jax.vjp(lambda x: turn(x, positions), x)[1](dy)[0], rtol=1e-12, atol=1e-13
    )
    np.testing.assert_array_equal(rotate(x, jnp.zeros(4, int)), x)


def test_the_base_of_the_waves_may_be_traced_and_vmapped():
    x = np.random.default_rng(0).normal(size=(1, 4, 2, 4)).astype(np.float32)
    bases = jnp.array([100.0, 1e4])
    rotated = jax.jit(jax.vmap(lambda b: rotary_positions(b).forward((), (), jnp.asarray(x))[0]))(bases)
    waves = jax.jit(jax.vmap(lambda b: sinusoidal_positions(b).forward((), (), jnp.asarray(x[:, :, 0]))[0]))(bases)
    for i, base in enumerate([100.0, 1e4]):
        np.testing.assert_allclose(rotated[i], numpy_rotate(x.astype(float), np.arange(4), base), atol=2e-6)
        np.testing.assert_allclose(waves[i], x[:, :, 0] + numpy_sinusoids(4, 4, base), atol=2e-6)


def llama3_in_numpy(features, base, factor, low, high, length):
    """As Meta's code has it: by the wave's length, one after the other."""
    found = []
    for i in range(features // 2):
        f = base ** (-2 * i / features)
        wave = 2 * np.pi / f
        if wave < length / high:
            found.append(f)
        elif wave > length / low:
            found.append(f / factor)
        else:
            smooth = (length / wave - low) / (high - low)
            found.append((1 - smooth) * f / factor + smooth * f)
    return found


def yarn_in_numpy(features, base, factor, length, variant, slow=1.0, fast=32.0):
    """By the paper's γ of r = L / λ, or by the ramp over pairs of the authors' code."""
    first = max(int(np.floor(features * np.log(length / (fast * 2 * np.pi)) / (2 * np.log(base)))), 0)
    last = min(int(np.ceil(features * np.log(length / (slow * 2 * np.pi)) / (2 * np.log(base)))), features - 1)
    found = []
    for i in range(features // 2):
        f = base ** (-2 * i / features)
        r = length * f / (2 * np.pi)
        g = 0.0 if r < slow else 1.0 if r > fast else (r - slow) / (fast - slow)
        if variant == "code":
            g = 1 - min(max((i - first) / (last - first), 0.0), 1.0)
        found.append((1 - g) * f / factor + g * f)
    return found


@pytest.mark.parametrize("features", [8, 64, 128])
def test_stretched_frequencies_are_those_of_the_published_formulas(features, x64):
    close = partial(np.testing.assert_allclose, rtol=1e-13)
    for factor in (8.0, 32.0):
        close(llama3_frequencies(features, factor=factor), llama3_in_numpy(features, 5e5, factor, 1.0, 4.0, 8192))
        for variant in ("paper", "code"):
            given = {"factor": factor, "original_length": 2048, "variant": variant}
            close(yarn_frequencies(features, **given), yarn_in_numpy(features, 1e4, factor, 2048, variant))
    given = {"factor": 40.0, "original_length": 4096, "slow": 2.0, "fast": 8.0}
    close(yarn_frequencies(features, 1e6, **given), yarn_in_numpy(features, 1e6, 40.0, 4096, "paper", 2.0, 8.0))
    close(yarn_scale(features, 40.0), (0.1 * np.log(40) + 1) ** 2 / np.sqrt(features))
    close(yarn_scale(features, 0.5), 1 / np.sqrt(features))


def test_all_three_parts_of_the_published_scaling_are_there(x64):
    plain, llama = np.asarray(rotary_frequencies(128, 5e5)), np.asarray(llama3_frequencies(128))
    np.testing.assert_allclose(plain, 5e5 ** (-np.arange(64) / 64), rtol=1e-13)
    kept, divided = np.isclose(llama, plain, rtol=1e-12), np.isclose(llama, plain / 8, rtol=1e-12)
    # 8192 f / 2π is 4 at pair 28.3 and 1 at pair 35.0
    assert np.flatnonzero(kept).tolist() == list(range(29)) and np.flatnonzero(divided).tolist() == list(range(35, 64))


def test_frequencies_of_a_base_turn_as_the_base_does_and_their_numbers_may_be_traced(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)))
    at = jnp.arange(4)
    np.testing.assert_array_equal(rotate(x, at, rotary_frequencies(8, 50.0)), rotate(x, at, 50.0))
    llama = jax.jit(lambda factor: llama3_frequencies(8, factor=factor))(8.0)
    np.testing.assert_allclose(llama, llama3_frequencies(8), rtol=1e-14)
    yarn = jax.jit(lambda factor: yarn_frequencies(8, factor=factor, original_length=64, variant="code"))(8.0)
    np.testing.assert_allclose(yarn, yarn_in_numpy(8, 1e4, 8.0, 64, "code"), rtol=1e-13)
    turned = jax.jit(lambda f: rotary_positions(f).forward((), (), x)[0])(yarn)
    np.testing.assert_allclose(turned, numpy_turned(np.asarray(x), range(4), yarn), rtol=1e-12, atol=1e-13)


def test_inner_products_of_interleaved_and_partial_rotations_depend_on_distances_alone(x64):
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 8))

    def score(m, n, **options):
        return (rotate(q, np.array([m]), OWN, **options) * rotate(k, np.array([n]), OWN, **options)).sum(-1)

    for options in ({}, {"interleaved": True}):
        np.testing.assert_allclose(score(3, 1, **options), score(12, 10, **options), rtol=1e-11)
        assert np.abs(score(3, 1, **options) - score(1, 3, **options)).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rotary_frequencies(5), "rotary_frequencies: features = 5; expected an even number"),
        (lambda: llama3_frequencies(8, factor=0.0), "llama3_frequencies: factor = 0.0; expected above 0"),
        (lambda: llama3_frequencies(8, high_freq_factor=1.0), "high_freq_factor = 1.0; expected above low_freq_factor"),
        (lambda: yarn_frequencies(8, factor=2.0, original_length=9, fast=1.0), "fast = 1.0; expected above slow = 1.0"),
        (
            lambda: yarn_frequencies(8, factor=2.0, original_length=9, variant="hf"),
            "variant = 'hf'; expected 'paper' or 'code'",
        ),
        (lambda: yarn_scale(0, 2.0), "yarn_scale: features = 0; expected at least 1"),
        (lambda: rotary_positions("llama"), "rotary_positions: rotary = 'llama'; expected the base, such as 10000.0"),
        (lambda: rotary_positions(np.ones((2, 2))), r"rotary = an array of shape \(2, 2\); expected the base"),
        (lambda: rotary_positions(-1.0), "rotary_positions: rotary = -1.0; expected above 0"),
    ],
)
def test_frequencies_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_frequencies_than_pairs_are_refused():
    with pytest.raises(LayerError, match="expected at most 1 frequencies for heads of 3 features, got 2"):
        rotate(jnp.zeros((1, 2, 1, 3)), jnp.arange(2), OWN)


def test_rows_beyond_the_input_have_zero_gradient(key):
    layer = learned_positions(6)
    x = jnp.ones((2, 4, 3))
    params, state = layer.init(key, x)
    _, (dparams, dx) = by_hand(layer, params, state, x, x)
    np.testing.assert_array_equal(dparams["table"], np.repeat([[2.0], [0.0]], [4, 2], 0) * np.ones((1, 3)))
    np.testing.assert_array_equal(dx, x)


def test_the_row_for_padding_is_0_at_the_start_and_has_no_gradient_by_either_engine(x64):
    layer, dy = embedding(5, 4, padding_idx=2), jnp.ones((2, 3, 4))
    params, state = layer.init(jax.random.key(0), IDS)
    assert (params["table"][2] == 0).all() and (params["table"][np.array([0, 1, 3, 4])] != 0).all()
    moved = {"table": params["table"].at[2].set(7)}  # as another optimizer may have left it: it is read as it stands
    y, (dparams, _) = by_hand(layer, moved, state, IDS, dy.astype(jnp.float32))
    assert (y == np.asarray(moved["table"])[IDS]).all()
    expected = np.array([1, 1, 0, 0, 1])[:, None] * np.ones((1, 4))
    np.testing.assert_array_equal(dparams["table"], expected)
    auto, _ = by_autodiff(layer, moved, state, jnp.asarray(IDS, jnp.uint8), dy.astype(jnp.float32))
    np.testing.assert_array_equal(auto["table"], expected)


def test_the_row_for_padding_is_torchs(x64):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Embedding(5, 4, padding_idx=2, dtype=torch.float64)
    layer, dy = embedding(5, 4, padding_idx=2, dtype=jnp.float64), np.random.default_rng(0).normal(size=(2, 3, 4))
    params, state = layer.init(jax.random.key(0), IDS)
    assert not theirs.weight[2].any()
    params = {"table": params["table"].at[2].set(1)}
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(params["table"])))
    outputs = theirs(torch.tensor(IDS))
    outputs.backward(torch.tensor(dy))
    y, (dparams, _) = by_hand(layer, params, state, IDS, jnp.asarray(dy))
    np.testing.assert_array_equal(y, outputs.detach())
    np.testing.assert_allclose(dparams["table"], theirs.weight.grad, rtol=1e-15)


# --- against torch ---------------------------------------------------------------------------------------------------


def test_a_tied_language_model_has_the_outputs_and_gradients_of_torch(x64):
    torch = pytest.importorskip("torch")
    layer, _, params, state, ids, dy = drawn("tied_embedding with bias")
    table, w, b, out = (
        torch.tensor(np.array(leaf), requires_grad=True)
        for leaf in (params["table"], params["body"]["dense_0"]["w"], params["body"]["dense_0"]["b"], params["b"])
    )
    h = torch.tanh(torch.nn.functional.embedding(torch.tensor(np.array(ids)), table) @ w + b)
    theirs = h @ table.T + out
    theirs.backward(torch.tensor(np.array(dy)))
    y, (dparams, _) = by_hand(layer, params, state, ids, dy)
    np.testing.assert_allclose(y, theirs.detach(), rtol=1e-12)
    np.testing.assert_allclose(dparams["table"], table.grad, rtol=1e-11)
    np.testing.assert_allclose(dparams["body"]["dense_0"]["w"], w.grad, rtol=1e-11)
    np.testing.assert_allclose(dparams["b"], out.grad, rtol=1e-11)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "x", "message"),
    [
        (embedding(5, 4), jnp.zeros((2, 3), int), jnp.zeros((2, 3)), "it: expected integer ids, got float32: convert"),
        (
            embedding(5, 4),
            jnp.zeros((2, 3), int),
            jnp.zeros((), int),
            "it: expected ids with a batch axis, got a scalar",
        ),
        (
            learned_positions(3),
            jnp.zeros((2, 3, 4)),
            jnp.zeros((2, 4, 4)),
            "it: expected at most 3 positions, got 4: shorten",
        ),
        (learned_positions(3), jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 5)), "it: expected 4 features, got 5"),
        (
            sinusoidal_positions(),
            jnp.zeros((2, 3, 4)),
            jnp.zeros((2, 3)),
            r"it: expected \(batch, length, features\), got shape \(2, 3\)",
        ),
        (
            sinusoidal_positions(),
            jnp.zeros((2, 3, 4)),
            jnp.zeros((2, 3, 4), int),
            "it: expected floating features, got int32: embed the ids first",
        ),
        (
            rotary_positions(),
            jnp.zeros((1, 2, 3, 4)),
            jnp.zeros((1, 2, 3, 5)),
            r"it: expected floating \(batch, length, heads, features\) with an even number of features, got float32",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_path(layer, shape, x, message):
    model = serial(("it", layer))
    params, state = model.init(jax.random.key(0), jax.ShapeDtypeStruct(shape.shape, shape.dtype))
    with pytest.raises(LayerError, match=f"^{message}"):
        model.forward(params, state, x)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.zeros(2), "expected positions that are signed integers, got float64"),
        (np.zeros(2, np.uint8), "expected positions that are signed integers, got uint8"),
        (np.zeros(3, int), r"expected positions of shape \(2,\) or \(5, 2\), got \(3,\)"),
        (np.zeros((2, 2), int), r"expected positions of shape \(2,\) or \(5, 2\), got \(2, 2\)"),
    ],
)
def test_positions_that_do_not_fit_are_refused(positions, message):
    with pytest.raises(LayerError, match=message):
        rotate(jnp.zeros((5, 2, 3, 4)), positions)


def test_constructors_and_init_refuse_what_cannot_be():
    for make, message in (
        (lambda: embedding(0, 4), "embedding: vocabulary = 0; expected at least 1"),
        (lambda: embedding(5, 0), "embedding: features = 0; expected at least 1"),
        (lambda: embedding(5, 4, padding_idx=5), "embedding: padding_idx = 5; expected an id from 0 to 4, or None"),
        (lambda: embedding(5, 4, padding_idx=-1), "embedding: padding_idx = -1; expected an id from 0 to 4"),
        (lambda: tied_embedding(0, 4, BODY), "tied_embedding: vocabulary = 0"),
        (lambda: learned_positions(0), "learned_positions: length = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(LayerError, match="learned_positions_0: expected at most 3 positions, got 4"):
        serial(learned_positions(3)).init(jax.random.key(0), jnp.zeros((2, 4, 5)))


def test_traced_ids_of_64_bits_do_not_wrap(x64):
    layer = embedding(5, 2)
    params = {"table": jnp.ones((5, 2), jnp.float32)}
    ids = jnp.asarray([2**32 + 1, 1, -(2**32) + 1])
    y, residuals = jax.jit(lambda ids: layer.forward(params, (), ids)[::2])(ids)
    assert np.isnan(y[0]).all() and (y[1] == 1).all() and np.isnan(y[2]).all()
    dtable = jax.jit(lambda ids: layer.backward(params, ids, jnp.ones((3, 2), jnp.float32))[0]["table"])(residuals)
    assert dtable.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0], [0, 0]]


def test_a_table_of_another_vocabulary_is_refused():
    with pytest.raises(LayerError, match=r"expected params table \(3, 2\), got table \(9, 2\)"):
        embedding(3, 2).forward({"table": jnp.ones((9, 2))}, (), jnp.zeros((1,), int))
