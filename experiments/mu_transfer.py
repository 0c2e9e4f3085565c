"""The best learning rate moves with the width, and in μP it stays (Yang et al., arXiv:2203.03466).

    python -m experiments.mu_transfer
    python -m experiments.mu_transfer --widths 64 256 --depth 2

MLPs of widths n = 64 to 1024 learn 1,440 of scikit-learn's 8x8 digits for three epochs by Adam, at rates a factor 2
apart. The paper's claims: in the standard parametrisation the best rate falls as the network widens; in the maximal
update parametrisation (μP) it stays, so that the narrow network's is the wide one's, and wider is better at any rate.
The two differ in three places (the paper's table 3, with all agreeing at a base width n₀, here 64):

                              input weights, biases    hidden weights    output weights
    initial variance          1 / fan_in, 0            1 / fan_in        1 / fan_in · n₀ / n
    Adam's rate               η                        η · n₀ / n        η · n₀ / n

where the standard parametrisation has no n₀ / n; a 2 for relu stands before the variances of all layers but the last.
A width's rates and seeds are one program. The best rate is the lowest point of the parabola through the best of the
grid and its neighbours, in logarithms; its exponent s in `rate ∝ width^s` is fitted for each seed. `Transferred` is the
widest network's loss at the rate that is best on the grid for the narrowest.

By the first command, mean and standard deviation of the seeds 0, 1, 2; rates, epochs and widths were chosen on others:

                                        standard           μP
    best rate of width 64               0.0057             0.0057
    best rate of width 1024             0.0004             0.0042
    its exponent s                      -0.88 ± 0.11       -0.13 ± 0.11
    loss of width 1024 at its best      0.0084 ± 0.0033    0.0176 ± 0.0027
    the same, transferred               0.157 ± 0.036      0.031 ± 0.012
    no higher loss in the next width    57 %               82 %        of all rates and widths

The first claim holds. The second holds nearly: while the width grows by 16, the best rate falls by a factor 1.3 in μP
and 14 in the standard parametrisation, and the narrowest network's rate costs the widest a factor 1.7 of its loss
(standard: 19). Wider is better in μP at every rate up to 0.004, about the best; above, the seeds scatter too much to
tell. μP is not the better one where both are tuned: the widest standard network comes to half the loss in these three
epochs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written, write_results
from experiments.options import Amounts, ByEngine, Count, Counts, InFolder, Seeds, engine_of
from experiments.pictures.parts import legend_below, mean_and_spread
from fnet.core.numerics import stream
from fnet.layers import dense, relu, serial
from fnet.layers.initializers import fan_in, normal, variance_scaling
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure
from fnet.training.population import crossed, grid, train_population
from fnet.types import Layer, Optimizer


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Find the best rate of networks of several widths in the standard parametrisation and in μP."""

    widths: Counts = (64, 128, 256, 512, 1024)
    base: Count = 64  # the width at which the parametrisations agree
    depth: Count = 3  # hidden layers
    rates: Amounts = tuple(2.0**k for k in range(-13, -2))  # rising
    seeds: Seeds = (0, 1, 2)  # of the parameters and of the order of the examples
    epochs: Count = 3
    batch_size: Count = 32
    examples: Count = 1440  # the first of the 1,797 digits


def parametrised(width: int, depth: int, shrink: float) -> tuple[Layer, Callable[..., Optimizer]]:
    """A model, and its Adam by rate; ``shrink`` is n₀ / n in μP, and 1 in the standard parametrisation."""
    hidden = dense(width, weights=variance_scaling(2.0, fan_in, normal))
    output = dense(10, weights=variance_scaling(shrink, fan_in, normal))
    model = serial(*[hidden, relu()] * depth, output)

    def optimizer(rate) -> Optimizer:
        return fnet.groups({"dense_0/w": fnet.adam(rate), "*/b": fnet.adam(rate)}, default=fnet.adam(rate * shrink))

    return model, optimizer


def load(examples: int) -> fnet.Batch:
    """Digits with pixels of mean 0 and variance 1 over all."""
    inputs, labels = fnet.data.sklearn_digits()[:2]
    inputs = inputs[:examples]
    return fnet.Batch((inputs - inputs.mean()) / inputs.std(), labels[:examples])


def run_of(config: Config, width: int, shrink: float):
    """A whole run as a function of its rate: the loss of all examples at the end."""
    model, optimizer_at = parametrised(width, config.depth, shrink)
    loss = fnet.softmax_cross_entropy
    evaluate = fnet.make_evaluate(model, loss)

    def run(hyper, key, data):
        optimizer = optimizer_at(hyper["learning_rate"])
        params, state = model.init(stream(key, "model"), data.inputs[:1])
        start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
        step = fnet.make_step(engine_of(config)(model, loss), optimizer)
        end, _, _ = fnet.train(step, start, data, epochs=config.epochs, batch_size=config.batch_size)
        return evaluate(end.params, end.state, data)["loss"].value

    return run


def lowest(rates: np.ndarray, losses: np.ndarray) -> float:
    """The rate of the lowest loss: of a parabola through the best and its neighbours, in logarithms of both.

    At an end of the rates it is that end.
    """
    i = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
    if not 0 < i < len(rates) - 1 or not np.isfinite(losses[i - 1 : i + 2]).all():
        return float(rates[i])
    a, b, _ = np.polyfit(np.log(rates[i - 1 : i + 2] / rates[i]), np.log(losses[i - 1 : i + 2]), 2)
    return float(rates[i] * np.exp(-b / (2 * a))) if a > 0 else float(rates[i])


