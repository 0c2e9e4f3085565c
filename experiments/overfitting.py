"""Overfitting: capacity against data, bias and variance, and what cures it (the source texts, S10 and S11).

    python -m experiments.overfitting
    python -m experiments.overfitting --sets 200 --noise 0.5
    python -m experiments.overfitting --few 200 --label-noise 0

**Bias and variance.** On a known function, f(x) = sin(πx) on -1..1, and y = f(x) + ε, networks of growing width are
each trained on many training sets drawn anew, all sets in one vmapped program. With f̂ learned from one of them,

    E (y − f̂)²  =  (f − E f̂)²  +  E (f̂ − E f̂)²  +  E ε²        bias² + variance + noise

at every x, and the sum is held against the error measured on targets with noise of their own. The three cures act
on the widest network: they pay bias for variance.

**Capacity against data.** On the 8x8 digits, widths times training-set sizes. The size is data: examples beyond it have
weight 0, so a width is one program.

**Cures.** A wide network on few digits, a part of them with a wrong label: dropout, weight decay, early stopping and
all together, in one program, since rate and decay are data. Settings and stopping times are chosen by the loss on a
validation part, drawn as the training part is; the test labels are right and serve for nothing but the report.

Legend: S training sets, G points of the grid, N examples, E epochs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written, split_by_seed, write_results
from experiments.options import Amount, Amounts, ByEngine, Count, Counts, InFolder, Seeds, Share, Shares, engine_of
from experiments.pictures.overfitting import draw_digits, draw_function, print_digits, print_function, print_reached
from fnet.core.numerics import stream
from fnet.layers import dense, dropout, relu, serial, tanh
from fnet.metrics import accuracy
from fnet.types import Layer, Optimizer


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Bias and variance on a known function; capacity against data and cures of overfitting on the 8x8 digits."""

    sets: Count = 100  # training sets drawn anew
    points: Count = 25  # examples in each
    noise: Amount = 0.3  # standard deviation of ε
    units: Counts = (1, 2, 4, 16)  # of both hidden layers of the networks on the known function
    updates: Count = 1500  # on the known function, by Adam on all points
    decay: Amount = 0.3  # of the weights, on the known function
    dropout_rate: Share = 0.1  # there
    stop: Count = 100  # updates after which early stopping stops there
    widths: Counts = (2, 8, 32, 128)  # of the hidden layer on the digits
    sizes: Counts = (25, 100, 400)  # numbers of training digits
    epochs: Count = 200  # by Adam on all of them
    few: Count = 100  # training digits of the cures, and as many to validate
    label_noise: Share = 0.2  # the share of them whose label is drawn at random
    rates: Shares = (0.2, 0.5, 0.8)  # of dropout, to choose from
    decays: Amounts = (0.1, 0.3, 1.0)  # of the weights, to choose from
    cure_epochs: Count = 150
    learning_rate: Amount = 0.01  # Adam's, everywhere
    seeds: Seeds = (0, 1, 2)  # of the split, the parameters and the training sets


def decayed(optimizer: Optimizer, decay) -> Optimizer:
    """Decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101) of matrices, ``p −= rate · decay · p``.

    It is the optimizer's new parameters that shrink, not the gradients: Adam would scale a decay in them away.
    """

    def update(grads, opt_state, params, *, value=None):
        new, opt_state = optimizer.update(grads, opt_state, params, value=value)
        shrunk = jax.tree.map(lambda n, p: n - opt_state.rate * decay * p if p.ndim > 1 else n, new, params)
        return shrunk, opt_state

    return Optimizer(optimizer.init, update)


