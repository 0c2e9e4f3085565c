"""Sampling from language models.

Legend: B batch, P length of the prompt, N ids to add, T what the model is given, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnet.core.checks import require, require_counts, require_key, require_layer
from fnet.core.numerics import wide
from fnet.layers.children import apply
from fnet.layers.decoding import apply_cached
from fnet.types import Layer, LayerError, PyTree


def generate(
    model: Layer,
    params: PyTree,
    state: PyTree,
    prompt: jax.Array,
    count: int,
    *,
    key: jax.Array,
    temperature=1.0,
    top_k: int | None = None,
    context: int | None = None,
    cache: bool | None = None,
) -> jax.Array:
    """``prompt (B, P)`` with ``count`` sampled ids after it, ``(B, P + count)``: a pure function of the key.

    Each id is drawn from ``softmax(logits / temperature)``, in float32 at least, among the ``top_k`` most likely (None:
    all; 1: always the most likely, ties by chance). The n-th id depends on the key, on n, on the sequence's place
    in the batch and on the ids before it, and on nothing else.

    With ``context`` the model maps ids ``(B, T)`` to logits ``(B, T, V)`` and is causal, as `fnet.models.gpt`; it is
    given the last ``context`` ids each time. While all ids are no more than that, and its layers know how, it is given
    one id at a time, with the keys and values of those before in a cache (``fnet.layers.decoding``): the same to
    rounding, at the cost of one. With ``cache`` True a model whose layers do not is refused, with False none is used.
    Without ``context`` the model maps ``(ids, carry)`` to ``(logits, carry)``, as `fnet.models.recurrent_lm`, and is
    given the prompt, then one id at a time.

    Raises ValueError for a prompt that is not a batch of at least one integer each, one whose dtype cannot hold every
    id, ids out of 0 .. V − 1 (if they are concrete), a count or a context below 1, a temperature that is not positive,
    and ``top_k`` out of 1 .. V.
    """
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or not prompt.shape[1] or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            f"generate: the prompt is {prompt.dtype} of shape {prompt.shape}; expected integer ids (B, P) with P >= 1"
        )
    require_counts("generate", count=count, context=context, top_k=top_k)
    require(temperature > 0, f"generate: temperature = {temperature}; expected above 0; for the likeliest id, top_k=1")
    length = prompt.shape[1]
    require_layer("generate: model", model)
    require_key("generate", key)
    ids = jax.ShapeDtypeStruct((len(prompt), context or length), prompt.dtype)  # as the model is given them
    try:
        shape = jax.eval_shape(lambda ids: apply(model, params, state, ids if context else (ids, None)), ids)
    except Exception:
        refuse_other_kind(model, params, state, ids, context)
        raise
    vocabulary = (shape if context else shape[0]).shape[-1]
    if top_k is not None and top_k > vocabulary:
        raise ValueError(f"generate: top_k = {top_k}; expected 1 to {vocabulary}, the vocabulary")
    if jnp.iinfo(prompt.dtype).max < vocabulary - 1:
        raise ValueError(
            f"generate: the prompt is {prompt.dtype}, which cannot hold ids up to {vocabulary - 1}: widen it"
        )
    if not isinstance(prompt, Tracer):
        wrong = np.argwhere((np.asarray(prompt) < 0) | (np.asarray(prompt) >= vocabulary))
        if len(wrong):
            place = tuple(wrong[0].tolist())
            raise ValueError(f"generate: the prompt has id {prompt[place]} at {place}; expected 0 to {vocabulary - 1}")

    def draw(logits, n):  # logits (B, V) -> ids (B,)
        dtype = wide(logits.dtype)
        logits = logits.astype(dtype)
        if top_k is not None:
            least = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        # below the largest, so that a low temperature leaves the likeliest at 0 and sends the others to −∞
        below = logits - logits.max(-1, keepdims=True)
        scaled = below / jnp.maximum(jnp.asarray(temperature, dtype), jnp.finfo(dtype).tiny)
        return jax.random.categorical(jax.random.fold_in(key, n), scaled).astype(prompt.dtype)

    def one_by_one(run, steps: int):
        """By ``run(ids, carry) -> logits, carry``, which is given the prompt, then one id at a time."""
        logits, carry = run(prompt, None)
        first = draw(logits[:, -1], length)

        def one(before, n):
            ids, carry = before
            logits, carry = run(ids[:, None], carry)
            ids = draw(logits[:, -1], n)
            return (ids, carry), ids

        _, rest = jax.lax.scan(one, (first, carry), jnp.arange(length + 1, length + steps))
        return jnp.concatenate([prompt, first[:, None], rest.T], 1)

    def anew(known, size: int):
        """After those that are known, each of the last ``size`` ids, all of which the model is given."""
        # ids that are not drawn yet stand behind those that are, where a causal model does not look
        ids = jnp.zeros((len(prompt), max(length + count, size)), prompt.dtype).at[:, : known.shape[1]].set(known)

        def one(ids, n):
            start = jnp.maximum(n - size, 0)
            logits = apply(model, params, state, jax.lax.dynamic_slice_in_dim(ids, start, size, 1))
            now = jax.lax.dynamic_index_in_dim(logits, n - 1 - start, 1, keepdims=False)
            return jax.lax.dynamic_update_slice_in_dim(ids, draw(now, n)[:, None], n, 1), None

        return jax.lax.scan(one, ids, jnp.arange(known.shape[1], length + count))[0][:, : length + count]

    if context is None:
        return one_by_one(lambda ids, carry: apply(model, params, state, (ids, carry)), count)
    # how many are drawn while all before them fit into the context, and how many stand before the last of these
    steps = min(context - length + 1, count)
    room = length + steps - 1
    run = partial(apply_cached, model, params, state, length=room)
    if cache is False or steps < 1 or not takes_cache(run, prompt, needed=cache):
        return anew(prompt, context)
    known = one_by_one(run, steps)
    return known if steps == count else anew(known, context)


def takes_cache(run, prompt, needed) -> bool:
    """Whether the model runs with a cache; where that is ``needed``, it raises what is in the way."""
    try:
        jax.eval_shape(run, prompt)
    except LayerError as error:
        if needed:
            remedy = "(generate: cache=False gives the model all ids anew each time)"
            raise LayerError(f"{error.message} {remedy}", error.path) from None
        return False
    except Exception:  # a model of one's own may take no piece of what it knows
        if needed:
            raise
        return False
    return True


def refuse_other_kind(model: Layer, params: PyTree, state: PyTree, ids, context: int | None) -> None:
    """Raise ValueError where a model that does not run as one kind does as the other."""
    try:
        jax.eval_shape(lambda ids: apply(model, params, state, (ids, None) if context else ids), ids)
    except Exception:  # the first error says more
        return
    if context:
        raise ValueError(f"generate: context = {context}, but the model maps (ids, carry); expected context=None")
    raise ValueError(
        "generate: the model maps ids to logits and keeps no carry; expected context=..., how many ids it is given"
    )
