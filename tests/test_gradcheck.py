"""The audit catches every wrong gradient, says where and why, and accepts the right ones."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fnet
from fnet.gradcheck import self_test
from fnet.layers.activation import by_entry
from fnet.types import Batch, Loss

QUICK: dict = {"precisions": (), "cost": False}
X = np.linspace(-1, 1, 30).reshape(6, 5) ** 3 + np.sin(np.arange(30)).reshape(6, 5)
PARAMS = {
    "w": np.cos(np.arange(20)).reshape(5, 4) * 0.4,
    "b": np.linspace(-0.3, 0.4, 4),
    "q": np.sin(np.arange(16) ** 2).reshape(4, 4),
}


def net(p, x):
    return ((jnp.tanh(x @ p["w"] + p["b"][None]) @ p["q"]) ** 2).sum() / (2 * x.shape[0])


def by_hand(p, x):
    """The gradient of `net` in NumPy."""
    a = np.tanh(x @ p["w"] + p["b"])
    dy = a @ p["q"] / len(x)
    dz = dy @ p["q"].T * (1 - a**2)
    return {"w": x.T @ dz, "b": dz.sum(0), "q": a.T @ dy}


def check(f, params, *args, **options):
    return fnet.check_gradients(f, params, *args, **{**QUICK, **options})


def verdicts(report):
    return {leaf.path: leaf.verdict for leaf in report.leaves}


def leaf_of(report, path):
    (leaf,) = [leaf for leaf in report.leaves if leaf.path == path]
    return leaf


def altered(**changes):
    """`by_hand` with some leaves replaced by functions of them."""

    def gradient(p, x):
        grads = by_hand(*jax.tree.map(np.asarray, (p, x)))
        return {path: changes[path](g) if path in changes else g for path, g in grads.items()}

    return gradient


def put(g, index, value):
    g = g.copy()
    g[index] = value
    return g


# ---- negative controls ----

FAULTS = {
    "zero": ("w", lambda g: 0 * g, "zero: never receives"),
    "sign": ("w", lambda g: -g, "sign"),
    "half": ("q", lambda g: g / 2, "factor 0.5"),
    "1.001": ("b", lambda g: 1.001 * g, "factor 1.001"),
    "missing 1/B": ("w", lambda g: 6 * g, "missing 1/B (factor 6)"),
    "missing 1/B and a sign": ("w", lambda g: -6 * g, "missing 1/B (factor -6)"),
    "one entry": ("w", lambda g: put(g, (2, 1), g[2, 1] + 2e-6 * np.abs(g).max()), "entry [2, 1]"),
    "one row": ("w", lambda g: put(g, 3, 0.0), "row 3 zero"),
    "one column": ("w", lambda g: put(g, (slice(None), 1), 0.0), "column 1 zero"),
    "transposed": ("q", lambda g: g.T, "transposed"),
    "rows permuted": ("w", lambda g: g[[0, 3, 2, 4, 1]], "permuted"),
    "entries permuted": ("b", lambda g: g[[2, 0, 3, 1]], "entries permuted"),
    "shifted": ("w", lambda g: np.roll(g, 1, 0), "shifted by 1 along axis 0"),
    "reversed": ("b", lambda g: g[::-1], "reversed"),
    "constant": ("w", lambda g: g + 0.1, "a constant 0.1 is added"),
    "nan": ("b", lambda g: put(g, 2, np.nan), "not finite in 1 of 4 entries, first at [2]"),
    "sum": ("b", lambda g: np.full_like(g, g.sum()), "wrong axis"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_gradient_is_refused_its_leaf_named_and_the_cause_said(fault):
    path, change, cause = FAULTS[fault]
    report = check(net, PARAMS, X, gradient=altered(**{path: change}))
    assert verdicts(report) == {**dict.fromkeys(PARAMS, "ok"), path: "wrong"}
    assert cause in leaf_of(report, path).cause
    assert not report.ok and report.first_wrong == path
    with pytest.raises(AssertionError, match=f"{path} .*wrong"):
        report.raise_if_wrong()


def test_the_right_gradient_is_accepted_by_hand_and_by_autodiff():
    for gradient in (altered(), None):
        report = check(net, PARAMS, X, gradient=gradient)
        assert verdicts(report) == dict.fromkeys(sorted(PARAMS), "ok")
        assert report.raise_if_wrong() is report
        assert all(leaf.order is None or leaf.order > 1.8 for leaf in report.leaves)
        assert all(leaf.power <= 1e-6 for leaf in report.leaves)


def test_leaves_that_hold_each_others_gradients_are_named():
    p = {"a": PARAMS["q"], "b": PARAMS["q"].T + 1.0}

    def f(p):
        return (jnp.sin(p["a"]) * p["b"]).sum()

    report = check(f, p, gradient=lambda p: {"a": jnp.sin(p["a"]), "b": jnp.cos(p["a"]) * p["b"]})
    assert leaf_of(report, "a").cause == "swapped: holds the gradient of b"
    assert leaf_of(report, "b").cause == "swapped: holds the gradient of a"


def test_errors_are_relative_to_the_leaf_and_the_worst_entry_is_shown_with_both_values():
    report = check(net, PARAMS, X, gradient=altered(w=lambda g: put(g, (4, 0), g[4, 0] + 1.0)))
    leaf, g = leaf_of(report, "w"), by_hand(PARAMS, X)["w"]
    assert leaf.worst == (4, 0)
    np.testing.assert_allclose(leaf.expected, g[4, 0], rtol=1e-12)
    np.testing.assert_allclose(leaf.claimed, g[4, 0] + 1, rtol=1e-12)
    np.testing.assert_allclose([leaf.absolute, leaf.relative], [1, 1 / np.abs(g).max()], rtol=1e-12)
    np.testing.assert_allclose(leaf.ulps, 1 / np.spacing(abs(g[4, 0])), rtol=1e-9)
    np.testing.assert_allclose(leaf.errors.max(), leaf.relative, rtol=1e-12)
    assert (
        leaf.order is not None and abs(leaf.order - 1) < 0.1
    )  # the Taylor remainder vanishes with the first power only
    assert f"wrong at [4, 0]: {leaf.claimed:.6g}, expected {leaf.expected:.6g}" in str(report)


def test_a_millionth_in_one_entry_of_a_hundred_thousand_is_seen():
    w = np.random.default_rng(0).standard_normal((400, 250))

    def gradient(p):
        g = np.cos(np.asarray(p)) / p.size
        g[123, 45] += 2e-6 * np.abs(g).max()
        return g

    report = check(lambda p: jnp.sin(p).mean(), w, gradient=gradient)
    assert verdicts(report) == {"params": "wrong"} and leaf_of(report, "params").worst == (123, 45)
    assert check(lambda p: jnp.sin(p).mean(), w, gradient=lambda p: jnp.cos(p) / p.size).ok


MISTAKES = {
    "the derivative is missing": (lambda z, a: jnp.ones_like(z), "missing derivative of tanh"),
    "the derivative is taken at a": (lambda z, a: 1 - jnp.tanh(a) ** 2, "derivative of tanh taken at its output a"),
    "the formula in a is given z": (lambda z, a: 1 - z**2, "by the formula in its output a, given its input z"),
    "the activation is not differentiated": (lambda z, a: a, "tanh itself in the place of its derivative"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_derivation_is_named_with_the_line_of_the_forward(mistake):
    factor, cause = MISTAKES[mistake]

    def gradient(p, x):
        z = x @ p["w"] + p["b"][None]
        a = jnp.tanh(z)
        dy = a @ p["q"] / x.shape[0]
        dz = dy @ p["q"].T * factor(z, a)
        return {"w": x.T @ dz, "b": dz.sum(0), "q": a.T @ dy}

    report = check(net, PARAMS, X, gradient=gradient)
    assert verdicts(report) == {"b": "wrong", "q": "ok", "w": "wrong"}
    for path in ("w", "b"):
        assert cause in leaf_of(report, path).cause and "test_gradcheck.py:" in leaf_of(report, path).cause


def normalise(p, x):
    h = x @ p["w"]
    centred = h - h.mean(0)[None]
    inv = jax.lax.rsqrt((centred**2).mean(0) + 1e-3)
    return (centred * inv[None] * jnp.cos(x[:, :4])).sum()


NORMALISATION = {
    "right": (1, 1, 1e-3, ""),
    "mean dropped": (0, 1, 1e-3, "is missing (dropped)"),
    "variance dropped": (1, 0, 1e-3, "is missing (dropped)"),
    "variance of the wrong sign": (1, -1, 1e-3, "has the wrong sign"),
    "another epsilon": (1, 1, 1e-1, "wrong epsilon: not 0.001"),
}


@pytest.mark.parametrize("mistake", NORMALISATION)
def test_a_dropped_term_a_wrong_sign_and_a_wrong_epsilon_of_a_normalisation_are_named(mistake):
    mean, variance, eps, cause = NORMALISATION[mistake]

    def gradient(p, x):
        h, d = x @ p["w"], jnp.cos(x[:, :4])
        centred = h - h.mean(0)[None]
        inv = ((centred**2).mean(0) + eps)[None] ** -0.5
        hat = centred * inv
        return {"w": x.T @ (inv * (d - mean * d.mean(0)[None] - variance * hat * (d * hat).mean(0)[None]))}

    (leaf,) = check(normalise, {"w": PARAMS["w"]}, X, gradient=gradient).leaves
    assert leaf.verdict == ("wrong" if cause else "ok") and cause in leaf.cause, leaf


def test_truncated_back_propagation_through_time_is_named():
    def f(w, xs):
        return jax.lax.scan(lambda h, x: (jnp.tanh(h * w + x), None), jnp.zeros(3), xs)[0].sum()

    def last_two_steps(w, xs):
        hs = [jnp.zeros(3)]
        for x in xs:
            hs.append(jnp.tanh(hs[-1] * w + x))
        dw, dh = jnp.zeros(3), jnp.ones(3)
        for t in (4, 3):
            dz = dh * (1 - hs[t + 1] ** 2)
            dw, dh = dw + dz * hs[t], dz * w
        return dw

    (leaf,) = check(f, np.array([0.5, -0.4, 0.9]), X[:5, :3], gradient=last_two_steps).leaves
    assert leaf.verdict == "wrong" and "truncated through time" in leaf.cause


# ---- the second witness ----


def test_slopes_convict_what_autodiff_agrees_with():
    report = check(lambda w: (jax.lax.stop_gradient(w) * w).sum(), np.array([1.0, 2.0]))
    assert verdicts(report) == {"params": "wrong"}
    assert "stop_gradient at test_gradcheck.py:" in report.leaves[0].cause


def test_a_wrong_custom_rule_is_found_without_a_claimed_gradient():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, d: (2 * x**2 * d,))
    report = check(lambda w: cube(w).sum(), np.array([1.0, -2.0]))
    assert report.leaves[0].verdict == "wrong" and report.leaves[0].cause == "factor 0.666667"
    cube.defvjp(lambda x: (x**3, x), lambda x, d: (3 * x**2 * d,))
    assert check(lambda w: cube(w).sum(), np.array([1.0, -2.0])).ok


def loop(p, x):
    """Not differentiable in reverse mode: the number of rounds is not known when it is traced."""
    return jax.lax.while_loop(lambda s: s[0] < x.size // 6, lambda s: (s[0] + 1, jnp.sin(s[1]) * 1.2), (x.size * 0, p))[
        1
    ].sum()


def loop_by_hand(p, x):
    values, g = [np.asarray(p)], 1.0
    for _ in range(5):
        values.append(np.sin(values[-1]) * 1.2)
    for value in values[:-1]:
        g = g * np.cos(value) * 1.2
    return g


def test_slopes_alone_accept_the_right_and_find_the_wrong_entry_where_there_is_no_autodiff():
    p = PARAMS["w"]
    right = check(loop, p, X, gradient=loop_by_hand)
    assert right.ok and any("slopes alone" in note for note in right.notes), str(right)
    wrong = check(loop, p, X, gradient=lambda p, x: put(loop_by_hand(p, x), (3, 1), 0.0))
    assert wrong.leaves[0].verdict == "wrong" and wrong.leaves[0].cause == "entry [3, 1] zero"


def test_slopes_alone_serve_at_the_callers_own_precision_too():
    p = jnp.asarray(PARAMS["w"], jnp.float32)
    report = check(loop, p, X, gradient=lambda p, x: jnp.asarray(loop_by_hand(p, x), p.dtype), cost=True)
    assert report.leaves[0].verdict in ("ok", "unverified")
    assert report.leaves[0].ladder[0].error < 1e-5 and np.isnan(report.leaves[0].ladder[0].expected)


def test_a_custom_rule_of_what_autodiff_does_not_pass_is_audited_at_every_precision():
    rounds = lambda p: jax.lax.fori_loop(0, p.size, lambda k, v: jnp.sin(v), p).sum()  # noqa: E731
    ruled = jax.custom_vjp(
        lambda p: jax.lax.while_loop(lambda s: s[0] < p.size, lambda s: (s[0] + 1, jnp.sin(s[1])), (0, p))[1].sum()
    )
    ruled.defvjp(lambda p: (ruled(p), p), lambda p, d: (d * jax.grad(rounds)(p),))
    (leaf,) = check(lambda p: ruled(p), np.float32([0.5, 0.2, 0.9]), precisions=("bfloat16",)).leaves
    assert leaf.verdict == "ok" and [rung.error < 0.1 for rung in leaf.ladder] == [True, True]


def test_slopes_alone_narrow_down_to_the_wrong_row_of_a_large_leaf():
    p = np.random.default_rng(1).standard_normal((40, 30))
    report = check(loop, p, X, gradient=lambda p, x: put(loop_by_hand(p, x), 17, 0.0))
    assert report.leaves[0].verdict == "wrong" and "row 17" in report.leaves[0].cause
    assert check(loop, p, X, gradient=lambda p, x: 0.5 * loop_by_hand(p, x)).leaves[0].cause == "factor 0.5"
    assert check(loop, p, X, gradient=loop_by_hand).leaves[0].verdict in ("ok", "unverified")


# ---- kinks ----


def relu_net(p, x):
    return (jax.nn.relu(x @ p["w"]) * jnp.arange(1.0, 5)[None]).sum()


def test_a_relu_net_is_not_blamed_for_kinks_nearby():
    rng = np.random.default_rng(0)
    p, x = {"w": rng.standard_normal((30, 4))}, rng.standard_normal((200, 30))
    assert verdicts(check(relu_net, p, x)) == {"w": "ok"}


def at_zero(p, x, slope=0.0, spoil=lambda g: g):
    """The gradient of `relu_net`, with a slope of one's own at 0."""
    z = np.asarray(x @ p["w"])
    d = np.where(z > 0, 1.0, np.where(z == 0, slope, 0.0)) * np.arange(1.0, 5)
    return {"w": spoil(np.asarray(x).T @ d)}


