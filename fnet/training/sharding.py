"""Where a run lies on several devices: a mesh, and a placement of its state and its batches on it.

    mesh = fnet.mesh(data=2, fsdp=4)               a jax mesh; XLA finds out what is to be sent, and when
    placement = fnet.placement(mesh)               parameters and moments split over fsdp, batches over both
    placement = fnet.placement(mesh, TRANSFORMER)  and matrices over tensor, by path patterns
    end, history = fnet.fit(step, start, data, ..., placement=placement)

The step, its numbers (to rounding) and the run's folder are those of one device. Legend: D devices, B examples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from fnet.core.checks import is_whole
from fnet.core.placement import AXES, LEAST, TRANSFORMER, Placement
from fnet.core.splitting import by_examples, splitting
from fnet.core.trees import named_leaves
from fnet.training.plans import CHIPS, Chip, Plan, plan
from fnet.training.steps import Step
from fnet.types import PyTree, TrainState

__all__ = [
    "CHIPS",
    "TRANSFORMER",
    "Chip",
    "Placement",
    "Plan",
    "describe",
    "mesh",
    "placement",
    "plan",
    "sharded",
    "sharded_evaluate",
]


def mesh(*, devices: Sequence[Any] | None = None, **sizes: int) -> Mesh:
    """The mesh of ``data``, ``fsdp`` and ``tensor``; one size may be -1, what remains of the devices.

    Batches are split over data and fsdp, parameters over fsdp and tensor. The last axis has the nearest neighbours: on
    hosts of 8 devices ``tensor=8`` stays within each.

    Raises ValueError for an axis of another name, and for sizes whose product is not the number of ``devices``, by
    default all of `jax.devices`.

    >>> dict(mesh(data=-1, devices=jax.devices()[:1]).shape)
    {'data': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if not sizes or set(sizes) - set(AXES):
        given = ", ".join(sizes) or "none"
        raise ValueError(f"mesh: the axes are {given}; expected some of {', '.join(AXES)}: mesh(data=-1)")
    for name, size in sizes.items():
        if not is_whole(size) and size != -1:
            raise ValueError(f"mesh: {name} = {size!r}; expected a whole number of at least 1, or -1 for what remains")
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh: {sizes}; expected -1, which stands for what remains, once at most")
    sizes = {name: sizes[name] for name in AXES if name in sizes}
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = len(devices) // known
    sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        several = " (jax.config.update('jax_num_cpu_devices', 8) at the start makes 8 of a CPU)"
        raise ValueError(
            f"mesh: {sizes} for {len(devices)} {devices[0].platform} devices; expected sizes whose product is "
            f"{len(devices)}, or other devices{several if devices[0].platform == 'cpu' else ''}"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices)


def placement(mesh: Mesh, rules: Mapping[str, PartitionSpec] | None = None, *, least: int = LEAST) -> Placement:
    """The `Placement` of a run on a mesh.

    ``rules`` are patterns of paths, in which ``*`` stands for anything, each with the axes of the mesh that a leaf's
    last axes are split over: ``{"*/table": PartitionSpec(None, "tensor")}``. They hold for moments and averages as for
    the parameters. What they leave free is split over ``fsdp`` along the first of a leaf's last two axes that it
    divides, if the leaf has ``least`` numbers.

    Raises TypeError for what is no mesh and no rule, and ValueError for an axis that the mesh cannot have and for a
    mesh with explicit axes, which `jax.make_mesh` makes unless told otherwise.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"placement: mesh = {mesh!r:.80}; expected a mesh: fnet.mesh(data=-1)")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"placement: the mesh has axes of {mesh.axis_types}; expected AxisType.Auto: fnet.mesh(data=-1)"
        )
    if set(mesh.axis_names) - set(AXES):
        raise ValueError(f"placement: the mesh has the axes {mesh.axis_names}; expected some of {', '.join(AXES)}")
    for pattern, spec in (rules or {}).items():
        if not isinstance(pattern, str) or not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"placement: the rule {pattern!r}: {spec!r:.80}; expected a pattern of paths and a "
                "jax.sharding.PartitionSpec"
            )
        if odd := [name for name in spec if name is not None and name not in AXES]:
            raise ValueError(
                f"placement: the rule {pattern!r}: {spec} names the axis {odd[0]!r}; expected one of {', '.join(AXES)}"
            )
        named = [name for name in spec if name is not None]
        if twice := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"placement: the rule {pattern!r}: {spec} names {twice[0]!r} twice; expected it once")
    if not is_whole(least):
        raise ValueError(f"placement: least = {least!r}; expected a whole number of at least 1")
    return Placement(mesh, tuple((rules or {}).items()), int(least))


@functools.lru_cache(maxsize=16)  # a run's programs are kept by their step
def sharded(step: Step, placement: Placement) -> Step:
    """The step whose batch and activations are split by examples, and whose state stays where the placement has it."""

    def sharded_step(ts: TrainState, batch) -> tuple[TrainState, dict[str, Any]]:
        with splitting(placement.split):
            ts, metrics = step(ts, by_examples(batch))
        return jax.lax.with_sharding_constraint(ts, placement.of(ts)), metrics

    return functools.update_wrapper(sharded_step, step, assigned=())


@functools.lru_cache(maxsize=16)
def sharded_evaluate(evaluate: Callable, placement: Placement) -> Callable:
    """The evaluation whose examples and activations are split."""

    def evaluate_split(params, state, batch):
        with splitting(placement.split):
            return evaluate(params, state, by_examples(batch))

    return functools.update_wrapper(evaluate_split, evaluate, assigned=())


def describe(placement: Placement, tree: PyTree) -> str:
    """A line for each leaf: its path, its shape, how it is split, and its bytes on each device; and their sum.

    >>> import jax.numpy as jnp
    >>> one = placement(mesh(data=1, devices=jax.devices()[:1]))
    >>> print(describe(one, {"b": jnp.zeros(3), "w": jnp.zeros((4, 3))}))
    leaf  shape   split  bytes per device
    b     (3,)    whole                12
    w     (4, 3)  whole                48
    sum                                60
    """
    rows, total = [("leaf", "shape", "split", "bytes per device")], 0
    for path, leaf in named_leaves(tree):
        size = placement.bytes_of(path, leaf)
        total += size
        over = [f"axis {i} over {name}" for i, name in enumerate(placement.spec(path, leaf)) if name is not None]
        rows.append((path, str(tuple(leaf.shape)), ", ".join(over) or "whole", f"{size:,}"))
    rows.append(("sum", "", "", f"{total:,}"))
    a, b, c, d = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{path:{a}}  {shape:{b}}  {split:{c}}  {size:>{d}}" for path, shape, split, size in rows)
