"""A training step on eight devices of a CPU: fnet's placements beside flax' and Keras' own recipes, float32, Adam.

    make bench MODULE=benchmarks.sharding
    make bench MODULE=benchmarks.sharding ARGS="--quick"                   # the MLP in one layout
    make bench MODULE=benchmarks.sharding ARGS="--only mlp --repeats 15"

- gpt: 2 blocks of 64 features and 4 heads; 32 sequences of 64 ids out of 256
- mlp: 784-1024-1024-10, batch 256

dp8 splits the batch over 8 devices; fsdp8 parameters and moments too; dp2 fsdp4 the batch over 8 and parameters over 4.
All take one compiled step at a time, the state donated, on the same batch, in turn; times are medians of rounds, ratios
are taken round by round. Bytes, memory and operations are those of one device, read off the compiled program, and hold
on every machine; times are those of a machine that others share, whose devices are threads of two cores.

Lines are those that the recipe adds to its version for one device or changes in it, marked ← in the source. The
peers': flax nnx by "Scale up on multiple devices", as it stands and with activations constrained, which the page shows
as an advanced trick; Keras by "Distributed training with Keras 3". Keras splits a batch over one axis of the mesh
alone: in dp2 fsdp4 four devices have the same examples.

At the end: `fit` on one device with a placement and without.

The last run, by the first command (jax 0.10.2, flax 0.12.8, optax 0.2.8, keras 3.15.1, two cores, 2:12 minutes): what
a device sends in a step, and the time relative to `backprop` in the same layout.

| kB sent (× time) | gpt dp8 | gpt fsdp8 | gpt dp2 fsdp4 | mlp dp8 | mlp fsdp8 | mlp dp2 fsdp4 |
|---|---|---|---|---|---|---|
| fnet backprop | 959 (1) | 1,432 (1) | 1,364 (1) | 13,046 (1) | 19,562 (1) | 18,631 (1) |
| fnet autodiff | 959 (1.02) | 1,432 (1.04) | 1,364 (1.05) | 13,046 (1.79) | 19,562 (1.08) | 18,631 (1.13) |
| flax | 959 (1.04) | 31,372 (2.51) | 14,388 (1.51) | 13,046 (1.77) | 20,717 (1.17) | 19,224 (1.13) |
| flax, constrained | as flax | 1,382 (1.01) | 1,364 (1.03) | as flax | 19,562 (1.09) | 18,631 (1.09) |
| keras | 959 (1.08) | 27,974 (4.71) | 11,342 (2.20) | 13,046 (1.77) | 20,717 (1.16) | 4,065 (0.75) |

Keras' last figure is tensor parallelism in effect: of this MLP the activations are smaller than the weights.
A placement on one device: 1.016 of the time without it for the gpt, 0.980 for the mlp (medians of ratios).
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import math
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fnet
from benchmarks.measuring import arguments, interleaved, record, scaled, table
from fnet.runs.compilation import jitted
from fnet.training.collectives import sent_by_step

RATE, VOCABULARY, LENGTH, FEATURES, HEADS, BLOCKS = 1e-3, 256, 64, 64, 4, 2
WIDTHS, BATCH = (784, 1024, 1024, 10), {"gpt": 32, "mlp": 256}
LAYOUTS: dict[str, dict[str, Any]] = {"dp8": {"data": 8}, "fsdp8": {"fsdp": 8}, "dp2 fsdp4": {"data": 2, "fsdp": 4}}
ALONE = ""  # the layout of one device


def data_for(name: str, batches: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of so many batches."""
    rng, n = np.random.default_rng(0), BATCH[name] * batches
    if name == "mlp":
        return rng.standard_normal((n, WIDTHS[0]), np.float32), rng.integers(0, WIDTHS[-1], n, np.int32)
    ids = rng.integers(0, VOCABULARY, (n, LENGTH + 1), np.int32)
    return ids[:, :-1], ids[:, 1:]


class Compiled(NamedTuple):
    """A step for one layout: ``program(state, batch) -> state, loss``, and where its run stands."""

    program: Any
    held: list  # the state, replaced at each step, since it is donated
    batch: Any
    parameters: int

    def steps(self, count: int) -> float:
        """The loss after so many steps."""
        loss = None
        for _ in range(count):
            self.held[0], loss = self.program(self.held[0], self.batch)
        return jax.block_until_ready(loss).item()  # pyright: ignore[reportOptionalMemberAccess]


