"""The backward of a character model derived by hand, one line for each value, and checked value by value by name.

    python -m experiments.backprop_by_hand
    python -m experiments.backprop_by_hand --fault tanh       another wrong line; --help lists them
    python -m experiments.backprop_by_hand --epochs 0         the audits alone

Three characters predict the next: embedding, dense layer, batch normalisation, tanh, dense layer, cross-entropy, each
in its smallest steps. The exercise is that of Karpathy's makemore, part 4 ("Becoming a backprop ninja"). Here
`fnet.tap` gives each value a name and `fnet.check_gradients` compares all their gradients in the order of the backward
pass, so that it names the first wrong line and not the many that follow from it. Then one line is made wrong. The words
to learn from are those of the Zen of Python, which every Python carries in its module ``this``.

All in float64. Legend: B examples, T characters of context, E embedding, H hidden units, V characters.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import io
import re
from functools import partial
from types import SimpleNamespace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fnet
from experiments.common import main, open_console
from experiments.options import Amount, Count, Seeded, Whole
from fnet import tap
from fnet.core.numerics import stream
from fnet.gradcheck.report import LeafCheck
from fnet.types import Mean

CONTEXT = 3  # T
EPSILON = 1e-5  # added to the variance
FAULTS = {  # the value whose gradient each makes wrong first, and what is wrong
    "batch": ("picked", "1 for 1/B: the loss is a mean over the batch"),
    "total": ("exponentials", "only the numerator is differentiated, not the sum in the denominator"),
    "tanh": ("preactivation", "1 − h for 1 − h²"),
    "inverse": ("deviation", "1/s² for −1/s²"),
    "bessel": ("square", "1/B for 1/(B − 1)"),
    "square": ("difference", "the derivative of a square without its 2"),
    "mean": ("affine", "the mean is differentiated as a constant"),
    "table": ("table", "a character that stands twice in the batch keeps one gradient instead of the sum of both"),
}


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Derive the backward of a character model by hand, audit it, and audit it again with one wrong line."""

    fault: Literal["batch", "total", "tanh", "inverse", "bessel", "square", "mean", "table"] = "square"  # wrong line
    embedding: Count = 8  # E
    hidden: Count = 32  # H
    batch_size: Count = 32  # B, in the audits and in the training
    learning_rate: Amount = 0.5
    epochs: Whole = 20  # of the training, once by the gradient by hand and once by autodiff; 0 leaves it out


def read_words() -> list[str]:
    """The distinct words of the Zen of Python, in its order."""
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints itself when it is imported first
        import this
    return list(dict.fromkeys(re.findall("[a-z]+", codecs.decode(this.s, "rot13").lower())))


def contexts(words: list[str], alphabet: str) -> fnet.Batch:
    """Each character of each word, and the end of it, with the ``T`` before it: inputs (N, T), targets (N,)."""
    padded = ["." * CONTEXT + word + "." for word in words]
    rows = [(word[i : i + CONTEXT], word[i + CONTEXT]) for word in padded for i in range(len(word) - CONTEXT)]
    inputs = [[alphabet.index(c) for c in before] for before, _ in rows]
    return fnet.Batch(jnp.array(inputs), jnp.array([alphabet.index(c) for _, c in rows]))


def draw(config: Config, characters: int) -> dict[str, jax.Array]:
    """Random parameters; even gain and shift are, so that no factor is 1 and no term 0 by chance."""
    rng = np.random.default_rng(config.seed)
    fan_in, hidden = CONTEXT * config.embedding, config.hidden
    return {
        "table": jnp.array(rng.normal(0, 1, (characters, config.embedding))),
        "w1": jnp.array(rng.normal(0, fan_in**-0.5, (fan_in, hidden))),
        "b1": jnp.array(rng.normal(0, 0.1, (1, hidden))),
        "gain": jnp.array(rng.normal(1, 0.1, (1, hidden))),
        "shift": jnp.array(rng.normal(0, 0.1, (1, hidden))),
        "w2": jnp.array(rng.normal(0, hidden**-0.5, (hidden, characters))),
        "b2": jnp.array(rng.normal(0, 0.1, (1, characters))),
    }


