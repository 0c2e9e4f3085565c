"""Observers that end a run."""

from __future__ import annotations

import time

import numpy as np

from fnet.core.checks import require
from fnet.runs.history import Event
from fnet.runs.observers.shared import Observer


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
