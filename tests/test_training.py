"""The run as one pure function: steps, epochs, chunks, resumption, and what is refused before it starts."""

from __future__ import annotations

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.layers import dense, serial
from fnet.metrics import accuracy, gradient_norms
from fnet.training import epoch_order, steps_per_epoch
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
    assert all(event.seconds > 0 for event in events if event.kind in ("compile", "chunk"))
    ends = [event for event in events if event.kind == "epoch"]
    assert [(event.epoch, event.step) for event in ends] == [(1, 7), (2, 14), (3, 21), (4, 28)]
    np.testing.assert_array_equal(
        [event.metrics["validation_loss"] for event in ends], history.epochs["validation_loss"]
    )
    assert events[-1].step == events[-1].steps == 28


def test_a_run_is_one_program_for_every_chunk_length_and_a_second_run_compiles_nothing():
    step, ts, data, evaluate = problem()
    options = {"epochs": 5, "batch_size": 8, "evaluate": evaluate, "validation": data}
    with compiled_programs() as names:
        fnet.fit(step, ts, data, chunk_steps=2, **options)
    assert names.count("jit(run_chunk)") == 1
    with compiled_programs() as names:
        for chunk_steps in (1, 7, 100, None):
            fnet.fit(step, ts, data, chunk_steps=chunk_steps, **options)
    assert not names


def test_an_observer_that_answers_something_else_is_named():
    step, ts, data, _ = problem()

    def chatty(event):
        return 42

    with pytest.raises(ValueError, match=r"observer .*chatty.* returned 42; expected 'continue', 'stop' or None"):
        fnet.fit(step, ts, data, epochs=1, batch_size=8, observers=[chatty])


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


def bad(**changes):
    return changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (bad(epochs=0), ValueError, "epochs = 0; expected a whole number of at least 1"),
        (bad(epochs=2.5), ValueError, "epochs = 2.5; expected a whole number"),
        (bad(chunk_steps=0), ValueError, "chunk_steps = 0; expected a whole number of at least 1"),
        (bad(batch_size=54), fnet.DataError, "batch_size = 54; expected a whole number from 1 to 53"),
        (bad(batch_size=0), fnet.DataError, "batch_size = 0; expected a whole number from 1 to 53"),
        (bad(evaluate=lambda *a: {}), ValueError, "validation is not given; expected evaluate and validation together"),
        (bad(validation=(np.ones((2, FEATURES)), np.zeros(2, int))), ValueError, "evaluate is not given"),
        (bad(labels={17: CLASSES}), fnet.DataError, r"data, examples \[\d+, 17\].*label 3 at \(1,\) is outside 0..2"),
        (bad(labels={4: -1}), fnet.DataError, r"data, examples \[4, \d+\].*label -1 at \(0,\) is outside 0..2"),
        (bad(inputs=np.ones((EXAMPLES, 5))), fnet.LayerError, "dense_0: expected 6 features, got 5"),
        (bad(inputs=np.full((EXAMPLES, FEATURES), np.nan)), fnet.DataError, r"data.inputs\[0, 0\] = nan"),
        (
            bad(inputs=np.ones((EXAMPLES, FEATURES), np.uint8)),
            fnet.LayerError,
            "dense_0: expected float32 features .* got uint8",
        ),
        (bad(inputs=np.ones((9, FEATURES))), fnet.DataError, "data.targets has 53 examples .* and data.inputs has 9"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(changes, error, message):
    step, ts, data, _ = problem()
    labels = np.asarray(data.targets).copy()
    for row, label in changes.pop("labels", {}).items():
        labels[row] = label
    data = fnet.Batch(changes.pop("inputs", data.inputs), labels)
    events = []
    with pytest.raises(error, match=message):
        fnet.fit(step, ts, data, **{"epochs": 2, "batch_size": 8, "observers": [events.append], **changes})
    assert not events


def test_validation_data_are_checked_too():
    step, ts, data, evaluate = problem()
    wrong = data._replace(targets=data.targets.at[7].set(9))
    with pytest.raises(fnet.DataError, match=r"validation, examples \[\d+, \d+\].*label 9"):
        fnet.fit(step, ts, data, epochs=1, batch_size=8, evaluate=evaluate, validation=wrong)


def test_a_finished_state_is_refused_rather_than_run_for_no_steps():
    step, ts, data, _ = problem()
    end, _ = fnet.fit(step, ts, data, epochs=2, batch_size=8)
    with pytest.raises(ValueError, match="is to end at step 14, after epoch 2, but its state stands at step 14"):
        fnet.fit(step, end, data, epochs=2, batch_size=8)
    further, _ = fnet.fit(step, end, data, epochs=3, batch_size=8)
    assert int(further.step) == 21


def test_a_step_that_changes_a_shape_is_named():
    step, ts, data, _ = problem()

    def growing(ts, batch):
        new, metrics = step(ts, batch)
        return new._replace(params={**new.params, "dense_0": {**new.params["dense_0"], "b": jnp.zeros(9)}}), metrics

    with pytest.raises(ValueError, match=r"step turns params/dense_0/b from float32\(8,\) into float32\(9,\)"):
        fnet.fit(growing, ts, data, epochs=1, batch_size=8)


def test_train_refuses_a_batch_larger_than_the_data():
    step, ts, data, _ = problem()
    with pytest.raises(fnet.DataError, match="batch_size = 54; expected 1 to 53"):
        fnet.train(step, ts, data, epochs=1, batch_size=54)


def test_an_id_outside_the_vocabulary_is_refused_before_anything_is_computed(key):
    model = fnet.layers.serial(fnet.layers.embedding(10, 4), fnet.layers.dense(3))
    ids = np.arange(40).reshape(8, 5) % 10
    ids[6, 2] = 12
    params, state = fnet.init(model, key, jnp.asarray(ids[:1]))
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), fnet.sgd(0.1))
    start = fnet.init_train_state(params, fnet.sgd(0.1), key, state)
    data = (ids, np.zeros((8, 5), np.int32))
    with pytest.raises(fnet.LayerError, match="embedding_0: expected ids from 0 to 9, got 12") as error:
        fnet.fit(step, start, data, epochs=1, batch_size=4)
    note = "in data, examples [0, 6] (those with the least and the greatest label or id)"
    assert note in error.value.__notes__
