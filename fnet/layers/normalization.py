"""Normalization: features of mean 0 and variance 1, over the batch or within each example, then scaled and shifted.

All are ``y = γ x̂ + β`` with ``x̂ = (x − μ) r`` and ``r = 1 / √(σ² + ε)``, and differ in what μ and σ² are taken over.
Variances are means of squared deviations, never ``E[x²] − E[x]²``, which loses every digit where the mean is large.
Statistics are in float32 at least; ``y`` has the dtype of ``x``.

Legend: B batch, C features (channels), G groups; N examples and positions together; `...` any further axes;
γ scale, β bias (parameters), μ mean, σ² variance, ε eps.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fnet.core.checks import described, is_whole, require, require_array, require_counts, require_params
from fnet.core.numerics import stream, wide
from fnet.core.trees import cast_like
from fnet.layers.dense import rows
from fnet.layers.initializers import constant, require_initializers, zeros
from fnet.layers.masks import by_position, split_mask, with_mask
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


def batch_norm(*, decay=0.99, eps=1e-5, variance: str = "biased", scale=constant(1), bias=zeros()) -> Layer:
    """Each feature normalised over the batch and all positions: ``x (B, ..., C)`` to ``y`` alike.

    In training μ and σ² (biased) are the batch's own, and ``state = {"mean", "var"}``, in float32 at least, follows
    them as ``decay · old + (1 − decay) · new``; in inference they are the state's. With ``variance="unbiased"`` the
    state follows ``σ² · N / (N − 1)`` (0 if N is 1). ``decay`` and ``eps`` are numbers, possibly traced; ``scale`` and
    ``bias`` are initializers, or None to leave the parameter out.

    ``(x, mask)`` normalises a masked batch, and gives ``(y, mask)``: ``mask`` is boolean over leading axes of ``x``
    (``(B,)``, ``(B, T)``, ...). Only what is True counts; elsewhere ``y`` and ``dx`` are 0. Where nothing counts, the
    state stays.

    Raises `LayerError` where ``x`` has no batch axis, is not floating, does not have the features of the state, and for
    a mask that does not fit. Source: Ioffe and Szegedy, arXiv:1502.03167 (which stores the unbiased variance).

    - PyTorch: ``batch_norm(decay=0.9, variance="unbiased")``; its momentum 0.1 is the weight of the new; N = 1 is an
      error there.
    - Keras: ``batch_norm(eps=1e-3)``; its momentum 0.99 is ``decay``. flax: these defaults, but ``E[x²] − E[x]²``.

    >>> layer = batch_norm()
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 1), "float32"))
    >>> y, state, _ = layer.forward(params, state, jnp.array([[100.0], [104.0]]), train=True)
    >>> y.round(3).tolist(), state["mean"].round(2).tolist()
    ([[-1.0], [1.0]], [1.0199999809265137])
    """
    require((decay >= 0) & (decay <= 1), f"batch_norm: decay = {decay}; expected a number from 0 to 1")
    require(eps >= 0, f"batch_norm: eps = {eps}; expected at least 0")
    require_initializers("batch_norm", "scale", "bias", scale=scale, bias=bias)
    if variance not in ("biased", "unbiased"):
        raise ValueError(f"batch_norm: variance = {variance!r}; expected 'biased' or 'unbiased'")

    def init(key, x):
        x, _ = split_mask(x)
        require_features(x)
        shape, dtype = x.shape[-1:], wide(x.dtype)
        state = {"mean": jnp.zeros(shape, dtype), "var": jnp.ones(shape, dtype)}
        return affine_params(key, x, scale, bias), state

    def forward(params, state, x, *, key=None, train=False):
        x, mask = split_mask(x)
        if not isinstance(state, dict) or set(state) != {"mean", "var"}:
            raise LayerError(f"expected the state {{'mean', 'var'}}, got {described(state)}: pass what init returned")
        require_features(x, state["mean"].shape[0])
        require_params(params, **affine_shapes(x, scale, bias))
        if any(wide(leaf.dtype) != leaf.dtype for leaf in state.values()):
            raise LayerError(f"expected a state in float32 at least, got {described(state)}: 16 bits do not move")
        dtype = wide(x.dtype)
        counted = None if mask is None else counted_rows(x, mask)
        v = only(rows(x).astype(dtype), counted)  # (N, C)
        if train:
            count = jnp.asarray(v.shape[0] if counted is None else counted.sum(), dtype)
            n = jnp.maximum(count, 1)
            mean = v.sum(0) / n
            centred = only(v - mean[None], counted)
            var = (centred * centred).sum(0) / n
            stored = var * (n / jnp.maximum(n - 1, 1)) if variance == "unbiased" else var
            new_state = {
                "mean": follow(state["mean"], mean, jnp.asarray(decay, dtype), count),
                "var": follow(state["var"], stored, jnp.asarray(decay, dtype), count),
            }
        else:
            n, new_state = None, state
            mean, var = state["mean"].astype(dtype), state["var"].astype(dtype)
            centred = only(v - mean[None], counted)
        r = 1 / jnp.sqrt(var + jnp.asarray(eps, dtype))
        normal = centred * r[None]
        y = only(affine(params, normal), counted)
        y = y.astype(x.dtype).reshape(x.shape)
        return with_mask(y, mask), new_state, (normal.astype(x.dtype), r, n, counted)

    def backward(params, residuals, dy):
        normal, r, n, counted = residuals  # n is None in inference
        dy = dy[0] if isinstance(dy, tuple) else dy
        dtype, shape = dy.dtype, dy.shape
        normal, dy = normal.astype(r.dtype), only(rows(dy).astype(r.dtype), counted)
        # y = γ x̂ + β:  dβ = Σ dy,  dγ = Σ dy x̂.  x̂ = r (x − μ), and in training μ and r depend on x too:
        # ∂x̂_i/∂x_j = r ([i = j] − 1/n − x̂_i x̂_j / n), so that dx = γ r (dy − dβ/n − x̂ dγ/n)
        dscale, dbias = (dy * normal).sum(0), dy.sum(0)
        dparams = parameters_gradient(params, dscale, dbias)
        if n is not None:
            dy = only(dy - (dbias / n)[None] - normal * (dscale / n)[None], counted)
        gamma = params["scale"].astype(r.dtype) if "scale" in params else 1
        dx = (dy * (gamma * r)[None]).astype(dtype).reshape(shape)
        return dparams, dx if counted is None else (dx, None)

    return Layer("batch_norm", init, forward, backward)


def layer_norm(*, eps=1e-5, scale=constant(1), bias=zeros()) -> Layer:
    """Each position's features normalised by their own mean and variance: ``x (B, ..., C)`` to ``y`` alike.

    ``scale`` and ``bias`` ``(C,)`` are initializers, or None to leave the parameter out; ``eps`` may be traced. Raises
    `LayerError` where ``x`` has no batch axis, is not floating or does not have the parameters' features.

    Source: Ba et al., arXiv:1607.06450. PyTorch's ε is 1e-5 as well, flax' 1e-6.

    >>> layer = layer_norm()
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 2), "float32"))
    >>> layer.forward(params, state, jnp.array([[100.0, 104.0]]))[0].round(3).tolist()
    [[-1.0, 1.0]]
    """
    return by_position(_within("layer_norm", over_features, True, eps, scale, bias))


def rms_norm(*, eps=1e-6, scale=constant(1)) -> Layer:
    """Each position's features divided by their root mean square: ``y = γ x / √(mean x² + ε)``, ``x (B, ..., C)``.

    Arguments and errors as in `layer_norm`; nothing is subtracted and there is no bias. Source: Zhang and Sennrich,
    arXiv:1910.07467. flax' ε is 1e-6 as well; PyTorch's default is the dtype's epsilon, 1.2e-7 in float32.

    >>> layer = rms_norm()
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 2), "float32"))
    >>> layer.forward(params, state, jnp.array([[1.0, 7.0]]))[0].round(3).tolist()
    [[0.20000000298023224, 1.4000000953674316]]
    """
    return by_position(_within("rms_norm", over_features, False, eps, scale, None))


def group_norm(groups: int, *, eps=1e-5, scale=constant(1), bias=zeros()) -> Layer:
    """Each example's features in ``groups`` of neighbours, each normalised over its features and all positions.

    ``x (B, ..., C)`` to ``y`` alike; scale and bias ``(C,)``. One group normalises the whole example; C groups are
    instance normalization, ``group_norm(C, scale=None, bias=None)`` PyTorch's ``InstanceNorm`` as it comes.
    ``(x, mask)`` gives ``(y, mask)``: of each example only the positions where the mask is True count, and elsewhere
    ``y`` and ``dx`` are 0. Arguments and errors as in `layer_norm`; `LayerError` also where C is no multiple of
    ``groups``, and for a mask that does not fit.
    Source: Wu and He, arXiv:1803.08494. PyTorch's ε is 1e-5 as well, flax' 1e-6.

    >>> layer = group_norm(2)
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 4), "float32"))
    >>> layer.forward(params, state, jnp.array([[1.0, 3.0, 10.0, 50.0]]))[0].round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """
    require_counts("group_norm", groups=groups)

    def check(x):
        if x.shape[-1] % groups:
            raise LayerError(f"expected a multiple of {groups} features (groups = {groups}), got {x.shape[-1]}")

    def mean(v, counted):  # over positions first: XLA on CPU is slow where both reductions are one
        positions = tuple(range(1, v.ndim - 1))
        if counted is None:
            by_feature = v.mean(positions, keepdims=True)  # (B, 1, ..., C)
        else:
            count = counted.sum(positions, dtype=v.dtype, keepdims=True)
            by_feature = only(v, counted).sum(positions, keepdims=True) / jnp.maximum(count, 1)
        by_group = by_feature.reshape(v.shape[0], groups, v.shape[-1] // groups).mean(-1)
        return jnp.repeat(by_group, v.shape[-1] // groups, 1).reshape(by_feature.shape)

    return _within("group_norm", mean, True, eps, scale, bias, check)


def l2_normalize(axis: int = -1, *, eps=1e-12) -> Layer:
    """``y = x / max(‖x‖, ε)`` with the Euclidean norm along ``axis``: ``x (B, ..., C)`` to ``y`` alike.

    Vectors shorter than ``eps``, which may be traced, are divided by it: their derivative is 1/ε, at 0 too. At the
    kink, where ``‖x‖ = ε``, it is that of longer ones. ``(x, mask)`` gives ``(y, mask)`` along the last axis, which is
    named -1 for it. Raises ValueError unless ε is above 0, and `LayerError` for an axis that is not there or is the
    batch's, and for inputs that are not floating. PyTorch's ``functional.normalize`` is along axis 1, else the same.

    >>> l2_normalize().forward((), (), jnp.array([[3.0, 4.0], [0.0, 0.0]]))[0].round(3).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    if not is_whole(axis, axis):
        raise ValueError(f"l2_normalize: axis = {axis!r}; expected a whole number, such as -1")
    require(eps > 0, f"l2_normalize: eps = {eps}; expected above 0")

    def init(key, x):
        require_features(x)
        if not -len(x.shape) <= axis < len(x.shape) or axis % len(x.shape) == 0:
            raise LayerError(f"expected axis {axis} among {len(x.shape)}, and not the batch's, got shape {x.shape}")
        return ()

    def forward(params, x):
        init(None, x)
        z, least = x.astype(wide(x.dtype)), jnp.asarray(eps, wide(x.dtype))
        squares = (z * z).sum(axis, keepdims=True)
        length = jnp.sqrt(jnp.where(squares > 0, squares, 1))  # of 0, autodiff would take the root's slope
        length = jnp.where(squares > 0, length, 0)
        y = (z / jnp.where(length >= least, length, least)).astype(x.dtype)
        return y, (y, length)

    def backward(params, residuals, dy):
        # y = x/n with n = ‖x‖:  ∂y_i/∂x_j = ([i = j] − y_i y_j)/n, so dx = (dy − y Σ y dy)/n;  dy/ε where n < ε
        y, length = residuals
        y, d, least = y.astype(length.dtype), dy.astype(length.dtype), jnp.asarray(eps, length.dtype)
        along = jnp.where(length >= least, (y * d).sum(axis, keepdims=True), 0)
        return (), ((d - y * along) / jnp.where(length >= least, length, least)).astype(dy.dtype)

    layer = stateless("l2_normalize", init, forward, backward)
    return by_position(layer) if axis == -1 else layer


