"""Pooling: the largest entry or the mean of each window or part, channel by channel. No layer has parameters.

Legend: B batch, T time, D H W depth, height and width, S spatial axes (T; H and W; or D, H and W), C channels,
K positions of a window, n, m sizes of an input's and an output's axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import is_whole, require, require_array
from fnet.core.numerics import wide
from fnet.layers.masks import split_mask
from fnet.layers.windows import (
    Padding,
    Windows,
    fold,
    layout,
    over_inputs,
    seen_places,
    taps,
    windows_of,
)
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


def max_pool(
    window: tuple[int, ...], *, stride=None, dilation=1, padding: Padding = "VALID", ceil_mode: bool = False
) -> Layer:
    """``y_o = max_k x_(o·stride + k·dilation − low)`` over ``(B, T, C)``, ``(B, H, W, C)`` or ``(B, D, H, W, C)``.

    ``window`` is a tuple with one size for each spatial axis, ``stride`` the same or a whole number, by default the
    window, ``dilation`` too; ``padding`` is ``"VALID"``, ``"SAME"`` or pairs ``(before, after)``, and what is padded
    never counts. The whole gradient goes to the first of equal entries in row-major order, by hand and by autodiff. A
    NaN passes, and the first takes the gradient (in PyTorch the last).

    Sizes are those of `conv`: a rest that no whole window fits into is left out. With ``ceil_mode`` one window more
    sees it and reaches beyond the padding, unless it would start behind the inputs (PyTorch the same, ONNX since its
    version 22); not with ``"SAME"``, which leaves out nothing. Errors are those of `conv`; a window that lies in the
    padding alone is refused.

    >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> max_pool((2, 2)).forward((), (), x)[0].reshape(2, 2).tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    >>> max_pool((3, 3), ceil_mode=True).forward((), (), x)[0].reshape(2, 2).tolist()
    [[10.0, 11.0], [14.0, 15.0]]
    """
    stride = window if stride is None else stride
    windows = windows_of("max_pool", window, stride, dilation, padding, "window", ceil_mode)

    def forward(_, x):
        over, (lay_out, back) = over_true_inputs(windows, x), layout(x)
        # wide, since autodiff adds up what windows that overlap give to an entry
        entries, true = taps(lay_out(x).astype(wide(x.dtype)), over, -jnp.inf), true_entries(over)
        y, seen = entries[0], true[0]
        first = jnp.zeros(y.shape, jnp.uint8 if len(entries) <= 256 else jnp.int32)  # the position that y comes from
        for k, (entry, is_true) in enumerate(zip(entries[1:], true[1:], strict=True), 1):
            keep = (y >= entry) | jnp.isnan(y)
            if not (seen & is_true).all():  # of two −∞ the one that is not padding
                keep = jnp.where(seen & is_true, keep, seen)
            y, seen = jnp.where(keep, y, entry), seen | is_true
            first = jnp.where(keep, first, jnp.asarray(k, first.dtype))
        # beside the positions an empty array that carries the shape of x
        return back(y.astype(x.dtype)), (first, jnp.zeros((0, *x.shape), x.dtype))

    def backward(_, residuals, dy):
        # ∂y_o / ∂x_(os+kd) = [k is the first position at which the window of o has its maximum]
        (first, empty), (lay_out, back) = residuals, layout(dy)
        over = over_true_inputs(windows, jax.ShapeDtypeStruct(empty.shape[1:], empty.dtype))
        positions = np.arange(math.prod(over.kernel)).reshape(*over.kernel, *(1,) * dy.ndim)
        each = (None,) * len(over.kernel)
        share = lay_out(dy).astype(wide(dy.dtype))[each]
        d = jnp.where(first[each] == jnp.asarray(positions, first.dtype), share, 0)
        return (), back(fold(d, over)).astype(dy.dtype)

    return stateless("max_pool", lambda key, x: nothing(over_true_inputs(windows, x)), forward, backward)


def avg_pool(
    window: tuple[int, ...],
    *,
    stride=None,
    dilation=1,
    padding: Padding = "VALID",
    ceil_mode: bool = False,
    count_padding: bool = False,
    divisor: float | None = None,
) -> Layer:
    """``y_o = Σ_k x_(o·stride + k·dilation − low) / count_o``, the mean of each window.

    ``count_o`` is the number of true entries in the window, as in Keras; with ``count_padding=True`` padded zeros count
    too, as by default in PyTorch (``count_include_pad``), but never what ``ceil_mode`` sees beyond them. A ``divisor``
    takes the place of all counts (``divisor_override``; 1 gives sums). Sums are taken in float32 at least. Other
    arguments and errors are those of `max_pool`.

    >>> x = jnp.ones((1, 3, 1))
    >>> avg_pool((2,), padding="SAME").forward((), (), x)[0].ravel().tolist()
    [1.0, 1.0]
    >>> avg_pool((2,), padding="SAME", count_padding=True).forward((), (), x)[0].ravel().tolist()
    [1.0, 0.5]
    """
    stride = window if stride is None else stride
    windows = windows_of("avg_pool", window, stride, dilation, padding, "window", ceil_mode)

    def counts(over: Windows, dtype):
        """What each output's sum is divided by, ``(1, *m, 1)``, or one number for all."""
        if divisor is not None:
            return jnp.asarray(divisor, dtype)
        return jnp.asarray(np.sum(true_entries(over, count_padding), axis=0), dtype)

    def forward(_, x):
        over, dtype, (lay_out, back) = over_true_inputs(windows, x), wide(x.dtype), layout(x)
        total = functools.reduce(jnp.add, taps(lay_out(x).astype(dtype), over, 0))
        return back((total / counts(over, dtype)).astype(x.dtype)), jnp.zeros((0, *x.shape), x.dtype)

    def backward(_, empty, dy):  # ∂y_o / ∂x_(os+kd) = 1 / count_o
        over, dtype = over_true_inputs(windows, jax.ShapeDtypeStruct(empty.shape[1:], empty.dtype)), wide(dy.dtype)
        lay_out, back = layout(dy)
        share = lay_out(dy).astype(dtype) / counts(over, dtype)
        d = jnp.broadcast_to(share, (*over.kernel, *share.shape))
        return (), back(fold(d, over).astype(dy.dtype))

    return stateless("avg_pool", lambda key, x: nothing(over_true_inputs(windows, x)), forward, backward)


