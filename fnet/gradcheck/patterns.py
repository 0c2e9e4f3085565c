"""What a wrong gradient looks like beside the right one: a factor, a sign, a permutation, part of the entries."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np


def pattern(
    c: np.ndarray,
    e: np.ndarray,
    others: Mapping[str, np.ndarray] | None = None,
    examples: frozenset[int] = frozenset(),
    tol: float = 1e-7,
) -> str:
    """What a claimed array ``c`` is to the expected ``e``; ``others`` are the expected gradients of other leaves.

    ``examples`` are sizes that an average may have been taken over. Empty where no pattern fits.
    """
    if not np.isfinite(c).all():
        bad = np.argwhere(~np.isfinite(c))
        return f"not finite in {len(bad)} of {c.size} entries, first at {bad[0].tolist()}"
    if not e.any():
        return "not zero, yet the function does not change with this leaf" if c.any() else ""

    def same(a, b):
        return np.abs(a - b).max(initial=0) <= tol * max(np.abs(a).max(initial=0), np.abs(b).max(initial=0))

    if not c.any():
        return "zero: never receives a gradient"
    whole = proportion(c, e, examples, tol)
    if whole:
        return whole
    if c.ndim > 1:
        for axes in itertools.permutations(range(c.ndim)) if c.ndim < 5 else ():
            if axes != tuple(range(c.ndim)) and e.transpose(axes).shape == c.shape and same(c, e.transpose(axes)):
                return "transposed" if c.ndim == 2 else f"transposed: axes {axes}"
    for path, other in (others or {}).items():
        if other.shape == c.shape and other.any() and same(c, other):
            return f"swapped: holds the gradient of {path}"
        if other.shape == c.shape[::-1] and c.ndim == 2 and other.any() and same(c, other.T):
            return f"swapped: holds the gradient of {path}, transposed"
    bad = np.abs(c - e) > tol * np.abs(e).max()
    local = confined(c, e, bad, examples, tol)
    if local:
        return local
    for axis in range(c.ndim):
        if c.shape[axis] > 1:
            if same(c, np.flip(e, axis)):
                return f"reversed along axis {axis}"
            for k in (1, -1, 2, -2):
                inner = np.take(c, range(max(k, 0), c.shape[axis] + min(k, 0)), axis)
                moved = np.take(e, range(max(-k, 0), c.shape[axis] + min(-k, 0)), axis)
                if inner.shape[axis] > 1 and moved.any() and same(inner, moved):
                    return f"shifted by {k} along axis {axis} (padding or time off by {abs(k)})"
    for axis, name in enumerate(axis_names(c.ndim)):
        if c.shape[axis] > 1 and permuted(c, e, axis, tol):
            return f"{plural(name)} permuted"
    if same(np.sort(c.ravel()), np.sort(e.ravel())):
        return "entries permuted"
    total = abs(c.sum() - e.sum()) <= tol * max(np.abs(e).sum(), np.abs(c).sum())
    if c.size > 1 and np.ptp(c) <= tol * np.abs(c).max():
        return "summed over the wrong axis: one value everywhere"
    flat = c.ndim == 1 or any(np.ptp(c, axis=k).max() <= tol * np.abs(c).max() for k in range(c.ndim) if c.shape[k] > 1)
    if total and flat and abs(e.sum()) > 1e-6 * np.abs(e).sum():
        return "summed over the wrong axis (the total is right)"
    shift = c - e
    if c.size > 1 and np.ptp(shift) <= tol * np.abs(shift).max():
        return f"a constant {shift.flat[0]:.3g} is added"
    return ""


def proportion(c, e, examples, tol) -> str:
    """``sign``, ``factor 0.5``, ``missing 1/B`` where ``c`` is a multiple of ``e``; else empty."""
    factor = float((c * e).sum() / (e * e).sum()) if e.any() else 0.0
    if factor == 0 or np.abs(c - factor * e).max() > tol * np.abs(c).max():
        return ""
    near = lambda a, b: abs(a - b) <= 1e-6 * abs(b)  # noqa: E731
    if near(factor, 1):
        return ""
    if near(factor, -1):
        return "sign"
    for n in sorted(examples):
        if n > 2 and near(abs(factor), n):
            return f"missing 1/B (factor {factor:.6g})"
        if n > 2 and near(abs(factor), 1 / n):
            return f"1/B too often (factor {factor:.6g} = 1/{n})"
        if n > 2 and (near(factor, (n - 1) / n) or near(factor, n / (n - 1))):
            return f"factor {factor:.6g}: B - 1 for B = {n}, or the other way round"
    return f"factor {factor:.6g}"


def axis_names(ndim: int) -> list[str]:
    """What a slice along each axis is called."""
    return {1: ["entry"], 2: ["row", "column"]}.get(ndim, [f"slice of axis {axis}" for axis in range(ndim)])


def confined(c, e, bad, examples, tol) -> str:
    """Where the wrong entries lie, if they are one entry or few slices along one axis, and what they are."""
    where = np.argwhere(bad)
    if len(where) == 1 and c.size > 1:
        index = tuple(where[0])
        return f"entry {[int(k) for k in index]} {what(c[index], e[index], examples, tol)}"
    for axis, name in enumerate(axis_names(c.ndim)):
        hit = np.unique(where[:, axis])
        if 0 < len(hit) <= max(1, c.shape[axis] // 2) and len(hit) < c.shape[axis]:
            if len(hit) > 1 and permuted(np.take(c, hit, axis), np.take(e, hit, axis), axis, tol):
                return f"{plural(name)} {shorten(hit)} permuted"
            said = what(np.take(c, hit, axis), np.take(e, hit, axis), examples, tol)
            return f"{name if len(hit) == 1 else plural(name)} {shorten(hit)} {said}"
    return ""


def plural(name: str) -> str:
    """``entries`` of ``entry``, ``rows`` of ``row``, ``slices of axis 2``."""
    head, _, rest = name.partition(" ")
    return (head[:-1] + "ies" if head.endswith("y") else head + "s") + (" " + rest if rest else "")


def shorten(hit) -> str:
    """The first few of some indices."""
    return ", ".join(map(str, hit[:4].tolist())) + (", …" if len(hit) > 4 else "")


def what(c, e, examples, tol) -> str:
    """``zero``, ``factor 2``, or ``wrong``."""
    c, e = np.atleast_1d(c), np.atleast_1d(e)
    return "zero" if not c.any() else proportion(c, e, examples, tol) or "wrong"


def permuted(c, e, axis, tol) -> bool:
    """Whether the slices of ``c`` along an axis are those of ``e`` in another order."""
    a = np.moveaxis(c, axis, 0).reshape(c.shape[axis], -1)
    b = np.moveaxis(e, axis, 0).reshape(c.shape[axis], -1)
    scale = max(np.abs(a).max(), np.abs(b).max()) or 1.0
    # sorting by a projection is not fooled by rounding, as sorting by the first column is
    weights = np.random.default_rng(0).standard_normal(a.shape[1])
    i, j = np.argsort(a @ weights), np.argsort(b @ weights)
    return bool(np.abs(a[i] - b[j]).max() <= tol * scale) and not np.array_equal(i, j)
