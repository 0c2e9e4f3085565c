"""Layers: each forward with its backward by hand beneath it."""

from fnet.layers.activation import gelu, identity, leaky_relu, relu, sigmoid, softmax, softplus, step, tanh
from fnet.layers.combinators import serial
from fnet.layers.dense import dense, flatten

__all__ = [
    "dense",
    "flatten",
    "gelu",
    "identity",
    "leaky_relu",
    "relu",
    "serial",
    "sigmoid",
    "softmax",
    "softplus",
    "step",
    "tanh",
]
