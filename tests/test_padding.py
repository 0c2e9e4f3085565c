"""Padding: what is copied against numpy.pad, its gradient against loops, torch, crops, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.gradcheck import check_layer
from fnet.layers.children import apply
from fnet.layers.combinators import serial
from fnet.layers.convolution import conv
from fnet.layers.padding import pad
from fnet.types import LayerError
from tests.oracles import assert_leaves_close, by_both

NAMES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # in NumPy


def numpy_pad(x, dy, widths, mode, value=0.0):
    """Outputs, and the inputs' gradient, entry by entry from the number of the input that each output is."""
    crops = [
        slice(max(0, -before), n - max(0, -after)) for n, (before, after) in zip(x.shape[1:-1], widths, strict=True)
    ]
    around = ((0, 0), *((max(0, before), max(0, after)) for before, after in widths), (0, 0))
    in_numpy: Any = np.pad  # whose types know no mode by its variable
    options = lambda fill: {"mode": NAMES[mode]} if mode in NAMES else {"constant_values": fill}  # noqa: E731
    take = lambda a, fill: in_numpy(a[:, *crops], around, **options(fill))  # noqa: E731
    dx = np.zeros(x.size)
    for source, d in zip(take(np.arange(x.size).reshape(x.shape), -1).ravel(), dy.ravel(), strict=True):
        if source >= 0:
            dx[source] += d
    return take(x, value), dx.reshape(x.shape)


CASES = {
    "constant": ((2, 3, 2), ((1, 2),), {"value": -1.5}),
    "constant, cropped": ((1, 4, 3, 2), ((-1, 2), (1, -2)), {}),
    "reflect": ((2, 4, 3, 2), ((3, 1), (0, 2)), {"mode": "reflect"}),
    "replicate": ((2, 1, 3, 2), ((2, 3), (0, 1)), {"mode": "replicate"}),
    "circular": ((1, 3, 2, 2), ((3, 1), (0, 2)), {"mode": "circular"}),
    "reflect, volumes": ((1, 2, 3, 2, 1), ((1, 1), (2, 0), (0, 1)), {"mode": "reflect"}),
    "circular, four axes": ((1, 2, 1, 2, 1, 2), ((1, 0), (1, 1), (0, 0), (0, 1)), {"mode": "circular"}),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_numpy_and_autodiff(name, x64):
    shape, widths, options = CASES[name]
    layer, rng = pad(widths, **options), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape))
    dy = jnp.asarray(rng.normal(size=jax.eval_shape(lambda x: apply(layer, (), (), x), x).shape))
    actual, autodiff = by_both(layer, x, dy)
    expected = numpy_pad(
        np.asarray(x), np.asarray(dy), widths, options.get("mode", "constant"), options.get("value", 0.0)
    )
    assert_leaves_close(actual, expected, 1e-14)
    assert_leaves_close(actual, autodiff, 1e-14)


@pytest.mark.parametrize("name", ["constant, cropped", "reflect", "replicate", "circular"])
def test_the_audit_finds_nothing(name, key):
    shape, widths, options = CASES[name]
    report = check_layer(pad(widths, **options), jax.random.normal(key, shape), key=key, precisions=(), cost=False)
    assert {leaf.verdict for leaf in report.leaves} == {"ok"}, report


def test_what_copies_give_to_an_entry_is_added_up_in_float32():
    """Of three parts one is 1 and two are 2^-8, each of which would be lost in bfloat16."""
    layer, x = pad(((1, 1),), mode="reflect"), jnp.ones((1, 3, 1), jnp.bfloat16)
    dy = jnp.asarray([2.0**-8, 0, 1, 0, 2.0**-8], jnp.bfloat16).reshape(1, 5, 1)
    for y, dx in by_both(layer, x, dy):
        assert y.dtype == dx.dtype == jnp.bfloat16
        assert dx[0, 1, 0] == 1 + 2.0**-7


def test_a_convolution_in_circles_moves_with_its_inputs(x64):
    model = serial(pad(((1, 1), (1, 1)), mode="circular"), conv(2, (3, 3), padding="VALID"))
    x = jax.random.normal(jax.random.key(1), (1, 4, 5, 2))
    params, state = model.init(jax.random.key(0), x)
    roll = lambda a: jnp.roll(a, (1, 2), (1, 2))  # noqa: E731
    np.testing.assert_allclose(apply(model, params, state, roll(x)), roll(apply(model, params, state, x)), rtol=1e-12)


def test_torch_computes_the_same():
    torch = pytest.importorskip("torch")
    with jax.enable_x64(True):
        for shape, widths, options in CASES.values():
            mode = options.get("mode", "constant")
            if len(widths) > 3 and mode != "constant":  # which torch has not
                continue
            x = np.random.default_rng(0).normal(size=shape)
            leaf = torch.tensor(np.moveaxis(x, -1, 1).copy(), requires_grad=True)
            value = options.get("value", 0.0) if mode == "constant" else None
            out = torch.nn.functional.pad(leaf, [w for pair in reversed(widths) for w in pair], mode, value)
            dy = np.random.default_rng(1).normal(size=tuple(out.shape))
            out.backward(torch.tensor(dy))
            assert leaf.grad is not None
            actual, _ = by_both(pad(widths, **options), jnp.asarray(x), jnp.asarray(np.moveaxis(dy, 1, -1)))
            expected = np.moveaxis(out.detach().numpy(), 1, -1), np.moveaxis(leaf.grad.numpy(), 1, -1)
            assert_leaves_close(actual, expected, 1e-13)


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        (1, {}, r"pad: widths = 1; expected a pair \(before, after\) of whole numbers for each spatial axis"),
        ((), {}, r"pad: widths = \(\); expected a pair"),
        ((1, 1), {}, r"pad: widths = \(1, 1\); expected a pair"),
        (((1, 0.5),), {}, r"pad: widths = \(\(1, 0.5\),\); expected a pair"),
        (((1, -1),), {"mode": "reflect"}, "of at least 0, unless mode is 'constant'"),
        (
            ((1, 1),),
            {"mode": "edge"},
            r"pad: mode = 'edge'; expected one of \('constant', 'reflect', 'replicate', 'cir",
        ),
        (((1, 1),), {"mode": "circular", "value": 1.0}, "pad: value = 1.0 with mode 'circular', which copies entries"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(widths, options, message):
    with pytest.raises(ValueError, match=message):
        pad(widths, **options)


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (
            pad(((1, 1),)),
            jnp.ones((2, 3, 3, 1)),
            r"expected a batch axis, 1 to pad and channels, got shape \(2, 3, 3, 1\)",
        ),
        (pad(((1, 1),)), jnp.ones((2, 3, 1), jnp.int32), "expected floating inputs, got int32"),
        (
            pad(((-2, -1),)),
            jnp.ones((2, 3, 1)),
            r"expected at least 4 entries for widths \(-2, -1\) in mode 'constant'",
        ),
        (
            pad(((0, 3),), mode="reflect"),
            jnp.ones((2, 3, 1)),
            r"at least 4 entries .* 'reflect', got spatial axes of \(3,\)",
        ),
        (pad(((4, 0),), mode="circular"), jnp.ones((2, 3, 1)), "at least 4 entries .* in mode 'circular'"),
        (pad(((1, 0),), mode="replicate"), jnp.ones((2, 0, 1)), "at least 1 entries .* in mode 'replicate'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(layer, x, message):
    for use in (lambda: layer.init(jax.random.key(0), x), lambda: apply(layer, (), (), x)):
        with pytest.raises(LayerError, match=message):
            use()
