"""The contracts: every part of fnet is one of these tuples of pure functions or of arrays.

    key ── model.init ──────────▶ params, state
    batch ─ model.forward ──────▶ outputs, state, residuals ── loss ──▶ scalar
    autodiff or backprop ───────▶ grads
    grads ─ optimizer.update ───▶ params, opt_state
    TrainState ─ step ──────────▶ TrainState, metrics

Legend: B batch (examples), N examples of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any  # dicts, tuples and NamedTuples of arrays, nested


class Init(Protocol):
    """``params, state`` of a layer for inputs like ``x``, a `jax.ShapeDtypeStruct` or an array with a batch axis."""

    def __call__(self, key: jax.Array, x: PyTree, /) -> tuple[PyTree, PyTree]: ...


class Forward(Protocol):
    """``y, state, residuals``: the outputs, the state after them, and what the backward needs."""

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, /, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[PyTree, PyTree, PyTree]: ...


class Backward(Protocol):
    """``dparams, dx``: the gradients of any scalar whose gradient by ``y`` is ``dy``."""

    def __call__(self, params: PyTree, residuals: PyTree, dy: PyTree, /) -> tuple[PyTree, PyTree]: ...


class Outer(Protocol):
    """By a parameter's name ``x (B, N, I), d (B, N, O)``: the gradient of example b is ``Σ_n x_bn d_bnᵀ``, reshaped.

    ``x`` may be integers ``(B, N)``, which stand for rows that are 1 there and 0 elsewhere; −1 for rows of zeros.
    """

    def __call__(self, params: PyTree, residuals: PyTree, dy: PyTree, /) -> dict[str, tuple[jax.Array, jax.Array]]: ...


class Layer(NamedTuple):
    """A pure function of its parameters and, beneath it, its backward by hand. A model is a layer.

    ``state`` holds statistics that do not depend on the batch (running means) and nothing else; it carries no gradient.
    ``residuals`` are what the backward needs of the forward, a pytree of arrays; parameters are not copied into them.
    ``children`` are told by layers that are made of others, and shown where one is printed. ``outer`` says of
    what outer products a gradient is the sum, if it is one, for norms of each example's and for K-FAC.
    """

    name: str
    init: Init
    forward: Forward
    backward: Backward
    children: tuple[tuple[str, Any], ...] = ()  # names and layers
    outer: Outer | None = None

    def __repr__(self) -> str:
        """A tree of names; `fnet.report.summary` is the table with shapes and parameters."""
        return "\n".join(_branches(self.name, self))


def _branches(title: str, layer: Layer) -> Iterator[str]:
    yield title
    for i, (name, child) in enumerate(layer.children, 1):
        counted = name.rpartition("_")[0] == child.name  # dense_0 says what it is
        first, *rest = _branches(name if counted else f"{name}: {child.name}", child)
        last = i == len(layer.children)
        yield f"{'└─' if last else '├─'} {first}"
        yield from (f"{'   ' if last else '│  '}{line}" for line in rest)


class Loss(NamedTuple):
    """A loss with its gradient by hand; called like the function it holds.

    - ``value(outputs, targets)``: one value per example.
    - ``gradient(outputs, targets)``: the derivative of each example's value by its outputs, shaped like ``outputs``.
    - ``count(targets)``: what each example counts in the mean, ``Σ w ℓ / Σ w c``, shaped like the values; those of 0
      are left out, as those of weight 0 are. None: all count 1.
    - ``backward(outputs, targets, dvalues)``: the gradient of ``Σ dvalues · value``, of a loss whose values depend on
      other examples' outputs too; its ``gradient`` is that of ``Σ value``. None: they do not.
    """

    value: Callable[[PyTree, PyTree], jax.Array]
    gradient: Callable[[PyTree, PyTree], PyTree]
    count: Callable[[PyTree], Any] | None = None
    backward: Callable[[PyTree, PyTree, jax.Array], PyTree] | None = None

    def __call__(self, outputs: PyTree, targets: PyTree) -> jax.Array:
        return self.value(outputs, targets)


class Batch(NamedTuple):
    """Examples along the first axis of every array; a whole data set is one large batch.

    ``weights`` has the shape of the loss' values (usually ``(B,)``); None means that every example counts 1.
    """

    inputs: PyTree
    targets: PyTree
    weights: Any = None


class Mean(NamedTuple):
    """An average that is not yet divided: a weighted sum and the weight it came from, both of which add up exactly."""

    sum: Any
    count: Any

    @property
    def value(self) -> Any:
        """``sum / count``, and 0 where nothing was counted; ``sum`` may have further axes. NumPy in, NumPy out."""
        count = self.count.reshape(self.count.shape + (1,) * (self.sum.ndim - self.count.ndim))
        xp: Any = np if isinstance(self.sum, np.ndarray | np.generic) else jnp
        return self.sum / xp.where(count == 0, 1, count)


class Update(Protocol):
    """``params, opt_state`` after one update; ``value`` is the loss, which some wait for."""

    def __call__(
        self, grads: PyTree, opt_state: Any, params: PyTree, /, *, value: Any = None
    ) -> tuple[PyTree, Any]: ...


class Optimizer(NamedTuple):
    """A pure state transition: ``init(params) -> opt_state``, and `Update`.

    ``opt_state`` is a NamedTuple with ``step`` (int32, updates applied so far), ``hyper`` (its numbers, as arrays),
    ``rate`` (the learning rate just applied) and the moments. ``about(params)`` says for each path what the optimizer
    does with it, in one line; only `fnet.optimizers.describe` reads it.
    """

    init: Callable[[PyTree], Any]
    update: Update
    about: Callable[[PyTree], dict[str, str]] | None = None


class Transform(NamedTuple):
    """A pure function of gradients, for `fnet.optimizers.chain`.

    - ``init(params) -> state``, a NamedTuple with ``hyper``, its numbers as arrays
    - ``update(grads, state, params) -> grads, state``

    ``touched(params)`` says of each leaf whether it is changed, all of them without; only `fnet.optimizers.describe`
    reads it.
    """

    name: str
    init: Callable[[PyTree], Any]
    update: Callable[[PyTree, Any, PyTree], tuple[PyTree, Any]]
    touched: Callable[[PyTree], list[bool]] | None = None


class Schedule(NamedTuple):
    """A learning rate as a function of the updates applied so far: ``fn(hyper, count) -> rate``, the first at count 0.

    ``hyper`` holds the schedule's own numbers; inside an optimizer they are arrays in its state, so changing one never
    recompiles.
    """

    fn: Callable[[PyTree, jax.Array], jax.Array]
    hyper: PyTree

    def __call__(self, count) -> jax.Array:
        return self.fn(self.hyper, count)


class TrainState(NamedTuple):
    """All that a run is, between two steps. ``step`` (int32) is its only position."""

    step: jax.Array
    params: PyTree
    state: PyTree
    opt_state: Any
    key: jax.Array
    stopping: Any = ()  # the state of a reducer that may end the run: fnet.early_stopping


class LayerError(ValueError):
    """Something does not fit a layer; the message begins with the layer's path in the model."""

    def __init__(self, message: str, path: tuple[str, ...] = ()):
        super().__init__(f"{'/'.join(path)}: {message}" if path else message)
        self.message, self.path = message, path
