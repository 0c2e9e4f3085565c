"""Full-batch gradient descent drives the sharpness up to 2/η and goes on there (Cohen et al., arXiv:2103.00065).

    python -m experiments.edge_of_stability
    python -m experiments.edge_of_stability --rates 0.3 0.1 0.03 --updates 6000

The sharpness is the largest eigenvalue of the Hessian of the training loss. On a quadratic, descent at rate η diverges
along each direction of curvature above 2/η. The paper's claims: on a network the sharpness climbs as long as it is
below 2/η (progressive sharpening); from then on it hovers at 2/η or just above it, and the loss rises and falls from
one update to the next and yet falls in the long run.

A network 64-32-32-32-10 of tanh learns 1,000 of scikit-learn's 8x8 digits, standardized, by half the squared error to
one-hot targets, with initial weights as PyTorch draws them, as in the paper. All rates with all seeds are one program.
The sharpness is taken every 20 updates, by 20 Hessian-vector products of Lanczos: from below, and 60 products changed
it by 1.2 % at most on seed 0. A rate has come to its edge with the first sharpness of at least 2/η; `rises` are the
updates after which the loss is higher than before.

By the first command, mean and standard deviation of the seeds 0, 1, 2; the rates were chosen on others (77 and 78):

    η                                        0.65             0.45             0.35             0.1
    2/η                                      3.08             4.44             5.71             20
    sharpness at first, at most              2.06, 4.35       2.06, 5.74       2.06, 6.79       2.06, 8.97
    mean of the last third, of 2/η           1.013 ± 0.002    1.009 ± 0.001    1.008 ± 0.003    0.438 ± 0.022
    rises before the edge, after it          0, 40 %          0, 37 %          0, 25 %          0, never there
    loss at the edge, at the end             0.117, 0.0037    0.095, 0.0054    0.080, 0.0063    never there, 0.0279

All claims hold: three rates stop the sharpness at 2/η, and 0.1, whose edge lies beyond what it reaches in this time,
lets it climb through all three lines without a single rise of the loss. The first climb goes 19 to 41 % beyond 2/η
before it is thrown back. At the edge runs part by rounding: by the other engine, `--engine autodiff`, each is another,
with a last third of 1.004 to 1.014; below the edge the two agree.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written, write_results
from experiments.options import Amounts, ByEngine, Count, InFolder, Seeds, Widths, engine_of
from experiments.pictures.parts import grid_and_legend, mean_and_spread
from fnet.core.numerics import stream
from fnet.layers import tanh
from fnet.layers.initializers import centered_uniform, fan_in, variance_scaling
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure
from fnet.training.population import crossed, grid, train_population

WEIGHTS = variance_scaling(1 / 3, fan_in, centered_uniform)  # between ±1/√fan_in


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Watch the sharpness of a small network under full-batch gradient descent at several rates."""

    rates: Amounts = (0.65, 0.45, 0.35, 0.1)  # the last is too small to come to its edge
    seeds: Seeds = (0, 1, 2)  # of the parameters
    updates: Count = 3000
    every: Count = 20  # updates between two measurements of the sharpness
    examples: Count = 1000  # the first of the 1,797 digits
    hidden: Widths = (32, 32, 32)


def load(examples: int) -> fnet.Batch:
    """Digits whose pixels have mean 0 each, divided by the standard deviation of all; and one-hot targets."""
    inputs, labels = fnet.data.sklearn_digits()[:2]
    inputs = inputs[:examples]
    return fnet.Batch((inputs - inputs.mean(0, keepdims=True)) / inputs.std(), jax.nn.one_hot(labels[:examples], 10))


