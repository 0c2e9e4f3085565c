"""Mazur's worked example: a 2-2-2 network of sigmoids whose numbers anyone can check with a pocket calculator.

    python -m experiments.mazur

One example, inputs (0.05, 0.10), targets (0.01, 0.99); E = Σ ½ (t − o)², gradient descent at the rate 0.5, biases
fixed; all in float64. Source: Mazur, "A Step by Step Backpropagation Example" (2015), which the sources cite (S4).

The last column follows a slip. Every step that the post derives agrees with ours: the hidden layer's gradient goes
back through the output weights *before* their update. But the numbers that it reports at the end, E after one update
and the two outputs after 10,000, are of a program that goes back through the output weights *after* their update. E of
those outputs is 0.000035085; the post prints 0.0000351085, which is neither column's.

Legend: 1 example, 2 features, 2 units in each layer.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import fnet
from experiments.common import main, open_console
from experiments.options import Count, Options
from fnet.core.numerics import weighted_mean
from fnet.layers import sigmoid
from fnet.losses import half_squared_error

RATE = 0.5
PRINTED = {  # by the post, to the last digit
    "E0": "0.298371109",
    "∂E/∂w5": "0.082167041",
    "∂E/∂w1": "0.000438568",
    "w5+": "0.35891648",
    "w6+": "0.408666186",
    "w7+": "0.511301270",
    "w8+": "0.561370121",
    "w1+": "0.149780716",
    "w2+": "0.19956143",
    "w3+": "0.24975114",
    "w4+": "0.29950229",
    "E1": "0.291027924",
    "E at 10,000": "0.0000351085",
    "o1 at 10,000": "0.015912196",
    "o2 at 10,000": "0.984065734",
}


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Reproduce Mazur's worked example by hand and by autodiff."""

    updates: Count = 10_000  # before the last rows; the post makes 10,000


def fixed_biases(gradient):
    """The same gradient with zeros at the biases, which the post leaves as they are."""

    def fixed(params, state, batch, key):
        grads, state, metrics = gradient(params, state, batch, key)
        return {name: {**g, "b": jnp.zeros_like(g["b"])} if g else g for name, g in grads.items()}, state, metrics

    return fixed


def through_updated_weights(model, loss):
    """The slip, as a gradient engine: the error goes back through output weights that have been updated already."""

    def gradient(params, state, batch, key):
        outputs, state, residuals = model.forward(params, state, batch.inputs)
        dy = loss.gradient(outputs, batch.targets)
        grads, _ = model.backward(params, residuals, dy)
        updated = jax.tree.map(lambda p, g: p - RATE * g, params["dense_1"], grads["dense_1"])
        grads, _ = model.backward({**params, "dense_1": updated}, residuals, dy)
        return grads, state, {"loss": weighted_mean(loss(outputs, batch.targets))}

    return gradient


def weights(tree) -> dict[str, float]:
    """w1 … w4 into the hidden units, w5 … w8 into the outputs; the post counts along each unit's column of ``w``."""
    columns = np.concatenate([np.asarray(tree[layer]["w"]).T.ravel() for layer in ("dense_0", "dense_1")])
    return {f"w{i}": float(w) for i, w in enumerate(columns, 1)}


def example():
    """The network, its parameters and state, and the one example."""
    model = fnet.mlp(2, 2, activation=sigmoid(), output=sigmoid())
    data = fnet.Batch(jnp.array([[0.05, 0.10]]), jnp.array([[0.01, 0.99]]))
    params, state = fnet.init(model, jax.random.key(0), data.inputs)
    params["dense_0"] = {"w": jnp.array([[0.15, 0.20], [0.25, 0.30]]).T, "b": jnp.array([0.35, 0.35])}
    params["dense_1"] = {"w": jnp.array([[0.40, 0.45], [0.50, 0.55]]).T, "b": jnp.array([0.60, 0.60])}
    return model, params, state, data


def measure(gradient, model, params, state, data, updates: int) -> dict[str, float]:
    """The quantities of the post, by one gradient engine."""
    optimizer, key = fnet.sgd(RATE), jax.random.key(0)
    step, evaluate = fnet.make_step(gradient, optimizer), jax.jit(fnet.make_evaluate(model, half_squared_error))
    start = fnet.init_train_state(params, optimizer, key, state)
    grads, _, metrics = jax.jit(gradient)(params, state, data, key)
    one, _ = jax.jit(step)(start, data)
    end, _, _ = jax.jit(partial(fnet.train, step, epochs=updates, batch_size=1, shuffle=False))(start, data)
    slope, outputs = weights(grads), fnet.apply(model, end.params, end.state, data.inputs)[0]
    return {
        "E0": float(metrics["loss"].value),
        **{f"∂E/∂{w}": slope[w] for w in ("w5", "w1")},
        **{f"{w}+": weights(one.params)[w] for w in ("w5", "w6", "w7", "w8", "w1", "w2", "w3", "w4")},
        "E1": float(evaluate(one.params, one.state, data)["loss"].value),
        f"E at {updates:,}": float(evaluate(end.params, end.state, data)["loss"].value),
        **{f"o{i} at {updates:,}": float(o) for i, o in enumerate(outputs, 1)},
        **{f"b{i + 1} at {updates:,}": float(end.params[f"dense_{i}"]["b"][0]) for i in (0, 1)},
    }


def agrees(value: float, printed: str) -> bool:
    """Whether ``value``, rounded to as many decimals, is what was printed."""
    return f"{value:.{len(printed.partition('.')[2])}f}" == printed


def run(config: Config, console: Console | None = None) -> dict[str, dict[str, float]]:
    """Print the table; returns its columns, each a dict by quantity."""
    console = open_console(config, console)
    with jax.enable_x64(True), console.status("running the example by three gradient engines"):
        model, params, state, data = example()
        engines = {
            "by hand": fixed_biases(fnet.backprop(model, half_squared_error)),
            "by autodiff": fixed_biases(fnet.autodiff(model, half_squared_error)),
            "the slip": fixed_biases(through_updated_weights(model, half_squared_error)),
        }
        columns = {
            name: measure(engine, model, params, state, data, config.updates) for name, engine in engines.items()
        }

    table = Table(box=SIMPLE, title="Mazur's example: ✓ agrees with every digit of the post; w+ is w after one update")
    for heading in ("", "the post", *columns):
        table.add_column(heading)
    for quantity in columns["by hand"]:
        printed = PRINTED.get(quantity, "")
        cells = (column[quantity] for column in columns.values())
        ticked = (f"{value:.9f} {'✓' if printed and agrees(value, printed) else ' '}" for value in cells)
        table.add_row(quantity, printed, *ticked)
    console.print(table)
    console.print(
        "The slip goes back through the output weights after their update. Of the post, the derived steps are right; "
        "E1 and both outputs are the slip's, digit by digit; its E at 10,000 updates is neither's."
    )
    return columns


if __name__ == "__main__":
    main(run, Config)
