"""The pages of mathematics: each layer, loss and optimizer with its formula, its derivation and its two functions.

All is read from the sources, where `sources` finds it. The audit's line is that of ``docs/mathematics-audit.json``,
which ``python -m experiments.gradient_audit --json docs/mathematics-audit.json`` writes.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from docs.generate import written
from docs.generate.sources import (
    BESIDE,
    ROOT,
    SHOWN_AT,
    Source,
    View,
    beside,
    called,
    calls_of,
    public,
    source,
    views_of,
)

AUDIT = ROOT / "docs" / "mathematics-audit.json"
ROOMS = ("layers", "losses", "optimizers")
SIDES = {"layers": ("forward", "backward"), "losses": ("value", "gradient"), "optimizers": ("numbers", "update")}

# public names that are no layer, loss or optimizer, and why
LEFT_OUT = {
    "Copies": "a tree of parameters",
    "Policy": "dtypes",
    "fold_spectral_norm": "a function of parameters, whose gradient is that of `spectral_norm`",
    "fold_weight_norm": "a function of parameters, whose gradient is that of `weight_norm`",
    "llama3_frequencies": "numbers without a gradient",
    "rotary_frequencies": "numbers without a gradient",
    "rotate": "what `rotary_positions` computes",
    "rotate_by": "what `rotary_positions` computes",
    "stateless": "what layers are made with",
    "yarn_frequencies": "numbers without a gradient",
    "yarn_scale": "a number without a gradient",
    "zero_carry": "zeros",
    "CTCTargets": "what `ctc` is given",
    "Optimizer": "the contract",
    "Transform": "the contract",
    "Minimum": "what `minimize_lbfgs` returns",
    "averages": "reads a state",
    "describe": "words",
    "minimize_lbfgs": "no state transition, but a whole search",
    "nonfinite": "reads a state",
    "orthogonalize": "shown at `muon`",
    "set_hyper": "changes a state",
    "told": "changes a state",
}
LEFT_OUT |= {name: "a state" for name in public("optimizers") if name.endswith("State")}

# the audits of layers that have none of their own name
AUDITED_IN = {
    "alibi": ["attention, alibi, a mask for each head"],
    "by_position": ["dense, masked"],
    "dot_product_attention": ["attention, every option", "attention, a bias of each example"],
    "remat": ["serial, computed again"],
    "spectral_norm": ["conv, weights by their largest gain", "residual, weights by their largest gain"],
    "weight_norm": ["conv, weights by length and direction", "gru, weights by length and direction"],
    "with_hand_backward": ["dense, its backward as jax's rule"],
}
NOT_AUDITED = {
    "freeze": "Its gradient by the parameters is zero on purpose, which is not the slope: no audit.",
    "mixed_precision": "Its gradient is rounded as the policy says, which the audit in float64 does not see.",
    "per_output": "The gradient is that of the loss it is given, which is audited.",
}


class Entry(NamedTuple):
    """What a page says of one public name."""

    name: str
    room: str
    file: str
    line: int
    opening: str
    views: list[View]  # none of a composition
    code: str  # of a composition
    audit: str


def write(folder: Path) -> None:
    """``index.md`` and a page for each file of the rooms; ValueError where a derivation or an audit is missing."""
    check_tables()
    audits = json.loads(AUDIT.read_text(encoding="utf-8"))
    families = {file: entries for room in ROOMS for file, entries in entries_of(room, audits).items()}
    pages = {"index": index(families)} | {file: page_of(file, entries) for file, entries in families.items()}
    for name, text in pages.items():
        written(folder / f"{name}.md", text)


def entries_of(room: str, audits: dict) -> dict[str, list[Entry]]:
    """By file, in the order in which they stand there."""
    found: dict[str, list[Entry]] = {}
    for name, file in public(room).items():
        if name not in LEFT_OUT:
            found.setdefault(file, []).append(entry(room, source(file), name, audits))
    return {file: sorted(entries, key=lambda e: e.line) for file, entries in found.items()}


def entry(room: str, where: Source, name: str, audits: dict) -> Entry:
    """All that is said of a name; ValueError where there is no derivation, or no line of the audit."""
    node, own = where.named(name), views_of(where, name)
    views = ([] if name in SHOWN_AT else own) + beside(name)
    composition = not own and not views and is_composition(where, name)
    if not own and not views and not composition:
        raise ValueError(
            f"{name} ({where.file}, line {node.lineno}): found neither forward and backward nor layers that it is "
            "made of; hand the two to Layer, stateless, without_parameters or by_entry in the constructor, or name "
            "them in BESIDE of docs/generate/sources.py"
        )
    if room != "optimizers":
        for view in own or views:
            if not view.derivation:
                at = view.right[0]
                raise ValueError(
                    f"{name}: its backward ({at.file}, line {at.line}) begins without a derivation; write one to four "
                    "lines of mathematics there, as a comment, such as # y = x w:  dw = xᵀ dy,  dx = dy wᵀ"
                )
    code = where.part(node).text if composition else ""
    said = optimizer_line(name) if room == "optimizers" else audit_line(name, audits)
    begins = opening(docstring(where, node))
    return Entry(name, room, where.file, node.lineno, begins, views, without_docstring(code), said)


def is_composition(where: Source, name: str) -> bool:
    """Whether a constructor has no backward of its own, but layers or losses that have."""
    node = where.named(name)
    others = {*public("layers"), *public("losses"), "_replace"}
    own = [child for child in ast.walk(node) if isinstance(child, ast.FunctionDef) and child.name == "backward"]
    return not own and any(called(call) in others - {name} for _, call in calls_of(node))


# --- what is said ----------------------------------------------------------------------------------------------------


def audit_line(name: str, audits: dict) -> str:
    """What the audit found of a layer or a loss; ValueError where it did not look, or found a fault."""
    if name in NOT_AUDITED:
        return NOT_AUDITED[name]
    rows = AUDITED_IN.get(name) or [case for case in audits if case.split(",")[0] == name]
    missing = [case for case in rows if case not in audits] if rows else [name]
    if missing:
        raise ValueError(
            f"{name}: docs/mathematics-audit.json has no audit {missing[0]!r}; add a case to "
            f"experiments/gradient_audit.py and run python -m experiments.gradient_audit "
            f"--only {name} --json docs/mathematics-audit.json"
        )
    found = [audits[case] for case in rows]
    verdicts = Counter(row["verdict"] for row in found)
    if bad := verdicts.keys() - {"ok", "kink", "imprecise"}:
        raise ValueError(f"{name}: the audit's verdict is {', '.join(bad)}; mend the backward")
    said = [f"{verdict} in {counted(count, 'case')}" for verdict, count in verdicts.most_common()]
    if name in AUDITED_IN:
        said[-1] += f" ({'; '.join(rows)})"
    leaves, zero = (sum(row[key] for row in found) for key in ("leaves", "zero"))
    error = max(row["error"] for row in found)
    said.append(counted(leaves, "leaf", "leaves") + (f", {zero} of them zero up to rounding" if zero else ""))
    said.append(f"largest relative error {error:.1g} in float64" if error else "no difference in float64")
    versions = ", ".join(sorted({f"jax {row['jax']}, {row['date']}" for row in found}))
    return f"**Audit**: {'; '.join(said)} ({versions})."


def counted(count: int, thing: str, things: str = "") -> str:
    """``1 leaf``, ``2 leaves``."""
    return f"{count} {thing if count == 1 else things or thing + 's'}"


def optimizer_line(name: str) -> str:
    """With which oracle the tests compare it, if they do."""
    tests = source("/tests/test_optimizers")
    compared = [
        ast.unparse(call.args[1])
        for _, call in calls_of(tests.named("TABLE"))
        if called(call) == "Case" and ast.unparse(call.args[0]) == name
    ]
    if not compared:
        return ""
    settings = counted(len(compared), "setting")
    return f"**Test**: compared in {settings} with `{compared[0]}` of `{tests.file}`, the formula in NumPy float64."


def docstring(where: Source, node) -> str:
    """Of a function, or the string beneath an assignment."""
    if isinstance(node, ast.FunctionDef):
        return ast.get_docstring(node) or ""
    after = where.tree.body[where.tree.body.index(node) + 1]
    found = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
    return inspect.cleandoc(found) if isinstance(found, str) else ""


def without_docstring(code: str) -> str:
    """A function's text without its docstring; that of anything else."""
    tree = ast.parse(code).body[0] if code else None
    if not isinstance(tree, ast.FunctionDef) or not ast.get_docstring(tree):
        return code
    lines, said = code.splitlines(), tree.body[0]
    return "\n".join([*lines[: said.lineno - 1], *lines[said.end_lineno :]])


