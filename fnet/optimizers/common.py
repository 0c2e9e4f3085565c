"""What every optimizer does: its state's first fields, a rule at each leaf, decoupled decay, and changing numbers.

Legend: p parameter, g gradient, m and v moments, t the update from 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from fnet.core.checks import require_state
from fnet.core.numerics import is_floating_dtype, wide
from fnet.core.trees import by_path, named_leaves, on_each_copy, stacked_axes, without_copies
from fnet.optimizers.rounding import NARROW, is_narrow, rounded, spread
from fnet.optimizers.schedules import check_numbers
from fnet.optimizers.which import Mask, check_mask, decaying
from fnet.types import Optimizer, PyTree, Schedule


def elementwise(
    name: str,
    state: type,
    hyper: Any,
    rule: Callable,
    numbers: Callable,
    moments: Mapping[str, ArrayLike | None],
    *,
    scalars: Mapping[str, Callable] = {},
    narrow: Sequence[str] = (),
    moment_dtype: DTypeLike | None = None,
    mask: Mask = None,
    independent: bool = False,
    inside: bool = False,
    whole: bool = False,
    check: Callable[[PyTree], None] = lambda params: None,
) -> Optimizer:
    """The optimizer that computes ``rule(p, g, *moments, *numbers(hyper, rate, t)) -> p, *moments`` at each leaf.

    ``state`` is its NamedTuple ``(step, hyper, rate, *moments, *scalars)``, ``hyper`` the NamedTuple of its numbers, of
    which ``learning_rate`` and ``weight_decay`` may be Schedules. ``moments`` are the values that they start from, None
    for one that is not kept; those that are ``narrow`` may have a ``moment_dtype`` of 16 bits. ``scalars`` start from 1
    and become ``function(hyper, t, scalar)``; ``numbers`` takes them too. Where ``hyper`` has a ``weight_decay`` λ that
    is not None, ``rate · λ · p`` is taken off as well (λ · p if ``independent``) at the leaves of the ``mask``; p is
    the parameter before the update. With ``inside`` the rule takes λ, or 0 at other leaves, as its last number instead.
    A rule that looks at a ``whole`` tensor is given each copy of stacked ones (`fnet.layers.Copies`). ``check`` is a
    further check of the parameters.
    """
    rate_fn, learning_rate = split(name, learning_rate=hyper.learning_rate)
    hyper, decay_fn = hyper._replace(learning_rate=learning_rate), None
    check_mask(name, mask, getattr(hyper, "weight_decay", None))
    dtypes = _moment_dtypes(
        name, moment_dtype, [moment for moment, fill in moments.items() if fill is not None], narrow
    )
    if getattr(hyper, "weight_decay", None) is not None:
        decay_fn, weight_decay = split(name, weight_decay=hyper.weight_decay)
        hyper = hyper._replace(weight_decay=weight_decay)

    def init(params):
        check(params)
        decaying(name, mask, params)
        kept = (None if fill is None else moment(params, dtypes[m], fill) for m, fill in moments.items())
        ones = (jnp.ones((), float) for _ in scalars)
        return state(*start(name, params, rate_fn, hyper), *kept, *ones)

    def update(grads, opt_state, params, *, value=None):
        require_state(name, opt_state, state)
        step, hyper, rate = advance(opt_state, rate_fn)
        shrink = None
        if decay_fn is not None:
            shrink = number(decay_fn, hyper.weight_decay, opt_state.step)
            shrink = shrink if independent or inside else rate * shrink
        new = [change(hyper, step, getattr(opt_state, scalar)) for scalar, change in scalars.items()]
        kept = {moment: getattr(opt_state, moment) for moment in moments}
        decays, given = decaying(name, mask, params), numbers(hyper, rate, step, *new)
        how = {"step": step, "shrink": shrink, "decays": decays, "inside": inside, "whole": whole}
        params, *kept = per_leaf(rule, given, params, grads, **how, **kept)
        return params, state(step, hyper, rate, *kept, *new)

    return Optimizer(init, update, lambda params: about(name, hyper, params, mask, independent))


def split(who: str, **named: Any) -> tuple[Callable, Any]:
    """A number or a schedule as its function ``(hyper, count) -> value`` and its hyper."""
    ((name, given),) = named.items()
    if isinstance(given, Schedule):
        return given.fn, given.hyper
    if callable(given):
        raise TypeError(f"{who}: {name} is a function; expected a number or a Schedule(fn, hyper)")
    check_numbers(who, **named)
    return (lambda number, count: number), given


def check_variant(who: str, variant: str, names: Sequence[str], argument: str = "variant") -> None:
    """Require one of the names."""
    if variant not in names:
        raise ValueError(f"{who}: {argument} = {variant!r}; expected one of {', '.join(names)}")


def _moment_dtypes(who: str, dtype: DTypeLike | None, moments: Sequence[str], narrow: Sequence[str]) -> dict[str, Any]:
    """The dtype of each moment, None for the parameter's own or float32 if that is narrower.

    Sums and running means of squares, with decays near 1, would stand still in 16 bits: what is added is small beside
    them, and in float16 it is 0. So only first moments may have them.
    """
    known = [np.dtype(known) for known in (*NARROW, np.float32, np.float64)]
    if dtype is not None and (not is_floating_dtype(dtype) or np.dtype(dtype) not in known):
        raise TypeError(f"{who}: moment_dtype = {dtype!r}; expected a float dtype: one of {', '.join(map(str, known))}")
    if dtype is None or not is_narrow(dtype):
        return dict.fromkeys(moments, dtype)
    found = {moment: dtype if moment in narrow else None for moment in moments}
    if dtype not in found.values():
        raise ValueError(
            f"{who}: moment_dtype = {np.dtype(dtype)}, but it keeps {' and '.join(moments)} alone, which lose small "
            "updates in 16 bits; expected float32 or float64"
        )
    return found


def check_between(who: str, least: float, most: float, *, whole: bool = False, **values) -> None:
    """`check_numbers` with ``least <= value <= most``, and ``whole`` numbers only."""
    check_numbers(who, **values)
    for name, value in values.items():
        on_host = not isinstance(value, jax.Array)
        if on_host and not (least <= value <= most and (not whole or value == int(value))):
            kind = "a whole number, " if whole else ""
            raise ValueError(f"{who}: {name} = {value}; expected {kind}{least} <= {name} <= {most}")


# a count is a number like the others, kept in float32: above 2²⁴ it would be rounded
check_counts = partial(check_between, least=1, most=2**24, whole=True)


def start(who: str, params: PyTree, rate_fn: Callable, hyper):
    """Step 0, the numbers as arrays that nobody else holds (a state may be donated), and the first rate."""
    check_floats(who, params)
    hyper, step = as_arrays(hyper), jnp.asarray(0, jnp.int32)
    return step, hyper, number(rate_fn, hyper.learning_rate, step)


def as_arrays(hyper) -> Any:
    """A tree of numbers as arrays of the widest float in force."""
    return jax.tree.map(lambda number: jnp.array(number, float), hyper)


def check_floats(who: str, params: PyTree) -> None:
    """Require that every parameter is a float."""
    for path, leaf in by_path(params).items():
        if not _is_float(leaf):
            raise TypeError(
                f"{who}: parameter {path or '()'} has dtype {_dtype(leaf)}; expected a float. "
                "What is not trained belongs in the model's state"
            )


def count_on(step):
    """The next int32 step; it stays at its largest value rather than wrap."""
    return jnp.minimum(step, jnp.iinfo(jnp.int32).max - 1) + 1


def advance(opt_state, rate_fn: Callable):
    """The next step, the numbers and the rate of the update that leads to it."""
    rate = number(rate_fn, opt_state.hyper.learning_rate, opt_state.step)
    return count_on(opt_state.step), opt_state.hyper, rate.astype(opt_state.rate.dtype)


def number(fn: Callable, hyper, count) -> jax.Array:
    """What a schedule's function gives at this count."""
    value = jnp.array(fn(hyper, count), float)
    if value.shape != ():
        raise ValueError(f"the schedule gave a rate of shape {value.shape}; expected one number")
    return value