def forward(p, inputs, targets) -> SimpleNamespace:
    """Every value on the way from ``inputs (B, T)`` and ``targets (B,)`` to the loss, by name."""
    v, rows = SimpleNamespace(), len(targets)
    v.embedded = tap("embedded", p["table"][inputs])  # (B, T, E)
    v.flat = tap("flat", v.embedded.reshape(rows, -1))  # (B, T E)
    v.product = tap("product", v.flat @ p["w1"])  # (B, H)
    v.affine = tap("affine", v.product + p["b1"])

    v.mean = tap("mean", v.affine.sum(0, keepdims=True) / rows)  # (1, H)
    v.difference = tap("difference", v.affine - v.mean)  # (B, H)
    v.square = tap("square", v.difference**2)
    v.variance = tap("variance", v.square.sum(0, keepdims=True) / (rows - 1))  # (1, H), unbiased
    v.deviation = tap("deviation", jnp.sqrt(v.variance + EPSILON))
    v.inverse = tap("inverse", 1 / v.deviation)
    v.normalised = tap("normalised", v.difference * v.inverse)  # (B, H)
    v.scaled = tap("scaled", p["gain"] * v.normalised)
    v.preactivation = tap("preactivation", v.scaled + p["shift"])

    v.hidden = tap("hidden", jnp.tanh(v.preactivation))  # (B, H)
    v.logits = tap("logits", v.hidden @ p["w2"] + p["b2"])  # (B, V)

    v.largest = tap("largest", v.logits.max(1, keepdims=True))  # (B, 1)
    v.shifted = tap("shifted", v.logits - v.largest)  # (B, V), so that no exponential overflows
    v.exponentials = tap("exponentials", jnp.exp(v.shifted))
    v.total = tap("total", v.exponentials.sum(1, keepdims=True))  # (B, 1)
    v.share = tap("share", 1 / v.total)
    v.probabilities = tap("probabilities", v.exponentials * v.share)  # (B, V)
    v.logs = tap("logs", jnp.log(v.probabilities))
    v.picked = tap("picked", jnp.take_along_axis(v.logs, targets[:, None], 1))  # (B, 1)
    v.loss = tap("loss", -v.picked.sum() / rows)
    return v


def f(p, inputs, targets) -> jax.Array:
    """The loss."""
    return forward(p, inputs, targets).loss


def by_hand(p, inputs, targets, fault: str | None = None) -> tuple[dict, dict]:
    """The gradients of the parameters, and those of all values by name; no autodiff. ``fault`` makes one line wrong."""

    def line(right, **wrong):  # what stands in the line; with the fault of that name, what is wrongly put there
        return wrong.get(fault, right) if fault else right

    v, d = forward(p, inputs, targets), SimpleNamespace()
    rows, characters = v.logits.shape
    dtype = v.logits.dtype

    d.loss = jnp.ones((), dtype)
    d.picked = jnp.full_like(v.picked, line(-1 / rows, batch=-1)) * d.loss
    d.logs = jax.nn.one_hot(targets, characters, dtype=dtype) * d.picked  # the others are not picked
    d.probabilities = d.logs / v.probabilities
    d.share = (d.probabilities * v.exponentials).sum(1, keepdims=True)  # it went to every column: sum them
    d.total = -(v.share**2) * d.share  # (1/s)′ = −1/s²
    d.exponentials = d.probabilities * v.share + line(1, total=0) * d.total  # both ways: as e_k, and within Σ e
    d.shifted = d.exponentials * v.exponentials
    d.largest = -d.shifted.sum(1, keepdims=True)  # 0 but for rounding: a shift of all logits changes no probability
    d.logits = d.shifted + jax.nn.one_hot(v.logits.argmax(1), characters, dtype=dtype) * d.largest

    d.hidden = d.logits @ p["w2"].T
    d.preactivation = line(1 - v.hidden**2, tanh=1 - v.hidden) * d.hidden  # tanh′ = 1 − tanh²

    d.scaled = d.preactivation
    d.normalised = p["gain"] * d.scaled
    d.inverse = (d.normalised * v.difference).sum(0, keepdims=True)
    d.deviation = line(-1, inverse=1) * v.inverse**2 * d.inverse
    d.variance = d.deviation / (2 * v.deviation)  # (√u)′ = 1 / (2√u)
    d.square = jnp.ones_like(v.square) / line(rows - 1, bessel=rows) * d.variance
    d.difference = d.normalised * v.inverse + line(2, square=1) * v.difference * d.square  # both ways again
    d.mean = -d.difference.sum(0, keepdims=True)
    d.affine = d.difference + line(1, mean=0) * d.mean / rows  # dᵢ = zᵢ − Σ z / B

    d.product = d.affine
    d.flat = d.product @ p["w1"].T
    d.embedded = d.flat.reshape(v.embedded.shape)

    zeros = jnp.zeros_like(p["table"])
    grads = {
        "table": line(zeros.at[inputs].add(d.embedded), table=zeros.at[inputs].set(d.embedded)),
        "w1": v.flat.T @ d.product,
        "b1": d.affine.sum(0, keepdims=True),
        "gain": (v.normalised * d.scaled).sum(0, keepdims=True),
        "shift": d.preactivation.sum(0, keepdims=True),
        "w2": v.hidden.T @ d.logits,
        "b2": d.logits.sum(0, keepdims=True),
    }
    return grads, vars(d)


