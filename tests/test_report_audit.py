"""The audit's picture and page: every row is there, nothing a user wrote is taken for HTML, odd reports are drawn."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import fnet
from fnet.gradcheck.report import Cost, Intermediate, LeafCheck, Report, Rung
from fnet.report import audit

NASTY = "<script>alert('&\")</script>"
VOID = {"meta", "img", "br"}


def leaf(path, verdict="ok", **fields):
    """A row as an audit makes it."""
    wrong = verdict == "wrong"
    row = LeafCheck(
        path,
        (4, 6),
        "float32",
        verdict,
        absolute=0.125 if wrong else 1e-16,
        relative=0.5 if wrong else 4e-16,
        worst=(2, 3),
        claimed=0.125 if wrong else 0.25,
        expected=0.25,
        ulps=1e15 if wrong else 1.0,
        cause="factor 0.5" if wrong else "",
        evidence=(f"evidence of {path}",),
        power=1e-9,
        taylor=tuple((t, t if wrong else t**2) for t in (1e-1, 1e-2, 1e-3)),
        order=1.0 if wrong else 2.0,
        ladder=(
            Rung("float32", 0.5 if wrong else 2e-7, 3e-7),
            Rung("float16", np.nan, np.nan, "does not run: TypeError"),
        ),
        errors=np.full((4, 6), 0.5 if wrong else 4e-16),
    )
    return row._replace(**fields)


def bare(path, verdict="wrong", **fields):
    """A row without anything to draw: a gradient of the wrong shape."""
    row = LeafCheck(path, (3,), "float32", verdict, np.inf, np.inf, (), np.nan, np.nan, np.inf, "wrong shape: ()")
    return row._replace(**fields)


def spotted(*values):
    errors = np.full((4, 6), 1e-16)
    errors.flat[: len(values)] = values
    return errors


FULL = Report(
    (leaf("block/w", "wrong"), leaf("block/b"), leaf("kinked", "kink", cause="x = 0 at relu"), bare("shapeless")),
    (
        Intermediate("logits", (2, 3), "ok", "13 digits", 1e-13, (0, 0), 1.0, 1.0),
        Intermediate("hidden", (2, 4), "wrong", "wrong", 0.25, (1, 3), 3.75, 3.0, "factor 1.25"),
    ),
    (Cost("claimed", 1234567.0, 2048.0, 4096.0, 0.0015), Cost("autodiff", 7654321.0, 512.0, 256.0, 0.0025)),
    ("products in the highest precision",),
    {"seed": "17", "backend": "cpu"},
)

OVERFLOW = Rung("float32", np.inf, np.nan)
ODD = {
    "empty": Report(()),
    "no errors": Report((bare("w"),)),
    "no errors and nothing wrong": Report((bare("w", "ok", errors=np.zeros((0, 0))), bare("b", "kink"))),
    "one": Report((leaf("w"),)),
    "scalar": Report((leaf("w", shape=(), worst=(), errors=np.array([[0.0]])),)),
    "nan": Report((leaf("w", "wrong", errors=spotted(np.nan, 0.5), relative=np.nan),)),
    "inf": Report((leaf("w", "wrong", errors=spotted(np.inf, 1e300), relative=np.inf, ladder=(OVERFLOW,)),)),
    "all nan": Report((leaf("w", "wrong", errors=np.full((2, 2), np.nan)), leaf("b"))),
    "all zero": Report((leaf("w", errors=np.zeros((64, 64)), relative=0.0, taylor=((1e-1, 0.0),), order=None),)),
    "rounding only": Report((leaf("w", taylor=((1e-1, 1e-16), (1e-2, 2e-16), (1e-3, np.nan)), order=None),)),
    "forty": Report(tuple(leaf(f"block_{i}/w", "ok" if i % 3 else "wrong") for i in range(40))),
    "other precision": Report((leaf("w", ladder=(Rung("float8_e4m3fn", 0.1, 0.0),), taylor=()),)),
    "matplotlib's signs": Report((leaf("_hidden"), leaf("$\\frac{$", "wrong", cause="$x_"), leaf("a$b"))),
    "long names": Report((leaf("/".join(["a_long_name"] * 20), "wrong", cause="why " * 99), leaf("w" * 300))),
}  # fmt: skip


class Page(HTMLParser):
    """The tags, attributes and texts of a page; every element must be closed where it was opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return "\n".join(self.words)


