"""Images read at places that are themselves computed: samples on a grid, and the grid of an affine map.

Legend: B batch, S spatial axes, D their number, C channels, M axes of the grid, P its places, n size of an axis.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import described, require_counts
from fnet.core.numerics import wide
from fnet.layers.resizing import Method
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError

Padding = Literal["zeros", "border", "reflection"]
Corners = Literal["half_pixel", "align"]


def grid_sample(method: Method = "linear", *, padding: Padding = "zeros", corners: Corners = "half_pixel") -> Layer:
    """``(x (B, *S, C), grid (B, *M, D))`` to ``y (B, *M, C)``: x read at the D coordinates of each place, D 1 to 3.

    The grid's last axis goes from the last spatial axis to the first (x, y, z), as in PyTorch. −1 … 1 is the image: a
    coordinate g lies at p among the entries 0 to n − 1 of its axis, by ``corners``:

    - ``"half_pixel"``: ``p = ((g + 1) n − 1)/2``, entries are areas, and ±1 is the border of the outermost;
    - ``"align"``: ``p = (g + 1)(n − 1)/2``, entries are points, and ±1 are the outermost.

    ``y_m = Σ_j Π_a w(p_a − j_a) x_j``, by ``method``:

    - ``"nearest"``: the entry at p, rounded, halves to even;
    - ``"linear"``: ``w(d) = 1 − |d|``, two entries along each axis;
    - ``"cubic"``: four, by Keys' kernel with a = −0.75.

    What lies beyond the image is, by ``padding``, 0, the entry at the border, or the image reflected, at its border by
    half pixels and at its outermost entry where aligned, and then the entry at the border. Border and reflection move
    p into 0 … n − 1: the slope by g is 0 where p ends at 0 or n − 1, and changes its sign with each reflection. For the
    cubic they move the four entries, not p. At an entry, where linear has a kink, the slope is that to the right of p;
    nearest has slopes of 0.

    A coordinate that is not finite gives NaN, and adds nothing to dx. Weights and sums are in float32 at least; y has
    the dtype of x. Coordinates in bfloat16 are places to 1/256 of half the image: keep the grid in float32. Raises
    ValueError for other arguments, `LayerError` for shapes that do not fit, spatial axes of size 0 and what is not
    floating.

    PyTorch's ``grid_sample`` with channels last; ``mode`` "bilinear" is linear in 2-D and 3-D, "bicubic" 2-D alone, and
    ``align_corners`` is ``corners="align"``. There, what is not finite reads NaN, the border or 0, by mode and padding.
    Source: Jaderberg et al., arXiv:1506.02025; the cubic is Keys', see `resize`.

    >>> x = jnp.array([0.0, 4.0]).reshape(1, 2, 1)
    >>> grid = jnp.array([-1.0, -0.5, 0.0, 1.0]).reshape(1, 4, 1)
    >>> [grid_sample(padding=p).forward((), (), (x, grid))[0].ravel().tolist() for p in ("zeros", "border")]
    [[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 4.0]]
    """
    if method not in ("nearest", "linear", "cubic"):
        raise ValueError(f"grid_sample: method = {method!r}; expected 'nearest', 'linear' or 'cubic'")
    if padding not in ("zeros", "border", "reflection"):
        raise ValueError(f"grid_sample: padding = {padding!r}; expected 'zeros', 'border' or 'reflection'")
    require_corners("grid_sample", corners)

    def flat(x, grid):
        """``x (B, n₁ n₂ …, C)`` and, first axis first, the coordinates ``(B, P)`` of each; in the wider dtype."""
        dtype = wide(x.dtype, grid.dtype)
        places = grid.astype(dtype).reshape(len(grid), math.prod(grid.shape[1:-1]), grid.shape[-1])
        rows = x.astype(dtype).reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
        return rows, [places[..., a] for a in reversed(range(grid.shape[-1]))]

    def forward(_, pair):
        x, grid = require_pair(pair)
        rows, places = flat(x, grid)
        y = jnp.zeros((), rows.dtype)
        for ids, inside, w, _ in taps(places, x.shape[1:-1], method, padding, corners):
            y = y + product(w)[..., None] * read(rows, ids, inside)
        return y.reshape(*grid.shape[:-1], x.shape[-1]).astype(x.dtype), (x, grid)

    # y_m = Σ_j Π_a w_a x_j over the taps j of m, so dx_j = Σ_m Π_a w_a dy_m and, with w′ for dw/dg,
    # dg_ma = Σ_j w′_a Π_{b ≠ a} w_b ⟨dy_m, x_j⟩
    def backward(_, residuals, dy):
        x, grid = residuals
        rows, places = flat(x, grid)
        dy = dy.astype(rows.dtype).reshape(*places[0].shape, x.shape[-1])
        dx, dplaces = jnp.zeros_like(rows), [jnp.zeros_like(g) for g in places]
        for ids, inside, w, dw in taps(places, x.shape[1:-1], method, padding, corners):
            dx = add_up(dx, ids, jnp.where(inside[..., None], product(w)[..., None] * dy, 0))
            if method != "nearest":
                inner = (dy * read(rows, ids, inside)).sum(-1)
                for a in range(len(w)):
                    dplaces[a] = dplaces[a] + product([*w[:a], dw[a], *w[a + 1 :]]) * inner
        dgrid = jnp.stack(dplaces[::-1], -1).reshape(grid.shape)
        return (), (dx.reshape(x.shape).astype(x.dtype), dgrid.astype(grid.dtype))

    def init(key, pair):
        require_pair(pair)
        return ()

    return stateless("grid_sample", init, forward, backward, several=True)


def taps(places, sizes, method: Method, padding: Padding, corners: Corners) -> Iterator:
    """One after another, what every place reads: ids ``(B, P)`` of rows, whether they are in the image, and for each
    axis the weight and its derivative by the coordinate."""
    axes = [along(g, n, method, padding, corners) for g, n in zip(places, sizes, strict=True)]
    for chosen in itertools.product(*axes):
        j, w, dw = zip(*chosen, strict=True)
        inside, ids = jnp.ones(places[0].shape, bool), jnp.zeros(places[0].shape, jnp.int32)
        for at, n in zip(j, sizes, strict=True):
            there = (at >= 0) & (at <= n - 1)  # a NaN is not, and its weight is NaN
            inside, ids = inside & there, ids * n + jnp.where(there, at, 0).astype(jnp.int32)
        yield ids, inside, w, dw


def along(g: jax.Array, n: int, method: Method, padding: Padding, corners: Corners) -> list[tuple]:
    """The taps of one axis: each the entry as a number, which may lie outside, its weight and the weight's slope."""
    p, scale = (((g + 1) * n - 1) / 2, n / 2) if corners == "half_pixel" else ((g + 1) * (n - 1) / 2, (n - 1) / 2)
    p = p + 0 * p  # an infinity is NaN from here on
    if method == "cubic":
        first = jnp.floor(p)
        entries = [padded(first + k, n, padding, corners)[0] for k in (-1, 0, 1, 2)]
        return [(j, w, scale * dw) for j, (w, dw) in zip(entries, cubic(p - first), strict=True)]
    p, slope = padded(p, n, padding, corners)
    if method == "nearest":
        return [(jnp.round(p), jnp.where(jnp.isnan(p), jnp.nan, jnp.ones_like(p)), jnp.zeros_like(p))]
    first, slope = jnp.floor(p), scale * slope
    t = p - first
    return [(first, 1 - t, -slope), (first + 1, t, slope)]


