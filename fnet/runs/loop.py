"""The compiled part of a run: one program that makes any number of steps, with what is due between them.

Legend: N examples, S steps an epoch, B batch size, C steps that a chunk may have at most.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core import processes
from fnet.core.numerics import with_words, words_of
from fnet.data.arrays import DataError, check_data, count_examples
from fnet.data.sources import Examples, Stream, is_read_ahead
from fnet.data.streams import Read, ahead, joined, kind_of, one_epoch, read_rows, read_stream
from fnet.runs.arguments import Plan, dry_run, order_at
from fnet.training.epochs import epoch_order, rows_of, steps_per_epoch, traced_once
from fnet.training.evaluation import evaluated, named_metrics, results_by_name, sets_of
from fnet.training.steps import Step
from fnet.training.stopping import Reducer, decide, stopped
from fnet.types import Batch, PyTree, TrainState

READ_BYTES = 32_000_000  # of batches that are sent to the device at a time


class Outputs(NamedTuple):
    """What a chunk tells the host."""

    step: jax.Array  # where it ended
    metrics: PyTree  # (C, ...), of which as many rows are filled as it made steps
    results: dict[str, Any]  # (evaluations, ...)
    evaluated: jax.Array  # the steps of these evaluations; 0 in rows that are not filled
    finite: jax.Array  # whether all parameters and model states are
    stopped: jax.Array  # whether the reducer ended the run
    reads: Any = ()  # of a stream: its batches, and where it stands


def run_chunk(
    ts: TrainState,
    count: jax.Array,
    data: Batch,
    validation: PyTree,
    *,
    step: Step,
    batch_size: int,
    shuffle: bool,
    evaluate: Callable | None,
    every: int,
    stop: Reducer | None,
    capacity: int,
) -> tuple[TrainState, Outputs]:
    """``count`` steps from wherever ``ts`` stands, with the evaluations and decisions after every ``every`` steps."""
    n, per_epoch = count_examples(data), steps_per_epoch(data, batch_size)
    full = n // batch_size  # of the S steps of an epoch; where N / B leaves a rest, the last step is smaller

    def order_of(ts):
        return epoch_order(ts.key, ts.step // per_epoch, n) if shuffle else jnp.arange(n)

    @traced_once
    def one(ts, rows):
        return step(ts, rows_of(data, rows))

    @traced_once
    def evaluation(ts):
        return evaluated(ts, validation, evaluate, stop)

    def segment(carry):
        """Steps up to the end of the chunk, the epoch's full batches or the next evaluation; then what is due there."""
        ts, order, done, metrics, at, results, rows = carry
        within = ts.step % per_epoch
        order = jax.lax.cond((within == 0) | (done == 0), order_of, lambda ts: order, ts)
        steps = jnp.minimum(count - done, full - within)
        if evaluate:
            steps = jnp.minimum(steps, every - ts.step % every)

        def full_batch(i, carry):
            ts, metrics = carry
            rows = jax.lax.dynamic_slice_in_dim(order, (within + i) * batch_size, batch_size)
            ts, now = one(ts, rows)
            return ts, put(metrics, done + i, now)

        ts, metrics = jax.lax.fori_loop(0, steps, full_batch, (ts, metrics))
        done = done + steps
        if n % batch_size:
            due = (ts.step % per_epoch == full) & (done < count)
            if evaluate:
                due &= (steps == 0) | (ts.step % every != 0)  # an evaluation comes first

            def last_batch(_, carry):
                ts, metrics = carry
                ts, now = one(ts, order[full * batch_size :])
                return ts, put(metrics, done, now)

            # a loop too, which XLA may compile by another emitter than what is in none: see run_batches
            ts, metrics = jax.lax.fori_loop(0, due.astype(jnp.int32), last_batch, (ts, metrics))
            done = done + due.astype(jnp.int32)
        if evaluate:

            def at_boundary(ts, at, results, row):
                ts, now = evaluation(ts)
                return ts, at.at[row].set(ts.step), put(results, row, now), row + 1

            arguments = ts, at, results, rows
            ts, at, results, rows = jax.lax.cond(ts.step % every == 0, at_boundary, lambda *same: same, *arguments)
        return ts, order, done, metrics, at, results, rows

    metrics = room(jax.eval_shape(one, ts, jnp.zeros(batch_size, jnp.int32))[1], capacity)
    slots = capacity // every + 1 if evaluate else 0
    told = jax.eval_shape(evaluation, ts)[1] if evaluate else {}
    results = room(told, slots)
    zero = jnp.zeros((), jnp.int32)
    # the first order is made within as well: out here it would be compiled a second time
    none = jnp.zeros(n, jax.eval_shape(order_of, ts).dtype)
    carry = ts, none, zero, metrics, jnp.zeros(slots, jnp.int32), results, zero
    going = lambda carry: (carry[2] < count) & ~stopped(carry[0])  # noqa: E731
    ts, _, _, metrics, at, results, _ = jax.lax.while_loop(going, segment, carry)
    return ts, Outputs(jnp.copy(ts.step), metrics, results, at, all_finite(ts), jnp.copy(stopped(ts)))


