"""A run under jax' own settings for finding errors: it goes on as before, or says what cannot be."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from jax.core import Tracer

import fnet
from fnet.data import open_arrays
from fnet.training.stopping import early_stopping
from tests.test_training import assert_same_bits, problem


def parts():
    step, start, data, evaluate = problem()
    return step, start, data, {"epochs": 2, "batch_size": 8, "evaluate": evaluate, "validation": data}


@pytest.mark.long
def test_without_jit_the_run_is_pythons_and_its_numbers_the_same(tmp_path, capsys):
    step, start, data, options = parts()
    stop, seen = early_stopping("validation_loss", 5), []

    def watched(ts, batch):
        if not isinstance(batch.inputs, Tracer):  # as in the check before the run, of shapes alone
            seen.append(float(batch.inputs.sum()))
        return step(ts, batch)

    expected, history = fnet.fit(step, start, data, stop=stop, **options)
    with jax.disable_jit():
        run = fnet.Run(tmp_path / "run")
        end, found = fnet.fit(watched, start, data, stop=stop, run=run, explain=True, **options)
    assert "run_chunk is not compiled: jax.disable_jit is in force" in capsys.readouterr().out
    assert len(seen) == 14 and int(end.step) == int(expected.step)
    # operations one by one, which XLA does not fuse
    for name in ("loss", "validation_loss"):
        np.testing.assert_allclose(found.epochs[name], history.epochs[name], rtol=1e-5)
    again, _ = fnet.fit(step, start, data, stop=stop, **options)
    assert_same_bits(again, expected)


@pytest.mark.parametrize("guard", ["disallow", "log"])
def test_transfers_that_fit_makes_are_meant(guard, tmp_path):
    step, start, data, options = parts()
    for name, array in zip(("inputs", "targets"), data[:2], strict=True):
        np.save(tmp_path / name, array)
    mapped = open_arrays(tmp_path / "inputs.npy", tmp_path / "targets.npy")
    model = fnet.mlp(8, 3)
    expected, _ = fnet.fit(step, start, data, **options)
    jax.config.update("jax_transfer_guard", guard)
    try:
        for given in (data, mapped):
            end, _ = fnet.fit(step, start, given, run=fnet.Run(tmp_path / type(given.inputs).__name__), **options)
            assert_same_bits(end, expected)
        fnet.predict(model, end.params, end.state, np.asarray(mapped.inputs), batch_size=8)
    finally:
        jax.config.update("jax_transfer_guard", None)


def test_an_infinity_that_jax_is_to_refuse_is_named():
    step, start, data, options = parts()
    jax.config.update("jax_debug_infs", True)
    try:
        end, _ = fnet.fit(step, start, data, **options)
        for begin in (
            lambda: fnet.fit(step, start, data, stop=early_stopping("validation_loss", 5), **options),
            lambda: fnet.optimizers.reduce_on_plateau(fnet.sgd(0.1), window=1).init(start.params),
        ):
            with pytest.raises(ValueError, match=re.escape("jax_debug_infs is on, and its best is infinite before")):
                begin()
    finally:
        jax.config.update("jax_debug_infs", False)
    assert int(end.step) == 14
