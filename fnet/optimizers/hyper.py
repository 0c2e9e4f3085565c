"""Changing an optimizer's numbers in its state, by name, without compiling anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnet.optimizers.common import check_between, check_counts
from fnet.optimizers.schedules import check_numbers


def set_hyper(opt_state, **changes) -> Any:
    """The state with some of its numbers replaced, in their dtypes and shapes: what is compiled stays compiled.

    A schedule's numbers are given as a dict that may leave some out: ``set_hyper(s, learning_rate={"peak": 0.1})``. In
    a composed state a number is called by its name where only one has it, or by its path:
    ``set_hyper(s, **{"*/b/learning_rate": 0.1})`` for the group of that pattern, ``"averaged/decay"`` for a wrapper's.
    Where two have one path, as in a chain within a chain, change the state within: ``s._replace(optimizer=set_hyper(
    s.optimizer, ...))``. ``rate`` stays the rate last applied. Raises ValueError for an unknown or ambiguous name, with
    the list of names, and for a number on the host out of range (of a schedule of one's own: that is NaN); TypeError
    for a number where a schedule has a dict and the reverse.

    >>> from fnet.optimizers import adam
    >>> opt_state = set_hyper(adam(1e-3).init({"w": jnp.zeros(2)}), learning_rate=0.5, b1=0.8)
    >>> print(opt_state.hyper.learning_rate, opt_state.hyper.b1)
    0.5 0.8
    """
    known = []

    def collect(path, hyper):
        known.extend((*path, name) for name, value in hyper._asdict().items() if value is not None)
        return hyper

    _each_hyper(opt_state, (), collect)
    names = ["/".join(path) for path in known]
    for name, new in changes.items():
        found = [i for i, full in enumerate(names) if full == name] or [
            i for i, full in enumerate(names) if full.endswith(f"/{name}")
        ]
        if len(found) != 1:
            problem = (
                f"several hyperparameters are called {name!r}" if found else f"no hyperparameter is called {name!r}"
            )
            raise ValueError(f"set_hyper: {problem}; there are {', '.join(names)}")
        *place, last = known[found[0]]

        def change(path, hyper, place=tuple(place), last=last, new=new):
            if path != place:
                return hyper
            check = _CHECKS.get(f"{type(hyper).__name__}.{last}") or _CHECKS.get(last, check_numbers)
            return hyper._replace(**{last: _changed(last, getattr(hyper, last), new, check)})

        opt_state = _each_hyper(opt_state, (), change)
    return opt_state


def _each_hyper(node, path: tuple[str, ...], change: Callable) -> Any:
    """The state with ``change(path, hyper) -> hyper`` in the place of each ``hyper`` in it."""
    if isinstance(node, dict):
        return {name: _each_hyper(child, (*path, name), change) for name, child in node.items()}
    fields = {}
    if getattr(node, "hyper", None) is not None and "hyper" in node._fields:
        # a wrapper's own stand under its name, so that averaged's decay is not the decay of the momentum within
        own = (type(node).__name__.removesuffix("State").lower(),) if "optimizer" in node._fields else ()
        fields["hyper"] = change((*path, *own), node.hyper)
    for name in ("transforms", "groups", "optimizer"):
        if name in getattr(node, "_fields", ()):
            fields[name] = _each_hyper(getattr(node, name), path, change)
    return node._replace(**fields) if fields else node


_positive = partial(check_numbers, positive=True)
_CHECKS = {
    **dict.fromkeys(("decay", "momentum", "b1", "b2", "rho"), partial(check_numbers, below=1)),
    **dict.fromkeys(("backoff", "factor"), partial(_positive, below=1)),
    **dict.fromkeys(("limit", "growth", "clip", "decay_power"), _positive),
    **dict.fromkeys(("AdadeltaHyper.eps", "AdafactorHyper.eps", "AdaptiveHyper.eps", "MuonHyper.eps"), _positive),
    **dict.fromkeys(("every", "window", "patience", "interval"), check_counts),
    **dict.fromkeys(("AveragedHyper.start", "cooldown"), partial(check_counts, least=0)),
    "slow_rate": partial(check_between, least=0, most=1),
    "threshold": partial(check_between, least=4, most=math.inf),
}
_SCHEDULED = {
    **dict.fromkeys(("rate", "start", "peak", "end", "warmup_steps", "factor"), check_numbers),
    **dict.fromkeys(("decay_rate", "decay_steps", "total_steps", "first_steps", "power", "updates"), _positive),
    **dict.fromkeys(("start_divisor", "end_divisor"), _positive),
    "rising": partial(check_numbers, below=1),
}


def _check_no_nan(who: str, **values) -> None:
    for name, value in values.items():
        if not isinstance(value, jax.Array) and value != value:
            raise ValueError(f"{who}: {name} = {value}; expected a number")


def _changed(name: str, old: Any, new: Any, check: Callable) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            if key not in old:
                raise ValueError(f"set_hyper: no number of {name} is called {key!r}; there are {', '.join(old)}")
        return old | {
            key: _changed(f"{name}[{key!r}]", old[key], number, _SCHEDULED.get(key, _check_no_nan))
            for key, number in new.items()
        }
    is_number = hasattr(old, "shape")  # else it is all that a schedule has
    fits = is_number or jax.tree.structure(old) == jax.tree.structure(new)
    if isinstance(old, dict) or isinstance(new, dict) or not fits:
        raise TypeError(f"set_hyper: {name} = {new!r}; expected what stands in the state: {old}")
    if not is_number:
        return jax.tree.map(lambda old, new: _changed(name, old, new, _check_no_nan), old, new)
    if np.shape(new) == ():
        check("set_hyper", **{name: new})
    if np.shape(new) not in ((), old.shape):
        raise ValueError(f"set_hyper: {name} has shape {np.shape(new)}; expected one number or shape {old.shape}")
    if np.shape(new) and not isinstance(new, jax.Array):
        for entry in np.ravel(new):
            check("set_hyper", **{name: entry})
    return jnp.broadcast_to(jnp.array(new, old.dtype), old.shape)
