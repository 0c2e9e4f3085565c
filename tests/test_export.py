"""Weights in files and under PyTorch's names, and inference without the model: by numbers, and what is refused.

PyTorch's formulas are written out in NumPy; where PyTorch is installed it computes them itself too.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import DictKey
from scipy.special import erf

import fnet
import fnet.export.inference as export_module
from fnet.core.trees import named_leaves
from fnet.export import (
    Conv1D,
    ConvTranspose,
    ExportError,
    Flattened,
    Rule,
    export_inference,
    from_tensors,
    load_inference,
    load_weights,
    save_weights,
    to_tensors,
    torch_names,
)
from fnet.layers import (
    attention,
    batch_norm,
    bidirectional,
    conv,
    conv_transpose,
    dense,
    dropout,
    embedding,
    flatten,
    gelu,
    gru,
    layer_norm,
    learned_positions,
    lstm,
    prelu,
    relu,
    residual,
    rnn,
    serial,
    stateless,
    swiglu,
)
from fnet.layers.initializers import zeros
from fnet.layers.models import gpt, imagenet_stem, lenet5, recurrent_lm, resnet, transformer_block
from tests.test_training import assert_same_bits

pytest.importorskip("safetensors")


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def random_like(tree, seed=0):
    """The tree with other numbers in all its leaves, biases too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), tree)


# --- safetensors -----------------------------------------------------------------------------------------------------


def tree_of_many_kinds():
    return {
        "dense_0": {"w": jnp.arange(6.0).reshape(2, 3), "half": jnp.asarray([1.5, -jnp.inf], jnp.float16)},
        "a-b": (jnp.asarray([[jnp.nan, 3.0]], jnp.bfloat16), Pair(jnp.asarray(7, jnp.int32), jnp.zeros((0, 4)))),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "flags": jnp.asarray([True, False]),
    }


def test_leaves_of_every_dtype_come_back_to_the_bit_under_their_paths(tmp_path):
    tree, path = tree_of_many_kinds(), tmp_path / "a.safetensors"
    save_weights(path, tree)
    assert_same_bits(load_weights(path, jax.eval_shape(lambda: tree)), jax.tree.map(jnp.asarray, tree))
    with path.open("rb") as file:  # as the format is written down: the header's length, JSON, the numbers row by row
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        begin = file.tell() + header["turned"]["data_offsets"][0]
        file.seek(begin)
        assert struct.unpack("<6f", file.read(24)) == (0, 3, 1, 4, 2, 5)
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "dense_0/w": ("F32", [2, 3]),
        "dense_0/half": ("F16", [2]),
        "a-b/0": ("BF16", [1, 2]),
        "a-b/1/first": ("I32", []),
        "a-b/1/second": ("F32", [0, 4]),
        "turned": ("F32", [3, 2]),
        "flags": ("BOOL", [2]),
    }


def test_names_and_rules_hold_both_ways(tmp_path):
    tree = {"a": {"w": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(2)}
    save_weights(tmp_path / "names", tree, {"a/w": "kernel"})
    assert_same_bits(load_weights(tmp_path / "names", tree, {"a/w": "kernel"}), tree)
    assert_same_bits(load_weights(tmp_path / "names", {"kernel": tree["a"]["w"], "b": tree["b"]})["b"], tree["b"])
    rules = [Rule(("b", "a/w"), ("both",), lambda b, w: (np.append(w, b),), lambda x: (x[6:], x[:6].reshape(2, 3)))]
    save_weights(tmp_path / "rules", tree, rules)
    np.testing.assert_array_equal(load_weights(tmp_path / "rules", {"both": jnp.zeros(8)})["both"], [*range(6), 1, 1])
    assert_same_bits(load_weights(tmp_path / "rules", tree, rules), tree)


def test_weights_and_tensors_share_no_memory():
    tree = {"w": jnp.zeros(1000)}
    tensors = to_tensors(tree)
    tensors["w"][:] = 1
    assert not tree["w"].any()
    room = np.zeros(1016, np.float32)
    aligned = room[-room.ctypes.data % 64 // 4 :][:1000]  # such memory jax takes as it is if it may
    taken = from_tensors({"w": aligned}, tree)
    aligned[:] = 1
    assert not taken["w"].any()


def test_every_leaf_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "a"
    save_weights(path, {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "c": jnp.zeros(4), "old": jnp.zeros(1)})
    like = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4), "c": jnp.zeros(4, jnp.bfloat16), "new": jnp.zeros(5)}
    with pytest.raises(ExportError) as caught:
        load_weights(path, like, {"new": "fresh"})
    assert str(caught.value) == (
        f"{path} is not of this model: a: expected float32[3, 2], found float32[2, 3]; c: expected bfloat16[4], found "
        "float32[4]; new (as fresh): expected float32[5], found nothing; old: expected nothing, found float32[1]. "
        "Give the model it is of, or its names"
    )


