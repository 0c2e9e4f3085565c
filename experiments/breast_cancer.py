"""Medical diagnosis (S16): malignant or benign, from 30 measurements of cell nuclei, tested on many independent folds.

    python -m experiments.breast_cancer
    python -m experiments.breast_cancer --folds 10 --hidden 32 16
    python -m experiments.breast_cancer --seeds 3 4 5

The 569 cases of scikit-learn (Wisconsin Diagnostic Breast Cancer: Street, Wolberg and Mangasarian, 1993), in stratified
folds: each case is in exactly one test part of each seed's partition, and the network that judges it has seen neither
it nor its fold in the standardisation (mean and deviation of the training part alone). All folds of all seeds train in
one vmapped program. Folds differ by a case or two; the shorter parts are filled up with a repeated case of weight 0,
which counts nothing in loss, gradient and metrics, so nothing is dropped and nothing counts twice.

A malignant case is the positive one. Sensitivity is the share of malignant cases found, specificity that of benign
cases cleared, both at probability ½; AUC is the chance that a malignant case is ranked above a benign one. Calibration:
the Brier score, mean (p − y)², and the expected calibration error, Σ_bins share · |mean p − mean y| over 10 bins.

Legend: N cases, M runs (seeds × folds), B cases of a part, F = 30 features.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import Amount, Count, InFolder, Seeds, Widths
from experiments.pictures.parts import draw_range, grid_and_legend, mean_and_spread
from fnet.core.numerics import stream
from fnet.losses import binary_cross_entropy
from fnet.metrics import binary_accuracy
from fnet.report import engine_table, plot_confusion
from fnet.report.plots import new_figure, save_figure


@dataclasses.dataclass(frozen=True)
class Config(InFolder):
    """Cross-validate a small network on the 569 cases of the Wisconsin breast cancer set."""

    hidden: Widths = (16,)  # widths of the hidden layers; logistic regression, beside it, has none
    learning_rate: Amount = 3e-3  # Adam's
    batch_size: Count = 32
    epochs: Count = 40
    folds: Count = 5
    seeds: Seeds = (0, 1, 2)  # each draws its own partition, parameters and orders


# --- the folds -------------------------------------------------------------------------------------------------------


def load() -> tuple[np.ndarray, np.ndarray]:
    """Measurements ``(N, F)`` and labels ``(N,)``, 1 where the case is malignant (scikit-learn's own has 0 there)."""
    cases: dict = load_breast_cancer()  # type: ignore[assignment]
    return np.asarray(cases["data"]), 1 - np.asarray(cases["target"])


def assign_folds(y: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The number of the fold that tests each case, ``(N,)``; every fold has the classes in the same proportion."""
    fewest = int(np.bincount(y.astype(int)).min())
    if not 2 <= folds <= fewest:
        raise ValueError(f"folds = {folds}; expected 2 to {fewest}, the cases of the rarer class")
    fold = np.full(len(y), -1)
    for k, (_, test) in enumerate(StratifiedKFold(folds, shuffle=True, random_state=seed).split(y, y)):
        fold[test] = k
    return fold


def standardise(x: np.ndarray, training: np.ndarray) -> np.ndarray:
    """``x (N, F)`` with mean 0 and deviation 1 in each feature of the rows in ``training``, a mask ``(N,)``."""
    return (x - x[training].mean(0)) / x[training].std(0)


def part(x: np.ndarray, y: np.ndarray, mask: np.ndarray, size: int) -> fnet.Batch:
    """The cases of ``mask``, filled up to ``size`` by the first of them with weight 0."""
    rows = np.flatnonzero(mask)
    filled = np.concatenate([rows, np.full(size - len(rows), rows[0])])
    weights = np.arange(size) < len(rows)
    return fnet.Batch(*(a.astype(np.float32) for a in (x[filled], y[filled, None], weights)))


def make_parts(x, y, folds_of: list[np.ndarray], folds: int) -> tuple[fnet.Batch, fnet.Batch]:
    """Training and test parts of all runs, seed by seed and fold by fold: arrays ``(M, B, ...)``."""
    masks = np.stack([fold == k for fold in folds_of for k in range(folds)])  # (M, N): the test parts
    sizes, pairs = masks.sum(1), []
    for test in masks:
        scaled = standardise(x, ~test)
        pairs.append((part(scaled, y, ~test, len(y) - sizes.min()), part(scaled, y, test, sizes.max())))
    train_data, test_data = jax.tree.map(lambda *runs: jnp.asarray(np.stack(runs)), *pairs)
    return train_data, test_data


# --- training and measures -------------------------------------------------------------------------------------------


def train_fold(config: Config, hidden, engine, key, train_data: fnet.Batch, test_data: fnet.Batch):
    """A whole run as a function of its key and its parts: probabilities of the test part ``(B,)``, curves ``(E,)``."""
    model, loss, optimizer = fnet.mlp(*hidden, 1), binary_cross_entropy, fnet.adam(config.learning_rate)
    params, state = model.init(stream(key, "model"), train_data.inputs[:1])
    ts, _, epochs = fnet.train(
        fnet.make_step(engine(model, loss), optimizer),
        fnet.init_train_state(params, optimizer, stream(key, "run"), state),
        train_data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        evaluate=fnet.make_evaluate(model, loss, {"accuracy": binary_accuracy}),
        validation={"training": train_data, "test": test_data},
    )
    logits = fnet.apply(model, ts.params, ts.state, test_data.inputs)[:, 0]
    return jax.nn.sigmoid(logits), {p: means["loss"].value for p, means in epochs.items()}


def measures(p: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """What a test part says of probabilities ``p (B,)`` for labels ``y (B,)``."""
    positive = p > 0.5
    return {
        "accuracy": float((positive == y).mean()),
        "sensitivity": float(positive[y == 1].mean()),
        "specificity": float((~positive[y == 0]).mean()),
        "AUC": float(roc_auc_score(y, p)),
        "Brier score": float(((p - y) ** 2).mean()),
    }


def reliability(p: np.ndarray, y: np.ndarray, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In equal bins of probability: how many cases, their mean ``p`` and the share of positives, NaN in empty bins."""
    which = np.minimum((p * bins).astype(int), bins - 1)
    count, sums, positives = (np.bincount(which, w, bins) for w in (None, p, y))
    with np.errstate(invalid="ignore"):
        return count, sums / count, positives / count


def calibration_error(p: np.ndarray, y: np.ndarray) -> float:
    """The expected calibration error (Naeini et al., 2015) over 10 bins."""
    count, confidence, share = reliability(p, y)
    return float(np.nansum(count * np.abs(confidence - share)) / count.sum())


def run(config: Config, console: Console | None = None) -> dict:
    """Cross-validate by both engines and without hidden layers, print the table, draw; returns what was measured."""
    console = open_console(config, console)
    folder = new_run_folder(config, "breast_cancer")
    x, y = load()
    folds_of = [assign_folds(y, config.folds, seed) for seed in config.seeds]
    train_data, test_data = make_parts(x, y, folds_of, config.folds)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(s), k) for s in config.seeds for k in range(config.folds)])
    sizes = np.asarray(test_data.weights.sum(1), int)
    console.print(
        f"{len(y)} cases, {y.sum()} malignant; {len(config.seeds)} partitions into {config.folds} folds that test "
        f"{sizes.min()} to {sizes.max()} cases each; {len(keys)} trainings in one program"
    )

    variants = {
        "network, by hand": (config.hidden, fnet.backprop),
        "network, autodiff": (config.hidden, fnet.autodiff),
        "logistic regression": ((), fnet.backprop),
    }
    results = {}
    for variant, (hidden, engine) in variants.items():
        with console.status(variant):
            program = jax.jit(jax.vmap(partial(train_fold, config, hidden, engine)))
            p, curves = jax.device_get(program(keys, train_data, test_data))
        if not np.isfinite(p).all():
            raise ValueError(f"{variant}: the probabilities are not finite; expected a smaller --learning-rate")
        each = [(p[m, :n].astype(float), np.asarray(test_data.targets)[m, :n, 0]) for m, n in enumerate(sizes)]
        pooled = [  # every case of a partition, once
            tuple(np.concatenate(both) for both in zip(*each[i : i + config.folds], strict=True))
            for i in range(0, len(each), config.folds)
        ]
        by_fold = {name: np.array([measures(*fold)[name] for fold in each]) for name in measures(*each[0])}
        by_seed = {"calibration error": np.array([calibration_error(*seed) for seed in pooled])}
        by_seed["accuracy"] = np.array([((p > 0.5) == y).mean() for p, y in pooled])
        results[variant] = {"folds": by_fold, "seeds": by_seed, "curves": curves, "each": each, "pooled": pooled}

    def cells(group, name):
        return {
            v: mean_and_spread(r[group][name], ".4f")
            + (f"  (least {r[group][name].min():.3f})" if group == "folds" and name != "Brier score" else "")
            for v, r in results.items()
        }

    first = results["network, by hand"]
    rows = {f"{name}, by fold": cells("folds", name) for name in first["folds"]}
    rows |= {f"{name}, by partition": cells("seeds", name) for name in first["seeds"]}
    console.print(engine_table(f"mean ± spread of {len(keys)} test folds, and of {len(config.seeds)} partitions", rows))
    apart = max(
        np.abs(p - q).max() for (p, _), (q, _) in zip(first["each"], results["network, autodiff"]["each"], strict=True)
    )
    mean = first["folds"]["accuracy"].mean()
    chance = (mean * (1 - mean) / sizes.mean()) ** 0.5
    console.print(
        f"of the spread by fold, {chance:.4f} is chance: √(a (1 − a) / {sizes.mean():.0f}) at accuracy a. "
        f"Probabilities by the two engines differ by {apart:.1e} at most. Always benign: {1 - y.mean():.4f}"
    )
    draw(first, folder / "roc_calibration.png")
    counts = np.array(
        [[sum(((y == t) & ((p > 0.5) == g)).sum() for p, y in first["pooled"]) for g in (0, 1)] for t in (0, 1)]
    )
    plot_confusion(counts, folder / "confusion.png", ("benign", "malignant"))
    by_seed = first["seeds"]["accuracy"]
    console.print(
        f"accuracy {mean:.4f} (expected at least 0.96), {mean_and_spread(by_seed, '.4f')} over "
        f"{len(config.seeds)} seeds",
        highlight=False,
        soft_wrap=True,
    )
    say_written(console, folder)
    return {"variants": results, "sizes": sizes, "confusion": counts, "folder": folder}


