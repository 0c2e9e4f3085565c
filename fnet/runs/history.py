"""What a run tells: an `Event` while it goes on, a `History` at its end."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fnet.training.evaluation import named_metrics
from fnet.training.stopping import Ending
from fnet.types import Mean, PyTree, TrainState


class Event(NamedTuple):
    """What an observer is told.

    ``kind`` is "start", "compile", "chunk", "evaluation", "epoch", "checkpoint" or "end". ``metrics`` are host numbers
    by name: a chunk's training means, an evaluation's results (``validation_loss``), or an epoch's training means with
    the results of an evaluation at its end. ``seconds`` is what the compilation took, or the time from the end of the
    chunk before to the end of this one, observers included; ``examples`` how many the chunk has seen. ``state`` is
    where the run stood at the end of the chunk, not to be changed; if the run keeps no copies (``fit(keep=False)``) it
    may be read during the call only. ``ended`` says how a rule to stop has ended the run, at the "end". That comes for
    a run that fails too, while its error is handled: ``sys.exception()`` is it.
    """

    kind: str
    step: int  # updates made
    steps: int  # where the run ends
    epoch: int  # epochs completed
    epochs: int
    metrics: Mapping[str, Any]
    seconds: float
    examples: int
    state: TrainState
    ended: Ending | None = None


class History(NamedTuple):
    """What a run measured, by name: ``loss``, ``validation_loss``, ``gradient_norm/dense_0``."""

    epochs: dict[str, np.ndarray]  # (E, ...), training means, and results where one ended with an evaluation; "epoch"
    steps: dict[str, np.ndarray]  # (E S, ...), training, of the steps that this call made
    evaluations: dict[str, np.ndarray]  # (evaluations, ...), and the "step" of each
    compile_seconds: float
    run_seconds: float
    ended: Ending | None = None  # how a rule to stop has ended the run

    def __repr__(self) -> str:
        """How much was run, the first, best and last value of each metric of one number, and how it ended.

        >>> loss = np.array([0.9, 0.25, 0.5])
        >>> epochs = {"epoch": np.array([1, 2, 3]), "loss": loss, "validation_loss": loss + 1}
        >>> evaluations = {"step": np.array([100, 200, 300]), "validation_loss": loss + 1}
        >>> History(epochs, {"loss": np.zeros(300)}, evaluations, 2.5, 0.75, Ending(300, "no better for 1 evaluation"))
        History: 3 epochs, 300 steps of this call, 3 evaluations; compiled in 2.50 s, run in 0.75 s
        metric           first  best  at       last
        loss             0.9    0.25  epoch 2  0.5
        validation_loss  1.9    1.25  epoch 2  1.5
        Stopped early at step 300: no better for 1 evaluation.
        """
        from fnet.report.run import history_text

        return history_text(self)

    def plot(self, path: str | Path | None = None):
        """A matplotlib figure with a panel for each metric, training and validation sets together.

        Curves are drawn by epoch; evaluations that are not those of the epochs' ends have panels of their own, by step.
        Where a rule to stop has ended the run a line marks the evaluation that was best.
        With a ``path`` it is also written there, as PNG. Matrices and vectors of more than 12 entries are left out.
        """
        from fnet.report.plots import plot_history

        return plot_history(self, path)

    def to_csv(self, path: str | Path) -> Path:
        """Write the epochs to the file ``path``, or to epochs.csv in that folder; returns the file.

        A row an epoch, counted from 1, and a column a metric; arrays have a column for each entry: ``name/0``,
        ``confusion/1/2``. Numbers are written so that they read back the same. FileExistsError where there is a file,
        ValueError where two columns would have one name.

        >>> import tempfile
        >>> share = np.array([[1.0, 0.0], [0.5, 0.5]])
        >>> epochs = {"epoch": np.array([1, 2]), "loss": np.array([0.5, 0.25]), "share": share}
        >>> history = History(epochs, {}, {}, 0.0, 0.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(history.to_csv(folder).read_text().strip())
        epoch,loss,share/0,share/1
        1,0.5,1.0,0.0
        2,0.25,0.5,0.5
        """
        path = Path(path) / "epochs.csv" if Path(path).is_dir() else Path(path)
        columns: dict[str, list] = {"epoch": []}
        for name, values in self.epochs.items():
            for index in np.ndindex(values.shape[1:]):
                column = "/".join([name, *map(str, index)])
                if columns.get(column):
                    raise ValueError(f"two columns are called {column!r}; expected one: give a metric another name")
                columns[column] = values[(slice(None), *index)].tolist()
        try:
            with path.open("x", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
        except FileExistsError:
            raise FileExistsError(
                f"{path} exists already and is left as it is; expected a new file: name another, or delete this one"
            ) from None
        return path

    def _repr_html_(self) -> str:
        """What a notebook shows: the first, best and last value of each metric, and the curves."""
        from fnet.report.run import history_html

        return history_html(self)


class Recorder:
    """Collects what chunks measured and cuts it into epochs and evaluations.

    Sums are taken one step after another in float64, so that they do not depend on how the run was cut into chunks.
    """

    def __init__(
        self, per_epoch: int, partial: Mapping[str, Any] | None = None, rows: Sequence[Mapping] = (), whole: bool = True
    ):
        """With what a resumed run's checkpoint and folder hold: the `partial` sums and the rows of the metrics.

        Not ``whole`` is the epoch that has begun where its first steps measured something else: its means are NaN.
        """
        self.per_epoch, self.whole = per_epoch, whole
        self.steps: list[dict[str, np.ndarray]] = []
        of_kind = lambda kind, without: [  # noqa: E731
            {name: value for name, value in row.items() if name not in without} for row in rows if row["kind"] == kind
        ]
        self.epochs = of_kind("epoch", ("kind", "step"))
        self.evaluations = of_kind("evaluation", ("kind", "epoch"))
        self.last_means: dict[str, Any] = {}  # of the chunk that was added last
        self._partial = {name: Mean(*map(np.asarray, pair)) for name, pair in (partial or {}).items()}

    def add(self, first: int, outputs) -> list[tuple[str, int, dict[str, Any]]]:
        """What a chunk that began at step ``first`` completed: ("evaluation" or "epoch", step, metrics), in order."""
        last = int(outputs.step)
        made = slice(last - first)
        rows = to_host(jax.tree.map(lambda a: a[made], outputs.metrics))
        results = to_host(outputs.results)
        evaluated = {int(step): i for i, step in enumerate(outputs.evaluated) if step}  # no evaluation is at step 0
        self.steps.append({name: mean.value for name, mean in rows.items()})
        self.last_means = averages(rows)
        ends = {step for step in range(first + 1, last + 1) if step % self.per_epoch == 0}
        told, begin = [], first
        for step in sorted(ends | evaluated.keys()):
            now = {name: mean.value[evaluated[step]] for name, mean in results.items()} if step in evaluated else {}
            if step in evaluated:
                self.evaluations.append({"step": np.asarray(step), **now})
                told.append(("evaluation", step, now))
            if step in ends:
                self._take(rows, begin - first, step - first)
                own = {name: mean.value for name, mean in self._partial.items()}
                means = {**(own if self.whole else {n: np.full_like(v, np.nan) for n, v in own.items()}), **now}
                self.whole = True
                self.epochs.append({"epoch": np.asarray(int(step) // self.per_epoch), **means})
                told.append(("epoch", step, means))
                self._partial, begin = {}, step
        self._take(rows, begin - first, last - first)
        return told

    def _take(self, rows: Mapping[str, Mean], begin: int, end: int) -> None:
        """Add the rows to the sums of the epoch that has begun."""
        for name, mean in rows.items() if end > begin else ():
            before = self._partial.get(name, Mean(np.zeros(mean.sum.shape[1:]), np.zeros(mean.count.shape[1:])))
            self._partial[name] = Mean(*(_running_sum(b, m[begin:end]) for b, m in zip(before, mean, strict=True)))

    def partial(self) -> dict[str, Any]:
        """The sums of the epoch that has begun, as numbers that JSON keeps exactly."""
        return {name: [np.asarray(part).tolist() for part in mean] for name, mean in self._partial.items()}

    def history(self, compile_seconds: float, run_seconds: float, ended: Ending | None = None) -> History:
        """Everything that was added."""
        names = self.steps[0] if self.steps else ()
        by_step = {name: np.concatenate([block[name] for block in self.steps]) for name in names}
        tables = _table(self.epochs), by_step, _table(self.evaluations)
        return History(*tables, compile_seconds, run_seconds, ended)


def _running_sum(start: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``start + rows[0] + rows[1] + …`` in this order: numpy's sum pairs its terms as their number suggests."""
    return np.add.accumulate(np.concatenate([np.asarray(start)[None], rows]), axis=0)[-1]


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows as columns; a number that a row does not have is NaN."""
    shapes = {name: np.shape(value) for row in rows for name, value in row.items()}
    return {
        name: np.stack([np.asarray(row.get(name, np.full(shape, np.nan))) for row in rows])
        for name, shape in shapes.items()
    }


def averages(metrics: Mapping[str, Mean]) -> dict[str, Any]:
    """Means over the steps (axis 0): sums and counts are added before they are divided."""
    return {name: Mean(mean.sum.sum(0), mean.count.sum(0)).value for name, mean in metrics.items()}


def to_host(metrics: PyTree) -> dict[str, Mean]:
    """A tree of `Mean`s as NumPy float64, by path; a plain number counts once."""
    host = {}
    for name, leaf in named_metrics(jax.device_get(metrics)):
        total, count = leaf if isinstance(leaf, Mean) else (leaf, np.ones_like(leaf))
        host[name] = Mean(np.asarray(total, np.float64), np.asarray(count, np.float64))
    return host
