"""An experiment has the options that do something in it; a wrong value is a line; a run is resumed by its folder."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tyro
from rich.console import Console

import fnet
from experiments import common, digits_mlp, keras_example, mazur, next_token
from experiments.common import main
from experiments.options import ByEngine, InFolder, Options, Resumable, Seeded
from fnet.core.jax_insides import reset_cache

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if "\nclass Config(" in path.read_text())
USES = {  # of each group of shared options, in the source of an experiment that has it
    Seeded: r"\bconfig\.seed\b",
    ByEngine: r"\bengine_of\(config\)|\bconfig\.engine\b",
    InFolder: r"\bnew_run_folder\(",
    Resumable: r"\btrain\(\s*\w+, [^)]*\bfolder\b",
}


def module(name):
    return importlib.import_module(f"experiments.{name}")


# --- the options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_has_the_options_that_it_uses_and_no_others(name):
    source = inspect.getsource(module(name))
    if "measure(" in source and name == "digits_resnet":  # which trains as digits_lenet does
        source += inspect.getsource(module("digits_lenet"))
    config = module(name).Config
    assert issubclass(config, Options)
    assert {group: issubclass(config, group) for group in USES} == {
        group: bool(re.search(use, source)) for group, use in USES.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_option_is_declared_once(name):
    shared = {field.name for group in USES for field in dataclasses.fields(group)}
    own = inspect.get_annotations(module(name).Config)
    mine = {"optimizer_comparison": {"steps"}, "optimizer_paths": {"steps"}}  # of another meaning
    narrowed = {"engine"} if issubclass(module(name).Config, Resumable) else set()
    assert shared & own.keys() <= mine.get(name, set()) | narrowed


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_the_options_of_the_config(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(module(name).run, module(name).Config, ["--help"])
    assert end.value.code == 0
    shown = {word.replace("-", "_") for word in re.findall(r"^\W* --([a-z][a-z0-9-]+)", capsys.readouterr().out, re.M)}
    names = {field.name for field in dataclasses.fields(module(name).Config)}
    assert shown - names <= {"digits", "valley"} and names - shown <= {"digits", "valley"}  # those have parts


@pytest.mark.parametrize(
    "option", ["--resume", "--steps=3", "--engine=backprop", "--seed=1", "--name=a", "--run-dir=."]
)
def test_what_would_do_nothing_is_no_option(option, capsys):
    with pytest.raises(SystemExit) as end:
        main(mazur.run, mazur.Config, [option])
    assert end.value.code == 2 and "Unrecognized options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "value"),
    [("", False), ("--resume", True), ("--resume auto", "auto"), ("--resume yes", True), ("--resume no", False)],
)
def test_resume_alone_is_yes(words, value):
    for more in ([], ["--seed", "3"]):
        assert tyro.cli(keras_example.Config, args=[*words.split(), *more]).resume == value


def refused(run, options, args, capsys):
    """What is said of options that will not do; in a line, and with nothing else of the experiment."""
    with pytest.raises(SystemExit) as end, jax.numpy_dtype_promotion("standard"):
        main(run, options, args)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if end.value.code == 2:
        assert re.fullmatch(r"\w+: [^\n│─]+; --help shows the options\n", said)
        return said
    assert isinstance(end.value.code, str) and "\n" not in end.value.code  # Python prints it and ends with 1
    return end.value.code


NUMBERS = {
    "--batch-size 0": "'0'; expected a whole number of at least 1",
    "--batch-size x": "'x'; expected a whole number of at least 1",
    "--batch-size 2.5": "'2.5'; expected a whole number of at least 1",
    "--batch-size 5001": "--batch-size 5001; expected 1 to 4000, the examples to train on",
    "--hidden 8 0": "'8 0'; expected 0 or more, each a whole number of at least 1",
    "--learning-rate -1": "'-1'; expected a number of at least 0",
    "--learning-rate nan": "'nan'; expected a number of at least 0",
    "--epochs 0": "'0'; expected a whole number of at least 1",
    "--steps 0": "'0'; expected a whole number of at least 1 or None",
    "--steps 7": "--steps 7; expected a multiple of 125, the steps of an epoch",
    "--seed -1": "'-1'; expected a whole number from 0 to 2147483647",
    "--test-size 0": "'0'; expected a whole number of at least 1",
    "--test-size 5000": "sizes = (0, 5000) make parts of [0, 5000]; expected sizes that add up to 5000",
    "--audit 1001": "--audit 1001; expected at most 1000, the digits to test on",
    "--data-dir /nowhere": "digits_mlp: no train-images in /nowhere; expected one of",
    "--engine hand": "invalid choice 'hand'",
    "--resume always": "'always'; expected auto, yes, no or nothing, which is yes",
    "--sede 1": "Unrecognized options: --sede",
}


@pytest.mark.parametrize("words", NUMBERS)
def test_a_value_that_will_not_do_is_a_line_and_leaves_no_folder(words, tmp_path, capsys):
    args = [*words.split(), "--run-dir", str(tmp_path), "--name", "a"]
    assert NUMBERS[words] in refused(digits_mlp.run, digits_mlp.Config, args, capsys)
    assert not any(tmp_path.rglob("a"))


LATER = {  # refused by what is made of them, which is after the folder is
    "descent_modes --batch-size 1441": "batch_size = 1441; expected a whole number from 1 to 1440",
    "char_language_model --model gpt --heads 3": "3 heads do not divide the query's 128 features",
    "char_language_model --warmup-steps 99999": "warmup_steps = 99999; expected less than",
    "char_language_model --text /nowhere": "--text /nowhere cannot be read (FileNotFoundError",
    "keras_example --validation-split 0": "--validation-split 0.0 of 1000 examples; expected a share",
    "seeds_matter --seeds 1": "seeds = 1; expected at least 2",
    "optimizer_paths --problems rosenbrok": "no problem 'rosenbrok'; expected some of",
    "digits_lenet --seeds 1 1": "'1 1'; expected 1 or more, all different",
    "digits_lenet --seeds": "''; expected 1 or more, all different",
    "digits_lenet --test-size 5000": "sizes = [0, 5000] make parts of [0, 5000]",
    "breast_cancer --folds 1": "folds = 1; expected 2 to 212",
    "recommender --held-out 0": "18000 ratings to train on, 0 held out; expected some of each",
    "seeds_matter --test-size 1600": "--test-size 1600 --validation-size 240; expected fewer than 1797 in all",
    "overfitting --rates 1.5": "'1.5'; expected 1 or more, each a number from 0 to 1",
}


@pytest.mark.parametrize("words", LATER)
def test_what_fnet_refuses_is_a_line_and_leaves_no_folder(words, tmp_path, capsys):
    name, *args = words.split()
    args += ["--run-dir", str(tmp_path), "--name", "a"]
    assert LATER[words] in refused(module(name).run, module(name).Config, args, capsys)
    assert not any(tmp_path.rglob("a"))


def test_what_is_no_word_on_an_option_keeps_its_traceback(tmp_path, monkeypatch):
    def slip(_):
        np.zeros(2).reshape(3)

    def broken(*_):
        raise fnet.LayerError("broken")

    args = ["--run-dir", str(tmp_path)]
    with pytest.raises(ValueError, match="cannot reshape"):
        main(slip, next_token.Config, args)
    monkeypatch.setattr(fnet, "make_step", lambda *_, **__: broken)
    with pytest.raises(fnet.LayerError, match="broken"), jax.numpy_dtype_promotion("standard"):
        main(keras_example.run, keras_example.Config, [*args, "--examples", "80", "--epochs", "1"])


# --- resuming --------------------------------------------------------------------------------------------------------


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
    with pytest.raises(SystemExit, match="holds no run; expected one to resume: --resume auto begins one"):
        keras(tmp_path, resume=True)
    with pytest.raises(SystemExit, match="keras_example/b is no run's folder; expected one to resume: --resume"):
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
        ({"batch_size": 0}, "--batch-size 0; expected 1 to 64, the examples to train on"),
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


def test_auto_begins_a_run_and_goes_on_with_it_and_ends_as_it_ended(tmp_path):
    straight, _ = keras(tmp_path, name="straight")
    for options in ({}, {"name": "a"}):  # by its name; without one a new run is begun only where there is none
        folder = tmp_path / f"{len(options)} given"
        cut, _ = keras(folder, resume="auto", steps=4, **options)
        gone_on, _ = keras(folder, resume="auto", **options)
        ended, text = keras(folder, resume="auto", **options)
        assert cut["folder"] == gone_on["folder"] == ended["folder"] and "training accuracy" in text
        assert len(cut["history"].epochs["loss"]) == 2
        for result in (gone_on, ended):
            np.testing.assert_array_equal(result["history"].epochs["loss"], straight["history"].epochs["loss"])
    other, _ = keras(folder, resume="auto", name="b", steps=2)
    assert other["folder"].name == "b"


def test_auto_begins_in_a_folder_that_a_killed_process_has_only_made(tmp_path):
    (tmp_path / "keras_example" / "a").mkdir(parents=True)
    assert keras(tmp_path, resume="auto", name="a", steps=2)[0]["folder"].name == "a"
    (tmp_path / "keras_example" / "b").mkdir()
    (tmp_path / "keras_example" / "b" / "mine").touch()
    with pytest.raises(SystemExit, match="exists already and is left as it is"):
        keras(tmp_path, resume="auto", name="b", steps=2)


def both(folder, **options):
    """digits_mlp on 96 digits, by both engines."""
    size = {"hidden": (4,), "batch_size": 32, "test_size": 4904, "epochs": 2, "audit": 0}
    with jax.numpy_dtype_promotion("standard"):
        return digits_mlp.run(
            digits_mlp.Config(run_dir=folder, name="a", **size, **options), Console(file=io.StringIO())
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return both(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("engine", "steps", "resume"),
    [*itertools.product(("autodiff", "backprop"), (0, 3), (True, "auto"))],  # 0: before it has begun
)
def test_two_runs_in_one_folder_are_resumed_wherever_they_were_killed(
    engine, steps, resume, whole, tmp_path, monkeypatch
):
    def killed(config, title, *rest, **options):
        if title == engine and steps:
            common.train(dataclasses.replace(config, steps=steps), title, *rest, **options)
        if title == engine:
            raise KeyboardInterrupt
        return common.train(config, title, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(digits_mlp, "train", killed)
        both(tmp_path)
    resumed = both(tmp_path, resume=resume)
    assert resumed["test_accuracy"] == whole["test_accuracy"]
    for name, history in whole["histories"].items():
        np.testing.assert_array_equal(resumed["histories"][name].epochs["loss"], history.epochs["loss"])


# --- interruptions ---------------------------------------------------------------------------------------------------


def start(command, **options):
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, **options)


@pytest.mark.parametrize(
    ("name", "number", "given"),
    [
        ("keras_example", signal.SIGINT, "--epochs 400 --seed 3"),
        ("digits_mlp", signal.SIGTERM, "--epochs 40 --hidden 16 8 --audit 0 --engine backprop --no-explain"),
    ],
)
def test_a_signalled_command_prints_the_one_that_goes_on(name, number, given, tmp_path):
    folder = tmp_path / "my runs" / name / "a b"
    where = ["--run-dir", str(folder.parents[1]), "--name", "a b"]
    process = start([sys.executable, "-m", f"experiments.{name}", *given.split(), *where])
    until = time.monotonic() + 120
    while not any(folder.glob("*/metrics.jsonl")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in said
    assert said.startswith("importing jax and fnet\n")
    (command,) = re.findall(r"^To go on: (.*)$", said, re.M)
    words = shlex.split(command)
    assert words[:3] == [sys.executable, "-m", f"experiments.{name}"]
    assert words[-5:] == ["--resume", *where] and "--no-explain" not in words  # that is the default
    assert set(given.split()) - {"--no-explain"} <= set(words)
    at = int(next(folder.glob("*/.saved")).read_text())
    again = start(command, shell=True)
    printed, said = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert int(next(folder.glob("*/.saved")).read_text()) > at
    assert f"written: {folder}" in printed


BETWEEN_RUNS = """
import gc, signal, sys
from experiments import common, keras_example

