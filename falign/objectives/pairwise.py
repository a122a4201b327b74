"""f-DPO and its relatives: a margin loss on the implicit rewards of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.divergences import Divergence
from falign.objectives.base import CompletionBatch, ObjectiveOutput, Term
from falign.objectives.margins import MarginLoss, get_margin_loss, logistic

__all__ = ["Pairwise", "pairs_of"]


@dataclass(frozen=True)
class Pairwise:
    """``ℓ(r̂_w - r̂_l)`` for each pair, with implicit reward ``r̂ = β f'(u)`` and ``u = π(y|x)/π_ref(y|x)``.

    A maximiser of ``E[r] - β D_f(π‖π_ref)`` satisfies ``r = β f'(u) + λ(x)``, and λ cancels in the margin; that needs
    ``f'(0+) = -inf``, so that no completion is given up. With ``ℓ = -log σ`` this is f-DPO, with the reverse KL DPO.

    Attributes:
        divergence: f; it must have a barrier.
        margin_loss: ℓ, a function of the margin or its name (see :func:`falign.objectives.get_margin_loss`).
        beta: β, strength of the divergence, nats of reward; positive.
        length_norm: ``"token"`` divides ``log u`` by the completion's length, so that u is a ratio per token.

    Raises:
        ValueError: The divergence has no barrier, β is not positive, or a name is unknown.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240), Eq. 8 and Theorem 1. ``length_norm``: Ahrabian et al. (arXiv:2407.15229)
        for the reverse KL; for other f the length-normalised log-ratio is what f' is taken of.

    Example:
        >>> from falign import divergences
        >>> objective = Pairwise(divergences.get("jensen_shannon"), beta=0.2)
        >>> objective.implicit_reward(torch.tensor([0.0, 100.0]))  # bounded by β log 2
        tensor([0.0000, 0.1386])
    """

    divergence: Divergence
    margin_loss: MarginLoss | str = logistic
    beta: float = 0.1
    length_norm: Literal["none", "token"] = "none"

    def __post_init__(self) -> None:
        if isinstance(self.margin_loss, str):
            object.__setattr__(self, "margin_loss", get_margin_loss(self.margin_loss))
        if not self.divergence.has_barrier:
            slope = self.divergence.f_prime_at_zero
            raise ValueError(
                f"f-DPO has no closed form under {self.divergence.name}: its f'(0+) = {slope:g} is finite, so the "
                "optimum may give completions probability 0 and r = β f'(u) + λ fails there. "
                "Choose a divergence with a barrier (chi2_kl in place of pearson_chi2, jensen_shannon in place of "
                "total_variation or le_cam)."
            )
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta!r} must be positive.")
        if self.length_norm not in ("none", "token"):
            raise ValueError(f"length_norm={self.length_norm!r}: choose 'none' or 'token'.")

    @property
    def needs(self) -> frozenset[str]:
        """Reference log-probs and preferences."""
        return frozenset({"reference_logprobs", "preference"})

    @property
    def token_divergence(self) -> None:
        """None: one ratio per completion is enough."""
        return None

    def implicit_reward(self, log_ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return ``r̂ = β f'(u)``, the reward that this method defines, up to a constant per prompt.

        Args:
            log_ratio: ``log u`` of whole completions (per token where ``length_norm="token"``), nats.

        Returns:
            The reward, same shape.
        """
        return self.beta * self.divergence.f_prime(log_ratio)

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per pair of the batch.

        Args:
            batch: Completions with ``reference_logprobs`` and ``preference``; every two completions of one prompt with
                different preference are a pair.

        Returns:
            One term of shape (pairs,), and the metrics ``rewards/*`` (β f'(u)), ``logratios/*`` and ``logps/*``
            (sums over tokens) of each pair; a tie counts half in ``rewards/accuracies``.

        Raises:
            ValueError: A needed field is None, or no two completions of one prompt differ in preference.
        """
        chosen, rejected = pairs_of(batch.require("preference"), batch.prompt_index)
        if len(chosen) == 0:
            raise ValueError("The batch has no pair: no two completions of one prompt differ in preference.")
        logps = batch.sequence_sum(batch.logprobs)
        log_ratio = batch.sequence_sum(batch.logprobs - batch.require("reference_logprobs"))
        per_reward = log_ratio / batch.num_tokens if self.length_norm == "token" else log_ratio
        rewards = self.implicit_reward(per_reward)
        margin = rewards[chosen] - rewards[rejected]
        assert callable(self.margin_loss)
        losses = self.margin_loss(margin)
        with torch.no_grad():
            metrics = {
                "rewards/chosen": rewards[chosen],
                "rewards/rejected": rewards[rejected],
                "rewards/margins": margin,
                "rewards/accuracies": (1 + torch.sign(margin)) / 2,
                "logratios/chosen": log_ratio[chosen],
                "logratios/rejected": log_ratio[rejected],
                "logps/chosen": logps[chosen],
                "logps/rejected": logps[rejected],
            }
        return ObjectiveOutput((Term(losses, torch.ones_like(losses)),), {k: v.detach() for k, v in metrics.items()})


def pairs_of(
    preference: Float[Tensor, " N"], prompt_index: Int[Tensor, " N"]
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Return the indices of the preferred and of the other completion of every pair, in row-major order.

    Args:
        preference: Larger is preferred, shape (N,).
        prompt_index: Which prompt, shape (N,).

    Returns:
        Two index tensors of shape (P,).

    Example:
        >>> pairs_of(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1]))
        (tensor([0, 3]), tensor([1, 2]))
    """
    better = preference[:, None] > preference[None, :]
    chosen, rejected = torch.nonzero(better & (prompt_index[:, None] == prompt_index[None, :]), as_tuple=True)
    return chosen, rejected
