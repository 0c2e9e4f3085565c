"""Checkpoints: a `TrainState` in a folder of its own, whole or not at all, every leaf with its sum (needs orbax).

    folder/step_000000250/state          the arrays, as orbax keeps them
    folder/step_000000250/meta           JSON: the step; path, dtype, shape and sum of every leaf; what the run adds
    folder/step_000000250/manifest.json  the SHA-256 of every file, and the results of the evaluation made here

Nothing is pickled, and nothing that is read can run code. A checkpoint is written under another name and renamed when
it is complete; one that is deleted is renamed first. Of several processes all call these functions: each writes and
reads its part of every leaf, and a leaf's sum (`fnet.core.checksums`) is the same however it is split.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core import processes
from fnet.core.checksums import words_sum, words_sums
from fnet.core.extras import need
from fnet.core.files import first_line
from fnet.core.numerics import is_key, with_words, words_of
from fnet.core.trees import by_path
from fnet.types import PyTree

FORMAT = 3
_NAME = re.compile(r"step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint cannot be written or does not fit; the message names the place, what was expected and the remedy."""


class KeptLeaf(NamedTuple):
    """A leaf as it is written; of a key its words, while ``kind`` is the leaf's own dtype and shape."""

    path: str
    kind: str
    array: np.ndarray | jax.Array  # on the host; where each process has a part of it, there


def kept_leaves(tree: PyTree) -> list[KeptLeaf]:
    """The leaves of a tree by path and in order, on the host unless several processes have them."""
    named = _named(tree)
    arrays = {path: words_of(leaf) for path, leaf in named.items()}
    if not _is_of_several(arrays):
        arrays = {path: np.asarray(a) for path, a in zip(arrays, jax.device_get([*arrays.values()]), strict=True)}
    return [KeptLeaf(path, _kind(leaf), arrays[path]) for path, leaf in named.items()]


def _is_of_several(arrays: Mapping[str, Any]) -> bool:
    """Whether processes have parts of them."""
    return any(isinstance(a, jax.Array) and not a.is_fully_addressable for a in arrays.values())


