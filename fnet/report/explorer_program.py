"""A flat program as JSON, for the page that runs it again: its operations, constants, and a checksum of each value.

The page knows the operations of `OPERATIONS`; `explorer_page/engine.js` has one function for each. What others give is
carried as it is.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fnet.gradcheck.flat import Equation, Program

OWN = Path(__file__).parents[1]
EXACT_INTEGERS = 2**53  # up to here a double holds each of them
GIVE_KEYS = ("random_seed", "random_wrap", "random_split", "random_fold_in", "random_clone")
TAKE_KEYS = ("random_unwrap", "random_bits", "random_split", "random_fold_in", "random_clone")
# in float32 these are the operations in float64, rounded once; others would differ in the last digit
ROUNDED_ONCE = ("add", "add_any", "sub", "mul", "div", "sqrt", "square", "neg", "abs", "sign")
MOVING = (
    *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "dynamic_slice", "expand_dims"),
    *("dynamic_update_slice", "gather", "pad", "reduce_max", "reduce_min", "reduce_precision", "reshape", "rev"),
    *("scatter", "select_n", "slice", "sort", "split", "squeeze", "stack", "stop_gradient", "transpose", "unstack"),
)  # what these give are entries of their operands, or rounded already


class Unknown(Exception):
    """A form of an operation that the page does not know."""


def nothing(params: Mapping) -> dict:
    """The operation and its operands say all."""
    return {}


def axis(params: Mapping) -> dict:
    """The axis of a stack, a split or a concatenation."""
    return {"a": params["axis"] if "axis" in params else params["dimension"]}


def axes(params: Mapping) -> dict:
    """The axes of a reduction."""
    if params.get("out_sharding") is not None:
        raise Unknown
    return {"a": list(params["axes"])}


def scanned(params: Mapping) -> dict:
    """The axis of a cumulative operation, and whether it goes backwards."""
    return {"a": params["axis"], "r": int(params["reverse"])}


def reshaped(params: Mapping) -> dict:
    """A reshape in the order of the axes."""
    if params.get("dimensions") is not None:
        raise Unknown
    return {}


def product(params: Mapping) -> dict:
    """The contracted and the batch axes of both operands."""
    contracted, batch = params["dimension_numbers"]
    return {"c": [list(map(int, axes)) for axes in contracted], "b": [list(map(int, axes)) for axes in batch]}


def sliced(params: Mapping) -> dict:
    """Starts and strides; the lengths are the result's."""
    return {"s": list(params["start_indices"]), "t": list(params["strides"] or [1] * len(params["start_indices"]))}


def padded(params: Mapping) -> dict:
    """What is put before, behind and between the entries of each axis."""
    return {"p": [list(map(int, three)) for three in params["padding_config"]]}


def converted(params: Mapping) -> dict:
    """To float64, float32, integers or truth values."""
    dtype = np.dtype(params["new_dtype"])
    if dtype == np.float64:
        return {"to": "f8"}
    if dtype == np.float32:
        return {"to": "f4"}
    if dtype == np.bool_:
        return {"to": "b"}
    if dtype.kind in "iu":
        low, high = (int(end) for end in (np.iinfo(dtype).min, np.iinfo(dtype).max))
        return {"to": "i", "l": max(low, -EXACT_INTEGERS), "h": min(high, EXACT_INTEGERS)}
    raise Unknown


def precision(params: Mapping) -> dict:
    """Rounded to float32, or not at all."""
    bits = params["exponent_bits"], params["mantissa_bits"]
    if bits not in ((8, 23), (11, 52)):
        raise Unknown
    return {"to": "f4" if bits == (8, 23) else "f8"}


def rounded(params: Mapping) -> dict:
    """Whether halves go to the even number; else away from zero."""
    return {"e": int(params["rounding_method"])}


def sorted_by_itself(params: Mapping) -> dict:
    """The axis along which one operand is sorted."""
    if params["num_keys"] != 1 or params["operands"] != 1:
        raise Unknown
    return {"a": params["dimension"]}


def gathered(params: Mapping) -> dict:
    """Which axes are of the window, and of what the indices are."""
    numbers, mode = params["dimension_numbers"], params["mode"].name
    if mode not in ("CLIP", "PROMISE_IN_BOUNDS", "FILL_OR_DROP"):
        raise Unknown
    fill = params["fill_value"]
    if fill is not None and not math.isfinite(fill):
        fill = None
    return {
        "o": list(numbers.offset_dims),
        "c": list(numbers.collapsed_slice_dims),
        "m": list(numbers.start_index_map),
        "ob": list(numbers.operand_batching_dims),
        "ib": list(numbers.start_indices_batching_dims),
        "s": list(params["slice_sizes"]),
        "drop": int(mode == "FILL_OR_DROP"),
        "f": fill,
    }


