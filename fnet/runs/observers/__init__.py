"""Observers: functions of an `Event` that watch a run from the host. They may read everything and change nothing.

    fit(..., observers=[progress("digits"), tensorboard("runs/a/events"), time_limit(3600)])

`fit` looks up between chunks of steps, so what an observer sees of the state is where a chunk ended: "every n steps"
means at the first chunk's end from each multiple of n on. None of them keeps anything of a state after its call.

What writes files makes none before the run starts, and refuses those that are there. With ``resume``, for a run that
is continued, it goes on with them: what they hold from the step on where the run continues is replaced. What `wandb`
and `mlflow` have logged cannot be replaced: they keep it, and log from there on.
"""

from fnet.runs.observers.ending import terminate_on_nonfinite, time_limit
from fnet.runs.observers.files import csv, histograms, profile, samples, tensorboard
from fnet.runs.observers.screen import progress
from fnet.runs.observers.services import mlflow, wandb
from fnet.runs.observers.shared import Observer

__all__ = [
    "Observer",
    "csv",
    "histograms",
    "mlflow",
    "profile",
    "progress",
    "samples",
    "tensorboard",
    "terminate_on_nonfinite",
    "time_limit",
    "wandb",
]
