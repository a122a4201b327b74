"""The test before the first step that the server computes what the trainer computes, adapters included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from peft import PeftModel
from transformers import PreTrainedModel

from falign.errors import ConfigError
from falign.models.heads import head_rows, left_out_rows
from falign.models.structure import base_of
from falign.rollouts.base import SamplingParams
from falign.rollouts.gap import EXACT, Canary, Gap, measure_gap, perturbed
from falign.rollouts.vllm_engine import VLLMEngine

__all__ = ["Handshake", "shake_hands"]

_VERSION = -(10**9) - 1  # differs from all versions of training and evaluation
_TOKENS, _COMPLETIONS = 8, 4  # tokens per completion, completions per prompt
_SUSPICIOUS = 0.1  # nats: above all gaps measured for 16-bit rounding
_TEXT = "Water boils at 100 degrees;\n\n  ‘heute’ it is 3,000 m – mean(values)?"


@dataclass(frozen=True)
class Handshake:
    """The result of the handshake.

    Attributes:
        sync: How weights are sent to the server.
        why_merged: Why they are not sent as adapters.
        dtype: Dtype of the server's weights.
        trained_dtype: Dtype of the trainer's weights.
        gap: Gap between server and trainer, on perturbed weights.
        bound: Allowed mean gap from now on; None if rounding would hide errors.
    """

    sync: str
    why_merged: str | None
    dtype: str
    trained_dtype: str
    gap: Gap
    bound: float | None

    @property
    def is_suspicious(self) -> bool:
        """True if the gap is larger than rounding usually explains."""
        return self.gap.mean > _SUSPICIOUS

    def __str__(self) -> str:
        """Return one line for the user."""
        how = "adapters" if self.sync == "adapter" else f"whole weights ({self.why_merged})"
        return (
            f"{how}, {self.dtype} there and {self.trained_dtype} here; log-probabilities of {self.gap.num_tokens} "
            f"tokens differ by {self.gap.mean:.1e} on average, {self.gap.max:.1e} at most"
        )


def shake_hands(
    engine: VLLMEngine,
    policy: PreTrainedModel | PeftModel,
    *,
    encode: Callable[[str], list[int]],
    prompt_ids: Sequence[Sequence[int]],
    params: SamplingParams,
    longest: int,
    max_gap: float | None = None,
) -> Handshake:
    """Test a server on perturbed weights, and make the engine test every later version.

    Args:
        engine: The engine of the server.
        policy: The model in training; it is perturbed for the test and then restored.
        encode: Maps a text to token ids without special tokens.
        prompt_ids: About two long prompts of the run.
        params: Sampling parameters of the run.
        longest: Tokens of the longest possible prompt with its completion.
        max_gap: Bound of the mean gap; by default there is one only if both compute in float32.

    Raises:
        ConfigError: The server's tokenizer, maximum length, head, weights or distribution differ from the run's.
        EngineError: The server fails.
    """
    described, trained = engine.description, str(base_of(policy).dtype).removeprefix("torch.")
    if longest > described.max_length:
        raise ConfigError(
            f"{engine.client.url}: --max-model-len is {described.max_length}, and prompts.max_length + "
            f"rollout.max_new_tokens = {longest}: raise the first or lower the others."
        )
    if left_out := left_out_rows(policy):
        rows = head_rows(policy)
        raise ConfigError(
            f"{engine.client.url}: the server samples from all {rows + left_out} rows of the policy's head, and the "
            f"reference has {rows}. Cut the policy to them (`model.resize_token_embeddings({rows})`, save it, train "
            "and serve that), or sample in this process."
        )
    theirs = engine.client.post_json(
        "/tokenize", {"model": described.base, "prompt": _TEXT, "add_special_tokens": False}
    )["tokens"]
    if theirs != encode(_TEXT):
        raise ConfigError(
            f"{engine.client.url}: its tokenizer, of {described.model}, differs from that of model.path: serve the "
            "model that is trained."
        )
    short = replace(params, max_new_tokens=min(_TOKENS, params.max_new_tokens))
    with perturbed(policy):
        engine.publish(policy, _VERSION)
        rollouts = engine.sample(prompt_ids, _COMPLETIONS, short, version=_VERSION, seed=0)
        gap = measure_gap(policy, rollouts, short)
    unchanged = measure_gap(policy, rollouts, short)
    engine.retire(_VERSION)
    exact = described.dtype == trained == "float32"
    bound = EXACT if max_gap is None and exact else max_gap
    _judge(engine, gap, unchanged, bound)
    engine.max_gap = bound
    if bound is not None:
        engine.canary = Canary(prompt_ids[:1], short, bound=bound)
    assert engine.sync is not None
    return Handshake(engine.sync.kind, engine.why_merged, described.dtype, trained, gap, bound)


def _judge(engine: VLLMEngine, gap: Gap, unchanged: Gap, bound: float | None) -> None:
    place = f"{engine.client.url} on {gap.num_tokens} tokens"
    if not gap.mean < unchanged.mean:
        raise ConfigError(
            f"{place}: it samples the model without the change in the adapter (gap {unchanged.mean:.2g}, and "
            f"{gap.mean:.2g} to the model with it): the weights sent to it have no effect. See its log."
        )
    if bound is not None and not gap.mean <= bound:
        raise ConfigError(
            f"{place}: its log-probabilities are {gap.mean:.2g} off on average, {gap.max:.2g} at most, and {bound:.2g} "
            "is allowed (rollout.engine.max_gap). Serve the very model of model.path in the same dtype; possible "
            "causes are another temperature, weights left by another run, or another quantization."
        )
