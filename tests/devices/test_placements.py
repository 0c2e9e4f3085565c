"""Meshes and placements: where each leaf lies, what is sent, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import fnet
from fnet.core.trees import named_leaves
from fnet.training.collectives import sent_by_step
from tests.devices.parts import CASES, on, run, start


def test_a_mesh_has_the_axes_in_one_order_and_takes_what_remains():
    assert dict(fnet.mesh(tensor=2, data=4).shape) == {"data": 4, "tensor": 2}
    assert [*fnet.mesh(tensor=2, data=4).axis_names] == ["data", "tensor"]
    assert dict(fnet.mesh(fsdp=-1, data=2).shape) == {"data": 2, "fsdp": 4}
    assert dict(fnet.mesh(data=2, devices=jax.devices()[:2]).shape) == {"data": 2}
    assert set(fnet.mesh(data=8).axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, r"mesh: the axes are none; expected some of data, fsdp, tensor"),
        ({"model": 8}, r"mesh: the axes are model; expected some of data, fsdp, tensor"),
        ({"data": 3}, r"mesh: {'data': 3} for 8 cpu devices; expected sizes whose product is 8, or other devices"),
        ({"data": 16}, r"jax.config.update\('jax_num_cpu_devices', 8\) at the start makes 8 of a CPU"),
        ({"data": 3, "fsdp": -1}, r"mesh: {'data': 3, 'fsdp': 2} for 8 cpu devices"),
        ({"data": -1, "fsdp": -1}, r"expected -1, which stands for what remains, once at most"),
        ({"data": 0}, r"mesh: data = 0; expected a whole number of at least 1, or -1 for what remains"),
        ({"data": 2.0}, r"mesh: data = 2.0; expected a whole number"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        fnet.mesh(**sizes)


def test_leaves_are_split_by_rules_and_else_along_the_first_axis_that_divides():
    tree = {
        "wide": {"w": jnp.zeros((64, 256)), "b": jnp.zeros(256)},
        "odd": jnp.zeros((63, 65)),
        "rows": jnp.zeros((3, 10, 64)),
        "key": jax.random.key(0),
    }
    placed = fnet.placement(
        fnet.mesh(fsdp=2, tensor=4), {"wide/w": P(None, "tensor"), "wide/b": P("tensor")}, least=300
    )
    specs = jax.tree.map(lambda s: s.spec, placed.of(tree))
    wide = {"w": P("fsdp", "tensor"), "b": P("tensor")}
    assert specs == {"wide": wide, "odd": P(), "key": P(), "rows": P(None, "fsdp")}
    specs = jax.tree.map(lambda s: s.spec, fnet.placement(fnet.mesh(fsdp=8), least=300).of(tree))
    assert specs == {"wide": {"w": P("fsdp"), "b": P()}, "odd": P(), "key": P(), "rows": P(None, None, "fsdp")}
    lines = fnet.sharding.describe(placed, tree).splitlines()
    assert lines[4].split("  ")[0] == "wide/b" and lines[4].endswith(str(256 * 4 // 4))
    assert "axis 0 over fsdp, axis 1 over tensor" in lines[5] and lines[5].endswith(f"{64 * 256 * 4 // 8:,}")
    assert lines[-1].split() == ["sum", f"{8 + 63 * 65 * 4 + 3 * 10 * 64 * 4 // 2 + 256 + 64 * 256 // 2:,}"]


def test_a_rule_holds_for_moments_and_for_copies_that_are_stacked(x64):
    _, ts = start(CASES["gpt, repeated, dropout"], fnet.adam(0.01), on("fsdp2 tp4"))
    query = {path: leaf.sharding.spec for path, leaf in named_leaves(ts) if "query/w" in path}
    assert {path.split("/")[0] for path in query} == {"params", "opt_state"} and len(query) == 3
    assert {*query.values()} == {P(None, "fsdp", "tensor")}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"*w": P(None, "tensor")},
            r"params/dense_1/w has shape \(8, 3\), and the rule '\*w': .*splits axis 1, 3 long, over tensor = 4",
        ),
        ({"*w": P(None, "model")}, r"names the axis 'model'; expected one of data, fsdp, tensor"),
        ({"*w": P("fsdp", "fsdp")}, r"the rule '\*w': .* names 'fsdp' twice; expected it once"),
        (
            {"*0*": P(None, "tensor")},
            r"params/dense_0/b has shape \(8,\), and the rule '\*0\*': .* is of 2 axes; expected a rule of 1 at most",
        ),
        (
            {"*v": P("tensor")},
            r"the rule '\*v' matches no leaf; expected a pattern of paths such as step, params/dense_0/b",
        ),
        (
            {"*0/w": P("tensor"), "*dense*/w": P(None, "tensor")},
            r"dense_0/w matches '\*0/w': .* and '\*dense\*/w': .*; expected rules that agree",
        ),
        (fnet.sharding.TRANSFORMER, r"placement: the rule '\*attention.*' matches no leaf"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, message):
    model = fnet.serial(fnet.dense(8), fnet.dense(3))
    params, state = fnet.init(model, jax.random.key(0), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=message):
        placed = fnet.placement(fnet.mesh(fsdp=2, tensor=4), rules)
        fnet.init_train_state(params, fnet.sgd(0.1), jax.random.key(0), state, placed)


def test_what_is_no_mesh_and_no_rule_is_refused():
    with pytest.raises(TypeError, match=r"placement: mesh = 8; expected a mesh: fnet.mesh\(data=-1\)"):
        fnet.placement(8)  # pyright: ignore
    with pytest.raises(ValueError, match=r"the mesh has axes .*Explicit.*; expected AxisType\.Auto"):
        fnet.placement(jax.make_mesh((8,), ("data",), (AxisType.Explicit,)))
    with pytest.raises(ValueError, match=r"the mesh has the axes \('x',\); expected some of data, fsdp, tensor"):
        fnet.placement(Mesh(np.array(jax.devices()), ("x",)))
    with pytest.raises(
        TypeError, match=r"the rule '\*w': 'tensor'; expected a pattern of paths and a jax.sharding.Part"
    ):
        fnet.placement(fnet.mesh(data=8), {"*w": "tensor"})  # pyright: ignore
    with pytest.raises(ValueError, match="least = 0; expected a whole number of at least 1"):
        fnet.placement(fnet.mesh(data=8), least=0)
    ts, batch = fnet.TrainState(jnp.int32(0), (), (), (), jax.random.key(0)), fnet.Batch(jnp.ones(1), jnp.ones(1))
    with pytest.raises(TypeError, match=r"placement is a Mesh; expected a Placement, as fnet.placement makes one"):
        fnet.fit(lambda ts, batch: (ts, {}), ts, batch, epochs=1, batch_size=1, placement=fnet.mesh(data=8))


def parameters(ran) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(ran.ts.params))


def table(ran) -> int:
    """The bytes of a table that stands twice in the formula: each of its two gradients is summed over the devices."""
    return ran.ts.params["table"].nbytes if "table" in ran.ts.params else 0


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_a_data_parallel_step_sends_its_gradients_once(name, x64):
    ran = run(name, "dp8")
    sent = sent_by_step(ran.text)
    assert sent.keys() == {"all-reduce"}
    # a ring sends an array 2 (n − 1)/n times
    assert sent["all-reduce"].bytes == pytest.approx(2 * 7 / 8 * (parameters(ran) + table(ran)), rel=0.01)


def test_a_step_of_split_parameters_gathers_them_once_and_sums_their_gradients_once(x64):
    ran = run("gpt", "fsdp8")
    sent = sent_by_step(ran.text)
    # an unrolled model's are kept for the backward, but for a table's
    assert sent["all-gather"].bytes == pytest.approx(7 / 8 * parameters(ran), rel=0.15)
    # XLA has no reduce-scatter on CPU: an all-reduce, of which each device takes its part
    assert sent["all-reduce"].bytes == pytest.approx(2 * 7 / 8 * (parameters(ran) + table(ran)), rel=0.01)
    assert sum(each.bytes for each in sent.values()) < 3.4 * 7 / 8 * parameters(ran)  # no activations
