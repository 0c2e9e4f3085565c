"""Reports of a population: a table of its settings, a file of its members, and two pictures. On the host.

Legend: M members, S settings.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import jax
import numpy as np
from jax.typing import ArrayLike

from fnet.core.extras import need
from fnet.core.numerics import is_key
from fnet.core.trees import named_leaves
from fnet.report.charts import log_ticks, round_ticks
from fnet.report.plots import new_figure, save_figure
from fnet.training.population import Population, Ranking, band, per_member


def ranking_table(title: str, ranking: Ranking, most: int = 20):
    """A rich table of the ``most`` best settings: the mean over seeds, their spread, and the difference to the best.

    ± is half an interval. A row that begins with ≈ ties with the best: the interval of the difference, which is taken
    seed by seed, holds 0.
    """
    need("a table", "rich")
    from rich.table import Table

    table = Table(title=title)
    table.add_column("")
    for name in (*ranking.hyper, "mean", "spread", "seeds", "difference"):
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for i in range(min(most, len(ranking.mean))):
        table.add_row(
            "best" if i == 0 else "≈" if ranking.tied[i] else "",
            *(_shown(values[i]) for values in ranking.hyper.values()),
            _interval(ranking.mean[i], ranking.high[i]),
            f"{ranking.std[i]:.2g}",
            str(ranking.count[i]),
            _interval(ranking.difference[i], ranking.difference_high[i]) if i else "",
        )
    shown, words = min(most, len(ranking.mean)), []
    if ranking.tied[1:shown].any():
        words.append("≈ ties with the best: its difference ± holds 0")
    if len(ranking.mean) > most:
        words.append(f"and {len(ranking.mean) - most} more")
    table.caption, table.caption_justify = "\n".join(words) or None, "left"
    return table


def to_csv(population: Population, path: str | Path) -> None:
    """A row for each member: its number, its hyperparameters, its key in hexadecimal, and each result of one number.

    Keys and results of more than one number a member (curves, parameters) are left out; a result that is no tree is
    called ``result``. Numbers are written so that reading them in their dtype gives the same bits;
    ``jax.random.wrap_key_data(numpy.frombuffer(bytes.fromhex(word), ">u4"))`` is the key again. A file that exists is
    refused with FileExistsError, and two columns of one name are with ValueError.
    """
    words = np.asarray(jax.random.key_data(population.keys)).astype(">u4")
    leaves = [(name or "result", leaf) for name, leaf in named_leaves(population.results) if leaf.ndim == 1]
    columns = [
        ("member", np.arange(len(words))),
        *population.hyper.items(),
        ("key", [word.tobytes().hex() for word in words]),
        *((name, np.asarray(leaf)) for name, leaf in leaves if not is_key(leaf)),
    ]
    names = [name for name, _ in columns]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"to_csv: two columns are called {name!r}; expected another name for one of them")
    if Path(path).exists():
        raise FileExistsError(f"{path} exists already and is left as it is: give another path")
    with Path(path).open("x", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(zip(*(values for _, values in columns), strict=True))


def plot_heat_map(
    population: Population,
    values: ArrayLike,
    names: tuple[str, str],
    path: str | Path,
    *,
    label: str = "mean",
    greatest: bool = False,
) -> None:
    """The mean of ``values (M,)`` over the members at each pair of two hyperparameters, the first along the x axis.

    The best cell is the brightest, as the bar beside the map says, and framed; one with a value that is not finite says
    so, one without members is empty. For numbers on a grid: raises ValueError for a name with more than 40 values.
    """
    need("plot_heat_map", "matplotlib")
    from matplotlib.patches import Rectangle

    b = band(population, values, names)
    edges = [np.unique(b.hyper[name]) for name in names]
    for name, edge in zip(names, edges, strict=True):
        if len(edge) > 40:
            raise ValueError(f"plot_heat_map: {name} has {len(edge)} values; expected 40 at most: use plot_parallel")
    column, row = (np.searchsorted(edge, b.hyper[name]) for name, edge in zip(names, edges, strict=True))
    cells = np.full((len(edges[1]), len(edges[0])), np.nan)
    cells[row, column] = np.where(np.isfinite(b.mean), b.mean, np.nan)
    width, height = max(5.0, 0.75 * cells.shape[1] + 3.0), max(3.0, 0.5 * cells.shape[0] + 1.5)
    figure, ax = new_figure(width=width, height=height)
    norm, colors = _colors(cells[np.isfinite(cells)], "viridis" if greatest else "viridis_r")
    image = ax.imshow(cells, cmap=colors, norm=norm, origin="lower", aspect="auto")
    bar = figure.colorbar(image, label=label + " (brighter is better)")
    places, words = zip(*_ticks(norm.vmin, norm.vmax), strict=True)
    bar.set_ticks(places, labels=words)
    bar.minorticks_off()
    for j, i, mean in zip(row, column, b.mean, strict=True):
        lightness = np.dot(colors(norm(mean))[:3], (0.3, 0.6, 0.1)) if np.isfinite(mean) else 1.0
        color = "black" if lightness > 0.5 else "white"
        text = f"{mean:.3g}" if np.isfinite(mean) else "not finite"
        ax.text(i, j, text, ha="center", va="center", fontsize=8 if np.isfinite(mean) else 6, color=color)
    if np.isfinite(cells).any():
        j, i = np.unravel_index((np.nanargmax if greatest else np.nanargmin)(cells), cells.shape)
        frame = Rectangle((float(i) - 0.5, float(j) - 0.5), 1, 1, fill=False, color="tab:red", linewidth=2.5)
        ax.add_patch(frame).set_clip_on(False)
    ax.set(xlabel=names[0].replace("_", " "), ylabel=names[1].replace("_", " "))
    ax.set_xticks(range(len(edges[0])), [_shown(v) for v in edges[0]])
    ax.set_yticks(range(len(edges[1])), [_shown(v) for v in edges[1]])
    save_figure(figure, path)


def plot_parallel(
    population: Population, values: ArrayLike, path: str | Path, *, label: str = "value", greatest: bool = False
) -> None:
    """A line for each member across one axis for each hyperparameter and one for ``values (M,)``, which is its colour.

    Better members are darker and drawn over worse ones; those whose value is not finite are grey and end before the
    last axis. A few values stand apart evenly, many on a line or, where they span more than a factor of 10, on a
    logarithmic one, with round numbers beside it.
    """
    need("plot_parallel", "matplotlib")
    from matplotlib.collections import LineCollection

    values = per_member("plot_parallel", population, values, 1)
    if label in population.hyper:
        raise ValueError(f"plot_parallel: label = {label!r}, as a hyperparameter is called; expected another")
    finite = np.isfinite(values)
    columns = {**population.hyper, label: np.where(finite, values, np.nan)}
    figure, ax = new_figure(width=max(5.0, 1.8 * len(columns) + 1.0), height=4.5)
    norm, colors = _colors(values[finite], "viridis_r" if greatest else "viridis")
    lines = np.empty((len(values), len(columns), 2))
    for x, (name, column) in enumerate(columns.items()):
        place, marks = _axis(column, few=0 if name == label else 12)
        lines[:, x, 0], lines[:, x, 1] = x, place(column)
        ax.axvline(x, color="black", linewidth=0.8)
        side = {"ha": "left", "xytext": (5, 0)} if name == label else {"ha": "right", "xytext": (-5, 0)}
        for tick, text in marks:
            style = {"va": "center", "fontsize": 9, "bbox": {"color": "white", "pad": 0.8}}  # no line through it
            ax.annotate(text, (x, place(tick)), textcoords="offset points", **side, **style)
    worst_first = np.argsort(np.where(finite, values if greatest else -values, -np.inf), kind="stable")
    shades = [colors(norm(values[i]), alpha=0.8) if finite[i] else (0.7, 0.7, 0.7, 0.4) for i in worst_first]
    ax.add_collection(LineCollection([*lines[worst_first]], colors=shades, linewidths=1.2))
    ax.set_ylim(-0.05, 1.05)
    ax.set_xticks(range(len(columns)), [name.replace("_", " ") for name in columns])
    ax.set_yticks([])
    ax.set_xlim(-0.5, len(columns) - 0.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    save_figure(figure, path)


def _shown(value) -> str:
    return f"{value:.3g}"


def _interval(middle: float, high: float) -> str:
    """``0.1154 ± 0.0051``: half the width in two digits, and the middle in as many places."""
    half = high - middle
    if not np.isfinite(half) or half <= 0:
        return f"{middle:.4g}"
    places = max(1 - math.floor(math.log10(half)), 0)
    return f"{middle:.{places}f} ± {half:.{places}f}"


def _colors(values: np.ndarray, name: str):
    """A scale, logarithmic where positive values span more than a factor of 10, and matplotlib's colours of a name."""
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize

    lo, hi = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    norm = LogNorm(lo, hi) if _spread(lo, hi) else Normalize(lo, hi if hi > lo else lo + 1)
    return norm, matplotlib.colormaps[name]


