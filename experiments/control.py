"""Control (S16): a small network learns to balance a pole on a cart through the simulation itself, beside an LQR.

    python -m experiments.control
    python -m experiments.control --force 8 --horizon 40
    python -m experiments.control --seeds 3 4 5

The simulation is a `lax.scan` of the equations of motion, so the cost of a flight is a plain function of the policy's
parameters, and `fnet.from_loss` differentiates it through time. Both policies are bounded by ±force, and both pay

    J = Σ_{t<T} (x_tᵀ Q x_t + R u_t²) + x_Tᵀ P x_T,

where P solves the Riccati equation of the dynamics linearised upright. There, without the bound, u = −K x is the best
policy over any horizon T and pays x_0ᵀ P x_0, so J is given in units of that. The network trains on short flights and
is tested on long ones, from starts that it has not seen. From near starts it can hardly do better than the LQR; from
far ones, up to 4 m along the track, the LQR asks for more force than there is and drops the pole more often.

An audit (`fnet.check_gradients`) holds the gradient through a short flight against slopes measured in float64.

Legend: B flights, T time steps; x the state: position m, angle rad (0 is upright), their velocities; u the force N.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import Amount, Count, InFolder, Positive, Seeds, Widths
from experiments.pictures.parts import DOTTED, mean_and_spread
from fnet.core.numerics import stream
from fnet.layers import tanh
from fnet.layers.initializers import lecun_normal
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure

CART, POLE, HALF_LENGTH, GRAVITY = 1.0, 0.1, 0.5, 9.8  # kg, kg, m, m/s²: Barto, Sutton and Anderson, 1983
Q, R = np.diag([1.0, 10.0, 0.1, 0.1]), 0.01  # what a metre, a radian, their velocities and a newton cost, squared
FAR = np.array([4.0, 0.2, 0.5, 0.5])  # starts are drawn up to ± this, near ones up to a tenth of it
SHOWN = (0.5, 2.0, 4.0)  # m: the starts from rest of the picture


@dataclasses.dataclass(frozen=True)
class Config(InFolder):
    """Train a policy through a differentiable cart-pole and compare it with an LQR on the same cost."""

    hidden: Widths = (32,)  # widths of the policy's hidden layers, tanh after each
    force: Positive = 10.0  # N, the bound of both policies
    dt: Positive = 0.04  # s, a step of the simulation
    horizon: Count = 30  # steps of a flight in training
    test_horizon: Count = 150  # steps of a flight in the test
    starts: Count = 512  # to train on; as many near and as many far ones to test on
    batch_size: Count = 64
    epochs: Count = 250
    learning_rate: Amount = 5e-3  # Adam's at the start; it falls to 0 along half a cosine
    seeds: Seeds = (0, 1, 2)  # of the parameters, the starts and their order; all train in one program


# --- the system ------------------------------------------------------------------------------------------------------


def advance(x, u, dt):
    """The state ``(..., 4)`` after ``dt`` under the force ``u (...)``, without friction: a semi-implicit Euler step."""
    angle, spin = x[..., 1], x[..., 3]
    sin, cos, mass = jnp.sin(angle), jnp.cos(angle), CART + POLE
    push = (u + POLE * HALF_LENGTH * spin**2 * sin) / mass
    turn = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - POLE * cos**2 / mass))
    slide = push - POLE * HALF_LENGTH * turn * cos / mass
    velocity = x[..., 2:] + dt * jnp.stack([slide, turn], -1)
    return jnp.concatenate([x[..., :2] + dt * velocity, velocity], -1)


def linearised(dt) -> tuple[np.ndarray, np.ndarray]:
    """``A (4, 4)`` and ``B (4, 1)`` of x' ≈ A x + B u, upright and at rest, in float64."""
    with jax.enable_x64(True):
        a, b = jax.jacfwd(partial(advance, dt=dt), argnums=(0, 1))(jnp.zeros(4), jnp.zeros(()))
    return np.asarray(a), np.asarray(b)[:, None]


def riccati(a, b, q, r, tolerance=1e-13) -> tuple[np.ndarray, np.ndarray]:
    """The gain ``K`` of the linear-quadratic regulator and its cost ``P``, by the Riccati recursion from P = Q.

    K = (R + Bᵀ P B)⁻¹ Bᵀ P A and P ← Q + Aᵀ P (A − B K), until P changes by less than ``tolerance`` of itself.
    """
    p = q
    for _ in range(100_000):
        k = np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
        p, old = q + a.T @ p @ (a - b @ k), p
        if np.abs(p - old).max() <= tolerance * np.abs(p).max():
            return k, p
    raise ArithmeticError("the Riccati recursion does not settle: is (A, B) stabilisable?")


# --- policies and flights --------------------------------------------------------------------------------------------


