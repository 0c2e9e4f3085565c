"""Dense, flatten, activations and serial: forward, backward, paths and errors."""

from __future__ import annotations

import ast
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

import fnet.layers as layers
import fnet.losses
from fnet.layers import dense, flatten, gelu, leaky_relu, relu, serial, softplus, step
from fnet.layers.children import apply
from fnet.layers.initializers import normal, zeros
from fnet.layers.models import mlp
from fnet.types import Layer, LayerError
from tests.conftest import DIFFERENTIATION
from tests.oracles import assert_leaves_close, numerical_gradient

vector_erf = np.vectorize(math.erf, otypes=[np.float64])


def numpy_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# name: layer, input shape, the forward in NumPy float64 from the formula (parameters first)
LAYERS = {
    "dense": (dense(3, bias=normal(1.0)), (5, 4), lambda p, x: x @ p["w"] + p["b"]),
    "dense, no bias": (dense(3, bias=None), (5, 4), lambda p, x: x @ p["w"]),
    "dense over time": (
        dense(3, bias=normal(1.0)),
        (2, 5, 4),
        lambda p, x: np.einsum("bti,io->bto", x, p["w"]) + p["b"],
    ),
    "flatten": (flatten(), (2, 3, 4), lambda p, x: x.reshape(2, 12)),
    "identity": (layers.identity(), (4, 5), lambda p, x: x),
    "step": (step(), (4, 5), lambda p, x: np.where(x >= 0, 1.0, 0.0)),
    "sigmoid": (layers.sigmoid(), (4, 5), lambda p, x: 1 / (1 + np.exp(-x))),
    "tanh": (layers.tanh(), (4, 5), lambda p, x: (np.exp(x) - np.exp(-x)) / (np.exp(x) + np.exp(-x))),
    "relu": (relu(), (4, 5), lambda p, x: np.maximum(x, 0)),
    "leaky relu": (leaky_relu(0.2), (4, 5), lambda p, x: np.where(x > 0, x, 0.2 * x)),
    "gelu": (gelu(), (4, 5), lambda p, x: x * (1 + vector_erf(x / np.sqrt(2))) / 2),
    "gelu, tanh form": (
        gelu(approximate=True),
        (4, 5),
        lambda p, x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
    "softplus": (softplus(), (4, 5), lambda p, x: np.log(1 + np.exp(x))),
    "softmax": (layers.softmax(), (4, 5), lambda p, x: numpy_softmax(x)),
    "serial": (
        serial(flatten(), dense(4, bias=normal(1.0)), layers.tanh(), ("head", dense(2, bias=normal(1.0)))),
        (3, 2, 2),
        lambda p, x: np.tanh(x.reshape(3, 4) @ p["dense_0"]["w"] + p["dense_0"]["b"]) @ p["head"]["w"] + p["head"]["b"],
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def at_random(name, dtype):
    """The layer with random parameters, inputs and cotangent; no input within 0.01 of a kink."""
    layer, shape, oracle = LAYERS[name]
    x_key, p_key, dy_key = jax.random.split(jax.random.key(7), 3)
    x = jax.random.normal(x_key, shape, dtype)
    x = jnp.where(jnp.abs(x) < 0.01, jnp.asarray(0.5, dtype), x)
    params, state = layer.init(p_key, x)
    dy = jax.random.normal(dy_key, apply(layer, params, state, x).shape, dtype)
    return layer, oracle, params, state, x, dy


def backward_by_hand(layer, params, state, x, dy):
    _, _, residuals = layer.forward(params, state, x, key=None, train=True)
    return layer.backward(params, residuals, dy)


def backward_by_autodiff(layer, params, state, x, dy):
    _, pull = jax.vjp(lambda params, x: apply(layer, params, state, x), params, x)
    return pull(dy)


@every_layer
def test_forward_equals_the_formula_in_numpy(name, x64):
    layer, oracle, params, state, x, _ = at_random(name, jnp.float64)
    expected = oracle(jax.tree.map(np.asarray, params), np.asarray(x))
    np.testing.assert_allclose(apply(layer, params, state, x), expected, rtol=1e-13, atol=1e-14)


@every_layer
def test_backward_equals_finite_differences_of_the_numpy_formula(name, x64):
    layer, oracle, params, state, x, dy = at_random(name, jnp.float64)
    params = jax.tree.map(np.asarray, params)
    dparams, dx = backward_by_hand(layer, params, state, x, dy)
    np.testing.assert_allclose(
        dx, numerical_gradient(lambda x: (oracle(params, x) * dy).sum(), x), rtol=1e-7, atol=1e-8
    )
    leaves, tree = jax.tree.flatten(params)
    for i, claimed in enumerate(jax.tree.leaves(dparams)):

        def along(leaf, i=i):
            return (oracle(jax.tree.unflatten(tree, [*leaves[:i], leaf, *leaves[i + 1 :]]), np.asarray(x)) * dy).sum()

        np.testing.assert_allclose(claimed, numerical_gradient(along, leaves[i]), rtol=1e-7, atol=1e-8)


@every_layer
def test_backward_equals_autodiff_in_float64(name, x64):
    layer, _, params, state, x, dy = at_random(name, jnp.float64)
    assert_leaves_close(
        backward_by_hand(layer, params, state, x, dy), backward_by_autodiff(layer, params, state, x, dy), 1e-14
    )


@every_layer
def test_backward_in_float32_is_that_of_float64_up_to_rounding(name):
    layer, _, params, state, x, dy = at_random(name, jnp.float32)
    single = backward_by_hand(layer, params, state, x, dy)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(single))
    with jax.enable_x64(True):
        params, x, dy = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (params, x, dy))
        double = backward_by_hand(layer, params, state, x, dy)
        assert_leaves_close(single, double, 2e-6)  # some 16 roundings of 2^-24


@every_layer
def test_layers_run_under_jit_and_keep_their_dtype(name):
    layer, _, params, state, x, dy = at_random(name, jnp.float32)
    y = jax.jit(lambda p, x: apply(layer, p, state, x))(params, x)
    assert y.dtype == x.dtype
    dparams, dx = jax.jit(lambda p, x, dy: backward_by_hand(layer, p, state, x, dy))(params, x, dy)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), dparams) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("fault", ["transposed", "bias forgotten", "factor"])
