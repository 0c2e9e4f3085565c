"""What stands around the entries of spatial axes: numbers, or what the entries themselves say. No parameters.

Legend: B batch, S spatial axes, C channels; n size of an axis.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from fnet.core.numerics import wide
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError

MODES = ("constant", "reflect", "replicate", "circular")


def pad(
    widths: Sequence[tuple[int, int]],
    mode: Literal["constant", "reflect", "replicate", "circular"] = "constant",
    value=0.0,
) -> Layer:
    """``x (B, *S, C)`` with as many entries before and after each spatial axis as its pair in ``widths`` says.

    Of ``a b c d``, padded by ``(2, 2)``:

    - ``"constant"``: ``v v a b c d v v``, v the ``value``; a negative width takes entries away;
    - ``"reflect"``: ``c b a b c d c b``, so widths are less than n;
    - ``"replicate"``: ``a a a b c d d d``;
    - ``"circular"``: ``c d a b c d a b``, widths n at most.

    One axis after the other, so that corners are those of NumPy and PyTorch. Gradients of what is copied are summed in
    float32 at least. NumPy calls the last two ``"edge"`` and ``"wrap"``; `torch.nn.functional.pad` takes widths in one
    row, the last axis first. Raises ValueError for other arguments, `LayerError` for inputs of another rank or dtype or
    too small for the widths.

    >>> x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1)
    >>> pad(((2, 1),), mode="reflect").forward((), (), x)[0].ravel().tolist()
    [3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0]
    >>> pad(((1, -1),), value=9.0).forward((), (), x)[0].ravel().tolist()
    [9.0, 1.0, 2.0, 3.0]
    """
    if mode not in MODES:
        raise ValueError(f"pad: mode = {mode!r}; expected one of {MODES}")
    pairs = checked_widths(widths, least=None if mode == "constant" else 0)
    if mode != "constant" and not (isinstance(value, int | float) and value == 0):
        raise ValueError(f"pad: value = {value!r} with mode {mode!r}, which copies entries; expected mode 'constant'")

    def init(key, x):
        check_inputs(x, pairs, mode)
        return ()

    def forward(_, x):
        check_inputs(x, pairs, mode)
        empty = jnp.zeros((0, *x.shape), x.dtype)
        if mode == "constant":
            return jax.lax.pad(x, jnp.asarray(value, x.dtype), around(pairs)), empty
        y = x.astype(wide(x.dtype))  # autodiff adds up what the copies of an entry give to it
        for axis, (before, after) in enumerate(pairs, 1):
            n = y.shape[axis]
            if mode == "reflect":
                edges = jnp.flip(part(y, axis, 1, before), axis), jnp.flip(part(y, axis, n - 1 - after, after), axis)
            elif mode == "circular":
                edges = part(y, axis, n - before, before), part(y, axis, 0, after)
            else:
                edges = (jnp.repeat(part(y, axis, at, 1), w, axis) for at, w in ((0, before), (n - 1, after)))
            first, last = edges
            y = jnp.concatenate([first, y, last], axis)
        return y.astype(x.dtype), empty

    def backward(_, empty, dy):
        # y_i = x_s(i), so dx_j = Σ_(i: s(i) = j) dy_i along each axis: copies give to where they were copied from, and
        # y_i = value gives to none
        if mode == "constant":
            return (), jax.lax.pad(dy, jnp.zeros((), dy.dtype), around([(-before, -after) for before, after in pairs]))
        d = dy.astype(wide(dy.dtype))
        for axis, (before, after) in enumerate(pairs, 1):
            n = empty.shape[1 + axis]
            first, d, last = (part(d, axis, *at) for at in ((0, before), (before, n), (before + n, after)))
            if mode == "reflect":
                edges = (jnp.flip(first, axis), 1), (jnp.flip(last, axis), n - 1 - after)
            elif mode == "circular":
                edges = (first, n - before), (last, 0)
            else:
                edges = (first.sum(axis, keepdims=True), 0), (last.sum(axis, keepdims=True), n - 1)
            for edge, start in edges:
                d = d + put(edge, axis, start, n)
        return (), d.astype(dy.dtype)

    return stateless("pad", init, forward, backward)


def part(x: jax.Array, axis: int, start: int, size: int) -> jax.Array:
    """``size`` entries of an axis."""
    return jax.lax.slice_in_dim(x, start, start + size, axis=axis)


def put(x: jax.Array, axis: int, start: int, n: int) -> jax.Array:
    """The transpose of `part`: the entries where they were taken from, zeros elsewhere."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (start, n - start - x.shape[axis], 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), widths)


def around(pairs) -> list[tuple[int, int, int]]:
    """The widths of all axes, as `jax.lax.pad` wants them."""
    return [(0, 0, 0), *((before, after, 0) for before, after in pairs), (0, 0, 0)]


def checked_widths(widths, least: int | None) -> tuple[tuple[int, int], ...]:
    """A pair of whole numbers for each axis."""
    try:
        pairs = tuple((operator.index(before), operator.index(after)) for before, after in widths)
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or (least is not None and min(min(pair) for pair in pairs) < least):
        which = "of whole numbers" if least is None else "of at least 0, unless mode is 'constant'"
        raise ValueError(
            f"pad: widths = {widths!r}; expected a pair (before, after) {which} for each spatial axis, "
            "such as ((1, 1), (1, 1)) for (B, H, W, C)"
        )
    return pairs


def check_inputs(x, pairs, mode: str) -> None:
    """Floating inputs of that rank, large enough for what is copied and for what is taken away."""
    if len(x.shape) != len(pairs) + 2:
        raise LayerError(f"expected a batch axis, {len(pairs)} to pad and channels, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError(f"expected floating inputs, got {x.dtype}: convert them, say to float32")
    for n, (before, after) in zip(x.shape[1:-1], pairs, strict=True):
        least = {
            "constant": 1 - min(before, 0) - min(after, 0),
            "reflect": 1 + max(before, after),
            "replicate": 1,
            "circular": max(before, after, 1),
        }[mode]
        if n < least:
            raise LayerError(
                f"expected at least {least} entries for widths {(before, after)} in mode {mode!r}, got spatial axes of "
                f"{tuple(x.shape[1:-1])}: pad less or give larger inputs"
            )
