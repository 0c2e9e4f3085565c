"""Losses: one value per example, and by hand its gradient by the outputs.

- `classes`: cross-entropies, focal, KL divergence, multiclass hinge. ``outputs (..., K)`` are logits, for
  `negative_log_likelihood` their log-probabilities; targets integer labels ``(...)`` or probabilities ``(..., K)``
- `entries`: squared, absolute, Huber, pinball, Poisson, binary cross-entropies, hinges. ``outputs (B,)`` or ``(B, ...,
  F)`` with targets of the same shape, **summed** over the features F. Keras takes the mean over F and PyTorch over all
  entries: with the mean over examples that follows, gradients F times smaller. `per_output` has one value per entry
- `vectors`: dice, cosine, triplet, InfoNCE, of an example's whole output
- `alignments`: CTC, of sequences

Bfloat16 and float16 outputs are computed in float32: values are float32, gradients have the outputs' dtype. Values are
written so that plain autodiff of them takes the same subgradients as the gradients by hand, and so that NaN passes.

>>> import jax.numpy as jnp
>>> logits = jnp.array([[3.2, 1.1, 0.8, 2.9]])
>>> f"{softmax_cross_entropy(logits, jnp.array([0]))[0]:.4f}"
'0.6699'
>>> [f"{g:.4f}" for g in softmax_cross_entropy.gradient(logits, jnp.array([0]))[0]]
['-0.4882', '0.0627', '0.0464', '0.3791']
>>> print(huber(1.0)(jnp.array([[0.5, 3.0]]), jnp.zeros((1, 2))))
[2.625]

All raise ValueError, before anything is computed, for outputs that are not floating, for targets of a wrong dtype or
shape, and for labels out of range where they are known (not traced, even if the outputs are); a traced label out of
range makes value and gradient NaN. An example without a target has the weight 0, or a label that `cross_entropy` is
told to ignore; an entry without one has the weight 0 in `per_output`.

Legend: B batch, K classes, F features; in derivations z outputs, y or p targets, σ(z) = 1/(1 + e^−z), ℓ the value.

Imports types, core and of layers the masks; nothing that weights, averages or trains.
"""

from fnet.losses.alignments import CTCTargets, ctc
from fnet.losses.classes import (
    cross_entropy,
    focal_cross_entropy,
    kl_divergence,
    kl_divergence_from_logits,
    multiclass_hinge,
    negative_log_likelihood,
    smoothed_cross_entropy,
    softmax_cross_entropy,
)
from fnet.losses.entries import (
    absolute_error,
    binary_cross_entropy,
    binary_focal_cross_entropy,
    half_squared_error,
    hinge,
    huber,
    per_output,
    pinball,
    poisson,
    squared_error,
    squared_hinge,
    weighted_binary_cross_entropy,
)
from fnet.losses.vectors import cosine_distance, dice, info_nce, triplet

__all__ = [
    "CTCTargets",
    "absolute_error",
    "binary_cross_entropy",
    "binary_focal_cross_entropy",
    "cosine_distance",
    "cross_entropy",
    "ctc",
    "dice",
    "focal_cross_entropy",
    "half_squared_error",
    "hinge",
    "huber",
    "info_nce",
    "kl_divergence",
    "kl_divergence_from_logits",
    "multiclass_hinge",
    "negative_log_likelihood",
    "per_output",
    "pinball",
    "poisson",
    "smoothed_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "squared_hinge",
    "triplet",
    "weighted_binary_cross_entropy",
]
