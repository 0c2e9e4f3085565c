"""A plan on paper: bytes, bytes sent and time by the formulas; what true compilers say is in test_compile.py."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import fnet
from fnet import layers
from fnet.core.placement import Placement
from fnet.layers import models
from fnet.report.planned import main as planned
from fnet.training.collectives import sent_by_step
from fnet.training.plans import Chip, plan
from tests.pages import blocks_of

CHIP = Chip("a chip", 100e12, 1e9, 100e9, 10e9, 4)  # two in a group of 4 are near
X = jax.ShapeDtypeStruct((1, 64), "float32")
MLP = fnet.mlp(128, 128, 10)
SIZE = 64 * 128 + 128 * 128 + 128 * 10  # of its matrices
BIASES = 128 + 128 + 10


def moved(made):
    return {(each.kind, each.what, each.axes): each for each in made.moved}


def test_what_data_parallelism_holds_and_sends():
    made = plan(MLP, X, fnet.adam(1e-3), {"data": 8}, 6400, chip=CHIP)
    parameters = SIZE + BIASES
    assert made.parameters == parameters and made.devices == 8
    # parameters and two moments in float32; and adam's numbers, steps and the key, some bytes each
    assert 0 <= made.bytes["parameters, moments, state"] - 3 * 4 * parameters < 100
    assert made.bytes["gradients"] == 4 * parameters
    assert made.bytes["outputs and their gradients"] == 2 * 4 * 800 * 10
    (one,) = made.moved
    assert (one.kind, one.axes) == ("all-reduce", ("data",))
    np.testing.assert_allclose(one.bytes, 2 * 7 / 8 * 4 * parameters)
    np.testing.assert_allclose(one.seconds, one.bytes / 10e9)  # 8 are no group of 4
    # forward, and twice that backward but for the first layer's inputs; and what is made entry by entry
    products = 2 * 800 * (3 * SIZE - 64 * 128)
    assert products < made.operations < 1.2 * products
    np.testing.assert_allclose(made.compute_seconds, made.operations / (0.45 * 50e12))  # float32: at half the rate


def test_what_fsdp_splits_gathers_and_scatters():
    made = plan(MLP, X, fnet.sgd(0.1), fnet.placement(fnet.mesh(data=1, devices=jax.devices()[:1]), least=1), 8)
    assert made.moved == () and made.move_seconds == 0
    made = plan(MLP, X, fnet.sgd(0.1), {"data": 2, "fsdp": 4}, 64, chip=CHIP)
    split, whole = 64 * 128 + 128 * 128, 128 * 10 + BIASES  # below 4,096 numbers a leaf stays whole
    assert 0 <= made.bytes["parameters, moments, state"] - 4 * (split / 4 + whole) < 100
    found = moved(made)
    gathered = found["all-gather", "parameters", ("fsdp",)]
    np.testing.assert_allclose(gathered.bytes, 2 * 4 * split * 3 / 4)  # for the forward and for the backward
    np.testing.assert_allclose(gathered.seconds, gathered.bytes / 100e9)  # the last axis has the nearest neighbours
    np.testing.assert_allclose(found["reduce-scatter", "gradients", ("fsdp",)].bytes, 4 * split * 3 / 4)
    np.testing.assert_allclose(found["all-reduce", "gradients", ("data",)].bytes, 2 * 4 * split / 4 / 2)
    np.testing.assert_allclose(found["all-reduce", "gradients", ("data", "fsdp")].bytes, 2 * 4 * whole * 7 / 8)
    assert made.bytes["gathered of the largest layer"] == 4 * 128 * 128


def gpt(remat: bool, depth=4):
    block = models.transformer_block(64, 4, causal=True)
    stack = layers.repeat(layers.remat(block) if remat else block, depth)
    body = layers.serial(("positions", layers.learned_positions(16)), ("blocks", stack))
    return layers.mixed_precision(layers.tied_embedding(256, 64, body))


def test_a_transformer_over_tensor_sums_each_branch_and_remat_gathers_more():
    ids = jax.ShapeDtypeStruct((1, 16), "int32")
    kept, again = (
        plan(gpt(remat), ids, fnet.adamw(1e-3), {"fsdp": 2, "tensor": 4}, 8, chip=CHIP) for remat in (False, True)
    )
    each = 2 * 3 / 4 * 4 * 4 * 16 * 64  # an all-reduce of float32: 4 sequences of 16 ids of 64 features, over 4
    columns = [moved(made)["all-reduce", "gradients by the inputs of columns", ("tensor",)] for made in (kept, again)]
    rows = [moved(made)["all-reduce", "outputs of rows", ("tensor",)] for made in (kept, again)]
    np.testing.assert_allclose([made.bytes for made in columns], 4 * 2 * each)  # query, key and value as one, wide
    np.testing.assert_allclose([made.bytes for made in rows], [4 * 2 * each, 4 * 3 * each])  # out, narrow; out again
    gathered = [moved(made)["all-gather", "parameters", ("fsdp",)].bytes for made in (kept, again)]
    np.testing.assert_allclose(gathered[1], 1.25 * gathered[0])
    assert again.bytes["activations for the backward"] < 0.3 * kept.bytes["activations for the backward"]
    assert 1.2 < again.operations / kept.operations < 4 / 3


def test_what_limits_is_said_with_what_to_change():
    tiny = plan(MLP, X, fnet.sgd(0.1), {"data": 8}, 64, chip=CHIP._replace(memory=1e5)).advice
    assert tiny == "does not fit into 0 GB; most are parameters, moments, state: a larger fsdp or tensor"
    large = plan(MLP, X, fnet.sgd(0.1), {"data": 8}, 800_000, chip=CHIP._replace(memory=1e8)).advice
    assert "most are activations for the backward: fewer examples on a device (accumulate), or layers.remat" in large
    far = plan(MLP, X, fnet.sgd(0.1), {"fsdp": 8}, 8, chip=CHIP).advice
    assert far.startswith("moving limits it: all-gather of parameters over fsdp; an fsdp of 4 stays within a group")
    assert plan(MLP, X, fnet.sgd(0.1), {"fsdp": 2}, 200_000, chip=CHIP).advice == "computing limits it"


def test_what_cannot_be_planned_is_said():
    with pytest.raises(ValueError, match=r"plan: chip = 'z80'; expected one of a100, h100, h200, .*, or a Chip"):
        plan(MLP, X, fnet.sgd(0.1), {"data": 8}, 64, chip="z80")
    with pytest.raises(TypeError, match=r"plan: placement = \{'model': 8\}; expected a Placement, or sizes of data, "):
        plan(MLP, X, fnet.sgd(0.1), {"model": 8}, 64)
    with pytest.raises(ValueError, match="plan: batch = 60 over 8 parts of data and fsdp; expected a multiple of 8"):
        plan(MLP, X, fnet.sgd(0.1), {"data": 8}, 60)
    with pytest.raises(ValueError, match="plan: fsdp = 0; expected a whole number of at least 1"):
        plan(MLP, X, fnet.sgd(0.1), {"fsdp": 0}, 64)
    with pytest.raises(ValueError, match=r"params/.*/key/b has shape \(64,\).*splits axis 0, 64 long, over tensor = 5"):
        model = models.gpt(256, length=16, layers=1, features=64, heads=4)
        plan(model, jax.ShapeDtypeStruct((1, 16), "int32"), fnet.sgd(0.1), {"tensor": 5}, 8)
    with pytest.raises(fnet.LayerError):
        plan(models.lenet5(10), X, fnet.sgd(0.1), {"data": 8}, 64)


def test_a_loop_that_counts_to_a_number_is_as_long_and_fused_scatters_and_pairs_are_read():
    text = """HloModule step, num_partitions=8
