"""Vanishing and exploding gradients, each shown and then cured, in numbers (the source texts, S11).

    python -m experiments.vanishing_gradients
    python -m experiments.vanishing_gradients --depths 2 5 10 20 50 --train-depth 50
    python -m experiments.vanishing_gradients --length 60 --recurrent-epochs 50

Deep networks, on the 8x8 digits. A network of depth L is a dense layer, L − 1 blocks and a dense head; a block is an
activation and a dense layer, so δ_l = ∂loss/∂z_l, the gradient by what enters the activation of layer l, goes from one
layer to the one below by δ_{l−1} = (δ_l W_lᵀ) ∘ a'(z_{l−1}): depth multiplies factors. The table shows the factor, the
L − 1st root of |δ_1| / |δ_L|. It is measured at the start in float64 (float32 ends at 1e-38), by the backward by hand
and by autodiff, for the same network with naive weights and with each cure alone:

- initialisation: Glorot's (relu: He's), and orthogonal matrices; both scaled by the inverse of the activation's slope;
- batch normalisation before each activation, and residual connections around each block, with the small naive weights.

For relu and independent weights of standard deviation s in layers of n units the factor expected is s √(n / 2).
Then all of them train, by plain gradient descent at every rate in one vmapped program each.

Recurrent networks: the same factor, over time, on the adding problem, and clipping as its cure; they are in
`adding_problem`.

Legend: L depth, B examples, n units, T time steps; W weights, z what enters an activation a, h what leaves it.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.adding_problem import adding_problem, time_norms, train_member
from experiments.common import main, new_run_folder, open_console, say_written, split_by_seed, write_results
from experiments.options import Amount, Amounts, ByEngine, Count, Counts, InFolder, Positive, Seeds, engine_of
from experiments.pictures.vanishing_gradients import (
    draw_deep,
    draw_recurrent,
    print_reached,
    print_start,
    print_trained,
    summary,
)
from fnet.core.numerics import stream
from fnet.layers import batch_norm, dense, relu, repeat, residual, serial, sigmoid, stateless, tanh
from fnet.layers.initializers import glorot_normal, he_normal, normal, orthogonal
from fnet.metrics import accuracy
from fnet.types import Layer, Mean


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Gradients in deep and in recurrent networks: vanishing, exploding, cured."""

    depths: Counts = (2, 50)  # hidden layers
    train_depth: Count = 20  # of the networks that train
    units: Count = 32  # of every hidden layer
    small: Amount = 0.05  # standard deviations of the naive weights
    large: Amount = 0.5
    epochs: Count = 10
    test_size: Count = 397  # of the 1,797 digits
    batch_size: Count = 32
    rates: Amounts = (0.01, 0.1)  # of gradient descent; the one of the lowest training loss is shown
    gains: Amounts = (0.8, 1.0, 1.2)  # of the recurrent weights, before training
    length: Count = 20  # T of the adding problem
    sequences: Count = 1024  # to train on
    recurrent_units: Count = 32
    recurrent_epochs: Count = 60
    recurrent_rates: Amounts = (0.001, 0.01, 0.03)
    limit: Positive = 1.0  # of the gradient's global norm
    seeds: Seeds = (0, 1, 2)  # of the split, the parameters and the order of the examples


# --- deep networks ---------------------------------------------------------------------------------------------------

ACTIVATIONS = {"sigmoid": sigmoid(), "tanh": tanh(), "relu": relu()}
SLOPES = {"sigmoid": 0.25, "tanh": 1.0, "relu": math.sqrt(0.5)}  # at 0; for relu the root of the mean square
CURES = {  # structure: the starts it is shown with
    "plain": ("small", "large", "scaled", "orthogonal"),
    "batch norm": ("small",),
    "residual": ("small",),
}


def title(structure: str, start: str) -> str:
    """What a network is called in tables and pictures."""
    names = {"small": "naive, small", "large": "naive, large", "scaled": "Glorot / He", "orthogonal": "orthogonal"}
    return names[start] if structure == "plain" else f"small + {structure}"


def initializers(config: Config, activation: str) -> dict:
    """The starts by name; gains undo the activation's slope."""
    gain = 1 / SLOPES[activation]
    glorot = glorot_normal()

    def scaled(key, shape, dtype):
        return gain * glorot(key, shape, dtype)

    return {
        "small": normal(config.small),
        "large": normal(config.large),
        "scaled": he_normal() if activation == "relu" else scaled,
        "orthogonal": orthogonal(gain),
    }


def probe() -> Layer:
    """``y = x + p`` with p = 0, a parameter of the shape of x: its gradient is the gradient by x, ready to be read."""

    def init(key, x):
        return jnp.zeros(x.shape, x.dtype)

    return stateless("probe", init, lambda p, x: (x + p, ()), lambda p, residuals, dy: (dy, dy))


