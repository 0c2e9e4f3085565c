"""Convolutions over sequences and images, and their transposes.

A convolution here is the cross-correlation that all libraries call so: y at o is Σ_k w_k x at (o·stride + k·dilation).

Two forms compute the same: "patches" gathers the inputs that each output sees for one matrix product, "xla" leaves
it to `jax.lax.conv_general_dilated`. Patches are gathered with the batch as the last axis, so that copies and sums run
over whole vectors instead of over a handful of channels.

Legend: B batch, T time, H W height and width, S spatial axes (T, or H and W), C channels in, I channels in per group,
G groups, O features out, K positions of the kernel, N = B · outputs; n, m sizes of an input's and an output's axis.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.layers.dense import plus, product
from fnet.layers.initializers import he_normal, require_initializers, zeros
from fnet.types import Layer, LayerError, require_counts, require_params, stateless, stream, wide

Padding = str | Sequence[tuple[int, int]]
Form = Literal["patches", "xla"] | None
AXES = {1: "(B, T, C)", 2: "(B, H, W, C)"}


def conv(
    features: int,
    kernel_size: tuple[int, ...],
    *,
    stride=1,
    dilation=1,
    padding: Padding = "SAME",
    groups: int = 1,
    weights=he_normal(),
    bias=zeros(),
    form: Form = None,
) -> Layer:
    """``y_o = Σ_k x_(o·stride + k·dilation − low) w_k + b`` over sequences ``(B, T, C)`` or images ``(B, H, W, C)``.

    ``kernel_size`` is a tuple with one size for each spatial axis, so ``(3,)`` is for sequences and ``(3, 3)`` for
    images; ``stride`` and ``dilation`` are whole numbers or tuples like it. ``w`` has shape ``(*kernel_size,
    C/groups, features)``, ``b (features,)``. ``padding`` is by zeros:

    - ``"SAME"``: ``⌈n / stride⌉`` outputs, half of the zeros before, the odd one after (Keras and JAX the same; PyTorch
      too, but only for stride 1);
    - ``"VALID"``: none, so ``⌊(n − (k − 1)·dilation − 1) / stride⌋ + 1`` outputs;
    - ``"CAUSAL"``, over time only: ``(k − 1)·dilation`` before, so that no output sees later inputs;
    - pairs ``((before, after), ...)``, one for each spatial axis.

    With ``groups`` > 1 each group of features sees its own group of channels, and ``groups`` = C is a depthwise
    convolution (features a multiple of C; those of one channel stand together).

    ``form`` names how it is computed: ``"patches"`` as matrix products with gathered patches, ``"xla"`` by XLA's
    convolution, forward and both gradients. None takes patches where `jax.default_backend` is the CPU, else XLA.
    ``bias=None`` leaves the bias out. Parameters take the dtype of ``x``. Raises ValueError for arguments that do not
    fit together, `LayerError` for inputs of another rank, dtype or number of channels or too small for one output.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998; the arithmetic of sizes in
    Dumoulin and Visin, arXiv:1603.07285. PyTorch stores ``(O, I, *kernel)`` and images as ``(B, C, H, W)``.

    >>> layer = conv(6, (5, 5))
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 28, 28, 1), "float32"))
    >>> params["w"].shape, layer.forward(params, state, jnp.ones((8, 28, 28, 1)))[0].shape
    ((5, 5, 1, 6), (8, 28, 28, 6))
    """
    windows = windows_of("conv", kernel_size, stride, dilation, padding)
    check_arguments("conv", features, form, weights, bias)
    shapes = shapes_of(windows, features, bias)
    require_counts("conv", groups=groups)
    if features % groups:
        raise ValueError(f"conv: groups = {groups} with features = {features}; expected a divisor of the features")

    def init(key, x):
        over_inputs(windows, x)
        if x.shape[-1] % groups:
            raise LayerError(f"expected channels in {groups} groups of one size, got {x.shape[-1]} channels")
        return parameters(key, x, (*windows.kernel, x.shape[-1] // groups, features), weights, bias)

    def forward(params, x):
        over = over_inputs(windows, x)
        require_params(params, **shapes)
        check_inputs(x, params["w"], channels=params["w"].shape[-2] * groups)
        return with_bias(convolution(x, params["w"], over, groups, chosen(form)), params), x

    def backward(params, x, dy):
        # y_o = Σ_k x_(os+kd) w_k + b:  dw_k = Σ_o x_(os+kd)ᵀ dy_o, one product of the patches and dy;
        # dx_j = Σ_(o, k: os+kd = j) dy_o w_kᵀ, the transposed product, folded back to where the patches came from
        over, w = over_inputs(windows, x), params["w"]
        dparams = {"w": weight_gradient(x, dy, over, groups, chosen(form))}
        return with_bias_gradient(dparams, params, dy), input_gradient(w, dy, over, groups, chosen(form))

    return stateless("conv", init, forward, backward)


def conv_transpose(
    features: int,
    kernel_size: tuple[int, ...],
    *,
    stride=1,
    dilation=1,
    padding: Padding = "SAME",
    weights=he_normal(),
    bias=zeros(),
    form: Form = None,
) -> Layer:
    """The transpose of `conv` as a linear map: ``y_j = Σ_(o, k: o·stride + k·dilation − low = j) x_o w_k + b``.

    Every input adds its ``x_o w_k`` into a window of the outputs. ``x (B, *m, C)``, ``w (*kernel_size, C, features)``,
    ``y (B, *n, features)``, where n is the size of inputs from which `conv` with the same arguments makes m:

    - ``"SAME"``: ``n = m · stride`` (Keras and JAX the same);
    - ``"VALID"``: ``n = (m − 1)·stride + (k − 1)·dilation + 1``, the smallest such n. PyTorch with padding 0 the same;
      Keras and JAX add zeros up to ``m · stride`` where that is more;
    - pairs: that n less ``before`` and ``after``. PyTorch's ``padding=p, output_padding=q`` is ``(p, p − q)``, q ≤ p.

    The kernel is not turned round: PyTorch and Keras the same; `jax.lax.conv_transpose` turns it unless told
    ``transpose_kernel=True``. PyTorch stores ``(I, O, *kernel)``, Keras ``(*kernel, O, I)``. Other arguments and errors
    are those of `conv`. Source: Dumoulin and Visin, arXiv:1603.07285.

    >>> layer = conv_transpose(3, (4, 4), stride=2)
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 7, 7, 5), "float32"))
    >>> layer.forward(params, state, jnp.ones((8, 7, 7, 5)))[0].shape
    (8, 14, 14, 3)
    """
    windows = windows_of("conv_transpose", kernel_size, stride, dilation, padding)
    check_arguments("conv_transpose", features, form, weights, bias)
    shapes = shapes_of(windows, features, bias)

    def init(key, x):
        over_outputs(windows, x)
        return parameters(key, x, (*windows.kernel, x.shape[-1], features), weights, bias)

    def forward(params, x):
        over = over_outputs(windows, x)
        require_params(params, **shapes)
        check_inputs(x, params["w"], channels=params["w"].shape[-2])
        return with_bias(input_gradient(swapped(params["w"]), x, over, 1, chosen(form)), params), x

    def backward(params, x, dy):
        # y = Aᵀ x + b with A the convolution by w with its two last axes swapped, linear in w too:
        # dx = A dy, and dw is that of A with dy for its inputs and x for the gradient of its outputs
        over, w = over_outputs(windows, x), params["w"]
        dparams = {"w": swapped(weight_gradient(dy, x, over, 1, chosen(form)))}
        return with_bias_gradient(dparams, params, dy), convolution(dy, swapped(w), over, 1, chosen(form))

    return stateless("conv_transpose", init, forward, backward)


def check_arguments(what: str, features: int, form: Form, weights, bias) -> None:
    """The arguments that both layers share."""
    require_counts(what, features=features)
    require_initializers(what, "bias", weights=weights, bias=bias)
    if form not in (None, "patches", "xla"):
        raise ValueError(f"{what}: form = {form!r}; expected 'patches', 'xla' or None for the platform's")


def parameters(key, x, shape, weights, bias) -> dict:
    """``w`` of that shape and, unless left out, ``b``; in the dtype of ``x``."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError(f"expected floating inputs, got {x.dtype}: convert them, say to float32")
    params = {"w": weights(stream(key, "w"), shape, x.dtype)}
    return params if bias is None else {**params, "b": bias(stream(key, "b"), shape[-1:], x.dtype)}


