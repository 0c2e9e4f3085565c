"""One pass forward and backward as a page: every number with its formula, its line of code, and what follows a change.

    python -m experiments.explorer
    python -m experiments.explorer --model xor        another model; --help lists them

- mazur: the worked example of `experiments.mazur`, 2-2-2 sigmoids, with the training of 10,000 steps
- xor: 2-3-1 on the four examples, with what it says of every input
- digits: 784-128-64-10 on one handwritten digit
- lenet: LeNet-5 on one, with its feature maps
- lstm: eight units over six steps, with gates, and gradients through time
- gpt: two blocks of 16 features on eight characters, with what each head attends to
- faulty: mazur's network with a sigmoid whose backward forgets a factor; the page goes to it

Trained in float32, recorded in float64 (`fnet.record`); the page runs both programs again and says how near it comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.adding_problem import adding_problem, last
from experiments.common import load_images, main, new_run_folder, open_console, say_written
from experiments.mazur import RATE, example, fixed_biases
from experiments.options import InFolder, Seeded
from fnet.core.numerics import stream
from fnet.gradcheck import Recording
from fnet.layers import dense, lstm, serial, sigmoid, tanh
from fnet.layers.models import gpt, lenet5
from fnet.losses import binary_cross_entropy, half_squared_error, softmax_cross_entropy, squared_error
from fnet.report import write_explorer

TEXT = "the cat sat on the mat and the rat sat on the cat "


@dataclasses.dataclass(frozen=True)
class Config(InFolder, Seeded):
    """Write a page that explains one forward and backward pass, number by number."""

    model: Literal["mazur", "xor", "digits", "lenet", "lstm", "gpt", "faulty"] = "mazur"


class Scene(NamedTuple):
    """What is recorded, and how the page shows it."""

    recording: Recording
    options: dict[str, Any]  # of `write_explorer`


def mazur(config: Config) -> Scene:
    """The worked example before its first step, with the training behind it."""
    return worked_example(
        sigmoid(),
        10_000,
        title="Mazur’s worked example: 2-2-2 of sigmoids",
        note="One example, E = Σ ½ (t − o)², gradient descent at the rate 0.5; biases stay, as in the post.",
    )


def faulty(config: Config) -> Scene:
    """The same network with a hidden layer whose backward by hand is wrong."""

    def backward(params, x, dy):
        return (), dy * jax.nn.sigmoid(x)  # y = σ(x) and y' = y (1 − y): the second factor is forgotten

    return worked_example(
        sigmoid()._replace(backward=backward),
        0,
        title="A wrong backward: a sigmoid that forgets 1 − y",
        note="Mazur’s network; the hidden layer’s backward by hand is wrong, and so is all that follows from it.",
    )


def worked_example(hidden, steps: int, **options) -> Scene:
    """Mazur's network with this hidden activation, and so many steps of its training."""
    with jax.enable_x64(True):
        _, params, state, data = example()
        model = fnet.mlp(2, 2, activation=hidden, output=sigmoid())
        recording = fnet.record(model, half_squared_error, data, params=params, state=state)
        if steps:
            gradient = fixed_biases(fnet.backprop(model, half_squared_error))
            options["training"] = descent(gradient, params, state, data, RATE, steps)
    labels = {
        "input": [["i₁", "i₂"]],
        "target": [["t₁", "t₂"]],
        "param/dense_0/w": [["w₁", "w₃"], ["w₂", "w₄"]],
        "param/dense_0/b": ["b₁", "b₁′"],
        "param/dense_1/w": [["w₅", "w₇"], ["w₆", "w₈"]],
        "param/dense_1/b": ["b₂", "b₂′"],
        "forward:dense_0": [["net h₁", "net h₂"]],
        "forward:sigmoid_0": [["h₁", "h₂"]],
        "forward:dense_1": [["net o₁", "net o₂"]],
        "forward:sigmoid_1": [["o₁", "o₂"]],
        "loss": "E",
    }
    return Scene(recording, {**options, "labels": labels, "rate": RATE, "kept": ("b",)})


