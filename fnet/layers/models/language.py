"""Models of language: transformers and recurrent layers over the ids of tokens.

Legend: B batch, T time, V vocabulary, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fnet.core.checks import described, require_counts
from fnet.layers import (
    attention,
    biased,
    dense,
    dropout,
    embedding,
    geglu,
    gelu,
    layer_norm,
    learned_positions,
    relative_positions,
    relu,
    repeat,
    residual,
    rms_norm,
    serial,
    stacked,
    swiglu,
    tied_embedding,
)
from fnet.layers.children import backward_child, forward_child, init_child
from fnet.layers.combinators import output_shape, require_children
from fnet.layers.initializers import normal
from fnet.layers.jax_attention import Form
from fnet.layers.masks import split_bias, split_mask, with_bias, with_mask
from fnet.types import Layer, LayerError


def transformer_block(
    features: int,
    heads: int,
    *,
    causal: bool,
    expansion: int = 4,
    dropout_rate=None,
    block_size: int | None = None,
    form: Form = None,
) -> Layer:
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, on ``(B, T, D)``; the mlp is ``expansion · D`` wide.

    The norms stand before (Xiong et al., arXiv:2002.04745), as in GPT-2; ``dropout_rate`` acts on both branches,
    ``block_size`` and ``form`` are those of `attention`.
    """
    drop = [] if dropout_rate is None else [dropout(dropout_rate)]
    small = normal(0.02)
    attend = attention(heads, causal=causal, block_size=block_size, form=form, weights=small)
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
    form: Form = None,
    repeated: bool = False,
) -> Layer:
    """A causal transformer language model: ids ``(B, T)`` to logits ``(B, T, V)`` of each next one, T ≤ ``length``.

    Token and learned position embeddings, ``layers`` blocks, a last norm, and the token table again as the output. With
    ``vocabulary=50257, length=1024, layers=12, features=768, heads=12`` it has GPT-2's 124,439,808 parameters.
    ``repeated`` runs the blocks by `repeat`, whose compile time does not grow with the depth, and stacks their
    parameters; unrolled blocks run somewhat faster. ``block_size`` and ``form`` are those of `attention`; none of them
    but ``repeated`` changes the parameters. Source: Radford et al., "Language models are unsupervised multitask
    learners", 2019.

    >>> import jax
    >>> model = gpt(100, length=8, layers=2, features=16, heads=2)
    >>> params, _ = model.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 8), "int32"))
    >>> list(params["body"])
    ['positions', 'block_0', 'block_1', 'norm']
    """
    options = {"dropout_rate": dropout_rate, "block_size": block_size, "form": form}
    block = transformer_block(features, heads, causal=True, **options)
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


