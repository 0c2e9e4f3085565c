"""Limited-memory BFGS with a line search, for losses that are not sampled: full batches, few parameters, high accuracy.

Legend: P parameters as one vector, m pairs kept; s a step, y the change of the gradient over it, t the step's length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from fnet.core.checks import described, require_counts
from fnet.optimizers.common import check_floats
from fnet.optimizers.schedules import check_numbers
from fnet.types import PyTree


class Minimum(NamedTuple):
    """What `minimize_lbfgs` found.

    ``converged`` says that the value is finite and the gradient's largest entry within the tolerance; else the line
    search found no lower point (``stuck``: rounding mostly, or a start that is not finite) or the iterations ran out.
    """

    params: PyTree
    value: jax.Array
    largest_gradient: jax.Array
    iterations: jax.Array
    evaluations: jax.Array
    converged: jax.Array
    stuck: jax.Array


class _State(NamedTuple):
    x: jax.Array  # (P,)
    value: jax.Array
    gradient: jax.Array  # (P,)
    steps: jax.Array  # (m, P), the newest last, each divided by its largest entry
    changes: jax.Array  # (m, P), likewise
    ratios: jax.Array  # (m,), of these entries
    pairs: jax.Array
    iterations: jax.Array
    evaluations: jax.Array
    stuck: jax.Array


class _Point(NamedTuple):
    """A point on the line, t from where it begins."""

    t: jax.Array
    value: jax.Array
    gradient: jax.Array


class _Search(NamedTuple):
    t: jax.Array  # what is tried next
    low: jax.Array  # the largest t that is low enough, and still too steep; its value and slope
    low_value: jax.Array
    low_slope: jax.Array
    high: jax.Array  # the smallest t that is too high, and its value
    high_value: jax.Array
    last: _Point
    lowest: _Point
    done: jax.Array
    tries: jax.Array


def minimize_lbfgs(
    loss_fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    *,
    iterations: int = 500,
    memory: int = 10,
    tolerance: ArrayLike = 1e-5,
    line_search_tries: int = 30,
) -> Minimum:
    """The minimum of ``loss_fn(params) -> scalar`` near ``params``, until every gradient is within ``tolerance``.

    The direction is ``−H g`` by the two-loop recursion over the last ``memory`` pairs (s, y), from ``H = sᵀy / yᵀy``
    (Nocedal, 1980); the first is the gradient's, and its first step has length 1. The line search looks for the weak
    Wolfe conditions, ``f(x + t d) ≤ f + 10⁻⁴ t gᵀd`` and ``g(x + t d)ᵀd ≥ 0.9 gᵀd`` (Lewis and Overton, 2013), so that
    sᵀy > 0 but for rounding; a pair without is dropped. It goes on to where a parabola through what is known has its
    least value, up to 100 times as far. A point whose value or gradient is not finite counts as too high. Where no
    point is found in ``line_search_tries``, the lowest one seen is taken; one that is higher, by more than rounding, is
    never taken. Where values differ by rounding alone, the slopes decide (Hager and Zhang, 2005). Vectors are
    multiplied after a division by their largest entries, so that a function may be as steep or as flat as its dtype
    holds. Pure: it can be jitted and vmapped. In the parameters' dtype; in float32 a tolerance below some 1e-4 of the
    gradient's first size is seldom met.

    A function without a lower bound gives the lowest point that was seen, and ``converged`` False.

    Raises ValueError for iterations, memory or tries below 1, a tolerance that is negative, parameters of several
    dtypes or of no numbers, and a loss that is not one float; TypeError for a parameter that is not a float, and a loss
    that is no function.

    >>> result = minimize_lbfgs(lambda p: ((p["x"] - 3.0) ** 2).sum(), {"x": jnp.zeros(2)})
    >>> print(result.params["x"], bool(result.converged))
    [3. 3.] True
    """
    require_counts("minimize_lbfgs", iterations=iterations, memory=memory, line_search_tries=line_search_tries)
    check_numbers("minimize_lbfgs", tolerance=tolerance)
    if not callable(loss_fn):
        raise TypeError(f"minimize_lbfgs: loss_fn is {described(loss_fn)}; expected a function of the parameters")
    check_floats("minimize_lbfgs", params)
    if not sum(jnp.size(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError("minimize_lbfgs: the parameters hold no numbers; expected at least one")
    dtypes = sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)})
    if len(dtypes) != 1:
        raise ValueError(f"minimize_lbfgs: parameters of dtypes {dtypes}; expected one dtype")
    start, unravel = ravel_pytree(params)
    loss = jax.eval_shape(loss_fn, params)
    real = isinstance(loss, jax.ShapeDtypeStruct) and jnp.issubdtype(loss.dtype, jnp.floating)
    if not real or loss.shape != ():
        raise ValueError(f"minimize_lbfgs: loss_fn returned {described(loss)}; expected a scalar, one float")
    evaluate = jax.value_and_grad(lambda x: jnp.asarray(loss_fn(unravel(x)), start.dtype))

    def unit(vector) -> tuple[jax.Array, jax.Array]:
        """A vector divided by its largest entry, and that entry; zeros stay as they are."""
        size = largest(vector)
        return vector / jnp.where(size > 0, size, 1), size

    def largest(vector) -> jax.Array:
        return jnp.abs(vector).max()

    def finite(value, gradient):
        return jnp.isfinite(value) & jnp.isfinite(gradient).all()

    def direction(state: _State) -> tuple[jax.Array, jax.Array]:
        """``−H g`` divided by its largest entry, and that entry."""
        kept = jnp.arange(memory, dtype=jnp.int32) >= memory - state.pairs  # empty places count nothing
        products = jnp.where(kept, (state.steps * state.changes).sum(1), 1)

        # with s = a ŝ, y = b ŷ and k = a / b:  ρ sᵀq y = ŝᵀq / ŝᵀŷ · ŷ  and  ρ yᵀr s = ŷᵀr / ŝᵀŷ · ŝ
        def down(q, pair):
            s, y, product, _, on = pair
            alpha = jnp.where(on, s @ q / product, 0)
            return q - alpha * y, alpha

        def up(r, pair):
            s, y, product, ratio, on, alpha = pair
            return r + s * jnp.where(on, ratio * alpha - y @ r / product, 0), None

        pairs = (state.steps, state.changes, products, state.ratios, kept)
        g, size = unit(state.gradient)
        q, alphas = jax.lax.scan(down, g, pairs, reverse=True)
        newest = state.changes[-1]
        gamma = state.ratios[-1] * products[-1] / jnp.where(state.pairs > 0, newest @ newest, 1)
        r = jax.lax.scan(up, jnp.where(state.pairs > 0, gamma, 1) * q, (*pairs, alphas))[0]
        d, length = unit(r)
        descends = (g @ d > 0) & jnp.isfinite(d).all() & (state.pairs > 0)  # rounding may turn it round
        return jnp.where(descends, -d, -g), jnp.where(descends, length * size, 1 / jnp.sqrt(g @ g))

    def search(state: _State, d: jax.Array, first: jax.Array) -> _Search:
        slope = state.gradient @ d

        def one(s: _Search) -> _Search:
            point = state.x + s.t * d
            now = _Point(s.t, *evaluate(point))
            new_slope = now.gradient @ d
            known = finite(now.value, now.gradient)
            low_enough = now.value <= state.value + 1e-4 * s.t * slope
            # values that differ by rounding alone say nothing: then the slopes do (Hager and Zhang, 2005)
            level = now.value <= state.value + 4 * jnp.finfo(start.dtype).eps * jnp.abs(state.value)
            flatter = (new_slope <= -(1 - 2e-4) * slope) & (largest(now.gradient) < largest(state.gradient))
            too_high = ~(low_enough | (level & flatter)) | ~known
            too_steep = new_slope < 0.9 * slope
            done = ~too_high & ~too_steep & (slope <= 0) & (point != state.x).any()  # rounding can end all progress
            lowest = jax.tree.map(
                lambda new, old: jnp.where(known & (now.value < s.lowest.value), new, old), now, s.lowest
            )
            # where nothing is too high yet: to where the slope would be 0, if it went on as it came
            bend = s.low_slope - new_slope
            far = s.t + (s.t - s.low) * jnp.where(bend < 0, new_slope / jnp.where(bend < 0, bend, -1), jnp.inf)
            far = jnp.clip(far, 2 * s.t, 100 * s.t)
            low, low_value, low_slope = (
                jnp.where(too_high, old, new)
                for old, new in ((s.low, s.t), (s.low_value, now.value), (s.low_slope, new_slope))
            )
            high, high_value = (
                jnp.where(too_high, new, old) for old, new in ((s.high, s.t), (s.high_value, now.value))
            )
            # between: the least value of the parabola through both values and the lower one's slope
            width = high - low
            rise = high_value - low_value - low_slope * width
            share = jnp.where(rise > 0, -low_slope * width / jnp.where(rise > 0, 2 * rise, 1), 0.5)
            share = jnp.where(jnp.isfinite(high_value), jnp.clip(share, 0.1, 0.9), 0.1)
            t = jnp.where(jnp.isinf(high), far, low + share * width)
            t = jnp.where(done, s.t, t)
            return _Search(t, low, low_value, low_slope, high, high_value, now, lowest, done, s.tries + 1)

        here, zero, infinite = _Point(0 * first, state.value, state.gradient), jnp.zeros((), jnp.int32), jnp.inf + first
        begin = _Search(first, here.t, state.value, slope, infinite, infinite, here, here, zero > 0, zero)
        return jax.lax.while_loop(lambda s: ~s.done & (s.tries < line_search_tries), one, begin)

    def unfinished(state: _State):
        return (largest(state.gradient) > tolerance) & ~state.stuck & (state.iterations < iterations)

    def iterate(state: _State) -> _State:
        d, first = direction(state)
        found = search(state, d, first)
        end = jax.tree.map(lambda a, b: jnp.where(found.done, a, b), found.last, found.lowest)
        moved = found.done | (end.value < state.value)
        step = jnp.where(moved, end.t * d, 0)  # where the search failed, d may be infinite
        (s, s_size), (y, y_size) = unit(step), unit(jnp.where(moved, end.gradient - state.gradient, 0))
        keep = moved & (s @ y > 0) & (y_size > 0)
        pushed = lambda rows, row: jnp.where(keep, jnp.concatenate([rows[1:], row[None]]), rows)  # noqa: E731
        return _State(
            state.x + step,
            jnp.where(moved, end.value, state.value),
            jnp.where(moved, end.gradient, state.gradient),
            pushed(state.steps, s),
            pushed(state.changes, y),
            pushed(state.ratios, s_size / jnp.where(y_size > 0, y_size, 1)),
            jnp.minimum(state.pairs + keep.astype(jnp.int32), memory),
            state.iterations + moved.astype(jnp.int32),
            state.evaluations + found.tries,
            ~moved,
        )

    value, gradient = evaluate(start)
    none, zero = jnp.zeros((memory, start.size), start.dtype), jnp.zeros((), jnp.int32)
    ratios = jnp.ones(memory, start.dtype)
    state = _State(start, value, gradient, none, none, ratios, zero, zero, zero + 1, ~finite(value, gradient))
    end = jax.lax.while_loop(unfinished, iterate, state)
    most = largest(end.gradient)
    converged = (most <= tolerance) & jnp.isfinite(end.value)  # an infinite value may have a gradient of 0
    return Minimum(unravel(end.x), end.value, most, end.iterations, end.evaluations, converged, end.stuck)
