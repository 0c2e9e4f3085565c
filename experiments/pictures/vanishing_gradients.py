"""The numbers, tables and pictures of `vanishing_gradients`.

``start`` holds, by activation, method and depth, the norms ``delta (S, L)`` before training, their ``factor (S,)`` and
how far autodiff is ``apart``; ``deep``, by activation and method, the ``loss (S, R, E)``, the ``accuracy (S, R)``, the
norms ``weights (S, R, L)`` after training, and which rate is the ``best``; ``recurrent`` the ``loss`` and the
``gradient_norm (R, 2, S, E, U)`` without clipping and with it.

Legend: S seeds, R rates, E epochs, U updates of an epoch, L depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.pictures.parts import DOTTED, grid_and_legend, legend_below
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure


def geometric_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """In float64; NaN, of which nothing is drawn, where it is not finite."""
    with np.errstate(all="ignore"):
        mean = np.exp(np.log(values.astype(np.float64)).mean(axis))
    return np.where(np.isfinite(mean), mean, np.nan)


# --- numbers and tables ----------------------------------------------------------------------------------------------


def summary(
    start: dict, deep: dict, recurrent: dict, rates: Sequence[float], recurrent_rates: Sequence[float]
) -> dict[str, dict]:
    """The numbers of the tables, for results.json; not a number is None."""

    def spread(values):
        return [float(v) if np.isfinite(v) else None for v in (np.mean(values), np.std(values))]

    return {
        "start": {
            f"{activation}, {method}, depth {depth}": {
                "factor": spread(found["factor"]),
                "first over last": spread(found["delta"][:, 0] / found["delta"][:, -1]),
                "autodiff apart": float(found["apart"].max()),
            }
            for (activation, method, depth), found in start.items()
        },
        "deep": {
            f"{activation}, {method}": {
                "training loss": spread(found["loss"][:, found["best"], -1]),
                "test accuracy": spread(found["accuracy"][:, found["best"]]),
                "rate": rates[found["best"]],
            }
            for (activation, method), found in deep.items()
        },
        "recurrent": {
            name: {
                f"rate {rate:g}": {
                    "training loss": spread(recurrent["loss"][j, i, :, -1].mean(-1)),
                    "greatest norm": spread(recurrent["gradient_norm"][j, i].max((1, 2))),
                }
                for j, rate in enumerate(recurrent_rates)
            }
            for i, name in enumerate(("no clipping", "clipping"))
        },
    }


def cell(values: Sequence[float | None], form: str = ".3f") -> str:
    """A mean and a standard deviation of `summary`."""
    mean, std = values
    return "diverged" if mean is None else f"{mean:{form}} ± {std:{form}}"


def print_start(start: dict, numbers: dict, console: Console) -> None:
    """By what the gradient is multiplied at each layer of the deepest networks, and from the last to the first."""
    activations, methods, depths = (list(dict.fromkeys(names)) for names in zip(*start, strict=True))
    depth = max(depths)
    rows = {
        method: {a: cell(numbers["start"][f"{a}, {method}, depth {depth}"]["factor"]) for a in activations}
        for method in methods
    }
    console.print(engine_table(f"at the start: |δ| is multiplied by this at each layer down, depth {depth}", rows))
    rows = {
        f"{method}, depth {d}": {
            a: f"{np.exp(np.log(ratio).mean()):.1e}"
            for a in activations
            for ratio in [start[a, method, d]["delta"][:, 0] / start[a, method, d]["delta"][:, -1]]
        }
        for method in methods
        for d in depths
    }
    console.print(engine_table("at the start: |δ₁| / |δ_L|, geometric mean of the seeds", rows))


def print_trained(deep: dict, numbers: dict, length: int, console: Console) -> None:
    """What training came to, of the deep networks and of the recurrent ones."""
    activations, methods = (list(dict.fromkeys(names)) for names in zip(*deep, strict=True))
    rows = {
        method: {
            a: f"{cell(found['training loss'])}  rate {found['rate']:g}  {found['test accuracy'][0] or 0:.1%}"
            for a in activations
            for found in [numbers["deep"][f"{a}, {method}"]]
        }
        for method in methods
    }
    one = next(iter(deep.values()))
    depth, epochs = one["weights"].shape[-1], one["loss"].shape[-1]
    title = f"depth {depth}, {epochs} epochs: training loss (chance: {math.log(10):.3f}), its best rate, test accuracy"
    console.print(engine_table(title, rows))
    rows = {
        f"{name}, {rate}": {what: cell(found[what], ".4g") for what in found}
        for name, by_rate in numbers["recurrent"].items()
        for rate, found in by_rate.items()
    }
    console.print(engine_table(f"adding problem, {length} numbers (the mean's loss: {1 / 6:.4f})", rows))


def print_reached(start: dict, numbers: dict, expected: Mapping[str, float], console: Console) -> None:
    """The numbers reached beside those to reach; ``expected`` is the factor of relu by method."""
    depth = max(depth for _, _, depth in start)
    apart = max(found["apart"].max() for found in start.values())
    theory = ", ".join(
        f"{start['relu', method, depth]['factor'].mean():.3f} (expected {number:.3f})"
        for method, number in expected.items()
    )
    end = {
        name: min(found["training loss"][0] or math.inf for found in by_rate.values())
        for name, by_rate in numbers["recurrent"].items()
    }
    console.print(
        f"backward by hand and autodiff, every layer of {len(start)} networks: at most {apart:.0e} apart "
        f"(must be below 1e-9)\nfactor of relu with naive weights: {theory}\nadding problem at the best rate: "
        f"{end['clipping']:.4f} with clipping (must be below 1/6), {end['no clipping']:.4f} without",
        highlight=False,
    )


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_deep(start: dict, deep: dict, path: Path) -> None:
    """A column for each activation: |δ_l| at the start, the training loss, and |∂loss/∂W_l| after training."""
    figure, axes = new_figure(3, rows=3, height=3.5, width=5.0)
    activations, methods = (list(dict.fromkeys(names)) for names in zip(*deep, strict=True))
    depth = max(depth for _, _, depth in start)
    for column, activation in enumerate(activations):
        top, middle, bottom = axes[:, column]
        for i, method in enumerate(methods):
            delta = start[activation, method, depth]["delta"]
            found = deep[activation, method]
            losses, weights = found["loss"][:, found["best"]].mean(0), found["weights"][:, found["best"]]
            style = {"color": f"C{i}", "label": method, "linewidth": 1.6}
            top.plot(np.arange(1, depth + 1), np.exp(np.log(delta).mean(0)), **style)
            middle.plot(np.arange(1, len(losses) + 1), np.where(np.isfinite(losses), losses, np.nan), **style)
            mean = geometric_mean(weights, 0)
            bottom.plot(np.arange(1, len(mean) + 1), np.where(mean > 0, mean, np.nan), **style)  # float32 ends
        top.set(title=f"{activation}: |δ| at the start, depth {depth}", xlabel="layer", yscale="log")
        middle.set(title=f"training loss (dotted: chance), depth {weights.shape[-1]}", xlabel="epoch", ylim=(0, 3))
        middle.axhline(math.log(10), **DOTTED)
        bottom.set(title="|∂loss/∂W| after training", xlabel="layer", yscale="log")
        for ax in (top, bottom):
            low, high = ax.get_ylim()
            ax.set_ylim(max(low, 1e-40), high)
    for ax in axes.ravel():
        ax.grid(alpha=0.3)
    legend_below(figure, axes[0, 0], columns=len(methods))
    save_figure(figure, path)


def draw_recurrent(
    by_time: Mapping[float, np.ndarray], recurrent: dict, rates: Sequence[float], limit: float, path: Path
) -> None:
    """The gradient back through time at the start, and of all rates, with and without clipping, loss and norm."""
    figure, (left, middle, right) = new_figure(3, height=4.2)
    for gain, size in by_time.items():
        left.plot(np.arange(1, len(size) + 1), size / size[-1], label=f"g = {gain:g}")
    left.set(
        xlabel="time step t", ylabel="|∂loss/∂x_t| over that of the last step", yscale="log", title="before training"
    )
    for j, rate in enumerate(rates):
        for i, (name, style) in enumerate({"no clipping": "--", "clipped": "-"}.items()):
            loss = recurrent["loss"][j, i].mean(-1).T  # (E, S)
            size = recurrent["gradient_norm"][j, i].max(-1).T
            for ax, values in ((middle, loss), (right, size)):
                values = geometric_mean(values, 1)
                epochs, known = np.arange(1, len(values) + 1), np.isfinite(values)
                label = f"{name}, rate {rate:g}" + ("" if known.all() else ": diverged")
                ax.plot(epochs, values, style, color=f"C{j}", label=label)
                if not known.all() and known.any():
                    ax.plot(epochs[known][-1], values[known][-1], "x", color=f"C{j}", markersize=8)
    middle.axhline(1 / 6, **DOTTED)
    right.axhline(limit, **DOTTED)
    middle.set(xlabel="epoch", ylabel="training loss (dotted: the mean's)", yscale="log", title="adding problem")
    right.set(
        xlabel="epoch", ylabel="greatest norm (dotted: the limit)", yscale="log", title="gradient before clipping"
    )
    grid_and_legend(left, middle)
    right.grid(alpha=0.3)
    save_figure(figure, path)
