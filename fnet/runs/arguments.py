"""What `fit` checks before anything is computed: its arguments become a `Plan`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import described as shown
from fnet.core.checks import is_whole, require_counts
from fnet.core.numerics import words_of
from fnet.core.placement import Placement
from fnet.core.programs import Line, digest, program_lines
from fnet.core.trees import named_leaves
from fnet.data.arrays import (
    EXTREMES,
    DataError,
    as_batch,
    check_batch_size,
    check_data,
    count_examples,
    is_placed,
    trace_batch,
)
from fnet.data.sources import Examples, Stream, as_source, count_rows, is_read_ahead, with_length
from fnet.data.streams import first_batch, take_rows
from fnet.optimizers.plateau import told
from fnet.runs.run import Run, RunError, check_options
from fnet.runs.settings import numbers_of, shortest
from fnet.training.epochs import epoch_order, steps_per_epoch
from fnet.training.evaluation import evaluated, is_several, named_metrics, sets_of
from fnet.training.steps import Step
from fnet.training.stopping import Reducer, stopped
from fnet.types import Batch, LayerError, Mean, PyTree, TrainState

CHUNK_STEPS = 8192  # the most that a chunk has, unless the metrics of so many steps take more than METRIC_BYTES
METRIC_BYTES = 16_000_000


class Plan(NamedTuple):
    """A run's arguments, checked."""

    step: Step
    data: Batch | Examples | Stream
    sample: Batch  # a batch, or its shapes
    validation: PyTree
    held: PyTree  # the validation data, of sets that are read batch by batch the first
    examples: int  # N
    batch_size: int
    shuffle: bool
    evaluate: Callable | None
    stop: Reducer | None
    per_epoch: int  # S
    end: int  # the step at which the run ends
    every: int  # steps from one evaluation to the next
    metrics: dict[str, Any]  # a step's, and an evaluation's results, as shapes
    results: dict[str, Any]
    capacity: int  # C
    placement: Placement | None = None  # of several devices

    def part_of(self, examples: int) -> slice:
        """Which of a batch's examples this process reads."""
        return slice(examples) if self.placement is None else self.placement.part_of(examples)

    def put(self, batch: PyTree, examples: int, axis: int = 0) -> PyTree:
        """A batch of so many examples along ``axis``, of which this process has its part, where the run has it."""
        return batch if self.placement is None else self.placement.put_batch(batch, examples, axis)


def check_kinds(step, ts, evaluate, stop, observers, run, placement) -> None:
    """Require that the arguments are what they are called; TypeError names the one that is not."""
    wanted = {
        "ts": (ts, TrainState, "a TrainState, as fnet.init_train_state makes one"),
        "stop": (stop, Reducer | None, "a Reducer, as fnet.early_stopping makes one"),
        "run": (run, Run | None, "fnet.Run(folder)"),
        "placement": (placement, Placement | None, "a Placement, as fnet.placement makes one"),
    }
    for name, (given, kind, expected) in wanted.items():
        if not isinstance(given, kind):
            raise TypeError(f"{name} is {_short(given)}; expected {expected}")
    if run is not None:
        check_options(run)
    if not isinstance(observers, Sequence):
        raise TypeError(f"observers is {_short(observers)}; expected a list of functions")
    functions = {"step": step, **({} if evaluate is None else {"evaluate": evaluate})}
    for name, given in {**functions, **{f"observers[{i}]": each for i, each in enumerate(observers)}}.items():
        if not callable(given):
            raise TypeError(f"{name} is {_short(given)}; expected a function")
        if name in functions and not isinstance(given, Hashable):  # its programs are kept by it
            raise TypeError(f"{name} is {_short(given)} without a hash; expected a function, or a class with __hash__")


