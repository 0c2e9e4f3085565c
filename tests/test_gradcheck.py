"""The first gradient check: three ways, one row per leaf, and wrong gradients are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.gradcheck import check_model, compare
from fnet.layers import dense, relu, serial, tanh
from fnet.types import Layer, Loss


def batch(examples=6):
    x_key, y_key = jax.random.split(jax.random.key(3))
    return fnet.Batch(jax.random.normal(x_key, (examples, 4)), jax.random.randint(y_key, (examples,), 0, 3))


def faulty_dense(units, fault):
    """A dense layer whose backward has one fault."""
    right = dense(units)

    def backward(params, residuals, dy):
        grads, dx = right.backward(params, residuals, dy)
        w, b = grads["w"], grads["b"]
        return {
            "zero": ({"w": 0 * w, "b": b}, dx),
            "sign": ({"w": -w, "b": b}, dx),
            "half": ({"w": w / 2, "b": b}, dx),
            "one entry": ({"w": w.at[1, 2].add(1e-3 * jnp.abs(w).max()), "b": b}, dx),
            "one row": ({"w": w.at[2].set(0), "b": b}, dx),
            "bias": ({"w": w, "b": jnp.zeros_like(b)}, dx),
            "input": (grads, 1.01 * dx),
            "not a number": ({"w": w.at[0, 0].set(jnp.nan), "b": b}, dx),
        }[fault]

    return right._replace(backward=backward)


def test_right_gradients_pass_and_every_leaf_has_a_row():
    report = check_model(fnet.mlp(5, 4, 3), fnet.softmax_cross_entropy, batch(), key=jax.random.key(0))
    assert report.ok, str(report)
    assert [leaf.path for leaf in report.leaves] == [f"dense_{i}/{name}" for i in range(3) for name in ("w", "b")]
    assert report.leaves[0].shape == (4, 5)
    report.raise_if_wrong()
    lines = str(report).splitlines()
    assert len(lines) == 7 and lines[1].startswith("dense_0/w  (4, 5)") and lines[1].endswith("ok")


@pytest.mark.parametrize("fault", ["zero", "sign", "half", "one entry", "one row", "not a number"])
def test_a_faulty_weight_gradient_is_refused_and_its_leaf_named(fault):
    model = serial(dense(5), tanh(), ("wrong", faulty_dense(3, fault)))
    report = check_model(model, fnet.softmax_cross_entropy, batch(), key=jax.random.key(0))
    assert {leaf.path: leaf.verdict for leaf in report.leaves} == {
        "dense_0/w": "ok",
        "dense_0/b": "ok",
        "wrong/w": "wrong",
        "wrong/b": "ok",
    }
    with pytest.raises(AssertionError, match="wrong/w"):
        report.raise_if_wrong()


def test_a_faulty_bias_is_named_and_its_worst_entry_shown_with_both_values():
    report = check_model(serial(faulty_dense(3, "bias")), fnet.softmax_cross_entropy, batch(), key=jax.random.key(0))
    (leaf,) = [leaf for leaf in report.leaves if leaf.verdict == "wrong"]
    assert leaf.path == "dense_0/b" and leaf.claimed == 0 and leaf.expected != 0
    assert leaf.against_autodiff == 1
    np.testing.assert_allclose(leaf.against_differences, 1, rtol=0.5)  # only some directions meet the worst entry
    assert f"wrong at {list(leaf.worst)}: 0, expected {leaf.expected:.6g}" in str(report)


def test_a_faulty_input_gradient_shows_in_the_layers_below():
    model = serial(dense(5), tanh(), faulty_dense(3, "input"))
    report = check_model(model, fnet.softmax_cross_entropy, batch(), key=jax.random.key(0))
    assert [leaf.verdict for leaf in report.leaves] == ["wrong", "wrong", "ok", "ok"]


def test_a_faulty_loss_gradient_is_refused():
    missing_factor = Loss(fnet.losses.squared_error.value, fnet.losses.half_squared_error.gradient)
    data = fnet.Batch(jnp.ones((2, 4)), jnp.ones((2, 3)))
    assert not check_model(serial(dense(3)), missing_factor, data, key=jax.random.key(0)).ok
    assert check_model(serial(dense(3)), fnet.losses.squared_error, data, key=jax.random.key(0)).ok


def test_finite_differences_convict_a_forward_whose_autodiff_agrees_with_a_wrong_backward():
    """A custom rule wrong in the same way as the backward: only the third witness sees it."""

    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, dy: (2 * x * x * dy,))
    inner = Layer(
        "cube",
        lambda key, x: ((), ()),
        lambda params, state, x, *, key=None, train=False: (cube(x), state, x),
        lambda params, x, dy: ((), 2 * x * x * dy),
    )
    report = check_model(serial(dense(3), inner), fnet.softmax_cross_entropy, batch(), key=jax.random.key(0))
    assert all(leaf.against_autodiff < 1e-12 and leaf.against_differences > 1e-2 for leaf in report.leaves)
    assert not report.ok


def test_weights_of_the_examples_and_given_parameters_take_part():
    model = fnet.mlp(5, 3, activation=relu())
    data = batch()
    params, state = model.init(jax.random.key(1), data.inputs)
    weighted = data._replace(weights=jnp.asarray([0, 1, 2, 0, 0.5, 1]))
    report = check_model(model, fnet.softmax_cross_entropy, weighted, key=jax.random.key(0), params=params, state=state)
    assert report.ok, str(report)


def test_a_gradient_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"w: the gradient has shape \(3,\), the parameter \(2,\)"):
        compare(lambda p: p["w"].sum(), {"w": np.ones(2)}, {"w": np.ones(3)}, {"w": np.ones(2)})


def test_the_callers_precision_is_left_as_it_was():
    check_model(
        serial(dense(2)), fnet.softmax_cross_entropy, batch()._replace(targets=jnp.zeros(6, int)), key=jax.random.key(0)
    )
    assert jnp.ones(1).dtype == jnp.float32
