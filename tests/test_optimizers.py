"""Optimizers: one table under every property test, each row against the papers' formulas in NumPy float64.

Legend: T updates, P numbers in all parameters.
"""

import functools
import io
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.core.trees import Copies
from fnet.optimizers import (
    AdamState,
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamax,
    adamw,
    amsgrad,
    lamb,
    lion,
    momentum,
    muon,
    nadam,
    orthogonalize,
    radam,
    rmsprop,
    set_hyper,
    sgd,
)
from fnet.optimizers.schedules import constant, exponential, warmup_cosine
from fnet.types import Optimizer, Schedule
from tests.conftest import on_two_devices

# --- the oracles: one update after another, in NumPy float64 ---------------------------------------------------------


def sgd_oracle(rates, grads, p, weight_decay=0.0):
    for rate, g in zip(rates, grads, strict=True):
        p = p - rate * (g + weight_decay * p)
        yield p


def momentum_oracle(rates, grads, p, decay=0.9, nesterov=False, variant="standard", weight_decay=0.0):
    v = np.zeros_like(p)
    for rate, g in zip(rates, grads, strict=True):
        shrunk = p - rate * weight_decay * p
        if variant == "standard":
            v = decay * v + g
            p = shrunk - rate * (g + decay * v) if nesterov else shrunk - rate * v
        elif variant == "keras":
            v = decay * v - rate * g
            p = shrunk + decay * v - rate * g if nesterov else shrunk + v
        else:
            v = decay * v - (1 - decay) * g
            p = shrunk + rate * v
        yield p


def rmsprop_oracle(rates, grads, p, decay=0.9, eps=1e-8, centered=False, momentum=None, eps_in_sqrt=True, initial=0.0):
    mean_square, mean, buffer = np.full_like(p, initial), np.zeros_like(p), np.zeros_like(p)
    for rate, g in zip(rates, grads, strict=True):
        mean_square = decay * mean_square + (1 - decay) * g**2
        mean = decay * mean + (1 - decay) * g
        variance = mean_square - mean**2 if centered else mean_square
        buffer = (momentum or 0) * buffer + rate * g / (
            np.sqrt(variance + eps) if eps_in_sqrt else np.sqrt(variance) + eps
        )
        p = p - buffer
        yield p


