"""What a run is asked to keep: `Run`, its options, and its folder's path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fnet.core.checks import require_counts
from fnet.core.files import first_line


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
    if not isinstance(run.resume, bool | str) or run.resume not in (False, True, "auto", "newest whole"):
        raise RunError(f"Run: resume = {run.resume!r}; expected False, True, 'auto' or 'newest whole'")
    counts = {"save_every": run.save_every, "keep_last": run.keep_last, "keep_every": run.keep_every}
    require_counts("Run", **counts, best=run.best)
    if run.keep_last is None:
        raise RunError("Run: keep_last = None; expected a whole number of at least 1: keep_every=1 keeps them all")
    if isinstance(run.save_seconds, bool) or not isinstance(run.save_seconds, int | float) or not run.save_seconds > 0:
        raise RunError(f"Run: save_seconds = {run.save_seconds!r}; expected a number above 0")


def check_path(folder: Path) -> None:
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
def written(folder: Path) -> Iterator[None]:
    """RunError where what is written within cannot be."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written to ({first_line(error)}); expected a folder that can, on a disk with room: "
            "name another, or free some"
        ) from error
