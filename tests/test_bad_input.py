"""Bad input to the training runtime: each case's whole message, with no step made and no file changed.

A message is one paragraph: what was given, what was expected, what to do. ``{at}`` in a text is the test's folder.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet import CheckpointError, DataError, LayerError, RunError
from fnet.data import Stream, open_arrays
from fnet.export import ExportError, Flattened, Rule, from_tensors, load_weights, save_weights, to_tensors, torch_names
from fnet.metrics import accuracy, gradient_histograms
from fnet.report import save_evaluation, write_report
from fnet.runs.checkpoint import save_checkpoint
from fnet.runs.history import History
from fnet.runs.observers import histograms, profile, samples, tensorboard, time_limit
from tests.test_training import problem

_, _, (X, Y, _), EVALUATE = problem()
X, Y = np.asarray(X), np.asarray(Y)
BATCH = fnet.Batch(X, Y)
EVALUATED = {"evaluate": EVALUATE, "validation": BATCH}
DENSE = {"dense_0": {"w": np.zeros((6, 2), np.float32), "b": np.zeros(2, np.float32)}}


def fit(**changes):
    """A run that would be fine but for the changes; its observers must hear of no step."""
    step, ts, data, _ = problem()
    given = {"step": step, "ts": ts, "data": data, "epochs": 2, "batch_size": 8, "chunk_steps": 3} | changes
    observers = given.pop("observers_are", [*given.pop("observers", ()), steps.append])
    return fnet.fit(given.pop("step"), given.pop("ts"), given.pop("data"), observers=observers, **given)


steps: list = []  # what the observer of `fit` was told
held: dict = {}  # the files that were there before the call, with their bytes


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def chatty(event):
    return 42


def growing(ts, batch):
    params = {**ts.params, "dense_0": {**ts.params["dense_0"], "b": jnp.zeros(9)}}
    return ts._replace(step=ts.step + 1, params=params), {}


class Batches:
    """An iterable without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Unhashable:
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __call__(self, ts, batch):
        return ts, {}


def measuring(metrics):
    """A step that measures these."""
    return lambda ts, batch: (ts._replace(step=ts.step + 1), metrics)


def with_metric(name, monitors=None):
    gradient = fnet.backprop(fnet.mlp(8, 3), fnet.softmax_cross_entropy, {name: accuracy})
    return fnet.make_step(gradient, fnet.adam(0.01), monitors)


def plain_loss(params, batch, key):
    return params["dense_0"]["b"].sum()


def stopped_state(changes=100.0):
    """That of a run whose rule asks for changes."""
    step, ts, data, _ = problem()
    stop = fnet.early_stopping("validation_loss", 1, least_change=changes)
    return fnet.fit(step, ts, data, epochs=2, batch_size=8, stop=stop, **EVALUATED)[0]


def another_rule():
    step, ts, data, _ = problem()
    options = {"batch_size": 8, **EVALUATED}
    by_loss, by_accuracy = (fnet.early_stopping(f"validation_{name}", 3) for name in ("loss", "accuracy"))
    fnet.fit(step, ts, data, epochs=1, stop=by_loss, run=fnet.Run("run"), **options)
    return fit(**EVALUATED, stop=by_accuracy, run=fnet.Run(there("run"), resume=True))


def spoiled(name: str, content: str) -> Path:
    """The folder of a run that stands at step 3, one of its files with other content."""
    folder = begun()
    (folder / name).write_text(content)
    return there(folder)


def smaller():
    model, optimizer = fnet.mlp(4, 3), fnet.adam(0.01)
    params, state = fnet.init(model, jax.random.key(0), X[:1])
    ts = fnet.init_train_state(params, optimizer, problem()[1].key, state)
    return {"step": fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer), "ts": ts}


def files() -> dict[Path, bytes]:
    """Everything in the test's folder but locks."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name != ".lock"}


def there(path) -> Path:
    """The path, whose files must stay as they are."""
    held.update(files())
    return Path(path)


def text(name: str) -> Path:
    """A file of someone's own."""
    Path(name).write_text("dear reader")
    return there(name)


def folder(name: str, *files: str) -> Path:
    """A folder with such files."""
    Path(name).mkdir()
    for file in files:
        (Path(name) / file).write_text("dear reader")
    return there(name)


def begun(**config) -> Path:
    """The folder of a run that stands at step 3."""
    step, ts, data, _ = problem()
    fnet.fit(step, ts, data, steps=3, batch_size=8, run=fnet.Run("run", config))
    return there("run")


def saved(outputs=np.zeros((4, 3)), targets=np.zeros(4, int), weights=None, inputs=np.zeros((4, 8)), **options):
    """An evaluation of 4 examples of 3 classes, but for the changes."""
    Path("run").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (Path("run") / name).write_text("{}")
    there("run")
    save_evaluation("run", outputs, fnet.Batch(inputs, targets, weights), **options)


def experiment() -> Path:
    """The folder of an experiment with one run."""
    (Path("first") / "run").mkdir(parents=True)
    for name in ("config.json", "run/config.json", "run/metrics.jsonl"):
        (Path("first") / name).write_text("{}")
    return there("first")


