"""The layer of three plain functions; and layers in another guise, which keep their name and their paths."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fnet.core.checks import described, require_array, require_layer, takes
from fnet.core.numerics import is_floating_dtype, wide
from fnet.core.trees import cast_like, join, split_floating
from fnet.layers.children import rewriting
from fnet.layers.decoding import is_decoding
from fnet.types import Layer, LayerError, PyTree


def stateless(name: str, init, forward, backward, *, several: bool = False) -> Layer:
    """The layer of ``init(key, x) -> params``, ``forward(params, x) -> y, residuals`` and ``backward``; no state.

    ``x`` is one array, or with ``several`` whatever the functions take. Raises TypeError for a function that does not
    take these arguments.
    """
    for what, function, expected in (
        ("init", init, "(key, x)"),
        ("forward", forward, "(params, x)"),
        ("backward", backward, "(params, residuals, dy)"),
    ):
        if not callable(function):
            raise TypeError(f"stateless: {name}'s {what} is {described(function)}; expected a function of {expected}")
        if not takes(function, *expected.split(",")):
            raise TypeError(f"stateless: {name}'s {what} takes {inspect.signature(function)}; expected {expected}")

    def full_init(key, x):
        if not several:
            require_array(x)
        return init(key, x), ()

    def full_forward(params, state, x, *, key=None, train=False):
        if not several:
            require_array(x)
        made = forward(params, x)
        if not isinstance(made, tuple) or len(made) != 2:
            raise LayerError(
                f"forward returned {described(made)}; expected (y, residuals), with () for residuals that there are not"
            )
        return made[0], state, made[1]

    return Layer(name, full_init, full_forward, backward)


def with_hand_backward(layer: Layer) -> Layer:
    """The same layer, whose backward by hand is what `jax.grad` of its forward runs (`jax.custom_vjp`).

    For a model of one's own that is differentiated by jax. The gradient by the state and by the returned state is zero.
    Do not compare it with autodiff: that would run the same backward twice. `check_layer` removes the rule by itself.

    >>> from fnet.layers import relu
    >>> layer = with_hand_backward(relu()._replace(backward=lambda params, y, dy: ((), 7 * dy)))
    >>> print(jax.grad(lambda x: layer.forward((), (), x)[0].sum())(jnp.ones(2)))
    [7. 7.]
    """

    require_layer("with_hand_backward: layer", layer)

    def forward(params, state, x, *, key=None, train=False):
        if is_decoding():  # a cache is no output that a rule could be of
            return layer.forward(params, state, x, key=key, train=train)
        floating, others = split_floating(x)

        def plain(params, floating, given):
            state, others, key = given
            return layer.forward(params, state, join(floating, others), key=key, train=train)

        def keep(params, floating, given):
            results = plain(params, floating, given)
            return results, (params, results[2])

        def by_hand(kept, cotangents):
            dy = jax.tree.map(lambda d: None if d.dtype == jax.dtypes.float0 else d, cotangents[0])
            params, residuals = kept
            dparams, dx = layer.backward(params, residuals, dy)
            return dparams, dx, None

        run = jax.custom_vjp(plain)
        run.defvjp(keep, by_hand)
        return run(params, floating, (state, others, key))

    return layer._replace(forward=forward)


def freeze(layer: Layer) -> Layer:
    """The same layer, whose parameters have the gradient zero; the gradient by its inputs is what it was.

    The parameters stay where they are, so a frozen part is a matter of which model trains, not of which was saved.
    Running statistics still move. An optimizer that decays weights or carries momentum from before moves parameters
    without a gradient, too.
    """

    require_layer("freeze: layer", layer)

    def forward(params, state, x, *, key=None, train=False):
        return layer.forward(jax.lax.stop_gradient(params), state, x, key=key, train=train)

    def backward(params, residuals, dy):  # the parameters count as constants
        with rewriting():
            _, dx = layer.backward(params, residuals, dy)
        return jax.tree.map(jnp.zeros_like, params), dx

    return layer._replace(forward=forward, backward=backward, outer=None)


class Policy(NamedTuple):
    """Which dtype does what in `mixed_precision`; the defaults are bfloat16 products on float32 parameters."""

    parameters: DTypeLike = jnp.float32  # as they are kept and updated
    compute: DTypeLike = jnp.bfloat16  # parameters, inputs and intermediates within the layer
    state: DTypeLike = jnp.float32  # running statistics; 32 bits at least
    outputs: DTypeLike | None = None  # what leaves the layer; None: as the inputs, or as the parameters for ids

    @property
    def accumulation(self):
        """What products and statistics are summed in: float32 at least, whatever the compute dtype."""
        return wide(jnp.dtype(self.compute))


def mixed_precision(layer: Layer, policy: Policy = Policy()) -> Layer:
    """The same layer computed in ``policy.compute``, with parameters, state and outputs in dtypes of their own.

    Parameters and inputs are cast on the way in and their gradients on the way back, to the dtypes of what they belong
    to. Small gradients underflow in float16 without a scaled loss; bfloat16 has float32's range.
    Source: Micikevicius et al., arXiv:1710.03740.

    A layer within may have another policy: ``mixed_precision(softmax(), Policy(compute=jnp.float32))`` is a float32
    island in a bfloat16 model. Raises ValueError for a dtype that is not floating, and a state in 16 bits.
    """
    require_layer("mixed_precision: layer", layer)
    if not isinstance(policy, Policy):
        raise TypeError(
            f"mixed_precision: policy = {policy!r:.80}; expected a Policy: fnet.layers.Policy(compute=jnp.bfloat16)"
        )
    for name, dtype in policy._asdict().items():
        if not is_floating_dtype(dtype) and not (name == "outputs" and dtype is None):
            raise ValueError(f"mixed_precision: {name} = {dtype}; expected a floating dtype, such as bfloat16")
    if wide(jnp.dtype(policy.state)) != jnp.dtype(policy.state):
        raise ValueError(
            f"mixed_precision: state = {jnp.dtype(policy.state)}; expected float32 or float64: running statistics move "
            "by a hundredth of themselves, which 16 bits do not hold"
        )

    def init(key, x):
        params, state = layer.init(key, jax.eval_shape(lambda x: cast(x, policy.parameters), x))
        return cast(params, policy.parameters), cast(state, policy.state)

    def forward(params, state, x, *, key=None, train=False):
        y, new_state, residuals = layer.forward(
            cast(params, policy.compute), state, cast(x, policy.compute), key=key, train=train
        )
        # empty arrays carry the dtypes that the backward returns to
        dtypes = jax.tree.map(lambda leaf: jnp.zeros(0, leaf.dtype), (split_floating(x)[0], split_floating(y)[0]))
        outer = [leaf.dtype for leaf in jax.tree.leaves(split_floating(x)[0])] or [policy.parameters]
        return cast(y, policy.outputs or outer[0]), cast(new_state, policy.state), (residuals, dtypes)

    def backward(params, residuals, dy):  # a cast is linear: its gradient is the cast back
        residuals, (x_dtypes, y_dtypes) = residuals
        dparams, dx = layer.backward(cast(params, policy.compute), residuals, cast_like(dy, y_dtypes))
        return cast_like(dparams, params), cast_like(dx, x_dtypes)

    return layer._replace(init=init, forward=forward, backward=backward, outer=None)


def cast(tree: PyTree, dtype) -> Any:
    """Floating leaves in ``dtype``, all others as they are."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
