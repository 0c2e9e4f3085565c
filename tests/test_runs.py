"""Runs that are stopped, killed and continued, to the bit; and folders that are refused, with nothing overwritten."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.core.trees import named_leaves
from fnet.runs.checkpoint import (
    kept_leaves,
    load_checkpoint,
    read_meta,
    save_checkpoint,
    saved_results,
    saved_steps,
    write_manifest,
)
from fnet.runs.folder import open_run
from fnet.runs.run import RunWarning
from fnet.types import TrainState
from tests import resumable
from tests.conftest import on_two_devices
from tests.resumable import digest
from tests.test_training import assert_same_bits

ROOT = Path(__file__).parents[1]


def stop_at(step):
    return lambda event: "stop" if event.kind == "chunk" and event.step >= step else None


def metrics(folder):
    return (folder / "metrics.jsonl").read_text()


def latest(folder):
    return list(saved_steps(folder / "checkpoints").values())[-1]


# --- to the bit ------------------------------------------------------------------------------------------------------


def resumed_is_straight(tmp_path, **options):
    straight, history = resumable.run(tmp_path / "straight", **options)
    for at in (13, 26):  # within an epoch and within the interval of evaluations
        resumable.run(tmp_path / "cut", observers=[stop_at(at)], **options)
    end, resumed = resumable.run(tmp_path / "cut", chunk_steps=100, **options)
    assert_same_bits(end, straight)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "straight")
    for name, values in history.epochs.items():
        np.testing.assert_array_equal(resumed.epochs[name], values)
    for name, values in history.evaluations.items():
        np.testing.assert_array_equal(resumed.evaluations[name], values)
    assert history.evaluations["step"].tolist() == list(range(4, 43, 4))
    return straight


@pytest.mark.long
def test_a_run_cut_twice_is_the_straight_run_with_dropout_batch_norm_schedule_accumulation_and_noise(tmp_path):
    end = resumed_is_straight(tmp_path)
    alone, _ = resumable.run(None, chunk_steps=None)
    assert_same_bits(end, alone)  # a folder changes nothing


@pytest.mark.long
def test_mapped_data_give_the_run_of_data_in_memory_and_are_resumed(tmp_path):
    mapped = resumed_is_straight(tmp_path, source="mapped", files=tmp_path)
    in_memory, _ = resumable.run(None)
    assert_same_bits(mapped, in_memory)


def test_a_stream_is_continued_where_it_stood(tmp_path):
    resumed_is_straight(tmp_path, source="stream")
    saved = json.loads((latest(tmp_path / "cut") / "meta" / "metadata").read_text())
    assert saved["streams"] == [{"at": 42}]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", resumable.optimizers())
def test_every_optimizer_is_resumed_to_the_bit(optimizer, tmp_path):
    resumed_is_straight(tmp_path, optimizer=optimizer)


def test_a_checkpoint_holds_every_leaf_with_its_dtype_and_bits(tmp_path):
    tree = {
        "half": jnp.asarray([1.5, -0.0, jnp.inf], jnp.bfloat16),
        "key": jax.random.split(jax.random.key(3), 2),
        "empty": (jnp.zeros((0, 3)), None, ()),
        "count": jnp.asarray(7, jnp.int32),
        "flag": jnp.asarray(True),
        "nan": jnp.asarray(jnp.nan),
    }
    path = save_checkpoint(tmp_path, 3, kept_leaves(tree), {"note": 0.1})
    is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # noqa: E731
    meta = read_meta(path)
    back = load_checkpoint(path, jax.tree.map(lambda a: a[::-1] if is_key(a) else jnp.zeros_like(a), tree), meta)
    assert_same_bits(back, tree)
    assert meta["note"] == 0.1 and meta["step"] == 3
    with pytest.raises(fnet.CheckpointError, match="exists already and is left as it is"):
        save_checkpoint(tmp_path, 3, kept_leaves(tree))


def test_checkpoints_are_kept_by_policy(tmp_path):
    resumable.run(tmp_path / "run", keep_last=2, keep_every=10, keep_best="validation_loss")
    rows = [json.loads(line) for line in metrics(tmp_path / "run").splitlines()]
    results = {row["step"]: row["validation_loss"] for row in rows if row["kind"] == "evaluation"}
    saved = [*range(5, 42, 5), 42]
    # a checkpoint has the last result before it; the best of all that were ever saved stays
    known = {step: results[step - step % 4] for step in saved if step >= 4}
    best = min(known, key=lambda step: known[step])
    assert set(saved_steps(tmp_path / "run" / "checkpoints")) == {10, 20, 30, 40, 42, best}


# --- signals ---------------------------------------------------------------------------------------------------------


def start(folder, *options) -> subprocess.Popen:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-u", "-m", "tests.resumable", str(folder), *options]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **cache}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(process.stderr.read())


def result(process):
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out.split("end ")[1].strip()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_and_ends_it_with_128_and_its_number(number, tmp_path):
    process = start(tmp_path / "run", "--slow", "0.3")
    wait_for(process, "step 5")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    stood = list(saved_steps(tmp_path / "run" / "checkpoints"))[-1]
    assert 5 <= stood < 42
    assert result(start(tmp_path / "run")) == digest(resumable.run(None)[0])


def test_a_second_sigint_leaves_at_once(tmp_path):
    process = start(tmp_path / "run", "--slow", "30")
    wait_for(process, "step 3")  # and now its observer sleeps
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and time.monotonic() - begin < 5
    assert "left at once" in errors


def killed_at_random(folder, times, seed, source):
    """Kill the run as often at random moments; its last process ends undisturbed."""
    rng = random.Random(seed)
    extra = ("--slow", "0.05", "--source", source)
    for _ in range(times):
        process = start(folder, *extra)
        if rng.random() < 0.8:
            wait_for(process, "step")
        time.sleep(rng.random() * 0.8)
        process.kill()
        process.communicate()
    return result(start(folder, *extra))


@pytest.mark.long
def test_a_run_killed_at_a_random_moment_ends_as_the_undisturbed_one(tmp_path):
    folder = tmp_path / "run"
    assert killed_at_random(folder, 2, 0, "memory") == digest(resumable.run(tmp_path / "straight")[0])
    assert metrics(folder) == metrics(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["memory", "mapped", "stream"])
@pytest.mark.parametrize("seed", range(6))
def test_runs_killed_fifty_times_and_more_end_as_the_undisturbed_one(seed, source, tmp_path):
    files = {"files": tmp_path} if source == "mapped" else {}
    (tmp_path / "run").mkdir()
    expected = digest(resumable.run(tmp_path / "straight", source=source, **files)[0])
    assert killed_at_random(tmp_path / "run", 3, seed, source) == expected


# --- what is refused, and what stays as it was -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder that was ended within."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    resumable.run(folder, observers=[stop_at(20)])
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(folder, error, message, **options):
    before = files(folder)
    with pytest.raises(error, match=message) as caught:
        resumable.run(folder, **options)
    after = files(folder)
    assert {name: after[name] for name in before if name.name != ".lock"} == {
        name: content for name, content in before.items() if name.name != ".lock"
    }
    return str(caught.value)


def test_a_configuration_may_be_a_dataclass_and_its_free_names_may_change(tmp_path):
    @dataclasses.dataclass
    class Config:
        rate: float
        epochs: int
        data: Path

    run = fnet.Run(tmp_path / "run", Config(0.1, 2, Path("x")))
    with open_run(run) as opened:
        opened.begin([])
    with open_run(run._replace(config=Config(0.1, 5, Path("x")), resume=True)) as opened:
        opened.begin([])
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"rate": 0.1, "epochs": 5, "data": "x"}
    with (
        pytest.raises(fnet.RunError, match=re.escape("rate: expected 0.1 (as begun), found 0.2")),
        open_run(run._replace(config=Config(0.2, 5, Path("x")), resume=True)),
    ):
        pass


def altered(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


def flip(data):
    data[len(data) // 2] ^= 1
    return data


@pytest.mark.parametrize("what", ["arrays", "meta", "truncated", "gone"])
def test_a_damaged_checkpoint_is_refused_by_its_name(what, folder):
    path = latest(folder)
    arrays = max((p for p in (path / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if what == "arrays":
        altered(arrays, flip)
    elif what == "meta":
        altered(path / "meta" / "metadata", lambda data: data.replace(b'"sum": ', b'"sum": 1', 1))
    elif what == "truncated":
        altered(arrays, lambda data: data[: len(data) // 2])
    else:
        shutil.rmtree(path / "state")
    message = refused(folder, fnet.CheckpointError, re.escape(str(path)))
    assert "delete its folder to continue from the checkpoint before it" in message
    shutil.rmtree(path)
    with pytest.warns(fnet.runs.RunWarning, match=r"is resumed from step \d+: its checkpoint of step \d+ is gone"):
        end, _ = resumable.run(folder)
    assert digest(end) == digest(resumable.run(None)[0])


def test_a_foreign_folder_among_the_checkpoints_is_refused(folder):
    foreign = folder / "checkpoints" / "step_000000999"
    foreign.mkdir()
    (foreign / "weights.pkl").write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")
    refused(
        folder,
        fnet.CheckpointError,
        r"step_000000999 is damaged or not fnet's .* expected a checkpoint as fnet wrote it",
    )


def test_two_runs_on_one_folder_are_refused(folder):
    with open_run(fnet.Run(folder, {"optimizer": "noisy"}, resume=True)):
        words = rf"is in use by process {os.getpid()} on \S+, since [\d: -]+; expected a folder that no run writes to"
        refused(folder, fnet.RunError, words)


def test_a_folder_that_cannot_be_written_to_is_named():
    with pytest.raises(fnet.RunError, match=r"/proc/fnet cannot be written to .*; expected a folder that can"):
        resumable.run("/proc/fnet")


def test_a_disk_without_room_stops_the_run_and_leaves_the_checkpoints_before(folder, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(fnet.CheckpointError, match=r"needs .* MB and 0.001 MB are free; expected room for it"):
        resumable.run(folder)
    monkeypatch.undo()
    assert digest(resumable.run(folder)[0]) == digest(resumable.run(None)[0])


def test_a_disk_that_fills_while_it_is_written_is_told_and_the_checkpoint_before_is_whole(folder):
    code = f"""
