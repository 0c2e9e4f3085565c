"""The source texts' own backpropagation under the gradient audit: where their recursion is right, and where it is not.

    python -m experiments.textbook_backprop

The recursion (S4), with examples as columns: ``z[l] = W[l] a[l-1] + b[l]``, ``a[l] = σ(z[l])``, and back again

    δ[L] = A[L] − y,   dW[l] = δ[l] a[l-1]ᵀ / m,   db[l] = mean δ[l],   δ[l-1] = W[l]ᵀ δ[l] ⊙ σ′(z[l-1]).

The blog starts with that δ[L] whatever the loss is, among others for the mean squared error of its sigmoid outputs, and
takes σ′ in its loop. Each case below is one choice of output, cost, δ[L] and hidden activation. δ is the gradient of
the sum over the examples by z, so the gradient of the mean by z, which `fnet.tap` names, is δ / m.

Everything is in float64. Legend: m examples (columns), n units of a layer, L layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fnet
from experiments.common import main, open_console
from experiments.options import Count, Counts, Seeded


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Audit the source texts' recursion with several losses, outputs and hidden activations."""

    sizes: Counts = (4, 5, 3)  # units of the inputs, of each hidden layer and of the outputs
    examples: Count = 6  # m


# --- activations and costs --------------------------------------------------------------------------------------------

sigmoid = jax.nn.sigmoid


def sigmoid_slope(z):
    """σ′ = σ (1 − σ)."""
    return sigmoid(z) * (1 - sigmoid(z))


def softmax(z):
    """Probabilities of the classes, which are the rows."""
    exponentials = jnp.exp(z - z.max(0, keepdims=True))
    return exponentials / exponentials.sum(0, keepdims=True)


def linear(z):
    """z itself."""
    return z


def step(z):
    """1 where z ≥ 0, else 0."""
    return jnp.where(z >= 0, 1.0, 0.0).astype(z.dtype)


# each the mean over the m examples of a sum over the n outputs


def binary_cross_entropy(a, y):
    """Of outputs between 0 and 1, each a question of its own."""
    return -(y * jnp.log(a) + (1 - y) * jnp.log(1 - a)).sum() / y.shape[1]


def categorical_cross_entropy(a, y):
    """Of probabilities of the classes."""
    return -(y * jnp.log(a)).sum() / y.shape[1]


def half_squared_error(a, y):
    """½ (a − y)²."""
    return 0.5 * ((a - y) ** 2).sum() / y.shape[1]


def squared_error(a, y):
    """(a − y)²: the texts' mean squared error."""
    return ((a - y) ** 2).sum() / y.shape[1]


# --- the texts' network: forward, and backward by hand ---------------------------------------------------------------


def forward(params, x, hidden, output):
    """``z[1] … z[L]`` and ``a[0] … a[L]`` of the inputs ``x (n, m)``; ``z[0]`` is None, as there is none."""
    z, a = [None], [x]
    for l in range(1, len(params) + 1):
        W, b = params[f"layer_{l}"]["W"], params[f"layer_{l}"]["b"]  # (n, n of the layer before), (n, 1)
        z.append(fnet.tap(f"z{l}", W @ a[l - 1] + b))
        a.append(output(z[l]) if l == len(params) else hidden(z[l]))
    return z, a


def backward(params, x, y, hidden, output, hidden_slope, first_delta):
    """The recursion: the gradients of the parameters, and by name those of each layer's ``z``."""
    (z, a), m = forward(params, x, hidden, output), x.shape[1]
    delta = first_delta(a[-1], y, z[-1])
    grads, intermediates = {}, {}
    for l in range(len(params), 0, -1):
        intermediates[f"z{l}"] = delta / m
        grads[f"layer_{l}"] = {"W": delta @ a[l - 1].T / m, "b": delta.mean(1, keepdims=True)}
        if l > 1:
            delta = params[f"layer_{l}"]["W"].T @ delta * hidden_slope(z[l - 1])
    return grads, intermediates


def texts_delta(a, y, z):
    """The texts' ``δ[L]`` for every loss."""
    return a - y


def corrected_delta(a, y, z):
    """That of the squared error of a sigmoid: ∂(a − y)²/∂z = 2 (a − y) σ′(z)."""
    return 2 * (a - y) * sigmoid_slope(z)


def step_slope(z):
    """0, the derivative of the step wherever it has one."""
    return jnp.zeros_like(z)


class Case(NamedTuple):
    """One network with its cost, and what the recursion takes for their derivatives."""

    output: Callable
    cost: Callable
    first_delta: Callable = texts_delta
    hidden: Callable = sigmoid
    hidden_slope: Callable = sigmoid_slope


