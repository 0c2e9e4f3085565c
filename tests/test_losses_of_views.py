"""InfoNCE and triplets against NumPy float64; values that depend on other examples, under weights too.

Legend: B batch, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.layers import dense, identity
from fnet.losses import info_nce, triplet
from tests.oracles import numerical_gradient

B, D = 5, 4
rng = np.random.default_rng(0)
PAIRS, TRIPLES = rng.standard_normal((B, 2, D)), rng.standard_normal((B, 3, D))
NONE = np.zeros(B)  # targets, which are not read


def nce(z, temperature, present=None):
    """The formula, over the examples that are there."""
    present = np.ones(len(z), bool) if present is None else present
    u, v = (z[:, i] / np.linalg.norm(z[:, i], axis=-1, keepdims=True) for i in (0, 1))
    s = u @ v[present].T / temperature
    own = (u * v).sum(-1) / temperature
    return np.logaddexp.reduce(s, -1) - own


def distances(z, margin):
    a, p, n = np.moveaxis(z, 1, 0)
    return np.maximum(0, ((a - p) ** 2).sum(-1) - ((a - n) ** 2).sum(-1) + margin)


CASES = {
    "info_nce": (info_nce(), PAIRS, lambda z: nce(z, 0.1)),
    "info_nce(2)": (info_nce(2.0), PAIRS, lambda z: nce(z, 2.0)),
    "triplet": (triplet(), TRIPLES, lambda z: distances(z, 1.0)),
    "triplet(0.2)": (triplet(0.2), TRIPLES, lambda z: distances(z, 0.2)),
}
every_loss = pytest.mark.parametrize("name", CASES)


def compiled(loss):
    def total(z):
        return loss.value(z, None).sum()

    return jax.jit(lambda z: (loss.value(z, None), loss.gradient(z, None), jax.grad(total)(z)))


@every_loss
def test_values_are_the_formulas_and_gradients_the_slopes_of_their_sum(name, x64):
    loss, z, formula = CASES[name]
    values, by_hand, by_autodiff = compiled(loss)(z)
    np.testing.assert_allclose(values, formula(z), rtol=1e-12)
    slopes = numerical_gradient(lambda z: formula(z).sum(), z)
    np.testing.assert_allclose(by_hand, slopes, atol=1e-7)
    np.testing.assert_allclose(by_hand, by_autodiff, atol=1e-13)
    for wrong in (-by_hand, 1.00001 * by_hand, np.roll(by_hand, 1, 1), np.roll(by_hand, 1, 0)):
        assert np.abs(wrong - slopes).max() > 1e-6


@every_loss
def test_float32_is_float64_to_its_rounding_and_bfloat16_is_computed_in_float32(name, x64):
    loss, z, _ = CASES[name]
    exact, found = compiled(loss)(z.astype(np.float32).astype(np.float64)), compiled(loss)(z.astype(np.float32))
    for wide, narrow in zip(exact, found, strict=True):  # a cosine is rounded by 1e-7, and divided by the temperature
        assert narrow.dtype == jnp.float32
        np.testing.assert_allclose(narrow, wide, rtol=1e-5, atol=1e-5 * np.abs(wide).max())
    values, by_hand, _ = compiled(loss)(jnp.asarray(z, jnp.bfloat16))
    assert values.dtype == jnp.float32 and by_hand.dtype == jnp.bfloat16


@pytest.mark.parametrize("make, z", [(info_nce, PAIRS), (triplet, TRIPLES)])
def test_hyperparameters_may_be_traced_and_differentiated(make, z, x64):
    formula = nce if make is info_nce else distances
    mean = jax.jit(lambda h: make(h)(z, NONE).mean())
    np.testing.assert_allclose(mean(0.3), formula(z, 0.3).mean(), rtol=1e-12)
    slope = (formula(z, 0.3 + 1e-6).mean() - formula(z, 0.3 - 1e-6).mean()) / 2e-6
    np.testing.assert_allclose(jax.jit(jax.grad(mean))(0.3), slope, rtol=1e-7)


@pytest.mark.parametrize("weights", [[1.0, 0.5, 2, 3, 1], [1.0, 0, 2, 0, 1]], ids=["all", "some"])
@pytest.mark.parametrize("engine", [fnet.autodiff, fnet.backprop], ids=lambda engine: engine.__name__)
def test_under_weights_the_gradient_is_that_of_the_weighted_mean_over_those_that_are_there(engine, weights, key, x64):
    w = np.array(weights)
    here = w > 0
    spoilt = np.where(here[:, None, None], PAIRS, np.nan)
    gradient = jax.jit(engine(identity(), info_nce(0.5), inputs=True))
    batch = jax.tree.map(jnp.asarray, fnet.Batch(spoilt, NONE, w))
    (_, dz), _, metrics = gradient((), (), batch, key)

    def objective(z):
        return w[here] @ nce(z, 0.5, here)[here] / w.sum()

    np.testing.assert_allclose(metrics["loss"].value, objective(PAIRS), rtol=1e-13)
    np.testing.assert_allclose(dz, numerical_gradient(objective, PAIRS), atol=1e-9)
    assert (np.asarray(dz)[~here] == 0).all()


def test_without_its_own_backward_a_loss_that_mixes_examples_is_weighted_wrongly(key, x64):
    loss, w = info_nce(0.5), jnp.asarray([1.0, 0.5, 2, 3, 1])
    batch = fnet.Batch(jnp.asarray(PAIRS), jnp.asarray(NONE), w)
    expected, found, told = (
        engine(identity(), of, inputs=True)((), (), batch, key)[0][1]
        for engine, of in ((fnet.autodiff, loss), (fnet.backprop, loss._replace(backward=None)), (fnet.backprop, loss))
    )
    assert np.abs(found - expected).max() > 1e-3
    np.testing.assert_allclose(told, expected, atol=1e-14)


def test_a_batch_in_which_nobody_is_there_and_one_alone_are_0(x64):
    for z in (np.zeros((B, 2, D)), PAIRS[:1], PAIRS[:0]):
        values, *gradients = compiled(info_nce())(z)
        np.testing.assert_allclose(values, np.zeros(len(z)), atol=1e-15)
        for gradient in gradients:
            np.testing.assert_allclose(gradient, np.zeros(z.shape), atol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_info_nce_does_not_depend_on_lengths(scale):
    z = PAIRS.astype(np.float32)
    value, by_hand, by_autodiff = compiled(info_nce())(z * np.float32(scale))
    expected, gradient, _ = compiled(info_nce())(z)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found in (by_hand, by_autodiff):
        np.testing.assert_allclose(found * np.float32(scale), gradient, atol=1e-5 * np.abs(gradient).max())


def test_a_first_view_of_nothing_finds_all_alike_and_has_no_gradient(x64):
    z = PAIRS.copy()
    z[2, 0] = 0
    values, by_hand, by_autodiff = compiled(info_nce())(z)
    np.testing.assert_allclose(values[2], np.log(B), rtol=1e-13)
    assert (np.asarray(by_hand[2, 0]) == 0).all()
    np.testing.assert_allclose(by_hand, by_autodiff, atol=1e-13)


def test_an_example_without_its_second_view_is_not_there_though_its_first_is(x64):
    z, here = PAIRS.copy(), np.arange(B) != 2
    z[2, 1] = 0
    values, by_hand, by_autodiff = compiled(info_nce())(z)
    np.testing.assert_allclose(values, np.where(here, nce(PAIRS, 0.1, here), 0), rtol=1e-12)
    assert (np.asarray(by_hand[2]) == 0).all()
    np.testing.assert_allclose(by_hand, by_autodiff, atol=1e-13)


def test_at_a_triplets_margin_the_subgradient_is_0_and_nan_passes():
    z = np.array([[[0.0], [0.0], [1.0]], [[0.0], [1.0], [1.0]], [[0.0], [np.nan], [1.0]]], np.float32)
    values, *gradients = compiled(triplet(1.0))(z)
    np.testing.assert_array_equal(values, [0, 1, np.nan])
    for found in gradients:
        assert (np.asarray(found[0]) == 0).all() and np.isnan(found[2]).any()
        np.testing.assert_array_equal(found[1], [[0], [2], [-2]])


def test_an_encoder_learns_to_tell_its_examples_apart(key):
    x = rng.standard_normal((32, 1, 6)) + 0.3 * rng.standard_normal((32, 2, 6))
    model, loss, x = dense(8), info_nce(0.2), x.astype(np.float32)
    params, state = fnet.init(model, key, x)
    step = fnet.make_step(fnet.backprop(model, loss), fnet.adam(0.03))
    ts = fnet.init_train_state(params, fnet.adam(0.03), key, state)
    _, history = fnet.fit(step, ts, fnet.Batch(x, np.zeros(32, np.float32)), epochs=40, batch_size=32)
    assert history.epochs["loss"][-1] < 0.8 * history.epochs["loss"][0]


@pytest.mark.parametrize(
    "loss, outputs, message",
    [
        (info_nce(), np.zeros((4, 3, 2)), r"info_nce: outputs \(4, 3, 2\); expected \(B, 2, D\), .* one view, another"),
        (triplet(), np.zeros((4, 3)), r"triplet: outputs \(4, 3\); expected \(B, 3, D\), .* a negative"),
        (info_nce(), np.zeros((4, 2, 2), int), "info_nce: outputs are int64; expected floating"),
        (triplet(), (np.zeros((4, 2)),) * 3, "triplet: outputs are a tuple of .*; expected one array"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(loss, outputs, message):
    for function in (loss.value, loss.gradient):
        with pytest.raises(ValueError, match=f"^{message}"):
            function(outputs, None)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"^info_nce: expected temperature > 0, got 0"):
        info_nce(0)
    with pytest.raises(ValueError, match=r"^triplet: expected margin of at least 0, got -1"):
        triplet(-1)
