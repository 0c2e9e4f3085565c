"""Published results: gradients through training (`maml_sinusoid`) and pruning to tickets (`lottery_ticket`)."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnet
from experiments import lottery_ticket as lottery
from experiments import maml_sinusoid as maml
from fnet.core.numerics import stream

pytestmark = pytest.mark.long


def relative(a, b):
    """The greatest difference of two trees' leaves, relative to the greatest entry of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)


# --- maml_sinusoid ---------------------------------------------------------------------------------------------------


def written_out(params, x):
    """The network 1-5-4-1 of the test in plain jax."""
    first, second, third = (params[f"dense_{i}"] for i in range(3))
    return jax.nn.relu(jax.nn.relu(x @ first["w"] + first["b"]) @ second["w"] + second["b"]) @ third["w"] + third["b"]


def error(params, points):
    return ((written_out(params, points.inputs) - points.targets) ** 2).mean()


@pytest.mark.parametrize("engine", ["backprop", "autodiff"])
def test_the_meta_gradient_is_autodiff_written_out_and_the_first_order_is_that_at_the_end(engine, x64):
    config = maml.Config(hidden=(5, 4), shots=3, tasks=2, inner_rate=0.05, engine=engine)
    model = fnet.mlp(5, 4, 1)  # not the tiny weights that training begins with, of which second derivatives are 0
    params, state = fnet.init(model, jax.random.key(0), jnp.zeros((1, 1)))
    tasks = maml.draw_sinusoids(jax.random.key(1), 2)
    points = maml.draw_points(jax.random.key(2), tasks, 6)
    params = jax.tree.map(lambda a: a.astype(float), params)

    def after(params, i):
        seen, others = (
            fnet.Batch(points.inputs[i, part], points.targets[i, part]) for part in np.split(np.arange(6), 2)
        )
        moved = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(error)(params, seen))
        return moved, others

    with jax.numpy_rank_promotion("allow"):
        exact = jax.grad(lambda p: sum(error(*after(p, i)) for i in range(2)) / 2)(params)
        ends = [jax.grad(error)(*after(params, i)) for i in range(2)]
    at_the_end = jax.tree.map(lambda a, b: (a + b) / 2, *ends)
    second, first = (
        jax.jit(maml.meta_gradient(config, state, first_order))(params, state, points, jax.random.key(3))[0]
        for first_order in (False, True)
    )
    assert relative(second, exact) < 1e-12 and relative(first, at_the_end) < 1e-12
    assert relative(first, exact) > 1e-2  # they are not the same


def test_tasks_are_the_papers_and_the_oracle_is_told_which():
    tasks = maml.draw_sinusoids(jax.random.key(0), 500)
    points = maml.told(maml.draw_points(jax.random.key(1), tasks, 4), tasks)
    x, amplitude, phase = (np.asarray(points.inputs[..., i], float) for i in range(3))
    np.testing.assert_allclose(points.targets[..., 0], amplitude * np.sin(x - phase), atol=1e-5)
    for values, (low, high) in zip((x, amplitude, phase), (maml.PLACES, maml.AMPLITUDES, maml.PHASES), strict=True):
        assert low <= values.min() < low + 0.03 * (high - low) and high - 0.03 * (high - low) < values.max() <= high


