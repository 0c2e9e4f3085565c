"""Gradients of tapped values against the caller's own, in the order of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.jax_insides import quick_jit
from fnet.gradcheck import causes, patterns, places
from fnet.gradcheck.judge import compare, vague
from fnet.gradcheck.kept import as_it_stands, prepared
from fnet.gradcheck.problem import Problem, precise
from fnet.gradcheck.report import Intermediate, LeafCheck
from fnet.gradcheck.witnesses import ROUNDING, TIGHT, small_faults
from fnet.gradients.intermediates import perturbed


def check_intermediates(
    f: Callable, problem: Problem, given, has_aux: bool, x64: bool, outer_x64: bool
) -> tuple[Intermediate, ...]:
    """The caller's gradients of tapped values against the true ones, in the order of the backward pass.

    ``given`` maps names to arrays, or is a function of the arguments that returns such a dict and runs in float64.
    Arrays may be rounded as much as the true gradients are at the caller's precision, ``outer_x64``.
    """

    def true_gradients(leaves, others):
        p, a = problem.rebuild(leaves, others)
        tapped = perturbed(f, p, *a, has_aux=has_aux)
        arguments = tapped.zeros, tapped.arrays
        program = jax.make_jaxpr(jax.grad(tapped.value))(*arguments)
        grads = prepared("as_it_stands", as_it_stands, program, arguments)(*arguments)
        return tapped, program, [np.asarray(g, np.float64) for g in grads]

    with precise(x64):
        tapped, program, true = true_gradients(problem.leaves, problem.others)
        mine = run_given(given, problem) if callable(given) else given
        if not isinstance(mine, Mapping):
            raise TypeError(f"intermediates: got {type(mine).__name__}; expected a dict from names to gradients")
        unknown = [name for name in mine if name not in tapped.names]
        if unknown:
            known = list(tapped.names)
            raise ValueError(f"intermediates: {unknown} are not tapped in the function; the taps are {known}")
        epsilons = {name: epsilon_of(name, g) for name, g in mine.items()}
        mine = {name: np.asarray(g, np.float64) for name, g in mine.items()}
    native = true
    if not callable(given):
        with precise(outer_x64):
            native = true_gradients(*problem.native(None))[-1]

    noise: list = []

    def rounding(k: int) -> np.ndarray:
        """How far rounding moves a true gradient in float64, measured once for all."""
        if not noise:
            with precise(x64):
                noise.extend(places.rounding(program, [*tapped.zeros, *tapped.arrays]))
        return noise[k]

    rows, first = [], ""
    for k in reversed(range(len(tapped.names))):
        name, e = tapped.names[k], true[k]
        if name not in mine or (e.size == 0 and mine[name].shape == e.shape):
            continue
        c, blank = mine[name], LeafCheck(name, e.shape, "", "", 0.0, 0.0, (), 0.0, 0.0, 0.0)
        if c.shape != e.shape:
            words = f"wrong shape: {c.shape}, expected {e.shape}"
            rows.append(Intermediate(name, e.shape, "wrong", "wrong", np.inf, (), np.nan, np.nan, words))
            first = first or name
            continue
        scale = float(np.abs(e).max(initial=0))
        rounded = float(np.abs(native[k] - e).max(initial=0))
        if rounded > 1e-2 * scale > 0:  # random numbers that depend on the precision: compare at the caller's
            e, rounded = native[k], 0.0
        row = compare(blank, c, e)
        eps = epsilons[name]
        allowed = max(TIGHT, 4 * eps) * scale + 20 * rounded
        finite = bool(np.isfinite(c).all())
        fine = finite and (row.absolute <= allowed or bool((np.abs(c - e) <= ROUNDING * rounding(k) + allowed).all()))
        if fine and callable(given) and (small := small_faults(c, e)).any():  # hidden by its largest entry?
            fine = bool((np.abs(c - e)[small] <= ROUNDING * rounding(k)[small]).all())
        cause = "" if fine else cause_of(problem, tapped, true, k, c, e, max(1e-7, 4 * eps), bool(first))
        if not fine and first:
            cause = f"{cause}; may follow from {first}" if cause else f"may follow from {first}"
        digits = int(-np.log10(row.relative)) if 0 < row.relative < 1 else 0
        agreement = "exact" if np.array_equal(c, e) or np.array_equal(c, native[k]) else f"{max(0, digits)} digits"
        if fine and row.absolute > allowed:
            agreement = "zero up to rounding" if scale <= ROUNDING * rounding(k).max() else "up to rounding"
        verdict = ("ok", agreement) if fine else ("wrong", "wrong")
        rows.append(Intermediate(name, e.shape, *verdict, row.relative, row.worst, row.claimed, row.expected, cause))
        first = first or ("" if fine else name)
    return tuple(rows)


def epsilon_of(name: str, g) -> float:
    """The unit of rounding of a claimed array; TypeError for what is none of real numbers."""
    try:
        dtype = np.asarray(g).dtype
    except ValueError:
        dtype = np.dtype(object)  # a ragged list
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"intermediates: {name} is {dtype}; expected its gradient, an array of real numbers")
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def run_given(given: Callable, problem: Problem) -> Mapping:
    """The caller's function of the arguments, compiled if it can be traced."""

    def flat(leaves, others):
        p, a = problem.rebuild(leaves, others)
        return given(p, *a)

    try:
        return quick_jit(flat)(problem.leaves, problem.others)
    except Exception:  # whatever NumPy makes of a tracer; an error of its own comes again here
        return flat(*problem.as_given(problem.leaves, problem.others))


def cause_of(problem: Problem, tapped, true, k: int, c: np.ndarray, e: np.ndarray, tol: float, follows: bool) -> str:
    """What an intermediate's claimed gradient is to the true one; the program is asked for the first wrong one only."""
    others = {name: g for name, g in zip(tapped.names, true, strict=True) if name != tapped.names[k]}
    cause = patterns.pattern(c, e, others, problem.examples, tol)
    if not follows and np.isfinite(c).all() and (not cause or vague(cause)):
        with precise():
            program = jax.make_jaxpr(tapped.value)(tapped.zeros, tapped.arrays)
            found = causes.explain(program, tapped.zeros, tapped.arrays, true, {k: c}, 100 * tol)
        cause = found[k] or cause
    return cause.replace("swapped: holds the gradient of", "equals the gradient of")