def adam_moments(grads, p, b1, b2):
    """``t, m, v, m̂, v̂`` at each update."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        yield t, m, v, m / (1 - b1**t), v / (1 - b2**t)


def adam_oracle(
    rates,
    grads,
    p,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    variant="standard",
    weight_decay=0.0,
    independent=False,
):
    for rate, (t, m, v, m_hat, v_hat) in zip(rates, adam_moments(grads, p, b1, b2), strict=True):
        shrunk = p - (1 if independent else rate) * weight_decay * p
        if variant == "standard":
            p = shrunk - rate * m_hat / (np.sqrt(v_hat + eps_root) + eps)
        else:
            p = shrunk - rate * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v + eps_root) + eps)
        yield p


def adamw_oracle(rates, grads, p, weight_decay=0.01, **options):
    return adam_oracle(rates, grads, p, weight_decay=weight_decay, **options)


def amsgrad_oracle(rates, grads, p, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, variant="standard", weight_decay=0.0):
    most = np.zeros_like(p)
    for rate, (t, m, v, m_hat, v_hat) in zip(rates, adam_moments(grads, p, b1, b2), strict=True):
        most = np.maximum(most, v_hat if variant == "corrected" else v)
        u = {
            "standard": m_hat / (np.sqrt(most / (1 - b2**t) + eps_root) + eps),
            "corrected": m_hat / (np.sqrt(most + eps_root) + eps),
            "keras": np.sqrt(1 - b2**t) * m_hat / (np.sqrt(most + eps_root) + eps),
            "paper": m / (np.sqrt(most + eps_root) + eps),
        }[variant]
        p = p - rate * (u + weight_decay * p)
        yield p


def adamax_oracle(rates, grads, p, b1=0.9, b2=0.999, eps=1e-8, variant="standard", weight_decay=0.0):
    u = np.zeros_like(p)
    for rate, g, (_, _, _, m_hat, _) in zip(rates, grads, adam_moments(grads, p, b1, b2), strict=True):
        u = np.maximum(b2 * u, np.abs(g) + (eps if variant == "standard" else 0))
        p = p - rate * (m_hat / (u if variant == "standard" else u + eps) + weight_decay * p)
        yield p


def nadam_oracle(rates, grads, p, b1=0.9, b2=0.999, eps=1e-8, momentum_decay=0.004, weight_decay=0.0):
    def mu(t):
        return b1 if momentum_decay is None else b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))

    for rate, g, (t, m, _, _, v_hat) in zip(rates, grads, adam_moments(grads, p, b1, b2), strict=True):
        now, following = (np.prod([mu(i) for i in range(1, last + 1)]) for last in (t, t + 1))
        ahead = mu(t + 1) * m / (1 - following) + (1 - mu(t)) * g / (1 - now)
        p = p - rate * (ahead / (np.sqrt(v_hat) + eps) + weight_decay * p)
        yield p


def radam_oracle(rates, grads, p, b1=0.9, b2=0.999, eps=1e-8, threshold=5.0, variant="standard", weight_decay=0.0):
    limit = 2 / (1 - b2) - 1
    for rate, (t, _, v, m_hat, v_hat) in zip(rates, adam_moments(grads, p, b1, b2), strict=True):
        length, u = limit - 2 * t * b2**t / (1 - b2**t), m_hat
        if length > threshold:
            r = np.sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length))
            root = np.sqrt(v_hat) + eps if variant == "standard" else (np.sqrt(v) + eps) / np.sqrt(1 - b2**t)
            u = r * m_hat / root
        p = p - rate * (u + weight_decay * p)
        yield p


def adagrad_oracle(rates, grads, p, eps=1e-10, eps_in_sqrt=False, initial=0.0):
    total = np.full_like(p, initial)
    for rate, g in zip(rates, grads, strict=True):
        total = total + g**2
        p = p - rate * g / (np.sqrt(total + eps) if eps_in_sqrt else np.sqrt(total) + eps)
        yield p


def adadelta_oracle(rates, grads, p, rho=0.95, eps=1e-6):
    v, s = np.zeros_like(p), np.zeros_like(p)
    for rate, g in zip(rates, grads, strict=True):
        v = rho * v + (1 - rho) * g**2
        u = np.sqrt(s + eps) / np.sqrt(v + eps) * g
        s = rho * s + (1 - rho) * u**2
        p = p - rate * u
        yield p


def lion_oracle(rates, grads, p, b1=0.9, b2=0.99, weight_decay=0.0):
    m = np.zeros_like(p)
    for rate, g in zip(rates, grads, strict=True):
        u = np.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
        p = p - rate * (u + weight_decay * p)
        yield p


def lamb_oracle(rates, grads, p, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.0):
    for rate, (_, _, _, m_hat, v_hat) in zip(rates, adam_moments(grads, p, b1, b2), strict=True):
        u = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p
        of_p, of_u = np.sqrt((p**2).sum()), np.sqrt((u**2).sum())
        p = p - rate * (of_p / of_u if of_p > 0 and of_u > 0 else 1) * u
        yield p


def rms(x):
    return np.sqrt((x**2).mean())


def adafactor_oracle(
    rates,
    grads,
    p,
    decay_power=0.8,
    eps=1e-30,
    least_scale=1e-3,
    clip=1.0,
    relative=True,
    scaled=True,
    weight_decay=0.0,
):
    r, c, v = np.zeros(p.shape[:1]), np.zeros(p.shape[1:]), np.zeros_like(p)
    for t, (rate, g) in enumerate(zip(rates, grads, strict=True), start=1):
        beta = 1 - t**-decay_power
        squared = g**2 + eps
        if p.ndim == 2:
            r = beta * r + (1 - beta) * squared.mean(1)
            c = beta * c + (1 - beta) * squared.mean(0)
            v = np.outer(r, c) / r.mean()
        else:
            v = beta * v + (1 - beta) * squared
        u = g / np.sqrt(v)
        u = u / max(1, rms(u) / clip)
        alpha = (min(rate, 1 / np.sqrt(t)) if relative else rate) * (max(least_scale, rms(p)) if scaled else 1)
        p = p - alpha * u - rate * weight_decay * p
        yield p


def newton_schulz(x, eps):
    x = x / (np.sqrt((x**2).sum()) + eps)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def muon_oracle(rates, grads, p, decay=0.95, eps=1e-7, nesterov=True, scale="shape", weight_decay=0.0):
    v, (rows, columns) = np.zeros_like(p), p.shape
    factor = np.sqrt(max(1, columns / rows)) if scale == "shape" else 0.2 * np.sqrt(max(rows, columns))
    for rate, g in zip(rates, grads, strict=True):
        v = decay * v + g
        p = p - rate * (factor * newton_schulz(g + decay * v if nesterov else v, eps) + weight_decay * p)
        yield p


# --- the table -------------------------------------------------------------------------------------------------------


T, P = 100, 10
LEAVES = {"scale": (), "w": (3, 3)}
MATRICES = {"low": (4, 1), "wide": (2, 3)}


class Case(NamedTuple):
    build: Callable[..., Optimizer]
    oracle: Callable
    options: dict[str, Any]
    matrices: bool = False  # for optimizers that take nothing else
    bowl: float = 0.03  # the rate at which it descends a bowl of size 1
    idle: tuple[str, ...] = ()  # numbers without an effect

    def optimizer(self, learning_rate, **options) -> Optimizer:
        return self.build(learning_rate, **self.options, **options)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of P numbers in one leaf."""
        return (5, 2) if self.matrices else (P,)

    def whole(self, numbers) -> np.ndarray:
        """Numbers (..., P) in one leaf (..., *shape)."""
        return np.asarray(numbers).reshape(*np.shape(numbers)[:-1], *self.shape)

    def leaves(self, numbers) -> dict[str, Any]:
        """Numbers (..., P) as leaves of two shapes."""
        shapes = MATRICES if self.matrices else LEAVES
        parts = np.split(np.asarray(numbers), [math.prod(next(iter(shapes.values())))], axis=-1)
        return {
            name: part.reshape((*part.shape[:-1], *shape))
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def expected(self, rates, grads, start, *, by_leaf=False, **changes) -> np.ndarray:
        """The trajectory (T, P), of one leaf or of two."""
        split = self.leaves if by_leaf else lambda numbers: {"whole": self.whole(numbers)}
        starts, grads = split(start), split(grads)
        histories = [
            np.stack(list(self.oracle(rates, grads[name], leaf, **(self.options | changes))))
            for name, leaf in starts.items()
        ]
        return np.concatenate([history.reshape(len(history), -1) for history in histories], axis=1)


# an eps of 1e-3, so that its place in the formula shows
TABLE = {
    "sgd": Case(sgd, sgd_oracle, {}),
    "momentum": Case(momentum, momentum_oracle, {}),
    "momentum nesterov": Case(momentum, momentum_oracle, {"decay": 0.8, "nesterov": True}),
    "momentum keras": Case(momentum, momentum_oracle, {"variant": "keras"}),
    "momentum keras nesterov": Case(momentum, momentum_oracle, {"decay": 0.8, "nesterov": True, "variant": "keras"}),
    "momentum autograd": Case(momentum, momentum_oracle, {"variant": "autograd"}),
    "rmsprop": Case(rmsprop, rmsprop_oracle, {}),
    "rmsprop eps": Case(rmsprop, rmsprop_oracle, {"eps": 1e-3}),
    "rmsprop eps outside": Case(rmsprop, rmsprop_oracle, {"eps": 1e-3, "eps_in_sqrt": False}),
    "rmsprop tf1": Case(rmsprop, rmsprop_oracle, {"eps": 1e-10, "initial": 1.0, "momentum": 0.5}),
    "rmsprop momentum": Case(rmsprop, rmsprop_oracle, {"momentum": 0.9}),
    "rmsprop centered": Case(rmsprop, rmsprop_oracle, {"eps": 1e-3, "centered": True}),
    "rmsprop centered eps outside": Case(
        rmsprop, rmsprop_oracle, {"decay": 0.8, "eps": 1e-3, "centered": True, "eps_in_sqrt": False}
    ),
    "rmsprop centered momentum": Case(rmsprop, rmsprop_oracle, {"eps": 1e-3, "centered": True, "momentum": 0.7}),
    "adam": Case(adam, adam_oracle, {}),
    "adam eps": Case(adam, adam_oracle, {"b1": 0.8, "b2": 0.99, "eps": 1e-3}),
    "adam eps_root": Case(adam, adam_oracle, {"b1": 0.8, "b2": 0.99, "eps": 1e-3, "eps_root": 1e-4}),
    "adam keras": Case(adam, adam_oracle, {"b1": 0.8, "b2": 0.99, "eps": 1e-3, "variant": "keras"}),
    "adam keras eps_root": Case(
        adam, adam_oracle, {"b1": 0.8, "b2": 0.99, "eps": 1e-3, "eps_root": 1e-4, "variant": "keras"}
    ),
    "adam b1 0": Case(adam, adam_oracle, {"b1": 0.0}),
    "adamw": Case(adamw, adamw_oracle, {}),
    "adamw keras": Case(
        adamw, adamw_oracle, {"b1": 0.8, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.5, "variant": "keras"}
    ),
    "adamw eps_root": Case(adamw, adamw_oracle, {"b1": 0.8, "eps_root": 1e-4, "weight_decay": 0.3}),
    "adamw independent": Case(adamw, adamw_oracle, {"eps": 1e-3, "independent": True}),
    "amsgrad": Case(amsgrad, amsgrad_oracle, {"eps": 1e-3}),
    "amsgrad eps_root": Case(amsgrad, amsgrad_oracle, {"b1": 0.8, "b2": 0.9, "eps_root": 1e-4}),
    "amsgrad corrected": Case(amsgrad, amsgrad_oracle, {"b2": 0.9, "variant": "corrected", "weight_decay": 0.1}),
    "amsgrad corrected eps_root": Case(
        amsgrad, amsgrad_oracle, {"b2": 0.9, "eps": 1e-3, "eps_root": 1e-4, "variant": "corrected"}
    ),
    "amsgrad keras": Case(amsgrad, amsgrad_oracle, {"eps": 1e-3, "eps_root": 1e-4, "variant": "keras"}),
    "amsgrad paper": Case(amsgrad, amsgrad_oracle, {"b2": 0.9, "eps": 1e-3, "variant": "paper"}),
    "adamax": Case(adamax, adamax_oracle, {"eps": 1e-3}),
    "adamax keras": Case(adamax, adamax_oracle, {"eps": 1e-2, "variant": "keras", "weight_decay": 0.1}),
    "nadam": Case(nadam, nadam_oracle, {}),
    "nadam psi": Case(nadam, nadam_oracle, {"b1": 0.8, "b2": 0.99, "momentum_decay": 0.1, "weight_decay": 0.1}),
    "nadam constant": Case(nadam, nadam_oracle, {"eps": 1e-3, "momentum_decay": None}),
    "radam": Case(radam, radam_oracle, {"eps": 1e-3}, bowl=0.2),
    "radam torch": Case(radam, radam_oracle, {"b2": 0.99, "eps": 1e-3, "variant": "torch", "weight_decay": 0.1}),
    "radam paper": Case(radam, radam_oracle, {"threshold": 4.0}, bowl=0.2),
    "adagrad": Case(adagrad, adagrad_oracle, {"eps": 1e-3}, bowl=1.0),
    "adagrad keras": Case(adagrad, adagrad_oracle, {"eps": 1e-3, "initial": 0.1, "eps_in_sqrt": True}, bowl=1.0),
    "adadelta": Case(adadelta, adadelta_oracle, {}, bowl=10.0),
    "adadelta eps": Case(adadelta, adadelta_oracle, {"rho": 0.9, "eps": 1e-3}, bowl=1.0),
    "lion": Case(lion, lion_oracle, {}),
    "lion decay": Case(lion, lion_oracle, {"b1": 0.8, "b2": 0.7, "weight_decay": 0.3}),
    "lamb": Case(lamb, lamb_oracle, {}),
    "lamb decay": Case(lamb, lamb_oracle, {"b1": 0.8, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.3}),
    "adafactor": Case(adafactor, adafactor_oracle, {}),
    "adafactor matrix": Case(adafactor, adafactor_oracle, {"decay_power": 0.6, "clip": 0.5}, matrices=True),
    "adafactor absolute": Case(
        adafactor,
        adafactor_oracle,
        {"eps": 1e-4, "relative": False, "scaled": False, "weight_decay": 0.1},
        idle=("least_scale",),
    ),
    "adafactor absolute matrix": Case(
        adafactor, adafactor_oracle, {"eps": 1e-4, "relative": False, "least_scale": 0.5}, matrices=True
    ),
    "muon": Case(muon, muon_oracle, {}, matrices=True),
    "muon adam": Case(muon, muon_oracle, {"decay": 0.8, "scale": "adam", "weight_decay": 0.1}, matrices=True, bowl=0.1),
    "muon plain": Case(muon, muon_oracle, {"nesterov": False, "eps": 1e-2}, matrices=True),
    "sgd decay": Case(sgd, sgd_oracle, {"weight_decay": 0.3}),
    "momentum decay": Case(momentum, momentum_oracle, {"nesterov": True, "weight_decay": 0.3}),
    "momentum keras decay": Case(momentum, momentum_oracle, {"variant": "keras", "weight_decay": 0.3}),
}
every = pytest.mark.parametrize("case", TABLE.values(), ids=TABLE.keys())
# a row of each optimizer, for what does not depend on its options
FIRSTS = {case.build.__name__: name for name, case in reversed(TABLE.items())}
firsts = pytest.mark.parametrize("case", [TABLE[name] for name in FIRSTS.values()], ids=FIRSTS)


def tree(case, numbers):
    """Numbers (..., P) as a tree of parameters whose leaves have the leading axes in front."""
    first, second = (jnp.asarray(leaf) for leaf in case.leaves(numbers).values())
    return {"dense_0": {"w": second}, "scale": first}


def flat(params) -> np.ndarray:
    """Numbers (T, P) of a `tree` with one leading axis."""
    second, first = (np.asarray(leaf) for leaf in jax.tree.leaves(params))
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in (first, second)], axis=-1)


def problem(seed=0, count=T):
    """A start (P,) and gradients (T, P) of changing size and sign; some are 0 at first."""
    rng = np.random.default_rng(seed)
    grads = (rng.normal(size=(count, P)) + 0.3) * 10 ** rng.uniform(-2, 1, size=(count, 1))
    grads[:3, 4:6] = 0
    return rng.normal(size=P), grads


SCHEDULE = warmup_cosine(peak=0.05, warmup_steps=10, total_steps=80, start=0.001, end=0.002)


def scheduled(counts) -> np.ndarray:
    falling = 0.002 + 0.048 * (1 + np.cos(np.pi * np.clip((counts - 10) / 70, 0, 1))) / 2
    return np.where(counts < 10, 0.001 + 0.049 * counts / 10, falling)


def trajectory(optimizer, opt_state, params, grads):
    """The state after the last update and the parameters after each; leaves (T, ...)."""

    def one(carry, g):
        params, opt_state = optimizer.update(g, carry[1], carry[0])
        return (params, opt_state), params

    (_, opt_state), history = jax.lax.scan(one, (params, opt_state), grads)
    return opt_state, history


@functools.cache
def scheduled_run(name) -> np.ndarray:
    """The trajectory (T, P) of a row of the table in float64 under SCHEDULE."""
    with jax.enable_x64(True):
        start, grads = (jnp.asarray(TABLE[name].whole(numbers)) for numbers in problem())
        optimizer = TABLE[name].optimizer(SCHEDULE)
        run = jax.jit(functools.partial(trajectory, optimizer))
        return np.asarray(run(optimizer.init(start), start, grads)[1]).reshape(T, P)


@functools.cache
def scheduled_expected(name) -> np.ndarray:
    """What it should be."""
    start, grads = problem()
    return TABLE[name].expected(scheduled(np.arange(T)), grads, start)


@functools.cache
def scheduled_update(name):
    """The optimizer of a row under SCHEDULE, with its update compiled: for P parameters in one leaf in float32."""
    optimizer = TABLE[name].optimizer(SCHEDULE)
    return optimizer, jax.jit(optimizer.update)


