"""The explorer page's engine, in a browser: every operation and whole models against jax, formulas, checksums."""

from __future__ import annotations

import base64
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.special import erfinv

import fnet
from fnet.gradcheck.flat import Program, flattened
from fnet.gradcheck.problem import precise
from fnet.report.explorer_program import OPERATIONS, encode, program_json

ENGINE = Path(fnet.__file__).parent / "report" / "explorer_page" / "engine.js"
GLUE = """
const kept = {};

function held(name, json, given) {
  const decoded = Object.fromEntries(Object.entries(given).map(([path, array]) => [path, decode(array)]));
  const program = new Program(json, decoded);
  kept[name] = program;
  return { unknown: program.unknown, frozen: program.frozen };
}

// arrays as one text, since JSON has no NaN
function text(arrays) {
  const bytes = new Uint8Array(arrays.reduce((sum, a) => sum + 8 * a.length, 0));
  let at = 0;
  for (const a of arrays) {
    bytes.set(new Uint8Array(Float64Array.from(a).buffer), at);
    at += 8 * a.length;
  }
  let found = "";
  for (let i = 0; i < bytes.length; i += 8192) found += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(found);
}

function changes(changed) {
  return Object.fromEntries(Object.entries(changed).map(([path, array]) => [path, decode(array).data]));
}

// all values, or those of some ids
function ran(name, changed, ids) {
  const values = kept[name].run(changes(changed));
  return text(ids ? ids.map(id => values[id].data) : values.map(value => value.data));
}
"""


def from_text(text: str, shapes) -> list[np.ndarray]:
    """The arrays of `text` in the page."""
    numbers = np.frombuffer(base64.b64decode(text))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    assert ends[-1] == numbers.size
    return [part.reshape(shape) for part, shape in zip(np.split(numbers, ends[:-1]), shapes, strict=True)]


@pytest.fixture(scope="module")
def engine(browser):
    """The engine alone on a page; an error on it is the test's."""
    page = browser.new_page()
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.add_script_tag(content=ENGINE.read_text() + GLUE)
    yield page
    page.close()


def hold(page, name: str, program: Program) -> Any:
    """Put a program on the page under a name."""
    given = {path: encode(program.values[id]) for path, id in program.given.items()}
    made = json.loads(json.dumps(program_json(program)))  # what is data for JSON
    return page.evaluate("([name, made, given]) => held(name, made, given)", [name, made, given])


def run(page, name: str, program: Program, changed=None, ids=None) -> list[np.ndarray]:
    """All values of a program, or some, run on the page."""
    changed = {path: encode(array) for path, array in (changed or {}).items()}
    text = page.evaluate("([name, changed, ids]) => ran(name, changed, ids)", [name, changed, ids])
    return from_text(text, [program.values[id].shape for id in (range(len(program.values)) if ids is None else ids)])


# --- operations -------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
ODD = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -1.0, 0.5, -0.5, 1.5, -1.5, 2.5, 0.49999999999999994])
NUMBERS = np.concatenate([ODD, RNG.standard_normal(40), 30 * RNG.standard_normal(20), [1e-9, -1e-9, 1e-300, 1e300]])
INSIDE = np.concatenate([RNG.uniform(-1, 1, 40), [1.0, -1.0, 0.0, 0.999999, -0.999999, 1e-12, np.nan]])
WHOLE = np.array([0, 1, -1, 2, -2, 3, 7, -7, 100, -100])
A, X, Y, Z = (RNG.standard_normal(shape) for shape in ((2, 3, 4), (3, 4), (4, 5), (2, 4, 3)))
ORDER = np.array([[3, 0, 2, 1], [1, 1, 0, 3], [0, 2, 2, -1]])
RATHER = 8e-15  # XLA's functions are within some units of the last place, as V8's are
TIGHT = 5e-16  # and a division may be one by a reciprocal


def gather(x, starts, offset, collapsed, start_map, sizes, mode=None, fill=None, batching=((), ())):
    """`lax.gather` by its numbers."""
    numbers = lax.GatherDimensionNumbers(offset, collapsed, start_map, *batching)
    return lax.gather(x, starts, numbers, sizes, mode=mode, fill_value=fill)


