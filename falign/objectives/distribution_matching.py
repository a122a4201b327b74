"""f-DPG: train a policy toward an energy-based target by the policy gradient of ``D_f(π‖p)``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from falign.divergences import Divergence
from falign.divergences.estimators import LARGEST_PENALTY, value_from_policy
from falign.divergences.powers import power
from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput, Term
from falign.objectives.groups import groups_of, mean_of_others
from falign.objectives.partition import log_partition
from falign.objectives.targets import Target

__all__ = ["DistributionMatching"]


@dataclass(frozen=True)
class DistributionMatching(BaseObjective):
    """Minimize ``D_f(π‖p)`` with ``p = π_ref exp(score)/Z``, by the pseudo-reward ``-f'(π(y)/p(y))`` of whole samples.

    Samples from an older policy or another proposal are weighted by ``π/π_old``, and ``Z(x)`` is estimated from the
    other samples of the prompt. A sample without an estimate of Z has weight 0; the metric
    ``partition_missing`` counts it.

    Attributes:
        divergence: f. If the target has zeros, ``f'(∞)`` must be finite; ``-f'(∞)`` is the pseudo-reward there.
        target: p, defined by its score.
        baseline: ``"leave_one_out"``: the mean pseudo-reward of the other samples of the prompt; ``"constant"``: of
            all others of the rollout; ``"none"``. All of them leave out the sample's own pseudo-reward, so
            the gradient is unbiased for a given Z.

    Raises:
        ValueError: ``f'(∞) = ∞`` with a target that has zeros, or the baseline is unknown.

    Source:
        Go et al., f-DPG (arXiv:2302.08215), Theorem 1 and Eq. 8. Their baseline is an average over earlier steps.

    Example:
        >>> from falign import divergences
        >>> from falign.objectives import ExponentialReward
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0], [-1.0]], requires_grad=True),
        ...     reference_logprobs=torch.tensor([[-1.0], [-1.0]]),
        ...     completion_mask=torch.ones(2, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0]),
        ...     features=torch.tensor([[1.0], [-1.0]]),
        ...     log_partition=torch.tensor([0.0, 0.0]),
        ... )
        >>> objective = DistributionMatching(divergences.get("reverse_kl"), ExponentialReward(beta=1.0))
        >>> objective(batch).metrics["pseudo_reward"]  # -log(π/p) = r
        tensor([ 1., -1.])
    """

    divergence: Divergence
    target: Target
    baseline: Literal["leave_one_out", "constant", "none"] = "leave_one_out"

    def __post_init__(self) -> None:
        if self.target.has_zeros and math.isinf(self.divergence.f_prime_at_infinity):
            raise ValueError(
                f"{self.divergence.name} cannot be used with a target that has zeros: its f'(∞) is infinite, so "
                "D_f(π‖p) is infinite as long as the policy can produce completions that the target forbids. Choose a "
                "divergence with finite f'(∞) (forward_kl, jensen_shannon, total_variation, squared_hellinger, "
                "alpha(a) with a > 0), or a target without zeros."
            )
        if self.baseline not in ("leave_one_out", "constant", "none"):
            raise ValueError(f"baseline={self.baseline!r}: choose 'leave_one_out', 'constant' or 'none'.")

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"features", "reference_logprobs", "old_logprobs", "log_partition"})

    @property
    @override
    def accepts_unnormalized(self) -> bool:
        return True  # log_partition estimates the normalizer of each prompt

    @override
    def log_weights(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return ``log P/π_old`` of each sample, from which ``log Z`` is estimated.

        Args:
            batch: Samples with ``features``, ``reference_logprobs`` and ``old_logprobs`` (None: sampled from π itself).

        Returns:
            Shape (N,), without gradient; -inf where ``P = 0``. :class:`RunningPartition` and :func:`log_partition`
            take it.
        """
        log_ratio = batch.sequence_sum(batch.require("reference_logprobs") - batch.sampling_logprobs)
        return log_ratio + self.target.log_score(batch.require("features"))

    @override
    def prepare(self, batch: CompletionBatch) -> CompletionBatch:
        """Return the rollout with ``baseline``, and if missing, ``log_partition`` estimated from the rollout itself.

        Args:
            batch: The whole rollout before its first update, with :attr:`needs`.

        Returns:
            The same completions.

        Raises:
            ValueError: A needed field is None, or a prompt has one sample and the baseline needs the others.
        """
        if batch.log_partition is None:
            batch = replace(batch, log_partition=log_partition(self.log_weights(batch), batch.prompt_index))
        if self.baseline == "none":
            return batch
        one_group = self.baseline == "constant"
        groups = groups_of(torch.zeros_like(batch.prompt_index) if one_group else batch.prompt_index)
        if (alone := groups.size == 1).any():
            raise ValueError(
                f"prompt_index={batch.prompt_index[alone][0].item()} has one sample, but baseline={self.baseline!r} "
                f"needs others: draw two or more, or choose {'none' if one_group else 'constant'!r}."
            )
        slope, known = self._slope(batch), self._known(batch)
        # The mean over those others whose Z is known: unknown slopes are 0, and `share` counts the known ones.
        share = mean_of_others(known.to(slope.dtype), groups)
        mean = mean_of_others(-slope, groups) / torch.where(share > 0, share, torch.ones_like(share))
        return replace(batch, baseline=mean)

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per sample.

        Args:
            batch: Samples with :attr:`needs`, after :meth:`prepare` or before. ``old_logprobs`` may be None if they
                were sampled from π itself, ``log_partition`` if it is to be estimated from this batch alone.

        Returns:
            One term of shape (N,), of weight 0 where Z is unknown, and metrics, one value per sample:
            ``target/feature_<k>``, ``target/satisfied`` (``P > 0``) where the target has zeros, ``logratios/policy``
            (``log π/π_ref``), ``importance_weight``, ``partition_missing``; where Z is known ``pseudo_reward``,
            ``log_partition`` and ``divergence/<name>``, an estimate of ``D_f(π‖p)``.

        Raises:
            ValueError: A needed field is None.
        """
        if batch.log_partition is None or (batch.baseline is None and self.baseline != "none"):
            batch = self.prepare(batch)
        weight, slope, known = self._importance_weight(batch), self._slope(batch), self._known(batch)
        free = torch.zeros_like(slope) if batch.baseline is None else batch.baseline
        penalty = (weight * (slope + free)).clamp(-LARGEST_PENALTY, LARGEST_PENALTY)
        losses = penalty * batch.sequence_sum(batch.logprobs)
        return ObjectiveOutput(
            (Term(losses, known.to(losses.dtype), name="distribution_matching"),), self._metrics(batch)
        )

    def _known(self, batch: CompletionBatch) -> Bool[Tensor, " N"]:
        # Only -inf means missing; NaN is an error and must be reported.
        return batch.require("log_partition") != -math.inf

    @torch.no_grad()
    def _importance_weight(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        return power(batch.sequence_sum(batch.importance_log_ratio))

    @torch.no_grad()
    def _log_t(self, batch: CompletionBatch) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
        """``log π/p``, 0 where ``P = 0`` and meaningless where Z is unknown; and a mask of ``P = 0``."""
        log_z = batch.require("log_partition").masked_fill(~self._known(batch), 0.0)
        log_ratio = batch.sequence_sum(batch.log_ratio)
        score = self.target.log_score(batch.require("features"))
        forbidden = score == -math.inf
        return (log_ratio - score + log_z).masked_fill(forbidden, 0.0), forbidden

    @torch.no_grad()
    def _slope(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """``f'(π/p)``, 0 where Z is unknown."""
        log_t, forbidden = self._log_t(batch)
        slope = self.divergence.f_prime(log_t)
        return slope.masked_fill(forbidden, self.divergence.f_prime_at_infinity).masked_fill(~self._known(batch), 0.0)

    @torch.no_grad()
    def _metrics(self, batch: CompletionBatch) -> dict[str, Tensor]:
        features, known, weight = batch.require("features"), self._known(batch), self._importance_weight(batch)
        metrics = {f"target/feature_{k}": column for k, column in enumerate(features.unbind(dim=-1))}
        if self.target.has_zeros:
            score = self.target.log_score(features)
            metrics["target/satisfied"] = (score > -math.inf).to(score.dtype).masked_fill(score.isnan(), math.nan)
        metrics["logratios/policy"] = batch.sequence_sum(batch.log_ratio)
        metrics["importance_weight"] = weight
        metrics["partition_missing"] = (~known).to(weight.dtype)
        if known.any():
            log_t, forbidden = self._log_t(batch)
            # f(t)/t; its limit for P = 0 is f'(∞).
            value = value_from_policy(self.divergence, log_t)
            value = value.masked_fill(forbidden, self.divergence.f_prime_at_infinity)
            largest = torch.finfo(value.dtype).max / len(value)
            metrics[f"divergence/{self.divergence.name}"] = (weight * value).clamp(max=largest)[known]
            metrics["pseudo_reward"] = -self._slope(batch)[known]
            metrics["log_partition"] = batch.require("log_partition")[known]
        return {name: values.detach() for name, values in metrics.items()}
