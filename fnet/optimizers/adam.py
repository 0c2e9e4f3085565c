"""Adam and its kin: a running mean of gradients over the root of a running mean of their squares.

    m = b1 · m + (1 − b1) g                 m̂ = m / (1 − b1ᵗ)
    v = b2 · v + (1 − b2) g²                v̂ = v / (1 − b2ᵗ)

Legend: p parameter, g gradient, m and v moments, m̂ and v̂ without their bias, t the update from 1, λ weight decay.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from fnet.optimizers.common import check_between, check_variant, correction, elementwise, least, root
from fnet.optimizers.schedules import check_numbers
from fnet.optimizers.which import Mask
from fnet.types import Optimizer, PyTree, Schedule


class AdamHyper(NamedTuple):
    """Numbers of `adam`, `adamw` and `amsgrad`."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    eps_root: Any
    weight_decay: Any = None


class AdamState(NamedTuple):
    """State of `adam` and `adamw`; ``mu`` and ``nu`` are the first and second moment without bias correction."""

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
    """Steps along a running mean of gradients, divided by the root of a running mean of squares (arXiv:1412.6980).

        p −= rate · m̂ / (√(v̂ + eps_root) + eps)

    Elsewhere ``learning_rate, b1, b2, eps`` are called ``lr, betas, eps`` (torch) and ``learning_rate, beta_1, beta_2,
    epsilon`` (Keras).

    - ``variant="keras"`` (the paper's "epsilon hat"): ``p −= rate · √(1 − b2ᵗ) / (1 − b1ᵗ) · m / (√(v + eps_root) +
      eps)``, which is an ``eps`` of eps / √(1 − b2ᵗ) in the standard form, 31.6 times eps at t = 1. Keras' own is 1e-7.
    - ``eps_root`` (optax) is added under the root. It is not needed for derivatives of a whole run, which are finite
      without: under the root stands 1e-38 besides, which no other number notices. So a parameter whose gradient was
      always 0 stays as it is even with an ``eps`` of 0.

    ``moment_dtype`` of 16 bits holds for m alone, which is then rounded by chance (``fnet.optimizers.rounding``); v,
    whose updates are a thousandth of it, stays in float32 at least. In optax (``mu_dtype``) m is rounded to the
    nearest.

    There is no weight decay here: torch's ``Adam(weight_decay=...)`` adds L2 to the gradient
    (`fnet.transforms.l2_decay` in a `chain`), optax's `adam` has none; decoupled decay is `adamw`.
    """
    hyper = AdamHyper(learning_rate, b1, b2, eps, eps_root)
    return _adam("adam", hyper, variant, moment_dtype=moment_dtype)


