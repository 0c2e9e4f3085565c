"""The experiments on descent: three batch sizes (S6), five optimizers (S7), a sweep of learning rates (S10)."""

from __future__ import annotations

import io
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnet
from experiments import descent_modes, learning_rates, optimizer_comparison
from fnet.core.numerics import stream
from tests.conftest import compiled_programs

pytestmark = pytest.mark.long


def run_quietly(experiment, tmp_path_factory, **settings):
    """The experiment's results, what it printed, and its settings."""
    text = io.StringIO()
    config = experiment.Config(run_dir=tmp_path_factory.mktemp("runs"), name="test", **settings)
    results = experiment.run(config, Console(file=text, width=200))
    return results, text.getvalue(), config


# --- full-batch, mini-batch and stochastic descent -------------------------------------------------------------------


@pytest.fixture(scope="module")
def modes(tmp_path_factory):
    settings = {"test_size": 1477, "epochs": 10, "full_batch_epochs": 100, "window": 200, "target": 1.0}
    return run_quietly(descent_modes, tmp_path_factory, **settings)


@pytest.mark.parametrize(
    ("mode", "size", "epochs"), [("full batch", 320, 100), ("mini-batch", 32, 10), ("stochastic", 1, 10)]
)
def test_a_mode_is_a_batch_size(modes, mode, size, epochs):
    r = modes[0][mode]
    assert (r["examples per update"], r["updates"], r["examples seen"]) == (size, epochs * 320 // size, epochs * 320)
    # forward and backward of softmax regression are one product each; softmax and the update come on top
    assert 1 < r["FLOPs per update (compiler)"] / (4 * size * 64 * 10) < 1.5
    curves = r["curves"]
    np.testing.assert_array_equal(curves["examples"], size * np.arange(r["updates"] + 1))


def test_full_batches_descend_as_numpy_does(modes):
    results, _, config = modes
    key = jax.random.key(config.seed)
    data, _ = fnet.split(fnet.data.sklearn_digits(), (320, 1477), stream(key, "split"))
    params, _ = fnet.init(fnet.mlp(10), stream(key, "model"), data.inputs[:1])
    x, y = np.asarray(data.inputs, np.float64), np.eye(10)[np.asarray(data.targets)]
    w, b = (np.asarray(params["dense_0"][name], np.float64) for name in "wb")
    expected = []
    for _ in range(101):
        z = x @ w + b
        z -= z.max(1, keepdims=True)
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        expected.append(-(y * np.log(p)).sum(1).mean())
        w, b = w - 0.3 * x.T @ (p - y) / 320, b - 0.3 * (p - y).mean(0)
    np.testing.assert_allclose(results["full batch"]["curves"]["cost"], expected, rtol=1e-5)


def test_smaller_batches_are_noisier(modes):
    results, _, config = modes
    full, mini, one = (results[mode] for mode in ("full batch", "mini-batch", "stochastic"))
    # a full batch sees the full cost up to the rounding of a sum in another order
    assert full["noise"] < 1e-5 and full["rises"] == 0
    assert 0.05 < mini["noise"] < 0.5 * one["noise"]
    assert 0 < mini["rises"] < one["rises"] and one["rises"] > 0.2
    curves = one["curves"]
    seen, cost = curves["seen"][-config.window :], curves["cost"][-config.window - 1 : -1]
    assert one["noise"] == pytest.approx(np.std(seen - cost) / np.mean(cost), rel=1e-5)


def test_an_update_by_32_examples_goes_as_far_as_one_by_all(modes):
    full, mini = modes[0]["full batch"], modes[0]["mini-batch"]
    assert mini["updates to the target"] == pytest.approx(full["updates to the target"], rel=0.1)
    assert 9 < full["examples to the target"] / mini["examples to the target"] < 11  # 320 / 32 = 10


def test_the_target_is_reached_where_the_cost_first_falls_below(modes):
    for mode in ("full batch", "mini-batch", "stochastic"):
        r = modes[0][mode]
        cost, t = r["curves"]["cost"], r["updates to the target"]
        assert cost[t] < 1.0 <= cost[:t].min()
        assert r["examples to the target"] == t * r["examples per update"]


def test_the_modes_leave_a_table_and_a_picture(modes):
    results, text, _ = modes
    assert all(words in text for words in ("full batch", "mini-batch", "stochastic", "noise", "rises"))
    assert {path.name for path in results["folder"].iterdir()} == {"config.json", "cost.png"}


# --- five optimizers -------------------------------------------------------------------------------------------------

VALLEY = {"sgd": 0.019, "momentum": 0.02, "nesterov": 0.01, "rmsprop": 0.01, "adam": 0.5}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return run_quietly(optimizer_comparison, tmp_path_factory, epochs=4, starts=2, grid=(0.0, 0.01, 1e30))


@pytest.fixture(scope="module")
def valley64():
    """Paths and heights of all optimizers in float64, along the axes and turned by 45°."""
    config = optimizer_comparison.Config(steps=600)
    with jax.enable_x64(True):
        return {
            name: jax.device_get(
                jax.jit(jax.vmap(partial(optimizer_comparison.descend_valley, config, make, VALLEY[name])))(
                    jnp.array([0.0, 45.0])
                )
            )
            for name, make in optimizer_comparison.OPTIMIZERS.items()
        }


def test_sgd_goes_down_the_valley_as_theory_says(valley64, comparison):
    t = np.arange(601)[:, None]
    expected = np.array([10.0, 1.0]) * (1 - 0.019 * np.array([1.0, 100.0])) ** t  # p_t = p_0 (1 − rate λ)^t
    paths, f = valley64["sgd"]
    np.testing.assert_allclose(paths[0], expected, rtol=1e-10, atol=1e-300)
    heights = 0.5 * (expected**2 @ np.array([1.0, 100.0]))
    np.testing.assert_allclose(f[0], heights, rtol=1e-10)
    steps = int(np.argmax(heights < 1e-6))
    assert comparison[0]["valley"]["sgd"]["steps to the target"] == steps


def test_momentum_goes_down_the_valley_as_numpy_does(valley64):
    curvature = np.array([1.0, 100.0])
    for name, nesterov in (("momentum", False), ("nesterov", True)):
        p, v, expected = np.array([10.0, 1.0]), np.zeros(2), []
        for _ in range(601):
            expected.append(p)
            g = curvature * p
            v = 0.9 * v + g
            p = p - VALLEY[name] * (g + 0.9 * v if nesterov else v)
        np.testing.assert_allclose(valley64[name][0][0], expected, rtol=0, atol=1e-10)


def test_adams_first_step_is_its_rate_in_every_coordinate(valley64):
    np.testing.assert_allclose(valley64["adam"][0][0][1], [9.5, 0.5], rtol=1e-8)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
def test_without_scaling_by_coordinate_a_turned_valley_is_the_same(valley64, name):
    along, turned = valley64[name][1]
    np.testing.assert_allclose(along, turned, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["rmsprop", "adam"])
def test_with_scaling_by_coordinate_a_turned_valley_is_another(valley64, name):
    along, turned = valley64[name][1]
    assert np.abs(along - turned).max() > 1


def test_rmsprop_ends_in_a_cycle_as_wide_as_its_rate(comparison):
    # where |g| repeats, g / √v = ±1: each coordinate jumps between ± rate / 2, so f = ½ (1 + 100) (rate / 2)²
    r = comparison[0]["valley"]["rmsprop"]
    assert r["last f"] == pytest.approx(0.5 * 101 * 0.005**2, rel=1e-3)
    assert r["steps to the target"] is None and "never" in comparison[1]


def test_moments_cost_memory(comparison):
    kept = {name: column["numbers kept per weight"] for name, column in comparison[0]["digits"].items()}
    assert kept == {"sgd": 0, "momentum": 1, "nesterov": 1, "rmsprop": 1, "adam": 2}


def test_every_optimizer_learns_the_digits_at_its_rate(comparison):
    for name, column in comparison[0]["digits"].items():
        assert column["final cost, highest"] < 0.5, name
        assert column["test accuracy, mean"] > 0.85, name


def test_all_optimizers_start_from_the_same_parameters(comparison):
    stays = [arrays["costs"][1] for arrays in comparison[0]["arrays"].values()]  # at rate 0
    for costs in stays:
        np.testing.assert_allclose(costs, stays[0][:, :1] * np.ones((1, 4)), rtol=1e-6)
    assert stays[0][0, 0] != stays[0][1, 0]  # two starts


def test_good_rates_are_those_that_end_below_the_target(comparison):
    results, _, config = comparison
    for name, column in results["digits"].items():
        ends = np.median(results["arrays"][name]["costs"][1:, :, -1], axis=1)
        assert column["good rates"] == sum(end < config.target for end in ends)
        assert column["best rate tried"] == 0.01
        assert not ends[2] < math.log(10), name  # a rate of 1e30 cannot be good
    good = {name: column["good rates"] for name, column in results["valley"].items()}  # of 0, 0.01 and 1e30
    assert good == {"sgd": 1, "momentum": 1, "nesterov": 1, "rmsprop": 0, "adam": 0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3, 1, 2, 0.5, 0.5], 3), ([0.5, 0.5], 0), ([0.5, 3], None), ([0.5, math.nan], None), ([math.nan, 0.5], 1)],
)
def test_settled_means_below_from_there_on(values, expected):
    assert optimizer_comparison.settled(np.array(values), 1.0) == expected
    assert optimizer_comparison.settled(np.array(values), 1.0, first=1) == (None if expected is None else expected + 1)


