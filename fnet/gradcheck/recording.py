"""`record`: one forward and backward pass by both engines, with every number and the operation that it comes from.

    model, loss, batch ──▶ by hand, by autodiff ──▶ traced with names (`watch`) ──▶ two flat programs ──▶ Recording

Nothing here knows a kind of layer. What is found is data: `fnet.report.write_explorer` makes a page of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import require, require_key
from fnet.core.trees import join, named_leaves, split_floating
from fnet.data.arrays import as_batch
from fnet.gradcheck.flat import KINDS, Program, flattened
from fnet.gradcheck.layered import to_float64
from fnet.gradcheck.problem import precise
from fnet.gradients.engines import check_engine, loss_gradient, measure
from fnet.gradients.intermediates import perturbed, tap
from fnet.layers.children import backward_of, forward_of, shapes_known, watch
from fnet.types import Batch, Layer, Loss, PyTree

TIGHT = 1e-9  # gradients in float64 that differ by more of the greatest entry are two
ROUNDING = 1e-13  # and of the greatest gradient of the pass: what an entry that ought to be 0 may hold


class Node(NamedTuple):
    """A layer or a tapped value."""

    name: str  # a layer's path, "" for the model itself; a tap's name
    kind: str  # the layer's name, "value" for a tap
    functions: tuple[Callable, ...]  # whose code made it: forward and backward
    parameters: tuple[str, ...] = ()  # the paths of its own


class Recording(NamedTuple):
    """One pass by hand and by autodiff, all numbers in float64.

    The programs' values have names: ``param/dense_0/w``, ``input``, ``target``, ``state`` and ``weight`` (``arg/0`` for
    a function); ``forward:dense_0`` for what a layer gives, ``inputs:dense_0`` for what it is given, ``dy:dense_0`` and
    ``dx:dense_0`` for the gradients by both (by the inputs as far as it comes through this layer);
    ``inner:lstm_0/h@3`` for step 3 of what a layer shows of itself and ``dy:inner:lstm_0/h@3`` for the gradient by it;
    ``loss``, ``grads/dense_0/w``, ``inputs``. Of a value that is a tree the leaves are ``forward:cell#0`` and so on.
    """

    nodes: tuple[Node, ...]  # in the order of the forward
    backward: tuple[str, ...]  # their names in the order in which the backward has been through them
    loss: tuple[Callable, ...]  # the loss' value and, by hand, its gradient
    autodiff: Program
    by_hand: Program | None  # None where there is no backward by hand

    def __repr__(self) -> str:
        programs = {"by hand": self.by_hand, "by autodiff": self.autodiff}
        counts = ", ".join(f"{len(p.equations):,} operations {name}" for name, p in programs.items() if p is not None)
        return f"Recording of {len(self.nodes)} layers or values: {counts}"

    @property
    def first_wrong(self) -> str | None:
        """The first gradient on the way back that is not autodiff's, named as the audit names it; None if all are."""
        if self.by_hand is None:
            return None
        hand, auto = self.by_hand, self.autodiff
        most = max((np.abs(a).max() for a in map(auto.value, auto.marks) if a.size and a.dtype.kind == "f"), default=0)

        def wrong(mark: str) -> bool:
            """Whether some leaf of this name differs."""
            for name in auto.marks | auto.outputs:
                told = name in hand.marks | hand.outputs  # of a function's values those that the caller has derived
                if told and (name == mark or name.startswith((f"{mark}#", f"{mark}/"))):
                    a, b = auto.value(name), hand.value(name)
                    if not (np.abs(b - a) <= TIGHT * np.abs(a).max(initial=0) + ROUNDING * most).all():
                        return True
            return False

        if wrong("dy:"):
            return "loss/outputs"
        nodes = {node.name: node for node in self.nodes}
        for node in map(nodes.__getitem__, self.backward):
            if node.kind == "value":
                if wrong(f"dy:{node.name}"):
                    return node.name
                continue
            if wrong(f"dy:{node.name}"):
                continue  # what reaches it is wrong already
            for path in node.parameters:
                if wrong(f"grads/{path}" if path else "grads"):
                    return path or "params"
            if wrong(f"dx:{node.name}"):
                return f"{node.name}/inputs" if node.name else "inputs"
        rest = (name for name in auto.outputs if name.startswith("grads") and wrong(name))
        return next((name.removeprefix("grads").removeprefix("/") or "params" for name in rest), None)


