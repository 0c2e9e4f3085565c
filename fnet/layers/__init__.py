"""Layers: each forward with its backward by hand beneath it, and the models that are made of them.

A file for each family; `initializers` of their parameters; `children`: how a layer is called, under its path and
watched; `wrappers`: `stateless`, the shortest way to a layer of your own; `models`: mlp to gpt.

Imports types and core alone: no loss, no data, no optimizer.
"""

from fnet.core.trees import Copies
from fnet.layers.activation import gelu, identity, leaky_relu, relu, sigmoid, softmax, softplus, step, tanh
from fnet.layers.attention import attention
from fnet.layers.combinators import concatenate, parallel, remat, repeat, residual, serial
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
    sinusoidal_positions,
    tied_embedding,
    yarn_frequencies,
    yarn_scale,
)
from fnet.layers.masks import by_position, drop_mask
from fnet.layers.normalization import batch_norm, group_norm, layer_norm, rms_norm
from fnet.layers.pooling import avg_pool, global_avg_pool, global_max_pool, max_pool
from fnet.layers.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell, zero_carry
from fnet.layers.relative import alibi, relative_positions
from fnet.layers.stacking import bidirectional, stacked
from fnet.layers.wrappers import Policy, freeze, mixed_precision, stateless, with_hand_backward

__all__ = [
    "Copies",
    "Policy",
    "alibi",
    "attention",
    "avg_pool",
    "batch_norm",
    "bidirectional",
    "by_position",
    "concatenate",
    "conv",
    "conv_transpose",
    "dense",
    "dot_product_attention",
    "drop_mask",
    "dropout",
    "embedding",
    "flatten",
    "freeze",
    "gelu",
    "global_avg_pool",
    "global_max_pool",
    "group_norm",
    "gru",
    "gru_cell",
    "identity",
    "layer_norm",
    "leaky_relu",
    "learned_positions",
    "llama3_frequencies",
    "lstm",
    "lstm_cell",
    "max_pool",
    "mixed_precision",
    "parallel",
    "relative_positions",
    "relu",
    "remat",
    "repeat",
    "reshape",
    "residual",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "rotary_frequencies",
    "rotary_positions",
    "rotate",
    "serial",
    "sigmoid",
    "sinusoidal_positions",
    "softmax",
    "softplus",
    "stacked",
    "stateless",
    "step",
    "tanh",
    "tied_embedding",
    "with_hand_backward",
    "yarn_frequencies",
    "yarn_scale",
    "zero_carry",
]
