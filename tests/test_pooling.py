"""Pooling: forward and gradients against loops in NumPy and torch, ties, padding, NaN, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.gradcheck import check_layer
from fnet.layers.children import apply
from fnet.layers.pooling import avg_pool, global_avg_pool, global_max_pool, max_pool
from fnet.types import LayerError
from tests.oracles import assert_leaves_close


def numpy_pool(kind, x, dy, window, stride, pads, count_padding=False):
    """Outputs and the inputs' gradient, window by window; the first of a tie in row-major order takes all."""
    m = [(n + sum(p) - k) // s + 1 for n, p, k, s in zip(x.shape[1:-1], pads, window, stride, strict=True)]
    y, dx = np.zeros((x.shape[0], *m, x.shape[-1])), np.zeros(x.shape)
    for b, *o, c in np.ndindex(*y.shape):
        starts = [i * s - low for i, s, (low, _) in zip(o, stride, pads, strict=True)]
        true = [
            (b, *at, c)
            for at in (tuple(i + j for i, j in zip(starts, k, strict=True)) for k in np.ndindex(*window))
            if all(0 <= j < n for j, n in zip(at, x.shape[1:-1], strict=True))
        ]
        values, here = np.array([x[at] for at in true]), (b, *o, c)
        if kind == "max":
            y[here] = values.max()
            dx[true[int(values.argmax())]] += dy[here]
        else:
            count = np.prod(window) if count_padding else len(true)
            y[here] = values.sum() / count
            for at in true:
                dx[at] += dy[here] / count
    return y, dx


# name: input shape, window, arguments, and for the oracle: strides and what is padded around each axis
POOLS = {
    "side by side": ((2, 4, 6, 3), (2, 2), {}, ((2, 2), ((0, 0), (0, 0)))),
    "side by side with a rest": ((2, 5, 7, 2), (2, 3), {}, ((2, 3), ((0, 0), (0, 0)))),
    "overlapping": ((2, 5, 6, 2), (3, 2), {"stride": (2, 1)}, ((2, 1), ((0, 0), (0, 0)))),
    "same": ((1, 5, 6, 2), (3, 3), {"stride": 2, "padding": "SAME"}, ((2, 2), ((1, 1), (0, 1)))),
    "same, side by side": ((1, 5, 4, 2), (2, 3), {"padding": "SAME"}, ((2, 3), ((0, 1), (1, 1)))),
    "gaps": ((1, 8, 7, 2), (2, 1), {"stride": 3}, ((3, 3), ((0, 0), (0, 0)))),
    "explicit": ((1, 4, 4, 2), (3, 2), {"stride": 1, "padding": ((2, 1), (0, 1))}, ((1, 1), ((2, 1), (0, 1)))),
    "time": ((2, 7, 3), (3,), {"stride": 2, "padding": "SAME"}, ((2,), ((1, 1),))),
}
MAKE = {
    "max": max_pool,
    "avg": avg_pool,
    "avg, padding counts": functools.partial(avg_pool, count_padding=True),
}


def by_hand(layer, x, dy):
    def run(x, dy):
        y, _, residuals = layer.forward((), (), x, train=True)
        return y, layer.backward((), residuals, dy)[1]

    return jax.jit(run)(x, dy)


def by_both(layer, x, dy):
    """The same by hand and by autodiff, in one compiled program."""

    def run(x, dy):
        y, _, residuals = layer.forward((), (), x, train=True)
        z, pull = jax.vjp(lambda x: apply(layer, (), (), x), x)
        return (y, layer.backward((), residuals, dy)[1]), (z, pull(dy)[0])

    return jax.jit(run)(x, dy)


def outputs_like(layer, x):
    shape = jax.eval_shape(lambda x: apply(layer, (), (), x), x)
    return jnp.asarray(np.random.default_rng(5).normal(size=shape.shape), shape.dtype)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", POOLS)
def test_forward_and_gradients_equal_numpy_and_autodiff_ties_included(name, kind, x64):
    shape, window, options, numbers = POOLS[name]
    layer = MAKE[kind](window, **options)
    # whole numbers from −1 to 1: nearly every window has ties
    x = jnp.asarray(np.random.default_rng(1).integers(-1, 2, shape), jnp.float64)
    dy = outputs_like(layer, x)
    actual, autodiff = by_both(layer, x, dy)
    padded = kind == "avg, padding counts"
    expected = numpy_pool(kind[:3], np.asarray(x), np.asarray(dy), window, numbers[0], numbers[1], padded)
    assert_leaves_close(actual, expected, 1e-14)
    assert_leaves_close(actual, autodiff, 1e-14)


@pytest.mark.parametrize(
    ("layer", "kind"), [(global_max_pool(), "max"), (global_avg_pool(), "avg")], ids=["max", "avg"]
)
@pytest.mark.parametrize("shape", [(2, 3, 4, 3), (2, 5, 3)])
def test_global_pools_are_pools_over_one_window(layer, kind, shape, x64):
    x = jnp.asarray(np.random.default_rng(1).integers(-1, 2, shape), jnp.float64)
    dy = outputs_like(layer, x)
    (y, dx), autodiff = by_both(layer, x, dy)
    ones, nothing = (1,) * (len(shape) - 2), ((0, 0),) * (len(shape) - 2)
    whole = np.asarray(dy).reshape(2, *ones, 3)
    expected, expected_dx = numpy_pool(kind, np.asarray(x), whole, shape[1:-1], ones, nothing)
    assert_leaves_close((y, dx), (expected.reshape(2, 3), expected_dx), 1e-14)
    assert_leaves_close((y, dx), autodiff, 1e-14)


@pytest.mark.parametrize("shape", [(2, 3, 4, 3), (2, 5, 3)])
def test_a_mean_that_keeps_its_axes_is_the_mean(shape, x64):
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape))
    dy = outputs_like(global_avg_pool(), x)
    kept, (y, dx) = dy.reshape(2, *(1,) * (len(shape) - 2), 3), by_hand(global_avg_pool(), x, dy)
    (y_kept, dx_kept), autodiff = by_both(global_avg_pool(keepdims=True), x, kept)
    assert y_kept.shape == kept.shape and (y_kept.reshape(2, 3) == y).all() and (dx_kept == dx).all()
    assert_leaves_close((y_kept, dx_kept), autodiff, 1e-14)


