"""Data as people have them: datasets of examples, loaders, dicts; to train on and to evaluate on."""

from __future__ import annotations

import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.data import Stream, open_arrays, streams
from fnet.training.stopping import early_stopping
from tests.test_training import assert_same_bits, problem

STEP, START, DATA, EVALUATE = problem()
HOST = jax.tree.map(np.asarray, DATA)
N = len(HOST.targets)


class Dataset:
    """As torch's: an example at a time, by index."""

    def __init__(self, form=lambda x, y: (x, y), n=N):
        self.form, self.n, self.read = form, n, []

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        if not 0 <= row < self.n:
            raise IndexError(row)
        self.read.append(row)
        return self.form(HOST.inputs[row], HOST.targets[row])


class Batches:
    """An iterable of batches in order, begun anew at each epoch, that does not know how many there are."""

    def __init__(self, batch_size, form=lambda x, y: (x, y)):
        self.size, self.form, self.begun = batch_size, form, 0

    def __iter__(self):
        self.begun += 1
        for begin in range(0, N, self.size):
            yield self.form(HOST.inputs[begin : begin + self.size], HOST.targets[begin : begin + self.size])


class Loader(Batches):
    """As torch's: one that does."""

    def __len__(self):
        return -(-N // self.size)


FORMS = {
    "pairs": lambda x, y: (x, y),
    "lists": lambda x, y: [x, y],
    "dicts": lambda x, y: {"inputs": x, "targets": y},
    "batches": fnet.Batch,
    "numbers of Python": lambda x, y: (x, np.asarray(y).tolist()),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_dataset_trains_as_the_arrays_that_it_is_of(form):
    expected, history = fnet.fit(STEP, START, DATA, epochs=3, batch_size=8)
    end, same = fnet.fit(STEP, START, Dataset(FORMS[form]), epochs=3, batch_size=8)
    assert_same_bits(end, expected)
    assert same.epochs["loss"].tolist() == history.epochs["loss"].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_a_loader_trains_on_all_its_batches_epoch_after_epoch(form):
    loader = Loader(8, FORMS[form])
    expected, _ = fnet.fit(STEP, START, DATA, epochs=3, batch_size=8, shuffle=False)
    end, history = fnet.fit(STEP, START, loader, epochs=3)
    assert N % 8 and len(history.steps["loss"]) == 3 * -(-N // 8)
    assert_same_bits(end, expected)
    assert loader.begun == 4  # once for its first batch; nothing is read beyond the end


def test_a_dataset_in_a_folder_is_resumed_to_the_bit_and_known_again(tmp_path):
    straight, _ = fnet.fit(STEP, START, Dataset(), epochs=4, batch_size=8)
    fnet.fit(STEP, START, Dataset(), steps=7, batch_size=8, run=fnet.Run(tmp_path / "run"))
    run = fnet.Run(tmp_path / "run", resume=True)
    resumed, _ = fnet.fit(STEP, START, Dataset(), epochs=4, batch_size=8, run=run)
    assert_same_bits(resumed, straight)
    fnet.fit(STEP, START, Dataset(), steps=7, batch_size=8, run=fnet.Run(tmp_path / "other"))
    with pytest.raises(fnet.RunError, match="rows: expected 'SHA-256"):
        other = Dataset(lambda x, y: (x + 1, y))
        fnet.fit(STEP, START, other, epochs=4, batch_size=8, run=fnet.Run(tmp_path / "other", resume=True))


def test_a_dataset_that_draws_its_examples_anew_can_be_resumed(tmp_path):
    rng = np.random.default_rng(0)

    def noisy(x, y):
        return (x + rng.normal(size=x.shape)).astype(np.float32), y

    fnet.fit(STEP, START, Dataset(noisy), steps=7, batch_size=8, run=fnet.Run(tmp_path / "run"))
    run = fnet.Run(tmp_path / "run", resume=True)
    end, _ = fnet.fit(STEP, START, Dataset(noisy), steps=9, batch_size=8, run=run)
    assert int(end.step) == 9


def test_a_loader_without_a_position_is_refused_in_a_folder_until_that_is_said(tmp_path):
    with pytest.raises(fnet.DataError, match=re.escape("or Stream(..., resumable=False) where that is meant")):
        fnet.fit(STEP, START, Loader(8), epochs=1, run=fnet.Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    fnet.fit(STEP, START, Stream(Loader(8), resumable=False), epochs=1, run=fnet.Run(tmp_path / "run"))


def test_a_run_of_a_loader_that_shuffles_is_had_again_when_it_has_ended(tmp_path):
    rng = np.random.default_rng(0)

    class Shuffling(Loader):
        def __iter__(self):
            order = rng.permutation(N)
            for begin in range(0, N, self.size):
                rows = order[begin : begin + self.size]
                yield HOST.inputs[rows], HOST.targets[rows]

    run = fnet.Run(tmp_path / "run", resume="auto")
    ends = [fnet.fit(STEP, START, Stream(Shuffling(8), resumable=False), epochs=2, run=run)[0] for _ in range(2)]
    assert_same_bits(*ends)


VALIDATION = {
    "a loader": lambda: Loader(10),
    "a stream": lambda: Stream(Batches(10), -(-N // 10)),
    "a dataset": lambda: Dataset(),
}


@pytest.mark.parametrize("training", ["arrays", "dataset"])
@pytest.mark.parametrize("kind", VALIDATION)
def test_validation_data_are_read_batch_by_batch_and_give_the_same_results(kind, training):
    options = {"epochs": 4, "batch_size": 8, "evaluate": EVALUATE, "stop": early_stopping("validation_loss", 10)}
    data = DATA if training == "arrays" else Dataset()
    expected, history = fnet.fit(STEP, START, DATA, validation={"validation": DATA, "own": DATA}, **options)
    for chunk_steps in (None, 3):
        sets = {"validation": VALIDATION[kind](), "own": DATA}
        end, found = fnet.fit(STEP, START, data, validation=sets, chunk_steps=chunk_steps, **options)
        assert_same_bits(end.params, expected.params)
        assert found.evaluations["step"].tolist() == history.evaluations["step"].tolist()
        for name in ("validation_loss", "validation_accuracy", "own_loss"):
            # sums of N losses in float32, in another order
            np.testing.assert_allclose(found.evaluations[name], history.evaluations[name], rtol=1e-6)
            np.testing.assert_allclose(found.epochs[name], history.epochs[name], rtol=1e-6)
        assert int(end.stopping.step) == int(expected.stopping.step)
    _, found = fnet.fit(STEP, START, data, validation=VALIDATION[kind](), **options)
    np.testing.assert_allclose(found.evaluations["validation_loss"], history.evaluations["validation_loss"], rtol=1e-6)


def test_a_rule_stops_by_what_a_stream_gives_and_the_run_is_resumed_to_the_bit(tmp_path):
    stop = early_stopping("validation_loss", 2, least_change=0.5)
    options = {"epochs": 40, "batch_size": 8, "evaluate": EVALUATE, "evaluate_every": (2, "steps"), "stop": stop}
    straight, history = fnet.fit(STEP, START, DATA, validation=Loader(10), **options)
    assert 4 <= int(straight.step) < 200 and history.ended.step == int(straight.step)
    run = fnet.Run(tmp_path / "run", keep_best="validation_loss")
    leave = [lambda event: "stop" if event.kind == "chunk" else None]
    half, _ = fnet.fit(STEP, START, DATA, validation=Loader(10), run=run, observers=leave, chunk_steps=3, **options)
    assert int(half.step) < int(straight.step)
    resumed, _ = fnet.fit(STEP, START, DATA, validation=Loader(10), run=run._replace(resume=True), **options)
    assert_same_bits(resumed, straight)


def test_predict_takes_datasets_and_loaders():
    model = fnet.mlp(8, 3)
    params, state = fnet.init(model, jax.random.key(0), DATA.inputs[:1])
    expected = np.asarray(fnet.apply(model, params, state, DATA.inputs))
    for data, size in ((Dataset(), 7), (Dataset(), None), (Loader(10), None), (Loader(10, FORMS["dicts"]), None)):
        # products of matrices of another size may take their sums in another order
        np.testing.assert_allclose(fnet.predict(model, params, state, data, size), expected, rtol=1e-5, atol=1e-6)


def test_predict_takes_inputs_alone():
    model = fnet.mlp(8, 3)
    params, state = fnet.init(model, jax.random.key(0), DATA.inputs[:1])
    expected = np.asarray(fnet.apply(model, params, state, DATA.inputs))
    forms = (lambda x, y: x, lambda x, y: [x], lambda x, y: {"inputs": x}, lambda x, y: (x, y, y))
    for form in forms:
        for data, size in (
            (Dataset(form), 7),
            (Loader(10, form), None),
            (Stream(Batches(10, form), -(-N // 10)), None),
        ):
            np.testing.assert_allclose(fnet.predict(model, params, state, data, size), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(fnet.DataError, match="the source is an iterator, generator, which gives its batches but once"):
        fnet.predict(model, params, state, Stream((x for x in [HOST.inputs]), 1))


class KerasBatches:
    """As Keras' PyDataset: its items are batches, and it is told when an epoch has ended."""

    def __init__(self, size):
        self.size, self.order, self.ended = size, np.arange(N), 0

    def __len__(self):
        return -(-N // self.size)

    def __getitem__(self, at):
        rows = self.order[at * self.size : (at + 1) * self.size]
        return HOST.inputs[rows], HOST.targets[rows]

    def on_epoch_end(self):
        self.order = self.order[::-1]
        self.ended += 1


def test_the_items_of_a_keras_dataset_are_batches():
    forwards, backwards = [fnet.Batch(HOST.inputs[at], HOST.targets[at]) for at in (slice(None), slice(None, None, -1))]
    held, ts = KerasBatches(10), START
    for data in (forwards, backwards, forwards):
        ts, _ = fnet.fit(STEP, ts, data, steps=int(ts.step) + len(held), batch_size=10, shuffle=False)
    end, _ = fnet.fit(STEP, START, held, epochs=3)
    assert_same_bits(end, ts)
    with pytest.raises(ValueError, match="batch_size = 10; expected none: a stream gives batches"):
        fnet.fit(STEP, START, held, epochs=3, batch_size=10)


def ragged(x, y):
    return (x[: 3 + int(y)], y)


BAD = {
    "an empty dataset": (lambda: Dataset(n=0), "the dataset, a Dataset, is empty; expected at least 1 example"),
    "examples of several shapes": (lambda: Dataset(ragged), "expected one kind, so that they make a batch"),
    "examples without targets": (lambda: Dataset(lambda x, y: x), "example 0 is a ndarray; expected Batch(inputs"),
    "examples by other names": (
        lambda: Dataset(lambda x, y: {"image": x, "label": y}),
        "example 0 is a dict of 'image', 'label'; expected Batch(inputs, targets)",
    ),
    "text": (
        lambda: Dataset(lambda x, y: ("a", y)),
        "data.inputs has dtype <U1; expected booleans, integers or floats",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_batch_can_be_made_of_is_named(case):
    data, message = BAD[case]
    with pytest.raises(fnet.DataError, match=re.escape(message)):
        fnet.fit(STEP, START, data(), epochs=1, batch_size=8)
    with pytest.raises(fnet.DataError):
        fnet.fit(STEP, START, DATA, epochs=1, batch_size=8, evaluate=EVALUATE, validation=data())


def test_a_bad_number_of_a_dataset_is_named_by_its_row():
    def bad(x, y):
        return (np.where(np.array_equal(x, HOST.inputs[13]), np.nan, x).astype(np.float32), y)

    with pytest.raises(fnet.DataError, match=re.escape("data.inputs[13, 0] = nan")):
        fnet.fit(STEP, START, Dataset(bad), epochs=1, batch_size=8)
    with pytest.raises(fnet.DataError, match=re.escape("held.inputs[13, 0] = nan")):
        fnet.fit(STEP, START, DATA, epochs=1, batch_size=8, evaluate=EVALUATE, validation={"held": Dataset(bad)})
    labels = Dataset(lambda x, y: (x, np.int32(99) if np.array_equal(x, HOST.inputs[13]) else y))
    with pytest.raises(fnet.DataError, match=r"^held: softmax_cross_entropy: label 99 in example 13 is"):
        fnet.fit(STEP, START, DATA, epochs=1, batch_size=8, evaluate=EVALUATE, validation={"held": labels})


def test_a_dataset_and_its_batch_size_and_a_loader_without_one():
    with pytest.raises(fnet.DataError, match="batch_size is not given"):
        fnet.fit(STEP, START, Dataset(), epochs=1)
    with pytest.raises(ValueError, match="batch_size = 8; expected none: a stream gives batches"):
        fnet.fit(STEP, START, Loader(8), epochs=1, batch_size=8)
    with pytest.raises(fnet.DataError, match="Stream: steps_per_epoch is None and the source has no length"):
        fnet.fit(STEP, START, Batches(8), epochs=1)
    with pytest.raises(fnet.DataError, match="the source is an iterator, generator, which gives its batches but once"):
        fnet.fit(STEP, START, Stream((batch for batch in Loader(8)), 5), epochs=1)


def test_results_that_do_not_add_up_are_refused_of_a_set_that_is_read_in_batches():
    def evaluate(params, state, data):
        return {"loss": jnp.float32(1.0)}

    with pytest.raises(ValueError, match="validation: the result 'loss' is one number, and the set is read batch by"):
        fnet.fit(STEP, START, DATA, epochs=1, batch_size=8, evaluate=evaluate, validation=Loader(8))


def test_mapped_arrays_are_still_held_as_validation_data(tmp_path):
    for name, array in zip(("inputs", "targets"), HOST[:2], strict=True):
        np.save(tmp_path / name, array)
    mapped = open_arrays(tmp_path / "inputs.npy", tmp_path / "targets.npy")
    options = {"epochs": 2, "batch_size": 8, "evaluate": EVALUATE}
    _, history = fnet.fit(STEP, START, DATA, validation=DATA, **options)
    _, found = fnet.fit(STEP, START, DATA, validation=mapped, **options)
    assert found.evaluations["validation_loss"].tolist() == history.evaluations["validation_loss"].tolist()


# --- what a second pair of eyes found ---------------------------------------------------------------------------------


class Reusing(Loader):
    """It gives the same arrays again and again, with other numbers in them."""

    def __iter__(self):
        for batch in super().__iter__():
            if not hasattr(self, "held") or len(self.held[0]) != len(batch[0]):
                self.held = tuple(np.array(a) for a in batch)
            for mine, other in zip(self.held, batch, strict=True):
                mine[...] = other
            yield self.held


class ReusingDataset(Dataset):
    def __getitem__(self, row):
        x, y = super().__getitem__(row)
        if not hasattr(self, "held"):
            self.held = np.array(x)
        self.held[...] = x
        return self.held, y


def test_what_a_source_gives_is_copied_since_it_may_use_its_arrays_again():
    options = {"epochs": 2, "evaluate": EVALUATE}
    expected, history = fnet.fit(STEP, START, Loader(10), validation=Loader(10), **options)
    end, found = fnet.fit(STEP, START, Reusing(10), validation=Reusing(10), **options)
    assert_same_bits(end, expected)
    assert found.evaluations["validation_loss"].tolist() == history.evaluations["validation_loss"].tolist()
    expected, _ = fnet.fit(STEP, START, DATA, epochs=2, batch_size=8)
    assert_same_bits(fnet.fit(STEP, START, ReusingDataset(), epochs=2, batch_size=8)[0], expected)


@pytest.mark.parametrize("says", [4, 6])
def test_a_loader_whose_length_is_another_is_named(says):
    class Lying(Loader):
        def __len__(self):
            return says

    message = f"the stream's source, a Lying, says that it has {says} batches and gave 5; expected as many as it says"
    assert len(Loader(11)) == 5
    with pytest.raises(fnet.DataError, match=message):
        fnet.fit(STEP, START, Lying(11), epochs=3)
    with pytest.raises(fnet.DataError, match=message):
        fnet.fit(STEP, START, DATA, epochs=1, batch_size=8, evaluate=EVALUATE, validation=Lying(11))
    model = fnet.mlp(8, 3)
    with pytest.raises(fnet.DataError, match=message):
        fnet.predict(model, START.params, START.state, Lying(11))


def test_a_dataset_that_is_shorter_than_it_says_is_named():
    class Lying(Dataset):
        def __len__(self):
            return self.n + 1

    message = f"example {N}: the dataset, a Lying, says that it has {N + 1} and has none there"
    with pytest.raises(fnet.DataError, match=message):
        fnet.fit(STEP, START, Lying(), epochs=1, batch_size=8)
    with pytest.raises(fnet.DataError, match=message):
        fnet.fit(STEP, START, DATA, epochs=1, batch_size=8, evaluate=EVALUATE, validation=Lying())


def test_a_list_of_examples_is_told_what_it_is():
    pairs = [*zip(HOST.inputs, HOST.targets, strict=True)]
    with pytest.raises(fnet.DataError, match=re.escape("a list of examples is a dataset, fnet.data.Examples(data)")):
        fnet.fit(STEP, START, pairs, epochs=1, batch_size=8)
    expected, _ = fnet.fit(STEP, START, DATA, epochs=1, batch_size=8)
    assert_same_bits(fnet.fit(STEP, START, fnet.data.Examples(pairs), epochs=1, batch_size=8)[0], expected)


def test_the_end_of_a_run_does_not_wait_for_a_loader_that_waits(monkeypatch):
    monkeypatch.setattr(streams, "LEAVE_SECONDS", 0.2)
    released = threading.Event()

    class Waiting(Batches):
        def __iter__(self):
            for at, batch in enumerate(super().__iter__()):
                if at == 3:
                    released.wait(60)
                yield batch

    stop = [lambda event: "stop" if event.kind == "chunk" else None]
    with pytest.warns(RuntimeWarning, match=r"a thread still waits for the loader's next batch after 0\.2 seconds"):
        end, _ = fnet.fit(STEP, START, Stream(Waiting(8), 5), epochs=1, observers=stop, chunk_steps=1)
    assert int(end.step) == 1 and not released.is_set()
    released.set()


def test_a_validation_set_of_weight_0_is_refused_when_it_has_been_read():
    nothing = Loader(10, lambda x, y: (x, y, np.zeros(len(x), np.float32)))
    with pytest.raises(fnet.DataError, match=re.escape("validation.weights sum to 0 over the whole set")):
        fnet.fit(STEP, START, DATA, epochs=1, batch_size=8, evaluate=EVALUATE, validation=nothing)


# --- what the second pair of eyes found -------------------------------------------------------------------------------


def test_predict_makes_no_other_number_of_one_that_jax_cannot_hold():
    table = fnet.layers.embedding(10, 4)
    params, state = fnet.init(table, jax.random.key(0), np.zeros((1, 3), np.int32))
    message = re.escape(f"data.inputs[1, 0] = {2**32 + 3}; expected numbers that int32 holds")
    ids = np.array([[1, 1, 1], [2**32 + 3, 1, 1]])
    for data, size in ((ids, None), (fnet.data.Examples([*ids]), 2), (Stream([ids]), None)):
        with pytest.raises(fnet.DataError, match=message):
            fnet.predict(table, params, state, data, size)
    sigmoid = fnet.layers.sigmoid()
    with pytest.raises(fnet.DataError, match=re.escape("data.inputs[0, 0] = 1e+39; expected numbers that float32")):
        fnet.predict(sigmoid, (), (), np.array([[1e39]]))
    np.testing.assert_array_equal(fnet.predict(sigmoid, (), (), np.array([[np.nan], [np.inf]])), [[np.nan], [1.0]])
    with pytest.raises(fnet.DataError, match=r"data.inputs has dtype object; expected booleans, integers or floats"):
        fnet.predict(sigmoid, (), (), np.array([[1.0]], dtype=object))


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_list_of_numbers_is_an_array_whatever_its_length(length):
    table = fnet.layers.embedding(10, 4)
    params, state = fnet.init(table, jax.random.key(0), np.zeros((1, length), np.int32))
    rows = [[*range(length)], [*range(1, length + 1)]]
    expected = fnet.predict(table, params, state, np.array(rows))
    np.testing.assert_array_equal(fnet.predict(table, params, state, fnet.data.Examples(rows), 2), expected)
    np.testing.assert_array_equal(fnet.predict(table, params, state, Stream([rows])), expected)
    np.testing.assert_array_equal(fnet.predict(table, params, state, Stream([rows[:1], rows[1:]])), expected)


def test_weights_that_are_all_0_are_refused_wherever_the_data_are(tmp_path):
    nothing = np.zeros(N, np.float32)
    np.save(tmp_path / "x.npy", HOST.inputs)
    mapped = fnet.Batch(np.load(tmp_path / "x.npy", mmap_mode="r"), HOST.targets, nothing)
    with pytest.raises(fnet.DataError, match=r"data\.weights sum to 0"):
        fnet.fit(STEP, START, mapped, epochs=1, batch_size=8)
    examples = fnet.data.Examples([*zip(HOST.inputs, HOST.targets, nothing, strict=True)])
    with pytest.raises(fnet.DataError, match="the weights of data sum to 0 over the epoch that ends at step 7"):
        fnet.fit(STEP, START, examples, epochs=1, batch_size=8)
    batches = [(HOST.inputs[b : b + 8], HOST.targets[b : b + 8], nothing[b : b + 8]) for b in range(0, N, 8)]
    with pytest.raises(fnet.DataError, match="the weights of the stream sum to 0 over the epoch that ends at step 7"):
        fnet.fit(STEP, START, Stream(batches), epochs=1)


def test_a_first_batch_of_weight_0_is_a_batch():
    weights = np.ones(N, np.float32)
    weights[:8] = 0
    batches = [(HOST.inputs[b : b + 8], HOST.targets[b : b + 8], weights[b : b + 8]) for b in range(0, N, 8)]
    end, _ = fnet.fit(STEP, START, Stream(batches), epochs=2)
    expected, _ = fnet.fit(STEP, START, HOST._replace(weights=weights), epochs=2, batch_size=8, shuffle=False)
    assert_same_bits(end, expected)


def test_a_validation_set_is_not_gone_through_twice():
    batches = [(HOST.inputs[b : b + 8], HOST.targets[b : b + 8]) for b in (0, 8)]
    message = "steps_per_epoch = 3, and the source, a list, has 2 batches; expected at most these, since each counts"
    with pytest.raises(fnet.DataError, match=message):
        fnet.fit(STEP, START, DATA, epochs=1, batch_size=8, evaluate=EVALUATE, validation=Stream(batches, 3))
    fnet.fit(STEP, START, Stream(batches, 3), epochs=2)  # to train on, they are gone through again and again


def test_a_dict_of_inputs_and_targets_is_one_set():
    options = {"epochs": 1, "batch_size": 8, "evaluate": EVALUATE}
    expected = fnet.fit(STEP, START, DATA, validation=HOST, **options)[1].evaluations
    one = {"inputs": HOST.inputs, "targets": HOST.targets}
    found = fnet.fit(STEP, START, DATA, validation=one, **options)[1].evaluations
    assert {name: values.tolist() for name, values in found.items()} == {n: v.tolist() for n, v in expected.items()}
    results = fnet.train(STEP, START, DATA, **options, validation=one)[2]
    np.testing.assert_allclose(results["loss"].value, expected["validation_loss"], rtol=1e-6)


def test_errors_of_a_dataset_say_at_which_example():
    class Odd(Dataset):
        error: Exception = KeyError("gone")

        def __getitem__(self, row):
            if row == 11:
                raise self.error
            return super().__getitem__(row)

    with pytest.raises(KeyError) as caught:
        fnet.fit(STEP, START, Odd(), epochs=1, batch_size=8)
    assert "at example 11 of the dataset, a Odd" in caught.value.__notes__
    Odd.error = StopIteration()
    with pytest.raises(fnet.DataError, match="example 11: the dataset, a Odd, says that it has"):
        fnet.fit(STEP, START, Odd(), epochs=1, batch_size=8)
    with pytest.raises(fnet.DataError, match="the dataset is a zip, which gives no example by its index"):
        fnet.fit(STEP, START, fnet.data.Examples(zip(HOST.inputs, HOST.targets, strict=True)), epochs=1, batch_size=8)
