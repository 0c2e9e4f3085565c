"""The tables and pictures of `overfitting`. Legend: S training sets, G points of the grid, E epochs.

Of the known function ``by_units`` and ``by_cure`` hold the parts of the error and the functions ``learned (S, G)``. Of
the digits ``by_width`` holds losses and accuracies ``(sizes, seeds)``, ``cures`` those at which each cure ended
``(seeds,)``, and ``curves`` those of each setting by epoch ``(pairs, seeds, E)``; ``few`` says of which digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.pictures.parts import draw_bars, grid_and_legend, mean_and_spread, only_ticks
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure

# --- tables ----------------------------------------------------------------------------------------------------------


def by_name(by_units: dict, by_cure: dict) -> dict[str, dict]:
    """Each network on the known function, without a cure and with one."""
    widest = f"{max(by_units)} units, "
    cured = {widest + name: found for name, found in by_cure.items() if name != "none"}
    return {f"{units} units": found for units, found in by_units.items()} | cured


def print_function(by_units: dict, by_cure: dict, points: int, console: Console) -> None:
    """The parts of the error, their sum, and the error measured."""
    rows = {
        name: {
            **{part: f"{d[part]:.4f}" for part in ("bias²", "variance", "noise", "sum")},
            "measured": f"{d['measured']:.4f} ± {d['spread']:.4f}",
        }
        for name, d in by_name(by_units, by_cure).items()
    }
    sets = len(next(iter(by_units.values()))["learned"])
    console.print(engine_table(f"sin(πx), {sets} sets of {points} noisy points", rows))


def print_digits(by_width: dict, cures: dict, sizes: Sequence[int], few: str, console: Console) -> None:
    """Errors by width and number of training digits; and what each cure came to."""
    rows = {
        f"{width} hidden units": {
            f"{size}": f"{1 - found['train accuracy'][i].mean():.1%} / {1 - found['test accuracy'][i].mean():.1%}"
            for i, size in enumerate(sizes)
        }
        for width, found in by_width.items()
    }
    console.print(engine_table("8x8 digits: training error / test error, by number of training digits", rows))
    rows = {
        name: {
            "dropout, decay": "{:g}, {:g}".format(*found["pair"]),
            "epoch": ", ".join(str(e) for e in found["epoch"]),
            "training loss": mean_and_spread(found["train loss"]),
            "test loss": mean_and_spread(found["test loss"]),
            "gap": mean_and_spread(found["test loss"] - found["train loss"]),
            "training accuracy": mean_and_spread(found["train accuracy"]),
            "test accuracy": mean_and_spread(found["test accuracy"]),
        }
        for name, found in cures.items()
    }
    seeds = len(next(iter(cures.values()))["epoch"])
    title = f"{few} of the labels drawn at random, {max(by_width)} units"
    console.print(engine_table(f"{title}: mean ± spread of {seeds} seeds", rows))


def print_reached(by_units: dict, by_cure: dict, cures: dict, console: Console) -> None:
    """The numbers reached, beside those to reach."""
    off = max(abs(d["measured"] - d["sum"]) / d["spread"] for d in by_name(by_units, by_cure).values())
    accuracies = {name: found["test accuracy"].mean() for name, found in cures.items()}
    cured = ", ".join(f"{name} {accuracies[name]:.3f}" for name in accuracies if name != "none")
    console.print(
        f"bias² + variance + noise and the measured error: at most {off:.1f} standard errors apart (must be below 4)\n"
        f"test accuracy without a cure {accuracies['none']:.3f}; with one (must be above): {cured}",
        highlight=False,
    )


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_function(by_units: dict, by_cure: dict, path: Path) -> None:
    """Above: functions learned from twenty sets and their mean. Below: the parts of the error by units and by cure."""
    shown = {f"{units} unit" + "s" * (units > 1): by_units[units] for units in (min(by_units), max(by_units))}
    shown |= {f"{max(by_units)} units, {name}": by_cure[name] for name in ("early stopping", "weight decay")}
    figure, _ = new_figure(len(shown), rows=2, height=3.4, width=3.4)
    figure.clear()
    grid = figure.add_gridspec(2, 2 * len(shown))
    x = np.linspace(-1, 1, next(iter(shown.values()))["learned"].shape[1])
    for i, (name, found) in enumerate(shown.items()):
        ax = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
        ax.plot(x, found["learned"][:20].T, color="C0", linewidth=0.6, alpha=0.5)
        ax.plot(x, found["learned"].mean(0), color="C3", linewidth=2, label="mean of all sets")
        ax.plot(x, np.sin(np.pi * x), "--", color="black", linewidth=1.2, label="f")
        ax.set(title=name, ylim=(-2.5, 2.5), xlabel="x")
        ax.grid(alpha=0.3)
        if i == 0:
            ax.legend(fontsize="small", loc="lower right")
    for half, found, what in ((slice(0, len(shown)), by_units, "hidden units"), (slice(len(shown), None), by_cure, "")):
        ax = figure.add_subplot(grid[1, half])
        places, floor = np.arange(len(found)), np.zeros(len(found))
        for part in ("noise", "bias²", "variance"):
            heights = np.array([d[part] for d in found.values()])
            ax.bar(places, heights, bottom=floor, width=0.6, label=part)
            floor = floor + heights
        ax.plot(places, [d["measured"] for d in found.values()], "kD", markersize=5, label="measured error")
        ax.set_xticks(places, [str(name) for name in found])
        ax.set(xlabel=what, ylabel="squared error", title="" if what else f"cures of {max(by_units)} units")
        ax.set_ylim(0, 1.3 * floor.max())  # room for the legend
        ax.grid(alpha=0.3, axis="y")
        ax.legend(fontsize="small", ncols=4, loc="upper left")
    save_figure(figure, path)


def draw_digits(by_width: dict, cures: dict, curves: dict, sizes: Sequence[int], few: str, path: Path) -> None:
    """Errors by number of training digits and width; losses by epoch of each cure; the gap of each."""
    figure, (left, middle, right) = new_figure(3, height=4.4)
    for i, (width, found) in enumerate(by_width.items()):
        for part, style in (("test", "o-"), ("train", "o:")):
            errors = 1 - found[f"{part} accuracy"].mean(1)
            left.plot(sizes, errors, style, color=f"C{i}", markersize=4, label=f"{width} units" * (part == "test"))
    for i, (name, found) in enumerate(cures.items()):
        for part, style in (("test", "-"), ("train", ":")):
            curve = curves[f"{part} loss"][found["index"]].mean(0)
            if name != "early stopping":  # the same run as without a cure
                label = name if part == "test" else None
                middle.plot(np.arange(1, len(curve) + 1), curve, style, color=f"C{i}", label=label)
        if name in ("early stopping", "all three"):
            stopped = found["epoch"].mean(), found["test loss"].mean()
            middle.plot(*stopped, "D", color=f"C{i}", label=f"{name}: stopped (mean)")
    ends = {part: np.array([found[f"{part} accuracy"] for found in cures.values()]).T for part in ("train", "test")}
    draw_bars(right, list(cures), {"training": ends["train"], "test": ends["test"]}, apart=0.4, width=0.38)
    left.set(xlabel="training digits", ylabel="error (dotted: training)", xscale="log", title="capacity against data")
    only_ticks(left, sizes)
    middle.set(xlabel="epoch", ylabel="loss (dotted: training)", yscale="log", title=f"{few} labels at random")
    middle.set_ylim(bottom=max(middle.get_ylim()[0], 1e-3))
    right.set(ylabel="accuracy (training labels are partly wrong)", title="with each cure", ylim=(0.5, 1.1))
    grid_and_legend(left, middle)
    grid_and_legend(right, ncols=2)
    save_figure(figure, path)
