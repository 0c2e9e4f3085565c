"""The experiments with backwards by hand under the audit: their verdicts, and their formulas against NumPy."""

from __future__ import annotations

import ast
import inspect
import io
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnet
from experiments import backprop_by_hand as hand
from experiments import deep_equilibrium as equilibrium
from experiments import textbook_backprop as textbook
from fnet.layers import dense

pytestmark = pytest.mark.long


def printed(experiment, **options):
    """What the experiment returns, and what it prints."""
    text = io.StringIO()
    return experiment.run(experiment.Config(**options), Console(file=text, width=160)), text.getvalue()


DIFFERENTIATION = {"grad", "value_and_grad", "vjp", "jvp", "linearize", "jacrev", "jacfwd", "intermediate_gradients"}


@pytest.mark.parametrize("function", [hand.by_hand, textbook.backward], ids=lambda f: f.__module__)
def test_the_derivation_differentiates_nothing(function):
    nodes = list(ast.walk(ast.parse(inspect.getsource(function))))
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}
    assert "forward" in used and not used & DIFFERENTIATION


# --- the character model by hand -------------------------------------------------------------------------------------

BACKWARD = [
    *(
        "loss",
        "picked",
        "logs",
        "probabilities",
        "share",
        "total",
        "exponentials",
        "shifted",
        "largest",
    ),  # cross-entropy
    *("logits", "hidden", "preactivation"),
    *("scaled", "normalised", "inverse", "deviation", "variance", "square", "difference", "mean"),  # normalisation
    *("affine", "product", "flat", "embedded"),
]


@pytest.fixture(scope="module")
def hand_run():
    # 28 divides 532, so each training compiles one program
    return printed(hand, batch_size=28, epochs=4)


def test_every_gradient_by_hand_passes_in_the_order_of_the_backward(hand_run):
    report = hand_run[0]["right"]
    assert report.ok and report.first_wrong == ""
    assert [value.name for value in report.intermediates] == BACKWARD
    # the largest logit's is zero up to rounding, so that no digit of it can agree
    assert max(value.relative for value in report.intermediates if value.name != "largest") < 1e-13
    assert {leaf.path for leaf in report.leaves} == {"table", "w1", "b1", "gain", "shift", "w2", "b2"}


def test_one_wrong_line_is_the_first_wrong_one_and_what_lies_before_it_is_right(hand_run):
    report, text = hand_run[0]["wrong"], hand_run[1]
    assert not report.ok and report.first_wrong == "difference"
    verdicts = {value.name: value.verdict for value in report.intermediates}
    # half of 2 Σ (z − μ) dσ² is missing everywhere, which is 0 in the sum: the mean's gradient does not suffer
    wrong = {"difference", "affine", "product", "flat", "embedded"}
    assert {name for name, verdict in verdicts.items() if verdict == "wrong"} == wrong
    assert {leaf.path for leaf in report.leaves if leaf.verdict == "wrong"} == {"table", "w1"}
    assert "first wrong at 'difference', the fault is in 'difference'" in text


def test_the_table_stands_in_the_order_of_the_backward(hand_run):
    first_words = [line.split()[0] for line in hand_run[1].splitlines() if line.strip()]
    assert [word for word in first_words if word in BACKWARD][: len(BACKWARD)] == BACKWARD


def test_the_compact_forms_are_the_long_way(hand_run):
    assert hand_run[0]["compact"].keys() == {"logits", "affine"}
    assert max(hand_run[0]["compact"].values()) < 1e-13


def test_training_by_hand_falls_like_training_by_autodiff(hand_run):
    by_hand, by_autodiff = hand_run[0]["losses"].values()
    assert by_hand.shape == (4,) and (np.diff(by_hand) < 0).all()
    assert by_hand[0] < np.log(25) and by_hand[-1] < 2.6  # a guess among 25 characters costs log 25 = 3.2
    np.testing.assert_allclose(by_hand, by_autodiff, rtol=1e-10)


@pytest.fixture(scope="module")
def small():
    """A small case, the gradients by hand as derived and with each fault, as NumPy arrays."""
    with jax.enable_x64(True):
        p = hand.draw(hand.Config(embedding=2, hidden=4), 6)
        inputs, targets = np.random.default_rng(1).integers(0, 6, (9, 3)), np.array([0, 1, 2, 3, 4, 5, 5, 0, 2])
        every = jax.jit(lambda p, x, y: {str(fault): hand.by_hand(p, x, y, fault) for fault in (None, *hand.FAULTS)})
        found = jax.device_get(every(p, jnp.asarray(inputs), jnp.asarray(targets)))
    return jax.device_get(p), inputs, targets, found


