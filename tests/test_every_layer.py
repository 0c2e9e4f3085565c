"""What holds for every layer of the audit: sixteen bits, batches of no examples, masks that travel."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

import fnet
from experiments import gradient_audit
from fnet import layers
from fnet.core.trees import split_floating
from fnet.layers import (
    attention,
    batch_norm,
    bidirectional,
    by_position,
    concatenate,
    dense,
    drop_mask,
    dropout,
    embedding,
    freeze,
    gelu,
    global_avg_pool,
    global_max_pool,
    group_norm,
    gru,
    layer_norm,
    learned_positions,
    lstm,
    mixed_precision,
    parallel,
    relu,
    remat,
    repeat,
    residual,
    rms_norm,
    rnn,
    serial,
    sinusoidal_positions,
    softmax,
    stacked,
    tied_embedding,
    with_hand_backward,
)
from fnet.layers.cells import LSTMCarry
from fnet.layers.children import apply
from fnet.types import LayerError
from tests.oracles import assert_leaves_close

CASES = gradient_audit.layer_cases(gradient_audit.constructors(None), np.random.default_rng(0))


def in_dtype(tree, dtype):
    """The floating leaves in another dtype."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def gradients(layer, params, state, x, dy, key):
    """By hand and by autodiff, of ``Σ dy · y`` in training."""
    floating, others = split_floating(x)

    def outputs(params, floating):
        x = jax.tree.map(lambda a, b: b if a is None else a, floating, others, is_leaf=lambda a: a is None)
        return split_floating(layer.forward(params, state, x, key=key, train=True)[0])[0]

    _, _, residuals = layer.forward(params, state, x, key=key, train=True)
    dparams, dx = layer.backward(params, residuals, dy)
    return (dparams, dx), jax.vjp(outputs, params, floating)[1](dy)


def assert_trees_close(actual, expected, tolerance):
    """To ``tolerance`` of the largest entry of the whole tree: the gradient of the keys' bias is 0 but for rounding."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    scale = max(float(jnp.abs(e).max(initial=0)) for _, e in pairs)
    for a, e in pairs:
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale)


# --- sixteen bits ----------------------------------------------------------------------------------------------------


def sums_in_16_bits(jaxpr, inside="") -> list[str]:
    """The operations of a program that add up many numbers in 16 bits, and the carries of its scans that do."""
    narrow = lambda aval: getattr(aval, "dtype", None) in (jnp.bfloat16, jnp.float16)  # noqa: E731
    found = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if eqn.outvars and eqn.invars and narrow(eqn.outvars[0].aval):
            terms = math.prod(eqn.invars[0].aval.shape) / max(1, math.prod(eqn.outvars[0].aval.shape))
            if (name in ("reduce_sum", "cumsum") and terms > 1) or name == "scatter-add":
                found.append(f"{inside}{name}{eqn.invars[0].aval.shape} to {eqn.outvars[0].aval.str_short()}")
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                body = getattr(inner, "jaxpr", inner)
                if hasattr(body, "eqns"):
                    found += sums_in_16_bits(body, f"{inside}{name}/")
                    found += [f"{inside}scan adds up {aval}" for aval in added_up(body) if name == "scan"]
    return found


def added_up(body) -> list[str]:
    """What a scan's body only ever adds to: a carry in 16 bits that nothing else reads."""
    uses = [atom for eqn in body.eqns for atom in eqn.invars]
    sums = {eqn.outvars[0]: eqn.invars for eqn in body.eqns if eqn.primitive.name == "add_any"}
    outvars = [v for v in body.outvars if not isinstance(v, Literal)]
    narrow = (v for v in outvars if v in sums and v.aval.dtype in (jnp.bfloat16, jnp.float16))
    return [v.aval.str_short() for v in narrow if any(a in body.invars and uses.count(a) == 1 for a in sums[v])]


