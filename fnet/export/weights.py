"""Weights for other programs, and inference without the model's code (needs safetensors and flatbuffers).

    save_weights("mlp.safetensors", params)                          leaves by their paths, such as dense_0/w
    params = load_weights("mlp.safetensors", like=params)
    names = torch_names(params, {"dense_0": "0.*", "dense_1": "2.*"})   as torch.nn.Sequential calls them
    save_weights("torch.safetensors", params, names)                 and back with load_weights(..., names)

    export_inference(model, params, state, x, "mlp.inference")       y = load_inference("mlp.inference")(x)

A *name map* is None (the paths themselves), a mapping of paths to names, or a list of `Rule`s. Nothing is pickled, and
no file that exists is overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype as canonical

from fnet.core.extras import need
from fnet.core.files import first_line, whole_file
from fnet.layers.children import apply
from fnet.layers.recurrent import LSTMCarry
from fnet.types import Layer, PyTree, by_path, is_floating_dtype, named_leaves, stacked_axes

FORMAT = "1"  # of the files of export_inference
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # of jax; a plugin may have one more, which is the one at hand then
DTYPES = ("bool", "float16", "float32", "float64", "bfloat16", "complex64")  # that safetensors writes and reads
DTYPES += tuple(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))
Arrays = dict[str, np.ndarray]

jax.export.register_namedtuple_serialization(LSTMCarry, serialized_name="fnet.LSTMCarry")


class ExportError(ValueError):
    """A file or a name map cannot be used; the message names it, what was expected, what was found and the remedy."""


class Rule(NamedTuple):
    """How some leaves of a tree are stored: ``store(*leaves)`` are the tensors, and ``restore(*tensors)`` the leaves.

    Both take and return tuples of NumPy arrays. ``Rule(("dense_0/w",), ("fc.weight",), lambda w: (w.T,), lambda w:
    (w.T,))`` transposes.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    store: Callable[..., tuple] = lambda *leaves: leaves
    restore: Callable[..., tuple] = lambda *tensors: tensors


class Flattened(NamedTuple):
    """For `torch_names`: the name of a dense layer behind a flattened convolution of so many channels.

    fnet flattens images as (H, W, C), PyTorch as (C, H, W), so the rows of the weights stand in another order.
    """

    name: str
    channels: int


class Conv1D(NamedTuple):
    """For `torch_names`: the name of a module whose weights stand as ours, ``(I, O)``: GPT-2's ``Conv1D``.

    It is told and not guessed, since square weights look alike both ways. Of an `attention` it is the module that holds
    ``c_attn`` and ``c_proj``.
    """

    name: str


Names = Mapping[str, str] | Sequence[Rule] | None


def save_weights(path: str | Path, params: PyTree, names: Names = None) -> None:
    """Write the leaves of any tree of arrays to a safetensors file, in their dtypes (float16 and bfloat16 too).

    Raises ExportError for a file that exists, for two leaves of one name, for a name map that does not fit, and for
    what safetensors cannot hold. A Python number counts as the array that jax makes of it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(f"{folder}/a.safetensors", {"dense_0": {"w": jnp.ones((2, 3))}}, {"dense_0/w": "kernel"})
    ...     load_weights(f"{folder}/a.safetensors", {"dense_0": {"w": jnp.zeros((2, 3))}}, {"dense_0/w": "kernel"})
    {'dense_0': {'w': Array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)}}
    """
    _require_new(path)
    with _whole(path) as part:
        part.write_bytes(_serialized(to_tensors(params, names)))


def load_weights(path: str | Path, like: PyTree, names: Names = None, *, dtype=None) -> PyTree:
    """The tree that `save_weights` wrote; ``like`` has its structure, shapes and dtypes (arrays or shapes).

    With a floating ``dtype`` the file's floating tensors are converted to it. Raises ExportError for a file that is not
    safetensors', and where it does not hold exactly the tensors of ``like``: it names those that are missing, not
    expected, or of another shape or dtype.
    """
    arrays, _ = _read(path)
    return from_tensors(arrays, like, names, dtype=dtype, where=str(path))


def to_tensors(params: PyTree, names: Names = None) -> Arrays:
    """The leaves as NumPy arrays by name. PyTorch takes them as ``{name: torch.from_numpy(a) for name, a in ...}``."""
    # copies here and below, since whoever has the tensors may write into them
    return _stored({path: np.array(leaf) for path, leaf in _leaves(params)}, _rules(params, names))


