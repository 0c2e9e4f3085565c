"""Activations that leave ``x`` as it is on one side of a threshold: hard_tanh, threshold, shrink, tanh_shrink.

At a threshold itself each has the derivative 0, by hand as by autodiff of its forward, and NaN passes. Thresholds are
numbers that may be traced.
"""

from __future__ import annotations

import jax.numpy as jnp

from fnet.core.checks import require, require_numbers
from fnet.core.numerics import wide
from fnet.layers.activation import by_entry, tanh_of
from fnet.types import Layer


def hard_tanh(low=-1.0, high=1.0) -> Layer:
    """``y = min(max(x, low), high)``: ``hard_tanh(0, 6)`` is relu6, and with −∞ or ∞ one side stays open.

    PyTorch's ``Hardtanh`` and ``ReLU6`` and JAX' ``hard_tanh`` and ``relu6`` the same, with these derivatives; ONNX
    calls it Clip. Raises ValueError unless ``low < high``.

    >>> hard_tanh().forward((), (), jnp.array([-3.0, 0.5, 3.0]))[0].tolist()
    [-1.0, 0.5, 1.0]
    """
    require_numbers("hard_tanh", low=low, high=high)
    require(low < high, f"hard_tanh: low = {low}, high = {high}; expected a low below the high")

    def forward(x):
        most = jnp.asarray(high, x.dtype)
        least = jnp.minimum(jnp.asarray(low, x.dtype), most)
        outside = (x <= least) | (x >= most)
        return jnp.where(x <= least, least, jnp.where(x >= most, most, x)), outside

    def backward(outside, dy):  # y' = [low < x < high]
        return jnp.where(outside, 0, dy)

    return by_entry("hard_tanh", forward, backward)


def threshold(at=0.0, value=0.0) -> Layer:
    """``y = x`` where ``x > at``, else ``value``.

    PyTorch's ``Threshold(at, value)``; ONNX' ThresholdedRelu has the value 0.

    >>> threshold(1.0).forward((), (), jnp.array([-3.0, 0.5, 3.0]))[0].tolist()
    [0.0, 0.0, 3.0]
    """
    require_numbers("threshold", at=at, value=value)

    def forward(x):
        below = x <= jnp.asarray(at, x.dtype)
        return jnp.where(below, jnp.asarray(value, x.dtype), x), below

    def backward(below, dy):  # y' = [x > at]
        return jnp.where(below, 0, dy)

    return by_entry("threshold", forward, backward)


def shrink(threshold=0.5, bias=0.0) -> Layer:
    """``y = x − bias`` where ``x > threshold``, ``x + bias`` where ``x < −threshold``, 0 between.

    PyTorch's ``Hardshrink(λ)`` is ``shrink(λ)``, its ``Softshrink(λ)`` is ``shrink(λ, λ)``; ONNX' Shrink the same.

    >>> shrink(1.0, 1.0).forward((), (), jnp.array([-3.0, 0.5, 3.0]))[0].tolist()
    [-2.0, 0.0, 2.0]
    """
    require_numbers("shrink", threshold=threshold, bias=bias)

    def forward(x):
        between, b = jnp.abs(x) <= jnp.asarray(threshold, x.dtype), jnp.asarray(bias, x.dtype)
        return jnp.where(between, 0, jnp.where(x > 0, x - b, x + b)), between

    def backward(between, dy):  # y' = [|x| > threshold]
        return jnp.where(between, 0, dy)

    return by_entry("shrink", forward, backward)


def tanh_shrink() -> Layer:
    """``y = x − tanh(x)``. PyTorch's ``Tanhshrink``."""

    def forward(x):
        t = tanh_of(x)
        return (x.astype(t.dtype) - t).astype(x.dtype), t

    def backward(t, dy):  # y' = 1 − (1 − tanh²)
        d = dy.astype(wide(dy.dtype))
        return (d * (t * t)).astype(dy.dtype)

    return by_entry("tanh_shrink", forward, backward)