def test_a_wrong_backward_fails_the_comparisons_above(fault, x64):
    layer, _, params, state, x, dy = at_random("dense", jnp.float64)
    x = x[:4, :]
    dy = dy[:4, :]
    (dparams, dx), right = (
        backward_by_hand(layer, params, state, x, dy),
        backward_by_autodiff(layer, params, state, x, dy),
    )
    wrong = {
        "transposed": ({**dparams, "w": (dy.T @ x).reshape(4, 3)}, dx),
        "bias forgotten": ({**dparams, "b": 0 * dparams["b"]}, dx),
        "factor": (dparams, dx * (1 + 1e-9)),
    }[fault]
    with pytest.raises(AssertionError, match="differs by"):
        assert_leaves_close(wrong, right, 1e-14)


# --- kinks, extremes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "slope"), [(relu(), 0.0), (leaky_relu(0.2), 0.2), (step(), 0.0)])
def test_subgradients_at_zero_are_the_named_ones_by_hand_and_by_autodiff(layer, slope):
    x = jnp.asarray([[0.0, -0.0, 1.0]])
    for _, dx in (
        backward_by_hand(layer, (), (), x, jnp.ones_like(x)),
        backward_by_autodiff(layer, (), (), x, jnp.ones_like(x)),
    ):
        np.testing.assert_array_equal(dx[0, :2], np.float32(slope))


