"""The two witnesses of an audit, autodiff without custom rules and slopes along lines, and how well they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fnet.gradcheck import places
from fnet.gradcheck.claims import Claim, largest, to_numpy
from fnet.gradcheck.kept import Program, prepared
from fnet.gradcheck.problem import Problem, Traced, undecorated, without_casts
from fnet.gradcheck.slopes import EXCESS, Line, make_probe, settled

FAULT = 1e-6  # what counts as one: a change by this share of the leaf's largest entry
TIGHT = 1e-9  # two right float64 gradients agree this well, unless rounding is measured to be larger
ROUNDING = 50  # times the measured rounding noise is still rounding
LEAST = 1e-290  # what is smaller may have lost its digits, or be 0, by underflow
SMALL = 64  # entries up to which every coordinate is probed where there is no autodiff
REFUSALS = (NotImplementedError, ValueError, TypeError)  # of jax, to differentiate
PROBES = 1024  # lines at most over the entries that differ from autodiff's


class Witnesses(NamedTuple):
    """What the claimed gradients of one function are held against."""

    problem: Problem
    traced: Traced
    autodiff: list[Any] | None  # without custom rules; None where jax cannot differentiate the function
    exact: list[Any] | None  # the same, of the function without its casts to narrower types
    why_not: str  # the reason
    probe: Callable
    lines: list[list[Line]]  # what was measured over each leaf, along its `directions`
    seed: int  # of the directions, which are drawn again where they are needed: each is as large as its leaf
    finite: bool
    derivative: Callable  # that autodiff, not compiled
    noise: dict  # rounding of programs that was measured already


class Begun(NamedTuple):
    """What depends on the function alone, being compiled."""

    autodiff: Program | None  # None also where a claim serves in its place
    exact: Program | None
    why_not: str
    probe: Callable


def begin(problem: Problem, traced: Traced, alone: bool = False) -> Begun:
    """Begin to compile the witnesses: autodiff without custom rules, and the function along a line. Within `precise`.

    ``alone``: the claim is that very autodiff, which need not be compiled again.
    """
    why_not, autodiff, exact = "", None, None
    arguments = problem.leaves, problem.others
    try:
        autodiff = None if alone else prepared("autodiff", derivative, traced.closed, arguments)
    except REFUSALS as error:
        why_not = first_line(error, 200)
    if traced.casts and not why_not and all(leaf.dtype == np.float64 for leaf in problem.leaves):
        try:
            exact = prepared("autodiff without casts", exact_derivative, traced.closed, arguments)
        except REFUSALS as error:
            why_not = f"without its casts it does not run: {first_line(error, 120)}"
    probe = make_probe(traced.closed, problem.leaves, problem.others, traced.eps)
    return Begun(autodiff, exact, why_not, probe)


def derivative(closed) -> Callable:
    """Autodiff of a program without its custom rules."""
    return jax.grad(undecorated(closed))


def exact_derivative(closed) -> Callable:
    """Autodiff of a program without its casts."""
    return jax.grad(without_casts(closed))


def first_line(error: Exception, most: int) -> str:
    """What an error says, shortened."""
    return str(error).strip().splitlines()[0][:most]


def gather(problem: Problem, traced: Traced, begun: Begun, seed: int, same: Claim | None = None) -> Witnesses:
    """Autodiff without custom rules, and the lines along random directions over each leaf. Within `precise`.

    ``same`` is a claim that is that very autodiff.
    """
    grads, exact = None if same is None else same.grads, None
    if begun.autodiff is not None:
        grads = list(map(to_numpy, begun.autodiff(problem.leaves, problem.others)))
    if begun.exact is not None:
        exact = list(map(to_numpy, begun.exact(problem.leaves, problem.others)))
    lines = []
    for i, leaf in enumerate(problem.leaves):
        drawn = directions(np.asarray(leaf, np.float64), [seed, i], grads is not None)
        lines.append([begun.probe({i: d}) for d in drawn])
    finite = bool(np.isfinite(begun.probe({}).base))
    why_not, autodiff = begun.why_not, derivative(traced.closed)
    return Witnesses(problem, traced, grads, exact or grads, why_not, begun.probe, lines, seed, finite, autodiff, {})


def directions(p: np.ndarray, seed, autodiff: bool) -> Iterator[np.ndarray]:
    """Signs and Gaussians by turns, scaled by each value's own magnitude or by the leaf's; then single entries.

    With autodiff beside them four, and single entries of a leaf of up to four; else twelve, and of up to 64.
    """
    if not p.size:
        return
    rng, (common, own) = np.random.default_rng(seed), magnitudes(p)
    for k in range(4 if autodiff else 12):
        draw = rng.choice([-1.0, 1.0], p.shape) if k % 2 == 0 else rng.standard_normal(p.shape)
        yield draw * (common if k % 4 in (0, 3) else own)
    if p.size <= (4 if autodiff else SMALL):
        for k in range(p.size):
            yield single(p, k)


def pairs(w: Witnesses, i: int) -> Iterator[tuple[np.ndarray, Line]]:
    """The directions over one leaf, each with its line."""
    drawn = directions(np.asarray(w.problem.leaves[i], np.float64), [w.seed, i], w.autodiff is not None)
    yield from zip(drawn, w.lines[i], strict=True)


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


def contradicts(line: Line, gradient: np.ndarray, d: np.ndarray, share: float = 0.5 * FAULT) -> bool:
    """Whether the slope of a gradient lies outside the measured one-sided slopes by more than errors, and by a fault.

    A difference of ``share`` of the gradient's largest entry in each entry of the direction is none.
    """
    if not line.usable:
        return False
    with np.errstate(invalid="ignore"):
        slope, terms = float((gradient * d).sum()), np.abs(gradient * d)
    slack = share * largest(gradient) * float(np.linalg.norm(d)) + 1e-12 * float(terms.sum())
    return line.outside(slope) > EXCESS * line.error + (slack if np.isfinite(slack) else 0.0)


def first_against(w: Witnesses, i: int, gradient: np.ndarray, share: float = 0.5 * FAULT):
    """The first direction and line over one leaf that contradict a gradient, None if none does.

    A line that does is measured again by shorter steps first.
    """
    for k, (d, line) in enumerate(pairs(w, i)):
        if contradicts(line, gradient, d, share):
            line = w.lines[i][k] = settled(w.probe, i, d, line)
            if contradicts(line, gradient, d, share):
                return d, line
    return None


def small_faults(c: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Where two gradients differ by a fault of the entry itself, however small it is beside the leaf's largest."""
    difference = np.abs(c - a)
    return (difference > FAULT * np.maximum(np.abs(c), np.abs(a))) & (difference > LEAST)


