"""The gallery: a tile for each experiment, its number that of the table, its picture small and described."""

from __future__ import annotations

import importlib.util
import io
import tomllib

import numpy as np
import pytest
from PIL import Image

from docs.generate import gallery, pictures

TILES = gallery.read_tiles()


def test_each_experiment_has_one_tile_and_a_row_in_the_table():
    names = [tile["experiment"] for tile in TILES]
    assert sorted(names) == gallery.experiments() == sorted(gallery.numbers())
    assert len(names) > 30 and "common" not in names
    for tile in TILES:
        module = gallery.command(tile).split()[2]
        assert importlib.util.find_spec(module), module


def test_numbers_are_those_of_the_table():
    known = gallery.numbers()
    wrong = [tile["experiment"] for tile in TILES if tile["number"] not in known[tile["experiment"]]]
    assert not wrong


def test_pictures_are_small_and_said_in_words():
    for tile in TILES:
        file = gallery.TILES.parent / f"{tile['experiment']}.png"
        assert file.stat().st_size <= 60_000, file
        with Image.open(file) as picture:
            assert picture.width <= 900, file
        words = tile["alt"].split()
        assert 12 <= len(words) <= 50 and tile["alt"].endswith(".") and "\n" not in tile["alt"], tile["experiment"]
        assert tile["about"].endswith("."), tile["experiment"]
    drawn = {file.stem for file in gallery.TILES.parent.glob("*.png")}
    assert drawn == {tile["experiment"] for tile in TILES}


def test_the_page_has_a_card_for_each_tile(tmp_path):
    gallery.write(tmp_path)
    text = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert text.count(":::{grid-item-card}") == text.count("```{image}") == len(TILES)
    for tile in TILES:
        assert f"python -m experiments.{tile['experiment']}\n" in text and tile["number"] in text
    assert text.count("\n## ") == len(gallery.TOPICS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tiles: tiles[1:], "0 tiles of 'digits_mlp'; expected one"),
        (lambda tiles: [*tiles, tiles[0]], "2 tiles of 'digits_mlp'; expected one"),
        (lambda tiles: [*tiles, {**tiles[0], "experiment": "nothing"}], "1 tiles of 'nothing'"),
        (lambda tiles: [{**tiles[0], "topic": "art"}, *tiles[1:]], "digits_mlp has topic = 'art'; expected one of"),
        (lambda tiles: [{k: v for k, v in tiles[0].items() if k != "alt"}, *tiles[1:]], "digits_mlp has no alt"),
        (lambda tiles: tiles, "digits_mlp.png is missing: make gallery"),
    ],
)
def test_what_is_missing_or_too_much_fails_the_build(change, message, tmp_path, monkeypatch):
    tiles = change(tomllib.loads(gallery.TILES.read_text(encoding="utf-8"))["tile"])
    (tmp_path / "tiles.toml").write_text("", encoding="utf-8")
    monkeypatch.setattr(gallery.tomllib, "loads", lambda text: {"tile": tiles})
    with pytest.raises(ValueError, match=message):
        gallery.read_tiles(tmp_path / "tiles.toml")


def test_a_box_cuts_between_panels_and_leaves_the_white_around_them_away():
    image = np.full((60, 200, 3), 255, np.uint8)
    image[20:40, 10:90] = 0
    image[20:40, 110:190] = (255, 0, 0)
    cut = np.asarray(pictures.cut(Image.fromarray(image), (0.48, 0, 1, 1)))
    assert cut.shape == (36, 96, 3)  # eight white pixels on each side
    np.testing.assert_array_equal(cut[8:28, 8:88], image[20:40, 110:190])
    with pytest.raises(ValueError, match=r"box: 0\.25 is not near a white line"):
        pictures.cut(Image.fromarray(image), (0.25, 0, 1, 1))


def test_pictures_become_as_small_as_they_must_and_what_looks_the_same_is_left(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    large = pictures.small(Image.fromarray(noise))
    monkeypatch.setattr(pictures, "LARGEST", len(large) - 1)
    fewer = pictures.small(Image.fromarray(noise))
    assert len(fewer) < len(large) and Image.open(io.BytesIO(fewer)).size == (60, 60)
    monkeypatch.setattr(pictures, "LARGEST", 500)
    with pytest.raises(ValueError, match="no picture of 500 bytes"):
        pictures.small(Image.fromarray(noise))
    wide = pictures.small(Image.new("RGB", (1000, 500)))
    assert Image.open(io.BytesIO(wide)).size == (900, 450)
    (tmp_path / "p.png").write_bytes(wide)
    assert pictures.is_same(pictures.small(Image.new("RGB", (900, 450), (0, 0, 1))), tmp_path / "p.png")
    assert not pictures.is_same(pictures.small(Image.new("RGB", (900, 450), "white")), tmp_path / "p.png")
    assert not pictures.is_same(wide, tmp_path / "none.png")
