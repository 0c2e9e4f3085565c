"""Inference without the model's code: a program and its weights in one file.

export_inference(model, params, state, x, "mlp.inference")       y = load_inference("mlp.inference")(x)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype as canonical

from fnet.core.extras import need
from fnet.core.files import first_line
from fnet.core.platforms import PLATFORMS
from fnet.export.files import ExportError, digest, kind, read_tensors, require_new, serialized, whole_export
from fnet.export.weights import as_jax, to_tensors
from fnet.layers.cells import LSTMCarry
from fnet.layers.children import apply
from fnet.types import Layer, PyTree

FORMAT = "1"  # of the files

jax.export.register_namedtuple_serialization(LSTMCarry, serialized_name="fnet.layers.recurrent.LSTMCarry")


class Inference(NamedTuple):
    """A model's forward as a function of its inputs alone, called like the function it holds."""

    call: Callable[[PyTree], PyTree]
    platforms: tuple[str, ...]  # that it was compiled for, such as cpu, cuda, tpu
    inputs: str  # what it takes, such as float32[b, 784]

    def __call__(self, x: PyTree) -> PyTree:
        return self.call(x)


def export_inference(
    model: Layer,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    path: str | Path,
    *,
    any_batch: bool = False,
    platforms: str | Sequence[str] | None = None,
) -> Inference:
    """Write ``apply(model, params, state, x)`` to one file, as a program and its weights; returns what it reads back.

    The program takes inputs of the shapes and dtypes of ``x``; with ``any_batch`` their first axis may have any size.
    ``platforms`` are those it can run on, such as ``("cpu", "cuda")``, by default the one at hand, which must be among
    them: before the file is put in its place, what was read back from it is run on ``x``, and must give the bits of
    the model's own compiled forward. The weights are arguments of the program, since XLA rounds otherwise where they
    are constants; the file is safetensors', with the weights under their paths.

    Raises ExportError for a file that exists, a model that cannot be exported like this, and bits that differ.
    """
    _require_flatbuffers()
    require_new(path)
    here = jax.export.default_export_platform()
    if platforms is not None:
        platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
        if here not in platforms:
            raise ExportError(f"platforms are {', '.join(platforms)}; expected {here} among them, where it is checked")
        if unknown := [name for name in platforms if name not in (*PLATFORMS, here)]:
            raise ExportError(
                f"platforms are {', '.join(platforms)}; expected {', '.join(PLATFORMS)}, not {unknown[0]}"
            )
    weights = {"params": params, "state": state}
    arrays, structure = to_tensors(weights), jax.tree.structure(weights)

    def forward(leaves, x):
        tree = jax.tree.unflatten(structure, leaves)
        return apply(model, tree["params"], tree["state"], x)

    x = jax.tree.map(jnp.asarray, x)
    batch = jax.export.symbolic_shape("b") if any_batch else ()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*batch, *leaf.shape[len(batch) :]), leaf.dtype), x)
    try:
        exported = jax.export.export(jax.jit(forward), platforms=platforms)(jax.tree.leaves(weights), shapes)
        program = exported.serialize()
    except Exception as error:  # of the model's own code, of jax, of XLA
        remedy = "with any_batch=False it is for inputs of the size of x" if any_batch else "see the error above"
        raise ExportError(f"{model.name} cannot be exported ({first_line(error)}); {remedy}") from error
    arrays = {**arrays, "program": np.frombuffer(program, np.uint8)}
    about = {"fnet_inference": FORMAT, "order": json.dumps(list(arrays)), "sha256": digest(arrays)}
    with whole_export(path) as part:
        part.write_bytes(serialized(arrays, about))
        inference = _inference(part, path)
        compiled = jax.jit(lambda params, state, x: apply(model, params, state, x))
        if _bits(compiled(params, state, x)) != _bits(inference(x)):
            raise ExportError(
                f"{model.name}: what was read back from {path} gives other bits than its compiled forward; expected "
                "the same: report it"
            )
    return inference


def load_inference(path: str | Path) -> Inference:
    """What `export_inference` wrote: ``load_inference(path)(x)`` are the outputs.

    It is compiled at its first call for inputs of one shape. Raises ExportError for a file that is none or is not as
    it was written, and one for other platforms; the call raises it for inputs that do not fit.
    """
    return _inference(path, path)


def _inference(path: str | Path, name: str | Path) -> Inference:
    """What is in the file at ``path``; errors call it ``name``."""
    _require_flatbuffers()
    arrays, about = read_tensors(path)
    if about.get("fnet_inference") != FORMAT:
        raise ExportError(
            f"{name} holds {', '.join(list(arrays)[:4]) or 'nothing'} and has format {about.get('fnet_inference')}; "
            f"expected format {FORMAT}: give a file that export_inference of this fnet wrote"
        )
    if (found := digest(arrays)) != (expected := about.get("sha256", "none")):
        raise ExportError(
            f"{name} is not what was written: expected SHA-256 {expected[:12]}…, found {found[:12]}…; export it again"
        )
    try:
        *weights, program = (arrays[name] for name in json.loads(about["order"]))
        exported = jax.export.deserialize(bytearray(program.tobytes()))
    except Exception as error:  # of flatbuffers, of jax
        raise ExportError(
            f"{name} cannot be read by this jax, {jax.__version__} ({first_line(error)}); expected one that is not "
            "older than the jax that wrote it: install that, or export again"
        ) from error
    if (here := jax.export.default_export_platform()) not in exported.platforms:
        raise ExportError(
            f"{name} is for {', '.join(exported.platforms)}; expected {here}, which is here: export it with "
            f"platforms=({', '.join(map(repr, (*exported.platforms, here)))})"
        )
    if wide := [aval for aval in exported.in_avals if aval.dtype != canonical(aval.dtype, allow_extended_dtype=True)]:
        raise ExportError(
            f"{name} was exported with 64 bits ({wide[0].str_short()}), which are off here; expected them on: call "
            "jax.config.update('jax_enable_x64', True) first"
        )
    weights, run = [jnp.array(leaf) for leaf in weights], jax.jit(exported.call)
    takes = ", ".join(aval.str_short() for aval in exported.in_avals[len(weights) :])

    def call(x: PyTree) -> PyTree:
        try:
            return run(weights, x)
        except (ValueError, TypeError) as error:
            leaves = [leaf if isinstance(leaf, jax.Array) else as_jax(leaf) for leaf in jax.tree.leaves(x)]
            given = ", ".join(map(kind, leaves[:4])) or "nothing"
            given += f" and {len(leaves) - 4} more" if len(leaves) > 4 else ""
            raise ExportError(f"{name} takes {takes}, found {given} ({first_line(error)})") from error

    return Inference(call, exported.platforms, takes)


def _bits(tree: PyTree):
    return jax.tree.structure(tree), [(kind(leaf), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def _require_flatbuffers() -> None:
    need("exported inference", "flatbuffers")  # by which jax.export writes
