"""Data in memory, mapped or streamed: checked, split without loss; the digits and the spirals of the examples."""

from fnet.data.arrays import DataError, check_data, folds, split, take
from fnet.data.digits import mnist_5k, mnist_idx, sklearn_digits
from fnet.data.spirals import spirals
from fnet.data.streams import Examples, Stream, open_arrays

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
