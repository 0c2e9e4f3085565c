"""The experiments with worked numbers: what `run` returns, against the sources' numbers and NumPy."""

from __future__ import annotations

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import keras_example, mazur, next_token, perceptron

pytestmark = pytest.mark.long


def printed(experiment, **options):
    """What the experiment returns, and what it prints."""
    text = io.StringIO()
    return experiment.run(experiment.Config(**options), Console(file=text, width=120)), text.getvalue()


# --- Mazur -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mazur_run():
    return printed(mazur)


# every digit of Mazur's example that was recomputed, and of those that he prints
MAZUR = {
    "E0": "0.298371109",
    "∂E/∂w5": "0.082167041",
    "∂E/∂w1": "0.000438568",
    "w5+": "0.35891648",
    "w6+": "0.40866619",
    "w7+": "0.51130127",
    "w8+": "0.56137012",
    "w1+": "0.14978072",
    "w2+": "0.19956143",
    "w3+": "0.24975114",
    "w4+": "0.29950229",
    "E1": "0.2910278",
    "E at 10,000": "0.000035102",
    "b1 at 10,000": "0.35",
    "b2 at 10,000": "0.60",
}


@pytest.mark.parametrize("engine", ["by hand", "by autodiff"])
@pytest.mark.parametrize("quantity", MAZUR)
def test_mazur_agrees_in_every_digit(mazur_run, quantity, engine):
    value, digits = mazur_run[0][engine][quantity], MAZUR[quantity]
    assert f"{value:.{len(digits.split('.')[1])}f}" == digits


def test_mazur_engines_agree_in_float64(mazur_run):
    by_hand, by_autodiff = mazur_run[0]["by hand"], mazur_run[0]["by autodiff"]
    assert by_hand.keys() == by_autodiff.keys() and len(by_hand) == 17
    for quantity, value in by_hand.items():
        assert value == pytest.approx(by_autodiff[quantity], rel=1e-11), quantity


def mazur_in_numpy(updates, late=False):
    """E and outputs after each update; ``late`` takes the hidden gradient through the updated output weights."""
    w, v = np.array([[0.15, 0.25], [0.20, 0.30]]), np.array([[0.40, 0.50], [0.45, 0.55]])
    x, t = np.array([0.05, 0.10]), np.array([0.01, 0.99])
    for _ in range(updates + 1):
        h = 1 / (1 + np.exp(-(x @ w + 0.35)))
        o = 1 / (1 + np.exp(-(h @ v + 0.60)))
        yield ((t - o) ** 2).sum() / 2, *o
        delta = (o - t) * o * (1 - o)
        new_v = v - 0.5 * np.outer(h, delta)
        w = w - 0.5 * np.outer(x, ((new_v if late else v) @ delta) * h * (1 - h))
        v = new_v


@pytest.mark.parametrize(("engine", "late"), [("by hand", False), ("by autodiff", False), ("the slip", True)])
def test_mazur_follows_numpy_through_10_000_updates(mazur_run, engine, late):
    column, trajectory = mazur_run[0][engine], list(mazur_in_numpy(10_000, late))
    assert column["E1"] == pytest.approx(trajectory[1][0], rel=1e-13)
    names = [f"{name} at 10,000" for name in ("E", "o1", "o2")]
    np.testing.assert_allclose([column[name] for name in names], trajectory[-1], rtol=1e-10)


def test_mazurs_last_numbers_are_the_slips_and_not_those_of_his_steps(mazur_run):
    columns, text = mazur_run
    for quantity in ("E1", "o1 at 10,000", "o2 at 10,000"):
        assert mazur.agrees(columns["the slip"][quantity], mazur.PRINTED[quantity])
        assert not mazur.agrees(columns["by hand"][quantity], mazur.PRINTED[quantity])
    for quantity in ("∂E/∂w1", "w1+", "w4+"):
        assert mazur.agrees(columns["by hand"][quantity], mazur.PRINTED[quantity])
        assert not mazur.agrees(columns["the slip"][quantity], mazur.PRINTED[quantity])
    assert f"{columns['the slip']['E at 10,000']:.9f}" == "0.000035085"
    rows = {line.split("  ")[1].strip(): line.count("✓") for line in text.splitlines() if "0." in line}
    assert rows["w1+"] == 2 and rows["E0"] == 3 and rows["E1"] == 1


# --- next token ------------------------------------------------------------------------------------------------------


@pytest.fixture
def token_run(tmp_path):
    return printed(next_token, run_dir=tmp_path, name="a")


