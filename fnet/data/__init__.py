"""Data in memory, mapped or streamed: checked, split without loss, read ahead.

- `arrays`: the one door through which all that people hold becomes arrays; `check_data`, `split`, `folds`, `take`
- `streams`: datasets, loaders and mapped files, read by a thread while a run goes on
- `digits` and `spirals`: what the examples train on

Imports types and core alone.
"""

from fnet.data.arrays import DataError, check_data
from fnet.data.digits import mnist_5k, mnist_idx, sklearn_digits
from fnet.data.sources import Examples, Stream, open_arrays
from fnet.data.spirals import spirals
from fnet.data.splits import folds, split, take

__all__ = [
    "DataError",
    "Examples",
    "Stream",
    "check_data",
    "folds",
    "mnist_5k",
    "mnist_idx",
    "open_arrays",
    "sklearn_digits",
    "spirals",
    "split",
    "take",
]
