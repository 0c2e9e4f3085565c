"""The run as one pure function: steps, epochs, chunks, resumption, and what is refused before it starts."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.core.numerics import stream
from fnet.data import Stream, open_arrays
from fnet.layers import dense, serial, stateless
from fnet.metrics import accuracy, gradient_norms
from fnet.runs import driver
from fnet.runs.checkpoint import saved_steps
from fnet.runs.loop import all_finite
from fnet.training.epochs import epoch_order, steps_per_epoch
from fnet.types import TrainState
from tests.conftest import compiled_programs

EXAMPLES, FEATURES, CLASSES = 53, 6, 3


@functools.lru_cache  # so that runs of one problem share their program
def problem(examples=EXAMPLES, engine=fnet.backprop, optimizer=None, dtype=jnp.float32):
    """A step, a start and data: an MLP under Adam whose batches do not divide the data."""
    optimizer = optimizer or fnet.adam(0.01)
    model = fnet.mlp(8, CLASSES)
    x_key, y_key, model_key, key = jax.random.split(jax.random.key(11), 4)
    data = fnet.Batch(
        jax.random.normal(x_key, (examples, FEATURES), dtype), jax.random.randint(y_key, (examples,), 0, CLASSES)
    )
    params, state = fnet.init(model, model_key, data.inputs[:1])
    step = fnet.make_step(
        engine(model, fnet.softmax_cross_entropy, {"accuracy": accuracy}), optimizer, {"gradient_norm": gradient_norms}
    )
    evaluate = fnet.make_evaluate(model, fnet.softmax_cross_entropy, {"accuracy": accuracy}, batch_size=10)
    return step, fnet.init_train_state(params, optimizer, key, state), data, evaluate


def bits(tree):
    """The tree with its keys as numbers and its arrays on the host, to be compared to the bit."""
    data = jax.tree.map(lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a, tree)
    return jax.tree.map(np.asarray, data)


def assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(bits(actual), bits(expected))
    chex.assert_trees_all_equal(bits(actual), bits(expected))


def loop(step, ts, data, epochs, batch_size):
    """The run as a Python loop of a jitted step: the meaning of `train`."""
    jitted, history = jax.jit(step), []
    for epoch in range(epochs):
        order = np.asarray(epoch_order(ts.key, epoch, len(data.targets)))
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            ts, metrics = jitted(ts, jax.tree.map(lambda a, rows=rows: a[rows], data))
            history.append(float(metrics["loss"].sum))
    return ts, history


# --- the order of the examples ---------------------------------------------------------------------------------------


def seen_by(examples, batch_size, epochs=2, **options):
    """Which examples every step saw, recorded by a step that only looks."""
    data = fnet.Batch(jnp.arange(examples), jnp.zeros(examples))

    def step(ts, batch):
        mask = jnp.zeros(examples, jnp.int32).at[batch.inputs].add(1)
        return ts._replace(step=ts.step + 1), {"seen": mask, "size": jnp.asarray(batch.inputs.shape[0])}

    ts = TrainState(jnp.asarray(0), (), (), (), jax.random.key(5))
    _, metrics, _ = jax.jit(
        lambda ts, data: fnet.train(step, ts, data, epochs=epochs, batch_size=batch_size, **options)
    )(ts, data)
    return np.asarray(metrics["seen"]), np.asarray(metrics["size"])


@pytest.mark.parametrize(("examples", "batch_size"), [(53, 8), (64, 8), (5, 5), (5, 1), (4, 3)])
def test_every_epoch_sees_each_example_once_in_batches_of_their_true_size(examples, batch_size):
    seen, size = seen_by(examples, batch_size)
    np.testing.assert_array_equal(seen.sum(1), np.ones((2, examples)))
    last = examples % batch_size or batch_size
    expected = [batch_size] * (-(-examples // batch_size) - 1) + [last]
    np.testing.assert_array_equal(size, [expected, expected])
    np.testing.assert_array_equal(seen.sum(2), [expected, expected])


def test_the_order_of_an_epoch_is_that_of_its_number_where_the_last_batch_is_smaller():
    seen, _ = seen_by(11, 8)
    for epoch in range(2):
        first = epoch_order(jax.random.key(5), epoch, 11)[:8]
        np.testing.assert_array_equal(np.flatnonzero(seen[epoch, 0]), np.sort(first))


def test_epochs_differ_in_their_order_and_shuffle_false_keeps_it():
    seen, _ = seen_by(53, 8)
    assert (seen[0] != seen[1]).any()
    seen, _ = seen_by(53, 8, shuffle=False)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(np.flatnonzero(seen[0, 0]), np.arange(8))


# --- the same numbers however the run is cut -------------------------------------------------------------------------


def test_4001_examples_in_batches_of_32_equal_numpy(x64):
    """Softmax regression by plain SGD over two epochs, against NumPy float64 over the same order of examples."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4001, 5)), rng.integers(0, 3, 4001)
    model, optimizer = serial(dense(3)), fnet.sgd(0.1)
    params, state = model.init(jax.random.key(0), jnp.asarray(x[:1]))
    ts = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    end, history = fnet.fit(step, ts, fnet.Batch(x, y), epochs=2, batch_size=32)

    w, b = np.asarray(params["dense_0"]["w"]), np.asarray(params["dense_0"]["b"])
    mean_losses = []
    for epoch in range(2):
        order, total = np.asarray(epoch_order(ts.key, epoch, 4001)), 0.0
        for begin in range(0, 4001, 32):
            rows = order[begin : begin + 32]
            z = x[rows] @ w + b
            q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            total -= np.log(q[np.arange(len(rows)), y[rows]]).sum()
            d = (q - np.eye(3)[y[rows]]) / len(rows)
            w, b = w - 0.1 * x[rows].T @ d, b - 0.1 * d.sum(0)
        mean_losses.append(total / 4001)
    assert len(rows) == 1 and int(end.step) == 252
    np.testing.assert_allclose(end.params["dense_0"]["w"], w, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(end.params["dense_0"]["b"], b, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(history.epochs["loss"], mean_losses, rtol=1e-13)


@pytest.mark.parametrize("chunk_steps", [1, 2, 3, 4, 5, 7, 14, 100])
def test_any_chunk_size_gives_the_bits_of_the_jitted_loop(chunk_steps):
    step, ts, data, _ = problem()
    expected, losses = loop(step, ts, data, 3, 8)
    end, history = fnet.fit(step, ts, data, epochs=3, batch_size=8, chunk_steps=chunk_steps)
    assert_same_bits(end, expected)
    counts = np.tile([8, 8, 8, 8, 8, 8, 5], 3)
    np.testing.assert_allclose(history.steps["loss"] * counts, losses, rtol=1e-6)


def test_train_compiled_as_one_program_gives_the_bits_of_the_jitted_loop():
    step, ts, data, _ = problem()
    expected, _ = loop(step, ts, data, 3, 8)
    end, _, _ = jax.jit(partial(fnet.train, step, epochs=3, batch_size=8))(ts, data)
    assert_same_bits(end, expected)


@pytest.mark.parametrize("stop_at", [2, 5, 7, 9])
def test_a_run_stopped_and_resumed_gives_the_bits_of_the_straight_run(stop_at):
    step, ts, data, _ = problem()
    straight, _ = fnet.fit(step, ts, data, epochs=3, batch_size=8)

    def stop(event):
        return "stop" if event.step >= stop_at else "continue"

    halted, _ = fnet.fit(step, ts, data, epochs=3, batch_size=8, observers=[stop], chunk_steps=1)
    assert int(halted.step) == stop_at
    resumed, _ = fnet.fit(step, halted, data, epochs=3, batch_size=8, chunk_steps=3)
    assert_same_bits(resumed, straight)


def test_a_state_that_lacks_only_the_smaller_last_batch_is_taken_up_there():
    step, ts, data, _ = problem()
    straight, _ = fnet.fit(step, ts, data, epochs=1, batch_size=8)
    six, _ = fnet.fit(step, ts, data, steps=6, batch_size=8)
    resumed, history = fnet.fit(step, six, data, epochs=1, batch_size=8)
    assert_same_bits(resumed, straight)
    assert history.steps["loss"].shape == (1,)


def test_fit_twice_from_one_state_gives_the_same_bits_and_leaves_the_state_alone():
    step, ts, data, _ = problem()
    before = bits(ts)
    first, _ = fnet.fit(step, ts, data, epochs=2, batch_size=8)
    second, _ = fnet.fit(step, ts, data, epochs=2, batch_size=8)
    assert_same_bits(first, second)
    chex.assert_trees_all_equal(bits(ts), before)
    other, _ = fnet.fit(step, ts._replace(key=jax.random.key(99)), data, epochs=2, batch_size=8)
    assert (np.asarray(other.params["dense_0"]["w"]) != np.asarray(first.params["dense_0"]["w"])).any()


def test_validation_does_not_change_the_training():
    step, ts, data, evaluate = problem()
    plain, _ = fnet.fit(step, ts, data, epochs=2, batch_size=8)
    watched, _ = fnet.fit(step, ts, data, epochs=2, batch_size=8, evaluate=evaluate, validation=data)
    assert_same_bits(watched, plain)


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [("float64", 500, 1e-9), ("float32", 10, 1e-5)])
def test_a_vmapped_member_is_the_run_alone(dtype, steps, tolerance, x64):
    """Same keys and batches: the losses agree over 500 steps in float64, over the first ten in float32."""
    step, ts, data, _ = problem(dtype=dtype)
    run = partial(fnet.train, step, epochs=-(-steps // 7), batch_size=8)
    keys = jax.random.split(jax.random.key(1), 2)
    _, together, _ = jax.jit(jax.vmap(lambda key: run(ts._replace(key=key), data)))(keys)
    assert together["loss"].sum.shape == (2, -(-steps // 7), 7)
    _, alone, _ = jax.jit(run)(ts._replace(key=keys[1]), data)
    expected, actual = (np.asarray(loss).reshape(-1)[:steps] for loss in (alone["loss"].sum, together["loss"].sum[1]))
    np.testing.assert_allclose(actual, expected, rtol=tolerance)


def test_full_batch_mini_batch_and_one_example_are_settings_of_one_function():
    for batch_size, per_epoch in ((EXAMPLES, 1), (8, 7), (1, EXAMPLES)):
        step, ts, data, _ = problem()
        assert steps_per_epoch(data, batch_size) == per_epoch
        end, history = fnet.fit(step, ts, data, epochs=2, batch_size=batch_size)
        assert int(end.step) == 2 * per_epoch
        assert history.steps["loss"].shape == (2 * per_epoch,)


def test_a_plain_loss_function_trains_through_the_same_fit():
    def loss_fn(params, batch, key):
        return ((batch.inputs @ params["w"] - batch.targets) ** 2).mean()

    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    optimizer = fnet.sgd(0.1)
    ts = fnet.init_train_state({"w": jnp.zeros(3)}, optimizer, jax.random.key(0))
    end, history = fnet.fit(
        fnet.make_step(fnet.from_loss(loss_fn), optimizer),
        ts,
        fnet.Batch(x, x @ np.float32([1, -2, 3])),
        epochs=30,
        batch_size=16,
    )
    np.testing.assert_allclose(end.params["w"], [1, -2, 3], atol=1e-4)
    assert history.epochs["loss"].shape == (30,)


# --- metrics, events -------------------------------------------------------------------------------------------------


def test_the_bits_of_an_epochs_means_do_not_depend_on_the_chunks(x64):
    def step(ts, batch):
        return ts._replace(step=ts.step + 1), {"x": jax.random.normal(jax.random.fold_in(ts.key, ts.step), dtype=float)}

    start = TrainState(jnp.asarray(0, jnp.int32), (), (), (), jax.random.key(0))
    options = {"data": fnet.Batch(jnp.zeros(60), jnp.zeros(60)), "epochs": 3, "batch_size": 1}
    means = [fnet.fit(step, start, **options, chunk_steps=n)[1].epochs["x"].tolist() for n in (1, 7, 180)]
    assert means[0] == means[1] == means[2]


def test_history_holds_sums_over_counts_also_over_the_smaller_last_batch():
    step, ts, data, evaluate = problem()
    end, history = fnet.fit(step, ts, data, epochs=2, batch_size=8, evaluate=evaluate, validation=data)
    counts = np.asarray([8] * 6 + [5])
    for name in ("loss", "accuracy"):
        by_hand = (history.steps[name].reshape(2, 7) * counts).sum(1) / counts.sum()
        np.testing.assert_allclose(history.epochs[name], by_hand, rtol=1e-6)
    mean_of_means = history.steps["accuracy"].reshape(2, 7).mean(1)
    assert (np.abs(history.epochs["accuracy"] - mean_of_means) > 1e-6).any()
    logits = fnet.apply(fnet.mlp(8, CLASSES), end.params, end.state, data.inputs)
    right = (np.asarray(logits).argmax(1) == np.asarray(data.targets)).mean()
    np.testing.assert_allclose(history.epochs["validation_accuracy"][-1], right, rtol=1e-6)
    assert set(history.epochs) >= {
        "learning_rate",
        "gradient_norm/all",
        "gradient_norm/dense_0",
        "gradient_norm/dense_1",
    }
    np.testing.assert_allclose(history.epochs["learning_rate"], 0.01, rtol=1e-6)


@pytest.mark.parametrize("chunk_steps", [None, 2, 7, 14])
def test_events_tell_the_same_epochs_for_every_chunk_size(chunk_steps):
    step, ts, data, evaluate = problem()
    events = []
    _, history = fnet.fit(
        step,
        ts,
        data,
        epochs=4,
        batch_size=8,
        evaluate=evaluate,
        validation=data,
        observers=[events.append],
        chunk_steps=chunk_steps,
    )
    assert events[0].kind == "start" and events[1].kind == "compile" and events[-1].kind == "end"
    assert all(event.seconds > 0 for event in events if event.kind == "chunk")
    ends = [event for event in events if event.kind == "epoch"]
    assert [(event.epoch, event.step) for event in ends] == [(1, 7), (2, 14), (3, 21), (4, 28)]
    np.testing.assert_array_equal(
        [event.metrics["validation_loss"] for event in ends], history.epochs["validation_loss"]
    )
    assert events[-1].step == events[-1].steps == 28


def test_a_run_is_one_program_for_every_chunk_length_and_a_second_run_compiles_nothing():
    step, ts, data, evaluate = problem(examples=54)
    options = {"epochs": 5, "batch_size": 8, "evaluate": evaluate, "validation": data}
    with compiled_programs() as names:
        fnet.fit(step, ts, data, chunk_steps=2, **options)
    assert names.count("jit(run_chunk)") == 1
    with compiled_programs() as names:
        for chunk_steps in (1, 7, 100, None):
            fnet.fit(step, ts, data, chunk_steps=chunk_steps, **options)
    assert not names


def test_a_step_and_an_evaluation_of_ones_own_may_return_plain_numbers():
    def step(ts, batch):
        return ts._replace(step=ts.step + 1, params=ts.params + batch.inputs.sum()), {"mean": batch.inputs.mean()}

    ts = TrainState(jnp.asarray(0), jnp.asarray(0.0), (), (), jax.random.key(0))
    data = fnet.Batch(jnp.arange(6.0), ())
    end, history = fnet.fit(
        step, ts, data, epochs=2, batch_size=3, evaluate=lambda params, state, held: {"p": params}, validation=data
    )
    assert end.params == 30
    np.testing.assert_allclose(history.epochs["mean"], [2.5, 2.5])
    np.testing.assert_allclose(history.epochs["validation_p"], [15, 30])


def test_observers_are_told_the_end_also_of_a_run_that_fails():
    step, ts, data, _ = problem()
    kinds = []

    def failing(event):
        kinds.append(event.kind)
        if event.kind == "chunk":
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fnet.fit(step, ts, data, epochs=2, batch_size=8, observers=[failing])
    assert kinds == ["start", "compile", "chunk", "end"]


def test_an_observer_may_stop_before_the_first_step():
    step, ts, data, _ = problem()
    end, history = fnet.fit(step, ts, data, epochs=1, batch_size=8, observers=[lambda event: "stop"])
    assert_same_bits(end, ts)
    assert history.steps == history.epochs == {}


def test_program_text_does_not_grow_with_the_data():
    step, ts, data, _ = problem()
    run = jax.jit(partial(fnet.train, step, epochs=2, batch_size=8))
    # both a multiple of 8 and 5 more, and shuffled in as many rounds, so that the programs differ in shapes alone
    lengths = [
        len(run.lower(ts, jax.tree.map(lambda a, n=n: jnp.zeros((n, *a.shape[1:]), a.dtype), data)).as_text())
        for n in (8_061, 80_061)
    ]
    assert lengths[1] < lengths[0] * 1.01


def test_evaluate_in_slices_equals_evaluate_at_once():
    _, ts, data, _ = problem()
    model = fnet.mlp(8, CLASSES)
    results = [
        fnet.make_evaluate(model, fnet.softmax_cross_entropy, {"accuracy": accuracy}, size)(ts.params, ts.state, data)
        for size in (None, 10, 53, 1)
    ]
    for result in results[1:]:
        assert int(result["accuracy"].sum) == int(results[0]["accuracy"].sum)
        assert result["loss"].count == results[0]["loss"].count == EXAMPLES
        np.testing.assert_allclose(result["loss"].sum, results[0]["loss"].sum, rtol=1e-5)


# --- what is refused before anything is computed ---------------------------------------------------------------------


def test_a_finished_state_is_refused_rather_than_run_for_no_steps():
    step, ts, data, _ = problem()
    end, _ = fnet.fit(step, ts, data, epochs=2, batch_size=8)
    with pytest.raises(
        ValueError, match="the state stands at step 14, but is to end at step 14, after epoch 2; epochs and"
    ):
        fnet.fit(step, end, data, epochs=2, batch_size=8)
    further, _ = fnet.fit(step, end, data, epochs=3, batch_size=8)
    assert int(further.step) == 21


def test_train_refuses_a_batch_larger_than_the_data():
    step, ts, data, _ = problem()
    with pytest.raises(fnet.DataError, match="batch_size = 54; expected a whole number from 1 to 53"):
        fnet.train(step, ts, data, epochs=1, batch_size=54)


def test_an_id_outside_the_vocabulary_is_refused_before_anything_is_computed(key):
    model = fnet.layers.serial(fnet.layers.embedding(10, 4), fnet.layers.dense(3))
    ids = np.arange(40).reshape(8, 5) % 10
    ids[6, 2] = 12
    params, state = fnet.init(model, key, jnp.asarray(ids[:1]))
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), fnet.sgd(0.1))
    start = fnet.init_train_state(params, fnet.sgd(0.1), key, state)
    data = (ids, np.zeros((8, 5), np.int32))
    message = r"embedding_0: expected ids from 0 to 9, got 12 at \(2,\) in example 6, 1 such of 20"
    with pytest.raises(fnet.LayerError, match=message) as error:
        fnet.fit(step, start, data, epochs=1, batch_size=4)
    note = "in data, given to fit: Batch(inputs=int32[4, 5], targets=int32[4, 5], weights=None)"
    assert note in error.value.__notes__


# --- evaluations, several sets, what is kept -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_steps", [1, 5, 100])
@pytest.mark.parametrize(
    ("every", "steps"), [((5, "steps"), [5, 10, 15, 20]), ((2, "epochs"), [14]), ((7, "steps"), [7, 14, 21])]
)
def test_several_sets_are_evaluated_where_it_was_asked_for(every, steps, chunk_steps):
    step, ts, data, evaluate = problem()
    few = jax.tree.map(lambda a: a[:9], data)
    sets, events = {"validation": data, "few": few}, []
    _, history = fnet.fit(
        step,
        ts,
        data,
        epochs=3,
        batch_size=8,
        evaluate=evaluate,
        validation=sets,
        evaluate_every=every,
        observers=[events.append],
        chunk_steps=chunk_steps,
    )
    assert history.evaluations["step"].tolist() == steps
    assert [event.step for event in events if event.kind == "evaluation"] == steps
    for at, loss, other in zip(steps, *(history.evaluations[f"{name}_loss"] for name in sets), strict=True):
        end, _ = fnet.fit(step, ts, data, steps=at, batch_size=8)
        for held, value in ((data, loss), (few, other)):
            expected = evaluate(end.params, end.state, held)["loss"]
            np.testing.assert_allclose(value, expected.value, rtol=1e-6)
    at_ends = [step // 7 - 1 for step in steps if step % 7 == 0]
    assert np.flatnonzero(~np.isnan(history.epochs.get("validation_loss", np.full(3, np.nan)))).tolist() == at_ends


def test_without_copies_the_run_is_the_same():
    step, ts, data, _ = problem()
    kept, history = fnet.fit(step, ts, data, epochs=3, batch_size=8, chunk_steps=4)
    bare, other = fnet.fit(step, ts, data, epochs=3, batch_size=8, chunk_steps=4, keep=False)
    assert_same_bits(bare, kept)
    np.testing.assert_array_equal(history.steps["loss"], other.steps["loss"])


def test_an_event_holds_the_state_of_its_step_while_the_run_goes_on():
    step, ts, data, _ = problem()
    seen = {}

    def look(event):
        if event.kind == "chunk":
            seen[event.step] = event.state

    fnet.fit(step, ts, data, epochs=2, batch_size=8, chunk_steps=4, observers=[look])
    assert list(seen) == [4, 8, 12, 14]
    for at, state in seen.items():
        expected, _ = fnet.fit(step, ts, data, steps=at, batch_size=8)
        assert_same_bits(state, expected)


def test_the_host_reads_a_chunk_while_the_next_one_runs(monkeypatch):
    """With a length given, two chunks are sent before the first is read."""
    from fnet.runs import driver

    order, original = [], driver.compiled

    def watched(*args):
        program, took = original(*args)
        return (lambda *call: (order.append("sent"), program(*call))[1]), took

    monkeypatch.setattr(driver, "compiled", watched)
    step, ts, data, _ = problem()
    looks = [lambda event: order.append("read") if event.kind == "chunk" else None]
    fnet.fit(step, ts, data, steps=8, batch_size=8, chunk_steps=2, observers=looks)
    assert order == ["sent", "sent", "read", "sent", "read", "sent", "read", "read"]
    order.clear()
    fnet.fit(step, ts, data, steps=8, batch_size=8, chunk_steps=2, observers=looks, keep=False)
    assert order == ["sent", "read"] * 4


def test_the_noise_of_a_step_is_a_function_of_the_runs_key_and_the_step():
    step = fnet.make_step(fnet.from_loss(lambda params, batch, key: params + jax.random.normal(key)), fnet.sgd(0.0))
    ts = fnet.init_train_state(jnp.asarray(0.0), fnet.sgd(0.0), jax.random.key(3))
    _, history = fnet.fit(step, ts, fnet.Batch(jnp.zeros(6), jnp.zeros(6)), epochs=2, batch_size=2)
    expected = [jax.random.normal(jax.random.fold_in(stream(ts.key, "noise"), i)) for i in range(6)]
    np.testing.assert_allclose(history.steps["loss"], expected, rtol=1e-6)


def test_augmentation_is_a_function_of_the_runs_key_and_the_step():
    step, ts, data, _ = problem()

    def augment(key, batch):
        return batch._replace(inputs=batch.inputs + 0.1 * jax.random.normal(key, batch.inputs.shape))

    noisy = fnet.augmented(step, augment)
    end, _ = fnet.fit(noisy, ts, data, epochs=2, batch_size=8)
    by_hand, jitted = ts, jax.jit(step)
    for epoch in range(2):
        order = np.asarray(epoch_order(ts.key, epoch, EXAMPLES))
        for begin in range(0, EXAMPLES, 8):
            batch = jax.tree.map(lambda a, rows=order[begin : begin + 8]: a[rows], data)
            key = jax.random.fold_in(stream(ts.key, "augment"), by_hand.step)
            by_hand, _ = jitted(by_hand, augment(key, batch))
    chex.assert_trees_all_close(end.params, by_hand.params, rtol=1e-5, atol=1e-7)
    half, _ = fnet.fit(noisy, ts, data, steps=5, batch_size=8)
    resumed, _ = fnet.fit(noisy, half, data, epochs=2, batch_size=8)
    assert_same_bits(resumed, end)


def test_explain_says_what_is_compiled_and_why(capsys):
    step, ts, data, _ = problem(optimizer=fnet.sgd(0.1))
    fnet.fit(step, ts, data, steps=2, batch_size=8, explain=True)
    first = capsys.readouterr().out
    assert re.search(
        r"explain: run_chunk compiled in \d+\.\d+ s[^:]*(: \d hits, \d misses\))?: the first run of this step", first
    )
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(ts)) / 1e6
    assert f"explain: state: {state:.3f} MB; a copy is kept at each chunk's end" in first
    assert f"MB of arguments, of which {state:.3f} MB, the state, are donated and changed in place; " in first
    assert "64-bit numbers are off" in first and "compilation cache:" in first
    fnet.fit(step, ts, data, steps=2, batch_size=8, explain=True)
    assert "not compiled again: it computes the same on the same shapes, dtypes and devices" in capsys.readouterr().out
    fewer = jax.tree.map(lambda a: a[:40], data)
    fnet.fit(step, ts, fewer, steps=2, batch_size=8, explain=True)
    assert "data/inputs was float32(53, 6) and is float32(40, 6)" in capsys.readouterr().out
    fnet.fit(step, ts, fewer, steps=1, batch_size=10, explain=True)
    assert "batch_size was 8 and is 10" in capsys.readouterr().out
    weak = {**ts.params, "dense_1": {**ts.params["dense_1"], "b": jnp.full(3, 0.5)}}
    fnet.fit(step, ts._replace(params=weak), fewer, steps=1, batch_size=10, explain=True)
    assert "state/params/dense_1/b was float32(3,) and is float32(3,) weak" in capsys.readouterr().out


def test_programs_of_data_that_are_read_ahead_are_compiled_before_the_run_and_explained(on_disk, capsys):
    step, ts, data, evaluate = problem(optimizer=fnet.sgd(0.1))
    told = []
    options = {"batch_size": 8, "evaluate": evaluate, "validation": data, "explain": True}
    _, history = fnet.fit(step, ts, on_disk, epochs=2, **options, observers=[told.append])
    out = capsys.readouterr().out
    for name in ("run_batches", "evaluated"):
        assert re.search(
            rf"explain: {name} compiled in \d+\.\d+ s[^:]*(: \d hits, \d misses\))?: the first run of this step", out
        )
    changes = re.findall(r"batches/inputs was (\S+ \d+, \d+\)) and is (\S+ \d+, \d+\))", out)
    alone, several, last = "float32(2, 8, 6)", "float32(7, 8, 6)", "float32(2, 5, 6)"
    assert changes == [(alone, several), (several, last)]
    compilation = next(event for event in told if event.kind == "compile")
    assert 0 < compilation.seconds < history.compile_seconds  # the smaller last batch is compiled when it comes
    _, again = fnet.fit(step, ts, on_disk, epochs=2, **options)
    assert "compiled in" not in capsys.readouterr().out and again.compile_seconds == 0


def timed_chunks(cost, monkeypatch):
    """The lengths of the chunks that are called, each of which takes ``cost(call, count)`` by the clock; the clock."""
    clock, calls, in_memory = [0.0], [], driver.in_memory

    def timed(*arguments):
        program = in_memory(*arguments)

        def call(ts, count, *rest):
            clock[0] += cost(len(calls), int(count))
            calls.append(int(count))
            return program(ts, count, *rest)

        return call

    monkeypatch.setattr(driver, "in_memory", timed)
    monkeypatch.setattr(driver, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    return calls, clock


@pytest.mark.parametrize(
    ("cost", "lengths"),
    [
        (lambda call, count: 1.0 if call < 2 else 0.001 * count, [1, 2, 1, 2, 4, 8, 16, 32, 64, 128, 256, 256]),
        (lambda call, count: count * (0.0625 if call < 2 else 1.0), [1, 2, 8, 4, 2, 1, 1, 1]),
        (lambda call, count: count / 128, [1, 6, 64, 64, 64]),
    ],
)
def test_chunks_take_half_a_second_also_after_a_misleading_start(cost, lengths, monkeypatch):
    step, ts, data, _ = problem()
    (calls, _), told = timed_chunks(cost, monkeypatch), []
    fnet.fit(step, ts, data, steps=sum(lengths), batch_size=8, keep=False, observers=[told.append])
    assert calls == lengths
    assert [event.step for event in told if event.kind == "chunk"] == np.cumsum(lengths).tolist()


def test_slow_observers_do_not_shorten_the_chunks(monkeypatch):
    step, ts, data, _ = problem()
    calls, clock = timed_chunks(lambda call, count: count / 128, monkeypatch)

    def slow(event):
        clock[0] += 5.0

    fnet.fit(step, ts, data, steps=300, batch_size=8, observers=[slow])
    assert calls == [1, 6, 64, 64, 64, 64, 37]


# --- what is not finite ----------------------------------------------------------------------------------------------


def exploding(engine, rows):
    """A run whose ``exp`` overflows at the examples ``rows`` alone, and its data."""
    exp = stateless(
        "exp", lambda key, x: (), lambda params, x: (jnp.exp(x), jnp.exp(x)), lambda params, y, dy: ((), dy * y)
    )
    model, optimizer = serial(dense(4), exp, dense(2)), fnet.sgd(1e-3)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, 3)).astype(np.float32)
    inputs[rows] *= 1e6
    data = fnet.Batch(inputs, rng.integers(0, 2, 40).astype(np.int32))
    params, state = fnet.init(model, jax.random.key(0), data.inputs[:1])
    step = fnet.make_step(engine(model, fnet.softmax_cross_entropy), optimizer)
    return step, fnet.init_train_state(params, optimizer, jax.random.key(1), state), data


@pytest.mark.parametrize("engine", [fnet.autodiff, fnet.backprop])
def test_a_run_that_stops_being_finite_names_step_layer_stage_and_examples(engine, tmp_path):
    step, ts, data = exploding(engine, [17])
    order = np.concatenate([epoch_order(ts.key, epoch, 40) for epoch in range(2)])
    bad = int(np.flatnonzero(order == 17)[0]) // 8  # the step that sees example 17 first
    run = fnet.Run(tmp_path / "run")
    with pytest.raises(fnet.NonFiniteError) as caught:
        fnet.fit(step, ts, data, epochs=2, batch_size=8, chunk_steps=3, run=run)
    found = caught.value.found
    assert (found.step, found.stage, found.layer) == (bad, "forward", "exp_0")
    assert found.operation == "exp gives inf" and "test_training.py" in found.source
    assert found.examples == order[8 * bad : 8 * bad + 8].tolist() and not np.isfinite(found.loss)
    assert found.leaf.startswith("params/dense_")
    good, _ = fnet.fit(step, ts, data, steps=bad - bad % 3, batch_size=8) if bad >= 3 else (ts, None)
    assert_same_bits(caught.value.state, good)
    assert json.loads((tmp_path / "run" / "nonfinite.json").read_text())["examples"] == found.examples
    assert list(saved_steps(tmp_path / "run" / "checkpoints"))[-1] == bad - bad % 3


@pytest.mark.parametrize("engine", [fnet.autodiff, fnet.backprop])
def test_a_gradient_that_overflows_is_found_in_the_backward(engine):
    huge = stateless(
        "huge",
        lambda key, x: (),
        lambda params, x: (jnp.sqrt(x), x),
        lambda params, x, dy: ((), dy * 0.5 / jnp.sqrt(x)),
    )
    model, optimizer = serial(huge, dense(2)), fnet.sgd(0.1)
    data = fnet.Batch(np.zeros((8, 3), np.float32), np.zeros(8, np.int32))
    params, state = fnet.init(serial(dense(3), model), jax.random.key(0), data.inputs[:1])
    step = fnet.make_step(engine(serial(dense(3), model), fnet.softmax_cross_entropy), optimizer)
    ts = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
    with pytest.raises(fnet.NonFiniteError) as caught:
        fnet.fit(step, ts, data, epochs=1, batch_size=8)
    found = caught.value.found
    assert found.step == 0 and found.stage == "backward" and "huge_0" in found.layer, found
    assert found.leaf == "params/dense_0/b" and np.isfinite(found.loss)


def test_mapped_data_are_read_again_to_find_what_is_not_finite(tmp_path):
    step, ts, data = exploding(fnet.backprop, [17])
    for name, array in (("x", data.inputs), ("y", data.targets)):
        np.save(tmp_path / f"{name}.npy", array)
    found = []
    for held in (data, open_arrays(tmp_path / "x.npy", tmp_path / "y.npy")):
        with pytest.raises(fnet.NonFiniteError) as caught:
            fnet.fit(step, ts, held, epochs=2, batch_size=8, chunk_steps=3)
        found.append(caught.value.found)
    assert str(found[0]) == str(found[1]) and 17 in found[0].examples


def test_without_copies_only_the_chunk_is_known(tmp_path):
    step, ts, data = exploding(fnet.backprop, [17])
    message = r"not finite between steps 0 and 10; fit\(keep=True\) keeps what"
    with pytest.raises(fnet.NonFiniteError, match=message) as caught:
        fnet.fit(step, ts, data, epochs=2, batch_size=8, chunk_steps=100, keep=False, run=fnet.Run(tmp_path / "run"))
    assert not hasattr(caught.value, "__notes__") and not saved_steps(tmp_path / "run" / "checkpoints")


def test_unchecked_a_run_goes_on():
    step, ts, data = exploding(fnet.backprop, [17])
    end, history = fnet.fit(step, ts, data, epochs=2, batch_size=8, check_finite=False)
    assert int(end.step) == 10 and np.isnan(history.steps["loss"][-1])


def test_an_observer_that_raises_is_named_and_the_run_is_saved(tmp_path):
    step, ts, data, _ = problem()

    def plotter(event):
        if event.step == 8:
            raise OSError("no display")

    ends = []
    run = fnet.Run(tmp_path / "run")
    with pytest.raises(OSError, match="no display") as caught:
        observers = [plotter, lambda event: ends.append(event.kind)]
        fnet.fit(step, ts, data, epochs=3, batch_size=8, chunk_steps=4, observers=observers, run=run)
    assert re.search(r"raised by the observer .*plotter at step 8, at the event 'chunk'", caught.value.__notes__[0])
    assert list(saved_steps(tmp_path / "run" / "checkpoints")) == [8] and ends[-1] == "end"
    resumed, _ = fnet.fit(step, ts, data, epochs=3, batch_size=8, run=run._replace(resume=True))
    assert_same_bits(resumed, fnet.fit(step, ts, data, epochs=3, batch_size=8)[0])


# --- data that are read ahead ----------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(tmp_path):
    _, _, data, _ = problem()
    for name in ("inputs", "targets"):
        np.save(tmp_path / f"{name}.npy", getattr(data, name))
    return open_arrays(tmp_path / "inputs.npy", tmp_path / "targets.npy")


ONE_EMITTER = """
import jax, jax.numpy as jnp, numpy as np, fnet
data = fnet.Batch(jnp.sin(jnp.arange(53 * 6.0)).reshape(53, 6), jnp.cos(jnp.arange(53.0)))
loss = lambda p, b, key: (((jnp.tanh(b.inputs[:, :, None] * p["w"]).sum(1)).mean(-1) - b.targets) ** 2).mean()
optimizer = fnet.optimizers.adafactor(0.01)
step = fnet.make_step(fnet.from_loss(loss), optimizer)
ts = start = fnet.init_train_state({"w": jnp.cos(jnp.arange(54.0)).reshape(6, 9)}, optimizer, jax.random.key(0))
options = {"epochs": 3, "batch_size": 8, "shuffle": False}
end, _ = fnet.fit(step, start, data, **options)
train, *_ = jax.jit(lambda ts, data: fnet.train(step, ts, data, **options))(start, data)
one = jax.jit(step)
for i in range(21):
    ts, _ = one(ts, jax.tree.map(lambda a: a[i % 7 * 8 : i % 7 * 8 + 8], data))
print([bool((other.params["w"] == end.params["w"]).all()) for other in (train, ts)])
"""


def test_with_the_flag_that_conventions_name_any_loop_has_fits_bits():
    flag = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=0"
    assert flag in (pathlib.Path(__file__).parents[1] / "docs" / "conventions.md").read_text()
    environment = {**os.environ, "XLA_FLAGS": flag}
    run = subprocess.run([sys.executable, "-c", ONE_EMITTER], env=environment, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("[True, True]\n", 0), run.stderr


@pytest.mark.parametrize("examples", [48, 53])
@pytest.mark.parametrize("width", [6, 9])
def test_a_step_without_a_product_of_matrices_gives_the_same_bits_in_chunks_of_any_length(tmp_path, width, examples):
    """From jax 0.12 on XLA compiles its loop by another emitter, which takes sums in another order."""
    rng = np.random.default_rng(0)
    data = fnet.Batch(rng.normal(size=(examples, 6)).astype(np.float32), rng.normal(size=examples).astype(np.float32))
    for name in ("inputs", "targets"):
        np.save(tmp_path / f"{name}.npy", getattr(data, name))

    def loss(params, batch, key):
        outputs = jnp.tanh(batch.inputs[:, :, None] * params["w"][None]).sum(1).mean(-1)
        return jnp.square(outputs - batch.targets).mean()

    params = {"w": jnp.asarray(rng.normal(size=(6, width)), jnp.float32)}
    for optimizer in (fnet.adam(0.01), fnet.optimizers.adafactor(0.01)):
        step = fnet.make_step(fnet.from_loss(loss), optimizer)
        start = fnet.init_train_state(params, optimizer, jax.random.key(0))
        options = {"epochs": 2, "batch_size": 8}
        expected, _ = fnet.fit(step, start, data, **options)
        for chunk_steps in (1, 2, 5, 7):
            mapped = open_arrays(tmp_path / "inputs.npy", tmp_path / "targets.npy")
            for arrays in (data, mapped):
                end, _ = fnet.fit(step, start, arrays, **options, chunk_steps=chunk_steps)
                assert_same_bits(end, expected)


@pytest.mark.parametrize("shuffle", [True, False])
def test_mapped_arrays_give_the_bits_of_arrays_in_memory(on_disk, shuffle):
    step, ts, data, evaluate = problem()
    options = {"epochs": 3, "batch_size": 8, "shuffle": shuffle, "evaluate": evaluate, "validation": data}
    for extra in ({}, {"evaluate_every": (3, "steps"), "chunk_steps": 5}):
        expected, history = fnet.fit(step, ts, data, **options, **extra)
        end, other = fnet.fit(step, ts, on_disk, **options, **extra)
        assert_same_bits(end, expected)
        for name in history.steps:
            np.testing.assert_array_equal(other.steps[name], history.steps[name])
        for name in history.evaluations:
            np.testing.assert_array_equal(other.evaluations[name], history.evaluations[name])


def test_a_wrong_label_far_down_a_mapped_file_is_named_before_it_is_trained_on(tmp_path):
    step, ts, data, _ = problem()
    labels = np.asarray(data.targets).copy()
    labels[41] = CLASSES
    np.save(tmp_path / "x.npy", data.inputs)
    np.save(tmp_path / "y.npy", labels)
    with pytest.raises(fnet.DataError, match=rf"label {CLASSES} in example 41 is outside 0..2"):
        fnet.fit(step, ts, open_arrays(tmp_path / "x.npy", tmp_path / "y.npy"), epochs=1, batch_size=8)


def test_a_stream_of_grain_is_shuffled_and_read_by_its_own_rules():
    grain = pytest.importorskip("grain")
    step, ts, data, _ = problem()
    rows = [tuple(np.asarray(part[i]) for part in data[:2]) for i in range(EXAMPLES)]
    source = grain.MapDataset.source(rows).seed(3).shuffle().repeat(None).batch(8)
    end, history = fnet.fit(step, ts, Stream(source, 6), epochs=2, chunk_steps=5)
    by_hand, jitted, reader = ts, jax.jit(step), iter(source)
    losses = []
    for _ in range(12):
        by_hand, metrics = jitted(by_hand, fnet.Batch(*next(reader)))
        losses.append(float(metrics["loss"].value))
    assert_same_bits(end, by_hand)
    np.testing.assert_allclose(history.steps["loss"], losses, rtol=1e-6)
    assert history.epochs["loss"].shape == (2,)


def test_files_that_are_no_arrays_are_refused(tmp_path):
    (tmp_path / "text.npy").write_text("not an array")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    for name in ("text.npy", "objects.npy", "missing.npy"):
        with pytest.raises(fnet.DataError, match=rf"{name} cannot be mapped .*; expected a .npy file that numpy.save"):
            open_arrays(tmp_path / name, tmp_path / name)


# --- what a second pair of eyes broke --------------------------------------------------------------------------------


def linear(metrics=lambda loss: {"loss": loss}):
    """Least squares by SGD on a dict of inputs, and its start."""

    def step(ts, batch):
        def loss(w):
            return ((batch.inputs["a"] @ w - batch.targets) ** 2).mean()

        value, grad = jax.value_and_grad(loss)(ts.params)
        return ts._replace(step=ts.step + 1, params=ts.params - 0.1 * grad), metrics(value)

    return step, TrainState(jnp.asarray(0, jnp.int32), jnp.zeros(3), (), (), jax.random.key(0))


def test_batches_of_a_stream_keep_their_sizes_whatever_their_containers():
    rng = np.random.default_rng(0)
    sizes = (4, 4, 2, 2, 4, 2)
    batches = [
        ({"a": rng.normal(size=(n, 3)).astype(np.float32)}, rng.normal(size=n).astype(np.float32)) for n in sizes
    ]
    step, ts = linear()
    end, history = fnet.fit(step, ts, Stream(batches, 3), epochs=2, chunk_steps=100)
    w = np.zeros(3)
    for (x, y), loss in zip(((b[0]["a"], b[1]) for b in batches), history.steps["loss"], strict=True):
        np.testing.assert_allclose(loss, ((x @ w - y) ** 2).mean(), rtol=1e-5)
        w = w - 0.1 * 2 * x.T @ (x @ w - y) / len(y)
    np.testing.assert_allclose(end.params, w, rtol=1e-5)


def test_a_program_is_compiled_anew_under_other_settings_of_jax(capsys):
    step, ts, data, _ = problem()
    fnet.fit(step, ts, data, steps=3, batch_size=8)
    with jax.threefry_partitionable(False):
        other, _ = fnet.fit(step, ts, data, steps=3, batch_size=8, explain=True)
        expected, _ = loop(step, ts, jax.tree.map(lambda a: a, data), 1, 8)
        assert "jax_threefry_partitionable was True and is False" in capsys.readouterr().out
        order = np.asarray(epoch_order(ts.key, 0, EXAMPLES))
    by_hand = ts
    for begin in range(0, 24, 8):
        by_hand, _ = jax.jit(step)(by_hand, jax.tree.map(lambda a, rows=order[begin : begin + 8]: a[rows], data))
    chex.assert_trees_all_close(other.params, by_hand.params, rtol=1e-5, atol=1e-7)
    assert int(expected.step) == 7


@pytest.mark.parametrize("metrics", [lambda loss: {"loss": loss}, lambda loss: {"loss": {"a": loss[None]}}])
def test_a_loss_that_is_no_mean_is_diagnosed_too(metrics):
    step, ts = linear(metrics)
    data = fnet.Batch({"a": np.full((8, 3), 1e20, np.float32)}, np.zeros(8, np.float32))
    with pytest.raises(fnet.NonFiniteError) as caught:
        fnet.fit(step, ts._replace(params=jnp.ones(3)), data, epochs=1, batch_size=4)
    assert caught.value.found.step == 0 and len(caught.value.found.examples) == 4


def test_a_start_that_is_not_finite_is_called_so():
    step, ts = linear()
    data = fnet.Batch({"a": np.ones((8, 3), np.float32)}, np.zeros(8, np.float32))
    with pytest.raises(fnet.NonFiniteError, match="the state that the run begins with at step 0 is not finite: params"):
        fnet.fit(step, ts._replace(params=jnp.full(3, jnp.nan)), data, epochs=1, batch_size=4)


def test_what_an_observer_does_to_its_metrics_stays_with_it():
    step, ts, data, _ = problem()

    def meddler(event):
        if isinstance(event.metrics, dict):
            event.metrics["loss"] = 123.0
            event.metrics["mine"] = 1.0

    _, history = fnet.fit(step, ts, data, epochs=2, batch_size=8, observers=[meddler])
    assert "mine" not in history.epochs and (history.epochs["loss"] < 10).all()


def test_a_batch_of_mapped_data_may_weigh_nothing(tmp_path):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(8, FEATURES)).astype(np.float32), np.arange(8) % CLASSES, np.repeat([0.0, 1.0], 4)
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    step, ts, _, _ = problem()
    options = {"epochs": 1, "batch_size": 4, "shuffle": False}
    expected, _ = fnet.fit(step, ts, fnet.Batch(*arrays), **options)
    end, _ = fnet.fit(step, ts, open_arrays(*paths), **options)
    assert_same_bits(end, expected)


def test_a_bad_example_of_mapped_data_is_named_by_its_row(tmp_path):
    step, ts, data, _ = problem()
    inputs = np.array(data.inputs)
    inputs[41, 2] = np.nan
    np.save(tmp_path / "x.npy", inputs)
    np.save(tmp_path / "y.npy", data.targets)
    mapped = open_arrays(tmp_path / "x.npy", tmp_path / "y.npy")
    for shuffle in (True, False):
        with pytest.raises(fnet.DataError, match=r"^data.inputs\[41, 2\] = nan; .* \(1 value in all\)"):
            fnet.fit(step, ts, mapped, epochs=1, batch_size=8, chunk_steps=7, shuffle=shuffle)


def test_a_state_of_ones_own_needs_no_key_and_may_hold_numbers(tmp_path):
    def step(ts, batch):
        return ts._replace(step=ts.step + 1, params={"w": ts.params["w"] + batch.inputs.sum()}), {"w": ts.params["w"]}

    start = TrainState(0, {"w": 0.5}, (), (), None)
    data = fnet.Batch(np.ones((8, 3)), np.zeros(8))
    files = [tmp_path / f"{name}.npy" for name in ("inputs", "targets")]
    for file, array in zip(files, data[:2], strict=True):
        np.save(file, array)
    for held in (data, open_arrays(*files)):
        run = fnet.Run(tmp_path / f"run_{type(held.inputs).__name__}")
        end, _ = fnet.fit(step, start, held, epochs=2, batch_size=np.int64(4), shuffle=False, run=run)
        assert float(end.params["w"]) == 48.5 and end.key is None


def test_a_stream_may_give_lists_and_what_it_gives_later_is_checked_too():
    step, ts, data, _ = problem()
    x, y = np.asarray(data.inputs[:8]), np.asarray(data.targets[:8])
    of_tuples, _ = fnet.fit(step, ts, Stream([(x, y)] * 3, 3), epochs=1)
    assert_same_bits(fnet.fit(step, ts, Stream([[x, y]] * 3, 3), epochs=1)[0], of_tuples)
    with pytest.raises(fnet.DataError, match="a batch of the stream is a dict of 'x'; expected"):
        fnet.fit(step, ts, Stream([(x, y), {"x": x}], 2), epochs=1)
    with pytest.raises(fnet.LayerError, match="expected 6 features, got 5") as caught:
        fnet.fit(step, ts, Stream([(x, y), (x[:, :5], y)], 2), epochs=1)
    shapes = "Batch(inputs=float32[8, 5], targets=int32[8], weights=None)"
    assert f"in a batch of the stream, given to fit: {shapes}" in caught.value.__notes__


def test_each_observer_has_metrics_of_its_own():
    step, ts, data, _ = problem()
    seen = []
    spoil = lambda event: event.metrics.clear()  # noqa: E731
    fnet.fit(step, ts, data, epochs=1, batch_size=8, observers=[spoil, lambda event: seen.append(dict(event.metrics))])
    assert all("loss" in metrics for metrics in seen if metrics) and any(seen)


def test_batches_of_a_stream_may_differ_in_their_dtypes():
    step, ts, data, _ = problem()
    x, y = np.asarray(data.inputs[:8]), np.asarray(data.targets[:8])
    batches = [(x, y.astype(kind)) for kind in (np.int32, np.int32, np.int8, np.int32, np.int8, np.int8)]
    expected, _ = fnet.fit(step, ts, Stream([(x, y)] * 6, 6), epochs=1)
    assert_same_bits(fnet.fit(step, ts, Stream(batches, 6), epochs=1)[0], expected)


def test_an_observer_needs_no_hash():
    class Counting:
        __hash__ = None  # pyright: ignore[reportAssignmentType]
        calls = 0

        def __call__(self, event):
            self.calls += 1

    step, ts, data, _ = problem()
    counting = Counting()
    fnet.fit(step, ts, data, epochs=1, batch_size=8, observers=[counting])
    assert counting.calls > 3


def test_a_cold_run_compiles_its_program_and_a_copy_of_the_state():
    rng = np.random.default_rng(0)
    jax.clear_caches()
    key = jax.random.key(0)
    with compiled_programs() as of_data:
        data = fnet.check_data((rng.standard_normal((23, 5)), rng.integers(0, 3, 23)))
    model, optimizer = fnet.mlp(4, 3), fnet.adam(0.1)
    params, state = fnet.init(model, key, data.inputs[:1])
    with compiled_programs() as of_state:
        start = fnet.init_train_state(params, optimizer, key, state)
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    with compiled_programs() as of_run:
        fnet.fit(step, start, data, epochs=2, batch_size=6)
    assert of_data == []
    assert of_state == ["jit(begin)"]
    assert of_run == ["jit(copied)", "jit(run_chunk)"]
    stop = fnet.early_stopping("validation_loss", patience=2)
    evaluate = fnet.make_evaluate(model, fnet.softmax_cross_entropy)
    with compiled_programs() as of_stopping:
        fnet.fit(step, start, data, epochs=2, batch_size=6, evaluate=evaluate, validation=data, stop=stop)
    assert of_stopping == ["jit(init)", "jit(run_chunk)", "jit(copied)"]


@pytest.mark.parametrize(("batch_size", "sizes"), [(10, 1), (16, 2)])
def test_a_run_traces_a_step_of_each_size_once_beside_the_check_of_its_arguments(batch_size, sizes):
    step, ts, data, evaluate = problem(examples=40)
    calls = {"step": 0, "evaluate": 0}

    def counting(name, function):
        def counted(*arguments):
            calls[name] += 1
            return function(*arguments)

        return counted

    def run(engine, **options):
        calls.update(step=0, evaluate=0)
        engine(
            *(counting("step", step), ts, data), batch_size=batch_size, epochs=2, **options,
            evaluate=counting("evaluate", evaluate), validation=data,
        )  # fmt: skip
        return calls

    assert run(fnet.fit) == {"step": 2 * sizes, "evaluate": 3}  # the check looks at the results' shapes as well
    stop = fnet.early_stopping("validation_loss", patience=2)
    for options in {}, {"stop": stop}:
        assert run(fnet.train, **options) == {"step": sizes, "evaluate": 1}


@pytest.mark.parametrize("spoilt", [None, "float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_all_leaves_of_whatever_dtype_are_to_be_finite(spoilt, value, x64):
    kinds = "float64", "float32", "bfloat16", "float16"
    params = {kind: jnp.full((3, 4), jnp.finfo(kind).max, kind) for kind in kinds}
    if spoilt is not None:
        params[spoilt] = params[spoilt].at[1, 2].set(value)
    ts = TrainState(jnp.asarray(0), {**params, "counts": jnp.arange(3)}, jnp.ones(2), (), jax.random.key(0))
    assert bool(all_finite(ts)) == (spoilt is None)
    assert not all_finite(ts._replace(state=jnp.asarray([1, value])))
