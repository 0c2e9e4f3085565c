"""Numbers to the services that collect them: Weights & Biases, MLflow, over their own libraries."""

from __future__ import annotations

import dataclasses
import posixpath
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fnet.core.checks import require
from fnet.core.extras import need
from fnet.core.processes import in_first
from fnet.runs.history import Event
from fnet.runs.observers.shared import Observer, rows_of_events


def wandb(*, config: Any = None, run: Any = None, **options) -> Observer:
    """A run of Weights & Biases (needs wandb): one row a step with every scalar metric, by `tensorboard`'s names.

    ``options`` are those of ``wandb.init``: ``project``, ``name``, ``mode="offline"`` with ``dir``, and so on. The run
    is begun when `fit` begins, beside any other that is active, and finished when it ends, with the exit code 0, or 1
    after an error and 255 after SIGINT or SIGTERM. Or give a ``run`` that is active: it is not finished.
    ``config``, a mapping or dataclass, is the run's; what JSON does not hold is in it as text.

    A run is continued by its id: ``wandb(id="a", resume="allow")``. W&B takes steps in rising order only: what it has
    stays, and numbers of steps before its last are left out. Offline nothing of earlier calls is known: each writes a
    folder of its own, and steps that were made twice are in both.
    Raises ValueError for options beside a run, and TypeError for a configuration that is none.
    """
    library = need("wandb", "wandb")
    given = ", ".join(options)
    require(run is None or not options, f"wandb: run and {given} are given; expected a run or how one is begun")
    settings, ready, failure = settings_of("wandb", config), rows_of_events(), failures()
    active, last = None, 0

    def observe(event: Event) -> None:
        nonlocal active, last
        error = failure(event)
        if event.kind == "start":
            active = library.init(**{"reinit": "create_new", **options}) if run is None else run
            active.config.update(settings, allow_val_change=True)
            last = active.step
        for step, numbers in ready(event):
            if active and step >= last:
                active.log(numbers, step=step)
        if event.kind == "end" and run is None and active:
            code = 0 if error is None else 1 if isinstance(error, Exception) else 255
            ended, active = active, None
            ended.finish(exit_code=code)

    return in_first(observe)


def mlflow(
    experiment: str | None = None,
    *,
    name: str | None = None,
    run_id: str | None = None,
    run: Any = None,
    tracking_uri: str | None = None,
    config: Any = None,
) -> Observer:
    """A run of MLflow (needs mlflow-skinny): every scalar metric at its step, by `tensorboard`'s names.

    A run called ``name`` of the ``experiment``, which is made if there is none, or without one of MLflow's "Default".
    It is begun when `fit` begins and ended when it ends: FINISHED, FAILED after an error, KILLED after SIGINT or
    SIGTERM. It is not MLflow's active run; give that as ``run``, ``mlflow.start_run()``: it is not ended. ``config``, a
    mapping or dataclass, gives the parameters, ``optimizer.learning_rate`` where it is nested. Characters that MLflow
    refuses in names are ``_``.

    A run is continued by its ``run_id``, or given again. MLflow would keep a second value for a step: so what it has
    stays, of each metric the steps up to its last and every parameter, and only what follows is logged.

    Without ``tracking_uri`` the numbers go where MLflow's settings say: to a server; to a file, ``sqlite:///a.db``,
    which needs all of mlflow; or to a folder, which MLflow 3 refuses without MLFLOW_ALLOW_FILE_STORE=true.
    Raises ValueError for two metrics of one name, and for an experiment, a name or an id beside a run or an id;
    TypeError for a configuration that is none.
    """
    library = need("mlflow", "mlflow")
    ways = {"run": run, "run_id": run_id, "experiment or name": experiment or name}
    ways = [way for way, value in ways.items() if value is not None]
    require(len(ways) < 2, f"mlflow: {' and '.join(ways)} are given; expected one: a run that exists, or a new one's")
    settings, ready, failure = flat_settings(settings_of("mlflow", config)), rows_of_events(), failures()
    client: Any = None
    active, last, names = "", {}, {}  # the run's id, of each metric the last step that the run began with, and its name

    def begin() -> str:
        if run_id is not None:
            return run_id
        if run is not None:
            return run.info.run_id
        known = client.get_experiment_by_name(experiment or "Default")
        place = known.experiment_id if known else client.create_experiment(experiment or "Default")
        return client.create_run(place, run_name=name).info.run_id

    def renamed(given: str) -> str:
        taken = posixpath.normpath("/" + re.sub(r"[^\w\-. /]", "_", given)).lstrip("/") or "_"
        if names.setdefault(taken, given) != given:
            raise ValueError(
                f"mlflow: {names[taken]!r} and {given!r} are both {taken!r} in MLflow, where names have letters, "
                "digits and _-./ only; expected names that differ: give one another"
            )
        return taken

    def start() -> None:
        nonlocal client, active
        client = library.MlflowClient(tracking_uri)
        active = begin()
        if run_id is not None:
            client.update_run(active, "RUNNING")
        held = client.get_run(active).data
        last.update((key, max(m.step for m in client.get_metric_history(active, key))) for key in held.metrics)
        names.clear()
        new = {renamed(key): str(value) for key, value in settings.items()}
        params = [library.entities.Param(key, value) for key, value in new.items() if key not in held.params]
        client.log_batch(active, params=params)
        names.clear()

    def observe(event: Event) -> None:
        nonlocal active
        error = failure(event)
        if event.kind == "start":
            start()
        now, metrics = int(1000 * time.time()), []
        for step, numbers in ready(event):
            keys = {renamed(key): value for key, value in numbers.items()}
            new = [(key, value) for key, value in keys.items() if step > last.get(key, -1)]
            metrics += [library.entities.Metric(key, value, now, step) for key, value in new]
        if active:
            client.log_batch(active, metrics)
        if event.kind == "end" and run is None and active:
            status = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
            ended, active = active, ""
            client.set_terminated(ended, status)

    return in_first(observe)


def settings_of(who: str, config: Any) -> dict[str, Any]:
    """The configuration as JSON holds it: dataclasses are mappings, arrays lists, and what else there is its text."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(name): plain(inner) for name, inner in value.items()}
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            return np.asarray(value).tolist()
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

    settings = plain({} if config is None else config)
    if not isinstance(settings, dict):
        raise TypeError(
            f"{who}: config is a {type(config).__name__}; expected a dataclass or a mapping of names to values"
        )
    return settings


def flat_settings(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Every value by name, ``optimizer.learning_rate``."""
    flat = {}
    for name, value in settings.items():
        flat |= (
            flat_settings(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
        )
    return flat


def failures() -> Callable[[Event], BaseException | None]:
    """``failure(event)``: the error that ends the run, if one does: `fit` tells of the end while it handles it.

    What the caller of `fit` may be handling is another, there at the start too.
    """
    outside = None

    def failure(event: Event) -> BaseException | None:
        nonlocal outside
        error = sys.exception()
        outside = error if event.kind == "start" else outside
        return None if error is outside else error

    return failure
