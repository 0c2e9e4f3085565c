"""What an audit costs: seconds against parameters, and memory against the gradient's own.

    make bench MODULE=benchmarks.audit_cost

Networks 784-128-64-10 and wider, batch 32, float32, gradient by hand, default options. Time is that of the whole call,
and of the same audit made again, whose programs are kept. Memory is what the process' peak grows by, in a process of
its own for each: for the gradient in float64, compiled and run, and for the audit.

Beside others: the audits of 223 wrong gradients of seven functions, small and middle, a function again and again
with another fault, beside `jax.test_util.check_grads` on the same, case by case in turn; and the audit of 784-128-64-10
beside that network's training run (`benchmarks.s1`: 50 epochs of 25 steps), both from nothing traced to their ends.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

import fnet
from benchmarks.gradient_checkers import Case, faulty_cases
from benchmarks.measuring import arguments, record, table, timed
from benchmarks.s1 import fnet_by, random_data
from fnet.gradcheck import kept


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


def compiles_and_seconds(what: Callable) -> tuple[Any, int, float]:
    """What a call returns, how many programs were compiled meanwhile, and how long it took."""
    counted = [0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        counted[0] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    try:
        return what(), counted[0], time.perf_counter() - start
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def audited(case: Case) -> bool:
    """Whether the audit finds the gradient wrong."""
    return not fnet.check_gradients(case.f, case.params, *case.args, gradient=case.gradient).ok


def checked(case: Case) -> bool:
    """Whether check_grads does, of the function with that gradient as its own rule."""

    @jax.custom_vjp
    def f(params):
        return case.f(params, *case.args)

    def backward(params, d):
        return ({path: jnp.asarray(np.asarray(g) * d) for path, g in case.gradient(params, *case.args).items()},)

    f.defvjp(lambda params: (case.f(params, *case.args), params), backward)
    try:
        check_grads(f, (case.params,), order=1, modes=["rev"])
    except AssertionError:
        return True
    return False


def beside_check_grads(count: int) -> dict:
    """All audits of ``count`` cases beside all `check_grads`, by turns; the totals as a table."""
    cases = faulty_cases(("small", "middle"))[::2][:count]
    functions = {re.sub(r".*: (dense|[^,]*).*", r"\1", case.name) for case in cases}
    totals = {what: [0, 0, 0.0] for what in (audited, checked)}  # caught, programs compiled, seconds
    for k, case in enumerate(cases):
        with jax.enable_x64(case.x64):
            for what in list(totals)[:: 1 if k % 2 else -1]:
                found = compiles_and_seconds(functools.partial(what, case))
                totals[what] = [a + b for a, b in zip(totals[what], found, strict=True)]
    print(f"{len(cases)} wrong gradients of {len(functions)} functions")
    print(f"{'':<28}{'caught':>8}{'programs compiled':>20}{'seconds':>10}{'each':>8}")
    for name, (caught, programs, seconds) in zip(
        ("fnet.check_gradients", "jax check_grads"), totals.values(), strict=True
    ):
        print(f"{name:<28}{caught:>8}{programs:>20,}{seconds:>10.1f}{seconds / len(cases):>8.2f}")
    print(f"audits / check_grads = {totals[audited][2] / totals[checked][2]:.2f}")
    took = {"jax check_grads": [totals[checked][2]], "fnet audit": [totals[audited][2]]}
    return table(f"{len(cases)} wrong gradients of {len(functions)} functions", took, ("jax check_grads",))


def beside_training(rounds: int) -> dict:
    """The audit of 784-128-64-10 beside its training, both compiled anew each time."""
    inputs, labels = random_data()
    runs = {"training": lambda: fnet_by("backprop")(inputs, labels)(), "audit": lambda: audit(1)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            jax.clear_caches()
            kept.forget()
            _, programs, took = compiles_and_seconds(run)
            seconds[name].append(took)
            print(f"{name} of 784-128-64-10: {took:.2f} s, {programs} programs compiled")
    ratios = [a / b for a, b in zip(seconds["audit"], seconds["training"], strict=True)]
    print(f"audit / training = {statistics.median(ratios):.2f}, the median of {rounds}")
    return table("784-128-64-10: an audit and the training, compiled and run", seconds, ("training",))


def main() -> None:
    parser = arguments(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--growth", help="of the audit or the gradient, at the last factor; printed in bytes")
    parser.add_argument("--audits", type=int, default=223, help="so many beside check_grads")
    args = parser.parse_args()
    if args.growth:
        print(growth({"audit": audit, "gradient": gradient}[args.growth], args.factors[-1]))
        return
    seconds = {}
    print(f"{'parameters':>12}{'seconds':>16}{'made again':>12}{'per million':>18}")
    for factor in args.factors:
        count = sum(leaf.size for leaf in jax.tree.leaves(problem(factor)[2]))
        first, again = (timed(functools.partial(audit, factor)) for _ in range(2))
        print(f"{count:>12,}{first:>16.2f}{again:>12.2f}{1e6 * again / count:>18.2f}")
        seconds |= {f"{count:,} parameters": [first], f"{count:,} parameters, made again": [again]}
    grown = {}
    for what in ("gradient", "audit"):
        factors = map(str, args.factors)
        command = [sys.executable, "-m", "benchmarks.audit_cost", "--growth", what, "--factors", *factors]
        grown[what] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    megabytes = {what: f"{size / 1e6:,.0f} MB" for what, size in grown.items()}
    print(f"\npeak memory at the largest: {megabytes}, audit / gradient = {grown['audit'] / grown['gradient']:.1f}")
    memory = {what: [size / 1e6] for what, size in grown.items()}
    tables = [table("an audit", seconds), table("peak memory at the largest", memory, ("gradient",), "MB")]
    tables += [beside_training(3), beside_check_grads(args.audits)]
    record(args.json, "audit_cost", tables)


if __name__ == "__main__":
    main()
