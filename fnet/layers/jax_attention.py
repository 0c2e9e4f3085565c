"""Attention by `jax.nn.dot_product_attention`, of which nothing is by hand: cuDNN's kernel, or XLA's form of it.

The one place in `fnet.layers` where a backward is a library's own. `fnet.layers.dot_product` has those by hand.

Legend: B batch, T queries, S positions of the memory, H heads, K heads of keys and values, D features of a head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.numerics import wide
from fnet.core.platforms import platform
from fnet.types import LayerError

Form = Literal["cudnn", "xla"] | None


class ByJax(NamedTuple):
    """What is kept for the backward, which computes all else anew."""

    q: jax.Array  # (B, T, H, D)
    k: jax.Array  # (B, S, K, D)
    v: jax.Array  # (B, S, K, D)


def by_jax(q, k, v, mask, bias, causal: bool, scale, form: Form):
    """``o, residuals``; ``mask`` and ``bias`` have four axes, ``(B or 1, H or 1, T or 1, S)``, or are None."""
    require_fit(q, v, form)
    return attend(mask, causal, scale, form)(q, k, v, bias), ByJax(q, k, v)


def by_jax_backward(residuals: ByJax, do, mask, bias, causal: bool, scale, form: Form):
    """``dq, dk, dv, dbias``."""
    # not by hand: jax' derivative of jax' function (of cuDNN's kernel, cuDNN's), which runs the forward a second time
    return jax.vjp(attend(mask, causal, scale, form), *residuals, bias)[1](do)


def attend(mask, causal: bool, scale, form: Form):
    """The function of ``q, k, v, bias``; a query that may attend to nothing is given 0, which jax does not do."""

    def run(q, k, v, bias):
        allowed, (length, memory) = mask, (q.shape[1], k.shape[1])
        if bias is not None:
            given = bias != -jnp.inf  # −∞ leaves a pair out; a row of nothing else would be NaN
            allowed = given if allowed is None else allowed & given
            bias = jnp.where(given, bias, 0).astype(q.dtype if form == "cudnn" else wide(q.dtype))
            bias = jnp.broadcast_to(bias, (*bias.shape[:2], length, memory))
        if allowed is not None:
            allowed = jnp.broadcast_to(allowed, (*allowed.shape[:2], length, memory))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which jax' function needs
            o = jax.nn.dot_product_attention(q, k, v, bias, allowed, scale=scale, is_causal=causal, implementation=form)
        if allowed is None:
            return o
        if causal:
            allowed = allowed & jnp.asarray(np.tri(length, memory, dtype=bool))[None, None]
        return jnp.where(jnp.swapaxes(allowed.any(-1), 1, 2)[..., None], o, 0)

    return run


def require_form(who: str, form: Form, offset, scale, **without) -> None:
    """Raise ValueError for another form, and for what jax' function cannot do: options that are not None, an offset."""
    if form is None:
        return
    if form not in ("cudnn", "xla"):
        raise ValueError(f"{who}: form = {form!r}; expected 'cudnn', 'xla' or None for fnet's own")
    for name, value in without.items():
        if value is not None:
            raise ValueError(
                f"{who}: {name} = {value!r:.80} beside form = {form!r}, which has none; expected form=None"
            )
    if not isinstance(offset, int) or offset:
        raise ValueError(f"{who}: offset = {offset!r:.80} beside form = {form!r}; expected 0, or form=None")
    if not isinstance(scale, int | float | None):
        raise ValueError(
            f"{who}: scale = {scale!r:.80} beside form = {form!r}; expected None or a number of Python, or form=None"
        )


def require_fit(q, v, form: Form) -> None:
    """Raise `LayerError` for arrays and platforms that the form does not take."""
    if v.shape[3] != q.shape[3]:
        raise LayerError(
            f"form = {form!r}: expected values of as many features as keys, got {v.shape[3]} and {q.shape[3]}: "
            "form=None takes others"
        )
    if form != "cudnn":
        return
    if platform() not in ("gpu", "cuda"):
        raise LayerError(
            f"form = 'cudnn': expected a GPU of NVIDIA's, got the platform {platform()}: form='xla' is the same "
            "function of jax anywhere, form=None fnet's own"
        )
    if q.dtype not in (jnp.float16, jnp.bfloat16) or q.shape[3] % 8:
        raise LayerError(
            f"form = 'cudnn': expected bfloat16 or float16 and heads of a multiple of 8 features, got {q.dtype} and "
            f"{q.shape[3]}: mixed_precision(model) computes in bfloat16; form=None takes anything"
        )
