"""Learning rates as functions of the updates applied so far; their numbers are data.

A `Schedule` is ``fn(hyper, count) -> rate``; ``count`` is the number of updates applied before, so the first update is
at count 0. ``hyper`` is a dict of numbers: Python numbers or tracers here, arrays in an optimizer's state, where
`fnet.optimizers.set_hyper` changes them without recompiling and `jax.vmap` sweeps them. A schedule can be called with
an int, an array of counts or a tracer, and computes in the widest float in force. To compile one alone, write
``jax.jit(lambda count: schedule(count))``: a Schedule is a tuple, which `jax.jit` does not take for a function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fnet.types import Schedule


def constant(rate: ArrayLike) -> Schedule:
    """``rate`` at every count. A plain number does the same in an optimizer."""
    check_numbers("constant", rate=rate)
    return Schedule(_constant, {"rate": rate})


def exponential(
    start: ArrayLike, decay_rate: ArrayLike, decay_steps: ArrayLike, *, staircase: bool = False
) -> Schedule:
    """``start · decay_rate ** (count / decay_steps)``; with ``staircase`` the exponent is rounded down.

    ``decay_steps`` is the number of updates in which the rate falls by the factor ``decay_rate``.

    Differs from optax's ``exponential_decay``: there the arguments are ``(init_value, transition_steps, decay_rate)``,
    a ``decay_rate`` or ``transition_steps`` of 0 silently means a constant rate (an error here), and there is an
    ``end_value``.

    >>> schedule = exponential(0.8, decay_rate=0.5, decay_steps=100)
    >>> [round(float(schedule(count)), 4) for count in (0, 50, 100, 200)]
    [0.8, 0.5657, 0.4, 0.2]
    """
    check_numbers("exponential", start=start)
    check_numbers("exponential", positive=True, decay_rate=decay_rate, decay_steps=decay_steps)
    hyper = {"start": start, "decay_rate": decay_rate, "decay_steps": decay_steps}
    return Schedule(_staircase if staircase else _exponential, hyper)


def cosine(start: ArrayLike, total_steps: ArrayLike, end: ArrayLike = 0.0) -> Schedule:
    """Half a cosine from ``start`` at count 0 to ``end`` at ``total_steps``, and ``end`` from there on.

    ``end + (start − end) · (1 + cos(π count / total_steps)) / 2``, from SGDR (arXiv 1608.03983) without restarts.
    Differs from optax's ``cosine_decay_schedule``, whose ``alpha`` is a fraction of the first value.
    """
    check_numbers("cosine", start=start, end=end)
    check_numbers("cosine", positive=True, total_steps=total_steps)
    return Schedule(_cosine, {"start": start, "total_steps": total_steps, "end": end})


def warmup_cosine(
    peak: ArrayLike, warmup_steps: ArrayLike, total_steps: ArrayLike, start: ArrayLike = 0.0, end: ArrayLike = 0.0
) -> Schedule:
    """A straight line from ``start`` at count 0 to ``peak`` at ``warmup_steps``, then half a cosine to ``end``.

    ``total_steps`` includes the warm-up (as ``decay_steps`` does in optax's ``warmup_cosine_decay_schedule``); the rate
    is ``end`` from there on. ``warmup_steps`` 0 means no warm-up. With the default ``start`` the first rate is 0.

    >>> schedule = warmup_cosine(peak=0.1, warmup_steps=10, total_steps=110)
    >>> [round(float(schedule(count)), 4) for count in (0, 5, 10, 60, 110, 200)]
    [0.0, 0.05, 0.1, 0.05, 0.0, 0.0]
    """
    check_numbers("warmup_cosine", peak=peak, warmup_steps=warmup_steps, total_steps=total_steps, start=start, end=end)
    if _on_host(warmup_steps) and _on_host(total_steps) and not total_steps > warmup_steps:
        raise ValueError(
            f"warmup_cosine: total_steps = {total_steps}; expected total_steps > {warmup_steps}, the warm-up"
        )
    hyper = {"peak": peak, "warmup_steps": warmup_steps, "total_steps": total_steps, "start": start, "end": end}
    return Schedule(_warmup_cosine, hyper)


def step_decay(start: ArrayLike, factor: ArrayLike, every: ArrayLike) -> Schedule:
    """``start · factor ** ⌊count / every⌋``: the rate falls by ``factor`` after every so many updates.

    `exponential` with ``staircase``, under the name that torch's ``StepLR`` gives it.
    """
    check_numbers("step_decay", start=start)
    check_numbers("step_decay", positive=True, factor=factor, every=every)
    return Schedule(_staircase, {"start": start, "decay_rate": factor, "decay_steps": every})


def piecewise(start: ArrayLike, factors: Mapping[float, ArrayLike]) -> Schedule:
    """``start`` times all factors whose count has come: ``piecewise(0.1, {100: 0.5, 200: 0.1})``.

    From count 100 on (inclusive) 0.05, from 200 on 0.005. Counts may be fractions, as `in_units` has them. optax's
    ``piecewise_constant_schedule`` is this, and torch's ``MultiStepLR`` with one factor for all counts.
    """
    check_numbers("piecewise", start=start)
    for count, factor in factors.items():
        check_numbers("piecewise", positive=True, count=count)
        numbers: dict[str, Any] = {f"factors[{count}]": factor}
        check_numbers("piecewise", **numbers)
    counts = sorted(factors)
    hyper = {"start": start, **{f"from_{count}": factors[count] for count in counts}}

    def fn(hyper, count):
        hyper, count = _floats(hyper, count)
        rate = jnp.broadcast_to(hyper["start"], count.shape)
        for at in counts:
            rate = rate * jnp.where(count >= float(at), hyper[f"from_{at}"], 1)
        return rate

    return Schedule(fn, hyper)


def polynomial(start: ArrayLike, total_steps: ArrayLike, end: ArrayLike = 0.0, power: ArrayLike = 1.0) -> Schedule:
    """``end + (start − end) · (1 − count / total_steps) ** power``, and ``end`` from ``total_steps`` on."""
    check_numbers("polynomial", start=start, end=end)
    check_numbers("polynomial", positive=True, total_steps=total_steps, power=power)
    return Schedule(_polynomial, {"start": start, "total_steps": total_steps, "end": end, "power": power})


def inverse_sqrt(peak: ArrayLike, warmup_steps: ArrayLike) -> Schedule:
    """``peak · min((count + 1) / warmup_steps, √(warmup_steps / (count + 1)))``: a line up, then one over a root.

    The first rate is ``peak / warmup_steps``. The transformer's rate (arXiv:1706.03762) is this with a peak of
    ``1 / √(features · warmup_steps)``.
    """
    check_numbers("inverse_sqrt", peak=peak)
    check_numbers("inverse_sqrt", positive=True, warmup_steps=warmup_steps)
    return Schedule(_inverse_sqrt, {"peak": peak, "warmup_steps": warmup_steps})


def one_cycle(
    peak: ArrayLike,
    total_steps: ArrayLike,
    *,
    rising: ArrayLike = 0.3,
    start_divisor: ArrayLike = 25.0,
    end_divisor: ArrayLike = 1e4,
) -> Schedule:
    """Half a cosine up to ``peak`` during the share ``rising`` of the run, half a cosine down to almost nothing.

    From ``peak / start_divisor`` at count 0 to ``peak`` at ``rising · total_steps``, to ``peak / (start_divisor ·
    end_divisor)`` at ``total_steps`` and from there on. torch's ``OneCycleLR`` has these numbers, ends one update
    sooner, and cycles the momentum too. Source: Smith and Topin, arXiv:1708.07120.
    """
    check_numbers("one_cycle", peak=peak)
    check_numbers("one_cycle", below=1, rising=rising)
    divisors: dict[str, Any] = {"start_divisor": start_divisor, "end_divisor": end_divisor}
    check_numbers("one_cycle", positive=True, total_steps=total_steps, **divisors)
    return Schedule(_one_cycle, {"peak": peak, "total_steps": total_steps, "rising": rising, **divisors})


def cosine_restarts(
    start: ArrayLike, first_steps: ArrayLike, factor: ArrayLike = 1.0, end: ArrayLike = 0.0
) -> Schedule:
    """Half cosines from ``start`` to ``end`` one after another, each ``factor`` times as long as the one before.

    The first takes ``first_steps`` updates; at its end the rate is ``start`` again. ``factor`` is at least 1, and it is
    the number in the float in force: 1.1 in float32 is 1.10000002, whose 54th restart is at 85,436.05, not 85,435.97.
    Source: SGDR, arXiv:1608.03983. torch's ``CosineAnnealingWarmRestarts`` the same.
    """
    check_numbers("cosine_restarts", start=start, end=end)
    check_numbers("cosine_restarts", positive=True, first_steps=first_steps)
    check_numbers("cosine_restarts", factor=factor)
    if _on_host(factor) and factor < 1:
        raise ValueError(f"cosine_restarts: factor = {factor}; expected at least 1")
    return Schedule(_restarts, {"start": start, "first_steps": first_steps, "factor": factor, "end": end})


def join(schedules: Sequence[Schedule], counts: Sequence[float]) -> Schedule:
    """One schedule after another: the second begins, at its count 0, at ``counts[0]``, the third at ``counts[1]``.

    Counts may be fractions, as `in_units` has them.

    >>> schedule = join([constant(0.1), exponential(0.1, 0.5, 10)], [100])
    >>> [round(float(schedule(count)), 4) for count in (0, 99, 100, 110)]
    [0.1, 0.1, 0.1, 0.05]
    """
    _check_schedules("join", schedules)
    for i, begin in enumerate(counts):
        numbers: dict[str, Any] = {f"counts[{i}]": begin}
        check_numbers("join", positive=True, **numbers)
    if len(counts) != len(schedules) - 1 or list(counts) != sorted(set(counts)):
        raise ValueError(
            f"join: counts = {list(counts)} for {len(schedules)} schedules; expected {len(schedules) - 1} rising counts"
        )
    begins = [0, *(int(begin) if begin == int(begin) else float(begin) for begin in counts)]
    dtype = float if any(isinstance(begin, float) for begin in begins) else None

    def fn(hyper, count):
        count = jnp.asarray(count, dtype)
        rate = schedules[0].fn(hyper["0"], jnp.minimum(count, begins[1] if counts else count))
        for i in range(1, len(schedules)):
            after = count - begins[i]
            rate = jnp.where(after >= 0, schedules[i].fn(hyper[str(i)], jnp.maximum(after, 0)), rate)
        return rate

    return Schedule(fn, {str(i): schedule.hyper for i, schedule in enumerate(schedules)})


def in_units(schedule: Schedule, updates: ArrayLike) -> Schedule:
    """``schedule`` whose counts are units of so many updates.

    ``in_units(exponential(0.1, 0.5, decay_steps=10), steps_per_epoch)`` halves the rate every 10 epochs, smoothly;
    ``in_units(cosine(0.1, total_steps=1.0), total)`` is given in fractions of the run. All of a schedule is in units,
    also the 1 of `inverse_sqrt`, whose first rate stays ``peak / warmup_steps``, that of a whole unit.
    """
    _check_schedules("in_units", [schedule])
    check_numbers("in_units", positive=True, updates=updates)

    def fn(hyper, count):
        count, updates = jnp.asarray(count, float), jnp.asarray(hyper["updates"], float)
        return schedule.fn(hyper["schedule"], _quotient(count, updates))

    return Schedule(fn, {"schedule": schedule.hyper, "updates": updates})


def _check_schedules(who: str, schedules: Sequence[Schedule]) -> None:
    for i, schedule in enumerate(schedules):
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"{who}: schedule {i} is {schedule!r}; expected a Schedule: constant(rate) makes one of a number"
            )
    if not schedules:
        raise ValueError(f"{who}: no schedules; expected at least one")


def check_numbers(who: str, *, below: float = math.inf, positive: bool = False, **values) -> None:
    """Require that each value is a scalar and, if it is a number on the host, that ``0 <= value < below``.

    With ``positive``, 0 is excluded. Arrays of jax and tracers are not read. Raises ValueError, or TypeError for what
    is no integer and no float, that names ``who``, the argument and the value.
    """
    sign = "<" if positive else "<="
    for name, value in values.items():
        dtype = getattr(value, "dtype", type(value))
        known = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
        if not known or not any(jnp.issubdtype(dtype, kind) for kind in (np.integer, np.floating)):
            raise TypeError(f"{who}: {name} = {value!r}; expected a number")
        if np.shape(value) != ():
            raise ValueError(f"{who}: {name} has shape {np.shape(value)}; expected one number: jax.vmap sweeps several")
        if _on_host(value) and not (0 <= value < below and (value > 0 or not positive)):
            raise ValueError(f"{who}: {name} = {value}; expected 0 {sign} {name} < {below}")


def _on_host(value: ArrayLike) -> TypeGuard[float]:
    return not isinstance(value, jax.Array)


# --- the functions ---------------------------------------------------------------------------------------------------


def _floats(hyper, count):
    """All numbers in the widest float in force."""
    return {name: jnp.asarray(value, float) for name, value in hyper.items()}, jnp.asarray(count, float)


def _constant(hyper, count):
    hyper, count = _floats(hyper, count)
    return jnp.broadcast_to(hyper["rate"], count.shape)


def _quotient(count, steps):
    """``count / steps``, and the whole number where it is one.

    XLA divides by a constant as it multiplies by its reciprocal, so that ``41 / 41 < 1``.
    """
    quotient = count / steps
    whole = jnp.round(quotient)
    return quotient + jax.lax.stop_gradient(jnp.where(whole * steps == count, whole - quotient, 0))


def _exponential(hyper, count, rounding=lambda x: x):
    hyper, count = _floats(hyper, count)
    return hyper["start"] * hyper["decay_rate"] ** rounding(_quotient(count, hyper["decay_steps"]))


def _staircase(hyper, count):
    return _exponential(hyper, count, rounding=jnp.floor)


def _cosine(hyper, count):
    hyper, count = _floats(hyper, count)
    return _half_cosine(hyper["start"], hyper["end"], count, hyper["total_steps"])


def _warmup_cosine(hyper, count):
    hyper, count = _floats(hyper, count)
    start, peak, end, warmup = hyper["start"], hyper["peak"], hyper["end"], hyper["warmup_steps"]
    rising = start + (peak - start) * count / _nonzero(warmup)
    falling = _half_cosine(peak, end, count - warmup, hyper["total_steps"] - warmup)
    return jnp.where(count < warmup, rising, falling)


def _polynomial(hyper, count):
    hyper, count = _floats(hyper, count)
    left = 1 - jnp.clip(_quotient(count, _nonzero(hyper["total_steps"])), 0, 1)
    # where nothing is left a power below 1 has no finite gradient
    share = jnp.where(left > 0, jnp.where(left > 0, left, 1) ** hyper["power"], 0)
    return share * hyper["start"] + (1 - share) * hyper["end"]


def _inverse_sqrt(hyper, count):
    hyper, count = _floats(hyper, count)
    ratio = (count + 1) / _nonzero(hyper["warmup_steps"])
    return hyper["peak"] * jnp.where(ratio < 1, ratio, 1 / jnp.sqrt(ratio))


def _one_cycle(hyper, count):
    hyper, count = _floats(hyper, count)
    up = hyper["rising"] * hyper["total_steps"]
    peak, start = hyper["peak"], hyper["peak"] / hyper["start_divisor"]
    rising = _half_cosine(start, peak, count, up)
    falling = _half_cosine(peak, start / hyper["end_divisor"], count - up, hyper["total_steps"] - up)
    return jnp.where(count < up, rising, falling)


def _restarts(hyper, count):
    hyper, count = _floats(hyper, count)
    first, factor = hyper["first_steps"], hyper["factor"]
    grows = factor > 1
    safe = jnp.where(grows, factor, 2)
    done = count / _nonzero(first)

    def begin(cycle):
        """``first (factorⁿ − 1) / (factor − 1)``, which is ``n · first`` for a factor of 1."""
        return first * jnp.where(grows, _quotient(safe**cycle - 1, safe - 1), cycle)

    # a logarithm does not meet whole numbers, a power does: the nearest cycle, or the one before (NaN is overflow)
    cycle = jnp.round(jnp.where(grows, jnp.log1p(done * (safe - 1)) / jnp.log(safe), done))
    cycle = jnp.where(begin(cycle) <= count, cycle, cycle - 1)
    length = first * jnp.where(grows, safe**cycle, 1)
    return _half_cosine(hyper["start"], hyper["end"], count - begin(cycle), length)


def _half_cosine(start, end, count, steps):
    """From ``start`` at 0 to ``end`` at ``steps``: a convex combination, so that both ends are met exactly."""
    share = (1 + jnp.cos(jnp.pi * jnp.clip(count / _nonzero(steps), 0, 1))) / 2
    return share * start + (1 - share) * end


def _nonzero(steps):
    """1 in place of no steps at all, so that a traced 0 gives no 0/0, neither in the rate nor in its gradient."""
    return jnp.where(steps > 0, steps, 1)
