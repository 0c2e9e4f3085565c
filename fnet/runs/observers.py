"""Observers: functions of an `Event` that watch a run from the host. They may read everything and change nothing.

    fit(..., observers=[progress("digits"), tensorboard("runs/a/events"), time_limit(3600)])

`fit` looks up between chunks of steps, so what an observer sees of the state is where a chunk ended: "every n steps"
means at the first chunk's end from each multiple of n on. None of them keeps anything of a state after its call.

What writes files makes none before the run starts, and refuses those that are there. With ``resume``, for a run that
is continued, it goes on with them: what they hold from the step on where the run continues is replaced. What `wandb`
and `mlflow` have logged cannot be replaced: they keep it, and log from there on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import posixpath
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from csv import reader, writer
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import jax
import numpy as np

from fnet.core.extras import need
from fnet.core.files import whole_file
from fnet.metrics import DECADES, magnitude_edges
from fnet.runs.arguments import in_steps
from fnet.runs.history import Event
from fnet.types import TrainState, is_whole, named_leaves, require

Observer = Callable[[Event], str | None]


# --- to look at ------------------------------------------------------------------------------------------------------


def progress(title: str = "training", console=None) -> Observer:
    """A progress bar that stands from the start of the run on, also while it compiles (needs rich).

    Beneath it the last chunk's loss, accuracy and learning rate, and the losses and accuracies of the last evaluation.
    Where the console is no terminal, or the environment has CI=true, one plain line per epoch instead. A run that does
    not begin at step 0 says where it continues, and one that a rule has stopped where and why.
    """
    need("progress", "rich")
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    console = console or Console()
    alive = console.is_terminal and os.environ.get("CI", "").lower() not in ("true", "1")
    name, place = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[at]"))
    bar = Progress(SpinnerColumn(), name, BarColumn(None), place, TimeRemainingColumn(), expand=True)
    training, results = (Text(no_wrap=True, overflow="ellipsis") for _ in range(2))
    screen = Live(Group(bar, training, results), console=console)
    tasks = []  # the bar's one task, once the run has started

    def draw(event: Event) -> None:
        short = title if len(title) <= 20 else f"{title[:19]}…"
        at = f"epoch {event.epoch}/{event.epochs}  step {event.step}/{event.steps}"
        if event.kind == "start":
            for old in bar.task_ids:
                bar.remove_task(old)
            tasks[:] = [bar.add_task(f"{short}: compiling", total=None, completed=event.step, at="")]
            screen.start(refresh=True)
        elif event.kind == "compile":
            bar.reset(tasks[0], description=short, total=event.steps, completed=event.step, at=at)
        elif event.kind == "chunk":
            bar.update(tasks[0], description=short, total=event.steps, completed=event.step, at=at)
            speed = f"{event.examples / event.seconds:,.0f} examples/s"
            training.plain = f"{_line(event.metrics, ('loss', 'accuracy', 'learning_rate'))}  {speed}"
        elif event.kind == "evaluation":
            results.plain = _line(event.metrics, _of_sets(event.metrics))
        elif event.kind == "end":
            screen.stop()  # and what comes is said beneath it

    def say(text: str) -> None:
        console.print(f"{title}: {text}", soft_wrap=True, markup=False)

    def observe(event: Event) -> None:
        if event.kind == "start" and event.step:
            say(f"continues at step {event.step}/{event.steps}, epoch {event.epoch}/{event.epochs}")
        if alive:
            draw(event)
        elif event.kind == "epoch":
            numbers = _line(event.metrics, ("loss", "accuracy", *_of_sets(event.metrics)))
            say(f"epoch {event.epoch}/{event.epochs}  {numbers}")
        if event.ended:
            say(f"stopped at step {event.ended.step}/{event.steps}: {event.ended.reason}")

    return observe


def _line(metrics: Mapping[str, Any], names: Sequence[str]) -> str:
    shown = {name: metrics[name] for name in names if name in metrics and np.ndim(metrics[name]) == 0}
    form = lambda name: ".2e" if name == "learning_rate" else ".4f"  # noqa: E731
    return "  ".join(f"{name.replace('_', ' ')} {float(value):{form(name)}}" for name, value in shown.items())


def _of_sets(metrics: Mapping[str, Any]) -> list[str]:
    """The losses and accuracies of the sets that were evaluated."""
    sets = [name.removesuffix("_loss") for name in metrics if name.endswith("_loss")]
    return [f"{held}_{name}" for held in sets for name in ("loss", "accuracy")]


# --- numbers in files ------------------------------------------------------------------------------------------------


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
    _refuse("csv", path.exists() and not resume, path)
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
        row = {"epoch": event.epoch, "step": event.step, **_entries(event.metrics)}
        lines = [] if header else [list(row)]
        header[:] = header or list(row)
        if wanted is None and (late := [name for name in row if name not in header]):
            raise ValueError(
                f"csv: {', '.join(late)} in epoch {event.epoch}, but {path} has the columns {', '.join(header[2:])}; "
                "expected the metrics of its first row: name all that are to come by csv(path, names=...)"
            )
        with path.open("a", newline="") as file:
            writer(file, lineterminator="\n").writerows([*lines, [row.get(name, "") for name in header]])

    return observe


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

    folder, due = Path(folder), _due("tensorboard: histograms", histograms or (1, "epochs"))
    _refuse("tensorboard", not resume and any(folder.glob("events.out.tfevents.*")), folder)
    _require_bins("tensorboard", bins)
    events: Any = None

    def observe(event: Event) -> None:
        nonlocal events
        if event.kind == "start":
            events = SummaryWriter(str(folder), purge_step=event.step + 1 if resume else None, flush_secs=10)
        for name, value in _scalars(event).items():
            events.add_scalar(name, value, event.step)
        if due(event, "chunk") and histograms:
            for name, (counts, edges) in _histograms(event, bins).items():
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
    _require_bins("histograms", bins)
    due, place = _due("histograms: every", every), _numbered("histograms", folder, resume)

    def observe(event: Event) -> None:
        if event.kind == "start":
            place(event, "")
        if due(event, "chunk"):
            parts = {
                f"{name}/{part}": array
                for name, pair in _histograms(event, bins).items()
                for part, array in zip(("counts", "edges"), pair, strict=True)
            }
            _save_arrays(place(event, ".npz"), parts)

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
    due, place = _due("samples: every", every), _numbered("sample", folder, resume)
    last = -1

    def observe(event: Event) -> None:
        nonlocal last
        if event.kind == "start":
            place(event, "")
            last = -1
        if due(event, "evaluation", "epoch") and (step := int(event.state.step)) != last:
            last, made = step, jax.device_get(function(event.state))
            if isinstance(made, str):
                with _whole(place(event, ".txt")) as part:
                    part.write_text(made)
            else:
                _save_arrays(place(event, ".npz"), {name or "sample": leaf for name, leaf in named_leaves(made)})

    return observe


def profile(folder: str | Path, first: int, last: int) -> Observer:
    """A trace by jax's profiler from step ``first`` to step ``last``, written to ``folder`` for TensorBoard or XProf.

    It begins and ends where a chunk does: at the first end of one from each step on, and it lasts one chunk at least.
    Give `fit` a ``chunk_steps`` that divides both to have it exact; a chunk that runs already when the trace begins is
    on it from there on. Raises ValueError unless ``0 <= first < last``.
    """
    require(0 <= first < last, f"profile: first = {first} and last = {last}; expected 0 <= first < last")
    at = "before"

    def observe(event: Event) -> None:
        nonlocal at
        at_boundary = event.kind in ("compile", "chunk")
        if at == "before" and at_boundary and event.step >= first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # else every Python call of the host is on it
            jax.profiler.start_trace(str(folder), profiler_options=options)
            at = "within"
        elif at == "within" and (event.kind == "end" or (at_boundary and event.step >= last)):
            at = "after"
            jax.profiler.stop_trace()

    return observe


# --- numbers to services ---------------------------------------------------------------------------------------------


def wandb(*, config: Any = None, run: Any = None, **options) -> Observer:
    """A run of Weights & Biases (needs wandb): one row a step with every scalar metric, by `tensorboard`'s names.

    ``options`` are those of ``wandb.init``: ``project``, ``name``, ``mode="offline"`` with ``dir``, and so on. The run
    is begun when `fit` begins, beside any other that is active, and finished when it ends, with the exit code 0, or 1
    after an error and 255 after SIGINT or SIGTERM. Or give a ``run`` that is active: it is not finished.
    ``config``, a mapping or dataclass, is the run's; what JSON does not hold is in it as text.

    A run is continued by its id: ``wandb(id="a", resume="allow")``. W&B takes steps in rising order only: what it has
    stays, and numbers of steps before its last are left out. Offline nothing of earlier calls is known: each writes a
    folder of its own, and steps that were made twice are in both.
    Raises ValueError for options beside a run, and TypeError for a configuration that is none.
    """
    library = need("wandb", "wandb")
    given = ", ".join(options)
    require(run is None or not options, f"wandb: run and {given} are given; expected a run or how one is begun")
    settings, ready, failure = _settings("wandb", config), _rows(), _failure()
    active, last = None, 0

    def observe(event: Event) -> None:
        nonlocal active, last
        error = failure(event)
        if event.kind == "start":
            active = library.init(**{"reinit": "create_new", **options}) if run is None else run
            active.config.update(settings, allow_val_change=True)
            last = active.step
        for step, numbers in ready(event):
            if active and step >= last:
                active.log(numbers, step=step)
        if event.kind == "end" and run is None and active:
            code = 0 if error is None else 1 if isinstance(error, Exception) else 255
            ended, active = active, None
            ended.finish(exit_code=code)

    return observe


def mlflow(
    experiment: str | None = None,
    *,
    name: str | None = None,
    run_id: str | None = None,
    run: Any = None,
    tracking_uri: str | None = None,
    config: Any = None,
) -> Observer:
    """A run of MLflow (needs mlflow-skinny): every scalar metric at its step, by `tensorboard`'s names.

    A run called ``name`` of the ``experiment``, which is made if there is none, or without one of MLflow's "Default".
    It is begun when `fit` begins and ended when it ends: FINISHED, FAILED after an error, KILLED after SIGINT or
    SIGTERM. It is not MLflow's active run; give that as ``run``, ``mlflow.start_run()``: it is not ended. ``config``, a
    mapping or dataclass, gives the parameters, ``optimizer.learning_rate`` where it is nested. Characters that MLflow
    refuses in names are ``_``.

    A run is continued by its ``run_id``, or given again. MLflow would keep a second value for a step: so what it has
    stays, of each metric the steps up to its last and every parameter, and only what follows is logged.

    Without ``tracking_uri`` the numbers go where MLflow's settings say: to a server; to a file, ``sqlite:///a.db``,
    which needs all of mlflow; or to a folder, which MLflow 3 refuses without MLFLOW_ALLOW_FILE_STORE=true.
    Raises ValueError for two metrics of one name, and for an experiment, a name or an id beside a run or an id;
    TypeError for a configuration that is none.
    """
    library = need("mlflow", "mlflow")
    ways = {"run": run, "run_id": run_id, "experiment or name": experiment or name}
    ways = [way for way, value in ways.items() if value is not None]
    require(len(ways) < 2, f"mlflow: {' and '.join(ways)} are given; expected one: a run that exists, or a new one's")
    settings, ready, failure = _flat(_settings("mlflow", config)), _rows(), _failure()
    client: Any = None
    active, last, names = "", {}, {}  # the run's id, of each metric the last step that the run began with, and its name

    def begin() -> str:
        if run_id is not None:
            return run_id
        if run is not None:
            return run.info.run_id
        known = client.get_experiment_by_name(experiment or "Default")
        place = known.experiment_id if known else client.create_experiment(experiment or "Default")
        return client.create_run(place, run_name=name).info.run_id

    def renamed(given: str) -> str:
        taken = posixpath.normpath("/" + re.sub(r"[^\w\-. /]", "_", given)).lstrip("/") or "_"
        if names.setdefault(taken, given) != given:
            raise ValueError(
                f"mlflow: {names[taken]!r} and {given!r} are both {taken!r} in MLflow, where names have letters, "
                "digits and _-./ only; expected names that differ: give one another"
            )
        return taken

    def start() -> None:
        nonlocal client, active
        client = library.MlflowClient(tracking_uri)
        active = begin()
        if run_id is not None:
            client.update_run(active, "RUNNING")
        held = client.get_run(active).data
        last.update((key, max(m.step for m in client.get_metric_history(active, key))) for key in held.metrics)
        names.clear()
        new = {renamed(key): str(value) for key, value in settings.items()}
        params = [library.entities.Param(key, value) for key, value in new.items() if key not in held.params]
        client.log_batch(active, params=params)
        names.clear()

    def observe(event: Event) -> None:
        nonlocal active
        error = failure(event)
        if event.kind == "start":
            start()
        now, metrics = int(1000 * time.time()), []
        for step, numbers in ready(event):
            keys = {renamed(key): value for key, value in numbers.items()}
            new = [(key, value) for key, value in keys.items() if step > last.get(key, -1)]
            metrics += [library.entities.Metric(key, value, now, step) for key, value in new]
        if active:
            client.log_batch(active, metrics)
        if event.kind == "end" and run is None and active:
            status = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
            ended, active = active, ""
            client.set_terminated(ended, status)

    return observe


# --- to end a run ----------------------------------------------------------------------------------------------------


def time_limit(seconds: float) -> Observer:
    """Stop the run when ``seconds`` have passed since its start, at the end of the chunk that runs.

    Compiling counts. A run that is kept in a folder is saved there, and can be resumed. Raises ValueError for a limit
    that is not above 0.
    """
    require(seconds > 0, f"time_limit: seconds = {seconds}; expected a number above 0")
    begin = time.monotonic()

    def observe(event: Event) -> str:
        nonlocal begin
        if event.kind == "start":
            begin = time.monotonic()
        return "stop" if time.monotonic() - begin >= seconds else "continue"

    return observe


def terminate_on_nonfinite() -> Observer:
    """Stop the run when a loss, of training or of an evaluation, is not finite: for ``fit(check_finite=False)``.

    The state returned is that of the chunk's end, so with what is not finite in it.
    """

    def observe(event: Event) -> str:
        losses = [value for name, value in event.metrics.items() if name == "loss" or name.endswith("_loss")]
        return "continue" if all(np.isfinite(value).all() for value in losses) else "stop"

    return observe


# --- what they share -------------------------------------------------------------------------------------------------


def _refuse(who: str, exists: bool, path: Path) -> None:
    if exists:
        raise FileExistsError(
            f"{who}: {path} exists already and is left as it is; expected a new one: name another, "
            "or continue the run that it is of with resume=True"
        )


def _require_bins(who: str, bins: int) -> None:
    require(is_whole(bins), f"{who}: bins = {bins!r}; expected a whole number of at least 1")


def _scalars(event: Event) -> dict[str, float]:
    """The numbers of a chunk, an evaluation or an epoch, as ``chunk/loss``; arrays are left out."""
    metrics = event.metrics if event.kind in ("chunk", "evaluation", "epoch") else {}
    return {f"{event.kind}/{name}": float(value) for name, value in metrics.items() if np.ndim(value) == 0}


def _rows() -> Callable[[Event], list[tuple[int, dict[str, float]]]]:
    """``ready(event)``: step and numbers, step after step, of what the event adds nothing to any more.

    `fit` tells of a chunk before it does of the evaluations and epochs in it, which are of earlier steps.
    """
    rows: dict[int, dict[str, float]] = {}

    def ready(event: Event) -> list[tuple[int, dict[str, float]]]:
        complete = [] if event.kind in ("evaluation", "epoch") else sorted(rows.items())
        if complete:
            rows.clear()
        if numbers := _scalars(event):
            rows.setdefault(event.step, {}).update(numbers)
        return complete

    return ready


def _failure() -> Callable[[Event], BaseException | None]:
    """``failure(event)``: the error that ends the run, if one does: `fit` tells of the end while it handles it.

    What the caller of `fit` may be handling is another, there at the start too.
    """
    outside = None

    def failure(event: Event) -> BaseException | None:
        nonlocal outside
        error = sys.exception()
        outside = error if event.kind == "start" else outside
        return None if error is outside else error

    return failure


def _settings(who: str, config: Any) -> dict[str, Any]:
    """The configuration as JSON holds it: dataclasses are mappings, arrays lists, and what else there is its text."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(name): plain(inner) for name, inner in value.items()}
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            return np.asarray(value).tolist()
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

    settings = plain({} if config is None else config)
    if not isinstance(settings, dict):
        raise TypeError(
            f"{who}: config is a {type(config).__name__}; expected a dataclass or a mapping of names to values"
        )
    return settings


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Every value by name, ``optimizer.learning_rate``."""
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return flat


def _due(who: str, every: tuple[int, str]) -> Callable[..., bool]:
    """``due(event, *kinds)``: whether it is the first of these kinds since another ``every`` was completed."""
    in_steps(who, every, 1)
    count, unit = every
    last = 0

    def due(event: Event, *kinds: str) -> bool:
        nonlocal last
        before, now = last, (event.step if unit == "steps" else event.epoch) // count
        if event.kind == "start" or event.kind in kinds:
            last = now
        return event.kind in kinds and now > before

    return due


def _numbered(kind: str, folder: str | Path, resume: bool) -> Callable[[Event, str], Path]:
    """``place(event, suffix)``, the file for the event's state; at the start, what a continued run left beyond goes."""
    folder = Path(folder)

    def found() -> dict[Path, int]:
        numbered = {path: path.stem.removeprefix(f"{kind}_") for path in folder.glob(f"{kind}_*")}
        return {path: int(number) for path, number in numbered.items() if number.isdigit()}

    _refuse(kind, bool(found()) and not resume, folder)

    def place(event: Event, suffix: str) -> Path:
        if event.kind == "start":
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


