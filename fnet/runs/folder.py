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
folder/.lock             `fnet.locks`, while it is written to
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.files import first_line, whole_file
from fnet.core.programs import Line, difference
from fnet.layers.children import init_of
from fnet.runs import locks
from fnet.runs.checkpoint import (
    CheckpointError,
    delete_checkpoint,
    host_leaves,
    load_checkpoint,
    read_meta,
    save_checkpoint,
    saved_results,
    saved_steps,
    sweep,
)
from fnet.types import Layer, PyTree, TrainState, named_leaves, require_counts, require_layer

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


class RunError(ValueError):
    """A run's folder cannot be used; the message names it, what was expected and the remedy."""


class RunWarning(UserWarning):
    """A run is resumed under other circumstances than it was saved under."""


class Run(NamedTuple):
    """Where and how `fit` keeps a run.

    A new run needs a folder that does not exist or is empty. With ``resume=True`` the one that is there continues from
    its last checkpoint, or from the beginning if there is none yet; with "auto" it does, or begins where there is none,
    so that a script may be started again and again; with "newest whole" it continues from the last checkpoint that is
    not damaged. ``config``, a dataclass or a mapping that JSON can hold, is
    stored with it and must be the same when it is resumed, save for the names in ``free``. So must be what the run
    computes: its step and evaluation (compared as traced programs, whatever functions they are made of), samples of its
    data, and its numbers. What is changed knowingly is named in ``accept``, by the names that the error gives, ``*``
    standing for anything: the run goes on with what is given now, and folder/changes.jsonl says so. An optimizer whose
    state has other leaves, and another rule to stop, begin anew.

    What a run has kept by ``keep_best`` and ``keep_every`` it keeps when it is resumed by others, or by none. Results
    of an evaluation that was changed are not compared with those of before.
    """

    folder: str | Path
    config: Any = MappingProxyType({})
    resume: bool | str = False  # True, "auto", "newest whole"
    save_every: int | None = None  # steps; None saves by the clock alone, as soon as save_seconds have passed
    save_seconds: float = 60.0
    keep_last: int = 2  # checkpoints
    keep_every: int | None = None  # steps: a checkpoint of a multiple is never deleted
    keep_best: str | None = None  # a result, "validation_loss": each evaluation is saved, and the least one stays
    greatest: bool = False  # of keep_best
    best: int = 1  # so many of them
    verify: bool = True  # each checkpoint is read back, every leaf of it, before it counts as one
    accept: tuple[str, ...] = ()  # ("step", "opt_state/hyper/learning_rate*"): may differ from what was saved
    free: tuple[str, ...] = ("epochs", "steps", "run_dir", "name", "resume", "quiet", "explain", "cache")


class OpenRun:
    """A run's folder while it is held; checkpoints are written by a thread of its own, one at a time."""

    def __init__(self, run: Run, folder: Path, config: dict[str, Any]):
        self.run, self.folder, self.config, self.environment = run, folder, config, environment()
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
        foreign = _different(meta["environment"], self.environment)
        names = _different(saved, about)
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
            words = _in_words(foreign, meta["environment"], self.environment, "as saved")
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
        others = any(fnmatchcase(name, pattern) for name in names for pattern in EVALUATION)
        self.evaluated_since = meta["step"] if others else meta["evaluated_since"]
        ended = [{**rule, "until": meta["step"]} if others and not rule["until"] else rule for rule in meta["best"]]
        mine = [{**rule, "after": self.evaluated_since} for rule in self.bests]
        going = [(rule["name"], rule["greatest"]) for rule in mine]
        before = [r for r in ended if r["until"] or (r["name"], r["greatest"]) not in going]
        self.bests = [*before, *mine]
        self.multiples = sorted({*meta["multiples"], *self.multiples})
        return ts, meta, rows

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
                    whole = _newest_whole(paths[paths.index(path) + 1 :])
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
                words.append(_in_words([name], saved, about, "as saved"))
        return "; ".join(words)

    def begin(self, rows: list[dict[str, Any]], programs: Mapping[str, Sequence[Line]] = MappingProxyType({})) -> None:
        """Write what a run has from its beginning on, and the metrics as far as it continues."""
        with _written(self.folder):
            _write_json(self.folder / "config.json", self.config)
            _write_json(self.folder / "environment.json", self.environment)
            _write_json(self.folder / "programs.json", {n: [line.text for line in p] for n, p in programs.items()})
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
        with _written(self.folder), (self.folder / "metrics.jsonl").open("a") as file:
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
        self._writing = self._worker.submit(self._save, step, host_leaves(ts), meta)
        self.last_saved, self.saved_at = step, time.monotonic()
        return True

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Write what the call did and took."""
        with _written(self.folder):
            _write_json(self.folder / "summary.json", summary)

    def wait(self) -> None:
        """Until what is being written is complete."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        self._worker.shutdown(wait=True)

    def _save(self, step: int, leaves, meta) -> None:
        save_checkpoint(self.checkpoints, step, leaves, meta, verify=self.run.verify)
        self._mark(step)
        steps = saved_steps(self.checkpoints)
        kept = set(list(steps)[-self.run.keep_last :])
        kept |= {step for step in steps if any(step % every == 0 for every in self.multiples)}
        kept |= {step for step, path in steps.items() if saved_results(path) is None}  # a damaged one may be mended
        for rule in self.bests:
            kept |= {*best_first(steps, rule)[: rule["count"]]}
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


