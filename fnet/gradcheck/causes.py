"""The likely cause of a wrong gradient, in plain words.

First the claimed array alone is compared with the expected one (`pattern`): a factor, a sign, a transpose, a row. What stays
unexplained is put to the program itself (`make_explain`): each term's derivative is dropped, and each operation's is taken as 1, one
after another; the one whose gradient is the claimed one names the line of the forward.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from fnet.gradcheck.problem import quick_jit
from fnet.interpret import (
    CUSTOM,
    body_of_call,
    defined_in_jax,
    dependencies,
    evaluate,
    function_name,
    is_float,
    location,
    name_of_call,
    walk,
)


def pattern(
    c: np.ndarray,
    e: np.ndarray,
    others: Mapping[str, np.ndarray] | None = None,
    examples: frozenset[int] = frozenset(),
    tol: float = 1e-7,
) -> str:
    """What a claimed array ``c`` is to the expected ``e``; ``others`` are the expected gradients of other leaves.

    ``examples`` are sizes that an average may have been taken over. Empty where no pattern fits.
    """
    if not np.isfinite(c).all():
        bad = np.argwhere(~np.isfinite(c))
        return f"not finite in {len(bad)} of {c.size} entries, first at {bad[0].tolist()}"
    if not e.any():
        return "not zero, yet the function does not change with this leaf" if c.any() else ""

    def same(a, b):
        return np.abs(a - b).max(initial=0) <= tol * max(np.abs(a).max(initial=0), np.abs(b).max(initial=0))

    if not c.any():
        return "zero: never receives a gradient"
    whole = proportion(c, e, examples, tol)
    if whole:
        return whole
    if c.ndim > 1:
        for axes in itertools.permutations(range(c.ndim)) if c.ndim < 5 else ():
            if axes != tuple(range(c.ndim)) and e.transpose(axes).shape == c.shape and same(c, e.transpose(axes)):
                return "transposed" if c.ndim == 2 else f"transposed: axes {axes}"
    for path, other in (others or {}).items():
        if other.shape == c.shape and other.any() and same(c, other):
            return f"swapped: holds the gradient of {path}"
        if other.shape == c.shape[::-1] and c.ndim == 2 and other.any() and same(c, other.T):
            return f"swapped: holds the gradient of {path}, transposed"
    bad = np.abs(c - e) > tol * np.abs(e).max()
    local = confined(c, e, bad, examples, tol)
    if local:
        return local
    for axis in range(c.ndim):
        if c.shape[axis] > 1:
            if same(c, np.flip(e, axis)):
                return f"reversed along axis {axis}"
            for k in (1, -1, 2, -2):
                inner = np.take(c, range(max(k, 0), c.shape[axis] + min(k, 0)), axis)
                moved = np.take(e, range(max(-k, 0), c.shape[axis] + min(-k, 0)), axis)
                if inner.shape[axis] > 1 and moved.any() and same(inner, moved):
                    return f"shifted by {k} along axis {axis} (padding or time off by {abs(k)})"
    for axis, name in enumerate(axis_names(c.ndim)):
        if c.shape[axis] > 1 and permuted(c, e, axis, tol):
            return f"{name}s permuted"
    if same(np.sort(c.ravel()), np.sort(e.ravel())):
        return "entries permuted"
    total = abs(c.sum() - e.sum()) <= tol * max(np.abs(e).sum(), np.abs(c).sum())
    if c.size > 1 and np.ptp(c) <= tol * np.abs(c).max():
        return "summed over the wrong axis: one value everywhere"
    if total and abs(e.sum()) > 1e-6 * np.abs(e).sum():
        return "summed over the wrong axis (the total is right)"
    shift = c - e
    if c.size > 1 and np.ptp(shift) <= tol * np.abs(shift).max():
        return f"a constant {shift.flat[0]:.3g} is added"
    return ""


def proportion(c, e, examples, tol) -> str:
    """``sign``, ``factor 0.5``, ``missing 1/B`` where ``c`` is a multiple of ``e``; else empty."""
    factor = float((c * e).sum() / (e * e).sum()) if e.any() else 0.0
    if factor == 0 or np.abs(c - factor * e).max() > tol * np.abs(c).max():
        return ""
    near = lambda a, b: abs(a - b) <= 1e-6 * abs(b)  # noqa: E731
    if near(factor, -1):
        return "sign"
    for n in sorted(examples):
        if n > 2 and near(abs(factor), n):
            return f"missing 1/B (factor {factor:.6g})"
        if n > 2 and near(abs(factor), 1 / n):
            return f"1/B too often (factor {factor:.6g} = 1/{n})"
    return f"factor {factor:.6g}"


def axis_names(ndim: int) -> list[str]:
    """What a slice along each axis is called."""
    return {1: ["entry"], 2: ["row", "column"]}.get(ndim, [f"slice of axis {axis}" for axis in range(ndim)])


def confined(c, e, bad, examples, tol) -> str:
    """Where the wrong entries lie, if they are one entry or few slices along one axis, and what they are."""
    where = np.argwhere(bad)
    if len(where) == 1 and c.size > 1:
        index = tuple(where[0])
        return f"entry {[int(k) for k in index]} {what(c[index], e[index], examples, tol)}"
    for axis, name in enumerate(axis_names(c.ndim)):
        hit = np.unique(where[:, axis])
        if 0 < len(hit) <= max(1, c.shape[axis] // 2) and len(hit) < c.shape[axis]:
            if len(hit) > 1 and permuted(np.take(c, hit, axis), np.take(e, hit, axis), axis, tol):
                return f"{plural(name)} {shorten(hit)} permuted"
            said = what(np.take(c, hit, axis), np.take(e, hit, axis), examples, tol)
            return f"{name if len(hit) == 1 else plural(name)} {shorten(hit)} {said}"
    return ""


def plural(name: str) -> str:
    """``entries`` of ``entry``, ``rows`` of ``row``, ``slices of axis 2``."""
    head, _, rest = name.partition(" ")
    return (head[:-1] + "ies" if head.endswith("y") else head + "s") + (" " + rest if rest else "")


def shorten(hit) -> str:
    """The first few of some indices."""
    return ", ".join(map(str, hit[:4].tolist())) + (", …" if len(hit) > 4 else "")


def what(c, e, examples, tol) -> str:
    """``zero``, ``factor 2``, or ``wrong``."""
    c, e = np.atleast_1d(c), np.atleast_1d(e)
    return "zero" if not c.any() else proportion(c, e, examples, tol) or "wrong"


def permuted(c, e, axis, tol) -> bool:
    """Whether the slices of ``c`` along an axis are those of ``e`` in another order."""
    a = np.moveaxis(c, axis, 0).reshape(c.shape[axis], -1)
    b = np.moveaxis(e, axis, 0).reshape(c.shape[axis], -1)
    scale = max(np.abs(a).max(), np.abs(b).max()) or 1.0
    # sorting by a projection is not fooled by rounding, as sorting by the first column is
    weights = np.random.default_rng(0).standard_normal(a.shape[1])
    i, j = np.argsort(a @ weights), np.argsort(b @ weights)
    return bool(np.abs(a[i] - b[j]).max() <= tol * scale) and not np.array_equal(i, j)


SMOOTH = frozenset("tanh logistic exp log log1p expm1 sin cos erf erfc erf_inv sqrt rsqrt cbrt square integer_pow pow atan2".split())
NOT_ONE = SMOOTH | frozenset("mul div max min select_n abs custom_jvp_call clamp".split())
FORMULAS = {"tanh": lambda z: 1 - z * z, "logistic": lambda z: z * (1 - z)}  # of the output, fed with the input


class Gate(NamedTuple):
    """A place where the derivative can be changed, the forward's value staying as it is."""

    lengths: tuple[int, ...]  # of the scans around it
    words: str


