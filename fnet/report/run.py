"""A run's folder as one page, and several side by side."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from fnet.gradcheck.report import columns
from fnet.report.audit import Html, code, pill
from fnet.report.charts import line_chart, png, swatch
from fnet.report.experiment import is_experiment, write_experiment
from fnet.report.folder import Reading, best, direction, read_run, scalars
from fnet.report.html import (
    STYLE,
    as_number,
    as_words,
    brief,
    date_time,
    flat,
    grid,
    is_number,
    named,
    pairs,
    scientific,
    scrolled,
    share_of,
    write_page,
)
from fnet.report.panels import COLOURS, DASHES, ROUNDS, Line, Panel, Series, panels_of, series_of, whole

if TYPE_CHECKING:
    from fnet.runs.history import History

CLASSES = 30  # whose confusion matrix is shown whole


# ---- the page of one run


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of a run to folder/report.html, or to the file ``path``, and return that file.

    The page is made of what is in the folder by then: the run may still be going, or have been killed. Of an
    experiment's folder without metrics it shows the configuration, the numbers of results.json, the pictures, and links
    to all else that lies there. A page that fnet wrote is replaced. RunError where the folder is neither,
    FileExistsError where the file is not a page of fnet's.
    """
    if is_experiment(Path(folder)):
        return write_experiment(Path(folder), Path(path) if path else Path(folder) / "report.html")
    run = read_run(folder)
    panels = panels_of(run.trained, run.evaluated, "step")
    norms = [panel for panel in panels if panel.title == "gradient_norm"]
    in_table = scalars({**run.trained, **run.evaluated})
    constant = [panel for panel in panels if panel.title in in_table and is_constant(panel)]
    curves = [panel for panel in panels if not any(panel is other for other in (*norms, *constant))]
    sections = {
        "Curves": charts(curves) or "No epoch and no evaluation was completed." * (not panels),
        "Gradient norms by layer": charts(norms),
        "Numbers": grid(NUMBERS, numbers({**run.trained, **run.evaluated}, "step")),
        "Confusion matrix": confusion_section(run),
        "Worst examples": worst_section(run),
        "Gradient audit": audit_section(run.audit),
        **explorer_section(run.folder, Path(path).parent if path else run.folder),
        "Time and memory": pairs(described(run.summary)),
        "Configuration": pairs(flat(run.config, brief)),
        "Environment": pairs(flat(run.environment)),
    }
    absent = "".join(f"<li>{escape(name)}: {escape(MAKES[name])}</li>" for name in MAKES if not sections[name])
    sections = {name: content for name, content in sections.items() if content}
    if absent:
        sections["Not in this folder"] = f'<ul class="note">{absent}</ul>'
    if run.nonfinite:
        found = pairs(flat(run.nonfinite, brief))
        sections = {"Not finite": f'<p class="alert">The run met a number that is not finite.</p>{found}', **sections}
    title = f"{name_of(run.folder)}, {date_time(run.written)[:10]}"
    return write_page(Path(path) if path else run.folder / "report.html", title, status(run), sections)


MAKES = {  # the sections that only some folders have, and what makes them
    "Gradient norms by layer": "make_step(monitors={'gradient_norm': fnet.metrics.gradient_norms}) measures them",
    "Confusion matrix": "fnet.report.save_evaluation(folder, outputs, batch) writes evaluation.npz",
    "Worst examples": "fnet.report.save_evaluation(folder, outputs, batch) writes evaluation.npz",
    "Gradient audit": "fnet.report.save_audit(folder, fnet.check_model(...)) writes audit.json",
    "Time and memory": "summary.json is written when a run ends",
    "Configuration": "fnet.Run was given none",
}


def name_of(folder: Path) -> str:
    """``Run A``, or of a run within an experiment's folder the experiment, its name and the run's."""
    folder = folder.absolute()
    if (folder.parent / "config.json").is_file():
        return f"{folder.parent.parent.name}: {folder.parent.name}/{folder.name}"
    return f"Run {folder.name}"


def is_constant(panel: Panel) -> bool:
    """Whether all its values are one number, of a metric that has no best."""
    values = np.concatenate([line.y for line in panel.lines])
    return not direction(panel.title) and bool((values == values[0]).all())


