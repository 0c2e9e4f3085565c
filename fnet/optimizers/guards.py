"""Around a whole update, so that numbers that are not finite, or have few bits, do not spoil it.

`skip_nonfinite` leaves an update out, `master_weights` keeps parameters wide, `dynamic_loss_scale` small gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fnet.core.checks import require_state
from fnet.core.numerics import wide
from fnet.core.trees import by_path, named_leaves
from fnet.optimizers.common import as_arrays, check_counts, check_floats, check_like
from fnet.optimizers.schedules import check_numbers
from fnet.optimizers.within import about_within, chosen, found_in, init_within, of_optimizer, wide_copy, zero
from fnet.types import Optimizer, PyTree


class GuardedState(NamedTuple):
    """State of `skip_nonfinite`: how many updates were left out, the count of the last bad one, its bad leaves by path.

    Before the first ``at`` is −1.
    """

    skipped: jax.Array
    at: jax.Array
    bad: dict[str, jax.Array]
    stopped: jax.Array
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def skip_nonfinite(optimizer: Optimizer, *, stop: bool = False) -> Optimizer:
    """Leaves out each update whose gradients, or what it makes of them, are not all finite: all stays as it was.

    A gradient of 1e30 is finite, and its square is not: a second moment would be infinite from then on, so that its
    parameter never moves again. With ``stop`` nothing is updated any more after the first such gradient. `nonfinite`
    says what was found, by name.
    """
    init_optimizer = init_within("skip_nonfinite", optimizer)

    def init(params):
        inner, none = init_optimizer(params), {path: jnp.zeros((), bool) for path in by_path(params)}
        return GuardedState(zero(), jnp.full((), -1, jnp.int32), none, jnp.zeros((), bool), inner)

    def update(grads, opt_state, params, *, value=None):
        require_state("skip_nonfinite", opt_state, GuardedState)
        check_like(params, "gradient", grads)
        seen, old = opt_state.step + opt_state.skipped, (params, opt_state.optimizer)
        new = optimizer.update(grads, opt_state.optimizer, params, value=value)
        found = bad_leaves(grads, params, old, new)
        any_bad = jnp.stack([jnp.zeros((), bool), *found.values()]).any()
        skip = any_bad | opt_state.stopped
        params, inner = chosen(skip, old, new)
        now = seen, {path: found[path] for path in opt_state.bad}
        at, bad = chosen(any_bad & ~opt_state.stopped, now, (opt_state.at, opt_state.bad))
        stopped = opt_state.stopped | (any_bad & stop)
        return params, GuardedState(opt_state.skipped + skip.astype(jnp.int32), at, bad, stopped, inner)

    return Optimizer(init, update, lambda params: about_within(optimizer, params, "skip_nonfinite"))


def nonfinite(opt_state, params: PyTree) -> str | None:
    """What `skip_nonfinite` found, on the host: the first bad leaf of the last bad gradients, or None.

    Within `groups`, a line for each group that found one.
    """
    found = [state._replace(optimizer=None) for state in found_in(opt_state, GuardedState)]
    if not found:
        raise ValueError(f"nonfinite: {type(opt_state).__name__} holds no state of skip_nonfinite(...)")
    lines = []
    for state in jax.device_get(found):
        path = next((path for path, _ in named_leaves(params) if state.bad.get(path)), None)
        if path is not None:
            end = "; stopped there" if state.stopped else ""
            what = f"the gradient at count {state.at}, or its update, was not finite"
            lines.append(f"{path or '()'}: {what}; {state.skipped} updates left out{end}")
    return "\n".join(lines) or None


class MasterState(NamedTuple):
    """State of `master_weights`: the parameters in their wide dtype, and the optimizer's state on them."""

    master: PyTree
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def master_weights(optimizer: Optimizer) -> Optimizer:
    """Updates a copy of the parameters in float32 at least and hands out that copy rounded to their dtypes.

    So a parameter in 16 bits keeps updates smaller than its rounding. The parameters given to ``update`` are not read:
    who changes them otherwise makes a new state. Source: Micikevicius et al., arXiv:1710.03740.
    """
    init_optimizer = init_within("master_weights", optimizer)

    def init(params):
        check_floats("master_weights", params)
        master = wide_copy(params)
        return MasterState(master, init_optimizer(master))

    def update(grads, opt_state, params, *, value=None):
        require_state("master_weights", opt_state, MasterState)
        check_like(params, "gradient", grads)
        grads = jax.tree.map(lambda g, m: jnp.asarray(g, m.dtype), grads, opt_state.master)
        master, inner = optimizer.update(grads, opt_state.optimizer, opt_state.master, value=value)
        return jax.tree.map(lambda m, p: m.astype(jnp.result_type(p)), master, params), MasterState(master, inner)

    return Optimizer(init, update, lambda params: about_within(optimizer, params, "master_weights"))