def xor(config: Config) -> Scene:
    """Four examples at once, before the training that learns them."""
    model, rate, steps = fnet.mlp(3, 1, activation=tanh()), 0.5, 2000
    with jax.enable_x64(True):
        x = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        data = fnet.Batch(x, jnp.array([[0.0], [1.0], [1.0], [0.0]]))
        params, state = fnet.init(model, stream(jax.random.key(config.seed), "model"), x)
        rng = np.random.default_rng(config.seed)
        params = jax.tree.map(lambda p: jnp.asarray(np.round(rng.uniform(-1, 1, p.shape), 1)), params)
        training = descent(fnet.backprop(model, binary_cross_entropy), params, state, data, rate, steps)
        recording = fnet.record(model, binary_cross_entropy, data, params=params, state=state)
    labels = {
        "input": [["x₁", "x₂"]],
        "target": [["t"]],
        "param/dense_0/w": [["w₁₁", "w₁₂", "w₁₃"], ["w₂₁", "w₂₂", "w₂₃"]],
        "param/dense_0/b": ["b₁", "b₂", "b₃"],
        "param/dense_1/w": [["v₁"], ["v₂"], ["v₃"]],
        "param/dense_1/b": ["c"],
        "forward:dense_0": [["z₁", "z₂", "z₃"]],
        "forward:tanh_0": [["a₁", "a₂", "a₃"]],
        "forward:dense_1": [["ŷ"]],
    }
    note = "tanh within, a logit out, binary cross-entropy; gradients are means over the four examples."
    options = {"title": "XOR: 2-3-1, four examples at once", "note": note, "labels": labels, "plane": (-0.5, 1.5)}
    return Scene(recording, {**options, "rate": rate, "training": training})


def digits(config: Config) -> Scene:
    """One digit that was not trained on, before the training, on the way and after it."""
    train_data, test_data = load_images(config.seed, 1000)
    flat = lambda data: data._replace(inputs=data.inputs.reshape(len(data.inputs), -1))  # noqa: E731
    train_data, one = flat(train_data), flat(fnet.data.take(test_data, np.arange(1)))
    model = fnet.mlp(128, 64, 10)
    kept, state = trained(model, softmax_cross_entropy, train_data, 1e-3, [0, 20, 500], config)
    recording = fnet.record(model, softmax_cross_entropy, one, params=kept[-1][1], state=state)
    label = int(one.targets[0])
    return Scene(
        recording,
        {
            "title": f"784-128-64-10 on one digit, a {label}",
            "note": "Relu within, softmax cross-entropy; Adam, 500 steps of 32 digits, none of them this one.",
            "images": {"input": (28, 28)},
            "training": kept,
        },
    )


def lenet(config: Config) -> Scene:
    """One digit that was not trained on."""
    train_data, test_data = load_images(config.seed, 1000)
    one, model = fnet.data.take(test_data, np.arange(1)), lenet5()
    kept, state = trained(model, softmax_cross_entropy, train_data, 1e-3, [200], config)
    recording = fnet.record(model, softmax_cross_entropy, one, params=kept[-1][1], state=state)
    return Scene(
        recording,
        {
            "title": f"LeNet-5 on one digit, a {int(one.targets[0])}",
            "note": "Relu and maxima of 2 × 2; a pixel is framed with the window that it was computed from.",
        },
    )


def recurrent(config: Config) -> Scene:
    """The adding problem over six steps: the loss looks at the last step alone, so its gradient goes back in time."""
    key = jax.random.key(config.seed)
    data, one = adding_problem(stream(key, "train"), 2000, 6), adding_problem(stream(key, "test"), 1, 6)
    model = serial(lstm(8), last(), dense(1))
    kept, state = trained(model, squared_error, data, 1e-2, [0, 30, 300, 1000], config)
    recording = fnet.record(model, squared_error, one, params=kept[-1][1], state=state)
    note = "The sum of the two of six numbers that are marked, read off the last step; ∂L/∂h goes back through all six."
    return Scene(recording, {"title": "An LSTM of eight units over six steps", "note": note, "training": kept})


