"""A model trained on eight devices has the numbers of one, and each device does its part of the work."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest

import fnet
from tests.devices.parts import CASES, MESHES, apart, assert_same_run, run
from tests.test_training import assert_same_bits

ENGINES = {"backprop": fnet.backprop, "autodiff": fnet.autodiff}
TRANSFORMERS = ("vit", "gpt", "gpt, repeated, dropout", "gpt, blockwise")
EVERY = [(name, mesh, engine) for name in CASES for mesh in MESHES for engine in ENGINES]
EVERY = [(name, mesh, engine) for name, mesh, engine in EVERY if "tp" not in mesh or name in TRANSFORMERS]
# of each model one mesh, of each mesh one model at least, and both engines
SOME = {
    ("mlp", "fsdp8", "autodiff"),
    ("dropout", "dp2 fsdp4", "backprop"),
    ("lstm", "dp8", "backprop"),
    ("gru", "fsdp8", "autodiff"),
    ("gru, reset before", "dp8", "backprop"),
    ("autoencoder", "fsdp8", "backprop"),
    ("lenet5", "dp8", "autodiff"),
    ("resnet", "dp2 fsdp4", "backprop"),
    ("resnet, by XLA", "dp8", "backprop"),
    ("vit", "dp2 tp4", "autodiff"),
    ("gpt, repeated, dropout", "fsdp2 tp4", "backprop"),
}


@pytest.fixture(autouse=True)
def wide(x64):
    """All of it in float64."""


@functools.cache
def alone(name, engine):
    return run(name, engine=ENGINES[engine])


@pytest.mark.parametrize(
    ("name", "mesh", "engine"), [pytest.param(*each, marks=() if each in SOME else pytest.mark.slow) for each in EVERY]
)
def test_a_run_on_eight_devices_is_the_run_on_one_and_each_does_its_part(name, mesh, engine):
    one, several = alone(name, engine), run(name, mesh, engine=ENGINES[engine])
    assert_same_run(one, several)
    # an eighth, and what is done by all: orders of examples, and where parameters are whole Adam's 13 operations
    update = 13 * sum(leaf.size for leaf in jax.tree.leaves(one.ts.params)) if mesh == "dp8" else 0
    assert several.work <= 0.165 * one.work + update
    assert len(jax.tree.leaves(several.ts.params)[0].sharding.device_set) == 8


def test_a_run_again_has_the_same_bits_and_compiles_nothing(capsys):
    first = run("dropout", "fsdp8")
    again = run("dropout", "fsdp8", explain=True)
    assert_same_bits(first.ts, again.ts)
    said = capsys.readouterr().out
    assert "run_chunk not compiled again: it computes the same on the same shapes, dtypes and devices" in said
    assert re.search(r"run_chunk: each device sends in a step: all-gather \d+ times, ", said)


def test_parameters_are_drawn_in_parts_and_are_those_of_one_device():
    one, several = (run("mlp", mesh, epochs=None, steps=1) for mesh in (None, "fsdp8"))
    assert apart(one.ts, several.ts) < 1e-14
    w = several.ts.params["dense_0"]["w"]
    assert w.addressable_shards[0].data.size * 8 == w.size
    moment = several.ts.opt_state.mu["dense_0"]["w"]
    assert moment.sharding == w.sharding and np.prod(moment.sharding.shard_shape(moment.shape)) * 8 == moment.size
