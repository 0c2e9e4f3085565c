"""Early stopping: a decision that changes a run, as a pure reducer in the run's state.

    stop = early_stopping("validation_loss", patience=5)
    ts, history = fit(step, ts, data, ..., evaluate=evaluate, validation=held_out, stop=stop)
    best = best_weights(ts)

The state of a reducer is ``TrainState.stopping``: it is saved with the run and stacked by `jax.vmap` with the rest.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from fnet.core.numerics import infinite
from fnet.optimizers.plateau import told
from fnet.optimizers.schedules import check_numbers
from fnet.types import Mean, TrainState


class Reducer(NamedTuple):
    """What looks at every evaluation and may end the run: its state has a boolean ``stopped``.

    init(ts) -> state                           update(state, ts, results) -> state
    """

    init: Callable[[TrainState], Any]
    update: Callable[[Any, TrainState, Mapping[str, Any]], Any]
    about: str = "a rule to stop"  # what it looks at; a run is resumed with a rule of which the same is said
    ending: Callable[[Any, int], Ending] | None = None  # (state, step), of a run that it has ended


class Ending(NamedTuple):
    """How a rule ended a run: ``History.ended``, and that of the `Event` "end"."""

    step: int
    reason: str
    metric: str | None = None  # what was best
    best: float | None = None
    best_step: int | None = None


class StoppingState(NamedTuple):
    """State of `early_stopping`."""

    best: jax.Array  # the least value so far, negated where the greatest is sought
    since: jax.Array  # evaluations since then
    step: jax.Array  # of the best
    stopped: jax.Array
    hyper: dict[str, jax.Array]
    weights: tuple  # params and state of the best; empty where they are not kept


def early_stopping(
    metric: str,
    patience: ArrayLike,
    *,
    least_change: ArrayLike = 0.0,
    greatest: bool = False,
    keep_weights: bool = True,
) -> Reducer:
    """Stop when ``patience`` evaluations in a row have not made ``metric`` less by more than ``least_change``.

    ``metric`` is a name among the evaluation's results, such as ``validation_loss``; with ``greatest`` more is better.
    A value that is not finite is never better. ``patience`` and ``least_change`` are data: a population may sweep them.
    The best parameters and model state are kept (`best_weights`) unless ``keep_weights`` is False, which saves their
    memory. As in Keras' EarlyStopping, with ``restore_best_weights`` left to the caller.

    Raises ValueError for a patience that is not above 0, a negative change, and, when a run is checked, for a metric
    that is not there or is not one number.
    """
    check_numbers("early_stopping", positive=True, patience=patience)
    check_numbers("early_stopping", least_change=least_change)
    sign, about = -1 if greatest else 1, f"early_stopping by the {'greatest' if greatest else 'least'} {metric}"
    about += "" if keep_weights else ", whose weights are not kept"

    def init(ts: TrainState) -> StoppingState:
        rule = jnp.array(zlib.crc32(about.encode()), jnp.uint32)  # so that a state knows its own
        hyper = {"patience": jnp.array(patience, float), "least_change": jnp.array(least_change, float), "rule": rule}
        weights = jax.tree.map(jnp.copy, (ts.params, ts.state)) if keep_weights else ()
        best, since = infinite("early_stopping"), jnp.array(0, jnp.int32)
        return StoppingState(best, since, jnp.copy(ts.step), jnp.array(False), hyper, weights)

    def update(own: StoppingState, ts: TrainState, results) -> StoppingState:
        if metric not in results:
            raise ValueError(f"early_stopping: no result is called {metric!r}; expected one of {', '.join(results)}")
        result = results[metric]
        value = sign * jnp.asarray(result.value if isinstance(result, Mean) else result, own.best.dtype)
        if value.shape != ():
            raise ValueError(f"early_stopping: {metric} has shape {value.shape}; expected one number")
        better = jnp.isfinite(value) & (value < own.best - own.hyper["least_change"])
        since = jnp.where(better, 0, own.since + 1)
        kept = (ts.params, ts.state) if keep_weights else ()
        return StoppingState(
            jnp.where(better, value, own.best),
            since,
            jnp.where(better, ts.step, own.step),
            own.stopped | (since.astype(own.best.dtype) >= own.hyper["patience"]),
            own.hyper,
            jax.tree.map(lambda new, old: jnp.where(better, new, old), kept, own.weights),
        )

    def ending(own: StoppingState, step: int) -> Ending:
        best, at, since = sign * float(own.best), int(own.step), int(own.since)
        if not math.isfinite(best):
            return Ending(step, f"{metric} was not finite in any of {since} evaluations", metric)
        reason = f"{metric} is at its best, {best:.6g}, since step {at}, {since} evaluations ago"
        return Ending(step, reason, metric, best, at)

    return Reducer(init, update, about, ending)


def ending(stop: Reducer | None, ts: TrainState) -> Ending | None:
    """How the rule has ended the run; None where it has not."""
    if stop is None or not bool(stopped(ts)):
        return None
    return stop.ending(ts.stopping, int(ts.step)) if stop.ending else Ending(int(ts.step), stop.about)


def best_weights(ts: TrainState) -> TrainState:
    """``ts`` with the parameters and model state of its best evaluation.

    Raises ValueError where none were kept, and where no evaluation was made or none was finite: what is kept then is
    what the run began with.
    """
    own = ts.stopping
    weights = getattr(own, "weights", ())
    if not weights:
        raise ValueError("best_weights: the state holds none; expected that of a run with stop=early_stopping(...)")
    if not isinstance(own.best, Tracer) and (none := np.isinf(own.best)).any():
        members = f" of the members {np.flatnonzero(none).tolist()}" if own.best.ndim else ""
        what = f"no evaluation{members} was made"
        remedy = "let the run reach its first evaluation, or evaluate more often (evaluate_every)"
        if made := int(np.max(np.asarray(own.since)[none])):
            what = f"none of the {made} evaluations{members} were finite"
            remedy = "look where the run stops being finite"
        raise ValueError(
            f"best_weights: {what}, so that there is no best state; expected a finite result of one evaluation at "
            f"least: {remedy}"
        )
    return ts._replace(params=weights[0], state=weights[1])


def stopped(ts: TrainState) -> Any:
    """Whether the run's reducer has ended it."""
    return getattr(ts.stopping, "stopped", np.False_)  # of NumPy: no program of its own outside of one


def with_stopping(stop: Reducer | None, ts: TrainState) -> TrainState:
    """``ts`` with the reducer's first state, unless it has one from before."""
    if stop is None or ts.stopping != ():
        return ts
    return ts._replace(stopping=jax.jit(stop.init)(ts))  # compiled, since it copies the weights


def decide(stop: Reducer | None, ts: TrainState, results: Mapping[str, Any]) -> TrainState:
    """``ts`` after the reducer, and what the optimizer's state waits for, have seen an evaluation."""
    if stop is not None:
        ts = ts._replace(stopping=stop.update(ts.stopping, ts, results))
    return ts._replace(opt_state=told(ts.opt_state, results))
