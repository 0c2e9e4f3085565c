"""Models of images: convolutions, residual networks, MobileNet, U-Nets, vision transformers, shifted windows.

Legend: B batch, H W height and width, S spatial axes, C channels, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fnet.core.checks import require_counts
from fnet.layers import (
    attention,
    batch_norm,
    concatenate,
    conv,
    conv_transpose,
    dense,
    dropout,
    flatten,
    gelu,
    global_avg_pool,
    hard_sigmoid,
    hard_swish,
    identity,
    layer_norm,
    learned_positions,
    max_pool,
    parallel,
    relative_positions_2d,
    relu,
    reshape,
    residual,
    serial,
    squeeze_and_excitation,
    windowed,
)
from fnet.layers.initializers import normal
from fnet.layers.models.language import transformer_block
from fnet.layers.windows import AXES
from fnet.layers.wrappers import stateless
from fnet.types import Layer, LayerError


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


def mobilenet_v3_small(classes: int = 1000, *, dropout_rate=0.2) -> Layer:
    """MobileNetV3-Small on images ``(B, H, W, 3)``: a stem, eleven `inverted_residual` blocks, two dense layers.

    2,542,856 parameters for 1,000 classes, 1,615,848 of them in the two dense layers. Widths, ε = 0.001, decay 0.99 and
    the stored unbiased variance are torchvision's; ``dropout_rate=None`` leaves the dropout before the last layer out.
    Source: Howard et al., arXiv:1905.02244, table 2.

    >>> import jax
    >>> image = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
    >>> params, _ = jax.eval_shape(mobilenet_v3_small(10).init, jax.random.key(0), image)
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    1528106
    """
    swish = hard_swish()
    blocks = [  # widths in, between and out, that of the squeeze, and what else
        inverted_residual(16, 16, 16, squeeze=8, stride=2),
        inverted_residual(16, 72, 24, stride=2),
        inverted_residual(24, 88, 24),
        inverted_residual(24, 96, 40, squeeze=24, kernel_size=5, stride=2, activation=swish),
        inverted_residual(40, 240, 40, squeeze=64, kernel_size=5, activation=swish),
        inverted_residual(40, 240, 40, squeeze=64, kernel_size=5, activation=swish),
        inverted_residual(40, 120, 48, squeeze=32, kernel_size=5, activation=swish),
        inverted_residual(48, 144, 48, squeeze=40, kernel_size=5, activation=swish),
        inverted_residual(48, 288, 96, squeeze=72, kernel_size=5, stride=2, activation=swish),
        inverted_residual(96, 576, 96, squeeze=144, kernel_size=5, activation=swish),
        inverted_residual(96, 576, 96, squeeze=144, kernel_size=5, activation=swish),
    ]
    drop = [] if dropout_rate is None else [("dropout", dropout(dropout_rate))]
    return serial(
        ("stem", _normed_conv(16, 3, stride=2, activation=swish)),
        *((f"block_{i}", block) for i, block in enumerate(blocks)),
        ("last", _normed_conv(576, 1, activation=swish)),
        ("pool", global_avg_pool()),
        ("hidden", dense(1024)),
        ("hard_swish", hard_swish()),
        *drop,
        ("head", dense(classes)),
    )._replace(name="mobilenet_v3_small")


def inverted_residual(
    inputs: int,
    expanded: int,
    features: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    squeeze: int | None = None,
    activation: Layer = relu(),
) -> Layer:
    """A block of MobileNetV3 from ``inputs`` to ``features`` maps: 1×1 to ``expanded``, one filter each, 1×1 back.

    Children are ``expand`` (none where ``expanded`` is ``inputs``), ``depthwise``, ``squeeze`` and ``project``. With
    ``squeeze`` a `squeeze_and_excitation` of that width, its gate `hard_sigmoid`, stands before the last. ``x`` is
    added where nothing changes its shape: stride 1 and ``inputs`` equal to ``features``. Source: Howard et al.,
    arXiv:1905.02244; Sandler et al., arXiv:1801.04381.
    """
    require_counts(
        "inverted_residual", inputs=inputs, expanded=expanded, features=features, kernel_size=kernel_size, stride=stride
    )
    branch = [("expand", _normed_conv(expanded, 1, activation=activation))] if expanded != inputs else []
    branch.append(
        ("depthwise", _normed_conv(expanded, kernel_size, stride=stride, groups=expanded, activation=activation))
    )
    if squeeze is not None:
        branch.append(("squeeze", squeeze_and_excitation(expanded, squeeze, gate=hard_sigmoid())))
    branch.append(("project", _normed_conv(features, 1)))
    block = residual if stride == 1 and inputs == features else serial
    return block(*branch)._replace(name="inverted_residual")


def _normed_conv(features: int, size: int, *, stride: int = 1, groups: int = 1, activation: Layer | None = None):
    """A convolution without bias, half a kernel of zeros on every side, its normalisation and an activation."""
    edge = (size - 1) // 2
    first = conv(features, (size, size), stride=stride, padding=((edge, edge), (edge, edge)), groups=groups, bias=None)
    norm = batch_norm(decay=0.99, eps=0.001, variance="unbiased")
    return serial(first, norm, *([] if activation is None else [activation]))


def unet(
    classes: int,
    *,
    dimensions: int = 2,
    widths: Sequence[int] = (64, 128, 256, 512, 1024),
    norm: Callable[[], Layer] | None = None,
    up: Callable[[int], Layer] | None = None,
    early: bool = False,
) -> Layer:
    """A U-Net on ``(B, *S, C)``: logits of every place, ``(B, *S, classes)``, with the details of the way down.

    A level is two convolutions by 3 along each of the ``dimensions`` spatial axes, with ``widths`` features from the
    top to the bottom. Between levels stand max pooling by 2 on the way down and ``up(features)`` on the way up, a layer
    that doubles the sides, by default a transposed convolution by 2; there what the level made on the way down is
    joined before what comes up, and two convolutions follow. A last one by 1 makes the classes. ``norm`` makes the
    normalization between a convolution, then without a bias, and its relu. With ``early`` features double before the
    pooling, not behind it: on the way down the first convolution of a level has half its width, and ``up`` keeps the
    features that it gets.

    ``unet(2)`` is that of Ronneberger et al., arXiv:1505.04597, with 31,030,658 parameters on one channel. Theirs pads
    nothing and crops what it joins; here outputs are as large as inputs, and a `LayerError` refuses sides that
    ``2^(levels − 1)`` does not divide. ``unet(3, dimensions=3, widths=(64, 128, 256, 512), norm=batch_norm,
    early=True)`` is the 3-D U-Net of Çiçek et al., arXiv:1606.06650; their 19,069,955 parameters, on three channels,
    are those without ``norm`` and with an ``up`` without biases.

    Raises ValueError for other than one to three ``dimensions``, for no ``widths`` and for odd ones with ``early``.

    >>> import jax
    >>> model, x = unet(4, widths=(8, 16)), jax.ShapeDtypeStruct((2, 6, 10, 3), "float32")
    >>> params, state = model.init(jax.random.key(0), x)
    >>> jax.eval_shape(model.forward, params, state, x)[0].shape
    (2, 6, 10, 4)
    """
    require_counts("unet", classes=classes, dimensions=dimensions, **{f"widths[{i}]": w for i, w in enumerate(widths)})
    if not widths or (early and any(width % 2 for width in widths)):
        raise ValueError(f"unet: widths = {widths!r}; expected at least one{', each of them even' if early else ''}")
    if dimensions not in AXES:
        raise ValueError(f"unet: dimensions = {dimensions}; expected one of {', '.join(map(str, AXES))}")
    one, two, three = ((size,) * dimensions for size in (1, 2, 3))
    make_up = up or (lambda features: conv_transpose(features, two, stride=2))

    def convolutions(*features: int) -> Layer:
        layers = []
        for width in features:
            layers += [conv(width, three)] if norm is None else [conv(width, three, bias=None), norm()]
            layers.append(relu())
        return serial(*layers)

    def level(i: int) -> Layer:
        width = widths[i]
        down = convolutions(width // 2 if early else width, width)
        if i == len(widths) - 1:
            return down
        below = serial(
            ("pool", max_pool(two)),
            ("level", level(i + 1)),
            ("up", make_up(widths[i + 1] if early else width)),
        )
        return serial(
            ("down", down),
            ("fork", parallel(("skip", identity()), ("below", below))),
            ("join", concatenate()),
            ("merge", convolutions(width, width)),
        )

    whole = _whole_patches(2 ** (len(widths) - 1), dimensions)
    return serial(("grid", whole), ("level", level(0)), ("head", conv(classes, one)))._replace(name="unet")


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


def swin_block(
    features: int, heads: int, *, window: int = 7, shift: int = 0, expansion: int = 4, drop_path=None
) -> Layer:
    """``x + attention(norm(x))`` within windows, then ``x + mlp(norm(x))``, on images ``(B, H, W, D)``.

    Windows have ``window`` M × M pixels, moved by ``shift``, as in `windowed`; in Swin it is 0 and M // 2 in turn. The
    scores have the bias of `relative_positions_2d`; the mlp is ``expansion · D`` wide, with gelu. ``drop_path`` p is
    stochastic depth: in training each example goes without a branch with probability p, and has it divided by 1 − p
    else, by `dropout` with all axes but the first shared. Sources: Liu et al., arXiv:2103.14030; Huang et al.,
    arXiv:1603.09382.
    """
    drop = [] if drop_path is None else [dropout(drop_path, shared_axes=(1, 2, 3))]
    small = normal(0.02)
    attend = attention(heads, features=features, relative=relative_positions_2d(heads, window), weights=small)
    return serial(
        ("attend", residual(("norm", layer_norm()), ("attention", windowed(attend, window, shift=shift)), *drop)),
        (
            "mlp",
            residual(
                ("norm", layer_norm()),
                ("wide", dense(expansion * features, weights=small)),
                gelu(),
                ("narrow", dense(features, weights=small)),
                *drop,
            ),
        ),
    )._replace(name="swin_block")


def patch_merging(features: int) -> Layer:
    """Each 2 × 2 pixels as one, normalised and projected: ``(B, H, W, C)`` to ``(B, H/2, W/2, features)``, no bias.

    The channels of a column's two pixels stand first, as in Swin's code. Source: Liu et al., arXiv:2103.14030.
    """
    project = dense(features, weights=normal(0.02), bias=None)
    return serial(("merge", _two_by_two()), ("norm", layer_norm()), ("project", project))._replace(name="patch_merging")


def _two_by_two() -> Layer:
    """``(B, H, W, C)`` to ``(B, H/2, W/2, 4 C)``: pixels ``(0, 0), (1, 0), (0, 1), (1, 1)`` of each four in a row."""

    def forward(params, x):
        if len(x.shape) != 4 or x.shape[1] % 2 or x.shape[2] % 2:
            raise LayerError(f"expected images (B, H, W, C) of even sides, got shape {x.shape}")
        b, h, w, c = x.shape
        y = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5)
        return y.reshape(b, h // 2, w // 2, 4 * c), ()

    def backward(params, residuals, dy):  # entries only move: back to where they came from
        b, h, w, c = dy.shape
        dx = dy.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 4, 2, 3, 5)
        return (), dx.reshape(b, 2 * h, 2 * w, c // 4)

    return stateless("two_by_two", lambda key, x: (), forward, backward)


def swin(
    classes: int,
    *,
    features: int = 96,
    blocks: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    window: int = 7,
    patch: int = 4,
    expansion: int = 4,
    drop_path=None,
) -> Layer:
    """A Swin transformer on images ``(B, H, W, C)``: patches, stages of `swin_block`, their mean, one dense layer.

    The first stage has ``features`` for each patch of ``patch`` × ``patch`` pixels; `patch_merging` before each later
    one halves the sides and doubles the features. ``heads`` are those of each stage's blocks, of which every second is
    shifted. At every stage ``window`` divides the sides. ``drop_path`` is the last block's, and rises to it from 0 at
    the first. The defaults are Swin-T, which has 28,288,354 parameters with 1000 classes; its images have 224 × 224
    pixels. Source: Liu et al., arXiv:2103.14030.

    >>> import jax
    >>> model = swin(10, features=8, blocks=(2, 2), heads=(1, 2), window=2, patch=2)
    >>> shapes, _ = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), "float32"))
    >>> sorted(shapes)
    ['head', 'merge_1', 'norm', 'patches', 'pool', 'stage_0', 'stage_1']
    """
    require_counts("swin", features=features, patch=patch, **{f"blocks[{i}]": n for i, n in enumerate(blocks)})
    if len(blocks) != len(heads) or not len(blocks):
        raise ValueError(f"swin: blocks = {blocks}, heads = {heads}; expected a number of each for every stage")
    if drop_path is not None and sum(blocks) == 1:
        raise ValueError(f"swin: drop_path = {drop_path} with one block; expected two or more, over which it rises")
    first = [
        ("grid", _whole_patches(patch)),
        ("project", conv(features, (patch, patch), stride=patch, padding="VALID")),
        ("norm", layer_norm()),
    ]
    stages = []
    for i, count in enumerate(blocks):
        width = features * 2**i
        if i:
            stages.append((f"merge_{i}", patch_merging(width)))
        stage = []
        for j in range(count):
            k = sum(blocks[:i]) + j
            drop = None if drop_path is None or not k else drop_path * k / (sum(blocks) - 1)
            block = swin_block(
                width, heads[i], window=window, shift=j % 2 * (window // 2), expansion=expansion, drop_path=drop
            )
            stage.append((f"block_{j}", block))
        stages.append((f"stage_{i}", serial(*stage)))
    last = [("norm", layer_norm()), ("pool", global_avg_pool()), ("head", dense(classes))]
    return serial(("patches", serial(*first)), *stages, *last)._replace(name="swin")


def _whole_patches(patch: int, dimensions: int = 2) -> Layer:
    """Images as they are, refused unless all sides are multiples of ``patch``."""

    def forward(params, x):
        if len(x.shape) != dimensions + 2 or any(size % patch for size in x.shape[1:-1]):
            raise LayerError(f"expected {AXES[dimensions]} with sides that {patch} divides, got shape {x.shape}")
        return x, ()

    return stateless("whole_patches", lambda key, x: forward((), x)[1], forward, lambda params, residuals, dy: ((), dy))
