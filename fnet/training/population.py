"""Populations: many runs at once in one compiled program, over seeds and over any hyperparameter.

    run(hyper, key, *data) -> results                                a whole run as a pure function
    hyper, keys = crossed(grid(learning_rate=rates, b1=[0.5, 0.9]), jax.random.split(key, 8))
    population = train_population(run, hyper, keys, *data)           `jax.vmap` of it, compiled once

``run`` builds model, loss and optimizer from ``hyper``, a dict of numbers that are traced, and usually trains by
`fnet.train`; ``data`` are arguments of the compiled program. On the host ``hyper`` is a dict of arrays ``(M,)`` and
``keys`` is ``(M,)``: member i is ``run({name: values[i]}, keys[i], *data)``, with the same keys, masks and order of the
examples as that run alone, and the same numbers up to the rounding of sums that are taken in another order.

What a run computes from its key alone stands outside of whatever depends on the member's position: a condition on a
number that differs between members becomes a selection, which computes both of its branches at every step.

Legend: M members, K keys (seeds), S settings, D devices, n values that are averaged.
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
from jax.typing import ArrayLike

from fnet.core.jax_insides import transfers_meant
from fnet.optimizers.schedules import check_numbers
from fnet.types import PyTree, described, named_leaves, require_counts, stream

Run = Callable[..., PyTree]
Numbers = ArrayLike | Sequence[float]

# --- which members ---------------------------------------------------------------------------------------------------


def grid(**axes: Numbers) -> dict[str, np.ndarray]:
    """Every combination of the values of each axis, the last axis the fastest: a dict of arrays ``(M,)``.

    >>> {name: values.tolist() for name, values in grid(learning_rate=[0.1, 0.3], b1=[0.5, 0.9]).items()}
    {'learning_rate': [0.1, 0.1, 0.3, 0.3], 'b1': [0.5, 0.9, 0.5, 0.9]}
    """
    values = [np.atleast_1d(np.asarray(axis)) for axis in axes.values()]
    for name, axis in zip(axes, values, strict=True):
        if axis.ndim > 1 or not axis.size:
            raise ValueError(f"grid: {name} has shape {axis.shape}; expected a list of one number at least")
    combined = np.meshgrid(*values, indexing="ij")
    return {name: axis.ravel() for name, axis in zip(axes, combined, strict=True)}


def uniform(lo: float, hi: float) -> Callable[[np.ndarray], np.ndarray]:
    """For `draw`: numbers spread evenly from ``lo`` to ``hi``."""
    if not -math.inf < lo < hi < math.inf:
        raise ValueError(f"uniform: from {lo} to {hi}; expected finite lo < hi")
    return lambda u: lo + (hi - lo) * u


def log_uniform(lo: float, hi: float) -> Callable[[np.ndarray], np.ndarray]:
    """For `draw`: numbers whose logarithms are spread evenly from ``lo`` to ``hi``."""
    if not 0 < lo < hi < math.inf:
        raise ValueError(f"log_uniform: from {lo} to {hi}; expected finite 0 < lo < hi")
    return lambda u: lo * (hi / lo) ** u


def draw(key: jax.Array, count: int, **ranges: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """``count`` settings at random: a dict of arrays ``(count,)``.

    A range is `uniform`, `log_uniform` or any function of an array of numbers that are uniform from 0 to 1. What a name
    draws depends on the key and that name alone, so that another range may be added and this one stays.

    >>> settings = draw(jax.random.key(0), 3, learning_rate=log_uniform(1e-4, 1.0), b1=uniform(0.8, 0.99))
    >>> [f"{rate:.2g} {b1:.3f}" for rate, b1 in zip(*settings.values())]
    ['0.29 0.978', '0.17 0.904', '0.048 0.941']
    """
    require_counts("draw", count=count)
    u = {name: np.asarray(jax.random.uniform(stream(key, name), (count,)), np.float64) for name in ranges}
    return {name: values(u[name]) for name, values in ranges.items()}


def crossed(hyper: Mapping[str, Numbers], keys: jax.Array) -> tuple[dict[str, np.ndarray], jax.Array]:
    """Every setting ``(S,)`` with every key ``(K,)``: the hyper and the keys of ``S · K`` members, keys the fastest.

    `train_population` sees that members are crossed so and computes once for all settings what depends on the key
    alone: the order of the examples, the batches and the masks.
    """
    hyper = {name: np.atleast_1d(np.asarray(values)) for name, values in hyper.items()}
    settings = len(next(iter(hyper.values()))) if hyper else 1
    return {name: np.repeat(values, len(keys)) for name, values in hyper.items()}, keys[
        np.tile(np.arange(len(keys)), settings)
    ]


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
    _check_memory("train_population", memory)
    if not devices:
        raise ValueError("train_population: devices = []; expected one at least")
    data = jax.tree.map(jnp.asarray, data)
    check_range(run, hyper, keys, data)
    options = {"memory": memory, "devices": devices}
    seeds, settings = _crossing(hyper, keys)
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
    wanted = _members(first)
    for i, other in enumerate(others, start=1):
        found = _members(other)
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
    keys, results = jax.tree.map(lambda *parts: _joined(parts), *members)
    greatest = (max(getattr(population, name) for population in populations) for name in Population._fields[3:6])
    seconds = (sum(getattr(population, name) for population in populations) for name in Population._fields[6:])
    return Population(hyper, keys, results, *greatest, *seconds)


def _members(population: Population) -> dict[str, str]:
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
        shapes = jax.tree.map(partial(_shape, count, sharding), members)
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
        piece = jax.device_put(_take(members, rows), sharding)
        pieces.append(jax.tree.map(_host, compiled(*piece, *data)))
    results = jax.tree.map(lambda *parts: _joined(parts)[:total], *pieces)
    return results, Cost(count, round(each), len(devices), middle - begin, time.perf_counter() - middle)


def _shape(count: int, sharding, a) -> jax.ShapeDtypeStruct:
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


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _host(leaf):
    return leaf if _is_key(leaf) else np.asarray(leaf)


def _joined(parts):
    return parts[0] if len(parts) == 1 else (jnp if _is_key(parts[0]) else np).concatenate(parts)


def _take(tree: PyTree, rows) -> PyTree:
    return jax.tree.map(lambda a: a[rows], tree)


# --- what is checked before ------------------------------------------------------------------------------------------


def check_members(who: str, hyper: Mapping[str, Numbers], keys: jax.Array) -> tuple[dict[str, np.ndarray], jax.Array]:
    """The numbers as NumPy floats, as the program will have them; and the keys."""
    if not isinstance(keys, jax.Array) or not _is_key(keys) or keys.ndim != 1 or not len(keys):
        found = f"{keys.dtype}{keys.shape}" if isinstance(keys, jax.Array) else type(keys).__name__
        raise TypeError(f"{who}: keys are {found}; expected keys (M,): jax.random.split(jax.random.key(seed), M)")
    arrays = {}
    for name, values in hyper.items():
        values = np.asarray(values)
        if values.dtype.kind not in "biuf":
            raise TypeError(f"{who}: {name} has dtype {values.dtype}; expected numbers")
        if values.shape != keys.shape:
            remedy = "crossed(hyper, keys) makes members of settings and keys"
            raise ValueError(f"{who}: {name} has shape {values.shape}, keys {keys.shape}; expected one each: {remedy}")
        values = values.astype(jax.dtypes.canonicalize_dtype(float))
        if not np.isfinite(values).all():
            i = int((~np.isfinite(values)).argmax())
            raise ValueError(f"{who}: {name} of member {i} is {values[i]}; expected finite numbers")
        arrays[name] = values
    return arrays, keys


def check_range(run: Run, hyper: Mapping[str, np.ndarray], keys: jax.Array, data: tuple) -> PyTree:
    """Trace ``run`` with plain numbers at their extremes, which its constructors check; the shapes of its results.

    A range that holds for the least and for the greatest value of a name holds for all between them. The numbers are
    those of members that exist, as few as show every extreme: of a grid the first and the last.
    """
    some = {name: jax.ShapeDtypeStruct((), values.dtype) for name, values in hyper.items()}
    try:
        results = jax.eval_shape(run, some, keys[0], *data)
    except (TypeError, ValueError) as error:
        if names := _deciding(run, hyper, keys[0], data):
            name, values = names[0], [_plain(value) for value in np.unique(hyper[names[0]])]
            raise ValueError(
                f"{name} decides a shape or what is computed, and members of one program have that in common; expected "
                f"one population for each of {name} = {', '.join(f'{value:g}' for value in values)}, with a run that "
                f"takes it as a Python number: fnet.population.join(populations, {name}=values) makes one of them"
            ) from error
        raise
    extremes = [set(np.flatnonzero(v == edge)) for v in hyper.values() for edge in (v.min(), v.max())] or [{0}]
    while extremes:
        i = min(set.union(*extremes), key=lambda i: (-sum(i in e for e in extremes), i))
        extremes = [e for e in extremes if i not in e]
        numbers = {name: _plain(values[i]) for name, values in hyper.items()}
        try:
            jax.eval_shape(lambda key, *data, numbers=numbers: run(numbers, key, *data), keys[0], *data)
        except ValueError as error:
            shown = ", ".join(f"{name} = {number}" for name, number in numbers.items())
            raise ValueError(f"member {i} ({shown}): {error}") from error
    return results


def _deciding(run: Run, hyper: Mapping[str, np.ndarray], key: jax.Array, data: tuple) -> list[str]:
    """The names with which ``run`` is traced as Python numbers, whole ones as int, but not as traced ones."""
    numbers = {name: _plain(values[0]) for name, values in hyper.items()}
    numbers = {name: int(number) if number == int(number) else number for name, number in numbers.items()}

    def runs(**traced):
        try:
            jax.eval_shape(lambda traced, key, *data: run({**numbers, **traced}, key, *data), traced, key, *data)
        except (TypeError, ValueError):
            return False
        return True

    return [name for name, values in hyper.items() if not runs(**{name: values[0]})] if runs() else []


def _check_memory(who: str, memory: float | None) -> None:
    if memory is not None and memory != math.inf:
        check_numbers(who, positive=True, memory=memory)


def _plain(value: np.floating) -> float:
    """The number that is written as this one is: 0.1 for a float32 of 0.1, not 0.10000000149011612."""
    return float(str(value))


def _crossing(hyper: Mapping[str, np.ndarray], keys: jax.Array) -> tuple[int, int]:
    """K and S if the members are every setting with every key, as `crossed` orders them; else 1 and M."""
    words = np.asarray(jax.random.key_data(keys))
    seeds = len(np.unique(words, axis=0))
    if len(keys) % seeds == 0:
        tables = [words, *(values[:, None] for values in hyper.values())]
        cells = [table.reshape(len(keys) // seeds, seeds, -1) for table in tables]
        if (cells[0] == cells[0][:1]).all() and all((cell == cell[:, :1]).all() for cell in cells[1:]) and hyper:
            return seeds, len(keys) // seeds
    return 1, len(keys)


# --- what came of them -----------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """One of a population: ``run(hyper, key, *data)`` is it alone."""

    index: int
    hyper: dict[str, float]
    key: jax.Array
    value: float
    results: PyTree


def best(population: Population, values: ArrayLike, *, greatest: bool = False) -> Member:
    """The member of the least (or ``greatest``) of ``values (M,)``; of equal ones the first, and never one of NaN.

    ``best(population, population.results["validation_loss"][:, -1])``. The best of many is good by luck too: measure it
    on other data than those that chose it. Raises ValueError if every value is NaN.
    """
    values = per_member("best", population, values, 1)
    if np.isnan(values).all():
        raise ValueError("best: every value is NaN; expected one number at least")
    i = int(np.nanargmax(values) if greatest else np.nanargmin(values))
    hyper = {name: _plain(numbers[i]) for name, numbers in population.hyper.items()}
    return Member(i, hyper, population.keys[i], float(values[i]), _take(population.results, i))


class Band(NamedTuple):
    """Averages over the members that share a setting, in the order of the settings' numbers."""

    hyper: dict[str, np.ndarray]  # (S,) each
    count: np.ndarray  # (S,) members
    mean: np.ndarray  # (S, ...)
    std: np.ndarray  # of one member, (S, ...)
    low: np.ndarray
    high: np.ndarray