def _save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz; by hand, since np.savez takes no array called "file" and pickles objects."""
    with _whole(path) as part, ZipFile(part, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, _plain(array), allow_pickle=False)


def _plain(array) -> np.ndarray:
    """In a dtype that NumPy's files know: bfloat16 and its like as float32."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _entries(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Every number by name, those of an array with their place."""
    return {
        name + "".join(f"[{i}]" for i in place): float(number)
        for name, value in metrics.items()
        for place, number in np.ndenumerate(np.asarray(value))
    }


def _histograms(event: Event, bins: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Counts and edges by name: of each leaf of the parameters, and of the gradients if they were counted."""
    found = {}
    for name, leaf in named_leaves(event.state.params):
        if np.issubdtype(_plain(leaf).dtype, np.floating):
            values = _plain(leaf).astype(np.float64)
            found[f"weights/{name}"] = np.histogram(values[np.isfinite(values)], bins)
    low, high = DECADES
    for name, counts in event.metrics.items():
        if name.startswith("gradient_histogram/"):
            edges = magnitude_edges((len(counts) - 2) // (high - low))
            found[name] = counts, np.concatenate([[-np.inf], edges, [np.inf]])
    return {name: (np.asarray(counts, np.float64), edges) for name, (counts, edges) in found.items()}
