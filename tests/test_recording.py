"""`fnet.record`: the numbers of a pass are right, they have their names, and the first wrong one is found."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from experiments import backprop_by_hand
from experiments.mazur import example
from fnet import layers, losses
from fnet.core.interpret import walk
from fnet.core.trees import named_leaves
from fnet.gradcheck import flat
from fnet.layers import cells, dense, dot_product, dropout, lstm, recurrent, relu, tanh
from fnet.layers.children import forward_of, show, watch
from fnet.layers.combinators import parallel, remat, repeat, residual, serial
from fnet.layers.models import gpt, lenet5, recurrent_lm
from fnet.types import Batch, Layer, LayerError
from tests.oracles import numerical_gradient

RNG = np.random.default_rng(0)
ROUNDING = 1e-14  # float64's 1.1e-16, some dozens of operations, sums of up to some hundred terms
EXACT = 1e-15  # of a few operations


def named(recording, kind: str) -> dict[str, np.ndarray]:
    """The values by hand whose names begin so."""
    names = {**recording.by_hand.marks, **recording.by_hand.outputs}
    return {name: recording.by_hand.value(name) for name in names if name.startswith(kind)}


def recorded(model, loss, batch, key=None):
    """A pass in float64 with parameters drawn for it, with these and the state."""
    params, state = fnet.init(model, jax.random.key(0), batch.inputs)
    params = jax.tree.map(lambda p: p + 0.1 * RNG.standard_normal(p.shape).astype(p.dtype), params)
    return fnet.record(model, loss, batch, params=params, state=state, key=key), params, state


# --- numbers ---------------------------------------------------------------------------------------------------------


def σ(z):
    return 1 / (1 + np.exp(-z))


def mazur_in_numpy() -> dict[str, np.ndarray]:
    """Every number of the post's pass, by the formulas, under the names of the recording."""
    w, v = np.array([[0.15, 0.25], [0.20, 0.30]]), np.array([[0.40, 0.50], [0.45, 0.55]])
    x, t = np.array([[0.05, 0.10]]), np.array([[0.01, 0.99]])
    net_h = x @ w + 0.35
    h = σ(net_h)
    net_o = h @ v + 0.60
    o = σ(net_o)
    by_o = o - t
    by_net_o = by_o * o * (1 - o)
    by_h = by_net_o @ v.T
    by_net_h = by_h * h * (1 - h)
    return {
        "forward:dense_0": net_h,
        "forward:sigmoid_0": h,
        "forward:dense_1": net_o,
        "forward:sigmoid_1": o,
        "inputs:dense_0": x,
        "inputs:sigmoid_0": net_h,
        "inputs:dense_1": h,
        "inputs:sigmoid_1": net_o,
        "loss": ((t - o) ** 2).sum() / 2,
        "dy:sigmoid_1": by_o,
        "dx:sigmoid_1": by_net_o,
        "dy:dense_1": by_net_o,
        "dx:dense_1": by_h,
        "dy:sigmoid_0": by_h,
        "dx:sigmoid_0": by_net_h,
        "dy:dense_0": by_net_h,
        "dx:dense_0": by_net_h @ w.T,
        "inputs": by_net_h @ w.T,
        "grads/dense_0/w": x.T @ by_net_h,
        "grads/dense_0/b": by_net_h[0],
        "grads/dense_1/w": h.T @ by_net_o,
        "grads/dense_1/b": by_net_o[0],
    }


@pytest.fixture(scope="module")
def mazur():
    with jax.enable_x64(True):
        model, params, state, data = example()
        return fnet.record(model, losses.half_squared_error, data, params=params, state=state)


@pytest.mark.parametrize("name", mazur_in_numpy())
@pytest.mark.parametrize("engine", ["by_hand", "autodiff"])
def test_the_numbers_of_a_pass_are_those_of_the_formulas(mazur, engine, name):
    np.testing.assert_allclose(getattr(mazur, engine).value(name), mazur_in_numpy()[name], rtol=EXACT)


def test_a_recording_says_what_layers_there_are_in_what_order_and_with_which_parameters(mazur):
    names = ["dense_0", "sigmoid_0", "dense_1", "sigmoid_1"]
    assert [node.name for node in mazur.nodes] == names and list(mazur.backward) == names[::-1]
    assert [node.kind for node in mazur.nodes] == ["dense", "sigmoid"] * 2
    assert [set(node.parameters) for node in mazur.nodes] == [
        {"dense_0/w", "dense_0/b"},
        set(),
        {"dense_1/w", "dense_1/b"},
        set(),
    ]
    assert mazur.first_wrong is None
    assert re.fullmatch(
        r"Recording of 4 layers or values: \d+ operations by hand, \d+ operations by autodiff", str(mazur)
    )


def test_no_value_of_that_name_says_which_there_are(mazur):
    with pytest.raises(KeyError, match=r"no value is called 'forward:dense_2'.*forward:dense_1"):
        mazur.by_hand.value("forward:dense_2")


