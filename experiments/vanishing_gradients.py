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

Recurrent networks: the same factor, over time. From a sequence's end the gradient goes back to step t as g^(T − t),
where g scales the recurrent weights. An Elman network with relu that begins as the identity (Le et al.,
arXiv:1504.00941) learns the adding problem (Hochreiter and Schmidhuber, 1997): the sum of the two of T numbers that are
marked. Predicting the mean costs 1/6. Unclipped, single gradients throw it far off; clipping their global norm (Pascanu
et al., arXiv:1211.5063) is the cure. The norm's limit is data, and infinity is no clipping: one program trains both.

Legend: L depth, B examples, n units, T time steps; W weights, z what enters an activation a, h what leaves it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import Amount, Amounts, ByEngine, Count, Counts, InFolder, Positive, Seeds, engine_of
from fnet.core.numerics import stream
from fnet.layers import batch_norm, dense, relu, repeat, residual, rnn, serial, sigmoid, stateless, tanh
from fnet.layers.initializers import glorot_normal, he_normal, normal, orthogonal
from fnet.metrics import accuracy, gradient_norms
from fnet.optimizers.transforms import clip_by_global_norm
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure
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


METHODS = tuple(title(structure, start) for structure, starts in CURES.items() for start in starts)


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
    splits = [fnet.split(digits, sizes, stream(jax.random.key(seed), "split")) for seed in config.seeds]
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *part) for part in zip(*splits, strict=True)]
    return dict(zip(("train", "test"), stacked, strict=True))


# --- recurrent networks ----------------------------------------------------------------------------------------------


def last() -> Layer:
    """The last step of a sequence: ``x (B, T, n)`` to ``y (B, n)``."""

    def backward(params, carrier, dy):  # y = x_T:  dx_T = dy, and 0 at every other step
        return (), jnp.zeros(carrier.shape[1:], dy.dtype).at[:, -1].set(dy)

    def forward(params, x):  # the residual is an empty array that carries the shape
        return x[:, -1], jnp.zeros((0, *x.shape), x.dtype)

    return stateless("last", lambda key, x: (), forward, backward)


def scaled_identity(gain) -> Callable:
    """The recurrent weights ``gain · 1``."""
    return lambda key, shape, dtype: gain * jnp.eye(*shape, dtype=dtype)


def make_recurrent(config: Config, gain=1.0) -> Layer:
    """An Elman network with relu that begins as ``gain`` times the identity, and the sum read off its last step."""
    hidden = rnn(config.recurrent_units, relu(), weights=normal(0.1), recurrent=scaled_identity(gain))
    return serial(hidden, last(), dense(1, weights=glorot_normal()))


def adding_problem(key, n: int, length: int) -> fnet.Batch:
    """Sequences ``(n, T, 2)`` of numbers in 0..1 and marks, one in each half, and the sums ``(n, 1)`` of the marked."""
    numbers = jax.random.uniform(stream(key, "numbers"), (n, length))
    half = length // 2
    places = [
        jax.random.randint(stream(key, "first"), (n,), 0, half),
        jax.random.randint(stream(key, "second"), (n,), half, length),
    ]
    marks = sum(jax.nn.one_hot(place, length) for place in places)
    return fnet.Batch(jnp.stack([numbers, marks], -1), (numbers * marks).sum(1, keepdims=True))


def time_norms(config: Config, batch: fnet.Batch, key) -> dict[float, np.ndarray]:
    """By gain: the norm ``(T,)`` of the loss' gradient by the inputs of each step, before any training, by hand."""
    found = {}
    for gain in config.gains:
        model = make_recurrent(config, gain)
        params, state = model.init(key, batch.inputs)
        engine = fnet.backprop(model, fnet.losses.squared_error, inputs=True)
        (_, dx), _, _ = jax.jit(engine)(params, state, batch, key)
        found[gain] = np.sqrt((np.asarray(dx) ** 2).sum((0, 2)))
    return found


