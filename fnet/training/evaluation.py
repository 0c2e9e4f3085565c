"""What a model gives on data, in inference: metrics of a whole set, and outputs.

    evaluate(params, state, data) -> metrics            of `make_evaluate`
    predict(model, params, state, data) -> outputs

A run evaluates on one set or on a mapping of sets; `evaluated` is that as part of its program.

Legend: N examples of the data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import refuse_train_state, require_counts, require_layer
from fnet.core.jax_insides import transfers_meant
from fnet.data.arrays import (
    as_arrays,
    as_batch,
    check_batch_size,
    check_data,
    count_examples,
    is_fields,
    native,
    trace_batch,
)
from fnet.data.sources import Examples, Stream, as_source, count_rows, inputs_alone, with_length
from fnet.data.streams import first_batch, one_epoch
from fnet.gradients.engines import check_engine, measure
from fnet.layers.children import apply
from fnet.training.stopping import Reducer, decide
from fnet.types import Batch, Layer, Mean, PyTree, TrainState


def make_evaluate(model: Layer, loss, metrics: Mapping[str, Callable] | None = None, batch_size: int | None = None):
    """``evaluate(params, state, data) -> metrics`` in inference, as `Mean`s over all of ``data``.

    With ``batch_size`` the data pass in slices of it (and a smaller last one), so that memory does not grow with them.
    Raises TypeError for a whole `TrainState` where its params or its state belong.
    """
    check_engine("make_evaluate", model, loss, metrics)
    require_counts("make_evaluate", batch_size=batch_size)

    def on_batch(params, state, batch):
        return measure(loss, metrics, apply(model, params, state, batch.inputs), batch)

    def evaluate(params, state, data):
        refuse_train_state("evaluate", params=params, state=state)
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
    from 1 to N; TypeError for a whole `TrainState` where its params or its state belong. NaN and infinities pass.

    >>> from fnet.layers import dense
    >>> params, state = dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> predict(dense(2), params, state, np.ones((10, 3), "float32"), batch_size=4).shape
    (10, 2)
    """
    require_layer("predict: model", model)
    refuse_train_state("predict", params=params, state=state)
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


def sets_of(validation: PyTree) -> Mapping[str, PyTree]:
    """The validation sets by their names; one alone is called "validation"."""
    return validation if is_several(validation) else {"validation": validation}


def is_several(validation: PyTree) -> bool:
    """Whether this is a mapping of names to sets; one of ``inputs`` and ``targets`` is a set."""
    return isinstance(validation, Mapping) and not is_fields(validation)


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
