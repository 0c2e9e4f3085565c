"""Intermediates by name: `tap` names a value inside any function, `intermediate_gradients` returns its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fnet.core.interpret import Place, evaluate, is_array, is_float, walk
from fnet.core.jax_insides import bind
from fnet.types import PyTree

PREFIX = "fnet.tap:"


def tap(name: str, value: PyTree) -> PyTree:
    """``value`` itself, under a name that `intermediate_gradients` and `fnet.check_gradients` know.

    The compiled program is the same with and without it. Of a pytree every floating leaf is named ``name/path``.
    Raises TypeError where the name is no text, ValueError where it is empty.

    >>> jax.jit(lambda x: tap("square", x * x))(3.0)
    Array(9., dtype=float32, weak_type=True)
    """
    if not isinstance(name, str):
        raise TypeError(f"tap: expected a name and then the value, got the name {name!r}: tap('logits', logits)")
    if not name:
        raise ValueError("tap: the name is empty; give the intermediate a name of its own")

    def named(path, leaf):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        inner = jax.tree_util.keystr(path, simple=True, separator="/")
        return checkpoint_name(leaf, PREFIX + (f"{name}/{inner}" if inner else name))

    return jax.tree_util.tree_map_with_path(named, value)


def intermediate_gradients(f: Callable, params: PyTree, *args, has_aux: bool = False) -> dict[str, jax.Array]:
    """The gradient of ``f(params, *args)``, a scalar, by every value that is tapped within, by name.

    The names stand in the order of the backward pass: the last tap first. The gradient of a tap inside a scan has the
    steps along its first axis. Works within `jax.jit` and under `jax.vmap`; compile it where it is called often. With
    ``has_aux`` the function returns ``scalar, aux``. A tap inside a function with a custom rule is differentiated
    without that rule.

    Raises ValueError where nothing is tapped, where a name is used twice, where a tap stands inside a while loop
    (through which there is no backward pass), and where the result is no scalar.

    >>> def f(w, x):
    ...     logits = tap("logits", x * w)
    ...     return (logits**2).sum()
    >>> intermediate_gradients(f, jnp.array([1.0, 2.0]), 3.0)
    {'logits': Array([ 6., 12.], dtype=float32)}
    """
    tapped = perturbed(f, params, *args, has_aux=has_aux)
    grads = jax.grad(tapped.value)(tapped.zeros, tapped.arrays)
    return dict(reversed(list(zip(tapped.names, grads, strict=True))))


class Tapped(NamedTuple):
    """A function of offsets that are added to its tapped values, in the order of the forward."""

    names: tuple[str, ...]
    value: Callable  # (offsets, arrays) -> scalar; the derivative by an offset is the tapped value's gradient
    zeros: list[jax.Array]
    lengths: list[tuple[int, ...]]  # of the scans that each stands in, the first axes of its offset
    arrays: list  # those among the leaves of params and args


def perturbed(f: Callable, params: PyTree, *args, has_aux: bool = False) -> Tapped:
    """``f(params, *args)`` with an offset for every tapped value; errors as `intermediate_gradients`."""
    leaves, tree = jax.tree.flatten((params, args))
    leaves = [jnp.asarray(leaf) if isinstance(leaf, float) else leaf for leaf in leaves]
    at = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def flat(*arrays):
        given = dict(zip(at, arrays, strict=True))
        p, a = jax.tree.unflatten(tree, [given.get(i, leaf) for i, leaf in enumerate(leaves)])
        value = f(p, *a)
        return value[0] if has_aux else value

    arrays = [leaves[i] for i in at]
    closed = jax.make_jaxpr(flat)(*arrays)
    if len(closed.out_avals) != 1 or closed.out_avals[0].shape != ():
        shapes = [aval.shape for aval in closed.out_avals]
        raise ValueError(f"intermediate_gradients: the function returned {shapes}; expected one scalar, the loss")
    taps = find_taps(closed)
    if not taps:
        raise ValueError("intermediate_gradients: nothing is tapped; write x = fnet.tap('name', x) in the function")
    sites = [place.site for place in taps]
    openings = {site[:k] for site in sites for k in range(1, len(site))}

    def value(offsets, arrays):
        def rule(site, eqn, inputs, extras):
            return bind(eqn, [inputs[0] + extras[site]]) if site in extras else None

        opened = lambda site, eqn: site in openings  # noqa: E731
        extras = dict(zip(sites, offsets, strict=True))
        return evaluate(closed, arrays, rule=rule, extras=extras, opened=opened)[0][0]

    avals: list[Any] = [(place.lengths, place.eqn.outvars[0].aval) for place in taps]
    zeros = [jnp.zeros((*lengths, *aval.shape), aval.dtype) for lengths, aval in avals]
    names = tuple(place.eqn.params["name"].removeprefix(PREFIX) for place in taps)
    return Tapped(names, value, zeros, [place.lengths for place in taps], arrays)


def find_taps(closed) -> list[Place]:
    """The taps of a program in the order of its forward; ValueError where a name is used twice or in a while loop."""
    taps, seen = [], set()
    for place in walk(closed.jaxpr):
        name = str(place.eqn.params.get("name", "")) if place.eqn.primitive.name == "name" else ""
        if not name.startswith(PREFIX) or not is_float(place.eqn.outvars[0].aval):
            continue
        shown = name.removeprefix(PREFIX)
        if place.in_while:
            raise ValueError(
                f"tap {shown!r} stands inside a while loop, through which nothing is differentiated: use scan"
            )
        if shown in seen:
            raise ValueError(f"two intermediates are tapped as {shown!r}; give each its own name")
        seen.add(shown)
        taps.append(place)
    return taps
