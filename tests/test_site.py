"""The site that `make docs` built: links lead somewhere, nothing is asked of other hosts, phones do, search finds."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

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


class Page(HTMLParser):
    """What a page refers to, each with its tag, and the places in it that can be referred to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.places = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.links += [(tag, value) for name, value in attrs if name in ("href", "src", "data") and value]
        self.places |= {value for name, value in attrs if name in ("id", "name") and value}


def test_each_link_leads_somewhere_and_what_a_page_shows_is_beside_it():
    pages = {path: Page(path) for path in SITE.rglob("*.html") if "macros" not in path.name}
    gone, elsewhere = {}, {}  # and a page that refers to it
    for path, page in pages.items():
        for tag, link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if tag != "a" and url.scheme != "data":
                    elsewhere[link] = path.name
                continue
            target = Path(os.path.normpath(path.parent / unquote(url.path))) if url.path else path
            if not target.is_file() or (target in pages and unquote(url.fragment) not in pages[target].places):
                gone[f"{os.path.relpath(target, SITE)}#{url.fragment}"] = path.relative_to(SITE).as_posix()
    assert (gone, elsewhere) == ({}, {})


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("cosine", "reference/schedules"),
        ("LayerError", "reference/contracts"),
        ("missing derivative", "learn/wrong-backward"),
        ("save", "how-to/export"),
        ("resume", "how-to/training"),
        ("dropout", "reference/layers"),
        ("learning rate schedule", "reference/schedules"),
        ("install", "start/quick-start"),
        ("custom layer", "how-to/extending"),
    ],
)
def test_search_from_a_file_has_the_page_among_its_first_three(browser, words, page):
    shown = browser.new_page()
    shown.goto(f"{(SITE / 'search.html').as_uri()}?q={words.replace(' ', '+')}")
    shown.wait_for_function("document.querySelector('#search-results .search-summary')?.innerText.includes('found')")
    found = [link.get_attribute("href") for link in shown.locator("#search-results ul.search li > a").all()]
    assert page in [str(href).split(".html")[0] for href in found[:3]], found[:3]


def test_each_page_of_the_reference_is_in_its_index():
    index = (SITE / "reference" / "index.html").read_text()
    for name in ("layers", "losses", "optimizers", "runs"):
        assert f'href="{name}.html"' in index
    assert 'id="fnet.dense"' in (SITE / "reference" / "layers.html").read_text()


def test_spanish_pages_say_that_they_are_spanish():
    assert '<html lang="es"' in (SITE / "es" / "learn" / "index.html").read_text()
    assert '<html lang="en"' in (SITE / "index.html").read_text()
