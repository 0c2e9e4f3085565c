"""A training step of four models, by fnet's two engines and by PyTorch, float32, Adam, at the sizes of SPEED below.

    make bench MODULE=benchmarks.models
    make bench MODULE=benchmarks.models ARGS="--only lstm --repeats 15"

- mlp: 784-128-64-10, batch 32
- lenet: LeNet-5, batch 64, images 28×28
- lstm: embedding of 64, lstm of 128, dense of 100; 32 sequences of 64 ids out of 100
- gpt: 4 blocks of 128 features and 4 heads; 32 sequences of 64 ids out of 100

All train on the same batches, all in turn; fnet as it is used (`jax.lax.scan` over the steps of a round), torch eagerly
with its fused Adam. Times are medians of rounds; ratios are taken round by round, between neighbours in time.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.s1 import interleaved, show

RATE, VOCABULARY, BATCH, LENGTH = 1e-3, 100, 32, 64
STEPS = {"mlp": 200, "lenet": 20, "lstm": 10, "gpt": 3}  # in a round


def data_for(name: str):
    """Inputs and targets of a round's steps, ``(steps, batch, ...)``."""
    rng, steps = np.random.default_rng(0), STEPS[name]
    if name == "mlp":
        return rng.standard_normal((steps, 32, 784), np.float32), rng.integers(0, 10, (steps, 32))
    if name == "lenet":
        return rng.standard_normal((steps, 64, 28, 28, 1), np.float32), rng.integers(0, 10, (steps, 64))
    ids = rng.integers(0, VOCABULARY, (steps, BATCH, LENGTH + 1))
    return ids[..., :-1], ids[..., 1:]


# --- fnet ------------------------------------------------------------------------------------------------------------


def fnet_model(name: str, form: str = ""):
    import fnet
    from fnet.layers import dense, embedding, lstm, serial

    models = {
        "mlp": lambda: fnet.mlp(128, 64, 10),
        "lenet": lambda: fnet.models.lenet5(),
        "lstm": lambda: serial(embedding(VOCABULARY, 64), lstm(128), dense(VOCABULARY)),
        "gpt": lambda: fnet.models.gpt(
            VOCABULARY, length=LENGTH, layers=4, features=128, heads=4, repeated=form == "repeat"
        ),
    }
    return models[name]()


def fnet_by(name: str, engine: str, form: str = ""):
    def prepare(inputs, targets):
        import jax
        import jax.numpy as jnp

        import fnet

        model, optimizer = fnet_model(name, form), fnet.adam(RATE)
        batches = fnet.Batch(jnp.asarray(inputs), jnp.asarray(targets))
        params, state = fnet.init(model, jax.random.key(0), batches.inputs[0])
        start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
        step = fnet.make_step(getattr(fnet, engine)(model, fnet.softmax_cross_entropy), optimizer)
        program = jax.jit(lambda ts, batches: jax.lax.scan(step, ts, batches)[1]["loss"])
        return lambda: program(start, batches).value[-1].item()

    return prepare


# --- torch -----------------------------------------------------------------------------------------------------------


def torch_model(name: str):
    from torch import nn
    from torch.nn import functional as F

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm = nn.Embedding(VOCABULARY, 64), nn.LSTM(64, 128, batch_first=True)
            self.out = nn.Linear(128, VOCABULARY)

        def forward(self, ids):
            return self.out(self.lstm(self.embed(ids))[0])

    class Block(nn.Module):
        def __init__(self, features=128, heads=4):
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
        def __init__(self):
            super().__init__()
            self.embed, self.positions = nn.Embedding(VOCABULARY, 128), nn.Embedding(LENGTH, 128)
            nn.init.normal_(self.embed.weight, std=0.02)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(4))), nn.LayerNorm(128)

        def forward(self, ids):
            x = self.embed(ids) + self.positions.weight[None]
            return self.norm(self.blocks(x)) @ self.embed.weight.T

    if name == "lstm":
        return Recurrent()
    if name == "gpt":
        return GPT()
    if name == "mlp":
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def torch_by(name: str):
    def prepare(inputs, targets):
        import torch
        from torch import nn

        torch.manual_seed(0)
        x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
        if name == "lenet":
            x = x.permute(0, 1, 4, 2, 3).contiguous()
        model, loss_fn = torch_model(name), nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)

        def run():
            for ids, labels in zip(x, y, strict=True):
                optimizer.zero_grad()
                logits = model(ids)
                loss = loss_fn(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
                loss.backward()
                optimizer.step()
            return loss.item()

        return run

    return prepare


def peers_of(name: str) -> dict:
    peers = {
        "torch": torch_by(name),
        "fnet autodiff": fnet_by(name, "autodiff"),
        "fnet backprop": fnet_by(name, "backprop"),
    }
    if name == "gpt":
        peers["fnet backprop, repeat"] = fnet_by(name, "backprop", "repeat")
    return peers


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step of four models: fnet and PyTorch")
    parser.add_argument("--only", choices=STEPS, nargs="+", default=list(STEPS), help="these models")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    options = parser.parse_args()
    for name in options.only:
        data = data_for(name)
        runs = {peer: prepare(*data) for peer, prepare in peers_of(name).items()}
        for peer, run in runs.items():
            print(f"{name}, {peer}: loss {run():.4f}", flush=True)
        seconds = interleaved(runs, options.repeats)
        per_step = {peer: [1e3 * t / STEPS[name] for t in times] for peer, times in seconds.items()}
        show(f"{name}: a training step", per_step, ("torch", "fnet autodiff"), unit="ms")


if __name__ == "__main__":
    main()
