"""The depthwise convolution and its two gradients, position by position of the kernel: ``y_o = Σ_k x_(os+kd) w_k``.

Each channel has a kernel and a feature of its own, so that there is no product of matrices: what the outputs see at a
position is multiplied by its weights, C at a time, and added up as it is read. Nothing is gathered, and the program
grows with the positions.

Legend: B batch, C channels, n, m sizes of an input's and an output's axis; ``w (*kernel, 1, C)``.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.numerics import wide
from fnet.layers.dense import rows
from fnet.layers.kernel_rows import placed
from fnet.layers.windows import Windows, crop, taps


def convolution(x: jax.Array, w: jax.Array, windows: Windows) -> jax.Array:
    """``x (B, *n, C)`` to ``y (B, *m, C)``."""
    seen = taps(x.astype(wide(x.dtype)), windows, 0)
    return functools.reduce(operator.add, map(operator.mul, seen, by_position(w, x))).astype(x.dtype)


def weight_gradient(x: jax.Array, dy: jax.Array, windows: Windows) -> jax.Array:
    """``dw (*kernel, 1, C)``: at k, ``Σ_o x_(os+kd) dy_o``."""
    dtype = wide(x.dtype)
    dw = jnp.stack([rows(seen * dy.astype(dtype)).sum(0) for seen in taps(x.astype(dtype), windows, 0)])
    return dw.astype(x.dtype).reshape(*windows.kernel, 1, dy.shape[-1])


def input_gradient(w: jax.Array, dy: jax.Array, windows: Windows) -> jax.Array:
    """``dx (B, *n, C)``: at j, ``Σ_(o, k: os+kd = j) dy_o w_k``."""
    if max(windows.stride) == 1:  # what a convolution of dy with the kernel turned round sees
        low = tuple(e - 1 - before for e, before in zip(windows.extent, windows.low, strict=True))
        back = windows._replace(inputs=windows.outputs, outputs=windows.inputs, low=low)
        return convolution(dy, jnp.flip(w, range(len(windows.kernel))), back)
    parts = []
    for position, weight in zip(np.ndindex(*windows.kernel), by_position(w, dy), strict=True):
        part = dy.astype(weight.dtype) * weight
        for axis, k in enumerate(position):
            part = placed(part, windows, axis, k)
        parts.append(part)
    return crop(functools.reduce(operator.add, parts), windows).astype(w.dtype)


def by_position(w: jax.Array, like: jax.Array) -> jax.Array:
    """``w (*kernel, 1, C)`` as ``(K, 1, ..., C)``, each position's in the rank of the inputs, in float32 at least."""
    return w.astype(wide(w.dtype)).reshape(-1, *(1,) * (like.ndim - 1), w.shape[-1])
