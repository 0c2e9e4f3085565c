"""All that `fit` takes, with a placement: data of every form, optimizers, rules to stop, folders on other meshes."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import fnet
from fnet import layers, optimizers
from fnet.core.trees import named_leaves
from fnet.optimizers import transforms
from tests import resumable
from tests.devices.parts import CASES, Ran, apart, assert_same_run, on, run, start
from tests.test_training import assert_same_bits


@pytest.fixture(autouse=True)
def wide(x64):
    """All of it in float64."""


def arrays(name="mlp", n=48):
    case = CASES[name]
    return case.inputs[:n], case.targets[:n]


def both(mesh="fsdp8", name="mlp", **options) -> tuple[Ran, Ran]:
    return run(name, **options), run(name, mesh, **options)


OPTIMIZERS = {
    **resumable.optimizers(),
    "clipped": fnet.chain(transforms.clip_by_global_norm(0.1), fnet.adam(0.01)),
    "guarded": optimizers.skip_nonfinite(optimizers.reduce_on_plateau(optimizers.sgd(0.05), window=2, patience=1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_the_steps_that_it_makes_on_one_device(name):
    one, several = both(optimizer=OPTIMIZERS[name], evaluate=None, validation=None)
    assert_same_run(one, several)
    for path, leaf in named_leaves(several.ts.opt_state):
        if leaf.size >= 64 and leaf.ndim > 1:
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size, path


def test_examples_that_the_devices_do_not_divide_are_all_seen():
    x, y = arrays(n=43)
    assert_same_run(*both(data=fnet.Batch(jnp.asarray(x), jnp.asarray(y)), batch_size=16))
    with pytest.raises(
        ValueError, match=r"batch_size = 12 is split over 8 devices \(fsdp 8\); expected a multiple of 8"
    ):
        run("mlp", "fsdp8", batch_size=12)


def test_weights_count_as_on_one_device():
    x, y = arrays()
    weights = np.random.default_rng(1).integers(0, 3, len(x)).astype(float)
    assert_same_run(*both("dp8", data=fnet.Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray(weights))))


def test_mapped_data_are_read_and_split(tmp_path):
    for name, array in zip(("x", "y"), arrays(n=43), strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    data = fnet.data.open_arrays(tmp_path / "x.npy", tmp_path / "y.npy")
    assert_same_run(*both(data=data, batch_size=8))


def test_a_streams_batches_are_split():
    x, y = arrays()
    batches = [(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)]
    assert_same_run(*both(data=fnet.data.Stream(batches, 3), batch_size=None))


def test_datasets_and_validation_sets_that_are_read_batch_by_batch():
    x, y = arrays()
    examples = fnet.data.Examples([(x[i], y[i]) for i in range(43)])
    held = {
        "some": fnet.data.Examples([(x[i], y[i]) for i in range(20)]),
        "all": fnet.Batch(jnp.asarray(x), jnp.asarray(y)),
    }
    assert_same_run(*both("dp2 fsdp4", data=examples, validation=held, batch_size=8))


def test_one_axis_of_matrices_alone():
    rules = {"*dense_0/w": P(None, "tensor"), "*dense_1/w": P("tensor", None)}
    one = run("mlp")
    model, ts = start(CASES["mlp"], fnet.adam(0.01))
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), fnet.adam(0.01))
    x, y = map(jnp.asarray, arrays())
    placement = fnet.placement(fnet.mesh(tensor=8), rules)
    ts, _ = fnet.fit(step, ts, fnet.Batch(x, y), epochs=2, batch_size=16, placement=placement)
    assert apart(one.ts, ts) < 1e-12
    assert ts.params["dense_0"]["w"].sharding.spec == P(None, "tensor")


def test_parts_of_a_batch_are_accumulated():
    assert_same_run(*both(engine=lambda *given: fnet.accumulate(fnet.backprop(*given), 2)))


def test_sixteen_bits_and_recomputed_layers():
    model = lambda: layers.mixed_precision(fnet.serial(layers.remat(fnet.dense(64)), layers.tanh(), fnet.dense(10)))  # noqa: E731
    x, y = arrays()
    losses = []
    for placement in (None, on("fsdp8")):
        params, state = fnet.init(model(), jax.random.key(0), jnp.asarray(x[:2], jnp.float32), placement)
        ts = fnet.init_train_state(params, fnet.adam(0.01), jax.random.key(1), state, placement)
        step = fnet.make_step(fnet.backprop(model(), fnet.softmax_cross_entropy), fnet.adam(0.01))
        data = fnet.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y))
        losses.append(fnet.fit(step, ts, data, epochs=2, batch_size=16, placement=placement)[1].epochs["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=2**-8)


def test_a_rule_stops_both_at_one_step():
    stop = fnet.early_stopping("validation_loss", patience=1, least_change=1.0)
    one, several = both(stop=stop, epochs=9)
    assert int(one.ts.step) < 27
    assert_same_run(one, several)


def test_what_is_not_finite_is_found_where_it_was():
    x, _ = arrays()
    x = x.copy()
    x[11, 3] = 1e200  # whose square is none
    said = []
    for mesh in (None, "fsdp8"):
        with pytest.raises(fnet.NonFiniteError) as error:
            run("autoencoder", mesh, data=fnet.Batch(jnp.asarray(x), jnp.asarray(x)))
        said.append(str(error.value))
    assert "forward of loss: square gives inf" in said[0] and said[1] == said[0]


# --- folders ---------------------------------------------------------------------------------------------------------


def in_folder(folder, mesh, epochs, **options) -> Ran:
    return run("dropout", mesh, epochs=epochs, run=fnet.Run(folder, resume="auto"), **options)


def test_a_run_goes_on_on_another_mesh_and_ends_as_on_one_device(tmp_path):
    for epochs, mesh in enumerate(("fsdp8", "dp2 fsdp4", None, "dp8", "fsdp8"), 2):
        several = in_folder(tmp_path / "run", mesh, epochs)
        devices = len(jax.tree.leaves(several.ts.params)[0].sharding.device_set)
        assert int(several.ts.step) == 3 * epochs and devices == (1 if mesh is None else 8)
    assert apart(run("dropout", epochs=6).ts, several.ts) < 1e-10


def test_a_split_run_that_was_cut_is_the_straight_one_to_the_bit(tmp_path):
    in_folder(tmp_path / "run", "fsdp8", 2)
    assert_same_bits(in_folder(tmp_path / "run", "fsdp8", 4).ts, run("dropout", "fsdp8", epochs=4).ts)


def test_a_flipped_byte_of_a_split_run_is_found(tmp_path):
    in_folder(tmp_path / "run", "fsdp8", 2)
    (last,) = (tmp_path / "run" / "checkpoints").glob("step_000000006")
    largest = max((p for p in last.rglob("*") if p.is_file() and "state" in str(p)), key=lambda p: p.stat().st_size)
    whole = bytearray(largest.read_bytes())
    whole[len(whole) // 2] ^= 1
    largest.write_bytes(whole)
    with pytest.raises(fnet.CheckpointError, match="is damaged"):
        in_folder(tmp_path / "run", "dp8", 4)


def test_a_folder_says_on_how_many_devices_it_ran(tmp_path):
    in_folder(tmp_path / "run", "fsdp8", 1)
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["devices"]) == 8
