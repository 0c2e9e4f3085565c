"""Which leaves of the parameters something is for: masks and path patterns.

A mask is

- None: every leaf;
- path patterns such as ``"*/w"`` or ``("embedding/*", "*/w")``, in which ``*`` stands for anything, ``/`` too;
- a tree of True and False like the parameters, or one whose leaves stand for whole branches of theirs (as optax'
  masks);
- a function ``(path, leaf) -> bool``. Of stacked parameters (`fnet.layers.Copies`) it is given the shape of one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import takes
from fnet.core.trees import named_leaves, stacked_axes, without_copies
from fnet.types import PyTree

Mask = str | Sequence[str] | Callable[[str, Any], bool] | PyTree | None

EXPECTED = "None, path patterns such as '*/w', a tree of True and False like the parameters, or a function (path, leaf)"


def check_mask(who: str, mask: Mask, weight_decay) -> None:
    """Require what a mask may be, and a weight decay beside one, which would do nothing without."""
    check_mask_kind(who, mask)
    if mask is not None and weight_decay is None:
        raise ValueError(f"{who}: mask = {mask!r} without weight_decay; expected both of them, or no mask")


def check_mask_kind(who: str, mask: Mask) -> None:
    """Require what a mask may be, as far as it can be told without the parameters."""
    if callable(mask):
        if not takes(mask, "path", None):
            raise TypeError(
                f"{who}: mask is a function that does not take (path, leaf); expected {EXPECTED}: of a function of the "
                "parameters give what it returns"
            )
    elif mask is not None and patterns_of(mask) is None:
        leaves = jax.tree_util.tree_leaves_with_path(mask)
        for path, leaf in leaves:
            if isinstance(leaf, Tracer) or np.shape(leaf) or np.asarray(leaf).dtype != bool:
                at = jax.tree_util.keystr(path, simple=True, separator="/")
                raise TypeError(f"{who}: mask{f' at {at}' if at else ''} is {leaf!r}; expected {EXPECTED}")
        if not leaves:
            raise TypeError(f"{who}: mask = {mask!r} holds nothing; expected {EXPECTED}")


def patterns_of(mask: Mask) -> list[str] | None:
    """The patterns of a mask that is one or several, else None."""
    patterns = [mask] if isinstance(mask, str) else mask
    if not isinstance(patterns, list | tuple | set | frozenset) or not patterns:
        return None
    return [*patterns] if all(isinstance(pattern, str) for pattern in patterns) else None


def decaying(who: str, mask: Mask, params: PyTree) -> list[bool]:
    """For each leaf whether the mask takes it.

    Raises ValueError for a pattern that no path matches and for a tree that does not fit the parameters, TypeError for
    what is no mask, and for a function that returns something else than True or False.
    """
    check_mask_kind(who, mask)
    leaves = named_leaves(params)
    if mask is None:
        return [True] * len(leaves)
    if callable(mask):
        return [
            _answer(who, mask, path, leaf, axes)
            for (path, leaf), axes in zip(leaves, stacked_axes(params), strict=True)
        ]
    patterns = patterns_of(mask)
    if patterns is not None:
        check_patterns(who, patterns, params)
        return [any(fnmatchcase(path, pattern) for pattern in patterns) for path, _ in leaves]
    try:
        mask = without_copies(mask)
        whole = jax.tree.map(lambda on, branch: [bool(on)] * len(jax.tree.leaves(branch)), mask, without_copies(params))
    except ValueError:
        given = [path or "()" for path, _ in named_leaves(mask)]
        raise ValueError(
            f"{who}: the mask is a tree of {', '.join(given)}, and the parameters of "
            f"{', '.join(path or '()' for path, _ in leaves)}; expected one like the other"
        ) from None
    return jax.tree.leaves(whole)


def _answer(who: str, mask: Callable, path: str, leaf: Any, axes: int) -> bool:
    answer = mask(path, jax.ShapeDtypeStruct(jnp.shape(leaf)[axes:], jnp.result_type(leaf)) if axes else leaf)
    if not isinstance(answer, bool | np.bool_):
        raise TypeError(f"{who}: the mask returned {answer!r} of {path or '()'}; expected True or False")
    return bool(answer)


def check_patterns(who: str, patterns: Sequence[str], params: PyTree) -> None:
    """Require that each pattern is text and matches a path."""
    paths = [path for path, _ in named_leaves(params)]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{who}: the pattern {pattern!r} is no text; expected one such as '*/w'")
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"{who}: the pattern {pattern!r} matches no parameter; there are {', '.join(paths)}")
