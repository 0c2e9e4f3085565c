"""Gradients of each example: themselves, their norms without them, their clipped mean, how they scatter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from experiments import gradient_audit
from fnet.core.trees import split_floating
from fnet.gradients.examples import norms_by_hand
from fnet.layers import (
    attention,
    batch_norm,
    conv,
    dense,
    dropout,
    flatten,
    freeze,
    global_avg_pool,
    repeat,
    serial,
    tanh,
)
from fnet.types import LayerError, Loss
from tests.oracles import assert_leaves_close

LAYERS = gradient_audit.layer_cases(gradient_audit.constructors(None), np.random.default_rng(0))
MIXING = ("batch_norm", "basic_block", "bottleneck_block", "imagenet_stem", "inverted_residual")
REFUSED = (
    "attention, every option",  # draws its dropout again in the backward
    "t5_block",  # is given one bias for all examples
    "swin_block, shifted, of random depth",  # drops other branches in a batch of one
)
# the sum of outputs with fixed numbers, of any layer
PROJECTION = Loss(
    lambda y, t: sum((a * b).reshape(len(b), -1).sum(1) for a, b in zip(jax.tree.leaves(y), t, strict=True)),
    lambda y, t: jax.tree.unflatten(jax.tree.structure(y), t),
)


def problem(name):
    """A layer of the audit in float64, its parameters and a batch whose targets are numbers for its outputs."""
    layer, x = LAYERS[name]
    x = jax.tree.map(lambda a: jnp.asarray(a, float) if a.dtype == np.float32 else jnp.asarray(a), x)
    key = jax.random.key(0)
    params, state = layer.init(key, x)
    shapes = jax.eval_shape(
        lambda p, x: split_floating(layer.forward(p, state, x, key=key, train=True)[0])[0], params, x
    )
    rng = np.random.default_rng(1)
    targets = [jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in jax.tree.leaves(shapes)]
    weights = jnp.asarray(rng.uniform(0.5, 2, len(targets[0])), targets[0].dtype).at[1].set(0)

    def floating(p, s, x, *, key=None, train=False):
        y, s, residuals = layer.forward(p, s, x, key=key, train=train)
        return split_floating(y)[0], s, residuals

    return layer._replace(forward=floating), params, state, fnet.Batch(x, targets, weights)


QUICK = ("dense, along time", "conv", "tied_embedding", "residual, with a shortcut", "repeat", "gru, ragged")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.long)
        for name in LAYERS
        if not name.startswith((*MIXING, *REFUSED))
    ],
)
def test_norms_by_hand_are_those_of_the_gradients_of_batches_of_one(name, x64):
    model, params, state, batch = problem(name)
    if not jax.tree.leaves(params):
        pytest.skip("no parameters")
    engine, key = fnet.backprop(model, PROJECTION), jax.random.key(2)
    found = jax.jit(lambda *a: norms_by_hand("a test", engine, *a)[:2])(params, state, batch, key)
    squares, share = found
    grads = []
    for i in range(len(batch.weights)):
        one = jax.tree.map(lambda a, i=i: a[i : i + 1], batch)
        grads.append(engine(params, state, one._replace(weights=None), key)[0])
    share = np.asarray(batch.weights / batch.weights.sum())
    total = sum(s.astype(float) for s in squares.values())
    expected = [share[i] ** 2 * sum(float((g**2).sum()) for g in jax.tree.leaves(grads[i])) for i in range(len(share))]
    np.testing.assert_allclose(
        total, expected, rtol=1e-10 if all(leaf.dtype == float for leaf in jax.tree.leaves(params)) else 1e-6
    )


# --- each example's ---------------------------------------------------------------------------------------------------

MODEL = serial(conv(3, (3, 3), stride=2), tanh(), flatten(), dense(5), tanh(), dense(3))
WEIGHTS = np.array([1, 0.5, 0, 2, 1.5])


def images(dtype=float):
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.standard_normal((5, 6, 6, 2)), dtype), jnp.asarray(rng.integers(0, 3, 5))
    params, state = fnet.init(MODEL, jax.random.key(0), x)
    return params, state, fnet.Batch(x, labels, jnp.asarray(WEIGHTS, dtype))


def one_by_one(engine, params, state, batch, key=None):
    """Each example's gradient as that of a batch of one, in a loop; and all of them as rows (B, P)."""
    grads = [
        engine(params, state, jax.tree.map(lambda a, i=i: a[i : i + 1], batch), key)[0]
        for i in range(len(jax.tree.leaves(batch)[0]))
    ]
    return grads, np.stack([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in grads])


