"""Weights for other programs, and inference without the model's code (needs safetensors and flatbuffers).

- `weights`: a tree's leaves as named tensors, to safetensors and back, in part too; `pytorch`: its names for them
- `inference`: a forward and its weights in one file; `files`: what these are written to
- `lowering`: programs for chips that are not here

Nothing is pickled, and no file that exists is overwritten.

Imports types, core and layers alone.
"""

from fnet.export.files import ExportError
from fnet.export.inference import Inference, export_inference, load_inference
from fnet.export.lowering import lower
from fnet.export.pytorch import Conv1D, ConvTranspose, Flattened, torch_names
from fnet.export.weights import Rule, Taken, from_tensors, load_weights, save_weights, to_tensors

__all__ = [
    "Conv1D",
    "ConvTranspose",
    "ExportError",
    "Flattened",
    "Inference",
    "Rule",
    "Taken",
    "export_inference",
    "from_tensors",
    "load_inference",
    "load_weights",
    "lower",
    "save_weights",
    "to_tensors",
    "torch_names",
]
