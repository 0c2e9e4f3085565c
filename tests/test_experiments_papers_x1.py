"""Published results: the edge of stability, and learning rates that transfer over widths."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from rich.console import Console

import fnet
from experiments import edge_of_stability as edge
from experiments import mu_transfer as mu
from fnet.core.numerics import stream
from fnet.layers import tanh

pytestmark = pytest.mark.long


def printed(experiment, **options):
    """What the experiment returns, and what it prints."""
    text = io.StringIO()
    return experiment.run(experiment.Config(**options), Console(file=text, width=160)), text.getvalue()


# --- the edge of stability -------------------------------------------------------------------------------------------

TINY = {"rates": (0.1, 20.0), "seeds": (0, 1), "updates": 12, "every": 4, "examples": 20, "hidden": (3,)}


@pytest.fixture(scope="module")
def edge_run(tmp_path_factory):
    return printed(edge, **TINY, run_dir=tmp_path_factory.mktemp("runs"), name="test")


def descended(rate, seed):
    """Losses and sharpnesses in float64, by the loss as one formula and its whole matrix of second derivatives."""
    data = edge.load(20)
    model = fnet.mlp(3, 10, activation=tanh(), weights=edge.WEIGHTS)
    params, _ = model.init(stream(jax.random.key(seed), "model"), data.inputs[:1])
    x, targets = (a.astype(float) for a in data[:2])
    flat, unravel = ravel_pytree(jax.tree.map(lambda a: a.astype(float), params))

    def loss(flat):
        first, last = (unravel(flat)[f"dense_{i}"] for i in (0, 1))
        y = jnp.tanh(x @ first["w"] + first["b"][None]) @ last["w"] + last["b"][None]
        return (0.5 * (y - targets) ** 2).sum(1).mean()

    losses, sharpnesses = [], []
    slope, matrix = jax.jit(jax.value_and_grad(loss)), jax.jit(jax.hessian(loss))
    for update in range(12):
        if update % 4 == 0:
            sharpnesses.append(np.linalg.eigvalsh(matrix(flat))[-1])
        value, down = slope(flat)
        losses.append(value)
        flat = flat - rate * down
    return np.array(losses), np.array(sharpnesses)


@pytest.mark.parametrize("seed", [0, 1])
def test_losses_and_sharpnesses_are_those_of_descent_with_the_whole_hessian(edge_run, seed, x64):
    curves = edge_run[0]["curves"]
    assert curves["loss"].shape == (2, 2, 12) and curves["sharpness"].shape == (2, 2, 3)
    losses, sharpnesses = descended(0.1, seed)
    np.testing.assert_allclose(curves["loss"][0, seed], losses, rtol=1e-5)
    np.testing.assert_allclose(curves["sharpness"][0, seed], sharpnesses, rtol=1e-4)


def test_a_rate_beyond_the_edge_raises_the_loss_at_once_and_one_below_never(edge_run):
    below, beyond = (edge_run[0]["measured"][rate] for rate in TINY["rates"])
    for one in below:
        assert one["edge reached at"] is None and one["rises before"] == 0 and one["rises after"] is None
    for one in beyond:
        assert one["edge reached at"] == 0 and one["rises before"] is None and one["rises after"] > 0


def test_what_is_measured_of_a_run_is_split_where_the_sharpness_first_comes_to_the_edge():
    loss = np.array([8.0, 6.0, 7.0, 5.0, 4.0, 5.0, 3.0, 4.0, 2.0, 3.0, 1.0, 0.5])
    found = edge.measure(loss, np.array([1.0, 3.9, 4.0, 5.0, 3.0, 4.0]), 0.5, 2)
    assert found["edge reached at"] == 4 and found["loss at the edge"] == 4.0
    assert found["rises before"] == 1 / 4  # the updates from 8 to 6, 7, 5, 4
    assert found["rises after"] == 3 / 7
    assert found["last third · η/2"] == 3.5 / 4 and found["highest sharpness"] == 5.0


def test_the_initial_weights_are_as_pytorch_draws_them():
    w = edge.WEIGHTS(jax.random.key(0), (100, 1000), jnp.float32)  # nn.Linear: between ± 1/√fan_in
    assert 0.0999 < abs(w).max() <= 0.1 and w.var() == pytest.approx(0.01 / 3, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates": 50}, "a multiple of 20, at least three times it"),
        ({"rates": (0.1, 0.0)}, "different rates above 0"),
        ({"examples": 1798}, "at most 1797"),
    ],
)
def test_an_edge_that_cannot_be_measured_is_refused_and_leaves_no_folder(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        edge.run(edge.Config(**options, run_dir=tmp_path), Console(quiet=True))
    assert not list(tmp_path.iterdir())


# --- rates that transfer ---------------------------------------------------------------------------------------------

RATES = (1e-3, 4e-3, 1.6e-2)


@pytest.fixture(scope="module")
def mu_run(tmp_path_factory):
    options = {"widths": (8, 16), "base": 8, "rates": RATES, "seeds": (0, 1), "epochs": 1, "examples": 96, "depth": 2}
    return printed(mu, **options, run_dir=tmp_path_factory.mktemp("runs"), name="test")


def test_both_parametrisations_are_one_at_the_base_width_and_two_elsewhere(mu_run):
    standard, maximal = mu_run[0]["losses"].values()
    assert standard.shape == (2, 3, 2) and np.isfinite([standard, maximal]).all()
    assert (standard[0] == maximal[0]).all() and (standard[1] != maximal[1]).all()


@pytest.mark.parametrize("shrink", [1.0, 1 / 16])
def test_initial_variances_and_first_steps_are_those_of_table_3(shrink):
    width, rate = 256, 1e-3
    model, optimizer_at = mu.parametrised(width, 3, shrink)
    params, _ = model.init(jax.random.key(0), jnp.zeros((1, 64)))
    variances = {name: float(p["w"].var()) for name, p in params.items() if p}
    expected = {"dense_0": 2 / 64, "dense_1": 2 / width, "dense_2": 2 / width, "dense_3": shrink / width}
    assert variances == pytest.approx(expected, rel=0.1)  # the last has 2,560 entries: 2.8 % is one standard deviation
    assert all((p["b"] == 0).all() for p in params.values() if p)
    optimizer = optimizer_at(rate)
    grads = jax.tree.map(jnp.ones_like, params)  # Adam's first step is the rate, whatever the gradient
    moved, _ = optimizer.update(grads, optimizer.init(params), params)
    steps = jax.tree.map(lambda before, after: float((before - after).mean()), params, moved)
    for i in range(4):
        step = steps[f"dense_{i}"]
        assert step["b"] == pytest.approx(rate, rel=1e-4)
        assert step["w"] == pytest.approx(rate if i == 0 else rate * shrink, rel=1e-3)  # beside weights of 2e-1 at most


def test_only_in_mu_p_does_a_first_step_change_the_hidden_layers_as_much_in_wide_networks_as_in_narrow_ones():
    # the paper's check of coordinates: the change of what the last hidden layer puts out
    data = mu.load(32)

    def change(width, shrink):
        model, optimizer_at = mu.parametrised(width, 3, shrink)
        params, state = model.init(jax.random.key(0), data.inputs[:1])
        optimizer = optimizer_at(1e-3)
        grads, _, _ = fnet.backprop(model, fnet.softmax_cross_entropy)(params, state, data, jax.random.key(0))
        moved, _ = optimizer.update(grads, optimizer.init(params), params)

        def hidden(params):
            h = np.asarray(data.inputs)
            for i in range(3):
                h = np.maximum(h @ np.asarray(params[f"dense_{i}"]["w"]) + np.asarray(params[f"dense_{i}"]["b"]), 0)
            return h

        return np.abs(hidden(moved) - hidden(params)).mean()

    narrow = change(64, 1.0)
    assert change(512, 1.0) > 3 * narrow  # 8 times as many entries, which move alike
    assert 1 / 2 < change(512, 64 / 512) / narrow < 2


def test_the_lowest_point_is_a_parabolas_in_logarithms_or_an_end_of_the_rates():
    rates = 2.0 ** np.arange(-6, 0)
    losses = 0.1 * np.exp(0.3 * (np.log(rates) - np.log(0.1)) ** 2)
    assert mu.lowest(rates, losses) == pytest.approx(0.1, rel=1e-9)
    losses[4:] = np.nan  # what diverged is no neighbour
    assert mu.lowest(rates, losses) == rates[3]
    assert mu.lowest(rates, rates) == rates[0] and mu.lowest(rates, -rates) == rates[-1]


def test_exponents_and_what_is_transferred_are_those_of_losses_that_are_known():
    config = mu.Config(widths=(64, 128, 256), rates=tuple(2.0**k for k in range(-12, -3)), seeds=(0, 1))
    best = 2.0**-6 * (np.array(config.widths) / 64) ** -1.0
    curve = (1 + (np.log(config.rates)[None, :] - np.log(best)[:, None]) ** 2) / np.array(config.widths)[:, None]
    found = mu.measure(np.stack([curve, curve], -1), config)
    assert found["best rate on the grid"] == [2.0**-6, 2.0**-7, 2.0**-8]
    assert found["exponent"] == pytest.approx([-1, -1], abs=1e-9)
    assert found["transferred"] == pytest.approx([(1 + np.log(4) ** 2) / 256] * 2)
    assert found["wider is better"] == float((np.diff(curve, axis=0) <= 0).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (64,)}, "two or more, rising"),
        ({"rates": (0.1, 0.01)}, "above 0, rising"),
        ({"examples": 31}, "expected 32, a batch, to 1797"),
    ],
)
def test_widths_and_rates_that_cannot_be_compared_are_refused_and_leave_no_folder(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        mu.run(mu.Config(**options, run_dir=tmp_path), Console(quiet=True))
    assert not list(tmp_path.iterdir())
