"""A residual network of 8 layers with batch normalisation on 4,000 handwritten digits, trained by the backward by hand.

    python -m experiments.digits_resnet
    python -m experiments.digits_resnet --engine autodiff
    python -m experiments.digits_resnet --blocks 2 2 2 --seeds 0    14 layers
    python -m experiments.digits_resnet --held-out 500              how the settings were chosen: the test digits unseen

The data, the splits, the moved images and the training are those of `digits_lenet`; the model differs, and with it the
state: tests normalise by the running statistics that the training has gathered. The stem, a 5×5 convolution of stride
2, halves the images first, so that the stages work at 14×14, 7×7 and 4×4. Source: He et al., arXiv:1512.03385.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from rich.console import Console

import fnet
from experiments.common import main
from experiments.digits_lenet import measure
from experiments.options import Amount, ByEngine, Count, Counts, Resumable, Seeds, Whole
from fnet.layers import batch_norm, conv, relu
from fnet.layers.models import resnet


@dataclasses.dataclass(frozen=True)
class Config(Resumable, ByEngine):
    """Train a residual network on handwritten digits, from several seeds."""

    blocks: Counts = (1, 1, 1)  # basic blocks of each stage: two convolutions each
    width: Count = 16  # features of the first stage; each later one has twice as many
    engine: Literal["backprop", "autodiff"] = "backprop"  # by hand, or by jax
    learning_rate: Amount = 5e-3  # Adam's first; half a cosine brings it to 0
    batch_size: Count = 50  # a divisor of 4,000: a smaller last batch would be one more step to compile
    epochs: Count = 12
    shift: Whole = 2  # pixels by which a training image is moved at most, each way
    seeds: Seeds = (0, 1, 2)  # of the splits, the parameters, the orders and the shifts
    test_size: Count = 1000  # of the 5,000 digits
    held_out: Whole = 0  # above 0, test on so many of the training digits instead and leave the test digits alone


def network(config: Config) -> fnet.Layer:
    """`resnet` on a stem that halves the images."""
    stem = fnet.serial(conv(config.width, (5, 5), stride=2, bias=None), batch_norm(), relu())
    return resnet(10, blocks=config.blocks, width=config.width, stem=stem)


def run(config: Config, console: Console | None = None) -> dict:
    """Train the network from every seed, print the tables and write the run folder; returns what was measured."""
    return measure("digits_resnet", network(config), config, console)


if __name__ == "__main__":
    main(run, Config)
