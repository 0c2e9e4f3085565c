"""Convolutions and their transposes: sizes, forward and gradients against NumPy and torch, causality, errors."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.core.platforms import traced_for
from fnet.gradcheck import check_layer
from fnet.layers.children import apply
from fnet.layers.convolution import conv, conv_transpose
from fnet.types import LayerError
from tests.oracles import assert_leaves_close, numerical_gradient


def numpy_conv(x, w, b, dy, stride, dilation, pads, groups=1):
    """Outputs and gradients ``y, dx, dw, db`` by the sums that define them, term by term."""
    per, features = w.shape[-2], w.shape[-1] // groups
    inner = (slice(None), *(slice(low, low + n) for (low, _), n in zip(pads, x.shape[1:-1], strict=True)))
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    extent = [(k - 1) * d + 1 for k, d in zip(w.shape, dilation, strict=False)]
    m = [(size - e) // s + 1 for size, e, s in zip(x.shape[1:-1], extent, stride, strict=True)]
    y, dx, dw = np.zeros((x.shape[0], *m, w.shape[-1])), np.zeros(x.shape), np.zeros(w.shape)
    for o, k, g in itertools.product(np.ndindex(*m), np.ndindex(*w.shape[:-2]), range(groups)):
        at = tuple(i * s + j * d for i, s, j, d in zip(o, stride, k, dilation, strict=True))
        seen, to = (slice(None), *at, slice(g * per, g * per + per)), slice(g * features, (g + 1) * features)
        here = (slice(None), *o, to)
        y[here] += x[seen] @ w[k][:, to]
        dx[seen] += dy[here] @ w[k][:, to].T
        dw[k][:, to] += x[seen].T @ dy[here]
    return y + b, dx[inner], dw, dy.sum(tuple(range(dy.ndim - 1)))


def numpy_conv_transpose(x, w, b, dy, stride, dilation, sizes, low, groups=1):
    """The same of a transposed convolution: every input adds into a window of the outputs, which have the ``sizes``."""
    per, features = w.shape[-2] // groups, w.shape[-1]
    y, dx, dw = np.zeros((x.shape[0], *sizes, groups * features)), np.zeros(x.shape), np.zeros(w.shape)
    for o, k, g in itertools.product(np.ndindex(*x.shape[1:-1]), np.ndindex(*w.shape[:-2]), range(groups)):
        at = tuple(i * s + j * d - p for i, s, j, d, p in zip(o, stride, k, dilation, low, strict=True))
        if all(0 <= j < size for j, size in zip(at, sizes, strict=True)):
            channels = slice(g * per, (g + 1) * per)
            at, here = (slice(None), *at, slice(g * features, (g + 1) * features)), (slice(None), *o, channels)
            y[at] += x[here] @ w[k][channels]
            dx[here] += dy[at] @ w[k][channels].T
            dw[k][channels] += x[here].T @ dy[at]
    return y + b, dx, dw, dy.sum(tuple(range(dy.ndim - 1)))


# name: input shape, kernel, arguments, and for the oracle: strides, dilations, the zeros around each axis, groups
CONVS = {
    "same": ((2, 4, 5, 3), (3, 3), {}, ((1, 1), (1, 1), ((1, 1), (1, 1)), 1)),
    "same, even kernel": ((1, 4, 5, 2), (2, 4), {}, ((1, 1), (1, 1), ((0, 1), (1, 2)), 1)),
    "same, stride that does not divide": (
        (2, 5, 6, 2),
        (3, 3),
        {"stride": (2, 4)},
        ((2, 4), (1, 1), ((1, 1), (0, 1)), 1),
    ),
    "valid, stride that leaves a rest": (
        (2, 6, 5, 2),
        (3, 2),
        {"stride": 2, "padding": "VALID"},
        ((2, 2), (1, 1), ((0, 0), (0, 0)), 1),
    ),
    "explicit, dilated, grouped": (
        (1, 4, 5, 4),
        (2, 3),
        {"dilation": (3, 2), "padding": ((0, 2), (3, 1)), "groups": 2},
        ((1, 1), (3, 2), ((0, 2), (3, 1)), 2),
    ),
    "depthwise, two of each": ((2, 4, 4, 2), (3, 3), {"groups": 2}, ((1, 1), (1, 1), ((1, 1), (1, 1)), 2)),
    "depthwise": ((2, 4, 5, 4), (3, 2), {"groups": 4}, ((1, 1), (1, 1), ((1, 1), (0, 1)), 4)),
    "depthwise, strided, dilated": (
        (2, 5, 6, 4),
        (3, 2),
        {"groups": 4, "stride": (2, 1), "dilation": (1, 3), "padding": ((2, 0), (1, 3))},
        ((2, 1), (1, 3), ((2, 0), (1, 3)), 4),
    ),
    "depthwise over time": ((1, 6, 4), (3,), {"groups": 4, "padding": "CAUSAL"}, ((1,), (1,), ((2, 0),), 4)),
    "pieces side by side": (
        (2, 5, 4, 2),
        (2, 2),
        {"stride": 2, "padding": "VALID"},
        ((2, 2), (1, 1), ((0, 0),) * 2, 1),
    ),
    "one by one with stride": ((2, 5, 4, 3), (1, 1), {"stride": 2}, ((2, 2), (1, 1), ((0, 0),) * 2, 1)),
    "causal over time": ((2, 6, 3), (3,), {"padding": "CAUSAL", "dilation": 2}, ((1,), (2,), ((4, 0),), 1)),
    "time, same, stride": ((1, 7, 3), (4,), {"stride": 2}, ((2,), (1,), ((1, 2),), 1)),
    "volumes, same, grouped": (
        (2, 3, 2, 4, 4),
        (2, 3, 1),
        {"groups": 2},
        ((1, 1, 1), (1, 1, 1), ((0, 1), (1, 1), (0, 0)), 2),
    ),
    "volumes, explicit, strided, dilated": (
        (1, 4, 3, 5, 2),
        (2, 2, 3),
        {"stride": (1, 2, 2), "dilation": (2, 1, 1), "padding": ((1, 0), (0, 1), (2, 0))},
        ((1, 2, 2), (2, 1, 1), ((1, 0), (0, 1), (2, 0)), 1),
    ),
}
# the same, and for the oracle: strides, dilations, sizes of the output, what is cut before, groups
TRANSPOSES = {
    "same, doubled": ((2, 3, 2, 3), (4, 3), {"stride": 2}, ((2, 2), (1, 1), (6, 4), (1, 0))),
    "valid": ((1, 3, 2, 2), (3, 2), {"stride": (2, 1), "padding": "VALID"}, ((2, 1), (1, 1), (7, 3), (0, 0))),
    "stride beyond the kernel": ((2, 3, 2), (2,), {"stride": 3}, ((3,), (1,), (9,), (0,))),
    "explicit, dilated": (
        (1, 4, 2),
        (3,),
        {"stride": 2, "dilation": 2, "padding": ((1, 3),)},
        ((2,), (2,), (7,), (1,)),
    ),
    "pieces side by side": ((2, 2, 3, 2), (2, 2), {"stride": 2}, ((2, 2), (1, 1), (4, 6), (0, 0))),
    "grouped": (
        (1, 3, 2, 6),
        (2, 3),
        {"stride": (1, 2), "groups": 2, "padding": "VALID"},
        ((1, 2), (1, 1), (4, 5), (0, 0), 2),
    ),
    "larger at its end": (
        (2, 3, 2, 2),
        (2, 3),
        {"stride": (3, 1), "dilation": (1, 2), "padding": ((0, 0), (1, 0)), "output_padding": (2, 1)},
        ((3, 1), (1, 2), (10, 6), (0, 1)),
    ),
    "depthwise": ((2, 3, 2, 4), (3, 2), {"stride": 2, "groups": 4}, ((2, 2), (1, 1), (6, 4), (0, 0), 4)),
    "volumes, grouped, larger at their end": (
        (1, 2, 3, 2, 4),
        (2, 1, 3),
        {"stride": 2, "groups": 4, "padding": ((0, 0), (0, 0), (1, 1)), "output_padding": (1, 0, 1)},
        ((2, 2, 2), (1, 1, 1), (5, 5, 4), (0, 0, 1), 4),
    ),
}
CASES = {
    **{f"conv, {name}": (conv, numpy_conv, *case) for name, case in CONVS.items()},
    **{f"transpose, {name}": (conv_transpose, numpy_conv_transpose, *case) for name, case in TRANSPOSES.items()},
}
FEATURES = 4
FORMS = ["patches", "rows", "xla"]
in_each_form = pytest.mark.parametrize("form", FORMS)


def at_random(name, form, dtype=jnp.float64):
    make, oracle, shape, kernel, options, numbers = CASES[name]
    layer = make(FEATURES, kernel, form=form, **options)
    like = jax.ShapeDtypeStruct(shape, dtype)
    params = jax.eval_shape(lambda key: layer.init(key, like)[0], jax.random.key(0))
    y = jax.eval_shape(lambda p, x: apply(layer, p, (), x), params, like)
    rng = np.random.default_rng(0)
    params, x, dy = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), (params, like, y))
    return layer, lambda p, x, dy: oracle(x, p["w"], p["b"], dy, *numbers), params, x, dy


def by_hand(layer, params, x, dy):
    """Outputs, parameters' and inputs' gradients in one compiled program."""

    def run(params, x, dy):
        y, _, residuals = layer.forward(params, (), x, train=True)
        return y, *layer.backward(params, residuals, dy)

    return jax.jit(run)(params, x, dy)


def by_both(layer, params, x, dy):
    """The same by hand and by autodiff, in one compiled program."""

    def run(params, x, dy):
        y, _, residuals = layer.forward(params, (), x, train=True)
        z, pull = jax.vjp(lambda params, x: apply(layer, params, (), x), params, x)
        return (y, *layer.backward(params, residuals, dy)), (z, *pull(dy))

    return jax.jit(run)(params, x, dy)


@in_each_form
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_the_sums_in_numpy_and_autodiff(name, form, x64):
    layer, oracle, params, x, dy = at_random(name, form)
    (y, dparams, dx), autodiff = by_both(layer, params, x, dy)
    assert_leaves_close((y, dparams, dx), autodiff, 1e-13)
    expected = oracle(*jax.tree.map(np.asarray, (params, x, dy)))
    assert_leaves_close((y, dx, dparams["w"], dparams["b"]), expected, 1e-13)


@pytest.mark.parametrize(
    "name", ["conv, explicit, dilated, grouped", "transpose, explicit, dilated", "transpose, grouped"]
)
def test_the_sums_of_the_gradients_in_numpy_are_those_of_differences(name, x64):
    _, oracle, params, x, dy = at_random(name, "patches")
    p, x, dy = jax.tree.map(np.asarray, (params, x, dy))
    _, dx, dw, _ = oracle(p, x, dy)
    # linear in each argument: differences over a step of 1 are exact up to rounding
    np.testing.assert_allclose(dx, numerical_gradient(lambda x: (oracle(p, x, dy)[0] * dy).sum(), x, 1.0), atol=1e-12)
    along_w = numerical_gradient(lambda w: (oracle({**p, "w": w}, x, dy)[0] * dy).sum(), p["w"], 1.0)
    np.testing.assert_allclose(dw, along_w, atol=1e-12)


# padding that reaches beyond a window, or leaves inputs that no window sees: jaxlib's own convolution on CPU returned
# what lay in memory. Kernel, strides, dilations, padding of inputs of 5 along each axis
BEYOND = {
    "a window before": ((2,), (1,), (1,), ((2, 0),)),
    "windows before and one after": ((3,), (1,), (1,), ((5, 1),)),
    "beyond a dilated window": ((2,), (1,), (2,), ((4, 1),)),
    "strides over padding and a rest": ((2,), (3,), (1,), ((4, 0),)),
    "inputs that no window sees": ((1,), (2,), (1,), ((3, 2),)),
    "images": ((3, 2), (1, 2), (1, 1), ((4, 0), (0, 3))),
}


@in_each_form
@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize(("make", "oracle"), [(conv, numpy_conv), (conv_transpose, numpy_conv_transpose)])
def test_padding_may_reach_beyond_a_window_in_float32(make, oracle, name, form):
    kernel, stride, dilation, pads = BEYOND[name]
    layer = make(4, kernel, stride=stride, dilation=dilation, padding=pads, form=form)
    rng = np.random.default_rng(0)
    draw = lambda like: jnp.asarray(rng.normal(size=like.shape), jnp.float32)  # noqa: E731
    x = draw(np.empty((2, *(5 for _ in kernel), 40)))
    params = jax.tree.map(draw, jax.eval_shape(lambda: layer.init(jax.random.key(0), x)[0]))
    forward = jax.jit(lambda params, x: apply(layer, params, (), x))
    leftovers()
    y = forward(params, x)
    dy = draw(y)
    leftovers()
    by_hand = jax.jit(lambda params, x, dy: layer.backward(params, x, dy))(params, x, dy)
    leftovers()
    autodiff = jax.jit(lambda params, x, dy: jax.vjp(forward, params, x)[1](dy))(params, x, dy)
    sizes = (pads, 1) if make is conv else (y.shape[1:-1], [before for before, _ in pads])
    exact = (np.asarray(a, np.float64) for a in (x, params["w"], params["b"], dy))
    expected = oracle(*exact, stride, dilation, *sizes)
    for dparams, dx in (by_hand, autodiff):  # sums of at most some hundred products, each rounded to 2^-24
        assert_leaves_close((y, dx, dparams["w"], dparams["b"]), expected, 2e-6)


def leftovers():
    """Memory that is free again and not zero, for whoever reads what he has not written."""
    for size in (16, 32, 64, 256, 1024, 4096, 16384):
        jnp.full(size, 1e9, jnp.float32).block_until_ready()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("conv, explicit, dilated, grouped", "patches"),
        ("conv, same", "xla"),
        ("conv, causal over time", "patches"),
        ("transpose, same, doubled", "patches"),
        ("conv, explicit, dilated, grouped", "rows"),
        ("conv, depthwise, strided, dilated", "rows"),
        ("transpose, same, doubled", "rows"),
        ("transpose, volumes, grouped, larger at their end", "patches"),
    ],
)
def test_the_audit_finds_nothing(name, form, key):
    make, _, shape, kernel, options, _ = CASES[name]
    layer = make(FEATURES, kernel, form=form, **options)
    report = check_layer(layer, jax.random.normal(key, shape), key=key, precisions=(), cost=False)
    assert report.ok, report
    assert {leaf.verdict for leaf in report.leaves} == {"ok"}


def test_the_audit_in_lower_precisions_finds_nothing(key):
    report = check_layer(conv(3, (3, 3), stride=2), jax.random.normal(key, (2, 5, 4, 2)), key=key, cost=False)
    assert {leaf.verdict for leaf in report.leaves} == {"ok"}, report


@pytest.mark.parametrize("name", ["conv, same", "transpose, same, doubled"])
@in_each_form
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_lower_precisions_keep_their_dtype_and_differ_by_rounding(name, form, dtype, tolerance, x64):
    """Roundings of inputs and outputs, 2^-24 or 2^-8 each, of sums of some tens of products."""
    layer, _, params, x, dy = at_random(name, form, dtype)
    actual, autodiff = by_both(layer, params, x, dy)
    assert {leaf.dtype for leaf in jax.tree.leaves((actual, autodiff))} == {jnp.dtype(dtype)}
    exact = by_hand(layer, *jax.tree.map(lambda a: a.astype(jnp.float64), (params, x, dy)))
    assert_leaves_close(actual, exact, tolerance)


@pytest.mark.parametrize("form", ["patches", "rows"])
@pytest.mark.parametrize("axis", [0, 1])
def test_autodiff_adds_up_the_inputs_gradient_in_float32(form, axis):
    """Of what nine outputs give to an input, one part is 1 and eight are 2^-9: in bfloat16 these would be lost."""
    along = lambda n: (n, 1) if axis == 0 else (1, n)  # noqa: E731
    layer, x = conv(1, along(9), padding="VALID", form=form), jnp.ones((1, *along(48), 1), jnp.bfloat16)
    params = {"w": jnp.ones((*along(9), 1, 1), jnp.bfloat16), "b": jnp.zeros(1, jnp.bfloat16)}
    dy = jnp.full(40, 2.0**-9, jnp.bfloat16).at[20].set(1).reshape(1, *along(40), 1)
    for _, _, dx in by_both(layer, params, x, dy):
        assert (dx.ravel()[20:29] == 1 + 2.0**-6).all()


def test_rows_multiply_what_the_inputs_have_and_nothing_padded_above_or_below():
    layer, x = conv(4, (3, 3), form="rows"), jnp.ones((2, 8, 6, 9))
    params, _ = layer.init(jax.random.key(0), x)
    program = str(jax.make_jaxpr(lambda p, x: layer.backward(p, x, apply(layer, p, (), x)))(params, x))
    products = [
        line.split(" = dot_general")[0].split(":")[-1] for line in program.splitlines() if " = dot_general" in line
    ]
    assert sorted(products) == ["f32[27,12]", "f32[96,12]", "f32[96,27]"]  # 96 = 2 · 8 · 6


@pytest.mark.parametrize(
    ("kernel", "channels", "options", "expected"),
    [
        ((3, 3), 16, {"groups": 16, "features": 16}, "rows"),  # depthwise
        ((5, 5), 16, {"groups": 16, "features": 16}, "patches"),  # with too many positions
        ((3, 3), 16, {"groups": 16, "features": 32}, "patches"),  # two features of each channel
        ((3, 3), 7, {"groups": 7, "features": 7}, "patches"),
        ((3, 3), 7, {}, "patches"),  # few channels, windows that overlap along the rows
        ((3, 3), 8, {}, "rows"),
        ((3, 3), 4, {"features": 7}, "patches"),
        ((3, 3), 4, {"features": 8}, "rows"),  # of an image more features
        ((3, 3), 5, {"features": 8}, "patches"),  # and of few features
        ((5, 3), 1, {"features": 8}, "rows"),
        ((6, 3), 1, {"features": 8}, "patches"),  # by a long kernel
        ((3, 3), 8, {"groups": 2}, "patches"),
        ((3, 3), 2, {"stride": 2}, "rows"),
        ((1, 3), 2, {}, "rows"),
        ((3, 3), 7, {"dilation": 2}, "patches"),
    ],
)
def test_the_default_form_is_by_the_channels_on_cpu_and_xla_elsewhere(kernel, channels, options, expected):
    x, options = jnp.ones((1, 7, 7, channels)), {"features": 4, **options}

    def text(form):
        layer = conv(kernel_size=kernel, form=form, **options)
        params, _ = layer.init(jax.random.key(0), x)
        return str(jax.make_jaxpr(lambda p, x: layer.backward(p, x, apply(layer, p, (), x)))(params, x))

    texts = {form: text(form) for form in FORMS}
    assert len({*texts.values()}) == 3 and [f for f in FORMS if "conv_general_dilated" in texts[f]] == ["xla"]
    assert text(None) == texts[expected]
    with traced_for("cuda"):
        assert text(None) == texts["xla"]


@pytest.mark.parametrize("form", ["patches", "rows"])
def test_the_inputs_gradient_costs_nothing_where_nobody_reads_it(form):
    """The first layer of a model: the compiled backward holds the one product for the weights."""
    layer = conv(3, (3, 3), bias=None, form=form)
    x = jnp.ones((2, 6, 6, 2))
    params, _ = layer.init(jax.random.key(0), x)
    dy = jnp.ones((2, 6, 6, 3))
    weights_only = jax.jit(lambda p, x, dy: layer.backward(p, x, dy)[0]).lower(params, x, dy).compile().as_text()
    both = jax.jit(lambda p, x, dy: layer.backward(p, x, dy)).lower(params, x, dy).compile().as_text()
    assert weights_only.count(" dot(") == 1 and both.count(" dot(") == 2


@in_each_form
def test_only_the_inputs_are_kept_for_the_backward(form):
    layer, x = conv(3, (3, 3), form=form), jnp.ones((1, 6, 6, 2))
    params, _ = layer.init(jax.random.key(0), x)
    assert layer.forward(params, (), x)[2] is x


# --- what a convolution is -------------------------------------------------------------------------------------------


@in_each_form
def test_causal_outputs_and_gradients_never_look_ahead(form):
    layer = conv(2, (3,), padding="CAUSAL", dilation=2, form=form)
    x = jax.random.normal(jax.random.key(1), (1, 9, 2))
    params, _ = layer.init(jax.random.key(0), x)
    seen = np.zeros((9, 9), bool)
    for t in range(9):
        dx = layer.backward(params, x, jnp.zeros((1, 9, 2)).at[0, t].set(1.0))[1]
        seen[t] = np.any(np.asarray(dx)[0] != 0, -1)
    expected = [[t - s in (0, 2, 4) for s in range(9)] for t in range(9)]
    np.testing.assert_array_equal(seen, expected)


@in_each_form
def test_shifted_inputs_give_shifted_outputs_and_gradients(form, x64):
    layer = conv(2, (3, 3), form=form)
    image = jnp.zeros((1, 9, 9, 2)).at[:, 3:6, 3:6].set(jax.random.normal(jax.random.key(1), (1, 3, 3, 2)))
    params, _ = layer.init(jax.random.key(0), image)
    moved = jnp.roll(image, (1, 2), (1, 2))
    y, dparams, dx = by_hand(layer, params, image, image)
    y_moved, dparams_moved, dx_moved = by_hand(layer, params, moved, moved)
    roll = lambda a: jnp.roll(a, (1, 2), (1, 2))  # noqa: E731
    assert_leaves_close((y_moved, dparams_moved, dx_moved), (roll(y), dparams, roll(dx)), 1e-13)


@in_each_form
def test_groups_do_not_see_each_other(form):
    layer = conv(4, (3, 3), groups=2, form=form)
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 6))
    params, _ = layer.init(jax.random.key(0), x)
    dx = layer.backward(params, x, jnp.zeros((1, 4, 4, 4)).at[..., :2].set(1.0))[1]
    assert np.all(np.asarray(dx)[..., 3:] == 0) and np.any(np.asarray(dx)[..., :3] != 0)


@pytest.mark.parametrize(
    ("options", "rest"),
    [
        ({}, 0),
        ({"stride": 2}, 0),
        ({"stride": 3, "padding": "VALID"}, 0),
        ({"padding": ((1, 0), (2, 1))}, 0),
        ({"stride": 4, "padding": "VALID"}, (3, 1)),
        ({"stride": 2, "groups": 2, "padding": ((1, 1), (1, 1))}, 1),
    ],
)
def test_the_transpose_is_the_transpose_of_the_convolution(options, rest, x64):
    """``Σ y · conv(x) = Σ conv_transpose(y) · x`` with one weight, its two last axes swapped; sizes return."""
    forward = conv(2, (3, 3), bias=None, **options)
    back = conv_transpose(4, (3, 3), bias=None, output_padding=rest, **options)
    x = jax.random.normal(jax.random.key(1), (2, 6, 12, 4))
    params, _ = forward.init(jax.random.key(0), x)
    y = apply(forward, params, (), x)
    v = jax.random.normal(jax.random.key(2), y.shape)
    pulled = apply(back, {"w": jnp.swapaxes(params["w"], -1, -2)}, (), v)
    assert pulled.shape == x.shape
    np.testing.assert_allclose((pulled * x).sum(), (v * y).sum(), rtol=1e-12)


@pytest.mark.parametrize("form", ["patches", "rows"])
def test_layers_run_under_vmap_and_scan(form, x64):
    layer, x = conv(3, (3, 3), form=form), jax.random.normal(jax.random.key(1), (4, 2, 5, 5, 3))
    params, _ = layer.init(jax.random.key(0), x[0])
    one_by_one = [by_hand(layer, params, xi, xi) for xi in x]

    def run(xi):
        y, _, residuals = layer.forward(params, (), xi)
        return y, *layer.backward(params, residuals, xi)

    for mapped in (jax.jit(jax.vmap(run))(x), jax.vmap(run)(x), jax.lax.scan(lambda c, xi: (c, run(xi)), 0, x)[1]):
        for i, expected in enumerate(one_by_one):
            assert_leaves_close(jax.tree.map(lambda a, i=i: a[i], mapped), expected, 1e-13)


def test_one_image_alone_is_as_in_the_batch(x64):
    layer, x = conv(3, (3, 3)), jax.random.normal(jax.random.key(1), (3, 5, 5, 2))
    params, _ = layer.init(jax.random.key(0), x)
    np.testing.assert_allclose(apply(layer, params, (), x[:1]), apply(layer, params, (), x)[:1], rtol=1e-13)


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch pads by a copy there
def test_torch_computes_the_same():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    double = {"dtype": torch.float64, "requires_grad": True}
    with jax.enable_x64(True):
        cases = [
            (
                conv(4, (2, 3), dilation=2, groups=2),
                (2, 5, 6, 4),
                functional.conv2d,
                {"padding": "same", "dilation": 2, "groups": 2},
            ),
            (conv(4, (4, 2)), (2, 5, 6, 3), functional.conv2d, {"padding": "same"}),
            (
                conv(4, (3, 3), stride=2, padding=((1, 1), (1, 1))),
                (2, 6, 5, 3),
                functional.conv2d,
                {"stride": 2, "padding": 1},
            ),
            (conv(8, (3,), groups=4, padding="VALID"), (2, 7, 4), functional.conv1d, {"groups": 4}),
            (
                conv_transpose(4, (3, 3), stride=2, padding="VALID"),
                (2, 4, 3, 2),
                functional.conv_transpose2d,
                {"stride": 2},
            ),
            (
                conv_transpose(4, (3, 3), stride=2, padding=((1, 0), (1, 0))),
                (2, 4, 3, 2),
                functional.conv_transpose2d,
                {"stride": 2, "padding": 1, "output_padding": 1},
            ),
            (
                conv_transpose(4, (2,), stride=3, dilation=2, padding="VALID"),
                (2, 4, 3),
                functional.conv_transpose1d,
                {"stride": 3, "dilation": 2},
            ),
            (
                conv(4, (3, 2, 2), stride=(1, 2, 2), dilation=(2, 1, 1), groups=2, padding=((2, 2), (0, 0), (1, 1))),
                (2, 4, 3, 5, 4),
                functional.conv3d,
                {"stride": (1, 2, 2), "dilation": (2, 1, 1), "groups": 2, "padding": (2, 0, 1)},
            ),
            *(
                (
                    conv_transpose(
                        4, (3,) * rank, stride=s, dilation=d, groups=g, padding=((p, p),) * rank, output_padding=q
                    ),
                    (2, *(4, 3, 2)[:rank], 4),
                    getattr(functional, f"conv_transpose{rank}d"),
                    {"stride": s, "dilation": d, "groups": g, "padding": p, "output_padding": q},
                )
                for rank, s, d, g, p, q in [
                    (1, 4, 1, 1, 0, 3),
                    (1, 1, 3, 4, 2, 2),
                    (2, 2, 1, 2, 1, 1),
                    (2, 3, 2, 4, 0, 2),
                    (2, 2, 1, 2, 2, 0),
                    (3, 2, 1, 2, 1, 1),
                ]
            ),
        ]
        for layer, shape, function, options in cases:
            x = np.random.default_rng(0).normal(size=shape)
            params, _ = layer.init(jax.random.key(0), jnp.asarray(x))
            axes = (-2, -1) if layer.name == "conv_transpose" else (-1, -2)
            w = np.moveaxis(np.asarray(params["w"]), axes, (0, 1))
            leaves = [torch.tensor(a.copy(), **double) for a in (np.moveaxis(x, -1, 1), w, np.asarray(params["b"]))]
            out = function(*leaves, **options)
            dy = np.random.default_rng(1).normal(size=tuple(out.shape))
            out.backward(torch.tensor(dy))
            channels_last = lambda a: np.moveaxis(np.asarray(a), 1, -1)  # noqa: E731
            y, dparams, dx = by_hand(layer, params, jnp.asarray(x), jnp.asarray(channels_last(dy)))
            expected = channels_last(out.detach()), channels_last(leaves[0].grad), leaves[2].grad.numpy()
            assert_leaves_close((y, dx, dparams["b"]), expected, 1e-12)
            assert_leaves_close(np.moveaxis(np.asarray(dparams["w"]), axes, (0, 1)), leaves[1].grad.numpy(), 1e-12)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 3), {}, r"conv: kernel_size = 3; expected a tuple, .*: \(3,\) for \(B, T, C\), \(3, 3\) for"),
        ((4, (3, 3, 3, 3)), {}, r"conv: kernel_size = \(3, 3, 3, 3\); expected a tuple"),
        ((4, (3, 0)), {}, r"conv: kernel_size = \(3, 0\); expected a whole number of at least 1, or 2 of them"),
        ((4, (3, 3)), {"stride": 0}, "conv: stride = 0; expected a whole number"),
        ((4, (3, 3)), {"stride": 1.5}, "conv: stride = 1.5; expected a whole number"),
        ((4, (3, 3)), {"dilation": (1, 2, 3)}, r"conv: dilation = \(1, 2, 3\); expected .* 2 of them"),
        ((4, (3, 3)), {"padding": "CAUSAL"}, r"padding = 'CAUSAL'; expected one of \('SAME', 'VALID'\), or 2"),
        ((4, (3, 3)), {"padding": "full"}, "conv: padding = 'full'; expected one of"),
        ((4, (3, 3)), {"padding": (1, 1)}, r"conv: padding = \(1, 1\); expected 2 pairs"),
        ((4, (3, 3)), {"padding": 1}, r"conv: padding = 1; expected 2 pairs"),
        ((4, (3,)), {"padding": ((-1, 0),)}, "expected 1 pairs .* of at least 0"),
        ((4, (3, 3)), {"groups": 3}, "conv: groups = 3 with features = 4; expected a divisor of the features"),
        ((0, (3, 3)), {}, "conv: features = 0; expected at least 1"),
        ((4, (3, 3)), {"form": "fft"}, "conv: form = 'fft'; expected 'patches', 'rows', 'xla' or None"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        conv(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "conv_transpose: groups = 3 with features = 4; expected a divisor of the features"),
        ({"output_padding": -1}, "conv_transpose: output_padding = -1; expected a whole number of at least 0, or 2"),
        ({"output_padding": (1, 0, 0)}, r"output_padding = \(1, 0, 0\); expected a whole number"),
        ({"output_padding": 1}, "output_padding = 1 with padding 'SAME'.* expected 0, or padding VALID or pairs"),
        (
            {"output_padding": (2, 0), "stride": 2, "padding": "VALID"},
            r"output_padding = \(2, 0\) with stride = 2 and dilation = 1; expected less than the larger",
        ),
    ],
)
def test_arguments_of_a_transpose_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        conv_transpose(4, (3, 3), **options)


@pytest.mark.parametrize(
    ("layer", "shape", "dtype", "message"),
    [
        (conv(4, (3, 3)), (2, 5, 3), "float32", r"expected \(B, H, W, C\) for .* \(3, 3\), got shape \(2, 5, 3\)"),
        (conv(4, (3,)), (2, 5, 5, 3), "float32", r"expected \(B, T, C\)"),
        (conv(4, (3, 3, 3)), (2, 5, 5, 3), "float32", r"expected \(B, D, H, W, C\)"),
        (conv_transpose(4, (3,), groups=4), (2, 5, 6), "float32", "expected channels in 4 groups of one size, got 6"),
        (conv(4, (3, 3)), (2, 5, 5, 3), "uint8", "expected floating inputs, got uint8"),
        (conv(4, (3, 3), groups=2), (2, 5, 5, 3), "float32", "expected channels in 2 groups of one size, got 3"),
        (
            conv(4, (7, 3), padding="VALID"),
            (2, 5, 5, 3),
            "float32",
            r"over \(7, 3\) do not fit into inputs of \(5, 5\)",
        ),
        (conv(4, (3, 3)), (2, 0, 5, 3), "float32", "no output is left"),
        (conv_transpose(4, (2, 2), padding=((1, 1), (0, 0))), (2, 1, 5, 3), "float32", "leave no output"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_init(layer, shape, dtype, message):
    with pytest.raises(LayerError, match=message):
        layer.init(jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize("make", [conv, conv_transpose])
def test_forward_refuses_other_channels_and_dtypes(make):
    layer = make(4, (3, 3))
    params, _ = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 3)))
    with pytest.raises(LayerError, match="expected 3 channels, got 2"):
        apply(layer, params, (), jnp.ones((1, 5, 5, 2)))
    with pytest.raises(LayerError, match="expected float32 inputs like its parameters, got bfloat16"):
        apply(layer, params, (), jnp.ones((1, 5, 5, 3), jnp.bfloat16))


def test_weights_are_scaled_by_what_one_output_sees():
    params, _ = conv(64, (3, 3), groups=8).init(jax.random.key(0), jnp.ones((1, 5, 5, 128)))
    assert params["w"].shape == (3, 3, 16, 64)
    np.testing.assert_allclose(params["w"].std(), np.sqrt(2 / (9 * 16)), rtol=0.03)  # 9,216 draws
    params, _ = conv_transpose(64, (3, 3), groups=8).init(jax.random.key(0), jnp.ones((1, 5, 5, 128)))
    assert params["w"].shape == (3, 3, 128, 8)
    np.testing.assert_allclose(params["w"].std(), np.sqrt(2 / (9 * 16)), rtol=0.03)


def test_the_weights_of_a_grouped_transpose_are_drawn_group_by_group():
    numbered = lambda key, shape, dtype: jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)  # noqa: E731
    like = jax.ShapeDtypeStruct((1, 5, 4), jnp.float32)
    params, _ = conv_transpose(6, (2,), groups=2, weights=numbered, bias=None).init(jax.random.key(0), like)
    drawn = np.arange(2 * 2 * 6).reshape(2, 2, 6)  # (*kernel, C/groups, features)
    for group in range(2):
        np.testing.assert_array_equal(params["w"][:, 2 * group :][:, :2], drawn[..., 3 * group :][..., :3])


def test_sizes_under_every_padding_are_those_of_the_formulas():
    for n, k, s, d in itertools.product((5, 8), (1, 2, 3), (1, 2, 3), (1, 2)):
        x, extent = jax.ShapeDtypeStruct((1, n, 2), jnp.float32), (k - 1) * d + 1
        for padding, m in (("SAME", -(-n // s)), ("VALID", (n - extent) // s + 1), ("CAUSAL", (n - 1) // s + 1)):
            layer = conv(1, (k,), stride=s, dilation=d, padding=padding)
            y = jax.eval_shape(lambda x, c=layer: apply(c, c.init(jax.random.key(0), x)[0], (), x), x)
            assert y.shape == (1, m, 1)
