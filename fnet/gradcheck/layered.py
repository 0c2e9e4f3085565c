"""The audit of layers and models: whole, and layer by layer with the true cotangent.

Of a model each layer is tested alone: at the inputs that it has in the forward, with the gradient that autodiff says
arrives at its outputs. So a wrong layer is named, and the layers that it misleads are not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import require_key, require_layer
from fnet.core.interpret import is_float
from fnet.core.jax_insides import quick_jit
from fnet.core.trees import cast_like, join, named_leaves, split_floating
from fnet.data.arrays import as_batch
from fnet.gradcheck.check import check_gradients
from fnet.gradcheck.judge import compare
from fnet.gradcheck.problem import converted, precise
from fnet.gradcheck.report import LeafCheck, Report
from fnet.gradcheck.witnesses import TIGHT, small_faults
from fnet.gradients.engines import check_engine, loss_gradient, measure
from fnet.layers.children import Call, backward_of, forward_of, init_of, watch
from fnet.types import Layer, Loss, PyTree


def check_layer(
    layer: Layer, x: PyTree, *, key: jax.Array, params: PyTree = None, state: PyTree = None, **options
) -> Report:
    """Audit a layer's backward by hand: the gradients of its parameters and of its inputs, in train and in eval mode.

    The function is ``Σ v · y`` with a fixed Gaussian ``v`` for the outputs ``y`` at ``x``. Parameters are drawn by
    ``layer.init`` from ``key`` if not given, with a little noise. Rows are called ``params/w`` and ``inputs`` where
    both modes are one program, ``train/params/w``, ``eval/inputs`` where they are not. Other options and errors are
    those of `check_gradients`.
    """
    require_layer("check_layer: layer", layer)
    require_key("check_layer", key)
    x, params, state, run_key = ready(layer, x, key, params, state)
    modes = {}
    for mode in ("train", "eval"):
        call = Call((), layer, params, state, x, run_key, mode == "train")
        with precise():
            y = jax.eval_shape(
                lambda *a, c=call: forward_of(c.layer, *a, key=c.key, train=c.train)[0], *to_float64(call[2:5])
            )
            cotangent = random_like(split_floating(y)[0], seed=1)
        modes[f"{mode}/"] = functions(call, call[2:6], cotangent)
    if is_one_program(*modes.values()):
        modes = {"": modes["train/"]}
    reports = []
    for mode, (value, by_hand, tree, args) in modes.items():
        report = check_gradients(value, tree, *args, gradient=by_hand, **options)
        reports.append(report._replace(leaves=tuple(r._replace(path=mode + r.path) for r in report.leaves)))
    notes = tuple(note.replace("argument 3", "outputs") for note in reports[0].notes)  # v is shaped like them
    return reports[0]._replace(leaves=tuple(leaf for report in reports for leaf in report.leaves), notes=notes)


def is_one_program(first: tuple, second: tuple) -> bool:
    """Whether the two modes of a layer, as `functions` gives them, are one program; False where that is not known."""

    def traced(value, by_hand, tree, args):
        return jax.make_jaxpr(lambda tree, *args: (value(tree, *args), by_hand(tree, *args)))(tree, *args)

    try:
        with precise():
            programs = [traced(*mode[:2], *to_float64(mode[2:])) for mode in (first, second)]
    except Exception:  # the audit says what it is
        return False
    # by its text, which tells rules of one's own by their functions, as `kept.same_program` does not
    a, b = ([str(program.jaxpr), *map(np.asarray, program.consts)] for program in programs)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def check_model(
    model: Layer, loss: Loss, batch, *, key: jax.Array, params: PyTree = None, state: PyTree = None, **options
) -> Report:
    """Audit a model's and its loss' backward by hand on a batch, in training mode: whole, then layer by layer.

    Rows stand in model order: each layer's parameters and its inputs, then the loss' gradient by the model's outputs.
    Where the whole gradient is wrong, each row is the verdict of its own layer with the true cotangent, and
    ``first_wrong`` names the first fault that the backward pass meets. Parameters are drawn by ``model.init`` from
    ``key`` if not given, with a little noise, so that no bias is zero. Other options and errors are those of
    `check_gradients`.
    """
    check_engine("check_model", model, loss, None, by_hand=True)
    require_key("check_model", key)
    batch = as_batch(batch, "batch")
    x, params, state, run_key = ready(model, batch.inputs, key, params, state)
    batch = batch._replace(inputs=x)

    def objective(params, state, batch, run_key):
        outputs, _, _ = forward_of(model, params, state, batch.inputs, key=run_key, train=True)
        return measure(loss, None, outputs, batch)["loss"].value

    def by_hand(params, state, batch, run_key):
        outputs, _, residuals = forward_of(model, params, state, batch.inputs, key=run_key, train=True)
        count = measure(loss, None, outputs, batch)["loss"].count
        return backward_of(model, params, residuals, loss_gradient(loss, outputs, batch, count))[0]

    whole = Report(())
    if any(is_float(leaf) for leaf in jax.tree.leaves(params)):
        whole = check_gradients(objective, params, state, batch, run_key, gradient=by_hand, **options)
    rows = {leaf.path: leaf for leaf in whole.leaves}
    whole_ok = all(leaf.verdict != "wrong" for leaf in rows.values())
    quick = {**options, "precisions": (), "cost": False, "intermediates": None}
    leaves: list[LeafCheck] = []
    for local in each_layer(model, loss, params, state, batch, run_key):
        found = local.check(**quick)
        if local.combinator:
            # its children's parameters have rows already; its own, and what it makes wrong of right children, have not
            seen = {row.path: row for row in leaves}
            inner = [row for row in leaves if not local.path or row.path.startswith(local.path + "/")]
            children_right = all(row.verdict != "wrong" for row in inner)
            words = "its layers are right one by one: the backward of the composition is wrong"
            for row in found:
                own = row.path not in seen and row.path != rename(local.path, local.input_name)
                if row.verdict == "wrong" and children_right and row.path in seen:
                    leaves[leaves.index(seen[row.path])] = row._replace(cause=f"{words}; {row.cause}")
                elif row.verdict == "wrong" and children_right:
                    leaves.append(row._replace(cause=f"{words}; {row.cause}"))
                elif own and row.verdict == "wrong":  # misled by its layers, as every gradient behind a wrong one is
                    leaves.append(row._replace(verdict="unverified", cause="a layer within is wrong: mend that first"))
                elif own:
                    leaves.append(rows[row.path] if row.path in rows and whole_ok else row)
            continue
        leaves += [rows[row.path] if row.path in rows and whole_ok and row.verdict != "wrong" else row for row in found]
    named = {row.path for row in leaves}
    leaves = [row for path, row in rows.items() if path not in named] + leaves
    if not whole_ok and all(row.verdict != "wrong" for row in leaves):
        leaves = [row for row in rows.values() if row.verdict == "wrong"] + leaves
    return whole._replace(leaves=tuple(leaves))


class Local(NamedTuple):
    """One layer inside the model, with what reaches it from both sides."""

    path: str
    combinator: bool
    value: Any  # (tree, *args) -> scalar
    by_hand: Any  # (tree, *args) -> tree
    tree: PyTree
    args: tuple
    hand: dict  # path -> array: the gradients by hand and by autodiff
    auto: dict
    dtypes: dict  # path -> the dtype that the caller's precision gives it

    @property
    def input_name(self) -> str:
        """What the row of the inputs is called, apart from a parameter of that name."""
        return input_name(self.tree)

    def check(self, **options) -> list[LeafCheck]:
        """A row per parameter and for the inputs; the full audit where hand and autodiff do not agree tightly."""
        checks = []
        for path, a in self.auto.items():
            c = self.hand.get(path)
            blank = LeafCheck(path, a.shape, self.dtypes[path], "ok", 0.0, 0.0, (), 0.0, 0.0, 0.0, power=TIGHT)
            agrees = a.size == 0
            if c is not None and c.shape == a.shape and a.size:
                tight = bool((np.abs(c - a) <= TIGHT * np.abs(a).max()).all())
                blank, agrees = compare(blank, c, a), tight and not small_faults(c, a).any()
            if not agrees:
                report = check_gradients(self.value, self.tree, *self.args, gradient=self.by_hand, **options)
                named = ((path_in_report(self.path, leaf.path, self.tree), leaf) for leaf in report.leaves)
                return [leaf._replace(path=path, dtype=self.dtypes[path]) for path, leaf in named]
            checks.append(blank._replace(evidence=("alone, with the true cotangent, it agrees with autodiff",)))
        return checks


def input_name(tree) -> str:
    """``inputs``, or ``inputs (dx)`` in a layer that has a parameter called so."""
    taken = isinstance(tree, dict) and isinstance(tree.get("params"), dict) and "inputs" in tree["params"]
    return "inputs (dx)" if taken else "inputs"


def path_in_report(layer: str, path: str, tree) -> str:
    """``dense_0/w`` for the parameter w of the layer, ``dense_0/inputs`` for its inputs."""
    if path == "inputs" or path.startswith("inputs/"):
        return rename(layer, input_name(tree) + path.removeprefix("inputs"))
    return rename(layer, path)


def rename(layer: str, path: str) -> str:
    """``dense_0/w`` for the parameter w of the layer, ``dense_0/inputs`` for its inputs."""
    inner = "" if path == "params" else path.removeprefix("params/")
    return "/".join(part for part in (layer, inner) if part)


def record(model: Layer, params, state, x, key, offsets=None) -> tuple[PyTree, list[tuple[Call, PyTree]]]:
    """The model's outputs, and every layer's call with its outputs, the model itself last.

    ``offsets`` are added to the outputs of each: the derivative by one is the gradient that arrives there.
    """
    calls: list[tuple[Call, PyTree]] = []

    def watcher(call, y):
        calls.append((call, y))
        if offsets is None:
            return y
        floating, others = split_floating(y)
        return join(jax.tree.map(jnp.add, floating, offsets[len(calls) - 1]), others)

    with watch(watcher):
        y, _, _ = forward_of(model, params, state, x, key=key, train=True)
    return watcher(Call((), model, params, state, x, key, True), y), calls


def input_dtypes(model: Layer, params, state, x, key) -> dict[str, str]:
    """The dtype that each layer's inputs have at the precision in force, by their path in the report."""
    found: dict[str, str] = {}

    def run(params, state, x, key):
        y, calls = record(model, params, state, x, key)
        for call, _ in calls:
            tree = {"inputs": split_floating(call.x)[0], "params": call.params}
            path = "/".join(call.path)
            found.update({path_in_report(path, name, tree): str(leaf.dtype) for name, leaf in named_leaves(tree)})
        found.update({rename("loss", name): str(leaf.dtype) for name, leaf in named_leaves({"outputs": y})})
        return y

    jax.eval_shape(run, params, state, x, key)
    return found


