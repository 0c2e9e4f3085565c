"""The picture of a gradient audit: errors of leaves as heat maps, Taylor tests, the ladder of steps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from fnet.gradcheck.report import FINE, LeafCheck, Report
from fnet.gradcheck.witnesses import FAULT
from fnet.report.audit_words import COLOURS, as_text, headline, overall, shape_text, shorten, shorten_path, worst
from fnet.report.plots import new_figure, save_figure

WARM = ("#c62828", "#ef6c00", "#ad1457", "#8d6e63")  # the curves of wrong leaves; all others are cool
COOL = ("#1f77b4", "#2ca02c", "#17becf", "#7986cb", "#00695c", "#78909c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NOT_FINITE = "#00b8d4"
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
PANELS = 24  # heat maps in one picture
NAMED = 10  # curves with a name of their own


Curve = tuple[LeafCheck, dict, str]  # a leaf, the style of its curve, its name in the legend
LEAST = 1e-17  # where the colours and the ladder end: what is smaller is drawn as 0


def plot_audit(report: Report, path: str | Path) -> None:
    """Write a picture of an audit: errors per leaf, Taylor remainders, precision ladder.

    Panels without data are left out. Of more than 24 leaves the errors of the 24 worst are drawn.
    """
    save_figure(draw(report), path)


def draw(report: Report):
    """The figure: heat maps above, curves below."""
    heat = [leaf for leaf in report.leaves if drawable(leaf) or leaf.verdict not in FINE]
    shown = worst(heat, PANELS)
    taylor = [leaf for leaf in report.leaves if any(finite_positive(r) and t > 0 for t, r in leaf.taylor)]
    ladder = [leaf for leaf in report.leaves if leaf.ladder]
    curves = [(panel, leaves) for panel, leaves in ((plot_taylor, taylor), (plot_ladder, ladder)) if leaves]
    looks = styles([leaf for leaf in report.leaves if any(leaf is other for other in (*taylor, *ladder))])
    columns = min(len(shown), 6)
    rows = math.ceil(len(shown) / max(columns, 1))
    heights = ([0.5 + 1.75 * rows] if shown else []) + ([4.6] if curves else [])
    figure = empty_figure(13.0, sum(heights) + 0.6 if heights else 2.0)
    figure.suptitle(
        as_text(textwrap.fill(headline(report), 100)), color=COLOURS[overall(report)], fontsize=12, fontweight="bold"
    )
    if not heights:
        figure.text(0.5, 0.4, "no errors, Taylor remainders or precision ladder to draw", ha="center")
        return figure
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    if shown:
        plot_errors(next(parts), shown, len(heat), rows, columns)
    if curves:
        axes = np.ravel(next(parts).subplots(1, len(curves)))
        for ax, (panel, leaves) in zip(axes, curves, strict=True):
            panel(ax, [(leaf, *looks[leaf.path]) for leaf in leaves])
    return figure


def empty_figure(width: float, height: float):
    """`new_figure` without its axes."""
    figure, ax = new_figure(height=height, width=width)
    ax.remove()
    return figure


def plot_errors(part, leaves: Sequence[LeafCheck], total: int, rows: int, columns: int) -> None:
    """A heat map per leaf with common colours; the frame and the title of each tell its verdict."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    colours = colormaps["YlOrRd"].with_extremes(under="white", bad=NOT_FINITE)
    common = ScalarMappable(LogNorm(LEAST, 1.0), colours)
    axes = part.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(leaves) :]:
        ax.set_axis_off()
    for ax, leaf in zip(axes.flat, leaves, strict=False):
        colour = COLOURS.get(leaf.verdict, "black")
        ax.set(xticks=[], yticks=[])
        size = f"{shorten_path(leaf.path, 30)}\n{leaf.verdict}  {leaf.relative:.1e}"
        ax.set_title(as_text(size), fontsize=8, color=colour, fontweight="normal" if leaf.verdict in FINE else "bold")
        words = [shape_text(leaf.shape)]
        if drawable(leaf):
            errors = np.atleast_2d(np.asarray(leaf.errors, np.float64))
            # zero has no logarithm: it is drawn as what lies under the scale
            shades = np.ma.masked_invalid(np.where(errors == 0, np.finfo(float).tiny, errors))
            ax.imshow(shades, norm=common.norm, cmap=colours, aspect="auto", interpolation="nearest")
            if not errors.any():
                words_inside = "every bit equal" if math.isfinite(leaf.expected) else "not compared entry by entry"
                ax.text(
                    0.5, 0.5, words_inside, ha="center", va="center", fontsize=8, color="0.6", transform=ax.transAxes
                )
            seen = ~(errors <= FAULT)
            if seen.any() and seen.mean() < 0.02:  # a few entries are easily overlooked
                row, column = np.unravel_index(np.nan_to_num(errors, nan=np.inf).argmax(), errors.shape)
                ax.plot(column, row, "o", markersize=13, markerfacecolor="none", color="black", clip_on=False)
            words += [shorten(leaf.cause, 40)] if leaf.cause else []
        else:
            cause = textwrap.shorten(leaf.cause or "no errors", 120, placeholder=" …")
            ax.text(
                0.5,
                0.5,
                as_text(textwrap.fill(cause, 24)),
                ha="center",
                va="center",
                fontsize=7,
                transform=ax.transAxes,
            )
        ax.set_xlabel(as_text("\n".join(words)), fontsize=7, labelpad=2)
        for spine in ax.spines.values():
            spine.set(color=colour if leaf.verdict != "ok" else "0.6", linewidth=0.8 if leaf.verdict in FINE else 3)
    bar = part.colorbar(common, ax=axes, extend="both", aspect=12 * rows + 8, pad=0.01, fraction=0.04)
    bar.set_ticks([10.0**k for k in range(-16, 1, 4 if rows == 1 else 2)])
    bar.ax.axhline(FAULT, color="black", linewidth=1.5)
    bar.ax.tick_params(labelsize=8)
    some = f"the {len(leaves)} worst of {total} leaves; " if len(leaves) < total else ""
    part.suptitle(
        f"error relative to the leaf's largest entry ({some}white: exactly 0, blue: not finite, "
        f"line in the colour bar: {FAULT:.0e}, what counts as a fault)",
        fontsize=9,
    )


