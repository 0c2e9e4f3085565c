"""Robustness (S17): digits changed by at most ε a pixel to be misread, and a network trained against that.

    python -m experiments.adversarial
    python -m experiments.adversarial --epsilon 0.1 --seeds 0
    python -m experiments.adversarial --attack-steps 100       is 20 steps enough of an attack?

The attacker ascends the loss over the pixels, by the gradient of the loss by the image that the backward by hand gives:

    FGSM    x + ε sign ∂ℓ/∂x                                            (Goodfellow et al., arXiv:1412.6572)
    PGD     from a random point of the box, again and again a step of 2.5 ε / steps along sign ∂ℓ/∂x, and back into
            the box: within ε of x and within 0..1 at every pixel       (Madry et al., arXiv:1706.06083)

A plain network and one trained on PGD's images at one ε read the same digits attacked at every ε; random signs times ε
are the control: as large a change, without the gradient. PGD's images made on one network and shown to the other must
hurt less than its own, or gradients are masked (Athalye et al., arXiv:1802.00420). Both networks start
from the same parameters and see the same batches.

Legend: B batch, H W height and width, E numbers of ε.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import load_images, main, new_run_folder, open_console, say_written, write_results
from experiments.options import Amount, ByEngine, Count, InFolder, Seeds, Share, Shares, engine_of
from experiments.pictures.parts import (
    BESIDE,
    DOTTED,
    Row,
    draw_range,
    draw_rows,
    first_of_each,
    grid_and_legend,
    mean_and_spread,
)
from fnet.core.numerics import stream
from fnet.layers import conv, dense, flatten, relu
from fnet.metrics import accuracy
from fnet.optimizers.schedules import cosine
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure

LOSS = fnet.softmax_cross_entropy
ATTACKS = ("noise", "FGSM", "PGD", "PGD on the other")


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Attack a plain and an adversarially trained convolutional network."""

    epsilon: Share = 0.2  # the change a pixel that training defends against; pixels go from 0 to 1
    epsilons: Shares = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)  # those of the attacks on the test digits
    train_steps: Count = 5  # of PGD on every training batch
    attack_steps: Count = 20  # of PGD on the test digits
    learning_rate: Amount = 2e-3  # Adam's first; half a cosine brings it to 0
    batch_size: Count = 50
    epochs: Count = 10
    seeds: Seeds = (0, 1, 2)  # of the splits, the parameters, the orders and the attacks
    test_size: Count = 1000  # of the 5,000 digits
    attacked: Count = 300  # of the test digits


def network() -> fnet.Layer:
    """Two convolutions of stride 2 and two dense layers: 28,874 parameters."""
    layers = [conv(8, (5, 5), stride=2), relu(), conv(16, (5, 5), stride=2), relu(), flatten()]
    return fnet.serial(*layers, dense(32), relu(), dense(10))


# --- attacks ---------------------------------------------------------------------------------------------------------


def ascent(model: fnet.Layer, params, state, x, labels) -> jax.Array:
    """The direction that raises each image's loss: the signs of the loss' gradient by ``x``, by hand."""
    logits, _, residuals = model.forward(params, state, x)
    _, dx = model.backward(params, residuals, LOSS.gradient(logits, labels))  # XLA drops the parameters' gradients
    return jnp.sign(dx)


def noise(x, key, epsilon) -> jax.Array:
    """Each pixel ε up or down by a coin, within 0..1."""
    return jnp.clip(x + epsilon * jax.random.rademacher(key, x.shape, x.dtype), 0, 1)


def fgsm(model, params, state, x, labels, epsilon) -> jax.Array:
    """One step of ε along the signs, within 0..1."""
    return jnp.clip(x + epsilon * ascent(model, params, state, x, labels), 0, 1)


def pgd(model, params, state, x, labels, key, epsilon, steps: int) -> jax.Array:
    """``steps`` steps of 2.5 ε / steps along the signs from a random point of the box, put back into it each time."""
    low, high = jnp.maximum(x - epsilon, 0), jnp.minimum(x + epsilon, 1)

    def step(_, at):
        return jnp.clip(at + 2.5 * epsilon / steps * ascent(model, params, state, at, labels), low, high)

    start = x + epsilon * jax.random.uniform(key, x.shape, x.dtype, -1, 1)
    return jax.lax.fori_loop(0, steps, step, jnp.clip(start, low, high))


# --- training --------------------------------------------------------------------------------------------------------


