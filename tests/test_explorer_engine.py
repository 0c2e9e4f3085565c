"""The explorer page's engine, in a browser: every operation and whole models against jax, formulas, checksums."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.special import erfinv

import fnet
from fnet import layers, losses
from fnet.core.interpret import walk
from fnet.core.trees import named_leaves
from fnet.gradcheck.flat import Program, flattened
from fnet.gradcheck.problem import precise
from fnet.gradcheck.recording import Recording
from fnet.report.explorer_program import OPERATIONS, checksums, encode, program_json, shown

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

// ---- formulas: their values by arithmetic, with the sum of the terms' sizes, to which the rounding is relative

const FUNCTIONS = {
  logistic: x => 1 / (1 + Math.exp(-x)), max: Math.max, min: Math.min, erf, erfc,
  eq: (a, b) => +(a === b), ne: (a, b) => +(a !== b), lt: (a, b) => +(a < b), le: (a, b) => +(a <= b),
  gt: (a, b) => +(a > b), ge: (a, b) => +(a >= b), and: (a, b) => a & b, or: (a, b) => a | b, not: x => +!x,
  logsumexp: (...all) => Math.log(all.reduce((sum, x) => sum + Math.exp(x), 0)),
  rem: (a, b) => a % b, clamp: (low, x, high) => Math.min(Math.max(x, low), high),
};

function evaluated(program, values, node, off) {
  const go = x => evaluated(program, values, x, off), { t, a, b } = node;
  let found, scale;
  if (t === "num") found = node.value;
  else if (t === "ref") {
    const { data, shape } = values[node.id];
    if (node.name !== program.nameOf(node.id) || node.ix.length !== shape.length) throw Error("a wrong name");
    found = data[flat(node.ix, shape)];
  } else if (t === "sum" || t === "sub") {
    const terms = t === "sum" ? node.terms.map(go) : [go(a), go(b).map((x, i) => i ? x : -x)];
    if (t === "sum" && !(node.more >= 0)) throw Error("a sum without its count");
    found = terms.reduce((sum, [x]) => sum + x, node.rest ?? 0);
    scale = terms.reduce((sum, [, size]) => sum + size, Math.abs(node.rest ?? 0));
  } else if (t === "pick") [found, scale] = go(a);
  else if (/^arg(max|min)$|^truncated$/.test(node.f)) [found] = [node.value, go(node.args[0])];  // a place, or bits
  else {
    const args = t === "fn" ? node.args.map(go) : b ? [go(a), go(b)] : [go(a)], [x, y] = args.map(arg => arg[0]);
    const f = { mul: () => x * y, div: () => x / y, neg: () => -x, pow: () => x ** node.y,
      fn: () => (FUNCTIONS[node.f] ?? Math[node.f])(...args.map(arg => arg[0])) }[t];
    found = f();
    const lost = args.map(([value, size]) => value ? size / Math.abs(value) : 1);
    // what is lost of a function's argument is lost of what it gives, in proportion or at worst as it stands
    scale = Math.max(Math.abs(found) * Math.max(...lost), t === "fn" ? Math.max(...args.map(arg => arg[1])) : 0);
  }
  scale = Math.max(scale ?? 0, Math.abs(found));
  if (found !== node.value && !(found !== found && node.value !== node.value)) {
    off.worst = Math.max(off.worst, Math.abs(found - node.value) / scale || (scale ? Infinity : 0));
  }
  off.leaves += t === "num" || t === "ref";
  off.unnamed += t === "ref" && node.name === undefined;
  return [found, scale];
}

// every entry of every named value as a formula
function formulas(name, options) {
  const program = kept[name], values = program.run(), worst = { off: 0, leaves: 0, unnamed: 0, count: 0 };
  for (const id of program.names.keys()) {
    if (!program.made.has(id)) continue;
    for (let k = 0; k < values[id].data.length; k++) {
      const node = program.explain(values, id, unflat(k, values[id].shape), options);
      const off = { worst: 0, leaves: 0, unnamed: 0 }, value = values[id].data[k];
      if (!Object.is(node.value, value) && !(Math.abs(node.value - value) <= 1e-14 * Math.abs(value))) {
        throw Error(`${program.nameOf(id)} is ${value}, its formula ${node.value}`);
      }
      if (node.prim !== program.eqns[program.made.get(id)].prim) throw Error("not the equation that made it");
      evaluated(program, values, node, off);
      worst.off = Math.max(worst.off, off.worst);
      worst.leaves = Math.max(worst.leaves, off.leaves);
      worst.unnamed += off.unnamed;
      worst.count++;
    }
  }
  return worst;
}

// a formula in one line
function line(e) {
  const one = {
    num: () => String(e.value), ref: () => `${e.name ?? "#"}[${e.ix}]`, neg: () => `-${line(e.a)}`,
    mul: () => `${line(e.a)} * ${line(e.b)}`, div: () => `${line(e.a)} / ${line(e.b)}`,
    sub: () => `(${line(e.a)} - ${line(e.b)})`, pow: () => `${line(e.a)}^${e.y}`, pick: () => `${line(e.a)} of ${e.of}`,
    fn: () => `${e.f}(${e.args.map(line).join(", ")})`,
    sum: () => `(${e.terms.map(line).join(" + ")}${e.more ? ` + ${e.more} more` : ""})`,
  };
  return one[e.t]();
}

function explained(name, mark, ix, options) {
  const program = kept[name], id = program.marks[mark] ?? program.outs[mark];
  return line(program.explain(program.run(), id, ix, options));
}

function originsOf(name, mark, ix) {
  const program = kept[name], id = program.marks[mark] ?? program.outs[mark];
  return program.origins(program.run(), id, ix).map(([id, ix]) => `${program.nameOf(id)}[${ix}]`);
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


def of_lax(*names: str) -> dict:
    """Operations by their names."""
    return {name: getattr(lax, name) for name in names}


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
    **of_lax("exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "atan", "sinh", "cosh", "tanh", "asinh"),
    **of_lax("acosh", "logistic", "rsqrt", "cbrt", "erf"),
    **{f"integer_pow, {y}": partial(lax.integer_pow, y=y) for y in (-3, -1, 0, 1, 2, 3, 5)},
}
EXACT_OF_TWO = of_lax("add", "sub", "mul", "div", "rem", "max", "min", "eq", "ne", "lt", "le", "gt", "ge")
OF_TWO = of_lax("pow", "atan2")
WHOLE_OF_TWO = of_lax("add", "sub", "mul", "div", "rem", "max", "min", "eq", "lt", "ge")
WHOLE_BITS = of_lax("bitwise_and", "bitwise_or", "bitwise_xor")

# name: functions of the same operands, these, and the relative tolerance
MASK = np.uint64(2**64 - 2**27)
NEWER = ("log2", "one_minus_square", "polynomial")  # jax 0.12 has them, 0.10 has not
CASES: dict[str, tuple[dict, tuple, float]] = {
    "of one operand": (EXACT_OF_ONE, (NUMBERS,), 0),
    "of one operand, functions": (OF_ONE, (NUMBERS[:-2],), RATHER),
    "of one operand, within -1 and 1": (
        of_lax("asin", "acos", "atanh"),
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
    "of the bits of doubles": (
        {"masked": lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, np.uint64) & MASK, float)},
        (NUMBERS,),
        0,
    ),
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
    **(
        {
            "of jax 0.12": (
                {
                    **of_lax("log2", "one_minus_square"),
                    "polynomial": lambda x: lax.polynomial(x, [1.0, jnp.cos(x), -2.0, 0.5]),  # pyright: ignore
                },
                (NUMBERS[:-2],),
                RATHER,
            )
        }
        if hasattr(lax, "polynomial")
        else {}
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


EXPLAINED = (
    "dot_general",
    "sums and products",
    "choices",
    "moved",
    "moved by numbers",
    "gather",
    "scatter",
    "select_n",
)


def of_case(name: str) -> tuple[Callable, dict]:
    """The functions of a case as one, and what it is given."""
    functions, operands, _ = CASES[name]
    return lambda given: {n: f(*given["arg"]) for n, f in functions.items()}, {"arg": tuple(map(jnp.asarray, operands))}


def case_program(name: str) -> Program:
    """A case as a program, in float64."""
    with precise():
        return flattened(name, *of_case(name))


@pytest.mark.parametrize("name", CASES)
def test_an_operation_on_the_page_is_jaxs(engine, name):
    program, tolerance = case_program(name), CASES[name][2]
    assert hold(engine, name, program) == {"unknown": [], "frozen": False}
    values = run(engine, name, program)
    for output, id in program.outputs.items():
        expected, what = program.values[id].astype(np.float64), f"{name}: {output}"
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=0) if tolerance == TIGHT else 0
        np.testing.assert_allclose(values[id], expected, rtol=tolerance, atol=4 * tolerance * scale, err_msg=what)
        if tolerance == 0 and program.values[id].dtype.kind == "f" and not output.startswith(("max", "min")):
            zeros = expected == 0  # IEEE leaves it open which of 0 and -0 is the greater
            assert (np.signbit(values[id]) == np.signbit(expected))[zeros].all(), what
    if name in EXPLAINED:
        found = engine.evaluate("name => formulas(name, { budget: 1e9, terms: 1e9 })", name)
        assert found["off"] < 1e-14 and found["unnamed"] == 0 and found["count"] > 30, found


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


def test_python_and_the_page_know_the_same_operations_and_all_are_compared(engine):
    assert sorted(engine.evaluate("Object.keys(OPERATIONS)")) == sorted(OPERATIONS)
    with precise():
        traced = [jax.make_jaxpr(function)(given) for function, given in map(of_case, CASES)]
    compared = {place.eqn.primitive.name for closed in traced for place in walk(closed.jaxpr)}
    newer = {name for name in NEWER if not hasattr(lax, name)}
    assert set(OPERATIONS) - compared == {"copy_p", "expand_dims"} | newer  # other names of `copy` and of a reshape


# --- models -----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A model with what it is recorded on."""

    model: fnet.Layer
    loss: Any
    batch: fnet.Batch
    params: Any
    state: Any
    key: Any = None


