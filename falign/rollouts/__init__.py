"""Completions sampled from the policy, as token ids with the log-probabilities that they were drawn with."""

from typing import TYPE_CHECKING

from falign.lazy import lazy_names

if TYPE_CHECKING:
    from falign.rollouts.base import Engine, EngineCapabilities, EngineSetup, SampledCompletion, SamplingParams
    from falign.rollouts.transformers_engine import TransformersEngine
    from falign.rollouts.vllm_engine import VLLMEngine
    from falign.rollouts.vllm_handshake import Handshake, shake_hands
    from falign.rollouts.vllm_prompt_scores import PromptScorer, ServedModel
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "falign.rollouts.base": (
                "Engine",
                "EngineCapabilities",
                "EngineSetup",
                "SampledCompletion",
                "SamplingParams",
            ),
            "falign.rollouts.transformers_engine": ("TransformersEngine",),
            "falign.rollouts.vllm_engine": ("VLLMEngine",),
            "falign.rollouts.vllm_handshake": ("Handshake", "shake_hands"),
            "falign.rollouts.vllm_prompt_scores": ("PromptScorer", "ServedModel"),
        },
    )

__all__ = [
    "Engine",
    "EngineCapabilities",
    "EngineSetup",
    "Handshake",
    "PromptScorer",
    "SampledCompletion",
    "SamplingParams",
    "ServedModel",
    "TransformersEngine",
    "VLLMEngine",
    "shake_hands",
]