def flat(grads):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])


@pytest.mark.parametrize("make", [fnet.autodiff, fnet.backprop])
def test_gradients_of_each_example_are_those_of_batches_of_one_and_their_mean_is_the_engines(make, x64):
    params, state, batch = images()
    engine = make(MODEL, fnet.softmax_cross_entropy, {"accuracy": fnet.metrics.accuracy})
    found, _, metrics = jax.jit(fnet.per_example(engine))(params, state, batch, None)
    expected, _ = one_by_one(engine, params, state, batch)
    for i, own in enumerate(expected):
        assert_leaves_close(jax.tree.map(lambda a, i=i: a[i], found), own, 1e-12)
    grads, _, whole = engine(params, state, batch, None)
    mean = jax.tree.map(lambda g: np.tensordot(WEIGHTS, g, 1) / WEIGHTS.sum(), found)
    assert_leaves_close(mean, grads, 1e-12)
    for name, value in whole.items():
        np.testing.assert_allclose([metrics[name].value, metrics[name].count], [value.value, value.count], rtol=1e-12)


def test_noise_within_a_model_is_drawn_for_each_example():
    model = serial(dense(200), dropout(0.5))
    x = jnp.ones((3, 4))
    params, state = fnet.init(model, jax.random.key(0), x)
    engine = fnet.per_example(fnet.autodiff(model, PROJECTION))
    grads = engine(params, state, fnet.Batch(x, [jnp.ones((3, 200))]), jax.random.key(1))[0]["dense_0"]["b"]
    kept = np.asarray(grads) > 0
    assert 0.3 < (kept[0] != kept[1]).mean() < 0.7 and 0.3 < (kept[1] != kept[2]).mean() < 0.7


