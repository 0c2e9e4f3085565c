"""Layers: each forward with its backward by hand beneath it."""

from fnet.layers.activation import gelu, identity, leaky_relu, relu, sigmoid, softmax, softplus, step, tanh
from fnet.layers.attention import attention, dot_product_attention
from fnet.layers.combinators import concatenate, parallel, remat, repeat, residual, serial
from fnet.layers.convolution import conv, conv_transpose
from fnet.layers.dense import dense, flatten, reshape
from fnet.layers.dropout import dropout
from fnet.layers.embedding import (
    embedding,
    learned_positions,
    rotary_positions,
    rotate,
    sinusoidal_positions,
    tied_embedding,
)
from fnet.layers.masks import by_position, drop_mask
from fnet.layers.normalization import batch_norm, group_norm, layer_norm, rms_norm
from fnet.layers.pooling import avg_pool, global_avg_pool, global_max_pool, max_pool
from fnet.layers.recurrent import bidirectional, gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell, stacked, zero_carry
from fnet.layers.wrappers import Policy, freeze, mixed_precision, with_hand_backward

__all__ = [
    "Policy",
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
    "lstm",
    "lstm_cell",
    "max_pool",
    "mixed_precision",
    "parallel",
    "relu",
    "remat",
    "repeat",
    "reshape",
    "residual",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "rotary_positions",
    "rotate",
    "serial",
    "sigmoid",
    "sinusoidal_positions",
    "softmax",
    "softplus",
    "stacked",
    "step",
    "tanh",
    "tied_embedding",
    "with_hand_backward",
    "zero_carry",
]