def _sums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Of each array the sum of its words."""
    if _is_of_several(arrays):
        return dict(zip(arrays, map(int, jax.device_get(words_sums([*arrays.values()]))), strict=True))
    return {path: words_sum(np.asarray(a)) for path, a in arrays.items()}


def save_checkpoint(
    folder: str | Path,
    step: int,
    leaves: list[KeptLeaf],
    meta: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
) -> Path:
    """Write ``leaves`` (`kept_leaves`) and ``meta``, which JSON must hold, to ``folder/step_…``; returns that folder.

    With ``verify`` it is read back, and every leaf compared, before it has that name. Raises CheckpointError if it
    exists, if the disk has no room for it, if it cannot be written, and if it does not come back as it was.
    """
    path = Path(folder).absolute() / f"step_{step:09d}"
    with processes.together(CheckpointError) as first:
        if first:
            _require_room(path, sum(leaf.array.nbytes for leaf in leaves))
    sums = _sums({leaf.path: leaf.array for leaf in leaves})
    described = [{"path": leaf.path, "kind": leaf.kind, "sum": sums[leaf.path]} for leaf in leaves]
    arrays = {f"{i:05d}": leaf.array for i, leaf in enumerate(leaves) if leaf.array.size}  # orbax takes no empty ones
    meta = {**(meta or {}), "format": FORMAT, "step": step, "leaves": described}
    part = path.with_name(f".writing_{path.name}")
    try:
        with _orbax() as (ocp, checkpointer):
            state = ocp.args.PyTreeSave(arrays or {"none": np.zeros(1)})
            checkpointer.save(part, ocp.args.Composite(state=state, meta=ocp.args.JsonSave(meta)))
        write_manifest(part, meta.get("results", {}))
        if verify:
            _read_leaves(part, meta, {leaf.path: leaf.array for leaf in leaves})
        with processes.together(CheckpointError) as first:
            if first:
                os.rename(part, path)
    except (OSError, ValueError) as error:
        failed = CheckpointError(
            f"{path} could not be written ({first_line(error)}); expected a folder with room that can be written to; "
            "the checkpoints before it are whole"
        )
        raise (processes.of_all(failed) if processes.is_of_all(error) else failed) from error
    return path


def _require_room(path: Path, size: int) -> None:
    if path.exists():
        raise CheckpointError(f"{path} exists already and is left as it is; expected a step that is not saved yet")
    free = shutil.disk_usage(path.parent).free
    if free < 1.1 * size + 100_000:
        raise CheckpointError(
            f"{path} needs {size / 1e6:.3f} MB and {free / 1e6:.3f} MB are free; expected room for it: "
            "free some, or choose another folder; the checkpoints before it are whole"
        )


def load_checkpoint(
    path: str | Path, like: PyTree, meta: Mapping[str, Any], *, parts: Sequence[str] | None = None
) -> PyTree:
    """The tree that was saved in the folder ``path`` with this `read_meta`; ``like`` has its structure and shapes.

    With ``parts``, paths of branches such as "params", ``like`` holds these alone, and no others are read.

    Raises CheckpointError where the folder is no whole checkpoint, where a leaf is missing, not expected, or of another
    shape or dtype (all of them named), and where a leaf is not what was saved.
    """
    path, expected = Path(path).absolute(), _named(like)
    found = {saved["path"]: saved["kind"] for saved in meta["leaves"]}
    if parts is not None:
        within = tuple(f"{part}/" for part in parts)
        found = {name: kind for name, kind in found.items() if f"{name}/".startswith(within)}
    _compare(path, {name: _kind(leaf) for name, leaf in expected.items()}, found)
    arrays = _read_leaves(path, meta, {name: words_of(leaf) for name, leaf in expected.items()})
    leaves = [_as_leaf(arrays[name], leaf) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _read_leaves(path: Path, meta: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Some of a checkpoint's leaves by path, each with the sum that it was saved with.

    They are on the host, or where processes have parts of ``like``, on its devices, for which each reads its part.
    """
    saved = {leaf["path"]: (f"{i:05d}", leaf["sum"]) for i, leaf in enumerate(meta["leaves"])}
    split = _is_of_several(like)
    empty = dict(like) if split else {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in like.items()}
    wanted = {saved[name][0]: array for name, array in empty.items() if array.size}
    try:
        with _orbax() as (ocp, checkpointer):
            arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
            restore = ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)
            stored = checkpointer.restore(path, ocp.args.Composite(state=restore)).state if wanted else {}
    except Exception as error:  # orbax and tensorstore raise errors of many types
        raise _damaged(path, error) from error
    arrays = {name: stored.get(saved[name][0], array) for name, array in empty.items()}
    arrays = arrays if split else {name: np.asarray(array) for name, array in arrays.items()}
    sums = _sums(arrays)
    with processes.together(CheckpointError):
        for name, found in sums.items():
            if found != (expected := saved[name][1]):
                raise CheckpointError(
                    f"{path}: {name} is not what was saved: expected the sum {expected:08x}, found {found:08x}; it was "
                    "altered: delete this folder to continue from the checkpoint before it"
                )
    return arrays


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself; CheckpointError where it is none, or none of this format."""
    path = Path(path).absolute()
    _verify_files(path)
    try:
        with _orbax() as (ocp, checkpointer):
            meta = checkpointer.restore(path, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if not isinstance(meta, dict) or "format" not in meta or not isinstance(meta.get("leaves"), list):
            raise ValueError("it has no list of leaves")
    except Exception as error:
        raise _damaged(path, error) from error
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {meta['format']}; expected {FORMAT}: read it with the fnet that wrote it"
        )
    if (named := _NAME.fullmatch(path.name)) and int(named[1]) != meta["step"]:
        raise CheckpointError(
            f"{path} was made at step {meta['step']}; expected its folder under its own name: step_{meta['step']:09d}"
        )
    return meta


def saved_steps(folder: str | Path) -> dict[int, Path]:
    """The complete checkpoints in a folder by step, the oldest first."""
    paths = [path for path in Path(folder).glob("step_*") if path.is_dir()]
    return dict(sorted((int(match[1]), path) for path in paths if (match := _NAME.fullmatch(path.name))))


def delete_checkpoint(path: Path) -> None:
    """Delete it so that at no moment a part of it looks whole."""
    gone = path.with_name(f".deleted_{path.name}")
    os.rename(path, gone)
    _remove(gone)


def sweep(folder: str | Path) -> None:
    """Remove what a killed process left of a checkpoint that it wrote or deleted."""
    for path in (*Path(folder).glob(".deleted_*"), *Path(folder).glob(".writing_*")):
        _remove(path)


def _remove(path: Path) -> None:
    """A folder and what is in it; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_manifest(path: Path, results: Mapping[str, Any]) -> None:
    """Write manifest.json of the files that are in the folder."""
    files = _hashes(path)
    with processes.together(OSError) as first:
        if first:
            (path / "manifest.json").write_text(json.dumps({"results": results, "files": files}, indent=1))


