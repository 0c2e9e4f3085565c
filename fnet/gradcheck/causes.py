"""The likely cause of a wrong gradient, in plain words.

First the claimed array alone is compared with the expected one (`pattern`): a factor, a sign, a transpose, a row. What
stays unexplained is put to the program itself (`explain`): each term's derivative is dropped, each operation's is taken
as 1 or at a wrong residual, one after another; the mistake whose gradient is the claimed one names the forward's line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.interpret import STRUCTURE, dependencies, evaluate, function_name, is_float, placed, walk
from fnet.core.jax_insides import Var, bind, scan_parts
from fnet.gradcheck.kept import prepared

SMOOTH = frozenset(
    [
        "tanh",
        "logistic",
        "exp",
        "log",
        "log1p",
        "expm1",
        "sin",
        "cos",
        "erf",
        "erfc",
        "erf_inv",
        "sqrt",
        "rsqrt",
        "cbrt",
        "square",
        "integer_pow",
    ]
)
NOT_ONE = SMOOTH | frozenset(["mul", "div", "max", "min", "select_n", "abs", "clamp", "pow", "atan2"])
FORMULAS = {"tanh": lambda z: 1 - z * z, "logistic": lambda z: z * (1 - z)}  # of the output, fed with the input
NEUTRAL_ONE = ("term", "carry")  # gates that are 1 in a right backward; the others are 0
NEARBY = 4  # values of the same shape, computed just before, that may have been taken by mistake
EPSILONS = (0.0, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Gate(NamedTuple):
    """A place where a mistake is tried, the forward's value staying as it is (but for another epsilon)."""

    lengths: tuple[int, ...]  # of the scans around it
    words: str
    other: Any = None  # the variable that is taken by mistake
    settings: tuple = (1.0,)
    right: float = 0.0  # the epsilon that stands there


def find_gates(closed, n_leaves: int) -> dict:
    """The gates of a program by ``(*site, kind, operand)``, where it depends on its first ``n_leaves`` inputs."""
    depends: dict = {}

    def visit(site, eqn, masks):
        depends[site] = [bool(mask) for mask in masks]

    dependencies(closed.jaxpr, [i < n_leaves for i in range(len(closed.jaxpr.invars))], visit)
    places = [place for place in walk(closed.jaxpr) if not place.in_while]
    uses = Counter(atom for place in places for atom in place.eqn.invars if isinstance(atom, Var))
    before: dict = {
        (): [(atom, "an argument") for atom in closed.jaxpr.invars[n_leaves:]]
    }  # by level: what is known so far
    gates: dict = {}
    for site, eqn, lengths, calls, _ in places:
        taken, name = depends.get(site, []), eqn.primitive.name
        at = placed(eqn, calls)
        shown = function_name(eqn, calls) if name in ("max", "select_n") else name
        known = before.setdefault(site[:-1], [])
        if name == "scan" and any(taken):
            (first, carried), length = scan_parts(eqn), eqn.params["length"]
            for j in range(carried):
                if is_float(eqn.invars[first + j].aval):
                    words = f"truncated through time (carry {j} of scan{at})"
                    cuts = tuple(truncations(length))
                    gates[(*site, "carry", j)] = Gate((*lengths, length), words, None, cuts)
        if any(taken) and name not in STRUCTURE:
            operands = [j for j, atom in enumerate(eqn.invars) if taken[j] and is_float(atom.aval)]
            out: Any = eqn.outvars[0].aval
            for j in operands:
                atom: Any = eqn.invars[j]
                if len(operands) > 1 or uses[atom] > 1:
                    words = f"the term through operand {j} of {shown}{at}"
                    gates[(*site, "term", j)] = Gate(lengths, words, None, (0.0,))
                if name in NOT_ONE and out.shape == atom.aval.shape and out.dtype == atom.aval.dtype:
                    gates[(*site, "one", j)] = Gate(lengths, f"missing derivative of {shown}{at}: taken as 1")
                if name in ("dot_general", "mul") and len(eqn.invars) == 2:
                    right = eqn.invars[1 - j]
                    for k, (other, called) in enumerate(similar(known, right)):
                        words = f"wrong residual in the derivative of {shown}{at}: {called} taken for operand {1 - j}"
                        gates[(*site, f"residual {k}", j)] = Gate(lengths, words, other)
                if name == "dot_general" and square(eqn.invars[1 - j].aval):
                    words = f"operand {1 - j} of {shown}{at} not transposed in the derivative by operand {j}"
                    gates[(*site, "matrix transposed", j)] = Gate(lengths, words)
                if name == "dot_general" and square(out):
                    words = f"what arrives at {shown}{at} not transposed in the derivative by operand {j}"
                    gates[(*site, "cotangent transposed", j)] = Gate(lengths, words)
                if name == "add" and (eps := epsilon(eqn.invars[1 - j])):
                    trials = tuple(e for e in EPSILONS if not abs(e - eps) < 1e-3 * eps)
                    gates[(*site, "epsilon", 1 - j)] = Gate(
                        lengths, f"wrong epsilon: not {eps:g}{at}", None, trials, eps
                    )
            if name in SMOOTH and out.shape == aval_of(eqn.invars[0]).shape:
                words = f"derivative of {shown} taken at its output a, not at its input z{at}"
                gates[(*site, "at output", 0)] = Gate(lengths, words)
                gates[(*site, "itself", 0)] = Gate(lengths, f"{shown} itself in the place of its derivative{at}")
                for k, (other, called) in enumerate(similar(known, eqn.invars[0])):
                    words = f"derivative of {shown} at a wrong residual{at}: {called} taken for its input"
                    gates[(*site, f"point {k}", 0)] = Gate(lengths, words, other)
            if name in FORMULAS:
                words = f"derivative of {shown} by the formula in its output a, given its input z{at}"
                gates[(*site, "formula", 0)] = Gate(lengths, words)
        if name == "name":
            continue  # a tap is the value that it names
        known += [(atom, f"{shown}{at}") for atom in eqn.outvars]
    return gates