def compilations(function) -> int:
    return function._cache_size()


def agrees(actual, expected) -> bool:
    return bool((np.abs(actual - expected) <= 1e-12 * np.abs(expected) + 1e-13).all())


# --- the formulas ----------------------------------------------------------------------------------------------------


NEW_NUMBERS = {
    "learning_rate": 0.03,
    "decay": 0.7,
    "eps": 0.05,
    "momentum": 0.3,
    "b1": 0.6,
    "b2": 0.8,
    "eps_root": 0.05,
    "weight_decay": 0.2,
    "momentum_decay": 0.5,
    "threshold": 20.0,
    "rho": 0.6,
    "decay_power": 0.5,
    "least_scale": 2.0,
    "clip": 0.3,
}


@every
def test_100_updates_follow_the_formula_in_float64_and_changing_any_number_compiles_nothing(case, x64):
    start, grads = problem()
    optimizer, traces = case.optimizer(0.01), []

    @jax.jit
    def run(opt_state, params, grads):
        traces.append(None)
        return trajectory(optimizer, opt_state, params, grads)

    params, gs = tree(case, start), tree(case, grads)
    first = optimizer.init(params)
    expected = case.expected([0.01] * T, grads, start, by_leaf=True)
    opt_state, history = run(first, params, gs)
    assert opt_state.step == T
    assert agrees(flat(history), expected)

    run(opt_state, jax.tree.map(lambda leaf: leaf[-1], history), gs)
    for name, value in first.hyper._asdict().items():
        if value is not None:
            new = NEW_NUMBERS[name]
            history = flat(run(set_hyper(first, **{name: new}), params, gs)[1])
            rate, options = (new, {}) if name == "learning_rate" else (0.01, {name: new})
            assert agrees(history, case.expected([rate] * T, grads, start, by_leaf=True, **options)), name
            assert (np.abs(history - expected).max() > 1e-4) == (name not in case.idle), name
    assert len(traces) == 1 and compilations(run) == 1


@pytest.mark.parametrize("name", TABLE)
def test_100_updates_under_a_schedule_follow_the_formula_the_first_at_count_0(name):
    start, grads = problem()
    assert agrees(scheduled_run(name), scheduled_expected(name))
    one_late = TABLE[name].expected(scheduled(np.arange(T) + 1), grads, start)
    assert np.abs(scheduled_run(name) - one_late).max() > 1e-4


@pytest.mark.parametrize("name", TABLE)
def test_no_optimizer_passes_for_another_row_of_the_table(name):
    for other in TABLE:
        if other != name:
            assert np.abs(scheduled_run(name) - scheduled_expected(other)).max() > 1e-4, other


def test_adam_without_bias_correction_fails_the_oracle(x64):
    def update(grads, opt_state, params, *, value=None):
        b1, b2 = opt_state.hyper.b1, opt_state.hyper.b2
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, opt_state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, opt_state.nu, grads)
        params = jax.tree.map(
            lambda p, m, v: p - opt_state.hyper.learning_rate * m / (jnp.sqrt(v) + opt_state.hyper.eps), params, mu, nu
        )
        return params, opt_state._replace(step=opt_state.step + 1, mu=mu, nu=nu)

    start, grads = problem()
    wrong = Optimizer(adam(0.01).init, update)
    run = jax.jit(functools.partial(trajectory, wrong))
    history = np.asarray(run(wrong.init(jnp.asarray(start)), jnp.asarray(start), jnp.asarray(grads))[1])
    expected = TABLE["adam"].expected(np.full(T, 0.01), grads, start)
    assert not agrees(history, expected)
    assert np.abs(history - expected).max() > 1e-2


RATES = exponential(0.1, 2.0, 1)  # 0.1, then 0.2


@pytest.mark.parametrize(
    "optimizer, grads, expected",
    [
        (sgd(0.1), (2, 1), (0.8, 0.7)),
        (sgd(RATES), (2, 1), (0.8, 0.6)),
        (momentum(RATES, 0.5), (2, 1), (0.8, 0.4)),  # v = 2, 2
        (momentum(0.1, 0.5, nesterov=True), (2, 1), (0.7, 0.5)),  # g + v/2 = 3, 2
        (momentum(RATES, 0.5, variant="keras"), (2, 1), (0.8, 0.5)),  # v = -0.2, -0.3
        (momentum(0.1, 0.5, nesterov=True, variant="keras"), (2, 1), (0.7, 0.5)),  # v = -0.2, -0.2
        (momentum(0.1, 0.5, variant="autograd"), (2, 1), (0.9, 0.8)),  # v = -1, -1
        (rmsprop(0.1, 0.75, 0.0), (2, 1), (0.8, 0.7)),  # v = 1, 1
        (rmsprop(0.1, 0.75, 3.0), (2, 1), (0.9, 0.85)),  # sqrt(1 + 3) = 2
        (rmsprop(0.1, 0.75, 3.0, eps_in_sqrt=False), (2, 1), (0.95, 0.925)),  # sqrt(1) + 3 = 4
        (rmsprop(0.1, 0.75, 0.0, momentum=0.5), (2, 1), (0.8, 0.6)),  # b = 0.2, 0.2
        (rmsprop(0.1, 0.75, 0.0, initial=4.0), (2, -2), (0.9, 1.0)),  # v = 4, 4
        (rmsprop(0.1, 0.5, 0.0, centered=True), (2, -1), (0.8, 0.8 + 0.1 / math.sqrt(1.5))),  # mean = 1, 0; v = 2, 1.5
        (adam(0.1, eps=0.0), (1e-3, 1e-3), (0.9, 0.8)),  # a constant gradient of any size: the rate
        (adam(0.1, 0.5, 0.75, 0.0), (2, 1), (0.9, 0.9 - 0.4 / 3 / math.sqrt(16 / 7))),  # m̂ = 2, 4/3; v̂ = 4, 16/7
        (adam(0.1, 0.5, 0.75, 2.0), (2, 2), (0.95, 0.9)),  # 2 / (2 + 2)
        (adam(0.1, 0.5, 0.75, 1.0, variant="keras"), (2,), (0.95,)),  # 0.5/0.5 · 1 / (1 + 1)
        (adam(0.1, 0.5, 0.75, 0.0, eps_root=12.0), (2, 2), (0.95, 0.9)),  # 2 / sqrt(4 + 12)
        (sgd(RATES, weight_decay=0.5), (2, 1), (0.75, 0.475)),  # 0.1 (2 + 0.5), 0.2 (1 + 0.375)
        (momentum(RATES, 0.5, weight_decay=0.5), (2, 1), (0.75, 0.275)),  # 0.1 (2 + 0.5), 0.2 (2 + 0.375)
        (adamw(0.1, eps=0.0, weight_decay=0.5), (2,), (0.85,)),  # 0.1 (1 + 0.5)
        (adamw(0.1, eps=0.0, weight_decay=0.5, independent=True), (2,), (0.4,)),  # 0.1 + 0.5
        (amsgrad(0.1, 0.0, 0.5, 0.0), (4, 1), (0.9, 0.9 - 0.1 / math.sqrt(32 / 3))),  # V = 8, 8, corrected 16, 32/3
        (amsgrad(0.1, 0.0, 0.5, 0.0, variant="corrected"), (4, 1), (0.9, 0.875)),  # v̂ = 16, 6; V = 16, 16
        (amsgrad(0.1, 0.0, 0.75, 0.0, variant="paper"), (4, 1), (0.8, 0.75)),  # V = 4, 4
        (amsgrad(0.1, 0.0, 0.75, 2.0, variant="keras"), (4,), (0.95,)),  # 0.5 · 4 / (2 + 2)
        (adamax(0.1, 0.0, 0.5, 0.0), (2, 0.5), (0.9, 0.85)),  # u = 2, 1
        (adamax(0.1, 0.0, 0.5, 2.0), (2, 1), (0.95, 0.95 - 0.1 / 3)),  # u = 2 + 2, max(2, 1 + 2)
        (adamax(0.1, 0.0, 0.5, 2.0, variant="keras"), (2, 1), (0.95, 0.95 - 0.1 / 3)),  # 2 + 2, max(1, 1) + 2
        (nadam(0.1, 0.5, 0.75, 0.0, momentum_decay=None), (2,), (1 - 0.4 / 3,)),  # (0.5 / 0.75 + 2) / 2
        (radam(0.1), (2,), (0.8,)),  # no denominator yet
        (adagrad(0.1, 0.0), (3, 4), (0.9, 0.82)),  # 3/3, 4/5
        (adagrad(0.1, 1.0, eps_in_sqrt=True, initial=6.0), (3,), (0.925,)),  # 3 / sqrt(9 + 6 + 1)
        (adadelta(1.0, 0.5, 1.0), (1,), (1 - math.sqrt(2 / 3),)),  # sqrt(1) / sqrt(1.5)
        (lion(RATES, 0.5, 0.5), (2, -0.5), (0.9, 0.7)),  # 0.5 · 1 - 0.5 · 0.5 > 0
        (lion(0.1, 0.5, 0.5, weight_decay=0.5), (0,), (0.95,)),
        (lamb(0.1, eps=0.0), (3, 3), (0.9, 0.81)),  # steps of 1, times 1 and 0.9
        (lamb(0.1, 0.0, 0.0, 1.0, weight_decay=0.5), (1,), (0.9,)),  # a step of any length becomes ‖p‖
        (adafactor(10.0), (3, 3), (0.0, -1e-3 / math.sqrt(2))),  # 1/sqrt(t) · RMS, at least 1e-3
        (adafactor(0.1, relative=False, scaled=False), (3, 3), (0.9, 0.8)),
        (adafactor(0.1, clip=0.5), (3,), (0.95,)),
    ],
)
def test_first_updates_by_hand(optimizer, grads, expected):
    params, opt_state = jnp.asarray(1.0), optimizer.init(jnp.asarray(1.0))
    for gradient, value in zip(grads, expected, strict=True):
        params, opt_state = optimizer.update(jnp.asarray(gradient, float), opt_state, params)
        np.testing.assert_allclose(params, value, rtol=1e-6)


