"""The precision ladder of a gradient, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fnet.gradcheck.problem import UNTRACEABLE, Problem, align, precise, quick_jit
from fnet.gradcheck.report import Cost, LeafCheck, Rung
from fnet.interpret import is_array, is_float


def climb(problem: Problem, exact, engines: Mapping[str, Callable], checks, precisions) -> list[LeafCheck]:
    """The precision ladder: claimed and autodiff gradients at narrower precisions, against float64."""
    own = [str(d) for d in dict.fromkeys(problem.dtypes) if d != np.float64]
    rungs: list[list[Rung]] = [[] for _ in checks]
    for dtype in dict.fromkeys([*own, *precisions]):
        try:
            found = [at_precision(problem, gradient, dtype) for gradient in engines.values()]
        except Exception as error:  # the user's function in a dtype that it was never written for: said on the rung
            if dtype in own:
                raise
            for ladder in rungs:
                ladder.append(Rung(dtype, np.nan, np.nan, f"does not run: {type(error).__name__}"))
            continue
        for i, ladder in enumerate(rungs):
            e, grads = exact[i], [grads[i] for grads in found]
            if e is None or not e.size or any(g is None for g in grads):
                continue
            scale = float(np.abs(e[np.isfinite(e)]).max(initial=0)) or 1.0
            with np.errstate(invalid="ignore"):
                errors = [float(np.abs(g - e).max()) / scale for g in grads]
            ladder.append(Rung(dtype, errors[0], errors[-1] if "autodiff" in engines else np.nan))
    out = []
    for i, check in enumerate(checks):
        check = check._replace(ladder=tuple(rungs[i]))
        out.append(judge_rung(check, rungs[i], problem.dtypes[i]))
    return out


def judge_rung(check: LeafCheck, rungs: list[Rung], dtype) -> LeafCheck:
    """``imprecise`` where the claimed gradient rounds far worse than autodiff at the caller's own precision."""
    mine = next((r for r in rungs if r.dtype == str(dtype)), None)
    if mine is None or check.verdict not in ("ok", "kink"):
        return check
    eps = float(jnp.finfo(dtype).eps)
    if mine.error <= max(100 * np.nan_to_num(mine.expected), 100 * eps):
        return check
    if not np.isfinite(mine.error) and not np.isfinite(mine.expected):
        return check
    cause = f"in {mine.dtype} the error is {mine.error:.0e}; expected {np.fmax(mine.expected, eps):.0e}"
    verdict = "wrong" if not np.isfinite(mine.error) else "imprecise"
    return check._replace(verdict=verdict, cause=cause)


def at_precision(problem: Problem, gradient: Callable, dtype: str) -> list:
    """A gradient with all floating inputs in another dtype, as float64 arrays of the host."""
    with precise(dtype == "float64"):
        leaves, others = problem.native(jnp.dtype(dtype))
        return [None if g is None else np.asarray(g, np.float64) for g in claim_once(problem, gradient, leaves, others)]


def claim_once(problem: Problem, gradient: Callable, leaves, others) -> list:
    """One compiled run, or one as it stands where it cannot be traced."""

    def flat(leaves, others):
        p, a = problem.rebuild(leaves, others)
        return align(problem, gradient(p, *a), p)[0]

    try:
        return quick_jit(flat)(leaves, others)
    except UNTRACEABLE:
        return flat(leaves, others)


def measure_costs(problem: Problem, engines: Mapping[str, Callable], x64: bool) -> tuple[Cost, ...]:
    """FLOPs, bytes, peak memory and time of the claimed gradient and of autodiff, at the caller's own precision."""
    found = []
    with precise(x64):
        leaves, others = problem.native(None)
        for name, gradient in engines.items():

            def flat(leaves, others, gradient=gradient):
                p, a = problem.rebuild(leaves, others)
                return [g for g in jax.tree.leaves(gradient(p, *a)) if is_array(g) and is_float(g)]

            try:
                compiled = jax.jit(flat).lower(leaves, others).compile()
            except UNTRACEABLE:
                continue
            analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
            peak = sum(
                getattr(memory, f"{part}_size_in_bytes", 0) for part in ("argument", "output", "temp")
            ) - getattr(memory, "alias_size_in_bytes", 0)
            jax.block_until_ready(compiled(leaves, others))
            times = []
            for _ in range(5):
                start = time.perf_counter()
                jax.block_until_ready(compiled(leaves, others))
                times.append(time.perf_counter() - start)
            found.append(
                Cost(
                    name,
                    float(analysis.get("flops", np.nan)),
                    float(analysis.get("bytes accessed", np.nan)),
                    float(peak),
                    float(np.median(times)),
                )
            )
    return tuple(found)
