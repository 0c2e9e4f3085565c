"""How long a process takes that imports fnet, relative to one that imports jax: medians of interleaved rounds.

python -m benchmarks.imports                    make bench MODULE=benchmarks.imports
"""

from __future__ import annotations

from benchmarks.measuring import arguments, interleaved, process, record, show

STEP = ["mlp", "init", "adam", "backprop", "make_step", "init_train_state", "softmax_cross_entropy", "train"]
PROGRAMS = {
    "import jax": "import jax",
    "import jax, fnet": "import jax, fnet",
    "what a training step and `train` need": f"import fnet; [getattr(fnet, name) for name in {STEP}]",
    "the same and `fit`": f"import fnet; [getattr(fnet, name) for name in {[*STEP, 'fit', 'data', 'make_evaluate']}]",
    "every room": "import fnet; [getattr(fnet, name) for name in fnet.ROOMS]",
}


def main() -> None:
    parser = arguments("how long importing fnet takes")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    options = parser.parse_args()
    runs = {name: process("-c", code) for name, code in PROGRAMS.items()}
    times = interleaved(runs, options.repeats, rest=0.0)
    record(options.json, "imports", [show("a process that imports", times, ("import jax",))])


if __name__ == "__main__":
    main()