def run_of(config: Config):
    """A whole run as a function of its rate: the loss before each update, the sharpness before every so many."""
    model = fnet.mlp(*config.hidden, 10, activation=tanh(), weights=WEIGHTS)
    gradient = engine_of(config)(model, fnet.losses.half_squared_error)
    sharpness = fnet.curvature.sharpness(gradient)

    def run(hyper, key, data):
        optimizer = fnet.sgd(hyper["learning_rate"])
        params, state = model.init(stream(key, "model"), data.inputs[:1])
        start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
        step = fnet.make_step(gradient, optimizer)

        def piece(ts, _):
            now = sharpness(ts.params, ts.state, data, None)
            # of full batches an epoch is one update
            ts, metrics, _ = fnet.train(step, ts, data, epochs=config.every, batch_size=config.examples, shuffle=False)
            return ts, {"loss": metrics["loss"].value.ravel(), "sharpness": now}

        _, curves = jax.lax.scan(piece, start, length=config.updates // config.every)
        return {name: curve.ravel() for name, curve in curves.items()}

    return run


def measure(loss: np.ndarray, sharpness: np.ndarray, rate: float, every: int) -> dict:
    """What a run did before and after it came to its edge, if it did; of the last third the mean sharpness counts."""
    edge, rises = 2 / rate, np.diff(loss) > 0
    there = bool((sharpness >= edge).any())
    reached = every * int(np.argmax(sharpness >= edge)) if there else len(loss)
    return {
        "first sharpness": float(sharpness[0]),
        "highest sharpness": float(sharpness.max()),
        "last third · η/2": float(sharpness[-(len(sharpness) // 3) :].mean() / edge),
        "edge reached at": reached if there else None,
        "rises before": float(rises[:reached].mean()) if reached else None,
        "rises after": float(rises[reached:].mean()) if there and reached < len(rises) else None,
        "loss at the edge": float(loss[reached]) if there else None,
        "last loss": float(loss[-1]),
    }


def run(config: Config, console: Console | None = None) -> dict:
    """Descend at all rates from all seeds, print the table, draw; returns curves and what was measured."""
    console = open_console(config, console)
    if config.updates % config.every or config.updates < 3 * config.every:
        raise SystemExit(f"--updates {config.updates}; expected a multiple of {config.every}, at least three times it")
    if min(config.rates) == 0 or len({*config.rates}) < len(config.rates):
        raise SystemExit(f"--rates {config.rates}; expected different rates above 0: the edge is 2 / rate")
    if config.examples > 1797:
        raise SystemExit(f"--examples {config.examples}; expected at most 1797, the digits that there are")
    folder = new_run_folder(config, "edge_of_stability")
    members = crossed(grid(learning_rate=config.rates), jax.vmap(jax.random.key)(jnp.array(config.seeds)))
    with console.status(f"{len(config.rates)} rates, {len(config.seeds)} seeds, {config.updates} updates"):
        curves = train_population(run_of(config), *members, load(config.examples)).results
    shape = len(config.rates), len(config.seeds), -1
    curves = {name: values.reshape(shape) for name, values in curves.items()}  # (rates, seeds, T) and (…, T / every)
    measured = {
        rate: [measure(loss, sharp, rate, config.every) for loss, sharp in zip(losses, sharps, strict=True)]
        for rate, losses, sharps in zip(config.rates, curves["loss"], curves["sharpness"], strict=True)
    }

    def cell(name, values):
        values = [value for value in values if value is not None]
        form = ".0f" if name == "edge reached at" else ".1%" if "rises" in name else ".4f" if "loss" in name else ".3f"
        fewer = f" ({len(values)} of {len(config.seeds)})" if len(values) < len(config.seeds) else ""
        return mean_and_spread(values, form) + fewer if values else "never"

    columns = {f"η = {rate:g}": runs for rate, runs in measured.items()}
    rows = {"2/η": {f"η = {rate:g}": f"{2 / rate:.3f}" for rate in config.rates}}
    for name in measured[config.rates[0]][0]:
        rows[name] = {column: cell(name, [one[name] for one in runs]) for column, runs in columns.items()}
    console.print(engine_table(f"{config.updates} updates, {len(config.seeds)} seeds", rows))
    draw(curves, config, folder / "sharpness.png")
    write_results(folder, {str(rate): runs for rate, runs in measured.items()})
    say_written(console, folder)
    return {"curves": curves, "measured": measured, "folder": folder}


def draw(curves: dict[str, np.ndarray], config: Config, path: Path) -> None:
    """Loss and sharpness by updates, every seed a line; the dashed lines are 2/η, where the sharpness comes so high."""
    figure, (left, right) = new_figure(2, height=4.6)
    updates = np.arange(config.updates)
    highest = curves["sharpness"][np.isfinite(curves["sharpness"])].max()
    for i, rate in enumerate(config.rates):
        for j, (loss, sharpness) in enumerate(zip(curves["loss"][i], curves["sharpness"][i], strict=True)):
            style = {"color": f"C{i}", "linewidth": 0.8, "alpha": 0.8}
            left.plot(updates, loss, label=f"η = {rate:g}" if j == 0 else None, **style)
            right.plot(updates[:: config.every], sharpness, **style)
        right.axhline(2 / rate, color=f"C{i}", linestyle="--", label=f"2/η = {2 / rate:.2f}")
    left.set(xlabel="update", ylabel="training loss", yscale="log")
    right.set(xlabel="update", ylabel="sharpness: largest eigenvalue of the Hessian", ylim=(0, 1.1 * highest))
    grid_and_legend(left)
    grid_and_legend(right, loc="lower right")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