def test_it_is_float64_of_float32_parameters_outside_of_x64():
    batch = Batch(jnp.ones((2, 3), jnp.float32), jnp.zeros((2, 2), jnp.float32))
    recording, params, _ = recorded(fnet.mlp(4, 2), losses.squared_error, batch)
    floating = [a for a in recording.by_hand.values if a.dtype.kind == "f"]
    assert {a.dtype for a in floating} == {np.dtype("float64")}
    np.testing.assert_array_equal(recording.by_hand.value("param/dense_0/w"), np.asarray(params["dense_0"]["w"]))


LSTM = Batch(
    jnp.asarray(RNG.standard_normal((2, 5, 3)), jnp.float32), jnp.asarray(RNG.standard_normal((2, 5, 4)), jnp.float32)
)


@pytest.fixture(scope="module", params=[False, True], ids=["forwards", "reversed"])
def lstm_pass(request):
    return request.param, *recorded(serial(lstm(4, reverse=request.param)), losses.squared_error, LSTM)[:2]


def lstm_in_numpy(params, x, reverse: bool, offset=None):
    """Gates, c and h of each step by the formulas; an offset (T, B, H) is added to each h."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["lstm_0"])
    h = c = np.zeros((len(x), 4))
    found = {}
    steps = range(x.shape[1])
    for t in reversed(steps) if reverse else steps:
        z = x[:, t] @ p["input"]["w"] + p["b"] + h @ p["recurrent"]["w"]
        i, f, g, o = np.split(z, 4, -1)
        i, f, g, o = σ(i), σ(f), np.tanh(g), σ(o)
        c = f * c + i * g
        h = o * np.tanh(c) + (0 if offset is None else offset[t])
        found[t] = {"i": i, "f": f, "g": g, "o": o, "c": c, "h": h}
    return found


def test_the_gates_of_each_step_are_those_of_the_formulas(lstm_pass):
    reverse, recording, params = lstm_pass
    expected = lstm_in_numpy(params, np.asarray(LSTM.inputs, np.float64), reverse)
    for t, values in expected.items():
        for name, value in values.items():
            for program in (recording.by_hand, recording.autodiff):
                np.testing.assert_allclose(program.value(f"inner:lstm_0/{name}@{t}"), value, rtol=1e-13, atol=1e-15)
    assert len(named(recording, "inner:lstm_0/")) == 6 * 5  # and no others
    assert not named(recording, "inner:lstm_0/h@5")


def test_the_gradients_through_time_are_differences_of_the_loss(lstm_pass):
    reverse, recording, params = lstm_pass
    x, target = np.asarray(LSTM.inputs, np.float64), np.asarray(LSTM.targets, np.float64)

    def loss(offset):
        h = lstm_in_numpy(params, x, reverse, offset)
        y = np.stack([h[t]["h"] for t in range(5)], 1)
        return ((y - target) ** 2).mean(-1).mean() if of_features else ((y - target) ** 2).sum(-1).mean()

    y = recording.autodiff.value("forward:lstm_0")
    of_features = np.isclose(((y - target) ** 2).mean(), recording.autodiff.value("loss"))
    assert np.isclose(loss(np.zeros((5, 2, 4))), recording.autodiff.value("loss"), rtol=1e-13)
    slopes = numerical_gradient(loss, np.zeros((5, 2, 4)))
    for t in range(5):
        for program in (recording.by_hand, recording.autodiff):
            np.testing.assert_allclose(program.value(f"dy:inner:lstm_0/h@{t}"), slopes[t], atol=1e-9)
    assert recording.first_wrong is None


IDS = jnp.asarray(RNG.integers(0, 7, (2, 6)))
TEXT = Batch(IDS, jnp.asarray(RNG.integers(0, 7, (2, 6))))


@pytest.fixture(scope="module", params=[False, True], ids=["blocks", "repeated"])
def gpt_pass(request):
    model = gpt(7, length=6, layers=2, features=8, heads=2, repeated=request.param)
    return model, *recorded(model, losses.softmax_cross_entropy, TEXT)


def test_attention_is_shown_by_heads_and_sums_to_1_over_the_positions_that_are_seen(gpt_pass):
    recording = gpt_pass[1]
    found = {name: a for name, a in named(recording, "inner:").items() if "attention" in name.split("/")[-1]}
    assert len(found) == 2
    for name, p in found.items():
        assert p.shape == (2, 2, 6, 6)  # B, H, T, T
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-14)
        assert (p[..., ~np.tri(6, dtype=bool)] == 0).all() and (p[..., np.tri(6, dtype=bool)] > 0).all()
        np.testing.assert_array_equal(recording.autodiff.value(name), p)
        gradient, auto = (program.value(f"dy:{name}") for program in (recording.by_hand, recording.autodiff))
        seen = np.tri(6, dtype=bool)  # by hand nothing is said of what is masked
        np.testing.assert_allclose(gradient[..., seen], auto[..., seen], atol=1e-13 * np.abs(auto).max())


def test_attention_is_the_softmax_of_the_scores():
    model = serial(layers.attention(2, causal=True, bias=None))
    x = jnp.asarray(RNG.standard_normal((1, 5, 8)), jnp.float32)
    recording, params, _ = recorded(model, losses.squared_error, Batch(x, x))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["attention_0"])
    q, k = (np.einsum("bti,ij->btj", np.asarray(x, np.float64), p[n]["w"].reshape(8, 8)) for n in ("query", "key"))
    q, k = (a.reshape(1, 5, 2, 4) for a in (q, k))
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(4)
    scores[..., ~np.tri(5, dtype=bool)] = -np.inf
    e = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(
        recording.by_hand.value("inner:attention_0/attention"), e / e.sum(-1, keepdims=True), rtol=1e-13
    )


def test_repeated_blocks_are_unrolled_and_have_the_gradients_of_the_loop(gpt_pass):
    model, recording, params, state = gpt_pass
    loop = not any("block_0" in name for name, _ in named_leaves(params))
    blocks = {node.name.split("/")[2 if loop else 1] for node in recording.nodes if "block" in node.name}
    assert len(blocks) == 2, sorted(node.name for node in recording.nodes)
    assert not any(eqn.primitive == "scan" for eqn in recording.by_hand.equations)
    assert_gradients(model, losses.softmax_cross_entropy, TEXT, recording, params, state)


# --- gradients are those of the engines ------------------------------------------------------------------------------


def assert_gradients(model, loss, batch, recording, params, state, key=None):
    """The recorded gradients of both passes are those of `fnet.backprop` and `fnet.autodiff` in float64."""
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(  # noqa: E731
            lambda a: jnp.asarray(a, jnp.float64) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a, tree
        )
        for engine, program in ((fnet.backprop, recording.by_hand), (fnet.autodiff, recording.autodiff)):
            grads, _, metrics = jax.jit(engine(model, loss))(wide(params), wide(state), wide(batch), key)
            expected = {f"grads/{name}": np.asarray(leaf) for name, leaf in named_leaves(grads)}
            found = {name: program.value(name) for name in program.outputs if name.startswith("grads")}
            assert found.keys() == expected.keys()
            most = max(np.abs(leaf).max() for leaf in expected.values())
            for leaf in expected:  # some are zero but for rounding: those of a bias before a normalisation, of keys
                limit = 1e-12 * np.abs(expected[leaf]).max() + ROUNDING * most
                np.testing.assert_allclose(found[leaf], expected[leaf], rtol=0, atol=limit, err_msg=leaf)
            np.testing.assert_allclose(program.value("loss"), metrics["loss"].value, rtol=1e-13)
    assert recording.first_wrong is None


def floats(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


LABELS = jnp.asarray([0, 2, 1])
CASES = {
    "mlp": (fnet.mlp(5, 3), losses.softmax_cross_entropy, Batch(floats(3, 4), LABELS), None),
    "weights of examples": (
        fnet.mlp(5, 3, activation=tanh()),
        losses.softmax_cross_entropy,
        Batch(floats(3, 4), LABELS, jnp.asarray([0.5, 0.0, 2.0])),
        None,
    ),
    "lenet": (lenet5(3), losses.softmax_cross_entropy, Batch(floats(1, 16, 16, 1), LABELS[:1]), None),
    "lstm": (serial(lstm(4), dense(2)), losses.squared_error, Batch(floats(2, 3, 2), floats(2, 3, 2)), None),
    "residual with a shortcut": (
        serial(residual(dense(4), relu(), dense(3), shortcut=dense(3)), tanh(), residual(dense(3))),
        losses.squared_error,
        Batch(floats(3, 2), floats(3, 3)),
        None,
    ),
    "parallel": (
        serial(parallel(dense(2), serial(dense(3), tanh())), layers.concatenate(), dense(1)),
        losses.squared_error,
        Batch(floats(3, 2), floats(3, 1)),
        None,
    ),
    "bidirectional": (
        serial(layers.bidirectional(lstm(3))),
        losses.squared_error,
        Batch(floats(2, 3, 2), floats(2, 3, 6)),
        None,
    ),
    "stacked, tied": (recurrent_lm(7, lstm(4), lstm(3), features=3), losses.softmax_cross_entropy, TEXT, None),
    "remat": (
        serial(remat(serial(dense(4), tanh(), dense(4))), relu(), dense(2)),
        losses.squared_error,
        Batch(floats(3, 2), floats(3, 2)),
        None,
    ),
    "repeat": (
        serial(dense(3), repeat(serial(dense(3), tanh()), 3)),
        losses.squared_error,
        Batch(floats(3, 2), floats(3, 3)),
        None,
    ),
    "dropout": (
        serial(dense(6), tanh(), dropout(0.5), dense(2)),
        losses.squared_error,
        Batch(floats(3, 2), floats(3, 2)),
        jax.random.key(3),
    ),
    "batch norm": (
        serial(dense(4), layers.batch_norm(), relu(), dense(2)),
        losses.squared_error,
        Batch(floats(4, 2), floats(4, 2)),
        None,
    ),
}


LONG = {"lenet", "stacked, tied", "bidirectional", "repeat", "batch norm"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in CASES])
def test_recorded_gradients_are_those_of_the_engines(name):
    model, loss, batch, key = CASES[name]
    recording, params, state = recorded(model, loss, batch, key)
    assert_gradients(model, loss, batch, recording, params, state, key)
    names = [node.name for node in recording.nodes]
    assert len({*names}) == len(names)  # what a backward computes again is no second layer


def test_a_loss_that_is_a_plain_function_has_a_pass_by_autodiff_alone():
    batch = Batch(floats(3, 2), floats(3, 1))
    recording, params, _ = recorded(fnet.mlp(1), lambda y, t: ((y - t) ** 2).mean(-1), batch)
    assert recording.by_hand is None and recording.first_wrong is None
    x, t, w, b = (np.asarray(a, np.float64) for a in (*batch[:2], params["dense_0"]["w"], params["dense_0"]["b"]))
    np.testing.assert_allclose(recording.autodiff.value("grads/dense_0/w"), 2 * x.T @ (x @ w + b - t) / 3, rtol=1e-13)


def test_the_gradient_by_a_value_that_two_read_is_whole_and_that_through_one_is_its_part():
    model = serial(dense(2), residual(tanh()))
    recording, *_ = recorded(model, losses.squared_error, Batch(floats(3, 2), floats(3, 2)))
    through, whole = (recording.by_hand.value(n) for n in ("dx:residual_0/tanh_0", "dy:dense_0"))
    other = recording.by_hand.value("dy:residual_0")
    np.testing.assert_allclose(whole, through + other, rtol=1e-13)
    np.testing.assert_allclose(recording.autodiff.value("dy:dense_0"), whole, rtol=1e-13)


# --- nobody watches --------------------------------------------------------------------------------------------------

QUIET = {
    "lstm": (lstm(4), LSTM.inputs),
    "gru": (layers.gru(4), LSTM.inputs),
    "rnn": (layers.rnn(4), LSTM.inputs),
    "attention": (layers.attention(2, causal=True), floats(2, 5, 4)),
    "grouped attention": (layers.attention(2, kv_heads=1, causal=True), floats(2, 5, 4)),
    "repeat": (repeat(serial(dense(3), tanh()), 2), LSTM.inputs),
    "remat": (remat(serial(dense(3), tanh())), LSTM.inputs),
}


def whole_pass(layer, x):
    """A function of the parameters that goes forward and backward, not yet traced."""
    params, state = fnet.init(layer, jax.random.key(0), x)

    def run(params):
        y, _, residuals = forward_of(layer, params, state, x, key=None, train=True)
        return layer.backward(params, residuals, jnp.ones_like(y))

    return run, params


@pytest.mark.parametrize("name", QUIET)
def test_a_program_that_nobody_watches_is_as_if_nothing_were_shown(name, monkeypatch):
    run, params = whole_pass(*QUIET[name])
    jaxpr = jax.make_jaxpr(run)(params)
    assert "name" not in {place.eqn.primitive.name for place in walk(jaxpr.jaxpr)}
    before = jax.jit(run).lower(params).as_text()
    nothing = lambda name, value, *, is_gradient=False: value  # noqa: E731
    for module in (cells, recurrent, dot_product):
        monkeypatch.setattr(module, "show", nothing)
    monkeypatch.setattr(dot_product, "by_heads", lambda p, length, *, is_gradient=False: p)
    jax.clear_caches()
    assert jax.jit(whole_pass(*QUIET[name])[0]).lower(params).as_text() == before


@pytest.mark.parametrize("name", ["lstm", "attention", "repeat"])
def test_a_program_is_the_same_after_it_was_watched(name):
    layer, x = QUIET[name]
    run, params = whole_pass(serial(layer), x)
    before = jax.jit(run).lower(params).as_text()
    seen = []
    with watch(lambda call, y: y, inner=lambda path, value, is_gradient: (seen.append((path, is_gradient)), value)[1]):
        watched, params = whole_pass(serial(layer), x)
        jax.jit(watched).lower(params).as_text()
    assert seen or name == "repeat"
    jax.clear_caches()
    assert jax.jit(whole_pass(serial(layer), x)[0]).lower(params).as_text() == before


def test_those_who_watch_may_put_other_values_in_the_place_of_inputs_and_of_what_is_shown():
    layer = Layer(
        "twice",
        lambda key, x: ((), ()),
        lambda params, state, x, *, key=None, train=False: (show("double", 2 * x), state, ()),
        lambda params, residuals, dy: ((), show("double", 2 * dy, is_gradient=True)),
    )
    model, told, nothing = serial(layer, layer), [], {"twice_0": (), "twice_1": ()}

    def inputs(path, x):
        told.append(("inputs", path))
        return x + 1

    def inner(path, value, is_gradient):
        told.append((path, is_gradient))
        return 10 * value if path[0] == "twice_0" and not is_gradient else value

    with watch(lambda call, y: y, inputs=inputs, inner=inner):
        y, _, residuals = forward_of(model, nothing, nothing, 3.0, key=None, train=True)
        _, dx = model.backward(nothing, residuals, 1.0)
    assert y == 2 * (10 * 2 * (3 + 1) + 1) and dx == 4
    assert told == [
        ("inputs", ("twice_0",)),
        (("twice_0", "double"), False),
        ("inputs", ("twice_1",)),
        (("twice_1", "double"), False),
        (("twice_1", "double"), True),
        (("twice_0", "double"), True),
    ]
    assert forward_of(model, nothing, nothing, 3.0, key=None, train=True)[0] == 12


def test_watchers_see_each_backward_with_what_reaches_it_and_may_change_it():
    model, told = serial(dense(2, bias=None), tanh()), []

    def backward(back, dparams, dx):
        told.append(("/".join(back.path), back.layer.name, np.asarray(back.dy)))
        return dparams, 3 * dx

    x = floats(1, 2)
    params, state = fnet.init(model, jax.random.key(0), x)
    with watch(lambda call, y: y, backward):
        y, _, residuals = forward_of(model, params, state, x, key=None, train=True)
        _, dx = model.backward(params, residuals, jnp.ones_like(y))
    assert [t[:2] for t in told] == [("tanh_0", "tanh"), ("dense_0", "dense")]
    w = np.asarray(params["dense_0"]["w"], np.float64)
    slope = 1 - np.tanh(np.asarray(x, np.float64) @ w) ** 2
    np.testing.assert_allclose(told[1][2], 3 * slope, rtol=1e-5)
    np.testing.assert_allclose(dx, 9 * slope @ w.T, rtol=1e-5)


# --- the first wrong one ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def derivation():
    """The parameters and the batch of `experiments.backprop_by_hand`, smaller."""
    with jax.enable_x64(True):
        config = backprop_by_hand.Config(embedding=3, hidden=5, batch_size=12)
        words = backprop_by_hand.read_words()
        alphabet = "." + "".join(sorted(set("".join(words))))
        data = backprop_by_hand.contexts(words, alphabet)
        return backprop_by_hand.draw(config, len(alphabet)), fnet.data.take(data, np.arange(12))


def record_fault(derivation, fault):
    p, batch = derivation
    return fnet.record_function(
        backprop_by_hand.f,
        p,
        batch.inputs,
        batch.targets,
        gradient=lambda *args: backprop_by_hand.by_hand(*args, fault=fault)[0],
        intermediates=lambda *args: backprop_by_hand.by_hand(*args, fault=fault)[1],
    )


@pytest.mark.parametrize(
    "fault", [None, "tanh", *(pytest.param(f, marks=pytest.mark.long) for f in backprop_by_hand.FAULTS if f != "tanh")]
)
def test_a_wrong_line_of_a_derivation_is_named_as_the_audit_names_it(derivation, fault, x64):
    found = record_fault(derivation, fault).first_wrong
    assert (found or "") == backprop_by_hand.audit(*derivation, fault=fault).first_wrong
    assert found == (None if fault is None else backprop_by_hand.FAULTS[fault][0])


def wrong(layer, change):
    """The layer with another backward: ``change(dparams, dx)``."""

    def backward(params, residuals, dy):
        return change(*layer.backward(params, residuals, dy))

    return layer._replace(backward=backward)


def wrong_w(dparams, dx):
    return {**dparams, "w": dparams["w"] * 1.001}, dx


def wrong_b(dparams, dx):
    return {**dparams, "b": dparams["b"] + 1e-3}, dx


def wrong_x(dparams, dx):
    return dparams, -dx


FAULTY = {
    "dx": (serial(dense(3), wrong(tanh(), wrong_x), dense(2)), None, "tanh_0/inputs"),
    "dw": (serial(dense(3), tanh(), wrong(dense(2), wrong_w)), None, "dense_1/w"),
    "db": (serial(wrong(dense(3), wrong_b), tanh(), dense(2)), None, "dense_0/b"),
    "two": (serial(wrong(dense(3), wrong_b), wrong(tanh(), wrong_x), dense(2)), None, "tanh_0/inputs"),
    "dx of the first": (serial(wrong(dense(3), wrong_x), tanh(), dense(2)), None, "dense_0/inputs"),
    "in a residual": (
        serial(dense(3), residual(dense(3), wrong(tanh(), wrong_x)), dense(2)),
        None,
        "residual_0/tanh_0/inputs",
    ),
    "dw in a residual": (
        serial(dense(3), residual(wrong(dense(3), wrong_w), tanh()), dense(2)),
        None,
        "residual_0/dense_0/w",
    ),
    "a shortcut": (
        serial(residual(dense(3), shortcut=wrong(dense(3), wrong_x)), dense(2)),
        None,
        "residual_0/shortcut/inputs",
    ),
    "the loss": (
        serial(dense(3), tanh(), dense(2)),
        losses.squared_error._replace(gradient=lambda y, t: y - t),
        "loss/outputs",
    ),
}


def some(cases, *quick):
    """All cases, those that are not ``quick`` marked as long."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in cases]


