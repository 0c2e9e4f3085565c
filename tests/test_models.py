"""Models: published parameter counts, the audit of each, summaries, and sampling."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.core.trees import named_leaves
from fnet.export import Rule, from_tensors, torch_names
from fnet.layers import (
    batch_norm,
    conv,
    conv_transpose,
    gru,
    hard_swish,
    lstm,
    models,
    resize,
    serial,
    sigmoid,
    stateless,
)
from fnet.layers.children import apply
from fnet.report import summary
from fnet.types import Layer, LayerError
from tests.oracles import assert_leaves_close, numerical_gradient

LABELS = np.array([0, 2, 1])
IDS = np.random.default_rng(0).integers(0, 11, (3, 7))


def images(size, channels=1, examples=3):
    return np.random.default_rng(1).standard_normal((examples, size, size, channels)).astype(np.float32)


def specs(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


IMAGENET = specs(1, 224, 224, 3)
# where the number is published: LeCun et al. with full connections; torchvision's models; GPT-2's report; Llama's
# files; Hugging Face's t5-small. ViT-B/16 has 86,567,656 with a class token and its position, which the mean over the
# patches replaces. U-Net's paper gives none: it is that of tf_unet and of Keras models with the paper's sizes. That of
# the 3-D U-Net's paper is without the parameters of its batch normalization, and without biases in what goes up, as we
# find by adding up its figure
PUBLISHED = {
    "lenet5": (models.lenet5(), specs(1, 28, 28, 1), 61_706),
    "ResNet-18": (
        models.resnet(1000, blocks=(2, 2, 2, 2), width=64, stem=models.imagenet_stem(64)), IMAGENET, 11_689_512,
    ),
    "ResNet-50": (
        models.resnet(
            1000, blocks=(3, 4, 6, 3), width=64, block=models.bottleneck_block, stem=models.imagenet_stem(64)
        ),
        IMAGENET,
        25_557_032,
    ),
    "U-Net": (models.unet(2), specs(1, 32, 32, 1), 31_030_658),
    "3-D U-Net": (
        models.unet(
            3,
            dimensions=3,
            widths=(64, 128, 256, 512),
            up=lambda features: conv_transpose(features, (2, 2, 2), stride=2, bias=None),
            early=True,
        ),
        specs(1, 16, 16, 16, 3),
        19_069_955,
    ),
    "MobileNetV3-Small": (models.mobilenet_v3_small(), IMAGENET, 2_542_856),
    "GPT-2": (
        models.gpt(50257, length=1024, layers=12, features=768, heads=12, repeated=True),
        specs(1, 8, dtype="int32"),
        124_439_808,
    ),
    "Llama 2 7B": (
        models.llama(32000, layers=32, features=4096, heads=32, hidden=11008, repeated=True),
        specs(1, 8, dtype="int32"),
        6_738_415_616,
    ),
    "Llama 3 8B": (
        models.llama(
            128256, layers=32, features=4096, heads=32, kv_heads=8, hidden=14336, rotary=5e5, repeated=True
        ),
        specs(1, 8, dtype="int32"),
        8_030_261_248,
    ),
    "T5 small's encoder": (
        models.t5_encoder(32128, layers=6, features=512, heads=8, hidden=2048, repeated=True),
        specs(1, 8, dtype="int32"),
        # its decoder has 6 more blocks, with a norm and the four matrices of cross-attention besides, a table of 32
        # buckets for 8 heads, and a norm
        60_506_624 - 6 * (3 * 512 + 8 * 512**2 + 2 * 512 * 2048) - 32 * 8 - 512,
    ),
    "Swin-T": (models.swin(1000), IMAGENET, 28_288_354),
    "ViT-B/16": (
        models.vit(1000, patch=16, layers=12, features=768, heads=12, positions=196), IMAGENET, 86_567_656 - 2 * 768,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one_and_nothing_is_allocated_for_it(name):
    model, x, published = PUBLISHED[name]
    params, _ = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published


def numpy_conv(x, w, stride):
    """A convolution of images by ``w (k, k, I, O)``, half a kernel of zeros on every side; I is 1: a filter each."""
    k, n = w.shape[0], -(-x.shape[1] // stride)
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    y = np.zeros((len(x), n, n, w.shape[-1]))
    for i, j in np.ndindex(n, n):
        window = padded[:, i * stride : i * stride + k, j * stride : j * stride + k]
        each = w.shape[2] == 1 and x.shape[-1] > 1
        y[:, i, j] = np.einsum("bklc,klc->bc", window, w[:, :, 0]) if each else np.einsum("bkli,klio->bo", window, w)
    return y


@pytest.mark.parametrize(("sizes", "stride"), [((3, 5, 3), 1), ((3, 3, 4), 1), ((3, 5, 3), 2)])
def test_an_inverted_residual_is_its_formula_in_numpy(sizes, stride, x64, key):
    inputs, expanded, features = sizes
    block = models.inverted_residual(*sizes, stride=stride, squeeze=2, activation=hard_swish())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 4, inputs))
    drawn = block.init(key, jnp.asarray(x))
    params, state = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape)), drawn)
    p, s = jax.tree.map(np.asarray, (params, state))
    assert ("expand" in p) == (expanded != inputs)

    def normed(name, x, swish=True, stride=1):
        norm, of = p[name]["batch_norm_0"], s[name]["batch_norm_0"]
        z = (numpy_conv(x, p[name]["conv_0"]["w"], stride) - of["mean"]) / np.sqrt(of["var"] + 1e-3)
        z = norm["scale"] * z + norm["bias"]
        return z * np.clip(z + 3, 0, 6) / 6 if swish else z

    h = normed("depthwise", normed("expand", x) if "expand" in p else x, stride=stride)
    gate = p["squeeze"]["branches"]["gate"]
    hidden = np.maximum(h.mean((1, 2)) @ gate["dense_0"]["w"] + gate["dense_0"]["b"], 0)
    h = h * np.clip(hidden @ gate["dense_1"]["w"] + gate["dense_1"]["b"] + 3, 0, 6)[:, None, None] / 6
    expected = normed("project", h, swish=False) + (x if stride == 1 and inputs == features else 0)
    np.testing.assert_allclose(apply(block, params, state, jnp.asarray(x)), expected, rtol=1e-12)


def names_of_torchvision():
    """The modules of torchvision's mobilenet_v3_small by the paths of ours."""
    params, state = jax.eval_shape(models.mobilenet_v3_small().init, jax.random.key(0), IMAGENET)
    tree, modules = {"params": params, "state": state}, {}

    def normed(path, module):
        modules[f"params/{path}/conv_0"] = f"{module}.0.*"
        modules.update({f"{part}/{path}/batch_norm_0": f"{module}.1.*" for part in tree})

    def squeezed(path, module):
        for i in range(2):  # convolutions of 1×1 there
            layer, name = f"params/{path}/branches/gate/dense_{i}", f"{module}.fc{i + 1}"
            turn, back = lambda w: (w.T[..., None, None],), lambda w: (w[..., 0, 0].T,)
            modules[f"{layer}/w"] = Rule((f"{layer}/w",), (f"{name}.weight",), turn, back)
            modules[f"{layer}/b"] = Rule((f"{layer}/b",), (f"{name}.bias",))

    normed("stem", "features.0")
    normed("last", "features.12")
    for i in range(11):
        parts = [part for part in ("expand", "depthwise", "squeeze", "project") if part in params[f"block_{i}"]]
        for j, part in enumerate(parts):
            (squeezed if part == "squeeze" else normed)(f"block_{i}/{part}", f"features.{i + 1}.block.{j}")
    modules |= {"params/hidden": "classifier.0.*", "params/head": "classifier.3.*"}
    return tree, torch_names(tree, modules)