KINKED = {"w": PARAMS["w"] * [1, 0, 1, 1]}  # the second column's preactivations are all 0


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_any_slope_between_the_one_sided_ones_is_a_kink_and_the_kink_is_named(slope):
    x = np.abs(X)
    (leaf,) = check(relu_net, KINKED, x, gradient=lambda p, x: at_zero(p, x, slope)).leaves
    assert leaf.verdict == "kink" and "x = 0 at relu[0, 1]" in leaf.cause, leaf


def test_a_slope_outside_is_wrong_at_the_same_point():
    x = np.abs(X)
    for slope in (-0.1, 1.1):
        (leaf,) = check(relu_net, KINKED, x, gradient=lambda p, x, s=slope: at_zero(p, x, s)).leaves
        assert leaf.verdict == "wrong" and "outside the one-sided slopes" in leaf.cause and "relu" in leaf.cause


@pytest.mark.parametrize("column", [0, 1])
def test_a_kink_hides_no_fault_in_the_rest_of_its_leaf_nor_in_the_kinked_entries(column):
    x = np.abs(X)

    def gradient(p, x):
        return at_zero(p, x, 0.0, lambda g: put(g, (2, column), g[2, column] + 0.9 * np.abs(g).max()))

    (leaf,) = check(relu_net, KINKED, x, gradient=gradient).leaves
    assert leaf.verdict == "wrong" and leaf.worst == (2, column)