class Taken(NamedTuple):
    """What ``from_tensors(..., partial=True)`` did: printed, a table of every tensor and leaf."""

    taken: tuple[str, ...]  # leaves whose tensors were there and fitted
    kept: dict[str, str]  # leaves that stay as they were, and why
    left: tuple[str, ...]  # tensors that no leaf took, also those of leaves that are kept

    def __str__(self) -> str:
        rows = [*((path, "taken") for path in self.taken), *self.kept.items(), *((name, "left") for name in self.left)]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:{width}}  {what}" for name, what in rows)


def from_tensors(
    tensors: Mapping[str, Any],
    like: PyTree,
    names: Names = None,
    *,
    dtype=None,
    partial: bool = False,
    where: str = "tensors",
) -> Any:
    """The tree that `to_tensors` took apart; errors as in `load_weights`, which begin with ``where``.

    With ``partial`` it is a pair: ``like`` with those of its leaves replaced whose tensors are there and fit (so a
    backbone comes under another head), and `Taken`, which says why the others are not. Then ``like`` holds arrays. The
    leaves of one `Rule` are taken together or not at all.

    >>> like = {"body": jnp.zeros(2), "head": jnp.ones(3)}
    >>> tensors = {"body": np.array([5, 6], "float32"), "fc": np.zeros(9, "float32")}
    >>> tree, taken = from_tensors(tensors, like, partial=True)
    >>> print(tree["body"], tree["head"])
    [5. 6.] [1. 1. 1.]
    >>> print(taken)
    body  taken
    head  kept: no tensor head
    fc    left
    """
    shapes, rules = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in _leaves(like)}, _rules(like, names)
    expected = _stored(shapes, rules)
    if not isinstance(tensors, Mapping):
        raise ExportError(
            f"{where} is a {type(tensors).__name__}; expected a mapping of names to tensors: of a module of PyTorch "
            "give its state_dict()"
        )
    if odd := [name for name in tensors if not isinstance(name, str)]:
        raise ExportError(f"{where} has the name {odd[0]!r}; expected names that are text")
    if dtype is not None and not is_floating_dtype(dtype):
        raise ExportError(f"dtype = {dtype!r}; expected a floating dtype, such as 'float32': others stay as they are")
    wanted = expected if partial else tensors  # what no leaf takes is not read
    found = {name: _converted(name, _array(name, tensors[name]), dtype) for name in tensors if name in wanted}
    if partial:
        return _fitting(where, expected, found, rules, like, list(tensors))
    _require_same(where, expected, found, rules)
    made = {}
    for rule in rules:
        made |= _restored(rule, found, shapes)
    return jax.tree.unflatten(jax.tree.structure(like), [made[path] for path in shapes])


def _restored(rule: Rule, found: Arrays, shapes: Arrays) -> dict[str, jax.Array]:
    """A rule's leaves from its tensors; ExportError unless they are of the shapes and dtypes that they are to have."""
    leaves = _paired(rule, "restore", rule.paths, rule.restore(*(found[name] for name in rule.names)))
    made = {path: jnp.array(leaf) for path, leaf in leaves.items()}
    for path, leaf in made.items():
        if (leaf.shape, leaf.dtype) != (shapes[path].shape, shapes[path].dtype):
            raise ExportError(
                f"{path} was restored as {_kind(leaf)}; expected {_kind(shapes[path])}: mend its Rule, or set "
                "jax_enable_x64 for 64 bits"
            )
    return made


def _fitting(
    where: str, expected: Arrays, found: Arrays, rules: Sequence[Rule], like: PyTree, names: list[str]
) -> tuple[PyTree, Taken]:
    """``like`` with the leaves of those rules whose tensors are all there and of their shapes and dtypes."""
    shapes, taken, kept, used, whys, dtypes = dict(_leaves(like)), {}, {}, set(), [], set()
    if unknown := [path for path, leaf in shapes.items() if isinstance(leaf, jax.ShapeDtypeStruct)]:
        raise ExportError(
            f"from_tensors: {unknown[0]} is a shape, {_kind(shapes[unknown[0]])}; expected arrays where partial=True, "
            "since leaves without a tensor stay as they are: give what init returned"
        )
    for rule in rules:
        missing = [name for name in rule.names if name not in found]
        other = [name for name in rule.names if name in found and _kind(found[name]) != _kind(expected[name])]
        if missing or other:
            name, remedy = (missing or other)[0], ""
            why = f"no tensor {name}" if missing else f"{name} is {_kind(found[name])}, not {_kind(expected[name])}"
            if not missing and all(_differ_by_dtype(expected, found, n) for n in other):
                dtypes.add(expected[name].dtype.name)
                remedy = f"; dtype={expected[name].dtype.name!r} converts it"
            whys.append(why)
            kept |= dict.fromkeys(rule.paths, f"kept: {why}{remedy}")
            continue
        taken |= _restored(rule, found, shapes)
        used |= {*rule.names}
    if not taken:
        remedy = _another_prefix(expected, names) or "give the names of the tensors, as torch_names makes them"
        remedy = f"to convert them give dtype={min(dtypes)!r}" if dtypes else remedy
        said = "; ".join(whys[:4]) + (f"; and {len(whys) - 4} more" if len(whys) > 4 else "")
        raise ExportError(f"{where}: no tensor fits ({said}); expected one at least: {remedy}")
    copy = lambda leaf: jnp.array(leaf) if isinstance(leaf, jax.Array) else np.array(leaf)  # noqa: E731
    made = [taken[path] if path in taken else copy(leaf) for path, leaf in by_path(like).items()]
    tree = jax.tree.unflatten(jax.tree.structure(like), made)
    return tree, Taken(tuple(taken), kept, tuple(name for name in names if name not in used))


