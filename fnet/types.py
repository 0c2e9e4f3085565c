"""The contracts: every part of fnet is one of these tuples of pure functions or of arrays.

    key ── model.init ──────────▶ params, state
    batch ─ model.forward ──────▶ outputs, state, residuals ── loss ──▶ scalar
    autodiff or backprop ───────▶ grads
    grads ─ optimizer.update ───▶ params, opt_state
    TrainState ─ step ──────────▶ TrainState, metrics

Legend: B batch (examples), N examples of a data set.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

PyTree = Any  # dicts, tuples and NamedTuples of arrays, nested


class Layer(NamedTuple):
    """A pure function of its parameters and, beneath it, its backward by hand. A model is a layer.

    - ``init(key, x) -> params, state``; ``x`` is a `jax.ShapeDtypeStruct` (or an array) with a batch axis.
    - ``forward(params, state, x, *, key=None, train=False) -> y, state, residuals``
    - ``backward(params, residuals, dy) -> dparams, dx``: the gradients of any scalar whose gradient by ``y`` is ``dy``.

    ``state`` holds statistics that do not depend on the batch (running means) and nothing else; it carries no gradient.
    ``residuals`` are what the backward needs of the forward, a pytree of arrays; parameters are not copied into them.
    ``children`` are told by layers that are made of others, and shown where one is printed.
    """

    name: str
    init: Callable[..., tuple[PyTree, PyTree]]
    forward: Callable[..., tuple[PyTree, PyTree, PyTree]]
    backward: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    children: tuple[tuple[str, Any], ...] = ()  # names and layers

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


@jax.tree_util.register_pytree_with_keys_class
class Copies(dict):
    """A dict of parameters that stack ``count`` copies along their first axis: the layers that `repeat` runs.

    It is a dict in all else, and paths do not show it. Whatever looks at a whole tensor (norms, factored moments,
    centring, masks by shape) acts on each copy: so one update of stacked layers is the update of the same layers apart.
    Copies of copies have two such axes, and ``counts`` for both. A leaf whose first axes are not as long counts as one
    copy's own.

    >>> blocks = Copies({"w": jnp.zeros((6, 4, 4)), "b": jnp.zeros((6, 4))}, 6)
    >>> dict(zip(["blocks/b", "blocks/w", "head"], stacked_axes({"blocks": blocks, "head": jnp.zeros(2)}), strict=True))
    {'blocks/b': 1, 'blocks/w': 1, 'head': 0}
    >>> jax.tree.map(jnp.shape, blocks.one(0))
    {'b': (4,), 'w': (4, 4)}
    """

    def __init__(self, params, *count: int):
        super().__init__(params)
        self.counts = (*count, *(params.counts if isinstance(params, Copies) else ()))

    def copy(self):
        return Copies(dict(self), *self.counts)

    def __or__(self, other):
        return Copies({**self, **other}, *self.counts)

    def __ror__(self, other):
        return Copies({**other, **self}, *self.counts)

    def apart(self) -> dict:
        """The same arrays as a tree of one copy's kind, which knows no more of the first axis."""
        return Copies(dict(self), *self.counts[1:]) if len(self.counts) > 1 else dict(self)

    def one(self, i: int) -> dict:
        """The parameters of one copy: a plain dict, unless it is made of copies too."""
        return jax.tree.map(lambda leaf: leaf[i], self.apart())

    def tree_flatten_with_keys(self):
        children, aux = self.tree_flatten()
        return [(jax.tree_util.DictKey(name), child) for name, child in zip(aux[0], children, strict=True)], aux

    def tree_flatten(self):
        names = tuple(sorted(self))
        return [self[name] for name in names], (names, self.counts)

    @classmethod
    def tree_unflatten(cls, aux, children):
        names, counts = aux
        return cls(zip(names, children, strict=True), *counts)