def band(
    population: Population, values: ArrayLike, by: str | Sequence[str] | None = None, *, level: float = 0.95
) -> Band:
    """Mean and confidence band of ``values (M, ...)`` over the members that have the same numbers.

    The band is ``mean ± t s / √n``, s the standard deviation with n − 1 and t Student's quantile, so that it holds the
    mean of all seeds with probability ``level``, as far as values are normal; it is NaN for n = 1, and where a value is
    not finite. ``by`` are the names that tell settings apart, by default all; over the other names, as over seeds, is
    averaged. Raises ValueError for an unknown name and a level that is not between 0 and 1.
    """
    values = per_member("band", population, values)
    numbers, group = settings_of(population, by)
    counts = np.bincount(group)
    parts = [student(values[group == g], level) for g in range(len(counts))]
    mean, std, half = (np.stack(part) for part in zip(*parts, strict=True))
    return Band(numbers, counts, mean, std, mean - half, mean + half)


class Ranking(NamedTuple):
    """Settings, the best first; see `ranking`."""

    hyper: dict[str, np.ndarray]  # (S,) each
    count: np.ndarray  # (S,) members
    mean: np.ndarray  # (S,), as in a Band
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    shared: np.ndarray  # seeds that a setting has in common with the best
    difference: np.ndarray  # its mean value on these less the best's
    difference_low: np.ndarray
    difference_high: np.ndarray
    tied: np.ndarray  # whether the interval of the difference holds 0