def room(abstract: PyTree, rows: int) -> PyTree:
    """Buffers for so many values of each of these shapes."""
    return jax.tree.map(lambda a: jnp.zeros((rows, *jnp.shape(a)), a.dtype), abstract)


def put(buffers: PyTree, row, values: PyTree) -> PyTree:
    """The buffers with the values in a row."""
    write = lambda buffer, value: jax.lax.dynamic_update_index_in_dim(buffer, value, row, 0)  # noqa: E731
    return jax.tree.map(write, buffers, values)


@jax.jit  # one program where a chunk ends outside of one
def all_finite(ts: TrainState) -> jax.Array:
    """Whether every number of the parameters and the model's state is finite."""
    floats = [a for a in jax.tree.leaves((ts.params, ts.state)) if jnp.issubdtype(a.dtype, jnp.floating)]
    # a sum of zeros, or NaN: half of what isfinite takes to compile
    return functools.reduce(jnp.logical_and, (jnp.sum(a * 0) == 0 for a in floats), jnp.array(True))


def in_memory(plan: Plan, ts: TrainState, compile: Callable) -> Callable:
    """`run_chunk` for this plan, compiled."""
    options = {
        "step": plan.step,
        "batch_size": plan.batch_size,
        "shuffle": plan.shuffle,
        "evaluate": plan.evaluate,
        "every": plan.every if plan.evaluate else 0,
        "stop": plan.stop,
        "capacity": plan.capacity,
    }
    count = np.asarray(0, np.int32)
    arguments = {"state": ts, "count": count, "data": plan.data, "validation": plan.validation}
    return compile(run_chunk, options, arguments)


# --- evaluations from the host ---------------------------------------------------------------------------------------


def evaluating(plan: Plan, ts: TrainState, program: Callable, compile: Callable) -> Callable:
    """``program``, which evaluates nothing, with the evaluations between its steps: where data are read ahead."""
    at_boundary = boundary(plan, ts, compile)

    def call(ts, count, data, _):
        position = int(ts.step)
        end, made, results, at = position + int(count), [], [], []
        while position < end and not bool(stopped(ts)):
            steps = min(end - position, plan.every - position % plan.every)
            ts, outputs = program(ts, np.asarray(steps, np.int32), data, None)
            made.append(outputs._replace(metrics=jax.tree.map(lambda a, n=steps: np.asarray(a)[:n], outputs.metrics)))
            position += steps
            if position % plan.every == 0:
                ts, now = at_boundary(ts)
                results.append(jax.tree.map(np.asarray, now))
                at.append(position)
        stack = lambda join, trees: jax.tree.map(lambda *leaves: join(leaves), *trees) if trees else {}  # noqa: E731
        reads = tuple(read for outputs in made for read in outputs.reads)
        metrics, found = stack(np.concatenate, [outputs.metrics for outputs in made]), stack(np.stack, results)
        ended = jnp.copy(ts.step), metrics, found, np.asarray(at, int)
        return ts, Outputs(*ended, all_finite(ts), jnp.copy(stopped(ts)), reads)  # pyright: ignore[reportArgumentType]

    return call


