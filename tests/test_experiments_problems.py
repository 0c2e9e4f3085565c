"""The experiments on problems and their cures (S11): vanishing and exploding gradients, overfitting."""

from __future__ import annotations

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnet
from experiments import adding_problem, overfitting, vanishing_gradients
from fnet.layers import relu

pytestmark = pytest.mark.long


def run_quietly(experiment, folder, **settings):
    """The experiment's results and what it printed."""
    text = io.StringIO()
    results = experiment.run(experiment.Config(run_dir=folder, name="test", **settings), Console(file=text, width=200))
    return results, text.getvalue()


def softmax_error(logits, labels):
    """∂(mean cross-entropy)/∂logits."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    return (p / p.sum(1, keepdims=True) - np.eye(10)[labels]) / len(labels)


def lengths(matrices):
    return [np.sqrt((m**2).sum()) for m in matrices]


# --- vanishing gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["plain", "residual"])
def test_norms_by_layer_are_those_of_numpy(structure, x64):
    config = vanishing_gradients.Config(units=6)
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((5, 64)), rng.integers(0, 10, 5)
    keys, depth = jax.vmap(jax.random.key)(jnp.array([0, 1])), 4
    found = vanishing_gradients.start_norms(
        config, structure, "tanh", depth, fnet.Batch(jnp.array(x), jnp.array(labels)), keys
    )
    assert found["apart"].shape == (len(vanishing_gradients.CURES[structure]), 2, depth)
    assert found["apart"].max() < 1e-12
    params, _ = vanishing_gradients.draw_starts(config, structure, "tanh", depth, jnp.array(x), keys)
    params = jax.tree.map(lambda leaf: np.asarray(leaf[0, 1]), params)  # the first start, the second seed
    w = [params["first"]["dense_0"]["w"], *params["blocks"]["block"]["dense_0"]["w"]]
    skip = structure == "residual"
    z, inputs = [x @ w[0]], [x]
    for m in w[1:]:
        inputs.append(np.tanh(z[-1]))
        z.append(inputs[-1] @ m + skip * z[-1])
    head = params["head"]["w"]
    delta = [(softmax_error(np.tanh(z[-1]) @ head, labels) @ head.T) * (1 - np.tanh(z[-1]) ** 2)]
    for m, below in zip(w[:0:-1], z[-2::-1], strict=True):
        delta.insert(0, (delta[0] @ m.T) * (1 - np.tanh(below) ** 2) + skip * delta[0])
    np.testing.assert_allclose(found["delta"][0, 1], lengths(delta), rtol=1e-10)
    dw = [h.T @ d for h, d in zip(inputs, delta, strict=True)]
    np.testing.assert_allclose(found["weights"][0, 1], lengths(dw), rtol=1e-10)


def test_the_factor_is_what_each_layer_multiplies_by():
    delta = np.array([[0.3**4, 0.3**3, 0.3**2, 0.3, 1.0], [16.0, 8.0, 4.0, 2.0, 1.0]])
    np.testing.assert_allclose(vanishing_gradients.factor(delta), [0.3, 2.0], rtol=1e-12)


def test_the_best_rate_is_never_one_that_diverged():
    losses = np.array([[[3.0, math.nan], [3.0, 2.0], [3.0, 1.0]], [[3.0, 0.1], [3.0, 2.0], [3.0, 1.2]]])
    assert vanishing_gradients.best_rate(losses) == 2


def test_the_gradient_through_time_is_that_of_numpy():
    key = jax.random.key(3)
    batch = adding_problem.adding_problem(key, 5, 6)
    x, sums = np.asarray(batch.inputs, np.float64), np.asarray(batch.targets, np.float64)
    for gain, found in adding_problem.time_norms(4, (0.5, 1.5), batch, key).items():
        params, _ = adding_problem.make_recurrent(4, gain).init(key, batch.inputs)
        w_x, head = (np.asarray(w, np.float64) for w in (params["rnn_0"]["input"]["w"], params["dense_0"]["w"]))
        np.testing.assert_allclose(params["rnn_0"]["recurrent"]["w"], gain * np.eye(4), rtol=1e-6)
        h = [np.zeros((5, 4))]
        for t in range(6):
            h.append(np.maximum(x[:, t] @ w_x + gain * h[-1], 0))
        dh, expected = 2 * (h[-1] @ head - sums) / 5 @ head.T, []
        for t in range(6, 0, -1):
            dz = dh * (h[t] > 0)
            expected.insert(0, np.sqrt(((dz @ w_x.T) ** 2).sum()))
            dh = gain * dz
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_adding_problem_marks_one_number_in_each_half():
    x, y = (np.asarray(a) for a in adding_problem.adding_problem(jax.random.key(0), 4000, 10)[:2])
    marks = x[..., 1]
    np.testing.assert_array_equal(marks[:, :5].sum(1), 1)
    np.testing.assert_array_equal(marks[:, 5:].sum(1), 1)
    np.testing.assert_allclose(y[:, 0], x[..., 0][marks == 1].reshape(4000, 2).sum(1), rtol=1e-6)
    # the sum of two even numbers from 0..1 has variance 2/12; of 4000 sums it is known to 2%, five times which is 10%
    assert y.var() == pytest.approx(1 / 6, rel=0.1)


def test_a_single_layer_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(SystemExit, match="expected at least 2"):
        vanishing_gradients.run(vanishing_gradients.Config(depths=(1, 5), run_dir=tmp_path))
    with pytest.raises(SystemExit, match="length = 1"):
        vanishing_gradients.run(vanishing_gradients.Config(length=1, run_dir=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_vanishes_and_explodes_is_printed_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(vanishing_gradients, "ACTIVATIONS", {"relu": relu()})
    monkeypatch.setattr(vanishing_gradients, "CURES", {"plain": ("small", "large")})
    settings = {"depths": (8,), "train_depth": 3, "units": 16, "epochs": 1, "test_size": 1697, "length": 4}
    settings |= {"sequences": 64, "recurrent_units": 4, "recurrent_epochs": 1, "recurrent_rates": (0.01,)}
    results, text = run_quietly(vanishing_gradients, tmp_path, rates=(0.1,), seeds=(0, 1), **settings)
    names = {path.name for path in results["folder"].iterdir()}
    assert names == {"config.json", "depth.png", "recurrent.png", "results.json"}
    small, large = (results["start"]["relu", f"naive, {size}", 8]["delta"] for size in ("small", "large"))
    # s √(n / 2) = 0.141 and 1.41, with a spread of some 10% for 16 units
    assert vanishing_gradients.factor(small) == pytest.approx([0.141, 0.141], rel=0.4)
    assert vanishing_gradients.factor(large) == pytest.approx([1.41, 1.41], rel=0.4)
    assert "(expected 0.141)" in text and "(expected 1.414)" in text
    written = json.loads((results["folder"] / "results.json").read_text())
    loss = results["deep"]["relu", "naive, small"]["loss"]  # (seeds, rates, E)
    assert written["deep"]["relu, naive, small"]["training loss"][0] == pytest.approx(loss[:, 0, -1].mean())


# --- overfitting -----------------------------------------------------------------------------------------------------


def test_bias_variance_and_noise_add_up_to_the_error():
    rng = np.random.default_rng(1)
    truth = np.linspace(-1, 1, 50)
    learned = truth[None] + 0.2 + 0.5 * rng.standard_normal((400, 50))
    d = overfitting.decompose(learned, truth, 0.3, rng)
    # 400 · 50 draws: 0.5² is known to 1% (√(2 / 20,000)), five times which is 5%; bias² holds 1/400 of the variance
    assert d["bias²"] == pytest.approx(0.04 + 0.25 / 400, rel=0.1)
    assert d["variance"] == pytest.approx(0.25, rel=0.05) and d["noise"] == pytest.approx(0.09)
    assert d["bias²"] + d["variance"] == pytest.approx(((learned - truth[None]) ** 2).mean(), rel=1e-12)
    assert abs(d["measured"] - d["sum"]) < 5 * d["spread"]


def test_decay_shrinks_matrices_beside_the_gradient():
    rng = np.random.default_rng(0)
    p, g = ({"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(2)} for _ in range(2))
    as_jax = [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree) for tree in (p, g)]
    optimizer = overfitting.decayed(fnet.sgd(0.1), 0.5)
    new, _ = optimizer.update(as_jax[1], optimizer.init(as_jax[0]), as_jax[0])
    np.testing.assert_allclose(new["w"], p["w"] - 0.1 * g["w"] - 0.1 * 0.5 * p["w"], rtol=1e-5)
    np.testing.assert_allclose(new["b"], p["b"] - 0.1 * g["b"], rtol=1e-5)


@pytest.mark.parametrize("experiment", ["overfitting", "vanishing_gradients"])
def test_no_digit_is_in_two_parts_of_a_split(experiment):
    if experiment == "overfitting":
        parts = overfitting.load(overfitting.Config(seeds=(0, 5)), 100, 50)
        assert [parts[name].targets.shape for name in parts] == [(2, 100), (2, 50), (2, 1647)]
    else:
        parts = vanishing_gradients.load(vanishing_gradients.Config(seeds=(0, 5)))
        assert [parts[name].targets.shape for name in parts] == [(2, 1400), (2, 397)]
    every = np.asarray(fnet.data.sklearn_digits().inputs)
    assert len(np.unique(every, axis=0)) == len(every)  # no digit is there twice, so its pixels name it
    for seed in range(2):
        together = np.concatenate([np.asarray(part.inputs[seed]) for part in parts.values()])
        np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(every, axis=0))
    assert not np.array_equal(parts["train"].inputs[0], parts["train"].inputs[1])


def test_labels_are_drawn_anew_for_the_share_asked_for():
    part = fnet.Batch(jnp.zeros((5000, 1)), jnp.full((5000,), 3))
    wrong = overfitting.mislabel(jax.random.key(0), 0.5, part)
    # of the half drawn anew a tenth is right by chance: 0.45 ± 0.007
    assert float((wrong.targets != 3).mean()) == pytest.approx(0.45, abs=0.035)
    np.testing.assert_array_equal(overfitting.mislabel(jax.random.key(0), 0.0, part).targets, part.targets)


def test_cures_are_chosen_by_the_validation_loss_alone():
    pairs = [(0.0, 0.0), (0.0, 0.3), (0.5, 0.0), (0.8, 0.0), (0.5, 0.3)]
    rng = np.random.default_rng(0)
    validation = rng.uniform(1, 2, (5, 3, 7))
    validation[2, :, -1], validation[3, :, -1] = 1.5, 1.2
    validation[0, :, :] = 1.9
    validation[0, [0, 1, 2], [4, 2, 0]] = 0.5
    curves = {"validation loss": validation, "test loss": rng.uniform(0, 9, (5, 3, 7))}
    found = overfitting.choose(pairs, curves)
    assert found["dropout"]["pair"] == (0.8, 0.0) and found["weight decay"]["pair"] == (0.0, 0.3)
    assert found["all three"]["pair"] == (0.5, 0.3) and found["none"]["pair"] == (0.0, 0.0)
    assert found["early stopping"]["epoch"].tolist() == [5, 3, 1] and found["none"]["epoch"].tolist() == [7, 7, 7]
    np.testing.assert_array_equal(found["early stopping"]["test loss"], curves["test loss"][0, [0, 1, 2], [4, 2, 0]])
    other = overfitting.choose(pairs, {**curves, "test loss": -curves["test loss"]})
    assert all(other[name]["pair"] == found[name]["pair"] for name in found)


@pytest.fixture(scope="module")
def overfit(tmp_path_factory):
    settings = {"sets": 3, "points": 5, "units": (1, 2), "updates": 5, "stop": 2, "widths": (4,), "sizes": (10, 20)}
    settings |= {"epochs": 3, "few": 20, "rates": (0.5,), "decays": (0.3,), "cure_epochs": 3, "seeds": (0, 1)}
    config = overfitting.Config(**settings)
    return *run_quietly(overfitting, tmp_path_factory.mktemp("runs"), **settings), config


def test_examples_of_weight_zero_are_as_if_they_were_not_there(overfit):
    results, _, config = overfit
    data = overfitting.load(config, 20)
    train, test = (jax.tree.map(lambda a: a[1], data[name]) for name in ("train", "test"))  # of seed 1
    some = fnet.data.take(train, np.arange(10))
    model = fnet.mlp(4, 10)._replace(name="serial")
    alone = overfitting.train_all(model, 0.0, jax.random.key(1), some, {"train": some, "test": test}, 3, config)
    for name, found in results["by_width"][4].items():
        np.testing.assert_allclose(found[0, 1], alone[name][-1], rtol=1e-4, err_msg=name)


def test_the_same_seeds_give_the_same_curves(overfit):
    results, _, config = overfit
    _, again = overfitting.cure_curves(config)
    for name, curve in results["curves"].items():
        np.testing.assert_array_equal(curve, again[name])
        assert curve.shape == (4, 2, 3)
    assert not np.array_equal(results["curves"]["train loss"][:, 0], results["curves"]["train loss"][:, 1])


def test_the_three_studies_are_printed_and_drawn(overfit):
    results, text, _ = overfit
    names = {path.name for path in results["folder"].iterdir()}
    assert names == {"config.json", "bias_variance.png", "digits.png", "results.json"}
    assert all(words in text for words in ("bias²", "4 hidden units", "early stopping", "all three", "must be below 4"))
    assert set(results["by_cure"]) == {"none", "early stopping", "dropout", "weight decay"}
    written = json.loads((results["folder"] / "results.json").read_text())
    assert written["units"]["2"]["variance"] == pytest.approx(results["by_units"][2]["learned"].var(0).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": 5, "updates": 5}, "stop = 5"),
        ({"sets": 1}, "sets = 1"),
        ({"rates": ()}, "no rates"),
    ],
)
def test_settings_that_leave_nothing_are_refused(settings, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        overfitting.run(overfitting.Config(run_dir=tmp_path, **settings))
    assert not list(tmp_path.iterdir())


def test_too_few_digits_to_test_on_are_refused():
    with pytest.raises(SystemExit, match="take fewer"):
        overfitting.load(overfitting.Config(), 1700, 97)