def make_network(config: Config, structure: str, activation: str, depth: int, weights, probes: bool = False) -> Layer:
    """``depth`` hidden layers and a head of ten logits; blocks stand in a `repeat`, which stacks their parameters."""
    act = [ACTIVATIONS[activation]] if structure != "batch norm" else [batch_norm(), ACTIVATIONS[activation]]
    hidden = dense(config.units, weights=weights)
    block = residual(*act, hidden) if structure == "residual" else serial(*act, hidden)
    probed = [("probe", probe())] if probes else []
    blocks = repeat(serial(("block", block), *probed), depth - 1)
    return serial(("first", serial(hidden, *probed)), ("blocks", blocks), *act, ("head", dense(10, weights=weights)))


def draw_starts(config: Config, structure: str, activation: str, depth: int, x, keys, probes=False):
    """Parameters and state of every start and seed, ``(starts, seeds, ...)``; drawn by jax' own compiled pieces."""
    drawn = []
    for start in CURES[structure]:
        weights = initializers(config, activation)[start]
        model = make_network(config, structure, activation, depth, weights, probes)
        drawn.append(jax.vmap(lambda key, model=model: model.init(key, x))(keys))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)


def norms(grads) -> dict[str, jax.Array]:
    """``|∂loss/∂W_l|`` and, where there are probes, ``|δ_l|`` of each hidden layer, the first below: ``(L,)``."""
    first, blocks = grads["first"], grads["blocks"]
    leaves = {"weights": (first["dense_0"]["w"], blocks["block"]["dense_0"]["w"])}
    if "probe" in first:
        leaves["delta"] = first["probe"], blocks["probe"]
    return {
        name: jnp.sqrt(jnp.concatenate([(first**2).sum()[None], (rest**2).sum((1, 2))]))
        for name, (first, rest) in leaves.items()
    }


def start_norms(config: Config, structure: str, activation: str, depth: int, batch: fnet.Batch, keys) -> dict:
    """`norms` at the start, ``(starts, seeds, L)``, by hand; and ``apart``, autodiff's distance relative to them."""
    model = make_network(config, structure, activation, depth, normal(0.0), probes=True)
    params, state = draw_starts(config, structure, activation, depth, batch.inputs, keys, probes=True)

    def member(params, state, key, batch):
        loss = fnet.softmax_cross_entropy
        by_hand, by_autodiff = (
            engine(model, loss)(params, state, batch, key)[0] for engine in (fnet.backprop, fnet.autodiff)
        )
        size, error = norms(by_hand), norms(jax.tree.map(jnp.subtract, by_hand, by_autodiff))
        return {**size, "apart": jnp.maximum(*(error[name] / size[name] for name in size))}

    by_seed = jax.vmap(member, in_axes=(0, 0, 0, None))
    by_start = jax.vmap(by_seed, in_axes=(0, 0, None, None))
    return jax.device_get(jax.jit(by_start)(params, state, keys, batch))


def train_deep(config: Config, structure: str, activation: str, parts: dict) -> dict:
    """Every start, seed and rate ``(starts, seeds, rates, ...)`` in one program: the loss of each epoch, the test
    accuracy, and the weights' `norms` on the first batch at the end. ``parts`` hold each seed's split."""
    model, loss = (
        make_network(config, structure, activation, config.train_depth, normal(0.0)),
        fnet.softmax_cross_entropy,
    )
    keys = jax.vmap(jax.random.key)(jnp.array(config.seeds))
    batch = parts["train"].inputs[0, : config.batch_size]
    params, state = draw_starts(config, structure, activation, config.train_depth, batch, keys)

    def member(params, state, key, parts, rate):
        optimizer, gradient = fnet.sgd(rate), engine_of(config)(model, loss)
        ts = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
        step, data = fnet.make_step(gradient, optimizer), parts["train"]
        ts, metrics, _ = fnet.train(step, ts, data, epochs=config.epochs, batch_size=config.batch_size)
        grads, _, _ = gradient(ts.params, ts.state, jax.tree.map(lambda a: a[: config.batch_size], data), key)
        tested = fnet.make_evaluate(model, loss, {"accuracy": accuracy})(ts.params, ts.state, parts["test"])
        by_epoch = Mean(metrics["loss"].sum.sum(1), metrics["loss"].count.sum(1)).value
        return {"loss": by_epoch, "accuracy": tested["accuracy"].value, "weights": norms(grads)["weights"]}

    by_rate = jax.vmap(member, in_axes=(None, None, None, None, 0))
    by_seed = jax.vmap(by_rate, in_axes=(0, 0, 0, 0, None))
    by_start = jax.vmap(by_seed, in_axes=(0, 0, None, None, None))
    return jax.device_get(jax.jit(by_start)(params, state, keys, parts, jnp.array(config.rates)))