@pytest.mark.parametrize(
    ("f", "named"),
    [
        (lambda p: jnp.abs(p).sum(), "x = 0 at abs[1]"),
        (lambda p: jnp.maximum(p, jnp.array([1.0, 5.0, -1.0])).sum(), "both sides equal at max[0]"),
        (lambda p: p.max() + jnp.sin(p).sum(), ""),
        (lambda p: jnp.clip(p, -2.0, 1.0).sum(), "[0]"),
        (lambda p: jax.lax.clamp(-9.0, p, 1.0).sum(), "x at the bound at clamp[0]"),
    ],
    ids=["abs", "maximum", "no tie", "clip", "clamp"],
)
def test_kinks_of_other_operations_are_named_by_index(f, named):
    (leaf,) = check(f, np.array([1.0, 0.0, -3.0])).leaves
    assert leaf.verdict == ("kink" if named else "ok") and named in leaf.cause, leaf


@pytest.mark.parametrize(
    ("layer", "value", "named"),
    [
        (fnet.layers.relu(), 0, "x = 0 at le[1, 2, 4, 0]"),
        (fnet.layers.hard_sigmoid(), -3, "x = 0 at le[1, 2, 4, 0]"),
        (fnet.layers.hard_swish(), 3, "both sides equal at ge[1, 2, 4, 0]"),
    ],
    ids=["relu", "hard_sigmoid", "hard_swish"],
)
def test_a_kink_in_an_image_of_few_channels_is_named_where_the_image_has_it(layer, value, named):
    x = np.random.default_rng(0).uniform(0.1, 0.4, (2, 4, 5, 3))  # no kink there
    x[1, 2, 4, 0] = value
    (leaf,) = check(lambda x: fnet.apply(layer, (), (), x).sum(), x).leaves
    assert leaf.verdict == "kink" and named in leaf.cause, leaf


