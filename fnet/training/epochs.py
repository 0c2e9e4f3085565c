"""A run is one pure function: steps in a scan, epochs in a scan of scans. `fnet.fit` drives the same run from the host.

    train(step, state, data, ...) -> TrainState, metrics      all epochs in one compiled program

Every epoch visits each example once, in the order of `epoch_order`; the last batch of an epoch is smaller where the
batch size does not divide the data, and is a second traced step at its true size.

Legend: N examples of the data, S steps an epoch, E epochs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnet.core.checks import described, require_counts
from fnet.core.numerics import stream
from fnet.data.arrays import check_batch_size, check_host_data, count_examples
from fnet.training.evaluation import evaluate_on, results_by_name
from fnet.training.steps import Step, require_train_state
from fnet.training.stopping import Reducer, decide, stopped, with_stopping
from fnet.types import Batch, Layer, PyTree, TrainState


def steps_per_epoch(data: Batch, batch_size: int) -> int:
    """S = ⌈N / batch_size⌉."""
    return -(-count_examples(data) // batch_size)


def epoch_order(key: jax.Array, epoch, n: int) -> jax.Array:
    """The order of the examples in an epoch, from the run's key and the epoch's number alone."""
    return jax.random.permutation(jax.random.fold_in(stream(key, "data"), epoch), n)


def rows_of(data: Batch, rows: jax.Array) -> Batch:
    """The examples of a batch; ``rows`` are a permutation's, so none is out of bounds."""
    return jax.tree.map(lambda a: a.at[rows].get(mode="promise_in_bounds", unique_indices=True), data)


traced_once = functools.partial(jax.jit, inline=True)
"""The function, traced at the first of its calls with some shapes; each call is its operations, not a call of them."""


def apart(function: Callable, ts: TrainState):
    """``function(ts)`` as a computation of its own in the compiled program, by a condition that always holds.

    Written after another step in the same computation, XLA fuses across the two and rounds otherwise than in a loop.
    """
    function = traced_once(function)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, ts)[1])
    return jax.lax.cond(ts.step >= 0, function, lambda ts: (ts, nothing), ts)


def train(
    step: Step,
    ts: TrainState,
    data: PyTree,
    *,
    epochs: int,
    batch_size: int,
    shuffle: bool = True,
    evaluate: Callable | None = None,
    validation: PyTree = None,
    stop: Reducer | None = None,
    checkpoint: int | None = None,
) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """``epochs`` epochs from a state at an epoch's beginning, as one pure function: compile it, or `jax.vmap` it.

    ``batch_size`` 1 is stochastic descent, N is full-batch descent. Returns the state, the training metrics ``(E, S)``
    and, if ``evaluate(params, state, data)`` is given, its results on the ``validation`` data after each epoch
    ``(E,)``; of a mapping of sets, those of each. After ``stop`` (`early_stopping`) has ended the run the state stays
    as it is, and the sums and counts of all metrics are 0.

    What comes after a run is differentiated by `jax.grad` and `jax.jacfwd` by anything that goes in: the optimizer's
    numbers, ``ts``, ``data`` and their weights. Forward mode (`jax.jvp`, `jax.jacfwd`) costs as much memory as
    the run; take it for few numbers. Reverse mode (`jax.grad`) keeps what each step's derivative needs; with
    ``checkpoint`` it keeps some states, and computes each step so many times more: 2 keeps about 2√T of T states, L
    about L T^(1/L) (``scan_in_segments``).

    Give ``data`` and ``validation`` as arguments of the function that you compile: what it closes over becomes a
    constant of the program. Nothing is checked here but the batch size, and data that are NumPy's; `fit` checks more.
    """
    if not callable(step) or isinstance(step, Layer):
        raise TypeError(f"train: step is {described(step)}; expected a step, as fnet.make_step makes one")
    require_train_state("train", ts)
    require_counts("train", epochs=epochs, checkpoint=checkpoint)
    data = check_host_data(data)
    n = count_examples(data)
    check_batch_size(batch_size, n)
    full, per_epoch = n - n % batch_size, steps_per_epoch(data, batch_size)
    of_epochs, in_epoch = shared_levels(checkpoint, epochs, per_epoch)

    def one(ts, rows):
        return step(ts, rows_of(data, rows))

    @traced_once
    def epoch(ts, order):
        ts, metrics = scan_in_segments(one, ts, order[:full].reshape(-1, batch_size), full // batch_size, in_epoch)
        if full < n:
            ts, last = apart(lambda ts: one(ts, order[full:]), ts)
            metrics = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), metrics, last)
        results = evaluate_on(evaluate, ts, validation) if evaluate else {}
        return decide(stop, ts, results_by_name(results, validation)), (metrics, results)

    def unless_stopped(ts, _):
        # outside of the condition, which under vmap computes both of its branches at every step
        order = epoch_order(ts.key, ts.step // per_epoch, n) if shuffle else jnp.arange(n)
        if stop is None:
            return epoch(ts, order)
        told = jax.eval_shape(epoch, ts, order)[1]
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), told)
        return jax.lax.cond(stopped(ts), lambda ts, order: (ts, nothing), epoch, ts, order)

    ts, (metrics, results) = scan_in_segments(unless_stopped, with_stopping(stop, ts), None, epochs, of_epochs)
    return ts, metrics, results