def find_gates(closed, n_leaves: int) -> dict:
    """The gates of a program by ``(*site, kind, operand)``, at operations that depend on the first ``n_leaves`` inputs."""
    depends: dict = {}

    def visit(site, eqn, masks):
        depends[site] = [bool(mask) for mask in masks]

    dependencies(closed.jaxpr, [i < n_leaves for i in range(len(closed.jaxpr.invars))], visit)
    places = [place for place in walk(closed.jaxpr) if not place.in_while]
    kept = [place.site for place in places if is_kept(place.eqn)]
    uses = Counter(atom for place in places for atom in place.eqn.invars if isinstance(atom, Var))
    gates: dict = {}
    for site, eqn, lengths, calls, _ in places:
        taken, name = depends.get(site, []), eqn.primitive.name
        if not any(taken) or any(site[: len(k)] == k and site != k for k in kept):
            continue
        where = location(eqn, calls)
        at = f" ({where})" if where else ""
        if name == "scan":
            first = eqn.params["num_consts"]
            for j in range(eqn.params["num_carry"]):
                if is_float(eqn.invars[first + j].aval):
                    words = f"truncated through time (carry {j} of scan{at})"
                    gates[(*site, "carry", j)] = Gate((*lengths, eqn.params["length"]), words)
        if name in ("scan", "cond", "while") or (body_of_call(eqn) is not None and not is_kept(eqn)):
            continue
        shown = name_of_call(eqn) if is_kept(eqn) else function_name(eqn, calls) if name in ("max", "select_n") else name
        operands = [j for j, atom in enumerate(eqn.invars) if taken[j] and is_float(atom.aval)]
        out = eqn.outvars[0].aval
        for j in operands:
            atom = eqn.invars[j]
            if len(operands) > 1 or uses[atom] > 1:
                gates[(*site, "term", j)] = Gate(lengths, f"the term through operand {j} of {shown}{at}")
            if name in NOT_ONE and out.shape == atom.aval.shape and out.dtype == atom.aval.dtype:
                gates[(*site, "one", j)] = Gate(lengths, f"missing derivative of {shown}{at}: taken as 1")
        if name in SMOOTH and len(eqn.invars) == 1:
            words = f"derivative of {shown} taken at its output a, not at its input z{at}"
            gates[(*site, "at output", 0)] = Gate(lengths, words)
        if name in SMOOTH and eqn.invars[0].aval.shape == out.shape and len(eqn.invars) == 1:
            gates[(*site, "itself", 0)] = Gate(lengths, f"{shown} itself in the place of its derivative{at}")
        if name in FORMULAS:
            words = f"derivative of {shown} by the formula in its output a, given its input z{at}"
            gates[(*site, "formula", 0)] = Gate(lengths, words)
    return gates


