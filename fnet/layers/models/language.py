"""Models of language: transformers and recurrent layers over the ids of tokens.

Legend: B batch, T time, V vocabulary, D features.
"""

from __future__ import annotations

from fnet.layers import (
    attention,
    dense,
    dropout,
    embedding,
    gelu,
    layer_norm,
    learned_positions,
    repeat,
    residual,
    rms_norm,
    serial,
    stacked,
    swiglu,
    tied_embedding,
)
from fnet.layers.combinators import output_shape
from fnet.layers.initializers import normal
from fnet.types import Layer, LayerError


def transformer_block(
    features: int,
    heads: int,
    *,
    causal: bool,
    expansion: int = 4,
    dropout_rate=None,
    block_size: int | None = None,
) -> Layer:
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, on ``(B, T, D)``; the mlp is ``expansion · D`` wide.

    The norms stand before (Xiong et al., arXiv:2002.04745), as in GPT-2; ``dropout_rate`` acts on both branches.
    """
    drop = [] if dropout_rate is None else [dropout(dropout_rate)]
    small = normal(0.02)
    attend = attention(heads, causal=causal, block_size=block_size, weights=small)
    return serial(
        ("attend", residual(("norm", layer_norm()), ("attention", attend), *drop)),
        (
            "mlp",
            residual(
                ("norm", layer_norm()),
                ("wide", dense(expansion * features, weights=small)),
                gelu(approximate=True),
                ("narrow", dense(features, weights=small)),
                *drop,
            ),
        ),
    )._replace(name="transformer_block")


def gpt(
    vocabulary: int,
    *,
    length: int,
    layers: int,
    features: int,
    heads: int,
    dropout_rate=None,
    block_size: int | None = None,
    repeated: bool = False,
) -> Layer:
    """A causal transformer language model: ids ``(B, T)`` to logits ``(B, T, V)`` of each next one, T ≤ ``length``.

    Token and learned position embeddings, ``layers`` blocks, a last norm, and the token table again as the output. With
    ``vocabulary=50257, length=1024, layers=12, features=768, heads=12`` it has GPT-2's 124,439,808 parameters.
    ``repeated`` runs the blocks by `repeat`, whose compile time does not grow with the depth, and stacks their
    parameters; unrolled blocks run somewhat faster. Source: Radford et al., "Language models are unsupervised multitask
    learners", 2019.

    >>> import jax
    >>> model = gpt(100, length=8, layers=2, features=16, heads=2)
    >>> params, _ = model.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 8), "int32"))
    >>> list(params["body"])
    ['positions', 'block_0', 'block_1', 'norm']
    """
    block = transformer_block(features, heads, causal=True, dropout_rate=dropout_rate, block_size=block_size)
    blocks = [("blocks", repeat(block, layers))] if repeated else [(f"block_{i}", block) for i in range(layers)]
    drop = [] if dropout_rate is None else [dropout(dropout_rate)]
    body = serial(("positions", learned_positions(length)), *drop, *blocks, ("norm", layer_norm()))
    return tied_embedding(vocabulary, features, body)._replace(name="gpt")


def llama_block(
    features: int,
    heads: int,
    *,
    hidden: int,
    kv_heads: int | None = None,
    rotary=10000.0,
    eps=1e-5,
    block_size: int | None = None,
) -> Layer:
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, on ``(B, T, D)``, without a bias anywhere.

    Norms are `rms_norm`; attention is causal, of grouped queries (``kv_heads``), with ``rotary`` positions as in
    `attention`; the mlp is `swiglu` of ``hidden`` units and a dense layer. Sources: Touvron et al., arXiv:2302.13971;
    Grattafiori et al., arXiv:2407.21783.
    """
    small = normal(0.02)
    attend = attention(
        heads, kv_heads=kv_heads, causal=True, rotary=rotary, block_size=block_size, weights=small, bias=None
    )
    gate, narrow = swiglu(hidden, weights=small, bias=None), dense(features, weights=small, bias=None)
    return serial(
        ("attend", residual(("norm", rms_norm(eps=eps)), ("attention", attend))),
        ("mlp", residual(("norm", rms_norm(eps=eps)), ("gated", gate), ("narrow", narrow))),
    )._replace(name="llama_block")


def llama(
    vocabulary: int,
    *,
    layers: int,
    features: int,
    heads: int,
    hidden: int,
    kv_heads: int | None = None,
    rotary=10000.0,
    eps=1e-5,
    block_size: int | None = None,
    tied: bool = False,
    repeated: bool = False,
) -> Layer:
    """A causal language model as Llama: ids ``(B, T)`` of any length to logits ``(B, T, V)`` of each next one.

    Token embeddings, ``layers`` of `llama_block`, a last `rms_norm`, and a matrix of its own as the output, or the
    token table again if ``tied``. With ``vocabulary=128256, layers=32, features=4096, heads=32, kv_heads=8,
    hidden=14336, rotary=500000.0`` it has Llama 3 8B's 8,030,261,248 parameters. ``repeated`` as in `gpt`.
    Source: Grattafiori et al., arXiv:2407.21783.

    >>> import jax
    >>> model = llama(100, layers=2, features=16, heads=4, kv_heads=2, hidden=24)
    >>> params, state = model.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 8), "int32"))
    >>> list(params), model.forward(params, state, jax.numpy.zeros((1, 8), int))[0].shape
    (['embedding', 'block_0', 'block_1', 'norm', 'output'], (1, 8, 100))
    """
    block = llama_block(
        features, heads, hidden=hidden, kv_heads=kv_heads, rotary=rotary, eps=eps, block_size=block_size
    )
    blocks = [("blocks", repeat(block, layers))] if repeated else [(f"block_{i}", block) for i in range(layers)]
    body = [*blocks, ("norm", rms_norm(eps=eps))]
    if tied:
        return tied_embedding(vocabulary, features, serial(*body))._replace(name="llama")
    output = ("output", dense(vocabulary, weights=normal(0.02), bias=None))
    return serial(("embedding", embedding(vocabulary, features)), *body, output)._replace(name="llama")


def recurrent_lm(vocabulary: int, *layers: Layer, features: int) -> Layer:
    """A recurrent language model: ids ``(B, T)`` to logits ``(B, T, V)``, or ``(ids, carry)`` to ``(logits, carry)``.

    An embedding of ``features``, the recurrent ``layers`` one upon another, and the embedding's table again as the
    output, so that the last layer has ``features`` units. Source: Press and Wolf, arXiv:1608.05859.

    >>> import jax
    >>> from fnet.layers import lstm
    >>> model, ids = recurrent_lm(100, lstm(16), lstm(16), features=16), jax.numpy.zeros((2, 8), int)
    >>> params, state = model.init(jax.random.key(0), ids)
    >>> logits, carry = model.forward(params, state, (ids, None))[0]
    >>> logits.shape, carry[1].h.shape
    ((2, 8, 100), (2, 16))
    """
    body = stacked(*layers)

    def init(key, x):
        params, state = body.init(key, x)
        y = output_shape(body, params, state, x if isinstance(x, tuple) else (x, None))[0]
        if y.shape[-1] != features:
            raise LayerError(f"expected a last layer of {features} units, as the table has features, got {y.shape[-1]}")
        return params, state

    return tied_embedding(vocabulary, features, body._replace(init=init))._replace(name="recurrent_lm")
