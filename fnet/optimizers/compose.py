"""Optimizers made of others: transforms before one, groups of parameters, and none at all.

Each is again an `Optimizer`, and `fnet.set_hyper` finds a number within by its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.checks import require_optimizer, require_state
from fnet.core.trees import by_path, named_leaves
from fnet.optimizers.common import check_floats, check_like, count_on, shown_numbers
from fnet.optimizers.which import check_patterns
from fnet.optimizers.within import init_within, lines_of, of_optimizer, zero
from fnet.types import Optimizer, PyTree, Transform

# --- transforms before an optimizer ----------------------------------------------------------------------------------


class ChainState(NamedTuple):
    """State of a `chain`: that of each transform by name, and the optimizer's."""

    transforms: dict[str, Any]
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def chain(*parts: Transform | Optimizer) -> Optimizer:
    """The optimizer that comes last, on gradients that the transforms before it change one after another.

    ``chain(clip_by_global_norm(1.0), l2_decay(0.01, "*/w"), adam(1e-3))``. The transforms' states stand under their
    names, a second of one name as ``name_1``. Raises TypeError unless there are transforms and then one optimizer, and
    ValueError where that name is taken.

    >>> from fnet.optimizers import sgd
    >>> from fnet.optimizers.transforms import clip_by_value
    >>> optimizer = chain(clip_by_value(1.0), sgd(0.1))
    >>> params, opt_state = optimizer.update(jnp.array([5.0, 0.5]), optimizer.init(jnp.zeros(2)), jnp.zeros(2))
    >>> print(params, opt_state.transforms["clip_by_value"].hyper.limit)
    [-0.1  -0.05] 1.0
    """
    transforms = [part for part in parts[:-1] if isinstance(part, Transform)]
    if not parts or len(transforms) < len(parts) - 1 or not isinstance(parts[-1], Optimizer):
        given = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise TypeError(f"chain: got {given}; expected transforms and then one optimizer")
    optimizer, named, seen = parts[-1], {}, Counter()
    for transform in transforms:
        name = f"{transform.name}_{count}" if (count := seen[transform.name]) else transform.name
        if name in named:
            raise ValueError(f"chain: two transforms would be called {name!r}; give one of them another name")
        named[name] = transform
        seen[transform.name] += 1
    init_optimizer = init_within("chain", optimizer)

    def init(params):
        return ChainState({name: t.init(params) for name, t in named.items()}, init_optimizer(params))

    def update(grads, opt_state, params, *, value=None):
        require_state("chain", opt_state, ChainState)
        check_like(params, "gradient", grads)
        grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))  # whose copies are known
        states = {}
        for name, transform in named.items():
            grads, states[name] = transform.update(grads, opt_state.transforms[name], params)
        params, inner = optimizer.update(grads, opt_state.optimizer, params, value=value)
        return params, ChainState(states, inner)

    def about(params):
        lines = lines_of(optimizer, params)
        for name, transform in reversed(named.items()):
            numbers = shown_numbers(transform.init(params).hyper)
            what = " ".join([name, *(f"{key}={value}" for key, value in numbers.items())])
            touched = transform.touched(params) if transform.touched else [True] * len(lines)
            marked = zip(lines.items(), touched, strict=True)
            lines = {path: f"{what} → {line}" if on else line for (path, line), on in marked}
        return lines

    return Optimizer(init, update, about)


# --- groups of parameters --------------------------------------------------------------------------------------------


class GroupsState(NamedTuple):
    """State of `groups`: ``step``, and the state of each group's optimizer by its pattern."""

    step: jax.Array
    groups: dict[str, Any]

    @property
    def rate(self) -> dict[str, Any]:
        """The learning rate just applied, by pattern."""
        return {pattern: state.rate for pattern, state in self.groups.items()}


