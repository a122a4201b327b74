"""Trainers of TRL with falign's objectives inside: a script keeps its arguments and changes one import.

A name is imported when it is first used, and TRL with it.
"""

from typing import TYPE_CHECKING

from falign.lazy import lazy_names

if TYPE_CHECKING:
    from falign.integrations.trl.grpo import FGRPOTrainer
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "falign.integrations.trl.grpo": ("FGRPOTrainer",),
        },
    )

__all__ = ["FGRPOTrainer"]
