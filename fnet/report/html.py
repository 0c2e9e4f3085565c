"""HTML that needs no other file, no script and no network: pages, tables and numbers as text, all of it escaped."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from fnet.core.files import whole_file
from fnet.report.audit import Html, cell

GENERATOR = '<meta name="generator" content="fnet">'


def write_page(path: Path, title: str, head: str, sections: Mapping[str, str]) -> Path:
    """Write a page of titled sections; errors as `save_page`."""
    ids = {name: re.sub(r"\W+", "-", name.lower()) for name in sections}
    links = "".join(f'<li><a href="#{ids[name]}">{escape(name)}</a></li>' for name in sections)
    body = "".join(
        f'<section aria-labelledby="{ids[name]}"><h2 id="{ids[name]}">{escape(name)}</h2>\n'
        + (content if content.startswith("<") else f'<p class="none">{escape(content)}</p>')
        + "</section>\n"
        for name, content in sections.items()
    )
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # nothing may run and nothing may be loaded, whatever the folder holds
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}{STYLE}</style></head>\n"
        f'<body class="fnet-run"><header><h1>{escape(title)}</h1>{head}</header>\n'
        f'<nav aria-label="sections"><ul>{links}</ul></nav>\n<main>\n{body}</main>\n'
        f"<footer><p>Written {escape(date_time(time.time()))} by fnet.</p></footer></body></html>\n"
    )
    return save_page(path, page.encode(errors="replace"))


def save_page(path: Path, page: bytes) -> Path:
    """Write a page of fnet's, or over one; FileExistsError where there is a file that is none."""
    if path.exists() and (path.is_dir() or GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:1000]):
        raise FileExistsError(f"{path} is not a page of fnet's and is left as it is; name another file")
    try:
        with whole_file(path) as part:
            part.write_bytes(page)
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written ({error.strerror or error}); expected {path.parent} to be a folder that can be "
            "written to: make it, or name another file"
        ) from error
    return path


def grid(head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "", marked: int = 0) -> str:
    """A table that scrolls within itself, nothing where there are no rows; the first ``marked`` rows stand out."""
    if not rows:
        return ""
    names = "".join(f'<th scope="col">{cell(name)}</th>' for name in head)
    lines = (
        f"<tr{' class=marked' if i < marked else ''}>{''.join(f'<td>{cell(value)}</td>' for value in row)}</tr>"
        for i, row in enumerate(rows)
    )
    label = " ".join(name for name in head if name) or "settings"
    table = f'<table class="{kind}"><thead><tr>{names}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f"{scrolled(label)}{table}</div>"


def named(name: str) -> Html:
    """A name that may break behind its slashes, or its underscores where it has none."""
    return Html("<code>" + re.sub("(/)" if "/" in name else "(_)", r"\1<wbr>", escape(name)) + "</code>")


def pairs(values: Mapping[str, str]) -> str:
    """Names and values as a list, nothing where there are none."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f"<dl>{items}</dl>" if items else ""


def scrolled(label: str) -> str:
    """The tag of an element that scrolls sideways, also by keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label, quote=True)}">'


def as_words(value: Any) -> str:
    """A setting as text; a dash for none."""
    return (value or "—") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


LISTED = 8  # entries of a setting that are all shown


def brief(value: Any) -> str:
    """As `as_words`; of a longer list its first entries and how many it has.

    >>> brief(list(range(100, 120)))
    '[100, 101, 102, … 20 in all]'
    >>> brief([[1, 2], "a"])
    '[[1, 2], "a"]'
    """
    if not isinstance(value, list):
        return as_words(value)
    entries = [json.dumps(item, ensure_ascii=False) if isinstance(item, str) else brief(item) for item in value]
    return f"[{', '.join(entries)}]" if len(value) <= LISTED else f"[{', '.join(entries[:3])}, … {len(value)} in all]"


def flat(values: Mapping[str, Any], words: Callable[[Any], str] = as_words, prefix: str = "") -> dict[str, str]:
    """Nested settings by path, their values as text, by `as_words` or by other ``words``."""
    shown = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        path = f"{prefix}{name}"
        shown |= flat(value, words, f"{path}/") if nested else {path: words(value)}
    return shown


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is one that a float holds, as an integer of 400 digits is not."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e308)


def as_number(value: Any) -> float:
    """A number of a file as a float, NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
    except OverflowError:  # an integer of more than 308 digits
        return math.inf


def scientific(value: Any) -> str:
    """One digit behind the point, and the power of ten."""
    return f"{as_number(value):.1e}"


def share_of(part, whole) -> str:
    """A part of the whole, nothing of nothing."""
    return f"{part / whole:.2f}" if whole else ""


def date_time(seconds: float) -> str:
    """Seconds since 1970 as date and time of UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


