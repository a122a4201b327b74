"""Run folders: what a run writes, how it is found again, and what proves that it is the same run."""

from falign.runs.curves import plot_curves
from falign.runs.folder import RunFolder

__all__ = ["RunFolder", "plot_curves"]
