"""Initializers: functions ``(key, shape, dtype) -> array``, each made by a factory that holds its numbers.

A weight has shape ``(..., I, O)``, so that ``fan_in = field · I`` and ``fan_out = field · O``, where ``field`` is the
product of the leading axes. PyTorch stores ``(O, I, ...)`` instead.

Numbers are drawn in float32 at least, then cast, since the tails of a normal drawn in bfloat16 are cut short. They are
drawn flat, then reshaped: the values are those of a shaped draw, but XLA on CPU compiles the shaped one far slower.

Legend: I features in, O features out, `...` the axes of a receptive field (none in a dense layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import called, described, require
from fnet.core.numerics import wide

Initializer = Callable[[jax.Array, tuple[int, ...], jax.typing.DTypeLike], jax.Array]

# the standard deviation of a standard normal cut at ±2:  √(1 − 4 φ(2) / (2 Φ(2) − 1)), φ the density, Φ its integral
TRUNCATED_STDDEV = 0.8796256610342398


def zeros() -> Initializer:
    """Every entry 0."""
    return constant(0)


def constant(value) -> Initializer:
    """Every entry ``value``, a number."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def uniform(low, high) -> Initializer:
    """Uniform between ``low`` and ``high``: variance ``(high − low)² / 12``."""
    require(low < high, f"uniform: expected low < high, got low = {low}, high = {high}")

    def draw(key, n, dtype):
        return jax.random.uniform(key, (n,), dtype, jnp.asarray(low, dtype), jnp.asarray(high, dtype))

    return _drawn("uniform", draw)


def normal(stddev) -> Initializer:
    """Normal with mean 0 and standard deviation ``stddev``."""
    require(stddev >= 0, f"normal: expected stddev >= 0, got {stddev}")
    return _drawn("normal", lambda key, n, dtype: jax.random.normal(key, (n,), dtype) * jnp.asarray(stddev, dtype))


def truncated_normal(stddev, low=-2.0, high=2.0) -> Initializer:
    """Normal with mean 0 and ``stddev``, redrawn until between ``low · stddev`` and ``high · stddev``.

    The variance is not corrected for what is cut off: with the default bounds the entries' standard deviation is
    0.8796 ``stddev`` (`jax.nn.initializers.truncated_normal` the same). The variance-scaled initializers below are
    corrected. PyTorch's ``trunc_normal_`` takes its bounds in absolute units.
    """
    require(stddev >= 0, f"truncated_normal: expected stddev >= 0, got {stddev}")
    require(low < high, f"truncated_normal: expected low < high, got low = {low}, high = {high}")

    def draw(key, n, dtype):
        bounds = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
        return jax.random.truncated_normal(key, *bounds, (n,), dtype) * jnp.asarray(stddev, dtype)

    return _drawn("truncated_normal", draw)


# --- variance scaling: entries of mean 0 and variance scale / fan ----------------------------------------------------


def fan_in(shape: tuple[int, ...]) -> int:
    """``field · I``: how many inputs meet in one output.

    >>> fan_in((3, 3, 16, 32)), fan_out((3, 3, 16, 32)), fan_avg((3, 3, 16, 32))
    (144, 288, 216.0)
    """
    return math.prod(_matrix_axes(shape)[:-1])


def fan_out(shape: tuple[int, ...]) -> int:
    """``field · O``: how many outputs one input reaches."""
    *field, _, outputs = _matrix_axes(shape)
    return math.prod(field) * outputs


def fan_avg(shape: tuple[int, ...]) -> float:
    """The mean of `fan_in` and `fan_out`."""
    return (fan_in(shape) + fan_out(shape)) / 2


def centered_uniform(stddev) -> Initializer:
    """Uniform between ``±√3 stddev``, whose standard deviation is ``stddev``."""
    return uniform(-math.sqrt(3) * stddev, math.sqrt(3) * stddev)


def corrected_truncated_normal(stddev) -> Initializer:
    """Normal cut at two of its standard deviations, and widened so that what remains has exactly ``stddev``."""
    return truncated_normal(stddev / TRUNCATED_STDDEV)


def variance_scaling(scale, mode: Callable, distribution: Callable) -> Initializer:
    """Entries of mean 0 and variance ``scale / mode(shape)``.

    ``mode`` is `fan_in`, `fan_out` or `fan_avg`; ``distribution`` is `centered_uniform`, `corrected_truncated_normal`,
    `normal`, or any function of a standard deviation that gives an initializer. Raises ValueError for a shape of fewer
    than two axes. Source: He et al., arXiv:1502.01852, with the three modes of Keras' and JAX' variance scaling.
    """
    for name, function in (("mode", mode), ("distribution", distribution)):
        if not callable(function):
            raise ValueError(f"variance_scaling: {name} = {function!r}; expected a function, such as fan_in or normal")
    require(scale > 0, f"variance_scaling: expected scale > 0, got {scale}")

    def init(key, shape, dtype):
        variance = scale / max(mode(shape), 1)  # an empty weight has fan 0, and nothing to scale
        return distribution(variance**0.5)(key, shape, dtype)

    return init