def shapes_of(windows: Windows, features: int, bias) -> dict[str, tuple]:
    """The shapes of `parameters`, None for the channels."""
    shapes: dict[str, tuple] = {"w": (*windows.kernel, None, features)}
    return shapes if bias is None else {**shapes, "b": (features,)}


def check_inputs(x, w, channels: int) -> None:
    """The channels and the dtype that the parameters want."""
    if x.shape[-1] != channels:
        raise LayerError(f"expected {channels} channels, got {x.shape[-1]}")
    if x.dtype != w.dtype:
        raise LayerError(f"expected {w.dtype} inputs like its parameters, got {x.dtype}: convert the inputs")


def with_bias(y: jax.Array, params) -> jax.Array:
    """``y + b`` where there is a ``b``."""
    return plus(y, params["b"]).astype(y.dtype) if "b" in params else y


def with_bias_gradient(dparams: dict, params, dy: jax.Array) -> dict:
    """``db = Σ dy`` over all axes but the last, where there is a ``b``."""
    if "b" not in params:
        return dparams
    # as a product: of a sum XLA would make one over (B, *m, O), for which it would lay out dy a second time
    flat = channels_first(dy).reshape(dy.shape[-1], math.prod(dy.shape[:-1]))
    return {**dparams, "b": product(flat, jnp.ones((flat.shape[1], 1), dy.dtype))[:, 0]}


