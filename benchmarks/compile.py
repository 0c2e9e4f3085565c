"""How long compiling takes, of `fit`'s program beside a hand-written step, and of a deep model by `repeat`.

    make bench MODULE=benchmarks.compile
    make bench MODULE=benchmarks.compile ARGS="--repeats 15"

- 784-128-64-10 with Adam, batch 32: what `fit` says that it compiled (``History.compile_seconds``: its program of any
  number of steps), the same from the call of `fit` to its first chunk (arguments checked, small programs compiled), a
  jitted step and a jitted run (`benchmarks.s1`) of plain jax.
- gpt of 32 features and 2 heads, sequences of 16 ids: a jitted step, with 2 and with 64 blocks by `repeat`, and with 2
  unrolled.

Tracing, lowering and compiling, each in a process of its own, in which one small program ran before; without a
compilation cache. Times are medians of interleaved rounds; ratios are taken round by round.
"""

from __future__ import annotations

import os
import time

from benchmarks.measuring import arguments, process, record, show
from benchmarks.s1 import BATCH, RATE, SIZES, plain_functions, random_data


def fit() -> tuple[float, float]:
    """What `fit` says that it compiled, and seconds from its call until its program was there."""
    import jax

    import fnet

    data = fnet.check_data(random_data())
    model, optimizer = fnet.mlp(*SIZES[1:]), fnet.adam(RATE)
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    params, state = fnet.init(model, jax.random.key(0), data.inputs[:1])
    start = jax.block_until_ready(fnet.init_train_state(params, optimizer, jax.random.key(1), state))
    told = {}

    def look(event):
        told.setdefault(event.kind, time.perf_counter())

    begin = time.perf_counter()
    _, history = fnet.fit(step, start, data, steps=1, batch_size=BATCH, observers=[look])
    return history.compile_seconds, told["compile"] - begin


def compiling(function, *examples, **options) -> float:
    """Seconds until the function is compiled for arguments like the examples."""
    import jax

    jitted = jax.jit(function, **options)
    begin = time.perf_counter()
    jitted.lower(*examples).compile()
    return time.perf_counter() - begin


def plain_step() -> float:
    import jax

    init, update, _ = plain_functions()
    params = jax.eval_shape(init, jax.random.key(0))
    x, y = random_data()
    carry = params, params, params, jax.ShapeDtypeStruct((), "float32")
    return compiling(update, carry, (x[:BATCH], y[:BATCH]), donate_argnums=0)


def plain_run() -> float:
    import jax

    init, _, train = plain_functions()
    return compiling(train, jax.eval_shape(init, jax.random.key(0)), *random_data(), jax.random.key(1))


def gpt(blocks: int, repeated: bool) -> float:
    import jax

    import fnet

    model = fnet.models.gpt(100, length=16, layers=blocks, features=32, heads=2, repeated=repeated)
    optimizer, ids = fnet.adam(RATE), jax.ShapeDtypeStruct((8, 16), "int32")

    def start(key):
        params, state = fnet.init(model, key, ids)
        return fnet.init_train_state(params, optimizer, key, state)

    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    return compiling(step, jax.eval_shape(start, jax.random.key(0)), fnet.Batch(ids, ids), donate_argnums=0)


MLP = {
    "plain jax, a step": lambda: [plain_step()],
    "plain jax, a run": lambda: [plain_run()],
    "fit": lambda: [*fit()],
}
GPT = {
    "2 blocks by repeat": lambda: [gpt(2, True)],
    "64 blocks by repeat": lambda: [gpt(64, True)],
    "2 blocks, unrolled": lambda: [gpt(2, False)],
}
ROWS = {"fit": ("fit", "fit, from its call")}  # of what gives two figures


def main() -> None:
    parser = arguments("compile times of fit's program and of deep models")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--only", choices=[*MLP, *GPT], help="compile this once and print the seconds")
    options, tables = parser.parse_args(), []
    if options.only:
        import jax

        jax.block_until_ready(jax.jit(lambda x: x + 1)(0.0))
        print(*{**MLP, **GPT}[options.only]())
        return
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    for title, forms, base in (
        ("784-128-64-10: compiling", MLP, "plain jax, a step"),
        ("gpt: compiling a step", GPT, "2 blocks by repeat"),
    ):
        runs = {name: process("-m", "benchmarks.compile", "--only", name) for name in forms}
        seconds: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            for name, run in runs.items():
                for row, figure in zip(ROWS.get(name, (name,)), run().split(), strict=True):
                    seconds.setdefault(row, []).append(float(figure))
        tables.append(show(title, seconds, (base,)))
    record(options.json, "compile", tables)


if __name__ == "__main__":
    main()