def test_next_token_gives_the_exact_softmax_and_cross_entropy(token_run):
    r, text = token_run
    assert [f"{p:.6f}" for p in r["p"]] == ["0.511773", "0.062670", "0.046427", "0.379131"]
    assert f"{r['loss']:.6f}" == "0.669875"
    for number in ("0.511773", "0.52", "0.379131", "0.37", "0.669875", "0.65"):
        assert number in text


def test_next_token_gradient_is_softmax_minus_one_hot_by_both_ways(token_run):
    e = np.exp([3.2, 1.1, 0.8, 2.9])
    expected = e / e.sum() - [1, 0, 0, 0]
    np.testing.assert_allclose(token_run[0]["by_hand"], expected, rtol=1e-14)
    np.testing.assert_allclose(token_run[0]["by_autodiff"], expected, rtol=1e-14)


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_next_token_step_raises_the_target_and_lowers_the_loss(tmp_path, rate):
    r, _ = printed(next_token, run_dir=tmp_path, name="a", learning_rate=rate)
    e = np.exp([3.2, 1.1, 0.8, 2.9])
    z = np.log(e) - rate * (e / e.sum() - [1, 0, 0, 0])
    np.testing.assert_allclose(r["logits_after"], z, rtol=1e-14)
    np.testing.assert_allclose(r["p_after"], np.exp(z) / np.exp(z).sum(), rtol=1e-14)
    assert r["loss_after"] == pytest.approx(-np.log(np.exp(z[0]) / np.exp(z).sum()), rel=1e-14)
    assert r["p_after"][0] > r["p"][0] and (r["p_after"][1:] < r["p"][1:]).all() and r["loss_after"] < r["loss"]


def test_no_sum_of_the_right_exponentials_gives_what_the_text_prints(token_run):
    """By trying sums: what azul wants and what blanco wants do not meet, and the true sum lies between."""
    e, sums = np.exp([3.2, 1.1, 0.8, 2.9]), np.linspace(40, 55, 15_001)
    tried = np.abs(e[:, None] / sums - np.array([[0.52], [0.06], [0.05], [0.37]])) < 0.005
    for (low, high), fits in zip(token_run[0]["sums"], tried, strict=True):
        np.testing.assert_allclose([low, high], [sums[fits].min(), sums[fits].max()], atol=0.001)
    assert not tried.all(0).any()
    assert token_run[0]["sums"][0][1] < e.sum() < token_run[0]["sums"][3][0]


def test_one_wrong_exponential_explains_what_the_text_prints(token_run):
    """By trying values of each e^z in turn."""
    e, values = np.exp([3.2, 1.1, 0.8, 2.9]), np.linspace(0.001, 60, 60_000)
    for i, alone in enumerate(token_run[0]["alone"]):
        terms = np.tile(e[:, None], len(values))
        terms[i] = values
        fits = (np.abs(terms / terms.sum(0) - np.array([[0.52], [0.06], [0.05], [0.37]])) < 0.005).all(0)
        assert (alone is None) == (not fits.any()) == (i in (1, 2))
        if alone:
            np.testing.assert_allclose(alone, [values[fits].min(), values[fits].max()], atol=0.002)


# --- perceptron ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perceptron_run(tmp_path_factory):
    return printed(perceptron, run_dir=tmp_path_factory.mktemp("runs"), name="a")[0]


@pytest.mark.parametrize("name", ["AND", "OR", "XOR"])
def test_rosenblatts_rule_is_numpys(perceptron_run, name):
    targets, w = {"AND": [0, 0, 0, 1], "OR": [0, 1, 1, 1], "XOR": [0, 1, 1, 0]}[name], np.zeros(3, int)
    for weights, errors in zip(
        perceptron_run["rule"][name]["weights"], perceptron_run["rule"][name]["errors"], strict=True
    ):
        wrong = 0
        for x, y, after in zip([(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)], targets, weights, strict=True):
            answer = int(w @ x >= 0)
            wrong += answer != y
            w = w + (y - answer) * np.array(x)
            assert (after == w).all()
        assert errors == wrong


@pytest.mark.parametrize("name", ["AND", "OR"])
def test_the_perceptron_converges_on_and_and_or(perceptron_run, name):
    r = perceptron_run["rule"][name]
    assert 0 < r["learned_after"] < 10
    assert r["errors"][r["learned_after"] - 1] > 0 and not r["errors"][r["learned_after"] :].any()
    assert (r["weights"][r["learned_after"] :] == r["weights"][-1, -1]).all()


def test_the_perceptron_never_learns_xor(perceptron_run):
    r, (epoch, before) = perceptron_run["rule"]["XOR"], perceptron_run["first_return"]
    assert r["learned_after"] is None and len(r["errors"]) == 1000 and r["errors"].min() > 0
    ends = r["weights"][:, -1]
    assert (ends[epoch - 1] == ends[before - 1]).all()
    period = epoch - before
    np.testing.assert_array_equal(ends[before - 1 + period :], ends[before - 1 : -period])
    assert len(np.unique(r["weights"][-1], axis=0)) > 1  # it moves within an epoch


