"""Which members a population has: grids and draws of hyperparameters, crossed with keys; and what is checked of them.

Legend: M members, K keys (seeds), S settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.typing import ArrayLike

from fnet.core.checks import require_counts
from fnet.core.numerics import is_key, stream
from fnet.types import PyTree

Run = Callable[..., PyTree]
Numbers = ArrayLike | Sequence[float]


def grid(**axes: Numbers) -> dict[str, np.ndarray]:
    """Every combination of the values of each axis, the last axis the fastest: a dict of arrays ``(M,)``.

    >>> {name: values.tolist() for name, values in grid(learning_rate=[0.1, 0.3], b1=[0.5, 0.9]).items()}
    {'learning_rate': [0.1, 0.1, 0.3, 0.3], 'b1': [0.5, 0.9, 0.5, 0.9]}
    """
    values = [np.atleast_1d(np.asarray(axis)) for axis in axes.values()]
    for name, axis in zip(axes, values, strict=True):
        if axis.ndim > 1 or not axis.size:
            raise ValueError(f"grid: {name} has shape {axis.shape}; expected a list of one number at least")
    combined = np.meshgrid(*values, indexing="ij")
    return {name: axis.ravel() for name, axis in zip(axes, combined, strict=True)}


def uniform(lo: float, hi: float) -> Callable[[np.ndarray], np.ndarray]:
    """For `draw`: numbers spread evenly from ``lo`` to ``hi``."""
    if not -math.inf < lo < hi < math.inf:
        raise ValueError(f"uniform: from {lo} to {hi}; expected finite lo < hi")
    return lambda u: lo + (hi - lo) * u


def log_uniform(lo: float, hi: float) -> Callable[[np.ndarray], np.ndarray]:
    """For `draw`: numbers whose logarithms are spread evenly from ``lo`` to ``hi``."""
    if not 0 < lo < hi < math.inf:
        raise ValueError(f"log_uniform: from {lo} to {hi}; expected finite 0 < lo < hi")
    return lambda u: lo * (hi / lo) ** u


def draw(key: jax.Array, count: int, **ranges: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """``count`` settings at random: a dict of arrays ``(count,)``.

    A range is `uniform`, `log_uniform` or any function of an array of numbers that are uniform from 0 to 1. What a name
    draws depends on the key and that name alone, so that another range may be added and this one stays.

    >>> settings = draw(jax.random.key(0), 3, learning_rate=log_uniform(1e-4, 1.0), b1=uniform(0.8, 0.99))
    >>> [f"{rate:.2g} {b1:.3f}" for rate, b1 in zip(*settings.values())]
    ['0.29 0.978', '0.17 0.904', '0.048 0.941']
    """
    require_counts("draw", count=count)
    u = {name: np.asarray(jax.random.uniform(stream(key, name), (count,)), np.float64) for name in ranges}
    return {name: values(u[name]) for name, values in ranges.items()}


def crossed(hyper: Mapping[str, Numbers], keys: jax.Array) -> tuple[dict[str, np.ndarray], jax.Array]:
    """Every setting ``(S,)`` with every key ``(K,)``: the hyper and the keys of ``S · K`` members, keys the fastest.

    `train_population` sees that members are crossed so and computes once for all settings what depends on the key
    alone: the order of the examples, the batches and the masks.
    """
    hyper = {name: np.atleast_1d(np.asarray(values)) for name, values in hyper.items()}
    settings = len(next(iter(hyper.values()))) if hyper else 1
    return {name: np.repeat(values, len(keys)) for name, values in hyper.items()}, keys[
        np.tile(np.arange(len(keys)), settings)
    ]


def check_members(who: str, hyper: Mapping[str, Numbers], keys: jax.Array) -> tuple[dict[str, np.ndarray], jax.Array]:
    """The numbers as NumPy floats, as the program will have them; and the keys."""
    if not isinstance(keys, jax.Array) or not is_key(keys) or keys.ndim != 1 or not len(keys):
        found = f"{keys.dtype}{keys.shape}" if isinstance(keys, jax.Array) else type(keys).__name__
        raise TypeError(f"{who}: keys are {found}; expected keys (M,): jax.random.split(jax.random.key(seed), M)")
    arrays = {}
    for name, values in hyper.items():
        values = np.asarray(values)
        if values.dtype.kind not in "biuf":
            raise TypeError(f"{who}: {name} has dtype {values.dtype}; expected numbers")
        if values.shape != keys.shape:
            remedy = "crossed(hyper, keys) makes members of settings and keys"
            raise ValueError(f"{who}: {name} has shape {values.shape}, keys {keys.shape}; expected one each: {remedy}")
        values = values.astype(jax.dtypes.canonicalize_dtype(float))
        if not np.isfinite(values).all():
            i = int((~np.isfinite(values)).argmax())
            raise ValueError(f"{who}: {name} of member {i} is {values[i]}; expected finite numbers")
        arrays[name] = values
    return arrays, keys


def check_range(run: Run, hyper: Mapping[str, np.ndarray], keys: jax.Array, data: tuple) -> PyTree:
    """Trace ``run`` with plain numbers at their extremes, which its constructors check; the shapes of its results.

    A range that holds for the least and for the greatest value of a name holds for all between them. The numbers are
    those of members that exist, as few as show every extreme: of a grid the first and the last.
    """
    some = {name: jax.ShapeDtypeStruct((), values.dtype) for name, values in hyper.items()}
    try:
        results = jax.eval_shape(run, some, keys[0], *data)
    except (TypeError, ValueError) as error:
        if names := _deciding(run, hyper, keys[0], data):
            name, values = names[0], [as_python(value) for value in np.unique(hyper[names[0]])]
            raise ValueError(
                f"{name} decides a shape or what is computed, and members of one program have that in common; expected "
                f"one population for each of {name} = {', '.join(f'{value:g}' for value in values)}, with a run that "
                f"takes it as a Python number: fnet.population.join(populations, {name}=values) makes one of them"
            ) from error
        raise
    extremes = [set(np.flatnonzero(v == edge)) for v in hyper.values() for edge in (v.min(), v.max())] or [{0}]
    while extremes:
        i = min(set.union(*extremes), key=lambda i: (-sum(i in e for e in extremes), i))
        extremes = [e for e in extremes if i not in e]
        numbers = {name: as_python(values[i]) for name, values in hyper.items()}
        try:
            jax.eval_shape(lambda key, *data, numbers=numbers: run(numbers, key, *data), keys[0], *data)
        except ValueError as error:
            shown = ", ".join(f"{name} = {number}" for name, number in numbers.items())
            raise ValueError(f"member {i} ({shown}): {error}") from error
    return results


def _deciding(run: Run, hyper: Mapping[str, np.ndarray], key: jax.Array, data: tuple) -> list[str]:
    """The names with which ``run`` is traced as Python numbers, whole ones as int, but not as traced ones."""
    numbers = {name: as_python(values[0]) for name, values in hyper.items()}
    numbers = {name: int(number) if number == int(number) else number for name, number in numbers.items()}

    def runs(**traced):
        try:
            jax.eval_shape(lambda traced, key, *data: run({**numbers, **traced}, key, *data), traced, key, *data)
        except (TypeError, ValueError):
            return False
        return True

    return [name for name, values in hyper.items() if not runs(**{name: values[0]})] if runs() else []


def as_python(value: np.floating) -> float:
    """The number that is written as this one is: 0.1 for a float32 of 0.1, not 0.10000000149011612."""
    return float(str(value))


def crossing(hyper: Mapping[str, np.ndarray], keys: jax.Array) -> tuple[int, int]:
    """K and S if the members are every setting with every key, as `crossed` orders them; else 1 and M."""
    words = np.asarray(jax.random.key_data(keys))
    seeds = len(np.unique(words, axis=0))
    if len(keys) % seeds == 0:
        tables = [words, *(values[:, None] for values in hyper.values())]
        cells = [table.reshape(len(keys) // seeds, seeds, -1) for table in tables]
        if (cells[0] == cells[0][:1]).all() and all((cell == cell[:, :1]).all() for cell in cells[1:]) and hyper:
            return seeds, len(keys) // seeds
    return 1, len(keys)