def train_recurrent(config: Config) -> dict:
    """Every rate, limit (none, then the config's) and seed in one program: loss and gradient norm of each update."""
    loss = fnet.losses.squared_error

    def member(rate, limit, key):
        model, data = make_recurrent(config), adding_problem(stream(key, "data"), config.sequences, config.length)
        params, state = model.init(stream(key, "model"), data.inputs)
        optimizer = fnet.chain(clip_by_global_norm(limit), fnet.sgd(rate))
        ts = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
        whole_norm = {"gradient_norm": lambda grads: gradient_norms(grads)["all"]}  # before it is clipped
        step = fnet.make_step(engine_of(config)(model, loss), optimizer, whole_norm)
        _, metrics, _ = fnet.train(step, ts, data, epochs=config.recurrent_epochs, batch_size=config.batch_size)
        return {name: metrics[name].value for name in ("loss", "gradient_norm")}  # (E, updates an epoch)

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
                        start[activation, title(structure, name), depth] = one
                trained = train_deep(config, structure, activation, parts)
                for i, name in enumerate(starts):
                    one = {what: values[i] for what, values in trained.items()}
                    deep[activation, title(structure, name)] = {**one, "best": best_rate(one["loss"])}
    with console.status("recurrent networks"):
        key = jax.random.key(config.seeds[0])
        by_time = time_norms(config, adding_problem(stream(key, "data"), config.batch_size, config.length), key)
        recurrent = train_recurrent(config)

    results = {"start": start, "deep": deep, "by_time": by_time, "recurrent": recurrent, "folder": folder}
    report(config, results, console)
    draw_deep(config, results, folder / "depth.png")
    draw_recurrent(config, results, folder / "recurrent.png")
    (folder / "results.json").write_text(json.dumps(summary(config, results), indent=2) + "\n")
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


def ends(config: Config, recurrent: dict, limit: int) -> np.ndarray:
    """The mean loss of the last epoch ``(rates, seeds)``; ``limit`` is 0 without clipping and 1 with it."""
    return recurrent["loss"][:, limit, :, -1].mean(-1)


def summary(config: Config, results: dict) -> dict:
    """The numbers of the tables, for results.json; not a number is None."""

    def spread(values):
        return [float(v) if np.isfinite(v) else None for v in (np.mean(values), np.std(values))]

    start = {
        f"{activation}, {method}, depth {depth}": {
            "factor": spread(factor(found["delta"])),
            "first over last": spread(found["delta"][:, 0] / found["delta"][:, -1]),
            "autodiff apart": float(found["apart"].max()),
        }
        for (activation, method, depth), found in results["start"].items()
    }
    deep = {
        f"{activation}, {method}": {
            "training loss": spread(found["loss"][:, found["best"], -1]),
            "test accuracy": spread(found["accuracy"][:, found["best"]]),
            "rate": config.rates[found["best"]],
        }
        for (activation, method), found in results["deep"].items()
    }
    recurrent = {
        name: {
            f"rate {rate:g}": {
                "training loss": spread(ends(config, results["recurrent"], i)[j]),
                "greatest norm": spread(results["recurrent"]["gradient_norm"][j, i].max((1, 2))),
            }
            for j, rate in enumerate(config.recurrent_rates)
        }
        for i, name in enumerate(("no clipping", "clipping"))
    }
    return {"start": start, "deep": deep, "recurrent": recurrent}


def report(config: Config, results: dict, console: Console) -> None:
    """The tables, and the numbers to reach beside those reached."""
    start = results["start"]
    depth, numbers = max(config.depths), summary(config, results)

    def cell(values, form=".3f"):
        mean, std = values
        return "diverged" if mean is None else f"{mean:{form}} ± {std:{form}}"

    rows = {
        method: {a: cell(numbers["start"][f"{a}, {method}, depth {depth}"]["factor"]) for a in ACTIVATIONS}
        for method in METHODS
    }
    console.print(engine_table(f"at the start: |δ| is multiplied by this at each layer down, depth {depth}", rows))
    rows = {
        f"{method}, depth {d}": {
            a: f"{np.exp(np.log(ratio).mean()):.1e}"
            for a in ACTIVATIONS
            for ratio in [start[a, method, d]["delta"][:, 0] / start[a, method, d]["delta"][:, -1]]
        }
        for method in METHODS
        for d in config.depths
    }
    console.print(engine_table("at the start: |δ₁| / |δ_L|, geometric mean of the seeds", rows))
    rows = {
        method: {
            a: f"{cell(found['training loss'])}  rate {found['rate']:g}  {found['test accuracy'][0] or 0:.1%}"
            for a in ACTIVATIONS
            for found in [numbers["deep"][f"{a}, {method}"]]
        }
        for method in METHODS
    }
    console.print(
        engine_table(
            f"depth {config.train_depth}, {config.epochs} epochs: training loss (chance: {math.log(10):.3f}), its best "
            "rate, test accuracy",
            rows,
        )
    )
    rows = {
        f"{name}, {rate}": {what: cell(found[what], ".4g") for what in found}
        for name, by_rate in numbers["recurrent"].items()
        for rate, found in by_rate.items()
    }
    console.print(engine_table(f"adding problem, {config.length} numbers (the mean's loss: {1 / 6:.4f})", rows))
    apart = max(found["apart"].max() for found in start.values())
    expected = {config.small: "naive, small", config.large: "naive, large"}
    theory = ", ".join(
        f"{factor(start['relu', method, depth]['delta']).mean():.3f} (expected {s * math.sqrt(config.units / 2):.3f})"
        for s, method in expected.items()
    )
    end = {
        name: min(found["training loss"][0] or math.inf for found in by_rate.values())
        for name, by_rate in numbers["recurrent"].items()
    }
    console.print(
        f"backward by hand and autodiff, every layer of {len(start)} networks: at most {apart:.0e} apart "
        f"(must be below 1e-9)\nfactor of relu with naive weights: {theory}\nadding problem at the best rate: "
        f"{end['clipping']:.4f} with clipping (must be below 1/6), {end['no clipping']:.4f} without",
        highlight=False,
    )


