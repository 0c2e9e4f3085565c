"""Populations: a member is the run alone, one program, chunks, devices, statistics, halving, reports."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer
from rich.console import Console

import fnet
from fnet.core.numerics import stream
from fnet.layers import dense, dropout, relu, serial
from fnet.losses import smoothed_cross_entropy
from fnet.report import population as report
from fnet.training.population import (
    Population,
    band,
    best,
    check_range,
    crossed,
    draw,
    grid,
    log_uniform,
    ranking,
    successive_halving,
    train_population,
    uniform,
)
from fnet.training.population import train as module
from fnet.types import Mean
from tests.conftest import compiled_programs, on_two_devices

N, BATCH = 50, 8  # 6 full batches and one of 2 each epoch
EPOCHS = 72  # 504 steps


def data(dtype=np.float32):
    """Three classes of points; the first feature tells which example it is."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, N)
    inputs = rng.standard_normal((N, 4)) + 2 * np.eye(4)[labels]
    inputs[:, 0] = np.arange(N) / N
    return fnet.Batch(jnp.asarray(inputs.astype(dtype)), jnp.asarray(labels.astype(np.int32)))


def begin(hyper, key, data):
    """The start of a run in which every number matters."""
    model, _, optimizer = parts(hyper)
    params, state = fnet.init(model, stream(key, "model"), data.inputs[:1])
    return fnet.init_train_state(params, optimizer, stream(key, "run"), state)


def parts(hyper):
    model = serial(dense(8), relu(), dropout(hyper["dropout"]), dense(3))
    optimizer = fnet.adamw(hyper["learning_rate"], hyper["b1"], weight_decay=hyper["decay"])
    return model, smoothed_cross_entropy(hyper["smoothing"]), optimizer


def make_step(hyper):
    """A step that also tells the order of its examples and the key of its noise."""
    model, loss, optimizer = parts(hyper)
    inner = fnet.make_step(fnet.backprop(model, loss), optimizer)

    def step(ts, batch):
        after, metrics = inner(ts, batch)
        ids = jnp.round(batch.inputs[:, 0] * N).astype(jnp.int32)
        places = jnp.arange(1, len(ids) + 1, dtype=jnp.int32)
        noise = jax.random.key_data(jax.random.fold_in(stream(ts.key, "noise"), ts.step))
        one = jnp.ones((), jnp.int32)
        return after, {**metrics, "order": Mean((places * ids).sum(), one), "noise": Mean(noise, one)}

    return step


def resume(hyper, ts, data, *, epochs):
    ts, metrics, _ = fnet.train(make_step(hyper), ts, data, epochs=epochs, batch_size=BATCH)
    return ts, metrics


def run(hyper, key, data, *, epochs=2):
    ts, metrics = resume(hyper, begin(hyper, key, data), data, epochs=epochs)
    loss = metrics["loss"].value.reshape(-1)
    return {"loss": loss, "order": metrics["order"].sum, "noise": metrics["noise"].sum, "params": ts.params}


SETTINGS = {
    "learning_rate": [1e-3, 3e-3, 1e-2],
    "b1": [0.5, 0.9, 0.0],
    "decay": [0.0, 0.1, 0.3],
    "dropout": [0.0, 0.25, 0.5],
    "smoothing": [0.0, 0.1, 0.2],
}


def crossed_members(seeds=2):
    return crossed(SETTINGS, jax.random.split(jax.random.key(1), seeds))


def drawn_members(count=4):
    ranges = {name: uniform(min(values), max(values)) for name, values in SETTINGS.items()}
    return draw(jax.random.key(2), count, **ranges), jax.random.split(jax.random.key(3), count)


def member(hyper, keys, i):
    return {name: jnp.asarray(values[i], float) for name, values in hyper.items()}, keys[i]


@contextmanager
def compiled_texts():
    """The texts of the populations' programs that are compiled meanwhile."""
    texts, original = [], module._bytes
    module._bytes = lambda compiled: texts.append(compiled.as_text()) or original(compiled)
    try:
        yield texts
    finally:
        module._bytes = original


def small_begin(hyper, key, data):
    params, state = fnet.init(fnet.mlp(3), stream(key, "model"), data.inputs[:1])
    return fnet.init_train_state(params, fnet.momentum(hyper["rate"]), stream(key, "run"), state)


def small_resume(hyper, ts, data, *, epochs):
    gradient = fnet.backprop(fnet.mlp(3), fnet.softmax_cross_entropy)
    step = fnet.make_step(gradient, fnet.momentum(hyper["rate"]))
    ts, metrics, _ = fnet.train(step, ts, data, epochs=epochs, batch_size=BATCH)
    return ts, metrics["loss"].sum[-1].sum() / metrics["loss"].count[-1].sum()


def small_run(hyper, key, data):
    return small_resume(hyper, small_begin(hyper, key, data), data, epochs=1)[1]


# --- which members ---------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_with_the_last_axis_fastest():
    g = grid(a=[1.0, 2.0], b=(3, 4, 5), c=0.5)
    assert list(zip(g["a"], g["b"], g["c"], strict=True)) == [(a, b, 0.5) for a in (1.0, 2.0) for b in (3, 4, 5)]
    assert grid() == {}


