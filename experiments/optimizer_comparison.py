"""Five optimizers on the digits and in a narrow valley: what each is good for, in numbers (the source texts, S7).

    python -m experiments.optimizer_comparison
    python -m experiments.optimizer_comparison --digits.adam 0.001 --valley.sgd 0.01

Digits: 64-32-10 on the 8x8 digits of scikit-learn, all from the same starts with the same batches, each optimizer at
its own rate: its best of the grid, by the median of the final training cost over the starts. Every rate with every
start is one vmapped program; it shows how much the rate matters.

Valley: f(p) = ½ pᵀ A p with curvatures 1 and `condition`, from (10, 1), by `from_loss` and a scan of steps; along the
axes, and turned by 45°, where scaling each coordinate by itself cannot tell the steep direction from the flat one.

Epochs and steps are counted to where the value falls below the target for good.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import Amount, Amounts, ByEngine, Count, InFolder, Positive, Seeded, Widths, engine_of
from experiments.pictures.parts import DOTTED, grid_and_legend
from fnet.core.numerics import stream
from fnet.metrics import accuracy
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure

OPTIMIZERS = {
    "sgd": fnet.sgd,
    "momentum": fnet.momentum,
    "nesterov": partial(fnet.momentum, nesterov=True),
    "rmsprop": fnet.rmsprop,
    "adam": fnet.adam,
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """A learning rate for each optimizer."""

    sgd: Amount
    momentum: Amount
    nesterov: Amount
    rmsprop: Amount
    adam: Amount


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine, Seeded):
    """Compare five optimizers on the 8x8 digits and in a narrow quadratic valley."""

    digits: Rates = Rates(sgd=1.0, momentum=0.1, nesterov=0.1, rmsprop=0.01, adam=0.03)
    valley: Rates = Rates(sgd=0.019, momentum=0.02, nesterov=0.01, rmsprop=0.01, adam=0.5)
    grid: Amounts = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # rates tried with all, on both
    hidden: Widths = (32,)  # widths of the hidden layers
    batch_size: Count = 32
    epochs: Count = 20
    starts: Count = 10  # draws of the parameters and of the order of the examples
    target: Amount = 0.1  # a training cost; the table says when it is reached and with how many of the rates
    condition: Positive = 100.0  # the valley's greatest curvature; its least is 1
    steps: Count = 2000  # in the valley


def train_digits(config: Config, model, make, rate, start, key, data):
    """Training cost after each epoch, and the parameters and state at the end; the rate may be traced."""
    loss, optimizer = fnet.softmax_cross_entropy, make(rate)
    params, state = start
    ts = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    step = fnet.make_step(engine_of(config)(model, loss), optimizer)
    options = {"epochs": config.epochs, "batch_size": config.batch_size, "validation": data}
    ts, _, results = fnet.train(step, ts, data, evaluate=fnet.make_evaluate(model, loss), **options)
    return results["loss"].value, (ts.params, ts.state)


def descend_valley(config: Config, make, rate, degrees):
    """The path ``(T + 1, 2)`` from the start on, and f along it ``(T + 1,)``, in a valley turned by ``degrees``."""
    c, s = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    turn = jnp.array([[c, -s], [s, c]])
    curvature = (turn @ jnp.diag(jnp.array([1.0, config.condition])) @ turn.T)[None]  # a batch of one example

    def f(p, batch, key):
        return 0.5 * jnp.einsum("bij,i,j->b", batch, p, p).mean()

    optimizer = make(rate)
    step = fnet.make_step(fnet.from_loss(f), optimizer)

    def one(ts, _):
        after, metrics = step(ts, curvature)
        return after, (ts.params, metrics["loss"].value)

    start = fnet.init_train_state(turn @ jnp.array([10.0, 1.0]), optimizer, jax.random.key(0))
    return jax.lax.scan(one, start, length=config.steps + 1)[1]


def run(config: Config, console: Console | None = None) -> dict:
    """Train and descend with every optimizer, print tables and advice, draw; returns what was measured."""
    console = open_console(config, console)
    folder = new_run_folder(config, "optimizer_comparison")
    key = jax.random.key(config.seed)
    train_data, test_data = fnet.split(fnet.data.sklearn_digits(), (1440, 357), stream(key, "split"))
    model, keys = fnet.mlp(*config.hidden, 10), jax.random.split(stream(key, "starts"), config.starts)
    starts = jax.jit(jax.vmap(lambda key: model.init(stream(key, "model"), train_data.inputs[:1])))(keys)
    evaluate = fnet.make_evaluate(model, fnet.softmax_cross_entropy, {"accuracy": accuracy})
    test = jax.jit(jax.vmap(lambda params, state: evaluate(params, state, test_data)["accuracy"].value))
    digits, valley, arrays = {}, {}, {}
    for name, make in OPTIMIZERS.items():
        rates = [jnp.array([getattr(own, name), *config.grid]) for own in (config.digits, config.valley)]
        with console.status(f"{name}: {len(rates[0])} rates with {config.starts} starts each"):
            train = jax.vmap(partial(train_digits, config, model, make), in_axes=(None, 0, 0, None))
            train = jax.jit(jax.vmap(train, in_axes=(0, None, None, None)))
            costs, ends = jax.device_get(train(rates[0], starts, keys, train_data))  # costs (R, starts, E)
            accuracies = test(*jax.tree.map(lambda a: a[0], ends))
            descend = jax.jit(jax.vmap(partial(descend_valley, config, make), in_axes=(0, None)))
            (paths, f), (_, turned) = jax.device_get([descend(rates[1], degrees) for degrees in (0.0, 45.0)])
        arrays[name] = {"costs": costs, "path": paths[0], "f": f[0]}
        median = np.median(costs, axis=1)  # (R, E)
        opt_state = jax.eval_shape(make(0.1).init, jax.ShapeDtypeStruct((1000,), "float32"))
        digits[name] = {
            "numbers kept per weight": sum(leaf.size for leaf in jax.tree.leaves(opt_state)) // 1000,
            "learning rate": getattr(config.digits, name),
            "final cost, median": float(median[0, -1]),
            "final cost, lowest": float(costs[0, :, -1].min()),
            "final cost, highest": float(costs[0, :, -1].max()),
            "test accuracy, mean": float(accuracies.mean()),
            "epochs to the target": settled(median[0], config.target, 1),
            "good rates": int((median[1:, -1] < config.target).sum()),
            "best rate tried": config.grid[int(np.argmin(np.nan_to_num(median[1:, -1], nan=np.inf)))],
        }
        valley[name] = {
            "learning rate": getattr(config.valley, name),
            "steps to the target": settled(f[0], 1e-6),
            "the same, turned by 45°": settled(turned[0], 1e-6),
            "last f": float(f[0, -1]),
            "good rates": sum(settled(one, 1e-6) is not None for one in f[1:]),
        }

    show(console, f"digits: {config.starts} starts, {config.epochs} epochs, target: cost < {config.target}", digits)
    show(console, f"valley: condition {config.condition:g}, {config.steps:,} steps, target: f < 1e-6", valley)
    console.print(f"Good rates end below the target; tried: {', '.join(f'{rate:g}' for rate in config.grid)}.")
    console.print("When to use which, as measured (the sentences were written for the default settings):")
    for name, line in advice(digits, valley).items():
        console.print(f"  {name:9} {line}", highlight=False, soft_wrap=True)
    ends = [column["final cost, median"] for column in digits.values()]
    console.print(f"On the digits, each at its own rate, the medians end between {min(ends):.2g} and {max(ends):.2g}.")
    draw_digits(config, arrays, folder / "digits.png")
    draw_valley(config, arrays, folder / "valley.png")
    say_written(console, folder)
    return {"digits": digits, "valley": valley, "arrays": arrays, "folder": folder}


def show(console: Console, title: str, columns: dict) -> None:
    """A table with a column for each optimizer."""

    def cell(value):
        return "never" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"

    rows = {row: {name: cell(column[row]) for name, column in columns.items()} for row in columns["sgd"]}
    console.print(engine_table(title, rows))


def advice(digits: dict, valley: dict) -> dict[str, str]:
    """When to use which, each with the numbers that say so."""
    epochs = {name: column["epochs to the target"] for name, column in digits.items()}
    steps, turned, last, good = (
        {name: column[row] for name, column in valley.items()}
        for row in ("steps to the target", "the same, turned by 45°", "last f", "good rates")
    )
    return {
        "sgd": f"well-scaled problems, little memory: {epochs['sgd']} epochs on the digits and nothing kept, but "
        f"{steps['sgd']} steps in the valley, where the steepest direction limits the rate",
        "momentum": f"the first thing to try where sgd is slow: {steps['momentum']} steps to its {steps['sgd']}, and "
        f"{good['momentum']} good rates to its {good['sgd']}, for one number kept per weight",
        "nesterov": f"where momentum swings too far: {steps['nesterov']} steps to its {steps['momentum']}, but "
        f"{good['nesterov']} good rates to its {good['momentum']}, since large ones diverge sooner",
        "rmsprop": f"noisy mini-batches, no exact minimum: {epochs['rmsprop']} epochs on the digits, but f ends at "
        f"{last['rmsprop']:.1g}, for the steps are about as long as the rate, however small the gradient",
        "adam": f"where no good rate is known: {good['adam']} good rates in the valley; two numbers kept per weight, "
        f"and {steps['adam']} steps become {turned['adam']} where the valley does not run along an axis",
    }


def settled(values: np.ndarray, target: float, first: int = 0) -> int | None:
    """The index, counted from ``first``, from which on all ``values`` are below ``target``; None if the last is not."""
    above = np.flatnonzero(~(values < target))  # NaN is not below
    end = int(above[-1]) + 1 if len(above) else 0
    return None if end == len(values) else first + end


def draw_digits(config: Config, arrays: dict, path: Path) -> None:
    """Training cost by epochs at each optimizer's own rate, and final cost by rate: medians, and the starts' range."""
    figure, (left, right) = new_figure(2, height=4.2)
    order = np.argsort(config.grid)
    for i, (name, a) in enumerate(arrays.items()):
        epochs, own, final = np.arange(1, config.epochs + 1), a["costs"][0], a["costs"][1:, :, -1]
        left.plot(epochs, np.median(own, 0), color=f"C{i}", label=f"{name}, rate {getattr(config.digits, name):g}")
        left.fill_between(epochs, own.min(0), own.max(0), color=f"C{i}", alpha=0.12, linewidth=0)
        right.plot(np.array(config.grid)[order], np.median(final, 1)[order], "o-", markersize=4, color=f"C{i}")
    left.set(xlabel="epoch", ylabel="training cost", yscale="log", title="each at its own rate")
    right.set(xlabel="learning rate", ylabel="training cost", xscale="log", yscale="log")
    right.set_title(f"after {config.epochs} epochs, by rate")
    grid_and_legend(left)
    right.grid(alpha=0.3)
    save_figure(figure, path)


def draw_valley(config: Config, arrays: dict, path: Path) -> None:
    """Each optimizer's path on the valley's contours, and f by steps."""
    figure, axes = new_figure(3, rows=2, height=3.2)
    *panels, last = np.ravel(axes)
    x, y = np.meshgrid(np.linspace(-9, 11, 200), np.linspace(-1.4, 1.4, 200))
    f = 0.5 * (x**2 + config.condition * y**2)
    for i, (ax, (name, a)) in enumerate(zip(panels, arrays.items(), strict=True)):
        ax.contour(x, y, f, levels=10.0 ** np.arange(-2, 4, 0.5), colors="0.8", linewidths=0.8)
        ax.plot(*a["path"].T, ".-", color=f"C{i}", markersize=4, linewidth=0.8)
        end = settled(a["f"], 1e-6)
        how = f"not in {config.steps:,} steps" if end is None else f"{end} steps"
        ax.set(xlim=(-9, 11), ylim=(-1.4, 1.4), title=f"{name}, rate {getattr(config.valley, name):g}: {how}")
        last.plot(np.arange(1, len(a["f"])), a["f"][1:], color=f"C{i}", label=name)
    last.axhline(1e-6, **DOTTED)
    last.set(xlabel="steps", ylabel="f", xscale="log", yscale="log", ylim=(1e-7, 1e3), title="f by steps")
    grid_and_legend(last, loc="lower left")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