def lp_pool(
    window: tuple[int, ...], p=2.0, *, stride=None, dilation=1, padding: Padding = "VALID", ceil_mode: bool = False
) -> Layer:
    """``y_o = (Σ_k |x_(o·stride + k·dilation − low)|^p)^(1/p)``, the p-norm of each window; its slope is 0 where y is.

    ``p`` is at least 1 and may be traced. Sums are taken in float32 at least; powers may overflow where y does not.
    Other arguments and errors are those of `max_pool`. ONNX' LpPool the same; PyTorch's ``LPPool`` takes powers with
    their signs, so that it agrees for an even p alone.

    >>> lp_pool((2,)).forward((), (), jnp.array([3.0, -4.0]).reshape(1, 2, 1))[0].ravel().tolist()
    [5.0]
    """
    require(p >= 1, f"lp_pool: p = {p}; expected a number of at least 1")
    stride = window if stride is None else stride
    windows = windows_of("lp_pool", window, stride, dilation, padding, "window", ceil_mode)

    def forward(_, x):
        over, dtype, (lay_out, back) = over_true_inputs(windows, x), wide(x.dtype), layout(x)
        power = jnp.asarray(p, dtype)
        entries = jnp.abs(lay_out(x).astype(dtype)) ** power
        total = functools.reduce(jnp.add, taps(entries, over, 0))
        y = jnp.where(total == 0, 0, jnp.where(total == 0, 1, total) ** (1 / power))
        return back(y.astype(x.dtype)), (x, y)

    def backward(_, residuals, dy):  # ∂y_o / ∂x = sign x (|x| / y_o)^(p − 1), added up over the windows that see x
        (x, y), (lay_out, back) = residuals, layout(dy)
        over, dtype = over_true_inputs(windows, x), wide(dy.dtype)
        power = jnp.asarray(p, dtype) - 1
        share = lay_out(dy).astype(dtype) * jnp.where(y == 0, 0, jnp.where(y == 0, 1, y) ** -power)
        d = fold(jnp.broadcast_to(share, (*over.kernel, *share.shape)), over)
        first = lay_out(x).astype(dtype)
        return (), back((jnp.sign(first) * jnp.abs(first) ** power * d).astype(dy.dtype))

    return stateless("lp_pool", lambda key, x: nothing(over_true_inputs(windows, x)), forward, backward)


