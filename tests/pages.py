"""The code of pages: what stands in their blocks, and what is left when it has run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
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


def examples_of(page: Path) -> list[tuple[str, str | None]]:
    """The python blocks of a page, each with the text block directly behind it, which is what it prints, or None."""
    pairs = r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?"
    found = re.finditer(pairs, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(match[1], match[2]) for match in found]


def run_page(page: Path, printed: Callable[[], str]) -> str:
    """Run a page from its top; ``printed`` gives what was printed since it was last asked. Returns all of it.

    Fails with the block that prints something else than what stands behind it.
    """
    names: dict[str, Any] = {}
    all_of_it = ""
    for i, (block, shown) in enumerate(examples_of(page)):
        if without := missing(block):
            print(f"{page.name}, block {i}: not run, since {', '.join(without)} is not installed", file=sys.stderr)
            continue
        exec(compile(block, f"{page.name}, block {i}", "exec"), names)
        said = printed()
        all_of_it += said
        assert shown is None or said == shown, f"{page.name}, block {i} prints\n{said}\nand the page says\n{shown}"
    return all_of_it
