"""Double descent: the test error against the width, up to where the training set is learnt by heart and beyond.

    python -m experiments.double_descent
    python -m experiments.double_descent --noise 0 --widths 4 --updates 1

The claim (Belkin et al., arXiv:1812.11118; Nakkiran et al., arXiv:1912.02292): with more parameters the test error
falls and rises again, as the textbooks say, up to the interpolation threshold, the least model that fits every training
example. There it has a peak; beyond, it falls a second time, below what it was before the peak. With a squared error
the threshold is where there are about as many parameters as numbers to fit, N examples × K classes; wrong labels make
the peak higher.

400 of scikit-learn's 8x8 digits, of whose labels 20 % are replaced by wrong ones, and the other 1,397 to test on, with
the right labels. Three models of growing width, one population of three seeds for each width; a seed sets the split,
the wrong labels and the parameters:

- random features: relu units whose weights stay as they are drawn, and K weights for each, the least-squares solution
  of least norm, which is where gradient descent from 0 ends. The engine's gradient there, in units of that at
  0, is printed;
- a network of two layers, all of it trained by Adam on all examples at once, by the squared error;
- the same by the cross-entropy.

Measured by the first command, the mean of three seeds. The threshold is the first width at which all seeds have
training error 0; "before" is the lowest below it, "peak" the highest from there on, "after" the lowest beyond the peak:

                                     N K parameters   threshold   before         peak           after
    random features, test error      width 400        350         0.139 at 100   0.844 at 420   0.200 at 4000
                     test loss                                    0.218 at 100   5,152 at 400   0.256 at 4000
    squared error,   test error      width 53         96          0.315 at 16    0.360 at 96    0.236 at 512
                     test loss                                    0.354 at 16    0.622 at 96    0.326 at 512
    cross-entropy,   test error      width 53         12          0.371 at 6     0.382 at 8     0.198 at 512
                     test loss                                    1.515 at 4     4.04 at 12     1.09 at 512

What comes out: in the mean a peak about the threshold and a second descent, in all six rows, and both networks end
below where they were before the peak. Of the networks the test loss has its peak in every seed; the error rises to it
in one seed of three by the squared error and in two by the cross-entropy, no more than seeds differ, and ends lower in
every one. N K parameters is the threshold of a squared error: random features fit all the targets from 411 or so on,
since of 400 units 388 to 390 are ever above 0 there. By the cross-entropy a quarter of the width suffices.

What does not: random features end above their first descent with 20 % wrong labels, error 0.200 against 0.139. Without
any (the second command) they end below it: 0.065 at 150, 0.688 at 420, 0.024 at 4000.

With random features the gradient at the solution is at most 8e-13 of that at 0. The share of wrong labels, the steps
and the rate of Adam were chosen on other seeds. CPU time of the first command: 219 s, compiling included.

Legend: N examples, K classes, W width, S seeds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import check_left, main, new_run_folder, open_console, say_written, write_results
from experiments.options import ByEngine, Count, Counts, InFolder, Positive, Seeds, Share, engine_of
from experiments.pictures.parts import DOTTED, draw_range
from fnet.core.numerics import stream
from fnet.layers import dense, freeze, relu, serial
from fnet.losses import half_squared_error
from fnet.metrics import accuracy
from fnet.optimizers.schedules import cosine
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure
from fnet.training.population import train_population
from fnet.types import Layer

K = 10
FEATURES = (10, 20, 40, 70, 100, 150, 200, 250, 300, 350, 380, 400, 420, 450, 500, 600, 800, 1200, 2000, 4000)


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Test error against width with wrong labels: random features, and a network by two losses."""

    features: Counts = FEATURES
    widths: Counts = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 192, 512)  # of the network that is trained
    training: Count = 400  # of the 1,797 digits
    noise: Share = 0.2  # of the training labels that are wrong
    updates: Count = 6000  # of Adam, each on all the training examples
    learning_rate: Positive = 0.003  # the first; it falls along half a cosine
    seeds: Seeds = (0, 1, 2)  # of the split, the wrong labels and the parameters


# --- data ------------------------------------------------------------------------------------------------------------


