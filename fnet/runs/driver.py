"""A run from the host: `fit` drives that of `fnet.train` in compiled chunks, watched by observers, kept in a folder.

One program, compiled once, makes any number of steps: the number is an argument of it. So results are the same bits for
every chunk length, and a resumed run continues with the program of the straight one. While the device runs a chunk the
host reads the metrics of the one before.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core import processes
from fnet.core.files import whole_file
from fnet.core.forks import refuse_fork
from fnet.core.jax_insides import transfers_meant
from fnet.core.placement import Placement, put
from fnet.data.arrays import check_data, count_examples
from fnet.data.sources import Stream, is_read_ahead
from fnet.data.streams import take_rows, without_position
from fnet.runs.arguments import (
    Plan,
    check_kinds,
    check_position,
    check_result,
    check_run,
    check_start,
    described,
    examples_between,
    order_at,
    programs_of,
)
from fnet.runs.checkpoint import CheckpointError
from fnet.runs.compilation import cached_in, circumstances, compiled
from fnet.runs.folder import open_run
from fnet.runs.history import Event, History, Recorder
from fnet.runs.interrupts import Interrupted, Terminated, interruptions
from fnet.runs.loop import Outputs, evaluating, in_memory, reading
from fnet.runs.nonfinite import NonFiniteError, bad_leaf, losses_of, replay
from fnet.runs.placing import on_mesh, require_one_device, require_same_run, split_plan, stream_of
from fnet.runs.run import Run, RunError
from fnet.training.evaluation import sets_of
from fnet.training.steps import Step
from fnet.training.stopping import Reducer, ending, stopped, with_stopping
from fnet.types import PyTree, TrainState

CHUNK_SECONDS = 0.5  # what a chunk is calibrated to


@transfers_meant
@processes.heard_by_all()
def fit(
    step: Step,
    ts: TrainState,
    data: PyTree,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
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
    placement: Placement | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> tuple[TrainState, History]:
    """Run until ``epochs`` epochs, or ``steps`` steps, are made, counted from step 0, in compiled chunks.

    ``evaluate(params, state, data)`` is called on the ``validation`` data, or on each of a mapping of sets, after every
    ``(n, "epochs")`` or ``(n, "steps")``; ``stop`` (`fnet.early_stopping`) sees its results there and may end the run.
    Observers are called with each `Event`, between chunks and while the next one runs, and may return "stop": the state
    returned is then that of the event, the end of a chunk. One that raises ends the run with its error, after a
    checkpoint.

    ``run`` keeps the run in a folder: its configuration, metrics and checkpoints. At the end of a chunk SIGINT, which
    is Ctrl-C, raises `Interrupted`, a KeyboardInterrupt that carries the state, and SIGTERM `Terminated`, which ends
    the process with 143; in a folder the run is saved first. A second SIGINT leaves at once.

    ``chunk_steps`` is how many steps run between two looks of the host, by default what takes half a second. The
    results are the same bits for every value. With ``keep`` a copy of the state is taken at the end of each chunk,
    which costs its memory thrice: observers may then hold it, the next chunk runs while they look, and a run that stops
    being finite goes back to it. Without, the run waits for the observers.

    With ``check_finite`` a loss or parameter that is not finite raises `NonFiniteError` at the chunk's end, which names
    step, layer, stage, leaf and examples, as does nonfinite.json in the run's folder. ``explain`` prints what is
    compiled and why, what is donated, kept and cached.

    ``cache`` is a folder for the programs that are compiled meanwhile, all of them, by jax's compilation cache: another
    process that runs the same takes them from there. It counts instead of ``jax_compilation_cache_dir``, which is as it
    was when this returns or raises. What this process had compiled before is not compiled again, nor kept there.

    With a ``placement`` (`fnet.placement`) the state and the batches are split over the devices of its mesh. The
    numbers are those of one device to rounding, and a run's folder may be resumed on any mesh. Of several processes
    (``fnet.processes``) all call this with the same arguments: each reads its part of the data, observers are called in
    all, and the first writes; a signal, a "stop" and an error of one are all's.

    ``ts`` is copied once, so the caller's buffers stay valid. Before anything is computed the data are checked and the
    step is traced: `DataError` names what is wrong with the data or the labels, `LayerError` where the model and the
    data do not fit, `RunError` and `CheckpointError` a folder that cannot be used, `TypeError` and
    `ValueError` any other argument.
    """
    refuse_fork("fit")
    with ExitStack() as stack:
        with processes.together():
            stack.enter_context(cached_in(cache))
            check_kinds(step, ts, evaluate, stop, observers, run, placement)
            if placement is None:
                require_one_device(ts)
                ts = copied(ts)  # ours to donate
            else:
                placement.require_use(ts)
            check_start(ts, stop)
            ts = with_stopping(stop, ts)
            plan = check_run(
                *(step, ts, data, epochs, steps, batch_size, shuffle, evaluate, validation, evaluate_every, stop),
                *(chunk_steps, run),
            )
            if run and run.keep_best is not None:
                check_result("Run: keep_best", run.keep_best, plan)
            programs = programs_of(plan, ts) if run else {}
            about = described(plan, ts, programs) if run else {}
            # what a run computes is described before it is split: it is the same on every mesh
            plan = plan if placement is None else split_plan(plan, placement)
        if placement is not None:
            require_same_run(plan, ts, run, chunk_steps, keep, check_finite, observers)
            about = processes.told(about)  # a stream's first batch is another in each process
            ts, plan = put(ts, placement.of(ts)), on_mesh(plan, placement)
        begin: dict[str, Callable] = {"stopping": lambda ts: stop.init(ts) if stop else ()}
        if hasattr(step, "optimizer"):
            begin["opt_state"] = lambda ts: jax.jit(step.optimizer.init)(ts.params)
        folder = stack.enter_context(open_run(run)) if run else None
        caught = stack.enter_context(interruptions())
        recorder, stream = Recorder(plan.per_epoch), None
        rows = []
        if folder and (resumed := folder.restore(ts, about, programs, begin)):
            ts, meta, rows = resumed
            whole = meta["whole"] or int(ts.step) % plan.per_epoch == 0
            recorder = Recorder(plan.per_epoch, meta["partial"], rows, whole)
            stream, about = stream_of(meta, folder.folder), meta["plan"]
            if int(ts.step) == plan.end or bool(stopped(ts)):
                return ts, recorder.history(0.0, 0.0, ending(stop, ts))  # it had ended
            if isinstance(plan.data, Stream) and stream is None:
                raise without_position(iter(plan.data.source), int(ts.step))
        check_position(ts, plan, folder and folder.folder)
        if folder:
            folder.begin(rows, programs)
        first = position = int(ts.step)
        seen = 0
        seconds, halted, program = {"compile": 0.0, "run": 0.0}, False, None

        def tell(kind: str, at: int, metrics=None, took: float = 0.0, examples: int = 0) -> None:
            nonlocal halted
            made, epochs = at // plan.per_epoch, -(-plan.end // plan.per_epoch)
            ended = ending(stop, ts) if kind == "end" and not ts.step.is_deleted() else None
            event = Event(kind, at, plan.end, made, epochs, metrics or {}, took, examples, ts, ended)
            with processes.together():
                halted |= ask(observers, event)

        def compile(function: Callable, options, arguments) -> Callable:
            made, took = compiled(function, step, options, arguments, explain and processes.is_first())
            seconds["compile"] += took
            return made

        def leave_if(number: int) -> None:
            if number:
                save(wait=True)
                saved = f"is saved at step {position} in {folder.folder}" if folder else f"ended at step {position}"
                message = f"{signal.Signals(number).name}: the run {saved}"
                if processes.is_first():
                    print(message, file=sys.stderr)
                kind = Interrupted if number == signal.SIGINT else Terminated
                raise processes.of_all(kind(message, ts, recorder.history(seconds["compile"], seconds["run"])))

        def save(wait: bool = False) -> None:
            if not folder:
                return
            sums = {"partial": recorder.partial(), "whole": recorder.whole}
            streams = processes.agreed(stream, list)  # where each process' stands
            if folder.save(ts, {**sums, "streams": streams, "plan": about}):
                tell("checkpoint", position)
            if wait:
                folder.wait()

        try:
            tell("start", position)
            if explain and processes.is_first():
                print(circumstances(ts, keep), flush=True)
            if not halted:
                ahead = is_read_ahead(plan.data)
                apart = bool(evaluate) and (ahead or any(map(is_read_ahead, sets_of(plan.validation).values())))
                if ahead:
                    program = stack.enter_context(reading(plan, ts, stream, compile))
                else:
                    own = plan._replace(evaluate=None, stop=None, validation=None) if apart else plan
                    program = in_memory(own, ts, compile)
                if apart:
                    program = evaluating(plan, ts, program, compile)
                tell("compile", position, took=seconds["compile"])
            began, mine, before = time.perf_counter(), ts, seconds["compile"]
            ts = copied(ts) if keep else ts  # what the host holds; the other is donated to the first chunk
            ends = [] if run is None else [n for n in (run.save_every, run.keep_best and plan.every) if n]
            for chunk in (
                () if program is None else chunks(plan, program, mine, ts if keep else None, chunk_steps, ends)
            ):
                if check_finite and not chunk.finite:
                    ts = ts if chunk.before is None else chunk.before
                    raise processes.of_all(not_finite(plan, chunk, folder.folder if folder else None))
                told = recorder.add(chunk.first, chunk.outputs)
                ts, position = chunk.after, int(chunk.outputs.step)
                stream = chunk.outputs.reads[-1].state if chunk.outputs.reads else None
                if folder:
                    for kind, at, metrics in told:
                        folder.record(kind, at, at // plan.per_epoch, metrics)
                if position > chunk.first:
                    batches = [read.batch for read in chunk.outputs.reads]  # a stream's may be of any size
                    examples = processes.count() * sum(map(count_examples, batches))
                    examples = examples or examples_between(plan, chunk.first, position)
                    seen += examples
                    tell("chunk", position, recorder.last_means, chunk.seconds, examples)
                for kind, at, metrics in told:
                    tell(kind, at, metrics)
                due = bool(folder) and folder.due(position)
                due, number, halt = processes.greatest(int(due), caught() or 0, int(halted))  # what one wants, all do
                if due:
                    save()
                leave_if(number)
                if halt or chunk.outputs.stopped:
                    break
            seconds["run"] = time.perf_counter() - began - (seconds["compile"] - before)
            save(wait=True)
            if folder:
                folder.summarize(summary(plan, ts, first, position, seen, seconds, program))
        except BaseException as error:
            if isinstance(error, Terminated):  # of a run within an observer too: the state is that of the outer
                error.state, error.history = ts, recorder.history(seconds["compile"], seconds["run"])
            if not processes.is_of_all(error):  # the others would not save with this one
                raise
            lost = ts.step.is_deleted()  # where no copies are kept it was donated
            saves = [] if lost or isinstance(error, (RunError, CheckpointError)) else [lambda: save(wait=True)]
            for last in (*saves, lambda: tell("end", position)):
                try:
                    last()
                except Exception as second:
                    error.add_note(f"and then {type(second).__name__}: {second}")
            raise
        tell("end", position)
        leave_if(*processes.greatest(caught() or 0))
    return ts, recorder.history(seconds["compile"], seconds["run"], ending(stop, ts))


def summary(plan: Plan, ts: TrainState, first: int, last: int, examples: int, seconds, program) -> dict[str, Any]:
    """What a call of `fit` did and took, for its folder's summary.json; bytes of the program if it is one."""
    memory = program.memory_analysis() if hasattr(program, "memory_analysis") else None
    return {
        "steps": last,
        "epochs": last // plan.per_epoch,
        "steps_of_this_call": last - first,
        "examples": examples,
        "compile_seconds": seconds["compile"],
        "run_seconds": seconds["run"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(ts.params)),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(ts)),
        "argument_bytes": getattr(memory, "argument_size_in_bytes", None),
        "scratch_bytes": getattr(memory, "temp_size_in_bytes", None),
        **({"ended": ended._asdict()} if (ended := ending(plan.stop, ts)) else {}),
    }


