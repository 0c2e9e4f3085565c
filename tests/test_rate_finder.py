"""The learning-rate range test: what it computes, and that it changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.optimizers.schedules import constant, exponential
from fnet.report import plot_rate_curve, plot_schedules, schedule_table
from fnet.training.rate_finder import curve


def quadratic(rate=0.1, optimizer=None):
    """½ c p² for a batch of c, whose gradient is mean(c) p, from p = 3."""
    gradient = fnet.from_loss(lambda p, batch, key: 0.5 * batch.inputs.mean() * p["x"] ** 2)
    optimizer = optimizer or fnet.sgd(rate)
    ts = fnet.init_train_state({"x": jnp.asarray(3.0)}, optimizer, jax.random.key(0))
    data = fnet.Batch(jnp.ones((6, 1)), jnp.zeros(6))
    return gradient, optimizer, ts, data


def test_losses_are_those_of_numpys_updates_at_rising_rates():
    gradient, optimizer, ts, data = quadratic()
    found = fnet.find_learning_rate(gradient, optimizer, ts, data, batch_size=4, low=1e-3, high=1.0, steps=30)
    p, expected = 3.0, []
    for rate in np.geomspace(1e-3, 1.0, 30):
        expected.append(0.5 * p * p)
        p -= rate * p
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)
    assert found.diverged_at is None and found.suggestion is not None
    assert 1e-3 < found.suggestion < 1.0


def test_a_run_that_diverges_is_cut_there_and_the_suggestion_lies_below():
    gradient, optimizer, ts, data = quadratic()
    found = fnet.find_learning_rate(gradient, optimizer, ts, data, batch_size=6, low=1e-2, high=1e3, steps=60)
    # p ← (1 − rate) p grows for rates above 2
    assert found.diverged_at is not None and found.suggestion is not None
    assert found.diverged_at > 2 > found.suggestion
    assert np.isfinite(found.smoothed).all() and found.rates[-1] < found.diverged_at


def test_the_state_is_what_it_was_to_the_bit():
    gradient, optimizer, ts, data = quadratic(optimizer=fnet.adam(0.1))
    before = jax.device_get(ts._replace(key=jax.random.key_data(ts.key)))
    fnet.find_learning_rate(gradient, optimizer, ts, data, batch_size=4, steps=12)
    after = jax.device_get(ts._replace(key=jax.random.key_data(ts.key)))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_the_suggestion_is_where_the_smoothed_loss_falls_most_steeply():
    rates = np.geomspace(1e-4, 1, 41)
    losses = 2 - np.tanh(3 * (np.log10(rates) + 2))  # the steepest fall by log rate is at 10⁻²
    found = curve(rates, losses, 0.0, 4.0)
    assert found.suggestion == pytest.approx(1e-2)
    assert curve(rates, np.ones(41), 0.0, 4.0).suggestion is None
    rising = curve(rates, np.array([1.0, 5.0, *np.ones(39)]), 0.0, 4.0)
    assert rising.diverged_at == rates[1] and len(rising.rates) == 1


def test_losses_that_are_equal_but_for_the_rounding_of_their_mean_suggest_nothing():
    rates = np.geomspace(1e-6, 10, 100)
    for loss in (0.1, 0.3, 0.7, 1e6 / 3, -0.3):
        assert curve(rates, np.full(100, loss), 0.9, 4.0).suggestion is None
        assert curve(rates, loss - 1e-3 * np.arange(100), 0.9, 4.0).suggestion is not None


@pytest.mark.parametrize(
    ("losses", "end"),
    [
        ([-1.0, -2.0, -1.0, 3.9, 4.1], 4),  # 3 · 2 above −2
        ([-1.0, -0.5, 1.9, 2.1], 3),  # 3 · 1 above −1
        ([0.5, -0.1, 1.3, 1.5], 3),  # 3 · 0.5 above −0.1
        ([0.5, 0.0, 1.4, 1.6], 3),  # 3 · 0.5 above 0
        ([2.0, 1.0, 3.9, 4.1], 3),  # 4 · 1
    ],
)
def test_a_loss_that_is_not_positive_diverges_too(losses, end):
    rates = np.geomspace(1e-3, 1, len(losses))
    found = curve(rates, np.array(losses), 0.0, 4.0)
    assert found.diverged_at == rates[end] and len(found.rates) == end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.0}, r"low = 0.0, high = 10.0; expected 0 < low < high < inf"),
        ({"high": np.inf}, "high = inf; expected 0 < low < high < inf"),
        ({"divergence": 0.5}, "divergence = 0.5; expected divergence > 1"),
        ({"divergence": np.nan}, "divergence = nan; expected divergence > 1"),
        ({"low": 1.0, "high": 0.1}, "expected 0 < low < high"),
        ({"steps": 9}, "steps = 9; expected at least 10"),
        ({"smoothing": 1.0}, "smoothing = 1.0; expected 0 <= smoothing < 1"),
        ({"batch_size": 7}, "batch_size = 7"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    gradient, optimizer, ts, data = quadratic()
    with pytest.raises(ValueError, match=message):
        fnet.find_learning_rate(gradient, optimizer, ts, data, **{"batch_size": 4, **options})


def test_a_schedule_in_the_place_of_a_rate_is_refused_and_so_is_a_loss_that_is_nan_at_once():
    gradient, optimizer, ts, data = quadratic(optimizer=fnet.sgd(exponential(0.1, 0.5, 10)))
    with pytest.raises(ValueError, match="expected an optimizer with a number for its rate"):
        fnet.find_learning_rate(gradient, optimizer, ts, data, batch_size=4)
    with pytest.raises(ValueError, match="the loss is nan at the lowest rate"):
        curve(np.geomspace(1e-3, 1, 10), np.full(10, np.nan), 0.9, 4.0)


def test_pictures_and_the_table_of_schedules(tmp_path):
    gradient, optimizer, ts, data = quadratic()
    found = fnet.find_learning_rate(gradient, optimizer, ts, data, batch_size=6, high=1e3, steps=40)
    plot_rate_curve(found, tmp_path / "rates.png")
    schedules = {"constant": constant(0.25), "halved": exponential(0.5, 0.5, 10)}
    plot_schedules(schedules, 40, tmp_path / "schedules.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("rates.png", "schedules.png"))
    table = schedule_table("rates", schedules, [0, 10])
    columns = [list(column.cells) for column in table.columns]
    assert columns == [["0", "10"], ["0.25", "0.25"], ["0.5", "0.25"]]