def stacked_axes(tree: PyTree, counts: tuple[int, ...] = ()) -> list[int]:
    """For each leaf of a tree how many of its first axes count copies."""
    found = []
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Copies)):
        if isinstance(node, Copies):
            found += stacked_axes(dict(node), (*counts, *node.counts))
        else:
            found.append(len(counts) if np.shape(node)[: len(counts)] == counts else 0)
    return found


def without_copies(tree: PyTree) -> PyTree:
    """The tree with plain dicts in the place of `Copies`."""

    def plain(node):
        return without_copies(dict(node)) if isinstance(node, Copies) else node

    return jax.tree.map(plain, tree, is_leaf=lambda node: isinstance(node, Copies))


def on_each_copy(function: Callable, axes: int) -> Callable:
    """``function`` of one copy's arrays as a function of arrays whose first ``axes`` axes count copies."""
    return jax.vmap(on_each_copy(function, axes - 1)) if axes else function


class Loss(NamedTuple):
    """A loss with its gradient by hand; called like the function it holds.

    - ``value(outputs, targets)``: one value per example.
    - ``gradient(outputs, targets)``: the derivative of each example's value by its outputs, shaped like ``outputs``.
    """

    value: Callable[[PyTree, PyTree], jax.Array]
    gradient: Callable[[PyTree, PyTree], PyTree]

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


class Optimizer(NamedTuple):
    """A pure state transition.

    - ``init(params) -> opt_state``
    - ``update(grads, opt_state, params, *, value=None) -> params, opt_state``

    ``opt_state`` is a NamedTuple with ``step`` (int32, updates applied so far), ``hyper`` (its numbers, as arrays),
    ``rate`` (the learning rate just applied) and the moments. ``about(params)`` says for each path what the optimizer
    does with it, in one line; only `fnet.optimizers.describe` reads it.
    """

    init: Callable[[PyTree], Any]
    update: Callable[..., tuple[PyTree, Any]]
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


def stateless(name: str, init, forward, backward, *, several: bool = False) -> Layer:
    """The layer of ``init(key, x) -> params``, ``forward(params, x) -> y, residuals`` and ``backward``; no state.

    ``x`` is one array, or with ``several`` whatever the functions take. Raises TypeError for a function that does not
    take these arguments.
    """
    for what, function, expected in (
        ("init", init, "(key, x)"),
        ("forward", forward, "(params, x)"),
        ("backward", backward, "(params, residuals, dy)"),
    ):
        if not callable(function):
            raise TypeError(f"stateless: {name}'s {what} is {described(function)}; expected a function of {expected}")
        if not takes(function, *expected.split(",")):
            raise TypeError(f"stateless: {name}'s {what} takes {inspect.signature(function)}; expected {expected}")

    def full_init(key, x):
        if not several:
            require_array(x)
        return init(key, x), ()

    def full_forward(params, state, x, *, key=None, train=False):
        if not several:
            require_array(x)
        made = forward(params, x)
        if not isinstance(made, tuple) or len(made) != 2:
            raise LayerError(
                f"forward returned {described(made)}; expected (y, residuals), with () for residuals that there are not"
            )
        return made[0], state, made[1]

    return Layer(name, full_init, full_forward, backward)


def weighted_mean(values: jax.Array, weights: jax.Array | None = None, axes: int = 1) -> Mean:
    """``Σ w v`` and ``Σ w`` over the first ``axes`` axes of ``values``; ``weights`` may have fewer axes than that.

    Without weights every entry counts 1. Both are summed in float32 at least.
    """
    over = tuple(range(axes))
    values = values.astype(wide(values.dtype))
    if weights is None:
        return Mean(values.sum(over), jnp.asarray(math.prod(values.shape[:axes]), values.dtype))
    if weights.ndim > axes or weights.shape != values.shape[: weights.ndim]:
        raise ValueError(
            f"weights of shape {weights.shape} do not fit values of shape {values.shape}: "
            f"expected {values.shape[:axes]}"
        )
    w = jnp.expand_dims(weights.astype(values.dtype), tuple(range(weights.ndim, values.ndim)))
    # where, not a product alone: an example of weight 0 counts nothing even if its value is infinite
    total = jnp.where(w == 0, 0, w * values).sum(over)
    return Mean(total, w.sum() * math.prod(values.shape[weights.ndim : axes]))


