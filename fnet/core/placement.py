"""Where the leaves of a state lie on the devices of a mesh: by rules of their paths, and else by their shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fnet.core import processes
from fnet.core.checksums import words_sum, words_sums
from fnet.core.numerics import bytes_of, is_key, with_words, words_of
from fnet.core.splitting import Split
from fnet.core.trees import named_leaves
from fnet.types import PyTree

AXES = ("data", "fsdp", "tensor")
LEAST = 4096  # numbers that a leaf has which is split without a rule

# Megatron's split of a transformer: heads and the wide layer over `tensor`, so that each branch is summed once; and a
# table along its features, since along the vocabulary each device would need the gradients of all its rows.
# A rule speaks of a leaf's last axes, so it holds for those that `repeat` stacks, and for the moments, too.
TRANSFORMER: dict[str, PartitionSpec] = {
    **{f"*attention*/{name}/w": PartitionSpec(None, "tensor") for name in ("query", "key", "value")},
    **{f"*attention*/{name}/b": PartitionSpec("tensor") for name in ("query", "key", "value")},
    "*attention*/out/w": PartitionSpec("tensor", None),
    "*mlp/wide/w": PartitionSpec(None, "tensor"),
    "*mlp/wide/b": PartitionSpec("tensor"),
    "*mlp/narrow/w": PartitionSpec("tensor", None),
}
"""Rules of a transformer's matrices, by path patterns: attention by heads, other layers by their inner features."""