def adaptive_max_pool(sizes: tuple[int, ...]) -> Layer:
    """``y (B, *sizes, C)``, the largest entry of each part of ``x (B, *S, C)``; parts are those of `adaptive_avg_pool`.

    Ties and NaN are as in `max_pool`.

    >>> x = jnp.arange(5.0).reshape(1, 5, 1)
    >>> adaptive_max_pool((2,)).forward((), (), x)[0].ravel().tolist()
    [2.0, 4.0]
    """
    sizes = checked_sizes("adaptive_max_pool", sizes)

    def forward(_, x):
        shape = shape_to_part(x, sizes)
        largest = jax.lax.stop_gradient(x)
        first = jnp.broadcast_to(jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(1, *shape, 1), x.shape)
        for axis, m in reversed(list(enumerate(sizes, 1))):  # the last first, so that ties go in row-major order
            entries = in_parts(largest, axis, m, -jnp.inf)
            place = jnp.argmax(entries, axis + 1, keepdims=True)
            first = jnp.take_along_axis(in_parts(first, axis, m, 0), place, axis + 1).squeeze(axis + 1)
            largest = entries.max(axis + 1)
        flat, places = (a.reshape(a.shape[0], math.prod(a.shape[1:-1]), a.shape[-1]) for a in (x, first))
        y = jnp.take_along_axis(flat.astype(wide(x.dtype)), places, 1).reshape(first.shape)
        return y.astype(x.dtype), (places, jnp.zeros((0, *x.shape), x.dtype))

    def backward(_, residuals, dy):
        # ∂y_i / ∂x_j = [j is the first place of the maximum of part i], for each example and channel
        places, empty = residuals
        shape, d = empty.shape[1:], dy.astype(wide(dy.dtype)).reshape(places.shape)
        add = lambda d, places: jnp.zeros(math.prod(shape[1:-1]), d.dtype).at[places].add(d)  # noqa: E731
        return (), jax.vmap(jax.vmap(add, -1, -1))(d, places).reshape(shape).astype(dy.dtype)

    return stateless("adaptive_max_pool", lambda key, x: nothing(shape_to_part(x, sizes)), forward, backward)


def adaptive_avg_pool(sizes: tuple[int, ...]) -> Layer:
    """``y (B, *sizes, C)``, the mean of each part of ``x (B, *S, C)``, whatever the size of its spatial axes.

    Of n entries along an axis, part i of m holds those from ``⌊i·n/m⌋`` to before ``⌈(i + 1)·n/m⌉``: neighbours share
    an entry at most, and none where m divides n; where m > n entries are repeated. PyTorch the same. ``sizes`` is a
    tuple with one m for each spatial axis. Sums are taken in float32 at least.

    Raises ValueError for sizes that are not whole numbers of at least 1, `LayerError` for inputs of another rank or
    dtype, or without places.

    >>> x = jnp.arange(5.0).reshape(1, 5, 1)
    >>> adaptive_avg_pool((2,)).forward((), (), x)[0].ravel().tolist()
    [1.0, 3.0]
    """
    sizes = checked_sizes("adaptive_avg_pool", sizes)

    def forward(_, x):
        shape, y = shape_to_part(x, sizes), x.astype(wide(x.dtype))
        for axis, (n, m) in enumerate(zip(shape, sizes, strict=True), 1):
            y = in_parts(y, axis, m, 0).sum(axis + 1) / part_counts(n, m, axis, y)
        return y.astype(x.dtype), jnp.zeros((0, *x.shape), x.dtype)

    def backward(_, empty, dy):
        # along each axis ∂y_i / ∂x_j = 1 / count_i where part i of m holds j: ⌊i n/m⌋ ≤ j < ⌈(i + 1) n/m⌉, that is
        # ⌊j m/n⌋ ≤ i < ⌈(j + 1) m/n⌉. So dx_j is the sum of dy_i / count_i over part j of n
        d = dy.astype(wide(dy.dtype))
        for axis, (n, m) in enumerate(zip(empty.shape[2:-1], sizes, strict=True), 1):
            d = in_parts(d / part_counts(n, m, axis, d), axis, n, 0).sum(axis + 1)
        return (), d.astype(dy.dtype)

    return stateless("adaptive_avg_pool", lambda key, x: nothing(shape_to_part(x, sizes)), forward, backward)