def swapped(w: jax.Array) -> jax.Array:
    """``(*kernel, I, O)`` as ``(*kernel, O, I)``."""
    return jnp.swapaxes(w, -1, -2)


# --- windows: which inputs an output sees ----------------------------------------------------------------------------


class Windows(NamedTuple):
    """Along each axis, output o sees the inputs ``o · stride + k · dilation − low`` for k below ``kernel``."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Padding
    inputs: tuple[int, ...] = ()  # n: sizes, known once the inputs are
    outputs: tuple[int, ...] = ()  # m
    low: tuple[int, ...] = ()

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
        """What is padded after the inputs; negative where the last inputs are seen by no window."""
        return tuple(c - n - low for c, n, low in zip(self.span, self.inputs, self.low, strict=True))


def windows_of(what: str, kernel, stride, dilation, padding: Padding, name: str = "kernel_size") -> Windows:
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
    return Windows(kernel, stride, dilation, padding)


def sizes(what: str, name: str, given, n: int) -> tuple[int, ...]:
    """``given``, a whole number or one for each of n axes, as a tuple of n."""
    try:
        values = tuple(operator.index(v) for v in (given if isinstance(given, Sequence) else (given,) * n))
    except TypeError:
        values = ()
    if len(values) != n or min(values) < 1:
        raise ValueError(f"{what}: {name} = {given!r}; expected a whole number of at least 1, or {n} of them")
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
        total = [c - size for c, size in zip(windows._replace(outputs=m).span, n, strict=True)]
        low = tuple(max(t, 0) // 2 for t in total)
    else:
        before_after = tuple((e - 1, 0) if padding == "CAUSAL" else (0, 0) for e in windows.extent)
        pads = before_after if isinstance(padding, str) else padding
        low = tuple(before for before, _ in pads)
        room = [size + sum(p) - e for size, p, e in zip(n, pads, windows.extent, strict=True)]
        m = tuple(r // s + 1 for r, s in zip(room, windows.stride, strict=True))
    if min(m) < 1:
        raise LayerError(
            f"windows that reach over {windows.extent} do not fit into inputs of {n} with padding {padding!r}: "
            f"no output is left; take {'' if padding == 'SAME' else 'a smaller window, padding SAME, or '}larger inputs"
        )
    return windows._replace(inputs=n, outputs=m, low=low)


def over_outputs(windows: Windows, y) -> Windows:
    """The windows whose outputs are ``y (B, *S, O)``; their inputs are what a transposed convolution gives."""
    m, padding = spatial_sizes(y, windows), windows.padding
    windows = windows._replace(outputs=m)
    if padding == "SAME":
        n = tuple(size * s for size, s in zip(m, windows.stride, strict=True))
        low = tuple(max(c - size, 0) // 2 for c, size in zip(windows.span, n, strict=True))
    else:
        pads = ((0, 0),) * len(m) if isinstance(padding, str) else padding
        n = tuple(c - sum(p) for c, p in zip(windows.span, pads, strict=True))
        low = tuple(before for before, _ in pads)
    if min(m) < 1 or min(n) < 1:
        raise LayerError(f"inputs of {m} with padding {padding!r} leave no output: the sizes would be {n}")
    return windows._replace(inputs=n, low=low)


# --- the batch as the fastest axis -----------------------------------------------------------------------------------


def channels_first(x: jax.Array) -> jax.Array:
    """``(B, *S, C)`` as ``(C, *S, B)``."""
    return jnp.swapaxes(x, 0, -1)


def channels_last(x: jax.Array) -> jax.Array:
    """``(C, *S, B)`` as ``(B, *S, C)``."""
    return jnp.swapaxes(x, 0, -1)


def padded(x: jax.Array, windows: Windows, fill) -> jax.Array:
    """``x (C, *S, B)`` with ``fill`` around it, as the windows want it."""
    spatial = ((low, high, 0) for low, high in zip(windows.low, windows.high, strict=True))
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), ((0, 0, 0), *spatial, (0, 0, 0)))


def along(windows: Windows, axis: int, k: int) -> slice:
    """Where position k of the kernel lies for every output of a padded axis."""
    start = k * windows.dilation[axis]
    return slice(start, start + (windows.outputs[axis] - 1) * windows.stride[axis] + 1, windows.stride[axis])


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


# --- the convolution and its two gradients, each in both forms -------------------------------------------------------


def chosen(form: Form) -> str:
    """``form``, or the faster one on this platform."""
    return form or ("patches" if jax.default_backend() == "cpu" else "xla")


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


def by_group(a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix product of each group."""
    return product(a, b) if a.shape[0] > 1 else product(a[0], b[0])[None]


