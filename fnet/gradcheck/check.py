"""`check_gradients`: the audit of one function's gradient, leaf by leaf.

    prepare, trace ─▶ the program of f ──▶ two witnesses: autodiff of it without custom rules, slopes along lines
    claim ──────────▶ the claimed gradient ─▶ judge: one verdict per leaf ─▶ cause, precision ladder, cost ─▶ Report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.gradcheck import causes, places
from fnet.gradcheck.problem import (
    UNTRACEABLE,
    Claim,
    Problem,
    Traced,
    align,
    claim,
    native_dtypes,
    precise,
    prepare,
    quick_jit,
    to_numpy,
    trace,
    undecorated,
)
from fnet.gradcheck.report import Cost, Intermediate, LeafCheck, Report, Rung
from fnet.gradcheck.slopes import Line, make_probe, taylor
from fnet.intermediates import intermediate_gradients
from fnet.interpret import is_array, is_float
from fnet.types import PyTree

FAULT = 1e-6  # what counts as one: a change by this share of the leaf's largest entry
TIGHT = 1e-9  # two right float64 gradients agree this well, unless rounding is measured to be larger
ROUNDING = 50  # times the measured rounding noise is still rounding
EXCESS = 10  # times its own error estimate a measured slope must be off to contradict
SMALL = 64  # entries up to which every coordinate is probed where there is no autodiff
PROBED = 64  # entries that differ from autodiff's which are probed one by one


class Witnesses(NamedTuple):
    """What the claimed gradients of one function are held against."""

    problem: Problem
    traced: Traced
    autodiff: list[np.ndarray] | None  # without custom rules; None where jax cannot differentiate the function
    why_not: str  # the reason
    probe: Callable
    lines: dict[int, list[tuple[np.ndarray, Line]]]  # directions over one leaf, and what was measured
    finite: bool
    derivative: Callable  # that autodiff, not compiled
    noise: dict  # rounding of programs that was measured already


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
    The function runs in float64 whatever the caller's settings, and the claimed gradient is compared with two witnesses:
    autodiff of ``f`` without its custom rules (jax's own are kept), entry by entry; and slopes measured along random
    lines over each leaf, with steps that cross no kink. Verdicts, per leaf:

    - ``ok``: both agree, and a fault of 1e-6 of the leaf's largest entry would have been seen;
    - ``wrong``, with the likely cause, the worst entry and both its values;
    - ``kink``: the point lies on a kink, named, and the claimed slope lies between the one-sided slopes in every direction;
    - ``imprecise``: right up to rounding, which was measured and is larger than 1e-9, here or at the caller's precision;
    - ``unverified``: nothing contradicts the gradient, but a fault of 1e-6 could have hidden.

    ``intermediates`` maps names of `fnet.tap`s in ``f`` to the caller's gradients of them (or is a function of
    ``(params, *args)`` that returns such a dict); each is compared, in the order of the backward pass. ``precisions`` are
    the rungs of the ladder besides float64 and the parameters' own; ``cost=False`` leaves out the measurement of both
    gradients' cost. ``seed`` draws the directions. With ``has_aux`` the function returns ``(scalar, aux)``.

    Raises ValueError where ``params`` has no floating leaf, where ``f`` does not return one floating scalar or cannot be
    traced, and for unknown names of intermediates; TypeError for complex leaves.

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
    outer_x64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    f_grad = jax.grad(f, has_aux=has_aux)
    claimed_by = f_grad if gradient is None else gradient
    if not callable(claimed_by):
        raise TypeError(f"check_gradients: gradient is {type(gradient).__name__}; expected a function of (params, *args)")
    with precise():
        problem = prepare(f, params, args, has_aux)
        traced = trace(problem)
        claimed = claim(problem, claimed_by)
        same = gradient is None and not traced.custom and all(g is not None for g in claimed.grads)
        witnesses = gather(problem, traced, seed, claimed if same else None)
        checks = judge_all(witnesses, claimed)
    with precise(outer_x64):
        complaints = native_dtypes(problem, claimed_by)
    checks = [
        leaf._replace(verdict="wrong", cause=words) if words and leaf.verdict != "wrong" else leaf
        for leaf, words in zip(checks, complaints, strict=True)
    ]
    checks = climb(problem, witnesses.autodiff or claimed.grads, claimed_by, f_grad, checks, precisions)
    costs = measure_costs(problem, claimed_by, f_grad, gradient is not None, outer_x64) if cost else ()
    compared = ()
    if intermediates is not None:
        compared = check_intermediates(f, params, args, intermediates, has_aux, problem, outer_x64)
    return Report(tuple(checks), compared, costs, remarks(witnesses, claimed), settings(seed))


def settings(seed: int) -> dict[str, str]:
    """What was in force, for the report."""
    return {
        "precision": "float64",
        "matmul precision": "highest",
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "seed": str(seed),
    }


def gather(problem: Problem, traced: Traced, seed: int, same: Claim | None = None) -> Witnesses:
    """Autodiff without custom rules, and the lines along random directions over each leaf. Within `precise`.

    ``same`` is a claim that is that very autodiff, so that it need not be compiled again.
    """
    derivative, why_not, grads = jax.grad(undecorated(traced.closed)), "", None
    try:
        arguments = problem.leaves, problem.others
        grads = same.grads if same is not None else [to_numpy(g) for g in quick_jit(derivative)(*arguments)]
    except (NotImplementedError, ValueError, TypeError) as error:
        why_not = str(error).strip().splitlines()[0][:200]
    probe = make_probe(traced.closed, problem.leaves, problem.others)
    rng = np.random.default_rng(seed)
    lines = {}
    for i, leaf in enumerate(problem.leaves):
        p = np.asarray(leaf, np.float64)
        directions = random_directions(p, rng, 4 if grads is not None else 12)
        if p.size <= (4 if grads is not None else SMALL):
            directions += [single(p, k) for k in range(p.size)]
        lines[i] = [(d, probe({i: d})) for d in directions] if p.size else []
    finite = np.isfinite(probe({}).base)
    return Witnesses(problem, traced, grads, why_not, probe, lines, bool(finite), derivative, {})


def random_directions(p: np.ndarray, rng, count: int) -> list[np.ndarray]:
    """Signs and Gaussians by turns, scaled by each value's own magnitude or by the leaf's."""
    common, own = magnitudes(p)
    found = []
    for k in range(count):
        draw = rng.choice([-1.0, 1.0], p.shape) if k % 2 == 0 else rng.standard_normal(p.shape)
        found.append(draw * (common if k % 4 in (0, 3) else own))
    return found


def magnitudes(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale of a step: at least the leaf's root mean square; and each value's own, that where it is 0."""
    size = np.abs(p)
    mean = float(np.sqrt((p**2).mean())) if p.any() else 1.0
    return np.maximum(size, max(mean, 1e-3)), np.where(size > 0, size, mean)


