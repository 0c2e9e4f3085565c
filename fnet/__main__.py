"""What is installed and in force: `python -m fnet`; what a model would take on many chips: `python -m fnet plan`."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata

import jax

from fnet.core.extras import DISTRIBUTION
from fnet.runs.settings import environment

ITS_OWN = ("test", "docs", "lint")  # the extras by which fnet itself is worked on
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(?:\[(?P<extras>[^\]]*)\])?\s*(?P<version>[^;\[]*)(?:;(?P<marker>.*))?")


def report() -> str:
    """Version, devices, precision, compilation cache, and which of a user's extras are installed, a line each."""
    return "\n".join([*_settings(), "", "extras", *_extras()])


def _settings() -> Iterator[str]:
    known = environment()
    devices = ", ".join(f"{count} x {kind}" for kind, count in Counter(known["devices"]).items())
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    facts = {
        "fnet": f"{known['fnet']}, Python {known['python']}, "
        + ", ".join(f"{name} {known[name]}" for name in ("jax", "jaxlib", "numpy")),
        "devices": f"{devices} ({known['backend']}); {known['threads']} threads",
        "64-bit numbers": f"{'on' if known['x64'] else 'off'} (jax_enable_x64)",
        "products": f"{known['matmul_precision'] or 'the precision of the backend'} (jax_default_matmul_precision)",
        "compiled programs": f"kept in {cache}" if cache else "not kept; JAX_COMPILATION_CACHE_DIR=FOLDER keeps them",
    }
    width = max(map(len, facts))
    return (f"{name:{width}}  {fact}" for name, fact in facts.items())


def _extras() -> Iterator[str]:
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield "  fnet is not installed but run from its source, so its extras are not known;"
        yield "  to install it with all of them, in the folder of pyproject.toml:"
        yield "    pip install --editable '.[experiments]'"
        return
    extras = {extra: needed for extra, needed in _by_extra(lines).items() if extra not in ITS_OWN}
    width = max(map(len, extras), default=0)
    for extra, needed in extras.items():
        states = {name: _state(name, version) for name, version in needed.items()}
        if not any(_version(name) for name in needed if name != "jax"):  # which is there without any
            yield f"  {extra:{width}}  not installed: pip install '{DISTRIBUTION}[{extra}]'"
            continue
        items = [
            f"{name} {state}".replace(" ", "\0") for name, (state, _) in states.items()
        ]  # lines break between them
        first, later = f"  {extra:{width}}  ", " " * (width + 4)
        listed = textwrap.wrap(", ".join(items), 76 - width, break_on_hyphens=False)
        yield (first + f"\n{later}".join(listed)).replace("\0", " ")
        if not all(fine for _, fine in states.values()):
            yield f"  {'':{width}}  the rest: pip install '{DISTRIBUTION}[{extra}]'"


def _by_extra(lines: Sequence[str]) -> dict[str, dict[str, str]]:
    """For each extra its packages and their versions; an extra that stands for others has theirs."""
    extras: dict[str, dict[str, str]] = {}
    others: dict[str, list[str]] = {}
    for line in lines:
        found = REQUIREMENT.match(line)
        extra = found and re.search(r"extra\s*==\s*['\"]([^'\"]+)", found["marker"] or "")
        if found and extra:
            needed = extras.setdefault(extra[1], {})
            if found["name"] == DISTRIBUTION:
                others.setdefault(extra[1], []).extend(re.findall(r"[\w.-]+", found["extras"] or ""))
            else:
                needed[found["name"]] = found["version"].strip()

    def whole(extra: str, seen: frozenset[str]) -> dict[str, str]:
        inner = {}
        for other in others.get(extra, ()):
            inner |= whole(other, seen | {other}) if other not in seen else {}
        return {**inner, **extras.get(extra, {})}

    return {extra: whole(extra, frozenset({extra})) for extra in extras}


def _version(name: str) -> str | None:
    """The version of a package that is installed; None also where its metadata are damaged."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _state(name: str, version: str) -> tuple[str, bool]:
    """``1.2.3``, or what is too old or not there, and whether nothing is."""
    installed = _version(name)
    if not installed:
        return f"not installed ({version or 'any version'})", False
    least = re.search(r">=\s*([\d.]+)", version)
    fine = least is None or _release(installed) >= _release(least[1])
    return installed if fine else f"{installed} TOO OLD ({version})", fine


def _release(version: str) -> tuple[int, ...]:
    """``(1, 2)`` of ``1.2.0rc1``: the numbers that versions are compared by, without zeros at the end."""
    numbers = [int(number) for number in re.sub(r"[^\d.].*", "", version).split(".") if number]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def main(arguments: Sequence[str]) -> str:
    """What the command prints; an exit with a message where it is none."""
    match arguments:
        case []:
            return report()
        case ["plan", *rest]:
            from fnet.report.planned import main as plan

            return plan(rest)
    raise SystemExit(
        f"python -m fnet {' '.join(arguments)}: expected no argument, or plan (python -m fnet plan --help)"
    )


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]), flush=True)
    except BrokenPipeError:  # as of `| head`: quiet, with the status of a program that SIGPIPE ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None