def boundary(plan: Plan, ts: TrainState, compile: Callable) -> Callable:
    """``ts -> ts, results``: an evaluation, and what is decided on it."""
    sets = sets_of(plan.validation)
    read = {name: held for name, held in sets.items() if is_read_ahead(held)}
    if not read:
        options = {"evaluate": plan.evaluate, "stop": plan.stop}
        program = compile(evaluated, options, {"state": ts, "validation": plan.validation})
        return lambda ts: program(ts, plan.validation)
    programs: dict[Any, Callable] = {}  # by the shapes of what they evaluate; and what decides

    def on_batch(ts, batch, examples=None):
        batch = batch if examples is None else plan.put(batch, examples)
        kind = kind_of(batch)
        if kind not in programs:
            programs[kind] = compile(evaluated_batch, {"evaluate": plan.evaluate}, {"state": ts, "batch": batch})
        return programs[kind](ts, batch)

    def at_boundary(ts):
        found = {}
        for name, held in sets.items():
            if name not in read:
                ts, found[name] = on_batch(ts, held)
                continue
            total = None
            for batch, examples in batches_of(name, held, plan, ts):
                ts, some = on_batch(ts, batch, examples)
                some = jax.tree.map(lambda a: np.asarray(a, np.float64), some)  # sums of many batches
                total = some if total is None else jax.tree.map(np.add, total, some)
            if not any(np.any(mean.count) for _, mean in named_metrics(total)):
                raise processes.of_all(
                    DataError(
                        f"{name}.weights sum to 0 over the whole set; expected one above 0 at least: weights=None "
                        "counts every example once"
                    )
                )
            found[name] = total
        results = results_by_name(found, found)
        results = jax.tree.map(lambda a, like: jnp.asarray(a, like.dtype), results, plan.results)
        if decided not in programs:
            programs[decided] = compile(decided, {"stop": plan.stop}, {"state": ts, "results": results})
        return programs[decided](ts, results)

    return at_boundary


def batches_of(name: str, held: Stream | Examples, plan: Plan, ts: TrainState) -> Iterator[tuple[Batch, int]]:
    """The checked batches of a validation set, which a thread reads ahead, or this process' parts; and their sizes."""
    evaluate: Any = plan.evaluate
    reads = ahead(one_epoch(held, plan.batch_size, plan.part_of), 2)
    one = lambda ts, batch: evaluate(ts.params, ts.state, batch)  # noqa: E731
    with closing(labels_checked(name, one, ts, reads)) as checked:
        while True:
            with processes.together(DataError):
                if (read := next(checked, None)) is not None:
                    batch = check_data(read.batch, name=name_of(read, name), part=True, rows=read.rows)
            if isinstance(held, Stream):
                check_parts(name, plan, [] if read is None else [read])  # all end with the same
            if read is None:
                return
            yield batch, read.examples


def evaluated_batch(ts: TrainState, batch: Batch, *, evaluate: Callable) -> tuple[TrainState, PyTree]:
    """The state as it was, and what an evaluation gives of some data."""
    return ts, evaluate(ts.params, ts.state, batch)


def decided(ts: TrainState, results: dict[str, Any], *, stop: Reducer | None) -> tuple[TrainState, dict[str, Any]]:
    """The state after what is decided on the results, and these."""
    return decide(stop, ts, results), results


# --- data that are read ahead ----------------------------------------------------------------------------------------


