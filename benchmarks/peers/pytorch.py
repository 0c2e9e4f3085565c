"""PyTorch, in an eager loop with its fused Adam; and the same loop with the loss by `torch.compile`."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers import (
    BLOCKS,
    FEATURES,
    HEADS,
    LENGTH,
    RATE,
    RECURRENCE,
    RECURRENT,
    UNITS,
    VOCABULARY,
    WIDTHS,
    Prepared,
)

BIASES = {"lstm": 4 * UNITS, "gru": 2 * UNITS, "rnn": UNITS}  # second ones, which only add to the first


class Recurrent(nn.Module):
    def __init__(self, layer, vocabulary: int, features: int, units: int):
        super().__init__()
        self.embed, self.layer = nn.Embedding(vocabulary, features), layer(features, units, batch_first=True)
        self.out = nn.Linear(units, vocabulary)

    def forward(self, ids):
        return self.out(self.layer(self.embed(ids))[0])


class TransformerBlock(nn.Module):
    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.mlp = nn.Sequential(
            nn.Linear(features, 4 * features), nn.GELU(approximate="tanh"), nn.Linear(4 * features, features)
        )

    def forward(self, x):
        batch, length, features = x.shape
        parts = self.qkv(self.norm1(x)).split(features, -1)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, features))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, length: int, layers: int, features: int, heads: int):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, features), nn.Embedding(length, features)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(features, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(features)

    def forward(self, ids):
        x = self.embed(ids) + self.positions.weight[None]
        return self.norm(self.blocks(x)) @ self.embed.weight.T


def conv3x3(inputs: int, outputs: int, stride: int = 1):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(*conv3x3(inputs, outputs, stride), nn.ReLU(), *conv3x3(outputs, outputs))
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.branch(x))


def lenet():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def resnet8():
    blocks = BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 64, 2)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(*conv3x3(3, 16), nn.ReLU(), *blocks, *pooled)


def mlp(widths):
    layers = [[nn.Linear(n, m), nn.ReLU()] for n, m in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*layers))[:-1]


MODELS = {
    "mlp": lambda: mlp(WIDTHS),
    "lenet": lenet,
    "resnet8": resnet8,
    "lstm": lambda: Recurrent(nn.LSTM, **RECURRENCE),
    "gru": lambda: Recurrent(nn.GRU, **RECURRENCE),
    "rnn": lambda: Recurrent(nn.RNN, **RECURRENCE),
    "gpt": lambda: GPT(VOCABULARY, LENGTH, BLOCKS, FEATURES, HEADS),
}


def prepare(name: str, inputs, targets, compiled: bool = False) -> Prepared:
    """With ``compiled`` the loss is one graph by `torch.compile`, but of lstm, gru and rnn, which it leaves as calls of
    the eager kernels; the fused Adam is eager in both.
    """
    torch.manual_seed(0)
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    if x.ndim == 5:  # images, (steps, batch, height, width, channels)
        x = x.permute(0, 1, 4, 2, 3).contiguous()
    model, loss_fn = MODELS[name](), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)

    def loss_of(x, y):
        logits = model(x)
        return loss_fn(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))

    if compiled:
        loss_of = torch.compile(loss_of, fullgraph=name not in RECURRENT)

    def run():
        loss = torch.zeros(())
        for inputs, targets in zip(x, y, strict=True):
            optimizer.zero_grad()
            loss = loss_of(inputs, targets)
            loss.backward()
            optimizer.step()
        return loss.item()

    return Prepared(run, sum(leaf.numel() for leaf in model.parameters()) - BIASES.get(name, 0))
