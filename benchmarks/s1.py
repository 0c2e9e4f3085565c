"""The source texts' example (S1) against its peers: 784-128-64-10, batch 32, 50 epochs of 25 steps, Adam, float32.

    make bench
    make bench ARGS="--repeats 15 --processes 5"

Two tables from one run: the training alone after warm-up, all peers in turn, and the whole process from its start over
import, compilation and training to its end. Times are medians; ratios are taken run by run, between neighbours in time.
`torch.compile` is in the first table alone: a process of it compiles for longer than it trains.
"""

from __future__ import annotations

import itertools
import tempfile

import numpy as np

from benchmarks.measuring import arguments, interleaved, process, record, show

SIZES, EXAMPLES, EPOCHS, BATCH, RATE = (784, 128, 64, 10), 800, 50, 32, 1e-3


def random_data():
    """Standard normal inputs (800, 784) and random labels (800,): the 80 % of S1's 1,000 that are trained on."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((EXAMPLES, SIZES[0]), np.float32), rng.integers(0, SIZES[-1], EXAMPLES)


# --- the peers: each takes the data and returns a function that trains from fresh parameters and gives the last loss -


def fnet_by(engine_name):
    def prepare(inputs, labels):
        import jax

        import fnet

        data = fnet.check_data((inputs, labels))
        model, optimizer = fnet.mlp(*SIZES[1:]), fnet.adam(RATE)
        gradient = getattr(fnet, engine_name)(model, fnet.softmax_cross_entropy)
        step = fnet.make_step(gradient, optimizer)
        params, state = fnet.init(model, jax.random.key(0), data.inputs[:1])
        start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
        program = jax.jit(lambda ts, data: fnet.train(step, ts, data, epochs=EPOCHS, batch_size=BATCH)[1]["loss"])
        return lambda: program(start, data).value[-1].mean().item()

    return prepare


def plain_functions():
    """What one writes without a library, `init`, `update` and `train`: `jax.grad`, Adam by hand, a scan in a scan."""
    import jax
    import jax.numpy as jnp

    def loss_fn(params, x, y):
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        logits = x @ params[-1][0] + params[-1][1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def init(key):
        return [
            (jax.random.normal(jax.random.fold_in(key, i), (n, m)) * (2 / n) ** 0.5, jnp.zeros(m))
            for i, (n, m) in enumerate(itertools.pairwise(SIZES))
        ]

    def update(carry, batch):
        params, mu, nu, t = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
        nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, nu, grads)
        t = t + 1
        c1, c2 = 1 - 0.9**t, 1 - 0.999**t
        params = jax.tree.map(lambda p, m, v: p - RATE * (m / c1) / (jnp.sqrt(v / c2) + 1e-8), params, mu, nu)
        return (params, mu, nu, t), loss

    def train(params, x, y, key):
        def epoch(carry, key):
            order = jax.random.permutation(key, EXAMPLES).reshape(-1, BATCH)
            return jax.lax.scan(lambda carry, rows: update(carry, (x[rows], y[rows])), carry, order)

        zeros = jax.tree.map(jnp.zeros_like, params)
        _, losses = jax.lax.scan(epoch, (params, zeros, zeros, 0.0), jax.random.split(key, EPOCHS))
        return losses[-1].mean()

    return init, update, train


def plain_jax(inputs, labels):
    import jax
    import jax.numpy as jnp

    init, _, train = plain_functions()
    params = jax.jit(init)(jax.random.key(0))
    program, x, y = jax.jit(train), jnp.asarray(inputs), jnp.asarray(labels)
    return lambda: program(params, x, y, jax.random.key(1)).item()


def flax_linen(inputs, labels):
    """flax linen and optax, with the epochs in a scan."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen
    from flax.training.train_state import TrainState

    model = linen.Sequential([linen.Dense(128), linen.relu, linen.Dense(64), linen.relu, linen.Dense(10)])
    x, y = jnp.asarray(inputs), jnp.asarray(labels)
    params = jax.jit(model.init)(jax.random.key(0), x[:1])
    start = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(RATE))

    def step(state, batch):
        def loss_fn(params):
            return optax.softmax_cross_entropy_with_integer_labels(state.apply_fn(params, batch[0]), batch[1]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    @jax.jit
    def train(state, x, y, key):
        def epoch(state, key):
            order = jax.random.permutation(key, EXAMPLES).reshape(-1, BATCH)
            return jax.lax.scan(lambda state, rows: step(state, (x[rows], y[rows])), state, order)

        return jax.lax.scan(epoch, state, jax.random.split(key, EPOCHS))[1][-1].mean()

    return lambda: train(start, x, y, jax.random.key(1)).item()


def equinox_optax(inputs, labels):
    """equinox and optax as in equinox' own examples: one compiled step, a loop in Python."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    keys = jax.random.split(jax.random.key(0), 3)
    layers = [eqx.nn.Linear(n, m, key=key) for n, m, key in zip(SIZES, SIZES[1:], keys, strict=False)]
    relu = eqx.nn.Lambda(jax.nn.relu)
    start, optimizer = eqx.nn.Sequential([layers[0], relu, layers[1], relu, layers[2]]), optax.adam(RATE)

    @eqx.filter_jit
    def step(model, opt_state, x, y):
        def loss_fn(model):
            return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()

        loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
        updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), opt_state, loss

    def run():
        rng, model = np.random.default_rng(1), start
        opt_state = optimizer.init(eqx.filter(model, eqx.is_array))
        for _ in range(EPOCHS):
            losses = []
            for rows in rng.permutation(EXAMPLES).reshape(-1, BATCH):
                model, opt_state, loss = step(model, opt_state, inputs[rows], labels[rows])
                losses.append(loss)
        return jnp.stack(losses).mean().item()

    return run


def torch_by(compiled: bool):
    """torch as usual, an eager loop with the fused Adam; or the loss by `torch.compile`, in the same loop."""

    def prepare(inputs, labels):
        import torch
        from torch import nn

        torch.manual_seed(0)
        x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
        start, loss_fn = {name: leaf.clone() for name, leaf in model.state_dict().items()}, nn.CrossEntropyLoss()

        def loss_of(x, y):
            return loss_fn(model(x), y)

        loss_of = torch.compile(loss_of, fullgraph=True) if compiled else loss_of

        def run():
            torch.manual_seed(0)
            model.load_state_dict(start)
            optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
            for _ in range(EPOCHS):
                losses = []
                for rows in torch.randperm(EXAMPLES).split(BATCH):
                    optimizer.zero_grad()
                    loss = loss_of(x[rows], y[rows])
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
            return torch.stack(losses).mean().item()

        return run

    return prepare


PEERS = {
    "torch": torch_by(compiled=False),
    "torch.compile": torch_by(compiled=True),
    "plain jax": plain_jax,
    "fnet autodiff": fnet_by("autodiff"),
    "fnet backprop": fnet_by("backprop"),
    "flax linen + optax": flax_linen,
    "equinox + optax": equinox_optax,
}


def main() -> None:
    parser = arguments("fnet and its peers on the S1 example")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of the training alone")
    parser.add_argument("--processes", type=int, default=9, help="rounds of whole processes")
    parser.add_argument("--only", choices=PEERS, help="train once by this peer and stop: one whole process")
    options = parser.parse_args()
    if options.only:
        print(f"loss {PEERS[options.only](*random_data())():.6f}")
        return

    runs = {name: prepare(*random_data()) for name, prepare in PEERS.items()}
    for name, run in runs.items():
        print(f"{name}: loss in the last epoch {run():.4f}", flush=True)
    baselines = ("torch", "plain jax")
    tables = [show("the training alone, after warm-up", interleaved(runs, options.repeats), baselines)]

    with tempfile.TemporaryDirectory() as cache:
        cached = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        whole = {name: process("-m", "benchmarks.s1", "--only", name) for name in PEERS if name != "torch.compile"}
        whole["fnet backprop, cache warm"] = process("-m", "benchmarks.s1", "--only", "fnet backprop", **cached)
        interleaved(whole, 1)  # fills the cache, and the operating system's
        tables.append(show("the whole process", interleaved(whole, options.processes), baselines))
    record(options.json, "s1", tables, also=("torch", "flax", "optax", "equinox"))


if __name__ == "__main__":
    main()
