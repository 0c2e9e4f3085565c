"""A network as a directed graph (S15): 2-3-1 with every number on it, checked against the formulas by hand (S5).

    python -m experiments.network_graph
    python -m experiments.network_graph --inputs 1.5 0.4 --target 2.0
    python -m experiments.network_graph --seeds 3 4 5 --updates 100

The nodes carry their function, threshold (−b: an activation passes ½ where the weighted sum exceeds it) and state; the
edges their weight and its gradient. The network is the sources' small one,

    z = W x + b,  a = σ(z),  ŷ = W_o a + b_o,  L = ½ (ŷ − y)²,

and so are the formulas that the pictures are checked against:

    ∂L/∂ŷ = ŷ − y     ∂L/∂W_o = (ŷ − y) a    ∂L/∂b_o = ŷ − y
    ∂L/∂a = (ŷ − y) W_o    ∂L/∂z = ∂L/∂a ⊙ a ⊙ (1 − a)    ∂L/∂W = ∂L/∂z xᵀ    ∂L/∂b = ∂L/∂z

Three computations of each number are compared in float64: these formulas in NumPy, the layers' backwards by hand
(`fnet.backprop`), and autodiff. Weights are drawn from the seed and rounded to one decimal, so that a pocket calculator
can follow. One picture shows the first seed's network at its start, another after some updates, when ŷ has come close
to y and the gradients have faded.

Legend: 1 example, I = 2 inputs, H = 3 hidden units, 1 output; fnet keeps W and W_o transposed, ``(I, H)``, ``(H, 1)``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import Amount, ByEngine, Count, InFolder, Seeds, engine_of
from experiments.pictures.parts import mean_and_spread
from fnet.layers import sigmoid
from fnet.layers.children import watch
from fnet.losses import half_squared_error
from fnet.report.plots import new_figure, save_figure

HIDDEN = 3
NAMES = ["z", "a", "ŷ", "L", "∂L/∂ŷ", "∂L/∂W_o", "∂L/∂b_o", "∂L/∂a", "∂L/∂z", "∂L/∂W", "∂L/∂b"]


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Draw a 2-3-1 network with its values and gradients, and check them against the formulas by hand."""

    inputs: tuple[float, float] = (0.6, -0.4)
    target: float = 1.5
    learning_rate: Amount = 0.1  # of plain gradient descent
    updates: Count = 10  # between the two pictures
    seeds: Seeds = (0, 1, 2)  # of the weights; the pictures show the first


# --- the numbers, three times ----------------------------------------------------------------------------------------


def make_model() -> fnet.Layer:
    """2-3-1 with the sigmoid between."""
    return fnet.mlp(HIDDEN, 1, activation=sigmoid())


def draw_weights(seed: int) -> dict:
    """Parameters of the model, to one decimal."""
    random = np.random.default_rng(seed)
    shapes = {"dense_0": {"w": (2, HIDDEN), "b": HIDDEN}, "dense_1": {"w": (HIDDEN, 1), "b": 1}}
    drawn = {
        name: {k: random.uniform(-1.5, 1.5, shape) for k, shape in leaves.items()} for name, leaves in shapes.items()
    }
    return {**jax.tree.map(lambda a: jnp.asarray(np.round(a, 1)), drawn), "sigmoid_0": ()}


def by_formulas(params, x: np.ndarray, y: float) -> dict[str, np.ndarray]:
    """Everything by the formulas of the docstring, in NumPy."""
    w, b = (np.asarray(params["dense_0"][name]).T for name in "wb")
    w_o, b_o = (np.asarray(params["dense_1"][name]).T for name in "wb")
    z = w @ x + b
    a = 1 / (1 + np.exp(-z))
    out = w_o @ a + b_o  # (1,)
    error = out - y
    da = error @ w_o
    dz = da * a * (1 - a)
    gradients = [error, np.outer(error, a), error, da, dz, np.outer(dz, x), dz]
    return dict(zip(NAMES, [z, a, out, 0.5 * error**2, *gradients], strict=True))


def by_layers(params, x: np.ndarray, y: float) -> dict[str, np.ndarray]:
    """The same by the layers: forwards one after another, then the backwards by hand in reverse."""
    model, batch = make_model(), fnet.Batch(jnp.asarray(x)[None], jnp.array([[y]]))
    state, values = {name: () for name in params}, {}

    def watcher(call, value):
        values[call.path[-1]] = value
        return value

    with watch(watcher):
        out, _, residuals = model.forward(params, state, batch.inputs)
    dy = half_squared_error.gradient(out, batch.targets)
    grads, _ = model.backward(params, residuals, dy)
    # the same mirror, cut open where a and z stand
    _, da = fnet.dense(1).backward(params["dense_1"], residuals["dense_1"], dy)
    _, dz = sigmoid().backward((), residuals["sigmoid_0"], da)
    return collect(
        values["dense_0"], values["sigmoid_0"], out, half_squared_error(out, batch.targets), dy, da, dz, grads
    )


