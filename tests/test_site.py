"""The site that `make docs` built: no page asks another host, none is wider than a phone, search finds words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
PAGES = sorted(path for path in SITE.rglob("*.html") if not {"_modules", "_static"} & set(path.parts))


@pytest.fixture(autouse=True)
def built():
    if not PAGES:
        missing = "NOT TESTED: the site is not built (make docs)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)


def test_no_page_asks_another_host_or_is_wider_than_a_phone(browser):
    asked, wide = set(), {}
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.on("request", lambda request: asked.add(request.url))
    for path in PAGES:
        page.goto(path.as_uri(), wait_until="domcontentloaded")
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > 390:
            wide[path.relative_to(SITE).as_posix()] = width
    assert len(PAGES) > 60 and wide == {}
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("word", ["cosine", "LayerError", "missing derivative"])
def test_search_finds_words_from_a_file(browser, word):
    page = browser.new_page()
    page.goto(f"{(SITE / 'search.html').as_uri()}?q={word.replace(' ', '+')}")
    page.wait_for_selector("#search-results ul.search li", timeout=20_000)
    page.wait_for_function("document.querySelector('#search-results .search-summary')?.innerText.includes('found')")
    found = page.locator("#search-results ul.search li a").all_inner_texts()
    assert found


def test_each_page_of_the_reference_is_in_its_index():
    index = (SITE / "reference" / "index.html").read_text()
    for name in ("layers", "losses", "optimizers", "runs"):
        assert f'href="{name}.html"' in index
    assert 'id="fnet.dense"' in (SITE / "reference" / "layers.html").read_text()


def test_spanish_pages_say_that_they_are_spanish():
    assert '<html lang="es"' in (SITE / "es" / "learn" / "index.html").read_text()
    assert '<html lang="en"' in (SITE / "index.html").read_text()