import resource, signal
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
from tests import resumable
resumable.run({str(folder)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert re.search(r"(RunError|CheckpointError|OSError)", done.stderr.splitlines()[-1])
    assert digest(resumable.run(folder)[0]) == digest(resumable.run(None)[0])


def test_other_circumstances_are_said_at_resume(folder):
    for path in saved_steps(folder / "checkpoints").values():
        meta = path / "meta" / "metadata"
        saved = json.loads(meta.read_text())
        meta.write_text(json.dumps({**saved, "environment": {**saved["environment"], "jax": "0.1", "threads": 999}}))
        write_manifest(path, {})
    with pytest.warns(
        RunWarning, match=r"not to the bit perhaps: jax: expected '0.1' \(as saved\).*threads: expected 999"
    ):
        resumable.run(folder)


def test_a_line_of_metrics_that_was_cut_off_is_written_anew(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epoch", "ste')
    end, _ = resumable.run(folder)
    assert digest(end) == digest(resumable.run(None)[0])
    assert [json.loads(line)["step"] for line in metrics(folder).splitlines()][-1] == 42


def test_what_a_killed_process_left_half_done_is_swept(folder):
    checkpoints = folder / "checkpoints"
    (checkpoints / ".deleted_step_000000005").mkdir()
    (checkpoints / ".writing_step_000000041").mkdir()
    resumable.run(folder)
    assert all(re.fullmatch(r"step_\d+", path.name) for path in checkpoints.iterdir())


# --- what a second pair of eyes broke --------------------------------------------------------------------------------


def test_a_signal_while_the_last_checkpoint_is_written_is_not_lost(tmp_path):
    def late(event):
        if event.kind == "checkpoint" and event.step == 42:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(fnet.Terminated) as caught:
        resumable.run(tmp_path / "run", observers=[late])
    assert caught.value.code == 143
    assert digest(resumable.run(tmp_path / "run")[0]) == digest(resumable.run(None)[0])


def test_a_folder_that_was_only_begun_is_begun_anew(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".lock.0123").touch()  # of a process that was killed before it held the lock
    (tmp_path / "run" / ".config.json.part").write_text("{")
    assert digest(resumable.run(tmp_path / "run")[0]) == digest(resumable.run(None)[0])


def test_the_best_checkpoint_is_that_of_the_best_evaluation(tmp_path):
    step, ts, arrays, evaluate = resumable.parts()
    run = fnet.Run(tmp_path / "run", save_every=7, keep_last=1, keep_best="validation_loss")
    options = {"batch_size": 8, "evaluate": evaluate, "validation": arrays, "evaluate_every": (4, "steps")}
    _, history = fnet.fit(step, ts, fnet.Batch(*arrays), epochs=6, run=run, **options)
    best = int(history.evaluations["step"][history.evaluations["validation_loss"].argmin()])
    assert set(saved_steps(tmp_path / "run" / "checkpoints")) == {best, 42}


def test_an_error_of_the_data_within_the_first_chunk_leaves_a_checkpoint(tmp_path):
    step, ts, arrays, _ = resumable.parts()
    batches = [(arrays[0][:8], arrays[1][:8])] * 3 + [(np.full((8, 6), np.nan, np.float32), arrays[1][:8])]
    stream = fnet.data.Stream(batches, resumable=False)
    with pytest.raises(fnet.DataError, match=r"a batch of the stream.inputs\[0, 0\] = nan") as caught:
        fnet.fit(step, ts, stream, epochs=1, chunk_steps=4, run=fnet.Run(tmp_path / "run"))
    assert not hasattr(caught.value, "__notes__") and list(saved_steps(tmp_path / "run" / "checkpoints")) == [0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rule", "stopping/hyper/patience: expected 100.0 (as saved), found 5.0"),
        ("rate", "hyper/learning_rate/peak: expected 0.01 (as saved), found 0.5"),
        ("key", "key: expected [0, 1] (as saved), found [0, 9]"),
    ],
)
def test_numbers_that_a_checkpoint_would_override_are_named(what, message, folder):
    step, ts, arrays, evaluate = resumable.parts()
    if what == "rate":
        change = lambda path, leaf: jnp.asarray(0.5) if "peak" in jax.tree_util.keystr(path) else leaf  # noqa: E731
        ts = ts._replace(opt_state=jax.tree_util.tree_map_with_path(change, ts.opt_state))
    if what == "key":
        ts = ts._replace(key=jax.random.key(9))
    before = files(folder)
    with pytest.raises(fnet.RunError, match=re.escape(message)):
        fnet.fit(
            step,
            ts,
            fnet.Batch(*arrays),
            epochs=6,
            batch_size=8,
            evaluate=evaluate,
            validation=arrays,
            evaluate_every=(4, "steps"),
            stop=fnet.early_stopping("validation_loss", patience=5 if what == "rule" else 100),
            run=fnet.Run(folder, {"optimizer": "noisy"}, resume=True),
        )
    assert files(folder) == before


def test_a_configuration_with_nan_is_the_same_when_it_is_resumed(tmp_path):
    run = fnet.Run(tmp_path / "run", {"x": float("nan")})
    for resume in (False, True):
        with open_run(run._replace(resume=resume)) as opened:
            opened.begin([])


def test_two_leaves_of_one_path_are_refused_before_they_are_saved():
    with pytest.raises(fnet.CheckpointError, match="two leaves have the path 'a/b'; expected one"):
        kept_leaves({"a": {"b": jnp.ones(1)}, "a/b": jnp.zeros(1)})


# --- what a third pair of eyes broke ---------------------------------------------------------------------------------


def test_the_best_checkpoint_is_known_without_the_metrics(tmp_path):
    run = {"epochs": 3, "keep_best": "validation_loss", "keep_last": 1}
    resumable.run(tmp_path / "run", **run)
    checkpoints = saved_steps(tmp_path / "run" / "checkpoints")
    losses = {step: saved_results(path)["validation_loss"] for step, path in checkpoints.items() if saved_results(path)}
    best = min(losses, key=lambda step: losses[step])
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.warns(RunWarning, match=r"metrics.jsonl is not there: the run's history begins anew"):
        _, history = resumable.run(tmp_path / "run", **run | {"epochs": 5})
    after = saved_steps(tmp_path / "run" / "checkpoints")
    kept = {step: saved_results(path).get("validation_loss", np.inf) for step, path in after.items()}
    assert min(kept.values()) <= losses[best] and (best in after or min(kept.values()) < losses[best])
    assert history.epochs["epoch"].tolist() == [4, 5]


class Mutable(resumable.Reader):
    """A reader whose state is its own dict, which it goes on to change."""

    def __init__(self, source):
        super().__init__(source)
        self.state = {"at": 0}

    def __next__(self):
        self.at = self.state["at"]
        self.state["at"] += 1
        return super().__next__()

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = dict(state)


def test_a_streams_state_is_what_it_was_when_it_was_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "Reader", Mutable)
    resumed_is_straight(tmp_path, source="stream", epochs=6)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_an_observer_that_leaves_loses_nothing(error, tmp_path):
    def leave(event):
        if event.kind == "chunk" and event.step >= 13:
            raise error

    with pytest.raises(type(error)):
        resumable.run(tmp_path / "run", observers=[leave], save_seconds=1e9)
    assert list(saved_steps(tmp_path / "run" / "checkpoints"))[-1] >= 13
    assert digest(resumable.run(tmp_path / "run")[0]) == digest(resumable.run(None)[0])


def test_what_is_no_checkpoint_is_left_alone(folder):
    (folder / "checkpoints" / "step_3").write_text("mine")
    (folder / "checkpoints" / ".writing_x").write_text("half")
    end, _ = resumable.run(folder)
    assert digest(end) == digest(resumable.run(None)[0])
    assert (folder / "checkpoints" / "step_3").read_text() == "mine"


def test_a_file_beside_a_checkpoints_own_is_named_and_not_the_checkpoint_given_up(folder):
    (latest(folder) / ".DS_Store").write_text("finder")
    message = refused(folder, fnet.CheckpointError, r"step_\d+ holds .DS_Store, which fnet did not write")
    assert "move it away" in message and "delete" not in message


def test_a_refused_resume_leaves_configuration_and_environment(tmp_path):
    step, ts, arrays, _ = resumable.parts()
    data, run = fnet.Batch(*arrays), fnet.Run(tmp_path / "run", {"epochs": 3})
    fnet.fit(step, ts, data, epochs=1, batch_size=8, run=run)
    (tmp_path / "run" / "environment.json").write_text("{}")
    before = files(tmp_path / "run")
    other = run._replace(config={"epochs": 99}, resume=True)
    for options in ({"batch_size": 9, "epochs": 2}, {"batch_size": 8, "steps": 2}):
        with pytest.raises(fnet.RunError):
            fnet.fit(step, ts, data, run=other, **options)
    assert files(tmp_path / "run") == before


def test_a_checkpoint_of_64_bits_names_the_setting(tmp_path, x64):
    ts = TrainState(jnp.asarray(3, jnp.int32), jnp.ones(2), (), (), jax.random.key(0))
    path = save_checkpoint(tmp_path, 3, kept_leaves(ts))
    with jax.enable_x64(False), pytest.raises(fnet.CheckpointError, match="is of another jax_enable_x64: params"):
        load_checkpoint(path, ts._replace(params=jnp.ones(2, jnp.float32)), read_meta(path))


def test_what_was_not_finite_is_forgotten_when_the_run_goes_on(tmp_path):
    step, ts, arrays, _ = resumable.parts()
    run = fnet.Run(tmp_path / "run")
    data = fnet.Batch(*arrays)
    fnet.fit(step, ts, data, epochs=1, batch_size=8, run=run)
    (tmp_path / "run" / "nonfinite.json").write_text("{}")
    fnet.fit(step, ts, data, epochs=2, batch_size=8, run=run._replace(resume=True))
    assert not (tmp_path / "run" / "nonfinite.json").exists()


@pytest.mark.long
def test_a_state_on_several_devices_needs_a_placement_and_one_on_another_device_stays_there():
    out = on_two_devices("""
import jax, numpy as np, fnet
from jax.sharding import NamedSharding, PartitionSpec as P
x = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
data = fnet.Batch(x, (x[:, 0] > 0).astype(np.int32))
model, optimizer = fnet.mlp(6, 2), fnet.adamw(0.01, weight_decay=0.1)
params, state = fnet.init(model, jax.random.key(0), x[:1])
step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
try:
    spread = jax.device_put(start, NamedSharding(fnet.mesh(data=2), P()))
    fnet.fit(step, spread, data, epochs=1, batch_size=8)
except ValueError as error:
    print(error)
second = jax.device_put(start, jax.devices()[1])
moved, _ = fnet.fit(step, second, jax.device_put(data, jax.devices()[1]), epochs=1, batch_size=8)
assert moved.params["dense_1"]["w"].devices() == {jax.devices()[1]}
""")
    assert out.startswith("placement is not given, and ts.step lies on 2 devices; expected fit(..., placement=fnet.")


class Row:
    """An example by its number, as grain's workers take it."""

    def __call__(self, i):
        inputs, targets = resumable.parts()[2]
        return inputs[i], targets[i]


@pytest.mark.slow
def test_a_stream_of_grain_with_workers_is_resumed_to_the_bit(tmp_path):
    grain, flags = pytest.importorskip("grain"), pytest.importorskip("absl.flags")
    flags.FLAGS([""])  # grain's processes ask for them
    rows = grain.MapDataset.range(resumable.EXAMPLES).shuffle(seed=3).repeat().map(Row()).to_iter_dataset().batch(8)
    stream = fnet.data.Stream(rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=2)), resumable.PER_EPOCH)
    step, ts, _, _ = resumable.parts()
    straight, _ = fnet.fit(step, ts, stream, epochs=3)
    run = fnet.Run(tmp_path / "run", save_every=3)
    fnet.fit(step, ts, stream, epochs=3, run=run, observers=[stop_at(10)], chunk_steps=5)
    resumed, _ = fnet.fit(step, ts, stream, epochs=3, run=run._replace(resume=True))
    assert_same_bits(resumed, straight)


