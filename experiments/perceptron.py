"""Rosenblatt's perceptron learns AND and OR and cannot learn XOR; a network with a hidden layer can (S12, S13).

    python -m experiments.perceptron
    python -m experiments.perceptron --hidden 2 --seed 1      two units suffice, but not from seed 0

Rosenblatt's rule (1958), one example at a time from zero weights: ``w += (y − ŷ) x``, ``b += y − ŷ`` with
``ŷ = step(w·x + b)``. A rate would only scale the weights. All numbers are whole, so float32 is exact, and weights that
come back to where an earlier epoch left them repeat the same epochs for ever.

The hidden layer has tanh units and is trained by full-batch gradient descent on binary cross-entropy, by hand and by
autodiff. With the step in place of tanh no gradient reaches it: the rule above is not gradient descent.

Legend: 4 examples, 2 features, E epochs.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import ENGINES, Amount, Count, InFolder, Seeded
from experiments.pictures.parts import legend_below
from fnet.layers import step, tanh
from fnet.losses import binary_cross_entropy, half_squared_error
from fnet.metrics import binary_accuracy, gradient_norms
from fnet.report.plots import new_figure, save_figure

POINTS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
TARGETS = {"AND": [0.0, 0.0, 0.0, 1.0], "OR": [0.0, 1.0, 1.0, 1.0], "XOR": [0.0, 1.0, 1.0, 0.0]}


@dataclasses.dataclass(frozen=True)
class Config(InFolder, Seeded):
    """Learn AND, OR and XOR by Rosenblatt's rule, and XOR by a hidden layer."""

    epochs: Count = 1000  # of Rosenblatt's rule
    hidden: Count = 6  # tanh units of the network that learns XOR
    learning_rate: Amount = 0.5  # its gradient descent's
    updates: Count = 2000  # its full-batch updates


def rosenblatt(targets, epochs: int):
    """Passes over the four points: ``(w1, w2, b)`` after every example ``(E, 4, 3)``, and where it erred ``(E, 4)``."""
    examples = jnp.concatenate([POINTS, jnp.ones((4, 1))], axis=1), targets

    def update(weights, example):
        x, y = example
        error = y - fnet.apply(step(), (), (), x @ weights)
        weights = weights + error * x
        return weights, (weights, error != 0)

    return jax.lax.scan(lambda weights, _: jax.lax.scan(update, weights, examples), jnp.zeros(3), length=epochs)[1]


def first_return(weights) -> tuple[int, int] | None:
    """The first epoch whose last weights an earlier one ended with, and that epoch; None if there is none."""
    seen = {}
    for epoch, row in enumerate(map(tuple, weights.tolist()), 1):
        if row in seen:
            return epoch, seen[row]
        seen[row] = epoch
    return None


def start(model: fnet.Layer, optimizer: fnet.Optimizer, config: Config) -> tuple[fnet.TrainState, fnet.Batch]:
    """The beginning of a run on XOR, and XOR as one batch."""
    data, key = fnet.Batch(jnp.asarray(POINTS), jnp.asarray(TARGETS["XOR"])[:, None]), jax.random.key(config.seed)
    params, state = fnet.init(model, key, data.inputs)
    return fnet.init_train_state(params, optimizer, key, state), data


def learn_xor(config: Config, model: fnet.Layer) -> dict[str, dict]:
    """Full-batch descent by each engine: its loss before each update, its last state, and which points are right."""
    optimizer, results = fnet.sgd(config.learning_rate), {}
    ts, data = start(model, optimizer, config)
    for engine, gradient in ENGINES.items():
        update = fnet.make_step(gradient(model, binary_cross_entropy), optimizer)
        run = jax.jit(partial(fnet.train, update, epochs=config.updates, batch_size=4, shuffle=False))
        end, metrics, _ = run(ts, data)
        right = binary_accuracy(fnet.apply(model, end.params, end.state, data.inputs), data.targets)
        results[engine] = {"loss": np.asarray(metrics["loss"].value)[:, 0], "end": end, "right": np.asarray(right)}
    return results


def step_gradients(config: Config) -> dict[str, dict[str, dict[str, float]]]:
    """The gradient's norm by network, engine and layer, with the step as the output and as the hidden units."""
    networks = {
        "2-1-step": (fnet.mlp(1, output=step()), half_squared_error),
        f"2-{config.hidden}-step-1": (fnet.mlp(config.hidden, 1, activation=step()), binary_cross_entropy),
    }
    norms = {}
    for name, (model, loss) in networks.items():
        ts, data = start(model, fnet.sgd(0), config)
        norms[name] = {}
        for engine, gradient in ENGINES.items():
            grads, _, _ = jax.jit(gradient(model, loss))(ts.params, ts.state, data, ts.key)
            norms[name][engine] = {layer: float(norm) for layer, norm in gradient_norms(grads).items()}
    return norms


