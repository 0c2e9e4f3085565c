"""benchmarks.accelerator: its runner with processes of Python alone, its formulas, and all of it at toy size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import accelerator
from benchmarks import accelerator_models as models
from benchmarks.accelerator import Setting, Stage, peaks_of, run_all, write
from fnet.core.operations import operations_of
from fnet.core.platforms import traced_for

ROOT = Path(__file__).parents[1]
SAY = "import json, sys, time\nsay = lambda **m: print(json.dumps(m), flush=True)\n"
PEER = (
    SAY
    + "for order in sys.stdin:\n    say(**({'seconds': 0.25} if order == 'round\\n' else {'prepared': ABOUT}))\nLAST"
)
ABOUT = "{'compile_seconds': 1.0, 'steps': 1, 'operations': 1e12, 'parameters': 7}"
CODES = {
    "raises": SAY + "say(name='a', peer='p', median=2.0, unit='s')\nraise ValueError('not so')",
    "hangs": SAY + "say(name='b', peer='p', ok=True)\ntime.sleep(600)",
    "says": SAY
    + "say(device={'kind': 'NVIDIA H200', 'platform': 'gpu', 'count': 1})\nsay(name='c', peer='p', ok=False)",
    "quick": PEER.replace("ABOUT", ABOUT).replace("LAST", "say(peak_bytes=5)"),
    "sleeps": "import time\ntime.sleep(600)",
    "dies": SAY + f"sys.stdin.readline()\nsay(prepared={ABOUT})\nsys.stdin.readline()\nsys.exit('out of memory')",
}


def run(stages, saves=None):
    """What the runner finds of stages whose processes are ``CODES``."""
    found = {"toy": False, "stages": []}

    def save():
        if saves is not None:
            saves.append(json.loads(json.dumps(found)))

    setting = Setting(
        lambda stage, peer: [sys.executable, "-I", "-S", "-c", CODES[peer or stage]],
        lambda stage: dict(os.environ),
        lambda peer: "no such peer" if peer == "absent" else None,
        save,
    )
    run_all(stages, found, 360, setting)
    return found, {entry["name"]: entry for entry in found["stages"]}


def test_a_stage_that_raises_hangs_or_has_no_time_costs_itself_alone(capsys):
    saves = []
    stages = (Stage("late", 400, 500), Stage("raises", 0, 60), Stage("hangs", 0, 0.7), Stage("says", 330, 360))
    found, entries = run(stages, saves)
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "late": "left out for time",
        "raises": "failed",
        "hangs": "stopped at its limit",
        "says": "done",
    }
    assert entries["raises"]["rows"] == [{"name": "a", "peer": "p", "median": 2.0, "unit": "s"}]
    assert "ValueError: not so" in entries["raises"]["failures"][0]["error"]
    assert entries["raises"]["limit_seconds"] <= 30  # what the last one needs is left to it
    assert len(entries["hangs"]["rows"]) == 1 and found["peaks"] == accelerator.PEAKS["H200"]
    # each result was written when it came
    counts = [sum(len(entry["rows"]) for entry in seen["stages"]) for seen in saves]
    assert counts == sorted(counts) and {0, 1, 2, 3} <= {*counts}
    assert not accelerator.is_right(found)
    shown = "\n".join(accelerator.table(found))
    for words in ("late: left out for time", "ValueError: not so", "p, c: WRONG", "hangs: stopped at its limit"):
        assert words in shown
    assert "raises: failed: ValueError: not so" in capsys.readouterr().out


def test_a_peer_that_hangs_dies_or_is_not_there_costs_itself_alone():
    _, entries = run((Stage("says", 0, 60), Stage("gpt", 0, 3.0, ("quick", "sleeps", "absent", "dies"))))
    rows = {row["peer"]: row for row in entries["gpt"]["rows"]}
    assert entries["gpt"]["status"] == "failed in part" and "out of memory" in entries["gpt"]["failures"][0]["error"]
    assert rows["sleeps"]["status"] == "stopped at its limit" and rows["absent"]["status"] == "no such peer"
    quick = rows["quick"]
    assert (quick["median"], quick["rounds"], quick["peak_bytes"], quick["unit"]) == (250.0, 5, 5, "ms/step")
    assert quick["share_of_peak"] == pytest.approx(1e12 / 0.25 / 989e12) and "bfloat16" in quick["peak"]
    assert "dies" not in rows


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "found.json"
    write(path, {"a": 1})
    with pytest.raises(TypeError):
        write(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    write(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2} and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_that_of_the_data_sheet_or_none(kind, peak):
    assert (peaks_of(kind) or {"bfloat16": None})["bfloat16"] == peak


def parameters(name, size):
    """The shapes of fnet's parameters and state, and of a batch."""
    model = models.fnet_model(name, size)
    inputs = jax.eval_shape(lambda x: x, models.data_for(name, {**size, "batch": 1})[0])
    params, state = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return model, params, state, inputs


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_models_have_the_sizes_that_they_are_called_by():
    assert count(parameters("resnet", {**models.REAL["resnet"], "side": 64})[1]) == 11_689_512
    assert count(parameters("gpt", models.REAL["gpt"])[1]) == 124_439_808 == models.gpt_parameters(models.REAL["gpt"])