def test_maml_learns_to_learn_and_what_is_measured_is_descent_on_the_points_seen(tmp_path):
    config = maml.Config(
        iterations=1500,
        hidden=(20, 20),
        tasks=8,
        learning_rate=0.005,
        test_shots=(10,),
        test_tasks=40,
        rates=(0.001, 0.01),
        seeds=(0, 1),
        run_dir=tmp_path,
        name="a",
    )
    results = maml.run(config, Console(file=io.StringIO(), width=200))
    found = results["found"]["MAML"]["10 shots"]
    assert found["errors"].shape == (2, 11) and (found["once"] == found["errors"][:, 1]).all()
    assert (found["errors"][:, 1] < 0.8 * found["errors"][:, 0]).all()
    assert results["found"]["pretrained"]["10 shots"]["rate"] in map(pytest.approx, (0.01, 0.001))
    assert (results["folder"] / "fits.png").stat().st_size > 20000

    # one held-out task in plain jax: three steps of p − rate · g
    model = maml.make_model(config)
    params = jax.tree.map(lambda a: jnp.asarray(a[0]), results["learnt"]["MAML"])
    _, state = model.init(jax.random.key(0), jnp.zeros((1, 1)))
    points = maml.draw_points(jax.random.key(5), maml.draw_sinusoids(jax.random.key(4), 1), 5)
    seen = fnet.Batch(points.inputs[0], points.targets[0])
    path = maml.descend(config, params, state, 0.02, seen)
    with jax.numpy_rank_promotion("allow"):
        for i in range(3):
            at = jax.tree.map(lambda a, i=i: a[i], path)
            at = jax.tree.map(lambda p, g: p - 0.02 * g, at, jax.grad(error)(at, seen))
            assert relative(jax.tree.map(lambda a, i=i: a[i + 1], path), at) < 1e-4


# --- lottery_ticket --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["backprop", "autodiff"])
def test_masked_weights_stay_zero_and_the_others_train_as_a_network_without_them(engine):
    config = lottery.Config(hidden=(6, 5), epochs=3, batch_size=8, learning_rate=0.01, engine=engine)
    rng = np.random.default_rng(0)
    data = fnet.Batch(jnp.asarray(rng.normal(size=(40, 7)), "float32"), jnp.asarray(rng.integers(0, 10, 40)))
    params, state = fnet.init(lottery.make_model(config), jax.random.key(0), data.inputs)
    masks = jax.tree.map(jnp.ones_like, params)
    gone = [1, 4]  # units of the first layer that lose all that comes in and goes out, but not their biases
    params["dense_0"]["b"] = params["dense_0"]["b"] + 0.3
    masks["dense_0"]["w"] = masks["dense_0"]["w"].at[:, jnp.array(gone)].set(0)
    masks["dense_1"]["w"] = masks["dense_1"]["w"].at[jnp.array(gone)].set(0)
    end, results = lottery.train(config, params, masks, state, jax.random.key(1), data, {"test": data})
    assert (np.asarray(end["dense_0"]["w"])[:, gone] == 0).all() and (np.asarray(end["dense_1"]["w"])[gone] == 0).all()
    assert lottery.stray(end, masks) == 0 and results["test"]["accuracy"].shape == (3,)

    left = np.delete(np.arange(6), gone)
    small = {
        **params,
        "dense_0": {"w": params["dense_0"]["w"][:, left], "b": params["dense_0"]["b"][left]},
        "dense_1": {**params["dense_1"], "w": params["dense_1"]["w"][left]},
    }
    of_small = lottery.Config(hidden=(4, 5), epochs=3, batch_size=8, learning_rate=0.01, engine=engine)
    ones = jax.tree.map(jnp.ones_like, small)
    alone, _ = lottery.train(of_small, small, ones, state, jax.random.key(1), data, {"test": data})
    np.testing.assert_allclose(end["dense_1"]["w"][left], alone["dense_1"]["w"], rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(alone["dense_1"]["w"] - small["dense_1"]["w"])).max() > 0.02