def with_wrong_labels(key: jax.Array, labels: jax.Array, noise: float) -> jax.Array:
    """The labels ``(N,)``, ``noise`` of them, rounded to a whole number, replaced by any of the K − 1 wrong ones."""
    n = len(labels)
    chosen = jax.random.permutation(stream(key, "which"), n) < round(noise * n)
    wrong = (labels + jax.random.randint(stream(key, "by how much"), (n,), 1, K, labels.dtype)) % K
    return jnp.where(chosen, wrong, labels)


def split(config: Config, key: jax.Array, digits: fnet.Batch) -> tuple[fnet.Batch, fnet.Batch]:
    """Training digits with wrong labels among them, and test digits."""
    order = jax.random.permutation(stream(key, "split"), len(digits.targets))
    train, test = (
        fnet.Batch(digits.inputs[rows], digits.targets[rows]) for rows in jnp.split(order, [config.training])
    )
    return train._replace(targets=with_wrong_labels(stream(key, "noise"), train.targets, config.noise)), test


# --- models ----------------------------------------------------------------------------------------------------------


def random_features(width: int) -> tuple[Layer, Layer]:
    """Relu units that stay as they are drawn, and the model: they and K weights for each."""
    units = freeze(serial(dense(width, bias=None), relu()))
    return units, serial(("features", units), ("head", dense(K, bias=None)))


def trained_parameters(kind: str, width: int, inputs: int = 64) -> int:
    """How many numbers are fitted."""
    return width * K if kind == "random features" else width * (inputs + 1) + (width + 1) * K


def one_hot(data: fnet.Batch) -> fnet.Batch:
    return data._replace(targets=jax.nn.one_hot(data.targets, K, dtype=data.inputs.dtype))


def measure(model: Layer, params, state, loss, train: fnet.Batch, test: fnet.Batch) -> dict:
    """Error and loss of both parts; ``loss`` is the squared error, of one-hot targets, or the cross-entropy."""
    results = {}
    for part, data in (("training", train), ("test", test)):
        outputs = fnet.apply(model, params, state, data.inputs)
        targets = one_hot(data).targets if loss is half_squared_error else data.targets
        results[f"{part} error"] = (1 - accuracy(outputs, data.targets)).mean()
        results[f"{part} loss"] = loss(outputs, targets).mean()
    return results


def fit_features(config: Config, width: int):
    """A member: the least-squares head of least norm on random features; to be run in float64."""
    units, model = random_features(width)

    def run(_, key, digits):
        train, test = split(config, key, digits)
        params, state = model.init(stream(key, "model"), train.inputs[:1])
        gradient = engine_of(config)(model, half_squared_error)

        def slope(head):  # |∂loss/∂head|
            grads, _, _ = gradient({**params, "head": {"w": head}}, state, one_hot(train), key)
            return jnp.sqrt((grads["head"]["w"] ** 2).sum())

        hidden = fnet.apply(units, params["features"], state["features"], train.inputs)
        head = jnp.linalg.lstsq(hidden, one_hot(train).targets)[0]
        found = measure(model, {**params, "head": {"w": head}}, state, half_squared_error, train, test)
        return {**found, "gradient": slope(head) / slope(jnp.zeros_like(head)), "head": jnp.sqrt((head**2).sum())}

    return run


def train_network(config: Config, width: int, loss):
    """A member: a network of two layers after `Config.updates` of Adam."""
    model = fnet.mlp(width, K)

    def run(_, key, digits):
        train, test = split(config, key, digits)
        params, state = model.init(stream(key, "model"), train.inputs[:1])
        optimizer = fnet.adam(cosine(config.learning_rate, config.updates))
        step = fnet.make_step(engine_of(config)(model, loss), optimizer)
        start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
        data = one_hot(train) if loss is half_squared_error else train
        end, _, _ = fnet.train(step, start, data, epochs=config.updates, batch_size=config.training, shuffle=False)
        return measure(model, end.params, end.state, loss, train, test)

    return run


# --- the experiment --------------------------------------------------------------------------------------------------


