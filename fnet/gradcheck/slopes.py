"""Numerical differentiation along lines: steps that cross no kink, Richardson extrapolation, one-sided slopes.

A line is ``t -> f(p + t d)`` at ``t = 0, ±2^-3, ±2^-5, …, ±2^-27``, evaluated in one compiled program. With the value
comes a mark of every decision that was taken on the way (comparisons, maxima, signs, …): where the marks at 0 and at ±t
agree, no kink lies between, and the function is smooth there. So a step is never chosen: the largest smooth ones are
used, and the error is estimated from the extrapolation table and the rounding that the values themselves show.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.interpret import STRUCTURE, evaluate, is_float, weights
from fnet.gradcheck.kept import prepared

LEVELS = 2.0 ** -np.arange(3.0, 28.0, 2.0)  # the steps, largest first
EXCESS = 10  # times its own error estimate a measured slope must be off to contradict
SHORTER = (2.0**-14, 2.0**-28)  # of a direction, to measure along it again
TS = np.concatenate([[0.0], LEVELS, -LEVELS])


class Line(NamedTuple):
    """What was measured along one direction. Slopes are None where no step could be used."""

    left: Any
    right: Any  # equal unless there is a kink
    error: float  # of either
    kinked: bool
    rough: bool  # one-sided slopes that do not settle as the step shrinks
    base: float  # f at t = 0
    steps: tuple[float, ...]  # the smooth ones, largest first
    values: tuple[tuple[float, float], ...]  # f(t), f(-t) at each

    @property
    def largest(self) -> float:
        """The largest magnitude of the function at the smooth steps."""
        return max((max(abs(up), abs(down)) for up, down in self.values), default=0.0)

    @property
    def usable(self) -> bool:
        return self.left is not None

    def stretched(self, share: float) -> Line:
        """The line of ``d``, where this is the one of ``share · d``."""
        if not self.usable:
            return self
        steps = tuple(share * t for t in self.steps)
        return self._replace(left=self.left / share, right=self.right / share, error=self.error / share, steps=steps)

    def outside(self, claimed: float) -> float:
        """How far a claimed slope lies outside the one-sided slopes; 0 within."""
        low, high = min(self.left, self.right), max(self.left, self.right)
        return max(low - claimed, claimed - high, 0.0) if np.isfinite(claimed) else np.inf


def make_probe(closed, leaves, others, eps: float = 2.0**-52):
    """``probe(directions) -> Line``; a direction is a dict of arrays by the leaf's position, zero elsewhere.

    ``eps`` is that of the narrowest type that takes part: the values are no better than that.
    """

    zeros = [jax.device_put(np.zeros(leaf.shape, leaf.dtype)) for leaf in leaves]
    ts = jax.device_put(TS)
    run = prepared("line", along, closed, (leaves, others, zeros, ts))

    def probe(direction: dict[int, np.ndarray]) -> Line:
        along = [jax.device_put(direction[i]) if i in direction else zero for i, zero in enumerate(zeros)]
        f, marks = run(leaves, others, along, ts)
        return read_line(np.asarray(f, np.float64), np.asarray(marks), eps)

    return probe


def along(closed):
    """``(leaves, others, direction, ts) -> values, marks``: a program at ``leaves + t direction`` for each t."""

    def values(leaves, others, direction, ts):
        def at(t):
            moved = [p + t * d for p, d in zip(leaves, direction, strict=True)]
            (value,), mark = evaluate(closed, [*moved, *others], observe=decisions)
            return value, jnp.uint32(0) if mark is None else mark

        return jax.lax.map(at, ts)

    return values


def settled(probe, i: int, d: np.ndarray, line: Line) -> Line:
    """The line along ``d`` over leaf ``i``, or that of shorter steps where they refute it.

    Steps that are long beside what a function bends over can agree with each other and be wrong: entries of one leaf
    may differ in size by many decades, and a step across all of them is as long as the largest wants it.
    """
    for share in SHORTER:
        finer = probe({i: share * d}).stretched(share)
        error = EXCESS * (finer.error + line.error)
        same = line.usable and finer.usable and max(finer.outside(line.left), finer.outside(line.right)) <= error
        if finer.usable and not same:
            line = finer
    return line


def read_line(f: np.ndarray, marks: np.ndarray, eps: float = 2.0**-52) -> Line:
    """The slopes at 0 of a line's values, from the steps on each side that cross no kink."""
    n = len(LEVELS)
    base, plus, minus = float(f[0]), f[1 : n + 1], f[n + 1 :]
    m0, m_plus, m_minus = marks[0], marks[1 : n + 1], marks[n + 1 :]
    right = smooth_run(m_plus, plus)
    left = smooth_run(m_minus, minus)
    none = Line(None, None, np.inf, False, False, base, (), ())
    if not np.isfinite(base) or left >= n - 1 or right >= n - 1:
        return none
    first = max(left, right)
    steps, up, down = LEVELS[first:], plus[first:], minus[first:]
    shown = tuple(map(float, steps)), tuple(zip(map(float, up), map(float, down), strict=True))
    # three points on each side in a row: what a parabola leaves is rounding
    noise = eps * max(abs(base), np.abs(up).max(), np.abs(down).max())
    for side in (plus, minus):
        for k in (n - 2, n - 3):
            if k >= first:
                noise = max(noise, abs(side[k] - 4 * side[k + 1] + 3 * base) / 4)
    ups, downs = (plus - base) / LEVELS, (base - minus) / LEVELS
    if any(diverges(s, eps * max(abs(base), np.abs(up).max(), np.abs(down).max())) for s in (ups, downs)):
        return none._replace(rough=True)
    a, a_error = extrapolate(ups[right:], 4.0, 2 * noise / LEVELS[right:])
    b, b_error = extrapolate(downs[left:], 4.0, 2 * noise / LEVELS[left:])
    error = max(a_error, b_error)
    # an operation may have a kink that decisions do not show, so one-sided slopes are compared all the same
    apart = abs(a - b) > max(100 * error, 1e-4 * max(abs(a), abs(b)))
    if m_plus[-1] == m0 == m_minus[-1] and not apart:
        slope, error = extrapolate((up - down) / (2 * steps), 16.0, noise / steps)
        return Line(slope, slope, error, False, False, base, *shown)
    kinked = abs(a - b) > 10 * error
    if not kinked:
        a = b = (a + b) / 2
    return Line(b, a, error, kinked, False, base, *shown)