def test_keras_eps_acts_at_the_first_update_as_eps_over_root_1_minus_b2(x64):
    def first_step(optimizer):
        return -float(optimizer.update(jnp.asarray(1e-7), optimizer.init(jnp.asarray(0.0)), jnp.asarray(0.0))[0])

    # a gradient as large as eps: half the rate in the standard form, far less in Keras'
    assert first_step(adam(1.0, eps=1e-7)) == pytest.approx(0.5, rel=1e-12)
    root = math.sqrt(1 - 0.999)
    assert 1 / root == pytest.approx(31.6, abs=0.05)
    assert first_step(adam(1.0, eps=1e-7, variant="keras")) == pytest.approx(root / (root + 1), rel=1e-12)
    assert first_step(adam(1.0, eps=1e-7 / root)) == pytest.approx(root / (root + 1), rel=1e-12)


@pytest.mark.parametrize("b2", [0.99, 0.999, 0.9999])
def test_bias_correction_is_exact_to_rounding_in_float32(b2):
    # under a constant gradient every update is the rate; 1 - b2**t as written is 2.5e-5 off at b2 = 0.9999, t = 2
    optimizer = adam(1.0, b2=b2, eps=0.0)
    run = jax.jit(functools.partial(trajectory, optimizer))
    _, history = run(optimizer.init(jnp.zeros(3)), jnp.zeros(3), jnp.full((20, 3), 0.7))
    np.testing.assert_allclose(-np.diff(history, axis=0, prepend=0.0), 1, rtol=3e-6)


def test_a_weight_decay_may_be_a_schedule_of_its_own(x64):
    start, grads = problem(count=20)
    optimizer, decays = adamw(0.1, weight_decay=exponential(0.5, 0.5, 10)), 0.5 * 0.5 ** (np.arange(20) / 10)
    run = jax.jit(functools.partial(trajectory, optimizer))
    first = optimizer.init(jnp.asarray(start))
    for factor in (1, 2):
        opt_state = set_hyper(first, weight_decay={"start": 0.5 * factor})
        _, history = run(opt_state, jnp.asarray(start), jnp.asarray(grads))
        p, moments = start, adam_moments(grads, start, 0.9, 0.999)
        for (_, _, _, m_hat, v_hat), decay, new in zip(moments, factor * decays, history, strict=True):
            p = p - 0.1 * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * p)
            assert agrees(np.asarray(new), p)
    assert compilations(run) == 1


DECAYED = {"b": jnp.ones(2), "layers": [{"w": jnp.ones((2, 2))}, {"w": jnp.ones((1, 2))}]}


@pytest.mark.parametrize(
    "mask, expected",
    [
        (None, (0.75, 0.75, 0.75)),
        ("*w", (1, 0.75, 0.75)),
        (("b", "layers/1/*"), (0.75, 1, 0.75)),
        (lambda path, leaf: leaf.shape == (2, 2), (1, 0.75, 1)),
        (lambda path, leaf: False, (1, 1, 1)),
    ],
    ids=["none", "pattern", "patterns", "function", "nowhere"],
)
@pytest.mark.parametrize("build", [sgd, momentum, adamw, amsgrad, adamax, nadam, radam, lion, adafactor])
def test_the_mask_says_which_leaves_decay(build, mask, expected):
    optimizer = build(0.5, weight_decay=0.5, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, DECAYED)
    new, _ = optimizer.update(zeros, optimizer.init(DECAYED), DECAYED)
    assert [float(leaf.ravel()[0]) for leaf in jax.tree.leaves(new)] == list(expected)


def test_a_mask_that_matches_nothing_is_refused_with_the_paths_that_there_are():
    for build in (adamw, adafactor, muon):
        optimizer = build(0.1, weight_decay=0.1, mask=("*w", "*/scale"))
        with pytest.raises(ValueError, match=re.escape("'*/scale' matches no parameter; there are a/w, b/w")):
            optimizer.init({"a": {"w": jnp.ones((2, 2))}, "b": {"w": jnp.ones((2, 2))}})


# --- optimizers that look at a whole leaf ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (2, 5), (5, 2), (3, 1), (2, 3, 4)])
def test_orthogonalize_keeps_the_singular_vectors_and_brings_the_values_near_1(shape, x64):
    x = np.random.default_rng(0).normal(size=shape)
    u, values, v = np.linalg.svd(x, full_matrices=False)
    # all but the smallest of the values relative to the norm, which five iterations do not bring up
    assert (values / np.sqrt((values**2).sum(-1, keepdims=True)) > 0.02).all()
    found = np.asarray(orthogonalize(jnp.asarray(x)))
    inner = u.swapaxes(-1, -2) @ found @ v.swapaxes(-1, -2)
    new = np.diagonal(inner, axis1=-2, axis2=-1)
    np.testing.assert_allclose(inner, new[..., None] * np.eye(new.shape[-1]), atol=1e-12)
    assert ((new > 0.6) & (new < 1.25)).all()
    assert (orthogonalize(jnp.zeros(shape)) == 0).all()


def test_muon_takes_matrices_only_and_of_stacked_layers_each_copys(x64):
    for leaf in (jnp.ones(3), jnp.ones(()), jnp.ones((2, 3, 3))):
        message = f"muon: parameter a has shape {leaf.shape}; expected a matrix"
        with pytest.raises(TypeError, match=re.escape(message)):
            muon().init({"a": leaf})
    p, g = np.random.default_rng(0).normal(size=(2, 4, 2, 3))
    stacked, single = Copies({"w": jnp.asarray(p)}, 4), muon()
    new, _ = single.update(Copies({"w": jnp.asarray(g)}, 4), single.init(stacked), stacked)
    for new_i, p_i, g_i in zip(new["w"], jnp.asarray(p), jnp.asarray(g), strict=True):
        np.testing.assert_allclose(new_i, single.update(g_i, single.init(p_i), p_i)[0], rtol=1e-12)


def test_adafactor_factors_the_last_two_axes_and_keeps_as_many_numbers():
    params = {"stack": jnp.ones((4, 2, 3)), "w": jnp.ones((2, 3)), "b": jnp.ones(3), "scale": jnp.ones(())}
    opt_state = adafactor().init(params)
    shapes = [jax.tree.map(np.shape, tree) for tree in opt_state[3:]]
    assert shapes[0] == {"stack": (4, 2), "w": (2,), "b": (0,), "scale": (0,)}
    assert shapes[1] == {"stack": (4, 3), "w": (3,), "b": (0,), "scale": (0,)}
    assert shapes[2] == {"stack": (0,), "w": (0,), "b": (3,), "scale": ()}


def test_adafactors_second_moments_of_tiny_gradients_do_not_underflow():
    # r cᵀ would be 1e-56, which float32 does not hold
    params = jnp.ones((3, 2))
    new, _ = adafactor(0.5).update(jnp.full((3, 2), 1e-14), adafactor(0.5).init(params), params)
    np.testing.assert_allclose(new, 0.5, rtol=1e-2)  # eps is 1 % of g²


@pytest.mark.parametrize("gradient", [1.0, 1e6, 1e18])
def test_adafactors_rows_without_a_gradient_stay_beside_one_of_any_size(gradient):
    # r is eps = 1e-30 there, and of the mean of all r a part that float32 does not hold
    params, grads = jnp.ones((3, 4)), jnp.zeros((3, 4)).at[0, 0].set(gradient)
    optimizer = adafactor(1e-3)
    new, _ = optimizer.update(grads, optimizer.init(params), params)
    # u = g √mean(r) / √(r c) = g √(g²/12) / √(g²/4 · g²/3) = 1, and its RMS is less
    np.testing.assert_allclose(new, np.where(np.asarray(grads) > 0, 0.999, 1), rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (12,)])
def test_adafactors_gradient_of_1e20_is_a_small_step_and_an_infinite_one_is_not_hidden(shape):
    optimizer, params = adafactor(1e-3), jnp.ones(shape)
    for gradient in (1e20, np.inf):
        grads = jnp.zeros(12).at[0].set(gradient).reshape(shape)
        new, _ = optimizer.update(grads, optimizer.init(params), params)
        step = 1 - np.ravel(new)[0]  # RMS(u) is no more than 1, so that of 12 entries one is no more than √12
        assert 0 < step <= 1.001e-3 * math.sqrt(12) if np.isfinite(gradient) else np.isnan(step)


def test_lamb_steps_by_adam_where_a_norm_is_0():
    optimizer, params = lamb(0.1, eps=0.0), {"new": jnp.zeros(2), "still": jnp.ones(2)}
    grads = {"new": jnp.asarray([3.0, -3.0]), "still": jnp.zeros(2)}
    optimizer = lamb(0.1)
    params, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(params["new"], [-0.1, 0.1], rtol=1e-5)
    assert params["still"].tolist() == [1, 1]


# --- other libraries -------------------------------------------------------------------------------------------------

# A row is (fnet's, theirs); both at a rate of 0.01 unless the row says otherwise.
OPTAX = {
    "sgd": (sgd(0.01), lambda optax: optax.sgd(0.01)),
    "momentum": (momentum(0.01, 0.8), lambda optax: optax.sgd(0.01, 0.8)),
    "momentum nesterov": (momentum(0.01, nesterov=True), lambda optax: optax.sgd(0.01, 0.9, nesterov=True)),
    "rmsprop": (rmsprop(0.01), lambda optax: optax.rmsprop(0.01)),
    "rmsprop centered momentum": (
        rmsprop(0.01, 0.8, 1e-3, centered=True, momentum=0.7, eps_in_sqrt=False),
        lambda optax: optax.rmsprop(0.01, 0.8, 1e-3, centered=True, momentum=0.7, eps_in_sqrt=False),
    ),
    "adam": (adam(0.01, eps_root=1e-6), lambda optax: optax.adam(0.01, eps_root=1e-6)),
    "adamw": (adamw(0.01, weight_decay=0.3), lambda optax: optax.adamw(0.01, weight_decay=0.3)),
    "amsgrad": (amsgrad(0.01, b2=0.9, variant="corrected"), lambda optax: optax.amsgrad(0.01, b2=0.9)),
    "adamax": (adamax(0.01), lambda optax: optax.adamax(0.01)),
    "nadam": (nadam(0.01, momentum_decay=None), lambda optax: optax.nadam(0.01)),
    "radam": (radam(0.01), lambda optax: optax.radam(0.01)),
    "adagrad": (adagrad(0.01, 1e-7, initial=0.1, eps_in_sqrt=True), lambda optax: optax.adagrad(0.01)),
    "adadelta": (adadelta(0.01, 0.9), lambda optax: optax.adadelta(0.01)),
    "lion": (lion(0.01, weight_decay=1e-3), lambda optax: optax.lion(0.01)),
    "lamb": (lamb(0.01, weight_decay=0.3), lambda optax: optax.lamb(0.01, weight_decay=0.3)),
}