EXACT_OF_ONE = {
    "neg": jnp.negative,
    "abs": jnp.abs,
    "sign": jnp.sign,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round, halves away": lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
    "round, halves to even": lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
    "sqrt": lax.sqrt,
    "square": lax.square,
    "is_finite": lax.is_finite,
    "stop_gradient": lax.stop_gradient,
    "copy": partial(jnp.array, copy=True),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 23),
    "to float32 and back": lambda x: x.astype(np.float32).astype(np.float64),
    "to bool": lambda x: x.astype(bool),
    "to int32": lambda x: x.astype(np.int32),
}
OF_ONE = {
    **{
        name: getattr(lax, name)
        for name in [
            "exp",
            "exp2",
            "expm1",
            "log",
            "log1p",
            "sin",
            "cos",
            "tan",
            "atan",
            "sinh",
            "cosh",
            "tanh",
            "asinh",
            "acosh",
            "logistic",
            "rsqrt",
            "cbrt",
        ]
    },
    **{f"integer_pow, {y}": partial(lax.integer_pow, y=y) for y in (-3, -1, 0, 1, 2, 3, 5)},
    "erf": lax.erf,
}
EXACT_OF_TWO = {
    **{
        name: getattr(lax, name)
        for name in ("add", "sub", "mul", "div", "max", "min", "eq", "ne", "lt", "le", "gt", "ge")
    },
    "rem": lax.rem,
}
OF_TWO = {"pow": lax.pow, "atan2": lax.atan2}
WHOLE_OF_TWO = {
    name: getattr(lax, name) for name in ("add", "sub", "mul", "div", "rem", "max", "min", "eq", "lt", "ge")
}
WHOLE_BITS = {"and": lax.bitwise_and, "or": lax.bitwise_or, "xor": lax.bitwise_xor}

