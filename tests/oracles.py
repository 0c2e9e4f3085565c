"""What several tests need: numerical derivatives in float64, comparisons by leaf, a layer by both engines."""

from __future__ import annotations

import jax
import numpy as np

from fnet.layers.children import apply


def numerical_gradient(f, x, h=1e-6):
    """∂f/∂x of a scalar NumPy function, entry by entry, by central differences in float64."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += h
        down[index] -= h
        gradient[index] = (f(up) - f(down)) / (2 * h)
    return gradient


def assert_leaves_close(actual, expected, tolerance):
    """Each leaf's largest difference is at most ``tolerance`` of the leaf's own largest expected entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    for (path, e), a in pairs:
        e, a = np.asarray(e, np.float64), np.asarray(a, np.float64)
        assert e.shape == a.shape, f"{jax.tree_util.keystr(path)}: shape {a.shape}, expected {e.shape}"
        error = np.abs(a - e).max(initial=0)
        limit = tolerance * max(np.abs(e).max(initial=0), np.finfo(np.float64).tiny)
        assert error <= limit, f"{jax.tree_util.keystr(path)}: differs by {error:.3e}, allowed {limit:.3e}"


def by_both(layer, x, dy):
    """Of a layer without parameters, outputs and the inputs' gradient by hand and by autodiff, in one program."""

    def run(x, dy):
        y, _, residuals = layer.forward((), (), x, train=True)
        z, pull = jax.vjp(lambda x: apply(layer, (), (), x), x)
        return (y, layer.backward((), residuals, dy)[1]), (z, pull(dy)[0])

    return jax.jit(run)(x, dy)


def keys_kernel(d, a=-0.75):
    """Keys' kernel of cubic interpolation at a distance."""
    d = abs(d)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0
