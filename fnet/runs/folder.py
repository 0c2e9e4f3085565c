"""A run's folder: its configuration, its metrics and its checkpoints, so that it can be killed, resumed and read.

folder/config.json       the configuration
folder/environment.json  versions, devices and settings of the process that began or resumed it last
folder/programs.json     what a step and an evaluation compute, an operation a line
folder/metrics.jsonl     one object for each evaluation and each epoch
folder/changes.jsonl     what was knowingly changed when the run was resumed, and at which step
folder/summary.json      steps, seconds and bytes, when a call of `fit` has ended
folder/nonfinite.json    where the run stopped being finite, if it did
folder/checkpoints/      `fnet.checkpoint`
folder/.saved            the step of the latest checkpoint, so that one that is gone is missed
folder/.lock             `fnet.runs.locks`, while it is written to
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core import processes
from fnet.core.files import first_line, whole_file
from fnet.core.programs import Line, difference
from fnet.runs import locks
from fnet.runs.checkpoint import (
    CheckpointError,
    delete_checkpoint,
    kept_leaves,
    load_checkpoint,
    read_meta,
    save_checkpoint,
    saved_results,
    saved_steps,
    sweep,
)
from fnet.runs.kept import best_first, newest_whole
from fnet.runs.run import Run, RunError, RunWarning, check_path, written
from fnet.runs.settings import (
    as_json,
    compare_config,
    different,
    environment,
    in_words,
    numbers_of,
    read_config,
    write_json,
)
from fnet.types import TrainState

# what differs in a program because something else does, that is named before
EXPLAINED = {
    "step": {"batch_size", "examples", "an example", "metrics", "optimizer", "rule to stop"},
    "evaluation": {"results", "optimizer", "rule to stop"},
}
# changes by which results are no longer those of before, and the means of an epoch that had begun no longer its own
EVALUATION = ("evaluation", "results", "rows of *", "first batch of *", "batches of *")
EPOCH = {"metrics", "batch_size", "examples", "rows", "first batch", "steps_per_epoch"}
# the parts of a state that begin anew where it is accepted that they are another's
ANEW = {"optimizer": "opt_state", "rule to stop": "stopping"}
# a program that is traced under another of these may be another, though it is of the same functions
TRACED_BY = {"jax", "jaxlib", "fnet", "backend", "x64", "matmul_precision", "prng", "threefry_partitionable"}


class OpenRun:
    """A run's folder while it is held; checkpoints are written by a thread of its own, one at a time."""

    def __init__(self, run: Run, folder: Path, config: dict[str, Any]):
        self.run, self.folder, self.config, self.environment = run, folder, config, processes.told(environment())
        self.checkpoints, self.saved = folder / "checkpoints", folder / ".saved"
        self.saved_at = time.monotonic()
        self.last_saved: int | None = None
        self.resumed_at, self.changes = 0, {}  # what differs knowingly from what was saved there
        self.passed: list[Path] = []  # damaged checkpoints that the run was not resumed from
        self._results: dict[int, dict[str, Any]] = {}  # of the evaluations, by step
        self.bests: list[dict[str, Any]] = []  # rules that checkpoints are kept by: those of before, its own last
        if run.keep_best:
            own = {"name": run.keep_best, "greatest": run.greatest, "count": run.best}
            self.bests = [{**own, "after": 0, "until": None}]  # the steps whose results are compared
        self.multiples = [run.keep_every] if run.keep_every else []
        self.evaluated_since = 0
        self._worker, self._writing = ThreadPoolExecutor(1, "fnet-checkpoint"), None

    def restore(
        self,
        like: TrainState,
        about: dict[str, Any],
        programs: Mapping[str, Sequence[Line]] = MappingProxyType({}),
        begin: Mapping[str, Callable[[TrainState], Any]] = MappingProxyType({}),
    ) -> tuple[TrainState, dict[str, Any], list[dict]] | None:
        """The state, the meta and the rows of the metrics that a resumed run continues from; None where it begins.

        ``about`` must be as it was saved, but for numbers that are as the run left them, since some optimizers change
        theirs, and for what the run accepts. A part of the state that is another's, which is accepted, is made by
        ``begin`` of the state that was restored. Nothing is written: `OpenRun.begin` does, once the run is known to go
        on.
        """
        steps = saved_steps(self.checkpoints) if self.run.resume else {}
        ended, last = self.folder / "summary.json", self._last_there_was()
        if self.run.resume and not steps and (last is not None or ended.exists()):
            there = "one: the run had ended" if last is None else f"one at step {last}"
            raise RunError(
                f"{self.checkpoints} holds no checkpoint, and there was {there}; expected it, to go on from: put it "
                "back, or begin in another folder"
            )
        if not steps:
            return None
        path, meta = self._newest(steps)
        others = {part: name for name, part in ANEW.items() if meta["plan"][name] != about[name]}
        parts = [part for part in like._fields if part not in others]
        ts = load_checkpoint(path, like._replace(**dict.fromkeys(others, ())), meta, parts=parts)
        for part, name in others.items():
            if part not in begin:
                raise RunError(
                    f"{self.folder}: the {name} is another, and the step does not say how its state begins; expected "
                    f"that of before, or a step of fnet.make_step"
                )
            ts = ts._replace(**{part: begin[part](ts)})
        anew = tuple(f"{part}/" for part in others)  # their numbers are not compared
        meta["plan"] = {name: value for name, value in meta["plan"].items() if not name.startswith(anew)} | {
            name: value for name, value in about.items() if name.startswith(anew)
        }
        moved = {name: value for name, value in numbers_of(ts).items() if about.get(name) == value}
        saved = {**meta["plan"], **moved}
        foreign = different(meta["environment"], self.environment)
        names = different(saved, about)
        if TRACED_BY & {*foreign}:  # then the same functions are other programs
            names = [name for name in names if name not in programs]
        if refused := [name for name in names if not self._accepts(name)]:
            told = [name for name in refused if not EXPLAINED.get(name, set()) & {*names}] or refused
            raise RunError(
                f"{self.folder} was run otherwise: {self._differences(told, saved, about, programs)}. Resume it with "
                f"its own, name another folder, or say that it is meant: Run(accept={(*self.run.accept, *refused)!r})"
            )
        _check_shapes(self.folder, saved, about)
        rows = [row for row in self._read_metrics() if row["step"] <= meta["step"]]
        if foreign:
            words = in_words(foreign, meta["environment"], self.environment, "as saved")
            warnings.warn(f"{self.folder} is resumed, not to the bit perhaps: {words}", RunWarning, stacklevel=4)
        if names:
            self.changes = {name: {"was": saved.get(name), "is": about.get(name)} for name in names}
            ts = _with_numbers(ts, like, {"key", *numbers_of(like)}.intersection(names))
            if any(name.startswith("stopping/") for name in names) and hasattr(ts.stopping, "stopped"):
                undecided = jnp.zeros_like(ts.stopping.stopped)  # by these numbers
                ts = ts._replace(stopping=ts.stopping._replace(stopped=undecided))
            if EPOCH & {*names}:
                meta |= {"partial": {}, "whole": False}
            meta["plan"] = {**meta["plan"], **{name: about[name] for name in names if name in about}}
        self.last_saved, self.resumed_at = meta["step"], meta["step"]
        self._keep_as_before(meta, names)
        return ts, meta, rows

    def _keep_as_before(self, meta: Mapping[str, Any], changed: Sequence[str]) -> None:
        """Keep what was kept; results of an evaluation that is ``changed`` are compared with each other alone."""
        ends = meta["step"] if any(fnmatchcase(n, pattern) for n in changed for pattern in EVALUATION) else None
        self.evaluated_since = ends or meta["evaluated_since"]
        mine = [{**rule, "after": self.evaluated_since} for rule in self.bests]
        going = [(rule["name"], rule["greatest"]) for rule in mine]
        before = [{**rule, "until": rule["until"] or ends} for rule in meta["best"]]
        self.bests = [r for r in before if r["until"] or (r["name"], r["greatest"]) not in going] + mine
        self.multiples = sorted({*meta["multiples"], *self.multiples})

    def _last_there_was(self) -> int | None:
        """The step of the latest checkpoint that was made, though it may be gone."""
        try:
            text = self.saved.read_bytes().strip()
        except OSError:
            return None
        return int(text) if text.isdigit() and len(text) < 20 else None

    def _newest(self, steps: Mapping[int, Path]) -> tuple[Path, dict[str, Any]]:
        """The last checkpoint and its meta; of "newest whole" the last that is not damaged."""
        paths, passed = list(steps.values())[::-1], []
        if (last := self._last_there_was()) is not None and last > max(steps):
            warnings.warn(
                f"{self.folder} is resumed from step {max(steps)}: its checkpoint of step {last} is gone",
                RunWarning,
                stacklevel=5,
            )
        for path in paths:
            try:
                meta = read_meta(path)
            except CheckpointError as error:
                if self.run.resume != "newest whole":
                    whole = newest_whole(paths[paths.index(path) + 1 :])
                    remedy = f". {whole[0]} is whole: Run(resume='newest whole') takes it" if whole else ""
                    raise CheckpointError(f"{error}{remedy}") from error
                passed.append(path)
                continue
            self.passed = passed
            return path, meta
        names = ", ".join(path.name for path in passed)
        raise RunError(f"{self.checkpoints}: none of {names} is whole; expected one to resume from")

    def _accepts(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.run.accept)

    def _differences(self, names: Sequence[str], saved, about, programs: Mapping[str, Sequence[Line]]) -> str:
        """The differences in words; of a program the first operation that is another."""
        try:
            before = json.loads((self.folder / "programs.json").read_text())
            before = {name: lines for name, lines in before.items() if all(isinstance(line, str) for line in lines)}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # it is there for these words alone
            before = {}
        words = []
        for name in names:
            if name in programs and name in saved and name in before:
                words.append(f"{name} computes something else: {difference(before[name], programs[name])}")
            else:
                words.append(in_words([name], saved, about, "as saved"))
        return "; ".join(words)

    def begin(self, rows: list[dict[str, Any]], programs: Mapping[str, Sequence[Line]] = MappingProxyType({})) -> None:
        """Write what a run has from its beginning on, and the metrics as far as it continues."""
        processes.meet()  # all have read what is written anew
        with processes.together(RunError) as first:
            if first:
                self._begin(rows, programs)

    def _begin(self, rows: list[dict[str, Any]], programs: Mapping[str, Sequence[Line]]) -> None:
        with written(self.folder):
            write_json(self.folder / "config.json", self.config)
            write_json(self.folder / "environment.json", self.environment)
            write_json(self.folder / "programs.json", {n: [line.text for line in p] for n, p in programs.items()})
            aside = [path.rename(_aside(path)).name for path in self.passed]
            if self.changes:
                with (self.folder / "changes.jsonl").open("a") as file:
                    file.write(json.dumps({"step": self.resumed_at, "changes": self.changes}) + "\n")
            with whole_file(self.folder / "metrics.jsonl") as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in rows))
            (self.folder / "nonfinite.json").unlink(missing_ok=True)
            if self.last_saved is not None:
                self._mark(self.last_saved)
        if aside:
            names = ", ".join(aside)
            warnings.warn(
                f"{self.folder} is resumed from step {self.last_saved}; put aside: {names}", RunWarning, stacklevel=4
            )

    def record(self, kind: str, step: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Append a row to the metrics."""
        numbers = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        if kind == "evaluation":
            self._results[step] = numbers
        if processes.is_first():
            with written(self.folder), (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **numbers}) + "\n")

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due here."""
        if self.run.save_every and step % self.run.save_every == 0:
            return True
        if self.run.keep_best and step in self._results:
            return True
        return time.monotonic() - self.saved_at >= self.run.save_seconds

    def save(self, ts: TrainState, meta: Mapping[str, Any]) -> bool:
        """Begin to save the state, unless it is saved already; an error of the save before is raised here."""
        self.wait()
        step = int(ts.step)
        if step == self.last_saved:
            return False
        results = self._results.get(step, {})
        own = {"config": self.config, "environment": self.environment, "results": results}
        kept = {"best": self.bests, "multiples": self.multiples, "evaluated_since": self.evaluated_since}
        meta = {**meta, **own, **kept}
        self._writing = self._worker.submit(self._save, step, kept_leaves(ts), meta)
        if processes.several():  # whose parts are read where they are, before the next chunk takes their place
            self.wait()
        self.last_saved, self.saved_at = step, time.monotonic()
        return True

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Write what the call did and took."""
        with processes.together(RunError) as first, written(self.folder):
            if first:
                write_json(self.folder / "summary.json", summary)

    def wait(self) -> None:
        """Until what is being written is complete."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        self._worker.shutdown(wait=True)

    def _save(self, step: int, leaves, meta) -> None:
        save_checkpoint(self.checkpoints, step, leaves, meta, verify=self.run.verify)
        with processes.together(RunError) as first:
            if first:
                self._mark(step)
                self._delete_others()

    def _delete_others(self) -> None:
        """Delete the checkpoints that no rule keeps."""
        steps = saved_steps(self.checkpoints)
        kept = set(list(steps)[-self.run.keep_last :])
        kept |= {step for step in steps if any(step % every == 0 for every in self.multiples)}
        results = {step: saved_results(path) for step, path in steps.items() if self.bests or step not in kept}
        kept |= {step for step, found in results.items() if found is None}  # a damaged one may be mended
        for rule in self.bests:
            kept |= {*best_first(results, rule)[: rule["count"]]}
        for step in steps.keys() - kept:
            delete_checkpoint(steps[step])

    def _mark(self, step: int) -> None:
        with whole_file(self.saved) as part:
            part.write_text(f"{step}\n")

    def _read_metrics(self) -> list[dict[str, Any]]:
        """The rows on disk; the last may have been cut off by whatever ended the process."""
        path, rows = self.folder / "metrics.jsonl", []
        if not path.exists():
            warnings.warn(f"{path} is not there: the run's history begins anew", RunWarning, stacklevel=5)
            return rows
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise RunError(f"{path} cannot be read ({first_line(error)}); expected the run's metrics") from error
        for number, line in enumerate(lines, 1):
            try:
                rows.append(_row(line, rows))
            except (ValueError, RecursionError) as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    break
                raise RunError(
                    f"{path}, line {number}: {line[:80]!r} is no row of metrics ({first_line(error)}); expected an "
                    "object with kind, step, epoch and numbers: mend or delete that line"
                ) from error
        return rows


def _aside(damaged: Path) -> Path:
    """The name under which a damaged checkpoint is put aside."""
    names = itertools.chain([damaged.name], (f"{damaged.name}_{k}" for k in itertools.count(2)))
    return next(path for name in names if not (path := damaged.with_name(f"damaged_{name}")).exists())


def _row(line: bytes, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of metrics.jsonl; ValueError where it is none, or does not follow those before it."""
    row = json.loads(line)
    if not isinstance(row, dict) or row.get("kind") not in ("evaluation", "epoch"):
        raise ValueError('no object of the kind "evaluation" or "epoch"')
    for name in ("step", "epoch"):
        if type(row.get(name)) is not int:
            raise ValueError(f"{name} is {row.get(name)!r}")
    for name, value in row.items():
        if name != "kind" and np.asarray(value).dtype.kind not in "bif":
            raise ValueError(f"{name} is no number")
    last = next((other for other in reversed(before) if other["kind"] == row["kind"]), {})
    if last and row["step"] <= last["step"]:
        raise ValueError(f"its step {row['step']} comes after step {last['step']}")
    for name in last:
        if np.shape(row.get(name, last[name])) != np.shape(last[name]):
            raise ValueError(f"{name} has another shape than in the row before")
    return row


@contextmanager
def open_run(run: Run) -> Iterator[OpenRun]:
    """Hold the run's folder, which no other run can meanwhile; RunError where it cannot be used.

    Of several processes the first holds it, and all of them have it open.
    """
    folder, config = Path(run.folder).expanduser().absolute(), as_json(run.config)
    with ExitStack() as stack:
        with processes.together(RunError) as first:
            if first:
                stack.enter_context(_held(run, folder, config))
        lock = folder / ".lock"
        held = processes.told(lock.read_text() if first else None)
        with processes.together(RunError):
            if not lock.exists() or lock.read_text() != held:
                raise RunError(
                    f"{folder} of {processes.said()} is not the folder that the first holds; expected one on a file "
                    "system that all processes see: name it by its whole path, or another"
                )
        opened = OpenRun(run, folder, config)
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def _held(run: Run, folder: Path, config: dict[str, Any]) -> Iterator[None]:
    """A folder that can be used, held, and swept of what a killed process left."""
    check_path(folder)
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # what a process leaves that is killed before it writes config.json
    begun = {"checkpoints", ".config.json.part"}
    if all(name in begun or name.startswith(".lock") for name in held) and not any((folder / "checkpoints").glob("*")):
        held = []
    shown = ", ".join(sorted(held, key=lambda name: (name.startswith("."), name))[:4])
    if held and "config.json" not in held:
        raise RunError(
            f"{folder} holds {shown} and no config.json, and is left as it is; expected a run's "
            "folder or an empty one: name another"
        )
    if not held and run.resume is True:
        raise RunError(f"{folder} holds no run; expected one to resume: resume='auto' begins where there is none")
    if held and not run.resume:
        raise RunError(
            f"{folder} holds {shown} already and is left as it is; expected an empty folder: "
            "resume the run that is there with resume=True, or name another"
        )
    with written(folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            with written(folder):
                ended = stack.enter_context(locks.held(folder / ".lock"))
        except locks.Held as error:
            raise RunError(
                f"{folder} is in use by {error}; expected a folder that no run writes to: wait for its end, or name "
                "another"
            ) from None
        if ended:
            warnings.warn(f"{folder} was held by {ended}, which has ended", RunWarning, stacklevel=7)
        if (folder / "config.json").exists():
            compare_config(run, folder, read_config(folder / "config.json"), config)
        with written(folder):
            sweep(folder / "checkpoints")
        yield


def _check_shapes(folder: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Require of a metric that is measured as before the shape that it had: a history has one of each name."""
    for kind in ("metrics", "results"):
        before, now = ({text.rpartition("(")[0]: text for text in plan[kind]} for plan in (saved, given))
        if other := [name for name in before if now.get(name, before[name]) != before[name]]:
            name = other[0]
            raise RunError(
                f"{folder}: {kind} were {before[name]} and are {now[name]}; expected one shape in one history: give it "
                "another name"
            )


def _with_numbers(ts: TrainState, given: TrainState, names: Container[str]) -> TrainState:
    """``ts`` with the numbers, and the key, that are given now where ``names`` has them."""
    held, now = (jax.tree_util.tree_flatten_with_path(state) for state in (ts, given))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in held[0]]
    leaves = [new if path in names else old for path, (_, old), (_, new) in zip(paths, held[0], now[0], strict=True)]
    return jax.tree.unflatten(held[1], leaves)