@pytest.mark.parametrize("name", OPTAX)
def test_60_updates_are_those_of_optax(name, x64):
    optax = pytest.importorskip("optax")
    ours, theirs = OPTAX[name][0], OPTAX[name][1](optax)
    start, grads = problem(count=60)
    params = theirs_params = {"a": jnp.asarray(start[:4]), "b": jnp.asarray(start[4:]).reshape(2, 3)}
    gs = [{"a": jnp.asarray(g[:4]), "b": jnp.asarray(g[4:]).reshape(2, 3)} for g in grads]
    opt_state, update = ours.init(params), jax.jit(ours.update)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs_state, theirs_update = theirs.init(params), jax.jit(theirs.update)
        for g in gs:
            params, opt_state = update(g, opt_state, params)
            steps, theirs_state = theirs_update(g, theirs_state, theirs_params)
            theirs_params = optax.apply_updates(theirs_params, steps)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, theirs_params[name], rtol=1e-11, atol=1e-12)


TORCH = {
    "sgd": (sgd(0.01), "SGD", {}, 1e-12),
    "momentum nesterov": (momentum(0.01, nesterov=True), "SGD", {"momentum": 0.9, "nesterov": True}, 1e-12),
    "rmsprop": (rmsprop(0.01, 0.99, eps_in_sqrt=False), "RMSprop", {}, 1e-12),
    "adam": (adam(0.01), "Adam", {}, 1e-12),
    "adamw": (adamw(0.01), "AdamW", {}, 1e-12),
    "amsgrad": (amsgrad(0.01, b2=0.9), "Adam", {"betas": (0.9, 0.9), "amsgrad": True}, 1e-12),
    "adamax": (adamax(0.01), "Adamax", {}, 1e-12),
    "nadam": (nadam(0.01), "NAdam", {}, 1e-8),  # its product of momenta is float32
    "radam": (radam(0.01, variant="torch"), "RAdam", {}, 1e-11),
    "adagrad": (adagrad(0.01), "Adagrad", {}, 1e-12),
    "adadelta": (adadelta(0.01, 0.9), "Adadelta", {}, 1e-12),
    "adafactor": (adafactor(0.01), "Adafactor", {"eps": (1e-30, 1e-3), "weight_decay": 0}, 1e-12),
}


@pytest.mark.parametrize("name", TORCH)
def test_60_updates_are_those_of_torch(name, x64):
    torch = pytest.importorskip("torch")
    ours, theirs, options, tolerance = TORCH[name]
    start, grads = problem(count=60)
    grads[grads == 0] = 0.1  # torch's Adafactor divides 0 by 0 there
    params = {"a": jnp.asarray(start[:4]), "b": jnp.asarray(start[4:]).reshape(2, 3)}
    tensors = {key: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for key, leaf in params.items()}
    optimizer = getattr(torch.optim, theirs)(tensors.values(), lr=0.01, **options)
    opt_state, update = ours.init(params), jax.jit(ours.update)
    for g in grads:
        gs = {"a": g[:4], "b": g[4:].reshape(2, 3)}
        params, opt_state = update(jax.tree.map(jnp.asarray, gs), opt_state, params)
        for key, tensor in tensors.items():
            tensor.grad = torch.tensor(gs[key])
        optimizer.step()
    for key, leaf in params.items():
        np.testing.assert_allclose(leaf, tensors[key].detach().numpy(), rtol=tolerance, atol=tolerance)


# theirs computes in bfloat16, whose rounding of 2⁻⁹ the iterations enlarge
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale, theirs", [("shape", "original"), ("adam", "match_rms_adamw")])
def test_an_update_of_muon_is_near_torchs_in_the_transposed_layout(scale, theirs, nesterov, x64):
    torch = pytest.importorskip("torch")
    p, g = np.random.default_rng(0).normal(size=(2, 3, 6))
    ours = muon(0.1, nesterov=nesterov, scale=scale)
    new, _ = ours.update(jnp.asarray(g), ours.init(jnp.asarray(p)), jnp.asarray(p))
    tensor = torch.nn.Parameter(torch.tensor(p.T.copy()))  # torch's weights are (features out, features in)
    optimizer = torch.optim.Muon([tensor], lr=0.1, nesterov=nesterov, weight_decay=0, adjust_lr_fn=theirs)
    tensor.grad = torch.tensor(g.T.copy())
    optimizer.step()
    np.testing.assert_allclose(new, tensor.detach().numpy().T, atol=5e-3)
    assert np.abs(np.asarray(new) - p).max() > 0.02


# --- the state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_step_and_rate_before_and_after_updates(name):
    optimizer, update = scheduled_update(name)
    params = jnp.asarray(TABLE[name].whole(np.ones(P, np.float32)))
    opt_state = optimizer.init(params)
    assert opt_state._fields[:3] == ("step", "hyper", "rate")
    assert opt_state.hyper.learning_rate.keys() == SCHEDULE.hyper.keys()
    assert opt_state.step == 0 and opt_state.rate == np.float32(0.001)  # the rate that the first update will apply
    for t in (1, 2):
        params, opt_state = update(params, opt_state, params)
        assert opt_state.step == t
        np.testing.assert_allclose(opt_state.rate, scheduled(np.array(t - 1)), rtol=1e-6)

    # at the largest step the counter stays, and the schedule is at its end
    last = 2**31 - 1
    opt_state = opt_state._replace(step=jnp.asarray(last - 1, jnp.int32))
    for _ in range(2):
        params, opt_state = update(params, opt_state, params)
        assert opt_state.step.dtype == jnp.int32 and opt_state.step == last
        assert opt_state.rate == np.float32(0.002)
        assert np.isfinite(params).all()
    assert compilations(update) == 1


def signature(tree):
    """The tree and its leaves' shapes, dtypes and weak types: all that jit's cache and scan's carry look at."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


@every
@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
def test_an_update_keeps_every_dtype_and_tree(case, wide):
    with jax.enable_x64(wide):
        dtypes = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16} | ({"f64": jnp.float64} if wide else {})
        start = [[1.0, -2.0]] if case.matrices else [1.0, -2.0]
        params = {name: jnp.asarray(start, dtype) for name, dtype in dtypes.items()}
        optimizer = case.optimizer(0.1)
        opt_state = optimizer.init(params)
        assert signature(jax.eval_shape(optimizer.update, params, opt_state, params)) == signature((params, opt_state))
        assert opt_state.step.dtype == jnp.int32
        numbers = jax.tree.leaves((opt_state.hyper, opt_state.rate))
        assert {number.dtype for number in numbers} == {jnp.dtype(jnp.float64 if wide else jnp.float32)}
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(opt_state))
        for moment in opt_state[3:]:
            for name, leaf in (moment if isinstance(moment, dict) else {}).items():
                assert leaf.dtype == (jnp.float64 if name == "f64" else jnp.float32), name


# one of each kind, for what does not depend on the formula
KINDS = pytest.mark.parametrize(
    "build",
    [sgd, momentum, functools.partial(rmsprop, centered=True, momentum=0.9), adam, nadam, adafactor],
    ids=["sgd", "momentum", "rmsprop", "adam", "nadam", "adafactor"],
)
BUILDERS = [case.build for case in TABLE.values() if TABLE[FIRSTS[case.build.__name__]] is case]


@KINDS
def test_16_bit_parameters_are_computed_in_float32_and_rounded_once(build):
    start = jnp.asarray([1.0, -0.5, 3.0])
    params = {"bf16": start.astype(jnp.bfloat16), "f16": start.astype(jnp.float16), "f32": start}
    optimizer = build(0.3)
    update, opt_state = jax.jit(optimizer.update), optimizer.init(params)
    for _ in range(2):
        (new, opt_state), old = update(jax.tree.map(lambda p: p / 8, params), opt_state, params), params
        params = {name: new["bf16"].astype(leaf.dtype) for name, leaf in new.items()}  # the next start is one for all
        np.testing.assert_array_equal(new["bf16"], new["f32"].astype(jnp.bfloat16))
        np.testing.assert_array_equal(new["f16"], new["f32"].astype(jnp.float16))
        assert (new["f32"] != old["f32"]).all()


@KINDS
def test_moment_dtype_is_the_moments_dtype_before_and_after(build):
    if build in (sgd, adafactor):
        return  # the one has no moments, the other no choice
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    firsts = [name for name in ("mu", "velocity") if getattr(build(0.1).init(params), name, None) is not None]
    if not firsts:
        with pytest.raises(
            ValueError, match=r"moment_dtype = bfloat16, but it keeps .* alone, which lose small updates"
        ):
            build(0.1, moment_dtype=jnp.bfloat16)
        return
    optimizer = build(0.1, moment_dtype=jnp.bfloat16)
    opt_state = optimizer.init(params)
    for name, moment in opt_state._asdict().items():
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(moment) if leaf.shape}
        assert dtypes <= ({jnp.dtype(jnp.bfloat16)} if name in firsts else {jnp.dtype(jnp.float32)}), name
    assert signature(jax.eval_shape(optimizer.update, params, opt_state, params)) == signature((params, opt_state))


def test_gradients_of_another_float_dtype_are_taken_at_the_parameters():
    for p_dtype, g_dtype in [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)]:
        params = jnp.ones(2, p_dtype)
        new, _ = sgd(0.25).update(jnp.ones(2, g_dtype), sgd(0.25).init(params), params)
        assert new.dtype == p_dtype and (new == 0.75).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("variant", ["standard", "keras"])
def test_adam_on_16_bit_parameters_computes_in_float32(dtype, variant):
    # in bfloat16 b2 = 0.999 is 1 and 1 - b2**t = 0; in float16 eps = 1e-8 is 0 and 300 ** 2 overflows
    params = jnp.zeros(3, dtype)
    optimizer = adam(0.5, variant=variant)
    new, opt_state = optimizer.update(jnp.asarray([300.0, -300.0, 0.0], dtype), optimizer.init(params), params)
    np.testing.assert_array_equal(new, np.array([-0.5, 0.5, 0.0]))
    np.testing.assert_allclose(opt_state.nu, [90.0, 90.0, 0.0], rtol=1e-4)


@every
def test_empty_and_scalar_trees(case):
    nested = {"a": (), "b": None, "c": (jnp.ones(2),)}
    trees = [(), {}, None, [], 1.5, np.float32(1.5), jnp.ones(()), jnp.ones((0, 3)), nested]
    if case.build is muon:
        trees = [(), {}, None, [], jnp.ones((0, 3)), np.ones((1, 1), np.float32)]
    optimizer = case.optimizer(0.1)
    states = [optimizer.init(params) for params in trees]
    updated = jax.jit(lambda: [optimizer.update(*each) for each in zip(trees, states, trees, strict=True)])()
    for params, opt_state, (new, new_state) in zip(trees, states, updated, strict=True):
        assert jax.tree.structure(new) == jax.tree.structure(params)
        assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, params)
        assert signature(new_state) == signature(opt_state) and new_state.step == 1
        assert all(((leaf > 0) & (leaf < 1.5)).all() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
def test_centred_rmsprop_stays_finite_under_constant_gradients(eps_in_sqrt):
    optimizer = rmsprop(1e-3, centered=True, eps_in_sqrt=eps_in_sqrt)
    grads = jnp.asarray(np.outer([0.1, 100.0], np.linspace(1, 10, 1000)), jnp.float32)

    @jax.jit
    def run(opt_state):
        def one(carry, _):
            params, opt_state = optimizer.update(grads, carry[1], carry[0])
            return (params, opt_state), (opt_state.nu - opt_state.mean * opt_state.mean).min()

        (params, _), variances = jax.lax.scan(one, (grads, opt_state), length=300)
        return params, variances.min()

    params, _ = run(optimizer.init(grads))
    assert np.isfinite(params).all()
    params, least = run(set_hyper(optimizer.init(grads), decay=0.5))
    assert least < 0  # here rounding takes the variance below zero, so that the clamp is needed
    assert np.isfinite(params).all()


# --- under jit, scan, cond, vmap and grad ----------------------------------------------------------------------------


@every
def test_eager_updates_and_updates_within_cond_follow_the_formula(case, x64):
    start, grads = problem(count=3)
    expected = case.expected([0.01] * 3, grads, start)
    optimizer = case.optimizer(0.01)

    @jax.jit
    def maybe(apply, g, opt_state, params):
        return jax.lax.cond(apply, lambda: optimizer.update(g, opt_state, params), lambda: (params, opt_state))

    def conditional(g, opt_state, params):
        skipped = maybe(False, g, opt_state, params)
        for new, old in zip(jax.tree.leaves(skipped), jax.tree.leaves((params, opt_state)), strict=True):
            np.testing.assert_array_equal(new, old)
        return maybe(True, g, opt_state, params)

    for update in (optimizer.update, conditional):
        params, opt_state = jnp.asarray(case.whole(start)), optimizer.init(jnp.asarray(case.whole(start)))
        for t in range(3):
            params, opt_state = update(jnp.asarray(case.whole(grads[t])), opt_state, params)
            assert agrees(np.asarray(params).reshape(P), expected[t])
            assert opt_state.step == t + 1


def reloaded(tree):
    """The tree's leaves through a file and back."""
    leaves, structure = jax.tree.flatten(tree)
    np.savez(file := io.BytesIO(), *leaves)
    file.seek(0)
    return structure.unflatten([jnp.asarray(leaf) for leaf in np.load(file, allow_pickle=False).values()])