def test_batch_normalisation_cross_entropy_and_all_parameters_agree_with_numpy(small):
    p, inputs, targets, found = small
    grads, d = found["None"]
    rows = len(targets)
    flat = p["table"][inputs].reshape(rows, -1)
    z = flat @ p["w1"] + p["b1"]
    s = np.sqrt(z.var(0, ddof=1) + 1e-5)
    centred = z - z.mean(0)
    h = np.tanh(p["gain"] * centred / s + p["shift"])
    logits = h @ p["w2"] + p["b2"]
    odds = np.exp(logits)
    d_logits = (odds / odds.sum(1, keepdims=True) - np.eye(6)[targets]) / rows
    np.testing.assert_allclose(d["logits"], d_logits, rtol=1e-10, atol=1e-15)

    d_pre = d_logits @ p["w2"].T * (1 - h**2)
    d_normalised = d_pre * p["gain"]
    # ∂n_i/∂z_j = (δ_ij − 1/B)/s − (z_i − μ)(z_j − μ) / ((B − 1) s³), the whole Jacobian for each unit
    d_z = np.empty_like(z)
    for k in range(z.shape[1]):
        jacobian = (np.eye(rows) - 1 / rows) / s[k] - np.outer(centred[:, k], centred[:, k]) / ((rows - 1) * s[k] ** 3)
        d_z[:, k] = jacobian.T @ d_normalised[:, k]
    np.testing.assert_allclose(d["affine"], d_z, rtol=1e-10, atol=1e-15)

    d_table = np.zeros_like(p["table"])
    np.add.at(d_table, inputs, (d_z @ p["w1"].T).reshape(rows, 3, 2))
    expected = {
        "table": d_table,
        "w1": flat.T @ d_z,
        "b1": np.zeros((1, 4)),  # what it adds the mean takes off again
        "gain": (d_pre * centred / s).sum(0, keepdims=True),
        "shift": d_pre.sum(0, keepdims=True),
        "w2": h.T @ d_logits,
        "b2": d_logits.sum(0, keepdims=True),
    }
    assert grads.keys() == expected.keys()
    for name, e in expected.items():
        np.testing.assert_allclose(grads[name], e, rtol=1e-10, atol=1e-14, err_msg=name)


def test_the_gradient_of_the_largest_logit_is_nothing_but_rounding(small):
    assert abs(small[-1]["None"][1]["largest"]).max() < 1e-15


@pytest.mark.parametrize("fault", hand.FAULTS)
def test_each_fault_is_in_the_line_that_it_names(small, fault):
    (grads, d), (wrong_grads, wrong_d) = (small[-1][which] for which in ("None", fault))

    def differs(a, b):
        return abs(a - b).max() > 1e-3 * abs(a).max()

    first = [name for name in BACKWARD if differs(d[name], wrong_d[name])][:1]
    assert (first or [name for name in grads if differs(grads[name], wrong_grads[name])]) == [hand.FAULTS[fault][0]]


def test_every_fault_is_an_option():
    assert set(get_args(get_type_hints(hand.Config)["fault"])) == hand.FAULTS.keys()


def test_the_words_are_the_zens_and_their_contexts_reach_back_three_characters():
    words = hand.read_words()
    assert words[:5] == ["the", "zen", "of", "python", "by"] and len(words) == len(set(words)) == 87
    inputs, targets = hand.contexts(["abca"], ".abc")[:2]
    assert inputs.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 1]]
    assert targets.tolist() == [1, 2, 3, 1, 0]


@pytest.mark.parametrize("batch_size", [1, 59])  # 532 = 9 · 59 + 1
def test_a_batch_without_a_variance_is_refused(batch_size):
    with pytest.raises(SystemExit, match="no variance"):
        hand.run(hand.Config(batch_size=batch_size), Console(quiet=True))


# --- the texts' recursion --------------------------------------------------------------------------------------------

RIGHT = [
    "sigmoid, binary cross-entropy",
    "softmax, categorical cross-entropy",
    "linear, half squared error",
    "sigmoid, squared error, δ[L] corrected",
    "step in the hidden layers, slope 0",
]
FIRST_WRONG = {
    "linear, squared error": "z2",
    "sigmoid, half squared error": "z2",
    "sigmoid, squared error": "z2",
    "step in the hidden layers, slope σ′": "z1",
}


@pytest.fixture(scope="module")
def textbook_run():
    return printed(textbook)