def opening(doc: str) -> str:
    """The first paragraphs of a docstring, as far as they hold formulas."""
    kept = []
    for block in re.split(r"\n\s*\n", doc):
        formula = block.startswith("    ") or re.search(r"``[^`]* [−+]?= [^`]*``", block)
        if kept and (block.startswith((">>>", "| ")) or not (formula or kept[-1].endswith(":"))):
            break
        kept.append(block)
    return "\n\n".join(kept)


def markdown(text: str) -> str:
    """A docstring as Markdown: code stays code, names that are public become links, indented formulas blocks."""
    blocks = []
    for block in re.split(r"\n\s*\n(?! {4})|\n\s*\n(?= {4})", text):
        if block.startswith("    "):
            blocks.append(f"```text\n{inspect.cleandoc(block)}\n```")
        else:  # a formula may follow its sentence, or a list, without an empty line
            blocks.append(inline(block))
    return "\n\n".join(blocks)


def inline(text: str) -> str:
    """Code in double backticks, names in single ones, and all else with what Markdown reads as signs escaped."""

    def one(piece: re.Match) -> str:
        code, name, other = piece.groups()
        if code is not None:
            return f"`{code}`"
        if name is not None:
            return reference(name)
        return re.sub(r"([\\*_<>\[\]{}~$])", r"\\\1", other)

    return re.sub(r"``(.+?)``|`([^`]+)`|([^`]+)", one, text, flags=re.DOTALL)