def test_a_draw_is_uniform_in_its_range_or_in_the_logarithm():
    d = draw(jax.random.key(0), 4000, rate=log_uniform(1e-4, 1.0), b1=uniform(0.5, 0.9))
    for u in ((d["b1"] - 0.5) / 0.4, np.log10(d["rate"]) / 4 + 1):
        assert u.min() >= 0 and u.max() <= 1
        # the greatest distance of an empirical distribution of 4,000 from the true one is above 1.95 / √n once in 1,000
        assert np.abs(np.sort(u) - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / math.sqrt(4000)


def test_what_a_name_draws_depends_on_the_key_and_that_name_alone():
    ranges = {"rate": log_uniform(1e-4, 1.0)}
    alone, beside = draw(jax.random.key(0), 5, **ranges), draw(jax.random.key(0), 5, b1=uniform(0, 1), **ranges)
    np.testing.assert_array_equal(alone["rate"], beside["rate"])
    assert not np.array_equal(alone["rate"], draw(jax.random.key(1), 5, **ranges)["rate"])


def test_crossed_members_are_every_setting_with_every_key():
    keys = jax.random.split(jax.random.key(0), 3)
    hyper, all_keys = crossed({"a": [1.0, 2.0], "b": [5, 6]}, keys)
    assert hyper["a"].tolist() == [1, 1, 1, 2, 2, 2] and hyper["b"].tolist() == [5, 5, 5, 6, 6, 6]
    words = jax.random.key_data(keys)
    np.testing.assert_array_equal(jax.random.key_data(all_keys), np.concatenate([words, words]))
    assert crossed({}, keys)[1].shape == (3,)


# --- a member is the run alone ---------------------------------------------------------------------------------------


class Ran(NamedTuple):
    """A population, the programs that were compiled for it, and the text of its own."""

    population: Population
    programs: list[str]
    texts: list[str]


def ran(*arguments, **options) -> Ran:
    with compiled_programs() as names, compiled_texts() as texts:
        population = train_population(*arguments, **options)
    return Ran(population, [name for name in names if "run" in name], texts)


@pytest.fixture(scope="module")
def long():
    """Crossed members in float64, 504 steps."""
    with jax.enable_x64(True):
        return ran(long_run, *crossed_members(), data(np.float64))


@pytest.fixture(scope="module")
def short():
    """Members that are not crossed in float32, 14 steps, two at a time."""
    return ran(run, *drawn_members(), data(), chunk=2)


long_run = partial(run, epochs=EPOCHS)


def test_a_member_in_float64_is_the_run_alone_over_500_steps(x64, long):
    p, alone = long.population, jax.jit(long_run)
    assert p.results["loss"].shape == (6, 504)
    for i in range(6):
        expected = alone(*member(p.hyper, p.keys, i), data(np.float64))
        assert expected["loss"].dtype == np.float64
        np.testing.assert_array_equal(p.results["order"][i], expected["order"])
        np.testing.assert_array_equal(p.results["noise"][i], expected["noise"])
        np.testing.assert_allclose(p.results["loss"][i], expected["loss"], rtol=1e-9)
        for a, b in zip(jax.tree.leaves(p.results["params"]), jax.tree.leaves(expected["params"]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-9)


def test_a_member_in_float32_takes_the_first_ten_steps_of_the_run_alone(short):
    p, alone = short.population, jax.jit(run)
    for i in range(4):
        expected = alone(*member(p.hyper, p.keys, i), data())
        np.testing.assert_array_equal(p.results["order"][i], expected["order"])
        np.testing.assert_array_equal(p.results["noise"][i], expected["noise"])
        # float32 at 6e-8 a rounding; products are summed in another order
        np.testing.assert_allclose(p.results["loss"][i, :10], expected["loss"][:10], rtol=1e-5)


def test_members_differ_in_their_seeds_and_in_their_numbers(long, short):
    for losses in (long.population.results["loss"], short.population.results["loss"]):
        assert len(np.unique(losses[:, -1])) == len(losses)


def toy(hyper, key, *data):
    return hyper.get("a", 0.0) * jax.random.uniform(key) + sum(x.sum() for x in data)


def test_a_population_may_be_seeds_alone_or_need_no_data():
    keys = jax.random.split(jax.random.key(0), 3)
    p = train_population(toy, {}, keys, jnp.ones(2))
    assert p.hyper == {} and p.results.tolist() == [2, 2, 2]
    expected = [jax.random.uniform(key) * a for key, a in zip(keys, (1.0, 2.0, 3.0), strict=True)]
    np.testing.assert_allclose(train_population(toy, {"a": [1, 2, 3]}, keys).results, expected, rtol=1e-6)


# --- one program -----------------------------------------------------------------------------------------------------


def test_a_population_is_one_compilation(long, short):
    for population, programs, texts in (long, short):
        assert len(programs) == len(texts) == 1, programs
        assert population.compile_seconds > 0 and population.run_seconds > 0 and population.devices == 1
    assert (long.population.chunk, short.population.chunk) == (6, 2)


@pytest.mark.parametrize(
    ("settings", "seeds", "limit", "chunk"),
    [(1, 7, 3, 3), (1, 7, 6, 4), (1, 7, 99, 7), (5, 3, 7, 6), (5, 3, 3, 3), (5, 3, 2, 2), (1, 1, 1, 1)],
)
def test_chunks_are_as_few_as_the_limit_makes_and_of_one_size(settings, seeds, limit, chunk):
    hyper, keys = crossed({"a": np.arange(settings) + 1.0}, jax.random.split(jax.random.key(0), seeds))
    with compiled_programs() as names:
        p = train_population(toy, hyper, keys, chunk=limit)
    assert p.chunk == chunk and sum("toy" in name for name in names) == 1
    expected = jax.vmap(jax.random.uniform)(keys) * hyper["a"].astype(np.float32)
    np.testing.assert_allclose(p.results, expected, rtol=1e-6)


def operations(jaxpr, name, depth=0):
    """How many scans each operation called ``name`` stands in."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            found.append(depth)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += operations(inner, name, depth + (eqn.primitive.name in ("scan", "while")))
    return found


def vmapped(function, *arguments, shared=1):
    axes = (0,) * (len(arguments) - shared) + (None,) * shared
    return jax.jit(jax.vmap(function, in_axes=axes)).trace(*arguments)


def test_examples_are_permuted_once_an_epoch_and_never_in_a_step():
    hyper, keys = drawn_members()
    hyper = {name: jnp.asarray(values, jnp.float32) for name, values in hyper.items()}
    traced = vmapped(run, hyper, keys, data())
    assert max(operations(traced.jaxpr.jaxpr, "exp")) == 2  # a step stands in two scans, and this sees it there
    assert operations(traced.jaxpr.jaxpr, "sort") == [1]


def test_the_compiled_program_permutes_outside_of_the_loop_over_steps(long, short):
    for text in (*long.texts, *short.texts):
        sorts = re.findall(r"= \(?u32\[(\d+),50\].* sort\(.*op_name=\"([^\"]*)\"", text)
        assert len(sorts) == text.count(" sort(") == 1 and sorts[0][1].count("while/body") == 1, sorts
        # of crossed members the order is drawn once for all settings, for the 2 keys; the others are 2 at a time
        assert sorts[0][0] == "2"


def test_a_resumed_run_permutes_once_an_epoch_too():
    hyper, keys = drawn_members()
    hyper = {name: jnp.asarray(values, jnp.float32) for name, values in hyper.items()}
    states = jax.eval_shape(jax.vmap(begin, in_axes=(0, 0, None)), hyper, keys, data())
    traced = vmapped(lambda h, s, d: resume(h, s, d, epochs=2)[1]["loss"], hyper, states, data())
    assert operations(traced.jaxpr.jaxpr, "sort") == [1]


def test_a_condition_on_the_step_of_members_permutes_at_every_step_and_is_seen():
    def in_steps(step, key):
        def one(carry, _):
            step, order = carry
            order = jax.lax.cond(step % 6 == 0, lambda o: jax.random.permutation(key, o), lambda o: o, order)
            return (step + 1, order), order[0]

        return jax.lax.scan(one, (step, jnp.arange(N)), length=6)[1]

    traced = vmapped(in_steps, jnp.zeros(3, jnp.int32), jax.random.split(jax.random.key(0), 3), shared=0)
    assert operations(traced.jaxpr.jaxpr, "sort") == [1] and "cond" not in str(traced.jaxpr)


# --- the range of the grid -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", -0.1, "adamw: learning_rate = -0.1; expected 0 <= learning_rate < inf"),
        ("b1", 1.0, "adamw: b1 = 1.0; expected 0 <= b1 < 1"),
        ("b1", 1 - 1e-9, "adamw: b1 = 1.0; expected 0 <= b1 < 1"),  # float32, as the program has it
        ("decay", -1, "adamw: weight_decay = -1.0; expected 0 <= weight_decay < inf"),
        ("dropout", 1, "dropout: rate = 1.0; expected 0 <= rate < 1"),
        ("smoothing", 1.5, "smoothed_cross_entropy: expected label_smoothing from 0 to 1, got 1.5"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_member_before_anything_is_compiled(name, value, message):
    hyper, keys = drawn_members(8)
    hyper[name][5] = value
    with compiled_programs() as names, pytest.raises(ValueError, match=re.escape(message)) as caught:
        train_population(run, hyper, keys, data())
    assert str(caught.value).startswith("member 5 (") and f"{name} = {float(np.float32(value)):g}" in str(caught.value)
    assert not any("run" in name for name in names)


def test_a_number_that_is_not_finite_is_named():
    hyper, keys = drawn_members()
    hyper["b1"][2] = np.nan
    with pytest.raises(ValueError, match=re.escape("b1 of member 2 is nan; expected finite numbers")):
        train_population(run, hyper, keys, data())


def test_the_range_of_a_grid_is_checked_by_its_first_and_last_member():
    seen = []

    def noted(hyper, key):
        seen.append((hyper["a"], hyper["b"]))
        return jnp.zeros(())

    hyper, keys = crossed(grid(a=[0.1, 0.2, 0.3], b=[1, 2]), jax.random.split(jax.random.key(0), 2))
    hyper, keys = module.check_members("test", hyper, keys)
    check_range(noted, hyper, keys, ())
    traced, *plain = seen
    assert all(isinstance(number, Tracer) for number in traced)  # first, as the program will have them
    assert plain == [(0.1, 1.0), (0.3, 2.0)] and all(type(number) is float for numbers in plain for number in numbers)


def test_an_error_that_is_no_numbers_fault_is_raised_as_it_is():
    def wrong(hyper, key, data):
        return fnet.init(serial(fnet.layers.reshape(7)), key, data.inputs)

    with pytest.raises(fnet.LayerError, match=r"^reshape_0: cannot give"):
        train_population(wrong, *drawn_members(), data())


@pytest.mark.parametrize(
    ("hyper", "keys", "error", "message"),
    [
        ({"a": [1.0, 2.0]}, 3, ValueError, "a has shape (2,), keys (3,); expected one each: crossed(hyper, keys)"),
        ({"a": 1.0}, 3, ValueError, "a has shape (), keys (3,)"),
        ({"a": ["x", "y", "z"]}, 3, TypeError, "a has dtype <U1; expected numbers"),
        ({}, None, TypeError, "keys are NoneType; expected keys (M,)"),
        ({}, "data", TypeError, "keys are uint32(3, 2); expected keys (M,): jax.random.split("),
        ({}, "one", TypeError, "keys are key<fry>(); expected keys (M,)"),
    ],
)
def test_members_that_do_not_fit_are_refused(hyper, keys, error, message):
    split = jax.random.split(jax.random.key(0), 3)
    given = {3: split, None: None, "data": jax.random.key_data(split), "one": split[0]}[keys]
    with pytest.raises(error, match=re.escape(message)):
        train_population(lambda hyper, key: jnp.zeros(()), hyper, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "train_population: chunk = 0; expected at least 1"),
        ({"chunk": 2.5}, "train_population: chunk = 2.5; expected a whole number of at least 1"),
        ({"chunk": True}, "train_population: chunk = True; expected a whole number of at least 1"),
        ({"memory": math.nan}, "train_population: memory = nan; expected 0 < memory < inf"),
        ({"memory": -1}, "train_population: memory = -1; expected 0 < memory < inf"),
        ({"memory": "8MB"}, "train_population: memory = '8MB'; expected a number"),
        ({"devices": []}, "train_population: devices = []; expected one at least"),
    ],
)
def test_ways_to_run_that_make_no_sense_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        train_population(toy, {}, jax.random.split(jax.random.key(0), 3), **options)


def test_a_chunk_may_be_numpys_number_and_the_memory_without_end():
    keys = jax.random.split(jax.random.key(0), 4)
    assert train_population(toy, {}, keys, chunk=np.int64(2)).chunk == 2
    assert train_population(toy, {}, keys, memory=math.inf).chunk == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid(a=[]), "grid: a has shape (0,); expected a list of one number at least"),
        (lambda: grid(a=[[1.0]]), "grid: a has shape (1, 1)"),
        (lambda: uniform(1, 1), "uniform: from 1 to 1; expected finite lo < hi"),
        (lambda: log_uniform(0, 1), "log_uniform: from 0 to 1; expected finite 0 < lo < hi"),
        (lambda: draw(jax.random.key(0), 0), "draw: count = 0; expected at least 1"),
    ],
)
def test_axes_and_ranges_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_members_that_are_not_crossed_in_order_are_what_they_are():
    keys = jax.random.split(jax.random.key(0), 2)
    for a, order in (([1, 2, 2, 1], [0, 1, 0, 1]), ([1, 1, 2, 2], [0, 1, 1, 0]), ([1, 2, 1], [0, 0, 1])):
        p = train_population(toy, {"a": a}, keys[np.array(order)])
        expected = np.asarray(jax.vmap(jax.random.uniform)(keys))[order] * a
        np.testing.assert_allclose(p.results, expected, rtol=1e-6)


# --- memory and devices ----------------------------------------------------------------------------------------------


def big(hyper, key, x):
    """Some 40 kB for a member, and no more beside the data."""
    noise = jax.random.normal(key, (10_000,))
    return (hyper["a"] * jnp.sort(jnp.abs(noise))).mean() + x[0]


def test_chunks_are_as_large_as_the_memory_allows_by_the_compilers_own_figure():
    hyper, keys, x = {"a": np.arange(23.0)}, jax.random.split(jax.random.key(0), 23), jnp.ones(100_000)
    whole = train_population(big, hyper, keys, x)
    assert whole.chunk == 23 and whole.member_bytes > 40_000
    less = train_population(big, hyper, keys, x[:10])
    assert less.member_bytes == pytest.approx(whole.member_bytes, rel=0.01)  # the data are not the members'
    figures = []
    original = module._bytes
    try:
        module._bytes = lambda compiled: figures.append(original(compiled)) or figures[-1]
        with compiled_programs() as names:
            p = train_population(big, hyper, keys, x, memory=x.nbytes + 9.5 * whole.member_bytes)
    finally:
        module._bytes = original
    assert p.chunk == 8  # of 9 that fit: 23 members are 3 chunks of 8, the last filled up with one more
    assert sum("big" in name for name in names) == len(figures) == 2
    assert figures[0] > x.nbytes + 9.5 * whole.member_bytes > figures[1]
    np.testing.assert_allclose(p.results, whole.results, rtol=1e-5)


def test_memory_for_less_than_a_member_is_refused():
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(MemoryError, match=r"one member takes [\d,]+ bytes beside 400 of data; expected at most memory"):
        train_population(big, {"a": np.arange(3.0)}, keys, jnp.ones(100), memory=20_000)


def test_crossed_members_need_no_memory_for_all_keys_of_a_setting():
    hyper, keys = crossed({"a": [1.0, 2.0]}, jax.random.split(jax.random.key(0), 8))
    x = jnp.ones(100)
    whole = train_population(big, hyper, keys, x)
    p = train_population(big, hyper, keys, x, memory=300_000)
    assert whole.chunk == 16 and p.chunk < 8
    np.testing.assert_allclose(p.results, whole.results, rtol=1e-5)


def waiting(hyper, key):
    """As often as its number needs: beside others, as often as the one that needs the most."""
    return jax.lax.while_loop(lambda a: a < 100, lambda a: 2 * a, hyper["a"])


ON_TWO_DEVICES = """
import jax, numpy as np
import test_population as t
assert jax.device_count() == 2
with t.compiled_texts() as texts:
    hyper, keys = {"rate": [0.01, 0.1, 0.2]}, jax.random.split(jax.random.key(0), 3)
    p = t.train_population(t.small_run, hyper, keys, t.data())
    one = t.train_population(t.small_run, hyper, keys, t.data(), devices=jax.devices()[:1])
    np.testing.assert_allclose(p.results, one.results, rtol=1e-5)
    print(p.chunk, p.devices, one.chunk, one.devices)
    for settings, seeds in ((1, 5), (1, 1), (4, 3)):
        hyper, keys = t.crossed({"a": np.arange(settings) + 1.0}, jax.random.split(jax.random.key(0), seeds))
        toy = t.train_population(t.toy, hyper, keys)
        np.testing.assert_allclose(toy.results, jax.vmap(jax.random.uniform)(keys) * hyper["a"], rtol=1e-6)
        print(toy.chunk, toy.devices)
    loops = t.train_population(t.waiting, {"a": np.arange(8) + 1.0}, jax.random.split(jax.random.key(0), 8))
    assert loops.results.tolist() == [128, 128, 192, 128, 160, 192, 112, 128], loops.results
parallel = [text for text in texts if "num_partitions=2" in text]
assert len(parallel) == 4, len(parallel)  # one toy has a single member
assert not any(word in text for text in parallel for word in ("all-gather", "all-reduce", "collective", "all-to-all"))
"""


def test_members_are_spread_over_devices_that_do_not_talk_to_each_other():
    # 3 and 5 members are filled up to 4 and 6; a single one takes one device; of 12 crossed ones each has 2 settings
    assert on_two_devices(ON_TWO_DEVICES).splitlines() == ["4 2 3 1", "6 2", "1 1", "12 2"]


# --- statistics ------------------------------------------------------------------------------------------------------


def made(values, hyper, seeds):
    """A population as if run: ``values (M,)``, and the number of each member's seed."""
    keys = jax.random.split(jax.random.key(0), max(seeds) + 1)[np.asarray(seeds)]
    hyper = {name: np.asarray(numbers, np.float32) for name, numbers in hyper.items()}
    return Population(hyper, keys, {"value": np.asarray(values)}, len(seeds), 0, 1, 0.0, 0.0)


def test_the_best_member_is_the_least_or_the_greatest_and_never_nan():
    p = made([3.0, np.nan, 1.0, 1.0, np.inf], {"rate": [0.1, 0.2, 0.3, 0.4, 0.5]}, range(5))
    least = best(p, p.results["value"])
    assert (least.index, least.value, least.hyper) == (2, 1.0, {"rate": 0.3})
    assert least.results == {"value": 1.0} and least.key == p.keys[2]
    assert best(p, np.arange(5.0), greatest=True).index == 4
    with pytest.raises(ValueError, match="best: every value is NaN"):
        best(p, np.full(5, np.nan))
    with pytest.raises(ValueError, match=re.escape("best: values have shape (4,); expected (5,)")):
        best(p, np.zeros(4))


T = {1: 12.706205, 4: 2.776445, 7: 2.364624}  # Student's 97.5 % quantile, from the tables


def test_a_band_is_students_interval_over_seeds():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((16, 3))
    p = made(values[:, 0], {"rate": np.repeat([0.2, 0.1], 8), "b1": np.full(16, 0.9)}, [*range(8)] * 2)
    b = band(p, values)
    np.testing.assert_array_equal(b.hyper["rate"], np.float32([0.1, 0.2]))
    for i, rows in enumerate((slice(8, 16), slice(0, 8))):
        mean = values[rows].sum(0) / 8
        s = np.sqrt(((values[rows] - mean) ** 2).sum(0) / 7)
        np.testing.assert_allclose(b.mean[i], mean, rtol=1e-12)
        np.testing.assert_allclose(b.std[i], s, rtol=1e-12)
        np.testing.assert_allclose(b.high[i], mean + T[7] * s / math.sqrt(8), rtol=1e-6)
        np.testing.assert_allclose(b.low[i], mean - T[7] * s / math.sqrt(8), rtol=1e-6)
    assert b.count.tolist() == [8, 8]
    assert band(p, values, "b1").count.tolist() == [16] and band(p, values, []).mean.shape == (1, 3)


def test_a_band_holds_the_true_mean_as_often_as_it_says():
    settings, seeds = 2000, 5
    values = np.random.default_rng(1).standard_normal((settings, seeds)).ravel()
    p = made(values, {"rate": np.repeat(np.arange(settings), seeds)}, [*range(seeds)] * settings)
    for level in (0.8, 0.95):
        b = band(p, values, level=level)
        share = np.mean((b.low < 0) & (b.high > 0))
        assert abs(share - level) < 3.3 * math.sqrt(level * (1 - level) / settings)  # beyond once in 1,000


def test_a_band_of_one_or_of_a_diverged_seed_is_nan():
    b = band(made([1.0, 2.0, np.inf, 3.0], {"rate": [1, 2, 2, 2]}, [0, 0, 1, 2]), [1.0, 2.0, np.inf, 3.0])
    assert b.mean[0] == 1.0 and np.isnan([b.low[0], b.std[0]]).all()
    assert np.isnan([b.low[1], b.high[1]]).all() and not np.isfinite(b.mean[1])
    with pytest.raises(ValueError, match="no hyperparameter is called 'b1'; there are rate"):
        band(made([1.0], {"rate": [1]}, [0]), [1.0], "b1")


@pytest.mark.parametrize("level", [95, 1.0, 0.0, -0.5, math.nan])
def test_a_level_that_is_no_probability_is_named(level):
    p = made([1.0, 2.0], {"rate": [1, 1]}, [0, 1])
    for report_of in (band, ranking):
        with pytest.raises(ValueError, match=re.escape(f"level = {level}; expected 0 < level < 1")):
            report_of(p, [1.0, 2.0], level=level)


def paired():
    """Three settings with 5 shared seeds: the second differs from the first by seed, the third always by the same."""
    seeds = np.array([0.0, 1.0, 2.0, 3.0, 4.0])  # a spread far wider than any difference
    differences = np.array([0.3, -0.1, 0.2, 0.0, 0.1])
    values = np.concatenate([seeds, seeds + differences, seeds + 0.5, [np.nan, 0.0, 0.0, 0.0, 0.0]])
    return made(values, {"rate": np.repeat([1, 2, 3, 4], 5)}, [*range(5)] * 4), values, differences


def test_settings_are_told_apart_seed_by_seed():
    p, values, d = paired()
    r = ranking(p, values)
    assert r.hyper["rate"].tolist() == [1, 2, 3, 4] and r.shared.tolist() == [5, 5, 5, 4]
    s = np.sqrt(((d - d.mean()) ** 2).sum() / 4)
    np.testing.assert_allclose(r.difference[:3], [0, 0.1, 0.5], atol=1e-12)
    np.testing.assert_allclose(r.difference_high[1], 0.1 + T[4] * s / math.sqrt(5), rtol=1e-6)
    np.testing.assert_allclose(r.difference_low[1], 0.1 - T[4] * s / math.sqrt(5), rtol=1e-6)
    # the third is worse at every seed, though its interval lies almost wholly in the first's; the fourth diverged
    assert r.tied.tolist() == [True, True, False, False]
    assert r.low[2] < r.high[0]
    assert ranking(p, -values, greatest=True).hyper["rate"].tolist() == [1, 2, 3, 4]


def test_settings_are_compared_on_the_seeds_that_they_share():
    values = [1.0, 2.0, 3.0, 5.0, 2.5, 9.0]
    p = made(values, {"rate": [1, 1, 2, 2, 2, 3]}, [0, 1, 1, 0, 2, 5])
    r = ranking(p, values)
    assert r.hyper["rate"].tolist() == [1, 2, 3] and r.shared.tolist() == [2, 2, 0]
    assert r.difference[1] == pytest.approx(((5 - 1) + (3 - 2)) / 2)
    half = T[1] * np.std([4, 1], ddof=1) / math.sqrt(2)
    assert r.difference_high[1] == pytest.approx(2.5 + half, rel=1e-6)
    assert np.isnan(r.difference[2]) and r.tied.tolist() == [True, True, True]  # nothing tells the third apart


def test_a_ranking_of_nothing_or_of_twins_is_refused():
    with pytest.raises(ValueError, match="ranking: no setting has finite values only"):
        ranking(made([np.nan], {"rate": [1]}, [0]), [np.nan])
    with pytest.raises(ValueError, match="two members have the same numbers and the same key"):
        ranking(made([1.0, 2.0], {"rate": [1, 1]}, [0, 0]), [1.0, 2.0])


# --- successive halving ----------------------------------------------------------------------------------------------


def test_the_better_half_runs_on_and_a_survivor_is_the_run_that_was_never_stopped(x64):
    hyper, keys = draw(jax.random.key(0), 5, rate=log_uniform(1e-3, 0.1)), jax.random.split(jax.random.key(1), 5)
    h = successive_halving(small_begin, small_resume, hyper, keys, data(np.float64), rungs=(1, EPOCHS - 1))
    alive = np.isfinite(h.scores)
    assert alive.sum(1).tolist() == [5, 3]
    assert h.epochs.tolist() == (alive * [[1], [EPOCHS - 1]]).sum(0).tolist()
    assert set(h.survivors.tolist()) == set(np.argsort(h.scores[0])[:3].tolist())  # those of the least scores
    assert (np.diff(h.scores[1, h.survivors]) > 0).all()
    through = jax.jit(lambda hyper, key, data: small_resume(hyper, small_begin(hyper, key, data), data, epochs=EPOCHS))
    for place, i in enumerate(h.survivors):
        ts, score = through(*member(hyper, keys, i), data(np.float64))
        assert h.states.step[place] == ts.step == 504 and h.states.key[place] == ts.key
        np.testing.assert_allclose(h.scores[1, i], score, rtol=1e-9)
        for a, b in zip(jax.tree.leaves(h.states.params), jax.tree.leaves(ts.params), strict=True):
            np.testing.assert_allclose(a[place], b, rtol=1e-9, atol=1e-9)


def toy_begin(hyper, key):
    return {"left": hyper["a"], "key": key}


def toy_resume(hyper, state, *, epochs):
    return {"left": state["left"] - epochs * hyper["speed"], "key": state["key"]}, state["left"] - epochs * hyper[
        "speed"
    ]


@pytest.mark.parametrize(
    ("count", "keep", "rungs", "alive"),
    [
        (10, 0.5, (1, 1, 1, 1), [10, 5, 3, 2]),
        (100, 0.07, (1, 2, 1), [100, 7, 1]),  # 100 · 0.07 is 7.000000000000001
        (4, 1.0, (1, 1), [4, 4]),
        (2, 0.1, (1, 1, 1), [2, 1, 1]),
    ],
)
def test_each_rung_keeps_its_share_rounded_up_and_is_one_program(count, keep, rungs, alive):
    hyper = {"a": np.arange(count)[::-1].astype(float), "speed": np.zeros(count)}
    keys = jax.random.split(jax.random.key(0), count)
    with compiled_programs() as names:
        h = successive_halving(toy_begin, toy_resume, hyper, keys, rungs=rungs, keep=keep)
    assert np.isfinite(h.scores).sum(1).tolist() == alive
    assert sum("first" in name or "further" in name for name in names) == len(rungs), names
    assert h.survivors[0] == count - 1 and h.epochs.max() == sum(rungs)
    assert h.epochs[0] == (1 if keep < 1 else sum(rungs))
    assert (h.states["key"] == keys[h.survivors]).all()


def test_a_score_of_nan_never_goes_on_before_a_number():
    hyper = {"a": np.array([3.0, 1.0, 2.0, 4.0]), "speed": np.array([0.0, 0.0, 0.0, 0.0])}

    def broken(hyper, state, *, epochs):
        return state, jnp.where(state["left"] < 2.5, jnp.nan, state["left"])

    keys = jax.random.split(jax.random.key(0), 4)
    assert successive_halving(toy_begin, broken, hyper, keys, rungs=(1, 1)).survivors.tolist() == [0, 3]
    assert successive_halving(toy_begin, broken, hyper, keys, rungs=(1, 1), greatest=True).survivors.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("dtype", "scores", "least", "greatest"),
    [
        (jnp.bfloat16, [3.0, math.nan, 2.0, math.nan], [2, 0], [0, 2]),
        (jnp.float16, [3.0, math.nan, 2.0, math.nan], [2, 0], [0, 2]),
        (jnp.uint32, [0, 7, 3, 5], [0, 2], [1, 3]),
        (bool, [True, False, True, True], [1, 0], [0, 2]),
    ],
    ids=["bfloat16", "float16", "uint32", "bool"],
)
def test_members_are_kept_by_their_scores_in_any_dtype(dtype, scores, least, greatest):
    def score(hyper, state, *, epochs):
        return state, jnp.asarray(scores, dtype)[jnp.asarray(state["left"], jnp.int32)]

    hyper, keys = {"a": np.arange(4.0)}, jax.random.split(jax.random.key(0), 4)
    for kept, most in ((least, False), (greatest, True)):
        h = successive_halving(toy_begin, score, hyper, keys, rungs=(1, 1), greatest=most)
        assert h.survivors.tolist() == kept
        np.testing.assert_array_equal(h.scores[0], scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rungs": ()}, "rungs = (); expected a list of epochs, (1, 1, 2) for example"),
        ({"rungs": 3}, "rungs = 3; expected a list of epochs"),
        ({"rungs": (1, 0)}, "successive_halving: rungs[1] = 0; expected at least 1"),
        ({"rungs": (1.5,)}, "successive_halving: rungs[0] = 1.5; expected a whole number of at least 1"),
        ({"memory": math.nan}, "successive_halving: memory = nan; expected 0 < memory < inf"),
        ({"keep": 0}, "keep = 0; expected 0 < keep <= 1"),
        ({"keep": 1.5}, "keep = 1.5"),
        ({"resume": lambda h, s, *, epochs: (s, jnp.zeros(2))}, "the score has shape (2,); expected one number"),
    ],
)
def test_rungs_shares_and_scores_that_make_no_sense_are_refused(options, message):
    hyper, keys = {"a": np.arange(4.0), "speed": np.ones(4)}, jax.random.split(jax.random.key(0), 4)
    step = options.pop("resume", toy_resume)
    with pytest.raises(ValueError, match=re.escape(message)):
        successive_halving(toy_begin, step, hyper, keys, **options)