@pytest.mark.parametrize("name", some(FAULTY, "dx", "dw", "in a residual"))
def test_a_wrong_layer_is_named_as_the_audit_names_it(name):
    model, loss, expected = FAULTY[name]
    batch, loss = Batch(floats(3, 2), floats(3, 2)), loss or losses.squared_error
    recording, params, state = recorded(model, loss, batch)
    audit = fnet.check_model(
        model, loss, batch, key=jax.random.key(0), params=params, state=state, precisions=(), cost=False
    )
    assert recording.first_wrong == audit.first_wrong == expected


def twice_back(layer):
    """The layer with a backward of twice what reaches it."""
    return layer._replace(backward=lambda params, residuals, dy: layer.backward(params, residuals, 2 * dy))


INNER = serial(dense(2), tanh())
COMPOSED = {
    "the model": (wrong(INNER, wrong_x), "inputs"),
    "the model, within": (twice_back(INNER), "inputs"),
    "the first of it": (serial(wrong(INNER, wrong_x), dense(2)), "serial_0/inputs"),
    "the first of it, within": (serial(twice_back(INNER), dense(2)), "serial_0/inputs"),
    "the last of it": (serial(dense(2), twice_back(INNER)), "serial_0/inputs"),
    "a residual": (serial(dense(2), wrong(residual(dense(2), tanh()), wrong_x), dense(2)), "residual_0/inputs"),
    "a residual, within": (serial(dense(2), twice_back(residual(dense(2), tanh()))), "residual_0/inputs"),
}