def on_attacked(step, model: fnet.Layer, config: Config, steps: int):
    """The step on the batch as PGD leaves it where the parameters stand: min over parameters of the max over the box.

    ε grows from 0 over the first half of the training: at all of it from the start, the network learns only to give
    every class the same logit.
    """

    def attacked(ts, batch):
        key = jax.random.fold_in(stream(ts.key, "attack"), ts.step)
        epsilon = config.epsilon * jnp.minimum(2 * ts.step.astype(jnp.float32) / steps, 1)
        x = pgd(model, ts.params, ts.state, batch.inputs, batch.targets, key, epsilon, config.train_steps)
        return step(ts, batch._replace(inputs=x))

    return attacked


def train_seed(config: Config, robust: bool, key, train_data: fnet.Batch, test_data: fnet.Batch):
    """A whole run as a function of its key: parameters, state, test accuracy by epoch, loss by epoch."""
    model, steps = network(), config.epochs * -(-len(train_data.targets) // config.batch_size)
    optimizer = fnet.adam(cosine(config.learning_rate, steps))
    step = fnet.make_step(engine_of(config)(model, LOSS), optimizer)
    params, state = model.init(stream(key, "model"), train_data.inputs[:1])
    ts, updates, epochs = fnet.train(
        on_attacked(step, model, config, steps) if robust else step,
        fnet.init_train_state(params, optimizer, stream(key, "run"), state),
        train_data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        evaluate=fnet.make_evaluate(model, LOSS, {"accuracy": accuracy}, batch_size=250),
        validation=test_data,
    )
    return (ts.params, ts.state), {"test accuracy": epochs["accuracy"].value, "loss": updates["loss"].value.mean(1)}


def attack(config: Config, victim, other, key, x, labels, epsilon) -> dict:
    """The images ``x (B, H, W, 1)`` as each attack at ``epsilon`` leaves them, and which the victim reads right."""
    model, (params, state), (its_params, its_state) = network(), victim, other
    attacker, same = stream(key, "attack"), {"epsilon": epsilon, "steps": config.attack_steps}
    images = {
        "noise": noise(x, stream(key, "noise"), epsilon),
        "FGSM": fgsm(model, params, state, x, labels, epsilon),
        "PGD": pgd(model, params, state, x, labels, attacker, **same),
        "PGD on the other": pgd(model, its_params, its_state, x, labels, attacker, **same),
    }
    read = {name: fnet.apply(model, params, state, images[name]).argmax(-1) for name in ATTACKS}
    return {name: (images[name], read[name]) for name in ATTACKS}


def measures(x: np.ndarray, labels: np.ndarray, epsilon: float, attacked: dict) -> dict[str, float]:
    """Accuracy under each attack, and how far a pixel leaves the box at most."""
    images = np.stack([images for images, _ in attacked.values()])
    beyond = max((np.abs(images - x) - epsilon).max(), images.max() - 1, -images.min())
    return {**{name: float((read == labels).mean()) for name, (_, read) in attacked.items()}, "beyond": float(beyond)}


# --- the experiment --------------------------------------------------------------------------------------------------


def run(config: Config, console: Console | None = None) -> dict:
    """Train both networks from every seed, attack them, print the tables, draw; returns what was measured."""
    console = open_console(config, console)
    if not 0 < config.epsilon < 1 or not all(0 <= epsilon < 1 for epsilon in config.epsilons):
        raise SystemExit(f"epsilon = {config.epsilon}, epsilons = {config.epsilons}; expected numbers between 0 and 1")
    folder, begin = new_run_folder(config, "adversarial"), time.perf_counter()
    near = int(np.argmin(np.abs(np.array(config.epsilons) - config.epsilon)))  # the attack to look at
    trainings = {"plain": False, f"trained at ε = {config.epsilon:g}": True}
    trainers = {name: jax.jit(partial(train_seed, config, robust)) for name, robust in trainings.items()}
    attacks = jax.jit(partial(attack, config))
    curves, results, pictures = {name: [] for name in trainings}, {name: [] for name in trainings}, {}
    for seed in config.seeds:
        key, (train_data, test_data) = jax.random.key(seed), load_images(seed, config.test_size)
        x, labels = (a[: config.attacked] for a in test_data[:2])
        host = np.asarray(x), np.asarray(labels)
        with console.status(f"seed {seed}"):
            ends = {name: trainer(key, train_data, test_data) for name, trainer in trainers.items()}
            for name, other in zip(ends, reversed(ends), strict=True):
                victim = ends[name][0], ends[other][0], stream(key, "attack")
                each = [jax.device_get(attacks(*victim, x, labels, jnp.float32(e))) for e in config.epsilons]
                table = [measures(*host, e, attacked) for e, attacked in zip(config.epsilons, each, strict=True)]
                results[name].append({a: np.array([row[a] for row in table]) for a in table[0]})
                curves[name].append(jax.device_get(ends[name][1]))
                if "digits" not in pictures or name not in pictures:
                    pictures |= {"digits": host, name: each[near]}
        shown = ", ".join(f"{name} {c[-1]['test accuracy'][-1]:.4f}" for name, c in curves.items())
        console.print(f"seed {seed}: accuracy on {config.test_size} digits as they are: {shown}")

    by_model = {name: jax.tree.map(lambda *seeds: np.stack(seeds), *runs) for name, runs in results.items()}
    for name, r in by_model.items():
        rows = {f"ε = {e:g}": {a: mean_and_spread(r[a][:, i]) for a in ATTACKS} for i, e in enumerate(config.epsilons)}
        title = f"{name}: accuracy on {config.attacked} test digits, mean ± deviation of {len(config.seeds)} seeds"
        console.print(engine_table(title, rows))
    beyond = max(float(r["beyond"].max()) for r in by_model.values())
    console.print(f"no pixel leaves its ε or 0..1 by more than {max(beyond, 0):.1e} (rounding)")
    curves = {name: jax.tree.map(lambda *seeds: np.stack(seeds), *runs) for name, runs in curves.items()}
    draw_accuracy(by_model, curves, config, folder / "accuracy.png")
    draw_images(pictures, list(trainings), config.epsilons[near], folder / "images.png")

    numbers = {
        name: {a: dict(zip(map(str, config.epsilons), r[a].mean(0).tolist(), strict=True)) for a in ATTACKS}
        | {"test accuracy": curves[name]["test accuracy"][:, -1].tolist()}
        for name, r in by_model.items()
    }
    write_results(folder, numbers)
    plain, robust = (r["PGD"][:, near].mean() for r in by_model.values())
    console.print(
        f"PGD at ε = {config.epsilons[near]:g}: plain {plain:.3f}, adversarially trained {robust:.3f} (expected below "
        f"0.1 and above 0.6)  {time.perf_counter() - begin:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    say_written(console, folder)
    return {"models": by_model, "curves": curves, "pictures": pictures, "beyond": beyond, "folder": folder}


def draw_accuracy(by_model: dict, curves: dict, config: Config, path: Path) -> None:
    """Accuracy against ε for each network, the seeds' spread shaded; and on digits as they are, by epoch."""
    figure, axes = new_figure(3, height=4.2, width=4.8)
    for ax, (name, r) in zip(axes, by_model.items(), strict=False):
        for i, a in enumerate(ATTACKS):
            draw_range(ax, config.epsilons, r[a], "o-", markersize=4, color=f"C{i}", label=a)
        ax.axvline(config.epsilon, **DOTTED)
        ax.set(xlabel="ε, the change a pixel", ylabel="accuracy", title=name, ylim=(-0.02, 1.02))
    for i, (name, c) in enumerate(curves.items()):
        error = 1 - c["test accuracy"]
        epochs = np.arange(1, error.shape[1] + 1)
        draw_range(axes[2], epochs, error, color=f"C{i}", label=name)
    axes[2].set(xlabel="epoch", ylabel="error", ylim=(0, None), title="test digits as they are")
    axes[0].grid(alpha=0.3)  # the first two panels share the legend, which has room in the second
    grid_and_legend(*axes[1:], loc="lower left")
    save_figure(figure, path)


def draw_images(pictures: dict, names: list[str], epsilon: float, path: Path) -> None:
    """The first digit of each class as it is and as the attacks leave it; below each what its network reads."""
    x, labels = pictures["digits"]
    shown = first_of_each(labels)
    attacked = {"as it is": (x, labels)}
    attacked |= {f"{a}\n{name}": pictures[name][a] for name in names for a in ("noise", "FGSM", "PGD")}
    rows = [Row(name, images[shown, :, :, 0]) for name, (images, _) in attacked.items()]
    figure, axes = draw_rows(rows, height=1.25, width=1.05, **BESIDE, fontsize=8)
    for row, (_, read) in zip(axes, attacked.values(), strict=True):
        for ax, i in zip(row, shown, strict=True):
            wrong = read[i] != labels[i]
            ax.set_xlabel(f"{read[i]}", color="C3" if wrong else "black", labelpad=1, weight="bold" if wrong else None)
    figure.suptitle(f"changes of at most ε = {epsilon:g} a pixel; below: what is read, red where wrong")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