def make_network(config: Config) -> fnet.Layer:
    """From the state to the force before it is bounded, in units of the bound."""
    return fnet.mlp(*config.hidden, 1, activation=tanh(), weights=lecun_normal())


def learned(config: Config, params, state):
    """u = force · tanh(network(x))."""
    model = make_network(config)
    return lambda x: config.force * jnp.tanh(fnet.apply(model, params, state, x)[..., 0])


def regulator(config: Config, gain):
    """u = −K x, cut off at ±force."""
    return lambda x: jnp.clip(-(x @ jnp.asarray(gain, x.dtype)), -config.force, config.force)


def quadratic(matrix, x):
    """xᵀ M x of each state, ``(...)``."""
    return ((x @ jnp.asarray(matrix, x.dtype)) * x).sum(-1)


def fly(policy, start, steps: int, dt, final):
    """The cost ``(B,)`` of flights from ``start (B, 4)``, their states ``(T + 1, B, 4)`` and forces ``(T, B)``."""

    def one(x, _):
        u = policy(x)
        return advance(x, u, dt), (x, u, quadratic(Q, x) + R * u**2)

    last, (states, forces, costs) = jax.lax.scan(one, start, length=steps)
    return costs.sum(0) + quadratic(final, last), jnp.concatenate([states, last[None]]), forces


def draw_starts(config: Config, key) -> dict[str, jax.Array]:
    """Starts ``(N, 4)`` to train on, of all sizes up to FAR, and near and far ones to test on."""
    keys, shape = {name: stream(key, name) for name in ("size", "train", "near", "far")}, (config.starts, 4)
    box = {name: jax.random.uniform(keys[name], shape, minval=-1.0, maxval=1.0) * FAR[None] for name in list(keys)[1:]}
    size = jax.random.uniform(keys["size"], (config.starts, 1), minval=0.05)
    return {"train": box["train"] * size, "near": box["near"] * 0.1, "far": box["far"]}


def flight_loss(config: Config, state, final, params, batch: fnet.Batch, key=None):
    """The mean of log J / x_0ᵀ P x_0, in which near and far starts weigh alike; a function for `fnet.from_loss`."""
    cost, _, _ = fly(learned(config, params, state), batch.inputs, config.horizon, config.dt, final)
    return jnp.log(cost / batch.targets).mean()


