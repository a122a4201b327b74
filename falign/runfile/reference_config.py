"""The section of the run file that says what the policy is held to: one model per kind, told apart by ``kind``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from typing_extensions import override

from falign.errors import ConfigError
from falign.runfile.base_config import FrozenModel

__all__ = [
    "AdapterOffConfig",
    "AdapterReferenceConfig",
    "AutoReferenceConfig",
    "FrozenReferenceConfig",
    "MovingAverageConfig",
    "PeriodicResetConfig",
    "ReferenceConfig",
    "SoupConfig",
    "check_moves",
    "check_reference",
]


class _ReferenceConfig(FrozenModel):
    def models_that_read_ids(self, *, own: str) -> Iterator[tuple[str, str]]:
        """Return the field and path of each model of its own, which is given the policy's token ids.

        Args:
            own: The policy's path.
        """
        yield from ()

    def model_paths(self) -> Iterator[str]:
        """Return the paths of models and adapters that are loaded besides the policy's."""
        yield from ()


class _FixedReferenceConfig(_ReferenceConfig):
    cache: Path | None = None
    """Folder of log-probabilities computed once before training; shared by all runs with the same reference."""


class AutoReferenceConfig(_FixedReferenceConfig):
    """The policy's initial weights: ``adapter_off``; with ``adapter.init`` that adapter; ``frozen`` without adapter."""

    kind: Literal["auto"] = "auto"


class AdapterOffConfig(_FixedReferenceConfig):
    """The policy without its adapter; no second model in memory."""

    kind: Literal["adapter_off"] = "adapter_off"


class FrozenReferenceConfig(_FixedReferenceConfig):
    """A second model in memory that never changes."""

    kind: Literal["frozen"] = "frozen"
    path: str | None = None
    """The model, if not the one that is trained; with the policy's tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fastest"] = "auto"
    """Of a ``path`` of its own, as ``model.dtype``; without one the reference is loaded as the policy is."""
    quantization: Literal["nf4"] | None = None
    """Of a ``path`` of its own, as ``model.quantization``; without one the reference is loaded as the policy is."""

    @override
    def model_paths(self) -> Iterator[str]:
        if self.path is not None:
            yield self.path

    @override
    def models_that_read_ids(self, *, own: str) -> Iterator[tuple[str, str]]:
        if self.path not in (None, own):
            yield "reference.path", self.path

    @model_validator(mode="after")
    def _own_fields(self) -> FrozenReferenceConfig:
        if self.path is None and (self.dtype != "auto" or self.quantization is not None):
            name = "dtype" if self.dtype != "auto" else "quantization"
            raise ValueError(
                f"{name} is for a reference with a path of its own; without one the reference is the model that is "
                "trained, loaded as the policy is: give path, or leave it out"
            )
        return self


class AdapterReferenceConfig(_FixedReferenceConfig):
    """A frozen adapter over the policy's base, such as the one from supervised tuning."""

    kind: Literal["adapter"] = "adapter"
    path: str
    """The adapter's folder, or a run that has trained one."""

    @override
    def model_paths(self) -> Iterator[str]:
        yield self.path


class SoupConfig(_FixedReferenceConfig):
    """The weighted average of adapters over the policy's base, exactly, or of whole checkpoints (SALSA)."""

    kind: Literal["soup"] = "soup"
    paths: list[str]
    """Two or more adapters, checkpoints, or runs that have trained such; of one kind."""
    weights: list[float] | None = None
    """One share each, together 1; equal ones where left out."""

    @override
    def model_paths(self) -> Iterator[str]:
        yield from self.paths

    @override
    def models_that_read_ids(self, *, own: str) -> Iterator[tuple[str, str]]:
        from falign.models.soup_members import soup_members

        for member in soup_members(self.paths, self.weights):
            if member.kind == "checkpoint":
                yield "reference.paths", str(member.folder)


class _MovingConfig(_ReferenceConfig):
    every: int = Field(ge=1)
    """Optimiser steps between two moves. What is logged at a step is measured before the move."""
    cache: None = None
    """Not possible here."""

    @field_validator("cache", mode="before")
    @classmethod
    def _refuse_cache(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("a moving reference gives other log-probabilities after every move; leave the cache out")


class MovingAverageConfig(_MovingConfig):
    """An average over the policy's past: the reference takes α of the policy at each move (TR-DPO's soft update)."""

    kind: Literal["moving_average"] = "moving_average"
    alpha: float = Field(gt=0, le=1)
    """α, the weight of the policy."""
    rank: int | None = Field(default=None, ge=1)
    """Of the adapter that is the average; four times the policy's where left out. What it has no room for is logged
    as ``reference/truncation``."""


class PeriodicResetConfig(_MovingConfig):
    """The policy as it was at the last reset (TR-DPO's hard update, ProRL)."""

    kind: Literal["periodic_reset"] = "periodic_reset"
    reset_optimizer: bool = False
    """Forget the optimiser's moments too."""


def _kind(value: Any) -> str:
    return str(value.get("kind", "auto") if isinstance(value, dict) else getattr(value, "kind", "auto"))


ReferenceConfig = Annotated[
    Annotated[AutoReferenceConfig, Tag("auto")]
    | Annotated[AdapterOffConfig, Tag("adapter_off")]
    | Annotated[FrozenReferenceConfig, Tag("frozen")]
    | Annotated[AdapterReferenceConfig, Tag("adapter")]
    | Annotated[SoupConfig, Tag("soup")]
    | Annotated[MovingAverageConfig, Tag("moving_average")]
    | Annotated[PeriodicResetConfig, Tag("periodic_reset")],
    Discriminator(_kind),
]
"""The reference: ``kind`` names one of these; the first is the default."""


def check_reference(reference: ReferenceConfig, *, adapter: bool) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        ConfigError: With the fields that contradict each other.
    """
    if not adapter and isinstance(reference, AdapterOffConfig | AdapterReferenceConfig):
        raise ConfigError(
            f"reference.kind={reference.kind} with adapter=null: all weights are trained, so the base would move with "
            "the policy: set reference.kind=frozen."
        )
    if not adapter and isinstance(reference, MovingAverageConfig) and reference.rank is not None:
        raise ConfigError(f"reference.rank={reference.rank} with adapter=null: weights have no rank; leave it out.")
    if isinstance(reference, SoupConfig):
        from falign.models.soup_members import check_weights

        shares = [1 / len(reference.paths)] * len(reference.paths) if reference.weights is None else reference.weights
        try:
            check_weights(shares, members=len(reference.paths))
        except ConfigError as error:
            raise ConfigError(f"reference: {error}") from error


def check_moves(reference: ReferenceConfig, *, updates_per_rollout: int) -> None:
    """Refuse a reference that would move while a rollout that was scored under it is still learnt from.

    Raises:
        ConfigError: The interval is no multiple of a rollout's updates.
    """
    if isinstance(reference, _MovingConfig) and reference.every % updates_per_rollout:
        raise ConfigError(
            f"reference.every={reference.every} is no multiple of the {updates_per_rollout} optimiser steps of a "
            "rollout (rollout.updates times rollout.minibatches), so the reference would move in the midst of one: "
            "make it one."
        )
