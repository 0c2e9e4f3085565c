"""Pooling: forward and gradients against loops in NumPy and torch, ties, padding, NaN, errors."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.gradcheck import check_layer
from fnet.layers.children import apply
from fnet.layers.pooling import (
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    global_avg_pool,
    global_max_pool,
    lp_pool,
    max_pool,
)
from fnet.types import LayerError
from tests.oracles import assert_leaves_close, by_both


def outputs_of(n, pads, extent, stride, ceil_mode):
    """How many windows an axis has, counted: those within the padding, and in ceil mode the next, where it is to be."""
    starts = range(0, n + sum(pads), stride)
    m = sum(start + extent <= n + sum(pads) for start in starts)
    rest = n + sum(pads) > ((m - 1) * stride + extent if m else 0)
    return m + (ceil_mode and rest and m * stride < n + pads[0])


def numpy_pool(kind, x, dy, window, stride, pads, count_padding=False, dilation=None, ceil_mode=False):
    """Outputs and the inputs' gradient, window by window; the first of a tie in row-major order takes all."""
    dilation, sizes = dilation or (1,) * len(window), x.shape[1:-1]
    extent = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    m = [outputs_of(n, p, e, s, ceil_mode) for n, p, e, s in zip(sizes, pads, extent, stride, strict=True)]
    y, dx = np.zeros((x.shape[0], *m, x.shape[-1])), np.zeros(x.shape)
    for b, *o, c in np.ndindex(*y.shape):
        starts = [i * s - low for i, s, (low, _) in zip(o, stride, pads, strict=True)]
        seen = [tuple(i + j * d for i, j, d in zip(starts, k, dilation, strict=True)) for k in np.ndindex(*window)]
        true = [(b, *at, c) for at in seen if all(0 <= j < n for j, n in zip(at, sizes, strict=True))]
        padded = [at for at in seen if all(j < n + p[1] for j, n, p in zip(at, sizes, pads, strict=True))]
        values, here = np.array([x[at] for at in true]), (b, *o, c)
        if kind == "max":
            y[here] = values.max()
            dx[true[int(values.argmax())]] += dy[here]
        else:
            count = len(padded if count_padding else true)
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
    "dilated": ((1, 6, 7, 2), (2, 3), {"stride": 1, "dilation": (3, 2)}, ((1, 1), ((0, 0), (0, 0)))),
    "ceil": ((1, 5, 7, 2), (2, 3), {"ceil_mode": True}, ((2, 3), ((0, 0), (0, 0)))),
    "ceil, padded, dilated": (
        (1, 6, 5, 2),
        (3, 2),
        {"stride": 3, "dilation": (1, 2), "padding": ((1, 1), (0, 1)), "ceil_mode": True},
        ((3, 3), ((1, 1), (0, 1))),
    ),
    "volumes": (
        (1, 3, 4, 4, 2),
        (2, 2, 3),
        {"stride": (1, 2, 2), "padding": "SAME"},
        ((1, 2, 2), ((0, 1), (0, 0), (0, 1))),
    ),
    "volumes, side by side, ceil": ((1, 3, 2, 5, 1), (2, 1, 3), {"ceil_mode": True}, ((2, 1, 3), ((0, 0),) * 3)),
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
    more = {"dilation": options.get("dilation"), "ceil_mode": options.get("ceil_mode", False)}
    expected = numpy_pool(kind[:3], np.asarray(x), np.asarray(dy), window, numbers[0], numbers[1], padded, **more)
    assert_leaves_close(actual, expected, 1e-14)
    assert_leaves_close(actual, autodiff, 1e-14)


