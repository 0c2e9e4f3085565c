"""The pages' code runs as it stands, from the top; each page in a process' own names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import pytest

from tests.pages import blocks_of, run_blocks

pytestmark = pytest.mark.long

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["training", "extending", "instruments"])
def test_the_pages_code_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(DOCS / "how-to" / f"{page}.md")
    assert len(blocks) >= 4
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run_blocks(blocks, f"{page}.md")
    printed = capsys.readouterr().out
    if page == "training":
        assert "epoch 5/5" in printed and "forward of dense_0: dot_general gives" in printed
        assert "explain: run_chunk compiled in" in printed and "batch_size was 32 and is 16" in printed
    elif page == "instruments":
        assert "batch_norm_0: mixes the examples of a batch" in printed and (tmp_path / "spectrum.png").exists()
    else:
        assert not re.search(r"\bwrong\b", printed) and "scale_and_shift_0/a" in printed


def test_the_tutorials_cells_run_in_order():
    cells = json.loads((DOCS / "start" / "tutorial.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 7 and all(cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        names = run_blocks(code, "tutorial.ipynb")
    assert all(jax.tree.leaves(names["same"])) and names["report"].ok
