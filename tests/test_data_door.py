"""What people hold their numbers in becomes arrays at one door, by position and without loss."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import fnet
from fnet.data import DataError, check_data, split, take
from fnet.data.arrays import as_arrays
from tests.test_training import assert_same_bits, problem

X, Y = np.arange(24.0, dtype=np.float32).reshape(8, 3), np.arange(8) % 3
ORDER = np.array([5, 2, 7, 0, 3, 6, 1, 4])  # of an index that has been shuffled


class Tensor:
    """Of another library, which NumPy reads by the array interface, as it does torch's on the CPU."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array

    def __getitem__(self, rows):
        raise AssertionError("taken of before it was an array")


class OnAnotherDevice(Tensor):
    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")


HELD = {  # each holds X and Y, in a form of its own
    "frame and column": lambda: (pd.DataFrame(X, index=ORDER), pd.Series(Y, index=ORDER)),
    "array and column": lambda: (X, pd.Series(Y, index=ORDER)),
    "columns by name": lambda: ({"a": pd.Series(X[:, 0], index=ORDER), "b": X[:, 1]}, pd.Series(Y)),
    "a filtered frame": lambda: filtered(),
    "column of categories of numbers": lambda: (X, pd.Series(Y, index=ORDER, dtype="category")),
    "nullable": lambda: (X, pd.Series(Y, index=ORDER, dtype="Int64")),
    "the other byte order": lambda: (X.astype(">f4"), Y.astype(">i8")),
    "long doubles": lambda: (X.astype(np.longdouble), Y),
    "float16": lambda: (X.astype(np.float16), Y.astype(np.int8)),
    "tensors": lambda: (Tensor(X), Tensor(Y)),
    "nothing masked": lambda: (np.ma.MaskedArray(X, np.zeros(X.shape, bool)), np.ma.MaskedArray(Y)),
    "jax": lambda: (jnp.asarray(X), jnp.asarray(Y)),
    "backwards in memory": lambda: (X[::-1][::-1], Y[::-1][::-1]),
    "not to be written to": lambda: tuple(unwritable(a) for a in (X.copy(), Y.copy())),
    "a pair in a list": lambda: [X, Y],
    "lists of numbers": lambda: (X.tolist(), Y.tolist()),
    "a dict": lambda: {"targets": Y, "inputs": X},
}


def filtered():
    twice = pd.DataFrame(np.repeat(X, 2, 0)).assign(label=np.repeat(Y, 2))[lambda frame: frame.index % 2 == 0]
    return twice[[0, 1, 2]], twice["label"]


def unwritable(array):
    array.flags.writeable = False
    return array


def agree(batch):
    """Whether each row of the inputs stands beside the label that it had."""
    inputs = batch.inputs["a"] if isinstance(batch.inputs, dict) else batch.inputs[:, 0]
    return (np.asarray(batch.targets) == np.asarray(inputs) // 3 % 3).all()


@pytest.mark.parametrize("form", HELD)
def test_rows_are_taken_by_position_whatever_holds_them(form, key):
    parts = split(HELD[form](), 0.75, key)
    assert [len(part.targets) for part in parts] == [6, 2]
    assert all(agree(part) for part in parts)
    firsts = np.concatenate([jax.tree.leaves(part.inputs)[0].reshape(len(part.targets), -1)[:, 0] for part in parts])
    assert sorted(firsts.tolist()) == X[:, 0].tolist()
    whole = check_data(HELD[form]())
    assert agree(whole) and whole.targets.tolist() == Y.tolist()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(whole))
    batch = take(fnet.Batch(*whole), [6, 1, 1])
    assert agree(batch) and batch.targets.tolist() == Y[[6, 1, 1]].tolist()
    held = HELD[form]()
    some = take(held, [6, 1, 1])
    assert agree(fnet.Batch(**some) if isinstance(some, dict) else fnet.Batch(*some))