def test_a_hidden_layer_learns_xor_by_both_engines(perceptron_run):
    by_autodiff, by_hand = (perceptron_run["hidden"][engine] for engine in ("autodiff", "backprop"))
    for r in (by_autodiff, by_hand):
        assert r["right"].sum() == 4 and r["loss"][0] > 0.5 and r["loss"][-1] < 0.01
    np.testing.assert_allclose(by_hand["loss"][:10], by_autodiff["loss"][:10], rtol=1e-5)


def test_no_gradient_passes_the_step(perceptron_run):
    perceptron_norms, hidden_norms = perceptron_run["step_gradients"].values()
    for engine in ("autodiff", "backprop"):
        assert perceptron_norms[engine] == {"dense_0": 0, "all": 0}
        assert hidden_norms[engine]["dense_0"] == 0 and hidden_norms[engine]["dense_1"] > 0.01
    assert (perceptron_run["folder"] / "regions.png").stat().st_size > 10_000


# --- Keras' example --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras_run(tmp_path_factory):
    return printed(keras_example, run_dir=tmp_path_factory.mktemp("runs"), name="a")


def test_keras_example_overfits_and_learns_nothing(keras_run):
    curves = keras_run[0]["history"].epochs
    assert len(curves["loss"]) == 50
    assert 2.3 < curves["loss"][0] < 2.8 and curves["loss"][-1] < 0.3
    assert curves["accuracy"][0] < 0.2 and curves["accuracy"][-1] > 0.99
    # of 200 random labels a guess gets 20 right, with a standard deviation of √(200 · 0.1 · 0.9) = 4.2
    assert (np.abs(curves["validation_accuracy"] - 0.1) < 4 * 4.2 / 200).all()
    assert curves["validation_loss"][-1] > np.log(10)


def test_keras_example_holds_out_the_last_rows_before_any_shuffle(keras_run):
    r = keras_run[0]
    whole = keras_example.random_data(keras_example.Config(), keras_example.stream(jax.random.key(0), "data"))
    assert (r["training"].inputs.shape, r["validation"].inputs.shape) == ((800, 784), (200, 784))
    for part, rows in (("training", slice(0, 800)), ("validation", slice(800, 1000))):
        np.testing.assert_array_equal(r[part].inputs, whole.inputs[rows])
        np.testing.assert_array_equal(r[part].targets, whole.targets[rows])
    assert len(r["history"].steps["loss"]) == 50 * 25


def test_keras_example_data_are_standard_normal_with_even_classes(keras_run):
    inputs, targets = np.asarray(keras_run[0]["training"].inputs), np.asarray(keras_run[0]["training"].targets)
    assert abs(inputs.mean()) < 5 / np.sqrt(inputs.size) and abs(inputs.std() - 1) < 5 / np.sqrt(2 * inputs.size)
    assert (targets.sum(1) == 1).all() and set(np.unique(targets)) == {0, 1}
    assert (np.abs(targets.sum(0) - 80) < 5 * np.sqrt(800 * 0.1 * 0.9)).all()


def test_keras_example_prints_the_claims_beside_the_measured_and_writes_the_run(keras_run):
    r, text = keras_run
    curves, lines = r["history"].epochs, text.splitlines()
    for epoch, loss, accuracy in ((1, "2.3", "10%"), (10, "1.5", "40%"), (50, "0.3", "90%")):
        measured = f"{curves['loss'][epoch - 1]:.4f}", f"{curves['accuracy'][epoch - 1]:.1%}"
        held_out = f"{curves['validation_loss'][epoch - 1]:.4f}", f"{curves['validation_accuracy'][epoch - 1]:.1%}"
        row = [str(epoch), "≈", loss, measured[0], "≈", accuracy, measured[1], *held_out]
        assert row in [line.split() for line in lines]
    assert "labels are random" in text and "overfitting" in text
    lines = (r["folder"] / "training" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "epoch"]
    assert [row["epoch"] for row in rows] == list(range(1, 51))
    np.testing.assert_array_equal([row["validation_accuracy"] for row in rows], curves["validation_accuracy"])
    assert {"gradient_norm/dense_0", "gradient_norm/dense_2", "learning_rate", "accuracy"} <= rows[0].keys()
    assert json.loads((r["folder"] / "config.json").read_text())["batch_size"] == 32
    assert (r["folder"] / "curves.png").stat().st_size > 10_000
