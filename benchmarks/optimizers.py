"""Updates of 10 million parameters by each optimizer, beside optax's and beside the floor, float32.

    make bench MODULE=benchmarks.optimizers
    make bench MODULE=benchmarks.optimizers ARGS="--only adam lion --repeats 15"

The parameters are ten matrices of 1,000 × 1,000. A round is one program of five updates in `jax.lax.scan` (one of
muon), as a run is: what an update needs beside its arrays is allocated once. Each has gradients of its own, the same
arrays times a number that the loop brings. The floor is a pass over the same arrays that does a multiplication and an
addition on each: parameters, gradients and as many moments as the optimizer keeps. State and parameters are donated;
optax' updates are applied by `optax.apply_updates`. Times are medians of rounds; ratios are taken round by round,
between neighbours in time. Muon and Adafactor do more than pass over arrays: their floor is that of their bytes alone.

LAMB and Adafactor read whole matrices before they change one, and XLA on CPU works on all of them at once, with scratch
memory for each. They have rows with the scheduler that goes from one to the next as well, as a run has it by
``XLA_FLAGS=--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED``.
"""

from __future__ import annotations

import numpy as np

from benchmarks.measuring import arguments, interleaved, record, scaled, show

LEAVES, SIDE = 10, 1000
MOMENTS = {
    "sgd": 0,
    "momentum": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "adadelta": 2,
    "adam": 2,
    "adamw": 2,
    "amsgrad": 3,
    "adamax": 2,
    "nadam": 2,
    "radam": 2,
    "lion": 1,
    "lamb": 2,
    "adafactor": 0,
    "muon": 1,
}
WHOLE = "lamb", "adafactor"
IN_TURN = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def updates_of(name: str) -> int:
    """How many updates a round makes; one of muon takes seconds."""
    return 1 if name == "muon" else 5


def gradients():
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    return {f"w{i}": jnp.asarray(rng.standard_normal((SIDE, SIDE), np.float32)) for i in range(LEAVES)}


def repeated(update, params, opt_state, grads, updates: int, options=None):
    """A round of updates; what it donates it replaces."""
    import jax
    import jax.numpy as jnp

    def many(carry, grads, factors):
        def one(carry, factor):
            return update(*carry, jax.tree.map(lambda g: factor * g, grads)), None

        return jax.lax.scan(one, carry, factors)[0]

    program = jax.jit(many, donate_argnums=0, compiler_options=options)
    factors, held = jnp.linspace(0.9, 1.1, updates), [(params, opt_state)]

    def run():
        held[0] = jax.block_until_ready(program(held[0], grads, factors))

    run()
    return run


def fnet_update(name: str, grads, options=None):
    import jax

    import fnet

    optimizer = getattr(fnet.optimizers, name)(1e-3)
    params = jax.tree.map(lambda g: g + 1, grads)
    start = params, jax.jit(optimizer.init)(params)
    return repeated(lambda p, s, g: optimizer.update(g, s, p), *start, grads, updates_of(name), options)


def optax_update(name: str, grads, options=None):
    import jax
    import optax

    peers = {"momentum": lambda rate: optax.sgd(rate, 0.9), "muon": optax.contrib.muon}
    optimizer = (peers.get(name) or getattr(optax, name))(1e-3)

    def step(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(lambda g: g + 1, grads)
    return repeated(step, params, jax.jit(optimizer.init)(params), grads, updates_of(name), options)


def floor(name: str, grads):
    import jax

    def step(params, state, grads):
        # every array is read once and, but for the gradients, written once
        state = [jax.tree.map(lambda m, g: 0.9 * m + g, moment, grads) for moment in state]
        last = state[-1] if state else grads
        return jax.tree.map(lambda p, m: p - 1e-3 * m, params, last), state

    params = jax.tree.map(lambda g: g + 1, grads)
    state = [jax.tree.map(lambda g: 0 * g, grads) for _ in range(MOMENTS[name])]
    return repeated(step, params, state, grads, updates_of(name))


def main() -> None:
    import jax

    parser = arguments("One update of 10 million parameters: fnet, optax and the floor")
    parser.add_argument("--only", choices=MOMENTS, nargs="+", default=list(MOMENTS), help="these optimizers")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    options = parser.parse_args()
    grads, tables = gradients(), []
    for name in options.only:
        runs = {
            "floor": floor(name, grads),
            "optax": optax_update(name, grads),
            "fnet": fnet_update(name, grads),
        }
        if name in WHOLE and jax.default_backend() == "cpu":
            runs["optax, in turn"] = optax_update(name, grads, IN_TURN)
            runs["fnet, in turn"] = fnet_update(name, grads, IN_TURN)
        per_update = scaled(interleaved(runs, options.repeats, rest=0.02), 1e3 / updates_of(name))
        title = f"{name}: an update of {LEAVES * SIDE * SIDE:,} parameters"
        tables.append(show(title, per_update, ("floor", "optax"), unit="ms"))
    record(options.json, "optimizers", tables, also=("optax",))


if __name__ == "__main__":
    main()
