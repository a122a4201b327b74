"""KTO with any f-divergence: a loss on single completions that are labeled desirable or undesirable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from falign.divergences import Divergence
from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput, PreferenceKind, Term
from falign.objectives.link import Link
from falign.objectives.measures import Constant, DivergenceTo, Measure
from falign.objectives.step_means import StepMean, StepRows, Weighted, step_mean

__all__ = ["MeanReward", "ReferencePoint", "Unpaired"]

ReferencePoint = Literal["mismatched", "samples", "vocabulary", "zero"]

RATIO = (1.0, 4 / 3)
"""The range of ``λ_D n_D / (λ_U n_U)`` that KTO's authors recommend (Eq. 8)."""


@dataclass(frozen=True)
class MeanReward:
    """The mean of the implicit reward ``β f'(u)``, over the step's own completions or over mismatched ones.

    Attributes:
        link: The implicit reward.
        rows: See :class:`StepMean`.

    Example:
        >>> from falign import divergences
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0], [-2.0]]),
        ...     reference_logprobs=torch.tensor([[-2.0], [-2.0]]),
        ...     completion_mask=torch.ones(2, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 1]),
        ... )
        >>> MeanReward(Link(divergences.get("reverse_kl"), 0.5, "none"), "own")(batch).values
        tensor([0.5000, 0.0000])
    """

    link: Link
    rows: StepRows

    @property
    def needs(self) -> frozenset[str]:
        """The reference's log-probabilities."""
        return frozenset({"reference_logprobs"})

    def __call__(self, batch: CompletionBatch) -> Weighted:
        """Return the reward of each completion, with weight 1.

        Args:
            batch: Completions with ``reference_logprobs``.

        Returns:
            Values and weights, shape (N,) each.
        """
        rewards = self.link.rewards_of(batch).rewards.detach()
        return Weighted(rewards, torch.ones_like(rewards))


