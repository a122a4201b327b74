"""Preference alignment of language models under the f-divergence of your choice.

A name is imported when it is first used: ``falign.FDPO`` loads torch and nothing heavier.
"""

from typing import TYPE_CHECKING

from falign.lazy import lazy_names

if TYPE_CHECKING:
    from falign import divergences, objectives
    from falign.api import Lora, Run, load, train
    from falign.objectives import DPHRL, FDPG, FDPO, SALSA, SALSARLOO, TDPO, CompletionBatch
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "falign.api": ("Lora", "Run", "load", "train"),
            "falign.divergences": (),
            "falign.objectives": (),
            "falign.objectives.batch": ("CompletionBatch",),
            "falign.objectives.methods": ("DPHRL", "FDPG", "FDPO", "SALSA", "SALSARLOO", "TDPO"),
        },
    )

__version__ = "0.1.0"

__all__ = [
    "DPHRL",
    "FDPG",
    "FDPO",
    "SALSA",
    "SALSARLOO",
    "TDPO",
    "CompletionBatch",
    "Lora",
    "Run",
    "divergences",
    "load",
    "objectives",
    "train",
]