def padded(p: jax.Array, n: int, padding: Padding, corners: Corners) -> tuple[jax.Array, jax.Array]:
    """Where p is read, 0 to n − 1 unless the padding is zeros, and the slope of that by p; a NaN stays one."""
    slope = jnp.ones_like(p)
    if padding == "zeros":
        return p, slope
    low, span = (-0.5, n) if corners == "half_pixel" else (0, n - 1)
    if padding == "reflection" and span:  # without a span all is one entry
        slope, p = jnp.where(p < low, -1, slope), jnp.where(p < low, low - p, p - low)
        p = jax.lax.rem(p, jnp.full_like(p, 2 * span))  # there and back
        slope, p = jnp.where(p < span, slope, -slope), low + jnp.where(p < span, p, 2 * span - p)
    slope = jnp.where((p <= 0) | (p >= n - 1), 0, slope)
    return jnp.where(p <= 0, 0, jnp.where(p >= n - 1, n - 1, p)), slope


def cubic(t: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Keys' four weights at distances ``1 + t, t, 1 − t, 2 − t``, a = −0.75, and their derivatives by t."""
    near, dnear = lambda d: (1.25 * d - 2.25) * d * d + 1, lambda d: (3.75 * d - 4.5) * d
    far, dfar = lambda d: ((-0.75 * d + 3.75) * d - 6) * d + 3, lambda d: (-2.25 * d + 7.5) * d - 6
    u = 1 - t
    return [(far(1 + t), dfar(1 + t)), (near(t), dnear(t)), (near(u), -dnear(u)), (far(1 + u), -dfar(1 + u))]


def product(factors: Sequence[jax.Array]) -> jax.Array:
    """Of at least one array."""
    return functools.reduce(operator.mul, factors)


def read(rows: jax.Array, ids: jax.Array, inside: jax.Array) -> jax.Array:
    """The rows ``(B, P, C)`` at these ids; 0 outside, where a NaN at the border does not reach."""
    found = jnp.take_along_axis(rows, ids[..., None], 1, mode="promise_in_bounds")
    return jnp.where(inside[..., None], found, 0)


def add_up(rows: jax.Array, ids: jax.Array, d: jax.Array) -> jax.Array:
    """``d (B, P, C)`` added to the rows at ids, the transpose of a gather."""
    return rows.at[jnp.arange(len(rows))[:, None], ids].add(d, mode="promise_in_bounds")


def require_pair(pair) -> tuple[jax.Array, jax.Array]:
    """The image and the grid, if they are."""
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(hasattr(a, "shape") for a in pair):
        raise LayerError(f"expected two arrays, (x (B, *S, C), grid (B, *M, D)), got {described(pair)}")
    x, grid = pair
    axes = len(x.shape) - 2
    if not 1 <= axes <= 3:
        raise LayerError(f"expected x (B, *S, C) with one to three spatial axes, got shape {tuple(x.shape)}")
    if len(grid.shape) < 2 or grid.shape[0] != x.shape[0] or grid.shape[-1] != axes:
        expected = f"({x.shape[0]}, *M, {axes})"
        raise LayerError(f"expected a grid {expected} for x {tuple(x.shape)}, got shape {tuple(grid.shape)}")
    if 0 in x.shape[1:-1]:
        raise LayerError(f"cannot sample {tuple(x.shape[1:-1])}: expected sizes of at least 1")
    for name, array in (("x", x), ("grid", grid)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise LayerError(f"expected a floating {name}, got {array.dtype}: convert it, say to float32")
    return x, grid


def require_corners(who: str, corners) -> None:
    """One of the two that say where ±1 is."""
    if corners not in ("half_pixel", "align"):
        raise ValueError(f"{who}: corners = {corners!r}; expected 'half_pixel' or 'align'")


def affine_grid(sizes: tuple[int, ...], *, corners: Corners = "half_pixel") -> Layer:
    """``θ (B, D, D + 1)`` to the grid ``(B, *sizes, D)`` for `grid_sample`: ``grid_m = θ [c_m, 1]``.

    ``c_m`` are the coordinates of output m in an image of ``sizes``, last axis first, so that θ = [1, 0] (the identity
    and a column of zeros) reads the image as it is: ``(2 i + 1)/n − 1`` of entry i along an axis by half pixels, and
    ``2 i/(n − 1) − 1`` where aligned, 0 for n = 1. Sums are taken in float32 at least.

    Raises ValueError for other arguments, `LayerError` for a θ of another shape or that is not floating. PyTorch's
    ``affine_grid``, whose ``size`` has batch and channels, too. Source: Jaderberg et al., arXiv:1506.02025.

    >>> theta = jnp.array([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]])  # half an image to the right
    >>> affine_grid((1, 2)).forward((), (), theta)[0].tolist()
    [[[[0.0, 0.0], [1.0, 0.0]]]]
    """
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not 1 <= len(sizes) <= 3:
        raise ValueError(f"affine_grid: sizes = {sizes!r}; expected a tuple, the sizes of one to three spatial axes")
    require_counts("affine_grid", **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
    require_corners("affine_grid", corners)
    sizes = tuple(map(operator.index, sizes))
    axes = len(sizes)

    def check(key, theta):
        if theta.ndim != 3 or theta.shape[1:] != (axes, axes + 1):
            raise LayerError(f"expected theta (B, {axes}, {axes + 1}), got shape {tuple(theta.shape)}")
        if not jnp.issubdtype(theta.dtype, jnp.floating):
            raise LayerError(f"expected a floating theta, got {theta.dtype}: convert it, say to float32")
        return ()

    def places(dtype):
        """``[c, 1] (*sizes, D + 1)``."""
        spread = [2 * np.arange(n) - (n - 1) for n in sizes]  # over n or n − 1
        spread = [a / (n if corners == "half_pixel" else max(n - 1, 1)) for a, n in zip(spread, sizes, strict=True)]
        c = jnp.meshgrid(*(jnp.asarray(a, dtype) for a in spread), indexing="ij")
        return jnp.stack([*c[::-1], jnp.ones(sizes, dtype)], -1)

    def forward(_, theta):
        check(None, theta)
        dtype = wide(theta.dtype)
        grid = jnp.einsum("...k,bdk->b...d", places(dtype), theta.astype(dtype), precision="highest")
        return grid.astype(theta.dtype), ()

    def backward(_, residuals, dgrid):  # dθ = Σ_m dgrid_m [c_m, 1]ᵀ
        dtype = wide(dgrid.dtype)
        dtheta = jnp.einsum("b...d,...k->bdk", dgrid.astype(dtype), places(dtype), precision="highest")
        return (), dtheta.astype(dgrid.dtype)

    return stateless("affine_grid", check, forward, backward)
