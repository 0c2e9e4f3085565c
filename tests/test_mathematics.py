"""The pages of mathematics hold every layer, loss and optimizer as it stands in the sources, and its derivation."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from types import CodeType
from typing import get_type_hints

import pytest

import fnet
from docs.generate import mathematics, sources
from experiments import gradient_audit
from fnet.gradcheck.report import FINE

ROOMS = {"layers": fnet.layers, "losses": fnet.losses, "optimizers": fnet.optimizers}
AUDITS = json.loads(mathematics.AUDIT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("mathematics")
    mathematics.write(folder)
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.md")}


@pytest.fixture(scope="module")
def sections(pages) -> dict[str, str]:
    """What the pages say of each name."""
    parts = (part for text in pages.values() for part in re.split(r"^\(mathematics-(?=\w+\)=$)", text, flags=re.M)[1:])
    found = [(part[: part.index(")")], part) for part in parts]
    assert len(dict(found)) == len(found)
    return dict(found)


def makes(value) -> bool:
    """Whether this is a layer's, a loss' or an optimizer's constructor, or a loss."""
    made = get_type_hints(value).get("return") if inspect.isfunction(value) else type(value)
    return made in (fnet.Layer, fnet.Loss, fnet.Optimizer)


def test_every_layer_loss_and_optimizer_stands_on_one_page(pages, sections):
    public = {name: value for room in ROOMS.values() for name in room.__all__ for value in [getattr(room, name)]}
    assert sections.keys() == public.keys() - mathematics.LEFT_OUT.keys()
    assert [name for name in mathematics.LEFT_OUT if makes(public[name])] == ["stateless"]
    for room, module in ROOMS.items():
        shown = [
            name for page, text in pages.items() if page.startswith(room) for name in re.findall("^## (.+)", text, re.M)
        ]
        assert sorted(shown) == sorted({*module.__all__} - mathematics.LEFT_OUT.keys())
    assert all(f"<mathematics-{name}>" in pages["index.md"] for name in sections)


def functions_of(constructor) -> dict[str, str]:
    """The text of the functions in a constructor, as Python finds it."""
    found = (const for const in constructor.__code__.co_consts if isinstance(const, CodeType))
    return {code.co_name: textwrap.dedent(inspect.getsource(code)).rstrip() for code in found}


def test_forward_and_backward_are_the_sources_text(sections):
    checked = 0
    for room in (fnet.layers, fnet.losses):
        for name in sections.keys() & {*room.__all__}:
            if inspect.isfunction(constructor := getattr(room, name)) and name != "with_hand_backward":
                own = functions_of(constructor)
                names = [n for n in own if n.endswith(("forward", "backward")) or n in ("value", "gradient")]
                assert all(f"```{{code-block}} python\n{own[n]}\n```" in sections[name] for n in names), name
                checked += bool(names)
    assert checked > 50
    by_helpers = {"dense": fnet.layers.dense, "elu": fnet.layers.elu, "lstm": fnet.layers.lstm}
    files = {name: inspect.getmodule(f) for name, f in by_helpers.items()}
    assert inspect.getsource(files["dense"].affine_backward).rstrip() in sections["dense"]
    assert functions_of(files["elu"]._exponential)["backward"] in sections["elu"]
    assert functions_of(files["lstm"].lstm_step)["back"] in sections["lstm"]
    assert "lambda z, y: 2 * (z - y)\n" in sections["squared_error"] and "> ∂(z − y)²/∂z" in sections["squared_error"]
    assert functions_of(fnet.optimizers.momentum)["rule"] in sections["momentum"]


def test_formula_and_derivation_are_shown(sections):
    assert "`y = x w + b` with `x (B, ..., I)`" in sections["dense"]
    assert "> y = x w + b with examples as rows:  dw = xᵀ dy" in sections["dense"]
    assert "```text\ni, f, o = σ(x W_x" in sections["lstm"] and "> h = o t with t = tanh(c):" in sections["lstm"]
    assert "compared in 6 settings with `adam_oracle`" in sections["adam"]
    assert "A composition" in sections["swiglu"] and "return gated(units, silu(beta)" in sections["swiglu"]


FAKE = '''
def forward_elsewhere(params, x):
    return 2 * x, ()


def double():
    """``y = 2 x``."""
    {before}
    def backward(params, residuals, dy):
        {within}
        return (), 2 * dy

    return stateless("double", lambda key, x: (), forward_elsewhere, backward)  # a comment that is no derivation


def inline():
    return without_parameters("inline", lambda x: (x, ()), lambda residuals, dy: dy)


def unknown():
    return made_elsewhere(1, 2)
'''


@pytest.mark.parametrize("before, within", [("", ""), ("# said of another\n", ""), ("", "z = dy  # a note at the end")])
def test_a_backward_without_a_derivation_is_refused_by_name(tmp_path, before, within):
    (tmp_path / "fake.py").write_text(FAKE.format(before=before, within=within))
    fake = sources.Source(tmp_path / "fake.py")
    for name in ("double", "inline"):
        with pytest.raises(
            ValueError, match=rf"^{name}: its backward \(fake.py, line \d+\) begins without a derivation"
        ):
            mathematics.entry("layers", fake, name, {name: AUDITS["dense"]})
    with pytest.raises(
        ValueError, match=r"^unknown \(fake.py, line \d+\): found neither forward and backward nor layers"
    ):
        mathematics.entry("layers", fake, "unknown", {"unknown": AUDITS["dense"]})


def test_a_derivation_may_stand_above_beside_or_beneath_the_first_line(tmp_path):
    for before, within in (("# dx = 2 dy", ""), ("", "# dx = 2 dy"), ("", '"""Of the sum."""\n        # dx = 2 dy')):
        (tmp_path / "fake.py").write_text(FAKE.format(before=before, within=within))
        entry = mathematics.entry("layers", sources.Source(tmp_path / "fake.py"), "double", {"double": AUDITS["dense"]})
        assert [view.derivation for view in entry.views] == [["dx = 2 dy"]]


def test_a_layer_that_no_audit_looked_at_is_refused():
    with pytest.raises(ValueError, match=r"^tanh: docs/mathematics-audit.json has no audit 'tanh'; add a case"):
        mathematics.audit_line("tanh", {})
    with pytest.raises(ValueError, match=r"^tanh: the audit's verdict is wrong"):
        mathematics.audit_line("tanh", {"tanh": {**AUDITS["tanh"], "verdict": "wrong"}})


def test_tables_whose_names_are_gone_are_refused(monkeypatch):
    monkeypatch.setitem(mathematics.NOT_AUDITED, "gone", "")
    with pytest.raises(ValueError, match="NOT_AUDITED names gone"):
        mathematics.check_tables()
    monkeypatch.setitem(sources.BESIDE, "conv", [("", ["layers/convolving:gone"], [])])
    with pytest.raises(KeyError, match=r"fnet/layers/convolving\.py has no gone"):
        sources.beside("conv")


def test_the_kept_audits_are_those_of_today_and_nothing_is_wrong():
    assert [*AUDITS] == [*gradient_audit.audits(gradient_audit.Config())]
    assert {row["verdict"] for row in AUDITS.values()} <= {*FINE}
    assert [name for name, row in AUDITS.items() if row["verdict"] != "ok"] == ["relu, one input is 0"]
    assert all(row["error"] < 1e-13 and row["leaves"] > row["zero"] for row in AUDITS.values())
