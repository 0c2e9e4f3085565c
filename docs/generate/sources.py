"""Where the forward and the backward of a public name stand in the sources, and what is said where they begin.

Sources are read, not run. A constructor hands its two functions to one of the `MAKERS`, itself or by a private function
of its file; `BESIDE` names what else belongs to a formula and stands elsewhere.
"""

from __future__ import annotations

import ast
import functools
import io
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]

# what makes a layer, a loss or an optimizer, and which of its arguments are the two functions
MAKERS = {
    "Layer": (2, 3),
    "stateless": (2, 3),
    "without_parameters": (1, 2),
    "by_entry": (1, 2),
    "Loss": (0, 1),
    "_by_entry": (2, 3),
    "_of_two": (1, 2),
    "elementwise": (4, 3),
    "Optimizer": (None, 1),
}

# by public name: a title, and functions left and right of one another, as file:function.function
BESIDE: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "rnn": [
        ("One step", ["layers/cells:rnn_step.step"], ["layers/cells:rnn_step.slopes", "layers/cells:rnn_step.back"]),
        ("The parameters", [], ["layers/recurrent:_weight_gradients"]),
    ],
    "rnn_cell": [
        ("One step", ["layers/cells:rnn_step.step"], ["layers/cells:rnn_step.slopes", "layers/cells:rnn_step.back"])
    ],
    "gru": [
        (
            title,
            [f"layers/cells:{cell}.step"],
            [f"layers/cells:{cell}.{part}" for part in ("slopes", "back", "split", "weights")],
        )
        for title, cell in (("One step", "gru_step_after"), ("One step, reset before", "gru_step_before"))
    ],
    "lstm": [
        ("One step", ["layers/cells:lstm_step.step"], ["layers/cells:lstm_step.slopes", "layers/cells:lstm_step.back"])
    ],
    "dot_product_attention": [
        ("All scores at once", ["layers/dot_product:plain"], ["layers/dot_product:plain_backward"]),
        ("In blocks", ["layers/dot_product:blockwise"], ["layers/dot_product:blockwise_backward"]),
    ],
    "conv": [
        (
            "The products",
            ["layers/convolving:_convolution"],
            ["layers/convolving:_weight_gradient", "layers/convolving:_input_gradient"],
        ),
        (
            "By rows",
            [f"layers/kernel_rows:{part}" for part in ("convolution", "gathered", "added_up", "first_row", "moved")],
            [f"layers/kernel_rows:{part}" for part in ("weight_gradient", "input_gradient", "spread", "placed")],
        ),
        (
            "Depthwise",
            ["layers/depthwise:convolution"],
            ["layers/depthwise:weight_gradient", "layers/depthwise:input_gradient"],
        ),
    ],
    "embedding": [("Rows", ["layers/embedding:lookup"], ["layers/embedding:scatter"])],
    "rotary_positions": [("The rotation", ["layers/embedding:rotate_by"], [])],
    "group_norm": [("The mean", ["layers/normalization:group_norm.mean"], [])],
    "resize": [("The matrix", ["layers/resizing:interpolation"], [])],
    "grid_sample": [("What a place reads along an axis", ["layers/sampling:along"], [])],
    "weighted_binary_cross_entropy": [
        ("Of both classes", ["losses/entries:_of_two.value"], ["losses/entries:_of_two.gradient"])
    ],
    "binary_focal_cross_entropy": [
        ("Of both classes", ["losses/entries:_of_two.value"], ["losses/entries:_of_two.gradient"])
    ],
    "cosine_distance": [("The directions", ["losses/vectors:_direction", "losses/vectors:_cosine"], [])],
    "info_nce": [("The directions", ["losses/vectors:_direction", "losses/vectors:info_nce.read"], [])],
    "multiclass_hinge": [("The margin", ["losses/classes:_margin"], [])],
    "ctc": [("The sum over paths", ["losses/alignments:ctc.forwards", "losses/alignments:ctc.likelihood"], [])],
    "muon": [("The nearest matrix with orthonormal rows or columns", ["optimizers/matrices:orthogonalize"], [])],
}

# whose forward and backward are shown at another name
SHOWN_AT = {
    "gru": "The scan over the steps and the gradients of the parameters are those of `rnn`.",
    "lstm": "The scan over the steps and the gradients of the parameters are those of `rnn`.",
    "gru_cell": "The step is that of `gru`, and all else as in `rnn_cell`.",
    "lstm_cell": "The step is that of `lstm`, and all else as in `rnn_cell`.",
}


class Part(NamedTuple):
    """A function as it stands in its file."""

    text: str
    file: str
    line: int
    comments: tuple[str, ...]  # those with which it begins, lines that follow one another together


class View(NamedTuple):
    """Two functions, or more, beside one another."""

    title: str
    left: list[Part]
    right: list[Part]

    @property
    def derivation(self) -> list[str]:
        """The mathematics at the right, one paragraph after another."""
        return [said for part in self.right for said in part.comments]


