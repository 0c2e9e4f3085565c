"""Averages of the parameters over the updates: `averaged` beside an optimizer, and `lookahead` around one."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fnet.core.checks import require_state
from fnet.core.trees import by_path
from fnet.optimizers.common import as_arrays, check_between, check_counts, check_like, moment
from fnet.optimizers.guards import MasterState
from fnet.optimizers.schedules import check_numbers
from fnet.optimizers.within import about_within, chosen, found_in, init_within, of_optimizer, wide_copy, zero
from fnet.types import Optimizer, PyTree


class AveragedHyper(NamedTuple):
    """Numbers of `averaged`; ``decay`` is None for the plain mean."""

    decay: Any
    start: Any
    every: Any


class AveragedState(NamedTuple):
    """State of `averaged`: the mean of ``count`` parameters, and the optimizer's state."""

    hyper: AveragedHyper
    average: PyTree
    count: jax.Array
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def averaged(
    optimizer: Optimizer, decay: ArrayLike | None = 0.999, *, start: ArrayLike = 0, every: ArrayLike = 1
) -> Optimizer:
    """``optimizer``, beside which a mean of the parameters is kept; `averages` reads it from the state.

    After the updates t > ``start`` of which t − start is a multiple of ``every``, the mean takes up the parameters.
    With a ``decay`` it is the exponential moving average without bias, Σ decayⁿ⁻ⁱ pᵢ / Σ decayⁿ⁻ⁱ over the n taken up;
    with None the plain mean: Polyak's from ``start``, or stochastic weight averaging (arXiv:1803.05407) with one a
    cycle. The parameters that are trained do not change. Kept in float32 at least.
    """
    if decay is not None:
        check_numbers("averaged", below=1, decay=decay)
    check_counts("averaged", least=0, start=start)
    check_counts("averaged", every=every)
    init_optimizer = init_within("averaged", optimizer)

    def init(params):
        hyper = as_arrays(AveragedHyper(decay, start, every))
        return AveragedState(hyper, moment(params), zero(), init_optimizer(params))

    def update(grads, opt_state, params, *, value=None):
        require_state("averaged", opt_state, AveragedState)
        params, inner = optimizer.update(grads, opt_state.optimizer, params, value=value)
        hyper, after = opt_state.hyper, inner.step - opt_state.hyper.start.astype(jnp.int32)
        # an update that was left out within is none
        take = (inner.step != opt_state.step) & (after > 0) & (after % hyper.every.astype(jnp.int32) == 0)
        count = opt_state.count + take.astype(jnp.int32)
        n = jnp.maximum(count, 1).astype(hyper.start.dtype)
        # the share of the newest in the mean: 1/n of n, and (1 − decay) / (1 − decayⁿ) of the moving average
        share = 1 / n if hyper.decay is None else (1 - hyper.decay) / -jnp.expm1(n * jnp.log(hyper.decay))
        share = jnp.where(take, share, 0)
        average = jax.tree.map(
            lambda a, p: a + share.astype(a.dtype) * (p.astype(a.dtype) - a), opt_state.average, params
        )
        return params, AveragedState(hyper, average, count, inner)

    return Optimizer(init, update, lambda params: about_within(optimizer, params, "averaged"))


def averages(opt_state, params: PyTree) -> PyTree:
    """The averaged parameters in the dtypes of ``params``, from the state of an `averaged` optimizer within any other.

    Where none has been taken up yet they are ``params``, and so is what belongs to `groups` that are not averaged.
    Raises ValueError for a state without an average.
    """
    found, leaves = list(found_in(opt_state, AveragedState)), by_path(jax.tree.map(jnp.asarray, params))
    if not found:
        raise ValueError(f"averages: no average in {type(opt_state).__name__}; expected the state of averaged(...)")
    for state in found:
        average = by_path(state.average)
        check_like({path: leaf for path, leaf in leaves.items() if path in average}, "average", average)
        for path, a in average.items():
            p = leaves[path]
            leaves[path] = jnp.where(state.count > 0, a.astype(p.dtype), p)
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values())


class LookaheadHyper(NamedTuple):
    """Numbers of `lookahead`."""

    every: Any
    slow_rate: Any


class LookaheadState(NamedTuple):
    """State of `lookahead`: the slow parameters, and the optimizer's state."""

    hyper: LookaheadHyper
    slow: PyTree
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def lookahead(optimizer: Optimizer, every: ArrayLike = 5, slow_rate: ArrayLike = 0.5) -> Optimizer:
    """Every so many updates the parameters go back part of the way: ``slow += slow_rate (p − slow)``, ``p = slow``.

    The optimizer's moments stay as they are. Evaluate after a multiple of ``every`` updates, where p and slow agree.
    `master_weights` go outside: within, they do not read the parameters that have gone back (ValueError).
    Source: Zhang et al., arXiv:1907.08610.
    """
    check_counts("lookahead", every=every)
    check_between("lookahead", 0, 1, slow_rate=slow_rate)
    init_optimizer = init_within("lookahead", optimizer)

    def init(params):
        hyper, inner = as_arrays(LookaheadHyper(every, slow_rate)), init_optimizer(params)
        if next(found_in(inner, MasterState), None):
            raise ValueError(
                "lookahead: master_weights is within, which does not read the parameters that lookahead moves; put "
                "lookahead inside it: master_weights(lookahead(...))"
            )
        return LookaheadState(hyper, wide_copy(params), inner)

    def update(grads, opt_state, params, *, value=None):
        require_state("lookahead", opt_state, LookaheadState)
        params, inner = optimizer.update(grads, opt_state.optimizer, params, value=value)
        hyper = opt_state.hyper
        now = inner.step % hyper.every.astype(jnp.int32) == 0
        mixed = jax.tree.map(
            lambda s, p: s + hyper.slow_rate.astype(s.dtype) * (p.astype(s.dtype) - s), opt_state.slow, params
        )
        slow = chosen(now, mixed, opt_state.slow)
        params = jax.tree.map(lambda s, p: jnp.where(now, s.astype(p.dtype), p), slow, params)
        return params, LookaheadState(hyper, slow, inner)

    return Optimizer(init, update, lambda params: about_within(optimizer, params, "lookahead"))