def global_max_pool() -> Layer:
    """``y (B, C)``, the largest entry of each channel of ``x (B, *S, C)``; ties and NaN as in `max_pool`.

    Of ``(x, mask)``, with a mask ``(B, *S)``, the largest where it is True; 0, with no gradient, where it never is.
    """

    def forward(_, x):
        x, mask = split_mask(x)
        entries, counted = one_spatial_axis(x), counted_places(x, mask)
        first = jnp.argmax(entries if counted is None else jnp.where(counted, entries, -jnp.inf), 1, keepdims=True)
        chosen = places(entries) == first
        chosen = chosen if counted is None else chosen & counted  # of −∞ alone the first may be padding
        return jnp.where(chosen, entries, 0).sum(1), (first, counted, jnp.zeros((0, *x.shape), x.dtype))

    def backward(_, residuals, dy):  # ∂y / ∂x_s = [s is the first place of the maximum]
        first, counted, empty = residuals
        shape = empty.shape[1:]
        entries = jax.ShapeDtypeStruct((shape[0], math.prod(shape[1:-1]), shape[-1]), dy.dtype)
        chosen = places(entries) == first
        dx = jnp.where(chosen if counted is None else chosen & counted, dy[:, None], 0).reshape(shape)
        return (), dx if counted is None else (dx, None)

    return stateless("global_max_pool", init_of_places, forward, backward, several=True)


def global_avg_pool(*, keepdims: bool = False) -> Layer:
    """``y (B, C)``, the mean of each channel of ``x (B, *S, C)``, summed in float32 at least.

    Of ``(x, mask)``, with a mask ``(B, *S)``, the mean of the places where it is True; 0 where it never is.
    With ``keepdims`` ``y`` is ``(B, 1, ..., C)``, of as many axes as ``x``.

    >>> x, mask = jnp.array([[[1.0], [3.0], [8.0]]]), jnp.array([[True, True, False]])
    >>> print(global_avg_pool().forward((), (), (x, mask))[0], global_avg_pool().forward((), (), x)[0])
    [[2.]] [[4.]]
    """

    def forward(_, x):
        x, mask = split_mask(x)
        entries, counted, empty = one_spatial_axis(x), counted_places(x, mask), jnp.zeros((0, *x.shape), x.dtype)
        if counted is None:
            mean = entries.mean(1, dtype=wide(x.dtype))
        else:
            total = jnp.where(counted, entries, 0).sum(1, dtype=wide(x.dtype))
            mean = total / number_of(counted, total.dtype)
        y = mean.astype(x.dtype)
        return y.reshape(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1]) if keepdims else y, (counted, empty)

    def backward(_, residuals, dy):  # ∂y / ∂x_s = 1 / number of places, 0 at those that are not counted
        counted, empty = residuals
        shape = empty.shape[1:]
        d = dy.reshape(shape[0], shape[-1]).astype(wide(dy.dtype))
        if counted is None:
            share = (d / math.prod(shape[1:-1])).astype(dy.dtype)
            return (), jnp.broadcast_to(share.reshape(shape[0], *(1,) * (len(shape) - 2), shape[-1]), shape)
        share = (d / number_of(counted, d.dtype)).astype(dy.dtype)
        return (), (jnp.where(counted, share[:, None], 0).reshape(shape), None)

    return stateless("global_avg_pool", init_of_places, forward, backward, several=True)


def init_of_places(key, x) -> tuple:
    """No parameters, for inputs that have places."""
    return nothing(one_spatial_axis_of(split_mask(x)[0]))


def counted_places(x: jax.Array, mask) -> jax.Array | None:
    """A mask ``(B, *S)`` over the places of ``x (B, *S, C)`` as ``(B, S, 1)``."""
    if mask is None:
        return None
    if mask.shape != x.shape[:-1]:
        raise LayerError(f"expected a mask of shape {x.shape[:-1]}, one for each place, got {mask.shape}")
    return mask.reshape(*one_spatial_axis_of(x)[:2], 1)


