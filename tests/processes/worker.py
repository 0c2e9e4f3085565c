"""One of the processes of the tests of several: makes runs, and writes what came of each.

python -m tests.processes.worker FOLDER CASE...

INDEX of COUNT processes meet at 127.0.0.1:PORT, all in the environment; without them there is one, which has one
device. What case "mlp" gave is in FOLDER/mlp.npz and what it raised in FOLDER/mlp.INDEX.txt, each in "alone" or "pair".
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import fnet
from fnet.core import processes
from fnet.core.trees import named_leaves
from tests.devices import parts

COUNT, INDEX = int(os.environ.get("COUNT", "1")), int(os.environ.get("INDEX", "0"))


def start() -> None:
    if COUNT > 1:
        fnet.processes.start(f"127.0.0.1:{os.environ['PORT']}", COUNT, INDEX, heartbeat_timeout=10)


X, Y = parts.CASES["mlp"].inputs, parts.CASES["mlp"].targets


def batch(n=48) -> fnet.Batch:
    return fnet.Batch(X[:n], Y[:n])


def made(name="mlp", mesh="dp2 fsdp4", **options):
    """The run of a case, on all devices of all processes or on the one there is."""
    return parts.run(name, mesh if COUNT > 1 else None, **options)


def parts_of(x):
    """Batches of 16, of each the part of this process."""
    size = 16 // COUNT
    rows = [slice(k + size * INDEX, k + size * (INDEX + 1)) for k in range(0, len(x), 16)]
    return [(x[r], Y[r]) for r in rows]


def mapped(folder: Path, n: int) -> fnet.Batch:
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "x.npy", X[:n])
        np.save(folder / "y.npy", Y[:n])
    processes.meet()
    return fnet.data.open_arrays(folder / "x.npy", folder / "y.npy")


# --- the same numbers -------------------------------------------------------------------------------------------------


def case_mlp(folder):
    return made()


def case_gpt(folder):
    return made("gpt, repeated, dropout", "fsdp2 tp4", engine=fnet.autodiff, optimizer=fnet.adamw(0.01))


def case_mapped(folder):
    return made(data=mapped(folder / "data", 43), batch_size=16)


def case_dataset(folder):
    """The rest of an epoch is 4 examples, which are not split, and as many as a process has of a full batch."""
    weights = np.where(np.arange(44) < 20, 0.0, 1.5)
    examples = fnet.data.Examples([(X[i], Y[i], weights[i]) for i in range(44)])
    held = {"some": fnet.data.Examples([(X[i], Y[i]) for i in range(20)]), "all": batch()}
    return made(mesh="dp8", data=examples, validation=held, batch_size=8)


def case_observed(folder):
    from fnet.runs import observers

    mine = folder / "observed"
    return made(
        epochs=9,
        chunk_steps=3,
        stop=fnet.early_stopping("validation_loss", patience=1, least_change=1.0),
        observers=[
            observers.progress("digits"),
            observers.csv(mine.with_suffix(".csv")),
            observers.histograms(mine),
            observers.samples(lambda ts: {"w": ts.params["dense_1"]["w"]}, mine),
            observers.tensorboard(folder / "board", histograms=(1, "epochs")),
        ],
    )


def case_in_folder(folder):
    """To the epoch that the environment says, from wherever the run stands."""
    run = fnet.Run(os.environ["RUN"], resume="auto", config={"a": 1}, keep_best="validation_loss")
    return made("dropout", run=run, epochs=int(os.environ["EPOCHS"]))


def case_stream_in_folder(folder):
    options = {"data": fnet.data.Stream(Parts(), steps_per_epoch=3), "batch_size": None}
    options |= {"validation": fnet.data.Stream(parts_of(X)), "run": fnet.Run(folder / "stream", resume="auto")}
    for epochs in (1, 2):
        found = made(epochs=epochs, **options)
    return found


class Parts:
    """A source that begins anew and says where it stands, as grain's do; of each batch this process' part."""

    def __iter__(self):
        return PartsReader()


class PartsReader:
    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        size = 16 // COUNT
        rows = (16 * self.at + size * INDEX + np.arange(size)) % 43
        return X[rows], Y[rows]

    def get_state(self):
        return {"at": self.at, "process": INDEX}

    def set_state(self, state):
        assert state["process"] == INDEX
        self.at = state["at"]


def case_nonfinite(folder):
    x = X.copy()
    x[11, 3] = 1e200  # whose square is none
    return made("autoencoder", "fsdp8", data=fnet.Batch(x, x), run=fnet.Run(folder / "nonfinite"))


def case_clocks(folder):
    """The clock of another process is half as fast again."""
    if INDEX:
        real = time.perf_counter
        time.perf_counter = lambda: 1.5 * real()
    steps = []
    see = lambda event: steps.append(event.step) if event.kind == "chunk" else None  # noqa: E731
    one = made(steps=150, epochs=None, observers=[see])
    (folder / f"chunks.{INDEX}.json").write_text(json.dumps(steps))
    return one


# --- what is refused, in all ------------------------------------------------------------------------------------------


def case_other_sizes(folder):
    return made(data=batch(48 - 8 * INDEX))


def case_other_rows(folder):
    return made(data=fnet.Batch(X + INDEX, Y))


def case_other_seed(folder):
    case = parts.CASES["mlp"]
    model = case.make()
    params, state = fnet.init(model, jax.random.key(INDEX), jnp.asarray(X[:2]))
    ts = fnet.init_train_state(params, fnet.adam(0.01), jax.random.key(1), state)
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), fnet.adam(0.01))
    return fnet.fit(step, ts, batch(), epochs=1, batch_size=16, placement=parts.on("fsdp8"))


def case_other_key(folder):
    return fnet.init(fnet.mlp(8), jax.random.key(1 + INDEX), jnp.asarray(X[:2]), parts.on("fsdp8"))


def case_other_rate(folder):
    return made(optimizer=fnet.adam(0.01 * (1 + INDEX)))


def case_other_sets(folder):
    return made(validation=batch(48 - 8 * INDEX))


def case_shorter_sets(folder):
    """The first batches are alike, and one process has another one more."""
    held = fnet.data.Stream(Uneven(), steps_per_epoch=2)
    return made(validation=held)


class Uneven:
    def __iter__(self):
        return iter([(X[:8], Y[:8])] * (2 if INDEX == 0 else 1))


def case_a_wrong_answer(folder):
    """The observer that comes after it computes with all processes."""
    from fnet.runs import observers

    wrong = lambda event: "halt" if INDEX and event.kind == "chunk" else None  # noqa: E731
    return made(mesh="fsdp8", observers=[wrong, observers.histograms(folder / "wrong", every=(1, "steps"))])


def case_no_more_metrics(folder):
    opened = Path.open

    def full(path, mode="r", *args, **options):
        if INDEX == 0 and path.name == "metrics.jsonl" and mode == "a":
            raise OSError(28, "No space left on device")
        return opened(path, mode, *args, **options)

    with mock.patch.object(Path, "open", full):
        return made(run=fnet.Run(folder / "full"))


def case_between_fits(folder):
    """The program of one ends with an error of its own, and the other's is told at its next agreement."""
    if INDEX:
        raise KeyError("mine")
    return made()


