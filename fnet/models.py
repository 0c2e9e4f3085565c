"""Models: compositions of layers, and nothing else."""

from __future__ import annotations

from fnet.initializers import he_normal
from fnet.layers import dense, relu, serial
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