# --- what a fourth pair of eyes broke --------------------------------------------------------------------------------


def test_a_run_is_resumed_with_the_state_that_it_returned_though_its_numbers_have_moved(tmp_path):
    from fnet.optimizers import reduce_on_plateau, sgd

    inputs, targets = resumable.parts()[2]
    model, optimizer = fnet.mlp(4, 2), reduce_on_plateau(sgd(3.0), window=2, patience=1)
    params, state = fnet.init(model, jax.random.key(0), inputs[:1])
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
    data, run = fnet.Batch(inputs, targets), fnet.Run(tmp_path / "run", resume="auto")
    end, _ = fnet.fit(step, start, data, epochs=4, batch_size=8, run=run)
    moved, begun = (dict(named_leaves(ts))["opt_state/optimizer/hyper/learning_rate"] for ts in (end, start))
    assert moved < begun
    straight, _ = fnet.fit(step, start, data, epochs=6, batch_size=8)
    fnet.fit(step, end, data, epochs=5, batch_size=8, run=run)
    resumed, _ = fnet.fit(step, start, data, epochs=6, batch_size=8, run=run)
    assert_same_bits(resumed, straight)


def test_a_configuration_may_hold_arrays_and_keys_that_are_numbers_in_any_order(tmp_path):
    run = fnet.Run(tmp_path / "run", {"a": jnp.float32(0.5), "b": np.arange(3), "c": {10: 0.1, 1: jnp.arange(2)}})
    with open_run(run) as opened:
        opened.begin([])
    same = {"c": {1: [0, 1], 10: 0.1}, "b": [0, 1, 2], "a": 0.5}
    with open_run(run._replace(config=same, resume=True)) as opened:
        assert opened.config == {"a": 0.5, "b": [0, 1, 2], "c": {"10": 0.1, "1": [0, 1]}}


class Bytes(resumable.Reader):
    """A reader whose state is bytes, as that of grain's DataLoader is."""

    def get_state(self):
        return str(self.at).encode()

    def set_state(self, state):
        self.at = int(state)


def test_a_streams_state_may_be_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "Reader", Bytes)
    resumed_is_straight(tmp_path, source="stream", epochs=6)


def test_a_run_without_its_rule_is_told_so_and_not_of_another_model(folder):
    step, ts, arrays, evaluate = resumable.parts()
    run = fnet.Run(folder, {"optimizer": "noisy"}, resume=True)
    options = {"evaluate": evaluate, "validation": arrays, "evaluate_every": (4, "steps"), "run": run}
    with pytest.raises(fnet.RunError, match=r"rule to stop: expected 'early_stopping by the least validation_loss'"):
        fnet.fit(step, ts, fnet.Batch(*arrays), epochs=6, batch_size=8, **options)