def case_no_placement(folder):
    return parts.run("mlp")


def case_own_devices(folder):
    placement = fnet.placement(fnet.mesh(data=-1, devices=jax.local_devices()))
    model, ts = parts.start(parts.CASES["mlp"], fnet.adam(0.01))
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), fnet.adam(0.01))
    return fnet.fit(step, ts, batch(), epochs=1, batch_size=16, placement=placement)


def case_an_observer_fails(folder):
    def fails(event):
        if INDEX and event.kind == "chunk":
            raise OSError("no room left for this")

    return made(observers=[fails], run=fnet.Run(folder / "failed"))


def case_an_observer_stops(folder):
    return made(epochs=9, chunk_steps=3, observers=[lambda event: "stop" if INDEX and event.step == 6 else None])


def case_bad_rows(folder):
    x = X.copy()
    x[20:28] = np.nan if INDEX else 0
    return made(data=fnet.data.Stream(parts_of(x)), batch_size=None)


def case_other_parts(folder):
    size = 8 - 4 * INDEX
    batches = fnet.data.Stream([(X[:8], Y[:8]), (X[:size], Y[:size])])
    return made(data=batches, batch_size=None, evaluate=None, validation=None)


def case_a_folder_that_is_there(folder):
    if processes.is_first():
        (folder / "there").mkdir()
        (folder / "there" / "note.txt").write_text("mine")
    processes.meet()
    return made(run=fnet.Run(folder / "there"))


# --- signals ----------------------------------------------------------------------------------------------------------


def case_long(folder):
    """Until a signal comes; when it may, there is FOLDER/pid.INDEX."""
    made_here = 0

    def begun(event):
        nonlocal made_here
        made_here += event.kind == "checkpoint"
        if made_here == 2 and event.kind == "chunk":
            (folder / f"pid.{INDEX}").write_text(str(os.getpid()))

    run = fnet.Run(os.environ["RUN"], resume="auto", config={"a": 1}, keep_best="validation_loss", save_seconds=0.3)
    return made("dropout", epochs=10**6, run=run, observers=[begun])


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    start()
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        begin = time.time()
        try:
            found = globals()[f"case_{name}"](folder)
        except Exception as error:
            (folder / f"{name}.{INDEX}.txt").write_text(f"{type(error).__name__}: {error}")
            if isinstance(error, KeyError) or name == "long":
                raise
        else:
            ts, history = found[:2]
            arrays = {path: processes.on_host(leaf) for path, leaf in named_leaves(ts._replace(opt_state=(), key=()))}
            for kind in ("epochs", "evaluations"):
                arrays |= {f"{kind}/{metric}": values for metric, values in getattr(history, kind).items()}
            if processes.is_first():
                np.savez(folder / f"{name}.npz", **{path.replace("/", "|"): a for path, a in arrays.items()})
        print(f"{name} {time.time() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