def by_autodiff(params, x: np.ndarray, y: float) -> dict[str, np.ndarray]:
    """The same by jax.grad, with `fnet.tap` and `fnet.intermediate_gradients` for what is no parameter."""

    def f(params, x):
        z = fnet.tap("z", x @ params["dense_0"]["w"] + params["dense_0"]["b"])
        a = fnet.tap("a", jax.nn.sigmoid(z))
        out = fnet.tap("out", a @ params["dense_1"]["w"] + params["dense_1"]["b"])
        return 0.5 * ((out - y) ** 2).sum(), (z, a, out)

    (loss, (z, a, out)), grads = jax.value_and_grad(f, has_aux=True)(params, jnp.asarray(x))
    taps = fnet.intermediate_gradients(f, params, jnp.asarray(x), has_aux=True)
    return collect(z, a, out, loss, taps["out"], taps["a"], taps["z"], grads)


def collect(z, a, out, loss, dy, da, dz, grads) -> dict[str, np.ndarray]:
    """By the names and shapes of the formulas, where W is ``(H, I)``."""
    hidden, output = grads["dense_0"], grads["dense_1"]
    arrays = [z, a, out, loss, dy, output["w"].T, output["b"], da, dz, hidden["w"].T, hidden["b"]]
    flat = {name: np.asarray(array) for name, array in zip(NAMES, arrays, strict=True)}
    return {name: array if "W" in name else array.reshape(-1) for name, array in flat.items()}


def furthest(columns: dict[str, dict[str, np.ndarray]]) -> float:
    """The greatest difference of any number from the formulas'."""
    first, *others = columns.values()
    return max(float(np.abs(first[name] - other[name]).max()) for other in others for name in NAMES)


def descend(config: Config, params, x: np.ndarray):
    """The parameters after ``updates`` steps down the gradient by hand, and the loss before each."""
    model, optimizer = make_model(), fnet.sgd(config.learning_rate)
    step = fnet.make_step(engine_of(config)(model, half_squared_error), optimizer)
    start = fnet.init_train_state(params, optimizer, jax.random.key(0), {name: () for name in params})
    data = fnet.Batch(jnp.asarray(x)[None], jnp.array([[config.target]]))
    ts, metrics, _ = fnet.train(step, start, data, epochs=config.updates, batch_size=1)
    return ts.params, metrics["loss"].value[:, 0]


