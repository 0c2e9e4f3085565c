"""Learning rates 0.001, 0.01, 0.1 and 1.0, all trained at once by one compiled program (the source texts, S10).

    python -m experiments.learning_rates
    python -m experiments.learning_rates --batch-size 256
    python -m experiments.learning_rates --epochs 10 --rates 0.1 1 10 1e30

64-64-32-10 on the 8x8 digits of scikit-learn by plain gradient descent on mini-batches. The rate is data: a whole run
is a function of it, and `jax.vmap` makes of that one program which trains at every rate, from the same start with the
same batches. A run has "diverged" if its last training cost is infinite or not a number, and is "at chance" if that
cost is not below ln 10, the cost of giving all ten classes the same probability.

Bias and variance, as far as one data set shows them: the training cost is what the model has not fitted (bias); the
test cost's excess over it comes of fitting what only these examples have (variance). A greater rate, until it is too
great, and more epochs lower the first and raise the second; training pays up to the epoch of the lowest test cost.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import Amounts, ByEngine, Count, InFolder, Seeded, Widths, engine_of
from experiments.pictures.parts import DOTTED, grid_and_legend
from fnet.core.numerics import stream
from fnet.metrics import accuracy
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine, Seeded):
    """Sweep the learning rate of plain gradient descent on the 8x8 digits in one program."""

    rates: Amounts = (0.001, 0.01, 0.1, 1.0)
    batch_size: Count = 32
    epochs: Count = 100
    hidden: Widths = (64, 32)  # widths of the hidden layers
    test_size: Count = 357  # of the 1,797 digits; the other 1,440 are trained on


def load(config: Config) -> tuple[fnet.Batch, ...]:
    """Training and test digits."""
    digits = fnet.data.sklearn_digits()
    sizes = (len(digits.targets) - config.test_size, config.test_size)
    return fnet.split(digits, sizes, stream(jax.random.key(config.seed), "split"))


def train_at(config: Config, rate, train_data: fnet.Batch, test_data: fnet.Batch) -> dict:
    """A whole run as a function of its rate: the cost of every update, and after each epoch cost and accuracy."""
    key = jax.random.key(config.seed)
    model, loss, optimizer = fnet.mlp(*config.hidden, 10), fnet.softmax_cross_entropy, fnet.sgd(rate)
    params, state = model.init(stream(key, "model"), train_data.inputs[:1])
    start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    evaluate = fnet.make_evaluate(model, loss, {"accuracy": accuracy})
    parts = {"train": train_data, "test": test_data}
    options = {"epochs": config.epochs, "batch_size": config.batch_size, "evaluate": evaluate, "validation": parts}
    step = fnet.make_step(engine_of(config)(model, loss), optimizer)
    _, updates, epochs = fnet.train(step, start, train_data, **options)
    epochs = {f"{part} {name}": mean.value for part, means in epochs.items() for name, mean in means.items()}
    return {"update loss": updates["loss"].value, **epochs}  # (E, S), and (E,) each


def run(config: Config, console: Console | None = None) -> dict:
    """Train at every rate, print the table, draw the curves; returns what was measured, by rate."""
    console = open_console(config, console)
    folder = new_run_folder(config, "learning_rates")
    data, traces = load(config), 0

    def member(rate, *data):
        nonlocal traces
        traces += 1  # Python runs this body only while jax traces it, once for each program it compiles
        return train_at(config, rate, *data)

    sweep = jax.jit(jax.vmap(member, in_axes=(0, None, None)))
    with console.status(f"{len(config.rates)} rates, {config.epochs} epochs each"):
        curves = jax.device_get(sweep(jnp.array(config.rates), *data))
    console.print(f"{len(config.rates)} runs in one program, traced {traces} time(s)")

    results = {}
    for i, rate in enumerate(config.rates):
        c = {name: curve[i] for name, curve in curves.items()}
        train, test = c["train loss"], c["test loss"]
        best = int(np.argmin(np.where(np.isfinite(test), test, np.inf)))
        verdict = "at chance" if train[-1] >= math.log(10) else "trained"
        results[rate] = {
            "verdict": verdict if np.isfinite(train[-1]) else "diverged",
            "training cost: bias": float(train[-1]),
            "test cost": float(test[-1]),
            "test − training: variance": float(test[-1] - train[-1]),
            "lowest test cost": float(test[best]),
            "at epoch": best + 1,
            "training accuracy": float(c["train accuracy"][-1]),
            "test accuracy": float(c["test accuracy"][-1]),
            "highest batch cost": float(c["update loss"].max()),  # NaN if any is
            "curves": c,
        }

    def cell(value):
        return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)

    names = list(results[config.rates[0]])[:-1]
    columns = {f"rate {rate:g}": r for rate, r in results.items()}
    title = f"{config.epochs} epochs in batches of {config.batch_size}: after the last epoch, by learning rate"
    console.print(engine_table(title, {name: {c: cell(r[name]) for c, r in columns.items()} for name in names}))
    draw(results, config, folder / "curves.png")
    say_written(console, folder)
    return {"traces": traces, "rates": results, "folder": folder}


def draw(results: dict, config: Config, path: Path) -> None:
    """Training and test cost by epochs, and after the last epoch by rate; what is not finite is named and not drawn."""
    figure, (left, right) = new_figure(2, height=4.2)
    epochs = np.arange(1, config.epochs + 1)
    for i, (rate, r) in enumerate(results.items()):
        costs = (np.where(np.isfinite(c), c, np.nan) for c in (r["curves"]["train loss"], r["curves"]["test loss"]))
        left.plot(epochs, next(costs), color=f"C{i}", label=f"rate {rate:g}: {r['verdict']}")
        left.plot(epochs, next(costs), "--", color=f"C{i}", linewidth=1)
    drawn = [rate for rate in sorted(results) if results[rate]["verdict"] != "diverged"]
    for name, style in {"training cost: bias": "o-", "test cost": "o-", "lowest test cost": "v:"}.items():
        label = name.removesuffix(": bias")
        right.plot(drawn, [results[rate][name] for rate in drawn], style, markersize=5, label=label)
    left.set(xlabel="epoch", ylabel="cost", yscale="log", title="by epoch (dashed: test)")
    right.set(xlabel="learning rate", ylabel="cost", xscale="log", yscale="log", title=f"after {config.epochs} epochs")
    for ax in (left, right):
        ax.axhline(math.log(10), **DOTTED, label="chance, ln 10")
        ax.set_ylim(bottom=ax.get_ylim()[0] / 4)  # room for the legend
        grid_and_legend(ax, loc="lower left")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
