"""Convolutions over sequences, images and volumes, and their transposes.

A convolution here is the cross-correlation that all libraries call so: y at o is Σ_k w_k x at (o·stride + k·dilation).

Three forms compute the same: "patches" gathers the inputs that each output sees for one matrix product, with the batch
as the last axis, so that copies and sums run over whole vectors instead of over a handful of channels; "rows" gathers
a row of them, with the channels as the last axis, and adds up the rows after the product (nothing is gathered where
each channel has one feature of its own); "xla" leaves it to `jax.lax.conv_general_dilated`.

Legend: B batch, T time, D H W depth, height and width, S spatial axes (T; H and W; or D, H and W), C channels in,
I channels in per group, G groups, O features out, K positions of the kernel, N = B · outputs; n, m sizes of an input's
and an output's axis.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fnet.core.checks import require_counts, require_params
from fnet.core.numerics import stream
from fnet.layers.convolving import Form, bias_gradient, convolution, gathered, input_gradient, weight_gradient
from fnet.layers.dense import outer_of, plus
from fnet.layers.initializers import he_normal, require_initializers, zeros
from fnet.layers.windows import Padding, Windows, over_inputs, over_outputs, sizes, windows_of
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


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
    """``y_o = Σ_k x_(o·stride + k·dilation − low) w_k + b`` over sequences, images or volumes.

    ``kernel_size`` is a tuple with one size for each spatial axis, so ``(3,)`` is for sequences ``(B, T, C)``,
    ``(3, 3)`` for images ``(B, H, W, C)`` and ``(3, 3, 3)`` for volumes ``(B, D, H, W, C)``; ``stride`` and
    ``dilation`` are whole numbers or tuples like it. ``w`` has shape ``(*kernel_size, C/groups, features)``, ``b
    (features,)``. ``padding`` is by zeros:

    - ``"SAME"``: ``⌈n / stride⌉`` outputs, half of the zeros before, the odd one after (Keras and JAX the same; PyTorch
      too, but only for stride 1);
    - ``"VALID"``: none, so ``⌊(n − (k − 1)·dilation − 1) / stride⌋ + 1`` outputs;
    - ``"CAUSAL"``, over time only: ``(k − 1)·dilation`` before, so that no output sees later inputs;
    - pairs ``((before, after), ...)``, one for each spatial axis.

    PyTorch's other ``padding_mode`` is a layer of its own before it, such as
    ``serial(pad(((1, 1), (1, 1)), mode="circular"), conv(8, (3, 3), padding="VALID"))``.

    With ``groups`` > 1 each group of features sees its own group of channels, and ``groups`` = C is a depthwise
    convolution (features a multiple of C; those of one channel stand together).

    ``form`` names how it is computed, forward and both gradients: ``"patches"`` or ``"rows"`` as matrix products with
    what is gathered of the windows, ``"xla"`` by XLA's convolution. None takes XLA's but on CPU, and there rows, or
    patches for groups, but for depthwise convolutions of 8 channels or more and up to 16 positions, and where windows
    of stride 1 see fewer than 8 channels, but if a kernel of at most 5 rows takes 8 features or more from at most 4.
    ``bias=None`` leaves the bias out. Parameters take the dtype of ``x``.
    Raises ValueError for arguments that do not fit together, `LayerError` for inputs of another rank, dtype or number
    of channels or too small for one output.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998; the arithmetic of sizes in
    Dumoulin and Visin, arXiv:1603.07285. PyTorch stores ``(O, I, *kernel)`` and images as ``(B, C, H, W)``.

    >>> layer = conv(6, (5, 5))
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 28, 28, 1), "float32"))
    >>> params["w"].shape, layer.forward(params, state, jnp.ones((8, 28, 28, 1)))[0].shape
    ((5, 5, 1, 6), (8, 28, 28, 6))
    """
    windows = windows_of("conv", kernel_size, stride, dilation, padding)
    check_arguments("conv", features, form, weights, bias, groups)
    shapes = shapes_of(windows, features, bias)

    def init(key, x):
        over_inputs(windows, x)
        check_groups(x, groups)
        return parameters(key, x, (*windows.kernel, x.shape[-1] // groups, features), weights, bias)

    def forward(params, x):
        over = over_inputs(windows, x)
        require_params(params, **shapes)
        check_inputs(x, params["w"], channels=params["w"].shape[-2] * groups)
        return with_bias(convolution(x, params["w"], over, groups, form), params), x

    def backward(params, x, dy):
        # y_o = Σ_k x_(os+kd) w_k + b:  dw_k = Σ_o x_(os+kd)ᵀ dy_o, one product of the patches and dy;
        # dx_j = Σ_(o, k: os+kd = j) dy_o w_kᵀ, the transposed product, folded back to where the patches came from
        over, w = over_inputs(windows, x), params["w"]
        dparams = {"w": weight_gradient(x, dy, over, groups, form)}
        if "b" in params:
            dparams["b"] = bias_gradient(w, dy, over, groups, form)
        return dparams, input_gradient(w, dy, over, groups, form)

    def outer(params, x, dy):  # of the patches and dy, the outputs of an example along N
        examples, outputs = dy.shape[0], math.prod(dy.shape[1:-1])
        seen = gathered(x, over_inputs(windows, x), 1)  # (1, K I, outputs · B)
        seen = jnp.moveaxis(seen.reshape(-1, outputs, examples), -1, 0).swapaxes(1, 2)
        return outer_of(params, seen, dy.reshape(examples, outputs, features))

    layer = stateless("conv", init, forward, backward)
    return layer if groups > 1 else layer._replace(outer=outer)


def conv_transpose(
    features: int,
    kernel_size: tuple[int, ...],
    *,
    stride=1,
    dilation=1,
    padding: Padding = "SAME",
    output_padding=0,
    groups: int = 1,
    weights=he_normal(),
    bias=zeros(),
    form: Form = None,
) -> Layer:
    """The transpose of `conv` as a linear map: ``y_j = Σ_(o, k: o·stride + k·dilation − low = j) x_o w_k + b``.

    Every input adds its ``x_o w_k`` into a window of the outputs. ``x (B, *m, C)``, ``w (*kernel_size, C,
    features/groups)``, ``y (B, *n, features)``, where n is the size of inputs from which `conv` with the same arguments
    makes m:

    - ``"SAME"``: ``n = m · stride`` (Keras and JAX the same);
    - ``"VALID"``: ``n = (m − 1)·stride + (k − 1)·dilation + 1``, the smallest such n. PyTorch with padding 0 the same;
      Keras and JAX add zeros up to ``m · stride`` where that is more;
    - pairs: that n less ``before`` and ``after``. PyTorch's ``padding=p`` is the pair ``(p, p)``.

    ``output_padding``, a whole number or one for each axis, makes n larger at its end, since `conv` makes m of several
    n. What is there is computed like the rest, and is ``b`` where no window reaches. It is less than the larger of
    ``stride`` and ``dilation``, as in PyTorch and ONNX, and 0 with ``"SAME"``, which takes the largest n.

    With ``groups`` > 1 each group of channels adds into its own group of features. ``w`` is always that of the `conv`
    whose transpose this is, its two last axes swapped; it is drawn for the ``C/groups`` channels that a feature sees.

    The kernel is not turned round: PyTorch and Keras the same; `jax.lax.conv_transpose` turns it unless told
    ``transpose_kernel=True``. PyTorch stores ``(C, features/groups, *kernel)``, Keras ``(*kernel, O, I)``. Other
    arguments and errors are those of `conv`. Source: Dumoulin and Visin, arXiv:1603.07285.

    >>> layer = conv_transpose(3, (4, 4), stride=2)
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 7, 7, 5), "float32"))
    >>> layer.forward(params, state, jnp.ones((8, 7, 7, 5)))[0].shape
    (8, 14, 14, 3)
    """
    windows = windows_of("conv_transpose", kernel_size, stride, dilation, padding)
    more = sizes("conv_transpose", "output_padding", output_padding, len(windows.kernel), least=0)
    check_arguments("conv_transpose", features, form, weights, bias, groups)
    if any(more) and padding == "SAME":
        raise ValueError(
            f"conv_transpose: output_padding = {output_padding} with padding 'SAME', whose outputs are the largest "
            "already; expected 0, or padding VALID or pairs"
        )
    if any(q >= max(s, d) for q, s, d in zip(more, windows.stride, windows.dilation, strict=True)):
        raise ValueError(
            f"conv_transpose: output_padding = {output_padding} with stride = {stride} and dilation = {dilation}; "
            "expected less than the larger of the two along each axis"
        )
    shapes = shapes_of(windows, features, bias, groups)

    def init(key, x):
        over_outputs(windows, x, more)
        check_groups(x, groups)
        params = parameters(key, x, (*windows.kernel, x.shape[-1] // groups, features), weights, bias)
        return {**params, "w": by_channel(params["w"], groups)}

    def forward(params, x):
        over = over_outputs(windows, x, more)
        require_params(params, **shapes)
        check_inputs(x, params["w"], channels=params["w"].shape[-2])
        return with_bias(input_gradient(swapped(params["w"]), x, over, groups, form), params), x

    def backward(params, x, dy):
        # y = Aᵀ x + b with A the convolution by w with its two last axes swapped, linear in w too:
        # dx = A dy, and dw is that of A with dy for its inputs and x for the gradient of its outputs
        over, w = over_outputs(windows, x, more), swapped(params["w"])
        dparams = {"w": swapped(weight_gradient(dy, x, over, groups, form))}
        if "b" in params:
            dparams["b"] = bias_gradient(w, dy, over, groups, form)
        return dparams, convolution(dy, w, over, groups, form)

    return stateless("conv_transpose", init, forward, backward)


def check_arguments(what: str, features: int, form: Form, weights, bias, groups: int) -> None:
    """The arguments that both layers share."""
    require_counts(what, features=features, groups=groups)
    if features % groups:
        raise ValueError(f"{what}: groups = {groups} with features = {features}; expected a divisor of the features")
    require_initializers(what, "bias", weights=weights, bias=bias)
    if form not in (None, "patches", "rows", "xla"):
        raise ValueError(f"{what}: form = {form!r}; expected 'patches', 'rows', 'xla' or None for the platform's")


def check_groups(x, groups: int) -> None:
    """Channels that can be split into the groups."""
    if x.shape[-1] % groups:
        raise LayerError(f"expected channels in {groups} groups of one size, got {x.shape[-1]} channels")


def parameters(key, x, shape, weights, bias) -> dict:
    """``w`` of that shape and, unless left out, ``b``; in the dtype of ``x``."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError(f"expected floating inputs, got {x.dtype}: convert them, say to float32")
    params = {"w": weights(stream(key, "w"), shape, x.dtype)}
    return params if bias is None else {**params, "b": bias(stream(key, "b"), shape[-1:], x.dtype)}


def shapes_of(windows: Windows, features: int, bias, groups: int = 1) -> dict[str, tuple]:
    """The shapes of `parameters`, None for the channels; with ``groups``, of those `by_channel`."""
    shapes: dict[str, tuple] = {"w": (*windows.kernel, None, features // groups)}
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


def swapped(w: jax.Array) -> jax.Array:
    """``(*kernel, I, O)`` as ``(*kernel, O, I)``."""
    return jnp.swapaxes(w, -1, -2)


def by_channel(w: jax.Array, groups: int) -> jax.Array:
    """``(*kernel, C/groups, features)``, features by group, as ``(*kernel, C, features/groups)``, channels by group."""
    *kernel, per, features = w.shape
    parts = w.reshape(*kernel, per, groups, features // groups)
    return jnp.swapaxes(parts, -3, -2).reshape(*kernel, per * groups, features // groups)
