"""The pages' code runs as it stands, from the top; each page in a process' own names."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["training", "extending"])
def test_the_pages_code_runs(page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, f"{page}.md", "exec"), names)
    printed = capsys.readouterr().out
    if page == "training":
        assert "epoch 5/5" in printed and "forward of dense_0: dot_general gives" in printed
        assert "explain: compiled in" in printed and "batch_size was 32 and is 16" in printed
    else:
        assert not re.search(r"\bwrong\b", printed) and "scale_and_shift_0/a" in printed
