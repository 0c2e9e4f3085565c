"""Layers out of layers. Each backward is the mirror of the forward above it.

Children are layers, or pairs ``(name, layer)``; a child's key is its parent's folded with its name.

Legend: B batch, N repetitions.
"""

from __future__ import annotations

import functools
import itertools
import operator
import zlib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import described, is_whole, require_array, require_layer
from fnet.core.numerics import wide
from fnet.core.trees import Copies
from fnet.layers.children import (
    backward_child,
    backward_of,
    forward_child,
    forward_of,
    init_child,
    init_of,
    inside,
    unwatched,
    watched,
)
from fnet.layers.masks import by_position, is_masked, split_mask, with_mask
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


def named_children(who: str, layers) -> list[tuple[str, Layer]]:
    """``(name, layer)`` for each entry: names are given as pairs, or counted by kind: ``dense_0, relu_0, dense_1``."""
    seen = Counter()
    children = []
    for i, entry in enumerate(layers):
        if isinstance(entry, tuple) and not isinstance(entry, Layer):
            if len(entry) != 2 or not isinstance(entry[0], str):
                raise TypeError(f"{who}: entry {i} is {described(entry)}; expected a Layer, or a pair (name, layer)")
            require_layer(f"{who}: entry {i}, {entry[0]!r},", entry[1])
            children.append(entry)
        else:
            require_layer(f"{who}: entry {i}", entry)
            children.append((f"{entry.name}_{seen[entry.name]}", entry))
            seen[entry.name] += 1
    for name, count in Counter(name for name, _ in children).items():
        if count > 1:
            raise ValueError(f"{count} children are called {name!r}; give each its own name: (name, layer)")
    return children


def serial(*layers: Layer | tuple[str, Layer]) -> Layer:
    """One layer after another: the outputs of each are the inputs of the next.

    Parameters, state and residuals are dicts by the children's names.

    >>> from fnet.layers import dense, relu
    >>> params, _ = serial(dense(4), relu(), dense(2)).init(jax.random.key(0), jax.ShapeDtypeStruct((8, 3), "float32"))
    >>> list(params)
    ['dense_0', 'relu_0', 'dense_1']
    """
    children = named_children("serial", layers)

    def init(key, x):
        params, state = {}, {}
        for name, layer in children:
            params[name], state[name] = init_child(name, layer, key, x)
            with inside(name):
                x = output_shape(layer, params[name], state[name], x)
        return params, state

    def forward(params, state, x, *, key=None, train=False):
        require_children("params", params, children)
        require_children("state", state, children)
        new_state, residuals = {}, {}
        for name, layer in children:
            x, new_state[name], residuals[name] = forward_child(
                name, layer, params[name], state[name], x, key=key, train=train
            )
        return x, new_state, residuals

    def backward(params, residuals, dy):  # the chain rule: dx of each layer is dy of the one before it
        dparams = {}
        for name, layer in reversed(children):
            dparams[name], dy = backward_child(name, layer, params[name], residuals[name], dy)
        return dparams, dy

    return Layer("serial", init, forward, backward, tuple(children))


