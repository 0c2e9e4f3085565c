"""Gradients of a loss by the parameters, and of any value in between.

- `engines`: `autodiff`, `backprop` (the backward by hand), `from_loss`, and `accumulate` of any of them; one signature
- `examples`: gradients of each example, their norms, their clipped mean, how they scatter
- `curvature`: products with the Hessian, Gauss–Newton and Fisher matrix, and eigenvalues, traces, spectra from them
- `intermediates`: `tap` names a value within a function, `intermediate_gradients` are those by it

Imports types, core, layers and data; nothing that updates or runs.
"""

from fnet.gradients.engines import Gradient, accumulate, autodiff, backprop, from_loss
from fnet.gradients.examples import Moments, Noise, clip_per_example, gradient_moments, gradient_noise, per_example
from fnet.gradients.intermediates import intermediate_gradients, tap

__all__ = [
    "Gradient",
    "Moments",
    "Noise",
    "accumulate",
    "autodiff",
    "backprop",
    "clip_per_example",
    "from_loss",
    "gradient_moments",
    "gradient_noise",
    "intermediate_gradients",
    "per_example",
    "tap",
]
