"""A term that keeps the implicit reward of completions above a fixed value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from typing_extensions import override

from falign.divergences import Divergence
from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput, Term
from falign.objectives.link import Link
from falign.objectives.margins import logistic

__all__ = ["Anchored"]


@dataclass(frozen=True)
class Anchored(BaseObjective):
    """``-log σ(r̂ - value)`` of each completion, with the implicit reward ``r̂ = β f'(u)``.

    Beside a loss of pairs, which only widens the margin, it keeps the reward of the chosen answers from falling: select
    these with :class:`falign.objectives.Selected`.

    Attributes:
        divergence: f; it must have a barrier.
        beta: β, positive.
        value: The anchor, nats of reward.
        weighting: As in :class:`falign.objectives.Pairwise`.

    Raises:
        ValueError: The divergence has no barrier, β is not positive, or ``value`` is not finite.

    Source:
        The anchor of OPA-DPO (Yang et al., arXiv:2501.09695), with the reverse KL and the value 0.

    Example:
        >>> from falign import divergences
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0]]),
        ...     reference_logprobs=torch.tensor([[-1.0]]),
        ...     completion_mask=torch.ones(1, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0]),
        ... )
        >>> Anchored(divergences.get("reverse_kl"))(batch).mean()  # log 2
        tensor(0.6931)
    """

    divergence: Divergence
    beta: float = 0.1
    value: float = 0.0
    weighting: Literal["none", "data"] = "none"

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"value={self.value!r} must be finite.")
        if self.weighting not in ("none", "data"):
            raise ValueError(f"weighting={self.weighting!r}: choose 'none' or 'data'.")
        _ = self.link  # validates the other two fields

    @property
    @override
    def link(self) -> Link:
        return Link(self.divergence, self.beta, "none")

    @property
    @override
    def reads_row_weights(self) -> bool:
        return True

    @property
    @override
    def needs(self) -> frozenset[str]:
        fields = frozenset({"reference_logprobs"})
        return fields if self.weighting == "none" else fields | {"token_weights.data"}

    @property
    @override
    def imitates(self) -> bool:
        return True

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per completion.

        Args:
            batch: Completions with :attr:`needs`.

        Returns:
            One term of shape (N,), and the metrics ``rewards`` and ``above`` (1 where the reward is above the value) of
            each completion.

        Raises:
            ValueError: A needed field is None.
        """
        rewards = self.link.rewards_of(batch, weighted=self.weighting != "none").rewards
        losses = logistic(rewards - self.value)
        above = (rewards > self.value).to(rewards.dtype)
        metrics = {"rewards": rewards.detach(), "above": above.detach()}
        return ObjectiveOutput((Term(losses, batch.weighted(torch.ones_like(losses)), name="anchored"),), metrics)
