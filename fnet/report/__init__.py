"""Reports for people: tables (rich), pictures (matplotlib) and pages (HTML), on the host.

- `run`, `folder`, `experiment`: the page of a run, or of several, from their folders; `audit`: that of a gradient audit
- `plots`: pictures; `tables`, `model`: tables; `population`: of many runs; `html`: what pages are made of
- `explorer`: that of one recorded pass, which computes and explains it (`explorer_program`, `explorer_page/`)
- `planned`: what a model would take on many chips, as a command

Imports any room; libraries are imported where they are used.
"""

from fnet.report.explorer import write_explorer
from fnet.report.folder import save_audit, save_evaluation
from fnet.report.model import summary
from fnet.report.plots import plot_confusion, plot_curves, plot_rate_curve, plot_schedules, plot_spectrum
from fnet.report.run import write_comparison, write_report
from fnet.report.tables import difference_table, engine_table, schedule_table

__all__ = [
    "difference_table",
    "engine_table",
    "plot_confusion",
    "plot_curves",
    "plot_rate_curve",
    "plot_schedules",
    "plot_spectrum",
    "save_audit",
    "save_evaluation",
    "schedule_table",
    "summary",
    "write_comparison",
    "write_explorer",
    "write_report",
]
