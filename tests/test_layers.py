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
from fnet.report import summary
from fnet.types import Layer, LayerError
from tests.conftest import DIFFERENTIATION
from tests.oracles import assert_leaves_close, numerical_gradient

vector_erf = np.vectorize(math.erf, otypes=[np.float64])


def numpy_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def hard_swish64(z):
    return z * np.clip(z + 3, 0, 6) / 6


def numpy_squeezed(f, g):
    """Of ``x (B, *S, C)``, example by example."""

    def oracle(p, x):
        p, y = p["branches"]["gate"], np.zeros_like(x)
        for i, example in enumerate(x):
            means = example.reshape(-1, x.shape[-1]).mean(0)
            hidden = f(means @ p["dense_0"]["w"] + p["dense_0"].get("b", 0.0))
            y[i] = example * g(hidden @ p["dense_1"]["w"] + p["dense_1"].get("b", 0.0))
        return y

    return oracle


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
    "softplus, beta 3": (softplus(3.0), (4, 5), lambda p, x: np.log(1 + np.exp(3 * x)) / 3),
    "hard_tanh": (layers.hard_tanh(-0.5, 1.0), (4, 5), lambda p, x: np.clip(x, -0.5, 1)),
    "hardmax": (layers.hardmax(), (4, 5), lambda p, x: np.eye(5)[x.argmax(-1)]),
    "threshold": (layers.threshold(0.3, -2.0), (4, 5), lambda p, x: np.where(x > 0.3, x, -2)),
    "shrink": (
        layers.shrink(0.4, 0.2),
        (4, 5),
        lambda p, x: np.where(x > 0.4, x - 0.2, np.where(x < -0.4, x + 0.2, 0)),
    ),
    "tanh_shrink": (layers.tanh_shrink(), (4, 5), lambda p, x: x - np.tanh(x)),
    "softmax": (layers.softmax(), (4, 5), lambda p, x: numpy_softmax(x)),
    "silu": (layers.silu(), (4, 5), lambda p, x: x / (1 + np.exp(-x))),
    "silu, beta -0.5": (layers.silu(-0.5), (4, 5), lambda p, x: x / (1 + np.exp(0.5 * x))),
    "elu": (layers.elu(0.7), (4, 5), lambda p, x: np.where(x > 0, x, 0.7 * (np.exp(x) - 1))),
    "celu": (layers.celu(0.7), (4, 5), lambda p, x: np.where(x > 0, x, 0.7 * (np.exp(x / 0.7) - 1))),
    "selu": (  # the constants of the paper, as it prints them
        layers.selu(),
        (4, 5),
        lambda p, x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * (np.exp(x) - 1)),
    ),
    "mish": (layers.mish(), (4, 5), lambda p, x: x * np.tanh(np.log(1 + np.exp(x)))),
    "softsign": (layers.softsign(), (4, 5), lambda p, x: x / (1 + np.abs(x))),
    "hard_sigmoid": (
        serial(dense(5, bias=normal(3.0)), layers.hard_sigmoid()),  # so that all three pieces are met
        (4, 5),
        lambda p, x: np.clip(x @ p["dense_0"]["w"] + p["dense_0"]["b"] + 3, 0, 6) / 6,
    ),
    "hard_sigmoid, its own line": (
        layers.hard_sigmoid(0.7, 0.3),
        (4, 5),
        lambda p, x: np.clip(0.7 * x + 0.3, 0, 1),
    ),
    "selu, its own numbers": (
        layers.selu(0.7, 1.3),
        (4, 5),
        lambda p, x: 1.3 * np.where(x > 0, x, 0.7 * (np.exp(x) - 1)),
    ),
    "hard_swish": (
        serial(dense(5, bias=normal(3.0)), layers.hard_swish()),
        (4, 5),
        lambda p, x: hard_swish64(x @ p["dense_0"]["w"] + p["dense_0"]["b"]),
    ),
    "log_softmax": (layers.log_softmax(), (4, 5), lambda p, x: np.log(numpy_softmax(x))),
    "prelu": (
        layers.prelu(slope=normal(1.0)),
        (2, 4, 5),
        lambda p, x: np.where(x > 0, x, p["slope"] * x),
    ),
    "prelu, shared": (
        layers.prelu(shared=True, slope=normal(1.0)),
        (2, 4, 5),
        lambda p, x: np.maximum(x, 0) + p["slope"] * np.minimum(x, 0),
    ),
    "glu": (layers.glu(), (3, 2, 6), lambda p, x: x[..., :3] / (1 + np.exp(-x[..., 3:]))),
    **{
        name: (
            make(3, bias=normal(1.0)),
            (4, 5),
            lambda p, x, f=f: (
                (x @ p["branches"]["up"]["w"] + p["branches"]["up"]["b"])
                * f(x @ p["branches"]["gate"]["dense_0"]["w"] + p["branches"]["gate"]["dense_0"]["b"])
            ),
        )
        for name, make, f in (
            ("gated", layers.gated, lambda z: 1 / (1 + np.exp(-z))),
            ("swiglu", layers.swiglu, lambda z: z / (1 + np.exp(-z))),
            ("geglu", layers.geglu, lambda z: z * (1 + vector_erf(z / np.sqrt(2))) / 2),
            ("reglu", layers.reglu, lambda z: np.maximum(z, 0)),
        )
    },
    "gated, no bias": (
        layers.gated(3, layers.tanh(), bias=None),
        (4, 5),
        lambda p, x: (x @ p["branches"]["up"]["w"]) * np.tanh(x @ p["branches"]["gate"]["dense_0"]["w"]),
    ),
    "squeeze_and_excitation": (
        layers.squeeze_and_excitation(4, 3, bias=normal(1.0)),
        (2, 3, 2, 4),
        numpy_squeezed(lambda z: np.maximum(z, 0), lambda z: 1 / (1 + np.exp(-z))),
    ),
    "squeeze_and_excitation of sequences": (
        layers.squeeze_and_excitation(4, 2, activation=layers.tanh(), gate=layers.hard_sigmoid(), bias=None),
        (2, 3, 4),
        numpy_squeezed(np.tanh, lambda z: np.clip(z + 3, 0, 6) / 6),
    ),
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


