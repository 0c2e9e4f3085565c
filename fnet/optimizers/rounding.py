"""Moments in 16 bits: rounded up or down by chance, so that what is smaller than the rounding is not lost on average.

A running mean that is rounded to the nearest number stands still as soon as an update is less than half the distance
to the next: in bfloat16 one with decay 0.9 stops up to 4 % off. Source: Gupta et al., arXiv:1502.02551.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fnet.core.numerics import wide

NARROW = (jnp.bfloat16, jnp.float16)


def is_narrow(dtype) -> bool:
    """Whether this is a dtype of 16 bits."""
    return jnp.dtype(dtype) in NARROW


def rounded(x: jax.Array, dtype, seed: jax.Array) -> jax.Array:
    """``x`` in a dtype of 16 bits: one of the two numbers beside it, with probabilities that make ``x`` their mean.

    The chance is a function of the ``seed`` (uint32) and of an entry's place, so that the same run rounds alike.

    >>> many = rounded(jnp.full(10_000, 1.001), jnp.bfloat16, jnp.uint32(0))  # between 1 and 1.0078125
    >>> print(sorted(set(many.tolist())), f"{many.astype(jnp.float32).mean():.3f}")
    [1.0, 1.0078125] 1.001
    """
    x = x.astype(wide(x.dtype))
    near = x.astype(dtype)
    away = jnp.where(x > near.astype(x.dtype), jnp.inf, -jnp.inf).astype(dtype)
    other = jnp.nextafter(near, away).astype(x.dtype)
    exact = near.astype(x.dtype)
    share = jnp.where(x == exact, 0, (x - exact) / jnp.where(other == exact, 1, other - exact))
    return jnp.where(chance(x.shape, seed).astype(x.dtype) < share, other.astype(dtype), near)


def chance(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Numbers from 0 to 1, exclusive, in float32: a hash of the seed and of each entry's place.

    A few operations on whole numbers that are computed with the update, where a generator would make an array of keys.
    The last steps are MurmurHash3's (Appleby, public domain), which spread each bit over all.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return (spread(place * jnp.uint32(0x9E3779B1) + seed) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def spread(h: jax.Array) -> jax.Array:
    """A hash of uint32s in which every bit depends on every other."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
