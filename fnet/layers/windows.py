"""Windows: which inputs an output of a convolution or a pooling sees, with strides, dilation and padding.

Legend: B batch, S spatial axes, C channels, K positions of the kernel; n, m sizes of an input's and an output's axis.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.platforms import platform
from fnet.types import LayerError

Padding = str | Sequence[tuple[int, int]]


AXES = {1: "(B, T, C)", 2: "(B, H, W, C)", 3: "(B, D, H, W, C)"}


class Windows(NamedTuple):
    """Along each axis, output o sees the inputs ``o · stride + k · dilation − low`` for k below ``kernel``."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Padding
    ceil_mode: bool = False  # whether the last window may reach beyond the padding
    inputs: tuple[int, ...] = ()  # n: sizes, known once the inputs are
    outputs: tuple[int, ...] = ()  # m
    low: tuple[int, ...] = ()  # what is padded before the inputs
    after: tuple[int, ...] = ()  # and after them by ``padding``: windows may reach further or less far, see `high`

    @property
    def extent(self) -> tuple[int, ...]:
        """How far a window reaches: ``(kernel − 1) · dilation + 1``."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def span(self) -> tuple[int, ...]:
        """What all the windows cover: ``(m − 1) · stride + extent``."""
        return tuple((m - 1) * s + e for m, s, e in zip(self.outputs, self.stride, self.extent, strict=True))

    @property
    def high(self) -> tuple[int, ...]:
        """What the windows see after the inputs; negative where they do not see the last inputs."""
        return tuple(c - n - low for c, n, low in zip(self.span, self.inputs, self.low, strict=True))


def windows_of(
    what: str, kernel, stride, dilation, padding: Padding, name: str = "kernel_size", ceil_mode: bool = False
) -> Windows:
    """The windows of a layer, their static arguments checked; ``what`` and ``name`` are for the messages."""
    if not isinstance(kernel, Sequence) or isinstance(kernel, str) or len(kernel) not in AXES:
        examples = ", ".join(f"{(3,) * n} for {axes}" for n, axes in AXES.items())
        raise ValueError(f"{what}: {name} = {kernel!r}; expected a tuple, one size for each spatial axis: {examples}")
    n = len(kernel)
    kernel = sizes(what, name, kernel, n)
    stride, dilation = sizes(what, "stride", stride, n), sizes(what, "dilation", dilation, n)
    if isinstance(padding, str):
        known = ("SAME", "VALID", "CAUSAL")[: 3 if n == 1 and what == "conv" else 2]
        if padding not in known:
            raise ValueError(f"{what}: padding = {padding!r}; expected one of {known}, or {n} pairs (before, after)")
    else:
        pairs = tuple(
            tuple(pair) if isinstance(pair, Sequence) else pair
            for pair in (padding if isinstance(padding, Sequence) else ())
        )
        if len(pairs) != n or any(not isinstance(pair, tuple) or len(pair) != 2 or min(pair) < 0 for pair in pairs):
            raise ValueError(
                f"{what}: padding = {padding!r}; expected {n} pairs (before, after) of at least 0, one an axis"
            )
        padding = tuple((operator.index(before), operator.index(after)) for before, after in pairs)
    if ceil_mode and padding == "SAME":
        raise ValueError(
            f"{what}: ceil_mode = {ceil_mode} with padding 'SAME', which has ⌈n / stride⌉ outputs anyway; expected "
            "False, or padding VALID or pairs"
        )
    return Windows(kernel, stride, dilation, padding, ceil_mode)


def sizes(what: str, name: str, given, n: int, least: int = 1) -> tuple[int, ...]:
    """``given``, a whole number of at least ``least`` or one for each of n axes, as a tuple of n."""
    try:
        values = tuple(operator.index(v) for v in (given if isinstance(given, Sequence) else (given,) * n))
    except TypeError:
        values = ()
    if len(values) != n or min(values) < least:
        raise ValueError(f"{what}: {name} = {given!r}; expected a whole number of at least {least}, or {n} of them")
    return values


def spatial_sizes(x, windows: Windows) -> tuple[int, ...]:
    """The sizes of the spatial axes of ``x (B, *S, C)``."""
    if len(x.shape) != len(windows.kernel) + 2:
        axes = AXES[len(windows.kernel)]
        raise LayerError(f"expected {axes} for windows of {windows.kernel}, got shape {x.shape}")
    return tuple(x.shape[1:-1])


def over_inputs(windows: Windows, x) -> Windows:
    """The windows that lie on ``x (B, *S, C)``: SAME gives ``⌈n / stride⌉`` outputs, as few zeros before as after."""
    n, padding = spatial_sizes(x, windows), windows.padding
    if padding == "SAME":
        m = tuple(-(-size // s) for size, s in zip(n, windows.stride, strict=True))
        total = [max(c - size, 0) for c, size in zip(windows._replace(outputs=m).span, n, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        before_after = tuple((e - 1, 0) if padding == "CAUSAL" else (0, 0) for e in windows.extent)
        pads = before_after if isinstance(padding, str) else padding
        room = [size + sum(p) - e for size, p, e in zip(n, pads, windows.extent, strict=True)]
        m = tuple(r // s + 1 for r, s in zip(room, windows.stride, strict=True))
        if windows.ceil_mode:  # a window for the rest, and none that starts behind the inputs
            starts = [size + before for size, (before, _) in zip(n, pads, strict=True)]
            m = tuple(min(-(-r // s) + 1, -(-b // s)) for r, s, b in zip(room, windows.stride, starts, strict=True))
    if min(m) < 1:
        raise LayerError(
            f"windows that reach over {windows.extent} do not fit into inputs of {n} with padding {padding!r}: "
            f"no output is left; take {'' if padding == 'SAME' else 'a smaller window, padding SAME, or '}larger inputs"
        )
    return windows._replace(inputs=n, outputs=m, low=tuple(b for b, _ in pads), after=tuple(a for _, a in pads))


def over_outputs(windows: Windows, y, more: tuple[int, ...]) -> Windows:
    """The windows whose outputs are ``y (B, *S, O)``; their inputs are what a transposed convolution gives.

    ``more`` is added to the size of each axis at its end.
    """
    m, padding = spatial_sizes(y, windows), windows.padding
    windows = windows._replace(outputs=m)
    if padding == "SAME":
        n = tuple(size * s for size, s in zip(m, windows.stride, strict=True))
        low = tuple(max(c - size, 0) // 2 for c, size in zip(windows.span, n, strict=True))
    else:
        pads = ((0, 0),) * len(m) if isinstance(padding, str) else padding
        n = tuple(c - sum(p) + q for c, p, q in zip(windows.span, pads, more, strict=True))
        low = tuple(before for before, _ in pads)
    if min(m) < 1 or min(n) < 1:
        raise LayerError(f"inputs of {m} with padding {padding!r} leave no output: the sizes would be {n}")
    return windows._replace(inputs=n, low=low)


def channels_first(x: jax.Array) -> jax.Array:
    """``(B, *S, C)`` as ``(C, *S, B)``."""
    return jnp.swapaxes(x, 0, -1)


def channels_last(x: jax.Array) -> jax.Array:
    """``(C, *S, B)`` as ``(B, *S, C)``."""
    return jnp.swapaxes(x, 0, -1)


def are_few(channels: int) -> bool:
    """Whether copies along spatial axes run over the examples instead: over so few channels a CPU is slow."""
    return platform() == "cpu" and channels < 8


def layout(x) -> tuple[Callable, Callable]:
    """What brings ``x (B, *S, C)`` into the order in which it is gone through, and what brings it back."""
    by_examples = len(x.shape) > 2 and are_few(x.shape[-1])
    return (channels_first, channels_last) if by_examples else (lambda x: x, lambda x: x)


def padded(x: jax.Array, windows: Windows, fill) -> jax.Array:
    """``x (C, *S, B)`` or ``(B, *S, C)`` with ``fill`` around it, as the windows want it."""
    spatial = ((low, high, 0) for low, high in zip(windows.low, windows.high, strict=True))
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), ((0, 0, 0), *spatial, (0, 0, 0)))


def along(windows: Windows, axis: int, k: int) -> slice:
    """Where position k of the kernel lies for every output of a padded axis."""
    start = k * windows.dilation[axis]
    return slice(start, start + (windows.outputs[axis] - 1) * windows.stride[axis] + 1, windows.stride[axis])


def taps(x: jax.Array, windows: Windows, fill) -> list[jax.Array]:
    """For each position of a window, in row-major order, what the outputs see there, in the layout of ``x``."""
    x = padded(x, windows, fill)
    return [x[place] for place in seen_places(windows)]


def seen_places(windows: Windows) -> list[tuple[slice, ...]]:
    """For each position of a window, in row-major order, the index of what the outputs see there."""
    positions = itertools.product(*(range(k) for k in windows.kernel))
    return [(slice(None), *(along(windows, axis, k) for axis, k in enumerate(p))) for p in positions]


def patches(x: jax.Array, windows: Windows) -> jax.Array:
    """``x (G, I, *S, B)``, padded, to ``(G, *kernel, I, *m, B)``: for every position of the kernel what outputs see.

    One axis after the other, so that kernels of h × w take h + w copies instead of h · w.
    """
    for axis in reversed(range(len(windows.kernel))):
        rest = (slice(None),) * (len(windows.kernel) - axis)
        x = jnp.stack([x[(..., along(windows, axis, k), *rest)] for k in range(windows.kernel[axis])], 1)
    return x


def crop(total: jax.Array, windows: Windows) -> jax.Array:
    """``(C, *span, B)`` without its padding, ``(C, *n, B)``."""
    spatial = ((-low, -high, 0) for low, high in zip(windows.low, windows.high, strict=True))
    return jax.lax.pad(total, jnp.zeros((), total.dtype), ((0, 0, 0), *spatial, (0, 0, 0)))


def fold(d: jax.Array, windows: Windows) -> jax.Array:
    """The transpose of gathering: ``d (*kernel, C, *m, B)`` added up where it was taken from, ``(C, *n, B)``."""
    rank, zero = len(windows.kernel), jnp.zeros((), d.dtype)
    if windows.stride == windows.extent == windows.kernel:  # each input in one window at most: nothing to add up
        if math.prod(windows.kernel) > 16:
            order = (rank, *(place for axis in range(rank) for place in (rank + 1 + axis, axis)), 2 * rank + 1)
            return crop(d.transpose(order).reshape(d.shape[rank], *windows.span, d.shape[-1]), windows)
        # stacked piece by piece, which XLA on CPU computes several times faster; the program grows with the kernel
        for axis in reversed(range(rank)):  # (..., *kernel, C, *m, B): the kernel's last axis goes behind its m
            parts = [jax.lax.index_in_dim(d, k, axis, keepdims=False) for k in range(windows.kernel[axis])]
            d = jnp.stack(parts, 2 * axis + 2)
            d = d.reshape(*d.shape[: 2 * axis + 1], windows.span[axis], *d.shape[2 * axis + 3 :])
        return crop(d, windows)

    count = math.prod(windows.kernel)
    positions = np.indices(windows.kernel).reshape(rank, count).T * np.asarray(windows.dilation)
    spread = [(m - 1) * s + 1 for m, s in zip(windows.outputs, windows.stride, strict=True)]
    inner = ((0, 0, 0), *((0, 0, step - 1) for step in windows.stride), (0, 0, 0))

    def add(total, at):  # in a loop, since XLA would else compute the whole sum anew wherever it is read
        part, start = at
        start = (0, *start, 0)
        sizes = (total.shape[0], *spread, total.shape[-1])
        part = jax.lax.pad(part, zero, inner) + jax.lax.dynamic_slice(total, start, sizes)
        return jax.lax.dynamic_update_slice(total, part, start), None

    total = jnp.zeros((d.shape[rank], *windows.span, d.shape[-1]), d.dtype)
    total, _ = jax.lax.scan(add, total, (d.reshape(count, *d.shape[rank:]), positions))
    return crop(total, windows)