def correction(decay, step):
    """``1 − decayᵗ``; as written it cancels in float32: 5e-5 off for decay 0.9999 and t = 2, 4e-8 by the logarithm."""
    t = step.astype(decay.dtype)
    by_logarithm = -jnp.expm1(t * jnp.log(jnp.maximum(decay, 0.5)))
    return jnp.where(decay < 0.5, 1 - decay**t, by_logarithm)  # whose derivative at 0 is not finite


def moment(params: PyTree, dtype: DTypeLike | None = None, fill: ArrayLike = 0.0):
    """A tree like ``params`` that is ``fill`` everywhere."""
    return jax.tree.map(lambda p: jnp.full_like(p, fill, wide(jnp.result_type(p)) if dtype is None else dtype), params)


def least(dtype) -> jax.Array:
    """The smallest number that has all its digits, 1e-38 in float32: what is above 1e-31 it does not change."""
    return jnp.asarray(jnp.finfo(dtype).tiny, dtype)


def root(x: jax.Array) -> jax.Array:
    """``√x`` with a finite derivative at 0, so that a run can be differentiated where a gradient was always 0."""
    return jnp.sqrt(x + least(x.dtype))


def norm(x: jax.Array) -> jax.Array:
    """``√Σ x²``, 0 with derivative 0 where all is 0."""
    return _root_of_sum(jnp.square(x).sum())


