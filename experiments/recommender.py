"""Recommendation (S16): ratings by matrix factorisation, as a plain function and as a layer with its backward by hand.

    python -m experiments.recommender
    python -m experiments.recommender --noise 1.0 --epochs 80
    python -m experiments.recommender --seeds 3 4 5

A rating is mean + user's bias + item's bias + p_u · q_i + noise, of a rank that is known here; a share of the entries
is seen, and a fifth of those is held out. The model's parameters are two tables, ``(U, 1 + K)`` and ``(I, 1 + K)``: a
bias and K factors for each user and item. They are trained by autodiff of a plain loss (`fnet.from_loss`: the layers
are offered, never required), and at the true rank once more, from the same start and with the same batches, as a
`Layer` written below.

A factor that starts at 0 in both tables stays 0, since the gradient of each is a multiple of the other. So ranks from 0
to K are one program: `jax.vmap` over ranks and seeds. Rank 0 is the baseline of biases alone.

What can be reached: of n entries least squares fits d free numbers, and a held-out entry then errs by about
σ √(1 + d / n), where σ is the noise; d = U + I − 1 + r (U + I − r) at the true rank r. The true matrix errs by σ.

Legend: U users, I items, K factors, N entries, B entries of a batch, r the rank.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import Amount, Count, InFolder, Seeds, Share, Whole, Wholes
from experiments.pictures.parts import grid_and_legend, mean_and_spread
from fnet.core.numerics import stream
from fnet.layers import stateless
from fnet.losses import squared_error
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure


@dataclasses.dataclass(frozen=True)
class Config(InFolder):
    """Factorise seeded ratings of known rank, at several ranks at once, by autodiff and by hand."""

    users: Count = 300
    items: Count = 200
    rank: Whole = 4  # of the ratings, beside the biases
    noise: Amount = 0.5  # standard deviation; the biases' is 0.5 each and that of p_u · q_i is 1
    seen: Share = 0.3  # the share of all entries that has a rating
    held_out: Share = 0.2  # the share of the ratings that is tested on
    ranks: Wholes = (0, 2, 4, 6)  # of the models
    learning_rate: Amount = 0.03  # Adam's at the start; it falls to 0 along half a cosine
    batch_size: Count = 600
    epochs: Count = 50
    seeds: Seeds = (0, 1, 2)  # of the ratings, the split, the start and the order


# --- the ratings -----------------------------------------------------------------------------------------------------


class Ratings(NamedTuple):
    """``inputs (N, 2)`` are a user and an item, ``targets (N,)`` the rating less the training part's mean."""

    training: fnet.Batch
    test: fnet.Batch
    truth: np.ndarray  # (U, I): the ratings without noise, less the same mean
    mean: float


def make_ratings(config: Config, seed: int) -> Ratings:
    """Seeded ratings, in two parts that share no entry."""
    random = np.random.default_rng(seed)
    p, q = random.normal(size=(config.users, config.rank)), random.normal(size=(config.items, config.rank))
    biases = 0.5 * random.normal(size=(config.users, 1)), 0.5 * random.normal(size=(1, config.items))
    truth = 3.5 + biases[0] + biases[1] + p @ q.T / max(config.rank, 1) ** 0.5
    entries = random.permutation(truth.size)[: round(config.seen * truth.size)]
    pairs = np.stack(np.unravel_index(entries, truth.shape), 1).astype(np.int32)
    ratings = truth.ravel()[entries] + config.noise * random.normal(size=len(entries))
    cut = round(config.held_out * len(entries))
    if not 0 < cut < len(entries):
        raise ValueError(
            f"seen = {config.seen}, held_out = {config.held_out}: {len(entries) - cut} ratings to train on, {cut} held "
            "out; expected some of each"
        )
    mean = ratings[cut:].mean()
    centred = (ratings - mean).astype(np.float32)
    test, training = (fnet.Batch(pairs[part], centred[part]) for part in (slice(cut), slice(cut, None)))
    return Ratings(training, test, truth - mean, float(mean))


def least_squares_biases(config: Config, training: fnet.Batch) -> tuple[np.ndarray, np.ndarray]:
    """The biases ``(U,)`` and ``(I,)`` of least squares, by NumPy."""
    n, (user, item) = len(training.targets), np.asarray(training.inputs).T
    design = np.zeros((n, config.users + config.items))
    design[np.arange(n), user] = design[np.arange(n), config.users + item] = 1
    normal, right = design.T @ design, design.T @ np.asarray(training.targets, np.float64)
    biases = np.linalg.lstsq(normal, right, rcond=None)[0]  # a constant may move from users to items: least norm
    return biases[: config.users], biases[config.users :]


