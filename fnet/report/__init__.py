"""Reports for people: tables (rich) and pictures (matplotlib), on the host, each library imported where it is used."""

from fnet.report.model import summary
from fnet.report.plots import plot_confusion, plot_curves, plot_rate_curve, plot_schedules
from fnet.report.tables import difference_table, engine_table, schedule_table

__all__ = [
    "difference_table",
    "engine_table",
    "plot_confusion",
    "plot_curves",
    "plot_rate_curve",
    "plot_schedules",
    "schedule_table",
    "summary",
]