def single(p: np.ndarray, k: int) -> np.ndarray:
    """The direction of one entry."""
    d = np.zeros(p.size)
    d[k] = magnitudes(p)[0].flat[k]
    return d.reshape(p.shape)


def judge_all(witnesses: Witnesses, claimed: Claim) -> list[LeafCheck]:
    """A verdict for each leaf, and the likely causes of what is wrong."""
    checks = [judge(witnesses, claimed, i) for i in range(len(witnesses.problem.paths))]
    return add_causes(witnesses, claimed, checks)


def judge(w: Witnesses, claimed: Claim, i: int) -> LeafCheck:
    """The verdict of one leaf."""
    problem, c, complaint = w.problem, claimed.grads[i], claimed.complaints[i]
    p = np.asarray(problem.leaves[i])
    blank = LeafCheck(problem.paths[i], p.shape, str(problem.dtypes[i]), "wrong", np.inf, np.inf, (), np.nan, np.nan, np.inf)
    if not claimed.steady or not w.traced.steady:
        who = "the gradient" if w.traced.steady else "the function"
        return blank._replace(
            cause=f"{who} changes between two calls with the same arguments: pass it a key, and no hidden state"
        )
    if c is None:
        return blank._replace(cause=complaint)
    if p.size == 0:
        return blank._replace(verdict="ok", absolute=0.0, relative=0.0, ulps=0.0, power=0.0, evidence=("no entries",))
    if not w.finite:
        place = places.first_non_finite(w.traced.closed, [*problem.leaves, *problem.others])
        return blank._replace(verdict="unverified", cause=f"the function is not finite at this point: {place or 'inputs'}")
    a = None if w.autodiff is None else w.autodiff[i]
    expected = a if a is not None else measured(w, i, c)
    check = compare(blank, c, expected)
    line, slope = longest(w.lines[i], c)
    if line is not None:
        points, order = taylor(line, slope)
        check = check._replace(taylor=points, order=order)
    finding = Finding(c, a, expected, p)
    verdict = with_autodiff(w, claimed, i, finding) if a is not None else without_autodiff(w, i, finding)
    check = check._replace(**verdict)
    if complaint:
        check = check._replace(verdict="wrong", cause=complaint)
    return check


