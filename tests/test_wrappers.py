"""with_hand_backward, freeze and mixed_precision around layers and whole models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.gradcheck import check_layer
from fnet.layers import (
    Policy,
    dense,
    freeze,
    mixed_precision,
    relu,
    repeat,
    serial,
    stateless,
    tanh,
    with_hand_backward,
)
from fnet.layers.children import apply
from fnet.types import Layer, LayerError
from tests.oracles import assert_leaves_close

X = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
MODEL = serial(dense(5), tanh(), dense(3))


def gradients_by(engine, model, params, state, x=X, seed=0):
    labels = jnp.arange(len(x)) % 3
    return engine(model, fnet.softmax_cross_entropy, inputs=True)(params, state, (jnp.asarray(x), labels), None)[0]


# --- with_hand_backward ----------------------------------------------------------------------------------------------


def test_jax_grad_runs_the_backward_by_hand_and_no_other(key):
    marked = tanh()._replace(backward=lambda params, y, dy: ((), jnp.full_like(dy, 7)))
    f = lambda layer: jax.grad(lambda x: apply(layer, (), (), x).sum())(jnp.ones((2, 3)))  # noqa: E731
    assert (f(with_hand_backward(marked)) == 7).all()
    np.testing.assert_allclose(f(marked), 1 - np.tanh(1) ** 2, rtol=1e-6)


def test_a_model_under_jit_scan_and_vmap_has_the_gradients_of_its_hand_backward(key):
    model = with_hand_backward(serial(repeat(serial(dense(4), tanh()), 3), dense(3)))
    params, state = fnet.init(model, key, X)
    auto = jax.jit(lambda p: gradients_by(fnet.autodiff, model, p, state))(params)
    hand = gradients_by(fnet.backprop, model, params, state)
    assert_leaves_close(auto, hand, 1e-6)
    rows = jax.vmap(jax.grad(lambda p, x: apply(model, p, state, x[None]).sum()), (None, 0))(params, X)
    whole = jax.grad(lambda p: apply(model, p, state, X).sum())(params)
    assert_leaves_close(jax.tree.map(lambda leaf: leaf.sum(0), rows), whole, 1e-5)


def test_integer_inputs_keys_and_returned_state_carry_no_gradient(key):
    def forward(params, state, x, *, key=None, train=False):
        ids, values = x
        noise = jax.random.normal(key, values.shape)
        return values * params + noise + ids.astype(values.dtype), state + values.sum(), values

    def backward(params, values, dy):
        return (values * dy).sum(), (None, params * dy)

    layer = with_hand_backward(Layer("l", lambda key, x: (jnp.ones(()), jnp.zeros(())), forward, backward))

    def loss(params, state, values):
        y, new_state, _ = layer.forward(params, state, (jnp.arange(3), values), key=key, train=True)
        return y.sum() + 100 * new_state

    dparams, dstate, dvalues = jax.grad(loss, (0, 1, 2))(jnp.asarray(2.0), jnp.asarray(1.0), jnp.arange(3.0))
    assert (dparams, dstate) == (3, 0)
    assert dvalues.tolist() == [2, 2, 2]


def test_the_audit_removes_the_rule_and_finds_a_fault_behind_it(key):
    faulty = tanh()._replace(backward=lambda params, y, dy: ((), dy * (1 - y)))
    report = check_layer(with_hand_backward(faulty), X, key=key, precisions=(), cost=False)
    assert {leaf.verdict for leaf in report.leaves} == {"wrong"}
    assert check_layer(with_hand_backward(MODEL), X, key=key, precisions=(), cost=False).ok


# --- freeze ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [fnet.autodiff, fnet.backprop])
def test_a_frozen_layer_gets_gradient_zero_and_passes_on_what_it_passed(engine, key):
    model, frozen = serial(dense(5), tanh(), dense(3)), serial(dense(5), tanh(), freeze(dense(3)))
    params, state = fnet.init(model, key, X)
    dparams, dx = gradients_by(engine, model, params, state)
    dparams_frozen, dx_frozen = gradients_by(engine, frozen, params, state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(dparams_frozen["dense_1"]))
    assert_leaves_close((dparams_frozen["dense_0"], dx_frozen), (dparams["dense_0"], dx), 0)
    assert jnp.abs(dparams["dense_1"]["w"]).max() > 0


def test_the_gradients_of_a_frozen_layer_are_not_computed(key):
    w = jnp.ones((64, 64))

    def dots(layer):
        def by_hand(w, x):
            y, _, residuals = layer.forward({"w": w}, (), x)
            return layer.backward({"w": w}, residuals, y)

        return jax.jit(by_hand).lower(w, jnp.ones((8, 64))).compile().as_text().count(" dot(")

    assert dots(freeze(dense(64, bias=None))) == dots(dense(64, bias=None)) - 1


# --- mixed precision -------------------------------------------------------------------------------------------------


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_each_dtype_of_the_policy_is_where_it_is_named(key):
    seen = []

    def forward(params, state, x, *, key=None, train=False):
        seen.append((str(params["w"].dtype), str(x.dtype), str(state.dtype)))
        return x * params["w"], state + x.sum().astype(state.dtype), x

    def backward(params, x, dy):
        seen.append((str(params["w"].dtype), str(dy.dtype)))
        return {"w": (x * dy).sum(0)}, params["w"] * dy

    init = lambda key, x: ({"w": jnp.ones(x.shape[-1], x.dtype)}, jnp.zeros((), x.dtype))  # noqa: E731
    policy = Policy(parameters=jnp.float32, compute=jnp.bfloat16, state=jnp.float32, outputs=jnp.float16)
    with jax.numpy_rank_promotion("allow"):
        layer = mixed_precision(Layer("l", init, forward, backward), policy)
        params, state = layer.init(key, jnp.ones((2, 3)))
        y, new_state, residuals = layer.forward(params, state, jnp.ones((2, 3)))
        dparams, dx = layer.backward(params, residuals, y)
    assert seen == [("bfloat16", "bfloat16", "float32"), ("bfloat16", "bfloat16")]
    assert [dtypes(tree) for tree in (params, state, y, new_state, dparams, dx)] == [
        {"float32"}, {"float32"}, {"float16"}, {"float32"}, {"float32"}, {"float32"},
    ]  # fmt: skip
    for narrow in (jnp.float16, jnp.bfloat16):
        with pytest.raises(
            ValueError, match=r"mixed_precision: state = b?float16; expected float32 or float64: running"
        ):
            mixed_precision(dense(2), Policy(state=narrow))
    assert policy.accumulation == np.float32 and Policy(compute=jnp.float64).accumulation == np.float64


def test_parameters_are_drawn_in_their_own_dtype_whatever_the_inputs_have(key):
    params, _ = mixed_precision(dense(3)).init(key, jnp.ones((2, 4), jnp.bfloat16))
    assert_leaves_close(params, dense(3).init(key, jnp.ones((2, 4)))[0], 0)


@pytest.mark.parametrize("engine", [fnet.autodiff, fnet.backprop])
def test_bfloat16_gradients_are_float32s_to_bfloat16s_rounding(engine, key):
    params, state = fnet.init(MODEL, key, X)
    exact = gradients_by(engine, MODEL, params, state)
    rounded = gradients_by(engine, mixed_precision(MODEL), params, state)
    assert dtypes(rounded) == {"float32"}
    assert_leaves_close(rounded, exact, 8 * 2.0**-8)  # a chain of some eight roundings, each of 2⁻⁸ at most
    with pytest.raises(AssertionError):
        assert_leaves_close(rounded, exact, 1e-5)


def test_both_engines_agree_in_mixed_precision(key):
    model = mixed_precision(MODEL)
    params, state = fnet.init(model, key, X)
    hand, auto = (gradients_by(engine, model, params, state) for engine in (fnet.backprop, fnet.autodiff))
    assert_leaves_close(hand, auto, 8 * 2.0**-8)


def test_products_of_bfloat16_are_summed_in_float32(key):
    """4,096 ones and as many 2⁻⁸: in bfloat16 the sum would stand still at 256."""
    x, w = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((4096, 1), jnp.bfloat16)
    assert apply(dense(1, bias=None), {"w": w}, (), x) == 4096
    _, dx = dense(1, bias=None).backward({"w": jnp.ones((1, 4096), jnp.bfloat16)}, jnp.ones((1, 1), jnp.bfloat16), x)
    assert dx == 4096
    text = jax.jit(lambda x, w: apply(dense(1, bias=None), {"w": w}, (), x)).lower(x, w).as_text()
    assert "(tensor<1x4096xbf16>, tensor<4096x1xbf16>) -> tensor<1x1xf32>" in text


def test_integers_pass_mixed_precision_untouched(key):
    seen = []
    forward = lambda params, x: (seen.append(x.dtype) or x.astype(jnp.float32), ())  # noqa: E731
    layer = mixed_precision(stateless("cast", lambda key, x: (), forward, lambda p, r, dy: ((), None)))
    y, _, residuals = layer.forward((), (), jnp.arange(3))
    assert seen == [jnp.int32] and y.dtype == jnp.float32
    assert layer.backward((), residuals, y) == ((), None)


def test_errors_keep_their_path_through_the_wrappers(key):
    model = serial(("head", mixed_precision(freeze(with_hand_backward(serial(relu(), dense(3)))))))
    params, state = fnet.init(model, key, X)
    with pytest.raises(LayerError, match=r"^head/dense_0: expected 4 features, got 5"):
        apply(model, params, state, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match=r"mixed_precision: compute = .*int8.*; expected a floating dtype"):
        mixed_precision(relu(), Policy(compute=jnp.int8))


def test_an_island_of_float32_in_a_bfloat16_model_hands_on_bfloat16(key):
    inner = mixed_precision(tanh(), Policy(compute=jnp.float32))
    model = mixed_precision(serial(dense(4), ("island", inner), dense(2)))
    x = jnp.ones((3, 5))
    params, state = model.init(key, x)
    y, _, residuals = model.forward(params, state, x)
    dparams, dx = model.backward(params, residuals, y)
    assert y.dtype == dx.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(dparams)} == {jnp.dtype("float32")}
    program = str(jax.make_jaxpr(lambda x: model.forward(params, state, x)[0])(x))
    assert "f32[3,4] = tanh" in program