def compiled(function: Callable, state: Any, batch: Any, parameters: Any) -> Compiled:
    """The step compiled for its own state: XLA may lay out the first one's result in another way, as `jit` allows."""
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    for _ in range(3):
        before = [leaf.sharding for leaf in jax.tree.leaves(state)]
        program = function.lower(state, batch).compile()
        state, _ = program(state, batch)
        after = jax.tree.leaves(state)
        if all(s.is_equivalent_to(leaf.sharding, leaf.ndim) for s, leaf in zip(before, after, strict=True)):
            return Compiled(program, [state], batch, size)
    raise RuntimeError("the state is laid out in another way after each of three steps; expected one that stays")


# --- fnet ------------------------------------------------------------------------------------------------------------


def fnet_model(name: str) -> fnet.Layer:
    if name == "mlp":
        return fnet.mlp(*WIDTHS[1:])
    return fnet.models.gpt(VOCABULARY, length=LENGTH, layers=BLOCKS, features=FEATURES, heads=HEADS)


def fnet_by(engine: str, name: str, layout: str) -> Compiled:
    placement = fnet.placement(fnet.mesh(**LAYOUTS[layout])) if layout else None  # ← dp fsdp
    model, optimizer, (inputs, targets) = fnet_model(name), fnet.adam(RATE), data_for(name)
    params, state = fnet.init(model, jax.random.key(0), inputs[:1], placement)  # ← dp fsdp
    start = fnet.init_train_state(params, optimizer, jax.random.key(1), state, placement)  # ← dp fsdp
    step = fnet.make_step(getattr(fnet, engine)(model, fnet.softmax_cross_entropy), optimizer)
    batch = fnet.Batch(jnp.asarray(inputs), jnp.asarray(targets))
    if placement is not None:  # what fit(..., placement=placement) does
        step = fnet.sharding.sharded(step, placement)  # ← dp fsdp
        batch = placement.put_batch(batch, BATCH[name])

    def with_loss(ts, batch):
        ts, metrics = step(ts, batch)
        return ts, metrics["loss"].value

    return compiled(jitted(with_loss, start), start, batch, params)


# --- flax ------------------------------------------------------------------------------------------------------------
# "Scale up on multiple devices", https://flax.readthedocs.io/en/latest/guides/flax_gspmd.html: parameters annotated by
# `nnx.with_partitioning`, made in `jax.jit` under `jax.set_mesh`, moments like them, the batch by `jax.device_put`;
# and, as it constrains activations there, `jax.lax.with_sharding_constraint`. Features are over fsdp.


def flax_mlp(constrained: bool):
    from flax import nnx

    def examples(x):
        return jax.lax.with_sharding_constraint(x, P(("data", "fsdp"))) if constrained else x  # ← activations

    class MLP(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.he_normal(), ("fsdp", None))  # ← fsdp
            sizes = itertools.pairwise(WIDTHS)
            self.layers = nnx.List([nnx.Linear(n, m, kernel_init=init, rngs=rngs) for n, m in sizes])

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = jax.nn.relu(examples(layer(x)))  # ← activations
            return examples(self.layers[-1](x))  # ← activations

    return MLP


def flax_gpt(constrained: bool):
    from flax import nnx

    small = nnx.initializers.normal(0.02)

    def over(*axes):
        return nnx.with_partitioning(small, axes)  # ← fsdp

    def examples(x):
        return jax.lax.with_sharding_constraint(x, P(("data", "fsdp"))) if constrained else x  # ← activations

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1, self.norm2 = nnx.LayerNorm(FEATURES, rngs=rngs), nnx.LayerNorm(FEATURES, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                *(HEADS, FEATURES),
                kernel_init=over("fsdp", None, None),  # ← fsdp
                out_kernel_init=over(None, None, "fsdp"),  # ← fsdp
                decode=False,
                rngs=rngs,
            )
            self.wide = nnx.Linear(FEATURES, 4 * FEATURES, kernel_init=over("fsdp", None), rngs=rngs)  # ← fsdp
            self.narrow = nnx.Linear(4 * FEATURES, FEATURES, kernel_init=over(None, "fsdp"), rngs=rngs)  # ← fsdp

        def __call__(self, x, mask):
            x = examples(x + self.attention(self.norm1(x), mask=mask))  # ← activations
            return examples(x + self.narrow(jax.nn.gelu(examples(self.wide(self.norm2(x))))))  # ← activations

    class GPT(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, FEATURES, embedding_init=over(None, "fsdp"), rngs=rngs)  # ← fsdp
            self.positions = nnx.Embed(LENGTH, FEATURES, embedding_init=over(None, "fsdp"), rngs=rngs)  # ← fsdp
            self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
            self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)

        def __call__(self, ids):
            mask = nnx.make_causal_mask(ids)
            x = examples(self.embed(ids) + self.positions.embedding[...])  # ← activations
            for block in self.blocks:
                x = block(x, mask)
            return examples(self.embed.attend(self.norm(x)))  # ← activations

    return GPT


