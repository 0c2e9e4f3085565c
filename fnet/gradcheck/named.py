"""Gradients of tapped values against the caller's own, in the order of the backward pass."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fnet.gradcheck import causes
from fnet.gradcheck.judge import compare
from fnet.gradcheck.problem import precise, quick_jit
from fnet.gradcheck.report import Intermediate, LeafCheck
from fnet.gradcheck.witnesses import TIGHT
from fnet.intermediates import intermediate_gradients


def check_intermediates(f, params, args, given, has_aux, problem, x64) -> tuple[Intermediate, ...]:
    """The caller's gradients of tapped values against the true ones, in the order of the backward pass."""

    def true_and_given(dtype, x64):
        with precise(x64):
            leaves, others = problem.native(dtype)
            p, a = problem.rebuild(leaves, others)
            run = quick_jit(
                lambda leaves, others: intermediate_gradients(f, *rejoin(problem, leaves, others), has_aux=has_aux)
            )
            names = list(intermediate_gradients_order(f, p, a, has_aux))
            true = run(leaves, others)
            mine = given(p, *a) if callable(given) else given
            to64 = lambda tree: {k: np.asarray(v, np.float64) for k, v in tree.items()}  # noqa: E731
            return {k: np.asarray(true[k], np.float64) for k in names}, to64(mine)

    true, mine = true_and_given(jnp.float64, True)
    unknown = [name for name in mine if name not in true]
    if unknown:
        raise ValueError(f"intermediates: {unknown} are not tapped in the function; the taps are {list(true)}")
    native, _ = true_and_given(None, x64)
    rows, first = [], ""
    dtypes = {np.asarray(v).dtype for v in (given.values() if isinstance(given, Mapping) else [])}
    for name, t in true.items():
        if name not in mine:
            continue
        c, n = mine[name], native[name]
        if c.shape != t.shape:
            row = Intermediate(
                name,
                t.shape,
                "wrong",
                "wrong",
                np.inf,
                (),
                np.nan,
                np.nan,
                f"wrong shape: {c.shape}, expected {t.shape}",
            )
        else:
            scale = float(np.abs(t).max(initial=0)) or 1.0
            # given in the caller's precision: what rounding makes of the true value there is no fault
            rounding = 0.0 if callable(given) else float(np.abs(n - t).max(initial=0)) / scale
            reference = t
            if rounding > 1e-2:  # random numbers that depend on the precision: compare at the caller's
                reference, rounding = n, 0.0
            blank = LeafCheck(name, t.shape, "", "", 0.0, 0.0, (), 0.0, 0.0, 0.0)
            check = compare(blank, c, reference)
            eps = max([float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating)], default=2.0**-52)
            fine = check.relative <= max(TIGHT, 20 * rounding, 200 * eps)
            agreement = (
                "exact"
                if check.relative == 0 or np.array_equal(c, n)
                else f"{max(0, int(-np.log10(check.relative)))} digits"
            )
            cause = (
                ""
                if fine
                else causes.pattern(
                    c, reference, {k: v for k, v in true.items() if k != name}, problem.examples, max(1e-7, 100 * eps)
                )
            )
            if not fine and first:
                cause = f"{cause}; " if cause else ""
                cause += f"may follow from {first}"
            row = Intermediate(
                name,
                t.shape,
                "ok" if fine else "wrong",
                agreement if fine else "wrong",
                check.relative,
                check.worst,
                check.claimed,
                check.expected,
                cause,
            )
        rows.append(row)
        first = first or (name if row.verdict != "ok" else "")
    return tuple(rows)


def rejoin(problem, leaves, others):
    p, a = problem.rebuild(leaves, others)
    return (p, *a)


def intermediate_gradients_order(f, p, a, has_aux):
    """The names in the order of the backward pass (a dict that leaves jit is sorted)."""
    names: list[str] = []

    def record(leaves):
        out = intermediate_gradients(f, p, *a, has_aux=has_aux)
        names.extend(out)
        return out

    jax.eval_shape(record, 0)
    return names
