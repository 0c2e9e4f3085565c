"""fnet's docstrings as reStructuredText: they are written to be read in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator


def as_rst(lines: list[str]) -> list[str]:
    """The lines with what Sphinx needs besides: a plural behind a name, code that is indented, tables."""
    return list(_tables(list(_indented([re.sub(r"(?<!`)`([\w.]+)`(e?s)\b", r"`\1`\\ \2", line) for line in lines]))))


def _indented(lines: list[str]) -> Iterator[str]:
    """A block that is indented is code or a drawing."""
    inside = False
    for i, line in enumerate(lines):
        indented = line.startswith("    ") and not line.lstrip().startswith((">>>", "- "))
        if indented and not inside and (i == 0 or not lines[i - 1].strip()):
            yield from ("::", "")
        inside = indented or (inside and not line.strip())
        yield line


def _tables(lines: list[str]) -> Iterator[str]:
    """Rows between bars as a list-table."""
    rows: list[list[str]] = []
    for line in [*lines, ""]:
        if line.startswith("|") and line.rstrip().endswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if rows:
            yield from (".. list-table::", "   :header-rows: 1", "")
            for row in (row for row in rows if not all(set(cell) <= {"-", ":"} and cell for cell in row)):
                yield from (f"   {'* -' if k == 0 else '  -'} {cell}" for k, cell in enumerate(row))
            yield ""
            rows = []
        yield line
