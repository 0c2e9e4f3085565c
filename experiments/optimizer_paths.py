"""The paths of optimizers on functions of two numbers whose minima are known.

    python -m experiments.optimizer_paths
    python -m experiments.optimizer_paths --steps 2000 --optimizers adam lion

Each optimizer goes down each function from the same start with the same number of steps, at the best of some rates:
the one that is nearest to a minimum on the average over its path, so that neither a crawl nor a wild path that ends
well by chance is taken; one vmapped program follows all rates. So the table says what an optimizer
can do when it is tuned for the function, not how it does untuned. L-BFGS has its line search in the place of a rate.
There is a picture for each function, with a panel for each optimizer.

- Rosenbrock: a curved valley, minimum (1, 1); from (−1.2, 1).
- Beale: flat with sharp corners, minimum (3, ½); from (1, 1).
- Himmelblau: four minima; from (0, 0).
- Rastrigin: many local minima in a lattice, the least (0, 0); from (0.4, −0.35), within its basin.
- saddle: x² − y² + y⁴/2, minima (0, ±1), a saddle at (0, 0); from (1, 10⁻³), almost on the way into the saddle.
- valley: ½ (x² + 100 y²), minimum (0, 0); from (10, 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.common import main, new_run_folder, open_console, say_written, write_results
from experiments.options import Count, InFolder, Positive
from experiments.pictures.parts import legend_below
from fnet import optimizers
from fnet.core.checks import require_counts
from fnet.optimizers import minimize_lbfgs
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure


class Problem(NamedTuple):
    value: Callable  # of (2,)
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    window: tuple[float, float, float, float]  # of the picture: x from, to, y from, to


def rosenbrock(p):
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def beale(p):
    x, y = p
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def himmelblau(p):
    return (p[0] ** 2 + p[1] - 11) ** 2 + (p[0] + p[1] ** 2 - 7) ** 2


def rastrigin(p):
    return 20 + (p**2 - 10 * jnp.cos(2 * jnp.pi * p)).sum()


def saddle(p):
    return p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 2


def valley(p):
    return (p[0] ** 2 + 100 * p[1] ** 2) / 2


PROBLEMS = {
    "Rosenbrock": Problem(rosenbrock, (-1.2, 1.0), ((1.0, 1.0),), (-1.6, 1.6, -0.6, 1.8)),
    "Beale": Problem(beale, (1.0, 1.0), ((3.0, 0.5),), (0.0, 4.0, -1.0, 1.5)),
    "Himmelblau": Problem(
        himmelblau,
        (0.0, 0.0),
        ((3.0, 2.0), (-2.805118, 3.131313), (-3.779310, -3.283186), (3.584428, -1.848127)),
        (-5.0, 5.0, -5.0, 5.0),
    ),
    "Rastrigin": Problem(rastrigin, (0.4, -0.35), ((0.0, 0.0),), (-1.0, 1.0, -1.0, 1.0)),
    "saddle": Problem(saddle, (1.0, 1e-3), ((0.0, 1.0), (0.0, -1.0)), (-1.2, 1.2, -1.4, 1.4)),
    "valley": Problem(valley, (10.0, 1.0), ((0.0, 0.0),), (-5.0, 11.0, -1.4, 1.4)),
}
ONE_BY_ONE = (
    *("sgd", "momentum", "rmsprop", "adagrad", "adadelta", "adam", "amsgrad", "adamax", "nadam", "radam", "lion"),
    "adafactor",
)


@dataclasses.dataclass(frozen=True)
class Config(InFolder):
    """Draw the paths of optimizers on functions with known minima."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    optimizers: tuple[str, ...] = ONE_BY_ONE
    steps: Count = 500
    rates: Count = 25  # from low to high by a constant factor
    low: Positive = 1e-4
    high: Positive = 10.0


def path(problem: Problem, name: str, steps: int, rate) -> jax.Array:
    """Where an optimizer goes, the start included: ``(steps + 1, 2)``."""
    optimizer = getattr(optimizers, name)(rate)
    start = jnp.asarray(problem.start, float)

    def one(carry, _):
        p, opt_state = carry
        p, opt_state = optimizer.update(jax.grad(problem.value)(p), opt_state, p)
        return (p, opt_state), p

    _, points = jax.lax.scan(one, (start, optimizer.init(start)), length=steps)
    return jnp.concatenate([start[None], points])


def distance(points: np.ndarray, problem: Problem) -> np.ndarray:
    """How far points ``(..., 2)`` are from the nearest minimum; infinite for what is not a number."""
    bounded = np.clip(np.nan_to_num(points, nan=1e9), -1e9, 1e9)
    apart = np.linalg.norm(bounded[..., None, :] - np.asarray(problem.minima), axis=-1).min(-1)
    return np.where(np.isfinite(points).all(-1), apart, np.inf)


