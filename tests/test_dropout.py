"""Dropout: the draw and its statistics, one mask forward and backward, keys by path, shared axes, transformations."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.gradcheck import check_layer
from fnet.layers import dense, serial
from fnet.layers.children import apply
from fnet.layers.dropout import dropout
from fnet.types import LayerError
from tests.oracles import assert_leaves_close


def forward(layer, x, key):
    y, state, mask = layer.forward((), (), x, key=key, train=True)
    assert state == ()
    return y, mask


def train(layer, x, key):
    """Outputs and mask in training, in NumPy."""
    return jax.tree.map(np.asarray, jax.jit(lambda x, key: forward(layer, x, key))(x, key))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_the_share_of_kept_entries_is_binomial_and_they_are_scaled_to_the_same_mean(rate, key):
    n = 200_000
    y, mask = train(dropout(rate), jnp.ones((n,)), key)
    kept = int(mask.sum())
    assert mask.dtype == bool
    assert abs(kept - n * (1 - rate)) <= 5 * math.sqrt(n * rate * (1 - rate))
    np.testing.assert_array_equal(y == 0, ~mask)
    np.testing.assert_allclose(y[mask], 1 / (1 - rate), rtol=1e-6)
    # neighbours are dropped independently: both kept with (1 − p)²
    both = int((mask[1:] & mask[:-1]).sum())
    q = (1 - rate) ** 2
    assert abs(both - n * q) <= 5 * math.sqrt(3 * n * q * (1 - q)) + 1


def test_each_entry_is_dropped_as_often_as_the_others(key):
    keys = jax.random.split(key, 4000)
    masks = jax.jit(jax.vmap(lambda k: forward(dropout(0.3), jnp.ones((4, 5)), k)[1]))(keys)
    assert np.abs(np.asarray(masks).sum(0) - 4000 * 0.7).max() <= 5 * math.sqrt(4000 * 0.3 * 0.7)


def test_one_mask_serves_forward_and_backward_and_gradients_are_those_of_autodiff(key, x64):
    x, dy = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 7)))
    layer = dropout(0.4)
    y, mask = train(layer, x, key)
    np.testing.assert_allclose(y, np.where(mask, x / 0.6, 0), rtol=1e-15)
    dparams, dx = layer.backward((), mask, dy)
    assert dparams == ()
    np.testing.assert_allclose(dx, np.where(mask, dy / 0.6, 0), rtol=1e-15)
    assert_leaves_close(dx, jax.vjp(lambda x: forward(layer, x, key)[0], x)[1](dy)[0], 1e-15)


def test_the_audit_finds_nothing_in_train_and_eval_mode(key):
    report = check_layer(dropout(0.4), jax.random.normal(key, (4, 3)), key=key)
    assert report.ok, report


def test_a_backward_with_a_mask_of_its_own_is_found(key):
    wrong = dropout(0.4)._replace(backward=lambda params, mask, dy: ((), dy if mask is None else dy * ~mask))
    report = check_layer(wrong, jax.random.normal(key, (4, 3)), key=key, precisions=(), cost=False)
    assert [leaf.verdict for leaf in report.leaves] == ["wrong", "ok"]


def test_inference_is_the_identity_with_nothing_kept_and_needs_no_key(key):
    x = jax.random.normal(key, (5, 7))
    for given in (None, key):
        y, state, residuals = dropout(0.4).forward((), (), x, key=given, train=False)
        assert y is x and state == () and residuals is None
    assert dropout(0.4).backward((), None, x) == ((), x)


def test_the_mask_depends_on_the_key_and_the_shape_but_not_on_the_dtype(key):
    x = jnp.ones((8, 16))
    _, mask = train(dropout(0.5), x, key)
    np.testing.assert_array_equal(mask, train(dropout(0.5), x, key)[1])
    assert (mask != train(dropout(0.5), x, jax.random.fold_in(key, 1))[1]).any()
    y, low = train(dropout(0.5), x.astype(jnp.bfloat16), key)
    assert y.dtype == dropout(0.5).backward((), low, y)[1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(mask, low)
    with jax.enable_x64(True):
        y, wide = train(dropout(0.5), jnp.asarray(np.ones((8, 16))), key)
        assert y.dtype == jnp.float64
        np.testing.assert_array_equal(mask, wide)


def test_keys_differ_by_the_path_in_the_model(key):
    model = serial(dropout(0.5), dropout(0.5), ("block", serial(dropout(0.5))))
    params, state = model.init(key, jnp.zeros((1, 64)))
    residuals = jax.jit(lambda x: model.forward(params, state, x, key=key, train=True)[2])(jnp.ones((4, 64)))
    masks = [residuals["dropout_0"], residuals["dropout_1"], residuals["block"]["dropout_0"]]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 0.25 < (one != other).mean() < 0.75  # independent halves differ in half of 256 places, ± 8 σ


@pytest.mark.parametrize(("axes", "drawn"), [((1, 2), (64, 1, 1, 32)), ((-1,), (64, 2, 3, 1)), ((0,), (1, 2, 3, 32))])
def test_shared_axes_are_kept_or_dropped_as_one(axes, drawn, key):
    x = np.float32(np.random.default_rng(0).normal(size=(64, 2, 3, 32)))
    layer = dropout(0.5, shared_axes=axes)
    y, mask = train(layer, x, key)
    assert mask.shape == drawn
    expected = np.where(np.broadcast_to(mask, x.shape), 2 * x, 0)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(layer.backward((), mask, x)[1], expected)
    n = math.prod(drawn)
    assert abs(mask.sum() - n / 2) <= 5 * math.sqrt(n / 4)


def test_rate_zero_changes_nothing_and_a_rate_near_one_keeps_the_mean(key):
    x = jax.random.normal(key, (5, 7))
    np.testing.assert_array_equal(train(dropout(0.0), x, key)[0], x)
    np.testing.assert_array_equal(train(dropout(jnp.float32(0)), x, key)[0], x)
    n, keep = 400_000, 2.0**-10
    y, mask = train(dropout(1 - keep), jnp.ones((n,)), key)
    assert abs(int(mask.sum()) - n * keep) <= 5 * math.sqrt(n * keep)
    np.testing.assert_array_equal(y[mask], 1024)


def test_the_rate_may_be_traced_and_vmapped_and_the_program_jitted_and_scanned(key):
    x = jnp.ones((16, 16))
    rates = jnp.array([0.0, 0.25, 0.75])

    def both(rate):
        y, mask = forward(dropout(rate), x, key)
        return y, dropout(rate).backward((), mask, x)[1]

    ys, dxs = jax.jit(jax.vmap(both))(rates)
    np.testing.assert_array_equal(ys, dxs)
    for rate, y in zip(rates.tolist(), ys, strict=True):
        np.testing.assert_array_equal(y, train(dropout(rate), x, key)[0])

    def step(carry, i):
        return carry, forward(dropout(0.5), x, jax.random.fold_in(key, i))[0]

    _, scanned = jax.lax.scan(step, (), jnp.arange(3))
    for i, y in enumerate(scanned):
        np.testing.assert_array_equal(y, train(dropout(0.5), x, jax.random.fold_in(key, i))[0])


def test_outputs_of_inference_and_the_scale_in_training_are_those_of_torch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Dropout(0.2)
    kept = theirs(torch.ones(1000)).unique().numpy()
    ours = np.unique(train(dropout(0.2), jnp.ones(1000), jax.random.key(0))[0])
    np.testing.assert_allclose(ours, kept, rtol=1e-6)
    channels = torch.nn.Dropout2d(0.5)(torch.ones(8, 16, 3, 3))
    assert (channels == channels[:, :, :1, :1]).all()  # what shared_axes=(1, 2) does to (B, H, W, C)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_training_without_a_key_names_the_layer_and_the_remedy():
    model = serial(dense(3), ("drop", dropout(0.5)))
    params, state = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    with pytest.raises(LayerError, match=r"^drop: expected a key in training, got None: pass forward\(..., key=key"):
        model.forward(params, state, jnp.zeros((1, 2)), train=True)
    apply(model, params, state, jnp.zeros((1, 2)))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match=f"dropout: rate = {rate}; expected 0 <= rate < 1"):
        dropout(rate)


def test_integer_inputs_and_axes_that_are_not_there_are_refused(key):
    with pytest.raises(LayerError, match="expected floating inputs, got int32: drop after the embedding"):
        train(dropout(0.5), jnp.zeros((2, 3), jnp.int32), key)
    with pytest.raises(LayerError, match=r"expected the shared axes \(1, 2\) among 2, got inputs of shape \(2, 3\)"):
        train(dropout(0.5, shared_axes=(1, 2)), jnp.zeros((2, 3)), key)


def test_a_traced_rate_of_1_drops_everything_with_gradient_0_by_both_engines(key):
    def run(rate, x):
        y, _, residuals = dropout(rate).forward((), (), x, key=key, train=True)
        return y, dropout(rate).backward((), residuals, jnp.ones_like(y))[1]

    x = jnp.ones(8)
    by_autodiff = jax.jit(jax.grad(lambda x, rate: run(rate, x)[0].sum()))(x, 1.0)
    y, by_hand = jax.jit(run)(1.0, x)
    assert (y == 0).all() and (by_hand == 0).all() and (by_autodiff == 0).all()


def test_options_that_are_no_numbers_are_refused():
    with pytest.raises(TypeError, match="dropout: rate = 'a'; expected a number"):
        dropout("a")
    with pytest.raises(TypeError, match="shared_axes = 1; expected a tuple"):
        dropout(0.5, shared_axes=1)
