"""The convolution and its two gradients: products of matrices over patches or by rows, or XLA's own operation.

Legend: B batch, S spatial axes, C channels in, I channels in per group, G groups, O features out, K positions of the
kernel, N = B · outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from fnet.core.numerics import wide
from fnet.core.platforms import platform
from fnet.core.splitting import on_own_examples
from fnet.layers import depthwise, kernel_rows
from fnet.layers.dense import product, product_with_rows, rows, wide_product
from fnet.layers.windows import Windows, are_few, channels_first, channels_last, fold, padded, patches

Form = Literal["patches", "rows", "xla"] | None


def chosen(form: Form, windows: Windows, w: tuple[int, ...], groups: int) -> str:
    """How a convolution with a kernel of shape ``w (*kernel, I, O)`` is computed on the platform that is traced for.

    The ``form`` that is asked for, or the faster one; rows of one channel and feature each are "depthwise".
    """
    alone = w[-2] == 1 < w[-1] == groups
    if form is not None:
        by = form
    elif platform() != "cpu":
        by = "xla"
    elif groups > 1:  # depthwise needs a program as long as its kernel
        by = "rows" if alone and not are_few(groups) and math.prod(windows.kernel) <= 16 else "patches"
    else:
        by = "patches" if are_better_as_patches(windows, *w[-2:]) else "rows"
    return "depthwise" if by == "rows" and alone else by


def are_better_as_patches(windows: Windows, channels: int, features: int) -> bool:
    """Whether a CPU had better gather whole patches of so few channels, their examples side by side.

    The features then have their examples side by side, too. That suits layers on few of them; for others they are
    copied, which costs more than a short kernel's rows. More channels than an image has are taken for such features.
    """
    if not are_few(channels) or not kernel_rows.after_the_product(windows):  # with strides rows have nothing to add up
        return False
    return are_few(features) or channels > 4 or windows.kernel[0] > 5


def by_groups(function: Callable, groups: int) -> Callable:
    """``function`` of arrays ``(..., G C)``, or ``(..., C, G O)`` for a kernel, for each of the groups."""
    if groups == 1:
        return function

    def split(array):
        return array.reshape(*array.shape[:-1], groups, array.shape[-1] // groups)

    def each(*arrays):
        y = jax.vmap(function, -2, -2)(*map(split, arrays))
        return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])

    return each


def as_matrices(w: jax.Array, groups: int) -> jax.Array:
    """``w (*kernel, I, O)`` as a matrix for each group, ``(G, K I, O/G)``."""
    return jnp.swapaxes(w.reshape(math.prod(w.shape[:-1]), groups, w.shape[-1] // groups), 0, 1)


def gathered(x: jax.Array, windows: Windows, groups: int) -> jax.Array:
    """The patches of ``x (B, *S, C)`` as a matrix for each group, ``(G, K I, N)``."""
    dtype, x = x.dtype, padded(channels_first(x.astype(wide(x.dtype))), windows, 0)  # autodiff adds them up again
    x = patches(x.reshape(groups, x.shape[0] // groups, *x.shape[1:]), windows).astype(dtype)
    places = 1 + len(windows.kernel)
    return x.reshape(groups, math.prod(x.shape[1:-places]), math.prod(x.shape[-places:]))


def as_rows(dy: jax.Array, groups: int) -> jax.Array:
    """``dy (B, *m, O)`` as ``(G, O/G, N)``."""
    return channels_first(dy).reshape(groups, dy.shape[-1] // groups, math.prod(dy.shape[:-1]))


def by_group(multiply: Callable, a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix product of each group, ``a (G, ., .)`` and ``b (G, ., .)`` alike."""
    return jax.vmap(multiply)(a, b) if a.shape[0] > 1 else multiply(a[0], b[0])[None]


def convolution(x, w, windows: Windows, groups: int, form: Form) -> jax.Array:
    """``x (B, *n, C)``, ``w (*kernel, I, O)`` to ``y (B, *m, O)``."""
    by = chosen(form, windows, w.shape, groups)
    return on_own_examples(lambda x, w: _convolution(x, w, windows, groups, by), x, whole=(w,))


