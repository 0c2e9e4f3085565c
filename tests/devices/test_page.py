"""The code of docs/several-devices.md runs as it stands."""

import re
from pathlib import Path

import jax

PAGE = Path(__file__).parents[2] / "docs" / "several-devices.md"


def test_the_pages_code_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(block, PAGE.name, "exec"), names)
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert shown.splitlines() == [line.rstrip() for line in printed.splitlines()[:6]]
    assert re.search(r"explain: run_chunk: each device sends in a step: all-gather \d+ times", printed)
    assert "PartitionSpec('fsdp', 'tensor')" in printed or "P('fsdp', 'tensor')" in printed
    assert int(names["end"].step) == 4 * 24
    assert len(jax.tree.leaves(names["end"].params)[0].sharding.device_set) == 1