@pytest.mark.parametrize(
    ("layer", "slope"),
    [
        (relu(), 0.0),
        (leaky_relu(0.2), 0.2),
        (step(), 0.0),
        (layers.elu(0.5), 0.5),
        (layers.celu(0.5), 1.0),
        (layers.selu(), 1.0507009873554805 * 1.6732632423543772),
        (layers.softsign(), 1.0),
    ],
)
def test_subgradients_at_zero_are_the_named_ones_by_hand_and_by_autodiff(layer, slope):
    x = jnp.asarray([[0.0, -0.0, 1.0]])
    for _, dx in (
        backward_by_hand(layer, (), (), x, jnp.ones_like(x)),
        backward_by_autodiff(layer, (), (), x, jnp.ones_like(x)),
    ):
        np.testing.assert_allclose(dx[0, :2], np.float32(slope), rtol=2**-23)  # of λα, a product


@pytest.mark.parametrize(("layer", "above"), [(layers.hard_sigmoid(), 0.0), (layers.hard_swish(), 1.0)])
def test_hard_gates_take_the_slopes_of_the_lines_beyond_their_kinks(layer, above):
    x = jnp.asarray([[-3.0, 3.0]])
    for _, dx in (
        backward_by_hand(layer, (), (), x, jnp.ones_like(x)),
        backward_by_autodiff(layer, (), (), x, jnp.ones_like(x)),
    ):
        np.testing.assert_array_equal(dx[0], np.float32([0, above]))


@pytest.mark.parametrize(
    ("layer", "at"),
    [(layers.hard_tanh(-2, 3), (-2, 3)), (layers.threshold(1.5, 4.0), (1.5,)), (layers.shrink(), (-0.5, 0.5))],
)
def test_thresholds_have_the_derivative_zero_at_themselves(layer, at):
    x = jnp.asarray([[*at, 2.0]])
    for backward in (backward_by_hand, backward_by_autodiff):
        assert backward(layer, (), (), x, jnp.ones_like(x))[1].tolist() == [[0.0] * len(at) + [1.0]]


