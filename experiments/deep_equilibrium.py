"""A layer that is a fixed point, z = f(z, x), and its backward by the implicit function theorem.

    python -m experiments.deep_equilibrium
    python -m experiments.deep_equilibrium --epochs 0         the audits and the costs alone
    python -m experiments.deep_equilibrium --free             weights that need not shrink distances

A deep equilibrium layer (Bai et al., arXiv:1909.01377) applies one inner layer until its output no longer changes. The
gradient of that point does not need the way to it: with ``u = dy + (∂f/∂z)ᵀ u``, solved by the same iteration, it is
the inner layer's own backward at z, given u in the place of dy. `deep_equilibrium` is that layer, around any inner one
that takes ``(z, x)`` and returns another z. Its forward is a scan of at most ``limit`` steps which stands still once
every example is at rest, so that autodiff differentiates the steps that were made; the backward by hand knows of none.

- The audit passes it. A backward that takes u = dy, without solving (which has a name and trains: Jacobian-free
  backpropagation, Fung et al., arXiv:2103.12803), is rejected, as "truncated through time"; in a model of three layers
  the audit names ``equilibrium``.
- The two right gradients differ by what is not yet settled: by 2e-2 of the largest entry at a tolerance of 0.1 (4
  steps), by 1e-9 at 1e-8 (20 steps), by rounding at 1e-14 (34 steps).
- By hand a gradient holds 75 kB, whatever the limit is, and takes 0.3 ms; by autodiff it holds 1.4, 5.1 and 20 MB with
  limits of 25, 100 and 400, a place for each step that could be made, and takes 0.6, 1.3 and 6.5 ms.
- On the 8×8 digits both learn the same (test accuracy 0.960 after 20 epochs), and so does u = dy (0.966): that a loss
  falls does not say that a gradient is right. The trained layer is at rest after 76 steps, the first one after 16.

The weights that train have σ = 1 (`fnet.layers.spectral_norm`), so that the layer shrinks distances. With ``--free``
some examples do not come to rest in the third epoch; they are NaN, and so is the loss: what has not converged is not
handed on.

Legend: B examples, F features of z and x.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fnet
from experiments.common import main, open_console
from experiments.options import Amounts, Count, Counts, Positive, Seeded, Whole
from fnet.core.checks import require_counts, require_layer
from fnet.core.numerics import stream
from fnet.layers import concatenate, dense, serial, spectral_norm, tanh
from fnet.layers.children import backward_child, forward_child, init_child, unwatched
from fnet.layers.combinators import output_shape, require_like
from fnet.layers.initializers import normal
from fnet.metrics import accuracy
from fnet.types import Layer


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Audit a deep equilibrium layer, measure what its two gradients cost, and train with it."""

    features: Count = 32  # F
    limit: Count = 100  # steps at most, forward and backward
    batch_size: Count = 64  # B, of the costs and of the training
    limits: Counts = (25, 100, 400)  # of the costs
    tolerances: Amounts = (1e-1, 1e-2, 1e-4, 1e-8, 1e-14)  # of the difference between the engines
    learning_rate: Positive = 3e-3
    epochs: Whole = 20  # of the training, by each of three gradients; 0 leaves it out
    test_size: Count = 500
    free: bool = False  # train weights as they are, not divided by their largest singular value


# --- the layer -------------------------------------------------------------------------------------------------------


def fixed_point(f, z, tolerance, limit: int):
    """The ``z (B, ...)`` with ``z = f(z)``, by applying f from a first z on, and the number of steps.

    An example is at rest when no entry moved by more than ``tolerance`` times its largest (16 roundings of the dtype
    for None). When all are, nothing moves any more; what is not at rest after ``limit`` steps is NaN.
    """
    tolerance = 16 * float(jnp.finfo(z.dtype).eps) if tolerance is None else tolerance
    axes = tuple(range(1, z.ndim))

    def move(carry):
        z, _, steps = carry
        after = f(z)
        largest = jnp.abs(after).max(axes, keepdims=True)
        at_rest = (jnp.abs(after - z) <= jnp.asarray(tolerance, z.dtype) * largest).all(axes)  # never of NaN
        return after, at_rest, steps + 1

    def once(carry, _):
        return jax.lax.cond(carry[1].all(), lambda carry: carry, move, carry), None

    start = (z, jnp.zeros(len(z), bool), jnp.zeros((), jnp.int32))
    (z, at_rest, steps), _ = jax.lax.scan(once, start, length=limit)
    # a factor and no selection, so that gradients are NaN too
    return z * jnp.where(at_rest, 1, jnp.nan).astype(z.dtype).reshape(-1, *(1,) * len(axes)), steps