def test_the_comparison_says_when_to_use_which_and_draws(comparison):
    results, text, _ = comparison
    assert "When to use which" in text and all(f"\n  {name} " in text for name in VALLEY)
    assert {path.name for path in results["folder"].iterdir()} == {"config.json", "digits.png", "valley.png"}


# --- learning rates in one program -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The sweep's results, and the names of the programs that XLA compiled meanwhile."""
    settings = {"rates": (0.0, 0.01, 0.5, 1e30), "epochs": 20, "hidden": (16,)}
    with compiled_programs() as compiled:
        run = run_quietly(learning_rates, tmp_path_factory, **settings)
    return *run, compiled


def test_a_sweep_is_one_program(sweep):
    results, text, _, compiled = sweep
    assert results["traces"] == 1 and "4 runs in one program" in text
    assert len([name for name in compiled if "member" in name]) == 1, compiled


def test_a_member_takes_the_first_ten_steps_of_the_run_alone(sweep):
    results, _, config, _ = sweep
    alone = jax.jit(partial(learning_rates.train_at, config))
    for rate in (0.01, 0.5):
        curve = alone(rate, *learning_rates.load(config))["update loss"]
        member = results["rates"][rate]["curves"]["update loss"]
        assert member.shape == curve.shape == (20, 45)
        # float32 at 6e-8 a rounding; products are summed in another order
        np.testing.assert_allclose(member[0, :10], curve[0, :10], rtol=1e-5)