def groups(by_pattern: Mapping[str, Optimizer], default: Optimizer | None = None) -> Optimizer:
    """Another optimizer for each group of parameters: the first pattern that a leaf's path matches decides.

    ``groups({"embedding_0/*": frozen(), "*/b": sgd(0.1)}, default=adamw(1e-3))``. In a pattern ``*`` stands for
    anything, ``/`` too; the group of ``default`` is called ``default``. Each optimizer sees the whole tree, in which
    None stands for the leaves of the others, so a clipping by global norm within one is over its group. ``init`` raises
    ValueError for a pattern that matches nothing, one whose leaves all belong to patterns before it, and leaves of no
    group when there is no default.
    """
    if default is not None and "default" in by_pattern:
        raise ValueError("groups: a pattern is called 'default' and there is a default; call the pattern '*default'")
    if not isinstance(by_pattern, Mapping):
        raise TypeError(f"groups: got {by_pattern!r:.80}; expected a dict of path patterns and optimizers")
    members = {**by_pattern, **({} if default is None else {"default": default})}
    for pattern, member in members.items():
        if not isinstance(pattern, str):
            raise TypeError(f"groups: the pattern {pattern!r} is no text; expected one such as '*/w'")
        require_optimizer(f"groups: what belongs to {pattern!r}", member)

    def owners(tree) -> list[str]:
        """For each leaf the pattern that it belongs to."""
        check_patterns("groups", list(by_pattern), tree)
        found = []
        for path in by_path(tree):
            found.append(next((pattern for pattern in by_pattern if fnmatchcase(path, pattern)), "default"))
            if found[-1] not in members:
                raise ValueError(f"groups: {path} matches none of {', '.join(by_pattern)}, and there is no default")
        for pattern in by_pattern:
            if pattern not in found:
                raise ValueError(f"groups: all that {pattern!r} matches belongs to patterns before it; order them anew")
        return found

    def parts(tree, owner: list[str]) -> dict[str, PyTree]:
        """The tree for each group, with None in the place of the others' leaves."""
        leaves, structure = jax.tree.flatten(tree)
        rows = list(zip(leaves, owner, strict=True))
        return {
            pattern: structure.unflatten(leaf if on == pattern else None for leaf, on in rows) for pattern in members
        }

    def init(params):
        check_floats("groups", params)
        made = parts(params, owners(params))
        states = {pattern: init_within("groups", member)(made[pattern]) for pattern, member in members.items()}
        return GroupsState(zero(), states)

    def update(grads, opt_state, params, *, value=None):
        require_state("groups", opt_state, GroupsState)
        check_like(params, "gradient", grads)
        owner = owners(params)
        grads_of, params_of = parts(grads, owner), parts(params, owner)
        new, states = {}, {}
        for pattern, member in members.items():
            part, states[pattern] = member.update(
                grads_of[pattern], opt_state.groups[pattern], params_of[pattern], value=value
            )
            new[pattern] = iter(jax.tree.leaves(part))
        params = jax.tree.structure(params).unflatten(next(new[pattern]) for pattern in owner)
        return params, GroupsState(count_on(opt_state.step), states)

    def about(params):
        made = parts(params, owners(params))
        lines = {pattern: lines_of(member, made[pattern]) for pattern, member in members.items()}
        by_group = {path: f"[{pattern}] {line}" for pattern in members for path, line in lines[pattern].items()}
        return {path: by_group[path] for path, _ in named_leaves(params)}

    return Optimizer(init, update, about)


class FrozenState(NamedTuple):
    """State of `frozen`."""

    step: jax.Array
    rate: jax.Array


def frozen() -> Optimizer:
    """Leaves parameters as they are; its rate is 0."""

    def init(params):
        return FrozenState(zero(), jnp.zeros((), float))

    def update(grads, opt_state, params, *, value=None):
        require_state("frozen", opt_state, FrozenState)
        check_like(params, "gradient", grads)
        return params, FrozenState(count_on(opt_state.step), opt_state.rate)

    return Optimizer(init, update, lambda params: {path: "frozen" for path, _ in named_leaves(params)})


def describe(optimizer: Optimizer, params: PyTree) -> str:
    """Which leaf gets what: a line for each path with its shape, its optimizer and the numbers, decay or none.

    ``params`` may be arrays or shapes. An optimizer of one's own is described by ``Optimizer.about``.

    >>> from fnet.optimizers import adamw, sgd
    >>> params = {"dense_0": {"b": jnp.zeros(3), "w": jnp.zeros((4, 3))}}
    >>> print(describe(groups({"*/b": sgd(0.1)}, adamw(1e-3)), params))
    dense_0/b  (3,)    [*/b] sgd learning_rate=0.1
    dense_0/w  (4, 3)  [default] adamw learning_rate=0.001 b1=0.9 b2=0.999 eps=1e-08 eps_root=0 weight_decay=0.01
    """
    lines, shapes = lines_of(optimizer, params), {path: str(np.shape(leaf)) for path, leaf in named_leaves(params)}
    if not lines:
        return "no parameters"
    widths = max(map(len, lines)), max(map(len, shapes.values()))
    return "\n".join(f"{path:{widths[0]}}  {shapes[path]:{widths[1]}}  {line}" for path, line in lines.items())