def local_response_norm(size: int = 5, *, alpha=1e-4, beta=0.75, k=1.0) -> Layer:
    """``y_c = x_c / s_c^β`` with ``s_c = k + α/size · Σ_j x_j²`` over ``size`` channels about c, ``x (B, ..., C)``.

    Of the neighbours ``⌊size/2⌋`` stand before c and the rest after it; beyond the ends are zeros. Numbers may be
    traced; raises ValueError for a size that is no whole number. PyTorch's ``LocalResponseNorm`` is the same; the paper
    has k = 2, n = 5 and α not divided. Source: Krizhevsky et al., "ImageNet classification with deep convolutional
    neural networks", 2012, 3.3.

    >>> local_response_norm(1, alpha=3.0, beta=1.0).forward((), (), jnp.array([[1.0]]))[0].tolist()
    [[0.25]]
    """
    require_counts("local_response_norm", size=size)
    before, after = size // 2, (size - 1) // 2

    def about(v, before, after):  # the sum over the channels from so many before to so many after
        spread = jax.lax.pad(v, jnp.zeros((), v.dtype), (*[(0, 0, 0)] * (v.ndim - 1), (before, after, 0)))
        return sum(jax.lax.slice_in_dim(spread, i, i + v.shape[-1], axis=-1) for i in range(before + after + 1))

    def numbers(dtype):
        return jnp.asarray(alpha, dtype) / size, jnp.asarray(beta, dtype), jnp.asarray(k, dtype)

    def init(key, x):
        require_features(x)
        return ()

    def forward(params, x):
        require_features(x)
        z = x.astype(wide(x.dtype))
        a, b, first = numbers(z.dtype)
        s = first + a * about(z * z, before, after)
        return (z * s**-b).astype(x.dtype), (x, s)

    def backward(params, residuals, dy):
        # ∂y_c/∂x_j = [c = j] s_c^−β − β x_c s_c^(−β−1) · 2α/size x_j for c about j:
        # dx_j = dy_j s_j^−β − 2αβ/size x_j Σ_c dy_c x_c s_c^(−β−1), c from as many after j as were before
        x, s = residuals
        z, d = x.astype(s.dtype), dy.astype(s.dtype)
        a, b, _ = numbers(s.dtype)
        scaled = d * s**-b
        return (), (scaled - 2 * a * b * z * about(scaled * z / s, after, before)).astype(dy.dtype)

    return by_position(stateless("local_response_norm", init, forward, backward))


