"""Optimizers made of others: transforms before one, groups of parameters, and wrappers around a whole update.

Each is again an `Optimizer`. A composed state holds the others' states; ``step`` and ``rate`` are read through to the
optimizer within, and `fnet.set_hyper` finds a number by its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fnet.optimizers.common import (
    as_arrays,
    check_between,
    check_counts,
    check_floats,
    check_like,
    count_on,
    moment,
    shown_numbers,
)
from fnet.optimizers.schedules import check_numbers
from fnet.optimizers.which import check_patterns
from fnet.types import (
    Mean,
    Optimizer,
    PyTree,
    Transform,
    by_path,
    infinite,
    named_leaves,
    require_optimizer,
    require_state,
    wide,
)


def of_optimizer(name: str, doc: str) -> property:
    """A property of a composed state: that of the optimizer within."""
    return property(lambda state: getattr(state.optimizer, name), doc=doc)


def init_within(who: str, optimizer: Optimizer) -> Callable[[PyTree], Any]:
    """The ``init`` of the optimizer within ``who``; raises TypeError for what is none.

    That ``init`` raises ValueError for `dynamic_loss_scale`, whose scale would not be applied there.
    """
    require_optimizer(f"{who}: optimizer", optimizer)

    def init(params):
        state = optimizer.init(params)
        if isinstance(state, LossScaleState):
            raise ValueError(
                f"{who}: dynamic_loss_scale is within, where no gradient engine reads its scale; put it outermost: "
                f"dynamic_loss_scale({who}(...))"
            )
        return state

    return init


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
    >>> from fnet.transforms import clip_by_value
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
        return GroupsState(_zero(), states)

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
        return FrozenState(_zero(), jnp.zeros((), float))

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


def lines_of(optimizer: Optimizer, params: PyTree) -> dict[str, str]:
    """What ``optimizer.about`` says of each path."""
    if optimizer.about is None:
        return {path: "an optimizer without a description" for path, _ in named_leaves(params)}
    return optimizer.about(params)


# --- wrappers around an update ---------------------------------------------------------------------------------------


class AveragedHyper(NamedTuple):
    """Numbers of `averaged`; ``decay`` is None for the plain mean."""

    decay: Any
    start: Any
    every: Any


class AveragedState(NamedTuple):
    """State of `averaged`: the mean of ``count`` parameters, and the optimizer's state."""

    hyper: AveragedHyper
    average: PyTree
    count: jax.Array
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def averaged(
    optimizer: Optimizer, decay: ArrayLike | None = 0.999, *, start: ArrayLike = 0, every: ArrayLike = 1
) -> Optimizer:
    """``optimizer``, beside which a mean of the parameters is kept; `averages` reads it from the state.

    After the updates t > ``start`` of which t − start is a multiple of ``every``, the mean takes up the parameters.
    With a ``decay`` it is the exponential moving average without bias, Σ decayⁿ⁻ⁱ pᵢ / Σ decayⁿ⁻ⁱ over the n taken up;
    with None the plain mean: Polyak's from ``start``, or stochastic weight averaging (arXiv:1803.05407) with one a
    cycle. The parameters that are trained do not change. Kept in float32 at least.
    """
    if decay is not None:
        check_numbers("averaged", below=1, decay=decay)
    check_counts("averaged", least=0, start=start)
    check_counts("averaged", every=every)
    init_optimizer = init_within("averaged", optimizer)

    def init(params):
        hyper = as_arrays(AveragedHyper(decay, start, every))
        return AveragedState(hyper, moment(params), _zero(), init_optimizer(params))

    def update(grads, opt_state, params, *, value=None):
        require_state("averaged", opt_state, AveragedState)
        params, inner = optimizer.update(grads, opt_state.optimizer, params, value=value)
        hyper, after = opt_state.hyper, inner.step - opt_state.hyper.start.astype(jnp.int32)
        # an update that was left out within is none
        take = (inner.step != opt_state.step) & (after > 0) & (after % hyper.every.astype(jnp.int32) == 0)
        count = opt_state.count + take.astype(jnp.int32)
        n = jnp.maximum(count, 1).astype(hyper.start.dtype)
        # the share of the newest in the mean: 1/n of n, and (1 − decay) / (1 − decayⁿ) of the moving average
        share = 1 / n if hyper.decay is None else (1 - hyper.decay) / -jnp.expm1(n * jnp.log(hyper.decay))
        share = jnp.where(take, share, 0)
        average = jax.tree.map(
            lambda a, p: a + share.astype(a.dtype) * (p.astype(a.dtype) - a), opt_state.average, params
        )
        return params, AveragedState(hyper, average, count, inner)

    return Optimizer(init, update, lambda params: _before(optimizer, params, "averaged"))


