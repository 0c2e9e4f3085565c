"""A run is one pure function: steps in a scan, epochs in a scan of scans. `fnet.fit` drives the same run from the host.

    step(TrainState, batch) -> TrainState, metrics            the same function for a loop, jit, scan and vmap
    train(step, state, data, ...) -> TrainState, metrics      all epochs in one compiled program

Every epoch visits each example once, in the order of `epoch_order`; the last batch of an epoch is smaller where the
batch size does not divide the data, and is a second traced step at its true size.

Legend: N examples of the data, S steps an epoch, E epochs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.jax_insides import transfers_meant
from fnet.data.arrays import (
    as_arrays,
    as_batch,
    check_batch_size,
    check_data,
    check_host_data,
    count_examples,
    native,
    trace_batch,
)
from fnet.data.streams import Examples, Stream, as_source, count_rows, first_batch, inputs_alone, one_epoch, with_length
from fnet.gradients.engines import Gradient, check_engine, measure, refuse_names
from fnet.layers.children import apply
from fnet.training.stopping import Reducer, decide, stopped, with_stopping
from fnet.types import (
    Batch,
    Layer,
    Mean,
    Optimizer,
    PyTree,
    TrainState,
    described,
    require_counts,
    require_key,
    require_layer,
    require_optimizer,
    stream,
)

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


def init_train_state(params: PyTree, optimizer: Optimizer, key: jax.Array, state: PyTree = ()) -> TrainState:
    """The start of a run: step 0, the optimizer's first state, and the key that all its randomness comes from.

    ``state`` is what the model's ``init`` returned beside ``params``; plain functions without a state have none.
    """
    require_optimizer("init_train_state: optimizer", optimizer)
    require_key("init_train_state", key)
    # compiled, since array by array each shape of the moments would be a program of its own
    return TrainState(jnp.asarray(0, jnp.int32), params, state, jax.jit(optimizer.init)(params), key)


def make_step(gradient: Gradient, optimizer: Optimizer, monitors: Mapping[str, Callable] | None = None) -> Step:
    """One update: ``step(TrainState, batch) -> TrainState, metrics``.

    ``metrics`` are the gradient engine's, the ``learning_rate`` just applied, and what each of the ``monitors`` returns
    of the gradients, by name: ``{"gradient_norm": fnet.metrics.gradient_norms}``. All are trees of `Mean`s.
    """
    if not callable(gradient) or isinstance(gradient, Layer):
        raise TypeError(
            f"make_step: gradient is {described(gradient)}; expected a gradient engine, such as "
            "fnet.backprop(model, loss) makes one"
        )
    require_optimizer("make_step: optimizer", optimizer)
    if not isinstance(monitors or {}, Mapping) or not all(callable(monitor) for monitor in (monitors or {}).values()):
        raise TypeError(
            f"make_step: monitors = {monitors!r:.80}; expected a dict of names and functions of the gradients: "
            "{'gradient_norm': fnet.metrics.gradient_norms}"
        )
    refuse_names(monitors or {}, ["loss", "learning_rate"])

    def step(ts: TrainState, batch) -> tuple[TrainState, dict[str, Any]]:
        require_train_state("step", ts)
        key = jax.random.fold_in(stream(ts.key, "noise"), ts.step)
        loss_scale = getattr(ts.opt_state, "loss_scale", None)  # that of fnet.optimizers.dynamic_loss_scale
        scale = {} if loss_scale is None else {"scale": loss_scale}
        grads, state, metrics = gradient(ts.params, ts.state, batch, key, **scale)
        with jax.named_scope("optimizer"):
            params, opt_state = optimizer.update(grads, ts.opt_state, ts.params, value=metrics["loss"].value)
        watched = {name: monitor(grads) for name, monitor in (monitors or {}).items()}
        refuse_names([*watched, "learning_rate"], metrics)
        watched["learning_rate"] = opt_state.rate
        metrics = {**metrics, **jax.tree.map(lambda value: Mean(value, jnp.ones_like(value)), watched)}
        return ts._replace(step=ts.step + 1, params=params, state=state, opt_state=opt_state), metrics

    step.__dict__["optimizer"] = optimizer  # by which a run that is resumed with another begins its state
    return step


def require_train_state(who: str, ts) -> None:
    """Raise TypeError unless this is a `TrainState`."""
    if not isinstance(ts, TrainState):
        raise TypeError(f"{who}: ts is {described(ts)}; expected a TrainState, as fnet.init_train_state makes one")


def augmented(step: Step, augment: Callable[[jax.Array, Batch], Batch]) -> Step:
    """The step on ``augment(key, batch)``, a pure function that runs on the device within it.

    The key is the run's, folded with the step, in a stream of its own: a resumed run augments as the straight one.

    >>> noisy = lambda key, batch: batch._replace(inputs=batch.inputs + jax.random.normal(key, batch.inputs.shape))
    >>> step = augmented(lambda ts, batch: (ts, batch.inputs.shape), noisy)
    >>> step(TrainState(0, (), (), (), jax.random.key(0)), Batch(jnp.zeros((2, 3)), jnp.zeros(2)))[1]
    (2, 3)
    """

    def augmented_step(ts: TrainState, batch) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(stream(ts.key, "augment"), ts.step)
        with jax.named_scope("augment"):
            batch = augment(key, Batch(*batch))
        return step(ts, batch)

    return functools.update_wrapper(augmented_step, step, assigned=())


def make_evaluate(model: Layer, loss, metrics: Mapping[str, Callable] | None = None, batch_size: int | None = None):
    """``evaluate(params, state, data) -> metrics`` in inference, as `Mean`s over all of ``data``.

    With ``batch_size`` the data pass in slices of it (and a smaller last one), so that memory does not grow with them.
    """
    check_engine("make_evaluate", model, loss, metrics)
    require_counts("make_evaluate", batch_size=batch_size)

    def on_batch(params, state, batch):
        return measure(loss, metrics, apply(model, params, state, batch.inputs), batch)

    def evaluate(params, state, data):
        data = jax.tree.map(lambda leaf: native(leaf) if isinstance(leaf, np.ndarray) else leaf, as_batch(data))
        n = count_examples(data)
        size = batch_size or n
        if n <= size:
            return on_batch(params, state, data)
        if not all(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(data)):
            trace_batch(on_batch, (params, state), data, size)  # in the map below labels are not known
        full = jax.tree.map(lambda a: a[: n - n % size].reshape(n // size, size, *a.shape[1:]), data)
        parts = jax.lax.map(lambda batch: on_batch(params, state, batch), full)
        total = jax.tree.map(lambda a: a.sum(0), parts)
        if n % size:
            rest = on_batch(params, state, jax.tree.map(lambda a: a[n - n % size :], data))
            total = jax.tree.map(jnp.add, total, rest)
        return total

    return evaluate


@functools.lru_cache(maxsize=16)
def _outputs(model: Layer) -> Callable:
    return jax.jit(lambda params, state, x: apply(model, params, state, x))


@transfers_meant
def predict(model: Layer, params: PyTree, state: PyTree, data: PyTree, batch_size: int | None = None) -> PyTree:
    """The model's outputs in inference for many inputs, a batch at a time on the device, as arrays of NumPy ``(N, …)``.

    ``data`` are inputs (any tree of arrays ``(N, …)``, mapped files too, of which a batch is read at a time); or a
    `Batch` or a dataset, whose targets are not looked at; or a `Stream` or a loader, of which one epoch is gone through
    in its own batches. A dataset's examples and a loader's batches may be inputs alone: an array, a list of one, or a
    dict of ``inputs``. With no ``batch_size`` all inputs are one batch. Each kind of batch is compiled once; nothing is
    padded or left out.

    Raises DataError for inputs that are no arrays of one length or that jax cannot hold, and a batch size that is not
    from 1 to N. NaN and infinities pass.

    >>> from fnet.layers import dense
    >>> params, state = dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> predict(dense(2), params, state, np.ones((10, 3), "float32"), batch_size=4).shape
    (10, 2)
    """
    require_layer("predict: model", model)
    data = as_source(data)
    if isinstance(data, Stream):
        data = inputs_alone(with_length(data))
        first_batch(data)
    else:
        if isinstance(data, Examples):
            data = inputs_alone(data)
        else:
            data = Batch(as_batch(data).inputs if isinstance(data, Batch) else as_arrays(data, "inputs"), None)
        n = count_rows(data)
        check_batch_size(n if batch_size is None else batch_size, n)
    reads = one_epoch(data, batch_size)
    batches = (check_data(read.batch, part=True, rows=read.rows, finite=False).inputs for read in reads)
    outputs = [jax.tree.map(np.asarray, _outputs(model)(params, state, batch)) for batch in batches]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


# --- the run as one pure function ------------------------------------------------------------------------------------


def steps_per_epoch(data: Batch, batch_size: int) -> int:
    """S = ⌈N / batch_size⌉."""
    return -(-count_examples(data) // batch_size)


def epoch_order(key: jax.Array, epoch, n: int) -> jax.Array:
    """The order of the examples in an epoch, from the run's key and the epoch's number alone."""
    return jax.random.permutation(jax.random.fold_in(stream(key, "data"), epoch), n)


def rows_of(data: Batch, rows: jax.Array) -> Batch:
    """The examples of a batch; ``rows`` are a permutation's, so none is out of bounds."""
    return jax.tree.map(lambda a: a.at[rows].get(mode="promise_in_bounds", unique_indices=True), data)


