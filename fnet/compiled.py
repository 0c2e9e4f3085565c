"""Compiling each program of a run once, and saying why (`fit(explain=True)`)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from fnet.training import Step
from fnet.types import PyTree, TrainState, named_leaves

TRACED_UNDER = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_debug_nans",
    "jax_default_device",
)  # settings that a program depends on


@functools.lru_cache(maxsize=24)
def programs(step: Step, function: Callable) -> dict[Any, Any]:
    """The programs that a function of a step was compiled to, by what for, the latest at the end."""
    return {}


def compiled(
    function: Callable,
    owner: Step,
    options: Mapping[str, Any],
    arguments: Mapping[str, PyTree],
    explain: bool,
) -> tuple[Callable, float]:
    """``function(*arguments, **options)`` compiled, and how long that took: 0 where a run of ``owner`` had it compiled.

    The first of the arguments, the state, is donated.
    """
    settings: Any = jax.config
    traced_under = {name: getattr(settings, name) for name in TRACED_UNDER}
    known = programs(owner, function)
    shardings = tuple(getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments))
    kinds = leaves_of(arguments), jax.tree.structure(arguments), shardings
    signature = tuple({**options, **traced_under}.items()), *kinds
    begin = time.perf_counter()
    reason = reason_to_compile(signature, known)
    with cache_hits() as cached:
        if reason:
            known[signature] = lowered(functools.partial(function, **options), *arguments.values()).compile()
        else:
            known[signature] = known.pop(signature)  # the latest stands at the end
    took = time.perf_counter() - begin if reason else 0.0
    if explain:
        print(explanation(function.__name__, known[signature], reason, took, cached), flush=True)
    return known[signature], took


def lowered(function: Callable, ts: TrainState, *rest: PyTree):
    """The program that donates its first argument, and returns the state on the devices where it was."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, ts)
    spread = any(len(sharding.device_set) > 1 for sharding in jax.tree.leaves(shardings))
    if not spread:
        return jax.jit(function, donate_argnums=0).lower(ts, *rest)
    # else XLA is free to choose others, and the program would not take its own state
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, None)).lower(ts, *rest)


def leaves_of(tree: PyTree) -> tuple:
    """Each leaf's path, dtype, shape, weak type, and its devices where they are not the default."""

    def about(leaf) -> str:
        sharding = getattr(leaf, "sharding", None)
        usual = sharding is None or sharding.device_set == {jax.devices()[0]}
        weak = " weak" if getattr(leaf, "weak_type", False) else ""
        return f"{leaf.dtype}{tuple(leaf.shape)}{weak}{'' if usual else f' on {sharding}'}"

    return tuple((path, about(leaf)) for path, leaf in named_leaves(tree))


def reason_to_compile(signature, known: Mapping) -> str:
    """Why a program is compiled, in one line; empty if it is known."""
    if signature in known:
        return ""
    if not known:
        return "the first run of this step"
    before, now = (dict([*options, *leaves]) for options, leaves, *_ in (list(known)[-1], signature))
    changes = [
        f"{name} was {before.get(name, 'not there')} and is {now.get(name, 'not there')}"
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    ]
    more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
    return "; ".join(changes[:3]) + more or "the containers or the devices of the state or the data are others"


@contextmanager
def cache_hits():
    """How often jax's compilation cache on the disk had what was compiled within, as ``{"hits": 0, "misses": 0}``."""
    counts = {"hits": 0, "misses": 0}

    def listen(event: str, **_):
        for name in counts:
            counts[name] += event == f"/jax/compilation_cache/cache_{name}"

    jax.monitoring.register_event_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(listen)


def explanation(name: str, program, reason: str, took: float, cached: Mapping[str, int]) -> str:
    """What `fit(explain=True)` prints of a program, a line each."""
    memory = program.memory_analysis()
    arguments, donated, scratch = (
        size / 1e6 for size in (memory.argument_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes)
    )
    again = "not compiled again: same step, shapes, dtypes, options"
    hits = f" (compilation cache: {cached['hits']} hits, {cached['misses']} misses)" if sum(cached.values()) else ""
    return said(
        f"{name} {f'compiled in {took:.2f} s{hits}: {reason}' if reason else again}",
        f"{name}: {arguments:.3f} MB of arguments, of which {donated:.3f} MB, the state, are donated and changed in "
        f"place; {scratch:.3f} MB of scratch memory",
    )


def circumstances(ts: TrainState, keep: bool) -> str:
    """What `fit(explain=True)` prints of a run, a line each."""
    settings: Any = jax.config
    device = jax.devices()[0]
    in_use = (device.memory_stats() or {}).get("bytes_in_use")
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(ts)) / 1e6
    copies = "a copy is kept at each chunk's end" if keep else "no copies are kept"
    precision = settings.jax_default_matmul_precision or "the backend's default"
    return said(
        f"state: {state:.3f} MB; {copies}",
        f"products: {precision} precision; 64-bit numbers are {'on' if settings.jax_enable_x64 else 'off'}",
        f"compilation cache: {settings.jax_compilation_cache_dir or 'off'}",
        f"memory of {device.device_kind}: {f'{in_use / 1e6:.1f} MB in use' if in_use else 'not told by this backend'}",
    )


def said(*lines: str) -> str:
    """The lines as they are printed."""
    return "\n".join(f"explain: {line}" for line in lines)
