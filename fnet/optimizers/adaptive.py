"""Steps divided by the size of the gradients so far: RMSprop, Adagrad, Adadelta.

Legend: p parameter, g gradient, v moment, t the update from 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from fnet.optimizers.common import elementwise, root
from fnet.optimizers.schedules import check_numbers
from fnet.types import Optimizer, PyTree, Schedule

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

    Elsewhere: optax has these defaults. Keras: ``eps=1e-7``. TF1: ``eps=1e-10, initial=1.0``. torch: ``decay=0.99,
    eps_in_sqrt=False``, and its momentum b = μb + g / (√v + eps), ``p −= rate · b`` differs once the rate changes (TF1,
    Keras and optax have the rate inside, as here). HIPS autograd: ``eps_in_sqrt=False, initial=1.0``. Sources: Tieleman
    and Hinton (2012); Graves (arXiv 1308.0850) for the centred form.
    """
    check_numbers("rmsprop", below=1, decay=decay, momentum=0 if momentum is None else momentum)
    check_numbers("rmsprop", eps=eps, initial=initial)

    def rule(p, g, v, mean, velocity, rate, decay, rest, eps, momentum):
        v = spread = decay * v + rest * g * g
        if centered:
            mean = decay * mean + rest * g
            spread = jnp.maximum(v - mean * mean, 0)
        u = rate * g / (root(spread + eps) if eps_in_sqrt else root(spread) + eps)
        if momentum is not None:
            u = velocity = momentum * velocity + u
        return p - u, v, mean, velocity

    return elementwise(
        "rmsprop",
        RmspropState,
        RmspropHyper(learning_rate, decay, eps, momentum),
        rule,
        lambda hyper, rate, t: (rate, hyper.decay, 1 - hyper.decay, hyper.eps, hyper.momentum),
        {"nu": initial, "mean": 0.0 if centered else None, "velocity": None if momentum is None else 0.0},
        narrow=("velocity",),
        moment_dtype=moment_dtype,
    )


# --- Adagrad ---------------------------------------------------------------------------------------------------------


class AdagradHyper(NamedTuple):
    """Numbers of `adagrad`."""

    learning_rate: Any
    eps: Any


class AdagradState(NamedTuple):
    """State of `adagrad`; ``total`` is the sum of all squared gradients."""

    step: jax.Array
    hyper: AdagradHyper
    rate: jax.Array
    total: PyTree


def adagrad(
    learning_rate: ArrayLike | Schedule = 0.01,
    eps: ArrayLike = 1e-10,
    *,
    eps_in_sqrt: bool = False,
    initial: ArrayLike = 0.0,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """Steps divided by the root of the sum of all squared gradients, from G = ``initial``.

        G = G + g²          p −= rate · g / (√G + eps)          or, with ``eps_in_sqrt``, rate · g / √(G + eps)

    Elsewhere: torch has these defaults, and a ``lr_decay`` that is a schedule here. Keras: ``eps=1e-7, initial=0.1,
    eps_in_sqrt=True``, and optax the same save that where G is 0 the step is 0.
    Source: Duchi, Hazan and Singer, "Adaptive subgradient methods", 2011.
    """
    check_numbers("adagrad", eps=eps, initial=initial)

    def rule(p, g, total, rate, eps):
        total = total + g * g
        return p - rate * g / (root(total + eps) if eps_in_sqrt else root(total) + eps), total

    return elementwise(
        "adagrad",
        AdagradState,
        AdagradHyper(learning_rate, eps),
        rule,
        lambda hyper, rate, t: (rate, hyper.eps),
        {"total": initial},
        moment_dtype=moment_dtype,
    )


# --- Adadelta --------------------------------------------------------------------------------------------------------


class AdadeltaHyper(NamedTuple):
    """Numbers of `adadelta`."""

    learning_rate: Any
    rho: Any
    eps: Any


class AdadeltaState(NamedTuple):
    """State of `adadelta`: running means of squared gradients and of squared steps."""

    step: jax.Array
    hyper: AdadeltaHyper
    rate: jax.Array
    nu: PyTree
    steps: PyTree


def adadelta(
    learning_rate: ArrayLike | Schedule = 1.0,
    rho: ArrayLike = 0.95,
    eps: ArrayLike = 1e-6,
    *,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """Steps in the parameters' own units: the root mean square of past steps over that of gradients.

        v = ρ v + (1 − ρ) g²        u = √((s + eps) / (v + eps)) · g        s = ρ s + (1 − ρ) u²        p −= rate · u

    The paper's ρ and eps, and its rate 1. torch and optax: ``rho=0.9``; Keras: ``eps=1e-7`` and a rate of 0.001.
    Source: Zeiler, arXiv:1212.5701.
    """
    check_numbers("adadelta", below=1, rho=rho)
    check_numbers("adadelta", positive=True, eps=eps)  # with 0 no step would ever leave 0

    def rule(p, g, v, s, rate, rho, eps):
        v = rho * v + (1 - rho) * g * g
        u = jnp.sqrt((s + eps) / (v + eps)) * g
        return p - rate * u, v, rho * s + (1 - rho) * u * u

    return elementwise(
        "adadelta",
        AdadeltaState,
        AdadeltaHyper(learning_rate, rho, eps),
        rule,
        lambda hyper, rate, t: (rate, hyper.rho, hyper.eps),
        {"nu": 0.0, "steps": 0.0},
        moment_dtype=moment_dtype,
    )