# name: functions of the same operands, these, and the relative tolerance
CASES: dict[str, tuple[dict, tuple, float]] = {
    "of one operand": (EXACT_OF_ONE, (NUMBERS,), 0),
    "of one operand, functions": (OF_ONE, (NUMBERS[:-2],), RATHER),
    "of one operand, within -1 and 1": (
        {name: getattr(lax, name) for name in ("asin", "acos", "atanh")},
        (INSIDE,),
        RATHER,
    ),
    "erf_inv": ({"erf_inv": lax.erf_inv}, (INSIDE[np.abs(INSIDE) != 0.999999],), RATHER),  # XLA's is less exact there
    "erfc": ({"erfc": lax.erfc}, (NUMBERS[np.abs(np.nan_to_num(NUMBERS)) < 4],), RATHER),
    "of two": (EXACT_OF_TWO, (NUMBERS[:, None].repeat(13, 1), np.tile(ODD, (len(NUMBERS), 1))), 0),
    "of two, axes of size 1": (EXACT_OF_TWO, (NUMBERS[:, None], NUMBERS[None]), TIGHT),
    "of two, a rank of 0": (EXACT_OF_TWO, (np.float64(1.5), NUMBERS), 0),
    "of two, a rank of 0 behind": (EXACT_OF_TWO, (X, np.float64(-0.0)), 0),
    "of two, functions": (OF_TWO, (NUMBERS[:-2, None], NUMBERS[None, :-2]), RATHER),
    "of two integers": (WHOLE_OF_TWO, (WHOLE[:, None], WHOLE[None]), 0),
    "of integers": (
        {
            "neg": lax.neg,
            "abs": lax.abs,
            "sign": lax.sign,
            "to float": lambda x: x.astype(float),
            "not": lax.bitwise_not,
        },
        (WHOLE.astype(np.int32),),
        0,
    ),
    "of unsigned integers": (
        {**WHOLE_BITS, "not": lambda x, y: lax.bitwise_not(x)},
        (np.array([0, 1, 2**31, 2**32 - 1], np.uint32), np.array([5, 2**32 - 1, 2**31, 7], np.uint32)),
        0,
    ),
    "of bits": (WHOLE_BITS, (WHOLE.astype(np.int32), WHOLE[::-1].astype(np.int32)), 0),
    "of truth values": (
        {
            **WHOLE_BITS,
            "not": lambda x, y: lax.bitwise_not(x),
            "eq": lax.eq,
            "max": lax.max,
            "to float": lambda x, y: x.astype(float),
            "reduce_and": lambda x, y: lax.reduce_and(x, (0,)),
            "reduce_or": lambda x, y: lax.reduce_or(x, (0,)),
        },
        (np.array([True, True, False, False]), np.array([True, False, True, False])),
        0,
    ),
    "add_any": ({"add_any": lambda x, y: jax.grad(lambda x: (x * y).sum() + (x * y * y).sum())(x)}, (X, X + 1), TIGHT),
    "clamp": (
        {
            "of scalars": lambda x, low: lax.clamp(-0.5, x, 0.5),
            "of arrays": lambda x, low: lax.clamp(low, x, low + 1),
        },
        (NUMBERS, RNG.standard_normal(len(NUMBERS))),
        0,
    ),
    "select_n": (
        {
            "by truth values": lambda x, y: lax.select_n(x > 0, x, y),
            "by numbers": lambda x, y: lax.select_n((x > 0).astype(np.int32) + (y > 0), x, y, x * 2),
            "by one": lambda x, y: lax.select_n(x[0, 0] > 0, x, y),
        },
        (X, -2 * X[::-1]),
        0,
    ),
    "dot_general": (
        {
            "matrices": lambda a, x, y, z: lax.dot_general(x, y, (((1,), (0,)), ((), ()))),
            "the first transposed": lambda a, x, y, z: lax.dot_general(x.T, y, (((0,), (0,)), ((), ()))),
            "both transposed": lambda a, x, y, z: lax.dot_general(x.T, y.T, (((0,), (1,)), ((), ()))),
            "the second transposed": lambda a, x, y, z: lax.dot_general(x, y.T, (((1,), (1,)), ((), ()))),
            "vectors": lambda a, x, y, z: lax.dot_general(x[0], x[1], (((0,), (0,)), ((), ()))),
            "a matrix and a vector": lambda a, x, y, z: lax.dot_general(x, x[1], (((1,), (0,)), ((), ()))),
            "nothing contracted": lambda a, x, y, z: lax.dot_general(x, y, (((), ()), ((), ()))),
            "batched": lambda a, x, y, z: lax.dot_general(a, z, (((2,), (1,)), ((0,), (0,)))),
            "batched, other axes": lambda a, x, y, z: lax.dot_general(a, z, (((2,), (1,)), ((1,), (2,)))),
            "two batched": lambda a, x, y, z: lax.dot_general(a, z, (((), ()), ((0, 1), (0, 2)))),
            "two contracted": lambda a, x, y, z: lax.dot_general(a, z, (((1, 2), (2, 1)), ((0,), (0,)))),
            "two contracted, none kept": lambda a, x, y, z: lax.dot_general(a, a, (((0, 1, 2), (0, 1, 2)), ((), ()))),
            "NaN and zero": lambda a, x, y, z: lax.dot_general(
                x * 0, y.at[0, 0].set(jnp.inf), (((1,), (0,)), ((), ()))
            ),
            "of nothing": lambda a, x, y, z: lax.dot_general(x[:, :0], y[:0], (((1,), (0,)), ((), ()))),
        },
        (A, X, Y, Z),
        TIGHT,
    ),
    "sums and products": (
        {
            "all": lambda a: lax.reduce_sum(a, (0, 1, 2)),
            "the first": lambda a: lax.reduce_sum(a, (0,)),
            "the middle": lambda a: lax.reduce_sum(a, (1,)),
            "two": lambda a: lax.reduce_sum(a, (0, 2)),
            "none": lambda a: lax.reduce_sum(a, ()),
            "product": lambda a: lax.reduce_prod(a, (0, 2)),
            **{
                f"cumsum, {axis}, {back}": partial(lax.cumsum, axis=axis, reverse=back)
                for axis in (0, 2)
                for back in (0, 1)
            },
            "cumprod": partial(lax.cumprod, axis=1),
            "cumprod, reversed": partial(lax.cumprod, axis=1, reverse=True),
            "cumlogsumexp": partial(lax.cumlogsumexp, axis=2),
            "cumlogsumexp, reversed": partial(lax.cumlogsumexp, axis=2, reverse=True),
        },
        (A,),
        RATHER,
    ),
    "choices": (
        {
            **{name: partial(getattr(lax, name), axes=(0, 2)) for name in ("reduce_max", "reduce_min")},
            **{
                f"{name}, {axis}": partial(getattr(lax, name), axis=axis, index_dtype=np.int32)
                for name in ("argmax", "argmin")
                for axis in (0, 1, 2)
            },
            **{
                f"{name}, {back}": partial(getattr(lax, name), axis=1, reverse=back)
                for name in ("cummax", "cummin")
                for back in (False, True)
            },
            **{f"sort, {axis}": partial(lax.sort, dimension=axis) for axis in (0, 2)},
        },
        (np.concatenate([A, np.round(A), np.where(A > 1, np.nan, A)]),),
        0,
    ),
    "moved": (
        {
            "transpose": lambda a: lax.transpose(a, (2, 0, 1)),
            "reshape": lambda a: lax.reshape(a, (4, 6)),
            "broadcast_in_dim": lambda a: lax.broadcast_in_dim(a, (2, 5, 3, 4), (0, 2, 3)),
            "broadcast_in_dim, of size 1": lambda a: lax.broadcast_in_dim(a[:, :1], (2, 3, 5, 4), (0, 1, 3)),
            "broadcast_in_dim, of rank 0": lambda a: lax.broadcast_in_dim(a[0, 0, 0], (2, 3), ()),
            "squeeze": lambda a: lax.squeeze(a[:, :1], (1,)),
            "expand_dims": lambda a: lax.expand_dims(a, (0, 2)),
            "slice": lambda a: lax.slice(a, (0, 1, 0), (2, 3, 4), (1, 1, 2)),
            "rev": lambda a: lax.rev(a, (0, 2)),
            "pad": lambda a: lax.pad(a, 7.0, ((1, 2, 0), (0, 0, 2), (0, 1, 0))),
            "pad, negative": lambda a: lax.pad(a, -1.0, ((-1, 2, 1), (-1, -1, 0), (0, -3, 2))),
            "concatenate": lambda a: lax.concatenate([a, a[:, :2], -a], 1),
            "stack": lambda a: jnp.stack([a, -a], 1),
            "unstack": lambda a: jnp.unstack(a, axis=1),
            "split": lambda a: lax.split(a, (1, 3), 2),
            "iota": lambda a: a + lax.broadcasted_iota(float, a.shape, 1),
        },
        (A,),
        0,
    ),
    "moved by numbers": (
        {
            "dynamic_slice": lambda a, i: lax.dynamic_slice(a, (i[0], i[1], i[2]), (1, 2, 2)),
            "dynamic_slice, outside": lambda a, i: lax.dynamic_slice(a, (i[3], i[3], i[3]), (2, 2, 2)),
            "dynamic_update_slice": lambda a, i: lax.dynamic_update_slice(a, -a[:1, :2, :2], (i[0], i[1], i[2])),
            "dynamic_update_slice, outside": lambda a, i: lax.dynamic_update_slice(a, -a[:, :2], (i[3], i[3], i[0])),
        },
        (A, np.array([1, 0, 2, 9])),
        0,
    ),
    "gather": (
        {
            "rows": lambda x, i: x[i],
            "rows, filled": lambda x, i: x.at[i].get(mode="fill"),
            "rows, filled with a number": lambda x, i: x.at[i].get(mode="fill", fill_value=-3.0),
            "integers, filled": lambda x, i: x.astype(np.int32).at[i].get(mode="fill"),
            "rows, clipped": lambda x, i: x.at[i].get(mode="clip"),
            "columns": lambda x, i: x[:, i],
            "entries": lambda x, i: x[i, i],
            "table of rows": lambda x, i: x[i[None].repeat(2, 0)],
            "along an axis": lambda x, i: jnp.take_along_axis(x, ORDER, 1),
            "windows": lambda x, i: gather(x, i[:, None], (1, 2), (), (0,), (2, 3)),
            "batched": lambda x, i: gather(x, i[:3, None] * 0 + 1, (), (1,), (1,), (1, 1), batching=((0,), (0,))),
        },
        (X, np.array([0, 2, 5, -1, -7, 1])),
        0,
    ),
    "scatter": (
        {
            "set": lambda x, i: x.at[i].set(jnp.arange(20.0).reshape(5, 4)),
            "set entries": lambda x, i: x.at[i[:2], i[1:3]].set(5.0),
            "set a column": lambda x, i: x.at[:, 1].set(5.0),
            "set a window": lambda x, i: x.at[1:, 2:].set(5.0),
            "add": lambda x, i: x.at[i].add(jnp.arange(20.0).reshape(5, 4)),
            "add, dropped": lambda x, i: x.at[i + 1].add(1.0, mode="drop"),
            "add, clipped": lambda x, i: x.at[i + 1].add(1.0, mode="clip"),
            "add along an axis": lambda x, i: jax.grad(lambda x: (jnp.take_along_axis(x, ORDER, 1) ** 2).sum())(x),
            "add to a window": lambda x, i: x.at[:2, 1:3].add(1.0),
        },
        (X, np.array([0, 2, 0, -1, 1])),
        0,
    ),
    "in float32": (
        {name: EXACT_OF_TWO[name] for name in ("add", "sub", "mul", "div", "max", "lt")},
        (X.astype(np.float32), X[::-1].astype(np.float32)),
        0,
    ),
    "of small integers": (
        {
            "max": lax.max,
            "eq": lax.eq,
            "select": lambda x, y: lax.select(x > y, x, y),
            "float": lambda x, y: x.astype(float),
        },
        (np.array([0, 200, 3], np.uint8), np.array([255, 1, 3], np.uint8)),
        0,
    ),
}


