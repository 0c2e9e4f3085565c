"""Metrics: like a loss, ``(outputs, targets)`` to one value per example; `weighted_mean` sums, and `Mean` divides last.

Means of batches of unequal size are not to be averaged; their sums and counts add up:

>>> logits, labels = jnp.eye(3), jnp.array([0, 1, 0])
>>> first, rest = weighted_mean(accuracy(logits[:2], labels[:2])), weighted_mean(accuracy(logits[2:], labels[2:]))
>>> f"{merge(first, rest).value:.4f}"
'0.6667'

Class metrics take logits ``(..., K)`` and integer labels ``(...)``, or probabilities ``(..., K)`` whose largest entry
is the label. Equal logits rank by index, the lower class first (as argmax in NumPy, JAX and Keras), so that a head of
zeros predicts class 0. An example with a NaN among its logits is never right. Errors are the losses'.

What is no mean over examples is computed of a whole set: `precision`, `recall`, `f1` and `intersection_over_union` of
the counts that `confusion` adds up, `perplexity` of a mean loss, `roc_auc` and `r_squared` of all outputs, as
`fnet.predict` gives them.

Legend: B batch, K classes, F features.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import require_counts
from fnet.core.numerics import weighted_mean, wide
from fnet.data.arrays import as_arrays
from fnet.losses.checks import check_binary, check_classes
from fnet.optimizers.common import global_norm
from fnet.types import Mean, PyTree

__all__ = [
    "absolute_error",
    "accuracy",
    "binary_accuracy",
    "confusion",
    "f1",
    "gradient_histograms",
    "gradient_norms",
    "intersection_over_union",
    "magnitude_edges",
    "merge",
    "perplexity",
    "precision",
    "r_squared",
    "recall",
    "roc_auc",
    "top_k",
    "weighted_mean",
]


def accuracy(logits, targets) -> jax.Array:
    """1 where the largest logit is the label's, else 0, in float32 ``(...)``."""
    logits, labels, known = _read("accuracy", logits, targets)
    return ((_predict(logits) == labels) & known).astype(jnp.float32)


def top_k(k: int) -> Callable[..., jax.Array]:
    """1 where the label is among the k largest logits, else 0; ``top_k(1)`` is `accuracy`. Raises for a k above K."""
    require_counts("top_k", k=k)

    def metric(logits, targets):
        logits, labels, known = _read("top_k", logits, targets)
        if k > logits.shape[-1]:
            raise ValueError(f"top_k: k = {k}, but outputs have {logits.shape[-1]} classes")
        _, best = jax.lax.top_k(logits, k)  # of equal logits the lower index first
        return ((best == labels[..., None]).any(-1) & known).astype(jnp.float32)

    return metric


def confusion(classes: int) -> Callable[..., jax.Array]:
    """For each example a float32 matrix ``(K, K)`` with 1 at [label, prediction]; their weighted sum counts the cases.

    An example without a prediction (NaN among its logits) or without a class (a traced label out of range) is a matrix
    of zeros, so that the trace divided by the count is the accuracy.
    """
    require_counts("confusion", classes=classes)

    def metric(logits, targets):
        logits, labels, known = _read("confusion", logits, targets)
        if logits.shape[-1] != classes:
            raise ValueError(f"confusion: expected {classes} classes, but outputs have {logits.shape[-1]}")
        true, predicted = jax.nn.one_hot(labels, classes), jax.nn.one_hot(_predict(logits), classes)
        cell = true[..., :, None] * predicted[..., None, :]
        return jnp.where(known[..., None, None], cell, 0).astype(jnp.float32)

    return metric


def binary_accuracy(logits, targets) -> jax.Array:
    """1 where a logit above 0 meets a target above ½, or neither is, in float32; of ``(B, ..., F)`` the mean over F.

    A logit of 0 predicts 0, as in Keras, whose mean over F is the same; a NaN logit or target is never right.
    """
    z, y = check_binary("binary_accuracy", logits, targets)
    right = ((z > 0) & (y > 0.5)) | ((z <= 0) & (y <= 0.5))
    right = right.astype(jnp.float32)
    return right.mean(-1) if right.ndim > 1 else right


