"""Runs: from a run file to a trained adapter. The trainer is for loops around ``transformers.Trainer``."""

from falign.runs.summary import RunSummary
from falign.training.run import train
from falign.training.trainer import AlignmentTrainer

__all__ = ["AlignmentTrainer", "RunSummary", "train"]