@pytest.mark.parametrize("name", some(COMPOSED, "the first of it, within", "a residual"))
def test_a_wrong_composition_of_right_layers_is_named_as_the_audit_names_it(name):
    model, expected = COMPOSED[name]
    batch = Batch(floats(3, 2), floats(3, 2))
    recording, params, state = recorded(model, losses.squared_error, batch)
    audit = fnet.check_model(
        model, losses.squared_error, batch, key=jax.random.key(0), params=params, state=state, precisions=(), cost=False
    )
    assert recording.first_wrong == audit.first_wrong == expected


def test_a_model_of_one_layer_has_no_name_and_its_gradients_are_named_by_its_parameters():
    batch = Batch(floats(3, 2), floats(3, 2))
    right, *_ = recorded(dense(2), losses.squared_error, batch)
    assert [node.name for node in right.nodes] == [""] and right.first_wrong is None
    assert recorded(wrong(dense(2), wrong_b), losses.squared_error, batch)[0].first_wrong == "b"
    assert recorded(wrong(dense(2), wrong_x), losses.squared_error, batch)[0].first_wrong == "inputs"


def test_a_nan_on_one_side_is_wrong():
    nan = wrong(dense(2), lambda dparams, dx: ({**dparams, "b": dparams["b"] * jnp.nan}, dx))
    recording, *_ = recorded(serial(nan), losses.squared_error, Batch(floats(3, 2), floats(3, 2)))
    assert recording.first_wrong == "dense_0/b"


