"""A run is one pure function: steps in a scan, epochs in a scan of scans; `fit` drives it from the host.

    step(TrainState, batch) -> TrainState, metrics            the same function for a loop, jit, scan and vmap
    train(step, state, data, ...) -> TrainState, metrics      all epochs in one compiled program
    fit(step, state, data, ...) -> TrainState, History        the same run in compiled chunks, watched by observers

Every epoch visits each example once, in the order of `epoch_order`; the last batch of an epoch is smaller where the
batch size does not divide the data, and is a second traced step at its true size.

Legend: N examples of the data, S steps an epoch, E epochs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.data.arrays import DataError, check_data, count_examples
from fnet.gradients import Gradient, measure
from fnet.types import Batch, Layer, LayerError, Mean, Optimizer, PyTree, TrainState, apply, named_leaves, stream

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


def init_train_state(params: PyTree, optimizer: Optimizer, key: jax.Array, state: PyTree = ()) -> TrainState:
    """The start of a run: step 0, the optimizer's first state, and the key that all its randomness comes from.

    ``state`` is what the model's ``init`` returned beside ``params``; plain functions without a state have none.
    """
    # compiled, since array by array each shape of the moments would be a program of its own
    return TrainState(jnp.asarray(0, jnp.int32), params, state, jax.jit(optimizer.init)(params), key)


def make_step(gradient: Gradient, optimizer: Optimizer, monitors: Mapping[str, Callable] | None = None) -> Step:
    """One update: ``step(TrainState, batch) -> TrainState, metrics``.

    ``metrics`` are the gradient engine's, the ``learning_rate`` just applied, and what each of the ``monitors`` returns
    of the gradients, by name: ``{"gradient_norm": fnet.metrics.gradient_norms}``. All are trees of `Mean`s.
    """

    def step(ts: TrainState, batch) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(stream(ts.key, "noise"), ts.step)
        loss_scale = getattr(ts.opt_state, "loss_scale", None)  # that of fnet.optimizers.dynamic_loss_scale
        scale = {} if loss_scale is None else {"scale": loss_scale}
        grads, state, metrics = gradient(ts.params, ts.state, batch, key, **scale)
        params, opt_state = optimizer.update(grads, ts.opt_state, ts.params, value=metrics["loss"].value)
        watched = {name: monitor(grads) for name, monitor in (monitors or {}).items()}
        watched["learning_rate"] = opt_state.rate
        metrics = {**metrics, **jax.tree.map(lambda value: Mean(value, jnp.ones_like(value)), watched)}
        return TrainState(ts.step + 1, params, state, opt_state, ts.key), metrics

    return step


def make_evaluate(model: Layer, loss, metrics: Mapping[str, Callable] | None = None, batch_size: int | None = None):
    """``evaluate(params, state, data) -> metrics`` in inference, as `Mean`s over all of ``data``.

    With ``batch_size`` the data pass in slices of it (and a smaller last one), so that memory does not grow with them.
    """

    def on_batch(params, state, batch):
        return measure(loss, metrics, apply(model, params, state, batch.inputs), batch)

    def evaluate(params, state, data):
        data = Batch(*data)
        n = count_examples(data)
        size = batch_size or n
        if n <= size:
            return on_batch(params, state, data)
        full = jax.tree.map(lambda a: a[: n - n % size].reshape(n // size, size, *a.shape[1:]), data)
        parts = jax.lax.map(lambda batch: on_batch(params, state, batch), full)
        total = jax.tree.map(lambda a: a.sum(0), parts)
        if n % size:
            rest = on_batch(params, state, jax.tree.map(lambda a: a[n - n % size :], data))
            total = jax.tree.map(jnp.add, total, rest)
        return total

    return evaluate


# --- the run as one pure function ------------------------------------------------------------------------------------


def steps_per_epoch(data: Batch, batch_size: int) -> int:
    """S = ⌈N / batch_size⌉."""
    return -(-count_examples(data) // batch_size)


def epoch_order(key: jax.Array, epoch, n: int) -> jax.Array:
    """The order of the examples in an epoch, from the run's key and the epoch's number alone."""
    return jax.random.permutation(jax.random.fold_in(stream(key, "data"), epoch), n)


def run_steps(
    step: Step, ts: TrainState, data: Batch, *, batch_size: int, count: int, last: bool, shuffle: bool = True
):
    """``count`` full batches from where ``ts`` stands in its epoch, and then the epoch's smaller last one if ``last``.

    Returns the new state and the metrics stacked by step.
    """
    n = count_examples(data)
    per_epoch = steps_per_epoch(data, batch_size)
    order = epoch_order(ts.key, ts.step // per_epoch, n) if shuffle else jnp.arange(n)

    def one(ts, rows):  # rows are a permutation's, so none is out of bounds
        return step(ts, jax.tree.map(lambda a: a.at[rows].get(mode="promise_in_bounds", unique_indices=True), data))

    rows = jax.lax.dynamic_slice_in_dim(order, ts.step % per_epoch * batch_size, count * batch_size)
    ts, metrics = jax.lax.scan(one, ts, rows.reshape(count, batch_size))
    if last:
        ts, final = apart(lambda ts: one(ts, order[n - n % batch_size :]), ts)
        metrics = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), metrics, final)
    return ts, metrics


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
) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """``epochs`` epochs from a state at an epoch's beginning, as one pure function: compile it, or `jax.vmap` it.

    ``batch_size`` 1 is stochastic descent, N is full-batch descent. Returns the state, the training metrics ``(E, S)``
    and, if ``evaluate(params, state, validation)`` is given, its metrics after each epoch ``(E,)``.

    Give ``data`` and ``validation`` as arguments of the function that you compile: what it closes over becomes a
    constant of the program. Nothing is checked here but the batch size; `fit` checks the data.
    """
    data = Batch(*data)
    n = count_examples(data)
    if not 1 <= batch_size <= n:
        raise DataError(f"batch_size = {batch_size}; expected 1 to {n}, the number of examples")

    def epoch(ts, _):
        ts, metrics = run_steps(
            step, ts, data, batch_size=batch_size, count=n // batch_size, last=n % batch_size > 0, shuffle=shuffle
        )
        results = evaluate(ts.params, ts.state, validation) if evaluate else {}
        return ts, (metrics, results)

    ts, (metrics, results) = jax.lax.scan(epoch, ts, length=epochs)
    return ts, metrics, results


# --- the host driver -------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """What an observer is told. ``kind`` is "start", "compile", "chunk", "epoch" or "end".

    ``metrics`` are host numbers by name: a chunk's training means, or an epoch's training and ``validation_`` means.
    ``seconds`` is what the compilation or the chunk took. ``state`` is where the run stands (for "epoch" at the end of
    its chunk) and may be read during the call; its buffers are donated to the next chunk.
    """

    kind: str
    step: int  # updates made
    steps: int  # where the run ends
    epoch: int  # epochs completed
    epochs: int
    metrics: Mapping[str, Any]
    seconds: float
    state: TrainState


class History(NamedTuple):
    """What a run measured, by name: ``loss``, ``validation_loss``, ``gradient_norm/dense_0``."""

    epochs: dict[str, np.ndarray]  # (E, ...), training and validation
    steps: dict[str, np.ndarray]  # (E S, ...), training
    compile_seconds: float
    run_seconds: float


def fit(
    step: Step,
    ts: TrainState,
    data: PyTree,
    *,
    epochs: int,
    batch_size: int,
    shuffle: bool = True,
    evaluate: Callable | None = None,
    validation: PyTree = None,
    observers: Sequence[Callable[[Event], str | None]] = (),
    chunk_steps: int | None = None,
) -> tuple[TrainState, History]:
    """Run until ``epochs`` epochs are completed, counted from step 0, in compiled chunks watched by ``observers``.

    ``chunk_steps`` is how many steps run between two looks of the observers; the results are the same bits for every
    value. By default a chunk is an epoch, or as many epochs as make up to 100 steps and divide the run. Chunks end at
    the end of an epoch or hold whole epochs. An observer is called with each `Event` and may return "stop".

    ``ts`` is copied once, so the caller's buffers stay valid. Before anything is computed the data are checked and the
    step is traced: `DataError` names what is wrong with the data or the labels, `LayerError` where the model and the
    data do not fit, `ValueError` any other argument.
    """
    data, validation = check_run(step, ts, data, epochs, batch_size, evaluate, validation, chunk_steps)
    n, per_epoch = count_examples(data), steps_per_epoch(data, batch_size)
    end, full = epochs * per_epoch, n // batch_size
    chunk = chunk_steps or per_epoch * max(
        k for k in range(1, 101) if k == 1 or (k * per_epoch <= 100 and epochs % k == 0)
    )
    ts = jax.tree.map(jnp.copy, ts)  # ours to donate
    position = int(ts.step)
    programs, seconds, stopped = {}, {"compile": 0.0, "run": 0.0}, False
    this_epoch, all_steps, all_epochs = [], [], []

    def notify(kind, at, metrics=None, took=0.0):
        nonlocal stopped
        event = Event(kind, at, end, at // per_epoch, epochs, metrics or {}, took, ts)
        answers = [(observer, observer(event)) for observer in observers]
        for observer, answer in answers:
            if answer not in (None, "continue", "stop"):
                raise ValueError(f"observer {observer} returned {answer!r}; expected 'continue', 'stop' or None")
        stopped = stopped or any(answer == "stop" for _, answer in answers)

    def run(name, function, *args, donate=()):
        """Call the program ``name``, compiled at its first use."""
        if name not in programs:
            begin = time.perf_counter()
            programs[name] = jax.jit(function, donate_argnums=donate).lower(*args).compile()
            seconds["compile"] += (took := time.perf_counter() - begin)
            notify("compile", position, took=took)
        begin = time.perf_counter()
        result = jax.block_until_ready(programs[name](*args))
        seconds["run"] += time.perf_counter() - begin
        return result

    def run_epochs(ts, data, validation, epochs):
        options = {"batch_size": batch_size, "shuffle": shuffle, "evaluate": evaluate, "validation": validation}
        return train(step, ts, data, epochs=epochs, **options)

    notify("start", position)
    try:
        while position < end and not stopped:
            begin, within = time.perf_counter(), position % per_epoch
            if within == 0 and chunk >= per_epoch:
                count = min(chunk // per_epoch, epochs - position // per_epoch)
                program = partial(run_epochs, epochs=count)
                ts, metrics, results = run(("epochs", count), program, ts, data, validation, donate=0)
                blocks, rows = ([pick(host, i) for i in range(count)] for host in (to_host(metrics), to_host(results)))
            else:
                # chunks begin at multiples of their length, so that a run resumed between them falls back into step
                count = min(chunk - within % chunk, full - within)
                options = {"count": count, "last": within + count == full and n % batch_size > 0}
                program = partial(run_steps, step, batch_size=batch_size, shuffle=shuffle, **options)
                ts, metrics = run(tuple(options.values()), program, ts, data, donate=0)
                blocks, rows = [to_host(metrics)], []
                if evaluate and int(ts.step) % per_epoch == 0:
                    rows = [to_host(run("evaluate", evaluate, ts.params, ts.state, validation))]
            first_epoch, position = position // per_epoch, int(ts.step)
            all_steps += blocks
            notify("chunk", position, averages(blocks), time.perf_counter() - begin)
            for i, block in enumerate(blocks):
                this_epoch.append(block)
                epoch_end = (first_epoch + i + 1) * per_epoch
                if position >= epoch_end:
                    held = {f"validation_{name}": mean.value for name, mean in (rows[i] if evaluate else {}).items()}
                    all_epochs.append({**averages(this_epoch), **held})
                    this_epoch = []
                    notify("epoch", epoch_end, all_epochs[-1])
    finally:
        notify("end", position)
    by_step = {name: np.concatenate([block[name].value for block in all_steps]) for name in (all_steps or [{}])[0]}
    by_epoch = {name: np.stack([row[name] for row in all_epochs]) for name in (all_epochs or [{}])[0]}
    return ts, History(by_epoch, by_step, seconds["compile"], seconds["run"])


def to_host(metrics: PyTree) -> dict[str, Mean]:
    """A tree of `Mean`s as NumPy float64, by path; a plain number counts once."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(metrics), is_leaf=lambda leaf: isinstance(leaf, Mean))
    host = {}
    for path, leaf in leaves:
        total, count = leaf if isinstance(leaf, Mean) else (leaf, np.ones_like(leaf))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        host[name] = Mean(np.asarray(total, np.float64), np.asarray(count, np.float64))
    return host


