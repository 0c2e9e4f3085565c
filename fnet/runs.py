"""A run's folder: its configuration, its metrics and its checkpoints, so that it can be killed, resumed and read.

folder/config.json       the configuration
folder/environment.json  versions, devices and settings of the process that began or resumed it last
folder/metrics.jsonl     one object for each evaluation and each epoch
folder/summary.json      steps, seconds and bytes, when a call of `fit` has ended
folder/nonfinite.json    where the run stopped being finite, if it did
folder/checkpoints/      `fnet.checkpoint`
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from fnet.checkpoint import (
    delete_checkpoint,
    host_leaves,
    load_checkpoint,
    save_checkpoint,
    saved_steps,
    sweep,
)
from fnet.files import first_line, whole_file
from fnet.types import TrainState


class RunError(ValueError):
    """A run's folder cannot be used; the message names it, what was expected and the remedy."""


class RunWarning(UserWarning):
    """A run is resumed under other circumstances than it was saved under."""


class Run(NamedTuple):
    """Where and how `fit` keeps a run.

    A new run needs a folder that does not exist or is empty. With ``resume`` it continues from the last complete
    checkpoint, or from the beginning if there is none yet. ``config``, a dataclass or a mapping that JSON can hold, is
    stored with it and must be the same when it is resumed, save for the names in ``free``.
    """

    folder: str | Path
    config: Any = MappingProxyType({})
    resume: bool = False
    save_every: int | None = None  # steps; None saves by the clock alone, as soon as save_seconds have passed
    save_seconds: float = 60.0
    keep_last: int = 2  # checkpoints
    keep_every: int | None = None  # steps: a checkpoint of a multiple is never deleted
    keep_best: str | None = (
        None  # a result's name, "validation_loss": each evaluation is saved, and the least one stays
    )
    greatest: bool = False  # of keep_best
    free: tuple[str, ...] = ("epochs", "steps", "run_dir", "name", "resume", "quiet", "explain", "cache")


