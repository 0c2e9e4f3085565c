"""The audit proves itself: faults are injected into the right gradient of a function, and each must be caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fnet.gradcheck.claims import Claim, by_autodiff, claim
from fnet.gradcheck.judge import judge
from fnet.gradcheck.problem import open_problem, precise
from fnet.gradcheck.report import columns
from fnet.gradcheck.witnesses import FAULT, begin, gather
from fnet.types import PyTree


class Trial(NamedTuple):
    """One injected fault and what the audit said of it."""

    kind: str
    path: str
    caught: bool
    verdict: str
    cause: str


class SelfTest(NamedTuple):
    """Which faults would have been caught in this very setting; ``right`` is the verdict on the right gradient."""

    trials: tuple[Trial, ...]
    right: tuple[str, ...]  # "path: verdict" of every leaf of the right gradient that is neither ok nor at a kink

    @property
    def missed(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if not trial.caught)

    @property
    def ok(self) -> bool:
        """Whether every fault was caught and the right gradient was not blamed."""
        return not self.missed and not self.right

    def __str__(self) -> str:
        kinds = list(dict.fromkeys(trial.kind for trial in self.trials))
        rows = [("fault", "caught", "missed at")]
        for kind in kinds:
            mine = [trial for trial in self.trials if trial.kind == kind]
            missed = ", ".join(f"{trial.path} ({trial.verdict})" for trial in mine if not trial.caught)
            rows.append((kind, f"{sum(trial.caught for trial in mine)}/{len(mine)}", missed))
        caught = sum(trial.caught for trial in self.trials)
        lines = [columns(rows), f"{caught} of {len(self.trials)} faults caught"]
        return "\n".join([*lines, *(f"right gradient, {line}" for line in self.right)])


def self_test(f: Callable, params: PyTree, *args, has_aux: bool = False, seed: int = 0) -> SelfTest:
    """Inject faults of some twenty kinds into ``jax.grad(f)`` at this point, leaf by leaf, and audit each.

    A kind is left out for a leaf that it does not change by at least 1e-6 of its largest entry (a transposed symmetric
    matrix, say). Errors are those of `check_gradients`.

    >>> print(self_test(lambda w: (w**3).sum(), np.array([1.0, 2.0])))  # doctest: +ELLIPSIS
    fault ...
    """
    problem, traced, x64 = open_problem(f, params, args, has_aux)
    with precise(x64):
        right = claim(problem, by_autodiff(problem))
        begun = begin(problem, traced, alone=not traced.custom)
        witnesses = gather(problem, traced, begun, seed, None if traced.custom else right)
        exact = right.grads if witnesses.autodiff is None else witnesses.autodiff
        blamed = []
        for i, path in enumerate(problem.paths):
            verdict = judge(witnesses, right._replace(grads=exact), i).verdict
            if verdict not in ("ok", "kink"):
                blamed.append(f"{path}: {verdict}")
        trials = []
        for i, path in enumerate(problem.paths):
            for kind, faulty in faults(exact, i, problem.examples, seed):
                claimed: Claim = right._replace(grads=[*exact[:i], faulty, *exact[i + 1 :]])
                check = judge(witnesses, claimed, i)
                trials.append(Trial(kind, path, check.verdict == "wrong", check.verdict, check.cause))
    return SelfTest(tuple(trials), tuple(blamed))


def faults(grads: list[np.ndarray], i: int, examples=frozenset(), seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """``(kind, faulty gradient)`` for one leaf of a gradient; only those that change it by a millionth of its scale."""
    g = grads[i]
    scale = float(np.abs(g).max(initial=0))
    rng = np.random.default_rng([seed, i])
    at = tuple(int(rng.integers(n)) for n in g.shape)

    def entry(value):
        changed = g.copy()
        changed[at] = value
        return changed

    found = {"zero": 0 * g, "sign": -g}
    found |= {f"factor {k:g}": k * g for k in (0.5, 2, 1.05, 1.01, 1.001)}
    found |= {"one entry zero": entry(0.0), "one entry off by 2e-6": entry(g[at] + 2e-6 * scale), "nan": entry(np.nan)}
    found["every entry off by 2e-6"] = g + 2e-6 * scale * rng.choice([-1.0, 1.0], g.shape)
    found["one value everywhere"] = np.full_like(g, g.mean() if g.size else 0.0)
    for n in sorted(examples)[:1]:
        found["missing 1/B"] = n * g
    for axis in range(g.ndim):
        row = g.copy()
        row[(slice(None),) * axis + (at[axis],)] = 0
        found[f"a slice of axis {axis} zero"] = row
        found[f"reversed along axis {axis}"] = np.flip(g, axis)
        found[f"shifted along axis {axis}"] = np.roll(g, 1, axis)
        found[f"permuted along axis {axis}"] = np.take(g, rng.permutation(g.shape[axis]), axis)
    if g.ndim == 2 and g.shape[0] == g.shape[1]:
        found["transposed"] = g.T.copy()
    for j, other in enumerate(grads):
        if j != i and other.shape == g.shape:
            found["swapped with another leaf"] = other
    for kind, faulty in found.items():
        with np.errstate(invalid="ignore"):
            if scale and not np.abs(faulty - g).max(initial=0) < FAULT * scale:
                yield kind, faulty