def test_pruning_takes_the_smallest_weights_of_each_layer_that_are_left():
    config = lottery.Config(hidden=(30, 20), prune=0.2)
    params, _ = fnet.init(lottery.make_model(config), jax.random.key(0), jnp.zeros((1, 40)))
    masks = jax.tree.map(jnp.ones_like, params)
    for rounds in range(1, 4):
        trained = jax.tree.map(
            lambda a, rounds=rounds: a + 0.1 * jax.random.normal(jax.random.key(rounds), a.shape), params
        )
        new = lottery.smallest_off(trained, masks, lottery.shares_after(config, rounds))
        for name, kept in {"dense_0": 0.8**rounds, "dense_1": 0.8**rounds, "dense_2": 0.9**rounds}.items():
            old, mask, w = (np.asarray(tree[name]["w"]) for tree in (masks, new, trained))
            assert mask.sum() == round(kept * w.size) and (mask <= old).all()
            assert np.abs(w[mask > 0]).min() >= np.abs(w[(old > 0) & (mask == 0)]).max()
            assert (np.asarray(new[name]["b"]) == 1).all()
        masks = new
    sizes = {"dense_0": 1200, "dense_1": 600, "dense_2": 200}
    left = sum(round((0.9 if name == "dense_2" else 0.8) ** 3 * n) for name, n in sizes.items()) / 2000
    assert float(lottery.weights_left(masks)) == pytest.approx(left)


def test_a_round_goes_back_to_the_first_weights_or_draws_others_and_keeps_the_masks_of_the_round_before():
    config = lottery.Config(
        rounds=1,
        prune=0.5,
        hidden=(6, 5),
        epochs=2,
        test_size=10,
        validation_size=10,
        batch_size=20,
        learning_rate=0.05,
    )
    rng = np.random.default_rng(0)
    digits = fnet.Batch(jnp.asarray(rng.normal(size=(60, 7)), "float32"), jnp.asarray(rng.integers(0, 10, 60)))
    key = jax.random.key(3)
    found = jax.jit(lambda key: lottery.prune_and_train(config, {}, key, digits))(key)

    order = np.asarray(jax.random.permutation(stream(key, "split"), 60))
    test, validation, training = (jax.tree.map(lambda a, r=r: a[r], digits) for r in np.split(order, [10, 20]))
    model = lottery.make_model(config)
    first, state = fnet.init(model, stream(key, "model"), digits.inputs[:1])
    masks, sets = jax.tree.map(jnp.ones_like, first), {"test": test, "validation": validation}
    train = jax.jit(lambda params, masks, at: lottery.train(config, params, masks, state, at, training, sets))
    for number in range(2):
        others, _ = model.init(jax.random.fold_in(stream(key, "weights"), number), digits.inputs[:1])
        for kind, params in (("re-drawn", others), ("ticket", first)):
            end, alone = train(params, masks, jax.random.fold_in(stream(key, kind), number))
            np.testing.assert_allclose(found[kind]["test"]["loss"][number], alone["test"]["loss"], rtol=1e-4)
        masks = lottery.smallest_off(end, masks, [0.5, 0.5, 0.75])  # of the ticket, which came last


def test_a_run_compares_tickets_with_the_same_masks_on_new_weights(tmp_path):
    config = lottery.Config(
        rounds=2, prune=0.5, hidden=(12, 8), epochs=2, test_size=2500, validation_size=1500, run_dir=tmp_path, name="a"
    )
    results = lottery.run(config, Console(file=io.StringIO(), width=200))
    sizes = {784 * 12: 0.5, 12 * 8: 0.5, 8 * 10: 0.75}
    expected = [sum(n * share**i for n, share in sizes.items()) / sum(sizes) for i in range(3)]
    np.testing.assert_allclose(results["left"], expected, atol=1e-4)
    for kind in lottery.KINDS:
        found = results["found"][kind]
        assert found["test"]["accuracy"].shape == (3, 3, 2) and (found["stray"] == 0).all()
        best = found["validation"]["loss"].argmin(-1)
        for seed, number in np.ndindex(3, 3):
            stopped = found["test"]["accuracy"][seed, number, best[seed, number]]
            assert results["measured"][kind]["stopped"][seed, number] == stopped > 0.15
    dense, after = (results["measured"]["ticket"]["stopped"][:, i] for i in (0, 2))
    np.testing.assert_array_equal(results["differences"]["ticket − dense"][:, 2], after - dense)
    assert (results["folder"] / "tickets.png").stat().st_size > 10000
