"""The recurrent half of `vanishing_gradients`: gradients through time, and a sum that is learnt from their end.

The factor of deep networks, over time: from a sequence's end the gradient goes back to step t as g^(T − t), where g
scales the recurrent weights. An Elman network with relu that begins as the identity (Le et al., arXiv:1504.00941)
learns the adding problem (Hochreiter and Schmidhuber, 1997): the sum of the two of T numbers that are marked.
Predicting the mean costs 1/6. Unclipped, single gradients throw it far off; clipping their global norm (Pascanu et al.,
arXiv:1211.5063) is the cure. The norm's limit is data, and infinity is no clipping: one program trains both.

Legend: B examples, n units, T time steps, E epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import fnet
from fnet.core.numerics import stream
from fnet.layers import dense, relu, rnn, serial, stateless
from fnet.layers.initializers import glorot_normal, normal
from fnet.metrics import gradient_norms
from fnet.optimizers.transforms import clip_by_global_norm
from fnet.types import Layer


def last() -> Layer:
    """The last step of a sequence: ``x (B, T, n)`` to ``y (B, n)``."""

    def backward(params, carrier, dy):  # y = x_T:  dx_T = dy, and 0 at every other step
        return (), jnp.zeros(carrier.shape[1:], dy.dtype).at[:, -1].set(dy)

    def forward(params, x):  # the residual is an empty array that carries the shape
        return x[:, -1], jnp.zeros((0, *x.shape), x.dtype)

    return stateless("last", lambda key, x: (), forward, backward)


def scaled_identity(gain) -> Callable:
    """The recurrent weights ``gain · 1``."""
    return lambda key, shape, dtype: gain * jnp.eye(*shape, dtype=dtype)


def make_recurrent(units: int, gain=1.0) -> Layer:
    """An Elman network with relu that begins as ``gain`` times the identity, and the sum read off its last step."""
    hidden = rnn(units, relu(), weights=normal(0.1), recurrent=scaled_identity(gain))
    return serial(hidden, last(), dense(1, weights=glorot_normal()))


def adding_problem(key, n: int, length: int) -> fnet.Batch:
    """Sequences ``(n, T, 2)`` of numbers in 0..1 and marks, one in each half, and the sums ``(n, 1)`` of the marked."""
    numbers = jax.random.uniform(stream(key, "numbers"), (n, length))
    half = length // 2
    places = [
        jax.random.randint(stream(key, "first"), (n,), 0, half),
        jax.random.randint(stream(key, "second"), (n,), half, length),
    ]
    marks = sum(jax.nn.one_hot(place, length) for place in places)
    return fnet.Batch(jnp.stack([numbers, marks], -1), (numbers * marks).sum(1, keepdims=True))


def time_norms(units: int, gains: Sequence[float], batch: fnet.Batch, key) -> dict[float, np.ndarray]:
    """By gain: the norm ``(T,)`` of the loss' gradient by the inputs of each step, before any training, by hand."""
    found = {}
    for gain in gains:
        model = make_recurrent(units, gain)
        params, state = model.init(key, batch.inputs)
        engine = fnet.backprop(model, fnet.losses.squared_error, inputs=True)
        (_, dx), _, _ = jax.jit(engine)(params, state, batch, key)
        found[gain] = np.sqrt((np.asarray(dx) ** 2).sum((0, 2)))
    return found


def train_member(engine, rate, limit, key, *, units: int, length: int, sequences: int, epochs: int, batch_size: int):
    """A whole run as a function of its rate, its limit and its key: loss and gradient norm of each update."""
    model, data = make_recurrent(units), adding_problem(stream(key, "data"), sequences, length)
    params, state = model.init(stream(key, "model"), data.inputs)
    optimizer = fnet.chain(clip_by_global_norm(limit), fnet.sgd(rate))
    ts = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    whole_norm = {"gradient_norm": lambda grads: gradient_norms(grads)["all"]}  # before it is clipped
    step = fnet.make_step(engine(model, fnet.losses.squared_error), optimizer, whole_norm)
    _, metrics, _ = fnet.train(step, ts, data, epochs=epochs, batch_size=batch_size)
    return {name: metrics[name].value for name in ("loss", "gradient_norm")}  # (E, updates an epoch)
