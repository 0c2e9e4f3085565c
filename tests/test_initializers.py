"""Moments of the draws against their formulas, to 6 standard errors of 200,000 draws: one in 5e8 fails by chance."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.layers import initializers as ini

SHAPE = (5, 5, 80, 100)  # 200,000 entries; fan_in 2000, fan_out 2500
Z = 6


def cut_normal_moments(low, high):
    """Mean, variance and kurtosis of a standard normal between low and high, by numerical integration."""
    x = np.linspace(low, high, 200_001)
    density = np.exp(-x * x / 2)
    density /= np.trapezoid(density, x)
    mean = np.trapezoid(x * density, x)
    variance = np.trapezoid((x - mean) ** 2 * density, x)
    return mean, variance, np.trapezoid((x - mean) ** 4 * density, x) / variance**2


CUT_2, CUT_SKEW = cut_normal_moments(-2, 2), cut_normal_moments(-0.5, 3)
UNIFORM, NORMAL, CUT = 1.8, 3.0, CUT_2[2]  # kurtoses: the variance of a sample variance is (kurtosis − 1) σ⁴ / n

# initializer, mean, variance, kurtosis, lowest and highest entry
INF = math.inf
DRAWN = {
    "uniform": (ini.uniform(-1.0, 3.0), 1, 16 / 12, UNIFORM, -1, 3),
    "normal": (ini.normal(0.3), 0, 0.09, NORMAL, -INF, INF),
    "truncated_normal": (ini.truncated_normal(0.5), 0, 0.25 * CUT_2[1], CUT, -1, 1),
    "truncated_normal(-0.5, 3)": (
        ini.truncated_normal(2.0, -0.5, 3.0),
        2 * CUT_SKEW[0],
        4 * CUT_SKEW[1],
        CUT_SKEW[2],
        -1,
        6,
    ),
    "glorot_uniform": (ini.glorot_uniform(), 0, 2 / 4500, UNIFORM, -math.sqrt(6 / 4500), math.sqrt(6 / 4500)),
    "glorot_normal": (ini.glorot_normal(), 0, 2 / 4500, CUT, -INF, INF),
    "he_uniform": (ini.he_uniform(), 0, 2 / 2000, UNIFORM, -math.sqrt(6 / 2000), math.sqrt(6 / 2000)),
    "he_normal": (ini.he_normal(), 0, 2 / 2000, CUT, -INF, INF),
    "lecun_uniform": (ini.lecun_uniform(), 0, 1 / 2000, UNIFORM, -math.sqrt(3 / 2000), math.sqrt(3 / 2000)),
    "lecun_normal": (ini.lecun_normal(), 0, 1 / 2000, CUT, -INF, INF),
    "fan_out, normal": (ini.variance_scaling(3.0, ini.fan_out, ini.normal), 0, 3 / 2500, NORMAL, -INF, INF),
}
SCALED = [
    "glorot_uniform", "glorot_normal", "he_uniform", "he_normal", "lecun_uniform", "lecun_normal",
]  # fmt: skip
EVERY = {name: row[0] for name, row in DRAWN.items()} | {
    "zeros": ini.zeros(),
    "constant": ini.constant(1.5),
    "orthogonal": ini.orthogonal(),
}


@pytest.mark.parametrize("name", DRAWN)
def test_mean_and_variance_are_the_formulas_and_entries_keep_the_bounds(name, key):
    initializer, mean, variance, kurtosis, low, high = DRAWN[name]
    drawn = np.asarray(initializer(key, SHAPE, jnp.float32), np.float64)
    assert drawn.shape == SHAPE
    assert abs(drawn.mean() - mean) < Z * math.sqrt(variance / drawn.size)
    assert abs(drawn.var() - variance) < Z * variance * math.sqrt((kurtosis - 1) / drawn.size)
    # an end may be met by rounding to float32
    assert low - 1e-6 * abs(low) <= drawn.min() and drawn.max() <= high + 1e-6 * abs(high)
    if math.isfinite(high):  # the ends are reached: above 40 draws are expected in the last 1 % of every row's range
        assert drawn.min() < low + 0.01 * (high - low) and drawn.max() > high - 0.01 * (high - low)


def test_the_correction_is_the_standard_deviation_of_a_normal_cut_at_two():
    density, inside = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    assert ini.TRUNCATED_STDDEV == 0.8796256610342398
    assert abs(ini.TRUNCATED_STDDEV - math.sqrt(1 - 4 * density / inside)) < 1e-15


@pytest.mark.parametrize("name", SCALED)
def test_the_variance_scaled_ones_draw_what_jax_draws(name, key):
    ours = getattr(ini, name)()(key, (3, 3, 7, 5), jnp.float32)
    theirs = getattr(jax.nn.initializers, name)()(key, (3, 3, 7, 5), jnp.float32)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # the order in which factors are rounded


def test_a_flat_draw_has_the_values_of_the_shaped_draw(key):
    shape = (64, 10)
    pairs = [
        (ini.normal(1.0), jax.random.normal(key, shape)),
        (ini.uniform(-1.0, 1.0), jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)),
        (ini.truncated_normal(1.0), jax.random.truncated_normal(key, -2.0, 2.0, shape)),
    ]
    for initializer, shaped in pairs:
        np.testing.assert_array_equal(initializer(key, shape, jnp.float32), shaped)


@pytest.mark.parametrize("name", [*DRAWN, "orthogonal"])
def test_random_bits_are_drawn_flat(name, key):
    text = str(jax.make_jaxpr(lambda key: EVERY[name](key, (64, 10), jnp.float32))(key))
    assert "random_bits[bit_width=32 shape=(640,)]" in text and text.count("random_bits[") == 1


@pytest.mark.parametrize("name", [*DRAWN, "orthogonal"])
def test_a_key_determines_the_draw(name, key):
    draw = jax.jit(lambda key: EVERY[name](key, (6, 7), jnp.float32))
    np.testing.assert_array_equal(draw(key), draw(jax.random.key(0)))
    assert not np.any(draw(key) == draw(jax.random.key(1)))


@pytest.mark.parametrize("name", EVERY)
def test_the_dtype_asked_for_is_given_and_low_precision_is_the_float32_draw_rounded(name, key, x64):
    wide = EVERY[name](key, (6, 7), jnp.float32)
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        assert EVERY[name](key, (6, 7), dtype).dtype == dtype
    np.testing.assert_array_equal(EVERY[name](key, (6, 7), jnp.bfloat16), wide.astype(jnp.bfloat16))


def test_float64_draws_carry_more_than_float32(key, x64):
    for name in [*DRAWN, "orthogonal"]:
        drawn = EVERY[name](key, (6, 7), jnp.float64)
        assert np.any(drawn != drawn.astype(jnp.float32).astype(jnp.float64)), name


def test_zeros_and_constants_are_exact(key):
    np.testing.assert_array_equal(ini.zeros()(key, (3,), jnp.float32), [0, 0, 0])
    np.testing.assert_array_equal(ini.constant(1.5)(key, (2, 1), jnp.float32), [[1.5], [1.5]])


# --- orthogonal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (4, 9), (3, 3, 2, 7), (2, 2, 3, 20), (1, 6)])
def test_columns_or_rows_are_orthogonal_with_length_gain(shape, key, x64):
    matrix = np.asarray(ini.orthogonal(2.5)(key, shape, jnp.float64)).reshape(-1, shape[-1])
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    np.testing.assert_allclose(gram, 2.5**2 * np.eye(len(gram)), atol=1e-13)


def test_float32_columns_are_orthogonal_to_its_rounding(key):
    matrix = np.asarray(ini.orthogonal()(key, (64, 32), jnp.float32), np.float64)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(32), atol=32 * float(np.finfo(np.float32).eps))


def is_even_among_rotations_and_reflections(matrices):
    """Haar's measure on 3×3: each entry has mean 0 and mean square 1/3, the trace has mean square 1, both signs of the
    determinant are equally likely; each to 6 standard errors (of bounded variables, by their bounds).
    """
    n = len(matrices)
    trace = np.trace(matrices, axis1=1, axis2=2)
    return (
        np.all(np.abs(matrices.mean(0)) < Z * math.sqrt(1 / 3 / n))
        and np.all(np.abs((matrices**2).mean(0) - 1 / 3) < Z * 0.5 / math.sqrt(n))  # q² is in [0, 1]
        and abs((trace**2).mean() - 1) < Z * 3 / math.sqrt(n)  # trace² <= 9 and has mean 1: variance <= 9
        and abs(np.sign(np.linalg.det(matrices)).mean()) < Z / math.sqrt(n)
    )


def test_orthogonal_matrices_are_drawn_evenly_by_haars_measure():
    keys = jax.random.split(jax.random.key(3), 20_000)
    draws = jax.jit(jax.vmap(lambda key: ini.orthogonal()(key, (3, 3), jnp.float32)))(keys)
    assert is_even_among_rotations_and_reflections(np.asarray(draws, np.float64))


def test_the_plain_qr_decomposition_is_not_even():
    gaussian = np.random.default_rng(0).normal(size=(20_000, 3, 3))
    assert not is_even_among_rotations_and_reflections(np.linalg.qr(gaussian)[0])


# --- traced numbers and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory",
    [
        ini.constant,
        ini.normal,
        ini.truncated_normal,
        ini.orthogonal,
        lambda s: ini.uniform(-s, s),
        lambda s: ini.truncated_normal(1.0, -s, s),
        lambda s: ini.variance_scaling(s, ini.fan_in, ini.corrected_truncated_normal),
        lambda s: ini.variance_scaling(s, ini.fan_avg, ini.centered_uniform),
    ],
)
def test_numbers_may_be_traced_and_swept(factory, key):
    swept = jax.jit(jax.vmap(lambda s: factory(s)(key, (4, 3), jnp.float32)))(jnp.array([0.5, 2.0]))
    for s, drawn in zip([0.5, 2.0], swept, strict=True):
        np.testing.assert_allclose(drawn, factory(s)(key, (4, 3), jnp.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*SCALED, "orthogonal"])
@pytest.mark.parametrize("shape", [(), (7,)])
def test_a_fan_needs_two_axes(name, shape, key):
    with pytest.raises(ValueError, match=r"has no fan: expected at least two axes .* use zeros"):
        EVERY[name](key, shape, jnp.float32)


def test_an_empty_weight_is_empty(key):
    for name in SCALED:
        assert EVERY[name](key, (0, 3), jnp.float32).shape == (0, 3)


@pytest.mark.parametrize("name", [*DRAWN, "orthogonal"])
def test_integers_are_not_drawn(name, key):
    with pytest.raises(ValueError, match="dtype int32; expected a floating one"):
        EVERY[name](key, (3, 4), jnp.int32)


def scaled_by(mode: Any, distribution: Any):
    return ini.variance_scaling(1.0, mode, distribution)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ini.uniform(1.0, 1.0), "uniform: expected low < high, got low = 1.0, high = 1.0"),
        (lambda: ini.normal(-0.1), "normal: expected stddev >= 0, got -0.1"),
        (lambda: ini.truncated_normal(math.nan), "truncated_normal: expected stddev >= 0, got nan"),
        (lambda: ini.truncated_normal(1.0, 2.0, -2.0), "truncated_normal: expected low < high"),
        (lambda: ini.variance_scaling(0.0, ini.fan_in, ini.normal), "variance_scaling: expected scale > 0, got 0.0"),
        (lambda: scaled_by("fan_in", ini.normal), "variance_scaling: mode = 'fan_in'; expected a function"),
        (lambda: scaled_by(ini.fan_in, "normal"), "variance_scaling: distribution = 'normal'; expected a function"),
    ],
)
def test_wrong_numbers_are_refused_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