def each_layer(model, loss, params, state, batch, run_key) -> list[Local]:
    """Every layer in the model with the true cotangent of its outputs, the model itself, and the loss. In float64."""
    dtypes = input_dtypes(model, params, state, batch.inputs, run_key)
    with precise():
        params, state, batch = to_float64(params), to_float64(state), to_float64(batch)
        calls: list[Call] = []  # without their arrays: those are traced

        def outputs_of_each(params, state, batch, run_key):
            _, recorded = record(model, params, state, batch.inputs, run_key)
            calls[:] = [call._replace(params=None, state=None, x=None, key=None) for call, _ in recorded]
            return [split_floating(y)[0] for _, y in recorded]

        def objective(offsets, params, state, batch, run_key):
            y, recorded = record(model, params, state, batch.inputs, run_key, offsets)
            given = [(call.params, call.state, call.x, call.key) for call, _ in recorded]
            return measure(loss, None, y, batch)["loss"].value, (given, y)

        def both(params, state, batch, run_key, zeros):
            """Each layer's gradients by hand and by autodiff, with the true cotangents."""
            differentiate = jax.grad(objective, has_aux=True)
            cotangents, (given, y) = differentiate(zeros, params, state, batch, run_key)
            results = []
            for call, arrays, v in zip(calls, given, cotangents, strict=True):
                value, by_hand, tree, args = functions(call, arrays, v)
                results.append((by_hand(tree, *args), jax.grad(value)(tree, *args)))
            results.append((loss_by_hand({"outputs": y}, batch), jax.grad(loss_value)({"outputs": y}, batch)))
            return results, given, cotangents, y

        def loss_value(tree, batch):
            return measure(loss, None, tree["outputs"], batch)["loss"].value

        def loss_by_hand(tree, batch):
            count = measure(loss, None, tree["outputs"], batch)["loss"].count
            return {"outputs": loss_gradient(loss, tree["outputs"], batch, count)}

        shapes = jax.eval_shape(outputs_of_each, params, state, batch, run_key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        results, given, cotangents, y = quick_jit(both)(params, state, batch, run_key, zeros)
        found = []
        for call, arrays, v, (hand, auto) in zip(calls, given, cotangents, results, strict=False):
            path = "/".join(call.path)
            combinator = any(len(c.path) > len(call.path) and c.path[: len(call.path)] == call.path for c in calls)
            value, by_hand, tree, args = functions(call, arrays, v)
            grads = flat(path, hand), flat(path, auto)
            found.append(Local(path, combinator, value, by_hand, tree, args, *grads, dtypes))
        hand, auto = results[-1]
        tree, grads = {"outputs": y}, (flat("loss", hand), flat("loss", auto))
        found.append(Local("loss", False, loss_value, loss_by_hand, tree, (batch,), *grads, dtypes))
        return found


def functions(call: Call, given: tuple, cotangent):
    """A layer alone: ``Σ v · y`` as a function of its parameters and inputs, its gradient by hand, the arguments."""
    layer, train = call.layer, call.train
    params, state, x, key = given
    inputs, others = split_floating(x)

    def value(tree, others, state, key, v):
        y = forward_of(layer, tree["params"], state, join(tree["inputs"], others), key=key, train=train)[0]
        return inner(split_floating(y)[0], v)

    def by_hand(tree, others, state, key, v):
        x = join(tree["inputs"], others)
        y, _, residuals = forward_of(layer, tree["params"], state, x, key=key, train=train)
        dparams, dx = backward_of(layer, tree["params"], residuals, cast_like(v, split_floating(y)[0]))
        return {"params": dparams, "inputs": split_like(dx, tree["inputs"])}

    return value, by_hand, {"params": params, "inputs": inputs}, (others, state, key, cotangent)


def flat(path: str, tree) -> dict[str, np.ndarray]:
    """The leaves of a gradient tree by the paths that the report shows."""
    return {path_in_report(path, name, tree): np.asarray(leaf) for name, leaf in named_leaves(tree)}


def split_like(dx, inputs):
    """``dx`` with None wherever the inputs are not floating, whatever the backward returned there."""
    if jax.tree.structure(inputs) == jax.tree.structure(dx):
        return dx
    keep = lambda leaf: leaf is None  # noqa: E731
    return jax.tree.map(lambda x, d: None if x is None else d, inputs, dx, is_leaf=keep)


def inner(y, v):
    """``Σ v · y`` over the floating leaves."""
    return sum((a * b.astype(a.dtype)).sum() for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(v), strict=True))


