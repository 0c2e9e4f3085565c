"""Data sets in memory: checked once on the host, before anything is compiled.

A data set is a `Batch` whose arrays all have the examples along their first axis. What people hold their numbers in
(pandas, torch, another byte order) becomes arrays at one door, `as_arrays`, before any example is taken of it.

Legend: N examples, S any shape of rows.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import refuse_masked
from fnet.core.contexts import batch_of, examples_here
from fnet.core.files import first_line
from fnet.types import Batch, PyTree


class DataError(ValueError):
    """The data do not fit the run; the message names the field, the value, what was expected and the remedy."""


def as_arrays(data: PyTree, name: str = "data") -> PyTree:
    """The data with each leaf as an array of NumPy or jax, in the order of its rows; no number is lost.

    Arrays of jax, of NumPy and of mapped files stay as they are, but for another byte order than the machine's. Tables
    and columns (pandas, polars: whatever has ``to_numpy``), tensors (whatever NumPy reads, such as torch's on the CPU)
    and lists of numbers become arrays by position: an index counts for nothing. Columns of several dtypes become one
    array where it holds all their numbers.

    Raises DataError for masked values, sparse matrices, lists of unequal lengths, and for what NumPy cannot read.

    >>> as_arrays({"a": np.array([1.5, 2.0], ">f4")})["a"].dtype
    dtype('float32')
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _as_array(path_of(name, path), leaf), data, is_leaf=is_numbers
    )


def is_numbers(node: Any) -> bool:
    """Whether this is a list of numbers, or of such lists, which counts as one array."""
    return isinstance(node, list) and all(
        is_numbers(item) or isinstance(item, bool | int | float | np.generic) for item in node
    )


def is_parts(data: Any) -> bool:
    """Whether this is a plain tuple or list of inputs, targets and perhaps weights."""
    return type(data) in (tuple, list) and len(data) in (2, 3)  # another NamedTuple's fields may mean something else


def is_fields(data: Any) -> bool:
    """Whether this is a mapping of ``inputs``, ``targets`` and perhaps ``weights``."""
    return isinstance(data, Mapping) and {"inputs", "targets"} <= set(data) <= set(Batch._fields)


def as_batch(data: Any, name: str = "data") -> Batch:
    """The data as a `Batch` of `as_arrays`.

    They are a `Batch`, a plain tuple or list of two or three, or a dict of ``inputs``, ``targets`` and ``weights``.
    """
    if is_parts(data):
        return as_arrays(Batch(*data), name)
    if isinstance(data, Batch):
        return as_arrays(data, name)
    if is_fields(data):
        return as_arrays(Batch(**data), name)
    found = f"a {type(data).__name__}"
    if type(data) in (tuple, list):
        found += f" of length {len(data)}"
    if isinstance(data, Mapping):
        found += f" of {', '.join(map(repr, data))}"
    remedy = "" if not isinstance(data, Mapping) else ", or a dict with the names inputs, targets and perhaps weights"
    if type(data) in (tuple, list) and all(map(is_parts, data)):
        remedy = ": a list of examples is a dataset, fnet.data.Examples(data)"
    raise DataError(f"{name} is {found}; expected Batch(inputs, targets) or Batch(inputs, targets, weights){remedy}")


def _as_array(path: str, leaf: Any) -> Any:
    number = int | float | np.generic  # which whoever reads it names
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.memmap | number):
        return leaf
    kind = f"{type(leaf).__module__.split('.')[0]}.{type(leaf).__name__}".removeprefix("builtins.")
    if isinstance(leaf, np.ma.MaskedArray) and leaf.dtype.names is None:
        refuse_masked(f"{path} has", leaf, "a.filled(0), or leave their examples out by a weight of 0", DataError)
    if hasattr(leaf, "toarray") and not hasattr(leaf, "__array__"):
        raise DataError(f"{path} is a {kind}, which is sparse; expected a dense array: .toarray() makes one")
    table: Any = getattr(leaf, "to_numpy", None)
    try:
        return native(np.asarray(leaf) if table is None else _numbers(np.asarray(table())))
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(leaf, list):
            raise DataError(f"{path} is a list of lists of unequal lengths; expected rows of one: pad them") from error
        raise DataError(
            f"{path} is a {kind} that NumPy cannot read ({first_line(error)}); expected arrays: of a tensor of torch "
            "take .detach().cpu().numpy(), after .float() if it has 16 bits"
        ) from error


