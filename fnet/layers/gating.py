"""Gates: activations that are ``x`` times a gate of its own, and units whose gate is a projection of its own.

Gates go to 0 on one side and to 1 on the other, ``y`` to 0 and to ``x``, without NaN at infinity.
Legend: B batch, I features in, U units; `...` any further axes; z the input where the derivation names it,
σ(z) = 1/(1 + e^−z).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fnet.core.checks import require_counts, require_layer, require_numbers
from fnet.core.numerics import wide
from fnet.layers.activation import by_entry, logistic, sigmoid, without_parameters
from fnet.layers.combinators import multiply, parallel, serial
from fnet.layers.dense import dense
from fnet.layers.initializers import he_normal, zeros
from fnet.layers.pooling import global_avg_pool
from fnet.layers.rectifiers import relu
from fnet.types import Layer, LayerError


def between(x: jax.Array, low: float, high: float) -> jax.Array:
    """``x`` in float32 at least, no further out than ``low`` and ``high``, where derivatives are 0; NaN passes."""
    z = x.astype(wide(x.dtype))
    return jax.lax.clamp(jnp.asarray(low, z.dtype), z, jnp.asarray(high, z.dtype))


def gelu(approximate: bool = False) -> Layer:
    """``y = x Φ(x)`` with the normal distribution function Φ; its tanh form if ``approximate``.

    Exact: ``Φ(x) = erfc(-x/√2)/2``. Approximate: ``½ (1 + tanh(√(2/π) (x + 0.044715 x³)))``. Source: Hendrycks and
    Gimpel, arXiv:1606.08415. The default of PyTorch and Keras 2 is the exact form, that of JAX and of Keras 3's
    ``keras.ops`` the other: name it.
    """
    cubic, scale = 0.044715, math.sqrt(2 / math.pi)

    # all in float32 at least: a rounding of the argument to 16 bits would be x² times larger in the tail's result

    def gate(x):
        # ½ (1 + tanh u) is σ(2u), which does not cancel where u is below 0
        return jax.nn.sigmoid(2 * scale * (x + cubic * x * x * x))

    def near(x):
        # beyond ±40 the gate is exactly 1 or 0 in float64 too, and cubes overflow: an infinity times exactly 0
        return between(x, -40, 40)

    def exact_forward(x):
        z = near(x)
        return jnp.where(x >= 40, x, (z * (jax.lax.erfc(-z * math.sqrt(0.5)) / 2)).astype(x.dtype)), x

    def exact_backward(x, dy):  # y' = Φ(z) + z φ(z), φ the density exp(−z²/2)/√(2π)
        z, d = near(x), dy.astype(wide(dy.dtype))
        density = jnp.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return (d * (jax.lax.erfc(-z * math.sqrt(0.5)) / 2 + z * density)).astype(dy.dtype)

    def tanh_forward(x):
        z = near(x)
        return jnp.where(x >= 40, x, (z * gate(z)).astype(x.dtype)), x

    def tanh_backward(x, dy):
        # y = z g, g = σ(2u), u = s (z + c z³):  y' = g + z · 2 g (1 − g) · s (1 + 3 c z²)
        z, d = near(x), dy.astype(wide(dy.dtype))
        g = gate(z)
        return (d * (g + z * 2 * g * (1 - g) * (scale * (1 + 3 * cubic * z * z)))).astype(dy.dtype)

    if approximate:
        return by_entry("gelu", tanh_forward, tanh_backward)
    return by_entry("gelu", exact_forward, exact_backward)


def silu(beta=1.0) -> Layer:
    """``y = x σ(βx)``, also called Swish; ``beta`` may be traced: 1 is the SiLU, 0 is ``x/2``, large ones near relu.

    Source: Ramachandran et al., arXiv:1710.05941; Elfwing et al., arXiv:1702.03118. PyTorch's ``SiLU``, JAX' and Keras'
    ``silu`` have β = 1.
    """
    require_numbers("silu", beta=beta)

    def argument(x):  # beyond ±1000 the gate is exactly 1 or 0 in float64 too
        largest = float(jnp.finfo(x.dtype).max)
        return between(jnp.asarray(beta, wide(x.dtype)) * between(x, -largest, largest), -1000, 1000)

    def forward(x):
        gate = logistic(argument(x))
        return (jnp.where(gate == 0, 0, x).astype(gate.dtype) * gate).astype(x.dtype), x

    def backward(x, dy):  # y' = σ(u) + βz σ'(u) with u = βz, and σ'(u) = σ(u) σ(−u):  y' = σ(u) (1 + u σ(−u))
        u, d = argument(x), dy.astype(wide(dy.dtype))
        return (d * (logistic(u) * (1 + u * logistic(-u)))).astype(dy.dtype)

    return by_entry("silu", forward, backward)


def mish() -> Layer:
    """``y = x tanh(log(1 + exp(x)))``. Source: Misra, arXiv:1908.08681. PyTorch, Keras and JAX the same."""

    # with p = e^z, tanh(log(1 + p)) = ((1 + p)² − 1)/((1 + p)² + 1) = n/(n + 2), n = p (p + 2): nothing cancels

    def near(x):  # beyond, the gate is exactly 0 or 1 in float64 too, and n still finite in float32
        return between(x, -1000, 40)

    def forward(x):
        z = near(x)
        p = jnp.exp(z)
        n = p * (p + 2)
        gate = jnp.where(z > 0, 1 - 2 / (n + 2), n / (n + 2))  # of the second, autodiff would cancel where n is large
        return jnp.where(x >= 40, x, (z * gate).astype(x.dtype)), x

    def backward(x, dy):  # y' = n/(n + 2) + z · 2n'/(n + 2)² with n' = 2p (p + 1)
        z, d = near(x), dy.astype(wide(dy.dtype))
        p = jnp.exp(z)
        r = 1 / (p * (p + 2) + 2)
        return (d * (p * (p + 2) * r + z * 4 * (p * r) * ((p + 1) * r))).astype(dy.dtype)

    return by_entry("mish", forward, backward)


def hard_swish() -> Layer:
    """``y = x`` from 3 on, 0 up to −3, and ``x (x + 3)/6`` between: ``x`` times `hard_sigmoid`.

    The derivative at 3 is 1 and at −3 it is 0, those of the lines beyond. Source: Howard et al., arXiv:1905.02244.
    PyTorch and JAX the same, with these derivatives, and Keras.
    """

    def forward(x):
        z = between(x, -3, 3)
        return jnp.where(x >= 3, x, (z * (z + 3) / 6).astype(x.dtype)), x

    def backward(x, dy):  # y' = (2z + 3)/6 between −3 and 3, else 0 or 1
        z, d = between(x, -3, 3), dy.astype(wide(dy.dtype))
        return (d * jnp.where(z <= -3, 0, jnp.where(z >= 3, 1, (2 * z + 3) / 6))).astype(dy.dtype)

    return by_entry("hard_swish", forward, backward)


# --- a gate beside what it gates -------------------------------------------------------------------------------------


def glu() -> Layer:
    """``y = a σ(b)`` with ``a`` and ``b`` the halves of the last axis: ``x (B, ..., 2U)`` to ``y (B, ..., U)``.

    PyTorch's ``GLU(dim=-1)`` and JAX' ``glu`` the same. Raises `LayerError` for an odd number of features. `gated` has
    the two projections in it. Source: Dauphin et al., arXiv:1612.08083.

    >>> glu().forward((), (), jnp.array([[3.0, 5.0, 0.0, 100.0]]))[0].tolist()
    [[1.5, 5.0]]
    """

    def halves(x):
        if not x.ndim or x.shape[-1] % 2:
            raise LayerError(f"expected an even number of features, to be halved, got shape {tuple(x.shape)}")
        return jnp.split(x.astype(wide(x.dtype)), 2, -1)

    def forward(x):
        a, b = halves(x)
        return (a * logistic(b)).astype(x.dtype), x

    def backward(x, dy):  # da = dy σ(b),  db = dy a σ(b) σ(−b)
        (a, b), d = halves(x), dy.astype(wide(dy.dtype))
        da = d * logistic(b)
        return jnp.concatenate([da, da * a * logistic(-b)], -1).astype(dy.dtype)

    return without_parameters("glu", forward, backward)


def gated(units: int, activation: Layer = sigmoid(), *, weights=he_normal(), bias=zeros()) -> Layer:
    """A gated linear unit ``y = (x V + c) ⊙ f(x W + b)``: ``x (B, ..., I)`` to ``y (B, ..., U)``, U ``units``.

    ``f`` is the ``activation`` of the gate, σ by default; ``bias=None`` leaves both biases out. ``V, c`` is the child
    ``branches/up`` and ``W, b`` is ``branches/gate/dense_0``; transformers that are called gated have a `dense` after
    it, whose width is often 8/3 of the features instead of 4. Initializers and errors are those of `dense`.

    Source: Dauphin et al., arXiv:1612.08083; Shazeer, arXiv:2002.05202, without biases. PyTorch has no such layer;
    Llama's ``gate_proj`` and ``up_proj`` are ``W`` and ``V``.

    >>> params, _ = gated(5).init(jax.random.key(0), jax.ShapeDtypeStruct((8, 3), "float32"))
    >>> jax.tree.map(jnp.shape, params["branches"]["up"])
    {'b': (5,), 'w': (3, 5)}
    """
    require_counts("gated", units=units)
    require_layer("gated: activation", activation)
    up, project = (dense(units, weights=weights, bias=bias) for _ in range(2))
    branches = parallel(("up", up), ("gate", serial(project, activation)))
    return serial(("branches", branches), multiply())._replace(name="gated")


def swiglu(units: int, *, beta=1.0, weights=he_normal(), bias=zeros()) -> Layer:
    """`gated` by `silu`: ``y = (x V + c) ⊙ silu(x W + b)``. Source: Shazeer, arXiv:2002.05202.

    >>> print(swiglu(5))
    swiglu
    ├─ branches: parallel
    │  ├─ up: dense
    │  └─ gate: serial
    │     ├─ dense_0
    │     └─ silu_0
    └─ multiply_0
    """
    return gated(units, silu(beta), weights=weights, bias=bias)._replace(name="swiglu")


def geglu(units: int, *, approximate: bool = False, weights=he_normal(), bias=zeros()) -> Layer:
    """`gated` by `gelu`: ``y = (x V + c) ⊙ gelu(x W + b)``. Source: Shazeer, arXiv:2002.05202."""
    return gated(units, gelu(approximate), weights=weights, bias=bias)._replace(name="geglu")


def reglu(units: int, *, weights=he_normal(), bias=zeros()) -> Layer:
    """`gated` by `relu`: ``y = (x V + c) ⊙ relu(x W + b)``. Source: Shazeer, arXiv:2002.05202."""
    return gated(units, relu(), weights=weights, bias=bias)._replace(name="reglu")


def squeeze_and_excitation(
    features: int,
    hidden: int,
    *,
    activation: Layer = relu(),
    gate: Layer = sigmoid(),
    weights=he_normal(),
    bias=zeros(),
) -> Layer:
    """``y = x ⊙ g(f(m W + b) V + c)`` with ``m`` the mean over space: ``x (B, *S, C)`` to ``y`` alike.

    Each channel is scaled by a gate that sees the means of all. ``features`` is C and ``hidden`` the width between,
    C/16 in the paper; ``f`` is the ``activation``, ``g`` the ``gate``. ``W, b`` is the child ``branches/gate/dense_0``
    and ``V, c`` ``branches/gate/dense_1``, with the initializers of `dense`. Raises `LayerError` for inputs of other
    channels, and for a mask, which the mean ends.

    Source: Hu et al., arXiv:1709.01507. torchvision's ``SqueezeExcitation(C, hidden)``, whose two layers are
    convolutions of 1×1; MobileNetV3 has ``gate=hard_sigmoid()``.

    >>> layer = squeeze_and_excitation(16, 4)
    >>> params, _ = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 5, 5, 16), "float32"))
    >>> jax.tree.map(jnp.shape, params["branches"]["gate"]["dense_0"])
    {'b': (4,), 'w': (16, 4)}
    """
    require_counts("squeeze_and_excitation", features=features, hidden=hidden)
    require_layer("squeeze_and_excitation: activation", activation)
    require_layer("squeeze_and_excitation: gate", gate)
    squeeze, excite = (dense(units, weights=weights, bias=bias) for units in (hidden, features))
    gates = serial(("squeeze", global_avg_pool(keepdims=True)), squeeze, activation, excite, gate)
    branches = parallel(("inputs", of_features(features)), ("gate", gates))
    return serial(("branches", branches), multiply())._replace(name="squeeze_and_excitation")


def of_features(features: int) -> Layer:
    """`identity` of inputs ``(B, ..., C)`` with so many features; `LayerError` for others."""

    def forward(x):
        if x.shape[-1:] != (features,):
            raise LayerError(f"expected {features} features, got shape {tuple(x.shape)}")
        return x, ()

    return without_parameters("identity", forward, lambda residuals, dy: dy)
