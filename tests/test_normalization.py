"""Normalization: forward and backward against NumPy and torch, running statistics, masks, precision and invariants."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.gradcheck import check_layer
from fnet.layers import dense, serial
from fnet.layers.children import init
from fnet.layers.initializers import normal
from fnet.layers.normalization import (
    batch_norm,
    group_norm,
    l2_normalize,
    layer_norm,
    local_response_norm,
    rms_norm,
)
from fnet.types import LayerError
from tests.oracles import assert_leaves_close, numerical_gradient

DRAWN = {"scale": normal(1.0), "bias": normal(1.0)}
MASK = np.array([[True, True, False], [True, False, False], [False, False, False], [True, True, True]])  # (B, T)


def numpy_affine(p, normalised):
    return p.get("scale", 1.0) * normalised + p.get("bias", 0.0)


def numpy_batch_norm(p, state, x, train, eps=1e-5, mask=None):
    """The formula over the counted examples and positions alone; 0 at the others."""
    mask = np.ones(x.shape[:-1], bool) if mask is None else mask
    counted = x[mask]
    mean = counted.mean(0) if train else state["mean"]
    var = ((counted - mean) ** 2).mean(0) if train else state["var"]
    y = np.zeros_like(x)
    y[mask] = numpy_affine(p, (counted - mean) / np.sqrt(var + eps))
    return y


def numpy_layer_norm(p, state, x, train, eps=1e-5):
    return numpy_affine(p, (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps))


def numpy_rms_norm(p, state, x, train, eps=1e-6):
    return numpy_affine(p, x / np.sqrt((x**2).mean(-1, keepdims=True) + eps))


def numpy_group_norm(groups):
    def oracle(p, state, x, train, eps=1e-5):
        normalised = np.zeros_like(x)
        for example in range(x.shape[0]):
            for channels in np.split(np.arange(x.shape[-1]), groups):
                part = x[example][..., channels]
                normalised[example][..., channels] = (part - part.mean()) / np.sqrt(part.var() + eps)
        return numpy_affine(p, normalised)

    return oracle


def numpy_local_response_norm(size, alpha, beta, k):
    def oracle(p, state, x, train):
        y = np.zeros_like(x)
        for c in range(x.shape[-1]):
            seen = x[..., max(0, c - size // 2) : c + (size - 1) // 2 + 1]
            y[..., c] = x[..., c] / (k + alpha / size * (seen**2).sum(-1)) ** beta
        return y

    return oracle


def numpy_l2_normalize(axis, eps=1e-12):
    def oracle(p, state, x, train):
        return x / np.maximum(np.sqrt((x * x).sum(axis, keepdims=True)), eps)

    return oracle


# name: layer, shape of x, mask, the forward in NumPy from the formula
LAYERS = {
    "batch_norm": (batch_norm(**DRAWN), (5, 3), None, numpy_batch_norm),
    "batch_norm of images": (batch_norm(**DRAWN), (2, 2, 3, 2), None, numpy_batch_norm),
    "batch_norm without parameters": (batch_norm(scale=None, bias=None), (5, 3), None, numpy_batch_norm),
    "batch_norm, masked": (
        batch_norm(**DRAWN),
        (4, 3, 2),
        MASK,
        lambda p, s, x, train: numpy_batch_norm(p, s, x, train, mask=MASK),
    ),
    "batch_norm, masked examples of images": (
        batch_norm(scale=normal(1.0), bias=None),
        (4, 2, 2, 2),
        MASK[:, 0],
        lambda p, s, x, train: numpy_batch_norm(
            p, s, x, train, mask=np.broadcast_to(MASK[:, 0, None, None], (4, 2, 2))
        ),
    ),
    "layer_norm": (layer_norm(**DRAWN), (2, 3, 4), None, numpy_layer_norm),
    "layer_norm without scale": (layer_norm(scale=None, bias=normal(1.0)), (3, 4), None, numpy_layer_norm),
    "rms_norm": (rms_norm(scale=normal(1.0)), (2, 3, 4), None, numpy_rms_norm),
    "rms_norm, no scale, eps 0.5": (
        rms_norm(scale=None, eps=0.5),
        (3, 4),
        None,
        lambda p, s, x, train: numpy_rms_norm(p, s, x, train, 0.5),
    ),
    "group_norm of images": (group_norm(2, **DRAWN), (2, 2, 3, 4), None, numpy_group_norm(2)),
    "group_norm of sequences": (group_norm(3, **DRAWN), (2, 3, 6), None, numpy_group_norm(3)),
    "group_norm of vectors": (group_norm(2, **DRAWN), (2, 6), None, numpy_group_norm(2)),
    "group_norm, instances": (group_norm(3, **DRAWN), (2, 4, 3), None, numpy_group_norm(3)),
    "l2_normalize": (l2_normalize(), (2, 3, 4), None, numpy_l2_normalize(-1)),
    "local_response_norm": (
        local_response_norm(3, alpha=2.0, k=0.5),
        (2, 3, 5),
        None,
        numpy_local_response_norm(3, 2.0, 0.75, 0.5),
    ),
    "local_response_norm, even": (
        local_response_norm(4, alpha=2.0, beta=1.5),
        (2, 5),
        None,
        numpy_local_response_norm(4, 2.0, 1.5, 1.0),
    ),
    "l2_normalize along time, with eps among the norms": (
        l2_normalize(1, eps=3.0),
        (2, 3, 4),
        None,
        numpy_l2_normalize(1, 3.0),
    ),
}
CASES = [(name, train) for name in LAYERS for train in (True, False) if train or name.startswith("batch_norm")]
every_case = pytest.mark.parametrize(
    ("name", "train"), CASES, ids=[f"{n}, {'train' if t else 'eval'}" for n, t in CASES]
)


def drawn(name, dtype=jnp.float64):
    """The layer with random parameters, running statistics, inputs and cotangent."""
    layer, shape, mask, oracle = LAYERS[name]
    rng = np.random.default_rng(3)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    x = jnp.asarray(rng.normal(0.5, 2.0, shape), dtype)
    params, state = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))
    params, state = jax.tree.map(draw, params), jax.tree.map(draw, state)
    if state:
        state["var"] = jnp.asarray(rng.uniform(1, 2, shape[-1:]), state["var"].dtype)
    return layer, oracle, params, state, x if mask is None else (x, jnp.asarray(mask)), draw(x)


@partial(jax.jit, static_argnames=("layer", "train"))
def by_hand(layer, params, state, x, dy, train=True):
    """Outputs, new state, and the gradients by hand; of masked inputs the outputs without the mask that comes out."""
    y, new_state, residuals = layer.forward(params, state, x, train=train)
    if isinstance(x, tuple):
        y, _ = y
        return y, new_state, layer.backward(params, residuals, (dy, None))
    return y, new_state, layer.backward(params, residuals, dy)


@partial(jax.jit, static_argnames=("layer", "train"))
def by_autodiff(layer, params, state, x, dy, train=True):
    values, *mask = x if isinstance(x, tuple) else (x,)

    def f(params, values):
        y = layer.forward(params, state, (values, *mask) if mask else values, train=train)[0]
        return y[0] if mask else y

    dparams, dx = jax.vjp(f, params, values)[1](dy)
    return dparams, (dx, None) if mask else dx


@every_case
def test_forward_and_backward_equal_the_formula_in_numpy_and_autodiff(name, train, x64):
    layer, oracle, params, state, x, dy = drawn(name)
    p, s = jax.tree.map(np.asarray, (params, state))
    values = np.asarray(x[0] if isinstance(x, tuple) else x)
    y, new_state, (dparams, dx) = by_hand(layer, params, state, x, dy, train)
    np.testing.assert_allclose(y, oracle(p, s, values, train), rtol=1e-12, atol=1e-13)
    if not train:
        jax.tree.map(np.testing.assert_array_equal, new_state, state)
    assert_leaves_close((dparams, dx), by_autodiff(layer, params, state, x, dy, train), 1e-12)
    dx = dx[0] if isinstance(dx, tuple) else dx
    slope = numerical_gradient(lambda v: (oracle(p, s, v, train) * dy).sum(), values)
    np.testing.assert_allclose(dx, slope, rtol=1e-6, atol=1e-7)
    for leaf in params:
        slope = numerical_gradient(lambda v, leaf=leaf: (oracle({**p, leaf: v}, s, values, train) * dy).sum(), p[leaf])
        np.testing.assert_allclose(dparams[leaf], slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["batch_norm, masked", "layer_norm", "rms_norm", "group_norm of images", "l2_normalize"]
)
def test_the_audit_finds_nothing_in_train_and_eval_mode(name, key):
    layer, _, _, state, x, _ = drawn(name, jnp.float32)
    report = check_layer(layer, x, key=key, state=state, precisions=(), cost=False)
    assert report.ok and all(leaf.verdict == "ok" for leaf in report.leaves), report


def test_the_whole_audit_of_layer_norm_finds_nothing_in_float32_either(key):
    layer, _, _, _, x, _ = drawn("layer_norm", jnp.float32)
    report = check_layer(layer, x, key=key)
    assert report.ok, report


def test_a_backward_that_forgets_that_the_variance_depends_on_x_is_found(key):
    right = layer_norm()

    def backward(params, residuals, dy):
        dx = residuals[1] * dy
        return right.backward(params, residuals, dy)[0], dx - dx.mean(-1, keepdims=True)

    x = jax.random.normal(key, (2, 3, 4))
    report = check_layer(right._replace(backward=backward), x, key=key, precisions=(), cost=False)
    assert [leaf.path for leaf in report.leaves if leaf.verdict == "wrong"] == ["inputs"]


@pytest.mark.parametrize(("x", "slope"), [(0.0, 2.0), (0.3, 2.0), (0.5, 0.0), (0.7, 0.0)])
def test_a_vector_shorter_than_eps_is_divided_by_it_and_at_the_kink_it_counts_as_longer(x, slope, x64):
    layer, x, dy = l2_normalize(eps=0.5), jnp.array([[x, 0.0]]), jnp.ones((1, 2))
    _, _, (_, by_hand_dx) = by_hand(layer, (), (), x, dy)
    _, by_autodiff_dx = by_autodiff(layer, (), (), x, dy)
    for dx in (by_hand_dx, by_autodiff_dx):  # along itself, and across: 1 / max(‖x‖, ε)
        np.testing.assert_allclose(dx[0], [slope, 1 / max(float(x[0, 0]), 0.5)], rtol=1e-15, atol=1e-15)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name", ["batch_norm", "batch_norm, masked", "layer_norm", "rms_norm", "group_norm of images", "l2_normalize"]
)
def test_low_precision_keeps_dtypes_and_is_the_float32_result_up_to_its_rounding(name, train):
    layer, _, params, state, x, dy = drawn(name, jnp.float32)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, (params, x, dy))
    y, new_state, grads = by_hand(layer, low[0], state, *low[1:], train)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, grads))} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(new_state)} <= {jnp.dtype(jnp.float32)}
    up = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, low)
    y32, _, grads32 = by_hand(layer, up[0], state, *up[1:], train)
    # y is rounded once (2^-9 of itself); of a gradient the entries of x̂ are, and the result
    np.testing.assert_allclose(np.float32(y), y32, rtol=2**-8, atol=1e-6)
    assert_leaves_close(jax.tree.map(np.float32, grads), grads32, 0.04)


@pytest.mark.parametrize(
    ("layer", "oracle"),
    [(batch_norm(), numpy_batch_norm), (layer_norm(), numpy_layer_norm), (group_norm(2), numpy_group_norm(2))],
    ids=["batch_norm", "layer_norm", "group_norm"],
)
def test_a_large_mean_costs_no_digits_of_the_variance(layer, oracle, key):
    x = 1e4 + jax.random.normal(key, (64, 8, 16))
    params, state = layer.init(key, x)
    y, new_state, _ = layer.forward(params, state, x, train=True)
    wide = np.asarray(x, np.float64)
    # the mean is off by some ulps of 1e4 (2^-10 each) at most, and so is y; the squares of x have ulps of 8
    np.testing.assert_allclose(y, oracle({}, state, wide, True), atol=4 * 2**-10)
    if state:
        np.testing.assert_allclose(new_state["var"], 0.99 + 0.01 * wide.var((0, 1)), rtol=1e-5)
    fast = (x * x).mean((0, 1)) - x.mean((0, 1)) ** 2
    assert np.abs(np.asarray(fast) - wide.var((0, 1))).max() > 1


@pytest.mark.parametrize("layer", [batch_norm(), layer_norm(), rms_norm(), group_norm(2)], ids=lambda x: x.name)
def test_constant_inputs_and_a_batch_of_one_are_finite(layer):
    for x in (jnp.full((3, 4), 7.0), jnp.zeros((1, 4))):
        params, state = layer.init(jax.random.key(0), x)
        everything = by_hand(layer, params, state, x, x + 1)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(everything))


# --- running statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_running_statistics_are_the_named_averages_of_the_counted(variance, mask, x64):
    layer = batch_norm(decay=0.7, variance=variance)
    params, state = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((4, 3, 2), jnp.float64))
    mean, var = np.zeros(2), np.ones(2)
    for x in np.random.default_rng(0).normal(1.0, 3.0, (4, 4, 3, 2)):
        _, state, _ = by_hand(layer, params, state, x if mask is None else (x, mask), x)
        counted = x.reshape(-1, 2) if mask is None else x[mask]
        mean = 0.7 * mean + 0.3 * counted.mean(0)
        var = 0.7 * var + 0.3 * counted.var(0, ddof=int(variance == "unbiased"))
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-13)
    np.testing.assert_allclose(state["var"], var, rtol=1e-13)


def test_keras_variant_is_decay_099_and_eps_1e_3(x64):
    # Keras 3, batch_normalization.py: moving · momentum + batch · (1 − momentum), momentum 0.99, ε 1e-3, biased
    layer = batch_norm(eps=1e-3)
    x = np.random.default_rng(0).normal(0, 0.05, (6, 2))
    params, state = layer.init(jax.random.key(0), jnp.asarray(x))
    y, state, _ = layer.forward(params, state, jnp.asarray(x), train=True)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3), rtol=1e-12)
    np.testing.assert_allclose(state["var"], 0.99 * 1.0 + (1 - 0.99) * x.var(0), rtol=1e-12)
    evaluated, _, _ = layer.forward(params, state, jnp.asarray(x), train=False)
    np.testing.assert_allclose(evaluated, (x - 0.01 * x.mean(0)) / np.sqrt(state["var"] + 1e-3), rtol=1e-12)


def test_state_under_scan_is_that_of_the_loop_and_vmap_sweeps_decay_and_eps(key):
    xs = jax.random.normal(key, (5, 6, 3))
    params, first = batch_norm().init(key, xs[0])

    def run(decay, eps):
        layer = batch_norm(decay=decay, eps=eps)

        def step(state, x):
            y, state, _ = layer.forward(params, state, x, train=True)
            return state, y

        return jax.lax.scan(step, first, xs)

    states, ys = jax.jit(jax.vmap(run))(jnp.array([0.5, 0.9]), jnp.array([1e-5, 0.1]))
    for i, (decay, eps) in enumerate([(0.5, 1e-5), (0.9, 0.1)]):
        state = first
        layer = batch_norm(decay=decay, eps=eps)
        for x, y in zip(xs, ys[i], strict=True):
            expected, state, _ = by_hand(layer, params, state, x, x)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-7), states, state)


def test_the_new_state_carries_no_gradient(key):
    layer = batch_norm()
    x = jax.random.normal(key, (4, 3))
    params, state = layer.init(key, x)

    def total(x, state):
        return sum(leaf.sum() for leaf in layer.forward(params, state, x, train=True)[1].values())

    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(total, (0, 1))(x, state)))


def test_in_inference_each_example_stands_alone_and_in_training_it_does_not(key):
    layer, _, params, state, x, _ = drawn("batch_norm", jnp.float32)
    x = jnp.asarray(x)
    other = x.at[1:].add(1.0)
    first = [layer.forward(params, state, v, train=train)[0][0] for train in (False, True) for v in (x, other)]
    np.testing.assert_array_equal(first[0], first[1])
    assert np.abs(first[2] - first[3]).max() > 0.1


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_masked_positions_influence_nothing_even_as_nan_and_get_zero(train):
    layer, _, params, state, (x, mask), dy = drawn("batch_norm, masked", jnp.float32)
    nan, huge = (jnp.where(mask[..., None], v, bad) for v, bad in ((x, jnp.nan), (x, jnp.inf)))
    expected = by_hand(layer, params, state, (x, mask), dy, train)
    (y, _, (_, (dx, dmask))), masked = expected, ~np.asarray(mask)
    assert dmask is None and not np.asarray(y)[masked].any() and not np.asarray(dx)[masked].any()
    for bad in (nan, huge):
        found = by_hand(layer, params, state, (bad, mask), jnp.where(mask[..., None], dy, jnp.nan), train)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert_leaves_close(by_autodiff(layer, params, state, (bad, mask), dy, train), expected[2], 1e-5)


def test_a_masked_batch_is_the_batch_of_its_counted_positions(x64):
    layer, _, params, state, (x, mask), dy = drawn("batch_norm, masked")
    y, new_state, (dparams, (dx, _)) = by_hand(layer, params, state, (x, mask), dy)
    short = by_hand(layer, params, state, x[mask], dy[mask])  # (N, C)
    assert_leaves_close((y[mask], new_state, (dparams, dx[mask])), short, 1e-12)


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
def test_a_batch_in_which_nothing_counts_leaves_the_state_and_has_zero_gradients(variance):
    layer = batch_norm(variance=variance)
    x = jnp.ones((2, 3))
    params, state = layer.init(jax.random.key(0), x)
    state = {"mean": state["mean"] + 0.3, "var": state["var"] + 0.7}
    y, new_state, grads = by_hand(layer, params, state, (x, jnp.zeros(2, bool)), x)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)
    assert not any(leaf.any() for leaf in jax.tree.leaves((y, grads)))


# --- invariants ------------------------------------------------------------------------------------------------------


def test_gradients_are_orthogonal_to_what_normalization_removes(x64):
    """With ε = 0, ``x̂`` does not change along the shift 1 and the stretch x, so dx has no component along either."""
    x, dy = np.random.default_rng(0).normal(size=(2, 6, 3, 4))
    for layer, axes in ((batch_norm(eps=0.0), (0, 1)), (layer_norm(eps=0.0), 2), (group_norm(1, eps=0.0), (1, 2))):
        params, state = init(layer, jax.random.key(0), x)
        dx = np.asarray(by_hand(layer, params, state, x, dy)[2][1])
        assert np.abs(dx.sum(axes)).max() < 1e-13 and np.abs((dx * x).sum(axes)).max() < 1e-13
    dx = np.asarray(by_hand(rms_norm(eps=0.0, scale=None), {}, (), x, dy)[2][1])
    assert np.abs((dx * x).sum(2)).max() < 1e-13 and np.abs(dx.sum(2)).max() > 0.1


def test_batch_norm_commutes_with_a_permutation_of_examples_and_positions(x64):
    layer, _, params, state, x, dy = drawn("batch_norm of images")
    order = np.random.default_rng(0).permutation(2 * 2 * 3)

    def permuted(v):
        return v.reshape(-1, 2)[order].reshape(v.shape)

    y, new_state, (dparams, dx) = by_hand(layer, params, state, x, dy)
    turned = by_hand(layer, params, state, permuted(x), permuted(dy))
    assert_leaves_close(turned, (permuted(y), new_state, (dparams, permuted(dx))), 1e-12)


# --- against torch ---------------------------------------------------------------------------------------------------


def test_running_statistics_outputs_and_gradients_are_those_of_torch_batch_norm(x64):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    ours = batch_norm(decay=0.9, variance="unbiased", **DRAWN)
    xs = np.random.default_rng(0).normal(2.0, 3.0, (4, 5, 2, 3, 3))  # steps, B, H, W, C
    params, state = ours.init(jax.random.key(0), jnp.asarray(xs[0]))
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(params["scale"])))
        theirs.bias.copy_(torch.tensor(np.asarray(params["bias"])))
    for i, x in enumerate(xs):
        train = i < 3
        theirs.train(train)
        theirs.zero_grad()
        their_x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
        their_y = theirs(their_x)
        dy = np.random.default_rng(i).normal(size=x.shape)
        their_y.backward(torch.tensor(dy.transpose(0, 3, 1, 2)))
        y, state, residuals = ours.forward(params, state, jnp.asarray(x), train=train)
        dparams, dx = ours.backward(params, residuals, jnp.asarray(dy))
        pairs = [
            (y, their_y.detach().permute(0, 2, 3, 1)),
            (state["mean"], theirs.running_mean),
            (state["var"], theirs.running_var),
            (dx, their_x.grad.permute(0, 2, 3, 1)),
            (dparams["scale"], theirs.weight.grad),
            (dparams["bias"], theirs.bias.grad),
        ]
        for a, b in pairs:
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-12, 2.0])
def test_unit_vectors_and_their_gradients_are_those_of_torch_at_0_too(eps, x64):
    torch = pytest.importorskip("torch")
    x, dy = np.random.default_rng(0).normal(size=(2, 4, 3, 2))
    x[1] = 0
    theirs = torch.tensor(x, requires_grad=True)
    outputs = torch.nn.functional.normalize(theirs, dim=1, eps=eps)
    outputs.backward(torch.tensor(dy))
    y, _, (_, dx) = by_hand(l2_normalize(1, eps=eps), (), (), jnp.asarray(x), jnp.asarray(dy))
    np.testing.assert_allclose(y, outputs.detach(), rtol=1e-14)
    np.testing.assert_allclose(dx, theirs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "group_norm", "instance norm"])
def test_outputs_and_gradients_are_those_of_torch(kind, x64):
    torch = pytest.importorskip("torch")
    theirs, ours = {
        "layer_norm": lambda: (torch.nn.LayerNorm(4), layer_norm(**DRAWN)),
        "rms_norm": lambda: (torch.nn.RMSNorm(4, eps=1e-6), rms_norm(scale=normal(1.0))),
        "group_norm": lambda: (torch.nn.GroupNorm(2, 4), group_norm(2, **DRAWN)),
        "instance norm": lambda: (torch.nn.InstanceNorm1d(4), group_norm(4, scale=None, bias=None)),
    }[kind]()
    theirs = theirs.double()
    x, dy = np.random.default_rng(0).normal(1.0, 2.0, (2, 3, 5, 4))  # (B, T, C)
    params, _ = ours.init(jax.random.key(0), jnp.asarray(x))
    with torch.no_grad():
        for name, leaf in params.items():
            getattr(theirs, {"scale": "weight"}.get(name, name)).copy_(torch.tensor(np.asarray(leaf)))
    turn = (0, 2, 1) if kind in ("group_norm", "instance norm") else (0, 1, 2)  # torch's channels come second
    their_x = torch.tensor(x.transpose(turn), requires_grad=True)
    their_y = theirs(their_x)
    their_y.backward(torch.tensor(dy.transpose(turn)))
    y, _, residuals = ours.forward(params, (), jnp.asarray(x))
    dparams, dx = ours.backward(params, residuals, jnp.asarray(dy))
    np.testing.assert_allclose(y, their_y.detach().permute(turn), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(dx, their_x.grad.permute(turn), rtol=1e-10, atol=1e-12)
    for name, leaf in dparams.items():
        np.testing.assert_allclose(leaf, getattr(theirs, {"scale": "weight"}.get(name, name)).grad, rtol=1e-10)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (batch_norm(), jnp.zeros((2, 3)), "norm: expected 4 features, got 3"),
        (batch_norm(), jnp.zeros(4), r"norm: expected a batch axis and features, got shape \(4,\)"),
        (batch_norm(), jnp.zeros((2, 4), int), "norm: expected floating features, got int32: convert"),
        (batch_norm(), (jnp.zeros((2, 4)), jnp.ones(2)), r"norm: expected one array, got .* \(a mask is boolean; "),
        (
            batch_norm(),
            (jnp.zeros((2, 3, 4)), jnp.ones((2, 4), bool)),
            r"norm: expected a mask over leading axes of \(2, 3, 4\), got shape \(2, 4\)",
        ),
        (
            batch_norm(),
            (jnp.zeros((2, 4)), jnp.ones((2, 4), bool)),
            r"norm: expected a mask over leading axes of \(2,\), got shape \(2, 4\)",
        ),
        (layer_norm(), jnp.zeros((2, 3)), "norm: expected 4 features, got 3"),
        (rms_norm(), jnp.zeros((2, 4), bool), "norm: expected floating features, got bool"),
        (group_norm(2), jnp.zeros((2, 6)), "norm: expected 4 features, got 6"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_path(layer, x, message):
    model = serial(("norm", layer))
    params, state = model.init(jax.random.key(0), jnp.zeros((2, 4)))
    with pytest.raises(LayerError, match=f"^{message}"):
        model.forward(params, state, x)


def test_constructors_and_init_refuse_what_cannot_be():
    for make, message in (
        (lambda: batch_norm(decay=1.5), "batch_norm: decay = 1.5; expected a number from 0 to 1"),
        (lambda: batch_norm(eps=-1.0), "batch_norm: eps = -1.0; expected at least 0"),
        (lambda: batch_norm(variance="sample"), "batch_norm: variance = 'sample'; expected 'biased' or 'unbiased'"),
        (lambda: layer_norm(eps=-1.0), "layer_norm: eps = -1.0"),
        (lambda: group_norm(0), "group_norm: groups = 0; expected at least 1"),
        (lambda: l2_normalize(0.5), "l2_normalize: axis = 0.5; expected a whole number, such as -1"),
        (lambda: l2_normalize(eps=0), "l2_normalize: eps = 0; expected above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(LayerError, match=r"group_norm_0: expected a multiple of 4 features \(groups = 4\), got 6"):
        serial(group_norm(4), dense(2)).init(jax.random.key(0), jnp.zeros((2, 6)))
    with pytest.raises(LayerError, match=r"expected the state {'mean', 'var'}, got \(\): pass what init returned"):
        batch_norm().forward({}, (), jnp.zeros((2, 6)))
    for axis in (0, -2, 2):
        with pytest.raises(LayerError, match=f"expected axis {axis} among 2, and not the batch's"):
            l2_normalize(axis).forward((), (), jnp.zeros((2, 6)))
    with pytest.raises(LayerError, match="batch_norm_0: expected floating features, got uint8"):
        serial(batch_norm()).init(jax.random.key(0), jax.ShapeDtypeStruct((2, 6), jnp.uint8))
