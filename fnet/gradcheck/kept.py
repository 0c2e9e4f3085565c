"""The programs of audits, compiled side by side and kept by what they compute, so that the same is compiled once.

    program = prepared("derivative", derivative, closed, arguments)    begins to compile `derivative(closed)`
    program(*arguments)                                                waits until it has, and runs it

A program is told by its operations, the types and devices of its arguments and the settings of jax in force. The arrays
that it closes over are arguments too: with other ones it is the same program. What holds more than its lines tell, as a
callback does, is compiled every time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import numpy as np

from fnet.core.compiling import compiling
from fnet.core.interpret import CUSTOM, body_of_call, defined_in_jax, evaluate, is_array, walk
from fnet.core.jax_insides import ClosedJaxpr, Jaxpr, constant, quick_options
from fnet.core.numerics import bytes_of, words_of
from fnet.core.programs import constant_lines, digest, operation_lines, settings_in_force

KEPT = 256  # programs, for the audits to come
MOST, LARGEST = 2**28, 2**25  # bytes of arrays that are part of them, and of one
NUMBERS = bool | int | float | complex


class Told(NamedTuple):
    """What a traced program computes, whatever the arrays that it closes over."""

    key: str
    whole: bool  # nothing is left that the key does not tell
    ruled: bool  # rules of the user's own take part, which it does not tell either: they are not the program itself
    size: int  # bytes of arrays within its calls, which are part of it


class Opened(NamedTuple):
    """A program with the arrays that it closes over, traced ones too."""

    jaxpr: Jaxpr
    consts: list


class Program(NamedTuple):
    """A program that is compiled, or being compiled; what it closes over is given each time."""

    consts: list
    compiling: Future

    def __call__(self, *arguments):
        return self.compiled(self.consts, *arguments)

    @property
    def compiled(self) -> Any:
        """What jax compiled; waits for it."""
        return self.compiling.result()


_told: WeakKeyDictionary[ClosedJaxpr, Told] = WeakKeyDictionary()
_kept: OrderedDict[Any, tuple[Future, int]] = OrderedDict()  # by what they compute, the latest at the end; their bytes
_lock = threading.Lock()


def told(closed: ClosedJaxpr) -> Told:
    """What a program computes: found once for each trace."""
    if (known := _told.get(closed)) is not None:
        return known
    lines, untold = operation_lines(closed)
    calls = [(place.site, place.eqn) for place in walk(closed.jaxpr) if body_of_call(place.eqn) is not None]
    # of rules those of jax itself count, by which autodiff goes: a program whose lines are the same may have its own
    custom = [(site, eqn) for site, eqn in calls if eqn.primitive.name in CUSTOM]
    rules = [f"{site} {source(eqn)}" for site, eqn in custom if defined_in_jax(eqn)]
    size = sum(size_of(body_of_call(eqn).consts) for _, eqn in calls)  # pyright: ignore
    closed_over = all(is_array(c) or isinstance(c, NUMBERS) for c in closed.consts)
    whole = not untold and closed_over and not closed.jaxpr.effects
    key = digest([*(line.text for line in lines), *rules])
    _told[closed] = Told(key, whole, len(rules) < len(custom), size)
    return _told[closed]


def size_of(consts: list) -> int:
    """Bytes of arrays that are closed over."""
    return bytes_of([c for c in consts if is_array(c)])


def source(eqn) -> str:
    """The function that a custom rule belongs to, with its place."""
    return body_of_call(eqn).jaxpr.debug_info.func_src_info  # pyright: ignore


def same_program(first: ClosedJaxpr, second: ClosedJaxpr) -> bool:
    """Whether two traces are one program with the same constants."""
    if told(first).key != told(second).key:
        return False
    return all(
        a is b or not is_array(a) or np.asarray(words_of(a)).tobytes() == np.asarray(words_of(b)).tobytes()
        for a, b in zip(first.consts, second.consts, strict=True)
    )


def prepared(name: str, make: Callable, closed: ClosedJaxpr, arguments: tuple, *, quick: bool = True) -> Program:
    """``make(closed)(*arguments)`` compiled, or being compiled; a program that is kept is not even traced.

    ``name`` stands for ``make``, a function of nothing but the program. ``quick`` ones are compiled without the
    optimisations that take long. Else the program is the one that `jax.jit` makes of it, with what it closes over.
    """
    about = told(closed)
    consts: list = []
    if quick and about.whole:
        pairs = zip(closed.consts, closed.jaxpr.constvars, strict=True)
        consts = [jax.device_put(constant(value, var.aval)) for value, var in pairs]
    baked = bool(closed.consts) and not consts
    size = about.size + (size_of(closed.consts) if baked else 0)
    keep = about.whole and size <= LARGEST
    key = (
        *(name, about.key, quick),
        digest(constant_lines(closed)) if baked and keep else "",
        *described(consts, *arguments),
        *settings_in_force().items(),
    )
    if keep:
        with _lock:
            if key in _kept:
                _kept.move_to_end(key)
                return Program(consts, _kept[key][0])

    def whole(consts, *arguments):
        return make(closed if baked else Opened(closed.jaxpr, consts))(*arguments)

    whole.__name__ = name
    lowered = jax.jit(whole).lower(consts, *arguments)
    options = dict(quick_options()) if quick and jax.default_backend() == "cpu" else None
    made = compiling(lowered, options)
    if keep:
        with _lock:
            _kept[key] = made, size
            while len(_kept) > KEPT or sum(size for _, size in _kept.values()) > MOST:
                _kept.popitem(last=False)
        made.add_done_callback(lambda done: done.exception() and _kept.pop(key, None))
    return Program(consts, made)


def forget() -> None:
    """Keep no program any longer."""
    with _lock:
        _kept.clear()


def described(*trees) -> tuple:
    """The structure of trees, and of each leaf the shape, the dtype and the device."""
    leaves, structure = jax.tree.flatten(trees)
    return structure, *((x.shape, str(x.dtype), getattr(x, "sharding", None)) for x in leaves)


def differentiated(closed) -> Callable:
    """The derivative of a program by its first list, by jax's own rules."""
    return jax.grad(lambda leaves, others: as_it_stands(closed)(leaves, others)[0])


def as_it_stands(closed) -> Callable:
    """The program itself as a function of its two lists: nothing of it is entered."""
    return lambda leaves, others: evaluate(closed, [*leaves, *others], opened=lambda site, eqn: False)[0]
