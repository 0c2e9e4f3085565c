"""Examples of weight 0 are left out, whatever stands in their targets: each loss, each engine, fit and evaluate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet import losses
from fnet.layers import dense
from fnet.metrics import accuracy
from tests.oracles import assert_leaves_close

N, F, K = 6, 4, 3
LIVE = np.array([1.0, 2.0, 0.0, 0.5, 0.0, 1.0], np.float32)
rng = np.random.default_rng(0)
X = rng.standard_normal((N, F)).astype(np.float32)
REAL, CLASSES, LABELS = rng.standard_normal((N, K)), rng.dirichlet(np.ones(K), N), rng.integers(0, K, N)


def spoilt(targets, bad):
    """The targets with something else where the weight is 0."""
    return np.where((LIVE == 0).reshape(-1, *(1,) * (targets.ndim - 1)), bad, targets).astype(targets.dtype)


CASES = {
    "labels of -1": (losses.softmax_cross_entropy, spoilt(LABELS, -1)),
    "labels of -100": (losses.smoothed_cross_entropy(0.1), spoilt(LABELS, -100)),
    "labels above the classes": (losses.softmax_cross_entropy, spoilt(LABELS, 99)),
    "soft labels of NaN": (losses.softmax_cross_entropy, spoilt(CLASSES.astype(np.float32), np.nan)),
    "soft labels, smoothed": (losses.smoothed_cross_entropy(0.1), spoilt(CLASSES.astype(np.float32), np.inf)),
    "binary, NaN": (losses.binary_cross_entropy, spoilt(CLASSES.astype(np.float32), np.nan)),
    "binary, -1": (losses.binary_cross_entropy, spoilt((REAL > 0).astype(np.int32), -1)),
    "focal, labels of -1": (losses.focal_cross_entropy(), spoilt(LABELS, -1)),
    "hinges, labels of -1": (losses.multiclass_hinge, spoilt(LABELS, -1)),
    "hinge, -1": (losses.hinge, spoilt((REAL > 0).astype(np.int32), -1)),
    "dice, NaN": (losses.dice(), spoilt(CLASSES.astype(np.float32), np.nan)),
    "divergence, NaN": (losses.kl_divergence, spoilt(CLASSES.astype(np.float32), np.nan)),
    "poisson, -1": (losses.poisson, spoilt((REAL > 0).astype(np.int32), -1)),
    **{
        f"{name}, {bad}": (loss, spoilt(REAL.astype(np.float32), bad))
        for name, loss in {
            "squared_error": losses.squared_error,
            "half_squared_error": losses.half_squared_error,
            "absolute_error": losses.absolute_error,
            "huber": losses.huber(0.7),
            "pinball": losses.pinball(0.3),
            "cosine_distance": losses.cosine_distance,
            "kl_divergence_from_logits": losses.kl_divergence_from_logits,
        }.items()
        for bad in (np.nan, np.inf, -np.inf)
    },
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("engine", [fnet.autodiff, fnet.backprop], ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_examples_that_count_alone(name, engine, compiled, key):
    loss, targets = CASES[name]
    model = dense(K)
    params, state = fnet.init(model, key, X)
    gradient = engine(model, loss, inputs=True)
    gradient = jax.jit(gradient) if compiled else gradient
    whole = fnet.Batch(jnp.asarray(X), jnp.asarray(targets), jnp.asarray(LIVE))
    (dparams, dx), _, metrics = gradient(params, state, whole, key)
    part = jax.tree.map(lambda a: a[LIVE > 0], whole)
    (expected, expected_dx), _, alone = gradient(params, state, part, key)
    assert_leaves_close(dparams, expected, 1e-6)
    assert_leaves_close(dx[LIVE > 0], expected_dx, 1e-6)
    assert (np.asarray(dx)[LIVE == 0] == 0).all()
    np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=1e-6)


def test_an_output_that_is_not_finite_at_weight_0_spoils_nothing(key):
    # the third example's logits overflow to infinity and NaN
    model = fnet.serial(dense(K), fnet.layers.gelu())
    x = jnp.asarray(X).at[2].set(jnp.asarray([3e38, 3e38, -3e38, 3e38]))
    params, state = fnet.init(model, key, x)
    for engine in (fnet.autodiff, fnet.backprop):
        dy = engine(fnet.layers.identity(), losses.squared_error, inputs=True)
        y = fnet.apply(model, params, state, x)
        assert not np.isfinite(y[2]).all()
        (_, gradient), _, metrics = dy((), (), fnet.Batch(y, jnp.asarray(REAL, jnp.float32), jnp.asarray(LIVE)), key)
        assert jnp.isfinite(gradient).all() and np.isfinite(metrics["loss"].value)


def test_weights_along_time_leave_positions_out(key):
    x, ids = jnp.asarray(rng.standard_normal((2, 5, F)), jnp.float32), jnp.asarray(rng.integers(0, K, (2, 5)))
    weights = jnp.asarray([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], jnp.float32)
    model = dense(K)
    params, state = fnet.init(model, key, x)
    padded = jnp.where(weights > 0, ids, -1)
    for engine in (fnet.autodiff, fnet.backprop):
        gradient = engine(model, losses.softmax_cross_entropy)
        found = gradient(params, state, fnet.Batch(x, padded, weights), key)
        assert_leaves_close(found, gradient(params, state, fnet.Batch(x, ids, weights), key), 1e-6)


def test_a_batch_in_which_nothing_counts_has_gradients_of_0(key):
    model = dense(K)
    params, state = fnet.init(model, key, X)
    batch = fnet.Batch(jnp.asarray(X), jnp.full(N, -1), jnp.zeros(N))
    for engine in (fnet.autodiff, fnet.backprop):
        grads, _, metrics = engine(model, losses.softmax_cross_entropy, {"accuracy": accuracy})(
            params, state, batch, key
        )
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
        assert metrics["loss"].value == 0 and metrics["accuracy"].value == 0


@pytest.mark.parametrize("engine", [fnet.autodiff, fnet.backprop], ids=lambda engine: engine.__name__)
def test_fit_and_evaluate_take_missing_targets_of_weight_0(engine, key):
    model, loss = dense(K), losses.softmax_cross_entropy
    params, state = fnet.init(model, key, X)
    optimizer = fnet.sgd(0.1)
    step = fnet.make_step(engine(model, loss), optimizer)
    ts = fnet.init_train_state(params, optimizer, key, state)
    evaluate = fnet.make_evaluate(model, loss, {"accuracy": accuracy}, batch_size=4)

    def run(labels):
        data = fnet.Batch(X, labels, LIVE)
        end, history = fnet.fit(step, ts, data, epochs=2, batch_size=4, evaluate=evaluate, validation=data)
        return end.params, history.epochs["loss"], history.evaluations["validation_loss"]

    assert_leaves_close(run(spoilt(LABELS, -1)), run(LABELS), 0)
    real = fnet.make_step(engine(model, losses.squared_error), optimizer)
    missing = fnet.Batch(X, spoilt(REAL.astype(np.float32), np.nan), LIVE)
    end, _ = fnet.fit(real, ts, missing, epochs=2, batch_size=4)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(end.params))


def test_a_label_out_of_range_that_counts_is_still_refused(key):
    model, loss = dense(K), losses.softmax_cross_entropy
    params, state = fnet.init(model, key, X)
    optimizer = fnet.sgd(0.1)
    ts = fnet.init_train_state(params, optimizer, key, state)
    labels = spoilt(LABELS, -1)
    labels[3] = 7  # its weight is ½
    data = fnet.Batch(X, labels, LIVE)
    step = fnet.make_step(fnet.backprop(model, loss), optimizer)
    with pytest.raises(fnet.DataError, match=r"^data: softmax_cross_entropy: label 7 in example 3 is"):
        fnet.fit(step, ts, data, epochs=1, batch_size=4)
    for size, place in ((None, r"at \(3,\)"), (2, "in example 3")):
        with pytest.raises(ValueError, match=f"^softmax_cross_entropy: label 7 {place} is"):
            fnet.make_evaluate(model, loss, batch_size=size)(params, state, data)
    parts = fnet.make_step(fnet.accumulate(fnet.backprop(model, loss), 2), optimizer)
    with pytest.raises(fnet.DataError, match=r"^data: softmax_cross_entropy: label 7 in example 3 is"):
        fnet.fit(parts, ts, data, epochs=1, batch_size=4)
    missing = fnet.Batch(X, np.where(np.arange(N)[:, None] == 3, np.nan, REAL).astype(np.float32), LIVE)
    with pytest.raises(fnet.DataError, match=r"data.targets\[3, 0\] = nan; expected finite numbers"):
        fnet.check_data(missing)
