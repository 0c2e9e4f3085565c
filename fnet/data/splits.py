"""Parts of a data set: examples at rows, a split, folds for cross-validation; no example is lost or twice in one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import described, require_key
from fnet.data.arrays import DataError, as_arrays, as_batch, count_examples, length_of, named_arrays, native
from fnet.types import Batch, PyTree


def take(data: PyTree, rows: Any) -> PyTree:
    """The examples at ``rows``, integers of shape S, of every array in ``data``: ``(N, ...)`` becomes ``(S, ...)``.

    Concrete rows outside -N..N-1 raise a `DataError`. Within jit rows are not known yet and jax clamps them.

    >>> take(Batch(np.array([10, 11, 12]), np.array([0, 1, 2])), [2, 0])
    Batch(inputs=array([12, 10]), targets=array([2, 0]), weights=None)
    """
    data = as_arrays(data)
    if isinstance(rows, Tracer):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], data)
    rows = np.asarray(as_arrays(rows, "rows"))
    rows = rows if rows.size else rows.astype(int)  # an empty list has another dtype
    if not np.issubdtype(rows.dtype, np.integer):
        raise DataError(
            f"rows have dtype {rows.dtype}; expected integers: numpy.flatnonzero(mask) makes them of a mask"
        )
    for path, leaf in named_arrays(data, "data"):
        examples = length_of(path, leaf)
        outside = rows[(rows < -examples) | (rows >= examples)]
        if outside.size:
            raise DataError(f"row {outside[0]} is outside of {path}; expected {-examples} to {examples - 1}, its rows")
    return jax.tree.map(lambda leaf: native(leaf[rows]) if isinstance(leaf, np.memmap) else leaf[rows], data)


def split(
    data: Batch | tuple, sizes: float | Sequence[int], key: jax.Array, *, stratify: bool = False
) -> tuple[Batch, ...]:
    """The examples in a random order, cut into parts; every example lands in exactly one.

    Args:
        data: a `Batch` (or tuple, as in `check_data`) of N examples.
        sizes: examples per part, which add up to N; or a fraction f, for two parts of ``round(f * N)`` and the rest.
        key: the order; the same key and N give the same split, whatever the arrays hold.
        stratify: each part has its share of every class, to one example (to two where more than two parts have several
            sizes); the targets are labels (N,).

    >>> train, test = split(Batch(np.arange(10), np.arange(10)), 0.8, jax.random.key(0))
    >>> len(train.inputs), sorted(np.concatenate([train.inputs, test.inputs]).tolist())
    (8, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    require_key("split", key)
    batch = as_batch(data, "data")
    sizes = _part_sizes(sizes, count_examples(batch))
    return tuple(take(batch, rows) for rows in _parts("split", batch, sizes, key, stratify))


def folds(data: Batch | tuple, count: int, key: jax.Array, *, stratify: bool = False) -> list[tuple[Batch, Batch]]:
    """``count`` pairs ``(train, held_out)`` for cross-validation: every example is held out in exactly one of them.

    Held-out parts differ by one example at most; key, stratify and errors as in `split`.

    >>> parts = folds(Batch(np.arange(5), np.arange(5)), 2, jax.random.key(0))
    >>> [(len(train.inputs), len(held.inputs)) for train, held in parts]
    [(2, 3), (3, 2)]
    """
    require_key("folds", key)
    batch = as_batch(data, "data")
    examples = count_examples(batch)
    if not isinstance(count, int | np.integer) or isinstance(count, bool) or not 2 <= count <= examples:
        raise DataError(f"folds: count = {count!r}; expected a whole number from 2 to {examples}, the examples")
    sizes = [len(part) for part in np.array_split(np.arange(examples), count)]
    held = _parts("folds", batch, sizes, key, stratify)
    return [
        (take(batch, np.concatenate([*held[:i], *held[i + 1 :]])), take(batch, rows)) for i, rows in enumerate(held)
    ]


def _parts(who: str, batch: Batch, sizes: Sequence[int], key: jax.Array, stratify: bool) -> list[np.ndarray]:
    """The rows of parts of these sizes in a random order; stratified, with the classes spread evenly over them."""
    if not isinstance(stratify, bool | np.bool_):
        raise DataError(f"{who}: stratify is {described(stratify)}; expected True or False: the labels are the targets")
    order = np.asarray(jax.random.permutation(key, count_examples(batch)))
    if not stratify:
        return np.split(order, np.cumsum(sizes)[:-1])
    labels = np.asarray(batch.targets) if hasattr(batch.targets, "shape") else None
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iub":
        kind = "a tree" if labels is None else f"{labels.dtype}{list(labels.shape)}"
        raise DataError(f"data.targets is {kind}; expected labels, integers (N,), to be stratified by")
    # one class after another is dealt to the parts, whose turns are spread evenly: the j-th of n at (j + ½) / n
    turns = np.repeat(np.arange(len(sizes)), sizes)
    turns = turns[np.argsort(np.concatenate([(np.arange(n) + 0.5) / n for n in sizes]), kind="stable")]
    dealt = order[np.argsort(labels[order], kind="stable")]
    parts = [dealt[turns == part] for part in range(len(sizes))]
    mix = np.argsort(order)  # each example's place in the random order
    return [part[np.argsort(mix[part])] for part in parts]


def _suggested(sizes: Any, examples: int) -> str:
    """The whole numbers that fractions may have meant."""
    shares = np.asarray(sizes) if isinstance(sizes, list | tuple) else np.zeros(0)
    if shares.dtype.kind != "f" or len(shares) < 2 or not np.isclose(shares.sum(), 1):
        return ", such as (4000, 1000)"
    ends = np.round(np.cumsum(shares) * examples).astype(int)
    whole = np.diff([0, *ends[:-1], examples]).tolist()
    return f": {tuple(whole)}" + (f", or {sizes[0]}" if len(whole) == 2 else "")


def _part_sizes(sizes: Any, examples: int) -> list[int]:
    if isinstance(sizes, float | np.floating):
        if not 0 < sizes < 1:
            raise DataError(f"sizes = {sizes}; expected a fraction between 0 and 1, or a size per part")
        first = round(sizes * examples)
        parts = [first, examples - first]
    else:
        try:
            parts = [operator.index(size) for size in sizes]
        except TypeError:
            meant = _suggested(sizes, examples)
            raise DataError(
                f"sizes = {sizes!r}; expected a fraction, or whole numbers that add up to {examples}{meant}"
            ) from None
    if sum(parts) != examples or min(parts, default=0) < 1:
        remedy = "name every part and leave none empty"
        raise DataError(f"sizes = {sizes!r} make parts of {parts}; expected sizes that add up to {examples}: {remedy}")
    return parts