def test_a_file_that_exists_is_not_overwritten_and_none_is_left_half_written(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("kept")
    with pytest.raises(ExportError, match=r"a exists already and is left as it is; expected a file that does not"):
        save_weights(path, {"w": jnp.zeros(2)})
    assert path.read_text() == "kept"

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match=r"b cannot be written \(No space left on device\); expected .* with room"):
        save_weights(tmp_path / "b", {"w": jnp.zeros(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_python_number_is_as_jax_holds_it(tmp_path):
    tree = {"rate": 3.5, "count": 2, "on": True, "w": jnp.ones(2)}
    save_weights(tmp_path / "a", tree)
    assert_same_bits(load_weights(tmp_path / "a", tree), jax.tree.map(jnp.asarray, tree))
    assert to_tensors({"many": 2**40})["many"] == 2**40, "and as it is where jax would not hold it"


@pytest.mark.parametrize("what", ["nothing", "text", "pickle", "truncated", "folder", "float8"])
def test_a_file_that_is_no_safetensors_file_is_named(what, tmp_path):
    path = tmp_path / "a"
    if what == "folder":
        path.mkdir()
    elif what == "float8":  # which NumPy cannot read
        from safetensors.numpy import save

        path.write_bytes(save({"w": np.zeros(100, jnp.float8_e4m3fn)}))
    elif what == "truncated":
        save_weights(path, {"w": jnp.zeros(100)})
        path.write_bytes(path.read_bytes()[:-10])
    elif what != "nothing":
        path.write_bytes({"text": b"hello " * 9, "pickle": b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR."}[what])
    with pytest.raises(ExportError, match=r"a cannot be read \(.*\); expected a whole safetensors file"):
        load_weights(path, {"w": jnp.zeros(100)})


# --- PyTorch's names and formulas ------------------------------------------------------------------------------------


def linear(s, name, x):  # y = x Wᵀ + b
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def windows(x, size, stride, padding, value=0.0):
    """``(B, C, H', W', size, size)`` of ``x (B, C, H, W)``."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=value)
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))[:, :, ::stride, ::stride]


def conv2d(s, name, x, padding, stride=1):  # x (B, C, H, W), W (O, C, k, k); cross-correlation
    w = s[f"{name}.weight"]
    y = np.einsum("bchwij,ocij->bohw", windows(x, w.shape[2], stride, padding), w)
    return y + s[f"{name}.bias"][:, None, None] if f"{name}.bias" in s else y


def pooled(x):
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).max((3, 5))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def lstm_formula(s, suffix, x):  # gates i, f, g, o; x (B, T, I)
    w_i, w_h, b_i, b_h = (s[f"{name}_{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = np.zeros((len(x), w_h.shape[1]))
    ys = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ w_i.T + b_i + h @ w_h.T + b_h, 4, 1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        ys.append(h)
    return np.stack(ys, 1)


def gru_formula(s, suffix, x):  # r, z, n: n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = (1 − z) n + z h
    w_i, w_h, b_i, b_h = (s[f"{name}_{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = np.zeros((len(x), w_h.shape[1]))
    ys = []
    for t in range(x.shape[1]):
        (ri, zi, ni), (rh, zh, nh) = (np.split(v, 3, 1) for v in (x[:, t] @ w_i.T + b_i, h @ w_h.T + b_h))
        r, z = sigmoid(ri + rh), sigmoid(zi + zh)
        h = (1 - z) * np.tanh(ni + r * nh) + z * h
        ys.append(h)
    return np.stack(ys, 1)


def rnn_formula(s, suffix, x):
    w_i, w_h, b_i, b_h = (s[f"{name}_{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, ys = np.zeros((len(x), w_h.shape[1])), []
    for t in range(x.shape[1]):
        h = np.tanh(x[:, t] @ w_i.T + b_i + h @ w_h.T + b_h)
        ys.append(h)
    return np.stack(ys, 1)


def layer_norm_formula(s, name, x):  # ε 1e-5
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * s[f"{name}.weight"] + s[f"{name}.bias"]


def erf_gelu(x):
    return x / 2 * (1 + erf(x / np.sqrt(2)))


def tanh_gelu(x):  # GPT-2's gelu_new
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def relu_of(x):
    return np.maximum(x, 0)


def heads_formula(q, k, v, heads, causal):  # concat_h softmax(Q_h K_hᵀ / √D) V_h, of (B, T, heads · D)
    parts = []
    for h in range(heads):
        here = slice(h * q.shape[2] // heads, (h + 1) * q.shape[2] // heads)
        scores = q[:, :, here] @ k[:, :, here].swapaxes(1, 2) / np.sqrt(q.shape[2] // heads)
        scores = np.where(np.tri(scores.shape[1], dtype=bool), scores, -np.inf) if causal else scores
        e = np.exp(scores - scores.max(-1, keepdims=True))
        parts.append(e / e.sum(-1, keepdims=True) @ v[:, :, here])
    return np.concatenate(parts, 2)


def attention_formula(s, name, x, heads, causal):  # in_proj_weight (3E, E): queries, keys and values, then y = o Wᵀ + b
    inward = x @ s[f"{name}in_proj_weight"].T + s.get(f"{name}in_proj_bias", 0)
    q, k, v = np.split(inward, 3, -1)
    o = heads_formula(q, k, v, heads, causal)
    return o @ s[f"{name}out_proj.weight"].T + s.get(f"{name}out_proj.bias", 0)


def encoder_layer_formula(s, name, x, heads, first, activation):
    attend = lambda x: attention_formula(s, f"{name}self_attn.", x, heads, causal=False)  # noqa: E731
    feed = lambda x: linear(s, f"{name}linear2", activation(linear(s, f"{name}linear1", x)))  # noqa: E731
    norm1, norm2 = (lambda x, i=i: layer_norm_formula(s, f"{name}norm{i}", x) for i in (1, 2))
    if first:
        x = x + attend(norm1(x))
        return x + feed(norm2(x))
    x = norm1(x + attend(x))
    return norm2(x + feed(x))


def conv1d_formula(s, name, x):  # GPT-2's: y = x W + b
    return x @ s[f"{name}.weight"] + s[f"{name}.bias"]


def gpt2_formula(s, ids, start, layers, heads):
    x = s[f"{start}wte.weight"][ids] + s[f"{start}wpe.weight"][None, : ids.shape[1]]
    for i in range(layers):
        block = f"{start}h.{i}."
        q, k, v = np.split(conv1d_formula(s, f"{block}attn.c_attn", layer_norm_formula(s, f"{block}ln_1", x)), 3, -1)
        x = x + conv1d_formula(s, f"{block}attn.c_proj", heads_formula(q, k, v, heads, causal=True))
        y = tanh_gelu(conv1d_formula(s, f"{block}mlp.c_fc", layer_norm_formula(s, f"{block}ln_2", x)))
        x = x + conv1d_formula(s, f"{block}mlp.c_proj", y)
    return layer_norm_formula(s, f"{start}ln_f", x)


def mlp_in_torch(s, x):
    return linear(s, "2", np.maximum(linear(s, "0", x), 0))


def slopes_in_torch(s, x):
    for i in (0, 2):
        x = x @ s[f"{i}.weight"].T + s[f"{i}.bias"]
        x = np.maximum(x, 0) + s[f"{i + 1}.weight"] * np.minimum(x, 0)
    return x


def gated_in_torch(s, x):  # by the names of Llama
    gate = x @ s["gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ s["up_proj.weight"].T)) @ s["down_proj.weight"].T


def torch_gated(torch):
    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, sizes in (("gate_proj", (3, 5)), ("up_proj", (3, 5)), ("down_proj", (5, 3))):
                setattr(self, name, torch.nn.Linear(*sizes, bias=False))

        def forward(self, x):
            return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    return Gated()


def lenet_in_torch(s, x):
    x = x.transpose(0, 3, 1, 2)
    x = pooled(np.maximum(conv2d(s, "0", x, 2), 0))
    x = pooled(np.maximum(conv2d(s, "3", x, 0), 0)).reshape(len(x), -1)
    x = np.maximum(linear(s, "7", x), 0)
    return linear(s, "11", np.maximum(linear(s, "9", x), 0))


def language_model_in_torch(s, ids):
    rnn = {name.removeprefix("rnn."): tensor for name, tensor in s.items()}
    return lstm_formula(rnn, "l1", lstm_formula(rnn, "l0", s["embedding.weight"][ids])) @ s["head.weight"].T


def two_ways_in_torch(s, x):
    return np.concatenate([lstm_formula(s, "l0", x), lstm_formula(s, "l0_reverse", x[:, ::-1])[:, ::-1]], 2)


def normalized_in_torch(s, x):
    y = linear(s, "0", x)
    scale = s["1.weight"] / np.sqrt(s["1.running_var"] + 1e-5)
    return (y - s["1.running_mean"]) * scale + s["1.bias"]


def volumes_in_torch(
    s, x
):  # a convolution in two groups, and a transposed one with stride 2, padding and one entry more
    x, w = np.moveaxis(x, -1, 1), s["0.weight"]  # w (O, C/groups, *kernel)
    seen = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], (2, 3, 4))
    parts = zip(np.split(seen, 2, 1), np.split(w, 2), strict=True)
    x = np.concatenate([np.einsum("bcxyzijk,ocijk->boxyz", *part) for part in parts], 1)
    x, w, k = x + s["0.bias"].reshape(-1, 1, 1, 1), s["1.weight"], s["1.weight"].shape[2:]  # w (C, O/groups, *kernel)
    y = np.zeros((len(x), 2 * w.shape[1], *(2 * (m - 1) + j + 1 for m, j in zip(x.shape[2:], k, strict=True))))
    for at in np.ndindex(*x.shape[2:]):
        here = (..., *(slice(2 * i, 2 * i + j) for i, j in zip(at, k, strict=True)))
        parts = zip(np.split(x[:, :, *at], 2, 1), np.split(w, 2), strict=True)
        y[here] += np.concatenate([np.einsum("bc,coijk->boijk", *part) for part in parts], 1)
    y = y[:, :, :, 1:-1, 1:-1] + s["1.bias"].reshape(-1, 1, 1, 1)
    return np.moveaxis(y, 1, -1)


def torch_volumes(torch):
    return torch.nn.Sequential(
        torch.nn.Conv3d(2, 4, (2, 3, 2), groups=2),
        torch.nn.ConvTranspose3d(4, 6, (2, 2, 3), 2, (0, 1, 1), output_padding=1, groups=2),
    )


def resnet_in_torch(s, x):  # of two stages with a block each; torchvision's names
    def norm(name, x):
        scale, mean, bias = (t[:, None, None] for t in (scales(name), s[f"{name}.running_mean"], s[f"{name}.bias"]))
        return (x - mean) * scale + bias

    def scales(name):
        return s[f"{name}.weight"] / np.sqrt(s[f"{name}.running_var"] + 1e-5)

    def block(name, x, stride):
        y = relu_of(norm(f"{name}.bn1", conv2d(s, f"{name}.conv1", x, 1, stride)))
        y = norm(f"{name}.bn2", conv2d(s, f"{name}.conv2", y, 1))
        if f"{name}.downsample.0.weight" in s:
            x = norm(f"{name}.downsample.1", conv2d(s, f"{name}.downsample.0", x, 0, stride))
        return relu_of(y + x)

    x = relu_of(norm("bn1", conv2d(s, "conv1", x.transpose(0, 3, 1, 2), 3, 2)))
    x = windows(x, 3, 2, 1, -np.inf).max((4, 5))
    return linear(s, "fc", block("layer2.0", block("layer1.0", x, 1), 2).mean((2, 3)))


class Case(NamedTuple):
    """A model, inputs for it, PyTorch's names for its tree, and what PyTorch computes."""

    model: fnet.Layer
    shape: tuple[int, ...]
    modules: dict
    formula: Callable[[Mapping[str, np.ndarray], np.ndarray], np.ndarray]
    torch: Callable  # torch -> the module
    ids: int = 0  # the inputs are integers below this
    bits: bool = True  # what comes from there goes back as it was; not two biases, of which the sum is kept


def torch_lenet(torch):
    nn = torch.nn
    features = [
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    return nn.Sequential(
        *features, nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
    )


def torch_language_model(torch):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 6)
            self.rnn = torch.nn.LSTM(6, 6, num_layers=2, batch_first=True)
            self.head = torch.nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.rnn(self.embedding(ids))[0])

    return Model()


def linear_and_norm(torch):
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))


# --- PyTorch's transformers: self-attention alone, encoder layers and GPT-2


def torch_attention(features, heads, bias, causal):
    def make(torch):
        class Attention(torch.nn.MultiheadAttention):
            def forward(self, x):
                mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if causal else None  # True = left out
                return super().forward(x, x, x, attn_mask=mask, need_weights=False)

        return Attention(features, heads, bias=bias, batch_first=True)

    return make


def attention_case(features, heads, bias, causal):
    model = attention(heads, causal=causal, bias=zeros() if bias else None)
    formula = lambda s, x: attention_formula(s, "", x, heads, causal)  # noqa: E731
    return Case(model, (2, 5, features), {"params": "*"}, formula, torch_attention(features, heads, bias, causal))


def encoder_layer(features, width, heads, first, activation):
    """``nn.TransformerEncoderLayer`` in fnet's layers, with the names that it has there."""
    norm1, norm2 = ("norm1", layer_norm()), ("norm2", layer_norm())
    attend, feed = (
        ("self_attn", attention(heads)),
        [("linear1", dense(width)), activation, ("linear2", dense(features))],
    )
    if first:
        return serial(("attend", residual(norm1, attend)), ("feed", residual(norm2, *feed)))
    return serial(("attend", residual(attend)), norm1, ("feed", residual(*feed)), norm2)


def encoder_modules(start, name, first):
    """The paths of `encoder_layer`'s layers, and PyTorch's names for them."""
    places = {"self_attn": "attend/", "linear1": "feed/", "linear2": "feed/"}
    places |= {"norm1": "attend/", "norm2": "feed/"} if first else {"norm1": "", "norm2": ""}
    return {f"{start}{place}{child}": f"{name}{child}.*" for child, place in places.items()}


def encoder_case(features, width, heads, first, activation, layers=None):
    ours, theirs, named = {"relu": (relu(), relu_of, "relu"), "gelu": (gelu(), erf_gelu, "gelu")}[activation]
    one = encoder_layer(features, width, heads, first, ours)

    def layer(torch):
        settings = {"dropout": 0.0, "activation": named, "batch_first": True, "norm_first": first}
        return torch.nn.TransformerEncoderLayer(features, heads, width, **settings)

    if layers is None:
        modules = encoder_modules("params/", "", first)
        formula = lambda s, x: encoder_layer_formula(s, "", x, heads, first, theirs)  # noqa: E731
        return Case(one, (2, 5, features), modules, formula, layer)

    def stack(s, x):
        for i in range(layers):
            x = encoder_layer_formula(s, f"layers.{i}.", x, heads, first, theirs)
        return layer_norm_formula(s, "norm", x)

    modules = {"params/norm": "norm.*"}
    for i in range(layers):
        modules |= encoder_modules(f"params/{i}/", f"layers.{i}.", first)

    def encoder(torch):
        norm, nested = torch.nn.LayerNorm(features), {"enable_nested_tensor": False}
        return torch.nn.TransformerEncoder(layer(torch), layers, norm, **nested)

    model = serial(*((f"{i}", one) for i in range(layers)), ("norm", layer_norm()))
    return Case(model, (2, 5, features), modules, stack, encoder)


def torch_gpt2(vocabulary, length, features, width, head):
    def make(torch):
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=length,
            n_embd=features,
            n_layer=2,
            n_head=2,
            n_inner=width,
            activation_function="gelu_new",
        )

        class Outputs(transformers.GPT2LMHeadModel if head else transformers.GPT2Model):
            def forward(self, ids):
                return super().forward(ids)[0]

        return Outputs(config)

    return make


def gpt2_modules(start, body, paths):
    """Names of GPT-2's modules, by the paths of two blocks as `gpt` has them; ``paths`` are of what stands around."""
    modules = {**paths, f"{body}positions/table": f"{start}wpe.weight", f"{body}norm": f"{start}ln_f.*"}
    for i in range(2):
        here, there = f"{body}block_{i}/", f"{start}h.{i}."
        modules |= {
            f"{here}attend/norm": f"{there}ln_1.*",
            f"{here}attend/attention": Conv1D(f"{there}attn.*"),
            f"{here}mlp/norm": f"{there}ln_2.*",
            f"{here}mlp/wide": Conv1D(f"{there}mlp.c_fc.*"),
            f"{here}mlp/narrow": Conv1D(f"{there}mlp.c_proj.*"),
        }
    return modules


def gpt2_case(vocabulary, length, features, expansion):
    """``GPT2Model`` of layers: ids to the features of the last norm."""
    blocks = ((f"block_{i}", transformer_block(features, 2, causal=True, expansion=expansion)) for i in range(2))
    start = ("embed", embedding(vocabulary, features)), ("positions", learned_positions(length))
    return Case(
        serial(*start, *blocks, ("norm", layer_norm())),
        (2, 6),
        gpt2_modules("", "params/", {"params/embed": "wte.*"}),
        lambda s, ids: gpt2_formula(s, ids, "", 2, 2),
        torch_gpt2(vocabulary, length, features, expansion * features, head=False),
        ids=vocabulary,
    )


TRANSFORMERS = {
    "attention": attention_case(6, 3, True, False),
    "causal attention without biases": attention_case(8, 2, False, True),
    "causal attention": attention_case(4, 1, True, True),
    "encoder layer, norms last": encoder_case(6, 10, 2, False, "relu"),
    "encoder layer, norms first": encoder_case(6, 10, 3, True, "gelu"),
    "square encoder layer, norms last": encoder_case(8, 8, 2, False, "gelu"),
    "square encoder layer, norms first": encoder_case(8, 8, 2, True, "relu"),
    "encoder": encoder_case(6, 10, 2, False, "gelu", layers=2),
    "square encoder": encoder_case(5, 5, 1, True, "relu", layers=2),
    "gpt-2": gpt2_case(11, 7, 4, 4),
    "square gpt-2": gpt2_case(8, 8, 8, 1),
    "gpt-2 with its head": Case(
        gpt(11, length=6, layers=2, features=4, heads=2),
        (2, 6),
        gpt2_modules("transformer.", "params/body/", {"params/table": ("transformer.wte.weight", "lm_head.weight")}),
        lambda s, ids: gpt2_formula(s, ids, "transformer.", 2, 2) @ s["lm_head.weight"].T,
        torch_gpt2(11, 6, 4, 16, head=True),
        ids=11,
    ),
}


def torch_resnet(torch):
    """torchvision's ``ResNet`` of basic blocks, by its names."""
    nn, relu = torch.nn, torch.nn.functional.relu

    class Block(nn.Module):
        def __init__(self, i, o, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
            self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
            projection = [nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)] if stride > 1 else []
            self.downsample = nn.Sequential(*projection)

        def forward(self, x):
            y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
            return relu(y + self.downsample(x))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            self.layer1, self.layer2 = nn.Sequential(Block(4, 4, 1)), nn.Sequential(Block(4, 8, 2))
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            x = self.maxpool(relu(self.bn1(self.conv1(x))))
            return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))

    return ResNet()