LAYERS = {
    "max": max_pool((2, 2)),
    "max, padded": max_pool((3, 3), stride=2, padding="SAME"),
    "avg, padded": avg_pool((3, 3), stride=2, padding="SAME"),
    "global max": global_max_pool(),
    "global avg": global_avg_pool(),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_the_audit_finds_nothing(name, key):
    report = check_layer(LAYERS[name], jax.random.normal(key, (2, 4, 5, 2)), key=key, precisions=(), cost=False)
    assert {leaf.verdict for leaf in report.leaves} == {"ok"}, report


def test_the_audit_in_lower_precisions_finds_nothing(key):
    report = check_layer(avg_pool((2, 2)), jax.random.normal(key, (2, 4, 4, 2)), key=key, cost=False)
    assert {leaf.verdict for leaf in report.leaves} == {"ok"}, report


@every_layer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lower_precisions_keep_their_dtype_and_round_once(name, dtype, x64):
    """Sums are taken in float32: one rounding of the outputs, one for each window that an input is in."""
    layer, x = LAYERS[name], jax.random.normal(jax.random.key(1), (2, 4, 5, 2), dtype)
    dy = outputs_like(layer, x)
    actual = by_hand(layer, x, dy)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.dtype(dtype)}
    exact = by_hand(layer, x.astype(jnp.float64), dy.astype(jnp.float64))
    assert_leaves_close(actual, exact, 4 * float(jnp.finfo(dtype).eps))


@every_layer
def test_layers_run_under_vmap_and_scan(name, x64):
    layer, x = LAYERS[name], jax.random.normal(jax.random.key(1), (3, 2, 4, 5, 2))
    dy = outputs_like(layer, x[0])

    def run(xi):
        y, _, residuals = layer.forward((), (), xi)
        return y, layer.backward((), residuals, dy)[1]

    one_by_one = [run(xi) for xi in x]
    for mapped in (jax.jit(jax.vmap(run))(x), jax.lax.scan(lambda c, xi: (c, run(xi)), 0, x)[1]):
        for i, expected in enumerate(one_by_one):
            assert_leaves_close(jax.tree.map(lambda a, i=i: a[i], mapped), expected, 1e-14)


# --- extremes --------------------------------------------------------------------------------------------------------


def test_padding_never_wins_and_never_takes_the_gradient():
    x = jnp.full((1, 3, 3, 1), -jnp.inf)
    layer = max_pool((3, 3), stride=2, padding="SAME")
    for y, dx in by_both(layer, x, jnp.ones((1, 2, 2, 1))):
        assert np.all(np.asarray(y) == -np.inf)
        expected = np.zeros((3, 3))
        expected[0, 0] = expected[0, 1] = expected[1, 0] = expected[1, 1] = 1  # the first true entry of each window
        np.testing.assert_array_equal(dx[0, :, :, 0], expected)


@pytest.mark.parametrize("layer", [max_pool((2, 2)), global_max_pool()], ids=["windows", "global"])
@pytest.mark.parametrize("place", range(4))
def test_a_nan_passes_and_takes_the_gradient(layer, place):
    x = jnp.arange(4.0).at[place].set(jnp.nan).reshape(1, 2, 2, 1)
    y, dx = by_hand(layer, x, outputs_like(layer, x))
    assert np.isnan(y).all()
    assert np.flatnonzero(np.asarray(dx)).tolist() == [place]