def glorot_uniform() -> Initializer:
    """Variance ``2 / (fan_in + fan_out)``, uniform: between ``±√(6 / (fan_in + fan_out))``. Glorot and Bengio, 2010."""
    return variance_scaling(1.0, fan_avg, centered_uniform)


def glorot_normal() -> Initializer:
    """Variance ``2 / (fan_in + fan_out)``, normal cut at ±2 and corrected as in Keras and JAX; PyTorch does not cut."""
    return variance_scaling(1.0, fan_avg, corrected_truncated_normal)


def he_uniform() -> Initializer:
    """Variance ``2 / fan_in``, uniform: between ``±√(6 / fan_in)``. He et al., arXiv:1502.01852."""
    return variance_scaling(2.0, fan_in, centered_uniform)


def he_normal() -> Initializer:
    """Variance ``2 / fan_in``, normal cut at ±2 and corrected, as in Keras and JAX; PyTorch does not cut."""
    return variance_scaling(2.0, fan_in, corrected_truncated_normal)


def lecun_uniform() -> Initializer:
    """Variance ``1 / fan_in``, uniform: between ``±√(3 / fan_in)``. LeCun et al., Efficient BackProp, 1998."""
    return variance_scaling(1.0, fan_in, centered_uniform)


def lecun_normal() -> Initializer:
    """Variance ``1 / fan_in``, normal cut at ±2 and corrected, as in Keras and JAX."""
    return variance_scaling(1.0, fan_in, corrected_truncated_normal)


def orthogonal(gain=1.0) -> Initializer:
    """``gain`` times a matrix with orthonormal columns, or orthonormal rows where there are fewer rows than columns.

    A weight ``(..., I, O)`` is taken as the matrix ``(field · I, O)``. Drawn evenly among all such matrices (by Haar's
    measure): ``Q · sign(diag R)`` of the QR decomposition of a Gaussian matrix. Raises ValueError for a shape of fewer
    than two axes. Source: Saxe et al., arXiv:1312.6120; the signs, Mezzadri, arXiv:math-ph/0609050.
    """

    def init(key, shape, dtype):
        rows, columns = fan_in(shape), shape[-1]
        draw_dtype = _draw_dtype("orthogonal", dtype)
        tall = max(rows, columns), min(rows, columns)
        q, r = jnp.linalg.qr(jax.random.normal(key, (math.prod(tall),), draw_dtype).reshape(tall))
        # QR leaves the sign of each column open and LAPACK's choice is not even; R's diagonal made positive settles it
        q = jnp.where(jnp.diagonal(r)[None] < 0, -q, q) * jnp.asarray(gain, draw_dtype)
        return (q if rows >= columns else q.T).reshape(shape).astype(dtype)

    return init


def require_initializers(who: str, *optional: str, **given) -> None:
    """Raise TypeError unless each is an initializer, or None where it is ``optional`` and leaves its parameter out."""
    for name, value in given.items():
        none = ", or None to leave the parameter out" if name in optional else ""
        if not callable(value) and not (none and value is None):
            raise TypeError(
                f"{who}: {name} = {described(value)}; expected an initializer, such as fnet.initializers.zeros(){none}"
            )
        if "Initializer" in str(getattr(value, "__annotations__", {}).get("return")):
            made = f"call it, {getattr(value, '__name__', 'it')}()"
            raise TypeError(f"{who}: {name} is {called(value)}; expected the initializer that it makes{none}: {made}")


# --- shared --------------------------------------------------------------------------------------------------------


def _drawn(name, draw) -> Initializer:
    """The initializer of ``draw(key, n, dtype) -> (n,)``."""

    def init(key, shape, dtype):
        return draw(key, math.prod(shape), _draw_dtype(name, dtype)).reshape(shape).astype(dtype)

    return init


def _draw_dtype(name, dtype):
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: dtype {np.dtype(dtype)}; expected a floating one, such as float32")
    return wide(dtype)


def _matrix_axes(shape):
    if len(shape) < 2:
        raise ValueError(
            f"shape {tuple(shape)} has no fan: expected at least two axes (..., inputs, outputs); "
            "use zeros, constant, uniform or normal for biases and scales"
        )
    return shape
