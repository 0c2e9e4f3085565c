"""The gallery: a tile for each experiment, from ``docs/gallery/tiles.toml`` and the pictures beside it.

A tile has ``experiment``, ``title``, ``about`` (one sentence), ``number`` (a part of the experiment's number in
``experiments/README.md``, as it stands there), ``topic`` and ``alt``, what the picture shows in words. Its picture is
``EXPERIMENT.png``, which ``make gallery`` draws (`docs.generate.pictures` says from what). ``shown`` is what the
picture is of, where that is not a run of the default settings.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TILES = ROOT / "docs" / "gallery" / "tiles.toml"
TOPICS = {  # the page's sections, in order
    "foundations": "From one neuron to a trained network",
    "gradients": "Gradients: by hand, checked, shown",
    "optimisation": "Optimisation",
    "architectures": "Architectures",
    "theory": "Why it works, and when it does not",
    "uses": "Uses",
}
FIELDS = {"experiment", "title", "about", "number", "topic", "alt"}
LARGEST = 60_000  # bytes of a picture


def read_tiles(file: Path = TILES) -> list[dict]:
    """The tiles, each with a picture that is there; ValueError says what is missing, too much or unknown."""
    tiles = tomllib.loads(file.read_text(encoding="utf-8"))["tile"]
    have = [tile.get("experiment", "") for tile in tiles]
    for name in sorted({*experiments(), *have}):
        if have.count(name) != (name in experiments()):
            raise ValueError(f"{file}: {have.count(name)} tiles of {name!r}; expected one for each experiment, no more")
    for tile in tiles:
        name, picture = tile["experiment"], file.parent / f"{tile['experiment']}.png"
        if missing := FIELDS - tile.keys():
            raise ValueError(f"{file}: {name} has no {', '.join(sorted(missing))}")
        if tile["topic"] not in TOPICS:
            raise ValueError(f"{file}: {name} has topic = {tile['topic']!r}; expected one of {', '.join(TOPICS)}")
        if not picture.is_file():
            raise ValueError(f'{picture} is missing: make gallery ARGS="--only {name}" draws it')
        if picture.stat().st_size > LARGEST:
            raise ValueError(f"{picture} has {picture.stat().st_size} bytes; expected at most {LARGEST}")
    return tiles


def experiments() -> list[str]:
    """The files in ``experiments/`` that are commands."""
    files = sorted((ROOT / "experiments").glob("*.py"))
    return [file.stem for file in files if re.search(r"^    main\(run", file.read_text(encoding="utf-8"), re.M)]


def numbers() -> dict[str, str]:
    """The number of each experiment in the table of ``experiments/README.md``."""
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    rows = (line.split("|") for line in text.splitlines() if line.startswith("| `"))
    return {row[1].split("`")[1]: row[3].strip() for row in rows}


def command(tile: dict) -> str:
    """The command of a tile."""
    return f"python -m experiments.{tile['experiment']}"


def card(tile: dict) -> str:
    """A tile as a card of sphinx-design; its picture leads to the whole picture."""
    shown = f"\n\nThe picture: `{command(tile)} {tile['shown']}`." if "shown" in tile else ""
    return f"""
:::{{grid-item-card}} {tile["title"]}

```{{image}} {tile["experiment"]}.png
:alt: {tile["alt"]}
:width: 100%
```

{tile["about"]}

**{tile["number"]}**{shown}

```sh
{command(tile)}
```
:::
"""


def write(folder: Path) -> None:
    """Write ``index.md`` into the folder, beside the pictures."""
    tiles = read_tiles()
    parts = [
        "# Gallery\n\nEvery experiment of the repository: what it shows, its number, and the command that makes both. "
        "A picture leads to a larger one. The commands run in a clone of the repository with the extra "
        "[`experiments`](../start/quick-start.md#install); `experiments/README.md` there has all numbers and how long "
        "each takes.\n"
    ]
    for topic, title in TOPICS.items():
        cards = "".join(card(tile) for tile in tiles if tile["topic"] == topic)
        parts.append(f"\n## {title}\n\n::::{{grid}} 1 2 3 3\n:gutter: 3\n{cards}::::\n")
    (folder / "index.md").write_text("".join(parts), encoding="utf-8")
