"""Training in bfloat16 and float16 beside float32: what master weights and a dynamic loss scale are for.

    python -m experiments.low_precision
    python -m experiments.low_precision --seeds 10 --rate 1e-3

64-32-10 by Adam on the 8x8 digits of scikit-learn, every setting from the same seeds, in six ways:

- float32;
- bfloat16 and float16 by `mixed_precision`: parameters in float32, products in 16 bits; float16 with a dynamic loss
  scale;
- bfloat16 and float16 throughout, with `master_weights`: the model has 16 bits alone, the optimizer keeps float32;
- bfloat16 throughout without them, where updates below the parameters' rounding are lost.

The first five must reach the accuracy of float32 within 0.5 %, on the average over the seeds; the sixth shows why.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import check_left, main, new_run_folder, open_console, say_written, write_results
from experiments.options import Amount, ByEngine, Count, InFolder, Seeded, engine_of
from fnet.core.numerics import stream
from fnet.layers import Policy, mixed_precision
from fnet.metrics import accuracy
from fnet.optimizers import dynamic_loss_scale, master_weights
from fnet.report import engine_table

WAYS = {  # dtype of the parameters, dtype of the products, master weights, dynamic loss scale
    "float32": ("float32", "float32", False, False),
    "mixed bfloat16": ("float32", "bfloat16", False, False),
    "mixed float16": ("float32", "float16", False, True),
    "bfloat16, masters": ("bfloat16", "bfloat16", True, False),
    "float16, masters": ("float16", "float16", True, True),
    "bfloat16 alone": ("bfloat16", "bfloat16", False, False),
}
WITHIN = 0.005


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine, Seeded):
    """Train in 16 bits and compare with float32."""

    seeds: Count = 5  # of the split, the parameters and the order of the examples
    epochs: Count = 30
    batch_size: Count = 32
    rate: Amount = 3e-4  # small, so that updates are below bfloat16's rounding
    hidden: Count = 32
    test_size: Count = 357  # of the 1,797 digits


def train_in(config: Config, way: str, key, digits: fnet.Batch) -> dict:
    """A whole run as a function of its key: test accuracy, last loss, updates left out."""
    parameters, compute, master, scaled = WAYS[way]
    model, loss = fnet.mlp(config.hidden, 10), fnet.softmax_cross_entropy
    policy = Policy(parameters=jnp.dtype(parameters), compute=jnp.dtype(compute), outputs=jnp.float32)
    model = model if way == "float32" else mixed_precision(model, policy)
    optimizer = fnet.adam(config.rate)
    optimizer = master_weights(optimizer) if master else optimizer
    optimizer = dynamic_loss_scale(optimizer) if scaled else optimizer
    order = jax.random.permutation(stream(key, "split"), len(digits.targets))
    test, train = (jax.tree.map(lambda a, r=rows: a[r], digits) for rows in jnp.split(order, [config.test_size]))
    params, state = model.init(stream(key, "model"), digits.inputs[:1])
    start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    step = fnet.make_step(engine_of(config)(model, loss), optimizer)
    end, metrics, _ = fnet.train(step, start, train, epochs=config.epochs, batch_size=config.batch_size)
    measured = fnet.make_evaluate(model, loss, {"accuracy": accuracy})(end.params, end.state, test)
    skipped = end.opt_state.skipped if scaled else jnp.zeros((), jnp.int32)
    return {"accuracy": measured["accuracy"].value, "loss": metrics["loss"].value[-1].mean(), "skipped": skipped}


def run(config: Config, console: Console | None = None) -> dict:
    """Train in every way from every seed; returns accuracies by way."""
    if config.seeds < 1:
        raise ValueError(f"low_precision: seeds = {config.seeds}; expected at least 1")
    console = open_console(config, console)
    digits = jax.tree.map(jnp.asarray, fnet.data.sklearn_digits())
    check_left(len(digits.targets), test_size=config.test_size)
    folder = new_run_folder(config, "low_precision")
    keys, results, rows = jax.random.split(jax.random.key(config.seed), config.seeds), {}, {}
    for way in WAYS:
        with console.status(way):
            trained = jax.jit(jax.vmap(lambda key, digits, way=way: train_in(config, way, key, digits), (0, None)))
            results[way] = {name: np.asarray(a, np.float64) for name, a in trained(keys, digits).items()}
        a = results[way]["accuracy"]
        behind = results["float32"]["accuracy"].mean() - a.mean()
        rows[way] = {
            "test accuracy": f"{a.mean():.4f} ± {a.std(ddof=1) if len(a) > 1 else 0:.4f}",
            "below float32": f"{behind:+.4f}",
            "loss": f"{results[way]['loss'].mean():.4f}",
            "verdict": "reached" if behind <= WITHIN else "short",
        }
    console.print(engine_table(f"{config.seeds} seeds, {config.epochs} epochs, rate {config.rate:g}", rows))
    plain = {way: {name: a.tolist() for name, a in r.items()} for way, r in results.items()}
    write_results(folder, plain)
    say_written(console, folder)
    return {"results": results, "folder": folder}


if __name__ == "__main__":
    main(run, Config)
