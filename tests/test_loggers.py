"""Runs in Weights & Biases and in MLflow: what their own files hold is what the run measured, and how it ended.

Both are written without a network. Neither is installed by the extra `test` (together 180 MB), so both may be missing;
what can be is tested with a stand-in.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.runs.observers import mlflow, wandb
from tests.test_observers import small_fit, told


@dataclasses.dataclass
class Adam:
    learning_rate: float = 0.01
    betas: tuple = (0.9, 0.999)


CONFIG = {
    "optimizer": Adam(),
    "seed": np.int64(3),
    "dtype": jnp.float32,
    "rates": jnp.ones(2),
    "data": {},
    "note": None,
}


def failing(event):
    if event.kind == "chunk" and event.step >= 4:
        raise RuntimeError("disk full")


def killed_by(number):
    def send(event):
        if event.kind == "chunk" and event.step == 4:
            signal.raise_signal(number)  # once: a second SIGINT leaves at once
            time.sleep(0.1)  # another thread takes note of it

    return send


def expected_of(history, chunks):
    """What the loggers should hold of `small_fit`, metric by metric and step by step."""
    expected = {f"chunk/{name}": {} for name in ("loss", "accuracy")}
    for event in chunks:
        for name in ("loss", "accuracy"):
            expected[f"chunk/{name}"][event.step] = float(event.metrics[name])
    for name in ("validation_loss", "validation_accuracy"):
        values = zip(history.evaluations["step"], history.evaluations[name], strict=True)
        expected[f"evaluation/{name}"] = {int(step): float(value) for step, value in values}
    for name in ("loss", "accuracy", "validation_loss"):
        expected[f"epoch/{name}"] = {
            3 * i: float(value) for i, value in enumerate(history.epochs[name], 1) if np.isfinite(value)
        }
    return expected


def watched(observers, **options):
    """The state, and what the loggers should hold, of a run whose evaluations lie within its chunks."""
    chunks = []
    note = lambda event: chunks.append(event) if event.kind == "chunk" else None  # noqa: E731
    options = {"evaluate_every": (2, "steps"), "chunk_steps": 5, **options}
    end, history = small_fit([note, *observers], **options)
    return end, expected_of(history, chunks)


# --- with what stands in for the libraries ---------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """W&B, as far as the observer uses it; its runs."""
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.rows, self.codes, self.step, self.config = options, [], [], 0, {}
            self.config = SimpleNamespace(update=lambda config, allow_val_change: self.options.update(config=config))
            runs.append(self)

        def log(self, numbers, step):
            assert step >= self.step  # W&B leaves out what is older
            self.step = step
            self.rows.append((step, numbers))

        def finish(self, exit_code):
            self.codes.append(exit_code)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Run))
    return runs


def by_metric(rows):
    found = {}
    for step, numbers in rows:
        for name, value in numbers.items():
            assert step not in found.setdefault(name, {})
            found[name][step] = value
    return found


def test_each_step_is_one_row_in_rising_order_though_chunks_are_told_before_what_is_in_them(stand_in):
    observe = wandb(project="digits", config=CONFIG)
    assert stand_in == []  # nothing is begun before the run is
    _, expected = watched([observe])
    (run,) = stand_in
    assert [step for step, _ in run.rows] == [2, 3, 4, 5, 6, 8, 9] and run.codes == [0]
    found = by_metric(run.rows)
    assert {name: found[name] for name in expected} == expected
    assert "chunk/gradient_norm/dense_0" in found and not any("confusion" in name for name in found)
    assert run.options["project"] == "digits" and run.options["config"] == {
        "optimizer": {"learning_rate": 0.01, "betas": [0.9, 0.999]},
        "seed": 3,
        "dtype": str(jnp.float32),
        "rates": [1.0, 1.0],
        "data": {},
        "note": None,
    }


@pytest.mark.parametrize(
    ("spoil", "error", "code"),
    [
        (failing, RuntimeError, 1),
        (killed_by(signal.SIGINT), fnet.Interrupted, 255),
        (killed_by(signal.SIGTERM), fnet.Terminated, 255),
    ],
)
def test_how_a_run_ended_is_known_also_to_what_ends_it_elsewhere(stand_in, spoil, error, code):
    try:
        raise KeyError("the caller's own, which it handles")
    except KeyError:
        with pytest.raises(error):
            small_fit([wandb(), spoil], epochs=40)
        small_fit([wandb()], epochs=1)
    assert [run.codes for run in stand_in] == [[code], [0]]
    assert stand_in[0].rows[-1][0] == 4  # what the last chunk measured is there


def test_an_observer_that_fails_to_begin_ends_with_the_error_of_the_library(monkeypatch):
    def refuse(**options):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(OSError, match="no network") as caught:
        small_fit([wandb()])
    assert len(caught.value.__notes__) == 1


def test_a_run_that_is_given_is_left_running_and_what_it_has_is_not_logged_again(stand_in):
    run = sys.modules["wandb"].init()
    half, _ = small_fit([], epochs=2)
    small_fit([wandb(run=run)], epochs=3)
    small_fit([wandb(run=run)], epochs=4, ts=half)
    assert run.codes == [] and len(stand_in) == 1
    steps = [step for step, _ in run.rows]
    assert steps == [2, 3, 4, 6, 8, 9, 9, 10, 12]  # W&B has one row for 9, with what both had for it


@pytest.mark.parametrize("observer", [wandb, mlflow])
def test_what_is_missing_or_makes_no_sense_is_named(observer, monkeypatch):
    name = observer.__name__
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name} needs {name}: pip install 'fnet-jax\[loggers\]'"):
        observer()
    monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    for config in ([1], Adam, "a.json"):
        with pytest.raises(TypeError, match=f"{name}: config is a .*; expected a dataclass or a mapping"):
            observer(config=config)
    with pytest.raises(ValueError, match=f"{name}: run and .*name.* are given; expected "):
        observer(run=object(), name="a")


# --- Weights & Biases ------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B itself, which reads and writes in this test's folder only, and leaves no process and no thread."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    library = pytest.importorskip("wandb")
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name.lower()))
    (tmp_path / "dir").mkdir()
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    before = set(threading.enumerate())
    yield library
    library.teardown()
    assert [thread.name for thread in threading.enumerate() if thread not in before] == []
    assert children("wandb") == []


def children(name):
    """This process' own that have the name and run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        state, parent = text.rsplit(")", 1)[1].split()[:2]
        if int(parent) == os.getpid() and f"({name}" in text and state != "Z":
            found.append(stat.parent.name)
    return found