def resnet_modules():
    modules = {"params/head": "fc.*", "params/stem/conv_0": "conv1.*"}
    modules |= {f"{part}/stem/batch_norm_0": "bn1.*" for part in ("params", "state")}
    for i in range(2):
        here, there = f"stage_{i}/basic_block_0/residual_0/", f"layer{i + 1}.0."
        modules |= {f"params/{here}conv_{k}": f"{there}conv{k + 1}.*" for k in range(2)}
        norms = {f"batch_norm_{k}": f"bn{k + 1}.*" for k in range(2)}
        if i:
            modules[f"params/{here}shortcut/conv_0"] = f"{there}downsample.0.*"
            norms["shortcut/batch_norm_0"] = "downsample.1.*"
        modules |= {f"{p}/{here}{ours}": f"{there}{name}" for ours, name in norms.items() for p in ("params", "state")}
    return modules


def small_resnet(classes):
    return resnet(classes, blocks=(1, 1), width=4, stem=imagenet_stem(4))


CASES = {
    **TRANSFORMERS,
    "resnet": Case(small_resnet(3), (2, 16, 16, 3), resnet_modules(), resnet_in_torch, torch_resnet),
    "mlp": Case(
        fnet.mlp(7, 4),
        (5, 3),
        {"params/dense_0": "0.*", "params/dense_1": "2.*"},
        mlp_in_torch,
        lambda torch: torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.ReLU(), torch.nn.Linear(7, 4)),
    ),
    "learned slopes": Case(
        serial(dense(5), prelu(), dense(4), prelu(shared=True)),
        (6, 3),
        {f"params/{ours}": f"{i}.*" for i, ours in enumerate(("dense_0", "prelu_0", "dense_1", "prelu_1"))},
        slopes_in_torch,
        lambda torch: torch.nn.Sequential(
            torch.nn.Linear(3, 5), torch.nn.PReLU(5), torch.nn.Linear(5, 4), torch.nn.PReLU()
        ),
    ),
    "gated unit": Case(
        serial(swiglu(5, bias=None), dense(3, bias=None)),
        (2, 4, 3),
        {
            "params/swiglu_0/branches/gate/dense_0": "gate_proj.*",
            "params/swiglu_0/branches/up": "up_proj.*",
            "params/dense_0": "down_proj.*",
        },
        gated_in_torch,
        torch_gated,
    ),
    "lenet": Case(
        lenet5(),
        (2, 28, 28, 1),
        {
            "params/conv_0": "0.*",
            "params/conv_1": "3.*",
            "params/dense_0": Flattened("7.*", 16),
            "params/dense_1": "9.*",
            "params/dense_2": "11.*",
        },
        lenet_in_torch,
        torch_lenet,
    ),
    "volumes": Case(
        serial(
            conv(4, (2, 3, 2), groups=2, padding="VALID"),
            conv_transpose(6, (2, 2, 3), stride=2, groups=2, padding=((0, 0), (1, 1), (1, 1)), output_padding=1),
        ),
        (2, 3, 4, 3, 2),
        {"params/conv_0": "0.*", "params/conv_transpose_0": ConvTranspose("1.*")},
        volumes_in_torch,
        torch_volumes,
    ),
    "language model": Case(
        recurrent_lm(11, lstm(6), lstm(6), features=6),
        (3, 5),
        {
            "params/table": ("embedding.weight", "head.weight"),
            "params/body/lstm_0": "rnn.*_l0",
            "params/body/lstm_1": "rnn.*_l1",
        },
        language_model_in_torch,
        torch_language_model,
        ids=11,
        bits=False,
    ),
    "both directions": Case(
        bidirectional(lstm(4)),
        (3, 5, 2),
        {"params/forward": "*_l0", "params/backward": "*_l0_reverse"},
        two_ways_in_torch,
        lambda torch: torch.nn.LSTM(2, 4, batch_first=True, bidirectional=True),
        bits=False,
    ),
    "gru": Case(
        gru(4),
        (3, 5, 2),
        {"params": "*_l0"},
        lambda s, x: gru_formula(s, "l0", x),
        lambda torch: torch.nn.GRU(2, 4, batch_first=True),
        bits=False,
    ),
    "rnn": Case(
        rnn(4),
        (3, 5, 2),
        {"params": "*_l0"},
        lambda s, x: rnn_formula(s, "l0", x),
        lambda torch: torch.nn.RNN(2, 4, batch_first=True),
        bits=False,
    ),
    "normalization": Case(
        serial(dense(5), batch_norm()),
        (4, 3),
        {"params/dense_0": "0.*", "params/batch_norm_0": "1.*", "state/batch_norm_0": "1.*"},
        normalized_in_torch,
        linear_and_norm,
    ),
}


