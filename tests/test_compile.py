"""Steps compiled for chips that are not here, where their compilers are installed (`make test-compile`)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

PACKAGE = {"h100": "jax_cuda12_plugin", "v5p": "libtpu"}
WIDE = ["--layers=80", "--features=8192", "--heads=64", "--vocabulary=32768", "--length=4096", "--batch=32"]

PROGRAM = """
import json, sys
import jax
from fnet.training.chips import compile_step, look_for_compilers
from fnet.report.planned import model_of, parser, sizes_of
from fnet.optimizers import adamw
from fnet.training.plans import abstract_step, on_paper, plan

look_for_compilers()
options = parser().parse_args(sys.argv[1:])
(model, x), sizes = model_of(options), sizes_of(options)
batch = options.batch or 8 * sizes.get("data", 1) * sizes.get("fsdp", 1)
made = compile_step(*abstract_step(model, x, adamw(1e-3), batch), on_paper(sizes), options.chip)
planned = plan(model, x, adamw(1e-3), sizes, batch, chip=options.chip)
moved = {}
for each in planned.moved:
    moved[each.kind] = moved.get(each.kind, 0) + each.bytes
print(json.dumps({
    "arguments": made.arguments, "planned": planned.bytes["parameters, moments, state"], "moved": moved,
    "sent": {kind: some.bytes for kind, some in made.sent.items()},
    "convolutions": made.text.count("convolution(") + made.text.count("__cudnn$conv"),
}))
"""


def compiled(chip: str, *arguments: str) -> dict:
    """What the compiler and the plan say, in a process that has looked for no device of its own."""
    try:
        there = importlib.util.find_spec(PACKAGE[chip])
    except ModuleNotFoundError:
        there = None
    if there is None:
        pytest.skip(f"needs {PACKAGE[chip].split('.')[0]}: make test-compile")
    command = [sys.executable, "-c", PROGRAM, "--chip", chip, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("chip", PACKAGE)
def test_resnet18_is_compiled_with_convolutions(chip):
    found = compiled(chip, "--model", "resnet18", "--mesh", "data=8", "--batch", "32", "--precision", "float32")
    assert found["convolutions"] > 0
    images = 32 // 8 * (224 * 224 * 3 + 1) * 4
    # a TPU keeps filters in tiles, which 64 features do not fill
    assert found["arguments"] == pytest.approx(found["planned"] + images, rel=0.02 if chip == "v5p" else 0.01)
    # the gradients, once; and the sums of batch norm, which are small
    assert found["sent"]["all-reduce"] == pytest.approx(found["moved"]["all-reduce"], rel=0.05)


@pytest.mark.parametrize("chip", PACKAGE)
def test_gpt_124m_over_fsdp_has_the_arguments_of_its_plan(chip):
    found = compiled(chip, "--layers", "12", "--mesh", "fsdp=8")
    assert found["arguments"] == pytest.approx(found["planned"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("chip", PACKAGE)
def test_a_plan_of_70_billion_is_what_the_compiler_says(chip):
    found = compiled(chip, *WIDE, "--mesh=fsdp=8,tensor=8")
    assert found["arguments"] == pytest.approx(found["planned"], rel=0.01)
    if chip == "h100":  # a TPU's compiler moves parts of products around rings instead
        for kind, tolerance in {"all-gather": 0.2, "reduce-scatter": 0.05, "all-reduce": 0.05}.items():
            assert found["sent"][kind] == pytest.approx(found["moved"][kind], rel=tolerance), kind
