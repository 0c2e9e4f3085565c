"""What `fit` checks before anything is computed: its arguments become a `Plan`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.data.arrays import DataError, check_batch_size, check_data, count_examples
from fnet.data.streams import Stream, first_batch, is_read_ahead
from fnet.runs import Run, RunError
from fnet.stopping import Reducer, with_stopping
from fnet.training import Step, epoch_order, evaluated, named_metrics, steps_per_epoch
from fnet.types import Batch, LayerError, Mean, PyTree, TrainState, named_leaves

CHUNK_STEPS = 8192  # the most that a chunk has, unless the metrics of so many steps take more than METRIC_BYTES
METRIC_BYTES = 16_000_000


class Plan(NamedTuple):
    """A run's arguments, checked."""

    step: Step
    data: Batch | Stream
    sample: Batch  # a batch, or its shapes
    validation: PyTree
    examples: int  # N
    batch_size: int
    shuffle: bool
    evaluate: Callable | None
    stop: Reducer | None
    per_epoch: int  # S
    end: int  # the step at which the run ends
    every: int  # steps from one evaluation to the next
    results: dict[str, Any]  # an evaluation's, as shapes
    capacity: int  # C


def check_kinds(step, ts, evaluate, stop, observers, run) -> None:
    """Require that the arguments are what they are called; TypeError names the one that is not."""
    wanted = {
        "ts": (ts, TrainState, "a TrainState, as fnet.init_train_state makes one"),
        "stop": (stop, Reducer | None, "a Reducer, as fnet.early_stopping makes one"),
        "run": (run, Run | None, "fnet.Run(folder)"),
    }
    for name, (given, kind, expected) in wanted.items():
        if not isinstance(given, kind):
            raise TypeError(f"{name} is {_short(given)}; expected {expected}")
    functions = {"step": step, **({} if evaluate is None else {"evaluate": evaluate})}
    functions |= {f"observers[{i}]": observer for i, observer in enumerate(observers)}
    for name, given in functions.items():
        if not callable(given):
            raise TypeError(f"{name} is {_short(given)}; expected a function")


def _short(value: Any) -> str:
    """Numbers and text as they are, of anything else the type."""
    return repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def check_run(
    step, ts, data, epochs, steps, batch_size, shuffle, evaluate, validation, evaluate_every, stop, chunk_steps
) -> Plan:
    """Everything that can be known to fail before it is computed."""
    for name, value in {"epochs": epochs, "steps": steps, "chunk_steps": chunk_steps}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} = {value!r}; expected a whole number of at least 1")
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs = {epochs} and steps = {steps}; expected one of them: where the run ends")
    if (evaluate is None) != (validation is None):
        missing = "validation" if validation is None else "evaluate"
        raise ValueError(f"{missing} is not given; expected evaluate and validation together, or neither")
    if stop is not None and evaluate is None:
        raise ValueError("stop is given without evaluate; expected evaluate and validation, whose results it looks at")
    if isinstance(data, Stream):
        if batch_size is not None:
            raise ValueError(f"batch_size = {batch_size}; expected none: a stream gives batches")
        known = sample = check_data(first_batch(data), name="the stream's first batch")
        per_epoch = data.steps_per_epoch
        n, batch_size = per_epoch * count_examples(sample), count_examples(sample)
    elif is_read_ahead(data):
        data, n = Batch(*data), count_examples(Batch(*data))
        check_batch_size(batch_size, n)
        known = sample = check_data(jax.tree.map(lambda leaf: leaf[:batch_size], data), part=True)
        per_epoch = steps_per_epoch(data, batch_size)
    else:
        if batch_size is None:
            raise DataError("batch_size is not given; expected how many examples an update takes")
        known = data = check_data(data, batch_size=batch_size)
        per_epoch, n = steps_per_epoch(data, batch_size), count_examples(data)
        sample = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype), data)
    every = in_steps("evaluate_every", evaluate_every, per_epoch)
    after, _ = dry_run("data", step, ts, known)
    for (path, old), (_, new) in zip(named_leaves(ts), named_leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"step turns {path} from {old.dtype}{old.shape} into {new.dtype}{new.shape}; expected no change"
            )
    metrics = jax.eval_shape(step, ts, sample)[1]
    for name, _ in named_metrics(metrics):
        if name in ("kind", "step", "epoch"):
            raise ValueError(f"a metric is called {name!r}, which rows of metrics have already; expected another name")
    results = {}
    if evaluate:
        sets = validation if isinstance(validation, Mapping) else {"validation": validation}
        checked = {name: check_data(held, name=name) for name, held in sets.items()}
        for name, held in checked.items():
            dry_run(name, lambda ts, batch: evaluate(ts.params, ts.state, batch), ts, held)
        validation = checked if isinstance(validation, Mapping) else checked["validation"]
        decided = lambda ts, sets: evaluated(with_stopping(stop, ts), sets, evaluate, stop)  # noqa: E731
        results = jax.eval_shape(decided, ts, validation)[1]
    end = steps or epochs * per_epoch
    capacity = chunk_capacity(metrics, every, results)
    return Plan(
        step, data, sample, validation, n, batch_size, shuffle, evaluate, stop, per_epoch, end, every, results, capacity
    )