def case(model, loss, x, targets, weights=None, key=None, params=None, spread=0.3) -> Case:
    """Parameters at random, biases too."""
    batch = fnet.Batch(*(a if a is None else jax.tree.map(jnp.asarray, a) for a in (x, targets, weights)))
    drawn, state = fnet.init(model, jax.random.key(0), batch.inputs)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + spread * rng.standard_normal(p.shape), drawn) if params is None else params
    return Case(model, loss, batch, params, state, key)


def mazur() -> Case:
    """mattmazur.com, A Step by Step Backpropagation Example (2015)."""
    params = {
        "dense_0": {"w": np.array([[0.15, 0.25], [0.20, 0.30]]), "b": np.array([0.35, 0.35])},
        "sigmoid_0": (),
        "dense_1": {"w": np.array([[0.40, 0.50], [0.45, 0.55]]), "b": np.array([0.60, 0.60])},
        "sigmoid_1": (),
    }
    model = fnet.mlp(2, 2, activation=layers.sigmoid(), output=layers.sigmoid())
    return case(model, losses.half_squared_error, np.array([[0.05, 0.10]]), np.array([[0.01, 0.99]]), params=params)


def xor() -> Case:
    x = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    return case(fnet.mlp(3, 1, activation=layers.tanh()), losses.binary_cross_entropy, x, x.sum(1, keepdims=True) % 2)