STYLE = """
.fnet-run { font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.fnet-run .scroll { overflow-x: auto; max-width: 100%; margin-bottom: .8em; }
.fnet-run table { border-collapse: collapse; margin: 0; font-size: 14px; }
.fnet-run th, .fnet-run td { padding: .25em .9em .25em 0; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid rgba(128, 128, 128, .3); background: none; }
.fnet-run th { font-weight: 600; }
.fnet-run td code { white-space: normal; }
.fnet-run code { font: 13px ui-monospace, monospace; background: none; color: inherit; }
.fnet-run .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24em), 1fr));
  gap: 1.2em 1.5em; }
.fnet-run .chart { margin: 0; max-width: 46em; }
.fnet-run .spot text { visibility: hidden; pointer-events: none; font-weight: 600; }
.fnet-run .spot:hover text { visibility: visible; }
.fnet-run .chart > svg { display: block; width: 100%; height: auto; overflow: visible; }
.fnet-run .chart figcaption { font-weight: 600; overflow-wrap: anywhere; }
.fnet-run .legend { display: flex; flex-wrap: wrap; gap: 0 1em; margin: 0; padding: 0; list-style: none;
  font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 32em) {
  .fnet-run table, .fnet-run td code { font-size: 12.5px; }
  .fnet-run th, .fnet-run td { padding-right: .55em; }
}
"""

PAGE_STYLE = """
:root { color-scheme: light dark; background: light-dark(#fff, #14161a); color: light-dark(#1b1d21, #e6e7ea); }
body { margin: 0; }
header, nav, main, footer { max-width: 88em; margin: 0 auto; padding: 0 1.2em; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34em), 1fr)); column-gap: 3em;
  grid-auto-flow: row dense; }
section { min-width: 0; padding: 1em 0 1.4em; border-top: 1px solid rgba(128, 128, 128, .35); }
section:has(.chart + .chart, .shown, .pictures, .compared, .alert) { grid-column: 1 / -1; }
section p { margin: .2em 0 .6em; }
h1 { font-size: 1.6em; line-height: 1.2; margin: .8em 0 .3em; overflow-wrap: anywhere; }
h2 { font-size: 1.2em; margin: 0 0 .5em; }
header p, header ul { margin: .3em 0; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .2em 1.2em; margin: .6em 0; padding: 0; list-style: none; }
a { color: light-dark(#0b5cad, #7db8f5); }
footer, .none, .note { opacity: .75; }
.pill { display: inline-block; padding: 0 .6em; border-radius: 1em; font-size: 13px; font-weight: 600; }
.shown { margin: 0 0 1.2em; }
.shown img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.scroll { --ground: light-dark(#fff, #14161a); --shade: light-dark(rgba(0, 0, 0, .22), rgba(255, 255, 255, .28));
  background:  /* a shade at the side to which there is more; what moves with the table hides it at its end */
    linear-gradient(to right, var(--ground) 40%, transparent) left / 3em 100% no-repeat local,
    linear-gradient(to left, var(--ground) 40%, transparent) right / 3em 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 1em 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 1em 100% no-repeat scroll; }
.warning { color: light-dark(#8a3b00, #ffb877); }
.runs { padding: 0; list-style: none; }
.runs p { display: inline; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17em), 1fr)); gap: 0 2em; margin: 0; }
dl div { display: flex; justify-content: space-between; gap: 1em; padding: .2em 0;
  border-bottom: 1px solid rgba(128, 128, 128, .3); }
dt { flex: none; max-width: 60%; overflow-wrap: anywhere; opacity: .8; }
dd { margin: 0; min-width: 0; text-align: right; overflow-wrap: anywhere; }
.fnet-run .compared td { white-space: normal; overflow-wrap: anywhere; min-width: 5.5em; max-width: 24em; }
.fnet-run .compared td:nth-child(-n + 2) { min-width: 0; overflow-wrap: normal; }
.fnet-run .compared strong, .fnet-run .compared small { white-space: nowrap; }
.fnet-run .compared small { opacity: .75; }
.fnet-run .marked td { background: color-mix(in srgb, #d9680a 14%, transparent); }
.fnet-run .confusion th, .fnet-run .confusion td { padding: .25em .45em; text-align: right; font-size: 13px; }
.fnet-run .confusion tbody th { text-align: left; padding-left: 0; }
.fnet-run .confusion .hit { background: color-mix(in srgb, #1f77b4 calc(var(--share) * 65%), transparent); }
.fnet-run .confusion .miss { background: color-mix(in srgb, #d9680a calc(var(--share) * 90%), transparent); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.4em, 1fr)); gap: 1em;
  margin: 0; padding: 0; list-style: none; }
.pictures figure { margin: 0; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.pictures img { display: block; width: 100%; max-width: 12em; image-rendering: pixelated; border-radius: 4px;
  margin-bottom: .3em; }
"""