def inputs_of(case, dtype):
    rng = np.random.default_rng(1)
    return rng.integers(0, case.ids, case.shape, np.int32) if case.ids else rng.normal(size=case.shape).astype(dtype)


def parts_of(case, dtype, seed=0):
    """The tree of parameters and state, random in all leaves, and its name map."""
    params, state = fnet.init(case.model, jax.random.key(0), inputs_of(case, dtype))
    tree = random_like({"params": params, "state": state}, seed)
    positive = lambda path, leaf: (abs(leaf) if path[-1:] == (DictKey("var"),) else leaf).astype(dtype)  # noqa: E731
    tree = jax.tree_util.tree_map_with_path(positive, tree)
    return tree, torch_names(tree, case.modules)


@functools.cache
def compiled(model):
    return jax.jit(functools.partial(fnet.apply, model))


def forward(case, tree, x):
    return np.asarray(compiled(case.model)(tree["params"], tree["state"], jnp.asarray(x)))


@pytest.mark.parametrize("name", CASES)
def test_exported_weights_give_the_models_outputs_by_pytorchs_formulas_and_back(name, x64):
    case = CASES[name]
    tree, names = parts_of(case, np.float64)
    x = inputs_of(case, np.float64)
    tensors = to_tensors(tree, names)
    np.testing.assert_allclose(case.formula(tensors, x), forward(case, tree, x), rtol=1e-11, atol=1e-12)
    assert_same_bits(from_tensors(tensors, tree, names), tree)

    # weights that come from there: both biases have values of their own
    rng = np.random.default_rng(2)
    foreign = {n: t if t.dtype == np.int64 else abs(rng.normal(0, 0.5, t.shape)) for n, t in tensors.items()}
    tied = {"head.weight": "embedding.weight", "lm_head.weight": "transformer.wte.weight"}
    foreign |= {head: foreign[table] for head, table in tied.items() if head in foreign}
    taken = from_tensors(foreign, tree, names)
    np.testing.assert_allclose(forward(case, taken, x), case.formula(foreign, x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_pytorch_computes_the_same_with_the_weights_of_a_file_and_back(name, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    case = CASES[name]
    tree, names = parts_of(case, np.float32)
    x = inputs_of(case, np.float32)
    given = torch.from_numpy(np.moveaxis(x, -1, 1).copy() if x.ndim > 3 else x)

    def outputs(module):
        with torch.no_grad():
            y = module.eval()(given)
        y = (y[0] if isinstance(y, tuple) else y).numpy()
        return np.moveaxis(y, 1, -1) if y.ndim > 3 else y

    there = tmp_path / "there.safetensors"
    save_weights(there, tree, names)
    module = case.torch(torch)
    module.load_state_dict(load_file(there), strict=True)
    # sums of some 400 products in float32, in another order
    np.testing.assert_allclose(outputs(module), forward(case, tree, x), rtol=1e-4, atol=1e-5)

    torch.manual_seed(0)
    module, back = case.torch(torch), tmp_path / "back.safetensors"
    for parameter in module.parameters():  # no zeros and ones, and no layers that are copies of each other
        torch.nn.init.normal_(parameter, std=0.5)
    save_file({key: tensor.clone().contiguous() for key, tensor in module.state_dict().items()}, back)
    taken = load_weights(back, tree, names)
    np.testing.assert_allclose(forward(case, taken, x), outputs(module), rtol=1e-4, atol=1e-5)
    again = tmp_path / "again.safetensors"
    save_weights(again, taken, names)
    if case.bits:
        assert_same_bits(
            {key: tensor.numpy() for key, tensor in load_file(again).items()},
            {key: tensor.numpy() for key, tensor in module.state_dict().items()},
        )
    module.load_state_dict(load_file(again), strict=True)
    np.testing.assert_allclose(outputs(module), forward(case, taken, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["square gpt-2", "square encoder layer, norms last"])
def test_square_weights_told_to_stand_the_other_way_give_other_outputs(name, x64):
    case = CASES[name]
    tree, names = parts_of(case, np.float64)
    turned = {
        path: given.name if isinstance(given, Conv1D) else Conv1D(given) if "linear" in path else given
        for path, given in case.modules.items()
        if not path.endswith("attention")
    }
    tensors, x = to_tensors(tree, names), inputs_of(case, np.float64)
    other = from_tensors(tensors, tree, torch_names(tree, {**case.modules, **turned}))  # all shapes fit
    outputs, expected = forward(case, other, x), case.formula(tensors, x)
    assert np.abs(outputs - expected).max() > 0.1 * np.abs(expected).max()


def test_bfloat16_reaches_pytorch_as_it_is(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    save_weights(tmp_path / "a", {"w": jnp.asarray([1.0, -2.5], jnp.bfloat16)})
    loaded = load_file(tmp_path / "a")["w"]
    assert loaded.dtype == torch.bfloat16 and loaded.tolist() == [1.0, -2.5]


def test_a_tensor_of_pytorch_that_is_no_array_is_named_with_the_remedy():
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, requires_grad=True)):
        with pytest.raises(ExportError, match=r"w is no array to NumPy \(.*\); expected one: .*detach\(\)\.float\(\)"):
            from_tensors({"w": tensor}, {"w": jnp.ones(2)})


# --- a part of them, under another head -------------------------------------------------------------------------------


def backbone():
    """The tensors of a ResNet of 3 classes, and the tree of one of 5 with its name map."""
    case = CASES["resnet"]
    tree, names = parts_of(case, np.float32)
    other, others = parts_of(case._replace(model=small_resnet(5)), np.float32, seed=1)
    return to_tensors(tree, names), tree, other, others


def test_a_backbone_comes_under_another_head_and_the_table_says_what_was_taken():
    tensors, tree, other, names = backbone()
    made, taken = from_tensors({**tensors, "module.note": np.zeros(3)}, other, names, partial=True)
    expected = {part: {**tree[part], "head": other[part].get("head", ())} for part in ("params", "state")}
    expected["state"]["head"] = tree["state"]["head"]
    assert_same_bits(made, expected)
    head = {f"params/head/{name}": f"kept: fc.{kind}" for name, kind in (("b", "bias"), ("w", "weight"))}
    head["params/head/b"] += " is float32[3], not float32[5]"
    head["params/head/w"] += " is float32[3, 8], not float32[5, 8]"
    assert taken.kept == head and taken.left == ("fc.bias", "fc.weight", "module.note")
    assert {*taken.taken, *taken.kept} == {path for path, _ in named_leaves(other)}
    lines = str(taken).splitlines()
    width = max(map(len, taken.taken))
    assert f"{'params/stem/conv_0/w':{width}}  taken" in lines
    assert lines[-5:] == [f"{n:{width}}  {what}" for n, what in [*head.items(), *((n, "left") for n in taken.left)]]


def test_a_tensor_of_the_right_shape_under_another_name_is_not_taken():
    tensors, tree, other, names = backbone()
    moved = {{"layer1.0.conv1.weight": "layer1.0.conv9.weight"}.get(name, name): t for name, t in tensors.items()}
    made, taken = from_tensors(moved, other, names, partial=True)
    path = "stage_0/basic_block_0/residual_0/conv_0/w"
    assert taken.kept[f"params/{path}"] == "kept: no tensor layer1.0.conv1.weight"
    assert "layer1.0.conv9.weight" in taken.left
    block = ("params", "stage_0", "basic_block_0", "residual_0")
    of = lambda tree, name: functools.reduce(lambda node, key: node[key], (*block, name), tree)  # noqa: E731
    assert_same_bits(of(made, "conv_0"), of(other, "conv_0"))
    assert_same_bits(of(made, "conv_1"), of(tree, "conv_1"))


def test_tensors_of_another_dtype_are_kept_out_unless_they_are_to_be_converted():
    like = {"a": jnp.zeros(2), "b": jnp.zeros(2), "n": jnp.zeros(2, jnp.int32)}
    tensors = {"a": np.ones(2, np.float16), "b": np.ones(2, np.float32), "n": np.ones(2, np.int64)}
    made, taken = from_tensors(tensors, like, partial=True)
    assert_same_bits(made, {**like, "b": jnp.ones(2)})
    assert taken.kept == {
        "a": "kept: a is float16[2], not float32[2]; dtype='float32' converts it",
        "n": "kept: n is int64[2], not int32[2]",
    }
    made, taken = from_tensors(tensors, like, dtype="float32", partial=True)
    assert_same_bits(made, {**like, "a": jnp.ones(2), "b": jnp.ones(2)})
    assert taken.left == ("n",)
    with pytest.raises(
        ExportError, match=r"no tensor fits \(a is float16.*; expected one at least: to convert them give"
    ):
        from_tensors({"a": tensors["a"]}, {"a": like["a"]}, partial=True)


def test_leaves_of_one_rule_are_taken_together_or_not_at_all():
    case = CASES["attention"]
    tree, names = parts_of(case, np.float32)
    tensors = to_tensors(tree, names)
    other, _ = parts_of(case, np.float32, seed=1)
    del tensors["in_proj_bias"]
    made, taken = from_tensors(tensors, other, names, partial=True)
    kept = dict.fromkeys([f"params/{name}/b" for name in ("query", "key", "value")], "kept: no tensor in_proj_bias")
    assert taken.kept == kept and not taken.left
    for name, params in made["params"].items():
        assert_same_bits(params["w"], tree["params"][name]["w"])
        assert_same_bits(params["b"], (tree if name == "out" else other)["params"][name]["b"])

    tensors, tree, other, names = backbone()  # of PyTorch before 0.4.1, which did not count batches
    made, taken = from_tensors({k: t for k, t in tensors.items() if t.dtype != np.int64}, other, names, partial=True)
    assert_same_bits(made["state"]["stem"], other["state"]["stem"])
    assert taken.kept["state/stem/batch_norm_0/mean"] == "kept: no tensor bn1.num_batches_tracked"
    assert {"bn1.running_mean", "bn1.running_var"} <= {*taken.left}


def test_a_part_is_checked_as_the_whole_is():
    like, tensors = {"a": jnp.zeros(2), "b": jnp.zeros(2)}, {"ab": np.ones(4, np.float32)}
    for restore, found in ((lambda ab: (ab, ab[2:]), "float32[4]"), (lambda ab: (ab[:2] > 0, ab[2:]), "bool[2]")):
        rules = [Rule(("a", "b"), ("ab",), lambda a, b: (np.concatenate([a, b]),), restore)]
        with pytest.raises(ExportError, match=re.escape(f"a was restored as {found}; expected float32[2]: mend its")):
            from_tensors(tensors, like, rules, partial=True)
    with pytest.raises(ExportError, match=r"a was restored as float32\[2\]; expected float64\[2\]: .* jax_enable_x64"):
        from_tensors({"a": np.ones(2)}, {"a": np.zeros(2)}, partial=True)
    with pytest.raises(ExportError, match=r"from_tensors: a is a shape, float32\[2\]; expected arrays where partial"):
        from_tensors({"a": np.ones(2, np.float32)}, jax.eval_shape(lambda: like), partial=True)
    case = CASES["language model"]
    tree, names = parts_of(case, np.float32)
    tensors = to_tensors(tree, names)
    with pytest.raises(ExportError, match=r"head.weight and embedding.weight differ"):
        from_tensors({**tensors, "head.weight": tensors["head.weight"] + 1}, tree, names, partial=True)
    room = np.zeros(1016, np.float32)
    aligned = room[-room.ctypes.data % 64 // 4 :][:1000]
    made, _ = from_tensors({"b": np.ones(2, np.float32)}, {"a": aligned, "b": like["b"]}, partial=True)
    aligned[:] = 1
    assert not made["a"].any()


@pytest.mark.parametrize("partial", [False, True])
def test_names_behind_a_prefix_are_told_so(partial):
    tree, names = parts_of(CASES["mlp"], np.float32)
    tensors = to_tensors(tree, names)
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(ExportError, match=r"[Tt]heir names begin with 'module.': take it off, {name.removeprefix"):
        from_tensors(wrapped, tree, names, partial=partial)
    longer = torch_names(tree, {path: f"module.{name}" for path, name in CASES["mlp"].modules.items()})
    assert_same_bits(from_tensors(wrapped, tree, longer), tree)
    with pytest.raises(ExportError, match=r"[Tt]heir names do not begin with 'module.': name the modules without it"):
        from_tensors(tensors, tree, longer, partial=partial)


def test_tensors_that_no_leaf_takes_may_be_left_out():
    tree, names = parts_of(CASES["mlp"], np.float32)
    tensors = {**to_tensors(tree, names), "mask": np.ones(1, np.float32)}
    with pytest.raises(ExportError, match=r"mask: expected nothing, found float32\[1\]. Leave them out, or take what"):
        from_tensors(tensors, tree, names)
    assert_same_bits(from_tensors(tensors, tree, names, partial=True)[0], tree)


def test_a_module_in_the_place_of_its_tensors_is_told_so():
    class Module:
        pass

    with pytest.raises(ExportError, match=r"tensors is a Module; expected a mapping .* give its state_dict\(\)"):
        from_tensors(Module(), {"w": jnp.ones(2)})


class Meta:
    """As a tensor of PyTorch on its device without memory."""

    device = "meta"

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert meta device type tensor to numpy. Use Tensor.cpu() first")


def test_a_leaf_that_is_kept_is_as_it_was():
    like = {"a": jnp.zeros(3), "b": np.array([2**40, 1]), "c": np.array([1e300])}
    tree, taken = from_tensors({"a": np.ones(3, "float32")}, like, partial=True)
    assert taken.taken == ("a",) and tree["b"].tolist() == [2**40, 1] and tree["c"].tolist() == [1e300]
    assert tree["b"] is not like["b"]


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"a": np.full(3, 1e300)}, {"dtype": "float32"}, "a holds 1e+300, which float32 does not; expected a wider"),
        ({"a": np.array([1, 1e300, 1])}, {"dtype": "float32"}, "a holds 1e+300, which float32 does not; expected"),
        ({"a": np.ones(3)}, {"dtype": "floaty"}, "dtype = 'floaty'; expected a floating dtype"),
        ({"a": np.ones(3)}, {"dtype": "int32"}, "dtype = 'int32'; expected a floating dtype"),
        ({0: np.ones(3)}, {}, "tensors has the name 0; expected names that are text"),
        ({"a": [[1], [2, 3]]}, {}, "a is no array to NumPy (ValueError"),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_tensors_that_cannot_be_taken_are_named(tensors, options, message, partial):
    with pytest.raises(ExportError, match=re.escape(message)):
        from_tensors(tensors, {"a": jnp.zeros(3)}, partial=partial, **options)


def test_tensors_with_a_mask_are_refused():
    masked = np.ma.masked_equal(np.array([1, 2], "float32"), 2)
    with pytest.raises(ExportError, match="a has 1 masked values; expected none, since a mask would be dropped"):
        from_tensors({"a": masked}, {"a": jnp.zeros(2)})
    unmasked = np.ma.array([1, 2], dtype="float32")
    np.testing.assert_array_equal(from_tensors({"a": unmasked}, {"a": jnp.zeros(2)})["a"], [1, 2])


def test_tensors_without_numbers_are_told_so_where_they_are_wanted():
    like = {"w": jnp.zeros(2), "b": jnp.zeros(2)}
    tensors = {"w": Meta(), "b": np.ones(2, np.float32)}
    with pytest.raises(ExportError, match=r"w is on PyTorch's device meta, which holds no numbers; expected a tensor"):
        from_tensors(tensors, like)
    made, taken = from_tensors(tensors, {"b": like["b"]}, partial=True)
    assert made["b"].all() and taken.left == ("w",)


def test_tensors_of_pytorch_in_any_layout_are_read_and_the_others_named():
    torch = pytest.importorskip("torch")
    like, numbers = {"w": jnp.zeros((2, 3))}, np.arange(6, dtype=np.float32).reshape(2, 3)
    whole = torch.from_numpy(numbers)
    for tensor in (whole.T.contiguous().T, torch.stack([whole, whole], 1)[:, 1], whole.repeat(1, 2)[:, :3]):
        assert_same_bits(from_tensors({"w": tensor}, like), {"w": jnp.asarray(numbers)})
    assert_same_bits(from_tensors({"w": whole[:1].expand(2, 3)}, like), {"w": jnp.asarray(numbers[[0, 0]])})
    for tensor, remedy in ((whole.to_sparse(), "to_dense"), (whole.to("meta"), "load the module's weights first")):
        with pytest.raises(ExportError, match=rf"^w is .*{remedy}"):
            from_tensors({"w": tensor}, like)


def test_tables_under_two_names_must_agree():
    case = CASES["language model"]
    tree, names = parts_of(case, np.float32)
    tensors = to_tensors(tree, names)
    with pytest.raises(ExportError, match=r"head.weight and embedding.weight differ; expected one tensor under both"):
        from_tensors({**tensors, "head.weight": tensors["head.weight"] + 1}, tree, names)


DENSE = {"dense_0": {"w": jnp.zeros((6, 2)), "b": jnp.zeros(2)}}


def test_a_gru_that_pytorch_does_not_have_is_refused():
    params, _ = fnet.init(gru(4, reset_after=False), jax.random.key(0), jnp.ones((1, 2, 3)))
    with pytest.raises(ExportError, match=r"expected those of .* gru\(reset_after=True\)"):
        torch_names({"gru": params}, {"gru": "*_l0"})


def test_layers_that_a_repeat_stacks_are_refused_and_taken_apart_fit():
    model = gpt(5, length=4, layers=2, features=4, heads=2, repeated=True)
    params, _ = fnet.init(model, jax.random.key(0), jnp.ones((1, 2), int))
    with pytest.raises(ExportError, match=r"blocks/mlp/wide/b stacks the layers of a repeat, \[2, 16\]; expected each"):
        torch_names(params, {"body/blocks/mlp/wide": "h.*"})
    one = params["body"]["blocks"].one(1)["mlp"]["wide"]
    names = torch_names({"wide": one}, {"wide": "h.*"})
    np.testing.assert_array_equal(to_tensors({"wide": one}, names)["h.weight"], one["w"].T)


@pytest.mark.parametrize(
    ("layer", "shape", "given", "message"),
    [
        (
            conv(4, (3, 3)),
            (1, 5, 5, 2),
            Conv1D("c.*"),
            "l is given Conv1D and has the leaves b, w; expected those of a",
        ),
        (conv(4, (3, 3)), (1, 5, 5, 2), Flattened("c.*", 2), "l is given Flattened and has the leaves b, w; expected"),
        (
            dense(4),
            (1, 2),
            ConvTranspose("c.*"),
            "l is given ConvTranspose and has the leaves b, w; expected those of a",
        ),
        (lstm(4), (1, 2, 3), Conv1D("c.*"), "l is given Conv1D and has the leaves b, input/w, recurrent/w; expected"),
        (dense(4), (1, 6), Flattened("c.*", 0), "l has 6 features in; expected a multiple of 0 channels"),
        (
            dense(4),
            (1, 6),
            (Conv1D("c.*"),),
            "l is given (Conv1D(name='c.*'),); expected a name such as 'fc.*', a tuple",
        ),
        (dense(4), (1, 6), None, "l is given None; expected a name such as 'fc.*', a tuple of names, Flattened(name"),
        (attention(2, head_features=4), (1, 2, 6), "c.*", "l has weights of shapes (6, 8) inward and (8, 6) outward"),
        (
            attention(2, kv_heads=1),
            (1, 2, 6),
            "c.*",
            "l has inward projections of shapes [(6, 3), (6, 6)]; expected one",
        ),
    ],
)
def test_what_a_module_of_pytorch_cannot_be_is_refused(layer, shape, given, message):
    params, _ = fnet.init(layer, jax.random.key(0), jnp.ones(shape))
    with pytest.raises(ExportError, match=re.escape(f"torch_names: {message}")):
        torch_names({"l": params}, {"l": given})


def test_weights_named_without_their_layer_are_refused_since_they_would_not_be_turned():
    tree = {"fc": {"w": jnp.zeros((3, 3)), "b": jnp.zeros(3)}}
    with pytest.raises(ExportError, match=r"fc/w is named by itself; expected the path of its layer, .* turned: 'fc'"):
        torch_names(tree, {"fc/w": "fc.weight", "fc/b": "fc.bias"})
    assert to_tensors(tree, torch_names(tree, {"fc/w": Conv1D("fc.weight"), "fc/b": "fc.bias"})).keys() == {
        "fc.weight",
        "fc.bias",
    }


def test_tensors_of_one_name_map_are_new_each_time():
    tree, names = parts_of(CASES["normalization"], np.float32)
    to_tensors(tree, names)["1.num_batches_tracked"] += 1  # as a module does that holds it
    assert not to_tensors(tree, names)["1.num_batches_tracked"]


def test_one_name_for_two_layers_is_refused():
    tree = {"a": DENSE["dense_0"], "b": DENSE["dense_0"]}
    with pytest.raises(ExportError, match=r"the name 0.bias is given 2 times"):
        to_tensors(tree, torch_names(tree, {"a": "0.*", "b": "0.*"}))


# --- inference -------------------------------------------------------------------------------------------------------


@pytest.fixture
def flatbuffers():
    return pytest.importorskip("flatbuffers")


def small_convolution():
    return serial(conv(4, (3, 3)), batch_norm(), relu(), dropout(0.5), flatten(), dense(3))


MODELS = {
    "convolution": (small_convolution(), lambda b: np.ones((b, 4, 4, 2), np.float32)),
    "transformer": (
        gpt(9, length=6, layers=1, features=8, heads=2, repeated=True),
        lambda b: np.arange(b * 6, dtype=np.int32).reshape(b, 6) % 9,
    ),
    "recurrent": (
        recurrent_lm(9, lstm(8), features=8),
        lambda b: (np.arange(b * 4, dtype=np.int32).reshape(b, 4) % 9, None),
    ),
}


def made(model, x):
    params, state = fnet.init(model, jax.random.key(0), x)
    return random_like(params), state


@pytest.mark.parametrize(
    ("name", "any_batch"), [("convolution", False), ("convolution", True), ("transformer", True), ("recurrent", True)]
)
def test_exported_inference_gives_the_models_bits(name, any_batch, tmp_path, flatbuffers):
    model, inputs = MODELS[name]
    params, state = made(model, inputs(3))
    path = tmp_path / "model.inference"
    exported = export_inference(model, params, state, inputs(3), path, any_batch=any_batch)
    loaded = load_inference(path)
    assert exported.platforms == loaded.platforms == ("cpu",)
    assert ("[b," in loaded.inputs) == any_batch
    assert [file.name for file in tmp_path.iterdir()] == ["model.inference"]
    assert_same_bits(loaded(inputs(3)), compiled(model)(params, state, inputs(3)))
    if any_batch:
        expected = compiled(model)(params, state, inputs(5))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), loaded(inputs(5)), expected)
    else:
        with pytest.raises(ExportError, match=r"model.inference takes .*\[3,.*found .*\[5, "):
            loaded(inputs(5))


