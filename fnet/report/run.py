"""A run's folder as one page, and several side by side: HTML that needs no other file, no script and no network.

What the folder holds is read as far as it can be, since a run may still be going or have been killed, and what is
missing is said in the page. All of it is text, whatever it looks like, and escaped.

Legend: N examples, K classes, H x W pixels.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np

from fnet.checkpoint import saved_steps
from fnet.report.audit import Html, cell, code, pill
from fnet.report.plots import (
    COLOURS,
    DASHES,
    Line,
    Panel,
    Series,
    line_chart,
    natural,
    panels_of,
    png,
    series_of,
    swatch,
)
from fnet.runs import RunError
from fnet.types import Batch

if TYPE_CHECKING:
    from fnet.gradcheck.report import Report
    from fnet.history import History

GREATEST = re.compile(r"(^|_)(accuracy|top_?\d+|precision|recall|f1|auc|r2|bleu|score)(_|$)")  # the greater the better
LEAST = re.compile(r"(^|_)(loss|error|entropy|perplexity|mae|mse|rmse|nll)(_|$)")
CLASSES = 30  # whose confusion matrix is shown whole
GENERATOR = '<meta name="generator" content="fnet">'


# ---- what is written into the folder


def save_audit(folder: str | Path, report: Report) -> Path:
    """Write what `fnet.check_model` found to folder/audit.json, for the run's page; returns that file.

    RunError where the folder is not a run's. An audit that is there already is replaced.
    """
    return _replace(_run_folder(folder) / "audit.json", (report.to_json() + "\n").encode())


def save_evaluation(
    folder: str | Path,
    outputs,
    batch,
    *,
    names: Sequence[str] | None = None,
    images: tuple[int, ...] | None = None,
    worst: int = 12,
) -> Path:
    """Write folder/evaluation.npz for the run's page: the confusion matrix and the worst examples; returns that file.

    Args:
        folder: of the run.
        outputs: logits (N, K).
        batch: a `fnet.Batch`, or a pair of inputs and targets; the targets are integers (N,) from 0 to K - 1. Examples
            of weight 0 are left out, and the matrix counts weights.
        names: of the K classes.
        images: the shape of an input as a picture, (H, W), (H, W, 3) or (H, W, 4), e.g. (28, 28) for inputs of 784
            numbers. None takes inputs that have such a shape, or (H, W, 1), and () takes none.
        worst: how many examples are kept, those of the greatest cross entropy.

    The file holds ``confusion`` (K, K) by [target, prediction] and, a row for each of the worst examples, ``index`` in
    the data, ``target``, ``prediction`` (-1 where a logit is NaN), ``loss`` and ``pictures``, as bytes from the least
    to the greatest number in all inputs. An evaluation that is there already is replaced. Raises RunError where the
    folder is not a run's, ValueError where the arguments do not fit.
    """
    folder, batch = _run_folder(folder), Batch(*batch)
    logits, targets = np.asarray(outputs, np.float64), np.asarray(batch.targets)
    if logits.ndim != 2 or not logits.size:
        raise ValueError(f"save_evaluation: outputs have shape {logits.shape}; expected logits (N, K)")
    n, classes = logits.shape
    if targets.shape != (n,) or not np.issubdtype(targets.dtype, np.integer):
        kind = f"{targets.dtype}{targets.shape}"
        raise ValueError(f"save_evaluation: targets are {kind}; expected integers ({n},), one for each row of outputs")
    wrong = np.flatnonzero((targets < 0) | (targets >= classes))
    if wrong.size:
        raise ValueError(
            f"save_evaluation: the target of example {wrong[0]} is {targets[wrong[0]]}; expected 0 to {classes - 1}, "
            f"as outputs have {classes} classes"
        )
    weights = np.ones(n) if batch.weights is None else np.asarray(batch.weights, np.float64)
    if weights.shape != (n,):
        raise ValueError(f"save_evaluation: weights have shape {weights.shape}; expected ({n},), one for each example")
    if names is not None and len(names) != classes:
        raise ValueError(f"save_evaluation: {len(names)} names; expected {classes}, one for each class of the outputs")
    if isinstance(worst, bool) or not isinstance(worst, int) or worst < 0:
        raise ValueError(f"save_evaluation: worst = {worst!r}; expected a whole number of at least 0")
    pictures = _pictures(batch.inputs, n, images)

    known = ~np.isnan(logits).any(1)
    prediction = np.where(known, logits.argmax(1), -1)
    confusion, counted = np.zeros((classes, classes)), known & (weights > 0)
    np.add.at(confusion, (targets[counted], prediction[counted]), weights[counted])
    with np.errstate(invalid="ignore", divide="ignore"):  # infinite logits may give NaN
        shifted = logits - logits.max(1, keepdims=True)
        loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(n), targets]
    badness = np.where(np.isnan(loss), np.inf, loss)
    index = np.argsort(-badness, kind="stable")
    index = index[weights[index] > 0][:worst]
    arrays = {"confusion": confusion, "examples": weights.sum(), "index": index}
    arrays |= {"target": targets[index], "prediction": prediction[index], "loss": loss[index]}
    if names is not None:
        arrays["names"] = np.asarray([str(name) for name in names])
    if pictures is not None:
        arrays["pictures"] = pictures(index)
    part = folder / "evaluation.part.npz"
    np.savez_compressed(part, **arrays)
    os.replace(part, folder / "evaluation.npz")
    return folder / "evaluation.npz"


def _pictures(inputs, n: int, images: tuple[int, ...] | None) -> Callable[[np.ndarray], np.ndarray] | None:
    """What takes rows of the data to pictures of bytes, if the inputs are pictures."""
    if images == () or (images is None and not hasattr(inputs, "shape")):
        return None
    inputs = np.asarray(inputs)
    shape = inputs.shape[1:] if images is None else tuple(images)
    drawn = len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3, 4))
    if images is None and not drawn:
        return None
    if not drawn or len(inputs) != n or math.prod(shape) != math.prod(inputs.shape[1:]):
        raise ValueError(
            f"save_evaluation: images = {shape}, and inputs have shape {inputs.shape}; expected {n} of as many "
            "numbers as (H, W), (H, W, 3) or (H, W, 4) has: name that shape, or () for no pictures"
        )
    shape = shape[:2] if shape[2:] == (1,) else shape
    finite = inputs[np.isfinite(inputs)] if inputs.dtype != np.uint8 else np.asarray([0, 255])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)

    def pictures(rows: np.ndarray) -> np.ndarray:
        values = (inputs[rows].astype(np.float64) - low) / ((high - low) or 1.0)
        return np.nan_to_num(255 * values.clip(0, 1)).round().astype(np.uint8).reshape(len(rows), *shape)

    return pictures


# ---- what the folder holds


class Reading(NamedTuple):
    """What a run's folder holds, as far as it can be read; ``notes`` say what cannot."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    written: float | None  # when metrics.jsonl was written last, in seconds since 1970
    summary: dict[str, Any]
    nonfinite: dict[str, Any]
    audit: dict[str, Any]
    evaluation: dict[str, np.ndarray]
    checkpoints: list[int]  # the steps that are saved
    notes: list[str]

    @property
    def last(self) -> dict[str, Any]:
        """The last row of the metrics."""
        return max((*self.epochs, *self.evaluations), key=lambda row: row["step"], default={})


