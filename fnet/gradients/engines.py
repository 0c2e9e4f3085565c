"""The seam: gradient engines that are swapped by one argument.

    autodiff(model, loss)      jax.grad of the model's forward and the loss
    backprop(model, loss)      the loss' gradient by hand, then the model's backward by hand
    from_loss(loss_fn)         jax.grad of any plain function of parameters and a batch

All return ``gradient(params, state, batch, key, *, scale=None) -> grads, state, metrics``. The objective is
``Σ w ℓ / Σ w`` over the batch (``Σ w ℓ / Σ w c`` of a loss that says what an example counts, ``Loss.count``);
``metrics`` maps names to `Mean`s of the same pass, among them ``loss``. With a ``scale`` the gradients are those of
``scale`` times the objective, for `fnet.optimizers.dynamic_loss_scale`. `accumulate` turns one into another that goes
through the batch in parts.

Legend: B batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import called, described, require_counts, require_key, require_layer, takes
from fnet.core.interpret import is_float
from fnet.core.numerics import weighted_mean, wide
from fnet.core.trees import join, split_floating
from fnet.data.arrays import DataError, as_arrays, as_batch, trace_batch, with_zeros
from fnet.layers.children import backward_of, forward_of, shapes_known
from fnet.types import Batch, Layer, Loss, Mean, PyTree

Gradient = Callable[..., tuple[PyTree, PyTree, dict[str, Mean]]]
"""``gradient(params, state, batch, key) -> grads, state, metrics``, of `autodiff`, `backprop` or `from_loss`."""


def autodiff(model: Layer, loss, metrics: Mapping[str, Callable] | None = None, *, inputs: bool = False) -> Gradient:
    """Gradients of ``Σ w ℓ / Σ w`` by `jax.value_and_grad` of the model's forward.

    ``metrics`` maps names, but for "loss", to functions of ``(outputs, targets)`` that give one value per example. With
    ``inputs=True`` the gradient returned is the pair ``(dparams, dinputs)``, with None at inputs that are not floating.

    ``loss(outputs, targets)`` gives one value per example, ``(B,)``, or several, ``(B, ...)``, and not their mean.
    TypeError for what is no model, no loss, or a loss that calls its first argument ``y_true`` or ``targets``;
    ValueError, when the gradient is traced, for another shape of its values.
    """
    check_engine("autodiff", model, loss, metrics)

    def gradient(params, state, batch, key, *, scale=None):
        batch = checked("autodiff", batch, key)
        floating, others = split_floating(batch.inputs)

        def objective(params, floating):
            x = join(floating, others)
            outputs, new_state, _ = forward_of(model, params, state, x, key=key, train=True)
            with jax.named_scope("loss"):
                measured = measure(loss, metrics, outputs, batch)
                return scaled(measured["loss"].value, scale), (new_state, measured)

        wanted = (0, 1) if inputs else 0
        grads, (new_state, measured) = jax.grad(objective, argnums=wanted, has_aux=True)(params, floating)
        return grads, new_state, measured

    return gradient if inputs else of_layers(gradient, MadeOf(model, loss, metrics, by_hand=False))


def backprop(
    model: Layer, loss: Loss, metrics: Mapping[str, Callable] | None = None, *, inputs: bool = False
) -> Gradient:
    """The same gradients by the hand-derived backwards of the loss and of each layer; no autodiff takes part."""
    check_engine("backprop", model, loss, metrics, by_hand=True)

    def gradient(params, state, batch, key, *, scale=None):
        batch = checked("backprop", batch, key)
        with shapes_known():
            outputs, new_state, residuals = forward_of(model, params, state, batch.inputs, key=key, train=True)
            with jax.named_scope("loss"):
                measured = measure(loss, metrics, outputs, batch)
            with jax.named_scope("backward"):
                with jax.named_scope("loss"):
                    dy = loss_gradient(loss, outputs, batch, measured["loss"].count, scale)
                dparams, dx = backward_of(model, params, residuals, dy)
        return ((dparams, dx) if inputs else dparams), new_state, measured

    return gradient if inputs else of_layers(gradient, MadeOf(model, loss, metrics, by_hand=True))


class MadeOf(NamedTuple):
    """What an engine is made of, kept beside it as ``gradient.made_of``, for instruments that look within."""

    model: Layer
    loss: Any
    metrics: Mapping[str, Callable] | None
    by_hand: bool


def of_layers(gradient: Gradient, made_of: MadeOf) -> Gradient:
    """The engine, which says what it is made of."""
    gradient.__dict__["made_of"] = made_of
    return gradient


def from_loss(loss_fn: Callable, *, has_state: bool = False) -> Gradient:
    """Gradients of a plain function by `jax.value_and_grad`: the layers are offered, never required.

    ``loss_fn(params, batch, key) -> scalar``, the mean over the batch's examples; or with ``has_state=True``
    ``loss_fn(params, state, batch, key) -> scalar, state, metrics`` (``metrics`` maps names to scalars or `Mean`s; a
    "loss" among them takes the scalar's place).
    ``batch`` is whatever pytree of arrays the data are, with the examples along the first axis. Where it is a `Batch`
    with weights, the mean is the one by these weights, ``Σ w ℓ / Σ w``, and counts ``Σ w`` where batches are added up;
    any other counts its examples.
    """
    if not callable(loss_fn) or isinstance(loss_fn, Layer | Loss):
        raise TypeError(
            f"from_loss: loss_fn is {described(loss_fn)}; expected a function of (params, batch, key) that gives one "
            "number; a model and a loss go to fnet.autodiff(model, loss)"
        )

    def objective(params, state, batch, key, scale):
        if has_state:
            made = loss_fn(params, state, batch, key)
            if not isinstance(made, tuple) or len(made) != 3:
                raise ValueError(f"from_loss: loss_fn returned {described(made)}; expected (scalar, state, metrics)")
            value, new_state, metrics = made
        else:
            value, new_state, metrics = loss_fn(params, batch, key), state, {}
        value = jnp.asarray(value) if isinstance(value, float) else value
        if not is_float(value) or jnp.shape(value) != ():
            more = "; with has_state=True, (scalar, state, metrics)" if isinstance(value, tuple) else ""
            raise ValueError(
                f"from_loss: the loss is {described(value)}; expected a scalar, one float, the batch's mean{more}"
            )
        return scaled(value, scale), (value, new_state, metrics)

    def gradient(params, state, batch, key, *, scale=None):
        grads, (value, new_state, metrics) = jax.grad(objective, has_aux=True)(params, state, batch, key, scale)
        weighted = isinstance(batch, Batch) and batch.weights is not None
        count = batch.weights if weighted else jax.tree.leaves(batch)[0].shape[0]

        def mean(m):
            m = m.astype(wide(m.dtype))  # a count in 16 bits would stall where batches are added up
            total = jnp.asarray(count, m.dtype).sum()
            return Mean(m * total, total)

        measured = {name: m if isinstance(m, Mean) else mean(m) for name, m in {"loss": value, **metrics}.items()}
        return grads, new_state, measured

    return gradient


def accumulate(gradient: Gradient, parts: int) -> Gradient:
    """The same gradient over the batch in ``parts`` microbatches, one after another in a scan: less memory.

    ``Σ Wᵢ gᵢ / Σ Wᵢ``, where ``Wᵢ`` is the sum of a part's weights, is the gradient of the whole batch, however the
    weights are spread. Parts have ``⌈B / parts⌉`` examples, the last ones one fewer where ``parts`` does not divide B;
    part i has the key ``fold_in(key, i)``. Sums are in float32 at least. A layer that looks at its whole batch, such as
    `fnet.layers.batch_norm`, sees parts, and its running statistics are updated by each. Raises ValueError for parts
    out of 1 .. B, and for an engine that also returns the gradient by the inputs.
    """
    require_counts("accumulate", parts=parts)

    def accumulated(params, state, batch, key, *, scale=None):
        batch = as_arrays(batch, "accumulate: batch")
        n = jax.tree.leaves(batch)[0].shape[0]
        if parts > n:
            raise ValueError(f"accumulate: parts = {parts}; expected at most {n}, the examples of the batch")
        size, longer = divmod(n, parts)  # so many parts have one example more

        def one(state, index, batch):
            own = None if key is None else jax.random.fold_in(key, index)
            grads, state, metrics = gradient(params, state, batch, own, scale=scale)
            if jax.tree.structure(grads) != jax.tree.structure(params):
                raise ValueError("accumulate: the engine's gradients are not a tree like the parameters'")
            weight = metrics["loss"].count
            weighted = jax.tree.map(lambda g: g.astype(wide(g.dtype)) * weight.astype(wide(g.dtype)), grads)
            return state, (weighted, metrics)

        def step(carry, given):
            state, new = one(carry[0], *given)
            return (state, jax.tree.map(jnp.add, carry[1], new)), None

        def cut(begin, count, size):
            return jax.tree.map(lambda a: a[begin : begin + count * size].reshape(count, size, *a.shape[1:]), batch)

        shapes = trace_batch(lambda state, batch: one(state, 0, batch)[1], (state,), batch, size)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        carry = state, zeros
        if longer:
            carry, _ = jax.lax.scan(step, carry, (jnp.arange(longer), cut(0, longer, size + 1)))
        rest = jnp.arange(longer, parts), cut(longer * (size + 1), parts - longer, size)
        (state, total), _ = jax.lax.scan(step, carry, rest)
        grads, metrics = total
        share = Mean(jnp.ones_like(metrics["loss"].count), metrics["loss"].count).value
        return jax.tree.map(lambda g, p: (g * share.astype(g.dtype)).astype(p.dtype), grads, params), state, metrics

    return accumulated


def checked(who: str, batch, key) -> Batch:
    """The batch as a `Batch` of arrays; DataError where it is none, TypeError for what is no key."""
    if key is not None:  # a model without noise needs none
        require_key(who, key)
    batch = as_batch(batch, f"{who}: batch")
    if batch.weights is not None and not hasattr(batch.weights, "ndim"):
        raise DataError(f"{who}: batch.weights = {batch.weights!r:.80}; expected an array, one weight for each example")
    return batch


def check_engine(who: str, model, loss, metrics, by_hand: bool = False) -> None:
    """Require a layer, a loss (with a gradient ``by_hand``) and metrics by name; TypeError for what is none."""
    require_layer(f"{who}: model", model)
    check_loss(who, loss, by_hand)
    check_metrics(who, metrics)


def check_loss(who: str, loss, by_hand: bool = False) -> None:
    """Require a loss: a function of outputs and targets, and by hand a `Loss`, which has its gradient."""
    if isinstance(loss, Loss):
        return
    makes_one = getattr(loss, "__annotations__", {}).get("return") in (Loss, "Loss")
    if makes_one:
        raise TypeError(f"{who}: loss is the function {loss.__name__}, which makes one; call it: {loss.__name__}(...)")
    if not callable(loss) or isinstance(loss, Layer):
        raise TypeError(
            f"{who}: loss = {loss!r:.80}; expected a function of (outputs, targets) that gives one value per example, "
            "such as fnet.softmax_cross_entropy"
        )
    if not takes(loss, None, None):
        raise TypeError(
            f"{who}: loss is {called(loss)}, which takes {inspect.signature(loss)}; expected a function of (outputs, "
            "targets)"
        )
    if first_argument(loss) in ("y_true", "target", "targets", "label", "labels"):  # as Keras has it
        raise TypeError(
            f"{who}: loss is {called(loss)}, which takes {inspect.signature(loss)}; expected a function of (outputs, "
            "targets), in this order: the outputs come first"
        )
    if by_hand:
        raise TypeError(
            f"{who}: loss is {called(loss)}, which has no gradient by hand; expected fnet.Loss(value, gradient), with "
            "gradient(outputs, targets) the derivative of each example's value by its outputs; autodiff needs none"
        )


def first_argument(function: Callable) -> str | None:
    """The name of a function's first argument, as far as Python knows it."""
    try:
        return next(iter(inspect.signature(function).parameters), None)
    except ValueError:  # of a function of C none is known
        return None


def check_metrics(who: str, metrics) -> None:
    """Require None or a mapping of names, but for "loss", to functions of outputs and targets."""
    if metrics is None:
        return
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"{who}: metrics = {metrics!r:.80}; expected a dict of names and functions of (outputs, targets): "
            "{'accuracy': fnet.metrics.accuracy}"
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or not callable(metric):
            raise TypeError(
                f"{who}: metrics[{name!r}] = {metric!r:.80}; expected a name and a function of (outputs, targets), "
                "such as fnet.metrics.accuracy"
            )
        if not takes(metric, None, None):
            raise TypeError(
                f"{who}: metrics[{name!r}] is {called(metric)}, which takes {inspect.signature(metric)}; expected a "
                "function of (outputs, targets); one that makes such a function is called first, as top_k(5)"
            )
    refuse_names(metrics, ["loss"])


def scaled(value: jax.Array, scale) -> jax.Array:
    """``scale · value``."""
    return value if scale is None else value * jnp.asarray(scale, value.dtype)


def measure(loss, metrics: Mapping[str, Callable] | None, outputs: PyTree, batch: Batch) -> dict[str, Mean]:
    """``loss`` and ``metrics`` of a batch as `Mean`s over its examples."""
    batch, counts = counted(loss, batch)
    outputs, targets = that_count(outputs, batch)
    values = values_of(loss, outputs, targets, jax.tree.leaves(batch.inputs)[0].shape[0])
    measured = {"loss": weighted_mean(values, batch.weights, values.ndim)}
    if counts is not None:
        total = weighted_mean(jnp.asarray(counts, values.dtype), batch.weights, values.ndim).sum
        measured["loss"] = measured["loss"]._replace(count=total)
    for name, metric in (metrics or {}).items():
        each = metric(outputs, targets)
        if jnp.shape(each)[: values.ndim] != values.shape:
            raise ValueError(
                f"the metric {name!r} returned {described(each)}; expected a value for each of {list(values.shape)}, "
                "as the loss has: what is measured of a whole batch is no mean over examples"
            )
        measured[name] = weighted_mean(jnp.asarray(each), batch.weights, values.ndim)
    return measured


def values_of(loss, outputs: PyTree, targets: PyTree, examples: int) -> jax.Array:
    """``loss(outputs, targets)``; ValueError unless that is one value per example, or several.

    So too where the arguments fit the other way round alone. Any other error of a loss that is not fnet's has a note of
    what it was given.
    """
    function = loss.value if isinstance(loss, Loss) else loss

    def given() -> str:
        return f"outputs {described(outputs)} and targets {described(targets)}"

    def fits(values) -> bool:
        return hasattr(values, "dtype") and jnp.shape(values)[:1] == (examples,)

    def fits_swapped() -> bool:
        try:
            return fits(jax.eval_shape(function, targets, outputs))
        except Exception:
            return False

    try:
        values = loss(outputs, targets)
    except (TypeError, ValueError) as error:
        if (getattr(function, "__module__", None) or "").startswith("fnet."):
            raise
        if fits_swapped():
            raise ValueError(
                f"loss is {called(function)}, which fails with {given()}, and does not with targets first; expected a "
                "function of (outputs, targets): take its arguments in this order"
            ) from None
        error.add_note(f"in the loss, {called(function)}, of {given()}")
        raise
    if not fits(values):
        raise ValueError(
            f"loss is {called(function)}, which returned {described(values)} of {given()}; expected one value for each "
            f"of the {examples} examples, shape ({examples},) or ({examples}, ...): the mean over them is taken "
            "outside, by the batch's weights"
        )
    return values


def counted(loss, batch: Batch) -> tuple[Batch, PyTree]:
    """The batch with weight 0 where the loss counts nothing, and what it counts; None where it does not say.

    What is known stays known, so that labels can be checked.
    """
    if not isinstance(loss, Loss) or loss.count is None:
        return batch, None
    counts = loss.count(batch.targets)
    live = counts != 0
    if batch.weights is None:
        return batch._replace(weights=live.astype(np.float32)), counts
    if batch.weights.shape != live.shape[: batch.weights.ndim]:
        return batch, counts  # which `weighted_mean` refuses
    xp: Any = jnp if isinstance(live, Tracer) or isinstance(batch.weights, Tracer) else np
    weights = batch.weights.reshape(batch.weights.shape + (1,) * (live.ndim - batch.weights.ndim))
    return batch._replace(weights=xp.where(live, weights, xp.zeros((), weights.dtype))), counts


def that_count(outputs: PyTree, batch: Batch) -> tuple[PyTree, PyTree]:
    """The outputs and the targets, with 0 for both at examples of weight 0, whatever stands there.

    Selected before the loss and not after it: its derivative at a target that is NaN is NaN, and 0 · NaN too.
    """
    if batch.weights is None:
        return outputs, batch.targets
    left_out = batch.weights == 0
    return with_zeros(outputs, left_out), with_zeros(batch.targets, left_out)


def refuse_names(given: Iterable[str], taken: Iterable[str]) -> None:
    """Raise ValueError where a metric would take another's place."""
    for name in {*given} & {*taken}:
        raise ValueError(f"a metric is called {name!r}, as one that is measured already; expected another name")


def loss_gradient(loss: Loss, outputs: PyTree, batch: Batch, count: jax.Array, factor=None) -> PyTree:
    """The gradient by hand of ``factor · Σ w ℓ / Σ w c`` by the outputs; ``count`` is ``Σ w c``."""
    batch, _ = counted(loss, batch)
    # each example's dy is its ℓ'(y) times w / Σ w c
    share = scaled(Mean(jnp.ones_like(count), count).value, factor)
    if batch.weights is not None:
        share = share * batch.weights.astype(share.dtype)
    given = that_count(outputs, batch)
    if loss.backward is None:
        return jax.tree.map(lambda d: scale(d, share), loss.gradient(*given))
    return loss.backward(*given, jnp.broadcast_to(share, jax.eval_shape(loss.value, *given).shape))


def scale(d: jax.Array, share: jax.Array) -> jax.Array:
    """``d`` times its example's share, where the share is not zero."""
    share = jnp.expand_dims(share.astype(d.dtype), tuple(range(share.ndim, d.ndim)))
    return jnp.where(share == 0, 0, d * share)