def record(model: Layer, loss, batch, *, params: PyTree, state: PyTree, key: jax.Array | None = None) -> Recording:
    """One forward and backward pass of a batch in training mode, every number with the operation that it comes from.

    In float64, whatever the caller's precision, by the backwards by hand and by `jax.grad`. Where the loss is a plain
    function there is no pass by hand. ``key`` is for models that draw, as `fnet.layers.dropout` does. Loops are taken
    apart.

    Raises TypeError for what is no model, `LayerError` where the batch does not fit, ValueError where a branch or a
    loop depends on values and where there are more than 20,000 operations or 20 million numbers.

    >>> import fnet
    >>> from fnet.layers import sigmoid
    >>> model = fnet.mlp(2, 1, activation=sigmoid())
    >>> batch = fnet.Batch(jnp.array([[0.0, 1.0]]), jnp.array([[1.0]]))
    >>> params, state = fnet.init(model, jax.random.key(0), batch.inputs)
    >>> recording = fnet.record(model, fnet.losses.squared_error, batch, params=params, state=state)
    >>> [node.name for node in recording.nodes], recording.first_wrong
    (['dense_0', 'sigmoid_0', 'dense_1'], None)
    >>> recording.by_hand.value("dy:sigmoid_0").shape
    (1, 2)
    """
    check_engine("record", model, loss, None)
    if key is not None:
        require_key("record", key)
    batch = as_batch(batch, "batch")
    given = {"param": params, "state": state, "input": batch.inputs, "target": batch.targets, "weight": batch.weights}
    calls: list[Node] = []
    done: list[str] = []

    def watching():
        def forward(call, y):
            path = "/".join(call.path)
            calls.append(Node(path, call.layer.name, (call.layer.forward, call.layer.backward)))
            return marked(f"forward:{path}", y)

        def backward(back, dparams, dx):
            done.append("/".join(back.path))
            marked(f"dy:{done[-1]}", back.dy)
            return dparams, marked(f"dx:{done[-1]}", dx)

        def inputs(path, x):
            return marked(f"inputs:{'/'.join(path)}", x)

        def inner(path, value, is_gradient):
            return marked(f"{'dy:' if is_gradient else ''}inner:{'/'.join(path)}", value)

        return watch(forward, backward, inputs=inputs, inner=inner)

    def ahead(given):
        calls.clear()
        batch = Batch(given["input"], given["target"], given["weight"])
        y, _, residuals = forward_of(model, given["param"], given["state"], batch.inputs, key=key, train=True)
        y = marked("forward:", y)
        with jax.named_scope("loss"):
            measured = measure(loss, None, y, batch)["loss"]
            return batch, y, residuals, measured.count, measured.value

    def objective(given):
        with watching():
            return ahead(given)[-1]

    def by_hand(given):
        done.clear()
        with watching(), shapes_known():
            batch, y, residuals, count, value = ahead(given)
            with jax.named_scope("backward"):
                with jax.named_scope("loss"):
                    dy = marked("dy:", loss_gradient(loss, y, batch, count))
                dparams, dx = backward_of(model, given["param"], residuals, dy)
        marked("dx:", dx)
        return {"loss": value, "grads": dparams, "inputs": dx}

    with precise():
        given = as_arrays("record", given)
        auto = differentiated("record", objective, given, ("param", "input"))
        hand = flattened("record", by_hand, given) if isinstance(loss, Loss) else None
    nodes = owners([*calls, Node("", model.name, (model.forward, model.backward))], params, hand or auto)
    order = (*done, "") if hand is not None else tuple(node.name for node in reversed(nodes))
    names = {node.name for node in nodes}
    functions = tuple(f for f in loss if f is not None) if isinstance(loss, Loss) else (loss,)
    return Recording(nodes, tuple(name for name in order if name in names), functions, auto, hand)