def _newest_whole(newest_first: Sequence[Path]) -> tuple[str, dict[str, Any]] | None:
    """The name and the meta of the newest checkpoint that is whole."""
    for path in newest_first:
        try:
            return path.name, read_meta(path)
        except CheckpointError:
            continue
    return None


def _meta_of(steps: Mapping[int, Path], at: int) -> dict[str, Any]:
    """What a checkpoint says of itself; where it is damaged the error names an older one that is whole."""
    try:
        return read_meta(steps[at])
    except CheckpointError as error:
        whole = _newest_whole([path for step, path in steps.items() if step < at][::-1])
        remedy = f". {whole[0]} is whole: load_run(..., which={whole[1]['step']}) takes it" if whole else ""
        raise CheckpointError(f"{error}{remedy}") from error


def best_first(steps: Mapping[int, Path], rule: Mapping[str, Any]) -> list[int]:
    """The steps whose checkpoints hold a finite result that the rule looks at, the best first, of equal ones the first.

    A rule is a ``name``, whether the ``greatest`` is sought, and ``after`` and ``until`` which step.
    """
    sign, known = -1 if rule["greatest"] else 1, {}
    for step, path in _looked_at(steps, rule).items():
        value = (saved_results(path) or {}).get(rule["name"])
        if isinstance(value, int | float) and np.isfinite(value):
            known[step] = sign * value
    return sorted(known, key=lambda step: (known[step], step))


def _looked_at(steps: Mapping[int, Path], rule: Mapping[str, Any]) -> dict[int, Path]:
    return {step: path for step, path in steps.items() if rule["after"] < step <= (rule["until"] or step)}


