"""The interface of engines: token ids in, sampled token ids with their log-probabilities out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from falign.errors import RolloutError

__all__ = [
    "Engine",
    "EngineCapabilities",
    "EngineSetup",
    "SampledCompletion",
    "SamplingParams",
    "check_prompts",
    "check_request",
]


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn; a model's own generation settings are not applied.

    Applied in this order: temperature, the `top_k` likeliest tokens, the smallest set of those left with mass `top_p`.

    Attributes:
        max_new_tokens: Longest completion, its stop token included.
        temperature: Divisor of the logits; 0 decodes greedily, and `top_k` and `top_p` then have no effect.
        top_k: Number of tokens that are kept, plus those as likely as the last one; 0 keeps all.
        top_p: Probability mass that is kept; 1 keeps all.
        stop_token_ids: Ids that end a completion, each as its last token.

    Raises:
        RolloutError: A value is out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RolloutError(f"max_new_tokens={self.max_new_tokens}: a completion has at least 1 token.")
        if not 0 <= self.temperature < float("inf"):
            raise RolloutError(f"temperature={self.temperature} must be a number ≥ 0 (0 decodes greedily).")
        if self.top_k < 0:
            raise RolloutError(f"top_k={self.top_k} must be ≥ 0 (0 keeps every token).")
        if not 0 < self.top_p <= 1:
            raise RolloutError(f"top_p={self.top_p} must be in (0, 1] (1 keeps every token).")

    @property
    def truncates(self) -> bool:
        """Whether tokens with a positive probability under the model can never be drawn."""
        return self.temperature == 0 or self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class SampledCompletion:
    """One sampled completion; the ids are those that were drawn, never an encoding of decoded text.

    Attributes:
        prompt_ids: Token ids of the prompt.
        completion_ids: The sampled ids; the stop token is the last one if the completion stopped.
        logprobs: Log-probability of each, nats, under the distribution that it was drawn from: after temperature, top-k
            and top-p. Greedy decoding draws from a point mass, so its values are 0.
        finish_reason: ``"stop"`` at a stop token, ``"length"`` at the maximum length.
        policy_version: Version of the published weights that it was drawn from.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    policy_version: int


@dataclass(frozen=True)
class EngineCapabilities:
    """Properties of an engine that a run checks before its first step.

    Attributes:
        dtype: Dtype of the weights that sample.
        processed_logprobs: Whether log-probabilities are of the distribution after temperature, top-k and top-p.
        max_length: Maximum number of tokens of a prompt with its completion; None if unlimited.
    """

    dtype: str
    processed_logprobs: bool
    max_length: int | None


@dataclass(frozen=True)
class EngineSetup:
    """The facts of a run that its engine may need when it is opened.

    Attributes:
        policy: The model that is trained, on its device.
        pad_token_id: Id that fills rows; any valid id.
        max_batch_tokens: Maximum number of tokens whose keys and values an engine in this process may hold at once.
        encode: From a text to token ids without special tokens.
        prompt_ids: A few prompts of the run, its longest.
        params: Sampling parameters of the run.
        longest: Maximum number of tokens of a prompt with its completion.
        ahead: Whether the next rollout is sampled while the policy learns from the last.
    """

    policy: nn.Module
    pad_token_id: int
    max_batch_tokens: int
    encode: Callable[[str], list[int]]
    prompt_ids: Sequence[Sequence[int]]
    params: SamplingParams
    longest: int
    ahead: bool = False


class Engine(ABC):
    """Draws completions from a version of the policy.

    An engine of your own subclasses it, and takes :class:`EngineSetup` as its argument ``setup`` and its settings as
    further arguments (``rollout.engine: {kind: module:Name, ...}``). Its constructor checks whatever must hold before
    the first step, for example by a handshake with a server.

    Attributes:
        many_processes: Whether each of several training processes can have one.
        samples_beside_training: Whether it can sample while the policy is trained, so that a run may sample ahead.
        max_gap: Bound of the mean difference from the policy's log-probabilities, nats, checked at every rollout; None
            for no check.
    """

    many_processes: ClassVar[bool] = True
    samples_beside_training: ClassVar[bool] = False
    max_gap: float | None = None

    @abstractmethod
    def publish(self, model: nn.Module, version: int) -> None:
        """Publish a model's current weights as `version`; once this returns, they can be sampled from."""

    @abstractmethod
    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        *,
        version: int,
        seed: int | list[int],
        first: int = 0,
    ) -> list[SampledCompletion]:
        """Draw `n` completions of each prompt.

        Args:
            prompt_ids: Token ids of each prompt.
            n: Completions per prompt.
            params: Sampling parameters.
            version: Version of the published weights to draw from.
            seed: The same call with the same seed draws the same tokens. With one seed per prompt, the tokens of a
                prompt do not depend on the other prompts.
            first: Index of the first prompt in a larger call of which this is a part; with one seed, the tokens are
                those of the larger call.

        Returns:
            Prompt after prompt, `n` at a time.

        Raises:
            RolloutError: The version is not published, a prompt leaves no room for a completion, or logits are NaN or
                infinite.
        """

    @abstractmethod
    def retire(self, version: int) -> None:
        """Accept no more requests for a version, so that its weights can be freed."""

    @abstractmethod
    def capabilities(self) -> EngineCapabilities:
        """Return the properties that a run checks before its first step."""

    @abstractmethod
    def close(self) -> None:
        """Release the engine's resources."""


def check_request(prompt_ids: Sequence[Sequence[int]], n: int, seed: int | list[int]) -> None:
    """Refuse a call for no completions, or with another number of seeds than one or one per prompt.

    Raises:
        RolloutError: The message has the numbers.
    """
    if n < 1:
        raise RolloutError(f"n={n}: at least 1 completion per prompt is drawn.")
    if not isinstance(seed, int) and len(seed) != len(prompt_ids):
        raise RolloutError(f"{len(seed)} seeds for {len(prompt_ids)} prompts: give one, or one for each prompt.")


def check_prompts(
    prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, vocabulary: int, positions: int | None
) -> None:
    """Refuse prompts that the model cannot read, or that leave no room for a completion.

    Args:
        prompt_ids: Token ids of each prompt.
        params: Sampling parameters, for the maximum length of completions.
        vocabulary: Number of tokens of the model.
        positions: Number of positions of the model; None if unlimited.

    Raises:
        RolloutError: The message has the prompt's index.
    """
    for i, prompt in enumerate(prompt_ids):
        if not prompt:
            raise RolloutError(f"Prompt {i} is empty: give at least one token, which predicts the first one drawn.")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise RolloutError(
                f"Prompt {i} has the token ids {min(prompt)} to {max(prompt)}, and the model {vocabulary} tokens: "
                "encode it with the model's own tokenizer."
            )
        if positions is not None and len(prompt) + params.max_new_tokens > positions:
            raise RolloutError(
                f"Prompt {i} has {len(prompt)} tokens, which with max_new_tokens={params.max_new_tokens} is more "
                f"than the {positions} positions of the model: shorten the prompt to "
                f"{max(positions - params.max_new_tokens, 0)}, or lower max_new_tokens."
            )
