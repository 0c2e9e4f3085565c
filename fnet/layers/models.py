"""Models: compositions of layers, and nothing else.

Legend: B batch, H W height and width, C channels, T time, V vocabulary, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fnet.core.checks import require_counts
from fnet.layers import (
    attention,
    batch_norm,
    conv,
    dense,
    dropout,
    embedding,
    flatten,
    gelu,
    global_avg_pool,
    layer_norm,
    learned_positions,
    max_pool,
    relu,
    repeat,
    reshape,
    residual,
    rms_norm,
    serial,
    stacked,
    swiglu,
    tied_embedding,
)
from fnet.layers.combinators import output_shape
from fnet.layers.initializers import he_normal, normal
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


def mlp(*units: int, activation: Layer = relu(), output: Layer | None = None, weights=he_normal()) -> Layer:
    """Dense layers of the given widths with ``activation`` between them, and ``output`` after the last if given.

    ``mlp(128, 64, 10)`` on 784 features is 784-128-64-10 with relu between and plain logits at the end. ``weights`` is
    the initializer of every dense layer.

    >>> import jax
    >>> params, _ = mlp(128, 64, 10).init(jax.random.key(0), jax.ShapeDtypeStruct((32, 784), "float32"))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    109386
    """
    if not units:
        raise ValueError("mlp: no widths given; expected at least one, such as mlp(128, 64, 10)")
    layers = [dense(units[0], weights=weights)]
    for width in units[1:]:
        layers += [activation, dense(width, weights=weights)]
    return serial(*layers, *([] if output is None else [output]))._replace(name="mlp")


def autoencoder(features: int, *units: int, activation: Layer = relu(), output: Layer | None = None) -> Layer:
    """``features`` down over ``units`` to the last of them, the code, and back the same way; `mlp`s both.

    ``autoencoder(784, 128, 32)`` is 784-128-32-128-784 with children ``encoder`` and ``decoder``; ``output`` stands
    after the last layer, say `sigmoid` for pixels. Source: Hinton and Salakhutdinov, Science 313, 2006.
    """
    if not units:
        raise ValueError("autoencoder: no widths given; expected at least the code's, such as autoencoder(784, 32)")
    encoder = mlp(*units, activation=activation)
    decoder = mlp(*reversed(units[:-1]), features, activation=activation, output=output)
    return serial(("encoder", encoder), ("inner", activation), ("decoder", decoder))._replace(name="autoencoder")


# --- images ----------------------------------------------------------------------------------------------------------


def lenet5(classes: int = 10, *, activation: Layer = relu(), pool: Layer | None = None) -> Layer:
    """LeNet-5 on images ``(B, 28, 28, 1)``: two convolutions and poolings, three dense layers; logits ``(B, classes)``.

    6 and 16 maps by 5×5 kernels, 2×2 pooling, 120-84-classes: 61,706 parameters for ten classes. As it is used today:
    relu, max pooling, every map sees all six below, and plain logits; ``activation=tanh()`` and ``pool=avg_pool((2,
    2))`` are nearer to LeCun et al., "Gradient-based learning applied to document recognition", 1998.

    >>> import jax
    >>> params, _ = lenet5().init(jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28, 1), "float32"))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    61706
    """
    pool = max_pool((2, 2)) if pool is None else pool
    features = [conv(6, (5, 5)), activation, pool, conv(16, (5, 5), padding="VALID"), activation, pool]
    return serial(*features, flatten(), dense(120), activation, dense(84), activation, dense(classes))._replace(
        name="lenet5"
    )


def resnet(
    classes: int,
    *,
    blocks: Sequence[int] = (1, 1, 1),
    width: int = 16,
    block: Callable[..., Layer] | None = None,
    stem: Layer | None = None,
) -> Layer:
    """A residual network on images ``(B, H, W, C)``: a stem, stages of blocks, the mean over space, one dense layer.

    ``blocks`` are the blocks of each stage; the first stage has ``width`` features, each later one twice as many at
    half the resolution. ``block`` is `basic_block` (the default) or `bottleneck_block`. The stem is by default a 3×3
    convolution for small images, so that ``blocks=(1, 1, 1)`` has 8 layers, ``(2, 2, 2)`` 14 and ``(3, 3, 3)`` 20;
    ``resnet(1000, blocks=(2, 2, 2, 2), width=64, stem=imagenet_stem(64))`` is ResNet-18 with its 11,689,512 parameters.
    Source: He et al., arXiv:1512.03385.

    >>> import jax
    >>> shapes = jax.eval_shape(resnet(10).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28, 1), "float32"))
    >>> sorted(shapes[0])
    ['head', 'pool', 'stage_0', 'stage_1', 'stage_2', 'stem']
    """
    require_counts("resnet", width=width, **{f"blocks[{i}]": count for i, count in enumerate(blocks)})
    block = basic_block if block is None else block
    stem = serial(conv(width, (3, 3), bias=None), batch_norm(), relu()) if stem is None else stem
    stages = []
    for i, count in enumerate(blocks):
        features = width * 2**i
        first = block(features, stride=1 if i == 0 else 2, project=i > 0 or block is not basic_block)
        stages.append((f"stage_{i}", serial(first, *(block(features) for _ in range(count - 1)))))
    return serial(("stem", stem), *stages, ("pool", global_avg_pool()), ("head", dense(classes)))._replace(
        name="resnet"
    )


def imagenet_stem(width: int = 64) -> Layer:
    """A 7×7 convolution and a 3×3 max pooling, both of stride 2, for images of some 224×224."""
    pool = max_pool((3, 3), stride=2, padding=((1, 1), (1, 1)))
    first = conv(width, (7, 7), stride=2, padding=((3, 3), (3, 3)), bias=None)
    return serial(first, batch_norm(), relu(), pool)._replace(name="imagenet_stem")


def basic_block(features: int, *, stride: int = 1, project: bool = False) -> Layer:
    """``relu(x + f(x))`` with ``f`` two 3×3 convolutions; with ``project`` a 1×1 convolution stands in the shortcut."""
    branch = [
        *(_conv3x3(features, stride), batch_norm(), relu()),
        *(_conv3x3(features, 1), batch_norm()),
    ]
    return serial(residual(*branch, shortcut=_projection(features, stride) if project else None), relu())._replace(
        name="basic_block"
    )


def bottleneck_block(features: int, *, stride: int = 1, project: bool = False, expansion: int = 4) -> Layer:
    """``relu(x + f(x))`` with ``f`` 1×1, 3×3 and 1×1 convolutions; the last widens to ``expansion · features``.

    The stride is the 3×3 convolution's, as in PyTorch; in the paper it is the first's.
    """
    wide = expansion * features
    branch = [
        *(conv(features, (1, 1), bias=None), batch_norm(), relu()),
        *(_conv3x3(features, stride), batch_norm(), relu()),
        *(conv(wide, (1, 1), bias=None), batch_norm()),
    ]
    return serial(residual(*branch, shortcut=_projection(wide, stride) if project else None), relu())._replace(
        name="bottleneck_block"
    )


def _conv3x3(features: int, stride: int) -> Layer:
    """A 3×3 convolution without bias, one zero on every side."""
    return conv(features, (3, 3), stride=stride, padding=((1, 1), (1, 1)), bias=None)


def _projection(features: int, stride: int) -> Layer:
    """The shortcut where shapes change: a 1×1 convolution and its normalisation."""
    return serial(conv(features, (1, 1), stride=stride, padding="VALID", bias=None), batch_norm())


def vit(
    classes: int, *, patch: int, layers: int, features: int, heads: int, positions: int, dropout_rate=None
) -> Layer:
    """A vision transformer on images ``(B, H, W, C)``: patches as a sequence, blocks, their mean, one dense layer.

    ``patch`` is the side of a patch, which divides H and W; ``positions`` the number of patches. The mean over the
    patches stands in the place of the class token. Source: Dosovitskiy et al., arXiv:2010.11929.
    """
    require_counts("vit", patch=patch, layers=layers)
    cut = serial(
        ("grid", _whole_patches(patch)),
        ("project", conv(features, (patch, patch), stride=patch, padding="VALID")),
        reshape(-1, features),
    )
    blocks = [
        (f"block_{i}", transformer_block(features, heads, causal=False, dropout_rate=dropout_rate))
        for i in range(layers)
    ]
    return serial(
        ("patches", cut),
        ("positions", learned_positions(positions)),
        *blocks,
        ("norm", layer_norm()),
        ("pool", global_avg_pool()),
        ("head", dense(classes)),
    )._replace(name="vit")


def _whole_patches(patch: int) -> Layer:
    """Images as they are, refused unless both sides are multiples of ``patch``."""

    def forward(params, x):
        if len(x.shape) != 4 or x.shape[1] % patch or x.shape[2] % patch:
            raise LayerError(f"expected images (B, H, W, C) with sides that {patch} divides, got shape {x.shape}")
        return x, ()

    return stateless("whole_patches", lambda key, x: forward((), x)[1], forward, lambda params, residuals, dy: ((), dy))


# --- language --------------------------------------------------------------------------------------------------------


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
