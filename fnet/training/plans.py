"""What a run would take on devices that are not here: bytes, bytes sent and time, on paper.

    plan = fnet.sharding.plan(model, x, optimizer, {"data": 16, "fsdp": 8}, batch=512, chip="h100")
    print(plan)                                   `python -m fnet plan --help` plans a GPT

Nothing is computed and nothing allocated: the model is traced, the placement says how each leaf is split, and the rest
is arithmetic, which stands beside each figure. Legend: d data, f fsdp, t tensor, n = d f t devices; P a leaf's bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from fnet.core.checks import is_whole, require_layer, require_optimizer
from fnet.core.interpret import walk
from fnet.core.numerics import bytes_of
from fnet.core.operations import operations_of
from fnet.core.placement import AXES, LEAST, TRANSFORMER, Placement
from fnet.core.trees import named_leaves
from fnet.gradients.engines import backprop
from fnet.layers.children import forward_of, init_of
from fnet.losses import softmax_cross_entropy
from fnet.training.steps import Step, make_step
from fnet.types import Batch, Layer, Loss, Optimizer, PyTree, TrainState


class Chip(NamedTuple):
    """What one device does at its best, and how it reaches others. All are a second's, or bytes."""

    name: str
    flops: float  # of products of 16-bit numbers
    memory: float
    near: float  # bytes that it sends to a device of its own group
    far: float  # and to one of another
    group: int  # devices


# Vendors' figures: NVIDIA's data sheets of A100, H100, H200 and DGX B200 (dense products; NVLink one way; a link of 200
# or 400 Gbit/s for each GPU between hosts), Google's pages "TPU v5e", "v5p", "v6e" (interconnect one way, whole pods)
CHIPS = {
    "a100": Chip("A100 80GB", 312e12, 80e9, 300e9, 25e9, 8),
    "h100": Chip("H100 SXM", 989e12, 80e9, 450e9, 50e9, 8),
    "h200": Chip("H200 SXM", 989e12, 141e9, 450e9, 50e9, 8),
    "b200": Chip("B200", 2250e12, 180e9, 900e9, 50e9, 8),
    "v5e": Chip("TPU v5e", 197e12, 16e9, 200e9, 200e9, 256),
    "v5p": Chip("TPU v5p", 459e12, 95e9, 600e9, 600e9, 8960),
    "v6e": Chip("TPU v6e", 918e12, 32e9, 400e9, 400e9, 256),
}
"""The chips that `plan` knows by name: operations a second, memory, bytes a second to near and far devices."""
REACHED = 0.45  # of a chip's best, what large products in a training step come to


class Moved(NamedTuple):
    """What each device sends in a step by one kind of collective, over one axis or several."""

    kind: str
    what: str
    axes: tuple[str, ...]
    bytes: float
    seconds: float


class Plan(NamedTuple):
    """What a step takes on each device; `str` of it is the table."""

    chip: Chip
    sizes: dict[str, int]  # of the mesh
    parameters: int  # of the model, in all
    batch: int
    bytes: dict[str, float]  # on each device, by what they are
    moved: tuple[Moved, ...]
    operations: float  # on each device, forward, backward and what is computed a second time
    compute_seconds: float
    move_seconds: float
    advice: str

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.sizes.values())

    def __str__(self) -> str:
        return _table(self)