def _numbers(array: np.ndarray) -> np.ndarray:
    """The objects of a table as numbers, where all of them are and none is lost: columns of several dtypes."""
    if array.dtype != object or not all(isinstance(item, bool | int | float | np.generic) for item in array.flat):
        return array
    items = [item.item() if isinstance(item, np.generic) else item for item in array.flat]  # which Python compares
    numbers = np.array(items)
    same = all(new == old or (new != new and old != old) for new, old in zip(numbers.tolist(), items, strict=True))
    return numbers.reshape(array.shape) if numbers.dtype.kind in "biuf" and same else array


def native(array: np.ndarray) -> np.ndarray:
    """In the machine's byte order; NumPy's long doubles, which jax has not, as its doubles."""
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        with np.errstate(over="ignore"):  # what gets infinite is refused where infinities are
            return array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def check_data(
    data: Batch | tuple,
    *,
    batch_size: SupportsIndex | None = None,
    name: str = "data",
    part: bool = False,
    rows: Sequence[int] | None = None,
    finite: bool = True,
) -> Batch:
    """The data as arrays on the device, or a `DataError` that says what is wrong with them.

    Dtypes are kept as far as jax holds them: without x64, float64 becomes float32 and int64 becomes int32, and a value
    that does not fit is an error (jax itself wraps it or makes it infinite). Integer and boolean weights become floats.

    Args:
        data: a `Batch`, or a plain tuple ``(inputs, targets)`` or ``(inputs, targets, weights)``; every array is
            ``(N, ...)``. NumPy arrays are copied.
        batch_size: if given, must be a whole number from 1 to N.
        name: what the messages call the data, e.g. ``"validation"``.
        part: these are some of the examples, so that all of their weights may be 0.
        rows: which ones of the whole data they are, as messages then say.
        finite: False lets NaN and infinities pass.

    Raises:
        DataError: no examples; arrays of different N or without a first axis; a dtype that is not real numbers; a value
            that is not finite or too large, but for targets of weight 0, which may be missing; weights that are
            negative or sum to 0; a ``batch_size`` that does not fit.

    >>> data = check_data((np.zeros((3, 2)), np.array([0, 1, 1])))
    >>> data.inputs.dtype, data.targets.dtype, data.weights
    (dtype('float32'), dtype('int32'), None)
    >>> check_data((np.array([[0.5], [np.nan]]), np.array([0, 1])))
    Traceback (most recent call last):
    fnet.data.arrays.DataError: data.inputs[1, 0] = nan; expected finite numbers: drop or replace them (1 value in all)
    """
    batch = as_batch(data, name)
    for path, leaf in named_arrays(batch, name):
        if isinstance(leaf, Tracer):
            raise DataError(f"{path} is traced; expected values, which can be checked: call check_data outside of jit")
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))
        if not real or np.dtype(dtype).kind == "m":  # a timedelta, which NumPy counts among the integers
            remedy = "encode text and categories as integers, times as seconds, complex numbers as two real ones"
            if dtype is np.dtype(object):
                remedy = "numbers among objects by .astype(float), text and categories by integers (.cat.codes)"
            raise DataError(f"{path} has dtype {dtype}; expected booleans, integers or floats: {remedy}")
    examples = count_examples(batch, name)
    if batch_size is not None:
        check_batch_size(batch_size, examples, name)
    paths, leaves = zip(*named_arrays(batch, name), strict=True)
    structure = jax.tree.structure(batch)
    counts = _counting(batch, name)
    arrays = [
        _to_device(path, leaf, count, rows, finite) for path, leaf, count in zip(paths, leaves, counts, strict=True)
    ]
    batch = jax.tree.unflatten(structure, arrays)
    return batch if batch.weights is None else batch._replace(weights=_check_weights(batch.weights, name, part, rows))


