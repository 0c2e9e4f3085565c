"""What a history's pictures show where: its metrics as panels of lines.

A metric's name says where it is drawn: ``validation_loss`` in the panel of ``loss``, ``gradient_norm/dense_0`` in that
of ``gradient_norm``, and the entries of a vector, ``name/0`` and so on, in that of the vector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fnet.runs.history import History

COLOURS = ("#1f77b4", "#d9680a", "#2b9a2b", "#d1495b", "#8e6bbf", "#a8705f", "#c957a8", "#0f94a3")  # on white and black
DASHES = ("", "6 3", "2 3", "9 3 2 3")
ROUNDS = ("", "15 3 ", "10 3 ", "4 3 ")  # what is before the dashes, by how often all colours have been used
VECTOR = 12  # entries of a vector that are drawn
Series = tuple[np.ndarray, np.ndarray]  # where (n,), and the values (n, ...)


class Line(NamedTuple):
    """A curve with a name; ``dash`` is SVG's pattern, ``y`` may hold what is not finite, a wide one is translucent."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str = COLOURS[0]
    dash: str = ""
    width: float = 1.8


class Panel(NamedTuple):
    """Curves on common axes."""

    title: str
    x_label: str
    lines: list[Line]


def panels_of(
    trained: Mapping[str, Series], evaluated: Mapping[str, Series], x_label: str, known: Sequence[str] = ()
) -> list[Panel]:
    """Panels by metric, loss and accuracy first: what was measured in training, and on each of the validation sets.

    ``known`` are training metrics that are drawn elsewhere.
    """
    panels: dict[str, list[tuple[str, Series]]] = {name: [] for name in ("loss", "accuracy")}
    sets = _sets([*trained, *known], list(evaluated))
    columns = [(name, "training", series) for name, series in trained.items()]
    for full, series in evaluated.items():
        prefix = next((prefix for prefix in sets if full.startswith(f"{prefix}_")), "")
        columns.append((full.removeprefix(f"{prefix}_"), prefix.replace("_", " ") or full, series))
    for name, source, (x, values) in sorted(columns, key=lambda column: natural(column[0])):
        panel, _, part = name.partition("/")
        named = source if source != "training" or not part else ""
        label = " ".join(word for word in (part, named) if word)
        if values.ndim == 1:
            panels.setdefault(panel, []).append((label, (x, values)))
        elif values.ndim == 2 and values.shape[1] <= VECTOR:
            lines = [(f"{label} {i}", (x, values[:, i])) for i in range(values.shape[1])]
            panels.setdefault(name, []).extend(lines)
    return [Panel(title, x_label, _styled(lines)) for title, lines in panels.items() if lines]


def series_of(history: History) -> list[tuple[dict[str, Series], dict[str, Series], str, Sequence[str]]]:
    """What `panels_of` takes: a run by epoch, and by step the evaluations that are not those of the epochs' ends."""
    results = {name: values for name, values in history.evaluations.items() if name != "step"}
    epochs = {name: (history.epochs["epoch"], values) for name, values in history.epochs.items() if name != "epoch"}
    trained = {name: series for name, series in epochs.items() if name not in results}
    if all(name in epochs and np.array_equal(epochs[name][1], results[name], equal_nan=True) for name in results):
        return [(trained, {name: epochs[name] for name in results}, "epoch", ())]
    by_step = {name: (history.evaluations["step"], values) for name, values in results.items()}
    return [(trained, {}, "epoch", ()), ({}, by_step, "step", list(trained))]


def best_at(history: History, x_label: str) -> float | None:
    """Where an axis marks the evaluation that was best for the rule that has ended the run."""
    step = history.ended and history.ended.best_step
    if step is None or x_label == "step":
        return step
    epochs, steps = history.epochs.get("epoch"), history.evaluations["step"]
    if epochs is None or len(epochs) != len(steps) or step not in steps:
        return None
    return float(epochs[steps == step][0])


def natural(name: str) -> tuple:
    """A key that sorts ``dense_10`` behind ``dense_9``, and ``all`` of several norms first."""
    head, _, tail = name.partition("/")
    words = [word.zfill(20) if word.isdecimal() else word for word in re.split(r"(\d+)", tail)]
    return head, tail not in ("", "all"), words


def drawn(y: np.ndarray) -> np.ndarray:
    """Which values a chart shows: the finite ones, but for such as leave no room for a margin."""
    return np.abs(y) < 1e300


def is_logarithmic(lines: Sequence[Line]) -> bool:
    """Whether all that is drawn is positive, no number as good as 0, and spans more than a factor of 20."""
    values = np.concatenate([line.y[drawn(line.y)] for line in lines])
    return bool(values.size and values.min() > 1e-300 and values.max() > 20 * values.min())


def _sets(trained: Sequence[str], evaluated: Sequence[str]) -> list[str]:
    """The validation sets' names, the longest first: what stands before the loss, or before a training metric.

    Of training metrics the longest that fits: where there is an ``aux_loss``, ``test_aux_loss`` is of the set ``test``.
    """
    metrics = sorted({"loss", *trained}, key=len, reverse=True)
    names = [name for name in evaluated if name.endswith("_loss")] or evaluated
    ends = [(name, next((f"_{metric}" for metric in metrics if name.endswith(f"_{metric}")), "")) for name in names]
    return sorted({name.removesuffix(end) for name, end in ends if end}, key=len, reverse=True)


def _styled(lines: Sequence[tuple[str, Series]]) -> list[Line]:
    """Training is drawn through and each set dashed; of many curves each round of the colours has its dashes."""
    few = len(lines) <= len(DASHES)
    dashes = [DASHES[(i if few else i // len(COLOURS)) % len(DASHES)] for i in range(len(lines))]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(lines))]
    looks = zip(lines, colours, dashes, strict=True)
    return [Line(name, x, y, colour, dash) for (name, (x, y)), colour, dash in looks]


def whole(x: float) -> str:
    """A step or an epoch: all digits of a whole number."""
    return f"{x:.0f}" if x == round(x) else f"{x:g}"
