"""Training as pure functions: what may be jitted, mapped and scanned, and never touches a file.

- `steps`: a `TrainState` and one update of it; `epochs`: `train`, all epochs in one program
- `evaluation`: `make_evaluate` and `predict`; `sampling`: `generate`; `stopping`: rules that end a run
- `population`: many runs in one program; `rate_finder`: a learning rate from one short run
- `sharding`: a run on several devices; `collectives`: what a step of it sends; `plans`: what it would take, on paper;
  `chips`: and by the compilers of chips that are not here

Imports types, core, layers, data, optimizers and gradients; nothing of a run's host, folder or page.
"""

from fnet.training.epochs import train
from fnet.training.evaluation import make_evaluate, predict
from fnet.training.population import train_population
from fnet.training.rate_finder import RateCurve, find_learning_rate
from fnet.training.sampling import generate
from fnet.training.steps import Step, augmented, init_train_state, make_step
from fnet.training.stopping import Reducer, best_weights, early_stopping

__all__ = [
    "RateCurve",
    "Reducer",
    "Step",
    "augmented",
    "best_weights",
    "early_stopping",
    "find_learning_rate",
    "generate",
    "init_train_state",
    "make_evaluate",
    "make_step",
    "predict",
    "train",
    "train_population",
]