def read_run(folder: str | Path) -> Reading:
    """What the folder of a run holds; RunError where it is not a run's."""
    folder, notes = _run_folder(folder), []
    files = {name: _json(folder / f"{name}.json", notes) for name in ("config", "environment", "summary", "nonfinite")}
    rows, path = [], folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not 0 <= row["step"] == int(row["step"]) < 2**53:
                raise ValueError
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            last = "the last line is cut off, as it is where a run is killed or still writing"
            what = last if number == len(lines) else f"line {number} of {len(lines)} is no row of metrics"
            notes.append(f"metrics.jsonl: {what}; it is left out.")
    evaluation = {}
    if (folder / "evaluation.npz").is_file():
        try:
            with (folder / "evaluation.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
                evaluation = {name: stored[name] for name in stored.files}
            _check_evaluation(evaluation)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            evaluation = {}
            notes.append(f"evaluation.npz cannot be read ({type(error).__name__}); it is left out.")
    return Reading(
        folder,
        **files,
        audit=_json(folder / "audit.json", notes),
        epochs=[row for row in rows if row.get("kind", "epoch") == "epoch"],
        evaluations=[row for row in rows if row.get("kind") == "evaluation"],
        written=path.stat().st_mtime if path.is_file() else None,
        evaluation=evaluation,
        checkpoints=list(saved_steps(folder / "checkpoints")),
        notes=notes,
    )


def _check_evaluation(stored: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError or KeyError unless it is what `save_evaluation` writes."""
    confusion, count = stored["confusion"], len(stored["index"])
    classes, pictures = len(confusion), stored.get("pictures", np.zeros((count, 1, 1), np.uint8))
    columns = [stored[name] for name in ("index", "target", "prediction", "loss")]
    numeric = all(np.issubdtype(array.dtype, np.number) for array in (confusion, *columns))
    if not (
        numeric
        and confusion.shape == (classes, classes)
        and len(stored.get("names", confusion)) == classes
        and all(column.shape == (count,) for column in columns)
        and all(np.all((column >= -1) & (column < classes)) for column in columns[1:3])
        and (pictures.dtype, len(pictures)) == (np.uint8, count)
        and (pictures.ndim == 3 or (pictures.ndim == 4 and pictures.shape[-1] in (3, 4)))
    ):
        raise ValueError


def _run_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    expected = "expected the folder of a run, which fit(run=fnet.Run(...)) makes"
    if not folder.is_dir():
        raise RunError(f"{folder} is {'a file' if folder.exists() else 'not there'}; {expected}")
    names = sorted(path.name for path in folder.iterdir())
    runs = [name for name in names if (folder / name / "config.json").is_file()]
    held = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "nothing"
    remedy = f": name one of those within, as {folder / runs[0]}" if runs else ""
    raise RunError(f"{folder} holds {held}, and no config.json; {expected}{remedy}")


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    """The object in a file, or nothing."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError
    except (OSError, ValueError):
        notes.append(f"{path.name} is damaged, no JSON object; it is left out.")
        return {}
    return value


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """The steps and the values of each metric in the rows; what is not numbers of one shape is left out."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("kind", "step", "epoch"))
    found = {}
    for name in names:
        held = [row for row in rows if name in row]
        try:
            values = np.asarray([row[name] for row in held], np.float64)
        except (ValueError, TypeError, OverflowError):
            continue
        found[name] = np.asarray([row["step"] for row in held]), values
    return found


def metrics_of(run: Reading) -> tuple[dict[str, Series], dict[str, Series]]:
    """Training metrics by epoch and the evaluations' results, by step."""
    evaluated, trained = columns(run.evaluations), columns(run.epochs)
    return {name: series for name, series in trained.items() if name not in evaluated}, evaluated


def direction(name: str) -> int:
    """1 where greater is better, -1 where less is, 0 where there is no best: by the metric's name."""
    return 1 if GREATEST.search(name) else -1 if LEAST.search(name) else 0


def best(name: str, series: Series) -> tuple[float, float] | None:
    """The best value and where it was; None where there is none."""
    x, values = series
    badness = np.where(np.isfinite(values), -direction(name) * values, np.inf)
    if not direction(name) or not np.isfinite(badness).any():
        return None
    return float(values[badness.argmin()]), float(x[badness.argmin()])


def scalars(metrics: Mapping[str, Series]) -> dict[str, Series]:
    """Those of one number, without the parts of a group; first those that have a best."""
    names = [name for name, (_, values) in metrics.items() if values.ndim == 1 and len(values) and "/" not in name]
    return {name: metrics[name] for name in sorted(names, key=lambda name: (not direction(name), natural(name)))}


# ---- the page of one run


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of a run to folder/report.html, or to the file ``path``, and return that file.

    The page is made of what is in the folder by then: the run may still be going, or have been killed. A page that fnet
    wrote is replaced. RunError where the folder is not a run's, FileExistsError where the file is not a page of fnet's.
    """
    run = read_run(folder)
    trained, evaluated = metrics_of(run)
    panels = panels_of(trained, evaluated, "step")
    norms = [panel for panel in panels if panel.title == "gradient_norm"]
    name = run.folder.absolute().name
    sections = {
        "Curves": charts([panel for panel in panels if panel not in norms])
        or "No epoch and no evaluation was completed.",
        "Gradient norms by layer": charts(norms)
        or "Not measured; make_step(monitors={'gradient_norm': fnet.metrics.gradient_norms}) does.",
        "Numbers": grid(NUMBERS, numbers({**trained, **evaluated}, "step")) or "None.",
        "Confusion matrix": confusion_section(run),
        "Worst examples": worst_section(run),
        "Gradient audit": audit_section(run.audit),
        "Time and memory": pairs(described(run.summary)) or "No summary.json: it is written when a run ends.",
        "Configuration": pairs(flat(run.config)) or "Empty: fnet.Run was given none.",
        "Environment": pairs(flat(run.environment)) or "No environment.json.",
    }
    if run.nonfinite:
        found = pairs(flat(run.nonfinite))
        sections = {"Not finite": f'<p class="alert">The run met a number that is not finite.</p>{found}', **sections}
    return write_page(Path(path) if path else run.folder / "report.html", f"Run {name}", status(run), sections)


def status(run: Reading) -> str:
    """How far the run is, and what could not be read."""
    last, ended = run.last.get("step"), run.summary.get("steps")
    ended = ended if isinstance(ended, int) else last
    reached = "before the first row of metrics" if last is None else f"step {last:,}"
    if run.written is not None and last is not None:
        reached += f", written {_time(run.written)}"
    if not run.summary:
        words = f"Has not ended (no summary.json): still going, stopped or killed. Last seen at {reached}."
    elif ended is None:
        words = "Ended before its first step."
    elif last is not None and last > ended:
        words = f"Continued after it had ended at step {ended:,} (summary.json). Last seen at {reached}."
    else:
        words = f"Ended at step {ended:,}."
    if run.checkpoints:
        words += f" The last checkpoint is of step {run.checkpoints[-1]:,}."
    if run.nonfinite:
        place = f"step {run.nonfinite.get('step')}, {run.nonfinite.get('stage') or 'no stage'}"
        words += f" Not finite at {place}" + (f" of {layer}." if (layer := run.nonfinite.get("layer")) else ".")
    notes = "".join(f'<li class="warning">{escape(note)}</li>' for note in run.notes)
    return f"<p>{escape(words)}</p>" + (f"<ul>{notes}</ul>" if notes else "")


def charts(panels: Sequence[Panel]) -> str:
    """Panels side by side, nothing where there are none."""
    return f'<div class="charts">{"".join(map(line_chart, panels))}</div>' if panels else ""


def numbers(metrics: Mapping[str, Series], x_label: str) -> list[tuple]:
    """Rows of the first, best and last value of each metric of one number, for a table with the head `NUMBERS`."""
    rows = []
    for name, (x, values) in scalars(metrics).items():
        found = best(name, (x, values))
        at = (f"{found[0]:.5g}", f"{x_label} {found[1]:g}") if found else ("", "")
        rows.append((named(name), f"{values[0]:.5g}", *at, f"{values[-1]:.5g}"))
    return rows


NUMBERS = ("metric", "first", "best", "at", "last")


def confusion_section(run: Reading) -> str:
    """The matrix of evaluation.npz, or the shares that an evaluation measured last."""
    kept = run.evaluation
    if kept:
        names = kept.get("names", np.arange(len(kept["confusion"])))
        return confusion_table(kept["confusion"], [str(name) for name in names])
    for name, (x, values) in reversed(columns(run.evaluations).items()):
        if name.endswith("confusion") and values.ndim == 3 and values.shape[1] == values.shape[2]:
            of = f"<p>Shares of all examples: {code(name)} of the evaluation at step {x[-1]:,}.</p>"
            return of + confusion_table(values[-1], [str(i) for i in range(values.shape[1])])
    return "None; fnet.report.save_evaluation(folder, outputs, batch) writes evaluation.npz."


def confusion_table(counts: np.ndarray, names: Sequence[str]) -> str:
    """Counts by true and predicted class with recall and precision; of many classes the most frequent confusions."""
    rows, of_class, predicted = len(counts), counts.sum(1), counts.sum(0)
    right, total = float(np.trace(counts)), float(counts.sum())
    counted = "" if math.isclose(total, 1, rel_tol=1e-4) else f", {right:.6g} of {total:.6g}"  # shares add up to 1
    share = f"<p>Accuracy {right / (total or 1):.4f}{counted}.</p>"
    if rows > CLASSES:
        wrong = np.where(np.eye(rows, dtype=bool), 0, counts)
        order = np.argsort(-wrong, axis=None, kind="stable")[: min(CLASSES, np.count_nonzero(wrong))]
        places = zip(*np.unravel_index(order, counts.shape), strict=True)
        listed = [(names[i], names[j], f"{counts[i, j]:.6g}", _share(counts[i, j], of_class[i])) for i, j in places]
        head = ("true", "predicted", "count", "share of the true class")
        return f"{share}<p>The most frequent confusions of {rows} classes:</p>{grid(head, listed)}"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = ""
    for i, name in enumerate(names):
        cells = ""
        for j, count in enumerate(counts[i]):
            part = min(max(float(count / (of_class[i] or 1)), 0.0), 1.0)
            shade = f' class="{"hit" if i == j else "miss"}" style="--share:{part if i == j else math.sqrt(part):.3f}"'
            title = escape(f"{name} taken for {names[j]}: {_share(count, of_class[i])}", quote=True)
            cells += f'<td{shade} title="{title}">{count:.4g}</td>' if count else "<td></td>"
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}<td>{_share(counts[i, i], of_class[i])}</td></tr>'
    precision = "".join(f"<td>{_share(counts[i, i], predicted[i])}</td>" for i in range(rows))
    return (
        f'{share}<p class="note">Rows are the true classes, columns the predicted ones. Shade: the share of the true '
        f"class, off the diagonal its square root.</p>{scrolled('confusion matrix')}<table class=confusion>"
        f'<thead><tr><th scope="col">true</th>{head}<th scope="col">recall</th></tr></thead>'
        f'<tbody>{body}<tr><th scope="row">precision</th>{precision}<td></td></tr></tbody></table></div>'
    )


def worst_section(run: Reading) -> str:
    """The examples of evaluation.npz of the greatest loss, as pictures if they are."""
    kept = run.evaluation
    if not kept or not len(kept["index"]):
        return "None; fnet.report.save_evaluation(folder, outputs, batch) writes evaluation.npz."
    names = [str(name) for name in kept.get("names", np.arange(len(kept["confusion"])))]
    target, predicted = ([names[i] if i >= 0 else "nothing" for i in kept[name]] for name in ("target", "prediction"))
    loss, index = [f"{value:.4g}" for value in kept["loss"]], kept["index"].tolist()
    rows = list(zip(index, target, predicted, loss, strict=True))
    if "pictures" not in kept:
        return grid(("example", "true", "predicted", "cross entropy"), rows)
    figures = ""
    for picture, (number, true, taken, value) in zip(kept["pictures"], rows, strict=True):
        words = f"true {escape(true)}, predicted {escape(taken)}"
        data = base64.b64encode(png(picture)).decode("ascii")
        figures += (
            f'<li><figure><img alt="example {number}" src="data:image/png;base64,{data}">'
            f"<figcaption><strong>{words}</strong><br>loss {value}, example {number}</figcaption></figure></li>"
        )
    return f'<ol class="pictures">{figures}</ol>'


def audit_section(audit: Mapping[str, Any]) -> str:
    """The verdict of audit.json, and a row for each leaf."""
    if not audit:
        return "None; fnet.report.save_audit(folder, fnet.check_model(...)) writes audit.json."
    leaves = audit.get("leaves")
    leaves = [leaf for leaf in leaves if isinstance(leaf, dict)] if isinstance(leaves, list) else []
    ok = audit.get("ok") is True
    verdict = pill("right" if ok else "wrong or not verified", "ok" if ok else "wrong")
    first = f" First on the backward pass: {code(str(audit['first_wrong']))}." if audit.get("first_wrong") else ""
    rows = [
        (
            named(str(leaf.get("path"))),
            pill(str(leaf.get("verdict")), str(leaf.get("verdict"))),
            _scientific(leaf.get("relative")),
            _scientific(leaf.get("power")),
            "" if leaf.get("order") is None else f"{_number(leaf['order']):.1f}",
            str(leaf.get("cause") or ""),
        )
        for leaf in leaves
    ]
    head = ("leaf", "verdict", "error", "sees", "order", "cause")
    return f"<p>{verdict} {len(leaves)} leaves.{first}</p>{grid(head, rows)}"


UNITS: dict[str, tuple[str, Callable[[Any], str]]] = {  # of summary.json, by what a name ends with
    "_seconds": (" time", lambda v: f"{v:.2f} s" if v < 120 else f"{v // 3600:.0f} h {v % 3600 / 60:.1f} min"),
    "_bytes": (" memory", lambda v: f"{v / 1e6:,.3f} MB"),
    "": ("", lambda v: f"{v:,}" if isinstance(v, int) else f"{v:,.6g}"),
}


def described(summary: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of summary.json in their units, and what follows from them."""
    shown = {}
    for name, value in summary.items():
        if _is_number(value):
            ending = next(ending for ending in UNITS if name.endswith(ending))
            word, written = UNITS[ending]
            shown[name.removesuffix(ending).replace("_", " ") + word] = written(value)
        elif value is not None:
            shown[name.replace("_", " ")] = _value(value)
    seconds, examples = summary.get("run_seconds"), summary.get("examples")
    if _is_number(seconds) and _is_number(examples) and seconds > 0 and examples:
        shown["examples per second"] = f"{examples / seconds:,.{0 if examples > 100 * seconds else 2}f}"
    return shown


# ---- several runs side by side


def write_comparison(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write one page that compares runs to the file ``path``, and return it: curves overlaid, numbers, configurations.

    Where an epoch has another number of steps in each run the curves are drawn by epoch, otherwise by step. Errors are
    those of `write_report`, and ValueError for fewer than two folders.
    """
    if len(folders) < 2:
        raise ValueError(f"write_comparison: {len(folders)} folders; expected at least 2")
    runs = [read_run(folder) for folder in folders]
    names = [run.folder.absolute().name for run in runs]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    legend = "".join(
        f"<li>{swatch(COLOURS[i % len(COLOURS)])} <strong>{escape(name)}</strong>: {status(run)}</li>"
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    )
    sections = {
        "Curves": charts(overlaid(names, runs)) or "No epoch and no evaluation was completed.",
        "Final and best numbers": compared_numbers(names, runs) or "None.",
        "Configurations": compared(names, [flat(run.config) for run in runs]),
        "Time and memory": compared(names, [described(run.summary) for run in runs]),
        "Environments": compared(names, [flat(run.environment) for run in runs]),
    }
    return write_page(Path(path), f"{len(runs)} runs compared", f'<ul class="runs">{legend}</ul>', sections)


def overlaid(names: Sequence[str], runs: Sequence[Reading]) -> list[Panel]:
    """The panels of all runs: a colour a run, dashes for each set; of groups the whole, as the norm of all."""
    lengths = [_steps_per_epoch(run) for run in runs]
    by_epoch = None not in lengths and len(set(lengths)) > 1
    panels: dict[str, list[Line]] = {}
    for i, (name, run, length) in enumerate(zip(names, runs, lengths, strict=True)):
        for panel in panels_of(*metrics_of(run), x_label="step"):
            whole = [line for line in panel.lines if line.name == "all"]
            for j, line in enumerate(whole or panel.lines):
                x = line.x / length if by_epoch and length else line.x
                # the first run is drawn wide beneath the others, so that curves that coincide are both seen
                look = {"colour": COLOURS[i % len(COLOURS)], "dash": DASHES[j % len(DASHES)], "width": 1.8 if i else 5}
                title = f"{panel.title}/all" if whole else panel.title
                panels.setdefault(title, []).append(line._replace(name=f"{name}, {line.name}", x=x, **look))
    return [Panel(title, "epoch" if by_epoch else "step", lines) for title, lines in panels.items()]


def _steps_per_epoch(run: Reading) -> float | None:
    return next(
        (row["step"] / row["epoch"] for row in run.epochs if _is_number(row.get("epoch")) and row["epoch"]), None
    )


def compared_numbers(names: Sequence[str], runs: Sequence[Reading]) -> str:
    """For each metric of one number its final and best value in each run; the best of all runs is marked."""
    metrics = []
    for run in runs:
        trained, evaluated = metrics_of(run)
        metrics.append(scalars({**trained, **evaluated}))
    rows = []
    for name in dict.fromkeys(name for each in metrics for name in each):
        bests = [best(name, each[name]) if name in each else None for each in metrics]
        lasts = [(float(each[name][1][-1]), None) if name in each else None for each in metrics]
        rows.append((named(name), "final", *_marked(name, lasts)))
        if any(bests):
            rows.append(("", "best", *_marked(name, bests)))
    return "<p>★: the best of the runs.</p>" + grid(("metric", "", *names), rows, kind="compared") if rows else ""


def _marked(name: str, values: Sequence[tuple[float, float | None] | None]) -> Iterator[str]:
    """Values and steps of runs as HTML, with a star at the best of several."""
    known = [-direction(name) * pair[0] for pair in values if pair and math.isfinite(pair[0])]
    for pair in values:
        if pair is None:
            yield ""
            continue
        at = "" if pair[1] is None else f" <small>at step {pair[1]:g}</small>"
        first = direction(name) and len(known) > 1 and -direction(name) * pair[0] == min(known)
        yield Html((f"<strong>{pair[0]:.5g} ★</strong>" if first else f"{pair[0]:.5g}") + at)


def compared(names: Sequence[str], settings: Sequence[Mapping[str, str]]) -> str:
    """Settings of runs in columns; those that differ come first and are marked."""
    keys = list(dict.fromkeys(key for each in settings for key in each))
    differing = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    same = [key for key in keys if key not in differing]
    if not keys:
        return "None."
    mark = Html('<span title="differs">≠</span>')
    rows = [(mark if key in differing else "", named(key), *(each.get(key, "—") for each in settings)) for key in keys]
    rows.sort(key=lambda row: row[0] != mark)
    note = f"{len(differing)} of {len(keys)} differ (≠)." if differing else f"All {len(same)} are the same."
    return f"<p>{note}</p>" + grid(("", "", *names), rows, kind="compared", marked=len(differing))


# ---- a history in a notebook


def history_html(history: History) -> str:
    """The HTML fragment of `fnet.History`: a table and the curves, in the colours of the notebook."""
    parts = series_of(history)
    rows = [row for trained, evaluated, x_label in parts for row in numbers({**trained, **evaluated}, x_label)]
    curves = charts([panel for part in parts for panel in panels_of(*part)])
    took = f"<p>Compiled in {history.compile_seconds:.2f} s, run in {history.run_seconds:.2f} s.</p>"
    table = grid(NUMBERS, rows) or "<p>No epoch and no evaluation was completed.</p>"
    return f'<div class="fnet-run"><style>{STYLE}</style>{table}{curves}{took}</div>'


# ---- HTML


def write_page(path: Path, title: str, head: str, sections: Mapping[str, str]) -> Path:
    """Write a page of titled sections; FileExistsError where there is a file that is none."""
    if path.exists() and (path.is_dir() or GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:1000]):
        raise FileExistsError(f"{path} is not a page of fnet's and is left as it is; name another file")
    ids = {name: re.sub(r"\W+", "-", name.lower()) for name in sections}
    links = "".join(f'<li><a href="#{ids[name]}">{escape(name)}</a></li>' for name in sections)
    body = "".join(
        f'<section aria-labelledby="{ids[name]}"><h2 id="{ids[name]}">{escape(name)}</h2>\n'
        + (content if content.startswith("<") else f'<p class="none">{escape(content)}</p>')
        + "</section>\n"
        for name, content in sections.items()
    )
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # nothing may run and nothing may be loaded, whatever the folder holds
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}{STYLE}</style></head>\n"
        f'<body class="fnet-run"><header><h1>{escape(title)}</h1>{head}</header>\n'
        f'<nav aria-label="sections"><ul>{links}</ul></nav>\n<main>\n{body}</main>\n'
        f"<footer><p>Written {escape(_time(time.time()))} by fnet.</p></footer></body></html>\n"
    )
    return _replace(path, page.encode(errors="replace"))


def grid(head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "", marked: int = 0) -> str:
    """A table that scrolls within itself, nothing where there are no rows; the first ``marked`` rows stand out."""
    if not rows:
        return ""
    names = "".join(f'<th scope="col">{cell(name)}</th>' for name in head)
    lines = (
        f"<tr{' class=marked' if i < marked else ''}>{''.join(f'<td>{cell(value)}</td>' for value in row)}</tr>"
        for i, row in enumerate(rows)
    )
    label = " ".join(name for name in head if name) or "settings"
    table = f'<table class="{kind}"><thead><tr>{names}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f"{scrolled(label)}{table}</div>"


def named(name: str) -> Html:
    """A name that may break behind its slashes, or its underscores where it has none."""
    return Html("<code>" + re.sub("(/)" if "/" in name else "(_)", r"\1<wbr>", escape(name)) + "</code>")


def pairs(values: Mapping[str, str]) -> str:
    """Names and values as a list, nothing where there are none."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f"<dl>{items}</dl>" if items else ""


def scrolled(label: str) -> str:
    """The tag of an element that scrolls sideways, also by keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label, quote=True)}">'


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by path, their values as text."""
    shown = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        shown |= flat(value, f"{prefix}{name}/") if nested else {f"{prefix}{name}": _value(value)}
    return shown


def _value(value: Any) -> str:
    return (value or "—") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _scientific(value: Any) -> str:
    return f"{_number(value):.1e}"


def _share(part, whole) -> str:
    return f"{part / whole:.2f}" if whole else ""


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _replace(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
    return path


STYLE = """
.fnet-run { font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.fnet-run .scroll { overflow-x: auto; max-width: 100%; margin-bottom: .8em; }
.fnet-run table { border-collapse: collapse; margin: 0; font-size: 14px; }
.fnet-run th, .fnet-run td { padding: .25em .9em .25em 0; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid rgba(128, 128, 128, .3); background: none; }
.fnet-run th { font-weight: 600; }
.fnet-run td code { white-space: normal; }
.fnet-run code { font: 13px ui-monospace, monospace; background: none; color: inherit; }
.fnet-run .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24em), 1fr));
  gap: 1.2em 1.5em; }
.fnet-run .chart { margin: 0; max-width: 38em; }
.fnet-run .chart > svg { display: block; width: 100%; height: auto; }
.fnet-run .chart figcaption { font-weight: 600; }
.fnet-run .legend { display: flex; flex-wrap: wrap; gap: 0 1em; margin: 0; padding: 0; list-style: none;
  font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 32em) {
  .fnet-run table, .fnet-run td code { font-size: 12.5px; }
  .fnet-run th, .fnet-run td { padding-right: .55em; }
}
"""

PAGE_STYLE = """
:root { color-scheme: light dark; background: light-dark(#fff, #14161a); color: light-dark(#1b1d21, #e6e7ea); }
body { margin: 0; }
header, nav, main, footer { max-width: 88em; margin: 0 auto; padding: 0 1.2em; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34em), 1fr)); column-gap: 3em; }
section { min-width: 0; padding: 1em 0 1.4em; border-top: 1px solid rgba(128, 128, 128, .35); }
section:has(.charts, .pictures, .compared, .alert) { grid-column: 1 / -1; }
section p { margin: .2em 0 .6em; }
h1 { font-size: 1.6em; line-height: 1.2; margin: .8em 0 .3em; overflow-wrap: anywhere; }
h2 { font-size: 1.2em; margin: 0 0 .5em; }
header p, header ul { margin: .3em 0; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .2em 1.2em; margin: .6em 0; padding: 0; list-style: none; }
a { color: light-dark(#0b5cad, #7db8f5); }
footer, .none, .note { opacity: .75; }
.pill { display: inline-block; padding: 0 .6em; border-radius: 1em; font-size: 13px; font-weight: 600; }
.warning { color: light-dark(#8a3b00, #ffb877); }
.runs { padding: 0; list-style: none; }
.runs p { display: inline; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17em), 1fr)); gap: 0 2em; margin: 0; }
dl div { display: flex; justify-content: space-between; gap: 1em; padding: .2em 0;
  border-bottom: 1px solid rgba(128, 128, 128, .3); }
dt { flex: none; max-width: 60%; overflow-wrap: anywhere; opacity: .8; }
dd { margin: 0; min-width: 0; text-align: right; overflow-wrap: anywhere; }
.fnet-run .compared td { white-space: normal; overflow-wrap: anywhere; min-width: 5.5em; max-width: 24em; }
.fnet-run .compared td:nth-child(-n + 2) { min-width: 0; overflow-wrap: normal; }
.fnet-run .compared strong, .fnet-run .compared small { white-space: nowrap; }
.fnet-run .compared small { opacity: .75; }
.fnet-run .marked td { background: color-mix(in srgb, #d9680a 14%, transparent); }
.fnet-run .confusion th, .fnet-run .confusion td { padding: .25em .45em; text-align: right; font-size: 13px; }
.fnet-run .confusion tbody th { text-align: left; padding-left: 0; }
.fnet-run .confusion .hit { background: color-mix(in srgb, #1f77b4 calc(var(--share) * 65%), transparent); }
.fnet-run .confusion .miss { background: color-mix(in srgb, #d9680a calc(var(--share) * 90%), transparent); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.4em, 1fr)); gap: 1em;
  margin: 0; padding: 0; list-style: none; }
.pictures figure { margin: 0; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.pictures img { display: block; width: 100%; max-width: 12em; image-rendering: pixelated; border-radius: 4px;
  margin-bottom: .3em; }
"""