def _differ_by_dtype(expected: Arrays, found: Arrays, name: str) -> bool:
    """Whether converting would help."""
    pair = expected[name], found[name]
    return pair[0].shape == pair[1].shape and all(jnp.issubdtype(array.dtype, jnp.floating) for array in pair)


def _another_prefix(expected: Iterable[str], found: Iterable[str]) -> str:
    """What to do where the names that are expected and found differ by what stands before all of them; else nothing."""
    expected, found = set(expected), set(found)
    if not expected or not found or expected & found:
        return ""
    # DataParallel puts "module." before all names, and models of transformers "transformer."
    start = min(found).split(".")[0] + "."
    if all(name.startswith(start) for name in found) and expected & {name.removeprefix(start) for name in found}:
        return f"their names begin with {start!r}: take it off, {{name.removeprefix({start!r}): tensor ...}}"
    start = min(expected).split(".")[0] + "."
    if all(name.startswith(start) for name in expected) and found & {name.removeprefix(start) for name in expected}:
        return f"their names do not begin with {start!r}: name the modules without it"
    return ""


def _converted(name: str, array: np.ndarray, dtype) -> np.ndarray:
    """A floating array in ``dtype``; any other, and all without one, as they are."""
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if (lost := ~np.isfinite(converted) & np.isfinite(array)).any():
        worst = array[lost].flat[0]
        raise ExportError(f"{name} holds {worst:g}, which {np.dtype(dtype)} does not; expected a wider dtype")
    return converted


