"""A function and its gradient made ready for the audit: in float64, as flat lists of leaves, traced, compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.interpret import (
    CUSTOM,
    STRUCTURE,
    defined_in_jax,
    dependencies,
    evaluate,
    is_array,
    is_float,
    location,
    walk,
)
from fnet.core.jax_insides import bind
from fnet.core.numerics import is_floating_dtype
from fnet.gradcheck.kept import same_program
from fnet.types import PyTree

UNTRACEABLE = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)


@contextmanager
def precise(x64: bool = True):
    """The settings of the audit, whatever the caller's: float64, standard promotion, products in full precision."""
    with ExitStack() as stack:
        for setting in (
            jax.enable_x64(x64),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.default_matmul_precision("highest"),
            jax.debug_nans(False),
            jax.debug_infs(False),
        ):
            stack.enter_context(setting)
        yield


class Problem(NamedTuple):
    """``f(params, *args)`` as a function of two flat lists: the floating leaves of ``params``, and all other arrays."""

    keys: tuple  # key paths of the floating leaves
    paths: tuple[str, ...]  # the same, to be read
    inputs: tuple[str, ...]  # of the leaves and all other arrays
    dtypes: tuple[np.dtype, ...]  # that the caller gave them
    leaves: list[jax.Array]  # in float64
    others: list[jax.Array]  # floating ones in float64
    params_tree: Any
    rebuild: Callable  # (leaves, others) -> params, args
    value: Callable  # (leaves, others) -> scalar
    native: Callable  # dtype or None -> leaves, others in that dtype, or in their own
    as_given: Callable  # (leaves, others) -> the same, in NumPy where the caller gave NumPy
    examples: frozenset[int]  # sizes of the first axes of the arguments


def prepare(f: Callable, params: PyTree, args: tuple, has_aux: bool = False, dtype=jnp.float64) -> Problem:
    """Take ``params`` and ``args`` apart, floating ones in ``dtype`` (None: in their own). Within `precise`.

    Raises ValueError, TypeError on bad input.
    """
    paths_and_leaves, tree = jax.tree_util.tree_flatten_with_path((params, args))
    roles, keys, dtypes, others_names = [], [], [], []
    for path, leaf in paths_and_leaves:
        mine = path[0].idx == 0
        name = name_of(path[1:]) if mine else f"argument {name_of(path[1:])}"
        if isinstance(leaf, Tracer):
            raise ValueError(f"{name} is traced; the audit runs on the host: call it outside jit, vmap and grad")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{name}: got a ShapeDtypeStruct; a gradient is checked at a point, so give an array")
        if mine and is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(f"{name} is {leaf.dtype}; only real gradients are checked: split it into two real arrays")
        floating = isinstance(leaf, float) or is_float(leaf)
        if mine and floating:
            roles.append("leaf")
            keys.append(path[1:])
            dtypes.append(np.dtype(getattr(leaf, "dtype", np.float64)))
        else:
            numbers = is_array(leaf) and getattr(getattr(leaf, "dtype", None), "kind", "V") not in "USO"
            roles.append("other" if numbers else "static")
            others_names += [name] if numbers else []
    if not keys:
        raise ValueError("check_gradients: params has no floating leaf, so there is no gradient to check")
    values = [leaf for _, leaf in paths_and_leaves]

    def arrays(role, dtype):
        chosen = [leaf for leaf, r in zip(values, roles, strict=True) if r == role]
        if dtype is None:
            return [as_caller_has_it(leaf) for leaf in chosen]
        return [converted(leaf, dtype) for leaf in chosen]

    def rebuild(leaves, others):
        pools = {"leaf": iter(leaves), "other": iter(others)}
        parts = [leaf if role == "static" else next(pools[role]) for leaf, role in zip(values, roles, strict=True)]
        return jax.tree.unflatten(tree, parts)

    def value(leaves, others):
        p, a = rebuild(leaves, others)
        out = f(p, *a)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(f"check_gradients: has_aux=True, but the function returned {type(out).__name__}, no pair")
        return out[0] if has_aux else out

    def as_given(leaves, others):
        def back(role, arrays):
            chosen = [leaf for leaf, r in zip(values, roles, strict=True) if r == role]
            return [np.array(x) if isinstance(leaf, np.ndarray) else x for leaf, x in zip(chosen, arrays, strict=True)]

        return back("leaf", leaves), back("other", others)

    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(args) if is_array(leaf) and leaf.ndim}
    return Problem(
        tuple(keys),
        tuple(map(name_of, keys)),
        (*map(name_of, keys), *others_names),
        tuple(dtypes),
        arrays("leaf", dtype),
        arrays("other", dtype),
        jax.tree.structure(params),
        rebuild,
        value,
        lambda dtype: (arrays("leaf", dtype), arrays("other", dtype)),
        as_given,
        frozenset(sizes),
    )


def converted(leaf, dtype) -> jax.Array:
    """A floating leaf in another dtype, any other as it is; by NumPy, which compiles nothing."""
    if isinstance(leaf, float) or is_float(leaf):
        return jax.device_put(np.asarray(leaf).astype(dtype))
    return on_device(leaf)


def as_caller_has_it(leaf) -> jax.Array:
    """A leaf at the precision in force: without x64, a float64 one in float32."""
    if is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return on_device(leaf)
    return jax.device_put(np.asarray(leaf).astype(jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))))


def on_device(leaf) -> jax.Array:
    """A leaf as an array of jax; unlike `jnp.asarray` it compiles nothing for one of NumPy."""
    return jax.device_put(leaf) if isinstance(leaf, np.ndarray | np.generic) else jnp.asarray(leaf)


