"""Recurrent layers: Elman's network, the gated recurrent unit and long short-term memory, over sequences or one step.

    sequence layer    x -> y    or    (x, mask) -> (y, mask)    or    (x, carry) -> (y, carry)
                      or    (x, carry, mask) -> (y, carry, mask)
    cell              (x, carry) -> (y, carry), one step with the same parameters

A cell is written once: one step, the slopes of its gates, and one step back. A sequence layer is the scan of it. The
inputs of all steps meet ``W_x`` in one product before the scan. The reversed scan computes only what depends on the
step after, the gradients ``dz`` of what enters the gates; the gradient of each weight is one product outside it.

Carries are ``h (B, H)``, for lstm ``LSTMCarry(h, c)``; None stands for zeros (then its gradient is None too).
``mask (B, T)`` is True where a step counts; elsewhere the carry is held, ``y`` is 0, and what ``x`` holds there is
never seen (as in PyTorch's packed sequences padded with zeros). The gates' weights stand side by side, ``(I, G H)``.

Legend: B batch, T steps, I features in, H units, G gates; z what enters the gates; `...` any leading axes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnet.core.checks import require_counts
from fnet.core.numerics import stream, wide
from fnet.core.splitting import is_split
from fnet.layers.activation import tanh
from fnet.layers.cells import Cell, LSTMCarry, gru_step_after, gru_step_before, lstm_step, rnn_step
from fnet.layers.children import show
from fnet.layers.dense import plus, product, product_with_rows, rows
from fnet.layers.initializers import Initializer, glorot_uniform, orthogonal, require_initializers, zeros
from fnet.layers.masks import is_masked
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError, PyTree

# --- layers of cells -------------------------------------------------------------------------------------------------


def _sequence(cell: Cell, units: int, weights, recurrent, bias, reverse: bool, truncate: int | None, unroll: int):
    require_counts(cell.name, units=units, truncate=truncate, unroll=unroll)
    require_initializers(cell.name, "bias", weights=weights, recurrent=recurrent, bias=bias)
    cell = cell._replace(biased=bias is not None)

    def forward(params, given):
        x, carry, mask = _inputs(cell, params, given, "(B, T, I)")  # x (B, T, I), carry of (B, H), mask (B, T)
        x_rows, masks, cuts = _seen(x, mask, truncate, reverse)
        z = _steps(product(x_rows, params["input"]["w"]), x.shape)  # (T, B, G H)
        # wide outside of the scan: autodiff adds up their gradients over the steps in the dtype that enters it
        shared = jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), {**params, "input": {}})

        def step(before, now):
            z, mask, cut = now
            if cut is not None:
                before = tuple(jnp.where(cut, lax.stop_gradient(part), part) for part in before)
            recurrent = {**shared["recurrent"], "w": shared["recurrent"]["w"].astype(z.dtype)}
            after, kept = cell.step(recurrent, _biased(shared, z), before)
            if mask is not None:
                after = tuple(jnp.where(mask, new, old) for new, old in zip(after, before, strict=True))
            after = tuple(show(name, part) for name, part in zip("hc", after, strict=False))
            return after, (after, kept)

        last, (carries, kept) = lax.scan(step, carry, (z, masks, cuts), reverse=reverse, unroll=unroll)
        y = carries[0].swapaxes(0, 1)
        if mask is not None:
            y = jnp.where(mask[:, :, None], y, 0)
        return _like(given, y, last, mask), (given, carries, kept)

    def backward(params, residuals, dy):
        # from the last step to the first: the gradient by the carry after step t gains dy_t, and cell.back gives dz_t
        # and the gradient by the carry before, which is the carry after step t − 1
        given, carries, kept = residuals
        transposed = params["recurrent"]["w"].T
        x, carry, mask = _inputs(cell, params, given, "(B, T, I)")
        x_rows, masks, cuts = _seen(x, mask, truncate, reverse)
        before = tuple(_shift(part, first, reverse) for part, first in zip(carries, carry, strict=True))
        slopes, others = cell.slopes(kept, before, carries)
        dy, dlast, _ = parts_of(dy, is_masked(given))
        dlast = tuple(jnp.zeros_like(part) for part in carry) if dlast is None else _unpack(dlast)

        def step(scanned, now):
            # dz is written over the slopes that it came from: no second buffer is filled with zeros first
            (dcarry, buffer), (t, dy, others, mask, cut) = scanned, now
            dcarry = (show("h", dcarry[0] + dy, is_gradient=True), *dcarry[1:])
            held = dcarry
            if mask is not None:
                dcarry = tuple(jnp.where(mask, part, 0) for part in dcarry)
            at_t = jax.tree.map(lambda slopes: lax.dynamic_index_in_dim(slopes, t, keepdims=False), buffer)
            dcarry, dz = cell.back(transposed, at_t, others, dcarry)
            if mask is not None:
                dcarry = tuple(jnp.where(mask, new, old) for new, old in zip(dcarry, held, strict=True))
            if cut is not None:
                dcarry = tuple(jnp.where(cut, 0, part) for part in dcarry)
            write = functools.partial(lax.dynamic_update_index_in_dim, index=t, axis=0)
            return (dcarry, jax.tree.map(write, buffer, dz)), None

        dy = dy.swapaxes(0, 1) if mask is None else jnp.where(mask[:, :, None], dy, 0).swapaxes(0, 1)
        steps = (jnp.arange(x.shape[1]), dy, others, masks, cuts)
        (dcarry, dz), _ = lax.scan(step, (dlast, slopes), steps, reverse=not reverse, unroll=unroll)
        kept, h, dz = jax.tree.map(_rows, (kept, before[0], dz))
        dparams, dx = _weight_gradients(cell, params, x_rows, kept, h, dz)
        return dparams, _gradient_like(given, _steps(dx, x.shape).swapaxes(0, 1), dcarry)

    return stateless(cell.name, _init(cell, units, weights, recurrent, bias), forward, backward, several=True)


def _single(cell: Cell, units: int, weights, recurrent, bias) -> Layer:
    name = f"{cell.name}_cell"
    require_counts(name, units=units)
    require_initializers(name, "bias", weights=weights, recurrent=recurrent, bias=bias)
    cell = cell._replace(biased=bias is not None)

    def forward(params, given):
        if not isinstance(given, tuple) or len(given) != 2:
            raise LayerError(f"expected (x, carry), the carry None for zeros, got {kinds(given)}")
        x, before, _ = _inputs(cell, params, given, "(B, I)")
        z = _biased(params, product(x, params["input"]["w"]))
        after, kept = cell.step(params["recurrent"], z, before)
        return (after[0], _pack(after)), (given, after, kept)

    def backward(params, residuals, dy):
        # y is the h of the carry after, so their gradients add
        given, after, kept = residuals
        x, before, _ = _inputs(cell, params, given, "(B, I)")
        dh, dcarry = dy[0], _unpack(dy[1])
        slopes, others = cell.slopes(kept, before, after)
        dcarry, dz = cell.back(params["recurrent"]["w"].T, slopes, others, (dcarry[0] + dh, *dcarry[1:]))
        dparams, dx = _weight_gradients(cell, params, x, kept, before[0], dz)
        return dparams, _gradient_like(given, dx, dcarry)

    return stateless(name, _init(cell, units, weights, recurrent, bias), forward, backward, several=True)


def _init(cell, units, weights, recurrent, bias):
    def gates(initializer, key, shape, dtype):  # each gate is a map of its own, so each is drawn by itself
        drawn = jax.vmap(lambda key: initializer(key, shape, dtype))(jax.random.split(key, cell.gates))
        return jnp.moveaxis(drawn, 0, 1).reshape(shape[0], cell.gates * shape[1])

    def init(key, x):
        x = x[0] if isinstance(x, tuple) else x
        if len(x.shape) < 2:
            raise LayerError(f"expected a batch axis and features, got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise LayerError(f"expected floating features, got {x.dtype}: convert or embed the inputs")
        w_key, h_key = stream(stream(key, "input"), "w"), stream(stream(key, "recurrent"), "w")
        params = {
            "input": {"w": gates(weights, w_key, (x.shape[-1], units), x.dtype)},
            "recurrent": {"w": gates(recurrent, h_key, (units, units), x.dtype)},
        }
        if cell.bias is not None:
            params["recurrent"]["b"] = cell.bias(stream(stream(key, "recurrent"), "b"), (units,), x.dtype)
        if bias is not None:
            params["b"] = bias(stream(key, "b"), (cell.gates * units,), x.dtype)
        return params

    return init


def _biased(params, z):  # (B, G H); within the scan, where XLA fuses it with the gates: before it, a pass of its own
    return plus(z, params["b"]).astype(z.dtype) if "b" in params else z


def _weight_gradients(cell, params, x, kept, h, dz):
    # z = x W_x + b + h W_h with all steps as rows:  dW_x = xᵀ dz,  dW_h = hᵀ dz,  db = Σ dz,  dx = dz W_xᵀ
    (dz_x, dz_h), features = cell.split(dz), x.shape[1]
    if cell.weights is None:  # [dW_x; dW_h] = [x h]ᵀ dz, one product
        dw = product(jnp.concatenate([x, h], 1).T, dz_x)
        dparams = {"input": {"w": dw[:features]}, "recurrent": {"w": dw[features:]}}
    else:
        dparams = {"input": {"w": product(x.T, dz_x)}, "recurrent": cell.weights(kept, h, dz_h)}
    if "b" in params:
        dparams["b"] = dz_x.sum(0)
    return dparams, product_with_rows(dz_x, params["input"]["w"])


def _inputs(cell: Cell, params, given, shape: str) -> tuple[Any, tuple, Any]:
    """``x``, the carry as a tuple and the mask (None without one), all checked."""
    if isinstance(given, tuple) and not 1 < len(given) < 4:
        raise LayerError(f"expected x, (x, mask), (x, carry) or (x, carry, mask), got {kinds(given)}")
    x, carry, mask = parts_of(given, is_masked(given))
    _require_parameters(cell, params)
    w, units = params["input"]["w"], params["recurrent"]["w"].shape[0]
    if not hasattr(x, "shape") or x.ndim != shape.count(",") + 1 or x.shape[-1] != w.shape[0]:
        raise LayerError(f"expected x {shape} with I = {w.shape[0]} features, got {kinds(x)}")
    if x.ndim == 3 and not x.shape[1]:
        raise LayerError(f"expected at least one step, got x of shape {x.shape}")
    if x.dtype != w.dtype:
        raise LayerError(f"expected {w.dtype} features like its parameters, got {x.dtype}: convert the inputs")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != jnp.bool_):
        raise LayerError(f"expected a boolean mask (B, T) = {x.shape[:2]}, got {kinds(mask)}")
    if carry is None:
        return x, (jnp.zeros((x.shape[0], units), x.dtype),) * cell.parts, mask
    form = "LSTMCarry(h, c), each" if cell.parts == 2 else "an array h"
    expected = f"a carry, {form} {x.dtype}{[x.shape[0], units]}, or None for zeros"
    if isinstance(carry, LSTMCarry) != (cell.parts == 2) or (cell.parts == 1 and isinstance(carry, tuple)):
        raise LayerError(f"expected {expected}; got {kinds(carry)}")
    for part in _unpack(carry):
        if getattr(part, "shape", None) != (x.shape[0], units) or part.dtype != x.dtype:
            raise LayerError(f"expected {expected}; got {kinds(carry)}")
    return x, _unpack(carry), mask


def _require_parameters(cell: Cell, params) -> None:
    """Raise `LayerError` unless ``params`` has the tree and the shapes that ``init`` returns."""
    try:
        shapes = params["input"]["w"].shape, params["recurrent"]["w"].shape
    except (KeyError, TypeError, IndexError):
        found = sorted(params) if isinstance(params, dict) else kinds(params)
        raise LayerError(
            f"expected params with input/w and recurrent/w, got {found}: pass what init returned"
        ) from None
    units, width = shapes[1][0], cell.gates * shapes[1][0]
    fits = shapes[0][1:] == (width,) and shapes[1] == (units, width)
    biases = {"b": (width,)} if cell.biased else {}
    found = {name: leaf.shape for name, leaf in params.items() if name not in ("input", "recurrent")}
    inner = {name: leaf.shape for name, leaf in params["recurrent"].items() if name != "w"}
    if not fits or found != biases or inner != ({"b": (units,)} if cell.bias is not None else {}):
        raise LayerError(
            f"expected params of {cell.gates} gates, input/w (I, {cell.gates} H), recurrent/w (H, {cell.gates} H) "
            f"and the biases that init draws, got {kinds(params)}: pass what init returned"
        )


def _rows(a):
    """Steps ``(T, B, F)`` as rows: by time, or by example where these are split over devices, as no inner axis can be.

    By example it is a copy of a wide array, by time of the narrow inputs alone.
    """
    return rows(a.swapaxes(0, 1) if is_split() else a)


def _steps(a, shape):
    """Rows as steps ``(T, B, F)``, for ``shape (B, T, I)``."""
    if is_split():
        return a.reshape(*shape[:2], a.shape[-1]).swapaxes(0, 1)
    return a.reshape(*shape[1::-1], a.shape[-1])


def _seen(x, mask, truncate, reverse):
    """``x`` as rows, masked entries 0; the mask ``(T, B, 1)``; and where no gradient crosses, ``(T,)``."""
    if mask is not None:
        x, mask = jnp.where(mask[:, :, None], x, 0), mask.T[:, :, None]
    cuts = None
    if truncate is not None:
        position = np.arange(x.shape[1])[:: -1 if reverse else 1]
        cuts = jnp.asarray((position % truncate == 0) & (position > 0))
    return _rows(x.swapaxes(0, 1)), mask, cuts


def _shift(after, first, reverse):
    """What was before each step ``(T, B, H)``, of what was after each."""
    return jnp.concatenate([after[1:], first[None]] if reverse else [first[None], after[:-1]])


def parts_of(given, masked: bool) -> tuple[Any, Any, Any]:
    """``x, carry, mask`` of any form of the inputs, or of the outputs or their gradients; None for what is not there.

    ``masked`` says of a pair that its second is the mask, and not the carry.
    """
    if not isinstance(given, tuple):
        return given, None, None
    x, second, third = (*given, None)[:3]
    return (x, None, second) if masked else (x, second, third)


def _like(given, y, carry, mask):
    """The outputs in the form of the inputs ``given``."""
    if not isinstance(given, tuple):
        return y
    return (y, mask) if is_masked(given) else (y, _pack(carry), mask)[: len(given)]


def _gradient_like(given, dx, dcarry):
    """The gradient by the inputs, with the tree of the inputs and None where nothing flows."""
    if not isinstance(given, tuple):
        return dx
    if is_masked(given):
        return dx, None
    return (dx, None if given[1] is None else _pack(dcarry), *(None for _ in given[2:]))


def _pack(parts):
    return parts[0] if len(parts) == 1 else LSTMCarry(*parts)


def _unpack(carry):
    return tuple(carry) if isinstance(carry, LSTMCarry) else (carry,)


def kinds(tree):
    """Dtypes and shapes in the place of arrays, as messages show them."""
    return jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}" if hasattr(a, "shape") else a, tree)


# --- public ----------------------------------------------------------------------------------------------------------


def rnn(
    units: int,
    activation: Layer = tanh(),
    *,
    weights=glorot_uniform(),
    recurrent=orthogonal(),
    bias=zeros(),
    reverse: bool = False,
    truncate: int | None = None,
    unroll: int = 1,
) -> Layer:
    """Elman's network, ``h_t = a(x_t W_x + b + h_{t-1} W_h)``, ``y_t = h_t``; ``x (B, T, I)``, ``y (B, T, H)``.

    ``activation`` is a layer without parameters that acts on each entry, such as ``tanh()`` or ``relu()``.

    The options of all three sequence layers: ``weights`` (of the inputs), ``recurrent`` and ``bias`` are initializers,
    the first two drawn for each gate by itself; ``bias=None`` leaves it out. ``reverse`` runs from the last step to the
    first. ``truncate=k`` is truncated back-propagation through time: the forward is the same, and no gradient crosses
    the carry after every k steps, counted from the first that is run (one that enters with the initial carry is not
    cut). ``unroll`` is that of `jax.lax.scan`. Inputs, carries and masks are those of the module's docstring.
    Raises ValueError for units, truncate or unroll below 1, `LayerError` for inputs that do not fit.

    Parameters: ``input/w (I, H)``, ``recurrent/w (H, H)``, ``b (H,)``. Keras draws the same way and names them kernel
    and recurrent_kernel; PyTorch stores the transposes, has two biases, which add, and draws all four between
    ``±1/√H``. Source: Elman, Finding structure in time, 1990.

    >>> layer = rnn(3)
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((32, 10, 4), "float32"))
    >>> layer.forward(params, state, jnp.ones((32, 10, 4)))[0].shape
    (32, 10, 3)
    """
    return _sequence(rnn_step(activation), units, weights, recurrent, bias, reverse, truncate, unroll)


def gru(
    units: int,
    *,
    reset_after: bool = True,
    weights=glorot_uniform(),
    recurrent=orthogonal(),
    bias=zeros(),
    reverse: bool = False,
    truncate: int | None = None,
    unroll: int = 1,
) -> Layer:
    """The gated recurrent unit, ``h_t = (1 − u) ⊙ n + u ⊙ h_{t-1}``, with gates in the order r, u, n:

        r, u = σ(x W_x + b + h_{t-1} W_h)                    reset and update
        n = tanh(x W_n + b_n + r ⊙ (h_{t-1} U_n + c_n))      if ``reset_after``: PyTorch, cuDNN, Keras' default, flax
        n = tanh(x W_n + b_n + (r ⊙ h_{t-1}) U_n)            if not: the paper's

    Other options, inputs and errors are those of `rnn`. Parameters: ``input/w (I, 3 H)``, ``recurrent/w (H, 3 H)``,
    ``b (3 H,)``, and with ``reset_after`` and a bias ``recurrent/b (H,)``, which is c_n: it stands inside the product
    with r, so it is not the same as b_n. PyTorch (order r, z, n with z our u) and Keras have second biases for r and
    u too, which only add to the first; Keras' order is z, r, h. Source: Cho et al., arXiv:1406.1078.

    >>> params, _ = gru(3).init(jax.random.key(0), jax.ShapeDtypeStruct((32, 10, 4), "float32"))
    >>> params["recurrent"]["w"].shape, params["recurrent"]["b"].shape
    ((3, 9), (3,))
    """
    cell = gru_step_after(bias) if reset_after else gru_step_before()
    return _sequence(cell, units, weights, recurrent, bias, reverse, truncate, unroll)


def forget_bias(value=1.0) -> Initializer:
    """For the ``b (4 H,)`` of `lstm`: ``value`` for the forget gate, 0 for the others.

    A gate that starts open lets gradients through. Source: Jozefowicz et al., An empirical exploration of recurrent
    network architectures, 2015.

    >>> forget_bias()(jax.random.key(0), (8,), "float32").tolist()
    [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """

    def init(key, shape, dtype):
        is_forget = np.arange(shape[-1]) // (shape[-1] // 4) == 1
        return jnp.where(jnp.asarray(is_forget), jnp.asarray(value, dtype), jnp.zeros(shape, dtype))

    return init


def lstm(
    units: int,
    *,
    weights=glorot_uniform(),
    recurrent=orthogonal(),
    bias=forget_bias(),
    reverse: bool = False,
    truncate: int | None = None,
    unroll: int = 1,
) -> Layer:
    """Long short-term memory with forget gates and no peepholes; gates in the order i, f, g, o, as PyTorch and Keras:

        i, f, o = σ(x W_x + b + h_{t-1} W_h),   g = tanh(x W_x + b + h_{t-1} W_h)
        c_t = f ⊙ c_{t-1} + i ⊙ g,   h_t = o ⊙ tanh(c_t),   y_t = h_t

    The carry is ``LSTMCarry(h, c)``; other options, inputs and errors are those of `rnn`. Parameters:
    ``input/w (I, 4 H)``, ``recurrent/w (H, 4 H)``, ``b (4 H,)``. The forget gate's bias starts at 1 (``forget_bias``),
    as Keras' does; PyTorch draws all parameters between ``±1/√H``, with two biases, which add.
    Source: Hochreiter and Schmidhuber, 1997; the forget gate, Gers et al., 2000.

    >>> layer = lstm(3)
    >>> x = jnp.ones((32, 10, 4))
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> y, carry = layer.forward(params, state, (x, None))[0]
    >>> y.shape, carry.c.shape, bool((y[:, -1] == carry.h).all())
    ((32, 10, 3), (32, 3), True)
    """
    return _sequence(lstm_step(), units, weights, recurrent, bias, reverse, truncate, unroll)


def rnn_cell(units: int, activation: Layer = tanh(), *, weights=glorot_uniform(), recurrent=orthogonal(), bias=zeros()):
    """One step of `rnn` with its parameters: ``(x (B, I), carry) -> (y (B, H), carry)``."""
    return _single(rnn_step(activation), units, weights, recurrent, bias)


def gru_cell(units: int, *, reset_after=True, weights=glorot_uniform(), recurrent=orthogonal(), bias=zeros()) -> Layer:
    """One step of `gru` with its parameters: ``(x (B, I), carry) -> (y (B, H), carry)``."""
    return _single(gru_step_after(bias) if reset_after else gru_step_before(), units, weights, recurrent, bias)


def lstm_cell(units: int, *, weights=glorot_uniform(), recurrent=orthogonal(), bias=forget_bias()) -> Layer:
    """One step of `lstm` with its parameters: ``(x (B, I), carry) -> (y (B, H), carry)``.

    >>> layer, x = lstm_cell(3), jnp.ones((32, 4))
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> y, carry = layer.forward(params, state, (x, zero_carry(layer, params, state, x)))[0]
    >>> y.shape
    (32, 3)
    """
    return _single(lstm_step(), units, weights, recurrent, bias)


def zero_carry(layer: Layer, params, state, x) -> PyTree:
    """The carry of zeros for a batch like ``x`` (arrays or shapes), of any layer ``(x, carry) -> (y, carry)``."""
    _, carry = jax.eval_shape(lambda p, s, x: layer.forward(p, s, (x, None))[0], params, state, x)
    return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), carry)