@jax.jit
def compact(p, inputs, targets) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What two groups of lines come to on paper: the gradient that they lead to, the long way and in one line."""
    v, d = forward(p, inputs, targets), SimpleNamespace(**by_hand(p, inputs, targets)[1])
    rows, characters = v.logits.shape
    # Cross-entropy: ℓ = log Σ exp z − z_y, so ∂ℓ/∂z = p − onehot(y); the loss is a mean over B.
    logits = (v.probabilities - jax.nn.one_hot(targets, characters, dtype=v.logits.dtype)) / rows
    # Batch normalisation: n = (z − μ) / s, and g = ∂L/∂n. By s the difference zᵢ − μ gets −nᵢ Σ g n / ((B − 1) s); by μ
    # the mean of what all differences get is taken off, which is that of g / s alone, since Σ n = 0.
    n, g = v.normalised, p["gain"] * d.preactivation
    affine = v.inverse * (g - g.mean(0, keepdims=True) - n * (g * n).sum(0, keepdims=True) / (rows - 1))
    return {"logits": (d.logits, logits), "affine": (d.affine, affine)}


def audit(p, batch: fnet.Batch, fault: str | None = None) -> fnet.gradcheck.Report:
    """The derivation under the audit, with all its intermediates."""
    hand = partial(by_hand, fault=fault)
    return fnet.check_gradients(
        f,
        p,
        batch.inputs,
        batch.targets,
        gradient=lambda *args: hand(*args)[0],
        intermediates=lambda *args: hand(*args)[1],
        precisions=(),
        cost=False,
    )


def hand_engine(params, state, batch, key):
    """The gradient by hand as an engine, in the place of `fnet.from_loss`."""
    grads, _ = by_hand(params, batch.inputs, batch.targets)
    rows = jnp.asarray(len(batch.targets), jnp.float64)
    return grads, state, {"loss": Mean(f(params, batch.inputs, batch.targets) * rows, rows)}


def train(config: Config, p, data: fnet.Batch) -> dict[str, np.ndarray]:
    """The training loss of each epoch, by both engines from the same start through the same batches."""
    optimizer, losses = fnet.sgd(config.learning_rate), {}
    start = fnet.init_train_state(p, optimizer, stream(jax.random.key(config.seed), "run"))
    autodiff = fnet.from_loss(lambda params, batch, key: f(params, batch.inputs, batch.targets))
    for engine, gradient in {"by hand": hand_engine, "by autodiff": autodiff}.items():
        step = fnet.make_step(gradient, optimizer)
        _, history = fnet.fit(step, start, data, epochs=config.epochs, batch_size=config.batch_size)
        losses[engine] = history.epochs["loss"]
    return losses


def report_table(right: fnet.gradcheck.Report, wrong: fnet.gradcheck.Report, fault: str) -> Table:
    """Both audits side by side: the values in the order of the backward pass, then the parameters."""
    table = Table("gradient of", "shape", "by hand", f"with the fault {fault!r}", box=SIMPLE)
    for a, b in zip((*right.intermediates, *right.leaves), (*wrong.intermediates, *wrong.leaves), strict=True):
        name = a.path if isinstance(a, LeafCheck) else a.name
        found = escape(b.describe())
        table.add_row(
            name, str(a.shape), escape(a.describe()), f"[bold]{found}" if name == wrong.first_wrong else found
        )
    return table


def run(config: Config, console: Console | None = None) -> dict:
    """Audit the derivation, audit it with one wrong line, compare the compact forms, train; returns the findings."""
    console = open_console(config, console)
    with jax.enable_x64(True):
        words = read_words()
        alphabet = "." + "".join(sorted(set("".join(words))))
        data = contexts(words, alphabet)
        if config.batch_size < 2 or len(data.targets) % config.batch_size == 1:
            raise SystemExit(
                f"--batch-size {config.batch_size}: a batch of one example has no variance; choose another"
            )
        p = draw(config, len(alphabet))
        batch = fnet.data.take(
            data, np.random.default_rng(config.seed).permutation(len(data.targets))[: config.batch_size]
        )
        with console.status("auditing the derivation, right and with the fault"):
            right, wrong = audit(p, batch), audit(p, batch, config.fault)
        console.print(f"{len(words)} words, {len(data.targets)} examples, {len(alphabet)} characters", highlight=False)
        console.print(report_table(right, wrong, config.fault))
        place, words_of_it = FAULTS[config.fault]
        console.print(f"by hand: {'every gradient is right' if right.ok else f'wrong at {right.first_wrong}'}")
        console.print(
            f"with {config.fault!r} ({words_of_it}): first wrong at {wrong.first_wrong!r}, the fault is in {place!r}"
        )

        short = {
            name: float(abs(one_line - long_way).max() / abs(long_way).max())
            for name, (long_way, one_line) in compact(p, batch.inputs, batch.targets).items()
        }
        for name, difference in short.items():
            console.print(f"{name}: in one line instead of step by step, the gradient differs by {difference:.1e}")

        losses = train(config, p, data) if config.epochs else {}
    if losses:
        a, b = losses.values()
        console.print(
            f"training loss, first and last of {config.epochs} epochs: {a[0]:.4f}, {a[-1]:.4f} by hand; "
            f"worst relative difference from autodiff's {np.abs(a / b - 1).max():.1e}"
        )
    return {"right": right, "wrong": wrong, "compact": short, "losses": losses}


if __name__ == "__main__":
    main(run, Config)