@pytest.mark.parametrize("name", models.TOY)
def test_operations_are_thrice_those_of_the_forwards_products(name):
    size = models.TOY[name]
    model, params, state, inputs = parameters(name, size)
    with traced_for("cuda"):  # convolutions as one operation each
        closed = jax.make_jaxpr(lambda p, s, x: model.forward(p, s, x, train=True)[0])(params, state, inputs)
    found = 0
    for eqn, times in walk_products(closed.jaxpr):
        found += times * operations_of(eqn)
    expected = models.products(name, size) / size["batch"] / 3
    if (
        name == "gpt"
    ):  # attention's own two products are left out; N has positions, vectors and no second use of a table
        attention = 4 * size["layers"] * size["length"] ** 2 * size["features"]
        others = size["length"] * size["features"] + size["layers"] * 13 * size["features"] + 2 * size["features"]
        expected += attention - 2 * size["length"] * others
    assert found == expected


def walk_products(jaxpr, times=1):
    """Products of a program, and how often each is run."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn, times
        inner = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for value in eqn.params.values():
            body = getattr(value, "jaxpr", value)
            if hasattr(body, "eqns"):
                yield from walk_products(body, inner)


@pytest.mark.parametrize("name", models.REAL)
def test_torchs_models_have_as_many_parameters(name):
    torch = pytest.importorskip("torch")
    size = models.REAL[name]
    with torch.device("meta"):
        theirs = sum(p.numel() for p in models.torch_model(name, size).parameters())
    second_bias = 4 * size["units"] if name == "lstm" else 0
    assert theirs == count(parameters(name, size)[1]) + second_bias


@pytest.mark.parametrize("name", models.REAL)
def test_flaxs_models_have_as_many_parameters(name):
    pytest.importorskip("flax")
    size = models.REAL[name]
    _, params, _, inputs = parameters(name, size)
    theirs = jax.eval_shape(models.flax_model(name, size).init, jax.random.key(0), inputs)["params"]
    assert count(theirs) == count(params)


@pytest.mark.long
def test_the_whole_command_runs_at_toy_size(tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.accelerator", "--minutes", "20", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(path.read_text())
    assert found["toy"] and found["device"]["platform"] == "cpu" and found["peaks"] is None
    assert {entry["name"]: entry["status"] for entry in found["stages"]} == {s.name: "done" for s in accelerator.STAGES}
    for entry in found["stages"]:
        for row in entry["rows"]:
            package = models.package_of(row["peer"])
            if package != "fnet" and found["versions"][package] is None:
                assert "not installed" in row["status"]
            else:
                assert row.get("ok") is not False and "status" not in row
                assert {"median", "unit"} <= row.keys() or row["ok"]
                assert row.get("share_of_peak") is None
    rows = {(entry["name"], row["peer"]) for entry in found["stages"] for row in entry["rows"]}
    assert {(name, peer) for name, peers in models.PEERS.items() for peer in peers} <= rows
    assert np.isfinite([row["median"] for entry in found["stages"] for row in entry["rows"] if "median" in row]).all()
    shown = done.stdout
    assert "GPT-2 of 124M" not in shown and "fnet backprop, jax's attention, gpt: " in shown