def find_descents(widths: tuple[int, ...], training: np.ndarray, values: np.ndarray) -> dict:
    """Where the mean of ``values (S, W)`` falls, rises and falls again: (width, mean) before, at the peak and after.

    The threshold is the first width at which the ``training`` error ``(S, W)`` of every seed is 0, or None.
    """
    mean, fits = values.mean(0), (training == 0).all(0)
    threshold = int(np.argmax(fits)) if fits.any() else None
    before = int(np.argmin(mean[: threshold or None]))
    peak = before + int(np.argmax(mean[before:]))
    after = peak + int(np.argmin(mean[peak:]))
    places = {"before": before, "peak": peak, "after": after}
    found = {name: (widths[i], float(mean[i])) for name, i in places.items()}
    return {"threshold": None if threshold is None else widths[threshold], **found}


def run(config: Config, console: Console | None = None) -> dict:
    """Fit every width, print the table, draw the curves; returns what was measured, by model."""
    console = open_console(config, console)
    digits = fnet.data.sklearn_digits()
    check_left(len(digits.targets), training=config.training)
    folder = new_run_folder(config, "double_descent")
    features, widths = (tuple(sorted(set(each))) for each in (config.features, config.widths))
    kinds = {
        "random features": (features, lambda width: fit_features(config, width)),
        "squared error": (widths, lambda width: train_network(config, width, half_squared_error)),
        "cross-entropy": (widths, lambda width: train_network(config, width, fnet.softmax_cross_entropy)),
    }
    results = {}
    for kind, (sweep, member) in kinds.items():
        with jax.enable_x64(kind == "random features"):  # whose condition near the threshold float32 does not bear
            data = digits._replace(inputs=jnp.asarray(digits.inputs, float))
            keys = jax.vmap(jax.random.key)(jnp.array(config.seeds))
            found = []
            for width in sweep:
                with console.status(f"{kind}, width {width}"):
                    found.append(train_population(member(width), {}, keys, data).results)
        found = {name: np.stack([each[name] for each in found], 1) for name in found[0]}  # (S, W)
        parameters = [trained_parameters(kind, width) for width in sweep]
        results[kind] = {"widths": sweep, "parameters": parameters, **found}
    rows = {}
    for kind, r in results.items():
        for what in ("error", "loss"):
            at = r[f"descents of the {what}"] = find_descents(r["widths"], r["training error"], r[f"test {what}"])
            shown = {name: f"{at[name][1]:.3f} at {at[name][0]}" for name in ("before", "peak", "after")}
            rows[f"{kind}: test {what}"] = {"threshold": str(at["threshold"]), **shown}
    console.print(engine_table(f"{config.training} digits, {config.noise:.0%} wrong labels, by width", rows))
    worst = results["random features"]["gradient"].max()
    text = f"random features: the gradient at the solution is at most {worst:.1e} of that at 0"
    console.print(text, highlight=False, soft_wrap=True)
    draw(results, config, folder / "double_descent.png")
    numbers = {
        kind: {name: each.tolist() if isinstance(each, np.ndarray) else each for name, each in r.items()}
        for kind, r in results.items()
    }
    write_results(folder, numbers)
    say_written(console, folder)
    return {**results, "folder": folder}


def draw(results: dict, config: Config, path: Path) -> None:
    """Error and loss of both parts against the width; the mean of the seeds and their range."""
    figure, axes = new_figure(3, height=3.4, width=4.6, rows=2)
    for column, (kind, r) in zip(axes.T, results.items(), strict=True):
        per_width = trained_parameters(kind, 2) - trained_parameters(kind, 1)
        as_many = (config.training * K - trained_parameters(kind, 0)) / per_width
        threshold = r["descents of the error"]["threshold"]
        for ax, what in zip(column, ("error", "loss"), strict=True):
            for part, color in (("training", "C0"), ("test", "C1")):
                draw_range(ax, r["widths"], r[f"{part} {what}"], marker=".", label=part, color=color)
            ax.axvline(as_many, label="parameters = N K", **{**DOTTED, "color": "black"})
            if threshold:
                ax.axvline(threshold, color="gray", linestyle="--", linewidth=1, label="training error 0")
            ax.set(xscale="log", xlabel="width", ylabel=what)
            ax.grid(alpha=0.3)
        column[1].set(yscale="log", ylim=(1e-4, None))
        title = kind if kind == "random features" else f"two layers, {kind}"
        column[0].set_title(title, fontsize="medium")
        column[0].set_ylim(-0.02, None)
        column[1].set_ylabel("cross-entropy" if kind == "cross-entropy" else "half the squared error")
    axes[0, 0].legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