def record_function(
    f: Callable, params: PyTree, *args, gradient: Callable | None = None, intermediates: Callable | None = None
) -> Recording:
    """`record` for a plain function ``f(params, *args)``, a scalar, whose values are named by `fnet.tap`.

    ``gradient(params, *args)`` is the gradient by hand, a tree like ``params``; ``intermediates(params, *args)`` a dict
    of those by tapped values: the arguments of `fnet.check_gradients`. Errors as `record`, ValueError also where
    nothing is tapped, for an intermediate that is no tap, and TypeError where ``params`` or ``args`` hold no arrays.

    >>> def f(w, x):
    ...     return fnet.tap("square", (fnet.tap("product", x * w)) ** 2)
    >>> import fnet
    >>> recording = fnet.record_function(f, 3.0, 2.0, gradient=lambda w, x: 2 * x * w)
    >>> recording.first_wrong, float(recording.autodiff.value("grads"))
    ('params', 24.0)
    """
    for name, function in (("f", f), ("gradient", gradient or f), ("intermediates", intermediates or f)):
        require(callable(function), f"record_function: {name} is no function")
    require(intermediates is None or gradient is not None, "record_function: intermediates without a gradient by hand")
    given = {"param": params, "arg": args}

    def objective(given):
        return f(given["param"], *given["arg"])

    def by_hand(given):
        value = objective(given)
        with jax.named_scope("backward"):
            grads = gradient(given["param"], *given["arg"])  # pyright: ignore
            for name, d in (intermediates(given["param"], *given["arg"]) if intermediates else {}).items():
                marked(f"dy:{name}", d)
        return {"loss": value, "grads": grads}

    with precise():
        given = as_arrays("record_function", given)
        auto = differentiated("record_function", objective, given, ("param",))
        hand = None if gradient is None else flattened("record_function", by_hand, given)
    names = [name.removeprefix("forward:") for name in auto.marks if name.startswith("forward:")]
    unknown = {n.removeprefix("dy:") for n in (hand or auto).marks if n.startswith("dy:")} - {*names}
    require(not unknown, f"record_function: intermediates {sorted(unknown)} are not tapped; there are {names}")
    functions = (f,) if gradient is None else (f, gradient)
    nodes = tuple(Node(name, "value", functions) for name in names)
    return Recording(nodes, tuple(reversed(names)), functions, auto, hand)


def owners(nodes: list[Node], params: PyTree, program: Program) -> tuple[Node, ...]:
    """The layers with their own parameters, without those that only hand on what the last layer in them gives."""

    def numbers(node: Node) -> list[int]:
        mark = f"forward:{node.name}"
        return [number for name, number in program.marks.items() if name == mark or name.startswith(f"{mark}#")]

    kept: list[Node] = []
    for i, node in enumerate(nodes):
        within = [other for other in nodes[:i] if not node.name or other.name.startswith(f"{node.name}/")]
        if not any(numbers(other) == numbers(node) for other in within):
            kept.append(node)
    own: dict[str, list[str]] = {node.name: [] for node in kept}
    for path, _ in named_leaves(params):
        of = max((name for name in own if not name or f"{path}/".startswith(f"{name}/")), key=len, default=None)
        if of is not None:
            own[of].append(path)
    return tuple(node._replace(parameters=tuple(own[node.name])) for node in kept)


def as_arrays(who: str, given: PyTree) -> PyTree:
    """All leaves as arrays, floating ones in float64; TypeError for what is none."""
    for name, leaf in named_leaves(given):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float):
            raise TypeError(f"{who}: {name} is {type(leaf).__name__}; expected arrays and numbers alone")
    return jax.tree.map(jnp.asarray, to_float64(jax.tree.map(jnp.asarray, given)))


def marked(name: str, value: PyTree) -> PyTree:
    """Every floating leaf of a value under a name of its own, which the flat program keeps."""

    def leaf(path, a):
        inner = jax.tree_util.keystr(path, simple=True, separator="/")
        return tap(f"{name}#{inner}" if inner else name, a)

    return jax.tree_util.tree_map_with_path(leaf, value)


def differentiated(who: str, objective: Callable, given: PyTree, wanted: tuple[str, ...]) -> Program:
    """Autodiff of a function with taps, and its gradient by each value that is tapped."""
    tapped = perturbed(objective, given)

    def run(given):
        floating, others = split_floating({name: given[name] for name in wanted})

        def value(offsets, floating):
            return tapped.value(offsets, jax.tree.leaves({**given, **join(floating, others)}))

        loss, (cotangents, grads) = jax.value_and_grad(value, (0, 1))(tapped.zeros, floating)
        marks = {}
        for name, lengths, cotangent in zip(tapped.names, tapped.lengths, cotangents, strict=True):
            kind = next((kind for kind in KINDS if name.startswith(kind)), "")
            of = {"forward:": f"dy:{name[8:]}", "inputs:": f"dx:{name[7:]}"}.get(kind, f"dy:{name}")
            for steps in np.ndindex(*lengths):
                marks[of + (f"@{'.'.join(map(str, steps))}" if steps else "")] = cotangent[steps]
        return {"loss": loss, "grads": grads["param"], "inputs": grads.get("input"), "marks": marks}

    return flattened(who, run, given)