@pytest.mark.parametrize("name", CASES)
def test_autodiff_adds_up_nothing_in_sixteen_bits(name, key):
    layer, x = CASES[name]
    x = in_dtype(jax.tree.map(jnp.asarray, x), jnp.bfloat16)

    def program(x):
        params, state = layer.init(key, x)
        params = in_dtype(params, jnp.bfloat16)
        y = layer.forward(params, state, x, key=key, train=True)[0]
        dy = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), split_floating(y)[0])
        return params, state, dy

    shapes = jax.eval_shape(program, x)
    closed = jax.make_jaxpr(lambda params, state, dy, x: gradients(layer, params, state, x, dy, key)[1])(*shapes, x)
    assert sums_in_16_bits(closed.jaxpr) == []


def test_the_search_for_sums_in_sixteen_bits_finds_them():
    def loss(b, table, w):
        broadcast = jnp.zeros((5, 3), jnp.bfloat16) + b[None]
        gathered = table[jnp.asarray([0, 0, 1])]
        carried, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h * w + x), None), jnp.ones(3, jnp.bfloat16), broadcast)
        return (broadcast.sum() + gathered.sum() + carried.sum()).astype(jnp.float32)

    given = jnp.ones(3, jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16), jnp.ones(3, jnp.bfloat16)
    found = " ".join(sums_in_16_bits(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*given).jaxpr))
    assert "reduce_sum" in found and "scatter-add" in found and "scan adds up bfloat16[3]" in found


MANY = {  # layers whose parameters meet many numbers of one sign, and their inputs
    "dense": (dense(3), lambda rng: rng.uniform(0, 1, (4096, 2))),
    "prelu": (layers.prelu(), lambda rng: rng.uniform(-1, 0, (4096, 2))),
    "prelu, shared": (layers.prelu(shared=True), lambda rng: rng.uniform(-1, 0, (64, 64, 4))),
    "conv": (layers.conv(6, (5, 5)), lambda rng: rng.uniform(0, 1, (64, 28, 28, 1))),
    "conv by XLA": (layers.conv(2, (3, 3), form="xla"), lambda rng: rng.uniform(0, 1, (32, 14, 14, 1))),
    "conv_transpose": (layers.conv_transpose(2, (3, 3), stride=2), lambda rng: rng.uniform(0, 1, (32, 14, 14, 1))),
    "embedding": (embedding(3, 2), lambda rng: rng.integers(0, 3, (32, 1024))),
    "tied_embedding": (
        tied_embedding(3, 2, dense(2), bias=fnet.initializers.zeros()),
        lambda rng: rng.integers(0, 3, (32, 512)),
    ),
    "learned_positions": (learned_positions(8), lambda rng: rng.uniform(0, 1, (4096, 8, 2))),
    "layer_norm": (layer_norm(), lambda rng: rng.uniform(0, 1, (4096, 4))),
    "batch_norm": (batch_norm(), lambda rng: rng.uniform(0, 1, (4096, 4))),
    "rnn": (rnn(2), lambda rng: rng.uniform(0, 1, (2, 4096, 2))),
    "gru": (gru(2), lambda rng: rng.uniform(0, 1, (2, 4096, 2))),
    "gru, reset before": (gru(2, reset_after=False), lambda rng: rng.uniform(0, 1, (2, 4096, 2))),
    "lstm": (lstm(2), lambda rng: rng.uniform(0, 1, (2, 4096, 2))),
    "attention": (attention(1), lambda rng: rng.uniform(0, 1, (64, 32, 2))),
    "attention, blockwise": (attention(1, block_size=8), lambda rng: rng.uniform(0, 1, (4, 512, 2))),
    "group of gpt": (fnet.models.transformer_block(4, 1, causal=True), lambda rng: rng.uniform(0, 1, (32, 64, 4))),
}


@pytest.mark.parametrize("name", MANY)
def test_both_engines_agree_in_bfloat16_where_many_gradients_add_up(name, key):
    layer, draw = MANY[name]
    model, x = mixed_precision(layer), draw(np.random.default_rng(1))
    x = jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else jnp.int32)
    params, state = fnet.init(model, key, x)
    target = jnp.full(jax.eval_shape(lambda: apply(model, params, state, x)).shape, -1.0)
    autodiff, backprop = (
        jax.jit(engine(model, fnet.losses.squared_error))(params, state, (x, target), key)[0]
        for engine in (fnet.autodiff, fnet.backprop)
    )
    # to a few roundings of 2^-8: sums in 16 bits were off by factors of 10. The keys' bias has the gradient 0
    assert_trees_close(autodiff, backprop, 0.03)