def averages(opt_state, params: PyTree) -> PyTree:
    """The averaged parameters in the dtypes of ``params``, from the state of an `averaged` optimizer within any other.

    Where none has been taken up yet they are ``params``, and so is what belongs to `groups` that are not averaged.
    Raises ValueError for a state without an average.
    """
    found, leaves = list(_found(opt_state, AveragedState)), by_path(jax.tree.map(jnp.asarray, params))
    if not found:
        raise ValueError(f"averages: no average in {type(opt_state).__name__}; expected the state of averaged(...)")
    for state in found:
        average = by_path(state.average)
        check_like({path: leaf for path, leaf in leaves.items() if path in average}, "average", average)
        for path, a in average.items():
            p = leaves[path]
            leaves[path] = jnp.where(state.count > 0, a.astype(p.dtype), p)
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values())


class LookaheadHyper(NamedTuple):
    """Numbers of `lookahead`."""

    every: Any
    slow_rate: Any


class LookaheadState(NamedTuple):
    """State of `lookahead`: the slow parameters, and the optimizer's state."""

    hyper: LookaheadHyper
    slow: PyTree
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def lookahead(optimizer: Optimizer, every: ArrayLike = 5, slow_rate: ArrayLike = 0.5) -> Optimizer:
    """Every so many updates the parameters go back part of the way: ``slow += slow_rate (p − slow)``, ``p = slow``.

    The optimizer's moments stay as they are. Evaluate after a multiple of ``every`` updates, where p and slow agree.
    `master_weights` go outside: within, they do not read the parameters that have gone back (ValueError).
    Source: Zhang et al., arXiv:1907.08610.
    """
    check_counts("lookahead", every=every)
    check_between("lookahead", 0, 1, slow_rate=slow_rate)
    init_optimizer = init_within("lookahead", optimizer)

    def init(params):
        hyper, inner = as_arrays(LookaheadHyper(every, slow_rate)), init_optimizer(params)
        if next(_found(inner, MasterState), None):
            raise ValueError(
                "lookahead: master_weights is within, which does not read the parameters that lookahead moves; put "
                "lookahead inside it: master_weights(lookahead(...))"
            )
        return LookaheadState(hyper, _wide_copy(params), inner)

    def update(grads, opt_state, params, *, value=None):
        require_state("lookahead", opt_state, LookaheadState)
        params, inner = optimizer.update(grads, opt_state.optimizer, params, value=value)
        hyper = opt_state.hyper
        now = inner.step % hyper.every.astype(jnp.int32) == 0
        mixed = jax.tree.map(
            lambda s, p: s + hyper.slow_rate.astype(s.dtype) * (p.astype(s.dtype) - s), opt_state.slow, params
        )
        slow = _chosen(now, mixed, opt_state.slow)
        params = jax.tree.map(lambda s, p: jnp.where(now, s.astype(p.dtype), p), slow, params)
        return params, LookaheadState(hyper, slow, inner)

    return Optimizer(init, update, lambda params: _before(optimizer, params, "lookahead"))


