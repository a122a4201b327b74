"""Completions sampled from the policy, as token ids with the log-probabilities that they were drawn with."""

from falign.rollouts.base import Engine, EngineCapabilities, Rollout, SamplingParams
from falign.rollouts.transformers_engine import TransformersEngine
from falign.rollouts.vllm_engine import VLLMEngine
from falign.rollouts.vllm_handshake import Handshake, shake_hands

__all__ = [
    "Engine",
    "EngineCapabilities",
    "Handshake",
    "Rollout",
    "SamplingParams",
    "TransformersEngine",
    "VLLMEngine",
    "shake_hands",
]