def run(config: Config, console: Console | None = None) -> dict:
    """Learn, print what was learned and draw it; returns the numbers."""
    console = open_console(config, console)
    folder = new_run_folder(config, "perceptron")
    with console.status("learning"):
        learn = jax.jit(jax.vmap(partial(rosenblatt, epochs=config.epochs)))  # the three targets at once
        learned = map(np.asarray, learn(jnp.asarray(list(TARGETS.values()))))
        rule = {name: {"weights": w, "errors": e.sum(1)} for name, w, e in zip(TARGETS, *learned, strict=True)}
        model = fnet.mlp(config.hidden, 1, activation=tanh())
        hidden, norms = learn_xor(config, model), step_gradients(config)

    columns = ("", "errors by epoch", "epochs\nuntil none", f"errors in\nepoch {config.epochs:,}", "last w1, w2, b")
    table = Table(*columns, box=SIMPLE)
    for name, r in rule.items():
        none = np.flatnonzero(r["errors"] == 0)  # an epoch without errors changes nothing, so one is enough
        r["learned_after"] = int(none[0]) if none.size else None
        first, last = " ".join(map(str, r["errors"][:8])), ", ".join(f"{w:g}" for w in r["weights"][-1, -1])
        until = str(none[0]) if none.size else "never" if first_return(r["weights"][:, -1]) else "not yet"
        table.add_row(name, f"{first} …", until, str(r["errors"][-1]), last)
    console.print("Rosenblatt's rule", table)
    if again := first_return(rule["XOR"]["weights"][:, -1]):
        console.print(
            f"XOR: epoch {again[0]} ends with the weights that epoch {again[1]} ended with, so the rule goes round for "
            f"ever. No epoch had fewer than {rule['XOR']['errors'].min()} errors. The weights after each example of "
            f"the last: {', '.join(str(tuple(map(int, row))) for row in rule['XOR']['weights'][-1])}.\n"
        )
    table = Table("", *hidden, box=SIMPLE)
    table.add_row("first loss", *(f"{r['loss'][0]:.6f}" for r in hidden.values()))
    table.add_row("last loss", *(f"{r['loss'][-1]:.6f}" for r in hidden.values()))
    table.add_row("points right", *(f"{r['right'].sum():.0f} of 4" for r in hidden.values()))
    console.print(f"XOR by 2-{config.hidden}-1 with tanh, {config.updates:,} full-batch updates", table)
    table = Table("network", "engine", "norm in dense_0", "in dense_1", box=SIMPLE)
    for name, engines in norms.items():
        for engine, norm in engines.items():
            table.add_row(name, engine, *(f"{norm[layer]:.6g}" for layer in ("dense_0", "dense_1") if layer in norm))
    console.print("the step as activation: no gradient passes it, so what lies before it learns nothing", table)

    draw(rule, model, hidden["backprop"]["end"], folder / "regions.png")
    wrong = rule["XOR"]["errors"][-1], 4 - hidden["backprop"]["right"].sum()
    final = f"XOR: {wrong[0]} errors in the perceptron's last epoch, {wrong[1]:.0f} by the hidden layer"
    console.print(final, highlight=False, soft_wrap=True)
    say_written(console, folder)
    return {"rule": rule, "first_return": again, "hidden": hidden, "step_gradients": norms, "folder": folder}


def draw(rule: dict, model: fnet.Layer, ts: fnet.TrainState, path: Path) -> None:
    """The four points, and what each learner answers in the plane around them."""
    side = np.linspace(-0.5, 1.5, 301, dtype=np.float32)
    plane = np.stack(np.meshgrid(side, side), -1)
    panels = []
    for name, r in rule.items():
        w, title = r["weights"][-1, -1], f"{name}, perceptron\n{r['errors'][-1]} errors in epoch {len(r['errors']):,}"
        panels.append((name, title, plane @ w[:2] + w[2]))
    logits = np.asarray(fnet.apply(model, ts.params, ts.state, jnp.asarray(plane)))[..., 0]
    panels.append(("XOR", f"XOR, hidden layer\nafter {int(ts.step):,} updates", logits))
    figure, axes = new_figure(4, height=4.4, width=3.3)
    for ax, (name, title, z) in zip(axes, panels, strict=True):
        ax.contourf(side, side, z >= 0, levels=[-0.5, 0.5, 1.5], colors=["#f9dcc4", "#cfe2f3"])
        ax.contour(side, side, z, levels=[0], colors="black")
        for label, colour in ((0, "C1"), (1, "C0")):
            points = POINTS[np.array(TARGETS[name]) == label]
            ax.scatter(*points.T, s=90, color=colour, edgecolor="black", zorder=3, label=f"target {label}")
        ax.set(title=title, xlabel="x1", ylabel="x2", xticks=[0, 1], yticks=[0, 1], box_aspect=1)
    title = "dots: what is asked; shade: what is answered (on its line the perceptron answers 1)"
    legend_below(figure, axes[0], columns=2, title=title)
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
