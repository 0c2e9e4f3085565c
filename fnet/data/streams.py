"""Data that are read while a run goes on: memory-mapped arrays, datasets of examples, and streams of batches.

    data = open_arrays("inputs.npy", "targets.npy")                        fit(step, ts, data, epochs=2, batch_size=32)
    data = torch_dataset                                                   fit(step, ts, data, epochs=2, batch_size=32)
    data = torch_loader                                                    fit(step, ts, data, epochs=2)
    data = Stream(grain_dataset.batch(32), steps_per_epoch=100)            fit(step, ts, data, epochs=2)

Mapped arrays and datasets are visited in the same order as arrays in memory, so the run is the same to the bit. A
stream gives batches, in an order of its own; where it stands is saved with the run. All are read by a thread, ahead of
the run.
"""

from __future__ import annotations

import base64
import itertools
import json
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fnet.core.files import first_line
from fnet.data.arrays import DataError, as_batch, count_examples, is_numbers, native
from fnet.types import Batch, PyTree, described, is_whole

BYTES = "bytes, as base64"  # what a state that is bytes is kept under
LEAVE_SECONDS = 10.0  # that the end of a run waits for a loader which is at a batch


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


class Read(NamedTuple):
    """A batch on the host: its rows in the data, if it has any, and where a stream stands after it."""

    batch: Batch
    rows: list[int] | None
    state: Any


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
        return map(self.of, _begun(self.source))

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
        pair = isinstance(element, Batch) or (type(element) in (tuple, list) and len(element) in (2, 3))
        return Batch(element[0] if pair else element, None)


def inputs_alone(data: Any) -> Any:
    """A stream or a dataset whose batches and examples have no targets."""
    return data._replace(source=_Inputs(data.source))


def _kind(source: Any) -> str:
    """What a source is called, as whoever gave it knows it."""
    return _kind(source.source) if isinstance(source, _Batches | _Inputs) else type(source).__name__


def is_read_ahead(data: Any) -> bool:
    """Whether the data are read while the run goes on, not held on the device."""
    return isinstance(data, Stream | Examples) or any(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(data))


def count_rows(data: Batch | Examples) -> int:
    """How many examples there are; DataError where there are none."""
    if not isinstance(data, Examples):
        return count_examples(data)
    if not hasattr(data.source, "__len__") or not hasattr(data.source, "__getitem__"):
        raise DataError(
            f"the dataset is a {_kind(data.source)}, which gives no example by its index; expected source[i] and a "
            "length, as a list has them"
        )
    if (n := len(data.source)) < 1:
        raise DataError(f"the dataset, a {_kind(data.source)}, is empty; expected at least 1 example")
    return n