@pytest.mark.parametrize(
    ("layer", "kind"), [(global_max_pool(), "max"), (global_avg_pool(), "avg")], ids=["max", "avg"]
)
@pytest.mark.parametrize("shape", [(2, 3, 4, 3), (2, 5, 3), (2, 2, 3, 2, 3)])
def test_global_pools_are_pools_over_one_window(layer, kind, shape, x64):
    x = jnp.asarray(np.random.default_rng(1).integers(-1, 2, shape), jnp.float64)
    dy = outputs_like(layer, x)
    (y, dx), autodiff = by_both(layer, x, dy)
    ones, nothing = (1,) * (len(shape) - 2), ((0, 0),) * (len(shape) - 2)
    whole = np.asarray(dy).reshape(2, *ones, 3)
    expected, expected_dx = numpy_pool(kind, np.asarray(x), whole, shape[1:-1], ones, nothing)
    assert_leaves_close((y, dx), (expected.reshape(2, 3), expected_dx), 1e-14)
    assert_leaves_close((y, dx), autodiff, 1e-14)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_p_norms_of_windows_equal_numpy_and_autodiff_where_all_are_zero_too(p, x64):
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 2))
    x[0, :3] = 0
    layer = lp_pool((2, 3), p, stride=(2, 1), padding=((1, 0), (1, 1)))
    padded = np.pad(x, ((0, 0), (1, 0), (1, 1), (0, 0)))
    dy = np.random.default_rng(1).standard_normal((2, 3, 4, 2))
    y, dx = np.zeros(dy.shape), np.zeros(padded.shape)
    for b, i, j, c in np.ndindex(*dy.shape):
        seen = (b, slice(2 * i, 2 * i + 2), slice(j, j + 3), c)
        y[b, i, j, c] = (np.abs(padded[seen]) ** p).sum() ** (1 / p)
        if y[b, i, j, c]:
            slopes = np.sign(padded[seen]) * (np.abs(padded[seen]) / y[b, i, j, c]) ** (p - 1)
            dx[seen] += dy[b, i, j, c] * slopes
    actual, autodiff = by_both(layer, jnp.asarray(x), jnp.asarray(dy))
    assert_leaves_close(actual, (y, dx[:, 1:, 1:-1]), 1e-13)
    assert_leaves_close(actual, autodiff, 1e-13)


def test_a_divisor_takes_the_place_of_the_counts(x64):
    x, dy = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3))), jnp.ones((2, 3, 3))
    options = {"stride": 2, "padding": "SAME"}
    (y, dx), autodiff = by_both(avg_pool((2,), divisor=0.5, **options), x, dy)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 0)))
    assert_leaves_close(y, (padded[:, ::2] + padded[:, 1::2]) / 0.5, 1e-14)
    assert_leaves_close(dx, np.full(x.shape, 2.0), 1e-14)
    assert_leaves_close((y, dx), autodiff, 1e-14)
    images = jnp.asarray(np.random.default_rng(2).standard_normal((2, 4, 6, 3)))
    y = apply(avg_pool((2, 3), divisor=1), (), (), images)
    assert_leaves_close(y, np.asarray(images).reshape(2, 2, 2, 2, 3, 3).sum((2, 4)), 1e-14)
    for wrong in ({"p": 0.5}, {"p": 0}):
        with pytest.raises(ValueError, match="lp_pool: p = "):
            lp_pool((2,), **wrong)


def numpy_adaptive_pool(kind, x, dy, sizes):
    """Outputs and the inputs' gradient, part by part; the first of a tie in row-major order takes all."""
    y, dx = np.zeros((x.shape[0], *sizes, x.shape[-1])), np.zeros(x.shape)
    for b, *o, c in np.ndindex(*y.shape):
        ends = zip(o, x.shape[1:-1], sizes, strict=True)
        ranges = [range(math.floor(i * n / m), math.ceil((i + 1) * n / m)) for i, n, m in ends]
        places, here = [(b, *at, c) for at in itertools.product(*ranges)], (b, *o, c)
        values = np.array([x[at] for at in places])
        if kind == "max":
            y[here] = values.max()
            dx[places[int(values.argmax())]] += dy[here]
        else:
            y[here] = values.mean()
            for at in places:
                dx[at] += dy[here] / len(places)
    return y, dx


ADAPTIVE = {
    "time": ((2, 7, 3), (3,)),
    "a divisor": ((1, 6, 4, 2), (3, 4)),
    "none": ((2, 5, 7, 2), (3, 2)),
    "more than there are": ((1, 2, 3, 2), (5, 4)),
    "volumes": ((1, 3, 4, 2, 2), (2, 3, 2)),
    "one": ((1, 3, 5, 2), (1, 1)),
    "four axes": ((1, 2, 1, 3, 2, 1), (1, 2, 2, 2)),
}


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_pools_equal_numpy_and_autodiff_ties_included(name, kind, x64):
    shape, sizes = ADAPTIVE[name]
    layer = {"max": adaptive_max_pool, "avg": adaptive_avg_pool}[kind](sizes)
    x = jnp.asarray(np.random.default_rng(1).integers(-1, 2, shape), jnp.float64)
    dy = outputs_like(layer, x)
    actual, autodiff = by_both(layer, x, dy)
    assert_leaves_close(actual, numpy_adaptive_pool(kind, np.asarray(x), np.asarray(dy), sizes), 1e-14)
    assert_leaves_close(actual, autodiff, 1e-14)


