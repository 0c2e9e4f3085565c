"""Pictures of a run: PNG by matplotlib, and for pages SVG and PNG that need no library.

A metric's name says where it is drawn: ``validation_loss`` in the panel of ``loss``, ``gradient_norm/dense_0`` in that
of ``gradient_norm``, and the entries of a vector, ``name/0`` and so on, in that of the vector.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fnet.core.extras import need
from fnet.training.rate_finder import RateCurve
from fnet.types import Schedule

if TYPE_CHECKING:
    from fnet.runs.history import History

COLOURS = ("#1f77b4", "#d9680a", "#2b9a2b", "#d1495b", "#8e6bbf", "#a8705f", "#c957a8", "#0f94a3")  # on white and black
DASHES = ("", "6 3", "2 3", "9 3 2 3")
ROUNDS = ("", "15 3 ", "10 3 ", "4 3 ")  # what is before the dashes, by how often all colours have been used
VECTOR = 12  # entries of a vector that are drawn
Series = tuple[np.ndarray, np.ndarray]  # where (n,), and the values (n, ...)


class Line(NamedTuple):
    """A curve with a name; ``dash`` is SVG's pattern, ``y`` may hold what is not finite, a wide one is translucent."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str = COLOURS[0]
    dash: str = ""
    width: float = 1.8


class Panel(NamedTuple):
    """Curves on common axes."""

    title: str
    x_label: str
    lines: list[Line]