def read_rows(
    data: Batch | Examples, order_of: Callable[[int], np.ndarray], batch_size: int, step: int
) -> Iterator[Read]:
    """The batches of mapped arrays or of a dataset from a step on, epoch after epoch."""
    n = count_rows(data)
    per_epoch = -(-n // batch_size)
    while True:
        order = order_of(step // per_epoch)
        for within in range(step % per_epoch, per_epoch):
            rows = order[within * batch_size : (within + 1) * batch_size].tolist()
            yield Read(take_rows(data, rows), rows, None)
            step += 1


def take_rows(data: Any, rows: Sequence[int] | np.ndarray) -> Batch:
    """These examples, on the host; of data that are read ahead no others are read."""
    if isinstance(data, Examples):
        return _stacked({row: _example(data.source, row) for row in map(int, rows)})
    return jax.tree.map(lambda leaf: native(np.asarray(leaf[np.asarray(rows)])), data)  # jax takes no list


def _example(source: Any, row: int) -> Batch:
    try:
        element = source[row]
    except (IndexError, StopIteration) as error:
        raise DataError(
            f"example {row}: the dataset, a {_kind(source)}, says that it has {len(source)} and has none there "
            f"({first_line(error)}); expected as many as it says: mend its __len__"
        ) from error
    except Exception as error:
        error.add_note(f"at example {row} of the dataset, a {_kind(source)}")
        raise
    return _own(element, f"example {row}")


def one_epoch(data: Stream | Batch | Examples, batch_size: int | None = None) -> Iterator[Read]:
    """The batches of one epoch from the beginning, in order; a stream's are its own."""
    if isinstance(data, Stream):
        stream = with_length(data)
        length = length_of(stream)
        if length is not None and length < (stream.steps_per_epoch or 0):
            raise DataError(
                f"Stream: steps_per_epoch = {stream.steps_per_epoch}, and the source, a {_kind(stream.source)}, has "
                f"{length} batches; expected at most these, since each counts once here: leave steps_per_epoch out"
            )
        if length == stream.steps_per_epoch:
            return read_stream(stream, None, 0, again=False)
        return itertools.islice(read_stream(stream, None, 0), stream.steps_per_epoch)
    n = count_rows(data)
    size = batch_size or n
    return itertools.islice(read_rows(data, lambda _: np.arange(n), size, 0), -(-n // size))


def _own(element: Any, name: str) -> Batch:
    """What a source has given as arrays of ours: it may go on with its own."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.array(leaf), as_batch(element, name))


def _stacked(examples: Mapping[int, Batch]) -> Batch:
    """Examples by their rows as a batch; DataError names the first of another kind."""
    arrays = {row: jax.tree.map(np.asarray, example) for row, example in examples.items()}
    first, like = next(iter(arrays.items()))
    for row, example in arrays.items():
        if kind_of(example) != kind_of(like):
            raise DataError(
                f"example {row} is {described(example)} and example {first} is {described(like)}; expected one kind, "
                "so that they make a batch: bring them to one shape and dtype"
            )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *arrays.values())


def kind_of(batch: PyTree) -> Any:
    """Its containers, shapes and dtypes."""
    leaves = (leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for leaf in jax.tree.leaves(batch))
    return jax.tree.structure(batch), *((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves)


def read_stream(stream: Stream, state: Any, step: int, *, again: bool = True) -> Iterator[Read]:
    """The batches of a stream, from where ``state`` says that it stood, else from its beginning.

    A source with a length is gone through ``again`` and again, or once.
    """
    iterator: Any = iter(stream.source)
    if state is not None and (length := length_of(stream)):  # begun as often as where it was saved: it may count that
        for _ in range(-(-step // length) - 1):
            iterator = iter(stream.source)
    if step and state is None:
        raise without_position(iterator, step)
    if state is not None:
        if not hasattr(iterator, "set_state"):
            raise DataError("the stream's iterator has no set_state; a run is resumed with one that has, as grain's do")
        _set_state(iterator, state)
    for element in _passes(stream, iterator, state is None, again):
        element, iterator = element
        yield Read(_own(element, "a batch of the stream"), None, _state_of(iterator))
        step += 1
    if not again:
        return
    raise DataError(f"the stream ended after {step} batches; expected one that lasts as long as the run: repeat it")


def without_position(iterator: Any, step: int) -> DataError:
    """The error of a stream that is to go on at a step, of which it is not known where it stood then."""
    if hasattr(iterator, "set_state"):
        return DataError(
            f"the run stands at step {step}, and where its stream stood then is not known; expected a run of this "
            "stream, by whose folder it is resumed: else begin anew, from step 0"
        )
    return DataError(
        f"the run stands at step {step}, and its stream, whose {type(iterator).__name__} has no set_state, cannot "
        "go on from there; expected one that can, as grain's do, or data whose rows are known, such as arrays: "
        "else begin anew, from step 0"
    )


def _passes(stream: Stream, iterator: Iterator, whole: bool, again: bool) -> Iterator[tuple[Any, Iterator]]:
    """The elements, each with its iterator; of a source with a length one epoch after another.

    Not ``whole`` is the first where it was resumed. DataError where the source gives another number than its length.
    """
    length = length_of(stream)
    while True:
        given = 0
        for element in iterator:
            given += 1
            yield element, iterator
        if length is not None and whole and given != length:
            raise DataError(
                f"the stream's source, a {_kind(stream.source)}, says that it has {length} batches and gave "
                f"{given}; expected as many as it says: mend its __len__"
            )
        if length is None or not again:
            return
        whole, iterator = True, iter(stream.source)


def length_of(stream: Stream) -> int | None:
    """How many batches the source has, if it says so."""
    try:
        return len(stream.source)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def with_length(stream: Stream) -> Stream:
    """The stream with the steps of an epoch; DataError where neither it nor its source says how many."""
    if stream.steps_per_epoch is not None:
        return stream
    length = length_of(stream)
    if length is None:
        raise DataError(
            "Stream: steps_per_epoch is None and the source has no length; expected how many batches are called an "
            "epoch: Stream(source, steps_per_epoch=100)"
        )
    if length == 0:
        raise DataError(
            f"Stream: the source, a {_kind(stream.source)}, has length 0; expected at least 1 batch: of a "
            "loader that drops the last batch, no more examples in a batch than there are"
        )
    return stream._replace(steps_per_epoch=length)


def first_batch(stream: Stream, *, resumed: bool = False) -> Batch:
    """What a stream gives first; DataError where it is no stream that can be read anew.

    Of a run that is to be ``resumed`` from its checkpoints, DataError too where the stream's state does not say where
    it stands.
    """
    if not is_whole(stream.steps_per_epoch):
        raise DataError(f"Stream: steps_per_epoch = {stream.steps_per_epoch!r}; expected a whole number of at least 1")
    begun = _begun(stream.source)
    try:
        first = _own(next(begun), "a batch of the stream")
    except StopIteration:
        raise DataError("Stream: the source is empty; expected at least 1 batch") from None
    if stream.resumable and (resumed or hasattr(begun, "set_state")):
        again = iter(stream.source)  # without a folder too, since the source may count how often it is begun
        if resumed:
            _check_resumable(begun, again)
    return first


def _begun(source: Any) -> Iterator:
    """An iterator of a source; DataError where it has none, or is one."""
    try:
        begun = iter(source)
    except TypeError:
        raise DataError(f"Stream: the source is of type {_kind(source)}; expected an iterable of batches") from None
    if begun is source:
        raise DataError(
            f"Stream: the source is an iterator, {type(begun).__name__}, which gives its batches but once; "
            "expected an iterable that begins anew, such as a list or a grain dataset"
        )
    return begun


def _check_resumable(begun: Any, again: Any) -> None:
    """Require that another iterator, set to the state of the one that was begun, goes on as that does."""
    lacking = [name for name in ("get_state", "set_state") if not hasattr(begun, name)]
    remedy = "Stream(..., resumable=False) where that is meant"
    if lacking:
        raise DataError(
            f"Stream: the source's iterator, {type(begun).__name__}, has no {' and no '.join(lacking)}, so that the "
            f"run could not be resumed from its checkpoints; expected both, as grain's iterators have them, or {remedy}"
        )
    state = _state_of(begun)
    expected = [_own(batch, "a batch of the stream") for batch in itertools.islice(begun, 1)]
    _set_state(again, state)
    found = [_own(batch, "a batch of the stream") for batch in itertools.islice(again, 1)]
    bits = lambda batches: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(batches)]  # noqa: E731
    if kind_of(expected) != kind_of(found) or bits(expected) != bits(found):
        raise DataError(
            f"Stream: the source's iterator, {type(begun).__name__}, gives another batch than one made anew and set to "
            "its state, so that the run could not be resumed as it was; expected the order, and what is drawn at "
            f"random, in what get_state returns, or {remedy}"
        )


def _state_of(iterator: Any) -> Any:
    """Where an iterator stands, as JSON holds it; None where it cannot say."""
    held = iterator.get_state() if hasattr(iterator, "get_state") else None
    if isinstance(held, bytes):
        held = {BYTES: base64.b64encode(held).decode()}
    try:
        # a copy, since the iterator may go on with its own
        return json.loads(json.dumps(held, default=lambda number: number.item()))
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"the stream's state is {held!r}; expected what JSON holds, to be saved with the run"
        ) from error


def _set_state(iterator: Any, state: Any) -> None:
    iterator.set_state(base64.b64decode(state[BYTES]) if isinstance(state, dict) and BYTES in state else state)


def ahead(reads: Iterator[Read], count: int) -> Generator[Read]:
    """The same batches, of which a thread reads up to ``count`` ahead."""
    waiting: queue.Queue = queue.Queue(count)
    closed = threading.Event()

    def put(item) -> bool:
        while not closed.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for read in reads:
                if not put(read):
                    return
            put(None)
        except BaseException as error:  # handed to whoever waits
            put(error)

    thread = threading.Thread(target=work, name="fnet-reader", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item
    finally:
        closed.set()
        thread.join(LEAVE_SECONDS)  # within jax at the interpreter's end it would abort the process
        if thread.is_alive():
            warnings.warn(
                f"a thread still waits for the loader's next batch after {LEAVE_SECONDS:g} seconds; it ends with that",
                RuntimeWarning,
                stacklevel=2,
            )


def joined(batches: list[Batch]) -> Batch:
    """Batches one after another as one."""
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *batches)