def test_thresholds_may_be_traced_and_open_to_one_side():
    x = jnp.asarray([[-9.0, 0.5, 9.0]])
    clipped = jax.jit(jax.vmap(lambda high: apply(layers.hard_tanh(-jnp.inf, high), (), (), x)))(jnp.asarray([1.0, 20]))
    np.testing.assert_array_equal(clipped[:, 0], [[-9, 0.5, 1], [-9, 0.5, 9]])
    with pytest.raises(ValueError, match="hard_tanh: low = 1, high = 1; expected a low below the high"):
        layers.hard_tanh(1, 1)
    with pytest.raises(ValueError, match="softplus: beta = 0; expected a positive number"):
        layers.softplus(0)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("leaky_relu", "slope"),
        ("elu", "alpha"),
        ("celu", "alpha"),
        ("selu", "scale"),
        ("softplus", "beta"),
        ("silu", "beta"),
        ("hard_sigmoid", "offset"),
        ("hard_tanh", "high"),
        ("threshold", "value"),
        ("shrink", "bias"),
    ],
)
def test_numbers_of_activations_are_single_ones(name, argument):
    with pytest.raises(ValueError, match=rf"^{name}: {argument} has shape \(3,\); expected one number"):
        getattr(layers, name)(**{argument: jnp.asarray([0.1, 0.5, 2.0])})


def test_prelu_takes_its_slope_at_zero_where_the_slope_itself_learns_nothing():
    x, layer = jnp.asarray([[0.0, -0.0, -2.0]]), layers.prelu(shared=True)
    params, state = layer.init(jax.random.key(0), x)
    for backward in (backward_by_hand, backward_by_autodiff):
        dparams, dx = backward(layer, params, state, x, jnp.ones_like(x))
        assert dx.tolist() == [[0.25, 0.25, 0.25]] and dparams["slope"].tolist() == [-2.0]


def test_prelu_refuses_other_channels_dtypes_and_slopes():
    params, state = layers.prelu().init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(LayerError, match=r"expected params slope \(4,\), got slope \(3,\): pass what init returned"):
        apply(layers.prelu(), params, state, jnp.ones((2, 4)))
    with pytest.raises(LayerError, match="expected float32 inputs like its slopes, got bfloat16: convert the inputs"):
        apply(layers.prelu(), params, state, jnp.ones((2, 3), jnp.bfloat16))
    with pytest.raises(LayerError, match=r"expected a batch axis and channels, got shape \(3,\)"):
        layers.prelu().init(jax.random.key(0), jnp.ones(3))
    with pytest.raises(LayerError, match="expected floating inputs, got int32"):
        layers.prelu().init(jax.random.key(0), jnp.ones((2, 3), jnp.int32))
    with pytest.raises(TypeError, match=r"prelu: slope = 0.25; expected an initializer"):
        layers.prelu(slope=0.25)


def test_arguments_of_gates_and_rectifiers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="celu: alpha = 0; expected a positive number"):
        layers.celu(0)
    with pytest.raises(LayerError, match=r"expected an even number of features, to be halved, got shape \(2, 3\)"):
        apply(layers.glu(), (), (), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="gated: units = 0; expected at least 1"):
        layers.swiglu(0)
    with pytest.raises(TypeError, match=r"gated: activation is the function tanh .*: fnet.layers.tanh\(\)"):
        layers.gated(3, jnp.tanh)


@pytest.mark.parametrize("make", [layers.silu, layers.elu, layers.celu, lambda beta: layers.swiglu(3, beta=beta)])
def test_numbers_of_activations_may_be_traced_and_are_data_of_one_program(make, x64):
    x, key = jax.random.normal(jax.random.key(1), (2, 5), jnp.float64), jax.random.key(0)

    traced = []

    @jax.jit
    def run(number):
        traced.append(number)
        layer = make(number)
        params, state = layer.init(key, x)
        y, _, residuals = layer.forward(params, state, x)
        return y, layer.backward(params, residuals, y)

    for number in (0.5, 2.0):
        layer = make(number)
        params, state = layer.init(key, x)
        y, _, residuals = layer.forward(params, state, x)
        assert_leaves_close(run(number), (y, layer.backward(params, residuals, y)), 1e-14)
    assert len(traced) == 1


