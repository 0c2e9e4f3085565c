"""Self-supervised learning: an encoder learnt from noisy digits without labels, probed with few (the texts' S17).

    python -m experiments.denoising_autoencoder
    python -m experiments.denoising_autoencoder --mask 0.7 --epochs 60

A denoising autoencoder (Vincent et al., 2008) sees 3,500 MNIST digits, each time with half of its pixels set to 0 at
random, and restores the whole digit; no label takes part. Then its code is frozen, and a linear classifier on it (a
linear probe) learns from 10, 20 or 50 labelled digits of each class. The same probe reads the raw pixels, the code of
the same encoder before its training, and the principal components of the unlabelled digits, as many as the code has
entries.

Features are shifted and scaled by the mean and the one standard deviation of the unlabelled digits' features. The
probe's weight decay is chosen for each row and each number of labels by a validation part of 500 digits; the test part
of 1,000 is used once. The restored test digits' error stands beside that of the noisy ones as they are.

Legend: N digits, P pixels, H entries of the code, K classes, L labelled digits of a class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written, write_results
from experiments.options import Amount, Amounts, ByEngine, Count, Counts, InFolder, Seeds, Share, engine_of
from experiments.pictures.parts import Row, draw_rows, grid_and_legend, mean_and_spread, only_ticks
from fnet.core.numerics import stream
from fnet.layers import dense, freeze, identity, relu, serial, sigmoid, stateless
from fnet.layers.initializers import zeros
from fnet.layers.models import autoencoder, mlp
from fnet.losses import binary_cross_entropy, softmax_cross_entropy
from fnet.metrics import accuracy
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure
from fnet.types import Layer


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Train a denoising autoencoder on unlabelled digits, then a linear probe on its code."""

    code: Count = 256  # H, entries of the code
    mask: Share = 0.5  # probability with which a pixel is set to 0
    learning_rate: Amount = 1e-3  # Adam's, of the autoencoder
    batch_size: Count = 64
    epochs: Count = 30
    unlabelled: Count = 3500  # digits that the autoencoder sees; the labelled ones are among them
    validation: Count = 500  # digits that choose the probe's weight decay
    test: Count = 1000
    labels: Counts = (10, 20, 50)  # L, labelled digits of each class
    decays: Amounts = (0.001, 0.01, 0.1)  # of the probe's weights
    probe_updates: Count = 100  # full-batch, by Adam at 0.03
    seeds: Seeds = (0, 1, 2)  # of the split, the parameters and the noise


def load(config: Config, seed: int) -> tuple[fnet.Batch, fnet.Batch, fnet.Batch]:
    """Unlabelled (their labels are for the probe), validation and test digits."""
    digits = fnet.data.mnist_5k()
    sizes = (config.unlabelled, config.validation, config.test)
    rest = len(digits.targets) - sum(sizes)
    if rest < 0 or min(sizes) < 1:
        raise SystemExit(f"unlabelled, validation, test = {sizes}; expected at least 1 each, 5000 in all at most")
    parts = fnet.split(digits, (*sizes, rest) if rest else sizes, stream(jax.random.key(seed), "split"))
    return parts[0], parts[1], parts[2]


# --- the autoencoder -------------------------------------------------------------------------------------------------


def masked(x, rate: float, key):
    """``x`` with each pixel set to 0 with probability ``rate``."""
    return jnp.where(jax.random.bernoulli(key, rate, x.shape), 0, x)


def noisy(gradient, rate: float):
    """The engine on masked inputs, with the whole digits as its targets."""

    def with_noise(params, state, batch, key):
        inputs = masked(batch.inputs, rate, stream(key, "mask"))
        return gradient(params, state, batch._replace(inputs=inputs), key)

    return with_noise


def make_autoencoder(config: Config) -> Layer:
    return autoencoder(784, config.code)


def pretrain(config: Config, key, images):
    """Parameters before and after the training ``(2, ...)``, and the loss of each epoch; no label is given."""
    model, optimizer = make_autoencoder(config), fnet.adam(config.learning_rate)
    params, state = model.init(stream(key, "model"), images)
    step = fnet.make_step(noisy(engine_of(config)(model, binary_cross_entropy), config.mask), optimizer)
    start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    data = fnet.Batch(images, images)
    ts, losses, _ = fnet.train(step, start, data, epochs=config.epochs, batch_size=config.batch_size)
    return params, ts.params, losses["loss"].value.mean(1)


