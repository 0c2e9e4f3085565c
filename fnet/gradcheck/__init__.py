"""The gradient check: by hand, by autodiff and by finite differences, in float64, leaf by leaf.

    report = check_model(model, loss, batch, key=jax.random.key(0))
    print(report)
    report.raise_if_wrong()

Each parameter has a row in the report, with the verdict "ok" or "wrong".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.gradients import autodiff, backprop, measure
from fnet.types import Batch, Layer, Loss, PyTree, named_leaves, parameter_paths

AGREEMENT = 1e-9  # by hand against autodiff in float64, relative to the leaf's largest entry
DIFFERENCE = 1e-5  # against central differences, whose own rounding is some 1e-16 |f| / h


class LeafCheck(NamedTuple):
    """One leaf of the gradient. Errors are relative to the largest entry that the leaf has in any of the three ways."""

    path: str
    shape: tuple[int, ...]
    verdict: str  # "ok" or "wrong"
    against_autodiff: float  # all entries
    against_differences: float  # the entries and directions probed
    worst: tuple[int, ...]  # index where the claimed gradient and autodiff differ most
    claimed: float  # its claimed value
    expected: float  # autodiff's


class Report(NamedTuple):
    """The result of a check; printing it gives one row per leaf."""

    leaves: tuple[LeafCheck, ...]

    @property
    def ok(self) -> bool:
        return all(leaf.verdict == "ok" for leaf in self.leaves)

    def raise_if_wrong(self) -> None:
        """Raise `AssertionError` with the report unless every leaf is ok."""
        if not self.ok:
            raise AssertionError(f"the gradient is wrong\n{self}")

    def __str__(self) -> str:
        rows = [("leaf", "shape", "vs autodiff", "vs differences", "verdict")]
        for leaf in self.leaves:
            verdict = leaf.verdict
            if verdict != "ok":
                verdict += f" at {list(leaf.worst)}: {leaf.claimed:.6g}, expected {leaf.expected:.6g}"
            errors = f"{leaf.against_autodiff:.1e}", f"{leaf.against_differences:.1e}"
            rows.append((leaf.path, str(leaf.shape), *errors, verdict))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def check_model(
    model: Layer, loss: Loss, batch, *, key: jax.Array, params: PyTree = None, state: PyTree = None
) -> Report:
    """Check the model's and the loss' backward by hand, on a batch, in training mode and in float64.

    Parameters are drawn by ``model.init`` from ``key`` if not given (with a little noise, so that no bias is zero).
    """
    init_key, noise_key, run_key = jax.random.split(key, 3)
    with jax.enable_x64(True):
        batch = to_float64(Batch(*batch))
        if params is None:
            params, state = model.init(init_key, batch.inputs)
            leaves, tree = jax.tree.flatten(params)
            keys = jax.random.split(noise_key, max(1, len(leaves)))
            noisy = [leaf + 0.01 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=False)]
            params = jax.tree.unflatten(tree, noisy)
        params, state = to_float64(params), to_float64(state)

        def objective(params):
            outputs, _, _ = model.forward(params, state, batch.inputs, key=run_key, train=True)
            return measure(loss, None, outputs, batch)["loss"].value

        by_hand = jax.jit(backprop(model, loss))(params, state, batch, run_key)[0]
        by_autodiff = jax.jit(autodiff(model, loss))(params, state, batch, run_key)[0]
        report = compare(objective, params, by_hand, by_autodiff)
        order = {path: i for i, path in enumerate(parameter_paths(model, batch.inputs))}
        return Report(tuple(sorted(report.leaves, key=lambda leaf: order[leaf.path])))


def compare(objective: Callable, params: PyTree, claimed: PyTree, expected: PyTree, *, probes: int = 16) -> Report:
    """Compare a claimed gradient of ``objective(params)`` with autodiff's and with central differences, leaf by leaf.

    Each leaf is probed at up to ``probes`` of its entries and in four random directions with entries ±1/√n. All arrays
    are float64.
    """
    objective = jax.jit(objective)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(params)
    checks = []
    for i, ((path, g), e, leaf) in enumerate(
        zip(named_leaves(claimed), jax.tree.leaves(expected), leaves, strict=True)
    ):
        g, e, leaf = np.asarray(g), np.asarray(e), np.asarray(leaf)
        if g.shape != leaf.shape:
            raise ValueError(f"{path}: the gradient has shape {g.shape}, the parameter {leaf.shape}")

        scale = max(float(np.abs(a).max(initial=0)) for a in (g, e)) or 1.0

        def error(direction, i=i, leaf=leaf, g=g, scale=scale):
            """Claimed against measured slope; the step shrinks while they differ, since a long one may cross a kink."""
            least = np.inf
            for h in (1e-5, 1e-6, 1e-7, 1e-8):
                moved = [[*leaves[:i], leaf + sign * h * direction, *leaves[i + 1 :]] for sign in (1, -1)]
                up, down = (float(objective(jax.tree.unflatten(tree, leaves))) for leaves in moved)
                least = min(least, abs((up - down) / (2 * h) - float((g * direction).sum())) / scale)
                if not least > DIFFERENCE:
                    break
            return least

        directions = [rng.choice([-1.0, 1.0], leaf.shape) / max(1, leaf.size) ** 0.5 for _ in range(4)]
        for entry in rng.permutation(leaf.size)[:probes]:
            directions.append((np.arange(leaf.size) == entry).astype(np.float64).reshape(leaf.shape))
        differences = float(np.max([error(direction) for direction in directions]))
        agreement = float(np.abs(g - e).max(initial=0)) / scale
        worst = np.unravel_index(int(np.abs(g - e).argmax()), g.shape) if g.size else ()
        verdict = "ok" if agreement <= AGREEMENT and differences <= DIFFERENCE else "wrong"
        index = tuple(int(k) for k in worst)
        checks.append(
            LeafCheck(path, g.shape, verdict, agreement, differences, index, float(g[index]), float(e[index]))
        )
    return Report(tuple(checks))


def to_float64(tree: PyTree) -> Any:
    """Floating leaves in float64, all others as they are."""

    def convert(leaf):
        leaf = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(convert, tree)