@pytest.mark.parametrize("name", TABLE)
def test_a_compiled_loop_stopped_and_resumed_from_a_file_equals_scan_bit_for_bit_in_float32(name):
    start, grads = (jnp.asarray(TABLE[name].whole(numbers.astype(np.float32))) for numbers in problem(count=20))
    optimizer, _ = scheduled_update(name)
    params, opt_state = start, optimizer.init(start)
    scanned_state, history = jax.jit(functools.partial(trajectory, optimizer))(opt_state, params, grads)

    @jax.jit
    def updates(opt_state, params, first, count):
        """So many updates from the first on, in a loop as `fnet.fit` compiles it."""

        def one(i, carry):
            params, opt_state = optimizer.update(grads[first + i], carry[1], carry[0])
            return params, opt_state

        return jax.lax.fori_loop(0, count, one, (params, opt_state))

    done = 0
    for count in (1, 9, 3, 1, 6):
        if done == 10:
            params, opt_state = reloaded((params, opt_state))
        params, opt_state = updates(opt_state, params, done, count)
        done += count
        np.testing.assert_array_equal(params, history[done - 1])
    for new, old in zip(jax.tree.leaves(opt_state), jax.tree.leaves(scanned_state), strict=True):
        np.testing.assert_array_equal(new, old)


ON_TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import test_optimizers as t
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
halves = NamedSharding(mesh, PartitionSpec("data"))
for name in dict.fromkeys(t.FIRSTS.values()):
    optimizer = t.TABLE[name].optimizer(0.01)
    update = jax.jit(lambda p, s, optimizer=optimizer: optimizer.update(jax.tree.map(jnp.sin, p), s, p))
    whole = {"w": jnp.linspace(-1, 1, 16).reshape(4, 4)}
    parts = jax.device_put(whole, halves)
    held, opt_state = (whole, optimizer.init(whole)), optimizer.init(parts)
    assert t.laid_out_as(opt_state, halves), f"{name} at init"
    spread = (parts, opt_state)
    for _ in range(3):
        held, spread = update(*held), update(*spread)
    assert t.laid_out_as(spread, halves), f"{name} after updates"
    np.testing.assert_allclose(spread[0]["w"], held[0]["w"], rtol=1e-5, atol=1e-7, err_msg=name)
    print(name)
"""


def laid_out_as(tree, sharding) -> bool:
    """Every leaf of the parameters' shape lies as they do; there is one, or the optimizer keeps none."""
    return all(leaf.sharding.is_equivalent_to(sharding, 2) for leaf in jax.tree.leaves(tree) if leaf.shape == (4, 4))


def test_the_state_is_sharded_as_the_parameters_are():
    assert len(on_two_devices(ON_TWO_DEVICES).split()) == len(BUILDERS)


@firsts
def test_vmap_over_rates_and_over_seeds_equals_separate_runs(case, x64):
    rates, seeds = np.array([0.001, 0.01, 0.1]), (1, 2, 3)
    starts, grads = (np.stack(values) for values in zip(*(problem(seed, 10) for seed in seeds), strict=True))

    @jax.jit
    @jax.vmap
    def sweep(rate, start, grads):
        optimizer = case.optimizer(rate)  # built inside, from a traced number
        return trajectory(optimizer, optimizer.init(start), start, grads)

    states, histories = sweep(jnp.asarray(rates), jnp.asarray(case.whole(starts)), jnp.asarray(case.whole(grads)))
    np.testing.assert_array_equal(states.step, [10, 10, 10])
    np.testing.assert_array_equal(states.rate, rates)
    for i in range(3):
        assert agrees(np.asarray(histories[i]).reshape(10, P), case.expected([rates[i]] * 10, grads[i], starts[i]))


@firsts
def test_the_gradient_by_the_learning_rate_goes_through_the_updates(case, x64):
    # where v = 0 only an eps under the root keeps the gradient finite, so no gradient is 0 here
    start, grads = problem(count=2)
    grads[grads == 0] = 0.1

    @jax.jit
    @jax.grad
    def slope(rate):
        optimizer = case.optimizer(rate)
        params, opt_state = jnp.asarray(case.whole(start)), optimizer.init(jnp.asarray(case.whole(start)))
        for g in jnp.asarray(case.whole(grads)):
            params, opt_state = optimizer.update(g, opt_state, params)
        return (params**2).sum()

    def loss(rate):
        return (case.expected([rate] * 2, grads, start)[-1] ** 2).sum()

    assert float(slope(0.01)) == pytest.approx((loss(0.01 + 1e-6) - loss(0.01 - 1e-6)) / 2e-6, rel=1e-6)


def test_the_gradient_through_adam_is_finite_at_zero_and_flattened_by_eps_root():
    def moved(g, eps_root):
        optimizer = adam(0.1, eps_root=eps_root)
        return optimizer.update(g, optimizer.init(0.0), 0.0)[0]

    assert jax.grad(moved)(0.0, 0.0) == pytest.approx(-0.1 / 1e-8, rel=1e-5)  # −rate g / (|g| + eps) at g = 0
    assert jax.grad(moved)(0.0, 1e-8) == pytest.approx(-0.1 / (1e-4 + 1e-8), rel=1e-5)


@every
def test_a_quadratic_bowl_is_descended(case):
    curvature = jnp.asarray([[1.0, 10.0]] if case.matrices else [1.0, 10.0])
    optimizer = case.optimizer(warmup_cosine(case.bowl, 20, 400))

    def one(carry, _):
        params, opt_state = optimizer.update(curvature * carry[0], carry[1], carry[0])
        return (params, opt_state), 0.5 * jnp.sum(curvature * params**2)

    start = jnp.asarray([2.0, -1.0]).reshape(curvature.shape)
    _, losses = jax.jit(lambda: jax.lax.scan(one, (start, optimizer.init(start)), length=400))()
    assert losses[-1] < 0.01 * 7.0  # 7 = (1 · 4 + 10 · 1) / 2 at the start


# --- numbers are data ------------------------------------------------------------------------------------------------


def warmup_rates(peak, warmup, count=30, total=25):
    n = np.arange(count)
    falling = peak * (1 + np.cos(np.pi * np.clip((n - warmup) / (total - warmup), 0, 1))) / 2
    return np.where(n < warmup, peak * n / max(warmup, 1), falling)


SWEEP = [(peak, warmup) for peak in (0.01, 0.1) for warmup in (0, 1, 7, 24)]