def restore(config: Config, params, x):
    """Digits ``(N, P)`` in 0..1 of noisy ones."""
    model = serial(("model", make_autoencoder(config)), ("pixels", sigmoid()))
    _, state = jax.eval_shape(model.init, jax.random.key(0), x)  # stateless layers: a tree without leaves
    return fnet.apply(model, {"model": params, "pixels": ()}, state, x)


# --- the probe -------------------------------------------------------------------------------------------------------


def standardized(features: Layer) -> Layer:
    """``(features(x) − center) / deviation`` with numbers among the parameters: `fit_features` finds them."""

    def init(key, x):
        return {"center": jnp.zeros(x.shape[1:], x.dtype), "deviation": jnp.ones((), x.dtype)}

    def forward(params, x):
        return (x - params["center"][None]) / params["deviation"], ()

    def backward(params, residuals, dy):  # dx = dy / deviation; the rest is fixed
        return jax.tree.map(jnp.zeros_like, params), dy / params["deviation"]

    return serial(("features", features), ("scale", stateless("scale", init, forward, backward)))


def fit_features(features: Layer, params, images):
    """Parameters of ``standardized(features)`` with which ``images`` have mean 0 and one standard deviation of 1."""
    model = standardized(features)
    fresh, state = model.init(jax.random.key(0), images)
    values = fnet.apply(model, {**fresh, "features": params}, state, images)  # (N, H)
    scale = {"center": values.mean(0), "deviation": (values - values.mean(0)[None]).std()}
    return {"features": params, "scale": scale}


def components(images, count: int):
    """The first ``count`` principal components of ``images (N, P)`` as the parameters of a dense layer."""
    center = images.mean(0)
    _, _, axes = jnp.linalg.svd(images - center[None], full_matrices=False)
    return {"w": axes[:count].T, "b": -(axes[:count] @ center)}


def few(data: fnet.Batch, count: int) -> fnet.Batch:
    """The first ``count`` digits of each class; the digits stand in random order."""
    labels = np.asarray(data.targets)
    rows = [np.flatnonzero(labels == k)[:count] for k in range(10)]
    if min(map(len, rows)) < count:
        raise SystemExit(f"labels = {count}; expected at most {min(map(len, rows))}, the fewest digits of a class")
    return fnet.data.take(data, np.concatenate(rows))


def make_probe(features: Layer) -> Layer:
    """A linear classifier on features that stay as they are."""
    return serial(("frozen", freeze(features)), ("probe", dense(10, weights=zeros())))


def probe(config: Config, features: Layer, params, decay, labelled: fnet.Batch, parts: tuple[fnet.Batch, ...]):
    """Train a probe with weight decay on the labelled digits; its accuracy on each part, and its parameters."""
    model = make_probe(features)
    fresh, state = model.init(jax.random.key(0), labelled.inputs)
    engine, optimizer = engine_of(config)(model, softmax_cross_entropy), fnet.adam(0.03)

    def decayed(params, state, batch, key):  # the gradient of ½ decay ‖w‖² besides, for the probe's weights alone
        grads, state, metrics = engine(params, state, batch, key)
        w = grads["probe"]["w"] + decay * params["probe"]["w"]
        return {**grads, "probe": {**grads["probe"], "w": w}}, state, metrics

    start = fnet.init_train_state({**fresh, "frozen": params}, optimizer, jax.random.key(0), state)
    count = len(labelled.targets)
    step = fnet.make_step(decayed, optimizer)
    ts, _, _ = fnet.train(step, start, labelled, epochs=config.probe_updates, batch_size=count, shuffle=False)
    evaluate = fnet.make_evaluate(model, softmax_cross_entropy, {"accuracy": accuracy})
    return tuple(evaluate(ts.params, ts.state, part)["accuracy"].value for part in parts), ts.params


def rows_of(config: Config, before, after, images) -> dict[str, tuple[Layer, object]]:
    """What the probe reads, by name: a layer and its parameters."""
    encoder = serial(("encoder", mlp(config.code)), ("inner", relu()))
    untrained, trained = ({"encoder": params["encoder"], "inner": ()} for params in (before, after))
    return {
        "raw pixels": (identity(), ()),
        "principal components": (dense(config.code), components(images, config.code)),
        "random encoder": (encoder, untrained),
        "denoising encoder": (encoder, trained),
    }


# --- the comparison --------------------------------------------------------------------------------------------------


