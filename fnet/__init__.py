"""fnet trains neural networks as pure functions in JAX; the names stand in the order in which data flow."""

import importlib

from fnet import data, gradcheck, initializers, layers, losses, metrics, models, optimizers, schedules, transforms
from fnet.data import DataError, check_data, split
from fnet.gradcheck import check_gradients, check_layer, check_model
from fnet.gradients import accumulate, autodiff, backprop, from_loss
from fnet.intermediates import intermediate_gradients, tap
from fnet.layers import dense, flatten, serial
from fnet.losses import softmax_cross_entropy
from fnet.models import mlp
from fnet.sampling import generate
from fnet.optimizers import adam, adamw, chain, describe, groups, momentum, rmsprop, set_hyper, sgd
from fnet.stopping import best_weights, early_stopping
from fnet.training import augmented, init_train_state, make_evaluate, make_step, predict, train
from fnet.history import Event, History
from fnet.runs import Run, RunError, load_run
from fnet.checkpoint import CheckpointError
from fnet.interrupts import Interrupted, Terminated
from fnet.nonfinite import NonFiniteError
from fnet.driver import fit
from fnet.rate_finder import RateCurve, find_learning_rate
from fnet.population import train_population
from fnet.children import apply, init, parameter_paths
from fnet.types import Batch, Layer, LayerError, Loss, Mean, Optimizer, Schedule, TrainState, Transform

__version__ = "0.1.0"

LATER = ("export", "observers", "report")  # imported when they are looked for, since they take their time


def __getattr__(name: str):
    if name in LATER:
        return importlib.import_module(f"fnet.{name}")
    raise AttributeError(f"module 'fnet' has no attribute {name!r}")
