"""Scores of sampled completions under policy and reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.divergences import ForwardKL, ReverseKL
from falign.errors import ModelError
from falign.evaluation.sample_rows import SampleRow, sample_rows
from falign.evaluation.score_rows import plain_floats
from falign.evaluation.tree_stream import batches_in_order
from falign.objectives import DivergenceTo
from falign.references import Reference
from falign.scoring import (
    DEFAULT_CHUNK_TOKENS,
    LAYOUTS,
    Layout,
    PromptTree,
    TokenBatch,
    completion_scores,
    evaluation_mode,
)
from falign.training.online.groups import Group

__all__ = ["SampleScorer"]


@dataclass(frozen=True, kw_only=True)
class SampleScorer:
    """Scores groups of completions, without gradient and dropout.

    Attributes:
        policy: The model, on the device to compute on.
        reference: What it is compared with; None scores it alone.
        pad_token_id: Any valid id.
        layout: One that both can read.
        tokens_per_batch: Tokens that are scored at once, a larger group excepted.
        chunk_tokens: Positions that reach the vocabulary at once.
    """

    policy: nn.Module
    reference: Reference | None
    pad_token_id: int
    layout: Layout = "padded"
    tokens_per_batch: int = 4096
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS

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
        scores = [
            fields
            for batch in batches_in_order(trees, max_tokens=self.tokens_per_batch)
            for fields in self._scores(batch, divergence)
        ]
        rows, start = [], 0
        for group in groups:
            rows.append(sample_rows(group, scores[start : start + len(group.rollouts)]))
            start += len(group.rollouts)
        return rows

    def _scores(self, trees: Sequence[PromptTree], divergence: DivergenceTo) -> list[dict[str, Any]]:
        batch = LAYOUTS[self.layout](trees, pad_token_id=self.pad_token_id)
        batch = batch.to(next(self.policy.parameters()).device)
        with torch.no_grad(), evaluation_mode(self.policy):
            if self.reference is None:
                scores = completion_scores(self.policy, batch, chunk_tokens=self.chunk_tokens)
            else:
                scores = completion_scores(
                    self.policy,
                    batch,
                    measures={"divergence": divergence},
                    references={"reference": self.reference.states(self.policy, batch).distribution},
                    chunk_tokens=self.chunk_tokens,
                )
        columns = {
            "logprob": _sums(scores.logprobs, batch, "logprob"),
            "reference_logprob": _sums(scores.references.get("reference"), batch, "reference_logprob"),
            "token_divergence": _sums(scores.measures.get("divergence"), batch, "token_divergence"),
            "entropy": _sums(scores.entropy / batch.completion_mask.sum(dim=-1, keepdim=True), batch, "entropy"),
        }
        return [{name: values[n] for name, values in columns.items()} for n in range(len(batch.place))]


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
