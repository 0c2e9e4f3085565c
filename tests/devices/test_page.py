"""The code of docs/how-to/several-devices.md runs as it stands."""

import re
from pathlib import Path

import jax

from tests.pages import blocks_of, run_blocks

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "several-devices.md"


def test_the_pages_code_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        names = run_blocks(blocks_of(PAGE), PAGE.name)
    printed = capsys.readouterr().out
    (shown,) = [text for text in blocks_of(PAGE, "text") if "on each device" not in text]  # that is of a plan
    assert shown.splitlines() == [line.rstrip() for line in printed.splitlines()[:6]]
    assert re.search(r"explain: run_chunk: each device sends in a step: all-gather \d+ times", printed)
    assert "PartitionSpec('fsdp', 'tensor')" in printed or "P('fsdp', 'tensor')" in printed
    assert int(names["end"].step) == 4 * 24
    assert len(jax.tree.leaves(names["end"].params)[0].sharding.device_set) == 1
