"""Numbers drawn from a key by small programs, of which those that compute the same are compiled once.

A deep model's init is a program as long as the model is deep, though its layers draw the same from other keys. So it is
traced and taken apart: keys are folded on the host, operations that share what they compute make a piece, and a piece
is a program of its keys. What XLA makes of it is what it makes of it within the whole: the numbers are the same bits.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from fnet.core.compiling import compiling
from fnet.core.interpret import CALLS, walk
from fnet.core.jax_insides import (
    ClosedJaxpr,
    Jaxpr,
    Literal,
    Var,
    jaxpr_as_fun,
    part_of,
    same_bits_options,
    value_of,
    variables,
)
from fnet.core.numerics import is_key, words_of
from fnet.core.programs import digest, program_lines, settings_in_force
from fnet.types import PyTree

KEPT = 256  # programs, for models to come

_kept: dict[Any, Future[Callable]] = {}  # by what they compute, the newest at the end
_lock = threading.Lock()


def drawn(function: Callable[[jax.Array], PyTree], key: jax.Array, shardings: PyTree = None) -> PyTree:
    """``jax.jit(function, out_shardings=shardings)(key)``, the same bits, in pieces.

    It is that call itself where the key is traced or lies on a device of the caller's choice, where the function closes
    over what is traced or calls back to the host, and under `jax.disable_jit`.
    """
    settings: Any = jax.config
    whole = jax.jit(function, out_shardings=shardings)
    words = jax.device_put(words_of(key))  # traced if what is computed here is
    if isinstance(words, Tracer) or words.committed or settings.jax_disable_jit:
        return whole(key)
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(key)
    if closed.effects or any(isinstance(const, Tracer) for const in closed.consts):
        return whole(key)
    structure = jax.tree.structure(shapes)
    leaves: list[Any] = [None] * structure.num_leaves
    where = leaves.copy() if shardings is None else structure.flatten_up_to(shardings)
    keys, own, drawing = keys_of(closed, np.asarray(words)), {}, []
    for piece in pieces_of(closed.jaxpr, keys):
        read = [var for var in piece.reads(closed.jaxpr) if var in keys]
        part, given = part_of(closed, piece.eqns, read, piece.outputs), [keys[var]() for var in read]
        memory = own if part.consts else _kept  # arrays that a model holds go with it
        program = prepared(part, given, tuple(where[i] for i in piece.outputs), key, memory)
        drawing.append((piece.outputs, program, given))
    wait([program for _, program, _ in drawing])
    with _lock:  # what failed may be compiled another time
        failed = [asked for asked, program in [*_kept.items()] if program.done() and program.exception()]
        for asked in {*failed, *list(_kept)[:-KEPT]}:
            del _kept[asked]
    for outputs, program, given in drawing:
        for i, leaf in zip(outputs, program.result()(*given), strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


# --- keys ------------------------------------------------------------------------------------------------------------


def keys_of(closed: ClosedJaxpr, words: np.ndarray) -> dict[Any, Callable[[], np.ndarray]]:
    """Of the program's key, and of the keys that threefry folds from it, what gives the words: by their variables."""
    consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    found: dict[Any, Callable[[], np.ndarray]] = {closed.jaxpr.invars[0]: lambda: words}
    for eqn in closed.jaxpr.eqns:
        if not eqn.invars or isinstance(eqn.invars[0], Literal) or eqn.invars[0] not in found:
            continue
        (key, *by), out = eqn.invars, eqn.outvars[0]
        if "key<fry>" not in (str(each.aval.dtype) for each in (key, out)):  # pyright: ignore[reportAttributeAccessIssue]
            continue
        of = found[key]
        if eqn.primitive.name in ("random_wrap", "random_unwrap"):
            found[out] = of
        elif eqn.primitive.name == "random_fold_in" and (isinstance(by[0], Literal) or by[0] in consts):
            data = value_of(by[0]) if isinstance(by[0], Literal) else consts[by[0]]
            found[out] = functools.cache(lambda of=of, data=data: folded(of(), np.asarray(data)))
    return found