@pytest.mark.parametrize("form", ["frame and column", "the other byte order", "tensors"])
def test_a_run_an_evaluation_and_an_audit_take_what_split_takes(form, key):
    model = fnet.layers.serial(fnet.layers.dense(3))
    held = HELD[form]()
    params, state = fnet.init(model, key, X)
    optimizer = fnet.optimizers.sgd(0.01)
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    ts = fnet.init_train_state(params, optimizer, key, state)
    evaluate = fnet.make_evaluate(model, fnet.softmax_cross_entropy, batch_size=3)
    options = {"batch_size": 3, "epochs": 2, "evaluate": evaluate}
    end, history = fnet.fit(step, ts, held, validation=held, **options)
    expected, straight = fnet.fit(step, ts, (X, Y), validation=(X, Y), **options)
    assert_same_bits(end.params, expected.params)
    assert_same_bits(history.evaluations, straight.evaluations)
    assert_same_bits(evaluate(params, state, held), evaluate(params, state, fnet.Batch(X, Y)))
    assert fnet.check_model(model, fnet.softmax_cross_entropy, held, key=key, params=params, state=state).ok


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 0.0, 2.0, 1.0, 0.5, 1.0, 1.0]])
@pytest.mark.parametrize("engine", [fnet.autodiff, fnet.backprop])
def test_engines_take_lists_whole_and_in_parts(engine, weights, key):
    model = fnet.layers.dense(3)
    params, state = fnet.init(model, key, X)
    arrays = (jnp.asarray(X), jnp.asarray(Y), None if weights is None else jnp.asarray(weights))
    for gradient in (
        engine(model, fnet.softmax_cross_entropy),
        fnet.accumulate(engine(model, fnet.softmax_cross_entropy), 3),
    ):
        grads, _, metrics = gradient(params, state, (X, Y.tolist(), weights), key)
        expected, _, measured = gradient(params, state, arrays, key)
        assert_same_bits((grads, metrics), (expected, measured))


