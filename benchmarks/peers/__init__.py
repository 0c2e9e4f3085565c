"""The models of `benchmarks.models` in other libraries, a file each: `prepare(name, inputs, targets)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

RATE = 1e-3
VOCABULARY, LENGTH = 100, 64  # ids there are, and ids of a sequence
EMBEDDED, UNITS = 64, 128  # of lstm, gru and rnn
RECURRENCE = {"vocabulary": VOCABULARY, "features": EMBEDDED, "units": UNITS}
FEATURES, HEADS, BLOCKS = 128, 4, 4  # of gpt
WIDTHS = (784, 128, 64, 10)  # of mlp
RECURRENT = ("lstm", "gru", "rnn")


class Prepared(NamedTuple):
    """A function that trains for a round's steps and gives the last loss, and how many parameters it trains."""

    run: Callable[[], float]
    parameters: int


def in_a_scan(step: Callable, start, params, x, y) -> Prepared:
    """What trains by ``step(carry, (x, y)) -> carry, loss`` over the steps of a round, one compiled program of jax."""
    import jax

    program = jax.jit(lambda start, x, y: jax.lax.scan(step, start, (x, y))[1])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Prepared(lambda: program(start, x, y)[-1].item(), parameters)
