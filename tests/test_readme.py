"""The README's code runs as it stands, from the top."""

from __future__ import annotations

import pathlib

import jax

from tests.pages import blocks_of, run_blocks

PAGE = pathlib.Path(__file__).parents[1] / "README.md"
README = PAGE.read_text()


def test_the_readmes_code_runs_and_prints_what_it_says(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(PAGE)
    assert len(blocks) >= 2
    assert 15 <= len([line for line in blocks[0].splitlines() if line.strip()]) <= 25
    with jax.numpy_dtype_promotion("standard"):
        names = run_blocks(blocks, PAGE.name)
    printed = capsys.readouterr().out
    assert names["history"].epochs["loss"].shape == (5,)
    rows = [line.split() for line in printed.splitlines()]
    assert sum(row[-1:] == ["ok"] for row in rows) == 12  # each layer's parameters and inputs, and the loss' outputs


def test_the_readme_shows_both_commands_first():
    assert README.index("make train") < README.index("make test") < README.index("```python")