def test_a_number_out_of_range_is_named_before_the_first_rung():
    hyper, keys = {"rate": [0.1, -0.1, 0.2]}, jax.random.split(jax.random.key(1), 3)
    with pytest.raises(ValueError, match=re.escape("member 1 (rate = -0.1): momentum: learning_rate = -0.1; expected")):
        successive_halving(small_begin, small_resume, hyper, keys, data())


# --- reports ---------------------------------------------------------------------------------------------------------


def test_the_table_marks_what_is_not_told_from_the_best():
    p, values, _ = paired()
    text = io.StringIO()
    Console(file=text, width=120).print(report.ranking_table("costs", ranking(p, values)))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.getvalue().splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["best", "≈", "", ""]
    assert [row[1] for row in rows] == ["1", "2", "3", "4"]
    # seeds 0 to 4: mean 2, s = √2.5, half = 2.776445 √(2.5 / 5); differences: s = √0.025, half = 2.776445 √0.005
    assert rows[0][2:] == ["2.0 ± 2.0", "1.6", "5", ""] and rows[1][5] == "0.10 ± 0.20" and rows[2][5] == "0.5"
    assert rows[3][2] == "nan"
    assert "≈ ties with the best: its difference ± holds 0" in text.getvalue()
    text = io.StringIO()
    Console(file=text, width=120).print(report.ranking_table("costs", ranking(p, values), most=2))
    assert "and 2 more" in text.getvalue()