def _short(value: Any) -> str:
    """Numbers and text as they are, of anything else the type."""
    return repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def check_run(
    step, ts, data, epochs, steps, batch_size, shuffle, evaluate, validation, evaluate_every, stop, chunk_steps, run
) -> Plan:
    """Everything that can be known to fail before it is computed; in a ``run`` a stream has to be one to be resumed."""
    require_counts("fit", epochs=epochs, steps=steps, chunk_steps=chunk_steps)
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs = {epochs} and steps = {steps}; expected one of them: where the run ends")
    if (evaluate is None) != (validation is None):
        missing = "validation" if validation is None else "evaluate"
        raise ValueError(f"{missing} is not given; expected evaluate and validation together, or neither")
    if stop is not None and evaluate is None:
        raise ValueError("stop is given without evaluate; expected evaluate and validation, whose results it looks at")
    batch_size = int(batch_size) if isinstance(batch_size, np.integer) else batch_size
    data = as_source(data)
    if isinstance(data, Stream):
        if batch_size is not None:
            raise ValueError(f"batch_size = {batch_size}; expected none: a stream gives batches")
        data = with_length(data)
        known = sample = check_data(
            first_batch(data, resumed=run is not None), name="the stream's first batch", part=True
        )
        per_epoch: int = data.steps_per_epoch  # pyright: ignore[reportAssignmentType] — with_length has set it
        n, batch_size = per_epoch * count_examples(sample), count_examples(sample)
    elif batch_size is None:
        raise DataError("batch_size is not given; expected how many examples an update takes")
    elif is_read_ahead(data):
        data = data if isinstance(data, Examples) else as_batch(data)
        n = count_rows(data)
        check_batch_size(batch_size, n)
        if isinstance(data, Batch) and data.weights is not None and not np.any(data.weights):
            raise DataError("data.weights sum to 0; expected one above 0 at least: weights=None counts every example")
        known = sample = check_data(take_rows(data, range(batch_size)), part=True)
        per_epoch = -(-n // batch_size)
    else:
        known = data = check_data(data, batch_size=batch_size)
        per_epoch, n = steps_per_epoch(data, batch_size), count_examples(data)
        sample = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype), data)
    every = in_steps("evaluate_every", evaluate_every, per_epoch)
    after, metrics = dry_run("data", step, ts, known, batch_size)
    for (path, old), (_, new) in zip(named_leaves(ts), named_leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"step turns {path} from {old.dtype}{old.shape} into {new.dtype}{new.shape}; expected no change"
            )
    if not isinstance(data, Stream) and (last := n % batch_size):  # the epoch's last batch is smaller
        dry_run("data", step, ts, known, last)
    results, held = {}, None
    if not evaluate:
        jax.eval_shape(lambda opt_state: told(opt_state, {}), ts.opt_state)  # raises where it waits for a result
    if evaluate:
        if not sets_of(validation):
            raise ValueError("validation holds no set; expected a Batch, or a mapping of names to Batches")
        checked = {name: check_set(name, given, batch_size) for name, given in sets_of(validation).items()}
        for name, (given, first) in checked.items():
            on_batch = lambda ts, batch: evaluate(ts.params, ts.state, batch)  # noqa: E731
            found = dry_run(name, on_batch, ts, first, count_examples(first))
            if is_read_ahead(given):
                check_sums(name, found)
        pairs = ({name: pair[i] for name, pair in checked.items()} for i in range(2))
        validation, held = (sets if is_several(validation) else sets["validation"] for sets in pairs)
        results = jax.eval_shape(lambda ts, sets: evaluated(ts, sets, evaluate, stop), ts, held)[1]
    check_metrics([*named_metrics(metrics), *results.items()])
    named, end = dict(named_metrics(metrics)), int(steps or epochs * per_epoch)
    run = per_epoch, end, every, named, results, chunk_capacity(metrics, every, results)
    return Plan(step, data, sample, validation, held, n, batch_size, shuffle, evaluate, stop, *run)


def check_set(name: str, given: Any, batch_size: int) -> tuple[Any, Batch]:
    """A validation set, and what of it is known before it is read: all, or its first batch."""
    given = as_source(given)
    if isinstance(given, Stream):
        given = with_length(given)
        return given, check_data(first_batch(given), name=f"the first batch of {name}", part=True)
    if isinstance(given, Examples):
        first = take_rows(given, range(min(batch_size, count_rows(given))))
        return given, check_data(first, name=name, part=True)
    held = check_data(given, name=name)
    return held, held


def check_sums(name: str, results: PyTree) -> None:
    """Require of the results of a set that is read batch by batch that they add up."""
    for metric, value in named_metrics(results):
        if not isinstance(value, Mean):
            raise ValueError(
                f"{name}: the result {metric!r} is one number, and the set is read batch by batch; expected a Mean, "
                "whose sums and counts add up, as fnet.make_evaluate gives them: or give the set as arrays"
            )


def check_metrics(metrics: list[tuple[str, Any]]) -> None:
    """Require of what is measured that each has a name of its own and holds real numbers."""
    names = [name for name, _ in metrics]
    for name, metric in metrics:
        if name in ("", "kind", "step", "epoch"):
            raise ValueError(
                f"a metric is called {name!r}; expected another name, as rows of metrics have that already"
                if name
                else "the metrics are one number without a name; expected a dict of metrics by name"
            )
        if names.count(name) > 1:
            raise ValueError(f"two metrics or results are called {name!r}; expected one: give one of them another name")
        for leaf in jax.tree.leaves(metric):
            real = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
            if not real or not math.prod(leaf.shape):
                raise ValueError(
                    f"the metric {name!r} is {leaf.dtype}{leaf.shape}; expected real numbers, one at least"
                )


