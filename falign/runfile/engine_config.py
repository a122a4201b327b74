"""The section of the run file for the engine that samples: one model per kind, distinguished by ``kind``."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from typing_extensions import override

from falign.errors import ConfigError
from falign.registry import Registry
from falign.runfile.base_config import FrozenModel
from falign.runfile.members import OwnSection, union_of_kinds

if TYPE_CHECKING:
    from rich.console import Console

    from falign.rollouts import Engine, EngineSetup

__all__ = [
    "ENGINES",
    "CorrectionConfig",
    "EngineConfig",
    "OwnEngineConfig",
    "TransformersEngineConfig",
    "VLLMEngineConfig",
]


class CorrectionConfig(FrozenModel):
    """Importance weights π/π_sampler for the difference between sampler and trainer, bounded above."""

    cap: float = Field(default=2.0, ge=1)
    """Largest weight, of a token or a whole completion according to ``objective.importance``."""


class EngineSection(FrozenModel):
    """An engine of the run file; it builds the engine and checks it before the first step."""

    kind: Any  # each section narrows it to its own name

    @property
    def samples_beside_training(self) -> bool:
        """False if ``rollout.ahead`` is known to be impossible before the engine is made."""
        return True

    def check_processes(self, number: int) -> None:
        """Refuse more training processes than the engine can serve.

        Raises:
            ConfigError: There are too many; the message has the reason.
        """
        engine = ENGINES.get(self.kind, field="rollout.engine.kind")
        if number > 1 and not engine.many_processes:
            raise ConfigError(
                f"rollout.engine.kind={self.kind} with {number} processes: if one loses the engine, the others would "
                "wait forever. Train in one process, or sample in process (kind: transformers)."
            )

    def check_policy(self, *, new_tokens: bool) -> None:
        """Refuse a policy that the engine cannot sample from.

        Args:
            new_tokens: Whether the policy has tokens that its checkpoint lacks.

        Raises:
            ConfigError: The engine lacks these tokens.
        """

    @abstractmethod
    def open(self, setup: EngineSetup, console: Console) -> Engine:
        """Return the engine, ready to sample and checked against the policy.

        Args:
            setup: What the run needs of the engine.
            console: Shows progress and notes.

        Raises:
            FalignError: The engine is unavailable, or does not sample as the run needs.
        """


class TransformersEngineConfig(EngineSection):
    """Sampling in the training process, directly from the weights in training."""

    kind: Literal["transformers"] = "transformers"

    @property
    @override
    def samples_beside_training(self) -> bool:
        return False

    @override
    def open(self, setup: EngineSetup, console: Console) -> Engine:
        from falign.rollouts import TransformersEngine

        return TransformersEngine(
            setup.policy, pad_token_id=setup.pad_token_id, max_batch_tokens=setup.max_batch_tokens
        )


class VLLMEngineConfig(EngineSection):
    """Sampling from a vLLM server, which is started separately (``scripts/vllm_server.sh``)."""

    kind: Literal["vllm"] = "vllm"
    url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://[^/]+/?$")
    shared_dir: str
    """A folder that the server sees under the same path; each version of the weights is written there."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds for each call, that is, for all completions of a prompt."""
    wait: float = Field(default=300.0, ge=0)
    """Seconds that the server may be unavailable, also at the start; then the run ends and can be resumed."""
    sync: Literal["auto", "adapter", "merged"] = "auto"
    """``adapter``: over the server's base model; ``merged``: whole weights instead of it; ``auto``: ``adapter`` if the
    server supports it."""
    max_gap: float | None = Field(default=None, gt=0)
    """Allowed mean difference per token between log-probabilities of sampler and trainer, nats; above it the run ends.
    By default 0.001 if both compute in float32, else no limit, because rounding is larger."""

    @override
    def check_policy(self, *, new_tokens: bool) -> None:
        if new_tokens:
            raise ConfigError(
                "model.new_tokens with rollout.engine.kind=vllm: the server has the embeddings of the checkpoint, and "
                "they lack these tokens. Serve and train a model that has them (the merged export of an offline run), "
                "or use rollout.engine.kind=transformers."
            )

    @override
    def open(self, setup: EngineSetup, console: Console) -> Engine:
        from falign.models import base_of
        from falign.rollouts import VLLMEngine, shake_hands

        policy: Any = setup.policy
        with console.status(f"waiting for {self.url}"):
            engine = VLLMEngine(
                self.url,
                shared_dir=self.shared_dir,
                vocabulary=base_of(policy).config.get_text_config().vocab_size,
                timeout=self.timeout,
                wait=self.wait,
                sync=self.sync,
            )
        try:
            with console.status(f"trying {self.url}"):
                found = shake_hands(
                    engine,
                    policy,
                    encode=setup.encode,
                    prompt_ids=setup.prompt_ids,
                    params=setup.params,
                    longest=setup.longest,
                    max_gap=self.max_gap,
                )
        except BaseException:
            engine.close()
            raise
        style = "yellow" if found.is_suspicious else None
        console.print(f"rollouts: {self.url}, {found}", style=style, highlight=False, markup=False, soft_wrap=True)
        return engine


class OwnEngineConfig(OwnSection, EngineSection, extra="allow"):
    """An engine of your own: ``module:Name``, a subclass of :class:`falign.rollouts.Engine`.

    It is called with ``setup`` (:class:`falign.rollouts.EngineSetup`) and the other keys of the section.
    """

    @override
    def open(self, setup: EngineSetup, console: Console) -> Engine:
        from falign.rollouts import Engine

        engine: Engine = self.make(ENGINES, place="rollout.engine", protocol=Engine, setup=setup)
        place, able = f"rollout.engine.kind={self.kind}", engine.capabilities()
        if setup.ahead and not engine.samples_beside_training:
            raise ConfigError(f"{place} cannot sample beside training: leave rollout.ahead out.")
        if not able.processed_logprobs:
            raise ConfigError(
                f"{place} gives log-probabilities from before temperature, top-k and top-p; return those of the "
                "distribution that the tokens are drawn from."
            )
        if able.max_length is not None and setup.longest > able.max_length:
            raise ConfigError(
                f"{place} reads {able.max_length} tokens, and prompts.max_length + rollout.max_new_tokens = "
                f"{setup.longest}: lower one of them."
            )
        return engine


def _is_engine(value: Any) -> bool:
    from falign.rollouts import Engine

    return inspect.isclass(value) and issubclass(value, Engine)


ENGINES: Registry[type[Engine]] = Registry(
    "engine",
    {
        "transformers": "falign.rollouts.transformers_engine:TransformersEngine",
        "vllm": "falign.rollouts.vllm_engine:VLLMEngine",
    },
    wanted="subclass of falign.rollouts.Engine",
    is_member=_is_engine,
)

if TYPE_CHECKING:
    EngineConfig = EngineSection
else:
    EngineConfig = union_of_kinds(
        {"transformers": TransformersEngineConfig, "vllm": VLLMEngineConfig}, own=OwnEngineConfig
    )
"""The engine: ``kind`` names one of these."""
