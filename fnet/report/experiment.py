"""The page of an experiment's folder that is no run of `fnet.fit`: as of one compiled program, or of several runs."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fnet.report.folder import read_json
from fnet.report.html import as_words, brief, date_time, flat, is_number, pairs, write_page

SHOWN = {".png": "image/png", ".svg": "image/svg+xml", ".gif": "image/gif", ".jpg": "image/jpeg"}
LONGEST = 6  # lists of numbers that are written out


def is_experiment(folder: Path) -> bool:
    """Whether it holds a configuration and what came of it, and no metrics of a run."""
    if not (folder / "config.json").is_file() or (folder / "metrics.jsonl").exists():
        return False
    return (folder / "results.json").is_file() or any(path.suffix in SHOWN for path in folder.iterdir())


def write_experiment(folder: Path, page: Path) -> Path:
    """Write the page of the folder: numbers, pictures, configuration, and links to the other files."""
    notes: list[str] = []
    config, results = (read_json(folder / f"{name}.json", notes) for name in ("config", "results"))
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "report.html"]
    pictures = [path for path in files if path.suffix in SHOWN]
    pages = sorted(folder.glob("*/report.html"))
    others = [path for path in files if path not in pictures and path.name not in ("config.json", "results.json")]
    sections = {
        "Numbers": pairs({name: in_short(value) for name, value in leaves(results).items()}),
        "Pictures": "".join(map(picture, pictures)),
        "Runs": links(pages, folder, page.parent),
        "Files": links(others, folder, page.parent),
        "Configuration": pairs(flat(config, brief)),
    }
    where = folder.absolute()
    title = f"{where.parent.name}: {where.name}, {date_time((folder / 'config.json').stat().st_mtime)[:10]}"
    head = "".join(f'<p class="warning">{escape(note)}</p>' for note in notes)
    return write_page(page, title, head, {name: content for name, content in sections.items() if content})


def picture(path: Path) -> str:
    """A picture with its name, within the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    name = escape(path.stem.replace("_", " "), quote=True)
    source = f"data:{SHOWN[path.suffix]};base64,{data}"
    return f'<figure class="shown"><img alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>'


def links(files: list[Path], folder: Path, beside: Path) -> str:
    """A list of the folder's files, to click on."""
    items = ""
    for path in files:
        address = quote(Path(os.path.relpath(path.absolute(), beside.absolute())).as_posix())
        items += f'<li><a href="{address}">{escape(path.relative_to(folder).as_posix())}</a></li>'
    return f"<ul>{items}</ul>" if items else ""


def leaves(values: Any, path: str = "") -> dict[str, Any]:
    """What stands in nested objects, and in lists of such, by path."""
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = {str(i): value for i, value in enumerate(values)}
    if not isinstance(values, Mapping):
        return {path: values}
    found = {}
    for name, value in values.items():
        found |= leaves(value, f"{path}/{name}" if path else name)
    return found


def in_short(value: Any) -> str:
    """A number, or a list of them; of a long one how many there are, the first and the last."""
    if isinstance(value, list) and len(value) > LONGEST:
        return f"{in_short(value[0])} … {in_short(value[-1])} ({len(value)})"
    if isinstance(value, list):
        words = [f"[{in_short(each)}]" if isinstance(each, list) else in_short(each) for each in value]
        return ", ".join(words) or "none"
    return f"{value:.6g}" if is_number(value) and isinstance(value, float) else as_words(value)
