"""Objectives: from log-probabilities of completions to losses. They import torch and the divergences, nothing else."""

from falign.objectives.advantage_list import (
    AdvantageEntry,
    AdvantageList,
    AdvantageTransform,
    BatchAdvantage,
    ace,
    get_transform,
    stcr,
)
from falign.objectives.advantages import Advantage, generalized_advantages, get_advantage
from falign.objectives.anchored import Anchored
from falign.objectives.base import (
    BaseObjective,
    CompletionBatch,
    Importance,
    Objective,
    ObjectiveOutput,
    PreferenceKind,
    Term,
    TokenWeighting,
    complete,
    reduce_terms,
    reference_names,
    token_weighting,
    total_weights,
)
from falign.objectives.batch import field_of, field_of_reference
from falign.objectives.cloning import Cloning
from falign.objectives.controllers import Controller, RootDivergence, TargetDivergence
from falign.objectives.difficulty import Dads, DifficultyKernel
from falign.objectives.discriminative import Discriminative, TrustRegion
from falign.objectives.distillation import Distillation
from falign.objectives.distribution_matching import DistributionMatching
from falign.objectives.groups import CompletionMean, completion_term, pairs_of
from falign.objectives.hybrid import Hybrid, dph_rl_coefficient
from falign.objectives.listwise import Listwise
from falign.objectives.margins import (
    IPO,
    Conservative,
    Exo,
    MarginLoss,
    Robust,
    get_margin_loss,
    hinge,
    logistic,
    squared,
)
from falign.objectives.measures import (
    Constant,
    DivergenceTo,
    Entropy,
    Measure,
    MixingMeasure,
    block_of,
    get_measure,
    references_of,
)
from falign.objectives.moments import fit_moments
from falign.objectives.pairwise import Pairwise
from falign.objectives.partition import RunningPartition, log_partition
from falign.objectives.penalty import Penalty, Surrogate
from falign.objectives.policy_gradient import PolicyGradient
from falign.objectives.rehearsal import Rehearsal
from falign.objectives.reward_model import RankedRewardModel, RewardModel
from falign.objectives.schedules import Cosine, Linear, Schedule, Scheduled, Stairs, Steps
from falign.objectives.sequence_match import LogNormalizer, SequenceMatching
from falign.objectives.step_means import StepMean
from falign.objectives.sum import Selected, Sum
from falign.objectives.supervised import Supervised
from falign.objectives.targets import BinaryConstraint, ExponentialReward, MomentConstraints, ProductTarget, Target
from falign.objectives.token_gates import (
    DivergenceBetween,
    EntropyGap,
    EntropyGate,
    EntropyPrefix,
    FirstTokens,
    QuantileFilter,
    ReferenceEntropy,
    quantile_filter,
)
from falign.objectives.token_pairwise import TokenPairwise
from falign.objectives.top_k import TopK
from falign.objectives.unpaired import Unpaired
from falign.objectives.vocabulary import TopTokens, Vocabulary
from falign.objectives.weights import (
    TokenWeight,
    completion_factor,
    get_weight,
    measures_of_weights,
    merge_measures,
    needs_of_weights,
    token_factor,
)

__all__ = [
    "IPO",
    "Advantage",
    "AdvantageEntry",
    "AdvantageList",
    "AdvantageTransform",
    "Anchored",
    "BaseObjective",
    "BatchAdvantage",
    "BinaryConstraint",
    "Cloning",
    "CompletionBatch",
    "CompletionMean",
    "Conservative",
    "Constant",
    "Controller",
    "Cosine",
    "Dads",
    "DifficultyKernel",
    "Discriminative",
    "Distillation",
    "DistributionMatching",
    "DivergenceBetween",
    "DivergenceTo",
    "Entropy",
    "EntropyGap",
    "EntropyGate",
    "EntropyPrefix",
    "Exo",
    "ExponentialReward",
    "FirstTokens",
    "Hybrid",
    "Importance",
    "Linear",
    "Listwise",
    "LogNormalizer",
    "MarginLoss",
    "Measure",
    "MixingMeasure",
    "MomentConstraints",
    "Objective",
    "ObjectiveOutput",
    "Pairwise",
    "Penalty",
    "PolicyGradient",
    "PreferenceKind",
    "ProductTarget",
    "QuantileFilter",
    "RankedRewardModel",
    "ReferenceEntropy",
    "Rehearsal",
    "RewardModel",
    "Robust",
    "RootDivergence",
    "RunningPartition",
    "Schedule",
    "Scheduled",
    "Selected",
    "SequenceMatching",
    "Stairs",
    "StepMean",
    "Steps",
    "Sum",
    "Supervised",
    "Surrogate",
    "Target",
    "TargetDivergence",
    "Term",
    "TokenPairwise",
    "TokenWeight",
    "TokenWeighting",
    "TopK",
    "TopTokens",
    "TrustRegion",
    "Unpaired",
    "Vocabulary",
    "ace",
    "block_of",
    "complete",
    "completion_factor",
    "completion_term",
    "dph_rl_coefficient",
    "field_of",
    "field_of_reference",
    "fit_moments",
    "generalized_advantages",
    "get_advantage",
    "get_margin_loss",
    "get_measure",
    "get_transform",
    "get_weight",
    "hinge",
    "log_partition",
    "logistic",
    "measures_of_weights",
    "merge_measures",
    "needs_of_weights",
    "pairs_of",
    "quantile_filter",
    "reduce_terms",
    "reference_names",
    "references_of",
    "squared",
    "stcr",
    "token_factor",
    "token_weighting",
    "total_weights",
]
