"""The published results double_descent and grokking: what must hold of them at any size."""

from __future__ import annotations

import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnet
from experiments import double_descent, grokking
from experiments.common import main
from fnet.core.numerics import stream
from fnet.gradcheck import check_layer

pytestmark = pytest.mark.long


def run_quietly(experiment, folder, **settings):
    """The experiment's results, and what it printed."""
    text = io.StringIO()
    config = experiment.Config(run_dir=folder, **settings)
    return experiment.run(config, Console(file=text, width=200)), text.getvalue()


# --- double descent --------------------------------------------------------------------------------------------------

TINY = {"features": (5, 60), "widths": (2,), "training": 30, "updates": 3, "seeds": (0, 1)}


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
                stream(key, "model"), train.inputs[:1]
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


# --- grokking --------------------------------------------------------------------------------------------------------

SMALL = {"modulus": 7, "width": 12, "updates": 20, "every": 5, "decays": (0.0, 1.0), "seeds": (0, 1)}


@pytest.fixture(scope="module")
def grokked(tmp_path_factory):
    return run_quietly(grokking, tmp_path_factory.mktemp("runs"), name="test", **SMALL)


def test_the_table_holds_every_sum_once():
    sums = grokking.table(5)
    a, b = np.asarray(sums.inputs).reshape(25, 2, 5).argmax(-1).T
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == 25
    assert (sums.inputs.sum(1) == 2).all() and (sums.targets == (a + b) % 5).all()


def test_the_square_has_the_gradient_of_autodiff():
    x = jax.random.normal(jax.random.key(1), (4, 3))
    report = check_layer(grokking.square(), x, key=jax.random.key(0), precisions=(), cost=False)
    assert report.ok, report


def test_waves_of_one_frequency_have_all_their_power_there():
    t = 2 * np.pi * np.arange(11) / 11
    pure = np.stack([np.cos(3 * t + 1), 5 + 0.1 * np.sin(2 * t)], 1)
    assert float(grokking.one_frequency(jnp.asarray(pure))) == pytest.approx(1, abs=1e-5)
    half = np.stack([np.cos(t) + np.cos(2 * t)], 1)
    assert float(grokking.one_frequency(jnp.asarray(half))) == pytest.approx(0.5, abs=1e-5)


def test_waves_solve_addition():
    """Gromov's solution: unit k has cos(2πka/p + φ) and cos(2πkb/p + ψ), and the logits of c cos(2πkc/p + φ + ψ)."""
    p, frequencies, phases = 11, np.arange(1, 6), 2 * np.pi * np.arange(8) / 8
    k, f, g = (each.ravel() for each in np.meshgrid(frequencies, phases, phases))
    angle = 2 * np.pi * np.arange(p)[:, None] * k / p
    w = np.concatenate([np.cos(angle + f), np.cos(angle + g)])
    params = {"units": {"w": jnp.asarray(w, "float32")}, "square_0": (), "logits": {}}
    params["logits"]["w"] = jnp.asarray(np.cos(angle + f + g).T, "float32")
    model = grokking.make_network(grokking.Config(modulus=p, width=len(k)))
    drawn, state = model.init(jax.random.key(0), jnp.zeros((1, 2 * p)))
    chex.assert_trees_all_equal_shapes(drawn, params)
    sums = grokking.table(p)
    outputs = fnet.apply(model, params, state, jnp.asarray(sums.inputs))
    assert (np.asarray(outputs).argmax(-1) == sums.targets).all()
    assert float(grokking.one_frequency(params["units"]["w"][:p])) == pytest.approx(1, abs=1e-5)


def test_what_is_first_reached_is_a_step():
    values = np.array([0.1, 0.5, 0.4, 1.0])
    assert [grokking.first_step(values, level, 10) for level in (0.05, 0.5, 1.0, 1.1)] == [10, 20, 40, None]


def test_a_member_is_that_run_in_numpy(grokked):
    results, text = grokked
    config = grokking.Config(**SMALL)
    key = jax.random.key(1)
    order = np.asarray(jax.random.permutation(stream(key, "split"), 49))
    sums = grokking.table(7)
    size = round(0.4 * 49)
    x, y = np.asarray(sums.inputs, float), np.eye(7)[sums.targets]
    params, _ = grokking.make_network(config).init(stream(key, "model"), jnp.asarray(sums.inputs[:1]))
    p = [np.asarray(params[name]["w"], float) for name in ("units", "logits")]
    m, v = ([np.zeros_like(w) for w in p] for _ in range(2))
    rows, losses = order[:size], []
    for t in range(1, 21):
        h = x[rows] @ p[0]
        z = h**2 @ p[1]
        q = np.exp(z - z.max(1, keepdims=True))
        dz = (q / q.sum(1, keepdims=True) - y[rows]) / size
        g = [x[rows].T @ (2 * h * (dz @ p[1].T)), (h**2).T @ dz]
        for i in range(2):  # AdamW
            m[i], v[i] = 0.9 * m[i] + 0.1 * g[i], 0.98 * v[i] + 0.02 * g[i] ** 2
            move = m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.98**t)) + 1e-8)
            p[i] = p[i] - 0.01 * (move + 1.0 * p[i])
        if t % 5 == 0:
            z = (x @ p[0]) ** 2 @ p[1]
            log = z - z.max(1, keepdims=True)
            log = log - np.log(np.exp(log).sum(1, keepdims=True))
            losses.append([-(log * y)[part].sum(1).mean() for part in (rows, order[size:])])
    found = results["decays"][1.0]
    assert found["training loss"].shape == (2, 4)
    np.testing.assert_allclose(found["training loss"][1], np.array(losses)[:, 0], rtol=1e-3)
    np.testing.assert_allclose(found["validation loss"][1], np.array(losses)[:, 1], rtol=1e-3)
    assert found["norm"][1, -1] == pytest.approx(np.sqrt(sum((w**2).sum() for w in p)), rel=1e-4)
    assert {path.name for path in results["folder"].iterdir()} == {"config.json", "results.json", "grokking.png"}
    assert "by weight decay: first steps of each seed" in text


def test_in_float64_both_engines_learn_the_same(tmp_path):
    settings = {**SMALL, "double": True}
    runs = [
        run_quietly(grokking, tmp_path, name=engine, engine=engine, **settings)[0]
        for engine in ("backprop", "autodiff")
    ]
    for decay in SMALL["decays"]:
        by_hand, by_autodiff = (each["decays"][decay]["validation loss"] for each in runs)
        assert by_hand.dtype == np.float64
        np.testing.assert_allclose(by_hand, by_autodiff, rtol=1e-10)


def test_decay_alone_tells_two_members_of_a_seed_apart(grokked):
    without, with_it = (grokked[0]["decays"][decay] for decay in (0.0, 1.0))
    np.testing.assert_array_equal(without["waves at the start"], with_it["waves at the start"])
    assert (with_it["norm"] < without["norm"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--updates 25 --every 10", "a multiple of --every 10"),
        ("--share 0", "some of the 3481"),
        ("--modulus 2", "at least 3"),
    ],
)
def test_steps_and_shares_that_will_not_do_are_refused(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        main(grokking.run, grokking.Config, [*options.split(), "--run-dir", str(tmp_path)])
    assert not list(tmp_path.rglob("*.json"))