def plan(
    model: Layer,
    x: PyTree,
    optimizer: Optimizer,
    placement: Placement | Mapping[str, int],
    batch: int,
    *,
    loss: Loss = softmax_cross_entropy,
    targets: PyTree = None,
    chip: str | Chip = "h100",
) -> Plan:
    """What a training step of a model takes on each of many devices, none of which need be here.

    Args:
        x: inputs like those of the model, arrays or `jax.ShapeDtypeStruct`s with a batch axis of any length.
        placement: sizes such as ``{"data": 16, "fsdp": 8, "tensor": 8}``, with the rules of `TRANSFORMER` where there
            is a tensor axis; or a `Placement` of one's own.
        batch: examples of a step, on all devices together.
        targets: like those of the loss; by default whole numbers in the shape of the outputs without their last axis.
        chip: a name of `CHIPS`, or a `Chip` of one's own.

    **Bytes.** State: parameters, moments and averages as the placement splits them, exactly. Gradients: as the
    parameters. Activations: the residuals of the forward for the examples of a device, and the outputs with their
    gradients; those of layers that are split over tensor are counted whole. Gathered: what fsdp brings together of the
    largest layer.
    **Sent.** By rings: an all-gather of P bytes over n sends P (n−1)/n, a reduce-scatter the same, an all-reduce twice
    that. A leaf split over fsdp is gathered for the forward and for the backward (which an unrolled model may do
    without), and half of it a third time where the forward is computed again, in the products' dtype. Its gradient is
    reduce-scattered in float32 (XLA sends those of convolutions in 16 bits where it computes in them), then all-reduced
    over data. Of a leaf whose rows are split over tensor the outputs are all-reduced (and half of them once more where
    they are computed again), of one whose columns are the gradient by its inputs.
    **Time.** Operations as they are written over ``REACHED`` of the chip's best; bytes over the rate within a group of
    devices, or between groups where an axis goes beyond one (the mesh's last axis has the nearest neighbours). Nothing
    overlaps.

    Raises TypeError and ValueError for what is none of these, sizes that the batch or the rules do not divide by, and
    `LayerError` where model and inputs do not fit.

    >>> from fnet.layers.models import mlp
    >>> from fnet.optimizers import adam
    >>> x = jax.ShapeDtypeStruct((1, 784), "float32")
    >>> made = plan(mlp(1024, 10), x, adam(1e-3), {"data": 8}, batch=512, chip="h100")
    >>> made.parameters, [(each.kind, each.axes, round(each.bytes)) for each in made.moved]
    (814090, [('all-reduce', ('data',), 5698630)])
    """
    require_layer("plan: model", model)
    require_optimizer("plan: optimizer", optimizer)
    chip = _chip(chip)
    placement = placement if isinstance(placement, Placement) else on_paper(placement)
    sizes = dict(placement.mesh.shape)
    parts = placement.split.parts
    if not is_whole(batch) or batch % parts:
        raise ValueError(f"plan: batch = {batch!r} over {parts} parts of data and fsdp; expected a multiple of {parts}")
    step, ts, data = abstract_step(model, x, optimizer, batch // parts, loss, targets)
    placement.require_use(ts)
    operations, dtype = _operations(step, ts, data)
    forward, _ = _operations(lambda ts, data: _forward(model, ts, data)[0], ts, data)
    again = operations - 3 * forward > forward / 2  # a step is some three forwards, and four where one is made again
    held = _held(placement, ts, model, data, dtype)
    moved = _moved(placement, chip, ts, data, dtype, again)
    operations /= sizes.get("tensor", 1)
    compute = operations / (REACHED * chip.flops * (1 if dtype.itemsize <= 2 else 0.5))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ts.params))
    moving = sum(each.seconds for each in moved)
    made = Plan(chip, sizes, parameters, batch, held, moved, operations, compute, moving, "")
    return made._replace(advice=_advice(made, again))


def _chip(given: str | Chip) -> Chip:
    if isinstance(given, Chip):
        return given
    if given not in CHIPS:
        raise ValueError(f"plan: chip = {given!r}; expected one of {', '.join(CHIPS)}, or a Chip(...) of your own")
    return CHIPS[given]


def on_paper(given: Mapping[str, int]) -> Placement:
    """The placement on a mesh of these sizes, whose devices need not be here; rules of `TRANSFORMER` with a tensor."""
    if not isinstance(given, Mapping) or not given or set(given) - set(AXES):
        raise TypeError(f"plan: placement = {given!r:.80}; expected a Placement, or sizes of {', '.join(AXES)}")
    for name, size in given.items():
        if not is_whole(size):
            raise ValueError(f"plan: {name} = {size!r}; expected a whole number of at least 1")
    names = [name for name in AXES if name in given]
    mesh: Any = AbstractMesh(tuple(given[n] for n in names), tuple(names), axis_types=(AxisType.Auto,) * len(names))
    return Placement(mesh, tuple(TRANSFORMER.items()) if given.get("tensor", 1) > 1 else (), LEAST)


def abstract_step(
    model: Layer,
    x: PyTree,
    optimizer: Optimizer,
    examples: int,
    loss: Loss = softmax_cross_entropy,
    targets: PyTree = None,
) -> tuple[Step, TrainState, Batch]:
    """A step with the backward by hand, and the shapes of its state and of a batch of so many examples."""
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct((examples, *a.shape[1:]), a.dtype), x)
    step = make_step(backprop(model, loss), optimizer)

    def start(key):
        params, state = init_of(model, key, x)
        return TrainState(jnp.asarray(0, jnp.int32), params, state, optimizer.init(params), key)

    ts = jax.eval_shape(start, jax.eval_shape(lambda: jax.random.key(0)))
    if targets is None:
        outputs = jax.eval_shape(lambda ts, data: _forward(model, ts, data)[0], ts, Batch(x, None))
        targets = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape[:-1], jnp.int32), outputs)
    else:
        targets = jax.tree.map(lambda a: jax.ShapeDtypeStruct((examples, *a.shape[1:]), a.dtype), targets)
    return step, ts, Batch(x, targets)


