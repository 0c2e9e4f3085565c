"""The depthwise convolution and its two gradients, position by position of the kernel: ``y_o = Σ_k x_(os+kd) w_k``.

Each channel has a kernel and a feature of its own, so that there is no product of matrices: what the outputs see at a
position is multiplied by its weights, C at a time, and added up as it is read. Nothing is gathered, and the program
grows with the positions.

Legend: B batch, C channels, n, m sizes of an input's and an output's axis; ``w (*kernel, 1, C)``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.numerics import wide
from fnet.layers.dense import rows
from fnet.layers.kernel_rows import placed
from fnet.layers.windows import Windows, along, crop, padded


def convolution(x: jax.Array, w: jax.Array, windows: Windows) -> jax.Array:
    """``x (B, *n, C)`` to ``y (B, *m, C)``."""
    dtype, w = wide(x.dtype), w.astype(wide(w.dtype))
    seen = seen_at(padded(x.astype(dtype), windows, 0), windows)
    return added_up(seen(k) * by_channel(w[k], x) for k in positions(windows)).astype(x.dtype)


def weight_gradient(x: jax.Array, dy: jax.Array, windows: Windows) -> jax.Array:
    """``dw (*kernel, 1, C)``: at k, ``Σ_o x_(os+kd) dy_o``."""
    dtype = wide(x.dtype)
    seen, dy = seen_at(padded(x.astype(dtype), windows, 0), windows), dy.astype(dtype)
    dw = jnp.stack([rows(seen(k) * dy).sum(0) for k in positions(windows)])
    return dw.astype(x.dtype).reshape(*windows.kernel, 1, dy.shape[-1])


def input_gradient(w: jax.Array, dy: jax.Array, windows: Windows) -> jax.Array:
    """``dx (B, *n, C)``: at j, ``Σ_(o, k: os+kd = j) dy_o w_k``."""
    if max(windows.stride) == 1:  # what a convolution of dy with the kernel turned round sees
        low = tuple(e - 1 - before for e, before in zip(windows.extent, windows.low, strict=True))
        back = windows._replace(inputs=windows.outputs, outputs=windows.inputs, low=low)
        return convolution(dy, jnp.flip(w, range(len(windows.kernel))), back)
    dtype, w = w.dtype, w.astype(wide(w.dtype))

    def part(k):
        return functools.reduce(
            lambda d, axis: placed(d, windows, axis, k[axis]), range(len(k)), dy.astype(w.dtype) * by_channel(w[k], dy)
        )

    return crop(added_up(map(part, positions(windows))), windows).astype(dtype)


def positions(windows: Windows) -> Iterable[tuple[int, ...]]:
    """Those of the kernel, in row-major order."""
    return np.ndindex(*windows.kernel)


def seen_at(x: jax.Array, windows: Windows) -> Callable[[tuple[int, ...]], jax.Array]:
    """What the outputs see of ``x``, padded, at a position."""
    return lambda k: x[(slice(None), *(along(windows, axis, i) for axis, i in enumerate(k)))]


def by_channel(w: jax.Array, like: jax.Array) -> jax.Array:
    """``w (1, C)`` in the rank of the inputs."""
    return w.reshape((1,) * (like.ndim - 1) + w.shape[-1:])


def added_up(parts: Iterable[jax.Array]) -> jax.Array:
    """Their sum."""
    return functools.reduce(operator.add, parts)
