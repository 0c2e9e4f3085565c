"""A run is one pure function: steps in a scan, epochs in a scan of scans. `fnet.fit` drives the same run from the host.

    train(step, state, data, ...) -> TrainState, metrics      all epochs in one compiled program

Every epoch visits each example once, in the order of `epoch_order`; the last batch of an epoch is smaller where the
batch size does not divide the data, and is a second traced step at its true size.

Legend: N examples of the data, S steps an epoch, E epochs.
"""

from __future__ import annotations

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


def apart(function: Callable, ts: TrainState):
    """``function(ts)`` as a computation of its own in the compiled program, by a condition that always holds.

    Written after another step in the same computation, XLA fuses across the two and rounds otherwise than in a loop.
    """
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
) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """``epochs`` epochs from a state at an epoch's beginning, as one pure function: compile it, or `jax.vmap` it.

    ``batch_size`` 1 is stochastic descent, N is full-batch descent. Returns the state, the training metrics ``(E, S)``
    and, if ``evaluate(params, state, data)`` is given, its results on the ``validation`` data after each epoch
    ``(E,)``; of a mapping of sets, those of each. After ``stop`` (`early_stopping`) has ended the run the state stays
    as it is, and the sums and counts of all metrics are 0.

    Give ``data`` and ``validation`` as arguments of the function that you compile: what it closes over becomes a
    constant of the program. Nothing is checked here but the batch size, and data that are NumPy's; `fit` checks more.
    """
    if not callable(step) or isinstance(step, Layer):
        raise TypeError(f"train: step is {described(step)}; expected a step, as fnet.make_step makes one")
    require_train_state("train", ts)
    require_counts("train", epochs=epochs)
    data = check_host_data(data)
    n = count_examples(data)
    check_batch_size(batch_size, n)
    full, per_epoch = n - n % batch_size, steps_per_epoch(data, batch_size)

    def one(ts, rows):
        return step(ts, rows_of(data, rows))

    def epoch(ts, order):
        ts, metrics = jax.lax.scan(one, ts, order[:full].reshape(-1, batch_size))
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

    ts, (metrics, results) = jax.lax.scan(unless_stopped, with_stopping(stop, ts), length=epochs)
    return ts, metrics, results
