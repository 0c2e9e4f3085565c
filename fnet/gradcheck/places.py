"""What a program does at a point, seen by running it operation by operation: ties, non-finite values, rounding."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.interpret import (
    STRUCTURE,
    dependencies,
    evaluate,
    frame_of,
    function_name,
    is_float,
    location,
    placed,
    walk,
)
from fnet.core.jax_insides import Jaxpr, Var, variables

# operations that give one of their inputs' numbers, or an exact one: they do not round
EXACT = frozenset(
    [
        "max",
        "min",
        "neg",
        "abs",
        "sign",
        "select_n",
        "reshape",
        "transpose",
        "broadcast_in_dim",
        "squeeze",
        "expand_dims",
        "slice",
        "dynamic_slice",
        "dynamic_update_slice",
        "concatenate",
        "pad",
        "gather",
        "rev",
        "copy",
        "copy_p",
        "stop_gradient",
        "reduce_max",
        "reduce_min",
        "reduce_window_max",
        "floor",
        "ceil",
        "round",
        "clamp",
        "sort",
        "iota",
        "name",
        "split",
        "real",
        "imag",
        "cummax",
        "cummin",
        "argmax",
        "argmin",
    ]
)


def ties(closed, inputs, leaf: int, limit: int = 4) -> tuple[str, ...]:
    """The kinks that the point itself lies on: ``x = 0 at relu[2, 0] (model.py:7)``, up to ``limit`` places.

    Equal counts what differs by no more than rounding. Only values that depend on the input number ``leaf`` count.
    """
    depends = set()

    def visit(site, eqn, masks):
        if any(masks):
            depends.add(site)

    dependencies(closed.jaxpr, [int(i == leaf) for i in range(len(inputs))], visit)
    found: dict[str, None] = {}
    orders = laid_out(closed.jaxpr)

    def observe(site, eqn, inputs, outputs, calls):
        name = eqn.primitive.name
        if site not in depends or not inputs or not is_float(inputs[0]) or len(found) >= limit:
            return None
        mask, what = tie(name, eqn, inputs, outputs)
        if mask is not None and bool(np.any(mask)):
            shown = function_name(eqn, calls)
            order = next((orders[atom] for atom in variables(eqn.invars) if atom in orders), None)
            index = first_index(mask, order)
            found.setdefault(f"{what} at {shown}{index if index else ''}{placed(eqn, calls)}")
        return None

    evaluate(closed, inputs, observe=observe, unroll=True)
    return tuple(found)


LAYS_OUT = "windows.py", "channels_first"  # of fnet.layers
# operations whose results have the axes of what they take, in its order
AXES_KEPT = frozenset(
    [
        "abs",
        "add",
        "clamp",
        "convert_element_type",
        "div",
        "exp",
        "integer_pow",
        "log",
        "logistic",
        "max",
        "min",
        "mul",
        "neg",
        "pad",
        "pow",
        "select_n",
        "sign",
        "slice",
        "sqrt",
        "square",
        "sub",
        "tanh",
    ]
)


def laid_out(jaxpr: Jaxpr) -> dict[Var, tuple[int, ...]]:
    """Of values that a layer over few channels goes through with the examples last: which axis of its input each of
    theirs is.
    """
    orders: dict[Var, tuple[int, ...]] = {}
    for place in walk(jaxpr):
        eqn, name = place.eqn, place.eqn.primitive.name
        frame = frame_of(eqn) if name == "transpose" else None
        if frame is not None and (Path(frame.file_name).name, frame.function_name) == LAYS_OUT:
            orders[eqn.outvars[0]] = eqn.params["permutation"]
        elif name in AXES_KEPT:
            known = (orders[atom] for atom in variables(eqn.invars) if atom in orders)
            if (order := next(known, None)) is not None:
                orders.update(dict.fromkeys(eqn.outvars, order))
    return orders


def first_index(mask, order: tuple[int, ...] | None) -> list[int]:
    """Where a mask is first true, by the axes of the layer's input where it has them in another order."""
    index = [int(k) for k in np.argwhere(np.asarray(mask))[0]]
    return index if order is None else [index[order.index(axis)] for axis in range(len(index))]