def reference(name: str) -> str:
    """A link to the reference, for a public name; else code."""
    short = name.rpartition(".")[2]
    for room in ROOMS:
        if name in (short, f"fnet.{room}.{short}") and short in public(room):
            return f"{{py:obj}}`{short} <fnet.{room}.{short}>`"
    return f"`{name}`"


def quoted(paragraphs: list[str]) -> str:
    """Mathematics as a quotation; a line that is indented begins anew."""
    shown = []
    for lines in (paragraph.splitlines() for paragraph in paragraphs):
        ends = ["\\" if following.startswith(" ") else "" for following in lines[1:]] + [""]
        escaped = (re.sub(r"^([-+#]|\d+\.)", r"\\\1", inline(line.strip())) for line in lines)
        shown.append("\n".join(f"> {line}{end}" for line, end in zip(escaped, ends, strict=True)))
    return "\n>\n".join(shown)


# --- the pages -------------------------------------------------------------------------------------------------------


# two columns of code want the room of the table of contents, which stands at the top instead
WIDE = """\
---
html_theme.sidebar_secondary.remove: true
---

```{raw} html
<style>
.bd-main .bd-content .bd-article-container { max-width: 100rem; }
.side-by-side pre { font-size: 0.75rem; }
h1, h2 { overflow-wrap: anywhere; }
</style>
```"""


def title_of(file: str) -> str:
    """``Dot product``, ``Losses: entries``."""
    room, _, name = file.partition("/")
    name = name.replace("_", " ")
    return name.capitalize() if room == "layers" else f"{room.capitalize()}: {name}"