def residual(*layers: Layer | tuple[str, Layer], shortcut: Layer | None = None) -> Layer:
    """``y = f(x) + x``, with ``f`` the ``layers`` one after another; or ``y = f(x) + shortcut(x)``.

    The children stand as in `serial`, and the shortcut beside them under its name. ``(x, mask)`` gives ``(y, mask)``.
    Raises `LayerError` where the two summands differ in shape or dtype, or one of them has lost the mask.
    Source: He et al., arXiv:1512.03385.

    >>> from fnet.layers import dense, relu
    >>> block = residual(dense(8), relu(), dense(4))
    >>> params, _ = block.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 4), "float32"))
    >>> list(params)
    ['dense_0', 'relu_0', 'dense_1']
    """
    children = named_children(
        "residual", [*layers, *([] if shortcut is None else [("shortcut", shortcut)])]
    )  # the name is free
    branch = serial(*layers)

    def split(tree):
        if shortcut is None:
            return tree, None
        if not isinstance(tree, dict) or "shortcut" not in tree:
            raise LayerError("no entry 'shortcut' in params or state: pass what the model's init returned")
        return {name: child for name, child in tree.items() if name != "shortcut"}, tree["shortcut"]

    def merge(tree, skip):
        return tree if shortcut is None else {**tree, "shortcut": skip}

    def init(key, x):
        params, state = branch.init(key, x)
        if shortcut is None:
            return params, state
        skip_params, skip_state = init_child("shortcut", shortcut, key, x)
        return merge(params, skip_params), merge(state, skip_state)

    def forward(params, state, x, *, key=None, train=False):
        require_array(split_mask(x)[0])
        (params, skip_params), (state, skip_state) = split(params), split(state)
        y, state, residuals = branch.forward(params, state, x, key=key, train=train)
        skip, skip_residuals = x, None
        if shortcut is not None:
            skip, skip_state, skip_residuals = forward_child(
                "shortcut", shortcut, skip_params, skip_state, x, key=key, train=train
            )
        (y, mask), (skip, skip_mask) = split_mask(y), split_mask(skip)
        if (mask is None) != (skip_mask is None):
            raise LayerError("one of the two summands ends the mask and the other does not: drop_mask() before both")
        if (y.shape, y.dtype) != (skip.shape, skip.dtype):
            raise LayerError(
                f"cannot add outputs {y.dtype}{list(y.shape)} to the shortcut's {skip.dtype}{list(skip.shape)}: "
                "give a shortcut=layer that makes them alike"
            )
        return with_mask(y + skip, mask), merge(state, skip_state), merge(residuals, skip_residuals)

    def backward(params, residuals, dy):  # y = f(x) + s(x): dy reaches both, and dx is the sum of what they return
        (params, skip_params), (residuals, skip_residuals) = split(params), split(residuals)
        dparams, dx = branch.backward(params, residuals, dy)
        if shortcut is None:
            return dparams, jax.tree.map(jnp.add, dx, dy)
        dskip_params, dskip = backward_child("shortcut", shortcut, skip_params, skip_residuals, dy)
        return merge(dparams, dskip_params), jax.tree.map(jnp.add, dx, dskip)

    return Layer("residual", init, forward, backward, tuple(children))


def parallel(*layers: Layer | tuple[str, Layer]) -> Layer:
    """Every layer on the same inputs: ``y = (f_0(x), f_1(x), ...)``. `concatenate` after it makes one array of them.

    ``(x, mask)`` gives ``((y_0, y_1, ...), mask)`` where every layer hands the mask on; where none does, the tuple.
    """
    children = named_children("parallel", layers)
    if not children:
        raise ValueError("parallel: no layers; expected at least one")

    def init(key, x):
        params, state = {}, {}
        for name, layer in children:
            params[name], state[name] = init_child(name, layer, key, x)
        return params, state

    def forward(params, state, x, *, key=None, train=False):
        require_children("params", params, children)
        require_children("state", state, children)
        outputs, new_state, residuals = [], {}, {}
        for name, layer in children:
            y, new_state[name], residuals[name] = forward_child(
                name, layer, params[name], state[name], x, key=key, train=train
            )
            outputs.append(y)
        masked = [is_masked(y) for y in outputs]
        if any(masked) and not all(masked):
            ends = [name for (name, _), on in zip(children, masked, strict=True) if not on]
            raise LayerError(f"{', '.join(ends)} ends the mask and the others do not: drop_mask() in them, or in none")
        ys, masks = zip(*map(split_mask, outputs), strict=True)
        # beside the residuals stands, in its structure, whether there is a mask
        return with_mask(ys, masks[0]), new_state, (() if all(masked) else None, residuals)

    def backward(params, residuals, dy):  # x feeds every child: dx = Σ_i dx_i
        dparams, parts, (masked, residuals) = {}, [], residuals
        for (name, layer), d in zip(children, dy if masked is None else dy[0], strict=True):
            d = d if masked is None else (d, None)
            dparams[name], dx = backward_child(name, layer, params[name], residuals[name], d)
            parts.append(dx)
        return dparams, jax.tree.map(lambda *d: sum(d[1:], d[0]), *parts)

    return Layer("parallel", init, forward, backward, tuple(children))


