"""Traced programs as text, without names and places: two that compute the same have the same lines.

    lines = program_lines(jax.make_jaxpr(step)(ts, batch))
    digest(lines)                     what a run is compared by when it is resumed, and a compiled program kept by
    difference(lines, others)         where two part, in words

A line is an operation: its primitive and parameters, the numbers of its operands, and the types of what it gives.
Constants are told by a hash of their bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fnet.core.interpret import is_array
from fnet.core.jax_insides import ClosedJaxpr, Jaxpr, Literal, value_of, variables
from fnet.core.numerics import is_key

NOTHING = (  # parameters that say how an operation is written, differentiated or called, not what it computes
    *("name", "debug_info", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "inline", "keep_unused"),
    *(
        "computation",
        "ctx_mesh",
        "compiler_options_kvs",
        "donated_invars",
        "in_layouts",
        "out_layouts",
        "symbolic_zeros",
    ),
)


TRACED_UNDER = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_default_prng_impl",
    "jax_random_seed_offset",
    "jax_default_device",
)  # settings that a program depends on


def settings_in_force() -> dict[str, Any]:
    """The settings of jax that a program depends on, by name."""
    return {name: getattr(jax.config, name) for name in TRACED_UNDER}


ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]+")  # in the text of an object that does not say what it holds


class Line(NamedTuple):
    """An operation, and the layers or stages of the model that it stands in."""

    text: str
    place: str


def program_lines(closed: ClosedJaxpr, *, callbacks: bool = False) -> list[Line]:
    """The program's lines. With ``callbacks``, functions of Python that it calls back count by their identity."""
    return [*constant_lines(closed, callbacks), *_lines(closed.jaxpr, _Telling(callbacks), 0)]


def constant_lines(closed: ClosedJaxpr, callbacks: bool = False) -> list[Line]:
    """A line for each array that the program closes over."""
    return [Line(f"constant {_shown(const, _Telling(callbacks))[0]}", "") for const in closed.consts]


def operation_lines(closed: ClosedJaxpr) -> tuple[list[Line], list[Any]]:
    """The lines of all operations, also of those that nothing comes of, whatever arrays the program closes over.

    Beside them what they do not tell: functions of Python, and objects that do not say what they hold.
    """
    untold: list[Any] = []
    return list(_lines(closed.jaxpr, _Telling(everything=True, untold=untold), 0)), untold


def digest(lines: Sequence[Line] | Sequence[str]) -> str:
    """A hash of the lines, whatever their places."""
    texts = (line.text if isinstance(line, Line) else line for line in lines)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def difference(before: Sequence[str], now: Sequence[Line]) -> str:
    """Where a program parts from what it was, in words: the first operation that is another."""
    for k, (old, new) in enumerate(zip(before, now, strict=False)):
        if old != new.text:
            at = f" in {new.place}" if new.place else ""
            return f"operation {k}{at} was `{_shortened(old, new.text)}` and is `{_shortened(new.text, old)}`"
    return f"it has {len(now)} operations and had {len(before)}"


def _shortened(line: str, other: str, most: int = 80) -> str:
    """The operation's name, and what follows from where the lines part."""
    same = next((k for k, (a, b) in enumerate(zip(line, other, strict=False)) if a != b), min(len(line), len(other)))
    name, begin = line.strip().split("[")[0], max(line.rfind(" ", 0, same) + 1, 0)
    rest = line[begin : begin + most]
    return f"{'' if rest.startswith(name) else f'{name} … '}{rest}{'…' if begin + most < len(line) else ''}"


class _Telling(NamedTuple):
    """How programs are told."""

    callbacks: bool = False  # by their identity
    everything: bool = False  # operations that nothing comes of, too
    untold: list | None = None  # gets what the lines do not tell

    def of(self, value: Any) -> None:
        """Keep in mind a value that the lines do not tell."""
        if self.untold is not None:
            self.untold.append(value)


def _lines(jaxpr: Jaxpr, telling: _Telling, depth: int) -> Iterator[Line]:
    numbers: dict[Any, int] = {}

    def number(var) -> str:
        return str(numbers.setdefault(var, len(numbers)))

    def operand(atom) -> str:
        if isinstance(atom, Literal):
            return f"{atom.aval.str_short()}={value_of(atom)}"
        return number(atom)

    indent = "  " * depth
    given = [f"{number(var)}:{var.aval.str_short()}" for var in (*jaxpr.constvars, *jaxpr.invars)]
    yield Line(f"{indent}given {' '.join(given)}", "")
    for eqn in jaxpr.eqns if telling.everything else _needed(jaxpr):
        words, inner = [], []
        for name in sorted(eqn.params):
            if name not in NOTHING:
                word, bodies = _shown(eqn.params[name], telling)
                if "UnspecifiedValue" not in word:  # of a sharding
                    words.append(f"{name}={word}")
                inner += bodies
        operands = " ".join(map(operand, eqn.invars))
        made = " ".join(f"{number(var)}:{var.aval.str_short()}" for var in eqn.outvars)
        place = str(eqn.source_info.name_stack)
        yield Line(f"{indent}{eqn.primitive.name}[{' '.join(words)}] {operands} -> {made}", place)
        for body in inner:
            for line in _lines(body, telling, depth + 1):
                yield line if line.place else line._replace(place=place)
    yield Line(f"{indent}returns {' '.join(map(operand, jaxpr.outvars))}", "")


def _needed(jaxpr: Jaxpr) -> list:
    """The operations that something comes of: a layer that draws nothing has a key too, made of its name."""
    read, kept = set(variables(jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in read for var in eqn.outvars):
            kept.append(eqn)
            read.update(variables(eqn.invars))
    return kept[::-1]


def _shown(value: Any, telling: _Telling) -> tuple[str, list[Jaxpr]]:
    """A parameter as a word, and the programs within it."""
    if value is None or isinstance(value, bool | int | float | np.dtype):
        return repr(value), []
    if isinstance(value, ClosedJaxpr):
        constants = " ".join(_shown(const, telling)[0] for const in value.consts)
        return f"program({constants})", [value.jaxpr]
    if isinstance(value, Jaxpr):
        return "program", [value]
    if isinstance(value, Mapping):
        value = sorted(value.items(), key=repr)
    if isinstance(value, set | frozenset):  # whose order differs from process to process
        value = sorted(value, key=repr)
    if isinstance(value, tuple | list):
        parts = [_shown(item, telling) for item in value]
        return f"({', '.join(word for word, _ in parts)})", [body for _, bodies in parts for body in bodies]
    if is_array(value):
        if is_key(value):
            value = jax.random.key_data(value)
        host = np.asarray(value)
        if host.size == 1:
            return f"{host.dtype}{list(host.shape)} {host.item()!r}", []
        return f"{host.dtype}{host.shape}#{hashlib.sha256(host.tobytes()).hexdigest()[:16]}", []
    meshes = jax.sharding.Mesh | jax.sharding.AbstractMesh  # which can be called
    if isinstance(value, Callable) and not isinstance(value, type | meshes):
        telling.of(value)
        return f"function {id(value)}" if telling.callbacks else "function", []
    text = repr(value)
    without = ADDRESS.sub("", text)
    if without != text:
        telling.of(value)
    return without, []
