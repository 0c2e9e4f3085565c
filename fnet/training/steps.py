"""The state of a run, and one update of it.

step(TrainState, batch) -> TrainState, metrics            the same function for a loop, jit, scan and vmap
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fnet.core.checks import called, described, require_key, require_optimizer, takes
from fnet.core.numerics import stream
from fnet.core.placement import Placement, put
from fnet.gradients.engines import Gradient, refuse_names
from fnet.types import Batch, Layer, Mean, Optimizer, PyTree, TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
"""``step(ts, batch) -> ts, metrics``: one update, a pure function; `make_step` makes them."""


def init_train_state(
    params: PyTree, optimizer: Optimizer, key: jax.Array, state: PyTree = (), placement: Placement | None = None
) -> TrainState:
    """The start of a run: step 0, the optimizer's first state, and the key that all its randomness comes from.

    ``state`` is what the model's ``init`` returned beside ``params``; plain functions without a state have none. A
    `fnet.placement` says which device holds which part of all this, so that none need hold all moments.
    """
    require_optimizer("init_train_state: optimizer", optimizer)
    require_key("init_train_state", key)

    def begin(params):
        return jnp.asarray(0, jnp.int32), optimizer.init(params)

    # compiled, since array by array each shape of the moments would be a program of its own
    if placement is None:
        step, opt_state = jax.jit(begin)(params)
        return TrainState(step, params, state, opt_state, key)
    step, opt_state = jax.eval_shape(begin, params)
    abstract = TrainState(step, params, state, opt_state, key)
    placement.require_use(abstract)
    where = placement.of(abstract)
    params, state = jax.device_put((params, state), (where.params, where.state))
    # XLA would make whole moments of parameters that are split: they are told where to lie
    step, opt_state = jax.jit(begin, out_shardings=(where.step, where.opt_state))(params)
    return TrainState(step, params, state, opt_state, put(key, where.key))


def make_step(gradient: Gradient, optimizer: Optimizer, monitors: Mapping[str, Callable] | None = None) -> Step:
    """One update: ``step(TrainState, batch) -> TrainState, metrics``.

    ``metrics`` are the gradient engine's, the ``learning_rate`` just applied, and what each of the ``monitors`` returns
    of the gradients, by name: ``{"gradient_norm": fnet.metrics.gradient_norms}``. All are trees of `Mean`s. A monitor
    of ``(params, state, batch, key)`` is given what the gradients are taken at, such as `fnet.gradient_noise`.
    """
    if not callable(gradient) or isinstance(gradient, Layer):
        raise TypeError(
            f"make_step: gradient is {described(gradient)}; expected a gradient engine, such as "
            "fnet.backprop(model, loss) makes one"
        )
    require_optimizer("make_step: optimizer", optimizer)
    if not isinstance(monitors or {}, Mapping) or not all(callable(monitor) for monitor in (monitors or {}).values()):
        raise TypeError(
            f"make_step: monitors = {monitors!r:.80}; expected a dict of names and functions of the gradients: "
            "{'gradient_norm': fnet.metrics.gradient_norms}"
        )
    refuse_names(monitors or {}, ["loss", "learning_rate"])
    of_gradients = {name for name, monitor in (monitors or {}).items() if takes(monitor, None)}
    for name, monitor in (monitors or {}).items():
        if name not in of_gradients and not takes(monitor, *(None,) * 4):
            raise TypeError(
                f"make_step: monitors[{name!r}] is {called(monitor)}; expected a function of the gradients, or of "
                "(params, state, batch, key)"
            )

    def step(ts: TrainState, batch) -> tuple[TrainState, dict[str, Any]]:
        require_train_state("step", ts)
        key = jax.random.fold_in(stream(ts.key, "noise"), ts.step)
        loss_scale = getattr(ts.opt_state, "loss_scale", None)  # that of fnet.optimizers.dynamic_loss_scale
        scale = {} if loss_scale is None else {"scale": loss_scale}
        grads, state, metrics = gradient(ts.params, ts.state, batch, key, **scale)
        with jax.named_scope("optimizer"):
            params, opt_state = optimizer.update(grads, ts.opt_state, ts.params, value=metrics["loss"].value)
        at = ts.params, ts.state, batch, key
        watched = {
            name: monitor(*([grads] if name in of_gradients else at)) for name, monitor in (monitors or {}).items()
        }
        refuse_names([*watched, "learning_rate"], metrics)
        watched["learning_rate"] = opt_state.rate
        metrics = {**metrics, **jax.tree.map(lambda value: Mean(value, jnp.ones_like(value)), watched)}
        return ts._replace(step=ts.step + 1, params=params, state=state, opt_state=opt_state), metrics

    step.__dict__["optimizer"] = optimizer  # by which a run that is resumed with another begins its state
    return step


def require_train_state(who: str, ts) -> None:
    """Raise TypeError unless this is a `TrainState`."""
    if not isinstance(ts, TrainState):
        raise TypeError(f"{who}: ts is {described(ts)}; expected a TrainState, as fnet.init_train_state makes one")


def augmented(step: Step, augment: Callable[[jax.Array, Batch], Batch]) -> Step:
    """The step on ``augment(key, batch)``, a pure function that runs on the device within it.

    The key is the run's, folded with the step, in a stream of its own: a resumed run augments as the straight one.

    >>> noisy = lambda key, batch: batch._replace(inputs=batch.inputs + jax.random.normal(key, batch.inputs.shape))
    >>> step = augmented(lambda ts, batch: (ts, batch.inputs.shape), noisy)
    >>> step(TrainState(0, (), (), (), jax.random.key(0)), Batch(jnp.zeros((2, 3)), jnp.zeros(2)))[1]
    (2, 3)
    """

    def augmented_step(ts: TrainState, batch) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(stream(ts.key, "augment"), ts.step)
        with jax.named_scope("augment"):
            batch = augment(key, Batch(*batch))
        return step(ts, batch)

    return functools.update_wrapper(augmented_step, step, assigned=())
