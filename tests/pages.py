"""The code of pages: what stands in their blocks, and what is left when it has run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def blocks_of(page: Path, language: str = "python") -> list[str]:
    """The blocks of a page in one language, from the top."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def missing(block: str) -> list[str]:
    """The packages of its first line, ``# needs torch, optax``, that are not installed; such a block is not run."""
    said = re.match(r"# needs ([\w, ]+)\n", block)
    return [name for name in re.split(r"[, ]+", said[1]) if not importlib.util.find_spec(name)] if said else []


def run_blocks(blocks: Sequence[str], name: str) -> dict[str, Any]:
    """The names that stand when the blocks have run one after another; tracebacks name the page and the block."""
    names: dict[str, Any] = {}
    for i, block in enumerate(blocks):
        if without := missing(block):
            print(f"{name}, block {i}: not run, since {', '.join(without)} is not installed", file=sys.stderr)
        else:
            exec(compile(block, f"{name}, block {i}", "exec"), names)
    return names
