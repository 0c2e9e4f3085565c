"""What is required of arguments, and how messages show what was given instead."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.types import Layer, LayerError, Loss, Optimizer, PyTree, Schedule, TrainState, Transform


def require(condition, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds; one on traced numbers is not checked."""
    if not isinstance(condition, Tracer) and not condition:
        raise ValueError(message)


def is_whole(number, least=1) -> bool:
    """Whether this is a whole number of Python or NumPy, at least ``least``; True and False are none."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool) and bool(number >= least)


def described(tree: PyTree) -> str:
    """What was given, as a message shows it: a layer by its name, a tree with the dtypes and shapes of its arrays."""
    if isinstance(tree, Layer):
        return f"the layer {tree.name}"
    if isinstance(tree, Loss | Optimizer | Schedule | Transform | TrainState):
        return f"{'an' if isinstance(tree, Optimizer) else 'a'} {type(tree).__name__}"
    if callable(tree):
        return called(tree)
    shown = repr(jax.tree.map(lambda leaf: _Shown(leaf) if hasattr(leaf, "shape") else leaf, tree))
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


class _Shown:
    """An array in a message: ``float32[3, 4]``."""

    def __init__(self, leaf):
        self.leaf = leaf

    def __repr__(self):
        return f"{self.leaf.dtype}{list(self.leaf.shape)}"


def takes(function, *args, **kwargs) -> bool:
    """Whether a function can be called with these arguments, as far as Python knows its signature."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # of a function of C none is known
        return True
    return True


def called(function) -> str:
    """A function as a message names it: ``the function tanh of jax.numpy``."""
    name, home = getattr(function, "__name__", type(function).__name__), getattr(function, "__module__", None) or ""
    home = home.split("._")[0]  # jax.nn.relu says that it is of jax._src.nn.functions
    return f"the function {name}" + (f" of {home}" if home and not home.startswith(("__main__", "fnet")) else "")


def require_layer(who: str, given) -> None:
    """Raise TypeError unless this is a `Layer`, with the remedy for a function that stands in its place."""
    if isinstance(given, Layer):
        return
    if not callable(given) or isinstance(given, tuple):
        raise TypeError(f"{who} is {described(given)}; expected a Layer, such as fnet.dense(10)")
    from fnet import layers  # for the message alone

    name = getattr(given, "__name__", "")
    if (getattr(given, "__module__", None) or "").startswith("fnet."):
        raise TypeError(f"{who} is {called(given)}; expected the Layer that it makes: call it, {name}(...)")
    own = f"fnet.layers.{name}()" if name in layers.__all__ else "fnet.layers.stateless(name, init, forward, backward)"
    raise TypeError(f"{who} is {called(given)}; expected a Layer, with its backward by hand: {own}")


def refuse_train_state(who: str, **given) -> None:
    """Raise TypeError where a whole `TrainState` stands in the place of its parameters or of the model's state."""
    for name, tree in given.items():
        if isinstance(tree, TrainState):
            raise TypeError(
                f"{who}: {name} is a TrainState; expected the parameters and the model's state that it holds, apart: "
                "ts.params, ts.state (of best = fnet.best_weights(ts), best.params, best.state)"
            )


def require_optimizer(who: str, given) -> None:
    """Raise TypeError unless this is an `Optimizer`, with the remedy for a function that makes one."""
    if isinstance(given, Optimizer):
        return
    if callable(given) and (getattr(given, "__module__", None) or "").startswith("fnet."):
        raise TypeError(
            f"{who} is {called(given)}; expected the Optimizer that it makes: call it, {given.__name__}(...)"
        )
    raise TypeError(f"{who} is {described(given)}; expected an Optimizer, such as fnet.adam(1e-3)")


def require_state(who: str, opt_state, kind: type) -> None:
    """Raise TypeError unless this is the state that the optimizer's ``init`` makes."""
    if not isinstance(opt_state, kind):
        given = None if opt_state is None else f"a {type(opt_state).__name__}"
        raise TypeError(
            f"{who}: opt_state is {given}; expected the {kind.__name__} that this optimizer's "
            "init(params) made, or the one that its last update returned"
        )


def refuse_masked(subject: str, array, remedy: str, error: type[ValueError] = ValueError) -> None:
    """Raise ``error`` where values are masked: whoever made a plain array of it would drop the mask."""
    if np.ma.is_masked(array):
        raise error(
            f"{subject} {int(np.ma.getmaskarray(array).sum())} masked values; expected none, since a mask would be "
            f"dropped: fill them, {remedy}"
        )


def require_key(who: str, key) -> None:
    """Raise TypeError unless this is one random key."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and jnp.shape(key) == ()
    if not typed and not (dtype == jnp.uint32 and len(key.shape) == 1):
        given = f"{dtype}{list(key.shape)}" if hasattr(key, "shape") else f"{key!r:.60}"
        number = f"({key})" if is_whole(key, 0) else "(0)"
        raise TypeError(f"{who}: key is {given}; expected a random key: jax.random.key{number}")


def require_counts(who: str, **counts) -> None:
    """Raise ValueError unless each is None or a whole number of at least 1."""
    for name, count in counts.items():
        if count is not None and not is_whole(count):
            what = f"{count}; expected" if is_whole(count, count) else f"{count!r}; expected a whole number of"
            raise ValueError(f"{who}: {name} = {what} at least 1")


def require_numbers(who: str, remedy: str = "give one number", **numbers) -> None:
    """ValueError unless each is one number, which may be traced."""
    for name, number in numbers.items():
        shape = np.shape(number)
        require(shape == (), f"{who}: {name} has shape {shape}; expected one number: {remedy}")


def require_array(x) -> None:
    """Raise `LayerError` unless ``x`` is one array (or a shape)."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        parts = [f"{a.dtype}{list(a.shape)}" if hasattr(a, "shape") else repr(a)[:40] for a in jax.tree.leaves(x)]
        raise LayerError(
            f"expected one array, got a {type(x).__name__} of {', '.join(parts) or 'nothing'}: take its parts apart "
            "before this layer (a mask is boolean; a carry or a memory goes to the layer that reads it)"
        )


def require_params(params, **shapes: tuple) -> None:
    """Raise `LayerError` unless ``params`` is a dict of these names and shapes, in which None stands for any size."""

    def fits(name, shape):
        sizes = getattr(params[name], "shape", None)
        return sizes is not None and len(sizes) == len(shape) and all(map(lambda w, s: w in (None, s), shape, sizes))

    named = isinstance(params, dict) and set(params) == set(shapes)
    if not named or not all(fits(name, shape) for name, shape in shapes.items()):
        wanted = ", ".join(f"{name} {shape}".replace("None", "any") for name, shape in shapes.items())
        leaves = params.items() if isinstance(params, dict) else ()
        given = ", ".join(f"{name} {getattr(leaf, 'shape', leaf)}" for name, leaf in leaves) or described(params)
        raise LayerError(f"expected params {wanted or 'of no leaf'}, got {given}: pass what init returned")
