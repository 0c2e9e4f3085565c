"""The tests of `tests/devices`, each module in a process that sees eight devices of this CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "devices"


@pytest.mark.parametrize("module", sorted(path.stem for path in FOLDER.glob("test_*.py")))
def test_on_eight_devices(module, request):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    slow = ["-m", "slow or not slow"] if request.config.getoption("-m") == "slow" else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{module}.py"), *slow]
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTEST_XDIST_WORKER": "", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed", done.stdout, re.M), done.stdout
