"""Resizing: weights, forward and gradients against loops in NumPy and torch; pixel shuffles; errors."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.gradcheck import check_layer
from fnet.layers.children import apply
from fnet.layers.resizing import interpolation, nearest, pixel_shuffle, pixel_unshuffle, resize
from fnet.types import LayerError
from tests.oracles import assert_leaves_close, by_both, keys_kernel

KINDS = {
    "nearest": ("nearest", "half_pixel", False),
    "nearest, aligned": ("nearest", "align", False),
    "nearest, asymmetric": ("nearest", "asymmetric", False),
    "linear": ("linear", "half_pixel", False),
    "linear, aligned": ("linear", "align", False),
    "linear, asymmetric": ("linear", "asymmetric", False),
    "linear, antialiased": ("linear", "half_pixel", True),
    "cubic": ("cubic", "half_pixel", False),
    "cubic, aligned": ("cubic", "align", False),
}


def numpy_weights(n, m, method, corners, antialias):
    """``W (m, n)`` entry by entry; s in fractions, so that a border is where it is."""
    w = np.zeros((m, n))
    for o in range(m):
        s = {
            "half_pixel": (o + Fraction(1, 2)) * n / m - Fraction(1, 2),
            "align": Fraction(o * (n - 1), m - 1) if m > 1 else Fraction(0),
            "asymmetric": Fraction(o * n, m),
        }[corners]
        if method == "nearest":
            w[o, math.floor(s if corners == "asymmetric" else s + Fraction(1, 2))] = 1
        elif antialias and m < n:
            triangle = [max(0.0, 1 - abs(float(j - s)) * m / n) for j in range(n)]
            w[o] = np.divide(triangle, sum(triangle))
        else:
            kernel = keys_kernel if method == "cubic" else lambda d: max(0.0, 1 - abs(d))
            for j in range(math.floor(s) - 1, math.floor(s) + 3):
                w[o, min(max(j, 0), n - 1)] += kernel(float(s - j))
    return w


def normal(*shape):
    return np.random.default_rng(3).normal(size=shape)


ROUNDINGS = {  # of fractions
    "floor": math.floor,
    "ceil": math.ceil,
    "half_up": lambda s: math.floor(s + Fraction(1, 2)),
    "half_down": lambda s: math.ceil(s - Fraction(1, 2)),
}


# --- resize ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_an_axis_are_the_formulas_for_every_pair_of_sizes(kind):
    method, corners, antialias = KINDS[kind]
    for n, m in itertools.product([*range(1, 10), 16], repeat=2):
        expected = numpy_weights(n, m, method, corners, antialias)
        if method == "nearest":
            np.testing.assert_array_equal(np.eye(n)[nearest(n, m, corners)], expected, err_msg=f"{n} to {m}")
        else:
            found = interpolation(n, m, method, corners, antialias)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14, err_msg=f"{n} to {m}")
            np.testing.assert_allclose(found.sum(1), 1, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_numpy_and_autodiff(kind, x64):
    method, corners, antialias = KINDS[kind]
    old, new = (4, 5, 3), (8, 3, 4)  # twice, fewer, more
    x, dy = normal(2, *old, 2), normal(2, *new, 2)
    layer = resize(new, method=method, corners=corners, antialias=antialias)
    by_hand, autodiff = by_both(layer, jnp.asarray(x), jnp.asarray(dy))
    w = [numpy_weights(n, m, method, corners, antialias) for n, m in zip(old, new, strict=True)]
    expected = np.einsum("ai,bj,ck,nijkf->nabcf", *w, x), np.einsum("ai,bj,ck,nabcf->nijkf", *w, dy)
    assert_leaves_close(by_hand, expected, 1e-13)
    assert_leaves_close(by_hand, autodiff, 1e-14)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("corners", ["half_pixel", "align", "asymmetric"])
def test_the_nearest_is_rounded_as_is_named(corners, rounding, x64):
    for n, m in [(2, 4), (4, 2), (3, 5), (5, 3), (2, 6), (6, 4), (7, 1), (1, 3)]:
        x, dy = normal(1, n, 2), normal(1, m, 2)
        at = {
            "half_pixel": [(o + Fraction(1, 2)) * n / m - Fraction(1, 2) for o in range(m)],
            "align": [Fraction(o * (n - 1), max(m - 1, 1)) for o in range(m)],
            "asymmetric": [Fraction(o * n, m) for o in range(m)],
        }[corners]
        found = [min(max(ROUNDINGS[rounding](s), 0), n - 1) for s in at]
        dx = np.zeros(x.shape)
        for o, j in enumerate(found):
            dx[:, j] += dy[:, o]
        layer = resize((m,), method="nearest", corners=corners, rounding=rounding)
        y, _, residuals = layer.forward((), (), jnp.asarray(x))
        assert_leaves_close((y, layer.backward((), residuals, jnp.asarray(dy))[1]), (x[:, found], dx), 1e-15)


def test_a_scale_is_rounded_down_and_may_be_one_for_each_axis():
    for scale, old, new in [(1.5, (5, 3), (7, 4)), ((2, 0.5), (5, 3), (10, 1)), (0.34, (3,), (1,)), (3, (2,), (6,))]:
        x = np.float32(normal(1, *old, 1))
        y = apply(resize(scale=scale), (), (), jnp.asarray(x))
        assert y.shape == (1, *new, 1)
        np.testing.assert_array_equal(y, apply(resize(new), (), (), jnp.asarray(x)))


@pytest.mark.parametrize("method", ["nearest", "linear"])
def test_a_scale_that_is_kept_is_where_outputs_lie(method, x64):
    # 5 · 0.7 = 3.5: three outputs, 10/7 inputs apart and not 5/3
    x = normal(1, 5, 1)
    y = resize(scale=0.7, method=method, keep_scale=True).forward((), (), jnp.asarray(x))[0]
    for o in range(3):
        s = (o + Fraction(1, 2)) * Fraction(10, 7) - Fraction(1, 2)
        below, t = math.floor(s), float(s - math.floor(s))
        linear = (1 - t) * x[0, below, 0] + t * x[0, min(below + 1, 4), 0]
        nearest_one = x[0, math.floor(s + Fraction(1, 2)), 0]
        np.testing.assert_allclose(y[0, o, 0], nearest_one if method == "nearest" else linear, rtol=1e-14)
    for wrong in ({"sizes": (3,)}, {"scale": 2, "corners": "align"}):
        with pytest.raises(ValueError, match="resize: keep_scale with"):
            resize(**wrong, keep_scale=True)


def test_a_size_that_stays_costs_nothing_and_changes_nothing():
    x = jnp.asarray(normal(2, 3, 4, 2), jnp.float32)
    layer = resize((3, 4), method="cubic")
    np.testing.assert_array_equal(apply(layer, (), (), x), x)
    assert "dot_general" not in str(jax.make_jaxpr(lambda x: apply(layer, (), (), x))(x))


def test_nearest_moves_a_nan_and_an_infinity_to_the_places_that_they_are_nearest_to():
    x = jnp.asarray([np.nan, 1, np.inf, 2]).reshape(1, 4, 1)
    for sizes, expected in [((8,), [np.nan, np.nan, 1, 1, np.inf, np.inf, 2, 2]), ((3,), [np.nan, np.inf, 2])]:
        np.testing.assert_array_equal(apply(resize(sizes, method="nearest"), (), (), x).ravel(), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["nearest", "linear, antialiased", "cubic"])
def test_lower_precisions_round_once(kind, dtype, x64):
    method, corners, antialias = KINDS[kind]
    layer = resize((3, 10), method=method, corners=corners, antialias=antialias)
    x, dy = jnp.asarray(normal(2, 7, 5, 2), dtype), jnp.asarray(normal(2, 3, 10, 2), dtype)
    rounded = by_both(layer, x, dy)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype(dtype)}
    exact, _ = by_both(layer, x.astype(jnp.float64), dy.astype(jnp.float64))
    for actual in rounded:
        # one rounding of the result; in float32 some of sums of up to ten terms too
        assert_leaves_close(actual, exact, float(jnp.finfo(dtype).eps) * (8 if dtype == jnp.float32 else 1))


@pytest.mark.parametrize(
    "layer",
    [resize((8, 3)), resize(scale=0.5, method="nearest", corners="asymmetric"), pixel_unshuffle(2)],
    ids=["linear", "nearest", "unshuffle"],
)
def test_the_audit_finds_nothing(layer, key):
    report = check_layer(layer, jax.random.normal(key, (2, 4, 6, 2)), key=key, precisions=(), cost=False)
    assert {leaf.verdict for leaf in report.leaves} == {"ok"}, report


def test_layers_run_under_vmap(x64):
    x = jnp.asarray(normal(3, 2, 4, 4, 4))
    for layer in (resize(scale=1.5), resize(scale=1.5, method="nearest"), pixel_shuffle(2)):

        def run(x, layer=layer):
            y, _, residuals = layer.forward((), (), x)
            return y, layer.backward((), residuals, y)[1]

        mapped, one = jax.jit(jax.vmap(run))(x), jax.jit(run)
        for i in range(3):
            assert_leaves_close(jax.tree.map(lambda a, i=i: a[i], mapped), one(x[i]), 1e-14)


# --- channels and space ----------------------------------------------------------------------------------------------


def numpy_shuffle(x, r, order):
    b, *s, c = x.shape
    k, channels = len(s), c // r ** len(s)
    y = np.zeros((b, *(r * size for size in s), channels))
    for at in np.ndindex(*s):
        for within in np.ndindex(*(r,) * k):
            place = tuple(r * a + i for a, i in zip(at, within, strict=True))
            number = sum(i * r ** (k - 1 - axis) for axis, i in enumerate(within))
            for f in range(channels):
                y[(slice(None), *place, f)] = x[
                    (slice(None), *at, f * r**k + number if order == "CRD" else number * channels + f)
                ]
    return y


@pytest.mark.parametrize("order", ["CRD", "DCR"])
@pytest.mark.parametrize(("shape", "r"), [((2, 3, 6), 3), ((2, 2, 3, 8), 2), ((1, 2, 1, 3, 16), 2)])
def test_pixel_shuffle_puts_channels_where_the_order_says_and_unshuffle_takes_them_back(shape, r, order, x64):
    x = normal(*shape)
    y = numpy_shuffle(x, r, order)
    shuffle, unshuffle = pixel_shuffle(r, order=order), pixel_unshuffle(r, order=order)
    for layer, given, expected in ((shuffle, x, y), (unshuffle, y, x)):
        # the transpose of a permutation is its inverse
        for found, dx in by_both(layer, jnp.asarray(given), jnp.asarray(expected)):
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(dx, given)


# --- torch and jax ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "antialias"), [("linear", False), ("linear, antialiased", True), ("nearest", False)])
def test_jax_image_computes_the_same(kind, antialias, x64):
    method, corners, _ = KINDS[kind]
    x = jnp.asarray(normal(1, 5, 6, 2))
    for sizes in ((8, 12), (3, 4)):
        layer = resize(sizes, method=method, corners=corners, antialias=antialias)
        expected = jax.image.resize(x, (1, *sizes, 2), method, antialias=antialias)
        assert_leaves_close(apply(layer, (), (), x), expected, 1e-13)


TORCH = {  # the mode of torch's interpolate and its arguments
    "nearest": ("nearest-exact", {}),
    "nearest, asymmetric": ("nearest", {}),
    "linear": ("bilinear", {"align_corners": False}),
    "linear, aligned": ("bilinear", {"align_corners": True}),
    "linear, antialiased": ("bilinear", {"align_corners": False, "antialias": True}),
    "cubic": ("bicubic", {"align_corners": False}),
    "cubic, aligned": ("bicubic", {"align_corners": True}),
}


@pytest.mark.parametrize("kind", TORCH)
def test_torch_computes_the_same_up_and_down(kind, x64):
    torch = pytest.importorskip("torch")
    mode, options = TORCH[kind]
    method, corners, antialias = KINDS[kind]
    for n, m in itertools.product([*range(1, 13), 17, 32], repeat=2):  # the weights: what it makes of unit vectors
        units = torch.eye(n, dtype=torch.float64)[None, :, :, None].repeat(1, 1, 1, 2)  # channels, height, width
        expected = torch.nn.functional.interpolate(units, (m, 2), mode=mode, **options)[0, :, :, 0].numpy().T
        found = (
            np.eye(n)[nearest(n, m, corners)]
            if method == "nearest"
            else interpolation(n, m, method, corners, antialias)
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13, err_msg=f"{n} to {m}")
    for sizes in ((8, 3), (2, 12)):
        x, dy = normal(2, 4, 6, 3), normal(2, *sizes, 3)
        leaf = torch.tensor(np.moveaxis(x, -1, 1).copy(), requires_grad=True)
        out = torch.nn.functional.interpolate(leaf, sizes, mode=mode, **options)
        out.backward(torch.tensor(np.moveaxis(dy, -1, 1).copy()))
        expected = np.moveaxis(out.detach().numpy(), 1, -1), np.moveaxis(leaf.grad.numpy(), 1, -1)
        layer = resize(sizes, method=method, corners=corners, antialias=antialias)
        assert_leaves_close(by_both(layer, jnp.asarray(x), jnp.asarray(dy))[0], expected, 1e-13)


def test_torch_scales_the_same_where_it_computes_the_scale_anew(x64):
    torch = pytest.importorskip("torch")
    x = normal(1, 7, 5, 2)
    for scale in (1.7, 0.6, 2.0):
        expected = torch.nn.functional.interpolate(
            torch.tensor(np.moveaxis(x, -1, 1).copy()),
            scale_factor=scale,
            mode="bilinear",
            recompute_scale_factor=True,
        )
        y = apply(resize(scale=scale), (), (), jnp.asarray(x))
        assert_leaves_close(y, np.moveaxis(expected.numpy(), 1, -1), 1e-13)


def test_torch_shuffles_the_same(x64):
    torch = pytest.importorskip("torch")
    x = normal(2, 4, 6, 8)
    first = torch.tensor(np.moveaxis(x, -1, 1).copy())
    for layer, module in (
        (pixel_shuffle(2), torch.nn.PixelShuffle(2)),
        (pixel_unshuffle(2), torch.nn.PixelUnshuffle(2)),
    ):
        np.testing.assert_array_equal(apply(layer, (), (), jnp.asarray(x)), np.moveaxis(module(first).numpy(), 1, -1))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused():
    for make, message in [
        (lambda: resize(), "resize: sizes = None and scale = None; expected one of the two"),
        (lambda: resize((2,), scale=2), r"resize: sizes = \(2,\) and scale = 2; expected one"),
        (lambda: resize(4), "resize: sizes = 4; expected a tuple"),
        (lambda: resize(()), r"resize: sizes = \(\); expected a tuple"),
        (lambda: resize((2, 0)), r"resize: sizes\[1\] = 0; expected at least 1"),
        (lambda: resize((2.0,)), r"resize: sizes\[0\] = 2.0; expected a whole number"),
        (lambda: resize(scale=0), "resize: scale = 0; expected a number above 0"),
        (lambda: resize(scale=(1, 2, 3, 4)), "resize: scale = .*; expected a number above 0, or one for each"),
        (lambda: resize(scale="2"), "resize: scale = '2'; expected"),
        (lambda: resize(scale=math.inf), "resize: scale = inf; expected"),
        (lambda: resize((2,), method="lanczos"), "resize: method = 'lanczos'; expected 'nearest'"),
        (lambda: resize((2,), corners=True), "resize: corners = True; expected 'half_pixel'"),
        (lambda: resize((2,), rounding="floor"), "resize: rounding = 'floor' with 'linear'; expected None, or with"),
        (lambda: resize((2,), method="nearest", rounding="up"), "resize: rounding = 'up' with 'nearest'; expected"),
        (lambda: resize((2,), method="cubic", antialias=True), "resize: antialias with 'cubic' and 'half_pixel'"),
        (lambda: pixel_shuffle(0), "pixel_shuffle: factor = 0; expected a whole number"),
        (lambda: pixel_unshuffle(2, order="rows"), "pixel_unshuffle: order = 'rows'; expected 'CRD'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_inputs_that_do_not_fit_are_refused():
    for layer, x, message in [
        (resize((2, 2)), jnp.ones((1, 4, 1)), r"expected \(B, \*S, C\) with 2 spatial axes, got shape \(1, 4, 1\)"),
        (resize(scale=(2,)), jnp.ones((1, 4, 4, 1)), r"with 1 spatial axes, got shape"),
        (resize(scale=2), jnp.ones((4, 1)), r"with 1 or 2 or 3 spatial axes, got shape \(4, 1\)"),
        (resize((2,)), jnp.ones((1, 4, 1), jnp.int32), "expected floating inputs, got int32"),
        (resize(scale=0.2), jnp.ones((1, 4, 1)), r"cannot resize \(4,\) to \(0,\): expected sizes of at least 1"),
        (resize((2,)), jnp.ones((1, 0, 1)), r"cannot resize \(0,\) to \(2,\)"),
        (pixel_shuffle(2), jnp.ones((4, 4)), r"with a spatial axis, such as \(B, H, W, C\), got shape \(4, 4\)"),
        (pixel_shuffle(2), jnp.ones((1, 2, 2, 6)), "expected channels in multiples of 4, got 6"),
        (pixel_unshuffle(2), jnp.ones((1, 4, 3, 1)), r"expected spatial axes in multiples of 2, got shape \(1, 4, 3"),
    ]:
        for act in (lambda x, layer=layer: layer.init(None, x), lambda x, layer=layer: apply(layer, (), (), x)):
            with pytest.raises(LayerError, match=message):
                act(x)
