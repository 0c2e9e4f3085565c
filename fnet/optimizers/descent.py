"""Descent along the gradient, its running mean, or the mean's sign.

Legend: p parameter, g gradient, v and m moments, t the update from 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from fnet.optimizers.common import check_variant, elementwise
from fnet.optimizers.schedules import check_numbers
from fnet.optimizers.which import Mask
from fnet.types import Optimizer, PyTree, Schedule

# --- stochastic gradient descent -------------------------------------------------------------------------------------


class SgdHyper(NamedTuple):
    """Numbers of `sgd`."""

    learning_rate: Any
    weight_decay: Any = None


class SgdState(NamedTuple):
    """State of `sgd`."""

    step: jax.Array
    hyper: SgdHyper
    rate: jax.Array


def sgd(
    learning_rate: ArrayLike | Schedule,
    *,
    weight_decay: ArrayLike | Schedule | None = None,
    mask: Mask = None,
) -> Optimizer:
    """Gradient descent, ``p −= rate · g``.

    ``weight_decay`` λ is decoupled, as in all optimizers here: ``p −= rate · λ · p`` too, at the leaves of the ``mask``
    (None: all; path patterns such as ``"*/w"``; a tree of True and False like the parameters, as in optax; or a
    function ``(path, leaf) -> bool``). For this optimizer alone it is the same as L2, `fnet.transforms.l2_decay`.
    ``SGD(rate, momentum=0.9, nesterov=True)`` of torch and Keras is ``momentum(rate, 0.9, nesterov=True)``.

    >>> optimizer = sgd(0.1)
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> params, opt_state = optimizer.update({"w": jnp.array([5.0, -5.0])}, optimizer.init(params), params)
    >>> print(params["w"], opt_state.step)
    [0.5 2.5] 1
    """
    return elementwise(
        "sgd",
        SgdState,
        SgdHyper(learning_rate, weight_decay),
        lambda p, g, rate: (p - rate * g,),
        lambda hyper, rate, t: (rate,),
        {},
        mask=mask,
    )


# --- momentum --------------------------------------------------------------------------------------------------------


class MomentumHyper(NamedTuple):
    """Numbers of `momentum`."""

    learning_rate: Any
    decay: Any
    weight_decay: Any = None


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
    weight_decay: ArrayLike | Schedule | None = None,
    mask: Mask = None,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """Gradient descent along a decaying sum of gradients, from v = 0; μ is ``decay``, in [0, 1).

    - ``"standard"`` (optax, torch): ``v = μv + g``, ``p −= rate · v``; with ``nesterov``, ``p −= rate · (g + μv)``.
    - ``"keras"``: ``v = μv − rate · g``, ``p += v``; with ``nesterov``, ``p += μv − rate · g``. The same as the
      standard until the rate changes: the old rate then still acts through v.
    - ``"autograd"`` (HIPS): ``v = μv − (1 − μ) g``, ``p += rate · v``: steps 1 − μ as long. It has no Nesterov form.

    ``weight_decay`` and ``mask`` as in `sgd`: SGDW with momentum of Loshchilov and Hutter (arXiv:1711.05101).
    torch's ``dampening``, which weighs g by 1 − dampening in every update but the first, is not offered. Sources:
    Polyak (1964); Sutskever et al. (2013) for Nesterov's form.
    """
    check_numbers("momentum", below=1, decay=decay)
    check_variant("momentum", variant, ("standard", "keras", "autograd"))
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

    return elementwise(
        "momentum",
        MomentumState,
        MomentumHyper(learning_rate, decay, weight_decay),
        rule,
        lambda hyper, rate, t: (rate, hyper.decay),
        {"velocity": 0.0},
        narrow=("velocity",),
        moment_dtype=moment_dtype,
        mask=mask,
    )


# --- Lion ------------------------------------------------------------------------------------------------------------


class LionHyper(NamedTuple):
    """Numbers of `lion`."""

    learning_rate: Any
    b1: Any
    b2: Any
    weight_decay: Any


class LionState(NamedTuple):
    """State of `lion`."""

    step: jax.Array
    hyper: LionHyper
    rate: jax.Array
    mu: PyTree


def lion(
    learning_rate: ArrayLike | Schedule = 1e-4,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    *,
    weight_decay: ArrayLike | Schedule | None = None,
    mask: Mask = None,
    moment_dtype: DTypeLike | None = None,
) -> Optimizer:
    """Steps of one size in every coordinate: the sign of a mean of the gradient and its running mean.

        u = sign(b1 · m + (1 − b1) g)           m = b2 · m + (1 − b2) g            p −= rate · (u + λ p)

    Its rates are 3 to 10 times smaller than Adam's and its λ (``weight_decay``, with ``mask`` as in `sgd`) as many
    times larger. The sign of 0 is 0. Source: Chen et al., arXiv:2302.06675. optax decays by 1e-3 unless told otherwise.
    """
    check_numbers("lion", below=1, b1=b1, b2=b2)

    def rule(p, g, m, rate, b1, b2):
        return p - rate * jnp.sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g

    return elementwise(
        "lion",
        LionState,
        LionHyper(learning_rate, b1, b2, weight_decay),
        rule,
        lambda hyper, rate, t: (rate, hyper.b1, hyper.b2),
        {"mu": 0.0},
        narrow=("mu",),
        moment_dtype=moment_dtype,
        mask=mask,
    )
