"""The sources' complete example (S1), in Keras' own conventions: what the text claims beside what was measured.

    python -m experiments.keras_example
    python -m experiments.keras_example --seed 1 --epochs 100

1000 inputs of 784 standard-normal numbers, each with one of 10 classes drawn at random; dense 784-128-64-10 with relu,
softmax cross-entropy, Adam 0.001, batches of 32, 50 epochs. As in Keras: Glorot uniform weights and zero biases; Adam
in Keras' form with epsilon 1e-7; the validation split is the *last* 20%, cut off before anything is shuffled; an
epoch's training figures are means over its batches, each taken before its update.

The labels are random, so there is nothing to learn: training accuracy rises because 800 examples can be learned by
heart, and validation accuracy must stay near 10%. It is a demonstration of overfitting.

Legend: N examples, 10 classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import fnet
from experiments.common import length, main, new_run_folder, open_console, say_written, train
from experiments.options import Amount, ByEngine, Count, Resumable, Seeded, Share, engine_of
from experiments.pictures.parts import grid_and_legend
from fnet.core.numerics import stream
from fnet.layers.initializers import glorot_uniform
from fnet.metrics import accuracy, gradient_norms
from fnet.report.plots import new_figure, save_figure

CLASSES = 10
CLAIMED = {1: (2.3, 0.10), 10: (1.5, 0.40), 50: (0.3, 0.90)}  # the text's loss and accuracy by epoch


@dataclasses.dataclass(frozen=True)
class Config(Resumable, ByEngine, Seeded):
    """Train the sources' Keras example on random inputs with random labels."""

    examples: Count = 1000
    validation_split: Share = 0.2  # the share of the examples, from the end, that is not trained on
    learning_rate: Amount = 1e-3  # Adam's
    batch_size: Count = 32
    epochs: Count = 50


def random_data(config: Config, key) -> fnet.Batch:
    """Inputs (N, 784), standard normal, and one-hot targets (N, 10) that have nothing to do with them."""
    inputs = jax.random.normal(stream(key, "inputs"), (config.examples, 784))
    labels = jax.random.randint(stream(key, "labels"), (config.examples,), 0, CLASSES)
    return fnet.Batch(inputs, jax.nn.one_hot(labels, CLASSES))


def split_last(data: fnet.Batch, share: float) -> tuple[fnet.Batch, fnet.Batch]:
    """All but the last ``share`` of the examples, and those: Keras' ``validation_split``."""
    keep = int(len(data.inputs) * (1 - share))
    return jax.tree.map(lambda a: a[:keep], data), jax.tree.map(lambda a: a[keep:], data)


def run(config: Config, console: Console | None = None) -> dict:
    """Train, print the comparison and write the run folder; returns what was measured."""
    console = open_console(config, console)
    key = jax.random.key(config.seed)
    with console.status("drawing the data and the parameters"):
        training, validation = split_last(random_data(config, stream(key, "data")), config.validation_split)
        if not len(training.inputs) or not len(validation.inputs):
            raise SystemExit(
                f"--validation-split {config.validation_split} of {config.examples} examples; expected a share that "
                "leaves some to train on and some to validate"
            )
        model, loss = fnet.mlp(128, 64, CLASSES, weights=glorot_uniform()), fnet.softmax_cross_entropy
        params, state = fnet.init(model, stream(key, "model"), training.inputs[:1])

    length(config, training)  # an option that cannot be leaves no folder
    optimizer = fnet.adam(config.learning_rate, eps=1e-7, variant="keras")
    folder = new_run_folder(config, "keras_example")
    gradient = engine_of(config)(model, loss, {"accuracy": accuracy})
    step = fnet.make_step(gradient, optimizer, monitors={"gradient_norm": gradient_norms})
    start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    watched = {"evaluate": fnet.make_evaluate(model, loss, {"accuracy": accuracy}), "validation": validation}
    _, history = train(config, "training", folder / "training", step, start, training, console, **watched)

    curves, held_out = history.epochs, len(validation.inputs)
    training_columns = ("loss\nclaimed", "loss\nmeasured", "accuracy\nclaimed", "accuracy\nmeasured")
    table = Table("epoch", *training_columns, "validation\nloss", "validation\naccuracy", box=SIMPLE)
    table.title = f"{config.examples} random examples, the last {held_out} held out"
    for epoch in sorted({*CLAIMED, len(curves["loss"])}):
        if epoch <= len(curves["loss"]):
            now = {name: values[epoch - 1] for name, values in curves.items()}
            claims = [f"≈ {CLAIMED[epoch][0]:.1f}", f"≈ {CLAIMED[epoch][1]:.0%}"] if epoch in CLAIMED else ["", ""]
            training_cells = claims[0], f"{now['loss']:.4f}", claims[1], f"{now['accuracy']:.1%}"
            validation_cells = f"{now['validation_loss']:.4f}", f"{now['validation_accuracy']:.1%}"
            table.add_row(str(epoch), *training_cells, *validation_cells)
    console.print(table)
    console.print(
        f"The labels are random: of examples it has not seen, any model gets 10% ± {chance_spread(held_out):.1%} right "
        "(one standard deviation). What rises is memory of the training examples: overfitting, and no useful accuracy."
    )
    draw(curves, held_out, folder / "curves.png")
    last = {name: curves[name][-1] for name in ("accuracy", "validation_accuracy")}
    final = f"training accuracy {last['accuracy']:.4f}, validation accuracy {last['validation_accuracy']:.4f}"
    console.print(final, highlight=False, soft_wrap=True)
    say_written(console, folder)
    return {"history": history, "training": training, "validation": validation, "folder": folder}


def chance_spread(examples: int) -> float:
    """The standard deviation of the share that guessing one of 10 classes gets right of so many examples."""
    return (1 / CLASSES * (1 - 1 / CLASSES) / examples) ** 0.5


def draw(curves, held_out: int, path: Path) -> None:
    """Loss and accuracy of both parts, with the text's claims as marks and what guessing gives."""
    figure, (left, right) = new_figure(2)
    epochs, spread = np.arange(1, len(curves["loss"]) + 1), 2 * chance_spread(held_out)
    for i, (ax, name) in enumerate(((left, "loss"), (right, "accuracy"))):
        ax.plot(epochs, curves[name], color="C0", label="training")
        ax.plot(epochs, curves[f"validation_{name}"], color="C1", label="validation")
        claimed = [claim[i] for claim in CLAIMED.values()]
        ax.plot(list(CLAIMED), claimed, "D", color="C3", label="training, the text claims")
        ax.set(xlabel="epoch", ylabel=name, title=f"{name}, labels drawn at random")
    left.axhline(np.log(CLASSES), color="0.5", label="guessing: ln 10")
    left.set_yscale("log")
    right.axhspan(0.1 - spread, 0.1 + spread, color="0.5", alpha=0.3, label="guessing: 10% ± 2 standard deviations")
    right.yaxis.set_major_formatter("{x:.0%}")
    grid_and_legend(left, right)
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
