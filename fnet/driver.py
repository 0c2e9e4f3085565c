"""`fit`: the run of `fnet.train`, driven from the host in compiled chunks, watched by observers and kept in a folder.

One program, compiled once, makes any number of steps: the number is an argument of it. So results are the same bits for
every chunk length, and a resumed run continues with the program of the straight one. While the device runs a chunk the
host reads the metrics of the one before.

Legend: N examples, S steps an epoch, B batch size, C steps that a chunk may have at most.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.data.arrays import DataError, check_data, count_examples
from fnet.history import Event, History, Recorder
from fnet.interrupts import Interrupted, interruptions
from fnet.nonfinite import NonFiniteError, replay
from fnet.runs import Run, open_run
from fnet.stopping import Reducer, decide, stopped, with_stopping
from fnet.training import (
    Step,
    epoch_order,
    evaluate_on,
    results_by_name,
    rows_of,
    steps_per_epoch,
)
from fnet.types import Batch, LayerError, PyTree, TrainState, named_leaves

CHUNK_SECONDS = 0.5  # what a chunk is calibrated to
CHUNK_STEPS = 8192  # C, unless the metrics of so many steps take more than METRIC_BYTES
METRIC_BYTES = 16_000_000


class Outputs(NamedTuple):
    """What a chunk tells the host."""

    step: jax.Array  # where it ended
    metrics: PyTree  # (C, ...), of which as many rows are filled as it made steps
    results: dict[str, Any]  # (evaluations, ...)
    evaluated: jax.Array  # the steps of these evaluations; 0 in rows that are not filled
    finite: jax.Array  # whether all parameters and model states are
    stopped: jax.Array  # whether the reducer ended the run


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

    def one(ts, rows):
        return step(ts, rows_of(data, rows))

    def evaluated(ts):
        results = results_by_name(evaluate_on(evaluate, ts, validation), validation) if evaluate else {}
        return decide(stop, ts, results), results

    def room(abstract, length):
        return jax.tree.map(lambda a: jnp.zeros((length, *jnp.shape(a)), a.dtype), abstract)

    def put(buffers, row, values):
        write = lambda buffer, value: jax.lax.dynamic_update_index_in_dim(buffer, value, row, 0)  # noqa: E731
        return jax.tree.map(write, buffers, values)

    def segment(carry):
        """Steps up to the end of the chunk, the epoch's full batches or the next evaluation; then what is due there."""
        ts, order, done, metrics, at, results, rows = carry
        within = ts.step % per_epoch
        order = jax.lax.cond((within == 0) & (done > 0), order_of, lambda ts: order, ts)
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

            def last_batch(ts, metrics):
                ts, now = one(ts, order[full * batch_size :])
                return ts, put(metrics, done, now)

            ts, metrics = jax.lax.cond(due, last_batch, lambda ts, metrics: (ts, metrics), ts, metrics)
            done = done + due.astype(jnp.int32)
        if evaluate:

            def at_boundary(ts, at, results, row):
                ts, now = evaluated(ts)
                return ts, at.at[row].set(ts.step), put(results, row, now), row + 1

            arguments = ts, at, results, rows
            ts, at, results, rows = jax.lax.cond(ts.step % every == 0, at_boundary, lambda *same: same, *arguments)
        return ts, order, done, metrics, at, results, rows

    metrics = room(jax.eval_shape(one, ts, jnp.zeros(batch_size, jnp.int32))[1], capacity)
    slots = capacity // every + 1 if evaluate else 0
    results = room(jax.eval_shape(evaluated, ts)[1], slots)
    zero = jnp.zeros((), jnp.int32)
    carry = ts, order_of(ts), zero, metrics, jnp.zeros(slots, jnp.int32), results, zero
    going = lambda carry: (carry[2] < count) & ~stopped(carry[0])  # noqa: E731
    ts, _, _, metrics, at, results, _ = jax.lax.while_loop(going, segment, carry)
    return ts, Outputs(jnp.copy(ts.step), metrics, results, at, all_finite(ts), jnp.copy(stopped(ts)))