class OfTorch:
    """As PyTorch's tensors of bfloat16 are."""

    def __array__(self, *args, **options):
        raise TypeError("Got unsupported ScalarType BFloat16")


CASES = {
    # --- the arguments of fit
    "no epochs": (lambda: fit(epochs=0), ValueError, "fit: epochs = 0; expected at least 1"),
    "half an epoch": (lambda: fit(epochs=2.5), ValueError, "fit: epochs = 2.5; expected a whole number of at least 1"),
    "no end": (
        lambda: fit(epochs=None),
        ValueError,
        "epochs = None and steps = None; expected one of them: where the run ends",
    ),
    "two ends": (
        lambda: fit(steps=3),
        ValueError,
        "epochs = 2 and steps = 3; expected one of them: where the run ends",
    ),
    "no steps": (lambda: fit(epochs=None, steps=0), ValueError, "fit: steps = 0; expected at least 1"),
    "no chunk": (lambda: fit(chunk_steps=0), ValueError, "fit: chunk_steps = 0; expected at least 1"),
    "no batch size": (
        lambda: fit(batch_size=None),
        DataError,
        "batch_size is not given; expected how many examples an update takes",
    ),
    "a batch size above the data": (
        lambda: fit(batch_size=54),
        DataError,
        "batch_size = 54; expected a whole number from 1 to 53, the number of examples in data "
        "(all of them at once: batch_size=53)",
    ),
    "a batch size of 0": (
        lambda: fit(batch_size=0),
        DataError,
        "batch_size = 0; expected a whole number from 1 to 53, the number of examples in data "
        "(all of them at once: batch_size=53)",
    ),
    "evaluate alone": (
        lambda: fit(evaluate=lambda *a: {}),
        ValueError,
        "validation is not given; expected evaluate and validation together, or neither",
    ),
    "validation alone": (
        lambda: fit(validation=BATCH),
        ValueError,
        "evaluate is not given; expected evaluate and validation together, or neither",
    ),
    "evaluate_every a number": (
        lambda: fit(**EVALUATED, evaluate_every=5),
        ValueError,
        "evaluate_every = 5; expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1",
    ),
    "evaluate_every 0 steps": (
        lambda: fit(**EVALUATED, evaluate_every=(0, "steps")),
        ValueError,
        "evaluate_every = (0, 'steps'); expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1",
    ),
    "evaluate_every minutes": (
        lambda: fit(**EVALUATED, evaluate_every=(1, "minutes")),
        ValueError,
        "evaluate_every = (1, 'minutes'); expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1",
    ),
    "evaluate_every True": (
        lambda: fit(**EVALUATED, evaluate_every=(True, "steps")),
        ValueError,
        "evaluate_every = (True, 'steps'); expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1",
    ),
    "stop without evaluate": (
        lambda: fit(stop=fnet.early_stopping("validation_loss", 2)),
        ValueError,
        "stop is given without evaluate; expected evaluate and validation, whose results it looks at",
    ),
    "stop by a metric that is not there": (
        lambda: fit(**EVALUATED, stop=fnet.early_stopping("loss", 2)),
        ValueError,
        "early_stopping: no result is called 'loss'; expected one of validation_accuracy, validation_loss",
    ),
    "stop by a metric of a shape": (
        lambda: fit(
            evaluate=lambda p, s, d: {"loss": jnp.ones(3)},
            validation=BATCH,
            stop=fnet.early_stopping("validation_loss", 2),
        ),
        ValueError,
        "early_stopping: validation_loss has shape (3,); expected one number",
    ),
    "two results of one name": (
        lambda: fit(
            evaluate=lambda p, s, d: {"loss": jnp.ones(()), "b_loss": jnp.ones(())},
            validation={"a": BATCH, "a_b": BATCH},
        ),
        ValueError,
        "two results are called 'a_b_loss'; expected one: give a validation set another name",
    ),
    "a state that has ended": (
        lambda: fit(ts=problem()[1]._replace(step=jnp.asarray(14, jnp.int32))),
        ValueError,
        "the state stands at step 14, but is to end at step 14, after epoch 2; epochs and steps "
        "are counted from step 0: give a later end",
    ),
    "an observer that is none": (
        lambda: fit(observers=[3]),
        TypeError,
        "observers[0] is 3; expected a function",
    ),
    "an observer that answers a number": (
        lambda: fit(observers=[chatty]),
        ValueError,
        "observer chatty returned 42; expected 'continue', 'stop' or None",
    ),
    "no run but its folder": (lambda: fit(run="runs/a"), TypeError, "run is 'runs/a'; expected fnet.Run(folder)"),
    "parameters as state": (
        lambda: fit(ts={"w": X}),
        TypeError,
        "ts is a dict; expected a TrainState, as fnet.init_train_state makes one",
    ),
    "a step that is none": (
        lambda: fit(step=0.1),
        TypeError,
        "step is 0.1; expected a function",
    ),
    "an evaluation that is none": (
        lambda: fit(evaluate="accuracy", validation=BATCH),
        TypeError,
        "evaluate is 'accuracy'; expected a function",
    ),
    "a metric as rule to stop": (
        lambda: fit(**EVALUATED, stop="validation_loss"),
        TypeError,
        "stop is 'validation_loss'; expected a Reducer, as fnet.early_stopping makes one",
    ),
    "an observer without a list": (
        lambda: fit(observers_are=steps.append),
        TypeError,
        "observers is a builtin_function_or_method; expected a list of functions",
    ),
    "a state that was stopped": (
        lambda: fit(ts=stopped_state()),
        ValueError,
        "the state was stopped by its rule at step 14; expected one that goes on: "
        "ts._replace(stopping=()) begins without its rule, or anew with another",
    ),
    "another rule than the state's": (
        lambda: fit(**EVALUATED, ts=stopped_state(0), stop=fnet.early_stopping("validation_loss", 7)),
        ValueError,
        "stop is early_stopping by the least validation_loss, and the state has another rule: "
        "patience 1.0; expected that which it began with: ts._replace(stopping=()) begins anew "
        "with the one given",
    ),
    "validation without a set": (
        lambda: fit(evaluate=EVALUATE, validation={}),
        ValueError,
        "validation holds no set; expected a Batch, or a mapping of names to Batches",
    ),
    # --- its step
    "a step that grows": (
        lambda: fit(step=growing),
        ValueError,
        "step turns params/dense_0/b from float32(8,) into float32(9,); expected no change",
    ),
    "a step that does not count": (
        lambda: fit(step=lambda ts, batch: (ts, {})),
        ValueError,
        "3 steps led from step 0 to step 0; expected a step function that counts, TrainState.step"
        " + 1, as fnet.make_step does",
    ),
    "a metric of a name that is taken": (
        lambda: fit(step=lambda ts, batch: (ts._replace(step=ts.step + 1), {"epoch": 1.0})),
        ValueError,
        "a metric is called 'epoch'; expected another name, as rows of metrics have that already",
    ),
    "a step that cannot be hashed": (
        lambda: fit(step=Unhashable()),
        TypeError,
        "step is a Unhashable without a hash; expected a function, or a class with __hash__",
    ),
    "two metrics of one name": (
        lambda: fit(step=measuring({"a": {"b": 1.0}, "a/b": 2.0})),
        ValueError,
        "two metrics or results are called 'a/b'; expected one: give one of them another name",
    ),
    "a metric of the name of a result": (
        lambda: fit(**EVALUATED, step=measuring({"validation_loss": 1.0})),
        ValueError,
        "two metrics or results are called 'validation_loss'; expected one: give one of them another name",
    ),
    "a metric without a name": (
        lambda: fit(step=measuring(1.0)),
        ValueError,
        "the metrics are one number without a name; expected a dict of metrics by name",
    ),
    "a complex metric": (
        lambda: fit(step=measuring({"a": jnp.ones(2, complex)})),
        ValueError,
        "the metric 'a' is complex64(2,); expected real numbers, one at least",
    ),
    "a metric of no numbers": (
        lambda: fit(step=measuring({"a": jnp.ones((0, 3))})),
        ValueError,
        "the metric 'a' is float32(0, 3); expected real numbers, one at least",
    ),
    "a metric called loss": (
        lambda: fit(step=with_metric("loss")),
        ValueError,
        "a metric is called 'loss', as one that is measured already; expected another name",
    ),
    "a monitor called as a metric": (
        lambda: fit(step=with_metric("accuracy", {"accuracy": lambda grads: jnp.ones(())})),
        ValueError,
        "a metric is called 'accuracy', as one that is measured already; expected another name",
    ),
    # --- its data
    "data as a dict": (
        lambda: fit(data={"x": X, "y": Y}),
        DataError,
        "data is a dict of 'x', 'y'; expected Batch(inputs, targets) or Batch(inputs, targets, weights), or a dict "
        "with the names inputs, targets and perhaps weights",
    ),
    "too few features": (lambda: fit(data=fnet.Batch(X[:, :5], Y)), LayerError, "dense_0: expected 6 features, got 5"),
    "inputs of bytes": (
        lambda: fit(data=fnet.Batch(X.astype(np.uint8), Y)),
        LayerError,
        "dense_0: expected float32 features like its parameters, got uint8: convert the inputs",
    ),
    "inputs that are not finite": (
        lambda: fit(data=fnet.Batch(changed(X, (2, 1), np.nan), Y)),
        DataError,
        "data.inputs[2, 1] = nan; expected finite numbers: drop or replace them (1 value in all)",
    ),
    "fewer inputs than targets": (
        lambda: fit(data=fnet.Batch(X[:9], Y)),
        DataError,
        "data.targets has 53 examples (shape (53,)) and data.inputs has 9; expected the same "
        "number in each: the first axis of every array is the examples",
    ),
    "a label above the classes": (
        lambda: fit(data=fnet.Batch(X, changed(Y, 17, 3))),
        DataError,
        "data: softmax_cross_entropy: label 3 in example 17 is outside 0..2 (outputs have 3 classes)",
    ),
    "a negative label": (
        lambda: fit(data=fnet.Batch(X, changed(Y, 4, -1))),
        DataError,
        "data: softmax_cross_entropy: label -1 in example 4 is outside 0..2 (outputs have 3 classes)",
    ),
    "a label above the classes in validation": (
        lambda: fit(evaluate=problem()[3], validation=fnet.Batch(X, changed(Y, 7, 9))),
        DataError,
        "validation: softmax_cross_entropy: label 9 in example 7 is outside 0..2 (outputs have 3 classes)",
    ),
    "an empty stream": (
        lambda: fit(data=Stream([], 3), batch_size=None),
        DataError,
        "Stream: the source is empty; expected at least 1 batch",
    ),
    "a stream of arrays": (
        lambda: fit(data=Stream([np.zeros(3)], 3), batch_size=None),
        DataError,
        "a batch of the stream is a ndarray; expected Batch(inputs, targets) or Batch(inputs, targets, weights)",
    ),
    "a stream that is read once": (
        lambda: fit(data=Stream(iter([BATCH]), 3), batch_size=None),
        DataError,
        "Stream: the source is an iterator, list_iterator, which gives its batches but once; "
        "expected an iterable that begins anew, such as a list or a grain dataset",
    ),
    "a stream of epochs of 0 steps": (
        lambda: fit(data=Stream([BATCH], 0), batch_size=None),
        DataError,
        "Stream: steps_per_epoch = 0; expected a whole number of at least 1",
    ),
    "a stream with a batch size": (
        lambda: fit(data=Stream([BATCH], 3)),
        ValueError,
        "batch_size = 8; expected none: a stream gives batches",
    ),
    "a stream that is not finite": (
        lambda: fit(data=Stream([(X * np.nan, Y)], 3), batch_size=None),
        DataError,
        "the stream's first batch.inputs[0, 0] = nan; expected finite numbers: drop or replace "
        "them (318 values in all)",
    ),
    "a stream that ends": (
        lambda: fit(data=Stream(Batches([BATCH] * 2), 3), batch_size=None),
        DataError,
        "the stream ended after 2 batches; expected one that lasts as long as the run: repeat it",
    ),
    "a stream that is no iterable": (
        lambda: fit(data=Stream(3, 3), batch_size=None),
        DataError,
        "Stream: the source is of type int; expected an iterable of batches",
    ),
    "a file that is no array": (
        lambda: open_arrays(text("a.npy"), text("a.npy")),
        DataError,
        "a.npy cannot be mapped (it is no array, or one of objects); expected a .npy file that numpy.save wrote",
    ),
    "a file that is not there": (
        lambda: open_arrays("gone.npy", "gone.npy"),
        DataError,
        "gone.npy cannot be mapped (FileNotFoundError: [Errno 2] No such file or directory: "
        "'gone.npy'); expected a .npy file that numpy.save wrote",
    ),
    # --- its folder
    "save_every 0": (
        lambda: fit(run=fnet.Run("a", save_every=0)),
        ValueError,
        "Run: save_every = 0; expected at least 1",
    ),
    "keep_last 1.5": (
        lambda: fit(run=fnet.Run("a", keep_last=1.5)),
        ValueError,
        "Run: keep_last = 1.5; expected a whole number of at least 1",
    ),
    "keep_every True": (
        lambda: fit(run=fnet.Run("a", keep_every=True)),
        ValueError,
        "Run: keep_every = True; expected a whole number of at least 1",
    ),
    "save_seconds 0": (
        lambda: fit(run=fnet.Run("a", save_seconds=0)),
        RunError,
        "Run: save_seconds = 0; expected a number above 0",
    ),
    "keep_last None": (
        lambda: fit(run=fnet.Run("a", keep_last=None)),
        RunError,
        "Run: keep_last = None; expected a whole number of at least 1: keep_every=1 keeps them all",
    ),
    "save_seconds as text": (
        lambda: fit(run=fnet.Run("a", save_seconds="5")),
        RunError,
        "Run: save_seconds = '5'; expected a number above 0",
    ),
    "a function in the configuration": (
        lambda: fit(run=fnet.Run("a", {"rate": {"f": plain_loss}})),
        RunError,
        "Run: config['rate']['f'] is of type function; expected what JSON holds, as it is stored in a file",
    ),
    "a configuration by numbers": (
        lambda: fit(run=fnet.Run("a", {(1, 2): 3})),
        RunError,
        "Run: config has the key (1, 2); expected text, as it is stored in a file",
    ),
    "a list as configuration": (
        lambda: fit(run=fnet.Run("a", config=[1, 2])),
        RunError,
        "Run: config is of type list; expected a dataclass or a mapping of names to values, as it is stored in a file",
    ),
    "keep_best without evaluation": (
        lambda: fit(run=fnet.Run("a", keep_best="validation_loss")),
        ValueError,
        "Run: keep_best = 'validation_loss'; expected the name of a result of the evaluation: "
        "there is none without evaluate and validation",
    ),
    "keep_best of no result": (
        lambda: fit(**EVALUATED, run=fnet.Run("a", keep_best="loss")),
        ValueError,
        "Run: keep_best = 'loss'; expected the name of a result of the evaluation: "
        "validation_accuracy, validation_loss",
    ),
    "keep_best of a shape": (
        lambda: fit(
            evaluate=lambda p, s, d: {"share": jnp.ones(3)},
            validation=BATCH,
            run=fnet.Run("a", keep_best="validation_share"),
        ),
        ValueError,
        "Run: keep_best = 'validation_share', which has shape (3,); expected a result that is one number",
    ),
    "a folder that holds a thesis": (
        lambda: fit(run=fnet.Run(folder("thesis", "thesis.tex"))),
        RunError,
        "{at}/thesis holds thesis.tex and no config.json, and is left as it is; expected a run's "
        "folder or an empty one: name another",
    ),
    "a thesis to resume": (
        lambda: fit(run=fnet.Run(folder("thesis", "thesis.tex"), resume=True)),
        RunError,
        "{at}/thesis holds thesis.tex and no config.json, and is left as it is; expected a run's "
        "folder or an empty one: name another",
    ),
    "a file as folder": (
        lambda: fit(run=fnet.Run(text("a.txt"))),
        RunError,
        "{at}/a.txt cannot be written to (NotADirectoryError: [Errno 20] Not a directory: "
        "'{at}/a.txt/checkpoints'); expected a folder that can, on a disk with room: name "
        "another, or free some",
    ),
    "another configuration": (
        lambda: fit(run=fnet.Run(begun(rate=0.1), {"rate": 0.2}, resume=True)),
        RunError,
        "{at}/run is a run of another configuration: rate: expected 0.1 (as begun), found 0.2. "
        "Resume it with its own, which config.json holds, or name another folder",
    ),
    "a configuration that is no JSON": (
        lambda: fit(run=fnet.Run(folder("b", "config.json"), resume=True)),
        RunError,
        "{at}/b/config.json cannot be read (JSONDecodeError: Expecting value: line 1 column 1 "
        "(char 0)); expected the configuration that the run began with, as JSON: put it there, or"
        " name another folder",
    ),
    "a run that is there": (
        lambda: fit(run=fnet.Run(begun())),
        RunError,
        "{at}/run holds checkpoints, config.json, environment.json, metrics.jsonl already and is left as "
        "it is; expected an empty folder: resume the run that is there with resume=True, or name "
        "another",
    ),
    "other data than before": (
        lambda: fit(data=fnet.Batch(X[:40], Y[:40]), run=fnet.Run(begun(), resume=True)),
        RunError,
        "{at}/run was run otherwise: examples: expected 53 (as saved), "
        "found 40; rows: expected 'SHA-256 70b9c02cea7a…' (as saved), found 'SHA-256 "
        "aed4137d2727…'. Resume it with its own, name another folder, or say that it is meant: "
        "Run(accept=('examples', 'rows', 'step'))",
    ),
    "other data of the same shapes": (
        lambda: fit(data=fnet.Batch(2 * X, Y), run=fnet.Run(begun(), resume=True)),
        RunError,
        "{at}/run was run otherwise: rows: expected 'SHA-256 "
        "70b9c02cea7a…' (as saved), found 'SHA-256 c9abd0c72ed3…'. Resume it with its own, "
        "name another folder, or say that it is meant: Run(accept=('rows',))",
    ),
    "other metrics than before": (
        lambda: fit(step=measuring({"a": 1.0}), run=fnet.Run(begun(), resume=True)),
        RunError,
        "{at}/run was run otherwise: metrics: expected ['accuracy()', "
        "'gradient_norm/all()', 'gradient_norm/dense_0()', 'gradient_norm/dense_1()', "
        "'learning_rate()', 'loss()'] (as saved), found ['a()']. Resume it with its own, name "
        "another folder, or say that it is meant: Run(accept=('metrics', 'step'))",
    ),
    "another rule than before": (
        lambda: another_rule(),
        RunError,
        "{at}/run was run otherwise: rule to stop: expected "
        "'early_stopping by the least validation_loss' (as saved), found 'early_stopping by the "
        "least validation_accuracy'. Resume it with its own, name another folder, or say that it is "
        "meant: Run(accept=('evaluation', 'rule to stop'))",
    ),
    "metrics with a blank line": (
        lambda: fit(run=fnet.Run(spoiled("metrics.jsonl", "\n{}\n"), resume=True)),
        RunError,
        "{at}/run/metrics.jsonl, line 1: b'\\n' is no row of metrics (JSONDecodeError: Expecting "
        "value: line 2 column 1 (char 1)); expected an object with kind, step, epoch and numbers:"
        " mend or delete that line",
    ),
    "metrics of text": (
        lambda: fit(
            run=fnet.Run(
                spoiled("metrics.jsonl", '{"kind": "epoch", "step": 1, "epoch": 1, "loss": "low"}\n'), resume=True
            )
        ),
        RunError,
        '{at}/run/metrics.jsonl, line 1: b\'{"kind": "epoch", "step": 1, "epoch": 1, "loss": '
        '"low"}\\n\' is no row of metrics (ValueError: loss is no number); expected an object with '
        "kind, step, epoch and numbers: mend or delete that line",
    ),
    "another batch size than before": (
        lambda: fit(batch_size=9, run=fnet.Run(begun(epochs=3), {"epochs": 99}, resume=True)),
        RunError,
        "{at}/run was run otherwise: batch_size: expected 8 (as saved),"
        " found 9. Resume it with its own, name another folder, or say that it is meant: "
        "Run(accept=('batch_size', 'step'))",
    ),
    "another key than before": (
        lambda: fit(ts=problem()[1]._replace(key=jax.random.key(5)), run=fnet.Run(begun(), resume=True)),
        RunError,
        "{at}/run was run otherwise: key: expected [3266265133, "
        "2600008386] (as saved), found [0, 5]. Resume it with its own, name another folder, or say that it is "
        "meant: Run(accept=('key',))",
    ),
    "a run that stands beyond its end": (
        lambda: fit(epochs=None, steps=2, run=fnet.Run(begun(), resume=True)),
        RunError,
        "the run in {at}/run stands at step 3, but is to end at step 2, after epoch 0.285714; "
        "epochs and steps are counted from step 0: give a later end",
    ),
    "another model than before": (
        lambda: fit(**smaller(), run=fnet.Run(begun(), resume=True)),
        CheckpointError,
        "{at}/run/checkpoints/step_000000003 is of another model or optimizer: params/dense_0/b: "
        "expected float32(4,), found float32(8,); params/dense_0/w: expected float32(6, 4), found"
        " float32(6, 8); params/dense_1/w: expected float32(4, 3), found float32(8, 3). Give the "
        "one it was saved from, or another folder to start in",
    ),
    "a step that is saved already": (
        lambda: save_checkpoint(begun() / "checkpoints", 3, []),
        CheckpointError,
        "{at}/run/checkpoints/step_000000003 exists already and is left as it is; expected a step"
        " that is not saved yet",
    ),
    # --- rules and observers
    "patience 0": (
        lambda: fnet.early_stopping("loss", 0),
        ValueError,
        "early_stopping: patience = 0; expected 0 < patience < inf",
    ),
    "a negative least change": (
        lambda: fnet.early_stopping("loss", 2, least_change=-1),
        ValueError,
        "early_stopping: least_change = -1; expected 0 <= least_change < inf",
    ),
    "patience as text": (
        lambda: fnet.early_stopping("loss", "2"),
        TypeError,
        "early_stopping: patience = '2'; expected a number",
    ),
    "no best weights": (
        lambda: fnet.best_weights(problem()[1]),
        ValueError,
        "best_weights: the state holds none; expected that of a run with stop=early_stopping(...)",
    ),
    "histograms every 0 steps": (
        lambda: histograms("a", every=(0, "steps")),
        ValueError,
        "histograms: every = (0, 'steps'); expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1",
    ),
    "histograms every epoch": (
        lambda: histograms("a", every="epoch"),
        ValueError,
        "histograms: every = 'epoch'; expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1",
    ),
    "histograms of no bins": (
        lambda: histograms("a", bins=0),
        ValueError,
        "histograms: bins = 0; expected a whole number of at least 1",
    ),
    "TensorBoard of 2.5 bins": (
        lambda: tensorboard("a", bins=2.5),
        ValueError,
        "tensorboard: bins = 2.5; expected a whole number of at least 1",
    ),
    "TensorBoard every day": (
        lambda: tensorboard("a", histograms=(1, "days")),
        ValueError,
        "tensorboard: histograms = (1, 'days'); expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1",
    ),
    "samples every": (
        lambda: samples(str, "a", every=(1,)),
        ValueError,
        "samples: every = (1,); expected (n, 'steps') or (n, 'epochs') with a whole n of at least 1",
    ),
    "a trace of no steps": (
        lambda: profile("a", 5, 5),
        ValueError,
        "profile: first = 5 and last = 5; expected 0 <= first < last",
    ),
    "no time": (lambda: time_limit(0), ValueError, "time_limit: seconds = 0; expected a number above 0"),
    "gradient histograms of no bins": (
        lambda: gradient_histograms(0),
        ValueError,
        "gradient_histograms: bins = 0; expected at least 1",
    ),
    # --- what is read and written
    "a CSV that exists": (
        lambda: History({}, {}, {}, 0.0, 0.0).to_csv(text("epochs.csv")),
        FileExistsError,
        "epochs.csv exists already and is left as it is; expected a new file: name another, or delete this one",
    ),
    "logits of three axes": (
        lambda: saved(outputs=np.zeros((4, 3, 2))),
        ValueError,
        "save_evaluation: outputs have shape (4, 3, 2); expected logits (N, K)",
    ),
    "targets that are floats": (
        lambda: saved(targets=np.zeros(4)),
        ValueError,
        "save_evaluation: targets are float64(4,); expected integers (4,), one for each row of outputs",
    ),
    "fewer targets than logits": (
        lambda: saved(targets=np.zeros(3, int)),
        ValueError,
        "save_evaluation: targets are int64(3,); expected integers (4,), one for each row of outputs",
    ),
    "a target above the logits": (
        lambda: saved(targets=np.array([0, 1, 3, 0])),
        ValueError,
        "save_evaluation: the target of example 2 is 3; expected 0 to 2, as outputs have 3 classes",
    ),
    "fewer weights than logits": (
        lambda: saved(weights=np.ones(3)),
        ValueError,
        "save_evaluation: weights have shape (3,); expected (4,), one for each example",
    ),
    "fewer names than classes": (
        lambda: saved(names=["a"]),
        ValueError,
        "save_evaluation: 1 names; expected 3, one for each class of the outputs",
    ),
    "1.5 worst examples": (
        lambda: saved(worst=1.5),
        ValueError,
        "save_evaluation: worst = 1.5; expected a whole number of at least 0",
    ),
    "pictures of more numbers": (
        lambda: saved(images=(3, 3)),
        ValueError,
        "save_evaluation: images = (3, 3), and inputs have shape (4, 8); expected 4 of as many "
        "numbers as (H, W), (H, W, 3) or (H, W, 4) has: name that shape, or () for no pictures",
    ),
    "pictures of one axis": (
        lambda: saved(images=(8,)),
        ValueError,
        "save_evaluation: images = (8,), and inputs have shape (4, 8); expected 4 of as many "
        "numbers as (H, W), (H, W, 3) or (H, W, 4) has: name that shape, or () for no pictures",
    ),
    "pictures of sizes below 0": (
        lambda: saved(inputs=np.zeros((4, 64)), images=(-8, -8)),
        ValueError,
        "save_evaluation: images = (-8, -8), and inputs have shape (4, 64); expected 4 of as many "
        "numbers as (H, W), (H, W, 3) or (H, W, 4) has: name that shape, or () for no pictures",
    ),
    "pictures of one number": (
        lambda: saved(images=8),
        ValueError,
        "save_evaluation: images = 8, and inputs have shape (4, 8); expected 4 of as many "
        "numbers as (H, W), (H, W, 3) or (H, W, 4) has: name that shape, or () for no pictures",
    ),
    "pictures without pixels": (
        lambda: saved(inputs=np.zeros((4, 0, 5))),
        ValueError,
        "save_evaluation: images = (0, 5), and inputs have shape (4, 0, 5); expected 4 of as many "
        "numbers as (H, W), (H, W, 3) or (H, W, 4) has: name that shape, or () for no pictures",
    ),
    "pictures of text": (
        lambda: saved(inputs=np.full((4, 2, 2), "a")),
        ValueError,
        "save_evaluation: inputs of shape (4, 2, 2) are <U1; expected real numbers for pictures of (2, 2): give those, "
        "or images=() for no pictures",
    ),
    "a weight below 0": (
        lambda: saved(weights=np.array([1.0, 0.0, -2.0, 1.0])),
        ValueError,
        "save_evaluation: the weight of example 2 is -2; expected a finite number of at least 0: 0 leaves the example "
        "out",
    ),
    "a weight that is NaN": (
        lambda: saved(weights=np.array([1.0, np.nan, np.inf, 1.0])),
        ValueError,
        "save_evaluation: the weight of example 1 is nan; expected a finite number of at least 0: 0 leaves the example "
        "out",
    ),
    "the page of an experiment": (
        lambda: write_report(experiment()),
        RunError,
        "first holds config.json, run, and no metrics.jsonl; expected the folder of a run, which fit(run=fnet.Run(...))"
        " makes: name one of those within, as first/run",
    ),
    "a page in no folder": (
        lambda: write_report(begun(), "gone/a.html"),
        FileNotFoundError,
        "gone/a.html cannot be written (No such file or directory); expected gone to be a folder that can be written "
        "to: make it, or name another file",
    ),
    "an evaluation for a thesis": (
        lambda: save_evaluation(folder("thesis", "thesis.tex"), np.eye(2), ([], [0, 1])),
        RunError,
        "thesis holds thesis.tex, and no config.json; expected the folder of a run, which fit(run=fnet.Run(...)) makes",
    ),
    "the page of a thesis": (
        lambda: write_report(folder("thesis", "thesis.tex")),
        RunError,
        "thesis holds thesis.tex, and no config.json; expected the folder of a run, which fit(run=fnet.Run(...)) makes",
    ),
    "the page of nothing": (
        lambda: write_report("gone"),
        RunError,
        "gone is not there; expected the folder of a run, which fit(run=fnet.Run(...)) makes",
    ),
    "a page over another file": (
        lambda: write_report(begun(), text("mine.html")),
        FileExistsError,
        "mine.html is not a page of fnet's and is left as it is; name another file",
    ),
    "a leaf that is not there": (
        lambda: to_tensors({"a": 1.0}, {"b": "c"}),
        ExportError,
        "the name map does not fit the tree: there is no leaf b; expected every leaf once, under a name of its own",
    ),
    "two leaves of one name": (
        lambda: to_tensors({"a": 1.0, "b": 1.0}, {"a": "b"}),
        ExportError,
        "the name map does not fit the tree: the name b is given 2 times; expected every leaf "
        "once, under a name of its own",
    ),
    "a leaf without a name": (
        lambda: to_tensors({"a": 1.0, "b": 1.0}, [Rule(("a",), ("x",))]),
        ExportError,
        "the name map does not fit the tree: the leaf b has no name; expected every leaf once, under a name of its own",
    ),
    "a key as weight": (
        lambda: to_tensors({"key": jax.random.key(0)}),
        ExportError,
        "key is of dtype key<fry>; expected numbers: leave it out (of a key, its key_data)",
    ),
    "weights over another file": (
        lambda: save_weights(text("mine"), {"a": jnp.ones(2)}),
        ExportError,
        "mine exists already and is left as it is; expected a file that does not: name another",
    ),
    "weights of a text": (
        lambda: load_weights(text("mine"), {"a": jnp.ones(2)}),
        ExportError,
        "mine cannot be read (SafetensorError: Error while deserializing header: header too "
        "large); expected a whole safetensors file",
    ),
    "weights of another model": (
        lambda: from_tensors({"a": np.ones(2, np.float32)}, {"a": np.ones(3, np.float32), "b": np.ones(1, np.float32)}),
        ExportError,
        "tensors is not of this model: a: expected float32[3], found float32[2]; b: expected "
        "float32[1], found nothing. Give the model it is of, or its names",
    ),
    "64 bits as 32": (
        lambda: from_tensors({"w": np.zeros(2)}, {"w": np.zeros(2)}),
        ExportError,
        "w was restored as float32[2]; expected float64[2]: mend its Rule, or set jax_enable_x64 for 64 bits",
    ),
    "a module that is not there": (
        lambda: torch_names(DENSE, {"dense_1": "0.*"}),
        ExportError,
        "torch_names: no leaf is at 'dense_1'; expected the path of one of dense_0/b, dense_0/w",
    ),
    "layers without a module": (
        lambda: torch_names(DENSE, {}),
        ExportError,
        "torch_names: dense_0/b, dense_0/w have no module; expected a name for the layer of each",
    ),
    "leaves that PyTorch does not have": (
        lambda: torch_names({"a": {"kernel": jnp.zeros(3)}}, {"a": "0.*"}),
        ExportError,
        "torch_names: a has the leaves kernel; expected those of dense, conv, attention, "
        "embedding, prelu, a normalization, rnn, lstm or gru(reset_after=True): name its children, or write a Rule",
    ),
    "a name for more than a layer": (
        lambda: torch_names({"m": DENSE, "n": DENSE}, {"m": "0.*"}),
        ExportError,
        "torch_names: m has the leaves dense_0/b, dense_0/w; expected those of dense, conv, "
        "attention, embedding, prelu, a normalization, rnn, lstm or gru(reset_after=True): name its children, or "
        "write a Rule",
    ),
    "features that are no channels": (
        lambda: torch_names(DENSE, {"dense_0": Flattened("0.*", 4)}),
        ExportError,
        "torch_names: dense_0 has 6 features in; expected a multiple of 4 channels",
    ),
    "weights in no folder": (
        lambda: save_weights("gone/a", {"a": jnp.ones(2)}),
        ExportError,
        "gone/a cannot be written (No such file or directory); expected gone to be a folder with room that can be",
    ),
    "the name that safetensors keeps for itself": (
        lambda: save_weights("a", {"a": jnp.ones(2)}, {"a": "__metadata__"}),
        ExportError,
        "a leaf is named __metadata__, which is what safetensors calls its own; expected another name: give it one in "
        "the name map",
    ),
    "weights of 4 bits": (
        lambda: save_weights("a", {"dense": {"w": jnp.ones(2, jnp.int4)}}),
        ExportError,
        "dense/w is of dtype int4, which safetensors does not write and read; expected one of bool, float16, float32, "
        "float64, bfloat16, complex64, int8, int16, int32, int64, uint8, uint16, uint32, uint64: convert it",
    ),
    "a rule that stores one tensor of two": (
        lambda: to_tensors({"a": jnp.ones(2)}, [Rule(("a",), ("x", "y"))]),
        ExportError,
        "the Rule of a: store returned 1 arrays; expected a tuple of 2, for x, y: mend the Rule",
    ),
    "a rule that restores an array": (
        lambda: from_tensors(
            {"x": np.ones(1, np.float32)}, {"a": jnp.ones(1)}, [Rule(("a",), ("x",), restore=lambda x: x)]
        ),
        ExportError,
        "the Rule of a: restore returned ndarray; expected a tuple of 1, for a: mend the Rule",
    ),
    "a tensor of PyTorch's bfloat16": (
        lambda: from_tensors({"w": OfTorch()}, {"w": jnp.ones(2)}),
        ExportError,
        "w is no array to NumPy (TypeError: Got unsupported ScalarType BFloat16); expected one: of PyTorch's write a "
        "safetensors file, which load_weights reads in any dtype, or give tensor.detach().float()",
    ),
    "two leaves of one path": (
        lambda: to_tensors({"a/b": X, "a": {"b": X}}),
        ExportError,
        "the name map does not fit the tree: the leaf a/b is named 2 times; the name a/b is given"
        " 2 times; expected every leaf once, under a name of its own",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_in_one_paragraph_and_nothing_is_run_or_changed(case, tmp_path, monkeypatch):
    call, error, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    steps.clear()
    held.clear()
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message.replace("{at}", str(tmp_path.resolve()))
    assert type(caught.value) is error and "\n" not in message
    assert not {"chunk", "evaluation", "epoch", "checkpoint"} & {event.kind for event in steps}
    assert {path: files()[path] for path in held} == held
    made = {path.parts[0] for path in files().keys() - held.keys()}
    assert not made, "a file was left behind"


def test_there_are_sixty_cases_and_more():
    assert len(CASES) >= 60 and len({message for _, _, message in CASES.values()}) >= 60
