"""The tests of `tests/devices`, each module in a process that sees eight devices of this CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parent / "devices"


def run(module: str, *options: str) -> None:
    """The tests of a module in a process that sees eight devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{module}.py"), *options]
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTEST_XDIST_WORKER": "", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed", done.stdout, re.M), done.stdout


@pytest.mark.parametrize("module", sorted(path.stem for path in FOLDER.glob("test_*.py")))
def test_on_eight_devices(module):
    run(module)


@pytest.mark.slow
def test_every_model_on_every_mesh_by_both_engines():
    run("test_models", "-m", "slow")