def count_examples(data: Batch, name: str = "data") -> int:
    """N, the length that all arrays of the data share; a `DataError` if they do not, or if it is 0."""
    if not jax.tree.leaves(data.inputs):
        raise DataError(f"{name}.inputs = {data.inputs!r} holds no array; expected one of shape (examples, ...)")
    leaves = named_arrays(data, name)
    first, examples = leaves[0][0], length_of(*leaves[0])
    for path, leaf in leaves:
        if not np.size(leaf):
            what = "number in each" if np.shape(leaf)[:1] > (0,) else "example"
            raise DataError(f"{path} is empty, shape {np.shape(leaf)}; expected at least 1 {what}: check the loader")
        if length_of(path, leaf) != examples:
            raise DataError(
                f"{path} has {length_of(path, leaf)} examples (shape {np.shape(leaf)}) and {first} has {examples}; "
                "expected the same number in each: the first axis of every array is the examples"
            )
    return examples


def check_host_data(data: Batch | tuple) -> Batch:
    """The data as they are if they are jax' already, else as `check_data` makes them."""
    on_host = any(not isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(data))
    return check_data(data) if on_host else as_batch(data, "data")


def trace_batch(
    function: Callable, arguments: tuple, data: PyTree, size: int, rows: Sequence[int] | None = None
) -> Any:
    """The shapes of ``function(*arguments, batch)`` for a batch of ``size`` examples of the data; nothing is computed.

    The integers of the batch are known where those of the data are, and those with the least and the greatest of each
    array are among them: so losses can check the labels, and embeddings the ids, at the true shape of a batch. (One
    trace mostly; more where these rows do not fit into it.) Raises what the function raises; a ValueError that it
    raises for these integers alone says in which example, or has a note of which ones they were. ``rows`` says which
    examples of the whole data these are.
    """
    if rows is None and (rows := examples_here()) is not None and len(rows) != jax.tree.leaves(data)[0].shape[0]:
        rows = None
    host = jax.tree.map(lambda leaf: None if isinstance(leaf, Tracer) else np.asarray(leaf), data)
    kept = lambda dtype: jax.dtypes.canonicalize_dtype(dtype) if isinstance(dtype, np.dtype) else dtype  # noqa: E731
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), kept(leaf.dtype)), data)
    weights, counted = None, host
    if isinstance(data, Batch) and host.weights is not None:  # an example of weight 0 has no label
        weights, counted = host.weights, host._replace(targets=with_zeros(host.targets, host.weights == 0))
    integers = [a for a in jax.tree.leaves(counted) if np.issubdtype(a.dtype, np.integer) and a.size]
    flat = [a.reshape(len(a), -1) for a in integers]
    extremes = sorted({int(row) for a in flat for row in (a.min(1).argmin(), a.max(1).argmax())}) or [0]
    result = None
    for begin in range(0, len(extremes), size):
        some = extremes[begin : begin + size]
        filled = some + some[:1] * (size - len(some))
        examples = filled if rows is None else [int(rows[row]) for row in filled]
        known = jax.tree.map(lambda a, at=filled: a[at] if np.issubdtype(a.dtype, np.integer) else None, host)
        if weights is not None:
            known = known._replace(weights=weights[filled])

        def traced(arguments, shapes, known=known):
            pick = lambda k, other: other if k is None else k  # noqa: E731
            return function(*arguments, jax.tree.map(pick, known, shapes, is_leaf=lambda leaf: leaf is None))

        failed: ValueError | None = None
        try:
            with batch_of(examples):
                result = jax.eval_shape(traced, arguments, whole)
        except ValueError as error:
            failed = error
        if failed is None:
            continue
        if integers:  # out of the handling of the first error, which a second one would show above itself
            jax.eval_shape(lambda arguments, shapes: function(*arguments, shapes), arguments, whole)
            if not is_placed(failed):
                failed.add_note(f"{EXTREMES}{examples[: len(some)]}")
        raise failed
    return result


EXTREMES = "found among the examples with the least and the greatest label or id: "


def is_placed(error: ValueError) -> bool:
    """Whether the message says in which example it is, as `place_of` does."""
    return re.search(r"\bin example \d", str(error)) is not None


def with_zeros(tree: PyTree, where: Any) -> PyTree:
    """The tree with 0 at the examples where ``where (N, ...)`` says so; leaves that have no such axes as they are.

    What is known stays known, so that labels can be checked.
    """

    def zeroed(leaf):
        if np.shape(leaf)[: where.ndim] != where.shape:
            return leaf
        xp: Any = jnp if isinstance(leaf, Tracer) or isinstance(where, Tracer) else np
        leaf = xp.asarray(leaf)  # in the dtype that it has there
        return xp.where(where.reshape(where.shape + (1,) * (leaf.ndim - where.ndim)), xp.zeros((), leaf.dtype), leaf)

    return jax.tree.map(zeroed, tree)


