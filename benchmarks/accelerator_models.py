"""The models of `benchmarks.accelerator` by fnet, flax and torch, and a training step of each with Adam.

A peer is prepared by ``prepare(name, size, batch) -> run, about``: ``run(steps)`` makes so many updates of one batch
that lies on the device, and waits for the last; ``about`` says what was compiled and how large it is. The modules of
torch and flax are those of `benchmarks.peers`, which need nothing but the two and optax.

Legend: B batch, T time, E embedding, H units, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np

RATE = 1e-3
REAL = {
    "mlp": {"units": (784, 128, 64, 10), "batch": 32},
    "lenet": {"batch": 64},
    "resnet": {"blocks": (2, 2, 2, 2), "width": 64, "classes": 1000, "side": 224, "batch": 128},
    "lstm": {"vocabulary": 100, "features": 64, "units": 128, "length": 64, "batch": 32},
    "gpt": {"vocabulary": 50257, "length": 1024, "layers": 12, "features": 768, "heads": 12, "batch": 8},
}
TOY = {
    "mlp": {"units": (784, 128, 64, 10), "batch": 32},
    "lenet": {"batch": 4},
    "resnet": {"blocks": (1, 1), "width": 4, "classes": 10, "side": 32, "batch": 2},
    "lstm": {"vocabulary": 20, "features": 8, "units": 8, "length": 6, "batch": 4},
    "gpt": {"vocabulary": 50, "length": 16, "layers": 1, "features": 16, "heads": 2, "batch": 2},
}
BFLOAT16 = ("gpt",)  # trained in bfloat16 on float32 parameters; the others in float32, products in TF32
TITLES = {
    "mlp": "784-128-64-10, batch 32, float32",
    "lenet": "LeNet-5, batch 64, float32",
    "resnet": "ResNet-18, 224 × 224, batch 128, float32",
    "lstm": "LSTM of 128 on 64 steps, batch 32, float32",
    "gpt": "GPT-2 of 124M, 8 × 1,024 tokens, bfloat16",
}


def data_for(name: str, size: dict) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one batch; images have their channels last."""
    rng, batch = np.random.default_rng(0), size["batch"]
    if name == "mlp":
        return rng.standard_normal((batch, size["units"][0]), np.float32), rng.integers(0, size["units"][-1], batch)
    if name == "lenet":
        return rng.standard_normal((batch, 28, 28, 1), np.float32), rng.integers(0, 10, batch)
    if name == "resnet":
        images = rng.standard_normal((batch, size["side"], size["side"], 3), np.float32)
        return images, rng.integers(0, size["classes"], batch)
    ids = rng.integers(0, size["vocabulary"], (batch, size["length"] + 1))
    return ids[:, :-1], ids[:, 1:]


def products(name: str, size: dict) -> float:
    """The floating-point operations of a step's products: 6 for each use of a weight, 2 forward and 4 backward.

    What is not a product of weights is left out: norms, activations, softmaxes, updates, and attention's products with
    each other (12 · layers · T · features for each token of GPT-2, a tenth more, half of it masked). So this is
    6 · N · tokens for GPT-2, as is usual. The backward by the data, which nobody needs, is counted in.
    """
    if name == "mlp":
        uses = sum(n * m for n, m in itertools.pairwise(size["units"]))
    elif name == "lenet":
        uses = 28**2 * 25 * 6 + 10**2 * 150 * 16 + 400 * 120 + 120 * 84 + 84 * 10
    elif name == "resnet":
        uses = resnet_uses(**{key: size[key] for key in ("blocks", "width", "classes", "side")})
    elif name == "lstm":
        units = size["units"]
        uses = size["length"] * (4 * units * (size["features"] + units) + units * size["vocabulary"])
    else:
        uses = size["length"] * gpt_parameters(size)
    return 6.0 * size["batch"] * uses


