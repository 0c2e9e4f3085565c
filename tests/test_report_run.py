"""The page of a run: what it shows is what the folder holds, whatever state that is in, and nothing in it runs."""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import os
import re
import select
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fnet
import fnet.__main__
from fnet.metrics import accuracy, confusion, gradient_norms
from fnet.report import save_audit, save_evaluation, write_comparison, write_report
from fnet.report.__main__ import main
from fnet.report.charts import HEIGHT, line_chart, png
from fnet.report.panels import Line, Panel, panels_of
from fnet.runs.history import History
from fnet.runs.run import RunError
from tests import test_report_audit
from tests.test_report_audit import FULL

HOSTILE = "<script>console.error('ran')</script> & \"quotes\" 'too' </style>"
SECTIONS = [
    "Curves",
    "Gradient norms by layer",
    "Numbers",
    "Confusion matrix",
    "Worst examples",
    "Gradient audit",
    "Time and memory",
    "Configuration",
    "Environment",
]


class Page(test_report_audit.Page):
    """A page that may hold places to break a line."""

    def handle_starttag(self, tag, attrs):
        if tag != "wbr":
            super().handle_starttag(tag, attrs)


def folder_of(path, rows=(), **files):
    """A run's folder by hand: rows of the metrics, and JSON files by name; text is written as it is."""
    path.mkdir(parents=True, exist_ok=True)
    for name, value in {"config": {}, **files}.items():
        (path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def epoch(number, per_epoch=10, **metrics):
    return {"kind": "epoch", "step": number * per_epoch, "epoch": number, **metrics}


def evaluation(step, **metrics):
    return {"kind": "evaluation", "step": step, "epoch": 0, **metrics}


def page_of(folder):
    text = write_report(folder).read_text()
    return Page(text), text


def section(text, title):
    """The HTML of one section."""
    return re.search(rf"<h2 [^>]*>{title}</h2>(.*?)</section>", text, re.DOTALL)[1]


def hovers(html):
    """The numbers of a chart by curve: (x, value) as they are shown, and the height where they stand."""
    found = {}
    for height, name, y, x in re.findall(r'cy="([\d.]+)" r="7"[^>]*><title>([^<]*): (\S+) at \w+ (\S+)</title>', html):
        found.setdefault(name, []).append((float(x), float(y), float(height)))
    return {name: np.asarray(rows) for name, rows in found.items()}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run on digits with gradient norms, accuracy and two validation sets, its evaluation and an audit."""
    digits = fnet.data.take(fnet.data.sklearn_digits(), np.arange(120))
    model, optimizer, folder = fnet.mlp(8, 10), fnet.adam(0.01), tmp_path_factory.mktemp("runs") / "digits"
    params, state = fnet.init(model, jax.random.key(0), digits.inputs[:1])
    gradient = fnet.backprop(model, fnet.softmax_cross_entropy, {"accuracy": accuracy})
    step = fnet.make_step(gradient, optimizer, {"gradient_norm": gradient_norms})
    evaluate = fnet.make_evaluate(model, fnet.softmax_cross_entropy, {"accuracy": accuracy, "confusion": confusion(10)})
    ts, history = fnet.fit(
        step,
        fnet.init_train_state(params, optimizer, jax.random.key(1), state),
        fnet.data.take(digits, np.arange(80)),
        epochs=3,
        batch_size=16,
        evaluate=evaluate,
        validation={
            name: fnet.data.take(digits, rows) for name, rows in (("seen", np.r_[:40]), ("new", np.r_[80:120]))
        },
        evaluate_every=(4, "steps"),
        run=fnet.Run(folder, {"hidden": [8], "note": HOSTILE}),
    )
    held = fnet.data.take(digits, np.arange(80, 120))
    outputs = fnet.apply(model, ts.params, ts.state, held.inputs)
    save_evaluation(folder, outputs, held, images=(8, 8))
    save_audit(folder, FULL)
    return folder, history, np.asarray(outputs, np.float64), held


# ---- the page of a run


def test_the_page_of_a_run_has_everything_that_its_folder_holds(real):
    folder, history, _, _ = real
    page, text = page_of(folder)
    assert [title for title in SECTIONS if section(text, title)] == SECTIONS
    assert "Ended at step 15." in page.text
    curves = hovers(section(text, "Curves"))
    assert set(curves) == {"training", "seen", "new"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = sorted((x, y) for x, y, _ in curves["new"])
    for name in ("new_loss", "new_accuracy"):
        for row in rows:
            if row["kind"] == "evaluation":
                assert (row["step"], float(f"{row[name]:.6g}")) in shown
    assert set(hovers(section(text, "Gradient norms by layer"))) == {"all", "dense_0", "dense_1"}
    best = int(np.argmin(history.evaluations["new_loss"]))
    numbers = [
        history.evaluations["new_loss"][0],
        history.evaluations["new_loss"][best],
        history.evaluations["new_loss"][-1],
    ]
    first, least, last = (f"{value:.5g}" for value in numbers)
    cells = "".join(f"<td>{x}</td>" for x in (first, least, f"step {history.evaluations['step'][best]}", last))
    assert f"<code>new_<wbr>loss</code></td>{cells}" in section(text, "Numbers")
    assert section(text, "Worst examples").count("data:image/png;base64,") == 12
    audited = section(text, "Gradient audit")
    assert all(leaf.path in re.sub("<[^>]*>", "", audited) for leaf in FULL.leaves) and "hidden" in audited
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["jax"] in section(text, "Environment") and environment["platform"] in page.text
    assert HOSTILE in page.words


def test_a_page_needs_no_other_file_and_nothing_in_it_runs(real):
    page, text = page_of(real[0])
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "url(" not in text and "@import" not in text
    assert [value for name, value in page.attributes if name == "content" and "default-src 'none'" in value]
    anchors = {value for name, value in page.attributes if name == "id"}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors


def test_whatever_a_folder_holds_is_text(tmp_path):
    rows = [epoch(i, **{HOSTILE: i / 3, f"{HOSTILE}/a": 1.0, f"gradient_norm/{HOSTILE}": 0.5}) for i in (1, 2)]
    folder = folder_of(
        tmp_path / f"run {HOSTILE.replace('/', '')}",
        [*rows, evaluation(20, **{f"validation_{HOSTILE}": 0.5, "validation_loss": 1.0})],
        config={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}, "half of a pair": "\ud800"},
        environment={HOSTILE: {}},
        summary={HOSTILE: HOSTILE, "steps": 20},
        nonfinite={"step": HOSTILE, "stage": HOSTILE, "layer": HOSTILE},
        audit={"ok": False, "first_wrong": HOSTILE, "leaves": [dict.fromkeys(("path", "verdict", "cause"), HOSTILE)]},
    )
    save_evaluation(folder, np.eye(3), (np.zeros((3, 2)), np.arange(3)), names=[HOSTILE, "b", "c"])
    for page in (page_of(folder)[0], Page(write_comparison([folder, folder], tmp_path / "c.html").read_text())):
        assert not {"script", "b", "i"} & set(page.tags)
        assert HOSTILE in page.words


def test_points_stand_where_their_numbers_are():
    x, losses, rates = np.arange(1, 9), np.geomspace(1e-3, 2.0, 8)[::-1], np.linspace(-1.0, 3.0, 8)
    for values, scale in ((losses, np.log10), (rates, lambda v: v)):
        html = line_chart(Panel("p", "step", [Line("a", x, values), Line("b", x, values[::-1])]))
        assert ("(logarithmic)" in html) == (scale is np.log10)
        found = hovers(html)
        np.testing.assert_allclose(found["a"][:, 1], values, rtol=1e-5)
        np.testing.assert_array_equal(found["a"][:, 0], x)
        points = np.concatenate([found["a"], found["b"]])
        line = np.polyfit(scale(points[:, 1]), points[:, 2], 1)
        np.testing.assert_allclose(np.polyval(line, scale(points[:, 1])), points[:, 2], atol=0.06)  # tenths are written
        assert line[0] < 0 and points[:, 2].min() >= 0 and points[:, 2].max() <= HEIGHT
        ticks = re.findall(r'y="([\d.]+)" text-anchor="end"[^>]*>([^<]*)</text>', html)
        assert len(ticks) >= 3
        for height, label in ticks:
            np.testing.assert_allclose(np.polyval(line, scale(float(label))), float(height) - 4, atol=0.2)


def test_a_curve_is_interrupted_where_it_is_not_finite_and_its_name_counts_that():
    html = line_chart(Panel("p", "step", [Line("a", np.arange(6), np.array([1, 2, np.nan, 4, np.inf, 6.0]))]))
    (path,) = re.findall(r'<path d="(M[^"]*)" stroke="#[^>]*fill="none"', html)
    assert [path.count(letter) for letter in "ML"] == [3, 1]
    assert "a (2 of 6 not finite)" in html and len(hovers(html)["a"]) == 4


def test_of_a_long_curve_no_peak_is_lost():
    values = np.zeros(50_000)
    values[31_234], values[44_444] = 7.0, -3.0
    html = line_chart(Panel("p", "step", [Line("a", np.arange(50_000), values)]))
    assert len(html) < 60_000
    heights = [
        float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search(r'<path d="(M[^"]*)" stroke="#', html)[1])
    ]
    assert sorted(set(heights)) == sorted({min(heights), max(heights), heights[0]}) and len(set(heights)) == 3


@pytest.mark.parametrize("values", [[0.0], [5.0] * 3, [1e-300, -1e-300], [1e308, -1e308], [np.nan], [1e16, 1e16 + 2],
                                    [5e-324, 1e-310], [5e-324, 1.0], [1e-299, 1e299]])  # fmt: skip
def test_an_odd_curve_is_drawn(values):
    html = line_chart(Panel("p", "step", [Line("a", np.arange(len(values)), np.asarray(values))]))
    Page(html)
    assert "nan" not in re.sub(r"<title>.*?</title>", "", html) and "inf" not in html
    assert not values[0] or len(re.findall('text-anchor="end"', html)) >= 3 or values == [np.nan], (
        "heights have numbers"
    )


def test_each_set_stands_in_the_panel_of_its_metric():
    x = np.arange(2)
    trained = {name: (x, np.ones(2)) for name in ("accuracy", "learning_rate", "loss", "gradient_norm/all")}
    trained |= {f"gradient_norm/dense_{i}": (x, np.ones(2)) for i in (10, 9)}
    names = [
        "test_loss",
        "test_accuracy",
        "test_noisy_loss",
        "test_noisy_accuracy",
        "test_top_5_accuracy",
        "test_share",
    ]
    evaluated = {name: (x, np.ones((2, 3)) if name == "test_share" else np.ones(2)) for name in names}
    panels = {panel.title: [line.name for line in panel.lines] for panel in panels_of(trained, evaluated, "step")}
    assert panels == {
        "loss": ["training", "test", "test noisy"],
        "accuracy": ["training", "test", "test noisy"],
        "gradient_norm": ["all", "dense_9", "dense_10"],
        "learning_rate": ["training"],
        "share": ["test 0", "test 1", "test 2"],
        "top_5_accuracy": ["test"],
    }


def test_what_stands_before_the_longest_training_metric_is_the_set(tmp_path):
    trained = {name: np.ones(2) for name in ("loss", "aux_loss")}
    evaluated = {name: np.ones(2) for name in ("validation_loss", "validation_aux_loss", "validation_accuracy")}
    expected = {"loss": ["training", "validation"], "aux_loss": ["training", "validation"], "accuracy": ["validation"]}
    at = lambda metrics: {name: (np.arange(2), values) for name, values in metrics.items()}  # noqa: E731
    panels = panels_of(at(trained), at(evaluated), "step")
    assert {panel.title: [line.name for line in panel.lines] for panel in panels} == expected
    history = History({"epoch": np.arange(2), **trained}, {}, {"step": np.arange(2), **evaluated}, 1.0, 2.0)
    shown = re.findall(r"<figcaption>(.*?)</figcaption>.*?</svg> (\w+)</li>", history._repr_html_())
    assert sorted(shown) == sorted((title.replace("_", " "), name) for title in expected for name in expected[title])


def test_names_with_digits_of_any_script_are_sorted():
    names = [
        "gradient_norm/w1²",
        "gradient_norm/²",
        "gradient_norm/w٣",
        "gradient_norm/w" + 5000 * "7",
        "gradient_norm/w10",
    ]
    series = {name: (np.arange(2), np.ones(2)) for name in (*names, "gradient_norm/w9")}
    (panel,) = panels_of(series, {}, "step")
    lines = [line.name for line in panel.lines]
    assert len(lines) == 6 and lines.index("w9") < lines.index("w10")


@pytest.mark.parametrize("step", [6_000_018, 2**53 - 1])
def test_a_step_is_written_with_all_its_digits(tmp_path, step):
    rows = [epoch(1, loss=0.75), evaluation(step, validation_loss=0.5)]
    folder = folder_of(tmp_path / "a", rows)
    _, text = page_of(folder)
    assert hovers(section(text, "Curves"))["validation"][0, 0] == step
    assert f"<td>step {step}</td>" in section(text, "Numbers")
    assert f"at step {step}</small>" in write_comparison([folder, folder], tmp_path / "c.html").read_text()
    ticks = re.findall(r'text-anchor="middle"[^>]*>(\d+)</text>', text)
    assert len(ticks) >= 2 and not re.search(r'text-anchor="middle"[^>]*>[\d.]+e', text)


# ---- folders that are not whole


def test_the_page_links_the_explorer_that_lies_in_the_folder_from_wherever_it_stands_itself(tmp_path):
    folder = folder_of(tmp_path / "a run", [epoch(1, loss=1.0)])
    assert "explorer.html" not in write_report(folder).read_text()
    (folder / "explorer.html").write_text("")
    assert '<a href="explorer.html">' in write_report(folder).read_text()
    assert '<a href="a%20run/explorer.html">' in write_report(folder, tmp_path / "page.html").read_text()


def test_sections_without_data_are_left_out_and_named_at_the_end(tmp_path):
    page, text = page_of(folder_of(tmp_path / "a"))
    assert "Has not ended" in page.text and "before the first row of metrics" in page.text
    headings = re.findall(r"<h2 [^>]*>([^<]*)</h2>", text)
    assert headings == ["Curves", "Not in this folder"]
    absent = re.findall(r"<li>([^:<]*):", section(text, "Not in this folder"))
    assert absent == [title for title in SECTIONS if title not in ("Curves", "Numbers", "Environment")]


def test_what_is_constant_is_a_number_and_no_chart_but_for_a_loss(tmp_path):
    rows = [epoch(k, loss=0.5, learning_rate=1e-3, momentum=0.1 * k, **{"norm/a": 2.0}) for k in (1, 2)]
    _, text = page_of(folder_of(tmp_path / "a", rows))
    assert re.findall("<figcaption>([^<]*)<", section(text, "Curves")) == ["loss", "momentum", "norm"]
    assert "<td>0.001</td>" in section(text, "Numbers")


def test_the_title_names_the_experiment_and_the_day(tmp_path):
    alone = folder_of(tmp_path / "runs" / "a", [epoch(1, loss=1.0)])
    within = folder_of(tmp_path / "runs" / "digits" / "b" / "backprop", [epoch(1, loss=1.0)])
    (within.parent / "config.json").write_text("{}")
    for folder, title in ((alone, "Run a, 2001-09-09"), (within, "digits: b/backprop, 2001-09-09")):
        os.utime(folder / "metrics.jsonl", (1e9, 1e9))
        text = page_of(folder)[1]
        assert f"<title>{title}</title>" in text and f"<h1>{title}</h1>" in text


def test_few_epochs_have_a_tick_each_and_logarithmic_ticks_leave_none_out():
    def ticks(x, y):
        html = line_chart(Panel("p", "step", [Line("a", np.asarray(x), np.asarray(y))]))
        return [re.findall(rf'text-anchor="{side}"[^>]*>([^<]*)<', html) for side in ("middle", "end")]

    assert ticks([125, 250, 375], [1.0, 2.0, 3.0])[0] == ["125", "250", "375", "step"]
    factors = []
    for decades in np.linspace(1.4, 5, 10):
        values = np.asarray(ticks([1, 2], [1.0, 10**decades])[1], float)
        factors.append(tuple(np.round(values[1:] / values[:-1], 6)))
    assert all({*each} <= {2, 2.5} or {*each} == {10} for each in factors) and all(map(len, factors))


def test_the_page_says_what_was_evaluated(tmp_path):
    folder = folder_of(tmp_path / "a", [epoch(1, loss=1.0)])
    batch = (np.zeros((3, 2)), np.asarray([0, 1, 1]))
    save_evaluation(folder, np.eye(2)[[0, 1, 0]], batch, of="the <test> set")
    _, text = page_of(folder)
    for title in ("Confusion matrix", "Worst examples"):
        assert "<p>On the &lt;test&gt; set, 3 examples.</p>" in section(text, title)
    save_evaluation(folder, np.eye(2)[[0, 1, 0]], batch)
    assert "<p>On 3 examples.</p>" in section(page_of(folder)[1], "Worst examples")


def test_an_experiment_of_one_program_has_a_page_of_its_numbers_pictures_and_files(tmp_path, capsys):
    folder = tmp_path / "sweep" / "a b"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"rates": [0.1, 0.2], "name": HOSTILE}))
    os.utime(folder / "config.json", (1e9, 1e9))
    with pytest.raises(RunError, match="expected the folder of a run"):
        write_report(folder)
    results = {"loss": 0.123456789, "curve": list(range(20)), "rows": [{"x": [1, [2.5]]}, 3], "none": [], HOSTILE: True}
    (folder / "results.json").write_text(json.dumps(results))
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    (folder / "heat_map.png").write_bytes(png(pixels))
    (folder / "members <1>.csv").write_text("a\n")
    main([str(folder)])
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    text = write_report(folder).read_text()  # over itself, and it does not list itself
    page = Page(text)
    assert re.findall(r"<h2 [^>]*>([^<]*)</h2>", text) == ["Numbers", "Pictures", "Files", "Configuration"]
    assert "<h1>sweep: a b, 2001-09-09</h1>" in text and HOSTILE not in text
    shown = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", section(text, "Numbers")))
    assert list(shown.values()) == ["0.123457", "0 … 19 (20)", "1, [2.5]", "3", "none", "true"]
    data = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert [base64.b64decode(one) for one in data] == [png(pixels)]
    assert re.findall('href="([^#"]*)"', text) == ["members%20%3C1%3E.csv"] and "rates" in page.text
    (folder / "results.json").write_text("{")
    assert "results.json is damaged" in write_report(folder).read_text()


@pytest.mark.parametrize("left", [1, 7, 20, 30])
def test_the_page_of_a_killed_run_shows_what_it_wrote(tmp_path, left):
    folder = folder_of(tmp_path / "a", [epoch(1, loss=0.75), epoch(2, loss=0.5)])
    (folder / "checkpoints" / "step_000000010").mkdir(parents=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(epoch(3, loss=0.25))[:left])
    page, text = page_of(folder)
    assert "Has not ended (no summary.json)" in page.text and "Last seen at step 20, written " in page.text
    assert "The last checkpoint is of step 10." in page.text
    assert "metrics.jsonl: the last line is cut off" in page.text
    np.testing.assert_array_equal(hovers(section(text, "Curves"))["training"][:, :2], [[10, 0.75], [20, 0.5]])


def test_a_line_that_is_no_row_is_named_by_its_number(tmp_path):
    folder = folder_of(tmp_path / "a", [epoch(1, loss=0.75), {"kind": "epoch"}, epoch(3, loss=0.25), ["no row"]])
    page, text = page_of(folder)
    assert "metrics.jsonl: line 2 of 4 is no row of metrics, nor are 1 others; left out." in page.text
    assert "cut off" not in page.text
    assert hovers(section(text, "Curves"))["training"][:, 0].tolist() == [10, 30]
    (folder / "metrics.jsonl").write_bytes(bytes(range(256)) * 20)
    notes = re.findall(r'class="warning">(.*?)</li>', page_of(folder)[1])
    assert len(notes) == 2 and "line 1 of " in notes[1], "of many lines there is one note"


@pytest.mark.parametrize("value", ["oops", [1.0, 2.0], [1, [2]], {"a": 1}, 10**400])
def test_a_value_that_is_not_like_the_others_is_named_and_they_are_shown(tmp_path, value):
    rows = [epoch(i, loss=value if i == 4 else 1 / i) for i in range(1, 10)]
    page, text = page_of(folder_of(tmp_path / "a", rows))
    written = json.dumps(value)
    shown = written if len(written) <= 30 else written[:29] + "…"
    note = "metrics.jsonl: left out, as no number or not of the shape of the metric's others: loss ="
    assert f"{note} {shown} at step 40." in page.text
    steps = hovers(section(text, "Curves"))["training"][:, 0].tolist()
    assert steps == [10, 20, 30, 50, 60, 70, 80, 90]


def test_of_many_such_values_some_are_named_in_one_note(tmp_path):
    rows = [epoch(i, loss=1 / i, other="text") for i in range(1, 10)]
    page, text = page_of(folder_of(tmp_path / "a", [*rows, evaluation(90, other="text")]))
    assert 'other = "text" at step 40 and 5 more.' in page.text and text.count('class="warning"') == 1
    assert "training" in section(text, "Curves")


def test_numbers_that_no_float_holds_stop_no_page(tmp_path):
    huge = "9" * 400
    summary = f'{{"steps": {huge}, "run_seconds": {huge}, "examples": {huge}, "state_bytes": {huge}}}'
    audit = f'{{"leaves": [{{"path": "w", "order": {huge}, "relative": {huge}}}]}}'
    page, _ = page_of(folder_of(tmp_path / "a", [epoch(1, loss=0.5)], summary=summary, audit=audit))
    assert page.words.count(huge) >= 3 and "inf" in page.words
    examples = f'{{"run_seconds": 1.0, "examples": {huge}}}'
    page, _ = page_of(folder_of(tmp_path / "b", [epoch(1, loss=0.5)], summary=examples))
    assert huge in page.words


def test_what_is_nested_too_deeply_is_named(tmp_path):
    for depth in (150, 900, 100_000):
        folder = folder_of(tmp_path / "a", [epoch(1, loss=0.5)], config='{"a":' * depth + "1" + "}" * depth)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 20, "loss": ' + "[" * depth + "]" * depth + "}\n")
        page, text = page_of(folder)
        assert "config.json is damaged" in page.text and "line 2 of 2 is no row of metrics" in page.text
        assert hovers(section(text, "Curves"))["training"][:, 0].tolist() == [10]


def test_a_run_that_was_continued_after_its_end_is_not_called_ended(tmp_path):
    rows = [epoch(i, loss=1 / i) for i in (1, 2, 3)]
    for steps, words in ((30, "Ended at step 30."), (20, "Continued after it had ended at step 20")):
        page, _ = page_of(folder_of(tmp_path / "a", rows, summary={"steps": steps}))
        assert words in page.text


def test_a_run_that_stopped_being_finite_says_where(tmp_path):
    found = {"step": 17, "stage": "backward", "layer": "dense_1", "operation": "log gives -inf", "examples": [3, 1]}
    page, text = page_of(folder_of(tmp_path / "a", [epoch(1, loss=0.5)], nonfinite={**found, "loss": float("nan")}))
    assert "Not finite at step 17, backward of dense_1." in page.text
    assert all(words in section(text, "Not finite") for words in ("log gives -inf", "[3, 1]", "NaN"))


ARRAYS = {"confusion": np.eye(3), "index": [0], "target": [1], "prediction": [0], "loss": [1.0]}
WRONG = {
    "another class": {"target": [7]},
    "targets that are no integers": {"target": [0.5]},
    "a number for a matrix": {"confusion": 3.0},
    "a complex matrix": {"confusion": np.eye(3) * 1j},
    "no pixels": {"pictures": np.zeros((1, 0, 0), np.uint8)},
}


@pytest.mark.parametrize("name", ["config", "environment", "summary", "nonfinite", "audit", "evaluation", *WRONG])
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path, name):
    folder = folder_of(tmp_path / "a", [epoch(1, loss=0.5)], environment={"jax": "1.2.3"}, summary={"steps": 10})
    save_evaluation(folder, np.eye(3), (np.zeros((3, 2)), np.arange(3)))
    if name in WRONG:
        np.savez(folder / "evaluation.npz", **ARRAYS | WRONG[name])
        name = "evaluation"
    elif name == "evaluation":
        data = (folder / "evaluation.npz").read_bytes()
        (folder / "evaluation.npz").write_bytes(data[: len(data) // 2])
    else:
        (folder / f"{name}.json").write_text('{"cut')
    page, text = page_of(folder)
    assert re.search(rf"{name}\.\w+ (is damaged|cannot be read)", page.text)
    assert "training" in section(text, "Curves")
    assert name == "environment" or "1.2.3" in section(text, "Environment")


def test_the_arrays_that_the_damaged_ones_differ_from_are_shown(tmp_path):
    folder = folder_of(tmp_path / "a")
    np.savez(folder / "evaluation.npz", **ARRAYS, pictures=np.zeros((1, 2, 2), np.uint8))
    page, text = page_of(folder)
    assert "cannot be read" not in page.text and "<img" in section(text, "Worst examples")


def test_an_array_that_would_run_code_is_not_read(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    folder = folder_of(tmp_path / "a")
    np.savez(folder / "evaluation.npz", confusion=np.asarray([Harm()], dtype=object), index=[0])
    page, _ = page_of(folder)
    assert "evaluation.npz cannot be read" in page.text and not (tmp_path / "harm").exists()


KEYS = ["kind", "step", "epoch", "loss", "validation_loss", "validation_confusion"]
KEYS = st.sampled_from([*KEYS, "steps", "examples", "run_seconds", "ok", "leaves", "path", "order", "a_bytes"])
PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
ANY = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
ROWS = st.dictionaries(KEYS, ANY, max_size=5).flatmap(
    lambda row: st.sampled_from([row, {**row, "step": 3, "kind": "evaluation"}, {**row, "step": 4, "kind": "epoch"}])
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, max_size=4), files=st.dictionaries(KEYS, ANY, max_size=6), name=st.text(max_size=3))
def test_no_content_of_a_folder_stops_the_page(tmp_path, rows, files, name):
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    names = ("config", "environment", "summary", "nonfinite", "audit")
    folder = folder_of(tmp_path / "a", rows, **{file: {**files, name: 1} for file in names})
    page_of(folder)
    Page(write_comparison([folder, folder], tmp_path / "c.html").read_text())


def test_a_page_that_is_not_fnets_is_left_as_it_is(tmp_path):
    folder = folder_of(tmp_path / "a")
    (folder / "report.html").write_text("<p>by hand</p>")
    with pytest.raises(
        FileExistsError, match=r"report.html is not a page of fnet's and is left as it is; name another"
    ):
        write_report(folder)
    assert (folder / "report.html").read_text() == "<p>by hand</p>"
    (folder / "report.html").unlink()
    write_report(folder)
    folder_of(folder, [epoch(1, loss=0.5)])
    assert "training" in write_report(folder).read_text(), "its own page is written anew"


# ---- the evaluation


def test_confusion_and_worst_examples_are_those_of_the_logits(real):
    folder, _, outputs, held = real
    targets = np.asarray(held.targets)
    counts, losses = np.zeros((10, 10)), []
    for z, y in zip(outputs, targets, strict=True):
        counts[y, max(range(10), key=lambda k: z[k])] += 1
        losses.append(-np.log(np.exp(z[y]) / sum(np.exp(z))))
    order = sorted(range(len(losses)), key=lambda i: -losses[i])[:12]
    with np.load(folder / "evaluation.npz") as stored:
        np.testing.assert_array_equal(stored["confusion"], counts)
        assert stored["index"].tolist() == order
        assert stored["target"].tolist() == targets[order].tolist()
        np.testing.assert_allclose(stored["loss"], np.asarray(losses)[order], rtol=1e-12)
        pictures = stored["pictures"]
    pixels = np.asarray(held.inputs)[order].reshape(-1, 8, 8)
    np.testing.assert_array_equal(pictures, np.round(255 * pixels))  # they go from 0 to 1 in the data
    text = section(write_report(folder).read_text(), "Worst examples")
    images = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    for image, expected in zip(images, pictures, strict=True):
        (folder / "p.png").write_bytes(base64.b64decode(image))
        shown = matplotlib.image.imread(folder / "p.png")
        np.testing.assert_allclose(shown, expected / 255, atol=1e-6)
    assert re.findall(r"example (\d+)<", text) == [str(i) for i in order]
    right = np.trace(counts)
    assert f"Accuracy {right / 40:.4f}, {right:.0f} of 40." in section(
        write_report(folder).read_text(), "Confusion matrix"
    )


def test_nan_logits_are_the_worst_and_predict_nothing_and_weight_0_counts_nothing(tmp_path):
    folder = folder_of(tmp_path / "a")
    logits = np.array([[2.0, 0.0], [np.nan, 0.0], [-3.0, 0.0], [0.0, 5.0], [np.inf, 0.0]])
    batch = fnet.Batch(np.zeros((5, 3)), np.array([0, 1, 0, 1, 1]), np.array([1.0, 1.0, 2.0, 0.0, 1.0]))
    with np.load(save_evaluation(folder, logits, batch)) as stored:
        assert stored["confusion"].tolist() == [[1.0, 2.0], [1.0, 0.0]]
        assert stored["index"].tolist() == [1, 4, 2, 0] and stored["prediction"].tolist() == [-1, 0, 1, 0]
        assert "pictures" not in stored.files
    assert "<td>1</td><td>1</td><td>nothing</td><td>nan</td>" in page_of(folder)[1]


def test_the_shape_of_pictures_may_be_a_list(tmp_path):
    folder = folder_of(tmp_path / "a")
    for shape in ([2, 3], [2, 3, 1], (2, 3, 1)):
        with np.load(save_evaluation(folder, np.eye(4), (np.eye(4, 6), np.arange(4)), images=shape)) as stored:
            assert stored["pictures"].shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 7), float), ((5, 7, 1), float), ((5, 7, 3), np.uint8), ((4, 4, 4), int)]
)
def test_inputs_that_are_pictures_are_kept_and_png_holds_their_pixels(tmp_path, shape, dtype):
    folder = folder_of(tmp_path / "a")
    inputs = np.random.default_rng(0).integers(0, 256, (6, *shape)).astype(dtype)
    inputs.flat[:2] = 0, 255
    with np.load(save_evaluation(folder, np.eye(6), (inputs, np.arange(6)[::-1]))) as stored:
        pictures = stored["pictures"]
        np.testing.assert_array_equal(pictures, inputs[stored["index"]].reshape(pictures.shape))
    (folder / "p.png").write_bytes(png(pictures[0]))
    np.testing.assert_allclose(matplotlib.image.imread(folder / "p.png") * 255, pictures[0], atol=1e-4)
    with np.load(save_evaluation(folder, np.eye(6), (inputs, np.arange(6)), images=())) as stored:
        assert "pictures" not in stored.files


def test_of_many_classes_the_most_frequent_confusions_are_listed(tmp_path):
    folder, rng = folder_of(tmp_path / "a"), np.random.default_rng(0)
    targets = np.r_[np.arange(50), np.full(5, 17)]
    logits = rng.normal(size=(55, 50)) * 0.1 + 5 * np.eye(50)[np.r_[np.arange(50), np.full(5, 33)]]
    save_evaluation(folder, logits, (np.zeros((55, 1)), targets), names=[f"class {i}" for i in range(50)])
    text = section(page_of(folder)[1], "Confusion matrix")
    assert "<td>class 17</td><td>class 33</td><td>5</td><td>0.83</td>" in text
    assert text.count("<tr>") == 2, "the head and the only confusion there is"


def test_without_an_evaluation_the_last_measured_confusion_is_shown(tmp_path):
    rows = [evaluation(i, validation_confusion=(np.array([[2, 1], [0, 1]]) / 4).tolist()) for i in (5, 10)]
    text = section(page_of(folder_of(tmp_path / "a", rows))[1], "Confusion matrix")
    assert "the evaluation at step 10." in text and "Accuracy 0.7500." in text and ">0.67</td>" in text


# ---- several runs


def test_a_long_list_of_the_configuration_is_shown_by_its_first_entries(tmp_path):
    mean = [i / 7 for i in range(20)]
    folder = folder_of(tmp_path / "A", [epoch(1, loss=1.0)], config={"scales": {"mean": mean}, "hidden": [32, 16]})
    kept = (folder / "config.json").read_bytes()
    shown = section(page_of(folder)[1], "Configuration")
    first = f"[{mean[0]}, {mean[1]}, {mean[2]}, … 20 in all]"
    assert f"<dt>scales/mean</dt><dd>{first}</dd>" in shown and "<dd>[32, 16]</dd>" in shown
    assert json.loads((folder / "config.json").read_text())["scales"]["mean"] == mean
    assert (folder / "config.json").read_bytes() == kept


def test_a_comparison_shows_long_lists_whole_where_their_beginnings_are_alike(tmp_path):
    same, ends = list(range(20)), [[*range(19), last] for last in (0, 1)]
    config = [{"same": same, "ends": end, "begins": [i, *range(19)]} for i, end in enumerate(ends)]
    folders = [
        folder_of(tmp_path / name, [epoch(1, loss=1.0)], config=each) for name, each in zip("AB", config, strict=True)
    ]
    text = section(write_comparison(folders, tmp_path / "c.html").read_text(), "Configurations")
    cells = {
        name: re.findall(r"<td>([^<]*)</td>", row) for name, row in re.findall(r"<code>(\w+)</code>(.*?)</tr>", text)
    }
    assert cells["same"] == ["[0, 1, 2, … 20 in all]"] * 2
    assert cells["begins"] == ["[0, 0, 1, … 20 in all]", "[1, 0, 1, … 20 in all]"]
    assert cells["ends"] == [json.dumps(end) for end in ends]


@pytest.fixture
def pair(tmp_path):
    common = {"seed": 1, "layers": {"hidden": [8], "out": 3}}
    for name, rate, losses, per_epoch in (("A", 0.1, [1.0, 0.4, 0.6], 10), ("B", 0.2, [0.9, 0.5, 0.5], 10)):
        rows = [epoch(i + 1, per_epoch, loss=loss, accuracy=1 - loss) for i, loss in enumerate(losses)]
        folder_of(tmp_path / name, rows, config={**common, "rate": rate}, summary={"steps": 30, "parameters": 5})
    return tmp_path / "A", tmp_path / "B"


def test_a_comparison_marks_what_differs_and_the_best(pair, tmp_path):
    text = write_comparison(pair, tmp_path / "c.html").read_text()
    Page(text)
    configurations = section(text, "Configurations")
    assert "1 of 4 differ" in configurations
    marked = re.findall(r"<tr class=marked>(.*?)</tr>", configurations)
    assert (
        len(marked) == 1 and "<code>rate</code></td><td>0.1</td><td>0.2</td>" in marked[0] and ">≠</span>" in marked[0]
    )
    assert "<code>layers/<wbr>hidden</code></td><td>[8]</td><td>[8]</td>" in configurations
    numbers = re.sub(r"\s", " ", section(text, "Final and best numbers"))
    assert "<code>loss</code></td><td>final</td><td>0.6</td><td><strong>0.5 ★</strong></td>" in numbers
    best = "<td>best</td><td><strong>0.4 ★</strong> <small>at step 20</small></td><td>0.5 <small>at step 20</small>"
    assert best in numbers
    assert "<code>accuracy</code></td><td>final</td><td>0.4</td><td><strong>0.5 ★</strong></td>" in numbers
    curves = hovers(section(text, "Curves"))
    assert set(curves) == {"A, training", "B, training"}
    assert re.findall(r'stroke-width="([\d.]+)" stroke-opacity="([\d.]+)"', text) == [("5", "0.5"), ("1.8", "1")] * 2
    np.testing.assert_array_equal(curves["B, training"][:3, :2], [[10, 0.9], [20, 0.5], [30, 0.5]])


def test_runs_whose_epochs_differ_in_length_are_compared_by_epoch(pair, tmp_path):
    folder_of(pair[1], [epoch(i, 25, loss=1 / i) for i in (1, 2, 3)])
    curves = hovers(section(write_comparison(pair, tmp_path / "c.html").read_text(), "Curves"))
    assert curves["A, training"][:3, 0].tolist() == curves["B, training"][:3, 0].tolist() == [1, 2, 3]


def test_a_name_with_a_word_of_what_is_to_be_small_has_its_best_where_it_is_least(tmp_path):
    names = ("top_5_error", "f1_loss", "recall_error", "accuracy_mae", "validation_top_5_error")
    folders = [
        folder_of(
            tmp_path / run, [epoch(1, **dict.fromkeys(names, value)), epoch(2, **dict.fromkeys(names, 2 * value))]
        )
        for run, value in (("A", 0.25), ("B", 0.5))
    ]
    numbers = section(write_comparison(folders, tmp_path / "c.html").read_text(), "Final and best numbers")
    assert numbers.count("<strong>0.25 ★</strong>") == numbers.count("<td>final</td><td><strong>0.5 ★</strong>") == 5
    assert numbers.count("★") == 11, "and one that explains it"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, "x", 10**400])
def test_runs_whose_epochs_have_no_number_are_compared_by_step(tmp_path, value):
    rows = [epoch(1, loss=1.0), epoch(2, loss=0.5)]
    folders = [folder_of(tmp_path / "A", rows), folder_of(tmp_path / "B", [{**row, "epoch": value} for row in rows])]
    curves = hovers(section(write_comparison(folders, tmp_path / "c.html").read_text(), "Curves"))
    assert curves["A, training"][:, 0].tolist() == curves["B, training"][:, 0].tolist() == [10, 20]


def test_of_many_runs_each_has_a_look_of_its_own(tmp_path):
    rows = [epoch(1, loss=1.0), evaluation(10, a_loss=1.0, b_loss=1.0)]
    folders = [folder_of(tmp_path / f"{i:02}", rows) for i in range(20)]
    text = write_comparison(folders, tmp_path / "c.html").read_text()
    look = r'<svg[^>]*><path d="M0 5H26" stroke="([^"]*)" stroke-width="2.5" stroke-dasharray="([^"]*)"/></svg>'
    runs = re.findall(f"<li>{look} <strong>", text)
    lines = re.findall(f"<li>{look} \\d\\d, ", section(text, "Curves"))
    assert len(runs) == len(set(runs)) == 20 and len(lines) == len(set(lines)) == 60
    assert runs[0] == (runs[8][0], "") and runs[8][1]
    assert set(runs) <= set(lines)


def test_what_is_of_the_last_call_of_a_resumed_run_says_so(tmp_path):
    summary = {"steps": 30, "steps_of_this_call": 10, "examples": 160, "run_seconds": 2.0, "state_bytes": 4_000_000}
    _, text = page_of(folder_of(tmp_path / "a", [epoch(3, loss=0.5)], summary=summary))
    shown = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", section(text, "Time and memory")))
    of = " of the last call"
    assert shown == {
        "steps": "30",
        f"steps{of}": "10",
        f"examples{of}": "160",
        f"run time{of}": "2.00 s",
        "state memory": "4.000 MB",
        f"examples per second{of}": "80.00",
    }


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [folder_of(tmp_path / name / "run", [epoch(1, loss=0.5)]) for name in "ab"]
    page = Page(write_comparison(folders, tmp_path / "c.html").read_text())
    assert all(str(folder) in page.words for folder in folders)


def test_the_command_writes_the_page_of_one_run_or_of_several(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["A"])
    main(["A", "B"])
    main(["A", "--output", "a.html"])
    assert capsys.readouterr().out.split() == [str(Path("A") / "report.html"), "comparison.html", "a.html"]
    assert (tmp_path / "a.html").read_bytes()[:200] == (tmp_path / "A" / "report.html").read_bytes()[:200]
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not there; expected the folder of a run, which fit(run=fnet.Run(...)) makes"),
        (["A", "file"], "file is a file; expected the folder of a run"),
        (["."], ". holds A, B, file, thesis, and no config.json; expected the folder of a run, which "
         "fit(run=fnet.Run(...)) makes: name one of those within, as A"),
        (["thesis"], "thesis holds nothing, and no config.json; expected the folder of a run"),
        (["A", "--output", "file"], "file is not a page of fnet's and is left as it is; name another file"),
        (["A", "--output", "no/a.html"], "no/a.html cannot be written (No such file or directory); expected no to be a "
         "folder that can be written to: make it, or name another file"),
    ],
)  # fmt: skip
def test_the_command_refuses_what_is_no_run(pair, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_experiments_folder_is_refused_and_a_run_within_is_named(tmp_path):
    folder = tmp_path / "digits_mlp" / "first"
    run = folder_of(folder / "autodiff", [epoch(1, loss=0.5)])
    (folder / "config.json").write_text("{}")
    for path, held, missing in ((folder, "autodiff, config.json", "metrics"), (folder.parent, "first", "config")):
        with pytest.raises(RunError) as caught:
            write_report(path)
        assert str(caught.value).startswith(f"{path} holds {held}, and no {missing}.json")
        assert str(caught.value).endswith(f": name one of those within, as {run}")
        assert not (path / "report.html").exists()
    (run / "config.json").unlink()
    with pytest.raises(RunError, match=r"holds metrics.jsonl, and no config.json; expected .* makes$"):
        write_report(run)


@pytest.mark.parametrize("save", [lambda f: save_audit(f, FULL), lambda f: save_evaluation(f, np.eye(2), ([], [0, 1]))])
def test_nothing_is_saved_into_a_folder_that_is_no_runs(tmp_path, save):
    (tmp_path / "thesis.tex").write_text("dear reader")
    with pytest.raises(RunError, match=r"holds thesis.tex, and no config.json; expected the folder of a run"):
        save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ---- a history


def test_a_history_as_csv_reads_back_the_same_and_overwrites_nothing(real, tmp_path):
    history = real[1]
    path = history.to_csv(tmp_path)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert path.name == "epochs.csv" and [row["epoch"] for row in rows] == ["1", "2", "3"]
    for name, values in history.epochs.items():
        for index in np.ndindex(values.shape[1:]):
            column = [float(row["/".join([name, *map(str, index)])]) for row in rows]
            np.testing.assert_array_equal(column, values[(slice(None), *index)])
    written = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"epochs.csv exists already and is left as it is; expected a new file"):
        history.to_csv(path)
    assert path.read_bytes() == written


@pytest.mark.parametrize("at_ends", [True, False])
def test_a_history_is_plotted_by_epoch_and_its_evaluations_where_they_were(tmp_path, at_ends):
    results = {"validation_loss": np.array([0.9, 0.7, 0.8])}
    at = [10, 20, 30] if at_ends else [7, 14, 21]
    epochs = {"loss": np.array([1.0, 0.5, 0.25]), "learning_rate": np.full(3, 0.1), **(results if at_ends else {})}
    history = History({"epoch": np.arange(1, 4), **epochs}, {}, {"step": np.asarray(at), **results}, 1.0, 2.0)
    figure = history.plot(tmp_path / "p.png")
    drawn = {}
    for ax in figure.axes:
        for line in ax.get_lines():
            drawn[ax.get_title(), ax.get_xlabel(), line.get_label()] = np.asarray(line.get_xydata())
    by = "epoch" if at_ends else "step"
    expected = {("loss", "epoch", "training"), ("loss", by, "validation"), ("learning rate", "epoch", "training")}
    assert set(drawn) == expected
    np.testing.assert_array_equal(drawn["loss", "epoch", "training"], np.c_[[1, 2, 3], epochs["loss"]])
    x = [1, 2, 3] if at_ends else at
    np.testing.assert_array_equal(drawn["loss", by, "validation"], np.c_[x, results["validation_loss"]])
    assert matplotlib.image.imread(tmp_path / "p.png").std() > 0.01
    html = history._repr_html_()
    Page(html)
    np.testing.assert_array_equal(hovers(html)["validation"][:, :2], np.c_[x, results["validation_loss"]])
    cells = f"<td>0.9</td><td>0.7</td><td>{by} {x[1]}</td><td>0.8</td>"
    assert f"<code>validation_<wbr>loss</code></td>{cells}" in html


def test_a_history_without_an_epoch_is_shown():
    history = History({}, {}, {}, 0.0, 0.0)
    assert "no epoch" in history.plot().axes[0].texts[0].get_text()
    assert "No epoch" in history._repr_html_()
    head = "History: 0 epochs, 0 steps of this call, 0 evaluations; compiled in 0.00 s, run in 0.00 s"
    assert repr(history) == str(history) == head


def test_a_history_prints_in_a_few_lines_the_first_best_and_last_of_its_numbers(real):
    history = real[1]
    head, names, *rows = repr(history).splitlines()
    assert head.startswith("History: 3 epochs, 15 steps of this call, 3 evaluations; compiled in ")
    assert names.split() == ["metric", "first", "best", "at", "last"]
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    new = history.evaluations["new_loss"]
    best = [f"{new.min():.5g}", "step", str(history.evaluations["step"][new.argmin()])]
    assert cells["new_loss"] == [f"{new[0]:.5g}", *best, f"{new[-1]:.5g}"]
    assert cells["accuracy"][-1] == f"{history.epochs['accuracy'][-1]:.5g}"
    assert history[0] is history.epochs and history._replace(run_seconds=1.0).run_seconds == 1


def test_a_history_names_what_its_picture_needs_and_is_shown_without(real, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("History.plot needs matplotlib: pip install 'fnet-jax[plots]'")):
        real[1].plot()
    assert "<svg" in real[1]._repr_html_() and write_report(real[0]).exists()


# ---- python -m fnet


def test_the_command_ends_quietly_where_nobody_reads_on():
    """As behind `| head`."""
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-m", "fnet"], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_module_tells_version_devices_precision_and_cache(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "fnet"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, **cache})
    assert done.returncode == 0, done.stderr
    told = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines()[:5])
    assert told["fnet"].startswith(f"{fnet.__version__}, Python ") and f"jax {jax.__version__}" in told["fnet"]
    assert "1 x cpu (cpu)" in told["devices"] and told["64-bit numbers"].startswith("on")
    assert told["compiled programs"] == f"kept in {tmp_path}"


def test_the_extras_are_those_of_the_packages_metadata(monkeypatch):
    needed = [
        "jax>=0.10",
        'orbax-checkpoint>=0.12 ; extra == "runs"',
        "safetensors>=0.7; extra == 'runs'",
        "fnet-jax[runs,streams]; extra == 'experiments'",
        "pyright[nodejs]>=1.9; python_version > '3' and extra == 'experiments'",
        "grain; extra == 'streams'",
        "jax[tpu]; extra == 'compile-tpu'",
        "libtpu; extra == 'compile-tpu'",
        "ruff; extra == 'lint'",
        "sphinx; extra == 'docs'",
        "chex; extra == 'test'",
    ]
    installed = {"jax": "0.10.2", "orbax-checkpoint": "0.12.0rc1", "safetensors": "0.6.9", "pyright": "1.10.0"}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    monkeypatch.setattr(metadata, "version", version)
    old, missing = "safetensors 0.6.9 TOO OLD (>=0.7)", "grain not installed (any version)"
    text = "\n".join(fnet.__main__._extras())
    assert [re.sub(r"\s+", " ", part) for part in re.split(r"\n  (?=\w)", text.strip())] == [
        f"runs orbax-checkpoint 0.12.0rc1, {old} the rest: pip install 'fnet-jax[runs]'",
        f"experiments orbax-checkpoint 0.12.0rc1, {old}, {missing}, pyright 1.10.0 "
        "the rest: pip install 'fnet-jax[experiments]'",
        "streams not installed: pip install 'fnet-jax[streams]'",
        "compile-tpu not installed: pip install 'fnet-jax[compile-tpu]'",
    ]
    installed |= {"safetensors": "0.7", "grain": "1", "libtpu": "1"}
    assert "pip" not in "\n".join(fnet.__main__._extras())


def test_run_from_its_source_the_module_says_how_to_install(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert "pip install --editable '.[experiments]'" in "\n".join(fnet.__main__._extras())


# ---- in a browser


@contextlib.contextmanager
def browser(profile):
    """A function that sends a command to a headless Chromium and returns the answer; ``events`` is what it told since.

    DevTools' protocol over its pipe, file descriptors 3 and 4: JSON texts that end with a zero byte.
    """
    (its_input, commands), (answers, its_output) = os.pipe(), os.pipe()
    options = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
    options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec chromium "$@" 3<&{its_input} 4>&{its_output}', "bash", *options],
        pass_fds=(its_input, its_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_input)
    os.close(its_output)
    with open(commands, "wb", buffering=0) as write, open(answers, "rb") as read:
        buffer, events, sent = bytearray(), [], 0

        def receive():
            while b"\0" not in buffer:
                assert select.select([read], [], [], 60)[0], "the browser does not answer"
                part = os.read(read.fileno(), 1 << 20)
                assert part, "the browser has ended"
                buffer.extend(part)
            text, _, rest = bytes(buffer).partition(b"\0")
            buffer[:] = rest
            return json.loads(text)

        def send(method, session=None, **parameters):
            nonlocal sent
            sent += 1
            to = {"sessionId": session} if session else {}
            write.write(json.dumps({"id": sent, "method": method, "params": parameters, **to}).encode() + b"\0")
            while (message := receive()).get("id") != sent:
                events.append(message)
            assert "error" not in message, message
            return message["result"]

        send.events, send.receive = events, receive
        try:
            yield send
        finally:
            process.terminate()
            process.wait()


OVERFLOW = """
[document.documentElement.scrollWidth - innerWidth,
 [...document.querySelectorAll("main *, header *, nav *, footer *")].filter(
     element => element.getBoundingClientRect().right > innerWidth + 1 && !element.closest(".scroll")).length,
 [...document.querySelectorAll("svg text, td, dd, p, figcaption")].length]
"""


@pytest.mark.skipif(os.environ.get("CI") == "true", reason="no browser is started in CI")
@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed: apt-get install chromium")
@pytest.mark.parametrize("what", ["run", "odd run", "comparison"])
def test_a_page_is_readable_in_a_browser_narrow_and_wide_light_and_dark(real, tmp_path, what):
    rows = [{**epoch(i, 5, loss=1 / i, tiny=10.0**-i, **{300 * "m": i}), "step": 3_000_009 * i} for i in range(1, 320)]
    folder, other = real[0], folder_of(tmp_path / "other", rows)
    pages = {"run": folder, "odd run": other}
    path = write_report(pages[what]) if what in pages else write_comparison([folder, other], tmp_path / "c.html")
    with browser(tmp_path / "profile") as send:
        target = send("Target.createTarget", url="about:blank")["targetId"]
        session = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            send(f"{domain}.enable", session)
        for width in (400, 1400):
            for scheme in ("light", "dark"):
                size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                send("Emulation.setDeviceMetricsOverride", session, **size)
                features = [{"name": "prefers-color-scheme", "value": scheme}]
                send("Emulation.setEmulatedMedia", session, features=features)
                send.events.clear()
                send("Page.navigate", session, url=path.as_uri())
                while not any(event["method"] == "Page.loadEventFired" for event in send.events):
                    send.events.append(send.receive())
                found = send("Runtime.evaluate", session, expression=OVERFLOW, returnByValue=True)["result"]["value"]
                assert found[:2] == [0, 0] and found[2] > 50, f"wider than {width} pixels"
                picture = tmp_path / f"{width}_{scheme}.png"
                shot = send("Page.captureScreenshot", session, captureBeyondViewport=True)
                picture.write_bytes(base64.b64decode(shot["data"]))
                pixels = matplotlib.image.imread(picture)[..., :3]
                assert pixels.shape[1] == width and pixels.shape[0] > 900
                ground = np.median(pixels.reshape(-1, 3), 0)
                assert (ground > 0.95).all() if scheme == "light" else (ground < 0.15).all()
                assert (np.abs(pixels - ground).max(-1) > 0.5).mean() > 0.01, "there is something to read"
                methods = [event["method"] for event in send.events]
                told = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"} & set(methods)
                assert not told, send.events
                asked = [
                    e["params"]["request"]["url"] for e in send.events if e["method"] == "Network.requestWillBeSent"
                ]
                assert all(url == path.as_uri() or url.startswith("data:") for url in asked), asked
