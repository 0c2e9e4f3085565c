"""What every experiment shares: run folders."""

from __future__ import annotations

import time
from pathlib import Path


def new_run_folder(root: str | Path, experiment: str, name: str | None) -> Path:
    """Make and return ``root/experiment/name``, by default named by the clock. An existing folder is refused."""
    folder = Path(root) / experiment / (name or time.strftime("%Y%m%d-%H%M%S"))
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SystemExit(f"{folder} exists already and is left as it is: choose another --name") from None
    return folder
