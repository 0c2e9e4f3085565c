"""constraints.txt of what pip froze: ``python .ci/constraints.py 3.11=a.txt 3.12=b.txt > constraints.txt``.

The last Python stands for all later ones, the first for all earlier.
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path

HEADER = """\
# The newest versions that each Python has of what `.[test,lint,docs,compile-cuda,compile-tpu]` and the build install:
# pip's. Made by .ci/constraints.py, see CONTRIBUTING.md.
"""


def main() -> None:
    """Print the pins of all files, with markers where Pythons differ."""
    files = dict(argument.split("=", 1) for argument in sys.argv[1:])
    pythons = sorted(files, key=lambda version: [int(part) for part in version.split(".")])
    pins = {}  # the versions of a package, by Python
    for python in pythons:
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", Path(files[python]).read_text(), re.MULTILINE):
            pins.setdefault(re.sub(r"[-_.]+", "-", name).lower(), {})[python] = version
    print(HEADER, end="")
    for name in sorted(pins):
        spans = [list(span) for _, span in groupby(pythons, pins[name].get)]
        for span in spans:
            version = pins[name].get(span[0])
            since = [] if span[0] == pythons[0] else [f'python_version >= "{span[0]}"']
            until = [] if span[-1] == pythons[-1] else [f'python_version < "{pythons[pythons.index(span[-1]) + 1]}"']
            if version is not None:
                print(f"{name}=={version}" + (f" ; {' and '.join(since + until)}" if since or until else ""))


if __name__ == "__main__":
    main()
