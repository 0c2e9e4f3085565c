"""What is added to a run's folder for its page, and what is read of one, as far as it can be.

A run may still be going or have been killed: what is missing is noted, and shown.

Legend: N examples, K classes, H x W pixels.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fnet.core.files import whole_file
from fnet.data.arrays import as_batch
from fnet.report.audit_words import shorten
from fnet.report.html import as_number
from fnet.report.panels import Series, natural
from fnet.runs.checkpoint import saved_steps
from fnet.runs.run import RunError

if TYPE_CHECKING:
    from fnet.gradcheck.report import Report

GREATEST = re.compile(r"(^|_)(accuracy|top_?\d+|precision|recall|f1|auc|r2|bleu|score)(_|$)")  # the greater the better
LEAST = re.compile(r"(^|_)(loss|error|entropy|perplexity|mae|mse|rmse|nll)(_|$)")
DEEPEST = 100  # a JSON file may be nested


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
    of: str | None = None,
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
        of: what the examples are, as "the test set"; the page says it.

    The file holds ``confusion`` (K, K) by [target, prediction] and, a row for each of the worst examples, ``index`` in
    the data, ``target``, ``prediction`` (-1 where a logit is NaN), ``loss`` and ``pictures``, as bytes from the least
    to the greatest number in all inputs. An evaluation that is there already is replaced. Raises RunError where the
    folder is not a run's, ValueError where the arguments do not fit.
    """
    folder, batch = _run_folder(folder), as_batch(batch, "batch")
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
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if wrong.size:
        raise ValueError(
            f"save_evaluation: the weight of example {wrong[0]} is {weights[wrong[0]]:g}; expected a finite number of "
            "at least 0: 0 leaves the example out"
        )
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
    if of is not None:
        arrays["of"] = np.asarray(of)
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
    shape = inputs.shape[1:] if images is None else images
    drawn = isinstance(shape, tuple | list) and (len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3, 4)))
    if images is None and not drawn:
        return None
    sized = drawn and all(isinstance(size, int | np.integer) and size > 0 for size in shape)
    if not sized or len(inputs) != n or math.prod(shape) != math.prod(inputs.shape[1:]):
        raise ValueError(
            f"save_evaluation: images = {shape}, and inputs have shape {inputs.shape}; expected {n} of as many "
            "numbers as (H, W), (H, W, 3) or (H, W, 4) has: name that shape, or () for no pictures"
        )
    if not jnp.isdtype(inputs.dtype, ("bool", "integral", "real floating")):
        raise ValueError(
            f"save_evaluation: inputs of shape {inputs.shape} are {inputs.dtype}; expected real numbers for pictures "
            f"of {tuple(shape)}: give those, or images=() for no pictures"
        )
    shape = shape[:2] if tuple(shape[2:]) == (1,) else shape
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
    trained: dict[str, Series]  # training metrics at the ends of epochs, by step
    evaluated: dict[str, Series]  # the evaluations' results, by step
    last: int | None  # the last step of both
    per_epoch: float | None  # steps
    written: float  # when metrics.jsonl was written last, in seconds since 1970
    summary: dict[str, Any]
    nonfinite: dict[str, Any]
    audit: dict[str, Any]
    evaluation: dict[str, np.ndarray]
    checkpoints: list[int]  # the steps that are saved
    notes: list[str]