def _forward(model: Layer, ts: TrainState, data: Batch) -> tuple[PyTree, PyTree]:
    """Outputs, and residuals."""
    y, _, residuals = forward_of(model, ts.params, ts.state, data.inputs, key=ts.key, train=True)
    return y, residuals


def _operations(function, ts: TrainState, batch: Batch) -> tuple[float, np.dtype]:
    """How many operations there are, and the dtype in which most products are made."""
    total, by_dtype = 0, defaultdict(int)
    for place in walk(jax.make_jaxpr(function)(ts, batch).jaxpr):
        count = operations_of(place.eqn) * math.prod(place.lengths)
        total += count
        if place.eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            aval: Any = place.eqn.invars[0].aval
            by_dtype[aval.dtype] += count
    dtype = max(by_dtype, key=lambda dtype: by_dtype[dtype], default=np.float32)
    return float(total), np.dtype(dtype)


def _held(placement: Placement, ts: TrainState, model: Layer, data: Batch, dtype: np.dtype) -> dict[str, float]:
    outputs, kept = jax.eval_shape(lambda ts, data: _forward(model, ts, data), ts, data)
    params = [(f"params/{path}", leaf) for path, leaf in named_leaves(ts.params)]
    state = sum(placement.bytes_of(path, leaf) for path, leaf in named_leaves(ts))
    gathered = 0.0
    for path, leaf in params:
        spec = placement.spec(path, leaf)
        if "fsdp" in spec:
            layers = math.prod(leaf.shape[:-2])  # stacked by `repeat`, of which one at a time is gathered
            parts = placement.mesh.shape.get("tensor", 1) if "tensor" in spec else 1
            gathered = max(gathered, math.prod(leaf.shape) * dtype.itemsize / layers / parts)
    return {
        "parameters, moments, state": state,
        "gradients": sum(placement.bytes_of(path, leaf) for path, leaf in params),
        "activations for the backward": bytes_of(kept),
        "outputs and their gradients": 2 * bytes_of(outputs),
        "gathered of the largest layer": gathered,
    }


def _moved(
    placement: Placement, chip: Chip, ts: TrainState, data: Batch, dtype: np.dtype, again: bool
) -> tuple[Moved, ...]:
    sizes = placement.mesh.shape
    d, f, t = (sizes.get(name, 1) for name in AXES)
    sums: dict[tuple[str, str, tuple[str, ...]], float] = defaultdict(float)
    rows = math.prod(jax.tree.leaves(data.targets)[0].shape)  # examples, or ids of sequences, of one device
    params = {f"params/{path}": leaf for path, leaf in named_leaves(ts.params)}
    wide = 4  # products are summed, and gradients sent, in float32
    for path, leaf in params.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        spec, size = tuple(placement.spec(path, leaf)), math.prod(leaf.shape)
        own = size / (t if "tensor" in spec else 1)
        if "fsdp" in spec:
            times = 2.5 if again else 2
            sums["all-gather", "parameters", ("fsdp",)] += times * own * dtype.itemsize * (f - 1) / f
            sums["reduce-scatter", "gradients", ("fsdp",)] += own * wide * (f - 1) / f
            sums["all-reduce", "gradients", ("data",)] += 2 * own / f * wide * (d - 1) / d
        else:
            sums["all-reduce", "gradients", ("data", "fsdp")] += 2 * own * wide * (d * f - 1) / (d * f)
        # a query of the same shape has its key and value in one product with it
        query = params.get(_query(path)) if path.endswith(("/key/w", "/value/w")) else None
        joined = query is not None and query.shape == leaf.shape
        # the rule of a bias has one axis, of stacked ones too
        if "tensor" in spec and len(placement.rule(path)[1]) > 1 and not joined:
            axis = spec.index("tensor") - len(leaf.shape)
            layers = math.prod(leaf.shape[:-2])
            features = leaf.shape[-1] if axis == -2 else leaf.shape[-2]
            what = "outputs of rows" if axis == -2 else "gradients by the inputs of columns"
            times = 1.5 if again and axis == -2 else 1  # the last of a block's outputs are not needed again
            sums["all-reduce", what, ("tensor",)] += times * 2 * layers * rows * features * wide * (t - 1) / t
    made = []
    for (kind, what, axes), size in sums.items():
        axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
        if size and axes:
            made.append(Moved(kind, what, axes, size, size / _rate(chip, sizes, axes)))
    return tuple(sorted(made, key=lambda each: -each.seconds))


