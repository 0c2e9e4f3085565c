"""The site's reference has every public name once; what pages need besides is in the docstrings."""

from __future__ import annotations

import importlib
import inspect

import pytest

import fnet
from docs.generate import reference
from docs.generate.docstrings import as_rst


def shown():
    return [entry for sections in reference.by_page().values() for _, some in sections for entry in some]


def test_every_public_name_stands_on_one_page_under_a_path_that_imports_it():
    values = [id(entry.value) for entry in shown()]
    assert len(values) == len(set(values))
    for entry in shown():
        module, _, name = entry.name.rpartition(".")
        assert getattr(importlib.import_module(module), name) is entry.value
    public = {
        id(getattr(importlib.import_module(f"fnet.{path}"), name))
        for path in (*fnet.ROOMS, *reference.PUBLIC)
        for name in getattr(importlib.import_module(f"fnet.{path}"), "__all__", ())
        if not inspect.ismodule(getattr(importlib.import_module(f"fnet.{path}"), name))
    }
    public |= {id(getattr(fnet, name)) for names in fnet.NAMES.values() for name in names}
    modules = {id(getattr(fnet, name)) for name in dir(fnet) if inspect.ismodule(getattr(fnet, name))}
    assert public - modules <= set(values)


def test_what_stands_there_is_documented():
    for entry in shown():
        text = entry.said if entry.kind == "py:data" else inspect.getdoc(entry.value)
        assert text and len(text) > 10, entry.name


def test_a_name_without_a_page_fails_the_build(monkeypatch):
    pages = {**reference.PAGES, "layers": reference.PAGES["layers"]._replace(modules=("layers.dense",))}
    monkeypatch.setattr(reference, "PAGES", pages)
    with pytest.raises(ValueError, match=r"on no page .*'fnet.layers.relu'.*add the module"):
        reference.by_page()


def test_tables_code_and_plurals_of_docstrings_become_restructuredtext():
    lines = ["Two `Batch`es of:", "", "    y = f(x)", "", "| a | b |", "|---|---|", "| 1 | |"]
    assert as_rst(lines)[:5] == [r"Two `Batch`\ es of:", "", "::", "", "    y = f(x)"]
    assert [line.strip() for line in as_rst(lines) if line.strip()][-6:] == [
        *(".. list-table::", ":header-rows: 1", "* - a", "- b", "* - 1", "-"),
    ]
