"""The audit's report as one picture (PNG) and as HTML: tables for a notebook, and a page that stands alone.

All that a user named (leaves, operations, files) is text: escaped in HTML, and no mathematics in the picture.
"""

from __future__ import annotations

import base64
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from html import escape
from io import BytesIO
from itertools import cycle
from pathlib import Path

import numpy as np

from fnet.gradcheck.report import FINE, LeafCheck, Report, show_rung
from fnet.gradcheck.witnesses import FAULT
from fnet.report.plots import new_figure

COLOURS = {"ok": "#2e7d32", "kink": "#1565c0", "imprecise": "#8a5a00", "unverified": "#6a1b9a", "wrong": "#c62828"}
WORST_FIRST = ("wrong", "unverified", "imprecise", "kink", "ok")
WARM = ("#c62828", "#ef6c00", "#ad1457", "#8d6e63")  # the curves of wrong leaves; all others are cool
COOL = ("#1f77b4", "#2ca02c", "#17becf", "#7986cb", "#00695c", "#78909c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NOT_FINITE = "#00b8d4"
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
PANELS = 24  # heat maps in one picture
NAMED = 10  # curves with a name of their own
Curve = tuple[LeafCheck, dict, str]  # a leaf, the style of its curve, its name in the legend
LEAVES_NOTE = (
    "error: the largest, relative to the leaf's largest entry. sees: the smallest fault that would have shown. "
    "order: in which the Taylor remainder vanishes, 2 when right and 1 when wrong."
)
LEAST = 1e-17  # where the colours and the ladder end: what is smaller is drawn as 0


def plot_audit(report: Report, path: str | Path) -> None:
    """Write a picture of an audit: errors per leaf, Taylor remainders, precision ladder.

    Panels without data are left out. Of more than 24 leaves the errors of the 24 worst are drawn.
    """
    draw(report).savefig(path, dpi=120)


def audit_tables(report: Report) -> str:
    """An HTML fragment with the audit's tables, for notebooks; no scripts, and nothing is loaded from anywhere."""
    leaves = [
        (
            code(leaf.path),
            shape_text(leaf.shape),
            leaf.dtype,
            pill(leaf.verdict, leaf.verdict),
            f"{leaf.relative:.1e}",
            f"{leaf.power:.0e}",
            "" if leaf.order is None else f"{leaf.order:.1f}",
            found(leaf),
        )
        for leaf in report.leaves
    ]
    intermediates = [
        (
            code(i.name),
            shape_text(i.shape),
            pill(i.verdict, i.verdict),
            f"{i.relative:.1e}",
            i.agreement,
            f"{i.claimed:.6g}",
            f"{i.expected:.6g}",
            str(list(i.worst)),
            i.cause,
        )
        for i in report.intermediates
    ]
    ladders = [leaf for leaf in report.leaves if leaf.ladder]
    dtypes = list(dict.fromkeys(rung.dtype for leaf in ladders for rung in leaf.ladder))
    rungs = [({rung.dtype: rung for rung in leaf.ladder}, leaf.path) for leaf in ladders]
    ladder = [(code(path), *(show_rung(mine.get(dtype)) for dtype in dtypes)) for mine, path in rungs]
    costs = [cost.row() for cost in report.costs]
    head = ("leaf", "shape", "dtype", "verdict", "error", "sees", "order", "what was found")
    named = ("intermediate", "shape", "verdict", "error", "agrees", "claimed", "expected", "worst at", "cause")
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    parts = [
        table("Leaves", head, leaves, LEAVES_NOTE),
        table("Intermediates", named, intermediates, "In the order of the backward pass."),
        table("Precision ladder", ("leaf", *dtypes), ladder, "The error of the claimed gradient (of autodiff)."),
        table("Cost of one gradient", ("gradient", "flops", "bytes moved", "peak bytes", "median time"), costs),
        f"<h2>Notes</h2><ul>{notes}</ul>" if notes else "",
        table("Settings", ("setting", "value"), list(report.settings.items())),
    ]
    return f'<div class="fnet-audit"><style>{STYLE}</style>{summary(report)}{"".join(parts)}</div>'


def audit_page(report: Report) -> str:
    """One HTML page with the verdict, the picture and the tables; it needs no other file and no network."""
    picture = BytesIO()
    draw(report).savefig(picture, format="png", dpi=120, metadata={"Software": None})
    data = base64.b64encode(picture.getvalue()).decode("ascii")
    verdict = overall(report)
    title = f"Gradient audit: {verdict}" + (f" at {report.first_wrong}" if report.first_wrong else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}</style></head>\n"
        f"<body><main><h1>Gradient audit {pill(verdict, verdict)}</h1>\n{audit_tables(report)}\n"
        "<h2>Pictures</h2><figure>"
        f'<img alt="Errors of each leaf, Taylor remainders, precision ladder" src="data:image/png;base64,{data}">'
        "</figure></main></body></html>\n"
    )