def concatenate(axis: int = -1) -> Layer:
    """A tuple of arrays as one, joined along ``axis``; they are alike in all other axes and in dtype."""

    def forward(params, x):
        require_branches(x)
        shapes = [part.shape for part in x]
        others = {tuple(np.delete(shape, axis)) if -len(shape) <= axis < len(shape) else None for shape in shapes}
        if len(others) > 1 or None in others or len({part.dtype for part in x}) > 1:
            raise LayerError(
                f"cannot join {listed(x)} along axis {axis}: expected arrays alike in dtype and other axes"
            )
        return jnp.concatenate(x, axis), shapes_in(x)

    def backward(params, carriers, dy):  # each part of y is one of the inputs, and so is its gradient
        ends = np.cumsum([carrier.shape[1:][axis] for carrier in carriers])
        return (), tuple(jnp.split(dy, ends[:-1], axis))

    return by_position(stateless("concatenate", lambda key, x: (), forward, backward, several=True))


def add() -> Layer:
    """A tuple of arrays to their sum; of one dtype, and of shapes that broadcast as NumPy's do.

    >>> add().forward((), (), (jnp.array([[2.0, 3.0]]), jnp.array([[5.0]])))[0].tolist()
    [[7.0, 8.0]]
    """

    def forward(params, x):
        parts = of_one_rank("add", x)
        return functools.reduce(operator.add, parts).astype(x[0].dtype), shapes_in(x)

    def backward(params, carriers, dy):  # ∂(Σ_j x_j)/∂x_i = 1, and what was broadcast is met by several entries of dy
        return (), tuple(met_by(dy, carrier.shape[1:]) for carrier in carriers)

    return by_position(stateless("add", lambda key, x: (), forward, backward, several=True))


def multiply() -> Layer:
    """A tuple of arrays to their product, entry by entry; of one dtype, and of shapes that broadcast as NumPy's do.

    Axes are matched from the last to the first, so that images ``(B, H, W, C)`` are scaled by ``(B, 1, 1, C)``, and by
    ``(C,)``; the gradient is summed over what was broadcast, in float32 at least.

    >>> multiply().forward((), (), (jnp.array([[2.0, 3.0]]), jnp.array([[5.0, 0.0]])))[0].tolist()
    [[10.0, 0.0]]
    >>> multiply().forward((), (), (jnp.array([[2.0, 3.0]]), jnp.array([[5.0]])))[0].tolist()
    [[10.0, 15.0]]
    """

    def forward(params, x):
        return functools.reduce(operator.mul, of_one_rank("multiply", x)).astype(x[0].dtype), x

    def backward(params, x, dy):
        # ∂(Π_j x_j)/∂x_i = Π_{j≠i} x_j, what stands before times what stands after: a quotient would not do for a 0;
        # and the sum of it over what was broadcast
        factors, d = of_one_rank("multiply", x), dy.astype(wide(dy.dtype))
        before = itertools.accumulate(factors[:-1], operator.mul, initial=d)
        after = [*itertools.accumulate(reversed(factors[1:]), operator.mul, initial=1)]
        parts = zip(before, reversed(after), x, strict=True)
        return (), tuple(met_by(b * a, part.shape).astype(dy.dtype) for b, a, part in parts)

    return by_position(stateless("multiply", lambda key, x: (), forward, backward, several=True))