class Finding(NamedTuple):
    """One leaf's arrays."""

    claimed: np.ndarray
    autodiff: np.ndarray | None
    expected: np.ndarray
    value: np.ndarray


def measured(w: Witnesses, i: int, c: np.ndarray) -> np.ndarray:
    """The gradient by single coordinates where all were probed, NaN where not."""
    e = np.full(c.shape, np.nan)
    for d, line in w.lines[i]:
        hit = np.flatnonzero(d)
        if len(hit) == 1 and line.usable:
            e.flat[hit[0]] = (line.left + line.right) / 2 / d.flat[hit[0]]
    return e


def compare(check: LeafCheck, c: np.ndarray, e: np.ndarray) -> LeafCheck:
    """The errors of a claimed array against the expected one."""
    known = np.isfinite(e)
    scale = float(np.abs(e[known]).max(initial=0)) or float(np.abs(c[np.isfinite(c)]).max(initial=0)) or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(c - e)
    error = np.where(np.isfinite(c), np.where(known, error, 0.0), np.inf)
    index = np.unravel_index(int(error.argmax()), c.shape) if c.size else ()
    worst = tuple(int(k) for k in index)
    absolute = float(error[index])
    ulps = absolute / float(np.spacing(abs(e[index]))) if np.isfinite(e[index]) else np.inf
    return check._replace(
        absolute=absolute,
        relative=absolute / scale,
        worst=worst,
        claimed=float(c[index]),
        expected=float(e[index]),
        ulps=ulps,
        errors=blocks(error / scale),
    )


def blocks(error: np.ndarray, most: int = 64) -> np.ndarray:
    """An array as a matrix of at most ``most`` by ``most``, each entry the largest of its block."""
    matrix = error.reshape(error.shape[0], -1) if error.ndim > 1 else error.reshape(1, -1)
    for axis in (0, 1):
        if matrix.shape[axis] > most:
            starts = np.unique(np.linspace(0, matrix.shape[axis], most, endpoint=False).astype(int))
            matrix = np.maximum.reduceat(matrix, starts, axis=axis)
    return matrix


def longest(lines, c: np.ndarray):
    """The line with the most smooth steps without a kink, for the Taylor remainder, and the claimed slope along it."""
    usable = [(d, line) for d, line in lines if line.usable and not line.kinked]
    if not usable or not np.isfinite(c).all():
        return None, 0.0
    d, line = max(usable, key=lambda pair: len(pair[1].steps))
    return line, float((c * d).sum())


def contradicts(line: Line, gradient: np.ndarray, d: np.ndarray) -> bool:
    """Whether the slope of a gradient lies outside the measured one-sided slopes, by more than any error."""
    with np.errstate(invalid="ignore"):
        slope, slack = float((gradient * d).sum()), 1e-12 * float(np.abs(gradient * d).sum())
    return line.usable and line.excess(slope, slack) > EXCESS


