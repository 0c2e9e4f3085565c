"""Optimizers: pure state transitions whose hyperparameters are data.

    opt_state = optimizer.init(params)
    params, opt_state = optimizer.update(grads, opt_state, params)

``opt_state`` is a NamedTuple:

- ``step``: int32, the updates applied so far; it stays at its largest value rather than wrap.
- ``hyper``: the numbers, as arrays of the widest float in force. ``hyper.learning_rate`` is one array, or the dict of
  a `Schedule`'s arrays. Changing one (`set_hyper`) never recompiles; `jax.vmap` over the state sweeps them.
- ``rate``: the learning rate just applied; before the first update, the rate that it would apply.
- then the moments, trees like ``params``; None where an option keeps none.

A ``learning_rate`` is a number, a traced number or a `Schedule`; update t (from 1) uses the schedule's count t − 1.
Each leaf is computed in its own dtype, in float32 at least, and the result is cast back: a parameter never changes its
dtype. Moments are kept in float32 at least unless ``moment_dtype`` says otherwise. Parameters in 16 bits lose the
updates that are smaller than their rounding, whatever the optimizer: 1 + 1e-3 is 1 in bfloat16.

Numbers out of range raise ValueError at construction (host values only: arrays and tracers are not read), a parameter
that is not a float raises TypeError in ``init``, and gradients that do not fit the parameters ValueError in ``update``,
by path. ``update`` takes ``value``, the loss, which these optimizers do not use.

Legend: p parameter, g gradient, m and v moments, t the update from 1; all arithmetic is elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from fnet.schedules import check_numbers
from fnet.types import Optimizer, PyTree, Schedule, named_leaves, wide

# --- stochastic gradient descent -------------------------------------------------------------------------------------


class SgdHyper(NamedTuple):
    """Numbers of `sgd`."""

    learning_rate: Any


class SgdState(NamedTuple):
    """State of `sgd`."""

    step: jax.Array
    hyper: SgdHyper
    rate: jax.Array


def sgd(learning_rate: ArrayLike | Schedule) -> Optimizer:
    """Gradient descent, ``p −= rate · g``.

    >>> optimizer = sgd(0.1)
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> params, opt_state = optimizer.update({"w": jnp.array([5.0, -5.0])}, optimizer.init(params), params)
    >>> print(params["w"], opt_state.step)
    [0.5 2.5] 1
    """
    rate_fn, learning_rate = _split("sgd", learning_rate)

    def init(params):
        return SgdState(*_start("sgd", params, rate_fn, SgdHyper(learning_rate)))

    def update(grads, opt_state, params, *, value=None):
        step, hyper, rate = _advance(opt_state, rate_fn)
        (params,) = _per_leaf(lambda p, g, rate: (p - rate * g,), [rate], params, grads)
        return params, SgdState(step, hyper, rate)

    return Optimizer(init, update)


# --- momentum --------------------------------------------------------------------------------------------------------


class MomentumHyper(NamedTuple):
    """Numbers of `momentum`."""

    learning_rate: Any
    decay: Any


class MomentumState(NamedTuple):
    """State of `momentum`."""

    step: jax.Array
    hyper: MomentumHyper
    rate: jax.Array
    velocity: PyTree


def momentum(
    learning_rate: ArrayLike | Schedule,
    decay: ArrayLike = 0.9,
    nesterov: bool = False,
    *,
    variant: str = "standard",
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """Gradient descent along a decaying sum of gradients, from v = 0; μ is ``decay``, in [0, 1).

    - ``"standard"`` (optax, torch): ``v = μv + g``, ``p −= rate · v``; with ``nesterov``, ``p −= rate · (g + μv)``.
    - ``"keras"``: ``v = μv − rate · g``, ``p += v``; with ``nesterov``, ``p += μv − rate · g``. The same as the
      standard until the rate changes: the old rate then still acts through v.
    - ``"autograd"`` (HIPS): ``v = μv − (1 − μ) g``, ``p += rate · v``: steps 1 − μ as long. It has no Nesterov form.

    torch's ``dampening``, which weighs g by 1 − dampening in every update but the first, is not offered. Sources:
    Polyak (1964); Sutskever et al. (2013) for Nesterov's form.
    """
    rate_fn, learning_rate = _split("momentum", learning_rate)
    check_numbers("momentum", below=1, decay=decay)
    _check_variant("momentum", variant, ("standard", "keras", "autograd"))
    if nesterov and variant == "autograd":
        raise ValueError("momentum: nesterov = True; expected False with variant 'autograd', which has no such form")

    def rule(p, g, v, rate, decay):
        if variant == "keras":
            v = decay * v - rate * g
            return p + (decay * v - rate * g if nesterov else v), v
        if variant == "autograd":
            v = decay * v - (1 - decay) * g
            return p + rate * v, v
        v = decay * v + g
        return p - rate * (g + decay * v if nesterov else v), v

    def init(params):
        start = _start("momentum", params, rate_fn, MomentumHyper(learning_rate, decay))
        return MomentumState(*start, _moment(params, moment_dtype))

    def update(grads, opt_state, params, *, value=None):
        step, hyper, rate = _advance(opt_state, rate_fn)
        params, velocity = _per_leaf(rule, [rate, hyper.decay], params, grads, velocity=opt_state.velocity)
        return params, MomentumState(step, hyper, rate, velocity)

    return Optimizer(init, update)


# --- RMSprop ---------------------------------------------------------------------------------------------------------


class RmspropHyper(NamedTuple):
    """Numbers of `rmsprop`; ``momentum`` is None where there is none."""

    learning_rate: Any
    decay: Any
    eps: Any
    momentum: Any


class RmspropState(NamedTuple):
    """State of `rmsprop`; ``mean`` is kept if centred, ``velocity`` with momentum, None otherwise."""

    step: jax.Array
    hyper: RmspropHyper
    rate: jax.Array
    nu: PyTree
    mean: PyTree
    velocity: PyTree


def rmsprop(
    learning_rate: ArrayLike | Schedule,
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    *,
    centered: bool = False,
    momentum: ArrayLike | None = None,
    eps_in_sqrt: bool = True,
    initial: ArrayLike = 0.0,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """Steps divided by the root of a running mean of squared gradients, from v = ``initial``.

        v = decay · v + (1 − decay) g²          u = rate · g / √(v + eps)          p −= u

    - ``centered``: ḡ = decay · ḡ + (1 − decay) g, and max(v − ḡ², 0) in place of v in u. Rounding can take the
      difference below 0; optax, Keras and torch do not clamp it.
    - ``momentum`` μ: b = μb + u, ``p −= b``.
    - ``eps_in_sqrt=False``: u = rate · g / (√v + eps).

    With ``eps`` 0, a parameter whose gradient was always 0 becomes NaN.

    Elsewhere: optax has these defaults. Keras: ``eps=1e-7``. TF1: ``eps=1e-10, initial=1.0``. torch: ``decay=0.99,
    eps_in_sqrt=False``, and its momentum b = μb + g / (√v + eps), ``p −= rate · b`` differs once the rate changes (TF1,
    Keras and optax have the rate inside, as here). HIPS autograd: ``eps_in_sqrt=False, initial=1.0``. Sources: Tieleman
    and Hinton (2012); Graves (arXiv 1308.0850) for the centred form.
    """
    rate_fn, learning_rate = _split("rmsprop", learning_rate)
    check_numbers("rmsprop", below=1, decay=decay, momentum=0 if momentum is None else momentum)
    check_numbers("rmsprop", eps=eps, initial=initial)

    def rule(p, g, v, mean, velocity, rate, decay, rest, eps, momentum):
        v = spread = decay * v + rest * g * g
        if centered:
            mean = decay * mean + rest * g
            spread = jnp.maximum(v - mean * mean, 0)
        u = rate * g / (jnp.sqrt(spread + eps) if eps_in_sqrt else jnp.sqrt(spread) + eps)
        if momentum is not None:
            u = velocity = momentum * velocity + u
        return p - u, v, mean, velocity

    def init(params):
        start = _start("rmsprop", params, rate_fn, RmspropHyper(learning_rate, decay, eps, momentum))
        mean = _moment(params, moment_dtype) if centered else None
        velocity = _moment(params, moment_dtype) if momentum is not None else None
        return RmspropState(*start, _moment(params, moment_dtype, initial), mean, velocity)

    def update(grads, opt_state, params, *, value=None):
        step, hyper, rate = _advance(opt_state, rate_fn)
        numbers = [rate, hyper.decay, 1 - hyper.decay, hyper.eps, hyper.momentum]
        moments = {"nu": opt_state.nu, "mean": opt_state.mean, "velocity": opt_state.velocity}
        params, nu, mean, velocity = _per_leaf(rule, numbers, params, grads, **moments)
        return params, RmspropState(step, hyper, rate, nu, mean, velocity)

    return Optimizer(init, update)


# --- Adam ------------------------------------------------------------------------------------------------------------


class AdamHyper(NamedTuple):
    """Numbers of `adam`."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    eps_root: Any


