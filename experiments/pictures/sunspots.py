"""The pictures of `sunspots`. Legend: S seeds, T years."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.pictures.parts import DOTTED, grid_and_legend
from fnet.report.plots import new_figure, save_figure


def draw_forecasts(
    years: np.ndarray, observed: np.ndarray, forecasts: np.ndarray, linear: np.ndarray, order: int, path: Path
) -> None:
    """The test part ``(T,)`` with the forecasts ``(S, T)`` and AR's ``(T,)`` above, what they miss below."""
    figure, (above, below) = new_figure(rows=2, height=3.2, width=9)
    above.plot(years, observed, "k.-", linewidth=1, markersize=4, label="observed")
    for ax, reference in ((above, 0), (below, observed)):
        ax.plot(years, linear - reference, color="C1", linewidth=1.2, label=f"AR({order})")
        ax.plot(years, forecasts.mean(0) - reference, color="C0", linewidth=1.6, label="GRU, mean of the seeds")
        ax.grid(alpha=0.3)
    below.axhline(0, color="black", linewidth=0.8)
    above.set(ylabel="sunspot number", title="next year's number, forecast from all years before")
    below.set(xlabel="year", ylabel="forecast − observed")
    above.legend(fontsize="small", ncols=3, loc="upper right")
    above.set_ylim(-5, 1.2 * max(observed.max(), forecasts.max()))
    save_figure(figure, path)


def draw_free_run(
    years: np.ndarray, x: np.ndarray, test: int, run: np.ndarray, linear: np.ndarray, order: int, path: Path
) -> None:
    """All years ``(T,)``, of which the last 40 before the test part are shown, and forecasts fed back from there on."""
    figure, ax = new_figure(height=3.6, width=9)
    shown = slice(test - 40, None)
    ax.plot(years[shown], x[shown], "k.-", linewidth=1, markersize=4, label="observed")
    ax.plot(years[test:], linear, color="C1", linewidth=1.2, label=f"AR({order}), free run")
    ax.plot(years[test:], run, color="C0", linewidth=1.6, label="GRU, free run")
    ax.axvline(years[test] - 0.5, **DOTTED)
    ax.set(xlabel="year", ylabel="sunspot number", title=f"nothing observed after {years[test - 1]}")
    ax.set_ylim(-5, 1.2 * x[shown].max())
    grid_and_legend(ax, ncols=3, loc="upper left")
    save_figure(figure, path)
