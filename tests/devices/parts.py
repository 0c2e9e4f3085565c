"""Small models with data, their runs on a mesh and on one device, and how far these are apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import fnet
from fnet import layers, models
from fnet.core.placement import TRANSFORMER, Placement
from fnet.core.trees import named_leaves
from fnet.runs import compilation

N, B = 48, 16
MESHES = {
    "dp8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "dp2 fsdp4": {"data": 2, "fsdp": 4},
    "fsdp2 tp4": {"fsdp": 2, "tensor": 4},
    "dp2 tp4": {"data": 2, "tensor": 4},
}


def on(mesh: str | None) -> Placement | None:
    """The placement of that mesh; leaves are split however small they are."""
    if mesh is None:
        return None
    rules = {**TRANSFORMER, "*table": PartitionSpec(None, "tensor")} if "tp" in mesh else None
    return fnet.placement(fnet.mesh(**MESHES[mesh]), rules, least=64)


class Case(NamedTuple):
    make: Callable[[], fnet.Layer]
    inputs: np.ndarray
    targets: np.ndarray


_rng = np.random.default_rng(0)
_labels = _rng.integers(0, 10, N)
_rows, _steps = _rng.standard_normal((N, 32)), _rng.standard_normal((N, 12, 8))
_images, _ids = _rng.standard_normal((N, 28, 28, 1)), _rng.integers(0, 48, (N, 16))


def recurrent(layer: fnet.Layer) -> fnet.Layer:
    return fnet.serial(layer, layers.global_avg_pool(), fnet.dense(10))


def gpt(**options) -> fnet.Layer:
    return models.gpt(48, length=16, layers=2, features=32, heads=4, **options)


CASES = {
    "mlp": Case(lambda: fnet.mlp(64, 64, 10, activation=layers.relu()), _rows, _labels),
    "dropout": Case(
        lambda: fnet.serial(fnet.dense(64), layers.relu(), layers.dropout(0.3), fnet.dense(10)), _rows, _labels
    ),
    "lstm": Case(lambda: recurrent(layers.lstm(32)), _steps, _labels),
    "gru": Case(lambda: recurrent(layers.gru(32)), _steps, _labels),
    "gru, reset before": Case(lambda: recurrent(layers.gru(32, reset_after=False)), _steps, _labels),
    "autoencoder": Case(lambda: models.autoencoder(32, 64, 8, activation=layers.tanh()), _rows, _rows),
    "lenet5": Case(lambda: models.lenet5(10), _images, _labels),
    "resnet": Case(lambda: models.resnet(10, blocks=(1, 1), width=8), _images[:, :12, :12], _labels),
    "resnet, by XLA": Case(
        lambda: fnet.serial(
            *(layers.conv(8, (3, 3), bias=None, form="xla"), layers.batch_norm(), layers.relu()),
            layers.residual(layers.conv(8, (3, 3), bias=None, form="xla"), layers.batch_norm(), layers.relu()),
            *(layers.max_pool((2, 2)), layers.global_avg_pool(), fnet.dense(10)),
        ),
        _images[:, :12, :12],
        _labels,
    ),
    "vit": Case(
        lambda: models.vit(10, patch=4, layers=2, features=32, heads=4, positions=9), _images[:, :12, :12], _labels
    ),
    "gpt": Case(gpt, _ids, np.roll(_ids, -1, 1)),
    "gpt, repeated, dropout": Case(lambda: gpt(repeated=True, dropout_rate=0.1), _ids, np.roll(_ids, -1, 1)),
    "gpt, blockwise": Case(lambda: gpt(block_size=8), _ids, np.roll(_ids, -1, 1)),
}


class Ran(NamedTuple):
    ts: fnet.TrainState
    history: fnet.History
    work: float  # operations of a device, by the compiler's own figure
    text: str  # the program


def start(
    case: Case, optimizer: fnet.Optimizer, placement: Placement | None = None
) -> tuple[fnet.Layer, fnet.TrainState]:
    """The model and the first state, in float64."""
    model = case.make()
    params, state = fnet.init(model, jax.random.key(0), jnp.asarray(case.inputs[:2]), placement)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    return model, fnet.init_train_state(params, optimizer, jax.random.key(1), state, placement)


def loss_of(name: str) -> fnet.Loss:
    return fnet.losses.squared_error if name == "autoencoder" else fnet.softmax_cross_entropy


def run(
    name: str,
    mesh: str | None = None,
    *,
    engine=fnet.backprop,
    optimizer: fnet.Optimizer | None = None,
    data: Any = None,
    **options,
) -> Ran:
    """Two epochs of the case, evaluated on its own data."""
    case, placement, optimizer = CASES[name], on(mesh), optimizer or fnet.adam(0.01)
    model, ts = start(case, optimizer, placement)
    own = fnet.Batch(jnp.asarray(case.inputs), jnp.asarray(case.targets))
    evaluate = fnet.make_evaluate(model, loss_of(name))
    options = {"epochs": 2, "batch_size": B, "evaluate": evaluate, "validation": own, **options}
    step = fnet.make_step(engine(model, loss_of(name)), optimizer)
    ts, history = fnet.fit(step, ts, own if data is None else data, placement=placement, **options)
    program = [*compilation._kept.values()][-1].program
    return Ran(ts, history, program.cost_analysis().get("flops", 0.0), program.as_text())


def apart(one: fnet.TrainState, several: fnet.TrainState) -> float:
    """The largest difference of a parameter or a state, of the largest number of its leaf or 0.01.

    The keys' biases have no gradient but roundings, which Adam makes large: they are no part of it.
    """
    largest = 0.0
    for path, leaf in named_leaves((one.params, one.state)):
        other = dict(named_leaves((several.params, several.state)))[path]
        a, b = np.asarray(leaf, np.float64), np.asarray(other, np.float64)
        if not path.endswith("key/b"):
            largest = max(largest, np.abs(a - b).max() / max(np.abs(a).max(), 0.01))
    return float(largest)


def assert_same_run(one: Ran, several: Ran, tolerance: float = 1e-10) -> None:
    """The parameters, the states and all that was measured."""
    assert int(one.ts.step) == int(several.ts.step)
    assert apart(one.ts, several.ts) <= tolerance
    for kind in ("epochs", "evaluations"):
        a, b = getattr(one.history, kind), getattr(several.history, kind)
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=tolerance, atol=tolerance, err_msg=f"{kind} {name}")