def test_carries_go_in_and_come_out(tmp_path, flatbuffers):
    model, inputs = MODELS["recurrent"]
    params, state = made(model, inputs(2))
    _, carry = compiled(model)(params, state, inputs(2))
    x = inputs(2)[0], carry
    export_inference(model, params, state, x, tmp_path / "a")
    logits, after = load_inference(tmp_path / "a")(x)
    assert type(after[0]) is type(carry[0])
    assert_same_bits((logits, after), compiled(model)(params, state, x))


def test_inference_runs_in_a_process_that_knows_no_model(tmp_path, flatbuffers):
    model, inputs = MODELS["convolution"]
    params, state = made(model, inputs(3))
    export_inference(model, params, state, inputs(3), tmp_path / "a")
    code = (
        "import sys, numpy as np; from fnet.export import load_inference\n"
        f"y = load_inference({str(tmp_path / 'a')!r})(np.ones((3, 4, 4, 2), np.float32))\n"
        "sys.stdout.write(np.asarray(y).tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    expected = compiled(model)(params, state, inputs(3))
    assert done.stdout == np.asarray(expected).tobytes().hex()


def test_weights_of_an_inference_stand_in_it_under_their_paths(tmp_path, flatbuffers):
    model = serial(*((name, dense(2)) for name in ("d", "d-x", "d_x")))  # in the order of names d-x/w is before d/w
    x = np.ones((1, 2), np.float32)
    params, state = made(model, x)
    export_inference(model, params, state, x, tmp_path / "a")
    from safetensors.numpy import load_file

    stored = load_file(tmp_path / "a")
    np.testing.assert_array_equal(stored["params/d-x/w"], params["d-x"]["w"])
    assert stored.keys() == {"program", *(f"params/{name}/{leaf}" for name in params for leaf in "wb")}


def test_several_platforms_are_said_and_one_that_is_not_among_them_is_refused(tmp_path, flatbuffers, monkeypatch):
    model, x = dense(2), np.ones((1, 3), np.float32)
    params, state = made(model, x)
    both = export_inference(model, params, state, x, tmp_path / "both", platforms=("cpu", "tpu"))
    assert both.platforms == ("cpu", "tpu") and both.inputs == "float32[1,3]"
    assert export_inference(model, params, state, x, tmp_path / "one", platforms="cpu").platforms == ("cpu",)
    with pytest.raises(ExportError, match="platforms are cpu, gpu; expected cpu, cuda, rocm, tpu, not gpu"):
        export_inference(model, params, state, x, tmp_path / "gpu", platforms=("cpu", "gpu"))
    assert not (tmp_path / "gpu").exists()
    with pytest.raises(ExportError, match="platforms are tpu; expected cpu among them, where it is checked"):
        export_inference(model, params, state, x, tmp_path / "tpu", platforms=("tpu",))
    monkeypatch.setattr(jax.export, "default_export_platform", lambda: "rocm")
    with pytest.raises(ExportError, match=r"both is for cpu, tpu; expected rocm.*platforms=\('cpu', 'tpu', 'rocm'\)"):
        load_inference(tmp_path / "both")


def test_an_inference_of_64_bits_asks_for_them(tmp_path, flatbuffers):
    model, x = dense(2), np.ones((1, 3))
    with jax.enable_x64(True):
        params, state = fnet.init(model, jax.random.key(0), x)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        export_inference(model, params, state, x, tmp_path / "a")
        assert load_inference(tmp_path / "a")(x).dtype == jnp.float64
    with pytest.raises(
        ExportError, match=r"a was exported with 64 bits \(float64\[.*; .*'jax_enable_x64', True\) first"
    ):
        load_inference(tmp_path / "a")


def test_a_model_that_looks_at_the_size_of_its_batch_is_refused_for_any_batch(tmp_path, flatbuffers):
    layer = stateless(
        "few", lambda key, x: (), lambda p, x: (x * 2 if x.shape[0] > 4 else x, ()), lambda p, r, dy: ((), dy)
    )
    x = np.ones((3, 2), np.float32)
    with pytest.raises(ExportError, match=r"few cannot be exported \(.*\); with any_batch=False it is for inputs of"):
        export_inference(layer, (), (), x, tmp_path / "a", any_batch=True)
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(export_inference(layer, (), (), x, tmp_path / "a")(x), x)


def test_bits_that_differ_leave_no_file(tmp_path, flatbuffers, monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr(export_module, "apply", lambda *a: fnet.apply(*a) + next(calls) * 1e-6)
    model, x = dense(2), np.ones((1, 3), np.float32)
    with pytest.raises(
        ExportError, match=r"dense: what was read back from .* gives other bits than its compiled forward"
    ):
        export_inference(model, *made(model, x), x, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_inference_that_was_altered_or_is_none_is_refused(tmp_path, flatbuffers):
    model, x = dense(2), np.ones((1, 3), np.float32)
    params, state = made(model, x)
    path = tmp_path / "a"
    export_inference(model, params, state, x, path)
    with pytest.raises(ExportError, match="a exists already and is left as it is"):
        export_inference(model, params, state, x, path)
    whole = bytearray(path.read_bytes())
    for place in (-1, -len(whole) // 2):
        path.write_bytes(bytes(whole[:place]) + bytes([whole[place] ^ 1]) + bytes(whole[place:][1:]))
        with pytest.raises(ExportError, match=r"a is not what was written: expected SHA-256 \w+…, found \w+…"):
            load_inference(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ExportError, match=r"a cannot be read \(.*\); expected a whole safetensors file"):
        load_inference(path)
    save_weights(tmp_path / "weights", params)
    with pytest.raises(
        ExportError, match=r"weights holds b, w and has format None; expected format 1: give a file that"
    ):
        load_inference(tmp_path / "weights")


def test_libraries_that_are_missing_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=re.escape("flatbuffers: pip install 'fnet-jax[runs]'")):
        load_inference(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=re.escape("safetensors: pip install 'fnet-jax[runs]'")):
        load_weights(tmp_path / "a", {})
