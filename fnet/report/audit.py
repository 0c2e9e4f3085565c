"""The audit's report as one picture (PNG) and as HTML: tables for a notebook, and a page that stands alone.

All that a user named (leaves, operations, files) is text: escaped in HTML, and no mathematics in the picture.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from io import BytesIO

from fnet.gradcheck.report import LeafCheck, Report, show_rung
from fnet.report.audit_picture import draw
from fnet.report.audit_words import COLOURS, WORST_FIRST, count, overall, shape_text

LEAVES_NOTE = (
    "error: the largest, relative to the leaf's largest entry. sees: the smallest fault that would have shown. "
    "order: in which the Taylor remainder vanishes, 2 when right and 1 when wrong."
)


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
        table("Leaves", head, leaves, LEAVES_NOTE, [leaf.verdict for leaf in report.leaves]),
        table(
            "Intermediates",
            named,
            intermediates,
            "In the order of the backward pass.",
            [i.verdict for i in report.intermediates],
        ),
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


def table(
    title: str, head: Sequence[str], rows: Sequence[Sequence], note: str = "", verdicts: Sequence[str] = ()
) -> str:
    """A titled table, nothing where there are no rows; on narrow screens each row becomes a card with its labels.

    There the rows whose ``verdicts`` are wrong come first, and then those that are not verified.
    """
    if not rows:
        return ""
    names = "".join(f'<th scope="col">{cell(name)}</th>' for name in head)
    lines = (
        "".join(f'<td data-label="{cell(name)}">{cell(value)}</td>' for name, value in zip(head, row, strict=True))
        for row in rows
    )
    looks = [f' class="{verdict}"' if verdict in ("wrong", "unverified") else "" for verdict in verdicts]
    body = "".join(f"<tr{look}>{line}</tr>\n" for look, line in zip(looks or [""] * len(rows), lines, strict=True))
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
  .fnet-audit table, .fnet-audit tr { display: block; }
  .fnet-audit tbody { display: flex; flex-direction: column; }
  .fnet-audit tr.wrong { order: -2; }
  .fnet-audit tr.unverified { order: -1; }
  .fnet-audit tr { padding: .5em 0; border-bottom: 1px solid rgba(128, 128, 128, .5); }
  .fnet-audit table td, .fnet-audit table td:last-child { display: flex; gap: .8em; padding: .1em 0; border: 0;
    white-space: normal; min-width: 0; }
  .fnet-audit table td:is([data-label="what was found"], [data-label="cause"]) { display: block; }
  .fnet-audit table td:empty { display: none; }
  .fnet-audit td::before { content: attr(data-label); display: block; flex: 0 0 6em; opacity: .65; }
}
"""

PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; background: Canvas; color: CanvasText; font: 14px/1.5 system-ui, sans-serif; }
main { max-width: 84em; margin: 0 auto; padding: 1em 1.2em 3em; }
h1 { font-size: 1.5em; }
h1 .pill { padding: 0 .6em; border-radius: 1em; }
h2 { font-size: 1.1em; }
figure { margin: 0; overflow-x: auto; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
@media (max-width: 44em) { img { max-width: none; width: 60em; } }
"""
