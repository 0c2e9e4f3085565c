"""What optimizers that hold another one share.

A composed state holds the others' states; ``step`` and ``rate`` are read through to the optimizer within.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fnet.core.checks import require_optimizer
from fnet.core.numerics import wide
from fnet.core.trees import named_leaves
from fnet.types import Optimizer, PyTree


def of_optimizer(name: str, doc: str) -> property:
    """A property of a composed state: that of the optimizer within."""
    return property(lambda state: getattr(state.optimizer, name), doc=doc)


def init_within(who: str, optimizer: Optimizer) -> Callable[[PyTree], Any]:
    """The ``init`` of the optimizer within ``who``; raises TypeError for what is none.

    That ``init`` raises ValueError for `dynamic_loss_scale`, whose scale would not be applied there.
    """
    require_optimizer(f"{who}: optimizer", optimizer)

    def init(params):
        state = optimizer.init(params)
        if hasattr(state, "loss_scale"):
            raise ValueError(
                f"{who}: dynamic_loss_scale is within, where no gradient engine reads its scale; put it outermost: "
                f"dynamic_loss_scale({who}(...))"
            )
        return state

    return init


def lines_of(optimizer: Optimizer, params: PyTree) -> dict[str, str]:
    """What ``optimizer.about`` says of each path."""
    if optimizer.about is None:
        return {path: "an optimizer without a description" for path, _ in named_leaves(params)}
    return optimizer.about(params)


def zero() -> jax.Array:
    """A count that begins."""
    return jnp.zeros((), jnp.int32)


def wide_copy(params: PyTree) -> PyTree:
    """The parameters in float32 at least, in buffers of their own."""
    return jax.tree.map(lambda p: jnp.array(p, wide(jnp.result_type(p))), params)


def chosen(first, a: PyTree, b: PyTree) -> PyTree:
    """``a`` if ``first``, else ``b``."""
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), a, b)


def about_within(optimizer: Optimizer, params: PyTree, what: str) -> dict[str, str]:
    """What is said of each path by the optimizer within, and that it is within ``what``."""
    return {path: f"{what}: {line}" for path, line in lines_of(optimizer, params).items()}


def found_in(node, kind: type) -> Iterator[Any]:
    """The outermost states of this kind within a composed one."""
    if isinstance(node, kind):
        yield node
    elif hasattr(node, "groups"):
        for child in node.groups.values():
            yield from found_in(child, kind)
    elif hasattr(node, "optimizer"):
        yield from found_in(node.optimizer, kind)
