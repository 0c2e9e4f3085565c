"""What is added to a run's folder for its page, and what is read of one, as far as it can be.

A run may still be going or have been killed: what is missing is noted, and shown.

Legend: N examples, K classes, H x W pixels.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fnet.checkpoint import saved_steps
from fnet.files import whole_file
from fnet.report.plots import (
    Series,
    natural,
)
from fnet.runs import RunError
from fnet.types import Batch

if TYPE_CHECKING:
    from fnet.gradcheck.report import Report

GREATEST = re.compile(r"(^|_)(accuracy|top_?\d+|precision|recall|f1|auc|r2|bleu|score)(_|$)")  # the greater the better
LEAST = re.compile(r"(^|_)(loss|error|entropy|perplexity|mae|mse|rmse|nll)(_|$)")


# ---- what is written into the folder


def save_audit(folder: str | Path, report: Report) -> Path:
    """Write what `fnet.check_model` found to folder/audit.json, for the run's page; returns that file.

    RunError where the folder is not a run's. An audit that is there already is replaced.
    """
    path = _run_folder(folder) / "audit.json"
    with whole_file(path) as part:
        part.write_text(report.to_json() + "\n")
    return path


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
    path = folder / "evaluation.npz"
    with whole_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path


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