def similar(known, atom) -> list:
    """The latest values like a variable that it may be mistaken for."""
    alike = [(v, called) for v, called in known if v is not atom and same_aval(v.aval, atom.aval)]
    return alike[: -NEARBY - 1 : -1]


def same_aval(a, b) -> bool:
    """Whether two values have the same shape and floating dtype; scalars are like nothing."""
    return is_float(a) and a.shape == b.shape and a.dtype == b.dtype and a.shape != ()


def aval_of(atom) -> Any:
    """The shape and dtype of a variable or a literal."""
    return atom.aval


def square(aval) -> bool:
    """Whether a value is a square matrix."""
    return aval.ndim == 2 and aval.shape[0] == aval.shape[1] > 1


def epsilon(atom) -> float:
    """A small positive number written in the program, or 0."""
    value = getattr(atom, "val", None)
    return float(value) if value is not None and np.ndim(value) == 0 and 0 < float(value) <= 1e-2 else 0.0


def gated_gradient(closed, gates):
    """``(leaves, others, settings) -> grads``: the gradient with each gate set, in order.

    Each gate leaves the forward's value alone: ``x' = stop(x) + g (x - stop(x))``, and likewise for an output.
    """
    stop = jax.lax.stop_gradient
    by_site: dict = {}
    for key in gates:
        by_site.setdefault(key[:-2], []).append(key)
    wanted = {gate.other for gate in gates.values() if gate.other is not None}

    def value(leaves, others, settings):
        inputs, settings = [*leaves, *others], dict(zip(gates, settings, strict=True))
        store = dict(zip(closed.jaxpr.invars, inputs, strict=True))

        def remember(site, eqn, inputs, outputs, calls):
            store.update({v: out for v, out in zip(eqn.outvars, outputs, strict=True) if v in wanted})

        def rule(site, eqn, inputs, settings):
            keys = by_site.get(site, ())
            if not keys or (eqn is not None and eqn.primitive.name == "scan"):
                return None
            raw, inputs = inputs, list(inputs)
            for key in keys:
                j, g = key[-1], settings[key]
                if key[-2] in NEUTRAL_ONE:
                    inputs[j] = stop(inputs[j]) + g.astype(inputs[j].dtype) * (inputs[j] - stop(inputs[j]))
                elif key[-2] == "epsilon":  # g is the difference to the right one
                    inputs[j] = inputs[j] + g.astype(inputs[j].dtype)
            if eqn is None:
                return inputs

            out, *rest = bind(eqn, inputs)
            for key in keys:
                kind, j = key[-2], key[-1]
                if kind in (*NEUTRAL_ONE, "epsilon"):
                    continue
                g, here = settings[key].astype(out.dtype), stop(raw[j])
                step, other = raw[j] - here, store.get(gates[key].other, here)
                pair = [step if k == j else stop(x) for k, x in enumerate(raw)]
                if kind.startswith("residual"):
                    pair[1 - j] = stop(other) - pair[1 - j]
                    out = out + g * bind(eqn, pair)[0]
                elif kind == "matrix transposed":
                    pair[1 - j] = pair[1 - j].T - pair[1 - j]
                    out = out + g * bind(eqn, pair)[0]
                elif kind == "cotangent transposed":
                    effect = bind(eqn, pair)[0]
                    out = out + g * (effect.T - effect)
                else:
                    if kind == "at output" or kind.startswith("point"):
                        # chosen before the operation, which need not be defined at the wrong point
                        point = jnp.where(g != 0, stop(out if kind == "at output" else other), here)
                        (there,) = bind(eqn, [point + step])
                        step = there - stop(there)
                    elif kind == "itself":
                        step = stop(out) * step
                    elif kind == "formula":
                        step = FORMULAS[eqn.primitive.name](here) * step
                    out = stop(out) + (1 - g) * (out - stop(out)) + g * step
            return [out, *rest]

        return evaluate(closed, inputs, rule=rule, observe=remember, extras=settings)[0][0]

    return jax.grad(value)


