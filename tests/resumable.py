"""A run that the tests of resumption stop, kill and continue, here or in a process of its own.

python -m tests.resumable FOLDER [--epochs N] [--source memory|mapped|stream] [--slow SECONDS] [--optimizer NAME]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import fnet
from fnet.data import Stream, open_arrays
from fnet.layers import batch_norm, dense, dropout, relu, serial
from fnet.metrics import accuracy
from fnet.optimizers.schedules import warmup_cosine
from fnet.optimizers.transforms import gradient_noise

EXAMPLES, BATCH, PER_EPOCH = 53, 8, 7


class Numbers:
    """A source of batches that begins anew and says where it stands, as grain's do."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __iter__(self):
        return Reader(self)


class Reader:
    def __init__(self, source):
        self.source, self.at = source, 0

    def __iter__(self):
        return self

    def __next__(self):
        rows = (self.at * BATCH + np.arange(BATCH)) % EXAMPLES
        self.at += 1
        return self.source.inputs[rows], self.source.targets[rows]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def optimizers() -> dict[str, fnet.Optimizer]:
    """One of each that keeps a state of its own, some composed."""
    from fnet import optimizers as o

    rate = warmup_cosine(0.01, 5, 60)
    names = ("sgd", "momentum", "rmsprop", "adagrad", "adadelta", "adam", "adamw", "amsgrad", "adamax", "nadam")
    made = {name: getattr(o, name)(rate) for name in (*names, "radam", "lion", "lamb", "adafactor")}
    made["muon"] = o.groups({"*/w": o.muon(rate)}, o.adam(0.01))
    made["noisy"] = fnet.chain(gradient_noise(jax.random.key(9), 0.01), fnet.adam(rate))
    made["averaged"] = o.averaged(o.lookahead(o.adam(rate), every=3))
    made["guarded"] = o.skip_nonfinite(o.reduce_on_plateau(o.sgd(0.05), window=5, patience=2))
    return made


@functools.lru_cache
def parts(optimizer: str = "noisy"):
    """Step, start, data and evaluation of a run with dropout, batch norm, a schedule, accumulation and noise."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(EXAMPLES, 6)).astype(np.float32)
    targets = (inputs[:, 0] > 0).astype(np.int32)
    model = serial(dense(8), batch_norm(), relu(), dropout(0.3), dense(2))
    chosen = optimizers()[optimizer]
    params, state = fnet.init(model, jax.random.key(0), inputs[:2])
    gradient = fnet.accumulate(fnet.backprop(model, fnet.softmax_cross_entropy, {"accuracy": accuracy}), 2)
    step = fnet.make_step(gradient, chosen)
    evaluate = fnet.make_evaluate(model, fnet.softmax_cross_entropy, {"accuracy": accuracy})
    return step, fnet.init_train_state(params, chosen, jax.random.key(1), state), (inputs, targets), evaluate


def run(folder=None, *, epochs=6, source="memory", optimizer="noisy", observers=(), chunk_steps=3, **options):
    """The run, kept in ``folder`` if there is one; continued if it has begun."""
    step, ts, arrays, evaluate = parts(optimizer)
    data, size = fnet.Batch(*arrays), {"batch_size": BATCH}
    if source == "mapped":
        folder_of_files = Path(options.pop("files"))
        files = [folder_of_files / f"{name}.npy" for name in ("inputs", "targets")]
        for file, array in zip(files, arrays, strict=True):
            np.save(file, array)
        data = open_arrays(*files)
    elif source == "stream":
        data, size = Stream(Numbers(*arrays), PER_EPOCH), {}
    run = fnet.Run(folder or "", {"optimizer": optimizer}, resume="auto", save_every=5, **options)
    kept = None if folder is None else run
    stop = fnet.early_stopping("validation_loss", patience=100)
    return fnet.fit(
        step,
        ts,
        data,
        epochs=epochs,
        evaluate=evaluate,
        validation=arrays,
        evaluate_every=(4, "steps"),
        stop=stop,
        observers=observers,
        run=kept,
        chunk_steps=chunk_steps,
        **size,
    )


def digest(ts: fnet.TrainState) -> str:
    """All bits of a state."""
    words = jax.tree.map(lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a, ts)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(words))).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--source", default="memory")
    parser.add_argument("--optimizer", default="noisy")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds that each chunk is held up")
    options = parser.parse_args()

    def say(event: fnet.Event) -> None:
        if event.kind == "chunk":
            print(f"step {event.step}", flush=True)
            time.sleep(options.slow)

    ts, _ = run(
        options.folder,
        epochs=options.epochs,
        source=options.source,
        optimizer=options.optimizer,
        observers=[say],
        **({"files": Path(options.folder).parent} if options.source == "mapped" else {}),
    )
    print("end", digest(ts), flush=True)


if __name__ == "__main__":
    main()