# ---- the picture


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


# ---- words that pictures and pages share


def overall(report: Report) -> str:
    """``ok``, ``wrong`` or ``unverified``."""
    if report.ok:
        return "ok"
    return "wrong" if any(x.verdict == "wrong" for x in (*report.leaves, *report.intermediates)) else "unverified"


def headline(report: Report) -> str:
    """The verdict in one line, with the counts."""
    counted = Counter(leaf.verdict for leaf in report.leaves)
    counts = ", ".join(f"{counted[verdict]} {verdict}" for verdict in WORST_FIRST if counted[verdict])
    first = f", first at {shorten_path(report.first_wrong, 60)}" if report.first_wrong else ""
    wrong = sum(i.verdict != "ok" for i in report.intermediates)
    counts += f"; {len(report.intermediates)} intermediates: {wrong} wrong" if wrong else ""
    return f"gradient audit: {overall(report)}{first} ({count(report)}{': ' + counts if counts else ''})"


def count(report: Report) -> str:
    """``1 leaf``, ``6 leaves``."""
    return f"{len(report.leaves)} {'leaf' if len(report.leaves) == 1 else 'leaves'}"


def worst(leaves: Sequence[LeafCheck], most: int) -> list[LeafCheck]:
    """The worst ``most`` leaves, by verdict and then by error, in the order given."""

    def badness(i):
        leaf = leaves[i]
        rank = WORST_FIRST.index(leaf.verdict) if leaf.verdict in WORST_FIRST else 0
        return rank, -leaf.relative if math.isfinite(leaf.relative) else -math.inf

    return [leaves[i] for i in sorted(sorted(range(len(leaves)), key=badness)[:most])]


def drawable(leaf: LeafCheck) -> bool:
    """Whether the leaf has errors to draw."""
    return leaf.errors is not None and np.size(leaf.errors) > 0


def finite_positive(value: float) -> bool:
    """Whether a logarithmic axis can show it."""
    return math.isfinite(value) and value > 0


def as_text(words: str) -> str:
    """What matplotlib draws as it stands: a dollar sign begins no formula."""
    return words.replace("$", r"\$")


def shorten(words: str, most: int) -> str:
    """At most so many characters."""
    return words if len(words) <= most else words[: most - 1] + "…"


def shorten_path(path: str, most: int) -> str:
    """At most so many characters: the first names of a path and the last, ``decoder/block_3/…/w``."""
    names = path.split("/")
    for k in range(len(names) - 2, 0, -1):
        if len(path) > most:
            path = "/".join([*names[:k], "…", names[-1]])
    return shorten(path, most)


def shape_text(shape: Sequence[int]) -> str:
    """``20 × 32``."""
    return " × ".join(map(str, shape)) or "scalar"


# ---- HTML


class Html(str):
    """Text that is HTML already; everything else that enters a table is escaped."""


def cell(value) -> str:
    """A value as HTML."""
    return value if isinstance(value, Html) else escape(str(value))


def code(words: str) -> Html:
    """A name as the user wrote it."""
    return Html(f"<code>{escape(words)}</code>")


def pill(words: str, verdict: str) -> Html:
    """A verdict in its colour, which stands on dark and on light ground."""
    return Html(
        f'<span class="pill" style="background:{COLOURS.get(verdict, "#555")};color:#fff">{escape(words)}</span>'
    )