def test_the_texts_recursion_passes_where_it_is_right_and_is_rejected_where_it_is_not(textbook_run):
    reports = textbook_run[0]["reports"]
    assert reports.keys() == {*RIGHT, *FIRST_WRONG}
    assert [name for name, report in reports.items() if report.ok] == RIGHT
    assert {name: report.first_wrong for name, report in reports.items() if not report.ok} == FIRST_WRONG
    printed_rows = [
        line.split("  ") for line in textbook_run[1].splitlines() if "passes  " in line or "rejected  " in line
    ]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in printed_rows]
    assert {row[0]: row[1] for row in rows} == {
        **dict.fromkeys(RIGHT, "passes"),
        **dict.fromkeys(FIRST_WRONG, "rejected"),
    }


def test_the_layers_before_a_wrong_hidden_slope_are_not_blamed(textbook_run):
    leaves = textbook_run[0]["reports"]["step in the hidden layers, slope σ′"].leaves
    assert {leaf.path for leaf in leaves if leaf.verdict == "wrong"} == {"layer_1/W", "layer_1/b"}


def test_the_audit_names_the_missing_factor(textbook_run):
    reports = textbook_run[0]["reports"]
    assert "factor 0.5" in textbook.cause(reports["linear, squared error"])
    assert "missing derivative of logistic" in textbook.cause(reports["sigmoid, half squared error"])


def network(name, params, x, y):
    """The cost of a case and its output layer's z, in NumPy."""

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    hidden = (lambda z: (z >= 0) * 1.0) if name.startswith("step") else sigmoid
    z = params["layer_2"]["W"] @ hidden(params["layer_1"]["W"] @ x + params["layer_1"]["b"]) + params["layer_2"]["b"]
    error = sigmoid(z) - y
    if name.startswith("softmax"):
        costs = -(y * np.log(np.exp(z) / np.exp(z).sum(0)))
    elif name.startswith("linear"):
        costs = (z - y) ** 2 / (2 if "half" in name else 1)
    elif "squared" in name:
        costs = error**2 / (2 if "half" in name else 1)
    else:
        costs = -np.log(np.where(y == 1, sigmoid(z), 1 - sigmoid(z)))
    return costs.sum(0).mean(), z


@pytest.mark.parametrize("name", [*RIGHT, *FIRST_WRONG])
def test_the_verdicts_are_those_of_central_differences_in_numpy(textbook_run, name, x64):
    example = textbook.example(textbook.Config())
    grads, _ = jax.device_get(textbook.recursion(textbook.CASES[name], *example))
    params, x, y = jax.tree.map(np.array, example)  # copies, to be written to
    agrees = {}
    for layer, leaf in ((layer, leaf) for layer in params for leaf in "Wb"):
        array, slopes = params[layer][leaf], []
        for index in np.ndindex(array.shape):
            kept, ends = array[index], []
            for array[index] in (kept + 1e-6, kept - 1e-6):
                ends.append(network(name, params, x, y)[0])
            array[index] = kept
            slopes.append((ends[0] - ends[1]) / 2e-6)
        claimed = grads[layer][leaf].ravel()
        agrees[f"{layer}/{leaf}"] = bool(np.abs(claimed - slopes).max() < 1e-7)
    report = textbook_run[0]["reports"][name]
    assert agrees == {leaf.path: leaf.verdict == "ok" for leaf in report.leaves}
    assert all(agrees.values()) == (name in RIGHT)


def test_what_the_texts_squared_error_lacks_is_twice_the_slope_of_the_sigmoid(textbook_run, x64):
    factor = textbook_run[0]["factor"]
    _, z = network("sigmoid, squared error", *jax.device_get(textbook.example(textbook.Config())))
    twice_the_slope = 2 * np.exp(-z) / (1 + np.exp(-z)) ** 2
    np.testing.assert_allclose(factor["expected"], factor["claimed"] * twice_the_slope, rtol=1e-12)
    for name in ("expected / claimed", "2 σ′(z)"):
        np.testing.assert_allclose(factor[name], twice_the_slope, rtol=1e-12)


def test_nothing_comes_back_through_the_step(textbook_run):
    largest = textbook_run[0]["through the step"]
    assert largest["layer_1"] == 0 and largest["layer_2"] > 0.01


# --- a layer that is a fixed point -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def equilibrium_run():
    return printed(equilibrium, epochs=2, limits=(25, 100), tolerances=(1e-1, 1e-14), features=8)


