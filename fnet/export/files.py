"""Files of tensors, safetensors': written whole or not at all, read without running anything that is in them."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np

from fnet.core.extras import need
from fnet.core.files import first_line, whole_file

DTYPES = ("bool", "float16", "float32", "float64", "bfloat16", "complex64")  # that safetensors writes and reads
DTYPES += tuple(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))
Arrays = dict[str, np.ndarray]


class ExportError(ValueError):
    """A file or a name map cannot be used; the message names it, what was expected, what was found and the remedy."""


def kind(array) -> str:
    """Dtype and shape, as messages show them."""
    return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"


def serialized(arrays: Arrays, about: dict[str, str] | None = None) -> bytes:
    """The tensors as a file holds them; ExportError for what safetensors cannot hold."""
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ExportError(
                f"{name} is of dtype {array.dtype}, which safetensors does not write and read; expected one of "
                f"{', '.join(DTYPES)}: convert it"
            )
    if "__metadata__" in arrays:
        raise ExportError(
            "a leaf is named __metadata__, which is what safetensors calls its own; expected another name: give it one "
            "in the name map"
        )
    # safetensors writes an array's memory as it lies, whatever its strides
    return _safetensors().save({name: np.require(array, requirements="C") for name, array in arrays.items()}, about)


def read_tensors(path: str | Path) -> tuple[Arrays, dict[str, str]]:
    """The tensors of a safetensors file, and what it says of itself."""
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, AttributeError) as error:  # the last for dtypes that NumPy does not have
        raise ExportError(f"{path} cannot be read ({first_line(error)}); expected a whole safetensors file") from error


def digest(arrays: Arrays) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{kind(array)};".encode() + array.tobytes())
    return digest.hexdigest()


def require_new(path: str | Path) -> None:
    """Raise ExportError for a file that exists."""
    if Path(path).exists():
        raise ExportError(f"{path} exists already and is left as it is; expected a file that does not: name another")


@contextlib.contextmanager
def whole_export(path: str | Path):
    """`whole_file` with this module's error."""
    try:
        with whole_file(path) as part:
            yield part
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written ({error.strerror or error}); expected {Path(path).parent} to be a folder with "
            "room that can be"
        ) from error


def _safetensors():
    need("a file of weights", "safetensors")
    import safetensors.numpy

    return safetensors.numpy
