"""Training: a run from its run file to the trained model, and the trainer for use on its own."""

from typing import TYPE_CHECKING

from falign.lazy import lazy_names

if TYPE_CHECKING:
    from falign.runs.summary import RunSummary
    from falign.training.run import train
    from falign.training.trainer import AlignmentTrainer
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "falign.runs.summary": ("RunSummary",),
            "falign.training.run": ("train",),
            "falign.training.trainer": ("AlignmentTrainer",),
        },
    )

__all__ = ["AlignmentTrainer", "RunSummary", "train"]