def status(run: Reading) -> str:
    """How far the run is, and what could not be read."""
    last, ended = run.last, run.summary.get("steps")
    ended = ended if isinstance(ended, int) else last
    reached = "before the first row of metrics" if last is None else f"step {last:,}, written {date_time(run.written)}"
    if not run.summary:
        words = f"Has not ended (no summary.json): still going, stopped or killed. Last seen at {reached}."
    elif ended is None:
        words = "Ended before its first step."
    elif last is not None and last > ended:
        words = f"Continued after it had ended at step {ended:,} (summary.json). Last seen at {reached}."
    else:
        words = f"Ended at step {ended:,}."
        rule = run.summary.get("ended")
        if isinstance(rule, dict) and rule.get("reason"):
            words = f"Stopped early at step {ended:,}: {rule['reason']}."
    if run.checkpoints:
        words += f" The last checkpoint is of step {run.checkpoints[-1]:,}."
    if run.nonfinite:
        place = f"step {run.nonfinite.get('step')}, {run.nonfinite.get('stage') or 'no stage'}"
        words += f" Not finite at {place}" + (f" of {layer}." if (layer := run.nonfinite.get("layer")) else ".")
    notes = "".join(f'<li class="warning">{escape(note)}</li>' for note in run.notes)
    return f"<p>{escape(words)}</p>" + (f"<ul>{notes}</ul>" if notes else "")


def charts(panels: Sequence[Panel]) -> str:
    """Panels side by side, nothing where there are none."""
    return f'<div class="charts">{"".join(map(line_chart, panels))}</div>' if panels else ""


def numbers(metrics: Mapping[str, Series], x_label: str) -> list[tuple]:
    """Rows of the first, best and last value of each metric of one number, for a table with the head `NUMBERS`."""
    return [(named(name), *cells) for name, *cells in number_rows(metrics, x_label)]


def number_rows(metrics: Mapping[str, Series], x_label: str) -> Iterator[tuple[str, ...]]:
    """The cells of `numbers` as text."""
    for name, (x, values) in scalars(metrics).items():
        found = best(name, (x, values))
        at = (f"{found[0]:.5g}", f"{x_label} {whole(found[1])}") if found else ("", "")
        yield name, f"{values[0]:.5g}", *at, f"{values[-1]:.5g}"


NUMBERS = ("metric", "first", "best", "at", "last")


def confusion_section(run: Reading) -> str:
    """The matrix of evaluation.npz, or the shares that an evaluation measured last."""
    kept = run.evaluation
    if kept:
        names = kept.get("names", np.arange(len(kept["confusion"])))
        return evaluated_on(kept) + confusion_table(kept["confusion"], [str(name) for name in names])
    for name, (x, values) in reversed(run.evaluated.items()):
        if name.endswith("confusion") and values.ndim == 3 and values.shape[1] == values.shape[2]:
            of = f"<p>Shares of all examples: {code(name)} of the evaluation at step {x[-1]:,}.</p>"
            return of + confusion_table(values[-1], [str(i) for i in range(values.shape[1])])
    return ""


def evaluated_on(kept: Mapping[str, np.ndarray]) -> str:
    """What `save_evaluation` was given, in a line."""
    examples = f"{float(kept['examples']):,.6g} examples" if "examples" in kept else ""
    of = str(kept["of"]) if "of" in kept else ""
    return f"<p>On {escape(', '.join(words for words in (of, examples) if words))}.</p>" if of or examples else ""


