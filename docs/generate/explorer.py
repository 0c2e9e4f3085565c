"""The explorer's pages that docs/learn embeds, as `experiments.explorer` makes them: its extra has to be installed."""

from __future__ import annotations

from pathlib import Path

from experiments.explorer import SCENES, Config
from fnet.report import write_explorer

PAGES = ("mazur", "xor", "faulty")


def write(folder: Path) -> None:
    """Make the pages in _static/explorer of ``folder``, which is docs/."""
    for name in PAGES:
        path = folder / "_static" / "explorer" / f"{name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        recording, options = SCENES[name](Config())
        write_explorer(recording, path, **options)