def run(config: Config, console: Console | None = None) -> dict:
    """Compute all numbers three times for every seed, print the table and draw the graph; returns the numbers."""
    console = open_console(config, console)
    folder = new_run_folder(config, "network_graph")
    x, y = np.array(config.inputs), config.target
    numbers, losses = {}, []
    with jax.enable_x64(True), console.status("computing everything three times"):
        starts = [draw_weights(seed) for seed in config.seeds]
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
        ends, curves = jax.jit(jax.vmap(lambda params: descend(config, params, x)))(together)
        for i, (seed, start) in enumerate(zip(config.seeds, starts, strict=True)):
            end = jax.tree.map(lambda leaf, i=i: leaf[i], ends)
            for when, params in (("start", start), ("end", end)):
                ways = {"formulas": by_formulas, "backprop": by_layers, "autodiff": by_autodiff}
                columns = {way: compute(params, x, y) for way, compute in ways.items()}
                numbers[seed, when] = jax.device_get(params), columns
            losses.append([float(numbers[seed, when][1]["formulas"]["L"][0]) for when in ("start", "end")])

    first = config.seeds[0]
    table = Table(box=SIMPLE, title=f"seed {first} at its start, inputs {config.inputs}, target {y:g}")
    for heading in ("", "by the formulas", "by the layers, by hand", "by autodiff"):
        table.add_column(heading, justify="right")
    columns = numbers[first, "start"][1]
    for name in NAMES:
        for index, _ in np.ndenumerate(columns["formulas"][name]):
            place = "".join("₁₂₃"[i] for i in index) if columns["formulas"][name].size > 1 else ""
            table.add_row(name + place, *(f"{column[name][index]:+.12f}" for column in columns.values()))
    console.print(table)
    for when, text in (("start", "at the start"), ("end", f"after {config.updates} updates")):
        params, columns = numbers[first, when]
        draw(params, x, y, columns["formulas"], f"seed {first} {text}", folder / f"{when}.png")
    worst = max(furthest(columns) for _, columns in numbers.values())
    before, after = np.array(losses).T
    console.print(
        f"{len(config.seeds)} seeds: loss {mean_and_spread(before, '.4f')}, after {config.updates} updates "
        f"{mean_and_spread(after, '.1e')}"
    )
    console.print(
        f"the three computations differ by {worst:.1e} at most (expected below 1e-14)",
        highlight=False,
        soft_wrap=True,
    )
    say_written(console, folder)
    return {
        "numbers": numbers,
        "losses": np.array(losses),
        "curves": np.asarray(curves),
        "worst": worst,
        "folder": folder,
    }


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(params, x, y: float, n: dict[str, np.ndarray], title: str, path: Path) -> None:
    """Nodes with function, threshold and state; edges with weight and gradient, as wide as the gradient is large."""
    figure, ax = new_figure(height=6.6, width=12.5)
    w, w_o = (np.asarray(params[name]["w"]) for name in ("dense_0", "dense_1"))
    b, b_o = (np.asarray(params[name]["b"]) for name in ("dense_0", "dense_1"))
    inputs, hidden = [(0.0, 1.2), (0.0, -1.2)], [(4.4, 2.4), (4.4, 0.0), (4.4, -2.4)]
    output, target = (8.8, 0.0), (11.2, 0.0)
    greatest = max(np.abs(n["∂L/∂W"]).max(), np.abs(n["∂L/∂W_o"]).max(), 1e-12)

    def edge(start, end, weight, gradient, at):
        color = "tab:red" if gradient > 0 else "tab:blue"
        width = 0.6 + 5 * abs(gradient) / greatest
        ax.plot(*zip(start, end, strict=True), color=color, linewidth=width, alpha=0.55, zorder=1)
        (x0, y0), (x1, y1) = start, end
        place = x0 + at * (x1 - x0), y0 + at * (y1 - y0)
        slope = np.degrees(np.arctan2(y1 - y0, x1 - x0))
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": color, "linewidth": 0.8}
        text = f"w {weight:+.3f}   ∂ {gradient:+.4f}"
        options = {"rotation": slope, "rotation_mode": "anchor", "transform_rotates_text": True}
        ax.text(*place, text, ha="center", va="center", fontsize=8, bbox=box, zorder=2, **options)

    def node(place, color, *lines):
        box = {"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": "0.3"}
        ax.text(*place, "\n".join(lines), ha="center", va="center", fontsize=9, bbox=box, zorder=3)

    for i, start in enumerate(inputs):
        node(start, "#eeeeee", f"x{i + 1}", f"state {x[i]:+.2f}")
        for j, end in enumerate(hidden):
            edge(start, end, w[i, j], n["∂L/∂W"][j, i], 0.7 if (i, j) in ((0, 2), (1, 0)) else 0.36)
    for j, place in enumerate(hidden):
        edge(place, output, w_o[j, 0], n["∂L/∂W_o"][0, j], 0.5)
        sums = f"z = Σ w x + b = {n['z'][j]:+.4f}", f"∂L/∂z {n['∂L/∂z'][j]:+.4f}"
        node(place, "#fff2cc", f"h{j + 1}: sigmoid, threshold {-b[j]:+.3f}", sums[0], f"state {n['a'][j]:.4f}", sums[1])
    error = f"∂L/∂ŷ {n['∂L/∂ŷ'][0]:+.4f}"
    node(output, "#d9ead3", f"ŷ: linear, threshold {-b_o[0]:+.3f}", f"state {n['ŷ'][0]:+.4f}", error)
    ax.plot(*zip(output, target, strict=True), color="0.5", linestyle=":", zorder=1)
    node(target, "#f4cccc", f"y = {y:+.2f}", f"L = {n['L'][0]:.2e}" if n["L"][0] < 1e-3 else f"L = {n['L'][0]:.4f}")
    ax.set_title(
        f"{title}: w the weight, ∂ its gradient ∂L/∂w; width |∂| (of {greatest:.2g} at most), red: descent lowers w, "
        "blue: raises it",
        fontsize=10,
    )
    ax.set(xlim=(-0.8, 12.0), ylim=(-3.1, 3.1))
    ax.axis("off")
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
