"""f-DPO on ranked lists: the Plackett-Luce likelihood of the implicit rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from falign.divergences import Divergence
from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput, Term
from falign.objectives.groups import accuracies, pairs_in
from falign.objectives.link import Link

__all__ = ["Listwise", "Ranking", "plackett_luce"]


@dataclass(frozen=True)
class Listwise(BaseObjective):
    """``-Σ_i log(e^{r̂_i}/(e^{r̂_i} + Σ_{j worse than i} e^{r̂_j}))`` for each prompt, with ``r̂ = β f'(u)``.

    Each factor is the Plackett-Luce probability that i comes first among itself and the strictly worse completions.
    λ(x) cancels in it as in a pair's margin. Without ties the factors multiply to the likelihood of the ranking; with
    two completions this is f-DPO. Completions of equal preference are not compared with each other. With ties the
    product is a composite likelihood, not the probability of the ranking, because Plackett-Luce has no ties.

    Attributes:
        divergence: f; it must have a barrier.
        beta: β, strength of the divergence, nats of reward; positive.
        length_norm: ``"token"`` divides ``log u`` by the completion's length, so that u is a ratio per token.

    Raises:
        ValueError: The divergence has no barrier, β is not positive, or ``length_norm`` is unknown.

    Source:
        Rafailov et al., DPO (arXiv:2305.18290), Appendix A.3, for the reverse KL and rankings without ties; the link
        function of Wang et al., f-DPO (arXiv:2309.16240), for other f.

    Example:
        >>> from falign import divergences
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0], [-2.0], [-3.0]]),
        ...     reference_logprobs=torch.full((3, 1), -2.0),
        ...     completion_mask=torch.ones(3, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0, 0]),
        ...     preference=torch.tensor([2.0, 1.0, 0.0]),
        ... )
        >>> Listwise(divergences.get("reverse_kl"), beta=1.0)(batch).terms[0].losses
        tensor([0.7209])
    """

    divergence: Divergence
    beta: float = 0.1
    length_norm: Literal["none", "token"] = "none"

    def __post_init__(self) -> None:
        _ = self.link  # validates all three fields

    @property
    @override
    def link(self) -> Link:
        return Link(self.divergence, self.beta, self.length_norm)

    @property
    @override
    def reads_row_weights(self) -> bool:
        return True

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"reference_logprobs", "preference"})

    def implicit_reward(self, log_ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return ``r̂ = β f'(u)``, the reward that this method defines, up to a constant per prompt.

        Args:
            log_ratio: ``log u`` of whole completions (per token where ``length_norm="token"``), nats.

        Returns:
            The reward, same shape.
        """
        return self.link.reward(log_ratio)

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per prompt of the batch.

        Args:
            batch: Completions with ``reference_logprobs`` and ``preference``; two or more per prompt, in any order.

        Returns:
            One term of shape (prompts,), in the order of ``prompt_index``; a prompt with ties only is left out.
            ``chosen`` and ``rejected`` in ``rewards/*`` (β f'(u)), ``logratios/*`` and ``logps/*`` are the best and
            the worst completion of each of these prompts, or a mean if several share the rank; ``rewards/margins`` is
            their difference. ``rewards/top1`` is 1 if a best completion has the largest reward.
            ``rewards/accuracies`` is one value per strictly ordered pair. A tie of rewards counts half in both.

        Raises:
            ValueError: A needed field is None, or no two completions of one prompt differ in preference.
        """
        logprobs, log_ratio, rewards = self.link.rewards_of(batch)
        found = plackett_luce(batch, rewards)
        with torch.no_grad():
            metrics = {**found.sides("logratios", log_ratio), **found.sides("logps", logprobs)}
        return ObjectiveOutput((Term(found.losses, found.weights, name="listwise"),), {**found.metrics, **metrics})


class Ranking(NamedTuple):
    """The likelihood of the rankings of a batch under Plackett-Luce.

    Attributes:
        losses: One per prompt that has no ties only, shape (P,); carries the gradient.
        weights: Of the losses, those of the rows; shape (P,).
        metrics: ``rewards/*``, detached.
        best: Which completions are the best of which prompt, shape (P, N).
        worst: Which ones are the worst, shape (P, N).
    """

    losses: Float[Tensor, " P"]
    weights: Float[Tensor, " P"]
    metrics: dict[str, Tensor]
    best: Bool[Tensor, "P N"]
    worst: Bool[Tensor, "P N"]

    def sides(self, name: str, values: Float[Tensor, " N"]) -> dict[str, Tensor]:
        """Return a quantity of the best and of the worst completions, as ``NAME/chosen`` and ``NAME/rejected``."""
        sides = {"chosen": self.best, "rejected": self.worst}
        return {f"{name}/{side}": self.mean(those, values).detach() for side, those in sides.items()}

    @staticmethod
    def mean(members: Bool[Tensor, "P N"], values: Float[Tensor, " N"]) -> Float[Tensor, " P"]:
        """Return the mean of a quantity over the members of each row, shape (P,); carries the gradient."""
        return _sum_over(members, values) / members.sum(dim=-1)


def plackett_luce(batch: CompletionBatch, rewards: Float[Tensor, " N"]) -> Ranking:
    """Return the negative log-likelihood of each prompt's ranking; see :class:`Listwise`.

    Args:
        batch: Completions with ``preference``.
        rewards: A reward of each completion, shape (N,); carries the gradient.

    Returns:
        Losses and metrics.

    Raises:
        ValueError: ``preference`` is None, or no two completions of one prompt differ in it.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.zeros(3, 1),
        ...     completion_mask=torch.ones(3, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0, 0]),
        ...     preference=torch.tensor([2.0, 1.0, 0.0]),
        ... )
        >>> plackett_luce(batch, torch.tensor([1.0, 0.0, -1.0])).losses
        tensor([0.7209])
    """
    chosen, rejected = pairs_in(batch)
    # [i, j]: j is strictly worse than i.
    worse = torch.zeros(len(rewards), len(rewards), dtype=torch.bool, device=rewards.device)
    worse[chosen, rejected] = True
    prompts = batch.prompt_index[chosen].unique()  # a prompt with ties only has no pair
    members = prompts[:, None] == batch.prompt_index[None, :]
    losses = _sum_over(members, _not_first(rewards, worse))
    first = members.to(torch.uint8).argmax(dim=-1)  # a completion of each prompt
    weights = batch.weighted(torch.ones_like(losses), first)
    # No one is better than the best (a column of `worse`), and no one worse than the worst (a row).
    found = Ranking(losses, weights, {}, members & ~worse.any(dim=0), members & ~worse.any(dim=1))
    with torch.no_grad():
        metrics = found.sides("rewards", rewards)
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        size = torch.maximum(rewards[chosen].abs(), rewards[rejected].abs())
        metrics["rewards/accuracies"] = accuracies(rewards[chosen] - rewards[rejected], size).detach()
        top = accuracies(_largest(found.best, rewards) - _largest(members & ~found.best, rewards))
        metrics["rewards/top1"] = top.detach()
    return found._replace(metrics=metrics)


def _not_first(rewards: Float[Tensor, " N"], worse: Bool[Tensor, "N N"]) -> Float[Tensor, " N"]:
    """``-log P(i comes first among itself and the worse completions)``; 0 if none is worse."""
    # The floor marks "not compared": its exponential is 0, and unlike -inf it gives no NaN in the gradient.
    floor = torch.finfo(rewards.dtype).min
    ahead = (rewards[None, :] - rewards[:, None]).masked_fill(~worse, floor).clamp(min=floor)
    return F.softplus(torch.logsumexp(ahead, dim=1))


def _sum_over(members: Bool[Tensor, "P N"], values: Float[Tensor, " N"]) -> Float[Tensor, " P"]:
    return values.expand(members.shape).masked_fill(~members, 0.0).sum(dim=-1)


def _largest(members: Bool[Tensor, "P N"], values: Float[Tensor, " N"]) -> Float[Tensor, " P"]:
    return values.expand(members.shape).masked_fill(~members, -torch.inf).amax(dim=-1)
