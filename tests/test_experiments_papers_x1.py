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
        ({"rates": (0.1, 0.0)}, "rates above 0"),
        ({"examples": 1798}, "at most 1797"),
    ],
)
def test_an_edge_that_cannot_be_measured_is_refused_and_leaves_no_folder(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        edge.run(edge.Config(**options, run_dir=tmp_path), Console(quiet=True))
    assert not list(tmp_path.iterdir())
