"""The main job, in short: real digits, both engines, the run folder, and the original IDX files."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import re
import struct

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import digits_mlp

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def standard_promotion():
    """As a user runs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(**options):
    out = io.StringIO()
    result = digits_mlp.run(digits_mlp.Config(**options), Console(file=out, width=100))
    return result, out.getvalue()


def test_two_epochs_on_the_packaged_digits(tmp_path):
    result, text = run(epochs=2, run_dir=tmp_path, name="short")
    first, second = (result["histories"][engine].steps["loss"] for engine in ("autodiff", "backprop"))
    assert first.shape == (250,)
    np.testing.assert_allclose(second[:10], first[:10], rtol=1e-5)
    assert min(result["test_accuracy"].values()) > 0.88
    folder = tmp_path / "digits_mlp" / "short"
    made = {path.name for path in folder.iterdir()}
    assert made == {"config.json", "autodiff", "backprop", "curves.png", "confusion.png"}
    assert json.loads((folder / "config.json").read_text())["hidden"] == [128, 64]
    for engine in ("autodiff", "backprop"):
        rows = [json.loads(line) for line in (folder / engine / "metrics.jsonl").read_text().splitlines()]
        assert [(row["kind"], row["epoch"]) for row in rows] == [
            ("evaluation", 1), ("epoch", 1), ("evaluation", 2), ("epoch", 2)
        ]  # fmt: skip
        assert {"loss", "accuracy", "validation_loss", "learning_rate", "gradient_norm/dense_2"} <= set(rows[1])
        assert (folder / engine / "report.html").stat().st_size > 10_000
    pages = [folder / engine / "report.html" for engine in ("autodiff", "backprop")]
    accuracy = f"test accuracy {result['test_accuracy']['backprop']:.4f}"
    assert text.splitlines()[-4:] == [accuracy, *(f"written: {path}" for path in (folder, *pages))]
    for what in (
        "dense_0/w",
        "dense_2/b",
        "time per step",
        "compile time",
        "compiled FLOPs per step",
        "scratch memory",
    ):
        assert what in text
    assert re.search(
        r"worst relative difference of the two curves: \d.*\n\(two right gradients differ by rounding", text
    )
    said = ["reading the digits and drawing the parameters", "autodiff: compiling", "auditing the backward by hand"]
    assert [line for line in text.splitlines() if line in said] == said


def test_a_folder_that_exists_is_left_as_it_is(tmp_path):
    (tmp_path / "digits_mlp" / "taken").mkdir(parents=True)
    with pytest.raises(SystemExit, match="taken exists already and is left as it is: choose another --name"):
        run(epochs=1, run_dir=tmp_path, name="taken")
    assert not list((tmp_path / "digits_mlp" / "taken").iterdir())


def test_data_dir_takes_the_original_files_plain_or_gzip(tmp_path):
    rng = np.random.default_rng(0)
    for part, count, opener, end in (("train", 64, open, ""), ("t10k", 32, gzip.open, ".gz")):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = (rng.random((count, 28, 28)) * 20 + 20 * labels[:, None, None]).astype(np.uint8)
        with opener(tmp_path / f"{part}-images-idx3-ubyte{end}", "wb") as file:
            file.write(struct.pack(">4I", 2051, count, 28, 28) + images.tobytes())
        with opener(tmp_path / f"{part}-labels-idx1-ubyte{end}", "wb") as file:
            file.write(struct.pack(">2I", 2049, count) + labels.tobytes())
    _, text = run(epochs=1, data_dir=tmp_path, run_dir=tmp_path, name="idx", hidden=(8,))
    assert "64 digits to train on, 32 to test on" in text


def test_every_field_of_the_configuration_is_an_option():
    import tyro

    names = [field.name for field in dataclasses.fields(digits_mlp.Config)]
    assert {"learning_rate", "batch_size", "epochs", "seed", "data_dir", "hidden"} <= set(names)
    config = tyro.cli(digits_mlp.Config, args=["--learning-rate", "0.01", "--hidden", "32", "16", "--seed", "3"])
    assert (config.learning_rate, config.hidden, config.seed) == (0.01, (32, 16), 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4  # pyright: ignore[reportAttributeAccessIssue]