def with_autodiff(w: Witnesses, claimed: Claim, i: int, leaf: Finding) -> dict:
    """The verdict of a leaf for which there is autodiff: entry by entry, then the slopes."""
    c, a, p = leaf.claimed, leaf.autodiff, leaf.value
    assert a is not None
    evidence = [describe_lines(w.lines[i])]
    scale = float(np.abs(a[np.isfinite(a)]).max(initial=0))
    with np.errstate(invalid="ignore"):
        differ = ~(np.abs(c - a) <= TIGHT * scale)
    power = TIGHT
    bad_lines = [(d, line) for d, line in w.lines[i] if contradicts(line, c, d)]
    kinked = [line for _, line in w.lines[i] if line.kinked]
    if not differ.any():
        evidence.insert(0, f"agrees with autodiff to {digits(c, a, scale)}")
        if bad_lines:
            reason = "its slope is not the one measured, though autodiff gives the same"
            blocked = w.traced.blocked
            if blocked:
                reason += f": stop_gradient at {', '.join(blocked[:3])}"
            return {"verdict": "wrong", "cause": reason, "evidence": (*evidence, tell(bad_lines[0], c)), "power": power}
        if kinked:
            return on_kink(w, evidence, power)
        return settle(w, i, evidence, power)
    if not np.isfinite(c).all():
        place = where_not_finite(w, claimed)
        return {"verdict": "wrong", "cause": f"not finite: {place}" if place else "", "evidence": tuple(evidence), "power": power}

    # is it rounding?
    with np.errstate(invalid="ignore"):
        difference = np.abs(c - a)
    clear = bad_lines and not contradicts_any(w.lines[i], a) and np.nanmax(difference) > 1e-2 * scale
    if not clear and np.isfinite(a).all():
        noise = noise_of(w, claimed, i)
        if (difference <= ROUNDING * noise + TIGHT * scale).all() and not bad_lines:
            size = float(noise.max()) / (scale or 1.0)
            evidence.insert(0, f"agrees with autodiff up to rounding, measured to be {size:.0e} of the largest entry")
            power = ROUNDING * size
            if scale == 0 or power <= FAULT or float(np.abs(c - a).max()) >= scale * 0.5:
                return settle(w, i, evidence, power if scale else 0.0)
            return {**settle(w, i, evidence, power), "verdict": "imprecise", "cause": f"rounding of {size:.0e} in float64"}
        if difference.max() <= 0.5 * FAULT * scale and not bad_lines:
            evidence.insert(0, f"agrees with autodiff to {digits(c, a, scale)}")
            cause = f"agrees to {digits(c, a, scale)} only: a constant in float32?"
            return {**settle(w, i, evidence, power), "verdict": "imprecise", "cause": cause}

    # who is right where they differ: the slopes decide
    entries = np.flatnonzero(differ)
    order = np.argsort(-np.nan_to_num(difference.flat[entries], nan=np.inf))
    probes = [single(p, k) for k in entries[order][:PROBED]]
    if len(entries) > PROBED:
        probes += [np.where(differ, d, 0.0) for d in random_directions(p, np.random.default_rng(len(entries)), 8)]
    measured_lines, against = [], []
    for d in [] if bad_lines else probes:
        measured_lines.append((d, w.probe({i: d})))
        if contradicts(measured_lines[-1][1], c, d):
            against.append(measured_lines[-1])
            break
    decisive = [
        (d, line)
        for d, line in measured_lines
        if line.usable and (line.kinked or not np.isfinite((a * d).sum()) or contradicts(line, a, d))
    ]
    if against or bad_lines or len(decisive) < max(1, min(len(probes), 4)):
        shown = (against or bad_lines or measured_lines)[0]
        cause = ""
        if shown[1].kinked:
            found = places.ties(w.traced.closed, [*w.problem.leaves, *w.problem.others], len(w.problem.leaves))
            cause = f"outside the one-sided slopes of the kink: {'; '.join(found)}" if found else ""
        return {"verdict": "wrong", "cause": cause, "evidence": (*evidence, tell(shown, c)), "power": power}
    evidence.insert(0, f"{len(probes)} directions over the entries where autodiff differs agree with the measured slopes")
    if any(line.kinked for _, line in measured_lines) or kinked:
        return on_kink(w, evidence, power)
    if len(decisive) < len(probes):
        return {"verdict": "unverified", "cause": "autodiff differs where slopes cannot tell", "evidence": tuple(evidence), "power": np.inf}
    return settle(w, i, evidence, power)


