"""The implicit reward of a pair of models: what a policy was made to prefer, as a reward for another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from falign.divergences import Divergence
from falign.errors import RewardError
from falign.models.identity import model_identity
from falign.objectives.link import Link
from falign.references import detached_logprobs
from falign.rewards.base import column, place_of
from falign.rewards.identity import Identity
from falign.scoring import DEFAULT_CHUNK_TOKENS, LAYOUTS, Layout, PromptTree

__all__ = ["ImplicitReward", "completion_trees"]


@dataclass(frozen=True)
class ImplicitReward:
    """``β f'(π(y|x)/π_ref(y|x))`` of two models, of whole completions.

    It reads the columns ``prompt_ids`` and ``completion_ids``, so both models must have the policy's tokens.

    Attributes:
        model: π, for instance what f-DPO has trained.
        reference: π_ref, what it was trained from; on the same device.
        divergence: f; it must have a barrier.
        beta: β.
        pad_token_id: Any valid id.
        layout: One that both models can read.
        tokens_per_batch: Tokens scored at once, unless one prompt with its completions has more.
        chunk_tokens: How many positions reach the head at once.

    Raises:
        ValueError: The divergence has no barrier, or β is not positive.
    """

    model: nn.Module
    reference: nn.Module
    divergence: Divergence
    beta: float
    pad_token_id: int = 0
    layout: Layout = "padded"
    tokens_per_batch: int = 8192
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    link: Link = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "link", Link(self.divergence, self.beta, "none"))

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        prompt_ids = column(columns, "prompt_ids", reward="implicit")
        completion_ids = column(columns, "completion_ids", reward="implicit")
        values: list[float | None] = []
        for batch in self._batches(completion_trees(prompt_ids, completion_ids, columns.get("place"))):
            values += self._rewards(batch)
        return values

    def identity(self) -> Identity:
        """Return this module, both models' weights and configurations, and the fields that change a value."""
        models: list[Any] = [self.model, self.reference]
        identities = [model_identity(model) for model in models]
        return Identity(__name__, {"models": identities, "divergence": repr(self.divergence), "beta": self.beta})

    def _batches(self, trees: Sequence[PromptTree]) -> list[list[PromptTree]]:
        batches: list[list[PromptTree]] = []
        room = 0
        for tree in trees:
            size = tree.num_tokens
            if self.layout == "padded":  # the prompt is computed once for each completion
                size += len(tree.prompt_ids) * (len(tree.completion_ids) - 1)
            if not batches or size > room:
                batches.append([])
                room = self.tokens_per_batch
            batches[-1].append(tree)
            room -= size
        return batches

    def _rewards(self, trees: Sequence[PromptTree]) -> list[float]:
        batch = LAYOUTS[self.layout](trees, pad_token_id=self.pad_token_id)
        batch = batch.to(next(self.model.parameters()).device)
        logprobs, reference_logprobs = (
            detached_logprobs(model, batch, chunk_tokens=self.chunk_tokens).float()
            for model in (self.model, self.reference)
        )
        return self.link.reward((logprobs - reference_logprobs).sum(dim=-1)).tolist()


def completion_trees(
    prompt_ids: Sequence[Any], completion_ids: Sequence[Any], places: Sequence[str] | None
) -> list[PromptTree]:
    """Return a tree per run of completions of one prompt, in their order."""
    trees = []
    for ids, run in groupby(range(len(completion_ids)), key=lambda i: tuple(prompt_ids[i])):
        rows = list(run)
        place = place_of(places, rows[0])
        try:
            trees.append(PromptTree(ids, tuple(tuple(completion_ids[i]) for i in rows), place=place))
        except ValueError as error:
            raise RewardError(f"reward implicit: {error}") from error
    return trees