def test_a_bias_that_meets_fifty_thousand_outputs_has_its_gradient_in_bfloat16(key):
    # a convolution of zero weights has y = b = 0, so that each bias' gradient is Σ 2 (y + 1) / 64 = 2 · 784
    x = jax.random.normal(key, (64, 28, 28, 1))
    model = mixed_precision(layers.conv(6, (5, 5), weights=fnet.initializers.zeros()))
    params, state = fnet.init(model, key, x)
    batch = fnet.Batch(x, jnp.full((64, 28, 28, 6), -1.0))
    per_pixel = fnet.Loss(lambda y, t: jnp.square(y - t).mean((1, 2, 3)), lambda y, t: 2 * (y - t) / (6 * 784))
    for engine in (fnet.autodiff, fnet.backprop):
        grads, _, _ = jax.jit(engine(model, per_pixel))(params, state, batch, key)
        np.testing.assert_allclose(grads["b"], np.full(6, 2 / 6), rtol=2**-8)


EXTREMES = [800.0, -800.0, 60000.0, -60000.0, 40.0, -40.0, 12.0, -12.0, 7.0, -7.0, 0.5, -0.5]
ACTIVATIONS = {
    "identity": (layers.identity(), lambda z: z),
    "step": (layers.step(), lambda z: np.where(z >= 0, 1.0, 0.0)),
    "sigmoid": (layers.sigmoid(), lambda z: sigmoid64(z)),
    "tanh": (layers.tanh(), np.tanh),
    "relu": (relu(), lambda z: np.maximum(z, 0)),
    "leaky_relu": (layers.leaky_relu(0.3), lambda z: np.where(z > 0, z, 0.3 * z)),
    "gelu": (gelu(), lambda z: z * np.vectorize(math.erfc)(-z / math.sqrt(2)) / 2),
    "gelu, tanh form": (
        gelu(approximate=True),
        lambda z: z * sigmoid64(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)),
    ),
    "softplus": (layers.softplus(), lambda z: np.logaddexp(z, 0)),
    "silu": (layers.silu(), lambda z: z * sigmoid64(z)),
    "silu, beta 2": (layers.silu(2.0), lambda z: z * sigmoid64(2 * z)),
    "silu, beta 0": (layers.silu(0.0), lambda z: z / 2),
    "elu": (layers.elu(0.5), lambda z: np.where(z > 0, z, 0.5 * np.expm1(np.minimum(z, 0)))),
    "celu": (layers.celu(0.5), lambda z: np.where(z > 0, z, 0.5 * np.expm1(np.minimum(z, 0) / 0.5))),
    "selu": (
        layers.selu(),
        lambda z: 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * np.expm1(np.minimum(z, 0))),
    ),
    "mish": (layers.mish(), lambda z: z * np.tanh(np.logaddexp(z, 0))),
    "softsign": (layers.softsign(), lambda z: z / (1 + np.abs(z))),
    "hard_sigmoid": (layers.hard_sigmoid(), lambda z: np.clip(z + 3, 0, 6) / 6),
    "hard_swish": (layers.hard_swish(), lambda z: z * np.clip(z + 3, 0, 6) / 6),
}


