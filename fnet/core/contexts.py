"""Context variables: what holds while something is traced, for all that is called within and nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Within, the variable has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
