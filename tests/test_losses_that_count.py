"""What an example counts in the mean: class weights, labels to ignore, targets that are missing in part.

Legend: N examples, F features, K classes, T time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.layers import dense, identity
from fnet.losses import (
    absolute_error,
    binary_cross_entropy,
    cosine_distance,
    cross_entropy,
    dice,
    focal_cross_entropy,
    hinge,
    huber,
    info_nce,
    kl_divergence,
    per_output,
    pinball,
    poisson,
    softmax_cross_entropy,
    squared_error,
)
from fnet.metrics import accuracy
from tests.oracles import assert_leaves_close

N, F, K = 6, 4, 3
rng = np.random.default_rng(0)
X, LABELS = rng.standard_normal((N, F)), rng.integers(0, K, N)
C, W = np.array([1.0, 0.25, 3.0]), np.array([1.0, 2.0, 0.0, 0.5, 1.0, 1.0])
SOME = np.where(np.arange(N) % 3 == 1, -100, LABELS)
engines = pytest.mark.parametrize("engine", [fnet.autodiff, fnet.backprop], ids=lambda engine: engine.__name__)
compilations = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])


def run(engine, loss, batch, compiled=True, metrics=None):
    """Gradients by parameters and inputs, and the metrics, of a dense layer."""
    params = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((F, K))), "b": jnp.zeros(K)}
    gradient = engine(dense(K), loss, metrics, inputs=True)
    gradient = jax.jit(gradient) if compiled else gradient
    grads, _, measured = gradient(params, (), jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    return grads, measured


def assert_same(found, expected):
    assert_leaves_close(found, expected, 1e-13)


@compilations
@engines
@pytest.mark.parametrize("weights", [None, W], ids=["", "weighted"])
def test_class_weights_are_the_weights_of_a_batch(engine, compiled, weights, x64):
    by_hand = (1 if weights is None else W) * C[LABELS]
    found = run(engine, cross_entropy(C), fnet.Batch(X, LABELS, weights), compiled)
    assert_same(found, run(engine, softmax_cross_entropy, fnet.Batch(X, LABELS, by_hand), compiled))


@engines
@pytest.mark.parametrize("loss", [cross_entropy, focal_cross_entropy], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("weights", [None, W], ids=["", "weighted"])
def test_ignored_labels_are_examples_of_weight_0_in_metrics_too(engine, loss, weights, x64):
    kept = (1.0 if weights is None else W) * (SOME >= 0)
    metrics = {"accuracy": accuracy}
    found = run(engine, loss(ignore_index=-100), fnet.Batch(X, SOME, weights), metrics=metrics)
    assert_same(found, run(engine, loss(), fnet.Batch(X, LABELS, kept), metrics=metrics))
    assert float(found[1]["accuracy"].count) == kept.sum()


def test_class_weights_of_0_leave_examples_out_and_others_do_not_weight_metrics(x64):
    c = np.array([1.0, 0, 3])
    batch = fnet.Batch(X, LABELS)
    _, found = run(fnet.backprop, cross_entropy(c), batch, metrics={"accuracy": accuracy})
    assert float(found["loss"].count) == c[LABELS].sum()
    assert float(found["accuracy"].count) == (LABELS != 1).sum()


@engines
def test_along_time_weights_of_examples_meet_ignored_positions(engine, x64):
    x, y = rng.standard_normal((2, 5, F)), rng.integers(0, K, (2, 5))
    padded = np.where(np.arange(5) < [[3], [4]], y, -1)
    found = run(engine, cross_entropy(C, -1), fnet.Batch(x, padded, np.array([2.0, 0.5])))
    weights = np.array([[2.0], [0.5]]) * C[y] * (padded >= 0)
    assert_same(found, run(engine, softmax_cross_entropy, fnet.Batch(x, y, weights)))


@engines
def test_a_batch_in_which_all_is_ignored_has_the_loss_0_and_gradients_of_0(engine, x64):
    grads, metrics = run(engine, cross_entropy(ignore_index=-1), fnet.Batch(X, np.full(N, -1)))
    assert metrics["loss"].value == 0 and all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@engines
def test_parts_and_slices_add_up_to_the_mean_by_weight(engine, x64):
    batch = fnet.Batch(X, SOME)
    loss = cross_entropy(C, -100)

    def in_parts(*args, **options):  # accumulate refuses the inputs' gradients
        return fnet.accumulate(engine(*args[:3]), 4)

    found, expected = run(in_parts, loss, batch), run(lambda *args, **options: engine(*args[:3]), loss, batch)
    assert_same(found[0], expected[0])
    params = {"w": jnp.asarray(rng.standard_normal((F, K))), "b": jnp.zeros(K)}
    of_all, of_slices = (fnet.make_evaluate(dense(K), loss, batch_size=size)(params, (), batch) for size in (None, 4))
    z = X @ np.asarray(params["w"])
    each = np.logaddexp.reduce(z, -1) - z[np.arange(N), LABELS]
    weights = C[LABELS] * (SOME >= 0)
    for found in (of_all, of_slices):
        np.testing.assert_allclose(found["loss"].value, weights @ each / weights.sum(), rtol=1e-13)


@engines
def test_fit_takes_labels_to_ignore_and_still_names_those_out_of_range(engine, key):
    loss, model = cross_entropy(ignore_index=-100), dense(K)
    params, state = fnet.init(model, key, jnp.zeros((1, F)))
    step, x = fnet.make_step(engine(model, loss), fnet.sgd(0.1)), X.astype(np.float32)
    ts = fnet.init_train_state(params, fnet.sgd(0.1), key, state)
    end, history = fnet.fit(step, ts, fnet.Batch(x, SOME), epochs=2, batch_size=4)
    plain = fnet.make_step(engine(model, softmax_cross_entropy), fnet.sgd(0.1))
    kept = fnet.Batch(x, LABELS, (SOME >= 0).astype(np.float32))
    expected, weighted = fnet.fit(plain, ts, kept, epochs=2, batch_size=4)
    assert_leaves_close(end.params, expected.params, 1e-6)
    np.testing.assert_allclose(history.epochs["loss"], weighted.epochs["loss"], rtol=1e-6)
    with pytest.raises(fnet.DataError, match=r"^data: cross_entropy: label 7 in example 3 is"):
        fnet.fit(step, ts, fnet.Batch(x, np.where(np.arange(N) == 3, 7, SOME)), epochs=1, batch_size=4)


def test_class_weights_that_are_traced_are_swept_and_differentiated(x64):
    z = rng.standard_normal((N, K))

    def mean(c):
        return fnet.make_evaluate(identity(), cross_entropy(c))((), (), fnet.Batch(z, jnp.asarray(LABELS)))[
            "loss"
        ].value

    each = np.logaddexp.reduce(z, -1) - z[np.arange(N), LABELS]
    swept = jax.jit(jax.vmap(mean))(np.stack([C, 2 * C[::-1]]))
    for found, c in zip(swept, (C, C[::-1]), strict=True):
        np.testing.assert_allclose(found, c[LABELS] @ each / c[LABELS].sum(), rtol=1e-13)
    by_class = (each - np.asarray(mean(C))) @ np.eye(K)[LABELS] / C[LABELS].sum()
    np.testing.assert_allclose(jax.jit(jax.grad(mean))(jnp.asarray(C)), by_class, rtol=1e-11)


def test_a_narrow_label_is_not_wrapped_and_255_may_be_ignored(x64):
    y = np.array([255, 1, 0, 255, 2, 1], np.uint8)  # as in pictures of PASCAL VOC
    found = run(fnet.backprop, cross_entropy(C, 255), fnet.Batch(X, y))
    weights = C[y % 3] * (y < 255)
    assert_same(found, run(fnet.backprop, softmax_cross_entropy, fnet.Batch(X, y % 3, weights)))


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_values_and_means_are_pytorchs(smoothing, x64):
    torch = pytest.importorskip("torch")
    z, p = rng.standard_normal((N, K)), rng.dirichlet(np.ones(K), N)
    settings = {"label_smoothing": smoothing or 0.0}
    for targets, ignore in ((SOME, -100), (p, None)):
        loss = cross_entropy(C, ignore, label_smoothing=smoothing)
        theirs = torch.tensor(z, requires_grad=True)
        their_mean = torch.nn.CrossEntropyLoss(torch.tensor(C), **settings)(theirs, torch.tensor(targets))
        their_mean.backward()
        (_, dz), _, metrics = fnet.backprop(identity(), loss, inputs=True)(
            (), (), fnet.Batch(jnp.asarray(z), jnp.asarray(targets)), None
        )
        np.testing.assert_allclose(metrics["loss"].value, their_mean.item(), rtol=1e-12)
        np.testing.assert_allclose(dz, theirs.grad, rtol=1e-11, atol=1e-15)


# --- targets that are missing in part --------------------------------------------------------------------------------

Y = np.where(rng.uniform(size=(N, K)) < 0.4, np.nan, rng.uniform(size=(N, K)))
ENTRY = np.array([1.0, 2.0, 0.5])[None] * ~np.isnan(Y)  # weights
ENTRIES = {
    "squared_error": (squared_error, lambda z, y: (z - y) ** 2),
    "absolute_error": (absolute_error, lambda z, y: np.abs(z - y)),
    "huber": (huber(0.1), lambda z, y: np.where(abs(z - y) < 0.1, (z - y) ** 2 / 2, 0.1 * (abs(z - y) - 0.05))),
    "pinball": (pinball(0.3), lambda z, y: np.maximum(0.3 * (y - z), -0.7 * (y - z))),
    "poisson": (poisson, lambda z, y: np.exp(z) - y * z),
    "binary": (binary_cross_entropy, lambda z, y: y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)),
    "hinge": (hinge, lambda z, y: np.maximum(0, 1 - (2 * y - 1) * z)),
}


@engines
@pytest.mark.parametrize("name", ENTRIES)
def test_an_output_that_is_missing_counts_nothing_and_its_nan_does_not_leak(name, engine, x64):
    loss, formula = ENTRIES[name]
    z = rng.standard_normal((N, K))
    spoilt = np.where(np.isnan(Y) & (np.arange(K) == 1), np.inf, z)  # whatever the model says there
    gradient = jax.jit(engine(identity(), per_output(loss), inputs=True))
    (_, dz), _, metrics = gradient((), (), jax.tree.map(jnp.asarray, fnet.Batch(spoilt, Y, ENTRY)), None)

    def objective(z):
        return (ENTRY * np.nan_to_num(formula(z, Y))).sum() / ENTRY.sum()

    np.testing.assert_allclose(metrics["loss"].value, objective(z), rtol=1e-13)
    h = 1e-6 * np.eye(N * K).reshape(-1, N, K)
    slopes = np.array([objective(z + d) - objective(z - d) for d in h]).reshape(N, K) / 2e-6
    np.testing.assert_allclose(dz, slopes, atol=1e-9)
    assert (np.asarray(dz)[np.isnan(Y)] == 0).all()


@engines
def test_with_nothing_missing_the_mean_is_over_entries(engine, x64):
    y = np.nan_to_num(Y)
    (per_entry, _), mean = run(engine, per_output(squared_error), fnet.Batch(X, y))
    (summed, _), total = run(engine, squared_error, fnet.Batch(X, y))
    assert_leaves_close(jax.tree.map(lambda g: K * g, per_entry), summed, 1e-13)
    np.testing.assert_allclose(K * mean["loss"].value, total["loss"].value, rtol=1e-13)


@engines
def test_weights_of_examples_hold_for_all_their_entries(engine, x64):
    y = np.nan_to_num(Y)
    found = run(engine, per_output(squared_error), fnet.Batch(X, y, W))
    assert_same(found, run(engine, per_output(squared_error), fnet.Batch(X, y, np.tile(W[:, None], K))))


@engines
def test_fit_and_evaluate_take_targets_that_are_missing_in_part(engine, key):
    model, loss = dense(K), per_output(squared_error)
    params, state = fnet.init(model, key, jnp.zeros((1, F)))
    ts = fnet.init_train_state(params, fnet.sgd(0.1), key, state)
    evaluate = fnet.make_evaluate(model, loss, {"absolute": per_output(absolute_error)}, batch_size=4)
    step = fnet.make_step(engine(model, loss), fnet.sgd(0.1))

    def fitted(y):
        data = fnet.Batch(X.astype(np.float32), y.astype(np.float32), ENTRY.astype(np.float32))
        end, history = fnet.fit(step, ts, data, epochs=2, batch_size=4, evaluate=evaluate, validation=data)
        return end.params, dict(history.epochs), dict(history.evaluations)

    found, expected = fitted(Y), fitted(np.where(np.isnan(Y), 7.0, Y))
    assert_leaves_close(found[0], expected[0], 0)
    for of_nan, of_seven in zip(found[1:], expected[1:], strict=True):
        for name, values in of_seven.items():
            if "time" not in name and "second" not in name:
                np.testing.assert_array_equal(of_nan[name], values)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, kl_divergence, cosine_distance, dice()])
def test_losses_that_compare_entries_are_refused_per_output(loss):
    with pytest.raises(ValueError, match="per_output: the loss of two entries is not the sum of the losses of each"):
        per_output(loss)


@pytest.mark.parametrize("loss", [cross_entropy(C), info_nce()])
def test_losses_that_count_or_mix_examples_are_refused_per_output(loss):
    with pytest.raises(ValueError, match="per_output: the loss counts or mixes examples; expected a sum over entries"):
        per_output(loss)


def test_per_output_takes_hyperparameters_that_are_traced_and_is_made_while_tracing(x64):
    z, y = rng.standard_normal((2, N, K))
    swept = jax.jit(jax.vmap(lambda q: per_output(pinball(q))(z, y)))(np.array([0.2, 0.6]))
    for found, q in zip(swept, (0.2, 0.6), strict=True):
        np.testing.assert_allclose(found, np.maximum(q * (y - z), (q - 1) * (y - z)), rtol=1e-13)
    assert jax.jit(lambda: per_output(squared_error)(z, y))().shape == (N, K)


def test_a_gradient_that_does_not_weight_its_classes_differs_from_autodiff(x64):
    loss, batch = cross_entropy(C), fnet.Batch(X, LABELS)
    forgetful = loss._replace(gradient=softmax_cross_entropy.gradient)
    (by_autodiff, _), _ = run(fnet.autodiff, loss, batch)
    assert_same(run(fnet.backprop, loss, batch)[0][0], by_autodiff)
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(run(fnet.backprop, forgetful, batch)[0][0], by_autodiff)


def test_weights_of_another_shape_than_the_values_are_refused():
    batch = fnet.Batch(jnp.zeros((N, K)), jnp.zeros(N, int), jnp.ones(N - 1))
    with pytest.raises(ValueError, match=r"weights of shape \(5,\) do not fit values of shape \(6,\)"):
        fnet.backprop(identity(), cross_entropy(C))((), (), batch, None)