def _require_same(where: str, expected: Arrays, found: Arrays, rules: Sequence[Rule], most: int = 8) -> None:
    """Raise ExportError where the tensors are not those of the model; of many the first are named."""
    owner = {name: ", ".join(rule.paths) for rule in rules for name in rule.names}
    label = lambda name: name if owner.get(name, name) == name else f"{owner[name]} (as {name})"  # noqa: E731
    names = [name for name in {**expected, **found} if _kind(expected.get(name)) != _kind(found.get(name))]
    if not names:
        return
    lines = [f"{label(n)}: expected {_kind(expected.get(n))}, found {_kind(found.get(n))}" for n in names[:most]]
    differing = "; ".join(lines) + (f"; and {len(names) - most} more" if len(names) > most else "")
    pairs = [(expected[name], found[name]) for name in names if name in expected and name in found]
    if len(pairs) == len(names) and all(_differ_by_dtype(expected, found, name) for name in names):
        dtype = f"dtype={pairs[0][0].dtype.name!r}"
        raise ExportError(f"{where} is of another dtype: {differing}. To convert it, give {dtype}")
    remedy = _another_prefix(expected, found)
    if not remedy and not any(name in expected for name in names):
        remedy = "Leave them out, or take what fits by from_tensors(..., partial=True)"
    remedy = remedy[:1].upper() + remedy[1:] or "Give the model it is of, or its names"
    raise ExportError(f"{where} is not of this model: {differing}. {remedy}")


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_names(params: PyTree, modules: Mapping[str, str | Flattened | Conv1D | tuple[str, ...] | Rule]) -> list[Rule]:
    """The name map between a tree and a ``state_dict`` of PyTorch, from the layers' paths and the modules' names.

    In a module's name ``*`` stands for its parameters', so ``"0.*"`` is ``0.weight`` and ``0.bias``:

    >>> import fnet
    >>> params, _ = fnet.init(fnet.mlp(4, 2), jax.random.key(0), jnp.ones((1, 3)))
    >>> names = torch_names(params, {"dense_0": "0.*", "dense_1": "2.*"})
    >>> {name: tensor.shape for name, tensor in to_tensors(params, names).items()}
    {'0.bias': (4,), '0.weight': (4, 3), '2.bias': (2,), '2.weight': (2, 4)}

    What a layer is shows in its leaves; what is in none of them has to be the module's, such as the number of heads,
    their scale, ``eps`` and which form of gelu it is:

    - dense, conv: PyTorch has features out first, ``(O, I)`` and ``(O, I, H, W)``. Behind `flatten` of a convolution
      with C channels give ``Flattened("3.*", C)``.
    - rnn, lstm, gru (``reset_after``): ``"lstm.*_l0"``, with ``_l1`` for the second of PyTorch's layers and
      ``_l0_reverse`` for its second direction. PyTorch has two biases, which add: ours goes to the first and the
      second is 0 (of a gru it holds that within the reset gate's product); read back, they are added.
    - attention: ``"self_attn.*"`` of ``nn.MultiheadAttention``, also within ``nn.TransformerEncoderLayer``, whose other
      children are ``linear1``, ``linear2``, ``norm1`` and ``norm2``; of GPT-2 ``Conv1D("h.0.attn.*")``. The inward
      projections are one tensor there, so they have the same width, and PyTorch's have as many features in as out.
    - a dense layer that is GPT-2's ``Conv1D``: ``Conv1D("h.0.mlp.c_fc.*")``.
    - embedding, or a leaf by itself that is no ``w``: as it is. A table that PyTorch holds twice has two names,
      ``("embedding.*", "head.*")``; read back, they must agree.
    - normalizations; and their statistics, where the tree holds the model's state too, with ``num_batches_tracked`` 0.

    PyTorch takes images as (B, C, H, W). A transposed convolution has the leaves of a convolution, whose rule is wrong
    for it: give its path a `Rule` of your own, as any layer that is not in this list. Raises ExportError for a path
    that is not there, for leaves of no such layer, for leaves that no module has, and for layers that `repeat` stacks.
    """
    stacked = dict(zip(dict(named_leaves(params)), stacked_axes(params), strict=True))
    rules, leaves = [], dict(named_leaves(params))
    for path, given in modules.items():
        if isinstance(given, Rule):
            rules.append(given)
            continue
        start = f"{path}/" if path else ""
        within = {name.removeprefix(start): leaf for name, leaf in leaves.items() if name.startswith(start)}
        within |= {"": leaves[path]} if path in leaves else {}
        if not within:
            raise ExportError(f"torch_names: no leaf is at {path!r}; expected the path of one of {', '.join(leaves)}")
        if copies := [name for name in within if stacked[f"{start}{name}" if name else path]]:
            raise ExportError(
                f"torch_names: {start}{copies[0]} stacks the layers of a repeat, {list(within[copies[0]].shape)}; "
                "expected each by itself, as PyTorch has them: take them apart (Copies.one), or write a Rule"
            )
        one = given.name if isinstance(given, Flattened | Conv1D) else given
        patterns = (one,) if isinstance(one, str) else one
        if not isinstance(patterns, tuple) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ExportError(
                f"torch_names: {path} is given {given!r}; expected a name such as 'fc.*', a tuple of names, "
                "Flattened(name, channels), Conv1D(name) or a Rule"
            )
        if {*within} == {""} and path.rpartition("/")[2] == "w" and not isinstance(given, Conv1D):
            raise ExportError(
                f"torch_names: {path} is named by itself; expected the path of its layer, since PyTorch holds weights "
                f"turned: {path.rpartition('/')[0]!r}, or a Rule"
            )
        for rule in _torch_rules(path, within, given):
            paths = tuple(f"{start}{name}" if name else path for name in rule.paths)
            named = tuple(pattern.replace("*", name) for pattern in patterns for name in rule.names)
            rules.append(_repeated(rule._replace(paths=paths, names=named), len(patterns)))
    without = leaves.keys() - {path for rule in rules for path in rule.paths}
    if without:
        raise ExportError(
            f"torch_names: {', '.join(sorted(without))} have no module; expected a name for the layer of each"
        )
    return rules


