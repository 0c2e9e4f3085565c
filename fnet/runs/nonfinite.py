"""Where a run stopped being finite: the step, the layer, forward or backward, the leaf and the examples.

`replay` goes through the steps of a chunk one by one from a state that was good; `locate` evaluates the bad step
operation by operation, and names the first that makes a number that is not finite out of numbers that are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.interpret import evaluate
from fnet.core.jax_insides import source_line
from fnet.core.processes import on_host
from fnet.core.trees import named_leaves
from fnet.types import Mean, PyTree, TrainState


class NonFinite(NamedTuple):
    """What was found at the first bad step."""

    step: int  # updates made before it
    stage: str  # "forward", "backward" or "optimizer"; "" if no operation was found
    layer: str  # the path of the layer, "loss", or "" outside of every layer
    operation: str  # e.g. "log gives -inf"
    source: str  # file and line of the operation
    leaf: str  # the first of the state's leaves that is not finite after the step, or ""
    examples: list[int] | None  # the batch's rows in the data; None in a stream
    loss: float

    def __str__(self) -> str:
        where = f"{self.stage} of {self.layer or 'no layer'}" if self.stage else "no single operation was found"
        rows = "" if self.examples is None else f"; the batch's examples {self.examples}"
        leaf = f"; then {self.leaf} is not finite" if self.leaf else ""
        operation = f": {self.operation}, {self.source}" if self.operation else ""
        return f"step {self.step}, {where}{operation}; loss {self.loss}{leaf}{rows}"


class NonFiniteError(FloatingPointError):
    """The loss or a parameter is not finite. ``found`` says where, ``state`` is the last good state of the run."""

    def __init__(self, message: str, found: NonFinite | None, state: TrainState | None):
        super().__init__(message)
        self.found, self.state = found, state


def replay(step: Callable, ts: TrainState, batches: Iterable[tuple[list[int] | None, PyTree]]) -> NonFinite | None:
    """The first bad step of those that ``batches``, pairs of rows and batch, take from the good state ``ts``."""
    jitted = jax.jit(step)
    for rows, batch in batches:
        new, metrics = jitted(ts, batch)
        losses, leaf = losses_of(metrics), bad_leaf(new)
        finite = all(np.isfinite(loss).all() for loss in losses)
        if leaf or not finite:
            stage, layer, operation, source = locate(step, ts, batch)
            if stage == "forward" and finite:  # autodiff computes factors of the derivative beforehand
                stage = "backward"
            return NonFinite(int(ts.step), stage, layer, operation, source, leaf, rows, float(sum(map(np.sum, losses))))
        ts = new
    return None


def losses_of(metrics: PyTree) -> list[np.ndarray]:
    """The numbers that a step calls its loss, none if it has none: a `Mean`'s sum, a number or a tree of such."""
    found = metrics.get("loss") if isinstance(metrics, Mapping) else None
    means = jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, Mean))
    return [np.asarray(mean.sum if isinstance(mean, Mean) else mean, np.float64) for mean in means]


def bad_leaf(ts: TrainState) -> str:
    """The path of the first leaf of the parameters or the model's state that is not finite, or nothing."""
    for root, tree in (("params", ts.params), ("state", ts.state)):
        for path, leaf in named_leaves(tree):
            if _not_finite([leaf]):
                return f"{root}/{path}" if path else root
    return ""


def locate(step: Callable, ts: TrainState, batch: PyTree) -> tuple[str, str, str, str]:
    """Stage, layer, operation and source of the first operation that makes a non-finite number of finite ones."""
    closed = jax.make_jaxpr(step)(ts, batch)
    found: list[tuple[str, str, str, str]] = []

    def observe(site, eqn, inputs, outputs, calls):
        if found or not _not_finite(outputs) or _not_finite(inputs):
            return
        stack = "/".join(str(part.source_info.name_stack) for part in (*calls, eqn))
        bad = next(out for out in outputs if _not_finite([out]))
        numbers = on_host(bad).astype(np.float64)
        value = numbers[~np.isfinite(numbers)].ravel()[0]
        stage, layer = _place(stack)
        found.append((stage, layer, f"{eqn.primitive.name} gives {value}", source_line(eqn)))

    evaluate(closed, jax.tree.leaves((ts, batch)), observe=observe, unroll=True)
    return found[0] if found else ("", "", "", "")


def _not_finite(values: Iterable[Any]) -> bool:
    floats = [v for v in values if jnp.issubdtype(jnp.result_type(v), jnp.floating)]
    return any(not bool(jnp.isfinite(v).all()) for v in floats)


def _place(stack: str) -> tuple[str, str]:
    """The stage and the layer's path in a name stack, e.g. ``transpose(jvp(block_0/dense_1))``."""
    names = [name for name in re.split(r"[/()]+", stack) if name]
    backward = "transpose" in names or "backward" in names
    path = [name for name in names if name not in ("transpose", "jvp", "vmap", "backward", "optimizer", "checkpoint")]
    stage = "optimizer" if "optimizer" in names else "backward" if backward else "forward"
    return stage, "/".join(path)
