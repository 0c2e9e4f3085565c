"""Other sizes for the spatial axes: interpolation, and channels moved to space and back. No layer has parameters.

Legend: B batch, S spatial axes, C channels, n, m sizes of an input's and an output's axis, r factor, k spatial axes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import is_whole, require_counts
from fnet.core.numerics import wide
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError

Method = Literal["nearest", "linear", "cubic"]
Corners = Literal["half_pixel", "align", "asymmetric"]
Rounding = Literal["half_up", "half_down", "floor", "ceil"]


def resize(
    sizes: tuple[int, ...] | None = None,
    *,
    scale=None,
    method: Method = "linear",
    corners: Corners = "half_pixel",
    rounding: Rounding | None = None,
    antialias: bool = False,
    keep_scale: bool = False,
) -> Layer:
    """``x (B, *S, C)`` at other sizes, one to three spatial axes: ``y_o = Σ_j W_oj x_j`` along each, C untouched.

    Either ``sizes``, a tuple with the new size of each axis, or ``scale``, a number or one for each axis:
    ``m = ⌊n · scale⌋``. What output o reads lies at ``s`` among the inputs 0 to n − 1, by ``corners``:

    - ``"half_pixel"``: ``s = (o + ½) n/m − ½``, entries are areas, and both images have the same border;
    - ``"align"``: ``s = o (n − 1)/(m − 1)``, entries are points, and the outermost of both are the same (0 for m = 1);
    - ``"asymmetric"``: ``s = o n/m``, entries are areas read at their first corner.

    ``method``, with ``t = s − ⌊s⌋``; entries beyond the border are those at the border:

    - ``"nearest"``: ``x_⌊s + ½⌋``, and ``x_⌊s⌋`` where asymmetric; or by the ``rounding`` of s that is named, where
      ``"half_down"`` is ``⌈s − ½⌉``;
    - ``"linear"``: ``(1 − t) x_⌊s⌋ + t x_(⌊s⌋ + 1)``;
    - ``"cubic"``: the four nearest by Keys' kernel with a = −0.75.

    ``antialias`` is for linear by half pixels: where m < n the triangle is n/m times as wide, so that every input
    counts. Sums are taken in float32 at least. Linear and cubic are products with W: a NaN or an infinity reaches all
    entries of its rows and columns. Raises ValueError for arguments that do not fit together, `LayerError` for inputs
    of another rank, inputs that are not floating, and sizes of 0.

    | here | PyTorch's ``interpolate`` | ONNX ``Resize`` | `jax.image.resize` | Keras |
    |---|---|---|---|---|
    | linear | ``bilinear`` and its like | ``linear``, ``half_pixel`` | ``antialias=False`` | ``bilinear`` |
    | linear, align | ``align_corners=True`` | ``align_corners`` | | |
    | linear, antialias | ``antialias=True`` | and ``exclude_outside=1`` | ``linear``, as it is | ``antialias=True`` |
    | cubic | ``bicubic`` | ``cubic`` | other: a = −½ | other: a = −½ |
    | nearest, half_down | | ``round_prefer_floor``, its default | | |
    | nearest | ``nearest-exact`` | ``round_prefer_ceil`` | ``nearest`` | ``nearest`` |
    | nearest, asymmetric | ``nearest`` | ``asymmetric``, ``floor`` | | |

    Where ``n · scale`` is not whole, n/m is that of the sizes, or with ``keep_scale`` 1/scale, as in ONNX, and in
    PyTorch unless told ``recompute_scale_factor=True``. Source: Keys, "Cubic convolution interpolation for digital
    image processing", 1981.

    >>> x = jnp.array([0.0, 4.0]).reshape(1, 2, 1)
    >>> [resize((4,), corners=c).forward((), (), x)[0].ravel().tolist() for c in ("half_pixel", "asymmetric")]
    [[0.0, 1.0, 3.0, 4.0], [0.0, 2.0, 4.0, 4.0]]
    """
    if (sizes is None) == (scale is None):
        raise ValueError(f"resize: sizes = {sizes!r} and scale = {scale!r}; expected one of the two")
    if sizes is not None:
        if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not 1 <= len(sizes) <= 3:
            raise ValueError(f"resize: sizes = {sizes!r}; expected a tuple, the new size of one to three spatial axes")
        require_counts("resize", **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
        sizes = tuple(map(operator.index, sizes))
    scales = scale if isinstance(scale, tuple | list) else [scale] * 3
    if scale is not None and not (1 <= len(scales) <= 3 and all(map(is_scale, scales))):
        raise ValueError(f"resize: scale = {scale!r}; expected a number above 0, or one for each of up to three axes")
    if method not in ("nearest", "linear", "cubic"):
        raise ValueError(f"resize: method = {method!r}; expected 'nearest', 'linear' or 'cubic'")
    if corners not in ("half_pixel", "align", "asymmetric"):
        raise ValueError(f"resize: corners = {corners!r}; expected 'half_pixel', 'align' or 'asymmetric'")
    if keep_scale and (scale is None or corners == "align"):
        raise ValueError(f"resize: keep_scale with scale = {scale} and {corners!r}; expected a scale, not aligned")
    if rounding is not None and (method != "nearest" or rounding not in ("half_up", "half_down", "floor", "ceil")):
        expected = "None, or with 'nearest' one of 'half_up', 'half_down', 'floor' and 'ceil'"
        raise ValueError(f"resize: rounding = {rounding!r} with {method!r}; expected {expected}")
    if antialias and (method, corners) != ("linear", "half_pixel"):
        raise ValueError(f"resize: antialias with {method!r} and {corners!r}; expected 'linear' and 'half_pixel'")

    ranks = (1, 2, 3) if sizes is None and scales is not scale else (len(sizes or scales),)

    def resized(x) -> dict[int, tuple[int, int, Fraction]]:
        """The axes whose size changes, each with n, m and the inputs to an output, n/m."""
        if len(x.shape) - 2 not in ranks:
            wanted = " or ".join(map(str, ranks))
            raise LayerError(f"expected (B, *S, C) with {wanted} spatial axes, got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise LayerError(f"expected floating inputs, got {x.dtype}: convert them, say to float32")
        n = tuple(x.shape[1:-1])
        m = sizes or tuple(math.floor(a * b) for a, b in zip(n, scales, strict=False))
        if 0 in n or 0 in m:
            raise LayerError(f"cannot resize {n} to {m}: expected sizes of at least 1")
        steps = [Fraction(a, b) for a, b in zip(n, m, strict=True)]
        if keep_scale:
            steps = [1 / Fraction(float(s)).limit_denominator(10**6) for s in scales[: len(n)] if s is not None]
        return {i: given for i, given in enumerate(zip(n, m, steps, strict=True), 1) if given[0] != given[1]}

    def forward(_, x):
        changes, y = resized(x), x.astype(wide(x.dtype))  # wide, since autodiff adds up in its dtype
        for axis, (n, m, step) in changes.items():
            if method == "nearest":
                y = read(y, nearest(n, m, corners, rounding, step), axis)
            else:
                y = times(y, interpolation(n, m, method, corners, antialias, step), axis)
        return y.astype(x.dtype), jnp.zeros((0, *x.shape), x.dtype)

    def backward(_, empty, dy):  # y = W x along each axis, so dx = Wᵀ dy along each
        changes, dx = resized(jax.ShapeDtypeStruct(empty.shape[1:], empty.dtype)), dy.astype(wide(dy.dtype))
        for axis, (n, m, step) in reversed(changes.items()):
            if method == "nearest":
                dx = add_up(dx, nearest(n, m, corners, rounding, step), axis, n)
            else:
                dx = times(dx, interpolation(n, m, method, corners, antialias, step).T, axis)
        return (), dx.astype(dy.dtype)

    def init(key, x):
        resized(x)
        return ()

    return stateless("resize", init, forward, backward)


def is_scale(number) -> bool:
    """Whether this is a finite number of Python or NumPy above 0."""
    return (
        isinstance(number, int | float | np.integer | np.floating)
        and not isinstance(number, bool)
        and bool(0 < number < math.inf)
    )


def places(n: int, m: int, corners: Corners, step: Fraction | None = None) -> tuple[np.ndarray, int]:
    """``s`` of every output as whole numbers over a whole number, so that no rounding moves a border."""
    o, (over, under) = np.arange(m, dtype=np.int64), (step or Fraction(n, m)).as_integer_ratio()
    if corners == "half_pixel":
        return (2 * o + 1) * over - under, 2 * under
    return (o * (n - 1), max(m - 1, 1)) if corners == "align" else (o * over, under)


def nearest(
    n: int, m: int, corners: Corners, rounding: Rounding | None = None, step: Fraction | None = None
) -> np.ndarray:
    """The input that each output is, ``(m,)``, ascending."""
    over, under = places(n, m, corners, step)
    rounded = {
        "floor": lambda: over // under,
        "ceil": lambda: -(-over // under),
        "half_up": lambda: (2 * over + under) // (2 * under),
        "half_down": lambda: -((under - 2 * over) // (2 * under)),
    }[rounding or ("floor" if corners == "asymmetric" else "half_up")]()
    return np.clip(rounded, 0, n - 1)


def interpolation(
    n: int, m: int, method: Method, corners: Corners, antialias: bool, step: Fraction | None = None
) -> np.ndarray:
    """``W (m, n)``, whose rows sum to 1."""
    over, under = places(n, m, corners, step)
    if antialias and m < n:
        w = np.maximum(1 - np.abs(np.arange(n) - over[:, None] / under) / float(step or Fraction(n, m)), 0)
        return w / w.sum(1, keepdims=True)
    first, t = over // under, over % under / under
    if method == "linear":
        taps = {0: 1 - t, 1: t}
    else:
        near, far = lambda d: ((1.25 * d - 2.25) * d) * d + 1, lambda d: ((-0.75 * d + 3.75) * d - 6) * d + 3
        taps = {-1: far(1 + t), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
    w = np.zeros((m, n))
    for k, weight in taps.items():
        np.add.at(w, (np.arange(m), np.clip(first + k, 0, n - 1)), weight)
    return w


def times(x: jax.Array, w: np.ndarray, axis: int) -> jax.Array:
    """``Σ_j w_oj x_j`` along an axis; in full precision, which accelerators' products do not have by default."""
    over = (((axis,), (1,)), ((), ()))
    return jnp.moveaxis(jax.lax.dot_general(x, jnp.asarray(w, x.dtype), over, precision="highest"), -1, axis)


