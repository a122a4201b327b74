"""The section of the run file that says where completions are sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import nn

from falign.runfile.base_config import FrozenModel

if TYPE_CHECKING:
    from falign.rollouts import TransformersEngine, VLLMEngine

__all__ = ["CorrectionConfig", "EngineConfig", "TransformersEngineConfig", "VLLMEngineConfig"]


class CorrectionConfig(FrozenModel):
    """Weights π/π_sampler for what lies between sampler and trainer, cut off above."""

    cap: float = Field(default=2.0, ge=1)
    """Largest weight: of a token, or of a whole completion, as ``objective.importance`` says."""


class TransformersEngineConfig(FrozenModel):
    """In the process that trains, from the weights that are trained."""

    kind: Literal["transformers"] = "transformers"

    def build(self, policy: nn.Module, *, pad_token_id: int, max_batch_tokens: int) -> TransformersEngine:
        """Return the engine."""
        from falign.rollouts import TransformersEngine

        return TransformersEngine(policy, pad_token_id=pad_token_id, max_batch_tokens=max_batch_tokens)


class VLLMEngineConfig(FrozenModel):
    """From a vLLM server, started by itself (``scripts/vllm_server.sh``)."""

    kind: Literal["vllm"] = "vllm"
    url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://[^/]+/?$")
    shared_dir: str
    """A folder that the server sees under the same path; each version of the weights is written there."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds for any one call: for all completions of a prompt."""
    wait: float = Field(default=300.0, ge=0)
    """Seconds that the server may be away, at the start too; then the run ends and can be resumed."""
    sync: Literal["auto", "adapter", "merged"] = "auto"
    """``adapter``: over the server's base model; ``merged``: whole weights in place of it; ``auto``: the first where
    the server can."""
    max_gap: float | None = Field(default=None, gt=0)
    """Most that log-probabilities of sampler and trainer may differ by, mean over tokens, nats, before the run ends;
    left out, 0.001 where both compute in float32, and nothing where rounding is larger."""

    def build(self, *, vocabulary: int) -> VLLMEngine:
        """Return the engine, once the server is there.

        Raises:
            FalignError: It is not there, or not set up as it must be.
        """
        from falign.rollouts import VLLMEngine

        return VLLMEngine(
            self.url,
            shared_dir=self.shared_dir,
            vocabulary=vocabulary,
            timeout=self.timeout,
            wait=self.wait,
            sync=self.sync,
        )


EngineConfig = Annotated[TransformersEngineConfig | VLLMEngineConfig, Field(discriminator="kind")]
