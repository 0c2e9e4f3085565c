"""Residual, parallel, concatenate, repeat and remat: forward, backward, keys, memory, size of the program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.core.numerics import stream
from fnet.gradcheck import check_layer, check_model
from fnet.layers import conv, dense, freeze, gelu, mixed_precision, relu, serial, stateless, tanh
from fnet.layers.children import apply
from fnet.layers.combinators import add, concatenate, multiply, parallel, remat, repeat, residual
from fnet.layers.initializers import normal
from fnet.types import Layer, LayerError
from tests.oracles import assert_leaves_close, numerical_gradient

X = np.random.default_rng(0).standard_normal((5, 4))


def affine(p, x):
    return x @ p["w"] + p["b"]


LAYERS = {
    "residual": (
        residual(dense(6, bias=normal(1.0)), tanh(), dense(4, bias=normal(1.0))),
        lambda p, x: x + affine(p["dense_1"], np.tanh(affine(p["dense_0"], x))),
    ),
    "residual with a shortcut": (
        residual(dense(3, bias=normal(1.0)), tanh(), shortcut=dense(3, bias=normal(1.0))),
        lambda p, x: np.tanh(affine(p["dense_0"], x)) + affine(p["shortcut"], x),
    ),
    "parallel, concatenated": (
        serial(
            parallel(dense(2, bias=normal(1.0)), ("wide", serial(dense(3, bias=normal(1.0)), tanh()))), concatenate()
        ),
        lambda p, x: np.concatenate(
            [affine(p["parallel_0"]["dense_0"], x), np.tanh(affine(p["parallel_0"]["wide"]["dense_0"], x))], -1
        ),
    ),
    "repeat": (
        repeat(serial(dense(4, bias=normal(1.0)), tanh()), 3),
        lambda p, x: [x := np.tanh(x @ p["dense_0"]["w"][i] + p["dense_0"]["b"][i]) for i in range(3)][-1],
    ),
    "remat": (
        remat(serial(dense(3, bias=normal(1.0)), tanh())),
        lambda p, x: np.tanh(affine(p["dense_0"], x)),
    ),
    "repeated remat of a residual block": (
        repeat(remat(residual(dense(4, bias=normal(1.0)), tanh())), 2),
        lambda p, x: [x := x + np.tanh(x @ p["dense_0"]["w"][i] + p["dense_0"]["b"][i]) for i in range(2)][-1],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_both_gradients_equal_numpy_in_float64(name, x64):
    layer, oracle = LAYERS[name]
    x = jnp.asarray(X)
    params, state = fnet.init(layer, jax.random.key(1), x)
    p = jax.tree.map(np.asarray, params)
    y, _, residuals = layer.forward(params, state, x, key=None, train=True)
    np.testing.assert_allclose(y, oracle(p, X), rtol=1e-12)
    v = np.random.default_rng(2).standard_normal(y.shape)
    by_hand = layer.backward(params, residuals, jnp.asarray(v))
    auto = jax.grad(lambda p, x: (apply(layer, p, state, x) * v).sum(), argnums=(0, 1))(params, x)
    assert_leaves_close(by_hand, auto, 1e-12)
    np.testing.assert_allclose(by_hand[1], numerical_gradient(lambda x: (oracle(p, x) * v).sum(), X), rtol=1e-6)


def test_the_audit_passes_all_of_them_at_once(key):
    block = repeat(remat(residual(dense(4), tanh())), 2)
    model = serial(block, parallel(dense(2), dense(3)), concatenate(), residual(dense(4), shortcut=dense(4)))
    report = check_layer(model, X.astype(np.float32), key=key, precisions=(), cost=False)
    assert {leaf.verdict for leaf in report.leaves} == {"ok"}, str(report)


# --- repeat ----------------------------------------------------------------------------------------------------------


def dropping() -> Layer:
    """A layer whose outputs depend on its key, and which counts its calls in its state."""

    def forward(params, state, x, *, key=None, train=False):
        noise = jax.random.normal(key, x.shape, x.dtype) if train else jnp.zeros_like(x)
        return x * params + noise, state + 1, x

    def backward(params, x, dy):
        return (x * dy).sum(), params * dy

    init = lambda key, x: (jax.random.normal(key, (), x.dtype), jnp.zeros((), jnp.int32))  # noqa: E731
    return Layer("dropping", init, forward, backward)


@pytest.mark.parametrize("unroll", [1, 2, True])
def test_repeat_is_a_serial_of_children_called_by_their_number(unroll, x64, key):
    block, x = serial(dense(4), dropping()), jnp.asarray(X)
    stacked = repeat(block, 3, unroll=unroll)
    alone = serial(*((str(i), block) for i in range(3)))
    params, state = stacked.init(key, x)
    each_params, each_state = alone.init(key, x)
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(trees[n] for n in "012"))  # noqa: E731
    assert_leaves_close(dict(params), stack(each_params), 0)
    for i in range(3):
        assert_leaves_close(params.one(i), each_params[str(i)], 0)
    y, new_state, residuals = stacked.forward(params, state, x, key=key, train=True)
    each_y, each_new_state, each_residuals = alone.forward(each_params, each_state, x, key=key, train=True)
    np.testing.assert_allclose(y, each_y, rtol=1e-13)
    assert_leaves_close(new_state, stack(each_new_state), 0)
    assert new_state["dropping_0"].tolist() == [1, 1, 1]
    dparams, dx = stacked.backward(params, residuals, jnp.ones_like(y))
    each_dparams, each_dx = alone.backward(each_params, each_residuals, jnp.ones_like(y))
    assert_leaves_close(dict(dparams), stack(each_dparams), 1e-13)
    np.testing.assert_allclose(dx, each_dx, rtol=1e-12)


def block_of(depth, wrap=lambda layer: layer):
    return repeat(wrap(residual(dense(64), gelu(), dense(16))), depth)


def compiled_gradient(model, by_hand, examples=512):
    x = jnp.ones((examples, 16))
    params, state = fnet.init(model, jax.random.key(0), x)

    def hand(params, x):
        y, _, residuals = model.forward(params, state, x, train=True)
        return model.backward(params, residuals, jnp.ones_like(y))

    auto = jax.grad(lambda params, x: apply(model, params, state, x).sum(), argnums=(0, 1))
    return jax.jit(hand if by_hand else auto).lower(params, x).compile()


@pytest.mark.parametrize("by_hand", [True, False], ids=["backprop", "autodiff"])
def test_the_program_of_a_repeat_does_not_grow_with_its_depth(by_hand):
    sizes = [len(compiled_gradient(block_of(depth), by_hand).as_text().splitlines()) for depth in (2, 16, 64)]
    assert max(sizes) < 1.25 * min(sizes), sizes  # 32 times the depth; XLA's choices move it by some lines
    unrolled = serial(*(residual(dense(64), gelu(), dense(16)) for _ in range(16)))
    assert len(compiled_gradient(unrolled, by_hand).as_text().splitlines()) > 3 * sizes[1]


@pytest.mark.parametrize("by_hand", [True, False], ids=["backprop", "autodiff"])
def test_remat_within_repeat_keeps_the_inputs_of_each_block_and_no_more(by_hand):
    depth, examples = 16, 512
    plain, saving = (
        compiled_gradient(block_of(depth, wrap), by_hand).memory_analysis().temp_size_in_bytes
        for wrap in (lambda layer: layer, remat)
    )
    inputs = depth * examples * 16 * 4  # what a block's recomputation needs: its inputs
    hidden = depth * examples * 64 * 4  # what gelu keeps: its own inputs
    assert plain >= inputs + hidden
    assert inputs <= saving <= 1.5 * inputs + 4 * examples * 64 * 4


def test_remat_computes_in_the_mode_and_with_the_key_of_its_forward(key):
    layer, plain, x = remat(dropping()), dropping(), jnp.asarray(X, jnp.float32)
    params, state = layer.init(key, x)
    scaled = Layer("scaled", plain.init, plain.forward, lambda params, x, dy: (jnp.zeros(()), dy * x))
    chain, remembered = serial(plain, scaled), remat(serial(plain, scaled))
    params, state = chain.init(key, x)
    for train in (True, False):
        kept = [c.forward(params, state, x, key=key, train=train)[2] for c in (chain, remembered)]
        dx, dx_again = (c.backward(params, k, x)[1] for c, k in zip((chain, remembered), kept, strict=True))
        np.testing.assert_allclose(dx, dx_again, rtol=1e-6)
        assert set(kept[1]) == {"train" if train else "eval"}
    assert layer.name == "dropping"


def test_the_audit_names_the_faulty_layer_within_a_repeat(key):
    faulty = tanh()._replace(backward=lambda params, y, dy: ((), dy * (1 - y)))
    model = serial(repeat(serial(dense(4), faulty), 2), dense(3))
    batch = (X.astype(np.float32), np.array([0, 1, 2, 0, 1]))
    report = check_model(model, fnet.softmax_cross_entropy, batch, key=key, precisions=(), cost=False)
    assert not report.ok
    assert report.first_wrong == "repeat_0/1/tanh_0/inputs", str(report)
    right = serial(repeat(serial(dense(4), tanh()), 2), dense(3))
    assert check_model(right, fnet.softmax_cross_entropy, batch, key=key, precisions=(), cost=False).ok


# --- errors ----------------------------------------------------------------------------------------------------------


def raised(layer, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(LayerError) as error:
        jax.eval_shape(lambda x: fnet.apply(layer, *fnet.init(layer, jax.random.key(0), x), x), x)
    return str(error.value)


def test_summands_that_differ_are_refused_with_both_shapes():
    message = raised(serial(("block", residual(dense(3)))), (2, 4))
    assert message == (
        "block: cannot add outputs float32[2, 3] to the shortcut's float32[2, 4]: "
        "give a shortcut=layer that makes them alike"
    )


def test_a_layer_that_changes_the_shape_cannot_be_repeated():
    message = raised(serial(repeat(dense(3), 2)), (2, 4))
    assert message == ("repeat_0: expected outputs like the inputs float32[2, 4], to be repeated, got float32[2, 3]")
    with pytest.raises(ValueError, match="repeat: count = 0; expected a whole number of at least 1"):
        repeat(relu(), 0)


def test_parameters_of_another_depth_are_refused(key):
    params, state = repeat(dense(4), 3).init(key, jnp.ones((2, 4)))
    with pytest.raises(LayerError, match=r"expected 2 copies of b along its first axis, got shape \(3, 4\)"):
        apply(repeat(dense(4), 2), params, state, jnp.ones((2, 4)))


def test_only_like_arrays_are_joined():
    with pytest.raises(LayerError) as error:
        apply(concatenate(), (), (), (jnp.ones((2, 4)), jnp.ones((3, 4))))
    assert str(error.value) == (
        "cannot join float32[2, 4], float32[3, 4] along axis -1: expected arrays alike in dtype and other axes"
    )
    with pytest.raises(LayerError, match="expected a tuple of arrays, as parallel"):
        apply(concatenate(), (), (), jnp.ones((2, 4)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_product_and_its_gradients_are_right_where_factors_are_zero(count, x64):
    x = np.random.default_rng(0).normal(size=(count, 4, 3))
    x[0, 0], x[-1, :2], x[:, 3] = 0, 0, 0  # of one factor, of two, of all
    dy = np.random.default_rng(1).normal(size=(4, 3))
    y, _, residuals = multiply().forward((), (), tuple(map(jnp.asarray, x)))
    _, dx = multiply().backward((), residuals, jnp.asarray(dy))
    np.testing.assert_allclose(y, x.prod(0), rtol=1e-15)
    for i, d in enumerate(dx):
        np.testing.assert_allclose(d, dy * np.delete(x, i, 0).prod(0), rtol=1e-15)


def test_a_product_in_16_bits_is_rounded_once():
    x = tuple(jnp.full((1, 1), value, jnp.float16) for value in (300.0, 300.0, 1e-2))  # 300² is beyond float16
    y, _, residuals = multiply().forward((), (), x)
    _, dx = multiply().backward((), residuals, jnp.full((1, 1), 0.5, jnp.float16))
    hundredth = float(jnp.float16(1e-2))
    np.testing.assert_allclose(float(y[0, 0]), 90000 * hundredth, rtol=2**-11)
    np.testing.assert_allclose([float(d[0, 0]) for d in dx], [150 * hundredth, 150 * hundredth, 45000], rtol=2**-11)
    assert {a.dtype for a in (y, *dx)} == {jnp.dtype("float16")}


BROADCAST = [[(2, 3, 4), (2, 1, 4), (2, 3, 1)], [(2, 1, 4), (3, 1)], [(2, 3), (2, 3)], [(4,), (2, 1, 1), (3, 1)]]


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
@pytest.mark.parametrize(("layer", "oracle"), [(add(), np.add), (multiply(), np.multiply)], ids=["add", "multiply"])
def test_shapes_broadcast_as_numpys_and_gradients_are_summed_over_what_was_broadcast(layer, oracle, shapes, x64):
    rng = np.random.default_rng(0)
    x = [rng.normal(size=shape) for shape in shapes]
    y, _, residuals = layer.forward((), (), tuple(map(jnp.asarray, x)))
    dy = rng.normal(size=y.shape)
    np.testing.assert_allclose(y, functools.reduce(oracle, x), rtol=1e-14)
    _, dx = layer.backward((), residuals, jnp.asarray(dy))
    for i, d in enumerate(dx):
        slope = numerical_gradient(lambda v, i=i: (functools.reduce(oracle, [*x[:i], v, *x[i + 1 :]]) * dy).sum(), x[i])
        np.testing.assert_allclose(d, slope, rtol=1e-7, atol=1e-8)
    auto = jax.vjp(lambda x: layer.forward((), (), x)[0], tuple(map(jnp.asarray, x)))[1](jnp.asarray(dy))[0]
    assert_leaves_close(dx, auto, 1e-14)


@pytest.mark.parametrize("layer", [add(), multiply()], ids=["add", "multiply"])
def test_what_a_number_in_bfloat16_is_broadcast_along_is_summed_in_float32(layer):
    # 1000 ones: in bfloat16 the sum would stop at 256
    x = (jnp.ones((1000, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16))
    y, _, residuals = layer.forward((), (), x)
    _, by_hand = layer.backward((), residuals, jnp.ones_like(y))
    (by_autodiff,) = jax.vjp(lambda x: layer.forward((), (), x)[0], x)[1](jnp.ones_like(y))
    assert by_hand[1].tolist() == by_autodiff[1].tolist() == [[1000.0]] and by_hand[1].dtype == jnp.bfloat16


@pytest.mark.parametrize("layer", [add(), multiply()], ids=["add", "multiply"])
def test_arrays_whose_shapes_do_not_broadcast_and_of_several_dtypes_are_refused(layer):
    for other, given in (
        (jnp.ones((2, 3)), r"float32\[2, 4\], float32\[2, 3\]"),
        (jnp.ones((2, 4), jnp.float16), r"float32\[2, 4\], float16\[2, 4\]"),
    ):
        with pytest.raises(LayerError, match=f"^cannot {layer.name} {given}: expected arrays alike in dtype, whose"):
            apply(layer, (), (), (jnp.ones((2, 4)), other))
    with pytest.raises(LayerError, match="expected a tuple of arrays, as parallel"):
        apply(layer, (), (), jnp.ones((2, 4)))


def test_a_child_may_not_take_the_shortcuts_name():
    with pytest.raises(ValueError, match="2 children are called 'shortcut'"):
        residual(("shortcut", relu()), shortcut=relu())


def test_each_child_and_each_copy_has_a_key_of_its_own(key):
    show = stateless("show", lambda key, x: {"k": jax.random.bits(key)}, lambda p, x: (x, ()), lambda p, r, dy: (p, dy))
    params, _ = residual(show, show, shortcut=show).init(key, jnp.ones((1, 1)))
    assert params["shortcut"]["k"] == jax.random.bits(stream(key, "shortcut"))
    assert len({int(leaf) for leaf in jax.tree.leaves(params)}) == 3
    copies, _ = repeat(show, 50).init(key, jnp.ones((1, 1)))
    assert len(set(copies["k"].tolist())) == 50


def test_a_layer_whose_parameters_are_no_dict_is_not_repeated(key):
    bare = stateless("bare", lambda key, x: jnp.ones(()), lambda p, x: (p * x, ()), lambda p, r, dy: (p, dy))
    with pytest.raises(LayerError, match="expected a layer whose parameters are a dict, to be repeated, got"):
        repeat(bare, 2).init(key, jnp.ones((1, 1)))


def test_a_repeated_layer_without_leaves_runs_as_often_as_said(key):
    double = stateless("double", lambda key, x: (), lambda p, x: (2 * x, ()), lambda p, r, dy: ((), 2 * dy))
    layer = repeat(double, 3)
    y, _, residuals = layer.forward((), (), jnp.ones(2))
    assert y.tolist() == [8, 8] and layer.backward((), residuals, y)[1].tolist() == [64, 64]
    with pytest.raises(LayerError, match="expected a key in training"):
        repeat(fnet.layers.dropout(0.5), 2).forward((), (), jnp.ones(2), train=True)


def test_parallel_wants_a_layer():
    with pytest.raises(ValueError, match="parallel: no layers; expected at least one"):
        parallel()


def test_a_printed_model_is_a_tree_of_its_layers():
    block = residual(dense(8), relu(), serial(dense(4), tanh()), shortcut=conv(4, (1, 1)))
    model = serial(("first", dense(3)), relu(), mixed_precision(block), repeat(dense(3), 4), freeze(parallel(tanh())))
    assert str(model) == "\n".join(
        [
            "serial",
            "├─ first: dense",
            "├─ relu_0",
            "├─ residual_0",
            "│  ├─ dense_0",
            "│  ├─ relu_0",
            "│  ├─ serial_0",
            "│  │  ├─ dense_0",
            "│  │  └─ tanh_0",
            "│  └─ shortcut: conv",
            "├─ repeat_0",
            "│  └─ 4 copies: dense",
            "└─ parallel_0",
            "   └─ tanh_0",
        ]
    )
    assert repr(dense(3)) == "dense"
