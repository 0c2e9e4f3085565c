"""Vanishing and exploding gradients, each shown and then cured, in numbers (SOURCES.md, S11).

    python -m experiments.vanishing_gradients
    python -m experiments.vanishing_gradients --depths 2 5 10 20 50 --train-depth 50
    python -m experiments.vanishing_gradients --length 100 --updates 1500

Deep networks, on the 8x8 digits. A network of depth L is a dense layer, L − 1 blocks and a dense head; a block is an
activation and a dense layer, so δ_l = ∂loss/∂z_l, the gradient by what enters the activation of layer l, goes from one
layer to the one below by δ_{l−1} = (δ_l W_lᵀ) ∘ a'(z_{l−1}): depth multiplies factors. The table shows the factor, the
L − 1st root of |δ_1| / |δ_L|. It is measured at the start in float64 (float32 ends at 1e-38), by the backward by hand
and by autodiff, for the same network with naive weights and with each cure alone:

- initialisation: Glorot's (relu: He's), and orthogonal matrices; both scaled by the inverse of the activation's slope;
- batch normalisation before each activation, and residual connections around each block, with the small naive weights.

For relu and independent weights of standard deviation s in layers of n units the factor expected is s √(n / 2).
Then all of them train, by plain gradient descent at every rate in one vmapped program each.

Recurrent networks: the same factor, over time. From a sequence's end the gradient goes back to step t as g^(T − t),
where g scales the recurrent weights. An Elman network with relu that begins as the identity (Le et al.,
arXiv:1504.00941) learns the adding problem (Hochreiter and Schmidhuber, 1997): the sum of the two of T numbers that are
marked. Predicting the mean costs 1/6. Unclipped, single gradients throw it far off; clipping their global norm (Pascanu
et al., arXiv:1211.5063) is the cure. The norm's limit is data, and infinity is no clipping: one program trains both.

Legend: L depth, B examples, n units, T time steps; W weights, z what enters an activation a, h what leaves it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import fnet
from experiments.common import new_run_folder
from fnet.initializers import glorot_normal, he_normal, normal, orthogonal
from fnet.layers import batch_norm, dense, relu, repeat, residual, rnn, serial, sigmoid, tanh
from fnet.metrics import accuracy
from fnet.report import engine_table
from fnet.report.plots import new_figure
from fnet.types import Layer, Mean, stateless, stream


@dataclasses.dataclass(frozen=True)
class Config:
    """Gradients in deep and in recurrent networks: vanishing, exploding, cured."""

    depths: tuple[int, ...] = (2, 10, 50)  # hidden layers
    train_depth: int = 20  # of the networks that train
    units: int = 32  # of every hidden layer
    small: float = 0.05  # standard deviations of the naive weights
    large: float = 0.5
    epochs: int = 20
    batch_size: int = 32
    rates: tuple[float, ...] = (0.01, 0.1, 1.0)  # of gradient descent; the one of the lowest training loss is shown
    gains: tuple[float, ...] = (0.8, 1.0, 1.2)  # of the recurrent weights, before training
    length: int = 60  # T of the adding problem
    recurrent_units: int = 32
    updates: int = 1500
    recurrent_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    limit: float = 1.0  # of the gradient's global norm
    seeds: tuple[int, ...] = (0, 1, 2)  # of the split, the parameters and the order of the examples
    run_dir: Path = Path("runs")  # the run's folder is RUN_DIR/vanishing_gradients/NAME
    name: str | None = None  # None takes the time of day


# --- deep networks ---------------------------------------------------------------------------------------------------

ACTIVATIONS = {"sigmoid": sigmoid(), "tanh": tanh(), "relu": relu()}
SLOPES = {"sigmoid": 0.25, "tanh": 1.0, "relu": math.sqrt(0.5)}  # at 0; for relu the root of the mean square
CURES = {  # structure: the starts it is shown with
    "plain": ("small", "large", "scaled", "orthogonal"),
    "batch norm": ("small",),
    "residual": ("small",),
}


def title(structure: str, start: str) -> str:
    """What a network is called in tables and pictures."""
    names = {"small": "naive, small", "large": "naive, large", "scaled": "Glorot / He", "orthogonal": "orthogonal"}
    return names[start] if structure == "plain" else f"small + {structure}"


METHODS = tuple(title(structure, start) for structure, starts in CURES.items() for start in starts)


def initializers(config: Config, activation: str) -> dict:
    """The starts by name; gains undo the activation's slope."""
    gain = 1 / SLOPES[activation]
    glorot = glorot_normal()

    def scaled(key, shape, dtype):
        return gain * glorot(key, shape, dtype)

    return {
        "small": normal(config.small),
        "large": normal(config.large),
        "scaled": he_normal() if activation == "relu" else scaled,
        "orthogonal": orthogonal(gain),
    }