def clipped_mean(rows, limit, weights):
    norms = np.sqrt((rows**2).sum(1))
    return (weights * np.minimum(1, limit / norms)) @ rows / weights.sum(), norms


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("make", [fnet.autodiff, fnet.backprop])
def test_the_clipped_mean_is_the_formulas(make, parts, x64):
    params, state, batch = images()
    engine = make(MODEL, fnet.softmax_cross_entropy)
    _, rows = one_by_one(engine, params, state, batch._replace(weights=None))
    limit = float(np.median(np.sqrt((rows**2).sum(1)))) * 1.01
    expected, norms = clipped_mean(rows, limit, WEIGHTS)
    clipped = jax.jit(fnet.clip_per_example(engine, limit, parts=parts))
    grads, _, metrics = clipped(params, state, batch, jax.random.key(0))
    np.testing.assert_allclose(flat(grads), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(metrics["clipped"].value, WEIGHTS @ (norms > limit) / WEIGHTS.sum(), rtol=1e-12)
    assert 0 < float(metrics["clipped"].value) < 1
    doubled = jax.tree.map(lambda g: 8 * g, grads)
    assert_leaves_close(clipped(params, state, batch, jax.random.key(0), scale=8.0)[0], doubled, 1e-12)


def test_weights_by_position_and_what_a_loss_counts_are_an_examples_own(x64):
    rng = np.random.default_rng(3)
    model, x = serial(dense(4), tanh(), dense(3)), jnp.asarray(rng.standard_normal((4, 5, 2)))
    labels, weights = jnp.asarray(rng.integers(0, 3, (4, 5))), rng.uniform(0, 2, (4, 5))
    weights[1] = 0
    loss = fnet.losses.cross_entropy(np.array([0.5, 1.0, 3.0]))
    params, state = fnet.init(model, jax.random.key(0), x)
    counts = (weights * np.array([0.5, 1.0, 3.0])[labels]).sum(1)
    batch = fnet.Batch(x, labels, jnp.asarray(weights))
    by_hand = fnet.backprop(model, loss)
    _, rows = one_by_one(by_hand, params, state, batch)
    np.testing.assert_allclose(flat(by_hand(params, state, batch, None)[0]), counts @ rows / counts.sum(), atol=1e-13)
    norms = np.sqrt((rows**2).sum(1))
    limit = norms[[0, 2, 3]].mean()
    factors = np.minimum(1, limit / np.where(norms == 0, 1, norms))
    for engine in (by_hand, fnet.autodiff(model, loss)):
        grads, _, _ = fnet.clip_per_example(engine, limit)(params, state, batch, None)
        np.testing.assert_allclose(flat(grads), (counts * factors) @ rows / counts.sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_noise_of_a_clipped_mean_has_its_deviation_whatever_the_parts(parts):
    model, x = dense(400, bias=None), jnp.ones((8, 50))
    params, state = fnet.init(model, jax.random.key(0), x)
    batch = fnet.Batch(x, jnp.zeros((8, 400)), jnp.linspace(0, 2, 8))
    engine = fnet.backprop(model, fnet.losses.half_squared_error)
    quiet, noisy = (fnet.clip_per_example(engine, 0.5, noise, parts=parts) for noise in (None, 3.0))
    key = jax.random.key(5)
    noise = noisy(params, state, batch, key)[0]["w"] - quiet(params, state, batch, key)[0]["w"]
    again = noisy(params, state, batch, key)[0]["w"] - quiet(params, state, batch, key)[0]["w"]
    assert (noise == again).all()
    # 20,000 draws: the mean within 5 and the deviation within 5 of their standard errors
    deviation = 3.0 * 0.5 / 8
    assert abs(float(noise.mean())) < 5 * deviation / 20_000**0.5
    assert abs(float(noise.std()) / deviation - 1) < 5 / 40_000**0.5
    with pytest.raises(TypeError, match="clip_per_example"):
        noisy(params, state, batch, None)


def test_frozen_parameters_count_for_nothing_in_a_norm(x64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 3)))
    batch = fnet.Batch(x, [jnp.asarray(rng.standard_normal((4, 2)))])
    for frozen in (freeze(dense(5)), freeze(serial(dense(5), tanh()))):
        model = serial(frozen, tanh(), dense(2))
        params, state = fnet.init(model, jax.random.key(0), x)
        engine = fnet.backprop(model, PROJECTION)
        _, rows = one_by_one(fnet.autodiff(model, PROJECTION), params, state, batch)
        squares = norms_by_hand("a test", engine, params, state, batch, None).squares
        np.testing.assert_allclose(sum(squares.values()), (rows**2).sum(1) / 16, rtol=1e-12)


def test_a_run_by_clipped_gradients_is_differentiated_by_its_limit(x64):
    params, state, batch = images()
    engine = fnet.backprop(MODEL, fnet.softmax_cross_entropy)

    def after(limit):
        grads = fnet.clip_per_example(engine, limit)(params, state, batch, None)[0]
        moved = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
        return fnet.softmax_cross_entropy(fnet.apply(MODEL, moved, state, batch.inputs), batch.targets).mean()

    value = jax.jit(after)
    slope = (value(1.0 + 1e-5) - value(1.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.grad(after))(1.0), slope, rtol=1e-7)


def test_layers_and_losses_that_mix_examples_are_refused_by_name():
    x, labels = jnp.ones((4, 3)), jnp.zeros(4, int)
    mixing = serial(dense(3), ("hidden", serial(dense(3), batch_norm())))
    params, state = fnet.init(mixing, jax.random.key(0), x)
    for make in (fnet.autodiff, fnet.backprop):
        engine = make(mixing, fnet.softmax_cross_entropy)
        for instrument in (
            fnet.per_example(engine),
            fnet.clip_per_example(engine, 1.0),
            fnet.gradient_moments(engine),
            fnet.gradient_noise(engine),
        ):
            with pytest.raises(LayerError, match=r"^hidden/batch_norm_0: mixes the examples .* take group_norm"):
                instrument(params, state, fnet.Batch(x, labels), None)
    views = fnet.Batch(jnp.ones((4, 2, 3)), labels)
    params, state = fnet.init(dense(3), jax.random.key(0), views.inputs)
    engine = fnet.backprop(dense(3), fnet.losses.info_nce())
    for instrument in (fnet.per_example(engine), fnet.clip_per_example(engine, 1.0)):
        with pytest.raises(ValueError, match="the loss mixes examples"):
            instrument(params, state, views, None)


