"""Several processes of one run: how they begin, and what they agree on.

Every process calls the same functions with the same arguments in the same order, and the devices of all are one mesh.
What they could differ in, such as clocks, signals, and errors of files and data, they agree on by jax's coordination
service, which is apart from what runs on the devices: nothing waits for a program, and no program for it.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fnet.core.checks import is_whole
from fnet.core.files import first_line
from fnet.core.jax_insides import backends_are_initialized, coordination

__all__ = ["ProcessError", "is_first", "start"]

WAIT = 24 * 3600  # seconds; jax ends the processes of one that is gone long before
WORD = 30  # seconds that one which has failed waits for the others to hear of it, or for jax to say which is gone
EXAMPLE = "start('10.0.0.1:1234', num_processes=2, process_id=0), and process_id=1 in the second"


class ProcessError(RuntimeError):
    """Another process of the run has failed, or is gone; the message says which, and of what."""


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: int | list[int] | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 10,
) -> None:
    """Begin one run of several processes, on one machine or many; the first thing of jax that a program calls.

    It is `jax.distributed.initialize`, which finds out the arguments by itself under SLURM, Open MPI, Kubernetes and on
    Cloud TPU. Elsewhere they are given: the address and a free port of the first process, how many processes there are,
    and which of them this is. Every process then sees the devices of all, and `fnet.mesh` takes them.

    ``initialization_timeout`` is how many seconds each waits for the others to begin. A process that is not heard of
    for ``heartbeat_timeout`` seconds is gone, and jax ends the others.

    Raises ValueError for what is not given and not found, and RuntimeError if jax has begun already.
    """
    if jax.distributed.is_initialized():
        raise RuntimeError("processes.start: it has been called before; expected one call at the program's beginning")
    if backends_are_initialized():
        raise RuntimeError(
            "processes.start: jax has looked for its devices already; expected this call before any other that "
            "computes or asks for devices: make it the program's first"
        )
    given = {"num_processes": num_processes, "process_id": process_id}
    for name, value in given.items():
        if value is not None and not is_whole(value, name == "num_processes"):
            raise ValueError(f"processes.start: {name} = {value!r}; expected a whole number: {EXAMPLE}")
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise ValueError(
            f"processes.start: process_id = {process_id} of {num_processes} processes; expected one from 0 to "
            f"{num_processes - 1}"
        )
    if coordinator_address is not None and not str(coordinator_address).rpartition(":")[2].isdigit():
        raise ValueError(
            f"processes.start: coordinator_address = {coordinator_address!r}; expected the first process' address and "
            f"a free port of it: {EXAMPLE}"
        )
    # its handler of SIGTERM would swallow it; `fit` has one of its own, by which all processes save and leave
    jax.config.update("jax_enable_preemption_service", False)
    waits = threading.Timer(min(10, initialization_timeout / 2), _still_waits, [initialization_timeout])
    waits.daemon = True
    waits.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids=local_device_ids,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=2 * heartbeat_timeout,
        )
    except ValueError as error:
        missing = [
            name for name, value in {"coordinator_address": coordinator_address, **given}.items() if value is None
        ]
        if not missing:
            raise
        raise ValueError(
            f"processes.start: {', '.join(missing)} not given, and found neither by SLURM, Open MPI, Kubernetes nor "
            f"Cloud TPU ({error}); expected to run under one of them, or all three: {EXAMPLE}"
        ) from error
    finally:
        waits.cancel()
    atexit.register(_tell_the_end)  # before jax's own


def _still_waits(seconds: float) -> None:
    print(
        "processes.start: this process still waits for the others; jax ends it "
        f"{seconds:g} seconds after its beginning: have all begun, with one address, and can they reach it?",
        file=sys.stderr,
        flush=True,
    )


def several() -> bool:
    """Whether there is more than one process."""
    return coordination() is not None and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not several() or jax.process_index() == 0


def index() -> int:
    """Which of the processes this is."""
    return jax.process_index() if several() else 0


def count() -> int:
    """How many processes there are."""
    return jax.process_count() if several() else 1


def said() -> str:
    """Which process this is, in words."""
    return f"process {index()} of {count()}"


# --- agreement --------------------------------------------------------------------------------------------------------

_agreements = itertools.count()  # as many in each process


def agreed(mine: Any, combine: Callable[[list[Any]], Any]) -> Any:
    """What ``combine`` makes of a value of each process, in their order: the first computes it, and tells the others.

    All are what JSON can hold. A rendezvous: every process calls it as often, in the same order.
    """
    if not several():
        return combine([mine])
    made = _exchanged({"said": mine}, combine, WAIT)
    if "failed" in made:
        error = ProcessError(made["failed"])
        error.__dict__["heard"] = True  # it need not be told again
        raise error
    return made["made"]


def _exchanged(mine: dict[str, Any], combine: Callable[[list[Any]], Any], seconds: float) -> dict[str, Any]:
    """What all have ``said`` and the first has ``made`` of it; or why one of them, which says so here, has failed."""
    number, client, milliseconds = next(_agreements), coordination(), int(1000 * seconds)
    place = f"fnet/{number}"
    try:
        client.key_value_set(f"{place}/said/{index():09d}", json.dumps(mine))
        client.wait_at_barrier(place, milliseconds)
        if is_first():
            every = [json.loads(text) for _, text in sorted(client.key_value_dir_get(f"{place}/said"))]
            client.key_value_set(f"{place}/made", json.dumps(_made(every, combine)))
            client.key_value_delete(f"{place}/said")
            client.key_value_delete(f"fnet/{number - 1}/made")  # all have read it, or they were not here
        return json.loads(client.blocking_key_value_get(f"{place}/made", milliseconds))
    except jax.errors.JaxRuntimeError as error:
        lost = ProcessError(_gone(error, seconds))
        lost.__dict__["heard"] = True
        print(lost, file=sys.stderr, flush=True)  # before jax ends this process, which may be at once
        raise lost from error


def _made(every: list[dict[str, Any]], combine: Callable[[list[Any]], Any]) -> dict[str, Any]:
    if failed := [one["failed"] for one in every if "failed" in one]:
        return {"failed": failed[0], "ended": all("ended" in one for one in every)}
    try:
        return {"made": combine([one["said"] for one in every])}
    except Exception as error:
        return {"failed": f"{said()}: {type(error).__name__}: {error}"}


def _gone(error: Exception, seconds: float) -> str:
    """What jax's service says of processes that did not come, in words."""
    text = str(error)
    if "DEADLINE_EXCEEDED" in text and "heartbeat" not in text:
        return f"the other processes did not come to where this one is within {seconds:g} seconds"
    found = re.search(r"Task:? (\d+)", text)
    which = f"process {found[1]} of {count()}" if found else "another process, the first perhaps,"
    return (
        f"{which} is gone ({first_line(error):.160}…); expected all to the end: see what it wrote last, and begin all "
        "anew: a run in a folder goes on from its last whole checkpoint"
    )


