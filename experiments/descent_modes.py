"""Full-batch, mini-batch and stochastic gradient descent: the same problem, start and rate (the source texts, S6).

    python -m experiments.descent_modes
    python -m experiments.descent_modes --learning-rate 1
    python -m experiments.descent_modes --hidden 32 --learning-rate 0.1

The three are one function, `fnet.train`, at batch sizes N, 32 and 1. The problem is softmax regression on the 8x8
digits of scikit-learn: convex, so the modes differ by how they descend, not by where they could end up. The full cost
is taken before every update, to tell apart what an update saw and what it did. Over the last `window` updates:

- noise: the standard deviation of (cost of the update's own examples − full cost at the same parameters), divided by
  the mean full cost;
- rises: the share of updates after which the full cost is higher than before.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import Amount, ByEngine, Count, InFolder, Seeded, Widths, engine_of
from experiments.pictures.parts import DOTTED
from fnet.core.numerics import stream
from fnet.metrics import accuracy
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine, Seeded):
    """Descend on the 8x8 digits by full batches, mini-batches and single examples."""

    hidden: Widths = ()  # widths of hidden layers; none is softmax regression
    learning_rate: Amount = 0.3  # of plain gradient descent, the same in all modes
    batch_size: Count = 32  # of the mini-batches
    epochs: Count = 20  # of mini-batch and stochastic descent
    full_batch_epochs: Count = 900  # one update each: as many as the mini-batches make with the defaults
    target: Amount = 0.2  # a full training cost; the table says when it is first reached
    window: Count = 500  # the last updates, over which noise and rises are counted
    test_size: Count = 357  # of the 1,797 digits; the other 1,440 are trained on


def run(config: Config, console: Console | None = None) -> dict:
    """Descend in the three modes, print the table and draw the costs; returns what was measured, by mode."""
    console = open_console(config, console)
    folder = new_run_folder(config, "descent_modes")
    key = jax.random.key(config.seed)
    digits = fnet.data.sklearn_digits()
    n = len(digits.targets) - config.test_size
    train_data, test_data = fnet.split(digits, (n, config.test_size), stream(key, "split"))

    model, loss, optimizer = fnet.mlp(*config.hidden, 10), fnet.softmax_cross_entropy, fnet.sgd(config.learning_rate)
    params, state = fnet.init(model, stream(key, "model"), train_data.inputs[:1])
    start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    step = fnet.make_step(engine_of(config)(model, loss), optimizer)
    evaluate = fnet.make_evaluate(model, loss, {"accuracy": accuracy})

    @partial(jax.jit, static_argnames=("batch_size", "epochs"))
    def descend(ts, train_data, test_data, batch_size, epochs):
        def watched(ts, batch):  # a step is a plain function, so more can be measured around it
            full = evaluate(ts.params, ts.state, train_data)["loss"]
            ts, metrics = step(ts, batch)
            return ts, {"seen": metrics["loss"], "full": full}

        ts, metrics, _ = fnet.train(watched, ts, train_data, epochs=epochs, batch_size=batch_size)
        return metrics, *(evaluate(ts.params, ts.state, data) for data in (train_data, test_data))

    full_batch, others = (n, config.full_batch_epochs), config.epochs
    modes = {"full batch": full_batch, "mini-batch": (config.batch_size, others), "stochastic": (1, others)}
    results, last = {}, slice(-config.window, None)
    for mode, (batch_size, epochs) in modes.items():
        with console.status(f"{mode}: {epochs} epochs of {-(-n // batch_size)} updates"):
            metrics, trained, tested = jax.device_get(descend(start, train_data, test_data, batch_size, epochs))
        seen, full = metrics["seen"].value.ravel(), metrics["full"].value.ravel()
        cost = np.append(full, trained["loss"].value)  # cost[t] and examples[t] after t updates
        reached = int(np.argmax(cost < config.target)) if cost.min() < config.target else None
        examples = np.append(0, metrics["seen"].count.ravel().cumsum())
        batch = jax.tree.map(lambda a, size=batch_size: a[:size], train_data)
        analysis = jax.jit(step).lower(start, batch).compile().cost_analysis() or {"flops": 0}
        results[mode] = {
            "examples per update": batch_size,
            "FLOPs per update (compiler)": int(analysis["flops"]),
            "updates": len(seen),
            "examples seen": int(examples[-1]),
            "final training cost": float(cost[-1]),
            "test accuracy": float(tested["accuracy"].value),
            "updates to the target": reached,
            "examples to the target": None if reached is None else int(examples[reached]),
            "noise": float((seen - full)[last].std() / full[last].mean()),
            "rises": float((np.diff(cost)[last] > 0).mean()),
            "curves": {"examples": examples, "cost": cost, "seen": seen},
        }

    def cell(value):
        return "not reached" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

    title = f"gradient descent at rate {config.learning_rate} on {n} digits: cost {cost[0]:.3f}, target {config.target}"
    names = list(results["stochastic"])[:-1]
    console.print(engine_table(title, {name: {m: cell(r[name]) for m, r in results.items()} for name in names}))
    draw(results, config, folder / "cost.png")
    say_written(console, folder)
    return {**results, "folder": folder}


def draw(results: dict, config: Config, path: Path) -> None:
    """Full cost by updates and by examples; and what the last updates saw, around the full cost."""
    figure, axes = new_figure(3, height=4.2)
    for i, (mode, r) in reversed(list(enumerate(results.items()))):  # the noisiest lies beneath
        curves, color, label = r["curves"], f"C{i}", f"{mode}, B = {r['examples per update']:,}"
        # the mini-batches' curve is drawn wide: by updates the full batches' nearly coincides with it
        style = {"color": color, "linewidth": 3.5 if i == 1 else 1.2, "alpha": 0.6 if i == 1 else 1}
        axes[0].plot(np.arange(1, r["updates"] + 1), curves["cost"][1:], label=label, **style)
        axes[1].plot(curves["examples"][1:], curves["cost"][1:], label=label, **style)
        last = np.arange(-min(config.window, r["updates"]), 0)
        axes[2].plot(last, curves["seen"][last], ".", color=color, markersize=3, alpha=0.6)
        axes[2].plot(last, curves["cost"][:-1][last], **style)
    for ax, xlabel in zip(axes[:2], ("updates", "examples seen"), strict=True):
        ax.axhline(config.target, **DOTTED)
        ax.set(xlabel=xlabel, ylabel="cost of the whole training set", xscale="log", yscale="log")
        ax.legend(fontsize="small", loc="lower left")
    axes[2].set(xlabel="updates before the end", ylabel="cost", yscale="log", ylim=(1e-4, None))
    axes[2].set_title("dots: cost of the update's own examples; lines: full cost", fontsize="medium")
    for ax in axes:
        ax.grid(alpha=0.3)
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