def digits() -> Case:
    x, labels = np.random.default_rng(2).uniform(0, 1, (1, 784)), np.array([3])
    return case(fnet.mlp(128, 64, 10, activation=layers.relu()), losses.softmax_cross_entropy, x, labels, spread=0.03)


def lenet() -> Case:
    x = np.random.default_rng(2).standard_normal((1, 28, 28, 1))
    return case(fnet.models.lenet5(10), losses.softmax_cross_entropy, x, np.array([4]), spread=0.03)


def lstm() -> Case:
    model = layers.serial(layers.lstm(3), layers.dense(2))
    x, y = (np.random.default_rng(2).standard_normal(shape) for shape in ((2, 3, 2), (2, 3, 2)))
    return case(model, losses.squared_error, x, y)


def gpt() -> Case:
    ids = np.array([[1, 4, 0, 2]])
    return case(
        fnet.models.gpt(5, length=4, layers=1, features=4, heads=2), losses.softmax_cross_entropy, ids, ids[:, ::-1]
    )


def recurrent() -> Case:
    model = layers.serial(layers.embedding(5, 3), layers.gru(3), layers.bidirectional(layers.rnn(2)), layers.dense(5))
    ids = np.array([[1, 4, 0], [3, 3, 2]])
    return case(model, losses.smoothed_cross_entropy(0.1), ids, ids[:, ::-1])