def deep_equilibrium(inner: Layer, *, tolerance=None, limit: int = 100) -> Layer:
    """``y = z`` with ``z = f(z, x)``: ``x (B, ...)`` to ``y`` alike, ``f`` the ``inner`` layer of pairs ``(z, x)``.

    `fixed_point` finds z from 0 on, and says by NaN which examples have found none; ``params`` and ``state`` are
    ``{"inner": ...}``. ``f`` should shrink distances between z's; then there is one z, and u.
    """
    require_layer("deep_equilibrium: inner", inner)
    require_counts("deep_equilibrium", limit=limit)

    def init(key, x):
        params, state = init_child("inner", inner, key, (x, x))
        require_like(x, output_shape(inner, params, state, (x, x)))
        return {"inner": params}, {"inner": state}

    def forward(params, state, x, *, key=None, train=False):
        def f(z):
            return forward_child("inner", inner, params["inner"], state["inner"], (z, x), key=key, train=train)

        with unwatched():
            z, _ = fixed_point(lambda z: f(z)[0], jnp.zeros_like(x), tolerance, limit)
        y, new_state, residuals = f(z)
        return y, {"inner": new_state}, residuals

    def backward(params, residuals, dy):
        # z = f(z, x), so dz = ∂f/∂z dz + ∂f/∂θ dθ + ∂f/∂x dx, and Σ dy dz = Σ u (∂f/∂θ dθ + ∂f/∂x dx) with
        # u = (1 − ∂f/∂z)⁻ᵀ dy, which is u = dy + (∂f/∂z)ᵀ u: the inner layer's gradients at z for u in dy's place
        def f(u):
            return backward_child("inner", inner, params["inner"], residuals, u)

        with unwatched():
            u, _ = fixed_point(lambda u: dy + f(u)[1][0], dy, tolerance, limit)
        dparams, (_, dx) = f(u)
        return {"inner": dparams}, dx

    return Layer("deep_equilibrium", init, forward, backward, (("inner", inner),))


def forgetful(inner: Layer, **options) -> Layer:
    """The same with a wrong backward: u is dy, as if z on the right of ``z = f(z, x)`` were a constant."""

    def backward(params, residuals, dy):
        dparams, (_, dx) = inner.backward(params["inner"], residuals, dy)
        return {"inner": dparams}, dx

    return deep_equilibrium(inner, **options)._replace(backward=backward)


def cell(projection: Layer) -> Layer:
    """``tanh([z x] W + b)`` with W and b the parameters of a dense layer, the ``projection``."""
    return serial(concatenate(), projection, tanh())


def network(equilibrium: Layer, features: int, classes: int = 10) -> Layer:
    """A dense layer, the equilibrium, a dense layer."""
    return serial(("in", dense(features)), ("equilibrium", equilibrium), ("out", dense(classes)))


# --- what is measured ------------------------------------------------------------------------------------------------


def audit(config: Config) -> dict[str, fnet.gradcheck.Report]:
    """The right layer and the wrong one, by themselves and in a model."""
    rng, key = np.random.default_rng(config.seed), jax.random.key(config.seed)
    inner = cell(dense(4, weights=normal(0.2)))
    x = rng.standard_normal((3, 4)).astype(np.float32)
    batch = fnet.Batch(x, rng.integers(0, 3, 3))
    options, reports = {"key": key, "precisions": (), "cost": False}, {}
    for name, make in (("solved", deep_equilibrium), ("u = dy", forgetful)):
        layer = make(inner, limit=config.limit)
        reports[name] = fnet.check_layer(layer, x, **options)
        model = network(layer, 4, 3)
        reports[f"{name}, in a model"] = fnet.check_model(model, fnet.softmax_cross_entropy, batch, **options)
    return reports


def engines_apart(config: Config) -> dict[float, tuple[int, float]]:
    """For each tolerance the steps, and the largest difference of the two gradients relative to the largest entry."""
    found, inner = {}, cell(spectral_norm(dense(config.features)))
    with jax.enable_x64(True):
        key = jax.random.key(config.seed)
        x, dy = jax.random.normal(stream(key, "x"), (2, config.batch_size, config.features), float)
        params, state = deep_equilibrium(inner).init(key, x)
        for tolerance in config.tolerances:
            layer = deep_equilibrium(inner, tolerance=tolerance, limit=config.limit)

            @jax.jit
            def both(params, x, layer=layer):
                y, pull, residuals = jax.vjp(lambda p, x: layer.forward(p, state, x)[::2], params, x, has_aux=True)
                return layer.backward(params, residuals, dy), pull(dy), y

            by_hand, by_autodiff, _ = both(params, x)
            a, b = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (by_hand, by_autodiff))
            steps = steps_of(inner, params, state, x, tolerance, config.limit)
            found[tolerance] = (steps, float(jnp.abs(a - b).max() / jnp.abs(b).max()))
    return found


def steps_of(inner: Layer, params, state, x, tolerance, limit: int) -> int:
    """The steps that the forward makes until all examples are at rest."""

    @jax.jit
    def count(params, x):
        f = lambda z: inner.forward(params["inner"], state["inner"], (z, x))[0]  # noqa: E731
        return fixed_point(f, jnp.zeros_like(x), tolerance, limit)[1]

    return int(count(params, x))


