"""The seam: autodiff, backprop and plain losses give the same gradients through one signature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.core.numerics import weighted_mean
from fnet.layers import dense, gelu, relu, serial, sigmoid, tanh
from fnet.layers.children import parameter_paths
from fnet.metrics import accuracy, confusion
from fnet.types import Mean
from tests.oracles import assert_leaves_close

ENGINES = {"autodiff": fnet.autodiff, "backprop": fnet.backprop}
both_engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


def small_problem(weights=None, dtype=jnp.float32, examples=12):
    model = serial(dense(7), tanh(), dense(6), relu(), dense(3))
    x_key, y_key, p_key = jax.random.split(jax.random.key(3), 3)
    inputs = jax.random.normal(x_key, (examples, 5), dtype)
    batch = fnet.Batch(inputs, jax.random.randint(y_key, (examples,), 0, 3), weights)
    params, state = model.init(p_key, inputs)
    return model, params, state, batch


def numpy_gradients(params, x, labels, weights):
    """784-style backpropagation of tanh/relu/softmax cross-entropy in NumPy float64, from the chain rule."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x, labels, w = np.asarray(x, np.float64), np.asarray(labels), np.asarray(weights, np.float64)
    a1 = np.tanh(x @ p["dense_0"]["w"] + p["dense_0"]["b"])
    z2 = a1 @ p["dense_1"]["w"] + p["dense_1"]["b"]
    a2 = np.maximum(z2, 0)
    z3 = a2 @ p["dense_2"]["w"] + p["dense_2"]["b"]
    q = np.exp(z3) / np.exp(z3).sum(1, keepdims=True)
    loss = (w * -np.log(q[np.arange(len(x)), labels])).sum() / w.sum()
    d3 = (q - np.eye(3)[labels]) * (w / w.sum())[:, None]
    d2 = d3 @ p["dense_2"]["w"].T * (z2 > 0)
    d1 = d2 @ p["dense_1"]["w"].T * (1 - a1**2)
    grads = {
        "dense_0": {"w": x.T @ d1, "b": d1.sum(0)},
        "tanh_0": (),
        "dense_1": {"w": a1.T @ d2, "b": d2.sum(0)},
        "relu_0": (),
        "dense_2": {"w": a2.T @ d3, "b": d3.sum(0)},
    }
    return loss, grads, d1 @ p["dense_0"]["w"].T


@both_engines
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_equal_backpropagation_in_numpy(engine, weighted, x64):
    weights = jnp.linspace(0, 2, 12, dtype=jnp.float64) if weighted else None
    model, params, state, batch = small_problem(weights, jnp.float64)
    gradient = jax.jit(engine(model, fnet.softmax_cross_entropy, inputs=True))
    (dparams, dx), _, metrics = gradient(params, state, batch, jax.random.key(0))
    loss, expected, expected_dx = numpy_gradients(
        params, batch.inputs, batch.targets, np.ones(12) if weights is None else weights
    )
    np.testing.assert_allclose(metrics["loss"].value, loss, rtol=1e-14)
    assert_leaves_close((dparams, dx), (expected, expected_dx), 1e-13)


def test_engines_return_the_same_metrics_and_their_trees_are_alike():
    model, params, state, batch = small_problem()
    measured = {"accuracy": accuracy, "confusion": confusion(3)}
    results = [
        jax.jit(engine(model, fnet.softmax_cross_entropy, measured))(params, state, batch, jax.random.key(0))
        for engine in ENGINES.values()
    ]
    (_, _, first), (grads, _, second) = results
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    np.testing.assert_array_equal(first["confusion"].sum, second["confusion"].sum)
    assert first["confusion"].sum.sum() == 12 and first["accuracy"].count == 12
    labels = np.asarray(fnet.apply(model, params, state, batch.inputs)).argmax(1)
    assert int(first["accuracy"].sum) == (labels == np.asarray(batch.targets)).sum()
    assert jax.tree.structure(grads) == jax.tree.structure(params)


@both_engines
def test_an_example_of_weight_zero_counts_nothing_even_if_its_loss_is_infinite(engine):
    model, params, state, batch = small_problem()
    gradient = jax.jit(engine(model, fnet.softmax_cross_entropy))
    short = jax.tree.map(lambda a: a[:11], batch)
    padded = batch._replace(weights=jnp.ones(12).at[11].set(0))
    expected, _, loss = gradient(params, state, short, jax.random.key(0))
    actual, _, padded_loss = gradient(params, state, padded, jax.random.key(0))
    assert_leaves_close(actual, expected, 1e-6)
    np.testing.assert_allclose(padded_loss["loss"].value, loss["loss"].value, rtol=1e-6)