# --- the model, twice ------------------------------------------------------------------------------------------------


def predict(params, pairs):
    """The ratings ``(B,)`` of ``pairs (B, 2)``: b_u + b_i + p_u · q_i, where column 0 of a table holds the biases."""
    user, item = params["users"][pairs[:, 0]], params["items"][pairs[:, 1]]
    return user[:, 0] + item[:, 0] + (user[:, 1:] * item[:, 1:]).sum(-1)


def plain_loss(params, batch: fnet.Batch, key):
    """The mean squared error, for `fnet.from_loss`."""
    return jnp.square(predict(params, batch.inputs) - batch.targets).mean()


def draw_tables(config: Config, factors: int, key):
    """Biases of 0 and small random factors."""
    small = {name: 0.1 * jax.random.normal(stream(key, name), (getattr(config, name), factors)) for name in TABLES}
    return {name: jnp.concatenate([jnp.zeros((len(p), 1)), p], 1) for name, p in small.items()}


TABLES = ("users", "items")


def factorisation(config: Config, factors: int) -> fnet.Layer:
    """The same as a layer: ``pairs (B, 2)`` of integers to ratings ``(B,)``."""

    def forward(params, pairs):
        user, item = params["users"][pairs[:, 0]], params["items"][pairs[:, 1]]
        return user[:, 0] + item[:, 0] + (user[:, 1:] * item[:, 1:]).sum(-1), (pairs, user, item)

    def backward(params, residuals, dy):
        # y_n = b_u + b_i + p_u · q_i:  ∂y/∂(b_u, p_u) = (1, q_i) and ∂y/∂(b_i, q_i) = (1, p_u);
        # a row of a table is the sum over the entries n that read it
        pairs, user, item = residuals
        by_user, by_item = dy[:, None] * item.at[:, 0].set(1), dy[:, None] * user.at[:, 0].set(1)
        return {
            "users": jnp.zeros_like(params["users"]).at[pairs[:, 0]].add(by_user),
            "items": jnp.zeros_like(params["items"]).at[pairs[:, 1]].add(by_item),
        }, None

    return stateless("factorisation", lambda key, pairs: draw_tables(config, factors, key), forward, backward)


def rmse(params, batch: fnet.Batch):
    """√ mean (rating − prediction)²."""
    return jnp.sqrt(plain_loss(params, batch, None))