def normalized() -> Case:
    model = layers.serial(
        *(layers.dense(4), layers.batch_norm(), layers.gelu(), layers.dense(4), layers.layer_norm(), layers.softplus()),
        *(layers.dense(3), layers.rms_norm(), layers.gelu(approximate=True), layers.leaky_relu(0.1)),
    )
    x, y = np.random.default_rng(2).standard_normal((2, 4, 3))
    return case(model, losses.huber(0.5), x, y, np.array([1.0, 0.5, 0.0, 2.0]))


def images() -> Case:
    model = layers.serial(
        *(layers.conv(4, (3, 3)), layers.group_norm(2), layers.max_pool((2, 2)), layers.relu()),
        *(layers.conv(2, (2, 2), stride=2, padding="VALID"), layers.avg_pool((2, 2), padding="SAME", stride=1)),
        *(layers.flatten(), layers.dense(3), layers.softmax()),
    )
    rng = np.random.default_rng(2)
    return case(model, losses.absolute_error, rng.standard_normal((2, 8, 8, 1)), rng.uniform(0, 1, (2, 3)))


def convolved() -> Case:
    x = np.random.default_rng(2).standard_normal((2, 4, 5, 1))
    return case(layers.serial(layers.conv(3, (3, 3))), losses.half_squared_error, x, np.zeros((2, 4, 5, 3)))


def attentive() -> Case:
    block = layers.residual(layers.attention(2, kv_heads=1, rotary=10.0), layers.layer_norm())
    model = layers.serial(layers.repeat(block, 2), layers.global_avg_pool(), layers.dense(2))
    rng, mask = np.random.default_rng(2), np.arange(3)[None] < np.array([[3], [2]])
    return case(model, losses.half_squared_error, (rng.standard_normal((2, 3, 4)), mask), rng.standard_normal((2, 2)))


def dropped() -> Case:
    model = layers.serial(layers.dense(4), layers.dropout(0.4), layers.dense(2))
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((3, 2)), rng.standard_normal((3, 2))
    return case(model, losses.squared_error, x, y, key=jax.random.key(5))


MODELS = (mazur, xor, digits, lstm, recurrent, normalized, images, attentive, dropped, lenet, gpt)
QUICK = (mazur, xor, lstm)
DRAWS = {mazur: 50, xor: 50, lenet: 1, gpt: 2}  # of parameters and inputs; of others 3


@functools.cache
def recorded(make: Callable[[], Case]) -> tuple[Case, Recording]:
    """A case in float64 with its recording."""
    with precise():
        made = make()
        return made, fnet.record(*made[:3], params=made.params, state=made.state, key=made.key)


def programs_of(recording: Recording) -> dict[str, Program]:
    """By the engine that made them."""
    return {"hand": recording.by_hand, "auto": recording.autodiff}  # pyright: ignore


def greatest(arrays) -> float:
    """The greatest finite entry of floating arrays, in size."""
    return max(np.abs(a[np.isfinite(a)]).max(initial=0) for a in arrays if a.dtype.kind == "f")


def assert_near(found, expected, most, tolerance, what):
    """Within the tolerance of the value's greatest entry; what ought to be 0 holds rounding of the pass' greatest."""
    assert found.shape == expected.shape, what
    expected, finite = expected.astype(np.float64), np.isfinite(expected)
    assert np.array_equal(found[~finite], expected[~finite], equal_nan=True), what
    off, limit = np.abs(found[finite] - expected[finite]), tolerance * (greatest([expected]) + 1e-2 * most)
    assert (off <= limit).all(), (what, off.max(), limit)


