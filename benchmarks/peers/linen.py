"""flax linen and optax, with the steps of a round in a scan; recurrent layers by `linen.RNN`, a scan of the cell."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks.peers import BLOCKS, FEATURES, HEADS, LENGTH, RATE, RECURRENCE, VOCABULARY, WIDTHS, Prepared, in_a_scan


class MLP(nn.Module):
    widths: tuple[int, ...]  # the inputs' first

    @nn.compact
    def __call__(self, x):
        for width in self.widths[1:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(6, (5, 5))(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(16, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(84)(nn.relu(nn.Dense(120)(x)))))


class Conv(nn.Module):
    """A convolution without bias, half a kernel of zeros on every side, and its normalisation."""

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        size, stride, edge = (self.size,) * 2, (self.stride,) * 2, self.size // 2
        x = nn.Conv(self.features, size, stride, padding=((edge, edge), (edge, edge)), use_bias=False)(x)
        return nn.BatchNorm(use_running_average=False)(x)


class ResNet8(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(Conv(16)(x))
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            shortcut = Conv(features, 1, stride)(x) if stride > 1 else x
            x = nn.relu(shortcut + Conv(features)(nn.relu(Conv(features, 3, stride)(x))))
        return nn.Dense(10)(x.mean((1, 2)))


class Recurrent(nn.Module):
    cell: Any
    vocabulary: int
    features: int
    units: int

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.vocabulary, self.features)(ids)
        return nn.Dense(self.vocabulary)(nn.RNN(self.cell(self.units))(x))


class GPT(nn.Module):
    @nn.compact
    def __call__(self, ids):
        small, mask = nn.initializers.normal(0.02), nn.make_causal_mask(ids)
        embed = nn.Embed(VOCABULARY, FEATURES, embedding_init=small)
        x = embed(ids) + self.param("positions", small, (LENGTH, FEATURES))[None]
        for _ in range(BLOCKS):
            x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm(1e-5)(x), mask=mask)
            y = nn.gelu(nn.Dense(4 * FEATURES)(nn.LayerNorm(1e-5)(x)))  # by tanh
            x = x + nn.Dense(FEATURES)(y)
        return embed.attend(nn.LayerNorm(1e-5)(x))


MODELS = {
    "mlp": lambda: MLP(WIDTHS),
    "lenet": LeNet,
    "resnet8": ResNet8,
    "lstm": lambda: Recurrent(nn.OptimizedLSTMCell, **RECURRENCE),
    "gru": lambda: Recurrent(nn.GRUCell, **RECURRENCE),
    "rnn": lambda: Recurrent(nn.SimpleCell, **RECURRENCE),
    "gpt": GPT,
}


def prepare(name: str, inputs, targets) -> Prepared:
    model, optimizer = MODELS[name](), optax.adam(RATE)
    x, y = jnp.asarray(inputs), jnp.asarray(targets)
    variables = jax.jit(model.init)(jax.random.key(0), x[0])
    params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    start = params, stats, optimizer.init(params)

    def step(carry, batch):
        (params, stats, opt_state), (x, y) = carry, batch

        def loss_fn(params):
            logits, changed = model.apply({"params": params, **stats}, x, mutable=[*stats])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    return in_a_scan(step, start, params, x, y)
