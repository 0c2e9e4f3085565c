"""What a recurrent cell computes at one step, and its backward by hand: rnn, lstm, and the gru in its two forms.

`fnet.layers.recurrent` makes layers of them.

Legend: B batch, I in, H units, G gates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnet.core.checks import require_layer
from fnet.core.numerics import wide
from fnet.layers.activation import logistic, tanh_of
from fnet.layers.children import show
from fnet.layers.dense import plus, product
from fnet.layers.initializers import Initializer
from fnet.types import Layer


class LSTMCarry(NamedTuple):
    """What an lstm hands to its next step: the output ``h (B, H)`` and the memory ``c (B, H)``."""

    h: Any
    c: Any


class Cell(NamedTuple):
    """One step of a recurrent layer; ``carry`` is a tuple whose first entry is h.

    - ``step(recurrent, z, carry) -> carry, kept`` with ``z = x W_x + b``.
    - ``slopes(kept, before, after) -> slopes, others``: the factors of ``dz`` that do not depend on later steps, a tree
      like ``dz``: with an array for each product, for one of which a step reads a part is copied whole at every step.
    - ``back(transposed, slopes, others, dcarry) -> dcarry, dz``: gradients by the carry before and by the products;
      ``transposed`` is ``W_hᵀ (G H, H)``, laid out once and not at every step.
    - ``split(dz) -> dz_x, dz_h``: of ``dz`` with steps as rows, what belongs to ``x W_x`` and to ``h W_h``.
    - ``weights(kept, h, dz_h) -> drecurrent``, steps as rows; None where ``x W_x`` and ``h W_h`` have the same dz.
    """

    name: str
    gates: int
    step: Callable
    slopes: Callable
    back: Callable
    split: Callable = lambda dz: (dz, dz)
    weights: Callable | None = None
    bias: Initializer | None = None  # of the recurrent product
    parts: int = 1  # of the carry
    biased: bool = True  # whether params have a "b"


def widened(a: jax.Array) -> jax.Array:
    """In float32 at least."""
    return a.astype(wide(a.dtype))


def rnn_step(activation: Layer) -> Cell:
    """Elman's: ``h = f(x W_x + h W_h + b)``."""
    require_layer("rnn: activation", activation)
    if activation.name == "softmax":
        raise ValueError(f"rnn: activation {activation.name} mixes entries; expected one that acts on each by itself")

    def step(recurrent, z, carry):
        h, _, residuals = activation.forward((), (), z + product(carry[0], recurrent["w"]), key=None, train=False)
        return (h,), None if residuals is h else residuals  # tanh and relu need only their output

    def slopes(residuals, before, after):  # dz = dh · a'(z), and a backward of ones is a'
        residuals = after[0] if residuals is None else residuals
        return activation.backward((), residuals, jnp.ones_like(after[0]))[1], ()

    def back(transposed, slopes, others, dcarry):  # z = … + h W_h:  dh = dz W_hᵀ
        dz = dcarry[0] * slopes
        return (product(dz, transposed),), dz

    return Cell("rnn", 1, step, slopes, back)


def lstm_step() -> Cell:
    """Long short-term memory."""

    def step(recurrent, z, carry):
        h, c = carry
        z = z + product(h, recurrent["w"])
        # not σ(z) = ½ + ½ tanh(z/2), one tanh for all four: that cancels where a gate is nearly shut. And in float32 at
        # least, the gates that are kept too: in 16 bits 1 − σ would be 0 where one is nearly open
        i, f, g, o = jnp.split(z, 4, -1)
        i, f, g, o = show("i", logistic(i)), show("f", logistic(f)), show("g", tanh_of(g)), show("o", logistic(o))
        c = (f * widened(c) + i * g).astype(z.dtype)
        return ((o * tanh_of(c)).astype(z.dtype), c), (i, f, g, o)

    def slopes(gates, before, after):
        # σ' = σ (1 − σ), tanh' = 1 − tanh²:  ∂c/∂z_i = g i(1−i), ∂c/∂z_f = c₋ f(1−f), ∂c/∂z_g = i(1−g²);
        # h = o t with t = tanh(c):  ∂h/∂z_o = t o(1−o), ∂h/∂c = o(1−t²);  ∂c/∂c₋ = f
        i, f, g, o = gates
        t, dtype = tanh_of(after[1]), after[1].dtype
        by_z = [g * i * (1 - i), widened(before[1]) * f * (1 - f), i * (1 - g * g), t * o * (1 - o)]
        return jnp.concatenate(by_z, -1).astype(dtype), ((o * (1 - t * t)).astype(dtype), f.astype(dtype))

    def back(transposed, slopes, others, dcarry):
        (dh, dc), (h_by_c, f) = dcarry, others
        dc = dc + dh * h_by_c
        dz = jnp.concatenate([dc, dc, dc, dh], -1) * slopes
        return (product(dz, transposed), dc * f), dz

    return Cell("lstm", 4, step, slopes, back, parts=2)


