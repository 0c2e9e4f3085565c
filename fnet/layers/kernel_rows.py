"""The convolution and its two gradients, half of a window gathered before the product and half added up after it.

``y = S(G(x) w)``: G gathers what the outputs see along all spatial axes but the first, one product takes all rows of
the kernel side by side, and S adds up along the first axis what belongs to one output. A kernel of k × k so copies k
times the inputs and k times the outputs, where whole patches are k² times the inputs. All are linear in x and in w:

    dw = G(x)ᵀ Sᵀ(dy),    dx = Gᵀ(Sᵀ(dy) wᵀ)

The product is of the inputs' own rows alone: what is padded along the first axis would add zeros, so S leaves it out.
Where the first axis has strides, S would throw away most of the product: there G gathers along it too. Channels stay
the last axis, and copies and sums run over as many numbers as there are channels.

Legend: B batch, C channels, O features; n, m sizes of an input's and an output's axis, n₀ and m₀ of the first; k₀ rows
of the kernel that are added up after the product (1 where none are: then n₀ is m₀), K' the positions that are gathered.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp

from fnet.core.numerics import wide
from fnet.layers.dense import product, rows, wide_product, wide_product_with_rows
from fnet.layers.windows import Windows, along, crop, padded


def convolution(x: jax.Array, w: jax.Array, windows: Windows) -> jax.Array:
    """``x (B, *n, C)``, ``w (*kernel, C, O)`` to ``y (B, *m, O)``."""
    seen = gathered(x, windows)
    z = wide_product(rows(seen), as_matrix(w, windows))
    return added_up(z.reshape(*seen.shape[:-1], z.shape[-1]), windows).astype(x.dtype)


def weight_gradient(x: jax.Array, dy: jax.Array, windows: Windows) -> jax.Array:
    """``dw (*kernel, C, O)``."""
    seen, dz, first = gathered(x, windows), spread(dy, windows), after_the_product(windows)
    dw = product(rows(seen).T, rows(dz))
    dw = dw.reshape(*windows.kernel[first:], x.shape[-1], *windows.kernel[:first], dy.shape[-1])
    return jnp.moveaxis(dw, -2, 0) if first else dw


def input_gradient(w: jax.Array, dy: jax.Array, windows: Windows) -> jax.Array:
    """``dx (B, *n, C)``."""
    dz = spread(dy, windows)
    d = wide_product_with_rows(rows(dz), as_matrix(w, windows))
    d = d.reshape(*dz.shape[:-1], d.shape[-1])
    for axis in range(after_the_product(windows), len(windows.kernel)):
        parts = jnp.split(d, windows.kernel[axis], -1)
        d = functools.reduce(operator.add, (placed(part, windows, axis, k) for k, part in enumerate(parts)))
    return crop(d, where_gathered(windows)).astype(w.dtype)


def after_the_product(windows: Windows) -> int:
    """How many axes, 0 or 1, are added up along after the product."""
    return int(windows.stride[0] == 1 < windows.kernel[0])


def as_matrix(w: jax.Array, windows: Windows) -> jax.Array:
    """``w (*kernel, C, O)`` as ``(K' C, k₀ O)``."""
    w = jnp.moveaxis(w, 0, -2) if after_the_product(windows) else w[..., None, :]
    return w.reshape(-1, w.shape[-2] * w.shape[-1])


def where_gathered(windows: Windows) -> Windows:
    """The windows with nothing padded, nor left out, along an axis that is added up along after the product."""
    if not after_the_product(windows):
        return windows
    m = windows.inputs[0] - windows.extent[0] + 1
    return windows._replace(low=(0, *windows.low[1:]), outputs=(m, *windows.outputs[1:]))


def gathered(x: jax.Array, windows: Windows) -> jax.Array:
    """G: ``x (B, *n, C)`` to ``(B, n₀, *m, K' C)``."""
    dtype, x = x.dtype, padded(x.astype(wide(x.dtype)), where_gathered(windows), 0)  # autodiff adds them up again
    for axis in reversed(range(after_the_product(windows), len(windows.kernel))):
        x = jnp.concatenate([x[at(windows, axis, k)] for k in range(windows.kernel[axis])], -1)
    return x.astype(dtype)


def added_up(z: jax.Array, windows: Windows) -> jax.Array:
    """S: ``z (B, n₀, *m, k₀ O)`` to ``(B, *m, O)``: to row o, ``o + k·dilation − low`` of part k, if it is there."""
    if not after_the_product(windows):
        return z
    parts = enumerate(jnp.split(z, windows.kernel[0], -1))
    return functools.reduce(operator.add, (moved(z, -first_row(windows, k), windows.outputs[0]) for k, z in parts))


def spread(dy: jax.Array, windows: Windows) -> jax.Array:
    """Sᵀ: ``dy (B, *m, O)`` to ``(B, n₀, *m, k₀ O)``."""
    if not after_the_product(windows):
        return dy
    n = windows.inputs[0]
    return jnp.concatenate([moved(dy, first_row(windows, k), n) for k in range(windows.kernel[0])], -1)


def first_row(windows: Windows, k: int) -> int:
    """Which row of the inputs the first output sees at row k of the kernel."""
    return k * windows.dilation[0] - windows.low[0]


def moved(x: jax.Array, by: int, size: int) -> jax.Array:
    """``x (B, n, ...)`` as ``(B, size, ...)``: row i comes to i + by, or falls out, and rows where none comes are 0."""
    pads = ((0, 0, 0), (by, size - x.shape[1] - by, 0), *((0, 0, 0),) * (x.ndim - 2))
    return jax.lax.pad(x, jnp.zeros((), x.dtype), pads)


def at(windows: Windows, axis: int, k: int) -> tuple[slice, ...]:
    """The index of what the outputs see at position k of a padded spatial axis."""
    return (*(slice(None),) * (axis + 1), along(windows, axis, k))


def placed(part: jax.Array, windows: Windows, axis: int, k: int) -> jax.Array:
    """The transpose of taking `at`: zeros everywhere else along the axis."""
    place, span = along(windows, axis, k), windows.span[axis]
    pads = [(0, 0, 0)] * part.ndim
    pads[axis + 1] = (place.start, span - place.stop, place.step - 1)
    return jax.lax.pad(part, jnp.zeros((), part.dtype), pads)