def assert_every_value(page, name: str, program: Program) -> None:
    """As recorded, and by the page's own check."""
    most = greatest(program.values)
    for id, found in enumerate(run(page, name, program)):
        if program.values[id].dtype != np.uint64:  # bits, which doubles cannot hold as numbers
            assert_near(found, program.values[id], most, 1e-13, (name, id))
    checked = page.evaluate("name => kept[name].check(kept[name].run())", name)
    computed = sum(program.values[id].size for eqn in program.equations for id in eqn.outputs)
    assert checked["worst"] < 1e-13, checked
    assert checked["count"] == computed or "dropped" in name


def drawn(made: Case, rng, spread: float) -> Case:
    """Other parameters, and other inputs where they are no ids and no mask."""

    def other(a, spread=1.0):
        a = np.asarray(a)
        return spread * rng.standard_normal(a.shape) if a.dtype.kind == "f" else a

    params, x = jax.tree.map(partial(other, spread=spread), made.params), jax.tree.map(other, made.batch.inputs)
    return made._replace(params=params, batch=made.batch._replace(inputs=x))


def assert_at_other_parameters(page, make, programs: dict[str, Program]) -> None:
    """The loss and the gradients of fnet's engines, at draws of parameters and inputs."""
    made, _ = recorded(make)
    rng, key, spread = np.random.default_rng(3), jax.random.key(0), 0.1 if make in (digits, lenet) else 1.0
    gradients = {
        "hand": jax.jit(fnet.backprop(made.model, made.loss)),
        "auto": jax.jit(fnet.autodiff(made.model, made.loss)),
    }
    for _ in range(DRAWS.get(make, 3)):
        at = drawn(made, rng, spread)
        given = {"param": at.params, "input": at.batch.inputs}
        changed = {path: leaf for path, leaf in named_leaves(given) if np.asarray(leaf).dtype.kind == "f"}
        for by, program in programs.items():
            with precise():
                grads, _, metrics = gradients[by](at.params, at.state, at.batch, key)
                loss = metrics["loss"].value
            right = {"loss": loss, **dict(named_leaves({"grads": grads}))}
            right = {path: np.asarray(leaf) for path, leaf in right.items()}
            most, ids = greatest(right.values()), [program.outputs[path] for path in right]
            for path, found in zip(right, run(page, f"{make.__name__} {by}", program, changed, ids), strict=True):
                assert_near(found, right[path], most, 1e-12, (make, by, path))


def assert_formulas(page, name: str, program: Program) -> None:
    """Each formula is worth its value, and no longer than its budget."""
    for options in ({}, {"terms": 3, "budget": 6}):
        found = page.evaluate("([name, options]) => formulas(name, options)", [name, options])
        named = {*program.marks.values(), *program.outputs.values()} - {*program.given.values()}
        assert found["count"] == sum(program.values[id].size for id in named)
        assert found["off"] < 1e-12 and found["leaves"] <= options.get("budget", 40), found


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, marks=[] if make in QUICK else [pytest.mark.long]) for make in MODELS],
    ids=lambda f: f.__name__,
)
def test_the_page_computes_and_explains_a_model_as_fnet_does(engine, make):
    _, recording = recorded(make)
    programs = programs_of(recording)
    for by, program in programs.items():
        name = f"{make.__name__} {by}"
        assert hold(engine, name, program)["frozen"] is False
        assert_every_value(engine, name, program)
        if make not in (digits, lenet):  # of many entries
            assert_formulas(engine, name, program)
    if make is not dropped:  # by other numbers from its key
        assert_at_other_parameters(engine, make, programs)


def test_what_is_changed_and_put_back_leaves_the_recorded_values(engine):
    _, recording = recorded(lstm)
    program = recording.by_hand
    hold(engine, "back", program)
    first = run(engine, "back", program)
    changed = {"param/dense_0/b": np.array([3.0, 4.0])}
    moved, back = run(engine, "back", program, changed), run(engine, "back", program)
    assert any((a != b).any() for a, b in zip(first, moved, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first, back, strict=True))
    found = engine.evaluate("[...kept.back.depends('param/dense_0/b')]")
    differ = {i for i, (a, b) in enumerate(zip(first, moved, strict=True)) if (a != b).any()}
    assert differ <= {*found} and len(found) < len(program.values)