def train_member(config: Config, gradient, rank, key, training: fnet.Batch, test: fnet.Batch):
    """A whole run as a function of its rank, its key and its data: the tables, and both errors by epoch ``(E,)``."""
    factors = max(config.ranks)
    params = draw_tables(config, factors, stream(key, "model"))
    params = jax.tree.map(lambda table: jnp.where(jnp.arange(factors + 1) <= rank, table, 0), params)
    updates = config.epochs * -(-training.targets.shape[0] // config.batch_size)
    optimizer = fnet.adam(fnet.schedules.cosine(config.learning_rate, updates))
    ts, _, errors = fnet.train(
        fnet.make_step(gradient, optimizer),
        fnet.init_train_state(params, optimizer, stream(key, "run")),
        training,
        epochs=config.epochs,
        batch_size=config.batch_size,
        evaluate=lambda params, state, part: rmse(params, part),
        validation={"training": training, "held out": test},
    )
    return ts.params, errors


def attainable(config: Config, entries: int) -> float:
    """σ √(1 + d / n) of the docstring."""
    free = config.users + config.items - 1 + config.rank * (config.users + config.items - config.rank)
    return config.noise * (1 + free / entries) ** 0.5


def run(config: Config, console: Console | None = None) -> dict:
    """Train at every rank, and at the true one by hand too, print the table, draw; returns what was measured."""
    console = open_console(config, console)
    folder = new_run_folder(config, "recommender")
    data = [make_ratings(config, seed) for seed in config.seeds]
    training, test = (jax.tree.map(lambda *a: jnp.asarray(np.stack(a)), *(d[i] for d in data)) for i in (0, 1))
    keys = jax.vmap(jax.random.key)(jnp.array(config.seeds))
    n = training.targets.shape[1]
    console.print(
        f"{config.users} users, {config.items} items, rank {config.rank}: {n:,} ratings to train on, "
        f"{test.targets.shape[1]:,} held out; {len(config.ranks)} ranks × {len(config.seeds)} seeds in one program"
    )

    layer = factorisation(config, max(config.ranks))
    engines = {"plain loss": fnet.from_loss(plain_loss), "layer, by hand": fnet.backprop(layer, squared_error)}
    ranks = {"plain loss": config.ranks, "layer, by hand": (config.rank,)}
    tables, errors = {}, {}
    for engine, gradient in engines.items():
        with console.status(engine):
            member = jax.vmap(partial(train_member, config, gradient), in_axes=(None, 0, 0, 0))
            program = jax.jit(jax.vmap(member, in_axes=(0, None, None, None)))
            tables[engine], errors[engine] = jax.device_get(program(jnp.array(ranks[engine]), keys, training, test))
    curves = {  # (seeds, E) of each part, by what was trained
        f"rank {rank}" + ("" if engine == "plain loss" else ", by hand"): {
            part: e[i] for part, e in errors[engine].items()
        }
        for engine in engines
        for i, rank in enumerate(ranks[engine])
    }

    def error_of(prediction):
        """The held-out error by seed of a function of a seed's ratings and pairs."""
        residuals = [np.asarray(d.test.targets) - prediction(d, *np.asarray(d.test.inputs).T) for d in data]
        return np.array([np.sqrt((r**2).mean()) for r in residuals])

    def biases(d, user, item):
        b, c = least_squares_biases(config, d.training)
        return b[user] + c[item]

    baselines = {
        "global mean": error_of(lambda d, user, item: 0.0),
        "biases, least squares": error_of(biases),
        "the true matrix: the noise": error_of(lambda d, user, item: d.truth[user, item]),
    }

    cell = partial(mean_and_spread, form=".4f")
    rows = {name: {"held out": cell(values)} for name, values in baselines.items()}
    for name, parts in curves.items():
        rows[name] = {part: cell(errors[:, -1]) for part, errors in parts.items()}
    console.print(engine_table(f"RMSE after {config.epochs} epochs: mean ± spread of {len(config.seeds)} seeds", rows))

    start = draw_tables(config, max(config.ranks), keys[0])
    batch = jax.tree.map(lambda a: a[0, : config.batch_size], training)
    grads = [jax.jit(gradient)(start, (), batch, keys[0])[0] for gradient in engines.values()]
    apart = max(float(np.abs(g - h).max() / np.abs(g).max()) for g, h in zip(*map(jax.tree.leaves, grads), strict=True))
    console.print(f"gradients of the layer by hand and of the plain loss differ by {apart:.1e} of their largest entry")
    floor, limit = baselines["the true matrix: the noise"], attainable(config, n)
    draw(errors["plain loss"], baselines, config, limit, folder / "ranks.png")
    best = curves[f"rank {config.rank}, by hand"]["held out"][:, -1]
    console.print(
        f"held-out RMSE {cell(best)} at rank {config.rank} (expected: {limit:.3f} within 3%), "
        f"{best.mean() / floor.mean():.3f} of the noise; biases alone {baselines['biases, least squares'].mean():.3f}, "
        f"global mean {baselines['global mean'].mean():.3f}",
        highlight=False,
        soft_wrap=True,
    )
    say_written(console, folder)
    return {"curves": curves, "baselines": baselines, "tables": tables, "errors": errors, "folder": folder}


def draw(errors, baselines, config: Config, limit: float, path: Path) -> None:
    """The errors by rank beside the baselines, and the held-out error by epoch."""
    figure, (left, right) = new_figure(2, height=4.6, width=5.6)
    for i, (part, curves) in enumerate(errors.items()):
        left.plot(config.ranks, curves[:, :, -1].mean(1), "o-", color=f"C{i}", markersize=4, label=part)
        left.plot(config.ranks, curves[:, :, -1], ".", color=f"C{i}", alpha=0.5, markersize=4)
    left.plot(config.rank, limit, "k+", label="σ √(1 + d / n)", markersize=12)
    for (name, values), style in zip(baselines.items(), ("--", "-.", ":"), strict=True):
        left.axhline(values.mean(), color="0.4", linestyle=style, linewidth=1, label=name)
    left.set(xlabel="factors of the model", ylabel="RMSE", title=f"ratings of rank {config.rank}, after training")
    for i, rank in enumerate(config.ranks):
        curves = errors["held out"][i]  # (seeds, E)
        right.plot(np.arange(1, curves.shape[1] + 1), curves.mean(0), color=f"C{i}", label=f"{rank} factors")
    right.axhline(baselines["the true matrix: the noise"].mean(), color="0.4", linestyle=":", linewidth=1)
    right.set(xlabel="epoch", ylabel="held-out RMSE", title="mean of the seeds by epoch (dotted: the noise)")
    for ax in (left, right):
        ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the legend
        grid_and_legend(ax, loc="upper right", ncols=2)
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
