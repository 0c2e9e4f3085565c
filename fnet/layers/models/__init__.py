"""Models: compositions of layers, and nothing else.

`plain`: dense layers one after another; `images`; `language`; `sequences`: causal convolutions.
"""

from fnet.layers.models.images import (
    basic_block,
    bottleneck_block,
    imagenet_stem,
    inverted_residual,
    lenet5,
    mobilenet_v3_small,
    patch_merging,
    resnet,
    swin,
    swin_block,
    unet,
    vit,
)
from fnet.layers.models.language import (
    gpt,
    llama,
    llama_block,
    recurrent_lm,
    t5_block,
    t5_encoder,
    transformer_block,
)
from fnet.layers.models.plain import autoencoder, mlp
from fnet.layers.models.sequences import wavenet, wavenet_block

__all__ = [
    "autoencoder",
    "basic_block",
    "bottleneck_block",
    "gpt",
    "imagenet_stem",
    "inverted_residual",
    "lenet5",
    "llama",
    "llama_block",
    "mlp",
    "mobilenet_v3_small",
    "patch_merging",
    "recurrent_lm",
    "resnet",
    "swin",
    "swin_block",
    "t5_block",
    "t5_encoder",
    "transformer_block",
    "unet",
    "vit",
    "wavenet",
    "wavenet_block",
]
