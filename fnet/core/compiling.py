"""Programs that compile in threads, while others are traced and lowered: XLA holds no lock of Python's meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jax.stages import Lowered


def compiling(lowered: Lowered, options: dict[str, Any] | None = None) -> Future[Callable]:
    """What ``lowered.compile(options)`` returns or raises, as soon as a thread has done it."""
    return _workers().submit(lowered.compile, options)


@functools.cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="fnet-compile")
