"""What a gradient engine claims of a problem: its gradients by leaf, and whether it gives them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.interpret import is_array, is_float
from fnet.core.jax_insides import quick_jit
from fnet.gradcheck.problem import Problem, name_of, same_program, traced_anew


class Claim(NamedTuple):
    """A claimed gradient: an array for each floating leaf, or None and a complaint."""

    grads: list
    complaints: list[str]  # "" where there is nothing to say; about the structure only
    closed: Any  # its program, None where it cannot be traced
    steady: bool

    def output(self, i: int) -> int:
        """Which output of the program is the gradient of leaf ``i``: missing leaves have none."""
        return sum(g is not None for g in self.grads[:i])


Engine = Callable[[list, list], tuple[list, list[str]]]  # (leaves, others) -> grads, complaints


def by_autodiff(problem: Problem) -> Engine:
    """`jax.grad` of the function, with its custom rules, by its floating leaves."""
    return lambda leaves, others: (jax.grad(problem.value)(leaves, others), [""] * len(leaves))


def by_caller(problem: Problem, gradient: Callable) -> Engine:
    """The caller's gradient, its leaves in the order of the parameters' floating ones."""

    def engine(leaves, others):
        p, a = problem.rebuild(leaves, others)
        return align(problem, gradient(p, *a), p)

    return engine


def claim(problem: Problem, engine: Engine) -> Claim:
    """Run the claimed gradient twice at the point, compiled if it can be traced, as it stands (NumPy) if not."""
    complaints: list[str] = []

    def grads(leaves, others):
        found, complaints[:] = engine(leaves, others)
        return found

    try:
        closed, again = (traced_anew(grads, problem.leaves, problem.others) for _ in range(2))
    except Exception:  # whatever a gradient in NumPy makes of a tracer; an error of its own comes again below
        given = problem.as_given(problem.leaves, problem.others)
        first, second = (grads(*given) for _ in range(2))
        return Claim(list(map(to_numpy, first)), list(complaints), None, same_values(first, second))
    run = quick_jit(grads)
    first = run(problem.leaves, problem.others)
    steady = same_program(closed, again) and same_values(first, run(problem.leaves, problem.others))
    return Claim(list(map(to_numpy, first)), list(complaints), closed, steady)


def run_once(problem: Problem, engine: Engine, leaves, others) -> list:
    """One compiled run at other values, or one as it stands where it cannot be traced."""
    try:
        return quick_jit(lambda leaves, others: engine(leaves, others)[0])(leaves, others)
    except Exception:  # as in claim
        return engine(*problem.as_given(leaves, others))[0]


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
        grads.append(jnp.asarray(leaf) if usable else None)
        complaints.append(complaint)
    return grads, complaints


def native_dtypes(problem: Problem, engine: Engine) -> list[str]:
    """For each leaf what is wrong with the dtype of its gradient at the caller's own precision; nothing is computed."""
    leaves, others = problem.native(None)
    found: list[str] = []

    def grads(leaves, others):
        grads, _ = engine(leaves, others)
        for g, leaf in zip(grads, leaves, strict=True):
            if g is None or g.dtype == leaf.dtype:
                found.append("")
            else:
                found.append(f"wrong dtype: {g.dtype}, the parameter has {leaf.dtype}")
        return grads

    try:
        jax.eval_shape(grads, leaves, others)
    except Exception:  # a gradient in NumPy, which has dtypes of its own; a true error came before
        return [""] * len(leaves)
    return found