def sigmoid64(z):
    with np.errstate(over="ignore"):
        return np.where(
            z > 0, 1 / (1 + np.exp(-z)), np.exp(z) / (1 + np.exp(z)) if np.all(z <= 0) else np.exp(-np.logaddexp(0, -z))
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_both_their_slopes_are_right_at_extremes(name, dtype):
    layer, oracle = ACTIVATIONS[name]
    x = jnp.asarray(EXTREMES, dtype)[None]
    z = np.asarray(x, np.float64)[0]
    y, _, residuals = layer.forward((), (), x)
    by_hand = layer.backward((), residuals, jnp.ones_like(y))[1]
    by_autodiff = jax.grad(lambda x: layer.forward((), (), x)[0].astype(jnp.float32).sum())(x)
    eps = float(jnp.finfo(dtype).eps)
    # to roundings of the result and, in a tail e^−z²/2, z² roundings of an argument in float32 at least
    tail = (1 + np.where(np.abs(z) < 20, z * z, 0)) * float(jnp.finfo(jnp.float32).eps)
    error = np.abs(np.asarray(y, np.float64)[0] - oracle(z))
    assert (error <= (4 * eps + 8 * tail) * np.abs(oracle(z)) + least(dtype)).all(), (np.asarray(y), oracle(z))
    h = 1e-6 * np.maximum(1, np.abs(z))
    slope = (oracle(z + h) - oracle(z - h)) / (2 * h)
    for found in (by_hand, by_autodiff):
        np.testing.assert_allclose(np.asarray(found, np.float64)[0], slope, rtol=16 * eps, atol=4 * eps)


def least(dtype) -> float:
    """What numbers near 0 differ by. XLA makes those of float32 and bfloat16 zero which have not all their digits."""
    finfo = jnp.finfo(dtype)
    return 2 * float(finfo.smallest_subnormal if dtype == "float16" else finfo.tiny)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["sigmoid", "softplus", "elu"])
def test_slopes_keep_their_digits_on_both_sides(name, dtype):
    # autodiff of float32 takes y (1 − y), which is right to the eps of y = 1
    layer, eps = ACTIVATIONS[name][0], float(jnp.finfo(dtype).eps)
    x = jnp.asarray([z for z in EXTREMES if abs(z) < 20], dtype)[None]
    z = np.asarray(x, np.float64)[0]
    slope = {
        "sigmoid": sigmoid64(z) * sigmoid64(-z),
        "softplus": sigmoid64(z),
        "elu": np.where(z > 0, 1, 0.5 * np.exp(np.minimum(z, 0))),
    }[name]
    y, _, residuals = layer.forward((), (), x)
    by_hand = layer.backward((), residuals, jnp.ones_like(y))[1]
    by_autodiff = jax.grad(lambda x: layer.forward((), (), x)[0].astype(jnp.float32).sum())(x)
    np.testing.assert_allclose(np.asarray(by_hand, np.float64)[0], slope, rtol=4 * eps, atol=least(dtype))
    atol = least(dtype) + float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(np.asarray(by_autodiff, np.float64)[0], slope, rtol=4 * eps, atol=atol)


