"""Numbers and arrays in files: CSV, TensorBoard, histograms, samples, profiles."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from csv import reader, writer
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import jax
import numpy as np

from fnet.core.checks import require
from fnet.core.extras import need
from fnet.core.files import whole_file
from fnet.core.processes import in_first, index, is_first, on_host
from fnet.core.trees import named_leaves
from fnet.metrics import DECADES, magnitude_edges
from fnet.runs.history import Event
from fnet.runs.observers.shared import Observer, due_every, entries, require_bins, scalars
from fnet.types import TrainState


def csv(path: str | Path, *, names: Sequence[str] | None = None, resume: bool = False) -> Observer:
    """Append one row per epoch to the file at ``path``: the epoch, the step and every metric.

    An array's entries are columns of their own, ``confusion[0][1]``; numbers are written so that they read back
    exactly.
    The columns are ``names``, or without them the first row's: then a metric that appears later is an error, as where
    an evaluation is made every other epoch. A cell without a value is empty.

    Raises FileExistsError for a file that exists, unless ``resume`` continues it, and ValueError for a file with other
    columns.
    """
    path, wanted = Path(path), None if names is None else ["epoch", "step", *names]
    refuse_existing("csv", path.exists() and not resume, path)
    header: list[str] = []

    def start(step: int) -> None:
        rows = list(reader(io.StringIO(path.read_text()))) if path.exists() else []
        header[:] = rows[0] if rows else wanted or []
        if header[:2] not in ([], ["epoch", "step"]) or (wanted or header) != header:
            expected = ", ".join(wanted or ("epoch", "step", "..."))
            raise ValueError(f"csv: {path} has the columns {', '.join(header)}; expected {expected}: name another file")
        if odd := [row for row in rows[1:-1] if len(row) != len(header) or not row[1].isdecimal()]:
            raise ValueError(f"csv: {path} has the row {odd[0]}; expected one number a column: mend or delete it")
        # the last row may have been cut off by whatever ended the process
        kept = [row for row in rows[1:] if len(row) == len(header) and row[1].isdecimal() and int(row[1]) <= step]
        with _whole(path) as part, part.open("w", newline="") as file:
            writer(file, lineterminator="\n").writerows([header, *kept] if header else [])

    def observe(event: Event) -> None:
        if event.kind == "start":
            start(event.step)
        if event.kind != "epoch":
            return
        row = {"epoch": event.epoch, "step": event.step, **entries(event.metrics)}
        lines = [] if header else [list(row)]
        header[:] = header or list(row)
        if wanted is None and (late := [name for name in row if name not in header]):
            raise ValueError(
                f"csv: {', '.join(late)} in epoch {event.epoch}, but {path} has the columns {', '.join(header[2:])}; "
                "expected the metrics of its first row: name all that are to come by csv(path, names=...)"
            )
        with path.open("a", newline="") as file:
            writer(file, lineterminator="\n").writerows([*lines, [row.get(name, "") for name in header]])

    return in_first(observe)


def tensorboard(
    folder: str | Path, *, histograms: tuple[int, str] | None = None, bins: int = 64, resume: bool = False
) -> Observer:
    """Event files for TensorBoard in ``folder`` (needs tensorboardX): every scalar metric at its step.

    ``chunk/loss`` is the mean over a chunk of steps, ``evaluation/validation_loss`` a result, ``epoch/loss`` the mean
    over an epoch; arrays are left out. With ``histograms``, such as ``(1, "epochs")``, those of `histograms` too.
    With ``resume`` TensorBoard hides what the folder's older files hold after the step where the run continues.

    Raises FileExistsError for a folder that has event files, unless ``resume``.
    """
    need("tensorboard", "tensorboardX")
    from tensorboardX import SummaryWriter

    folder, due = Path(folder), due_every("tensorboard: histograms", histograms or (1, "epochs"))
    refuse_existing("tensorboard", not resume and any(folder.glob("events.out.tfevents.*")), folder)
    require_bins("tensorboard", bins)
    events: Any = None

    def observe(event: Event) -> None:
        nonlocal events
        found = histograms_of(event, bins) if due(event, "chunk") and histograms else {}
        if not is_first():
            return
        if event.kind == "start":
            events = SummaryWriter(str(folder), purge_step=event.step + 1 if resume else None, flush_secs=10)
        for name, value in scalars(event).items():
            events.add_scalar(name, value, event.step)
        if found:
            for name, (counts, edges) in found.items():
                edges = np.nan_to_num(edges, neginf=edges[1] - 1, posinf=edges[-2] + 1)
                middles = (edges[1:] + edges[:-1]) / 2
                events.add_histogram_raw(
                    name,
                    min=edges[0],
                    max=edges[-1],
                    num=counts.sum(),
                    sum=counts @ middles,
                    sum_squares=counts @ middles**2,
                    bucket_limits=edges.tolist(),  # upper ones: an empty bin in front says where the first begins
                    bucket_counts=[0.0, *counts.tolist()],
                    global_step=event.step,
                )
        if event.kind == "end" and events:
            events.close()

    return observe


def histograms(
    folder: str | Path, *, every: tuple[int, str] = (1, "epochs"), bins: int = 64, resume: bool = False
) -> Observer:
    """Histograms of the weights, and of the gradients where the step has `fnet.metrics.gradient_histograms`.

    Every ``(n, "steps")`` or ``(n, "epochs")`` a file ``folder/histograms_000000250.npz``: of each leaf its finite
    entries, ``weights/dense_0/w/counts (bins,)`` and ``weights/dense_0/w/edges (bins + 1,)``; of each layer's gradients
    ``gradient_histogram/dense_0/counts``, the mean over the steps of the chunk, and ``.../edges``, log10 of a
    gradient's magnitude, -inf and inf at the ends. The monitor goes by this name:
    ``make_step(..., monitors={"gradient_histogram": gradient_histograms()})``.

    Raises FileExistsError for a folder that has such files, unless ``resume``, and ValueError for ``every`` or ``bins``
    that make no sense.
    """
    require_bins("histograms", bins)
    due, place = due_every("histograms: every", every), numbered("histograms", folder, resume)

    def observe(event: Event) -> None:
        if event.kind == "start":
            place(event, "")
        if due(event, "chunk"):
            parts = {
                f"{name}/{part}": array
                for name, pair in histograms_of(event, bins).items()
                for part, array in zip(("counts", "edges"), pair, strict=True)
            }
            save_arrays(place(event, ".npz"), parts)

    return observe


def samples(
    function: Callable[[TrainState], Any],
    folder: str | Path,
    *,
    every: tuple[int, str] = (1, "epochs"),
    resume: bool = False,
) -> Observer:
    """What ``function(state)`` gives, such as generated text or predictions, at evaluations and the ends of epochs.

    Text goes to ``folder/sample_000000250.txt``, a tree of arrays to ``sample_000000250.npz`` with the leaves by their
    paths (a single array is ``sample``). The number is the state's step. At most one for every ``(n, "steps")`` or
    ``(n, "epochs")``, and one for each state: where a chunk holds several evaluations, that at its end.

    Raises FileExistsError for a folder that has such files, unless ``resume``.
    """
    due, place = due_every("samples: every", every), numbered("sample", folder, resume)
    last = -1

    def observe(event: Event) -> None:
        nonlocal last
        if event.kind == "start":
            place(event, "")
            last = -1
        if due(event, "evaluation", "epoch") and (step := int(event.state.step)) != last:
            last, made = step, function(event.state)
            made = made if isinstance(made, str) else jax.tree.map(on_host, made)
            if isinstance(made, str):
                save_text(place(event, ".txt"), made)
            else:
                save_arrays(place(event, ".npz"), {name or "sample": leaf for name, leaf in named_leaves(made)})

    return observe


def profile(folder: str | Path, first: int, last: int) -> Observer:
    """A trace by jax's profiler from step ``first`` to step ``last``, written to ``folder`` for TensorBoard or XProf.

    It begins and ends where a chunk does: at the first end of one from each step on, and it lasts one chunk at least.
    Give `fit` a ``chunk_steps`` that divides both to have it exact; a chunk that runs already when the trace begins is
    on it from there on. Of several processes all but the first write to ``folder/process_1`` and so on. Raises
    ValueError unless ``0 <= first < last``.
    """
    require(0 <= first < last, f"profile: first = {first} and last = {last}; expected 0 <= first < last")
    at = "before"

    def observe(event: Event) -> None:
        nonlocal at
        at_boundary = event.kind in ("compile", "chunk")
        if at == "before" and at_boundary and event.step >= first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # else every Python call of the host is on it
            own = Path(folder) if is_first() else Path(folder) / f"process_{index()}"
            jax.profiler.start_trace(str(own), profiler_options=options)
            at = "within"
        elif at == "within" and (event.kind == "end" or (at_boundary and event.step >= last)):
            at = "after"
            jax.profiler.stop_trace()

    return observe


def numbered(kind: str, folder: str | Path, resume: bool) -> Callable[[Event, str], Path]:
    """``place(event, suffix)``, the file for the event's state; at the start, what a continued run left beyond goes."""
    folder = Path(folder)

    def found() -> dict[Path, int]:
        numbered = {path: path.stem.removeprefix(f"{kind}_") for path in folder.glob(f"{kind}_*")}
        return {path: int(number) for path, number in numbered.items() if number.isdigit()}

    refuse_existing(kind, bool(found()) and not resume, folder)

    def place(event: Event, suffix: str) -> Path:
        if event.kind == "start" and is_first():
            for path, step in found().items():
                if step > event.step:
                    path.unlink()
        return folder / f"{kind}_{int(event.state.step):09d}{suffix}"

    return place


