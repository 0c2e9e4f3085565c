"""Where the first second goes: a process that trains 784-128-64-10 by `fit`, stage by stage.

    make bench MODULE=benchmarks.cold
    make bench MODULE=benchmarks.cold ARGS="--repeats 9"

Each process is a fresh one, in turn without a compilation cache and with jax's in a folder that another has filled. The
stages:

- Python starts; jax is imported; fnet is, with all that a training needs
- the backend: jax finds its devices and runs its first program, the key
- data: 800 examples are checked and sent
- init of the parameters; the training's start, moments and all
- `fit` checks its arguments, traces a step and compiles small programs
- its own program of any number of steps: traced, lowered (to the compiler's language), compiled or read from the cache
- the first chunk, of 10 steps; the rest of one epoch

By the clock of each process, in seconds; `all of it` is their sum.
"""

from __future__ import annotations

import json
import os
import tempfile
import time

BEGAN = time.time()

from benchmarks.measuring import arguments, process, record, show  # noqa: E402

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}
STAGES = (
    *("Python", "import jax", "import fnet", "backend and key", "data", "init", "start"),
    *("fit: arguments", *(f"fit: {name}" for name in EVENTS.values()), "fit: first chunk", "fit: rest"),
)


def stages(started: float) -> dict[str, float]:
    """Seconds of each stage of a training in this process, which was ``started`` at that time."""
    took, last = {"Python": BEGAN - started}, time.perf_counter()

    def done(stage: str) -> None:
        nonlocal last
        took[stage], last = time.perf_counter() - last, time.perf_counter()

    import jax

    done("import jax")
    import fnet

    for name in ("mlp", "init", "adam", "backprop", "make_step", "init_train_state", "fit", "check_data"):
        getattr(fnet, name)  # which is imported when it is first asked for
    from benchmarks.s1 import BATCH, RATE, SIZES, random_data

    done("import fnet")
    key = jax.block_until_ready(jax.random.key(0))
    done("backend and key")
    data = jax.block_until_ready(fnet.check_data(random_data()))
    done("data")
    model, optimizer = fnet.mlp(*SIZES[1:]), fnet.adam(RATE)
    params, state = jax.block_until_ready(fnet.init(model, key, data.inputs[:1]))
    done("init")
    start = jax.block_until_ready(fnet.init_train_state(params, optimizer, key, state))
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    done("start")

    def listen(event: str, seconds: float, **about: str | int) -> None:
        if event in EVENTS and "run_chunk" in str(about.get("fun_name")):
            took[f"fit: {EVENTS[event]}"] = seconds

    jax.monitoring.register_event_duration_secs_listener(listen)  # pyright: ignore[reportArgumentType]

    def look(event) -> None:
        if event.kind == "compile":
            done("fit: arguments")
            took["fit: arguments"] -= sum(took[f"fit: {name}"] for name in EVENTS.values())
        if event.kind == "chunk" and "fit: first chunk" not in took:
            done("fit: first chunk")

    fnet.fit(step, start, data, epochs=1, batch_size=BATCH, chunk_steps=10, observers=[look])
    done("fit: rest")
    return {stage: took[stage] for stage in STAGES}


def main() -> None:
    parser = arguments("the first second of a process, stage by stage")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--once", type=float, metavar="STARTED", help="the stages of this process, started then, as JSON"
    )
    options = parser.parse_args()
    if options.once is not None:
        print(json.dumps(stages(options.once)))
        return
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        warm = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        kinds = {"nothing compiled yet": {}, "with a warm cache": warm}
        seconds: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
        for i in range(options.repeats + 1):
            for kind, environment in kinds.items():
                found = json.loads(process("-m", "benchmarks.cold", "--once", repr(time.time()), **environment)())
                if i:  # the first fills the cache, and the operating system's
                    for stage, took in {**found, "all of it": sum(found.values())}.items():
                        seconds[kind].setdefault(stage, []).append(took)
    tables = [show(f"a cold process, {kind}", times, ("all of it",)) for kind, times in seconds.items()]
    record(options.json, "cold", tables)


if __name__ == "__main__":
    main()