def _root_of_sum(squares: jax.Array) -> jax.Array:
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def global_norm(tree: PyTree, axes: Sequence[int] | None = None) -> jax.Array:
    """``√Σ x²`` over all leaves, in float32 at least; of one leaf it may be over some ``axes``, which are kept.

    Where the squares overflow, beyond 1e19 in float32, they are taken anew of numbers that are divided by the largest.
    """
    leaves = list(map(jnp.asarray, jax.tree.leaves(tree)))
    dtype = wide(*(leaf.dtype for leaf in leaves))
    arrays = [leaf.astype(dtype) for leaf in leaves] or [jnp.zeros((), dtype)]
    keep, add_up = axes is not None, partial(functools.reduce, jnp.add)

    def anew():
        most = functools.reduce(jnp.maximum, [jnp.abs(a).max(axes, keepdims=keep, initial=0) for a in arrays])
        # a number whose reciprocal has all its digits, by which XLA may multiply instead
        by = jnp.minimum(jnp.where(jnp.isfinite(most) & (most > 0), most, 1), jnp.finfo(dtype).max / 64)
        found = by * _root_of_sum(add_up(jnp.square(a / by).sum(axes, keepdims=keep) for a in arrays))
        return jnp.where(jnp.isfinite(most), found, most)

    squares = add_up(jnp.square(a).sum(axes, keepdims=keep) for a in arrays)
    return jax.lax.cond(jnp.isfinite(squares).all(), lambda: _root_of_sum(squares), anew)


def per_leaf(
    rule: Callable,
    numbers: Sequence[Any],
    params: PyTree,
    grads: PyTree,
    *,
    step: jax.Array,
    shrink=None,
    decays: Sequence[bool] = (),
    inside: bool = False,
    whole: bool = False,
    **moments: PyTree,
):
    """``rule(p, g, *moments, *numbers) -> p, *moments`` at each leaf, computed wide; all keep their own dtypes.

    Moments in 16 bits are rounded by chance (``fnet.optimizers.rounding``), another one for each ``step``. Where
    ``shrink`` is given, ``shrink · p`` is taken off too at the leaves that ``decays`` marks, or the rule's last number
    is ``shrink`` there and 0 elsewhere (``inside``). A rule of ``whole`` tensors is applied to each copy.
    """
    check_like(params, "gradient", grads)
    for name, tree in moments.items():
        if tree is not None:
            check_like(params, name, tree)
    decays = decays or [False] * len(jax.tree.leaves(params))

    def one(i, decays, copies, p, g, *kept):
        old = (jnp.asarray(p), *kept)
        dtype = wide(*(x.dtype for x in old if x is not None))
        arrays: list[Any] = [None if x is None else jnp.asarray(x, dtype) for x in (p, g, *kept)]
        given = [None if x is None else jnp.asarray(x, dtype) for x in numbers]
        taken = jnp.asarray(0 if shrink is None or not decays else shrink, dtype)
        given += [taken] if inside else []
        apply = on_each_copy(lambda *arrays: rule(*arrays, *given), copies if whole else 0)
        new_p, *new = apply(*arrays)
        if shrink is not None and decays and not inside:
            new_p = new_p - taken * arrays[0]
        kept = [
            None if like is None else stored(x, like.dtype, step, (i << 3) + k)
            for k, (x, like) in enumerate(zip(new, kept, strict=True))
        ]
        return new_p.astype(old[0].dtype), *kept

    leaves, structure = jax.tree.flatten(params)
    trees = (grads, *moments.values())
    columns = ([None] * len(leaves) if tree is None else jax.tree.leaves(tree) for tree in trees)
    rows = list(map(one, range(len(leaves)), decays, stacked_axes(params), leaves, *columns))
    columns = zip(*rows, strict=True) if rows else [()] * len(trees)
    updated = zip((params, *moments.values()), columns, strict=True)
    return tuple(None if old is None else structure.unflatten(column) for old, column in updated)