def wandb_records(path):
    """What a .wandb file holds: LevelDB's log format, blocks of 32 KiB with records in up to several pieces."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        if kind in (1, 4):  # all of a record, or its last piece
            yield internal.Record.FromString(whole)
            whole = b""
        at += 7 + length


def wandb_runs(folder):
    """Of each run, in the order of their ends: id, configuration, rows and exit codes."""
    pytest.importorskip("wandb").teardown()  # waits for the process that writes: `finish` does not
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        run = SimpleNamespace(config={}, rows=[], codes=[], id=None)
        for record in wandb_records(path):
            if record.HasField("run"):
                run.id = record.run.run_id
            for item in [*record.run.config.update, *record.config.update]:
                run.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("history"):
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                run.rows.append((int(row.pop("_step")), {k: float(v) for k, v in row.items() if k[0] != "_"}))
            if record.HasField("exit"):
                run.codes.append(record.exit.exit_code)
        runs.append(run)
    return runs


def test_weights_and_biases_holds_every_scalar_at_its_step_and_the_configuration(offline, tmp_path):
    _, expected = watched([wandb(project="digits", id="a", config=CONFIG)])
    (run,) = wandb_runs(tmp_path / "dir")
    found = by_metric(run.rows)
    assert {name: found[name] for name in expected} == expected
    assert not any("confusion" in name for name in found)
    assert run.id == "a" and run.codes == [0] and offline.run is None
    config = {name: value for name, value in run.config.items() if name != "_wandb"}
    assert config["optimizer"] == {"learning_rate": 0.01, "betas": [0.9, 0.999]}
    assert config["seed"] == 3 and config["rates"] == [1.0, 1.0] and config["note"] is None


def test_weights_and_biases_knows_a_run_that_failed(offline, tmp_path):
    with pytest.raises(RuntimeError, match="disk full"):
        small_fit([wandb(), failing])
    (run,) = wandb_runs(tmp_path / "dir")
    assert run.codes == [1] and run.rows[-1][0] == 4


def test_weights_and_biases_takes_numbers_that_are_not_finite(offline, tmp_path):
    observe = wandb()
    for event in (told("start", 0), told("chunk", 1, {"loss": np.nan, "b@/[c]": np.inf}), told("end", 1)):
        observe(event)
    ((step, numbers),) = wandb_runs(tmp_path / "dir")[0].rows
    assert step == 1 and np.isnan(numbers["chunk/loss"]) and numbers["chunk/b@/[c]"] == np.inf


def test_a_run_of_weights_and_biases_that_goes_on_has_each_step_once_and_is_finished_by_who_began_it(offline, tmp_path):
    run = offline.init(id="b")
    half, _ = small_fit([], epochs=2)
    small_fit([wandb(run=run, config={"epochs": 3})], epochs=3)
    small_fit([wandb(run=run, config={"epochs": 4})], epochs=4, ts=half)
    assert offline.run is run and run.config["epochs"] == 4
    run.finish()
    (found,) = wandb_runs(tmp_path / "dir")
    assert [step for step, _ in found.rows] == [2, 3, 4, 6, 8, 9, 10, 12] and found.codes == [0]
    assert by_metric(found.rows)["epoch/loss"] == dict(zip((3, 6, 9, 12), history_of(4), strict=True))


def history_of(epochs):
    return small_fit([], epochs=epochs)[1].epochs["loss"].tolist()


def test_a_run_beside_an_active_one_of_weights_and_biases_is_another(offline, tmp_path):
    own = offline.init(id="own")
    small_fit([wandb(id="fit")], epochs=1)
    time.sleep(1.1)  # the folders' names have the second and the id
    small_fit([wandb(id="fit", resume="allow")], epochs=1)  # offline, nothing of the first is known
    own.log({"mine": 1.0})
    own.finish()
    runs = wandb_runs(tmp_path / "dir")
    assert sorted(run.id for run in runs) == ["fit", "fit", "own"] and all(run.codes == [0] for run in runs)
    assert {run.id: len(run.rows) for run in runs} == {"fit": 2, "own": 1}


# --- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch):
    """MLflow's client of a folder in this test's."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    library = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    before = set(threading.enumerate())
    yield library.MlflowClient(uri)
    assert [thread.name for thread in threading.enumerate() if thread not in before] == []
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def mlflow_runs(store, experiment):
    found = store.get_experiment_by_name(experiment)
    return store.search_runs([found.experiment_id])[::-1]  # the first begun first


