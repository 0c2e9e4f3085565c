"""Observers: functions of an `Event` that watch a run from the host. They may read everything and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fnet.history import Event


def jsonl(path: str | Path, **fields) -> Callable[[Event], None]:
    """Append one JSON object per epoch to the file at ``path``: ``fields``, the epoch, the step and every metric."""
    path = Path(path)

    def observe(event: Event) -> None:
        if event.kind == "epoch":
            numbers = {name: np.asarray(value).tolist() for name, value in event.metrics.items()}
            row = {**fields, "epoch": event.epoch, "step": event.step, **numbers}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    return observe


def progress(title: str = "training", console=None) -> Callable[[Event], None]:
    """A progress bar that stands from the start of the run on, also while it compiles (needs rich).

    Where the console is no terminal, one plain line per epoch instead.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = console or Console()
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=15), MofNCompleteColumn()
    bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"), console=console)
    task = bar.add_task(f"{title}: compiling", total=None, numbers="")

    def numbers(metrics, names) -> str:
        return "  ".join(f"{name.replace('_', ' ')} {float(metrics[name]):.4f}" for name in names if name in metrics)

    def observe(event: Event) -> None:
        if event.kind == "epoch" and not console.is_terminal:
            shown = numbers(event.metrics, ("loss", "accuracy", "validation_loss", "validation_accuracy"))
            console.print(f"{title}: epoch {event.epoch}/{event.epochs}  {shown}", soft_wrap=True)
        elif console.is_terminal:
            if event.kind == "start":
                bar.start()
            bar.update(task, completed=event.epoch, total=event.epochs)
            if event.kind == "compile":
                bar.update(task, description=title)
            if event.kind == "epoch":
                bar.update(task, numbers=numbers(event.metrics, ("loss", "validation_accuracy")))
            if event.kind == "end":
                bar.stop()

    return observe