def resnet_uses(blocks, width: int, classes: int, side: int) -> int:
    """Products of a weight in one image's forward."""
    half = lambda n: (n - 1) // 2 + 1  # noqa: E731
    side = half(side)
    uses, side, inputs = side**2 * 49 * 3 * width, half(side), width
    for stage, count in enumerate(blocks):
        features = width * 2**stage
        if stage:
            side = half(side)
            uses += side**2 * inputs * features  # the shortcut
        uses += side**2 * 9 * features * (inputs + (2 * count - 1) * features)
        inputs = features
    return uses + inputs * classes


def gpt_parameters(size: dict) -> int:
    """The embedding of tokens and positions, blocks of 12 matrices' worth and 13 vectors', and the last norm."""
    d = size["features"]
    return (size["vocabulary"] + size["length"]) * d + size["layers"] * (12 * d * d + 13 * d) + 2 * d


# --- fnet ------------------------------------------------------------------------------------------------------------


def fnet_model(name: str, size: dict, **options):
    """The layer; ``options`` are `attention`'s."""
    import fnet
    from fnet.layers import dense, embedding, lstm, mixed_precision, serial

    if name == "mlp":
        return fnet.mlp(*size["units"][1:])
    if name == "lenet":
        return fnet.models.lenet5()
    if name == "resnet":
        stem = fnet.models.imagenet_stem(size["width"])
        return fnet.models.resnet(size["classes"], blocks=size["blocks"], width=size["width"], stem=stem)
    if name == "lstm":
        return serial(embedding(size["vocabulary"], size["features"]), lstm(size["units"]), dense(size["vocabulary"]))
    given = {key: size[key] for key in ("length", "layers", "features", "heads")}
    return mixed_precision(fnet.models.gpt(size["vocabulary"], **given, **options))


def fnet_by(engine: str, *, convolutions: str | None = None, steps: bool = True, **options):
    """fnet by an engine; ``convolutions`` in a form; without ``steps`` many are one program, as in `fnet.train`."""

    def prepare(name, size, batch):
        import jax
        import jax.numpy as jnp

        import fnet
        from fnet.core.platforms import platform, traced_for

        form = options.get("form") and ("cudnn" if platform() in ("gpu", "cuda") else "xla")
        model = fnet_model(name, size, **({**options, "form": form} if form else options))
        optimizer, batch = fnet.adam(RATE), fnet.Batch(*map(jnp.asarray, batch))
        params, state = fnet.init(model, jax.random.key(0), batch.inputs)
        start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
        step = fnet.make_step(getattr(fnet, engine)(model, fnet.softmax_cross_entropy), optimizer)
        # a convolution goes by the platform that it is traced for
        with traced_for({None: platform(), "products": "cpu", "xla": "cuda"}[convolutions]):
            if not steps:
                return scan_by_jax(step, start, batch)
            return step_by_jax(lambda ts, batch: step(ts, batch), start, batch, lambda m: m["loss"].value)

    return prepare


def step_by_jax(step, state, batch, loss_of):
    """A compiled step that is given its state to overwrite, called once for each update."""
    import jax

    batch, parameters = jax.device_put(batch), count_by_jax(state)
    begin = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    seconds, held = time.perf_counter() - begin, [state]
    del state

    def run(steps: int) -> float:
        metrics = None
        for _ in range(steps):
            held[0], metrics = program(held[0], batch)
        jax.block_until_ready(held)
        return float(loss_of(metrics))

    return run, {"parameters": parameters, "compile_seconds": seconds, **bytes_by_jax(program)}