class GuardedState(NamedTuple):
    """State of `skip_nonfinite`: how many updates were left out, the count of the last bad one, its bad leaves by path.

    Before the first ``at`` is −1.
    """

    skipped: jax.Array
    at: jax.Array
    bad: dict[str, jax.Array]
    stopped: jax.Array
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def skip_nonfinite(optimizer: Optimizer, *, stop: bool = False) -> Optimizer:
    """Leaves out each update whose gradients, or what it makes of them, are not all finite: all stays as it was.

    A gradient of 1e30 is finite, and its square is not: a second moment would be infinite from then on, so that its
    parameter never moves again. With ``stop`` nothing is updated any more after the first such gradient. `nonfinite`
    says what was found, by name.
    """
    init_optimizer = init_within("skip_nonfinite", optimizer)

    def init(params):
        inner, none = init_optimizer(params), {path: jnp.zeros((), bool) for path in by_path(params)}
        return GuardedState(_zero(), jnp.full((), -1, jnp.int32), none, jnp.zeros((), bool), inner)

    def update(grads, opt_state, params, *, value=None):
        require_state("skip_nonfinite", opt_state, GuardedState)
        check_like(params, "gradient", grads)
        seen, old = opt_state.step + opt_state.skipped, (params, opt_state.optimizer)
        new = optimizer.update(grads, opt_state.optimizer, params, value=value)
        found = _bad_leaves(grads, params, old, new)
        any_bad = jnp.stack([jnp.zeros((), bool), *found.values()]).any()
        skip = any_bad | opt_state.stopped
        params, inner = _chosen(skip, old, new)
        now = seen, {path: found[path] for path in opt_state.bad}
        at, bad = _chosen(any_bad & ~opt_state.stopped, now, (opt_state.at, opt_state.bad))
        stopped = opt_state.stopped | (any_bad & stop)
        return params, GuardedState(opt_state.skipped + skip.astype(jnp.int32), at, bad, stopped, inner)

    return Optimizer(init, update, lambda params: _before(optimizer, params, "skip_nonfinite"))


def nonfinite(opt_state, params: PyTree) -> str | None:
    """What `skip_nonfinite` found, on the host: the first bad leaf of the last bad gradients, or None.

    Within `groups`, a line for each group that found one.
    """
    found = [state._replace(optimizer=None) for state in _found(opt_state, GuardedState)]
    if not found:
        raise ValueError(f"nonfinite: {type(opt_state).__name__} holds no state of skip_nonfinite(...)")
    lines = []
    for state in jax.device_get(found):
        path = next((path for path, _ in named_leaves(params) if state.bad.get(path)), None)
        if path is not None:
            end = "; stopped there" if state.stopped else ""
            what = f"the gradient at count {state.at}, or its update, was not finite"
            lines.append(f"{path or '()'}: {what}; {state.skipped} updates left out{end}")
    return "\n".join(lines) or None


# --- precision -------------------------------------------------------------------------------------------------------


class MasterState(NamedTuple):
    """State of `master_weights`: the parameters in their wide dtype, and the optimizer's state on them."""

    master: PyTree
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def master_weights(optimizer: Optimizer) -> Optimizer:
    """Updates a copy of the parameters in float32 at least and hands out that copy rounded to their dtypes.

    So a parameter in 16 bits keeps updates smaller than its rounding. The parameters given to ``update`` are not read:
    who changes them otherwise makes a new state. Source: Micikevicius et al., arXiv:1710.03740.
    """
    init_optimizer = init_within("master_weights", optimizer)

    def init(params):
        check_floats("master_weights", params)
        master = _wide_copy(params)
        return MasterState(master, init_optimizer(master))

    def update(grads, opt_state, params, *, value=None):
        require_state("master_weights", opt_state, MasterState)
        check_like(params, "gradient", grads)
        grads = jax.tree.map(lambda g, m: jnp.asarray(g, m.dtype), grads, opt_state.master)
        master, inner = optimizer.update(grads, opt_state.optimizer, opt_state.master, value=value)
        return jax.tree.map(lambda m, p: m.astype(jnp.result_type(p)), master, params), MasterState(master, inner)

    return Optimizer(init, update, lambda params: _before(optimizer, params, "master_weights"))


