"""The rooms of fnet: what stands in its root, and who imports whom."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import fnet

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "fnet"
# each may import from those before it
ROOMS = [
    *("types", "core", "layers", "losses", "data", "optimizers", "metrics", "gradients", "gradcheck", "training"),
    *("runs", "export", "report"),
]
# what reaches up, within a function: so a message names what there is, and a convenience draws
UPWARD = {
    ("core.checks", "layers"),  # require_layer names the layer that a function of jax stands for
    ("gradcheck.report", "report.audit"),  # Report.html
    ("gradcheck.report", "report.audit_picture"),  # Report.plot
    ("runs.history", "report.plots"),  # History.plot
    ("runs.history", "report.run"),  # History.write_csv
}


class Import(NamedTuple):
    of: str  # a module, without "fnet."
    what: str  # a module
    names: tuple[str, ...]
    inside: bool  # of a function


def imports() -> list[Import]:
    found = []
    for path in sorted(HOUSE.rglob("*.py")):
        of = ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix("__init__").rstrip(".")

        def visit(node, inside, of=of):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "fnet":
                    assert child.level == 0
                    for alias in child.names:
                        what = f"{child.module}.{alias.name}"
                        is_module = (
                            HOUSE.parent.joinpath(*what.split(".")).is_dir()
                            or HOUSE.parent.joinpath(*what.split(".")).with_suffix(".py").is_file()
                        )
                        module = what if is_module else child.module
                        found.append(Import(of, module.removeprefix("fnet").lstrip("."), (alias.name,), inside))
                if isinstance(child, ast.Import):
                    assert not any(alias.name.split(".")[0] == "fnet" for alias in child.names), of
                visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

        visit(ast.parse(path.read_text()), False)
    return found


IMPORTS = imports()


def room(module: str) -> str:
    return module.split(".")[0]


def test_the_root_has_at_most_sixteen_entries_and_each_is_a_room_or_the_door():
    entries = {path.name for path in HOUSE.iterdir() if path.name != "__pycache__"}
    assert len(entries) <= 16
    assert entries == {
        "__init__.py",
        "__main__.py",
        "py.typed",
        *(r if (HOUSE / r).is_dir() else f"{r}.py" for r in ROOMS),
    }


def test_the_door_names_each_room_and_what_programs_need_to_those_who_run_and_to_those_who_read():
    assert list(fnet.ROOMS) == ROOMS
    tree = ast.parse((HOUSE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    read = {(node.module, alias.name) for node in block.body for alias in node.names}  # pyright: ignore
    assert read == {*(("fnet", r) for r in ROOMS), *((place, name) for name, place in fnet.PLACES.items())}
    for place, name in read:
        assert getattr(fnet, name) is getattr(importlib.import_module(place), name)
    with pytest.raises(AttributeError, match="module 'fnet' has no attribute 'adamm'"):
        _ = fnet.adamm  # pyright: ignore


def test_a_program_imports_the_rooms_that_it_uses():
    code = (
        "import sys, fnet; assert 'jax' not in sys.modules;"
        "fnet.train(fnet.make_step(fnet.backprop(fnet.dense(1), fnet.losses.squared_error), fnet.sgd(0.1)), "
        "fnet.init_train_state({'w': (w := __import__('numpy').ones((1, 1), 'f')), 'b': w[0]}, fnet.sgd(0.1), "
        "__import__('jax').random.key(0), ()), fnet.Batch(w, w), epochs=1, batch_size=1);"
        "print(sorted({name.split('.')[1] for name in sys.modules if name.startswith('fnet.')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == sorted({*ROOMS} - {"metrics", "gradcheck", "runs", "export", "report"})


def test_each_room_imports_from_those_before_it_alone():
    upward = {
        (i.of, i.what, i.inside)
        for i in IMPORTS
        if i.of not in ("", "__main__") and (not i.what or ROOMS.index(room(i.what)) > ROOMS.index(room(i.of)))
    }
    assert {(of, what) for of, what, inside in upward if inside} == UPWARD
    assert {(of, what) for of, what, inside in upward if not inside} == set()


def test_no_module_waits_for_itself():
    graph: dict[str, set[str]] = {}
    for i in IMPORTS:
        if not i.inside and i.of != i.what:
            graph.setdefault(i.of, set()).add(i.what)
    for module in [*graph]:  # a room's front page comes with each of its modules
        if "." in module:
            graph[module].discard(room(module))
    assert [*TopologicalSorter(graph).static_order()]  # CycleError names the circle


def test_no_module_takes_an_underscore_name_of_another():
    assert [i for i in IMPORTS if any(n.startswith("_") and not n.startswith("__") for n in i.names)] == []


@pytest.mark.parametrize("name", [r for r in ROOMS if (HOUSE / r).is_dir()])
def test_a_room_has_a_front_page(name):
    page = importlib.import_module(f"fnet.{name}")
    assert page.__doc__ and re.search(r"^Imports ", page.__doc__, re.M), "what it may import and what not"
    for public in getattr(page, "__all__", ()):
        assert hasattr(page, public)
    if name != "core":  # of which no user takes anything
        assert sorted(page.__all__) == list(page.__all__)


NAMES = re.compile(r"(?<![\w./-])fnet(?:\.[A-Za-z_]\w*)+")


def test_every_name_of_fnet_that_is_written_anywhere_is_there():
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("docs/**/*.py"),
        *ROOT.glob("docs/**/*.ipynb"),
        *HOUSE.rglob("*.py"),
        *ROOT.glob("experiments/*"),
        *ROOT.glob("experiments/pictures/*.py"),
        *ROOT.glob("benchmarks/*.py"),
    ]
    missing = {}
    for page in (path for path in pages if path.is_file()):
        for name in {*NAMES.findall(page.read_text())}:
            found = fnet
            for k, part in enumerate(name.split(".")[1:], 1):
                try:
                    found = getattr(found, part, None) or importlib.import_module(".".join(name.split(".")[: k + 1]))
                except ImportError:
                    missing.setdefault(page.relative_to(ROOT).as_posix(), set()).add(name)
                    break
                if not isinstance(found, type(fnet)):
                    break
    assert missing == {}


def test_pictures_import_no_experiment():
    pictures = sorted(ROOT.glob("experiments/pictures/*.py"))
    assert len(pictures) > 2
    found = set()
    for node in (node for path in pictures for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.ImportFrom):
            found.add(f"{node.module}.")
        if isinstance(node, ast.Import):
            found |= {f"{alias.name}." for alias in node.names}
    assert "experiments.pictures.parts." in found
    assert [m for m in found if m.startswith("experiments.") and not m.startswith("experiments.pictures.")] == []


PATHS = re.compile(r"(?<![\w./-])(?:fnet|experiments)/[\w/]+\.py")


def test_every_file_that_is_written_anywhere_is_there():
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("docs/**/*.py"),
        *ROOT.glob("docs/**/*.ipynb"),
        *HOUSE.rglob("*.py"),
        *ROOT.glob("experiments/*"),
        *ROOT.glob("experiments/pictures/*.py"),
        *ROOT.glob("tests/*.py"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
    ]
    written = {(page.name, name) for page in pages if page.is_file() for name in PATHS.findall(page.read_text())}
    assert {(page, name) for page, name in written if not (ROOT / name).is_file()} == set()
