"""What a plan says on paper is what the program of eight devices sends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.training.collectives import sent_by_step
from tests.devices import parts


@pytest.mark.parametrize(
    ("name", "sizes", "rules"),
    [("mlp", {"data": 8}, None), ("gpt", {"data": 2, "tensor": 4}, fnet.sharding.TRANSFORMER)],
)
def test_a_step_sends_what_the_plan_says_and_no_activations(name, sizes, rules, x64):
    case, optimizer = parts.CASES[name], fnet.adam(0.01)
    placement = fnet.placement(fnet.mesh(**sizes), rules, least=64)
    x = jax.ShapeDtypeStruct(case.inputs.shape, np.int32 if name == "gpt" else np.float32)
    planned = fnet.sharding.plan(case.make(), x, optimizer, placement, parts.B)
    model, ts = parts.start(case, optimizer, placement)
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    data = fnet.Batch(jnp.asarray(case.inputs), jnp.asarray(case.targets))
    fnet.fit(step, ts, data, epochs=1, batch_size=parts.B, placement=placement)
    sent = sent_by_step([*parts.compilation._kept.values()][-1].program.as_text())
    # the run is in float64, the plan in float32
    assert sent.keys() == {each.kind for each in planned.moved} == {"all-reduce"}
    assert sent["all-reduce"].bytes == pytest.approx(2 * sum(each.bytes for each in planned.moved), rel=0.05)
