"""Points, functions and gradients that once deceived the audit, or easily could."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet import check_gradients, tap
from fnet.types import Layer, forward_child, stateless

QUICK: dict = {"precisions": (), "cost": False}
W = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
ZEROS_AND_ONES = np.r_[np.zeros(80), np.ones(20)]
CARRY = jnp.zeros(3)  # made outside, so that it stays float32


def check(f, params, gradient=None, **options):
    return check_gradients(f, params, gradient=gradient, **{**QUICK, **options})


def looped_abs(w):
    """|w| + w², behind a loop that autodiff does not pass."""
    return jax.lax.while_loop(lambda s: s[1] < w.size // 30, lambda s: (s[0], s[1] + 1), (jnp.abs(w) + w**2, 0))[
        0
    ].sum()


def logistic_map(r):
    return jax.lax.fori_loop(0, 60, lambda i, x: r * x * (1 - x), r * 0 + 0.3)


def deep(w):
    x = jnp.ones(8)
    for _ in range(20):
        x = jnp.sin(w @ x)
    return x.sum()


def scanned(w):
    return jax.lax.scan(lambda h, x: (jnp.tanh(h + w * x), None), CARRY, jnp.ones(4))[0].sum()


def in_float32(w):
    return (jnp.tanh(w.astype(jnp.float32) @ jnp.ones((5, 3), jnp.float32)) ** 2).sum()


def relu_in_numpy(w):
    d = (w > 0) * 1.0
    d[w < 0] = 0.0
    return d


doubled = jax.custom_vjp(jnp.tanh)
doubled.defvjp(lambda x: (jnp.tanh(x), x), lambda x, d: (2 * d * (1 - jnp.tanh(x) ** 2),))
SPREAD = np.r_[np.zeros(10), np.random.default_rng(1).standard_normal(90)]
NORMAL_50, NORMAL_8X8 = np.random.default_rng(0).standard_normal(50), np.random.default_rng(0).standard_normal((8, 8))

CASES = {
    # a kink hides no fault, however many entries lie on it
    "every slope halved beside 80 kinks": (
        lambda w: jnp.abs(w).sum(),
        ZEROS_AND_ONES,
        lambda w: 0.5 * jnp.sign(w),
        "wrong",
    ),
    "80 kinks": (lambda w: jnp.abs(w).sum(), ZEROS_AND_ONES, jnp.sign, "kink"),
    "a sign beside 10 kinks, no autodiff": (
        looped_abs,
        SPREAD,
        lambda w: (jnp.sign(w) + 2 * w).at[50].multiply(-1),
        "wrong",
    ),
    "a subgradient of one's own": (
        lambda w: jnp.maximum(w, 0).sum(),
        np.float32([2, 0, -1]),
        lambda w: (w > 0) * 1.0 + (w == 0) * 0.3,
        "kink",
    ),
    "the norm at 0": (lambda w: jnp.sqrt((w**2).sum()), np.zeros(3), lambda w: w * 0 + 0.3, "kink"),
    "a tie in top_k": (lambda w: jax.lax.top_k(w, 2)[0].sum(), np.array([1.0, 1, 1, 0]), None, "kink"),
    "a tie in cummax": (lambda w: jax.lax.cummax(w).sum(), np.array([1.0, 1, 2]), None, "kink"),
    # neither a kink nor smooth
    "a cusp": (lambda w: jnp.sqrt(jnp.abs(w)).sum(), np.zeros(2), lambda w: 0 * w, "unverified"),
    "a jump": (lambda w: jnp.where(w >= 1, w + 5, w).sum(), np.array([1.0, 0.5]), None, "unverified"),
    "a step at its jump": (lambda w: jnp.heaviside(w, 1.0).sum(), np.zeros(2), None, "unverified"),
    "zero claimed of chaos": (logistic_map, np.float64(3.9), lambda r: 0 * r, "unverified"),
    # long steps mislead
    "saturated but at 1e-6": (lambda w: (jnp.tanh(1e6 * w) ** 2).sum(), 1e-6 * np.array([0.3, -0.7, 1.1]), None, "ok"),
    "a narrow bump": (lambda w: jnp.exp(-(((w - 1.0005) / 1e-3) ** 2)), np.float64(1.0), None, "ok"),
    "a period that the steps hit": (lambda w: jnp.sin(128 * jnp.pi * w), np.float64(1.0), None, "ok"),
    "twenty sines in a row": (deep, NORMAL_8X8, None, "ok"),
    "the tail of a normal": (lambda w: jax.scipy.special.log_ndtr(w).sum(), np.array([-7.0, -19, -33]), None, "ok"),
    "a tiny entry dropped": (lambda w: (w**3).sum(), np.array([1e-5, 1, 2]), lambda w: (3 * w**2).at[0].set(0), "ok"),
    # narrow types
    "bfloat16 within": (lambda w: jnp.sin(w.astype(jnp.bfloat16)).sum().astype(w.dtype), NORMAL_50, None, "unverified"),
    "float32 within": (in_float32, W, None, "unverified"),
    "1.00001 under float32": (in_float32, W, lambda w: 1.00001 * jax.grad(in_float32)(w), "unverified"),
    "half under float32": (in_float32, W, lambda w: 0.5 * jax.grad(in_float32)(w), "wrong"),
    "a closed-over float32 carry": (scanned, W[0, :3], None, "unverified"),
    "wrong with a float32 carry": (scanned, W[0, :3], lambda w: w * 0 + 0.1, "wrong"),
    "a gradient in float32": (
        lambda w: jnp.sin(w).sum(),
        np.float64([0.3, 0.7, 1.1]),
        lambda w: np.cos(np.float32(w)).astype(w.dtype),
        "imprecise",
    ),
    "another gradient in float32": (
        lambda w: (w**2).sum(),
        W,
        lambda w: 0 * w if w.dtype == jnp.float32 else 2 * w,
        "wrong",
    ),
    # rules and programs
    "a custom rule around jax's function": (lambda w: doubled(w).sum(), W, None, "wrong"),
    "a loop under vmap": (
        lambda w: jax.vmap(lambda a: jax.lax.while_loop(lambda s: s < a, lambda s: s * 2, a * 0.1))(w).sum(),
        np.array([2.0, 3, 7]),
        lambda w: 0 * w + 1.6,
        "ok",
    ),
    "NumPy in place": (lambda w: jax.nn.relu(w).sum(), np.float64(W), relu_in_numpy, "ok"),
}


@pytest.mark.parametrize("name", CASES)
def test_hard_cases_have_the_right_verdict(name):
    f, params, gradient, verdict = CASES[name]
    (leaf,) = check(f, params, gradient).leaves
    assert leaf.verdict == verdict, leaf


def test_paths_that_read_alike_are_kept_apart():
    params = {"a/b": W[0], "a": {"b": W[1]}}
    assert check(lambda p: (p["a/b"] ** 2).sum() + (p["a"]["b"] ** 3).sum(), params).ok


def test_integers_beside_the_parameters_are_no_obstacle_to_autodiff():
    assert check(lambda p: (p["w"] ** 2).sum() * p["n"], {"w": np.float64(W), "n": np.int64(3)}).ok


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (jnp.zeros((6, 5), jnp.bfloat16), "wrong"),
        (jnp.asarray(2 * W, jnp.bfloat16), "ok"),
        (np.float32(2 * W) * np.float32(1.00001), "wrong"),
        (W * np.nan, "wrong"),
    ],
    ids=["zeros in bfloat16", "right in bfloat16", "1.00001", "nan"],
)
def test_intermediates_may_be_off_by_the_rounding_of_their_own_type(given, verdict):
    report = check(lambda w: (tap("z", w) ** 2).sum(), W, intermediates={"z": given})
    assert report.intermediates[0].verdict == verdict, str(report)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check(3, W), TypeError, "f is int; expected a function"),
        (lambda: check(lambda w: w.sum(), W, has_aux=True), ValueError, "has_aux=True, but the function returned"),
        (lambda: check(lambda w: w.sum(), W, precisions="float32"), TypeError, "expected a tuple"),
        (lambda: check(lambda w: tap("z", w).sum(), W, intermediates=[1]), TypeError, "got list; expected a dict"),
        (lambda: check(lambda w: tap("z", w).sum(), W, intermediates={"z": None}), TypeError, "z is object"),
        (lambda: jax.jit(lambda w: check(lambda w: w.sum(), w))(W), ValueError, "outside jit, vmap and grad"),
        (lambda: fnet.check_layer(None, W, key=jax.random.key(0)), TypeError, "expected an fnet.Layer, got NoneType"),
    ],
    ids=["no function", "no pair", "text", "list", "none", "traced", "no layer"],
)
def test_misuse_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def model_check(*layers):
    batch = fnet.Batch(W, np.array([0, 1, 2, 0, 1, 2]))
    report = fnet.check_model(fnet.serial(*layers), fnet.softmax_cross_entropy, batch, key=jax.random.key(0), **QUICK)
    return report, [leaf.path for leaf in report.leaves if leaf.verdict == "wrong"]


def test_a_parameter_called_inputs_does_not_hide_the_gradient_of_the_inputs():
    layer = stateless(
        "lin",
        lambda key, x: {"inputs": jax.random.normal(key, (x.shape[-1], 4), x.dtype)},
        lambda params, x: (x @ params["inputs"], x),
        lambda params, x, dy: ({"inputs": x.T @ dy}, 3 * dy @ params["inputs"].T),
    )
    report, wrong = model_check(fnet.dense(5), layer, fnet.dense(3))
    assert wrong == ["lin_0/inputs (dx)"] == [report.first_wrong]


def forgetful_residual(child: Layer) -> Layer:
    """``x + child(x)`` with a backward that forgets the sum's first term."""

    def init(key, x):
        params, state = child.init(key, x)
        return {"child": params}, {"child": state}

    def forward(params, state, x, *, key=None, train=False):
        y, new_state, residuals = forward_child(
            "child", child, params["child"], state["child"], x, key=key, train=train
        )
        return x + y, {"child": new_state}, {"child": residuals}

    def backward(params, residuals, dy):
        dparams, dx = child.backward(params["child"], residuals["child"], dy)
        return {"child": dparams}, dx

    return Layer("residual", init, forward, backward)


@pytest.mark.parametrize("first", [True, False])
def test_a_combinator_whose_children_are_right_is_named_wherever_it_stands(first):
    residual, other = forgetful_residual(fnet.dense(5)), [] if first else [fnet.dense(5)]
    report, wrong = model_check(*other, residual, fnet.dense(3))
    assert wrong == ["residual_0/inputs"]
    (cause,) = [leaf.cause for leaf in report.leaves if leaf.verdict == "wrong"]
    assert cause.startswith("its layers are right one by one")


def test_a_model_without_parameters_is_audited_too():
    batch = fnet.Batch(W, W + 1)
    report = fnet.check_model(
        fnet.serial(fnet.layers.tanh()), fnet.losses.squared_error, batch, key=jax.random.key(0), **QUICK
    )
    assert report.ok and [leaf.path for leaf in report.leaves] == ["tanh_0/inputs", "loss/outputs"]
