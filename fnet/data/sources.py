"""What data are read from while a run goes on: memory-mapped arrays, datasets of examples, streams of batches.

    data = open_arrays("inputs.npy", "targets.npy")                        fit(step, ts, data, epochs=2, batch_size=32)
    data = torch_dataset                                                   fit(step, ts, data, epochs=2, batch_size=32)
    data = torch_loader                                                    fit(step, ts, data, epochs=2)
    data = Stream(grain_dataset.batch(32), steps_per_epoch=100)            fit(step, ts, data, epochs=2)

Mapped arrays and datasets are visited in the same order as arrays in memory, so the run is the same to the bit. A
stream gives batches, in an order of its own; where it stands is saved with the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fnet.core.files import first_line
from fnet.data.arrays import DataError, count_examples, is_numbers, is_parts
from fnet.types import Batch


class Stream(NamedTuple):
    """Batches from an iterable: whatever `check_data` takes, never-ending or long enough for the run.

    One with a length, such as a list or torch's ``DataLoader``, is gone through again and again. To be resumed, its
    iterator has ``get_state()``, bytes or what JSON can hold, and ``set_state(state)``: grain's have. One without is
    for runs that need no resuming, and says so by ``resumable=False``, before it is kept in a folder. All that the
    order depends on is in that state: an iterator made anew and set to it goes on with the same batches.
    ``steps_per_epoch`` says how many batches are called an epoch; None takes the source's length.

    A source is begun once more than there are epochs, for a look at its first batch: a loader that shuffles is then in
    its second order. One whose iterator has ``set_state`` is begun another time, and in a folder it is tried whether
    its state is all there is.
    Workers that are forked after jax has begun may hang: ``multiprocessing_context="forkserver"``.
    """

    source: Iterable
    steps_per_epoch: int | None = None
    resumable: bool = True


class Examples(NamedTuple):
    """Examples that are read one by one: ``source[i]``, from 0 to ``len(source)`` − 1, such as torch's datasets.

    Each is ``(inputs, targets)`` or ``(inputs, targets, weights)`` without a batch axis, or a dict of these names; the
    arrays of all have the same shapes.
    """

    source: Any


def open_arrays(inputs: str | Path, targets: str | Path, weights: str | Path | None = None) -> Batch:
    """A `Batch` of memory-mapped ``.npy`` files, of which only what a batch needs is read.

    Raises DataError for a file that is missing or no ``.npy`` file; pickled objects are refused.
    """

    def mapped(path):
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            reason = first_line(error) if isinstance(error, OSError) else "it is no array, or one of objects"
            raise DataError(
                f"{path} cannot be mapped ({reason}); expected a .npy file that numpy.save wrote"
            ) from error

    return Batch(mapped(inputs), mapped(targets), None if weights is None else mapped(weights))


def as_source(data: Any) -> Any:
    """The data, of which a loader becomes a `Stream` and a dataset `Examples`, by what they can do.

    A dataset has ``__getitem__`` and a length, a loader or another iterable ``__iter__`` alone. Keras' ``PyDataset``
    (``Sequence``), whose items are batches, is a loader, told by its ``on_epoch_end``. Arrays, tables, tuples, lists
    and dicts are neither.
    """
    arrays = ("shape", "to_numpy", "__array__", "toarray")
    if isinstance(data, tuple | list | Mapping | str | bytes) or any(hasattr(data, name) for name in arrays):
        return data
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return Stream(_Batches(data)) if hasattr(data, "on_epoch_end") else Examples(data)
    return Stream(data) if hasattr(data, "__iter__") else data


class _Batches:
    """The items of Keras' ``PyDataset``, which are batches, one epoch after another."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator:
        if hasattr(self.source, "on_epoch_begin"):
            self.source.on_epoch_begin()
        for at in range(len(self.source)):
            yield self.source[at]
        self.source.on_epoch_end()


class _Inputs:
    """A source of which the targets are not needed: what it gives may be inputs alone."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.of, begun_anew(self.source))

    def __getitem__(self, row: int) -> Batch:
        return self.of(self.source[row])

    @staticmethod
    def of(element: Any) -> Batch:
        if is_numbers(element):
            return Batch(element, None)
        if type(element) in (tuple, list) and len(element) == 1:
            return Batch(element[0], None)
        if isinstance(element, Mapping) and "inputs" in element:
            return Batch(element["inputs"], None)
        return Batch(element[0] if isinstance(element, Batch) or is_parts(element) else element, None)


def inputs_alone(data: Any) -> Any:
    """A stream or a dataset whose batches and examples have no targets."""
    return data._replace(source=_Inputs(data.source))


def type_of(source: Any) -> str:
    """What a source is called, as whoever gave it knows it."""
    return type_of(source.source) if isinstance(source, _Batches | _Inputs) else type(source).__name__


def is_read_ahead(data: Any) -> bool:
    """Whether the data are read while the run goes on, not held on the device."""
    return isinstance(data, Stream | Examples) or any(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(data))


def count_rows(data: Batch | Examples) -> int:
    """How many examples there are; DataError where there are none."""
    if not isinstance(data, Examples):
        return count_examples(data)
    if not hasattr(data.source, "__len__") or not hasattr(data.source, "__getitem__"):
        raise DataError(
            f"the dataset is a {type_of(data.source)}, which gives no example by its index; expected source[i] and a "
            "length, as a list has them"
        )
    if (n := len(data.source)) < 1:
        raise DataError(f"the dataset, a {type_of(data.source)}, is empty; expected at least 1 example")
    return n


def stream_length(stream: Stream) -> int | None:
    """How many batches the source has, if it says so."""
    try:
        return len(stream.source)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def with_length(stream: Stream) -> Stream:
    """The stream with the steps of an epoch; DataError where neither it nor its source says how many."""
    if stream.steps_per_epoch is not None:
        return stream
    length = stream_length(stream)
    if length is None:
        raise DataError(
            "Stream: steps_per_epoch is None and the source has no length; expected how many batches are called an "
            "epoch: Stream(source, steps_per_epoch=100)"
        )
    if length == 0:
        raise DataError(
            f"Stream: the source, a {type_of(stream.source)}, has length 0; expected at least 1 batch: of a "
            "loader that drops the last batch, no more examples in a batch than there are"
        )
    return stream._replace(steps_per_epoch=length)


def begun_anew(source: Any) -> Iterator:
    """An iterator of a source; DataError where it has none, or is one."""
    try:
        begun = iter(source)
    except TypeError:
        raise DataError(f"Stream: the source is of type {type_of(source)}; expected an iterable of batches") from None
    if begun is source:
        raise DataError(
            f"Stream: the source is an iterator, {type(begun).__name__}, which gives its batches but once; "
            "expected an iterable that begins anew, such as a list or a grain dataset"
        )
    return begun