def described(plan: Plan, ts: TrainState) -> dict[str, Any]:
    """What must be the same when a run is resumed: where it stands in its data, and what its checkpoint overrides.

    These are the numbers of the optimizer and of the rule to stop, and the run's key: all in the state.
    """
    numbers = {path: _shortest(leaf) for path, leaf in named_leaves(ts) if "hyper" in path.split("/")}
    key = jax.random.key_data(ts.key) if jnp.issubdtype(ts.key.dtype, jax.dtypes.prng_key) else ts.key
    leaves = [f"{leaf.dtype}{tuple(leaf.shape[1:])}" for leaf in jax.tree.leaves(plan.sample)]
    return {
        "examples": plan.examples,
        "an example": leaves,
        "batch_size": plan.batch_size,
        "shuffle": plan.shuffle,
        "steps between evaluations": plan.every if plan.evaluate else None,
        "key": np.asarray(key).tolist(),
        **numbers,
    }


def _shortest(numbers: Any) -> Any:
    """The numbers as they are written: 0.1, where float32 holds 0.10000000149011612."""
    array = np.asarray(numbers)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.tolist()
    return np.array([float(str(number)) for number in array.ravel()]).reshape(array.shape).tolist()


def check_result(what: str, name: str, plan: Plan) -> None:
    """Require that an evaluation gives one number of this name."""
    if name not in plan.results:
        there = ", ".join(plan.results) or "there is none without evaluate and validation"
        raise ValueError(f"{what} = {name!r}; expected the name of a result of the evaluation: {there}")
    result = plan.results[name]
    shape = jnp.shape(result.sum if isinstance(result, Mean) else result)
    if shape != ():
        raise ValueError(f"{what} = {name!r}, which has shape {shape}; expected a result that is one number")


def check_position(ts: TrainState, plan: Plan, folder: Any = None) -> None:
    """Require that there is something left to run."""
    if (position := int(ts.step)) >= plan.end:
        what, error = (f"the run in {folder}", RunError) if folder else ("the state", ValueError)
        raise error(
            f"{what} stands at step {position}, but is to end at step {plan.end}, after epoch "
            f"{plan.end / plan.per_epoch:g}; epochs and steps are counted from step 0: give a later end"
        )


def in_steps(name: str, every: Any, per_epoch: int) -> int:
    """``(n, "steps")`` or ``(n, "epochs")`` in steps."""
    if (
        not isinstance(every, tuple)
        or len(every) != 2
        or every[1] not in ("steps", "epochs")
        or not isinstance(every[0], int)
        or isinstance(every[0], bool)
        or every[0] < 1
    ):
        raise ValueError(f"{name} = {every!r}; expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1")
    return every[0] * (per_epoch if every[1] == "epochs" else 1)


def chunk_capacity(metrics: PyTree, every: int, results: PyTree) -> int:
    """C: as many steps as have room for what they and their evaluations measure, whatever the length of the run."""
    sizes = [sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)) for tree in (metrics, results)]
    each, evaluation = (max(1, METRIC_BYTES // max(1, size)) for size in sizes)
    return min(CHUNK_STEPS, each, every * evaluation)


def order_at(plan: Plan, key: jax.Array, epoch: int) -> np.ndarray:
    """The order of an epoch's examples, on the host."""
    return np.asarray(epoch_order(key, epoch, plan.examples)) if plan.shuffle else np.arange(plan.examples)


def examples_between(plan: Plan, first: int, last: int) -> int:
    """How many examples the steps ``first`` to ``last`` see."""

    def seen(step):
        epochs, within = divmod(step, plan.per_epoch)
        return epochs * plan.examples + within * plan.batch_size

    return seen(last) - seen(first)


def dry_run(name: str, function: Callable, ts: TrainState, data: Batch):
    """Trace ``function(ts, batch)`` with the true labels and ids at their extremes, so that they can be checked.

    These are the integers of a batch: losses look at the labels, embeddings at the ids. All else is abstract, and
    nothing is computed.
    """
    leaves, structure = jax.tree.flatten(data)
    whole = {i: np.asarray(a) for i, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.integer)}
    flat = [a.reshape(len(a), -1) for a in whole.values() if a.size]
    rows = sorted({int(row) for a in flat for row in (a.min(1).argmin(), a.max(1).argmax())}) or [0]
    known = {i: jnp.asarray(a[np.asarray(rows)]) for i, a in whole.items()}
    others = [
        None if i in known else jax.ShapeDtypeStruct((len(rows), *a.shape[1:]), a.dtype) for i, a in enumerate(leaves)
    ]

    def traced(ts, others):
        batch = [known.get(i, other) for i, other in enumerate(others)]
        return function(ts, jax.tree.unflatten(structure, batch))

    where = f"{name}, examples {rows} (those with the least and the greatest label or id)"
    try:
        return jax.eval_shape(traced, ts, others)
    except LayerError as error:
        error.add_note(f"in {where}")
        raise
    except ValueError as error:
        if known:
            raise DataError(f"{where}: {error}") from error
        raise
