"""Packages that only parts of fnet need: imported where they are used, and named with the command that installs them.

The name on the package index is not the name that is imported: "fnet" there is somebody else's.
"""

from __future__ import annotations

import importlib
from types import ModuleType

DISTRIBUTION = "fnet-jax"
EXTRAS = {  # as in pyproject.toml: which extra brings which package
    "flatbuffers": "runs",
    "grain": "streams",
    "jax_cuda12_plugin": "compile-cuda",
    "libtpu": "compile-tpu",
    "matplotlib": "plots",
    "mlflow": "loggers",
    "nvidia.cuda_nvcc": "compile-cuda",
    "orbax.checkpoint": "runs",
    "rich": "runs",
    "safetensors": "runs",
    "tensorboardX": "runs",
    "wandb": "loggers",
}


def need(what: str, package: str) -> ModuleType:
    """The package, imported; ImportError says that ``what`` needs it, and how it is installed.

    >>> need("a table", "flatbuffers").__name__
    'flatbuffers'
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        command = f"pip install '{DISTRIBUTION}[{EXTRAS[package]}]'"
        raise ImportError(f"{what} needs {package.split('.')[0]}: {command}") from error