def all_finite(ts: TrainState) -> jax.Array:
    """Whether every number of the parameters and the model's state is finite."""
    floats = [a for a in jax.tree.leaves((ts.params, ts.state)) if jnp.issubdtype(a.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, (jnp.isfinite(a).all() for a in floats), jnp.array(True))


def chunk_capacity(step: Step, ts: TrainState, data: Batch, batch_size: int, steps: int) -> int:
    """C: as many steps as have room for their metrics."""
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype), data)
    metrics = jax.eval_shape(step, ts, batch)[1]
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(metrics))
    return max(1, min(steps, CHUNK_STEPS, METRIC_BYTES // max(size, 1)))


# --- the run ---------------------------------------------------------------------------------------------------------


def fit(
    step: Step,
    ts: TrainState,
    data: PyTree,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int,
    shuffle: bool = True,
    evaluate: Callable | None = None,
    validation: PyTree = None,
    evaluate_every: tuple[int, str] = (1, "epochs"),
    stop: Reducer | None = None,
    observers: Sequence[Callable[[Event], str | None]] = (),
    run: Run | None = None,
    chunk_steps: int | None = None,
    keep: bool = True,
    check_finite: bool = True,
    explain: bool = False,
) -> tuple[TrainState, History]:
    """Run until ``epochs`` epochs, or ``steps`` steps, are made, counted from step 0, in compiled chunks.

    ``evaluate(params, state, data)`` is called on the ``validation`` data, or on each of a mapping of sets, after every
    ``(n, "epochs")`` or ``(n, "steps")``; ``stop`` (`fnet.early_stopping`) sees its results there and may end the run.
    Observers are called with each `Event`, between chunks and while the next one runs, and may return "stop": the state
    returned is then that of the event. One that raises ends the run with its error, after a checkpoint.

    ``run`` keeps the run in a folder: its configuration, metrics and checkpoints. SIGTERM and SIGINT then save it at
    the end of the chunk and raise `Interrupted` (exit codes 143 and 130); a second SIGINT leaves at once.

    ``chunk_steps`` is how many steps run between two looks of the host, by default what takes half a second. The
    results are the same bits for every value. With ``keep`` a copy of the state is taken at the end of each chunk,
    which costs its memory thrice: observers may then hold it, the next chunk runs while they look, and a run that stops
    being finite goes back to it. Without, the run waits for the observers.

    With ``check_finite`` a loss or parameter that is not finite raises `NonFiniteError` at the chunk's end, which names
    step, layer, stage, leaf and examples, as does nonfinite.json in the run's folder. ``explain`` prints what is
    compiled and why, what is donated, kept and cached.

    ``ts`` is copied once, so the caller's buffers stay valid. Before anything is computed the data are checked and the
    step is traced: `DataError` names what is wrong with the data or the labels, `LayerError` where the model and the
    data do not fit, `RunError` and `CheckpointError` a folder that cannot be used, `ValueError` any other argument.
    """
    plan = check_run(
        step, ts, data, epochs, steps, batch_size, shuffle, evaluate, validation, evaluate_every, stop, chunk_steps
    )
    ts = with_stopping(stop, jax.tree.map(jnp.copy, ts))  # ours to donate
    with ExitStack() as stack:
        folder = stack.enter_context(open_run(run)) if run else None
        signal = stack.enter_context(interruptions()) if run else lambda: None
        recorder, resumed = Recorder(plan.per_epoch), folder.restore(ts) if folder else None
        if resumed:
            ts, meta, rows = resumed
            recorder = Recorder(plan.per_epoch, meta["partial"], rows)
        check_position(ts, plan)
        position, seconds, halted = int(ts.step), {"compile": 0.0, "run": 0.0}, False

        def tell(kind: str, at: int, metrics=None, took: float = 0.0, examples: int = 0) -> None:
            nonlocal halted
            made, epochs = at // plan.per_epoch, -(-plan.end // plan.per_epoch)
            event = Event(kind, at, plan.end, made, epochs, metrics or {}, took, examples, ts)
            halted |= ask(observers, event)

        def save(wait: bool = False) -> None:
            if folder and folder.save(ts, {"partial": recorder.partial()}):
                tell("checkpoint", position)
            if folder and wait:
                folder.wait()

        try:
            tell("start", position)
            if not halted:
                program, seconds["compile"] = compiled(plan, ts, keep, explain)
                tell("compile", position, took=seconds["compile"])
            begin = time.perf_counter()
            for chunk in (
                () if halted else chunks(plan, program, ts, chunk_steps, keep, run.save_every if run else None)
            ):
                if check_finite and not chunk.finite:
                    ts = ts if chunk.before is None else chunk.before
                    raise not_finite(plan, chunk, folder.folder if folder else None)
                told = recorder.add(chunk.first, chunk.outputs)
                ts, position = chunk.after, int(chunk.outputs.step)
                for kind, at, metrics in told if folder else ():
                    folder.record(kind, at, at // plan.per_epoch, metrics)
                if position > chunk.first:
                    examples = examples_between(plan, chunk.first, position)
                    tell("chunk", position, recorder.last_means, chunk.seconds, examples)
                for kind, at, metrics in told:
                    tell(kind, at, metrics)
                if folder and folder.due(position):
                    save()
                if (number := signal()) is not None:
                    save(wait=True)
                    raise Interrupted(128 + number)
                if halted or chunk.outputs.stopped:
                    break
            seconds["run"] = time.perf_counter() - begin
            save(wait=True)
        except Exception:  # of an observer, or not finite
            save(wait=True)
            raise
        finally:
            tell("end", position)
    return ts, recorder.history(seconds["compile"], seconds["run"])


def ask(observers: Sequence[Callable[[Event], str | None]], event: Event) -> bool:
    """Whether one of the observers answers "stop". All are asked; then the first error of one is raised."""
    errors, stop = [], False
    for observer in observers:
        name = getattr(observer, "__qualname__", repr(observer))
        try:
            answer = observer(event)
        except Exception as error:
            errors.append((name, error))
            continue
        if answer not in (None, "continue", "stop"):
            raise ValueError(f"observer {name} returned {answer!r}; expected 'continue', 'stop' or None")
        stop |= answer == "stop"
    for name, error in errors[:1]:
        error.add_note(f"raised by the observer {name} at step {event.step}, at the event {event.kind!r}")
        raise error
    return stop


class Chunk(NamedTuple):
    """Steps that were made by one call of the program."""

    first: int  # the step it began at
    outputs: Outputs
    before: TrainState | None  # its first state, if copies are kept
    after: TrainState
    seconds: float

    @property
    def finite(self) -> bool:
        made = int(self.outputs.step) - self.first
        loss = self.outputs.metrics.get("loss") if isinstance(self.outputs.metrics, Mapping) else None
        return bool(self.outputs.finite) and (loss is None or bool(np.isfinite(jax.tree.leaves(loss)[0][:made]).all()))


@jax.jit
def copied(ts: TrainState) -> TrainState:
    """A copy in buffers of its own."""
    return jax.tree.map(jnp.copy, ts)


def chunks(plan: Plan, program: Callable, ts: TrainState, length: int | None, keep: bool, save_every: int | None):
    """The run's chunks one after another. While one is looked at the next one runs, if copies are kept.

    Without ``length`` the first two are short and timed, and from then on a chunk is what takes half a second.
    """
    sent, trial, waiting = int(ts.step), 1, deque()
    kept = copied(ts) if keep else None
    begin = time.perf_counter()
    while sent < plan.end or waiting:
        if sent < plan.end and len(waiting) < (2 if keep and length else 1):
            count = min(length or trial, plan.capacity, plan.end - sent)
            count = min(count, save_every - sent % save_every) if save_every else count
            begin = begin if waiting else time.perf_counter()
            ts, outputs = program(ts, jnp.asarray(count, jnp.int32), plan.data, plan.validation)
            before, kept = kept, copied(ts) if keep else None
            waiting.append((sent, outputs, before, kept if keep else ts))
            sent += count
            continue
        first, outputs, before, after = waiting.popleft()
        outputs = jax.device_get(outputs)
        seconds, begin = time.perf_counter() - begin, time.perf_counter()
        if length is None:
            each = seconds / max(1, int(outputs.step) - first)
            if trial == 1:
                trial = max(2, min(plan.capacity, int(CHUNK_SECONDS / 10 / each)))
            else:
                length = max(1, min(plan.capacity, int(CHUNK_SECONDS / each)))
        yield Chunk(first, outputs, before, after, seconds)


def examples_between(plan: Plan, first: int, last: int) -> int:
    """How many examples the steps ``first`` to ``last`` see."""

    def seen(step):
        epochs, within = divmod(step, plan.per_epoch)
        return epochs * plan.examples + within * plan.batch_size

    return seen(last) - seen(first)


# --- the program -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def programs(step, evaluate, stop, batch_size, shuffle, every, capacity) -> tuple[Callable, dict[Any, Any]]:
    """The chunk's program, to be compiled, and those that are, by the signature of their arguments."""
    function = functools.partial(
        run_chunk,
        step=step,
        batch_size=batch_size,
        shuffle=shuffle,
        evaluate=evaluate,
        every=every,
        stop=stop,
        capacity=capacity,
    )
    return jax.jit(function, donate_argnums=0), {}


def compiled(plan: Plan, ts: TrainState, keep: bool, explain: bool) -> tuple[Callable, float]:
    """The chunk's program, and how long it took to compile: nothing where an earlier run has compiled the same."""
    options = plan.step, plan.evaluate, plan.stop, plan.batch_size, plan.shuffle, plan.every, plan.capacity
    function, known = programs(*options)
    signature = signature_of({"state": ts, "data": plan.data, "validation": plan.validation})
    begin = time.perf_counter()
    reason = reason_to_compile(signature, known)
    with cache_hits() as cached:
        if reason:
            arguments = ts, jnp.asarray(0, jnp.int32), plan.data, plan.validation
            known[signature] = function.lower(*arguments).compile()
    took = time.perf_counter() - begin if reason else 0.0
    if explain:
        print(explanation(known[signature], reason, took, cached, ts, keep), flush=True)
    return known[signature], took


def signature_of(tree: PyTree) -> tuple:
    """What a program is compiled for: each leaf's path, dtype, shape and weak type, and the containers."""
    leaves = tuple(
        (path, f"{leaf.dtype}{tuple(leaf.shape)}{' weak' if getattr(leaf, 'weak_type', False) else ''}")
        for path, leaf in named_leaves(tree)
    )
    return leaves, jax.tree.structure(tree)


def reason_to_compile(signature, known: Mapping) -> str:
    """Why a program is compiled, in one line; empty if it is known."""
    if signature in known:
        return ""
    if not known:
        return "the first run of this step"
    old, new = dict(list(known)[-1][0]), dict(signature[0])
    for path in {**new, **old}:
        if old.get(path) != new.get(path):
            return f"{path} was {old.get(path, 'not there')} and is {new.get(path, 'not there')}"
    return "the containers of the state or the data are others"


@contextmanager
def cache_hits():
    """How often jax's compilation cache on the disk had what was compiled within, as ``{"hits": 0, "misses": 0}``."""
    counts = {"hits": 0, "misses": 0}

    def listen(event: str, **_):
        for name in counts:
            counts[name] += event == f"/jax/compilation_cache/cache_{name}"

    jax.monitoring.register_event_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(listen)


def explanation(program, reason: str, took: float, cached: Mapping[str, int], ts: TrainState, keep: bool) -> str:
    """What `fit(explain=True)` prints, a line each."""
    memory = program.memory_analysis()
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(ts))
    folder = jax.config.jax_compilation_cache_dir
    where = f"{cached['hits']} hits, {cached['misses']} misses in {folder}" if folder else "off"
    device = jax.devices()[0]
    in_use = (device.memory_stats() or {}).get("bytes_in_use")
    held = f"{in_use / 1e6:.1f} MB in use" if in_use else "not told by this backend"
    precision = jax.config.jax_default_matmul_precision or "the backend's default"
    donated = memory.alias_size_in_bytes / 1e6
    copies = "a copy is kept at each chunk's end" if keep else "no copies are kept"
    sizes = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    lines = [
        f"compiled in {took:.2f} s: {reason}" if reason else "not compiled again: same step, shapes, dtypes, options",
        f"compilation cache: {where}",
        f"state: {state / 1e6:.3f} MB, of which {donated:.3f} MB are donated and changed in place; {copies}",
        f"program: {sizes[0]:.3f} MB of arguments, {sizes[1]:.3f} MB of scratch memory",
        f"products: {precision} precision; 64-bit numbers are {'on' if jax.config.jax_enable_x64 else 'off'}",
        f"memory of {device.device_kind}: {held}",
    ]
    return "\n".join(f"explain: {line}" for line in lines)


# --- what is checked before a run ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A run's arguments, checked."""

    step: Step
    data: Batch
    validation: PyTree
    examples: int  # N
    batch_size: int
    shuffle: bool
    evaluate: Callable | None
    stop: Reducer | None
    per_epoch: int  # S
    end: int  # the step at which the run ends
    every: int  # steps from one evaluation to the next
    capacity: int  # C


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
    data = check_data(data, batch_size=batch_size)
    per_epoch = steps_per_epoch(data, batch_size)
    every = in_steps("evaluate_every", evaluate_every, per_epoch)
    after, _ = dry_run("data", step, ts, data)
    for (path, old), (_, new) in zip(named_leaves(ts), named_leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"step turns {path} from {old.dtype}{old.shape} into {new.dtype}{new.shape}; expected no change"
            )
    if evaluate:
        sets = validation if isinstance(validation, Mapping) else {"validation": validation}
        checked = {name: check_data(held, name=name) for name, held in sets.items()}
        for name, held in checked.items():
            dry_run(name, lambda ts, batch: evaluate(ts.params, ts.state, batch), ts, held)
        validation = checked if isinstance(validation, Mapping) else checked["validation"]
        if stop is not None:
            jax.eval_shape(
                lambda ts, sets: decide(
                    stop, with_stopping(stop, ts), results_by_name(evaluate_on(evaluate, ts, sets), sets)
                ),
                ts,
                validation,
            )
    end = steps or epochs * per_epoch
    capacity = chunk_capacity(step, ts, data, batch_size, end)
    n = count_examples(data)
    return Plan(step, data, validation, n, batch_size, shuffle, evaluate, stop, per_epoch, end, every, capacity)


def check_position(ts: TrainState, plan: Plan) -> None:
    """Require that there is something left to run."""
    if (position := int(ts.step)) >= plan.end:
        epochs = plan.end / plan.per_epoch
        raise ValueError(
            f"the run is to end at step {plan.end}, after epoch {epochs:g}, but its state stands at step {position}: "
            "epochs and steps are counted from step 0, so give where the run is to end"
        )


def in_steps(name: str, every: Any, per_epoch: int) -> int:
    """``(n, "steps")`` or ``(n, "epochs")`` in steps."""
    if (
        not isinstance(every, tuple)
        or len(every) != 2
        or every[1] not in ("steps", "epochs")
        or not isinstance(every[0], int)
        or every[0] < 1
    ):
        raise ValueError(f"{name} = {every!r}; expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1")
    return every[0] * (per_epoch if every[1] == "epochs" else 1)


def not_finite(plan: Plan, chunk: Chunk, folder) -> NonFiniteError:
    """The error of a chunk that is not finite, after a replay from its first state if that was kept."""
    last = int(chunk.outputs.step)
    if chunk.before is None:
        return NonFiniteError(
            f"a loss or parameter is not finite between steps {chunk.first} and {last}; "
            "fit(keep=True) keeps what is needed to find out where",
            None,
            None,
        )

    def batches():
        for at in range(chunk.first, last):
            order = np.asarray(order_at(plan, chunk.before.key, at // plan.per_epoch))
            begin = at % plan.per_epoch * plan.batch_size
            rows = order[begin : begin + plan.batch_size]
            yield rows.tolist(), jax.tree.map(lambda a, rows=rows: a[rows], plan.data)

    found = replay(plan.step, chunk.before, batches())
    if found is None:
        message = f"a loss or parameter was not finite between steps {chunk.first} and {last}, but is in a replay"
    else:
        message = f"not finite: {found}"
    if folder is not None and found is not None:
        (folder / "nonfinite.json").write_text(json.dumps(found._asdict(), indent=2) + "\n")
        message += f". Written to {folder / 'nonfinite.json'}"
    return NonFiniteError(f"{message}. The state at step {chunk.first} is the last good one", found, chunk.before)


def order_at(plan: Plan, key: jax.Array, epoch: int) -> jax.Array:
    """The order of an epoch's examples."""
    return epoch_order(key, epoch, plan.examples) if plan.shuffle else jnp.arange(plan.examples)


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
