"""What losses and metrics require of outputs and targets: one array each, of a dtype and a shape that fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import refuse_masked
from fnet.core.contexts import place_of
from fnet.layers.masks import is_masked


def check_real(name, outputs, targets):
    """Both as arrays; raises unless they are floating and of one shape."""
    outputs, targets = as_array(name, "outputs", outputs), as_array(name, "targets", targets)
    require_floating(name, outputs)
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(f"{name}: targets are {targets.dtype}; expected floating: convert them, say to float32")
    require_same_shape(name, outputs, targets)
    return jnp.asarray(outputs), jnp.asarray(targets)


def check_binary(name, outputs, targets):
    """Both as arrays, 0/1 targets as floats; raises unless shapes agree and known targets are from 0 to 1."""
    outputs, targets = as_array(name, "outputs", outputs), as_array(name, "targets", targets)
    require_floating(name, outputs)
    require_same_shape(name, outputs, targets)
    require_range(name, "target", targets, 1)
    z, y = jnp.asarray(outputs), jnp.asarray(targets)
    if jnp.issubdtype(y.dtype, jnp.floating):
        return z, y
    if not (jnp.issubdtype(y.dtype, jnp.integer) or y.dtype == jnp.bool_):
        raise ValueError(f"{name}: targets are {y.dtype}; expected bool, integer or floating")
    y = y.astype(jnp.float32)
    return z, jnp.where((y == 0) | (y == 1), y, jnp.nan)


def check_classes(name, logits, targets):
    """Both as arrays; raises unless targets are labels ``(...)`` or probabilities ``(..., K)`` for ``(..., K)``."""
    logits, targets = as_array(name, "outputs", logits), as_array(name, "targets", targets)
    require_floating(name, logits)
    if not logits.shape:
        raise ValueError(f"{name}: outputs have no axes; expected (..., K), the logits of K classes")
    *rows, classes = logits.shape
    is_label = jnp.issubdtype(targets.dtype, jnp.integer)
    fits = targets.shape == tuple(rows) if is_label else targets.shape == logits.shape
    if not fits or not (is_label or jnp.issubdtype(targets.dtype, jnp.floating)):
        raise ValueError(
            f"{name}: outputs {logits.shape} do not go with {targets.dtype} targets {targets.shape}; "
            f"expected integer labels {tuple(rows)} or floating probabilities {logits.shape}: reshape or convert them"
        )
    if is_label:
        require_range(name, "label", targets, classes - 1, f" (outputs have {classes} classes)")
    return jnp.asarray(logits), jnp.asarray(targets)


def as_array(name, what, given):
    """``given``, or an array of a list of numbers; raises for anything else, such as outputs beside their mask."""
    if isinstance(given, np.ma.MaskedArray):
        refuse_masked(f"{name}: {what} have", given, "or give their examples the weight 0")
        return np.asarray(given)
    if isinstance(given, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return given
    numbers = isinstance(given, list | tuple) and not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(given))
    if numbers or isinstance(given, int | float):
        try:
            array = np.asarray(given)
        except ValueError:  # rows of unequal length
            array = None
        if array is not None and array.dtype.kind in "biuf":
            return array
    leaves = [leaf for leaf in jax.tree.leaves(given) if hasattr(leaf, "shape")]
    parts = ", ".join(f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(leaf.shape)}" for leaf in leaves)
    remedy = "take its parts apart"
    if is_masked(given):
        remedy = "end the model with drop_mask() and give the mask as the batch's weights"
    if len(leaves) == 1 and leaves[0] is given:  # a table, a tensor of another library
        remedy = "of a table take .to_numpy(), of a tensor numpy.asarray"
    raise ValueError(
        f"{name}: {what} are a {type(given).__name__} of {parts or repr(given)[:60]}; expected one array: {remedy}"
    )


def as_probabilities(targets, z):
    """Targets of classes as probabilities, shaped like the outputs ``z`` and in their dtype."""
    return targets.astype(z.dtype) if targets.ndim == z.ndim else one_hot(targets, z.shape[-1], z.dtype)


def one_hot(labels, classes, dtype):
    """Probability 1 at the label; NaN throughout where there is no such class, so that it cannot pass unseen."""
    if labels.dtype.itemsize < 4:  # an int8 cannot be compared with 200 classes
        labels = labels.astype(jnp.int32)
    known = (labels >= 0) & (labels < classes)
    return jnp.where(known[..., None], jax.nn.one_hot(labels, classes, dtype=dtype), jnp.nan)


def step(x):
    """1 above 0, else 0, and NaN of NaN: ``step(x) · x`` and its derivative ``step(x)`` hide none."""
    return jnp.maximum(jnp.sign(x), 0)


def above_0(x):
    """``max(x, 0)``, whose derivative is 0 at 0 and NaN at NaN, by autodiff too."""
    live = step(x)
    return live * jnp.where(live == 0, 0, x)  # an infinity times 0 is NaN


def require_range(name, what, targets, high, note=""):
    """Raise for the first target that is not from 0 to ``high``; traced ones are not known."""
    if isinstance(targets, Tracer):
        return
    known = np.asarray(targets)
    inside = (known >= 0) & (known <= high)
    if not inside.all():
        at = tuple(np.argwhere(~inside)[0].tolist())
        raise ValueError(f"{name}: {what} {known[at]} {place_of(at, known.shape)} is outside 0..{high}{note}")


def require_floating(name, outputs):
    """Raise unless outputs are floating."""
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"{name}: outputs are {outputs.dtype}; expected floating: convert them, say to float32")


def require_same_shape(name, outputs, targets):
    """Raise unless both have one shape."""
    if outputs.shape != targets.shape:
        raise ValueError(
            f"{name}: outputs {outputs.shape} and targets {targets.shape} must have one shape, since broadcasting "
            f"would pair examples with each other's targets: reshape the targets to {outputs.shape}"
        )
