"""Dropout: entries set to 0 at random while training.

Legend: B batch; `...` any further axes; p rate.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fnet.core.checks import require, require_array, require_key
from fnet.core.numerics import wide
from fnet.layers.masks import by_position
from fnet.types import Layer, LayerError


def dropout(rate, *, shared_axes: tuple[int, ...] = ()) -> Layer:
    """In training ``y = x m / (1 − p)`` with ``m`` 1 with probability ``1 − p`` and else 0; in inference ``y = x``.

    ``x (B, ...)`` is any floating array. ``rate`` p is a number with ``0 <= p < 1``, possibly traced. One draw serves
    along each of ``shared_axes``: ``dropout(p, shared_axes=(1, 2))`` drops whole channels of images ``(B, H, W, C)``.

    The draw depends on the key and the shape alone, not on the dtype. Raises ValueError for a rate out of range, and
    `LayerError` in training without a key, for inputs that are not floating, and for axes that ``x`` does not have.

    Source: Srivastava et al., JMLR 15 (2014), who scale in inference; scaling in training, as PyTorch, Keras and flax
    do, has the same expectation.

    >>> x = jnp.ones((1, 8))
    >>> dropout(0.5).forward((), (), x, key=jax.random.key(0), train=True)[0].tolist()
    [[0.0, 0.0, 2.0, 2.0, 0.0, 2.0, 2.0, 0.0]]
    """
    if not hasattr(rate, "dtype") and not isinstance(rate, int | float):
        raise TypeError(f"dropout: rate = {rate!r}; expected a number, 0 <= rate < 1")
    require((rate >= 0) & (rate < 1), f"dropout: rate = {rate}; expected 0 <= rate < 1")
    if not isinstance(shared_axes, tuple):
        raise TypeError(f"dropout: shared_axes = {shared_axes!r}; expected a tuple of axes, such as (1, 2)")

    def scaled(x, mask):
        dtype = wide(x.dtype)
        share = jnp.asarray(1 - rate, dtype)
        # nothing is divided by 0 at a traced rate of 1, which drops everything
        return jnp.where(mask, x.astype(dtype) / jnp.where(share > 0, share, 1), 0).astype(x.dtype)

    def forward(params, state, x, *, key=None, train=False):
        require_array(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise LayerError(f"expected floating inputs, got {x.dtype}: drop after the embedding, or convert them")
        if not all(-x.ndim <= axis < x.ndim for axis in shared_axes):
            raise LayerError(f"expected the shared axes {shared_axes} among {x.ndim}, got inputs of shape {x.shape}")
        if not train:
            return x, state, None
        if key is None:
            raise LayerError("expected a key in training, got None: pass forward(..., key=key, train=True)")
        require_key("dropout", key)
        shared = {axis % x.ndim for axis in shared_axes}
        shape = tuple(1 if axis in shared else n for axis, n in enumerate(x.shape))
        mask = jax.random.bernoulli(key, jnp.asarray(1 - rate, jnp.float32), shape)
        return scaled(x, mask), state, mask

    def backward(params, mask, dy):  # y_i = x_i m_i / (1 − p):  dx_i = dy_i m_i / (1 − p), and dy where nothing dropped
        return (), dy if mask is None else scaled(dy, mask)

    return by_position(Layer("dropout", lambda key, x: ((), ()), forward, backward))