def test_a_member_is_the_run_alone_in_float64(x64):
    config = learning_rates.Config(
        epochs=10, batch_size=100, hidden=(16,)
    )  # 150 steps, each epoch's last a smaller one
    data = jax.tree.map(
        lambda a: a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a, learning_rates.load(config)
    )
    run = partial(learning_rates.train_at, config)
    rates = jnp.array([0.01, 0.1, 0.5])
    together, alone = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(rates, *data), jax.jit(run)
    for i, rate in enumerate(rates):
        for name, curve in alone(rate, *data).items():
            counted = name.endswith("accuracy")  # a float32 count of examples, divided
            assert counted or curve.dtype == jnp.float64
            np.testing.assert_allclose(
                together[name][i], curve, rtol=1e-6 if counted else 1e-9, err_msg=f"{name} {rate}"
            )


def test_divergence_is_named_and_leaves_the_other_members_alone(sweep):
    results, text, _, _ = sweep
    diverged = results["rates"][1e30]
    assert diverged["verdict"] == "diverged" and not math.isfinite(diverged["training cost: bias"])
    assert "diverged" in text and "nan" in text
    assert results["rates"][0.5]["verdict"] == "trained"


def test_a_rate_of_zero_stays_at_chance(sweep):
    r = sweep[0]["rates"][0.0]
    assert r["verdict"] == "at chance" and r["training cost: bias"] >= math.log(10)
    np.testing.assert_array_equal(r["curves"]["train loss"], r["curves"]["train loss"][0])


def test_bias_falls_and_variance_rises_with_the_rate(sweep):
    slow, fast = (sweep[0]["rates"][rate] for rate in (0.01, 0.5))
    assert fast["training cost: bias"] < 0.1 * slow["training cost: bias"]
    assert fast["test − training: variance"] > slow["test − training: variance"]
    for r in (slow, fast):
        train, test = r["curves"]["train loss"], r["curves"]["test loss"]
        assert r["test − training: variance"] == pytest.approx(test[-1] - train[-1])
        assert r["lowest test cost"] == pytest.approx(test.min()) == pytest.approx(test[r["at epoch"] - 1])


def test_the_sweep_leaves_a_picture(sweep):
    assert {path.name for path in sweep[0]["folder"].iterdir()} == {"config.json", "curves.png"}