def test_the_loss_alone_is_computed_by_what_leads_to_it(engine):
    _, recording = recorded(xor)
    program = recording.by_hand
    hold(engine, "alone", program)
    weights = {"param/dense_0/w": np.array([[0.1, 0.2, 0.3], [-0.5, 0.7, 0.9]])}
    (whole,) = run(engine, "alone", program, weights, [program.outputs["loss"]])
    hold(engine, "alone", program)
    script = """changed => {
        const program = kept.alone, id = program.outs.loss, only = program.needed([id]);
        const loss = program.run(changes(changed), only)[id].data[0];
        return { loss, equations: only.size, again: program.run()[id].data[0] };
    }"""
    found = engine.evaluate(script, {path: encode(a) for path, a in weights.items()})
    assert found["loss"] == whole and found["equations"] < len(program.equations)
    assert found["again"] == pytest.approx(program.value("loss"), rel=1e-15)


def test_an_override_puts_numbers_in_the_place_of_computed_ones(engine):
    _, recording = recorded(mazur)
    program = recording.by_hand
    hold(engine, "over", program)
    mark, loss = program.marks["forward:sigmoid_1"], program.outputs["loss"]
    script = "([mark, loss]) => kept.over.run({}, null, new Map([[mark, Float64Array.of(0.5, 0.25)]]))[loss].data[0]"
    found = engine.evaluate(script, [mark, loss])
    assert found == pytest.approx(0.5 * ((0.5 - 0.01) ** 2 + (0.25 - 0.99) ** 2), rel=1e-15)
    assert run(engine, "over", program, ids=[loss])[0] == pytest.approx(program.value("loss"), rel=1e-15)


# --- checksums and what is unknown ------------------------------------------------------------------------------------


def test_checksums_are_what_their_formula_says():
    x = np.array([2.0, np.nan, -1.0, np.inf, -np.inf])
    w = [((i * 2654435761 + 40503) % 2**32) / 2**32 + 0.5 for i in range(5)]
    assert checksums(x) == pytest.approx((2 * w[0] - w[2], 2 * w[1] + w[3] - w[4]), rel=1e-15)


@pytest.mark.parametrize("to", [1e-6, None])
def test_one_wrong_number_among_thousands_is_found_where_it_is(engine, to):
    _, recording = recorded(digits)
    program = recording.by_hand
    hold(engine, "one", program)
    id = program.marks["dx:dense_0"]
    script = """([id, to]) => {
        const values = kept.one.run();
        values[id] = { shape: values[id].shape, data: Float64Array.from(values[id].data) };
        values[id].data[500] = to === null ? NaN : values[id].data[500] + to;
        return kept.one.check(values);
    }"""
    found = engine.evaluate(script, [id, to])
    assert found["where"] == id
    assert found["worst"] > 1e-10 if to else found["worst"] == math.inf


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("tanh: unary(Math.tanh)", "tanh: unary(x => Math.tanh(x) * (1 + 1e-9))"),
        ("mul: binary((a, b) => a * b)", "mul: binary((a, b) => a * b + 1e-12)"),
        ("reduce_sum: summed", "reduce_sum: { ...summed, run: (eqn, ins) => summed.run(eqn, ins).fill(0.7, 0, 1) }"),
        ("to[axis] = from[i] === 1 ? 0 : steps[i]", "to[axis] = 0"),
    ],
)
def test_an_operation_that_is_wrong_on_the_page_shows_in_its_check(browser, right, wrong):
    page = browser.new_page()
    source = ENGINE.read_text()
    assert source.count(right) == 1
    page.add_script_tag(content=source.replace(right, wrong) + GLUE)
    _, recording = recorded(lstm)
    hold(page, "broken", recording.by_hand)
    assert page.evaluate("kept.broken.check(kept.broken.run()).worst") > 1e-11
    page.close()