def test_an_entry_that_is_not_finite_stays_in_the_parts_that_hold_it():
    x = jnp.arange(7.0).at[3].set(jnp.inf).at[6].set(-jnp.inf).reshape(1, 7, 1)  # parts 0–2, 2–4 and 4–6
    for layer, expected in (
        (adaptive_max_pool((3,)), [2, np.inf, 5]),
        (adaptive_avg_pool((3,)), [1, np.inf, -np.inf]),
    ):
        np.testing.assert_array_equal(np.ravel(layer.forward((), (), x)[0]), expected)


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
    "max, dilated, ceil": max_pool((2, 2), dilation=2, ceil_mode=True),
    "avg, ceil": avg_pool((2, 3), padding=((1, 0), (1, 1)), ceil_mode=True, count_padding=True),
    "global max": global_max_pool(),
    "global avg": global_avg_pool(),
    "adaptive max": adaptive_max_pool((3, 2)),
    "adaptive avg": adaptive_avg_pool((3, 7)),
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


@pytest.mark.parametrize(
    "layer", [max_pool((2, 2)), global_max_pool(), adaptive_max_pool((1, 1))], ids=["windows", "global", "adaptive"]
)
@pytest.mark.parametrize("place", range(4))
def test_a_nan_passes_and_takes_the_gradient(layer, place):
    x = jnp.arange(4.0).at[place].set(jnp.nan).reshape(1, 2, 2, 1)
    y, dx = by_hand(layer, x, outputs_like(layer, x))
    assert np.isnan(y).all()
    assert np.flatnonzero(np.asarray(dx)).tolist() == [place]


@pytest.mark.parametrize(
    "layer", [max_pool((2, 2)), global_max_pool(), adaptive_max_pool((1, 1))], ids=["windows", "global", "adaptive"]
)
def test_of_several_nans_the_first_takes_the_gradient(layer):
    x = jnp.asarray([3.0, jnp.nan, 4.0, jnp.nan]).reshape(1, 2, 2, 1)
    for _, dx in by_both(layer, x, outputs_like(layer, x)):
        assert np.flatnonzero(np.asarray(dx)).tolist() == [1]


def test_other_entries_of_a_window_may_be_infinite():
    x = jnp.asarray([-jnp.inf, 2.0, 1.0, -jnp.inf]).reshape(1, 2, 2, 1)
    for layer in (max_pool((2, 2)), global_max_pool(), adaptive_max_pool((1, 1))):
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
        images = [
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
            (
                max_pool((3, 2), stride=2, padding=((1, 1), (0, 0)), dilation=2, ceil_mode=True),
                lambda x: functional.max_pool2d(x, (3, 2), 2, (1, 0), 2, True),
            ),
            *(
                (make(sizes), lambda x, function=function, sizes=sizes: function(x, sizes))
                for sizes in ((2, 4), (9, 6), (1, 5))
                for make, function in (
                    (adaptive_avg_pool, functional.adaptive_avg_pool2d),
                    (adaptive_max_pool, functional.adaptive_max_pool2d),
                )
            ),
            *(
                (
                    avg_pool((3, 2), stride=2, padding=pads, ceil_mode=True, count_padding=count),
                    lambda x, count=count: functional.avg_pool2d(x, (3, 2), 2, 1, True, count),
                )
                for count in (False, True)
            ),
        ]
        volumes = [
            (
                max_pool((2, 2, 3), stride=2, padding=((0, 0), (1, 1), (1, 1)), ceil_mode=True),
                lambda x: functional.max_pool3d(x, (2, 2, 3), 2, (0, 1, 1), ceil_mode=True),
            ),
            (
                avg_pool((2, 2, 3), stride=2, padding=((0, 0), (1, 1), (1, 1)), ceil_mode=True, count_padding=True),
                lambda x: functional.avg_pool3d(x, (2, 2, 3), 2, (0, 1, 1), ceil_mode=True),
            ),
            (adaptive_avg_pool((2, 3, 4)), lambda x: functional.adaptive_avg_pool3d(x, (2, 3, 4))),
            (adaptive_max_pool((2, 3, 4)), lambda x: functional.adaptive_max_pool3d(x, (2, 3, 4))),
        ]
        every = [((2, 7, 6, 3), *case) for case in images] + [((2, 3, 7, 6, 3), *case) for case in volumes]
        for shape, layer, function in every:
            x = np.random.default_rng(0).normal(size=shape)
            leaf = torch.tensor(np.moveaxis(x, -1, 1).copy(), dtype=torch.float64, requires_grad=True)
            out = function(leaf)
            dy = np.random.default_rng(1).normal(size=tuple(out.shape))
            out.backward(torch.tensor(dy))
            assert leaf.grad is not None
            y, dx = by_hand(layer, jnp.asarray(x), jnp.asarray(np.moveaxis(dy, 1, -1)))
            expected = np.moveaxis(out.detach().numpy(), 1, -1), np.moveaxis(leaf.grad.numpy(), 1, -1)
            assert_leaves_close((y, dx), expected, 1e-13)


