"""What the benchmarks share: runs in turn, tables on the screen, and the same numbers as JSON.

    times = interleaved({"fnet": step, "torch": other}, repeats=9)
    tables = [show("a training step", times, ("torch",))]
    record(options.json, "models", tables, also=("torch",))

A document, by ``--json PATH`` of each benchmark, says what was run where, and has a table for each that was printed:

    {"benchmark": "models", "command": "python -m benchmarks.models --only lstm", "date": "2026-11-30",
     "machine": {"processor": "…", "cores": 2}, "versions": {"python": "3.11.7", "jax": "0.10.2", …},
     "tables": [{"title": "…", "unit": "ms", "rounds": 9, "rows": [
         {"name": "fnet", "median": 1.5, "least": 1.4, "most": 2.0,
          "ratios": {"torch": {"median": 0.8, "least": 0.7, "most": 0.9}}}]}]}

A ratio is taken in each round, between neighbours in time; its median is not the ratio of the medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path


def arguments(description: str | None, **options) -> argparse.ArgumentParser:
    """The parser of a benchmark's command, with ``--json``."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, **options)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the tables there too")
    return parser


# --- measuring -------------------------------------------------------------------------------------------------------


def interleaved(runs: Mapping[str, Callable], repeats: int, rest: float = 0.3) -> dict[str, list[float]]:
    """Seconds of every run, all in turn, ``repeats`` times, with a ``rest`` before each."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(rest)  # torch's threads spin on for a while, which the next run would pay for
            seconds[name].append(timed(run))
    return seconds


def timed(run: Callable) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def process(*arguments: str, **environment: str) -> Callable:
    """A function that runs Python with the arguments to its end, and gives what it printed.

    With bytecode kept, as a user's Python keeps it, whatever this process was told.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command, environment = [sys.executable, *arguments], {**kept, **environment}
    return lambda: subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def scaled(times_of: Mapping[str, Sequence[float]], factor: float) -> dict[str, list[float]]:
    """The same in another unit."""
    return {name: [factor * value for value in times] for name, times in times_of.items()}


# --- telling ---------------------------------------------------------------------------------------------------------


def table(title: str, values_of: Mapping[str, Sequence[float]], baselines: Iterable[str] = (), unit="seconds") -> dict:
    """A table as it stands in a document: of each row median and range, and its ratios to the baselines.

    ``values_of`` has as many values of each row, one a round.
    """
    (rounds,) = {len(values) for values in values_of.values()}
    rows = []
    for name, values in values_of.items():
        ratios = {base: [a / b for a, b in zip(values, values_of[base], strict=True)] for base in baselines}
        rows.append({"name": name, **_spread(values), "ratios": {base: _spread(r) for base, r in ratios.items()}})
    return {"title": title, "unit": unit, "rounds": rounds, "rows": rows}


def _spread(values: Sequence[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def show(title: str, values_of: Mapping[str, Sequence[float]], baselines: Sequence[str] = (), unit="seconds") -> dict:
    """`table`, printed."""
    from rich.console import Console
    from rich.table import Table

    made, printed = table(title, values_of, baselines, unit), Table(title=title)
    for column in ("", unit, "least", "most", *(f"× {name}" for name in baselines)):
        printed.add_column(column, justify="left" if not column else "right")
    for row in made["rows"]:
        ratios = [f"{r['median']:.2f} ({r['least']:.2f}-{r['most']:.2f})" for r in row["ratios"].values()]
        printed.add_row(row["name"], *(f"{row[part]:.3f}" for part in ("median", "least", "most")), *ratios)
    Console(width=max(100, Console().width)).print(printed)
    return made


def record(path: Path | None, benchmark: str, tables: Sequence[dict], also: Sequence[str] = ()) -> None:
    """Write the document of a benchmark, unless ``path`` is None; ``also`` are the libraries beside jax and NumPy."""
    if path is None:
        return
    document = {
        "benchmark": benchmark,
        "command": command(benchmark, sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "numpy", *also)},
        },
        "tables": list(tables),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def command(benchmark: str, given: Sequence[str]) -> str:
    """How the benchmark was started, but for where it writes."""
    given = [word for i, word in enumerate(given) if not word.startswith("--json") and given[i - 1 : i] != ["--json"]]
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *given])


def processor() -> str:
    """The processor's name; its kind where the system tells no name (Linux does)."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", about.read_text(), re.M) if about.exists() else None
    return found[1].strip() if found else platform.machine()
