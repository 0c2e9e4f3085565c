"""What stands beside a run: its configuration as JSON, and the environment that its bits depend on."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.files import first_line, whole_file
from fnet.core.trees import named_leaves
from fnet.runs.run import Run, RunError
from fnet.types import TrainState


def environment() -> dict[str, Any]:
    """What the bits of a run depend on beside its configuration."""
    settings: Any = jax.config
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {
        **versions,
        "fnet": _fnet_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "x64": bool(settings.jax_enable_x64),
        "matmul_precision": settings.jax_default_matmul_precision,
        "prng": settings.jax_default_prng_impl,
        "threefry_partitionable": bool(settings.jax_threefry_partitionable),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _fnet_version() -> str:
    return sys.modules["fnet"].__version__


def as_json(config: Any, name: str = "config") -> Any:
    """The configuration as JSON holds it; RunError names what it cannot hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        if odd := [key for key in config if not isinstance(key, (str, int, float))]:
            raise RunError(f"Run: {name} has the key {odd[0]!r}; expected text, as it is stored in a file")
        return {str(key): as_json(value, f"{name}[{key!r}]") for key, value in config.items()}
    if name != "config" and isinstance(config, (np.ndarray, np.generic, jax.Array)):
        config = np.asarray(config).tolist()
    if name != "config" and isinstance(config, (list, tuple, set, frozenset, range)):
        values = sorted(config, key=repr) if isinstance(config, (set, frozenset)) else config
        return [as_json(value, f"{name}[{i}]") for i, value in enumerate(values)]
    if name != "config" and (config is None or isinstance(config, (str, int, float))):
        return config
    if name != "config" and isinstance(config, (Path, np.dtype, type, enum.Enum)):
        return str(config)
    expected = "a dataclass or a mapping of names to values" if name == "config" else "what JSON holds"
    raise RunError(f"Run: {name} is of type {type(config).__name__}; expected {expected}, as it is stored in a file")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration that a run began with; RunError where its file cannot be read."""
    try:
        if not isinstance(saved := json.loads(path.read_text()), dict):
            raise ValueError("it holds no names and values")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read ({first_line(error)}); expected the configuration that the run began with, as "
            "JSON: put it there, or name another folder"
        ) from error
    return saved


def compare_config(run: Run, folder: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Require the configuration that the run began with, save for the names that are free."""
    held, now = ({name: value for name, value in c.items() if name not in run.free} for c in (saved, given))
    if names := different(held, now):
        raise RunError(
            f"{folder} is a run of another configuration: {in_words(names, held, now, 'as begun')}. "
            "Resume it with its own, which config.json holds, or name another folder"
        )


def different(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The names of what is not the same in both. NaN is NaN here."""
    text = lambda value: json.dumps(value, sort_keys=True)  # noqa: E731
    return sorted(n for n in {**saved, **given} if text(saved.get(n)) != text(given.get(n)))


def in_words(names: Sequence[str], saved: Mapping[str, Any], given: Mapping[str, Any], when: str) -> str:
    """What was saved and what is found, of each of the names."""
    return "; ".join(
        f"{n}: expected {saved.get(n, 'nothing')!r} ({when}), found {given.get(n, 'nothing')!r}" for n in names
    )


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or as it was."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def numbers_of(ts: TrainState) -> dict[str, Any]:
    """The numbers of the optimizer and of the rule to stop by path, which a checkpoint overrides."""
    held = named_leaves({"opt_state": ts.opt_state, "stopping": ts.stopping})
    return {path: shortest(leaf) for path, leaf in held if "hyper" in path.split("/") and leaf.size < 1000}


def shortest(numbers: Any) -> Any:
    """The numbers as they are written: 0.1, where float32 holds 0.10000000149011612."""
    array = np.asarray(numbers)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.tolist()
    return np.array([float(str(number)) for number in array.ravel()]).reshape(array.shape).tolist()
