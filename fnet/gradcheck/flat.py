"""Flat programs: a traced function as one list of equations, each of its values a NumPy array with a number.

Calls, loops and branches are taken apart, what is computed twice is computed once, and what nobody needs is left out.
Names (`fnet.tap`) are no equations here: they name the values that they were given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.interpret import HIDDEN, STEP, evaluate, walk
from fnet.core.jax_insides import Literal, bind, value_of
from fnet.core.numerics import is_key, words_of
from fnet.core.trees import named_leaves
from fnet.gradients.intermediates import PREFIX
from fnet.types import PyTree

KINDS = ("forward:", "inputs:", "inner:", "dy:", "dx:")  # of marks; a tap without one names a value of the forward
MOST_EQUATIONS = 20_000
MOST_NUMBERS = 20_000_000
OWN = str(Path(__file__).parents[1])
# what the code of a layer or a loss is called by
PASSING = (*HIDDEN, *(f"{OWN}/{place}" for place in ("gradcheck/", "gradients/", "layers/children.py", "types.py")))


class Equation(NamedTuple):
    """One operation; its operands and what it gives are numbers of values."""

    primitive: str
    params: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scope: str  # what it stands in: "dense_0", "backward/lstm_0/t=3"
    lines: tuple[tuple[str, int], ...]  # file and line of the code that it comes from, the innermost first


class Program(NamedTuple):
    """A pass as equations in order; ``values`` holds every number of it: what is given, constants and results.

    ``given``, ``marks`` and ``outputs`` are numbers of values by name.
    """

    values: list[np.ndarray]
    equations: tuple[Equation, ...]
    given: dict[str, int]
    constants: tuple[int, ...]
    marks: dict[str, int]
    outputs: dict[str, int]

    def value(self, name: str) -> np.ndarray:
        """The value of this name; KeyError with the names that there are."""
        for names in (self.marks, self.outputs, self.given):
            if name in names:
                return self.values[names[name]]
        raise KeyError(f"no value is called {name!r}; there are {', '.join((*self.given, *self.marks, *self.outputs))}")


def flattened(who: str, run: Callable[[PyTree], PyTree], given: PyTree) -> Program:
    """``run(given)`` as a flat program with its values; outputs under ``marks`` are marks.

    Raises ValueError where a branch or a loop depends on values, and where the program is too long.
    """
    closed, shapes = jax.make_jaxpr(run, return_shape=True)(given)
    size = [math.prod(place.lengths) for place in walk(closed.jaxpr)]
    if sum(size) > MOST_EQUATIONS:
        raise ValueError(
            f"{who}: the pass has {sum(size):,} operations; expected at most {MOST_EQUATIONS:,}: "
            "take fewer examples, steps or layers"
        )
    leaves = named_leaves(given)
    try:
        flat = jax.make_jaxpr(lambda *leaves: evaluate(closed, leaves, unroll=True)[0])(*(leaf for _, leaf in leaves))
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"{who}: a branch (lax.cond, lax.switch) or a while loop of this pass goes by values, so that it is no "
            "list of operations; expected scans and calls alone. Attention branches with block_size: leave it None"
        ) from error
    numbers = _Numbers()
    known: dict = {}  # variable -> number

    def number(atom):
        return numbers.constant(value_of(atom)) if isinstance(atom, Literal) else known[atom]

    for variable, (_, leaf) in zip(flat.jaxpr.invars, leaves, strict=True):
        known[variable] = numbers.new(leaf)
    for variable, value in zip(flat.jaxpr.constvars, flat.consts, strict=True):
        known[variable] = numbers.constant(value)
    given_numbers = {name: known[v] for (name, _), v in zip(leaves, flat.jaxpr.invars, strict=True)}
    marks: dict[str, int] = {}
    equations: list[Equation] = []
    before: dict[Any, tuple[int, ...]] = {}  # what was computed already
    for eqn in flat.jaxpr.eqns:
        inputs, scope = tuple(number(atom) for atom in eqn.invars), str(eqn.source_info.name_stack)
        if eqn.primitive.name == "name":
            name = str(eqn.params["name"])
            if name.startswith(PREFIX):
                steps = ".".join(re.findall(rf"{STEP}(\d+)", scope))
                name = name.removeprefix(PREFIX) + (f"@{steps}" if steps else "")
                marks[name if name.startswith(KINDS) else f"forward:{name}"] = inputs[0]
            known[eqn.outvars[0]] = inputs[0]
            continue
        if (same := numbers.sum_with_zero(eqn.primitive.name, inputs)) is not None:
            known[eqn.outvars[0]] = same
            continue
        told = (eqn.primitive.name, str(sorted(eqn.params.items(), key=lambda item: item[0])), inputs)
        if told not in before:
            before[told] = tuple(numbers.new(value) for value in bind(eqn, [numbers.arrays[i] for i in inputs]))
            if all(i in numbers.constants for i in inputs):
                numbers.derived.update(before[told])
            equations.append(
                Equation(eqn.primitive.name, eqn.params, inputs, before[told], scope, _lines(eqn.source_info.traceback))
            )
        known.update(zip(eqn.outvars, before[told], strict=True))
        if numbers.total > MOST_NUMBERS:
            raise ValueError(
                f"{who}: the pass has more than {MOST_NUMBERS:,} numbers; take fewer examples, or a smaller model"
            )
    outputs = {name: number(atom) for atom, (name, _) in zip(flat.jaxpr.outvars, named_leaves(shapes), strict=True)}
    for name in [name for name in outputs if name.startswith("marks/")]:
        marks[name.removeprefix("marks/")] = outputs.pop(name)
    return _pruned(numbers, equations, given_numbers, marks, outputs)


class _Numbers:
    """The values of a program as they get their numbers."""

    def __init__(self):
        self.arrays: list[Any] = []
        self.constants: dict[int, None] = {}
        self.derived: set[int] = set()  # computed of constants alone
        self.total = 0
        self.by_bytes: dict[Any, int] = {}

    def new(self, value) -> int:
        self.arrays.append(value)
        self.total += np.size(value)
        return len(self.arrays) - 1

    def constant(self, value) -> int:
        host = on_host(value)
        told = host.dtype.str, host.shape, host.tobytes()
        if is_key(value) or told not in self.by_bytes:
            self.by_bytes[told] = self.new(jnp.asarray(value))
            self.constants[self.by_bytes[told]] = None
        return self.by_bytes[told]

    def sum_with_zero(self, primitive: str, inputs: tuple[int, ...]) -> int | None:
        """The other summand, of its shape, where one is a constant of zeros, as the offsets of autodiff are."""
        if primitive not in ("add", "add_any"):
            return None
        for zero, other in (inputs, inputs[::-1]):
            fixed = zero in self.constants or zero in self.derived
            if fixed and np.shape(self.arrays[zero]) == np.shape(self.arrays[other]) and not np.any(self.arrays[zero]):
                return other
        return None


def _pruned(numbers: _Numbers, equations: list[Equation], given, marks, outputs) -> Program:
    """The program without what no mark and no output needs, values numbered anew in order."""
    needed = {*given.values(), *marks.values(), *outputs.values()}
    kept = []
    for eqn in reversed(equations):
        if not needed.isdisjoint(eqn.outputs):
            needed.update(eqn.inputs)
            needed.update(eqn.outputs)
            kept.insert(0, eqn)
    new = {old: i for i, old in enumerate(sorted(needed))}
    renamed = lambda names: {name: new[i] for name, i in names.items()}  # noqa: E731
    return Program(
        [on_host(numbers.arrays[old]) for old in new],
        tuple(
            eqn._replace(inputs=tuple(map(new.get, eqn.inputs)), outputs=tuple(map(new.get, eqn.outputs)))  # pyright: ignore
            for eqn in kept
        ),
        renamed(given),
        tuple(new[i] for i in numbers.constants if i in new),
        renamed(marks),
        renamed(outputs),
    )


def on_host(value) -> np.ndarray:
    """A value as NumPy has it; a key as its words."""
    return np.asarray(words_of(value))


def _lines(traceback) -> tuple[tuple[str, int], ...]:
    found = []
    for frame in traceback.frames if traceback is not None else ():
        if frame.file_name.startswith("<") or any(part in frame.file_name for part in PASSING):
            continue
        found.append((frame.file_name, frame.line_num))
    return tuple(found[:4])