def of_one_rank(verb: str, x) -> list:
    """The arrays with axes of 1 before those that they have, so that all have as many; in float32 at least.

    In 16 bits the product of some may overflow that of all does not; and autodiff sums over what is broadcast in the
    dtype in which it is broadcast. Raises `LayerError` for what is no tuple, for several dtypes, and for shapes that do
    not broadcast.
    """
    require_branches(x)
    try:
        rank = len(np.broadcast_shapes(*(part.shape for part in x)))
    except ValueError:
        rank = None
    if rank is None or len({part.dtype for part in x}) > 1:
        raise LayerError(f"cannot {verb} {listed(x)}: expected arrays alike in dtype, whose shapes broadcast")
    return [part.astype(wide(part.dtype)).reshape((1,) * (rank - part.ndim) + part.shape) for part in x]


def met_by(d: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A gradient summed over what an array of this shape was broadcast along, in float32 at least."""
    padded = (1,) * (d.ndim - len(shape)) + shape
    axes = tuple(i for i, size in enumerate(padded) if size == 1 and d.shape[i] != 1)
    return d.astype(wide(d.dtype)).sum(axes, keepdims=True).astype(d.dtype).reshape(shape) if axes else d.reshape(shape)


def shapes_in(x) -> list[jax.Array]:
    """Empty arrays that carry the shapes, as residuals that keep nothing else."""
    return [jnp.zeros((0, *part.shape)) for part in x]


def require_branches(x) -> None:
    """Raise `LayerError` unless ``x`` is a tuple, as `parallel` gives one."""
    if not isinstance(x, tuple) or not x:
        raise LayerError(f"expected a tuple of arrays, as parallel(...) returns one, got {type(x).__name__}")


def listed(parts) -> str:
    """Dtypes and shapes, as messages show them."""
    return ", ".join(f"{part.dtype}{list(part.shape)}" for part in parts)


def repeat(layer: Layer, count: int, *, unroll: int | bool = 1) -> Layer:
    """``count`` copies of a layer one after another, by `jax.lax.scan`: the program does not grow with the depth.

    Parameters and state are the layer's own trees with a leading axis of ``count``; the copies have keys and parameters
    of their own, those of a `serial` whose children are called ``"0"``, ``"1"`` and so on. Parameters are a
    `fnet.layers.Copies`, by which optimizers know each copy from the others. ``unroll`` copies stand in the loop's body
    (True: all), which compiles longer and may run faster. Raises `LayerError` where the layer's outputs do not have the
    shape and the dtype of its inputs, and where its parameters are no dict.

    >>> from fnet.layers import dense
    >>> params, _ = repeat(dense(4), 6).init(jax.random.key(0), jax.ShapeDtypeStruct((2, 4), "float32"))
    >>> params["w"].shape
    (6, 4, 4)
    """
    if not is_whole(count):
        raise ValueError(f"repeat: count = {count!r}; expected a whole number of at least 1")
    if not isinstance(unroll, bool) and not is_whole(unroll):
        raise ValueError(f"repeat: unroll = {unroll!r}; expected True, or a whole number of at least 1")
    require_layer("repeat: layer", layer)
    count = int(count)
    names = [str(i) for i in range(count)]
    folds = np.asarray([zlib.crc32(name.encode()) for name in names], np.uint32)  # stream(key, name), all at once

    def keys(key):
        return None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, folds)

    def init(key, x):
        first = jax.eval_shape(lambda key: init_of(layer, key, x), key)
        require_like(x, output_shape(layer, first[0], first[1], x))
        params, state = jax.vmap(lambda key: layer.init(key, x))(keys(key))
        if jax.tree.leaves(params) and not isinstance(params, dict):
            raise LayerError(f"expected a layer whose parameters are a dict, to be repeated, got {params!r:.80}")
        return (Copies(params, count) if isinstance(params, dict) else params), state

    def apart(params):  # the layer sees its own parameters, of which there is one
        return params.apart() if isinstance(params, Copies) else params

    def forward(params, state, x, *, key=None, train=False):
        def one(x, child):
            params, state, key = child
            y, state, residuals = forward_of(layer, params, state, x, key=key, train=train)
            require_like(x, y)
            return y, (state, residuals)

        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if leaf.shape[:1] != (count,):
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise LayerError(f"expected {count} copies of {where} along its first axis, got shape {leaf.shape}")
        params = apart(params)
        if not watched():
            y, (state, residuals) = jax.lax.scan(one, x, (params, state, keys(key)), length=count, unroll=unroll)
            return y, state, residuals
        pieces = []
        for i, name in enumerate(names):  # one by one, so that each copy is seen where it stands
            own_params, own_state = jax.tree.map(lambda leaf, i=i: leaf[i], (params, state))
            x, *piece = forward_child(name, layer, own_params, own_state, x, key=key, train=train)
            pieces.append(piece)
        state, residuals = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pieces)
        return x, state, residuals

    def backward(params, residuals, dy):  # the chain rule, as in `serial`: dx of each copy is dy of the one before it
        def one(dy, child):
            params, residuals = child
            dparams, dx = backward_of(layer, params, residuals, dy)
            return dx, dparams

        own = apart(params)
        if watched():
            pieces = []
            for i, name in reversed(list(enumerate(names))):
                own_params, own_residuals = jax.tree.map(lambda leaf, i=i: leaf[i], (own, residuals))
                piece, dy = backward_child(name, layer, own_params, own_residuals, dy)
                pieces.insert(0, piece)
            dx, dparams = dy, jax.tree.map(lambda *leaves: jnp.stack(leaves), *pieces)
        else:
            dx, dparams = jax.lax.scan(one, dy, (own, residuals), length=count, reverse=True, unroll=unroll)
        return (Copies(dparams, count) if isinstance(params, Copies) else dparams), dx

    return Layer("repeat", init, forward, backward, ((f"{count} copies", layer),))


def require_like(x, y) -> None:
    """Raise `LayerError` unless outputs ``y`` could be the layer's next inputs."""
    before, after = (jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", tree) for tree in (x, y))
    if before != after:
        raise LayerError(f"expected outputs like the inputs {before}, to be repeated, got {after}")


def remat(layer: Layer) -> Layer:
    """The same layer, which keeps its inputs for the backward and nothing else, and computes the rest a second time.

    Autodiff does likewise (`jax.checkpoint`). The saving shows inside `repeat`: in an unrolled model XLA on CPU may
    find the two computations to be one and keep the values after all. Source: Chen et al., arXiv:1604.06174.
    """

    require_layer("remat: layer", layer)

    def forward(params, state, x, *, key=None, train=False):
        def outputs(params, state, x, key):
            return forward_of(layer, params, state, x, key=key, train=train)[:2]

        y, new_state = (outputs if watched() else jax.checkpoint(outputs))(params, state, x, key)
        return y, new_state, {"train" if train else "eval": (state, x, key)}

    def backward(params, residuals, dy):  # the layer's own, of the residuals of its forward once more
        [(mode, (state, x, key))] = residuals.items()
        with unwatched():
            _, _, again = layer.forward(params, state, x, key=key, train=mode == "train")
        return layer.backward(params, again, dy)

    return layer._replace(forward=forward, backward=backward, outer=None)


def require_children(what: str, tree, children) -> None:
    """Raise `LayerError` unless ``tree`` is a dict with an entry for each child."""
    names = [name for name, _ in children]
    if not isinstance(tree, dict) or set(tree) != set(names):
        found = sorted(tree) if isinstance(tree, dict) else described(tree)
        raise LayerError(f"expected {what} of the children {names}, got {found}: pass what the model's init returned")


def output_shape(layer: Layer, params, state, x):
    """The shapes and dtypes of the layer's outputs, without computing them."""

    def outputs(params, state, x, key):
        return forward_of(layer, params, state, x, key=key, train=True)[0]

    return jax.eval_shape(outputs, params, state, x, jax.random.key(0))