def costs(config: Config) -> dict[tuple[int, str], tuple[int, float]]:
    """For each limit and engine what its gradient holds beside arguments and results in bytes, and milliseconds."""
    key, found = jax.random.key(config.seed), {}
    x = jax.random.normal(stream(key, "x"), (config.batch_size, config.features))
    data = fnet.Batch(x, jnp.arange(config.batch_size) % 10)
    for limit in config.limits:
        model = network(deep_equilibrium(cell(spectral_norm(dense(config.features))), limit=limit), config.features)
        params, state = fnet.init(model, key, x)
        for name, engine in (("by hand", fnet.backprop), ("by autodiff", fnet.autodiff)):
            gradient = jax.jit(engine(model, fnet.softmax_cross_entropy)).lower(params, state, data, key).compile()
            seconds = []
            for _ in range(20):
                start = time.perf_counter()
                jax.block_until_ready(gradient(params, state, data, key))
                seconds.append(time.perf_counter() - start)
            memory: Any = gradient.memory_analysis()
            found[limit, name] = (memory.temp_size_in_bytes, 1e3 * float(np.median(seconds)))
    return found


def train(config: Config) -> dict[str, dict]:
    """The digits by three gradients from one start: losses by epoch, test accuracy, steps to rest before and after."""
    digits, key, found = fnet.data.sklearn_digits(), jax.random.key(config.seed), {}
    order = np.random.default_rng(config.seed).permutation(len(digits.targets))
    test, data = (fnet.data.take(digits, part) for part in np.split(order, [config.test_size]))
    projection = dense(config.features)
    inner = cell(projection if config.free else spectral_norm(projection))
    right, wrong = (network(make(inner, limit=config.limit), config.features) for make in (deep_equilibrium, forgetful))
    params, state = fnet.init(right, key, data.inputs[:1])

    def steps(ts):
        x = fnet.apply(dense(config.features), ts.params["in"], (), test.inputs)
        return steps_of(inner, ts.params["equilibrium"], ts.state["equilibrium"], x, None, config.limit)

    for name, engine, model in (
        ("by hand", fnet.backprop, right),
        ("by autodiff", fnet.autodiff, right),
        ("u = dy", fnet.backprop, wrong),
    ):
        optimizer = fnet.adam(config.learning_rate)
        step = fnet.make_step(engine(model, fnet.softmax_cross_entropy), optimizer)
        start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
        run = jax.jit(partial(fnet.train, step, epochs=config.epochs, batch_size=config.batch_size))
        ts, metrics, _ = run(start, data)
        evaluate = fnet.make_evaluate(right, fnet.softmax_cross_entropy, {"accuracy": accuracy})
        losses = fnet.Mean(metrics["loss"].sum.sum(1), metrics["loss"].count.sum(1)).value
        found[name] = {
            "loss": np.asarray(losses),
            "accuracy": float(evaluate(ts.params, ts.state, test)["accuracy"].value),
            "steps": (steps(start), steps(ts)),
        }
    return found


# --- the run ---------------------------------------------------------------------------------------------------------


def run(config: Config, console: Console | None = None) -> dict:
    """Audit, measure, train and print; returns what was found."""
    console = open_console(config, console)
    with console.status("auditing"):
        reports = audit(config)
    with console.status("measuring"):
        apart, cost = engines_apart(config), costs(config)
    with console.status("training"):
        trained = train(config) if config.epochs else {}

    table = Table("backward", "verdict", "first wrong", "what the audit says", box=SIMPLE)
    for name, report in reports.items():
        wrong = [leaf for leaf in report.leaves if leaf.verdict == "wrong"]
        cause = next((leaf.cause for leaf in wrong if leaf.cause), "")
        first = report.first_wrong or (wrong[0].path if wrong else "")
        table.add_row(name, "passes" if report.ok else "[bold]rejected", first, escape(cause))
    console.print("The audit", table)

    table = Table("tolerance", "steps", "by hand − by autodiff", box=SIMPLE)
    for tolerance, (steps, difference) in apart.items():
        table.add_row(f"{tolerance:.0e}", str(steps), f"{difference:.1e}")
    console.print("The steps' gradient against the point's, relative to the largest entry, in float64", table)

    table = Table("limit", "gradient", "memory", "time", box=SIMPLE)
    for (limit, name), (memory, milliseconds) in cost.items():
        table.add_row(str(limit), name, f"{memory:,} B", f"{milliseconds:.2f} ms")
    console.print("What a gradient costs; the loop stands still long before its limit", table)

    if trained:
        table = Table("gradient", "loss, first epoch", "last", "test accuracy", "steps, before and after", box=SIMPLE)
        for name, r in trained.items():
            steps = " and ".join(map(str, r["steps"]))
            table.add_row(name, f"{r['loss'][0]:.4f}", f"{r['loss'][-1]:.4f}", f"{r['accuracy']:.3f}", steps)
        console.print("Trained on the 8×8 digits", table)
    return {"reports": reports, "apart": apart, "cost": cost, "trained": trained}


if __name__ == "__main__":
    main(run, Config)