def test_every_leaf_of_a_mobilenet_has_its_tensor_in_torchvisions():
    tree, names = names_of_torchvision()
    assert {path for rule in names for path in rule.paths} == {path for path, _ in named_leaves(tree)}


@pytest.mark.long
def test_a_mobilenet_has_the_outputs_of_torchvisions_with_its_weights(x64):
    torchvision, torch = pytest.importorskip("torchvision"), pytest.importorskip("torch")
    theirs, rng = torchvision.models.mobilenet_v3_small().double().eval(), np.random.default_rng(0)
    with torch.no_grad():
        for module in theirs.modules():  # no statistics of 0 and 1
            if isinstance(module, torch.nn.BatchNorm2d):
                for leaf in (module.weight, module.running_var):
                    leaf.uniform_(0.5, 1.5)
                for leaf in (module.bias, module.running_mean):
                    leaf.normal_()
    tree, names = names_of_torchvision()
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape), tree)
    taken = from_tensors({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, tree, names)
    x = rng.normal(size=(2, 32, 32, 3))
    with torch.no_grad():
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    y = jax.jit(lambda taken, x: apply(models.mobilenet_v3_small(), taken["params"], taken["state"], x))(taken, x)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max())


TOKENS = (IDS, (IDS + 1) % 11)
SMALL = {
    "lenet5": (models.lenet5(3), (images(28), LABELS)),
    "resnet": (models.resnet(3, blocks=(1, 1), width=2), (images(8), LABELS)),
    "resnet of bottlenecks": (
        models.resnet(3, blocks=(1, 1), width=2, block=models.bottleneck_block),
        (images(8), LABELS),
    ),
    "vit": (models.vit(3, patch=4, layers=1, features=8, heads=2, positions=4), (images(8), LABELS)),
    "unet": (models.unet(3, widths=(2, 3)), (images(4), np.random.default_rng(0).integers(0, 3, (3, 4, 4)))),
    "recurrent_lm": (models.recurrent_lm(11, lstm(5), gru(6), features=6), TOKENS),
    "gpt": (models.gpt(11, length=8, layers=2, features=8, heads=2), TOKENS),
    "gpt, repeated": (models.gpt(11, length=8, layers=2, features=8, heads=2, repeated=True), TOKENS),
    "llama": (models.llama(11, layers=2, features=8, heads=4, kv_heads=2, hidden=6), TOKENS),
    "llama, tied": (models.llama(11, layers=1, features=8, heads=2, hidden=6, tied=True, repeated=True), TOKENS),
}


AUDITED = [name for name in SMALL if name != "gpt, repeated"]  # the unrolled one, as below
SLOW = ("gpt", "vit", "resnet", "unet", "resnet of bottlenecks", "lenet5")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in AUDITED]
)
def test_the_audit_finds_nothing_wrong_in_a_model(name, key):
    model, batch = SMALL[name]
    report = fnet.check_model(model, fnet.softmax_cross_entropy, batch, key=key, precisions=(), cost=False)
    # relu and pooling have kinks, and of thousands of entries some may lie near one
    assert {leaf.verdict for leaf in report.leaves} <= {"ok", "kink"}, str(report)
    assert report.ok


