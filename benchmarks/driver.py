"""What `fnet.fit` costs beside the bare compiled run, and that its memory stays flat.

    make bench MODULE=benchmarks.driver
    make bench MODULE=benchmarks.driver ARGS="--steps 20000 --repeats 5"

The run: 64-32-10 on random data, batch 32, Adam, metrics of loss and accuracy. Bare is `fnet.train` in one program,
whose metrics come to the host at its end; fit reads them chunk by chunk, tells an observer, and with a folder writes
metrics and checkpoints. Times are medians of rounds; ratios are taken round by round. Memory is the resident set of the
process over the second half of one long run.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measuring import arguments, interleaved, record, scaled, show

EXAMPLES, BATCH = 3200, 32


def parts():
    import jax

    import fnet
    from fnet.metrics import accuracy

    rng = np.random.default_rng(0)
    data = fnet.check_data((rng.standard_normal((EXAMPLES, 64), np.float32), rng.integers(0, 10, EXAMPLES)))
    model, optimizer = fnet.mlp(32, 10), fnet.adam(1e-3)
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy, {"accuracy": accuracy}), optimizer)
    params, state = fnet.init(model, jax.random.key(0), data.inputs[:1])
    return step, fnet.init_train_state(params, optimizer, jax.random.key(1), state), data


def resident() -> float:
    """Megabytes that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    import jax

    import fnet

    parser = arguments("fit beside the bare scan")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    options = parser.parse_args()
    step, start, data = parts()
    epochs = options.steps // (EXAMPLES // BATCH)
    bare = jax.jit(lambda ts, data: fnet.train(step, ts, data, epochs=epochs, batch_size=BATCH))
    seen: list[float] = []

    def look(event):
        if event.kind == "chunk":
            seen.append(resident())

    def fit(**kept):
        return lambda: fnet.fit(step, start, data, epochs=epochs, batch_size=BATCH, observers=[look], **kept)

    def in_folder():
        with tempfile.TemporaryDirectory() as folder:
            fit(run=fnet.Run(Path(folder) / "run"))()

    runs = {
        "bare": lambda: jax.device_get(bare(start, data)),
        "fit": fit(),
        "fit, no copies": fit(keep=False),
        "fit in a folder": in_folder,
    }
    for run in runs.values():
        run()
    times = scaled(interleaved(runs, options.repeats, rest=0.02), 1e3)
    title = f"{epochs * (EXAMPLES // BATCH):,} steps of 64-32-10, batch {BATCH}"
    tables = [show(title, times, ("bare",), unit="ms")]
    seen.clear()
    runs["fit"]()
    half = seen[len(seen) // 2 :]
    held = {"at its begin": [half[0]], "at its end": [half[-1]]}
    tables.append(show(f"resident memory over the second half of {len(seen)} chunks", held, unit="MB"))
    record(options.json, "driver", tables, also=("orbax-checkpoint",))


if __name__ == "__main__":
    main()