@contextmanager
def heard_by_all() -> Iterator[None]:
    """An error that this process alone raises within is what the others raise at their next agreement."""
    try:
        yield
    except BaseException as error:
        if not is_of_all(error) and "heard" not in error.__dict__:
            try:
                _exchanged({"failed": f"{said()}: {type(error).__name__}: {error}"}, lambda every: None, WORD)
            except ProcessError as word:  # which one is gone, or that they did not come
                error.add_note(str(word))
        raise


def _tell_the_end() -> None:
    """Wait for the others, who may go on alone: jax would end them; at an agreement they are told of this end."""
    error = getattr(sys, "last_value", None)  # what Python has printed, if it ends with an error
    text = f"{said()} has ended its program" if error is None else f"{said()}: {type(error).__name__}: {error}"
    mine = {"failed": text, "ended": True}
    with suppress(Exception):
        while several() and not _exchanged(mine, lambda every: None, WAIT if error is None else WORD)["ended"]:
            pass


def told(mine: Any) -> Any:
    """The value of the first process, in all."""
    return agreed(mine if is_first() else None, lambda every: every[0])


def meet() -> None:
    """Wait until every process is here."""
    agreed(None, lambda every: None)


def greatest(*numbers: int) -> list[int]:
    """Of each of the numbers the greatest of all processes."""
    return agreed(numbers, lambda every: [max(column) for column in zip(*every, strict=True)])


def require_same(what: str, mine: Mapping[str, Any], remedy: str) -> None:
    """Raise ValueError in all processes where one of these values is another in one of them."""

    def differing(every: list[Mapping[str, Any]]) -> list[Any]:
        return next(
            (
                [i, name, one.get(name), value]
                for i, one in enumerate(every)
                for name, value in every[0].items()
                if one.get(name) != value
            ),
            [],
        )

    if found := agreed(dict(mine), differing):
        i, name, other, first = found
        raise of_all(
            ValueError(
                f"{what}: {name} is {first} in process 0 and {other} in process {i} of {count()}; expected the same in "
                f"all: {remedy}"
            )
        )


@contextmanager
def together(kind: type[Exception] = ProcessError) -> Iterator[bool]:
    """What each process does by itself: an error of one is raised by all, by the others as ``kind``.

    Gives whether this process is the first. Nothing within may wait for the other processes.
    """
    if not several():
        yield True
        return
    error = None
    try:
        yield is_first()
    except Exception as caught:
        error = caught
    mine = None if error is None else f"{said()}: {type(error).__name__}: {error}"
    failed = agreed(mine, lambda every: next((text for text in every if text is not None), None))
    if error is None and failed is not None:
        error = kind(failed)
    if error is not None:
        raise of_all(error)


def of_all(error: BaseException) -> BaseException:
    """An error that every process raises at the same place, so that what they do next they can do together."""
    error.__dict__["of_all"] = True
    return error


def is_of_all(error: BaseException) -> bool:
    """Whether every process raises an error too."""
    return not several() or "of_all" in error.__dict__


def in_first(function: Callable) -> Callable:
    """The function in the first process, and in the others nothing: for one that prints or writes."""

    @functools.wraps(function)
    def alone(*args, **kwargs):
        return function(*args, **kwargs) if is_first() else None

    return alone


def on_host(leaf: Any) -> np.ndarray:
    """All of an array on the host; every process that has a part of it calls this."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
