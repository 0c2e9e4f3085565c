"""`make gallery`: runs the experiments and draws the pictures of the gallery from what they write.

    python -m docs.generate.pictures                      all of them, which takes about an hour
    python -m docs.generate.pictures --only optimizer_paths
    python -m docs.generate.pictures --runs DIR           keeps the runs there, and takes those that are there

A tile of ``docs/gallery/tiles.toml`` says what its picture is of:

- ``file``: a picture or a page in the run's folder, or, without it, the lines that the experiment prints;
- ``shown``: options of the command, where it is not that of the default settings, and ``fails = true`` where the
  experiment is to end with an error, as an audit of a fault does;
- ``box``: of a picture, the part from left, top to right, bottom as shares; an edge moves to the nearest white line;
- ``part``, ``height``: of a page, the selector of what is shown, and how much of it;
- ``first``, ``lines``, ``columns``: of what is printed, words in the first line, and how many lines and columns.

Pictures are at most 900 pixels wide, of at most 60 kB, PNG of as many colours as that allows. One that differs from
what is there by less than can be seen is left.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from docs.generate.gallery import LARGEST, ROOT, TILES, experiments

WIDTH = 900  # of a picture, in pixels


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the gallery.")
    parser.add_argument("--only", nargs="*", metavar="EXPERIMENT", choices=experiments(), default=experiments())
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder, and take what is there")
    options = parser.parse_args()
    tiles = {tile["experiment"]: tile for tile in tomllib.loads(TILES.read_text(encoding="utf-8"))["tile"]}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.only:
            started = time.monotonic()
            picture = draw(tiles[name], run(tiles[name], options.runs or Path(temporary)))
            file = TILES.parent / f"{name}.png"
            said = "as it was" if is_same(picture, file) else f"{len(picture) / 1e3:.0f} kB"
            if said != "as it was":
                file.write_bytes(picture)
            print(f"{name}: {said}, {time.monotonic() - started:.0f} s", flush=True)


def run(tile: dict, runs: Path) -> Path:
    """The folder in which a tile's experiment has run, with what it has printed as ``said.txt``."""
    folder = runs.resolve() / tile["experiment"]
    if (folder / "said.txt").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = [sys.executable, "-m", f"experiments.{tile['experiment']}", *tile.get("shown", "").split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if (ended.returncode != 0) != tile.get("fails", False):
        raise SystemExit(f"{' '.join(words)} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    (folder / "said.txt").write_text(ended.stdout, encoding="utf-8")
    return folder


def draw(tile: dict, folder: Path) -> bytes:
    """The picture of a tile, from the folder of its run."""
    if "file" not in tile:
        lines = (folder / "said.txt").read_text(encoding="utf-8").splitlines()
        start = next(i for i, line in enumerate(lines) if tile["first"] in line)
        return small(text([line[: tile["columns"]] for line in lines[start : start + tile["lines"]]]))
    (file,) = folder.glob(f"runs/{tile['experiment']}/*/{tile['file']}")
    if file.suffix == ".html":
        return small(page(file, tile["part"], tile["height"]))
    return small(cut(Image.open(file).convert("RGB"), tile.get("box", (0, 0, 1, 1))))


def text(lines: list[str]) -> Image.Image:
    """Lines as a terminal shows them, black on white."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    size = min(30, int((WIDTH - 30) / 0.603 / max(len(line.rstrip()) for line in lines)))  # a letter is 0.602 wide
    font, height = ImageFont.truetype(str(file), size), round(1.3 * size)
    wide = max(font.getlength(line.rstrip()) for line in lines)
    image = Image.new("RGB", (int(wide) + size, height * len(lines) + size), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((size / 2, size / 2 + i * height), line.rstrip(), "black", font)
    return image


def page(file: Path, part: str, height: int) -> Image.Image:
    """What a narrow page shows at a selector, at twice its resolution."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 520, "height": 1600}, device_scale_factor=2)
        shown.goto(file.as_uri())
        shown.wait_for_timeout(1000)
        taken = shown.locator(part).first.screenshot(animations="disabled")
        browser.close()
    image = Image.open(io.BytesIO(taken)).convert("RGB")
    return image.crop((0, 0, image.width, min(image.height, 2 * height)))


def cut(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The part of a picture, without the white around it; its edges cut nothing that is drawn."""
    pixels = np.asarray(image)  # (H, W, 3)
    for axis, shares in ((0, box[1::2]), (1, box[0::2])):
        free = np.asarray((pixels > 250).all((1 - axis, 2)))  # lines that are white from end to end
        low, high = (near_white_line(free, share) for share in shares)
        drawn = low + np.flatnonzero(~free[low:high])
        pixels = pixels.take(range(max(drawn[0] - 8, low), min(drawn[-1] + 9, high)), axis)
    return Image.fromarray(pixels)


def near_white_line(free: np.ndarray, share: float) -> int:
    """The line that is ``free`` of ink and nearest to this share of all; their ends are as they are."""
    place = round(share * len(free))
    if place in (0, len(free)):
        return place
    nearest = min(np.flatnonzero(free), key=lambda line: abs(line - place))
    if abs(nearest - place) > 0.08 * len(free):
        raise ValueError(f"box: {share} is not near a white line; expected a share of {nearest / len(free):.2f}")
    return int(nearest)


def small(image: Image.Image) -> bytes:
    """A picture as PNG of at most `WIDTH` pixels and `LARGEST` bytes: of fewer colours, and smaller, if need be."""
    for width in (WIDTH, 720, 560):
        if image.width > width:
            image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        for colours in (128, 64, 32, 16):
            file = io.BytesIO()
            image.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
            if file.tell() <= LARGEST:
                return file.getvalue()
    raise ValueError(f"no picture of {LARGEST} bytes; expected one with less in it")


def is_same(picture: bytes, file: Path) -> bool:
    """Whether the file shows the picture, but for a difference that cannot be seen."""
    if not file.exists():
        return False
    old, new = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float) for data in (file.read_bytes(), picture))
    return old.shape == new.shape and np.abs(old - new).mean() < 0.5


if __name__ == "__main__":
    main()
