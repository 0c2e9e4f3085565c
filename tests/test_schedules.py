"""Schedules against their formulas in NumPy float64, and as data."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.optimizers.schedules import (
    constant,
    cosine,
    cosine_restarts,
    exponential,
    in_units,
    inverse_sqrt,
    join,
    one_cycle,
    piecewise,
    polynomial,
    step_decay,
    warmup_cosine,
)
from fnet.types import Schedule


def half_cosine(start, end, share):
    return end + (start - end) * (1 + np.cos(np.pi * np.clip(share, 0, 1))) / 2


def restarts(n, first, factor):
    """Half cosines from 0.4 to 0.1, cycle after cycle."""
    begin, length = 0, first
    while n >= begin + length:
        begin, length = begin + length, length * factor
    return half_cosine(0.4, 0.1, (n - begin) / length)


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
    ("step_decay", step_decay(0.8, 0.5, 10), lambda n: 0.8 * 0.5 ** (n // 10)),
    (
        "piecewise",
        piecewise(0.8, {30: 0.1, 3: 0.5}),
        lambda n: np.select([n < 3, n < 30], [0.8, 0.4], 0.04),
    ),
    ("polynomial_line", polynomial(0.5, 40), lambda n: 0.5 * np.clip(1 - n / 40, 0, 1)),
    ("polynomial", polynomial(0.5, 40, 0.1, 3), lambda n: 0.1 + 0.4 * np.clip(1 - n / 40, 0, 1) ** 3),
    ("polynomial_root", polynomial(0.5, 40, 0.1, 0.5), lambda n: 0.1 + 0.4 * np.clip(1 - n / 40, 0, 1) ** 0.5),
    ("inverse_sqrt", inverse_sqrt(0.4, 10), lambda n: 0.4 * np.minimum((n + 1) / 10, np.sqrt(10 / (n + 1)))),
    (
        "one_cycle",
        one_cycle(0.4, 40),
        lambda n: np.where(n < 12, half_cosine(0.4 / 25, 0.4, n / 12), half_cosine(0.4, 0.4 / 25 / 1e4, (n - 12) / 28)),
    ),
    (
        "one_cycle_options",
        one_cycle(0.4, 40, rising=0.5, start_divisor=4, end_divisor=2),
        lambda n: np.where(n < 20, half_cosine(0.1, 0.4, n / 20), half_cosine(0.4, 0.05, (n - 20) / 20)),
    ),
    ("cosine_restarts", cosine_restarts(0.4, 12, end=0.1), np.vectorize(lambda n: restarts(n, 12, 1))),
    ("cosine_restarts_2", cosine_restarts(0.4, 5, 2, end=0.1), np.vectorize(lambda n: restarts(n, 5, 2))),
    ("cosine_restarts_3", cosine_restarts(0.4, 2, 3, end=0.1), np.vectorize(lambda n: restarts(n, 2, 3))),
    (
        "join",
        join([constant(0.3), exponential(0.3, 0.5, 10), cosine(0.1, 20)], [10, 30]),
        lambda n: np.select([n < 10, n < 30], [0.3, 0.3 * 0.5 ** ((n - 10) / 10)], half_cosine(0.1, 0, (n - 30) / 20)),
    ),
    ("in_units", in_units(exponential(0.8, 0.5, 2), 10), lambda n: 0.8 * 0.5 ** (n / 20)),
    ("in_fractions", in_units(cosine(0.5, 1.0), 40), lambda n: half_cosine(0.5, 0, n / 40)),
    (
        "join_of_units",
        in_units(join([polynomial(0.5, 3, 0.1), constant(0.1)], [3]), 10),
        lambda n: 0.1 + 0.4 * np.clip(1 - n / 30, 0, 1),
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


@pytest.mark.parametrize("factor", [1, 1.5, 2, 3])
@pytest.mark.parametrize("first", [1, 7, 10, 100])
def test_cosine_restarts_begin_at_their_start_also_in_float32(factor, first):
    schedule, ends, length = jax.jit(lambda n: cosine_restarts(0.4, first, factor)(n)), [0.0], float(first)
    for _ in range(8):
        ends.append(ends[-1] + length)
        length *= factor
    for begin in (int(end) for end in ends if end == int(end)):
        assert schedule(begin) == pytest.approx(0.4, rel=1e-4), begin


@pytest.mark.parametrize("factor, cycles", [(1, 10**6), (2, 18), (3, 12), (4, 9), (7, 6)])
@pytest.mark.parametrize("first", [7, 10])
def test_cosine_restarts_end_at_their_last_count_and_not_before(first, factor, cycles):
    schedule = cosine_restarts(1.0, first, factor)
    begins = [first * n if factor == 1 else first * (factor**n - 1) // (factor - 1) for n in (1, 2, cycles - 1, cycles)]
    assert begins[-1] < 2**24
    lengths = np.array([first * factor**n for n in (0, 1, cycles - 2, cycles - 1)], np.float64)
    np.testing.assert_array_equal(schedule(np.array(begins)), 1)
    expected = (1 + np.cos(np.pi * (1 - 1 / lengths))) / 2
    np.testing.assert_allclose(schedule(np.array(begins) - 1), expected, atol=1e-6)
    once = cosine_restarts(1.0, 2_000_000)(np.array([1_999_999, 2_000_000]))
    np.testing.assert_allclose(once, [0, 1], atol=1e-6)


def test_in_an_array_of_counts_a_step_comes_at_its_count_and_not_one_later():
    # where XLA knows the number that it divides by, 41 · (1 / 41) < 1
    n = np.arange(1000)
    for every in (41, 47, 55, 61):
        expected = 0.5 ** (n // every)
        np.testing.assert_array_equal(step_decay(1.0, 0.5, every)(n), expected)
        np.testing.assert_array_equal(in_units(step_decay(1.0, 0.5, 1), every)(n), expected)
        steps = in_units(piecewise(1.0, {1: 0.5, 3: 0.5}), every)
        np.testing.assert_array_equal(steps(n), 0.5 ** np.select([n < every, n < 3 * every], [0, 1], 2))
        two = in_units(join([constant(1.0), constant(0.5)], [3]), every)
        np.testing.assert_array_equal(two(n), np.where(n < 3 * every, 1, 0.5))
        assert polynomial(1.0, every, 0.0, 0.5)(n)[every] == 0


def test_a_units_length_has_its_gradient_also_at_whole_units(x64):
    # d/du of 0.8 · ½ ** (n / u) is 0.8 ln 2 · n / u² · ½ ** (n / u)
    rate = jax.grad(lambda u, n: in_units(exponential(0.8, 0.5, 1), u)(n))
    for n in (41, 42, 82):
        expected = 0.8 * np.log(2) * n / 41**2 * 0.5 ** (n / 41)
        np.testing.assert_allclose(rate(41.0, n), expected, rtol=1e-12)


def test_counts_of_pieces_may_be_fractions_of_the_run():
    n = np.arange(20)
    np.testing.assert_array_equal(in_units(piecewise(1.0, {0.5: 0.5}), 20)(n), np.where(n < 10, 1, 0.5))
    np.testing.assert_array_equal(
        in_units(join([constant(1.0), constant(0.5)], [0.5]), 20)(n), np.where(n < 10, 1, 0.5)
    )
    np.testing.assert_array_equal(piecewise(1.0, {1.5: 0.5})(n), np.where(n < 2, 1, 0.5))
    np.testing.assert_array_equal(join([constant(1.0), constant(0.5)], [1.5])(n), np.where(n < 2, 1, 0.5))


def test_at_the_largest_count_the_rate_is_the_end():
    last = 2**31 - 1
    assert polynomial(0.4, 40, 0.05, 0.5)(last) == np.float32(0.05)
    assert one_cycle(0.4, 40, start_divisor=4, end_divisor=2)(last) == np.float32(0.05)
    assert step_decay(0.8, 0.5, 20)(last) == 0
    assert inverse_sqrt(1.0, 2)(last) == pytest.approx(2**-15, rel=1e-6)
    assert piecewise(0.4, {10: 0.5})(last) == np.float32(0.2)
    assert join([constant(0.4), constant(0.2)], [10])(last) == np.float32(0.2)
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
        (constant, (True,), TypeError, "constant: rate = True; expected a number"),
        (constant, (np.complex64(1),), TypeError, "constant: rate = np.complex64(1+0j); expected a number"),
        (constant, (np.array("a"),), TypeError, "constant: rate = array('a', dtype='<U1'); expected a number"),
        (constant, (jnp.asarray(True),), TypeError, "constant: rate = Array(True, dtype=bool); expected a number"),
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
        (step_decay, (0.1, 0.5, 0), ValueError, "step_decay: every = 0; expected 0 < every < inf"),
        (step_decay, (0.1, 0, 5), ValueError, "step_decay: factor = 0; expected 0 < factor < inf"),
        (piecewise, (0.1, {0: 0.5}), ValueError, "piecewise: count = 0; expected 0 < count < inf"),
        (piecewise, (0.1, {"5": 1}), TypeError, "piecewise: count = '5'; expected a number"),
        (piecewise, (0.1, {5: -1}), ValueError, "piecewise: factors[5] = -1; expected 0 <= factors[5] < inf"),
        (polynomial, (0.1, 0), ValueError, "polynomial: total_steps = 0; expected 0 < total_steps < inf"),
        (polynomial, (0.1, 5, 0, -1), ValueError, "polynomial: power = -1; expected 0 < power < inf"),
        (inverse_sqrt, (0.1, 0), ValueError, "inverse_sqrt: warmup_steps = 0; expected 0 < warmup_steps < inf"),
        (one_cycle, (0.1, 0), ValueError, "one_cycle: total_steps = 0; expected 0 < total_steps < inf"),
        (cosine_restarts, (0.1, 5, 0.5), ValueError, "cosine_restarts: factor = 0.5; expected at least 1"),
        (join, ([], []), ValueError, "join: no schedules; expected at least one"),
        (join, ([constant(1), 0.1], [3]), TypeError, "join: schedule 1 is 0.1; expected a Schedule: constant(rate)"),
        (join, ([constant(1)] * 3, [3]), ValueError, "join: counts = [3] for 3 schedules; expected 2 rising counts"),
        (join, ([constant(1)] * 3, [5, 3]), ValueError, "join: counts = [5, 3] for 3 schedules; expected 2 rising"),
        (join, ([constant(1)] * 2, [0]), ValueError, "join: counts[0] = 0; expected 0 < counts[0] < inf"),
        (in_units, (0.1, 5), TypeError, "in_units: schedule 0 is 0.1; expected a Schedule"),
        (in_units, (constant(1), 0), ValueError, "in_units: updates = 0; expected 0 < updates < inf"),
    ],
)
def test_a_number_out_of_range_is_named(build, numbers, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build(*numbers)


def test_a_share_out_of_range_is_named():
    with pytest.raises(ValueError, match=re.escape("one_cycle: rising = 1; expected 0 <= rising < 1")):
        one_cycle(0.1, 10, rising=1)


def test_the_numbers_within_join_and_in_units_are_data():
    schedule, traces = in_units(join([constant(0.1), polynomial(0.1, 4)], [2]), 5), []

    @jax.jit
    def rate(hyper, count):
        traces.append(None)
        return schedule.fn(hyper, count)

    assert rate(schedule.hyper, 20) == pytest.approx(0.05)  # two of the line's four units
    hyper = {"schedule": {"0": {"rate": 0.7}, "1": {**schedule.hyper["schedule"]["1"], "start": 0.8}}, "updates": 10}
    assert rate(hyper, 20) == pytest.approx(0.8) and rate(hyper, 19) == pytest.approx(0.7)
    assert len(traces) == 1


# --- other libraries -------------------------------------------------------------------------------------------------

OPTAX = {
    "exponential": (exponential(0.8, 0.5, 20), lambda o: o.exponential_decay(0.8, 20, 0.5)),
    "step_decay": (step_decay(0.8, 0.5, 20), lambda o: o.exponential_decay(0.8, 20, 0.5, staircase=True)),
    "cosine": (cosine(0.5, 30, 0.1), lambda o: o.cosine_decay_schedule(0.5, 30, alpha=0.2)),
    "warmup_cosine": (
        warmup_cosine(0.4, 10, 40, 0.1, 0.05),
        lambda o: o.warmup_cosine_decay_schedule(0.1, 0.4, 10, 40, 0.05),
    ),
    "polynomial": (polynomial(0.5, 40, 0.1, 3), lambda o: o.polynomial_schedule(0.5, 0.1, 3, 40)),
    "piecewise": (piecewise(0.8, {3: 0.5, 30: 0.1}), lambda o: o.piecewise_constant_schedule(0.8, {3: 0.5, 30: 0.1})),
    "join": (
        join([constant(0.3), cosine(0.1, 20)], [10]),
        lambda o: o.join_schedules([o.constant_schedule(0.3), o.cosine_decay_schedule(0.1, 20)], [10]),
    ),
    "one_cycle": (one_cycle(0.4, 40), lambda o: o.cosine_onecycle_schedule(40, 0.4)),
}


@pytest.mark.parametrize("name", OPTAX)
def test_rates_are_those_of_optax(name, x64):
    ours, theirs = OPTAX[name][0], OPTAX[name][1](pytest.importorskip("optax"))
    for count in range(50):
        with jax.numpy_dtype_promotion("standard"):
            expected = float(theirs(count))
        assert float(ours(count)) == pytest.approx(expected, rel=1e-6, abs=1e-9), count


TORCH = {
    "step_decay": (step_decay(0.8, 0.5, 10), 0.8, "StepLR", (10, 0.5), 50),
    "piecewise": (piecewise(0.8, {3: 0.5, 30: 0.5}), 0.8, "MultiStepLR", ([3, 30], 0.5), 50),
    "exponential": (exponential(0.8, 0.9, 1), 0.8, "ExponentialLR", (0.9,), 50),
    "polynomial": (polynomial(0.8, 40, 0.0, 2), 0.8, "PolynomialLR", (40, 2.0), 50),
    "cosine": (cosine(0.8, 40, 0.1), 0.8, "CosineAnnealingLR", (40, 0.1), 41),  # theirs rises again
    "cosine_restarts": (cosine_restarts(0.8, 5, 2, 0.1), 0.8, "CosineAnnealingWarmRestarts", (5, 2, 0.1), 50),
    # theirs is over one update sooner: 41 of them are our 40, and ⌊⌋ does not act on 0.3 · 41 − 1 = 11.3
    "one_cycle": (one_cycle(0.8, 40, rising=(0.3 * 41 - 1) / 40), 0.8, "OneCycleLR", (0.8, 41), 41),
}


@pytest.mark.parametrize("name", TORCH)
def test_rates_are_those_of_torch(name, x64):
    torch = pytest.importorskip("torch")
    ours, start, theirs, options, count = TORCH[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=start, momentum=0.9)
    scheduler = getattr(torch.optim.lr_scheduler, theirs)(optimizer, *options)
    for n in range(count):
        assert float(ours(n)) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12), n
        optimizer.step()
        if n + 1 < count:
            scheduler.step()