LIMITS = {  # values and slopes at −∞ and ∞
    "identity": ((-np.inf, 1), (np.inf, 1)),
    "step": ((0, 0), (1, 0)),
    "sigmoid": ((0, 0), (1, 0)),
    "tanh": ((-1, 0), (1, 0)),
    "relu": ((0, 0), (np.inf, 1)),
    "leaky_relu": ((-np.inf, 0.3), (np.inf, 1)),
    "gelu": ((0, 0), (np.inf, 1)),
    "gelu, tanh form": ((0, 0), (np.inf, 1)),
    "softplus": ((0, 0), (np.inf, 1)),
    "silu": ((0, 0), (np.inf, 1)),
    "silu, beta 2": ((0, 0), (np.inf, 1)),
    "silu, beta 0": ((-np.inf, 0.5), (np.inf, 0.5)),
    "elu": ((-0.5, 0), (np.inf, 1)),
    "celu": ((-0.5, 0), (np.inf, 1)),
    "selu": ((-1.0507009873554805 * 1.6732632423543772, 0), (np.inf, 1.0507009873554805)),
    "mish": ((0, 0), (np.inf, 1)),
    "softsign": ((-1, 0), (1, 0)),
    "hard_sigmoid": ((0, 0), (1, 0)),
    "hard_swish": ((0, 0), (np.inf, 1)),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_both_their_slopes_have_limits_at_infinity(name, dtype):
    layer = ACTIVATIONS[name][0]
    x = jnp.asarray([[-np.inf, np.inf]], dtype)
    y, _, residuals = layer.forward((), (), x)
    by_hand = layer.backward((), residuals, jnp.ones_like(y))[1]
    by_autodiff = jax.vjp(lambda x: layer.forward((), (), x)[0], x)[1](jnp.ones_like(y))[0]
    values, slopes = zip(*LIMITS[name], strict=True)
    for found, expected in ((y, values), (by_hand, slopes), (by_autodiff, slopes)):
        np.testing.assert_array_equal(found[0], np.asarray(jnp.asarray(expected, dtype)))


@pytest.mark.parametrize(
    ("z", "dtype"),
    [(-7.0, "bfloat16"), (-7.0, "float16"), (-12.0, "float16"), (-12.0, "float32"), (-30.0, "float32")],
)
def test_the_gates_of_recurrent_layers_keep_their_digits_where_they_are_nearly_shut(z, dtype):
    # all weights 0, so that every gate is σ(b): with an open input and candidate, c = i g and h = o tanh(c)
    shut, eps = 1 / (1 + math.exp(-z)), float(jnp.finfo(dtype).eps)
    x = jnp.zeros((1, 1, 1), dtype)
    zeros = fnet.initializers.zeros()
    layer = lstm(1, weights=zeros, recurrent=zeros)
    params, _ = layer.init(jax.random.key(0), x)
    params["b"] = jnp.asarray([z, 0, 30, 30], dtype)  # i shut, g = 1, o = 1
    (y, carry), _, residuals = layer.forward(params, (), (x, None))
    near = least(dtype)
    np.testing.assert_allclose(float(carry.c[0, 0]), shut, rtol=4 * eps, atol=near)
    dparams, _ = layer.backward(params, residuals, (jnp.zeros_like(y), LSTMCarry(*jnp.array([[[0]], [[1]]], dtype))))
    np.testing.assert_allclose(
        float(dparams["b"][0]), shut * (1 - shut), rtol=8 * eps, atol=near
    )  # ∂c/∂z_i = g i (1 − i)
    slope = jax.grad(lambda b: layer.forward({**params, "b": b}, (), (x, None))[0][1].c.astype(jnp.float32).sum())
    np.testing.assert_allclose(float(slope(params["b"])[0]), shut * (1 - shut), rtol=8 * eps, atol=near)
    for reset_after in (True, False):
        cell = gru(1, weights=zeros, recurrent=zeros, reset_after=reset_after)
        params, _ = cell.init(jax.random.key(0), x)
        params["b"] = jnp.asarray([0, -z, 30], dtype)  # u = 1 − shut, n = 1: h = (1 − u) n + u h₋ with h₋ = 0
        y = apply(cell, params, (), x)
        np.testing.assert_allclose(float(y[0, 0, 0]), shut, rtol=4 * eps, atol=near)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("z", [4.0, 6.0, 8.0])
def test_the_slopes_of_gates_keep_their_digits_where_they_are_nearly_open(z, dtype):
    # all weights 0: gates and candidates are functions of the bias alone
    eps, x, zeros = float(jnp.finfo(dtype).eps), jnp.zeros((1, 1, 1), dtype), fnet.initializers.zeros()
    open_, flat = 1 / (2 + math.exp(z) + math.exp(-z)), 1 / math.cosh(z) ** 2  # σ'(z), tanh'(z)
    cases = {  # the layer, its bias, which entry of it, and the slope of y by that
        "lstm, input": (lstm, [z, 0, 30, 30], 0, open_ / math.cosh(1 / (1 + math.exp(-z))) ** 2),
        "lstm, candidate": (lstm, [30, 0, z, 30], 2, flat / math.cosh(math.tanh(z)) ** 2),
        "lstm, output": (lstm, [30, 0, 30, z], 3, open_ * math.tanh(1)),
        "gru, update": (gru, [0, z, 30], 1, -open_),
        "gru, candidate": (gru, [0, -30, z], 2, flat),
        "rnn": (rnn, [z], 0, flat),
    }
    for name, (make, bias, entry, slope) in cases.items():
        layer = make(1, weights=zeros, recurrent=zeros)
        params, _ = layer.init(jax.random.key(0), x)
        params["b"] = jnp.asarray(bias, dtype)
        y, _, residuals = layer.forward(params, (), x)
        by_hand = layer.backward(params, residuals, jnp.ones_like(y))[0]["b"][entry]

        def value(b, layer=layer, params=params):
            return apply(layer, {**params, "b": b}, (), x).astype(jnp.float32).sum()

        for found in (by_hand, jax.grad(value)(params["b"])[entry]):
            near = 4 * float(jnp.finfo(jnp.float32).eps) + least(dtype)  # of 1 − y in float32
            np.testing.assert_allclose(float(found), slope, rtol=8 * eps, atol=near, err_msg=name)


# --- batches of no examples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_no_examples_has_outputs_and_gradients_of_no_examples(name, key):
    layer, x = CASES[name]
    some = jax.eval_shape(lambda: layer.forward(*layer.init(key, x), x, key=key, train=True)[0])
    none = jax.tree.map(lambda a: jnp.asarray(a)[:0], x)

    @jax.jit
    def run(none):
        params, state = layer.init(key, x)
        y, _, _ = layer.forward(params, state, none, key=key, train=True)
        return y, gradients(layer, params, state, none, split_floating(y)[0], key)

    y, (by_hand, by_autodiff) = run(none)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), y) == jax.tree.map(lambda a: ((0, *a.shape[1:]), a.dtype), some)
    for dparams, dx in (by_hand, by_autodiff):
        assert all((leaf == 0).all() for leaf in map(np.asarray, jax.tree.leaves(dparams)))
        assert all(leaf.shape[0] == 0 for leaf in jax.tree.leaves(dx))


