"""What a run whose weights are spread over processes cannot do."""

from __future__ import annotations

from falign.errors import ConfigError
from falign.training.config import RunConfig
from falign.training.reference_config import MovingAverageConfig, PeriodicResetConfig

__all__ = ["check_sharding"]


def check_sharding(config: RunConfig) -> None:
    """Refuse what does not work under FSDP2, before anything is loaded.

    Raises:
        ConfigError: With the field, the reason and what works.
    """
    if config.model.quantization is not None:
        raise ConfigError(
            "model.quantization=nf4 under FSDP2: a 4-bit weight that is spread over processes loses the scales that "
            "belong to it. Start with --launch ddp, or leave model.quantization out."
        )
    if isinstance(config.reference, MovingAverageConfig | PeriodicResetConfig):
        raise ConfigError(
            f"reference.kind={config.reference.kind} under FSDP2: the reference moves by arithmetic on whole matrices, "
            "of which each process holds a part. Start with --launch ddp, or take a reference that does not move."
        )
