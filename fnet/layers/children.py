"""A layer's three functions as others call them: under the layer's path, checked, and watched.

Combinators run their children by `init_child`, `forward_child` and `backward_child`. So errors and compiled operations
carry the path of the layer that they come from, a function that does not return what the contract says is named where
it stands, and `watch` sees each layer of a model. Nothing of it is left in a compiled program.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np

from fnet.core import processes
from fnet.core.checks import described, refuse_train_state, require_key, require_layer, takes
from fnet.core.contexts import holding
from fnet.core.drawing import drawn
from fnet.core.numerics import stream, words_of
from fnet.core.placement import Placement
from fnet.core.splitting import by_examples
from fnet.core.trees import named_leaves, split_floating
from fnet.types import Layer, LayerError, PyTree


def init(model: Layer, key: jax.Array, x: PyTree, placement: Placement | None = None) -> tuple[PyTree, PyTree]:
    """``params, state`` for inputs like ``x`` (arrays or `jax.ShapeDtypeStruct`s), drawn by compiled programs.

    Leaves that are drawn alike, as those of a deep model's blocks are, share one. The numbers are the same bits as if
    one program drew all of them; where the key is traced, that is what happens.

    With a `fnet.placement` each device draws its part of the same numbers, so that none need hold them all.
    Raises TypeError for what is no layer and no key, `LayerError` for inputs that do not fit.
    """
    require_layer("init: model", model)
    require_key("init", key)
    if placement is not None:
        words = np.asarray(words_of(key)).tolist()
        processes.require_same("init", {"the key": words}, "give all processes the same")
    shapes = jax.eval_shape(lambda x: x, x)
    draw = lambda key: dict(zip(("params", "state"), init_of(model, key, shapes), strict=True))  # noqa: E731
    where = placement and placement.of(jax.eval_shape(draw, key))
    made = drawn(draw, key, where)
    return made["params"], made["state"]


def apply(model: Layer, params: PyTree, state: PyTree, x: PyTree) -> PyTree:
    """The model's outputs in inference. Under jit, XLA drops the residuals that nobody reads."""
    refuse_train_state("apply", params=params, state=state)
    return forward_of(model, params, state, x, key=None, train=False)[0]


def parameter_paths(model: Layer, x: PyTree) -> list[str]:
    """The paths of the model's parameters in the order in which its layers stand; nothing is computed.

    jax sorts the keys of a dict wherever it rebuilds one, so this order is read off ``init`` itself while it is traced.
    """
    paths = []

    def walk(tree, path):
        if isinstance(tree, dict):
            for name, child in tree.items():
                walk(child, (*path, name))
        else:
            paths.extend("/".join((*path, name) if name else path) for name, _ in named_leaves(tree))

    jax.eval_shape(lambda key: walk(init_of(model, key, x)[0], ()), jax.random.key(0))
    return paths


_path: ContextVar[tuple[str, ...]] = ContextVar("path", default=())


def path_here() -> tuple[str, ...]:
    """The path of the layer that is running."""
    return _path.get()


@contextmanager
def inside(name: str):
    """Everything that happens within belongs to the child ``name``: errors and compiled operations carry its path."""
    try:
        with holding(_path, (*_path.get(), name)), jax.named_scope(name):
            yield
    except LayerError as error:
        raise LayerError(error.message, (name, *error.path)) from None