REFUSED = {
    "masked": (
        lambda: (np.ma.MaskedArray(X, X == -999).copy(), np.ma.masked_equal(Y, 2)),
        "data.targets has 2 masked values; expected none, since a mask would be dropped: fill them",
    ),
    "lists of unequal lengths": (
        lambda: ([[1.0, 2.0], [3.0]] * 4, Y),
        "data.inputs is a list of lists of unequal lengths; expected rows of one: pad them",
    ),
    "words in a list": (lambda: (X, list("abcabcab")), "data.targets/0 has dtype <U1; expected booleans, integers or"),
    "masked inputs": (lambda: (np.ma.masked_less(X, 2), Y), "data.inputs has 2 masked values; expected none"),
    "sparse": (
        lambda: (scipy.sparse.csr_matrix(X), Y),
        "data.inputs is a scipy.csr_matrix, which is sparse; expected a dense array: .toarray() makes one",
    ),
    "a sparse array": (lambda: (scipy.sparse.coo_array(X), Y), "data.inputs is a scipy.coo_array, which is sparse"),
    "on another device": (
        lambda: (OnAnotherDevice(X), Y),
        "data.inputs is a tests.OnAnotherDevice that NumPy cannot read (TypeError: can't convert cuda:0 device type",
    ),
    "categories": (
        lambda: (X, pd.Categorical(list("abcabcab"))),
        "data.targets has dtype object; expected booleans, integers or floats: numbers among objects by "
        ".astype(float), text and categories by integers (.cat.codes)",
    ),
    "a column of categories": (lambda: (X, pd.Series(list("abcabcab"), dtype="category")), "data.targets has dtype"),
    "missing of a nullable": (
        lambda: (X, pd.Series([1, 2, None, 1, 0, 0, 1, 2], dtype="Int64")),
        "data.targets",
    ),
    "missing in a frame": (
        lambda: (pd.DataFrame({"a": [1.0, None] * 4, "b": 1.0}, index=ORDER), Y),
        "data.inputs[1, 0] = nan; expected finite numbers",
    ),
    "dates": (
        lambda: (pd.Series(pd.date_range("2026-01-01", periods=8)), Y),
        "data.inputs has dtype datetime64[us]; expected booleans, integers or floats: encode text and categories as "
        "integers, times as seconds",
    ),
    "a long double that is too long": (lambda: (np.full((8, 1), np.longdouble("1e4000")), Y), "data.inputs[0, 0] = "),
    "records": (lambda: (np.zeros(8, [("a", float), ("b", int)]), Y), "data.inputs has dtype [('a', '<f8'),"),
    "a frame of several kinds": (lambda: (pd.DataFrame({"a": 1.5, "b": ["x"] * 8}), Y), "data.inputs has dtype object"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_would_lose_numbers_is_refused_with_the_remedy(form, key):
    held, message = REFUSED[form]
    with pytest.raises(DataError, match=re.escape(message)):
        check_data(held())
    step, ts, *_ = problem()
    with pytest.raises(DataError, match=re.escape(message)):
        fnet.fit(step, ts, held(), epochs=1, batch_size=2)


def test_arrays_stay_as_they_are(tmp_path):
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    low = X.astype(ml_dtypes.bfloat16)
    held = {"numpy": X, "jax": jnp.asarray(X), "mapped": mapped, "low": low, "none": None}
    assert all(as_arrays(held)[name] is held[name] for name in held)


def test_mapped_files_of_the_other_byte_order_give_the_run_of_their_numbers(tmp_path):
    step, ts, data, _ = problem()
    x, y = np.asarray(data.inputs), np.asarray(data.targets)
    np.save(tmp_path / "x.npy", x.astype(x.dtype.newbyteorder(">")))
    np.save(tmp_path / "y.npy", y.astype(y.dtype.newbyteorder(">")))
    end, _ = fnet.fit(step, ts, fnet.data.open_arrays(tmp_path / "x.npy", tmp_path / "y.npy"), epochs=2, batch_size=3)
    assert_same_bits(end, fnet.fit(step, ts, data, epochs=2, batch_size=3)[0])


@pytest.mark.parametrize(
    "odd",
    [
        np.arange(6).astype("timedelta64[s]"),
        np.ma.array(np.zeros(6, [("a", "f4"), ("b", "i4")]), mask=[(True, False)] * 6),
    ],
)
def test_times_and_records_are_refused_by_their_dtype(odd):
    with pytest.raises(fnet.DataError, match=r"data.inputs has dtype .*; expected booleans, integers or floats"):
        fnet.check_data((odd, np.zeros(6)))


def test_columns_of_several_dtypes_are_the_numbers_that_they_hold():
    frame = pd.DataFrame({"a": pd.array([1, 2], "Int64"), "b": [0.5, 1.5], "c": [True, False]})
    made = as_arrays(frame)
    assert made.dtype == np.float64
    np.testing.assert_array_equal(made, [[1, 0.5, 1], [2, 1.5, 0]])
    whole = as_arrays(pd.DataFrame({"a": pd.array([2**53 + 1, 2], "Int64"), "c": [True, False]}))
    assert whole.dtype == np.int64 and whole[0, 0] == 2**53 + 1
    lost = as_arrays(pd.DataFrame({"a": pd.Series([2**53 + 1, 2], dtype=object), "b": [0.5, 1.5]}))
    assert lost.dtype == object  # and check_data refuses it


def shares(parts, labels):
    """The greatest distance of a part's count of a class from its share."""
    counts = lambda rows: np.bincount(rows, minlength=labels.max() + 1)  # noqa: E731
    return max(np.abs(counts(part) - counts(labels) * len(part) / len(labels)).max() for part in parts)


@pytest.mark.parametrize("seed", range(20))
def test_a_stratified_part_has_its_share_of_every_class(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, rng.integers(2, 12), rng.integers(40, 200))
    data, key = (np.arange(len(labels)), labels), jax.random.key(seed)
    held = [held.targets for _, held in fnet.data.folds(data, int(rng.integers(2, 9)), key, stratify=True)]
    assert shares(held, labels) < 1
    two = split(data, float(rng.uniform(0.1, 0.9)), key, stratify=True)
    assert sorted(np.concatenate([part.inputs for part in two])) == [*range(len(labels))]
    assert shares([part.targets for part in two], labels) < 1
    several = split(data, (7, 13, len(labels) - 20), key, stratify=True)
    assert shares([part.targets for part in several], labels) < 2
    assert any((np.diff(part.inputs) < 0).any() for part in several)  # and in a random order


def test_labels_in_the_place_of_stratify_are_told_apart():
    labels = np.arange(8) % 2
    with pytest.raises(
        DataError, match=r"split: stratify is int64\[8\]; expected True or False: the labels are the tar"
    ):
        split((np.arange(8), labels), 0.5, jax.random.key(0), stratify=labels)


def test_rows_are_taken_as_data_are(tmp_path):
    with pytest.raises(DataError, match="rows has 1 masked values"):
        take(np.arange(3), np.ma.array([0, 1], mask=[False, True]))
    assert take(np.arange(3), []).shape == (0,)
    np.save(tmp_path / "a.npy", np.arange(3, dtype=">f4"))
    taken = take(np.load(tmp_path / "a.npy", mmap_mode="r"), [2, 0])
    assert taken.dtype.isnative and taken.tolist() == [2, 0]


def test_an_evaluation_reads_mapped_files_of_another_byte_order(tmp_path):
    _, ts, data, evaluate = problem()
    np.save(tmp_path / "x.npy", np.asarray(data.inputs).astype(">f4"))
    mapped = data._replace(inputs=np.load(tmp_path / "x.npy", mmap_mode="r"))
    found, expected = (evaluate(ts.params, ts.state, held)["loss"].sum for held in (mapped, data))
    assert found == expected


def test_inputs_without_a_number_are_named():
    with pytest.raises(DataError, match=r"data.inputs is empty, shape \(8, 0\); expected at least 1 number in each"):
        check_data((np.zeros((8, 0)), np.zeros(8, int)))
