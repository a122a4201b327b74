"""Trainers of TRL with falign's objectives inside: a script keeps its arguments and changes one import.

A name is imported when it is first used, and TRL with it.
"""

from typing import TYPE_CHECKING

from falign.lazy import lazy_names

if TYPE_CHECKING:
    from falign.integrations.trl.dpo import FDPOTrainer
    from falign.integrations.trl.grpo import FGRPOTrainer
    from falign.integrations.trl.kto import FKTOTrainer
    from falign.integrations.trl.moving import MovingReferenceCallback
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "falign.integrations.trl.dpo": ("FDPOTrainer",),
            "falign.integrations.trl.grpo": ("FGRPOTrainer",),
            "falign.integrations.trl.kto": ("FKTOTrainer",),
            "falign.integrations.trl.moving": ("MovingReferenceCallback",),
        },
    )

__all__ = ["FDPOTrainer", "FGRPOTrainer", "FKTOTrainer", "MovingReferenceCallback"]