def metrics_of(store, run):
    found = {}
    for name in run.data.metrics:
        values = [(metric.step, metric.value) for metric in store.get_metric_history(run.info.run_id, name)]
        assert len(values) == len(dict(values)), name
        found[name] = dict(values)
    return found


def test_mlflow_holds_every_scalar_at_its_step_and_the_configuration(store):
    _, expected = watched([mlflow("digits", name="first", config=CONFIG)])
    (run,) = mlflow_runs(store, "digits")
    found = metrics_of(store, run)
    assert {name: found[name] for name in expected} == expected
    assert "chunk/gradient_norm/dense_0" in found and not any("confusion" in name for name in found)
    assert run.info.status == "FINISHED" and run.info.run_name == "first" and run.info.end_time
    assert run.data.params == {
        "optimizer.learning_rate": "0.01",
        "optimizer.betas": "[0.9, 0.999]",
        "seed": "3",
        "dtype": str(jnp.float32),
        "rates": "[1.0, 1.0]",
        "data": "{}",
        "note": "None",
    }


@pytest.mark.parametrize(
    ("spoil", "error", "status"),
    [
        (failing, RuntimeError, "FAILED"),
        (killed_by(signal.SIGINT), fnet.Interrupted, "KILLED"),
        (killed_by(signal.SIGTERM), fnet.Terminated, "KILLED"),
    ],
)
def test_mlflow_knows_how_a_run_ended(store, spoil, error, status):
    with pytest.raises(error):
        small_fit([mlflow(), spoil], epochs=40)
    (run,) = mlflow_runs(store, "Default")
    assert run.info.status == status and max(metrics_of(store, run)["chunk/loss"]) == 4


