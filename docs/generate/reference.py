"""The reference: every public name on one page, grouped as people look for them; ``__all__`` is the truth."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fnet
from docs.generate import written
from docs.generate.docstrings import as_rst

# Modules whose names users take; those without __all__ offer what they define.
PUBLIC = (
    *("types", "layers", "layers.models", "layers.initializers", "layers.masks", "layers.children", "losses", "data"),
    *("optimizers", "optimizers.schedules", "optimizers.transforms", "metrics", "gradients", "gradients.curvature"),
    *("gradcheck", "training", "training.sharding", "training.population", "runs", "runs.observers", "runs.checkpoint"),
    *("export", "report", "core.processes"),
)


class Page(NamedTuple):
    """A page: its title, what it is for, and the modules in which its names are defined, in order."""

    title: str
    about: str
    modules: tuple[str, ...]


PAGES = {
    "contracts": Page(
        "Contracts",
        "What a layer, a loss, an optimizer and a state are: tuples of functions and arrays.",
        ("types", "core.numerics", "core.trees", "layers.children", "layers.wrappers"),
    ),
    "layers": Page(
        "Layers",
        "Dense layers, activations, and what combines layers.",
        (
            "layers.dense",
            "layers.activation",
            "layers.rectifiers",
            "layers.thresholds",
            "layers.gating",
            "layers.combinators",
            "layers.normalization",
            "layers.dropout",
            "layers.reparametrized",
        ),
    ),
    "images": Page(
        "Layers of images and volumes",
        "Convolutions, pools, and what changes sizes.",
        (
            "layers.convolution",
            "layers.pooling",
            "layers.padding",
            "layers.resizing",
            "layers.sampling",
            "layers.patches",
        ),
    ),
    "sequences": Page(
        "Layers of sequences",
        "Recurrent layers, attention, embeddings, positions, masks.",
        (
            "layers.recurrent",
            "layers.cells",
            "layers.stacking",
            "layers.attention",
            "layers.dot_product",
            "layers.relative",
            "layers.embedding",
            "layers.masks",
        ),
    ),
    "models": Page(
        "Models and initializers",
        "Whole networks made of layers, and how weights begin.",
        (
            "layers.models.plain",
            "layers.models.images",
            "layers.models.language",
            "layers.models.sequences",
            "layers.initializers",
        ),
    ),
    "losses": Page(
        "Losses and metrics",
        "One value per example with its gradient by hand; what is measured.",
        ("losses.entries", "losses.classes", "losses.vectors", "losses.alignments", "metrics"),
    ),
    "data": Page(
        "Data",
        "The one door through which data come.",
        ("data.arrays", "data.splits", "data.sources", "data.streams", "data.digits", "data.spirals"),
    ),
    "optimizers": Page(
        "Optimizers",
        "Pure transitions of states whose numbers are data.",
        (
            "optimizers.descent",
            "optimizers.adam",
            "optimizers.adaptive",
            "optimizers.matrices",
            "optimizers.lbfgs",
            "optimizers.compose",
            "optimizers.common",
            "optimizers.hyper",
        ),
    ),
    "schedules": Page(
        "Schedules and transforms",
        "Rates over time; what is done to gradients and weights on the way.",
        (
            "optimizers.schedules",
            "optimizers.transforms",
            "optimizers.averaging",
            "optimizers.guards",
            "optimizers.plateau",
        ),
    ),
    "gradients": Page(
        "Gradients",
        "By autodiff and by hand; of each example; curvature.",
        ("gradients.engines", "gradients.intermediates", "gradients.examples", "gradients.curvature"),
    ),
    "audit": Page(
        "The audit of gradients",
        "Whether a gradient is right, and passes as records.",
        (
            "gradcheck.check",
            "gradcheck.layered",
            "gradcheck.report",
            "gradcheck.selftest",
            "gradcheck.recording",
            "gradcheck.flat",
        ),
    ),
    "training": Page(
        "Training",
        "A step, a run as one pure function, evaluation, rules to stop.",
        (
            "training.steps",
            "training.epochs",
            "training.evaluation",
            "training.stopping",
            "training.rate_finder",
            "training.sampling",
        ),
    ),
    "populations": Page(
        "Populations",
        "Whole runs over seeds and settings in one program.",
        (
            "training.population.train",
            "training.population.members",
            "training.population.comparing",
            "training.population.halving",
        ),
    ),
    "devices": Page(
        "Several devices and processes",
        "Meshes, placements, plans.",
        ("training.sharding", "training.plans", "core.placement", "core.processes"),
    ),
    "runs": Page(
        "Runs",
        "`fit`: a run that is watched, kept and resumed.",
        (
            "runs.driver",
            "runs.run",
            "runs.history",
            "runs.observers.shared",
            "runs.observers.screen",
            "runs.observers.files",
            "runs.observers.services",
            "runs.observers.ending",
            "runs.kept",
            "runs.interrupts",
            "runs.nonfinite",
            "runs.checkpoint",
        ),
    ),
    "export": Page(
        "Export and reports",
        "Weights for other programs; tables, pictures, pages.",
        (
            "export.weights",
            "export.pytorch",
            "export.files",
            "export.inference",
            "export.lowering",
            "report.run",
            "report.folder",
            "report.tables",
            "report.plots",
            "report.model",
            "report.explorer",
        ),
    ),
}


class Entry(NamedTuple):
    """A public name, as short as it can be imported."""

    name: str
    value: Any
    module: str  # where it is defined, without "fnet."
    said: str  # what stands below its assignment, of what is no function and no class

    @property
    def kind(self) -> str:
        """The directive of autodoc."""
        if inspect.isclass(self.value):
            return "autoexception" if issubclass(self.value, BaseException) else "autoclass"
        return "autofunction" if inspect.isroutine(self.value) else "py:data"


def names_of(path: str) -> list[str]:
    """The public names of a module of fnet: its ``__all__``, or what it defines without an underscore."""
    module = importlib.import_module(path)
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [n for n, value in vars(module).items() if n[0] != "_" and getattr(value, "__module__", None) == path]


@functools.cache
def data_docs() -> dict[tuple[str, str], tuple[str, str]]:
    """Of each value that a docstring follows, by its room and name: the module, and that docstring."""
    found = {}
    house = Path(fnet.__file__).parent
    for path in sorted(house.rglob("*.py")):
        module = ".".join(path.relative_to(house).with_suffix("").parts)
        for node, after in itertools.pairwise(ast.parse(path.read_text()).body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            text = getattr(getattr(after, "value", None), "value", None) if isinstance(after, ast.Expr) else None
            for target in targets:
                if isinstance(target, ast.Name) and isinstance(text, str):
                    room = "training" if module == "core.placement" else module.split(".")[0]  # shown by sharding
                    found[room, target.id] = module, text
    return found


def entries() -> list[Entry]:
    """Every public name once, under its shortest path, in the order in which the sources define them."""
    found: dict[int, Entry] = {}
    for path in (f"fnet.{name}" for name in PUBLIC):
        for name in names_of(path):
            value = getattr(importlib.import_module(path), name)
            if inspect.ismodule(value):
                continue
            at_top = getattr(fnet, name, None) is value
            shown = f"fnet.{name}" if at_top else f"{path}.{name}"
            if inspect.isclass(value) or inspect.isroutine(value):
                entry = Entry(shown, value, value.__module__.removeprefix("fnet."), "")
            else:
                entry = Entry(shown, value, *data_docs()[path.split(".")[1], name])
            found.setdefault(id(value), entry)
    return sorted(found.values(), key=lambda entry: place_in_source(entry))


def place_in_source(entry: Entry) -> int:
    """Where a name stands among those of its module."""
    try:
        return list(vars(importlib.import_module(f"fnet.{entry.module}"))).index(entry.name.rpartition(".")[2])
    except ValueError:
        return 0


def by_page() -> dict[str, list[tuple[str, list[Entry]]]]:
    """For each page its modules with their names; raises ValueError for a name that has no page, or two."""
    pages: dict[str, list[tuple[str, list[Entry]]]] = {}
    all_entries = entries()
    for page, (_, _, modules) in PAGES.items():
        pages[page] = [(m, [entry for entry in all_entries if entry.module == m]) for m in modules]
    stand = [entry.name for sections in pages.values() for _, some in sections for entry in some]
    missing = sorted({entry.name for entry in all_entries} - set(stand))
    twice = sorted({name for name in stand if stand.count(name) > 1})
    if missing or twice:
        raise ValueError(
            f"reference: on no page {missing}, on two {twice}; expected each public name on one: add the module that "
            "defines it to a page in docs/generate/reference.py"
        )
    return pages


def title_of(module: str) -> str:
    """What a module's docstring begins with, up to the first full stop or colon."""
    first = (importlib.import_module(f"fnet.{module}").__doc__ or module).strip().splitlines()[0]
    return first.split(": ")[0].split(". ")[0].rstrip(".:")


def lines_of(page: Page, sections: list[tuple[str, list[Entry]]]) -> Iterator[str]:
    """A page as reStructuredText."""
    yield from (page.title, "=" * len(page.title), "", page.about, "")
    for module, some in sections:
        if not some:
            continue
        title = title_of(module)
        yield from (title, "-" * len(title), "")
        for entry in some:
            yield f".. {entry.kind}:: {entry.name}"
            if entry.kind == "autoclass":
                yield "   :members:"
            yield ""
            yield from (f"   {line}" for line in as_rst(inspect.cleandoc(entry.said).splitlines()))
            yield ""


def write(folder: Path) -> None:
    """``index.rst`` and the pages of `PAGES`."""
    pages = by_page()
    index = [
        *("Reference", "=========", "", "Every public name stands on one page.", ""),
        *(f"- :doc:`{name}`: {page.about[0].lower()}{page.about[1:]}" for name, page in PAGES.items()),
        *("", ".. toctree::", "   :hidden:", "", *(f"   {page}" for page in PAGES), ""),
    ]
    written(folder / "index.rst", "\n".join(index))
    for page, sections in pages.items():
        written(folder / f"{page}.rst", "\n".join(lines_of(PAGES[page], sections)) + "\n")
