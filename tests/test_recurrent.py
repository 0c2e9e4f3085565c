"""Recurrent layers: the formulas in NumPy, PyTorch, carries, masks, truncation, stacks and both directions."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.gradcheck import check_layer
from fnet.layers import dense, relu, serial, softmax, softplus
from fnet.layers.cells import LSTMCarry
from fnet.layers.children import init
from fnet.layers.initializers import normal
from fnet.layers.recurrent import forget_bias, gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell, zero_carry
from fnet.layers.stacking import bidirectional, stacked
from fnet.types import LayerError
from tests.oracles import assert_leaves_close, numerical_gradient

B, T, I, H = 3, 4, 3, 2
LENGTHS = np.array([4, 1, 2])
MASK = np.arange(T)[None] < LENGTHS[:, None]


# --- the formulas in NumPy -------------------------------------------------------------------------------------------


def logistic(z):
    return 1 / (1 + np.exp(-z))


def numpy_rnn(activation):
    def step(p, x, carry):
        h = activation(x @ p["input"]["w"] + p["b"] + carry[0] @ p["recurrent"]["w"])
        return (h,)

    return step


def numpy_lstm(p, x, carry):
    h, c = carry
    z = x @ p["input"]["w"] + p["b"] + h @ p["recurrent"]["w"]
    i, f, g, o = (z[:, k * H : (k + 1) * H] for k in range(4))
    c = logistic(f) * c + logistic(i) * np.tanh(g)
    return logistic(o) * np.tanh(c), c


def numpy_gru(reset_after):
    def step(p, x, carry):
        h, w = carry[0], p["recurrent"]["w"]
        zr, zu, zn = (x @ p["input"]["w"][:, s] + p["b"][s] for s in (slice(0, H), slice(H, 2 * H), slice(2 * H, None)))
        r, u = logistic(zr + h @ w[:, :H]), logistic(zu + h @ w[:, H : 2 * H])
        if reset_after:
            n = np.tanh(zn + r * (h @ w[:, 2 * H :] + p["recurrent"]["b"]))
        else:
            n = np.tanh(zn + (r * h) @ w[:, 2 * H :])
        return ((1 - u) * n + u * h,)

    return step


def numpy_sequence(step, p, x, carry, mask, reverse):
    y = np.zeros((*x.shape[:2], H))
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        m = mask[:, t, None]
        carry = tuple(np.where(m, new, old) for new, old in zip(step(p, x[:, t], carry), carry, strict=True))
        y[:, t] = np.where(m, carry[0], 0)
    return y, carry


RANDOM = {"bias": normal(1.0), "recurrent": normal(0.7)}  # no bias zero and no weight orthogonal
CELLS: dict[str, Any] = {
    "rnn": (rnn, rnn_cell, {}, numpy_rnn(np.tanh)),
    "rnn with relu": (rnn, rnn_cell, {"activation": relu()}, numpy_rnn(lambda z: np.maximum(z, 0))),
    "rnn with softplus": (rnn, rnn_cell, {"activation": softplus()}, numpy_rnn(lambda z: np.log1p(np.exp(z)))),
    "gru": (gru, gru_cell, {}, numpy_gru(True)),
    "gru, reset before": (gru, gru_cell, {"reset_after": False}, numpy_gru(False)),
    "lstm": (lstm, lstm_cell, {}, numpy_lstm),
}
every_cell = pytest.mark.parametrize("name", CELLS)
three_cells = pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])


def make(name, **options):
    return CELLS[name][0](H, **CELLS[name][2], **RANDOM, **options)


def given(name, dtype=jnp.float64, seed=0) -> Any:
    """Inputs, carry and mask."""
    rng = np.random.default_rng(seed)
    parts = [jnp.asarray(rng.standard_normal((B, H)), dtype) for _ in range(2)]
    carry = LSTMCarry(*parts) if name == "lstm" else parts[0]
    return jnp.asarray(rng.standard_normal((B, T, I)), dtype), carry, jnp.asarray(MASK)


def drawn(layer, x, seed=3):
    return init(layer, jax.random.key(seed), x)


def like(tree, seed=5):
    rng = np.random.default_rng(seed)

    def draw(a):  # a mask has no cotangent
        return None if a.dtype == bool else jnp.asarray(rng.standard_normal(a.shape), a.dtype)

    return jax.tree.map(draw, tree)


def outputs(layer, params, state, x):
    return layer.forward(params, state, x)[0]


def by_hand(layer, params, state, x, dy):
    return forward_and_backward(layer, params, state, x, dy)[2]


def forward_and_backward(layer, params, state, x, dy=None):
    """Outputs, a cotangent, and the gradients by hand of their product."""
    if dy is None:
        dy = like(jax.eval_shape(lambda: outputs(layer, params, state, x)))

    @jax.jit
    def run(params, x, dy):
        y, _, residuals = layer.forward(params, state, x)
        return y, dy, layer.backward(params, residuals, dy)

    return run(params, x, dy)


def by_autodiff(layer, params, state, x, dy):
    """The gradients by parameters and inputs, None where the inputs are boolean."""
    floating = jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.floating) else None, x)

    @jax.jit
    def run(params, floating):
        def objective(params, floating):
            merged = jax.tree.map(lambda a, b: a if b is None else b, x, floating, is_leaf=lambda a: a is None)
            y = jax.tree.map(lambda a: None if a.dtype == bool else a, outputs(layer, params, state, merged))
            return sum((a * b).sum() for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(dy), strict=True))

        return jax.grad(objective, argnums=(0, 1))(params, floating)

    return run(params, floating)


def parts_of(carry):
    return tuple(carry) if isinstance(carry, LSTMCarry) else (carry,)


@pytest.mark.parametrize(
    ("name", "reverse"), [*((name, False) for name in CELLS), ("gru, reset before", True), ("lstm", True)]
)
def test_forward_and_backward_equal_the_formula_in_numpy(name, reverse, x64):
    layer = make(name, reverse=reverse)
    x, carry, mask = given(name)
    params, state = drawn(layer, x)
    (y, last, _), (dy, dlast, _), gradients = forward_and_backward(layer, params, state, (x, carry, mask))
    tree = jax.tree.map(np.asarray, (params, x, parts_of(carry)))

    def numpy_outputs(tree):
        p, x, carry = tree
        return numpy_sequence(CELLS[name][3], p, x, carry, MASK, reverse)

    expected_y, expected_last = numpy_outputs(tree)
    np.testing.assert_allclose(y, expected_y, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(parts_of(last), expected_last, rtol=1e-13, atol=1e-14)

    dparams, (dx, dcarry, dmask) = gradients
    assert dmask is None
    leaves, structure = jax.tree.flatten(tree)
    for i, claimed in enumerate(jax.tree.leaves((dparams, dx, parts_of(dcarry)))):

        def along(leaf, i=i):
            y, last = numpy_outputs(jax.tree.unflatten(structure, [*leaves[:i], leaf, *leaves[i + 1 :]]))
            return (y * dy).sum() + sum((a * b).sum() for a, b in zip(last, parts_of(dlast), strict=True))

        np.testing.assert_allclose(claimed, numerical_gradient(along, leaves[i]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in CELLS), *((n, {"reverse": True, "truncate": 3, "unroll": 2}) for n in ("gru", "lstm"))],
    ids=[*CELLS, "gru, reverse, truncated, unrolled", "lstm, reverse, truncated, unrolled"],
)
def test_backward_equals_autodiff(name, options, x64):
    layer, x = make(name, **options), given(name)
    params, state = drawn(layer, x)
    _, dy, hand = forward_and_backward(layer, params, state, x)
    assert_leaves_close(hand, by_autodiff(layer, params, state, x, dy), 1e-13)


@every_cell
def test_a_cell_is_one_step_of_the_sequence_with_the_same_parameters(name, x64):
    factory, cell_factory, options, _ = CELLS[name]
    layer, cell = factory(H, **options, **RANDOM), cell_factory(H, **options, **RANDOM)
    x, carry, _ = given(name)
    params, state = drawn(layer, x)
    assert_leaves_close(drawn(cell, x[:, 0])[0], params, 0)
    y, last = jax.jit(lambda: outputs(layer, params, state, (x, carry)))()
    step_carry = carry
    for t in range(T):  # eager: no program to compile but each operation's
        step_y, step_carry = outputs(cell, params, (), (x[:, t], step_carry))
        np.testing.assert_allclose(step_y, y[:, t], rtol=1e-13, atol=1e-15)
    assert_leaves_close(step_carry, last, 1e-13)

    first = (x[:, 0], carry)
    dy = like(outputs(cell, params, (), first))
    hand = by_hand(cell, params, (), first, dy)
    assert_leaves_close(hand, by_autodiff(cell, params, (), first, dy), 1e-13)
    one_step = by_hand(layer, params, state, (x[:, :1], carry), (dy[0][:, None], dy[1]))  # T = 1
    assert_leaves_close((hand[0], (hand[1][0][:, None], hand[1][1])), one_step, 1e-13)


# --- carries ---------------------------------------------------------------------------------------------------------


@three_cells
def test_two_halves_with_the_carry_passed_are_the_whole_forward_and_backward(name, x64):
    layer = make(name)
    x, carry, _ = given(name)
    params, state = drawn(layer, x)
    whole, last = outputs(layer, params, state, (x, carry))
    (first, between), _, first_residuals = layer.forward(params, state, (x[:, :1], carry))
    (second, end), _, second_residuals = layer.forward(params, state, (x[:, 1:], between))
    assert_leaves_close((jnp.concatenate([first, second], 1), end), (whole, last), 1e-13)

    dy, dlast = like((whole, last))
    dparams, (dx, dcarry) = by_hand(layer, params, state, (x, carry), (dy, dlast))
    dsecond, (dx_second, dbetween) = layer.backward(params, second_residuals, (dy[:, 1:], dlast))
    dfirst, (dx_first, dcarry_halves) = layer.backward(params, first_residuals, (dy[:, :1], dbetween))
    halves = jax.tree.map(jnp.add, dfirst, dsecond), jnp.concatenate([dx_first, dx_second], 1), dcarry_halves
    assert_leaves_close(halves, (dparams, dx, dcarry), 1e-13)


@three_cells
def test_no_carry_is_the_carry_of_zeros_and_has_no_gradient(name, x64):
    layer = make(name)
    x, _, mask = given(name)
    params, state = drawn(layer, x)
    zero = zero_carry(layer, params, state, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert isinstance(zero, LSTMCarry) == (name == "lstm") and not any(leaf.any() for leaf in jax.tree.leaves(zero))
    y, last = outputs(layer, params, state, (x, zero))
    assert_leaves_close(outputs(layer, params, state, (x, None)), (y, last), 0)
    assert_leaves_close(outputs(layer, params, state, x), y, 0)

    dy, no_dlast = like(y), jax.tree.map(jnp.zeros_like, last)
    dparams, (dx, dzero) = layer.backward(params, layer.forward(params, state, (x, zero))[2], (dy, no_dlast))
    assert jax.tree.structure(dzero) == jax.tree.structure(zero)
    without = layer.backward(params, layer.forward(params, state, (x, None))[2], (dy, no_dlast))
    assert_leaves_close(without, (dparams, (dx, None)), 0)
    assert_leaves_close(layer.backward(params, layer.forward(params, state, x)[2], dy), (dparams, dx), 0)
    masked = layer.backward(params, layer.forward(params, state, (x, None, mask))[2], (dy, no_dlast, None))
    assert masked[1][1:] == (None, None)


# --- masks, causality ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reverse"), [("rnn", False), ("gru", True), ("lstm", False)])
def test_a_ragged_row_is_the_row_run_alone_at_its_own_length(name, reverse, x64):
    layer = make(name, reverse=reverse)
    x, carry, mask = given(name)
    x = jnp.where(mask[:, :, None], x, jnp.nan)  # what stands in the padding is never seen
    params, state = drawn(layer, x)
    (y, last, _), (dy, dlast, _), gradients = forward_and_backward(layer, params, state, (x, carry, mask))
    dparams, (dx, dcarry, _) = gradients
    assert (y[~MASK] == 0).all() and (dx[~MASK] == 0).all()
    total = jax.tree.map(jnp.zeros_like, params)
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        alone = x[one, :length], jax.tree.map(lambda part, one=one: part[one], carry)
        cut = jax.tree.map(lambda part, one=one: part[one], (last, dlast, dcarry))
        dalone_y = dy[one, :length], cut[1]
        alone_y, _, (dalone, dgiven) = forward_and_backward(layer, params, state, alone, dalone_y)
        assert_leaves_close(alone_y, (y[one, :length], cut[0]), 1e-13)
        assert_leaves_close(dgiven, (dx[one, :length], cut[2]), 1e-13)
        total = jax.tree.map(jnp.add, total, dalone)
    assert_leaves_close(dparams, total, 1e-13)


@three_cells
def test_no_output_depends_on_a_later_input_and_each_depends_on_all_before(name):
    x, _, _ = given(name, jnp.float32)
    for reverse in (False, True):
        layer = make(name, reverse=reverse)
        params, state = drawn(layer, x)
        backward = jax.jit(lambda dy, layer=layer, p=params, s=state: layer.backward(p, layer.forward(p, s, x)[2], dy))
        _, dx = jax.vmap(backward)(jnp.eye(T)[:, None, :, None] * jnp.ones((T, B, T, H)))  # by y at each t
        reached = np.asarray(jnp.abs(dx).max(axis=(1, 3)) > 0)  # (t of y, t of x)
        np.testing.assert_array_equal(reached, (np.tri(T).T if reverse else np.tri(T)) > 0)


# --- truncation ------------------------------------------------------------------------------------------------------


@three_cells
def test_truncation_cuts_the_gradient_between_windows_and_nothing_else(name, x64):
    x, carry, _ = given(name)
    full = make(name)
    params, state = drawn(full, x)
    y, (dy, dlast), whole = forward_and_backward(full, params, state, (x, carry))
    run = jax.jit(lambda params, x, dy: forward_and_backward(full, params, state, x, dy))
    for k in (1, 3, T):  # a window a step, an uneven last window, one window
        layer = make(name, truncate=k)
        # every window run alone from the carry that it is handed
        total, dxs, before, dbefore = jax.tree.map(jnp.zeros_like, params), [], carry, None
        for start in range(0, T, k):
            window = slice(start, start + k)
            dafter = dlast if start + k >= T else jax.tree.map(jnp.zeros_like, dlast)
            (_, after), _, (dparams, (dx, d)) = run(params, (x[:, window], before), (dy[:, window], dafter))
            total, dbefore = jax.tree.map(jnp.add, total, dparams), d if start == 0 else dbefore
            dxs.append(dx)
            before = after
        same_y, _, truncated = forward_and_backward(layer, params, state, (x, carry), (dy, dlast))
        assert_leaves_close(same_y, y, 1e-14)
        assert_leaves_close(truncated, (total, (jnp.concatenate(dxs, 1), dbefore)), 1e-13)
        if k == T:
            assert_leaves_close(truncated, whole, 1e-14)


# --- several layers --------------------------------------------------------------------------------------------------


def test_a_stack_agrees_with_serial_and_hands_on_the_carries_of_all_its_layers(x64):
    layers = lstm(H, **RANDOM), gru(4, **RANDOM), rnn(2, **RANDOM)
    stack, x = stacked(*layers), given("rnn")[0]
    params, state = drawn(stack, x)
    same, _ = drawn(serial(*layers), x)
    assert_leaves_close(same, params, 0)
    y, dy, hand = forward_and_backward(stack, params, state, x)
    assert_leaves_close((y, dy, hand), forward_and_backward(serial(*layers), params, state, x, dy), 1e-14)
    first, between = outputs(stack, params, state, (x[:, :2], None))
    second, last = outputs(stack, params, state, (x[:, 2:], between))
    assert_leaves_close(jnp.concatenate([first, second], 1), y, 1e-13)
    assert isinstance(last[0], LSTMCarry) and last[1].shape == (B, 4)
    cells = stacked(*(("lstm_0", lstm_cell(H)), ("gru_0", gru_cell(4)), ("rnn_0", rnn_cell(2))))
    step_y, _ = outputs(cells, params, state, (x[:, 2], between))
    np.testing.assert_allclose(step_y, second[:, 0], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("merge", ["concatenate", "sum"])
def test_both_directions_are_a_layer_and_its_reverse(merge, x64):
    layer, x = bidirectional(gru(H, **RANDOM), merge), given("gru")[0]
    params, state = drawn(layer, x)
    carries, mask = (given("gru", seed=1)[1], given("gru", seed=2)[1]), jnp.asarray(MASK)
    (y, last, _), dy, hand = forward_and_backward(layer, params, state, (x, carries, mask))
    forward, last_forward, _ = outputs(gru(H), params["forward"], (), (x, carries[0], mask))
    backward, last_backward, _ = outputs(gru(H, reverse=True), params["backward"], (), (x, carries[1], mask))
    joined = forward + backward if merge == "sum" else jnp.concatenate([forward, backward], -1)
    assert_leaves_close((y, last), (joined, (last_forward, last_backward)), 1e-14)
    assert_leaves_close(hand, by_autodiff(layer, params, state, (x, carries, mask), dy), 1e-13)


@pytest.mark.slow
def test_stacks_of_both_directions_and_both_directions_of_stacks_have_right_backwards(x64):
    x = given("rnn")[0]
    for layer in (stacked(lstm(H), bidirectional(gru(H), "sum")), bidirectional(stacked(rnn(H), lstm(H)))):
        for inputs in (x, (x, None, jnp.asarray(MASK))):
            params, state = drawn(layer, inputs)
            _, dy, hand = forward_and_backward(layer, params, state, inputs)
            assert_leaves_close(hand, by_autodiff(layer, params, state, inputs, dy), 1e-13)


# --- initial parameters, precisions, transformations -----------------------------------------------------------------


def test_each_gate_is_drawn_by_itself_orthogonal_and_the_forget_gate_starts_open():
    params, _ = lstm(8).init(jax.random.key(0), jax.ShapeDtypeStruct((1, 5, 4), jnp.float32))
    gates = np.split(np.asarray(params["recurrent"]["w"]), 4, axis=1)
    for gate in gates:
        np.testing.assert_allclose(gate.T @ gate, np.eye(8), atol=1e-5)
    assert not np.allclose(gates[0], gates[1])
    limit = np.sqrt(6 / (4 + 8))  # Glorot of one gate (I, H)
    assert 0.9 * limit < np.abs(params["input"]["w"]).max() <= limit
    np.testing.assert_array_equal(params["b"], np.repeat([0, 1, 0, 0], 8))
    np.testing.assert_array_equal(forget_bias(2.0)(jax.random.key(0), (4,), jnp.bfloat16), [0, 2, 0, 0])
    for layer in (lstm(2, bias=None), gru(2, bias=None), rnn(2, bias=None), gru(2, reset_after=False, bias=None)):
        params, _ = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 5, 4), jnp.float32))
        assert set(params) == {"input", "recurrent"} and set(params["recurrent"]) == {"w"}


@three_cells
def test_gradients_keep_the_dtype_in_bfloat16_and_float32(name):
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.2)):  # some 16 roundings, those of 2^-8 accumulate
        layer, x = make(name), given(name, dtype)
        params, state = drawn(layer, x)
        (y, *_), dy, single = forward_and_backward(layer, params, state, x)
        expected = jax.tree.map(lambda a: a.dtype, (params, x[:2]))
        assert jax.tree.map(lambda a: a.dtype, (single[0], single[1][:2])) == expected
        assert y.dtype == dtype
        with jax.enable_x64(True):
            up = lambda a: jnp.asarray(np.asarray(a), a.dtype if a.dtype == bool else jnp.float64)  # noqa: E731
            double = by_hand(layer, *jax.tree.map(up, (params, state, x, dy)))
            assert_leaves_close(single, double, tolerance)


@three_cells
def test_layers_run_under_vmap_over_parameters(name):
    layer, x = make(name), given(name, jnp.float32)
    keys = jax.random.split(jax.random.key(1), 2)
    params = jax.vmap(lambda key: layer.init(key, x)[0])(keys)
    dy = like(jax.eval_shape(lambda: outputs(layer, jax.tree.map(lambda a: a[0], params), (), x)))
    many = jax.vmap(lambda p: layer.backward(p, layer.forward(p, (), x)[2], dy))(params)
    one = jax.tree.map(lambda a: a[1], params)
    assert_leaves_close(jax.tree.map(lambda a: a[1], many), by_hand(layer, one, (), x, dy), 1e-5)


@pytest.mark.parametrize("options", [{}, {"truncate": 3, "reverse": True}])
@pytest.mark.parametrize("layer", [rnn, lstm, gru, lambda units, **o: gru(units, reset_after=False, **o)])
def test_no_step_copies_what_is_kept_of_all_steps(layer, options):
    # dz is written over the slopes that it came from, which XLA does in place only where a step reads all of what it
    # overwrites: else it copies the whole at every step, and time is quadratic in the number of steps
    layer, x = layer(8, **options), jnp.ones((2, 11, 4))
    params, _ = layer.init(jax.random.key(0), x)

    def both(params, x, dy):
        return layer.backward(params, layer.forward(params, (), x)[2], dy)

    text = str(jax.jit(both).lower(params, x, jnp.ones((2, 11, 8))).compile().as_text())
    bodies = [part for part in re.split(r"(?m)^}$", text) if "while/body" in part and "\nENTRY " not in part]
    steps = [body for body in bodies if " dynamic-update-slice(" in body or "dynamic-update-slice_fusion" in body]
    assert steps and not re.findall(r"= f32\[11,\S* copy\(", "".join(steps))


def test_a_recurrent_layer_stands_in_serial():
    model = serial(lstm(H), dense(5))
    x = given("lstm", jnp.float32)[0]
    params, state = drawn(model, x)
    y, _, (dparams, dx) = forward_and_backward(model, params, state, x)
    assert y.shape == (B, T, 5)
    assert jax.tree.structure(dparams) == jax.tree.structure(params) and dx.shape == x.shape


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_the_audit_passes(name, key, x64):
    x, carry, mask = given(name)
    report = check_layer(make(name), (x[:, :3], carry, mask[:, :3]), key=key, precisions=(), cost=False)
    assert report.ok, str(report)


def test_the_audit_passes_in_float32_too(key):
    report = check_layer(lstm(H), given("lstm", jnp.float32)[:2], key=key)
    assert report.ok, str(report)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_are_refused():
    layer = lstm(H)
    x, carry, mask = given("lstm", jnp.float32)
    shapes = lambda layer: jax.eval_shape(lambda: layer.init(jax.random.key(0), x))  # noqa: E731
    params, state = shapes(layer)
    h = carry.h
    for inputs, message in [
        (x[0], r"expected x \(B, T, I\) with I = 3 features, got float32\[4, 3\]"),
        (x[..., :2], r"expected x \(B, T, I\) with I = 3 features, got float32\[3, 4, 2\]"),
        (x.astype(jnp.bfloat16), "expected float32 features like its parameters, got bfloat16: convert"),
        ((x, h), r"expected a carry, LSTMCarry\(h, c\), each float32\[3, 2\], or None for zeros; got float32\[3, 2\]"),
        ((x, LSTMCarry(h, h[:1])), r"expected a carry, LSTMCarry.*float32\[1, 2\]"),
        ((x, carry, mask[:, :2]), r"expected a boolean mask \(B, T\) = \(3, 4\), got bool\[3, 2\]"),
        ((x, carry, mask.astype(jnp.float32)), r"expected a boolean mask .* got float32\[3, 4\]"),
        ((x, carry, mask, mask), r"expected x, \(x, mask\), \(x, carry\) or \(x, carry, mask\), got "),
    ]:
        with pytest.raises(LayerError, match=message):
            outputs(layer, params, state, inputs)
    with pytest.raises(LayerError, match=r"expected a carry, an array h float32\[3, 2\].*LSTMCarry"):
        outputs(gru(H), shapes(gru(H))[0], (), (x, carry))
    with pytest.raises(LayerError, match=r"expected params with input/w and recurrent/w, got \['w'\]: pass what init"):
        outputs(layer, {"w": h}, (), x)
    with pytest.raises(LayerError, match=r"expected \(x, carry\), the carry None for zeros, got float32\[3, 3\]"):
        outputs(lstm_cell(H), params, (), x[:, 0])
    with pytest.raises(LayerError, match="lstm_0: expected floating features, got int32: convert or embed"):
        serial(lstm(H)).init(jax.random.key(0), jax.ShapeDtypeStruct((2, 3, 4), jnp.int32))
    stack = stacked(gru(H), gru(H))
    with pytest.raises(LayerError, match=r"expected a carry for each of \['gru_0', 'gru_1'\] or None for zeros"):
        params, state = shapes(stack)
        outputs(stack, params, state, (x, (h,)))


def test_arguments_that_make_no_sense_are_refused():
    for make_it, message in [
        (lambda: lstm(0), "lstm: units = 0; expected at least 1"),
        (lambda: gru(2, truncate=0), "gru: truncate = 0; expected at least 1"),
        (lambda: rnn(2, unroll=0), "rnn: unroll = 0; expected at least 1"),
        (lambda: gru_cell(0), "gru_cell: units = 0; expected at least 1"),
        (lambda: bidirectional(gru(2), "mean"), "merge = 'mean'; expected 'concatenate' or 'sum'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_it()


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_like(torch, name, params, both=False):
    """The module of PyTorch with these parameters; its second bias is that of the GRU's candidate, else 0."""
    kinds = {"rnn": (torch.nn.RNN, {}), "rnn with relu": (torch.nn.RNN, {"nonlinearity": "relu"})}
    kind, options = kinds.get(name, (getattr(torch.nn, name.upper(), None), {}))
    module = kind(I, H, batch_first=True, bidirectional=both, dtype=torch.float64, **options)
    for suffix, p in (("", params["forward"]), ("_reverse", params["backward"])) if both else (("", params),):
        second = np.zeros_like(p["b"])
        if "b" in p["recurrent"]:
            second[2 * H :] = p["recurrent"]["b"]
        values = {"weight_ih": p["input"]["w"].T, "weight_hh": p["recurrent"]["w"].T, "bias_ih": p["b"]}
        for leaf, value in {**values, "bias_hh": second}.items():
            getattr(module, f"{leaf}_l0{suffix}").data = torch.tensor(np.array(value))
    return module