# --- masks travel ----------------------------------------------------------------------------------------------------

LENGTHS, T, F = (3, 5, 1), 5, 4
MASK = np.arange(T)[None] < np.array(LENGTHS)[:, None]

BY_POSITION = {
    "dense": dense(3),
    "gelu": gelu(),
    "relu": relu(),
    "softmax": softmax(),
    "prelu": layers.prelu(),
    "prelu, shared": layers.prelu(shared=True),
    "glu": layers.glu(),
    "swiglu": layers.swiglu(3),
    "parallel, multiplied": serial(parallel(dense(3), dense(3), dense(3)), layers.multiply()),
    "parallel, added": serial(parallel(dense(3), dense(1)), layers.add()),
    "layer_norm": layer_norm(),
    "rms_norm": rms_norm(),
    "l2_normalize": layers.l2_normalize(),
    "dropout": dropout(0.5),
    "learned_positions": learned_positions(T),
    "sinusoidal_positions": sinusoidal_positions(),
    "serial": serial(dense(3), relu()),
    "residual": residual(dense(F), shortcut=dense(F)),
    "repeat": repeat(dense(F), 2),
    "remat": remat(dense(3)),
    "freeze": freeze(dense(3)),
    "mixed_precision": mixed_precision(dense(3)),
    "with_hand_backward": with_hand_backward(dense(3)),
    "parallel, concatenated": serial(parallel(dense(3), relu()), concatenate()),
}


@pytest.mark.parametrize("name", BY_POSITION)
def test_what_acts_by_position_hands_the_mask_on_and_computes_as_without_it(name, key):
    layer, x, mask = BY_POSITION[name], jax.random.normal(key, (3, T, F)), jnp.asarray(MASK)
    params, state = fnet.init(layer, key, (x, mask))
    y, new_state, residuals = layer.forward(params, state, x, key=key, train=True)
    (masked, out), masked_state, masked_residuals = layer.forward(params, state, (x, mask), key=key, train=True)
    np.testing.assert_array_equal(out, mask)
    assert_leaves_close((masked, masked_state), (y, new_state), 1e-6)
    dy = jax.random.normal(key, y.shape)
    dparams, dx = layer.backward(params, residuals, dy)
    dmasked, (dx_masked, dmask) = layer.backward(params, masked_residuals, (dy, None))
    assert dmask is None
    assert_leaves_close((dmasked, dx_masked), (dparams, dx), 1e-6)


