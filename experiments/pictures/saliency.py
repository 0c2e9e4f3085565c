"""The pictures and tables of `saliency`. Legend: S seeds, B images, M numbers of wiped-out pixels, K of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from experiments.pictures.parts import (
    BESIDE,
    Row,
    draw_bars,
    draw_range,
    draw_rows,
    grid_and_legend,
    mean_and_spread,
    only_ticks,
)
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure


class Checks(NamedTuple):
    """What the checks of the maps found."""

    maps: Sequence[str]
    counts: Sequence[int]  # (M,), of pixels wiped out
    deletion: Mapping[str, np.ndarray]  # (S, M), the logit by map, then by control
    steps: Sequence[int]  # (K,), along the path
    completeness: np.ndarray  # (S, K), the error of the sum
    randomisation: Sequence[Mapping[str, Mapping[str, float]]]  # (S,), the correlation by level and map
    engines: np.ndarray  # (S,), how far they are apart


def print_checks(checks: Checks, console: Console) -> None:
    """The four checks as tables."""
    z, counts = checks.deletion, checks.counts
    shown = [i for i, count in enumerate(counts) if count in (10, 20, 80)]
    rows = {
        name: {f"{counts[i]} px": mean_and_spread(logits[:, i], ".2f") for i in shown}
        | {"mean of curve": mean_and_spread(logits.mean(1), ".2f")}
        for name, logits in z.items()
    }
    start = mean_and_spread(z[checks.maps[0]][:, 0], ".2f")
    console.print(engine_table(f"logit of the class, {start} before, after wiping out pixels", rows))
    rows = {
        level: {m: mean_and_spread([seed[level][m] for seed in checks.randomisation], ".2f") for m in checks.maps}
        for level in checks.randomisation[0]
    }
    console.print(engine_table("rank correlation on the ink with the map as trained", rows))
    errors = zip(checks.steps, checks.completeness.T, strict=True)
    rows = {"error of the sum": {f"{k} steps": f"{error.mean():.1e}" for k, error in errors}}
    console.print(engine_table("completeness of integrated gradients", rows))
    console.print(f"∂z/∂x by hand and by autodiff: greatest difference {checks.engines.max():.1e} of the greatest")


def draw_maps(
    digits: np.ndarray, maps: Mapping[str, np.ndarray], title: str, path: Path, below: Sequence[str] = ()
) -> None:
    """Digits ``(B, H, W, 1)`` and beneath them maps: red where a pixel raises the logit, blue where it lowers it."""
    rows = [Row("digit", digits[..., 0]), *(Row(name, its[..., 0], signed=True) for name, its in maps.items())]
    figure, axes = draw_rows(rows, height=1.15, width=1.15, **BESIDE, fontsize=9)
    for ax, text in zip(axes[-1], below, strict=False):
        ax.set_xlabel(text, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def draw_checks(checks: Checks, tolerance: float, path: Path) -> None:
    """Deletion curves, the error of completeness by steps, and the correlations of randomisation."""
    figure, (left, middle, right) = new_figure(3, height=4.4, width=4.8)
    for i, (name, z) in enumerate(checks.deletion.items()):
        style = "-" if name in checks.maps else "--"
        draw_range(left, checks.counts, z, style, alpha=0.15, color=f"C{i}", label=name)
    left.set(xlabel="pixels wiped out", ylabel="logit of the class", title="deletion")
    errors = checks.completeness
    middle.plot(checks.steps, errors.mean(0), "o-", label="integrated gradients")
    middle.fill_between(checks.steps, errors.min(0), errors.max(0), alpha=0.2)  # without the edge of `draw_range`
    middle.axhline(tolerance, color="gray", linestyle=":", label="tolerance")
    middle.set(xlabel="steps along the path", ylabel="error of the sum, of the difference", xscale="log", yscale="log")
    middle.set(title="completeness")
    only_ticks(middle, checks.steps)
    levels = list(checks.randomisation[0])
    by_map = {m: np.array([[seed[level][m] for level in levels] for seed in checks.randomisation]) for m in checks.maps}
    draw_bars(right, levels, by_map, apart=0.2, width=0.2)
    right.tick_params(axis="x", labelsize=8)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(ylabel="rank correlation on the ink", title="randomisation", ylim=(None, 1))
    left.set_ylim(top=1.45 * left.get_ylim()[1])  # room for the legend
    for ax, columns in ((left, 2), (middle, 1), (right, 1)):
        grid_and_legend(ax, ncols=columns, loc="upper right")
    save_figure(figure, path)