def settle_lines(w: Witnesses, i: int) -> None:
    """Measure again, by shorter steps, the lines over one leaf that are not smooth."""
    for k, (d, line) in enumerate(pairs(w, i)):
        if line.kinked or not line.usable:
            w.lines[i][k] = settled(w.probe, i, d, line)


class Resolved(NamedTuple):
    """What lines over ever smaller parts of some entries say of a gradient."""

    against: tuple | None  # a direction and its line that contradict it
    kinked: bool
    open: bool  # parts are left that could not be measured, or were too many
    blind: bool  # parts where the slopes could not have told the gradient from autodiff's
    probes: int


def resolve(w: Witnesses, i: int, c: np.ndarray, entries: np.ndarray, a: np.ndarray | None = None) -> Resolved:
    """Measure the slope over entries of one leaf; parts on a kink are halved, so that it hides nothing beside it."""
    p = np.asarray(w.problem.leaves[i], np.float64)
    common, rng = magnitudes(p)[0].ravel(), np.random.default_rng(len(entries))
    parts, kinked, unmeasured, blind, probes = [entries], False, False, False, 0
    while parts and probes < PROBES:
        part = parts.pop()
        d = np.zeros(p.size)
        d[part] = rng.choice([-1.0, 1.0], len(part)) * common[part]
        d = d.reshape(p.shape)
        line = w.probe({i: d})
        probes += 1
        if line.kinked or not line.usable or contradicts(line, c, d):
            line = settled(w.probe, i, d, line)
        if contradicts(line, c, d):
            return Resolved((d, line), kinked, unmeasured, blind, probes)
        if not line.usable or (line.kinked and len(part) > 1):
            if len(part) > 1:
                parts += [part[: len(part) // 2], part[len(part) // 2 :]]
            unmeasured |= len(part) == 1
        elif line.kinked:
            kinked = True
        elif a is not None and np.isfinite((a * d).sum()) and not contradicts(line, a, d):
            blind = True
    return Resolved(None, kinked, unmeasured or bool(parts), blind, probes)


def measured(w: Witnesses, i: int, c: np.ndarray) -> np.ndarray:
    """The gradient by single coordinates where all were probed, NaN where not."""
    e = np.full(c.shape, np.nan)
    for d, line in pairs(w, i):
        hit = np.flatnonzero(d)
        if len(hit) == 1 and line.usable:
            e.flat[hit[0]] = (line.left + line.right) / 2 / d.flat[hit[0]]
    return e


def noise_of(w: Witnesses, claimed: Claim, i: int) -> np.ndarray:
    """The rounding of the claimed and of autodiff's entries, added; a program is measured once for all its leaves."""
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
        total = total + w.noise[id(claimed.closed)][claimed.output(i)]
    return total


def numeric_power(w: Witnesses, i: int, gradient: np.ndarray | None = None) -> float:
    """The smallest fault in any one entry that the measured lines show, relative to the leaf's largest entry."""
    visible = np.full(w.problem.leaves[i].shape, np.inf)
    g = gradient if gradient is not None else w.autodiff[i] if w.autodiff is not None else None
    for d, line in pairs(w, i):
        if line.usable and not line.kinked:
            with np.errstate(divide="ignore"):
                visible = np.minimum(visible, EXCESS * line.error / np.abs(d))
    scale = float(np.abs(g).max(initial=0)) if g is not None else 0.0
    return float(visible.max(initial=0)) / scale if scale else np.inf