def shared_levels(levels: int | None, epochs: int, steps: int) -> tuple[int | None, int | None]:
    """How many levels the loop of epochs and the loop within each have, so that together they keep the fewest states.

    >>> shared_levels(2, 100, 100), shared_levels(8, 1000, 10), shared_levels(3, 1, 10000), shared_levels(3, 500, 1)
    ((1, 1), (6, 2), (None, 3), (3, None))
    """
    if levels is None or steps == 1:
        return levels, None

    def kept(length, levels):
        return levels * length ** (1 / levels)

    def together(own):  # a loop of epochs without a level keeps what each of them keeps
        return kept(steps, own) + kept(epochs, levels - own) if own < levels else epochs * kept(steps, own)

    own = min(range(1, levels + 1), key=together)
    return levels - own or None, own


def scan_in_segments(step: Callable, carry: PyTree, xs: PyTree, length: int, levels: int | None):
    """`jax.lax.scan`, whose derivative in reverse keeps some carries and computes the rest again from them.

    With one level it keeps the carry before each step, with two those of √n segments of √n steps each, with L levels
    some ``L n^(1/L)`` carries, and computes each step L times more; ``None`` is the plain scan, which keeps all that a
    step's derivative needs. Of 10,000 steps 1, 2, 3, 4 and 8 levels keep 10,000, 200, 65, 40 and 26 carries.
    Source: Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
    differentiation", 1992; Chen et al., arXiv:1604.06174.
    """
    if levels is None:
        return jax.lax.scan(step, carry, xs, length=length)
    parts, done = [], 0
    while done < length:  # what the first segments leave over is cut again
        counts = segments(length - done, levels)
        size = math.prod(counts)
        cut = jax.tree.map(lambda a, at=done, n=size, c=counts: a[at : at + n].reshape(*c, *a.shape[1:]), xs)
        carry, ys = _nested(step, carry, cut, counts)
        parts.append(jax.tree.map(lambda a, n=size, c=counts: a.reshape(n, *a.shape[len(c) :]), ys))
        done += size
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


def _nested(step: Callable, carry: PyTree, xs: PyTree, counts: tuple[int, ...]):
    """The scan over ``xs (*counts, ...)``, each level of which keeps its carries alone."""
    inner = step if len(counts) == 1 else lambda carry, xs: _nested(step, carry, xs, counts[1:])
    return jax.lax.scan(jax.checkpoint(inner, prevent_cse=False), carry, xs, length=counts[0])


def segments(length: int, levels: int) -> tuple[int, ...]:
    """Counts of ``levels`` levels at most, nearly equal, whose product is as large as ``length`` lets it be.

    >>> segments(10000, 2), segments(10000, 4), segments(1000, 6), segments(5, 8)
    ((100, 100), (10, 10, 10, 10), (4, 3, 3, 3, 3, 3), (2, 2))
    """
    counts = [int(length ** (1 / levels) + 1e-9)] * levels
    for i, count in enumerate(counts):
        if math.prod(counts) // count * (count + 1) <= length:
            counts[i] = count + 1
    return tuple(count for count in counts if count > 1) or (1,)