def run(config: Config, console: Console | None = None) -> dict:
    """Pretrain, probe, compare and draw; returns what was measured."""
    console = open_console(config, console)
    if not 0 < config.mask < 1:
        raise SystemExit(f"mask = {config.mask}; expected between 0 and 1: without noise there is nothing to restore")
    data = {seed: load(config, seed) for seed in config.seeds}
    few(data[config.seeds[0]][0], max(config.labels))
    folder = new_run_folder(config, "denoising_autoencoder")

    train_unlabelled = jax.jit(partial(pretrain, config))
    probes: dict[str, Callable] = {}
    accuracies, errors, losses, pictures = {}, [], [], {}
    for seed, (unlabelled, validation, test) in data.items():
        key = jax.random.key(seed)
        with console.status(f"seed {seed}: {config.epochs} epochs on {len(unlabelled.targets)} digits without labels"):
            before, after, loss = train_unlabelled(key, unlabelled.inputs)
        losses.append(np.asarray(loss))
        noisy_test = masked(test.inputs, config.mask, stream(key, "test noise"))
        restored = restore(config, after, noisy_test)
        errors.append([float(jnp.square(x - test.inputs).mean()) for x in (noisy_test, restored)])
        pictures = pictures or {"whole": test.inputs[:10], "masked": noisy_test[:10], "restored": restored[:10]}
        with console.status(f"seed {seed}: probes"):
            for name, (features, params) in rows_of(config, before, after, unlabelled.inputs).items():
                fitted = fit_features(features, params, unlabelled.inputs)
                if name not in probes:
                    probes[name] = jax.jit(partial(probe, config, standardized(features)))
                for count in config.labels:
                    labelled, parts = few(unlabelled, count), (validation, test)
                    results = [probes[name](fitted, decay, labelled, parts)[0] for decay in config.decays]
                    chosen = max(results, key=lambda result: float(result[0]))  # by the validation part
                    accuracies.setdefault(name, {}).setdefault(count, []).append(float(chosen[1]))

    cell = partial(mean_and_spread, ddof=1)
    table = {name: {f"{n} a class": cell(row[n]) for n in config.labels} for name, row in accuracies.items()}
    console.print(
        engine_table(f"test accuracy of a linear probe, {len(config.seeds)} seeds, by labelled digits", table)
    )
    gains = {
        name: {n: (np.array(accuracies["denoising encoder"][n]) - accuracies[name][n]).tolist() for n in config.labels}
        for name in accuracies
        if name != "denoising encoder"
    }
    console.print(
        "gain of the denoising encoder, seed by seed, over "
        + "; ".join(f"{name}: " + ", ".join(cell(gain) for gain in row.values()) for name, row in gains.items())
    )
    won = all(np.mean(gain) > 0 for row in gains.values() for gain in row.values())
    fewest = min(config.labels)
    best = max(float(np.mean(accuracies[name][fewest])) for name in gains)
    reached = float(np.mean(accuracies["denoising encoder"][fewest]))
    console.print(
        f"with {fewest} a class: denoising encoder {reached:.3f}; to reach: above {best:.3f}, the best of the others; "
        f"above all others with every number of labels: {'yes' if won else 'no'}"
    )
    noise_error, error = np.mean(errors, 0)
    console.print(f"mean squared error of a test pixel: noisy {noise_error:.4f}, restored {error:.4f}")
    draw_digits(pictures, folder / "digits.png")
    draw_probes(accuracies, folder / "probes.png")
    results = {
        "accuracies": accuracies,
        "gains": gains,
        "noisy_error": float(noise_error),
        "restored_error": float(error),
    }
    write_results(folder, results)
    say_written(console, folder)
    return {**results, "losses": np.array(losses), "folder": folder}


def draw_digits(pictures: dict[str, jax.Array], path: Path) -> None:
    """Test digits ``(N, P)``: as they are, masked, restored."""
    rows = [Row(name, np.asarray(images).reshape(-1, 28, 28)) for name, images in pictures.items()]
    figure, _ = draw_rows(rows, height=0.95, width=0.9)
    save_figure(figure, path)


def draw_probes(accuracies, path: Path) -> None:
    """The probes' accuracies by the number of labels; bars span the seeds."""
    figure, ax = new_figure(height=4, width=6)
    for i, (name, row) in enumerate(accuracies.items()):
        counts = np.array(list(row))
        values = np.array(list(row.values()))  # (counts, seeds)
        mean = values.mean(1)
        spans = np.abs(np.stack([values.min(1), values.max(1)]) - mean)
        ax.errorbar(counts * 1.03 ** (i - 1.5), mean, spans, fmt="o-", markersize=4, capsize=3, label=name)
    ax.set(xlabel="labelled digits of each class", ylabel="test accuracy", xscale="log")
    only_ticks(ax, list(next(iter(accuracies.values()))))
    grid_and_legend(ax)
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