def adamw(
    learning_rate: ArrayLike | Schedule = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: ArrayLike | Schedule = 0.01,
    mask: Mask = None,
    independent: bool = False,
    eps_root: ArrayLike = 0.0,
    variant: str = "standard",
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """`adam` with decoupled weight decay: ``p −= rate · (m̂ / (√(v̂ + eps_root) + eps) + λ p)``.

    λ is ``weight_decay``, at the leaves of the ``mask`` (None: all; path patterns such as ``"*/w"``; a tree of True and
    False like the parameters, as in optax; or a function ``(path, leaf) -> bool``). As torch and optax the rate
    multiplies λ; with ``independent`` it does not, ``p −= λ p``, which is the paper's form: there one schedule
    multiplies two constants, here ``learning_rate`` and ``weight_decay`` are schedules of their own. λ is 0.01 in
    torch, 1e-4 in optax, 0.004 in Keras. Source: Loshchilov and Hutter, arXiv:1711.05101.

    >>> optimizer = adamw(0.1, weight_decay=0.5, mask="*w")
    >>> params = {"b": jnp.ones(1), "w": jnp.ones(1)}
    >>> params, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    >>> print(params["b"], params["w"])
    [1.] [0.95]
    """
    hyper = AdamHyper(learning_rate, b1, b2, eps, eps_root, weight_decay)
    return _adam("adamw", hyper, variant, moment_dtype=moment_dtype, mask=mask, independent=independent)


def _adam(name: str, hyper: AdamHyper, variant: str, **options) -> Optimizer:
    _check(name, hyper)
    check_variant(name, variant, ("standard", "keras"))

    def numbers(hyper, rate, t):
        # With c = 1 − b2ᵗ, m̂ / (√(v/c + eps_root) + eps) = √c m̂ / (√(v + c·eps_root) + √c·eps): the corrections act on
        # four scalars, none on an array. Keras' form leaves both epsilons as they are.
        b1, b2, eps, eps_root = hyper.b1, hyper.b2, hyper.eps, hyper.eps_root
        correction2 = correction(b2, t)
        scaled_rate = rate * jnp.sqrt(correction2) / correction(b1, t)
        if variant == "standard":
            eps, eps_root = eps * jnp.sqrt(correction2), eps_root * correction2
        return scaled_rate, b1, 1 - b1, b2, 1 - b2, eps, eps_root + least(rate.dtype)  # as in `root`

    def rule(p, g, m, v, rate, b1, rest1, b2, rest2, eps, eps_root):
        m = b1 * m + rest1 * g
        v = b2 * v + rest2 * g * g
        return p - rate * m / (jnp.sqrt(v + eps_root) + eps), m, v

    return elementwise(name, AdamState, hyper, rule, numbers, {"mu": 0.0, "nu": 0.0}, narrow=("mu",), **options)


def _check(name: str, hyper) -> None:
    check_numbers(name, below=1, b1=hyper.b1, b2=hyper.b2)
    check_numbers(name, eps=hyper.eps, eps_root=getattr(hyper, "eps_root", 0))


# --- AMSGrad ---------------------------------------------------------------------------------------------------------


class AmsgradState(NamedTuple):
    """State of `amsgrad`; ``most`` is the largest second moment so far."""

    step: jax.Array
    hyper: AdamHyper
    rate: jax.Array
    mu: PyTree
    nu: PyTree
    most: PyTree


def amsgrad(
    learning_rate: ArrayLike | Schedule = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    eps_root: ArrayLike = 0.0,
    variant: str = "standard",
    weight_decay: ArrayLike | Schedule | None = None,
    mask: Mask = None,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """`adam` whose denominators never shrink: the largest second moment so far in the place of the last.

    - ``"standard"`` (torch): ``V = max(V, v)``, and ``V / (1 − b2ᵗ)`` in the place of v̂;
    - ``"corrected"`` (optax): ``V = max(V, v̂)`` in the place of v̂;
    - ``"keras"``: as torch, in Keras' form of `adam`;
    - ``"paper"``: ``p −= rate · m / (√(V + eps_root) + eps)`` with ``V = max(V, v)`` and no bias correction at all.

    ``weight_decay`` and ``mask`` as in `adamw`. Source: Reddi, Kale and Kumar, arXiv:1904.09237.
    """
    hyper = AdamHyper(learning_rate, b1, b2, eps, eps_root, weight_decay)
    _check("amsgrad", hyper)
    check_variant("amsgrad", variant, ("standard", "corrected", "keras", "paper"))

    def numbers(hyper, rate, t):
        # as in adam; "corrected" divides v by c2 before the maximum, the others divide V by it afterwards, in scalars
        eps, eps_root, c2 = hyper.eps, hyper.eps_root, correction(hyper.b2, t)
        scaled = rate if variant == "paper" else rate / correction(hyper.b1, t)
        if variant in ("standard", "keras"):
            scaled = scaled * jnp.sqrt(c2)
        if variant == "standard":
            eps, eps_root = eps * jnp.sqrt(c2), eps_root * c2
        by_moment = 1 / c2 if variant == "corrected" else jnp.ones_like(c2)
        eps_root = eps_root + least(rate.dtype)  # as in `root`
        return scaled, hyper.b1, 1 - hyper.b1, hyper.b2, 1 - hyper.b2, eps, eps_root, by_moment

    def rule(p, g, m, v, most, rate, b1, rest1, b2, rest2, eps, eps_root, by_moment):
        m = b1 * m + rest1 * g
        v = b2 * v + rest2 * g * g
        most = jnp.maximum(most, v * by_moment)
        return p - rate * m / (jnp.sqrt(most + eps_root) + eps), m, v, most

    moments = {"mu": 0.0, "nu": 0.0, "most": 0.0}
    options = {"narrow": ("mu",), "moment_dtype": moment_dtype, "mask": mask}
    return elementwise("amsgrad", AmsgradState, hyper, rule, numbers, moments, **options)


# --- Adamax ----------------------------------------------------------------------------------------------------------


class AdamaxHyper(NamedTuple):
    """Numbers of `adamax`."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any = None


class AdamaxState(NamedTuple):
    """State of `adamax`; ``largest`` is the decaying maximum of the gradients' sizes."""

    step: jax.Array
    hyper: AdamaxHyper
    rate: jax.Array
    mu: PyTree
    largest: PyTree


def adamax(
    learning_rate: ArrayLike | Schedule = 2e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    variant: str = "standard",
    weight_decay: ArrayLike | Schedule | None = None,
    mask: Mask = None,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """`adam` with a decaying maximum in the place of the root mean square (arXiv:1412.6980, algorithm 2).

        u = max(b2 · u, |g| + eps)          p −= rate · m̂ / u

    ``"standard"`` is torch's and optax's; the paper has no eps and divides by 0 where no gradient came yet: here such
    a parameter stays as it is.
    ``variant="keras"``: ``u = max(b2 · u, |g|)``, ``p −= rate · m̂ / (u + eps)``, eps 1e-7 and rate 1e-3.
    ``weight_decay`` and ``mask`` as in `adamw`.
    """
    hyper = AdamaxHyper(learning_rate, b1, b2, eps, weight_decay)
    _check("adamax", hyper)
    check_variant("adamax", variant, ("standard", "keras"))

    def rule(p, g, m, u, rate, b1, b2, eps):
        m = b1 * m + (1 - b1) * g
        inner, outer = (0, eps) if variant == "keras" else (eps, 0)
        u = jnp.maximum(b2 * u, jnp.abs(g) + inner)
        return p - rate * m / (u + outer + least(u.dtype)), m, u

    def numbers(hyper, rate, t):
        return rate / correction(hyper.b1, t), hyper.b1, hyper.b2, hyper.eps

    moments = {"mu": 0.0, "largest": 0.0}
    options = {"narrow": ("mu",), "moment_dtype": moment_dtype, "mask": mask}
    return elementwise("adamax", AdamaxState, hyper, rule, numbers, moments, **options)


# --- Nadam -----------------------------------------------------------------------------------------------------------


class NadamHyper(NamedTuple):
    """Numbers of `nadam`; ``momentum_decay`` is None for a constant momentum."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    momentum_decay: Any
    weight_decay: Any = None


class NadamState(NamedTuple):
    """State of `nadam`; ``product`` is that of the momenta μ so far."""

    step: jax.Array
    hyper: NadamHyper
    rate: jax.Array
    mu: PyTree
    nu: PyTree
    product: jax.Array


def nadam(
    learning_rate: ArrayLike | Schedule = 2e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    momentum_decay: ArrayLike | None = 0.004,
    weight_decay: ArrayLike | Schedule | None = None,
    mask: Mask = None,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """`adam` with Nesterov's momentum: the mean that the next update will use, and the gradient itself.

        μ_t = b1 · (1 − ½ · 0.96^(t ψ))         Π_t = μ_1 ⋯ μ_t
        p −= rate · (μ_(t+1) m / (1 − Π_(t+1)) + (1 − μ_t) g / (1 − Π_t)) / (√v̂ + eps)

    ψ is ``momentum_decay``; form and defaults are those of Dozat's paper, torch and Keras (whose rate is
    1e-3). With None μ is b1 throughout, so that Π_t is b1ᵗ: optax's `nadam`. ``weight_decay``, ``mask`` as in `adamw`.
    Source: Dozat, "Incorporating Nesterov momentum into Adam", 2016.
    """
    hyper = NadamHyper(learning_rate, b1, b2, eps, momentum_decay, weight_decay)
    _check("nadam", hyper)
    if momentum_decay is not None:
        check_numbers("nadam", momentum_decay=momentum_decay)

    def momentum(hyper, t):
        if hyper.momentum_decay is None:
            return hyper.b1
        return hyper.b1 * (1 - 0.5 * 0.96 ** (t * hyper.momentum_decay))

    def numbers(hyper, rate, t, product):
        t = t.astype(rate.dtype)  # whose t + 1 does not wrap
        now, following = momentum(hyper, t), momentum(hyper, t + 1)
        root = jnp.sqrt(correction(hyper.b2, t))  # on the scalars, as in adam
        by_g = (1 - now) / (1 - product)
        share = following / (1 - product * following) / by_g  # of m beside g: one product an entry, rounded in one way
        return rate * root * by_g, share, hyper.b1, 1 - hyper.b1, hyper.b2, 1 - hyper.b2, hyper.eps * root

    def rule(p, g, m, v, by_g, share, b1, rest1, b2, rest2, eps):
        m = b1 * m + rest1 * g
        v = b2 * v + rest2 * g * g
        return p - by_g * (g + share * m) / (root(v) + eps), m, v

    return elementwise(
        "nadam",
        NadamState,
        hyper,
        rule,
        numbers,
        {"mu": 0.0, "nu": 0.0},
        narrow=("mu",),
        scalars={"product": lambda hyper, t, product: product * momentum(hyper, t.astype(product.dtype))},
        moment_dtype=moment_dtype,
        mask=mask,
    )


# --- RAdam -----------------------------------------------------------------------------------------------------------


class RadamHyper(NamedTuple):
    """Numbers of `radam`."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    threshold: Any
    weight_decay: Any = None


class RadamState(NamedTuple):
    """State of `radam`."""

    step: jax.Array
    hyper: RadamHyper
    rate: jax.Array
    mu: PyTree
    nu: PyTree


def radam(
    learning_rate: ArrayLike | Schedule = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    threshold: ArrayLike = 5.0,
    variant: str = "standard",
    weight_decay: ArrayLike | Schedule | None = None,
    mask: Mask = None,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """`adam` that waits with its denominator until enough gradients have been averaged.

        ρ∞ = 2 / (1 − b2) − 1           ρ = ρ∞ − 2 t b2ᵗ / (1 − b2ᵗ)
        p −= rate · r · m̂ / (√v̂ + eps)          where ρ > ``threshold``,  r² = (ρ−4)(ρ−2) ρ∞ / ((ρ∞−4)(ρ∞−2) ρ)
        p −= rate · m̂                           elsewhere

    ``"standard"`` is optax's (save that its threshold is met by equality too). ``variant="torch"`` has eps in Keras'
    place: ``√(1 − b2ᵗ) / (√v + eps)``. The paper's threshold is 4; less is an error, since r² would be negative.
    ``weight_decay`` and ``mask`` as in `adamw`. Source: Liu et al., arXiv:1908.03265.
    """
    hyper = RadamHyper(learning_rate, b1, b2, eps, threshold, weight_decay)
    _check("radam", hyper)
    check_between("radam", 4, math.inf, threshold=threshold)
    check_variant("radam", variant, ("standard", "torch"))

    def numbers(hyper, rate, t):
        b2, c2 = hyper.b2, correction(hyper.b2, t)
        limit, count = 2 / (1 - b2) - 1, t.astype(b2.dtype)
        length = limit - 2 * count * jnp.exp(count * jnp.log(b2)) / c2
        enough = length > hyper.threshold
        safe = jnp.where(enough, length, 5)  # no root of a negative number in the branch that is not taken
        squared = (safe - 4) * (safe - 2) * limit / ((limit - 4) * (limit - 2) * safe)
        rate = rate / correction(hyper.b1, t)
        rate = jnp.where(enough, rate * jnp.sqrt(jnp.where(enough, squared, 1)) * jnp.sqrt(c2), rate)
        eps = hyper.eps * jnp.sqrt(c2) if variant == "standard" else hyper.eps
        return enough, rate, jnp.where(enough, eps, 1), hyper.b1, 1 - hyper.b1, b2, 1 - b2

    def rule(p, g, m, v, enough, rate, eps, b1, rest1, b2, rest2):
        m = b1 * m + rest1 * g
        v = b2 * v + rest2 * g * g
        # no select here: XLA rounds around one in a scan otherwise than in a loop
        finite = jnp.minimum(v, jnp.finfo(v.dtype).max)  # 0 · ∞ is no number
        return p - rate * m / (enough * root(finite) + eps), m, v

    moments = {"mu": 0.0, "nu": 0.0}
    options = {"narrow": ("mu",), "moment_dtype": moment_dtype, "mask": mask}
    return elementwise("radam", RadamState, hyper, rule, numbers, moments, **options)
