"""fnet trains neural networks as pure functions in JAX; the names stand in the order in which data flow."""

import importlib

from fnet import data, gradcheck, layers, losses, metrics, optimizers
from fnet.layers import initializers, models
from fnet.optimizers import schedules, transforms
from fnet.data import DataError, check_data, split
from fnet.gradcheck import check_gradients, check_layer, check_model
from fnet.gradients.engines import accumulate, autodiff, backprop, from_loss
from fnet.gradients.intermediates import intermediate_gradients, tap
from fnet.layers import dense, flatten, serial
from fnet.losses import softmax_cross_entropy
from fnet.layers.models import mlp
from fnet.training.sampling import generate
from fnet.optimizers import adam, adamw, chain, describe, groups, momentum, rmsprop, set_hyper, sgd
from fnet.training.stopping import best_weights, early_stopping
from fnet.training.steps import augmented, init_train_state, make_evaluate, make_step, predict, train
from fnet.runs.history import Event, History
from fnet.runs.folder import Run, RunError, load_run
from fnet.runs.checkpoint import CheckpointError
from fnet.runs.interrupts import Interrupted, Terminated
from fnet.runs.nonfinite import NonFiniteError
from fnet.runs.driver import fit
from fnet.training.rate_finder import RateCurve, find_learning_rate
from fnet.training.population import train_population
from fnet.layers.children import apply, init, parameter_paths
from fnet.types import Batch, Layer, LayerError, Loss, Mean, Optimizer, Schedule, TrainState, Transform

__version__ = "0.1.0"

LATER = {
    "export": "fnet.export.weights",
    "observers": "fnet.runs.observers",
    "report": "fnet.report",
}  # imported when they are looked for, since they take their time


def __getattr__(name: str):
    if name in LATER:
        return importlib.import_module(LATER[name])
    raise AttributeError(f"module 'fnet' has no attribute {name!r}")