def named_arrays(data: PyTree, name: str) -> list[tuple[str, Any]]:
    """Every leaf with the path a reader would write: ``data.targets/labels``."""
    return [(path_of(name, path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(data)]


def path_of(name: str, path) -> str:
    """The path of a leaf as a reader would write it."""
    return f"{name}.{jax.tree_util.keystr(path, simple=True, separator='/')}" if path else name


def length_of(path: str, leaf: Any) -> int:
    """How many examples a leaf has; DataError for one without an axis of them."""
    if np.ndim(leaf):
        return np.shape(leaf)[0]
    remedy = "a tuple counts as a tree of numbers, make it an array with numpy.asarray"
    raise DataError(f"{path} = {leaf!r} has no axis of examples; expected an array of shape (examples, ...): {remedy}")


def check_batch_size(batch_size: Any, examples: int, name: str = "data") -> None:
    """Require a whole number from 1 to the number of examples."""
    expected = f"expected a whole number from 1 to {examples}, the number of examples in {name}"
    try:
        whole = operator.index(batch_size)
    except TypeError:
        whole = 0
    if isinstance(batch_size, bool) or not 1 <= whole <= examples:
        raise DataError(f"batch_size = {batch_size!r}; {expected} (all of them at once: batch_size={examples})")


def _counting(batch: Batch, name: str) -> list[np.ndarray | None]:
    """For each leaf where its numbers count, None for everywhere: targets of weight 0 may be missing, as NaN."""
    inputs, targets, rest = (jax.tree.leaves(part) for part in batch)
    if not isinstance(batch.weights, np.ndarray | jax.Array):
        return [None] * len([*inputs, *targets, *rest])
    live = np.asarray(batch.weights) != 0
    return [
        *(None for _ in inputs),
        *(live if np.shape(leaf)[: live.ndim] == live.shape else None for leaf in targets),
        *(None for _ in rest),
    ]


def _to_device(
    path: str, leaf: Any, counting: np.ndarray | None, rows: Sequence[int] | None, finite: bool
) -> jax.Array:
    host = native(np.asarray(leaf))
    floating = jnp.issubdtype(host.dtype, jnp.floating)
    if floating and finite:
        bad = ~np.isfinite(host)
        if counting is not None:
            bad &= counting.reshape(counting.shape + (1,) * (host.ndim - counting.ndim))
        _refuse(path, host, bad, "expected finite numbers: drop or replace them", rows)
    dtype = jax.dtypes.canonicalize_dtype(host.dtype)
    if dtype == host.dtype:
        return leaf if isinstance(leaf, jax.Array) else jax.device_put(host.copy())  # whose memory it may share
    with np.errstate(over="ignore"):
        narrow = host.astype(dtype)
    lost = np.isinf(narrow) & np.isfinite(host) if floating else narrow != host
    expected = f"expected numbers that {dtype} holds: scale or renumber them, or enable jax_enable_x64"
    _refuse(path, host, lost, expected, rows)
    return jax.device_put(narrow)


def _refuse(path: str, host: np.ndarray, bad: np.ndarray, expected: str, rows: Sequence[int] | None) -> None:
    """Raise about the first of the bad values, if there is one."""
    if bad.any():
        index = np.unravel_index(bad.argmax(), bad.shape)
        total = int(bad.sum())
        row = index[0] if rows is None else rows[int(index[0])]
        where, many = ", ".join(map(str, (row, *index[1:]))), "value" if total == 1 else "values"
        raise DataError(f"{path}[{where}] = {host[index]}; {expected} ({total} {many} in all)")


def _check_weights(weights: Any, name: str, part: bool, rows: Sequence[int] | None) -> jax.Array:
    if not isinstance(weights, jax.Array):
        raise DataError(
            f"{name}.weights is a {type(weights).__name__}; expected one array, shaped like the loss' values"
        )
    host = np.asarray(weights)
    _refuse(f"{name}.weights", host, host < 0, "expected 0 or more: 0 leaves an example out", rows)
    if not host.any() and not part:
        raise DataError(
            f"{name}.weights sum to 0; expected one above 0 at least: weights=None counts every example once"
        )
    return weights if jnp.issubdtype(weights.dtype, jnp.floating) else jnp.array(host, dtype=float)