def test_a_sweep_of_peak_and_warm_up_by_set_hyper_compiles_once(x64):
    start, grads = problem(count=30)
    optimizer, traces = adam(warmup_cosine(1.0, 5, 25)), []

    @jax.jit
    def run(opt_state):
        traces.append(None)
        return trajectory(optimizer, opt_state, jnp.asarray(start), grads)[1]

    opt_state = optimizer.init(jnp.asarray(start))
    for peak, warmup in SWEEP:
        opt_state = set_hyper(opt_state, learning_rate={"peak": peak, "warmup_steps": warmup})
        expected = TABLE["adam"].expected(warmup_rates(peak, warmup), grads, start)
        assert agrees(np.asarray(run(opt_state)), expected), (peak, warmup)
    assert len(traces) == 1 and compilations(run) == 1


def test_a_sweep_of_peak_and_warm_up_by_vmap_compiles_once(x64):
    start, grads = problem(count=30)
    traces = []

    @jax.jit
    def sweep(peaks, warmups):
        traces.append(None)

        def run(peak, warmup):
            optimizer = adam(warmup_cosine(peak, warmup, 25))
            return trajectory(optimizer, optimizer.init(jnp.asarray(start)), jnp.asarray(start), grads)[1]

        return jax.vmap(run)(peaks, warmups)

    for scale in (1.0, 2.0):
        histories = sweep(*jnp.asarray([(scale * peak, warmup) for peak, warmup in SWEEP]).T)
        for history, (peak, warmup) in zip(histories, SWEEP, strict=True):
            expected = TABLE["adam"].expected(warmup_rates(scale * peak, warmup), grads, start)
            assert agrees(np.asarray(history), expected), (scale, peak, warmup)
    assert len(traces) == 1 and compilations(sweep) == 1


def test_a_schedule_of_ones_own_needs_a_function_and_its_numbers():
    schedule = Schedule(lambda hyper, count: hyper["scale"] / jnp.sqrt(1.0 + count.astype(jnp.float32)), {"scale": 0.5})
    optimizer = sgd(schedule)
    params, opt_state = jnp.asarray(0.0), optimizer.init(jnp.asarray(0.0))
    for _ in range(4):
        params, opt_state = optimizer.update(jnp.asarray(1.0), opt_state, params)
    assert opt_state.rate == 0.25
    np.testing.assert_allclose(params, -0.5 * sum(n**-0.5 for n in (1, 2, 3, 4)), rtol=1e-6)


def test_set_hyper_keeps_dtypes_shapes_and_everything_else():
    params = {"w": jnp.ones(2)}
    opt_state = adam(warmup_cosine(0.1, 5, 25)).init(params)
    changed = set_hyper(opt_state, b1=0, learning_rate={"peak": np.float64(0.2), "warmup_steps": 7})
    assert signature(changed) == signature(opt_state)
    assert changed.hyper.b1 == 0 and changed.hyper.b2 == opt_state.hyper.b2
    numbers = {name: float(value) for name, value in changed.hyper.learning_rate.items()}
    assert numbers == {"peak": pytest.approx(0.2), "warmup_steps": 7, "total_steps": 25, "start": 0, "end": 0}
    assert opt_state.hyper.b1 == np.float32(0.9)
    assert changed.mu is opt_state.mu and changed.step is opt_state.step


def test_set_hyper_on_a_swept_state_takes_one_number_for_all_or_one_each():
    states = jax.vmap(lambda rate: sgd(rate).init(jnp.ones(2)))(jnp.asarray([0.1, 0.2, 0.3]))
    assert set_hyper(states, learning_rate=0.5).hyper.learning_rate.tolist() == [0.5, 0.5, 0.5]
    each = jnp.asarray([0.5, 0.25, 0.125])
    assert set_hyper(states, learning_rate=each).hyper.learning_rate.tolist() == [0.5, 0.25, 0.125]
    for bad in (-1, math.nan):  # on the host each entry is looked at
        with pytest.raises(ValueError, match=f"set_hyper: learning_rate = {bad}.*; expected 0 <= learning_rate < inf"):
            set_hyper(states, learning_rate=np.asarray([0.5, bad, 0.125]))


@KINDS
def test_a_state_can_be_donated_and_takes_nothing_of_the_users_with_it(build):
    rate, params = jnp.float32(0.1), jnp.ones(4)
    optimizer = build(rate)
    consume = jax.jit(lambda opt_state: jax.tree.map(lambda leaf: leaf + leaf, opt_state), donate_argnums=0)
    first = optimizer.init(params)
    _, second = optimizer.update(params, first, params)
    for opt_state in (second, optimizer.init(params)):
        consume(opt_state)  # an error if one buffer stood in two places
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(opt_state))
    assert not rate.is_deleted() and not params.is_deleted()


# --- work ------------------------------------------------------------------------------------------------------------


def elementwise(optimizer) -> list[str]:
    params = jnp.ones((7, 11))
    jaxpr = jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params)
    return sorted(str(eqn.primitive) for eqn in jaxpr.jaxpr.eqns if eqn.outvars[0].aval.shape == (7, 11))


@pytest.mark.parametrize("variant", ["standard", "keras"])
def test_adam_corrects_its_bias_in_scalars_and_does_thirteen_operations_an_element(variant):
    # m: 2 products, a sum; v: 3 and 1; then v + root, its square root, + eps, rate · m, the quotient, the difference
    operations = elementwise(adam(variant=variant))
    assert operations == sorted(["mul"] * 6 + ["add"] * 4 + ["sqrt", "div", "sub"])


@pytest.mark.parametrize("name", TABLE)
def test_an_update_is_one_program_without_host_callbacks(name):
    optimizer, update = scheduled_update(name)
    params = jnp.asarray(TABLE[name].whole(np.ones(P, np.float32)))
    assert "custom_call" not in update.lower(params, optimizer.init(params), params).as_text()


# --- bad input -------------------------------------------------------------------------------------------------------


RATE_RANGE = "expected 0 <= learning_rate < inf"


