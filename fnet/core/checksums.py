"""A sum of an array's bits that is the same however the array is split over devices, and on the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 1 << 20  # words that the host mixes at a time


def words_sum(array: np.ndarray) -> int:
    """``Σᵢ mix(wᵢ + c i) mod 2³²`` over the words w of an array on the host, i the place of each in row-major order.

    Words are as wide as a number, at most 32 bits; c = ⌊2³²/φ⌋, and ``mix`` is the finalizer of MurmurHash3
    (A. Appleby, public domain), a bijection: a single word that changes changes the sum, several do but for 1 in 2³².
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.view(_kind(flat.dtype))
    total = 0
    for begin in range(0, words.size, BLOCK):
        block = words[begin : begin + BLOCK].astype(np.uint32)
        places = np.arange(begin, begin + block.size, dtype=np.uint64).astype(np.uint32)
        total += int(_mixed(block, places).sum(dtype=np.uint64))
    return total % 2**32


@jax.jit
def words_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    """`words_sum` of each, computed where they are: each device sums its part."""
    return [_on_devices(array) for array in arrays]


def _on_devices(a: jax.Array) -> jax.Array:
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        a = jnp.stack([a.real, a.imag], -1)
    words = a.astype(jnp.uint8) if a.dtype == bool else jax.lax.bitcast_convert_type(a, _kind(a.dtype))
    place, size = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):  # without a reshape, for which the array would be gathered
        place = place + np.uint32(size % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        size *= words.shape[axis]
    return _mixed(words.astype(jnp.uint32), place).sum(dtype=jnp.uint32)


def _kind(dtype: np.dtype) -> Any:
    return {1: np.uint8, 2: np.uint16}.get(dtype.itemsize, np.uint32)


def _mixed(words: Any, places: Any) -> Any:
    h = words + places * np.uint32(0x9E3779B9)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))