class LossScaleHyper(NamedTuple):
    """Numbers of `dynamic_loss_scale`."""

    growth: Any
    backoff: Any
    interval: Any


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`: the scale of the next gradients, and the finite ones since it changed."""

    hyper: LossScaleHyper
    loss_scale: jax.Array
    good: jax.Array
    skipped: jax.Array
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def dynamic_loss_scale(
    optimizer: Optimizer,
    initial: ArrayLike = 2.0**15,
    *,
    growth: ArrayLike = 2.0,
    backoff: ArrayLike = 0.5,
    interval: ArrayLike = 2000,
) -> Optimizer:
    """Gradients in float16 kept above its smallest number: the loss is multiplied by a scale, its gradients divided.

    `fnet.make_step` hands ``opt_state.loss_scale`` to the gradient engine. Gradients that overflow are left out and the
    scale multiplied by ``backoff``, down to 1 at least; after ``interval`` finite ones it is multiplied by ``growth``.
    It stands outermost: ``dynamic_loss_scale(chain(clip_by_global_norm(1.0), adam()))``, with `master_weights` within;
    ``init`` of all other wrappers, `chain` and `groups` raises ValueError where it is inside them.
    torch's ``GradScaler`` has the same numbers, from 2¹⁶. Source: Micikevicius et al., arXiv:1710.03740.
    """
    check_numbers("dynamic_loss_scale", positive=True, initial=initial, growth=growth)
    check_numbers("dynamic_loss_scale", positive=True, below=1, backoff=backoff)
    check_counts("dynamic_loss_scale", interval=interval)
    init_optimizer = init_within("dynamic_loss_scale", optimizer)

    def init(params):
        hyper = as_arrays(LossScaleHyper(growth, backoff, interval))
        return LossScaleState(hyper, jnp.array(initial, float), _zero(), _zero(), init_optimizer(params))

    def update(grads, opt_state, params, *, value=None):
        require_state("dynamic_loss_scale", opt_state, LossScaleState)
        check_like(params, "gradient", grads)
        hyper, scale = opt_state.hyper, opt_state.loss_scale
        grads = jax.tree.map(jnp.asarray, grads)
        grads = jax.tree.map(lambda g: g.astype(wide(g.dtype)) / scale.astype(wide(g.dtype)), grads)
        finite = _finite(grads).all()
        new = optimizer.update(grads, opt_state.optimizer, params, value=value)
        params, inner = _chosen(finite, new, (params, opt_state.optimizer))
        good = jnp.where(finite, opt_state.good + 1, 0)
        grow = good >= hyper.interval.astype(jnp.int32)
        largest = jnp.asarray(2.0**100, scale.dtype)
        scale = jnp.where(finite, scale, jnp.maximum(scale * hyper.backoff, 1))
        scale = jnp.where(grow, jnp.minimum(scale * hyper.growth, largest), scale)
        skipped = opt_state.skipped + (~finite).astype(jnp.int32)
        return params, LossScaleState(hyper, scale, jnp.where(grow, 0, good), skipped, inner)

    return Optimizer(init, update, lambda params: _before(optimizer, params, "dynamic_loss_scale"))


# --- plateau ---------------------------------------------------------------------------------------------------------


class PlateauHyper(NamedTuple):
    """Numbers of `reduce_on_plateau`; ``window`` is None where it waits for evaluations.

    ``metric`` holds the result that it waits for by its name, and 1 where the least is sought, -1 where the greatest;
    it is None where it watches the loss.
    """

    factor: Any
    patience: Any
    window: Any
    least_change: Any
    least_rate: Any
    cooldown: Any
    metric: Any


class PlateauState(NamedTuple):
    """State of `reduce_on_plateau`: the window's sum so far, the best value, windows without a better one.

    ``waited`` is below 0 while it cools down.
    """

    hyper: PlateauHyper
    total: jax.Array
    best: jax.Array
    waited: jax.Array
    optimizer: Any

    step = of_optimizer("step", "Updates applied so far.")
    rate = of_optimizer("rate", "The learning rate just applied.")


def reduce_on_plateau(
    optimizer: Optimizer,
    factor: ArrayLike = 0.1,
    *,
    window: ArrayLike | None = None,
    metric: str | None = None,
    greatest: bool = False,
    patience: ArrayLike = 10,
    least_change: ArrayLike = 1e-4,
    least_rate: ArrayLike = 0.0,
    cooldown: ArrayLike = 0,
) -> Optimizer:
    """Multiplies the learning rate by ``factor`` where the loss, or a result of the evaluations, stops falling.

    With ``window`` it watches the losses handed to ``update``, averaged over as many updates (an epoch, say). With
    ``metric``, such as "validation_loss", the result of that name in each evaluation of `fnet.fit` and `fnet.train`
    (with ``greatest`` its negative), as Keras does; in a loop of one's own `told` hands it over. After ``patience``
    values in a row that are not below ``best − least_change · |best|`` the rate is reduced, not below ``least_rate``;
    the next ``cooldown`` values are not counted, and the waiting begins anew. A value that is not finite is never
    better. ``optimizer`` is one with a number for its learning rate, which is data in its state.

    Keras' ``ReduceLROnPlateau`` compares with ``best − min_delta`` and counts the last value of the cooldown; else its
    values are the same. torch's waits one more.
    Raises ValueError unless one of ``window`` and ``metric`` is given; ``update`` raises it without a ``value`` where
    it watches the loss, which `fnet.make_step` always gives.
    """
    if (window is None) == (metric is None):
        raise ValueError(
            f"reduce_on_plateau: window = {window!r} and metric = {metric!r}; expected one of them: so many losses of "
            "training on average, or a result such as 'validation_loss'"
        )
    check_numbers("reduce_on_plateau", positive=True, below=1, factor=factor)
    check_counts("reduce_on_plateau", patience=patience, window=1 if window is None else window)
    check_counts("reduce_on_plateau", least=0, cooldown=cooldown)
    check_numbers("reduce_on_plateau", least_change=least_change, least_rate=least_rate)
    init_optimizer = init_within("reduce_on_plateau", optimizer)

    def init(params):
        waits_for = None if metric is None else {metric: -1.0 if greatest else 1.0}
        hyper = as_arrays(PlateauHyper(factor, patience, window, least_change, least_rate, cooldown, waits_for))
        inner = init_optimizer(params)
        rate = getattr(getattr(inner, "hyper", None), "learning_rate", None)
        if not hasattr(rate, "shape"):
            raise TypeError(
                "reduce_on_plateau: expected an optimizer with a number for its learning_rate, no schedule and no "
                "composed one: put reduce_on_plateau inside chain or groups"
            )
        return PlateauState(hyper, jnp.zeros((), float), infinite("reduce_on_plateau"), _zero(), inner)

    def update(grads, opt_state, params, *, value=None):
        require_state("reduce_on_plateau", opt_state, PlateauState)
        if value is None and metric is None:
            raise ValueError("reduce_on_plateau: value is None; expected the loss: update(..., value=loss)")
        params, inner = optimizer.update(grads, opt_state.optimizer, params, value=value)
        opt_state = opt_state._replace(optimizer=inner)
        if metric is not None:
            return params, opt_state
        window = opt_state.hyper.window
        total = opt_state.total + jnp.asarray(value, opt_state.total.dtype)
        ended = inner.step % window.astype(jnp.int32) == 0
        return params, _after(opt_state, total / window, ended)._replace(total=jnp.where(ended, 0, total))

    return Optimizer(init, update, lambda params: _before(optimizer, params, "reduce_on_plateau"))


def _after(opt_state: PlateauState, value: jax.Array, counts: ArrayLike = True) -> PlateauState:
    """The state after one of the values that are compared; the same state where it does not count."""
    hyper, inner, best, waited = opt_state.hyper, opt_state.optimizer, opt_state.best, opt_state.waited
    least = best - hyper.least_change * jnp.abs(jnp.where(jnp.isinf(best), 0, best))
    better = counts & jnp.isfinite(value) & (value < least)
    waited = jnp.where(counts, jnp.where((waited >= 0) & better, 0, waited + 1), waited)
    reduce = counts & (waited >= hyper.patience.astype(jnp.int32))
    rate = inner.hyper.learning_rate
    lower = jnp.minimum(rate, jnp.maximum(rate * hyper.factor, hyper.least_rate))
    inner = inner._replace(hyper=inner.hyper._replace(learning_rate=jnp.where(reduce, lower, rate)))
    return opt_state._replace(
        best=jnp.where(better, value, best),
        waited=jnp.where(reduce, -hyper.cooldown.astype(jnp.int32), waited),
        optimizer=inner,
    )


def told(opt_state: PyTree, results: Mapping[str, Any]) -> PyTree:
    """The state of any optimizer after an evaluation: `reduce_on_plateau` within it has seen the result it waits for.

    ``results`` are `Mean`s or numbers by name. Raises ValueError where there is none of that name, or it is no number.

    >>> from fnet.optimizers import sgd
    >>> opt_state = reduce_on_plateau(sgd(1.0), metric="validation_loss", patience=1).init(jnp.zeros(2))
    >>> for loss in (0.5, 0.6, 0.7):
    ...     opt_state = told(opt_state, {"validation_loss": loss})
    >>> print(round(float(opt_state.optimizer.hyper.learning_rate), 6))
    0.01
    """

    def seen(node):
        for name, sign in (node.hyper.metric or {}).items() if isinstance(node, PlateauState) else ():
            if name not in results:
                there = ", ".join(results) or "there is none without evaluate and validation"
                raise ValueError(f"reduce_on_plateau: metric = {name!r}; expected the name of a result: {there}")
            value = results[name].value if isinstance(results[name], Mean) else results[name]
            if jnp.shape(value) != ():
                raise ValueError(f"reduce_on_plateau: {name} has shape {jnp.shape(value)}; expected one number")
            node = _after(node, sign * jnp.asarray(value, sign.dtype))
        return node

    return jax.tree.map(seen, opt_state, is_leaf=lambda node: isinstance(node, PlateauState))


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _wide_copy(params: PyTree) -> PyTree:
    """The parameters in float32 at least, in buffers of their own."""
    return jax.tree.map(lambda p: jnp.array(p, wide(jnp.result_type(p))), params)


def _finite(grads: PyTree) -> jax.Array:
    """For each leaf whether all its entries are finite; one True if there are none."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)] or [jnp.asarray(True)])


def _bad_leaves(grads: PyTree, params: PyTree, old: PyTree, new: PyTree) -> dict[str, jax.Array]:
    """By the parameters' paths whether a gradient, or what was made of it, is not finite; "" for what belongs to none.

    ``old`` and ``new`` are parameters and state before and after: what was not finite before does not count.
    """
    found = {
        path: ~jnp.isfinite(leaf).all() for path, leaf in zip(by_path(params), jax.tree.leaves(grads), strict=True)
    }
    for (path, before), after in zip(named_leaves(old), jax.tree.leaves(new), strict=True):
        if jnp.issubdtype(jnp.result_type(after), jnp.floating):
            spoilt = (jnp.isfinite(before) & ~jnp.isfinite(after)).any()
            owner = max((own for own in found if path == own or path.endswith(f"/{own}")), key=len, default="")
            found[owner] = found.get(owner, jnp.zeros((), bool)) | spoilt
    return found


def _chosen(first, a: PyTree, b: PyTree) -> PyTree:
    """``a`` if ``first``, else ``b``."""
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), a, b)


def _before(optimizer: Optimizer, params: PyTree, what: str) -> dict[str, str]:
    return {path: f"{what}: {line}" for path, line in lines_of(optimizer, params).items()}


def _found(node, kind: type) -> Iterator[Any]:
    """The outermost states of this kind within a composed one."""
    if isinstance(node, kind):
        yield node
    elif isinstance(node, GroupsState):
        for child in node.groups.values():
            yield from _found(child, kind)
    elif hasattr(node, "optimizer"):
        yield from _found(node.optimizer, kind)
