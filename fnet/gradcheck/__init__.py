"""The gradient audit: which leaf of which layer is wrong, by how much, and whether it is a bug, a kink or rounding.

report = check_gradients(f, params, *args, gradient=by_hand)
report = check_layer(layer, x, key=key)
report = check_model(model, loss, batch, key=key)
print(report)
report.raise_if_wrong()

`check` and `layered` are the audits; `problem` and `witnesses` what they hold a gradient against, `judge` and `causes`
what they make of it; `kept` compiles for all of them, the same once; `selftest` injects faults. `recording`
keeps one pass by both engines with all its numbers, `flat` is its programs.

Imports types, core, layers, data and gradients; of `fnet.report` only where a report is drawn.
"""

from fnet.gradcheck.check import check_gradients
from fnet.gradcheck.flat import Program
from fnet.gradcheck.layered import check_layer, check_model
from fnet.gradcheck.recording import Recording, record, record_function
from fnet.gradcheck.report import Cost, Intermediate, LeafCheck, Report, Rung
from fnet.gradcheck.selftest import SelfTest, Trial, self_test

__all__ = [
    "Cost",
    "Intermediate",
    "LeafCheck",
    "Program",
    "Recording",
    "Report",
    "Rung",
    "SelfTest",
    "Trial",
    "check_gradients",
    "check_layer",
    "check_model",
    "record",
    "record_function",
    "self_test",
]
