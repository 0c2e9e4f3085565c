"""Models of long sequences: stacks of causal convolutions.

Legend: B batch, T time, V classes, C channels, S those of the skip connections, k kernel size, d dilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from fnet.core.checks import described, require_counts
from fnet.core.numerics import wide
from fnet.layers import conv, dense, embedding, multiply, parallel, relu, serial, sigmoid, tanh
from fnet.layers.children import backward_child, forward_child, init_child
from fnet.layers.combinators import require_children
from fnet.types import Layer, LayerError


def wavenet_block(channels: int, *, skip: int, dilation: int = 1, kernel_size: int = 2, last: bool = False) -> Layer:
    """``z = tanh(f(x)) ⊙ σ(g(x))``, then ``x + r(z)`` and, beside it, the sum of all ``s(z)`` so far.

    ``f`` and ``g`` are causal convolutions of ``channels`` C with this dilation, ``r`` and ``s`` dense layers to C and
    to ``skip`` S. ``x (B, T, C)`` gives ``(y, total (B, T, S))``, and ``(x, total)`` gives ``(y, total + s(z))``; the
    sum is in float32 at least. The ``last`` has no ``r`` and gives the sum alone, in the dtype of ``x``. Raises
    `LayerError` for other inputs. Source: van den Oord et al., arXiv:1609.03499, figure 4.
    """
    require_counts("wavenet_block", channels=channels, skip=skip, dilation=dilation, kernel_size=kernel_size)
    convolve = conv(channels, (kernel_size,), dilation=dilation, padding="CAUSAL")
    branches = parallel(("filter", serial(convolve, tanh())), ("gate", serial(convolve, sigmoid())))
    outward = [("skip", dense(skip)), *([] if last else [("residual", dense(channels))])]
    unit = serial(("branches", branches), multiply(), ("outward", parallel(*outward)))
    children = (("unit", unit),)

    def split(given: Any) -> tuple[Any, Any]:
        x: Any
        x, total = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        if len(getattr(x, "shape", ())) != 3 or x.shape[2] != channels:
            raise LayerError(f"expected x (B, T, {channels}) or (x, total), got {described(given)}")
        return x, total

    def init(key, given):
        params, state = init_child("unit", unit, key, split(given)[0])
        return {"unit": params}, {"unit": state}

    def forward(params, state, given, *, key=None, train=False):
        require_children("params", params, children)
        require_children("state", state, children)
        x, total = split(given)
        z, new_state, residuals = forward_child("unit", unit, params["unit"], state["unit"], x, key=key, train=train)
        more = z[0].astype(wide(x.dtype))
        if total is not None:
            if total.shape != more.shape:
                raise LayerError(f"expected a sum of shape {more.shape}, got {total.shape}")
            more = total.astype(more.dtype) + more
        y = more.astype(x.dtype) if last else (x + z[1], more)
        # empty arrays carry the dtypes of x and of the sum before, None where there was none
        dtypes = jnp.zeros(0, x.dtype), None if total is None else jnp.zeros(0, total.dtype)
        return y, {"unit": new_state}, (residuals, dtypes)

    def backward(params, residuals, dy):
        # (y, total') = (x + r, total + s) with (s, r) = u(x):  dx = dy + that by u of (dtotal', dy), dtotal = dtotal'
        residuals, (like, total) = residuals
        *dnext, dtotal = (dy,) if last else dy
        d = (dtotal.astype(like.dtype), *dnext)
        dunit, dx = backward_child("unit", unit, params["unit"], residuals, d)
        dx = sum(dnext, dx)
        return {"unit": dunit}, dx if total is None else (dx, dtotal.astype(total.dtype))

    return Layer("wavenet_block", init, forward, backward, children)


def wavenet(
    classes: int,
    *,
    channels: int,
    skip: int,
    dilations: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) * 3,
    kernel_size: int = 2,
) -> Layer:
    """WaveNet over ids ``(B, T)`` of samples, such as the 256 of μ-law, to logits ``(B, T, V)`` of each next one.

    A table of ``channels`` for each class, a `wavenet_block` for each of ``dilations``, and on the sum of their skip
    connections relu, a dense layer of ``skip`` units, relu and a dense layer. Logits depend on the last ``1 + (k − 1)
    Σ d`` samples, with the defaults 3070; at 0 and before zeros stand. The table is a convolution of one-hot rows of
    kernel size 1, where the paper has a causal one of two. Source: van den Oord et al., arXiv:1609.03499.

    >>> import jax
    >>> model = wavenet(8, channels=4, skip=6, dilations=(1, 2))
    >>> params, state = model.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 5), "int32"))
    >>> list(params), model.forward(params, state, jax.numpy.zeros((1, 5), int))[0].shape
    (['embedding', 'block_0', 'block_1', 'head'], (1, 5, 8))
    """
    require_counts("wavenet", **{f"dilations[{i}]": dilation for i, dilation in enumerate(dilations)})
    if not len(dilations):
        raise ValueError("wavenet: dilations are none; expected at least one, such as (1, 2, 4, 8)")
    blocks = [
        wavenet_block(channels, skip=skip, dilation=d, kernel_size=kernel_size, last=i == len(dilations) - 1)
        for i, d in enumerate(dilations)
    ]
    return serial(
        ("embedding", embedding(classes, channels)),
        *((f"block_{i}", block) for i, block in enumerate(blocks)),
        ("head", serial(relu(), dense(skip), relu(), dense(classes))),
    )._replace(name="wavenet")
