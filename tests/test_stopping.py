"""Early stopping as a reducer in the state: its decisions are Keras' rule, whatever drives the run."""

from __future__ import annotations

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnet
from fnet.core.interpret import walk
from fnet.runs.observers import progress
from fnet.training.stopping import Ending, early_stopping
from fnet.types import Mean, TrainState
from tests.test_training import assert_same_bits, problem

CURVE = [5.0, 4.0, 4.5, 3.9, 3.95, 3.8, np.nan, 3.85, 3.9, 1.0, 0.5]


def rule(curve, patience, least_change=0.0, greatest=False):
    """Where Keras' EarlyStopping stops (evaluations made), and the index of its best."""
    best, at, waited = np.inf, 0, 0
    for i, value in enumerate(curve):
        value = -value if greatest else value
        if value < best - least_change:
            best, at, waited = value, i, 0
        else:
            waited += 1
        if waited >= patience:
            return i + 1, at
    return len(curve), at


def scripted(curve):
    """A step that only counts, and an evaluation that gives the curve: an epoch is a step."""

    def step(ts, batch):
        return ts._replace(step=ts.step + 1, params=ts.params + 1), {"x": batch.inputs.mean()}

    def evaluate(params, state, data):
        return {"loss": Mean(jnp.asarray(curve, float)[params.astype(jnp.int32) - 1], jnp.ones(()))}

    start = TrainState(jnp.asarray(0, jnp.int32), jnp.asarray(0.0), (), (), jax.random.key(0))
    data = fnet.Batch(jnp.arange(4.0), jnp.zeros(4))
    return step, start, {"data": data, "evaluate": evaluate, "validation": data, "batch_size": 4, "epochs": len(curve)}


@pytest.mark.parametrize(
    ("patience", "least_change", "sign"), [(1, 0, 1), (2, 0, 1), (2, 0.15, 1), (3, 0, 1), (3, 0, -1)]
)
def test_a_run_stops_where_keras_would_and_keeps_the_best_weights(patience, least_change, sign):
    curve = [sign * value for value in CURVE]
    ended, best = rule(curve, patience, least_change, greatest=sign < 0)
    assert ended < len(curve)
    step, start, options = scripted(curve)
    stop = early_stopping("validation_loss", patience, least_change=least_change, greatest=sign < 0)
    for chunk_steps in (1, 3, 100):
        end, history = fnet.fit(step, start, stop=stop, chunk_steps=chunk_steps, **options)
        assert int(end.step) == ended == len(history.epochs["x"])
        assert bool(end.stopping.stopped) and int(end.stopping.step) == best + 1
        assert float(fnet.best_weights(end).params) == best + 1 and float(end.params) == ended


def test_a_value_that_equals_the_best_is_no_better():
    step, start, options = scripted([2.0, 1.0, 1.0, 1.0, 0.5])
    end, _ = fnet.fit(step, start, stop=early_stopping("validation_loss", 2), **options)
    assert int(end.step) == 4 and int(end.stopping.step) == 2


def test_train_stops_at_the_same_step_and_stays_there(x64):
    step, start, options = scripted(CURVE)
    stop = early_stopping("validation_loss", 2)
    driven, _ = fnet.fit(step, start, stop=stop, **options)
    data = options.pop("data")
    pure, metrics, results = jax.jit(lambda ts, data: fnet.train(step, ts, data, stop=stop, **options))(start, data)
    assert_same_bits(pure, driven)
    ended, _ = rule(CURVE, 2)
    assert results["loss"].count.tolist() == [1] * ended + [0] * (len(CURVE) - ended)
    assert metrics["x"].shape == (len(CURVE), 1)


def test_members_of_a_population_stop_each_at_its_own_step():
    step, start, options = scripted(CURVE)
    data = options.pop("data")

    @jax.jit
    @jax.vmap
    def members(patience):
        end, _, _ = fnet.train(step, start, data, stop=early_stopping("validation_loss", patience), **options)
        return end.step, end.stopping.step

    steps, bests = members(jnp.asarray([1.0, 2.0, 3.0, 99.0]))
    assert [(a, b + 1) for a, b in (rule(CURVE, p) for p in (1, 2, 3, 99))] == list(
        zip(steps.tolist(), bests.tolist(), strict=True)
    )


def test_stopping_changes_nothing_of_the_steps_before():
    step, ts, data, evaluate = problem()
    options = {"batch_size": 8, "evaluate": evaluate, "validation": data}
    stop = early_stopping("validation_loss", 1, least_change=100.0)
    stopped, history = fnet.fit(step, ts, data, epochs=9, stop=stop, evaluate_every=(3, "steps"), **options)
    assert int(stopped.step) == 6 and history.evaluations["step"].tolist() == [3, 6]
    straight, _ = fnet.fit(step, ts, data, steps=6, batch_size=8)
    assert_same_bits(stopped._replace(stopping=()), straight)


