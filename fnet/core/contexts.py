"""Context variables: what holds while something is traced, for all that is called within and nobody else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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


_examples: ContextVar[Sequence[int] | None] = ContextVar("examples", default=None)


def batch_of(examples: Sequence[int] | None) -> AbstractContextManager[None]:
    """Within, a batch's rows are these examples of the data, by which `place_of` names them."""
    return holding(_examples, examples)


def examples_here() -> Sequence[int] | None:
    """Which examples of the data the rows of the batch are, where that is known."""
    return _examples.get()


def place_of(index: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Where in an array of this shape something stands, as a message says it: by its example where that is known.

    >>> place_of((1, 5), (2, 9))
    'at (1, 5)'
    >>> with batch_of([0, 17]):
    ...     place_of((1, 5), (2, 9)), place_of((1,), (2,)), place_of((1,), (30,))
    ('at (5,) in example 17', 'in example 17', 'at (1,)')
    """
    examples = _examples.get()
    if examples is None or shape[:1] != (len(examples),):
        return f"at {index}"
    within = f"at {index[1:]} " if index[1:] else ""
    return f"{within}in example {examples[index[0]]}"
