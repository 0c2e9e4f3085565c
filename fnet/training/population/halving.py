"""Successive halving: all settings for a while, and the better half for longer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import require_counts
from fnet.training.population.members import Numbers, check_members, check_range
from fnet.training.population.train import check_memory, run_members, take_members
from fnet.types import PyTree


class Halving(NamedTuple):
    """Who ran how long with which score: see `successive_halving`."""

    hyper: dict[str, np.ndarray]  # (M,) each
    keys: jax.Array  # (M,)
    epochs: np.ndarray  # (M,) that each member ran in all
    scores: np.ndarray  # (rungs, M), NaN where a member no longer ran
    survivors: np.ndarray  # members that ran to the end, the best first
    states: PyTree  # theirs, in the same order
    compile_seconds: float
    run_seconds: float


def successive_halving(
    begin: Callable,
    resume: Callable,
    hyper: Mapping[str, Numbers],
    keys: jax.Array,
    *data: PyTree,
    rungs: Sequence[int] = (1, 1, 2, 4),
    keep: float = 0.5,
    greatest: bool = False,
    memory: float | None = None,
    devices: Sequence[Any] | None = None,
) -> Halving:
    """All members run a little, the better part of them runs on, and again: most time goes to those that are good.

    Args:
        begin: ``begin(hyper, key, *data) -> state``, a pure function; the state is any tree of arrays, such as a
            `fnet.TrainState`.
        resume: ``resume(hyper, state, *data, epochs) -> state, score`` runs on for so many epochs (a Python int) and
            scores where it stands, on data that are not trained on; less is better unless ``greatest``.
        rungs: epochs of each rung.
        keep: the share of its members, rounded up, that goes on after each rung but the last; a score of NaN never
            comes before a number.
        hyper, keys, data, memory, devices: as in `train_population`.

    Each rung is one compiled program, for the members that are left. A member that goes on goes on from its state, so
    that it ends as the run that was never stopped. Source: Jamieson and Talwalkar, arXiv:1502.07943, where a setting
    is a random draw, and ``keep`` is 1/η.

    Raises:
        ValueError: as `train_population`; rungs that are not whole numbers of at least 1, a ``keep`` out of 0..1, a
            score that is not one number.
    """
    hyper, keys = check_members("successive_halving", hyper, keys)
    if not isinstance(rungs, Sequence) or not rungs:
        raise ValueError(f"successive_halving: rungs = {rungs!r}; expected a list of epochs, (1, 1, 2) for example")
    require_counts("successive_halving", **{f"rungs[{i}]": epochs for i, epochs in enumerate(rungs)})
    check_memory("successive_halving", memory)
    if not 0 < keep <= 1:
        raise ValueError(f"successive_halving: keep = {keep}; expected 0 < keep <= 1")
    data = jax.tree.map(jnp.asarray, data)
    devices = list(jax.local_devices() if devices is None else devices)

    def first(hyper, key, *data):
        return resume(hyper, begin(hyper, key, *data), *data, epochs=rungs[0])

    def further(epochs):
        def further(hyper, state, *data):
            return resume(hyper, state, *data, epochs=epochs)

        return further

    score = check_range(first, hyper, keys, data)[1]
    if score.shape != ():
        raise ValueError(f"successive_halving: the score has shape {score.shape}; expected one number")
    alive, states = np.arange(len(keys)), keys
    ran, scores, seconds = np.zeros(len(keys), int), np.full((len(rungs), len(keys)), np.nan), np.zeros(2)
    for i, epochs in enumerate(rungs):
        function, members = further(epochs) if i else first, (take_members(hyper, alive), states)
        (states, score), cost = run_members(function, members, data, None, memory=memory, devices=devices)
        ran[alive] += epochs
        score = np.asarray(score, np.float64)  # of any dtype: argsort puts NaN last, and −1 is less than 0
        scores[i, alive] = score
        seconds += cost.compile_seconds, cost.run_seconds
        order = np.argsort(-score if greatest else score, kind="stable")  # NaN last
        if i + 1 < len(rungs):
            order = order[: max(math.ceil(keep * len(alive) - 1e-9), 1)]
        alive, states = alive[order], take_members(states, order)
    return Halving(hyper, keys, ran, scores, alive, states, *seconds.tolist())
