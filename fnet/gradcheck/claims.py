"""What a gradient engine claims of a problem: its gradients by leaf, and whether it gives them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.interpret import is_array, is_float
from fnet.gradcheck.kept import Program, as_it_stands, described, differentiated, prepared, same_program, told
from fnet.gradcheck.problem import Problem, name_of, on_device, traced_anew


class Claim(NamedTuple):
    """A claimed gradient: an array for each floating leaf, or None and a complaint."""

    grads: list
    complaints: list[str]  # "" where there is nothing to say; about the structure only
    closed: Any  # its program, None where it cannot be traced
    steady: bool

    def output(self, i: int) -> int:
        """Which output of the program is the gradient of leaf ``i``: missing leaves have none."""
        return sum(g is not None for g in self.grads[:i])


class Engine(NamedTuple):
    """How a gradient is found: ``grads(leaves, others)`` gives arrays by leaf, and complaints."""

    grads: Callable[[list, list], tuple[list, list[str]]]
    of: Callable | None = None  # the function, where jax differentiates it: its own trace serves, if it has no rules

    def __call__(self, leaves, others):
        return self.grads(leaves, others)


def by_autodiff(problem: Problem, beside: bool = False) -> Engine:
    """`jax.grad` of the function, with its custom rules, by its floating leaves; ``beside`` a claimed gradient."""
    grads = lambda leaves, others: (jax.grad(problem.value)(leaves, others), [""] * len(leaves))  # noqa: E731
    return Engine(grads, problem.value if beside else None)


def by_caller(problem: Problem, gradient: Callable) -> Engine:
    """The caller's gradient, its leaves in the order of the parameters' floating ones."""

    def engine(leaves, others):
        p, a = problem.rebuild(leaves, others)
        return align(problem, gradient(p, *a), p)

    return Engine(engine)


class Asked(NamedTuple):
    """A gradient at some precision, traced once; compiled, or being compiled, as it is needed."""

    closed: Any  # its program, or that of the engine's ``of``; None where it cannot be traced
    complaints: list[str]  # of the structure, as in `Claim`
    dtypes: list  # by leaf, None for one without a gradient
    make: Callable = as_it_stands  # of ``closed``, the gradient
    program: Program | None = None


Known = dict[Any, Asked]  # what one audit has asked for, by the gradient, the types of its arguments and the setting


def ask(known: Known, engine: Engine, arguments: tuple[list, list]) -> Asked:
    """Trace a gradient, unless it was by arguments of these types, or cannot be by others."""
    key = key_of(engine, arguments)
    if key not in known:
        failed = any(other is engine and asked.closed is None for (other, *_), asked in known.items())
        known[key] = UNTRACED if failed else traced_once(engine, arguments)
    return known[key]


def key_of(engine: Engine, arguments: tuple[list, list]) -> tuple:
    """What a trace goes by, within one audit."""
    return engine, jax.dtypes.canonicalize_dtype(np.float64), described(*arguments)


def traced_once(engine: Engine, arguments: tuple[list, list]) -> Asked:
    """A gradient's program; whatever one in NumPy makes of a tracer, an error of its own comes again as it runs."""
    complaints: list[str] = []
    dtypes: list = []

    def grads(leaves, others):
        found, complaints[:] = engine(leaves, others)
        dtypes[:] = [None if g is None else g.dtype for g in found]
        return found

    try:
        if engine.of is not None:
            closed = traced_anew(engine.of, *arguments)
            if not told(closed).ruled:
                return Asked(closed, [], [leaf.dtype for leaf in arguments[0]], differentiated)
        return Asked(traced_anew(grads, *arguments), complaints, dtypes)
    except Exception:
        return UNTRACED


UNTRACED = Asked(None, [], [])


def ask_compiled(known: Known, engine: Engine, arguments: tuple[list, list], *, quick: bool = True) -> Asked:
    """The same, with its program being compiled; the same that is compiled already, of whatever engine, serves too."""
    asked = ask(known, engine, arguments)
    if asked.closed is None or asked.program is not None:
        return asked
    compiled = [other for other in known.values() if other.program is not None and other.make is asked.make]
    alike = (other for other in compiled if told(other.closed).whole and same_program(other.closed, asked.closed))
    program = next((other.program for other in alike), None)
    if program is None:
        try:
            program = prepared(asked.make.__name__, asked.make, asked.closed, arguments, quick=quick)
        except Exception:  # as in traced_once
            return asked
    known[key_of(engine, arguments)] = asked = asked._replace(program=program)
    return asked


