"""Trees of arrays: leaves by readable paths, floating leaves apart from others, stacked copies of one layer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnet.types import PyTree


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