def over_features(v, counted):
    """The mean of ``v (B, ..., C)`` at each position."""
    return v.mean(-1, keepdims=True)


def _within(name, mean, centre: bool, eps, scale, bias, check=lambda x: None) -> Layer:
    """``y = γ x̂ + β`` with statistics that ``mean`` takes within each example; none is subtracted unless ``centre``.

    ``mean(v, counted)`` is over what is counted, all of it if that is None.
    """
    require(eps >= 0, f"{name}: eps = {eps}; expected at least 0")
    require_initializers(name, "scale", "bias", scale=scale, bias=bias)

    def init(key, x):
        x, _ = split_mask(x)
        require_features(x)
        check(x)
        return affine_params(key, x, scale, bias)

    def forward(params, x):
        x, mask = split_mask(x)
        require_features(x, next((leaf.shape[0] for leaf in jax.tree.leaves(params)), None))
        require_params(params, **affine_shapes(x, scale, bias))
        check(x)
        counted = None if mask is None else counted_rows(x, mask).reshape(*x.shape[:-1], 1)
        dtype = wide(x.dtype)
        v = only(x.astype(dtype), counted)
        if centre:
            v = only(v - mean(v, counted), counted)
        r = 1 / jnp.sqrt(mean(v * v, counted) + jnp.asarray(eps, dtype))
        normal = v * r
        y = only(affine(params, rows(normal)).reshape(x.shape), counted)
        return with_mask(y.astype(x.dtype), mask), (normal.astype(x.dtype), r, counted)

    def backward(params, residuals, dy):
        normal, r, counted = residuals
        dy = dy[0] if isinstance(dy, tuple) else dy
        normal, d = normal.astype(r.dtype), only(dy.astype(r.dtype), counted)
        # y = γ x̂ + β:  dβ = Σ dy,  dγ = Σ dy x̂,  dx̂ = γ dy
        dscale, dbias = rows(d * normal).sum(0), rows(d).sum(0)
        if "scale" in params:
            d = (rows(d) * params["scale"][None].astype(d.dtype)).reshape(dy.shape)
        # ∂x̂_i/∂x_j = r ([i = j] − 1/n − x̂_i x̂_j / n), the 1/n from the mean:  dx = r (dx̂ − mean dx̂ − x̂ mean(dx̂ x̂))
        dx = r * (d - normal * mean(d * normal, counted) - (mean(d, counted) if centre else 0))
        dx = only(dx, counted).astype(dy.dtype)
        return parameters_gradient(params, dscale, dbias), dx if counted is None else (dx, None)

    return stateless(name, init, forward, backward, several=True)


