"""Where a resumed run goes on, in the first minutes: the rest of it is `tests/test_resumes.py`."""

from __future__ import annotations

import shutil

import pytest

import fnet
from fnet.runs.checkpoint import saved_steps
from tests.test_resumes import DATA, MODEL, ByEpoch, X, fit, parts
from tests.test_training import assert_same_bits


def test_a_run_goes_on_where_it_stood_by_another_step_that_is_accepted(tmp_path):
    saved, _ = fit(tmp_path / "run")
    end, history = fit(tmp_path / "run", resume=True, epochs=4, rate=0.2, accept=("step",))
    step, _, options = parts(epochs=4, rate=0.2)
    assert len(history.epochs["loss"]) == 4
    assert_same_bits(end, fnet.fit(step, saved, DATA, **options)[0])


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path):
    step, ts, options = parts()
    fnet.fit(step, ts, DATA, run=fnet.Run(tmp_path / "run", save_every=3), **options)
    three, six = saved_steps(tmp_path / "run" / "checkpoints").values()
    shutil.copytree(three, three.with_name("step_000000007"))
    for call in (
        lambda: fit(tmp_path / "run", resume=True, epochs=3),
        lambda: fnet.load_run(tmp_path / "run", MODEL, X[:1]),
        lambda: fnet.load_run(tmp_path / "run", MODEL, X[:1], which=7),
    ):
        with pytest.raises(fnet.CheckpointError, match="step_000000007 was made at step 3; expected its folder under"):
            call()
    assert six.is_dir()


@pytest.mark.parametrize("at", [1, 3, 5, 6])
def test_a_source_that_counts_its_epochs_goes_on_with_the_next(at, tmp_path):
    step, ts, _ = parts()
    straight, _ = fnet.fit(step, ts, ByEpoch(), epochs=4)
    assert_same_bits(fnet.fit(step, ts, ByEpoch(), epochs=4, run=fnet.Run(tmp_path / "whole"))[0], straight)
    run = fnet.Run(tmp_path / "run", resume="auto")
    leave = [lambda event: "stop" if event.step >= at and event.kind == "chunk" else None]
    fnet.fit(step, ts, ByEpoch(), epochs=4, run=run, observers=leave, chunk_steps=1)
    assert_same_bits(fnet.fit(step, ts, ByEpoch(), epochs=4, run=run)[0], straight)
