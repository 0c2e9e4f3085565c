"""A training step of seven models, by fnet's two engines and by its peers, float32, Adam.

    make bench MODULE=benchmarks.models
    make bench MODULE=benchmarks.models ARGS="--only lstm --repeats 15"

- mlp: 784-128-64-10, batch 32
- lenet: LeNet-5, batch 64, images 28×28
- resnet8: ResNet-8, stages of one block with 16, 32 and 64 maps, batch 32, images 32×32×3
- lstm, gru, rnn: embedding of 64, a recurrent layer of 128, dense of 100; 32 sequences of 64 ids out of 100
- gpt: 4 blocks of 128 features and 4 heads, the embedding tied; 32 sequences of 64 ids out of 100

All train on the same batches, all in turn; fnet as it is used (`jax.lax.scan` over the steps of a round), flax linen
and equinox with optax likewise, torch in an eager loop with its fused Adam, and with the loss by `torch.compile` in it,
which leaves lstm, gru and rnn to the eager kernels and needs a compiler of C++. The models have as many parameters in
each library, but for the second biases of torch's recurrent layers, which are not counted. Times are medians of rounds;
ratios are taken round by round, between neighbours in time. What comes before is not in them: a second table has the
seconds until the first round has ended, models made and programs compiled, with no cache of `torch.compile`.
"""

from __future__ import annotations

import functools
import os
import tempfile

import numpy as np

from benchmarks.measuring import arguments, interleaved, record, scaled, show, timed
from benchmarks.peers import BLOCKS, EMBEDDED, FEATURES, HEADS, LENGTH, RATE, UNITS, VOCABULARY, WIDTHS, Prepared

# in a round: a program's scratch memory is allocated at its call, which a run of many steps makes once
STEPS = {"mlp": 200, "lenet": 40, "resnet8": 10, "lstm": 20, "gru": 10, "rnn": 20, "gpt": 6}


def data_for(name: str):
    """Inputs and targets of a round's steps, ``(steps, batch, ...)``."""
    rng, steps = np.random.default_rng(0), STEPS[name]
    shapes = {"mlp": (32, WIDTHS[0]), "lenet": (64, 28, 28, 1), "resnet8": (32, 32, 32, 3)}
    if name in shapes:
        batch, *shape = shapes[name]
        return rng.standard_normal((steps, batch, *shape), np.float32), rng.integers(0, 10, (steps, batch))
    ids = rng.integers(0, VOCABULARY, (steps, 32, LENGTH + 1))
    return ids[..., :-1], ids[..., 1:]


def fnet_model(name: str, repeated: bool):
    import fnet
    from fnet.layers import dense, embedding, serial

    if name == "mlp":
        return fnet.mlp(*WIDTHS[1:])
    if name == "lenet":
        return fnet.models.lenet5()
    if name == "resnet8":
        return fnet.models.resnet(10)
    if name == "gpt":
        return fnet.models.gpt(
            VOCABULARY, length=LENGTH, layers=BLOCKS, features=FEATURES, heads=HEADS, repeated=repeated
        )
    return serial(embedding(VOCABULARY, EMBEDDED), getattr(fnet.layers, name)(UNITS), dense(VOCABULARY))


def by_fnet(name: str, inputs, targets, engine: str, repeated: bool = False) -> Prepared:
    import jax
    import jax.numpy as jnp

    import fnet

    model, optimizer = fnet_model(name, repeated), fnet.adam(RATE)
    batches = fnet.Batch(jnp.asarray(inputs), jnp.asarray(targets))
    params, state = fnet.init(model, jax.random.key(0), batches.inputs[0])
    start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
    step = fnet.make_step(getattr(fnet, engine)(model, fnet.softmax_cross_entropy), optimizer)
    program = jax.jit(lambda ts, batches: jax.lax.scan(step, ts, batches)[1]["loss"])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Prepared(lambda: program(start, batches).value[-1].item(), parameters)


def peers_of(name: str) -> dict:
    from benchmarks.peers import eqx, linen, pytorch

    peers = {
        "torch": pytorch.prepare,
        "torch.compile": functools.partial(pytorch.prepare, compiled=True),
        "flax linen + optax": linen.prepare,
        "equinox + optax": eqx.prepare,
        "fnet autodiff": functools.partial(by_fnet, engine="autodiff"),
        "fnet backprop": functools.partial(by_fnet, engine="backprop"),
    }
    if name == "gpt":
        peers["fnet backprop, repeat"] = functools.partial(by_fnet, engine="backprop", repeated=True)
    return peers


def measure(name: str, repeats: int) -> list[dict]:
    """The tables of a model."""
    runs, first, parameters = {}, {}, {}
    for peer, prepare in peers_of(name).items():

        def begin(prepare=prepare, peer=peer):
            prepared = prepare(name, *data_for(name))
            runs[peer], parameters[peer] = prepared
            print(f"{name}, {peer}: {prepared.parameters:,} parameters, loss {prepared.run():.4f}", flush=True)

        first[peer] = [timed(begin)]
    if len({*parameters.values()}) > 1:
        raise RuntimeError(f"parameters of {name}: {parameters}; expected the same everywhere")
    per_step = scaled(interleaved(runs, repeats), 1e3 / STEPS[name])
    return [
        show(f"{name}: a training step", per_step, ("torch", "torch.compile", "fnet autodiff"), unit="ms"),
        show(f"{name}: until the first round has ended", first),
    ]


def main() -> None:
    parser = arguments("A training step of seven models: fnet and its peers")
    parser.add_argument("--only", choices=STEPS, nargs="+", default=list(STEPS), help="these models")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    options, tables = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in options.only:
            tables += measure(name, options.repeats)
    record(options.json, "models", tables, also=("torch", "flax", "optax", "equinox"))


if __name__ == "__main__":
    main()
