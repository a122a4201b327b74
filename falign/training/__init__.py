"""Runs: from a run file to a trained adapter. The trainer is for loops around ``transformers.Trainer``."""

from falign.training.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    SourceConfig,
    TrainingConfig,
)
from falign.training.curves import plot_curves
from falign.training.objective_config import ListwiseConfig, ObjectiveConfig, PairwiseConfig, TokenPairwiseConfig
from falign.training.online_objective_config import (
    DistributionMatchingConfig,
    HybridConfig,
    PolicyGradientConfig,
    RehearsalConfig,
    SupervisedConfig,
)
from falign.training.reference_config import (
    AdapterOffConfig,
    AdapterReferenceConfig,
    AutoReferenceConfig,
    FrozenReferenceConfig,
    MovingAverageConfig,
    PeriodicResetConfig,
    ReferenceConfig,
    SoupConfig,
)
from falign.training.run import RunSummary, train
from falign.training.run_file import load_run_file, parse_run
from falign.training.run_folder import RunFolder
from falign.training.trainer import AlignmentTrainer

__all__ = [
    "AdapterConfig",
    "AdapterOffConfig",
    "AdapterReferenceConfig",
    "AlignmentTrainer",
    "AutoReferenceConfig",
    "DataConfig",
    "DistributionMatchingConfig",
    "FrozenReferenceConfig",
    "HybridConfig",
    "ListwiseConfig",
    "ModelConfig",
    "MovingAverageConfig",
    "ObjectiveConfig",
    "PairwiseConfig",
    "PeriodicResetConfig",
    "PolicyGradientConfig",
    "ReferenceConfig",
    "RehearsalConfig",
    "RunConfig",
    "RunFolder",
    "RunSummary",
    "SamplingConfig",
    "SoupConfig",
    "SourceConfig",
    "SupervisedConfig",
    "TokenPairwiseConfig",
    "TrainingConfig",
    "load_run_file",
    "parse_run",
    "plot_curves",
    "train",
]