def folded(words: np.ndarray, data: np.ndarray) -> np.ndarray:
    """`jax.random.fold_in` of threefry keys ``(..., 2)``: 20 rounds of Threefry-2×32 of the counter ``(0, data)``.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011.

    >>> key = jax.random.key(0)
    >>> folded(np.asarray(jax.random.key_data(key)), np.uint32(7)).tolist()
    [2716826189, 292468403]
    >>> jax.random.key_data(jax.random.fold_in(key, 7)).tolist()
    [2716826189, 292468403]
    """
    first, second = words[..., 0], words[..., 1]
    schedule = first, second, first ^ second ^ np.uint32(0x1BD11BDA)
    with np.errstate(over="ignore"):  # modulo 2³²
        x, y = np.broadcast_arrays(first, second + data.astype(np.uint32))
        for i in range(5):
            for left in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
                x = x + y
                y = x ^ (y << np.uint32(left) | y >> np.uint32(32 - left))
            x, y = x + schedule[(i + 1) % 3], y + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return np.stack([x, y], -1)


# --- pieces ----------------------------------------------------------------------------------------------------------

# operations that make each entry by itself: those that the initializers draw by, but for orthogonal's
ENTRYWISE = {
    *("add", "and", "bitcast_convert_type", "broadcast_in_dim", "convert_element_type", "div", "erf", "erf_inv"),
    *("max", "min", "mul", "neg", "nextafter", "or", "random_bits", "random_fold_in", "random_unwrap", "random_wrap"),
    *("reshape", "select_n", "shift_right_logical", "sqrt", "squeeze", "stop_gradient", "sub"),
}


class Piece(NamedTuple):
    """Operations and outputs of a program, by their numbers."""

    eqns: list[int]
    outputs: list[int]

    def reads(self, jaxpr: Jaxpr) -> list[Var]:
        """The variables that go into its operations and out of it, each once."""
        atoms = [atom for i in sorted(self.eqns) for atom in jaxpr.eqns[i].invars]
        return list(dict.fromkeys(variables([*atoms, *(jaxpr.outvars[i] for i in self.outputs)])))


def pieces_of(jaxpr: Jaxpr, keys: Container) -> list[Piece]:
    """What the outputs come of, in pieces that share no operation; ``keys`` are given.

    What comes of no key, such as zeros, is one piece.
    """
    made = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars if var not in keys}
    pieces: list[Piece] = []
    piece_of: dict[int, Piece] = {}  # by operation
    for at, output in enumerate(jaxpr.outvars):
        mine, waiting = Piece([], [at]), variables([output])
        while waiting:
            i = made.get(waiting.pop())
            if i is None or (other := piece_of.get(i)) is mine:
                continue
            if other is None:
                waiting += variables(jaxpr.eqns[i].invars)
                other = Piece([i], [])
            else:
                pieces = [piece for piece in pieces if piece is not other]
            mine.eqns.extend(other.eqns)
            mine.outputs.extend(other.outputs)
            piece_of |= dict.fromkeys(other.eqns, mine)
        pieces.append(mine)
    keyed = [any(var in keys for var in piece.reads(jaxpr)) for piece in pieces]
    apart, others = (list(itertools.compress(pieces, flags)) for flags in (keyed, map(operator.not_, keyed)))
    return [*apart, Piece(*(list(itertools.chain(*parts)) for parts in zip(*others, strict=True)))] if others else apart


def prepared(
    piece: ClosedJaxpr,
    given: Sequence[np.ndarray],
    shardings: tuple,
    key: jax.Array,
    programs: dict[Any, Future[Callable]],
) -> Future[Callable]:
    """The function of words, such as the ``given``, that a piece is of its keys, compiled or being compiled.

    It is one of ``programs`` where it computes the same as another.
    """
    impl = jax.random.key_impl(key) if is_key(key) else "threefry2x32"
    asked = digest(program_lines(piece, callbacks=True)), str(impl), shardings, tuple(settings_in_force().values())
    if (known := programs.get(asked)) is not None:
        return known
    typed = [is_key(var.aval) for var in piece.jaxpr.invars]

    def draw(*words):
        wrap = functools.partial(jax.random.wrap_key_data, impl=impl)
        return jaxpr_as_fun(piece)(*(wrap(w) if is_typed else w for w, is_typed in zip(words, typed, strict=True)))

    spread = set(shardings) != {None}
    names = {place.eqn.primitive.name for place in walk(piece.jaxpr)}
    on_cpu = not spread or all(d.platform == "cpu" for where in shardings for d in where.device_set)
    options = same_bits_options() if on_cpu and names <= ENTRYWISE.union(CALLS) else None
    where = list(shardings) if spread else None
    lowered = jax.jit(draw, out_shardings=where, compiler_options=options).lower(*given)
    made = programs[asked] = compiling(lowered)
    return made
