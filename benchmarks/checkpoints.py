"""What it costs to read a checkpoint back before it counts as one: `save_checkpoint(verify=True)` beside without.

    make bench MODULE=benchmarks.checkpoints
    make bench MODULE=benchmarks.checkpoints ARGS="--megabytes 1000 --repeats 5"

Eight arrays of random float32. Times are medians of interleaved rounds; ratios are taken round by round. In a run the
thread that writes bears them, while the device goes on.
"""

from __future__ import annotations

import shutil
import tempfile

import numpy as np

from benchmarks.measuring import arguments, interleaved, record, show


def main() -> None:
    import jax.numpy as jnp

    from fnet.runs.checkpoint import kept_leaves, save_checkpoint

    parser = arguments("reading back what was saved")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1.0, 100.0])
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    options = parser.parse_args()
    rng, tables = np.random.default_rng(0), []
    for megabytes in options.megabytes:
        size = int(megabytes * 1e6 / 4 / 8)
        leaves = kept_leaves({f"w{i}": jnp.asarray(rng.standard_normal(size, np.float32)) for i in range(8)})

        def save(verify, leaves=leaves):
            folder = tempfile.mkdtemp()
            save_checkpoint(folder, 1, leaves, verify=verify)
            shutil.rmtree(folder)

        save(True)
        runs = {"not read back": lambda: save(False), "read back": lambda: save(True)}
        times = interleaved(runs, options.repeats, rest=0.02)
        tables.append(show(f"a checkpoint of {megabytes:g} MB", times, ("not read back",)))
    record(options.json, "checkpoints", tables, also=("orbax-checkpoint",))


if __name__ == "__main__":
    main()