def _torch_rules(path: str, leaves: Mapping[str, Any], given: Any) -> list[Rule]:
    """The rules of one layer, by its own leaves and PyTorch's own names, and by what was given for it."""
    names, as_ours = set(leaves), isinstance(given, Conv1D)
    channels = given.channels if isinstance(given, Flattened) else None
    weights = {f"{part}/w" for part in (*_INWARD, "out")}
    attends = names >= weights and all(leaves[name].ndim == 2 for name in weights)
    is_dense = names in ({"w"}, {"w", "b"}) and leaves["w"].ndim == 2
    if (as_ours and not (is_dense or attends or names == {""})) or (channels is not None and not is_dense):
        raise ExportError(
            f"torch_names: {path} is given {type(given).__name__} and has the leaves {', '.join(sorted(names))}; "
            f"expected those of a dense layer{' or attention' if as_ours else ''}: give the module's name alone"
        )
    if attends:
        return _attention_rules(path, leaves, as_ours)
    same = {"b": "bias", "scale": "weight", "bias": "bias", "table": "weight", "": "weight"}
    rules = [Rule((name,), (same[name],)) for name in sorted(names & same.keys())]
    if names in ({""}, {"table"}) or (names and names <= {"scale", "bias"}):
        return rules
    if names == {"mean", "var"}:
        tensors = ("running_mean", "running_var", "num_batches_tracked")
        return [Rule(("mean", "var"), tensors, lambda m, v: (m, v, np.zeros((), np.int64)), lambda m, v, _: (m, v))]
    if is_dense and channels is not None:
        (size, units), rows = leaves["w"].shape, leaves["w"].shape[0] // max(1, channels)
        if channels < 1 or size % channels:
            raise ExportError(f"torch_names: {path} has {size} features in; expected a multiple of {channels} channels")
        flat = lambda w: (w.reshape(rows, channels, units).transpose(2, 1, 0).reshape(units, size),)  # noqa: E731
        back = lambda w: (w.reshape(units, channels, rows).transpose(2, 1, 0).reshape(size, units),)  # noqa: E731
        return [*rules, Rule(("w",), ("weight",), flat, back)]
    if is_dense and as_ours:
        return [*rules, Rule(("w",), ("weight",))]
    if names in ({"w"}, {"w", "b"}) and leaves["w"].ndim > 1:  # (*kernel, I, O) and (O, I, *kernel)
        spatial = tuple(range(leaves["w"].ndim - 2))
        axes = (len(spatial) + 1, len(spatial), *spatial)
        return [*rules, _turned("w", "weight", axes)]
    gates = leaves["recurrent/w"].shape[1] // leaves["recurrent/w"].shape[0] if "recurrent/w" in names else 0
    if gates and names >= {"input/w"}:
        weights = [_turned("input/w", "weight_ih", (1, 0)), _turned("recurrent/w", "weight_hh", (1, 0))]
        rest, biases = names - {"input/w", "recurrent/w"}, ("bias_ih", "bias_hh")
        if not rest:
            return weights
        if rest == {"b"} and gates in (1, 4):
            return [*weights, Rule(("b",), biases, lambda b: (b, np.zeros_like(b)), lambda b, c: (b + c,))]
        if rest == {"b", "recurrent/b"} and gates == 3:
            return [*weights, Rule(("b", "recurrent/b"), biases, _gru_biases, _from_gru_biases)]
    raise ExportError(
        f"torch_names: {path} has the leaves {', '.join(sorted(names))}; expected those of dense, conv, attention, "
        "embedding, a normalization, rnn, lstm or gru(reset_after=True): name its children, or write a Rule"
    )


_INWARD = ("query", "key", "value")


def _attention_rules(path: str, leaves: Mapping[str, Any], as_ours: bool) -> list[Rule]:
    """Three projections of one width as one tensor, and the outward one."""
    shapes = {tuple(leaves[f"{part}/w"].shape) for part in _INWARD}
    if len(shapes) > 1:
        raise ExportError(
            f"torch_names: {path} has inward projections of shapes {sorted(shapes)}; expected one, since PyTorch holds "
            "them as one tensor: write a Rule"
        )
    inner, outer = (tuple(leaves[name].shape) for name in ("query/w", "out/w"))
    if not as_ours and len({*inner, *outer}) > 1:
        raise ExportError(
            f"torch_names: {path} has weights of shapes {inner} inward and {outer} outward; expected square ones, as "
            "nn.MultiheadAttention has: write a Rule"
        )
    axis = 1 if as_ours else 0
    turn = (lambda w: w) if as_ours else (lambda w: w.T)
    inward, outward = ("c_attn.", "c_proj.") if as_ours else ("in_proj_", "out_proj.")
    rules = [
        Rule(
            tuple(f"{part}/w" for part in _INWARD),
            (f"{inward}weight",),
            lambda *ws: (np.concatenate([turn(w) for w in ws], axis),),
            lambda w: tuple(turn(part) for part in np.split(w, 3, axis)),
        ),
        Rule(("out/w",), (f"{outward}weight",), lambda w: (turn(w),), lambda w: (turn(w),)),
    ]
    if "query/b" in leaves:
        biases = tuple(f"{part}/b" for part in _INWARD)
        rules.append(Rule(biases, (f"{inward}bias",), lambda *bs: (np.concatenate(bs),), lambda b: (*np.split(b, 3),)))
        rules.append(Rule(("out/b",), (f"{outward}bias",)))
    return rules


