"""Reward models: a scalar head on a language model, trained on comparisons under Bradley-Terry or Plackett-Luce."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput, Term
from falign.objectives.groups import accuracies, pairs_in
from falign.objectives.listwise import plackett_luce
from falign.objectives.margins import MarginLoss, get_margin_loss, logistic

__all__ = ["RankedRewardModel", "RewardModel"]


@dataclass(frozen=True)
class _LearnedReward(BaseObjective):
    """An objective of the reward head's value ``r(x, y)``.

    Attributes:
        centering: c, the strength of ``c · (Σ r)²`` over the completions that are compared. Comparisons leave a
            constant in r free; this keeps it near 0.
    """

    centering: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.centering < math.inf:
            raise ValueError(f"centering={self.centering!r} must not be negative, NaN or infinite.")

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"learned_rewards", "preference"})

    @property
    @override
    def reads_logprobs(self) -> bool:
        return False

    @property
    @override
    def reads_row_weights(self) -> bool:
        return True

    @override
    def completion_rewards(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        return batch.require("learned_rewards")

    def _terms(
        self, losses: Float[Tensor, " P"], weights: Float[Tensor, " P"], sums: Float[Tensor, " P"]
    ) -> tuple[Term, ...]:
        main = Term(losses, weights, name="reward_model")
        return (main, Term(sums.square(), weights, self.centering, "centering")) if self.centering else (main,)


@dataclass(frozen=True)
class RewardModel(_LearnedReward):
    """``ℓ(r(x, y_w) - r(x, y_l) - m)`` for each pair, with r the value of a head at a completion's last token.

    With ``ℓ = -log σ`` it is the likelihood of the comparisons under Bradley-Terry. The model under the head is
    trained with it. ``centering`` adds ``c · (r(x, y_w) + r(x, y_l))²``.

    Attributes:
        centering: c, not negative.
        margin_loss: ℓ, a function of the margin or its name (see :func:`falign.objectives.get_margin_loss`);
            ``"conservative(0.1)"`` is conservative label smoothing.
        margin: ``"data"`` subtracts the margin m of each row of the data; ``"none"`` is m = 0.

    Raises:
        ValueError: c is negative, or a name is unknown.

    Source:
        Stiennon et al. (arXiv:2009.01325), Eq. 1; Touvron et al., Llama 2 (arXiv:2307.09288), Eq. 2, for m; Eisenstein
        et al. (arXiv:2312.09244), Eq. 3, for the centering.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.zeros(2, 1),
        ...     completion_mask=torch.ones(2, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0]),
        ...     preference=torch.tensor([1.0, 0.0]),
        ...     learned_rewards=torch.tensor([1.5, -0.5]),
        ... )
        >>> RewardModel()(batch).terms[0].losses
        tensor([0.1269])
    """

    margin_loss: MarginLoss | str = logistic
    margin: Literal["none", "data"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.margin_loss, str):
            object.__setattr__(self, "margin_loss", get_margin_loss(self.margin_loss))
        if self.margin not in ("none", "data"):
            raise ValueError(f"margin={self.margin!r}: choose 'none' or 'data'.")

    @property
    @override
    def needs(self) -> frozenset[str]:
        return super().needs if self.margin == "none" else super().needs | {"margin"}

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per pair of the batch.

        Args:
            batch: Completions with :attr:`needs`; any two completions of one prompt with different preferences form a
                pair.

        Returns:
            One term of shape (pairs,), a second one for ``centering``, and the metrics ``rewards/*`` of each pair; a
            tie, up to rounding, counts half in ``rewards/accuracies``.

        Raises:
            ValueError: A needed field is None, or no two completions of one prompt differ in preference.
        """
        rewards = batch.require("learned_rewards")
        chosen, rejected = pairs_in(batch)
        lead = rewards[chosen] - rewards[rejected]
        wanted = batch.require("margin")[chosen] if self.margin == "data" else 0.0
        assert callable(self.margin_loss)
        losses = self.margin_loss(lead - wanted)
        with torch.no_grad():
            size = torch.maximum(rewards[chosen].abs(), rewards[rejected].abs())
            metrics = {
                "rewards/chosen": rewards[chosen],
                "rewards/rejected": rewards[rejected],
                "rewards/margins": lead,
                "rewards/accuracies": accuracies(lead, size),
            }
        weights = batch.weighted(torch.ones_like(losses), chosen)
        terms = self._terms(losses, weights, rewards[chosen] + rewards[rejected])
        return ObjectiveOutput(terms, {name: values.detach() for name, values in metrics.items()})


@dataclass(frozen=True)
class RankedRewardModel(_LearnedReward):
    """The Plackett-Luce likelihood of ranked lists, with a head's value as the reward; :class:`RewardModel` for two.

    ``centering`` adds ``c · (r(x, y_best) + r(x, y_worst))²``, of the means if several share the rank.

    Attributes:
        centering: c, not negative.

    Raises:
        ValueError: c is negative.

    Source:
        Plackett-Luce as in Rafailov et al., DPO (arXiv:2305.18290), Appendix A.3; ties as in
        :class:`falign.objectives.Listwise`.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.zeros(3, 1),
        ...     completion_mask=torch.ones(3, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0, 0]),
        ...     preference=torch.tensor([2.0, 1.0, 0.0]),
        ...     learned_rewards=torch.tensor([1.0, 0.0, -1.0]),
        ... )
        >>> RankedRewardModel()(batch).terms[0].losses
        tensor([0.7209])
    """

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per prompt of the batch.

        Args:
            batch: Completions with :attr:`needs`; two or more per prompt, in any order.

        Returns:
            One term of shape (prompts,), a second one for ``centering``, and the metrics ``rewards/*`` of
            :class:`falign.objectives.Listwise`.

        Raises:
            ValueError: A needed field is None, or no two completions of one prompt differ in preference.
        """
        rewards = batch.require("learned_rewards")
        found = plackett_luce(batch, rewards)
        ends = found.mean(found.best, rewards) + found.mean(found.worst, rewards)
        return ObjectiveOutput(self._terms(found.losses, found.weights, ends), found.metrics)
