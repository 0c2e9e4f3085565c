"""Numbers as all of fnet has them: which dtype sums are kept in, means that are not divided yet, keys by name."""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnet.types import Mean, PyTree


def wide(*dtypes) -> np.dtype:
    """Float64 if one of the dtypes is, else float32: what sums, moments and coefficients are kept in."""
    return np.dtype(np.float64 if any(dtype == np.float64 for dtype in dtypes) else np.float32)


def is_key(leaf: Any) -> bool:
    """Whether these are typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def words_of(leaf: Any) -> Any:
    """A key's words, or the array itself."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def with_words(like: Any, words: jax.Array) -> jax.Array:
    """A key of ``like``'s kind that has these `words_of`, or the array itself."""
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(like)) if is_key(like) else words


def bytes_of(tree: PyTree) -> int:
    """Bytes of a tree's arrays, or of their shapes; of a key those of its words."""
    words = [jax.eval_shape(words_of, leaf) if is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in words)


def is_floating_dtype(dtype) -> bool:
    """Whether this names a floating dtype."""
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def weighted_mean(values: jax.Array, weights: jax.Array | None = None, axes: int = 1) -> Mean:
    """``Σ w v`` and ``Σ w`` over the first ``axes`` axes of ``values``; ``weights`` may have fewer axes than that.

    Without weights every entry counts 1. Both are summed in float32 at least.
    """
    over = tuple(range(axes))
    values = values.astype(wide(values.dtype))
    if weights is None:
        return Mean(values.sum(over), jnp.asarray(math.prod(values.shape[:axes]), values.dtype))
    if weights.ndim > axes or weights.shape != values.shape[: weights.ndim]:
        raise ValueError(
            f"weights of shape {weights.shape} do not fit values of shape {values.shape}: "
            f"expected {values.shape[:axes]}"
        )
    w = jnp.expand_dims(weights.astype(values.dtype), tuple(range(weights.ndim, values.ndim)))
    # where, not a product alone: an example of weight 0 counts nothing even if its value is infinite
    total = jnp.where(w == 0, 0, w * values).sum(over)
    return Mean(total, w.sum() * math.prod(values.shape[weights.ndim : axes]))


def infinite(who: str) -> jax.Array:
    """Infinity, as the best of nothing; raises ValueError where jax_debug_infs would refuse it."""
    settings: Any = jax.config
    if settings.jax_debug_infs:
        raise ValueError(
            f"{who}: jax_debug_infs is on, and its best is infinite before it has seen a value; expected it off: "
            "fit looks itself for what is not finite, and says where"
        )
    return jnp.array(math.inf, float)


def stream(key: jax.Array, name: str) -> jax.Array:
    """A key for the use called ``name``, independent of every other name's."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
