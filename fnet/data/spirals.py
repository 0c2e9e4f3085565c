"""Points in the plane that lie along the arms of a spiral: data to begin with, for which nothing is installed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fnet.core.checks import require, require_counts, require_key
from fnet.core.numerics import stream
from fnet.types import Batch


def spirals(key: jax.Array, examples: int = 3000, classes: int = 3, noise: float = 0.2) -> Batch:
    """``Batch(inputs (examples, 2), targets (examples,))``: of each point, along which of ``classes`` arms it lies.

    Point i is of arm ``c = i mod classes``, at a distance r from the centre, uniform from 0 to 1, at the angle
    ``2π c / classes + 4 r + noise · ε`` in radians with a normal ε: ``r · (sin, cos)``. No straight line parts the
    arms. After Andrej Karpathy's lecture notes for CS231n, "Putting it together: minimal neural network case study".

    >>> points = spirals(jax.random.key(0), 6)
    >>> points.inputs.shape, points.targets.tolist()
    ((6, 2), [0, 1, 2, 0, 1, 2])
    """
    require_key("spirals", key)
    require_counts("spirals", examples=examples, classes=classes)
    require(noise >= 0, f"spirals: noise = {noise}; expected at least 0")
    arms = jnp.arange(examples) % classes
    # other bits than those by which `split` shuffles with the same key
    place, turn = jax.random.split(stream(key, "spirals"))
    r = jax.random.uniform(place, (examples,))
    angle = arms.astype(r.dtype) * (2 * jnp.pi / classes) + 4 * r + noise * jax.random.normal(turn, (examples,))
    return Batch(r[:, None] * jnp.stack([jnp.sin(angle), jnp.cos(angle)], 1), arms)
