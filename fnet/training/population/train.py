"""All members of a population in one compiled program, in chunks and over devices.

Legend: M members, D devices.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fnet.core.checks import described, require_counts
from fnet.core.jax_insides import transfers_meant
from fnet.core.numerics import is_key
from fnet.core.trees import named_leaves
from fnet.optimizers.schedules import check_numbers
from fnet.training.population.members import Numbers, Run, check_members, check_range, crossing
from fnet.types import PyTree

# --- running them ----------------------------------------------------------------------------------------------------


class Population(NamedTuple):
    """What was run, with what, and how: see `train_population`."""

    hyper: dict[str, np.ndarray]  # (M,) each, as the program had it
    keys: jax.Array  # (M,)
    results: PyTree  # what run returned, with a leading axis of M, as NumPy
    chunk: int  # members in the program at a time
    member_bytes: int  # memory for each, as the compiler counts it
    devices: int
    compile_seconds: float
    run_seconds: float


@transfers_meant
def train_population(
    run: Run,
    hyper: Mapping[str, Numbers],
    keys: jax.Array,
    *data: PyTree,
    chunk: int | None = None,
    memory: float | None = None,
    devices: Sequence[Any] | None = None,
) -> Population:
    """``run(hyper, key, *data)`` of every member in one compiled program.

    Args:
        run: a pure function of a dict of numbers, a key and the data, which returns any tree of arrays.
        hyper: numbers by name, ``(M,)`` each, which the program has as the widest float in force; may be empty, for
            seeds alone.
        keys: ``(M,)``, as `jax.random.split` makes them.
        data: trees of arrays, the same for every member.
        chunk: so many members at a time, at most; then memory is not looked at. By default all of them, or as many as
            the ``memory`` holds.
        memory: bytes that the program may take on each device. By default 80 % of what the device says is free or,
            where it says nothing, of the machine's memory. If the compiler counts more for the program of all members,
            a smaller one is compiled, which takes chunks of them one after another.
        devices: those that members are spread over; by default all of this process. A CPU is one device, whose program
            of many small members keeps one core busy; with ``JAX_NUM_CPU_DEVICES=2`` in the environment it is two.

    Chunks are of one size, so that one program runs them all: the last is filled up with the last member again, and so
    is a chunk that the devices do not divide; what they compute is dropped.

    Before anything is compiled, ``run`` is traced with the plain numbers of the members that have the least and the
    greatest value of each name, so that what model, loss and optimizer check, they check. A check that relates two
    numbers sees those members only.

    Raises:
        ValueError: arrays of different lengths; a number that is not finite or, with its member and all of that one's
            numbers, out of its range; a chunk that is not a whole number of at least 1, a memory that is not above 0;
            no devices.
        TypeError: keys that are not keys; values or a memory that are not numbers.
        MemoryError: the compiler counts more than ``memory`` for a single member.

    >>> def run(hyper, key, data):
    ...     return jnp.where(jax.random.uniform(key, data.shape) < hyper["share"], data, 0).sum()
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> population = train_population(run, {"share": [0.0, 0.5, 1.0]}, keys, jnp.ones(100))
    >>> population.results.tolist(), population.chunk
    ([0.0, 57.0, 100.0], 3)
    """
    if not callable(run) or not isinstance(hyper, Mapping):
        raise TypeError(
            f"train_population: run is {described(run)} and hyper is {described(hyper)}; expected a function of "
            "(hyper, key, *data), then a dict of numbers by name, such as {'learning_rate': [0.1, 0.3]}"
        )
    hyper, keys = check_members("train_population", hyper, keys)
    devices = list(jax.local_devices() if devices is None else devices)
    require_counts("train_population", chunk=chunk)
    check_memory("train_population", memory)
    if not devices:
        raise ValueError("train_population: devices = []; expected one at least")
    data = jax.tree.map(jnp.asarray, data)
    check_range(run, hyper, keys, data)
    options = {"memory": memory, "devices": devices}
    seeds, settings = crossing(hyper, keys)
    if min(seeds, settings) > 1 and settings % len(devices) == 0 and (chunk or len(keys)) >= seeds * len(devices):
        # a member is a setting, with all keys within: nothing that depends on the key alone has an axis of settings
        within = jax.vmap(run, in_axes=(None, 0, *(None for _ in data)))
        members = ({name: values[::seeds] for name, values in hyper.items()},)
        try:
            results, cost = run_members(within, members, (keys[:seeds], *data), chunk and chunk // seeds, **options)
        except MemoryError:
            pass  # of one setting with all its keys
        else:
            results = jax.tree.map(lambda a: a.reshape(len(keys), *a.shape[2:]), results)
            cost = cost._replace(chunk=cost.chunk * seeds, member_bytes=cost.member_bytes // seeds)
            return Population(hyper, keys, results, *cost)
    results, cost = run_members(run, (hyper, keys), data, chunk, **options)
    return Population(hyper, keys, results, *cost)


def join(populations: Sequence[Population], **axes: Numbers) -> Population:
    """One population of the members of several, one after another; ``axes`` are what each of them had of its own.

    So members are compared that no program can run together, such as those of several widths:

    >>> def run(hyper, key, width):
    ...     return hyper["scale"] * jax.random.normal(key, (width,)).std()
    >>> keys, widths = jax.random.split(jax.random.key(0), 2), [10, 1000]
    >>> apart = [train_population(partial(run, width=width), {"scale": [1, 2]}, keys) for width in widths]
    >>> joined = join(apart, width=widths)
    >>> {name: values.tolist() for name, values in joined.hyper.items()}
    {'scale': [1.0, 2.0, 1.0, 2.0], 'width': [10, 10, 1000, 1000]}
    >>> joined.results.shape
    (4,)

    ``chunk``, ``member_bytes`` and ``devices`` are the greatest of theirs, seconds are added up. Raises ValueError for
    populations whose numbers have other names, or results another tree or other shapes of a member, and for an axis
    without one value for each.
    """
    if not populations:
        raise ValueError("join: populations = []; expected one at least")
    first, *others = populations
    for name, values in axes.items():
        if np.shape(values) != (len(populations),) or name in first.hyper:
            raise ValueError(
                f"join: {name} = {values!r:.80}; expected one value for each of {len(populations)} populations, under "
                f"a name that is not among theirs ({', '.join(first.hyper) or 'none'})"
            )
    wanted = said_of(first)
    for i, other in enumerate(others, start=1):
        found = said_of(other)
        if found != wanted:
            path = next(path for path in (*wanted, *found) if wanted.get(path) != found.get(path))
            raise ValueError(
                f"join: {path} of populations[0] is {wanted.get(path, 'not there')}, of populations[{i}] "
                f"{found.get(path, 'not there')}; expected the same of each member: let the runs return their scores"
            )
    counts = [len(population.keys) for population in populations]
    hyper = {name: np.concatenate([population.hyper[name] for population in populations]) for name in first.hyper}
    hyper |= {name: np.repeat(np.asarray(values), counts) for name, values in axes.items()}
    members = [(population.keys, population.results) for population in populations]
    keys, results = jax.tree.map(lambda *parts: joined(parts), *members)
    greatest = (max(getattr(population, name) for population in populations) for name in Population._fields[3:6])
    seconds = (sum(getattr(population, name) for population in populations) for name in Population._fields[6:])
    return Population(hyper, keys, results, *greatest, *seconds)


def said_of(population: Population) -> dict[str, str]:
    """What the numbers, the key and the results of one member are, by their paths."""
    parts = {"hyper": population.hyper, "keys": population.keys, "results": population.results}
    return {path: f"{leaf.dtype}{list(leaf.shape[1:])}" for path, leaf in named_leaves(parts)}


class Cost(NamedTuple):
    """How members were run: the last fields of a `Population`."""

    chunk: int
    member_bytes: int
    devices: int
    compile_seconds: float
    run_seconds: float


def run_members(
    function: Callable,
    members: tuple,
    data: tuple,
    chunk: int | None,
    *,
    memory: float | None,
    devices: Sequence[Any],
) -> tuple[PyTree, Cost]:
    """``function(*member, *data)`` of every member, by one program for all or for chunks of them.

    ``members`` are trees with a leading axis of M, ``data`` trees without one. Raises MemoryError if the program of one
    member a device takes more than ``memory``.
    """
    begin, total = time.perf_counter(), len(jax.tree.leaves(members)[0])
    devices = devices[:total]
    mesh = jax.make_mesh((len(devices),), ("members",), (AxisType.Auto,), devices=devices)
    apart, whole = PartitionSpec("members"), PartitionSpec()
    function = jax.vmap(function, in_axes=(0,) * len(members) + (None,) * len(data))
    if len(devices) > 1:  # a loop that waits for members waits for those of its own device only
        specs = (apart,) * len(members) + (whole,) * len(data)
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=apart, check_vma=False)
    program, data = jax.jit(function), jax.device_put(data, NamedSharding(mesh, whole))
    shared = sum(leaf.nbytes for leaf in jax.tree.leaves(data))
    limit = math.inf if chunk else _free(devices) if memory is None else memory
    sharding = NamedSharding(mesh, apart)

    def even(size: int) -> int:
        """Members on a device at a time, at most ``size``, so that as few chunks as that makes are of one size."""
        chunks = math.ceil(total / (size * len(devices)))
        return math.ceil(total / (chunks * len(devices)))

    size = even(max(chunk // len(devices), 1) if chunk else total)
    while True:
        count = size * len(devices)
        shapes = jax.tree.map(partial(shape_of, count, sharding), members)
        compiled = program.lower(*shapes, *data).compile()
        taken = _bytes(compiled)
        each = max(taken - shared, 0) / size
        if taken <= limit:
            break
        if size == 1:
            raise MemoryError(
                f"one member takes {each:,.0f} bytes beside {shared:,} of data; expected at most memory = {limit:,.0f}"
            )
        size = even(min(max(int((limit - shared) / each), 1), size - 1))
    middle, pieces = time.perf_counter(), []
    for first in range(0, total, count):
        rows = np.minimum(np.arange(first, first + count), total - 1)
        piece = jax.device_put(take_members(members, rows), sharding)
        pieces.append(jax.tree.map(on_host, compiled(*piece, *data)))
    results = jax.tree.map(lambda *parts: joined(parts)[:total], *pieces)
    return results, Cost(count, round(each), len(devices), middle - begin, time.perf_counter() - middle)


def shape_of(count: int, sharding, a) -> jax.ShapeDtypeStruct:
    """That of ``count`` members."""
    return jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype, sharding=sharding)


def _bytes(compiled) -> int:
    """What the compiler says that a program takes on each device: arguments, results and what lies between."""
    m = compiled.memory_analysis()
    if m is None:
        return 0
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def _free(devices: Sequence[Any]) -> float:
    """80 % of the bytes that each device has free by its own account, else of its share in the machine's memory."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in s for s in stats):
        return 0.8 * min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)
    if not hasattr(os, "sysconf"):
        return math.inf
    return 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)


def on_host(leaf):
    """An array of NumPy, or keys as they are."""
    return leaf if is_key(leaf) else np.asarray(leaf)


def joined(parts):
    """Pieces of one array."""
    return parts[0] if len(parts) == 1 else (jnp if is_key(parts[0]) else np).concatenate(parts)


def take_members(tree: PyTree, rows) -> PyTree:
    """Some of the members."""
    return jax.tree.map(lambda a: a[rows], tree)


def check_memory(who: str, memory: float | None) -> None:
    """Require of the bytes that a piece may take that they are a number above 0."""
    if memory is not None and memory != math.inf:
        check_numbers(who, positive=True, memory=memory)
