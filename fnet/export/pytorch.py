"""How PyTorch calls and lays out the leaves of fnet's layers.

names = torch_names(params, {"dense_0": "0.*", "dense_1": "2.*"})   as torch.nn.Sequential calls them
save_weights("torch.safetensors", params, names)                    and back with load_weights(..., names)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fnet.core.trees import named_leaves, stacked_axes
from fnet.export.files import ExportError
from fnet.export.weights import Rule
from fnet.types import PyTree


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


class ConvTranspose(NamedTuple):
    """For `torch_names`: the name of a transposed convolution, whose weights PyTorch has as ``(C, O/groups, *kernel)``.

    It is told and not guessed, since ours are named as those of a convolution and may have the same shape.
    """

    name: str


INWARD = ("query", "key", "value")  # projections of an attention


def torch_names(
    params: PyTree, modules: Mapping[str, str | Flattened | Conv1D | ConvTranspose | tuple[str, ...] | Rule]
) -> list[Rule]:
    """The name map between a tree and a ``state_dict`` of PyTorch, from the layers' paths and the modules' names.

    In a module's name ``*`` stands for its parameters', so ``"0.*"`` is ``0.weight`` and ``0.bias``:

    >>> import fnet, jax, jax.numpy as jnp
    >>> from fnet.export import to_tensors
    >>> params, _ = fnet.init(fnet.mlp(4, 2), jax.random.key(0), jnp.ones((1, 3)))
    >>> names = torch_names(params, {"dense_0": "0.*", "dense_1": "2.*"})
    >>> {name: tensor.shape for name, tensor in to_tensors(params, names).items()}
    {'0.bias': (4,), '0.weight': (4, 3), '2.bias': (2,), '2.weight': (2, 4)}

    What a layer is shows in its leaves; what is in none of them has to be the module's, such as the number of heads,
    their scale, ``eps`` and which form of gelu it is:

    - dense, conv: PyTorch has features out first, ``(O, I)`` and ``(O, I, *kernel)``. Behind `flatten` of a convolution
      with C channels give ``Flattened("3.*", C)``. Of conv_transpose give ``ConvTranspose("3.*")``.
    - rnn, lstm, gru (``reset_after``): ``"lstm.*_l0"``, with ``_l1`` for the second of PyTorch's layers and
      ``_l0_reverse`` for its second direction. PyTorch has two biases, which add: ours goes to the first and the
      second is 0 (of a gru it holds that within the reset gate's product); read back, they are added.
    - attention: ``"self_attn.*"`` of ``nn.MultiheadAttention``, also within ``nn.TransformerEncoderLayer``, whose other
      children are ``linear1``, ``linear2``, ``norm1`` and ``norm2``; of GPT-2 ``Conv1D("h.0.attn.*")``. The inward
      projections are one tensor there, so they have the same width, and PyTorch's have as many features in as out.
    - a dense layer that is GPT-2's ``Conv1D``: ``Conv1D("h.0.mlp.c_fc.*")``.
    - prelu: as it is, one slope (``shared``) or one a channel.
    - embedding, or a leaf by itself that is no ``w``: as it is. A table that PyTorch holds twice has two names,
      ``("embedding.*", "head.*")``; read back, they must agree.
    - a layer within `weight_norm` or `spectral_norm`: its weights by `fold_weight_norm` or `fold_spectral_norm` first.
    - normalizations; and their statistics, where the tree holds the model's state too, with ``num_batches_tracked`` 0.

    PyTorch takes images as (B, C, H, W). Give the path of any layer that is not in this list a `Rule` of your own.
    Raises ExportError for a path that is not there, for leaves of no such layer, for leaves that no module has, and for
    layers that `repeat` stacks.
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
        one = given.name if isinstance(given, Flattened | Conv1D | ConvTranspose) else given
        patterns = (one,) if isinstance(one, str) else one
        if not isinstance(patterns, tuple) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ExportError(
                f"torch_names: {path} is given {given!r}; expected a name such as 'fc.*', a tuple of names, "
                "Flattened(name, channels), Conv1D(name), ConvTranspose(name) or a Rule"
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
    weights = {f"{part}/w" for part in (*INWARD, "out")}
    attends = names >= weights and all(leaves[name].ndim == 2 for name in weights)
    weighs = names in ({"w"}, {"w", "b"})
    is_dense, is_conv = (weighs and leaves["w"].ndim == 2), (weighs and leaves["w"].ndim > 2)
    if isinstance(given, ConvTranspose) and not is_conv:
        raise ExportError(
            f"torch_names: {path} is given ConvTranspose and has the leaves {', '.join(sorted(names))}; expected those "
            "of a transposed convolution: give the module's name alone"
        )
    if (as_ours and not (is_dense or attends or names == {""})) or (channels is not None and not is_dense):
        raise ExportError(
            f"torch_names: {path} is given {type(given).__name__} and has the leaves {', '.join(sorted(names))}; "
            f"expected those of a dense layer{' or attention' if as_ours else ''}: give the module's name alone"
        )
    if attends:
        return _attention_rules(path, leaves, as_ours)
    same = {"b": "bias", "scale": "weight", "bias": "bias", "table": "weight", "slope": "weight", "": "weight"}
    rules = [Rule((name,), (same[name],)) for name in sorted(names & same.keys())]
    if names in ({""}, {"table"}, {"slope"}) or (names and names <= {"scale", "bias"}):
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
    if is_dense or is_conv:  # (*kernel, I, O) and (O, I, *kernel), of a transposed convolution (I, O, *kernel)
        *spatial, inward, outward = range(leaves["w"].ndim)
        first = (inward, outward) if isinstance(given, ConvTranspose) else (outward, inward)
        return [*rules, _turned("w", "weight", (*first, *spatial))]
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
        "embedding, prelu, a normalization, rnn, lstm or gru(reset_after=True): name its children, or write a Rule"
    )


def _attention_rules(path: str, leaves: Mapping[str, Any], as_ours: bool) -> list[Rule]:
    """Three projections of one width as one tensor, and the outward one."""
    shapes = {tuple(leaves[f"{part}/w"].shape) for part in INWARD}
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
            tuple(f"{part}/w" for part in INWARD),
            (f"{inward}weight",),
            lambda *ws: (np.concatenate([turn(w) for w in ws], axis),),
            lambda w: tuple(turn(part) for part in np.split(w, 3, axis)),
        ),
        Rule(("out/w",), (f"{outward}weight",), lambda w: (turn(w),), lambda w: (turn(w),)),
    ]
    if "query/b" in leaves:
        biases = tuple(f"{part}/b" for part in INWARD)
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