class Source:
    """A file: its tree, and its comments by line."""

    def __init__(self, path: Path):
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.tree, self.lines = ast.parse(self.text), self.text.splitlines()
        self.comments: dict[int, tuple[int, str]] = {}
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            said = token.string.removeprefix("#").removeprefix(" ").rstrip()
            if token.type == tokenize.COMMENT and not said.startswith(("noqa", "fmt:", "---")):
                self.comments[token.start[0]] = token.start[1], said

    @property
    def file(self) -> str:
        return self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else self.path.name

    def named(self, qualname: str) -> Any:
        """The function or the assignment of this name, those within others after a dot; KeyError if there is none."""
        node: Any = self.tree
        for name in qualname.split("."):
            found = [child for child in statements(node) if name in names_of(child)]
            if not found:
                raise KeyError(f"{self.file} has no {qualname}")
            node = found[-1]
        return node

    def part(self, node: Any, comments: list[str] | None = None) -> Part:
        """The node's text and what is said at its beginning."""
        if isinstance(node, ast.expr):
            text = textwrap.dedent(" " * node.col_offset + (ast.get_source_segment(self.text, node) or ""))
        else:
            text = textwrap.dedent("\n".join(self.lines[node.lineno - 1 : node.end_lineno]))
        return Part(text, self.file, node.lineno, tuple(comments or self.said_at(node)))

    def said_at(self, node: Any) -> list[str]:
        """The comments above a node, on its first lines, and between the statements of a function."""
        found = {**self.above(node)}
        last = node.end_lineno
        if isinstance(node, ast.FunctionDef):
            last, column = node.body[0].lineno - 1, node.body[0].col_offset
            own = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found |= {i: c for i, (at, c) in self.comments.items() if i in own and at == column and self.alone(i)}
        found |= {i: c for i, (_, c) in self.comments.items() if node.lineno <= i <= max(last, node.lineno)}
        return together(found)

    def above(self, node: Any) -> dict[int, str]:
        found, i = {}, node.lineno - 1
        while i in self.comments and self.alone(i):
            found[i], i = self.comments[i][1], i - 1
        return found

    def alone(self, i: int) -> bool:
        return self.lines[i - 1].lstrip().startswith("#")


@functools.cache
def source(name: str) -> Source:
    """The file of a room, ``layers/dense``, or another in the checkout, ``/tests/test_optimizers``."""
    return Source(ROOT / f"{name[1:] if name.startswith('/') else f'fnet/{name}'}.py")


def together(lines: dict[int, str]) -> list[str]:
    """Comments by line, those of lines that follow one another as one."""
    found: list[str] = []
    for i in sorted(lines):
        if i - 1 in lines:
            found[-1] += f"\n{lines[i]}"
        else:
            found.append(lines[i])
    return found


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Those of a function or a file, with those in its branches, and without those of functions within."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
            if not isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from statements(child)


def names_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    return [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []


def calls_of(node: Any) -> Iterator[tuple[ast.stmt, ast.Call]]:
    """The calls of a constructor's own statements, or of an assignment, not of functions within."""
    for statement in [node] if isinstance(node, ast.Assign) else statements(node):
        if isinstance(statement, ast.FunctionDef | ast.If | ast.For | ast.With):
            continue  # what stands in branches comes as statements of its own
        for call in ast.walk(statement):
            if isinstance(call, ast.Call):
                yield statement, call


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def handed(call: ast.Call) -> tuple[list[ast.expr], list[ast.expr]] | None:
    """The functions that a call is handed, those of the forward and those of the backward; None for other calls."""
    by_keyword = {keyword.arg: keyword.value for keyword in call.keywords}
    if called(call) == "_replace":
        pair = [[by_keyword[name]] if name in by_keyword else [] for name in ("forward", "backward")]
        return (pair[0], pair[1]) if pair[1] else None
    if called(call) not in MAKERS:
        return None
    left, right = MAKERS[called(call)]
    if max(left or 0, right) >= len(call.args):
        return None
    more = [by_keyword["backward"]] if "backward" in by_keyword else []
    return ([] if left is None else [call.args[left]]), [call.args[right], *more]


def views_of(where: Source, name: str, following: bool = True) -> list[View]:
    """What the constructor makes, each with its two functions; none for one that puts others together."""
    node, views = where.named(name), []
    for statement, call in calls_of(node):
        if (pair := handed(call)) is None:
            continue
        left, right = ([part_of(where, node, statement, argument) for argument in side] for side in pair)
        title = right[0].text.split("(")[0].removeprefix("def ").rpartition("_")[0]
        views.append(View(title, left, right))
    if not views and following:  # by a private function of the file
        for _, call in calls_of(node):
            if called(call).startswith("_") and called(call) not in ("_replace", name):
                try:
                    views += views_of(where, called(call), following=False)
                except KeyError:
                    continue
    return views if len(views) > 1 else [view._replace(title="") for view in views]


def part_of(where: Source, constructor: ast.AST, statement: ast.stmt, argument: ast.expr) -> Part:
    """The function that an argument names, or the argument itself."""
    if not isinstance(argument, ast.Name):
        said = where.said_at(argument) or where.said_at(statement)
        return where.part(argument, said)
    inner = [child for child in statements(constructor) if argument.id in names_of(child)]
    found = where.part(inner[-1] if inner else where.named(argument.id))
    return found if found.comments else found._replace(comments=tuple(together(where.above(statement))))


def beside(name: str) -> list[View]:
    """What `BESIDE` says; KeyError, by the file and the name, for what is not there any more."""
    views = []
    for title, *sides in BESIDE.get(name, []):
        left, right = ([at(place) for place in side] for side in sides)
        views.append(View(title, left, right))
    return views


def at(place: str) -> Part:
    """The part at ``file:function.function``."""
    file, _, qualname = place.partition(":")
    return source(file).part(source(file).named(qualname))


@functools.cache
def public(room: str) -> dict[str, str]:
    """The public names of a room and the file of each, in the order of the files in its ``__init__``."""
    front = source(f"{room}/__init__")
    names = ast.literal_eval(front.named("__all__").value)
    files = {}
    for node in front.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            files |= {alias.asname or alias.name: node.module for alias in node.names}
    return {name: file.removeprefix("fnet.").replace(".", "/") for name, file in files.items() if name in names}