class AdamState(NamedTuple):
    """State of `adam`; ``mu`` and ``nu`` are the first and second moment without bias correction."""

    step: jax.Array
    hyper: AdamHyper
    rate: jax.Array
    mu: PyTree
    nu: PyTree


def adam(
    learning_rate: ArrayLike | Schedule = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    eps_root: ArrayLike = 0.0,
    variant: str = "standard",
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """Steps along a running mean of gradients, divided by the root of a running mean of squares (arXiv 1412.6980).

        m = b1 · m + (1 − b1) g                 m̂ = m / (1 − b1ᵗ)
        v = b2 · v + (1 − b2) g²                v̂ = v / (1 − b2ᵗ)          p −= rate · m̂ / (√(v̂ + eps_root) + eps)

    - ``variant="keras"`` (the paper's "epsilon hat"): ``p −= rate · √(1 − b2ᵗ) / (1 − b1ᵗ) · m / (√(v + eps_root) +
      eps)``, which is an ``eps`` of eps / √(1 − b2ᵗ) in the standard form, 31.6 times eps at t = 1. Keras' own is 1e-7.
    - ``eps_root`` (optax) keeps gradients through the update finite where v is 0. With ``eps`` and ``eps_root`` 0, a
      parameter whose gradient was always 0 becomes NaN.

    There is no weight decay here: torch's ``Adam(weight_decay=...)`` adds L2 to the gradient, optax's `adam` has none.
    """
    rate_fn, learning_rate = _split("adam", learning_rate)
    check_numbers("adam", below=1, b1=b1, b2=b2)
    check_numbers("adam", eps=eps, eps_root=eps_root)
    _check_variant("adam", variant, ("standard", "keras"))

    def rule(p, g, m, v, rate, b1, rest1, b2, rest2, eps, eps_root):
        m = b1 * m + rest1 * g
        v = b2 * v + rest2 * g * g
        return p - rate * m / (jnp.sqrt(v + eps_root) + eps), m, v

    def init(params):
        start = _start("adam", params, rate_fn, AdamHyper(learning_rate, b1, b2, eps, eps_root))
        return AdamState(*start, _moment(params, moment_dtype), _moment(params, moment_dtype))

    def update(grads, opt_state, params, *, value=None):
        step, hyper, rate = _advance(opt_state, rate_fn)
        b1, b2, eps, eps_root = hyper.b1, hyper.b2, hyper.eps, hyper.eps_root
        # With c = 1 − b2ᵗ, m̂ / (√(v/c + eps_root) + eps) = √c m̂ / (√(v + c·eps_root) + √c·eps): the corrections act on
        # four scalars, none on an array. Keras' form leaves both epsilons as they are.
        correction1, correction2 = _correction(b1, step), _correction(b2, step)
        scaled_rate = rate * jnp.sqrt(correction2) / correction1
        if variant == "standard":
            eps, eps_root = eps * jnp.sqrt(correction2), eps_root * correction2
        numbers = [scaled_rate, b1, 1 - b1, b2, 1 - b2, eps, eps_root]
        params, mu, nu = _per_leaf(rule, numbers, params, grads, mu=opt_state.mu, nu=opt_state.nu)
        return params, AdamState(step, hyper, rate, mu, nu)

    return Optimizer(init, update)


def _correction(decay, step):
    """``1 − decayᵗ``; as written it cancels in float32: 5e-5 off for decay 0.9999 and t = 2, 4e-8 in this form."""
    return -jnp.expm1(step.astype(decay.dtype) * jnp.log(decay))


# --- changing hyperparameters ----------------------------------------------------------------------------------------


def set_hyper(opt_state, **changes):
    """The state with some of its numbers replaced, in their dtypes and shapes: what is compiled stays compiled.

    A schedule's numbers are given as a dict that may leave some out: ``set_hyper(s, learning_rate={"peak": 0.1})``.
    ``rate`` stays the rate last applied. Raises ValueError for an unknown name, with the list of names, and for an
    optimizer's number out of range; TypeError for a number where a schedule has a dict and the reverse.

    >>> opt_state = set_hyper(adam(1e-3).init({"w": jnp.zeros(2)}), learning_rate=0.5, b1=0.8)
    >>> print(opt_state.hyper.learning_rate, opt_state.hyper.b1)
    0.5 0.8
    """
    hyper = {name: old for name, old in opt_state.hyper._asdict().items() if old is not None}
    for name, new in changes.items():
        _check_name("hyperparameter", name, hyper)
        old = hyper[name]
        if isinstance(old, dict) and isinstance(new, dict):
            for key in new:
                _check_name(f"number of {name}", key, old)
            hyper[name] = old | {key: _like(f"{name}[{key!r}]", old[key], number) for key, number in new.items()}
        elif hasattr(old, "shape") and not isinstance(new, dict):
            if np.shape(new) == ():
                check_numbers("set_hyper", below=1 if name in _BELOW_ONE else math.inf, **{name: new})
            hyper[name] = _like(name, old, new)
        else:
            raise TypeError(f"set_hyper: {name} = {new!r}; expected what stands in the state: {old}")
    return opt_state._replace(hyper=opt_state.hyper._replace(**hyper))


_BELOW_ONE = ("decay", "momentum", "b1", "b2")


def _check_name(kind: str, name: str, known) -> None:
    if name not in known:
        raise ValueError(f"set_hyper: no {kind} is called {name!r}; there are {', '.join(known)}")


def _like(name: str, old, new) -> jax.Array:
    if np.shape(new) not in ((), old.shape):
        raise ValueError(f"set_hyper: {name} has shape {np.shape(new)}; expected one number or shape {old.shape}")
    return jnp.broadcast_to(jnp.array(new, old.dtype), old.shape)


# --- what every optimizer does ---------------------------------------------------------------------------------------


def _split(who: str, learning_rate: ArrayLike | Schedule) -> tuple[Callable, Any]:
    """A number or a schedule as its function ``(hyper, count) -> rate`` and its hyper."""
    if isinstance(learning_rate, Schedule):
        return learning_rate.fn, learning_rate.hyper
    if callable(learning_rate):
        raise TypeError(f"{who}: learning_rate is a function; expected a number or a Schedule(fn, hyper)")
    check_numbers(who, learning_rate=learning_rate)
    return (lambda rate, count: rate), learning_rate


def _check_variant(who, variant, names):
    if variant not in names:
        raise ValueError(f"{who}: variant = {variant!r}; expected one of {', '.join(names)}")


def _start(who: str, params: PyTree, rate_fn: Callable, hyper):
    """Step 0, the numbers as arrays that nobody else holds (a state may be donated), and the first rate."""
    for path, leaf in named_leaves(params):
        if not _is_float(leaf):
            raise TypeError(
                f"{who}: parameter {path or '()'} has dtype {_dtype(leaf)}; expected a float. "
                "What is not trained belongs in the model's state"
            )
    hyper = jax.tree.map(lambda number: jnp.array(number, float), hyper)
    step = jnp.asarray(0, jnp.int32)
    return step, hyper, _rate(rate_fn, hyper, step)


def _advance(opt_state, rate_fn: Callable):
    """The next step, the numbers and the rate of the update that leads to it."""
    step = jnp.minimum(opt_state.step, jnp.iinfo(jnp.int32).max - 1) + 1
    return step, opt_state.hyper, _rate(rate_fn, opt_state.hyper, opt_state.step).astype(opt_state.rate.dtype)


def _rate(rate_fn: Callable, hyper, count):
    rate = jnp.array(rate_fn(hyper.learning_rate, count), float)
    if rate.shape != ():
        raise ValueError(f"the schedule gave a rate of shape {rate.shape}; expected one number")
    return rate


def _moment(params: PyTree, dtype: DTypeLike | None, fill: ArrayLike = 0.0):
    """A tree like ``params`` that is ``fill`` everywhere."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"moment_dtype = {dtype}; expected a float dtype")
    return jax.tree.map(lambda p: jnp.full_like(p, fill, wide(jnp.result_type(p)) if dtype is None else dtype), params)


def _per_leaf(rule: Callable, numbers: Sequence[Any], params: PyTree, grads: PyTree, **moments: PyTree):
    """``rule(p, g, *moments, *numbers) -> p, *moments`` at each leaf, computed wide; all keep their own dtypes."""
    _check_like(params, "gradient", grads)
    for name, moment in moments.items():
        if moment is not None:
            _check_like(params, name, moment)

    def one(p, g, *kept):
        old = (jnp.asarray(p), *kept)
        dtype = wide(*(x.dtype for x in old if x is not None))
        new = rule(*jax.tree.map(lambda x: jnp.asarray(x, dtype), (p, g, *kept, *numbers)))
        return jax.tree.map(lambda x, like: x.astype(like.dtype), new, old)

    leaves, structure = jax.tree.flatten(params)
    trees = (grads, *moments.values())
    rows = list(map(one, leaves, *([None] * len(leaves) if tree is None else jax.tree.leaves(tree) for tree in trees)))
    columns = zip(*rows, strict=True) if rows else [()] * len(trees)
    updated = zip((params, *moments.values()), columns, strict=True)
    return tuple(None if old is None else structure.unflatten(column) for old, column in updated)


def _dtype(leaf):
    return getattr(leaf, "dtype", type(leaf))


def _is_float(leaf) -> bool:
    return jnp.issubdtype(_dtype(leaf), jnp.floating)


def _check_like(params: PyTree, name: str, tree: PyTree) -> None:
    """Require a tree of floats with the paths and shapes of ``params``."""
    expected, given = ({path or "()": leaf for path, leaf in named_leaves(t)} for t in (params, tree))
    missing = [path for path in expected if path not in given]
    unexpected = [path for path in given if path not in expected]
    if missing or unexpected:
        missing, unexpected = (", ".join(paths) or "nothing" for paths in (missing, unexpected))
        raise ValueError(f"{name} does not fit the parameters: missing {missing}; unexpected {unexpected}")
    structure, wanted = jax.tree.structure(tree), jax.tree.structure(params)
    if structure != wanted:
        raise ValueError(f"{name} is a tree {structure}; expected the parameters' {wanted}")
    for path, leaf in given.items():
        if np.shape(leaf) != np.shape(expected[path]):
            raise ValueError(f"{path}: {name} has shape {np.shape(leaf)}, parameter {np.shape(expected[path])}")
        if not _is_float(leaf):
            raise ValueError(f"{path}: {name} has dtype {_dtype(leaf)}; expected a float")