@pytest.mark.parametrize(
    "name",
    ["identity", "step", "sigmoid", "tanh", "relu", "leaky relu", "gelu", "gelu, tanh form", "softplus", "softmax"],
)
def test_activations_are_finite_at_extremes_and_pass_nan(name):
    layer, _, _ = LAYERS[name]
    x = jnp.asarray([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    y = apply(layer, (), (), x)
    _, dx = backward_by_hand(layer, (), (), x, jnp.ones_like(x))
    _, dx_autodiff = backward_by_autodiff(layer, (), (), x, jnp.ones_like(x))
    assert np.isfinite(y).all() and np.isfinite(dx).all()
    np.testing.assert_allclose(dx, dx_autodiff, rtol=1e-6, atol=1e-7)
    assert np.isnan(apply(layer, (), (), jnp.asarray([[jnp.nan, 1.0]]))[0, 0])


def test_gelu_keeps_its_digits_far_in_the_negative_tail(x64):
    # x Φ(x) at -10 by the asymptotic series of Mills' ratio, φ(10) (1 - 1/100 + 3/10^4 - 15/10^6 + 105/10^8 - ...)
    series = sum(c / 10 ** (2 * i) for i, c in enumerate([1, -1, 3, -15, 105, -945, 10395, -135135]))
    expected = -math.exp(-50) / math.sqrt(2 * math.pi) * series
    np.testing.assert_allclose(apply(gelu(), (), (), jnp.asarray([[-10.0]]))[0, 0], expected, rtol=1e-8)
    assert erf(jnp.asarray(-10 / math.sqrt(2))) == -1  # the form with 1 + erf gives 0 there


def test_softplus_is_exact_where_exp_overflows():
    np.testing.assert_array_equal(
        apply(softplus(), (), (), jnp.asarray([[200.0, -200.0]])), np.float32([[200.0, np.exp(-200.0)]])
    )


# --- names, keys, errors ---------------------------------------------------------------------------------------------


def test_children_are_named_by_kind_and_count_or_as_given():
    params, state = serial(dense(4), relu(), ("head", dense(3)), dense(2)).init(jax.random.key(0), jnp.zeros((1, 5)))
    assert list(params) == list(state) == ["dense_0", "relu_0", "head", "dense_1"]


def test_two_children_of_one_name_are_refused():
    with pytest.raises(ValueError, match="2 children are called 'a'"):
        serial(("a", relu()), ("a", relu()))


def test_parameters_depend_on_the_path_alone():
    x = jnp.zeros((1, 4))
    plain, _ = serial(dense(4), dense(4)).init(jax.random.key(0), x)
    longer, _ = serial(dense(4), relu(), relu(), dense(4)).init(jax.random.key(0), x)
    np.testing.assert_array_equal(plain["dense_1"]["w"], longer["dense_1"]["w"])
    assert not np.array_equal(plain["dense_0"]["w"], plain["dense_1"]["w"])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.zeros((2, 3)), "block/dense_0: expected 5 features, got 3"),
        (jnp.zeros(5), r"block/dense_0: expected a batch axis and 5 features, got shape \(5,\)"),
        (jnp.zeros((2, 5), jnp.int32), "block/dense_0: expected float32 features like its parameters, got int32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_path(x, message):
    model = serial(("block", serial(dense(4), relu())), dense(2))
    params, state = model.init(jax.random.key(0), jnp.zeros((1, 5)))
    with pytest.raises(LayerError, match=f"^{message}"):
        apply(model, params, state, x)


def test_parameters_or_state_of_another_model_are_refused_with_the_names_expected():
    model = serial(dense(4), ("block", serial(dense(2))))
    params, state = model.init(jax.random.key(0), jnp.zeros((1, 5)))
    with pytest.raises(
        LayerError, match=r"^expected state of the children \['dense_0', 'block'\], got \(\): pass what"
    ):
        apply(model, params, (), jnp.zeros((2, 5)))
    with pytest.raises(LayerError, match=r"^block: expected params of the children \['dense_0'\], got \['w'\]"):
        apply(model, {**params, "block": {"w": 1}}, state, jnp.zeros((2, 5)))


def test_init_refuses_integer_features_and_missing_axes():
    with pytest.raises(LayerError, match="dense_0: expected floating features, got uint8"):
        mlp(3).init(jax.random.key(0), jax.ShapeDtypeStruct((1, 5), jnp.uint8))
    with pytest.raises(LayerError, match="dense_0: expected a batch axis"):
        mlp(3).init(jax.random.key(0), jax.ShapeDtypeStruct((5,), jnp.float32))
    with pytest.raises(ValueError, match="dense: units = 0; expected at least 1"):
        dense(0)
    with pytest.raises(ValueError, match="mlp: no widths given"):
        mlp()


def test_init_allocates_nothing_under_eval_shape_and_draws_biases_by_their_initializer():
    params, _ = jax.eval_shape(
        lambda key: mlp(10**6).init(key, jax.ShapeDtypeStruct((1, 10**6), jnp.float32)), jax.random.key(0)
    )
    assert params["dense_0"]["w"].shape == (10**6, 10**6)
    params, _ = serial(dense(3, weights=zeros())).init(jax.random.key(0), jnp.zeros((1, 2)))
    assert not params["dense_0"]["w"].any() and not params["dense_0"]["b"].any()


# --- the backward is by hand, and inference is only inference --------------------------------------------------------

MODULES = [path for room in (layers, fnet.losses) for path in sorted(pathlib.Path(room.__file__).parent.glob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_with_hand_backwards_names_a_differentiation_function(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}
    assert used
    assert not used & DIFFERENTIATION


@every_layer
def test_backward_runs_with_differentiation_switched_off(name, no_autodiff):
    layer, _, params, state, x, dy = at_random(name, jnp.float32)
    backward_by_hand(layer, params, state, x, dy)


def test_switching_differentiation_off_does_stop_it(no_autodiff):
    with pytest.raises(AssertionError, match="differentiation was called"):
        jax.grad(jnp.sin)(1.0)
    with pytest.raises(AssertionError, match="differentiation was called"):
        backward_by_autodiff(LAYERS["tanh"][0], (), (), jnp.ones((1, 2)), jnp.ones((1, 2)))


def test_inference_computes_no_residuals():
    """A layer whose residual is dear: in inference the compiled program is as if there were none."""

    def forward(params, state, x, *, key=None, train=False):
        return x * 2, state, jnp.linalg.inv(x @ x.T)

    dear = Layer("dear", lambda key, x: ((), ()), forward, lambda params, residuals, dy: ((), 2 * dy))
    x = jnp.ones((8, 8))
    inference = jax.jit(lambda x: apply(serial(dear), {"dear_0": ()}, {"dear_0": ()}, x)).lower(x).compile().as_text()
    training = jax.jit(lambda x: serial(dear).forward({"dear_0": ()}, {"dear_0": ()}, x)).lower(x).compile().as_text()
    assert "custom-call" not in inference and "dot(" not in inference
    assert "custom-call" in training or "dot(" in training


def test_inference_of_an_mlp_returns_and_keeps_only_its_outputs():
    model = mlp(64, 32, 8, activation=gelu())
    params, state = model.init(jax.random.key(0), jnp.zeros((16, 20)))
    x = jnp.ones((16, 20))
    with_residuals = jax.jit(lambda p, x: model.forward(p, state, x)).lower(params, x).compile()
    inference = jax.jit(lambda p, x: apply(model, p, state, x)).lower(params, x).compile()
    assert inference.memory_analysis().output_size_in_bytes == 16 * 8 * 4
    assert with_residuals.memory_analysis().output_size_in_bytes > 16 * (64 + 32) * 4


def test_compiled_operations_carry_the_layers_path():
    model = serial(("block", serial(dense(4))))
    params, state = model.init(jax.random.key(0), jnp.zeros((1, 3)))
    text = jax.jit(lambda p, x: apply(model, p, state, x)).lower(params, jnp.ones((2, 3))).compile().as_text()
    assert "block/dense_0" in text


@pytest.mark.parametrize(
    ("layer", "params"),
    [
        (dense(3), {"w": jnp.ones((5, 3))}),
        (dense(3), {"w": jnp.ones((5, 9)), "b": jnp.ones(9)}),
        (dense(3), {"w": jnp.ones((5, 3)), "b": jnp.ones(1)}),
        (dense(3), {"b": jnp.ones(3)}),
        (dense(3), ()),
        (layers.layer_norm(), {"gamma": jnp.ones(5), "beta": jnp.ones(5)}),
        (layers.layer_norm(), {}),
        (layers.group_norm(5), {"scale": jnp.ones(5)}),
        (layers.conv(3, (3,)), {"w": jnp.ones((2, 5, 3)), "b": jnp.ones(3)}),
        (layers.gru(3), {"input": {"w": jnp.ones((5, 12))}, "recurrent": {"w": jnp.ones((3, 12))}, "b": jnp.ones(12)}),
        (layers.lstm(3), {"input": {"w": jnp.ones((5, 12))}, "recurrent": {"w": jnp.ones((3, 12))}}),
    ],
    ids=range(11),
)
def test_parameters_of_another_tree_or_shape_are_refused_by_path(layer, params):
    model = serial(("first", layer))
    x = jnp.ones((2, 4, 5))
    with pytest.raises(LayerError, match=r"^first: expected params .*, got .*: pass what init returned"):
        model.forward({"first": params}, {"first": ()}, x)


@pytest.mark.parametrize(
    "layer",
    [dense(2), relu(), layers.layer_norm(), layers.batch_norm(), layers.dropout(0.5), layers.residual(dense(5))],
    ids=lambda layer: layer.name,
)
def test_a_tuple_where_one_array_belongs_is_named_by_path(layer, key):
    model = serial(("first", layer))
    x = jnp.ones((2, 4, 5))
    params, state = model.init(key, x)
    with pytest.raises(
        LayerError, match=r"^first.*: expected one array, got a tuple of float32\[2, 4, 5\], bool\[2, 4\]"
    ):
        model.forward(params, state, (x, jnp.ones((2, 4), bool), None), key=key)


@pytest.mark.parametrize(
    "build",
    [dense, lambda n: layers.conv(n, (3,)), layers.attention, layers.lstm, layers.group_norm, layers.learned_positions],
    ids=["dense", "conv", "attention", "lstm", "group_norm", "learned_positions"],
)
def test_sizes_that_are_not_whole_numbers_are_refused(build):
    for wrong in (2.5, "3", True):
        with pytest.raises(ValueError, match="expected a whole number of at least 1"):
            build(wrong)


@pytest.mark.parametrize("layer", [layers.lstm(4), layers.attention(1)], ids=lambda layer: layer.name)
def test_sequences_without_a_step_are_refused(layer, key):
    params, state = layer.init(key, jax.ShapeDtypeStruct((2, 3, 2), "float32"))
    with pytest.raises(LayerError, match=r"expected .*at least one step.*\(2, 0, 2\)"):
        layer.forward(params, state, jnp.ones((2, 0, 2)))


@pytest.mark.parametrize(
    "layer",
    [flatten(), layers.lstm(4), layers.gru(4), layers.rnn(4), layers.attention(1)],
    ids=lambda layer: layer.name,
)
def test_empty_batches_pass(layer, key):
    shape = (0, 3, 2)
    params, state = layer.init(key, jax.ShapeDtypeStruct(shape, "float32"))
    y, _, residuals = layer.forward(params, state, jnp.ones(shape))
    dparams, dx = layer.backward(params, residuals, y)
    assert dx.shape == shape and y.shape[0] == shape[0]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(dparams))
