"""Observers and reports: what they write is what the run measured, and nothing of it changes the run."""

from __future__ import annotations

import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnet
from fnet.metrics import accuracy, confusion, gradient_norms
from fnet.observers import jsonl, progress
from fnet.report import difference_table, engine_table, plot_confusion, plot_curves


def small_fit(observers, epochs=3):
    model, optimizer = fnet.mlp(4, 2), fnet.adam(0.01)
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    data = fnet.Batch(x, (x.sum(1) > 0).astype(np.int32))
    params, state = fnet.init(model, jax.random.key(0), x[:1])
    gradient = fnet.backprop(model, fnet.softmax_cross_entropy, {"confusion": confusion(2)})
    step = fnet.make_step(gradient, optimizer, {"gradient_norm": gradient_norms})
    ts = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
    evaluate = fnet.make_evaluate(model, fnet.softmax_cross_entropy, {"accuracy": accuracy})
    return fnet.fit(
        step, ts, data, epochs=epochs, batch_size=8, evaluate=evaluate, validation=data, observers=observers
    )


def test_jsonl_appends_one_row_an_epoch_with_every_metric(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kept": true}\n')
    _, history = small_fit([jsonl(path, engine="backprop")])
    kept, *rows = map(json.loads, path.read_text().splitlines())
    assert kept == {"kept": True}
    assert [(row["engine"], row["epoch"], row["step"]) for row in rows] == [("backprop", i, 3 * i) for i in (1, 2, 3)]
    for name, values in history.epochs.items():
        np.testing.assert_array_equal([row[name] for row in rows], values)
    assert {"loss", "validation_loss", "validation_accuracy", "learning_rate", "gradient_norm/dense_0"} <= set(rows[0])
    np.testing.assert_allclose(np.sum(rows[0]["confusion"]), 1)


def test_progress_prints_one_line_an_epoch_where_there_is_no_terminal():
    out = io.StringIO()
    _, history = small_fit([progress("run", Console(file=out, width=60))])
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1] == (
        f"run: epoch 2/3  loss {history.epochs['loss'][1]:.4f}  "
        f"validation loss {history.epochs['validation_loss'][1]:.4f}  "
        f"validation accuracy {history.epochs['validation_accuracy'][1]:.4f}"
    )


def test_progress_shows_a_bar_from_the_start_on_while_it_compiles_within_80_columns():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    shown_before_the_first_compilation = []

    def look(event):
        if event.kind == "compile":
            shown_before_the_first_compilation.append("run: compiling" in out.getvalue())

    _, history = small_fit([look, progress("run", console)])
    assert shown_before_the_first_compilation[0]
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    last = [line for line in re.split(r"[\r\n]+", text) if line.strip()][-1]
    assert "3/3" in last and len(last) <= 80
    assert f"validation accuracy {history.epochs['validation_accuracy'][-1]:.4f}" in last


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