def convolution(x, w, windows: Windows, groups: int, form: str) -> jax.Array:
    """``x (B, *n, C)``, ``w (*kernel, I, O)`` to ``y (B, *m, O)``."""
    if form == "xla":
        return xla(x, w, windows.stride, windows.low, windows.high, (), windows.dilation, feature_group_count=groups)
    y = by_group(jnp.swapaxes(as_matrices(w, groups), 1, 2), gathered(x, windows, groups))
    return channels_last(y.reshape(w.shape[-1], *windows.outputs, x.shape[0]))


def weight_gradient(x, dy, windows: Windows, groups: int, form: str) -> jax.Array:
    """``dw (*kernel, I, O)``: at k, ``Σ_o x at (o·stride + k·dilation)ᵀ dy at o``."""
    shape = (*windows.kernel, x.shape[-1] // groups, dy.shape[-1])
    if form == "xla":
        # a convolution of x with dy for a kernel: outputs are the positions k, and stride and dilation change places;
        # the batch is summed over as channels are, and the channels of x stand for a batch, in groups
        x, dy = jnp.swapaxes(x, 0, -1), jnp.moveaxis(dy, 0, -2)
        dw = xla(x, dy, windows.dilation, windows.low, windows.high, (), windows.stride, batch_group_count=groups)
        return jnp.moveaxis(dw, 0, -2)
    dy = as_rows(dy, groups)
    dw = by_group(gathered(x, windows, groups), jnp.swapaxes(dy, 1, 2))
    return jnp.swapaxes(dw, 0, 1).reshape(shape)


def input_gradient(w, dy, windows: Windows, groups: int, form: str) -> jax.Array:
    """``dx (B, *n, C)``: at j, the sum of ``dy at o · w_kᵀ`` over all o, k with ``o·stride + k·dilation = j``."""
    channels = w.shape[-2] * groups
    if form == "xla":
        # a convolution of dy, its entries stride apart, with the kernel turned round, its features and channels swapped
        low = [e - 1 - before for e, before in zip(windows.extent, windows.low, strict=True)]
        high = [e - 1 - after for e, after in zip(windows.extent, windows.high, strict=True)]
        turned = jnp.flip(w, range(w.ndim - 2)).reshape(*w.shape[:-1], groups, w.shape[-1] // groups)
        turned = jnp.moveaxis(turned, -1, -3).swapaxes(-1, -2)
        turned = turned.reshape(*w.shape[:-2], w.shape[-1] // groups, channels)
        return xla(dy, turned, (), low, high, windows.stride, windows.dilation, feature_group_count=groups)
    dy_NO = as_rows(dy, groups)
    matrices, dtype = as_matrices(w, groups), wide(w.dtype)  # what is added up stays in float32 at least until it is
    if groups > 1:
        d = jnp.matmul(matrices, dy_NO, preferred_element_type=dtype)
    else:
        d = jnp.matmul(matrices[0], dy_NO[0], preferred_element_type=dtype)[None]
    d = jnp.moveaxis(d.reshape(groups, *w.shape[:-1], *dy.shape[1:-1], dy.shape[0]), 0, w.ndim - 2)
    d = d.reshape(*windows.kernel, channels, *windows.outputs, dy.shape[0])
    return channels_last(fold(d, windows).astype(w.dtype))


def xla(x, w, strides, low, high, x_dilation, w_dilation, **groups) -> jax.Array:
    """`jax.lax.conv_general_dilated` of ``x (B, *S, C)`` with ``w (*kernel, I, O)``."""
    ones, rank = (1,) * (x.ndim - 2), x.ndim
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
