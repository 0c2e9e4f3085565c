"""`check_gradients`: the audit of one function's gradient, leaf by leaf.

prepare, trace ─▶ the program of f ──▶ two witnesses: autodiff of it without custom rules, slopes along lines
claim ──────────▶ the claimed gradient ─▶ judge: one verdict per leaf ─▶ cause, precision ladder, cost ─▶ Report
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from fnet.core.interpret import is_float
from fnet.gradcheck.claims import Claim, Known, ask, ask_compiled, by_autodiff, by_caller, claim, native_dtypes
from fnet.gradcheck.judge import judge_all
from fnet.gradcheck.ladder import ask_rungs, climb, measure_costs
from fnet.gradcheck.named import check_intermediates
from fnet.gradcheck.problem import Problem, open_problem, precise
from fnet.gradcheck.report import Report
from fnet.gradcheck.witnesses import Witnesses, begin, gather
from fnet.types import PyTree


def check_gradients(
    f: Callable,
    params: PyTree,
    *args,
    gradient: Callable | None = None,
    intermediates: Mapping[str, Any] | Callable | None = None,
    has_aux: bool = False,
    seed: int = 0,
    precisions: tuple[str, ...] = ("float32", "bfloat16", "float16"),
    cost: bool = True,
) -> Report:
    """Audit a gradient of ``f(params, *args)``, a scalar: by hand, or ``jax.grad(f)`` with its custom rules.

    ``gradient(params, *args)`` returns a tree like ``params``; it may be in NumPy. None audits ``jax.grad(f)``.
    Both run in float64 whatever the caller's settings, and the claimed gradient is held against two witnesses: autodiff
    of ``f`` without its custom rules (jax's own are kept), entry by entry; and slopes measured along random lines over
    each leaf, with steps that cross no kink. Verdicts, per leaf:

    - ``ok``: both agree, and a fault of 1e-6 of the leaf's largest entry would have been seen;
    - ``wrong``, with the likely cause, the worst entry and both its values;
    - ``kink``: the point lies on a kink, named, and the claim lies between the one-sided slopes in every direction;
    - ``imprecise``: right up to rounding, which was measured and is larger than 1e-9, or bad at the caller's precision;
    - ``unverified``: nothing contradicts the gradient, but a fault of 1e-6 could have hidden.

    ``intermediates`` maps names of `fnet.tap`s in ``f`` to the caller's gradients of them (or is a function of
    ``(params, *args)`` that returns such a dict); each is compared, in the order of the backward pass. ``precisions``
    are the rungs of the ladder besides float64 and the parameters' own, climbed where no leaf is wrong: a wrong formula
    would hide what is rounding. ``cost=False`` leaves out the measurement of both gradients' cost. ``seed`` draws the
    directions. With ``has_aux`` the function returns ``(scalar, aux)``.

    Raises ValueError where ``params`` has no floating leaf, where ``f`` does not return one floating scalar or cannot
    be traced, and for unknown names of intermediates; TypeError for complex leaves.

    >>> import jax.numpy as jnp
    >>> def f(w, x):
    ...     return jnp.tanh(x @ w).sum()
    >>> def by_hand(w, x):
    ...     return x.T @ jnp.tanh(x @ w)  # should be 1 - tanh²
    >>> w, x = jnp.array([0.3, -0.2]), jnp.array([[1.0, 2.0], [0.5, -1.0]])
    >>> check_gradients(f, w, x).ok
    True
    >>> check_gradients(f, w, x, gradient=by_hand).leaves[0].verdict
    'wrong'
    """
    for name, given in (("f", f), ("gradient", f if gradient is None else gradient)):
        if not callable(given):
            kind = type(given).__name__
            raise TypeError(f"check_gradients: {name} is {kind}; expected a function of (params, *args)")
    if isinstance(precisions, str):
        raise TypeError(f"check_gradients: precisions = {precisions!r}; expected a tuple of names, ({precisions!r},)")
    outer_x64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    problem, traced, x64 = open_problem(f, params, args, has_aux)
    engine = by_autodiff(problem) if gradient is None else by_caller(problem, gradient)
    alone = gradient is None and not traced.custom
    with precise(x64):
        begun = begin(problem, traced, alone)
    differentiable = alone or begun.autodiff is not None
    engines = {"claimed": engine} if gradient is not None or not differentiable else {}
    if differentiable:
        engines["autodiff"] = engine if gradient is None else by_autodiff(problem, beside=True)
    # what every report needs is asked for first, so that it is compiled while more is traced
    known: Known = {}
    with precise(outer_x64):
        arguments = problem.native(None)
        own = {name: ask_compiled(known, one, arguments, quick=False) for name, one in engines.items() if cost}
        complaints = native_dtypes(ask(known, engine, arguments), arguments[0])
    with precise(x64):
        asked = ask_compiled(known, engine, (problem.leaves, problem.others))
    ask_rungs(problem, engines, (), known)
    with precise(x64):
        claimed = claim(problem, engine, asked)
        witnesses = gather(problem, traced, begun, seed, claimed if alone else None)
        checks = judge_all(witnesses, claimed)
    checks = [
        leaf._replace(verdict="wrong", cause=words) if words and leaf.verdict != "wrong" else leaf
        for leaf, words in zip(checks, complaints, strict=True)
    ]
    wrong = any(leaf.verdict == "wrong" for leaf in checks)
    rungs = ask_rungs(problem, engines, () if wrong else precisions, known)
    checks = climb(problem, witnesses.exact or claimed.grads, engines, rungs, checks)
    costs = measure_costs(problem, own, outer_x64) if cost else ()
    compared = ()
    if intermediates is not None:
        compared = check_intermediates(f, problem, intermediates, has_aux, x64, outer_x64)
    notes = (*remarks(witnesses, claimed), *equal_axes(problem))
    return Report(tuple(checks), compared, costs, notes, settings(seed))


def settings(seed: int) -> dict[str, str]:
    """What was in force, for the report."""
    return {
        "precision": "float64",
        "matmul precision": "highest",
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "seed": str(seed),
    }


def remarks(w: Witnesses, claimed: Claim) -> tuple[str, ...]:
    """What the table does not show."""
    notes = ["float64, products in the highest precision; errors are relative to each leaf's largest entry"]
    if w.autodiff is None:
        notes.append(f"autodiff cannot differentiate this function ({w.why_not}): slopes alone")
    elif w.why_not:
        notes.append(w.why_not)
    if w.traced.custom and w.autodiff is not None:
        notes.append("the function has custom rules: autodiff as a witness ignores them")
    if claimed.closed is None:
        notes.append("the gradient is not traceable and ran uncompiled")
    return tuple(notes)


def equal_axes(problem: Problem) -> tuple[str, ...]:
    """A line that names arrays of which two axes have one size: one that is taken for the other does not show."""
    arrays = zip(problem.inputs, [*problem.leaves, *problem.others], strict=True)
    found = [(name, [n for n in a.shape if n > 1]) for name, a in arrays if is_float(a)]
    equal = [f"{name} {' × '.join(map(str, sizes))}" for name, sizes in found if len({*sizes}) < len(sizes)]
    if not equal:
        return ()
    more = f" and {len(equal) - 3} more" if len(equal) > 3 else ""
    return (f"axes of one size, of which one taken for the other would not show: {', '.join(equal[:3])}{more}",)
