"""The table and the pages of `gradient_audit`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from html import escape
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Group
from rich.markup import escape as as_text
from rich.table import Table

from fnet.gradcheck import Report
from fnet.report.audit import PAGE_STYLE, Html, cell, pill, table
from fnet.report.audit_words import COLOURS, WORST_FIRST


def verdict_and_cause(report: Report) -> tuple[str, str]:
    """The worst verdict of a report's leaves, and the cause of the first fault, or else of the first such leaf."""
    verdict = min((leaf.verdict for leaf in report.leaves), key=WORST_FIRST.index)
    alike = [leaf for leaf in report.leaves if leaf.verdict == verdict]
    leaf = next((leaf for leaf in alike if leaf.path == report.first_wrong), alike[0])
    return verdict, f"{leaf.path}: {leaf.cause}" if leaf.cause or verdict == "wrong" else ""


def verdict_table(reports: Mapping[str, Report]) -> Group:
    """A row for each audit, in the terminal; beneath them the causes, which take whole lines."""
    shown, causes = Table("audit", "leaves", "worst error", "verdict", box=SIMPLE), []
    for name, report in reports.items():
        verdict, cause = verdict_and_cause(report)
        error = max(leaf.relative for leaf in report.leaves)
        coloured = f"[bold {COLOURS[verdict]}]{verdict}" if verdict != "ok" else verdict
        shown.add_row(as_text(name), str(len(report.leaves)), f"{error:.1e}", coloured)
        causes += [f"{as_text(name)}: {as_text(cause)}"] if cause else []
    return Group(shown, *causes)


def write_pages(reports: Mapping[str, Report], folder: Path, own: Collection[str]) -> None:
    """``index.html`` in the folder, and beside it a page with pictures for each of the names in ``own``."""
    pages = {name: "".join(c if c.isalnum() or c in "-_" else "_" for c in name) + ".html" for name in own}
    for name, page in pages.items():
        reports[name].to_html(folder / page)
    (folder / "index.html").write_text(index_page(reports, pages), encoding="utf-8")


def index_page(reports: Mapping[str, Report], pages: Mapping[str, str]) -> str:
    """One self-contained page: the table, and beneath it each report, folded. ``pages`` are files of single reports."""
    rows, folded = [], []
    for k, (name, report) in enumerate(reports.items()):
        verdict, cause = verdict_and_cause(report)
        error = max(leaf.relative for leaf in report.leaves)
        link = Html(f'<a href="#audit-{k}">{escape(name)}</a>')
        rows.append((link, len(report.leaves), f"{error:.1e}", pill(verdict, verdict), cause))
        more = f' (<a href="{escape(pages[name])}">with pictures</a>)' if name in pages else ""
        folded.append(
            f'<details id="audit-{k}"{"" if report.ok else " open"}><summary>{cell(name)}: {verdict}{more}</summary>'
            f"{report._repr_html_()}</details>\n"
        )
    overall = "ok" if all(report.ok for report in reports.values()) else "wrong"
    head = ("audit", "leaves", "worst error", "verdict", "cause")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Gradient audit of fnet: {overall}</title><style>{PAGE_STYLE}</style></head>\n"
        f"<body><main><h1>Gradient audit of fnet {pill(overall, overall)}</h1>\n"
        f'<div class="fnet-audit">{table("Layers, losses, models", head, rows)}</div>\n'
        f"<h2>Leaf by leaf</h2>\n{''.join(folded)}</main></body></html>\n"
    )