def stored(moment: jax.Array, dtype, step: jax.Array, which: int) -> jax.Array:
    """A moment in its dtype; in 16 bits rounded by chance, by another one for each update and moment of a leaf."""
    if not is_narrow(dtype):
        return moment.astype(dtype)
    return rounded(moment, dtype, spread(step.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.uint32(which)))


def _dtype(leaf):
    return getattr(leaf, "dtype", type(leaf))


def _is_float(leaf) -> bool:
    return jnp.issubdtype(_dtype(leaf), jnp.floating)


def check_like(params: PyTree, name: str, tree: PyTree) -> None:
    """Require a tree of floats with the paths and shapes of ``params``."""
    if params is None and jax.tree.leaves(tree):
        raise ValueError("params is None; expected the parameters: update(grads, opt_state, params)")
    expected, given = ({path or "()": leaf for path, leaf in by_path(t).items()} for t in (params, tree))
    missing = [path for path in expected if path not in given]
    unexpected = [path for path in given if path not in expected]
    if missing or unexpected:
        missing, unexpected = (", ".join(paths) or "nothing" for paths in (missing, unexpected))
        raise ValueError(f"{name} does not fit the parameters: missing {missing}; unexpected {unexpected}")
    structure, wanted = (jax.tree.structure(without_copies(t)) for t in (tree, params))
    if structure != wanted:
        raise ValueError(f"{name} is a tree {structure}; expected the parameters' {wanted}")
    for path, leaf in given.items():
        if np.shape(leaf) != np.shape(expected[path]):
            raise ValueError(f"{path}: {name} has shape {np.shape(leaf)}, parameter {np.shape(expected[path])}")
        if not _is_float(leaf):
            raise ValueError(f"{path}: {name} has dtype {_dtype(leaf)}; expected a float")


# --- what is said of them ---------------------------------------------------------------------------------------------


def shown_numbers(hyper) -> dict[str, str]:
    """Numbers by name, as `fnet.optimizers.describe` shows them."""

    def shown(number):
        if isinstance(number, tuple | list):
            number = dict(enumerate(number))
        if isinstance(number, dict):
            return "(" + ", ".join(f"{key} {shown(value)}" for key, value in number.items()) + ")"
        if np.shape(number):
            return f"{np.size(number)} numbers"
        return "traced" if isinstance(number, Tracer) else f"{float(number):.4g}"

    return {key: shown(value) for key, value in hyper._asdict().items() if value is not None}


def about(name: str, hyper, params: PyTree, mask: Mask = None, independent: bool = False) -> dict[str, str]:
    """For each path the optimizer's name and numbers, as `fnet.optimizers.describe` shows them."""
    numbers = shown_numbers(hyper)
    decay = numbers.pop("weight_decay", None)
    line = " ".join([name, *(f"{key}={value}" for key, value in numbers.items())])
    decayed = "" if decay is None else f" weight_decay={decay}" + (" (independent of the rate)" if independent else "")
    undecayed = "" if decay is None else " no decay"
    marks = decaying(name, mask, params)
    return {
        path: line + (decayed if on else undecayed) for (path, _), on in zip(named_leaves(params), marks, strict=True)
    }


# --- changing hyperparameters ----------------------------------------------------------------------------------------


# what else than 0 <= value < inf, which check_numbers requires, is asked of a number; of one class alone, by its name

# of the numbers of fnet's schedules; those of others may have any sign
