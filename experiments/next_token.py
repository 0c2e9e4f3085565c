"""The next token after "El cielo es": softmax, cross-entropy, its gradient, and one step of gradient descent (S3).

    python -m experiments.next_token
    python -m experiments.next_token --learning-rate 4

A source gives four logits and prints probabilities and a loss to two decimals. Two of the probabilities, and with
them the loss, are not those of the logits. The first table asks which sum, and which term in it, would explain them.

Legend: 1 example, K = 4 tokens; z logits, p = softmax(z), y one-hot.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import Amount, InFolder
from fnet.layers import softmax
from fnet.report.plots import new_figure, save_figure

TOKENS = ("azul", "verde", "rojo", "blanco")
LOGITS = (3.2, 1.1, 0.8, 2.9)
PRINTED = (0.52, 0.06, 0.05, 0.37)
PRINTED_LOSS = 0.65
TARGET = TOKENS.index("azul")


@dataclasses.dataclass(frozen=True)
class Config(InFolder):
    """Predict the token after "El cielo es" from four logits, and learn from the answer once."""

    learning_rate: Amount = 1.0  # of the one step on the logits


def explain(e: np.ndarray) -> tuple[np.ndarray, list[tuple[float, float] | None]]:
    """What the printed probabilities imply of the exponentials ``e (K,)``.

    First, for each token, the sums ``(K, 2)`` by which its e^z can be divided to give what is printed. Second, for each
    token, the values that its e^z would need to have, the others being right, for all K to come out as printed; None if
    no value does.
    """
    low, high = np.array(PRINTED) - 0.005, np.array(PRINTED) + 0.005
    sums = np.stack([e / high, e / low], 1)
    alone = []
    for i in range(len(e)):
        rest = e.sum() - e[i]
        # e_i / (rest + e_i) = q solved for e_i; for the other tokens, rest + e_i must be among their sums
        ends = np.delete(sums, i, 0) - rest
        least = max(rest * low[i] / (1 - low[i]), *ends[:, 0])
        most = min(rest * high[i] / (1 - high[i]), *ends[:, 1])
        alone.append((float(least), float(most)) if least < most else None)
    return sums, alone


def compute(config: Config) -> dict:
    """All numbers, in float64."""
    with jax.enable_x64(True):
        logits, label = jnp.array([LOGITS]), jnp.array([TARGET])
        loss, optimizer = fnet.softmax_cross_entropy, fnet.sgd(config.learning_rate)
        by_hand = loss.gradient(logits, label)
        by_autodiff = jax.grad(lambda z: loss(z, label)[0])(logits)
        moved, _ = optimizer.update(by_hand, optimizer.init(logits), logits)
        p, p_moved = (fnet.apply(softmax(), (), (), z) for z in (logits, moved))
        rows = {"by_hand": by_hand, "by_autodiff": by_autodiff, "logits_after": moved, "p": p, "p_after": p_moved}
        result = {name: np.asarray(row)[0] for name, row in rows.items()}
        result |= {"loss": float(loss(logits, label)[0]), "loss_after": float(loss(moved, label)[0])}
    sums, alone = explain(np.exp(LOGITS))
    result |= {"exponentials": np.exp(LOGITS), "sums": sums, "alone": alone}
    return result


def run(config: Config, console: Console | None = None) -> dict:
    """Print the tables and draw the bars; returns all numbers."""
    console = open_console(config, console)
    folder = new_run_folder(config, "next_token")
    r = compute(config)

    e, total = r["exponentials"], r["exponentials"].sum()
    columns = ("token", "z", "e^z", "softmax", "the text", "sums that\ngive it", "e^z to give\nall four")
    table = Table(*columns, box=SIMPLE, title="El cielo es …", show_footer=True)
    for i, token in enumerate(TOKENS):
        low, high = r["sums"][i]
        agrees = "✓" if low < total < high else "✗"
        cells = f"{LOGITS[i]}", f"{e[i]:.4f}", f"{r['p'][i]:.6f}", f"{PRINTED[i]:.2f} {agrees}"
        alone = "{:.2f} – {:.2f}".format(*r["alone"][i]) if r["alone"][i] else "none"
        table.add_row(token, *cells, f"{low:.2f} – {high:.2f}", alone)
    feet = "sum", "", f"{total:.4f}", f"{r['p'].sum():.6f}", f"{sum(PRINTED):.2f}", "", ""
    for column, foot in zip(table.columns, feet, strict=True):
        column.footer = foot
    console.print(table)
    console.print(
        f"The text's azul wants a sum below {total:.2f} and its blanco one above, so no sum of right terms gives both. "
        "One wrong exponential, azul's or blanco's (last column), would give all four, and a wrong sum with it.\n"
        f"Cross-entropy of azul: {r['loss']:.6f}. The text's {PRINTED_LOSS} is −ln {PRINTED[TARGET]} = "
        f"{-math.log(PRINTED[TARGET]):.6f}, of its own wrong probability.\n"
    )
    columns = ("token", "p − y by hand", "by autodiff", "z after", "p before", "p after")
    table = Table(*columns, box=SIMPLE, title=f"∂ loss/∂z, and one step z − {config.learning_rate:g} (p − y)")
    for i, token in enumerate(TOKENS):
        gradients = f"{r['by_hand'][i]:+.12f}", f"{r['by_autodiff'][i]:+.12f}"
        table.add_row(token, *gradients, f"{r['logits_after'][i]:.6f}", f"{r['p'][i]:.6f}", f"{r['p_after'][i]:.6f}")
    console.print(table)
    console.print(f"cross-entropy of azul after the step  {r['loss_after']:.6f}")

    draw(r, config, folder / "probabilities.png")
    before, after = r["p"][TARGET], r["p_after"][TARGET]
    console.print(f"p(azul) {before:.6f} → {after:.6f}", highlight=False, soft_wrap=True)
    say_written(console, folder)
    return {**r, "folder": folder}


def draw(r: dict, config: Config, path: Path) -> None:
    """Bars of each token's probability: of the logits, as the text prints it, and after the step."""
    figure, ax = new_figure(width=7.0)
    moved = f"after one step at rate {config.learning_rate:g}"
    groups = {"softmax of the logits": r["p"], "the text": PRINTED, moved: r["p_after"]}
    for i, ((name, values), colour) in enumerate(zip(groups.items(), ("C0", "0.75", "C2"), strict=True)):
        bars = ax.bar(np.arange(len(TOKENS)) + (i - 1) * 0.28, values, 0.27, color=colour, label=name)
        ax.bar_label(bars, fmt="%.2f" if name == "the text" else "%.3f", fontsize="small", padding=2)
    ax.set_xticks(range(len(TOKENS)), [f"{token}\nz = {z}" for token, z in zip(TOKENS, LOGITS, strict=True)])
    ax.set(ylabel="probability", ylim=(0, 1.1 * max(max(values) for values in groups.values())), title="El cielo es …")
    ax.grid(alpha=0.3, axis="y")
    ax.set_axisbelow(True)
    ax.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