def test_a_run_of_mlflow_that_is_continued_has_each_step_once_and_keeps_its_parameters(store):
    half, _ = small_fit([], epochs=2)
    with pytest.raises(RuntimeError):
        small_fit([mlflow("cut", config={"epochs": 3}), fail_late], epochs=3)
    (run,) = mlflow_runs(store, "cut")
    assert run.info.status == "FAILED" and list(metrics_of(store, run)["epoch/loss"]) == [3, 6]
    seen = []
    status = lambda event: seen.append(store.get_run(run.info.run_id).info.status)  # noqa: E731
    observers = [mlflow(run_id=run.info.run_id, config={"epochs": 4, "host": "b"}), status]
    small_fit(observers, epochs=4, ts=half)
    (run,) = mlflow_runs(store, "cut")
    found = metrics_of(store, run)
    assert found["epoch/loss"] == dict(zip((3, 6, 9, 12), history_of(4), strict=True))
    assert list(found["chunk/loss"]) == [2, 4, 6, 8, 10, 12]
    assert run.data.params == {"epochs": "3", "host": "b"}
    assert seen[0] == "RUNNING" and run.info.status == "FINISHED"


def fail_late(event):
    if event.kind == "chunk" and event.step >= 8:
        raise RuntimeError("power cut")


def test_an_active_run_of_mlflow_is_left_active(store):
    library = sys.modules["mlflow"]
    with library.start_run() as run:
        small_fit([mlflow(run=run)], epochs=1)
        assert store.get_run(run.info.run_id).info.status == "RUNNING"
        small_fit([mlflow("beside")], epochs=1)
        assert library.active_run() is run
    assert set(metrics_of(store, store.get_run(run.info.run_id))) >= {"chunk/loss", "epoch/loss"}
    assert [run.info.status for run in mlflow_runs(store, "beside")] == ["FINISHED"]


def test_mlflow_takes_any_name_any_number_and_any_many(store):
    metrics = {
        "top@5": 0.5,
        "a//b:[0]": 1.0,
        "../c": 2.0,
        "loss": np.nan,
        "up": np.inf,
        "down": -np.inf,
        "many": np.ones(3),
    }
    metrics |= {f"gradient_norm/{i}": float(i) for i in range(2500)}
    observe = mlflow("names", config={"a b/c?": 1, **{f"p{i}": i for i in range(250)}})
    for event in (told("start", 0), told("chunk", 3, metrics), told("end", 3)):
        observe(event)
    (run,) = mlflow_runs(store, "names")
    found = run.data.metrics
    assert len(found) == 2506 and found["chunk/gradient_norm/2499"] == 2499
    assert found["chunk/top_5"] == 0.5 and found["chunk/a/b__0_"] == 1.0 and found["c"] == 2.0
    assert np.isnan(found["chunk/loss"]) and found["chunk/up"] == np.inf and found["chunk/down"] == -np.inf
    assert run.data.params["a b/c_"] == "1" and len(run.data.params) == 251


def test_names_that_mlflow_cannot_tell_apart_are_refused(store):
    observe = mlflow("names")
    observe(told("start", 0))
    observe(told("chunk", 3, {"top@5": 0.5, "top#5": 0.25}))
    with pytest.raises(ValueError, match=r"mlflow: 'chunk/top@5' and 'chunk/top#5' are both 'chunk/top_5' in MLflow"):
        observe(told("end", 3))