def number_of(counted: jax.Array, dtype) -> jax.Array:
    """How many places count, ``(B, 1)``, at least 1."""
    return jnp.maximum(counted.sum(1, dtype=dtype), 1)


def over_true_inputs(windows: Windows, x) -> Windows:
    """The windows that lie on ``x``, each with a true entry in it."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError(f"expected floating inputs, got {x.dtype}: convert them, say to float32")
    over = over_inputs(windows, x)
    if not np.any(true_entries(over), axis=0).all():
        raise LayerError(f"some windows of {over.kernel} see nothing but padding: pad less than {over.padding!r}")
    return over


def true_entries(over: Windows, or_padded: bool = False) -> list[np.ndarray]:
    """For each position of a window whether what an output sees there is an input, ``(1, *m, 1)`` each.

    With ``or_padded`` whether it is an input or padded; ``ceil_mode`` sees beyond both.
    """
    pads = [(low, after) if or_padded else (0, 0) for low, after in zip(over.low, over.after, strict=True)]
    rest = [(low - p, max(high - q, 0)) for low, high, (p, q) in zip(over.low, over.high, pads, strict=True)]
    inside = np.ones([n + sum(p) for n, p in zip(over.inputs, pads, strict=True)], bool)
    inside = np.pad(inside, rest)[None, ..., None]
    return [inside[place] for place in seen_places(over)]


def checked_sizes(what: str, given) -> tuple[int, ...]:
    """How many parts each spatial axis has."""
    if not isinstance(given, Sequence) or not given or not all(is_whole(size) for size in given):
        raise ValueError(
            f"{what}: sizes = {given!r}; expected a tuple, one whole number of at least 1 for each spatial axis, "
            "such as (7, 7) for (B, H, W, C)"
        )
    return tuple(map(int, given))


def shape_to_part(x, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the spatial axes of ``x (B, *S, C)``."""
    one_spatial_axis_of(x)
    if len(x.shape) != len(sizes) + 2:
        raise LayerError(f"expected a batch axis, {len(sizes)} spatial and channels for {sizes}, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError(f"expected floating inputs, got {x.dtype}: convert them, say to float32")
    return tuple(x.shape[1:-1])


def part_ends(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of m parts of n entries begins, and before what it ends."""
    parts = np.arange(m)
    return parts * n // m, -(-(parts + 1) * n // m)


def part_counts(n: int, m: int, axis: int, like: jax.Array) -> jax.Array:
    """How many entries each part holds, along ``axis``, in the rank and dtype of ``like``."""
    begin, end = part_ends(n, m)
    return jnp.asarray((end - begin).reshape(-1, *(1,) * (like.ndim - axis - 1)), like.dtype)[(None,) * axis]


def in_parts(x: jax.Array, axis: int, m: int, fill) -> jax.Array:
    """An axis of n entries as two: m parts, and what each holds, with ``fill`` behind it where others hold more."""
    n = x.shape[axis]
    if n % m == 0:
        return x.reshape(*x.shape[:axis], m, n // m, *x.shape[axis + 1 :])
    begin, end = part_ends(n, m)
    place = begin[:, None] + np.arange((end - begin).max())
    held = (place < end[:, None]).reshape(*(1,) * axis, *place.shape, *(1,) * (x.ndim - axis - 1))
    return jnp.where(held, jnp.take(x, np.minimum(place, n - 1), axis, mode="clip"), jnp.asarray(fill, x.dtype))


def one_spatial_axis_of(x) -> tuple[int, int, int]:
    """The shape ``(B, S, C)`` of ``x (B, *S, C)``, all its places along one axis."""
    require_array(x)
    if len(x.shape) < 3 or 0 in x.shape[1:-1]:
        raise LayerError(f"expected a batch axis, places and channels, such as (B, H, W, C), got shape {x.shape}")
    return x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]


def one_spatial_axis(x: jax.Array) -> jax.Array:
    """``x (B, *S, C)`` as ``(B, S, C)``."""
    return x.reshape(one_spatial_axis_of(x))


def places(entries) -> jax.Array:
    """The number of each place, ``(1, S, 1)``."""
    return jnp.arange(entries.shape[1])[None, :, None]


def nothing(_) -> tuple:
    """No parameters."""
    return ()