def test_the_order_of_the_examples_stands_outside_of_what_a_stopped_member_skips():
    step, ts, data, evaluate = problem()
    stop = early_stopping("validation_loss", 2)

    def member(key):
        options = {"epochs": 2, "batch_size": 8, "evaluate": evaluate, "validation": data, "stop": stop}
        return fnet.train(step, ts._replace(key=key), data, **options)[0].params

    program = jax.make_jaxpr(jax.vmap(member))(jax.random.split(jax.random.key(0), 2))
    (epochs,) = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan"]
    body = epochs.params["jaxpr"].jaxpr
    scans = [place.eqn for place in walk(body) if place.eqn.primitive.name == "scan"]
    (steps,) = [scan for scan in scans if scan.params["length"] == 6]  # full batches
    sorts = lambda jaxpr: [place for place in walk(jaxpr) if place.eqn.primitive.name == "sort"]  # noqa: E731
    assert sorts(body) and not sorts(steps.params["jaxpr"].jaxpr)


@pytest.mark.parametrize("other", [("validation_loss", {}), ("validation_accuracy", {"keep_weights": False})])
def test_a_state_goes_on_with_its_own_rule_alone(other):
    step, ts, data, evaluate = problem()
    options = {"batch_size": 8, "evaluate": evaluate, "validation": data}
    by_accuracy = early_stopping("validation_accuracy", 30, greatest=True)
    half, _ = fnet.fit(step, ts, data, epochs=1, stop=by_accuracy, **options)
    with pytest.raises(ValueError, match=r"stop is early_stopping by the .*, and the state has another rule"):
        fnet.fit(
            step,
            half,
            data,
            epochs=2,
            stop=early_stopping(other[0], 30, greatest=bool(other[1]), **other[1]),
            **options,
        )
    end, _ = fnet.fit(step, half, data, epochs=2, stop=by_accuracy, **options)
    assert_same_bits(end, fnet.fit(step, ts, data, epochs=2, stop=by_accuracy, **options)[0])


def test_where_no_evaluation_was_finite_there_are_no_best_weights():
    step, ts, data, evaluate = problem()
    stop = early_stopping("validation_loss", patience=5)

    def never_finite(params, state, data):
        return jax.tree.map(lambda a: a * jnp.nan, evaluate(params, state, data))

    options = {"epochs": 2, "batch_size": 8, "validation": data, "stop": stop}
    end, _ = fnet.fit(step, ts, data, evaluate=evaluate, evaluate_every=(3, "epochs"), **options)
    with pytest.raises(
        ValueError, match=r"no evaluation was made, so that there is no best state; .*\(evaluate_every\)"
    ):
        fnet.best_weights(end)
    end, _ = fnet.fit(step, ts, data, evaluate=never_finite, **options)
    with pytest.raises(ValueError, match="none of the 2 evaluations were finite, so that there is no best state"):
        fnet.best_weights(end)
    with pytest.raises(ValueError, match="no evaluation was made"):
        fnet.best_weights(ts._replace(stopping=stop.init(ts)))
    good, _ = fnet.fit(step, ts, data, evaluate=evaluate, **options)
    members = jax.tree.map(lambda *leaves: jnp.stack(leaves), good.stopping, end.stopping)
    with pytest.raises(ValueError, match=r"none of the 2 evaluations of the members \[1\] were finite"):
        fnet.best_weights(good._replace(stopping=members))
    assert_same_bits(fnet.best_weights(good).params, jax.jit(fnet.best_weights)(good).params)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_stopped_run_says_where_and_why_and_what_was_best(sign, tmp_path):
    curve = [sign * value for value in CURVE]
    made, best = rule(curve, 2, greatest=sign < 0)
    step, start, options = scripted(curve)
    stop, ends, page = early_stopping("validation_loss", 2, greatest=sign < 0), [], io.StringIO()
    console = Console(file=page, width=200)
    watching = [progress("curve", console), lambda event: ends.append(event.ended) if event.kind == "end" else None]
    run = fnet.Run(tmp_path / "run")
    _, history = fnet.fit(step, start, stop=stop, run=run, observers=watching, **options)
    reason = f"validation_loss is at its best, {curve[best]:g}, since step {best + 1}, 2 evaluations ago"
    assert history.ended == ends[0] == Ending(made, reason, "validation_loss", pytest.approx(curve[best]), best + 1)
    assert page.getvalue().endswith(f"curve: stopped at step {made}/{len(curve)}: {reason}\n")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ended"] == history.ended._asdict()
    assert f"Stopped early at step {made}: {reason}." in fnet.report.write_report(tmp_path / "run").read_text()
    assert f"Stopped early at step {made}: {reason}." in history._repr_html_()
    labels = [line.get_label() for line in history.plot().axes[-1].lines]
    assert f"best, epoch {best + 1}" in labels and f"stopped, epoch {made}" in labels
    again, same = fnet.fit(step, start, stop=stop, run=run._replace(resume=True), **options)
    assert int(again.step) == made and same.ended == history.ended


def test_a_run_that_no_rule_has_stopped_says_nothing_of_it(tmp_path):
    step, start, options = scripted([3.0, 2.0, 1.0])
    for stop in (None, early_stopping("validation_loss", 2)):
        _, history = fnet.fit(step, start, stop=stop, run=fnet.Run(tmp_path / f"{stop is None}"), **options)
        assert history.ended is None
        assert "ended" not in json.loads((tmp_path / f"{stop is None}" / "summary.json").read_text())
    step, start, options = scripted([np.nan, np.nan, 1.0])
    _, history = fnet.fit(step, start, stop=early_stopping("validation_loss", 2), **options)
    assert history.ended == Ending(2, "validation_loss was not finite in any of 2 evaluations", "validation_loss")