# --- what they share -------------------------------------------------------------------------------------------------


def affine_params(key, x, scale, bias) -> dict[str, jax.Array]:
    """``{"scale", "bias"}`` for inputs like ``x``, without those whose initializer is None."""
    drawn = {"scale": scale, "bias": bias}
    return {name: f(stream(key, name), x.shape[-1:], x.dtype) for name, f in drawn.items() if f is not None}


def affine_shapes(x, scale, bias) -> dict[str, tuple]:
    """The shapes of these parameters."""
    return {name: tuple(x.shape[-1:]) for name, f in (("scale", scale), ("bias", bias)) if f is not None}


def affine(params, normal):
    """``γ x̂ + β`` for ``x̂ (N, C)``, in its dtype."""
    if "scale" in params:
        normal = normal * params["scale"][None].astype(normal.dtype)
    return normal + params["bias"][None].astype(normal.dtype) if "bias" in params else normal


def parameters_gradient(params, dscale, dbias):
    """The gradients of the parameters that there are, in their dtypes."""
    grads = {"scale": dscale, "bias": dbias}
    return cast_like({name: grads[name] for name in params}, params)


def follow(old, new, decay, count):
    """``decay · old + (1 − decay) · new`` in the dtype of ``old``, and ``old`` where nothing counts; no gradient."""
    moved = (decay * old.astype(decay.dtype) + (1 - decay) * new).astype(old.dtype)
    return jax.lax.stop_gradient(jnp.where(count > 0, moved, old))


