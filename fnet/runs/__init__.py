"""A run driven from the host: `fit`, what it tells, and the folder in which it is kept.

- `driver`: `fit` from its arguments to its end; `arguments` are checked, `loop` is the training loop as a program,
  `compilation` makes it once, `placing` puts it on several devices of several processes
- `folder`: `Run`, what is kept and resumed; `checkpoint`, `locks`
- `history` of the metrics, `observers` of the events, `interrupts`, and `nonfinite`: where a number stopped being one

Imports types, core, layers, data, metrics and training; nothing of a page.
"""

from fnet.runs.checkpoint import CheckpointError
from fnet.runs.driver import fit
from fnet.runs.history import Event, History
from fnet.runs.interrupts import Interrupted, Terminated
from fnet.runs.kept import load_run
from fnet.runs.nonfinite import NonFiniteError
from fnet.runs.run import Run, RunError, RunWarning

__all__ = [
    "CheckpointError",
    "Event",
    "History",
    "Interrupted",
    "NonFiniteError",
    "Run",
    "RunError",
    "RunWarning",
    "Terminated",
    "fit",
    "load_run",
]