def _turned(leaf: str, tensor: str, axes: tuple[int, ...]) -> Rule:
    back = tuple(np.argsort(axes))
    return Rule((leaf,), (tensor,), lambda w: (w.transpose(axes),), lambda w: (w.transpose(back),))


def _gru_biases(b, c):
    """Of fnet's b (3 H) and c (H), which stands inside the product with the reset gate: PyTorch's two of (3 H)."""
    return b, np.concatenate([np.zeros(2 * len(c), c.dtype), c])


def _from_gru_biases(first, second):
    units = len(second) // 3
    return np.concatenate([first[: 2 * units] + second[: 2 * units], first[2 * units :]]), second[2 * units :]


def _repeated(rule: Rule, times: int) -> Rule:
    """The same tensors under as many names."""
    if times == 1:
        return rule
    size = len(rule.names) // times

    def restore(*tensors):
        for i, tensor in enumerate(tensors):
            if tensor.tobytes() != tensors[i % size].tobytes():
                raise ExportError(
                    f"{rule.names[i]} and {rule.names[i % size]} differ; expected one tensor under both names, which "
                    f"is {', '.join(rule.paths)}"
                )
        return rule.restore(*tensors[:size])

    return rule._replace(store=lambda *leaves: tuple(rule.store(*leaves)) * times, restore=restore)


# --- inference -------------------------------------------------------------------------------------------------------


class Inference(NamedTuple):
    """A model's forward as a function of its inputs alone, called like the function it holds."""

    call: Callable[[PyTree], PyTree]
    platforms: tuple[str, ...]  # that it was compiled for, such as cpu, cuda, tpu
    inputs: str  # what it takes, such as float32[b, 784]

    def __call__(self, x: PyTree) -> PyTree:
        return self.call(x)


def export_inference(
    model: Layer,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    path: str | Path,
    *,
    any_batch: bool = False,
    platforms: str | Sequence[str] | None = None,
) -> Inference:
    """Write ``apply(model, params, state, x)`` to one file, as a program and its weights; returns what it reads back.

    The program takes inputs of the shapes and dtypes of ``x``; with ``any_batch`` their first axis may have any size.
    ``platforms`` are those it can run on, such as ``("cpu", "cuda")``, by default the one at hand, which must be among
    them: before the file is put in its place, what was read back from it is run on ``x``, and must give the bits of
    the model's own compiled forward. The weights are arguments of the program, since XLA rounds otherwise where they
    are constants; the file is safetensors', with the weights under their paths.

    Raises ExportError for a file that exists, a model that cannot be exported like this, and bits that differ.
    """
    _require_flatbuffers()
    _require_new(path)
    here = jax.export.default_export_platform()
    if platforms is not None:
        platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
        if here not in platforms:
            raise ExportError(f"platforms are {', '.join(platforms)}; expected {here} among them, where it is checked")
        if unknown := [name for name in platforms if name not in (*PLATFORMS, here)]:
            raise ExportError(
                f"platforms are {', '.join(platforms)}; expected {', '.join(PLATFORMS)}, not {unknown[0]}"
            )
    weights = {"params": params, "state": state}
    arrays, structure = to_tensors(weights), jax.tree.structure(weights)

    def forward(leaves, x):
        tree = jax.tree.unflatten(structure, leaves)
        return apply(model, tree["params"], tree["state"], x)

    x = jax.tree.map(jnp.asarray, x)
    batch = jax.export.symbolic_shape("b") if any_batch else ()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*batch, *leaf.shape[len(batch) :]), leaf.dtype), x)
    try:
        exported = jax.export.export(jax.jit(forward), platforms=platforms)(jax.tree.leaves(weights), shapes)
        program = exported.serialize()
    except Exception as error:  # of the model's own code, of jax, of XLA
        remedy = "with any_batch=False it is for inputs of the size of x" if any_batch else "see the error above"
        raise ExportError(f"{model.name} cannot be exported ({first_line(error)}); {remedy}") from error
    arrays = {**arrays, "program": np.frombuffer(program, np.uint8)}
    about = {"fnet_inference": FORMAT, "order": json.dumps(list(arrays)), "sha256": _digest(arrays)}
    with _whole(path) as part:
        part.write_bytes(_serialized(arrays, about))
        inference = _inference(part, path)
        compiled = jax.jit(lambda params, state, x: apply(model, params, state, x))
        if _bits(compiled(params, state, x)) != _bits(inference(x)):
            raise ExportError(
                f"{model.name}: what was read back from {path} gives other bits than its compiled forward; expected "
                "the same: report it"
            )
    return inference


