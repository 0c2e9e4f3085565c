"""Weight and spectral normalisation around layers: formulas in NumPy, both engines, torch, states, what is refused."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.gradcheck import check_layer, check_model
from fnet.layers import conv, conv_transpose, dense, lstm, mixed_precision, repeat, serial, tanh
from fnet.layers.initializers import normal
from fnet.layers.reparametrized import fold_spectral_norm, fold_weight_norm, spectral_norm, weight_norm
from fnet.types import LayerError
from tests.oracles import assert_leaves_close, numerical_gradient

BIASED = dense(3, bias=normal(1.0))
LAYERS = {  # the layer, the path of its weights, the shape of its inputs
    "dense": (BIASED, "w", (5, 4)),
    "conv": (conv(4, (2, 2), groups=2, bias=normal(1.0)), "w", (2, 3, 3, 2)),
    "conv_transpose": (conv_transpose(3, (2, 2), stride=2), "w", (2, 2, 2, 2)),
    "lstm": (lstm(2), "recurrent/w", (2, 3, 4)),
    "a child": (serial(dense(4), tanh(), dense(2)), "dense_1/w", (3, 2)),
}
WRAPPERS = {"weight_norm": weight_norm, "spectral_norm": partial(spectral_norm, iterations=2)}
both = pytest.mark.parametrize("wrapper", WRAPPERS)
every_layer = pytest.mark.parametrize("name", LAYERS)


def drawn(wrapper, name, dtype=jnp.float64):
    """The layer, its path, the wrapped layer with random parameters, its state, inputs and cotangent."""
    layer, path, shape = LAYERS[name]
    wrapped, rng = WRAPPERS[wrapper](layer, path), np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    params, state = wrapped.init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    y = jax.eval_shape(lambda: wrapped.forward(params, state, x)[0])
    return layer, path, wrapped, params, state, x, jnp.asarray(rng.normal(size=y.shape), dtype)


@partial(jax.jit, static_argnames="layer")
def by_hand(layer, params, state, x, dy):
    """Outputs, the new state, and the gradients by hand."""
    y, new_state, residuals = layer.forward(params, state, x, train=True)
    return y, new_state, layer.backward(params, residuals, dy)


@partial(jax.jit, static_argnames="layer")
def by_autodiff(layer, params, state, x, dy):
    return jax.vjp(lambda p, x: layer.forward(p, state, x, train=True)[0], params, x)[1](dy)


def at(tree, path):
    for step in path.split("/"):
        tree = tree[step]
    return np.asarray(tree, np.float64)


def numpy_weight_norm(g, v):
    w = np.zeros_like(v)
    for o in range(v.shape[-1]):
        w[..., o] = g[o] * v[..., o] / np.sqrt((v[..., o] ** 2).sum())
    return w


def numpy_power_iteration(w, u, v, times):
    matrix = w.reshape(-1, w.shape[-1]).T
    for _ in range(times):
        u = matrix @ v / np.linalg.norm(matrix @ v)
        v = matrix.T @ u / np.linalg.norm(matrix.T @ u)
    return u, v, u @ matrix @ v


# --- formulas and engines --------------------------------------------------------------------------------------------


@both
@every_layer
def test_a_wrapped_layer_is_the_layer_with_the_formulas_weights_and_both_engines_agree(wrapper, name, x64):
    layer, path, wrapped, params, state, x, dy = drawn(wrapper, name)
    y, new_state, by_hand_grads = by_hand(wrapped, params, state, x, dy)
    if wrapper == "weight_norm":
        w, plain = numpy_weight_norm(at(params, f"{path}/g"), at(params, f"{path}/v")), fold_weight_norm(params, path)
    else:
        u, v, sigma = numpy_power_iteration(at(params, path), state["u"], state["v"], 2)
        np.testing.assert_allclose(new_state["u"], u, rtol=1e-12)
        np.testing.assert_allclose(new_state["v"], v, rtol=1e-12)
        w, (plain, _) = at(params, path) / sigma, fold_spectral_norm(params, new_state, path)
    np.testing.assert_allclose(at(plain, path), w, rtol=1e-12)
    bare, bare_state = layer.init(jax.random.key(0), x)
    assert jax.tree.structure(plain) == jax.tree.structure(bare)
    np.testing.assert_allclose(y, layer.forward(plain, bare_state, x, train=True)[0], rtol=1e-13)
    assert_leaves_close(by_hand_grads, by_autodiff(wrapped, params, state, x, dy), 1e-12)


def test_the_gradient_of_length_and_direction_is_the_slope_of_the_formula(x64):
    _, _, wrapped, params, state, x, dy = drawn("weight_norm", "dense")
    _, _, (dparams, _) = by_hand(wrapped, params, state, x, dy)
    g, v = at(params, "w/g"), at(params, "w/v")
    for leaf, slope in (
        ("g", numerical_gradient(lambda g: ((x @ numpy_weight_norm(g, v)) * dy).sum(), g)),
        ("v", numerical_gradient(lambda v: ((x @ numpy_weight_norm(g, v)) * dy).sum(), v)),
    ):
        np.testing.assert_allclose(dparams["w"][leaf], slope, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose((dparams["w"]["v"] * v).sum(0), 0, atol=1e-13)  # no step along v


def test_the_gradient_through_the_singular_value_is_its_slope_where_both_vectors_are_held(x64):
    _, _, wrapped, params, state, x, dy = drawn("spectral_norm", "dense")
    _, new_state, (dparams, _) = by_hand(wrapped, params, state, x, dy)
    u, v = np.asarray(new_state["u"]), np.asarray(new_state["v"])
    slope = numerical_gradient(lambda w: ((x @ (w / (u @ w.T @ v))) * dy).sum(), params["w"])
    np.testing.assert_allclose(dparams["w"], slope, rtol=1e-7, atol=1e-8)


@both
@pytest.mark.parametrize("name", ["dense", "lstm"])
def test_bfloat16_is_float32_up_to_its_rounding_and_keeps_dtypes(wrapper, name):
    _, _, wrapped, params, state, x, dy = drawn(wrapper, name, jnp.bfloat16)
    y, new_state, grads = by_hand(wrapped, params, state, x, dy)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, grads))} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(new_state)} <= {jnp.dtype(jnp.float32)}
    up = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, state, x, dy))
    # w, y and each gate are rounded, 2^-9 each
    assert_leaves_close((y, grads), by_hand(wrapped, *up)[::2], 0.04)


@both
def test_a_backward_that_forgets_the_norm_is_found(wrapper, key):
    wrapped, x = WRAPPERS[wrapper](BIASED), np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)

    def backward(params, residuals, dy):  # dv = g/‖v‖ dw and dw/σ alone
        dparams, dx = wrapped.backward(params, residuals, dy)
        if wrapper == "weight_norm":
            g, v = params["w"]["g"], params["w"]["v"]
            unit = v / jnp.linalg.norm(v, axis=0, keepdims=True)
            dv = dparams["w"]["v"] + unit * (dparams["w"]["g"] * g / jnp.linalg.norm(v, axis=0))[None]
            return {**dparams, "w": {**dparams["w"], "v": dv}}, dx
        _, u, v = residuals
        sigma = u @ params["w"].T @ v
        return {**dparams, "w": BIASED.backward(params, residuals[0], dy)[0]["w"] / sigma}, dx

    report = check_layer(wrapped._replace(backward=backward), x, key=key, precisions=(), cost=False)
    wrong = {leaf.path.split("params/")[-1] for leaf in report.leaves if leaf.verdict == "wrong"}
    assert wrong >= {"w/v" if wrapper == "weight_norm" else "w"} and "b" not in wrong and "w/g" not in wrong


def test_the_audit_says_that_vectors_on_their_way_are_no_constants(key):
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    report = check_layer(spectral_norm(BIASED), x, key=key, precisions=(), cost=False)
    wrong = {leaf.path: leaf.cause for leaf in report.leaves if leaf.verdict == "wrong"}
    assert list(wrong) == ["train/params/w"] and "autodiff gives the same: stop_gradient" in wrong["train/params/w"]


@pytest.mark.long
def test_a_model_with_a_wrapped_child_passes_the_audit_layer_by_layer(key):
    model = weight_norm(serial(dense(4), tanh(), spectral_norm(dense(3), iterations=200)), "dense_0/w")
    batch = (np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32), np.array([0, 1, 2, 0, 1]))
    report = check_model(model, fnet.softmax_cross_entropy, batch, key=key, precisions=(), cost=False)
    assert report.ok, report


# --- the start, the state, the end ------------------------------------------------------------------------------------


@every_layer
def test_weight_norm_changes_nothing_at_the_start(name, x64):
    layer, path, shape = LAYERS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    params, state = weight_norm(layer, path).init(jax.random.key(0), x)
    bare, _ = layer.init(jax.random.key(0), x)
    assert_leaves_close(fold_weight_norm(params, path), bare, 1e-15)
    y = weight_norm(layer, path).forward(params, state, x)[0]
    np.testing.assert_allclose(y, layer.forward(bare, state, x)[0], rtol=1e-12)


def test_the_state_moves_in_training_alone_and_ends_at_the_largest_singular_value(x64):
    _, _, wrapped, params, state, x, _ = drawn("spectral_norm", "conv")
    same = wrapped.forward(params, state, x)[1]
    jax.tree.map(np.testing.assert_array_equal, same, state)
    run = jax.jit(lambda state: wrapped.forward(params, state, x, train=True)[1])
    for _ in range(60):
        state = run(state)
    plain, inner = fold_spectral_norm(params, state)
    assert inner == ()
    gains = np.linalg.svd(at(params, "w").reshape(-1, 4), compute_uv=False)
    np.testing.assert_allclose(at(plain, "w") * gains[0], at(params, "w"), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.svd(at(plain, "w").reshape(-1, 4), compute_uv=False)[0], 1, rtol=1e-9)


def test_the_state_has_no_gradient(x64):
    _, _, wrapped, params, state, x, dy = drawn("spectral_norm", "dense")

    def value(params, state):
        y, new_state, _ = wrapped.forward(params, state, x, train=True)
        return (y * dy).sum(), new_state

    dparams, dstate = jax.grad(lambda p, s: value(p, s)[0] + 7 * value(p, s)[1]["u"].sum(), (0, 1))(params, state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(dstate))
    assert_leaves_close(dparams, by_hand(wrapped, params, state, x, dy)[2][0], 1e-12)


def test_several_leaves_are_wrapped_one_after_the_other(key):
    x = jnp.ones((2, 3, 4))
    params, state = weight_norm(spectral_norm(lstm(2), "input/w"), "recurrent/w").init(key, x)
    assert set(params["recurrent"]["w"]) == {"g", "v"} and params["input"]["w"].shape == (4, 8)
    assert state["u"].shape == (8,) and state["v"].shape == (4,)
    layer = repeat(mixed_precision(weight_norm(dense(4))), 3)  # each copy by itself
    params, state = layer.init(key, x[0])
    assert params["w"]["g"].shape == (3, 4) and layer.forward(params, state, x[0])[0].shape == (3, 4)


# --- against torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "conv", "conv_transpose"])
@both
def test_outputs_gradients_and_vectors_are_those_of_torch(wrapper, name, x64):
    torch = pytest.importorskip("torch")
    layer, theirs = {
        "dense": (BIASED, torch.nn.Linear(4, 3)),
        "conv": (conv(4, (2, 2), padding="VALID", groups=2), torch.nn.Conv2d(2, 4, 2, groups=2)),
        "conv_transpose": (LAYERS["conv_transpose"][0], torch.nn.ConvTranspose2d(2, 3, 2, stride=2)),
    }[name]
    theirs, axes = theirs.double(), (-2, -1) if name == "conv_transpose" else (-1, -2)
    if wrapper == "weight_norm":
        theirs = torch.nn.utils.parametrizations.weight_norm(theirs, dim=1 if name == "conv_transpose" else 0)
    else:
        theirs = torch.nn.utils.parametrizations.spectral_norm(theirs, n_power_iterations=2)
    inner = theirs.parametrizations.weight

    def weights(tensor):  # (O, I, *kernel), or (I, O, *kernel), as (*kernel, I, O)
        return jnp.asarray(np.moveaxis(tensor.detach().numpy(), (0, 1), axes))

    def moved(state):
        u, v = (np.asarray(inner[0].get_buffer(part).numpy()) for part in ("_u", "_v"))
        by_input = v.reshape(params["w"].shape[-2], *params["w"].shape[:-2])  # PyTorch counts inputs before places
        return {**state, "u": jnp.asarray(u), "v": jnp.asarray(np.moveaxis(by_input, 0, -1).ravel())}

    rng = np.random.default_rng(0)
    last = lambda tensor: np.moveaxis(tensor.detach().numpy(), 1, -1)  # noqa: E731
    their_x = torch.tensor(np.moveaxis(rng.normal(size=LAYERS[name][2]), -1, 1), requires_grad=True)
    ours, x = WRAPPERS[wrapper](layer), jnp.asarray(last(their_x))
    params, state = ours.init(jax.random.key(0), x)
    params = {"b": jnp.asarray(theirs.bias.detach().numpy())}
    if wrapper == "weight_norm":
        params["w"] = {"g": jnp.asarray(inner.original0.detach().numpy().ravel()), "v": weights(inner.original1)}
    else:
        params["w"] = weights(inner.original)
        state = jax.tree.map(jnp.copy, moved(state))
    their_y = theirs(their_x)
    dy = rng.normal(size=their_y.shape)
    their_y.backward(torch.tensor(dy))
    y, new_state, (dparams, dx) = by_hand(ours, params, state, x, jnp.asarray(np.moveaxis(dy, 1, -1)))
    expected = {"b": theirs.bias.grad.numpy()}
    if wrapper == "weight_norm":
        expected["w"] = {"g": inner.original0.grad.numpy().ravel(), "v": weights(inner.original1.grad)}
    else:
        expected["w"] = weights(inner.original.grad)
        assert_leaves_close(new_state, moved(state), 1e-12)
    assert_leaves_close((y, dx, dparams), (last(their_y), last(their_x.grad), expected), 1e-12)


# --- errors ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("layer", "path", "message"),
    [
        (dense(3), "weights", "expected params with a leaf 'weights', got b, w"),
        (dense(3), "w/v", "expected params with a leaf 'w/v', got b, w"),
        (dense(3), "b", r"expected weights \(..., outputs\) of at least two axes at 'b', got float32\[3\]"),
        (lstm(3), "input", "expected weights .* at 'input', got a dict"),
        (repeat(dense(4), 2), "w", "expected 'w' of one layer, got the copies of a repeat: wrap the layer within it"),
    ],
)
def test_what_has_no_such_weights_is_refused_with_its_path(wrapper, layer, path, message):
    model = serial(("inner", WRAPPERS[wrapper](layer, path)))
    shape = (2, 3, 4) if layer.name == "lstm" else (2, 4)
    with pytest.raises(LayerError, match=f"^inner: {message}"):
        model.init(jax.random.key(0), jnp.ones(shape))


def test_arguments_parameters_and_states_that_do_not_fit_are_refused(key):
    with pytest.raises(ValueError, match="spectral_norm: iterations = 0; expected at least 1"):
        spectral_norm(dense(3), iterations=0)
    with pytest.raises(ValueError, match="spectral_norm: eps = 0; expected above 0"):
        spectral_norm(dense(3), eps=0)
    with pytest.raises(TypeError, match=r"weight_norm: layer is .*; expected the Layer that it makes"):
        weight_norm(dense)
    with pytest.raises(TypeError, match="weight_norm: name = 0; expected the path of a leaf"):
        weight_norm(dense(3), 0)
    x = jnp.ones((2, 4))
    params, _ = spectral_norm(dense(3)).init(key, x)
    with pytest.raises(LayerError, match=r"expected \{'g' \(O,\), 'v' \(..., O\)\} at 'w': pass what init returned"):
        weight_norm(dense(3)).forward(params, (), x)
    with pytest.raises(LayerError, match=r"expected the state \{'layer', 'u' \(3,\), 'v' \(4,\)\}: pass what init"):
        spectral_norm(dense(3)).forward(params, (), x)