@pytest.mark.parametrize(
    "build, options, error, message",
    [
        (sgd, {"learning_rate": -0.1}, ValueError, f"sgd: learning_rate = -0.1; {RATE_RANGE}"),
        (sgd, {"learning_rate": math.nan}, ValueError, f"sgd: learning_rate = nan; {RATE_RANGE}"),
        (sgd, {"learning_rate": None}, TypeError, "sgd: learning_rate = None; expected a number"),
        (
            sgd,
            {"learning_rate": math.cos},
            TypeError,
            "sgd: learning_rate is a function; expected a number or a Schedule",
        ),
        (sgd, {"learning_rate": np.ones(3)}, ValueError, "sgd: learning_rate has shape (3,); expected one number"),
        (momentum, {"learning_rate": -1}, ValueError, f"momentum: learning_rate = -1; {RATE_RANGE}"),
        (momentum, {"decay": 1.0}, ValueError, "momentum: decay = 1.0; expected 0 <= decay < 1"),
        (
            momentum,
            {"variant": "torch"},
            ValueError,
            "momentum: variant = 'torch'; expected one of standard, keras, autograd",
        ),
        (
            momentum,
            {"nesterov": True, "variant": "autograd"},
            ValueError,
            "momentum: nesterov = True; expected False with",
        ),
        (rmsprop, {"learning_rate": -1}, ValueError, f"rmsprop: learning_rate = -1; {RATE_RANGE}"),
        (rmsprop, {"decay": -0.5}, ValueError, "rmsprop: decay = -0.5; expected 0 <= decay < 1"),
        (rmsprop, {"eps": -1e-8}, ValueError, "rmsprop: eps = -1e-08; expected 0 <= eps < inf"),
        (rmsprop, {"momentum": 1}, ValueError, "rmsprop: momentum = 1; expected 0 <= momentum < 1"),
        (rmsprop, {"initial": -1}, ValueError, "rmsprop: initial = -1; expected 0 <= initial < inf"),
        (adam, {"learning_rate": -0.1}, ValueError, f"adam: learning_rate = -0.1; {RATE_RANGE}"),
        (adam, {"b1": 1.0}, ValueError, "adam: b1 = 1.0; expected 0 <= b1 < 1"),
        (adam, {"b1": "0.9"}, TypeError, "adam: b1 = '0.9'; expected a number"),
        (adam, {"b2": np.float64(1.5)}, ValueError, "adam: b2 = 1.5; expected 0 <= b2 < 1"),
        (adam, {"eps": -1}, ValueError, "adam: eps = -1; expected 0 <= eps < inf"),
        (adam, {"eps_root": -1}, ValueError, "adam: eps_root = -1; expected 0 <= eps_root < inf"),
        (adam, {"variant": "torch"}, ValueError, "adam: variant = 'torch'; expected one of standard, keras"),
        (adamw, {"weight_decay": -1}, ValueError, "adamw: weight_decay = -1; expected 0 <= weight_decay < inf"),
        (adamw, {"weight_decay": math.sin}, TypeError, "adamw: weight_decay is a function; expected a number or a Sch"),
        (adamw, {"b2": 1}, ValueError, "adamw: b2 = 1; expected 0 <= b2 < 1"),
        (amsgrad, {"variant": "optax"}, ValueError, "expected one of standard, corrected, keras, paper"),
        (amsgrad, {"eps_root": -1}, ValueError, "amsgrad: eps_root = -1; expected 0 <= eps_root < inf"),
        (adamax, {"variant": "paper"}, ValueError, "adamax: variant = 'paper'; expected one of standard, keras"),
        (nadam, {"momentum_decay": -1}, ValueError, "nadam: momentum_decay = -1; expected 0 <= momentum_decay"),
        (radam, {"threshold": -1}, ValueError, "radam: threshold = -1; expected 0 <= threshold < inf"),
        # with 3 the fourth update would take the root of a negative r²
        (radam, {"threshold": 3.9}, ValueError, "radam: threshold = 3.9; expected 4 <= threshold <= inf"),
        (radam, {"variant": "keras"}, ValueError, "radam: variant = 'keras'; expected one of standard, torch"),
        (adagrad, {"initial": -1}, ValueError, "adagrad: initial = -1; expected 0 <= initial < inf"),
        (adadelta, {"rho": 1.0}, ValueError, "adadelta: rho = 1.0; expected 0 <= rho < 1"),
        (adadelta, {"eps": 0}, ValueError, "adadelta: eps = 0; expected 0 < eps < inf"),
        (adafactor, {"eps": 0}, ValueError, "adafactor: eps = 0; expected 0 < eps < inf"),
        (
            adam,
            {"moment_dtype": jnp.int32},
            TypeError,
            "moment_dtype = <class 'jax.numpy.int32'>; expected a float dtype",
        ),
        (adam, {"moment_dtype": "banana"}, TypeError, "adam: moment_dtype = 'banana'; expected a float dtype"),
        (lion, {"b2": 1.0}, ValueError, "lion: b2 = 1.0; expected 0 <= b2 < 1"),
        (lamb, {"b1": -0.1}, ValueError, "lamb: b1 = -0.1; expected 0 <= b1 < 1"),
        (lamb, {"weight_decay": -1}, ValueError, "lamb: weight_decay = -1; expected 0 <= weight_decay < inf"),
        (adafactor, {"decay_power": 0}, ValueError, "adafactor: decay_power = 0; expected 0 < decay_power < inf"),
        (adafactor, {"clip": 0}, ValueError, "adafactor: clip = 0; expected 0 < clip < inf"),
        (adafactor, {"least_scale": -1}, ValueError, "adafactor: least_scale = -1; expected 0 <= least_scale < inf"),
        (muon, {"decay": 1}, ValueError, "muon: decay = 1; expected 0 <= decay < 1"),
        (muon, {"eps": 0}, ValueError, "muon: eps = 0; expected 0 < eps < inf"),
        (muon, {"iterations": 0}, ValueError, "muon: iterations = 0; expected at least 1"),
        (muon, {"scale": "torch"}, ValueError, "muon: scale = 'torch'; expected one of shape, adam"),
    ],
)
def test_a_bad_argument_is_named_at_construction(build, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build(**{"learning_rate": 0.1} | options)


@pytest.mark.parametrize("build", [sgd, momentum, amsgrad, adamax, nadam, radam, lion, muon, adafactor])
def test_a_mask_that_masks_nothing_is_refused(build):
    message = f"{build.__name__}: mask = '*/w' without weight_decay; expected both of them, or no mask"
    with pytest.raises(ValueError, match=re.escape(message)):
        build(0.1, mask="*/w")
    build(0.1, mask="*/w", weight_decay=0.0)  # a number, which set_hyper can change


def test_what_only_init_can_see_is_named_there():
    with pytest.raises(ValueError, match=re.escape("the schedule gave a rate of shape (2,); expected one number")):
        sgd(Schedule(lambda hyper, count: jnp.ones(2), {})).init(jnp.ones(2))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_without_an_eps_what_never_had_a_gradient_stays_as_it_is(dtype):
    # a gradient of 1e-9 is 0 in float16: 0 / (0 + 0) would be NaN
    params, grads = jnp.ones(3, dtype), jnp.asarray([0.0, 1e-9, 1.0], dtype)
    for build in (adam, adamw, amsgrad, adamax, nadam, radam, rmsprop, adagrad, lamb):
        optimizer = build(0.1, eps=0)
        opt_state = optimizer.init(params)
        for _ in range(2):
            new, opt_state = optimizer.update(grads, opt_state, params)
            decayed = 0.1 * 0.01 if build is adamw else 0
            assert jnp.isfinite(new).all() and abs(float(new[0]) - (1 - decayed)) < 1e-3, build.__name__
        assert new[2] < params[2], build.__name__


@pytest.mark.parametrize("build", [build for build in BUILDERS if build is not muon])
@pytest.mark.parametrize("leaf", [jnp.arange(3), np.arange(3), True, 3, jnp.ones(2, complex), jax.random.key(0)])
def test_a_parameter_that_is_no_float_is_named_by_its_path(build, leaf):
    message = f"{build.__name__}: parameter embedding_0/ids has dtype"
    with pytest.raises(TypeError, match=re.escape(message)):
        build(0.1).init({"dense_0": jnp.ones(2), "embedding_0": {"ids": leaf}})


PARAMS = {"dense_0": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}


@KINDS
@pytest.mark.parametrize(
    "grads, message",
    [
        (
            {"dense_0": {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}},
            "dense_0/w: gradient has shape (3, 2), parameter (2, 3)",
        ),
        ({"dense_0": {"w": jnp.ones((2, 3)), "b": jnp.ones(1)}}, "dense_0/b: gradient has shape (1,), parameter (3,)"),
        (
            {"dense_0": {"w": jnp.ones((2, 3))}},
            "gradient does not fit the parameters: missing dense_0/b; unexpected nothing",
        ),
        ({"dense_0": {"w": jnp.ones((2, 3)), "b": None}}, "gradient does not fit the parameters: missing dense_0/b"),
        ({"dense_0": {**PARAMS["dense_0"], "c": jnp.ones(1)}}, "missing nothing; unexpected dense_0/c"),
        ({"dense_1": PARAMS["dense_0"]}, "missing dense_0/b, dense_0/w; unexpected dense_1/b, dense_1/w"),
        ((), "gradient does not fit the parameters: missing dense_0/b, dense_0/w; unexpected nothing"),
        (None, "gradient does not fit the parameters: missing dense_0/b, dense_0/w; unexpected nothing"),
        (
            {"dense_0": {"w": jnp.ones((2, 3), int), "b": jnp.ones(3)}},
            "dense_0/w: gradient has dtype int32; expected a float",
        ),
    ],
)
def test_gradients_that_do_not_fit_are_named_by_path(build, grads, message):
    optimizer = build(0.1)
    for update in (optimizer.update, jax.jit(optimizer.update)):
        with pytest.raises(ValueError, match=re.escape(message)):
            update(grads, optimizer.init(PARAMS), PARAMS)


def test_gradients_in_other_containers_are_told_apart():
    with pytest.raises(
        ValueError, match=r"gradient is a tree PyTreeDef\(\[\*, \*\]\); expected the parameters' PyTreeDef"
    ):
        sgd(0.1).update([jnp.ones(2), jnp.ones(2)], sgd(0.1).init((jnp.ones(2),) * 2), (jnp.ones(2),) * 2)


def test_a_state_of_other_parameters_is_named_by_moment_and_path():
    optimizer = adam()
    with pytest.raises(ValueError, match=re.escape("dense_0/b: mu has shape (4,), parameter (3,)")):
        optimizer.update(PARAMS, optimizer.init({"dense_0": {**PARAMS["dense_0"], "b": jnp.ones(4)}}), PARAMS)


@pytest.mark.parametrize(
    "optimizer, changes, error, message",
    [
        (
            adam(),
            {"beta1": 0.9},
            ValueError,
            "no hyperparameter is called 'beta1'; there are learning_rate, b1, b2, eps, eps_root",
        ),
        (
            rmsprop(0.1),
            {"momentum": 0.9},
            ValueError,
            "no hyperparameter is called 'momentum'; there are learning_rate, decay, eps",
        ),
        (
            adam(constant(0.1)),
            {"learning_rate": {"peak": 0.2}},
            ValueError,
            "set_hyper: no number of learning_rate is called 'peak'; there are rate",
        ),
        (
            adam(constant(0.1)),
            {"learning_rate": 0.2},
            TypeError,
            "set_hyper: learning_rate = 0.2; expected what stands in the state: {'rate'",
        ),
        (
            adam(),
            {"learning_rate": {"rate": 0.2}},
            TypeError,
            "set_hyper: learning_rate = {'rate': 0.2}; expected what stands",
        ),
        (adam(), {"b1": 1.0}, ValueError, "set_hyper: b1 = 1.0; expected 0 <= b1 < 1"),
        (momentum(0.1), {"decay": -0.1}, ValueError, "set_hyper: decay = -0.1; expected 0 <= decay < 1"),
        (
            sgd(0.1),
            {"learning_rate": -1},
            ValueError,
            "set_hyper: learning_rate = -1; expected 0 <= learning_rate < inf",
        ),
        (sgd(0.1), {"learning_rate": "1"}, TypeError, "set_hyper: learning_rate = '1'; expected a number"),
        (adadelta(), {"eps": 0}, ValueError, "set_hyper: eps = 0; expected 0 < eps < inf"),
        (radam(), {"threshold": 3}, ValueError, "set_hyper: threshold = 3; expected 4 <= threshold <= inf"),
        (
            adam(warmup_cosine(0.1, 5, 25)),
            {"learning_rate": {"peak": -1}},
            ValueError,
            "set_hyper: learning_rate['peak'] = -1; expected 0 <= learning_rate['peak'] < inf",
        ),
        (
            adam(warmup_cosine(0.1, 5, 25)),
            {"learning_rate": {"end": math.nan}},
            ValueError,
            "set_hyper: learning_rate['end'] = nan; expected 0 <= ",
        ),
        (
            adam(warmup_cosine(0.1, 5, 25)),
            {"learning_rate": {"total_steps": 0}},
            ValueError,
            "set_hyper: learning_rate['total_steps'] = 0; expected 0 < ",
        ),
        (
            adam(exponential(0.1, 0.5, 10)),
            {"learning_rate": {"decay_steps": 0}},
            ValueError,
            "set_hyper: learning_rate['decay_steps'] = 0; expected 0 < ",
        ),
        (
            sgd(0.1),
            {"learning_rate": np.ones(3)},
            ValueError,
            "set_hyper: learning_rate has shape (3,); expected one number",
        ),
    ],
)
def test_set_hyper_names_what_is_wrong(optimizer, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        set_hyper(optimizer.init(jnp.ones(2)), **changes)


def test_states_are_named_tuples_that_say_what_they_hold():
    opt_state = adam().init(PARAMS)
    assert isinstance(opt_state, AdamState)
    assert opt_state._fields == ("step", "hyper", "rate", "mu", "nu")
    assert rmsprop(0.1).init(PARAMS)._fields == ("step", "hyper", "rate", "nu", "mean", "velocity")
    assert rmsprop(0.1).init(PARAMS).mean is None and rmsprop(0.1).init(PARAMS).velocity is None
    assert jax.tree.structure(opt_state.mu) == jax.tree.structure(PARAMS)
