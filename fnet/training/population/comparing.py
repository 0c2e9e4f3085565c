"""What came of a population: the best member, bands over seeds, rankings that say what ties.

Legend: M members, K keys (seeds), S settings, n values that are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from fnet.training.population.members import as_python
from fnet.training.population.train import Population, take_members
from fnet.types import PyTree


class Member(NamedTuple):
    """One of a population: ``run(hyper, key, *data)`` is it alone."""

    index: int
    hyper: dict[str, float]
    key: jax.Array
    value: float
    results: PyTree


def best(population: Population, values: ArrayLike, *, greatest: bool = False) -> Member:
    """The member of the least (or ``greatest``) of ``values (M,)``; of equal ones the first, and never one of NaN.

    ``best(population, population.results["validation_loss"][:, -1])``. The best of many is good by luck too: measure it
    on other data than those that chose it. Raises ValueError if every value is NaN.
    """
    values = per_member("best", population, values, 1)
    if np.isnan(values).all():
        raise ValueError("best: every value is NaN; expected one number at least")
    i = int(np.nanargmax(values) if greatest else np.nanargmin(values))
    hyper = {name: as_python(numbers[i]) for name, numbers in population.hyper.items()}
    return Member(i, hyper, population.keys[i], float(values[i]), take_members(population.results, i))


class Band(NamedTuple):
    """Averages over the members that share a setting, in the order of the settings' numbers."""

    hyper: dict[str, np.ndarray]  # (S,) each
    count: np.ndarray  # (S,) members
    mean: np.ndarray  # (S, ...)
    std: np.ndarray  # of one member, (S, ...)
    low: np.ndarray
    high: np.ndarray


def band(
    population: Population, values: ArrayLike, by: str | Sequence[str] | None = None, *, level: float = 0.95
) -> Band:
    """Mean and confidence band of ``values (M, ...)`` over the members that have the same numbers.

    The band is ``mean ± t s / √n``, s the standard deviation with n − 1 and t Student's quantile, so that it holds the
    mean of all seeds with probability ``level``, as far as values are normal; it is NaN for n = 1, and where a value is
    not finite. ``by`` are the names that tell settings apart, by default all; over the other names, as over seeds, is
    averaged. Raises ValueError for an unknown name and a level that is not between 0 and 1.
    """
    values = per_member("band", population, values)
    numbers, group = settings_of(population, by)
    counts = np.bincount(group)
    parts = [student(values[group == g], level) for g in range(len(counts))]
    mean, std, half = (np.stack(part) for part in zip(*parts, strict=True))
    return Band(numbers, counts, mean, std, mean - half, mean + half)


class Ranking(NamedTuple):
    """Settings, the best first; see `ranking`."""

    hyper: dict[str, np.ndarray]  # (S,) each
    count: np.ndarray  # (S,) members
    mean: np.ndarray  # (S,), as in a Band
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    shared: np.ndarray  # seeds that a setting has in common with the best
    difference: np.ndarray  # its mean value on these less the best's
    difference_low: np.ndarray
    difference_high: np.ndarray
    tied: np.ndarray  # whether the interval of the difference holds 0


def ranking(population: Population, values: ArrayLike, *, greatest: bool = False, level: float = 0.95) -> Ranking:
    """Settings by the mean of ``values (M,)`` over seeds, least (or ``greatest``) first, and what ties with the best.

    The same key gives the same start, batches and masks at every setting, so a setting is compared with the best seed
    by seed: the interval is that of the mean of the differences over the seeds that both have, ``± t s / √n``. Where it
    holds 0, or there are fewer than two such seeds, the setting is ``tied``: these runs do not tell it from the best.
    The level is that of each comparison: of settings that truly tie, one in twenty is told apart at 0.95 from one that
    was fixed beforehand, and more from the luckiest. A setting with a value that is not finite comes last, not tied.

    Raises ValueError if two members have the same numbers and key, no setting has finite values only, or the level is
    not between 0 and 1.
    """
    values = per_member("ranking", population, values, 1)
    b = band(population, values, level=level)
    _, group = settings_of(population)
    _, seed = np.unique(np.asarray(jax.random.key_data(population.keys)), axis=0, return_inverse=True)
    pairs = np.stack([group, seed.ravel()], 1)
    if len(np.unique(pairs, axis=0)) < len(pairs):
        raise ValueError("ranking: two members have the same numbers and the same key; expected each pair once")
    finite = np.isfinite(b.mean)
    if not finite.any():
        raise ValueError("ranking: no setting has finite values only; expected one at least")
    order = np.lexsort((-b.mean if greatest else b.mean, ~finite))
    table = np.full((len(order), seed.max() + 1), np.nan)  # (S, K)
    table[group, seed.ravel()] = values
    with np.errstate(invalid="ignore"):
        differences = table - table[order[0]]
    rows = [d[np.isfinite(d)] for d in differences]
    compared = [student(d, level) if len(d) and ok else (np.nan,) * 3 for d, ok in zip(rows, finite, strict=True)]
    mean, _, half = np.array(compared).T
    tied = finite & ~((mean - half > 0) | (mean + half < 0))  # half is NaN for one seed
    fields = (*b[1:], np.array([len(d) for d in rows]), mean, mean - half, mean + half, tied)
    return Ranking({name: v[order] for name, v in b.hyper.items()}, *(field[order] for field in fields))


def settings_of(
    population: Population, by: str | Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The settings that differ in the names ``by`` (default: all), sorted, ``(S,)`` each; each member's, ``(M,)``."""
    hyper = population.hyper
    names = list(hyper) if by is None else [by] if isinstance(by, str) else list(by)
    for name in names:
        if name not in hyper:
            raise ValueError(f"no hyperparameter is called {name!r}; there are {', '.join(hyper) or 'none'}")
    table = np.stack([np.zeros(len(population.keys)), *(hyper[name] for name in names)], 1)
    _, first, group = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return {name: hyper[name][first] for name in names}, group.ravel()


def student(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and half the width of Student's interval of the mean, over the first axis ``n``."""
    if not 0 < level < 1:
        raise ValueError(f"level = {level}; expected 0 < level < 1, as 0.95")
    from scipy.special import stdtrit  # jax needs scipy; it costs 0.2 s to import

    n = len(values)
    with np.errstate(invalid="ignore"):
        mean = values.mean(0)
        std = values.std(0, ddof=1) if n > 1 else np.full_like(mean, np.nan)
    return mean, std, stdtrit(max(n - 1, 1), (1 + level) / 2) * std / math.sqrt(n)


def per_member(who: str, population: Population, values: ArrayLike, ndim: int | None = None) -> np.ndarray:
    """The values in float64, of which there must be one for each member."""
    values, members = np.asarray(values, np.float64), len(population.keys)
    if values.shape[:1] != (members,) or (ndim and values.ndim != ndim):
        shape = f"({members},)" if ndim else f"({members}, ...)"
        raise ValueError(f"{who}: values have shape {values.shape}; expected {shape}, one each of the members")
    return values