def load_inference(path: str | Path) -> Inference:
    """What `export_inference` wrote: ``load_inference(path)(x)`` are the outputs.

    It is compiled at its first call for inputs of one shape. Raises ExportError for a file that is none or is not as
    it was written, and one for other platforms; the call raises it for inputs that do not fit.
    """
    return _inference(path, path)


def _inference(path: str | Path, name: str | Path) -> Inference:
    """What is in the file at ``path``; errors call it ``name``."""
    _require_flatbuffers()
    arrays, about = _read(path)
    if about.get("fnet_inference") != FORMAT:
        raise ExportError(
            f"{name} holds {', '.join(list(arrays)[:4]) or 'nothing'} and has format {about.get('fnet_inference')}; "
            f"expected format {FORMAT}: give a file that export_inference of this fnet wrote"
        )
    if (found := _digest(arrays)) != (expected := about.get("sha256", "none")):
        raise ExportError(
            f"{name} is not what was written: expected SHA-256 {expected[:12]}…, found {found[:12]}…; export it again"
        )
    try:
        *weights, program = (arrays[name] for name in json.loads(about["order"]))
        exported = jax.export.deserialize(bytearray(program.tobytes()))
    except Exception as error:  # of flatbuffers, of jax
        raise ExportError(
            f"{name} cannot be read by this jax, {jax.__version__} ({first_line(error)}); expected one that is not "
            "older than the jax that wrote it: install that, or export again"
        ) from error
    if (here := jax.export.default_export_platform()) not in exported.platforms:
        raise ExportError(
            f"{name} is for {', '.join(exported.platforms)}; expected {here}, which is here: export it with "
            f"platforms=({', '.join(map(repr, (*exported.platforms, here)))})"
        )
    if wide := [aval for aval in exported.in_avals if aval.dtype != canonical(aval.dtype, allow_extended_dtype=True)]:
        raise ExportError(
            f"{name} was exported with 64 bits ({wide[0].str_short()}), which are off here; expected them on: call "
            "jax.config.update('jax_enable_x64', True) first"
        )
    weights, run = [jnp.array(leaf) for leaf in weights], jax.jit(exported.call)
    takes = ", ".join(aval.str_short() for aval in exported.in_avals[len(weights) :])

    def call(x: PyTree) -> PyTree:
        try:
            return run(weights, x)
        except (ValueError, TypeError) as error:
            leaves = [leaf if isinstance(leaf, jax.Array) else _as_jax(leaf) for leaf in jax.tree.leaves(x)]
            given = ", ".join(map(_kind, leaves[:4])) or "nothing"
            given += f" and {len(leaves) - 4} more" if len(leaves) > 4 else ""
            raise ExportError(f"{name} takes {takes}, found {given} ({first_line(error)})") from error

    return Inference(call, exported.platforms, takes)


# --- what they share -------------------------------------------------------------------------------------------------


