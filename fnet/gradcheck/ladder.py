"""The precision ladder of a gradient, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fnet.gradcheck import places
from fnet.gradcheck.claims import Asked, Engine, Known, ask_compiled, largest, run, to_numpy
from fnet.gradcheck.problem import Problem, precise, traced_anew
from fnet.gradcheck.report import Cost, LeafCheck, Rung
from fnet.gradcheck.witnesses import ROUNDING


def ask_rungs(problem: Problem, engines: Mapping[str, Engine], precisions, known: Known) -> dict[str, list[Asked]]:
    """The gradients at the parameters' own precisions and at the others, by dtype, being compiled."""
    own = [str(d) for d in dict.fromkeys(problem.dtypes) if d != np.float64]
    found = {}
    for dtype in dict.fromkeys([*own, *precisions]):
        with precise(dtype == "float64"):
            arguments = problem.native(jnp.dtype(dtype))
            found[dtype] = [ask_compiled(known, engine, arguments) for engine in engines.values()]
    return found


def climb(problem: Problem, exact, engines: Mapping[str, Engine], asked_rungs, checks) -> list[LeafCheck]:
    """The precision ladder: claimed and autodiff gradients at narrower precisions, against float64."""
    rungs: list[list[Rung]] = [[] for _ in checks]
    for dtype, gradients in asked_rungs.items():
        try:
            with precise(dtype == "float64"):
                arguments = problem.native(jnp.dtype(dtype))
                pairs = zip(engines.values(), gradients, strict=True)
                found = [list(map(to_numpy, run(problem, engine, asked, arguments))) for engine, asked in pairs]
        except Exception as error:  # the user's function in a dtype that it was never written for: said on the rung
            if dtype in map(str, problem.dtypes):
                raise
            for ladder in rungs:
                ladder.append(Rung(dtype, np.nan, np.nan, f"does not run: {type(error).__name__}"))
            continue
        for i, ladder in enumerate(rungs):
            e, grads = exact[i], [grads[i] for grads in found]
            if e is None or not e.size or any(g is None for g in grads):
                continue
            scale = largest(e) or 1.0
            with np.errstate(invalid="ignore"):
                errors = [float(np.abs(g - e).max()) / scale for g in grads]
            ladder.append(Rung(dtype, errors[0], errors[-1] if "autodiff" in engines else np.nan))
    moved: dict[str, list] = {}
    out = []
    for i, check in enumerate(checks):
        check = check._replace(ladder=tuple(rungs[i]))
        mine = next((rung for rung in rungs[i] if rung.dtype == str(problem.dtypes[i])), None)
        if mine is not None and check.verdict == "ok" and is_bad(mine):
            if mine.dtype not in moved:
                moved[mine.dtype] = rounding_at(problem, next(iter(engines.values())), mine.dtype)
            check = judge_rung(check, mine, moved[mine.dtype][i], exact[i])
        out.append(check)
    return out


def is_bad(rung: Rung) -> bool:
    """Whether a gradient rounds far worse than autodiff."""
    eps = float(jnp.finfo(rung.dtype).eps)
    return not rung.error <= max(100 * np.nan_to_num(rung.expected), 100 * eps)


def judge_rung(check: LeafCheck, rung: Rung, noise: np.ndarray | None, exact: np.ndarray) -> LeafCheck:
    """``imprecise`` where rounding, as measured, explains the error at the caller's own precision; else ``wrong``."""
    scale = largest(exact) or 1.0
    explained = 0.1 if noise is None else ROUNDING * float(np.nan_to_num(noise, nan=np.inf).max()) / scale
    expected = max(float(np.nan_to_num(rung.expected)), float(jnp.finfo(rung.dtype).eps))
    cause = f"in {rung.dtype} the error is {rung.error:.0e}; expected {expected:.0e}"
    if rung.error <= explained:
        return check._replace(verdict="imprecise", cause=f"{cause}: its formula loses digits")
    return check._replace(verdict="wrong", cause=f"{cause}: not by rounding, another gradient at that precision")


def rounding_at(problem: Problem, engine: Engine, dtype: str) -> list:
    """How far rounding moves each leaf of a gradient in another dtype; None for one that cannot be traced."""
    with precise(dtype == "float64"):
        leaves, others = problem.native(jnp.dtype(dtype))
        try:
            closed = traced_anew(lambda leaves, others: engine(leaves, others)[0], leaves, others)
        except Exception:  # as in claim
            return [None] * len(problem.paths)
        found = iter(places.rounding(closed, [*leaves, *others]))
        return [None if shape is None else next(found) for shape in engine(leaves, others)[0]]


def measure_costs(problem: Problem, asked: Mapping[str, Asked], x64: bool) -> tuple[Cost, ...]:
    """FLOPs, bytes, peak memory and time of the claimed gradient and of autodiff, at the caller's own precision."""
    found = []
    with precise(x64):
        arguments = problem.native(None)
        for name, gradient in asked.items():
            if gradient.program is None:  # what runs in NumPy has no compiled program to measure
                continue
            try:
                compiled = gradient.program.compiled
            except Exception:  # as in claims.traced_once
                continue
            analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
            peak = sum(
                getattr(memory, f"{part}_size_in_bytes", 0) for part in ("argument", "output", "temp")
            ) - getattr(memory, "alias_size_in_bytes", 0)
            jax.block_until_ready(gradient.program(*arguments))
            times = []
            while len(times) < 5 or (sum(times) < 0.05 and len(times) < 1000):
                start = time.perf_counter()
                jax.block_until_ready(gradient.program(*arguments))
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
