"""Layers one after another, all dense."""

from __future__ import annotations

from fnet.layers import (
    dense,
    relu,
    serial,
)
from fnet.layers.initializers import he_normal
from fnet.types import Layer


def mlp(*units: int, activation: Layer = relu(), output: Layer | None = None, weights=he_normal()) -> Layer:
    """Dense layers of the given widths with ``activation`` between them, and ``output`` after the last if given.

    ``mlp(128, 64, 10)`` on 784 features is 784-128-64-10 with relu between and plain logits at the end. ``weights`` is
    the initializer of every dense layer.

    >>> import jax
    >>> params, _ = mlp(128, 64, 10).init(jax.random.key(0), jax.ShapeDtypeStruct((32, 784), "float32"))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    109386
    """
    if not units:
        raise ValueError("mlp: no widths given; expected at least one, such as mlp(128, 64, 10)")
    layers = [dense(units[0], weights=weights)]
    for width in units[1:]:
        layers += [activation, dense(width, weights=weights)]
    return serial(*layers, *([] if output is None else [output]))._replace(name="mlp")


def autoencoder(features: int, *units: int, activation: Layer = relu(), output: Layer | None = None) -> Layer:
    """``features`` down over ``units`` to the last of them, the code, and back the same way; `mlp`s both.

    ``autoencoder(784, 128, 32)`` is 784-128-32-128-784 with children ``encoder`` and ``decoder``; ``output`` stands
    after the last layer, say `sigmoid` for pixels. Source: Hinton and Salakhutdinov, Science 313, 2006.
    """
    if not units:
        raise ValueError("autoencoder: no widths given; expected at least the code's, such as autoencoder(784, 32)")
    encoder = mlp(*units, activation=activation)
    decoder = mlp(*reversed(units[:-1]), features, activation=activation, output=output)
    return serial(("encoder", encoder), ("inner", activation), ("decoder", decoder))._replace(name="autoencoder")