def _spread(lo: float, hi: float) -> bool:
    return lo > 0 and hi > 10 * lo


def _ticks(lo, hi) -> list[tuple[float, str]]:
    """Round numbers from ``lo`` to ``hi``, on a logarithmic scale where `_colors` has one, and how they are written."""
    if _spread(lo, hi):
        return log_ticks(math.log10(lo) - 1e-6, math.log10(hi) + 1e-6)  # float32's 0.1 is above 0.1
    return round_ticks(lo - 1e-6 * (hi - lo), hi + 1e-6 * (hi - lo), 5)


def _axis(column: np.ndarray, few: int):
    """Where a value stands on an axis from 0 to 1, and the values to write beside it, with their words."""
    known = np.unique(column[np.isfinite(column)]).astype(np.float64)
    if not len(known):
        return (lambda v: v), []
    lo, hi = known[0], known[-1]
    if lo == hi or len(known) <= few:
        own = [(v, _shown(v)) for v in known]
        return (lambda v: np.interp(v, known, np.linspace(0, 1, len(known))) if lo < hi else 0.5 + 0.0 * v), own
    if _spread(lo, hi):
        return (lambda v: np.log(v / lo) / math.log(hi / lo)), _ticks(lo, hi)
    return (lambda v: (v - lo) / (hi - lo)), _ticks(lo, hi)
