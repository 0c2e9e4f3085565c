"""Taps cost nothing, and their gradients are those of the chain rule, by name, in the order of the backward pass."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet import intermediate_gradients, tap

W = np.array([[0.3, -0.7], [1.1, 0.2], [-0.4, 0.9]], np.float32)
X = np.array([[1.0, 2.0, -1.0], [0.5, -1.5, 0.3]], np.float32)


def net(w, x):
    z = tap("z", x @ w)
    a = tap("a", jnp.tanh(z))
    return (a**2).sum()


def chain_rule(w, x):
    """The gradients of `net` by a and by z in float64."""
    a = np.tanh(x.astype(np.float64) @ w)
    return {"a": 2 * a, "z": 2 * a * (1 - a**2)}


def test_gradients_of_tapped_values_are_those_of_the_chain_rule_last_tap_first():
    for run in (intermediate_gradients, lambda f, *args: jax.jit(lambda *a: intermediate_gradients(f, *a))(*args)):
        grads = run(net, W, X)
        for name, expected in chain_rule(W, X).items():
            np.testing.assert_allclose(grads[name], expected, rtol=1e-5, atol=1e-6)
    assert list(intermediate_gradients(net, W, X)) == ["a", "z"]


def test_taps_work_in_a_jitted_function_and_under_vmap():
    jitted = intermediate_gradients(jax.jit(net), W, X)
    np.testing.assert_allclose(jitted["z"], chain_rule(W, X)["z"], rtol=1e-5, atol=1e-6)
    stacked = jax.vmap(lambda x: intermediate_gradients(net, W, x[None])["z"][0])(X)
    np.testing.assert_allclose(stacked, chain_rule(W, X)["z"], rtol=1e-5, atol=1e-6)

    def inner_vmap(w, x):
        return jax.vmap(lambda row: (tap("a", jnp.tanh(row @ w)) ** 2).sum())(x).sum()

    np.testing.assert_allclose(
        intermediate_gradients(inner_vmap, W, X)["a"], chain_rule(W, X)["a"], rtol=1e-5, atol=1e-6
    )


def test_a_tap_inside_a_scan_comes_back_with_the_steps_along_the_first_axis():
    def f(w, xs):
        def step(h, x):
            h = tap("h", jnp.tanh(w * h + x))
            return h, None

        return jax.lax.scan(step, jnp.zeros(()), xs)[0]

    w, xs = 0.8, np.array([0.5, -0.2, 0.9, 0.1], np.float32)
    h, hs = 0.0, []
    for x in xs.astype(np.float64):
        h = np.tanh(w * h + x)
        hs.append(h)
    dh, expected = 1.0, [0.0] * 4
    for t in reversed(range(4)):
        expected[t] = dh
        dh = dh * (1 - hs[t] ** 2) * w
    np.testing.assert_allclose(intermediate_gradients(f, w, xs)["h"], expected, rtol=1e-5)
    nested = intermediate_gradients(
        lambda w, xs: jax.lax.scan(lambda s, x: (s + f(w, x), None), 0.0, xs)[0], w, xs[None]
    )
    np.testing.assert_allclose(nested["h"], np.array(expected)[None], rtol=1e-5)


def test_taps_in_branches_and_remat_and_of_pytrees():
    def f(w, x):
        y = jax.checkpoint(lambda w: tap("inner", jnp.sin(w)))(w)
        y = jax.lax.cond(x.sum() > 0, lambda y: tap("branch", 3.0 * y), lambda y: y, y)
        pair = tap("pair", {"left": y * 2.0, "count": jnp.arange(3)})
        return pair["left"].sum()

    grads = intermediate_gradients(f, np.ones(2, np.float32), np.ones(2, np.float32))
    assert list(grads) == ["pair/left", "branch", "inner"]
    np.testing.assert_allclose(grads["pair/left"], [1, 1])
    np.testing.assert_allclose(grads["branch"], [2, 2])
    np.testing.assert_allclose(grads["inner"], [6, 6])


def test_a_tap_leaves_no_trace_in_the_compiled_program():
    def text(f):
        """The compiled program without the names of source lines."""
        compiled = str(jax.jit(jax.grad(f)).lower(W, X).compile().as_text())
        compiled = re.sub(
            r"metadata=\{[^}]*\}|HloModule [^\n]*|FileNames.*?(?=\n%|\nENTRY)", "", compiled, flags=re.DOTALL
        )
        return re.sub(r", stack_frame_id=\d+|stack_frame_id=\d+", "", compiled)

    def untapped(w, x):
        z = x @ w
        a = jnp.tanh(z)
        return (a**2).sum()

    assert "tanh" in text(net) and text(net) == text(untapped)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda w, x: (x @ w).sum(), ValueError, "nothing is tapped"),
        (lambda w, x: tap("z", x @ w), ValueError, r"returned \[\(2, 2\)\]; expected one scalar"),
        (lambda w, x: tap("z", tap("z", x @ w)).sum(), ValueError, "two intermediates are tapped as 'z'"),
        (
            lambda w, x: jax.lax.fori_loop(0, w.size // 6 + x.shape[0], lambda i, w: tap("z", w), w).sum(),
            ValueError,
            "",
        ),
        (lambda w, x: tap(x, "z").sum(), TypeError, "expected a name and then the value"),
        (lambda w, x: tap("", x).sum(), ValueError, "the name is empty"),
    ],
    ids=["none", "vector", "twice", "loop", "arguments swapped", "empty"],
)
def test_bad_taps_are_refused(f, error, message):
    if not message:  # a loop of a known length is a scan: its tap is fine; one of an unknown length is not
        assert intermediate_gradients(f, W, X)["z"].shape == (3, *W.shape)
        f, message = (
            (lambda w, x: jax.lax.while_loop(lambda v: v.sum() < 9.0, lambda v: tap("z", v + 1.0), w).sum()),
            "while loop",
        )
    with pytest.raises(error, match=message):
        intermediate_gradients(f, W, X)


# ---- check_gradients(intermediates=...) ----


def compared(given, f=net, **options):
    return fnet.check_gradients(f, W, X, intermediates=given, precisions=(), cost=False, **options)


def test_right_intermediates_agree_in_the_order_of_the_backward_pass():
    report = compared(chain_rule(W, X))
    assert report.ok and [i.name for i in report.intermediates] == ["a", "z"]
    assert all(i.agreement.endswith("digits") or i.agreement == "exact" for i in report.intermediates)
    narrow = compared({name: g.astype(np.float32) for name, g in chain_rule(W, X).items()})
    assert narrow.ok, str(narrow)
    assert compared(lambda w, x: intermediate_gradients(net, w, x)).intermediates[0].agreement == "exact"


def test_the_first_wrong_line_of_the_backward_pass_is_named_and_what_follows_is_said_to_follow():
    right = chain_rule(W, X)
    wrong_z = compared({**right, "z": right["z"] / 2})
    assert wrong_z.first_wrong == "z" and not wrong_z.ok
    assert [(i.verdict, i.cause) for i in wrong_z.intermediates] == [("ok", ""), ("wrong", "factor 0.5")]
    wrong_a = compared({"a": -right["a"], "z": -right["z"]})
    assert wrong_a.first_wrong == "a"
    assert [i.cause for i in wrong_a.intermediates] == ["sign", "sign; may follow from a"]
    with pytest.raises(AssertionError, match="may follow from a"):
        wrong_a.raise_if_wrong()


def test_the_gradient_of_a_tap_that_is_zero_up_to_rounding_is_not_blamed():
    def f(w, x):
        z = tap("z", x @ w)
        largest = tap("largest", z.max(1, keepdims=True))  # subtracting it changes nothing
        return jnp.log(jnp.exp(z - largest).sum(1)).sum() + largest.sum()

    report = compared({"largest": np.zeros((2, 1))}, f)
    assert report.ok, str(report)
    assert not compared({"largest": np.full((2, 1), 1e-7)}, f).ok


def test_a_mistake_in_the_first_wrong_line_is_named_with_the_line_of_the_forward():
    def half(w, x):
        a = jnp.tanh(x @ w)
        return {"a": 2 * a, "z": a}  # 2 a (1 - a²) without its derivative, and halved

    report = compared(half)
    assert report.intermediates[1].cause.startswith("missing derivative of tanh (test_intermediates.py:")
    assert report.intermediates[1].cause.endswith("taken as 1, and a factor 0.5")


def test_wrong_shapes_and_unknown_names_of_intermediates_are_refused():
    report = compared({"z": np.zeros((3, 2))})
    assert report.intermediates[0].cause == "wrong shape: (3, 2), expected (2, 2)" and not report.ok
    with pytest.raises(ValueError, match=r"\['logits'\] are not tapped .* \['z', 'a'\]"):
        compared({"logits": np.zeros(2)})
