"""Layers whose weights are functions of other parameters: of length and direction, or divided by their largest gain.

A wrapper names one leaf of its layer's parameters by its path, ``w`` or ``dense_0/w`` or ``input/w`` of an lstm, and
the layer runs on what takes the leaf's place; several leaves are wrapped one after the other. `fold_weight_norm` and
`fold_spectral_norm` give the parameters of the layer without the wrapper, which then computes the same.

Legend: w weights ``(..., O)``, O outputs of the layer, K all other entries: inputs, positions of a kernel;
M the same as a matrix ``(O, K)``, as the papers and PyTorch write it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fnet.core.checks import require, require_counts, require_layer
from fnet.core.numerics import stream, wide
from fnet.core.trees import Copies, named_leaves
from fnet.layers.children import rewriting
from fnet.layers.dense import rows
from fnet.types import Layer, LayerError, PyTree


def weight_norm(layer: Layer, name: str = "w") -> Layer:
    """The same layer with ``w = g v/‖v‖``, a length and a direction for each of its O outputs.

    In the parameters ``{"g" (O,), "v" (..., O)}`` stands where the leaf ``name`` stood; norms are over all axes but the
    last. At the start ``v`` is the layer's own w and ``g`` its norms, so that nothing changes. An output whose v is 0
    has no direction: it is NaN, as in PyTorch.

    Raises `LayerError` where the parameters have no such leaf, or one of fewer than two axes, or one that `repeat`
    stacks (wrap the layer within), and for a leaf without its ``g`` and ``v``.

    Source: Salimans and Kingma, arXiv:1602.07868. PyTorch's ``parametrizations.weight_norm`` keeps g and v as
    ``original0`` and ``original1``, with O first; of an embedding and a transposed convolution its ``dim=0`` is not O.

    >>> from fnet.layers import dense
    >>> layer = weight_norm(dense(2, bias=None))
    >>> params, _ = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 3), "float32"))
    >>> jax.tree.map(jnp.shape, params)
    {'w': {'g': (2,), 'v': (3, 2)}}
    >>> params = {"w": {"g": jnp.array([10.0, 1.0]), "v": jnp.array([[3.0, 0.0], [4.0, 2.0]])}}
    >>> print(layer.forward(params, (), jnp.eye(2))[0])
    [[6. 0.]
     [8. 1.]]
    """
    require_wrapped("weight_norm", layer, name)

    def init(key, x):
        params, state = layer.init(key, x)
        w = weights_at(params, name)
        g = lengths(w.astype(wide(w.dtype))).astype(w.dtype)
        return replaced(params, name, {"g": g, "v": w}), state

    def forward(params, state, x, *, key=None, train=False):
        return layer.forward(fold_weight_norm(params, name), state, x, key=key, train=train)

    def backward(params, residuals, dy):
        with rewriting():
            dparams, dx = layer.backward(fold_weight_norm(params, name), residuals, dy)
        g, v = parts(params, name)
        dtype = wide(v.dtype)
        dw, unit, n = leaf_at(dparams, name).astype(dtype), *directions(v)
        # w = g u with u = v/n, n = ‖v‖:  dg = Σ dw u,  ∂u/∂v = (1 − u uᵀ)/n, so that dv = g/n (dw − u Σ dw u)
        dg = rows(dw * unit).sum(0)
        dv = per_output(g.astype(dtype) / n, dw) * (dw - unit * per_output(dg, dw))
        return replaced(dparams, name, {"g": dg.astype(g.dtype), "v": dv.astype(v.dtype)}), dx

    return layer._replace(init=init, forward=forward, backward=backward, outer=None)


def fold_weight_norm(params: PyTree, name: str = "w") -> Any:
    """The parameters of the layer without `weight_norm`: ``w = g v/‖v‖`` in the place of ``g`` and ``v``."""
    g, v = parts(params, name)
    unit, _ = directions(v)
    return replaced(params, name, (per_output(g.astype(unit.dtype), unit) * unit).astype(v.dtype))


def spectral_norm(layer: Layer, name: str = "w", *, iterations: int = 1, eps=1e-12) -> Layer:
    """The same layer with ``w/σ``, σ the largest singular value of w as a matrix M ``(O, K)``, by power iteration.

    The parameters are the layer's own. The state is ``{"layer", "u" (O,), "v" (K,)}``, the layer's own state and the
    singular vectors, in float32 at least. Each forward in training moves them ``iterations`` times, ``u = M v/‖M v‖``
    and then ``v = Mᵀu/‖Mᵀu‖`` (norms of at least ``eps``, which may be traced), and one in inference leaves them;
    ``σ = uᵀM v``. They start at random and are moved 15 times in ``init``. Weights that are all 0 give NaN, as in
    PyTorch.

    The vectors count as constants in the gradient, by hand and by autodiff. Where they have converged that is the slope
    of the outputs, since ``∂σ/∂M = u vᵀ`` there; before, in training, it is not, and the audit says so: give it a layer
    of some hundred iterations.

    Raises ValueError for iterations below 1, and `LayerError` as `weight_norm` does and for a state without u and v.

    Source: Miyato et al., arXiv:1802.05957. PyTorch's ``parametrizations.spectral_norm`` the same, with ``_u`` and
    ``_v`` beside the weights.

    >>> from fnet.layers import dense
    >>> layer = spectral_norm(dense(2, bias=None))
    >>> x = jnp.eye(2)
    >>> _, state = layer.init(jax.random.key(0), x)
    >>> params = {"w": jnp.array([[4.0, 0.0], [0.0, 2.0]])}
    >>> for _ in range(9):
    ...     y, state, _ = layer.forward(params, state, x, train=True)
    >>> y.round(3).tolist()
    [[1.0, 0.0], [0.0, 0.5]]
    """
    require_wrapped("spectral_norm", layer, name)
    require_counts("spectral_norm", iterations=iterations)
    require(eps > 0, f"spectral_norm: eps = {eps}; expected above 0")

    def moved(w, u, v, times):
        matrix, least = jax.lax.stop_gradient(as_matrix(w)), jnp.asarray(eps, u.dtype)

        def once(_, vectors):
            u = matrix @ vectors[1]
            u = u / jnp.maximum(jnp.sqrt((u * u).sum()), least)
            v = u @ matrix
            return u, v / jnp.maximum(jnp.sqrt((v * v).sum()), least)

        return jax.lax.fori_loop(0, times, once, (u, v))

    def init(key, x):
        params, state = layer.init(key, x)
        w = weights_at(params, name)
        o, k = as_matrix(w).shape
        u, v = (jax.random.normal(stream(key, part), (n,), wide(w.dtype)) for part, n in (("u", o), ("v", k)))
        u, v = moved(w, u, v, 15)
        return params, {"layer": state, "u": u, "v": v}

    def forward(params, state, x, *, key=None, train=False):
        u, v = vectors(state, weights_at(params, name))
        if train:
            u, v = moved(weights_at(params, name), u, v, iterations)
        plain, _ = fold_spectral_norm(params, {**state, "u": u, "v": v}, name)
        y, inner, residuals = layer.forward(plain, state["layer"], x, key=key, train=train)
        return y, {"layer": inner, "u": u, "v": v}, (residuals, u, v)

    def backward(params, residuals, dy):
        residuals, u, v = residuals
        plain, _ = fold_spectral_norm(params, {"layer": (), "u": u, "v": v}, name)
        with rewriting():
            dparams, dx = layer.backward(plain, residuals, dy)
        w, dw = weights_at(params, name), as_matrix(leaf_at(dparams, name))
        matrix = as_matrix(w)
        sigma = u @ matrix @ v
        # Ŵ = M/σ with ∂σ/∂M = u vᵀ, u and v held:  dM = (dŴ − (Σ dŴ Ŵ) u vᵀ)/σ
        dmatrix = (dw - (dw * matrix).sum() / sigma * jnp.outer(u, v)) / sigma
        return replaced(dparams, name, dmatrix.T.reshape(w.shape).astype(w.dtype)), dx

    return layer._replace(init=init, forward=forward, backward=backward, outer=None)


def fold_spectral_norm(params: PyTree, state: PyTree, name: str = "w") -> tuple[Any, Any]:
    """Parameters and state of the layer without `spectral_norm`: ``w/σ`` with the state's vectors in the place of w."""
    w = weights_at(params, name)
    u, v = vectors(state, w)
    divided = w.astype(u.dtype) / (u @ as_matrix(w) @ v)
    return replaced(params, name, divided.astype(w.dtype)), state["layer"]


