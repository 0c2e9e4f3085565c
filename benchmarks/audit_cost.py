"""What an audit costs: seconds after compiling against parameters, and memory against the gradient's own.

    make bench MODULE=benchmarks.audit_cost

Networks 784-128-64-10 and wider, batch 32, float32, gradient by hand, default options. Time is that of the whole call
less what jax reports as tracing, lowering and compiling. Memory is what the process' peak grows by, in a process of its
own for each: for the gradient in float64, compiled and run, and for the audit.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import fnet
from benchmarks.measuring import arguments, record, table

COMPILING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


def problem(factor: int):
    """The network with its inner layers wider by a factor: objective, gradient by hand, parameters, batch."""
    model = fnet.mlp(128 * factor, 64 * factor, 10)
    rng = np.random.default_rng(0)
    batch = fnet.Batch(rng.standard_normal((32, 784), np.float32), rng.integers(0, 10, 32))
    params, state = fnet.init(model, jax.random.key(0), batch.inputs)
    engine = fnet.backprop(model, fnet.softmax_cross_entropy)

    def objective(params, batch, key):
        return fnet.softmax_cross_entropy(model.forward(params, state, batch.inputs)[0], batch.targets).mean()

    def by_hand(params, batch, key):
        return engine(params, state, batch, key)[0]

    return objective, by_hand, params, batch


def audit(factor: int):
    objective, by_hand, params, batch = problem(factor)
    return fnet.check_gradients(objective, params, batch, jax.random.key(0), gradient=by_hand).raise_if_wrong()


def gradient(factor: int):
    """The gradient by hand in float64, compiled and run."""
    with jax.enable_x64(True):
        _, by_hand, params, batch = problem(factor)
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
        batch = fnet.Batch(jnp.asarray(np.asarray(batch.inputs, np.float64)), batch.targets)
        return jax.block_until_ready(jax.jit(by_hand)(params, batch, jax.random.key(0)))


def growth(what, factor: int) -> float:
    """Bytes by which the peak of this process grows, after everything was run once on the smallest network."""
    what(1)
    before = peak()
    what(factor)
    return peak() - before


def peak() -> float:
    """The largest resident size of this process so far, in bytes (Linux; getrusage would count the parent's too)."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())
    return 1024.0 * float(kilobytes)


def main() -> None:
    parser = arguments(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--growth", help="of the audit or the gradient, at the last factor; printed in bytes")
    args = parser.parse_args()
    if args.growth:
        print(growth({"audit": audit, "gradient": gradient}[args.growth], args.factors[-1]))
        return
    compiling, seconds = [0.0], {}

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.rsplit("/", 1)[-1] in COMPILING:
            compiling[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    print(f"{'parameters':>12}{'seconds in all':>16}{'compiling':>12}{'the rest':>10}{'rest per million':>18}")
    for factor in args.factors:
        count = sum(leaf.size for leaf in jax.tree.leaves(problem(factor)[2]))
        compiling[0], start = 0.0, time.perf_counter()
        audit(factor)
        total = time.perf_counter() - start
        rest = total - compiling[0]
        print(f"{count:>12,}{total:>16.2f}{compiling[0]:>12.2f}{rest:>10.2f}{1e6 * rest / count:>18.2f}")
        seconds |= {f"{count:,} parameters": [total], f"{count:,} parameters, after compiling": [rest]}
    grown = {}
    for what in ("gradient", "audit"):
        factors = map(str, args.factors)
        command = [sys.executable, "-m", "benchmarks.audit_cost", "--growth", what, "--factors", *factors]
        grown[what] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    megabytes = {what: f"{size / 1e6:,.0f} MB" for what, size in grown.items()}
    print(f"\npeak memory at the largest: {megabytes}, audit / gradient = {grown['audit'] / grown['gradient']:.1f}")
    memory = {what: [size / 1e6] for what, size in grown.items()}
    tables = [table("an audit", seconds), table("peak memory at the largest", memory, ("gradient",), "MB")]
    record(args.json, "audit_cost", tables)


if __name__ == "__main__":
    main()