@pytest.fixture(scope="module")
def full_page():
    return audit.audit_page(FULL)


def pixels(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def embedded(page):
    (source,) = (value for name, value in Page(page).attributes if name == "src")
    kind, data = source.split(",")
    assert kind == "data:image/png;base64"
    return base64.b64decode(data, validate=True)


def panels(report):
    """The axes of the picture by their y label: heat maps have none, the colour bar neither."""
    axes = audit.draw(report).axes
    return {ax.get_ylabel(): ax for ax in axes if ax.get_ylabel()}, [ax for ax in axes if ax.get_images()]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_report_is_drawn_and_its_page_is_well_formed(name):
    page = audit.audit_page(ODD[name])
    assert pixels(embedded(page)).std() > 0, "a picture of one colour shows nothing"
    text = Page(page).text
    for row in ODD[name].leaves:
        assert row.path in text and row.cause in text


def test_the_picture_is_written_as_png(tmp_path):
    FULL.plot(tmp_path / "audit.png")
    picture = pixels((tmp_path / "audit.png").read_bytes())
    assert picture.shape[0] > 500 and picture.shape[1] > 1000


def test_every_row_stands_in_the_page_with_verdict_cause_and_worst_values(full_page):
    text = Page(full_page).text
    for row in FULL.leaves:
        assert {row.path, row.verdict} <= set(text.splitlines())
        assert row.cause in text and all(line in text for line in row.evidence)
    assert "at [2, 3]: 0.125, expected 0.25" in text
    assert (
        "worst at [2, 3]: claimed 0.125, expected 0.25; absolute error 1.250e-01, 1e+15 units in the last place" in text
    )
    for words in ("logits", "13 digits", "hidden", "3.75", "[1, 3]", "factor 1.25"):
        assert words in text
    for words in ("5e-01 ✗ (3e-07)", "does not run: TypeError", "1,234,567", "1.500 ms", "seed", "17", *FULL.notes):
        assert words in text


@pytest.mark.parametrize(
    "report, sentence",
    [
        (Report((leaf("w"), leaf("k", "kink"), leaf("i", "imprecise"))), "The gradient is right."),
        (Report((leaf("w"), leaf("u", "unverified"))), "The gradient is not verified."),
        (Report((leaf("u", "unverified"), leaf("w", "wrong"))), "The gradient is wrong."),
        (Report((leaf("w"),), FULL.intermediates), "The gradient is wrong."),
    ],
    ids=["right", "unverified", "wrong", "wrong intermediate"],
)
def test_the_page_begins_with_the_verdict_that_the_report_gives(report, sentence):
    words = Page(audit.audit_tables(report)).words
    assert words[0] == sentence
    assert (words[2] == report.first_wrong) == bool(report.first_wrong)
    assert (sentence == "The gradient is right.") == report.ok


def test_whatever_a_user_wrote_is_escaped_everywhere(full_page):
    row = leaf(NASTY, "wrong", dtype=NASTY, cause=NASTY, evidence=(NASTY,), ladder=(Rung(NASTY, 1.0, 1.0, NASTY),))
    report = Report(
        (row, leaf("w", NASTY)),
        (Intermediate(NASTY, (1,), "wrong", NASTY, 1.0, (0,), 1.0, 2.0, NASTY),),
        (Cost(NASTY, 1.0, 1.0, 1.0, 1.0),),
        (NASTY,),
        {NASTY: NASTY},
    )
    plain, page = Page(full_page), Page(audit.audit_page(report))
    assert set(page.tags) <= set(plain.tags) and "script" not in page.tags
    assert {name for name, _ in page.attributes} <= {name for name, _ in plain.attributes}
    # title, summary; leaf: path, dtype, cause, evidence; a verdict; ladder: dtype, path, note; intermediate: name,
    # agreement, cause; cost, note, setting and its value
    assert page.text.count(NASTY) == 17
    assert NASTY in Page(audit.audit_tables(report)).text


def test_a_page_fetches_nothing_and_runs_nothing(full_page):
    loads = {"src", "href", "srcset", "action", "data", "poster", "background"}
    assert [name for name, _ in Page(full_page).attributes if name in loads] == ["src"], (
        "one picture, and it is embedded"
    )
    assert pixels(embedded(full_page)).ndim == 3
    rest = full_page.replace(base64.b64encode(embedded(full_page)).decode(), "")
    assert not re.search(r"https?:|//|url\(|@import|javascript|<script|<link|\son\w+=", rest)
    assert '<meta charset="utf-8">' in full_page and "color-scheme: light dark" in full_page


def test_a_notebook_shows_a_fragment_with_folded_evidence_and_no_page_around_it():
    fragment = FULL._repr_html_()
    tags = Page(fragment).tags
    assert not {"html", "head", "body", "img", "script"} & set(tags)
    assert tags.count("details") == 3, "all but the row of which nothing is known"
    styled = re.findall(r"^\s*([^{}@\n]+)\{", audit.STYLE, re.MULTILINE)
    assert styled and all(".fnet-audit" in rule for rule in styled), "the notebook's own tables keep their style"


def test_the_written_page_is_utf8(tmp_path):
    Report((leaf("σ/w"),)).to_html(tmp_path / "audit.html")
    assert "σ/w" in (tmp_path / "audit.html").read_bytes().decode("utf-8")


def test_heat_maps_share_one_scale_on_which_exact_rounding_fault_and_not_finite_differ():
    _, heat = panels(Report((leaf("w", "wrong", errors=np.array([[0.0, 1e-16, 0.5, np.nan, np.inf]])), leaf("b"))))
    assert len(heat) == 2
    first, second = (ax.get_images()[0] for ax in heat)
    assert first.norm is second.norm and first.norm.vmin == 1e-17 and first.norm.vmax == 1
    zero, rounding, fault, nan, inf = first.to_rgba(first.get_array())[0]
    assert zero.tolist() == [1, 1, 1, 1] and nan.tolist() == inf.tolist()
    colours = np.stack([zero, rounding, fault, nan])
    distance = np.abs(colours[:, None] - colours[None]).sum(-1)[np.triu_indices(4, 1)]
    assert distance.min() > 0.15


def test_wrong_leaves_are_framed_and_drawn_in_a_style_of_their_own():
    report = Report((leaf("right"), leaf("faulty", "wrong")))
    curves, (right, faulty) = panels(report)
    assert "wrong" in faulty.get_title() and "faulty" in faulty.get_title()
    assert faulty.spines["left"].get_linewidth() > 2 * right.spines["left"].get_linewidth()
    lines = {line.get_label(): line for line in curves["|f(t) − f(0) − t · slope|"].get_lines()}
    good, bad = lines["ok: right, order 2.0"], lines["wrong: faulty, order 1.0"]
    assert bad.get_color() != good.get_color() and bad.get_marker() != "None" and good.get_marker() == "None"
    (same,) = [line for line in curves["relative error"].get_lines() if line.get_label() == "wrong: faulty"]
    assert same.get_color() == bad.get_color(), "one leaf, one colour in all panels"


def test_reference_lines_have_the_slopes_that_they_name():
    ax = panels(Report((leaf("w"), leaf("v", "wrong"))))[0]["|f(t) − f(0) − t · slope|"]
    lines = {line.get_label(): line for line in ax.get_lines()}
    for order in (1, 2):
        (t0, t1), (r0, r1) = (np.log(np.asarray(values)) for values in lines[f"order {order}"].get_data())
        np.testing.assert_allclose((r1 - r0) / (t1 - t0), order, rtol=1e-9)


def test_the_ladder_shows_each_error_beside_autodiffs_and_what_is_not_finite_above_all():
    rungs = (Rung("float32", 2e-7, 3e-7), Rung("bfloat16", np.nan, 4e-3))
    ax = panels(Report((leaf("w", ladder=rungs, relative=5e-16),)))[0]["relative error"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["float64", "float32", "bfloat16"]
    claimed, autodiff = ax.get_lines()[:2]
    *finite, last = np.asarray(claimed.get_ydata())
    np.testing.assert_allclose(finite, [5e-16, 2e-7])
    assert 1 < last < ax.get_ylim()[1]
    np.testing.assert_allclose(np.asarray(autodiff.get_ydata()), [3e-7, 4e-3])


def test_of_many_leaves_the_worst_are_drawn_and_the_picture_says_so():
    rows = [leaf(f"fine_{i}", relative=1e-16 * i) for i in range(30)]
    rows[4:4] = [leaf("faulty", "wrong"), bare("shapeless"), leaf("doubtful", "unverified")]
    figure = audit.draw(Report(tuple(rows)))
    titles = [ax.get_title().splitlines()[0] for ax in figure.axes if ax.get_title() and not ax.get_ylabel()]
    assert titles == ["faulty", "shapeless", "doubtful", *(f"fine_{i}" for i in range(9, 30))]
    assert any("the 24 worst of 33 leaves" in part.get_suptitle() for part in figure.subfigs)
    legend = panels(Report(tuple(rows)))[0]["relative error"].get_legend()
    assert len(legend.get_texts()) <= 12 and "more leaves" in legend.get_title().get_text()


def test_panels_without_data_are_left_out():
    curves, heat = panels(Report((leaf("w", taylor=()),)))
    assert list(curves) == ["relative error"] and len(heat) == 1
    curves, heat = panels(Report((leaf("w", ladder=(), errors=None),)))
    assert list(curves) == ["|f(t) − f(0) − t · slope|"] and not heat


def test_a_real_audit_is_written_as_a_page_that_names_the_fault(tmp_path):
    w, x = jnp.array([[0.3, -0.2], [0.1, 0.4]]), jnp.array([[1.0, 2.0], [0.5, -1.0]])
    report = fnet.check_gradients(
        lambda w: jnp.tanh(x @ w).sum(),
        w,
        gradient=lambda w: x.T @ (1 - jnp.tanh(x @ w) ** 2) / 2,
        precisions=(),
        cost=False,
    )
    report.to_html(tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert f"<title>Gradient audit: wrong at {report.first_wrong}</title>" in page
    assert "The gradient is wrong." in page and report.leaves[0].cause in Page(page).text
    assert pixels(embedded(page)).std() > 0


def test_a_phone_shows_wrong_rows_first():
    html = audit.audit_tables(FULL)
    rows = re.findall(r"<tr( class=\"\w+\")?><td[^>]*>.*?<span class=\"pill\"[^>]*>(\w+)</span>", html)
    looks = {verdict: look for look, verdict in rows}
    assert looks["wrong"] == ' class="wrong"' and looks["ok"] == ""
    narrow = html.split("@media")[1]
    assert "tr.wrong { order: -2; }" in narrow and "flex-direction: column" in narrow


def test_on_a_phone_values_stand_beside_their_labels_and_the_picture_keeps_its_size(browser, tmp_path):
    FULL.to_html(tmp_path / "audit.html")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((tmp_path / "audit.html").as_uri())
    heights = page.evaluate(
        "[...document.querySelectorAll('td[data-label=value], td[data-label=error]')].map(x => x.clientHeight)"
    )
    assert len(heights) > 5 and max(heights) < 30  # one line
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('img').clientWidth") > 800
    page.close()