@both_engines
def test_zero_weights_give_zero_gradients_and_zero_loss(engine):
    model, params, state, batch = small_problem(jnp.zeros(12))
    grads, _, metrics = jax.jit(engine(model, fnet.softmax_cross_entropy))(params, state, batch, jax.random.key(0))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
    assert metrics["loss"].value == 0


@both_engines
def test_gradient_of_integer_inputs_is_none(engine):
    """A model of (numbers, codes) of which only the numbers have a gradient."""

    def forward(params, state, x, *, key=None, train=False):
        numbers, codes = x
        return numbers * params["scale"][None] + params["shift"][codes], state, (numbers, codes)

    def backward(params, residuals, dy):
        numbers, codes = residuals
        dshift = jnp.zeros_like(params["shift"]).at[codes].add(dy)
        return {"scale": (dy * numbers).sum(0), "shift": dshift}, (dy * params["scale"][None], None)

    params = {"scale": jnp.asarray([2.0, 3.0]), "shift": jnp.ones((4, 2))}
    model = fnet.Layer("codes", lambda key, x: (params, ()), forward, backward)
    batch = fnet.Batch((jnp.ones((3, 2)), jnp.asarray([0, 3, 3])), jnp.zeros((3, 2)))
    (dparams, dx), _, _ = engine(model, fnet.losses.squared_error, inputs=True)(params, (), batch, None)
    assert dx[1] is None
    # outputs are 3 and 4, so dy = 2·(3, 4)/3 for each of the three examples
    np.testing.assert_allclose(dx[0], np.tile([2 * 3 / 3 * 2, 2 * 4 / 3 * 3], (3, 1)), rtol=1e-6)
    np.testing.assert_allclose(dparams["shift"], np.asarray([[2, 8 / 3], [0, 0], [0, 0], [4, 16 / 3]]), rtol=1e-6)


def test_a_plain_loss_function_needs_no_layers():
    def loss_fn(params, batch, key):
        return ((batch.inputs @ params["w"] - batch.targets) ** 2).mean()

    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    y = x @ np.float32([1, -2, 3])
    params = {"w": jnp.zeros(3)}
    grads, state, metrics = fnet.from_loss(loss_fn)(
        params, (), fnet.Batch(jnp.asarray(x), jnp.asarray(y)), jax.random.key(0)
    )
    np.testing.assert_allclose(grads["w"], -2 * x.T @ y / 8, rtol=1e-5)
    assert state == ()
    assert metrics["loss"].count == 8
    np.testing.assert_allclose(metrics["loss"].value, (y**2).mean(), rtol=1e-6)


def test_a_plain_loss_function_may_carry_state_and_metrics():
    def loss_fn(params, state, batch, key):
        return (
            (params * batch.inputs).sum(),
            state + 1,
            {"seen": jnp.asarray(5.0), "hits": Mean(jnp.ones(()), jnp.ones(()) * 4)},
        )

    gradient = fnet.from_loss(loss_fn, has_state=True)
    grads, state, metrics = gradient(jnp.asarray(2.0), jnp.asarray(1), fnet.Batch(jnp.ones(3), ()), None)
    assert (grads, state) == (3, 2)
    assert (metrics["seen"].value, metrics["hits"].value) == (5, 0.25)


def test_a_loss_that_is_no_scalar_is_refused():
    gradient = fnet.from_loss(lambda params, batch, key: params * batch.inputs)
    with pytest.raises(ValueError, match=r"from_loss: the loss is float32\[3\]; expected a scalar, one float"):
        gradient(jnp.asarray(1.0), (), fnet.Batch(jnp.ones(3), ()), None)


@pytest.mark.parametrize("parts", [2, 4, 6])
def test_a_plain_loss_in_parts_is_the_weighted_batchs_gradient(parts, x64):
    def loss_fn(params, batch, key):
        return (batch.weights * (params * batch.inputs - batch.targets) ** 2).sum() / batch.weights.sum()

    x, y, w = np.arange(6.0), np.array([1.0, 0, 2, 5, 1, 3]), np.array([1.0, 1, 1, 5, 5, 5])
    batch = fnet.Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray(w))
    gradient = fnet.accumulate(fnet.from_loss(loss_fn), parts)
    grads, _, metrics = gradient(jnp.asarray(0.5), (), batch, jax.random.key(0))
    np.testing.assert_allclose(grads, (w * 2 * (0.5 * x - y) * x).sum() / w.sum(), rtol=1e-12)
    assert metrics["loss"].count == w.sum()
    np.testing.assert_allclose(metrics["loss"].value, (w * (0.5 * x - y) ** 2).sum() / w.sum(), rtol=1e-12)