@contextlib.contextmanager
def _whole(path: Path):
    """`whole_file`, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        yield part


@in_first
def save_text(path: Path, text: str) -> None:
    """A file of text."""
    with _whole(path) as part:
        part.write_text(text)


@in_first
def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz; by hand, since np.savez takes no array called "file" and pickles objects."""
    with _whole(path) as part, ZipFile(part, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, plain_array(array), allow_pickle=False)


def plain_array(array) -> np.ndarray:
    """In a dtype that NumPy's files know: bfloat16 and its like as float32."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def refuse_existing(who: str, exists: bool, path: Path) -> None:
    """Raise FileExistsError for what is there already."""
    if exists:
        raise FileExistsError(
            f"{who}: {path} exists already and is left as it is; expected a new one: name another, "
            "or continue the run that it is of with resume=True"
        )


def histograms_of(event: Event, bins: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Counts and edges by name: of each leaf of the parameters, and of the gradients if they were counted."""
    found = {}
    for name, leaf in named_leaves(event.state.params):
        if np.issubdtype((values := plain_array(on_host(leaf))).dtype, np.floating):
            values = values.astype(np.float64)
            found[f"weights/{name}"] = np.histogram(values[np.isfinite(values)], bins)
    low, high = DECADES
    for name, counts in event.metrics.items():
        if name.startswith("gradient_histogram/"):
            edges = magnitude_edges((len(counts) - 2) // (high - low))
            found[name] = counts, np.concatenate([[-np.inf], edges, [np.inf]])
    return {name: (np.asarray(counts, np.float64), edges) for name, (counts, edges) in found.items()}
