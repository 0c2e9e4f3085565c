"""Rectifiers: activations that are ``x`` where it is positive, and below 0 a line or an exponential.

Each takes the derivative of the part below at 0 (`relu`: 0), by hand as by autodiff of its forward, and NaN passes.
Legend: C channels (features); `...` any further axes; z the input where the derivation names it.
"""

from __future__ import annotations

import jax.numpy as jnp

from fnet.core.checks import require, require_numbers, require_params
from fnet.core.numerics import stream, wide
from fnet.layers.activation import by_entry
from fnet.layers.dense import rows
from fnet.layers.initializers import constant, require_initializers
from fnet.layers.masks import by_position
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


def relu() -> Layer:
    """``y = max(x, 0)``, with derivative 0 at 0 (`jax.nn.relu` the same; ``jnp.maximum(x, 0)`` takes ½ there)."""

    def forward(x):
        y = jnp.where(x <= 0, 0, x)
        return y, y

    def backward(y, dy):  # y' = [z > 0], and z > 0 exactly where y > 0; a NaN in y lets dy pass, as it passed x
        return jnp.where(y <= 0, 0, dy)

    return by_entry("relu", forward, backward)


def leaky_relu(slope: float = 0.01) -> Layer:
    """``y = x`` where ``x > 0``, else ``slope x``; derivative ``slope`` at 0. Keras' default is 0.3, JAX' 0.01.

    Raises ValueError for a slope that is not one number: those of channels are learned by `prelu`.
    """
    require_numbers("leaky_relu", "for slopes of channels there is prelu", slope=slope)

    def forward(x):
        negative = x <= 0
        return jnp.where(negative, jnp.asarray(slope, x.dtype) * x, x), negative

    def backward(negative, dy):  # y' = 1 or slope
        return jnp.where(negative, jnp.asarray(slope, dy.dtype) * dy, dy)

    return by_entry("leaky_relu", forward, backward)


def prelu(*, shared: bool = False, slope=constant(0.25)) -> Layer:
    """``y = x`` where ``x > 0``, else ``a x``, with a learned slope ``a`` for each channel, or one if ``shared``.

    ``x (B, ..., C)`` to ``y`` alike; the parameter ``slope`` is ``(C,)``, or ``(1,)`` if ``shared``, in the dtype of
    ``x``, drawn by the initializer of that name. The derivative by ``x`` is ``a`` at 0. Raises `LayerError` where ``x``
    has no batch axis, is not floating, or does not have the channels or the dtype of the slopes.

    Source: He et al., arXiv:1502.01852, which also begins at 0.25. PyTorch's default is one slope, and its channels are
    axis 1; Keras has a slope for each entry of an example, from 0; flax one slope, from 0.01. Decay of weights pulls
    the slopes to 0, towards relu: the paper has none on them.

    >>> import jax
    >>> params, state = prelu().init(jax.random.key(0), jax.ShapeDtypeStruct((8, 3), "float32"))
    >>> params["slope"].tolist(), prelu().forward(params, state, jnp.array([[-4.0, 0.0, 4.0]]))[0].tolist()
    ([0.25, 0.25, 0.25], [[-1.0, 0.0, 4.0]])
    """
    require_initializers("prelu", slope=slope)

    def init(key, x):
        if len(x.shape) < 2:
            raise LayerError(f"expected a batch axis and channels, got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise LayerError(f"expected floating inputs, got {x.dtype}: convert them, say to float32")
        return {"slope": slope(stream(key, "slope"), (1,) if shared else x.shape[-1:], x.dtype)}

    def forward(params, x):
        require_params(params, slope=(1,) if shared else tuple(x.shape[-1:]))
        if x.dtype != params["slope"].dtype:
            expected = params["slope"].dtype
            raise LayerError(f"expected {expected} inputs like its slopes, got {x.dtype}: convert the inputs")
        z = x.astype(wide(x.dtype))  # so that autodiff sums in it, too
        return jnp.where(z <= 0, broadcast(params, z) * z, z).astype(x.dtype), x

    def backward(params, x, dy):  # y = a z where z ≤ 0:  da = Σ_{z ≤ 0} dy z, of the slope's own entries;  dx = a dy
        z, d = x.astype(wide(x.dtype)), dy.astype(wide(dy.dtype))
        dslope = rows(jnp.where(z <= 0, d * z, 0)).sum(0)
        dslope = dslope.sum(keepdims=True) if shared else dslope
        dx = jnp.where(z <= 0, broadcast(params, d) * d, d)
        return {"slope": dslope.astype(params["slope"].dtype)}, dx.astype(dy.dtype)

    def broadcast(params, like):
        return params["slope"].astype(like.dtype).reshape((1,) * (like.ndim - 1) + params["slope"].shape)

    return by_position(stateless("prelu", init, forward, backward))


def _exponential(name, scale, alpha, width) -> Layer:
    """``y = λ x`` where ``x > 0``, else ``λ α (exp(x/w) − 1)``."""

    def numbers(dtype):
        return (jnp.asarray(number, dtype) for number in (scale, alpha, width))

    def forward(x):
        z = x.astype(wide(x.dtype))
        s, a, w = numbers(z.dtype)
        below = jnp.where(z > 0, 0, z)  # whose exponential does not overflow
        return jnp.where(z > 0, s * z, s * a * jnp.expm1(below / w)).astype(x.dtype), x

    def backward(x, dy):  # y' = λ, or λ (α/w) e^{z/w}
        z, d = x.astype(wide(x.dtype)), dy.astype(wide(dy.dtype))
        s, a, w = numbers(z.dtype)
        return (d * jnp.where(z > 0, s, s * (a / w) * jnp.exp(jnp.where(z > 0, 0, z) / w))).astype(dy.dtype)

    return by_entry(name, forward, backward)


def elu(alpha=1.0) -> Layer:
    """``y = x`` where ``x > 0``, else ``α (exp(x) − 1)``; derivative ``α`` at 0, where only α = 1 leaves no kink.

    ``alpha`` may be traced. Source: Clevert et al., arXiv:1511.07289. PyTorch, Keras and JAX the same.
    """
    require_numbers("elu", alpha=alpha)
    return _exponential("elu", 1, alpha, 1)


def celu(alpha=1.0) -> Layer:
    """``y = x`` where ``x > 0``, else ``α (exp(x/α) − 1)``: an `elu` without a kink, derivative 1 at 0.

    ``alpha`` is positive and may be traced; raises ValueError for one that is not. Source: Barron, arXiv:1704.07483.
    PyTorch, Keras and JAX the same.
    """
    require_numbers("celu", alpha=alpha)
    require(alpha > 0, f"celu: alpha = {alpha}; expected a positive number")
    return _exponential("celu", 1, alpha, alpha)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def selu(alpha=SELU_ALPHA, scale=SELU_SCALE) -> Layer:
    """``y = λ x`` where ``x > 0``, else ``λ α (exp(x) − 1)``, with α = 1.67326… and λ = 1.05070…; derivative λα at 0.

    ``alpha`` and ``scale``, λ, may be others, and traced.

    Standard normal inputs give outputs of mean 0 and variance 1; for whole networks that is so with `lecun_normal`
    weights. Source: Klambauer et al., arXiv:1706.02515. PyTorch, Keras and JAX the same.
    """
    require_numbers("selu", alpha=alpha, scale=scale)
    return _exponential("selu", scale, alpha, 1)
