"""The common interface of the sections of references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from pydantic import Field, model_validator

from falign.errors import ConfigError
from falign.runfile.base_config import FrozenModel
from falign.runfile.policy_config import AdapterConfig, ModelConfig
from falign.runfile.training_config import TrainingConfig

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from falign.data.other_prompts import OtherPrompts
    from falign.references import Reference

__all__ = ["BuildContext", "PolicySections", "ReferenceSection"]


@runtime_checkable
class PolicySections(Protocol):
    """The sections of a run that a reference depends on."""

    @property
    def model(self) -> ModelConfig:
        """The model that is aligned."""
        ...

    @property
    def adapter(self) -> AdapterConfig | None:
        """Its adapter; None if all weights train."""
        ...

    @property
    def training(self) -> TrainingConfig:
        """How it is trained and scored."""
        ...


class BuildContext(NamedTuple):
    """The context in which a reference is built.

    Attributes:
        config: The run.
        policy: The policy, which gets a further adapter if the reference is one.
        field: The reference's section in messages.
        adapter: Name of that adapter.
        device: The device for a separate model.
        members: The references that it is computed from, by name.
        prompts: The rows' other prompts, for a section with a prompt of its own; None without the run's data.
    """

    config: PolicySections
    policy: PreTrainedModel | PeftModel
    field: str = "reference"
    adapter: str = "ref"
    device: torch.device | str = "cpu"
    members: Mapping[str, Reference] = {}
    prompts: OtherPrompts | None = None


class ReferenceSection(FrozenModel):
    """A section that describes one kind of reference, and builds it."""

    kind: Any
    cache: Path | None = None
    """Folder of log-probabilities computed once before training; shared by all runs with the same reference."""
    cache_top_k: int | None = Field(default=None, ge=1)
    """With ``cache``: also keep this many most likely tokens at each position, for measures that read no more of the
    reference (``top_k``)."""
    prompt: str | None = Field(default=None, pattern=r"\S")
    r"""Another prompt behind which the reference scores the completions, with columns of the row in braces:
    ``"{prompt}\nReference solution: {solution}"``. It takes the place of the last turn of a conversation."""

    @model_validator(mode="after")
    def _top_k_of_a_cache(self) -> ReferenceSection:
        if self.cache_top_k is not None and self.cache is None:
            raise ValueError(f"cache_top_k={self.cache_top_k} without cache: give the folder too, or leave it out")
        return self

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the references that this one is computed from."""
        return ()

    @property
    def normalized(self) -> bool:
        """False if its probabilities are known only up to a factor per prompt."""
        return True

    @property
    def reads_whole(self) -> bool:
        """True if it always needs its members' whole distributions."""
        return False

    def check_whole(self, *, field: str, reader: str) -> None:
        """Refuse a reader of whole distributions if the reference has none, before anything is loaded.

        Args:
            field: The section in messages.
            reader: What reads them, in messages.

        Raises:
            ConfigError: The reference gives the log-probabilities of given tokens only.
        """

    def check(self, *, field: str, adapter: bool) -> None:
        """Refuse settings that cannot work, before anything is loaded.

        Args:
            field: The section in messages.
            adapter: Whether the policy has an adapter.

        Raises:
            ConfigError: Fields contradict each other; the message names them.
        """

    def check_rollouts(self, *, field: str, updates: int) -> None:
        """Refuse a reference that would move between the updates on one rollout, before anything is loaded.

        References of your own are asked when they are made (:meth:`falign.references.Reference.check_rollouts`).

        Args:
            field: The section in messages.
            updates: Optimizer steps on each rollout.

        Raises:
            ConfigError: The interval is not a multiple of the updates.
        """

    def check_evaluation(self, *, field: str, every: int | None) -> None:
        """Refuse a reference that waits for evaluations which do not come.

        Args:
            field: The section in messages.
            every: Steps between two evaluations; None for none during training.

        Raises:
            ConfigError: It needs evaluations.
        """

    def check_sharding(self, *, field: str) -> None:
        """Refuse settings that do not work with sharded weights (FSDP2), before anything is loaded.

        Raises:
            ConfigError: The reference cannot be sharded; the message has the reason and the alternatives.
        """

    def model_paths(self) -> Iterator[str]:
        """Return the paths of models and adapters that are loaded besides the policy."""
        yield from ()

    def models_that_read_ids(self, *, field: str, own: str) -> Iterator[tuple[str, str]]:
        """Return the field and path of each separate model, which must have the policy's token ids.

        Args:
            field: The section.
            own: The policy's path.
        """
        yield from ()

    def resolved(self, config: PolicySections) -> ReferenceSection:
        """Return the section after ``auto`` is resolved."""
        return self

    def starts_as_policy(self, config: PolicySections) -> bool:
        """Return whether policy and reference are the same model before the first step."""
        return False

    def build_with_prompt(self, context: BuildContext) -> Reference:
        """Return the reference, behind its own prompt if it has one.

        Raises:
            FalignError: See `build`; or a prompt is too long for the model.
        """
        reference = self.build(context)
        if self.prompt is None:
            return reference
        from falign.references import Prompted

        prompts = context.prompts
        if prompts is not None:
            _check_length(reference, prompts, context)
        return Prompted(reference, {} if prompts is None else prompts.ids, template=self.prompt)

    def build(self, context: BuildContext) -> Reference:
        """Return the reference, with the content hash of its weights.

        Raises:
            FalignError: A model or adapter is missing, or does not fit the policy.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build().")


def _check_length(reference: Reference, prompts: OtherPrompts, context: BuildContext) -> None:
    from falign.models import base_of

    reference.check_length(prompts.longest, place=f"{context.field}.prompt: {prompts.place}")
    model: Any = reference.own_model or base_of(context.policy)
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and prompts.longest > positions:
        raise ConfigError(
            f"{context.field}.prompt: {prompts.place} has {prompts.longest} tokens behind this prompt, completion "
            f"included, and the reference has {positions} positions: shorten the prompt, or leave the row out."
        )
