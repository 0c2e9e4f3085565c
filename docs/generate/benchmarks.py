"""The page of benchmarks: the tables that ``make bench-all`` wrote as JSON; no number of it is typed by hand."""

from __future__ import annotations

from pathlib import Path

from benchmarks.__main__ import RESULTS, documents_in, page
from docs.generate import written


def write(folder: Path) -> None:
    """``index.md``; ValueError where nothing was measured."""
    documents = documents_in(RESULTS)
    if not documents:
        raise ValueError(f"benchmarks: no documents in {RESULTS.relative_to(RESULTS.parents[1])}: run make bench-all")
    written(folder / "index.md", page(documents))
