"""The pages' code runs as it stands, from the top; each page in a process' own names."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from docs.generate import explorer
from tests.pages import examples_of, run_page

pytestmark = pytest.mark.long

DOCS = Path(__file__).parents[1] / "docs"
GENERATED = {"_build", "gallery", "mathematics", "reference"}
ELSEWHERE = {
    "how-to/gradient-audit.md",  # test_experiments_gradient_audit compares it but for what machines differ in
    "how-to/several-devices.md",  # tests/devices/test_page.py has the devices
}
PAGES = {
    name: page
    for page in sorted(DOCS.rglob("*.md"))
    if (name := page.relative_to(DOCS).as_posix()).split("/")[0] not in GENERATED
    and name not in ELSEWHERE
    and examples_of(page)
}
SAYS = {  # where not all that is printed stands on the page
    "how-to/training.md": (
        *("epoch 5/5", "forward of dense_0: dot_general gives", "explain: run_chunk compiled in"),
        "batch_size was 32 and is 16",
    ),
    "how-to/instruments.md": ("batch_norm_0: mixes the examples of a batch",),
    "how-to/extending.md": ("scale_and_shift_0/a",),
}
WIDTH = 88  # characters of code that a page shows without scrolling
SPANISH = {"mazur": "mazur", "xor": "xor", "wrong-backward": "propagacion-equivocada"}


@pytest.fixture
def as_a_program(tmp_path, monkeypatch):
    """In a folder of its own, with jax as it comes; what a page sets is set back."""
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_code_runs_and_prints_what_stands_behind_it(name, as_a_program, capsys):
    printed = run_page(PAGES[name], lambda: capsys.readouterr().out)
    assert all(words in printed for words in SAYS.get(name, ()))
    if name == "how-to/extending.md":
        assert not re.search(r"\bwrong\b", printed)


def test_a_block_that_prints_something_else_is_named(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("```python\na = 1\n```\n\n```python\nprint(a)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page.md, block 1 prints\n1\n\nand the page says\n2"):
        run_page(page, lambda: capsys.readouterr().out)


def test_the_pages_that_frames_show_are_those_that_are_made():
    framed = [
        (page.parent / source).resolve().relative_to(DOCS).as_posix()
        for page in PAGES.values()
        for source in re.findall(r'<iframe src="([^"]*)"', page.read_text(encoding="utf-8"))
    ]
    assert len(framed) == 6
    assert set(framed) == {f"_static/explorer/{name}.html" for name in explorer.PAGES}


def test_code_fits_the_width_of_a_page():
    rooms = ("start", "how-to", "coming-from")
    pages = [
        DOCS.parent / "README.md",
        *DOCS.glob("*.md"),
        *(page for room in rooms for page in (DOCS / room).glob("*.md")),
    ]
    assert len(pages) > 20
    wide = [
        f"{page.name}: {line}"
        for page in pages
        for block, _ in examples_of(page)
        for line in block.splitlines()
        if len(line) > WIDTH
    ]
    assert not wide, f"more than {WIDTH} characters: {wide}"


def without_words(page: Path) -> list[str]:
    """The program of a page, its comments and strings left out."""
    trees = [ast.parse(block) for block, _ in examples_of(page)]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return [ast.dump(tree) for tree in trees]


@pytest.mark.parametrize(("english", "spanish"), SPANISH.items())
def test_the_spanish_pages_have_the_english_ones_code(english, spanish):
    ours = DOCS / "es" / "learn" / f"{spanish}.md"
    assert without_words(ours) == without_words(DOCS / "learn" / f"{english}.md")


def without_numbers(text: str) -> str:
    """The words of an output: its numbers, times among them, are others on another machine, and its columns as wide."""
    return " ".join(re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", text).split())


def shown_in(cell: dict) -> str:
    """What is printed below a cell of a notebook, and what its last line is."""
    return "".join("".join(shown.get("text") or shown["data"]["text/plain"]) for shown in cell["outputs"])


def test_the_tutorials_cells_run_in_order_and_show_what_stands_below_them(capsys):
    cells = json.loads((DOCS / "start" / "tutorial.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) >= 7 and all(cell["outputs"] for cell in cells)
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for i, cell in enumerate(cells):
            *statements, last = ast.parse("".join(cell["source"])).body
            is_value = isinstance(last, ast.Expr)
            before = ast.Module(statements if is_value else [*statements, last], type_ignores=[])
            exec(compile(before, f"tutorial.ipynb, cell {i}", "exec"), names)
            value = (
                eval(compile(ast.Expression(last.value), f"tutorial.ipynb, cell {i}", "eval"), names)
                if is_value
                else None
            )
            said = capsys.readouterr().out + ("" if value is None else repr(value))
            assert without_numbers(said) == without_numbers(shown_in(cell)), f"cell {i}"
    assert all(jax.tree.leaves(names["same"])) and names["report"].ok