def test_a_tie_in_a_pooled_image_of_few_channels_is_named_by_its_window():
    x = np.random.default_rng(0).permutation(np.arange(144.0)).reshape(2, 4, 6, 3)
    x[1, 2, 4, 0] = x[1, 3, 5, 0] = 1000
    pool = fnet.layers.max_pool((2, 2))
    (leaf,) = check(lambda x: fnet.apply(pool, (), (), x).sum(), x).leaves
    assert leaf.verdict == "kink" and "[1, 1, 2, 0]" in leaf.cause, leaf


def test_a_kink_behind_a_convolution_is_named_where_its_image_has_it():
    conv, relu = fnet.layers.conv(2, (3, 3)), fnet.layers.relu()
    x, w = (np.random.default_rng(0).standard_normal(shape) for shape in ((2, 4, 5, 3), (3, 3, 3, 2)))
    with jax.enable_x64(True):
        y = conv.forward({"w": jnp.asarray(w), "b": jnp.zeros(2)}, (), jnp.asarray(x))[0]
    params = {"w": w, "b": np.array([0, -float(y[0, 2, 3, 1])])}
    leaves = check(lambda p: fnet.apply(relu, (), (), fnet.apply(conv, p, (), x)).sum(), params).leaves
    assert any("x = 0 at le[0, 2, 3, 1]" in leaf.cause for leaf in leaves), leaves


def test_a_kink_within_a_loop_or_a_call_that_stands_twice_is_named_there():
    relu = fnet.layers.relu()
    images = np.random.default_rng(0).uniform(0.5, 1, (2, 2, 4, 5, 3))
    images[1, 0, 2, 4, 1] = 0

    def looped(xs):
        return jax.lax.scan(lambda total, x: (total + fnet.apply(relu, (), (), x).sum(), None), 0.0, xs)[0]

    assert "x = 0 at le[0, 2, 4, 1]" in check(looped, images).leaves[0].cause
    f, x = jax.jit(lambda x: jnp.where(x <= 0, 0, x)), np.random.default_rng(0).uniform(0.5, 1, (3, 3))
    x[2, 1] = 0
    assert "[2, 1]" in check(lambda x: f(x).sum() + f((x + 1).T).sum(), x).leaves[0].cause


# ---- not finite ----


def test_what_is_not_finite_in_an_image_of_few_channels_is_named_where_the_image_has_it():
    log = by_entry("log", lambda x: (jnp.log(2 * x), x), lambda x, dy: dy / x)
    x = np.random.default_rng(0).uniform(1, 2, (2, 4, 5, 3))
    x[1, 2, 4, 0] = 0
    (leaf,) = check(lambda x: fnet.apply(log, (), (), x).sum(), x).leaves
    assert "-inf from log, index [1, 2, 4, 0]" in leaf.cause, leaf