# --- what they share -------------------------------------------------------------------------------------------------


def require_wrapped(who: str, layer, name) -> None:
    """Raise TypeError unless these are a layer and the path of a leaf."""
    require_layer(f"{who}: layer", layer)
    if not isinstance(name, str) or not name:
        raise TypeError(f"{who}: name = {name!r}; expected the path of a leaf of the parameters, such as 'w'")


def leaf_at(tree: PyTree, path: str) -> Any:
    """What stands at a path in nested dicts; raises `LayerError` where there is nothing."""
    node = tree
    for step in path.split("/"):
        if isinstance(node, Copies):
            raise LayerError(f"expected {path!r} of one layer, got the copies of a repeat: wrap the layer within it")
        if not isinstance(node, dict) or step not in node:
            found = ", ".join(dict(named_leaves(tree))) or "none"
            raise LayerError(f"expected params with a leaf {path!r}, got {found}")
        node = node[step]
    return node


def weights_at(params: PyTree, path: str) -> Any:
    """The leaf at a path; raises `LayerError` unless it is one array of two axes or more."""
    w = leaf_at(params, path)
    if len(getattr(w, "shape", ())) < 2:
        given = f"{w.dtype}{list(w.shape)}" if hasattr(w, "shape") else f"a {type(w).__name__}"
        raise LayerError(f"expected weights (..., outputs) of at least two axes at {path!r}, got {given}")
    return w