def test_the_file_gives_every_member_back_bit_by_bit(tmp_path):
    hyper, keys = drawn_members()
    p = train_population(lambda hyper, key: {"last": hyper["b1"] / 3, "curve": jnp.ones(2)}, hyper, keys)
    path = tmp_path / "sweep.csv"
    report.to_csv(p, path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["member", *SETTINGS, "key", "last"]  # curves are left out
    for name, numbers in {**p.hyper, "last": p.results["last"]}.items():
        np.testing.assert_array_equal(np.array([row[name] for row in rows], np.float32), numbers)
    for row, key in zip(rows, keys, strict=True):
        words = np.frombuffer(bytes.fromhex(row["key"]), ">u4").astype(np.uint32)
        assert jax.random.wrap_key_data(words) == key


def test_a_file_that_exists_is_left_as_it_is(tmp_path):
    path = tmp_path / "sweep.csv"
    path.write_text("mine")
    p = made([1.0, 2.0], {"rate": [1, 2]}, [0, 1])
    with pytest.raises(FileExistsError, match="exists already and is left as it is: give another path"):
        report.to_csv(p, path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("hyper", "results", "name"),
    [
        (["rate"], {"rate": np.zeros(2)}, "rate"),
        (["rate"], {"key": np.zeros(2)}, "key"),
        (["member"], np.zeros(2), "member"),
        (["key"], np.zeros(2), "key"),
        (["result"], np.zeros(2), "result"),
        (["rate"], {"a": {"b": np.zeros(2)}, "a/b": np.ones(2)}, "a/b"),
    ],
)
def test_two_columns_of_one_name_are_refused(tmp_path, hyper, results, name):
    p = made([1.0, 2.0], {name: [1, 2] for name in hyper}, [0, 1])._replace(results=results)
    with pytest.raises(ValueError, match=f"to_csv: two columns are called '{name}'; expected another name"):
        report.to_csv(p, tmp_path / "new.csv")
    assert not (tmp_path / "new.csv").exists()


def test_results_that_are_keys_are_left_out_of_the_file(tmp_path):
    p = made([1.0, 2.0], {"rate": [1, 2]}, [0, 1])
    report.to_csv(p._replace(results={"value": np.array([0.5, 0.25]), "next": p.keys}), tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["member", "rate", "key", "value"] and [row["value"] for row in rows] == ["0.5", "0.25"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn, original = [], report.new_figure
    monkeypatch.setattr(report, "new_figure", lambda **options: drawn.append(original(**options)) or drawn[-1])
    return drawn


def test_a_heat_map_shows_the_mean_of_each_pair_and_frames_the_best(tmp_path, figures):
    hyper, keys = crossed(grid(rate=[0.1, 1.0, 10.0], b1=[0.5, 0.9]), jax.random.split(jax.random.key(0), 2))
    p = Population({n: np.float32(v) for n, v in hyper.items()}, keys, None, 12, 0, 1, 0.0, 0.0)
    values = np.array([1.0, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, np.inf])
    report.plot_heat_map(p, values, ("rate", "b1"), tmp_path / "map.png", label="cost")
    (figure, ax), texts = figures[0], {}
    for text in ax.texts:
        texts[tuple(map(int, text.get_position()))] = text.get_text()
    assert texts == {(0, 0): "2", (0, 1): "5", (1, 0): "8", (1, 1): "11", (2, 0): "14", (2, 1): "not finite"}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.1", "1", "10"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.5", "0.9"]
    assert ax.patches[0].get_xy() == (-0.5, -0.5)
    shades = [ax.images[0].cmap(ax.images[0].norm(mean))[:3] for mean in (2.0, 5, 8, 11, 14)]
    assert all(np.dot(a, (0.3, 0.6, 0.1)) > np.dot(b, (0.3, 0.6, 0.1)) for a, b in itertools.pairwise(shades))
    bar = figure.axes[1]
    assert bar.get_ylabel() == "cost (brighter is better)"
    assert [t.get_text() for t in bar.get_yticklabels()] == ["5", "10"]
    report.plot_heat_map(p, values, ("rate", "b1"), tmp_path / "other.png", greatest=True)
    assert figures[1][1].patches[0].get_xy() == (1.5, -0.5)  # 14 of those that are finite
    assert np.mean(figures[1][1].images[0].cmap(1.0)[:3]) > np.mean(figures[1][1].images[0].cmap(0.0)[:3])
    assert (tmp_path / "map.png").stat().st_size > 1000
    many = made(np.arange(50.0), {"rate": np.arange(50), "b1": np.zeros(50)}, range(50))
    with pytest.raises(ValueError, match="plot_heat_map: rate has 50 values; expected 40 at most"):
        report.plot_heat_map(many, np.arange(50.0), ("rate", "b1"), tmp_path / "many.png")


def test_parallel_coordinates_have_a_line_for_each_member_the_best_on_top(tmp_path, figures):
    rates = np.geomspace(1e-4, 1, 20)
    values = np.concatenate([[np.nan], np.linspace(2, 1, 19)])
    p = made(values, {"rate": rates, "b1": [0.5, 0.9] * 10, "same": np.ones(20)}, range(20))
    report.plot_parallel(p, values, tmp_path / "lines.png", label="cost")
    (_, ax) = figures[0]
    lines = ax.collections[0].get_segments()
    assert len(lines) == 20
    # in the order of drawing: the one without a cost first, without its last point, then from the worst to the best
    on = np.array([line[:3, 1] for line in lines])
    np.testing.assert_allclose(on[:, 0], np.arange(20) / 19, atol=1e-6)  # rates on a logarithmic axis
    np.testing.assert_allclose(on[:, 1], [0, 1] * 10)  # two values, apart evenly
    np.testing.assert_allclose(on[:, 2], 0.5)
    assert len(lines[0]) == 3 or np.isnan(lines[0][3, 1])
    np.testing.assert_allclose([line[3, 1] for line in lines[1:]], np.linspace(1, 0, 19), atol=1e-12)
    labels = [t.get_text() for t in ax.texts]
    cost = ["1.0", "1.2", "1.4", "1.6", "1.8", "2.0"]
    assert labels == ["0.0001", "0.001", "0.01", "0.1", "1", "0.5", "0.9", "1", *cost]
    assert all(t.get_bbox_patch().get_alpha() is None and t.zorder > ax.collections[0].zorder for t in ax.texts)
    with pytest.raises(ValueError, match="label = 'rate', as a hyperparameter is called"):
        report.plot_parallel(p, values, tmp_path / "lines.png", label="rate")
    nothing = made([np.nan, np.nan], {"rate": [1, 2]}, range(2))
    report.plot_parallel(nothing, [np.nan, np.nan], tmp_path / "nothing.png")