def ranking(population: Population, values: ArrayLike, *, greatest: bool = False, level: float = 0.95) -> Ranking:
    """Settings by the mean of ``values (M,)`` over seeds, least (or ``greatest``) first, and what ties with the best.

    The same key gives the same start, batches and masks at every setting, so a setting is compared with the best seed
    by seed: the interval is that of the mean of the differences over the seeds that both have, ``± t s / √n``. Where it
    holds 0, or there are fewer than two such seeds, the setting is ``tied``: these runs do not tell it from the best.
    The level is that of each comparison: of settings that truly tie, one in twenty is told apart at 0.95 from one that
    was fixed beforehand, and more from the luckiest. A setting with a value that is not finite comes last, not tied.

    Raises ValueError if two members have the same numbers and key, no setting has finite values only, or the level is
    not between 0 and 1.
    """
    values = per_member("ranking", population, values, 1)
    b = band(population, values, level=level)
    _, group = settings_of(population)
    _, seed = np.unique(np.asarray(jax.random.key_data(population.keys)), axis=0, return_inverse=True)
    pairs = np.stack([group, seed.ravel()], 1)
    if len(np.unique(pairs, axis=0)) < len(pairs):
        raise ValueError("ranking: two members have the same numbers and the same key; expected each pair once")
    finite = np.isfinite(b.mean)
    if not finite.any():
        raise ValueError("ranking: no setting has finite values only; expected one at least")
    order = np.lexsort((-b.mean if greatest else b.mean, ~finite))
    table = np.full((len(order), seed.max() + 1), np.nan)  # (S, K)
    table[group, seed.ravel()] = values
    with np.errstate(invalid="ignore"):
        differences = table - table[order[0]]
    rows = [d[np.isfinite(d)] for d in differences]
    compared = [student(d, level) if len(d) and ok else (np.nan,) * 3 for d, ok in zip(rows, finite, strict=True)]
    mean, _, half = np.array(compared).T
    tied = finite & ~((mean - half > 0) | (mean + half < 0))  # half is NaN for one seed
    fields = (*b[1:], np.array([len(d) for d in rows]), mean, mean - half, mean + half, tied)
    return Ranking({name: v[order] for name, v in b.hyper.items()}, *(field[order] for field in fields))