def on_kink(w: Witnesses, evidence, power) -> dict:
    """The verdict where one-sided slopes differ and the claim lies between: the kink, by its place, or a wrong one."""
    found = places.ties(w.traced.closed, [*w.problem.leaves, *w.problem.others], len(w.problem.leaves))
    if found:
        return {"verdict": "kink", "cause": "; ".join(found), "evidence": tuple(evidence), "power": power}
    cause = "one-sided slopes differ, but no operation lies on a kink: a jump, or a kink inside a custom operation"
    return {"verdict": "unverified", "cause": cause, "evidence": tuple(evidence), "power": power}


def settle(w: Witnesses, i: int, evidence, power: float) -> dict:
    """Ok, unless a fault could have hidden: in a narrower type, or under the noise of the slopes."""
    if w.traced.casts:
        seen = numeric_power(w, i)
        cause = f"casts to {'; '.join(w.traced.casts[:3])}; in that precision faults above {seen:.0e} would have been seen"
        return {"verdict": "unverified", "cause": cause, "evidence": tuple(evidence), "power": max(power, seen)}
    if i in w.traced.unused:
        return {"verdict": "ok", "cause": "the function does not depend on this leaf", "evidence": tuple(evidence), "power": 0.0}
    return {"verdict": "ok", "evidence": tuple(evidence), "power": power}


def numeric_power(w: Witnesses, i: int, gradient: np.ndarray | None = None) -> float:
    """The smallest fault in any one entry that the measured lines show, relative to the leaf's largest entry."""
    visible = np.full(w.problem.leaves[i].shape, np.inf)
    g = gradient if gradient is not None else w.autodiff[i] if w.autodiff is not None else None
    for d, line in w.lines[i]:
        if line.usable and not line.kinked:
            with np.errstate(divide="ignore"):
                visible = np.minimum(visible, EXCESS * line.error / np.abs(d))
    scale = float(np.abs(g).max(initial=0)) if g is not None else 0.0
    return float(visible.max(initial=0)) / scale if scale else np.inf


def without_autodiff(w: Witnesses, i: int, leaf: Finding) -> dict:
    """The verdict of a leaf that only measured slopes can judge."""
    c, p = leaf.claimed, leaf.value
    evidence = [f"no autodiff: {w.why_not}", describe_lines(w.lines[i])]
    if not np.isfinite(c).all():
        return {"verdict": "wrong", "cause": "", "evidence": tuple(evidence), "power": np.inf}
    power = numeric_power(w, i, c) if c.any() else np.inf
    bad = [(d, line) for d, line in w.lines[i] if contradicts(line, c, d)]
    if bad:
        evidence.append(tell(bad[0], c))
        return {"verdict": "wrong", "cause": narrow(w, i, c, p), "evidence": tuple(evidence), "power": power}
    if any(line.kinked for _, line in w.lines[i]):
        return on_kink(w, evidence, power)
    if not any(line.usable for _, line in w.lines[i]):
        return {"verdict": "unverified", "cause": "no step is smooth: slopes cannot be measured", "evidence": tuple(evidence), "power": np.inf}
    verdict = settle(w, i, evidence, power)
    if verdict["verdict"] == "ok" and power > FAULT and i not in w.traced.unused:
        verdict |= {"verdict": "unverified", "cause": f"slopes alone see faults above {power:.0e}, not {FAULT:.0e}"}
    return verdict