def merge(a: PyTree, b: PyTree) -> PyTree:
    """The `Mean`s of two sets of examples taken together, in any tree of them."""
    return jax.tree.map(jnp.add, a, b)


def gradient_norms(grads: PyTree) -> dict[str, jax.Array]:
    """``√Σ g²`` of each child of the tree by its name, and of the whole tree as ``all``, in float32 at least.

    A child without gradients (an activation's ``()``) is left out; a tuple's children are named ``0``, ``1`` and so on;
    a single array has only ``all``. Entries below 1e-19 vanish, as float32's squares do.
    Raises ValueError for a child called ``all``.
    """
    children = jax.tree_util.tree_leaves_with_path(grads, is_leaf=lambda node: node is not grads)
    norms = {
        jax.tree_util.keystr(path, simple=True): global_norm(_floating_leaves(c))
        for path, c in children
        if path and _floating_leaves(c)
    }
    if "all" in norms:
        raise ValueError("gradient_norms: a child is called 'all', the name of the whole tree's norm: rename the child")
    return {**norms, "all": global_norm(_floating_leaves(grads))}


def absolute_error(outputs, targets) -> jax.Array:
    """``mean_j |y_j − t_j|`` of each example ``(B,)``, over all axes but the first; the loss of this name sums."""
    outputs, targets = _floating("absolute_error", outputs=outputs), _floating("absolute_error", targets=targets)
    if outputs.shape != targets.shape or not outputs.ndim:
        raise ValueError(
            f"absolute_error: outputs {outputs.shape} and targets {targets.shape}; expected one shape, (B, ...)"
        )
    error = jnp.abs(outputs.astype(wide(outputs.dtype)) - targets)
    return error.mean(tuple(range(1, error.ndim)))


# --- of a whole set ---------------------------------------------------------------------------------------------------


def precision(counts, average: str | None = "macro") -> jax.Array:
    """The share of an answer k that is right, ``C_kk / Σ_i C_ik``, of the counts ``C (K, K)`` by [label, prediction].

    ``average`` is "macro" (the mean over classes), "micro" (of all answers, which is the accuracy) or None: ``(K,)``.
    A class that is never predicted has 0, as in scikit-learn with ``labels=range(K)``: it counts in the mean over
    classes. ``C`` is the sum of `confusion`, or the `Mean` of it that
    `fnet.make_evaluate` gives.

    >>> counts = confusion(2)(jnp.eye(2)[jnp.array([0, 1, 1, 1])], jnp.array([0, 0, 1, 1])).sum(0)
    >>> [round(float(score(counts)), 4) for score in (precision, recall, f1)]
    [0.8333, 0.75, 0.7333]
    """
    counts = _counts("precision", counts, average)
    return _averaged(counts.diagonal(), counts.sum(0), average)


def recall(counts, average: str | None = "macro") -> jax.Array:
    """The share of a class k that is found, ``C_kk / Σ_j C_kj``; as `precision`."""
    counts = _counts("recall", counts, average)
    return _averaged(counts.diagonal(), counts.sum(1), average)


def f1(counts, average: str | None = "macro") -> jax.Array:
    """``2 C_kk / (Σ_i C_ik + Σ_j C_kj)``, the harmonic mean of `precision` and `recall`; as these."""
    counts = _counts("f1", counts, average)
    return _averaged(2 * counts.diagonal(), counts.sum(0) + counts.sum(1), average)


def intersection_over_union(counts, average: str | None = "macro") -> jax.Array:
    """``C_kk / (Σ_i C_ik + Σ_j C_kj − C_kk)``, the share of what is k or answered k that is both; as `precision`.

    The Jaccard index; of places such as pixels it is what segmentation is measured by. "micro" is ``Σ_k`` of one over
    ``Σ_k`` of the other. A class that there is not and that is not predicted has 0 and counts in the mean over classes,
    where Keras' ``MeanIoU`` leaves it out.

    >>> counts = confusion(2)(jnp.eye(2)[jnp.array([0, 1, 1, 1])], jnp.array([0, 0, 1, 1])).sum(0)
    >>> [round(float(score), 4) for score in intersection_over_union(counts, None)]
    [0.5, 0.6667]
    """
    counts = _counts("intersection_over_union", counts, average)
    both = counts.diagonal()
    return _averaged(both, counts.sum(0) + counts.sum(1) - both, average)


