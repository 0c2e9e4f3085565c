"""What a run looks like while it runs: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fnet.core.extras import need
from fnet.core.processes import in_first
from fnet.runs.history import Event
from fnet.runs.observers.shared import Observer


def progress(title: str = "training", console=None) -> Observer:
    """A progress bar that stands from the start of the run on, also while it compiles (needs rich).

    Beneath it the last chunk's loss, accuracy and learning rate, and the losses and accuracies of the last evaluation.
    Where the console is no terminal, or the environment has CI=true, plain lines instead: that it compiles, and one
    per epoch. A run that does not begin at step 0 says where it continues, one that a rule has stopped where and why.
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
        elif event.kind == "start":
            say("compiling")
        elif event.kind == "epoch":
            numbers = _line(event.metrics, ("loss", "accuracy", *_of_sets(event.metrics)))
            say(f"epoch {event.epoch}/{event.epochs}  {numbers}")
        if event.ended:
            say(f"stopped at step {event.ended.step}/{event.steps}: {event.ended.reason}")

    return in_first(observe)


def _line(metrics: Mapping[str, Any], names: Sequence[str]) -> str:
    shown = {name: metrics[name] for name in names if name in metrics and np.ndim(metrics[name]) == 0}
    form = lambda name: ".2e" if name == "learning_rate" else ".4f"  # noqa: E731
    return "  ".join(f"{name.replace('_', ' ')} {float(value):{form(name)}}" for name, value in shown.items())


def _of_sets(metrics: Mapping[str, Any]) -> list[str]:
    """The losses and accuracies of the sets that were evaluated."""
    sets = [name.removesuffix("_loss") for name in metrics if name.endswith("_loss")]
    return [f"{held}_{name}" for held in sets for name in ("loss", "accuracy")]