def explain(closed, leaves, others, expected, claimed: Mapping[int, np.ndarray], tol: float = 1e-5) -> dict[int, str]:
    """The mistake in the program's backward whose gradient is the claimed one, in words, for the leaves it explains.

    ``claimed`` maps positions of leaves to arrays, ``expected`` is the right gradient. One mistake that explains all of
    the leaves is preferred to one for each.
    """
    gates = find_gates(closed, len(leaves))
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    numbers = {key: np.full(gate.lengths, float(key[-2] in NEUTRAL_ONE), dtype) for key, gate in gates.items()}
    neutral = dict(zip(numbers, jax.device_put(list(numbers.values())), strict=True))
    arguments = leaves, others, list(neutral.values())
    run = prepared("gates", lambda closed: gated_gradient(closed, gates), closed, arguments)
    right = run(*arguments)
    deviations = {i: c - expected[i] for i, c in claimed.items()}
    groups = [tuple(claimed), *((i,) for i in claimed)]
    best = {group: ("", tol) for group in groups}
    for key, gate in gates.items():
        kind = key[-2]
        for setting in gate.settings:
            words, enough = gate.words, 1.0
            if kind == "epsilon":
                # another epsilon moves the values behind it too, so that the gradient is only nearly the claimed one
                words, enough = f"{words}, but about {setting:g}", 0.2 / tol
                setting -= gate.right
            settings = {**neutral, key: jax.device_put(np.broadcast_to(np.asarray(setting, dtype), gate.lengths))}
            changed = run(leaves, others, list(settings.values()))
            effect = {i: np.asarray(changed[i], np.float64) - np.asarray(right[i], np.float64) for i in claimed}
            for group in groups:
                if kind == "term":  # the gradient is linear in this gate: how much of the term is missing?
                    part, factor = fitted(effect, deviations, group), 1.0
                    misses = {i: deviations[i] - part * effect[i] for i in group}
                else:  # the gate and a common factor: (A - y) for 2 (A - y) σ'
                    changed = {i: expected[i] + effect[i] for i in group}
                    part, factor = 1.0, fitted(changed, claimed, group)
                    factor = 1.0 if kind in ("carry", "epsilon") or abs(factor - 1) < 1e-4 else factor
                    misses = {i: claimed[i] - factor * changed[i] for i in group}
                if factor == 0 or not any(effect[i].any() for i in group):
                    continue
                left = max(float(np.linalg.norm(misses[i]) / np.linalg.norm(deviations[i])) for i in group)
                left *= (1.0 if factor == 1.0 else 2.0) / enough  # without a factor, if that fits as well
                if left < best[group][1]:  # the first of several that fit equally well
                    best[group] = (
                        say(kind, words, part) + ("" if factor == 1.0 else f", and a factor {factor:.6g}"),
                        0.5 * left,
                    )
    together = best[groups[0]][0]
    return {i: together or best[(i,)][0] for i in claimed}


def fitted(a, b, group) -> float:
    """The factor of the arrays ``a`` that comes closest to ``b``; 0 where there is none."""
    norm = sum(float((a[i] ** 2).sum()) for i in group)
    factor = sum(float((a[i] * b[i]).sum()) for i in group) / norm if 0 < norm < np.inf else 0.0
    return factor if np.isfinite(factor) else 0.0


def truncations(length: int):
    """Gates over time that cut the carry's gradient: at every step, in chunks of K steps, or before the last K."""
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