def confusion_table(counts: np.ndarray, names: Sequence[str]) -> str:
    """Counts by true and predicted class with recall and precision; of many classes the most frequent confusions."""
    rows, of_class, predicted = len(counts), counts.sum(1), counts.sum(0)
    right, total = float(np.trace(counts)), float(counts.sum())
    counted = "" if math.isclose(total, 1, rel_tol=1e-4) else f", {right:.6g} of {total:.6g}"  # shares add up to 1
    share = f"<p>Accuracy {right / (total or 1):.4f}{counted}.</p>"
    if rows > CLASSES:
        wrong = np.where(np.eye(rows, dtype=bool), 0, counts)
        order = np.argsort(-wrong, axis=None, kind="stable")[: min(CLASSES, np.count_nonzero(wrong))]
        places = zip(*np.unravel_index(order, counts.shape), strict=True)
        listed = [(names[i], names[j], f"{counts[i, j]:.6g}", share_of(counts[i, j], of_class[i])) for i, j in places]
        head = ("true", "predicted", "count", "share of the true class")
        return f"{share}<p>The most frequent confusions of {rows} classes:</p>{grid(head, listed)}"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = ""
    for i, name in enumerate(names):
        cells = ""
        for j, count in enumerate(counts[i]):
            part = min(max(float(count / (of_class[i] or 1)), 0.0), 1.0)
            shade = f' class="{"hit" if i == j else "miss"}" style="--share:{part if i == j else math.sqrt(part):.3f}"'
            title = escape(f"{name} taken for {names[j]}: {share_of(count, of_class[i])}", quote=True)
            cells += f'<td{shade} title="{title}">{count:.4g}</td>' if count else "<td></td>"
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}<td>{share_of(counts[i, i], of_class[i])}</td></tr>'
    precision = "".join(f"<td>{share_of(counts[i, i], predicted[i])}</td>" for i in range(rows))
    return (
        f'{share}<p class="note">Rows are the true classes, columns the predicted ones. Shade: the share of the true '
        f"class, off the diagonal its square root.</p>{scrolled('confusion matrix')}<table class=confusion>"
        f'<thead><tr><th scope="col">true</th>{head}<th scope="col">recall</th></tr></thead>'
        f'<tbody>{body}<tr><th scope="row">precision</th>{precision}<td></td></tr></tbody></table></div>'
    )


def worst_section(run: Reading) -> str:
    """The examples of evaluation.npz of the greatest loss, as pictures if they are."""
    kept = run.evaluation
    if not kept or not len(kept["index"]):
        return ""
    names = [str(name) for name in kept.get("names", np.arange(len(kept["confusion"])))]
    target, predicted = ([names[i] if i >= 0 else "nothing" for i in kept[name]] for name in ("target", "prediction"))
    loss, index = [f"{value:.4g}" for value in kept["loss"]], kept["index"].tolist()
    rows = list(zip(index, target, predicted, loss, strict=True))
    if "pictures" not in kept:
        return evaluated_on(kept) + grid(("example", "true", "predicted", "cross entropy"), rows)
    figures = ""
    for picture, (number, true, taken, value) in zip(kept["pictures"], rows, strict=True):
        words = f"true {escape(true)}, predicted {escape(taken)}"
        data = base64.b64encode(png(picture)).decode("ascii")
        figures += (
            f'<li><figure><img alt="example {number}" src="data:image/png;base64,{data}">'
            f"<figcaption><strong>{words}</strong><br>loss {value}, example {number}</figcaption></figure></li>"
        )
    return f'{evaluated_on(kept)}<ol class="pictures">{figures}</ol>'


def explorer_section(folder: Path, beside: Path) -> dict[str, str]:
    """A link to the folder's explorer.html, if `write_explorer` has written one."""
    page = folder / "explorer.html"
    if not page.is_file():
        return {}
    address = quote(Path(os.path.relpath(page.absolute(), beside.absolute())).as_posix())
    return {"One pass": f'<p><a href="{address}">Forward and backward, every number with its formula</a></p>'}


def audit_section(audit: Mapping[str, Any]) -> str:
    """The verdict of audit.json, and a row for each leaf."""
    if not audit:
        return ""
    leaves = audit.get("leaves")
    leaves = [leaf for leaf in leaves if isinstance(leaf, dict)] if isinstance(leaves, list) else []
    ok = audit.get("ok") is True
    verdict = pill("right" if ok else "wrong or not verified", "ok" if ok else "wrong")
    first = f" First on the backward pass: {code(str(audit['first_wrong']))}." if audit.get("first_wrong") else ""
    rows = [
        (
            named(str(leaf.get("path"))),
            pill(str(leaf.get("verdict")), str(leaf.get("verdict"))),
            scientific(leaf.get("relative")),
            scientific(leaf.get("power")),
            "" if leaf.get("order") is None else f"{as_number(leaf['order']):.1f}",
            str(leaf.get("cause") or ""),
        )
        for leaf in leaves
    ]
    head = ("leaf", "verdict", "error", "sees", "order", "cause")
    return f"<p>{verdict} {len(leaves)} leaves.{first}</p>{grid(head, rows)}"


