"""Functions with known minima: `minimize_lbfgs`, and every optimizer at a rate of its own."""

from __future__ import annotations

import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.optimizers import (
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamax,
    amsgrad,
    lamb,
    lion,
    minimize_lbfgs,
    momentum,
    muon,
    nadam,
    radam,
    rmsprop,
    sgd,
)
from fnet.optimizers.schedules import constant, cosine, join


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def beale(x):
    a, b = x
    return (1.5 - a + a * b) ** 2 + (2.25 - a + a * b**2) ** 2 + (2.625 - a + a * b**3) ** 2


def himmelblau(x):
    a, b = x
    return (a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2


def rastrigin(x):
    return jnp.sum(10 + x**2 - 10 * jnp.cos(2 * jnp.pi * x))


def saddle(x):
    """Flat at 0; its minima are ±(0, 1)."""
    return x[0] ** 2 + (x[1] ** 2 - 1) ** 2


def valley(x):
    """A quadratic a hundred times as steep across as along, at 30 degrees; its minimum is (1, 2)."""
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    a, b = x - jnp.asarray([1.0, 2.0])
    return 0.5 * (c * a + s * b) ** 2 + 50 * (c * b - s * a) ** 2


# --- L-BFGS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 20])
def test_rosenbrocks_minimum_is_found_to_rounding(dimensions, x64):
    start = jnp.tile(jnp.asarray([-1.2, 1.0]), dimensions // 2)
    result = jax.jit(lambda x: minimize_lbfgs(rosenbrock, x, tolerance=1e-9))(start)
    assert result.converged and not result.stuck
    assert result.largest_gradient <= 1e-9 and result.evaluations < 10 * dimensions + 100
    np.testing.assert_allclose(result.params, 1, atol=1e-8)
    np.testing.assert_allclose(result.value, 0, atol=1e-15)


def quadratic(condition, size, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return q * np.geomspace(1, condition, size) @ q.T, rng.normal(size=size)


# f is known to 1e-16, so gradients along a curvature of 1e6 only to √(2e6 · 1e-16) = 1e-5, and scipy's comes no further
@pytest.mark.parametrize("condition, tolerance", [(1e2, 1e-6), (1e6, 1e-3)], ids=["1e2", "1e6"])
def test_a_quadratic_is_solved_as_by_numpy(condition, tolerance, x64):
    a, b = quadratic(condition, 20)
    result = jax.jit(
        lambda a, b: minimize_lbfgs(
            lambda x: 0.5 * x @ a @ x - b @ x, jnp.zeros(20), tolerance=tolerance, memory=20, iterations=3000
        )
    )(jnp.asarray(a), jnp.asarray(b))
    assert result.converged and result.iterations < 2000
    # the error is at most the gradient's norm over the least eigenvalue, 1
    error = np.linalg.norm(np.asarray(result.params) - np.linalg.solve(a, b))
    assert error <= np.linalg.norm(a @ np.asarray(result.params) - b) * (1 + 1e-6) <= tolerance * math.sqrt(20)


def test_logistic_regression_ends_where_scipys_does(x64):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5))
    y = np.sign(x @ rng.normal(size=5) + rng.normal(size=60))

    def value(w, b):
        z = y * (x @ w + b)
        return np.logaddexp(0, -z).mean() + 0.05 * (w**2).sum()

    def gradient(w, b):
        d = -y / (1 + np.exp(y * (x @ w + b))) / 60
        return np.append(x.T @ d + 0.1 * w, d.sum())

    theirs = optimize.minimize(
        lambda p: value(p[:5], p[5]),
        np.zeros(6),
        jac=lambda p: gradient(p[:5], p[5]),
        method="L-BFGS-B",
        options={"gtol": 1e-10, "ftol": 0},
    )

    def loss_fn(params):
        z = jnp.asarray(y) * (jnp.asarray(x) @ params["w"] + params["b"])
        return jnp.logaddexp(0, -z).mean() + 0.05 * (params["w"] ** 2).sum()

    ours = minimize_lbfgs(loss_fn, {"w": jnp.zeros(5), "b": jnp.zeros(())}, tolerance=1e-9)
    assert ours.converged
    np.testing.assert_allclose(np.append(ours.params["w"], ours.params["b"]), theirs.x, atol=1e-7)
    np.testing.assert_allclose(ours.value, theirs.fun, rtol=1e-12)
    np.testing.assert_allclose(np.abs(gradient(ours.params["w"], ours.params["b"])).max(), 0, atol=1e-9)


def test_vmap_over_starts_and_over_losses_ends_as_each_run_alone(x64):
    starts = jnp.asarray([[-1.2, 1.0], [2.0, -1.0], [1.0, 1.0], [0.0, 3.0]])
    alone = jax.jit(lambda x: minimize_lbfgs(rosenbrock, x, tolerance=1e-8))
    together = jax.jit(jax.vmap(lambda x: minimize_lbfgs(rosenbrock, x, tolerance=1e-8)))(starts)
    for i, start in enumerate(starts):
        single = alone(start)
        assert together.iterations[i] == single.iterations and together.evaluations[i] == single.evaluations
        np.testing.assert_allclose(together.params[i], single.params, atol=1e-9)
    assert together.iterations[2] == 0 and together.converged.all()
    centres = jnp.asarray([1.0, -3.0])
    found = jax.vmap(lambda c: minimize_lbfgs(lambda x: jnp.cosh(x - c), jnp.zeros(())))(centres)
    np.testing.assert_allclose(found.params, centres, atol=1e-5)


def test_float32_stays_float32_and_comes_as_near_as_it_can():
    result = jax.jit(lambda x: minimize_lbfgs(rosenbrock, x, tolerance=1e-4))(jnp.asarray([-1.2, 1.0]))
    assert result.params.dtype == result.value.dtype == jnp.float32
    np.testing.assert_allclose(result.params, 1, atol=1e-3)
    # a tolerance out of reach ends by the line search, not by the iterations
    a, b = (jnp.asarray(numbers, jnp.float32) for numbers in quadratic(1e3, 5))
    result = jax.jit(lambda: minimize_lbfgs(lambda x: 0.5 * x @ a @ x - b @ x, jnp.zeros(5), tolerance=1e-12))()
    assert result.stuck and not result.converged and result.iterations < 200
    np.testing.assert_allclose(result.params, np.linalg.solve(a, b), atol=0.02)


@pytest.mark.parametrize(
    "far",
    [
        lambda x: jnp.where(x > 3, jnp.inf, 0.0),
        lambda x: jnp.where(x > 3, -jnp.inf, 0.0),
        lambda x: jnp.where(x > 3, jnp.nan, 0.0),
        lambda x: -jnp.log(3 - x),
        lambda x: 22 * jnp.sqrt(jnp.maximum(3 - x, 0)),  # a value but no gradient beyond 3
    ],
    ids=["inf", "minus_inf", "nan", "log", "nan_gradient"],
)
@pytest.mark.parametrize("start", [-10.0, 2.1])  # the first step is 1 long: from 2.1 it ends beyond 3
def test_a_loss_that_is_not_finite_far_away_is_minimized_where_it_is(far, start, x64):
    def loss_fn(x):
        return 100 * (x - 2.5) ** 2 + far(x)

    result = jax.jit(lambda x: minimize_lbfgs(loss_fn, x, tolerance=1e-8))(jnp.asarray(start))
    assert result.converged
    grid = np.linspace(2.4, 2.6, 20001)
    best = grid[np.argmin(np.asarray(loss_fn(jnp.asarray(grid))))]
    np.testing.assert_allclose(result.params, best, atol=1e-5)


# --- steep, flat and without a bottom --------------------------------------------------------------------------------


def test_the_rows_of_the_bug_report(x64):
    flat = minimize_lbfgs(lambda x: 1e-12 * ((x - 1) ** 2).sum(), jnp.zeros(3), tolerance=1e-20)
    assert flat.converged and flat.iterations <= 3
    np.testing.assert_allclose(flat.params, 1, atol=1e-8)
    with jax.enable_x64(False):
        steep = minimize_lbfgs(lambda w: jnp.exp(w).sum() - 3 * w.sum(), jnp.full(2, 45.0, jnp.float32))
    assert steep.converged
    np.testing.assert_allclose(steep.params, np.log(3), rtol=1e-5)


@pytest.mark.parametrize("dtype, scales", [(jnp.float64, (1e-200, 1e-12, 1e12, 1e200)), (jnp.float32, (1e-20, 1e20))])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_loss_and_its_parameters_may_have_any_size(dtype, scales, unit, x64):
    start = jnp.asarray([-1.2, 1.0], dtype) * unit
    tolerance = 1e-9 if dtype == jnp.float64 else 1e-3
    for scale in scales:

        def loss(x, scale=scale):
            return jnp.asarray(scale, dtype) * rosenbrock(x / jnp.asarray(unit, dtype))

        result = jax.jit(lambda x, loss=loss, s=scale: minimize_lbfgs(loss, x, tolerance=tolerance * s / unit))(start)
        assert result.converged and result.evaluations < 150, (scale, unit)
        np.testing.assert_allclose(result.params / unit, 1, rtol=1e-7 if dtype == jnp.float64 else 2e-2)


@pytest.mark.parametrize("start", [20.0, 45.0, 80.0])
def test_an_exponential_is_come_down_from_in_float32(start):
    result = jax.jit(lambda w: minimize_lbfgs(lambda w: jnp.exp(w).sum() - 3 * w.sum(), w))(jnp.full(2, start))
    assert result.converged and int(result.evaluations) < 2 * start + 40
    np.testing.assert_allclose(result.params, np.log(3), rtol=1e-5)


UNBOUNDED = {
    "linear": lambda x: -x.sum(),
    "concave": lambda x: -(x**2).sum(),
    "cubic": lambda x: (x**3).sum(),
    "logarithm": lambda x: jnp.log(jnp.abs(x)).sum(),  # −∞ at 0
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_loss_without_a_bottom_gives_the_lowest_point_seen(name, dtype, x64):
    loss = UNBOUNDED[name]
    start = jnp.asarray([-1.0, -2.0] if name == "cubic" else [1.0, 2.0], dtype)
    seen = []

    def watched(x):
        value = loss(x)
        jax.debug.callback(
            lambda v, g: seen.append(float(v) if np.isfinite(g).all() else np.inf), value, jax.grad(loss)(x)
        )
        return value

    result = minimize_lbfgs(watched, start, iterations=20)
    jax.effects_barrier()
    assert not result.converged and np.isfinite(result.value) and jnp.isfinite(result.params).all()
    assert result.value == min(v for v in seen if np.isfinite(v)) < loss(start)
    np.testing.assert_allclose(loss(result.params), result.value, rtol=1e-6)


def test_a_line_search_that_is_cut_short_keeps_the_lowest_point_that_it_saw(x64):
    # one try a line is not enough for the Wolfe conditions at first, and each is lower all the same
    result = minimize_lbfgs(lambda x: -jnp.log1p(x**2), jnp.asarray(1.0), iterations=3, line_search_tries=1)
    assert result.iterations == 3 and result.params > 1 and not result.stuck


def test_the_line_search_goes_on_where_the_slope_still_steepens(x64):
    # concave beyond 10: a first short step there would give sᵀy < 0
    result = jax.jit(lambda x: minimize_lbfgs(lambda x: -jnp.exp(-(x**2) / 200), x, tolerance=1e-9))(jnp.asarray(30.0))
    assert result.converged and result.iterations < 15
    np.testing.assert_allclose(result.params, 0, atol=1e-6)


@pytest.mark.parametrize(
    "loss_fn",
    [
        jnp.log,
        lambda x: jnp.sqrt(x + 1),
        lambda x: -jnp.exp(-1000 * x),
        lambda x: jnp.where(x > 0, x**2, jnp.inf),
    ],
    ids=["nan", "nan_gradient", "minus_inf", "inf_and_a_gradient_of_0"],
)
def test_a_start_that_is_not_finite_is_reported_as_stuck(loss_fn):
    result = minimize_lbfgs(loss_fn, jnp.asarray(-1.0))
    assert result.stuck and not result.converged and result.iterations == 0 and result.params == -1


@pytest.mark.parametrize(
    "dtype, loss_fn, start, near",
    [
        (jnp.float16, lambda x: (x**4).sum(), [1.0, 2.0], 0.05),  # sᵀy rounds to 0
        (jnp.bfloat16, lambda x: (x**4).sum(), [1.0, 2.0], 0.05),
        (jnp.float32, lambda x: (x**4).sum(), [1.0, 2.0], 1e-5),
        (jnp.float32, lambda x: jnp.sqrt((x**2).sum()), [3.0, 4.0], 1e-5),  # a kink: no gradient gets small
    ],
    ids=["float16", "bfloat16", "float32", "kink"],
)
def test_where_products_round_to_zero_the_last_good_point_is_returned(dtype, loss_fn, start, near):
    result = jax.jit(lambda x: minimize_lbfgs(loss_fn, x, tolerance=1e-20))(jnp.asarray(start, dtype))
    np.testing.assert_allclose(np.asarray(result.params, np.float64), 0, atol=near)
    assert np.isfinite(np.asarray(result.value, np.float64)) and np.isfinite(np.float64(result.largest_gradient))


def test_a_loss_may_be_a_number_of_pythons():
    result = minimize_lbfgs(lambda x: 3.0, jnp.ones(2))
    assert result.converged and result.value == 3 and result.iterations == 0


def test_a_start_at_the_minimum_stays_there_and_the_iterations_are_a_limit(x64):
    result = minimize_lbfgs(rosenbrock, jnp.ones(2))
    assert result.converged and result.iterations == 0 and (result.params == 1).all()
    result = minimize_lbfgs(rosenbrock, jnp.asarray([-1.2, 1.0]), iterations=3)
    assert result.iterations == 3 and not result.converged and not result.stuck
    assert result.value < rosenbrock(jnp.asarray([-1.2, 1.0]))


@pytest.mark.parametrize(
    "loss_fn, params, options, error, message",
    [
        (jnp.sum, jnp.ones(2), {"iterations": 0}, ValueError, "iterations = 0; expected at least 1"),
        (jnp.sum, jnp.ones(2), {"memory": 0}, ValueError, "memory = 0; expected at least 1"),
        (jnp.sum, jnp.ones(2), {"line_search_tries": 0}, ValueError, "line_search_tries = 0; expected at least 1"),
        (jnp.sum, jnp.ones(2), {"tolerance": -1}, ValueError, "tolerance = -1; expected 0 <= tolerance < inf"),
        (lambda p: 0.0, {}, {}, ValueError, "the parameters hold no numbers; expected at least one"),
        (jnp.sum, jnp.ones((0, 3)), {}, ValueError, "the parameters hold no numbers; expected at least one"),
        (lambda x: x, jnp.ones(2), {}, ValueError, "loss_fn returned float32[2]; expected a scalar, one float"),
        (lambda x: x.sum().astype(int), jnp.ones(2), {}, ValueError, "loss_fn returned int32[]; expected a scalar"),
        (lambda x: (x.sum(), x), jnp.ones(2), {}, ValueError, "loss_fn returned (float32[], float32[2]); expected a"),
        (lambda x: None, jnp.ones(2), {}, ValueError, "loss_fn returned None; expected a scalar, one float"),
        (jnp.ones(2), jnp.ones(2), {}, TypeError, "loss_fn is float32[2]; expected a function of the parameters"),
        (jnp.sum, jnp.arange(2), {}, TypeError, "parameter () has dtype int32; expected a float"),
        (
            lambda p: p["a"],
            {"a": jnp.ones(()), "b": jnp.ones((), jnp.bfloat16)},
            {},
            ValueError,
            "parameters of dtypes ['bfloat16', 'float32']; expected one dtype",
        ),
    ],
)
def test_what_does_not_fit_is_named(loss_fn, params, options, error, message):
    with pytest.raises(error, match=re.escape(f"minimize_lbfgs: {message}")):
        minimize_lbfgs(loss_fn, params, **options)


# --- every optimizer on hard functions -------------------------------------------------------------------------------

UPDATES = 4000
# name: function, start, minima
PROBLEMS = {
    "rosenbrock": (rosenbrock, (-1.2, 1.0), [(1, 1)]),
    "beale": (beale, (1.0, 1.0), [(3, 0.5)]),
    "himmelblau": (
        himmelblau,
        (0.0, 0.0),
        [(3, 2), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848127)],
    ),
    "rastrigin": (rastrigin, (0.2, -0.3), [(0, 0)]),
    "saddle": (saddle, (1.0, 1e-3), [(0, 1), (0, -1)]),
    "valley": (valley, (-1.0, 1.0), [(1, 2)]),
}


def falling(rate):
    """``rate`` for half of the updates, then half a cosine down to 0."""
    return join([constant(rate), cosine(rate, UPDATES // 2)], [UPDATES // 2])


# the rate of each problem in the order above, tuned over powers of 10 and their thirds
OPTIMIZERS = {
    "sgd": (sgd, (0.003, 0.03, 0.03, 0.001, 0.3, 0.01)),
    "momentum": (momentum, (0.003, 0.01, 0.001, 0.003, 0.1, 0.003)),
    "rmsprop": (rmsprop, (0.003, 0.001, 0.001, 0.0003, 0.001, 0.001)),
    "adam": (adam, (0.1, 0.3, 0.03, 0.1, 0.3, 0.01)),
    "amsgrad": (amsgrad, (0.3, 0.3, 0.1, 0.1, 1.0, 0.03)),
    "adamax": (adamax, (0.3, 1.0, 0.03, 0.3, 1.0, 0.03)),
    "nadam": (nadam, (0.03, 0.1, 0.1, 0.01, 0.1, 0.03)),
    # its first steps are as long as the gradients, which b2 = 0.999 does not forget in time
    "radam": (partial(radam, b2=0.99), (0.0018, 0.0018, 0.0018, 0.0056, 0.00056, 0.0018)),
    "adagrad": (adagrad, (1.0, 1.0, 1.0, 0.3, 1.0, 0.3)),
    "adadelta": (adadelta, (0.3, 0.3, 0.3, 0.03, 0.3, 10.0)),
    "lion": (lion, (0.001, 0.01, 0.01, 0.001, 0.001, 0.003)),
    "lamb": (lamb, (0.01, 0.001, 0.003, 1.0, 1.0, 0.001)),
    "adafactor": (adafactor, (0.03, 0.01, 0.03, 0.3, 0.01, 0.01)),
    "muon": (muon, (0.003, 0.001, 0.003, 0.003, 0.003, 0.001)),
}
# how near they come, where it is not to 1e-3: along Rosenbrock's valley all that cannot add up its slope is slow
NEAR = {
    ("sgd", "rosenbrock"): 0.2,
    ("rmsprop", "rosenbrock"): 0.03,
    ("nadam", "rosenbrock"): 0.005,
    ("adagrad", "rosenbrock"): 0.1,
    ("adadelta", "rosenbrock"): 0.1,
    ("lion", "rosenbrock"): 0.003,
    ("adafactor", "rosenbrock"): 0.1,
}


@cache
def ends(name) -> np.ndarray:
    """Where an optimizer stands in each of the problems after all updates: one program for all of them."""
    build, rates = OPTIMIZERS[name]
    functions, starts, _ = zip(*PROBLEMS.values(), strict=True)
    shape = (1, 2) if build is muon else (2,)

    @jax.jit
    @jax.vmap
    def run(index, start, rate):
        optimizer = build(falling(rate))

        def loss(params):
            return jax.lax.switch(index, functions, params.reshape(2))

        def one(carry, _):
            return optimizer.update(jax.grad(loss)(carry[0]), carry[1], carry[0]), None

        start = start.reshape(shape)
        return jax.lax.scan(one, (start, optimizer.init(start)), length=UPDATES)[0][0].reshape(2)

    with jax.enable_x64(True):
        return np.asarray(run(jnp.arange(len(starts)), jnp.asarray(starts), jnp.asarray(rates)))


def distance(params, problem) -> float:
    """The largest difference from the nearest of the problem's minima."""
    return min(np.abs(params - minimum).max() for minimum in PROBLEMS[problem][2])


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_known_minimum_is_reached(name, problem):
    end = ends(name)[list(PROBLEMS).index(problem)]
    assert distance(end, problem) < NEAR.get((name, problem), 1e-3)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_known_minimum_is_reached_by_lbfgs(problem, x64):
    function, start, _ = PROBLEMS[problem]
    result = jax.jit(lambda x: minimize_lbfgs(function, x, tolerance=1e-6))(jnp.asarray(start))
    assert result.converged and distance(np.asarray(result.params), problem) < 1e-4
