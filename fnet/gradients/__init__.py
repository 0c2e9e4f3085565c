"""Gradients of a loss by the parameters, and of any value in between.

- `engines`: `autodiff`, `backprop` (the backward by hand), `from_loss`, and `accumulate` of any of them; one signature
- `intermediates`: `tap` names a value within a function, `intermediate_gradients` are those by it

Imports types, core, layers and data; nothing that updates or runs.
"""

from fnet.gradients.engines import Gradient, accumulate, autodiff, backprop, from_loss
from fnet.gradients.intermediates import intermediate_gradients, tap

__all__ = ["Gradient", "accumulate", "autodiff", "backprop", "from_loss", "intermediate_gradients", "tap"]
