"""A run on several devices and of several processes: its plan on a mesh, and what must be the same in all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fnet.core import processes
from fnet.core.placement import Placement, put, require_same_leaves
from fnet.core.trees import named_leaves
from fnet.data.sources import Stream, count_rows, is_read_ahead
from fnet.runs.arguments import Plan, rows_digest
from fnet.runs.run import Run, RunError
from fnet.runs.settings import as_json
from fnet.training.evaluation import is_several, sets_of
from fnet.training.sharding import sharded, sharded_evaluate
from fnet.types import PyTree, TrainState


def require_one_device(ts: TrainState) -> None:
    """Require of a run without a placement that it is one device's: each process would make the same run again."""
    if processes.several():
        raise ValueError(
            f"placement is not given, and there are {processes.count()} processes; expected the devices of all: "
            "placement=fnet.placement(fnet.mesh(data=-1))"
        )
    for path, leaf in named_leaves(ts):
        if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
            raise ValueError(
                f"placement is not given, and ts.{path.replace('/', '.')} lies on {len(leaf.sharding.device_set)} "
                "devices; expected fit(..., placement=fnet.placement(mesh)), or the state on one of them: "
                "jax.device_put(ts, jax.devices()[0])"
            )


def split_plan(plan: Plan, placement: Placement) -> Plan:
    """The plan whose step and evaluation are split over devices, and whose batches are those of all processes.

    Raises ValueError for a batch that the devices do not divide, and for a mesh without the devices of all processes.
    """
    holders = Counter(device.process_index for device in placement.mesh.devices.flat)
    if len(holders) != processes.count():
        raise ValueError(
            f"placement: its mesh has devices of {len(holders)} of {processes.count()} processes; expected those of "
            "all: fnet.mesh(data=-1) takes them"
        )
    if len({*holders.values()}) > 1:
        said = ", ".join(f"{count} of process {i}" for i, count in sorted(holders.items()))
        raise ValueError(f"placement: its mesh has {said}; expected as many of each: begin all with the same devices")
    if isinstance(plan.data, Stream) and (count := processes.count()) > 1:  # each process' stream gives its part
        longer = lambda a: jax.ShapeDtypeStruct((count * a.shape[0], *a.shape[1:]), a.dtype)  # noqa: E731
        sizes = {"examples": count * plan.examples, "batch_size": count * plan.batch_size}
        plan = plan._replace(sample=jax.tree.map(longer, plan.sample), **sizes)
    if plan.batch_size % (parts := placement.split.parts):
        axes = " × ".join(f"{axis} {placement.mesh.shape[axis]}" for axis in placement.split.axes)
        raise ValueError(
            f"batch_size = {plan.batch_size} is split over {parts} devices ({axes}); expected a multiple of {parts}"
        )

    return plan._replace(
        step=sharded(plan.step, placement),
        evaluate=plan.evaluate and sharded_evaluate(plan.evaluate, placement),
        placement=placement,
    )


def on_mesh(plan: Plan, placement: Placement) -> Plan:
    """The plan whose arrays in memory are whole on each device, which takes its rows of them."""

    def whole(tree: PyTree) -> PyTree:
        return tree if is_read_ahead(tree) else put(tree, jax.tree.map(lambda _: placement.whole, tree))

    sets = plan.validation
    sets = {name: whole(held) for name, held in sets.items()} if is_several(sets) else whole(sets)
    return plan._replace(data=whole(plan.data), validation=sets)


def require_same_run(plan: Plan, ts: TrainState, run: Run | None, *options: Any) -> None:
    """Require of several processes that they make one run, of the same state, data and options."""
    if not processes.several():
        return
    sets = {name: held for name, held in sets_of(plan.validation).items() if plan.evaluate}
    arrays = {"data": plan.data, **sets}
    said = {
        "its folder": str(run and run.folder),
        "its configuration": as_json(run.config) if run else None,
        "the number of examples": plan.examples,
        "the batch size": plan.batch_size,
        "the last step": plan.end,
        "the number of steps of an epoch": plan.per_epoch,
        "the validation sets": [f"{name}, {_length(held)}" for name, held in sets.items()],
        "the number of steps between evaluations": plan.every,
        "the first state's leaves": [f"{path} {leaf.dtype}{leaf.shape}" for path, leaf in named_leaves(ts)],
        "the number of observers": len(options[-1]),
        "chunk_steps, keep, check_finite": [*options[:-1]],
    }
    processes.require_same("the run", said, "call fit with the same arguments in all")
    require_same_leaves(ts)
    arrays = {name: held for name, held in arrays.items() if not isinstance(held, Stream)}
    rows = {f"a sample of the rows of {name}": rows_digest(held) for name, held in arrays.items()}
    processes.require_same("data", rows, "give all processes the whole of them, of which each reads its part")


def _length(held: Any) -> str:
    return f"{held.steps_per_epoch} batches" if isinstance(held, Stream) else f"{count_rows(held)} examples"


def stream_of(meta: Mapping[str, Any], folder: Path) -> Any:
    """Where this process' stream stood."""
    streams, count = meta["streams"], processes.count()
    if len(streams) != count and any(state is not None for state in streams):
        raise RunError(
            f"{folder} was run by {len(streams)} processes, each with a stream of its own, and there are {count} now; "
            f"expected {len(streams)}: or give arrays, whose rows are known"
        )
    return streams[processes.index()] if len(streams) == count else None