class Traced(NamedTuple):
    """The program of the function, and what can be read off it without running it."""

    closed: Any
    steady: bool  # two traces gave the same program
    unused: frozenset[int]  # leaves that the result does not depend on
    casts: tuple[str, ...]  # narrowing of what depends on the parameters, with their places
    eps: float  # of the narrowest type that takes part
    custom: bool  # a rule of the user's own takes part
    blocked: tuple[str, ...]  # places of stop_gradient on what depends on the parameters


def trace(problem: Problem) -> Traced:
    """Trace the function twice; ValueError where it does not return one floating scalar or cannot be traced."""
    try:
        first, second = (traced_anew(problem.value, problem.leaves, problem.others) for _ in range(2))
    except UNTRACEABLE as error:
        raise ValueError(
            "check_gradients: the function decides in Python on the value of an array, or hands it to NumPy, so that "
            "jax cannot trace it: use jnp functions, jnp.where or jax.lax.cond"
        ) from error
    outputs = first.out_avals
    if len(outputs) != 1 or outputs[0].shape != () or not is_float(outputs[0]):
        shown = ", ".join(str(aval.str_short()) for aval in outputs)
        raise ValueError(
            f"check_gradients: the function returned {shown}; expected one floating scalar, the loss "
            "(for (loss, aux) pass has_aux=True)"
        )
    casts, blocked, eps = {}, {}, [2.0**-52]
    n = len(problem.leaves)

    def visit(site, eqn, masks):
        if not any(masks) or eqn.primitive.name in STRUCTURE:
            return
        wide = any(
            mask and is_float(atom.aval) and atom.aval.dtype == np.float64
            for atom, mask in zip(eqn.invars, masks, strict=True)
        )
        out = eqn.outvars[0].aval if eqn.outvars else None
        if wide and out is not None and is_float(out) and out.dtype != np.float64:
            casts[f"{out.dtype} at {location(eqn) or eqn.primitive.name}"] = None
            eps.append(float(jnp.finfo(out.dtype).eps))
        if eqn.primitive.name == "reduce_precision" and eqn.params["mantissa_bits"] < 52:
            casts[f"{eqn.params['mantissa_bits']} bits at {location(eqn)}"] = None
            eps.append(2.0 ** -eqn.params["mantissa_bits"])
        if eqn.primitive.name == "stop_gradient":
            blocked[location(eqn)] = None

    masks = [1 << i for i in range(n)] + [0] * len(problem.others)
    (reached,) = dependencies(first.jaxpr, masks, visit)
    unused = frozenset(i for i in range(n) if not reached >> i & 1)
    custom = any(p.eqn.primitive.name in CUSTOM and not defined_in_jax(p.eqn) for p in walk(first.jaxpr))
    return Traced(first, same_program(first, second), unused, tuple(casts), max(eps), custom, tuple(blocked))


def traced_anew(f: Callable, leaves, others):
    """A function's program, without jax's cache of traces: a function of its own is a new one."""
    return jax.make_jaxpr(lambda leaves, others: f(leaves, others))(leaves, others)


def open_problem(f: Callable, params: PyTree, args: tuple, has_aux: bool) -> tuple[Problem, Traced, bool]:
    """The function ready and traced, and whether in float64; else in the caller's precision, as some need."""
    with precise():
        problem = prepare(f, params, args, has_aux)
        try:
            return problem, trace(problem), True
        except TypeError as error:
            reason = error
    with precise(False):
        problem = prepare(f, params, args, has_aux, dtype=None)
        try:
            traced = trace(problem)
        except TypeError:
            raise reason from None
    narrowest = max(float(jnp.finfo(leaf.dtype).eps) for leaf in problem.leaves)
    words = (
        "float32: in float64 it does not run, perhaps for an array that it closes over (pass that as an argument, "
        f"or make it inside): {str(reason).strip().splitlines()[0][:120]}"
    )
    return problem, traced._replace(casts=(words,), eps=max(narrowest, traced.eps, 2.0**-23)), False


def undecorated(closed) -> Callable:
    """The program as a function of the two lists, with every custom rule forgotten but jax's own."""

    def opened(site, eqn):
        return not (eqn.primitive.name in CUSTOM and defined_in_jax(eqn))

    return lambda leaves, others: evaluate(closed, [*leaves, *others], opened=opened)[0][0]


def without_casts(closed) -> Callable:
    """`undecorated`, with float64 in the place of every narrower floating type: what the program would be without them.

    Its derivative is what rounding to the narrow types has taken from autodiff's, which rounds where the program does.
    """

    def rule(site, eqn, inputs, extras):
        if eqn is None:
            return None
        inputs[:] = [x.astype(jnp.float64) if is_float(x) else x for x in map(jnp.asarray, inputs)]
        name = eqn.primitive.name
        if name in STRUCTURE:
            return None  # entered, with the inputs as they are now
        if name == "reduce_precision":
            return inputs
        narrow = {k: v for k, v in eqn.params.items() if is_floating_dtype(v) and np.dtype(v) != np.float64}
        return bind(eqn.replace(params={**eqn.params, **dict.fromkeys(narrow, np.dtype(np.float64))}), inputs)

    def opened(site, eqn):
        return not (eqn.primitive.name in CUSTOM and defined_in_jax(eqn))

    return lambda leaves, others: evaluate(closed, [*leaves, *others], rule=rule, opened=opened)[0][0]


def name_of(path) -> str:
    """A key path as the report shows it; ``params`` for a tree that is one leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"
