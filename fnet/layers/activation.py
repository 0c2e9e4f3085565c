"""Activations: functions of each entry, and softmax over the last axis. None has parameters.

Those that are ``x`` where it is positive are in `rectifiers`, those that are ``x`` times a gate in `gating`.

Each forward is written so that plain autodiff of it takes the same subgradient as the backward, and so that NaN passes.
Legend: B batch, K classes; z the input where the derivation names it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fnet.core.checks import require, require_numbers
from fnet.core.numerics import wide
from fnet.layers.masks import by_position
from fnet.layers.windows import layout
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


def without_parameters(name: str, forward, backward) -> Layer:
    """The layer without parameters of ``forward(x) -> (y, residuals)`` and ``backward(residuals, dy) -> dx``."""
    layer = stateless(
        name,
        lambda key, x: (),
        lambda params, x: forward(x),
        lambda params, residuals, dy: ((), backward(residuals, dy)),
    )
    return by_position(layer)


def by_entry(name: str, forward, backward) -> Layer:
    """`without_parameters` of a function of each entry, whose residuals are arrays of the shape of ``x``.

    Over few channels both ways are taken with the examples last, as a convolution before gives them and a pooling after
    wants them: before what is read twice XLA on CPU keeps a transpose, so that all would be copied.
    """

    def laid_out_forward(x):
        lay_out, back = layout(x)
        y, residuals = forward(lay_out(x))
        return back(y), jax.tree.map(back, residuals)

    def laid_out_backward(residuals, dy):
        lay_out, back = layout(dy)
        return back(backward(jax.tree.map(lay_out, residuals), lay_out(dy)))

    return without_parameters(name, laid_out_forward, laid_out_backward)


def identity() -> Layer:
    """``y = x``, the linear activation."""
    return without_parameters("identity", lambda x: (x, ()), lambda residuals, dy: dy)  # y = x:  dx = dy


def step() -> Layer:
    """Heaviside's step: ``y = 1`` where ``x >= 0``, else 0. Its derivative is zero wherever it has one, so that nothing
    is learned through it; at 0, where it has none, zero is taken too. NaN stays NaN.
    """

    def forward(x):
        return jnp.where(jnp.isnan(x), x, (x >= 0).astype(x.dtype)), jnp.isnan(x)

    def backward(unknown, dy):  # the derivative of a constant; a NaN passed, and so does its gradient
        return jnp.where(unknown, dy, 0)

    return by_entry("step", forward, backward)


def hardmax() -> Layer:
    """``y_k = 1`` for the largest entry of the last axis, the first of equals, and 0 elsewhere; its derivative is zero.

    >>> hardmax().forward((), (), jnp.array([[1.0, 5.0, 5.0]]))[0].tolist()
    [[0.0, 1.0, 0.0]]
    """

    def forward(x):
        if not x.ndim or not x.shape[-1]:
            raise LayerError(f"expected entries along a last axis, got shape {x.shape}")
        return jax.nn.one_hot(jnp.argmax(x, -1), x.shape[-1], dtype=x.dtype), ()

    def backward(residuals, dy):  # a step wherever it has a derivative
        return jnp.zeros_like(dy)

    return without_parameters("hardmax", forward, backward)


def logistic(x: jax.Array) -> jax.Array:
    """``σ(x) = 1 / (1 + exp(-x))``, in float32 at least: float16 has no ``exp(12)``."""
    return jax.nn.sigmoid(x.astype(wide(x.dtype)))


def tanh_of(x: jax.Array) -> jax.Array:
    """``tanh(x)`` in float32 at least."""
    return jnp.tanh(x.astype(wide(x.dtype)))


def sigmoid() -> Layer:
    """``y = 1 / (1 + exp(-x))``, between 0 and 1."""

    def forward(x):
        return logistic(x).astype(x.dtype), x

    def backward(x, dy):  # y' = e^{-z} / (1 + e^{-z})² = σ(z) σ(−z); y (1 − y) would cancel where y rounds to 1
        return (dy.astype(wide(dy.dtype)) * logistic(x) * logistic(-x)).astype(dy.dtype)

    return by_entry("sigmoid", forward, backward)


def tanh() -> Layer:
    """``y = tanh(x)``, between -1 and 1."""

    def forward(x):  # y is kept in float32 at least: in 16 bits 1 − y² would be 0 from x = 3.5 on
        y = tanh_of(x)
        return y.astype(x.dtype), y

    def backward(y, dy):  # y' = 1 − tanh²
        return (dy.astype(y.dtype) * (1 - y * y)).astype(dy.dtype)

    return by_entry("tanh", forward, backward)


def softplus(beta=1.0) -> Layer:
    """``y = log(1 + exp(β x)) / β``, a smooth relu; exact for large ``|x|``. ``beta`` is positive and may be traced."""
    require_numbers("softplus", beta=beta)
    require(beta > 0, f"softplus: beta = {beta}; expected a positive number")

    def argument(x):
        return x * jnp.asarray(beta, x.dtype)

    def forward(x):
        z = argument(x)
        return jnp.logaddexp(z, jnp.zeros_like(z)) / jnp.asarray(beta, x.dtype), x

    def backward(x, dy):  # y' = β e^z / (1 + e^z) / β = sigmoid(z), z = βx
        return (dy.astype(wide(dy.dtype)) * logistic(argument(x))).astype(dy.dtype)

    return by_entry("softplus", forward, backward)


def softsign() -> Layer:
    """``y = x / (1 + |x|)``, between -1 and 1, which it nears slowly. PyTorch, Keras and JAX the same."""

    def near(x):  # beyond ±1e30 y is exactly ±1 in float64 too
        z = x.astype(wide(x.dtype))
        return jax.lax.clamp(jnp.asarray(-1e30, z.dtype), z, jnp.asarray(1e30, z.dtype))

    def forward(x):
        z = near(x)
        return (z / (1 + jnp.abs(z))).astype(x.dtype), x

    def backward(x, dy):  # y' = (1 + |z| − z sign z) / (1 + |z|)² = 1 / (1 + |z|)²
        r = 1 / (1 + jnp.abs(near(x)))
        return (dy.astype(r.dtype) * (r * r)).astype(dy.dtype)

    return by_entry("softsign", forward, backward)


def hard_sigmoid(slope=1 / 6, offset=0.5) -> Layer:
    """``y = slope · x + offset`` where that is between 0 and 1, else the nearer of the two; derivative 0 at the kinks.

    By default ``(x + 3)/6`` between -3 and 3: PyTorch and JAX the same, with these derivatives, and Keras 3. The slope
    is 1/5 in ONNX and was so in Keras 2. Both numbers may be traced.
    """
    require_numbers("hard_sigmoid", slope=slope, offset=offset)

    def forward(x):
        z = x.astype(wide(x.dtype))
        z = jnp.asarray(slope, z.dtype) * z + jnp.asarray(offset, z.dtype)
        return jnp.where(z <= 0, 0, jnp.where(z >= 1, 1, z)).astype(x.dtype), (z <= 0) | (z >= 1)

    def backward(flat, dy):  # y' = slope, or 0
        return jnp.where(flat, 0, (dy.astype(wide(dy.dtype)) * jnp.asarray(slope, wide(dy.dtype))).astype(dy.dtype))

    return by_entry("hard_sigmoid", forward, backward)


def softmax() -> Layer:
    """``y_k = exp(x_k) / Σ_j exp(x_j)`` over the last axis. For training, prefer the loss that takes logits."""

    def forward(x):
        z = x.astype(wide(x.dtype))  # so that sums are wide both ways, by autodiff too
        e = jnp.exp(z - jax.lax.stop_gradient(z.max(-1, keepdims=True, initial=-math.inf)))
        y = (e / e.sum(-1, keepdims=True)).astype(x.dtype)
        return y, y

    def backward(y, dy):  # ∂y_k/∂z_j = y_k ([k = j] − y_j):  dx = y ⊙ (dy − Σ_k dy_k y_k)
        y, d = y.astype(wide(y.dtype)), dy.astype(wide(dy.dtype))
        return (y * (d - (d * y).sum(-1, keepdims=True))).astype(dy.dtype)

    return without_parameters("softmax", forward, backward)


def log_softmax() -> Layer:
    """``y_k = x_k − log Σ_j exp(x_j)`` over the last axis, for `fnet.losses.negative_log_likelihood`.

    Finite wherever ``x`` is, where the logarithm of a softmax is not. For training alone, prefer the loss that takes
    logits: `fnet.losses.softmax_cross_entropy` of ``x`` is the two together. PyTorch wants the axis named.
    """

    def forward(x):  # y is kept in float32 at least: in 16 bits e^y would be as far off as y is large
        z = x.astype(wide(x.dtype))
        z = z - jax.lax.stop_gradient(z.max(-1, keepdims=True, initial=-math.inf))
        y = z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))
        return y.astype(x.dtype), y

    def backward(y, dy):  # ∂y_k/∂z_j = [k = j] − e^y_j:  dx = dy − e^y Σ_k dy_k
        d = dy.astype(y.dtype)
        return (d - jnp.exp(y) * d.sum(-1, keepdims=True)).astype(dy.dtype)

    return without_parameters("log_softmax", forward, backward)