def load_run(folder: str | Path, model: Layer, x: PyTree, which: str | int = "last") -> tuple[PyTree, PyTree]:
    """``params, state`` of a model that a run has trained; nothing is written, and the optimizer is not needed.

    Args:
        folder: of the run.
        model: as it was trained.
        x: inputs like those that it was made for, or their shapes.
        which: "last", the step of a checkpoint that is there, or "best": that of ``Run(keep_best=...)``, or else what
            `early_stopping` kept.

    Raises RunError where the folder holds no such checkpoint, CheckpointError where it is damaged or another model's.

    >>> from fnet.layers import dense
    >>> load_run("gone", dense(1), jnp.ones((1, 1)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fnet.runs.RunError: ...gone holds no checkpoints; expected the folder of a run: fnet.Run(folder) keeps them
    """
    require_layer("load_run: model", model)
    folder = Path(folder).expanduser().absolute()
    steps = saved_steps(folder / "checkpoints")
    if not steps:
        raise RunError(f"{folder} holds no checkpoints; expected the folder of a run: fnet.Run(folder) keeps them")
    shapes = jax.eval_shape(lambda key: init_of(model, key, x), jax.random.key(0))
    params, state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    last = list(steps)[-1]
    if which != "best":
        at = last if which == "last" else which
        if isinstance(at, bool) or not isinstance(at, int | np.integer) or at not in steps:
            there = ", ".join(map(str, steps))
            raise RunError(f"load_run: which = {which!r}; expected 'last', 'best' or the step of a checkpoint: {there}")
        meta = _meta_of(steps, int(at))
        loaded = load_checkpoint(steps[at], {"params": params, "state": state}, meta, parts=("params", "state"))
        return loaded["params"], loaded["state"]
    whole = _newest_whole(list(steps.values())[::-1])  # where the last is damaged the best need not be
    if whole and whole[1]["best"]:
        rule = whole[1]["best"][-1]
        for path in _looked_at(steps, rule).values():
            if saved_results(path) is None:  # it may be the best
                read_meta(path)
        ranked = best_first(steps, rule)
        if not ranked:
            since = f" after step {rule['after']}" if rule["after"] else ""
            raise RunError(
                f"{folder} has no checkpoint with a finite {rule['name']}{since}; expected one: which='last' takes its "
                "last"
            )
        return load_run(folder, model, x, ranked[0])
    meta = _meta_of(steps, last)  # which alone holds what its rule has kept
    if not any(leaf["path"].startswith("stopping/weights/") for leaf in meta["leaves"]):
        raise RunError(
            f"{folder} kept no best state; expected a run with Run(keep_best='validation_loss') or early_stopping: "
            "which='last' takes its last"
        )
    best = jnp.zeros((), next(leaf["kind"] for leaf in meta["leaves"] if leaf["path"] == "stopping/best").split("(")[0])
    like = {"stopping": {"best": best, "weights": {"0": params, "1": state}}}
    kept = load_checkpoint(steps[last], like, meta, parts=("stopping/best", "stopping/weights"))["stopping"]
    if not np.isfinite(kept["best"]):
        raise RunError(
            f"{folder}: no evaluation was made, or none was finite, so that there is no best state; expected a finite "
            "result of one evaluation at least: which='last' takes its last"
        )
    return kept["weights"]["0"], kept["weights"]["1"]


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
    """Hold the run's folder, which no other process can meanwhile; RunError where it cannot be used."""
    folder, config = Path(run.folder).expanduser().absolute(), _plain(run.config)
    _check_path(folder)
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
    with _written(folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            with _written(folder):
                ended = stack.enter_context(locks.held(folder / ".lock"))
        except locks.Held as error:
            raise RunError(
                f"{folder} is in use by {error}; expected a folder that no run writes to: wait for its end, or name "
                "another"
            ) from None
        if ended:
            warnings.warn(f"{folder} was held by {ended}, which has ended", RunWarning, stacklevel=4)
        if (folder / "config.json").exists():
            _compare_config(run, folder, _read_config(folder / "config.json"), config)
        with _written(folder):
            sweep(folder / "checkpoints")
        opened = OpenRun(run, folder, config)
        try:
            yield opened
        finally:
            opened.close()


def _check_path(folder: Path) -> None:
    """Require a path below which orbax finds again what it has written."""
    parts = folder.parts[1:]  # without the root, or the drive
    if "\0" in str(folder) or any(len(part.encode(errors="replace")) > 200 for part in parts):
        raise RunError(f"{str(folder)!r:.300} is no path of a folder; expected one without a zero, of short names")
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise RunError(
            f"{str(folder)!r} has bytes in its path that are no text, which orbax cannot take; expected a path of "
            "characters: name another folder"
        ) from None
    if any(part.endswith("gs:") for part in parts):  # below the last too there are checkpoints
        raise RunError(
            f"{folder} has a part that ends with gs:, which orbax takes for Google's storage; expected a path of this "
            "machine: name another folder"
        )
    if odd := sorted(set("[]*?\\").intersection("".join(parts))):
        raise RunError(
            f"{folder} has {' '.join(odd)} in its path, below which orbax finds no checkpoints again; expected a path "
            "without [ ] * ? and backslash: name another folder"
        )


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """RunError where what is written within cannot be."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written to ({first_line(error)}); expected a folder that can, on a disk with room: "
            "name another, or free some"
        ) from error


def numbers_of(ts: TrainState) -> dict[str, Any]:
    """The numbers of the optimizer and of the rule to stop by path, which a checkpoint overrides."""
    held = named_leaves({"opt_state": ts.opt_state, "stopping": ts.stopping})
    return {path: shortest(leaf) for path, leaf in held if "hyper" in path.split("/") and leaf.size < 1000}


def shortest(numbers: Any) -> Any:
    """The numbers as they are written: 0.1, where float32 holds 0.10000000149011612."""
    array = np.asarray(numbers)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.tolist()
    return np.array([float(str(number)) for number in array.ravel()]).reshape(array.shape).tolist()


def environment() -> dict[str, Any]:
    """What the bits of a run depend on beside its configuration."""
    settings: Any = jax.config
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {
        **versions,
        "fnet": _fnet_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "x64": bool(settings.jax_enable_x64),
        "matmul_precision": settings.jax_default_matmul_precision,
        "prng": settings.jax_default_prng_impl,
        "threefry_partitionable": bool(settings.jax_threefry_partitionable),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _fnet_version() -> str:
    return sys.modules["fnet"].__version__


def check_options(run: Run) -> None:
    """Require of a run's options that they are what they are called."""
    if not isinstance(run.folder, str | os.PathLike) or not os.fspath(run.folder):
        raise RunError(f"Run: folder = {run.folder!r}; expected the path of a folder")
    for name, given in (("accept", run.accept), ("free", run.free)):
        if not isinstance(given, tuple | list) or not all(isinstance(word, str) for word in given):
            raise RunError(f"Run: {name} = {given!r}; expected a tuple of names, such as ('step',)")
    if not isinstance(run.keep_best, str | None):
        raise RunError(f"Run: keep_best = {run.keep_best!r}; expected the name of a result, such as 'validation_loss'")
    for name in ("greatest", "verify"):
        if not isinstance(getattr(run, name), bool):
            raise RunError(f"Run: {name} = {getattr(run, name)!r}; expected True or False")
    if run.keep_best is None and (run.greatest or run.best != 1):
        what = f"greatest = {run.greatest} and best = {run.best}"
        raise RunError(f"Run: {what} say which results are the best; expected keep_best too, the name of a result")
    if not any(run.resume is known for known in (False, True)) and not (
        isinstance(run.resume, str) and run.resume in ("auto", "newest whole")
    ):
        raise RunError(f"Run: resume = {run.resume!r}; expected False, True, 'auto' or 'newest whole'")
    counts = {"save_every": run.save_every, "keep_last": run.keep_last, "keep_every": run.keep_every}
    require_counts("Run", **counts, best=run.best)
    if run.keep_last is None:
        raise RunError("Run: keep_last = None; expected a whole number of at least 1: keep_every=1 keeps them all")
    if isinstance(run.save_seconds, bool) or not isinstance(run.save_seconds, int | float) or not run.save_seconds > 0:
        raise RunError(f"Run: save_seconds = {run.save_seconds!r}; expected a number above 0")


def _plain(config: Any, name: str = "config") -> Any:
    """The configuration as JSON holds it; RunError names what it cannot hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        if odd := [key for key in config if not isinstance(key, (str, int, float))]:
            raise RunError(f"Run: {name} has the key {odd[0]!r}; expected text, as it is stored in a file")
        return {str(key): _plain(value, f"{name}[{key!r}]") for key, value in config.items()}
    if name != "config" and isinstance(config, (np.ndarray, np.generic, jax.Array)):
        config = np.asarray(config).tolist()
    if name != "config" and isinstance(config, (list, tuple, set, frozenset, range)):
        values = sorted(config, key=repr) if isinstance(config, (set, frozenset)) else config
        return [_plain(value, f"{name}[{i}]") for i, value in enumerate(values)]
    if name != "config" and (config is None or isinstance(config, (str, int, float))):
        return config
    if name != "config" and isinstance(config, (Path, np.dtype, type, enum.Enum)):
        return str(config)
    expected = "a dataclass or a mapping of names to values" if name == "config" else "what JSON holds"
    raise RunError(f"Run: {name} is of type {type(config).__name__}; expected {expected}, as it is stored in a file")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if not isinstance(saved := json.loads(path.read_text()), dict):
            raise ValueError("it holds no names and values")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read ({first_line(error)}); expected the configuration that the run began with, as "
            "JSON: put it there, or name another folder"
        ) from error
    return saved


def _compare_config(run: Run, folder: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    held, now = ({name: value for name, value in c.items() if name not in run.free} for c in (saved, given))
    if names := _different(held, now):
        raise RunError(
            f"{folder} is a run of another configuration: {_in_words(names, held, now, 'as begun')}. "
            "Resume it with its own, which config.json holds, or name another folder"
        )


def _different(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The names of what is not the same in both. NaN is NaN here."""
    text = lambda value: json.dumps(value, sort_keys=True)  # noqa: E731
    return sorted(n for n in {**saved, **given} if text(saved.get(n)) != text(given.get(n)))


def _in_words(names: Sequence[str], saved: Mapping[str, Any], given: Mapping[str, Any], when: str) -> str:
    return "; ".join(
        f"{n}: expected {saved.get(n, 'nothing')!r} ({when}), found {given.get(n, 'nothing')!r}" for n in names
    )


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


def _write_json(path: Path, value: Any) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")
