"""The benchmarks' documents, and that each benchmark writes one. None is run here."""

from __future__ import annotations

import ast
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as runner
from benchmarks import cold, measuring

ROOT = Path(__file__).parents[1]
APART = {"__init__", "__main__", "measuring", "accelerator", "accelerator_models", "accelerator_stages"}  # for a GPU
MODULES = sorted({path.stem for path in ROOT.glob("benchmarks/*.py")} - APART)
TIMES = {"slow": [4.0, 9.0, 5.0], "fast": [1.0, 3.0, 2.0], "odd": [1.0, 1.0, 8.0]}


def test_a_row_has_median_and_range_of_its_rounds_and_of_its_ratios_in_each():
    made = measuring.table("a step", TIMES, ("fast", "slow"), "ms")
    assert (made["title"], made["unit"], made["rounds"]) == ("a step", "ms", 3)
    assert [row["name"] for row in made["rows"]] == list(TIMES)
    for row, values in zip(made["rows"], np.array([*TIMES.values()]), strict=True):
        sorted_values = np.sort(values)
        assert [row[key] for key in ("least", "median", "most")] == sorted_values.tolist()
        assert list(row["ratios"]) == ["fast", "slow"]
        for base, ratio in row["ratios"].items():
            expected = np.sort(values / np.array(TIMES[base]))
            found = [ratio[key] for key in ("least", "median", "most")]
            np.testing.assert_allclose(found, expected, rtol=1e-5)  # six digits are kept
    odd = made["rows"][2]
    assert odd["ratios"]["fast"]["median"] == 1.0 != odd["median"] / made["rows"][1]["median"]  # not of medians


def test_rows_of_different_rounds_are_refused():
    with pytest.raises(ValueError):
        measuring.table("a step", {"a": [1.0, 2.0], "b": [1.0]})


def test_runs_are_made_in_turn():
    made = []
    runs = {name: lambda name=name: made.append(name) for name in "ab"}
    times = measuring.interleaved(runs, 3, rest=0.0)
    assert made == ["a", "b"] * 3 and {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}


@pytest.fixture
def document(tmp_path, monkeypatch):
    path = tmp_path / "results" / "s1.json"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "s1.py"), "--only", "a b", "--json", str(path)])
    measuring.record(path, "s1", [measuring.table("a step", TIMES, ("fast",))], also=("scipy",))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_document_says_what_was_run_where(document):
    assert list(document) == ["benchmark", "command", "date", "machine", "versions", "tables"]
    assert document["benchmark"] == "s1" and document["command"] == "python -m benchmarks.s1 --only 'a b'"
    assert list(document["versions"]) == ["python", "jax", "jaxlib", "numpy", "scipy"]
    assert document["versions"]["numpy"] == np.__version__
    assert set(document["machine"]) == {"processor", "cores"} and document["machine"]["cores"] > 0
    assert document["tables"] == [measuring.table("a step", TIMES, ("fast",))]


def test_a_document_has_no_path_of_this_machine(document, tmp_path):
    words = json.dumps(document)
    for place in (ROOT, tmp_path, Path.home(), Path(sys.executable)):
        assert str(place) not in words


def test_where_a_document_is_written_is_no_part_of_the_command():
    for given in (["--json", "x", "--repeats", "3"], ["--repeats", "3", "--json=x"], ["--repeats", "3", "--json", "x"]):
        assert measuring.command("models", given) == "python -m benchmarks.models --repeats 3"


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "s1.json"
    with pytest.raises(ValueError):
        measuring.record(path, "s1", [measuring.table("a step", {"a": [float("nan")]})])
    assert not path.exists()


def test_nothing_is_written_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert measuring.arguments("a benchmark").parse_args([]).json is None
    measuring.record(None, "s1", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_takes_json_and_records_under_its_own_name(name):
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    calls = [(ast.unparse(node.func), node.args) for node in ast.walk(main) if isinstance(node, ast.Call)]
    assert "arguments" in dict(calls), "no --json"
    (recorded,) = [[ast.unparse(each) for each in given[:2]] for called, given in calls if called == "record"]
    assert recorded[0].endswith(".json") and recorded[1] == repr(name)
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main()"


def test_all_benchmarks_are_run():
    assert sorted(runner.BENCHMARKS) == MODULES


def test_the_page_of_all_documents_is_what_they_say(document):
    single = measuring.table("memory", {"a": [12345.6], "b": [0.5]}, unit="MB")
    lines = runner.page([{**document, "tables": [*document["tables"], single]}]).splitlines()
    at = lines.index("### a step, 3 rounds")
    assert lines[at + 2 : at + 6] == [
        "|  | seconds | least | most | × fast |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| slow | 5.000 | 4.000 | 9.000 | 3.00 (2.50–4.00) |",  # 4 / 1, 9 / 3, 5 / 2
        "| fast | 2.000 | 1.000 | 3.000 | 1.00 (1.00–1.00) |",
    ]
    at = lines.index("### memory")
    assert lines[at + 2 :] == ["|  | MB |", "| --- | ---: |", "| a | 12,346 |", "| b | 0.500 |"]


@pytest.mark.skipif(not runner.RESULTS.exists(), reason="nothing measured is in this checkout")
def test_the_page_in_the_checkout_is_that_of_its_documents():
    assert (runner.RESULTS / "README.md").read_text() == runner.page(runner.documents_in(runner.RESULTS))


def test_the_readmes_ratios_are_those_of_the_documents():
    text = runner.README.read_text()
    assert text == runner.with_ratios(text, runner.documents_in(runner.RESULTS))
    rows = [{"name": "fnet backprop", "ratios": {"torch": {"median": 0.5, "least": 0.25, "most": 1.0}}}]
    document = {"benchmark": "models", "tables": [{"title": "gpt: a training step", "rows": rows}]}
    assert runner.in_short([document]).splitlines()[2:] == [
        "| a training step of a GPT, by hand | PyTorch, eager, fused Adam | 0.50 (0.25–1.00) |"
    ]


def test_one_that_fails_is_named_at_the_end_and_the_others_run(monkeypatch, capsys, tmp_path):
    started = []
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "README", tmp_path / "README.md")

    def run(command, check):
        started.append(command[2].removeprefix("benchmarks."))
        assert Path(command[4]) == tmp_path / f"{started[-1]}.json"
        return type("Ended", (), {"returncode": int(started[-1] == "s1")})

    monkeypatch.setattr(runner.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "imports", "s1", "models"])
    with pytest.raises(SystemExit, match="error: s1 failed"):
        runner.main()
    assert started == ["imports", "s1", "models"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["imports", "s1", "models", "all"]
    assert [line.endswith("failed") for line in lines[-4:]] == [False, True, False, False]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "models"])
    runner.main()


@pytest.mark.long
def test_the_stages_of_a_cold_process_are_all_of_it():
    begin = time.time()
    told = measuring.process("-m", "benchmarks.cold", "--once", repr(begin), PYTHONPATH=str(ROOT))()
    found = json.loads(told)
    assert tuple(found) == cold.STAGES and all(seconds > 0 for seconds in found.values())
    assert sum(found.values()) <= time.time() - begin
