"""Compiling each program of a run once, keeping it on the disk, and saying why (`fit(explain=True)`)."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from fnet.core.jax_insides import reset_cache
from fnet.core.programs import Line, difference, digest, program_lines, settings_in_force
from fnet.core.trees import named_leaves
from fnet.training.collectives import sent_by_step
from fnet.training.steps import Step
from fnet.training.stopping import Reducer
from fnet.types import PyTree, TrainState

KEPT = 16  # programs, for the runs to come


class Kept(NamedTuple):
    """A compiled program, and what it was asked for."""

    program: Any
    owner: Step
    lines: list[str]
    about: dict[str, Any]


_kept: OrderedDict[Any, Kept] = OrderedDict()  # by what they compute, the latest at the end
_asked: OrderedDict[Any, Any] = OrderedDict()  # their keys, by what was asked for: so a step is not traced again
_lock = threading.RLock()


def compiled(
    function: Callable,
    owner: Step,
    options: Mapping[str, Any],
    arguments: Mapping[str, PyTree],
    explain: bool,
) -> tuple[Callable, float]:
    """``function(*arguments, **options)`` compiled, and how long that took: 0 where a run had compiled the same.

    The same is what computes the same, `program_lines`, of whatever functions it is made, under the same settings of
    jax. The first of the arguments, the state, is donated. Under `jax.disable_jit` nothing is compiled, and Python runs
    the function at every call.
    """
    settings: Any = jax.config
    if settings.jax_disable_jit:
        if explain:
            print(said(f"{function.__name__} is not compiled: jax.disable_jit is in force"), flush=True)
        return functools.partial(function, **options), 0.0
    traced_under = settings_in_force()
    shardings = tuple(getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments))
    leaves, structure = leaves_of(arguments), jax.tree.structure(arguments)
    asked = function, owner, *{**options, **traced_under}.items(), leaves, structure, shardings
    begin, reason = time.perf_counter(), ""
    with _lock, cache_hits() as cached:
        key = _asked.get(asked)
        if traced_anew := key not in _kept:
            traced = jitted(functools.partial(function, **options), next(iter(arguments.values()))).trace(
                *arguments.values()
            )
            lines = program_lines(traced.jaxpr, callbacks=True)
            made = structure, jax.tree.structure(traced.out_info)
            key = function, digest(lines), *made, shardings, tuple(traced_under.values())
            if key not in _kept:
                about = {**options, **traced_under, **dict(leaves)}
                reason = reason_to_compile(function, owner, about, lines)
                _kept[key] = Kept(traced.lower().compile(), owner, [line.text for line in lines], about)
        _asked[asked] = key
        for memory, most in ((_kept, key), (_asked, asked)):
            memory.move_to_end(most)
            while len(memory) > KEPT:
                memory.popitem(last=False)
        program = _kept[key].program
    took = time.perf_counter() - begin if traced_anew else 0.0
    if explain:
        print(explanation(function.__name__, program, reason, took, cached), flush=True)
    return program, took


def jitted(function: Callable, ts: TrainState):
    """The function that donates its first argument, and returns the state on the devices where it was."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, ts)
    spread = any(len(sharding.device_set) > 1 for sharding in jax.tree.leaves(shardings))
    if not spread:
        return jax.jit(function, donate_argnums=0)
    # else XLA is free to choose others: the program would not take its own state, nor each process read the metrics
    mesh = next(s.mesh for s in jax.tree.leaves(shardings) if isinstance(s, NamedSharding))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, whole))


def leaves_of(tree: PyTree) -> tuple:
    """Each leaf's path, dtype, shape, weak type, and its devices where they are not the default."""

    def about(leaf) -> str:
        sharding = getattr(leaf, "sharding", None)
        usual = sharding is None or sharding.device_set == {jax.devices()[0]}
        weak = " weak" if getattr(leaf, "weak_type", False) else ""
        return f"{leaf.dtype}{tuple(leaf.shape)}{weak}{'' if usual else f' on {sharding}'}"

    return tuple((path, about(leaf)) for path, leaf in named_leaves(tree))


def reason_to_compile(function: Callable, owner: Step, about: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """Why a program is compiled, in one line."""
    same = [kept for (of, *_), kept in _kept.items() if of is function and kept.owner is owner]
    if not same:
        return "the first run of this step"
    before = same[-1].about
    changes = [
        f"{name} was {before.get(name, 'not there')} and is {about.get(name, 'not there')}"
        for name in {**about, **before}
        if before.get(name) != about.get(name)
        and not callable(about.get(name))
        and not isinstance(about.get(name), Reducer)
    ]
    more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
    return "; ".join(changes[:3]) + more or f"it computes something else: {difference(same[-1].lines, lines)}"


@contextmanager
def cached_in(folder: str | os.PathLike[str] | None):
    """What `keep_compiled` sets holds within; with None what held before."""
    if folder is None:
        yield
        return
    before = keep_compiled(folder)
    try:
        yield
    finally:
        _set(before)


def keep_compiled(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """From here on jax keeps all programs that it compiles in the folder, and takes from there what it has kept.

    All: also those that are small or compile quickly. Returns the settings that held before. The folder is made where
    there is none; raises ValueError where that cannot be, or where nothing can be written there.
    """
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise TypeError(f"cache = {folder!r}; expected a folder's path, or None")
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        what = "is no folder" if isinstance(error, FileExistsError | NotADirectoryError) else "cannot be written"
        raise ValueError(
            f"cache = {str(folder)!r} {what} ({error.strerror}); expected a folder for compiled programs that this "
            "process may write, or the path of one to be made: None keeps none"
        ) from None
    return _set(
        {
            "jax_enable_compilation_cache": True,
            "jax_compilation_cache_dir": str(path),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
    )


def _set(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of jax's compilation cache; returns what they were."""
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # jax looks at them once
    return before


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
    again = "not compiled again: it computes the same on the same shapes, dtypes and devices"
    hits = f" (compilation cache: {cached['hits']} hits, {cached['misses']} misses)" if sum(cached.values()) else ""
    sent = sent_by_step(program.as_text()) if jax.device_count() > 1 else {}
    each = ", ".join(f"{kind} {some.count} times, {some.bytes / 1e6:.3f} MB" for kind, some in sent.items())
    return said(
        f"{name} {f'compiled in {took:.2f} s{hits}: {reason}' if reason else again}",
        f"{name}: {arguments:.3f} MB of arguments, of which {donated:.3f} MB, the state, are donated and changed in "
        f"place; {scratch:.3f} MB of scratch memory",
        *([f"{name}: each device sends in a step: {each}"] if sent else []),
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
