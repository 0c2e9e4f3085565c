"""Programs for chips that are not here: a step, or any function, lowered for each platform by jax alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fnet.core.platforms import PLATFORMS, traced_for


def lower(function: Callable, *arguments: Any, platforms: Sequence[str] = ("cpu", "cuda", "tpu")) -> dict[str, Any]:
    """``function(*arguments)`` as the `jax.stages.Lowered` of each platform, none of which need be at hand.

    ``arguments`` are arrays or `jax.ShapeDtypeStruct`s; nothing is computed. Layers take the form that is theirs on
    that platform: a convolution is a product of matrices on CPU and XLA's own operation elsewhere. ``.as_text()`` is
    the program; it is compiled where the chip is (``Lowered.compile`` compiles for what is at hand).

    Raises ValueError for a platform that jax does not know, TypeError for what is no function, and whatever the
    function raises when it is traced.

    >>> import jax.numpy as jnp
    >>> from fnet.layers import conv
    >>> layer, x = conv(4, (3, 3)), jnp.ones((2, 8, 8, 1))
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> found = lower(lambda params, x: layer.forward(params, state, x)[0], params, x, platforms=("cpu", "cuda"))
    >>> {name: program.as_text().count("stablehlo.convolution") for name, program in found.items()}
    {'cpu': 0, 'cuda': 1}
    """
    if not callable(function):
        raise TypeError(f"lower: function is a {type(function).__name__}; expected a function, such as a step")
    named = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    for name in named:
        if name not in PLATFORMS:
            raise ValueError(f"lower: platforms = {platforms!r}; expected some of {', '.join(PLATFORMS)}")
    made = {}
    for name in named:
        with traced_for(name):
            # a function of its own for each, since jax keeps what it has traced
            traced = jax.jit(lambda *arguments: function(*arguments)).trace(*arguments)
        made[name] = traced.lower(lowering_platforms=(name,))
    return made
