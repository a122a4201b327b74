"""What a run whose weights are spread over processes cannot do."""

from __future__ import annotations

from falign.errors import ConfigError
from falign.runfile.config import RunConfig
from falign.runfile.reference_config import MovingAverageConfig, PeriodicResetConfig

__all__ = ["check_sharding"]


def check_sharding(config: RunConfig) -> None:
    """Refuse what does not work under FSDP2, before anything is loaded.

    Raises:
        ConfigError: With the field, the reason and what works.
    """
    if isinstance(config.reference, MovingAverageConfig | PeriodicResetConfig):
        raise ConfigError(
            f"reference.kind={config.reference.kind} under FSDP2: the reference moves by arithmetic on whole matrices, "
            "of which each process holds a part. Start with --launch ddp, or take a reference that does not move."
        )