def test_the_operation_that_makes_a_nan_is_named():
    (leaf,) = check(lambda p: jnp.where(p > 0, jnp.sqrt(p), 0.0).sum(), np.array([0.0, 1.0])).leaves
    assert leaf.verdict == "wrong" and leaf.cause.startswith("not finite: inf from div")
    assert "test_gradcheck.py:" in leaf.cause and "`where`" in leaf.cause
    (leaf,) = check(lambda p: jnp.log(p).sum(), np.array([0.0, 1.0])).leaves
    assert leaf.verdict == "unverified" and "-inf from log" in leaf.cause


# ---- rounding ----


def test_saturated_units_and_gradients_that_are_zero_up_to_rounding_are_not_blamed():
    def saturated(w, x):
        return jnp.tanh(x @ w).sum()

    x, w = np.abs(X) + 0.4, np.full(5, 2.9)
    report = check(saturated, w, x, gradient=lambda w, x: x.T @ jnp.cosh(x @ w) ** -2)  # autodiff: 1 - tanh², rounded
    assert report.ok and report.leaves[0].relative > 1e-9, str(report)

    def shift(p, x):  # a constant added before normalisation changes nothing
        h = x + p["c"][None]
        h = (h - h.mean(0)[None]) / (h.std(0)[None] + 1e-5)
        return (h * jnp.cos(x)).sum()

    assert check(shift, {"c": np.arange(5.0)}, X).ok
    assert check(shift, {"c": np.arange(5.0)}, X, gradient=lambda p, x: {"c": jnp.zeros(5)}).ok
    assert verdicts(check(shift, {"c": np.arange(5.0)}, X, gradient=lambda p, x: {"c": 1e-9 * jnp.ones(5)})) == {
        "c": "wrong"
    }


def test_a_formula_that_cancels_is_imprecise_and_not_wrong():
    """1 - cos²x for sin²x at 1e-5: nothing is wrong with it but rounding, some 1e-6 of the result."""

    def f(p):
        return (p / 2 - jnp.sin(2 * p) / 4).sum()

    p = np.array([1.2e-5, 2.3e-5])
    (leaf,) = check(f, p, gradient=lambda p: 1 - jnp.cos(p) ** 2).leaves
    np.testing.assert_allclose(leaf.expected, np.sin(p[leaf.worst]) ** 2, rtol=1e-3)
    assert leaf.verdict == "imprecise" and "rounding" in leaf.cause and 1e-9 < leaf.relative < 1e-3, leaf


def test_a_gradient_that_only_rounds_badly_in_the_callers_precision_is_imprecise_with_the_size_expected():
    def f(p, x):
        return (0.5 * (x - p) ** 2).sum()

    def through_squares(p, x):  # p - x as (p² - x²) / (p + x): fine in float64, four digits lost in float32
        return (p * p - x * x) / (p + x)

    x = np.linspace(500, 1500, 50, dtype=np.float32)
    report = check(f, x + np.linspace(0.01, 1, 50, dtype=np.float32), x, gradient=through_squares)
    (leaf,) = report.leaves
    assert leaf.verdict == "imprecise" and leaf.cause.startswith("in float32 the error is") and "expected" in leaf.cause
    (rung,) = leaf.ladder
    assert rung.dtype == "float32" and rung.error > 100 * rung.expected


def test_the_ladder_has_a_rung_for_every_precision_with_errors_of_its_size():
    report = check(
        net, PARAMS, X, gradient=lambda p, x: jax.grad(net)(p, x), precisions=("float32", "bfloat16", "float16")
    )
    for leaf in report.leaves:
        rungs = {rung.dtype: rung for rung in leaf.ladder}
        assert list(rungs) == ["float32", "bfloat16", "float16"]
        for dtype, eps in (("float32", 2.0**-23), ("bfloat16", 2.0**-7), ("float16", 2.0**-10)):
            assert eps / 200 < rungs[dtype].error < 30 * eps


def test_while_a_leaf_is_wrong_the_ladder_has_the_parameters_own_precision_alone():
    params = {path: leaf.astype(np.float32) for path, leaf in PARAMS.items()}
    report = check(net, params, X, gradient=altered(b=lambda g: 2 * g), precisions=("bfloat16", "float16"))
    assert verdicts(report)["b"] == "wrong" and verdicts(report)["w"] == "ok"
    for leaf in report.leaves:
        assert [rung.dtype for rung in leaf.ladder] == ["float32"]


# ---- narrow types inside ----


def narrow(p):
    return (p.astype(jnp.float32) ** 2).sum()


def test_a_cast_inside_is_never_ok_its_place_is_named_and_large_faults_are_still_wrong():
    p = np.array([1.0, -0.7])
    report = check(narrow, p)
    (leaf,) = report.leaves
    assert leaf.verdict == "unverified" and "casts to float32 at test_gradcheck.py:" in leaf.cause and not report.ok
    assert 1e-6 < leaf.power < 1e-2
    with pytest.raises(AssertionError, match="not verified"):
        report.raise_if_wrong()
    assert check(narrow, p, gradient=lambda p: 2.02 * p).leaves[0].verdict == "wrong"


# ---- structure ----

STRUCTURE = {
    "missing": (lambda g: {"w": g["w"], "b": g["b"]}, "q", "wrong tree: no gradient for this leaf"),
    "none": (lambda g: {**g, "b": None}, "b", "never receives a gradient"),
    "shape": (lambda g: {**g, "w": g["w"].T}, "w", "wrong shape: (4, 5), the parameter has (5, 4)"),
    "integer": (lambda g: {**g, "w": g["w"].astype(int)}, "w", "wrong dtype: int"),
    "extra": (lambda g: {**g, "z": g["w"]}, "w", "wrong tree: also gradients for ['z']"),
}


