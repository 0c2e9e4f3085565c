"""What a resumed run must find as it was: whatever it computes, on whatever data; and what may change knowingly."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet import layers
from fnet.core.programs import difference, digest, program_lines
from fnet.data import Stream
from fnet.losses import softmax_cross_entropy
from fnet.optimizers import amsgrad, momentum, reduce_on_plateau
from fnet.optimizers.schedules import warmup_cosine
from fnet.optimizers.transforms import clip_by_value
from fnet.runs.checkpoint import saved_steps
from fnet.runs.compilation import _kept
from fnet.training.steps import augmented
from fnet.training.stopping import Reducer
from tests.test_training import assert_same_bits

pytestmark = pytest.mark.long

X = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 32)
DATA, HELD = fnet.Batch(X[:24], Y[:24]), fnet.Batch(X[24:], Y[24:])


def parts(**changes):
    """The arguments of a run, but for the changes."""
    made = {
        "act": layers.relu(),
        "rate": 0.1,
        "eps": 1e-5,
        "loss": softmax_cross_entropy,
        "evaluated_loss": softmax_cross_entropy,
        "engine": fnet.backprop,
        "augment": None,
        "held": HELD,
        "optimizer": momentum(0.05),
        "stop": fnet.early_stopping("validation_loss", 100),
        "epochs": 2,
        **changes,
    }
    model = fnet.serial(
        fnet.dense(5), made["act"], layers.batch_norm(eps=made["eps"]), layers.dropout(made["rate"]), fnet.dense(3)
    )
    params, state = fnet.init(model, jax.random.key(0), X[:1])
    step = fnet.make_step(made["engine"](model, made["loss"]), made["optimizer"])
    if made["augment"] is not None:
        step = augmented(step, made["augment"])
    ts = fnet.init_train_state(params, made["optimizer"], jax.random.key(1), state)
    options = {"evaluate": fnet.make_evaluate(model, made["evaluated_loss"]), "validation": made["held"]}
    if not isinstance(made["held"], fnet.Batch):
        made["stop"] = None
    return step, ts, {**options, "stop": made["stop"], "epochs": made["epochs"], "batch_size": 8}


def fit(folder, resume: bool | str = False, accept=(), **changes):
    step, ts, options = parts(**changes)
    run = None if folder is None else fnet.Run(folder, resume=resume, accept=accept)
    return fnet.fit(step, ts, DATA, run=run, **options)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(folder)
    return folder


@pytest.fixture
def folder(half, tmp_path):
    return shutil.copytree(half, tmp_path / "run")


def noisy(key, batch):
    return batch._replace(inputs=batch.inputs + 0.1 * jax.random.normal(key, batch.inputs.shape))


def scaled(outputs, targets):
    return softmax_cross_entropy(outputs, targets) * 1.5


CHANGES = {
    "an activation": (
        {"act": layers.tanh()},
        r"step computes something else: operation \d+ in \S*tanh_0 was .* is `tanh",
    ),
    "the rate of a dropout": ({"rate": 0.2}, r"step computes something else: operation \d+ in \S*dropout_0 was .*0\.8"),
    "the eps of a normalization": (
        {"eps": 1e-3},
        r"step computes something else: operation \d+ in \S*batch_norm_0",
    ),
    "the loss": (
        {"loss": fnet.Loss(scaled, lambda y, t: 1.5 * softmax_cross_entropy.gradient(y, t))},
        "step comp",
    ),
    "the evaluation's loss": ({"evaluated_loss": scaled}, "evaluation computes something else: operation"),
    "the engine": ({"engine": fnet.autodiff}, "step computes something else: operation"),
    "an augmentation": ({"augment": noisy}, "step computes something else: operation"),
    "the validation data": (
        {"held": fnet.Batch(X[24:] + 1, Y[24:])},
        r"rows of validation: expected 'SHA-256 \w{12}…' \(as saved\), found 'SHA-256",
    ),
    "nesterov": (
        {"optimizer": momentum(0.05, nesterov=True)},
        r"step computes something else: operation \d+ in optimizer",
    ),
    "the rule to stop": (
        {"stop": fnet.early_stopping("validation_loss", 100, greatest=True)},
        "rule to stop: expected 'early_stopping by the least validation_loss'",
    ),
    "the rate": ({"optimizer": momentum(0.1)}, r"opt_state/hyper/learning_rate: expected 0.05 \(as saved\), found 0.1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_run_computes_is_the_same_when_it_is_resumed_or_named(change, folder):
    changes, message = CHANGES[change]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(fnet.RunError, match=message) as caught:
        fit(folder, resume=True, epochs=4, **changes)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    names = re.search(r"Run\(accept=\((.*)\)\)$", str(caught.value))
    assert names is not None, caught.value
    accept = tuple(re.findall(r"'([^']*)'", names[1]))
    end, _ = fit(folder, resume=True, epochs=4, accept=accept, **changes)
    assert int(end.step) == 12
    (line,) = (folder / "changes.jsonl").read_text().splitlines()
    recorded = json.loads(line)
    assert recorded["step"] == 6 and set(recorded["changes"]) == set(accept)
    fit(folder, resume=True, epochs=5, **changes)  # from now on it is what the run computes


def test_the_names_of_the_sets_are_the_same_or_named(tmp_path):
    fit(tmp_path / "run", held={"valid": HELD, "test": HELD})
    with pytest.raises(fnet.RunError, match=r"results: expected .*'valid_loss\(\)'.*found .*'other_loss\(\)'"):
        fit(tmp_path / "run", resume=True, epochs=4, held={"other": HELD, "test": HELD})


def test_a_variant_of_an_optimizer_is_named(tmp_path):
    fit(tmp_path / "run", optimizer=amsgrad(0.01))
    with pytest.raises(fnet.RunError, match=r"step computes something else: operation \d+ in optimizer"):
        fit(tmp_path / "run", resume=True, epochs=4, optimizer=amsgrad(0.01, variant="corrected"))


def test_the_same_run_written_otherwise_is_the_same(folder, half):
    same = layers.relu()
    again = fnet.types.Layer("relu", same.init, lambda *a, **k: same.forward(*a, **k), same.backward)
    resumed, _ = fit(folder, resume=True, epochs=4, act=again)
    other = shutil.copytree(half, folder.parent / "other")
    assert_same_bits(resumed, fit(other, resume=True, epochs=4)[0])
    assert not (folder / "changes.jsonl").exists()


def test_an_accepted_number_is_the_one_that_is_given(folder):
    end, _ = fit(folder, resume=True, epochs=4, optimizer=momentum(0.1), accept=("opt_state/hyper/*",))
    np.testing.assert_allclose(end.opt_state.hyper.learning_rate, 0.1)


def test_a_run_is_made_longer_under_another_schedule_when_that_is_said(folder):
    def scheduled(steps):
        return {"optimizer": fnet.adam(warmup_cosine(0.01, 2, steps)), "epochs": steps // 3}

    short = folder.parent / "short"
    fit(short, **scheduled(6))
    with pytest.raises(fnet.RunError, match=re.escape("learning_rate/total_steps: expected 6.0 (as saved), found 12")):
        fit(short, resume=True, **scheduled(12))
    longer, _ = fit(short, resume=True, accept=("opt_state/hyper/learning_rate/*",), **scheduled(12))
    # the same by hand: what the short run left, with the longer one's schedule
    step, ts, options = parts(**scheduled(6))
    half, _ = fnet.fit(step, ts, DATA, **options)
    half = half._replace(opt_state=fnet.set_hyper(half.opt_state, learning_rate={"total_steps": 12}))
    assert_same_bits(longer, fnet.fit(step, half, DATA, **{**options, "epochs": 4})[0])
    (recorded,) = map(json.loads, (short / "changes.jsonl").read_text().splitlines())
    assert recorded == {"step": 6, "changes": {"opt_state/hyper/learning_rate/total_steps": {"was": 6.0, "is": 12.0}}}
    again, history = fit(short, resume=True, **scheduled(12))
    assert int(again.step) == 12 and len(history.epochs["loss"]) == 4


# --- programs as text -------------------------------------------------------------------------------------------------


def lines_of(f, *args):
    return program_lines(jax.make_jaxpr(f)(*args))


def test_programs_are_compared_by_what_they_compute():
    x = jnp.ones(3)

    def first(x):
        with jax.named_scope("here"):
            y = jnp.sin(x) * 2
        return y.sum()

    def second(z):
        unused = jnp.cos(z)  # noqa: F841
        return (jnp.sin(z) * 2).sum()

    assert digest(lines_of(first, x)) == digest(lines_of(second, x))
    others = [
        lambda x: (jnp.sin(x) * 3).sum(),
        lambda x: (jnp.cos(x) * 2).sum(),
        lambda x: (2 * jnp.sin(x)).mean(),
        lambda x: (jnp.sin(x) * jnp.array([2.0, 2.0, 2.5])).sum(),
        lambda x: jax.lax.fori_loop(0, 2, lambda i, x: jnp.sin(x), x).sum(),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x).sum(),
        lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x).sum(),
        lambda x: jax.lax.cond(x[0] > 0, jnp.cos, jnp.sin, x).sum(),
    ]
    digests = [digest(lines_of(f, x)) for f in (first, *others)]
    assert len(set(digests)) == len(digests)
    assert digest(lines_of(first, x)) != digest(lines_of(first, jnp.ones(4)))
    before = [line.text for line in lines_of(second, x)]
    words = difference(before, lines_of(lambda x: (jnp.sin(x) * 3).sum(), x))
    assert words == "operation 2 was `mul … float32[]=2.0 -> 2:float32[3]` and is `mul … float32[]=3.0 -> 2:float32[3]`"
    with_place = lines_of(lambda x: (jax.named_call(jnp.cos, name="there")(x) * 2).sum(), x)
    assert "in there was `sin" in difference(before, with_place)


def test_constants_count_by_their_numbers():
    def closing_over(array):
        return lines_of(lambda x: (x * array).sum(), jnp.ones(100))

    ones = np.ones(100, np.float32)
    assert digest(closing_over(ones)) == digest(closing_over(ones.copy()))
    other = ones.copy()
    other[57] = 1 + 1e-6
    assert digest(closing_over(ones)) != digest(closing_over(other))


# --- one program ------------------------------------------------------------------------------------------------------


def test_runs_that_compute_the_same_share_a_program(capsys):
    before = 0
    for _ in range(5):
        step, ts, options = parts()
        fnet.fit(step, ts, DATA, explain=True, **options)
        said = capsys.readouterr().out
        if before:
            assert "compiled in" not in said and len(_kept) == before
        before = len(_kept)
    assert before <= 16


def test_a_step_that_calls_back_to_another_function_is_another_program():
    step, ts, options = parts()
    seen = []

    def watching(name):
        def watched(ts, batch):
            jax.debug.callback(lambda loss: seen.append(name), ts.step)
            return step(ts, batch)

        return watched

    for name in ("a", "b"):
        fnet.fit(watching(name), ts, DATA, **options)
        jax.effects_barrier()
    assert {*seen} == {"a", "b"} and seen.count("a") == seen.count("b") == 6


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_run_whose_checkpoints_are_gone_is_refused_and_keeps_what_is_there(folder):
    for gone in ("step", "all"):
        for path in saved_steps(folder / "checkpoints").values():
            shutil.rmtree(path)
        if gone == "all":
            shutil.rmtree(folder / "checkpoints")
        before = (folder / "metrics.jsonl").read_bytes()
        for resume in (True, "auto", "newest whole"):
            with pytest.raises(fnet.RunError, match="holds no checkpoint, and there was one at step 6; expected it"):
                fit(folder, resume=resume, epochs=4)
        assert (folder / "metrics.jsonl").read_bytes() == before != b""


@pytest.mark.parametrize("odd", ["a[b", "a]b", "a*b", "a?b", "a\\b", "[ab]/run"])
def test_a_path_below_which_no_checkpoint_is_found_again_is_refused_before_the_first_step(odd, tmp_path):
    with pytest.raises(fnet.RunError, match="in its path, below which orbax finds no checkpoints again"):
        fit(tmp_path / odd)
    assert list(tmp_path.iterdir()) == []


def test_a_home_is_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fit("~/runs/a")
    assert (tmp_path / "runs" / "a" / "config.json").exists() and not (tmp_path / "~").exists()


def test_resume_true_wants_a_run_and_auto_begins_one(tmp_path):
    with pytest.raises(fnet.RunError, match="holds no run; expected one to resume: resume='auto' begins"):
        fit(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    fit(tmp_path / "run", resume="auto")
    end, _ = fit(tmp_path / "run", resume="auto", epochs=4)
    assert int(end.step) == 12
    with pytest.raises(fnet.RunError, match=r"Run: resume = 'yes'; expected False, True, 'auto' or 'newest whole'"):
        fit(tmp_path / "run", resume="yes")


def test_a_damaged_checkpoint_says_which_one_is_whole_and_newest_whole_takes_it(tmp_path):
    step, ts, options = parts()
    run = fnet.Run(tmp_path / "run", save_every=2)
    fnet.fit(step, ts, DATA, run=run, **options)
    damaged = tmp_path / "run" / "checkpoints" / "step_000000006" / "meta" / "metadata"
    damaged.write_text("{}")
    options["epochs"] = 4
    with pytest.raises(fnet.CheckpointError, match=r"step_000000004 is whole: Run\(resume='newest whole'\) takes it"):
        fnet.fit(step, ts, DATA, run=run._replace(resume=True), **options)
    with pytest.warns(fnet.runs.RunWarning, match="resumed from step 4; put aside: damaged_step_000000006"):
        end, _ = fnet.fit(step, ts, DATA, run=run._replace(resume="newest whole"), **options)
    assert_same_bits(end, fnet.fit(step, ts, DATA, **options)[0])
    assert damaged.parents[1].with_name("damaged_step_000000006").is_dir()


def test_a_checkpoint_that_does_not_come_back_is_none(tmp_path, monkeypatch):
    from fnet.runs import checkpoint

    honest, calls = checkpoint._read_leaves, []

    def altered(path, meta, like):
        calls.append(path)
        found = honest(path, meta, like)
        if len(calls) == 2:
            raise fnet.CheckpointError("params/dense_0/w is not what was saved")
        return found

    monkeypatch.setattr(checkpoint, "_read_leaves", altered)
    step, ts, options = parts()
    with pytest.raises(fnet.CheckpointError, match=r"step_000000004 could not be written .*is not what was saved"):
        fnet.fit(step, ts, DATA, run=fnet.Run(tmp_path / "run", save_every=2), **options)
    assert list(saved_steps(tmp_path / "run" / "checkpoints")) == [2]
    calls.clear()
    run = fnet.Run(tmp_path / "other", save_every=2, verify=False)
    fnet.fit(step, ts, DATA, run=run, **options)
    assert calls == []


class Forgetful:
    """An iterable that begins anew, and does not say where it stands."""

    def __iter__(self):
        return iter([(X[:8], Y[:8]), (X[8:16], Y[8:16])] * 10)


def test_a_stream_that_cannot_be_resumed_is_refused_in_a_folder_or_says_so(tmp_path):
    step, ts, options = parts(stop=None)
    options = {"epochs": 2}
    with pytest.raises(fnet.DataError, match="list_iterator, has no get_state and no set_state, so that the run could"):
        fnet.fit(step, ts, Stream(Forgetful(), 2), run=fnet.Run(tmp_path / "run"), **options)
    assert not (tmp_path / "run").exists()
    stream = Stream(Forgetful(), 2, resumable=False)
    end, _ = fnet.fit(step, ts, stream, run=fnet.Run(tmp_path / "run"), **options)
    assert int(end.step) == 4
    fnet.fit(step, ts, Stream(Forgetful(), 2), **options)  # without a folder nothing is lost


# --- threads and signals ----------------------------------------------------------------------------------------------


def test_runs_with_folders_in_several_threads_are_each_as_alone(tmp_path):
    step, ts, options = parts()
    expected, _ = fnet.fit(step, ts, DATA, **options)
    ends, errors = {}, []

    def work(name):
        try:
            for i in range(2):
                run = fnet.Run(tmp_path / f"{name}-{i}", save_every=1)
                ends[name, i], _ = fnet.fit(step, ts, DATA, run=run, **options)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(ends) == 6
    for end in ends.values():
        assert_same_bits(end, expected)


def test_a_run_with_a_folder_inside_an_observer_of_another(tmp_path):
    step, ts, options = parts()
    inner = []

    def observer(event):
        if event.kind == "evaluation":
            run = fnet.Run(tmp_path / f"inner-{event.step}", save_every=1)
            inner.append(fnet.fit(step, ts, DATA, run=run, **options)[0])

    end, _ = fnet.fit(step, ts, DATA, run=fnet.Run(tmp_path / "outer", save_every=1), observers=[observer], **options)
    assert len(inner) == 2
    for state in inner:
        assert_same_bits(state, end)


@pytest.mark.parametrize("in_a_folder", [False, True])
def test_ctrl_c_gives_back_what_was_trained(in_a_folder, tmp_path, capsys):
    step, ts, options = parts()

    options["epochs"] = 40

    def press(event):
        if event.kind == "chunk" and event.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    run = {"run": fnet.Run(tmp_path / "run")} if in_a_folder else {}
    with pytest.raises(KeyboardInterrupt) as caught:
        fnet.fit(step, ts, DATA, observers=[press], chunk_steps=2, **run, **options)
    stopped = caught.value
    assert isinstance(stopped, fnet.Interrupted)
    at = int(stopped.state.step)
    assert 4 <= at < 120 and len(stopped.history.steps["loss"]) == at
    expected, _ = fnet.fit(step, ts, DATA, **{**options, "epochs": None}, steps=at)
    assert_same_bits(stopped.state.params, expected.params)
    end = fnet.fit(step, stopped.state, DATA, **options)[0]
    assert_same_bits(end.params, fnet.fit(step, ts, DATA, **options)[0].params)
    said = f"SIGINT: the run is saved at step {at} in" if in_a_folder else f"SIGINT: the run ended at step {at}"
    assert said in capsys.readouterr().err


# --- a trained model, had again ---------------------------------------------------------------------------------------


def test_a_trained_model_is_had_again_in_one_line(tmp_path):
    step, ts, options = parts()
    model = fnet.serial(fnet.dense(5), layers.relu(), layers.batch_norm(), layers.dropout(0.1), fnet.dense(3))
    run = fnet.Run(tmp_path / "run", save_every=2, keep_every=2, keep_best="validation_loss", best=2)
    end, history = fnet.fit(step, ts, DATA, run=run, **{**options, "evaluate_every": (2, "steps")})
    params, state = fnet.load_run(tmp_path / "run", model, X[:1])
    assert_same_bits((params, state), (end.params, end.state))
    at_two, _ = fnet.fit(step, ts, DATA, **{**options, "epochs": None}, steps=2)
    params, state = fnet.load_run(tmp_path / "run", model, jax.ShapeDtypeStruct((1, 6), jnp.float32), which=2)
    assert_same_bits((params, state), (at_two.params, at_two.state))
    losses = history.evaluations["validation_loss"]
    best = int(history.evaluations["step"][losses.argmin()])
    best_one, _ = fnet.fit(step, ts, DATA, **{**options, "epochs": None}, steps=best)
    assert_same_bits(fnet.load_run(tmp_path / "run", model, X[:1], which="best")[0], best_one.params)
    with pytest.raises(fnet.RunError, match=r"which = 5; expected 'last', 'best' or the step of a checkpoint: 2, 4, 6"):
        fnet.load_run(tmp_path / "run", model, X[:1], which=5)
    with pytest.raises(fnet.CheckpointError, match="is of another model or optimizer: params/dense_1/b"):
        fnet.load_run(tmp_path / "run", fnet.serial(fnet.dense(5), fnet.dense(4)), X[:1])


def test_the_best_of_a_run_that_stopped_early_is_what_its_rule_kept(folder):
    step, ts, options = parts()
    end, _ = fnet.fit(step, ts, DATA, **options)
    model = fnet.serial(fnet.dense(5), layers.relu(), layers.batch_norm(), layers.dropout(0.1), fnet.dense(3))
    best = fnet.best_weights(end)
    assert_same_bits(fnet.load_run(folder, model, X[:1], which="best"), (best.params, best.state))


def test_a_run_without_a_best_says_so(tmp_path):
    fit(tmp_path / "run", stop=None)
    model = fnet.serial(fnet.dense(5), layers.relu(), layers.batch_norm(), layers.dropout(0.1), fnet.dense(3))
    with pytest.raises(fnet.RunError, match=r"kept no best state; expected a run with Run\(keep_best="):
        fnet.load_run(tmp_path / "run", model, X[:1], which="best")
    with pytest.raises(fnet.RunError, match="holds no checkpoints; expected the folder of a run"):
        fnet.load_run(tmp_path, model, X[:1])


# --- what a second pair of eyes found ---------------------------------------------------------------------------------


class Batches:
    """A loader of some examples, in order."""

    def __init__(self, data, size=8):
        self.data, self.size = data, size

    def __len__(self):
        return -(-len(self.data.targets) // self.size)

    def __iter__(self):
        for begin in range(0, len(self.data.targets), self.size):
            rows = slice(begin, begin + self.size)
            yield fnet.Batch(self.data.inputs[rows], self.data.targets[rows])


def test_other_validation_data_of_a_loader_are_named_when_a_run_is_resumed(tmp_path):
    def go(held, **run):
        step, ts, options = parts(held=held)
        return fnet.fit(step, ts, DATA, run=fnet.Run(tmp_path / "run", **run), **options)

    longer = fnet.Batch(np.concatenate([HELD.inputs] * 3), np.concatenate([HELD.targets] * 3))
    go(Batches(longer))
    go(Batches(longer), resume=True)
    for other, name in (
        (Batches(longer._replace(inputs=longer.inputs + 1)), "first batch of validation"),
        (Batches(HELD), "batches of validation: expected 3 (as saved), found 1"),
    ):
        with pytest.raises(fnet.RunError, match=re.escape(name)):
            go(other, resume=True)


def test_a_plateau_of_a_loaders_result_is_resumed_and_its_direction_is_named(tmp_path):
    def go(greatest, run=None, epochs=6):
        falling = reduce_on_plateau(momentum(0.5), metric="validation_loss", patience=1, greatest=greatest)
        step, ts, options = parts(optimizer=falling, held=Batches(HELD), epochs=epochs)
        return fnet.fit(step, ts, DATA, run=run, **options)

    straight, history = go(False)
    assert len({*history.epochs["learning_rate"].tolist()}) > 1
    run = fnet.Run(tmp_path / "run")
    go(False, run, epochs=3)
    with pytest.raises(fnet.RunError, match="hyper/metric/validation_loss: expected 1"):
        go(True, run._replace(resume=True))
    assert_same_bits(go(False, run._replace(resume=True))[0], straight)


def test_a_checkpoint_that_is_damaged_twice_is_put_aside_twice(tmp_path):
    step, ts, options = parts()
    run = fnet.Run(tmp_path / "run", save_every=2)
    fnet.fit(step, ts, DATA, run=run, **options)
    newest = list(saved_steps(tmp_path / "run" / "checkpoints").values())[-1]
    for _ in range(2):
        (newest / "manifest.json").write_text("{}")
        with pytest.warns(fnet.runs.RunWarning, match="is resumed from step 4; put aside: damaged_step_"):
            fnet.fit(step, ts, DATA, run=run._replace(resume="newest whole"), **options)
    put_aside = {path.name for path in (tmp_path / "run" / "checkpoints").glob("damaged_*")}
    assert put_aside == {f"damaged_{newest.name}", f"damaged_{newest.name}_2"}


def test_a_run_without_jit_resumes_one_with_it(folder):
    with jax.disable_jit():
        end, _ = fit(folder, resume=True, epochs=3)
    assert int(end.step) == 9


@pytest.mark.parametrize("setting", [("jax_default_prng_impl", "rbg"), ("jax_random_seed_offset", 7)])
def test_a_setting_that_keys_depend_on_is_another_program(setting):
    def step(ts, batch):
        drawn = jax.random.uniform(jax.random.key(3))
        return ts._replace(step=ts.step + 1), {"loss": drawn}

    ts = fnet.TrainState(jnp.asarray(0, jnp.int32), jnp.zeros(1), (), (), jax.random.key(0))
    name, other = setting
    before = jax.config._read(name)

    def drawn():
        return float(fnet.fit(step, ts, DATA, steps=1, batch_size=24)[1].steps["loss"][0])

    first = drawn()
    jax.config.update(name, other)
    try:
        expected = float(jax.jit(lambda: jax.random.uniform(jax.random.key(3)))())
        assert drawn() == expected != first
    finally:
        jax.config.update(name, before)
    assert drawn() == first


def test_no_best_is_made_of_a_run_that_has_none(tmp_path):
    model = fnet.serial(fnet.dense(5), layers.relu(), layers.batch_norm(), layers.dropout(0.1), fnet.dense(3))
    step, ts, options = parts()
    run = fnet.Run(tmp_path / "run")
    fnet.fit(step, ts, DATA, run=run, **{**options, "epochs": None, "evaluate_every": (5, "epochs")}, steps=4)
    with pytest.raises(fnet.RunError, match="no evaluation was made, or none was finite, so that there is no best"):
        fnet.load_run(tmp_path / "run", model, X[:1], which="best")
    for which in (True, 4.0, [4], None):
        with pytest.raises(fnet.RunError, match=re.escape(f"which = {which!r}; expected 'last', 'best' or the step")):
            fnet.load_run(tmp_path / "run", model, X[:1], which=which)


def test_a_damaged_checkpoint_of_a_model_names_the_whole_one(tmp_path):
    step, ts, options = parts()
    fnet.fit(step, ts, DATA, run=fnet.Run(tmp_path / "run", save_every=2), **options)
    newest = list(saved_steps(tmp_path / "run" / "checkpoints").values())[-1]
    (newest / "manifest.json").write_text("{}")
    model = fnet.serial(fnet.dense(5), layers.relu(), layers.batch_norm(), layers.dropout(0.1), fnet.dense(3))
    with pytest.raises(fnet.CheckpointError, match=re.escape("step_000000004 is whole: load_run(..., which=4) takes")):
        fnet.load_run(tmp_path / "run", model, X[:1])


def test_a_finished_run_without_checkpoints_and_without_its_marker_is_refused(folder):
    shutil.rmtree(folder / "checkpoints")
    (folder / ".saved").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(fnet.RunError, match="holds no checkpoint, and there was one: the run had ended"):
        fit(folder, resume=True, epochs=4)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("odd", ["gs:", "logs:", "figs:"])
def test_a_path_that_orbax_takes_for_a_service_is_refused(odd, tmp_path):
    with pytest.raises(fnet.RunError, match="has a part that ends with gs:, which orbax takes for Google's storage"):
        fit(tmp_path / odd / "run")
    assert not (tmp_path / odd).exists()


@pytest.mark.parametrize("odd", ["run:", "2026-11-29T10:00:", "s3:", "gs:x"])
def test_another_colon_is_a_part_of_a_name(odd, tmp_path):
    fit(tmp_path / odd, epochs=1)
    end, _ = fit(tmp_path / odd, resume=True)
    assert_same_bits(end, fnet.fit(*parts()[:2], DATA, **parts()[2])[0])


def test_a_signal_in_the_last_chunk_is_not_lost():
    step, ts, options = parts()
    for _ in range(20):
        with pytest.raises(fnet.Terminated) as caught:
            fnet.fit(step, ts, DATA, observers=[terminated_at_the_end], **options)
        assert caught.value.code == 143


def terminated_at_the_end(event):
    if event.kind == "end":
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_run_has_its_own_state_though_one_within_it_was_interrupted():
    step, ts, options = parts()

    def within(event):
        if event.kind == "chunk":
            other = fnet.init_train_state(jnp.zeros(2), fnet.sgd(0.1), jax.random.key(0))
            plain = fnet.make_step(fnet.from_loss(lambda p, batch, key: jnp.square(p).sum()), fnet.sgd(0.1))
            stop = lambda event: os.kill(os.getpid(), signal.SIGINT) if event.kind == "chunk" else None  # noqa: E731
            fnet.fit(plain, other, DATA, steps=3, batch_size=8, observers=[stop])

    with pytest.raises(fnet.Interrupted) as caught:
        fnet.fit(step, ts, DATA, observers=[within], chunk_steps=2, **options)
    assert jax.tree.structure(caught.value.state.params) == jax.tree.structure(ts.params)
    assert len(caught.value.history.steps["loss"]) == int(caught.value.state.step) > 0


# --- what is kept, and what begins anew -------------------------------------------------------------------------------

MODEL = fnet.serial(fnet.dense(5), layers.relu(), layers.batch_norm(), layers.dropout(0.1), fnet.dense(3))


def moving(ts, batch):
    return ts._replace(step=ts.step + 1, params={"w": ts.params["w"] + 1.0}), {"loss": ts.params["w"]}


def rising(params, state, batch):
    return {"loss": params["w"], "other": 100.0 - params["w"]}


def go(folder, epochs, **options):
    start = fnet.TrainState(jnp.asarray(0, jnp.int32), {"w": jnp.zeros(())}, (), (), jax.random.key(0))
    run = fnet.Run(folder, resume="auto", keep_last=1, save_every=3, **options)
    more = {"evaluate": rising, "validation": HELD, "batch_size": 8, "chunk_steps": 3}
    return fnet.fit(moving, start, DATA, epochs=epochs, run=run, **more)


def steps_of(folder):
    return [*saved_steps(folder / "checkpoints")]


@pytest.mark.parametrize(
    "other", [{}, {"keep_best": "validation_other"}, {"keep_best": "validation_loss", "greatest": True}]
)
def test_what_was_kept_as_the_best_is_kept_when_a_run_is_resumed_by_another_or_by_none(other, tmp_path):
    folder = tmp_path / "run"
    go(folder, 3, keep_best="validation_loss")
    assert steps_of(folder) == [3, 9]
    go(folder, 5, **other)
    assert steps_of(folder) == [3, 15]
    go(folder, 6)
    assert steps_of(folder) == [3, 18]


def test_the_best_are_as_many_as_each_rule_keeps(tmp_path):
    folder = tmp_path / "run"
    go(folder, 3, keep_best="validation_loss", best=2)
    assert steps_of(folder) == [3, 6, 9]
    go(folder, 5, keep_best="validation_loss", best=1)
    assert steps_of(folder) == [3, 15]


def test_the_best_is_had_though_the_last_checkpoint_is_damaged(tmp_path):
    step, ts, options = parts(stop=None, epochs=4)
    run = fnet.Run(tmp_path / "run", keep_every=1, save_every=3, keep_best="validation_loss")
    _, history = fnet.fit(step, ts, DATA, run=run, **options)
    expected, _ = fnet.load_run(tmp_path / "run", MODEL, X[:1], which="best")
    losses = history.evaluations["validation_loss"]
    at = int(history.evaluations["step"][losses.argmin()])
    assert_same_bits(expected, fnet.load_run(tmp_path / "run", MODEL, X[:1], which=at)[0])
    checkpoints = saved_steps(tmp_path / "run" / "checkpoints")
    for damaged in {*checkpoints} - {at}:
        shutil.rmtree(checkpoints[damaged] / "state")
    assert_same_bits(fnet.load_run(tmp_path / "run", MODEL, X[:1], which="best")[0], expected)
    (checkpoints[at] / "manifest.json").write_text("{}")
    with pytest.raises(fnet.CheckpointError, match="is damaged"):
        fnet.load_run(tmp_path / "run", MODEL, X[:1], which="best")


def test_a_run_goes_on_without_its_last_checkpoint_and_says_so(tmp_path):
    step, ts, options = parts(epochs=4)
    run = fnet.Run(tmp_path / "run", save_every=3, keep_last=3)
    straight, _ = fnet.fit(step, ts, DATA, run=run, **options)
    checkpoints = saved_steps(tmp_path / "run" / "checkpoints")
    assert [*checkpoints] == [6, 9, 12]
    shutil.rmtree(checkpoints[12])
    with pytest.warns(fnet.runs.RunWarning, match="is resumed from step 9: its checkpoint of step 12 is gone"):
        end, _ = fnet.fit(step, ts, DATA, run=run._replace(resume=True), **options)
    assert_same_bits(end, straight)


SETS = {"validation": HELD, "other": HELD}
OTHERS = {
    "another optimizer": fnet.adam(0.01),
    "a plateau of another result": reduce_on_plateau(momentum(0.05), metric="other_loss", patience=3),
    "a plateau of the loss": reduce_on_plateau(momentum(0.05), window=2, patience=3),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_optimizer_with_another_state_is_named_and_begins_anew_where_that_is_accepted(other, tmp_path):
    falling = reduce_on_plateau(momentum(0.05), metric="validation_loss", patience=3)
    saved, _ = fit(tmp_path / "run", optimizer=falling, held=SETS)
    more = {"optimizer": OTHERS[other], "held": SETS, "epochs": 4}
    with pytest.raises(fnet.RunError, match=r"otherwise: optimizer: expected 'PlateauState, SHA-256 [^;]*\. ") as error:
        fit(tmp_path / "run", resume=True, **more)
    accept = ast.literal_eval(str(error.value).split("Run(accept=")[1].removesuffix(")"))
    assert {"optimizer", "evaluation"} <= {*accept} <= {"optimizer", "evaluation", "step"}
    end, _ = fit(tmp_path / "run", resume=True, accept=accept, **more)
    step, ts, options = parts(**more)
    assert_same_bits(end, fnet.fit(step, saved._replace(opt_state=ts.opt_state), DATA, **options)[0])
    changes = json.loads((tmp_path / "run" / "changes.jsonl").read_text())["changes"]
    assert {*changes} == {*accept} and changes["optimizer"]["was"].startswith("PlateauState")
    assert_same_bits(fit(tmp_path / "run", resume=True, **more)[0], end)


def test_whether_a_rule_keeps_weights_is_part_of_it(tmp_path):
    fit(tmp_path / "run")
    lighter = fnet.early_stopping("validation_loss", 100, keep_weights=False)
    more = {"resume": True, "epochs": 4, "stop": lighter}
    with pytest.raises(
        fnet.RunError, match="found 'early_stopping by the least validation_loss, whose weights are not"
    ):
        fit(tmp_path / "run", **more)
    end, _ = fit(tmp_path / "run", **more, accept=("rule to stop", "step", "evaluation"))
    assert int(end.step) == 12 and end.stopping.weights == () and int(end.stopping.since) <= 2


def test_another_model_is_still_another_model(tmp_path):
    fit(tmp_path / "run")
    step, ts, options = parts()
    wide = fnet.serial(fnet.dense(7), fnet.dense(3))
    params, state = fnet.init(wide, jax.random.key(0), X[:1])
    ts = fnet.init_train_state(params, momentum(0.05), jax.random.key(1), state)
    options["evaluate"] = fnet.make_evaluate(wide, softmax_cross_entropy)
    step = fnet.make_step(fnet.backprop(wide, softmax_cross_entropy), momentum(0.05))
    with pytest.raises(fnet.CheckpointError, match="is of another model or optimizer: params/"):
        fnet.fit(step, ts, DATA, run=fnet.Run(tmp_path / "run", resume=True), **options)


# --- what acts in the last batch alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["in memory", "dataset"])
def test_a_step_that_differs_in_the_smaller_last_batch_alone_is_named(source, tmp_path):
    data = DATA if source == "in memory" else fnet.data.Examples([*zip(DATA.inputs, DATA.targets, strict=True)])

    def run_with(factor, **run):
        step, ts, options = parts(stop=None)

        def by_size(ts, batch):
            return step(ts, batch._replace(inputs=batch.inputs * factor) if len(batch.targets) < 7 else batch)

        folder = fnet.Run(tmp_path / "run", **run)
        return fnet.fit(by_size, ts, data, run=folder, **{**options, "batch_size": 7})

    run_with(2.0)
    run_with(2.0, resume=True)
    with pytest.raises(fnet.RunError, match=r"step computes something else: operation .* was .*2.0.* and is .*3.0"):
        run_with(3.0, resume=True)


def test_an_evaluation_that_differs_in_the_last_batch_of_a_dataset_is_named(tmp_path):
    held = fnet.data.Examples([*zip(X[:11], Y[:11], strict=True)])

    def run_with(factor, **run):
        step, ts, options = parts(stop=None, held=held)
        whole = options["evaluate"]

        def evaluate(params, state, batch):
            inputs = batch.inputs * factor if len(batch.targets) < 8 else batch.inputs
            return whole(params, state, batch._replace(inputs=inputs))

        return fnet.fit(step, ts, DATA, run=fnet.Run(tmp_path / "run", **run), **{**options, "evaluate": evaluate})

    run_with(2.0)
    run_with(2.0, resume=True)
    with pytest.raises(
        fnet.RunError, match=r"evaluation computes something else: operation .* was .*2.0.* and is .*3.0"
    ):
        run_with(3.0, resume=True)


# --- streams that say where they stand, and do not -------------------------------------------------------------------


class Shuffled:
    """Batches in an order drawn anew whenever it is begun; its iterator knows how many it has given, or also which."""

    def __init__(self, whole: bool):
        self.whole, self.drawn = whole, np.random.default_rng(0)

    def __len__(self):
        return 4

    def __iter__(self):
        return ShuffledReader(self)


class ShuffledReader:
    def __init__(self, source):
        self.source, self.order, self.at = source, source.drawn.permutation(4).tolist(), 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == 4:
            raise StopIteration
        rows = slice(6 * self.order[self.at], 6 * self.order[self.at] + 6)
        self.at += 1
        return X[rows], Y[rows]

    def get_state(self):
        own = self.source.drawn.bit_generator.state
        return {"at": self.at} | ({"order": self.order, "drawn": own} if self.source.whole else {})

    def set_state(self, state):
        self.at = state["at"]
        if self.source.whole:
            self.order, self.source.drawn.bit_generator.state = state["order"], state["drawn"]


def test_a_stream_whose_order_is_not_in_its_state_is_refused(tmp_path):
    step, ts, _ = parts()
    with pytest.raises(fnet.DataError, match="ShuffledReader, gives another batch than one made anew and set to its"):
        fnet.fit(step, ts, Shuffled(whole=False), epochs=3, run=fnet.Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    fnet.fit(step, ts, Stream(Shuffled(False), resumable=False), epochs=3, run=fnet.Run(tmp_path / "run"))


def test_a_stream_whose_order_is_in_its_state_is_the_same_with_a_folder_without_and_resumed(tmp_path):
    step, ts, _ = parts()
    straight, _ = fnet.fit(step, ts, Shuffled(whole=True), epochs=4)
    run = fnet.Run(tmp_path / "run", save_every=3)
    assert_same_bits(fnet.fit(step, ts, Shuffled(whole=True), epochs=4, run=run)[0], straight)
    run = fnet.Run(tmp_path / "other", resume="auto", save_every=3)
    leave = [lambda event: "stop" if event.step >= 6 and event.kind == "chunk" else None]
    half, _ = fnet.fit(step, ts, Shuffled(whole=True), epochs=4, run=run, observers=leave, chunk_steps=3)
    assert int(half.step) == 6
    assert_same_bits(fnet.fit(step, ts, Shuffled(whole=True), epochs=4, run=run)[0], straight)


# --- what the second pair of eyes found after that --------------------------------------------------------------------


@pytest.mark.parametrize("holding", ["master_weights", "lookahead", "chain"])
def test_an_accepted_optimizer_begins_on_the_parameters_that_were_trained(holding, tmp_path):
    other = {
        "master_weights": fnet.optimizers.master_weights(fnet.adam(0.01)),
        "lookahead": fnet.optimizers.lookahead(fnet.sgd(0.01), every=1, slow_rate=0.25),
        "chain": fnet.chain(clip_by_value(1.0), fnet.optimizers.master_weights(fnet.adam(0.01))),
    }[holding]
    saved, _ = fit(tmp_path / "run", augment=noisy)
    more = {"optimizer": other, "epochs": 4, "augment": noisy}
    end, _ = fit(tmp_path / "run", resume=True, accept=("optimizer", "step", "evaluation"), **more)
    step, _, options = parts(**more)
    assert_same_bits(end, fnet.fit(step, saved._replace(opt_state=other.init(saved.params)), DATA, **options)[0])


def test_an_accepted_optimizer_of_a_step_of_ones_own_is_refused_unless_it_says_how_it_begins(tmp_path):
    def go(optimizer, own=False, **run):
        step, ts, options = parts(optimizer=optimizer)
        bare = lambda ts, batch: step(ts, batch)  # noqa: E731
        if own:
            bare.optimizer = optimizer
        return fnet.fit(bare, ts, DATA, run=fnet.Run(tmp_path / "run", **run), **{**options, "epochs": 3})

    fit(tmp_path / "run")
    with pytest.raises(fnet.RunError, match="the optimizer is another, and the step does not say how its state begins"):
        go(fnet.adam(0.1), resume=True, accept=("*",))
    assert int(go(fnet.adam(0.1), own=True, resume=True, accept=("*",))[0].step) == 9


class Counted(NamedTuple):
    begun: jax.Array
    stopped: jax.Array


def after(steps):
    return Reducer(
        lambda ts: Counted(jnp.copy(ts.step), jnp.array(False)),
        lambda own, ts, results: Counted(own.begun, ts.step - own.begun >= steps),
        f"{steps} steps",
    )


def test_an_accepted_rule_begins_where_the_run_stands(tmp_path):
    saved, _ = fit(tmp_path / "run")
    more = {"epochs": 9, "stop": after(9)}
    end, _ = fit(tmp_path / "run", resume=True, accept=("rule to stop", "step", "evaluation"), **more)
    step, _, options = parts(**more)
    by_hand, _ = fnet.fit(step, saved._replace(stopping=()), DATA, **options)
    assert int(end.step) == int(by_hand.step) == 15
    assert_same_bits(end, by_hand)


def test_a_run_that_was_stopped_goes_on_by_a_longer_patience_that_is_accepted(tmp_path):
    patient = lambda n: fnet.early_stopping("validation_loss", n, least_change=10.0)  # noqa: E731
    stopped, _ = fit(tmp_path / "run", stop=patient(2), epochs=20)
    assert int(stopped.step) == 9
    more = {"stop": patient(4), "epochs": 20}
    end, history = fit(tmp_path / "run", resume=True, accept=("stopping/hyper/patience",), **more)
    assert_same_bits(end, fit(None, **more)[0])
    assert int(end.step) == 15 and history.ended.step == 15


@pytest.mark.parametrize("name", ["accept", "free"])
@pytest.mark.parametrize("given", ["opt_state/*", None, (3,)])
def test_names_that_are_no_tuple_of_names_are_refused(name, given, tmp_path):
    with pytest.raises(fnet.RunError, match=re.escape(f"Run: {name} = {given!r}; expected a tuple of names")):
        fnet.fit(*parts()[:2], DATA, run=fnet.Run(tmp_path / "run", **{name: given}), **parts()[2])


def test_the_remedy_names_what_was_accepted_too_and_the_cause_alone(folder):
    other = fnet.early_stopping("validation_loss", 3, greatest=True)
    with pytest.raises(fnet.RunError) as error:
        fit(folder, resume=True, accept=("rule to stop",), epochs=3, stop=other)
    accept = ast.literal_eval(str(error.value).split("Run(accept=")[1].removesuffix(")"))
    assert accept[0] == "rule to stop" and "evaluation" in accept
    assert int(fit(folder, resume=True, accept=accept, epochs=3, stop=other)[0].step) == 9


def test_a_best_whose_manifest_is_damaged_is_named_and_not_deleted(tmp_path):
    step, ts, options = parts(stop=None, epochs=4)
    run = fnet.Run(tmp_path / "run", keep_best="validation_loss", greatest=True, keep_last=1)
    fnet.fit(step, ts, DATA, run=run, **options)
    first, *_ = checkpoints = saved_steps(tmp_path / "run" / "checkpoints")
    assert [*checkpoints] == [3, 12]
    (checkpoints[first] / "manifest.json").write_text("x")
    with pytest.raises(fnet.CheckpointError, match="step_000000003 is damaged"):
        fnet.load_run(tmp_path / "run", MODEL, X[:1], which="best")
    fnet.fit(step, ts, DATA, run=run._replace(resume=True), **{**options, "epochs": 6})
    assert first in saved_steps(tmp_path / "run" / "checkpoints")


def test_the_best_is_of_one_evaluation(tmp_path):
    kept = {"keep_best": "validation_loss", "keep_last": 1}
    harder = fnet.Batch(20 * HELD.inputs, (HELD.targets + 1) % 3)
    step, ts, options = parts(stop=None)
    fnet.fit(step, ts, DATA, run=fnet.Run(tmp_path / "run", **kept), **options)
    easier = [*saved_steps(tmp_path / "run" / "checkpoints")]
    run = fnet.Run(tmp_path / "run", resume=True, accept=("rows of validation",), **kept)
    options |= {"validation": harder, "epochs": 5}
    _, history = fnet.fit(step, ts, DATA, run=run, **options)
    losses = dict(zip(history.evaluations["step"], history.evaluations["validation_loss"], strict=True))
    assert min(losses[s] for s in (9, 12, 15)) > max(losses[s] for s in (3, 6))
    best = min((9, 12, 15), key=lambda step: losses[step])
    assert {*saved_steps(tmp_path / "run" / "checkpoints")} >= {best, min(easier, key=lambda step: losses[step])}
    params, _ = fnet.load_run(tmp_path / "run", MODEL, X[:1], which="best")
    assert_same_bits(params, fnet.load_run(tmp_path / "run", MODEL, X[:1], which=best)[0])
    run = run._replace(accept=())
    fnet.fit(step, ts, DATA, run=run, **{**options, "epochs": 6})
    assert best in saved_steps(tmp_path / "run" / "checkpoints")


def test_what_keep_every_kept_is_kept(tmp_path):
    folder = tmp_path / "run"
    go(folder, 3, keep_every=6)
    assert steps_of(folder) == [6, 9]
    go(folder, 5)
    assert steps_of(folder) == [6, 12, 15]


def measuring(names):
    def step(ts, batch):
        return ts._replace(step=ts.step + 1), {
            "loss": ts.step.astype(float),
            **{n: jnp.ones(shape) for n, shape in names.items()},
        }

    return step


def of_metrics(folder, names, **options):
    start = fnet.TrainState(jnp.asarray(0, jnp.int32), {"w": jnp.zeros(())}, (), (), jax.random.key(0))
    run = fnet.Run(folder, resume="auto", accept=("*",))
    return fnet.fit(measuring(names), start, DATA, run=run, **{"batch_size": 8, "chunk_steps": 1, **options})


def test_the_mean_of_an_epoch_is_of_all_its_steps_or_is_not_a_number(tmp_path):
    leave = [lambda event: "stop" if event.step >= 4 else None]
    of_metrics(tmp_path / "run", {"a": ()}, epochs=3, observers=leave)
    _, history = of_metrics(tmp_path / "run", {"b": ()}, epochs=3)
    np.testing.assert_array_equal(history.epochs["a"], [1, np.nan, np.nan])
    np.testing.assert_array_equal(history.epochs["b"], [np.nan, np.nan, 1])
    np.testing.assert_array_equal(history.epochs["loss"], [1, np.nan, 7])


def test_a_metric_of_another_shape_is_refused_before_it_is_trained(tmp_path):
    of_metrics(tmp_path / "run", {"a": (3,)}, epochs=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(fnet.RunError, match=re.escape("metrics were a(3,) and are a(); expected one shape in one")):
        of_metrics(tmp_path / "run", {"a": ()}, epochs=2)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    of_metrics(tmp_path / "run", {"b": ()}, epochs=2)


def test_arrays_cannot_become_a_stream_and_nothing_is_written(folder):
    step, ts, options = parts(epochs=4)
    options = {name: value for name, value in options.items() if name != "batch_size"}
    with pytest.raises(fnet.DataError, match="stands at step 6, and where its stream stood then is not known"):
        fnet.fit(step, ts, Shuffled(whole=True), run=fnet.Run(folder, resume=True, accept=("*",)), **options)
    assert not (folder / "changes.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("programs.json", b"[1]", None),
        ("programs.json", b'{"step": [1, 2]}', None),
        (".saved", "²".encode(), None),
        (".saved", b"9" * 5000, None),
        (".saved", b"\xff\xfe", None),
        ("config.json", b"[" * 100_000, "config.json cannot be read"),
        ("metrics.jsonl", b'{"kind": "epoch", "step": 3, "epoch": 1}\n' * 2, "its step 3 comes after step 3"),
        (
            "metrics.jsonl",
            b'{"kind": "epoch", "step": 3, "epoch": 1, "a": 1}\n{"kind": "epoch", "step": 6, "epoch": 2, "a": [1]}\n',
            "a has another shape than in the row before",
        ),
    ],
)
def test_files_of_a_folder_that_were_edited_raise_no_others_error(name, content, message, folder):
    (folder / name).write_bytes(content)
    change = {} if message else {"act": layers.tanh()}
    with pytest.raises(fnet.RunError, match=message or "step computes something else|step: expected 'SHA-256"):
        fit(folder, resume=True, epochs=4, **change)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"folder": None}, "folder = None; expected the path of a folder"),
        ({"folder": ""}, "folder = ''; expected the path of a folder"),
        ({"folder": "a\0b"}, "is no path of a folder"),
        ({"folder": "a" * 300}, "is no path of a folder"),
        ({"keep_best": ["x"]}, "keep_best = ['x']; expected the name of a result"),
        ({"greatest": "no"}, "greatest = 'no'; expected True or False"),
        ({"best": 3}, "greatest = False and best = 3 say which results are the best; expected keep_best too"),
        ({"save_seconds": True}, "save_seconds = True; expected a number above 0"),
        ({"resume": 1}, "resume = 1; expected False, True, 'auto' or 'newest whole'"),
        ({"resume": np.array([1, 2])}, "expected False, True, 'auto' or 'newest whole'"),
    ],
)
def test_options_of_a_run_that_are_none_are_refused(given, message, tmp_path):
    step, ts, options = parts()
    with pytest.raises(fnet.RunError, match=re.escape(message)):
        fnet.fit(step, ts, DATA, run=fnet.Run(**{"folder": tmp_path / "run", **given}), **options)


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path):
    command = [sys.executable, "-m", "tests.resumable", str(tmp_path / "run"), "--slow", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("step 3" in line for line in process.stdout or ())
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "SIGINT: the run is saved at step" in errors


class ByEpoch:
    """Batches in an order by the number of the epoch, which the source counts; the iterator knows its own."""

    def __init__(self):
        self.epochs = -1

    def __len__(self):
        return 3

    def __iter__(self):
        self.epochs += 1
        return ByEpochReader(self.epochs)


class ByEpochReader:
    def __init__(self, epoch):
        self.epoch, self.at = epoch, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == 3:
            raise StopIteration
        rows = np.random.default_rng(self.epoch).permutation(24)[8 * self.at : 8 * self.at + 8]
        self.at += 1
        return X[rows], Y[rows]

    def get_state(self):
        return {"epoch": self.epoch, "at": self.at}

    def set_state(self, state):
        self.epoch, self.at = state["epoch"], state["at"]


@pytest.mark.parametrize("state", [np.array([1, 2]), {1, 2}, object()])
def test_a_state_that_json_cannot_hold_is_named(state, tmp_path):
    class Odd(ByEpoch):
        def __iter__(self):
            reader = super().__iter__()
            reader.get_state = lambda: state
            return reader

    step, ts, _ = parts()
    with pytest.raises(fnet.DataError, match=r"the stream's state is .*; expected what JSON holds"):
        fnet.fit(step, ts, Odd(), epochs=1, run=fnet.Run(tmp_path / "run"))