def train_all(model: Layer, decay, key, data: fnet.Batch, parts: dict, epochs: int, config: Config, each_epoch=True):
    """A run by Adam on all of ``data`` at once: loss and accuracy on ``parts`` by epoch ``(E,)``, or at the end."""
    params, state = model.init(stream(key, "model"), data.inputs)
    loss, optimizer = fnet.softmax_cross_entropy, decayed(fnet.adam(config.learning_rate), decay)
    evaluate = fnet.make_evaluate(model, loss, {"accuracy": accuracy})
    ts, _, measured = fnet.train(
        fnet.make_step(engine_of(config)(model, loss), optimizer),
        fnet.init_train_state(params, optimizer, stream(key, "run"), state),
        data,
        epochs=epochs,
        batch_size=len(data.targets),
        shuffle=False,
        evaluate=evaluate if each_epoch else None,
        validation=parts,
    )
    measured = measured or {name: evaluate(ts.params, ts.state, part) for name, part in parts.items()}
    return {f"{part} {name}": mean.value for part, means in measured.items() for name, mean in means.items()}


# --- bias and variance on a known function ---------------------------------------------------------------------------


def true_function(x):
    """f(x) = sin(πx)."""
    return jnp.sin(jnp.pi * x)


def draw_set(config: Config, key) -> fnet.Batch:
    """A training set: x evenly from -1..1, y = f(x) + ε, ``(N, 1)`` each."""
    x = jax.random.uniform(stream(key, "x"), (config.points, 1), minval=-1.0, maxval=1.0)
    return fnet.Batch(x, true_function(x) + config.noise * jax.random.normal(stream(key, "noise"), x.shape))


def learn_sets(config: Config, units: int, rates, decays, grid):
    """The functions learned by networks of 1-units-units-1, after ``stop`` updates and at the end: ``(2, M, S, G)``.

    M are the pairs of a dropout rate and a weight decay; all pairs and all sets are one program.
    """

    def member(rate, decay, key, grid):
        drop, data = dropout(rate), draw_set(config, key)
        model = serial(dense(units), tanh(), drop, dense(units), tanh(), drop, dense(1))
        params, state = model.init(stream(key, "model"), data.inputs)
        optimizer = decayed(fnet.adam(config.learning_rate), decay)
        step = fnet.make_step(engine_of(config)(model, fnet.losses.squared_error), optimizer)
        ts, learned = fnet.init_train_state(params, optimizer, stream(key, "run"), state), []
        for updates in (config.stop, config.updates - config.stop):
            ts, _, _ = fnet.train(step, ts, data, epochs=updates, batch_size=config.points, shuffle=False)
            learned.append(fnet.apply(model, ts.params, ts.state, grid)[:, 0])
        return jnp.stack(learned)

    keys = jax.random.split(stream(jax.random.key(config.seeds[0]), "sets"), config.sets)
    by_set = jax.vmap(member, in_axes=(None, None, 0, None), out_axes=1)
    by_pair = jax.vmap(by_set, in_axes=(0, 0, None, None), out_axes=1)
    return jax.device_get(
        jax.jit(by_pair)(jnp.asarray(rates, jnp.float32), jnp.asarray(decays, jnp.float32), keys, grid)
    )


def decompose(learned: np.ndarray, truth: np.ndarray, noise: float, rng: np.random.Generator) -> dict[str, float]:
    """Bias², variance and noise of functions ``(S, G)``, their sum, and the error measured on fresh noisy targets.

    ``spread`` is the standard error of the measured error about the sum, from the sets. The mean of S functions carries
    1/S of their variance, which bias² therefore contains; the sum is not changed by that.
    """
    learned = learned.astype(np.float64)
    targets = truth[None] + noise * rng.standard_normal(learned.shape)
    bias, variance = ((learned.mean(0) - truth) ** 2).mean(), learned.var(0).mean()
    fresh = (targets - learned) ** 2 - (learned - truth[None]) ** 2  # ε² + 2 ε (f − f̂): mean σ²
    return {
        "bias²": bias,
        "variance": variance,
        "noise": noise**2,
        "sum": bias + variance + noise**2,
        "measured": ((targets - learned) ** 2).mean(),
        "spread": fresh.std() / np.sqrt(fresh.size),
    }