@pytest.mark.parametrize("kind", STRUCTURE)
def test_a_wrong_tree_shape_or_dtype_has_its_own_message(kind):
    change, path, message = STRUCTURE[kind]
    report = check(net, PARAMS, X, gradient=lambda p, x: change(jax.grad(net)(p, x)))
    assert leaf_of(report, path).verdict == "wrong" and message in leaf_of(report, path).cause


def test_a_list_for_a_tuple_is_a_wrong_tree_and_a_narrow_gradient_a_wrong_dtype():
    p = (np.ones(2), np.ones(3))

    def f(p):
        return (p[0] ** 2).sum() + (p[1] ** 2).sum()

    assert "containers" in check(f, p, gradient=lambda p: [2 * p[0], 2 * p[1]]).leaves[0].cause
    half = jnp.ones(3, jnp.bfloat16)
    report = check(lambda p: (p**2).sum(), half, gradient=lambda p: 2 * p.astype(jnp.float32))
    assert (
        report.leaves[0].verdict == "wrong"
        and "wrong dtype: float32, the parameter has bfloat16" in report.leaves[0].cause
    )


def test_a_leaf_that_the_function_ignores_is_said_to_be_so():
    p = {"used": np.ones(2), "unused": np.ones(2)}

    def f(p):
        return jnp.sin(p["used"]).sum()

    report = check(f, p)
    assert report.ok and "does not depend" in leaf_of(report, "unused").cause
    wrong = check(f, p, gradient=lambda p: {"used": jnp.cos(p["used"]), "unused": jnp.ones(2)})
    assert (
        verdicts(wrong) == {"used": "ok", "unused": "wrong"}
        and "does not change with this leaf" in leaf_of(wrong, "unused").cause
    )


def test_an_input_that_a_gradient_ignores_is_named():
    def gradient(p, x):  # as if all examples were the first one, which was looked at when it was written
        g = by_hand(PARAMS, X[::-1] ** 2)
        return {**jax.grad(net)(p, x), "b": jnp.asarray(g["b"]) * (p["b"] + 2.0)}

    report = check(net, PARAMS, X, gradient=gradient)
    assert verdicts(report) == {"b": "wrong", "q": "ok", "w": "ok"}
    assert leaf_of(report, "b").cause == "ignores q, w, argument 0"


def test_a_result_that_changes_between_two_calls_is_refused_with_the_remedy():
    rng = np.random.default_rng(0)
    report = check(lambda p: (p * rng.standard_normal()).sum(), np.ones(2))
    assert "the function changes between two calls" in report.leaves[0].cause and "key" in report.leaves[0].cause
    report = check(lambda p: (p**2).sum(), np.ones(2), gradient=lambda p: 2 * p * rng.standard_normal())
    assert "the gradient changes between two calls" in report.leaves[0].cause and not report.ok


# ---- where users are ----


def setting():
    config: dict = jax.config.values
    return jnp.ones(1).dtype, config["jax_numpy_dtype_promotion"], config["jax_default_matmul_precision"]


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("promotion", ["strict", "standard"])
def test_the_callers_precision_and_promotion_do_not_matter_and_are_left_as_they_were(x64, promotion):
    with jax.enable_x64(x64), jax.numpy_dtype_promotion(promotion):
        before = setting()
        data = jnp.arange(3, dtype=jnp.float32)
        for dtype in (jnp.float32, jnp.bfloat16):
            assert check(lambda p: (p.astype(p.dtype) * data.astype(p.dtype) ** 2).sum(), jnp.ones(3, dtype)).ok
        with pytest.raises(ZeroDivisionError):
            check(lambda p: 1 // 0, jnp.ones(3))
        assert setting() == before


def test_integer_boolean_and_key_leaves_are_passed_through_and_aux_is_allowed():
    p = {"w": np.ones(3), "n": np.int32(2), "mask": np.array([True, False, True]), "key": jax.random.key(0)}

    def f(p, k, flag):
        noise = jax.random.normal(p["key"], (3,))
        value = jnp.where(p["mask"], p["w"] ** 2 * noise, 0.0).sum() * (k if flag else 0)
        return value, {"noise": noise}

    def gradient(p, k, flag):
        noise = jax.random.normal(p["key"], (3,))
        return {**jax.tree.map(lambda _: None, p), "w": jnp.where(p["mask"], 2 * p["w"] * noise, 0.0) * k}

    report = check(f, p, 3, True, gradient=gradient, has_aux=True)
    assert verdicts(report) == {"w": "ok"}, str(report)
    floats = {"w": np.ones(3)}
    assert check(lambda p: ((p["w"] ** 2).sum(), 0), floats, has_aux=True).ok
    assert check(
        jax.jit(lambda p: (p["w"] ** 2).sum()), floats, gradient=jax.jit(jax.grad(lambda p: (p["w"] ** 2).sum()))
    ).ok


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check(lambda p: p.sum(), np.arange(3)), ValueError, "no floating leaf"),
        (
            lambda: check(lambda p: p * 2.0, np.ones(3)),
            ValueError,
            r"returned float64\[3\]; expected one floating scalar",
        ),
        (lambda: check(lambda p: p.sum() if p[0] > 0 else 0.0, np.ones(3)), ValueError, "jnp.where or jax.lax.cond"),
        (lambda: check(lambda p: p.sum().real, np.ones(3, complex)), TypeError, "complex128; only real"),
        (lambda: check(lambda p: p.sum(), np.ones(3), gradient=np.ones(3)), TypeError, "expected a function"),
        (lambda: check(lambda p: p.sum(), jax.ShapeDtypeStruct((3,), "float32")), TypeError, "give an array"),
        (lambda: check(lambda p: p.sum(), np.ones(3), intermediates={"z": 1}), ValueError, "nothing is tapped"),
    ],
    ids=["integers", "vector", "python if", "complex", "array for gradient", "shape", "no tap"],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- cost, report ----


