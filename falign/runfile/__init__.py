"""Run files: the sections of a run as frozen models, and how a file becomes one."""

from falign.runfile.config import DataConfig, RunConfig, SamplingConfig, SourceConfig
from falign.runfile.objective_config import ListwiseConfig, ObjectiveConfig, PairwiseConfig, TokenPairwiseConfig
from falign.runfile.online_objective_config import (
    DistributionMatchingConfig,
    HybridConfig,
    PolicyGradientConfig,
    RehearsalConfig,
    SupervisedConfig,
)
from falign.runfile.policy_config import AdapterConfig, ModelConfig
from falign.runfile.reading import load_run_file, parse_run
from falign.runfile.reference_config import (
    AdapterOffConfig,
    AdapterReferenceConfig,
    AutoReferenceConfig,
    FrozenReferenceConfig,
    MovingAverageConfig,
    OwnReferenceConfig,
    PeriodicResetConfig,
    ReferenceConfig,
    SoupConfig,
)
from falign.runfile.reference_section import BuildContext, ReferenceSection
from falign.runfile.training_config import TrainingConfig

__all__ = [
    "AdapterConfig",
    "AdapterOffConfig",
    "AdapterReferenceConfig",
    "AutoReferenceConfig",
    "BuildContext",
    "DataConfig",
    "DistributionMatchingConfig",
    "FrozenReferenceConfig",
    "HybridConfig",
    "ListwiseConfig",
    "ModelConfig",
    "MovingAverageConfig",
    "ObjectiveConfig",
    "OwnReferenceConfig",
    "PairwiseConfig",
    "PeriodicResetConfig",
    "PolicyGradientConfig",
    "ReferenceConfig",
    "ReferenceSection",
    "RehearsalConfig",
    "RunConfig",
    "SamplingConfig",
    "SoupConfig",
    "SourceConfig",
    "SupervisedConfig",
    "TokenPairwiseConfig",
    "TrainingConfig",
    "load_run_file",
    "parse_run",
]