def best_rate(losses: np.ndarray) -> int:
    """The index of the rate whose last loss, of ``(seeds, rates, E)``, has the lowest mean; one not finite is last."""
    last = losses[..., -1].mean(0)
    return int(np.argmin(np.where(np.isfinite(last), last, np.inf)))


def load(config: Config) -> dict[str, fnet.Batch]:
    """Training and test digits of each seed's split, stacked: inputs ``(seeds, N, 64)``."""
    digits = fnet.data.sklearn_digits()
    sizes = (len(digits.targets) - config.test_size, config.test_size)
    return dict(zip(("train", "test"), split_by_seed(digits, sizes, config.seeds), strict=True))


# --- recurrent networks ----------------------------------------------------------------------------------------------


def train_recurrent(config: Config) -> dict:
    """Every rate, limit (none, then the config's) and seed in one program: loss and gradient norm of each update."""
    sizes = {"units": config.recurrent_units, "length": config.length, "sequences": config.sequences}
    member = partial(
        train_member, engine_of(config), **sizes, epochs=config.recurrent_epochs, batch_size=config.batch_size
    )
    by_seed = jax.vmap(member, in_axes=(None, None, 0))
    by_limit = jax.vmap(by_seed, in_axes=(None, 0, None))
    by_rate = jax.vmap(by_limit, in_axes=(0, None, None))
    keys = jax.vmap(jax.random.key)(jnp.array(config.seeds))
    limits = jnp.array([jnp.inf, config.limit])
    return jax.device_get(jax.jit(by_rate)(jnp.array(config.recurrent_rates), limits, keys))


# --- the run ---------------------------------------------------------------------------------------------------------


def run(config: Config, console: Console | None = None) -> dict:
    """Measure, train, print the tables, draw; returns what was measured."""
    check(config)
    console = open_console(config, console)
    folder = new_run_folder(config, "vanishing_gradients")
    parts, keys = load(config), jax.vmap(jax.random.key)(jnp.array(config.seeds))
    start, deep = {}, {}  # by (activation, method) and for the first also depth
    for activation in ACTIVATIONS:
        for structure, starts in CURES.items():
            with console.status(f"{activation}, {structure}"):
                for depth in config.depths:
                    with jax.enable_x64(True):
                        batch = fnet.Batch(*(a[0, : config.batch_size] for a in parts["train"][:2]))
                        batch = batch._replace(inputs=batch.inputs.astype(float))
                        measured = start_norms(config, structure, activation, depth, batch, keys)
                    for i, name in enumerate(starts):
                        one = {what: values[i] for what, values in measured.items()}
                        start[activation, title(structure, name), depth] = {**one, "factor": factor(one["delta"])}
                trained = train_deep(config, structure, activation, parts)
                for i, name in enumerate(starts):
                    one = {what: values[i] for what, values in trained.items()}
                    deep[activation, title(structure, name)] = {**one, "best": best_rate(one["loss"])}
    with console.status("recurrent networks"):
        key = jax.random.key(config.seeds[0])
        batch = adding_problem(stream(key, "data"), config.batch_size, config.length)
        by_time = time_norms(config.recurrent_units, config.gains, batch, key)
        recurrent = train_recurrent(config)

    results = {"start": start, "deep": deep, "by_time": by_time, "recurrent": recurrent, "folder": folder}
    numbers = summary(start, deep, recurrent, config.rates, config.recurrent_rates)
    expected = {title("plain", s): getattr(config, s) * math.sqrt(config.units / 2) for s in ("small", "large")}
    print_start(start, numbers, console)
    print_trained(deep, numbers, config.length, console)
    print_reached(start, numbers, expected, console)
    draw_deep(start, deep, folder / "depth.png")
    draw_recurrent(by_time, recurrent, config.recurrent_rates, config.limit, folder / "recurrent.png")
    write_results(folder, numbers)
    say_written(console, folder)
    return results


def check(config: Config) -> None:
    """Refuse depths and lengths that leave nothing to compare."""
    if min(*config.depths, config.train_depth) < 2:
        raise SystemExit(f"depths {config.depths} and {config.train_depth}: expected at least 2, to compare two layers")
    if config.length < 2:
        raise SystemExit(f"length = {config.length}: expected at least 2, one number to mark in each half")


def factor(delta: np.ndarray) -> np.ndarray:
    """By what |δ| is multiplied from a layer to the one below: (|δ_1| / |δ_L|)^(1 / (L − 1)), of ``(..., L)``."""
    return (delta[..., 0] / delta[..., -1]) ** (1 / (delta.shape[-1] - 1))


if __name__ == "__main__":
    main(run, Config)
