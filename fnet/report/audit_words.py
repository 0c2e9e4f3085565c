"""Words and orders that the picture and the page of an audit share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fnet.gradcheck.report import LeafCheck, Report

COLOURS = {"ok": "#2e7d32", "kink": "#1565c0", "imprecise": "#8a5a00", "unverified": "#6a1b9a", "wrong": "#c62828"}
WORST_FIRST = ("wrong", "unverified", "imprecise", "kink", "ok")


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
