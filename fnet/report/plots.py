"""Pictures of a run as PNG, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fnet.core.extras import need
from fnet.gradients.curvature import Spectrum
from fnet.report.panels import best_at, is_logarithmic, panels_of, series_of, whole
from fnet.runs.history import History
from fnet.training.rate_finder import RateCurve
from fnet.types import Schedule


def new_figure(columns: int = 1, height: float = 4.0, width: float = 5.0, rows: int = 1):
    """A figure that belongs to no window, and its axes: one, or an array of them."""
    need("a picture", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


WHOLE = ("epoch", "epochs", "layer", "step", "steps", "update", "updates")  # of which there are no halves


def save_figure(figure, path: str | Path) -> None:
    """Write a figure as PNG.

    An axis that is to be logarithmic, of which nothing drawn is above 0, is linear; below one of epochs, steps, updates
    or layers only whole numbers stand.
    """
    from matplotlib.ticker import MaxNLocator

    for ax in figure.axes:
        if ax.get_xlabel() in WHOLE and isinstance(places := ax.xaxis.get_major_locator(), MaxNLocator):
            places.set_params(integer=True)
        for name, least in (("x", ax.dataLim.minposx), ("y", ax.dataLim.minposy)):
            if getattr(ax, f"get_{name}scale")() == "log" and not np.isfinite(least):  # matplotlib cannot
                ax.set(**{f"{name}scale": "linear"})
    figure.savefig(path, dpi=120)


def plot_curves(
    runs: Mapping[str, Mapping[str, np.ndarray]], path: str | Path, chance: Mapping[str, float] | None = None
) -> None:
    """Loss, accuracy and gradient norm over the epochs, a colour for each run, dashed where it is the validation's.

    ``runs`` maps a run's name to its metrics per epoch, as in ``fnet.History.epochs``; panels without data are
    left out. A dotted line names the epoch of a run's lowest validation loss, and one what guessing gives,
    where ``chance`` has it: ``{"loss": math.log(10), "accuracy": 0.1}``.
    """
    panels = {"loss": "log", "accuracy": "linear", "gradient_norm/all": "log"}
    panels = {name: scale for name, scale in panels.items() if any(name in run for run in runs.values())}
    chance, lowest = chance or {}, {}
    for i, run in enumerate(runs.values()):
        if np.isfinite(run.get("validation_loss", np.nan)).any():
            lowest.setdefault(int(run["epoch"][np.nanargmin(run["validation_loss"])]), f"C{i}")
    figure, axes = new_figure(len(panels))
    for ax, (name, scale) in zip(np.ravel(axes), panels.items(), strict=True):
        for i, (title, run) in enumerate(runs.items()):
            # the first run is drawn wide beneath the others, so that curves that coincide are both seen
            width = 5.0 if i == 0 and len(runs) > 1 else 1.5
            for key, style, what in ((name, "-", "training"), (f"validation_{name}", "--", "validation")):
                if key in run:
                    label = f"{title}, {what}" if name != "gradient_norm/all" else title
                    ax.plot(
                        run["epoch"],
                        run[key],
                        style,
                        color=f"C{i}",
                        linewidth=width,
                        alpha=0.5 if width > 2 else 1,
                        label=label,
                    )
        if name in chance:
            ax.axhline(chance[name], color="0.4", linestyle=":", label=f"chance, {chance[name]:.3g}")
        for epoch, color in lowest.items() if name != "gradient_norm/all" else ():
            ax.axvline(epoch, color=color, linestyle=":", label=f"lowest validation loss, epoch {epoch}")
        title = "norm of the gradient" if name == "gradient_norm/all" else name
        ax.set(xlabel="epoch", title=title + " (logarithmic)" * (scale == "log"), yscale=scale)
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    save_figure(figure, path)


def plot_schedules(schedules: Mapping[str, Schedule], steps: int, path: str | Path) -> None:
    """The rates of schedules over the counts 0 .. ``steps``, a line each."""
    counts = np.arange(steps + 1)
    figure, ax = new_figure(width=7.0)
    for title, schedule in schedules.items():
        ax.plot(counts, np.asarray(schedule(counts)), label=title)
    ax.set(xlabel="updates applied before", ylabel="learning rate", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    save_figure(figure, path)


def plot_rate_curve(curve: RateCurve, path: str | Path) -> None:
    """The losses of `fnet.find_learning_rate` over the rates, smoothed and not, with the suggestion."""
    figure, ax = new_figure(width=7.0)
    ax.plot(curve.rates, curve.losses, color="C0", alpha=0.35, label="loss of a batch")
    ax.plot(curve.rates, curve.smoothed, color="C0", label="smoothed")
    if curve.suggestion is not None:
        ax.axvline(curve.suggestion, color="C2", linestyle="--", label=f"suggestion {curve.suggestion:.2g}")
    if curve.diverged_at is not None:
        ax.axvline(curve.diverged_at, color="C3", linestyle=":", label=f"diverged at {curve.diverged_at:.2g}")
    ax.set(xlabel="learning rate", ylabel="loss", xscale="log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    save_figure(figure, path)


def plot_spectrum(spectrum: Spectrum, path: str | Path, width: float | None = None) -> None:
    """The density of a matrix' eigenvalues, on a logarithmic axis, with the largest and the smallest marked.

    ``spectrum`` is that of `fnet.curvature.spectrum`; each of its values is a normal curve of ``width``, by default a
    hundredth of their range.
    """
    values = np.asarray(spectrum.values)
    least, most = float(values.min()), float(values.max())
    reach = (most - least) or abs(most) or 1.0
    width = 0.01 * reach if width is None else width
    points = np.linspace(least - 0.05 * reach, most + 0.05 * reach, 1000)
    density = np.asarray(spectrum.density(points, width))
    figure, ax = new_figure(width=7.0)
    ax.plot(points, density, label=f"{values.shape[0]} draws of {values.shape[1]} steps")
    for end in (least, most):
        ax.axvline(end, linestyle=":", color="gray")
        ax.annotate(f"{end:.3g}", (end, density.max()), textcoords="offset points", xytext=(4, 2), fontsize="small")
    ax.set(xlabel="eigenvalue", ylabel="density", yscale="log", ylim=(max(density.max() * 1e-7, 1e-12), None))
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    save_figure(figure, path)


def plot_confusion(counts: np.ndarray, path: str | Path, names: Sequence[str] | None = None) -> None:
    """A confusion matrix ``counts[true, predicted]`` with its numbers; the shade is the share of the true class."""
    counts = np.asarray(counts)
    names = names or [str(k) for k in range(len(counts))]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(4.0, 0.5 * len(counts) + 1)
    figure, ax = new_figure(height=size, width=size)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(counts):
        if count:
            ax.text(
                j,
                i,
                f"{count:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if shares[i, j] > 0.5 else "black",
            )
    right = np.trace(counts) / max(counts.sum(), 1)
    ax.set(xlabel="predicted", ylabel="true", title=f"accuracy {right:.4f} of {counts.sum():.0f}")
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    save_figure(figure, path)


# ---- what is drawn where


def plot_history(history: History, path: str | Path | None = None):
    """The figure of `fnet.History.plot`: a panel for each metric; written as PNG if there is a ``path``."""
    need("History.plot", "matplotlib")
    panels = [panel for part in series_of(history) for panel in panels_of(*part)]
    columns = min(3, max(1, len(panels)))
    figure, axes = new_figure(columns, height=3.2, width=4.6, rows=max(1, math.ceil(len(panels) / columns)))
    axes = np.ravel(axes)
    for ax, panel in zip(axes, panels, strict=False):
        for line in panel.lines:
            dash = tuple(map(float, line.dash.split()))
            style = (0, dash) if dash else "-"
            marker = "o" if len(line.x) <= 30 else ""
            ax.plot(line.x, line.y, color=line.colour, linestyle=style, marker=marker, markersize=3, label=line.name)
        ax.set(xlabel=panel.x_label, yscale="log" if is_logarithmic(panel.lines) else "linear")
        if (at := best_at(history, panel.x_label)) is not None:
            ax.axvline(at, color="grey", linestyle=":", label=f"best, {panel.x_label} {whole(at)}")
            last = max(float(line.x[-1]) for line in panel.lines)
            ax.axvline(last, color="grey", linestyle="--", label=f"stopped, {panel.x_label} {whole(last)}")
        ax.set_title(panel.title.replace("_", " ").replace("$", r"\$"))
        ax.grid(alpha=0.3)
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles, [label.replace("$", r"\$") for label in labels], fontsize="small")
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    if not panels:
        axes[0].text(0.5, 0.5, "no epoch and no evaluation was completed", ha="center", transform=axes[0].transAxes)
    if path is not None:
        save_figure(figure, path)
    return figure
