"""Optimizers: pure state transitions whose hyperparameters are data.

    opt_state = optimizer.init(params)
    params, opt_state = optimizer.update(grads, opt_state, params)

``opt_state`` is a NamedTuple:

- ``step``: int32, the updates applied so far; it stays at its largest value rather than wrap.
- ``hyper``: the numbers, as arrays of the widest float in force. ``hyper.learning_rate`` is one array, or the dict of
  a `Schedule`'s arrays. Changing one (`set_hyper`) never recompiles; `jax.vmap` over the state sweeps them.
- ``rate``: the learning rate just applied; before the first update, the rate that it would apply.
- then the moments, trees like ``params``; None where an option keeps none.

A ``learning_rate`` or a ``weight_decay`` is a number, a traced number or a `Schedule`; update t (from 1) uses the
schedule's count t − 1. Each leaf is computed in its own dtype, in float32 at least, and the result is cast back: a
parameter never changes its dtype. Moments are kept in float32 at least unless ``moment_dtype`` says otherwise.
Parameters in 16 bits lose the updates that are smaller than their rounding, whatever the optimizer (1 + 1e-3 is 1 in
bfloat16), unless `master_weights` keeps them.

Numbers out of range raise ValueError at construction (host values only: arrays and tracers are not read), and so does
a ``mask`` without a ``weight_decay``; a parameter that is not a float raises TypeError in ``init``, and gradients that
do not fit the parameters ValueError in ``update``, by path. ``update`` takes ``value``, the loss, which only
`reduce_on_plateau` uses; `told` hands the results of an evaluation to it.

An optimizer of one's own is one screen: see `fnet.optimizers.common.elementwise`. `schedules` of a rate, `transforms`
of gradients and `compose` (chains, groups, averages) go with any of them.

Imports types, core and layers; nothing of data, losses or runs.
"""

from fnet.optimizers.adam import (
    AdamaxState,
    AdamState,
    AmsgradState,
    NadamState,
    RadamState,
    adam,
    adamax,
    adamw,
    amsgrad,
    nadam,
    radam,
)
from fnet.optimizers.adaptive import AdadeltaState, AdagradState, RmspropState, adadelta, adagrad, rmsprop
from fnet.optimizers.averaging import averaged, averages, lookahead
from fnet.optimizers.common import elementwise
from fnet.optimizers.compose import chain, describe, frozen, groups
from fnet.optimizers.descent import LionState, MomentumState, SgdState, lion, momentum, sgd
from fnet.optimizers.guards import dynamic_loss_scale, master_weights, nonfinite, skip_nonfinite
from fnet.optimizers.hyper import set_hyper
from fnet.optimizers.lbfgs import Minimum, minimize_lbfgs
from fnet.optimizers.matrices import AdafactorState, LambState, MuonState, adafactor, lamb, muon, orthogonalize
from fnet.optimizers.plateau import reduce_on_plateau, told
from fnet.types import Optimizer, Transform

__all__ = [
    "AdadeltaState",
    "AdafactorState",
    "AdagradState",
    "AdamState",
    "AdamaxState",
    "AmsgradState",
    "LambState",
    "LionState",
    "Minimum",
    "MomentumState",
    "MuonState",
    "NadamState",
    "Optimizer",
    "RadamState",
    "RmspropState",
    "SgdState",
    "Transform",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "amsgrad",
    "averaged",
    "averages",
    "chain",
    "describe",
    "dynamic_loss_scale",
    "elementwise",
    "frozen",
    "groups",
    "lamb",
    "lion",
    "lookahead",
    "master_weights",
    "minimize_lbfgs",
    "momentum",
    "muon",
    "nadam",
    "nonfinite",
    "orthogonalize",
    "radam",
    "reduce_on_plateau",
    "rmsprop",
    "set_hyper",
    "sgd",
    "skip_nonfinite",
    "told",
]
