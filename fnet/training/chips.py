"""A training step compiled for many chips that are not here, by the compilers of those who make them.

    pip install 'fnet-jax[compile-cuda]'        NVIDIA's, for H100 and H200
    pip install 'fnet-jax[compile-tpu]'         Google's, for any TPU

Neither needs the chip or its driver. What they say of memory and of what is sent is what would run.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from fnet.core.extras import need
from fnet.core.jax_insides import backends_are_initialized, cuda_tools
from fnet.core.placement import Placement
from fnet.core.platforms import traced_for
from fnet.training.collectives import Sent, sent_by_step
from fnet.training.sharding import sharded
from fnet.training.steps import Step
from fnet.types import PyTree, TrainState

# what XLA has to know of an H100, as NVIDIA's CUDA says of it (cudaGetDeviceProperties); an H200 has more memory
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: MEMORY shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
CUDA = {"h100": 84942979072, "h200": 150754820096}
# pods of so many chips, as Google lets them
SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {
    **{4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
    **{1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16", 6144: "16x16x24"},
}
TPU = {"v5e": SQUARES, "v6e": SQUARES, "v5p": CUBES}


class Compiled(NamedTuple):
    """What a compiler says of a step, for each device: bytes, and what is sent in it."""

    arguments: int  # the state and the batch
    scratch: int
    sent: dict[str, Sent]
    text: str  # the program


def compile_step(step: Step, ts: TrainState, batch: PyTree, placement: Placement, chip: str) -> Compiled:
    """A step compiled for a placement, as `plans.on_paper` makes it, on devices that are ``chip``: of `CUDA` or `TPU`.

    ``ts`` and ``batch`` are arrays or `jax.ShapeDtypeStruct`s, the batch that of all devices. Raises ValueError for a
    chip that is not known and a number of chips that are not made, and ImportError, with what to install, where the
    compiler is not there.
    """
    names, shape = placement.mesh.axis_names, placement.mesh.axis_sizes
    devices = np.array(devices_of(chip, math.prod(shape))).reshape(shape)
    placement = placement._replace(mesh=Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names)))
    where = placement.of(ts)
    own = jax.tree.map(lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to), ts, where)
    split = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement.of_batch(a.shape))  # noqa: E731
    program = jax.jit(sharded(step, placement), donate_argnums=0, out_shardings=(where, placement.whole))
    with traced_for("cuda" if chip in CUDA else "tpu"):
        made = program.lower(own, jax.tree.map(split, batch)).compile(_tools() if chip in CUDA else None)
    memory: Any = made.memory_analysis()
    text = made.as_text() or ""
    return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, sent_by_step(text), text)


def _tools() -> dict[str, Any]:
    """Where NVIDIA's assembler and its library of functions are, as the package of both has them."""
    package: Any = need("compile_step", "nvidia.cuda_nvcc")
    folder = Path(next(iter(package.__path__)))
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return cuda_tools(str(folder))


def look_for_compilers() -> None:
    """Let jax find the compilers, and look for no chip of theirs: before anything else of it looks for devices."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which looks for CUDA's libraries, and a driver
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # which asks Google's cloud what machine this is
    if not backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")
    jax.devices()


def devices_of(chip: str, count: int) -> list[Any]:
    """Descriptions of so many chips, for the compiler alone."""
    look_for_compilers()
    if chip not in {*CUDA, *TPU}:
        raise ValueError(f"compile_step: chip = {chip!r}; expected one of {', '.join([*CUDA, *TPU])}")
    if chip in CUDA:
        if count > 8 and count % 8:
            raise ValueError(f"compile_step: {count} devices; expected at most 8, or a multiple of 8, those of a host")
        need("compile_step", "jax_cuda12_plugin")
        topology = f"1x{max(1, count // 8)}x{min(count, 8)}"
        config = H100.replace("MEMORY", str(CUDA[chip]))
        try:
            return topologies.get_topology_desc(platform="cuda", topology=topology, target_config=config).devices
        except NotImplementedError as error:
            raise RuntimeError(
                "compile_step: jax has looked for its devices before, and found no driver of NVIDIA's; expected "
                "JAX_PLATFORMS=cpu in the environment, or look_for_compilers() before anything of jax is computed"
            ) from error
    if count not in TPU[chip]:
        made = ", ".join(map(str, TPU[chip]))
        raise ValueError(f"compile_step: {count} chips of {chip}; expected one of {made}, as they are put together")
    need("compile_step", "libtpu")
    return topologies.get_topology_desc(f"{chip}:{TPU[chip][count]}", platform="tpu").devices