def test_the_logarithm_of_softmax_is_finite_where_softmax_is_zero():
    x = jnp.asarray([[1e4, 0.0, -jnp.inf]])
    y, _, residuals = layers.log_softmax().forward((), (), x)
    assert y.tolist() == [[0.0, -1e4, -np.inf]]
    _, dx = layers.log_softmax().backward((), residuals, jnp.asarray([[0.0, 1.0, 0.0]]))
    assert dx.tolist() == [[-1.0, 1.0, 0.0]]


def test_gated_units_have_the_parameters_of_two_dense_layers():
    x = jnp.ones((2, 5))
    for layer, expected in (
        (layers.swiglu(3), 2 * (5 * 3 + 3)),
        (layers.geglu(3, bias=None), 2 * 5 * 3),
        (layers.prelu(), 5),
        (layers.prelu(shared=True), 1),
    ):
        params, _ = layer.init(jax.random.key(0), x)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
        total = next(line for line in str(summary(layer, x)).splitlines() if line.startswith("total"))
        assert total.split()[5] == str(expected)


def test_channels_that_a_gate_would_be_broadcast_along_are_refused(key):
    for features, channels in ((1, 4), (4, 1), (4, 3)):
        message = rf"branches/inputs: expected {features} features, got shape \(2, 3, 3, {channels}\)"
        with pytest.raises(LayerError, match=message):
            fnet.init(layers.squeeze_and_excitation(features, 2), key, jnp.ones((2, 3, 3, channels)))
    x, mask = jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool)
    layer = layers.squeeze_and_excitation(4, 2)
    with pytest.raises(LayerError, match="branches: gate ends the mask and the others do not"):
        layer.forward(*layer.init(key, x), (x, mask))
    with pytest.raises(ValueError, match="squeeze_and_excitation: hidden = 0; expected at least 1"):
        layers.squeeze_and_excitation(4, 0)


def test_torch_computes_the_same_activations_and_gradients(x64):
    torch = pytest.importorskip("torch")
    nn = torch.nn
    x = np.random.default_rng(0).normal(0, 3, (4, 6))
    x[0] = [0, -3, 3, -40, 40, 1e3]
    pairs = [
        (layers.silu(), nn.SiLU()),
        (layers.elu(0.75), nn.ELU(0.75)),
        (layers.selu(), nn.SELU()),
        (layers.celu(0.75), nn.CELU(0.75)),
        (layers.mish(), nn.Mish()),
        (layers.hard_sigmoid(), nn.Hardsigmoid()),
        (layers.hard_swish(), nn.Hardswish()),
        (layers.softsign(), nn.Softsign()),
        (layers.log_softmax(), nn.LogSoftmax(-1)),
        (layers.glu(), nn.GLU()),
        (layers.prelu(shared=True), nn.PReLU(dtype=torch.float64)),
        (layers.prelu(), nn.PReLU(6, dtype=torch.float64)),
    ]
    for layer, module in pairs:
        there = torch.tensor(x, requires_grad=True)
        params, state = layer.init(jax.random.key(0), jnp.asarray(x))
        y = apply(layer, params, state, jnp.asarray(x))
        dy = np.random.default_rng(1).normal(size=y.shape)
        out = module(there)
        out.backward(torch.tensor(dy))
        dparams, dx = backward_by_hand(layer, params, state, jnp.asarray(x), jnp.asarray(dy))
        assert_leaves_close(y, out.detach(), 1e-13)
        # torch rounds constants of some derivatives to float32: αλ, 1/6 (of elu α too, which 0.75 is not changed by)
        assert_leaves_close(dx, there.grad, 2**-23 if layer.name in ("selu", "hard_sigmoid") else 1e-13)
        if dparams:
            assert_leaves_close(dparams["slope"], module.weight.grad, 1e-13)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "identity",
            "step",
            "sigmoid",
            "tanh",
            "relu",
            "leaky relu",
            "gelu",
            "gelu, tanh form",
            "softplus",
            "softmax",
        ),
        *("silu", "silu, beta -0.5", "elu", "celu", "selu", "mish", "softsign", "log_softmax"),
        *("softplus, beta 3", "hard_tanh", "threshold", "shrink", "tanh_shrink"),
    ],
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
MODULES = [path for path in MODULES if path.name != "jax_attention.py"]  # jax' function, whose backward is jax' too


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