ENCODERS = {
    "attention": lambda: serial(attention(2), attention(2), drop_mask()),
    "attention, blockwise": lambda: serial(attention(2, block_size=2), attention(1, block_size=3), drop_mask()),
    "batch_norm": lambda: serial(batch_norm(), dense(F), batch_norm(), drop_mask()),
    "group_norm": lambda: serial(group_norm(2), dense(F), group_norm(1), drop_mask()),
    "recurrent": lambda: serial(lstm(3), gru(3), bidirectional(rnn(2)), stacked(gru(2), lstm(3)), drop_mask()),
    "residual": lambda: serial(residual(attention(2)), residual(layer_norm(), attention(2), dense(F)), drop_mask()),
    "repeat": lambda: serial(repeat(residual(attention(2), group_norm(2)), 2), drop_mask()),
    "remat": lambda: serial(remat(attention(2)), remat(group_norm(2)), drop_mask()),
    "hand backward": lambda: serial(with_hand_backward(attention(2)), attention(2), drop_mask()),
    "frozen": lambda: serial(freeze(attention(2)), attention(2), drop_mask()),
    "parallel": lambda: serial(parallel(attention(2), group_norm(2)), concatenate(), attention(2), drop_mask()),
    "transformer": lambda: serial(
        sinusoidal_positions(), repeat(fnet.models.transformer_block(F, 2, causal=False), 2), layer_norm(), drop_mask()
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_padded_batch_has_the_outputs_and_gradients_of_its_real_positions(name, key, x64):
    """Against rows that are run alone, cut to their length; batch norm, which mixes rows, against less padding."""
    model, real = ENCODERS[name](), jnp.asarray(MASK)
    x = jnp.where(real[..., None], jax.random.normal(key, (3, T, F), jnp.float64), 7.0)
    params, state = fnet.init(model, key, (x, real))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype), params)

    @jax.jit
    def both(params, x, mask):
        """The outputs, and by both engines the gradients of a function of the real ones."""

        def loss(y):
            return jnp.where(mask[:, :, None], jnp.sin(3 * y), 0).sum()

        y, _, residuals = model.forward(params, state, (x, mask), train=True)
        dparams, (dx, _) = model.backward(params, residuals, jax.grad(loss)(y))
        by_autodiff = jax.grad(lambda p, x: loss(model.forward(p, state, (x, mask), train=True)[0]), (0, 1))(params, x)
        return y, (dparams, dx), by_autodiff

    if name == "batch_norm":
        y, (expected, _), _ = both(params, x, real)
        wanted = [y[row, :n] for row, n in enumerate(LENGTHS)]
    else:
        alone = [both(params, x[row : row + 1, :n], jnp.ones((1, n), bool)) for row, n in enumerate(LENGTHS)]
        wanted = [y[0] for y, _, _ in alone]
        expected = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *(by_hand[0] for _, by_hand, _ in alone))
    for padding in (0, 5):
        mask = np.pad(MASK, ((0, 0), (0, padding)))
        padded = jnp.pad(x, ((0, 0), (0, padding), (0, 0)), constant_values=7.0)
        y, (dparams, dx), by_autodiff = both(params, padded, jnp.asarray(mask))
        assert_trees_close((dparams, dx), by_autodiff, 1e-12)
        assert (np.asarray(dx)[~mask] == 0).all()
        for row, n in enumerate(LENGTHS):
            np.testing.assert_allclose(y[row, :n], wanted[row], rtol=1e-10, atol=1e-12)
        assert_trees_close(dparams, expected, 1e-11)