def _counts(who: str, counts, average) -> jax.Array:
    counts = _floating(who, counts=counts.sum if isinstance(counts, Mean) else counts)
    if average not in ("macro", "micro", None):
        raise ValueError(f"{who}: average = {average!r}; expected 'macro', 'micro' or None for each class")
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"{who}: counts of shape {counts.shape}; expected (K, K), the sum of confusion(K) over a set")
    return counts.astype(wide(counts.dtype))


def _averaged(part, whole, average) -> jax.Array:
    if average == "micro":
        part, whole = part.sum(), whole.sum()
    each = jnp.where(whole == 0, 0, part / jnp.where(whole == 0, 1, whole))
    return each.mean() if average == "macro" else each


def perplexity(loss) -> jax.Array:
    """``exp`` of a mean cross-entropy in nats, a `Mean` or a number: so many likely ids leave as much doubt."""
    return jnp.exp(loss.value if isinstance(loss, Mean) else loss)


def roc_auc(scores, labels, weights=None) -> float:
    """The area under the receiver's curve: how often a positive's score is above a negative's, ties counting half.

    ``scores (N,)`` are logits or probabilities of label 1, ``labels (N,)`` 0 or 1. On the host, in float64, in
    O(N log N). Raises ValueError for other labels, scores that are NaN, what is masked, and a set that holds one label
    alone.

    >>> roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    scores, labels = _on_host("roc_auc", scores=scores, labels=labels)
    scores = scores.astype(np.float64)
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"roc_auc: scores {scores.shape} and labels {labels.shape}; expected (N,) for both")
    weights, counted = _weights_of("roc_auc", len(scores), weights)
    scores, labels = scores[counted], labels[counted]
    if not np.isin(labels, (0, 1)).all() or np.isnan(scores).any():
        raise ValueError("roc_auc: expected labels 0 and 1, and scores that are numbers")
    positive, negative = weights * (labels == 1), weights * (labels == 0)
    if not positive.sum() or not negative.sum():
        raise ValueError("roc_auc: one label alone has weight; expected examples of both")
    _, group = np.unique(scores, return_inverse=True)
    above, below = np.bincount(group, positive), np.bincount(group, negative)
    return float((above * (np.cumsum(below) - below / 2)).sum() / (positive.sum() * negative.sum()))


def r_squared(outputs, targets, weights=None) -> float:
    """``1 − Σ w (t − y)² / Σ w (t − t̄)²`` over a whole set ``(N,)`` or ``(N, F)``, the mean over features.

    On the host, in float64. Raises ValueError for shapes that differ, for what is masked or not finite (where the
    weight is not 0), and for targets that are all the same, of which nothing can be explained.
    """
    outputs, targets = (a.astype(np.float64) for a in _on_host("r_squared", outputs=outputs, targets=targets))
    if outputs.shape != targets.shape or not outputs.ndim:
        raise ValueError(f"r_squared: outputs {outputs.shape} and targets {targets.shape}; expected one shape (N, ...)")
    w, counted = _weights_of("r_squared", len(targets), weights)
    y, t = (a.reshape(len(a), -1)[counted] for a in (outputs, targets))
    for name, numbers in (("outputs", y), ("targets", t)):
        if not np.isfinite(numbers).all():
            raise ValueError(f"r_squared: {name} hold what is not finite; expected numbers, where the weight is not 0")
    if not t.size:
        raise ValueError(f"r_squared: targets {targets.shape} hold no number; expected one at least of each example")
    if (t == t[:1]).all(0).any():
        raise ValueError("r_squared: targets that are all the same; expected some that differ")
    least, most = t.min(0), t.max(0)
    y, t = ((a - least / 2 - most / 2) / (most / 2 - least / 2) for a in (y, t))  # so that squares are numbers
    spread = w @ np.square(t - np.average(t, 0, w))
    return float((1 - w @ np.square(t - y) / spread).mean())


def _on_host(who: str, **given) -> list[np.ndarray]:
    """Real numbers as arrays of NumPy, at the door that data come through; a ValueError names what is none."""
    arrays = {name: np.asarray(as_arrays(held, f"{who}: {name}")) for name, held in given.items()}
    for name, array in arrays.items():
        if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
            raise ValueError(f"{who}: {name} have dtype {array.dtype}; expected real numbers")
    return [*arrays.values()]


def _floating(who: str, **given) -> jax.Array:
    """An array of jax, floating; integers of NumPy are not made narrower before they are floats."""
    ((_, array),) = given.items()
    if not isinstance(array, jax.Array):
        (array,) = _on_host(who, **given)
        array = array.astype(float) if array.dtype.kind in "iu" else array
    return jnp.asarray(array)


def _weights_of(who: str, examples: int, weights) -> tuple[np.ndarray, np.ndarray]:
    """The weights above 0, and of which examples they are: one of weight 0 counts nothing, whatever it holds."""
    weights = np.ones(examples) if weights is None else _on_host(who, weights=weights)[0].astype(np.float64)
    if weights.shape != (examples,) or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(
            f"{who}: weights {weights.shape}; expected ({examples},), one for each example: finite numbers of at least "
            "0, not all of them 0"
        )
    return weights[weights > 0] / weights.max(), weights > 0


# --- of gradients -----------------------------------------------------------------------------------------------------


DECADES = (-12, 2)  # log10 of the least and the greatest magnitude that a gradient histogram tells apart


def magnitude_edges(bins: int) -> np.ndarray:
    """log10 of the edges between the bins of ``gradient_histograms(bins)``: -12, ..., 2, float64 ``(14 bins + 1,)``."""
    low, high = DECADES
    return np.linspace(low, high, (high - low) * bins + 1)


def gradient_histograms(bins: int = 1) -> Callable[[PyTree], dict[str, jax.Array]]:
    """A monitor, for `fnet.make_step`: how many gradients of each child of the tree have which magnitude.

    ``bins`` is their number in each power of ten from 1e-12 to 1e2. The counts are float32 ``(14 bins + 2,)``: first
    those below 1e-12 (zeros too), then each bin with its lower edge, last those of 1e2 and above; a NaN is in none.
    Children are named as in `gradient_norms`; ``all`` is a single array alone. Raises ValueError for bins below 1.

    >>> counts = gradient_histograms()({"dense_0": {"w": jnp.array([0.0, 0.005, -0.002, 30.0])}})
    >>> counts["dense_0"].astype(int).tolist()
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0]
    """
    require_counts("gradient_histograms", bins=bins)

    def counts(leaf):
        size = jnp.abs(leaf.reshape(-1, 1).astype(wide(leaf.dtype)))
        edges = jnp.asarray(np.concatenate([[0], 10 ** magnitude_edges(bins)]), size.dtype)
        reached = (size >= edges[None]).sum(0, dtype=jnp.int32)  # in whole numbers: float32 stops counting at 2²⁴
        return reached - jnp.append(reached[1:], 0)

    def monitor(grads):
        children = jax.tree_util.tree_leaves_with_path(grads, is_leaf=lambda node: node is not grads)
        floating = {jax.tree_util.keystr(path, simple=True) or "all": _floating_leaves(c) for path, c in children}
        return {
            name: sum(map(counts, leaves[1:]), counts(leaves[0])).astype(jnp.float32)
            for name, leaves in floating.items()
            if leaves
        }

    return monitor


def _floating_leaves(tree):
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _read(name, logits, targets):
    """Logits, labels, and whether each example's logits are free of NaN."""
    logits, targets = check_classes(name, logits, targets)
    labels = targets if jnp.issubdtype(targets.dtype, jnp.integer) else targets.argmax(-1)
    return logits, labels.astype(jnp.int32), ~jnp.isnan(logits).any(-1)


def _predict(logits):
    return logits.argmax(-1).astype(jnp.int32)