@pytest.mark.parametrize("parts, sizes", [(7, [2, 2, 1, 1, 1, 1, 1]), (2, [5, 4]), (3, [3, 3, 3]), (9, [1] * 9)])
def test_a_batch_is_taken_in_exactly_so_many_parts(parts, sizes):
    def loss_fn(params, state, batch, key):  # the state tells each part's size and key, one after another
        place = jnp.arange(9) == state["part"]
        sizes = jnp.where(place, batch.shape[0], state["sizes"])
        keys = jnp.where(place[:, None], jax.random.key_data(key), state["keys"])
        return params * batch.mean(), {"part": state["part"] + 1, "sizes": sizes, "keys": keys}, {}

    state = {"part": jnp.asarray(0), "sizes": jnp.zeros(9, jnp.int32), "keys": jnp.zeros((9, 2), jnp.uint32)}
    gradient = fnet.accumulate(fnet.from_loss(loss_fn, has_state=True), parts)
    grads, state, _ = gradient(jnp.ones(()), state, jnp.arange(9.0), jax.random.key(3))
    assert state["part"] == parts and state["sizes"].tolist() == sizes + [0] * (9 - parts)
    for i in range(parts):
        assert (state["keys"][i] == jax.random.key_data(jax.random.fold_in(jax.random.key(3), i))).all()
    np.testing.assert_allclose(grads, 4, rtol=1e-6)


@pytest.mark.parametrize("activation", [relu(), gelu(), sigmoid()], ids=lambda layer: layer.name)
def test_500_steps_by_hand_and_by_autodiff_are_one_trajectory_in_float64(activation, x64):
    model = fnet.mlp(16, 8, 4, activation=activation)
    x_key, y_key = jax.random.split(jax.random.key(0))
    data = fnet.Batch(jax.random.normal(x_key, (80, 10), jnp.float64), jax.random.randint(y_key, (80,), 0, 4))
    params, state = fnet.init(model, jax.random.key(1), data.inputs)
    losses = []
    for engine in ENGINES.values():
        optimizer = fnet.adam(0.01)
        step = fnet.make_step(engine(model, fnet.softmax_cross_entropy), optimizer)
        ts = fnet.init_train_state(params, optimizer, jax.random.key(2), state)
        run = jax.jit(lambda ts, data, step=step: fnet.train(step, ts, data, epochs=50, batch_size=8))
        losses.append(np.asarray(run(ts, data)[1]["loss"].value).reshape(-1))
    assert losses[0].shape == (500,) and losses[0][-1] < 0.8 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-11)


def test_program_of_backprop_holds_no_more_products_than_needed():
    """Forward 3, weight gradients 3, input gradients 2: the first layer's is not computed."""
    model = fnet.mlp(6, 5, 4)
    params, state = model.init(jax.random.key(0), jnp.zeros((2, 3)))
    batch = fnet.Batch(jnp.ones((2, 3)), jnp.asarray([0, 1]))
    for engine in ENGINES.values():
        gradient = engine(model, fnet.softmax_cross_entropy)
        lowered = jax.jit(lambda p, b, g=gradient: g(p, state, b, None)[0]).lower(params, batch)
        assert lowered.compile().as_text().count(" dot(") == 8


def test_weighted_mean_of_any_leading_axes():
    values = jnp.arange(12.0).reshape(2, 3, 2)
    w = jnp.asarray([1.0, 3.0])
    mean = weighted_mean(values, w, axes=2)
    np.testing.assert_allclose(
        mean.sum, (np.arange(12.0).reshape(2, 3, 2) * np.asarray([1, 3])[:, None, None]).sum((0, 1))
    )
    assert mean.count == 12
    assert weighted_mean(values, None, axes=1).count == 2
    with pytest.raises(
        ValueError, match=r"weights of shape \(3,\) do not fit values of shape \(2, 3, 2\): expected \(2, 3\)"
    ):
        weighted_mean(values, jnp.ones(3), axes=2)


def test_parameter_paths_stand_in_model_order_even_past_ten_layers():
    paths = parameter_paths(fnet.mlp(*[3] * 12), jax.ShapeDtypeStruct((1, 2), jnp.float32))
    assert paths == [f"dense_{i}/{name}" for i in range(12) for name in ("w", "b")]
