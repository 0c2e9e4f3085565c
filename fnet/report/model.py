"""What a model is made of: a row for every layer, found by tracing alone.

Legend: B batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from fnet.core.interpret import walk
from fnet.core.operations import operations_of
from fnet.core.trees import split_floating
from fnet.gradcheck.report import columns
from fnet.layers.children import Call, forward_of, init_of, watch
from fnet.types import Layer, PyTree


class Row(NamedTuple):
    """A layer: what leaves it, what it owns, and what it costs."""

    path: str
    layer: str
    shape: str  # of its outputs
    dtype: str
    parameters: int
    bytes: int  # of the parameters
    forward: int  # floating-point operations, counted in the program as it is written
    backward: int
    forward_compiler: float  # as XLA counts them in the same program before it optimizes it
    backward_compiler: float


class Summary(NamedTuple):
    """Rows in model order, then the whole model; `str` of it is the table."""

    rows: tuple[Row, ...]
    total: Row

    def __str__(self) -> str:
        head = ("path", "layer", "output", "dtype", "parameters", "bytes", "FLOPs", "by XLA", "backward", "by XLA")
        order = (4, 5, 6, 8, 7, 9)
        cells = [(*row[:4], *(f"{row[i]:,.0f}" for i in order)) for row in (*self.rows, self.total)]
        widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
        cells = [(*row[:4], *map(str.rjust, row[4:], widths[4:])) for row in (head, *cells)]
        note = (
            "FLOPs: as the program is written, forward and backward by hand, beside XLA's count of it before optimizing"
        )
        return f"{columns(cells)}\n\n{note}"


def summary(model: Layer, x: PyTree) -> Summary:
    """The layers of a model for inputs like ``x`` (arrays or `jax.ShapeDtypeStruct`s), in training mode.

    A row has the layer's path, its outputs' shape and dtype, its own parameters and their bytes, and the floating-point
    operations of its forward and of its backward by hand. Operations are counted in the traced program: ``2 m n k`` for
    a product, one for each entry of an elementwise result or reduced array, a scan's body as often as it runs. Beside
    them stands XLA's own figure for the same program (``Lowered.cost_analysis``), which counts transcendental functions
    apart and a loop's body once. Nothing is computed and nothing allocated. Raises `LayerError` where model and inputs
    do not fit.

    >>> import fnet
    >>> x = jax.ShapeDtypeStruct((32, 784), "float32")
    >>> table = summary(fnet.mlp(128, 64, 10), x)
    >>> table.total.parameters, table.rows[0].forward == 2 * 32 * 784 * 128 + 32 * 128
    (109386, True)
    """
    shapes = abstract(x)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(lambda key: init_of(model, key, shapes), key)
    calls: list[tuple[Call, PyTree]] = []

    def watcher(call, y):
        params, state, x, key = abstract(call[2:6])
        calls.append((call._replace(params=params, state=state, x=x, key=key), abstract(y)))
        return y

    def traced(params, state, x, key):
        with watch(watcher):
            return forward_of(model, params, state, x, key=key, train=True)[0]

    y = jax.eval_shape(traced, params, state, shapes, key)
    counts: dict[str, tuple[int, float]] = {}
    whole = row_of(Call((), model, params, state, shapes, key, True), y, counts)
    rows = [row_of(call, y, counts) for call, y in calls]
    shown = []
    for row, (call, _) in zip(rows, calls, strict=True):
        children = [other for other, (c, _) in zip(rows, calls, strict=True) if c.path[:-1] == call.path]
        own = without(row, children)
        if not children or own.parameters:  # a combinator has a row where it owns parameters
            shown.append(own)
    own = without(whole, [row for row, (call, _) in zip(rows, calls, strict=True) if len(call.path) == 1])
    if own.parameters:
        shown.append(own._replace(path=model.name))
    return Summary(tuple(shown), whole._replace(path="total"))


def row_of(call: Call, y, counts: dict) -> Row:
    """The row of a layer with all that is in it."""
    layer, params, state, x, key, train = call[1:]
    first = jax.tree.leaves(y)[0]
    leaves = jax.tree.leaves(params)

    def forward(params, state, x, key):
        return layer.forward(params, state, x, key=key, train=train)

    residuals = jax.eval_shape(forward, params, state, x, key)[2]
    # the forward is counted as inference computes it: what only the backward reads is the backward's
    ahead = count(lambda *args: forward(*args)[0], (params, state, x, key), counts)
    back = count(layer.backward, (params, residuals, split_floating(y)[0]), counts)
    return Row(
        "/".join(call.path),
        layer.name,
        str(first.shape),
        str(first.dtype),
        sum(math.prod(leaf.shape) for leaf in leaves),
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves),
        ahead[0],
        back[0],
        ahead[1],
        back[1],
    )


def without(row: Row, children: list[Row]) -> Row:
    """The row of a layer without what its children own and do."""
    names = Row._fields[4:]
    own = {name: getattr(row, name) - sum(getattr(child, name) for child in children) for name in names}
    return row._replace(**own)


def count(function, args, counts: dict) -> tuple[int, float]:
    """Floating-point operations of a function: counted in its program, and by XLA. ``counts`` remembers programs."""
    program = jax.make_jaxpr(lambda *args: function(*args))(*args)
    name = str(program)
    if name not in counts:
        analysis = jax.jit(lambda *args: function(*args)).lower(*args).cost_analysis() or {}
        operations = sum(operations_of(place.eqn) * math.prod(place.lengths) for place in walk(program.jaxpr))
        counts[name] = operations, analysis.get("flops", 0.0)
    return counts[name]


def abstract(tree: PyTree) -> PyTree:
    """Shapes and dtypes of a tree."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
