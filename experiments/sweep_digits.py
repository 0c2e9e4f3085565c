"""256 networks at once on the 8x8 digits: 8 rates × 4 momenta × 8 seeds in one compiled program.

    python -m experiments.sweep_digits
    python -m experiments.sweep_digits --rates 0.001 0.01 0.1 --epochs 50
    python -m experiments.sweep_digits --memory 8e6
    JAX_NUM_CPU_DEVICES=2 python -m experiments.sweep_digits

64-32-10 by Adam on mini-batches. The rate and b1, the decay of Adam's first moment, are numbers that the program is
given, so one `jax.vmap` trains every setting from every seed. The validation cost chooses: settings are ranked by its
mean over the seeds, and what cannot be told from the best, seed by seed, is marked. Only then, and only for the chosen
setting, the test digits are looked at.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import AmountOrNone, Amounts, ByEngine, Count, InFolder, Seeded, Shares, Widths, engine_of
from fnet.core.checks import require_counts
from fnet.core.numerics import stream
from fnet.metrics import accuracy
from fnet.report.population import plot_heat_map, plot_parallel, ranking_table, to_csv
from fnet.training.population import band, check_members, check_range, crossed, grid, ranking, train_population


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine, Seeded):
    """Sweep Adam's rate and b1 over seeds on the 8x8 digits in one program."""

    rates: Amounts = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    b1: Shares = (0.0, 0.5, 0.9, 0.99)
    seeds: Count = 8  # of parameters and order of the examples
    hidden: Widths = (32,)  # widths of the hidden layers
    batch_size: Count = 32
    epochs: Count = 30
    validation_size: Count = 360  # of the 1,797 digits, to choose by
    test_size: Count = 357  # for the setting chosen; the other 1,080 are trained on
    memory: AmountOrNone = None  # bytes that the program may take; None takes what is there


def load(config: Config) -> tuple[fnet.Batch, ...]:
    """Training, validation and test digits."""
    digits = fnet.data.sklearn_digits()
    rest = len(digits.targets) - config.validation_size - config.test_size
    sizes = (rest, config.validation_size, config.test_size)
    return fnet.split(digits, sizes, stream(jax.random.key(config.seed), "split"))


def train(config: Config, hyper, key, train_data: fnet.Batch, validation: fnet.Batch) -> dict:
    """A whole run as a function of its numbers and its key."""
    model, loss, optimizer = fnet.mlp(*config.hidden, 10), fnet.softmax_cross_entropy, fnet.adam(**hyper)
    params, state = fnet.init(model, stream(key, "model"), train_data.inputs[:1])
    start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    step = fnet.make_step(engine_of(config)(model, loss), optimizer)
    end, updates, _ = fnet.train(step, start, train_data, epochs=config.epochs, batch_size=config.batch_size)
    measured = fnet.make_evaluate(model, loss, {"accuracy": accuracy})(end.params, end.state, validation)
    return {
        "training cost": updates["loss"].sum[-1].sum() / updates["loss"].count[-1].sum(),  # of the last epoch
        **{f"validation {name}": mean.value for name, mean in measured.items()},
        "end": (end.params, end.state),
    }


def run(config: Config, console: Console | None = None) -> dict:
    """Train all members, rank the settings, test the chosen one; returns what was measured."""
    console = open_console(config, console)
    require_counts("sweep_digits", seeds=config.seeds, epochs=config.epochs)
    train_data, validation, test_data = load(config)
    keys = jax.random.split(stream(jax.random.key(config.seed), "seeds"), config.seeds)
    hyper, keys = check_members("sweep_digits", *crossed(grid(learning_rate=config.rates, b1=config.b1), keys))

    def member(hyper, key, *data):
        return train(config, hyper, key, *data)

    check_range(member, hyper, keys, (train_data, validation))  # a number out of range leaves no folder
    folder = new_run_folder(config, "sweep_digits")
    with console.status(f"{len(keys)} members, {config.epochs} epochs each"):
        population = train_population(member, hyper, keys, train_data, validation, memory=config.memory)
    each = population.run_seconds / len(keys) / config.epochs
    console.print(
        f"{len(keys)} members, {population.chunk} at a time on {population.devices} device(s), "
        f"{population.member_bytes / 1e3:.0f} kB each as the compiler counts; compiled in "
        f"{population.compile_seconds:.1f} s, ran {population.run_seconds:.1f} s, {1e3 * each:.2f} ms each an epoch",
        highlight=False,
    )

    cost = population.results["validation loss"]
    ranked = ranking(population, cost)
    title = f"validation cost after {config.epochs} epochs; ≈ is not told from the best"
    console.print(ranking_table(title, ranked))
    chosen = {name: values[0] for name, values in ranked.hyper.items()}
    members = np.flatnonzero(np.all([population.hyper[name] == value for name, value in chosen.items()], axis=0))

    model = fnet.mlp(*config.hidden, 10)
    on_test = fnet.make_evaluate(model, fnet.softmax_cross_entropy, {"accuracy": accuracy})
    ends = jax.tree.map(lambda a: a[members], population.results["end"])
    tested = jax.jit(jax.vmap(on_test, in_axes=(0, 0, None)))(*ends, test_data)
    of_chosen = population._replace(hyper={name: v[members] for name, v in hyper.items()}, keys=keys[members])
    test = {name: band(of_chosen, mean.value) for name, mean in tested.items()}
    shown = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
    console.print(f"chosen: {shown}; on the {config.test_size} test digits, over {len(members)} seeds (95 % interval)")
    for name, b in test.items():
        console.print(f"  {name} {b.mean[0]:.4f} ({b.low[0]:.4f} to {b.high[0]:.4f})", highlight=False)

    to_csv(population, folder / "sweep.csv")
    plot_heat_map(population, cost, ("learning_rate", "b1"), folder / "heat_map.png", label="mean validation cost")
    plot_parallel(population, cost, folder / "parallel.png", label="validation cost")
    say_written(console, folder)
    return {"population": population, "ranking": ranked, "chosen": chosen, "test": test, "folder": folder}


if __name__ == "__main__":
    main(run, Config)
