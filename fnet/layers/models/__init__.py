"""Models: compositions of layers, and nothing else.

`plain`: dense layers one after another; `images`; `language`.
"""

from fnet.layers.models.images import (
    basic_block,
    bottleneck_block,
    imagenet_stem,
    inverted_residual,
    lenet5,
    mobilenet_v3_small,
    resnet,
    vit,
)
from fnet.layers.models.language import gpt, llama, llama_block, recurrent_lm, transformer_block
from fnet.layers.models.plain import autoencoder, mlp

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
    "recurrent_lm",
    "resnet",
    "transformer_block",
    "vit",
]