def scattered(params: Mapping) -> dict:
    """As `gathered`, for what is put into an operand."""
    numbers, mode = params["dimension_numbers"], params["mode"].name
    if mode not in ("CLIP", "PROMISE_IN_BOUNDS", "FILL_OR_DROP"):
        raise Unknown
    return {
        "u": list(numbers.update_window_dims),
        "c": list(numbers.inserted_window_dims),
        "m": list(numbers.scatter_dims_to_operand_dims),
        "ob": list(numbers.operand_batching_dims),
        "ib": list(numbers.scatter_indices_batching_dims),
        "drop": int(mode != "CLIP"),
    }


OF_ONE = (
    *(
        "neg",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
    ),
    *("asinh", "acosh", "atanh", "logistic", "sqrt", "rsqrt", "cbrt", "square", "abs", "sign", "floor", "ceil"),
    *("erf", "erfc", "erf_inv", "is_finite", "not", "stop_gradient", "copy", "copy_p"),
    *("log2", "one_minus_square"),
)
COMPARING = ("eq", "ne", "lt", "le", "gt", "ge", "max", "min", "clamp", "select_n", "and", "or", "xor")
OF_SEVERAL = ("add", "add_any", "sub", "mul", "div", "rem", "pow", "atan2", "polynomial", *COMPARING)

OPERATIONS: dict[str, Callable[[Mapping], dict]] = {
    **dict.fromkeys((*OF_ONE, *OF_SEVERAL), nothing),
    "argmax": axes,
    "argmin": axes,
    "bitcast_convert_type": nothing,  # of doubles, see `_bits`
    "broadcast_in_dim": lambda params: {"d": list(params["broadcast_dimensions"])},
    "concatenate": axis,
    "convert_element_type": converted,
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), scanned),
    "dot_general": product,
    "dynamic_slice": nothing,
    "dynamic_update_slice": nothing,
    "expand_dims": nothing,
    "gather": gathered,
    "integer_pow": lambda params: {"y": params["y"]},
    "iota": lambda params: {"a": params["dimension"]},
    "pad": padded,
    "reduce_precision": precision,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), axes),
    "reshape": reshaped,
    "rev": lambda params: {"a": list(params["dimensions"])},
    "round": rounded,
    "scatter": scattered,
    "scatter-add": scattered,
    "slice": sliced,
    "sort": sorted_by_itself,
    "split": axis,
    "squeeze": nothing,
    "stack": axis,
    "transpose": lambda params: {"p": list(params["permutation"])},
    "unstack": axis,
}


def program_json(program: Program, source: Callable[[str, int], object] = lambda file, line: None) -> dict:
    """A program as data for JSON; what is given to it is not part of it.

    ``source(file, line)`` is called once for each line of code that an equation comes from, with the path of the file,
    so that the caller can keep its text; in the JSON files have the names that `shown` gives them.
    """
    scopes: dict[str, int] = {}
    lines: dict[tuple[str, int], int] = {}
    stacks: dict[tuple[int, ...], int] = {}
    equations, recorded = [], []
    checks = np.zeros((len(program.values), 2))
    keys, bits = _keys(program), _bits(program)
    values = [value.view(np.float64) if id in bits else value for id, value in enumerate(program.values)]
    kinds = ["k" if id in keys else _kind(value) for id, value in enumerate(values)]
    for eqn in program.equations:
        params = _params(eqn, values, bits)
        if params is None:
            recorded += [[id, encode(values[id])] for id in eqn.outputs]
        for file, line in eqn.lines:
            if (file, line) not in lines:
                lines[file, line] = len(lines)
                source(file, line)
        stack = tuple(lines[place] for place in eqn.lines)
        equations.append(
            [
                eqn.primitive,
                params,
                list(eqn.inputs),
                list(eqn.outputs),
                scopes.setdefault(eqn.scope, len(scopes)),
                stacks.setdefault(stack, len(stacks)),
            ]
        )
        for id in eqn.outputs:
            checks[id] = checksums(values[id])
    return {
        "inputs": dict(program.given),
        "consts": [[id, encode(program.values[id])] for id in program.constants],
        "recorded": recorded,
        "eqns": equations,
        "scopes": list(scopes),
        "stacks": [list(stack) for stack in stacks],
        "lines": [[shown(file), line] for file, line in lines],
        "marks": dict(program.marks),
        "outs": dict(program.outputs),
        "shapes": [list(value.shape) for value in program.values],
        "kinds": "".join(kinds),
        "checks": _text(checks),
    }


def encode(array) -> list:
    """An array as its code, shape and bytes, or ``["zeros", shape]``.

    ``f8``, ``f4`` (doubles that float32 holds), ``i4`` and ``u1``; integers of more bits become doubles, exactly up to
    2^53. NaN, infinities and -0 stay what they are.
    """
    array = np.asarray(array)
    shape = list(array.shape)
    if not np.any(array) and not (array.dtype.kind == "f" and np.signbit(array).any()):
        return ["zeros", shape]
    if array.dtype.kind == "b" or array.dtype == np.uint8:
        return ["u1", shape, _text(array, "u1")]
    if array.dtype.kind in "iu" and array.max() < 2**31 and array.min() >= -(2**31):
        return ["i4", shape, _text(array, "<i4")]
    wide = array.astype(np.float64)
    with np.errstate(all="ignore"):
        narrow = wide.astype(np.float32)
    if np.array_equal(narrow.astype(np.float64), wide, equal_nan=True):
        return ["f4", shape, _text(narrow, "<f4")]
    return ["f8", shape, _text(wide, "<f8")]