def narrow(w: Witnesses, i: int, c: np.ndarray, p: np.ndarray) -> str:
    """Where a gradient is wrong that only slopes can judge: halve the leaf along each axis while one half is right."""
    ratios = [line.left / s for d, line in w.lines[i] if line.usable and (s := float((c * d).sum())) != 0]
    if len(ratios) > 2 and np.ptp(ratios) <= 1e-5 * abs(np.mean(ratios)):
        return causes.pattern(c, c * np.mean(ratios), None, w.problem.examples, 1e-4)
    if not c.any():
        return "zero: never receives a gradient"
    full = np.random.default_rng(i).choice([-1.0, 1.0], p.shape) * magnitudes(p)[0]
    words = []
    for axis, name in enumerate(causes.axis_names(p.ndim)):
        hit = np.arange(p.shape[axis])
        while len(hit) > 1:
            halves = [hit[: len(hit) // 2], hit[len(hit) // 2 :]]
            wrong = []
            for half in halves:
                keep = np.isin(np.arange(p.shape[axis]), half)
                d = full * np.expand_dims(keep, tuple(k for k in range(p.ndim) if k != axis))
                if contradicts(w.probe({i: d}), c, d):
                    wrong.append(half)
            if len(wrong) != 1:
                break
            hit = wrong[0]
        if len(hit) == 1:
            words.append(f"{name} {hit[0]}")
    return " and ".join(words) + " wrong" if words else ""


def contradicts_any(lines, gradient) -> bool:
    return any(contradicts(line, gradient, d) for d, line in lines)


def digits(c, a, scale) -> str:
    """How many digits two arrays share, relative to a scale."""
    error = float(np.abs(c - a).max(initial=0))
    return "every bit" if error == 0 else f"{max(0, int(-np.log10(error / scale))) if scale else 0} digits"


def describe_lines(lines) -> str:
    """How many lines were measured, and how well."""
    usable = [line for _, line in lines if line.usable]
    if not usable:
        return f"none of {len(lines)} lines could be measured: no smooth step"
    return f"{len(usable)} of {len(lines)} lines measured, steps from {min(line.steps[0] for line in usable if line.steps):.0e}"


def tell(pair, c: np.ndarray) -> str:
    """A measured slope beside the claimed one."""
    d, line = pair
    with np.errstate(invalid="ignore"):
        slope = float((c * d).sum())
    if not line.usable:
        return "no slope could be measured there"
    measured = f"{line.left:.9g}" if line.left == line.right else f"{line.left:.9g} from the left, {line.right:.9g} from the right"
    return f"along a line the claimed slope is {slope:.9g}, measured {measured} ± {line.error:.0e}"


def noise_of(w: Witnesses, claimed: Claim, i: int) -> np.ndarray:
    """The rounding of the claimed and of autodiff's entries, added; each program is measured once for all its leaves."""
    inputs = [*w.problem.leaves, *w.problem.others]
    total = np.zeros(w.problem.leaves[i].shape)
    if w.autodiff is not None:
        if "autodiff" not in w.noise:
            program = jax.make_jaxpr(w.derivative)(w.problem.leaves, w.problem.others)
            w.noise["autodiff"] = places.rounding(program, inputs)
        total = total + w.noise["autodiff"][i]
    if claimed.closed is not None:
        if id(claimed.closed) not in w.noise:
            w.noise[id(claimed.closed)] = places.rounding(claimed.closed, inputs, seed=1)
        position = sum(g is not None for g in claimed.grads[:i])
        total = total + w.noise[id(claimed.closed)][position]
    return total


def where_not_finite(w: Witnesses, claimed: Claim) -> str:
    """The operation of the claimed gradient that makes the first NaN or infinity."""
    if claimed.closed is None:
        return ""
    place = places.first_non_finite(claimed.closed, [*w.problem.leaves, *w.problem.others])
    hint = "; if it stands behind a `where`, choose the safe argument before the operation, not after"
    return place + hint if place else ""


def add_causes(w: Witnesses, claimed: Claim, checks: list[LeafCheck]) -> list[LeafCheck]:
    """The likely cause of each wrong leaf that has none yet."""
    expected = w.autodiff
    tol = 1e-4 if w.traced.casts else 1e-7
    open_ones: dict[int, np.ndarray] = {}
    for i, check in enumerate(checks):
        c = claimed.grads[i]
        if check.verdict != "wrong" or check.cause or c is None:
            continue
        e = expected[i] if expected is not None else measured(w, i, c)
        if not np.isfinite(e).all():
            continue
        others = {} if expected is None else {w.problem.paths[j]: expected[j] for j in range(len(checks)) if j != i}
        cause = causes.pattern(c, e, others, w.problem.examples, tol)
        checks[i] = check._replace(cause=cause)
        if expected is not None and np.isfinite(c).all() and (not cause or vague(cause)):
            open_ones[i] = c
    if open_ones and expected is not None:
        inputs = w.problem.leaves, w.problem.others
        found = causes.explain(w.traced.closed, *inputs, expected, open_ones, 1e-3 if w.traced.casts else 1e-5)
        for i, words in found.items():
            checks[i] = checks[i]._replace(cause=words or checks[i].cause or "no pattern recognised")
    return checks


def vague(cause: str) -> bool:
    """Whether a cause only says where, so that the program may say why."""
    return cause.endswith(" wrong") or cause.startswith(("summed over the wrong axis (", "factor"))


def climb(problem, exact, claimed_by, f_grad, checks, precisions) -> list[LeafCheck]:
    """The precision ladder: claimed and autodiff gradients at narrower precisions, against float64."""
    own = [str(d) for d in dict.fromkeys(problem.dtypes) if d != np.float64]
    rungs: list[list[Rung]] = [[] for _ in checks]
    for dtype in dict.fromkeys([*own, *precisions]):
        try:
            hand = at_precision(problem, claimed_by, dtype)
            auto = hand if claimed_by is f_grad else at_precision(problem, f_grad, dtype)
        except Exception as error:  # the user's function in a dtype that it was never written for: said on the rung
            if dtype in own:
                raise
            for ladder in rungs:
                ladder.append(Rung(dtype, np.nan, np.nan, f"does not run: {type(error).__name__}"))
            continue
        for i, ladder in enumerate(rungs):
            c64, c, a = exact[i], hand[i], auto[i]
            if c64 is None or c is None or a is None or not c64.size:
                continue
            scale = float(np.abs(c64[np.isfinite(c64)]).max(initial=0)) or 1.0
            with np.errstate(invalid="ignore"):
                ladder.append(Rung(dtype, float(np.abs(c - c64).max()) / scale, float(np.abs(a - c64).max()) / scale))
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
    if mine.error <= max(100 * mine.expected, 1000 * eps):
        return check
    if not np.isfinite(mine.error) and not np.isfinite(mine.expected):
        return check
    cause = f"in {mine.dtype} the error is {mine.error:.0e}; expected {max(mine.expected, eps):.0e}"
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


def measure_costs(problem, claimed_by, f_grad, by_hand: bool, x64: bool) -> tuple[Cost, ...]:
    """FLOPs, bytes, peak memory and time of the claimed gradient and of autodiff, at the caller's own precision."""
    found = []
    with precise(x64):
        leaves, others = problem.native(None)
        for name, gradient in [("claimed", claimed_by), ("autodiff", f_grad)] if by_hand else [("autodiff", f_grad)]:

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


def check_intermediates(f, params, args, given, has_aux, problem, x64) -> tuple[Intermediate, ...]:
    """The caller's gradients of tapped values against the true ones, in the order of the backward pass."""
    def true_and_given(dtype, x64):
        with precise(x64):
            leaves, others = problem.native(dtype)
            p, a = problem.rebuild(leaves, others)
            run = quick_jit(lambda leaves, others: intermediate_gradients(f, *rejoin(problem, leaves, others), has_aux=has_aux))
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
            row = Intermediate(name, t.shape, "wrong", "wrong", np.inf, (), np.nan, np.nan, f"wrong shape: {c.shape}, expected {t.shape}")
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
            agreement = "exact" if check.relative == 0 or np.array_equal(c, n) else f"{max(0, int(-np.log10(check.relative)))} digits"
            cause = "" if fine else causes.pattern(c, reference, {k: v for k, v in true.items() if k != name}, problem.examples, max(1e-7, 100 * eps))
            if not fine and first:
                cause = f"{cause}; " if cause else ""
                cause += f"may follow from {first}"
            row = Intermediate(
                name, t.shape, "ok" if fine else "wrong", agreement if fine else "wrong",
                check.relative, check.worst, check.claimed, check.expected, cause,
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


def remarks(w: Witnesses, claimed: Claim) -> tuple[str, ...]:
    """What the table does not show."""
    notes = ["float64, products in the highest precision; errors are relative to each leaf's largest entry"]
    if w.autodiff is None:
        notes.append(f"autodiff cannot differentiate this function ({w.why_not}): slopes alone")
    elif w.traced.custom:
        notes.append("the function has custom rules: autodiff as a witness ignores them")
    if claimed.closed is None:
        notes.append("the gradient is not traceable and ran uncompiled")
    return tuple(notes)