def run(config: Config, console: Console | None = None) -> dict:
    """Follow every optimizer on every function; returns distance, rate and path by function and optimizer."""
    require_counts("optimizer_paths", problems=len(config.problems), steps=config.steps, rates=config.rates)
    if not 0 < config.low <= config.high < np.inf:
        raise ValueError(f"optimizer_paths: low = {config.low}, high = {config.high}; expected 0 < low <= high < inf")
    for what, given, known in (
        ("problem", config.problems, PROBLEMS),
        ("optimizer", config.optimizers, ONE_BY_ONE),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"optimizer_paths: no {what} {name!r}; expected some of {', '.join(known)}")
    console = open_console(config, console)
    folder = new_run_folder(config, "optimizer_paths")
    rates, results = np.geomspace(config.low, config.high, config.rates), {}
    with jax.enable_x64(True):
        for title in config.problems:
            problem, results[title] = PROBLEMS[title], {}
            for name in config.optimizers:
                follow = jax.jit(jax.vmap(lambda rate, p=problem, n=name: path(p, n, config.steps, rate)))
                paths = np.asarray(follow(jnp.asarray(rates)))  # (R, T + 1, 2)
                best = int(np.argmin(distance(paths, problem).mean(1)))
                results[title][name] = {
                    "distance": float(distance(paths[best, -1], problem)),
                    "rate": float(rates[best]),
                    "path": paths[best],
                }
            found = minimize_lbfgs(problem.value, jnp.asarray(problem.start, float), tolerance=1e-10)
            results[title]["L-BFGS"] = {
                "distance": float(distance(np.asarray(found.params), problem)),
                "rate": None,
                "path": np.stack([problem.start, np.asarray(found.params)]),
                "evaluations": int(found.evaluations),
            }
    rows = {
        name: {title: f"{r[name]['distance']:.0e}" for title, r in results.items()}
        for name in (*config.optimizers, "L-BFGS")
    }
    console.print(engine_table(f"distance from the nearest minimum after {config.steps} steps", rows))
    rates = {name: {t: f"{r[name]['rate']:.2g}" for t, r in results.items()} for name in config.optimizers}
    console.print(engine_table(f"at the best of {config.rates} rates", rates))
    plain = {t: {n: {k: v for k, v in r.items() if k != "path"} for n, r in rs.items()} for t, rs in results.items()}
    write_results(folder, plain)
    for title, found in results.items():
        draw(title, found, config.steps, folder / f"{title.lower()}.png")
    say_written(console, folder)
    return {"results": results, "folder": folder}


def draw(title: str, found: dict, steps: int, file: Path) -> None:
    """A panel for each optimizer: its path over the function in shades; what L-BFGS came to is said."""
    problem, names = PROBLEMS[title], [name for name in found if name != "L-BFGS"]
    columns = min(3, len(names))
    figure, axes = new_figure(columns, height=2.1, width=2.3, rows=-(-len(names) // columns))
    axes = np.ravel(axes)
    x0, x1, y0, y1 = problem.window
    x, y = np.meshgrid(np.linspace(x0, x1, 200), np.linspace(y0, y1, 200))
    values = np.asarray(jax.vmap(jax.vmap(problem.value))(jnp.stack([jnp.asarray(x), jnp.asarray(y)], -1)))
    low = values.min()
    levels = np.log10(values - low + 1e-3 * (values.max() - low))
    greys = {"cmap": "gray", "vmin": levels.min() - 3.5 * np.ptp(levels), "vmax": levels.max()}  # light ones
    for ax, name in zip(axes, names, strict=False):
        path = found[name]["path"]
        ax.contourf(x, y, levels, 7, **greys)
        path = path[np.isfinite(path).all(1)]
        ax.plot(*path.T, color="C0", linewidth=1.4, label="path")
        ax.plot(*problem.start, "ko", markersize=5, linestyle="none", label="start")
        ax.plot(*np.asarray(problem.minima).T, "*", color="C3", markersize=10, linestyle="none", label="minimum")
        ax.plot(*path[-1], "o", color="C1", markersize=5, linestyle="none", label="end")
        ax.set_title(f"{name}, rate {found[name]['rate']:.2g}\n{found[name]['distance']:.1g} away", fontsize="medium")
        ax.set(xlim=(x0, x1), ylim=(y0, y1), xlabel="x", ylabel="y")
        ax.label_outer()
    for ax in axes[len(names) :]:
        ax.axis("off")
    figure.suptitle(
        f"{title} (darker is lower): {steps} steps, each at its best rate,\n"
        f"and how far from a minimum; L-BFGS, of which no path is kept: {found['L-BFGS']['distance']:.1g} away",
        fontsize="medium",
    )
    legend_below(figure, axes[0], columns=4)
    save_figure(figure, file)


if __name__ == "__main__":
    main(run, Config)
