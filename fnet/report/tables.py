"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fnet.core.extras import need
from fnet.core.trees import named_leaves
from fnet.types import PyTree, Schedule


def difference_table(title: str, pairs: Mapping[str, tuple[PyTree, PyTree]], order: Sequence[str]):
    """A rich table of two gradients' greatest difference: a row for each path in ``order``, a column for each pair.

    Differences are relative to the largest entry of the leaf in the first gradient of the pair.
    """
    need("a table", "rich")
    from rich.table import Table

    table = Table(title=title)
    table.add_column("parameter")
    table.add_column("shape")
    for name in pairs:
        table.add_column(name, justify="right")
    columns = [(dict(named_leaves(first)), dict(named_leaves(second))) for first, second in pairs.values()]
    for path in order:
        cells = []
        for first, second in columns:
            a, b = np.asarray(first[path], np.float64), np.asarray(second[path], np.float64)
            cells.append(f"{np.abs(a - b).max() / (np.abs(a).max() or 1.0):.1e}")
        table.add_row(path, str(columns[0][0][path].shape), *cells)
    return table


def schedule_table(title: str, schedules: Mapping[str, Schedule], counts: Sequence[int]):
    """A rich table of the rates of schedules: a row for each count of updates applied before, a column for each."""
    need("a table", "rich")
    from rich.table import Table

    table = Table(title=title)
    for name in ("count", *schedules):
        table.add_column(name, justify="right")
    for count in counts:
        table.add_row(str(count), *(f"{float(schedule(count)):.6g}" for schedule in schedules.values()))
    return table


def engine_table(title: str, rows: Mapping[str, Mapping[str, str]]):
    """A rich table with a row for each quantity and a column for each engine."""
    need("a table", "rich")
    from rich.table import Table

    engines = list(dict.fromkeys(engine for row in rows.values() for engine in row))
    table = Table(title=title)
    table.add_column("")
    for engine in engines:
        table.add_column(engine, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(row.get(engine, "") for engine in engines))
    return table