def flax_by(constrained: bool, name: str, layout: str) -> Compiled:
    import optax
    from flax import nnx

    sizes = {"data": 1, "fsdp": 1, **(LAYOUTS[layout] if layout else {})}
    kinds, devices = (AxisType.Auto, AxisType.Auto), jax.devices()[: math.prod(sizes.values())]
    model_class = {"mlp": flax_mlp, "gpt": flax_gpt}[name](constrained)

    @jax.jit  # ← dp fsdp
    def create():
        model = model_class(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

    def step(state, batch):
        (model, optimizer), (inputs, targets) = state, batch

        def loss_fn(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets).mean()

        loss, grads = jax.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return (model, optimizer), loss

    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices)  # ← dp fsdp
    with jax.set_mesh(mesh):  # ← dp fsdp
        batch = jax.device_put(data_for(name), NamedSharding(mesh, P(("data", "fsdp"))))  # ← dp fsdp
        state = create()
        return compiled(jax.jit(step, donate_argnums=0), state, batch, nnx.state(state[0], nnx.Param))


# --- Keras -----------------------------------------------------------------------------------------------------------
# "Distributed training with Keras 3", https://keras.io/guides/distribution/: `DataParallel`, or `ModelParallel` with a
# `LayoutMap` by paths; "FSDP … by using `ModelParallel` to shard both weights and optimizer states across the entire
# mesh". The step is that of `fit`: its `train_step`, jitted as `make_train_function` does.


def keras_mlp():
    from keras import Sequential, layers

    hidden = [layers.Dense(width, activation="relu", kernel_initializer="he_normal") for width in WIDTHS[1:-1]]
    return Sequential([layers.Input(WIDTHS[:1]), *hidden, layers.Dense(WIDTHS[-1])])


