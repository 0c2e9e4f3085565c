"""What a GPT or a ResNet would take on many chips, as a command: `python -m fnet plan --help`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import jax

from fnet import layers
from fnet.core.placement import AXES
from fnet.layers import models
from fnet.optimizers import adamw
from fnet.training.chips import CUDA, TPU, Compiled, compile_step, look_for_compilers
from fnet.training.plans import CHIPS, Plan, abstract_step, on_paper, plan
from fnet.types import Layer


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m fnet plan", description=__doc__)
    add = parser.add_argument
    add("--model", choices=("gpt", "resnet18"), default="gpt")
    for name, value in {"layers": 12, "features": 768, "heads": 12, "vocabulary": 50304, "length": 1024}.items():
        add(f"--{name}", type=int, default=value, metavar="N", help=f"of a GPT (default {value})")
    add("--batch", type=int, metavar="N", help="examples of a step on all devices (default 8 for each part of them)")
    add("--devices", type=int, default=8, metavar="N", help="data, and an fsdp of 8 within a host (default 8)")
    add("--mesh", metavar="SIZES", help="instead of --devices: data=16,fsdp=8,tensor=8")
    add("--chip", choices=[*CHIPS], default="h100")
    add("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of products")
    add("--remat", action=argparse.BooleanOptionalAction, default=True, help="compute each block of a GPT again")
    add("--block", type=int, default=512, metavar="N", help="ids that attention looks at together (0: all)")
    add("--compile", choices=("cuda", "tpu"), help="beside the formulas what the true compiler says")
    return parser


def model_of(options: argparse.Namespace) -> tuple[Layer, Any]:
    """The model, and the shape of its inputs."""
    if options.model == "resnet18":
        x = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
        model = models.resnet(1000, blocks=(2, 2, 2, 2), width=64, stem=models.imagenet_stem(64))
    else:
        x = jax.ShapeDtypeStruct((1, options.length), "int32")
        size = options.block if 0 < options.block < options.length else None
        block = models.transformer_block(options.features, options.heads, causal=True, block_size=size)
        stack = layers.repeat(layers.remat(block) if options.remat else block, options.layers)
        positions, norm = layers.learned_positions(options.length), layers.layer_norm()
        body = layers.serial(("positions", positions), ("blocks", stack), ("norm", norm))
        model = layers.tied_embedding(options.vocabulary, options.features, body)
    return layers.mixed_precision(model) if options.precision == "bfloat16" else model, x


def sizes_of(options: argparse.Namespace) -> dict[str, int]:
    """The sizes of the mesh; ValueError for text that is none."""
    if options.mesh is None:
        near = math.gcd(options.devices, 8)
        sizes = {"data": options.devices // near, "fsdp": near}
        return {name: size for name, size in sizes.items() if size > 1} or {"data": 1}
    try:
        pairs = [part.split("=") for part in options.mesh.split(",")]
        sizes = {name.strip(): int(size) for name, size in pairs}
    except ValueError:
        sizes = {}
    if not sizes or set(sizes) - set(AXES) or min(sizes.values()) < 1:
        raise ValueError(f"--mesh {options.mesh}: expected sizes of {', '.join(AXES)}, such as data=16,fsdp=8")
    return sizes


def beside(made: Plan, compiled: Compiled) -> str:
    """What the compiler says, beside the plan."""
    planned: dict[str, float] = {}
    for each in made.moved:
        planned[each.kind] = planned.get(each.kind, 0) + each.bytes
    held = made.bytes["parameters, moments, state"]
    rows = [("parameters, moments, state, batch", held, compiled.arguments)]
    rows += [("scratch", sum(made.bytes.values()) - held, compiled.scratch)]
    rows += [
        (f"sent by {kind}", planned.get(kind, 0), compiled.sent[kind].bytes if kind in compiled.sent else 0)
        for kind in sorted({*planned, *compiled.sent})
    ]
    texts = [("MB on each device", "plan", "compiled")]
    texts += [(f"  {name}", f"{a / 1e6:,.1f}", f"{b / 1e6:,.1f}") for name, a, b in rows]
    a, b, c = (max(map(len, column)) for column in zip(*texts, strict=True))
    return "\n".join(f"{name:{a}}  {one:>{b}}  {two:>{c}}" for name, one, two in texts)


def main(arguments: Sequence[str]) -> str:
    """The plan as text."""
    command = parser()
    options = command.parse_args(arguments)
    if options.compile and options.chip not in (CUDA if options.compile == "cuda" else TPU):
        known = ", ".join(CUDA if options.compile == "cuda" else TPU)
        command.error(f"--compile {options.compile} --chip {options.chip}: expected one of {known}")
    if options.compile:
        look_for_compilers()
    try:
        sizes = sizes_of(options)
        (model, x), optimizer = model_of(options), adamw(1e-3)
        batch = options.batch or 8 * sizes.get("data", 1) * sizes.get("fsdp", 1)
        placement = on_paper(sizes)
        made = plan(model, x, optimizer, placement, batch, chip=options.chip)
        if not options.compile:
            return str(made)
        compiled = compile_step(*abstract_step(model, x, optimizer, batch), placement, options.chip)
        return f"{made}\n\n{beside(made, compiled)}"
    except (ValueError, ImportError) as error:
        command.error(str(error))