def read_run(folder: str | Path) -> Reading:
    """What the folder of a run holds; RunError where it is not a run's."""
    folder, notes = _run_folder(folder), []
    files = {
        name: read_json(folder / f"{name}.json", notes) for name in ("config", "environment", "summary", "nonfinite")
    }
    rows, odd = _rows(folder / "metrics.jsonl", notes), []
    epochs = [row for row in rows if row.get("kind", "epoch") == "epoch"]
    evaluations = [row for row in rows if row.get("kind") == "evaluation"]
    trained, evaluated = columns(epochs, odd), columns(evaluations, odd)
    if odd:
        what = "left out, as no number or not of the shape of the metric's others"
        notes.append(f"metrics.jsonl: {what}: {_some(list(dict.fromkeys(odd)))}.")
    lengths = (row["step"] / number for row in epochs if 0 < (number := as_number(row.get("epoch"))) < math.inf)
    evaluation = {}
    if (folder / "evaluation.npz").is_file():
        try:
            with (folder / "evaluation.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
                evaluation = {name: stored[name] for name in stored.files}
            _check_evaluation(evaluation)
        except Exception as error:  # of numpy, of zipfile, of zlib
            evaluation = {}
            notes.append(f"evaluation.npz cannot be read ({type(error).__name__}); it is left out.")
    return Reading(
        folder,
        **files,
        audit=read_json(folder / "audit.json", notes),
        trained={name: series for name, series in trained.items() if name not in evaluated},
        evaluated=evaluated,
        last=max((row["step"] for row in (*epochs, *evaluations)), default=None),
        per_epoch=next(lengths, None),
        written=(folder / "metrics.jsonl").stat().st_mtime,
        evaluation=evaluation,
        checkpoints=list(saved_steps(folder / "checkpoints")),
        notes=notes,
    )


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of the metrics, and a note on the lines that are none."""
    text, rows, bad = path.read_text(encoding="utf-8", errors="replace"), [], []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = _loads(line)
        except ValueError:
            if number == len(lines) and not text.endswith("\n"):
                notes.append(
                    "metrics.jsonl: the last line is cut off, as it is where a run is killed or still writing; it is "
                    "left out."
                )
            else:
                bad.append(number)
            continue
        try:
            if not 0 <= row["step"] == int(row["step"]) < 2**53:
                raise ValueError
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            bad.append(number)
    if bad:
        others = f", nor are {len(bad) - 1} others" if bad[1:] else ""
        notes.append(f"metrics.jsonl: line {bad[0]} of {len(lines)} is no row of metrics{others}; left out.")
    return rows


def _check_evaluation(stored: Mapping[str, np.ndarray]) -> None:
    """Raise an error unless it is what `save_evaluation` writes."""
    confusion, count = stored["confusion"], len(stored["index"])
    classes, pictures = len(confusion), stored.get("pictures", np.zeros((count, 1, 1), np.uint8))
    columns = [stored[name] for name in ("index", "target", "prediction", "loss")]
    if not (
        all(array.dtype.kind in "iuf" for array in (confusion, stored["loss"]))
        and all(np.issubdtype(column.dtype, np.integer) for column in columns[:3])
        and confusion.shape == (classes, classes)
        and len(stored.get("names", confusion)) == classes
        and all(column.shape == (count,) for column in columns)
        and all(np.all((column >= -1) & (column < classes)) for column in columns[1:3])
        and (pictures.dtype, len(pictures)) == (np.uint8, count)
        and (pictures.ndim == 3 or (pictures.ndim == 4 and pictures.shape[-1] in (3, 4)))
        and all(pictures.shape[1:])
        and stored.get("examples", np.zeros(())).shape == () == stored.get("of", np.asarray("")).shape
    ):
        raise ValueError


def _run_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if (missing := _missing(folder)) is None:
        return folder
    expected = "expected the folder of a run, which fit(run=fnet.Run(...)) makes"
    if not folder.is_dir():
        raise RunError(f"{folder} is {'a file' if folder.exists() else 'not there'}; {expected}")
    within = (path.parent for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/config.json")))
    run = next((path for path in within if _missing(path) is None), None)
    held = _some(sorted(path.name for path in folder.iterdir())) or "nothing"
    remedy = f": name one of those within, as {run}" if run else ""
    raise RunError(f"{folder} holds {held}, and no {missing}; {expected}{remedy}")


def _missing(folder: Path) -> str | None:
    """The file that a run's folder has and this one has not; that of an experiment has its own config.json."""
    return next((name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()), None)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """The object in a file, or nothing."""
    if not path.is_file():
        return {}
    try:
        value = _loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError
    except (OSError, ValueError):
        notes.append(f"{path.name} is damaged, no JSON object; it is left out.")
        return {}
    return value


def _loads(text: str) -> Any:
    """What JSON says; ValueError also where it is nested more deeply than what walks through it may be."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError from None
    level, depth = [[value]], 0
    while level := [each for held in level for each in (held.values() if isinstance(held, dict) else held)]:
        level, depth = [held for held in level if isinstance(held, dict | list)], depth + 1
        if depth > DEEPEST:
            raise ValueError
    return value


def columns(rows: Sequence[Mapping[str, Any]], odd: list[str]) -> dict[str, Series]:
    """The steps and the values of each metric in the rows; ``odd`` is told of those without numbers of its shape."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("kind", "step", "epoch")):
        held = [(row["step"], row[name], _shape(row[name])) for row in rows if name in row]
        shapes = Counter(shape for *_, shape in held if shape is not None)
        usual = shapes.most_common(1)[0][0] if shapes else None
        kept = [(step, value) for step, value, shape in held if shape is not None and shape == usual]
        wrong = [(step, value) for step, value, shape in held if shape is None or shape != usual]
        odd += [f"{name} = {shorten(json.dumps(value), 30)} at step {step}" for step, value in wrong]
        if kept:
            found[name] = np.asarray([step for step, _ in kept]), np.asarray([value for _, value in kept], np.float64)
    return found


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of numbers; None where they are none, or of no one shape."""
    try:
        return np.asarray(value, np.float64).shape
    except (ValueError, TypeError, OverflowError):
        return None


def direction(name: str) -> int:
    """1 where greater is better, -1 where less is, 0 where there is no best: by the metric's name."""
    return -1 if LEAST.search(name) else 1 if GREATEST.search(name) else 0  # a top_5_error is an error


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
