"""Objectives: from log-probabilities of completions to losses. They import torch and the divergences, nothing else."""

from falign.objectives.base import (
    CompletionBatch,
    Objective,
    ObjectiveOutput,
    RewardingObjective,
    RolloutObjective,
    Term,
)
from falign.objectives.listwise import Listwise
from falign.objectives.margins import Exo, MarginLoss, Robust, get_margin_loss, hinge, logistic, squared
from falign.objectives.methods import FDPO, TDPO
from falign.objectives.pairs import pairs_of
from falign.objectives.pairwise import Pairwise
from falign.objectives.reduction import reduce_terms, total_weights
from falign.objectives.token_pairwise import TokenPairwise

__all__ = [
    "FDPO",
    "TDPO",
    "CompletionBatch",
    "Exo",
    "Listwise",
    "MarginLoss",
    "Objective",
    "ObjectiveOutput",
    "Pairwise",
    "RewardingObjective",
    "Robust",
    "RolloutObjective",
    "Term",
    "TokenPairwise",
    "get_margin_loss",
    "hinge",
    "logistic",
    "pairs_of",
    "reduce_terms",
    "squared",
    "total_weights",
]