def test_the_cost_of_both_gradients_is_that_of_their_programs():
    def f(w, x):
        return (x @ w).sum()

    w, x = np.ones((64, 32), np.float32), np.ones((16, 64), np.float32)
    report = check(f, w, x, gradient=lambda w, x: x.T @ jnp.ones((16, 32), x.dtype), cost=True)
    claimed, autodiff = report.costs
    assert (claimed.name, autodiff.name) == ("claimed", "autodiff")
    np.testing.assert_allclose(claimed.flops, 2 * 16 * 64 * 32, rtol=0.1)
    assert claimed.peak >= 4 * (w.size + x.size) and claimed.seconds > 0 and claimed.bytes > 0


def test_the_report_is_json_and_its_text_has_a_row_for_each_leaf():
    report = check(net, PARAMS, X, gradient=altered(b=lambda g: put(g, 0, np.nan)), precisions=("float32",), cost=True)
    data = json.loads(report.to_json())
    assert not data["ok"] and data["first_wrong"] == "b"
    assert {leaf["path"]: leaf["verdict"] for leaf in data["leaves"]} == verdicts(report)
    assert data["leaves"][0]["claimed"] == "nan" and data["settings"]["matmul precision"] == "highest"
    right = check(net, PARAMS, X, gradient=altered(), precisions=("float32",), cost=True)
    for path, (shown, rows) in itertools.product(PARAMS, ((report, 1), (right, 2))):  # its verdict, its ladder
        assert sum(line.startswith(f"{path} ") for line in str(shown).splitlines()) == rows


# ---- the audit proves itself ----


def test_every_injected_fault_is_caught_in_the_very_setting():
    result = self_test(net, PARAMS, X)
    assert result.ok and len(result.trials) > 40, str(result)
    assert {"zero", "sign", "transposed", "missing 1/B", "one entry off by 2e-6"} <= {t.kind for t in result.trials}


def test_a_checker_that_accepts_anything_fails_the_self_test(monkeypatch):
    from fnet.gradcheck import judge, selftest

    def gullible(w, claimed, i):
        return judge.judge(w, claimed, i)._replace(verdict="ok")

    monkeypatch.setattr(selftest, "judge", gullible)
    result = selftest.self_test(net, PARAMS, X)
    assert not result.ok and len(result.missed) == len(result.trials) > 40


ACTIVATIONS = [jnp.tanh, jnp.sin, jax.nn.sigmoid, jax.nn.relu, jax.nn.softplus, jnp.exp, jnp.abs, jax.nn.gelu]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    acts=st.lists(st.integers(0, len(ACTIVATIONS) - 1), min_size=2, max_size=3),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-4, 0.3, 10.0]),
)
def test_random_functions_pass_and_their_gradients_with_one_entry_off_do_not(acts, seed, scale):
    rng = np.random.default_rng(seed)
    p = {"w": rng.standard_normal((5, 4)) * scale, "v": rng.standard_normal(4)}

    def f(p, x):
        h = x @ p["w"]
        for k in acts:
            h = ACTIVATIONS[k](h) - h.mean(0)[None] * 0.3
        return (h * p["v"][None]).mean()

    report = check(f, p, X)
    assert report.ok, str(report)

    def gradient(p, x):
        g = jax.grad(f)(p, x)
        return {**g, "w": g["w"].at[seed % 5, seed % 4].add(1e-5 * jnp.abs(g["w"]).max())}

    wrong = check(f, p, X, gradient=gradient)
    assert verdicts(wrong) == {"v": "ok", "w": "wrong"}, str(wrong)
    assert leaf_of(wrong, "w").worst == (seed % 5, seed % 4)


# ---- layers and models ----


def wrong_layer(layer, change):
    """A layer whose backward's results are changed."""
    return layer._replace(backward=lambda params, residuals, dy: change(*layer.backward(params, residuals, dy)))


def digits_batch():
    x_key, y_key = jax.random.split(jax.random.key(3))
    return Batch(jax.random.normal(x_key, (6, 4)), jax.random.randint(y_key, (6,), 0, 3))


def model_check(model, loss=fnet.softmax_cross_entropy, batch=None, **options):
    return fnet.check_model(model, loss, batch or digits_batch(), key=jax.random.key(0), **{**QUICK, **options})


def wrong_rows(report):
    return [leaf.path for leaf in report.leaves if leaf.verdict == "wrong"]