# --- functions -------------------------------------------------------------------------------------------------------


def square(w, x):
    return (fnet.tap("product", w * x) ** 2).sum()


def test_a_plain_function_is_recorded_with_its_taps():
    w, x = np.array([1.5, -2.0]), np.array([3.0, 0.5])
    recording = fnet.record_function(
        square, w, x, gradient=lambda w, x: 2 * w * x * x, intermediates=lambda w, x: {"product": 2 * w * x}
    )
    for program in (recording.by_hand, recording.autodiff):
        np.testing.assert_allclose(program.value("forward:product"), w * x, rtol=EXACT)
        np.testing.assert_allclose(program.value("dy:product"), 2 * w * x, rtol=EXACT)
        np.testing.assert_allclose(program.value("grads"), 2 * w * x * x, rtol=EXACT)
        np.testing.assert_allclose(program.value("loss"), ((w * x) ** 2).sum(), rtol=EXACT)
    assert recording.first_wrong is None and recording.backward == ("product",)


def test_taps_in_a_scan_have_the_number_of_their_step():
    def f(w, xs):
        def step(h, x):
            h = fnet.tap("h", jnp.tanh(w * h + x))
            return h, None

        return jax.lax.scan(step, jnp.zeros(()), xs)[0]

    xs, w = np.array([0.3, -1.0, 0.7]), 0.8
    recording = fnet.record_function(f, w, xs)
    h, hs = 0.0, []
    for x in xs:
        h = np.tanh(w * h + x)
        hs.append(h)
    back, expected = 1.0, [0.0] * 3
    for t in (2, 1, 0):
        expected[t] = back
        back *= (1 - hs[t] ** 2) * w
    for t in range(3):
        np.testing.assert_allclose(recording.autodiff.value(f"forward:h@{t}"), hs[t], rtol=1e-14)
        np.testing.assert_allclose(recording.autodiff.value(f"dy:h@{t}"), expected[t], rtol=1e-14)


