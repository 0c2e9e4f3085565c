"""`write_explorer`: a recorded pass as one page that runs it again, explains every number and follows every change.

    recording ──▶ programs as JSON ──▶ explorer_page/: engine (evaluates, explains), state, graph, tiles, page ──▶ HTML

The page needs no other file and no network, and its policy lets nothing else run. lit-html draws it
(explorer_page/LICENSE-lit-html).
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fnet.core.checks import require
from fnet.core.trees import named_leaves
from fnet.gradcheck.recording import Recording
from fnet.report.explorer_program import encode, program_json, shown
from fnet.report.html import GENERATOR, save_page
from fnet.types import PyTree

HERE = Path(__file__).parent / "explorer_page"
SCRIPTS = ("engine.js", "state.js", "words.js", "graph.js", "tiles.js", "page.js")
MOST_BYTES = 3 * 2**20


def write_explorer(
    recording: Recording,
    path: str | Path,
    *,
    title: str = "One pass, forward and backward",
    note: str = "",
    labels: Mapping[str, Any] | None = None,
    images: Mapping[str, tuple[int, int]] | None = None,
    training: Iterable[tuple[int, PyTree]] | None = None,
    rate: float | None = None,
    kept: Sequence[str] = (),
    plane: tuple[float, float] | None = None,
    middle: float = 0.0,
) -> Path:
    """Write a page of `fnet.record`'s pass, that a browser opens by itself; returns its path.

    - ``labels``: what people call entries, by the names that `fnet.gradcheck.Recording` lists: ``{"input": [["i₁",
      "i₂"]], "loss": "E"}``; nested lists in the shape of the value, the last of a list standing for all that follow
    - ``images``: values of so many numbers that are pictures, ``{"input": (28, 28)}``
    - ``training``: steps and parameters, among them the recorded ones, that a slider goes through
    - ``rate``: of gradient descent, for the column ``w − rate · ∂`` and the button that takes the step; ``kept`` are
      leaves that stay as they are
    - ``plane``: from where to where both inputs of a network of two go in the picture of its outputs; ``middle`` is
      the output between the two classes

    Raises ValueError where the page would have more than 3 MiB, for names that the recording does not have, and where
    the recorded parameters are none of the training's; FileExistsError for a file that is no page of fnet's.

    >>> import fnet, jax, tempfile
    >>> batch = fnet.Batch(jax.numpy.ones((1, 2)), jax.numpy.ones((1, 1)))
    >>> model = fnet.mlp(2, 1)
    >>> params, state = fnet.init(model, jax.random.key(0), batch.inputs)
    >>> passes = fnet.record(model, fnet.losses.squared_error, batch, params=params, state=state)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_explorer(passes, folder + "/explorer.html").name
    'explorer.html'
    """
    main = recording.by_hand or recording.autodiff
    names = {*main.given, *main.marks, *main.outputs, "loss"}
    for what, given in (("labels", labels), ("images", images)):
        for name in given or {}:
            require(
                name in names,
                f"write_explorer: {what} for {name!r}, which the recording does not have; there are "
                f"{', '.join(sorted(names))}",
            )
    made = scene(recording, title, note, labels, images, training, rate, kept, plane, middle)
    page = page_of(made).encode(errors="replace")
    if len(page) > MOST_BYTES:
        raise ValueError(
            f"write_explorer: the page of {recording} would have {len(page) / 2**20:.1f} MiB; expected at most "
            f"{MOST_BYTES // 2**20}: record fewer examples or steps, a smaller model, or give a shorter training"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_page(path, page)


def scene(recording: Recording, title, note, labels, images, training, rate, kept, plane, middle) -> dict[str, Any]:
    """All that the page holds, as JSON."""
    programs = {"hand": recording.by_hand, "auto": recording.autodiff}
    main = recording.by_hand or recording.autodiff
    first = main.value("input") if "input" in main.given else None
    return {
        "title": title,
        "note": note,
        "labels": dict(labels or {}),
        "images": {name: list(shape) for name, shape in (images or {}).items()},
        "rate": rate,
        "kept": list(kept),
        "plane": None if plane is None else list(plane),
        "middle": middle,
        "examples": 0 if first is None or not first.ndim else len(first),
        "nodes": [
            {"name": node.name, "kind": node.kind, "parameters": list(node.parameters)} for node in recording.nodes
        ],
        "title_of_model": next((node.kind for node in recording.nodes if not node.name), "model"),
        "backward": list(recording.backward),
        "given": {name: encode(main.values[number]) for name, number in main.given.items()},
        "programs": {name: program_json(p) for name, p in programs.items() if p is not None},
        "code": code_of(
            {line for p in programs.values() if p is not None for eqn in p.equations for line in eqn.lines}
        ),
        "training": None if training is None else snapshots(training, main),
        "first_wrong": recording.first_wrong,
    }


def snapshots(training: Iterable[tuple[int, PyTree]], main) -> dict[str, Any]:
    """The parameters at steps of a training, and where among them the recorded ones are."""
    paths = [name for name in main.given if name == "param" or name.startswith("param/")]
    steps, rows = [], []
    for step, params in training:
        leaves = {f"param/{name}" if name else "param": np.asarray(leaf) for name, leaf in named_leaves(params)}
        shapes = {name: leaf.shape for name, leaf in leaves.items()}
        expected = {name: main.value(name).shape for name in paths}
        require(
            shapes == expected, f"write_explorer: training step {step} has parameters {shapes}; expected {expected}"
        )
        steps.append(int(step))
        rows.append(np.concatenate([leaves[name].ravel().astype(np.float64) for name in paths]))
    recorded = np.concatenate([main.value(name).ravel() for name in paths])
    at = next((k for k, row in enumerate(rows) if np.array_equal(row, recorded)), None)
    if at is None:
        raise ValueError(
            "write_explorer: the recorded parameters are none of the training's; expected the pass of one of its steps"
        )
    others = np.stack(rows[:at] + rows[at + 1 :]) if len(rows) > 1 else np.zeros((0, len(recorded)))
    return {"steps": steps, "paths": paths, "params": encode(others), "at": at}


@cache
def functions_of(file: str) -> tuple[tuple[int, int, str], ...]:
    """First line, last line and name of each function of a file, those that stand in others last."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ()
    found = [
        (node.lineno, node.end_lineno or node.lineno, getattr(node, "name", "lambda"))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return tuple(sorted(found, key=lambda f: (f[0], -f[1])))


def code_of(lines: set[tuple[str, int]]) -> list[dict[str, Any]]:
    """The functions in which these lines stand."""
    found = {}
    for file, line in lines:
        within = [function for function in functions_of(file) if function[0] <= line <= function[1]]
        if within:
            found[file, within[-1]] = None
    code = []
    for file, (first, end, name) in sorted(found):
        text = Path(file).read_text(encoding="utf-8").splitlines()[first - 1 : end]
        indent = min((len(row) - len(row.lstrip()) for row in text if row.strip()), default=0)
        code.append({"file": shown(file), "first": first, "name": name, "lines": [row[indent:] for row in text]})
    return code


def page_of(scene: Mapping[str, Any]) -> str:
    """The page: its data, and a script whose hash is all that its policy lets run."""
    # an end of the script within a label is no end of the data
    data = json.dumps(scene, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    code = script()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(str(scene['title']))}</title><style>{style}</style></head>\n"
        '<body><div id="app"><noscript>This page computes: it needs JavaScript.</noscript></div>\n'
        f'<script type="application/json" id="data">{data}</script>\n'
        f'<script type="module">{code}</script></body></html>\n'
    )


@cache
def script() -> str:
    """All scripts as one module, lit-html's exports as names of it."""
    lit, exports = (HERE / "lit-html.js").read_text(encoding="utf-8").split("export{")
    pairs = (entry.split(" as ") for entry in exports.split("}")[0].split(","))
    names = ", ".join(f"{public}: {inner}" for inner, public in pairs if public in ("html", "svg", "render", "nothing"))
    head = f"const {{html, svg, render, nothing}} = (() => {{{lit}return {{{names}}}}})();\n"
    lines = [line for name in SCRIPTS for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    # comments and indentation stay here
    code = head + "\n".join(line.lstrip() for line in lines if not line.lstrip().startswith("//"))
    require("</script" not in code, "a script of the page ends itself")
    return code
