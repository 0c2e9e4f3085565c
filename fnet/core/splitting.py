"""Where activations are split over devices: along their examples, if somebody says so while a step is traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fnet.core.contexts import holding
from fnet.types import PyTree


class Split(NamedTuple):
    """The axes of a mesh that examples are split over."""

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def parts(self) -> int:
        """How many they are."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)


_split: ContextVar[Split | None] = ContextVar("split", default=None)


def splitting(split: Split) -> AbstractContextManager[None]:
    """While a step is traced within, its examples are split; nothing of it is left in a program without."""
    return holding(_split, split)


def is_split() -> bool:
    """Whether examples are split over devices."""
    return _split.get() is not None


def are_features_split() -> bool:
    """Whether single matrices are split over devices too."""
    split = _split.get()
    return split is not None and split.mesh.shape.get("tensor", 1) > 1


def by_examples(x: PyTree) -> PyTree:
    """Activations or their gradients ``(B, ...)``, split over devices along B where examples are.

    XLA would split the features as well where parameters are split: then every layer sends activations. Examples that
    do not divide, as those of an epoch's last batch may, are left to it.
    """
    split = _split.get()
    if split is None:
        return x

    def one(array):
        if not array.ndim or array.dtype == jax.dtypes.float0 or array.shape[0] % split.parts:
            return array
        # what lies behind the examples is left to XLA: heads and wide layers are over `tensor`
        free = [PartitionSpec.UNCONSTRAINED] * (array.ndim - 1)
        sharding = NamedSharding(split.mesh, PartitionSpec(split.axes or None, *free))
        return jax.lax.with_sharding_constraint(array, sharding)

    return jax.tree.map(one, x)


def on_own_examples(function: Callable, *arrays: Any, whole: Any = (), total: bool = False) -> Any:
    """``function(*arrays, *whole)``, of which each device computes what belongs to its examples ``(B, ...)``.

    For functions that lay the examples along an inner axis, which XLA cannot split. Their result is split like the
    arrays, or with ``total`` the sum over all examples. Examples that do not divide are computed by all.
    """
    split = _split.get()
    if split is None or split.parts == 1 or any(a.shape[0] % split.parts for a in arrays):
        return function(*arrays, *whole)

    def own(*arguments):
        made = function(*arguments)
        return jax.lax.psum(made, split.axes) if total else made

    rows, everywhere = PartitionSpec(split.axes), PartitionSpec()
    places = (*(rows for _ in arrays), *(everywhere for _ in whole))
    run = jax.shard_map(  # whose types say nothing of axes: a carry of zeros is as good as one of numbers
        own,
        mesh=split.mesh,
        in_specs=places,
        out_specs=everywhere if total else rows,
        axis_names={*split.axes},
        check_vma=False,
    )
    return run(*arrays, *whole)