def plot_taylor(ax, curves: Sequence[Curve]) -> None:
    """Remainders against t, and what order 1 and order 2 look like."""
    tops = []  # where the curves that are more than rounding end
    for leaf, style, name in curves:
        t, r = (np.asarray(values, np.float64) for values in zip(*leaf.taylor, strict=True))
        keep = (t > 0) & np.isfinite(r) & (r > 0)
        order = ", rounding only" if leaf.order is None else f", order {leaf.order:.1f}"
        ax.plot(t[keep], r[keep], **style, label=name + order if name else "")
        if leaf.order is not None:
            tops.append((r[keep][t[keep].argmax()], t[keep].max()))
    ax.set(xscale="log", yscale="log", xlabel="t", ylabel="|f(t) − f(0) − t · slope|")
    ax.set_title("Taylor remainder along a line through each leaf: order 2 when right, 1 when wrong", fontsize=9)
    low, high = ax.get_ylim()
    high = max(high, 1e8 * low)  # what is all rounding looks flat
    t = np.asarray(ax.get_xlim())
    height, end = max(tops, default=(high, t[1]))
    for order, dashes in ((1, "--"), (2, ":")):
        ax.plot(t, height * (t / end) ** order, dashes, color="0.35", linewidth=1.2, zorder=1, label=f"order {order}")
    ax.set(xlim=t, ylim=(low, high))
    ax.minorticks_off()
    ax.grid(alpha=0.25)
    legend(ax, curves)