class Placement(NamedTuple):
    """A mesh, and how each leaf lies on it: by the rule whose pattern its path matches, and else over fsdp."""

    mesh: Mesh
    rules: tuple[tuple[str, PartitionSpec], ...]
    least: int

    @property
    def whole(self) -> NamedSharding:
        """All of an array on each device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def split(self) -> Split:
        """How examples are split: over data and fsdp."""
        return Split(self.mesh, tuple(name for name in ("data", "fsdp") if name in self.mesh.shape))

    def of(self, tree: PyTree) -> PyTree:
        """The sharding of each leaf of a state, or of its parameters, by path and shape.

        Raises ValueError for a rule that splits an axis unevenly, and for two that disagree about a leaf.
        """
        specs = [NamedSharding(self.mesh, self.spec(path, leaf)) for path, leaf in named_leaves(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), specs)

    def require_use(self, ts: PyTree) -> None:
        """Raise ValueError for a rule that matches no leaf of a whole state, or of `TRANSFORMER` for all of them."""
        paths = [path for path, _ in named_leaves(ts)]
        unused = [rule for rule in self.rules if not any(fnmatchcase(path, rule[0]) for path in paths)]
        own = [rule for rule in unused if rule not in TRANSFORMER.items()]
        if own or (self.rules and len(unused) == len(self.rules)):
            raise ValueError(
                f"placement: the rule {[*own, *unused][0][0]!r} matches no leaf; expected a pattern of paths such as "
                f"{', '.join(paths[:8])}: fnet.sharding.describe shows them all"
            )

    def rule(self, path: str) -> tuple[str, PartitionSpec]:
        """The pattern that a path matches, and the axes that it says; of a path that matches none no axes."""
        matching = {pattern: spec for pattern, spec in self.rules if fnmatchcase(path, pattern)}
        if len({*matching.values()}) > 1:
            said = " and ".join(f"{pattern!r}: {spec}" for pattern, spec in [*matching.items()][:2])
            raise ValueError(f"placement: {path} matches {said}; expected rules that agree: make one pattern narrower")
        return next(iter(matching.items()), ("", PartitionSpec()))

    def spec(self, path: str, leaf) -> PartitionSpec:
        """How one leaf is split."""
        shape = tuple(leaf.shape)
        if is_key(leaf):
            return PartitionSpec()
        axes: list[Any] = [None] * len(shape)
        pattern, rule = self.rule(path)
        if len(rule) > len(shape) and path.startswith("params/"):
            raise ValueError(
                f"placement: {path} has shape {shape}, and the rule {pattern!r}: {rule} is of "
                f"{len(rule)} axes; expected a rule of {len(shape)} at most: make the pattern narrower"
            )
        if len(rule) <= len(shape):  # else a moment of another shape, such as adafactor's rows
            for i, name in enumerate(rule, len(shape) - len(rule)):
                parts = self.mesh.shape.get(name, 1)
                if shape[i] % parts:
                    raise ValueError(
                        f"placement: {path} has shape {shape}, and the rule {pattern!r}: {rule} splits axis {i}, "
                        f"{shape[i]} long, over {name} = {parts}; expected a multiple: another rule or mesh"
                    )
                axes[i] = name if name in self.mesh.shape else None
        parts = self.mesh.shape.get("fsdp", 1)
        free = [i for i in range(max(0, len(shape) - 2), len(shape)) if axes[i] is None and shape[i] % parts == 0]
        if parts > 1 and "fsdp" not in axes and free and math.prod(shape) >= self.least:
            # rows, where they divide: their parts lie one after another when they are gathered
            axes[free[0]] = "fsdp"
        while axes and axes[-1] is None:
            axes.pop()
        return PartitionSpec(*axes)

    def bytes_of(self, path: str, leaf) -> int:
        """What each device holds of a leaf."""
        parts = math.prod(self.mesh.shape[name] for name in self.spec(path, leaf) if name is not None)
        return bytes_of(leaf) // parts

    def of_batch(self, shape: Sequence[int], axis: int = 0) -> NamedSharding:
        """Examples along ``axis`` split over data and fsdp; whole where they cannot be split evenly."""
        if not shape or shape[axis] % self.split.parts:
            return self.whole
        return NamedSharding(self.mesh, PartitionSpec(*([None] * axis), self.split.axes or None))

    def part_of(self, examples: int) -> slice:
        """Which of a batch's examples the devices of this process hold; all of a batch that cannot be split evenly."""
        held = self.of_batch((examples,)).addressable_devices_indices_map((examples,)).values()
        ends = [index[0].indices(examples)[:2] for index in held if index is not None]
        return slice(min(begin for begin, _ in ends), max(end for _, end in ends))

    def put_batch(self, batch: PyTree, examples: int, axis: int = 0) -> PyTree:
        """So many examples along ``axis``, split; of several processes each gives those that its devices hold."""
        part = self.part_of(examples)

        def one(a):
            shape = (*a.shape[:axis], examples, *a.shape[axis + 1 :])
            where = self.of_batch(shape, axis)
            if isinstance(a, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(shape, a.dtype, sharding=where)
            if not processes.several():
                return jax.device_put(a, where)
            held = np.asarray(a)

            def of_device(index):
                begin, end, _ = index[axis].indices(examples)
                return held[(*index[:axis], slice(begin - part.start, end - part.start), *index[axis + 1 :])]

            return jax.make_array_from_callback(shape, where, of_device)

        return jax.tree.map(one, batch)


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """The leaves where the shardings say, in buffers of their own; what every process has made must be the same."""

    def one(leaf, sharding):
        if is_local(leaf):
            return _of_all(leaf, sharding)
        if is_key(leaf):  # device_put takes no keys to devices of other processes
            return jax.jit(jnp.copy, out_shardings=sharding)(leaf)
        return jax.device_put(leaf, sharding, may_alias=False)

    return jax.tree.map(one, tree, shardings)


def _of_all(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices of all; without sending it, as `jax.device_put` would."""
    words = np.asarray(words_of(leaf))
    where = NamedSharding(sharding.mesh, PartitionSpec()) if is_key(leaf) else sharding
    made = jax.make_array_from_callback(words.shape, where, lambda part: words[part])
    return jax.jit(lambda words: with_words(leaf, words), out_shardings=sharding)(made) if is_key(leaf) else made


def is_local(leaf: Any) -> bool:
    """Whether it is an array of this process alone, of which there are several."""
    return processes.several() and not (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable)


def require_same_leaves(tree: PyTree) -> None:
    """Require of what every process has all of that it is the same: parameters are drawn by one key.

    Of what is split each has a part of its own, which nobody else knows: `fnet.init` compares the keys.
    """
    words = {path: words_of(leaf) for path, leaf in named_leaves(tree)}
    own = {path: words_sum(np.asarray(leaf)) for path, leaf in words.items() if is_local(leaf)}
    held = {path: leaf for path, leaf in words.items() if path not in own and leaf.is_fully_replicated}
    sums = own | dict(zip(held, map(int, words_sums([*held.values()])), strict=True))
    said = {f"the sum of the words of {path}": sums[path] for path in words if path in sums}
    processes.require_same("the state", said, "make it from the same key and data")