def case_program(name: str) -> Program:
    """The functions of a case as one program, in float64."""
    functions, operands, _ = CASES[name]
    with precise():
        given = {"arg": tuple(map(jnp.asarray, operands))}
        return flattened(name, lambda given: {n: f(*given["arg"]) for n, f in functions.items()}, given)


@pytest.fixture(scope="module")
def cases():
    return {name: case_program(name) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_on_the_page_is_jaxs(engine, cases, name):
    program, tolerance = cases[name], CASES[name][2]
    assert hold(engine, name, program) == {"unknown": [], "frozen": False}
    values = run(engine, name, program)
    for output, id in program.outputs.items():
        expected, what = program.values[id].astype(np.float64), f"{name}: {output}"
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=0) if tolerance == TIGHT else 0
        np.testing.assert_allclose(values[id], expected, rtol=tolerance, atol=4 * tolerance * scale, err_msg=what)


def test_the_error_function_and_its_kin_are_right_to_the_last_places(engine):
    x = np.concatenate([np.linspace(-26, 26, 2001), np.logspace(-300, 1, 500), np.linspace(0.4, 0.6, 101)])
    inside = np.concatenate([x / 26.5, [0.999999, -0.9999999999], 1 - np.logspace(-15, -1, 50)])
    inside = inside[np.abs(inside) < 1]
    for name, at, right in (
        ("erf", x, [*map(math.erf, x)]),
        ("erfc", x, [*map(math.erfc, x)]),
        ("erfInverse", inside, erfinv(inside)),
    ):
        found = engine.evaluate(f"x => x.map({name})", at.tolist())
        np.testing.assert_allclose(found, right, rtol=1e-15, atol=0, err_msg=name)


def test_python_and_the_page_know_the_same_operations_and_all_were_compared(engine, cases):
    assert sorted(engine.evaluate("Object.keys(OPERATIONS)")) == sorted(OPERATIONS)
    compared = {eqn.primitive for program in cases.values() for eqn in program.equations}
    assert set(OPERATIONS) - compared == {"copy_p", "expand_dims"}  # by which jax 0.10 calls `copy` and a reshape