def is_kept(eqn) -> bool:
    """Whether a custom rule is left as it is: jax's own."""
    return eqn.primitive.name in CUSTOM and defined_in_jax(eqn)


def gated_gradient(closed, gates):
    """``(leaves, others, settings) -> grads``, compiled: the gradient with each derivative as its gate is set.

    Each gate leaves the forward's value alone: ``x' = stop(x) + g (x - stop(x))``, and likewise for an output.
    """
    stop = jax.lax.stop_gradient
    by_site: dict = {}
    for key in gates:
        by_site.setdefault(key[:-2], []).append(key)

    def rule(site, eqn, inputs, settings):
        keys = by_site.get(site, ()) if eqn is not None or site in by_site else ()
        if not keys or (eqn is not None and eqn.primitive.name == "scan"):
            return None
        raw, inputs = inputs, list(inputs)
        for key in keys:
            if key[-2] in ("term", "carry"):
                x, g = inputs[key[-1]], settings[key]
                inputs[key[-1]] = stop(x) + g.astype(x.dtype) * (x - stop(x))
        if eqn is None:
            return inputs
        with eqn.ctx.manager:
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        out, *rest = outputs if eqn.primitive.multiple_results else [outputs]
        for key in keys:
            kind, j = key[-2:]
            if kind in ("term", "carry"):
                continue
            g, step = settings[key].astype(out.dtype), raw[j] - stop(raw[j])
            if kind == "at output":
                there = eqn.primitive.bind(stop(out) + step, **eqn.params)
                step = there - stop(there)
            elif kind == "itself":
                step = stop(out) * step
            elif kind == "formula":
                step = FORMULAS[eqn.primitive.name](stop(raw[j])) * step
            out = stop(out) + (1 - g) * (out - stop(out)) + g * step
        return [out, *rest]

    def value(leaves, others, settings):
        opened = lambda site, eqn: not is_kept(eqn)  # noqa: E731
        return evaluate(closed, [*leaves, *others], rule=rule, extras=settings, opened=opened)[0][0]

    return quick_jit(jax.grad(value))


def explain(closed, leaves, others, expected, claimed: Mapping[int, np.ndarray], tol: float = 1e-5) -> dict[int, str]:
    """The mistake in the program's backward whose gradient is the claimed one, in words, for the leaves it explains.

    ``claimed`` maps positions of leaves to arrays, ``expected`` is the right gradient. One mistake that explains all of
    the leaves is preferred to one for each.
    """
    gates = find_gates(closed, len(leaves))
    neutral = {
        key: (jnp.ones if key[-2] in ("term", "carry") else jnp.zeros)(gate.lengths) for key, gate in gates.items()
    }
    run = gated_gradient(closed, gates)
    deviations = {i: c - expected[i] for i, c in claimed.items()}
    groups = [tuple(claimed), *((i,) for i in claimed)]
    best = {group: ("", tol) for group in groups}
    for key, gate in gates.items():
        kind = key[-2]
        for setting in truncations(gate.lengths[-1]) if kind == "carry" else [0.0 if kind == "term" else 1.0]:
            settings = {**neutral, key: jnp.broadcast_to(jnp.asarray(setting, neutral[key].dtype), gate.lengths)}
            changed = run(leaves, others, settings)
            effect = {i: np.asarray(changed[i], np.float64) - expected[i] for i in claimed}
            for group in groups:
                dot = sum(float((effect[i] * deviations[i]).sum()) for i in group)
                norm = sum(float((effect[i] ** 2).sum()) for i in group)
                if not norm > 0 or not np.isfinite(norm):
                    continue
                amount = dot / norm if kind == "term" else 1.0
                left = max(
                    np.linalg.norm(deviations[i] - amount * effect[i]) / np.linalg.norm(deviations[i]) for i in group
                )
                if left < best[group][1]:  # the first of several that fit equally well
                    best[group] = say(kind, gate.words, amount), 0.5 * left
    together = best[groups[0]][0]
    return {i: together or best[(i,)][0] for i in claimed}


def truncations(length: int):
    """Gates over time that cut the carry's gradient: at every step, or in chunks of K steps."""
    for k in range(1, length):
        yield (np.arange(length) % k != 0).astype(np.float64)
        yield (np.arange(length) > length - 1 - k).astype(np.float64)


def say(kind: str, words: str, amount: float) -> str:
    """A mistake in words; ``amount`` of the term is missing."""
    if kind != "term":
        return words
    if abs(amount - 1) < 1e-4:
        return f"{words} is missing (dropped)"
    return f"{words} has the wrong sign" if abs(amount - 2) < 1e-4 else f"{words} has the factor {1 - amount:.6g}"