class OpenRun:
    """A run's folder while it is held; checkpoints are written by a thread of its own, one at a time."""

    def __init__(self, run: Run, folder: Path, config: dict[str, Any]):
        self.run, self.folder, self.config, self.environment = run, folder, config, environment()
        self.checkpoints = folder / "checkpoints"
        self.saved_at = time.monotonic()
        self.last_saved: int | None = None
        self._results: dict[int, dict[str, Any]] = {}  # of the evaluations, by step
        self._worker, self._writing = ThreadPoolExecutor(1, "fnet-checkpoint"), None

    def restore(self, like: TrainState, plan: dict[str, Any]) -> tuple[TrainState, dict[str, Any], list[dict]] | None:
        """The state, the meta and the rows of the metrics that a resumed run continues from; None where it begins."""
        rows = self._read_metrics()
        steps = saved_steps(self.checkpoints) if self.run.resume else {}
        if not steps:
            self._write_metrics([])
            return None
        ts, meta = load_checkpoint(list(steps.values())[-1], like)
        if differing := _differences(meta["plan"], plan, "as saved"):
            raise RunError(
                f"{self.folder} was run on other data or with other numbers: {differing}. "
                "Resume it with its own, or name another folder"
            )
        if differing := _differences(meta["environment"], self.environment, "as saved"):
            warnings.warn(f"{self.folder} is resumed, not to the bit perhaps: {differing}", RunWarning, stacklevel=4)
        self.last_saved = meta["step"]
        rows = [row for row in rows if row["step"] <= meta["step"]]
        self._write_metrics(rows)
        self._results = {row["step"]: row for row in rows if row["kind"] == "evaluation"}
        return ts, meta, rows

    def record(self, kind: str, step: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Append a row to the metrics."""
        numbers = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        if kind == "evaluation":
            self._results[step] = numbers
        with (self.folder / "metrics.jsonl").open("a") as file:
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
        meta = {**meta, "config": self.config, "environment": self.environment, "results": results}
        self._writing = self._worker.submit(self._save, step, host_leaves(ts), meta)
        self.last_saved, self.saved_at = step, time.monotonic()
        return True

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Write what the call did and took."""
        _write_json(self.folder / "summary.json", summary)

    def wait(self) -> None:
        """Until what is being written is complete."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        self._worker.shutdown(wait=True)

    def _save(self, step: int, leaves, meta) -> None:
        save_checkpoint(self.checkpoints, step, leaves, meta)
        steps = saved_steps(self.checkpoints)
        kept = set(list(steps)[-self.run.keep_last :])
        if self.run.keep_every:
            kept |= {step for step in steps if step % self.run.keep_every == 0}
        if self.run.keep_best:
            results = {step: self._results.get(step, {}).get(self.run.keep_best) for step in steps}
            known = {step: value for step, value in results.items() if value is not None and np.isfinite(value)}
            if known:
                kept.add((max if self.run.greatest else min)(known, key=lambda step: known[step]))
        for step in steps.keys() - kept:
            delete_checkpoint(steps[step])

    def _read_metrics(self) -> list[dict[str, Any]]:
        """The rows on disk; the last may have been cut off by whatever ended the process."""
        path, rows = self.folder / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def _write_metrics(self, rows) -> None:
        with whole_file(self.folder / "metrics.jsonl") as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def open_run(run: Run) -> Iterator[OpenRun]:
    """Hold the run's folder, which no other process can meanwhile; RunError where it cannot be used."""
    _check(run)
    folder, config = Path(run.folder).absolute(), _plain(run.config)
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    begun = {
        ".lock",
        "checkpoints",
        ".config.json.part",
    }  # what a process leaves that is killed before it writes config.json
    if set(held) <= begun and not any((folder / "checkpoints").glob("*")):
        held = []
    if held and "config.json" not in held:
        raise RunError(
            f"{folder} holds {', '.join(sorted(held)[:4])} and no config.json, and is left as it is; expected a run's "
            "folder or an empty one: name another"
        )
    if held and not run.resume:
        raise RunError(
            f"{folder} holds {', '.join(sorted(held)[:4])} already and is left as it is; expected an empty folder: "
            "resume the run that is there with resume=True, or name another"
        )
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise RunError(f"{folder} cannot be written to ({error}); expected a folder that can: name another") from error
    with lock:
        _lock(folder, lock)
        if (folder / "config.json").exists():
            _compare_config(run, folder, _read_config(folder / "config.json"), config)
        _write_json(folder / "config.json", config)
        sweep(folder / "checkpoints")
        opened = OpenRun(run, folder, config)
        _write_json(folder / "environment.json", opened.environment)
        try:
            yield opened
        finally:
            opened.close()


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


def _check(run: Run) -> None:
    for name in ("save_every", "keep_last", "keep_every"):
        value = getattr(run, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise RunError(f"Run: {name} = {value!r}; expected a whole number of at least 1")
    if not run.save_seconds > 0:
        raise RunError(f"Run: save_seconds = {run.save_seconds!r}; expected a number above 0")


def _plain(config: Any) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
    if not isinstance(fields, Mapping):
        raise RunError(
            f"Run: config is a {type(config).__name__}; expected a dataclass or a mapping of names to values"
        )
    return json.loads(json.dumps(dict(fields), default=str))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if not isinstance(saved := json.loads(path.read_text()), dict):
            raise ValueError("it holds no names and values")
    except ValueError as error:
        raise RunError(
            f"{path} cannot be read ({first_line(error)}); expected the configuration that the run began with, as "
            "JSON: put it there, or name another folder"
        ) from error
    return saved


def _compare_config(run: Run, folder: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    held, now = ({name: value for name, value in c.items() if name not in run.free} for c in (saved, given))
    if differing := _differences(held, now, "as begun"):
        raise RunError(
            f"{folder} is a run of another configuration: {differing}. "
            "Resume it with its own, which config.json holds, or name another folder"
        )


def _differences(saved: Mapping[str, Any], given: Mapping[str, Any], when: str) -> str:
    """What is not the same in both, in words; nothing where all is. NaN is NaN here."""
    names = sorted(n for n in {**saved, **given} if json.dumps(saved.get(n)) != json.dumps(given.get(n)))
    return "; ".join(
        f"{n}: expected {saved.get(n, 'nothing')!r} ({when}), found {given.get(n, 'nothing')!r}" for n in names
    )


def _lock(folder: Path, lock) -> None:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise RunError(
            f"{folder} is in use by process {owner}; expected a folder that no run writes to: "
            "wait for its end, or name another"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()


def _write_json(path: Path, value: Any) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")