def weight_gradient(x, dy, windows: Windows, groups: int, form: Form) -> jax.Array:
    """``dw (*kernel, I, O)``: at k, ``Σ_o x at (o·stride + k·dilation)ᵀ dy at o``."""
    by = chosen(form, windows, (*windows.kernel, x.shape[-1] // groups, dy.shape[-1]), groups)
    return on_own_examples(lambda x, dy: _weight_gradient(x, dy, windows, groups, by), x, dy, total=True)


def input_gradient(w, dy, windows: Windows, groups: int, form: Form) -> jax.Array:
    """``dx (B, *n, C)``: at j, the sum of ``dy at o · w_kᵀ`` over all o, k with ``o·stride + k·dilation = j``."""
    by = chosen(form, windows, w.shape, groups)
    return on_own_examples(lambda dy, w: _input_gradient(w, dy, windows, groups, by), dy, whole=(w,))


def bias_gradient(w, dy, windows: Windows, groups: int, form: Form) -> jax.Array:
    """``db (O,)``, the sum of ``dy`` over all axes but the last."""
    if chosen(form, windows, w.shape, groups) != "patches":
        return rows(dy).sum(0)
    # as a product: of a sum XLA would make one over (B, *m, O), for which it would lay out dy a second time
    flat = channels_first(dy).reshape(dy.shape[-1], math.prod(dy.shape[:-1]))
    return product(flat, jnp.ones((flat.shape[1], 1), dy.dtype))[:, 0]


def _convolution(x, w, windows: Windows, groups: int, form: str) -> jax.Array:
    if form == "xla":
        return xla(x, w, windows.stride, windows.low, windows.high, (), windows.dilation, feature_group_count=groups)
    if form == "depthwise":
        return depthwise.convolution(x, w, windows)
    if form == "rows":
        return by_groups(lambda x, w: kernel_rows.convolution(x, w, windows), groups)(x, w)
    y = by_group(product, jnp.swapaxes(as_matrices(w, groups), 1, 2), gathered(x, windows, groups))
    return channels_last(y.reshape(w.shape[-1], *windows.outputs, x.shape[0]))


def _weight_gradient(x, dy, windows: Windows, groups: int, form: str) -> jax.Array:
    shape = (*windows.kernel, x.shape[-1] // groups, dy.shape[-1])
    if form == "xla":
        # a convolution of x with dy for a kernel: outputs are the positions k, and stride and dilation change places;
        # the batch is summed over as channels are, and the channels of x stand for a batch, in groups
        x, dy = jnp.swapaxes(x, 0, -1), jnp.moveaxis(dy, 0, -2)
        dw = xla(x, dy, windows.dilation, windows.low, windows.high, (), windows.stride, batch_group_count=groups)
        return jnp.moveaxis(dw, 0, -2)
    if form == "depthwise":
        return depthwise.weight_gradient(x, dy, windows)
    if form == "rows":
        return by_groups(lambda x, dy: kernel_rows.weight_gradient(x, dy, windows), groups)(x, dy)
    dw = by_group(product_with_rows, gathered(x, windows, groups), as_rows(dy, groups))
    return jnp.swapaxes(dw, 0, 1).reshape(shape)


def _input_gradient(w, dy, windows: Windows, groups: int, form: str) -> jax.Array:
    channels = w.shape[-2] * groups
    if form == "xla":
        # a convolution of dy, its entries stride apart, with the kernel turned round, its features and channels swapped
        # (padded by less than a window, so that some of dx is cropped after it, or is 0 where no window sees x)
        reach = [e - 1 for e in windows.extent]
        low, low_rest = within(reach, [r - before for r, before in zip(reach, windows.low, strict=True)])
        high, high_rest = within(reach, [r - after for r, after in zip(reach, windows.high, strict=True)])
        turned = jnp.flip(w, range(w.ndim - 2)).reshape(*w.shape[:-1], groups, w.shape[-1] // groups)
        turned = jnp.moveaxis(turned, -1, -3).swapaxes(-1, -2)
        turned = turned.reshape(*w.shape[:-2], w.shape[-1] // groups, channels)
        dx = xla(dy, turned, (), low, high, windows.stride, windows.dilation, feature_group_count=groups)
        return around(dx, low_rest, high_rest)
    if form == "depthwise":
        return depthwise.input_gradient(w, dy, windows)
    if form == "rows":
        return by_groups(lambda w, dy: kernel_rows.input_gradient(w, dy, windows), groups)(w, dy)
    # what is added up stays in float32 at least until it is
    d = by_group(wide_product, as_matrices(w, groups), as_rows(dy, groups))
    d = jnp.moveaxis(d.reshape(groups, *w.shape[:-1], *dy.shape[1:-1], dy.shape[0]), 0, w.ndim - 2)
    d = d.reshape(*windows.kernel, channels, *windows.outputs, dy.shape[0])
    return channels_last(fold(d, windows).astype(w.dtype))


def within(reach, padding) -> tuple[list[int], list[int]]:
    """What of the ``padding`` of each axis lies from 0 to ``reach``, and the rest, which may be negative."""
    inner = [min(max(p, 0), r) for p, r in zip(padding, reach, strict=True)]
    return inner, [p - i for p, i in zip(padding, inner, strict=True)]


def around(x: jax.Array, low, high) -> jax.Array:
    """``x (B, *S, C)`` with zeros around it, or cropped where a padding is negative."""
    if not any((*low, *high)):
        return x
    spatial = ((before, after, 0) for before, after in zip(low, high, strict=True))
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *spatial, (0, 0, 0)))


def xla(x, w, strides, low, high, x_dilation, w_dilation, **groups) -> jax.Array:
    """`jax.lax.conv_general_dilated` of ``x (B, *S, C)`` with ``w (*kernel, I, O)``.

    XLA pads from 0 to (k − 1)·dilation, and the rest is padded or cropped before it: jaxlib's convolution on CPU
    returns what lies in memory where padding is negative, which beyond (k − 1)·dilation it is in the transpose.
    """
    ones, rank = (1,) * (x.ndim - 2), x.ndim
    reach = [(k - 1) * d for k, d in zip(w.shape, w_dilation or ones, strict=False)]
    (low, low_rest), (high, high_rest) = within(reach, low), within(reach, high)
    x = around(x, low_rest, high_rest)  # none where x is dilated
    images = (0, rank - 1, *range(1, rank - 1))
    kernel = (rank - 1, rank - 2, *range(rank - 2))
    return jax.lax.conv_general_dilated(
        x,
        w,
        strides or ones,
        tuple(zip(low, high, strict=True)),
        x_dilation or ones,
        w_dilation or ones,
        jax.lax.ConvDimensionNumbers(images, kernel, images),
        **groups,
    )