@contextmanager
def reading(plan: Plan, ts: TrainState, state: Any, compile: Callable) -> Iterator[Callable]:
    """The function that makes a chunk of data that a thread reads ahead, with the arguments and outputs of `run_chunk`.

    It evaluates nothing: `evaluating` does. Full batches are sent to the device up to READ_BYTES at a time and run in
    one loop there; one that is alone, such as an epoch's last of another size, runs in a loop of its own.
    """
    position, key = int(ts.step), jax.tree.map(_own_key, ts.key)
    settings: Any = jax.config
    wide, partitionable = settings.jax_enable_x64, settings.jax_threefry_partitionable

    def order_of(epoch):
        # jax's contexts hold in the thread that enters them
        with jax.enable_x64(wide), jax.threefry_partitionable(partitionable), jax.transfer_guard("allow"):
            return order_at(plan, key, epoch)

    if isinstance(plan.data, Stream):
        reads = read_stream(plan.data, state, position)
    else:
        reads = read_rows(plan.data, order_of, plan.batch_size, position, plan.part_of)
    most = min(plan.capacity, plan.every if plan.evaluate else plan.per_epoch)
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(plan.sample))  # bytes of a batch
    size = max(1, min(most, READ_BYTES // max(1, each)))
    name = "the stream" if isinstance(plan.data, Stream) else "data"
    reads = labels_checked(name, plan.step, ts, ahead(itertools.islice(reads, plan.end - position), 2 * size))
    counted = position % plan.per_epoch > 0  # of an epoch that had begun nothing is known
    waiting: deque[Read] = deque()
    programs: dict[Any, Callable] = {}  # by their shapes

    def program(ts, batches, count):
        """That of so many batches; compiled at the first of their kind."""
        shapes = kind_of(batches)
        if shapes not in programs:
            arguments = {"state": ts, "batches": batches, "count": count}
            programs[shapes] = compile(run_batches, {"step": plan.step}, arguments)
        return programs[shapes]

    few = min(size, 2)  # an index into an axis of one is no index, and the loop another program
    for many in {few, size}:
        some = jax.tree.map(lambda a, many=many: jax.ShapeDtypeStruct((many, *a.shape), a.dtype), plan.sample)
        program(ts, plan.put(some, plan.batch_size, 1), np.asarray(0, np.int32))

    def take(most: int) -> list[Read]:
        """Up to ``most`` batches of one size."""
        taken: list[Read] = []
        while len(taken) < most:
            read = waiting.popleft() if waiting else next(reads)
            if taken and (read.examples, kind_of(read.batch)) != (taken[0].examples, kind_of(taken[0].batch)):
                waiting.appendleft(read)
                break
            taken.append(read)
        return taken

    def check_weights(taken: list[Read]) -> None:
        """DataError at the end of an epoch in which no example of any process had a weight above 0."""
        nonlocal counted
        weights = [read.batch.weights for read in taken]
        weighed = [each is None or bool(np.any(np.asarray(each))) for each in weights]
        for at, some in enumerate(processes.greatest(*weighed), position + 1):
            counted |= bool(some)
            if at % plan.per_epoch == 0:
                if not counted:
                    raise processes.of_all(
                        DataError(
                            f"the weights of {name} sum to 0 over the epoch that ends at step {at}; expected one above "
                            "0 at least: weights=None counts every example once"
                        )
                    )
                counted = False

    def call(ts, count, *_):
        nonlocal position
        end, metrics, used = position + int(count), [], []
        while position < end:
            with processes.together(DataError):
                taken = take(min(size, end - position))
                n, room_for = len(taken), size if len(taken) > 1 else few
                whole, number = on_device(taken, room_for, name), np.asarray(n, np.int32)
            if isinstance(plan.data, Stream):
                check_parts(name, plan, taken)
            check_weights(taken)
            rows = jax.tree.map(lambda a, m=room_for: a.reshape(m, a.shape[0] // m, *a.shape[1:]), whole)
            parts = plan.put(rows, taken[0].examples, 1)
            ts, now = program(ts, parts, number)(ts, parts, number)
            metrics.append(jax.tree.map(lambda a, n=n: np.asarray(a)[:n], now))
            used += taken if isinstance(plan.data, Stream) else []  # the rows of mapped data are known by the step
            position += len(taken)
        joint = jax.tree.map(lambda *leaves: np.concatenate(leaves), *metrics)
        ended = np.asarray(position), joint, {}, np.zeros(0, int)
        return ts, Outputs(*ended, all_finite(ts), jnp.copy(stopped(ts)), tuple(used))  # pyright: ignore[reportArgumentType]

    try:
        yield call
    finally:
        reads.close()


def _own_key(key: jax.Array) -> jax.Array:
    """A copy of the key for a thread of this process: one of several would wait for the others' threads."""
    return with_words(key, jnp.array(np.asarray(words_of(key))))


def check_parts(name: str, plan: Plan, reads: list[Read]) -> None:
    """Require of what processes' streams give of batches that each gives what its devices hold, and all as much."""
    if plan.placement is None or not processes.several():
        return
    sizes = [count_examples(read.batch) for read in reads]
    processes.require_same(
        name, {"examples of a batch": sizes}, "an equal part of each batch from each process' stream"
    )
    for size, read in zip(sizes, reads, strict=True):
        part = plan.placement.part_of(read.examples)
        if size != part.stop - part.start:
            raise processes.of_all(
                DataError(
                    f"a batch of {name} has {size} examples in each of {processes.count()} processes, whose devices "
                    f"hold {part.stop - part.start} of {read.examples} each; expected as many: a mesh whose data and "
                    "fsdp divide them and are spread over all processes"
                )
            )


def on_device(reads: list[Read], size: int, name: str) -> Batch:
    """The batches joined, with copies of the first up to ``size`` of them; DataError names the batch that is wrong."""
    batches = [read.batch for read in reads]
    try:
        return check_data(joined([*batches, *batches[:1] * (size - len(reads))]), part=True)
    except DataError:
        for read in reads:  # which of them it is, and where in it
            try:
                check_data(read.batch, name=name_of(read, name), part=True, rows=read.rows)
            except DataError as error:
                raise error from None
        raise


def name_of(read: Read, name: str) -> str:
    """What messages call a batch of the data of this name; where its rows are known, they are those of the whole."""
    return name if read.rows is not None else f"a batch of {name}"


def run_batches(ts: TrainState, batches: Batch, count: jax.Array, *, step: Step) -> tuple[TrainState, PyTree]:
    """The first ``count`` of the batches ``(C, B, ...)``, one after another.

    In a loop even where there is one: from jax 0.12 on, XLA compiles loops without products of matrices for CPU by
    another emitter, which takes sums in another order, so a step outside of one may differ in its last bits.
    """

    @traced_once
    def one(ts, i):
        return step(ts, jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), batches))

    def body(i, carry):
        ts, metrics = carry
        ts, now = one(ts, i)
        return ts, put(metrics, i, now)

    metrics = room(jax.eval_shape(one, ts, jnp.zeros((), jnp.int32))[1], count_examples(batches))
    return jax.lax.fori_loop(0, count, body, (ts, metrics))


def labels_checked(name: str, function: Callable, ts: TrainState, reads: Generator[Read]) -> Generator[Read]:
    """The same batches; those with a label or id beyond all before them, or of another kind, are traced first.

    ``function(ts, batch)`` is what they are for.
    """
    extremes: dict[int, tuple[Any, Any]] = {}
    kinds: set[Any] = set()
    like = jax.eval_shape(lambda ts: ts, ts)
    try:
        for read in reads:
            integers = {
                i: np.asarray(leaf)
                for i, leaf in enumerate(jax.tree.leaves(read.batch))
                if np.issubdtype(np.asarray(leaf).dtype, np.integer) and np.size(leaf)
            }
            ends = {i: (int(leaf.min()), int(leaf.max())) for i, leaf in integers.items()}
            known = {i: extremes.get(i, (low, low)) for i, (low, _) in ends.items()}
            now = {i: (min(known[i][0], low), max(known[i][1], high)) for i, (low, high) in ends.items()}
            if now != extremes or kind_of(read.batch) not in kinds:
                kinds.add(kind_of(read.batch))
                batch = check_data(read.batch, name=name_of(read, name), part=True, rows=read.rows)
                dry_run(name_of(read, name), function, like, batch, count_examples(batch), read.rows)
                extremes = now
            yield read
    finally:
        reads.close()