@dataclass(frozen=True)
class Unpaired(BaseObjective):
    """``λ_D (1 - σ(r̂ - z))`` for desirable completions, ``λ_U (1 - σ(z - r̂))`` for others, with ``r̂ = β f'(u)``.

    z is the reference point, a constant without gradient: the reward that is neither a gain nor a loss. A completion
    counts as desirable if its ``preference`` is positive. The link needs ``f'(0+) = -inf``, as in :class:`Pairwise`.

    Attributes:
        divergence: f; it must have a barrier.
        beta: β, positive.
        desirable_weight: ``λ_D``, positive; ``λ_D n_D`` should be 1 to 4/3 times ``λ_U n_U``, with n the numbers of
            rows.
        undesirable_weight: ``λ_U``, positive.
        reference_point: z. ``"mismatched"``, as published: ``max(0, mean of r̂)`` over prompts with the completions of
            other prompts, all those of an optimizer step. ``"samples"``: the mean of r̂ over the step's own completions,
            without the maximum; unbiased for ``E_π[β f'(u)]`` if they are sampled from π, as in an online run.
            ``"vocabulary"``: ``β Σ_t D_f(π(·|s_t)‖π_ref(·|s_t))`` of the completion itself, computed over the full
            vocabulary on its own prefixes. ``"zero"``: 0.

    Raises:
        ValueError: The divergence has no barrier, a number is not positive and finite, or a choice is unknown.

    Source:
        Ethayarajh et al., KTO (arXiv:2402.01306), Eq. 7 and 8, with the reverse KL, where ``r̂ = β log u`` and
        ``z = β KL(π‖π_ref)`` is both the mean reward of π and β times the divergence. For other f these two differ:
        the first two choices estimate the mean reward, ``"vocabulary"`` computes the divergence. ``E_π[f'(u)] ≥ 0`` for
        every f of the registry with a barrier, except α > 1 and
        ``neyman_chi2``; it is 0 for the forward KL. TRL's ``KTOTrainer``
        takes the mean over one micro-batch of each process; here it is over the step.

    Example:
        >>> from falign import divergences
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0], [-3.0]]),
        ...     reference_logprobs=torch.tensor([[-2.0], [-2.0]]),
        ...     completion_mask=torch.ones(2, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 1]),
        ...     preference=torch.tensor([1.0, 0.0]),
        ... )
        >>> Unpaired(divergences.get("reverse_kl"), beta=1.0, reference_point="zero")(batch).terms[0].losses
        tensor([0.2689, 0.2689])
    """

    divergence: Divergence
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference_point: ReferencePoint = "mismatched"

    def __post_init__(self) -> None:
        _ = self.link  # validates divergence and β
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value!r} must be positive and finite.")
        if self.reference_point not in get_args(ReferencePoint):
            raise ValueError(
                f"reference_point={self.reference_point!r}: choose one of {', '.join(get_args(ReferencePoint))}."
            )

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
        return frozenset({"reference_logprobs", "preference"})

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        return {"divergence": Constant(DivergenceTo(self.divergence))} if self.reference_point == "vocabulary" else {}

    @property
    @override
    def step_means(self) -> Mapping[str, StepMean]:
        if self.reference_point not in ("mismatched", "samples"):
            return {}
        rows: StepRows = "mismatched" if self.reference_point == "mismatched" else "own"
        return {"reference_point": MeanReward(self.link, rows)}

    @property
    @override
    def preference_kinds(self) -> frozenset[PreferenceKind]:
        return frozenset({"labels"})

    @override
    def label_remark(self, desirable: int, undesirable: int) -> str | None:
        counts = f"{desirable} completions are labeled desirable and {undesirable} undesirable"
        if not desirable or not undesirable:
            return f"{counts}: with one label only, the loss just raises or lowers all of them. Add rows of the other."
        low, high = RATIO
        ratio = self.desirable_weight * desirable / (self.undesirable_weight * undesirable)
        if low * 0.99 <= ratio <= high * 1.01:
            return None
        if ratio > high:
            name, most = "undesirable_weight", self.desirable_weight * desirable / undesirable
            least = most / high
        else:
            name, least = "desirable_weight", self.undesirable_weight * undesirable / desirable
            most = least * high
        return (
            f"{counts}, so that their weights in the loss are {ratio:.3g} to 1; 1 to 1.33 is recommended: set {name} "
            f"between {least:.3g} and {most:.3g}."
        )

    def implicit_reward(self, log_ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return ``r̂ = β f'(u)``, the reward that this method defines, up to a constant per prompt.

        Args:
            log_ratio: ``log u`` of whole completions, nats.

        Returns:
            The reward, same shape.
        """
        return self.link.reward(log_ratio)

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per completion.

        Args:
            batch: Completions with ``reference_logprobs``, ``preference``, and ``step_means["reference_point"]`` or
                ``measures["divergence"]`` as the reference point needs it.

        Returns:
            One term of shape (N,), a mean over all completions; the metrics ``rewards/*`` (β f'(u)), ``logratios/*``
            and ``logps/*`` (sums over tokens) of desirable and undesirable completions, ``reference_point`` (z),
            ``rewards/above`` (1 where the reward is on the right side of z, ½ at z) and ``desirable`` (1 or 0).

        Raises:
            ValueError: A needed field is None.
        """
        preference = batch.require("preference")
        logprobs, log_ratio, rewards = self.link.rewards_of(batch)
        desirable = preference > 0
        point = self._reference_point(batch, rewards)
        gain = torch.where(desirable, rewards - point, point - rewards)
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight).to(gain.dtype)
        losses = weight * torch.sigmoid(-gain)  # 1 - σ(x), without cancellation
        with torch.no_grad():
            metrics = {"reference_point": point, "rewards/above": torch.sign(gain).add(1) / 2}
            metrics["desirable"] = desirable.to(gain.dtype)
            sides = {"desirable": desirable, "undesirable": ~desirable}
            found = {"rewards": rewards, "logratios": log_ratio, "logps": logprobs}
            metrics |= {f"{name}/{side}": of[rows] for name, of in found.items() for side, rows in sides.items()}
        term = Term(losses, batch.weighted(torch.ones_like(losses)), name="unpaired")
        return ObjectiveOutput((term,), {name: value.detach() for name, value in metrics.items()})

    def _reference_point(self, batch: CompletionBatch, rewards: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return z of each completion, a constant."""
        if self.reference_point == "zero":
            return torch.zeros_like(rewards)
        if self.reference_point == "vocabulary":
            return self.beta * batch.sequence_sum(batch.require("measures.divergence").detach())
        point = step_mean(batch, "reference_point", self.step_means).to(rewards.dtype)
        return point.clamp(min=0.0) if self.reference_point == "mismatched" else point
