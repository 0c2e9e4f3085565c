"""Every benchmark, one after another; each writes its tables to benchmarks/results/<its name>.json as well.

    make bench-all
    make bench-all ARGS="--only imports models"

One that fails does not keep the others from running: it is named at the end, and the exit status is 1. At the end
benchmarks/results/README.md and the ratios in the README are written of all documents that are there. The machine is
to be idle: on two cores all of it takes half an hour.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- ratios: written by make bench-all -->\n", "<!-- end of ratios -->\n"
IN_SHORT = (  # what the README shows: words, and where the ratio stands: document, table, row, and relative to what
    ("training 784-128-64-10, by hand", "s1", "the training alone, after warm-up", "fnet backprop", "torch"),
    ("the same from a process' start to its end", "s1", "the whole process", "fnet backprop", "torch"),
    ("a training step of ResNet-8, by hand", "models", "resnet8: a training step", "fnet backprop", "torch"),
    ("a training step of an LSTM, by hand", "models", "lstm: a training step", "fnet backprop", "torch"),
    ("a training step of a GPT, by hand", "models", "gpt: a training step", "fnet backprop", "torch"),
    ("a training step of LeNet-5: by hand", "models", "lenet: a training step", "fnet backprop", "fnet autodiff"),
)
BENCHMARKS: dict[str, list[str]] = {  # and what they are given
    "imports": [],
    "cold": [],
    "compile": [],
    "s1": [],
    "models": [],
    "optimizers": [],
    "population": [],
    "driver": [],
    "checkpoints": [],
    "decoding": [],
    "per_example": [],
    "sharding": [],
    "audit_cost": ["--factors", "1", "4"],
    "gradient_checkers": ["--every", "24"],
}


def page(documents: Iterable[dict]) -> str:
    """The tables of all documents in Markdown."""
    lines = [
        "# What the benchmarks measured",
        "",
        "Made by `make bench-all` of the documents beside it: medians of rounds with the least and the most. A ratio",
        "(×) is taken in each round, between neighbours in time: its median is not the ratio of the medians.",
    ]
    for document in documents:
        machine, versions = document["machine"], ", ".join(map(" ".join, document["versions"].items()))
        source = Path(__file__).with_name(f"{document['benchmark']}.py").read_text(encoding="utf-8")
        said = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
        lines += ["", f"## {document['benchmark']}", "", said, "", f"`{document['command']}`, {document['date']}"]
        lines += [f"on {machine['cores']} cores of {machine['processor']}; {versions}"]
        for table in document["tables"]:
            several = table["rounds"] > 1
            parts = ["median", "least", "most"] if several else ["median"]
            bases = list(table["rows"][0]["ratios"])
            heads = [table["unit"], *parts[1:], *(f"× {base}" for base in bases)]
            lines += ["", f"### {table['title']}{', {} rounds'.format(table['rounds']) if several else ''}", ""]
            lines += [_row(["", *heads]), _row(["---", *["---:"] * len(heads)])]
            for row in table["rows"]:
                ratios = [_ratio(row["ratios"][base], several) for base in bases]
                lines.append(_row([row["name"], *(_number(row[part]) for part in parts), *ratios]))
    return "\n".join(lines) + "\n"


def in_short(documents: Iterable[dict]) -> str:
    """The README's table: the ratios of `IN_SHORT`, of what was measured."""
    by_name = {document["benchmark"]: document for document in documents}
    lines = [_row(["time", "relative to", "median (least–most)"]), _row(["---", "---", "---"])]
    for words, name, title, row, base in IN_SHORT:
        tables = {table["title"]: table for table in by_name.get(name, {"tables": []})["tables"]}
        for found in (each for each in tables.get(title, {"rows": []})["rows"] if each["name"] == row):
            shown = {"torch": "PyTorch, eager, fused Adam", "fnet autodiff": "fnet by autodiff"}[base]
            lines.append(_row([words, shown, _ratio(found["ratios"][base], several=True)]))
    return "\n".join(lines) + "\n"


def with_ratios(text: str, documents: Iterable[dict]) -> str:
    """The README's text with `in_short` between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + in_short(documents) + END + rest.split(END)[1]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"


def _ratio(ratio: dict[str, float], several: bool) -> str:
    return f"{ratio['median']:.2f}" + (f" ({ratio['least']:.2f}–{ratio['most']:.2f})" if several else "")


def documents_in(folder: Path) -> list[dict]:
    """Those of the benchmarks, in the order in which they run."""
    paths = [folder / f"{name}.json" for name in BENCHMARKS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description="All benchmarks, each with its document in benchmarks/results")
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+", default=list(BENCHMARKS), help="these")
    seconds, failed = {}, []
    for name in parser.parse_args().only:
        print(f"--- {name}", flush=True)
        begin = time.perf_counter()
        given = ["--json", str(RESULTS / f"{name}.json"), *BENCHMARKS[name]]
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *given], check=False).returncode:
            failed.append(name)
        seconds[name] = time.perf_counter() - begin
    if documents := documents_in(RESULTS):
        (RESULTS / "README.md").write_text(page(documents), encoding="utf-8")
        README.write_text(with_ratios(README.read_text(encoding="utf-8"), documents), encoding="utf-8")
    for name, took in {**seconds, "all": sum(seconds.values())}.items():
        print(f"{name:18}{took:7.0f} s{'  failed' if name in failed else ''}")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
