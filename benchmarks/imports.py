"""How long a process takes that imports fnet, relative to one that imports jax: medians of interleaved rounds.

python -m benchmarks.imports                    make bench MODULE=benchmarks.imports
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 9
STEP = ["mlp", "init", "adam", "backprop", "make_step", "init_train_state", "softmax_cross_entropy", "train"]
PROGRAMS = {
    "import jax": "import jax",
    "import jax, fnet": "import jax, fnet",
    "what a training step and `train` need": f"import fnet; [getattr(fnet, name) for name in {STEP}]",
    "the same and `fit`": f"import fnet; [getattr(fnet, name) for name in {[*STEP, 'fit', 'data', 'make_evaluate']}]",
    "every room": "import fnet; [getattr(fnet, name) for name in fnet.ROOMS]",
}


def seconds(code: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def main() -> None:
    took = {name: [] for name in PROGRAMS}
    for _ in range(ROUNDS):
        for name, code in PROGRAMS.items():
            took[name].append(seconds(code))
    base = took["import jax"]
    for name, each in took.items():
        ratios = [a / b for a, b in zip(each, base, strict=True)]
        middle = statistics.median(ratios)
        print(f"{name:38} {statistics.median(each):.3f} s  {middle:.2f} ({min(ratios):.2f}–{max(ratios):.2f})")


if __name__ == "__main__":
    main()
