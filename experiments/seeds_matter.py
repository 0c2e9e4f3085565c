"""How much of the difference between optimizers is the seed? 100 seeds of each, at its tuned rate.

    python -m experiments.seeds_matter
    python -m experiments.seeds_matter --seeds 20 --optimizers sgd adam

A network 64-32-10 on the 8x8 digits of scikit-learn. First each optimizer's rate is tuned: the mean validation loss
over a few seeds of their own decides among rates a factor √10 apart. Then every optimizer runs at its rate with the
same 100 seeds, each of which sets the parameters, the split and the order of the examples, and the test part is looked
at for the first time. All runs of an optimizer are one compiled program.

Two optimizers with the same seed have the same digits to learn and to be tested on, so they are compared seed by seed:
the mean difference of their test accuracies with its 95 % interval, by Student's t. A difference is called real where
the interval, widened for the number of pairs that are compared (Bonferroni), does not hold 0.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import check_left, main, new_run_folder, open_console, say_written, write_results
from experiments.options import ByEngine, Count, InFolder, engine_of
from fnet import optimizers
from fnet.core.numerics import stream
from fnet.metrics import accuracy
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure
from fnet.training.population import crossed, grid, student, train_population

NAMES = ("sgd", "momentum", "rmsprop", "adagrad", "adam", "adamw", "nadam", "radam", "lion")


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """The spread over seeds of every optimizer at its tuned rate, and which differences are real."""

    optimizers: tuple[str, ...] = NAMES
    seeds: Count = 100
    tuning_seeds: Count = 5
    epochs: Count = 20
    batch_size: Count = 32
    hidden: Count = 32
    test_size: Count = 357  # of the 1,797 digits
    validation_size: Count = 240

    @property
    def rates(self) -> np.ndarray:
        """The rates that are tried."""
        return 10.0 ** np.arange(-4, 0.75, 0.5)


def run_of(config: Config, name: str):
    """A whole run as a function of its rate and its seed's key: what `train_population` takes."""
    model, loss = fnet.mlp(config.hidden, 10), fnet.softmax_cross_entropy
    measure = fnet.make_evaluate(model, loss, {"accuracy": accuracy})

    def run(hyper, key, digits):
        n = len(digits.targets)
        order = jax.random.permutation(stream(key, "split"), n)
        test, validation, training = jnp.split(order, [config.test_size, config.test_size + config.validation_size])
        part = lambda rows: jax.tree.map(lambda a: a[rows], digits)  # noqa: E731
        optimizer = getattr(optimizers, name)(hyper["learning_rate"])
        params, state = model.init(stream(key, "model"), digits.inputs[:1])
        start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
        step = fnet.make_step(engine_of(config)(model, loss), optimizer)
        end, _, _ = fnet.train(step, start, part(training), epochs=config.epochs, batch_size=config.batch_size)
        results = {}
        for what, rows in (("validation", validation), ("test", test)):
            for metric, mean in measure(end.params, end.state, part(rows)).items():
                results[f"{what} {metric}"] = mean.value
        return results

    return run


def differences(accuracies: dict[str, np.ndarray]) -> list[dict]:
    """Every pair's mean difference, seed by seed, with its interval and whether it is real."""
    pairs = list(itertools.combinations(accuracies, 2))
    rows = []
    for a, b in pairs:
        d = accuracies[a] - accuracies[b]
        mean, _, half = student(d)
        _, _, strict = student(d, 1 - 0.05 / len(pairs))
        rows.append({"pair": (a, b), "mean": float(mean), "half": float(half), "real": bool(abs(mean) > strict)})
    return rows


def run(config: Config, console: Console | None = None) -> dict:
    """Tune, run all seeds, compare; returns rates, accuracies and differences."""
    for name in config.optimizers:
        if name not in NAMES:
            raise ValueError(f"seeds_matter: no optimizer {name!r}; expected some of {', '.join(NAMES)}")
    for what, count, least in (("seeds", config.seeds, 2), ("tuning_seeds", config.tuning_seeds, 1)):
        if count < least:
            raise ValueError(f"seeds_matter: {what} = {count}; expected at least {least}")
    console = open_console(config, console)
    digits = jax.tree.map(jnp.asarray, fnet.data.sklearn_digits())
    check_left(len(digits.targets), test_size=config.test_size, validation_size=config.validation_size)
    folder = new_run_folder(config, "seeds_matter")
    tuning = jax.random.split(jax.random.key(1), config.tuning_seeds)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    rates, accuracies = {}, {}
    for name in config.optimizers:
        with console.status(name):
            tried = train_population(run_of(config, name), *crossed(grid(learning_rate=config.rates), tuning), digits)
            losses = tried.results["validation loss"].reshape(len(config.rates), -1).mean(1)
            rates[name] = float(config.rates[int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))])
            hyper = {"learning_rate": np.full(config.seeds, rates[name])}
            population = train_population(run_of(config, name), hyper, keys, digits)
            accuracies[name] = population.results["test accuracy"].astype(float)
    order = sorted(accuracies, key=lambda name: -accuracies[name].mean())
    rows = {}
    for name in order:
        a = accuracies[name]
        rows[name] = {
            "rate": f"{rates[name]:.2g}",
            "mean": f"{a.mean():.4f}",
            "spread": f"{a.std(ddof=1):.4f}",
            "least": f"{a.min():.4f}",
            "most": f"{a.max():.4f}",
        }
    console.print(engine_table(f"test accuracy over {config.seeds} seeds", rows))
    compared = differences({name: accuracies[name] for name in order})
    verdicts = {
        f"{r['pair'][0]} − {r['pair'][1]}": {
            "difference": f"{r['mean']:+.4f} ± {r['half']:.4f}",
            "": "real" if r["real"] else "not told apart",
        }
        for r in compared
    }
    console.print(engine_table("seed by seed, 95 % intervals", verdicts))
    plain = {"rates": rates, "accuracies": {n: a.tolist() for n, a in accuracies.items()}, "differences": compared}
    write_results(folder, plain)
    draw({name: accuracies[name] for name in order}, rates, folder / "spread.png")
    real = sum(r["real"] for r in compared)
    console.print(f"{real} of {len(compared)} differences are real", highlight=False, soft_wrap=True)
    say_written(console, folder)
    return {"rates": rates, "accuracies": accuracies, "differences": compared, "folder": folder}


def draw(accuracies: dict[str, np.ndarray], rates: dict[str, float], path: Path) -> None:
    """Every seed as a point, the mean with its interval as a bar."""
    figure, ax = new_figure(width=8.0, height=0.5 * len(accuracies) + 1.4)
    rng = np.random.default_rng(0)
    for i, a in enumerate(accuracies.values()):
        ax.plot(a, i + rng.uniform(-0.3, 0.3, len(a)), ".", color=f"C{i % 10}", markersize=3, alpha=0.5)
        mean, _, half = student(a)
        ax.errorbar(mean, i, xerr=half, color="black", marker="|", markersize=12, capsize=4)
    labels = [f"{name} ({rates[name]:.2g})" for name in accuracies]
    ax.set_yticks(range(len(accuracies)), labels)
    ax.invert_yaxis()
    ax.set(xlabel="test accuracy of one seed; bars: the mean with its 95 % interval")
    ax.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
