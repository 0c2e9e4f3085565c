"""fnet trains neural networks as pure functions in JAX; the rooms stand in the order in which data flow through them.

    types      the contracts                 core       what every room stands on
    layers     init, forward, backward       losses, data, optimizers, metrics
    gradients  autodiff and by hand          gradcheck  whether one is right
    training   a step, a run, a population   runs       `fit`: a run that is watched, kept, resumed
    export     weights for other programs    report     tables, pictures, pages

Each imports from those that stand before it. The names below are what most programs need; the room of one is
imported when the name is first looked for, so that a program waits for what it uses.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

ROOMS = (
    *("types", "core", "layers", "losses", "data", "optimizers", "metrics", "gradients", "gradcheck", "training"),
    *("runs", "export", "report"),
)
NAMES = {
    "types": ("Batch", "Layer", "LayerError", "Loss", "Mean", "Optimizer", "Schedule", "TrainState", "Transform"),
    "core": ("processes",),
    "layers": ("dense", "flatten", "initializers", "models", "serial"),
    "layers.children": ("apply", "init", "parameter_paths"),
    "layers.models": ("mlp",),
    "losses": ("softmax_cross_entropy",),
    "data": ("DataError", "check_data", "split"),
    "optimizers": (
        *("adam", "adamw", "chain", "describe", "groups", "momentum", "rmsprop", "schedules", "set_hyper", "sgd"),
        "transforms",
    ),
    "gradients": (
        *("accumulate", "autodiff", "backprop", "clip_per_example", "from_loss", "gradient_moments", "gradient_noise"),
        *("curvature", "intermediate_gradients", "per_example", "tap"),
    ),
    "gradcheck": ("check_gradients", "check_layer", "check_model", "record", "record_function"),
    "training.sharding": ("mesh", "placement"),
    "training": (
        *("RateCurve", "augmented", "best_weights", "early_stopping", "find_learning_rate", "generate"),
        *("init_train_state", "make_evaluate", "make_step", "population", "predict", "sharding", "train"),
        "train_population",
    ),
    "runs": (
        *("CheckpointError", "Event", "History", "Interrupted", "NonFiniteError", "Run", "RunError", "Terminated"),
        *("checkpoint", "fit", "load_run", "observers"),
    ),
}
importlib.import_module("fnet.core.forks")  # which sees forks from here on
PLACES = {name: f"fnet.{place}" for place, names in NAMES.items() for name in names}

if TYPE_CHECKING:  # the same names, for those who read and do not run; a test compares the two
    from fnet import (
        core,
        data,
        export,
        gradcheck,
        gradients,
        layers,
        losses,
        metrics,
        optimizers,
        report,
        runs,
        training,
        types,
    )
    from fnet.core import processes
    from fnet.data import DataError, check_data, split
    from fnet.gradcheck import check_gradients, check_layer, check_model, record, record_function
    from fnet.gradients import (
        accumulate,
        autodiff,
        backprop,
        clip_per_example,
        curvature,
        from_loss,
        gradient_moments,
        gradient_noise,
        intermediate_gradients,
        per_example,
        tap,
    )
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
        observers,
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
        sharding,
        train,
        train_population,
    )
    from fnet.training.sharding import mesh, placement
    from fnet.types import Batch, Layer, LayerError, Loss, Mean, Optimizer, Schedule, TrainState, Transform


def __getattr__(name: str):
    if name in ROOMS:
        return importlib.import_module(f"fnet.{name}")
    if name not in PLACES:
        raise AttributeError(f"module 'fnet' has no attribute {name!r}")
    place = importlib.import_module(PLACES[name])
    found = getattr(place, name) if hasattr(place, name) else importlib.import_module(f"{PLACES[name]}.{name}")
    return globals().setdefault(name, found)


def __dir__():
    return sorted({*globals(), *ROOMS, *PLACES})
