"""Grokking: a network that knows its training set by heart learns the rule long afterwards, if weights decay.

    python -m experiments.grokking
    python -m experiments.grokking --decays 0 0.1 --double

The claim (Power et al., arXiv:2201.02177): on a table of a + b mod p, part of which is to train on, the accuracy on
this part is 1 long before that on the rest leaves chance; far later the rest is right as well. Weight decay decides how
soon. Power et al. train a transformer by mini-batches; here it is a smaller network that does the same (Gromov,
arXiv:2301.02679), of one hidden layer with squares,

    logits = (x W)² V,   x (B, 2p) the ones of a and of b,

trained by AdamW on all training examples at once, cross-entropy. Every decay with every seed is one compiled program;
a seed sets the split of the table and the parameters. Gromov's claim of what is learnt is measured too: each unit's
weights by a are a wave of one frequency. "Waves" is how much of a unit's power its strongest frequency has, averaged
over the units by their power; 0.136 for the weights that are drawn.

p = 59, 128 units, 40 % of the 3,481 sums to train on, accuracies every 10 steps of 6,000. First steps, of seeds 0, 1
and 2, at which the training sums are known (accuracy 1), validation leaves chance (0.05; chance is 0.017) and groks
(0.99); then means at the end:

    decay         known        leaves                groks                 validation accuracy   waves
    0             60 50 60     never                 never                 0.006                 0.176
    0.1           60 60 60     1,540 1,430 1,250     never                 0.458                 0.610
    0.3           60 60 60       500   490   450     1,700 1,420 1,450     0.999                 0.947
    1             80 70 70       190   190   180       530   450   470     1.000                 0.949
    0, float64    60 50 50     never                 never                 0.006                 0.178
    0.1, float64  60 60 60     1,330 1,790 1,270     never                 0.984                 0.864

All that is claimed comes out with the decays 0.3 and 1, the greater of which groks three times sooner. With 0.1 it
comes slowly, and float32 is in its way: in float64 (the second command, whose parameters are drawn anew) 6,000 steps
end at 0.984 and still rise. In float32 training accuracy falls off 1 at times from step 3,840 on, to 0.95, and the norm
of the parameters grows from 97 at step 1,400 to 143 to 264; in float64 it falls to 69. The loss of what is known is
rounded to 0 or nearly (without decay the mean is 0 from step 1,400 on, mostly), as Prieto et al. find,
arXiv:2501.04697. Without decay no loss is 0 in float64, and 6,000 steps show no sign of the rule there, either.

The rate, the size of the first weights and the decays were chosen on one other seed, so that the delay is seen and the
command is short: with smaller first weights and half of the table to train on it was shorter. CPU time, compiling
included: 128 s for the first command, 103 s for the second.

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
    updates: Count = 6000
    every: Count = 10  # steps, after which accuracies are taken
    seeds: Seeds = (0, 1, 2)  # of the split and the parameters
    double: bool = False  # in float64, where the loss of what is known is not rounded to 0


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

        end, found = jax.lax.scan(some_steps, start, length=config.updates // config.every)
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
    if config.modulus < 3:
        raise SystemExit(f"--modulus {config.modulus}; expected at least 3, for a wave to have a frequency")
    if config.updates % config.every:
        raise SystemExit(f"--updates {config.updates}; expected a multiple of --every {config.every}")
    if not 0 < round(config.share * sums) < sums:
        raise SystemExit(f"--share {config.share}; expected some of the {sums} sums to train on, and some left over")
    folder = new_run_folder(config, "grokking")
    keys = jax.vmap(jax.random.key)(jnp.array(config.seeds))
    title = f"{len(config.decays)} decays, {len(keys)} seeds, {config.updates} steps"
    with console.status(title), jax.enable_x64(config.double):
        settings, data = crossed(grid(decay=config.decays), keys), table(config.modulus)
        data = data._replace(inputs=jnp.asarray(data.inputs, float))
        found = train_population(member(config), *settings, data).results
    by_decay = {name: a.reshape(len(config.decays), len(keys), *a.shape[1:]) for name, a in found.items()}
    results, rows = {}, {}
    levels = {"known": ("training", 1.0), "leaves": ("validation", 0.05), "groks": ("validation", 0.99)}
    for i, decay in enumerate(config.decays):
        results[decay] = r = {name: a[i] for name, a in by_decay.items()}
        r["first"] = {
            name: [first_step(values, level, config.every) for values in r[f"{part} accuracy"]]
            for name, (part, level) in levels.items()
        }
        steps = {
            name: ", ".join("never" if step is None else f"{step:,}" for step in each)
            for name, each in r["first"].items()
        }
        named = {"accuracy": "validation accuracy", "loss": "training loss", "norm": "norm"}
        last = {short: f"{r[name][:, -1].mean():.3g}" for short, name in named.items()}
        rows[f"{decay:g}"] = {**steps, **last, "waves": f"{r['waves at the end'].mean():.3f}"}
    console.print(engine_table("by weight decay: first steps of each seed, and means at the end", rows))
    text = "known: training accuracy 1; leaves chance: validation accuracy 0.05; groks: 0.99"
    console.print(text, highlight=False, soft_wrap=True)
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
    columns = min(2, len(results))
    figure, axes = new_figure(columns, height=2.6, width=3.4, rows=-(-len(results) // columns))
    axes = np.ravel(axes)
    steps = config.every * np.arange(1, config.updates // config.every + 1)
    for ax, (decay, r) in zip(axes, results.items(), strict=False):
        for part, color in (("training", "C0"), ("validation", "C1")):
            draw_range(ax, steps, r[f"{part} accuracy"], label=part, color=color)
        ax.axhline(1 / config.modulus, label="chance", **DOTTED)
        ax.set(xscale="log", xlabel="steps", ylabel="accuracy", ylim=(-0.03, 1.03))
        ax.set_title(f"weight decay {decay:g}" if decay else "no weight decay", fontsize="medium")
        ax.grid(alpha=0.3)
    for ax in axes[len(results) :]:
        ax.axis("off")
    axes[0].legend(fontsize="small", loc="center right")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
