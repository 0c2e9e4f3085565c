"""Line charts as SVG for pages, and small pictures as PNG, written by hand: a page needs no other file."""

from __future__ import annotations

import math
import struct
import zlib
from html import escape

import numpy as np

from fnet.report.panels import Panel, Series, drawn, is_logarithmic, whole

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
    for tick, label in log_ticks(y_low, y_high) if log else round_ticks(y_low, y_high, 5):
        height = float(place(0, tick)[1])
        parts += [rule.format(LEFT, height, WIDTH - RIGHT, 0.15), text.format(LEFT - 6, height + 4, "end", label)]
    measured = np.unique(xs)
    few = 1 < len(measured) <= 6 and np.ptp(np.diff(measured)) == 0  # each then has its tick
    for tick in measured if few else [tick for tick, _ in round_ticks(x_low, x_high, 5)]:
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
                anchor, aside = ("end", -9) if across[i] > WIDTH / 2 else ("start", 9)
                value = (
                    f'<text x="{across[i] + aside:.1f}" y="{max(height[i] - 6, 12):.1f}" '
                    f'style="text-anchor:{anchor}" font-size="12" fill="currentColor">{y[i]:.5g}</text>'
                )
                parts.append(f'<g class="spot">{dot}{spot} r="7" fill-opacity="0"/><title>{shown}</title>{value}</g>')
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


def round_ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """Round numbers within the range, about ``count`` of them, and how they are written."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    places = max(0, -math.floor(math.log10(width * 1.001)))
    ticks = width * np.arange(math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9) + 1)
    plain = places <= 5 and max(abs(low), abs(high)) < 1e6
    return [(float(t), f"{t + 0.0:.{places}f}" if plain else f"{t:.3g}") for t in ticks]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten between ``10 ** low`` and ``10 ** high``, or 1, 2 and 5 of each where these are few."""
    powers = range(max(math.floor(low), -307), min(math.ceil(high), 307) + 1)  # a margin may have no floats
    factors = (1,) if high - low > 2.3 else (1, 2, 5)  # at most 8, of which none need be left out
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
