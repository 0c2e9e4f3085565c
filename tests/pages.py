"""The code of pages: what stands in their blocks, and what is left when it has run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def blocks_of(page: Path, language: str = "python") -> list[str]:
    """The blocks of a page in one language, from the top."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def run_blocks(blocks: Sequence[str], name: str) -> dict[str, Any]:
    """The names that stand when the blocks have run one after another; tracebacks name the page and the block."""
    names: dict[str, Any] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {i}", "exec"), names)
    return names