# --- errors ----------------------------------------------------------------------------------------------------------

ONE = Batch(floats(2, 3), floats(2, 1))


def start(model=None):
    params, state = fnet.init(model or fnet.mlp(1), jax.random.key(0), ONE.inputs)
    return {"params": params, "state": state}


def blockwise():
    """A model whose forward branches by what is masked."""
    return gpt(7, length=8, layers=1, features=8, heads=2, block_size=2)


def record_blockwise():
    batch = Batch(jnp.zeros((1, 8), int), jnp.zeros((1, 8), int))
    params, state = fnet.init(blockwise(), jax.random.key(0), batch.inputs)
    fnet.record(blockwise(), losses.softmax_cross_entropy, batch, params=params, state=state)


def by_value(w):
    return jax.lax.cond(fnet.tap("w", w) > 0, lambda w: w, lambda w: -w, w)


ERRORS = {
    "no model": (lambda: fnet.record(3, losses.squared_error, ONE, params={}, state={}), TypeError, "record.*model.*3"),
    "a constructor": (
        lambda: fnet.record(dense, losses.squared_error, ONE, params={}, state={}),
        TypeError,
        "record.*dense",
    ),
    "no loss": (lambda: fnet.record(fnet.mlp(1), "mse", ONE, **start()), TypeError, "record.*loss.*'mse'"),
    "an unknown batch": (
        lambda: fnet.record(fnet.mlp(1), losses.squared_error, 3.0, **start()),
        (TypeError, ValueError),
        "batch.*expected",
    ),
    "no key": (
        lambda: fnet.record(fnet.mlp(1), losses.squared_error, ONE, **start(), key=7),
        TypeError,
        "record.*key.*7",
    ),
    "inputs that do not fit": (
        lambda: fnet.record(fnet.mlp(1), losses.squared_error, ONE._replace(inputs=floats(2, 5)), **start()),
        LayerError,
        "dense_0.*5",
    ),
    "a branch by values": (record_blockwise, ValueError, "record.*branch.*block_size: leave it None"),
    "a branch of a function": (lambda: fnet.record_function(by_value, 2.0), ValueError, "record_function.*branch"),
    "a text": (
        lambda: fnet.record_function(lambda w, x: fnet.tap("w", w) * len(x), 2.0, "text"),
        TypeError,
        "record_function: arg/0 is str; expected arrays and numbers alone",
    ),
    "no tap": (lambda: fnet.record_function(lambda w: w**2, 2.0), ValueError, "nothing is tapped.*fnet.tap"),
    "no scalar": (
        lambda: fnet.record_function(lambda w: fnet.tap("w", w), np.ones(2)),
        ValueError,
        "expected one scalar",
    ),
    "no function": (lambda: fnet.record_function(3, 2.0), ValueError, "record_function: f is no function"),
    "no gradient": (
        lambda: fnet.record_function(square, 2.0, 3.0, gradient=3),
        ValueError,
        "record_function: gradient is no function",
    ),
    "intermediates alone": (
        lambda: fnet.record_function(square, 2.0, 3.0, intermediates=lambda w, x: {}),
        ValueError,
        "record_function: intermediates without a gradient by hand",
    ),
    "a backward without gradients of its parameters": (
        lambda: recorded(serial(wrong(dense(1), lambda dparams, dx: ((), dx))), losses.squared_error, ONE),
        LayerError,
        "dense_0.*backward returned dparams .*like the parameters",
    ),
    "a gradient by hand of another shape": (
        lambda: fnet.record_function(square, np.ones(2), 3.0, gradient=lambda w, x: (2 * w * x * x).sum()),
        ValueError,
        r"record_function: the gradient by hand has shapes {'': \(\)}; expected {'': \(2,\)}",
    ),
    "an intermediate of another shape": (
        lambda: fnet.record_function(
            square,
            np.ones(2),
            3.0,
            gradient=lambda w, x: 2 * w * x * x,
            intermediates=lambda w, x: {"product": w.sum()},
        ),
        ValueError,
        r"record_function: the intermediate 'product' by hand has \(\); expected \(2,\)",
    ),
    "an intermediate that is no tap": (
        lambda: fnet.record_function(
            square, 2.0, 3.0, gradient=lambda w, x: 2 * w * x * x, intermediates=lambda w, x: {"sum": w}
        ),
        ValueError,
        r"record_function: intermediates \['sum'\] are not tapped; there are \['product'\]",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused_with_the_thing_and_the_remedy(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def long_loop(w, steps):
    return jax.lax.scan(lambda h, _: (fnet.tap("h", jnp.sin(h * w) + w), None), w, None, length=steps)[0]


def test_too_many_operations_are_refused_before_anything_is_computed():
    with pytest.raises(
        ValueError, match=r"record_function: the pass has [\d,]+ operations; expected at most 20,000: take"
    ):
        fnet.record_function(lambda w: long_loop(w, 20_000), 0.5)


def test_too_many_numbers_are_refused(monkeypatch):
    monkeypatch.setattr(flat, "MOST_NUMBERS", 100)
    with pytest.raises(ValueError, match="record_function: the pass has more than 100 numbers; take fewer"):
        fnet.record_function(lambda w: fnet.tap("w", jnp.sin(w)).sum(), np.ones(60))


# --- flat programs ---------------------------------------------------------------------------------------------------


def program_of(run, *args):
    with jax.enable_x64(True):
        return flat.flattened("test", lambda given: run(*given["arg"]), {"arg": tuple(map(jnp.asarray, args))})


def primitives(program) -> list[str]:
    return [eqn.primitive for eqn in program.equations]


def test_what_is_computed_twice_stands_once_and_what_nobody_needs_not_at_all():
    program = program_of(lambda x: (jnp.sin(x) * 2 + jnp.sin(x), jnp.cos(x))[0], 0.5)
    assert primitives(program).count("sin") == 1 and "cos" not in primitives(program)
    np.testing.assert_allclose(program.value(""), 3 * np.sin(0.5), rtol=EXACT)


def test_a_sum_with_constant_zeros_is_left_out_and_one_with_zeros_that_are_given_is_not():
    program = program_of(lambda x, b: x + b + jnp.zeros(2), np.ones(2), np.zeros(2))
    assert primitives(program) == ["add"]


def test_calls_and_loops_are_taken_apart_in_order():
    def run(x):
        def step(c, t):
            return jax.jit(jnp.sin)(c) + t, c

        return jax.lax.scan(step, x, jnp.arange(3.0))

    program = program_of(run, 0.5)
    assert not {"scan", "jit", "pjit", "while", "cond"} & {*primitives(program)}
    assert primitives(program).count("sin") == 3
    c, before = 0.5, []
    for t in range(3):
        before.append(c)
        c = np.sin(c) + t
    np.testing.assert_allclose(program.value("0"), c, rtol=EXACT)
    np.testing.assert_allclose(program.value("1"), before, rtol=EXACT)


def test_the_steps_of_a_reversed_scan_have_the_numbers_of_what_they_read():
    def run(xs):
        def step(c, x):
            return fnet.tap("c", c + x), None

        return jax.lax.scan(step, jnp.zeros(()), xs, reverse=True)[0]

    xs = np.array([1.0, 10.0, 100.0])
    program = program_of(run, xs)
    assert {name: float(program.value(name)) for name in program.marks} == {
        "forward:c@2": 100.0,
        "forward:c@1": 110.0,
        "forward:c@0": 111.0,
    }


def test_a_loop_within_a_loop_has_both_numbers():
    def run(xs):
        def outer(c, row):
            return jax.lax.scan(lambda c, x: (fnet.tap("c", c + x), None), c, row)[0], None

        return jax.lax.scan(outer, jnp.zeros(()), xs)[0]

    xs = np.arange(6.0).reshape(2, 3)
    program = program_of(run, xs)
    sums = np.cumsum(xs.ravel()).reshape(2, 3)
    assert {n: float(program.value(n)) for n in program.marks} == {
        f"forward:c@{i}.{j}": sums[i, j] for i in range(2) for j in range(3)
    }


def test_integers_and_keys_are_values_too():
    def run(key, i, x):
        a, b = jax.random.split(key)
        return jax.random.uniform(a, (2,), jnp.float64) + jax.random.uniform(b, (2,), jnp.float64) + x[i] * 2

    key = jax.random.key(5)
    program = program_of(run, key, 1, np.array([3.0, 4.0]))
    np.testing.assert_array_equal(program.value("arg/0"), np.asarray(jax.random.key_data(key)))
    assert program.value("arg/1").dtype.kind == "i" and program.value("arg/1") == 1
    with jax.enable_x64(True):
        a, b = jax.random.split(key)
        expected = jax.random.uniform(a, (2,), jnp.float64) + jax.random.uniform(b, (2,), jnp.float64) + 8
    np.testing.assert_array_equal(program.value(""), expected)


def test_each_value_is_what_its_operation_gives_and_comes_before_it_is_read(mazur):
    for program in (mazur.by_hand, mazur.autodiff):
        known = {*program.given.values(), *program.constants}
        for eqn in program.equations:
            assert known >= {*eqn.inputs}
            assert known.isdisjoint(eqn.outputs)
            known.update(eqn.outputs)
        assert known == {*range(len(program.values))}


def test_an_operation_knows_the_line_of_its_layer(mazur):
    [line] = {line for eqn in mazur.by_hand.equations if eqn.primitive == "logistic" for line in eqn.lines[:1]}
    assert line[0].endswith("fnet/layers/activation.py")
    files = {file for eqn in mazur.by_hand.equations for file, _ in eqn.lines}
    assert not any("/jax/" in file or "gradcheck" in file or file.endswith("children.py") for file in files)
