"""fnet trains neural networks as pure functions in JAX; the rooms stand in the order in which data flow through them.

    types      the contracts                 core       what every room stands on
    layers     init, forward, backward       losses, data, optimizers, metrics
    gradients  autodiff and by hand          gradcheck  whether one is right
    training   a step, a run, a population   runs       `fit`: a run that is watched, kept, resumed
    export     weights for other programs    report     tables, pictures, pages

Each imports from those that stand before it. The names below are what most programs need.
"""

import importlib

from fnet import data, gradcheck, layers, losses, metrics, optimizers
from fnet.data import DataError, check_data, split
from fnet.gradcheck import check_gradients, check_layer, check_model
from fnet.gradients import accumulate, autodiff, backprop, from_loss, intermediate_gradients, tap
from fnet.layers import dense, flatten, initializers, models, serial
from fnet.layers.children import apply, init, parameter_paths
from fnet.layers.models import mlp
from fnet.losses import softmax_cross_entropy
from fnet.optimizers import (
    adam,
    adamw,
    chain,
    describe,
    groups,
    momentum,
    rmsprop,
    schedules,
    set_hyper,
    sgd,
    transforms,
)
from fnet.runs import (
    CheckpointError,
    Event,
    History,
    Interrupted,
    NonFiniteError,
    Run,
    RunError,
    Terminated,
    checkpoint,
    fit,
    load_run,
)
from fnet.training import (
    RateCurve,
    augmented,
    best_weights,
    early_stopping,
    find_learning_rate,
    generate,
    init_train_state,
    make_evaluate,
    make_step,
    population,
    predict,
    train,
    train_population,
)
from fnet.types import Batch, Layer, LayerError, Loss, Mean, Optimizer, Schedule, TrainState, Transform

__version__ = "0.1.0"

# imported when they are looked for, since they take their time
LATER = {"export": "fnet.export", "observers": "fnet.runs.observers", "report": "fnet.report"}


def __getattr__(name: str):
    if name in LATER:
        return importlib.import_module(LATER[name])
    raise AttributeError(f"module 'fnet' has no attribute {name!r}")
