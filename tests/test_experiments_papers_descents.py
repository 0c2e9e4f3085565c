"""The published results double_descent and grokking: what must hold of them at any size."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnet
from experiments import double_descent
from experiments.common import main

pytestmark = pytest.mark.long


def run_quietly(experiment, folder, **settings):
    """The experiment's results, and what it printed."""
    text = io.StringIO()
    config = experiment.Config(run_dir=folder, **settings)
    return experiment.run(config, Console(file=text, width=200)), text.getvalue()


# --- double descent --------------------------------------------------------------------------------------------------

TINY = {"features": (5, 60), "widths": (2,), "training": 30, "steps": 3, "seeds": (0, 1)}


@pytest.fixture(scope="module")
def descents(tmp_path_factory):
    return run_quietly(double_descent, tmp_path_factory.mktemp("runs"), name="test", **TINY)


@pytest.mark.parametrize("noise", [0.0, 0.15, 1.0])
def test_as_many_labels_are_wrong_as_was_asked_for_and_each_is_another_class(noise):
    labels = jnp.arange(1000) % 10
    found = np.asarray(double_descent.with_wrong_labels(jax.random.key(3), labels, noise))
    wrong = found != np.asarray(labels)
    assert wrong.sum() == round(1000 * noise) and found.min() >= 0 and found.max() <= 9
    steps = (found - np.asarray(labels))[wrong] % 10
    assert noise < 1 or set(steps) == set(range(1, 10))


def test_a_split_leaves_nothing_out_and_the_test_labels_alone():
    digits = fnet.data.sklearn_digits()
    config = double_descent.Config(training=500, noise=0.2)
    train, test = double_descent.split(config, jax.random.key(0), digits)
    inputs = np.concatenate([train.inputs, test.inputs])
    labels = np.concatenate([train.targets, test.targets])
    true = {x.tobytes(): int(y) for x, y in zip(np.asarray(digits.inputs), np.asarray(digits.targets), strict=True)}
    right = np.array([true.pop(x.tobytes()) == y for x, y in zip(inputs, labels, strict=True)])
    assert not true and (~right[:500]).sum() == 100 and right[500:].all()


@pytest.mark.parametrize(("kind", "width"), [("random features", 7), ("squared error", 7)])
def test_parameters_are_those_that_the_model_trains(kind, width):
    model = double_descent.random_features(width)[1] if kind == "random features" else fnet.mlp(width, 10)
    params, state = model.init(jax.random.key(0), jnp.zeros((1, 64)))
    batch = fnet.Batch(jax.random.uniform(jax.random.key(1), (20, 64)), jnp.arange(20) % 10)
    grads, _, _ = fnet.backprop(model, fnet.softmax_cross_entropy)(params, state, batch, jax.random.key(2))
    trained = sum(leaf.size for leaf in jax.tree.leaves(grads) if np.any(leaf))
    assert trained == double_descent.trained_parameters(kind, width)


def test_the_head_on_random_features_is_the_least_squares_solution_of_least_norm():
    config = double_descent.Config(training=30)
    with jax.enable_x64(True):
        digits = fnet.data.sklearn_digits()
        digits = digits._replace(inputs=jnp.asarray(digits.inputs, float))
        for width in (10, 100):
            key = jax.random.key(5)
            found = double_descent.fit_features(config, width)({}, key, digits)
            train, test = double_descent.split(config, key, digits)
            w = double_descent.random_features(width)[1].init(
                double_descent.stream(key, "model"), train.inputs[:1]
            )[0]["features"]["dense_0"]["w"]  # fmt: skip
            hidden, tested = (np.maximum(np.asarray(x) @ np.asarray(w), 0) for x in (train.inputs, test.inputs))
            head = np.linalg.pinv(hidden) @ np.eye(10)[np.asarray(train.targets)]
            assert float(found["head"]) == pytest.approx(np.linalg.norm(head), rel=1e-8)
            loss = 0.5 * ((tested @ head - np.eye(10)[np.asarray(test.targets)]) ** 2).sum(1).mean()
            assert float(found["test loss"]) == pytest.approx(loss, rel=1e-8)
            assert float(found["gradient"]) < 1e-10
            assert (found["training loss"] < 1e-20) == (width > 30)


def test_the_peak_is_found_between_the_two_descents():
    training = np.array([[0.5, 0.2, 0.1, 0.0, 0.0, 0.0], [0.5, 0.2, 0.0, 0.0, 0.0, 0.0]])
    test = np.array([[0.6, 0.3, 0.4, 0.8, 0.5, 0.2], [0.6, 0.5, 0.4, 0.6, 0.5, 0.4]])
    found = double_descent.find_descents((1, 2, 4, 8, 16, 32), training, test)
    assert found["threshold"] == 8
    for name, width, value in (("before", 2, 0.4), ("peak", 8, 0.7), ("after", 32, 0.3)):
        assert found[name] == (width, pytest.approx(value))
    never = double_descent.find_descents((1, 2, 4), np.ones((2, 3)), test[:, :3])
    assert never["threshold"] is None and never["before"][0] == 2


def test_by_the_other_engine_the_networks_are_the_same(descents, tmp_path):
    results, text = descents
    other, _ = run_quietly(double_descent, tmp_path, name="test", engine="autodiff", **TINY)
    for kind in ("random features", "squared error", "cross-entropy"):
        assert results[kind]["test error"].shape == (2, len(results[kind]["widths"]))
        np.testing.assert_allclose(results[kind]["test loss"], other[kind]["test loss"], rtol=1e-4)
    assert {path.name for path in results["folder"].iterdir()} == {"config.json", "results.json", "double_descent.png"}
    assert "30 digits, 20% wrong labels" in text


def test_a_training_set_of_all_digits_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--training 1797; expected fewer than 1797"):
        main(double_descent.run, double_descent.Config, ["--training", "1797", "--run-dir", str(tmp_path)])
    assert not list(tmp_path.rglob("*.json"))