def test_other_entries_of_a_window_may_be_infinite():
    x = jnp.asarray([-jnp.inf, 2.0, 1.0, -jnp.inf]).reshape(1, 2, 2, 1)
    for layer in (max_pool((2, 2)), global_max_pool()):
        y, dx = by_hand(layer, x, outputs_like(layer, x))
        assert y.ravel()[0] == 2 and np.isfinite(dx).all()


def test_windows_of_more_than_256_entries_remember_their_place(x64):
    x = jax.random.normal(jax.random.key(1), (1, 300, 1)).at[0, 299, 0].set(9.0)
    _, dx = by_hand(max_pool((300,)), x, jnp.ones((1, 1, 1)))
    assert np.flatnonzero(np.asarray(dx)).tolist() == [299]


def test_only_a_byte_for_each_output_is_kept_for_the_backward():
    _, _, residuals = max_pool((2, 2)).forward((), (), jnp.ones((2, 8, 8, 3)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(residuals)) == 2 * 4 * 4 * 3
    _, _, residuals = avg_pool((2, 2)).forward((), (), jnp.ones((2, 8, 8, 3)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(residuals)) == 0


# --- torch -----------------------------------------------------------------------------------------------------------


def test_torch_computes_the_same():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    pads = ((1, 1), (1, 1))
    with jax.enable_x64(True):
        cases = [
            (max_pool((2, 2)), lambda x: functional.max_pool2d(x, 2)),
            (max_pool((3, 3), stride=2, padding=pads), lambda x: functional.max_pool2d(x, 3, 2, 1)),
            (avg_pool((2, 3)), lambda x: functional.avg_pool2d(x, (2, 3))),
            (
                avg_pool((3, 3), stride=2, padding=pads),
                lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            ),
            (
                avg_pool((3, 3), stride=2, padding=pads, count_padding=True),
                lambda x: functional.avg_pool2d(x, 3, 2, 1),
            ),
            (global_avg_pool(), lambda x: x.mean((2, 3))),
        ]
        for layer, function in cases:
            x = np.random.default_rng(0).normal(size=(2, 7, 6, 3))
            leaf = torch.tensor(x.transpose(0, 3, 1, 2).copy(), dtype=torch.float64, requires_grad=True)
            out = function(leaf)
            dy = np.random.default_rng(1).normal(size=tuple(out.shape))
            out.backward(torch.tensor(dy))
            assert leaf.grad is not None
            y, dx = by_hand(layer, jnp.asarray(x), jnp.asarray(np.moveaxis(dy, 1, -1)))
            expected = np.moveaxis(out.detach().numpy(), 1, -1), np.moveaxis(leaf.grad.numpy(), 1, -1)
            assert_leaves_close((y, dx), expected, 1e-13)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [max_pool, avg_pool])
def test_arguments_that_do_not_fit_are_refused(make):
    for window, options, message in [
        (2, {}, r"_pool: window = 2; expected a tuple, one size for each spatial axis: \(3,\) for \(B, T, C\)"),
        ((2, 0), {}, r"_pool: window = \(2, 0\); expected a whole number of at least 1"),
        ((2, 2), {"stride": 0}, "_pool: stride = 0; expected a whole number"),
        ((2,), {"padding": "CAUSAL"}, r"_pool: padding = 'CAUSAL'; expected one of \('SAME', 'VALID'\)"),
        ((2, 2), {"padding": ((1, 1),)}, "_pool: padding = .* expected 2 pairs"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(window, **options)


def test_inputs_that_do_not_fit_are_refused():
    for layer, x, message in [
        (max_pool((2, 2)), jnp.ones((2, 5, 3)), r"expected \(B, H, W, C\) .*, got shape \(2, 5, 3\)"),
        (max_pool((6, 2)), jnp.ones((2, 5, 5, 3)), "do not fit into inputs of .*no output is left"),
        (avg_pool((2, 2)), jnp.ones((2, 5, 5, 3), jnp.int32), "expected floating inputs, got int32"),
        (max_pool((2, 2), padding=((2, 0), (0, 0))), jnp.ones((1, 4, 4, 1)), "see nothing but padding"),
        (global_max_pool(), jnp.ones((2, 3)), r"such as \(B, H, W, C\), got shape \(2, 3\)"),
        (global_avg_pool(), jnp.ones((2, 0, 3)), r"got shape \(2, 0, 3\)"),
    ]:
        with pytest.raises(LayerError, match=message):
            layer.init(jax.random.key(0), x)
        with pytest.raises(LayerError, match=message):
            apply(layer, (), (), x)
