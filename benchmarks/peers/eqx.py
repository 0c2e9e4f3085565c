"""equinox and optax, with the steps of a round in a scan; modules of one example under `jax.vmap`, as in its docs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from equinox import nn

from benchmarks.peers import (
    BLOCKS,
    EMBEDDED,
    FEATURES,
    HEADS,
    LENGTH,
    RATE,
    UNITS,
    VOCABULARY,
    WIDTHS,
    Prepared,
    in_a_scan,
)


def keys_of(key):
    """As many keys as are asked for."""
    return (jax.random.fold_in(key, i) for i in itertools.count())


class Plain(eqx.Module):
    """Layers without a state, one after another."""

    layers: nn.Sequential

    def __call__(self, x, state):
        return self.layers(x), state


def mlp(key) -> Plain:
    relu, keys = nn.Lambda(jax.nn.relu), keys_of(key)
    layers = [[nn.Linear(n, m, key=next(keys)), relu] for n, m in itertools.pairwise(WIDTHS)]
    return Plain(nn.Sequential([*itertools.chain(*layers)][:-1]))


def lenet(key) -> Plain:
    relu, pool, keys = nn.Lambda(jax.nn.relu), nn.MaxPool2d(2, 2), keys_of(key)
    return Plain(
        nn.Sequential(
            [
                *(nn.Conv2d(1, 6, 5, padding=2, key=next(keys)), relu, pool),
                *(nn.Conv2d(6, 16, 5, key=next(keys)), relu, pool, nn.Lambda(jnp.ravel)),
                *(nn.Linear(400, 120, key=next(keys)), relu, nn.Linear(120, 84, key=next(keys)), relu),
                nn.Linear(84, 10, key=next(keys)),
            ]
        )
    )


class Conv(eqx.Module):
    """A convolution without bias, half a kernel of zeros on every side, and its normalisation."""

    conv: nn.Conv2d
    norm: nn.BatchNorm

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, key):
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, use_bias=False, key=key)
        self.norm = nn.BatchNorm(outputs, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(self.conv(x), state)


class Block(eqx.Module):
    first: Conv
    second: Conv
    shortcut: Conv | None

    def __init__(self, inputs: int, outputs: int, stride: int, key):
        keys = keys_of(key)
        self.first, self.second = (
            Conv(inputs, outputs, 3, stride, next(keys)),
            Conv(outputs, outputs, 3, 1, next(keys)),
        )
        self.shortcut = Conv(inputs, outputs, 1, stride, next(keys)) if stride > 1 else None

    def __call__(self, x, state):
        y, state = self.first(x, state)
        y, state = self.second(jax.nn.relu(y), state)
        if self.shortcut is not None:
            x, state = self.shortcut(x, state)
        return jax.nn.relu(x + y), state


class ResNet8(eqx.Module):
    stem: Conv
    blocks: list[Block]
    head: nn.Linear

    def __init__(self, key):
        keys = keys_of(key)
        self.stem, self.head = Conv(3, 16, 3, 1, next(keys)), nn.Linear(64, 10, key=next(keys))
        self.blocks = [Block(n, m, stride, next(keys)) for n, m, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))]

    def __call__(self, x, state):
        x, state = self.stem(x, state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean((1, 2))), state


class SimpleCell(eqx.Module):
    """Elman's network, which equinox has no cell of."""

    inputs: nn.Linear
    hidden: nn.Linear

    def __init__(self, inputs: int, units: int, key):
        keys = keys_of(key)
        self.inputs = nn.Linear(inputs, units, key=next(keys))
        self.hidden = nn.Linear(units, units, use_bias=False, key=next(keys))

    def __call__(self, x, carry):
        return jnp.tanh(self.inputs(x) + self.hidden(carry))


class Recurrent(eqx.Module):
    embed: nn.Embedding
    cell: Any
    out: nn.Linear

    def __init__(self, cell: Callable, key):
        keys = keys_of(key)
        self.embed = nn.Embedding(VOCABULARY, EMBEDDED, key=next(keys))
        self.cell = cell(EMBEDDED, UNITS, key=next(keys))
        self.out = nn.Linear(UNITS, VOCABULARY, key=next(keys))

    def __call__(self, ids, state):
        zeros = jnp.zeros(UNITS)
        carry = (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros

        def step(carry, x):
            carry = self.cell(x, carry)
            return carry, carry[0] if isinstance(carry, tuple) else carry

        return jax.vmap(self.out)(jax.lax.scan(step, carry, jax.vmap(self.embed)(ids))[1]), state


class TransformerBlock(eqx.Module):
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    attention: nn.MultiheadAttention
    wide: nn.Linear
    narrow: nn.Linear

    def __init__(self, key):
        keys = keys_of(key)
        self.norm1, self.norm2 = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = nn.MultiheadAttention(HEADS, FEATURES, **biases, key=next(keys))
        self.wide = nn.Linear(FEATURES, 4 * FEATURES, key=next(keys))
        self.narrow = nn.Linear(4 * FEATURES, FEATURES, key=next(keys))

    def __call__(self, x):
        y, causal = jax.vmap(self.norm1)(x), jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = x + self.attention(y, y, y, mask=causal)
        y = jax.nn.gelu(jax.vmap(self.wide)(jax.vmap(self.norm2)(x)))  # by tanh
        return x + jax.vmap(self.narrow)(y)


class GPT(eqx.Module):
    embed: jax.Array
    positions: jax.Array
    blocks: list[TransformerBlock]
    norm: nn.LayerNorm

    def __init__(self, key):
        keys = keys_of(key)
        self.embed = 0.02 * jax.random.normal(next(keys), (VOCABULARY, FEATURES))
        self.positions = 0.02 * jax.random.normal(next(keys), (LENGTH, FEATURES))
        self.blocks = [TransformerBlock(next(keys)) for _ in range(BLOCKS)]
        self.norm = nn.LayerNorm(FEATURES)

    def __call__(self, ids, state):
        x = self.embed[ids] + self.positions
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(x) @ self.embed.T, state


MODELS = {
    "mlp": mlp,
    "lenet": lenet,
    "resnet8": ResNet8,
    "lstm": lambda key: Recurrent(nn.LSTMCell, key),
    "gru": lambda key: Recurrent(nn.GRUCell, key),
    "rnn": lambda key: Recurrent(SimpleCell, key),
    "gpt": GPT,
}


def prepare(name: str, inputs, targets) -> Prepared:
    x, y = jnp.asarray(inputs), jnp.asarray(targets)
    if x.ndim == 5:  # images, (steps, batch, height, width, channels)
        x = x.transpose(0, 1, 4, 2, 3)
    model, state = nn.make_with_state(MODELS[name])(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = optax.adam(RATE)
    start = params, state, optimizer.init(params)

    def step(carry, batch):
        (params, state, opt_state), (x, y) = carry, batch

        def loss_fn(params):
            batched = jax.vmap(eqx.combine(params, static), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            logits, changed = batched(x, state)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed

        (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (eqx.apply_updates(params, updates), state, opt_state), loss

    return in_a_scan(step, start, params, x, y)
