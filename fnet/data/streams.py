"""Batches of sources, read by a thread ahead of the run; where a stream stands, and whether it can go on from there."""

from __future__ import annotations

import base64
import itertools
import json
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fnet.core import processes
from fnet.core.checks import described, is_whole
from fnet.core.files import first_line
from fnet.data.arrays import DataError, as_batch, count_examples, native
from fnet.data.sources import Examples, Stream, begun_anew, count_rows, stream_length, type_of, with_length
from fnet.types import Batch, PyTree

BYTES = "bytes, as base64"  # what a state that is bytes is kept under
LEAVE_SECONDS = 10.0  # that the end of a run waits for a loader which is at a batch


class Read(NamedTuple):
    """A batch on the host, or this process' part of it: its rows in the data, and where a stream stands after it."""

    batch: Batch
    rows: list[int] | None  # None of a stream
    state: Any
    examples: int  # of the whole batch


def read_rows(
    data: Batch | Examples,
    order_of: Callable[[int], np.ndarray],
    batch_size: int,
    step: int,
    part_of: Callable[[int], slice] = slice,
) -> Iterator[Read]:
    """The batches of mapped arrays or of a dataset from a step on, epoch after epoch; of each the part that is said."""
    n = count_rows(data)
    per_epoch = -(-n // batch_size)
    while True:
        order = order_of(step // per_epoch)
        for within in range(step % per_epoch, per_epoch):
            batch = order[within * batch_size : (within + 1) * batch_size]
            rows = batch[part_of(len(batch))].tolist()
            yield Read(take_rows(data, rows), rows, None, len(batch))
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
            f"example {row}: the dataset, a {type_of(source)}, says that it has {len(source)} and has none there "
            f"({first_line(error)}); expected as many as it says: mend its __len__"
        ) from error
    except Exception as error:
        error.add_note(f"at example {row} of the dataset, a {type_of(source)}")
        raise
    return _own(element, f"example {row}")


def one_epoch(
    data: Stream | Batch | Examples,
    batch_size: int | None = None,
    part_of: Callable[[int], slice] = slice,
) -> Iterator[Read]:
    """The batches of one epoch from the beginning, in order, or the parts of them; a stream's are its own."""
    if isinstance(data, Stream):
        stream = with_length(data)
        length = stream_length(stream)
        if length is not None and length < (stream.steps_per_epoch or 0):
            raise DataError(
                f"Stream: steps_per_epoch = {stream.steps_per_epoch}, and the source, a {type_of(stream.source)}, has "
                f"{length} batches; expected at most these, since each counts once here: leave steps_per_epoch out"
            )
        if length == stream.steps_per_epoch:
            return read_stream(stream, None, 0, again=False)
        return itertools.islice(read_stream(stream, None, 0), stream.steps_per_epoch)
    n = count_rows(data)
    size = batch_size or n
    return itertools.islice(read_rows(data, lambda _: np.arange(n), size, 0, part_of), -(-n // size))


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
    length = stream_length(stream)
    begun = -(-step // length) if length and state is not None else 1  # before it was saved: the source may count that
    for _ in range(begun - 1):
        iterator = iter(stream.source)
    if step and state is None:
        raise without_position(iterator, step)
    if state is not None:
        if not hasattr(iterator, "set_state"):
            raise DataError("the stream's iterator has no set_state; a run is resumed with one that has, as grain's do")
        _set_state(iterator, state)
    for element in _passes(stream, iterator, state is None, again):
        element, iterator = element
        batch = _own(element, "a batch of the stream")
        yield Read(batch, None, _state_of(iterator), processes.count() * count_examples(batch))
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
    length = stream_length(stream)
    while True:
        given = 0
        for element in iterator:
            given += 1
            yield element, iterator
        if length is not None and whole and given != length:
            raise DataError(
                f"the stream's source, a {type_of(stream.source)}, says that it has {length} batches and gave "
                f"{given}; expected as many as it says: mend its __len__"
            )
        if length is None or not again:
            return
        whole, iterator = True, iter(stream.source)


def first_batch(stream: Stream, *, resumed: bool = False) -> Batch:
    """What a stream gives first; DataError where it is no stream that can be read anew.

    Of a run that is to be ``resumed`` from its checkpoints, DataError too where the stream's state does not say where
    it stands.
    """
    if not is_whole(stream.steps_per_epoch):
        raise DataError(f"Stream: steps_per_epoch = {stream.steps_per_epoch!r}; expected a whole number of at least 1")
    begun = begun_anew(stream.source)
    try:
        first = _own(next(begun), "a batch of the stream")
    except StopIteration:
        raise DataError("Stream: the source is empty; expected at least 1 batch") from None
    if stream.resumable and (resumed or hasattr(begun, "set_state")):
        again = iter(stream.source)  # without a folder too, since the source may count how often it is begun
        if resumed:
            _check_resumable(begun, again)
    return first


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