def test_an_unknown_operation_is_named_kept_as_recorded_and_freezes_what_depends_on_inputs(engine):
    def f(w, x):
        return fnet.tap("y", lax.lgamma(w * x)) + jax.random.uniform(jax.random.key(0))

    program = fnet.record_function(f, 2.0, 1.5).autodiff
    found = hold(engine, "unknown", program)
    assert "lgamma" in found["unknown"] and "random_bits" in found["unknown"] and found["frozen"] is True
    values = run(engine, "unknown", program)
    assert values[program.marks["forward:y"]] == program.value("forward:y")
    assert engine.evaluate("kept.unknown.check(kept.unknown.run()).worst") < 1e-14
    assert explained(engine, "unknown", "forward:y", []) == "forward:y[]"

    program = fnet.record_function(lambda w: w * jax.random.uniform(jax.random.key(0)) + fnet.tap("y", w), 2.0).autodiff
    found = hold(engine, "known", program)
    assert "random_bits" in found["unknown"] and found["frozen"] is False


# --- formulas ---------------------------------------------------------------------------------------------------------


def explained(page, name, mark, ix, **options) -> str:
    """A formula in one line."""
    return page.evaluate("([name, mark, ix, options]) => explained(name, mark, ix, options)", [name, mark, ix, options])


def test_mazurs_formulas_are_those_of_the_text(engine):
    _, recording = recorded(mazur)
    hold(engine, "mazur", recording.by_hand)
    formulas = {
        ("forward:dense_0", (0, 1)): "(input[0,0] * param/dense_0/w[0,1] + input[0,1] * param/dense_0/w[1,1]"
        " + param/dense_0/b[1])",
        ("forward:sigmoid_1", (0, 0)): "logistic(forward:dense_1[0,0])",
        ("dy:sigmoid_1", (0, 0)): "(forward:sigmoid_1[0,0] - target[0,0])",
        ("dy:sigmoid_0", (0, 0)): "(dy:dense_1[0,0] * param/dense_1/w[0,0] + dy:dense_1[0,1] * param/dense_1/w[0,1])",
        ("grads/dense_1/w", (1, 0)): "forward:sigmoid_0[0,1] * dy:dense_1[0,0]",
        ("grads/dense_1/b", (1,)): "dy:dense_1[0,1]",
    }
    found = {(mark, ix): explained(engine, "mazur", mark, list(ix)) for mark, ix in formulas}
    assert found == formulas


def test_a_long_sum_shows_its_largest_terms_and_what_is_left(engine):
    x, w = np.arange(1.0, 21), np.where(np.arange(20) % 2, 1.0, -1.0)
    program = fnet.record_function(lambda w, x: fnet.tap("y", w @ x) ** 2, w, x).autodiff
    hold(engine, "long", program)
    text = explained(engine, "long", "forward:y", [], terms=3)
    assert text == "(param[19] * arg/0[19] + param[18] * arg/0[18] + param[17] * arg/0[17] + 17 more)"
    node = engine.evaluate("kept.long.explain(kept.long.run(), kept.long.marks['forward:y'], [], { terms: 3 })")
    assert node["more"] == 17 and node["rest"] == (w @ x) - (20 - 19 + 18) and node["value"] == w @ x


def test_formulas_leave_out_what_changes_nothing(engine):
    def f(w):
        tapped = {
            "times one": w[0] * 1.0,
            "less zero": w[0] - jnp.zeros(2)[0],
            "padded": jnp.pad(w, 1)[0] + w[1],
            "chosen": jnp.where(w > 0, w, -w)[1],
            "nested": (w[0] + w[1]) - (w[1] - 3.0),
            "one of": jnp.max(w),
            "twice": jnp.negative(-w[0]),
            "placed": jnp.zeros(3).at[1].add(w[0])[1],
            "constant": w[0] * (jnp.exp(0.0) + 2.0),
            "root": lax.rsqrt(w[0]) + w[0] ** 3,
        }
        return sum(fnet.tap(name, value) for name, value in tapped.items())

    hold(engine, "less", fnet.record_function(f, np.array([2.0, -5.0])).autodiff)
    expected = {
        "times one": "param[0]",
        "less zero": "param[0]",
        "padded": "param[1]",
        "chosen": "-param[1]",
        "nested": "(param[0] + param[1] + -(param[1] - 3))",
        "one of": "param[0] of 2",
        "twice": "param[0]",
        "placed": "param[0]",
        "constant": "param[0] * 3",
        "root": "(1 / sqrt(param[0]) + param[0]^3)",
    }
    assert {name: explained(engine, "less", f"forward:{name}", []) for name in expected} == expected


