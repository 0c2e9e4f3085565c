"""Activations: functions of each entry, and softmax over the last axis. None has parameters.

Each forward is written so that plain autodiff of it takes the same subgradient as the backward, and so that NaN passes.
Legend: B batch, K classes; z the input where the derivation names it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fnet.core.numerics import wide
from fnet.layers.masks import by_position
from fnet.layers.wrappers import stateless
from fnet.types import Layer


def _activation(name, forward, backward) -> Layer:
    """Lift ``forward(x) -> (y, residuals)`` and ``backward(residuals, dy) -> dx``."""
    layer = stateless(
        name,
        lambda key, x: (),
        lambda params, x: forward(x),
        lambda params, residuals, dy: ((), backward(residuals, dy)),
    )
    return by_position(layer)


def identity() -> Layer:
    """``y = x``, the linear activation."""
    return _activation("identity", lambda x: (x, ()), lambda residuals, dy: dy)


def step() -> Layer:
    """Heaviside's step: ``y = 1`` where ``x >= 0``, else 0. Its derivative is zero wherever it has one, so that nothing
    is learned through it; at 0, where it has none, zero is taken too. NaN stays NaN.
    """

    def forward(x):
        return jnp.where(jnp.isnan(x), x, (x >= 0).astype(x.dtype)), jnp.isnan(x)

    def backward(unknown, dy):  # the derivative of a constant; a NaN passed, and so does its gradient
        return jnp.where(unknown, dy, 0)

    return _activation("step", forward, backward)


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

    return _activation("sigmoid", forward, backward)


def tanh() -> Layer:
    """``y = tanh(x)``, between -1 and 1."""

    def forward(x):  # y is kept in float32 at least: in 16 bits 1 − y² would be 0 from x = 3.5 on
        y = tanh_of(x)
        return y.astype(x.dtype), y

    def backward(y, dy):  # y' = 1 − tanh²
        return (dy.astype(y.dtype) * (1 - y * y)).astype(dy.dtype)

    return _activation("tanh", forward, backward)


def relu() -> Layer:
    """``y = max(x, 0)``, with derivative 0 at 0 (`jax.nn.relu` the same; ``jnp.maximum(x, 0)`` takes ½ there)."""

    def forward(x):
        y = jnp.where(x <= 0, 0, x)
        return y, y

    def backward(y, dy):  # y' = [z > 0], and z > 0 exactly where y > 0; a NaN in y lets dy pass, as it passed x
        return jnp.where(y <= 0, 0, dy)

    return _activation("relu", forward, backward)


def leaky_relu(slope: float = 0.01) -> Layer:
    """``y = x`` where ``x > 0``, else ``slope x``; derivative ``slope`` at 0. Keras' default is 0.3, JAX' 0.01."""

    def forward(x):
        negative = x <= 0
        return jnp.where(negative, jnp.asarray(slope, x.dtype) * x, x), negative

    def backward(negative, dy):  # y' = 1 or slope
        return jnp.where(negative, jnp.asarray(slope, dy.dtype) * dy, dy)

    return _activation("leaky_relu", forward, backward)


def gelu(approximate: bool = False) -> Layer:
    """``y = x Φ(x)`` with the normal distribution function Φ; its tanh form if ``approximate``.

    Exact: ``Φ(x) = erfc(-x/√2)/2``. Approximate: ``½ (1 + tanh(√(2/π) (x + 0.044715 x³)))``. Source: Hendrycks and
    Gimpel, arXiv:1606.08415. The default of PyTorch and Keras 2 is the exact form, that of JAX and of Keras 3's
    ``keras.ops`` the other: name it.
    """
    cubic, scale = 0.044715, math.sqrt(2 / math.pi)

    # all in float32 at least: a rounding of the argument to 16 bits would be x² times larger in the tail's result

    def gate(x):
        # ½ (1 + tanh u) is σ(2u), which does not cancel where u is below 0
        return jax.nn.sigmoid(2 * scale * (x + cubic * x * x * x))

    def near(x):
        # beyond ±40 the gate is exactly 1 or 0 in float64 too, and cubes overflow: an infinity times exactly 0
        z = x.astype(wide(x.dtype))
        return jax.lax.clamp(jnp.asarray(-40, z.dtype), z, jnp.asarray(40, z.dtype))

    def exact_forward(x):
        z = near(x)
        return jnp.where(x >= 40, x, (z * (jax.lax.erfc(-z * math.sqrt(0.5)) / 2)).astype(x.dtype)), x

    def exact_backward(x, dy):  # y' = Φ(z) + z φ(z), φ the density exp(−z²/2)/√(2π)
        z, d = near(x), dy.astype(wide(dy.dtype))
        density = jnp.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return (d * (jax.lax.erfc(-z * math.sqrt(0.5)) / 2 + z * density)).astype(dy.dtype)

    def tanh_forward(x):
        z = near(x)
        return jnp.where(x >= 40, x, (z * gate(z)).astype(x.dtype)), x

    def tanh_backward(x, dy):
        # y = z g, g = σ(2u), u = s (z + c z³):  y' = g + z · 2 g (1 − g) · s (1 + 3 c z²)
        z, d = near(x), dy.astype(wide(dy.dtype))
        g = gate(z)
        return (d * (g + z * 2 * g * (1 - g) * (scale * (1 + 3 * cubic * z * z)))).astype(dy.dtype)

    if approximate:
        return _activation("gelu", tanh_forward, tanh_backward)
    return _activation("gelu", exact_forward, exact_backward)


def softplus() -> Layer:
    """``y = log(1 + exp(x))``, a smooth relu; exact for large ``|x|``."""

    def forward(x):
        return jnp.logaddexp(x, jnp.zeros_like(x)), x

    def backward(x, dy):  # y' = e^z / (1 + e^z) = sigmoid(z)
        return (dy.astype(wide(dy.dtype)) * logistic(x)).astype(dy.dtype)

    return _activation("softplus", forward, backward)


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

    return _activation("softmax", forward, backward)
