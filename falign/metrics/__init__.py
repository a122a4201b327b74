"""Metrics of alignment: accuracy, calibration, diversity, divergence, win rates, the same for every method.

Each metric is a module with plain functions and an ``evaluate.Metric``, which ``evaluate.load`` loads from the module's
path. The modules load evaluate and are imported by name, as in ``falign.metrics.calibration``; this package loads numpy
and nothing heavier.
"""

from falign.metrics.intervals import Interval, Intervals, bootstrap, wilson

__all__ = ["Interval", "Intervals", "bootstrap", "wilson"]
