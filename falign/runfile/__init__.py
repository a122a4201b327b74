"""Run files: the sections of a run as frozen models, and how a file becomes one."""

from falign.runfile.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    SourceConfig,
    TrainingConfig,
)
from falign.runfile.objective_config import ListwiseConfig, ObjectiveConfig, PairwiseConfig, TokenPairwiseConfig
from falign.runfile.online_objective_config import (
    DistributionMatchingConfig,
    HybridConfig,
    PolicyGradientConfig,
    RehearsalConfig,
    SupervisedConfig,
)
from falign.runfile.reading import load_run_file, parse_run
from falign.runfile.reference_config import (
    AdapterOffConfig,
    AdapterReferenceConfig,
    AutoReferenceConfig,
    FrozenReferenceConfig,
    MovingAverageConfig,
    PeriodicResetConfig,
    ReferenceConfig,
    SoupConfig,
)

__all__ = [
    "AdapterConfig",
    "AdapterOffConfig",
    "AdapterReferenceConfig",
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
    "SamplingConfig",
    "SoupConfig",
    "SourceConfig",
    "SupervisedConfig",
    "TokenPairwiseConfig",
    "TrainingConfig",
    "load_run_file",
    "parse_run",
]