UNITS: dict[str, tuple[str, Callable[[Any], str]]] = {  # of summary.json, by what a name ends with
    "_seconds": (" time", lambda v: f"{v:.2f} s" if v < 120 else f"{v // 3600:.0f} h {v % 3600 / 60:.1f} min"),
    "_bytes": (" memory", lambda v: f"{v / 1e6:,.3f} MB"),
    "": ("", lambda v: f"{v:,}" if isinstance(v, int) else f"{v:,.6g}"),
}


OF_LAST_CALL = ("steps_of_this_call", "examples", "compile_seconds", "run_seconds")


def described(summary: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of summary.json in their units, and what follows from them; a run may be of several calls of fit."""
    shown = {}
    for name, value in summary.items():
        if name == "ended":  # `status` says that
            continue
        ending, word, written = "", "", as_words
        if is_number(value):
            ending = next(ending for ending in UNITS if name.endswith(ending))
            word, written = UNITS[ending]
        label = name.removesuffix("_of_this_call").removesuffix(ending).replace("_", " ") + word
        if value is not None:
            shown[label + " of the last call" * (name in OF_LAST_CALL)] = written(value)
    seconds, examples = summary.get("run_seconds"), summary.get("examples")
    if is_number(seconds) and is_number(examples) and seconds > 0 and examples:
        rate = f"{examples / seconds:,.{0 if examples > 100 * seconds else 2}f}"
        shown["examples per second of the last call"] = rate
    return shown


# ---- several runs side by side


def write_comparison(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write one page that compares runs to the file ``path``, and return it: curves overlaid, numbers, configurations.

    Where an epoch has another number of steps in each run the curves are drawn by epoch, otherwise by step. Errors are
    those of `write_report`, and ValueError for fewer than two folders.
    """
    if len(folders) < 2:
        raise ValueError(f"write_comparison: {len(folders)} folders; expected at least 2")
    runs = [read_run(folder) for folder in folders]
    names = [run.folder.absolute().name for run in runs]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    legend = "".join(
        f"<li>{swatch(*_look(i, 0))} <strong>{escape(name)}</strong>: {status(run)}</li>"
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    )
    sections = {
        "Curves": charts(overlaid(names, runs)) or "No epoch and no evaluation was completed.",
        "Final and best numbers": compared_numbers(names, runs) or "None.",
        "Configurations": compared(names, *([flat(run.config, words) for run in runs] for words in (as_words, brief))),
        "Time and memory": compared(names, [described(run.summary) for run in runs]),
        "Environments": compared(names, [flat(run.environment) for run in runs]),
    }
    return write_page(Path(path), f"{len(runs)} runs compared", f'<ul class="runs">{legend}</ul>', sections)


def overlaid(names: Sequence[str], runs: Sequence[Reading]) -> list[Panel]:
    """The panels of all runs: a colour a run, dashes for each set; of groups the whole, as the norm of all."""
    lengths = [run.per_epoch for run in runs]
    by_epoch = None not in lengths and len(set(lengths)) > 1
    panels: dict[str, list[Line]] = {}
    for i, (name, run, length) in enumerate(zip(names, runs, lengths, strict=True)):
        for panel in panels_of(run.trained, run.evaluated, "step"):
            norm = [line for line in panel.lines if line.name == "all"]
            for j, line in enumerate(norm or panel.lines):
                x = line.x / length if by_epoch and length else line.x
                # the first run is drawn wide beneath the others, so that curves that coincide are both seen
                colour, dash = _look(i, j)
                line = Line(f"{name}, {line.name}", x, line.y, colour, dash, 1.8 if i else 5)
                panels.setdefault(f"{panel.title}/all" if norm else panel.title, []).append(line)
    return [Panel(title, "epoch" if by_epoch else "step", lines) for title, lines in panels.items()]


def _look(run: int, of: int) -> tuple[str, str]:
    """The colour of a run, and the dashes of one of its curves; when the colours begin again they are others."""
    again, colour = divmod(run, len(COLOURS))
    return COLOURS[colour], ROUNDS[again % len(ROUNDS)] + DASHES[of % len(DASHES)]


def compared_numbers(names: Sequence[str], runs: Sequence[Reading]) -> str:
    """For each metric of one number its final and best value in each run; the best of all runs is marked."""
    metrics = [scalars({**run.trained, **run.evaluated}) for run in runs]
    rows = []
    for name in dict.fromkeys(name for each in metrics for name in each):
        bests = [best(name, each[name]) if name in each else None for each in metrics]
        lasts = [(float(each[name][1][-1]), None) if name in each else None for each in metrics]
        rows.append((named(name), "final", *_marked(name, lasts)))
        if any(bests):
            rows.append(("", "best", *_marked(name, bests)))
    return "<p>★: the best of the runs.</p>" + grid(("metric", "", *names), rows, kind="compared") if rows else ""


def _marked(name: str, values: Sequence[tuple[float, float | None] | None]) -> Iterator[str]:
    """Values and steps of runs as HTML, with a star at the best of several."""
    known = [-direction(name) * pair[0] for pair in values if pair and math.isfinite(pair[0])]
    for pair in values:
        if pair is None:
            yield ""
            continue
        at = "" if pair[1] is None else f" <small>at step {whole(pair[1])}</small>"
        first = direction(name) and len(known) > 1 and -direction(name) * pair[0] == min(known)
        yield Html((f"<strong>{pair[0]:.5g} ★</strong>" if first else f"{pair[0]:.5g}") + at)


def compared(
    names: Sequence[str], settings: Sequence[Mapping[str, str]], briefs: Sequence[Mapping[str, str]] | None = None
) -> str:
    """Settings of runs in columns; those that differ come first and are marked.

    In the place of those that are the same stand their ``briefs``, and of those whose briefs tell them apart.
    """
    keys = list(dict.fromkeys(key for each in settings for key in each))
    differing = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    same = [key for key in keys if key not in differing]
    if not keys:
        return "None."
    mark = Html('<span title="differs">≠</span>')
    shown = lambda each, key: each.get(key, "—")  # noqa: E731
    rows = []
    for key in keys:
        short = [shown(each, key) for each in briefs or settings]
        told = key not in differing or len(set(short)) > 1
        cells = short if told else [shown(each, key) for each in settings]
        rows.append((mark if key in differing else "", named(key), *cells))
    rows.sort(key=lambda row: row[0] != mark)
    note = f"{len(differing)} of {len(keys)} differ (≠)." if differing else f"All {len(same)} are the same."
    return f"<p>{note}</p>" + grid(("", "", *names), rows, kind="compared", marked=len(differing))


# ---- a history in a terminal and in a notebook


def history_text(history: History) -> str:
    """What `fnet.History` is printed as."""
    counts = {
        "epoch": len(history.epochs.get("epoch", ())),
        "step": len(next(iter(history.steps.values()), ())),
        "evaluation": len(history.evaluations.get("step", ())),
    }
    made = [f"{n:,} {what}{'s' * (n != 1)}{' of this call' * (what == 'step')}" for what, n in counts.items()]
    head = f"History: {', '.join(made)}; {took(history)}"
    rows = [
        row
        for trained, evaluated, x_label, _ in series_of(history)
        for row in number_rows({**trained, **evaluated}, x_label)
    ]
    return "\n".join([head, *([columns([NUMBERS, *rows])] if rows else []), *ended_words(history)])


def took(history: History) -> str:
    """How long it took."""
    return f"compiled in {history.compile_seconds:.2f} s, run in {history.run_seconds:.2f} s"


def ended_words(history: History) -> list[str]:
    """How a rule to stop has ended the run, if one has."""
    return [f"Stopped early at step {history.ended.step:,}: {history.ended.reason}."] if history.ended else []


def history_html(history: History) -> str:
    """The HTML fragment of `fnet.History`: a table and the curves, in the colours of the notebook."""
    parts = series_of(history)
    rows = [row for trained, evaluated, x_label, _ in parts for row in numbers({**trained, **evaluated}, x_label)]
    curves = charts([panel for part in parts for panel in panels_of(*part)])
    said = "".join(f"<p>{escape(words)}</p>" for words in [f"{took(history).capitalize()}.", *ended_words(history)])
    table = grid(NUMBERS, rows) or "<p>No epoch and no evaluation was completed.</p>"
    return f'<div class="fnet-run"><style>{STYLE}</style>{table}{curves}{said}</div>'
