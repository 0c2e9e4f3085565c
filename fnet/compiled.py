"""Compiling the chunk's program once, and saying why (`fit(explain=True)`)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from fnet.chunks import run_chunk
from fnet.plan import Plan
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


@functools.lru_cache(maxsize=8)
def programs(step: Step) -> dict[Any, Any]:
    """The compiled programs of a step, by what they were compiled for, the latest at the end."""
    return {}


def compiled(plan: Plan, ts: TrainState, keep: bool, explain: bool) -> tuple[Callable, float]:
    """The chunk's program, and how long it took to compile: nothing where an earlier run has compiled the same."""
    options = {
        "batch_size": plan.batch_size,
        "shuffle": plan.shuffle,
        "evaluate": plan.evaluate,
        "every": plan.every if plan.evaluate else 0,
        "stop": plan.stop,
        "capacity": plan.capacity,
    }
    settings: Any = jax.config
    traced_under = {name: getattr(settings, name) for name in TRACED_UNDER}
    known, arrays = programs(plan.step), {"state": ts, "data": plan.data, "validation": plan.validation}
    signature = tuple({**options, **traced_under}.items()), leaves_of(arrays), jax.tree.structure(arrays)
    begin = time.perf_counter()
    reason = reason_to_compile(signature, known)
    with cache_hits() as cached:
        if reason:
            function = jax.jit(functools.partial(run_chunk, step=plan.step, **options), donate_argnums=0)
            arguments = ts, jnp.asarray(0, jnp.int32), plan.data, plan.validation
            known[signature] = function.lower(*arguments).compile()
        else:
            known[signature] = known.pop(signature)  # the latest stands at the end
    took = time.perf_counter() - begin if reason else 0.0
    if explain:
        print(explanation(known[signature], reason, took, cached, ts, keep), flush=True)
    return known[signature], took


def leaves_of(tree: PyTree) -> tuple:
    """Each leaf's path, dtype, shape and weak type."""
    return tuple(
        (path, f"{leaf.dtype}{tuple(leaf.shape)}{' weak' if getattr(leaf, 'weak_type', False) else ''}")
        for path, leaf in named_leaves(tree)
    )


def reason_to_compile(signature, known: Mapping) -> str:
    """Why a program is compiled, in one line; empty if it is known."""
    if signature in known:
        return ""
    if not known:
        return "the first run of this step"
    for old, new in zip(list(known)[-1][:2], signature[:2], strict=True):
        before, now = dict(old), dict(new)
        for name in {**now, **before}:
            if before.get(name) != now.get(name):
                return f"{name} was {before.get(name, 'not there')} and is {now.get(name, 'not there')}"
    return "the containers of the state or the data are others"


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


def explanation(program, reason: str, took: float, cached: Mapping[str, int], ts: TrainState, keep: bool) -> str:
    """What `fit(explain=True)` prints, a line each."""
    memory = program.memory_analysis()
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(ts))
    settings: Any = jax.config
    folder = settings.jax_compilation_cache_dir
    where = f"{cached['hits']} hits, {cached['misses']} misses in {folder}" if folder else "off"
    device = jax.devices()[0]
    in_use = (device.memory_stats() or {}).get("bytes_in_use")
    held = f"{in_use / 1e6:.1f} MB in use" if in_use else "not told by this backend"
    precision = settings.jax_default_matmul_precision or "the backend's default"
    donated = memory.alias_size_in_bytes / 1e6
    copies = "a copy is kept at each chunk's end" if keep else "no copies are kept"
    sizes = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    lines = [
        f"compiled in {took:.2f} s: {reason}" if reason else "not compiled again: same step, shapes, dtypes, options",
        f"compilation cache: {where}",
        f"state: {state / 1e6:.3f} MB, of which {donated:.3f} MB are donated and changed in place; {copies}",
        f"program: {sizes[0]:.3f} MB of arguments, {sizes[1]:.3f} MB of scratch memory",
        f"products: {precision} precision; 64-bit numbers are {'on' if settings.jax_enable_x64 else 'off'}",
        f"memory of {device.device_kind}: {held}",
    ]
    return "\n".join(f"explain: {line}" for line in lines)
