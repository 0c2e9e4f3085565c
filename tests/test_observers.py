"""Observers and reports: what they write is what the run measured, and nothing of it changes the run."""

from __future__ import annotations

import functools
import gc
import io
import itertools
import re
import struct
import tempfile
import time
import weakref
from csv import reader
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import fnet
from fnet.metrics import accuracy, confusion, gradient_histograms, gradient_norms, magnitude_edges
from fnet.report import difference_table, engine_table, plot_confusion, plot_curves, plots
from fnet.runs.observers import (
    csv,
    histograms,
    profile,
    progress,
    samples,
    tensorboard,
    terminate_on_nonfinite,
    time_limit,
)
from tests.test_training import assert_same_bits

PER_EPOCH = 3


@functools.cache
def parts():
    """Step, start, data and evaluation of a small run; the same ones, so that it is compiled once."""
    model, optimizer = fnet.mlp(4, 2), fnet.adam(0.01)
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    data = fnet.Batch(x, (x.sum(1) > 0).astype(np.int32))
    params, state = fnet.init(model, jax.random.key(0), x[:1])
    gradient = fnet.backprop(model, fnet.softmax_cross_entropy, {"accuracy": accuracy, "confusion": confusion(2)})
    monitors = {"gradient_norm": gradient_norms, "gradient_histogram": gradient_histograms()}
    ts = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
    evaluate = fnet.make_evaluate(model, fnet.softmax_cross_entropy, {"accuracy": accuracy})
    return fnet.make_step(gradient, optimizer, monitors), ts, data, evaluate


def small_fit(observers, epochs=3, *, ts=None, chunk_steps=2, **options):
    step, start, data, evaluate = parts()
    options = {"epochs": epochs, "evaluate": evaluate, "validation": data, **options}
    options = {"batch_size": 8, "observers": observers, "chunk_steps": chunk_steps, **options}
    return fnet.fit(step, start if ts is None else ts, data, **options)