class LossScaleHyper(NamedTuple):
    """Numbers of `dynamic_loss_scale`."""

    growth: Any
    backoff: Any
    interval: Any


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`: the scale of the next gradients, and the finite ones since it changed."""

    hyper: LossScaleHyper
    loss_scale: jax.Array
    good: jax.Array
    skipped: jax.Array
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def dynamic_loss_scale(
    optimizer: Optimizer,
    initial: ArrayLike = 2.0**15,
    *,
    growth: ArrayLike = 2.0,
    backoff: ArrayLike = 0.5,
    interval: ArrayLike = 2000,
) -> Optimizer:
    """Gradients in float16 kept above its smallest number: the loss is multiplied by a scale, its gradients divided.

    `fnet.make_step` hands ``opt_state.loss_scale`` to the gradient engine. Gradients that overflow are left out and the
    scale multiplied by ``backoff``, down to 1 at least; after ``interval`` finite ones it is multiplied by ``growth``.
    It stands outermost: ``dynamic_loss_scale(chain(clip_by_global_norm(1.0), adam()))``, with `master_weights` within;
    ``init`` of all other wrappers, `chain` and `groups` raises ValueError where it is inside them.
    torch's ``GradScaler`` has the same numbers, from 2¹⁶. Source: Micikevicius et al., arXiv:1710.03740.
    """
    check_numbers("dynamic_loss_scale", positive=True, initial=initial, growth=growth)
    check_numbers("dynamic_loss_scale", positive=True, below=1, backoff=backoff)
    check_counts("dynamic_loss_scale", interval=interval)
    init_optimizer = init_within("dynamic_loss_scale", optimizer)

    def init(params):
        hyper = as_arrays(LossScaleHyper(growth, backoff, interval))
        return LossScaleState(hyper, jnp.array(initial, float), zero(), zero(), init_optimizer(params))

    def update(grads, opt_state, params, *, value=None):
        require_state("dynamic_loss_scale", opt_state, LossScaleState)
        check_like(params, "gradient", grads)
        hyper, scale = opt_state.hyper, opt_state.loss_scale
        grads = jax.tree.map(jnp.asarray, grads)
        grads = jax.tree.map(lambda g: g.astype(wide(g.dtype)) / scale.astype(wide(g.dtype)), grads)
        finite = finite_leaves(grads).all()
        new = optimizer.update(grads, opt_state.optimizer, params, value=value)
        params, inner = chosen(finite, new, (params, opt_state.optimizer))
        good = jnp.where(finite, opt_state.good + 1, 0)
        grow = good >= hyper.interval.astype(jnp.int32)
        largest = jnp.asarray(2.0**100, scale.dtype)
        scale = jnp.where(finite, scale, jnp.maximum(scale * hyper.backoff, 1))
        scale = jnp.where(grow, jnp.minimum(scale * hyper.growth, largest), scale)
        skipped = opt_state.skipped + (~finite).astype(jnp.int32)
        return params, LossScaleState(hyper, scale, jnp.where(grow, 0, good), skipped, inner)

    return Optimizer(init, update, lambda params: about_within(optimizer, params, "dynamic_loss_scale"))


def finite_leaves(grads: PyTree) -> jax.Array:
    """For each leaf whether all its entries are finite; one True if there are none."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)] or [jnp.asarray(True)])


def bad_leaves(grads: PyTree, params: PyTree, old: PyTree, new: PyTree) -> dict[str, jax.Array]:
    """By the parameters' paths whether a gradient, or what was made of it, is not finite; "" for what belongs to none.

    ``old`` and ``new`` are parameters and state before and after: what was not finite before does not count.
    """
    found = {
        path: ~jnp.isfinite(leaf).all() for path, leaf in zip(by_path(params), jax.tree.leaves(grads), strict=True)
    }
    for (path, before), after in zip(named_leaves(old), jax.tree.leaves(new), strict=True):
        if jnp.issubdtype(jnp.result_type(after), jnp.floating):
            spoilt = (jnp.isfinite(before) & ~jnp.isfinite(after)).any()
            owner = max((own for own in found if path == own or path.endswith(f"/{own}")), key=len, default="")
            found[owner] = found.get(owner, jnp.zeros((), bool)) | spoilt
    return found