def ask(observers: Sequence[Callable[[Event], str | None]], event: Event) -> bool:
    """Whether one of the observers answers "stop". All are asked; then the first error of one is raised."""
    errors, stop = [], False
    for observer in observers:
        name = getattr(observer, "__qualname__", repr(observer))
        try:
            answer = observer(event._replace(metrics=copy.deepcopy(event.metrics)))  # its own
        except Exception as error:
            errors.append((name, error))
            continue
        if not (answer is None or (isinstance(answer, str) and answer in ("continue", "stop"))):
            wrong = f"observer {name} returned {answer!r}; expected 'continue', 'stop' or None"
            errors.append((name, ValueError(wrong)))
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
        """Whether its losses, and the parameters and the model's state at its end, are finite."""
        made = int(self.outputs.step) - self.first
        return bool(self.outputs.finite) and all(
            np.isfinite(loss[:made]).all() for loss in losses_of(self.outputs.metrics)
        )


@jax.jit
def copied(ts: TrainState) -> TrainState:
    """A copy in buffers of its own."""
    return jax.tree.map(jnp.copy, ts)


def chunks(
    plan: Plan,
    program: Callable,
    ts: TrainState,
    kept: TrainState | None,
    length: int | None,
    ends: Sequence[int],
) -> Iterator[Chunk]:
    """The run's chunks one after another. While one is looked at the next one runs, if copies are kept.

    Without ``length`` the first two are short and timed, and from then on a chunk is what takes half a second: twice as
    many steps as before where all of it took less than half of that, observers too, and half as many where the device
    alone took more than twice that. All end at multiples of each of ``ends``. ``kept`` is a copy of ``ts``, which is
    donated; None if no copies are kept.
    """
    sent, trial, waiting, keep, given = int(ts.step), 1, deque(), kept is not None, length
    begin = time.perf_counter()
    while sent < plan.end or waiting:
        if sent < plan.end and len(waiting) < (2 if keep and length else 1):
            count = min(length or trial, plan.capacity, plan.end - sent)
            count = min([count, *(every - sent % every for every in ends)])
            begin = begin if waiting else time.perf_counter()
            called = time.perf_counter()
            ts, outputs = program(ts, np.asarray(count, np.int32), plan.data, plan.validation)
            busy = time.perf_counter() - called
            before, kept = kept, copied(ts) if keep else None
            waiting.append((sent, count, outputs, before, kept if keep else ts, busy))
            sent += count
            continue
        first, count, outputs, before, after, busy = waiting.popleft()
        looked = time.perf_counter()
        outputs = jax.device_get(outputs._replace(reads=()))._replace(reads=outputs.reads)
        busy, seconds, begin = busy + time.perf_counter() - looked, time.perf_counter() - begin, time.perf_counter()
        busy, seconds = processes.told([busy, seconds]) if given is None else (busy, seconds)  # one length in all
        if int(outputs.step) != first + count and not outputs.stopped:
            raise ValueError(
                f"{count} steps led from step {first} to step {int(outputs.step)}; expected a step function that "
                "counts, TrainState.step + 1, as fnet.make_step does"
            )
        if length is None:
            each = seconds / max(1, int(outputs.step) - first)
            if trial == 1:
                trial = max(2, min(plan.capacity, int(CHUNK_SECONDS / 10 / each)))
            else:
                length = max(1, min(plan.capacity, int(CHUNK_SECONDS / each)))
        elif given is None and count == length and seconds < CHUNK_SECONDS / 2:
            length = min(plan.capacity, 2 * length)
        elif given is None and count == length and busy > CHUNK_SECONDS * 2:
            length = max(1, length // 2)
        yield Chunk(first, outputs, before, after, seconds)


def not_finite(plan: Plan, chunk: Chunk, folder) -> NonFiniteError:
    """The error of a chunk that is not finite, after a replay from its first state if that was kept."""
    last, before = int(chunk.outputs.step), chunk.before
    if before is None:
        return NonFiniteError(
            f"a loss or parameter is not finite between steps {chunk.first} and {last}; "
            "fit(keep=True) keeps what is needed to find out where",
            None,
            None,
        )

    def batches():
        for read in chunk.outputs.reads:
            yield None, plan.put(check_data(read.batch, name="a batch of the stream", part=True), read.examples)
        for at in range(chunk.first, last if not chunk.outputs.reads else chunk.first):
            order = order_at(plan, before.key, at // plan.per_epoch)
            begin = at % plan.per_epoch * plan.batch_size
            rows = order[begin : begin + plan.batch_size].tolist()
            own = rows[plan.part_of(len(rows))]  # those of this process
            yield rows, plan.put(check_data(take_rows(plan.data, own), part=True, rows=own), len(rows))

    if leaf := bad_leaf(before):
        message = f"the state that the run begins with at step {chunk.first} is not finite: {leaf}"
        return NonFiniteError(message, None, None)
    found = replay(plan.step, before, batches())
    if found is None:
        message = f"a loss or parameter was not finite between steps {chunk.first} and {last}, but is in a replay"
    else:
        message = f"not finite: {found}"
    if folder is not None and found is not None:
        with processes.together(RunError) as is_first:
            if is_first:
                with whole_file(folder / "nonfinite.json") as part:
                    part.write_text(json.dumps(found._asdict(), indent=2) + "\n")
        message += f". Written to {folder / 'nonfinite.json'}"
    return NonFiniteError(f"{message}. The state at step {chunk.first} is the last good one", found, before)
