"""An audit compiles what another has compiled no second time, and never runs a program that is not its own."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.core.interpret import evaluate
from fnet.core.programs import operation_lines
from fnet.gradcheck import kept
from fnet.gradcheck.kept import prepared, same_program, told
from fnet.gradcheck.witnesses import derivative
from tests.conftest import compiled_programs

QUICK: dict = {"precisions": (), "cost": False}
OWN = ("as_it_stands", "autodiff", "differentiated", "doubled", "gates", "line")
W, X = np.linspace(-1, 2, 6).reshape(2, 3), np.sin(np.arange(8.0)).reshape(4, 2)


@pytest.fixture(autouse=True)
def nothing_kept():
    kept.forget()


def loss(w, x):
    return jnp.square(jnp.tanh(x @ w)).sum()


def by_hand(w, x, factor=1.0):
    a = jnp.tanh(x @ w)
    return factor * x.T @ (2 * a * (1 - a * a))


def audit(f=loss, *args, gradient=by_hand, **options):
    report = fnet.check_gradients(f, *(args or (W, X)), gradient=gradient, **options)
    return report.leaves[0].verdict, report.leaves[0].expected


def own_programs(names):
    """Those that an audit asks for, without the single operations that jax compiles."""
    names = [name.removeprefix("jit(").removesuffix(")") for name in names]
    return sorted(name for name in names if name in OWN)


# --- what is compiled again ------------------------------------------------------------------------------------------


def test_of_the_same_function_only_the_claimed_gradient_is_compiled_again():
    with compiled_programs() as first:
        assert audit()[0] == "ok"
    with compiled_programs() as second:
        assert audit(lambda w, x: loss(w, x), W + 0.1, X[::-1], gradient=lambda w, x: by_hand(w, x, 1.5))[0] == "wrong"
    with compiled_programs() as third:
        assert audit()[0] == "ok"
    # without x64 the caller's precision is float32: one program for the costs and the rung
    assert own_programs(first) == [*4 * ["as_it_stands"], "autodiff", *3 * ["differentiated"], "line"]
    # of a wrong one float32 and float64 alone
    assert own_programs(second) == 2 * ["as_it_stands"] and own_programs(third) == []


def test_causes_are_asked_of_a_program_that_is_compiled_once_and_name_their_own_lines():
    def other(w, x):
        return jnp.square(jnp.tanh(x @ w)).sum()

    def forgetful(w, x):
        return x.T @ (2 * jnp.tanh(x @ w))

    causes = []
    with compiled_programs() as names:
        for f in (loss, other):
            (leaf,) = fnet.check_gradients(f, W, X, gradient=forgetful, **QUICK).leaves
            causes.append(leaf.cause)
    assert own_programs(names).count("gates") == 1
    assert all("missing derivative of tanh" in cause for cause in causes) and causes[0] != causes[1], causes


def test_what_is_closed_over_may_be_other_arrays():
    programs = []
    for scale in (1.0, -3.0):
        data = jnp.asarray(scale * X, jnp.float32), np.float32(scale * X)
        for x in data:
            with compiled_programs() as names:
                expected = by_hand(np.float32(W), x)
                assert audit(lambda w, x=x: loss(w, x), np.float32(W), gradient=None, **QUICK)[0] == "ok"
                verdict, value = audit(lambda w, x=x: loss(w, x), np.float32(W), gradient=lambda w: 0 * w, **QUICK)
            programs.append(own_programs(names))
            assert verdict == "wrong" and abs(value) == pytest.approx(float(np.abs(expected).max()), rel=1e-5)
    assert all("line" not in names and "autodiff" not in names for names in programs[1:]), programs


# --- what is another program -----------------------------------------------------------------------------------------


def doubled(closed):
    return lambda x: 2 * evaluate(closed, [x])[0][0]


def run(f, x, **options):
    closed = jax.make_jaxpr(f)(x)
    return np.asarray(prepared("doubled", doubled, closed, (x,), **options)(x))


@pytest.mark.parametrize("quick", [True, False])
def test_constants_of_every_kind_are_those_of_the_function_that_is_run(quick):
    x = jnp.arange(3.0)
    for value in (2.0, 5.0):
        array = np.full(3, value, np.float32)
        inner = jax.jit(lambda x, array=array: x * array)
        for f in (
            lambda x, array=array: x * array,
            lambda x, array=array: x * jnp.asarray(array),
            lambda x, value=value: x * value,
            lambda x, array=array: jax.lax.scan(lambda c, _: (c * array, None), x, None, length=1)[0],
            inner,
        ):
            np.testing.assert_array_equal(run(f, x, quick=quick), 2 * value * np.arange(3.0))


def test_settings_shapes_and_dtypes_are_told_apart():
    f = lambda x: jnp.sin(x) * len(x)  # noqa: E731
    for x64 in (False, True, False):
        with jax.enable_x64(x64):
            for x in (jnp.ones(3), jnp.ones(3, jnp.float16), jnp.ones(2)):
                found = run(f, x)
                assert found.dtype == (2 * f(x)).dtype and found.shape == x.shape
    x = jnp.ones((4, 4)) + 2.0**-12
    with compiled_programs() as names:
        for precision in ("highest", "bfloat16", "highest"):
            with jax.default_matmul_precision(precision):
                run(lambda x: x @ x, x)
    assert own_programs(names).count("doubled") == 2


def test_what_is_made_of_a_program_goes_by_the_settings_and_by_all_arguments():
    def counted(closed):
        return lambda x, more: evaluate(closed, [x])[0][0].sum().astype(int) + jnp.arange(more.size).sum()

    x = jnp.ones(3)
    closed = jax.make_jaxpr(jnp.sin)(x)
    for x64, size in ((False, 2), (True, 2), (True, 3), (False, 3)):
        with jax.enable_x64(x64):
            given = x, jax.device_put(np.zeros(size, np.float32))
            found = np.asarray(prepared("counted", counted, closed, given)(*given))
        assert found.dtype == (np.int64 if x64 else np.int32) and found == 2 + size * (size - 1) // 2


def test_an_operation_that_nothing_comes_of_makes_another_program():
    def with_more(x):
        _ = jnp.cos(x)
        return jnp.sin(x)

    plain, more = (jax.make_jaxpr(f)(1.0) for f in (jnp.sin, with_more))
    assert told(plain).key != told(more).key  # gates and marks go by the places of operations


def test_jaxs_own_rules_are_told_from_the_users():
    relu = jax.custom_jvp(jax.jit(lambda x: jnp.maximum(x, 0)))  # written as jax's own
    relu.defjvp(lambda x, t: (relu(*x), 7 * t[0]))
    w, all_lines = np.array([0.0, 1.0, -2.0], np.float32), {}
    for f, slope in ((jax.nn.relu, 0.0), (relu, 0.5), (jax.nn.relu, 0.0)):
        leaves = [jnp.asarray(w)]
        closed = jax.make_jaxpr(lambda leaves, others, f=f: f(leaves[0]).sum())(leaves, [])
        (found,) = prepared("autodiff", derivative, closed, (leaves, []))(leaves, [])
        assert np.asarray(found).tolist() == [slope, 1, 0]
        lines = {line.text for line in operation_lines(closed)[0]}
        assert all_lines.setdefault("relu", lines) == lines  # by which they would be one program


def test_a_program_with_a_function_of_python_in_it_is_not_kept():
    def scaled(factor):
        def f(x):
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return jax.pure_callback(lambda x: np.asarray(factor * x, x.dtype), shape, x)

        return f

    x = jnp.arange(3.0)
    for factor in (2.0, 3.0):
        np.testing.assert_array_equal(run(scaled(factor), x), 2 * factor * np.arange(3.0))
    assert not kept._kept
    noisy = lambda x: (jax.debug.callback(lambda: None), x)[1]  # noqa: E731
    assert not told(jax.make_jaxpr(noisy)(x)).whole


def test_two_traces_with_other_constants_are_not_the_same_program():
    traces = [jax.make_jaxpr(lambda x, a=a: x * a)(X) for a in (X, X.copy(), X + 1)]
    assert same_program(traces[0], traces[1]) and not same_program(traces[0], traces[2])
    traces = [
        jax.make_jaxpr(lambda x, k=k: x + jax.random.normal(k, x.shape, x.dtype))(X)
        for k in map(jax.random.key, (0, 0, 1))
    ]
    assert same_program(traces[0], traces[1]) and not same_program(traces[0], traces[2])


# --- the memory itself -----------------------------------------------------------------------------------------------


def test_no_more_is_kept_than_is_said_and_the_latest_stays(monkeypatch):
    monkeypatch.setattr(kept, "KEPT", 2)
    functions = [jnp.sin, jnp.cos, jnp.exp]
    with compiled_programs() as names:
        for f in (jnp.sin, *functions):
            run(f, jnp.ones(2))
        assert own_programs(names).count("doubled") == 3 and len(kept._kept) == 2
        run(jnp.exp, jnp.ones(2))
        assert own_programs(names).count("doubled") == 3
        run(jnp.sin, jnp.ones(2))
        assert own_programs(names).count("doubled") == 4
    monkeypatch.setattr(kept, "MOST", 100)
    run(lambda x: x[:1] + np.ones(100), jnp.ones(2), quick=False)  # arrays that are part of it
    assert len(kept._kept) == 0


def test_a_program_that_does_not_compile_says_so_each_time():
    def broken(closed):
        return lambda x: jax.lax.map(lambda y: y, x) if False else jnp.ones(-1)

    closed = jax.make_jaxpr(jnp.sin)(jnp.ones(2))
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            prepared("broken", broken, closed, (jnp.ones(2),))
    assert not kept._kept


def test_audits_in_threads_do_not_disturb_each_other():
    alone = [audit(gradient=lambda w, x, k=k: by_hand(w, x, k), **QUICK) for k in (1.0, 2.0)]
    kept.forget()
    found: list = [None] * 6

    def work(k):
        found[k] = audit(gradient=lambda w, x: by_hand(w, x, 1.0 + k % 2), **QUICK)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 3 * alone
