"""Grokking: a network that knows its training set by heart learns the rule long afterwards, if weights decay.

    python -m experiments.grokking
    python -m experiments.grokking --decays 0 3 --share 0.5 --steps 2000

The claim (Power et al., arXiv:2201.02177): on a table of a + b mod p, part of which is to train on, the accuracy on
this part is 1 long before that on the rest leaves chance; far later the rest is right as well. Weight decay decides how
soon. Power et al. train a transformer by mini-batches; here it is the smallest network known to do the same (Gromov,
arXiv:2301.02679), of one hidden layer with squares,

    logits = (x W)² V,   x (B, 2p) the ones of a and of b,

trained by AdamW on all training examples at once, cross-entropy. Every decay with every seed is one compiled program;
a seed sets the split of the table and the parameters. Gromov's claim of what is learnt is measured too: each unit's
weights by a are a wave of one frequency. The share of a unit's power that its strongest frequency has is averaged over
the units by their power; for weights drawn at random it is WAVES_START.

p = 59, 128 units, 40 % of the 3,481 sums to train on, accuracies every 10 steps, by the first command; the step at
which training accuracy is first 1, validation accuracy first 0.05 (chance is 0.017) and first 0.99, of seeds 0, 1, 2:

MEASURED

The rate, the size of the first weights and the decays were chosen on one other seed, so that the delay is seen and the
command is short: with smaller first weights, or more of the table to train on, it is shorter.

Legend: B examples, p modulus, W units, M members, T times at which accuracies are taken.
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
from experiments.options import Amounts, ByEngine, Count, InFolder, Positive, Seeds, Share, engine_of
from experiments.pictures.parts import DOTTED, draw_range
from fnet.core.numerics import stream
from fnet.layers import dense, serial, stateless
from fnet.layers.initializers import normal
from fnet.metrics import accuracy
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure
from fnet.training.population import crossed, grid, train_population
from fnet.types import Layer


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Learn modular addition by heart, and far later by its rule: accuracies by weight decay."""

    modulus: Count = 59
    width: Count = 128  # units
    share: Share = 0.4  # of the table, to train on
    decays: Amounts = (0.0, 0.1, 0.3, 1.0)  # of AdamW, in units of the rate
    learning_rate: Positive = 0.01
    steps: Count = 6000
    every: Count = 10  # steps, after which accuracies are taken
    seeds: Seeds = (0, 1, 2)  # of the split and the parameters


# --- the problem -----------------------------------------------------------------------------------------------------


def table(modulus: int) -> fnet.Batch:
    """All sums: inputs ``(p², 2p)``, the ones of a and of b, and targets ``(p²,)``, a + b mod p."""
    a, b = np.divmod(np.arange(modulus**2), modulus)
    ones = np.eye(modulus, dtype=np.float32)
    return fnet.Batch(np.concatenate([ones[a], ones[b]], 1), ((a + b) % modulus).astype(np.int32))


def square() -> Layer:
    """``y = x²``; ``dx = 2 x dy``."""
    return stateless("square", lambda key, x: (), lambda p, x: (x * x, x), lambda p, x, dy: ((), 2 * x * dy))


def make_network(config: Config) -> Layer:
    """Squares of sums of a row for a and one for b, and logits; what enters each layer has variance about 1 or 3."""
    first, last = normal(2**-0.5), normal(config.width**-0.5)
    units = ("units", dense(config.width, bias=None, weights=first))
    return serial(units, square(), ("logits", dense(config.modulus, bias=None, weights=last)))


def one_frequency(weights: jax.Array) -> jax.Array:
    """How much of the power of ``weights (p, W)`` is in each unit's strongest frequency above 0; 1 for pure waves."""
    power = jnp.abs(jnp.fft.rfft(weights, axis=0)[1:]) ** 2
    return power.max(0).sum() / power.sum()


# --- the experiment --------------------------------------------------------------------------------------------------


