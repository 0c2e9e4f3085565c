"""A layer of sequences on the windows of an image.

Legend: B batch, H W height and width, C channels, O those of the outputs, M side of a window, N = H W / M² windows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import is_whole, require_array, require_counts, require_layer
from fnet.layers.masks import split_mask, with_mask
from fnet.types import Layer, LayerError


def windowed(layer: Layer, window: int, *, shift: int = 0) -> Layer:
    """The layer on each window of M × M pixels as a sequence of M²: images ``(B, H, W, C)`` to ``(B, H, W, O)``.

    ``window`` is M; it divides H and W. The layer maps ``(B N, M², C)`` to ``(B N, M², O)``; its parameters stay as
    they are. With a ``shift`` from 1 to M − 1 the windows begin so many pixels further down and to the right,
    and those beyond the edge wrap round. What was no neighbour does not see each other there: the layer is given
    ``(x, mask (B N, M², M²))``, as `attention` takes it, and returns ``(y, mask)``. An axis of one window is not
    shifted. Raises ValueError for a shift that does not fit, `LayerError` for images that do not.

    Source: Liu et al., arXiv:2103.14030. torchvision pads images that M does not divide; there masked scores are less
    by 100, here they do not count.

    >>> from fnet.layers import attention
    >>> x = jnp.ones((2, 4, 6, 3))
    >>> layer = windowed(attention(1), 2, shift=1)
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> layer.forward(params, state, x)[0].shape
    (2, 4, 6, 3)
    """
    require_layer("windowed: layer", layer)
    require_counts("windowed", window=window)
    if not is_whole(shift, 0) or shift >= window:
        raise ValueError(f"windowed: shift = {shift!r}; expected a whole number from 0 to {window - 1}, window less 1")

    def shifts(height, width):
        return tuple(shift if size > window else 0 for size in (height, width))

    def cut(x):
        """``(B, H, W, C)`` to ``(B N, M², C)``."""
        batch, height, width, channels = x.shape
        rows, columns = height // window, width // window
        x = jnp.roll(x, tuple(-n for n in shifts(height, width)), (1, 2))
        x = x.reshape(batch, rows, window, columns, window, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch * rows * columns, window * window, channels)

    def joined(x, batch, height, width):
        """What `cut` took apart."""
        rows, columns, channels = height // window, width // window, x.shape[-1]
        x = x.reshape(batch, rows, columns, window, window, channels).transpose(0, 1, 3, 2, 4, 5)
        return jnp.roll(x.reshape(batch, height, width, channels), shifts(height, width), (1, 2))

    def neighbours(batch, height, width):
        """Which pixels of a window see each other: those of which both or neither wrapped round, by each axis."""
        down, right = shifts(height, width)
        if not down and not right:
            return None
        wrapped = 2 * (np.arange(height) >= height - down)[:, None] + (np.arange(width) >= width - right)
        grid = wrapped.reshape(height // window, window, width // window, window).transpose(0, 2, 1, 3)
        grid = grid.reshape(-1, window * window)
        pairs = jnp.asarray(grid[:, :, None] == grid[:, None])
        return jnp.broadcast_to(pairs, (batch, *pairs.shape)).reshape(batch * len(pairs), *pairs.shape[1:])

    def init(key, x):
        require_images(x)
        return layer.init(key, jax.eval_shape(cut, x))

    def forward(params, state, x, *, key=None, train=False):
        require_images(x)
        given = with_mask(cut(x), neighbours(*x.shape[:3]))
        y, state, residuals = layer.forward(params, state, given, key=key, train=train)
        y = split_mask(y)[0]
        wanted = (given[0] if isinstance(given, tuple) else given).shape[:2]
        if len(getattr(y, "shape", ())) != 3 or y.shape[:2] != wanted:
            raise LayerError(f"expected outputs {(*wanted, 'features')} of {layer.name}, got {getattr(y, 'shape', y)}")
        return joined(y, *x.shape[:3]), state, residuals

    def backward(params, residuals, dy):  # cut and joined only move entries: each one's transpose is the other
        masked = any(shifts(*dy.shape[1:3]))
        dparams, dx = layer.backward(params, residuals, (cut(dy), None) if masked else cut(dy))
        return dparams, joined(dx[0] if masked else dx, *dy.shape[:3])

    def require_images(x):
        require_array(x)
        if len(x.shape) != 4 or x.shape[1] % window or x.shape[2] % window or not x.shape[1] or not x.shape[2]:
            raise LayerError(f"expected images (B, H, W, C) with sides that {window} divides, got shape {x.shape}")

    return Layer("windowed", init, forward, backward, layer.children)