FLAT = frozenset(
    [
        "sign",
        "floor",
        "ceil",
        "round",
        "stop_gradient",
        "argmax",
        "argmin",
        "gt",
        "ge",
        "lt",
        "le",
        "eq",
        "ne",
        "is_finite",
    ]
)


def flat_operations(closed, leaf: int) -> str:
    """The operations without a slope (comparison, sign, rounding) that the input number ``leaf`` passes through."""
    found: dict[str, None] = {}

    def visit(site, eqn, masks):
        name = eqn.primitive.name
        if any(masks) and (name in FLAT or (name == "convert_element_type" and not is_float(eqn.outvars[0].aval))):
            where = location(eqn)
            found.setdefault(f"{name} at {where}" if where else name)

    dependencies(closed.jaxpr, [int(i == leaf) for i in range(len(closed.jaxpr.invars))], visit)
    return ", ".join(list(found)[:3])


def tie(name: str, eqn, inputs, outputs):
    """Where an operation lies on its kink (None if it has none), and how to say so."""
    x = np.asarray(inputs[0])
    close = 64 * float(jnp.finfo(inputs[0].dtype).eps)
    if name in ("max", "min", "gt", "lt", "ge", "le") and is_float(inputs[1]):
        other = np.asarray(inputs[1])
        zero = not other.any()
        scale = np.maximum(np.abs(x), np.abs(other)) if not zero else np.zeros_like(x)
        return np.abs(x - other) <= close * scale, "x = 0" if zero else "both sides equal"
    if name in ("abs", "sign"):
        return x == 0, "x = 0"
    if name in ("floor", "ceil", "round"):
        return x == np.round(x), "x whole"
    if name == "clamp":
        low, x, high = map(np.asarray, inputs)
        return (x == low) | (x == high), "x at the bound"
    if name in ("sqrt", "rsqrt", "log") or (name == "pow" and is_float(inputs[1])):
        return x == 0, "x = 0"
    if name in ("reduce_max", "reduce_min", "argmax", "argmin"):
        axes = tuple(eqn.params["axes"])
        best = x.max(axes, keepdims=True) if name in ("reduce_max", "argmax") else x.min(axes, keepdims=True)
        equal = np.abs(x - best) <= close * np.abs(best)
        return equal & (equal.sum(axes, keepdims=True) > 1), "a tie"
    if name in ("reduce_window_max", "reduce_window_min"):
        counts = count_equal(eqn, inputs[0], outputs[0])
        return counts > 1, "a tie"
    if name == "top_k":
        return (np.diff(np.sort(x, -1), axis=-1) == 0), "a tie"
    if name in ("cummax", "cummin"):
        axis = eqn.params["axis"]
        before, rest = np.asarray(outputs[0]), np.asarray(x)
        head, tail = [slice(None)] * x.ndim, [slice(None)] * x.ndim
        head[axis], tail[axis] = slice(None, -1), slice(1, None)
        if eqn.params.get("reverse"):
            head, tail = tail, head
        return before[tuple(head)] == rest[tuple(tail)], "a tie"
    if name == "sort":
        y = np.sort(x, axis=eqn.params["dimension"])
        return np.diff(y, axis=eqn.params["dimension"]) == 0, "a tie"
    return None, ""


def count_equal(eqn, x, best) -> np.ndarray:
    """For each window of a `reduce_window`, how many entries equal its extremum."""
    params = eqn.params
    pad = [(lo, hi, d - 1) for (lo, hi), d in zip(params["padding"], params["base_dilation"], strict=True)]
    padded = np.asarray(jax.lax.pad(x, jnp.asarray(np.nan, x.dtype), pad))
    counts = np.zeros(best.shape, int)
    for offset in np.ndindex(*params["window_dimensions"]):
        window = tuple(
            slice(o * d, o * d + s * (n - 1) + 1, s)
            for o, d, s, n in zip(offset, params["window_dilation"], params["window_strides"], best.shape, strict=True)
        )
        counts += padded[window] == np.asarray(best)
    return counts


