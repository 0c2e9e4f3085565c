"""Interpreted programs give what they give when run, and say what depends on what."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet import gradcheck
from fnet.core.interpret import HIDDEN, dependencies, evaluate, location, walk


def everything(w, x):
    """Scan both ways, cond, while, remat, a call, custom rules."""
    h = jax.nn.relu(x @ w)

    def step(c, x):
        c = jnp.tanh(c * w[0, 0] + x)
        return c, (c, 2 * x)

    c, (ys, _) = jax.lax.scan(step, h.sum(), jnp.arange(3.0) * x[0, 0], reverse=True)
    z = jax.lax.cond(c > 0, lambda c: c * 2, jnp.sin, c)
    z = jax.lax.while_loop(lambda z: z < 10, lambda z: z * 2 + 1, jnp.abs(z))
    return jax.checkpoint(jnp.sin)(z) + ys.sum(), jax.jit(lambda v: v.max())(h)


ARGUMENTS = np.array([[0.4, -0.2], [0.1, 0.9]], np.float32), np.array([[1.0, 2.0], [-0.3, 0.5], [0.2, 0.2]], np.float32)


@pytest.mark.parametrize("unroll", [False, True])
def test_a_program_evaluates_to_what_the_function_returns(unroll):
    closed = jax.make_jaxpr(everything)(*ARGUMENTS)
    outputs, _ = evaluate(closed, ARGUMENTS, unroll=unroll)
    np.testing.assert_allclose(outputs, everything(*ARGUMENTS), rtol=1e-6)
    assert evaluate(
        jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, x: (c, x), 0.0, x)[1])(np.zeros((0, 2), np.float32)),
        [jnp.zeros((0, 2))],
        unroll=unroll,
    )[0][0].shape == (0, 2)


def test_a_rule_replaces_an_operation_wherever_it_stands():
    closed = jax.make_jaxpr(everything)(*ARGUMENTS)

    def cosine_for_tanh(site, eqn, inputs, extras):
        return [jnp.cos(inputs[0])] if eqn is not None and eqn.primitive.name == "tanh" else None

    def as_written(w, x):
        h, ys = jnp.maximum(x @ w, 0).sum(), []
        for t in (2, 1, 0):
            h = jnp.cos(h * w[0, 0] + t * x[0, 0])
            ys.append(h)
        z = jnp.abs(2 * h if h > 0 else jnp.sin(h))
        while z < 10:
            z = 2 * z + 1
        return jnp.sin(z) + sum(ys)

    np.testing.assert_allclose(
        evaluate(closed, ARGUMENTS, rule=cosine_for_tanh)[0][0], as_written(*ARGUMENTS), rtol=1e-5
    )


def test_observers_see_every_operation_of_every_step_when_loops_are_unrolled():
    closed = jax.make_jaxpr(everything)(*ARGUMENTS)
    seen = []
    evaluate(closed, ARGUMENTS, observe=lambda site, eqn, *_: seen.append(eqn.primitive.name), unroll=True)
    assert seen.count("tanh") == 3 and seen.count("max") == 1


def test_dependencies_follow_calls_loops_and_branches():
    def f(a, b, c, d):
        first = jax.lax.cond(d > 0, lambda x: x + 1.0, lambda x: 0.0 * x, a)
        carried = jax.lax.scan(lambda s, _: ((s[1], s[1] + b), None), (0.0, 0.0), None, length=2)[0]
        return first, carried[0], jnp.float32(3.0), jax.jit(lambda x: (x, x * c))(a)[1]

    closed = jax.make_jaxpr(f)(1.0, 2.0, 3.0, 4.0)
    assert dependencies(closed.jaxpr, [1, 2, 4, 8]) == [1 | 8, 2, 0, 1 | 4]


def test_a_place_is_the_users_line():
    closed = jax.make_jaxpr(everything)(*ARGUMENTS)
    (tanh,) = [place for place in walk(closed.jaxpr) if place.eqn.primitive.name == "tanh"]
    assert tanh.lengths == (3,) and location(tanh.eqn, tanh.calls).startswith("test_interpret.py:")


def test_what_is_no_place_of_the_users_is_where_it_is_said_to_be():
    paths = [Path(part) for part in HIDDEN if os.sep in part]
    assert all(path.exists() for path in paths) and Path(gradcheck.__file__).parent in paths