def init_child(name: str, layer: Layer, key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
    """``params, state`` of the child ``name``; its key is folded from its parent's by its name."""
    with inside(name):
        return init_of(layer, stream(key, name), x)


def forward_child(name: str, layer: Layer, params, state, x, *, key, train) -> tuple[PyTree, PyTree, PyTree]:
    """The forward of the child ``name``, as every combinator calls it.

    ``key`` is the parent's: the child's own is folded from it by its name, as in ``init``.
    """
    key = None if key is None else stream(key, name)
    with inside(name):
        watchers = _watchers.get()
        if watchers is not None and watchers.inputs is not None:
            x = watchers.inputs(_path.get(), x)
        y, new_state, residuals = forward_of(layer, params, state, x, key=key, train=train)
        if watchers is not None:
            y = watchers.forward(Call(_path.get(), layer, params, state, x, key, train), y)
    return y, new_state, residuals


def backward_child(name: str, layer: Layer, params, residuals, dy) -> tuple[PyTree, PyTree]:
    """The backward of the child ``name``, as every combinator calls it."""
    with inside(name):
        dparams, dx = backward_of(layer, params, residuals, dy)
        watchers = _watchers.get()
        if watchers is not None and watchers.backward is not None:
            dparams, dx = watchers.backward(Back(_path.get(), layer, params, residuals, dy), dparams, dx)
    return dparams, dx


# --- what the contract says ------------------------------------------------------------------------------------------


def init_of(layer: Layer, key: jax.Array, x: PyTree) -> tuple[PyTree, PyTree]:
    """``layer.init``; raises `LayerError` unless it returns ``params, state``."""
    made = _call("init", layer.init, "(key, x)", key, x)
    if not isinstance(made, tuple) or len(made) != 2:
        raise LayerError(f"init returned {described(made)}; expected (params, state), with () for what there is not")
    return made


def forward_of(layer: Layer, params, state, x, *, key, train) -> tuple[PyTree, PyTree, PyTree]:
    """``layer.forward``; raises `LayerError` unless it returns ``y, state, residuals``."""
    expected = "(params, state, x, *, key=None, train=False)"
    made = _call("forward", layer.forward, expected, params, state, x, key=key, train=train)
    if not isinstance(made, tuple) or len(made) != 3:
        raise LayerError(
            f"forward returned {described(made)}; expected (y, state, residuals), with () for residuals that there "
            "are not, and the state as it came where it does not change"
        )
    shapes = _shapes.get()
    if shapes is not None:
        shapes[_path.get()] = jax.eval_shape(lambda x: x, split_floating(x)[0])
    return by_examples(made[0]), made[1], made[2]


def backward_of(layer: Layer, params, residuals, dy) -> tuple[PyTree, PyTree]:
    """``layer.backward``; raises `LayerError` unless it returns ``dparams, dx``, in `shapes_known` of right kinds."""
    made = _call("backward", layer.backward, "(params, residuals, dy)", params, residuals, dy)
    if not isinstance(made, tuple) or len(made) != 2:
        raise LayerError(
            f"backward returned {described(made)}; expected (dparams, dx), the gradients of the parameters and of the "
            "inputs, with () for parameters that there are not"
        )
    shapes = _shapes.get()
    if shapes is not None:
        _require_alike("dparams", made[0], "the parameters", params)
        if _path.get() in shapes:
            _require_alike("dx", made[1], "the inputs", shapes[_path.get()])
    return made[0], by_examples(made[1])


def _call(what: str, function: Callable, expected: str, *args, **kwargs):
    """The call; raises `LayerError` where the function does not take these arguments."""
    try:
        return function(*args, **kwargs)
    except TypeError:
        if takes(function, *args, **kwargs):
            raise
    raise LayerError(f"{what} takes {inspect.signature(function)}; expected {expected}")


def _require_alike(what: str, given: PyTree, name: str, wanted: PyTree) -> None:
    """Raise `LayerError` unless a gradient has the tree, shapes and dtypes of what it is of; None takes anything."""
    none = lambda leaf: leaf is None  # noqa: E731
    leaves, tree = jax.tree.flatten(wanted, is_leaf=none)
    found, structure = jax.tree.flatten(given, is_leaf=none)
    fits = tree == structure and all(
        w is None or (hasattr(g, "shape") and (g.shape, g.dtype) == (w.shape, w.dtype))
        for w, g in zip(leaves, found, strict=True)
    )
    if not fits:
        raise LayerError(f"backward returned {what} {described(given)}; expected {described(wanted)}, like {name}")


_shapes: ContextVar[dict[tuple[str, ...], PyTree] | None] = ContextVar("shapes", default=None)


def shapes_known() -> AbstractContextManager[None]:
    """Within, gradients must have the trees, shapes and dtypes of what they are of: each forward's inputs are kept.

    One of a wrong shape may else be broadcast, and train on. (The audit reports them instead.)
    """
    return holding(_shapes, {})


_rewriting: ContextVar[bool] = ContextVar("rewriting", default=False)


def rewriting() -> AbstractContextManager[None]:
    """Within, the ``dparams`` that layers return are not their parameters' gradients: who calls makes these of them.

    A frozen layer makes zeros of them, one of another parametrization gradients of other parameters.
    """
    return holding(_rewriting, True)


def is_rewritten() -> bool:
    """Whether the layer whose backward runs stands within one that is `rewriting` its gradients."""
    return _rewriting.get()


# --- watching --------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """The forward of a child inside a combinator, as `watch` shows it."""

    path: tuple[str, ...]
    layer: Layer
    params: PyTree
    state: PyTree
    x: PyTree
    key: Any
    train: bool


class Back(NamedTuple):
    """The backward of a child inside a combinator, as `watch` shows it."""

    path: tuple[str, ...]
    layer: Layer
    params: PyTree
    residuals: PyTree
    dy: PyTree


class Watchers(NamedTuple):
    """Who sees what of a model that is traced; each function returns what it was shown, or something in its place."""

    forward: Callable[[Call, PyTree], PyTree]
    backward: Callable[[Back, PyTree, PyTree], tuple[PyTree, PyTree]] | None
    inputs: Callable[[tuple[str, ...], PyTree], PyTree] | None
    inner: Callable[[tuple[str, ...], PyTree, bool], PyTree] | None


_watchers: ContextVar[Watchers | None] = ContextVar("watchers", default=None)


@contextmanager
def watch(forward, backward=None, *, inputs=None, inner=None):
    """While a model is traced within, these functions see each child, and what they return takes the value's place.

    - ``forward(call, y) -> y``: a `Call` with its outputs
    - ``backward(back, dparams, dx) -> dparams, dx``: a `Back` with the gradients that it returned
    - ``inputs(path, x) -> x``: the inputs of a child, before its forward
    - ``inner(path, value, is_gradient) -> value``: what a layer `show`s of itself, such as the gates of an lstm

    This is how the audit and `fnet.record` reach the layers of a model; nothing of it is left in a program that nobody
    watches.
    """
    with holding(_watchers, Watchers(forward, backward, inputs, inner)), holding(_path, ()):
        yield


def watched() -> bool:
    """Whether somebody watches: then no layer may run its children inside a scan or a checkpoint, which hide values."""
    return _watchers.get() is not None


def unwatched() -> AbstractContextManager[None]:
    """Within, nobody sees the children: for a forward that a backward computes a second time."""
    return holding(_watchers, None)


def show(name: str, value: PyTree, *, is_gradient: bool = False) -> PyTree:
    """``value`` itself, a value within a layer (or its gradient by hand) that those who watch see as ``name``."""
    watchers = _watchers.get()
    if watchers is None or watchers.inner is None:
        return value
    return watchers.inner((*_path.get(), name), value, is_gradient)