def draw_deep(config: Config, results: dict, path: Path) -> None:
    """A column for each activation: |δ_l| at the start, the training loss, and |∂loss/∂W_l| after training."""
    figure, axes = new_figure(3, rows=3, height=3.5, width=5.0)
    depth = max(config.depths)
    for column, activation in enumerate(ACTIVATIONS):
        top, middle, bottom = axes[:, column]
        for i, method in enumerate(METHODS):
            delta = results["start"][activation, method, depth]["delta"]  # (seeds, L)
            found = results["deep"][activation, method]
            losses, weights = found["loss"][:, found["best"]].mean(0), found["weights"][:, found["best"]]
            style = {"color": f"C{i}", "label": method, "linewidth": 1.6}
            top.plot(np.arange(1, depth + 1), np.exp(np.log(delta).mean(0)), **style)
            middle.plot(np.arange(1, config.epochs + 1), np.where(np.isfinite(losses), losses, np.nan), **style)
            with np.errstate(all="ignore"):  # where a run diverged, or float32 ended, nothing is drawn
                mean = np.exp(np.log(weights.astype(np.float64)).mean(0))
            bottom.plot(
                np.arange(1, config.train_depth + 1), np.where(np.isfinite(mean) & (mean > 0), mean, np.nan), **style
            )
        top.set(title=f"{activation}: |δ| at the start, depth {depth}", xlabel="layer", yscale="log")
        middle.set(title=f"training loss, depth {config.train_depth}", xlabel="epoch", ylim=(0, 3))
        middle.axhline(math.log(10), color="gray", linestyle=":", linewidth=1)
        bottom.set(title="|∂loss/∂W| after training", xlabel="layer", yscale="log")
        for ax in (top, bottom):
            low, high = ax.get_ylim()
            ax.set_ylim(max(low, 1e-40), high)
    for ax in axes.ravel():
        ax.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    save_figure(figure, path)


def draw_recurrent(config: Config, results: dict, path: Path) -> None:
    """The gradient back through time at the start, and of all rates, with and without clipping, loss and norm."""
    figure, (left, middle, right) = new_figure(3, height=4.2)
    for gain, size in results["by_time"].items():
        left.plot(np.arange(1, config.length + 1), size / size[-1], label=f"g = {gain:g}")
    left.set(
        xlabel="time step t", ylabel="|∂loss/∂x_t| over that of the last step", yscale="log", title="before training"
    )
    curves = results["recurrent"]
    for j, rate in enumerate(config.recurrent_rates):
        for i, (name, style) in enumerate({"no clipping": "--", "clipped": "-"}.items()):
            loss = curves["loss"][j, i].mean(-1).T  # (E, seeds)
            size = curves["gradient_norm"][j, i].max(-1).T
            for ax, values in ((middle, loss), (right, size)):
                with np.errstate(all="ignore"):
                    values = np.exp(np.log(values.astype(np.float64)).mean(1))
                values = np.where(np.isfinite(values), values, np.nan)
                epochs = np.arange(1, len(values) + 1)
                known = np.isfinite(values)
                label = f"{name}, rate {rate:g}" + ("" if known.all() else ": diverged")
                ax.plot(epochs, values, style, color=f"C{j}", label=label)
                if not known.all() and known.any():
                    ax.plot(epochs[known][-1], values[known][-1], "x", color=f"C{j}", markersize=8)
    middle.axhline(1 / 6, color="gray", linestyle=":", linewidth=1)
    right.axhline(config.limit, color="gray", linestyle=":", linewidth=1)
    middle.set(xlabel="epoch", ylabel="training loss (dotted: the mean's)", yscale="log", title="adding problem")
    right.set(
        xlabel="epoch", ylabel="greatest norm (dotted: the limit)", yscale="log", title="gradient before clipping"
    )
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    for ax in (left, middle):
        ax.legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