def diverges(slopes: np.ndarray, noise: float) -> bool:
    """Whether one-sided slopes grow as the step shrinks, by more than rounding: at a cusp or a jump."""
    last = np.abs(slopes[-5:])
    return bool((last[1:] > 1.5 * last[:-1]).all() and last[-1] * LEVELS[-1] > 1e4 * noise)


def smooth_run(marks: np.ndarray, values: np.ndarray) -> int:
    """The first level from which on all smaller steps took the same decisions and gave finite values."""
    fine = (marks == marks[-1]) & np.isfinite(values)
    return int(len(fine) - np.argmin(fine[::-1])) if not fine.all() else 0


def extrapolate(estimates: np.ndarray, ratio: float, noise: np.ndarray) -> tuple[float, float]:
    """The best entry of the Richardson table of estimates at steps that shrink by 4, and its error.

    The error is that of Ridders (the larger distance to the two entries that it came from) plus the rounding.
    """
    found = [(float(noise[-1] * 4 + abs(estimates[-1] - estimates[-2])), float(estimates[-1]), len(estimates) - 1)]
    row: list[float] = []
    for k, estimate in enumerate(estimates):
        new = [float(estimate)]
        for j, previous in enumerate(row):
            new.append(new[j] + (new[j] - previous) / (ratio ** (j + 1) - 1))
            error = max(abs(new[j + 1] - new[j]), abs(new[j + 1] - previous)) + 3 * float(noise[k])
            found.append((error, new[j + 1], k))
        row = new
    # long steps may agree with each other and be wrong (a saturated function, a period): shorter ones must come closer
    for error, value, k in sorted(found):
        shorter = np.abs(estimates[k:] - value)
        if (shorter <= 0.5 * shorter[0] + 5 * noise[k:] + 2 * error)[1:].all():
            return value, error
    return found[0][1], found[0][0]