def told(kind, step, metrics=None, state=None, **fields):
    """An event of a run of 12 steps in 4 epochs."""
    event = fnet.Event(kind, step, 12, step // PER_EPOCH, 4, metrics or {}, 0.5, 100, state)
    return event._replace(**fields)


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    return io.StringIO()


def frames(out):
    """The lines that a terminal was given, without its control codes."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("where", ["no terminal", "CI"])
def test_progress_prints_one_line_an_epoch_where_there_is_no_terminal(out, where, monkeypatch):
    if where == "CI":
        monkeypatch.setenv("CI", "true")
    _, history = small_fit([progress("run", Console(file=out, width=60, force_terminal=where == "CI", no_color=True))])
    first, *lines = frames(out)
    assert first == "run: compiling" and len(lines) == 3
    assert lines[1] == (
        f"run: epoch 2/3  loss {history.epochs['loss'][1]:.4f}  accuracy {history.epochs['accuracy'][1]:.4f}  "
        f"validation loss {history.epochs['validation_loss'][1]:.4f}  "
        f"validation accuracy {history.epochs['validation_accuracy'][1]:.4f}"
    )


def test_progress_shows_a_bar_from_the_start_on_while_it_compiles_within_80_columns(out):
    small_fit([])  # so that compiling is over before the bar would be drawn by itself
    console = Console(file=out, width=80, force_terminal=True)
    shown_before_the_first_compilation = []

    def look(event):
        if event.kind == "compile":
            shown_before_the_first_compilation.append("run: compiling" in out.getvalue())

    _, history = small_fit([look, progress("run", console)])
    assert shown_before_the_first_compilation[0]
    bar, training, results = frames(out)[-3:]
    assert "run" in bar and "compiling" not in bar and bar.rstrip().endswith("epoch 3/3  step 9/9 0:00:00")
    loss, count = (
        np.average(history.steps[name][-1:], weights=[4]) for name in ("loss", "accuracy")
    )  # the last chunk is the ninth step alone
    assert training.startswith(f"loss {loss:.4f}  accuracy {count:.4f}  learning rate 1.00e-02  ")
    assert training.endswith(" examples/s")
    assert results == (
        f"validation loss {history.epochs['validation_loss'][-1]:.4f}  "
        f"validation accuracy {history.epochs['validation_accuracy'][-1]:.4f}"
    )


def test_progress_has_room_for_long_runs_in_80_columns_and_gives_the_time_left(out, monkeypatch):
    clock = itertools.count(0.0, 0.5)
    console = Console(file=out, width=80, force_terminal=True, get_time=lambda: 0.0)
    observe = progress("a rather long title of [bold]a run", console)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    metrics = {"loss": np.float64(0.125), "accuracy": 0.5, "learning_rate": 1e-3, "confusion": np.eye(2)}
    results = {"validation_accuracy": 0.75, "validation_loss": 0.25, "test_accuracy": 0.5, "test_loss": 2.0}
    long = {"steps": 2_500_000, "epochs": 20_000}
    observe(told("start", 0, **long))
    for step in (1_000_000, 1_500_000, 2_000_000):
        observe(told("chunk", step, metrics, epoch=step // 125, examples=20_500, **long))
    observe(told("evaluation", 2_000_000, results, epoch=16_000, **long))
    observe(told("end", 2_000_000, epoch=16_000, **long))
    bar, training, evaluated = frames(out)[-3:]
    assert max(map(len, (bar, training, evaluated))) <= 80
    assert "a rather long title…" in bar and "epoch 16000/20000  step 2000000/2500000" in bar
    assert re.search(r"\d:\d\d:\d\d *$", bar)
    assert training == "loss 0.1250  accuracy 0.5000  learning rate 1.00e-03  41,000 examples/s"
    assert evaluated.startswith("validation loss 0.2500  validation accuracy 0.7500  test loss 2.0000  test")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_where_a_run_continues(out, terminal):
    half, _ = small_fit([], epochs=2)
    small_fit([progress("run", Console(file=out, width=80, force_terminal=terminal))], epochs=3, ts=half)
    assert frames(out)[0] == "run: continues at step 6/9, epoch 2/3"
    assert terminal or (len(frames(out)) == 3 and frames(out)[1] == "run: compiling")


# --- csv -------------------------------------------------------------------------------------------------------------


def read_csv(path):
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def test_csv_has_a_row_an_epoch_with_every_number_exactly(tmp_path):
    path = tmp_path / "new" / "run.csv"
    _, history = small_fit([csv(path)])
    columns = read_csv(path)
    assert columns["epoch"] == ["1", "2", "3"] and columns["step"] == ["3", "6", "9"]
    assert "gradient_histogram/dense_0[15]" in columns
    for name, values in history.epochs.items():
        for place in np.ndindex(values.shape[1:]):
            column = columns[name + "".join(f"[{i}]" for i in place)]
            assert [float(cell) for cell in column] == values[(slice(None), *place)].tolist()


def test_a_metric_that_appears_after_the_first_row_of_a_csv_is_named(tmp_path):
    options = {"evaluate_every": (2, "epochs")}
    message = r"csv: validation_accuracy, validation_loss in epoch 2, but .*run.csv has the columns .*loss.*names="
    with pytest.raises(ValueError, match=message):
        small_fit([csv(tmp_path / "run.csv")], epochs=4, **options)
    names = ["loss", "validation_loss"]
    _, history = small_fit([csv(tmp_path / "named.csv", names=names)], epochs=4, **options)
    columns = read_csv(tmp_path / "named.csv")
    assert list(columns) == ["epoch", "step", *names]
    assert columns["validation_loss"][0] == columns["validation_loss"][2] == ""
    assert float(columns["validation_loss"][3]) == history.epochs["validation_loss"][3]


def test_a_csv_that_is_continued_is_that_of_the_straight_run(tmp_path):
    small_fit([csv(tmp_path / "straight.csv")], epochs=4)
    path = tmp_path / "cut.csv"
    half, _ = small_fit([], epochs=2)
    small_fit([csv(path)], epochs=3)  # the process died after epoch 3, and its last checkpoint is that of epoch 2
    with path.open("a") as file:
        file.write("4,1")
    small_fit([csv(path, resume=True)], epochs=4, ts=half)
    assert path.read_bytes() == (tmp_path / "straight.csv").read_bytes()


def test_a_csv_that_exists_or_has_other_columns_is_left_as_it_is(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("date,amount\n")
    with pytest.raises(FileExistsError, match=r"csv: .*run.csv exists already and is left as it is.*resume=True"):
        csv(path)
    with pytest.raises(ValueError, match=r"has the columns date, amount; expected epoch, step, ...: name another file"):
        small_fit([csv(path, resume=True)])
    assert path.read_text() == "date,amount\n"
    path.write_text("epoch,step,loss\n")
    with pytest.raises(ValueError, match="has the columns epoch, step, loss; expected epoch, step, accuracy: name"):
        small_fit([csv(path, names=["accuracy"], resume=True)])
    assert path.read_text() == "epoch,step,loss\n"
    path.write_text("epoch,step,loss\n1,x,2\n2,14,3\n")
    with pytest.raises(
        ValueError, match=r"has the row \['1', 'x', '2'\]; expected one number a column: mend or delete"
    ):
        small_fit([csv(path, resume=True)])
    assert path.read_text() == "epoch,step,loss\n1,x,2\n2,14,3\n"


def test_a_csv_with_a_line_break_in_a_name_is_continued(tmp_path):
    path, metrics = tmp_path / "run.csv", {"a\nb": 1.5}
    for step in (3, 6):
        observe = csv(path, resume=step > 3)
        observe(told("start", step - 3, {}, ()))
        observe(told("epoch", step, metrics, ()))
    with path.open(newline="") as file:
        assert list(reader(file)) == [["epoch", "step", "a\nb"], ["1", "3", "1.5"], ["2", "6", "1.5"]]


# --- tensorboard -----------------------------------------------------------------------------------------------------


def crc32c(data):
    """Castagnoli's CRC, as RFC 3720 gives it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def records(path):
    """The records of a TFRecord file: length, its masked CRC, bytes, their masked CRC."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")

    def checked(data, masked):
        crc = crc32c(data)
        assert masked == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
        return data

    data, at = path.read_bytes(), 0
    while at < len(data):
        length, crc = struct.unpack_from("<QI", data, at)
        checked(data[at : at + 8], crc)
        body, (crc,) = data[at + 12 : at + 12 + length], struct.unpack_from("<I", data, at + 12 + length)
        yield event_pb2.Event.FromString(checked(body, crc))
        at += 16 + length


def scalars_of(path):
    found = {}
    for event in records(path):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_files_hold_every_scalar_at_its_step(tmp_path):
    assert crc32c(b"123456789") == 0xE3069283  # the value in every table of CRCs
    chunks = []
    note = lambda event: chunks.append(event) if event.kind == "chunk" else None  # noqa: E731
    _, history = small_fit([note, tensorboard(tmp_path)], evaluate_every=(2, "steps"))
    (path,) = tmp_path.iterdir()
    found = scalars_of(path)
    single = np.float32
    assert found["epoch/loss"] == {3 * i: single(v) for i, v in enumerate(history.epochs["loss"], 1)}
    evaluations = zip(history.evaluations["step"], history.evaluations["validation_loss"], strict=True)
    assert found["evaluation/validation_loss"] == {step: single(value) for step, value in evaluations}
    assert len(chunks) == 5
    assert found["chunk/loss"] == {event.step: single(event.metrics["loss"]) for event in chunks}
    assert "chunk/gradient_norm/dense_0" in found and not any("confusion" in name for name in found)


def test_tensorboard_itself_reads_a_run_that_was_continued(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    half, _ = small_fit([], epochs=2)
    options = {"histograms": (1, "steps")}
    small_fit([tensorboard(tmp_path, **options)], epochs=3, chunk_steps=1)
    time.sleep(1.1)  # the files' names have the second, by which they are ordered
    _, history = small_fit([tensorboard(tmp_path, resume=True, **options)], epochs=4, ts=half, chunk_steps=1)
    read = events.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0})
    read.Reload()
    assert [event.step for event in read.Scalars("chunk/loss")] == list(range(1, 13))
    assert [event.step for event in read.Scalars("epoch/loss")] == [3, 6, 9, 12]
    assert read.Scalars("epoch/loss")[-1].value == np.float32(history.epochs["loss"][-1])
    assert [event.step for event in read.Histograms("weights/dense_0/w")] == list(range(1, 13))
    assert sum(read.Histograms("weights/dense_0/w")[0].histogram_value.bucket) == 12


def test_tensorboard_refuses_the_files_of_another_run(tmp_path):
    small_fit([tensorboard(tmp_path)])
    with pytest.raises(FileExistsError, match=r"tensorboard: .* exists already and is left as it is"):
        tensorboard(tmp_path)


# --- histograms ------------------------------------------------------------------------------------------------------


def test_histograms_count_every_weight_and_every_gradient_at_the_chunks_end(tmp_path):
    means = {}
    keep = lambda event: means.update({event.step: event.metrics}) if event.kind == "chunk" else None  # noqa: E731
    end, _ = small_fit([keep, histograms(tmp_path, bins=5)], epochs=4)
    # chunks end at 2, 4, ..., so epochs 1 and 3 are seen a step late
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"histograms_{step:09d}.npz" for step in (4, 6, 10, 12)]
    last = np.load(tmp_path / "histograms_000000012.npz")
    weights = np.asarray(end.params["dense_1"]["w"], np.float64)
    edges = np.linspace(weights.min(), weights.max(), 6)
    np.testing.assert_array_equal(last["weights/dense_1/w/edges"], edges)
    inside = [((weights >= low) & (weights < high)).sum() for low, high in itertools.pairwise(edges)]
    inside[-1] += (weights == edges[-1]).sum()
    np.testing.assert_array_equal(last["weights/dense_1/w/counts"], inside)
    counts, edges = (last[f"gradient_histogram/dense_0/{part}"] for part in ("counts", "edges"))
    np.testing.assert_array_equal(counts, means[12]["gradient_histogram/dense_0"])
    assert counts.sum() == 16 and edges.tolist() == [-np.inf, *range(-12, 3), np.inf]


def test_histograms_go_to_event_files_too(tmp_path):
    small_fit([histograms(tmp_path / "npz", bins=5), tensorboard(tmp_path / "tb", histograms=(1, "epochs"), bins=5)])
    (path,) = (tmp_path / "tb").iterdir()
    found = {(e.step, v.tag): v.histo for e in records(path) for v in e.summary.value if v.HasField("histo")}
    for step in (4, 6, 9):
        saved = np.load(tmp_path / "npz" / f"histograms_{step:09d}.npz")
        weights = found[step, "weights/dense_0/w"]
        assert list(weights.bucket) == [0, *saved["weights/dense_0/w/counts"]]
        assert list(weights.bucket_limit) == saved["weights/dense_0/w/edges"].tolist()
        gradients = found[step, "gradient_histogram/dense_0"]
        assert list(gradients.bucket) == [0, *saved["gradient_histogram/dense_0/counts"]]
        assert list(gradients.bucket_limit) == list(range(-13, 4)) and gradients.num == 16


def test_weights_that_are_not_finite_or_of_16_bits_are_counted_as_far_as_they_go(tmp_path):
    observe = histograms(tmp_path, every=(1, "steps"), bins=2)
    params = {"a": jnp.array([jnp.nan, 1, 2, jnp.inf]), "b": jnp.array([1, 3], jnp.bfloat16), "n": jnp.arange(3)}
    state = parts()[1]._replace(params=params, step=jnp.asarray(1))
    observe(told("start", 0, state=state))
    observe(told("chunk", 1, state=state))
    found = np.load(tmp_path / "histograms_000000001.npz")
    assert {name: found[name].tolist() for name in found} == {
        "weights/a/counts": [1, 1],
        "weights/a/edges": [1, 1.5, 2],
        "weights/b/counts": [1, 1],
        "weights/b/edges": [1, 2, 3],
    }


@pytest.mark.parametrize("bins", [1, 3])
def test_gradient_histograms_count_by_powers_of_ten(bins):
    rng = np.random.default_rng(0)
    magnitudes = 10 ** rng.uniform(-14, 4, 5000)
    grads = np.concatenate([magnitudes * rng.choice([-1, 1], 5000), [0, -0.0, 1e-12, 0.001, 100, np.inf, -np.inf]])
    grads = grads.astype(np.float32)
    edges = np.asarray([0, *10 ** magnitude_edges(bins), np.inf]).astype(np.float32)
    expected = [((abs(grads) >= low) & (abs(grads) < high)).sum() for low, high in itertools.pairwise(edges)]
    expected[-1] += 2  # the infinite ones
    tree = {"one": {"w": grads[:4000].reshape(100, 40), "b": grads[4000:]}, "none": (), "nan": np.full(3, np.nan, "f4")}
    found = jax.jit(gradient_histograms(bins))(tree)
    assert found.keys() == {"one", "nan"} and found["one"].shape == (14 * bins + 2,)
    np.testing.assert_array_equal(found["one"], expected)
    assert sum(expected) == grads.size and not found["nan"].any()
    assert gradient_histograms(bins)(jnp.ones(4, jnp.bfloat16))["all"][1 + 12 * bins] == 4
    if bins == 1:
        assert magnitude_edges(1).tolist() == list(range(-12, 3))


# --- samples, traces, ends -------------------------------------------------------------------------------------------


def test_samples_are_written_once_for_each_state_at_evaluations(tmp_path):
    seen = []

    def text(state):
        seen.append(int(state.step))
        return f"at {int(state.step)}\n"

    def arrays(state):
        return {"file": state.params["dense_0"]["w"], "half": jnp.ones(2, jnp.bfloat16), "words": ["a", "b"]}

    observers = [
        samples(text, tmp_path / "text", every=(2, "steps")),
        samples(arrays, tmp_path / "arrays"),
        samples(lambda state: state.step, tmp_path / "one", every=(4, "epochs")),
    ]
    end, _ = small_fit(observers, epochs=4, chunk_steps=5, evaluate_every=(1, "steps"))
    assert seen == [5, 10, 12]  # where chunks end: that at 5 holds five evaluations
    assert {path.name: path.read_text() for path in (tmp_path / "text").iterdir()} == {
        f"sample_{step:09d}.txt": f"at {step}\n" for step in seen
    }
    assert sorted(path.stem for path in (tmp_path / "arrays").iterdir()) == [f"sample_{step:09d}" for step in seen]
    saved = np.load(tmp_path / "arrays" / "sample_000000012.npz")
    np.testing.assert_array_equal(saved["file"], end.params["dense_0"]["w"])
    assert saved["half"].dtype == np.float32 and [str(saved[f"words/{i}"]) for i in (0, 1)] == ["a", "b"]
    (one,) = (tmp_path / "one").iterdir()
    assert np.load(one)["sample"] == 12


def test_numbered_files_of_a_continued_run_are_those_of_the_straight_one(tmp_path):
    def both(folder, **options):
        text = lambda state: str(float(state.params["dense_0"]["w"].sum()))  # noqa: E731
        return [histograms(folder, **options), samples(text, folder, **options)]

    half, _ = small_fit([], epochs=2)
    small_fit(both(tmp_path / "straight"), epochs=4)
    small_fit(both(tmp_path / "cut"), epochs=3, chunk_steps=1)
    stale = tmp_path / "cut" / "sample_000000099.txt"
    stale.write_text("of a run that got further")
    for observer in (histograms, lambda folder: samples(str, folder)):
        with pytest.raises(FileExistsError, match="cut exists already and is left as it is"):
            observer(tmp_path / "cut")
    small_fit(both(tmp_path / "cut", resume=True), epochs=4, ts=half)
    contents = lambda folder: {path.name: path.stat().st_size for path in folder.iterdir()}  # noqa: E731
    cut, straight = contents(tmp_path / "cut"), contents(tmp_path / "straight")
    late = {name.replace("0004", "0003") for name in straight if "0004" in name}  # chunks of one step end at 3
    assert cut.keys() == (straight.keys() - {name for name in straight if "0004" in name}) | late
    for name in cut.keys() & straight.keys():
        if name.endswith(".txt"):
            assert (tmp_path / "cut" / name).read_text() == (tmp_path / "straight" / name).read_text()


def test_objects_are_not_pickled(tmp_path):
    with pytest.raises(ValueError, match=r"[Oo]bject") as caught:
        small_fit([samples(lambda state: [object()], tmp_path)])
    assert "raised by the observer samples" in caught.value.__notes__[0]
    assert not list(tmp_path.glob("sample_*"))


@pytest.mark.parametrize(
    ("first", "last", "expected"), [(2, 6, (2, 6)), (3, 5, (4, 6)), (0, 1, (0, 2)), (7, 50, (8, 9)), (5, 6, (6, 8))]
)
def test_a_trace_begins_and_ends_where_chunks_do(first, last, expected, tmp_path, monkeypatch):
    calls, at = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append(at[-1]))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(at[-1]))
    small_fit([lambda event: at.append(event.step), profile(tmp_path, first, last)])
    assert tuple(calls) == expected


def test_a_trace_is_written_for_a_run_that_fails_too(tmp_path):
    def failing(event):
        if event.step >= 4:
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        small_fit([profile(tmp_path, 2, 8), failing])
    assert [path.stat().st_size > 0 for path in tmp_path.rglob("*.xplane.pb")] == [True]


def test_a_time_limit_stops_the_run_at_the_end_of_a_chunk(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit = time_limit(10)

    def pass_time(event):
        now[0] += 3 * (event.kind == "chunk")

    end, _ = small_fit([pass_time, limit], epochs=9)
    assert int(end.step) == 8  # 4 chunks of 2 steps in 12 seconds
    end, _ = small_fit([pass_time, limit], epochs=9)  # and again from its start
    assert int(end.step) == 8


def test_a_loss_that_is_not_finite_ends_a_run_that_does_not_check():
    step, ts, data, _ = parts()
    huge = ts._replace(params=jax.tree.map(lambda leaf: leaf * 1e38, ts.params))
    options = {"epochs": 9, "batch_size": 8, "chunk_steps": 2, "check_finite": False}
    end, history = fnet.fit(step, huge, data, observers=[terminate_on_nonfinite()], **options)
    assert int(end.step) == 2 and not np.isfinite(history.steps["loss"]).all()
    assert terminate_on_nonfinite()(told("evaluation", 3, {"test_loss": np.nan})) == "stop"
    assert terminate_on_nonfinite()(told("chunk", 3, {"loss": 1.0, "confusion": np.nan})) == "continue"


def all_observers(folder):
    return [
        progress("run", Console(file=io.StringIO(), width=80, force_terminal=True)),
        csv(folder / "run.csv"),
        tensorboard(folder / "events", histograms=(1, "steps")),
        histograms(folder / "histograms", every=(1, "steps")),
        samples(lambda state: state.params, folder / "samples", every=(1, "steps")),
        profile(folder / "trace", 1, 4),
        time_limit(1e6),
        terminate_on_nonfinite(),
    ]


@settings(max_examples=4, deadline=None, derandomize=True)
@given(chunk_steps=st.integers(1, 13), keep=st.booleans())
def test_observers_change_no_bit_of_a_run(chunk_steps, keep):
    bare, bare_history = small_fit([], epochs=4)
    with tempfile.TemporaryDirectory() as folder:
        end, history = small_fit(all_observers(Path(folder)), epochs=4, chunk_steps=chunk_steps, keep=keep)
    assert_same_bits(end, bare)
    assert_same_bits(history[:3], bare_history[:3])


def test_no_observer_holds_a_state_after_its_call(tmp_path):
    _, ts, _, _ = parts()
    observers = all_observers(tmp_path)
    alive = []
    metrics = {"loss": 1.0, "accuracy": 0.5}
    for kind, step in (
        ("start", 0),
        ("compile", 0),
        ("chunk", 3),
        ("evaluation", 3),
        ("epoch", 3),
        ("chunk", 6),
        ("end", 6),
    ):
        state = jax.tree.map(jnp.copy, ts)._replace(step=jnp.asarray(step))
        alive += [weakref.ref(leaf) for leaf in jax.tree.leaves((state.step, state.params))]
        event = told(kind, step, metrics if kind in ("chunk", "epoch") else {}, state)
        for observe in observers:
            observe(event)
        del state, event
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
    assert len(list((tmp_path / "samples").iterdir())) == 1 and len(list((tmp_path / "histograms").iterdir())) == 2


# --- reports ---------------------------------------------------------------------------------------------------------


def printed(table):
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    return out.getvalue()


def test_difference_table_is_relative_to_each_leaf_and_in_the_order_given():
    first = {"a": {"w": jnp.asarray([1.0, 100.0])}, "b": {"w": jnp.asarray([1e-6])}}
    second = {"a": {"w": jnp.asarray([1.0, 101.0])}, "b": {"w": jnp.asarray([2e-6])}}
    lines = printed(difference_table("t", {"start": (first, second)}, ["b/w", "a/w"])).splitlines()
    rows = [line for line in lines if "/w" in line]
    assert "b/w" in rows[0] and "1.0e+00" in rows[0]
    assert "a/w" in rows[1] and "1.0e-02" in rows[1]


def test_engine_table_has_a_column_for_each_engine():
    text = printed(engine_table("t", {"loss": {"autodiff": "1", "backprop": "2"}, "only": {"backprop": "3"}}))
    assert text.index("autodiff") < text.index("backprop") and "only" in text


@pytest.mark.parametrize("draw", ["curves", "confusion"])
def test_pictures_are_written(draw, tmp_path):
    from matplotlib.image import imread

    if draw == "curves":
        _, history = small_fit([])
        plot_curves({"run": history.epochs}, tmp_path / "p.png")
    else:
        plot_confusion(np.asarray([[5, 1], [0, 7]]), tmp_path / "p.png")
    picture = imread(tmp_path / "p.png")
    assert min(picture.shape[:2]) >= 400 and picture[..., :3].std() > 0.01


def test_curves_have_titles_whole_epochs_and_names_for_chance_and_the_best_epoch(tmp_path, monkeypatch):
    figures, original = [], plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *a, **o: figures.append(original(*a, **o)) or figures[-1])
    run = {"epoch": np.arange(1, 4), "loss": np.array([1.0, 0.5, 0.2]), "accuracy": np.array([0.1, 0.5, 0.9])}
    run |= {"validation_loss": np.array([0.9, 0.6, 0.7]), "gradient_norm/all": np.array([3.0, 2.0, 1.0])}
    plot_curves({"a": run, "b": run}, tmp_path / "p.png", chance={"accuracy": 0.1})
    panels = {ax.get_title(): ax for ax in figures[0][1]}
    assert list(panels) == ["loss (logarithmic)", "accuracy", "norm of the gradient (logarithmic)"]
    names = [{line.get_label(): line.get_xydata() for line in ax.lines} for ax in panels.values()]
    for ax in panels.values():
        assert ax.get_xlabel() == "epoch" and all(tick == round(tick) for tick in ax.get_xticks())
    best = "lowest validation loss, epoch 2"
    assert [best in lines for lines in names] == [True, True, False]
    np.testing.assert_array_equal(names[0][best][:, 0], 2)
    assert ["chance, 0.1" in lines for lines in names] == [False, True, False]
    np.testing.assert_array_equal(names[1]["chance, 0.1"][:, 1], 0.1)