def t5_block(
    features: int,
    heads: int,
    *,
    hidden: int,
    head_features: int | None = None,
    gated: bool = False,
    eps=1e-6,
    block_size: int | None = None,
) -> Layer:
    """``u = x + attention(norm(x), bias)``, then ``u + mlp(norm(u))``, on ``(x (B, T, D), bias)``; no other biases.

    ``bias (B or 1, H, T, T)`` is added to the scores, which are not scaled, and handed on: ``(y, bias)``; ``(x, mask,
    bias)`` gives ``(y, mask, bias)``. So blocks stand one after another, and each adds to the one bias' gradient. Norms
    are `rms_norm`; the mlp is relu of ``hidden`` units and a dense layer, or with ``gated`` `geglu` with gelu's tanh
    form, as in T5 1.1. Raises `LayerError` for inputs without a bias. Source: Raffel et al., arXiv:1910.10683; gated,
    Shazeer, arXiv:2002.05202.
    """
    small = normal(0.02)
    units = (
        [("gated", geglu(hidden, approximate=True, weights=small, bias=None))]
        if gated
        else [("wide", dense(hidden, weights=small, bias=None)), relu()]
    )
    options = {"features": features, "head_features": head_features, "block_size": block_size, "scale": 1.0}
    norm, attend = rms_norm(eps=eps), attention(heads, weights=small, bias=None, **options)
    mlp = residual(("norm", rms_norm(eps=eps)), *units, ("narrow", dense(features, weights=small, bias=None)))
    children = (("norm", norm), ("attention", attend), ("mlp", mlp))

    def split(given):
        x, bias = split_bias(given)
        if bias is None:
            raise LayerError(f"expected (x, bias) or (x, mask, bias), got {described(given)}: biased(...) adds a bias")
        return x, bias

    def init(key, given):
        x, _ = split(given)
        shapes = {"norm": x, "attention": given, "mlp": x}
        made = {name: init_child(name, layer, key, shapes[name]) for name, layer in children}
        return {name: params for name, (params, _) in made.items()}, {name: state for name, (_, state) in made.items()}

    def forward(params, state, given, *, key=None, train=False):
        require_children("params", params, children)
        require_children("state", state, children)
        x, bias = split(given)
        new_state, residuals = {}, {}

        def run(name, layer, x):
            y, new_state[name], residuals[name] = forward_child(
                name, layer, params[name], state[name], x, key=key, train=train
            )
            return y

        a, mask = split_mask(run("attention", attend, with_bias(run("norm", norm, x), bias)))
        y = run("mlp", mlp, with_mask(split_mask(x)[0] + a, mask))
        return with_bias(y, bias), new_state, residuals

    def backward(params, residuals, dy):
        # y = m(u), u = x + a(n(x), b), and b once more beside y:  du by m, dn and db by a of du;
        # dx = du + that by n of dn, and db adds to what came for the bias
        dparams = {}
        dy, dlater = split_bias(dy)
        dparams["mlp"], du = backward_child("mlp", mlp, params["mlp"], residuals["mlp"], dy)
        dparams["attention"], dn = backward_child("attention", attend, params["attention"], residuals["attention"], du)
        dn, dbias = split_bias(dn)
        dparams["norm"], dx = backward_child("norm", norm, params["norm"], residuals["norm"], dn)
        return dparams, with_bias(jax.tree.map(jnp.add, dx, du), dbias + dlater)

    return Layer("t5_block", init, forward, backward, children)


def t5_encoder(
    vocabulary: int,
    *,
    layers: int,
    features: int,
    heads: int,
    hidden: int,
    head_features: int | None = None,
    gated: bool = False,
    buckets: int = 32,
    max_distance: int = 128,
    eps=1e-6,
    block_size: int | None = None,
    repeated: bool = False,
) -> Layer:
    """T5's encoder: ids ``(B, T)`` to features ``(B, T, D)``, or ``(ids, mask)`` to ``(features, mask)``.

    Token embeddings, ``layers`` of `t5_block` with one table of `relative_positions` for all, and a last `rms_norm`.
    With ``vocabulary=32128, layers=6, features=512, heads=8, hidden=2048`` it is t5-small's, 35,330,816 of the
    60,506,624 parameters that it has with its decoder. Where heads do not have D/H features give ``head_features``:
    128 in t5-3b and t5-11b, 64 in T5 1.1, which is ``gated``. ``repeated`` as in `gpt`. T5's dropout is left out, and
    weights are drawn as `gpt` draws them. Source: Raffel et al., arXiv:1910.10683.

    >>> import jax
    >>> model = t5_encoder(100, layers=2, features=16, heads=4, hidden=24)
    >>> params, state = model.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 8), "int32"))
    >>> list(params), list(params["blocks"]), params["blocks"]["relative"]["table"].shape
    (['embedding', 'blocks', 'norm'], ['relative', 'body'], (32, 4))
    """
    require_counts("t5_encoder", layers=layers)
    block = t5_block(
        features, heads, hidden=hidden, head_features=head_features, gated=gated, eps=eps, block_size=block_size
    )
    body = repeat(block, layers) if repeated else serial(*((f"block_{i}", block) for i in range(layers)))
    relative = relative_positions(heads, buckets=buckets, max_distance=max_distance)
    return serial(
        ("embedding", embedding(vocabulary, features)),
        ("blocks", biased(relative, body)),
        ("norm", rms_norm(eps=eps)),
    )._replace(name="t5_encoder")


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
