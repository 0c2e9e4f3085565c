"""Dense layers: a product with a matrix.

Legend: B batch, I features in, O features out; `...` any further axes, over which the same matrix serves.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fnet.core.checks import is_whole, require_counts, require_params
from fnet.core.numerics import stream, wide
from fnet.layers.initializers import he_normal, require_initializers, zeros
from fnet.layers.masks import by_position
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


def dense(units: int, *, weights=he_normal(), bias=zeros()) -> Layer:
    """``y = x w + b`` with ``x (B, ..., I)``, ``w (I, O)``, ``b (O,)``, ``y (B, ..., O)``; O is ``units``.

    ``weights`` and ``bias`` are initializers; ``bias=None`` leaves the bias out.
    Parameters take the dtype of ``x``. Raises `LayerError` where ``x`` has no batch axis, is not floating, or does not
    have the features or the dtype of ``w``.

    Keras' default is Glorot uniform, flax' LeCun normal; PyTorch stores the transpose ``(O, I)``.

    >>> layer = dense(3)
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((32, 4), "float32"))
    >>> jax.tree.map(lambda leaf: leaf.shape, params)
    {'b': (3,), 'w': (4, 3)}
    """
    require_counts("dense", units=units)
    require_initializers("dense", "bias", weights=weights, bias=bias)
    shapes = {"w": (None, units)} if bias is None else {"w": (None, units), "b": (units,)}

    def init(key, x):
        if len(x.shape) < 2:
            raise LayerError(f"expected a batch axis and features, got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise LayerError(f"expected floating features, got {x.dtype}: convert the inputs, say to float32")
        params = {"w": weights(stream(key, "w"), (x.shape[-1], units), x.dtype)}
        if bias is not None:
            params["b"] = bias(stream(key, "b"), (units,), x.dtype)
        return params

    def forward(params, x):
        require_params(params, **shapes)
        return affine(params, x)

    layer = stateless("dense", init, forward, affine_backward)
    return by_position(layer._replace(outer=affine_outer))


def affine(params, x):
    """``x w + b``, or ``x w``, and the residual ``x``."""
    w = params["w"]
    if x.ndim < 2:
        raise LayerError(f"expected a batch axis and {w.shape[0]} features, got shape {x.shape}")
    if x.shape[-1] != w.shape[0]:
        raise LayerError(f"expected {w.shape[0]} features, got {x.shape[-1]}")
    if x.dtype != w.dtype:
        raise LayerError(f"expected {w.dtype} features like its parameters, got {x.dtype}: convert the inputs")
    y = wide_product(rows(x), w)
    if "b" in params:
        y = plus(y, params["b"])
    return y.astype(x.dtype).reshape(*x.shape[:-1], w.shape[1]), x


def affine_backward(params, x, dy):
    """The gradients by the parameters and by ``x``."""
    # y = x w + b with examples as rows:  dw = xᵀ dy,  db = Σ_rows dy,  dx = dy wᵀ
    w, dy_rows = params["w"], rows(dy)
    dparams = {"w": product(rows(x).T, dy_rows)}
    if "b" in params:
        dparams["b"] = dy_rows.sum(0)
    return dparams, product_with_rows(dy_rows, w).reshape(x.shape)


def affine_outer(params, x, dy):
    """``dw = Σ_n x_n dy_nᵀ`` and ``db = Σ_n 1 · dy_n``, the positions of an example along N."""
    steps = math.prod(x.shape[1:-1])
    return outer_of(params, *(a.reshape(a.shape[0], steps, a.shape[-1]) for a in (x, dy)))


def outer_of(params, x: jax.Array, dy: jax.Array) -> dict:
    """The pairs of ``w`` and, where there is one, of ``b``, from ``x (B, N, I)`` and ``dy (B, N, O)``."""
    found = {"w": (x, dy)}
    return {**found, "b": (jnp.ones((*x.shape[:2], 1), x.dtype), dy)} if "b" in params else found


def rows(x: jax.Array) -> jax.Array:
    """All axes but the last as one: on CPU the product of two matrices takes half the time of a batched one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` in their dtype, summed in float32 at least: every product of the layers is taken by this rule."""
    return wide_product(a, b).astype(a.dtype)


def product_with_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b.T`` by `product`'s rule; not with ``b.T``, which XLA would gather beside ``b`` where it is split."""
    return wide_product_with_rows(a, b).astype(a.dtype)


def wide_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`product`, not yet rounded back to 16 bits: what is added to it is rounded once with it."""
    return jnp.matmul(a, b, preferred_element_type=wide(a.dtype))


def wide_product_with_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """`product_with_rows`, not yet rounded back to 16 bits."""
    over_columns = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, over_columns, preferred_element_type=wide(a.dtype))


def plus(y: jax.Array, b: jax.Array) -> jax.Array:
    """``y (..., O) + b (O,)`` in float32 at least.

    Autodiff sums the gradient of what is broadcast in the dtype in which it is broadcast: so b is widened before.
    """
    dtype = wide(y.dtype)
    return y.astype(dtype) + b.astype(dtype).reshape((1,) * (y.ndim - 1) + b.shape)


def reshape(*shape: int) -> Layer:
    """``x (B, ...)`` to ``y (B, *shape)``, the entries in the same order; one of ``shape`` may be -1, what remains.

    >>> reshape(28, 28, 1).forward((), (), jnp.ones((2, 784)))[0].shape
    (2, 28, 28, 1)
    """
    if not all(is_whole(size, -1) for size in shape) or shape.count(-1) > 1:
        raise ValueError(f"reshape: shape = {shape}; expected whole sizes of at least 0, one of them -1 at most")

    def forward(params, x):
        entries, known = math.prod(x.shape[1:]), math.prod(size for size in shape if size >= 0)
        if entries != known and (-1 not in shape or known == 0 or entries % known):
            raise LayerError(f"cannot give an example of {entries} entries, {x.shape[1:]}, the shape {shape}")
        # the residual is an empty array that carries the shape, so that nothing is kept
        sizes = (entries // max(known, 1) if size == -1 else size for size in shape)  # told, since B may be 0
        return x.reshape(x.shape[0], *sizes), jnp.zeros((0, *x.shape), x.dtype)

    def backward(params, shape_of_x, dy):  # y holds the entries of x in the same order, so dx holds those of dy
        return (), dy.reshape(shape_of_x.shape[1:])

    return stateless("reshape", lambda key, x: (), forward, backward)


def flatten() -> Layer:
    """``x (B, ...)`` to ``y (B, product of the rest)``."""
    return reshape(-1)._replace(name="flatten")