def scan_by_jax(step, state, batch, updates: int = 100):
    """Updates that are one program, a scan over the same batch."""
    import jax

    parameters = count_by_jax(state)

    def whole(state, batch):
        return jax.lax.scan(lambda state, _: step(state, batch), state, None, length=updates)

    begin = time.perf_counter()
    program = jax.jit(whole, donate_argnums=0).lower(state, batch).compile()
    seconds, held = time.perf_counter() - begin, [state]

    def run(steps: int) -> float:
        metrics: Any = None
        for _ in range(steps // updates):
            held[0], metrics = program(held[0], batch)
        jax.block_until_ready(held)
        return float(metrics["loss"].value[-1])

    return run, {
        "parameters": parameters,
        "compile_seconds": seconds,
        "least_steps": updates,
        **bytes_by_jax(program),
    }


def count_by_jax(state) -> int:
    """The numbers that are trained, of a `fnet.TrainState` or of flax' state."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def bytes_by_jax(program) -> dict:
    """What the compiler says that a program takes: arguments, results and all between."""
    memory = program.memory_analysis()
    if memory is None:
        return {}
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {"program_bytes": taken - memory.alias_size_in_bytes}


# --- flax ------------------------------------------------------------------------------------------------------------


def flax_model(name: str, size: dict):
    """Those of `benchmarks.peers.linen`, ResNet with the stem for large images, GPT in bfloat16 with jax' attention."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from benchmarks.peers import linen

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(linen.Conv(size["width"], 7, 2)(x))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
            for stage, count in enumerate(size["blocks"]):
                features = size["width"] * 2**stage
                for block in range(count):
                    stride = 2 if stage and not block else 1
                    y = linen.Conv(features)(nn.relu(linen.Conv(features, 3, stride)(x)))
                    x = nn.relu(y + (linen.Conv(features, 1, stride)(x) if stride == 2 else x))
            return nn.Dense(size["classes"])(x.mean((1, 2)))

    class GPT(nn.Module):
        @nn.compact
        def __call__(self, ids):
            d, heads, low = size["features"], size["heads"], {"dtype": jnp.bfloat16}
            embed = nn.Embed(size["vocabulary"], d, embedding_init=nn.initializers.normal(0.02), **low)
            x = embed(ids) + nn.Embed(size["length"], d, **low)(jnp.arange(ids.shape[1]))[None]
            for _ in range(size["layers"]):
                parts = jnp.split(nn.Dense(3 * d, **low)(nn.LayerNorm(epsilon=1e-5, **low)(x)), 3, -1)
                q, k, v = (part.reshape(*part.shape[:2], heads, d // heads) for part in parts)
                by = "cudnn" if jax.default_backend() == "gpu" else "xla"
                y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=by)
                x = x + nn.Dense(d, **low)(y.reshape(x.shape))
                y = nn.Dense(4 * d, **low)(nn.LayerNorm(epsilon=1e-5, **low)(x))
                x = x + nn.Dense(d, **low)(nn.gelu(y))
            return embed.attend(nn.LayerNorm(epsilon=1e-5, **low)(x)).astype(jnp.float32)

    if name == "mlp":
        return linen.MLP(size["units"])
    if name == "lstm":
        return linen.Recurrent(nn.OptimizedLSTMCell, size["vocabulary"], size["features"], size["units"])
    return {"lenet": linen.LeNet, "resnet": ResNet, "gpt": GPT}[name]()


def flax_by():
    """flax linen and optax' Adam, a jitted step that is given its state to overwrite."""

    def prepare(name, size, batch):
        from typing import NamedTuple

        import jax
        import jax.numpy as jnp
        import optax

        class State(NamedTuple):
            params: Any
            rest: Any
            opt_state: Any

        model, optimizer, batch = flax_model(name, size), optax.adam(RATE), tuple(map(jnp.asarray, batch))
        variables = dict(jax.jit(model.init)(jax.random.key(0), batch[0]))
        params = variables.pop("params")

        def step(state, batch):
            def loss_fn(params):
                logits, rest = model.apply({"params": params, **state.rest}, batch[0], mutable=list(state.rest))
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), rest

            (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            updates, opt_state = optimizer.update(grads, state.opt_state)
            return State(optax.apply_updates(state.params, updates), rest, opt_state), loss

        return step_by_jax(step, State(params, variables, optimizer.init(params)), batch, lambda loss: loss)

    return prepare


# --- torch -----------------------------------------------------------------------------------------------------------


def torch_model(name: str, size: dict):
    """Those of `benchmarks.peers.pytorch`, ResNet with the stem for large images."""
    import torch
    from torch import nn

    from benchmarks.peers import pytorch

    torch.manual_seed(0)
    if name == "mlp":
        return pytorch.mlp(size["units"])
    if name == "lenet":
        return pytorch.lenet()
    if name == "resnet":
        width, layers, inputs = size["width"], [], size["width"]
        for stage, count in enumerate(size["blocks"]):
            for block in range(count):
                layers.append(pytorch.BasicBlock(inputs, width * 2**stage, 2 if stage and not block else 1))
                inputs = width * 2**stage
        stem = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, size["classes"]))
    if name == "lstm":
        return pytorch.Recurrent(nn.LSTM, size["vocabulary"], size["features"], size["units"])
    return pytorch.GPT(*(size[key] for key in ("vocabulary", "length", "layers", "features", "heads")))


