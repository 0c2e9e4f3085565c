"""The explorer's pages that docs/learn embeds, as `experiments.explorer` makes them: its extra has to be installed."""

from __future__ import annotations

from pathlib import Path

from experiments.explorer import SCENES, Config
from fnet.report import write_explorer

PAGES = ("mazur", "xor", "faulty")


def write(folder: Path) -> None:
    """A page for each of `PAGES`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        recording, options = SCENES[name](Config())
        write_explorer(recording, folder / f"{name}.html", **options)
