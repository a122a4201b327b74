"""What alignment costs and gains, measured in the same way for every method.

Each metric is a module with plain functions and an ``evaluate.Metric``, which ``evaluate.load`` loads from the module's
path. The modules load evaluate and are imported by name, as in ``falign.metrics.calibration``; this package loads numpy
and nothing heavier.
"""

from falign.metrics.intervals import Interval, Intervals, bootstrap, wilson

__all__ = ["Interval", "Intervals", "bootstrap", "wilson"]