CASES = {
    "sigmoid, binary cross-entropy": Case(sigmoid, binary_cross_entropy),
    "softmax, categorical cross-entropy": Case(softmax, categorical_cross_entropy),
    "linear, half squared error": Case(linear, half_squared_error),
    "linear, squared error": Case(linear, squared_error),
    "sigmoid, half squared error": Case(sigmoid, half_squared_error),
    "sigmoid, squared error": Case(sigmoid, squared_error),
    "sigmoid, squared error, δ[L] corrected": Case(sigmoid, squared_error, corrected_delta),
    "step in the hidden layers, slope 0": Case(sigmoid, binary_cross_entropy, hidden=step, hidden_slope=step_slope),
    "step in the hidden layers, slope σ′": Case(sigmoid, binary_cross_entropy, hidden=step),
}


def objective(case: Case, params, x, y) -> jax.Array:
    """The cost of a case."""
    return case.cost(forward(params, x, case.hidden, case.output)[1][-1], y)


def recursion(case: Case, params, x, y):
    """Its gradients by the recursion: of the parameters, of each ``z``."""
    return backward(params, x, y, case.hidden, case.output, case.hidden_slope, case.first_delta)


def audit(case: Case, params, x, y) -> fnet.gradcheck.Report:
    """The recursion under the audit."""
    by_hand = jax.jit(partial(recursion, case))
    return fnet.check_gradients(
        partial(objective, case),
        params,
        x,
        y,
        gradient=lambda *args: by_hand(*args)[0],
        intermediates=lambda *args: by_hand(*args)[1],
        precisions=(),
        cost=False,
    )


def cause(report: fnet.gradcheck.Report) -> str:
    """What the audit says of the first wrong value, or else of the parameters next to it."""
    first = [value.cause for value in report.intermediates if value.name == report.first_wrong]
    return next(filter(None, first + [leaf.cause for leaf in reversed(report.leaves) if leaf.verdict == "wrong"]), "")


def example(config: Config):
    """Random parameters, inputs and one-hot targets."""
    rng = np.random.default_rng(config.seed)
    params = {
        f"layer_{l}": {"W": jnp.array(rng.normal(0, 1, (o, i))), "b": jnp.array(rng.normal(0, 0.5, (o, 1)))}
        for l, (i, o) in enumerate(itertools.pairwise(config.sizes), 1)
    }
    x = rng.normal(0, 1, (config.sizes[0], config.examples))
    y = np.eye(config.sizes[-1])[:, rng.integers(0, config.sizes[-1], config.examples)]
    return params, jnp.array(x), jnp.array(y)


def missing_factor(params, x, y) -> dict[str, jax.Array]:
    """Of the squared error of sigmoid outputs: the texts' gradient by z[L], the true one, their ratio, and 2 σ′(z)."""
    case, name = CASES["sigmoid, squared error"], f"z{len(params)}"
    true = fnet.intermediate_gradients(partial(objective, case), params, x, y)[name]
    claimed = recursion(case, params, x, y)[1][name]
    z = forward(params, x, case.hidden, case.output)[0][-1]
    return {"claimed": claimed, "expected": true, "expected / claimed": true / claimed, "2 σ′(z)": 2 * sigmoid_slope(z)}


def run(config: Config, console: Console | None = None) -> dict:
    """Audit every case and print the verdicts; returns the reports and the missing factor."""
    console = open_console(config, console)
    if len(config.sizes) < 2:
        raise SystemExit(
            f"--sizes {' '.join(map(str, config.sizes))}; expected at least 2, those of the inputs and of the outputs"
        )
    with jax.enable_x64(True):
        params, x, y = example(config)
        with console.status("auditing"):
            reports = {name: audit(case, params, x, y) for name, case in CASES.items()}
        factor = {name: np.asarray(value) for name, value in missing_factor(params, x, y).items()}
        grads, _ = recursion(CASES["step in the hidden layers, slope 0"], params, x, y)
        largest = {layer: max(float(abs(g).max()) for g in grads[layer].values()) for layer in params}

    table = Table("output, cost", "the recursion", "first wrong", "what the audit says", box=SIMPLE)
    for name, report in reports.items():
        table.add_row(name, "passes" if report.ok else "[bold]rejected", report.first_wrong, escape(cause(report)))
    console.print("The texts' recursion with δ[L] = A − y and σ′ in the loop, unless it is said", table)

    table = Table(*factor, box=SIMPLE)
    for row in list(zip(*(value.ravel() for value in factor.values()), strict=True))[:4]:
        table.add_row(*(f"{value:.9f}" for value in row))
    console.print(
        f"sigmoid, squared error: the gradient of z{len(params)}, its first entries of {y.size}. The texts' δ[L] lacks "
        "the factor 2 σ′(z); with it the recursion passes (δ[L] corrected)",
        table,
    )
    sizes = ", ".join(f"{layer} {size:.2g}" for layer, size in largest.items())
    console.print(
        f"Through the step nothing comes back: the largest gradient in {sizes}. The audit passes that zero, since the "
        "cost is flat there, and rejects σ′ in its place, which is no gradient of this cost."
    )
    return {"reports": reports, "factor": factor, "through the step": largest}


if __name__ == "__main__":
    main(run, Config)