def page_of(file: str, entries: list[Entry]) -> str:
    """A family: what its file says of itself, and each of its names."""
    shown = [WIDE, f"# {title_of(file)}", markdown(ast.get_docstring(source(file).tree) or "")]
    shown += [listed(entries) + "."] if len(entries) > 1 else []
    for e in entries:
        shown += [f"({label(e.name)})=", f"## {e.name}", f"{reference(e.name)}, `{e.file}`, line {e.line}"]
        shown += [markdown(e.opening)]
        if e.code:
            shown += ["A composition: its backward is that of what it is made of.", code_block(e.code)]
        for view in e.views:
            shown += [f"### {view.title.replace('_', ' ').capitalize()}"] if view.title else []
            if view.derivation and e.room != "optimizers":
                shown.append(quoted(view.derivation))
            shown.append(side_by_side(view, e))
        if e.name in SHOWN_AT:
            shown.append(re.sub(r"`(\w+)`", lambda found: section(found[1]), SHOWN_AT[e.name]))
        shown += [e.audit] if e.audit else []
    return "\n\n".join(shown) + "\n"


def side_by_side(view: View, e: Entry) -> str:
    """The functions of both sides, in two columns where there is room for them."""
    columns = []
    for title, parts in zip(SIDES[e.room], (view.left, view.right), strict=True):
        blocks = []
        for i, part in enumerate(parts):
            where = f"line {part.line}" if part.file == e.file else f"`{part.file}`, line {part.line}"
            blocks += [f"**{title}**, {where}" if i == 0 else where, code_block(part.text)]
        columns += ["````{grid-item}\n" + "\n\n".join(blocks) + "\n````"] if blocks else []
    options = f"1 1 1 {len(columns)}\n:gutter: 2\n:margin: 0\n:padding: 0\n:class-container: side-by-side"
    return f"`````{{grid}} {options}\n\n" + "\n\n".join(columns) + "\n`````"


def code_block(code: str) -> str:
    """Code that is shown; blocks of ```python are for what runs."""
    return f"```{{code-block}} python\n{code}\n```"


def label(name: str) -> str:
    return f"mathematics-{name}"


def section(name: str) -> str:
    """A link to what these pages say of a name."""
    return f"{{ref}}`{name} <{label(name)}>`"


def listed(entries: list[Entry]) -> str:
    return ", ".join(section(e.name) for e in entries)


def index(families: dict[str, list[Entry]]) -> str:
    """What the pages are, what they hold and what they leave out."""
    shown = [
        "# Mathematics",
        "Each layer, loss and optimizer of fnet: its formula, the derivation of its backward, and both functions as "
        "they stand in the sources, from which these pages are generated. A layer or a loss whose backward begins "
        "without a derivation, or that no audit looked at, fails the build.",
        "The line **Audit** is what `check_layer` or `check_gradients` found of the cases in "
        "`experiments/gradient_audit.py`: the verdict, and the largest difference between the backward by hand and the "
        "expected gradient in float64, relative to the largest entry of its leaf (a parameter or an input, in training "
        "or in inference). It is kept in `docs/mathematics-audit.json`, which is written by",
        "```text\npython -m experiments.gradient_audit --json docs/mathematics-audit.json\n```",
    ]
    for room in ROOMS:
        own = {file: entries for file, entries in families.items() if file.startswith(f"{room}/")}
        pages = (f"- [{title_of(file)}]({file}.md): {listed(entries)}" for file, entries in own.items())
        shown += [f"## {room.capitalize()}", "\n".join(pages)]
        shown.append("```{toctree}\n:hidden:\n\n" + "\n".join(own) + "\n```")
    names = (f"- {reference(name)}: {inline(why)}" for name, why in LEFT_OUT.items() if why != "a state")
    shown += [
        "## What has no page",
        "Models, which are compositions of layers, the states of optimizers, and",
        "\n".join(names),
    ]
    return "\n\n".join(shown) + "\n"


def check_tables() -> None:
    """ValueError for a name in a table here that is not public any more, or a place that is not there."""
    known = {name for room in ROOMS for name in public(room)}
    tables = {"LEFT_OUT": LEFT_OUT, "AUDITED_IN": AUDITED_IN, "NOT_AUDITED": NOT_AUDITED}
    for table, names in {**tables, "BESIDE": BESIDE, "SHOWN_AT": SHOWN_AT}.items():
        if gone := set(names) - known:
            raise ValueError(f"{table} names {', '.join(sorted(gone))}, which fnet does not have any more; remove it")