def study_function(config: Config) -> tuple[dict, dict]:
    """By units, and for the widest network by cure: `decompose` and the functions learned ``(S, G)``."""
    grid = jnp.linspace(-1, 1, 101)[:, None]
    truth = np.sin(np.pi * np.asarray(grid, np.float64)[:, 0])
    rng = np.random.default_rng(config.seeds[0])
    by_units, by_cure = {}, {}
    for units in config.units:
        pairs = {"none": (0.0, 0.0)}
        if units == max(config.units):
            pairs |= {"dropout": (config.dropout_rate, 0.0), "weight decay": (0.0, config.decay)}
        rates, decays = np.array(list(pairs.values())).T
        stopped, learned = learn_sets(config, units, rates, decays, grid)
        by_units[units] = {**decompose(learned[0], truth, config.noise, rng), "learned": learned[0]}
        if units == max(config.units):
            named = {"none": learned[0], "early stopping": stopped[0]}
            named |= {name: learned[i] for i, name in enumerate(pairs) if i}
            by_cure = {n: {**decompose(f, truth, config.noise, rng), "learned": f} for n, f in named.items()}
    return by_units, by_cure


# --- capacity against data, on the digits ----------------------------------------------------------------------------


def load(config: Config, train_size: int, validation_size: int = 0) -> dict[str, fnet.Batch]:
    """Each seed's own split of the digits, stacked: inputs ``(seeds, N, 64)``; what is left over is the test part."""
    digits = fnet.data.sklearn_digits()
    if train_size + validation_size >= len(digits.targets):
        raise SystemExit(
            f"{train_size} digits to train on and {validation_size} to validate leave none of {len(digits.targets)} "
            "to test on: take fewer"
        )
    sizes = {"train": train_size, "validation": validation_size}
    sizes = {name: size for name, size in {**sizes, "test": len(digits.targets) - sum(sizes.values())}.items() if size}
    return dict(zip(sizes, split_by_seed(digits, list(sizes.values()), config.seeds), strict=True))


def capacity_errors(config: Config, width: int) -> dict[str, np.ndarray]:
    """Errors and losses ``(sizes, seeds)`` on the training and the test digits of 64-width-10, by training-set size."""
    largest = max(config.sizes)
    parts = load(config, largest)

    def member(size, key, train, test):
        data = train._replace(weights=(jnp.arange(largest) < size).astype(jnp.float32))
        model, parts = serial(dense(width), relu(), dense(10)), {"train": data, "test": test}
        return train_all(model, 0.0, key, data, parts, config.epochs, config, each_epoch=False)

    keys = jax.vmap(jax.random.key)(jnp.array(config.seeds))
    by_seed = jax.vmap(member, in_axes=(None, 0, 0, 0))
    by_size = jax.vmap(by_seed, in_axes=(0, None, None, None))
    return jax.device_get(jax.jit(by_size)(jnp.array(config.sizes), keys, parts["train"], parts["test"]))


# --- cures, on few digits --------------------------------------------------------------------------------------------


def mislabel(key, share, part: fnet.Batch) -> fnet.Batch:
    """The part with a ``share`` of its labels, drawn one by one, replaced by labels drawn from all ten."""
    labels = jax.random.randint(stream(key, "labels"), part.targets.shape, 0, 10, part.targets.dtype)
    return part._replace(
        targets=jnp.where(jax.random.bernoulli(stream(key, "wrong"), share, part.targets.shape), labels, part.targets)
    )


def cure_curves(config: Config) -> tuple[list[tuple[float, float]], dict[str, np.ndarray]]:
    """The pairs of a dropout rate and a weight decay, and by name the curves ``(pairs, seeds, E)`` of one program."""
    pairs = [(rate, decay) for rate in (0.0, *config.rates) for decay in (0.0, *config.decays)]
    parts = load(config, config.few, config.few)

    def member(rate, decay, key, parts):
        noisy = {name: mislabel(stream(key, name), config.label_noise, parts[name]) for name in ("train", "validation")}
        model = serial(dense(max(config.widths)), relu(), dropout(rate), dense(10))
        return train_all(model, decay, key, noisy["train"], {**parts, **noisy}, config.cure_epochs, config)

    rates, decays = jnp.array(pairs).T
    keys = jax.vmap(jax.random.key)(jnp.array(config.seeds))
    by_seed = jax.vmap(member, in_axes=(None, None, 0, 0))
    by_pair = jax.vmap(by_seed, in_axes=(0, 0, None, None))
    return pairs, jax.device_get(jax.jit(by_pair)(rates, decays, keys, parts))


