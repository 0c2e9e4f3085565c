"""A learning-rate range test: one compiled scan on a copy of the state, the rate rising from step to step.

Legend: S steps, B examples a batch, N examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.jax_insides import transfers_meant
from fnet.data.arrays import check_data, count_examples
from fnet.gradients.engines import Gradient
from fnet.optimizers.hyper import set_hyper
from fnet.training.epochs import epoch_order
from fnet.training.steps import make_step
from fnet.types import Optimizer, PyTree, TrainState


class RateCurve(NamedTuple):
    """What `find_learning_rate` measured, up to where the loss diverged.

    ``smoothed`` is the exponential mean of the losses without bias. ``suggestion`` is the rate at which it falls most
    steeply by the logarithm of the rate, None where it never falls but for rounding; ``diverged_at`` the rate at which
    it left the finite numbers or rose above ``divergence`` times its least value, None if it did not. Where the least
    value is not above 0, it may rise by ``divergence − 1`` times that or the first one, whichever is larger in size.
    """

    rates: np.ndarray  # (S,)
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None
    diverged_at: float | None


@transfers_meant
def find_learning_rate(
    gradient: Gradient,
    optimizer: Optimizer,
    ts: TrainState,
    data: PyTree,
    *,
    batch_size: int,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    divergence: float = 4.0,
) -> RateCurve:
    """Losses of ``steps`` updates whose rates rise from ``low`` to ``high`` by a constant factor.

    Pure: the model, the optimizer's state and the data are read, never changed. Batches are taken from the first
    epoch's order, over and over if it is short. The suggestion is a rate to begin a search from, no more: where the
    smoothed loss falls most steeply before its least value, which lies below the rate at which it diverges.
    The optimizer has a number for its learning rate, no schedule; in a composed one only one may be called so.

    Raises ValueError for rates that are not ``0 < low < high < inf``, steps below 10, a smoothing outside [0, 1), a
    divergence that is not above 1, a batch size out of 1 .. N, an optimizer whose rate is no number, and a loss that is
    not finite at the lowest rate.
    Source: Smith, arXiv:1506.01186; the exponential rise and the smoothing as in fastai's finder.
    """
    if not 0 < low < high < np.inf:
        raise ValueError(f"find_learning_rate: low = {low}, high = {high}; expected 0 < low < high < inf")
    if steps < 10:
        raise ValueError(f"find_learning_rate: steps = {steps}; expected at least 10")
    if not 0 <= smoothing < 1:
        raise ValueError(f"find_learning_rate: smoothing = {smoothing}; expected 0 <= smoothing < 1")
    if not divergence > 1:
        raise ValueError(f"find_learning_rate: divergence = {divergence}; expected divergence > 1")
    data = check_data(data, batch_size=batch_size)
    try:
        set_hyper(ts.opt_state, learning_rate=low)
    except TypeError as error:
        raise ValueError(f"find_learning_rate: expected an optimizer with a number for its rate: {error}") from error
    rates = np.geomspace(low, high, steps)
    losses = np.asarray(jax.jit(_scan(make_step(gradient, optimizer), batch_size))(ts, data, jnp.asarray(rates, float)))
    return curve(rates, losses.astype(np.float64), smoothing, divergence)


def _scan(step: Callable, batch_size: int) -> Callable:
    def run(ts, data, rates):
        n = count_examples(data)
        order = epoch_order(ts.key, 0, n)

        def one(ts, at):
            i, rate = at
            rows = order[(i * batch_size + jnp.arange(batch_size, dtype=i.dtype)) % n]
            ts = ts._replace(opt_state=set_hyper(ts.opt_state, learning_rate=rate))
            ts, metrics = step(ts, jax.tree.map(lambda a: a[rows], data))
            return ts, metrics["loss"].value

        return jax.lax.scan(one, ts, (jnp.arange(len(rates), dtype=jnp.int32), rates))[1]

    return run


def curve(rates: np.ndarray, losses: np.ndarray, smoothing: float, divergence: float) -> RateCurve:
    """The smoothed losses, cut where they diverge, and the rate of the steepest fall."""
    smoothed, mean = np.zeros_like(losses), 0.0
    end, least = len(losses), np.inf
    for i, loss in enumerate(losses):
        mean = smoothing * mean + (1 - smoothing) * loss
        smoothed[i] = mean / (1 - smoothing ** (i + 1))
        least = min(least, smoothed[i])
        size = least if least > 0 else max(abs(smoothed[0]), abs(least))
        if not np.isfinite(loss) or smoothed[i] - least > (divergence - 1) * size:
            end = i
            break
    if end == 0:
        raise ValueError(
            f"find_learning_rate: the loss is {losses[0]} at the lowest rate, {rates[0]:.3g}; "
            "expected a finite one: look for a fault in the model or the data first"
        )
    kept = slice(0, end)
    best = int(np.argmin(smoothed[kept]))
    slopes = np.gradient(smoothed[: best + 1], np.log(rates[: best + 1])) if best > 0 else np.zeros(1)
    steepest = int(np.argmin(slopes))
    falls = slopes[steepest] < -1e-9 * np.abs(smoothed[kept]).max()  # a mean of equal losses is rounded
    suggestion = float(rates[steepest]) if falls else None
    diverged = float(rates[end]) if end < len(losses) else None
    return RateCurve(rates[kept], losses[kept], smoothed[kept], suggestion, diverged)