def read(x: jax.Array, ids: np.ndarray, axis: int) -> jax.Array:
    """The entries ``ids`` along an axis."""
    if factor := times_over(ids, x.shape[axis]):
        return jnp.repeat(x, factor, axis)  # a broadcast
    return x[(*(slice(None),) * axis, ids)]


def add_up(dy: jax.Array, ids: np.ndarray, axis: int, n: int) -> jax.Array:
    """The transpose of `read`; the sum over a factor takes a twentieth of the scatter's time on CPU."""
    if factor := times_over(ids, n):
        return dy.reshape(*dy.shape[:axis], n, factor, *dy.shape[axis + 1 :]).sum(axis + 1)
    zeros = jnp.zeros((*dy.shape[:axis], n, *dy.shape[axis + 1 :]), dy.dtype)
    return zeros.at[(*(slice(None),) * axis, ids)].add(dy, indices_are_sorted=True)


def times_over(ids: np.ndarray, n: int) -> int:
    """How often each of n entries stands in ``ids``, 0 unless all equally often."""
    return len(ids) // n if len(ids) % n == 0 and np.array_equal(ids, np.arange(n).repeat(len(ids) // n)) else 0


# --- channels and space ----------------------------------------------------------------------------------------------


def pixel_shuffle(factor: int, *, order: Literal["CRD", "DCR"] = "CRD") -> Layer:
    """``x (B, *S, C r^k)`` to ``y (B, *(r S), C)``: each place's channels become r^k places, k spatial axes.

    In ``order`` "CRD" (column, row, depth) channel ``c r² + i r + j`` goes to row i and column j of channel c, as in
    PyTorch's ``PixelShuffle`` and ONNX' ``DepthToSpace`` of this mode; in "DCR" channel ``(i r + j) C + c`` does, as in
    ONNX' other mode, its default, and TensorFlow's ``depth_to_space``. ``factor`` is r. Raises ValueError for other
    arguments, `LayerError` for inputs without a spatial axis or of channels that r^k does not divide.
    Source: Shi et al., arXiv:1609.05158.

    >>> x = jnp.arange(4.0).reshape(1, 1, 1, 4)
    >>> pixel_shuffle(2).forward((), (), x)[0].reshape(2, 2).tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    check_shuffle("pixel_shuffle", factor, order)

    def check(key, x):
        spread = factor ** spatial_axes(x)
        if x.shape[-1] % spread:
            raise LayerError(f"expected channels in multiples of {spread}, got {x.shape[-1]}")
        return ()

    def forward(_, x):
        check(None, x)
        return to_space(x, factor, order), ()

    def backward(_, residuals, dy):  # y holds the entries of x in another order, and dx those of dy in x's
        return (), to_channels(dy, factor, order)

    return stateless("pixel_shuffle", check, forward, backward)


def pixel_unshuffle(factor: int, *, order: Literal["CRD", "DCR"] = "CRD") -> Layer:
    """``x (B, *(r S), C)`` to ``y (B, *S, C r^k)``: the inverse of `pixel_shuffle` with the same arguments.

    Raises `LayerError` for spatial axes that ``factor`` does not divide. PyTorch's ``PixelUnshuffle``, and with "DCR"
    ONNX' ``SpaceToDepth`` and TensorFlow's ``space_to_depth``.

    >>> x = jnp.arange(4.0).reshape(1, 4, 1)
    >>> pixel_unshuffle(2).forward((), (), x)[0].tolist()
    [[[0.0, 1.0], [2.0, 3.0]]]
    """
    check_shuffle("pixel_unshuffle", factor, order)

    def check(key, x):
        if spatial_axes(x) and any(size % factor for size in x.shape[1:-1]):
            raise LayerError(f"expected spatial axes in multiples of {factor}, got shape {x.shape}")
        return ()

    def forward(_, x):
        check(None, x)
        return to_channels(x, factor, order), ()

    def backward(_, residuals, dy):  # as in `pixel_shuffle`, the other way
        return (), to_space(dy, factor, order)

    return stateless("pixel_unshuffle", check, forward, backward)


def check_shuffle(what: str, factor, order) -> None:
    """The arguments that both layers share."""
    if not is_whole(factor):
        raise ValueError(f"{what}: factor = {factor!r}; expected a whole number of at least 1")
    if order not in ("CRD", "DCR"):
        raise ValueError(f"{what}: order = {order!r}; expected 'CRD', PyTorch's, or 'DCR', TensorFlow's")


def spatial_axes(x) -> int:
    """How many ``x (B, *S, C)`` has; at least one."""
    if len(x.shape) < 3:
        raise LayerError(f"expected (B, *S, C) with a spatial axis, such as (B, H, W, C), got shape {x.shape}")
    return len(x.shape) - 2


def to_space(x: jax.Array, r: int, order: str) -> jax.Array:
    """``(B, *S, C r^k)`` as ``(B, *(r S), C)``."""
    b, *s, c = x.shape
    k = len(s)
    inner = (r,) * k
    if order == "CRD":
        x, places, channel = x.reshape(b, *s, c // r**k, *inner), range(k + 2, 2 * k + 2), k + 1
    else:
        x, places, channel = x.reshape(b, *s, *inner, c // r**k), range(k + 1, 2 * k + 1), 2 * k + 1
    x = x.transpose(0, *(axis for pair in enumerate(places, 1) for axis in pair), channel)
    return x.reshape(b, *(r * size for size in s), c // r**k)


def to_channels(y: jax.Array, r: int, order: str) -> jax.Array:
    """``(B, *(r S), C)`` as ``(B, *S, C r^k)``."""
    b, *s, c = y.shape
    k, small = len(s), [size // r for size in s]
    y = y.reshape(b, *(size for n in small for size in (n, r)), c)
    places, inner, channel = range(1, 2 * k, 2), range(2, 2 * k + 1, 2), 2 * k + 1
    y = y.transpose(0, *places, *((channel, *inner) if order == "CRD" else (*inner, channel)))
    return y.reshape(b, *small, c * r**k)
