"""Every experiment takes the same options; one that would do nothing is refused; a run is resumed by its folder."""

from __future__ import annotations

import dataclasses
import importlib
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import keras_example, mazur
from experiments.common import Options

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "experiments").glob("*.py") if path.stem != "common")


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_takes_the_shared_options(name):
    config = importlib.import_module(f"experiments.{name}").Config
    assert issubclass(config, Options)
    names = {field.name for field in dataclasses.fields(config)}
    assert {"resume", "run_dir", "seed", "engine", "steps", "quiet", "explain", "cache", "name"} <= names


@pytest.mark.parametrize("option", [{"resume": True}, {"steps": 3}, {"engine": "backprop"}, {"seed": 1}, {"name": "a"}])
def test_an_option_without_effect_is_refused(option):
    with pytest.raises(SystemExit, match=f"mazur: --{next(iter(option))} would do nothing here; leave it out"):
        mazur.run(mazur.Config(**option), Console(file=io.StringIO()))


def keras(tmp_path, **options):
    out = io.StringIO()
    config = keras_example.Config(**{"run_dir": tmp_path, "examples": 80, "batch_size": 32, "epochs": 4, **options})
    with jax.numpy_dtype_promotion("standard"):
        return keras_example.run(config, Console(file=out, width=100)), out.getvalue()


def test_a_run_cut_by_steps_is_resumed_to_the_straight_ones_bits(tmp_path, capsys):
    straight, _ = keras(tmp_path, name="straight")
    keras(tmp_path, name="cut", steps=4)
    resumed, text = keras(tmp_path, resume=True, explain=True)  # the latest run
    assert resumed["folder"].name == "cut" and "training accuracy" in text
    for name, values in straight["history"].epochs.items():
        np.testing.assert_array_equal(resumed["history"].epochs[name], values)
    assert "explain:" in capsys.readouterr().out
    again, _ = keras(tmp_path, resume=True, name="cut")  # it has ended: nothing is run
    np.testing.assert_array_equal(again["history"].epochs["loss"], straight["history"].epochs["loss"])


def test_folders_and_steps_that_will_not_do_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no run; expected one to resume: leave --resume out"):
        keras(tmp_path, resume=True)
    with pytest.raises(SystemExit, match="keras_example/b is no run's folder; expected one to resume: leave --resume"):
        keras(tmp_path, resume=True, name="b")
    for name in ("", "..", "a/b", str(tmp_path / "a")):
        with pytest.raises(SystemExit, match=re.escape(f"--name {name!r}; expected the name of one folder")):
            keras(tmp_path, name=name)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"file.* cannot be made \(Not a directory\): choose another --name or"):
        keras(tmp_path / "file", name="a")
    with pytest.raises(SystemExit, match=r"cannot be made \(File name too long\)"):
        keras(tmp_path, name=300 * "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "--steps 3; expected a multiple of 2, the steps of an epoch"),
        ({"batch_size": 0}, "--batch_size = 0; expected a whole number from 1 to 64"),
    ],
)
def test_an_option_that_cannot_be_leaves_no_folder(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        keras(tmp_path, name="a", **options)
    assert not list(tmp_path.iterdir())


def test_only_a_runs_folder_is_taken_up(tmp_path):
    keras(tmp_path, name="base", steps=2)
    others = tmp_path / "keras_example" / "others"
    others.mkdir()
    (others / "curves.png").write_text("mine")
    resumed, _ = keras(tmp_path, resume=True, steps=4)
    assert resumed["folder"].name == "base" and (others / "curves.png").read_text() == "mine"
    with pytest.raises(SystemExit, match="others is no run's folder"):
        keras(tmp_path, resume=True, name="others")


def test_a_run_that_stands_beyond_its_end_is_refused_in_a_line(tmp_path):
    keras(tmp_path, name="a", steps=4)
    with pytest.raises(SystemExit, match=r"training: .*a/training stands at step 4,.* is to end at step 2"):
        keras(tmp_path, name="a", resume=True, steps=2)


def test_quiet_prints_nothing(tmp_path, capsys):
    _, text = keras(tmp_path, name="q", steps=2, quiet=True)
    assert text == capsys.readouterr().out == ""