def plot_ladder(ax, curves: Sequence[Curve]) -> None:
    """For each dtype a column: the claimed gradient's error per leaf, filled, and autodiff's, an open circle."""
    leaves = [leaf for leaf, _, _ in curves]
    dtypes = list(dict.fromkeys(rung.dtype for leaf in leaves for rung in leaf.ladder))
    dtypes = ["float64", *sorted((d for d in dtypes if d != "float64"), key=lambda d: EPS.get(d, 1.0))]
    top = (
        max([1.0, *(e for leaf in leaves for r in leaf.ladder for e in (r.error, r.expected) if math.isfinite(e))])
        * 100
    )

    def height(error):
        return top if not math.isfinite(error) else max(error, LEAST)

    ring = min(9.0, max(4.0, 100 / len(leaves)))
    for k, (leaf, style, name) in enumerate(curves):
        x = 0.8 * (k + 0.5) / len(leaves) - 0.4
        own = {"float64": (leaf.relative, math.nan)}  # autodiff in float64 is what everything is held against
        own |= {rung.dtype: (rung.error, rung.expected) for rung in leaf.ladder if not rung.note}
        at = [dtypes.index(dtype) + x for dtype in own]
        points = {"marker": "o", "markersize": 0.55 * ring, **style, "linestyle": "", "alpha": 1}
        ax.plot(at, [height(error) for error, _ in own.values()], **points, label=name)
        rings = [(place, expected) for place, (_, expected) in zip(at[1:], list(own.values())[1:], strict=True)]
        ax.plot(
            [place for place, _ in rings],
            [height(expected) for _, expected in rings],
            "o",
            markersize=ring,
            markerfacecolor="none",
            color="0.3",
            markeredgewidth=0.7,
            zorder=1,
        )
    for k, dtype in enumerate(dtypes):
        if dtype in EPS:
            ax.plot([k - 0.45, k + 0.45], [EPS[dtype]] * 2, color="0.6", linewidth=1, zorder=0)
        notes = {rung.note for leaf in leaves for rung in leaf.ladder if rung.dtype == dtype and rung.note}
        for note in sorted(notes)[:1]:
            words = as_text(textwrap.fill(textwrap.shorten(note, 90, placeholder=" …"), 18))
            ax.text(k, 1e-8, words, ha="center", va="center", fontsize=7)
    ax.plot([], [], "o", markerfacecolor="none", color="0.3", markersize=9, label="autodiff in that precision")
    ax.plot([], [], color="0.6", label="machine epsilon")
    ax.set(yscale="log", ylim=(LEAST / 10, top * 10), xlim=(-0.5, len(dtypes) - 0.5), ylabel="relative error")
    ax.set_xticks(range(len(dtypes)), [as_text(dtype) for dtype in dtypes])
    ax.set_title("precision ladder (grey band: exactly 0, blue band: not finite)", fontsize=9)
    ax.axhspan(LEAST / 10, LEAST * 2, color="0.93", zorder=0)
    ax.axhspan(top / 3, top * 10, color=NOT_FINITE, alpha=0.15, zorder=0)
    ax.grid(alpha=0.25, axis="y")
    legend(ax, curves)


def styles(leaves: Sequence[LeafCheck]) -> dict[str, tuple[dict, str]]:
    """By path, each leaf's style in all panels and its name in the legends; wrong ones are warm, marked and on top."""
    named = {leaf.path for leaf in worst(leaves, NAMED)}
    warm, cool, markers = cycle(WARM), cycle(COOL), cycle(MARKERS)
    looks = {}
    for leaf in leaves:
        bad, known = leaf.verdict not in FINE, leaf.path in named
        style = {
            "color": next(warm if bad else cool) if known else WARM[0] if bad else "0.7",
            "zorder": 3 if bad else 2,
        }
        style |= (
            {"linewidth": 1.8, "marker": next(markers), "markersize": 5} if bad else {"linewidth": 1.1, "alpha": 0.8}
        )
        # the verdict stands first: matplotlib leaves out labels that begin with an underscore, as a name may
        looks[leaf.path] = style, as_text(f"{leaf.verdict}: {shorten_path(leaf.path, 36)}") if known else ""
    return looks


def legend(ax, curves: Sequence[Curve]) -> None:
    """Beneath the panel; says how many leaves it does not name."""
    handles, labels = ax.get_legend_handles_labels()
    pairs = [(handle, label) for handle, label in zip(handles, labels, strict=True) if label]
    more = sum(not name for _, _, name in curves)
    ax.legend(
        *zip(*pairs, strict=True),
        title=f"without a name: {more} more leaves, grey, and red where wrong" if more else None,
        title_fontsize=7,
        fontsize=7,
        ncols=2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        frameon=False,
    )


def drawable(leaf: LeafCheck) -> bool:
    """Whether the leaf has errors to draw."""
    return leaf.errors is not None and np.size(leaf.errors) > 0


def finite_positive(value: float) -> bool:
    """Whether a logarithmic axis can show it."""
    return math.isfinite(value) and value > 0
