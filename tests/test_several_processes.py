"""Two processes of four devices each, which meet on this machine, make the runs of one device."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.pages import blocks_of

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
NUMBERS = ["dataset", "stream_in_folder", "observed", "clocks"]
SLOW = ["mlp", "gpt", "mapped"]
# what the two say where one of them, or both, cannot go on
REFUSED = {
    "other_sizes": ["ValueError: the run: the number of examples is 48 in process 0 and 40 in process 1 of 2"] * 2,
    "other_rows": [r"ValueError: data: a sample of the rows of data is SHA-256 \w+… in process 0 and SHA-256 \w+… in"]
    * 2,
    "other_seed": [r"ValueError: the state: the sum of the words of params/dense_0/w is \d+ in process 0 and \d+"] * 2,
    "other_key": [r"ValueError: init: the key is \[0, 1\] in process 0 and \[0, 2\] in process 1 of 2; expected the "]
    * 2,
    "other_rate": [r"ValueError: the state: the sum of the words of opt_state/hyper/learning_rate\S* is \d+ in"] * 2,
    "other_sets": [r"ValueError: the run: the validation sets is .*48 examples.* and .*40 examples.* in process 1"] * 2,
    "shorter_sets": [
        r"DataError: process 1 of 2: DataError: the stream ended after 1 b",
        "DataError: the stream ended",
    ],
    "a_wrong_answer": [
        "ProcessError: process 1 of 2: ValueError: observer .* returned 'halt'",
        "ValueError: observer ",
    ],
    "no_more_metrics": ["RunError: .*expected a folder that can", "ProcessError: process 0 of 2: RunError: .*full"],
    "no_placement": ["ValueError: placement is not given, and there are 2 processes"] * 2,
    "own_devices": ["ValueError: placement: its mesh has devices of 1 of 2 processes"] * 2,
    "an_observer_fails": ["ProcessError: process 1 of 2: OSError: no room left for this", "OSError: no room left"],
    "bad_rows": [r"DataError: process 1 of 2: DataError: a batch of the stream.inputs\[0, 0\] = nan", "DataError: a "],
    "other_parts": [r"ValueError: the stream: examples of a batch is \[8, 8\] in process 0 and \[4\] in process 1"] * 2,
    "a_folder_that_is_there": ["RunError: .*holds note.txt", "RunError: process 0 of 2: RunError: .*holds note.txt"],
    "between_fits": ["ProcessError: process 1 of 2: KeyError: 'mine'", "KeyError: 'mine'"],
}


def begin(folder: Path, *cases: str, several: bool, **environment: str) -> list[subprocess.Popen]:
    """The processes of these cases, with one device or with two times four."""
    folder.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4" * several
    count = 2 if several else 1
    own = {**os.environ, "XLA_FLAGS": flags, "COUNT": str(count), "PORT": port, "CI": "true", **environment}
    command = [sys.executable, "-m", "tests.processes.worker", str(folder), *cases]
    begun = []
    for i in range(count):
        with (folder / f"output.{i}").open("w") as output:
            to = {"stdout": output, "stderr": subprocess.STDOUT}
            begun.append(subprocess.Popen(command, cwd=ROOT, env={**own, "INDEX": str(i)}, **to))
    return begun


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ended(begun: list[subprocess.Popen], seconds: float = 300) -> list[int]:
    """Their exit codes."""
    try:
        return [process.wait(seconds) for process in begun]
    finally:
        for process in begun:
            process.kill()


def run(folder: Path, *cases: str, several: bool, **environment: str) -> None:
    assert set(ended(begin(folder, *cases, several=several, **environment))) == {0}, output_of(folder)


def output_of(folder: Path) -> str:
    return "\n".join(path.read_text()[-4000:] for path in sorted(folder.glob("output.*")))


def assert_same_numbers(one: Path, several: Path) -> None:
    with np.load(one) as a, np.load(several) as b:
        assert a.keys() == b.keys()
        for name in a:
            if not name.endswith("key|b"):  # which has no gradient but roundings
                np.testing.assert_allclose(b[name], a[name], rtol=1e-10, atol=1e-12, err_msg=f"{one.stem}: {name}")


def test_the_numbers_are_those_of_one_device_and_what_one_refuses_all_do(tmp_path):
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    begun = begin(alone, *NUMBERS, several=False)
    cases = [*NUMBERS, "an_observer_stops", *REFUSED]
    assert ended(begin(pair, *cases, several=True)) == [0, 1], output_of(pair)  # as the last ends the second's program
    assert ended(begun) == [0], output_of(alone)
    for name in NUMBERS:
        assert not [*pair.glob(f"{name}.*.txt")], (pair / f"{name}.0.txt").read_text()
        assert_same_numbers(alone / f"{name}.npz", pair / f"{name}.npz")
    for name, patterns in REFUSED.items():
        for i, pattern in enumerate(patterns):
            said = (pair / f"{name}.{i}.txt").read_text()
            assert re.match(pattern, said, re.S) and re.search(r"; expected |no room|mine", said), said
    assert np.load(pair / "an_observer_stops.npz")["step"] == 6
    # what an observer of one raised ended the run in all, after a checkpoint
    assert [*(pair / "failed" / "checkpoints").glob("step_*")]
    # a clock that goes faster in one: chunks of one length, and not all alike
    steps = [json.loads((pair / f"chunks.{i}.json").read_text()) for i in range(2)]
    assert steps[0] == steps[1] and len({*np.diff(steps[0])}) > 1
    # each file is written once, as on one device
    assert (pair / "observed.csv").read_text().count("\n") == (alone / "observed.csv").read_text().count("\n") > 2
    for name in sorted(path.name for path in (alone / "observed").iterdir()):
        with np.load(alone / "observed" / name) as a, np.load(pair / "observed" / name) as b:
            for key in a:
                np.testing.assert_allclose(b[key], a[key], rtol=1e-9, atol=1e-9)
    assert len([*(pair / "board").iterdir()]) == 1
    assert "digits: epoch 1/9" in (pair / "output.0").read_text()
    assert "digits: epoch 1/9" not in (pair / "output.1").read_text()
    # each process' stream stands where its own did
    (last,) = [*(pair / "stream" / "checkpoints").glob("step_000000006")]
    meta = json.loads((last / "meta" / "metadata").read_text())
    assert [state["process"] for state in meta["streams"]] == [0, 1]


def test_the_pages_program_runs_as_a_scheduler_begins_it(tmp_path):
    (program,) = blocks_of(ROOT / "docs" / "how-to" / "several-devices.md", "py")
    (tmp_path / "train.py").write_text(program)
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    job |= {"JAX_COORDINATOR_PORT": str(free_port())}  # else it is made of the job's number
    begun = []
    for i in range(2):
        own = {**os.environ, "CI": "true", **job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        with (tmp_path / f"output.{i}").open("w") as output:
            to = {"stdout": output, "stderr": subprocess.STDOUT}
            begun.append(subprocess.Popen([sys.executable, "train.py"], cwd=tmp_path, env=own, **to))
    assert ended(begun) == [0, 0], output_of(tmp_path)
    said = (tmp_path / "output.0").read_text()
    assert "digits: epoch 3/3" in said
    assert re.fullmatch(r"loss 0\.\d{4} with 2 devices of 2 processes", said.splitlines()[-1])
    assert "epoch" not in (tmp_path / "output.1").read_text()


def wait_for(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.05)


def signalled(folder: Path, number: int, victim: int, **environment: str) -> list[int]:
    """The exit codes of two processes in the midst of a run, one of which was sent a signal."""
    for old in folder.glob("pid.*"):
        old.unlink()
    begun = begin(folder, "long", several=True, **environment)
    pids = [folder / f"pid.{i}" for i in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in pids) or begun[0].poll() is not None)
    os.kill(int(pids[victim].read_text()), number)
    return ended(begun)


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def test_a_folder_goes_on_with_any_number_of_processes_and_sigterm_of_one_saves_all(tmp_path):
    folder, alone = tmp_path / "run", tmp_path / "alone"
    at = lambda epochs, folder=folder: {"RUN": str(folder), "EPOCHS": str(epochs)}  # noqa: E731
    straight = begin(tmp_path / "straight", "in_folder", several=False, **at(4, tmp_path / "straight" / "run"))
    run(tmp_path / "two", "in_folder", several=True, **at(2))
    run(alone, "in_folder", several=False, **at(3))
    run(tmp_path / "again", "in_folder", several=True, **at(4))
    assert ended(straight) == [0]
    assert_same_numbers(tmp_path / "straight" / "in_folder.npz", tmp_path / "again" / "in_folder.npz")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "epoch"] == [3, 6, 9, 12]

    assert signalled(tmp_path / "long", signal.SIGTERM, 1, RUN=str(folder)) == [143, 143]
    said = output_of(tmp_path / "long")
    step = int(re.search(r"SIGTERM: the run is saved at step (\d+) in", said)[1])
    assert said.count("SIGTERM: the run is saved") == 1 and saved(folder)[-1] == step > 12
    epochs = step // 3 + 1
    run(alone, "in_folder", several=False, **at(epochs))  # whole, on one
    assert np.load(alone / "in_folder.npz")["step"] == 3 * epochs


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_is_killed_the_other_ends_and_the_last_whole_checkpoint_resumes(victim, tmp_path):
    folder = tmp_path / "run"
    began = time.monotonic()
    codes = signalled(tmp_path / "long", signal.SIGKILL, victim, RUN=str(folder))
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, None)
    assert time.monotonic() - began < 90
    if victim:  # whoever is sooner says so, fnet or jax, which ends the process
        said = (tmp_path / "long" / "output.0").read_text()
        assert "process 1 of 2 is gone" in said or re.search(r"tasks are unhealthy.*\n1\n", said), said[-3000:]
    else:  # the service was the first's
        assert re.search(r"leader|coordination service|Connection closed", output_of(tmp_path / "long"))
    step = saved(folder)[-1]
    for several in (True, False):
        step = 3 * (step // 3 + 1)
        run(tmp_path / "on", "in_folder", several=several, RUN=str(folder), EPOCHS=str(step // 3))
        assert np.load(tmp_path / "on" / "in_folder.npz")["step"] == step


@pytest.mark.slow
def test_more_runs_are_those_of_one_device(tmp_path):
    for several in (False, True):
        run(tmp_path / f"{several}", *SLOW, "nonfinite", several=several)
    for name in SLOW:
        assert_same_numbers(tmp_path / "False" / f"{name}.npz", tmp_path / "True" / f"{name}.npz")
    said = [(tmp_path / folder).read_text() for folder in ("False/nonfinite.0.txt", "True/nonfinite.0.txt")]
    said = [text.replace(str(tmp_path / "False"), "").replace(str(tmp_path / "True"), "") for text in said]
    assert said[0] == said[1] and "forward of loss: square gives inf" in said[0]
    assert (tmp_path / "True" / "nonfinite.1.txt").exists()