def taylor(line: Line, slope: float) -> tuple[tuple[tuple[float, float], ...], float | None]:
    """``(t, |f(t) − f(0) − t slope|)`` along a line, and the order in t at which it vanishes.

    The order is 2 or more for the right slope and 1 for a wrong one. It is read at the smallest steps at which the
    remainder still falls well above where it stops falling, which is rounding; None where it is all rounding.
    """
    noise = 2.0**-50 * max([abs(line.base), *(abs(v) for pair in line.values for v in pair)], default=0.0)
    points = []
    for t, (up, down) in zip(line.steps, line.values, strict=True):
        points.append((t, max(abs(up - line.base - t * slope), abs(down - line.base + t * slope))))
    sizes = [r for _, r in points]
    falls = 0  # down to here each step, a quarter of the one before, at least halves the remainder
    while falls + 1 < len(sizes) and 2 * sizes[falls + 1] <= sizes[falls] < np.inf:
        falls += 1
    rounding = max([4 * noise, *(10 * r for r in sizes[falls + 1 :])])
    orders = [
        np.log(r0 / r1) / np.log(t0 / t1)
        for (t0, r0), (t1, r1) in itertools.pairwise(points[: falls + 1])
        if r1 > rounding
    ]
    return tuple(points), (float(orders[-1]) if orders else None)


def decisions(site, eqn, inputs, outputs, calls):
    """A number that changes when an operation on floats decides otherwise: a branch, a maximum, a sign, an index."""
    name = eqn.primitive.name
    if name in STRUCTURE or not any(map(is_float, inputs)):
        return None
    bits = choices(name, eqn, inputs, outputs)
    if not bits:
        return None
    mark = jnp.uint32(0)
    for k, bit in enumerate(bits):
        mark = mark + (bit.reshape(-1).astype(jnp.uint32) * weights(bit.size)).sum(dtype=jnp.uint32) * jnp.uint32(
            2 * k + 1
        )
    salt = jnp.uint32((hash(site) * 2654435761 + 97) % 2**32 | 1)
    return mark * salt


def choices(name: str, eqn, inputs, outputs) -> list[jax.Array]:
    """The decisions of one operation as integer arrays; an empty list for a smooth one."""
    x = inputs[0]
    if name in ("max", "min"):
        return [jnp.greater(*inputs)]
    if name in ("abs", "sign"):
        return [jnp.sign(x).astype(jnp.int32)]
    if name in ("floor", "ceil", "round"):
        return [jnp.asarray(outputs[0], jnp.int32)]
    if name == "clamp":
        low, x, high = inputs
        return [(x > low).astype(jnp.int32) + (x < high)]
    if name in ("reduce_max", "reduce_min"):
        return [x == jnp.expand_dims(outputs[0], tuple(eqn.params["axes"]))]
    if name in ("sqrt", "cbrt", "log") or (name == "pow" and is_float(inputs[1])):
        return [(x == 0).astype(jnp.int32)]
    if name in ("scatter-max", "scatter-min"):
        _, back = jax.vjp(lambda x, u: eqn.primitive.bind(x, inputs[1], u, **eqn.params), x, inputs[2])
        return [g != 0 for g in back(jnp.ones_like(outputs[0]))]
    if name in ("reduce_window_max", "reduce_window_min", "cummax", "cummin"):
        _, back = jax.vjp(lambda x: eqn.primitive.bind(x, **eqn.params), x)
        return [back(jnp.ones_like(outputs[0]))[0] != 0]
    if name == "sort":
        return [jnp.argsort(x, axis=eqn.params["dimension"]).astype(jnp.int32)]
    if name == "rem":
        return [jnp.floor(inputs[0] / inputs[1]).astype(jnp.int32)]
    return [
        jnp.asarray(out).astype(jnp.int32)
        for out in outputs
        if hasattr(out, "dtype") and (out.dtype == bool or jnp.issubdtype(out.dtype, jnp.integer))
    ]