def only(v, counted):
    """``v (..., C)``, and 0 where ``counted (..., 1)`` is False: by selection, so that NaN there stays there."""
    return v if counted is None else jnp.where(counted, v, 0)


def counted_rows(x, mask):
    """A mask over leading axes of ``x (B, ..., C)`` as ``(N, 1)``."""
    if mask.dtype != bool:
        raise LayerError(f"expected a boolean mask, got {mask.dtype}: True is what counts")
    if not 1 <= mask.ndim < x.ndim or mask.shape != x.shape[: mask.ndim]:
        raise LayerError(f"expected a mask over leading axes of {x.shape[:-1]}, got shape {mask.shape}")
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - 1 - mask.ndim))
    return jnp.broadcast_to(mask, x.shape[:-1]).reshape(math.prod(x.shape[:-1]), 1)


def require_features(x, features: int | None = None):
    """Raise `LayerError` unless ``x`` is floating ``(B, ..., C)``, with C ``features`` if that is given."""
    require_array(x)
    if len(x.shape) < 2:
        raise LayerError(f"expected a batch axis and features, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError(f"expected floating features, got {x.dtype}: convert the inputs, say to float32")
    if features not in (None, x.shape[-1]):
        raise LayerError(f"expected {features} features, got {x.shape[-1]}")
