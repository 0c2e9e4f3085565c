"""The verdict on each leaf of a claimed gradient.

agrees with autodiff entry by entry? ── yes ─▶ do the slopes agree? ─ yes ─▶ ok, or a kink
        │ no                                                        └ no ──▶ wrong
        └──▶ by rounding, as measured? ─ yes ─▶ ok or imprecise
                     │ no
                     └──▶ the slopes over the entries that differ decide: wrong, a kink, or ok where autodiff fails
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.interpret import dependencies
from fnet.gradcheck import causes, patterns, places
from fnet.gradcheck.claims import Claim, largest
from fnet.gradcheck.report import LeafCheck, Rung
from fnet.gradcheck.slopes import taylor
from fnet.gradcheck.witnesses import (
    EXCESS,
    FAULT,
    ROUNDING,
    TIGHT,
    Witnesses,
    contradicts,
    first_against,
    magnitudes,
    measured,
    noise_of,
    numeric_power,
    pairs,
    resolve,
    settle_lines,
    small_faults,
)

NARROW = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")  # by their rounding


def judge_all(witnesses: Witnesses, claimed: Claim) -> list[LeafCheck]:
    """A verdict for each leaf, and the likely causes of what is wrong."""
    checks = [judge(witnesses, claimed, i) for i in range(len(witnesses.problem.paths))]
    return add_causes(witnesses, claimed, checks)


def judge(w: Witnesses, claimed: Claim, i: int) -> LeafCheck:
    """The verdict of one leaf."""
    problem, c, complaint = w.problem, claimed.grads[i], claimed.complaints[i]
    p = np.asarray(problem.leaves[i])
    blank = LeafCheck(
        problem.paths[i], p.shape, str(problem.dtypes[i]), "wrong", np.inf, np.inf, (), np.nan, np.nan, np.inf
    )
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
        return blank._replace(
            verdict="unverified", cause=f"the function is not finite at this point: {place or 'inputs'}"
        )
    a = None if w.autodiff is None else w.autodiff[i]
    expected = a if a is not None else measured(w, i, c)
    check = compare(blank, c, expected)
    line, slope = longest(w, i, c)
    if line is not None:
        points, order = taylor(line, slope)
        check = check._replace(taylor=points, order=order)
    check = check._replace(**(with_autodiff(w, claimed, i, c, a) if a is not None else without_autodiff(w, i, c)))
    if complaint:
        check = check._replace(verdict="wrong", cause=complaint)
    exact = None if w.exact is None else w.exact[i]
    if w.traced.casts and check.verdict in ("wrong", "unverified") and exact is not None and a is not None:
        check = beside_casts(w, i, check, c, a, exact)
    return check


def beside_casts(w: Witnesses, i: int, check: LeafCheck, c: np.ndarray, a: np.ndarray, exact: np.ndarray) -> LeafCheck:
    """The verdict of a leaf of a function with casts, and which of the two gradients is that of it without them."""
    scale = largest(exact) or 1.0
    mine, autos = (float(np.abs(g - exact).max()) / scale for g in (c, a))
    side = Rung(next(name for name in NARROW if w.traced.eps <= 1.01 * jnp.finfo(name).eps), mine, autos).erred
    if check.verdict == "wrong":  # by autodiff alone, which is no witness where it errs itself
        if side != "autodiff" or first_against(w, i, c) is not None:
            return check
        check = check._replace(**settle(w, i, check.evidence, TIGHT))
    errs = {"": "", "claimed": ": the claimed one errs", "autodiff": ": autodiff errs"}[side]
    words = f"without them the claimed gradient is off by {mine:.0e} and autodiff's by {autos:.0e}{errs}"
    return check._replace(cause=f"{check.cause}; {words}")


def compare(check: LeafCheck, c: np.ndarray, e: np.ndarray) -> LeafCheck:
    """The errors of a claimed array against the expected one."""
    known = np.isfinite(e)
    scale = largest(e) or largest(c) or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(c - e)
    error = np.where(np.isfinite(c), np.where(known, error, 0.0), np.inf)
    index = np.unravel_index(int(error.argmax()), c.shape) if c.size else ()
    worst = tuple(int(k) for k in index)
    absolute = float(error[index]) if known.any() or not np.isfinite(c).all() else np.nan
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


def longest(w: Witnesses, i: int, c: np.ndarray):
    """The line with the most smooth steps without a kink, for the Taylor remainder, and the claimed slope along it."""
    best, slope = None, 0.0
    for d, line in pairs(w, i) if np.isfinite(c).all() else ():
        if line.usable and not line.kinked and (best is None or len(line.steps) > len(best.steps)):
            best, slope = line, float((c * d).sum())
    return best, slope


def with_autodiff(w: Witnesses, claimed: Claim, i: int, c: np.ndarray, a: np.ndarray) -> dict:
    """The verdict of a leaf for which there is autodiff: entry by entry, then the slopes."""
    lines, evidence = w.lines[i], [describe_lines(w.lines[i])]
    scale = largest(a)
    with np.errstate(invalid="ignore"):
        difference = np.abs(c - a)
    differ = ~(difference <= TIGHT * scale)
    bad = first_against(w, i, c)

    def wrong(cause: str = "", pair=None) -> dict:
        said = (*evidence, tell(pair, c)) if pair is not None else tuple(evidence)
        return {"verdict": "wrong", "cause": cause, "evidence": said, "power": TIGHT}

    if not np.isfinite(c).all():
        place = where_not_finite(w, claimed)
        return wrong(f"not finite: {place}" if place else "")
    small = np.zeros(c.shape, bool)
    if (difference <= 0.5 * FAULT * scale).all() and (small := small_faults(c, a)).any():
        small &= difference > ROUNDING * noise_of(w, claimed, i)  # what the leaf's largest entry would hide
    if not differ.any() and not small.any():
        evidence.insert(0, f"agrees with autodiff to {digits(c, a, scale)}")
        if bad is not None:
            blocked = f": stop_gradient at {', '.join(w.traced.blocked[:3])}" if w.traced.blocked else ""
            return wrong(f"its slope is not the one measured, though autodiff gives the same{blocked}", bad)
        return settle(w, i, evidence, TIGHT)

    # is it rounding?
    clear = bad is not None and first_against(w, i, a) is None and np.nanmax(difference) > 1e-2 * scale
    if not small.any() and not clear and np.isfinite(a).all() and bad is None:
        noise = noise_of(w, claimed, i)
        size, power = float(noise.max()) / (scale or 1.0), ROUNDING * float(noise.max()) / (scale or 1.0)
        if (difference <= ROUNDING * noise + TIGHT * scale).all():
            evidence.insert(0, f"agrees with autodiff up to rounding, measured to be {size:.0e} of the largest entry")
            settled = settle(w, i, evidence, power)
            if power <= FAULT or settled["verdict"] != "ok":
                return settled
            if scale <= ROUNDING * float(noise.max()):
                return settled | zero_up_to_rounding(lines, size)
            return settled | {"verdict": "imprecise", "cause": f"rounding of {size:.0e} in float64"}
        if difference.max() <= 0.5 * FAULT * scale:
            evidence.insert(0, f"agrees with autodiff to {digits(c, a, scale)}")
            settled = settle(w, i, evidence, TIGHT)
            cause = f"agrees to {digits(c, a, scale)} only: a constant in float32?"
            return settled | ({"verdict": "imprecise", "cause": cause} if settled["verdict"] == "ok" else {})

    # who is right where they differ: the slopes decide
    where = {}
    if small.any():  # measured among themselves: beside the largest entry they are rounding
        differ, c, a = small, np.where(small, c, 0.0), np.where(small, a, 0.0)
        share = f"in {small.sum()} of {small.size} entries, small beside the leaf's largest"
        pattern = patterns.pattern(c[small], a[small], None, w.problem.examples)
        worst = np.unravel_index(int(np.abs(c - a).argmax()), c.shape)
        values = {"worst": tuple(map(int, worst)), "claimed": float(c[worst]), "expected": float(a[worst])}
        where = {"cause": f"{share}: {pattern or 'another value than autodiff gives'}", **values}
    found = resolve(w, i, c, np.flatnonzero(differ), a) if bad is None else None
    against = bad if found is None else found.against
    if against is not None:
        at = kinks(w, i) if against[1].kinked else ""
        return wrong(f"outside the one-sided slopes of the kink: {at}" if at else "", against) | where
    assert found is not None
    if found.blind or (found.open and not found.kinked and np.isfinite(a[differ]).all()):
        return wrong() | where
    evidence.insert(0, f"{found.probes} lines over the entries where autodiff differs agree with the measured slopes")
    if found.open:
        cause = f"autodiff differs in {differ.sum()} entries, too many or too rough to measure: {kinks(w, i)}"
        return {"verdict": "unverified", "cause": cause, "evidence": tuple(evidence), "power": np.inf}
    if found.kinked:
        return on_kink(kinks(w, i), evidence, TIGHT)
    return settle(w, i, evidence, TIGHT)


def zero_up_to_rounding(lines, size: float) -> dict:
    """A gradient that is all rounding: zero, if the slopes say so; else nothing is known of it."""
    flat = all(line.usable and EXCESS * line.error <= 1e-6 * max(abs(line.base), line.largest) for line in lines)
    if flat:
        return {"cause": "zero up to rounding"}
    return {"verdict": "unverified", "cause": f"rounding of {size:.0e} times the gradient itself: nothing can be said"}


def kinks(w: Witnesses, i: int) -> str:
    """The kinks that the point lies on, by their places."""
    return "; ".join(places.ties(w.traced.closed, [*w.problem.leaves, *w.problem.others], i))


def on_kink(at: str, evidence, power) -> dict:
    """The verdict where one-sided slopes differ and the claim lies between: the kink, by its place, if it is one."""
    if at:
        return {"verdict": "kink", "cause": at, "evidence": tuple(evidence), "power": power}
    cause = "one-sided slopes differ, but no operation is known to lie on a kink"
    return {"verdict": "unverified", "cause": cause, "evidence": tuple(evidence), "power": power}


def settle(w: Witnesses, i: int, evidence, power: float) -> dict:
    """Nothing contradicts the leaf: ok, at a kink, or unverified where a fault could have hidden."""

    def said(verdict: str, cause: str = "", power: float = power) -> dict:
        return {"verdict": verdict, "cause": cause, "evidence": tuple(evidence), "power": power}

    if w.traced.casts:
        seen = numeric_power(w, i)
        cause = f"casts to {'; '.join(w.traced.casts[:3])}; there only faults above {seen:.0e} would have been seen"
        return said("unverified", cause, max(power, seen))
    if i in w.traced.unused:
        return said("ok", "the function does not depend on this leaf", 0.0)
    edged = any(line.kinked or line.rough for line in w.lines[i])
    at = kinks(w, i) if edged else ""
    if edged and not at:  # no tie explains it; a step that was too long may
        settle_lines(w, i)
    if any(line.rough for line in w.lines[i]):
        return said("unverified", f"one-sided slopes do not settle: a cusp or a jump ({at or 'place unknown'})")
    if any(line.kinked for line in w.lines[i]):
        return on_kink(at, evidence, power)
    a = w.autodiff[i] if w.autodiff is not None else None
    if a is not None and not a.any():
        at = places.flat_operations(w.traced.closed, i)
        learned = f"zero everywhere, so nothing is learned: it acts through {at}"
        return said("ok", learned if at else "zero at this point")
    return said("ok")


def without_autodiff(w: Witnesses, i: int, c: np.ndarray) -> dict:
    """The verdict of a leaf that only measured slopes can judge."""
    evidence = [f"no autodiff: {w.why_not}", describe_lines(w.lines[i])]
    if not np.isfinite(c).all():
        return {"verdict": "wrong", "cause": "", "evidence": tuple(evidence), "power": np.inf}
    power = numeric_power(w, i, c) if c.any() else np.inf
    bad = first_against(w, i, c, 0.05 * FAULT)
    if bad is None and any(line.kinked for line in w.lines[i]):
        found = resolve(w, i, c, np.arange(c.size))
        bad = found.against
        if bad is None and found.open:
            cause = "on a kink, and not every entry could be measured beside it"
            return {"verdict": "unverified", "cause": cause, "evidence": tuple(evidence), "power": np.inf}
    if bad is not None:
        evidence.append(tell(bad, c))
        known = np.isfinite(measured(w, i, c)).all()  # then its pattern says more
        cause = "" if known else narrow(w, i, c)
        return {"verdict": "wrong", "cause": cause, "evidence": tuple(evidence), "power": power}
    if not any(line.usable or line.rough for line in w.lines[i]):
        cause = "no step is smooth: slopes cannot be measured"
        return {"verdict": "unverified", "cause": cause, "evidence": tuple(evidence), "power": np.inf}
    verdict = settle(w, i, evidence, power)
    if verdict["verdict"] == "ok" and power > FAULT and i not in w.traced.unused:
        verdict |= {"verdict": "unverified", "cause": f"slopes alone see faults above {power:.0e}, not {FAULT:.0e}"}
    return verdict


def narrow(w: Witnesses, i: int, c: np.ndarray) -> str:
    """Where a gradient is wrong that only slopes can judge: halve the leaf along each axis while one half is right."""
    ratios = [line.left / s for d, line in pairs(w, i) if line.usable and (s := float((c * d).sum())) != 0]
    if len(ratios) > 2 and np.ptp(ratios) <= 1e-5 * abs(np.mean(ratios)):
        return patterns.pattern(c, c * np.mean(ratios), None, w.problem.examples, 1e-4)
    if not c.any():
        return "zero: never receives a gradient"
    p = np.asarray(w.problem.leaves[i], np.float64)
    full = np.random.default_rng(i).choice([-1.0, 1.0], p.shape) * magnitudes(p)[0]
    words = []
    for axis, name in enumerate(patterns.axis_names(p.ndim)):
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


def digits(c, a, scale) -> str:
    """How many digits two arrays share, relative to a scale."""
    error = float(np.abs(c - a).max(initial=0))
    return "every bit" if error == 0 else f"{max(0, int(-np.log10(error / scale))) if scale else 0} digits"


def describe_lines(lines) -> str:
    """How many lines were measured, and how well."""
    usable = [line for line in lines if line.usable]
    if not usable:
        return f"none of {len(lines)} lines could be measured: no smooth step"
    longest_step = min(line.steps[0] for line in usable)
    return f"{len(usable)} of {len(lines)} lines measured, steps from {longest_step:.0e}"


def tell(pair, c: np.ndarray) -> str:
    """A measured slope beside the claimed one."""
    d, line = pair
    with np.errstate(invalid="ignore"):
        slope = float((c * d).sum())
    if not line.usable:
        return "no slope could be measured there"
    measured = (
        f"{line.left:.9g}"
        if line.left == line.right
        else f"{line.left:.9g} from the left, {line.right:.9g} from the right"
    )
    return f"along a line the claimed slope is {slope:.9g}, measured {measured} ± {line.error:.0e}"


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
    tol = 1e-4 if w.traced.casts or expected is None else 1e-7
    open_ones: dict[int, np.ndarray] = {}
    for i, check in enumerate(checks):
        c = claimed.grads[i]
        if check.verdict != "wrong" or check.cause or c is None:
            continue
        e = expected[i] if expected is not None else measured(w, i, c)
        if not np.isfinite(e).all():
            continue
        others = {} if expected is None else {w.problem.paths[j]: expected[j] for j in range(len(checks)) if j != i}
        cause = patterns.pattern(c, e, others, w.problem.examples, tol)
        checks[i] = check._replace(cause=cause)
        if (
            expected is not None
            and np.isfinite(c).all()
            and (not cause or vague(cause) or (c.size == 1 and cause.startswith("factor")))
        ):
            open_ones[i] = c
    if open_ones and expected is not None:
        inputs = w.problem.leaves, w.problem.others
        found = causes.explain(w.traced.closed, *inputs, expected, open_ones, 1e-3 if w.traced.casts else 1e-5)
        for i, words in found.items():
            cause = words or checks[i].cause or ignored(w, claimed, i) or "no pattern recognised"
            checks[i] = checks[i]._replace(cause=cause)
    return checks


def ignored(w: Witnesses, claimed: Claim, i: int) -> str:
    """The inputs that autodiff's gradient of a leaf depends on and the claimed one does not."""
    if claimed.closed is None:
        return ""
    program = jax.make_jaxpr(w.derivative)(w.problem.leaves, w.problem.others)
    masks = [1 << k for k in range(len(w.problem.inputs))]
    missing = dependencies(program.jaxpr, masks)[i] & ~dependencies(claimed.closed.jaxpr, masks)[claimed.output(i)]
    names = [name for k, name in enumerate(w.problem.inputs) if missing >> k & 1]
    return f"ignores {', '.join(names[:4])}" if names else ""


def vague(cause: str) -> bool:
    """Whether a cause only says where, so that the program may say why."""
    return cause.endswith(" wrong") or cause.startswith(("summed over the wrong axis (", "a constant"))