def test_torch_makes_the_same_sizes_and_means_in_ceil_mode():
    """Over a grid; where torch has no output, or a window that sees nothing but padding, ours is refused."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    compared = refused = 0
    for n, k, s, p, d in itertools.product((1, 2, 4, 5, 7), (1, 2, 3, 4), (1, 2, 3, 5), (0, 1, 2), (1, 2)):
        if p > k // 2:  # which torch refuses
            continue
        x = np.random.default_rng(n).normal(size=n).astype(np.float32)
        options = {"stride": s, "padding": ((p, p),), "ceil_mode": True}
        cases = [(max_pool((k,), dilation=d, **options), functional.max_pool1d, (k, s, p, d, True))]
        if d == 1:
            for count in (False, True):
                layer = avg_pool((k,), count_padding=count, **options)
                cases.append((layer, functional.avg_pool1d, (k, s, p, True, count)))
        for layer, function, arguments in cases:
            try:
                expected = function(torch.tensor(x)[None, None], *arguments).numpy()[0, 0]
            except RuntimeError:
                expected = np.array([-np.inf])
            if np.isinf(expected).any():
                refused += 1
                with pytest.raises(LayerError):
                    layer.init(jax.random.key(0), x[None, :, None])
            else:
                compared += 1
                y = layer.forward((), (), jnp.asarray(x)[None, :, None])[0]
                np.testing.assert_allclose(np.asarray(y)[0, :, 0], expected, rtol=1e-6, atol=1e-6)
    assert compared > 400 and refused > 20


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [max_pool, avg_pool])
def test_arguments_that_do_not_fit_are_refused(make):
    for window, options, message in [
        (2, {}, r"_pool: window = 2; expected a tuple, one size for each spatial axis: \(3,\) for \(B, T, C\)"),
        ((2, 0), {}, r"_pool: window = \(2, 0\); expected a whole number of at least 1"),
        ((2, 2), {"stride": 0}, "_pool: stride = 0; expected a whole number"),
        ((2,), {"padding": "CAUSAL"}, r"_pool: padding = 'CAUSAL'; expected one of \('SAME', 'VALID'\)"),
        ((2, 2), {"padding": ((1, 1),)}, "_pool: padding = .* expected 2 pairs"),
        ((2, 2), {"dilation": 0}, "_pool: dilation = 0; expected a whole number"),
        ((2, 2), {"padding": "SAME", "ceil_mode": True}, "_pool: ceil_mode = True with padding 'SAME', which has"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(window, **options)


@pytest.mark.parametrize("make", [adaptive_max_pool, adaptive_avg_pool])
@pytest.mark.parametrize("sizes", [3, (), (2, 0), (2.0,), "22", (True,)])
def test_sizes_that_are_none_are_refused(make, sizes):
    with pytest.raises(
        ValueError, match=f"{make.__name__}: sizes = .*expected a tuple, one whole number of at least 1"
    ):
        make(sizes)


def test_inputs_that_do_not_fit_are_refused():
    for layer, x, message in [
        (max_pool((2, 2)), jnp.ones((2, 5, 3)), r"expected \(B, H, W, C\) .*, got shape \(2, 5, 3\)"),
        (max_pool((6, 2)), jnp.ones((2, 5, 5, 3)), "do not fit into inputs of .*no output is left"),
        (avg_pool((2, 2)), jnp.ones((2, 5, 5, 3), jnp.int32), "expected floating inputs, got int32"),
        (max_pool((2, 2), padding=((2, 0), (0, 0))), jnp.ones((1, 4, 4, 1)), "see nothing but padding"),
        (max_pool((2, 2, 2)), jnp.ones((2, 5, 5, 3)), r"expected \(B, D, H, W, C\)"),
        (adaptive_avg_pool((2, 2)), jnp.ones((2, 5, 3)), r"expected a batch axis, 2 spatial and channels for \(2, 2\)"),
        (adaptive_max_pool((2,)), jnp.ones((2, 5, 3), jnp.int32), "expected floating inputs, got int32"),
        (adaptive_max_pool((2,)), jnp.ones((2, 0, 3)), r"got shape \(2, 0, 3\)"),
        (global_max_pool(), jnp.ones((2, 3)), r"such as \(B, H, W, C\), got shape \(2, 3\)"),
        (global_avg_pool(), jnp.ones((2, 0, 3)), r"got shape \(2, 0, 3\)"),
    ]:
        with pytest.raises(LayerError, match=message):
            layer.init(jax.random.key(0), x)
        with pytest.raises(LayerError, match=message):
            apply(layer, (), (), x)
