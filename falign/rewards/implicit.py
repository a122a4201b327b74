"""The implicit reward of a pair of models, as a reward for another policy."""

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
from falign.rewards.base import column, place_of
from falign.rewards.identity import Identity
from falign.scoring import PromptTree, Scorer

__all__ = ["ImplicitReward", "completion_trees"]


@dataclass(frozen=True)
class ImplicitReward:
    """``β f'(π(y|x)/π_ref(y|x))`` of two models, of whole completions.

    It reads the columns ``prompt_ids`` and ``completion_ids``, so both models must have the policy's tokens.

    Attributes:
        model: π, for example a model trained by f-DPO.
        reference: π_ref, the model that it was trained from; on the same device.
        divergence: f; it must have a barrier.
        beta: β.
        scorer: A scorer with a layout that both models can read.
        tokens_per_batch: Tokens scored at once, unless one prompt with its completions has more.

    Raises:
        ValueError: The divergence has no barrier, or β is not positive.
    """

    model: nn.Module
    reference: nn.Module
    divergence: Divergence
    beta: float
    scorer: Scorer = field(default_factory=Scorer)
    tokens_per_batch: int = 8192
    link: Link = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "link", Link(self.divergence, self.beta, "none"))

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        prompt_ids = column(columns, "prompt_ids", reward="implicit")
        completion_ids = column(columns, "completion_ids", reward="implicit")
        trees = completion_trees(prompt_ids, completion_ids, columns.get("place"))
        rewards = self.scorer.in_batches(trees, self._rewards, max_tokens=self.tokens_per_batch)
        return [reward for of_tree in rewards for reward in of_tree]

    def identity(self) -> Identity:
        """Return this module, both models' weights and configurations, and the fields that change a value."""
        models: list[Any] = [self.model, self.reference]
        identities = [model_identity(model) for model in models]
        return Identity(__name__, {"models": identities, "divergence": repr(self.divergence), "beta": self.beta})

    def _rewards(self, trees: list[PromptTree]) -> list[list[float]]:
        batch = self.scorer.lay_out(trees, model=self.model)
        logprobs, reference_logprobs = (
            self.scorer.scores(model, batch).logprobs.float() for model in (self.model, self.reference)
        )
        rewards = self.link.reward((logprobs - reference_logprobs).sum(dim=-1))
        return [own.tolist() for own in rewards.split([len(tree.completion_ids) for tree in trees])]


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