@pytest.mark.parametrize("pool", [global_avg_pool, global_max_pool], ids=lambda pool: pool.__name__)
def test_a_layer_that_reduces_the_positions_ends_the_mask(pool, key, x64):
    model, x = serial(attention(2), pool(), dense(2)), jax.random.normal(key, (3, T, F), jnp.float64)
    params, state = fnet.init(model, key, (x, jnp.asarray(MASK)))
    y = apply(model, params, state, (x, jnp.asarray(MASK)))
    for row, length in enumerate(LENGTHS):
        alone = apply(model, params, state, x[row : row + 1, :length])
        np.testing.assert_allclose(y[row], alone[0], rtol=1e-12)
    nothing = apply(pool(), (), (), (x, jnp.zeros((3, T), bool)))
    assert (nothing == 0).all()


def test_ids_and_their_mask_go_through_embedding_and_tied_embedding(key):
    ids, mask = jax.random.randint(key, (3, T), 0, 7), jnp.asarray(MASK)
    model = serial(embedding(7, F), attention(2), global_avg_pool())
    params, state = fnet.init(model, key, (ids, mask))
    np.testing.assert_allclose(
        apply(model, params, state, (ids, mask))[0], apply(model, params, state, ids[:1, :3])[0], rtol=1e-5, atol=1e-6
    )
    model = tied_embedding(7, F, attention(2))
    params, state = fnet.init(model, key, (ids, mask))
    logits, out = apply(model, params, state, (ids, mask))
    assert out is mask
    np.testing.assert_allclose(logits[0, :3], apply(model, params, state, ids[:1, :3])[0], rtol=1e-5, atol=1e-6)


def test_a_mask_that_cannot_go_on_is_refused_by_name(key):
    x, mask = jnp.ones((3, T, F)), jnp.asarray(MASK)
    with pytest.raises(
        LayerError, match=r"flatten_0: expected one array, got a tuple of float32\[3, 5, 4\], bool\[3, 5\]"
    ):
        fnet.init(serial(layers.flatten()), key, (x, mask))
    with pytest.raises(LayerError, match=r"expected a mask over leading axes of \(3, 5, 4\), got shape \(3, 4\)"):
        fnet.init(dense(2), key, (x, jnp.ones((3, 4), bool)))
    ends = parallel(("pool", global_avg_pool()), ("same", dense(2)))
    with pytest.raises(
        LayerError, match=r"pool ends the mask and the others do not: drop_mask\(\) in them, or in none"
    ):
        ends.forward(fnet.init(ends, key, x)[0], {"pool": (), "same": ()}, (x, mask))
    lost = residual(drop_mask(), dense(F))
    with pytest.raises(LayerError, match="one of the two summands ends the mask"):
        lost.forward(fnet.init(lost, key, x)[0], {"drop_mask_0": (), "dense_0": ()}, (x, mask))
    with pytest.raises(LayerError, match=r"expected a mask of shape \(3, 5\), one for each place, got \(3,\)"):
        apply(global_avg_pool(), (), (), (x, jnp.ones(3, bool)))


def test_a_loss_of_masked_outputs_says_how_to_end_the_mask(key):
    x, mask = jnp.ones((3, T, F)), jnp.asarray(MASK)
    model = dense(2)
    params, state = fnet.init(model, key, x)
    for engine in (fnet.autodiff, fnet.backprop):
        with pytest.raises(ValueError, match=r"softmax_cross_entropy: outputs are a tuple of .*drop_mask\(\)"):
            engine(model, fnet.softmax_cross_entropy)(params, state, ((x, mask), jnp.zeros((3, T), int)), key)


def test_a_layer_of_ones_own_takes_masks_by_one_word(key):
    double = fnet.Layer(
        "double", lambda key, x: ((), ()), lambda p, s, x, **_: (2 * x, s, ()), lambda p, r, dy: ((), 2 * dy)
    )
    x, mask = jnp.ones((3, T, F)), jnp.asarray(MASK)
    y, out = apply(by_position(double), (), (), (x, mask))
    assert out is mask and (y == 2).all()
    assert (by_position(double).backward((), (), (x, None))[1][0] == 2).all()
    assert functools.reduce(lambda a, b: a and b, [by_position(double).name == "double"])
