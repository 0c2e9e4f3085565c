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

from fnet.optimizers.common import check_floats
from fnet.schedules import check_numbers
from fnet.types import PyTree, require_counts


class Minimum(NamedTuple):
    """What `minimize_lbfgs` found.

    ``converged`` says that the gradient's largest entry is within the tolerance; else the line search found no lower
    point (``stuck``, mostly rounding) or the iterations ran out.
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
    steps: jax.Array  # (m, P), the newest last
    changes: jax.Array  # (m, P)
    pairs: jax.Array
    iterations: jax.Array
    evaluations: jax.Array
    stuck: jax.Array


class _Search(NamedTuple):
    t: jax.Array
    low: jax.Array
    high: jax.Array
    value: jax.Array
    gradient: jax.Array
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
    (Nocedal, 1980). The line search halves or doubles t until the weak Wolfe conditions hold,
    ``f(x + t d) ≤ f + 10⁻⁴ t gᵀd`` and ``g(x + t d)ᵀd ≥ 0.9 gᵀd`` (Lewis and Overton, 2013), so that sᵀy > 0 but for
    rounding; a pair without is dropped. A point whose value or gradient is not finite counts as too high, and one that
    is no lower is never taken. Pure: it can be jitted and vmapped. In the parameters' dtype; in float32 a tolerance
    below some 1e-4 of the gradient's first size is seldom met.

    Raises ValueError for iterations, memory or tries below 1, a tolerance that is negative, parameters of several
    dtypes or of no numbers, and a loss that is not a scalar; TypeError for a parameter that is not a float.

    >>> result = minimize_lbfgs(lambda p: ((p["x"] - 3.0) ** 2).sum(), {"x": jnp.zeros(2)})
    >>> print(result.params["x"], bool(result.converged))
    [3. 3.] True
    """
    require_counts("minimize_lbfgs", iterations=iterations, memory=memory, line_search_tries=line_search_tries)
    check_numbers("minimize_lbfgs", tolerance=tolerance)
    check_floats("minimize_lbfgs", params)
    if not sum(jnp.size(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError("minimize_lbfgs: the parameters hold no numbers; expected at least one")
    dtypes = sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)})
    if len(dtypes) != 1:
        raise ValueError(f"minimize_lbfgs: parameters of dtypes {dtypes}; expected one dtype")
    start, unravel = ravel_pytree(params)
    shape = jax.eval_shape(loss_fn, params).shape
    if shape != ():
        raise ValueError(f"minimize_lbfgs: the loss has shape {shape}; expected a scalar")
    evaluate = jax.value_and_grad(lambda x: loss_fn(unravel(x)).astype(start.dtype))

    def finite(value, gradient):
        return jnp.isfinite(value) & jnp.isfinite(gradient).all()

    def direction(state: _State) -> jax.Array:
        kept = jnp.arange(memory, dtype=jnp.int32) >= memory - state.pairs  # empty places count nothing
        products = jnp.where(kept, (state.steps * state.changes).sum(1), 1)

        def down(q, pair):
            s, y, product, on = pair
            alpha = jnp.where(on, s @ q / product, 0)
            return q - alpha * y, alpha

        def up(r, pair):
            s, y, product, on, alpha = pair
            return r + s * jnp.where(on, alpha - y @ r / product, 0), None

        pairs = (state.steps, state.changes, products, kept)
        q, alphas = jax.lax.scan(down, state.gradient, pairs, reverse=True)
        newest = state.changes[-1]
        scale = jnp.where(state.pairs > 0, products[-1] / jnp.where(state.pairs > 0, newest @ newest, 1), 1)
        return -jax.lax.scan(up, scale * q, (*pairs, alphas))[0]

    def search(state: _State, d: jax.Array) -> _Search:
        slope = state.gradient @ d

        def one(s: _Search) -> _Search:
            point = state.x + s.t * d
            value, gradient = evaluate(point)
            too_high = ~(value <= state.value + 1e-4 * s.t * slope) | ~finite(value, gradient)
            too_steep = gradient @ d < 0.9 * slope
            high, low = jnp.where(too_high, s.t, s.high), jnp.where(~too_high & too_steep, s.t, s.low)
            t = jnp.where(jnp.isinf(high), 2 * s.t, (low + high) / 2)
            done = ~too_high & ~too_steep & (slope <= 0) & (point != state.x).any()  # rounding can end all progress
            return _Search(jnp.where(done, s.t, t), low, high, value, gradient, done, s.tries + 1)

        # the first direction is the gradient itself, whose size says nothing about a step
        first = jnp.where(state.pairs > 0, 1, jnp.minimum(1, 1 / jnp.abs(state.gradient).sum()))
        infinite = jnp.asarray(jnp.inf, start.dtype)
        zero = jnp.zeros((), jnp.int32)
        begin = _Search(
            first.astype(start.dtype), jnp.zeros_like(first), infinite, state.value, state.gradient, zero > 0, zero
        )
        return jax.lax.while_loop(lambda s: ~s.done & (s.tries < line_search_tries), one, begin)

    def unfinished(state: _State):
        return (jnp.abs(state.gradient).max() > tolerance) & ~state.stuck & (state.iterations < iterations)

    def iterate(state: _State) -> _State:
        d = direction(state)
        found = search(state, d)
        step = jnp.where(found.done, found.t * d, 0)  # where the search failed, d may be infinite
        change = found.gradient - state.gradient
        keep = found.done & (step @ change > 0) & (change @ change > 0)  # small numbers have products of 0
        pushed = lambda rows, row: jnp.where(keep, jnp.concatenate([rows[1:], row[None]]), rows)  # noqa: E731
        return _State(
            state.x + step,
            jnp.where(found.done, found.value, state.value),
            jnp.where(found.done, found.gradient, state.gradient),
            pushed(state.steps, step),
            pushed(state.changes, change),
            jnp.minimum(state.pairs + keep.astype(jnp.int32), memory),
            state.iterations + found.done.astype(jnp.int32),
            state.evaluations + found.tries,
            ~found.done,
        )

    value, gradient = evaluate(start)
    none, zero = jnp.zeros((memory, start.size), start.dtype), jnp.zeros((), jnp.int32)
    state = _State(start, value, gradient, none, none, zero, zero, zero + 1, ~finite(value, gradient))
    end = jax.lax.while_loop(unfinished, iterate, state)
    largest = jnp.abs(end.gradient).max()
    return Minimum(unravel(end.x), end.value, largest, end.iterations, end.evaluations, largest <= tolerance, end.stuck)