%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %a = f32[64]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
}
%condition (p: (s32[], f32[64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %at = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}
%all-reduce-scatter.3 (q: f32[64]) -> f32[8] {
  %b = f32[64]{0} all-reduce(%q), replica_groups=[1,8]<=[8]
}
ENTRY %main (x: f32[64]) -> f32[64] {
  %w = (s32[], f32[64]) while(%t), condition=%condition, body=%body
  %s = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  %r = ((f32[64]{0}), f32[8]{0}) reduce-scatter-start(%x), replica_groups=[1,8]<=[8]
}"""
    sent = sent_by_step(text)
    assert sent["all-reduce"] == (12, 12 * 2 * 7 * 64 * 4 // 8)
    assert sent["reduce-scatter"] == (2, 2 * 7 * 64 * 4 // 8)


def test_the_command_says_what_the_function_does():
    text = planned(["--layers", "2", "--features", "64", "--heads", "4", "--length", "32", "--mesh", "data=2,fsdp=8"])
    assert text.splitlines()[0].startswith("16 × H100 SXM (data 2 × fsdp 8), ")
    assert "seconds" in text and "examples a second if nothing overlaps" in text
    done = subprocess.run([sys.executable, "-m", "fnet", "plan", "--mesh", "rows=2"], capture_output=True, text=True)
    assert done.returncode == 2 and "--mesh rows=2: expected sizes of data, fsdp, tensor, such as" in done.stderr
    done = subprocess.run([sys.executable, "-m", "fnet", "plans"], capture_output=True, text=True)
    assert done.returncode == 1 and "python -m fnet plans: expected no argument, or plan" in done.stderr
    with pytest.raises(SystemExit):
        planned(["--compile", "tpu", "--chip", "h100"])


def test_the_pages_table_is_what_its_command_prints():
    page = Path(__file__).parents[1] / "docs" / "how-to" / "several-devices.md"
    (command,) = [line for text in blocks_of(page, "bash") for line in text.splitlines() if "fnet plan" in line]
    (table,) = [text for text in blocks_of(page, "text") if "on each device" in text]
    assert planned(shlex.split(command)[4:]) == table.rstrip("\n")


def test_rules_of_ones_own_are_planned_as_they_are():
    mesh = jax.sharding.AbstractMesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    rules = {"*dense_0/w": P(None, "tensor"), "*dense_1/w": P("tensor", None)}
    made = plan(MLP, X, fnet.sgd(0.1), Placement(mesh, tuple(rules.items()), 4096), 8)
    assert {(each.kind, each.what) for each in made.moved} == {
        ("all-reduce", "outputs of rows"),
        ("all-reduce", "gradients by the inputs of columns"),
    }