def probe() -> Layer:
    """``y = x + p`` with p = 0, a parameter of the shape of x: its gradient is the gradient by x, ready to be read."""
    return stateless("probe", lambda key, x: jnp.zeros(x.shape, x.dtype), lambda p, x: (x + p, ()), lambda p, _, dy: (dy, dy))


def make_network(config: Config, structure: str, activation: str, depth: int, weights, probes: bool = False) -> Layer:
    """``depth`` hidden layers and a head of ten logits; blocks stand in a `repeat`, which stacks their parameters."""
    act = [ACTIVATIONS[activation]] if structure != "batch norm" else [batch_norm(), ACTIVATIONS[activation]]
    hidden = dense(config.units, weights=weights)
    block = residual(*act, hidden) if structure == "residual" else serial(*act, hidden)
    probed = [("probe", probe())] if probes else []
    blocks = repeat(serial(("block", block), *probed), depth - 1)
    return serial(("first", serial(hidden, *probed)), ("blocks", blocks), *act, ("head", dense(10, weights=weights)))


def chosen(index, options):
    """The initializer at ``index``, which may be traced: one program serves several starts."""
    return lambda key, shape, dtype: jax.lax.switch(index, [partial(draw, key, shape, dtype) for draw in options])


def start_norms(config: Config, structure: str, activation: str, depth: int, batch: fnet.Batch, keys):
    """``|δ_l|`` and ``|∂loss/∂W_l|`` ``(starts, seeds, depth)`` at the start by hand, and autodiff's relative distance."""
    options = list(initializers(config, activation).values())

    def member(index, key, batch):
        model = make_network(config, structure, activation, depth, chosen(index, options), probes=True)
        params, state = model.init(key, batch.inputs)
        by_hand, by_autodiff = (
            engine(model, fnet.softmax_cross_entropy)(params, state, batch, key)[0]
            for engine in (fnet.backprop, fnet.autodiff)
        )

        def norms(grads):
            first, blocks = grads["first"], grads["blocks"]
            delta = jnp.concatenate([first["probe"][None], blocks["probe"]])  # (L, B, n)
            weights = jnp.concatenate([jnp.sum(first["dense_0"]["w"]**2)[None], (blocks["block"]["dense_0"]["w"]**2).sum((1, 2))])
            return jnp.sqrt((delta**2).sum((1, 2))), jnp.sqrt(weights)

        apart = jax.tree.map(jnp.subtract, by_hand, by_autodiff)
        errors = [(jnp.where(b == 0, a, a / jnp.where(b == 0, 1, b))).max() for a, b in zip(norms(apart), norms(by_autodiff), strict=True)]
        return *norms(by_hand), jnp.maximum(*errors)

    names = list(initializers(config, activation))
    indices = jnp.array([names.index(start) for start in CURES[structure]])
    by_seed = jax.vmap(member, in_axes=(None, 0, None))
    return jax.device_get(jax.jit(jax.vmap(by_seed, in_axes=(0, None, None)))(indices, keys, batch))
