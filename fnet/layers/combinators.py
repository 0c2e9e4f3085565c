"""Layers out of layers. Each backward is the mirror of the forward above it."""

from __future__ import annotations

from collections import Counter

import jax

from fnet.types import Layer, LayerError, forward_child, inside, stream


def named_children(layers) -> list[tuple[str, Layer]]:
    """``(name, layer)`` for each entry: names are given as pairs, or counted by kind: ``dense_0, relu_0, dense_1``."""
    seen = Counter()
    children = []
    for entry in layers:
        name, layer = (None, entry) if isinstance(entry, Layer) else entry
        if name is None:
            name = f"{layer.name}_{seen[layer.name]}"
            seen[layer.name] += 1
        children.append((name, layer))
    for name, count in Counter(name for name, _ in children).items():
        if count > 1:
            raise ValueError(f"{count} children are called {name!r}; give each its own name: (name, layer)")
    return children


def serial(*layers: Layer | tuple[str, Layer]) -> Layer:
    """One layer after another: the outputs of each are the inputs of the next.

    Parameters, state and residuals are dicts by the children's names, and each child's key is its parent's folded with
    its name. A child is a layer, or a pair ``(name, layer)``.

    >>> from fnet.layers import dense, relu
    >>> params, _ = serial(dense(4), relu(), dense(2)).init(jax.random.key(0), jax.ShapeDtypeStruct((8, 3), "float32"))
    >>> list(params)
    ['dense_0', 'relu_0', 'dense_1']
    """
    children = named_children(layers)

    def init(key, x):
        params, state = {}, {}
        for name, layer in children:
            with inside(name):
                params[name], state[name] = layer.init(stream(key, name), x)
                x = output_shape(layer, params[name], state[name], x)
        return params, state

    def forward(params, state, x, *, key=None, train=False):
        require_children("params", params, children)
        require_children("state", state, children)
        new_state, residuals = {}, {}
        for name, layer in children:
            child_key = None if key is None else stream(key, name)
            x, new_state[name], residuals[name] = forward_child(
                name, layer, params[name], state[name], x, key=child_key, train=train
            )
        return x, new_state, residuals

    def backward(params, residuals, dy):
        dparams = {}
        for name, layer in reversed(children):
            with inside(name):
                dparams[name], dy = layer.backward(params[name], residuals[name], dy)
        return dparams, dy

    return Layer("serial", init, forward, backward)


def require_children(what: str, tree, children) -> None:
    """Raise `LayerError` unless ``tree`` is a dict with an entry for each child."""
    names = [name for name, _ in children]
    if not isinstance(tree, dict) or set(tree) != set(names):
        found = sorted(tree) if isinstance(tree, dict) else repr(tree)[:80]
        raise LayerError(f"expected {what} of the children {names}, got {found}: pass what the model's init returned")


def output_shape(layer: Layer, params, state, x):
    """The shapes and dtypes of the layer's outputs, without computing them."""

    def outputs(params, state, x, key):
        return layer.forward(params, state, x, key=key, train=True)[0]

    return jax.eval_shape(outputs, params, state, x, jax.random.key(0))