def train_policy(config: Config, final, key, starts):
    """A whole run as a function of its key and its starts: the parameters and the loss of each update, (E, S)."""
    params, state = make_network(config).init(stream(key, "model"), starts[:1])
    updates = config.epochs * -(-config.starts // config.batch_size)
    optimizer = fnet.adam(fnet.schedules.cosine(config.learning_rate, updates))
    step = fnet.make_step(fnet.from_loss(partial(flight_loss, config, state, final)), optimizer)
    ts = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    data = fnet.Batch(starts, quadratic(final, starts))
    ts, metrics, _ = fnet.train(step, ts, data, epochs=config.epochs, batch_size=config.batch_size)
    return ts.params, metrics["loss"].value


def judge(policy, config: Config, starts, final) -> dict[str, jax.Array]:
    """Of test flights: J / x_0ᵀ P x_0, and whether the pole fell past the horizontal, each ``(B,)``."""
    cost, states, _ = fly(policy, starts, config.test_horizon, config.dt, final)
    return {"ratio": cost / quadratic(final, starts), "fell": (jnp.abs(states[..., 1]) > math.pi / 2).any(0)}


def run(config: Config, console: Console | None = None) -> dict:
    """Solve, audit, train, compare and draw; returns what was measured, by policy and kind of start."""
    console = open_console(config, console)
    folder = new_run_folder(config, "control")
    a, b = linearised(config.dt)
    gain, final = riccati(a, b, Q, np.array([[R]]))
    poles = np.abs(np.linalg.eigvals(a - b @ gain)).max(), np.abs(np.linalg.eigvals(a)).max()
    console.print(
        f"LQR: K = {np.round(gain[0], 2)}, spectral radius {poles[0]:.3f} (without control {poles[1]:.3f})",
        highlight=False,
    )

    keys = jax.vmap(jax.random.key)(jnp.array(config.seeds))
    starts = jax.jit(jax.vmap(partial(draw_starts, config)))(keys)
    model, short = make_network(config), dataclasses.replace(config, horizon=10)
    params, state = fnet.init(model, keys[0], starts["train"][0])
    some = starts["train"][0, :4]
    audited = partial(flight_loss, short, state, final)
    with console.status("auditing the gradient through 10 steps of the simulation"):
        audit = fnet.check_gradients(
            audited, params, fnet.Batch(some, quadratic(final, some)), precisions=(), cost=False
        )
    verdicts = ", ".join(f"{leaf.path} {leaf.verdict}" for leaf in audit.leaves)
    power = max(leaf.power for leaf in audit.leaves)
    console.print(f"audit of the gradient through 10 steps: {verdicts}; faults above {power:.0e} would have been seen")

    def member(key, starts):
        params, losses = train_policy(config, final, key, starts["train"])
        policies = {"network": learned(config, params, state), "LQR": regulator(config, gain[0])}
        tests = {
            (name, kind): judge(policy, config, starts[kind], final)
            for name, policy in policies.items()
            for kind in ("near", "far")
        }
        return params, losses, tests

    with console.status(f"{len(config.seeds)} seeds, {config.epochs} epochs each, in one program"):
        params, losses, tests = jax.device_get(jax.jit(jax.vmap(member))(keys, starts))

    results = {}
    for (name, kind), test in tests.items():
        ratio = np.exp(np.log(test["ratio"].astype(np.float64)).mean(1))  # (seeds,)
        results[name, kind] = {"cost": ratio, "median": np.median(test["ratio"], 1), "fell": test["fell"].mean(1)}
    rows = {
        f"{kind} starts: {title}": {
            name: mean_and_spread(results[name, kind][what], form) for name in ("network", "LQR")
        }
        for kind in ("near", "far")
        for what, title, form in (
            ("cost", "J / x₀ᵀPx₀, geometric mean", ".4f"),
            ("median", "J / x₀ᵀPx₀, median", ".4f"),
            ("fell", "dropped the pole", ".1%"),
        )
    }
    title = f"{config.starts} unseen starts of each kind, flights of {config.test_horizon * config.dt:g} s"
    console.print(engine_table(f"{title}: mean ± spread of {len(config.seeds)} seeds", rows))
    first = learned(config, jax.tree.map(lambda leaf: leaf[0], params), state)
    draw({"network": first, "LQR": regulator(config, gain[0])}, config, final, losses, folder / "flights.png")
    excess = results["network", "near"]["cost"] / results["LQR", "near"]["cost"] - 1
    dropped = [results[name, "far"]["fell"].mean() for name in ("network", "LQR")]
    console.print(
        f"near, the network pays {excess.mean():+.2%} ± {excess.std():.2%} of the LQR's cost (expected within 1%); "
        f"far, it drops {dropped[0]:.1%} of the poles, the LQR {dropped[1]:.1%} (expected: at most half)",
        highlight=False,
        soft_wrap=True,
    )
    say_written(console, folder)
    return {
        "gain": gain,
        "final": final,
        "audit": audit,
        "losses": losses,
        "params": params,
        "results": results,
        "folder": folder,
    }


def draw(policies: dict, config: Config, final, losses, path: Path) -> None:
    """Flights from rest at some distances by both policies, up to where a pole falls; and the loss by epoch."""
    figure, axes = new_figure(2, rows=2, height=3.4, width=5.6)
    starts, t = jnp.zeros((len(SHOWN), 4)).at[:, 0].set(jnp.array(SHOWN)), np.arange(config.test_horizon + 1)
    time, panels = t * config.dt, axes.ravel()
    for name, style in {"network": "-", "LQR": "--"}.items():
        _, states, forces = jax.device_get(fly(policies[name], starts, config.test_horizon, config.dt, final))
        for i, metres in enumerate(SHOWN):
            past = np.abs(states[:, i, 1]) > math.pi / 2
            end = int(past.argmax()) + 1 if past.any() else len(t)
            label = f"{name}, {metres:g} m" + (": dropped" if past.any() else "")
            for ax, curve in zip(panels, (states[:, i, 0], np.degrees(states[:, i, 1]), forces[:, i]), strict=False):
                ax.plot(time[: len(curve)][:end], curve[:end], style, color=f"C{i}", linewidth=1.4, label=label)
                if past.any():
                    ax.plot(time[end - 1], curve[end - 1], "x", color=f"C{i}", markersize=8)
    panels[3].plot(np.arange(1, losses.shape[1] + 1), np.exp(losses.mean(2)).T, color="C4", linewidth=1)
    panels[0].set(xlabel="seconds", ylabel="position, m", title="from rest, upright, off the middle")
    panels[1].set(xlabel="seconds", ylabel="angle, degrees", title="angle (a cross: the pole has fallen)")
    panels[2].set(xlabel="seconds", ylabel="force, N", title=f"force, bounded by ±{config.force:g} N")
    panels[3].set(
        xlabel="epoch",
        ylabel="J / x₀ᵀPx₀",
        yscale="log",
        title=f"training, {len(losses)} seeds: flights of {config.horizon * config.dt:g} s",
    )
    panels[3].axhline(1, **DOTTED, label="the LQR on the linearised cart")
    panels[3].legend(fontsize="x-small")
    panels[0].legend(fontsize="x-small", ncols=2)
    for ax in panels:
        ax.grid(alpha=0.3)
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
