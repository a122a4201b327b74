"""f-DPO and its relatives: a margin loss on the implicit rewards of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from falign.divergences import Divergence
from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput, Term
from falign.objectives.groups import accuracies, pairs_in
from falign.objectives.link import Link
from falign.objectives.margins import IPO, MarginLoss, PerTokenLoss, get_margin_loss, logistic

__all__ = ["Pairwise"]


@dataclass(frozen=True)
class Pairwise(BaseObjective):
    """``ℓ(r̂_w - r̂_l)`` for each pair, with implicit reward ``r̂ = β f'(u)`` and ``u = π(y|x)/π_ref(y|x)``.

    A maximizer of ``E[r] - β D_f(π‖π_ref)`` satisfies ``r = β f'(u) + λ(x)``, and λ cancels in the margin; this needs
    ``f'(0+) = -inf``, so that no completion gets probability 0. With ``ℓ = -log σ`` it is f-DPO, with the reverse KL
    DPO.

    Attributes:
        divergence: f; it must have a barrier.
        margin_loss: ℓ, a function of the margin or its name (see :func:`falign.objectives.get_margin_loss`);
            ``"ipo"`` is :class:`IPO` with this β.
        beta: β, strength of the divergence, nats of reward; positive.
        length_norm: ``"token"`` divides ``log u`` by the completion's length, so that u is a ratio per token; None is
            ``"token"`` for IPO, else ``"none"``.
        weighting: ``"data"`` multiplies each token's log-ratio by its weight in the data
            (``CompletionBatch.token_weights``): a token of weight 0 is left out, for policy and reference alike. The
            implicit reward of :attr:`link` stays that of all tokens.
        entropy_weight: α of H-DPO: the reward is ``β (f'(u) + (α - 1) log π)``; α = 1 is f-DPO, α < 1 sharpens the
            policy, α > 1 keeps it diverse. With α ≠ 1 longer completions have other rewards at the same u.

    Raises:
        ValueError: The divergence has no barrier, β or α is not positive, f does not admit α < 1 (:class:`Link`), a
            name is unknown, or IPO is requested for whole completions.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240), Eq. 8 and Theorem 1. ``length_norm``: Ahrabian et al. (arXiv:2407.15229)
        for the reverse KL; for other f, f' is applied to the length-normalized log-ratio. ``entropy_weight``:
        Omura et al., H-DPO (arXiv:2411.07595), for the reverse KL, where ``r̂ = β (α log π - log π_ref)``.

    Example:
        >>> from falign import divergences
        >>> objective = Pairwise(divergences.get("jensen_shannon"), beta=0.2)
        >>> objective.implicit_reward(torch.tensor([0.0, 100.0]))  # bounded by β log 2
        tensor([0.0000, 0.1386])
    """

    divergence: Divergence
    margin_loss: MarginLoss | str = logistic
    beta: float = 0.1
    length_norm: Literal["none", "token"] | None = None
    weighting: Literal["none", "data"] = "none"
    entropy_weight: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.margin_loss, str):
            loss = IPO(self.beta) if self.margin_loss == "ipo" else get_margin_loss(self.margin_loss)
            object.__setattr__(self, "margin_loss", loss)
        per_token = isinstance(self.margin_loss, PerTokenLoss)
        if self.length_norm is None:
            object.__setattr__(self, "length_norm", "token" if per_token else "none")
        if isinstance(self.margin_loss, PerTokenLoss) and self.length_norm != "token":
            raise ValueError(
                f"length_norm={self.length_norm!r} with margin_loss='ipo': IPO uses log-ratios per token; leave it "
                f"out, or choose the loss of whole completions, {self.margin_loss.per_token_instead_of!r}."
            )
        if self.weighting not in ("none", "data"):
            raise ValueError(f"weighting={self.weighting!r}: choose 'none' or 'data'.")
        if self.weighting != "none" and self.entropy_weight != 1:
            raise ValueError(
                f"weighting={self.weighting!r} with entropy_weight={self.entropy_weight!r}: token weights apply to "
                "log-ratios, and the latter adds log-probabilities; leave one of them out."
            )
        _ = self._link  # validates the other fields

    @property
    def _link(self) -> Link:
        assert self.length_norm is not None
        return Link(self.divergence, self.beta, self.length_norm, self.entropy_weight)

    @property
    @override
    def link(self) -> Link | None:
        return self._link if self.entropy_weight == 1 else None

    @override
    def completion_rewards(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        return self._link.rewards_of(batch).rewards

    @property
    @override
    def reads_row_weights(self) -> bool:
        return True

    @property
    @override
    def needs(self) -> frozenset[str]:
        fields = frozenset({"reference_logprobs", "preference"})
        return fields if self.weighting == "none" else fields | {"token_weights.data"}

    def implicit_reward(self, log_ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return ``β f'(u)``, the reward that this method defines if α = 1, up to a constant per prompt.

        Args:
            log_ratio: ``log u`` of whole completions (per token where ``length_norm="token"``), nats.

        Returns:
            The reward, same shape.
        """
        return self._link.reward(log_ratio)

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per pair of the batch.

        Args:
            batch: Completions with ``reference_logprobs``, ``preference`` and, with ``weighting``, ``token_weights``;
                any two completions of one prompt with different preferences form a pair.

        Returns:
            One term of shape (pairs,), and the metrics ``rewards/*`` (β f'(u)), ``logratios/*`` and ``logps/*``
            (sums over tokens, the former weighted) of each pair; a tie, up to rounding, counts half in
            ``rewards/accuracies``.

        Raises:
            ValueError: A needed field is None, or no two completions of one prompt differ in preference.
        """
        chosen, rejected = pairs_in(batch)
        logprobs, log_ratio, rewards = self._link.rewards_of(batch, weighted=self.weighting != "none")
        margin = rewards[chosen] - rewards[rejected]
        size = torch.maximum(rewards[chosen].abs(), rewards[rejected].abs())
        assert callable(self.margin_loss)
        losses = self.margin_loss(margin)
        with torch.no_grad():
            metrics = {
                "rewards/chosen": rewards[chosen],
                "rewards/rejected": rewards[rejected],
                "rewards/margins": margin,
                "rewards/accuracies": accuracies(margin, size),
                "logratios/chosen": log_ratio[chosen],
                "logratios/rejected": log_ratio[rejected],
                "logps/chosen": logprobs[chosen],
                "logps/rejected": logprobs[rejected],
            }
        term = Term(losses, batch.weighted(torch.ones_like(losses), chosen), name="pairwise")
        return ObjectiveOutput((term,), {k: v.detach() for k, v in metrics.items()})