def _rules(like: PyTree, names: Names) -> list[Rule]:
    """The name map as rules that hold every leaf once, and every name once."""
    paths = [path for path, _ in _leaves(like)]
    if names is None or isinstance(names, Mapping):
        given = names or {}
        rules = [Rule((path,), (given.get(path, path),)) for path in paths]
        taken = [*paths, *given.keys() - set(paths)]
    else:
        rules = list(names)
        taken = [path for rule in rules for path in rule.paths]
    stored = [name for rule in rules for name in rule.names]
    faults = [f"the leaf {path} has no name" for path in paths if path not in taken]
    faults += [f"there is no leaf {path}" for path in dict.fromkeys(taken) if path not in paths]
    faults += [f"the leaf {path} is named {n} times" for path, n in Counter(taken).items() if n > 1]
    faults += [f"the name {name} is given {n} times" for name, n in Counter(stored).items() if n > 1]
    if faults:
        raise ExportError(
            f"the name map does not fit the tree: {'; '.join(faults)}; expected every leaf once, under a name of its "
            "own"
        )
    return rules


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves by path, as arrays or shapes."""
    leaves = [(path, leaf if hasattr(leaf, "dtype") else _as_jax(leaf)) for path, leaf in named_leaves(tree)]
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, np.number) and leaf.dtype != bool:
            raise ExportError(
                f"{path} is of dtype {leaf.dtype}; expected numbers: leave it out (of a key, its key_data)"
            )
    return leaves


def _as_jax(leaf) -> np.ndarray:
    """A number of Python or an array of NumPy in the dtype that jax gives it."""
    array = np.asarray(leaf)
    with contextlib.suppress(TypeError, OverflowError):  # no number, or an integer of more bits
        return np.asarray(leaf, canonical(array.dtype))
    return array


def _stored(leaves: Arrays, rules: Sequence[Rule]) -> Arrays:
    stored = {}
    for rule in rules:
        made = _paired(rule, "store", rule.names, rule.store(*(leaves[path] for path in rule.paths)))
        stored |= {name: np.asarray(tensor) for name, tensor in made.items()}
    return stored


def _paired(rule: Rule, what: str, keys: tuple[str, ...], made) -> dict[str, Any]:
    """What a rule made, by name."""
    if not isinstance(made, tuple | list) or len(made) != len(keys):
        found = f"{len(made)} arrays" if isinstance(made, tuple | list) else type(made).__name__
        raise ExportError(
            f"the Rule of {', '.join(rule.paths)}: {what} returned {found}; expected a tuple of {len(keys)}, for "
            f"{', '.join(keys)}: mend the Rule"
        )
    return dict(zip(keys, made, strict=True))


def _array(name: str, tensor) -> np.ndarray:
    if str(getattr(tensor, "device", "")) == "meta":
        raise ExportError(
            f"{name} is on PyTorch's device meta, which holds no numbers; expected a tensor with numbers: load the "
            "module's weights first"
        )
    if np.ma.is_masked(tensor):
        raise ExportError(
            f"{name} has {int(np.ma.getmaskarray(tensor).sum())} masked values; expected none, since a mask would be "
            "dropped: fill them, tensor.filled(0)"
        )
    try:
        return np.asarray(tensor)
    except (TypeError, ValueError, RuntimeError) as error:  # of torch, for bfloat16 and where it computes gradients
        raise ExportError(
            f"{name} is no array to NumPy ({first_line(error)}); expected one: of PyTorch's write a safetensors file, "
            "which load_weights reads in any dtype, or give tensor.detach().float()"
        ) from error


def _kind(array) -> str:
    return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"


def _serialized(arrays: Arrays, about: dict[str, str] | None = None) -> bytes:
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ExportError(
                f"{name} is of dtype {array.dtype}, which safetensors does not write and read; expected one of "
                f"{', '.join(DTYPES)}: convert it"
            )
    if "__metadata__" in arrays:
        raise ExportError(
            "a leaf is named __metadata__, which is what safetensors calls its own; expected another name: give it one "
            "in the name map"
        )
    # safetensors writes an array's memory as it lies, whatever its strides
    return _safetensors().save({name: np.require(array, requirements="C") for name, array in arrays.items()}, about)


def _read(path: str | Path) -> tuple[Arrays, dict[str, str]]:
    """The tensors of a safetensors file, and what it says of itself."""
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, AttributeError) as error:  # the last for dtypes that NumPy does not have
        raise ExportError(f"{path} cannot be read ({first_line(error)}); expected a whole safetensors file") from error


def _digest(arrays: Arrays) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{_kind(array)};".encode() + array.tobytes())
    return digest.hexdigest()


def _bits(tree: PyTree):
    return jax.tree.structure(tree), [(_kind(leaf), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def _require_new(path: str | Path) -> None:
    if Path(path).exists():
        raise ExportError(f"{path} exists already and is left as it is; expected a file that does not: name another")


@contextlib.contextmanager
def _whole(path: str | Path):
    """`whole_file` with this module's error."""
    try:
        with whole_file(path) as part:
            yield part
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written ({error.strerror or error}); expected {Path(path).parent} to be a folder with "
            "room that can be"
        ) from error


def _safetensors():
    need("a file of weights", "safetensors")
    import safetensors.numpy

    return safetensors.numpy


def _require_flatbuffers() -> None:
    need("exported inference", "flatbuffers")  # by which jax.export writes
