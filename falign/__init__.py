"""Preference alignment of language models under the f-divergence of your choice.

``import falign`` loads torch and nothing heavier: divergences, objectives and the batch they take.
"""

from falign import divergences, objectives
from falign.objectives import DPHRL, FDPG, FDPO, SALSA, SALSARLOO, TDPO, CompletionBatch

__version__ = "0.1.0"

__all__ = ["DPHRL", "FDPG", "FDPO", "SALSA", "SALSARLOO", "TDPO", "CompletionBatch", "divergences", "objectives"]