def saved_results(path: Path) -> dict[str, Any] | None:
    """The results of the evaluation that was made at a checkpoint; None where its manifest is damaged."""
    try:
        return dict(json.loads((path / "manifest.json").read_text())["results"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


_one_at_a_time = threading.RLock()  # orbax numbers its operations by process, not by thread


@contextmanager
def _orbax() -> Iterator[tuple[Any, Any]]:
    """Orbax, and a checkpointer for one call."""
    ocp: Any = need("a checkpoint", "orbax.checkpoint")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what it logs as an error, pages of it, it raises too
    every = {}
    if processes.several():  # whose barriers are then of jax's service, not programs among those of the run
        every = {"multiprocessing_options": ocp.options.MultiprocessingOptions(0, {*range(jax.process_count())})}
    parts = {"state": ocp.PyTreeCheckpointHandler(**every), "meta": ocp.JsonCheckpointHandler(**every)}
    with _one_at_a_time, ocp.Checkpointer(ocp.CompositeCheckpointHandler(**parts), **every) as checkpointer:
        yield ocp, checkpointer


def _named(tree: PyTree) -> dict[str, jax.Array]:
    try:
        return {path: jnp.asarray(leaf) for path, leaf in by_path(tree).items()}
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _as_leaf(array: np.ndarray | jax.Array, like: jax.Array) -> jax.Array:
    """The array as ``like`` is: a key, and on its devices."""
    if isinstance(array, jax.Array):  # on them already
        whole = jax.jit(lambda words: with_words(like, words), out_shardings=like.sharding)
        return whole(array) if is_key(like) else array
    leaf = with_words(like, jnp.array(array))
    return leaf if leaf.sharding == like.sharding else jax.device_put(leaf, like.sharding)


def _kind(leaf: jax.Array) -> str:
    return f"{leaf.dtype}{leaf.shape}"


def _hashes(path: Path) -> dict[str, str]:
    """The SHA-256 of every file within, but for the manifest's; each process reads its share of them."""
    names: list[str] = []
    with processes.together(OSError) as first:
        if first:
            files = sorted(file for file in path.rglob("*") if file.is_file() and file != path / "manifest.json")
            names = [file.relative_to(path).as_posix() for file in files]
    names = processes.told(names)
    with processes.together(OSError):
        mine = names[processes.index() :: processes.count()]
        hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in mine}
    return processes.agreed(hashes, lambda every: dict(sorted(pair for some in every for pair in some.items())))


def _verify_files(path: Path) -> None:
    """Require the files that were written: what orbax and tensorstore say of damaged ones is long and helps nobody."""
    try:
        with processes.together(OSError):
            expected = dict(json.loads((path / "manifest.json").read_text())["files"])
        found = _hashes(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if more := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{path} holds {', '.join(more[:5])}, which fnet did not write; expected its own files alone: move it away"
        )
    for name in expected:
        if (want := expected[name][:12]) != (have := found.get(name, "no such file")[:12]):
            raise _damaged(path / name, ValueError(f"expected SHA-256 {want}, found {have}"))


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or not fnet's ({first_line(error)}); expected a checkpoint as fnet wrote it: "
        "delete its folder to continue from the checkpoint before it"
    )


def _compare(path: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Name the leaves that differ, 5 of them at most."""
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if names:
        lines = [f"{n}: expected {expected.get(n, 'nothing')}, found {found.get(n, 'nothing')}" for n in names[:5]]
        more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
        halved = all(str(expected.get(n)).replace("32", "64") == str(found.get(n)).replace("32", "64") for n in names)
        raise CheckpointError(
            f"{path} is of another {'jax_enable_x64' if halved else 'model or optimizer'}: {'; '.join(lines)}{more}. "
            f"{'Set it as it was' if halved else 'Give the one it was saved from'}, or another folder to start in"
        )