def table(title: str, head: Sequence[str], rows: Sequence[Sequence], note: str = "") -> str:
    """A titled table, nothing where there are no rows; on narrow screens each row becomes a card with its labels."""
    if not rows:
        return ""
    names = "".join(f'<th scope="col">{cell(name)}</th>' for name in head)
    lines = (
        "".join(f'<td data-label="{cell(name)}">{cell(value)}</td>' for name, value in zip(head, row, strict=True))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    note = f'<p class="note">{cell(note)}</p>' if note else ""
    return (
        f'<h2>{cell(title)}</h2>{note}<div class="scroll"><table><thead><tr>{names}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def summary(report: Report) -> str:
    """The verdict, the counts and the first fault."""
    counted = Counter(leaf.verdict for leaf in report.leaves)
    counts = " ".join(pill(f"{counted[v]} {v}", v) for v in WORST_FIRST if counted[v])
    wrong = sum(i.verdict != "ok" for i in report.intermediates)
    if report.intermediates:
        words = f"{len(report.intermediates)} intermediates"
        counts += f" · {words} {pill(f'{wrong} wrong', 'wrong') if wrong else pill('all ok', 'ok')}"
    verdict = {
        "ok": "The gradient is right.",
        "wrong": "The gradient is wrong.",
        "unverified": "The gradient is not verified.",
    }
    first = f" First on the backward pass: {code(report.first_wrong)}." if report.first_wrong else ""
    return f"<p><strong>{verdict[overall(report)]}</strong>{first}</p><p>{count(report)}: {counts}</p>"


def found(leaf: LeafCheck) -> Html:
    """The cause of a verdict, the worst entry of a wrong leaf, and the evidence."""
    known = not (math.isnan(leaf.claimed) and math.isnan(leaf.expected))
    at = (
        f"at {list(leaf.worst)}: {leaf.claimed:.6g}, expected {leaf.expected:.6g}"
        if leaf.verdict == "wrong" and known
        else ""
    )
    return Html("<br>".join(escape(words) for words in (leaf.cause, at) if words) + details(leaf))


def details(leaf: LeafCheck) -> str:
    """The worst entry and the evidence of one leaf, folded."""
    lines = []
    if not (math.isnan(leaf.claimed) and math.isnan(leaf.expected)):
        lines.append(
            f"worst at {list(leaf.worst)}: claimed {leaf.claimed!r}, expected {leaf.expected!r}; "
            f"absolute error {leaf.absolute:.3e}, {leaf.ulps:.3g} units in the last place"
        )
    lines += leaf.evidence
    if leaf.taylor:
        lines.append("Taylor remainders: " + ", ".join(f"{r:.1e} at t = {t:.1e}" for t, r in leaf.taylor))
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>evidence</summary><ul>{items}</ul></details>" if items else ""


# Colours of text and ground are the host's own, so that a light and a dark notebook are both served.
STYLE = """
.fnet-audit { font: 14px/1.5 system-ui, sans-serif; }
.fnet-audit h2 { font-size: 1.1em; margin: 1.4em 0 .3em; }
.fnet-audit .note { margin: 0 0 .4em; opacity: .75; max-width: 60em; }
.fnet-audit .scroll { overflow-x: auto; }
.fnet-audit table { table-layout: auto; border-collapse: collapse; margin: 0; font-size: 1em;
  font-variant-numeric: tabular-nums; }
.fnet-audit table th, .fnet-audit table td { padding: .35em .8em .35em 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid rgba(128, 128, 128, .35); white-space: nowrap; }
.fnet-audit table td:last-child { white-space: normal; min-width: 16em; overflow-wrap: anywhere; }
.fnet-audit code { font-family: ui-monospace, monospace; background: none; color: inherit; overflow-wrap: anywhere; }
.fnet-audit .pill { display: inline-block; padding: 0 .6em; border-radius: 1em; font-weight: 600; }
.fnet-audit summary { cursor: pointer; opacity: .75; }
.fnet-audit ul { margin: .2em 0; padding-left: 1.3em; }
@media (max-width: 44em) {
  .fnet-audit thead { display: none; }
  .fnet-audit table, .fnet-audit tbody, .fnet-audit tr { display: block; }
  .fnet-audit tr { padding: .5em 0; border-bottom: 1px solid rgba(128, 128, 128, .5); }
  .fnet-audit table td { display: flex; gap: .8em; padding: .1em 0; border: 0; white-space: normal; min-width: 0; }
  .fnet-audit table td:last-child { display: block; min-width: 0; }
  .fnet-audit table td:empty { display: none; }
  .fnet-audit td::before { content: attr(data-label); flex: 0 0 6em; opacity: .65; }
  .fnet-audit td:last-child::before { display: block; }
}
"""

PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; background: Canvas; color: CanvasText; font: 14px/1.5 system-ui, sans-serif; }
main { max-width: 84em; margin: 0 auto; padding: 1em 1.2em 3em; }
h1 { font-size: 1.5em; }
h1 .pill { padding: 0 .6em; border-radius: 1em; }
h2 { font-size: 1.1em; }
figure { margin: 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
"""