def draw(result: dict, path: Path) -> None:
    """ROC curves of the folds, reliability of the partitions, and loss by epoch."""
    figure, (left, middle, right) = new_figure(3, height=4.4, width=4.8)
    grid, curves = np.linspace(0, 1, 501), []
    for p, y in result["each"]:
        fall_out, found, _ = roc_curve(y, p, drop_intermediate=False)
        left.step(fall_out, found, where="post", color="C0", alpha=0.25, linewidth=1)
        curves.append(found[np.searchsorted(fall_out, grid, side="right") - 1])
    auc, folds = result["folds"]["AUC"], result["folds"]
    left.step(grid, np.mean(curves, 0), where="post", color="C3", label=f"mean; AUC {mean_and_spread(auc, '.4f')}")
    at_half = 1 - folds["specificity"].mean(), folds["sensitivity"].mean()
    left.plot(
        *at_half, "o", color="black", label=f"at ½: sensitivity {at_half[1]:.3f}, specificity {1 - at_half[0]:.3f}"
    )
    left.set(xlabel="1 − specificity", ylabel="sensitivity", title=f"ROC of {len(auc)} test folds (upper left part)")
    left.set(xlim=(-0.01, 0.4), ylim=(0.6, 1.01))

    for i, (p, y) in enumerate(result["pooled"]):
        count, confidence, share = reliability(p, y)
        middle.scatter(confidence, share, 6 + 10 * np.sqrt(count), f"C{i}", alpha=0.4, label=f"partition {i}")
    p, y = (np.concatenate(parts) for parts in zip(*result["pooled"], strict=True))
    count, confidence, share = reliability(p, y)
    middle.plot(confidence, share, "o-", color="black", markersize=4, linewidth=1, label="all partitions")
    middle.plot([0, 1], [0, 1], ":", color="gray", label="calibrated")
    for i, cases in enumerate(count):
        middle.text(0.05 + i / 10, -0.11, f"{cases:.0f}", ha="center", fontsize=7, color="0.35")
    error, brier = result["seeds"]["calibration error"].mean(), folds["Brier score"].mean()
    middle.set(xlabel="predicted probability (above it: cases in the bin)", ylabel="share that is malignant")
    middle.set(title=f"reliability: ECE {error:.3f}, Brier {brier:.3f}", xlim=(-0.02, 1.02), ylim=(-0.14, 1.04))

    for i, (name, losses) in enumerate(result["curves"].items()):
        epochs = np.arange(1, losses.shape[1] + 1)
        draw_range(right, epochs, losses, color=f"C{i}", label=f"{name}: mean, least and greatest")
    right.set(xlabel="epoch", ylabel="binary cross-entropy", yscale="log", title="loss of the folds")
    for ax, place in ((left, "lower right"), (middle, "upper left"), (right, "upper right")):
        grid_and_legend(ax, loc=place)
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