def language(config: Config) -> Scene:
    """Each of eight characters predicts the next."""
    alphabet = sorted({*TEXT})
    ids = jnp.array([alphabet.index(c) for c in TEXT * 2])
    windows = jnp.stack([ids[i : i + 9] for i in range(len(TEXT))])
    data = fnet.Batch(windows[:, :-1], windows[:, 1:])
    model = gpt(len(alphabet), length=8, layers=2, features=16, heads=2)
    kept, state = trained(model, softmax_cross_entropy, data, 1e-2, [0, 30, 300], config)
    one = fnet.data.take(data, np.arange(1))
    recording = fnet.record(model, softmax_cross_entropy, one, params=kept[-1][1], state=state)
    words = ["␣" if c == " " else c for c in TEXT]
    return Scene(
        recording,
        {
            "title": "A GPT of two blocks on eight characters",
            "note": f"Trained on “{TEXT.strip()}”, 300 steps of 32 windows; columns are characters.",
            "labels": {"input": [words[:8]], "target": [words[1:9]]},
            "training": kept,
        },
    )


SCENES: dict[str, Callable[[Config], Scene]] = {
    "mazur": mazur,
    "xor": xor,
    "digits": digits,
    "lenet": lenet,
    "lstm": recurrent,
    "gpt": language,
    "faulty": faulty,
}


def descent(gradient, params, state, data: fnet.Batch, rate: float, steps: int) -> list[tuple[int, Any]]:
    """Parameters at 120 steps of gradient descent, the first ones near one another."""
    optimizer = fnet.sgd(rate)
    step = jax.jit(lambda ts: fnet.make_step(gradient, optimizer)(ts, data)[0])
    ts, kept = fnet.init_train_state(params, optimizer, jax.random.key(0), state), []
    wanted = {0, *np.unique(np.geomspace(1, steps, 120).round().astype(int)).tolist()}
    for i in range(steps + 1):
        if i in wanted:
            kept.append((i, jax.tree.map(np.asarray, ts.params)))
        ts = step(ts)
    return kept


def trained(model, loss, data: fnet.Batch, rate: float, steps: list[int], config: Config):
    """Step and parameters at these steps of a training by Adam and the backward by hand, and the last state."""
    key = jax.random.key(config.seed)
    optimizer = fnet.adam(rate)
    params, state = fnet.init(model, stream(key, "model"), data.inputs[:1])
    ts = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    step = jax.jit(fnet.make_step(fnet.backprop(model, loss), optimizer))
    rng, kept, size = np.random.default_rng(config.seed), [], min(32, len(data.targets))
    for i in range(steps[-1] + 1):
        if i in steps:
            kept.append((i, jax.tree.map(np.asarray, ts.params)))
        if i < steps[-1]:
            ts, _ = step(ts, fnet.data.take(data, rng.integers(0, len(data.targets), size)))
    return kept, ts.state


def run(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Write the page; returns its path and the recording."""
    console = open_console(config, console)
    folder = new_run_folder(config, "explorer")
    with console.status(f"training and recording {config.model}"):
        recording, options = SCENES[config.model](config)
    path = write_explorer(recording, folder / f"{config.model}.html", **options)
    console.print(f"{recording}; {path.stat().st_size / 1024:,.0f} KiB", highlight=False)
    wrong = recording.first_wrong
    console.print("by hand and by autodiff agree" if wrong is None else f"first wrong at {wrong}", highlight=False)
    say_written(console, path)
    return {"path": path, "recording": recording}


if __name__ == "__main__":
    main(run, Config)
