"""What is written at each build: the reference, mathematics, gallery, benchmarks, and the explorer's pages.

Each module's ``write(folder)`` is called by `docs/conf.py` with the folder that it fills.
"""

from pathlib import Path


def written(path: Path, text: str) -> None:
    """Write a page, unless it is as it was: then Sphinx does not build it anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