def test_noise_that_a_backward_draws_anew_is_refused_by_hand():
    model, x = serial(attention(1, dropout_rate=0.5), global_avg_pool()), jnp.ones((2, 3, 2))
    params, state = fnet.init(model, jax.random.key(0), x)
    batch = fnet.Batch(x, jnp.zeros(2, int))
    by_hand, autodiff = (make(model, fnet.softmax_cross_entropy) for make in (fnet.backprop, fnet.autodiff))
    with pytest.raises(LayerError, match=r"attention_0: draws noise.*take fnet.autodiff"):
        fnet.clip_per_example(by_hand, 1.0)(params, state, batch, jax.random.key(0))
    fnet.clip_per_example(autodiff, 1.0)(params, state, batch, jax.random.key(0))


@pytest.mark.parametrize("instrument", [fnet.per_example, fnet.gradient_moments, fnet.gradient_noise])
def test_what_is_no_engine_is_refused(instrument):
    with pytest.raises(TypeError, match=f"{instrument.__name__}: gradient is .*expected a gradient engine"):
        instrument(dense(3))


# --- how they scatter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 5])
def test_moments_and_the_noise_scale_are_the_formulas(parts, x64):
    params, state, batch = images()
    engine = fnet.backprop(MODEL, fnet.softmax_cross_entropy)
    grads, rows = one_by_one(engine, params, state, batch._replace(weights=None))
    mean, variance, noise = jax.jit(fnet.gradient_moments(engine, parts=parts))(params, state, batch, None)
    total = WEIGHTS.sum()
    own = WEIGHTS @ rows / total
    scatter = WEIGHTS @ (rows - own) ** 2 / (total - (WEIGHTS**2).sum() / total)
    np.testing.assert_allclose(flat(mean), own, rtol=0, atol=1e-13)
    np.testing.assert_allclose(flat(variance), scatter, rtol=0, atol=1e-13)
    signal = (own**2).sum() - scatter.sum() * (WEIGHTS**2).sum() / total**2
    np.testing.assert_allclose(noise.scale["all"], scatter.sum() / signal, rtol=1e-11)
    np.testing.assert_allclose(noise.signal["all"], np.sqrt((own**2).sum() / scatter.sum()), rtol=1e-11)
    weight = np.stack([np.ravel(g["dense_0"]["w"]) for g in grads])
    by_leaf = WEIGHTS @ (weight - WEIGHTS @ weight / total) ** 2 / (total - (WEIGHTS**2).sum() / total)
    np.testing.assert_allclose(
        noise.signal["dense_0/w"], np.sqrt(((WEIGHTS @ weight / total) ** 2).sum() / by_leaf.sum()), rtol=1e-11
    )


@pytest.mark.parametrize("make", [fnet.autodiff, fnet.backprop])
def test_noise_by_norms_alone_is_that_of_the_moments(make, x64):
    model = serial(dense(4), repeat(serial(dense(4), tanh()), 2), dense(3))
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.standard_normal((6, 4))), jnp.asarray(rng.integers(0, 3, 6))
    params, state = fnet.init(model, jax.random.key(0), x)
    engine, batch = make(model, fnet.softmax_cross_entropy), fnet.Batch(x, labels)
    expected = fnet.gradient_moments(engine)(params, state, batch, None).noise
    assert_leaves_close(fnet.gradient_noise(engine)(params, state, batch, None), expected, 1e-10)


def test_the_noise_scale_is_a_monitor_of_a_step():
    params, state, batch = images(jnp.float32)
    engine = fnet.backprop(MODEL, fnet.softmax_cross_entropy)
    step = fnet.make_step(engine, fnet.sgd(0.1), {"noise": fnet.gradient_noise(engine)})
    ts = fnet.init_train_state(params, fnet.sgd(0.1), jax.random.key(0), state)
    _, metrics = jax.jit(step)(ts, batch)
    expected = fnet.gradient_noise(engine)(params, state, batch, None)
    assert_leaves_close(jax.tree.map(lambda m: m, metrics["noise"].scale["all"].sum), expected.scale["all"], 1e-5)
    with pytest.raises(TypeError, match=r"make_step: monitors\['two'\].*of the gradients, or of"):
        fnet.make_step(engine, fnet.sgd(0.1), {"two": lambda a, b: a})
