"""Which checkpoints a folder holds: the newest whole one, the best; and a trained model in one line, `load_run`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import require_layer
from fnet.layers.children import init_of
from fnet.runs.checkpoint import CheckpointError, load_checkpoint, read_meta, saved_results, saved_steps
from fnet.runs.run import RunError
from fnet.types import Layer, PyTree


def newest_whole(newest_first: Sequence[Path]) -> tuple[str, dict[str, Any]] | None:
    """The name and the meta of the newest checkpoint that is whole."""
    for path in newest_first:
        try:
            return path.name, read_meta(path)
        except CheckpointError:
            continue
    return None


def _meta_of(steps: Mapping[int, Path], at: int) -> dict[str, Any]:
    """What a checkpoint says of itself; where it is damaged the error names an older one that is whole."""
    try:
        return read_meta(steps[at])
    except CheckpointError as error:
        whole = newest_whole([path for step, path in steps.items() if step < at][::-1])
        remedy = f". {whole[0]} is whole: load_run(..., which={whole[1]['step']}) takes it" if whole else ""
        raise CheckpointError(f"{error}{remedy}") from error


def best_first(results: Mapping[int, Mapping[str, Any] | None], rule: Mapping[str, Any]) -> list[int]:
    """The steps with a finite result that the rule looks at, the best first, of equal ones the first.

    ``results`` are `saved_results` by step. A rule is a ``name``, whether the ``greatest`` is sought, and ``after`` and
    ``until`` which step.
    """
    sign, known = -1 if rule["greatest"] else 1, {}
    for step in looked_at(results, rule):
        value = (results[step] or {}).get(rule["name"])
        if isinstance(value, int | float) and np.isfinite(value):
            known[step] = sign * value
    return sorted(known, key=lambda step: (known[step], step))


def looked_at(steps: Iterable[int], rule: Mapping[str, Any]) -> list[int]:
    """The steps whose results a rule compares."""
    return [step for step in steps if rule["after"] < step <= (rule["until"] or step)]


def load_run(folder: str | Path, model: Layer, x: PyTree, which: str | int = "last") -> tuple[PyTree, PyTree]:
    """``params, state`` of a model that a run has trained; nothing is written, and the optimizer is not needed.

    Args:
        folder: of the run.
        model: as it was trained.
        x: inputs like those that it was made for, or their shapes.
        which: "last", the step of a checkpoint that is there, or "best": that of ``Run(keep_best=...)``, or else what
            `early_stopping` kept.

    Raises RunError where the folder holds no such checkpoint, CheckpointError where it is damaged or another model's.

    >>> from fnet.layers import dense
    >>> load_run("gone", dense(1), jnp.ones((1, 1)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fnet.runs.run.RunError: ...gone holds no checkpoints; expected the folder of a run: fnet.Run(folder) keeps them
    """
    require_layer("load_run: model", model)
    folder = Path(folder).expanduser().absolute()
    steps = saved_steps(folder / "checkpoints")
    if not steps:
        raise RunError(f"{folder} holds no checkpoints; expected the folder of a run: fnet.Run(folder) keeps them")
    shapes = jax.eval_shape(lambda key: init_of(model, key, x), jax.random.key(0))
    params, state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    last = list(steps)[-1]
    if which != "best":
        at = last if which == "last" else which
        if isinstance(at, bool) or not isinstance(at, int | np.integer) or at not in steps:
            there = ", ".join(map(str, steps))
            raise RunError(f"load_run: which = {which!r}; expected 'last', 'best' or the step of a checkpoint: {there}")
        meta = _meta_of(steps, int(at))
        loaded = load_checkpoint(steps[at], {"params": params, "state": state}, meta, parts=("params", "state"))
        return loaded["params"], loaded["state"]
    whole = newest_whole(list(steps.values())[::-1])  # where the last is damaged the best need not be
    if whole and whole[1]["best"]:
        rule = whole[1]["best"][-1]
        results = {step: saved_results(steps[step]) for step in looked_at(steps, rule)}
        for step, found in results.items():
            if found is None:  # it may be the best
                read_meta(steps[step])
        ranked = best_first(results, rule)
        if not ranked:
            since = f" after step {rule['after']}" if rule["after"] else ""
            raise RunError(
                f"{folder} has no checkpoint with a finite {rule['name']}{since}; expected one: which='last' takes its "
                "last"
            )
        return load_run(folder, model, x, ranked[0])
    meta = _meta_of(steps, last)  # which alone holds what its rule has kept
    if not any(leaf["path"].startswith("stopping/weights/") for leaf in meta["leaves"]):
        raise RunError(
            f"{folder} kept no best state; expected a run with Run(keep_best='validation_loss') or early_stopping: "
            "which='last' takes its last"
        )
    best = jnp.zeros((), next(leaf["kind"] for leaf in meta["leaves"] if leaf["path"] == "stopping/best").split("(")[0])
    like = {"stopping": {"best": best, "weights": {"0": params, "1": state}}}
    kept = load_checkpoint(steps[last], like, meta, parts=("stopping/best", "stopping/weights"))["stopping"]
    if not np.isfinite(kept["best"]):
        raise RunError(
            f"{folder}: no evaluation was made, or none was finite, so that there is no best state; expected a finite "
            "result of one evaluation at least: which='last' takes its last"
        )
    return kept["weights"]["0"], kept["weights"]["1"]