def measure(losses: np.ndarray, config: Config) -> dict:
    """What the losses ``(widths, rates, seeds)`` of one parametrisation say."""
    rates, mean = np.array(config.rates), losses.mean(-1)
    best = np.where(np.isfinite(mean), mean, np.inf).argmin(1).tolist()
    own = np.array([[lowest(rates, losses[w, :, s]) for w in range(len(losses))] for s in range(losses.shape[-1])])
    widths = np.log(config.widths)
    return {
        "best rate on the grid": [config.rates[i] for i in best],
        "best rate": own.T.tolist(),
        "exponent": [float(np.polyfit(widths, np.log(row), 1)[0]) for row in own],
        "loss at the best": [losses[w, i].tolist() for w, i in enumerate(best)],
        "transferred": losses[-1, best[0]].tolist(),
        # of all rates and steps to the next width, those after which the loss is no higher
        "wider is better": float((np.diff(mean, axis=0) <= 0).mean()),
    }


def run(config: Config, console: Console | None = None) -> dict:
    """Train all, print the tables, draw; returns losses and what they say, by parametrisation."""
    console = open_console(config, console)
    check(config)
    folder = new_run_folder(config, "mu_transfer")
    data, keys = load(config.examples), jax.vmap(jax.random.key)(jnp.array(config.seeds))
    members, shape = crossed(grid(learning_rate=config.rates), keys), (len(config.rates), len(config.seeds))
    losses, measured = {}, {}
    for name, exponent in (("standard", 0), ("μP", 1)):
        found = []
        for width in config.widths:
            with console.status(f"{name}, width {width}: {len(config.rates)} rates, {len(config.seeds)} seeds"):
                shrink = (config.base / width) ** exponent
                found.append(train_population(run_of(config, width, shrink), *members, data).results.reshape(shape))
        losses[name] = np.stack(found)
        measured[name] = measure(losses[name], config)

    rows = {}
    for name, m in measured.items():
        for what, form in (("best rate", ".5f"), ("loss at the best", ".4f")):
            cells = [mean_and_spread(values, form) for values in m[what]]
            rows[f"{name}: {what}"] = {str(width): cell for width, cell in zip(config.widths, cells, strict=True)}
    console.print(engine_table(f"by width, {len(config.seeds)} seeds, {config.epochs} epochs", rows))
    summary = {
        "exponent of the best rate": {name: mean_and_spread(m["exponent"], ".2f") for name, m in measured.items()},
        "widest, at its own best": {n: mean_and_spread(m["loss at the best"][-1], ".4f") for n, m in measured.items()},
        "widest, transferred": {name: mean_and_spread(m["transferred"], ".4f") for name, m in measured.items()},
        "wider is better": {name: f"{m['wider is better']:.0%}" for name, m in measured.items()},
    }
    console.print(engine_table(f"rates from width {config.widths[0]} to {config.widths[-1]}", summary))
    draw(losses, measured, config, folder / "rates.png")
    write_results(folder, {name: {**m, "losses": losses[name].tolist()} for name, m in measured.items()})
    say_written(console, folder)
    return {"losses": losses, "measured": measured, "folder": folder}


def check(config: Config) -> None:
    """Refuse widths, rates and examples of which nothing can be said."""
    if len(config.widths) < 2 or sorted({*config.widths}) != [*config.widths]:
        raise SystemExit(f"--widths {config.widths}; expected two or more, rising")
    if min(config.rates) == 0 or sorted({*config.rates}) != [*config.rates]:
        raise SystemExit(f"--rates {config.rates}; expected rates above 0, rising")
    if not config.batch_size <= config.examples <= 1797:
        raise SystemExit(
            f"--examples {config.examples}; expected {config.batch_size}, a batch, to 1797, the digits that there are"
        )


def draw(losses: dict[str, np.ndarray], measured: dict, config: Config, path: Path) -> None:
    """The final loss by rate, one line a width: the mean of the seeds, shaded from the least to the greatest."""
    from matplotlib import colormaps

    figure, axes = new_figure(len(losses), height=4.2, width=3.7)
    for ax, (name, by_width) in zip(axes, losses.items(), strict=True):
        for i, (width, found) in enumerate(zip(config.widths, by_width, strict=True)):
            color = colormaps["viridis"](0.9 * i / (len(config.widths) - 1))
            ax.plot(config.rates, found.mean(1), color=color, label=f"width {width}")
            ax.fill_between(config.rates, found.min(1), found.max(1), color=color, alpha=0.15, linewidth=0)
            best = measured[name]["best rate on the grid"][i]
            ax.plot(best, found.mean(1)[config.rates.index(best)], "o", color=color)
        s = mean_and_spread(measured[name]["exponent"], ".2f")
        ax.set_title(f"{name}: best rate\n∝ width^({s})", fontsize="medium")
        ax.set(xlabel="learning rate η", xscale="log", yscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"training loss after {config.epochs} epochs")
    low, high = zip(*(ax.get_ylim() for ax in axes), strict=True)
    for ax in axes:
        ax.set_ylim(min(low), max(high))
    legend_below(figure, axes[0], 3, fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