def pick(metrics: dict[str, Mean], index: int) -> dict[str, Mean]:
    """One entry along the first axis."""
    return {name: Mean(mean.sum[index], mean.count[index]) for name, mean in metrics.items()}


def averages(blocks: Sequence[dict[str, Mean]]) -> dict[str, Any]:
    """Means over all steps of all blocks: sums and counts are added before they are divided."""
    total = {}
    for name in blocks[0]:
        sums = sum(block[name].sum.sum(0) for block in blocks)
        total[name] = Mean(sums, sum(block[name].count.sum(0) for block in blocks)).value
    return total


# --- what is checked before a run ------------------------------------------------------------------------------------


def check_run(step, ts, data, epochs, batch_size, evaluate, validation, chunk_steps):
    """Everything that can be known to fail before it is computed. Returns the data as device arrays."""
    for name, value in {"epochs": epochs, "chunk_steps": chunk_steps}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} = {value!r}; expected a whole number of at least 1")
    if (evaluate is None) != (validation is None):
        missing = "validation" if validation is None else "evaluate"
        raise ValueError(f"{missing} is not given; expected evaluate and validation together, or neither")
    data = check_data(data, batch_size=batch_size)
    per_epoch = steps_per_epoch(data, batch_size)
    if int(ts.step) >= epochs * per_epoch:
        raise ValueError(
            f"epochs = {epochs}, but the state stands at step {int(ts.step)}, after epoch {int(ts.step) // per_epoch}: "
            "epochs are counted from step 0, so give the number at which the run is to end"
        )
    after, _ = dry_run("data", step, ts, data)
    for (path, old), (_, new) in zip(named_leaves(ts), named_leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"step turns {path} from {old.dtype}{old.shape} into {new.dtype}{new.shape}; expected no change"
            )
    if evaluate:
        validation = check_data(validation, name="validation")
        dry_run("validation", lambda ts, batch: evaluate(ts.params, ts.state, batch), ts, validation)
    return data, validation


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