def checksums(array) -> tuple[float, float]:
    """Two weighted sums by which one wrong number of a value is found.

    Over finite entries Σ w x, and over the others Σ w n with n = 1 for inf, -1 for -inf and 2 for NaN. The weight of
    entry i is ((i · 2654435761 + 40503) mod 2^32) / 2^32 + 1/2.
    """
    x = np.asarray(array).astype(np.float64).ravel()
    i = np.arange(x.size, dtype=np.uint32)
    weights = (i * np.uint32(2654435761) + np.uint32(40503)) / 2**32 + 0.5
    finite = np.isfinite(x)
    kind = np.where(np.isnan(x), 2.0, np.sign(x))
    return float(weights[finite] @ x[finite]), float(weights[~finite] @ kind[~finite])


def shown(file: str) -> str:
    """A file as people see it: from ``fnet/`` on if it is fnet's own, else its name."""
    path = Path(file)
    return f"fnet/{path.relative_to(OWN).as_posix()}" if path.is_relative_to(OWN) else path.name


def _params(eqn: Equation, values: list[np.ndarray], bits: set[int]) -> dict | None:
    """What the page needs of the parameters; None where it does not know the operation, or not in this form."""
    operands, results = ([values[id] for id in ids] for ids in (eqn.inputs, eqn.outputs))
    if not bits.isdisjoint(eqn.outputs) and eqn.primitive == "and":
        mask = int(operands[1].item())
        return {"words": [mask % 2**32, mask >> 32]}
    if eqn.primitive == "bitcast_convert_type" and bits.isdisjoint((*eqn.inputs, *eqn.outputs)):
        return None
    if not bits.isdisjoint(eqn.inputs) and eqn.primitive != "bitcast_convert_type":
        return None
    if eqn.primitive not in OPERATIONS or not all(_is_held(a) for a in (*operands, *results)):
        return None
    try:
        params = _plain(OPERATIONS[eqn.primitive]({**eqn.params, "operands": len(operands)}))
    except (Unknown, KeyError, AttributeError, TypeError):  # another jax has other parameters
        return None
    dtype = results[0].dtype
    if any(a.dtype.kind in "iu" and a.dtype.itemsize < 4 for a in (*operands, *results)):
        return params if eqn.primitive in (*MOVING, *COMPARING, "argmax", "argmin", "iota") else None
    if dtype == np.float32 and eqn.primitive not in (*MOVING, "max", "min"):
        return {**params, "f4": 1} if eqn.primitive in ROUNDED_ONCE else None
    if eqn.primitive in ("and", "or", "xor", "not") and dtype.kind != "b":
        return {**params, "u": int(dtype.kind == "u")} if dtype.itemsize == 4 else None
    return params


def _plain(params: Any) -> Any:
    """NumPy's numbers as Python's, as JSON takes them."""
    if isinstance(params, dict):
        return {name: _plain(value) for name, value in params.items()}
    return (
        [_plain(value) for value in params] if isinstance(params, list) else getattr(params, "item", lambda: params)()
    )


def _is_held(array: np.ndarray) -> bool:
    """Whether doubles hold this dtype's numbers, or these integers."""
    if array.dtype.kind in "iu":
        return array.size == 0 or max(int(array.max()), -int(array.min())) <= EXACT_INTEGERS
    return array.dtype.kind == "b" or array.dtype in (np.float64, np.float32)


def _keys(program: Program) -> set[int]:
    """The values that are keys, whose words they hold."""
    found: set[int] = set()
    for eqn in program.equations:
        found.update(eqn.outputs if eqn.primitive in GIVE_KEYS else ())
        found.update(eqn.inputs[:1] if eqn.primitive in TAKE_KEYS else ())
    return found


def _bits(program: Program) -> set[int]:
    """The values that are the 64 bits of doubles, maybe masked by a constant; the page holds them as these doubles."""
    found: set[int] = set()
    for eqn in program.equations:
        results, (first, *rest) = [program.values[id] for id in eqn.outputs], (*eqn.inputs, None)
        if results[0].dtype != np.uint64 or first is None:
            continue
        is_masked = eqn.primitive == "and" and first in found and rest[0] in program.constants
        if is_masked and program.values[rest[0]].size == 1:  # pyright: ignore
            found.update(eqn.outputs)
        if eqn.primitive == "bitcast_convert_type" and program.values[first].dtype == np.float64:
            found.update(eqn.outputs)
    return found


def _kind(array: np.ndarray) -> str:
    return {"i": "i", "u": "i", "b": "b"}.get(array.dtype.kind, "f")


def _text(array: np.ndarray, dtype: str = "<f8") -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode("ascii")
