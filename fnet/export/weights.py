"""Weights for other programs: the leaves of a tree as named tensors, and back.

    weights = {"params": params, "state": state}                    leaves by their paths, such as params/dense_0/w
    save_weights("mlp.safetensors", weights)
    weights = load_weights("mlp.safetensors", like=weights)

``state`` holds statistics such as the running means of `batch_norm`: without them the model computes other numbers.
A *name map* is None (the paths themselves), a mapping of paths to names, or a list of `Rule`s, such as
`fnet.export.torch_names` makes one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype as canonical

from fnet.core.checks import refuse_masked
from fnet.core.files import first_line
from fnet.core.numerics import is_floating_dtype
from fnet.core.trees import by_path, named_leaves
from fnet.export.files import Arrays, ExportError, kind, read_tensors, require_new, serialized, whole_export
from fnet.types import PyTree


class Rule(NamedTuple):
    """How some leaves of a tree are stored: ``store(*leaves)`` are the tensors, and ``restore(*tensors)`` the leaves.

    Both take and return tuples of NumPy arrays. ``Rule(("dense_0/w",), ("fc.weight",), lambda w: (w.T,), lambda w:
    (w.T,))`` transposes.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    store: Callable[..., tuple] = lambda *leaves: leaves
    restore: Callable[..., tuple] = lambda *tensors: tensors


Names = Mapping[str, str] | Sequence[Rule] | None


def save_weights(path: str | Path, params: PyTree, names: Names = None) -> None:
    """Write the leaves of any tree of arrays to a safetensors file, in their dtypes (float16 and bfloat16 too).

    Of a model give ``{"params": params, "state": state}``: `batch_norm`'s running means are in the state.
    Raises ExportError for a file that exists, for two leaves of one name, for a name map that does not fit, and for
    what safetensors cannot hold. A Python number counts as the array that jax makes of it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(f"{folder}/a.safetensors", {"dense_0": {"w": jnp.ones((2, 3))}}, {"dense_0/w": "kernel"})
    ...     load_weights(f"{folder}/a.safetensors", {"dense_0": {"w": jnp.zeros((2, 3))}}, {"dense_0/w": "kernel"})
    {'dense_0': {'w': Array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)}}
    """
    require_new(path)
    with whole_export(path) as part:
        part.write_bytes(serialized(to_tensors(params, names)))


def load_weights(path: str | Path, like: PyTree, names: Names = None, *, dtype=None) -> PyTree:
    """The tree that `save_weights` wrote; ``like`` has its structure, shapes and dtypes (arrays or shapes).

    After ``params, state = fnet.init(model, key, x)`` it is ``like={"params": params, "state": state}``, and the
    tree's ``["params"]`` and ``["state"]`` go to `fnet.predict`.
    With a floating ``dtype`` the file's floating tensors are converted to it. Raises ExportError for a file that is not
    safetensors', and where it does not hold exactly the tensors of ``like``: it names those that are missing, not
    expected, or of another shape or dtype.
    """
    arrays, _ = read_tensors(path)
    return from_tensors(arrays, like, names, dtype=dtype, where=str(path))


def to_tensors(params: PyTree, names: Names = None) -> Arrays:
    """The leaves as NumPy arrays by name. PyTorch takes them as ``{name: torch.from_numpy(a) for name, a in ...}``."""
    # copies here and below, since whoever has the tensors may write into them
    return stored({path: np.array(leaf) for path, leaf in leaves_of(params)}, rules_of(params, names))


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
    shapes, rules = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves_of(like)}, rules_of(like, names)
    expected = stored(shapes, rules)
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
                f"{path} was restored as {kind(leaf)}; expected {kind(shapes[path])}: mend its Rule, or set "
                "jax_enable_x64 for 64 bits"
            )
    return made


def _fitting(
    where: str, expected: Arrays, found: Arrays, rules: Sequence[Rule], like: PyTree, names: list[str]
) -> tuple[PyTree, Taken]:
    """``like`` with the leaves of those rules whose tensors are all there and of their shapes and dtypes."""
    shapes, taken, kept, used, whys, dtypes = dict(leaves_of(like)), {}, {}, set(), [], set()
    if unknown := [path for path, leaf in shapes.items() if isinstance(leaf, jax.ShapeDtypeStruct)]:
        raise ExportError(
            f"from_tensors: {unknown[0]} is a shape, {kind(shapes[unknown[0]])}; expected arrays where partial=True, "
            "since leaves without a tensor stay as they are: give what init returned"
        )
    for rule in rules:
        missing = [name for name in rule.names if name not in found]
        other = [name for name in rule.names if name in found and kind(found[name]) != kind(expected[name])]
        if missing or other:
            name, remedy = (missing or other)[0], ""
            why = f"no tensor {name}" if missing else f"{name} is {kind(found[name])}, not {kind(expected[name])}"
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
    names = [name for name in {**expected, **found} if kind(expected.get(name)) != kind(found.get(name))]
    if not names:
        return
    lines = [f"{label(n)}: expected {kind(expected.get(n))}, found {kind(found.get(n))}" for n in names[:most]]
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


def rules_of(like: PyTree, names: Names) -> list[Rule]:
    """The name map as rules that hold every leaf once, and every name once."""
    paths = [path for path, _ in leaves_of(like)]
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


def leaves_of(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves by path, as arrays or shapes."""
    leaves = [(path, leaf if hasattr(leaf, "dtype") else as_jax(leaf)) for path, leaf in named_leaves(tree)]
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, np.number) and leaf.dtype != bool:
            raise ExportError(
                f"{path} is of dtype {leaf.dtype}; expected numbers: leave it out (of a key, its key_data)"
            )
    return leaves


def as_jax(leaf) -> np.ndarray:
    """A number of Python or an array of NumPy in the dtype that jax gives it."""
    array = np.asarray(leaf)
    with contextlib.suppress(TypeError, OverflowError):  # no number, or an integer of more bits
        return np.asarray(leaf, canonical(array.dtype))
    return array


def stored(leaves: Arrays, rules: Sequence[Rule]) -> Arrays:
    """The tensors of the leaves by name, as the rules store them."""
    tensors = {}
    for rule in rules:
        made = _paired(rule, "store", rule.names, rule.store(*(leaves[path] for path in rule.paths)))
        tensors |= {name: np.asarray(tensor) for name, tensor in made.items()}
    return tensors


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
    refuse_masked(f"{name} has", tensor, "tensor.filled(0)", ExportError)
    try:
        return np.asarray(tensor)
    except (TypeError, ValueError, RuntimeError) as error:  # of torch, for bfloat16 and where it computes gradients
        raise ExportError(
            f"{name} is no array to NumPy ({first_line(error)}); expected one: of PyTorch's write a safetensors file, "
            "which load_weights reads in any dtype, or give tensor.detach().float()"
        ) from error