def check_start(ts: TrainState, stop: Reducer | None) -> None:
    """Require that the state was not stopped, and that ``stop`` is the rule that it goes on with."""
    if np.asarray(stopped(ts)).any():
        raise ValueError(
            f"the state was stopped by its rule at step {int(ts.step)}; expected one that goes on: "
            "ts._replace(stopping=()) begins without its rule, or anew with another"
        )
    if stop is None or ts.stopping == ():
        return
    own, given = dict(named_leaves(ts.stopping)), dict(named_leaves(jax.jit(stop.init)(ts)))
    differing = [name for name in own if "hyper" in name.split("/") and str(own[name]) != str(given.get(name))]
    if differing or own.keys() != given.keys():
        numbers = [f"{name.split('/')[-1]} {shortest(own[name])}" for name in differing if name != "hyper/rule"]
        raise ValueError(
            f"stop is {stop.about}, and the state has another rule{': ' * bool(numbers)}{', '.join(numbers)}; expected "
            "that which it began with: ts._replace(stopping=()) begins anew with the one given"
        )


def programs_of(plan: Plan, ts: TrainState) -> dict[str, list[Line]]:
    """What a step and an evaluation compute, whatever their parts are called; of a smaller last batch too."""
    evaluation = lambda ts, held: evaluated(ts, held, plan.evaluate, plan.stop)  # noqa: E731
    like = jax.eval_shape(lambda ts: ts, ts)

    def traced(function: Callable, data: PyTree, held: PyTree) -> list[Line]:
        sets, firsts = sets_of(data), sets_of(held)
        pairs = {name: _first_and_last(sets[name], firsts[name]) for name in sets}
        first, last = ({name: pair[i] for name, pair in pairs.items()} for i in range(2))
        programs = [first] if first == last else [first, last]
        if sets is not data:
            programs = [each["validation"] for each in programs]
        return [line for shapes in programs for line in program_lines(jax.make_jaxpr(function)(like, shapes))]

    with jax.disable_jit(False):  # else it is another program
        programs = {"step": traced(plan.step, plan.data, plan.sample)}
        if plan.evaluate:
            programs["evaluation"] = traced(evaluation, plan.validation, plan.held)
    return programs


def _first_and_last(data: Any, first: Batch) -> tuple[Batch, Batch]:
    """The shapes of a set's first batch, and of its last: those of the first where it is as large, or not known."""
    shapes = jax.eval_shape(lambda batch: batch, first)
    if isinstance(data, Stream) or not (rest := count_rows(data) % count_examples(first)):
        return shapes, shapes
    return shapes, jax.tree.map(lambda a: jax.ShapeDtypeStruct((rest, *a.shape[1:]), a.dtype), shapes)


def described(plan: Plan, ts: TrainState, programs: Mapping[str, list[Line]]) -> dict[str, Any]:
    """What must be the same when a run is resumed: its data, what it computes, and what its checkpoint overrides.

    The last are the numbers of the optimizer and of the rule to stop, and the run's key: all in the state.
    """
    data: dict[str, Any] = {"steps_per_epoch": plan.per_epoch}
    if isinstance(plan.data, Stream):
        if plan.data.resumable:  # else it may begin otherwise each time, and nothing goes on from there
            data["first batch"] = _digest(plan.sample)
    else:
        data = {
            "examples": plan.examples,
            "an example": [f"{leaf.dtype}{tuple(leaf.shape[1:])}" for leaf in jax.tree.leaves(plan.sample)],
            "batch_size": plan.batch_size,
            "shuffle": plan.shuffle,
            "rows": rows_digest(plan.data),
        }
    for name, held in sets_of(plan.validation).items() if plan.evaluate else ():
        if isinstance(held, Stream):
            first = _digest(sets_of(plan.held)[name])
            again = _digest(check_set(name, held, plan.batch_size)[1])
            data |= {f"batches of {name}": held.steps_per_epoch}
            data |= {f"first batch of {name}": first if first == again else "another each time it is read"}
        else:
            data[f"rows of {name}"] = rows_digest(held)
    return {
        **data,
        **{name: f"SHA-256 {digest(lines)[:12]}…" for name, lines in programs.items()},
        "metrics": [f"{name}{_shape(metric)}" for name, metric in plan.metrics.items()],
        "results": [f"{name}{_shape(result)}" for name, result in plan.results.items()],
        "rule to stop": plan.stop.about if plan.stop else None,
        "optimizer": _kind_of_state(ts.opt_state),
        "steps between evaluations": plan.every if plan.evaluate else None,
        "key": jax.tree.map(lambda key: np.asarray(words_of(key)).tolist(), ts.key),
        **numbers_of(ts),
    }