def random_like(shapes, seed: int):
    """Gaussians with the shapes of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jax.device_put(rng.standard_normal(s.shape)), shapes)


def ready(layer: Layer, x, key, params, state):
    """``x``, parameters and state as arrays of the caller's precision, and the key of the run."""
    if not isinstance(layer, Layer):
        raise TypeError(
            f"expected an fnet.Layer, got {type(layer).__name__}: audit a plain function by check_gradients"
        )
    init_key, run_key = jax.random.split(key)
    x = jax.tree.map(jnp.asarray, x)
    shapes = jax.eval_shape(lambda x: x, x)
    if params is None or state is None:
        drawn, first_state = quick_jit(lambda key: init_of(layer, key, shapes))(init_key)
        state = first_state if state is None else state
    if params is None:
        rng = np.random.default_rng(0)

        def noisy(leaf):
            noise = 0.01 * rng.standard_normal(leaf.shape) if is_float(leaf) else 0
            return jax.device_put((np.asarray(leaf) + noise).astype(leaf.dtype))

        params = jax.tree.map(noisy, drawn)
    return x, params, state, run_key


def to_float64(tree: PyTree) -> Any:
    """Floating leaves in float64, all others as they are."""
    return jax.tree.map(lambda leaf: converted(leaf, np.float64), tree)
