"""Scores of sampled completions under policy and reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import TypedDict, override

from falign.divergences import ForwardKL, ReverseKL
from falign.errors import ModelError
from falign.evaluation.completion_scorer import CompletionScorer, plain_floats
from falign.objectives import DivergenceTo
from falign.references import Reference
from falign.rewards.base import column
from falign.rewards.implicit import completion_trees
from falign.rollouts import Engine, EngineCapabilities, SampledCompletion, SamplingParams, TransformersEngine
from falign.scoring import PromptTree, Scorer, TokenBatch
from falign.training.online.groups import Group

__all__ = ["ReferenceEngine", "SampleRow", "SampleScorer", "ScoredReward", "sample_identity"]


class SampleRow(TypedDict):
    """Scores and metadata of one sampled completion, as plain values; log-probabilities are sums over tokens, nats.

    Attributes:
        place: The row of its prompt.
        prompt: Text or turns.
        completion: Its text, without special tokens.
        finish_reason: ``stop``, or ``length`` if it was clipped.
        reward: The combined reward.
        parts: The single rewards by name; None if one does not apply.
        logprob: log π, whichever model the completion was sampled from.
        reference_logprob: log π_ref; None without a reference.
        token_divergence: Divergence between the distributions of policy and reference at each token, summed: the
            reverse KL for a completion of the policy, the forward KL for one of the reference; None without one.
        num_tokens: Number of tokens, including the stop token.
        token_ids: The tokens' ids.
        entropy: Entropy of the policy's distribution, mean over tokens.
    """

    place: str
    prompt: Any
    completion: str
    finish_reason: str
    reward: float
    parts: dict[str, float | None]
    logprob: float
    reference_logprob: float | None
    token_divergence: float | None
    num_tokens: int
    token_ids: list[int]
    entropy: float


@dataclass(frozen=True, kw_only=True)
class SampleScorer:
    """Scores groups of completions, without gradient and dropout.

    Attributes:
        policy: The model, on the device to compute on.
        reference: The reference to compare it with; None for none.
        scorer: A scorer with a layout that both can read.
        tokens_per_batch: Maximum number of tokens scored at once; a larger group is scored alone.
    """

    policy: nn.Module
    reference: Reference | None
    scorer: Scorer
    tokens_per_batch: int = 4096

    def rows(self, groups: Sequence[Group], *, of_reference: bool = False) -> list[list[SampleRow]]:
        """Return the rows of each group.

        Args:
            groups: Prompts with their completions.
            of_reference: Whether the completions were sampled from the reference rather than the policy.

        Raises:
            ModelError: A value is NaN or infinite.
        """
        trees = [
            PromptTree(
                group.row.prompt_ids, tuple(rollout.completion_ids for rollout in group.rollouts), place=group.row.place
            )
            for group in groups
        ]
        # Only for the two KL divergences is the expected sum over tokens the divergence of whole completions, because
        # log u of a completion is the sum of log u of its tokens.
        divergence = DivergenceTo(ForwardKL() if of_reference else ReverseKL())
        scores = self.scorer.in_batches(
            trees, lambda batch: self._scores(batch, divergence), max_tokens=self.tokens_per_batch
        )
        return [sample_rows(group, fields) for group, fields in zip(groups, scores, strict=True)]

    def _scores(self, trees: Sequence[PromptTree], divergence: DivergenceTo) -> list[list[dict[str, Any]]]:
        batch = self.scorer.lay_out(trees, model=self.policy)
        if self.reference is None:
            scores = self.scorer.scores(self.policy, batch)
        else:
            states = {"reference": self.reference.states(self.policy, batch).distribution}
            scores = self.scorer.scores(self.policy, batch, measures={"divergence": divergence}, references=states)
        columns = {
            "logprob": _sums(scores.logprobs, batch, "logprob"),
            "reference_logprob": _sums(scores.references.get("reference"), batch, "reference_logprob"),
            "token_divergence": _sums(scores.measures.get("divergence"), batch, "token_divergence"),
            "entropy": _sums(scores.entropy / batch.completion_mask.sum(dim=-1, keepdim=True), batch, "entropy"),
        }
        fields = iter({name: values[n] for name, values in columns.items()} for n in range(len(batch.place)))
        return [[next(fields) for _ in tree.completion_ids] for tree in trees]


def _sums(values: Float[Tensor, "N T"] | None, batch: TokenBatch, name: str) -> list[float] | list[None]:
    if values is None:
        return [None] * len(batch.place)
    sums = values.double().masked_fill(~batch.completion_mask, 0.0).sum(dim=-1).cpu()
    bad = ~sums.isfinite()
    if bad.any():
        n = int(bad.nonzero()[0])
        raise ModelError(
            f"{batch.place[n]}: {name} of a sampled completion is {sums[n].item()}: check the weights and the dtype of "
            "policy and reference. Earlier samples are kept."
        )
    return plain_floats(sums)


def sample_identity(place: str, prompt: Any) -> dict[str, Any]:
    """Return the fields of a row that are known before sampling."""
    return {"place": place, "prompt": prompt}


def sample_rows(group: Group, scores: Sequence[dict[str, Any]]) -> list[SampleRow]:
    """Return the rows of a prompt's completions.

    Args:
        group: The completions and their rewards.
        scores: For each completion, the fields that :class:`SampleScorer` computes.
    """
    rows: list[Any] = [
        {
            **sample_identity(group.row.place, group.row.prompt),
            "completion": group.texts[i],
            "finish_reason": rollout.finish_reason,
            "reward": group.rewards[i],
            "parts": {name: values[i] for name, values in group.parts.items()},
            **scores[i],
            "num_tokens": len(rollout.completion_ids),
            "token_ids": list(rollout.completion_ids),
        }
        for i, rollout in enumerate(group.rollouts)
    ]
    return rows


class ReferenceEngine(Engine):
    """Samples from a reference.

    A reference inside the policy switches its adapters during each call, and restores them afterwards.

    Args:
        reference: The reference to sample from.
        policy: The policy, which contains some references.
        pad_token_id: See :class:`falign.rollouts.TransformersEngine`.
    """

    def __init__(self, reference: Reference, policy: nn.Module, *, pad_token_id: int) -> None:
        self.reference, self.policy, self.pad_token_id = reference, policy, pad_token_id

    @override
    def publish(self, model: nn.Module, version: int) -> None:
        """Do nothing: the reference does not follow the policy."""

    @override
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
        with self.reference.acting(self.policy) as model:
            engine = TransformersEngine(model, pad_token_id=self.pad_token_id)
            engine.publish(model, version)
            return engine.sample(prompt_ids, n, params, version=version, seed=seed, first=first)

    @override
    def retire(self, version: int) -> None:
        """Do nothing: the reference has one version."""

    @override
    def capabilities(self) -> EngineCapabilities:
        with self.reference.acting(self.policy) as model:
            return TransformersEngine(model, pad_token_id=self.pad_token_id).capabilities()

    @override
    def close(self) -> None:
        """Do nothing: the engine does not own the models."""


@dataclass(frozen=True)
class ScoredReward:
    """The implicit reward of completions under a run's own objective.

    It reads the columns ``prompt_ids`` and ``completion_ids``, so the run must have the tokens of the sampled policy.

    Attributes:
        scorer: Scores completions under the run's policy, references and objective.
        tokens_per_batch: Maximum number of tokens scored at once; a larger group is scored alone.
    """

    scorer: CompletionScorer
    tokens_per_batch: int = 4096

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        prompt_ids, completion_ids = (column(columns, name, reward="implicit") for name in _READ)
        trees = completion_trees(prompt_ids, completion_ids, columns.get("place"))
        scored = self.scorer.scorer.in_batches(trees, self.scorer.score, max_tokens=self.tokens_per_batch)
        return [row["implicit_reward"] for rows in scored for row in rows]


_READ = ("prompt_ids", "completion_ids")
