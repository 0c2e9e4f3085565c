"""How processes begin, and sums that no split changes; what two of them do is in tests/test_several_processes.py."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.core import processes
from fnet.core.checksums import words_sum, words_sums


def test_what_start_needs_and_was_not_given_is_said():
    program = """
import fnet
for given in [(), ("x:12", 2), ("x", 2, 0), ("x:1", 2, 2), ("x:1", 0, 0), ("x:1", "2", 0)]:
    try:
        fnet.processes.start(*given)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = [
        "processes.start: coordinator_address, num_processes, process_id not given, and found neither by SLURM",
        "processes.start: process_id not given, and found neither by SLURM",
        "processes.start: coordinator_address = 'x'; expected the first process' address and a free port of it",
        "processes.start: process_id = 2 of 2 processes; expected one from 0 to 1",
        "processes.start: num_processes = 0; expected a whole number",
        "processes.start: num_processes = '2'; expected a whole number",
    ]
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected)
    assert all(line.startswith(words) for line, words in zip(lines, expected, strict=True)), lines


def test_start_comes_before_anything_of_jax():
    jax.devices()
    with pytest.raises(RuntimeError, match="jax has looked for its devices already; expected this call before"):
        fnet.processes.start("127.0.0.1:1", 2, 0)


def test_one_process_agrees_with_itself():
    assert processes.greatest(3, 1) == [3, 1] and processes.told({"a": 1}) == {"a": 1} and processes.is_first()
    with pytest.raises(OSError, match="mine"), processes.together(ValueError):
        raise OSError("mine")


def by_the_formula(array: np.ndarray) -> int:
    """The sum word by word, in Python's whole numbers."""
    size = min(array.dtype.itemsize, 4)
    held, total = np.ascontiguousarray(array).tobytes(), 0
    for i in range(len(held) // size):
        h = (int.from_bytes(held[i * size : (i + 1) * size], "little") + i * 0x9E3779B9) % 2**32
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        total += h ^ (h >> 16)
    return total % 2**32


@pytest.mark.parametrize("dtype", ["bool", "int8", "float16", "bfloat16", "int32", "float32", "float64", "complex64"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 0), (2, 3, 5)])
def test_a_sum_is_that_of_the_formula_on_the_host_and_on_the_device(dtype, shape, x64):
    values = np.random.default_rng(0).standard_normal(shape) * 3
    array = np.asarray(values, jnp.dtype(dtype))
    assert words_sum(array) == int(words_sums([jnp.asarray(array)])[0]) == by_the_formula(array)


def test_each_flipped_bit_and_two_numbers_that_change_places_change_the_sum():
    array = np.zeros((4, 8), np.float32)
    array[0], array[1] = 1.0, 2.0
    sums = {words_sum(array)}
    for bit in range(8 * array.nbytes):
        other = array.copy()
        other.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
        sums.add(words_sum(other))
    assert len(sums) == 8 * array.nbytes + 1
    assert words_sum(array[[1, 0, 2, 3]]) != words_sum(array) != words_sum(array.T)
