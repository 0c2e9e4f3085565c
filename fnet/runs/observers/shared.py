"""What several observers do alike: numbers of an event, and when something is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fnet.core.checks import is_whole, require
from fnet.runs.arguments import in_steps
from fnet.runs.history import Event

Observer = Callable[[Event], str | None]
"""What `fit` calls with each `Event`, between chunks; it may return "stop"."""


def require_bins(who: str, bins: int) -> None:
    """Raise ValueError unless this is a number of bins."""
    require(is_whole(bins), f"{who}: bins = {bins!r}; expected a whole number of at least 1")


def scalars(event: Event) -> dict[str, float]:
    """The numbers of a chunk, an evaluation or an epoch, as ``chunk/loss``; arrays are left out."""
    metrics = event.metrics if event.kind in ("chunk", "evaluation", "epoch") else {}
    return {f"{event.kind}/{name}": float(value) for name, value in metrics.items() if np.ndim(value) == 0}


def rows_of_events() -> Callable[[Event], list[tuple[int, dict[str, float]]]]:
    """``ready(event)``: step and numbers, step after step, of what the event adds nothing to any more.

    `fit` tells of a chunk before it does of the evaluations and epochs in it, which are of earlier steps.
    """
    rows: dict[int, dict[str, float]] = {}

    def ready(event: Event) -> list[tuple[int, dict[str, float]]]:
        complete = [] if event.kind in ("evaluation", "epoch") else sorted(rows.items())
        if complete:
            rows.clear()
        if numbers := scalars(event):
            rows.setdefault(event.step, {}).update(numbers)
        return complete

    return ready


def due_every(who: str, every: tuple[int, str]) -> Callable[..., bool]:
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


def entries(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Every number by name, those of an array with their place."""
    return {
        name + "".join(f"[{i}]" for i in place): float(number)
        for name, value in metrics.items()
        for place, number in np.ndenumerate(np.asarray(value))
    }
