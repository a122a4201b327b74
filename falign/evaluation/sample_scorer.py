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
    """Scores and metadata of one sampled completion; logs are in nats, and sums are over its tokens.

    Attributes:
        place: The row that its prompt came from.
        prompt: Text or turns.
        completion: Its text, without special tokens.
        finish_reason: ``stop``, or ``length`` where it was clipped.
        reward: What it is worth.
        parts: The rewards that this was combined of; None where one does not apply.
        logprob: log π, whatever the completion was sampled from.
        reference_logprob: log π_ref; None without a reference.
        token_divergence: Summed divergence between policy and reference over the whole vocabulary at each token: the
            reverse KL in a completion of the policy, the forward KL in one of the reference.
        num_tokens: Its tokens, the stop token included.
        token_ids: Their ids.
        entropy: Mean entropy of the policy's distribution at its tokens.
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
        reference: What it is compared with; None scores it alone.
        scorer: Its layout is one that both can read.
        tokens_per_batch: Tokens that are scored at once, a larger group excepted.
    """

    policy: nn.Module
    reference: Reference | None
    scorer: Scorer
    tokens_per_batch: int = 4096

    def rows(self, groups: Sequence[Group], *, of_reference: bool = False) -> list[list[SampleRow]]:
        """Return the rows of each group.

        Args:
            groups: Prompts with their completions.
            of_reference: Whether the reference has written these, and not the policy.

        Raises:
            ModelError: A value is not finite.
        """
        trees = [
            PromptTree(
                group.row.prompt_ids, tuple(rollout.completion_ids for rollout in group.rollouts), place=group.row.place
            )
            for group in groups
        ]
        # The mean of the full divergence at each token is that of whole completions for these two alone: log u of a
        # completion is the sum of its tokens'.
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
            f"{batch.place[n]}: {name} of a sampled completion is {sums[n].item()}. Check the weights and the dtype of "
            "policy and reference; what was sampled before it is kept."
        )
    return plain_floats(sums)


def sample_identity(place: str, prompt: Any) -> dict[str, Any]:
    """Return what rows of a prompt have whatever is sampled."""
    return {"place": place, "prompt": prompt}


def sample_rows(group: Group, scores: Sequence[dict[str, Any]]) -> list[SampleRow]:
    """Return the rows of a prompt's completions.

    Args:
        group: The completions and their rewards.
        scores: For each the fields that policy and reference give.
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
    """Samples from a reference, which acts for as long as a call lasts and no longer.

    Args:
        reference: What samples.
        policy: The model that some references are a part of.
        pad_token_id: As for :class:`falign.rollouts.TransformersEngine`.
    """

    def __init__(self, reference: Reference, policy: nn.Module, *, pad_token_id: int) -> None:
        self.reference, self.policy, self.pad_token_id = reference, policy, pad_token_id

    @override
    def publish(self, model: nn.Module, version: int) -> None:
        """Do nothing: the reference is what it is."""

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
        """Do nothing: the reference is what it is."""

    @override
    def capabilities(self) -> EngineCapabilities:
        with self.reference.acting(self.policy) as model:
            return TransformersEngine(model, pad_token_id=self.pad_token_id).capabilities()

    @override
    def close(self) -> None:
        """Do nothing: whoever made the models keeps them."""


@dataclass(frozen=True)
class ScoredReward:
    """The implicit reward of a completion under the run's own objective.

    It reads the columns ``prompt_ids`` and ``completion_ids``, so its models must have the policy's tokens.

    Attributes:
        scorer: The run's policy, reference and objective.
        tokens_per_batch: Tokens that are scored at once, a larger group excepted.
    """

    scorer: CompletionScorer
    tokens_per_batch: int = 4096

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        prompt_ids, completion_ids = (column(columns, name, reward="implicit") for name in _READ)
        trees = completion_trees(prompt_ids, completion_ids, columns.get("place"))
        scored = self.scorer.scorer.in_batches(trees, self.scorer.score, max_tokens=self.tokens_per_batch)
        return [row["implicit_reward"] for rows in scored for row in rows]


_READ = ("prompt_ids", "completion_ids")