def test_a_layer_whose_modes_are_one_program_is_audited_once_and_any_other_in_both_modes():
    right = fnet.dense(3)
    report = fnet.check_layer(right, digits_batch().inputs, key=jax.random.key(0), **QUICK)
    assert report.ok and [leaf.path for leaf in report.leaves] == ["inputs", "params/b", "params/w"]

    def scaled(params, state, x, *, key=None, train=False):  # by an array that the program's text does not show
        y, state, residuals = right.forward(params, state, x, key=key, train=train)
        return y * np.full(3, 2.0 if train else 3.0, np.float32), state, residuals

    def scaled_backward(params, residuals, dy):
        return right.backward(params, residuals, 2 * dy)

    layer = right._replace(forward=scaled, backward=scaled_backward)
    report = fnet.check_layer(layer, digits_batch().inputs, key=jax.random.key(0), **QUICK)
    assert wrong_rows(report) == ["eval/inputs", "eval/params/b", "eval/params/w"] and len(report.leaves) == 6

    def forward(params, state, x, *, key=None, train=False):
        y, state, residuals = right.forward(params, state, x, key=key, train=train)
        return y, state, (residuals, None if train else jnp.ones(()))

    def backward(params, residuals, dy):
        grads, dx = right.backward(params, residuals[0], dy)
        return grads, dx if residuals[1] is None else 2 * dx

    report = fnet.check_layer(
        right._replace(forward=forward, backward=backward), digits_batch().inputs, key=jax.random.key(0), **QUICK
    )
    assert wrong_rows(report) == ["eval/inputs"] and leaf_of(report, "eval/inputs").cause == "factor 2"


def test_axes_of_one_size_are_named_and_distinct_ones_are_not():
    def note(x, w):
        notes = fnet.check_gradients(lambda w, x: jnp.tanh(x @ w).sum(), w, x, **QUICK).notes
        return [line.split(": ")[1] for line in notes if line.startswith("axes of one size")]

    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 1, 4, 3)), rng.normal(size=(3, 2))
    assert note(x, w) == []
    assert note(x.repeat(3, 1), w) == ["argument 0 3 × 4 × 3"]
    assert note(x, rng.normal(size=(3, 3))) == ["params 3 × 3"]


def test_a_right_model_has_a_row_for_every_leaf_and_every_layers_inputs_in_model_order():
    report = model_check(fnet.mlp(5, 4, 3))
    assert report.ok, str(report)
    rows = [
        f"{name}/{leaf}"
        for name in ("dense_0", "relu_0", "dense_1", "relu_1", "dense_2")
        for leaf in ("inputs", "b", "w")
    ]
    rows = [row for row in rows if not (row.startswith("relu") and not row.endswith("inputs"))]
    assert [leaf.path for leaf in report.leaves] == [*rows, "loss/outputs"]


def test_the_first_wrong_layer_is_named_and_the_layers_below_it_are_not_blamed():
    bad = wrong_layer(fnet.dense(3), lambda grads, dx: (grads, 1.01 * dx))
    model = fnet.serial(fnet.dense(5), fnet.layers.tanh(), ("inner", fnet.serial(fnet.dense(4), ("bad", bad))))
    report = model_check(model)
    assert wrong_rows(report) == ["inner/bad/inputs"] == [report.first_wrong]
    assert "1.01" in leaf_of(report, "inner/bad/inputs").cause


def test_two_faults_are_both_named_and_the_later_layers_first():
    halved = wrong_layer(fnet.dense(5), lambda grads, dx: ({**grads, "w": grads["w"] / 2}, dx))
    turned = wrong_layer(fnet.layers.tanh(), lambda grads, dx: (grads, -dx))
    report = model_check(fnet.serial(("halved", halved), ("turned", turned), fnet.dense(3)))
    assert wrong_rows(report) == ["halved/w", "turned/inputs"] and report.first_wrong == "turned/inputs"
    assert leaf_of(report, "halved/w").cause == "factor 0.5" and leaf_of(report, "turned/inputs").cause == "sign"


def test_a_wrong_loss_gradient_is_named_and_no_layer_is_blamed():
    loss = Loss(fnet.losses.squared_error.value, fnet.losses.half_squared_error.gradient)
    batch = Batch(jnp.ones((2, 4)), jnp.ones((2, 3)))
    report = model_check(fnet.serial(fnet.dense(3)), loss, batch)
    assert wrong_rows(report) == ["loss/outputs"] and leaf_of(report, "loss/outputs").cause == "factor 0.5"
    assert model_check(fnet.serial(fnet.dense(3)), fnet.losses.squared_error, batch).ok
    assert model_check(fnet.dense(3), fnet.losses.squared_error, batch).ok  # a model that is one layer


def test_a_composition_whose_layers_are_right_is_blamed_itself():
    right = fnet.serial(fnet.dense(4), fnet.dense(4))
    model = fnet.serial(
        ("twice", wrong_layer(right, lambda grads, dx: ({**grads, "dense_0": grads["dense_1"]}, dx))), fnet.dense(3)
    )
    report = model_check(model)
    assert not report.ok and all(path.startswith("twice/dense_0") for path in wrong_rows(report))
    assert all("right one by one" in leaf.cause for leaf in report.leaves if leaf.verdict == "wrong")


def test_weights_of_the_examples_and_given_parameters_take_part():
    batch = digits_batch()._replace(weights=jnp.asarray([0, 1, 2, 0, 0.5, 1]))
    model = fnet.mlp(5, 3)
    params, state = fnet.init(model, jax.random.key(1), batch.inputs)
    assert model_check(model, batch=batch, params=params, state=state).ok
