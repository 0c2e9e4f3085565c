"""`fit(cache=...)`: compiled programs on the disk, and settings of jax that are as they were afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import fnet
from fnet.runs.compilation import keep_compiled
from tests.conftest import compiled_programs

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def in_force() -> dict[str, Any]:
    return {name: getattr(jax.config, name) for name in SETTINGS}


def small_run(width: int = 3):
    """A step, a start and data of a model that no other test has."""
    rng = np.random.default_rng(0)
    data = fnet.check_data((rng.standard_normal((20, 4), np.float32), rng.integers(0, 3, 20)))
    model, optimizer = fnet.mlp(width, 3), fnet.adam(1e-2)
    params, state = fnet.init(model, jax.random.key(0), data.inputs[:1])
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    return step, fnet.init_train_state(params, optimizer, jax.random.key(1), state), data


def entries(folder: Path) -> int:
    return len([path for path in folder.iterdir() if path.name.endswith("-cache")])


def test_all_programs_of_a_run_are_in_its_folder_and_settings_are_as_they_were(tmp_path):
    step, start, data = small_run(5)
    before, within = in_force(), []
    with compiled_programs() as names:
        fnet.fit(
            *(step, start, data),
            epochs=1,
            batch_size=6,
            cache=tmp_path / "a",
            observers=[lambda _: within.append(in_force())],
        )
    assert entries(tmp_path / "a") == len(names) >= 2
    assert in_force() == before
    assert within[0] == dict(zip(SETTINGS, (True, str(tmp_path / "a"), 0, -1), strict=True))
    jax.jit(lambda x: 7 * x)(3.0)
    assert entries(tmp_path / "a") == len(names)


def test_settings_are_as_they_were_after_an_error(tmp_path):
    (step, start, data), before = small_run(), in_force()

    def fail(event):
        raise KeyError("wanted")

    with pytest.raises(KeyError, match="wanted"):
        fnet.fit(step, start, data, epochs=1, batch_size=6, cache=tmp_path, observers=[fail])
    assert in_force() == before
    with pytest.raises(fnet.DataError):
        fnet.fit(step, start, data, epochs=1, batch_size=60, cache=tmp_path)
    assert in_force() == before


def test_a_run_within_a_run_has_its_own(tmp_path):
    (step, start, data), seen = small_run(), []

    def another(event):
        if event.kind == "start":
            fnet.fit(*small_run(7), epochs=1, batch_size=6, cache=tmp_path / "inner")
            seen.append(in_force()["jax_compilation_cache_dir"])

    fnet.fit(step, start, data, epochs=1, batch_size=6, cache=tmp_path / "outer", observers=[another])
    assert seen == [str(tmp_path / "outer")] and entries(tmp_path / "inner") >= 1


@pytest.mark.parametrize(
    ("cache", "error", "message"),
    [
        (3, TypeError, "cache = 3; expected a folder's path"),
        ("", TypeError, "cache = ''; expected a folder's path"),
        ("file", ValueError, "file' is no folder .*: None keeps none"),
        ("file/within", ValueError, "within' is no folder"),
        pytest.param(
            *("/proc/self", ValueError, "'/proc/self' cannot be written"),
            marks=pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no such folder here"),
        ),
    ],
)
def test_what_is_no_folder_to_write_is_refused_by_name(cache, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    (step, start, data), before = small_run(), in_force()
    with pytest.raises(error, match=message):
        fnet.fit(step, start, data, epochs=1, batch_size=6, cache=cache)
    assert in_force() == before


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = keep_compiled("~/a/b")
    try:
        assert in_force()["jax_compilation_cache_dir"] == str(tmp_path / "a" / "b")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert (tmp_path / "a" / "b").is_dir()


PROCESS = """
import sys
import numpy as np
import jax
from tests.test_compilation_cache import small_run
import fnet

end, _ = fnet.fit(*small_run(), epochs=2, batch_size=6, cache=sys.argv[1] or None, explain=True)
print("bits", [np.asarray(leaf).tobytes().hex() for leaf in jax.tree.leaves((end.params, end.opt_state))])
"""


@pytest.mark.long
def test_a_second_process_takes_all_from_the_folder_and_gives_the_same_bits(tmp_path):
    root = str(Path(__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}

    def run(folder: str) -> list[str]:
        command = [sys.executable, "-c", PROCESS, folder]
        done = subprocess.run(
            command, env={**environment, "PYTHONPATH": root}, cwd=root, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    without, first, second = run(""), run(str(tmp_path)), run(str(tmp_path))
    assert without[-1] == first[-1] == second[-1]
    assert any("run_chunk compiled" in line and "cache:" not in line for line in without)
    assert any("(compilation cache: 0 hits, 1 misses)" in line for line in first)
    assert any("(compilation cache: 1 hits, 0 misses)" in line for line in second)
    assert f"explain: compilation cache: {tmp_path}" in second