def replaced(tree: PyTree, path: str, leaf: Any) -> Any:
    """The same nested dicts with another leaf at a path."""
    step, _, rest = path.partition("/")
    return {**tree, step: replaced(tree[step], rest, leaf) if rest else leaf}


def parts(params: PyTree, path: str) -> tuple[jax.Array, jax.Array]:
    """``g, v`` at a path."""
    found = leaf_at(params, path)
    if not isinstance(found, dict) or set(found) != {"g", "v"} or found["g"].shape != found["v"].shape[-1:]:
        raise LayerError(f"expected {{'g' (O,), 'v' (..., O)}} at {path!r}: pass what init returned")
    return found["g"], found["v"]


def vectors(state: PyTree, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``u, v`` of a state, of which there is no gradient."""
    o, k = as_matrix(w).shape
    named = isinstance(state, dict) and set(state) == {"layer", "u", "v"}
    if not named or (state["u"].shape, state["v"].shape) != ((o,), (k,)):
        raise LayerError(f"expected the state {{'layer', 'u' ({o},), 'v' ({k},)}}: pass what init returned")
    return jax.lax.stop_gradient((state["u"], state["v"]))


def lengths(v: jax.Array) -> jax.Array:
    """The norm of each output's weights ``(..., O)``, ``(O,)``."""
    return jnp.sqrt(rows(v * v).sum(0))


def directions(v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``v/‖v‖`` and ``‖v‖`` of each output, in float32 at least."""
    v = v.astype(wide(v.dtype))
    n = lengths(v)
    return v / per_output(n, v), n


def per_output(a: jax.Array, v: jax.Array) -> jax.Array:
    """``a (O,)`` beside weights ``v (..., O)``."""
    return a.reshape((1,) * (v.ndim - 1) + a.shape)


def as_matrix(w: jax.Array) -> jax.Array:
    """``w (..., O)`` as ``(O, K)``, in float32 at least."""
    return rows(w).T.astype(wide(w.dtype))