def member(config: Config):
    """A whole run as a function of its decay and its seed's key: what `train_population` takes."""
    model, loss = make_network(config), fnet.softmax_cross_entropy
    evaluate = fnet.make_evaluate(model, loss, {"accuracy": accuracy})
    size = round(config.share * config.modulus**2)

    def run(hyper, key, sums):
        order = jax.random.permutation(stream(key, "split"), config.modulus**2)
        parts = {"training": order[:size], "validation": order[size:]}
        parts = {name: fnet.Batch(sums.inputs[rows], sums.targets[rows]) for name, rows in parts.items()}
        params, state = model.init(stream(key, "model"), sums.inputs[:1])
        optimizer = fnet.adamw(config.learning_rate, b2=0.98, weight_decay=hyper["decay"])
        step = fnet.make_step(engine_of(config)(model, loss), optimizer)
        start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)

        def some_steps(ts, _):
            ts, _, _ = fnet.train(step, ts, parts["training"], epochs=config.every, batch_size=size, shuffle=False)
            found = {"norm": jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(ts.params)))}
            for part, data in parts.items():
                means = evaluate(ts.params, ts.state, data)
                found |= {f"{part} {name}": mean.value for name, mean in means.items()}
            return ts, found

        end, found = jax.lax.scan(some_steps, start, length=config.steps // config.every)
        waves = [one_frequency(p["units"]["w"][: config.modulus]) for p in (params, end.params)]
        return {**found, "waves at the start": waves[0], "waves at the end": waves[1]}

    return run


def first_step(values: np.ndarray, level: float, every: int) -> int | None:
    """The step at which values ``(T,)``, taken every so many steps, first are at least the level; None for never."""
    return (int(np.argmax(values >= level)) + 1) * every if (values >= level).any() else None


def run(config: Config, console: Console | None = None) -> dict:
    """Train with every decay, print the table, draw the accuracies; returns what was measured, by decay."""
    console = open_console(config, console)
    sums = config.modulus**2
    if config.steps % config.every:
        raise SystemExit(f"--steps {config.steps}; expected a multiple of --every {config.every}")
    if not 0 < round(config.share * sums) < sums:
        raise SystemExit(f"--share {config.share}; expected some of the {sums} sums to train on, and some left over")
    folder = new_run_folder(config, "grokking")
    keys = jax.vmap(jax.random.key)(jnp.array(config.seeds))
    with console.status(f"{len(config.decays)} decays, {len(keys)} seeds, {config.steps} steps"):
        settings = crossed(grid(decay=config.decays), keys)
        found = train_population(member(config), *settings, table(config.modulus)).results
    by_decay = {name: a.reshape(len(config.decays), len(keys), *a.shape[1:]) for name, a in found.items()}
    results, rows = {}, {}
    levels = {"training 1": ("training", 1.0), "validation 0.05": ("validation", 0.05)}
    levels["validation 0.99"] = ("validation", 0.99)
    for i, decay in enumerate(config.decays):
        results[decay] = r = {name: a[i] for name, a in by_decay.items()}
        r["first"] = {
            name: [first_step(values, level, config.every) for values in r[f"{part} accuracy"]]
            for name, (part, level) in levels.items()
        }
        steps = {
            name: ", ".join("never" if step is None else f"{step:,}" for step in found)
            for name, found in r["first"].items()
        }
        last = {name: f"{r[name][:, -1].mean():.3g}" for name in ("validation accuracy", "training loss", "norm")}
        rows[f"{decay:g}"] = {**steps, **last, "waves": f"{r['waves at the end'].mean():.3f}"}
    console.print(engine_table("weight decay: first step of each seed at which; and at the end", rows))
    start = by_decay["waves at the start"].mean()
    console.print(f"waves at the start: {start:.3f}", highlight=False)
    numbers = {
        str(decay): {name: each.tolist() if isinstance(each, np.ndarray) else each for name, each in r.items()}
        for decay, r in results.items()
    }
    write_results(folder, numbers)
    draw(results, config, folder / "grokking.png")
    say_written(console, folder)
    return {"decays": results, "folder": folder}


def draw(results: dict, config: Config, path: Path) -> None:
    """Both accuracies against steps, a panel a decay; the mean of the seeds and their range."""
    figure, axes = new_figure(len(results), height=3.2, width=3.6)
    steps = config.every * np.arange(1, config.steps // config.every + 1)
    for ax, (decay, r) in zip(np.ravel(axes), results.items(), strict=True):
        for part, color in (("training", "C0"), ("validation", "C1")):
            draw_range(ax, steps, r[f"{part} accuracy"], label=part, color=color)
        ax.axhline(1 / config.modulus, label="chance", **DOTTED)
        ax.set(xscale="log", xlabel="steps", ylim=(-0.03, 1.03))
        ax.set_title(f"weight decay {decay:g}" if decay else "no weight decay", fontsize="medium")
        ax.grid(alpha=0.3)
    first = np.ravel(axes)[0]
    first.set_ylabel("accuracy")
    first.legend(fontsize="small", loc="center left")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
