"""A learning rate that falls where a loss, or a result of the evaluations, stops falling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fnet.core.checks import require_state
from fnet.core.numerics import infinite
from fnet.optimizers.common import as_arrays, check_counts
from fnet.optimizers.schedules import check_numbers
from fnet.optimizers.within import about_within, init_within, of_optimizer, zero
from fnet.types import Mean, Optimizer, PyTree


class PlateauHyper(NamedTuple):
    """Numbers of `reduce_on_plateau`; ``window`` is None where it waits for evaluations.

    ``metric`` holds the result that it waits for by its name, and 1 where the least is sought, -1 where the greatest;
    it is None where it watches the loss.
    """

    factor: Any
    patience: Any
    window: Any
    least_change: Any
    least_rate: Any
    cooldown: Any
    metric: Any


class PlateauState(NamedTuple):
    """State of `reduce_on_plateau`: the window's sum so far, the best value, windows without a better one.

    ``waited`` is below 0 while it cools down.
    """

    hyper: PlateauHyper
    total: jax.Array
    best: jax.Array
    waited: jax.Array
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def reduce_on_plateau(
    optimizer: Optimizer,
    factor: ArrayLike = 0.1,
    *,
    window: ArrayLike | None = None,
    metric: str | None = None,
    greatest: bool = False,
    patience: ArrayLike = 10,
    least_change: ArrayLike = 1e-4,
    least_rate: ArrayLike = 0.0,
    cooldown: ArrayLike = 0,
) -> Optimizer:
    """Multiplies the learning rate by ``factor`` where the loss, or a result of the evaluations, stops falling.

    With ``window`` it watches the losses handed to ``update``, averaged over as many updates (an epoch, say). With
    ``metric``, such as "validation_loss", the result of that name in each evaluation of `fnet.fit` and `fnet.train`
    (with ``greatest`` its negative), as Keras does; in a loop of one's own `told` hands it over. After ``patience``
    values in a row that are not below ``best − least_change · |best|`` the rate is reduced, not below ``least_rate``;
    the next ``cooldown`` values are not counted, and the waiting begins anew. A value that is not finite is never
    better. ``optimizer`` is one with a number for its learning rate, which is data in its state.

    Keras' ``ReduceLROnPlateau`` compares with ``best − min_delta`` and counts the last value of the cooldown; else its
    values are the same. torch's waits one more.
    Raises ValueError unless one of ``window`` and ``metric`` is given; ``update`` raises it without a ``value`` where
    it watches the loss, which `fnet.make_step` always gives.
    """
    if (window is None) == (metric is None):
        raise ValueError(
            f"reduce_on_plateau: window = {window!r} and metric = {metric!r}; expected one of them: so many losses of "
            "training on average, or a result such as 'validation_loss'"
        )
    check_numbers("reduce_on_plateau", positive=True, below=1, factor=factor)
    check_counts("reduce_on_plateau", patience=patience, window=1 if window is None else window)
    check_counts("reduce_on_plateau", least=0, cooldown=cooldown)
    check_numbers("reduce_on_plateau", least_change=least_change, least_rate=least_rate)
    init_optimizer = init_within("reduce_on_plateau", optimizer)

    def init(params):
        waits_for = None if metric is None else {metric: -1.0 if greatest else 1.0}
        hyper = as_arrays(PlateauHyper(factor, patience, window, least_change, least_rate, cooldown, waits_for))
        inner = init_optimizer(params)
        rate = getattr(getattr(inner, "hyper", None), "learning_rate", None)
        if not hasattr(rate, "shape"):
            raise TypeError(
                "reduce_on_plateau: expected an optimizer with a number for its learning_rate, no schedule and no "
                "composed one: put reduce_on_plateau inside chain or groups"
            )
        return PlateauState(hyper, jnp.zeros((), float), infinite("reduce_on_plateau"), zero(), inner)

    def update(grads, opt_state, params, *, value=None):
        require_state("reduce_on_plateau", opt_state, PlateauState)
        if value is None and metric is None:
            raise ValueError("reduce_on_plateau: value is None; expected the loss: update(..., value=loss)")
        params, inner = optimizer.update(grads, opt_state.optimizer, params, value=value)
        opt_state = opt_state._replace(optimizer=inner)
        if metric is not None:
            return params, opt_state
        window = opt_state.hyper.window
        total = opt_state.total + jnp.asarray(value, opt_state.total.dtype)
        ended = inner.step % window.astype(jnp.int32) == 0
        return params, _after(opt_state, total / window, ended)._replace(total=jnp.where(ended, 0, total))

    return Optimizer(init, update, lambda params: about_within(optimizer, params, "reduce_on_plateau"))


def _after(opt_state: PlateauState, value: jax.Array, counts: ArrayLike = True) -> PlateauState:
    """The state after one of the values that are compared; the same state where it does not count."""
    hyper, inner, best, waited = opt_state.hyper, opt_state.optimizer, opt_state.best, opt_state.waited
    least = best - hyper.least_change * jnp.abs(jnp.where(jnp.isinf(best), 0, best))
    better = counts & jnp.isfinite(value) & (value < least)
    waited = jnp.where(counts, jnp.where((waited >= 0) & better, 0, waited + 1), waited)
    reduce = counts & (waited >= hyper.patience.astype(jnp.int32))
    rate = inner.hyper.learning_rate
    lower = jnp.minimum(rate, jnp.maximum(rate * hyper.factor, hyper.least_rate))
    inner = inner._replace(hyper=inner.hyper._replace(learning_rate=jnp.where(reduce, lower, rate)))
    return opt_state._replace(
        best=jnp.where(better, value, best),
        waited=jnp.where(reduce, -hyper.cooldown.astype(jnp.int32), waited),
        optimizer=inner,
    )


def told(opt_state: PyTree, results: Mapping[str, Any]) -> PyTree:
    """The state of any optimizer after an evaluation: `reduce_on_plateau` within it has seen the result it waits for.

    ``results`` are `Mean`s or numbers by name. Raises ValueError where there is none of that name, or it is no number.

    >>> from fnet.optimizers import sgd
    >>> opt_state = reduce_on_plateau(sgd(1.0), metric="validation_loss", patience=1).init(jnp.zeros(2))
    >>> for loss in (0.5, 0.6, 0.7):
    ...     opt_state = told(opt_state, {"validation_loss": loss})
    >>> print(round(float(opt_state.optimizer.hyper.learning_rate), 6))
    0.01
    """

    def seen(node):
        for name, sign in (node.hyper.metric or {}).items() if isinstance(node, PlateauState) else ():
            if name not in results:
                there = ", ".join(results) or "there is none without evaluate and validation"
                raise ValueError(f"reduce_on_plateau: metric = {name!r}; expected the name of a result: {there}")
            value = results[name].value if isinstance(results[name], Mean) else results[name]
            if jnp.shape(value) != ():
                raise ValueError(f"reduce_on_plateau: {name} has shape {jnp.shape(value)}; expected one number")
            node = _after(node, sign * jnp.asarray(value, sign.dtype))
        return node

    return jax.tree.map(seen, opt_state, is_leaf=lambda node: isinstance(node, PlateauState))
