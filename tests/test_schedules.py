"""Schedules against their formulas in NumPy float64, and as data."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.schedules import constant, cosine, exponential, warmup_cosine
from fnet.types import Schedule


def half_cosine(start, end, share):
    return end + (start - end) * (1 + np.cos(np.pi * np.clip(share, 0, 1))) / 2


# name, schedule, rate at an array of counts in float64
TABLE = [
    ("constant", constant(0.3), lambda n: np.full(n.shape, 0.3)),
    ("exponential", exponential(0.8, 0.5, 20), lambda n: 0.8 * 0.5 ** (n / 20)),
    ("staircase", exponential(0.8, 0.9, 7, staircase=True), lambda n: 0.8 * 0.9 ** np.floor(n / 7)),
    ("growing", exponential(0.01, 1.1, 10), lambda n: 0.01 * 1.1 ** (n / 10)),
    ("cosine", cosine(0.5, 30), lambda n: half_cosine(0.5, 0.0, n / 30)),
    ("cosine_to_end", cosine(0.5, 30, end=0.2), lambda n: half_cosine(0.5, 0.2, n / 30)),
    (
        "warmup_cosine",
        warmup_cosine(0.4, 10, 40),
        lambda n: np.where(n < 10, 0.4 * n / 10, half_cosine(0.4, 0.0, (n - 10) / 30)),
    ),
    (
        "warmup_cosine_between",
        warmup_cosine(0.4, 10, 40, start=0.1, end=0.05),
        lambda n: np.where(n < 10, 0.1 + 0.3 * n / 10, half_cosine(0.4, 0.05, (n - 10) / 30)),
    ),
    ("warmup_cosine_0", warmup_cosine(0.4, 0, 40, start=0.1), lambda n: half_cosine(0.4, 0.0, n / 40)),
    (
        "warmup_cosine_fraction",
        warmup_cosine(0.4, 2.5, 40),
        lambda n: np.where(n < 2.5, 0.4 * n / 2.5, half_cosine(0.4, 0.0, (n - 2.5) / 37.5)),
    ),
]
schedules = pytest.mark.parametrize("schedule, oracle", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
COUNTS = np.arange(50)


@schedules
def test_rates_follow_the_formula_in_float64(schedule, oracle, x64):
    rates = schedule(jnp.asarray(COUNTS, jnp.int32))
    assert rates.dtype == jnp.float64 and rates.shape == COUNTS.shape
    np.testing.assert_allclose(rates, oracle(COUNTS), rtol=1e-14, atol=1e-16)


@schedules
def test_rates_in_float32_are_the_formula_rounded(schedule, oracle):
    rates = schedule(jnp.asarray(COUNTS, jnp.int32))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, oracle(COUNTS), rtol=1e-6, atol=1e-7)


@schedules
def test_ints_arrays_tracers_and_vmap_give_the_same_rate(schedule, oracle, x64):
    expected = oracle(COUNTS)
    compiled = jax.jit(lambda count: schedule(count))
    for count in (0, 3, 10, 45):
        for rate in (schedule(count), schedule(jnp.asarray(count, jnp.int32)), compiled(count)):
            assert rate.shape == () and rate.dtype == jnp.float64
            np.testing.assert_allclose(rate, expected[count], rtol=1e-14, atol=1e-16)
    swept = jax.vmap(lambda count: schedule(count))(jnp.asarray(COUNTS, jnp.int32))
    np.testing.assert_allclose(swept, expected, rtol=1e-14, atol=1e-16)


@schedules
def test_the_gradient_of_the_rate_by_every_number_is_finite(schedule, oracle):
    hyper = jax.tree.map(lambda number: jnp.asarray(number, float), schedule.hyper)
    slopes = jax.jacrev(schedule.fn)(hyper, jnp.asarray([0, 1, 9, 10, 11, 39, 40, 41, 1000], jnp.int32))
    assert all(np.isfinite(slope).all() for slope in jax.tree.leaves(slopes))


def test_at_the_largest_count_the_rate_is_the_end():
    last = 2**31 - 1
    assert warmup_cosine(0.4, 10, 40, end=0.05)(last) == cosine(0.4, 40, end=0.05)(last) == np.float32(0.05)
    assert exponential(0.8, 0.5, 20)(last) == 0


def test_worked_numbers():
    schedule = warmup_cosine(peak=1.0, warmup_steps=4, total_steps=12, start=0.2, end=0.1)
    rates = [float(schedule(count)) for count in (0, 1, 2, 3, 4, 6, 8, 10, 12, 13)]
    # the warm-up rises by 0.2 an update; then 0.1 + 0.45 (1 + cos(π k / 8)) at k = 0, 2, 4, 6, 8
    quarter = 0.45 * math.sqrt(0.5)
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 0.55 + quarter, 0.55, 0.55 - quarter, 0.1, 0.1]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert [float(exponential(8.0, 0.5, 2, staircase=True)(count)) for count in range(5)] == [8, 8, 4, 4, 2]


def test_start_peak_and_end_are_met_exactly_in_float32():
    start, peak, end = np.random.default_rng(0).uniform(size=(3, 100)).astype(np.float32)
    assert (end + (peak - end) != peak).any()  # a formula that adds the difference would miss some

    @jax.vmap
    def ends(start, peak, end):
        warm, plain = warmup_cosine(peak, 7, 23, start=start, end=end), cosine(start, 23, end=end)
        return [warm(count) for count in (0, 7, 23, 10**6)], [plain(count) for count in (0, 23, 24)]

    warm, plain = ends(*(jnp.asarray(numbers) for numbers in (start, peak, end)))
    np.testing.assert_array_equal(warm, [start, peak, end, end])
    np.testing.assert_array_equal(plain, [start, end, end])


def test_no_warm_up_starts_at_the_peak_also_when_its_length_is_traced():
    rates = jax.jit(lambda warmup: warmup_cosine(0.4, warmup, 40, start=0.1)(0))(0.0)
    assert rates == np.float32(0.4)


def test_a_traced_length_that_leaves_no_room_for_the_cosine_still_gives_numbers():
    run = jax.jit(lambda warmup, count: warmup_cosine(0.4, warmup, 10.0)(count))
    np.testing.assert_allclose([run(10.0, count) for count in (5, 10, 11, 12)], [0.2, 0.4, 0, 0], rtol=1e-6, atol=1e-8)


def test_numbers_are_data_one_compilation_for_all_of_them():
    traces = []

    @jax.jit
    def rates(hyper, counts):
        traces.append(None)
        return warmup_cosine(0, 0, 1).fn(hyper, counts)

    counts = jnp.arange(20)
    for peak, warmup in [(0.1, 5.0), (0.2, 0.0), (0.4, 19.0)]:
        n = np.arange(20)
        expected = np.where(n < warmup, peak * n / max(warmup, 1), half_cosine(peak, 0, (n - warmup) / (20 - warmup)))
        hyper = {"peak": peak, "warmup_steps": warmup, "total_steps": 20.0, "start": 0.0, "end": 0.0}
        np.testing.assert_allclose(rates(hyper, counts), expected, rtol=1e-5, atol=1e-7)
    assert len(traces) == 1


def test_vmap_sweeps_a_schedules_numbers():
    def rates(peak, warmup):
        return warmup_cosine(peak, warmup, 30)(jnp.arange(30))

    peaks, warmups, n = np.array([0.1, 0.2, 0.3]), np.array([0.0, 3.0, 10.0]), np.arange(30)
    swept = jax.vmap(rates)(jnp.asarray(peaks), jnp.asarray(warmups))
    for peak, warmup, row in zip(peaks, warmups, swept, strict=True):
        expected = np.where(n < warmup, peak * n / max(warmup, 1), half_cosine(peak, 0, (n - warmup) / (30 - warmup)))
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-7)


def test_a_schedule_is_its_function_and_its_numbers():
    schedule = exponential(0.8, 0.5, 20)
    assert isinstance(schedule, Schedule)
    assert schedule.hyper == {"start": 0.8, "decay_rate": 0.5, "decay_steps": 20}
    # equal functions, so that two schedules of a kind share compiled programs
    assert schedule.fn is exponential(0.1, 0.9, 3).fn


@pytest.mark.parametrize(
    "build, numbers, error, message",
    [
        (constant, (-1,), ValueError, "constant: rate = -1; expected 0 <= rate < inf"),
        (constant, (math.nan,), ValueError, "constant: rate = nan; expected 0 <= rate < inf"),
        (constant, (math.inf,), ValueError, "constant: rate = inf; expected 0 <= rate < inf"),
        (constant, ("0.1",), TypeError, "constant: rate = '0.1'; expected a number"),
        (constant, (np.ones(3),), ValueError, "constant: rate has shape (3,); expected one number"),
        (exponential, (-0.1, 0.5, 10), ValueError, "exponential: start = -0.1; expected 0 <= start < inf"),
        (exponential, (0.1, 0, 10), ValueError, "exponential: decay_rate = 0; expected 0 < decay_rate < inf"),
        (exponential, (0.1, 0.5, 0), ValueError, "exponential: decay_steps = 0; expected 0 < decay_steps < inf"),
        (exponential, (0.1, 0.5, -3), ValueError, "exponential: decay_steps = -3; expected 0 < decay_steps"),
        (cosine, (0.1, 0), ValueError, "cosine: total_steps = 0; expected 0 < total_steps < inf"),
        (cosine, (-0.1, 5), ValueError, "cosine: start = -0.1; expected 0 <= start < inf"),
        (cosine, (0.1, 5, -1), ValueError, "cosine: end = -1; expected 0 <= end < inf"),
        (warmup_cosine, (-0.1, 1, 2), ValueError, "warmup_cosine: peak = -0.1; expected 0 <= peak < inf"),
        (warmup_cosine, (0.1, -1, 2), ValueError, "warmup_cosine: warmup_steps = -1; expected 0 <= warmup_steps"),
        (warmup_cosine, (0.1, 5, 5), ValueError, "warmup_cosine: total_steps = 5; expected total_steps > 5"),
        (warmup_cosine, (0.1, 0, 0), ValueError, "warmup_cosine: total_steps = 0; expected total_steps > 0"),
        (warmup_cosine, (0.1, 1, 9, -2), ValueError, "warmup_cosine: start = -2; expected 0 <= start"),
        (warmup_cosine, (0.1, 1, 9, 0, -2), ValueError, "warmup_cosine: end = -2; expected 0 <= end < inf"),
    ],
)
def test_a_number_out_of_range_is_named(build, numbers, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build(*numbers)
