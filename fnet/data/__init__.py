"""Data in memory: checked before a run, split without loss, and the digits of the examples."""

from fnet.data.arrays import DataError, check_data, split, take
from fnet.data.digits import mnist_5k, mnist_idx, sklearn_digits

__all__ = ["DataError", "check_data", "mnist_5k", "mnist_idx", "sklearn_digits", "split", "take"]
