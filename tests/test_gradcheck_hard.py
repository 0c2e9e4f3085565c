"""Points, functions and gradients that once deceived the audit, or easily could."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet import check_gradients, tap
from fnet.layers import stateless
from fnet.layers.children import forward_child
from fnet.types import Layer

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
    "a tiny entry dropped": (
        lambda w: (w**3).sum(),
        np.array([1e-5, 1, 2]),
        lambda w: (3 * w**2).at[0].set(0),
        "wrong",
    ),
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
        (lambda: fnet.check_layer(None, W, key=jax.random.key(0)), TypeError, "layer is None; expected a Layer"),
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


# --- entries that are small beside the others ------------------------------------------------------------------------

BIG = np.array([1.0, 2.0, 0.3])


def big_and_small(w):
    return 1e12 * jnp.sin(w[0]) + jnp.tanh(w[1] * w[2])


def by_hand(w):
    slope = 1 - jnp.tanh(w[1] * w[2]) ** 2
    return jnp.array([1e12 * jnp.cos(w[0]), w[2] * slope, w[1] * slope])


SMALL = {
    "a missing entry": (
        lambda g: g.at[1].set(0),
        1,
        "in 1 of 3 entries, small beside .*: zero: never receives a gradient",
    ),
    "a sign": (lambda g: g.at[2].set(-g[2]), 2, "in 1 of 3 entries, small beside"),
    "a factor of both": (lambda g: g.at[1:].multiply(2.0), 2, "in 2 of 3 entries, small .*: factor 2"),
    "swapped": (lambda g: g[jnp.array([0, 2, 1])], 1, "in 2 of 3 entries, small"),
    "one in a thousand": (lambda g: g.at[1].multiply(1.001), 1, "in 1 of 3 entries, small"),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_fault_in_an_entry_that_is_small_beside_the_leafs_largest_is_seen_and_placed(name):
    spoil, at, cause = SMALL[name]
    assert check(big_and_small, BIG, by_hand).ok
    (leaf,) = check(big_and_small, BIG, lambda w: spoil(by_hand(w))).leaves
    assert leaf.verdict == "wrong" and leaf.worst == (at,), leaf
    assert re.search(cause, leaf.cause), leaf.cause


@pytest.mark.parametrize("size", [1e7, 1e8, 1e10, 1e14])
def test_an_entry_may_be_missing_beside_any_other(size):
    f = lambda w: size * jnp.sin(w[0]) + w[1] ** 2  # noqa: E731
    w = np.array([1.0, 0.5])
    assert check(f, w, lambda w: jnp.array([size * jnp.cos(w[0]), 2 * w[1]])).ok
    assert check(f, w, lambda w: jnp.array([size * jnp.cos(w[0]), 0])).leaves[0].verdict == "wrong"


def test_the_row_of_the_bug_report():
    f = lambda w: 1e12 * w[0] + w[1]  # noqa: E731
    assert not check(f, np.array([1.0, 2.0]), lambda w: jnp.array([1e12, 0.0])).ok
    assert check(f, np.array([1.0, 2.0]), lambda w: jnp.array([1e12, 1.0])).ok


def test_a_small_entry_that_is_all_rounding_or_underflow_is_no_fault():
    # written in another order the first entry is 1e4 · (1 + 1e-12 − 1), which has lost its digits; the last underflows
    f = lambda w: 1e4 * ((1.0 + w[0]) - 1.0) + jnp.exp(w[1]) + jnp.exp(-(w[2] ** 2))  # noqa: E731
    w = np.array([1e-12, 27.0, 27.0])
    assert check(f, w, lambda w: jnp.array([1e4, 0, 0]) + jnp.array([0, jnp.exp(w[1]), 0])).leaves[0].verdict in ("ok",)
    cancelled = lambda w: ((w[0] + 1e8) - 1e8) ** 2 + 1e10 * jnp.sin(w[1])  # noqa: E731
    assert check(
        cancelled, np.array([1e-3, 1.0]), lambda w: jnp.array([2 * ((w[0] + 1e8) - 1e8), 1e10 * jnp.cos(w[1])])
    ).ok


def test_a_small_entry_that_autodiff_gives_as_rounding_is_no_fault():
    f = lambda w: w[0] ** 2 + 0.1 * w[1] + 0.2 * w[1] - 0.3 * w[1]  # noqa: E731
    (leaf,) = check(f, np.array([3.0, 0.5]), lambda w: jnp.array([2 * w[0], 0])).leaves
    assert leaf.verdict == "ok" and leaf.claimed == 0 and 0 < abs(leaf.expected) < 1e-15, leaf


def test_a_small_fault_in_a_model_is_placed_in_its_layer():
    forgetful = fnet.Layer(
        "scale",
        lambda key, x: ({"s": jnp.array([1e6, 1e-6, 1.0, 1.0, 1.0], x.dtype)}, ()),
        lambda p, s, x, **_: (x * p["s"][None], s, x),
        lambda p, x, dy: ({"s": (x * dy).sum(0)}, (dy * p["s"][None]).at[:, 1].set(0)),
    )
    report, wrong = model_check(fnet.dense(5), forgetful, fnet.dense(3))
    assert "scale_0/inputs" in wrong and report.first_wrong == "scale_0/inputs"


def test_an_intermediate_with_a_small_missing_entry_is_wrong():
    def f(w):
        return (jnp.array([1e12, 1.0]) * tap("z", w)).sum()

    for z, verdict in (
        (lambda w: {"z": jnp.array([1e12, 0.0])}, "wrong"),
        (lambda w: {"z": jnp.array([1e12, 1.0])}, "ok"),
    ):
        report = check_gradients(f, np.array([1.0, 2.0]), intermediates=z, **QUICK)
        assert report.intermediates[0].verdict == verdict


# --- Python numbers in programs --------------------------------------------------------------------------------------

LITERALS = {
    "log": lambda w: (w * jnp.log(2.0)).sum(),
    "sqrt": lambda w: (w * jnp.sqrt(2.0)).sum(),
    "abs and sign": lambda w: (w * jnp.abs(-2.0) * jnp.sign(-3.0)).sum(),
    "floor and round": lambda w: (w * jnp.floor(2.5) * jnp.round(3.7)).sum(),
    "maximum": lambda w: (w * jnp.maximum(2.0, 3.0)).sum(),
    "clip": lambda w: (w * jnp.clip(0.3, 0.5, 1.0)).sum(),
    "power": lambda w: (w * jnp.power(2.0, 0.5)).sum(),
    "where": lambda w: jnp.where(True, w, 0.0).sum(),
    "comparison": lambda w: (w * jnp.where(jnp.greater(2.0, 1.0), 3.0, 0.0)).sum(),
    "exp in a scan": lambda w: jax.lax.scan(lambda c, _: (c * jnp.exp(-1.0), None), w, None, length=3)[0].sum(),
    "log in a branch": lambda w: jax.lax.cond(w.sum() > 0, lambda w: w * jnp.log(3.0), lambda w: w, w).sum(),
    "log-sum-exp of a pair": lambda w: (jnp.logaddexp(w, -w) - jnp.log(2.0).astype(w.dtype)).sum(),
    "a custom rule": lambda w: (w * jax.nn.relu(2.0) * jax.nn.silu(1.0)).sum(),
}


@pytest.mark.parametrize("name", LITERALS)
def test_python_numbers_in_a_traced_program_are_no_obstacle(name):
    w = np.array([0.5, 1.5, -0.7])
    assert check(LITERALS[name], w).ok
    assert not check(LITERALS[name], w, lambda w: 1.01 * jax.grad(LITERALS[name])(w)).ok


# --- the order of the remainder --------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_slope_or_is_not_shown():
    smooth = {
        "sin": (lambda w: jnp.sin(w).sum(), 2),
        "cube at 0": (lambda w: (w**3).sum(), 3),
        "much cancels": (lambda w: (jnp.sin(w) + 1e6).sum() - 3e6, 2),
        "linear": (lambda w: (3 * w).sum(), None),
        "constant beside rounding": (lambda w: 1e9 + (1e-12 * jnp.sin(w)).sum(), None),
    }
    for name, (f, order) in smooth.items():
        w = np.zeros(3) if name == "cube at 0" else np.array([0.3, 0.5, 0.9])
        found = check(f, w).leaves[0].order
        assert found is None if order is None else found > order - 0.3, (name, found)
    order = check(jnp.sum, W, lambda w: 1.01 * jnp.ones_like(w)).leaves[0].order
    assert order is not None and abs(order - 1) < 0.1


@pytest.mark.parametrize("seed", range(8))
def test_no_order_of_a_right_gradient_is_below_2_in_a_network_in_float32(seed):
    rng = np.random.default_rng(seed)
    model, x = fnet.mlp(8, 8, 3), rng.standard_normal((16, 6)).astype(np.float32)
    batch = fnet.Batch(x, rng.integers(0, 3, 16))
    report = fnet.check_model(model, fnet.softmax_cross_entropy, batch, key=jax.random.key(seed), **QUICK)
    assert all(leaf.order is None or leaf.order > 1.7 for leaf in report.leaves), str(report)


# --- which side errs -------------------------------------------------------------------------------------------------


IDS = np.random.default_rng(0).integers(0, 2, 30_000).astype(np.int32)


def table_sum(rows, dtype):
    """The rows added up by id in a dtype, which in 16 bits stands still at 256."""
    return jnp.zeros((2, rows.shape[1]), dtype).at[IDS].add(rows.astype(dtype))


def narrow_table(backward_dtype) -> Layer:
    """A table whose rows are taken in bfloat16: autodiff adds their gradients up in bfloat16."""

    def forward(params, x):
        return x + params["t"].astype(jnp.bfloat16)[IDS].astype(x.dtype), ()

    init = lambda key, x: {"t": jnp.zeros((2, x.shape[-1]), x.dtype)}  # noqa: E731
    by_hand = lambda params, _, dy: ({"t": table_sum(dy, backward_dtype).astype(dy.dtype)}, dy)  # noqa: E731
    return stateless("narrow_table", init, forward, by_hand)


def test_the_ladder_says_which_gradient_errs_in_sixteen_bits():
    def f(t):
        return jnp.square(t[IDS] + 1).sum()

    def by_hand(dtype):
        return lambda t: table_sum(2 * (t[IDS] + 1), jnp.promote_types(dtype, t.dtype)).astype(t.dtype)

    t = jnp.zeros((2, 3))
    for gradient, side, shown in (
        (by_hand(jnp.float32), "autodiff", r"\de-0[34] \(1e\+00 ✗\)"),
        (None, "", r"\(1e\+00\)"),
    ):
        report = check_gradients(f, t, gradient=gradient, precisions=("bfloat16",), cost=False)
        (leaf,) = report.leaves
        assert leaf.ladder[-1].dtype == "bfloat16" and leaf.ladder[-1].erred == side, leaf.ladder
        assert report.ok and re.search(shown, str(report)) and ("✗ errs: by 10" in str(report)) == (side != "")
    g = lambda t: jnp.square(t.astype(jnp.float32)[IDS] + 1).sum().astype(t.dtype)  # noqa: E731
    report = check_gradients(g, t, gradient=by_hand(jnp.bfloat16), precisions=("bfloat16",), cost=False)
    assert report.leaves[0].ladder[-1].erred == "claimed" and re.search(r"1e\+00 ✗ \(\de-0[34]\)", str(report))


def test_beside_casts_the_report_says_which_gradient_is_the_programs_without_them():
    x, key = np.random.default_rng(0).uniform(1, 2, (len(IDS), 2)).astype(np.float32), jax.random.key(0)
    loss = fnet.Loss(lambda y, t: jnp.square(y - t).sum(-1), lambda y, t: 2 * (y - t))
    for dtype, words in (
        (jnp.float32, r"autodiff's by 1e\+00: autodiff errs$"),
        (jnp.bfloat16, r"off by 1e\+00 and .*00$"),
    ):
        batch = fnet.Batch(x, np.full(x.shape, -1.0, np.float32))
        params = {"t": jnp.zeros((2, 2))}
        report = fnet.check_model(narrow_table(dtype), loss, batch, key=key, params=params, **QUICK)
        rows = {leaf.path: leaf for leaf in report.leaves}
        assert rows["inputs"].verdict != "wrong" and rows["loss/outputs"].verdict == "ok"
        assert rows["t"].verdict == "unverified" and re.search(words, rows["t"].cause), rows["t"]


def test_an_identity_that_rounds_to_sixteen_bits_is_not_blamed_for_its_exact_gradient():
    rounding = stateless(
        "rounding",
        lambda key, x: (),
        lambda params, x: (x.astype(jnp.bfloat16).astype(x.dtype), ()),
        lambda params, _, dy: ((), dy),
    )
    report = fnet.check_layer(rounding, np.float32(NORMAL_8X8), key=jax.random.key(0), **QUICK)
    assert {leaf.verdict for leaf in report.leaves} == {"unverified"}
    assert all("without them the claimed gradient is off by 0e+00" in leaf.cause for leaf in report.leaves)


# --- leaves whose entries are of very different sizes -----------------------------------------------------------------

SPREAD = 10.0 ** np.linspace(-4, 4, 5)


def table(seed):
    """Logistic regression on raw columns: a constant, an age, an income, a share and a fortune."""
    rng = np.random.default_rng(seed)
    columns = [np.ones(200), *(rng.uniform(*ends, 200) for ends in ((18, 80), (1e4, 1e5), (0, 1e-3), (1e6, 1e8)))]
    x, y = np.stack(columns, 1), rng.integers(0, 2, 200).astype(float)

    def loss(w):
        return (jnp.logaddexp(0, x @ w) - y * (x @ w)).mean()

    return loss, rng.standard_normal(5) / x.max(0)


SCALES = {
    "sin": (lambda v: jnp.sin(np.array([1e-4, 1e4]) * v).sum(), 0.5 / np.array([1e-4, 1e4])),
    "sin, five sizes": (lambda v: jnp.sin(SPREAD * v).sum(), 0.5 / SPREAD),
    "tanh": (lambda v: jnp.tanh(SPREAD * v).sum(), 0.5 / SPREAD),
    "saturated": (lambda v: jnp.tanh(SPREAD * v).sum(), SPREAD),
    "far out": (lambda w: jnp.sin(w).sum(), np.array([1e8, 1e-8, 0.5])),
    "reciprocals": (lambda v: (1 / v).sum(), SPREAD),
    "raw columns": table(0),
    "other raw columns": table(1),
}


@pytest.mark.parametrize("name", SCALES)
def test_entries_of_very_different_sizes_are_audited_without_a_false_alarm(name):
    loss, point = SCALES[name]
    assert check(loss, point).ok
    report = check(loss, point, gradient=jax.grad(loss))
    assert report.ok, report
    with jax.enable_x64(True):
        slopes = np.asarray(jax.grad(loss)(jnp.asarray(point)))
    for k in np.flatnonzero(slopes):
        report = check(loss, point, gradient=lambda v, k=k: jax.grad(loss)(v).at[k].multiply(1.01))
        assert report.leaves[0].verdict == "wrong" and report.leaves[0].worst == (k,)


def test_a_kink_beside_entries_of_other_sizes_stays_one():
    report = check(lambda v: jnp.abs(v).sum(), np.array([0.0, 1e4, 1e-4]))
    assert report.leaves[0].verdict == "kink"
    report = check(lambda v: jnp.abs(v).sum(), np.array([0.0, 1e4, 1e-4]), gradient=lambda v: jnp.sign(v) + 2.0)
    assert report.leaves[0].verdict == "wrong"


def test_what_the_compiler_does_not_count_is_a_dash():
    report = fnet.check_gradients(lambda w: w.sum() * 0 + 1, np.array([1.0, 2.0]))
    assert "nan" not in str(report) and "–" in str(report)