def sets_of(validation: PyTree) -> Mapping[str, PyTree]:
    """The validation sets by their names; one alone is called "validation"."""
    return validation if is_several(validation) else {"validation": validation}


def is_several(validation: PyTree) -> bool:
    """Whether this is a mapping of names to sets; one of ``inputs`` and ``targets`` is a set."""
    return isinstance(validation, Mapping) and not {"inputs", "targets"} <= set(validation) <= set(Batch._fields)


def evaluate_on(evaluate: Callable, ts: TrainState, validation: PyTree) -> PyTree:
    """``evaluate(params, state, data)``, of each set where ``validation`` is a mapping of sets."""
    if is_several(validation):
        return {name: evaluate(ts.params, ts.state, held) for name, held in validation.items()}
    return evaluate(ts.params, ts.state, validation)


def results_by_name(results: PyTree, validation: PyTree) -> dict[str, Any]:
    """What `evaluate_on` gave, as one dict: ``validation_loss``, or with a set's name in front, ``test_loss``."""
    sets = results if is_several(validation) else {"validation": results}
    found = [(f"{prefix}_{name}", value) for prefix, tree in sets.items() for name, value in named_metrics(tree)]
    if len(dict(found)) < len(found):
        names = [name for name, _ in found]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two results are called {twice!r}; expected one: give a validation set another name")
    return dict(found)


def evaluated(
    ts: TrainState, validation: PyTree, evaluate: Callable | None, stop: Reducer | None
) -> tuple[TrainState, dict[str, Any]]:
    """``ts`` after what is decided on an evaluation, and its results by name."""
    results = results_by_name(evaluate_on(evaluate, ts, validation), validation) if evaluate else {}
    return decide(stop, ts, results), results


def named_metrics(metrics: PyTree) -> list[tuple[str, Any]]:
    """The `Mean`s and numbers of a tree, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(metrics, is_leaf=lambda leaf: isinstance(leaf, Mean))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


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
