"""Layers: each forward with its backward by hand beneath it, and the models that are made of them.

A file for each family; `initializers` of their parameters; `children`: how a layer is called, under its path and
watched; `wrappers`: `stateless`, the shortest way to a layer of your own; `models`: mlp to gpt.

Imports types and core alone: no loss, no data, no optimizer.
"""

from fnet.core.trees import Copies
from fnet.layers.activation import (
    hard_sigmoid,
    hardmax,
    identity,
    log_softmax,
    sigmoid,
    softmax,
    softplus,
    softsign,
    step,
    tanh,
)
from fnet.layers.attention import attention
from fnet.layers.combinators import add, concatenate, multiply, parallel, remat, repeat, residual, serial
from fnet.layers.convolution import conv, conv_transpose
from fnet.layers.dense import dense, flatten, reshape
from fnet.layers.dot_product import dot_product_attention
from fnet.layers.dropout import dropout
from fnet.layers.embedding import (
    embedding,
    learned_positions,
    llama3_frequencies,
    rotary_frequencies,
    rotary_positions,
    rotate,
    rotate_by,
    sinusoidal_positions,
    tied_embedding,
    yarn_frequencies,
    yarn_scale,
)
from fnet.layers.gating import gated, geglu, gelu, glu, hard_swish, mish, reglu, silu, squeeze_and_excitation, swiglu
from fnet.layers.masks import by_position, drop_mask
from fnet.layers.normalization import batch_norm, group_norm, l2_normalize, layer_norm, local_response_norm, rms_norm
from fnet.layers.padding import pad
from fnet.layers.patches import windowed
from fnet.layers.pooling import (
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    global_avg_pool,
    global_max_pool,
    lp_pool,
    max_pool,
)
from fnet.layers.rectifiers import celu, elu, leaky_relu, prelu, relu, selu
from fnet.layers.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell, zero_carry
from fnet.layers.relative import alibi, biased, relative_positions, relative_positions_2d
from fnet.layers.reparametrized import fold_spectral_norm, fold_weight_norm, spectral_norm, weight_norm
from fnet.layers.resizing import pixel_shuffle, pixel_unshuffle, resize
from fnet.layers.sampling import affine_grid, grid_sample
from fnet.layers.stacking import bidirectional, stacked
from fnet.layers.thresholds import hard_tanh, shrink, tanh_shrink, threshold
from fnet.layers.wrappers import Policy, freeze, mixed_precision, stateless, with_hand_backward

__all__ = [
    "Copies",
    "Policy",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "add",
    "affine_grid",
    "alibi",
    "attention",
    "avg_pool",
    "batch_norm",
    "biased",
    "bidirectional",
    "by_position",
    "celu",
    "concatenate",
    "conv",
    "conv_transpose",
    "dense",
    "dot_product_attention",
    "drop_mask",
    "dropout",
    "elu",
    "embedding",
    "flatten",
    "fold_spectral_norm",
    "fold_weight_norm",
    "freeze",
    "gated",
    "geglu",
    "gelu",
    "global_avg_pool",
    "global_max_pool",
    "glu",
    "grid_sample",
    "group_norm",
    "gru",
    "gru_cell",
    "hard_sigmoid",
    "hard_swish",
    "hard_tanh",
    "hardmax",
    "identity",
    "l2_normalize",
    "layer_norm",
    "leaky_relu",
    "learned_positions",
    "llama3_frequencies",
    "local_response_norm",
    "log_softmax",
    "lp_pool",
    "lstm",
    "lstm_cell",
    "max_pool",
    "mish",
    "mixed_precision",
    "multiply",
    "pad",
    "parallel",
    "pixel_shuffle",
    "pixel_unshuffle",
    "prelu",
    "reglu",
    "relative_positions",
    "relative_positions_2d",
    "relu",
    "remat",
    "repeat",
    "reshape",
    "residual",
    "resize",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "rotary_frequencies",
    "rotary_positions",
    "rotate",
    "rotate_by",
    "selu",
    "serial",
    "shrink",
    "sigmoid",
    "silu",
    "sinusoidal_positions",
    "softmax",
    "softplus",
    "softsign",
    "spectral_norm",
    "squeeze_and_excitation",
    "stacked",
    "stateless",
    "step",
    "swiglu",
    "tanh",
    "tanh_shrink",
    "threshold",
    "tied_embedding",
    "weight_norm",
    "windowed",
    "with_hand_backward",
    "yarn_frequencies",
    "yarn_scale",
    "zero_carry",
]