def settings_of(
    population: Population, by: str | Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The settings that differ in the names ``by`` (default: all), sorted, ``(S,)`` each; each member's, ``(M,)``."""
    hyper = population.hyper
    names = list(hyper) if by is None else [by] if isinstance(by, str) else list(by)
    for name in names:
        if name not in hyper:
            raise ValueError(f"no hyperparameter is called {name!r}; there are {', '.join(hyper) or 'none'}")
    table = np.stack([np.zeros(len(population.keys)), *(hyper[name] for name in names)], 1)
    _, first, group = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return {name: hyper[name][first] for name in names}, group.ravel()


def student(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and half the width of Student's interval of the mean, over the first axis ``n``."""
    if not 0 < level < 1:
        raise ValueError(f"level = {level}; expected 0 < level < 1, as 0.95")
    from scipy.special import stdtrit  # jax needs scipy; it costs 0.2 s to import

    n = len(values)
    with np.errstate(invalid="ignore"):
        mean = values.mean(0)
        std = values.std(0, ddof=1) if n > 1 else np.full_like(mean, np.nan)
    return mean, std, stdtrit(max(n - 1, 1), (1 + level) / 2) * std / math.sqrt(n)


def per_member(who: str, population: Population, values: ArrayLike, ndim: int | None = None) -> np.ndarray:
    """The values in float64, of which there must be one for each member."""
    values, members = np.asarray(values, np.float64), len(population.keys)
    if values.shape[:1] != (members,) or (ndim and values.ndim != ndim):
        shape = f"({members},)" if ndim else f"({members}, ...)"
        raise ValueError(f"{who}: values have shape {values.shape}; expected {shape}, one each of the members")
    return values


# --- successive halving ----------------------------------------------------------------------------------------------


class Halving(NamedTuple):
    """Who ran how long with which score: see `successive_halving`."""

    hyper: dict[str, np.ndarray]  # (M,) each
    keys: jax.Array  # (M,)
    epochs: np.ndarray  # (M,) that each member ran in all
    scores: np.ndarray  # (rungs, M), NaN where a member no longer ran
    survivors: np.ndarray  # members that ran to the end, the best first
    states: PyTree  # theirs, in the same order
    compile_seconds: float
    run_seconds: float


def successive_halving(
    begin: Callable,
    resume: Callable,
    hyper: Mapping[str, Numbers],
    keys: jax.Array,
    *data: PyTree,
    rungs: Sequence[int] = (1, 1, 2, 4),
    keep: float = 0.5,
    greatest: bool = False,
    memory: float | None = None,
    devices: Sequence[Any] | None = None,
) -> Halving:
    """All members run a little, the better part of them runs on, and again: most time goes to those that are good.

    Args:
        begin: ``begin(hyper, key, *data) -> state``, a pure function; the state is any tree of arrays, such as a
            `fnet.TrainState`.
        resume: ``resume(hyper, state, *data, epochs) -> state, score`` runs on for so many epochs (a Python int) and
            scores where it stands, on data that are not trained on; less is better unless ``greatest``.
        rungs: epochs of each rung.
        keep: the share of its members, rounded up, that goes on after each rung but the last; a score of NaN never
            comes before a number.
        hyper, keys, data, memory, devices: as in `train_population`.

    Each rung is one compiled program, for the members that are left. A member that goes on goes on from its state, so
    that it ends as the run that was never stopped. Source: Jamieson and Talwalkar, arXiv:1502.07943, where a setting
    is a random draw, and ``keep`` is 1/η.

    Raises:
        ValueError: as `train_population`; rungs that are not whole numbers of at least 1, a ``keep`` out of 0..1, a
            score that is not one number.
    """
    hyper, keys = check_members("successive_halving", hyper, keys)
    if not isinstance(rungs, Sequence) or not rungs:
        raise ValueError(f"successive_halving: rungs = {rungs!r}; expected a list of epochs, (1, 1, 2) for example")
    require_counts("successive_halving", **{f"rungs[{i}]": epochs for i, epochs in enumerate(rungs)})
    _check_memory("successive_halving", memory)
    if not 0 < keep <= 1:
        raise ValueError(f"successive_halving: keep = {keep}; expected 0 < keep <= 1")
    data = jax.tree.map(jnp.asarray, data)
    devices = list(jax.local_devices() if devices is None else devices)

    def first(hyper, key, *data):
        return resume(hyper, begin(hyper, key, *data), *data, epochs=rungs[0])

    def further(epochs):
        def further(hyper, state, *data):
            return resume(hyper, state, *data, epochs=epochs)

        return further

    score = check_range(first, hyper, keys, data)[1]
    if score.shape != ():
        raise ValueError(f"successive_halving: the score has shape {score.shape}; expected one number")
    alive, states = np.arange(len(keys)), keys
    ran, scores, seconds = np.zeros(len(keys), int), np.full((len(rungs), len(keys)), np.nan), np.zeros(2)
    for i, epochs in enumerate(rungs):
        function, members = further(epochs) if i else first, (_take(hyper, alive), states)
        (states, score), cost = run_members(function, members, data, None, memory=memory, devices=devices)
        ran[alive] += epochs
        score = np.asarray(score, np.float64)  # of any dtype: argsort puts NaN last, and −1 is less than 0
        scores[i, alive] = score
        seconds += cost.compile_seconds, cost.run_seconds
        order = np.argsort(-score if greatest else score, kind="stable")  # NaN last
        if i + 1 < len(rungs):
            order = order[: max(math.ceil(keep * len(alive) - 1e-9), 1)]
        alive, states = alive[order], _take(states, order)
    return Halving(hyper, keys, ran, scores, alive, states, *seconds.tolist())
