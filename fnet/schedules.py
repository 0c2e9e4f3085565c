"""Learning rates as functions of the updates applied so far; their numbers are data.

A `Schedule` is ``fn(hyper, count) -> rate``; ``count`` is the number of updates applied before, so the first update is
at count 0. ``hyper`` is a dict of numbers: Python numbers or tracers here, arrays in an optimizer's state, where
`fnet.optimizers.set_hyper` changes them without recompiling and `jax.vmap` sweeps them. A schedule can be called with
an int, an array of counts or a tracer, and computes in the widest float in force.
"""

from __future__ import annotations

import math
from typing import TypeGuard

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

    Differs from optax's `exponential_decay`: there the arguments are ``(init_value, transition_steps, decay_rate)``, a
    ``decay_rate`` or ``transition_steps`` of 0 silently means a constant rate (an error here), and there is an
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
    Differs from optax's `cosine_decay_schedule`, whose ``alpha`` is a fraction of the first value.
    """
    check_numbers("cosine", start=start, end=end)
    check_numbers("cosine", positive=True, total_steps=total_steps)
    return Schedule(_cosine, {"start": start, "total_steps": total_steps, "end": end})


def warmup_cosine(
    peak: ArrayLike, warmup_steps: ArrayLike, total_steps: ArrayLike, start: ArrayLike = 0.0, end: ArrayLike = 0.0
) -> Schedule:
    """A straight line from ``start`` at count 0 to ``peak`` at ``warmup_steps``, then half a cosine to ``end``.

    ``total_steps`` includes the warm-up (as ``decay_steps`` does in optax's `warmup_cosine_decay_schedule`); the rate
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


def check_numbers(who: str, *, below: float = math.inf, positive: bool = False, **values) -> None:
    """Require that each value is a scalar and, if it is a number on the host, that ``0 <= value < below``.

    With ``positive``, 0 is excluded. Arrays and tracers are not read. Raises ValueError, or TypeError for what is no
    number, that names ``who``, the argument and the value.
    """
    sign = "<" if positive else "<="
    for name, value in values.items():
        if not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
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


def _exponential(hyper, count, rounding=lambda x: x):
    hyper, count = _floats(hyper, count)
    return hyper["start"] * hyper["decay_rate"] ** rounding(count / hyper["decay_steps"])


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


def _half_cosine(start, end, count, steps):
    """From ``start`` at 0 to ``end`` at ``steps``: a convex combination, so that both ends are met exactly."""
    share = (1 + jnp.cos(jnp.pi * jnp.clip(count / _nonzero(steps), 0, 1))) / 2
    return share * start + (1 - share) * end


def _nonzero(steps):
    """1 in place of no steps at all, so that a traced 0 gives no 0/0, neither in the rate nor in its gradient."""
    return jnp.where(steps > 0, steps, 1)
