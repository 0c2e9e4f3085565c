"""CTC: sequences of logits against shorter sequences of labels, over all the ways in which they can be aligned.

Legend: B batch, T frames, K classes, N labels, S = 2N + 1 states: a blank, a label, a blank, ..., a label, a blank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import is_whole, require
from fnet.core.contexts import place_of
from fnet.core.numerics import wide
from fnet.losses.checks import as_array, require_floating
from fnet.types import Loss

NEVER = -1e30  # stands for log 0: sums of it are finite, and so are the slopes of logsumexp


class CTCTargets(NamedTuple):
    """The labels of sequences, and which frames they were read from: ``frames = arange(T) < lengths[:, None]``.

    - ``labels (B, N)``, integers; the blank and what is below 0 are padding, wherever they stand
    - ``frames (B, T)``, boolean, True where a frame counts; None for all of them
    """

    labels: Any
    frames: Any = None


def ctc(blank: int = 0, *, zero_infinity: bool = False) -> Loss:
    """``−log Σ_π Π_t softmax(z_t)_{π_t}`` over the paths π that become the labels, repeats merged and blanks removed.

    ``outputs (B, T, K)`` are logits of which the class ``blank`` says nothing; targets are labels ``(B, N)``, or
    `CTCTargets` where frames are padded too. Sums are of logarithms, by Graves et al., "Connectionist temporal
    classification", 2006. An empty sequence of labels has the one path of blanks.

    Labels that fit no path (too few frames for them and for a blank between two equal ones) have the value infinity and
    gradients of NaN; with ``zero_infinity`` both are 0, as PyTorch's. PyTorch's ``CTCLoss`` takes log-probabilities
    ``(T, B, K)``, and its mean first divides each value by its number of labels; optax' ``ctc_loss`` does not, and
    gives a large number where there is no path. Keras' mean is over examples, as fnet's.

    Raises ValueError for labels that no class has, where they are known; traced ones make value and gradient NaN.

    >>> logits = jnp.log(jnp.array([[[0.5, 0.5], [0.5, 0.5], [0.25, 0.75]]]))
    >>> found = jnp.exp(-ctc()(logits, jnp.array([[1]])))[0]
    >>> f"{found:.4f} = {1 - 0.5 * 0.5 * 0.25 - 0.5 * 0.5 * 0.75:.4f}"  # all paths but 000 and 101
    '0.7500 = 0.7500'
    """
    require(is_whole(blank, 0), f"ctc: blank = {blank!r}; expected the index of a class, a whole number from 0")

    def read(outputs, targets):
        z, labels, frames = _checked(outputs, targets, blank)
        log_q = jax.nn.log_softmax(jnp.where(frames[..., None], z.astype(wide(z.dtype)), 0))
        size, n = labels.shape
        empty = (labels < 0) | (labels == blank)
        order = jnp.argsort(empty, -1, stable=True)  # padding last
        labels = jnp.take_along_axis(jnp.where(empty, blank, labels), order, -1)
        length = (~empty).sum(-1, dtype=jnp.int32)
        states = jnp.full((size, 2 * n + 1), blank, jnp.int32).at[:, 1::2].set(labels)
        before = jnp.pad(states, ((0, 0), (2, 0)), constant_values=blank)[:, :-2]
        leap = (states != blank) & (states != before)  # over the blank between two labels that differ
        at = jnp.arange(2 * n + 1, dtype=jnp.int32)[None]
        last = (at == 2 * length[:, None]) | (at == 2 * length[:, None] - 1)
        # floor at log 0, where NaN passes; a label that no class has is NaN
        log_p = jnp.take_along_axis(log_q, jnp.clip(states, 0, z.shape[-1] - 1)[:, None], -1)
        log_p = jnp.where((states < z.shape[-1])[:, None], jnp.maximum(log_p, NEVER), jnp.nan)
        return log_q, jnp.moveaxis(log_p, 1, 0), frames.T, states, leap, last

    # α_t(s) = log p_t(s) + log (e^α_{t−1}(s) + e^α_{t−1}(s−1) + [leap(s)] e^α_{t−1}(s−2)), from state 0 before them all
    def forwards(log_p, frames, leap):
        def advance(carry, given):
            alpha, total = carry
            log_p, counts = given
            new = log_p + _add(alpha, _shifted(alpha, 1), jnp.where(leap, _shifted(alpha, 2), NEVER))
            alpha = jnp.where(counts[:, None], new, alpha)
            most = jax.lax.stop_gradient(alpha.max(-1, keepdims=True))
            carry = alpha - most, total + most[:, 0]  # so that rounding is that of the differences
            return carry, carry[0]

        start = jnp.full(leap.shape, NEVER, log_p.dtype).at[:, 0].set(0)
        (alpha, total), alphas = jax.lax.scan(advance, (start, jnp.zeros(len(start), log_p.dtype)), (log_p, frames))
        return alpha, total, alphas

    def likelihood(alpha, total, last):
        log_likelihood = total + _add(*jnp.moveaxis(jnp.where(last, alpha, NEVER), -1, 0))
        return log_likelihood, log_likelihood < NEVER / 2

    def value(outputs, targets):
        _, log_p, frames, _, leap, last = read(outputs, targets)
        alpha, total, _ = forwards(log_p, frames, leap)
        log_likelihood, none = likelihood(alpha, total, last)
        if zero_infinity:
            return jnp.where(none, 0, -log_likelihood)
        return -log_likelihood - jnp.log(jnp.where(none, 0 * log_likelihood, 1))  # infinite, with a slope of NaN

    # β_t(s) is the same sum over what follows; a frame is in state s with γ_t(s) = e^(α + β) / Σ_s e^(α + β), and
    # −∂ log Σ_π/∂ log q_tk = −Σ_{s is k} γ_t(s); through the softmax, whose γ add up to 1:  ∂ℓ/∂z_tk = q_tk − Σ γ_t(s)
    def gradient(outputs, targets):
        log_q, log_p, frames, states, leap, last = read(outputs, targets)
        alpha, total, alphas = forwards(log_p, frames, leap)

        def retreat(beta, given):
            alpha, log_p, counts = given
            occupancy = jax.nn.softmax(alpha + beta)
            after = beta + log_p
            new = _add(after, _shifted(after, -1), _shifted(jnp.where(leap, after, NEVER), -2))
            new = jnp.where(counts[:, None], new, beta)
            return new - new.max(-1, keepdims=True), occupancy

        end = jnp.where(last, jnp.zeros((), log_p.dtype), NEVER)
        _, occupancy = jax.lax.scan(retreat, end, (alphas, log_p, frames), reverse=True)
        b, t = jnp.arange(log_q.shape[0])[:, None, None], jnp.arange(log_q.shape[1])[None, :, None]
        of_class = jnp.zeros_like(log_q).at[b, t, states[:, None]].add(jnp.moveaxis(occupancy, 0, 1), mode="drop")
        dz = jnp.where(frames.T[..., None], jnp.exp(log_q) - of_class, 0)
        _, none = likelihood(alpha, total, last)
        dz = jnp.where(none[:, None, None], 0 if zero_infinity else jnp.nan, dz)
        return dz.astype(jnp.asarray(outputs).dtype)

    return Loss(value, gradient)


def _add(*logs):
    """``log Σ e^x`` of numbers that are finite."""
    most = jax.lax.stop_gradient(jnp.stack(logs).max(0))
    return most + jnp.log(sum(jnp.exp(x - most) for x in logs))


def _shifted(x, by: int):
    """``x`` moved along its last axis, with log 0 where nothing comes from."""
    size, s = x.shape
    outside = jnp.full((size, min(abs(by), s)), NEVER, x.dtype)
    return jnp.concatenate([outside, x[:, :-by]] if by > 0 else [x[:, -by:], outside], -1)


def _checked(outputs, targets, blank):
    """Logits, labels as int32 and which frames count; raises for what does not fit."""
    labels, frames = targets if isinstance(targets, CTCTargets) else (targets, None)
    z, labels = as_array("ctc", "outputs", outputs), as_array("ctc", "labels", labels)
    require_floating("ctc", z)
    if len(z.shape) != 3 or z.shape[2] <= blank:
        raise ValueError(
            f"ctc: outputs {z.shape}; expected (B, T, K), the logits of T frames, with the blank {blank} of K classes"
        )
    size, t, classes = z.shape
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape[:1] != (size,) or len(labels.shape) != 2:
        raise ValueError(
            f"ctc: outputs {z.shape} do not go with {labels.dtype} labels {labels.shape}; expected integer labels "
            f"({size}, N), padded by the blank {blank} or by -1; frames beside them are given as CTCTargets"
        )
    known = np.zeros(0) if isinstance(labels, Tracer) else np.asarray(labels)
    if (known >= classes).any():
        at = tuple(np.argwhere(known >= classes)[0].tolist())
        label = f"label {known[at]} {place_of(at, known.shape)}"
        raise ValueError(f"ctc: {label} is outside 0..{classes - 1} (outputs have {classes} classes)")
    frames = np.ones((size, t), bool) if frames is None else as_array("ctc", "frames", frames)
    if frames.shape != (size, t) or frames.dtype != jnp.bool_:
        raise ValueError(
            f"ctc: frames are {frames.dtype}{list(frames.shape)}; expected bool[{size}, {t}], True where a frame "
            "counts: of lengths, jax.numpy.arange(T) < lengths[:, None]"
        )
    return jnp.asarray(z), jnp.asarray(labels).astype(jnp.int32), jnp.asarray(frames)