def numpy_unet(params, x):
    """Logits ``(B, T, classes)`` of a U-Net over sequences with two convolutions a level, output by output."""

    def conv(p, x):
        before = (len(p["w"]) - 1) // 2
        padded = np.pad(x, ((0, 0), (before, len(p["w"]) - 1 - before), (0, 0)))
        return sum(padded[:, k : k + x.shape[1]] @ w for k, w in enumerate(p["w"])) + p["b"]

    def twice(p, x):
        return np.maximum(conv(p["conv_1"], np.maximum(conv(p["conv_0"], x), 0)), 0)

    def level(p, x):
        if "fork" not in p:
            return twice(p, x)
        down, below = twice(p["down"], x), p["fork"]["below"]
        pooled = np.maximum(down[:, 0::2], down[:, 1::2])
        deep, up = level(below["level"], pooled), np.empty((*down.shape[:2], below["up"]["b"].size))
        for k in range(2):  # every place below becomes two
            up[:, k::2] = deep @ below["up"]["w"][k] + below["up"]["b"]
        return twice(p["merge"], np.concatenate([down, up], 2))

    return conv(params["head"], level(params["level"], x))


def drawn(params, seed=2):
    """Normal parameters, biases too, so that no part of a model is next to nothing."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / np.sqrt(max(1, p.size // 4))), params)


@pytest.mark.parametrize("early", [False, True])
def test_a_unet_over_sequences_is_its_formulas_in_numpy(early, key, x64):
    model, x = (
        models.unet(3, dimensions=1, widths=(2, 4, 6), early=early),
        np.random.default_rng(1).normal(size=(2, 8, 2)),
    )
    shapes, state = jax.eval_shape(model.init, key, jnp.asarray(x))
    level = shapes["level"]
    assert level["down"]["conv_0"]["w"].shape == ((3, 2, 1) if early else (3, 2, 2))
    assert level["fork"]["below"]["up"]["w"].shape == ((2, 4, 4) if early else (2, 4, 2))
    params = drawn(shapes)
    expected = numpy_unet(jax.tree.map(np.asarray, params), x)
    np.testing.assert_allclose(jax.jit(lambda p, x: apply(model, p, state, x))(params, x), expected, rtol=1e-11)


def test_a_unet_that_normalizes_and_resizes_has_the_gradients_of_autodiff(key, x64):
    def up(features):
        return serial(resize(scale=2), conv(features, (3,)))

    model = models.unet(3, dimensions=1, widths=(2, 3), norm=batch_norm, up=up)
    x, dy = (jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, c))) for c in (2, 3))
    shapes, state = jax.eval_shape(model.init, key, x)
    level, state = shapes["level"]["down"], jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), state)
    assert list(level) == ["batch_norm_0", "batch_norm_1", "conv_0", "conv_1", "relu_0", "relu_1"]
    assert set(level["conv_0"]) == {"w"}

    @jax.jit
    def both(params, x):
        y, pull = jax.vjp(lambda p, x: model.forward(p, state, x, train=True)[0], params, x)
        _, _, residuals = model.forward(params, state, x, train=True)
        return y, model.backward(params, residuals, dy), pull(dy)

    y, by_hand, by_autodiff = both(drawn(shapes), x)
    assert y.shape == (2, 4, 3)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(by_autodiff))
    for actual, expected in zip(*map(jax.tree.leaves, (by_hand, by_autodiff)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * largest)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_torch_computes_the_same_unet_with_the_same_weights(dimensions, key, x64):
    torch = pytest.importorskip("torch")
    nn, axes = torch.nn, tuple(range(dimensions))
    Conv, Up, pool = {
        2: (nn.Conv2d, nn.ConvTranspose2d, nn.functional.max_pool2d),
        3: (nn.Conv3d, nn.ConvTranspose3d, nn.functional.max_pool3d),
    }[dimensions]

    def twice(i, o):
        return nn.Sequential(Conv(i, o, 3, padding=1), nn.ReLU(), Conv(o, o, 3, padding=1), nn.ReLU())

    class UNet(nn.Module):
        def __init__(self, channels, classes, widths):
            super().__init__()
            self.down = nn.ModuleList(map(twice, (channels, *widths), widths))
            self.up = nn.ModuleList(Up(b, a, 2, 2) for a, b in itertools.pairwise(widths))
            self.merge = nn.ModuleList(twice(2 * a, a) for a in widths[:-1])
            self.head = Conv(widths[0], classes, 1)

        def forward(self, x):
            kept = []
            for i, block in enumerate(self.down):
                x = block(x if i == 0 else pool(x, 2))
                kept.append(x)
            for i in reversed(range(len(self.up))):
                x = self.merge[i](torch.cat([kept[i], self.up[i](x)], 1))
            return self.head(x)

    widths = (3, 5, 4)
    model, module = models.unet(2, dimensions=dimensions, widths=widths), UNet(2, 2, widths).double()
    x = np.random.default_rng(1).normal(size=(2, *(8, 12, 4)[:dimensions], 2))
    shapes, state = jax.eval_shape(model.init, key, jnp.asarray(x))
    params = drawn(shapes)

    def copy(into, p):
        with torch.no_grad():  # (*S, I, O) to (O, I, *S), and of a transposed one to (I, O, *S)
            channels = (dimensions, dimensions + 1)[:: 1 if isinstance(into, Up) else -1]
            into.weight.copy_(torch.tensor(np.asarray(p["w"]).transpose(*channels, *axes).copy()))
            into.bias.copy_(torch.tensor(np.asarray(p["b"])))

    level = params["level"]
    for i in range(len(widths)):
        last = i == len(widths) - 1
        for k in range(2):
            copy(module.down[i][2 * k], (level if last else level["down"])[f"conv_{k}"])
            if not last:
                copy(module.merge[i][2 * k], level["merge"][f"conv_{k}"])
        if not last:
            copy(module.up[i], level["fork"]["below"]["up"])
            level = level["fork"]["below"]["level"]
    copy(module.head, params["head"])
    expected = np.moveaxis(module(torch.tensor(np.moveaxis(x, -1, 1).copy())).detach().numpy(), 1, -1)
    y = np.asarray(jax.jit(lambda p, x: apply(model, p, state, x))(params, x))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def test_an_autoencoder_goes_down_to_its_code_and_mirrors_back(key):
    model = models.autoencoder(12, 6, 2, output=sigmoid())
    params, state = fnet.init(model, key, jnp.ones((1, 12)))
    widths = [params[part][f"dense_{i}"]["w"].shape for part in ("encoder", "decoder") for i in (0, 1)]
    assert widths == [(12, 6), (6, 2), (2, 6), (6, 12)]
    y = apply(model, params, state, jnp.ones((3, 12)))
    assert y.shape == (3, 12) and ((y > 0) & (y < 1)).all()
    with pytest.raises(ValueError, match="autoencoder: no widths given"):
        models.autoencoder(12)


def test_a_repeated_gpt_is_the_unrolled_one(key):
    unrolled, repeated = SMALL["gpt"][0], SMALL["gpt, repeated"][0]
    params, state = fnet.init(unrolled, key, IDS)
    body = params["body"]
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), body["block_0"], body["block_1"])
    stacked = {
        "table": params["table"],
        "body": {"positions": body["positions"], "blocks": blocks, "norm": body["norm"]},
    }
    _, stacked_state = jax.eval_shape(repeated.init, key, IDS)
    y = apply(unrolled, params, state, IDS)
    again = apply(repeated, stacked, stacked_state, IDS)
    assert jnp.abs(again - y).max() <= 1e-6 * jnp.abs(y).max()


def llama_in_numpy(params, ids, heads, kv_heads, base=10000.0, eps=1e-5):
    """Logits by the formulas of arXiv:2302.13971 and 2305.13245, position by position and head by head."""

    def norm(p, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]

    def turned(x, size):  # (T, size): pair i of position t by the angle t base^(-2i/size)
        angles = np.arange(len(x))[:, None] * base ** (-2 * np.arange(size // 2) / size)
        a, b = x[:, : size // 2], x[:, size // 2 :]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], 1)

    def attend(p, x):
        q, k, v = (x @ p[name]["w"] for name in ("query", "key", "value"))
        size, out = q.shape[1] // heads, []
        for h in range(heads):
            own, of = slice(h * size, (h + 1) * size), h // (heads // kv_heads)
            shared = slice(of * size, (of + 1) * size)
            s = turned(q[:, own], size) @ turned(k[:, shared], size).T / np.sqrt(size)
            e = np.exp(np.where(np.tril(np.ones_like(s)) > 0, s, -np.inf))
            out.append(e / e.sum(1, keepdims=True) @ v[:, shared])
        return np.concatenate(out, 1) @ p["out"]["w"]

    def gated(p, x):
        gate = x @ p["gated"]["branches"]["gate"]["dense_0"]["w"]
        return (x @ p["gated"]["branches"]["up"]["w"] * gate / (1 + np.exp(-gate))) @ p["narrow"]["w"]

    logits = []
    for row in ids:
        x = params["embedding"]["table"][row]
        for name in sorted(name for name in params if name.startswith("block_")):
            block = params[name]
            x = x + attend(block["attend"]["attention"], norm(block["attend"]["norm"], x))
            x = x + gated(block["mlp"], norm(block["mlp"]["norm"], x))
        logits.append(norm(params["norm"], x) @ params["output"]["w"])
    return np.stack(logits)


def test_a_llama_is_its_formulas_in_numpy(key, x64):
    model, _ = SMALL["llama"]
    params, state = fnet.init(model, key, IDS)
    rng = np.random.default_rng(2)  # larger weights, so that no part of it is next to nothing
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    expected = llama_in_numpy(jax.tree.map(np.asarray, params), IDS, heads=4, kv_heads=2)
    np.testing.assert_allclose(apply(model, params, state, IDS), expected, rtol=1e-10, atol=1e-12)


def t5_in_numpy(params, ids, mask, heads, buckets, furthest, eps=1e-6):
    """The encoder's outputs by the formulas of arXiv:1910.10683 and its code, gated if the parameters are."""

    def norm(p, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]

    def bucket(far):  # of s − t: half of the buckets for each side, and half of these for single distances
        n, half = abs(far), buckets // 4
        if n >= half:
            n = min(half + int(np.log(n / half) / np.log(furthest / half) * half), 2 * half - 1)
        return n + 2 * half * (far > 0)

    def mlp(p, x):
        if "gated" not in p:
            return np.maximum(x @ p["wide"]["w"], 0) @ p["narrow"]["w"]
        z = x @ p["gated"]["branches"]["gate"]["dense_0"]["w"]
        gelu = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        return (x @ p["gated"]["branches"]["up"]["w"] * gelu) @ p["narrow"]["w"]

    table, blocks = params["blocks"]["relative"]["table"], params["blocks"]["body"]
    outputs = []
    for row, seen in zip(ids, mask, strict=True):
        x = params["embedding"]["table"][row]
        bias = np.stack([[table[bucket(s - t)] for s in range(len(row))] for t in range(len(row))])
        for name in sorted(blocks):
            p, out = blocks[name], []
            q, k, v = (norm(p["norm"], x) @ p["attention"][part]["w"] for part in ("query", "key", "value"))
            for h in range(heads):
                own = slice(h * q.shape[1] // heads, (h + 1) * q.shape[1] // heads)
                s = np.where(seen, q[:, own] @ k[:, own].T + bias[:, :, h], -np.inf)
                e = np.exp(s - s.max(1, keepdims=True))
                out.append(e / e.sum(1, keepdims=True) @ v[:, own])
            x = x + np.concatenate(out, 1) @ p["attention"]["out"]["w"]
            x = x + mlp(p["mlp"], norm(p["mlp"]["norm"], x))
        outputs.append(norm(params["norm"], x))
    return np.stack(outputs)


T5 = {"layers": 2, "features": 6, "heads": 2, "head_features": 2, "hidden": 5, "buckets": 8, "max_distance": 5}
LENGTHS = np.arange(7) < np.array([7, 3, 5])[:, None]  # real ids in each row of `IDS`


def drawn_like(params, seed):
    """Larger weights, so that no part of a model is next to nothing, in float64."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)


@pytest.mark.parametrize("gated", [False, True])
def test_t5s_encoder_is_its_formulas_in_numpy_and_its_gradients_are_autodiffs(gated, key, x64):
    model = models.t5_encoder(11, gated=gated, block_size=3 if gated else None, **T5)
    x = jnp.asarray(IDS), jnp.asarray(LENGTHS)
    params, state = model.init(key, x)
    params = drawn_like(params, 3)
    dy = jnp.asarray(np.random.default_rng(4).normal(size=(3, 7, 6)) * LENGTHS[:, :, None])

    @jax.jit
    def run(params):
        y, _, residuals = model.forward(params, state, x)
        outputs = lambda params: model.forward(params, state, x)[0][0]  # noqa: E731
        return y[0], model.backward(params, residuals, (dy, None))[0], jax.vjp(outputs, params)[1](dy)[0]

    y, by_hand, by_autodiff = run(params)
    expected = t5_in_numpy(jax.tree.map(np.asarray, params), IDS, LENGTHS, 2, 8, 5)
    np.testing.assert_allclose(y[LENGTHS], expected[LENGTHS], rtol=1e-10, atol=1e-12)
    assert_leaves_close(by_hand, by_autodiff, 1e-11)

    def total(table):
        p = jax.tree.map(np.asarray, params)
        p["blocks"]["relative"]["table"] = table
        return (t5_in_numpy(p, IDS, LENGTHS, 2, 8, 5) * np.asarray(dy)).sum()

    slope = numerical_gradient(total, params["blocks"]["relative"]["table"])
    np.testing.assert_allclose(by_hand["blocks"]["relative"]["table"], slope, rtol=1e-6, atol=1e-6)


def test_repeated_blocks_of_t5_add_up_the_one_bias_gradient_as_unrolled_ones_do(key, x64):
    unrolled, repeated = (models.t5_encoder(11, repeated=repeated, **T5) for repeated in (False, True))
    params, state = unrolled.init(key, IDS)
    params = drawn_like(params, 3)
    body = params["blocks"]["body"]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), body["block_0"], body["block_1"])
    stacked = {**params, "blocks": {**params["blocks"], "body": stack}}
    dy = jnp.asarray(np.random.default_rng(4).normal(size=(3, 7, 6)))

    def run(model, params, state):
        y, _, residuals = jax.jit(model.forward)(params, state, jnp.asarray(IDS))
        dparams = jax.jit(model.backward)(params, residuals, dy)[0]
        return y, dparams["blocks"]["relative"], dparams["embedding"]

    again = run(repeated, stacked, jax.eval_shape(repeated.init, key, IDS)[1])
    assert_leaves_close(again, run(unrolled, params, state), 1e-12)


def test_a_block_of_t5_without_a_bias_says_what_gives_one(key):
    block = models.t5_block(8, 2, hidden=5)
    with pytest.raises(LayerError, match=r"expected \(x, bias\) or \(x, mask, bias\), got float32\[1, 3, 8\]: biased"):
        block.init(key, jnp.ones((1, 3, 8)))


@pytest.mark.parametrize("gated", [False, True])
def test_t5s_encoder_is_hugging_faces_with_its_weights(gated, key, x64):
    transformers, torch = (pytest.importorskip(name) for name in ("transformers", "torch"))
    config = transformers.T5Config(
        vocab_size=11, d_model=6, d_kv=2, d_ff=5, num_layers=2, num_heads=2, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=5,
        feed_forward_proj="gated-gelu" if gated else "relu", attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.T5EncoderModel(config).to(torch.float64).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    model = models.t5_encoder(11, gated=gated, **T5)
    params, state = model.init(key, IDS)
    params = drawn_like(params, 3)  # in float64
    modules = {"embedding": ("shared.weight", "encoder.embed_tokens.weight"), "norm": "encoder.final_layer_norm.*"}
    modules["blocks/relative"] = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.*"
    for i in range(2):
        ours, at = f"blocks/body/block_{i}", f"encoder.block.{i}.layer"
        modules |= {f"{ours}/norm": f"{at}.0.layer_norm.*", f"{ours}/mlp/norm": f"{at}.1.layer_norm.*"}
        for name in ("query", "key", "value", "out"):
            modules[f"{ours}/attention/{name}"] = f"{at}.0.SelfAttention.{name[0]}.*"
        first = {"gated/branches/gate/dense_0": "wi_0", "gated/branches/up": "wi_1"} if gated else {"wide": "wi"}
        for name, module in {**first, "narrow": "wo"}.items():
            modules[f"{ours}/mlp/{name}"] = f"{at}.1.DenseReluDense.{module}.*"
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = from_tensors(tensors, params, torch_names(params, modules))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(LENGTHS)).last_hidden_state.numpy()
    y, _ = apply(model, jax.tree.map(jnp.asarray, params), state, (jnp.asarray(IDS), jnp.asarray(LENGTHS)))
    # its norms and probabilities are in float32 whatever the dtype: to some dozens of 2^-24 of entries of order 1
    np.testing.assert_allclose(y[LENGTHS], expected[LENGTHS], rtol=0, atol=5e-6)


WAVENET = {"channels": 4, "skip": 3, "dilations": (1, 3, 1), "kernel_size": 3}


def wavenet_in_numpy(params, ids, dilations):
    """Logits by the formulas of arXiv:1609.03499, position by position."""

    def causal(p, x, dilation):
        y, taps = np.tile(p["b"], (len(x), 1)), len(p["w"])
        for t, i in np.ndindex(len(x), taps):
            at = t - (taps - 1 - i) * dilation
            y[t] += x[at] @ p["w"][i] if at >= 0 else 0
        return y

    def affine(p, x):
        return x @ p["w"] + p["b"]

    logits = []
    for row in ids:
        x, total = params["embedding"]["table"][row], 0
        for i, dilation in enumerate(dilations):
            p = params[f"block_{i}"]["unit"]
            f, g = (causal(p["branches"][name]["conv_0"], x, dilation) for name in ("filter", "gate"))
            z = np.tanh(f) / (1 + np.exp(-g))
            total = total + affine(p["outward"]["skip"], z)
            x = x + affine(p["outward"]["residual"], z) if i < len(dilations) - 1 else None
        h = np.maximum(affine(params["head"]["dense_0"], np.maximum(total, 0)), 0)
        logits.append(affine(params["head"]["dense_1"], h))
    return np.stack(logits)


def test_a_wavenet_is_its_formulas_in_numpy_and_its_gradients_are_autodiffs(key, x64):
    model = models.wavenet(11, **WAVENET)
    params, state = model.init(key, IDS)
    params, dy = drawn_like(params, 3), jnp.asarray(np.random.default_rng(4).normal(size=(3, 7, 11)))

    @jax.jit
    def run(params):
        y, _, residuals = model.forward(params, state, jnp.asarray(IDS))
        outputs = lambda params: apply(model, params, state, jnp.asarray(IDS))  # noqa: E731
        return y, model.backward(params, residuals, dy)[0], jax.vjp(outputs, params)[1](dy)[0]

    y, by_hand, by_autodiff = run(params)
    p = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(y, wavenet_in_numpy(p, IDS, (1, 3, 1)), rtol=1e-11, atol=1e-12)
    assert_leaves_close(by_hand, by_autodiff, 1e-12)
    table = p["embedding"]["table"]

    def total(table):
        return (wavenet_in_numpy({**p, "embedding": {"table": table}}, IDS, (1, 3, 1)) * np.asarray(dy)).sum()

    slope = numerical_gradient(total, table)
    np.testing.assert_allclose(by_hand["embedding"]["table"], slope, rtol=1e-6, atol=1e-6)


def test_a_wavenet_sees_exactly_its_dilations_and_no_later_sample(key):
    first, last = (models.wavenet_block(4, skip=3, dilation=d, kernel_size=3, last=d == 3) for d in (1, 3))
    model, x = serial(("first", first), ("last", last)), jax.random.normal(key, (1, 20, 4))
    params, state = model.init(key, x)

    @jax.jit
    def run(dy):
        return model.backward(params, model.forward(params, state, x)[2], dy)[1]

    reached = np.flatnonzero(np.abs(run(jnp.zeros((1, 20, 3)).at[0, 16].set(1.0))[0]).max(1))
    assert reached.tolist() == [*range(16 - 2 * (1 + 3), 17)]  # 1 + (k − 1) Σ d of them


def test_a_wavenets_parameters_are_those_of_its_formulas():
    v, c, s, k, layers = 256, 16, 32, 2, 4  # a table; f and g, skip; residual but in the last; two dense layers
    expected = v * c + layers * (2 * (k * c * c + c) + c * s + s) + (layers - 1) * (c * c + c) + (s + v) * (s + 1)
    model = models.wavenet(v, channels=c, skip=s, dilations=(1, 2, 4, 8))
    params, _ = jax.eval_shape(model.init, jax.random.key(0), specs(1, 4, dtype="int32"))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_what_does_not_fit_a_wavenet_is_refused(key):
    with pytest.raises(ValueError, match=r"wavenet: dilations\[1\] = 0; expected at least 1"):
        models.wavenet(3, channels=2, skip=2, dilations=(1, 0))
    with pytest.raises(ValueError, match="wavenet: dilations are none; expected at least one"):
        models.wavenet(3, channels=2, skip=2, dilations=())
    block, x = models.wavenet_block(2, skip=3), jnp.ones((1, 4, 2))
    with pytest.raises(LayerError, match=r"expected x \(B, T, 2\) or \(x, total\), got float32\[1, 4, 3\]"):
        block.init(key, jnp.ones((1, 4, 3)))
    params, state = block.init(key, x)
    with pytest.raises(LayerError, match=r"expected a sum of shape \(1, 4, 3\), got \(1, 4, 2\)"):
        block.forward(params, state, (x, x))


def test_a_language_model_does_not_see_the_future(key):
    for name in ("gpt", "recurrent_lm", "llama"):
        model = SMALL[name][0]
        params, state = fnet.init(model, key, IDS)
        changed = IDS.copy()
        changed[:, 4:] = (changed[:, 4:] + 1) % 11
        before, after = (apply(model, params, state, ids) for ids in (IDS, changed))
        assert (before[:, :4] == after[:, :4]).all() and (before[:, 4:] != after[:, 4:]).any()


def test_a_sequence_longer_than_the_models_positions_is_refused_with_its_path(key):
    model = SMALL["gpt"][0]
    params, state = fnet.init(model, key, IDS)
    with pytest.raises(LayerError, match=r"^body/positions: expected at most 8 positions, got 9"):
        apply(model, params, state, jnp.zeros((1, 9), int))


# --- summary ---------------------------------------------------------------------------------------------------------


def test_the_summary_of_an_mlp_counts_what_the_formulas_give():
    table = summary(fnet.mlp(128, 64, 10), specs(32, 784))
    assert [row.path for row in table.rows] == ["dense_0", "relu_0", "dense_1", "relu_1", "dense_2"]
    first = table.rows[0]
    assert (first.shape, first.dtype, first.parameters, first.bytes) == ("(32, 128)", "float32", 100_480, 401_920)
    product = 2 * 32 * 784 * 128
    assert first.forward == product + 32 * 128  # and the bias
    assert first.backward == 2 * product + 32 * 128  # dw, dx and db
    assert abs(first.forward_compiler - first.forward) <= 32 * 128
    assert table.total.parameters == 109_386 == sum(row.parameters for row in table.rows)
    assert table.total.forward == sum(row.forward for row in table.rows)
    text = str(table).splitlines()
    assert text[0].split() == ["path", "layer", "output", "dtype", "parameters", "bytes", "FLOPs", "by", "XLA",
                               "backward", "by", "XLA"]  # fmt: skip
    assert text[1].split()[:2] == ["dense_0", "dense"] and text[6].startswith("total")


def test_a_summary_allocates_nothing_and_shows_who_owns_the_table():
    model = models.gpt(10**6, length=10**6, layers=2, features=2**12, heads=4, repeated=True)
    table = summary(model, specs(1, 64, dtype="int32"))
    assert table.total.parameters > 8 * 10**9  # more than this machine holds
    rows = {row.path: row for row in table.rows}
    assert rows["gpt"].parameters == 10**6 * 2**12
    assert sum(row.parameters for row in table.rows) == table.total.parameters
    assert rows["body/blocks/1/mlp/wide"].shape == "(1, 64, 16384)"


# --- sampling --------------------------------------------------------------------------------------------------------


def counting() -> Layer:
    """Ids to logits that make id + 1 (modulo 5) likely: a language model that is known."""
    return Layer(
        "counting",
        lambda key, x: ((), ()),
        lambda params, state, x, *, key=None, train=False: (3.0 * jax.nn.one_hot((x + 1) % 5, 5), state, ()),
        lambda params, residuals, dy: ((), None),
    )


def sampled(prompt, count, model=None, **options):
    options = {"key": jax.random.key(0), "context": 3, **options}
    return fnet.generate(model or counting(), (), (), jnp.asarray(prompt), count, **options)


def test_the_likeliest_ids_follow_the_model_from_every_prompt():
    assert sampled([[3], [1]], 4, top_k=1).tolist() == [[3, 4, 0, 1, 2], [1, 2, 3, 4, 0]]
    assert sampled([[4, 4, 4, 2]], 3, top_k=1).tolist() == [[4, 4, 4, 2, 3, 4, 0]]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ids_are_drawn_from_the_tempered_distribution(temperature):
    n = 4000
    drawn = sampled(np.zeros((n, 1), int), 1, temperature=temperature)[:, 1]
    p = np.exp(np.array([0.0, 3, 0, 0, 0]) / temperature)
    p = p / p.sum()
    counts = np.bincount(drawn, minlength=5)
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all(), (counts, n * p)


def test_top_k_leaves_out_what_is_less_likely():
    ranked = Layer("ranked", lambda key, x: ((), ()),
                   lambda params, state, x, *, key=None, train=False:
                   (jnp.broadcast_to(jnp.arange(5.0), (*x.shape, 5)), state, ()), lambda *a: None)  # fmt: skip
    drawn = sampled(np.zeros((500, 1), int), 1, model=ranked, top_k=2, temperature=10.0)[:, 1]
    assert set(drawn.tolist()) == {3, 4}


def test_sampling_is_a_function_of_the_key_whatever_the_count(key):
    model = SMALL["recurrent_lm"][0]
    params, state = fnet.init(model, key, IDS)

    def run(count, seed):
        return fnet.generate(model, params, state, jnp.asarray(IDS[:, :2]), count, key=jax.random.key(seed))

    long = run(8, 0)
    assert (long[:, :6] == run(4, 0)).all() and (long != run(8, 1)).any()
    assert (long[:, :2] == IDS[:, :2]).all()


def test_one_id_at_a_time_with_a_carry_draws_what_the_whole_sequence_would(key):
    model = SMALL["recurrent_lm"][0]
    params, state = fnet.init(model, key, IDS)
    given = {"key": jax.random.key(3), "temperature": 0.7, "top_k": 4}
    with_carry = fnet.generate(model, params, state, jnp.asarray(IDS[:, :2]), 6, **given)
    whole = fnet.generate(model, params, state, jnp.asarray(IDS[:, :2]), 6, context=8, **given)
    assert (with_carry == whole).all()


def test_a_model_is_asked_for_its_vocabulary_with_the_shape_that_it_will_be_given():
    shapes = []

    def forward(params, state, x, *, key=None, train=False):
        assert x.shape[1] % 4 == 0  # a model of windows of four
        shapes.append(x.shape)
        return 3.0 * jax.nn.one_hot((x + 1) % 5, 5), state, ()

    windows = counting()._replace(forward=forward)
    assert sampled([[3], [1]], 3, model=windows, context=8, top_k=1).tolist() == [[3, 4, 0, 1], [1, 2, 3, 4]]
    assert set(shapes) == {(2, 8)}


def test_bad_arguments_of_generate_are_named():
    with pytest.raises(ValueError, match=r"the prompt is float32 of shape \(1, 2\); expected integer ids"):
        sampled(np.ones((1, 2), np.float32), 1)
    with pytest.raises(ValueError, match=r"the prompt is int\d+ of shape \(1, 0\)"):
        sampled(np.ones((1, 0), int), 1)
    for options, words in (
        ({"count": 0}, "count = 0; expected at least 1"),
        ({"context": 0}, "context = 0; expected at least 1"),
        ({"temperature": 0.0}, "temperature = 0.0; expected above 0; for the likeliest id, top_k=1"),
        ({"top_k": 6}, "top_k = 6; expected 1 to 5, the vocabulary"),
    ):
        with pytest.raises(ValueError, match=words):
            sampled([[0]], **{"count": 1, **options})


def fixed_logits(logits) -> Layer:
    """A language model that gives these logits everywhere."""
    return stateless(
        "fixed",
        lambda key, ids: (),
        lambda params, ids: (jnp.broadcast_to(logits, (*ids.shape, len(logits))), ()),
        lambda params, residuals, dy: ((), None),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_equal_logits_are_drawn_evenly_in_every_dtype(dtype, key):
    # 4,000 draws among 2,000: the lower half has 2,000 ± 32; in 16 bits of noise the first of many ties would win
    ids = fnet.generate(
        fixed_logits(jnp.zeros(2000, dtype)), (), (), jnp.zeros((4000, 1), "int32"), 1, key=key, context=1
    )
    assert abs(int((ids[:, 1] < 1000).sum()) - 2000) < 5 * 32


@pytest.mark.parametrize(("dtype", "temperature"), [("float32", 1e-38), ("float32", 1e-300), ("float16", 1e-5)])
def test_a_temperature_near_0_gives_the_likeliest(dtype, temperature, key):
    model = fixed_logits(jnp.asarray([1, 5, 10, -3], dtype))
    ids = fnet.generate(model, (), (), jnp.zeros((1, 1), "int32"), 4, key=key, context=1, temperature=temperature)
    assert ids[0, 1:].tolist() == [2, 2, 2, 2]


def test_ids_that_the_prompt_cannot_hold_or_the_vocabulary_does_not_have_are_refused(key):
    def sample(prompt):
        return fnet.generate(fixed_logits(jnp.zeros(300)), (), (), prompt, 1, key=key, context=2)

    with pytest.raises(ValueError, match="the prompt is uint8, which cannot hold ids up to 299"):
        sample(jnp.zeros((1, 1), "uint8"))
    for wrong in (300, -1):
        with pytest.raises(ValueError, match=rf"the prompt has id {wrong} at \(0, 1\); expected 0 to 299"):
            sample(jnp.asarray([[1, wrong]]))


def test_the_summary_counts_a_convolution_by_its_product_and_bias():
    row = next(row for row in summary(models.lenet5(), specs(32, 28, 28, 1)).rows if row.path == "conv_0")
    assert row.forward == 32 * 28 * 28 * 6 * (2 * 25 + 1)


def test_a_vision_transformer_refuses_images_that_are_not_whole_patches(key):
    model = models.vit(10, patch=4, layers=1, features=8, heads=2, positions=4)
    with pytest.raises(LayerError, match=r"^patches/grid: expected .* sides that 4 divides, got .*11, 11"):
        model.init(key, specs(1, 11, 11, 1))


def test_a_unet_names_the_divisor_of_sides_that_it_refuses(key):
    for dimensions, shape, message in [
        (2, (1, 8, 6, 1), r"^grid: expected \(B, H, W, C\) with sides that 4 divides, got shape \(1, 8, 6, 1\)"),
        (2, (1, 8, 1), r"^grid: expected \(B, H, W, C\) with sides that 4 divides, got shape \(1, 8, 1\)"),
        (1, (1, 9, 1), r"^grid: expected \(B, T, C\) with sides that 4 divides, got shape \(1, 9, 1\)"),
    ]:
        with pytest.raises(LayerError, match=message):
            models.unet(2, dimensions=dimensions, widths=(2, 2, 2)).init(key, specs(*shape))


def test_sizes_of_models_are_checked():
    with pytest.raises(ValueError, match=r"unet: widths = \(\); expected at least one"):
        models.unet(2, widths=())
    with pytest.raises(ValueError, match=r"unet: widths = \(4, 3\); expected at least one, each of them even"):
        models.unet(2, widths=(4, 3), early=True)
    with pytest.raises(ValueError, match="unet: dimensions = 4; expected one of 1, 2, 3"):
        models.unet(2, dimensions=4)
    with pytest.raises(ValueError, match=r"unet: widths\[1\] = 0; expected at least 1"):
        models.unet(2, widths=(4, 0))
    with pytest.raises(ValueError, match=r"resnet: blocks\[0\] = 0; expected at least 1"):
        models.resnet(10, blocks=(0, 1))
    with pytest.raises(LayerError, match="body: expected a last layer of 4 units, as the table has features, got 5"):
        models.recurrent_lm(7, lstm(5), features=4).init(jax.random.key(0), specs(1, 3, dtype="int32"))
