"""The sweep of the digits: one program, chosen by the validation digits, written down for every member."""

from __future__ import annotations

import csv
import io
import math

import jax
import numpy as np
import pytest
from rich.console import Console

import fnet
from experiments import sweep_digits
from tests.conftest import compiled_programs

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The results, what was printed, the settings, and how often the program was compiled."""
    numbers = {"rates": (0.0, 0.01), "b1": (0.5, 0.9), "seeds": 2, "epochs": 3, "hidden": (8,)}
    config = sweep_digits.Config(run_dir=tmp_path_factory.mktemp("runs"), name="test", **numbers)
    text = io.StringIO()
    with compiled_programs() as compiled:
        results = sweep_digits.run(config, Console(file=text, width=120))
    return results, text.getvalue(), config, sum("member" in name for name in compiled)


def test_the_sweep_is_one_program(sweep):
    results, text, _, programs = sweep
    assert programs == 1 and results["population"].chunk == 8 and "8 members, 8 at a time on 1 device(s)" in text


def test_the_file_holds_what_the_validation_digits_chose_by(sweep):
    results, _, config, _ = sweep
    with (results["folder"] / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    means = {}
    for row in rows:
        means.setdefault((row["learning_rate"], row["b1"]), []).append(float(row["validation loss"]))
    least = min(means, key=lambda setting: np.mean(means[setting]))
    chosen = results["chosen"]
    assert least == (str(chosen["learning_rate"]), str(chosen["b1"])) and least[0] == "0.01"
    assert {len(costs) for costs in means.values()} == {config.seeds}
    assert all(float(row["validation accuracy"]) < 0.3 for row in rows if row["learning_rate"] == "0.0")


def test_only_the_chosen_setting_is_tested(sweep):
    results, text, config, _ = sweep
    assert text.count("test digits") == 1
    *_, test_data = sweep_digits.load(config)
    population, chosen = results["population"], results["chosen"]
    right = []
    for i in range(8):
        if all(population.hyper[name][i] == value for name, value in chosen.items()):
            params, state = jax.tree.map(lambda a, i=i: a[i], population.results["end"])
            logits = fnet.apply(fnet.mlp(8, 10), params, state, test_data.inputs)
            right.append(np.mean(np.argmax(logits, 1) == np.asarray(test_data.targets)))
    assert len(right) == config.seeds
    assert results["test"]["accuracy"].mean[0] == pytest.approx(np.mean(right), abs=1e-6)


def test_the_sweep_leaves_a_file_and_pictures(sweep):
    names = {path.name for path in sweep[0]["folder"].iterdir()}
    assert names == {"config.json", "sweep.csv", "heat_map.png", "parallel.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "sweep_digits: epochs = 0; expected at least 1"),
        ({"seeds": 0}, "sweep_digits: seeds = 0; expected at least 1"),
        ({"rates": (0.1, -1.0)}, "learning_rate = -1.0; expected 0 <= learning_rate < inf"),
        ({"rates": (math.nan,)}, "sweep_digits: learning_rate of member 0 is nan; expected finite numbers"),
        ({"b1": (1.0,)}, "b1 = 1.0; expected 0 <= b1 < 1"),
        ({"batch_size": 2000}, "batch_size = 2000"),
        ({"test_size": 2000}, "2000"),
    ],
)
def test_options_out_of_range_are_named_and_leave_no_folder(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep_digits.run(sweep_digits.Config(**options, run_dir=tmp_path))
    assert not list(tmp_path.iterdir())
