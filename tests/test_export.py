"""Weights in files and under PyTorch's names, and inference without the model: by numbers, and what is refused.

PyTorch's formulas are written out in NumPy; where PyTorch is installed it computes them itself too.
"""

from __future__ import annotations

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

import fnet
import fnet.export as export_module
from fnet.export import (
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
from fnet.layers import batch_norm, bidirectional, conv, dense, dropout, flatten, gru, lstm, relu, rnn, serial
from fnet.models import gpt, lenet5, recurrent_lm
from fnet.types import stateless
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


def conv2d(s, name, x, padding):  # x (B, C, H, W), W (O, C, kH, kW); cross-correlation
    w, b = s[f"{name}.weight"], s[f"{name}.bias"]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    rows, columns = (x.shape[i] - w.shape[i] + 1 for i in (2, 3))
    y = np.empty((len(x), len(w), rows, columns))
    for i, j in itertools.product(range(rows), range(columns)):
        window = x[:, None, :, i : i + w.shape[2], j : j + w.shape[3]]
        y[:, :, i, j] = (window * w[None]).sum((2, 3, 4)) + b
    return y


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


def mlp_in_torch(s, x):
    return linear(s, "2", np.maximum(linear(s, "0", x), 0))


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


class Case(NamedTuple):
    """A model, inputs for it, PyTorch's names for its tree, and what PyTorch computes."""

    model: fnet.Layer
    shape: tuple[int, ...]
    modules: dict
    formula: Callable[[Mapping[str, np.ndarray], np.ndarray], np.ndarray]
    torch: Callable  # torch -> the module
    ids: int = 0  # the inputs are integers below this


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


CASES = {
    "mlp": Case(
        fnet.mlp(7, 4),
        (5, 3),
        {"params/dense_0": "0.*", "params/dense_1": "2.*"},
        mlp_in_torch,
        lambda torch: torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.ReLU(), torch.nn.Linear(7, 4)),
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
    ),
    "both directions": Case(
        bidirectional(lstm(4)),
        (3, 5, 2),
        {"params/forward": "*_l0", "params/backward": "*_l0_reverse"},
        two_ways_in_torch,
        lambda torch: torch.nn.LSTM(2, 4, batch_first=True, bidirectional=True),
    ),
    "gru": Case(
        gru(4),
        (3, 5, 2),
        {"params": "*_l0"},
        lambda s, x: gru_formula(s, "l0", x),
        lambda torch: torch.nn.GRU(2, 4, batch_first=True),
    ),
    "rnn": Case(
        rnn(4),
        (3, 5, 2),
        {"params": "*_l0"},
        lambda s, x: rnn_formula(s, "l0", x),
        lambda torch: torch.nn.RNN(2, 4, batch_first=True),
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
    tree = jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    for child in tree["state"].values() if isinstance(tree["state"], dict) else ():
        if "var" in child:
            child["var"] = abs(child["var"])
    return tree, torch_names(tree, case.modules)


def forward(case, tree, x):
    return np.asarray(fnet.apply(case.model, tree["params"], tree["state"], jnp.asarray(x)))


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
    foreign |= {"head.weight": foreign["embedding.weight"]} if "head.weight" in foreign else {}
    taken = from_tensors(foreign, tree, names)
    np.testing.assert_allclose(forward(case, taken, x), case.formula(foreign, x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_pytorch_computes_the_same_with_the_weights_of_a_file_and_back(name, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    case = CASES[name]
    tree, names = parts_of(case, np.float32)
    x = inputs_of(case, np.float32)
    given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x)

    def outputs(module):
        with torch.no_grad():
            y = module.eval()(given)
        return (y[0] if isinstance(y, tuple) else y).numpy()

    there = tmp_path / "there.safetensors"
    save_weights(there, tree, names)
    module = case.torch(torch)
    module.load_state_dict(load_file(there), strict=True)
    # sums of some 400 products in float32, in another order
    np.testing.assert_allclose(outputs(module), forward(case, tree, x), rtol=1e-4, atol=1e-5)

    torch.manual_seed(0)
    module, back = case.torch(torch), tmp_path / "back.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in module.state_dict().items()}, back)
    taken = load_weights(back, tree, names)
    np.testing.assert_allclose(forward(case, taken, x), outputs(module), rtol=1e-4, atol=1e-5)
    again = tmp_path / "again.safetensors"
    save_weights(again, taken, names)
    module.load_state_dict(load_file(again), strict=True)
    np.testing.assert_allclose(outputs(module), forward(case, taken, x), rtol=1e-4, atol=1e-5)


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


def compiled(model, params, state, x):
    return jax.jit(lambda params, state, x: fnet.apply(model, params, state, x))(params, state, x)


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
    assert_same_bits(loaded(inputs(3)), compiled(model, params, state, inputs(3)))
    if any_batch:
        expected = compiled(model, params, state, inputs(5))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), loaded(inputs(5)), expected)
    else:
        with pytest.raises(ExportError, match=r"model.inference takes .*\[3,.*found .*\[5, "):
            loaded(inputs(5))


def test_carries_go_in_and_come_out(tmp_path, flatbuffers):
    model, inputs = MODELS["recurrent"]
    params, state = made(model, inputs(2))
    _, carry = compiled(model, params, state, inputs(2))
    x = inputs(2)[0], carry
    export_inference(model, params, state, x, tmp_path / "a")
    logits, after = load_inference(tmp_path / "a")(x)
    assert type(after[0]) is type(carry[0])
    assert_same_bits((logits, after), compiled(model, params, state, x))


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
    expected = compiled(model, params, state, inputs(3))
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