def choose(pairs, curves: dict[str, np.ndarray]) -> dict[str, dict]:
    """Each cure's setting and stopping epoch, from the validation loss alone, and what was measured there.

    A cure's setting is the pair of the lowest validation loss, mean of the seeds; each seed stops by itself.
    """
    validation = curves["validation loss"]  # (pairs, seeds, E)
    cures = {
        "none": ([(r, d) == (0, 0) for r, d in pairs], False),
        "dropout": ([r > 0 and d == 0 for r, d in pairs], False),
        "weight decay": ([r == 0 and d > 0 for r, d in pairs], False),
        "early stopping": ([(r, d) == (0, 0) for r, d in pairs], True),
        "all three": ([r > 0 and d > 0 for r, d in pairs], True),
    }
    found = {}
    for name, (allowed, stops) in cures.items():
        epoch = validation.argmin(-1) if stops else np.full(validation.shape[:2], validation.shape[2] - 1)
        judged = np.take_along_axis(validation, epoch[..., None], -1)[..., 0].mean(1)
        best = int(np.where(allowed, judged, np.inf).argmin())
        at = {n: np.take_along_axis(c[best], epoch[best][:, None], -1)[:, 0] for n, c in curves.items()}
        found[name] = {"pair": pairs[best], "epoch": epoch[best] + 1, "index": best, **at}
    return found


# --- the run ---------------------------------------------------------------------------------------------------------


def run(config: Config, console: Console | None = None) -> dict:
    """The three studies: tables, pictures, results.json; returns what was measured."""
    check(config)
    console = open_console(config, console)
    folder = new_run_folder(config, "overfitting")
    with console.status(f"{config.sets} training sets of a known function, for {len(config.units)} networks"):
        by_units, by_cure = study_function(config)
    with console.status("capacity against data"):
        by_width = {width: capacity_errors(config, width) for width in config.widths}
    with console.status("cures on few digits"):
        pairs, curves = cure_curves(config)
    cures = choose(pairs, curves)
    few = f"{config.few} digits, {config.label_noise:.0%}"
    print_function(by_units, by_cure, config.points, console)
    print_digits(by_width, cures, config.sizes, few, console)
    print_reached(by_units, by_cure, cures, console)
    draw_function(by_units, by_cure, folder / "bias_variance.png")
    draw_digits(by_width, cures, curves, config.sizes, few, folder / "digits.png")
    decomposed = {
        kind: {name: {k: float(v) for k, v in d.items() if k != "learned"} for name, d in found.items()}
        for kind, found in (("units", by_units), ("cures on the function", by_cure))
    }
    digits = {
        "capacity": {w: {k: v.tolist() for k, v in found.items()} for w, found in by_width.items()},
        "cures": {name: {k: np.asarray(v).tolist() for k, v in found.items()} for name, found in cures.items()},
    }
    write_results(folder, {**decomposed, **digits})
    say_written(console, folder)
    results = {"by_units": by_units, "by_cure": by_cure, "by_width": by_width, "cures": cures}
    return {**results, "curves": curves, "pairs": pairs, "folder": folder}


def check(config: Config) -> None:
    """Refuse what would leave nothing to train, stop or choose from."""
    if not 0 < config.stop < config.updates:
        raise SystemExit(
            f"stop = {config.stop}: expected 1 to {config.updates - 1}, fewer updates than the whole run's"
        )
    if config.sets < 2:
        raise SystemExit(f"sets = {config.sets}: expected at least 2, since a variance needs two")
    if not (config.rates and config.decays):
        raise SystemExit("no rates or no decays to choose from: give at least one of each")


if __name__ == "__main__":
    main(run, Config)
