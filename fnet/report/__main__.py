"""The page of a run, or of several side by side.

python -m fnet.report runs/A                    writes runs/A/report.html, also of an experiment's folder
python -m fnet.report runs/A runs/B             writes comparison.html
python -m fnet.report runs/A --output a.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fnet.report.run import write_comparison, write_report
from fnet.runs.run import RunError


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of the folders that the command line names, and say where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m fnet.report", description="Write the page of a run's folder, or one that compares several."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", type=Path, help="of a run, e.g. runs/A")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="the page to write; by default FOLDER/report.html, and comparison.html of several folders",
    )
    options = parser.parse_args(arguments)
    try:
        if len(options.folders) == 1:
            path = write_report(options.folders[0], options.output)
        else:
            path = write_comparison(options.folders, options.output or "comparison.html")
    except (RunError, OSError) as error:
        parser.error(str(error))
    print(path)


if __name__ == "__main__":
    main()