def first_non_finite(closed, inputs) -> str:
    """The first operation that makes a NaN or an infinity out of finite numbers, with its place; empty if none does."""
    found: list[str] = []
    orders = laid_out(closed.jaxpr)

    def observe(site, eqn, inputs, outputs, calls):
        if found or any(is_float(x) and not np.isfinite(np.asarray(x, np.float64)).all() for x in inputs):
            return None
        for var, out in zip(eqn.outvars, outputs, strict=True):
            if is_float(out):
                bad = ~np.isfinite(np.asarray(out, np.float64))
                if bad.any():
                    index = first_index(bad, orders.get(var))
                    called = f" in {function_name(eqn, calls)}" if calls else ""
                    value = float(np.asarray(out, np.float64)[bad][0])
                    found.append(f"{value} from {eqn.primitive.name}{called}, index {index}{placed(eqn, calls)}")
        return None

    evaluate(closed, inputs, observe=observe, unroll=True)
    return found[0] if found else ""


def rounding(closed, inputs, samples: int = 4, seed: int = 0) -> list[np.ndarray]:
    """For each output how far it moves when every operation rounds otherwise: the largest of ``samples`` runs.

    Every rounded result is multiplied by ``1 + eps r`` with ``r`` uniform in ±1 and eps that of its own dtype, whatever
    narrow types stand in the program (stochastic arithmetic: Vignes, A stochastic arithmetic for reliable scientific
    computation, 1993). Decisions are those of the undisturbed run.
    """
    decided: dict = {}

    def remember(site, eqn, inputs, outputs, calls):
        if any(map(is_float, inputs)) and not any(map(is_float, outputs)):
            decided.setdefault(site, []).append(outputs)
        return None

    exact, _ = evaluate(closed, inputs, observe=remember, unroll=True)
    exact = [np.asarray(out, np.float64) for out in exact]
    largest = [np.zeros(out.shape) for out in exact]
    for sample in range(samples):
        rng = np.random.default_rng([seed, sample])
        visits: dict = {}

        def rule(site, eqn, inputs, extras, visits=visits):
            if site not in decided:
                return None
            visits[site] = visits.get(site, -1) + 1
            return decided[site][visits[site]]

        def disturb(site, eqn, inputs, outputs, calls, rng=rng):
            cast = eqn.primitive.name == "convert_element_type" and is_float(inputs[0]) and is_float(outputs[0])
            rounds = cast and np.dtype(outputs[0].dtype).itemsize < np.dtype(inputs[0].dtype).itemsize
            if (eqn.primitive.name in EXACT and not rounds) or eqn.primitive.name in STRUCTURE:
                return None
            for k, out in enumerate(outputs):  # changed in place: evaluate goes on with the observer's list
                if is_float(out):
                    eps = float(jnp.finfo(out.dtype).eps)
                    # eps is below half a unit of 1 in a narrow type, so the factor is applied in float64; there it is
                    # large enough to reach the number beside it, for a rounding that is not seen counts as none
                    r = rng.uniform(-1, 1, out.shape)
                    r = r if eps < 1e-12 else (r + np.sign(r)) / 2
                    wide = np.asarray(out, np.float64) * (1 + eps * r)
                    outputs[k] = jax.device_put(wide.astype(out.dtype))
            return None

        moved, _ = evaluate(closed, inputs, rule=rule, observe=disturb, unroll=True)
        for k, out in enumerate(moved):
            with np.errstate(invalid="ignore"):
                largest[k] = np.fmax(largest[k], np.abs(np.asarray(out, np.float64) - exact[k]))
    return largest