def wide(*dtypes) -> np.dtype:
    """Float64 if one of the dtypes is, else float32: what sums, moments and coefficients are kept in."""
    return np.dtype(np.float64 if any(dtype == np.float64 for dtype in dtypes) else np.float32)


def is_floating_dtype(dtype) -> bool:
    """Whether this names a floating dtype."""
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def require(condition, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds; one on traced numbers is not checked."""
    if not isinstance(condition, Tracer) and not condition:
        raise ValueError(message)


def is_whole(number, least=1) -> bool:
    """Whether this is a whole number of Python or NumPy, at least ``least``; True and False are none."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool) and bool(number >= least)


def described(tree: PyTree) -> str:
    """What was given, as a message shows it: a layer by its name, a tree with the dtypes and shapes of its arrays."""
    if isinstance(tree, Layer):
        return f"the layer {tree.name}"
    if isinstance(tree, Loss | Optimizer | Schedule | Transform):
        return f"{'an' if isinstance(tree, Optimizer) else 'a'} {type(tree).__name__}"
    if callable(tree):
        return called(tree)
    shown = repr(jax.tree.map(lambda leaf: _Shown(leaf) if hasattr(leaf, "shape") else leaf, tree))
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


class _Shown:
    """An array in a message: ``float32[3, 4]``."""

    def __init__(self, leaf):
        self.leaf = leaf

    def __repr__(self):
        return f"{self.leaf.dtype}{list(self.leaf.shape)}"


def takes(function, *args, **kwargs) -> bool:
    """Whether a function can be called with these arguments, as far as Python knows its signature."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # of a function of C none is known
        return True
    return True


def called(function) -> str:
    """A function as a message names it: ``the function tanh of jax.numpy``."""
    name, home = getattr(function, "__name__", type(function).__name__), getattr(function, "__module__", None) or ""
    home = home.split("._")[0]  # jax.nn.relu says that it is of jax._src.nn.functions
    return f"the function {name}" + (f" of {home}" if home and not home.startswith(("__main__", "fnet")) else "")


def require_layer(who: str, given) -> None:
    """Raise TypeError unless this is a `Layer`, with the remedy for a function that stands in its place."""
    if isinstance(given, Layer):
        return
    if not callable(given) or isinstance(given, tuple):
        raise TypeError(f"{who} is {described(given)}; expected a Layer, such as fnet.dense(10)")
    from fnet import layers  # for the message alone

    name = getattr(given, "__name__", "")
    if (getattr(given, "__module__", None) or "").startswith("fnet."):
        raise TypeError(f"{who} is {called(given)}; expected the Layer that it makes: call it, {name}(...)")
    own = f"fnet.layers.{name}()" if name in layers.__all__ else "fnet.types.stateless(name, init, forward, backward)"
    raise TypeError(f"{who} is {called(given)}; expected a Layer, with its backward by hand: {own}")


def require_optimizer(who: str, given) -> None:
    """Raise TypeError unless this is an `Optimizer`, with the remedy for a function that makes one."""
    if isinstance(given, Optimizer):
        return
    if callable(given) and (getattr(given, "__module__", None) or "").startswith("fnet."):
        raise TypeError(
            f"{who} is {called(given)}; expected the Optimizer that it makes: call it, {given.__name__}(...)"
        )
    raise TypeError(f"{who} is {described(given)}; expected an Optimizer, such as fnet.adam(1e-3)")


def infinite(who: str) -> jax.Array:
    """Infinity, as the best of nothing; raises ValueError where jax_debug_infs would refuse it."""
    settings: Any = jax.config
    if settings.jax_debug_infs:
        raise ValueError(
            f"{who}: jax_debug_infs is on, and its best is infinite before it has seen a value; expected it off: "
            "fit looks itself for what is not finite, and says where"
        )
    return jnp.array(math.inf, float)


def require_state(who: str, opt_state, kind: type) -> None:
    """Raise TypeError unless this is the state that the optimizer's ``init`` makes."""
    if not isinstance(opt_state, kind):
        given = None if opt_state is None else f"a {type(opt_state).__name__}"
        raise TypeError(
            f"{who}: opt_state is {given}; expected the {kind.__name__} that this optimizer's "
            "init(params) made, or the one that its last update returned"
        )


def require_key(who: str, key) -> None:
    """Raise TypeError unless this is one random key."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and jnp.shape(key) == ()
    if not typed and not (dtype == jnp.uint32 and len(key.shape) == 1):
        given = f"{dtype}{list(key.shape)}" if hasattr(key, "shape") else f"{key!r:.60}"
        number = f"({key})" if is_whole(key, 0) else "(0)"
        raise TypeError(f"{who}: key is {given}; expected a random key: jax.random.key{number}")


def require_counts(who: str, **counts) -> None:
    """Raise ValueError unless each is None or a whole number of at least 1."""
    for name, count in counts.items():
        if count is not None and not is_whole(count):
            what = f"{count}; expected" if is_whole(count, count) else f"{count!r}; expected a whole number of"
            raise ValueError(f"{who}: {name} = {what} at least 1")


def require_array(x) -> None:
    """Raise `LayerError` unless ``x`` is one array (or a shape)."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        parts = [f"{a.dtype}{list(a.shape)}" if hasattr(a, "shape") else repr(a)[:40] for a in jax.tree.leaves(x)]
        raise LayerError(
            f"expected one array, got a {type(x).__name__} of {', '.join(parts) or 'nothing'}: take its parts apart "
            "before this layer (a mask is boolean; a carry or a memory goes to the layer that reads it)"
        )


def require_params(params, **shapes: tuple) -> None:
    """Raise `LayerError` unless ``params`` is a dict of these names and shapes, in which None stands for any size."""

    def fits(name, shape):
        sizes = getattr(params[name], "shape", None)
        return sizes is not None and len(sizes) == len(shape) and all(map(lambda w, s: w in (None, s), shape, sizes))

    named = isinstance(params, dict) and set(params) == set(shapes)
    if not named or not all(fits(name, shape) for name, shape in shapes.items()):
        wanted = ", ".join(f"{name} {shape}".replace("None", "any") for name, shape in shapes.items())
        leaves = params.items() if isinstance(params, dict) else ()
        given = ", ".join(f"{name} {getattr(leaf, 'shape', leaf)}" for name, leaf in leaves) or repr(params)[:80]
        raise LayerError(f"expected params {wanted or 'of no leaf'}, got {given}: pass what init returned")


def split_floating(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Two trees like ``tree``: its floating leaves and its other leaves, each with None in the other's places."""
    is_floating = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), tree)
    first = jax.tree.map(lambda keep, leaf: leaf if keep else None, is_floating, tree)
    second = jax.tree.map(lambda keep, leaf: None if keep else leaf, is_floating, tree)
    return first, second


def join(first: PyTree, second: PyTree) -> PyTree:
    """The tree that `split_floating` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def cast_like(tree: PyTree, like: PyTree) -> Any:
    """Each leaf in the dtype of its counterpart."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a tree with readable paths, such as ``dense_0/w``."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their readable paths; raises ValueError where two have one path."""
    leaves = named_leaves(tree)
    for (path, _), (following, _) in pairwise(sorted(leaves, key=lambda leaf: leaf[0])):
        if path == following:
            raise ValueError(f"two leaves have the path {path!r}; expected one: rename what has '/' in its name")
    return dict(leaves)


def stream(key: jax.Array, name: str) -> jax.Array:
    """A key for the use called ``name``, independent of every other name's."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class LayerError(ValueError):
    """Something does not fit a layer; the message begins with the layer's path in the model."""

    def __init__(self, message: str, path: tuple[str, ...] = ()):
        super().__init__(f"{'/'.join(path)}: {message}" if path else message)
        self.message, self.path = message, path