def _query(path: str) -> str:
    """The path of the query's weights beside those of a key or a value."""
    return "/".join([*path.split("/")[:-2], "query", "w"])


def _rate(chip: Chip, sizes: Mapping[str, int], axes: tuple[str, ...]) -> float:
    """Bytes a second over these axes: their devices are as far from each other as the axes behind them are long."""
    names = [name for name in AXES if name in sizes]
    reach = math.prod(sizes[name] for name in names[names.index(axes[0]) :])
    return chip.near if reach <= chip.group else chip.far


def _advice(made: Plan, again: bool) -> str:
    """What limits the step, and what to change."""
    total, sizes = sum(made.bytes.values()), made.sizes
    if total > made.chip.memory:
        largest = max(made.bytes, key=lambda name: made.bytes[name])
        more = {
            "parameters, moments, state": "a larger fsdp or tensor",
            "gradients": "a larger fsdp or tensor",
            "activations for the backward": "fewer examples on a device (accumulate)"
            + ("" if again else ", or layers.remat around each block"),
            "outputs and their gradients": "fewer examples on a device (accumulate)",
            "gathered of the largest layer": "a tensor axis",
        }[largest]
        return f"does not fit into {made.chip.memory / 1e9:.0f} GB; most are {largest}: {more}"
    if made.move_seconds > made.compute_seconds and made.moved:
        most = made.moved[0]
        far = _rate(made.chip, sizes, most.axes) < made.chip.near
        remedies: dict[tuple[str, ...], str] = {
            ("fsdp",): f"an fsdp of {made.chip.group} stays within a group, and data goes between them"
            if far
            else "more examples on a device, so that they are gathered for more of them",
            ("tensor",): f"a tensor of {made.chip.group} at most stays within a group" if far else "a smaller tensor",
        }
        remedy = remedies.get(
            most.axes, "more examples on a device, or parts of a batch (accumulate) before they are sent"
        )
        return f"moving limits it: {most.kind} of {most.what} over {' and '.join(most.axes)}; {remedy}"
    return "computing limits it"


def _table(made: Plan) -> str:
    mesh = " × ".join(f"{name} {size}" for name, size in made.sizes.items())
    total = sum(made.bytes.values())
    rows = [("on each device", "MB", "")]
    rows += [(f"  {name}", f"{size / 1e6:,.1f}", "") for name, size in made.bytes.items()]
    rows += [("  sum", f"{total / 1e6:,.1f}", f"of {made.chip.memory / 1e6:,.0f}")]
    rows += [("sent by each device in a step", "MB", "seconds")]
    for each in made.moved:
        name = f"  {each.kind} of {each.what} over {' and '.join(each.axes)}"
        rows.append((name, f"{each.bytes / 1e6:,.1f}", f"{each.seconds:.4f}"))
    rows += [("  sum", f"{sum(m.bytes for m in made.moved) / 1e6:,.1f}", f"{made.move_seconds:.4f}")]
    rows += [("computed by each device in a step", "TFLOP", "seconds")]
    rows += [("  as it is written", f"{made.operations / 1e12:,.2f}", f"{made.compute_seconds:.4f}")]
    a, b, c = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"{name:{a}}  {number:>{b}}  {last:>{c}}".rstrip() for name, number, last in rows]
    speed = made.batch / (made.compute_seconds + made.move_seconds)
    chip = made.chip
    return "\n".join(
        [
            f"{made.devices:,} × {chip.name} ({mesh}), {made.parameters:,} parameters, batch {made.batch:,}",
            *lines,
            f"{speed:,.1f} examples a second if nothing overlaps; {made.advice}",
            f"rates: {REACHED:g} of {chip.flops / 1e12:,.0f} TFLOP/s; {chip.near / 1e9:,.0f} GB/s within "
            f"{chip.group:,} devices, {chip.far / 1e9:,.0f} GB/s beyond",
        ]
    )