def run(problem: Problem, engine: Engine, asked: Asked, arguments: tuple[list, list]) -> list:
    """The gradient at values: by its program, or as it stands where it cannot be traced or compiled."""
    if asked.program is not None:
        try:
            found = iter(asked.program(*arguments))
            return [None if dtype is None else next(found) for dtype in asked.dtypes]
        except Exception:  # as in traced_once
            pass
    return engine(*problem.as_given(*arguments))[0]


def claim(problem: Problem, engine: Engine, asked: Asked | None = None) -> Claim:
    """The claimed gradient at the point, compiled if it can be traced, as it stands (NumPy) if not.

    It is traced twice, and run twice unless its program tells all that it does.
    """
    arguments = problem.leaves, problem.others
    asked = ask_compiled({}, engine, arguments) if asked is None else asked
    if asked.closed is None:
        given = problem.as_given(*arguments)
        (first, complaints), (second, _) = (engine(*given) for _ in range(2))
        return Claim(list(map(to_numpy, first)), complaints, None, same_values(first, second))
    again = traced_once(engine, arguments)
    steady = again.closed is not None and same_program(asked.closed, again.closed)
    first = list(map(to_numpy, run(problem, engine, asked, arguments)))
    if steady and not told(asked.closed).whole:
        steady = same_values(first, run(problem, engine, asked, arguments))
    return Claim(first, asked.complaints, asked.closed, steady)


def to_numpy(g):
    """An array of the host, None for None."""
    return None if g is None else np.asarray(g, np.float64)


def same_values(first, second) -> bool:
    """Whether two runs gave the same numbers, up to the order of sums."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(first, second, strict=True)
        if a is not None
    ]
    return all(np.allclose(a, b, rtol=1e-9, atol=1e-9 * largest(a), equal_nan=True) for a, b in pairs)


def largest(a: np.ndarray) -> float:
    """The largest finite magnitude, 0 if there is none."""
    return float(np.abs(a[np.isfinite(a)]).max(initial=0))


def align(problem: Problem, claimed, params) -> tuple[list, list[str]]:
    """The claimed gradient's leaves in the order of the parameters' floating ones, and what is wrong with its tree."""
    pair = isinstance(claimed, tuple) and len(claimed) == 2 and jax.tree.structure(claimed) != problem.params_tree
    if pair and jax.tree.structure(claimed[0]) == problem.params_tree:
        claimed = claimed[0]  # (grads, aux), as jax.grad returns with has_aux

    def by_path(tree):
        return dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None))

    given, own = by_path(claimed), by_path(params)
    extra = [name_of(path) for path in given if path not in own]
    keep = lambda leaf: leaf is None  # noqa: E731
    other_tree = jax.tree.structure(claimed, is_leaf=keep) != jax.tree.structure(params, is_leaf=keep)
    grads, complaints = [], []
    for path in problem.keys:
        leaf: Any = given.get(path)
        mine, complaint = own[path], ""
        usable = (isinstance(leaf, float) or is_float(leaf)) and jnp.shape(leaf) == jnp.shape(mine)
        if path not in given:
            complaint = f"wrong tree: no gradient for this leaf (found {[name_of(p) for p in given][:6]})"
        elif leaf is None:
            complaint = "wrong tree: None, so this leaf never receives a gradient"
        elif not isinstance(leaf, float | int) and not is_array(leaf):
            complaint = f"wrong tree: a {type(leaf).__name__} instead of an array"
        elif jnp.shape(leaf) != jnp.shape(mine):
            complaint = f"wrong shape: {jnp.shape(leaf)}, the parameter has {jnp.shape(mine)}"
        elif extra:
            complaint = f"wrong tree: also gradients for {extra[:6]}, which params does not have"
        elif other_tree:
            complaint = "wrong tree: its containers are not those of params (a tuple for a list, say)"
        elif not usable:
            complaint = f"wrong dtype: {jnp.result_type(leaf)}, the parameter has {jnp.result_type(mine)}"
        grads.append(on_device(leaf) if usable else None)
        complaints.append(complaint)
    return grads, complaints


def native_dtypes(asked: Asked, leaves) -> list[str]:
    """For each leaf what is wrong with the dtype of its gradient at the caller's own precision."""
    if asked.closed is None:  # a gradient in NumPy, which has dtypes of its own; a true error came before
        return [""] * len(leaves)
    return [
        "" if dtype is None or dtype == leaf.dtype else f"wrong dtype: {dtype}, the parameter has {leaf.dtype}"
        for dtype, leaf in zip(asked.dtypes, leaves, strict=True)
    ]
