"""Rough treatment, at length: threads, writers that meet, and memory over hundreds of runs. Kills: `test_runs`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import fnet
from fnet.runs.checkpoint import read_meta, saved_steps
from tests import resumable

pytestmark = pytest.mark.slow


def process(folder, slow=0.0):
    command = [sys.executable, "-m", "tests.resumable", str(folder), "--slow", str(slow)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_eight_threads_of_ten_runs_with_folders_each_save_and_give_the_same_bits(tmp_path):
    expected = resumable.digest(resumable.run(None)[0])
    together = threading.Barrier(8)

    def ten(thread):
        together.wait()
        for number in range(10):
            folder = tmp_path / f"{thread}_{number}"
            resumable.run(folder, epochs=2)
            yield resumable.digest(resumable.run(folder)[0])
            assert all(read_meta(path)["step"] == step for step, path in saved_steps(folder / "checkpoints").items())

    with ThreadPoolExecutor(8) as pool:
        digests = [digest for several in pool.map(lambda thread: [*ten(thread)], range(8)) for digest in several]
    assert len(digests) == 80 and set(digests) == {expected}


def test_of_three_writers_on_one_folder_one_writes_at_a_time(tmp_path):
    folder = tmp_path / "run"
    for _ in range(3):
        writers = [process(folder, slow=0.02) for _ in range(3)]
        ends = [(writer.communicate(timeout=300), writer.returncode) for writer in writers]
        assert any(code == 0 for _, code in ends)
        for (_, said), code in ends:
            assert code == 0 or "is in use by process" in said
    assert resumable.digest(resumable.run(folder)[0]) == resumable.digest(resumable.run(None)[0])


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory is read from /proc")
def test_memory_stays_flat_over_five_hundred_runs_of_functions_made_anew():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6)).astype(np.float32)
    data = fnet.Batch(x, (x[:, 0] > 0).astype(np.int32))

    def once():
        model, optimizer = fnet.mlp(8, 2), fnet.adam(0.01)
        params, state = fnet.init(model, jax.random.key(0), x[:1])
        step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
        start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
        evaluate, stop = (
            fnet.make_evaluate(model, fnet.softmax_cross_entropy),
            fnet.early_stopping("validation_loss", 3),
        )
        fnet.fit(step, start, data, epochs=1, batch_size=16, evaluate=evaluate, validation=data, stop=stop)

    for _ in range(100):
        once()
    before, begin = resident(), time.monotonic()
    for _ in range(400):
        once()
    # a program that is kept for each would be more than a megabyte
    assert resident() - before < 60, f"{resident() - before:.0f} MB more after {time.monotonic() - begin:.0f} s"