def test_a_fixed_point_and_its_gradients_are_those_of_the_solved_equations(x64):
    rng, features = np.random.default_rng(0), 3
    layer = equilibrium.deep_equilibrium(equilibrium.cell(dense(features)))
    x, dy = rng.normal(size=(2, 4, features))
    w, b = 0.3 * rng.normal(size=(2 * features, features)), rng.normal(size=features)
    params = {"inner": {"concatenate_0": (), "dense_0": {"w": w, "b": b}, "tanh_0": ()}}
    _, state = layer.init(jax.random.key(0), jnp.asarray(x))
    params = jax.tree.map(jnp.asarray, params)
    y, _, residuals = layer.forward(params, state, jnp.asarray(x))
    z = np.asarray(y)
    np.testing.assert_allclose(z, np.tanh(np.concatenate([z, x], 1) @ w + b), rtol=1e-13)
    dw, db, dx = np.zeros_like(w), np.zeros_like(b), np.zeros_like(x)
    for i in range(len(x)):
        slope = 1 - z[i] ** 2  # z = tanh(a), a = z W + x V + b, so that ∂f/∂z = W diag(slope)
        u = np.linalg.solve(np.eye(features) - w[:features] * slope, dy[i])
        dw += np.outer(np.concatenate([z[i], x[i]]), slope * u)
        db += slope * u
        dx[i] = w[features:] @ (slope * u)
    by_hand = layer.backward(params, residuals, jnp.asarray(dy))
    by_autodiff = jax.vjp(lambda p, x: layer.forward(p, state, x)[0], params, jnp.asarray(x))[1](jnp.asarray(dy))
    for dparams, d in (by_hand, by_autodiff):
        found = dparams["inner"]["dense_0"]
        for actual, expected in ((found["w"], dw), (found["b"], db), (d, dx)):
            np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


def test_examples_that_do_not_come_to_rest_are_nan_and_the_others_are_not():
    spread = jnp.array([[0.5], [1.5]])
    z, steps = jax.jit(lambda z: equilibrium.fixed_point(lambda z: spread * z + 1, z, None, 60))(jnp.zeros((2, 1)))
    np.testing.assert_allclose(z, [[2.0], [np.nan]], rtol=1e-5)
    assert steps == 60
    # one entry is at rest long before the other
    z, _ = equilibrium.fixed_point(lambda z: z * jnp.array([[0.1, 0.8]]) + 1, jnp.zeros((1, 2)), None, 100)
    np.testing.assert_allclose(z, [[10 / 9, 5.0]], rtol=1e-4)
    z, steps = equilibrium.fixed_point(lambda z: 0.5 * z + jnp.nan, jnp.zeros((1, 1)), None, 5)
    assert np.isnan(z).all() and steps == 5
    z, steps = equilibrium.fixed_point(lambda z: 0.5 * z, jnp.zeros((2, 1)), None, 60)  # at rest from the start
    assert not z.any() and steps == 1
    slope = jax.grad(lambda a: equilibrium.fixed_point(lambda z: a * z + 1, jnp.zeros((1, 1)), None, 20)[0].sum())
    assert np.isnan(slope(1.5)) and np.isfinite(slope(0.1))


def test_the_audit_passes_the_solved_gradient_and_names_the_one_that_is_not(equilibrium_run):
    result, text = equilibrium_run
    assert {name: report.ok for name, report in result["reports"].items()} == {
        "solved": True,
        "solved, in a model": True,
        "u = dy": False,
        "u = dy, in a model": False,
    }
    assert result["reports"]["u = dy, in a model"].first_wrong == "equilibrium/inputs"
    assert "truncated through" in text and text.count("passes") == text.count("rejected") == 2


def test_the_steps_gradient_nears_that_of_the_point_and_by_hand_no_memory_grows(equilibrium_run):
    result, _ = equilibrium_run
    steps, apart = zip(*result["apart"].values(), strict=True)
    assert list(steps) == sorted(steps) and list(apart) == sorted(apart, reverse=True)
    assert apart[0] > 1e-3 and apart[-1] < 1e-13
    memory = {key: bytes_held for key, (bytes_held, _) in result["cost"].items()}
    assert memory[25, "by hand"] == memory[100, "by hand"] < memory[25, "by autodiff"] / 2
    assert memory[100, "by autodiff"] > 3 * memory[25, "by autodiff"]


def test_both_right_gradients_train_alike(equilibrium_run):
    trained = equilibrium_run[0]["trained"]
    np.testing.assert_allclose(trained["by hand"]["loss"], trained["by autodiff"]["loss"], rtol=1e-4)
    assert all(r["loss"][1] < r["loss"][0] < np.log(10) + 0.3 for r in trained.values())


def test_a_layer_that_changes_the_shape_has_no_fixed_point(key):
    layer = fnet.serial(("still", equilibrium.deep_equilibrium(equilibrium.cell(dense(5)))))
    with pytest.raises(fnet.LayerError, match=r"^still: expected outputs like the inputs"):
        layer.init(key, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="deep_equilibrium: limit = 0; expected at least 1"):
        equilibrium.deep_equilibrium(dense(4), limit=0)
