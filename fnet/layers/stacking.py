"""Recurrent layers of recurrent layers: both directions, and several above one another."""

from __future__ import annotations

import jax.numpy as jnp

from fnet.core.checks import require_layer
from fnet.layers.children import backward_child, forward_child, init_child, inside
from fnet.layers.combinators import named_children, output_shape, require_children
from fnet.layers.masks import is_masked
from fnet.layers.recurrent import kinds, parts_of
from fnet.types import Layer, LayerError


def bidirectional(layer: Layer, merge: str = "concatenate") -> Layer:
    """A sequence layer twice, once over the sequence and once over its mirror image, each with its own parameters.

    ``merge`` is ``"concatenate"`` (``y (B, T, 2 H)``, as PyTorch) or ``"sum"``. ``layer`` runs from left to right;
    children are ``forward`` and ``backward``; carries are the pair of theirs. With a mask the mirrored sequence begins
    with its padding, where the carry is held, so that a ragged row is read from its own end.
    Raises ValueError for another ``merge``. Source: Schuster and Paliwal, 1997.

    >>> import jax
    >>> from fnet.layers import gru
    >>> layer = bidirectional(gru(3))
    >>> params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((32, 10, 4), "float32"))
    >>> layer.forward(params, state, jnp.ones((32, 10, 4)))[0].shape
    (32, 10, 6)
    """
    if merge not in ("concatenate", "sum"):
        raise ValueError(f"bidirectional: merge = {merge!r}; expected 'concatenate' or 'sum'")
    require_layer("bidirectional: layer", layer)
    names = ("forward", "backward")
    children = [(name, layer) for name in names]

    def init(key, x):
        made = {}
        for name in names:
            made[name] = init_child(name, layer, key, x[0] if isinstance(x, tuple) else x)
        return {name: made[name][0] for name in names}, {name: made[name][1] for name in names}

    def forward(params, state, given, *, key=None, train=False):
        require_children("params", params, children)
        require_children("state", state, children)
        x, carries, mask, form = _several(given, names)
        ys, last, new_state, residuals = [], [], {}, {}
        for name, carry in zip(names, carries, strict=True):
            child_x = (_mirrored(name, x), carry, _mirrored(name, mask))
            (y, carry, _), new_state[name], residuals[name] = forward_child(
                name, layer, params[name], state[name], child_x, key=key, train=train
            )
            ys.append(_mirrored(name, y))
            last.append(carry)
        y = ys[0] + ys[1] if merge == "sum" else jnp.concatenate(ys, -1)
        return _outputs(form, y, last, mask), new_state, (form, residuals)

    def backward(params, residuals, dy):
        # each direction has its part of dy, or all of it if they were added; their gradients by x add
        form, residuals = residuals
        dy, dlast = _gradients(form, dy, names)
        dys = (dy, dy) if merge == "sum" else jnp.split(dy, 2, -1)
        dparams, dxs, dcarries = {}, [], []
        for name, dy, dcarry in zip(names, dys, dlast, strict=True):
            given = (_mirrored(name, dy), dcarry, None)
            dparams[name], (dx, dcarry, _) = backward_child(name, layer, params[name], residuals[name], given)
            dxs.append(_mirrored(name, dx))
            dcarries.append(dcarry)
        return dparams, _inputs_gradient(form, dxs[0] + dxs[1], dcarries)

    return Layer("bidirectional", init, forward, backward, tuple(children))


def stacked(*layers: Layer | tuple[str, Layer]) -> Layer:
    """Recurrent layers one upon another: ``x -> y``, ``(x, carries) -> (y, carries)``, and with masks as one layer.

    ``carries`` is the tuple of the layers' own (each may be None for zeros); all see the same mask. Over plain arrays
    it is `serial`, with whose names and keys it agrees. Of cells it is a cell: one step of the whole stack.

    >>> import jax
    >>> from fnet.layers import gru, lstm
    >>> layer, x = stacked(lstm(3), gru(5)), jnp.ones((32, 10, 4))
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> y, (first, second) = layer.forward(params, state, (x, None))[0]
    >>> y.shape, first.h.shape, second.shape
    ((32, 10, 5), (32, 3), (32, 5))
    """
    children = named_children("stacked", layers)
    names = [name for name, _ in children]

    def init(key, x):
        x = x[0] if isinstance(x, tuple) else x
        params, state = {}, {}
        for name, layer in children:
            params[name], state[name] = init_child(name, layer, key, x)
            with inside(name):
                x, _ = output_shape(layer, params[name], state[name], (x, None))
        return params, state

    def forward(params, state, given, *, key=None, train=False):
        require_children("params", params, children)
        require_children("state", state, children)
        x, carries, mask, form = _several(given, names)
        last, new_state, residuals = [], {}, {}
        for (name, layer), carry in zip(children, carries, strict=True):
            child_x = (x, carry) if mask is None else (x, carry, mask)
            (x, carry, *_), new_state[name], residuals[name] = forward_child(
                name, layer, params[name], state[name], child_x, key=key, train=train
            )
            last.append(carry)
        return _outputs(form, x, last, mask), new_state, (form, residuals)

    def backward(params, residuals, dy):  # the chain rule: dx of each layer is dy of the one beneath it
        form, residuals = residuals
        dy, dlast = _gradients(form, dy, names)
        dparams, dcarries = {}, []
        for (name, layer), dcarry in zip(reversed(children), reversed(dlast), strict=True):
            given = (dy, dcarry)
            dparams[name], (dy, dcarry, *_) = backward_child(name, layer, params[name], residuals[name], given)
            dcarries.append(dcarry)
        return dparams, _inputs_gradient(form, dy, dcarries[::-1])

    return Layer("stacked", init, forward, backward, tuple(children))


def _mirrored(name, a):
    """``a (B, T, ...)`` from its last step to its first, for the child ``backward``."""
    return a if name == "forward" or a is None else jnp.flip(a, 1)


def _several(given, names):
    """``x``, a carry for each name, the mask, and the form: by name what of ``given`` there was, without arrays."""
    if isinstance(given, tuple) and not 1 < len(given) < 4:
        raise LayerError(f"expected x, (x, mask), (x, carries) or (x, carries, mask), got {kinds(given)}")
    x, carries, mask = parts_of(given, is_masked(given))
    form = None
    if is_masked(given):
        form = {"mask": ()}
    elif isinstance(given, tuple):
        form = {"carries": None if carries is None else (), **({"mask": ()} if len(given) == 3 else {})}
    if carries is not None and (not isinstance(carries, tuple) or len(carries) != len(names)):
        raise LayerError(f"expected a carry for each of {list(names)} or None for zeros, got {kinds(carries)}")
    return x, (None,) * len(names) if carries is None else carries, mask, form


def _outputs(form, y, carries, mask):
    """The outputs for inputs of this form."""
    if form is None:
        return y
    return (y, *([tuple(carries)] if "carries" in form else []), *([mask] if "mask" in form else []))


def _gradients(form, dy, names):
    """The gradient by ``y``, and one by the carry of each name, of the gradients by outputs of this form."""
    if form is None:
        return dy, (None,) * len(names)
    dlast = dy[1] if "carries" in form else None
    return dy[0], (None,) * len(names) if dlast is None else dlast


def _inputs_gradient(form, dx, dcarries):
    """The gradient by inputs of this form."""
    if form is None:
        return dx
    carries = [] if "carries" not in form else [None if form["carries"] is None else tuple(dcarries)]
    return (dx, *carries, *([None] if "mask" in form else []))