def test_the_origins_of_a_convolutions_pixel_are_its_window(engine):
    _, recording = recorded(convolved)
    hold(engine, "window", recording.by_hand)
    for ix, window in (
        ((0, 0), [(0, 0), (0, 1), (1, 0), (1, 1)]),
        ((1, 3), [*itertools.product((0, 1, 2), (2, 3, 4))]),
    ):
        found = engine.evaluate("([mark, ix]) => originsOf('window', mark, ix)", ["forward:conv_0", [1, *ix, 2]])
        pixels = {f"input[1,{i},{j},0]" for i, j in window}
        kernel = {f"param/conv_0/w[{i - ix[0] + 1},{j - ix[1] + 1},0,2]" for i, j in window}
        assert set(found) == pixels | kernel | {"param/conv_0/b[2]"} and len(found) == len(set(found))


def test_a_value_has_the_name_that_a_person_knows_it_by(engine):
    _, recording = recorded(xor)
    program = recording.by_hand
    hold(engine, "names", program)
    names = dict(engine.evaluate("[...kept.names.names]"))
    assert names[program.outputs["loss"]] == "loss"
    assert names[program.given["param/dense_0/w"]] == "param/dense_0/w"
    assert names[program.marks["forward:tanh_0"]] == "forward:tanh_0"
    assert names[program.marks["dy:dense_0"]] == names[program.marks["dx:tanh_0"]] == "dy:dense_0"
    assert (
        names[program.marks["dx:dense_0"]] == "dx:dense_0"
        and names[program.outputs["grads/dense_0/w"]] == "grads/dense_0/w"
    )


# --- the JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.array([1.1, np.nan, np.inf, -np.inf, -0.0]), "f8"),
        (np.array([0.5, np.nan, np.inf, -np.inf, -0.0]), "f4"),
        (np.float64(np.pi), "f8"),
        (np.float32([0.1, 0.2]), "f4"),
        (np.array([[-(2**31), 2**31 - 1]]), "i4"),
        (np.array([2**40 + 1, -(2**53)]), "f8"),
        (np.array([2**32 - 1], np.uint32), "f8"),
        (np.array([True, False]), "u1"),
        (np.array([3, 250], np.uint8), "u1"),
        (np.array([-0.0]), "f4"),
        (np.zeros((2, 0, 3)), "zeros"),
        (np.zeros((2, 3), np.int64), "zeros"),
    ],
)
def test_an_array_reaches_the_page_to_the_bit(engine, array, code):
    encoded = json.loads(json.dumps(encode(array)))
    assert encoded[0] == code
    shape, text_ = engine.evaluate("a => { const { shape, data } = decode(a); return [shape, text([data])]; }", encoded)
    assert shape == list(array.shape)
    (found,) = from_text(text_, [array.shape])
    assert found.tobytes() == np.asarray(array, np.float64).tobytes() or np.isnan(array).any()
    np.testing.assert_array_equal(found, array)


def test_the_json_names_files_as_people_do_and_tells_where_their_lines_are(tmp_path):
    _, recording = recorded(mazur)
    told = []
    made = program_json(recording.by_hand, lambda file, line: told.append((file, line)))
    assert len(told) == len(made["lines"]) == len(set(told)) and all(Path(file).is_absolute() for file, _ in told)
    assert [[shown(file), line] for file, line in told] == made["lines"]
    names = {file for file, _ in made["lines"]}
    assert {"fnet/layers/dense.py", "fnet/losses/entries.py"} <= names
    assert shown(str(tmp_path / "mine.py")) == "mine.py" and not any(name.startswith("/") for name in names)
    assert max(place for stack in made["stacks"] for place in stack) < len(made["lines"])
    for prim, params, ins, outs, scope, stack in made["eqns"]:
        assert prim in OPERATIONS and params is not None and scope < len(made["scopes"]) and stack < len(made["stacks"])
        assert all(id < len(made["shapes"]) for id in (*ins, *outs))
    assert set(made["kinds"]) <= set("fib") and len(made["kinds"]) == len(made["shapes"])
    json.dumps(made, allow_nan=False)