def run(config):
    common.new_run_folder(config, "written")
    print("begun")
    # an exception that is raised here is said to be ignored
    gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGTERM))
    gc.collect()
    print("went on")

common.main(run, keras_example.Config)
"""


def test_a_signal_between_two_runs_is_answered_with_the_command_too(tmp_path):
    script = tmp_path / "written.py"
    script.write_text(BETWEEN_RUNS)
    given = ["--run-dir", str(tmp_path), "--name=-a", "--learning-rate", "0.5"]
    process = start([sys.executable, str(script), *given], env={**os.environ, "PYTHONPATH": str(ROOT)})
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 143 and printed == "begun\n"
    assert said.endswith(f"--learning-rate 0.5 --resume --run-dir {tmp_path} --name=-a\n") and "ignored" not in said


def test_an_interrupted_experiment_without_checkpoints_says_so(tmp_path, capsys):
    def run(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        main(run, next_token.Config, ["--run-dir", str(tmp_path)])
    assert end.value.code == 130 and "keeps no checkpoints: it begins anew" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["a 'b'", "-x", "two\nlines"])
def test_the_command_that_goes_on_means_what_was_given(prompt, tmp_path):
    given = module("char_language_model").Config
    config = given(prompt=prompt, seeds=(3, 1), quiet=True, cache=None, top_k=3, run_dir=tmp_path, name="a")
    words = shlex.split(common.resuming(config, "char_language_model"))
    assert tyro.cli(given, args=words[3:]) == dataclasses.replace(config, resume=True)


def test_the_last_lines_name_what_was_written(tmp_path):
    run, text = keras(tmp_path, name="a", steps=2)
    assert text.splitlines()[-1] == f"written: {run['folder']}"
    out = io.StringIO()
    common.say_written(Console(file=out, force_terminal=True, width=20), tmp_path / "a b.html")
    assert f"{tmp_path.as_uri()}/a%20b.html" in out.getvalue()  # where the terminal opens links


def test_a_cache_that_cannot_be_written_keeps_no_experiment_from_running(tmp_path):
    settings: Any = jax.config
    (tmp_path / "file").write_text("")
    kept, told = settings.jax_compilation_cache_dir, io.StringIO()
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        common.open_console(Options(cache=tmp_path / "file"), Console(file=told, width=500))
        assert f"compiling anew: --cache = '{tmp_path}/file' is no folder" in told.getvalue()
        assert settings.jax_compilation_cache_dir is None
        common.open_console(Options(cache=tmp_path / "new"), Console(file=told))
        assert settings.jax_compilation_cache_dir == str(tmp_path / "new")
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
        reset_cache()
