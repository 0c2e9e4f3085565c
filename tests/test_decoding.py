"""Models with their keys and values in a cache: equal to those without, at the cost of one position; refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.layers import (
    alibi,
    attention,
    dense,
    embedding,
    freeze,
    llama3_frequencies,
    lstm,
    mixed_precision,
    relative_positions,
    remat,
    repeat,
    residual,
    rms_norm,
    serial,
    sinusoidal_positions,
    stateless,
    with_hand_backward,
)
from fnet.layers.children import apply
from fnet.layers.decoding import apply_cached
from fnet.layers.models import gpt
from fnet.types import LayerError

IDS = np.random.default_rng(0).integers(0, 11, (2, 9))


def of(*layers):
    """A language model of these layers between an embedding and a dense layer."""
    normal = fnet.initializers.normal(1.0)
    return serial(embedding(11, 8, weights=normal, dtype=jnp.float64), *layers, dense(11))


def llama(**options):
    options = {"causal": True, "kv_heads": 2, "rotary": llama3_frequencies(4, 100.0, original_length=16), **options}
    return residual(rms_norm(), attention(4, head_features=4, **options))


MODELS = {
    "gpt": lambda: gpt(11, length=9, layers=2, features=8, heads=2),
    "gpt, repeated": lambda: gpt(11, length=12, layers=2, features=8, heads=2, repeated=True),
    "rotary, grouped": lambda: of(llama(), llama(interleaved=True)),
    "blockwise": lambda: of(llama(block_size=3), llama(block_size=2)),
    "window, cap, wide values": lambda: of(llama(window=3, softcap=2.0), llama(value_features=3, window=4)),
    "T5": lambda: of(attention(2, causal=True, relative=relative_positions(2, buckets=8, bidirectional=False))),
    "alibi": lambda: of(attention(2, causal=True, relative=alibi(2))),
    "sinusoidal": lambda: of(sinusoidal_positions(), attention(2, causal=True)),
    "guises": lambda: of(remat(llama()), freeze(llama()), with_hand_backward(llama()), repeat(llama(), 2)),
}
QUICK = ("gpt, repeated", "window, cap, wide values", "T5", "sinusoidal")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n not in QUICK)) for n in MODELS])
def test_pieces_with_a_cache_give_what_the_whole_gives(name, key, x64):
    model, ids = MODELS[name](), jnp.asarray(IDS)
    params, state = fnet.init(model, key, ids)
    # gpt begins with small weights and float32: in float64 and larger, what is compared differs along the sequence
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) + 0.3 * jax.random.normal(key, leaf.shape), params)
    whole = apply(model, params, state, ids)
    run = jax.jit(lambda ids, carry: apply_cached(model, params, state, ids, carry, length=9))
    carry, at = None, 0
    for piece in (3, 1, 1, 1, 2, 1):
        y, carry = run(ids[:, at : at + piece], carry)
        np.testing.assert_allclose(y, whole[:, at : at + piece], rtol=1e-11, atol=1e-12)
        at += piece
    assert int(carry.position) == 9 and np.abs(whole[:, 1:] - whole[:, :1]).max() > 1e-2


def test_the_cache_holds_the_keys_and_values_of_its_own_heads_in_the_dtype_of_the_products(key, x64):
    model = mixed_precision(of(llama(value_features=3)))
    params, state = fnet.init(model, key, IDS)
    _, carry = apply_cached(model, params, state, jnp.asarray(IDS[:, :2]), length=7)
    [(path, (keys, values))] = carry.kept.items()
    assert path == "residual_0/attention_0" and keys.dtype == values.dtype == jnp.bfloat16
    assert keys.shape == (2, 7, 2, 4) and values.shape == (2, 7, 2, 3)
    assert not keys[:, 2:].any() and keys[:, :2].any()


def test_one_more_id_is_one_program_that_costs_one_position(key):
    length = 256
    model = gpt(11, length=length, layers=2, features=32, heads=2)
    ids = jnp.zeros((1, length), int)
    params, state = fnet.init(model, key, ids)
    traced = []

    @jax.jit
    def step(ids, carry):
        traced.append(carry)
        return apply_cached(model, params, state, ids, carry, length=length)

    carry = step(ids[:, :1], None)[1]
    flops = step.lower(ids[:, :1], carry).compile().cost_analysis()["flops"]
    whole = jax.jit(lambda ids: apply(model, params, state, ids)).lower(ids).compile().cost_analysis()["flops"]
    assert flops < 2 * whole / length
    for _ in range(3):
        carry = step(ids[:, :1], carry)[1]
    assert len(traced) == 2  # of which the first begins with nothing


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt", "rotary, grouped"])
@pytest.mark.parametrize("context", [9, 6])
def test_generate_draws_with_a_cache_what_it_draws_without_and_goes_on_beyond_the_context(name, context, key, x64):
    model, prompt = MODELS[name](), jnp.asarray(IDS[:, :4])
    params, state = fnet.init(model, key, IDS)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype), params)
    given = {"key": jax.random.key(3), "context": context}
    with_cache, without = (fnet.generate(model, params, state, prompt, 5, **given, cache=c) for c in (True, False))
    assert (with_cache == without).all() and len(set(with_cache[:, 4:].ravel().tolist())) > 2
    for short in (1, 2):  # of which the first is the prompt alone
        assert (fnet.generate(model, params, state, prompt, short, **given) == without[:, : 4 + short]).all()
    longer = fnet.generate(model, params, state, jnp.asarray(IDS[:, :8]), 2, key=given["key"], context=6, cache=True)
    assert longer.shape == (2, 10)


def own():
    return stateless("mine", lambda key, x: (), lambda params, x: (x, ()), lambda params, residuals, dy: ((), dy))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lstm(8), "lstm_0: lstm may look at other positions, of which it has no cache"),
        (own(), r"mine_0: mine may look at other positions, .* fnet.layers.by_position\(layer\) says so"),
        (attention(2), "attention_0: expected causal attention without a mask, .* got one that is not causal"),
    ],
)
def test_what_needs_other_positions_is_refused_and_generated_anew(layer, message, key, x64):
    model, ids = of(layer), jnp.asarray(IDS)
    params, state = fnet.init(model, key, ids)
    with pytest.raises(LayerError, match=f"^{message}"):
        apply_cached(model, params, state, ids, length=9)
    given = {"key": key, "context": 9}
    with pytest.raises(LayerError, match=r"generate: cache=False gives the model all ids anew"):
        fnet.generate(model, params, state, ids[:, :3], 2, **given, cache=True)
    same = [fnet.generate(model, params, state, ids[:, :3], 2, **given, cache=c) for c in (None, False)]
    assert (same[0] == same[1]).all()


def test_masks_and_lengths_that_do_not_fit_are_refused(key):
    model, ids = gpt(11, length=8, layers=1, features=8, heads=2), jnp.asarray(IDS)
    params, state = fnet.init(model, key, ids[:, :8])
    with pytest.raises(LayerError, match="body/positions: expected at most 8 positions, got a cache of 9"):
        apply_cached(model, params, state, ids[:, :8], length=9)
    with pytest.raises(LayerError, match="expected at most 4 positions, which the cache has room for, got 9"):
        apply_cached(model, params, state, ids, length=4)
    with pytest.raises(LayerError, match=r"attention: expected causal attention without a mask, .* got a mask"):
        apply_cached(model, params, state, (ids[:, :8], jnp.ones((2, 8), bool)), length=8)
    with pytest.raises(LayerError, match=r"^lstm may look at other positions"):
        apply_cached(lstm(8), *fnet.init(lstm(8), key, jnp.zeros((2, 3, 4))), jnp.zeros((2, 3, 4)), length=8)