def gru_step_after(bias: Initializer | None) -> Cell:
    """The gated recurrent unit, its reset gate after the product with the recurrent weights."""

    def step(recurrent, z, carry):
        (h,), units = carry, carry[0].shape[-1]
        a = product(h, recurrent["w"])
        z_r, z_u = jnp.split(z[..., : 2 * units] + a[..., : 2 * units], 2, -1)
        q = a[..., 2 * units :]
        if "b" in recurrent:
            q = plus(q, recurrent["b"]).astype(q.dtype)
        # 1 − u as σ(−z), which does not cancel where u rounds to 1; all in float32 at least, what is kept too
        r, u, rest = logistic(z_r), logistic(z_u), logistic(-z_u)
        r, u = show("r", r), show("u", u)
        n = show("n", tanh_of(widened(z[..., 2 * units :]) + r * widened(q)))
        return ((rest * n + u * widened(h)).astype(z.dtype),), (r, u, rest, n, q)

    def slopes(kept, before, after):
        # h = (1−u) n + u h₋, n = tanh(z_n + r q):  ∂h/∂z_n = (1−u)(1−n²) =: s, ∂h/∂q = s r, ∂h/∂z_r = s q r(1−r),
        # ∂h/∂z_u = (h₋ − n) u(1−u), and directly ∂h/∂h₋ = u
        (r, u, rest, n, q), dtype = kept, before[0].dtype
        s = rest * (1 - n * n)
        by_products = [s * widened(q) * r * (1 - r), (widened(before[0]) - n) * u * rest, s * r]
        return (jnp.concatenate(by_products, -1).astype(dtype), s.astype(dtype)), u.astype(dtype)

    def back(transposed, slopes, u, dcarry):
        (dh,), (by_products, by_n) = dcarry, slopes
        dz = jnp.concatenate([dh, dh, dh], -1) * by_products
        return (dh * u + product(dz, transposed),), (dz, dh * by_n)

    def split(dz):  # of (r, u, q) and n: the candidate's two products have gradients of their own
        dz_h, n = dz
        return jnp.concatenate([dz_h[:, : 2 * n.shape[1]], n], -1), dz_h

    def weights(kept, h, dz_h):
        drecurrent = {"w": product(h.T, dz_h)}
        return drecurrent if bias is None else {**drecurrent, "b": dz_h[:, 2 * h.shape[1] :].sum(0)}

    return Cell("gru", 3, step, slopes, back, split, weights, bias)


def gru_step_before() -> Cell:
    """The gated recurrent unit, its reset gate before that product."""

    def step(recurrent, z, carry):
        (h,), w, units = carry, recurrent["w"], carry[0].shape[-1]
        z_r, z_u = jnp.split(z[..., : 2 * units] + product(h, w[:, : 2 * units]), 2, -1)
        r, u, rest = logistic(z_r), logistic(z_u), logistic(-z_u)
        r, u = show("r", r), show("u", u)
        p = (r * widened(h)).astype(h.dtype)
        n = show("n", tanh_of(z[..., 2 * units :] + product(p, w[:, 2 * units :])))
        return ((rest * n + u * widened(h)).astype(z.dtype),), (r, u, rest, n)

    def slopes(kept, before, after):
        # p = r h₋, n = tanh(z_n + p W_n):  ∂h/∂z_n = (1−u)(1−n²), ∂h/∂z_u = (h₋ − n) u(1−u), ∂p/∂z_r = h₋ r(1−r)
        (r, u, rest, n), h, dtype = kept, widened(before[0]), before[0].dtype
        by_gates = [h * r * (1 - r), (h - n) * u * rest]
        gates = jnp.concatenate(by_gates, -1)
        return (gates.astype(dtype), (rest * (1 - n * n)).astype(dtype)), (r.astype(dtype), u.astype(dtype))

    def back(transposed, slopes, others, dcarry):
        (dh,), (r, u), (by_gates, by_n) = dcarry, others, slopes
        units = u.shape[-1]
        dz_n = dh * by_n
        dp = product(dz_n, transposed[2 * units :])
        dz_ru = jnp.concatenate([dp, dh], -1) * by_gates
        dh = dh * u + dp * r + product(dz_ru, transposed[: 2 * units])
        return (dh,), (dz_ru, dz_n)

    def split(dz):
        dz = jnp.concatenate(dz, -1)
        return dz, dz

    def weights(kept, h, dz_h):
        p, two = (kept[0] * widened(h)).astype(h.dtype), 2 * h.shape[1]
        return {"w": jnp.concatenate([product(h.T, dz_h[:, :two]), product(p.T, dz_h[:, two:])], 1)}

    return Cell("gru", 3, step, slopes, back, split, weights)