def torch_by(*, compiled: bool):
    """torch with its fused Adam, eagerly or with the model by ``torch.compile``."""

    def prepare(name, size, batch):
        import torch
        from torch.nn import functional as F

        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
        x, y = (torch.from_numpy(a).to(device) for a in batch)
        model = torch_model(name, size).to(device)
        if x.ndim == 4:
            x, model = x.permute(0, 3, 1, 2), model.to(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
        parameters = sum(p.numel() for p in model.parameters())
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
        forward = torch.compile(model) if compiled else model

        def run(steps: int) -> float:
            loss = None
            for _ in range(steps):
                optimizer.zero_grad()
                with torch.autocast(device, torch.bfloat16, enabled=name in BFLOAT16):
                    logits = forward(x)
                    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
                loss.backward()
                optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            return math.nan if loss is None else loss.item()

        begin = time.perf_counter()
        run(1)
        return run, {"parameters": parameters, "compile_seconds": time.perf_counter() - begin}

    return prepare


# --- who runs what ---------------------------------------------------------------------------------------------------

SETTINGS = {  # what each peer was given, by the package that it needs
    "fnet": "a jitted step that overwrites its state; Adam; jax' default precision (float32 products in TF32 on "
    "NVIDIA's GPUs), GPT-2 by mixed_precision in bfloat16; convolutions by XLA unless said, channels last",
    "flax": "linen, optax.adam, a jitted step that overwrites its state; jax' default precision, GPT-2 with dtype "
    "bfloat16 on float32 parameters and jax.nn.dot_product_attention (cuDNN on a GPU, else XLA); channels last",
    "torch": "fused Adam; set_float32_matmul_precision('high') and cudnn.allow_tf32, so TF32; cudnn.benchmark; images "
    "in channels_last; GPT-2 by autocast to bfloat16 and scaled_dot_product_attention; torch.compile of the model in "
    "its default mode. Its LSTM, cuDNN's, has a second bias",
}
COMMON = {
    "fnet backprop": fnet_by("backprop"),
    "torch.compile": torch_by(compiled=True),
    "fnet autodiff": fnet_by("autodiff"),
    "flax": flax_by(),
    "torch": torch_by(compiled=False),
}
IMAGES = {  # by XLA as on a GPU, on a CPU too
    **COMMON,
    "fnet backprop": fnet_by("backprop", convolutions="xla"),
    "fnet autodiff": fnet_by("autodiff", convolutions="xla"),
    "fnet backprop, convolutions as products": fnet_by("backprop", convolutions="products"),
}
PEERS = {  # the first are those that are given time first
    "mlp": {**COMMON, "fnet backprop, 100 steps in a scan": fnet_by("backprop", steps=False)},
    "lenet": IMAGES,
    "resnet": IMAGES,
    "lstm": COMMON,
    "gpt": {
        "fnet backprop, jax's attention": fnet_by("backprop", form="jax"),
        "torch.compile": COMMON["torch.compile"],
        "fnet autodiff, jax's attention": fnet_by("autodiff", form="jax"),
        "flax": COMMON["flax"],
        "fnet backprop": COMMON["fnet backprop"],
        "torch": COMMON["torch"],
        "fnet autodiff": COMMON["fnet autodiff"],
        "fnet backprop, blockwise attention": fnet_by("backprop", block_size=256),
    },
}


def package_of(peer: str) -> str:
    """What has to be installed for a peer, as it is imported."""
    return peer.split()[0].split(".")[0].rstrip(",")