def _kind_of_state(opt_state: PyTree) -> str:
    """What an optimizer's state is, and a hash of the paths, shapes and dtypes of its leaves."""
    lines = [f"{path} {leaf.dtype}{leaf.shape}" for path, leaf in named_leaves(opt_state)]
    return f"{type(opt_state).__name__}, SHA-256 {digest(lines)[:12]}…"


def rows_digest(data: Batch | Examples) -> str:
    """A hash of 64 of the data's examples, evenly spread; of a dataset that draws its examples anew, a word."""
    rows = np.unique(np.linspace(0, count_rows(data) - 1, 64).astype(int))

    if not isinstance(data, Examples):
        return _digest(jax.tree.map(lambda leaf: np.asarray(leaf)[rows], data))
    found, again = (_digest(take_rows(data, rows)) for _ in range(2))
    return found if found == again else "others each time they are read"


def _digest(some: Batch) -> str:
    """A hash of examples, in the dtypes that they have in jax."""
    digest = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(some)):
        digest.update(np.ascontiguousarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype)).tobytes())
    return f"SHA-256 {digest.hexdigest()[:12]}…"


def _shape(metric: Any) -> tuple[int, ...]:
    return tuple(jnp.shape(metric.sum if isinstance(metric, Mean) else metric))


def check_result(what: str, name: str, plan: Plan) -> None:
    """Require that an evaluation gives one number of this name."""
    if name not in plan.results:
        there = ", ".join(plan.results) or "there is none without evaluate and validation"
        raise ValueError(f"{what} = {name!r}; expected the name of a result of the evaluation: {there}")
    if (shape := _shape(plan.results[name])) != ():
        raise ValueError(f"{what} = {name!r}, which has shape {shape}; expected a result that is one number")


def check_position(ts: TrainState, plan: Plan, folder: Any = None) -> None:
    """Require that there is something left to run."""
    if (position := int(ts.step)) >= plan.end:
        what, error = (f"the run in {folder}", RunError) if folder else ("the state", ValueError)
        raise error(
            f"{what} stands at step {position}, but is to end at step {plan.end}, after epoch "
            f"{plan.end / plan.per_epoch:g}; epochs and steps are counted from step 0: give a later end"
        )


def in_steps(name: str, every: Any, per_epoch: int) -> int:
    """``(n, "steps")`` or ``(n, "epochs")`` in steps."""
    pair = isinstance(every, tuple) and len(every) == 2
    if not pair or not is_whole(every[0]) or every[1] not in ("steps", "epochs"):
        raise ValueError(f"{name} = {every!r}; expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1")
    return every[0] * (per_epoch if every[1] == "epochs" else 1)


def chunk_capacity(metrics: PyTree, every: int, results: PyTree) -> int:
    """C: as many steps as have room for what they and their evaluations measure, whatever the length of the run."""
    sizes = [sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)) for tree in (metrics, results)]
    each, evaluation = (max(1, METRIC_BYTES // max(1, size)) for size in sizes)
    return min(CHUNK_STEPS, each, every * evaluation)


def order_at(plan: Plan, key: jax.Array, epoch: int) -> np.ndarray:
    """The order of an epoch's examples, on the host."""
    return np.asarray(epoch_order(key, epoch, plan.examples)) if plan.shuffle else np.arange(plan.examples)


def examples_between(plan: Plan, first: int, last: int) -> int:
    """How many examples the steps ``first`` to ``last`` see."""

    def seen(step):
        epochs, within = divmod(step, plan.per_epoch)
        return epochs * plan.examples + within * plan.batch_size

    return seen(last) - seen(first)


def dry_run(
    name: str, function: Callable, ts: TrainState, data: Batch, size: int, rows: Sequence[int] | None = None
) -> Any:
    """The shapes of ``function(ts, batch)``, by `trace_batch`; DataError where labels or ids are out of range.

    ``rows`` says which ones of the whole data these are.
    """
    try:
        return trace_batch(function, (ts,), data, size, rows)
    except ValueError as error:
        found = [note.removeprefix(EXTREMES) for note in getattr(error, "__notes__", ()) if note.startswith(EXTREMES)]
        placed = is_placed(error)
        if isinstance(error, LayerError) or not (found or placed):
            batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), data)
            error.add_note(f"in {name}, given to fit: {shown(batch)}")
            raise
        if placed:
            raise DataError(f"{name}: {error}") from None
        raise DataError(
            f"{name}, examples {found[-1]} (those with the least and the greatest label or id): {error}"
        ) from error
