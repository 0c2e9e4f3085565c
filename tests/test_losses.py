"""Losses against NumPy float64 oracles; their gradients by finite differences, by autodiff, and at the kinks.

Legend: B batch, T time, K classes, F features.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.layers import log_softmax
from fnet.losses import (
    absolute_error,
    binary_cross_entropy,
    binary_focal_cross_entropy,
    cosine_distance,
    cross_entropy,
    dice,
    focal_cross_entropy,
    half_squared_error,
    hinge,
    huber,
    kl_divergence,
    kl_divergence_from_logits,
    multiclass_hinge,
    negative_log_likelihood,
    pinball,
    poisson,
    smoothed_cross_entropy,
    softmax_cross_entropy,
    squared_error,
    squared_hinge,
    weighted_binary_cross_entropy,
)
from fnet.types import Loss

INF, NAN = np.inf, np.nan


# --- the table: a loss, how its targets are drawn, and its value in NumPy --------------------------------------------


def entropy_to(z, p):
    log_softmax = z - np.logaddexp.reduce(z, -1, keepdims=True)
    return -np.sum(np.where(p == 0, 0, p * log_softmax), -1)


def focal_oracle(gamma, weights=1.0):
    def oracle(z, p):
        q = np.exp(z - np.logaddexp.reduce(z, -1, keepdims=True))
        p = p if p.shape == z.shape else one_hot(p, z.shape[-1])
        others = np.stack([np.delete(q, k, -1).sum(-1) for k in range(z.shape[-1])], -1)  # 1 − q, unrounded
        with np.errstate(divide="ignore", invalid="ignore"):
            entries = np.where(p == 0, 0, -weights * p * others**gamma * (z - np.logaddexp.reduce(z, -1)[..., None]))
        return entries.sum(-1)

    return oracle


def divergence(z, p):
    log_p = np.log(np.where(p == 0, 1, p))
    return np.where(p == 0, 0, p * (log_p - z + np.logaddexp.reduce(z, -1, keepdims=True))).sum(-1)


def softmax(z):
    return np.exp(z - np.logaddexp.reduce(z, -1, keepdims=True))


def rival_by_one(z, y):
    own = np.take_along_axis(z, y[..., None], -1)[..., 0]
    return np.maximum(0, (z + (1 - one_hot(y, z.shape[-1]))).max(-1) - own)


def weighted_binary(positive, gamma=0.0, negative=1.0):
    def oracle(z, y):
        with np.errstate(over="ignore"):
            right = positive * y * np.exp(-gamma * np.logaddexp(0, z)) * np.logaddexp(0, -z)
            return over_features(right + negative * (1 - y) * np.exp(-gamma * np.logaddexp(0, -z)) * np.logaddexp(0, z))

    return oracle


def poisson_oracle(z, y):
    with np.errstate(over="ignore"):
        return over_features(np.exp(z) - y * z)


def pinball_oracle(q):
    return lambda z, y: over_features(np.maximum(q * (y - z), (q - 1) * (y - z)))


def dice_oracle(s):
    def oracle(z, y):
        q, y = ((a * 1.0).reshape(len(z), -1) for a in (np.exp(-np.logaddexp(0, -z)), y))
        return 1 - (2 * (q * y).sum(-1) + s) / (q.sum(-1) + y.sum(-1) + s)

    return oracle


def cosine_oracle(z, y):
    return 1 - (z * y).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(y, axis=-1)


def one_hot(labels, classes):
    return np.eye(classes)[labels]


def over_features(entries):
    return entries.sum(-1) if entries.ndim > 1 else entries


def binary(z, y):
    return over_features(y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))


def huber_oracle(delta):
    def oracle(z, y):
        d = np.abs(z - y)
        return over_features(np.where(d <= delta, d**2 / 2, delta * (d - delta / 2)))

    return oracle


def labels(rng, shape):
    return rng.integers(0, shape[-1], shape[:-1])


def some_labels(rng, shape):  # the others are to be ignored; one at least of them is not the first
    y = labels(rng, shape)
    y.reshape(-1)[1::3] = -100
    return y


def probabilities(rng, shape):
    return rng.dirichlet(np.ones(shape[-1]), shape[:-1])


def real(rng, shape):
    return rng.normal(size=shape)


class Case(NamedTuple):
    loss: Loss
    targets: Callable[..., Any]  # (rng, shape of outputs) -> targets
    oracle: Callable[..., Any]  # (outputs, targets), both float64 -> values
    shapes: tuple[tuple[int, ...], ...]


def zero_or_one(rng, shape):
    return rng.integers(0, 2, shape)


def fractions(rng, shape):
    return rng.uniform(size=shape)


ROWS, ENTRIES = ((4, 5), (2, 3, 5)), ((4,), (4, 3), (2, 3, 4))
C = np.array([1.0, 0.5, 2.0, 3.0, 0.25])  # weights of classes
CASES = {
    "softmax, labels": Case(softmax_cross_entropy, labels, lambda z, y: entropy_to(z, one_hot(y, z.shape[-1])), ROWS),
    "softmax, probabilities": Case(softmax_cross_entropy, probabilities, entropy_to, ROWS),
    "likelihood, labels": Case(
        negative_log_likelihood, labels, lambda z, y: -(z * one_hot(y, z.shape[-1])).sum(-1), ROWS
    ),
    "likelihood, probabilities": Case(negative_log_likelihood, probabilities, lambda z, p: -(z * p).sum(-1), ROWS),
    "smoothed, labels": Case(
        smoothed_cross_entropy(0.1),
        labels,
        lambda z, y: entropy_to(z, 0.9 * one_hot(y, z.shape[-1]) + 0.1 / z.shape[-1]),
        ROWS,
    ),
    "smoothed, probabilities": Case(
        smoothed_cross_entropy(0.3), probabilities, lambda z, p: entropy_to(z, 0.7 * p + 0.3 / z.shape[-1]), ROWS
    ),
    "weighted, labels": Case(cross_entropy(C), labels, lambda z, y: C[y] * entropy_to(z, one_hot(y, 5)), ROWS),
    "weighted, probabilities": Case(cross_entropy(C), probabilities, lambda z, p: entropy_to(z, C * p), ROWS),
    "weighted and smoothed": Case(
        cross_entropy(C, label_smoothing=0.1),
        labels,
        lambda z, y: entropy_to(z, C * (0.9 * one_hot(y, 5) + 0.02)),
        ROWS,
    ),
    "some ignored": Case(
        cross_entropy(C, ignore_index=-100),
        some_labels,
        lambda z, y: np.where(y == -100, 0, C[y % 5] * entropy_to(z, one_hot(y % 5, 5))),
        ROWS,
    ),
    "focal, labels": Case(focal_cross_entropy(2.0), labels, focal_oracle(2.0), ROWS),
    "focal(0.7), probabilities": Case(focal_cross_entropy(0.7, C), probabilities, focal_oracle(0.7, C), ROWS),
    "divergence": Case(kl_divergence, probabilities, divergence, ROWS),
    "divergence from logits": Case(kl_divergence_from_logits, real, lambda z, y: divergence(z, softmax(y)), ROWS),
    "multiclass hinge": Case(multiclass_hinge, labels, rival_by_one, ROWS),
    "binary": Case(binary_cross_entropy, fractions, binary, ENTRIES),
    "binary, bool": Case(binary_cross_entropy, lambda rng, shape: rng.integers(0, 2, shape) == 1, binary, ENTRIES[1:2]),
    "binary, integers": Case(binary_cross_entropy, zero_or_one, binary, ENTRIES[1:2]),
    "binary, weighted": Case(weighted_binary_cross_entropy(3.0), fractions, weighted_binary(3.0), ENTRIES),
    "binary focal": Case(binary_focal_cross_entropy(2.0), zero_or_one, weighted_binary(1.0, 2.0), ENTRIES),
    "binary focal(0.7, ¼)": Case(
        binary_focal_cross_entropy(0.7, 0.25), fractions, weighted_binary(0.25, 0.7, 0.75), ENTRIES[1:2]
    ),
    "hinge": Case(hinge, zero_or_one, lambda z, y: over_features(np.maximum(0, 1 - (2 * y - 1) * z)), ENTRIES),
    "squared hinge": Case(
        squared_hinge, zero_or_one, lambda z, y: over_features(np.maximum(0, 1 - (2 * y - 1) * z) ** 2), ENTRIES
    ),
    "dice": Case(dice(), zero_or_one, dice_oracle(1.0), ENTRIES),
    "dice(0.1)": Case(dice(0.1), fractions, dice_oracle(0.1), ENTRIES[1:2]),
    "cosine": Case(cosine_distance, real, cosine_oracle, ROWS),
    "pinball(0.3)": Case(pinball(0.3), real, pinball_oracle(0.3), ENTRIES),
    "pinball, several": Case(pinball(C[:3] / 4), real, pinball_oracle(C[:3] / 4), ENTRIES[1:2]),
    "poisson": Case(poisson, lambda rng, shape: rng.poisson(2.0, shape), poisson_oracle, ENTRIES),
    "squared": Case(squared_error, real, lambda z, y: over_features((z - y) ** 2), ENTRIES),
    "half squared": Case(half_squared_error, real, lambda z, y: over_features((z - y) ** 2 / 2), ENTRIES[1:2]),
    "absolute": Case(absolute_error, real, lambda z, y: over_features(np.abs(z - y)), ENTRIES),
    "huber": Case(huber(), real, huber_oracle(1.0), ENTRIES),
    "huber(0.4)": Case(huber(0.4), real, huber_oracle(0.4), ENTRIES[1:2]),
}
SHAPED = [(name, shape) for name, case in CASES.items() for shape in case.shapes]
every_shape = pytest.mark.parametrize("name, shape", SHAPED)
every_loss = pytest.mark.parametrize("name", CASES)
FORMULAS = ["softmax, labels", "softmax, probabilities", "smoothed, labels", "binary", "squared", "absolute", "huber"]
FORMULAS += ["weighted, labels", "focal, labels", "divergence", "divergence from logits", "multiclass hinge"]
FORMULAS += ["binary focal", "hinge", "squared hinge", "dice", "cosine", "pinball(0.3)", "poisson"]
STRAIGHT = {"absolute", "hinge", "multiclass hinge", "pinball(0.3)"}  # piece by piece
every_formula = pytest.mark.parametrize("name", FORMULAS)


def example(name, shape=None, scale=2.0, seed=0):
    """Outputs and targets in NumPy float64 (or the targets' own dtype)."""
    rng = np.random.default_rng(seed)
    shape = shape or CASES[name].shapes[-1]
    return rng.normal(scale=scale, size=shape), np.asarray(CASES[name].targets(rng, shape))


def as_float32(targets):
    return targets.astype(np.float32) if targets.dtype == np.float64 else targets


def autodiff(loss):
    return jax.grad(lambda outputs, targets: loss.value(outputs, targets).sum())


@cache
def compiled(loss):
    """``(outputs, targets)`` to the value, the gradient by hand and the gradient by autodiff, as one program."""
    return jax.jit(lambda o, t: (loss.value(o, t), loss.gradient(o, t), autodiff(loss)(o, t)))


def worst(a, b):
    """The largest difference relative to the largest entry of ``b``."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


# --- values ----------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_values_are_the_formulas_one_for_each_example(name, shape, scale, x64):
    outputs, targets = example(name, shape, scale)
    values, *_ = compiled(CASES[name].loss)(outputs, targets)
    expected = CASES[name].oracle(outputs, targets)
    assert values.shape == expected.shape and values.dtype == jnp.float64
    # of 1 − cos, of 1 − dice and of 1 − q what is left may be small, and rounded where 1 is
    np.testing.assert_allclose(values, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "name, make",
    [
        ("divergence", lambda torch: torch.nn.KLDivLoss(reduction="none")),
        ("divergence from logits", lambda torch: torch.nn.KLDivLoss(reduction="none", log_target=True)),
        (
            "binary, weighted",
            lambda torch: torch.nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.tensor(3.0).double()),
        ),
        ("poisson", lambda torch: torch.nn.PoissonNLLLoss(reduction="none")),
        ("huber(0.4)", lambda torch: torch.nn.HuberLoss(reduction="none", delta=0.4)),
        ("cosine", lambda torch: lambda z, y: 1 - torch.cosine_similarity(z, y)),
    ],
)
def test_values_and_gradients_are_pytorchs(name, make, x64):
    torch = pytest.importorskip("torch")
    loss = make(torch)
    outputs, targets = example(name, (4, 3))
    z, y = torch.tensor(outputs, requires_grad=True), torch.tensor(targets)
    if name.startswith("divergence"):  # it takes logarithms
        theirs = loss(z.log_softmax(-1), y.log_softmax(-1) if "logits" in name else y)
    else:
        theirs = loss(z, y)
    theirs.sum().backward()
    values, by_hand, _ = compiled(CASES[name].loss)(outputs, targets)
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(values, theirs if theirs.ndim == 1 else theirs.sum(-1), rtol=1e-12)
    np.testing.assert_allclose(by_hand, z.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("hinge", lambda of, z, y: of.hinge_loss(z, 2 * y - 1).sum(-1)),
        ("divergence", lambda of, z, y: of.kl_divergence(jax.nn.log_softmax(z), y)),
        ("multiclass hinge", lambda of, z, y: jax.vmap(of.multiclass_hinge_loss)(z, y)),
        ("binary focal", lambda of, z, y: of.sigmoid_focal_loss(z, y * 1.0, gamma=2.0).sum(-1)),
        ("dice", lambda of, z, y: of.dice_loss(z[..., None], y[..., None] * 1.0, smooth=0.5)),
        ("cosine", lambda of, z, y: of.cosine_distance(z, y)),
    ],
)
def test_values_and_gradients_are_optaxs(name, theirs, x64):
    optax = pytest.importorskip("optax")
    outputs, targets = example(name, (4, 3))
    values, by_hand, _ = compiled(CASES[name].loss)(outputs, targets)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = theirs(optax.losses, jnp.asarray(outputs), jnp.asarray(targets))
        slopes = jax.grad(lambda z: theirs(optax.losses, z, jnp.asarray(targets)).sum())(jnp.asarray(outputs))
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    np.testing.assert_allclose(by_hand, slopes, rtol=1e-11, atol=1e-14)


def test_the_source_s_mean_squared_error():  # S2
    y, prediction = jnp.array([1.0, 0, 1, 1, 0]), jnp.array([0.9, 0.1, 0.8, 0.7, 0.2])
    assert abs(squared_error(prediction, y).mean() - 0.038) < 1e-7
    assert abs(half_squared_error(prediction, y).mean() - 0.019) < 1e-7


def test_the_source_s_next_token(x64):  # S3: "El cielo es" azul, verde, rojo, blanco
    logits = jnp.array([[3.2, 1.1, 0.8, 2.9]])
    assert round(float(softmax_cross_entropy(logits, np.array([0]))[0]), 6) == 0.669875
    softmax = softmax_cross_entropy.gradient(logits, np.array([0]))[0] + jnp.array([1.0, 0, 0, 0])
    assert [round(float(q), 6) for q in softmax] == [0.511773, 0.062670, 0.046427, 0.379131]


@pytest.mark.parametrize("name", ["softmax, labels", "smoothed, labels"])
def test_a_one_hot_row_is_its_label(name, x64):
    outputs, y = example(name)
    p = one_hot(y, outputs.shape[-1])
    for of_rows, of_labels in zip(*(compiled(CASES[name].loss)(outputs, t) for t in (p, y)), strict=True):
        np.testing.assert_array_equal(of_rows, of_labels)


def test_the_full_and_the_half_squared_error_differ_by_exactly_two():
    z, y = (as_float32(a) for a in example("squared"))
    np.testing.assert_array_equal(squared_error(z, y), 2 * half_squared_error(z, y))
    np.testing.assert_array_equal(squared_error.gradient(z, y), 2 * half_squared_error.gradient(z, y))


# --- gradients: finite differences, autodiff, float32 ----------------------------------------------------------------


@cache
def slopes(name):
    """The gradient by central differences; in float64 their own error is near 1e-9."""
    outputs, targets = example(name)
    steps = 1e-6 * np.eye(outputs.size).reshape(-1, *outputs.shape)
    value = jax.jit(jax.vmap(lambda moved: CASES[name].loss(moved, targets).sum()))
    return np.asarray(value(outputs[None] + steps) - value(outputs[None] - steps)).reshape(outputs.shape) / 2e-6


def is_the_slope(gradient, name):
    return worst(gradient, slopes(name)) < 1e-7


@every_loss
def test_gradients_are_the_slopes_of_the_values(name, x64):
    _, gradient, _ = compiled(CASES[name].loss)(*example(name))
    assert is_the_slope(gradient, name)


def one_entry_zero(g):
    return np.where(np.arange(g.size).reshape(g.shape) == np.abs(g).argmax(), 0, g)


WRONG = {
    "twice": lambda g: 2 * g,
    "negated": lambda g: -g,
    "a millionth more": lambda g: (1 + 1e-6) * g,
    "one entry zero": one_entry_zero,
    "another example's": lambda g: np.roll(g, 1, 0),
    "of the mean over features": lambda g: g / g.shape[-1],
}


@pytest.mark.parametrize("wrong", WRONG)
@every_loss
def test_wrong_gradients_fail_the_comparison(name, wrong, x64):
    _, gradient, _ = compiled(CASES[name].loss)(*example(name))
    assert not is_the_slope(WRONG[wrong](np.asarray(gradient)), name)


@every_shape
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gradients_by_hand_and_by_autodiff_agree(name, shape, scale, x64):
    _, by_hand, by_autodiff = compiled(CASES[name].loss)(*example(name, shape, scale))
    # 64 roundings; the derivative of JAX' softplus is exp(z − softplus(z)), a difference that was rounded near |z|
    assert worst(by_hand, by_autodiff) < 1.5e-14


@every_loss
def test_float32_values_and_gradients_are_the_float64_ones_to_its_rounding(name, x64):
    outputs, targets = (as_float32(a) for a in example(name))
    exact = compiled(CASES[name].loss)(outputs.astype(np.float64), targets)
    rounded = compiled(CASES[name].loss)(outputs, targets)
    assert all(array.dtype == jnp.float32 for array in rounded)
    # a rounding is 6e-8; a value is a sum of at most five entries of some roundings each
    for result, wide in zip(rounded, exact, strict=True):
        assert worst(result, wide) < 2e-6


@every_formula
def test_second_derivatives_are_the_derivatives_of_the_gradient_by_hand(name, x64):
    loss, (outputs, targets) = CASES[name].loss, example(name, CASES[name].shapes[0])
    both = jax.jit(lambda o, t: (jax.jacfwd(loss.gradient)(o, t), jax.jacfwd(autodiff(loss))(o, t)))
    of_hand, of_autodiff = both(outputs, targets)
    np.testing.assert_allclose(of_autodiff, of_hand, atol=1e-13)
    assert name in STRAIGHT or np.any(of_hand != 0)


KINKS = {
    "absolute at 0": (absolute_error, [0.5, 0, -3], [0.5, 0, -3], [0, 0, 0]),
    "squared at 0": (squared_error, [0.5, 0, -3], [0.5, 0, -3], [0, 0, 0]),
    "huber at 0 and ±delta": (CASES["huber"].loss, [0.75, 1.25, -1], [0.75, 0.25, 0], [0, 1, -1]),
    "binary at 0": (binary_cross_entropy, [0, 0, 0], [0, 0.25, 1], [0.5, 0.25, -0.5]),
    "softmax, all equal": (softmax_cross_entropy, [3, 3, 3, 3], [0, 1, 0, 0], [0.25, -0.75, 0.25, 0.25]),
    "hinge at its margin": (hinge, [1, -1, 0], [1, 0, 1], [0, 0, -1]),
    "squared hinge at its margin": (squared_hinge, [1, -1, 0], [1, 0, 1], [0, 0, -2]),
    "multiclass hinge at its margin": (multiclass_hinge, [2, 1, 0], 0, [0, 0, 0]),
    "multiclass hinge, rivals equal": (multiclass_hinge, [0, 1, 1], 0, [-1, 1, 0]),
    "multiclass hinge, all equal": (multiclass_hinge, [0, 0, 0], 1, [1, -1, 0]),
    "pinball at 0": (pinball(0.25), [0.5, 0, -3], [0.5, 1, -4], [0.25, -0.25, 0.75]),
    "cosine of nothing": (cosine_distance, [0, 0, 0], [1, 2, 3], [0, 0, 0]),
    "cosine to nothing": (cosine_distance, [1, 2, 3], [0, 0, 0], [0, 0, 0]),
}


@pytest.mark.parametrize("kink", KINKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_at_kinks_and_ties_hand_and_autodiff_take_exactly_the_same_subgradient(kink, dtype, x64):
    loss, outputs, targets, expected = KINKS[kink]
    targets = np.array([targets]) if isinstance(targets, int) else np.array([targets], dtype)
    _, by_hand, by_autodiff = compiled(loss)(np.array([outputs], dtype), targets)
    np.testing.assert_array_equal(by_hand, [expected])
    np.testing.assert_array_equal(by_autodiff, [expected])


# --- extremes --------------------------------------------------------------------------------------------------------

FOCAL_AT_HALF = [-(1 + math.log(2)) / 4, 0, (1 + math.log(2)) / 4]  # u = ½ (½ log ½ / ½ − 1), and (1 − q) u, −q u
FOCAL_AT_0 = [0, 0, (math.log(2) + 0.5) / 4]  # σ(0)² (2 σ(0) log 2 + σ(0))
EXTREMES = {  # loss, outputs, targets, value, gradient
    "right": (softmax_cross_entropy, [1e4, 0, -1e4], 0, 0, [0, 0, 0]),
    "wrong": (softmax_cross_entropy, [1e4, 0, -1e4], 2, 2e4, [1, 0, -1]),
    "between": (softmax_cross_entropy, [1e4, 0, -1e4], [0.5, 0, 0.5], 1e4, [0.5, 0, -0.5]),
    "-inf elsewhere": (softmax_cross_entropy, [0, -INF, 0], 0, math.log(2), [-0.5, 0, 0.5]),
    "-inf at probability 0": (softmax_cross_entropy, [0, -INF, 0], [0.5, 0, 0.5], math.log(2), [0, 0, 0]),
    "-inf, not smoothed": (smoothed_cross_entropy(0.0), [0, -INF, 0], 2, math.log(2), [0.5, 0, -0.5]),
    "-inf at the label": (softmax_cross_entropy, [0, -INF, -INF], 1, INF, [1, -1, 0]),
    "all far below": (softmax_cross_entropy, [-1e4, -1e4, -2e4], 0, math.log(2), [-0.5, 0.5, 0]),
    "binary, far": (binary_cross_entropy, [1e4, -1e4, -1e4], [1.0, 0.0, 0.0], 0, [0, 0, 0]),
    "binary, far wrong": (binary_cross_entropy, [1e4, -1e4, 1e4], [0.0, 1.0, 0.25], 27500, [1, -1, 0.75]),
    "binary, infinite": (binary_cross_entropy, [INF, -INF, 0], [1.0, 0.0, 0.0], math.log(2), [0, 0, 0.5]),
    "binary, infinitely wrong": (binary_cross_entropy, [INF, -INF, 0], [0.0, 1.0, 1.0], INF, [1, -1, -0.5]),
    "binary, small": (binary_cross_entropy, [30.0, INF, -INF], [1.0, 1.0, 0.0], math.exp(-30), [-math.exp(-30), 0, 0]),
    "ignored": (cross_entropy(ignore_index=-100), [NAN, INF, 1e4], -100, 0, [0, 0, 0]),
    "weight 0 of a class": (cross_entropy([0.0, 1, 2]), [-INF, 0, 0], [0.5, 0.5, 0], math.log(2) / 2, [0, -0.25, 0.25]),
    "focal, right": (focal_cross_entropy(2.0), [1e4, 0, -1e4], 0, 0, [0, 0, 0]),
    "focal, wrong": (focal_cross_entropy(0.5), [1e4, 0, -1e4], 2, 2e4, [1, 0, -1]),
    "focal, -inf elsewhere": (focal_cross_entropy(1.0), [0, -INF, 0], 0, math.log(2) / 2, FOCAL_AT_HALF),
    "focal, γ of 0": (focal_cross_entropy(0.0), [1e4, 0, -1e4], [0.5, 0, 0.5], 1e4, [0.5, 0, -0.5]),
    "divergence, 0 and 1": (kl_divergence, [1e4, 0, -1e4], [0.0, 0, 1], 2e4, [1, 0, -1]),
    "divergence, none": (kl_divergence, [0, -INF, 0], [0.5, 0, 0.5], 0, [0, 0, 0]),
    "divergence, infinite": (kl_divergence, [0, -INF, 0], [0.5, 0.5, 0], INF, [0, -0.5, 0.5]),
    "divergence from logits, far": (kl_divergence_from_logits, [1e4, 0, -1e4], [-1e4, 0, 1e4], 2e4, [1, 0, -1]),
    "divergence from logits, -inf": (kl_divergence_from_logits, [0, -INF, 0], [0, -INF, 0], 0, [0, 0, 0]),
    "multiclass hinge, far": (multiclass_hinge, [1e4, -INF, -1e4], 2, 20001, [1, 0, -1]),
    "multiclass hinge, one class": (multiclass_hinge, [1e4], 0, 0, [0]),
    "weighted binary, far": (weighted_binary_cross_entropy(3.0), [1e4, -1e4, 1e4], [0.0, 1, 1], 4e4, [1, -3, 0]),
    "binary focal, far": (binary_focal_cross_entropy(2.0), [1e4, -1e4, -1e4], [1.0, 0, 1], 1e4, [0, 0, -1]),
    "binary focal, infinite": (binary_focal_cross_entropy(), [INF, -INF, 0], [1.0, 0, 0], math.log(2) / 4, FOCAL_AT_0),
    "hinge, far": (hinge, [1e4, -1e4, INF], [1.0, 1, 1], 10001, [0, -1, 0]),
    "squared hinge, far": (squared_hinge, [-1e4, 0, INF], [1.0, 1, 1], 10001**2 + 1, [-20002, -2, 0]),
    "dice, far": (dice(), [1e4, -1e4, 1e4], [1.0, 0, 0], 0.25, [0, 0, 0]),
    "dice, nothing there": (dice(1e-7), [-INF, -1e4, -1e4], [0.0, 0, 0], 0, [0, 0, 0]),
    "cosine, long and short": (cosine_distance, [1e30, 0, 0], [0.0, 1e-30, 0], 1, [0, -1e-30, 0]),
    "cosine, opposite": (cosine_distance, [0, -1e-30, 0], [0.0, 1e30, 0], 2, [0, 0, 0]),
    "pinball, infinite": (pinball(0.25), [INF, 1, -1], [0.0, 2, 3], INF, [0.75, -0.25, -0.25]),
    "poisson, rate 0": (poisson, [-INF, -1e4, 0], [0.0, 1, 2], 10001, [0, -1, -1]),
    "huber far": (CASES["huber(0.4)"].loss, [1e30, 0, 0], [0.0, 0, 0], 4e29, [0.4, 0, 0]),
    "huber infinite": (CASES["huber(0.4)"].loss, [-INF, 0, 0], [0.0, 0, 0], INF, [-0.4, 0, 0]),
    "absolute infinite": (absolute_error, [INF, 1, -INF], [0.0, 2.0, 3.0], INF, [1, -1, -1]),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_both_gradients_are_exact_at_extremes(name, dtype, x64):
    loss, outputs, targets, value, gradient = EXTREMES[name]
    outputs = np.array([outputs], dtype)
    targets = np.array([targets]) if isinstance(targets, int) else np.array([targets], dtype)
    rtol = 1e-6 if dtype == "float32" else 1e-13
    values, by_hand, by_autodiff = compiled(loss)(outputs, targets)
    np.testing.assert_allclose(values, [value], rtol)
    np.testing.assert_allclose(by_hand, [gradient], rtol)
    np.testing.assert_allclose(by_autodiff, [gradient], 4 * rtol)  # exp(z − softplus(z)) again: 30 rounds by 1e-6


@every_loss
@pytest.mark.parametrize("target", [0, 1])
def test_nan_in_the_outputs_reaches_the_value_and_both_gradients_of_its_example_alone(name, target):
    outputs, targets = (as_float32(a) for a in example(name))
    outputs[(0,) * outputs.ndim] = NAN
    targets[(0,) * targets.ndim] = target
    results = compiled(CASES[name].loss)(outputs, targets)
    if name.startswith("likelihood"):  # the slopes of what is linear are constant
        results = results[:1]
    for result in results:
        assert np.isnan(result).reshape(len(result), -1).any(1).tolist() == [True] + [False] * (len(result) - 1)


def test_the_likelihood_of_log_softmax_is_the_cross_entropy_of_logits(x64):
    z, y = np.array([[3.0, -800.0, 2.0], [1e4, 0.0, -1e4]]), np.array([0, 1])
    log_probabilities, _, residuals = log_softmax().forward((), (), jnp.asarray(z))
    expected = entropy_to(z, one_hot(y, 3))
    np.testing.assert_allclose(negative_log_likelihood(log_probabilities, y), expected, rtol=1e-15)
    _, dz = log_softmax().backward((), residuals, negative_log_likelihood.gradient(log_probabilities, y))
    p = np.exp(z - np.logaddexp.reduce(z, -1, keepdims=True))
    np.testing.assert_allclose(dz, p - one_hot(y, 3), rtol=1e-14, atol=1e-16)


def test_a_log_probability_of_minus_infinity_counts_nothing_where_its_probability_is_zero():
    y = jnp.array([[0.0, -INF]])
    for targets in (np.array([0]), np.array([[1.0, 0.0]], np.float32)):
        value, *gradients = compiled(negative_log_likelihood)(y, targets)
        assert value.tolist() == [0.0] and all(g.tolist() == [[-1.0, 0.0]] for g in gradients)
    assert negative_log_likelihood(y, np.array([1])).tolist() == [INF]


def test_nan_at_a_class_of_probability_zero_is_not_swallowed():
    outputs = jnp.array([[0.0, NAN, 0.0]])
    for targets in (np.array([0]), np.array([[1.0, 0, 0]], np.float32), np.zeros((1, 3), np.float32)):
        assert np.isnan(softmax_cross_entropy(outputs, targets)).all()


# --- dtypes and transformations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype", [(name, jnp.bfloat16) for name in FORMULAS] + [("softmax, labels", jnp.float16)]
)
def test_low_precision_outputs_are_computed_in_float32_and_only_gradients_rounded(name, dtype):
    outputs, targets = (as_float32(a) for a in example(name))
    low = jnp.asarray(outputs, dtype)
    values, *gradients = compiled(CASES[name].loss)(low, targets)
    wide_values, *wide_gradients = compiled(CASES[name].loss)(low.astype(jnp.float32), targets)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, wide_values, rtol=1e-6)
    for gradient, wide in zip(gradients, wide_gradients, strict=True):
        assert gradient.dtype == dtype and gradient.shape == low.shape
        half_a_unit = float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(gradient.astype(np.float32), wide, rtol=half_a_unit * 1.001, atol=1e-6 * half_a_unit)


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_outputs_dtype_decides_whatever_the_targets_is(name, dtype, x64):
    outputs, targets = example(name)  # targets are float64, int64 or bool
    for result in jax.eval_shape(compiled(CASES[name].loss), jnp.asarray(outputs, dtype), targets):
        assert result.dtype == dtype


@pytest.mark.parametrize("name", ["softmax, labels", "softmax, probabilities", "squared"])
def test_numpy_float64_is_taken_as_float32_where_x64_is_off(name):
    outputs, targets = example(name)
    assert CASES[name].loss(outputs, targets).dtype == CASES[name].loss.gradient(outputs, targets).dtype == jnp.float32


@every_formula
def test_a_population_by_vmap_has_the_values_of_its_members(name, x64):
    members = [example(name, seed=seed) for seed in range(3)]
    outputs, targets = (np.stack(arrays) for arrays in zip(*members, strict=True))
    together = jax.jit(jax.vmap(compiled(CASES[name].loss)))(outputs, targets)
    for i, member in enumerate(members):
        for result, alone in zip(together, compiled(CASES[name].loss)(*member), strict=True):
            assert worst(result[i], alone) < 1e-14


HYPER = {
    "smoothed": (smoothed_cross_entropy, "smoothed, labels"),
    "cross-entropy": (lambda a: cross_entropy(label_smoothing=a), "softmax, labels"),
    "class weights": (lambda c: cross_entropy(c * C), "softmax, labels"),
    "focal": (focal_cross_entropy, "focal, labels"),
    "weighted binary": (weighted_binary_cross_entropy, "binary, weighted"),
    "binary focal": (binary_focal_cross_entropy, "binary focal"),
    "binary focal's alpha": (lambda a: binary_focal_cross_entropy(2.0, a), "binary focal"),
    "dice": (dice, "dice"),
    "pinball": (pinball, "pinball(0.3)"),
    "huber": (huber, "huber"),
}


@pytest.mark.parametrize("make, name", HYPER.values(), ids=HYPER)
def test_hyperparameters_may_be_traced_swept_and_differentiated(make, name, x64):
    outputs, targets = example(name)
    swept = jax.jit(jax.vmap(lambda rate: tuple(part(outputs, targets) for part in make(rate)[:2])))(
        np.array([0.1, 0.7])
    )
    for i, rate in enumerate([0.1, 0.7]):
        for row, fixed in zip(swept, compiled(make(rate))(outputs, targets)[:2], strict=True):
            assert worst(row[i], fixed) < 1e-14
    total = jax.jit(lambda rate: make(rate)(outputs, targets).sum())
    slope = (total(0.3 + 1e-6) - total(0.3 - 1e-6)) / 2e-6
    assert abs(jax.jit(jax.grad(total))(0.3) - slope) < 1e-7 * abs(slope)


def test_at_no_smoothing_the_slope_by_the_smoothing_is_that_of_the_whole_line(x64):
    logits, y = example("smoothed, labels")
    at = jax.jit(lambda a: smoothed_cross_entropy(a)(logits, y))
    np.testing.assert_allclose(jax.jit(jax.jacfwd(at))(0.0), at(1.0) - at(0.0), rtol=1e-13)  # linear in the smoothing


# --- labels out of range ---------------------------------------------------------------------------------------------


WITH_LABELS = [softmax_cross_entropy, smoothed_cross_entropy(0.1), cross_entropy(np.ones(10), -100)]
WITH_LABELS += [focal_cross_entropy(), multiclass_hinge]


@pytest.mark.parametrize("loss", WITH_LABELS, ids=["plain", "smoothed", "weighted", "focal", "hinge"])
@pytest.mark.parametrize("label", [-1, 10, -11, 2**31 - 1])
def test_a_traced_label_out_of_range_makes_its_example_nan(loss, label):
    for result in compiled(loss)(jnp.zeros((3, 10)), jnp.array([0, label, 9])):
        assert np.isnan(result).reshape(3, -1).all(1).tolist() == [False, True, False]
        assert np.isnan(result).reshape(3, -1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "loss", [binary_cross_entropy, binary_focal_cross_entropy(), hinge], ids=["plain", "focal", "hinge"]
)
def test_a_traced_binary_target_that_is_neither_0_nor_1_is_nan(loss):
    for result in compiled(loss)(jnp.zeros(3), jnp.array([0, 2, 1])):
        assert np.isnan(result).tolist() == [False, True, False]


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    "call",
    [
        softmax_cross_entropy.value,
        softmax_cross_entropy.gradient,
        lambda outputs, y: jax.eval_shape(lambda outputs: softmax_cross_entropy(outputs, y), outputs),
        lambda outputs, y: jax.jit(jax.grad(lambda outputs: softmax_cross_entropy(outputs, y).sum()))(outputs),
    ],
)
def test_a_known_label_out_of_range_is_named_even_where_the_outputs_are_traced(call, convert):
    message = r"^softmax_cross_entropy: label 10 at \(3,\) is outside 0..9 \(outputs have 10 classes\)"
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((5, 10)), convert([0, 9, 3, 10, 11]))
    message = r"^softmax_cross_entropy: label -1 at \(1, 0\) is outside 0..9 \(outputs have 10 classes\)"
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 2, 10)), convert([[0, 9], [-1, 3]]))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int32])
def test_labels_narrower_than_the_classes_are_not_wrapped(dtype):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 300)), jnp.float32)
    y = np.array([1, 44], dtype)  # 300 classes: in 8 bits 257 would be 1 and 300 would be 44
    oracle = entropy_to(np.asarray(logits, np.float64), one_hot(y, 300))
    np.testing.assert_allclose(jax.jit(softmax_cross_entropy.value)(logits, y), oracle, rtol=1e-6)


# --- errors ----------------------------------------------------------------------------------------------------------


def shapes(outputs, targets, outputs_dtype="float32", targets_dtype="float32"):
    return jax.ShapeDtypeStruct(outputs, outputs_dtype), jax.ShapeDtypeStruct(targets, targets_dtype)


CLASSES = {
    "softmax_cross_entropy": softmax_cross_entropy,
    "smoothed_cross_entropy": smoothed_cross_entropy(0.1),
    "cross_entropy": cross_entropy(ignore_index=None),
    "focal_cross_entropy": focal_cross_entropy(),
    "multiclass_hinge": multiclass_hinge,
}
REAL = {
    "squared_error": squared_error,
    "half_squared_error": half_squared_error,
    "absolute_error": absolute_error,
    "huber": huber(),
    "pinball": pinball(),
    "kl_divergence": kl_divergence,
    "kl_divergence_from_logits": kl_divergence_from_logits,
    "cosine_distance": cosine_distance,
}
BINARY = {
    "binary_cross_entropy": binary_cross_entropy,
    "weighted_binary_cross_entropy": weighted_binary_cross_entropy(2.0),
    "binary_focal_cross_entropy": binary_focal_cross_entropy(),
    "hinge": hinge,
    "squared_hinge": squared_hinge,
    "dice": dice(),
}
LOSSES = CLASSES | REAL | BINARY | {"poisson": poisson}


def assert_refused(loss, arguments, message):
    """Both by the value and by the gradient, while shapes are all that is known: before anything is computed."""
    for function in (loss.value, loss.gradient):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(function, *arguments)


@pytest.mark.parametrize("name", [*REAL, *BINARY, "poisson"])
@pytest.mark.parametrize("of_outputs, of_targets", [((4, 1), (4,)), ((4,), (4, 1)), ((4, 3), (3,)), ((4, 3), (4, 2))])
def test_shapes_that_would_broadcast_are_refused(name, of_outputs, of_targets):
    message = rf"^{name}: outputs \({of_outputs[0]}.*\) and targets \({of_targets[0]}.*\) must have one shape.*reshape"
    assert_refused(LOSSES[name], shapes(of_outputs, of_targets), message)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "of_targets, dtype",
    [((4, 1), "int32"), ((4, 10), "int32"), ((4,), "float32"), ((4, 9), "float32"), ((4,), "bool"), ((4, 10), "bool")],
)
def test_targets_that_are_neither_labels_nor_probabilities_are_refused(name, of_targets, dtype):
    message = rf"^{name}: outputs \(4, 10\) do not go with {dtype} targets \(4,.*expected integer labels \(4,\) or"
    assert_refused(LOSSES[name], shapes((4, 10), of_targets, targets_dtype=dtype), message)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_outputs_that_are_not_floating_are_refused(name, dtype):
    message = f"^{name}: outputs are {dtype}; expected floating: convert"
    assert_refused(LOSSES[name], shapes((4, 3), (4, 3), outputs_dtype=dtype), message)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_targets_of_a_regression_that_are_not_floating_are_refused(name, dtype):
    message = f"^{name}: targets are {dtype}; expected floating: convert"
    assert_refused(LOSSES[name], shapes((4, 3), (4, 3), targets_dtype=dtype), message)


def test_a_scalar_of_logits_is_refused():
    assert_refused(
        softmax_cross_entropy, shapes((), (), targets_dtype="int32"), "softmax_cross_entropy: outputs have no axes"
    )


@pytest.mark.parametrize("y, shown", [([0, 2], "2"), ([0.5, 1.5], "1.5"), ([0.0, NAN], "nan"), ([0, -1], "-1")])
def test_known_binary_targets_outside_0_to_1_are_named(y, shown):
    with pytest.raises(ValueError, match=rf"^binary_cross_entropy: target {shown} at \(1,\) is outside 0..1"):
        binary_cross_entropy(jnp.zeros(2), np.asarray(y))


@pytest.mark.parametrize("name", BINARY)
def test_every_loss_of_two_classes_names_targets_outside_0_to_1(name):
    with pytest.raises(ValueError, match=rf"^{name}: target -1 at \(1,\) is outside 0..1"):
        BINARY[name](jnp.zeros(2), np.array([1, -1]))


def test_probabilities_and_counts_below_0_are_named():
    for name, loss in (("kl_divergence", kl_divergence), ("poisson", poisson)):
        with pytest.raises(ValueError, match=rf"^{name}: target -0.5 at \(0, 1\) is outside 0..inf"):
            loss(jnp.zeros((1, 2)), np.array([[1, -0.5]]))


def test_probabilities_have_no_margin():
    with pytest.raises(ValueError, match=r"^multiclass_hinge: targets are float32; expected integer labels \(2,\)"):
        multiclass_hinge(jnp.zeros((2, 3)), jnp.ones((2, 3)))


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: cross_entropy([1.0, -1]),
            r"cross_entropy: class_weights = \[ 1. -1.\]; expected a number of at least 0",
        ),
        (lambda: focal_cross_entropy(2.0, [1, NAN]), r"focal_cross_entropy: class_weights = \[ 1. nan\]; expected"),
        (lambda: cross_entropy(2.0), r"cross_entropy: class_weights of shape \(\); expected a number .*for each class"),
        (lambda: cross_entropy(ignore_index=0.5), "cross_entropy: ignore_index = 0.5; expected a label, such as -100"),
        (lambda: cross_entropy(label_smoothing=2), "cross_entropy: expected label_smoothing from 0 to 1, got 2"),
        (lambda: focal_cross_entropy(-1.0), "focal_cross_entropy: expected gamma of at least 0, got -1.0"),
        (
            lambda: binary_focal_cross_entropy(-1.0),
            "binary_focal_cross_entropy: expected gamma of at least 0, got -1.0",
        ),
        (lambda: binary_focal_cross_entropy(1, 2), "binary_focal_cross_entropy: expected alpha from 0 to 1, got 2"),
        (
            lambda: weighted_binary_cross_entropy(0),
            "weighted_binary_cross_entropy: expected positive_weight > 0, got 0",
        ),
        (lambda: dice(0.0), "dice: expected smooth > 0, got 0.0"),
        (lambda: pinball(1.0), "pinball: expected quantile between 0 and 1, got 1.0"),
        (lambda: pinball([0.5, 0]), r"pinball: expected quantile between 0 and 1, got \[0.5, 0\]"),
    ],
)
def test_numbers_out_of_range_are_refused_where_the_loss_is_made(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_weights_and_quantiles_that_do_not_fit_the_outputs_are_refused():
    message = r"^cross_entropy: class_weights \(5,\) do not go with outputs \(2, 3\); expected a weight for each of 3"
    assert_refused(cross_entropy(C), shapes((2, 3), (2,), targets_dtype="int32"), message)
    message = r"^pinball: quantile \(2,\) does not go with outputs \(4, 3\); expected a number, or one for each output"
    assert_refused(pinball([0.1, 0.9]), shapes((4, 3), (4, 3)), message)


def test_there_is_no_label_to_ignore_among_probabilities():
    message = "^cross_entropy: targets are float32, among which there is no label -1 to ignore; expected integer labels"
    assert_refused(cross_entropy(ignore_index=-1), shapes((2, 3), (2, 3)), message)


@pytest.mark.parametrize("a", [-0.1, 1.1, NAN])
def test_smoothing_outside_0_to_1_is_refused(a):
    with pytest.raises(ValueError, match="smoothed_cross_entropy: expected label_smoothing from 0 to 1, got "):
        smoothed_cross_entropy(a)


@pytest.mark.parametrize("delta", [0.0, -1.0, NAN])
def test_a_delta_that_is_not_positive_is_refused(delta):
    with pytest.raises(ValueError, match="huber: expected delta > 0, got "):
        huber(delta)