def keras_gpt():
    import keras
    from keras import layers

    small: Any = keras.initializers.RandomNormal(stddev=0.02)

    class Positions(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=shape[1:], initializer=small, name="table")

        def call(self, x):
            return x + self.table

    x = ids = layers.Input((LENGTH,), dtype="int32")
    embed = layers.ReversibleEmbedding(VOCABULARY, FEATURES, embeddings_initializer=small)
    x = Positions()(embed(x))
    for i in range(BLOCKS):
        y = layers.LayerNormalization()(x)
        attend = layers.MultiHeadAttention(HEADS, FEATURES // HEADS, kernel_initializer=small)
        x = layers.Add()([x, attend(y, y, use_causal_mask=True)])
        y = layers.Dense(4 * FEATURES, kernel_initializer=small, name=f"wide_{i}")(layers.LayerNormalization()(x))
        y = layers.Dense(FEATURES, kernel_initializer=small, name=f"narrow_{i}")(keras.activations.gelu(y, True))
        x = layers.Add()([x, y])
    return keras.Model(ids, embed(layers.LayerNormalization()(x), reverse=True))


def keras_mlp_layouts(over: str) -> dict:
    return {".*dense.*/kernel": (over, None)}  # ← fsdp


def keras_gpt_layouts(over: str) -> dict:
    return {
        ".*(query|key|value)/kernel": (over, None, None),  # ← fsdp
        ".*attention_output/kernel": (None, None, over),  # ← fsdp
        ".*wide.*/kernel": (over, None),  # ← fsdp
        ".*narrow.*/kernel": (None, over),  # ← fsdp
        ".*(embeddings|table)": (None, over),  # ← fsdp
    }


def keras_distribution(name: str, layout: str):
    from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel

    if layout == "dp8":
        return DataParallel()
    axes = {"fsdp8": {"batch": 8}, "dp2 fsdp4": {"batch": 2, "model": 4}}[layout]
    layouts = LayoutMap(DeviceMesh([*axes.values()], [*axes]))  # ← fsdp
    layouts.update({"mlp": keras_mlp_layouts, "gpt": keras_gpt_layouts}[name]([*axes][-1]))  # ← fsdp
    return ModelParallel(layout_map=layouts, batch_dim_name="batch")  # ← fsdp


def keras_by(name: str, layout: str) -> Compiled:
    import keras

    distribution = keras_distribution(name, layout) if layout else None
    keras.distribution.set_distribution(distribution)  # ← dp fsdp
    keras.utils.set_random_seed(0)
    model = {"mlp": keras_mlp, "gpt": keras_gpt}[name]()
    model.compile(keras.optimizers.Adam(RATE), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    optimizer: Any = model.optimizer
    optimizer.build(model.trainable_variables)
    held = model.trainable_variables, model.non_trainable_variables, optimizer.variables, model.metrics_variables
    state = [[variable.value for variable in variables] for variables in held]
    batch = data_for(name)
    if distribution is not None:
        batch = tuple(jax.device_put(a, distribution.get_data_layout(a.shape).backend_layout) for a in batch)

    def step(state, batch):
        logs, state = model.train_step(state, batch)
        return [*state], logs["loss"]

    whole = None if distribution is None else jax.tree.map(lambda leaf: leaf.sharding, state)
    function = jax.jit(step, donate_argnums=0, out_shardings=(whole, None))
    made = compiled(function, state, jax.tree.map(jnp.asarray, batch), state[0])
    keras.distribution.set_distribution(None)
    return made


# --- measuring -------------------------------------------------------------------------------------------------------


class Peer(NamedTuple):
    """A way to a step, and where its lines about several devices stand: kinds of marks, and functions by model."""

    prepare: Callable[[str, str], Compiled]
    functions: dict[str, tuple[Callable, ...]]
    also: tuple[str, ...] = ()
    layouts: tuple[str, ...] = tuple(LAYOUTS)

    def lines(self, name: str, layout: str) -> int:
        """How many lines the recipe has about several devices."""
        kinds = {"dp" if layout == "dp8" else "fsdp", *self.also}
        sources = [inspect.getsource(function).splitlines() for function in self.functions[name]]
        return sum(bool(kinds & {*line.partition("# ←")[2].split()}) for source in sources for line in source)


def fnet_peer(engine: str) -> Peer:
    return Peer(lambda name, layout: fnet_by(engine, name, layout), dict.fromkeys(BATCH, (fnet_by,)))


def flax_peer(constrained: bool) -> Peer:
    functions = {"mlp": (flax_mlp, flax_by), "gpt": (flax_gpt, flax_by)}
    also, layouts = (("activations",), tuple(LAYOUTS)[1:]) if constrained else ((), tuple(LAYOUTS))
    return Peer(lambda name, layout: flax_by(constrained, name, layout), functions, also, layouts)


PEERS = {
    "fnet backprop": fnet_peer("backprop"),
    "fnet autodiff": fnet_peer("autodiff"),
    "flax": flax_peer(False),
    "flax, constrained": flax_peer(True),
    "keras": Peer(
        keras_by,
        {
            "mlp": (keras_mlp_layouts, keras_distribution, keras_by),
            "gpt": (keras_gpt_layouts, keras_distribution, keras_by),
        },
    ),
}


def operations(made: Compiled) -> float:
    return made.program.cost_analysis()["flops"]


def state_bytes(made: Compiled) -> int:
    """Bytes of the state on the first device."""
    words = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a  # noqa: E731
    return sum(words(leaf).addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(made.held))


def prepared(name: str, layout: str, peers: dict[str, Peer], alone: dict[str, Compiled]) -> dict[str, Compiled]:
    """The steps of one layout, of which it is seen that they train, and that state is split where it should be."""
    made = {peer: make.prepare(name, layout) for peer, make in peers.items() if layout in make.layouts}
    for peer, step in made.items():
        what, whole = f"{name}, {layout}, {peer}", alone[peer]
        assert step.parameters == whole.parameters, f"{what}: {step.parameters} parameters; expected {whole.parameters}"
        first, last = step.steps(1), step.steps(2)
        assert last < first, f"{what}: the loss went from {first} to {last}; expected it to fall"
        part = 1 if layout == "dp8" else LAYOUTS[layout]["fsdp"]
        held, most = state_bytes(step), 1.5 * state_bytes(whole) / part
        assert held <= most, f"{what}: {held} bytes of state on a device; expected {most:.0f} at most, which are split"
    return made


def measure(name: str, layouts: list[str], peers: dict[str, Peer], repeats: int, steps: int):
    """The table of one model, a section for each layout; and the same as tables of a document."""
    from rich.table import Table

    alone = {peer: make.prepare(name, ALONE) for peer, make in peers.items() if not make.also}
    alone["flax, constrained"] = alone["flax"]  # on one device a constraint says nothing
    counts = {peer: made.parameters for peer, made in alone.items()}
    assert len({*counts.values()}) == 1, f"parameters of {name}: {counts}; expected the same"
    made = {layout: prepared(name, layout, peers, alone) for layout in layouts}
    sent = {
        (layout, peer): {kind: each.bytes / 1e3 for kind, each in sent_by_step(step.program.as_text()).items()}
        for layout, steps_of in made.items()
        for peer, step in steps_of.items()
    }
    kinds = sorted({kind for sizes in sent.values() for kind in sizes})
    title = f"{name}: a step, {counts['flax']:,} parameters, batch {BATCH[name]}, on 8 devices of a CPU"
    printed, tables = Table(title=title), []
    printed.add_column("")
    heads = ("ms", "× fnet backprop", "sent kB", *kinds, "state kB", "temp kB", "operations", "lines")
    for column in heads:
        printed.add_column(column, justify="right")
    for layout, steps_of in made.items():
        runs = {peer: lambda step=step: step.steps(steps) for peer, step in steps_of.items()}
        times = scaled(interleaved(runs, repeats, rest=0.02), 1e3 / steps)
        made_here = table(f"{name}, {layout}: a step", times, ("fnet backprop",), "ms")
        printed.add_section()
        printed.add_row(layout)
        sums = {peer: [sum(sent[layout, peer].values())] for peer in steps_of}
        tables += [made_here, table(f"{name}, {layout}: sent by a device in a step", sums, unit="kB")]
        for row, (peer, step) in zip(made_here["rows"], steps_of.items(), strict=True):
            ratio, sizes = row["ratios"]["fnet backprop"], sent[layout, peer]
            kilobytes = [*sums[peer], *(sizes.get(kind, 0.0) for kind in kinds), state_bytes(step) / 1e3]
            printed.add_row(
                f"  {peer}",
                f"{row['median']:.1f}",
                f"{ratio['median']:.2f} ({ratio['least']:.2f}-{ratio['most']:.2f})",
                *(f"{size:,.0f}" for size in (*kilobytes, step.program.memory_analysis().temp_size_in_bytes / 1e3)),
                f"{operations(step) / operations(alone[peer]):.3f}",
                str(peers[peer].lines(name, layout)),
            )
    return printed, tables


def one_device(name: str, repeats: int, steps: int) -> dict:
    """What a placement on one device costs a step of `fit`, printed: its table."""
    data, model, optimizer = fnet.check_data(data_for(name, 4)), fnet_model(name), fnet.adam(RATE)
    params, state = fnet.init(model, jax.random.key(0), data.inputs[:1])
    start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    placements = {"without": None, "with": fnet.placement(fnet.mesh(data=1, devices=jax.devices()[:1]))}
    seconds = {each: [] for each in placements}
    for turn in range(repeats + 1):
        for each in sorted(placements, reverse=bool(turn % 2)):
            options = {"batch_size": BATCH[name], "chunk_steps": steps, "placement": placements[each]}
            _, history = fnet.fit(step, start, data, steps=steps, **options)
            seconds[each] += [history.run_seconds / steps] if turn else []
    made = table(f"{name}: a step of fit on one device", scaled(seconds, 1e3), ("without",), "ms")
    without, beside = (row["median"] for row in made["rows"])
    ratio = made["rows"][1]["ratios"]["without"]
    print(
        f"{name}: a step of fit on one device {without:.2f} ms, with a placement {beside:.2f} ms; ratio of medians "
        f"{beside / without:.3f}, median of ratios {ratio['median']:.3f} ({ratio['least']:.2f}-{ratio['most']:.2f})"
    )
    return made


def main() -> None:
    from rich.console import Console

    parser = arguments("A training step on eight devices: fnet, flax and Keras")
    parser.add_argument("--only", choices=BATCH, nargs="+", default=None, help="these models")
    parser.add_argument("--repeats", type=int, default=None, help="rounds (6, with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="the MLP in one layout, few rounds: does all of it run?")
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.quick else 6)
    names = options.only or (["mlp"] if options.quick else list(BATCH))
    layouts = ["dp2 fsdp4"] if options.quick else list(LAYOUTS)
    peers, libraries = dict(PEERS), ["jax", "flax", "optax", "keras"]
    if importlib.util.find_spec("keras") is None:
        print("keras is not installed: its rows are left out")
        del peers["keras"]
        libraries.remove("keras")
    versions = ", ".join(f"{library} {version(library)}" for library in libraries)
    machine = f"{platform.machine()}, {os.cpu_count()} cores that others share"
    print(f"{machine}; Python {platform.python_version()}, {versions}")
    tables = []
    for name in names:
        printed, made = measure(name, layouts, peers, repeats, 2)
        Console(width=max(150, Console().width)).print(printed)
        tables += made
    print(
        "Medians, on a machine that others share. kB are what each device sends in a step, and holds; operations are "
        "those of each, relative to one device alone. Lines are added or changed."
    )
    tables += [one_device(name, 4 if options.quick else 12, 8) for name in names]
    record(options.json, "sharding", tables, also=libraries[1:])


if __name__ == "__main__":
    main()