def new_figure(columns: int = 1, height: float = 4.0, width: float = 5.0, rows: int = 1):
    """A figure that belongs to no window, and its axes: one, or an array of them."""
    need("a picture", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(figure, path: str | Path) -> None:
    """Write a figure as PNG; an axis that is to be logarithmic, of which nothing drawn is above 0, is linear."""
    for ax in figure.axes:
        for name, least in (("x", ax.dataLim.minposx), ("y", ax.dataLim.minposy)):
            if getattr(ax, f"get_{name}scale")() == "log" and not np.isfinite(least):  # matplotlib cannot
                ax.set(**{f"{name}scale": "linear"})
    figure.savefig(path, dpi=120)


def plot_curves(runs: Mapping[str, Mapping[str, np.ndarray]], path: str | Path) -> None:
    """Loss, accuracy and gradient norm over the epochs, a colour for each run, dashed where it is the validation's.

    ``runs`` maps a run's name to its metrics per epoch, as in `fnet.History.epochs`; panels without data are left out.
    """
    panels = {"loss": "log", "accuracy": "linear", "gradient_norm/all": "log"}
    panels = {name: scale for name, scale in panels.items() if any(name in run for run in runs.values())}
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
        ax.set(xlabel="epoch", ylabel=name.removesuffix("/all").replace("_", " "), yscale=scale)
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


def panels_of(
    trained: Mapping[str, Series], evaluated: Mapping[str, Series], x_label: str, known: Sequence[str] = ()
) -> list[Panel]:
    """Panels by metric, loss and accuracy first: what was measured in training, and on each of the validation sets.

    ``known`` are training metrics that are drawn elsewhere.
    """
    panels: dict[str, list[tuple[str, Series]]] = {name: [] for name in ("loss", "accuracy")}
    sets = _sets([*trained, *known], list(evaluated))
    columns = [(name, "training", series) for name, series in trained.items()]
    for full, series in evaluated.items():
        prefix = next((prefix for prefix in sets if full.startswith(f"{prefix}_")), "")
        columns.append((full.removeprefix(f"{prefix}_"), prefix.replace("_", " ") or full, series))
    for name, source, (x, values) in sorted(columns, key=lambda column: natural(column[0])):
        panel, _, part = name.partition("/")
        named = source if source != "training" or not part else ""
        label = " ".join(word for word in (part, named) if word)
        if values.ndim == 1:
            panels.setdefault(panel, []).append((label, (x, values)))
        elif values.ndim == 2 and values.shape[1] <= VECTOR:
            lines = [(f"{label} {i}", (x, values[:, i])) for i in range(values.shape[1])]
            panels.setdefault(name, []).extend(lines)
    return [Panel(title, x_label, _styled(lines)) for title, lines in panels.items() if lines]


def series_of(history: History) -> list[tuple[dict[str, Series], dict[str, Series], str, Sequence[str]]]:
    """What `panels_of` takes: a run by epoch, and by step the evaluations that are not those of the epochs' ends."""
    results = {name: values for name, values in history.evaluations.items() if name != "step"}
    epochs = {name: (history.epochs["epoch"], values) for name, values in history.epochs.items() if name != "epoch"}
    trained = {name: series for name, series in epochs.items() if name not in results}
    if all(name in epochs and np.array_equal(epochs[name][1], results[name], equal_nan=True) for name in results):
        return [(trained, {name: epochs[name] for name in results}, "epoch", ())]
    by_step = {name: (history.evaluations["step"], values) for name, values in results.items()}
    return [(trained, {}, "epoch", ()), ({}, by_step, "step", list(trained))]


def best_at(history: History, x_label: str) -> float | None:
    """Where an axis marks the evaluation that was best for the rule that has ended the run."""
    step = history.ended and history.ended.best_step
    if step is None or x_label == "step":
        return step
    epochs, steps = history.epochs.get("epoch"), history.evaluations["step"]
    if epochs is None or len(epochs) != len(steps) or step not in steps:
        return None
    return float(epochs[steps == step][0])


def natural(name: str) -> tuple:
    """A key that sorts ``dense_10`` behind ``dense_9``, and ``all`` of several norms first."""
    head, _, tail = name.partition("/")
    words = [word.zfill(20) if word.isdecimal() else word for word in re.split(r"(\d+)", tail)]
    return head, tail not in ("", "all"), words


def drawn(y: np.ndarray) -> np.ndarray:
    """Which values a chart shows: the finite ones, but for such as leave no room for a margin."""
    return np.abs(y) < 1e300


def is_logarithmic(lines: Sequence[Line]) -> bool:
    """Whether all that is drawn is positive, no number as good as 0, and spans more than a factor of 20."""
    values = np.concatenate([line.y[drawn(line.y)] for line in lines])
    return bool(values.size and values.min() > 1e-300 and values.max() > 20 * values.min())


def _sets(trained: Sequence[str], evaluated: Sequence[str]) -> list[str]:
    """The validation sets' names, the longest first: what stands before the loss, or before a training metric.

    Of training metrics the longest that fits: where there is an ``aux_loss``, ``test_aux_loss`` is of the set ``test``.
    """
    metrics = sorted({"loss", *trained}, key=len, reverse=True)
    names = [name for name in evaluated if name.endswith("_loss")] or evaluated
    ends = [(name, next((f"_{metric}" for metric in metrics if name.endswith(f"_{metric}")), "")) for name in names]
    return sorted({name.removesuffix(end) for name, end in ends if end}, key=len, reverse=True)


def _styled(lines: Sequence[tuple[str, Series]]) -> list[Line]:
    """Training is drawn through and each set dashed; of many curves each round of the colours has its dashes."""
    few = len(lines) <= len(DASHES)
    dashes = [DASHES[(i if few else i // len(COLOURS)) % len(DASHES)] for i in range(len(lines))]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(lines))]
    looks = zip(lines, colours, dashes, strict=True)
    return [Line(name, x, y, colour, dash) for (name, (x, y)), colour, dash in looks]


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


# ---- pictures for pages


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 240, 54, 14, 10, 38  # of a chart, in its own units
POINTS, HOVERS = 600, 60  # of a curve: that are drawn, and that show their number


def line_chart(panel: Panel) -> str:
    """A panel as an HTML figure with an SVG in it, whose points show their numbers when pointed at.

    Text has the colour of its surroundings. A curve is interrupted where it is not finite, and its name counts that.
    """
    log = is_logarithmic(panel.lines)
    finite = [drawn(line.y) for line in panel.lines]
    xs = np.concatenate([np.asarray(line.x, np.float64) for line in panel.lines])
    ys = np.concatenate([line.y[ok] for line, ok in zip(panel.lines, finite, strict=True)])
    x_low, x_high = _widened(xs, 0.0)
    y_low, y_high = _widened(np.log10(ys) if log else ys, 0.05)

    def place(x, y) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.log10(y) if log else np.asarray(y, np.float64)
        across = LEFT + (np.asarray(x, np.float64) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts: list[str] = []
    text = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}" font-size="12" fill="currentColor">{}</text>'
    rule = '<path d="M{:.1f} {:.1f}H{:.1f}" stroke="currentColor" stroke-opacity="{}" fill="none"/>'
    for tick, label in _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high, 5):
        height = float(place(0, tick)[1])
        parts += [rule.format(LEFT, height, WIDTH - RIGHT, 0.15), text.format(LEFT - 6, height + 4, "end", label)]
    for tick, _ in _ticks(x_low, x_high, 5):
        if tick == round(tick):  # there is no half step
            parts.append(text.format(float(place(tick, 1.0)[0]), HEIGHT - BOTTOM + 16, "middle", f"{tick:.0f}"))
    parts.append(rule.format(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, 0.5))
    parts.append(text.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "middle", escape(panel.x_label)))
    for line, ok in zip(panel.lines, finite, strict=True):
        x, y = _thinned(np.asarray(line.x), np.where(ok, line.y, np.nan))
        across, height = place(x, y)
        name = escape(line.name, quote=True)
        opacity = 0.5 if line.width > 2 else 1
        style = f'stroke="{line.colour}" stroke-width="{line.width}" stroke-opacity="{opacity}" fill="none"'
        parts.append(
            f'<path d="{_path(across, height)}" {style} stroke-dasharray="{line.dash}"><title>{name}</title></path>'
        )
        for i in np.unique(np.linspace(0, len(x) - 1, min(len(x), HOVERS)).astype(int)) if len(x) else ():
            if np.isfinite(height[i]):
                shown = f"{name}: {y[i]:.6g} at {escape(panel.x_label)} {whole(float(x[i]))}"
                spot = f'<circle cx="{across[i]:.1f}" cy="{height[i]:.1f}"'
                dot = f'{spot} r="{2.4 if len(x) <= 30 else 1.2}" fill="{line.colour}"/>'
                parts.append(f'<g>{dot}{spot} r="7" fill-opacity="0"/><title>{shown}</title></g>')
    legend = "".join(
        f"<li>{swatch(line.colour, line.dash)} {escape(line.name)}"
        + ("" if ok.all() else f" ({(~ok).sum()} of {len(ok)} not finite)")
        + "</li>"
        for line, ok in zip(panel.lines, finite, strict=True)
    )
    title = escape(panel.title.replace("_", " "), quote=True)
    return (
        f'<figure class="chart"><figcaption>{title}{" (logarithmic)" if log else ""}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} by {escape(panel.x_label, quote=True)}">'
        f'{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )


def whole(x: float) -> str:
    """A step or an epoch: all digits of a whole number."""
    return f"{x:.0f}" if x == round(x) else f"{x:g}"


def swatch(colour: str, dash: str = "") -> str:
    """A short stroke that stands before the name of a curve."""
    look = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"'
    return f'<svg width="26" height="10" aria-hidden="true"><path d="M0 5H26" {look}/></svg>'


def _path(across: np.ndarray, height: np.ndarray) -> str:
    """SVG's path through the points, interrupted where one is not finite."""
    words, pen = [], "M"
    for x, y in zip(across, height, strict=True):
        words.append(f"{pen}{x:.1f} {y:.1f}" if np.isfinite(y) else "")
        pen = "L" if np.isfinite(y) else "M"
    return "".join(words)


def _thinned(x: np.ndarray, y: np.ndarray) -> Series:
    """At most `POINTS` points: of each stretch the least and the greatest, so that no peak is lost."""
    if len(x) <= POINTS:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), POINTS // 2 - 1):
        ok = np.isfinite(y[part])
        keep |= {part[np.where(ok, y[part], np.inf).argmin()], part[np.where(ok, y[part], -np.inf).argmax()]}
    rows = np.asarray(sorted(keep))
    return x[rows], y[rows]


def _widened(values: np.ndarray, share: float) -> tuple[float, float]:
    """The range of the values with a margin; never empty."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    size = max(abs(low), abs(high))
    if size < 1e-290:
        margin = 1.0
    elif high - low < 1e-12 * size:  # constant
        margin = size / 2
    else:
        margin = share * (high - low)
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """Round numbers within the range, about ``count`` of them, and how they are written."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    places = max(0, -math.floor(math.log10(width * 1.001)))
    ticks = width * np.arange(math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9) + 1)
    plain = places <= 5 and max(abs(low), abs(high)) < 1e6
    return [(float(t), f"{t + 0.0:.{places}f}" if plain else f"{t:.3g}") for t in ticks]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten between ``10 ** low`` and ``10 ** high``, or 1, 2 and 5 of each where these are few."""
    powers = range(max(math.floor(low), -307), min(math.ceil(high), 307) + 1)  # a margin may have no floats
    factors = (1,) if high - low > 3 else (1, 2, 5)
    ticks = [k * 10.0**power for power in powers for k in factors if low <= math.log10(k) + power <= high]
    return [(tick, f"{tick:g}") for tick in ticks[:: max(1, math.ceil(len(ticks) / 8))]]


def png(pixels: np.ndarray) -> bytes:
    """A picture as PNG: grey ``(H, W)``, or colours ``(H, W, 3)`` or ``(H, W, 4)``, of bytes."""
    height, width = pixels.shape[:2]
    colour = {2: 0, 3: {3: 2, 4: 6}.get(pixels.shape[-1])}[pixels.ndim]
    if pixels.dtype != np.uint8 or colour is None:
        raise ValueError(f"png: {pixels.dtype}{pixels.shape}; expected uint8 of (H, W), (H, W, 3) or (H, W, 4)")
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)  # a row begins with 0

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