@pytest.mark.parametrize("name", ["rnn", "rnn with relu", "gru", "lstm"])
def test_pytorch_computes_the_same_outputs_and_gradients(name, x64):
    torch = pytest.importorskip("torch")
    layer = make(name)
    x, carry, _ = given(name)
    params, state = drawn(layer, x)
    (y, last), (dy, dlast), gradients = forward_and_backward(layer, params, state, (x, carry))
    dparams, (dx, dcarry) = gradients

    module = torch_like(torch, name, params)
    tensor = lambda a: torch.tensor(np.array(a), requires_grad=True)  # noqa: E731
    tx, parts = tensor(x), [tensor(part)[None].detach().requires_grad_() for part in parts_of(carry)]
    ty, tlast = module(tx, tuple(parts) if name == "lstm" else parts[0])
    tlast = tlast if name == "lstm" else (tlast,)
    torch.autograd.backward([ty, *tlast], [tensor(dy), *(tensor(d)[None] for d in parts_of(dlast))])
    close = lambda a, b: np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-11, atol=1e-12)  # noqa: E731
    close(y, ty)
    close(dx, tx.grad)
    for ours, theirs, d, p in zip(parts_of(last), tlast, parts_of(dcarry), parts, strict=True):
        close(ours, theirs[0])
        close(d, p.grad[0])
    close(dparams["input"]["w"], module.weight_ih_l0.grad.T)
    close(dparams["recurrent"]["w"], module.weight_hh_l0.grad.T)
    close(dparams["b"], module.bias_ih_l0.grad)
    if name == "gru":
        close(dparams["recurrent"]["b"], module.bias_hh_l0.grad[2 * H :])


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_pytorch_agrees_in_both_directions_over_packed_sequences(name, x64):
    torch = pytest.importorskip("torch")
    layer = bidirectional(make(name))
    x, _, mask = given(name)
    params, state = drawn(layer, x)
    y, last, _ = outputs(layer, params, state, (x, None, mask))
    dy = like(y)
    _, (dx, _, _) = by_hand(layer, params, state, (x, None, mask), (dy, jax.tree.map(jnp.zeros_like, last), None))
    rnn_utils, module = torch.nn.utils.rnn, torch_like(torch, name, params, both=True)
    tx = torch.tensor(np.array(x), requires_grad=True)
    packed = rnn_utils.pack_padded_sequence(tx, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    ty, tlast = module(packed)
    ty, _ = rnn_utils.pad_packed_sequence(ty, batch_first=True, total_length=T)
    ty.backward(torch.tensor(np.array(dy)))
    np.testing.assert_allclose(y, ty.detach().numpy(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(dx, tx.grad.numpy(), rtol=1e-11, atol=1e-12)
    tlast = tlast if name == "lstm" else (tlast,)
    for direction, carry in enumerate(last):
        for ours, theirs in zip(parts_of(carry), tlast, strict=True):
            np.testing.assert_allclose(ours, theirs[direction].detach().numpy(), rtol=1e-11, atol=1e-12)


def test_an_activation_that_mixes_entries_is_refused():
    with pytest.raises(ValueError, match="rnn: activation softmax mixes entries"):
        rnn(3, softmax())
