"""DisCO: scores of completions that pass against those that fail, within a trust region around the sampler."""

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
from falign.divergences.estimators import loss_from_reference
from falign.divergences.powers import power
from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput, Term
from falign.objectives.groups import CompletionMean, completion_mean_at, completion_term, groups_of
from falign.objectives.step_means import StepMean, StepRows, Weighted, step_mean

__all__ = ["Discriminative", "MeanDivergence", "Score", "TrustRegion"]

Score = Literal["log_likelihood", "ratio"]


@dataclass(frozen=True)
class Discriminative(BaseObjective):
    """``-mean_pass s + τ log mean_fail exp(s/τ)`` for each prompt with completions of both kinds.

    The logarithm weights the failed completions with the highest scores most. Without τ it is the plain mean of their
    scores, the limit ``τ → ∞``. Prompts whose completions all pass or all fail do not count.

    Attributes:
        score: s, a mean over tokens: ``"log_likelihood"`` of ``log π``, ``"ratio"`` of ``π/π_old``.
        tau: τ, positive; None for the plain mean (DisCO-b).
        pass_reward: The lowest reward that passes.

    Raises:
        ValueError: A choice is unknown, τ is not positive, or ``pass_reward`` is not finite.

    Source:
        Li et al., DisCO (arXiv:2505.12366), Eq. 6 to 8; the constraint is :class:`TrustRegion`. Their code has τ = 10
        for the log-likelihood and 1 for the ratio.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0], [-2.0], [-4.0]]),
        ...     completion_mask=torch.ones(3, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0, 0]),
        ...     rewards=torch.tensor([1.0, 0.0, 0.0]),
        ... )
        >>> Discriminative()(batch).mean()  # -(-1) + (-2 - 4)/2
        tensor(-2.)
    """

    score: Score = "log_likelihood"
    tau: float | None = None
    pass_reward: float = 1.0

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(f"score={self.score!r}: choose one of {', '.join(get_args(Score))}.")
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise ValueError(f"tau={self.tau!r} must be positive and finite; leave it out for the plain mean.")
        if not math.isfinite(self.pass_reward):
            raise ValueError(f"pass_reward={self.pass_reward!r} must be finite.")

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"rewards", "old_logprobs"} if self.score == "ratio" else {"rewards"})

    def scores(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return s of each completion.

        Args:
            batch: Completions, with ``old_logprobs`` for ratios unless they were sampled from π itself.

        Returns:
            Shape (N,), differentiable.
        """
        per_token = batch.logprobs if self.score == "log_likelihood" else power(batch.importance_log_ratio)
        return batch.sequence_sum(per_token) / batch.num_tokens

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per prompt.

        Args:
            batch: Completions of whole prompts with :attr:`needs`.

        Returns:
            One term of shape (prompts,), with weight 1 for prompts with completions of both kinds and 0 for others; the
            metrics ``reward``, ``scores/passed`` and ``scores/failed`` of each completion and ``mixed_groups`` (1 or 0)
            of each prompt.

        Raises:
            ValueError: A needed field is None.
        """
        rewards, scores, groups = batch.require("rewards"), self.scores(batch), groups_of(batch.prompt_index)
        passes = rewards >= self.pass_reward
        passed, failed = groups.table(passes, 0.0) > 0, groups.table(~passes, 0.0) > 0
        mixed = passed.any(dim=-1) & failed.any(dim=-1)
        # Prompts without both kinds get a placeholder, so that no empty mean has a gradient of NaN.
        table = groups.table(scores, 0.0).masked_fill(~mixed[:, None], 0.0)
        passed, failed = passed | ~mixed[:, None], failed | ~mixed[:, None]
        losses = self._mean(table, failed, self.tau) - self._mean(table, passed, None)
        unknown = groups.table(rewards.isnan(), 0.0).any(dim=-1)  # NaN is neither a pass nor a failure
        losses, mixed = losses.masked_fill(unknown, torch.nan), mixed | unknown
        with torch.no_grad():
            metrics = {
                "reward": rewards,
                "scores/passed": scores[passes],
                "scores/failed": scores[~passes],
                "mixed_groups": mixed.to(scores.dtype),
            }
        term = Term(losses, mixed.to(losses.dtype), name="discriminative")
        return ObjectiveOutput((term,), {name: value.detach() for name, value in metrics.items()})

    @staticmethod
    def _mean(table: Tensor, rows: Tensor, tau: float | None) -> Tensor:
        """Return ``mean s``, or ``τ log mean exp(s/τ)``, over the given entries of each row."""
        count = rows.sum(dim=-1).to(table.dtype)
        if tau is None:
            return table.masked_fill(~rows, 0.0).sum(dim=-1) / count
        return tau * ((table / tau).masked_fill(~rows, -torch.inf).logsumexp(dim=-1) - count.log())


@dataclass(frozen=True)
class MeanDivergence:
    """The mean of ``D_f(π_old‖π)`` over the completions of a step, estimated from samples of π_old.

    Attributes:
        region: The trust region, which has the estimate.
    """

    region: TrustRegion

    @property
    def rows(self) -> StepRows:
        """The step's own completions."""
        return "own"

    @property
    def needs(self) -> frozenset[str]:
        """The log-probabilities before the first update."""
        return frozenset({"old_logprobs"})

    def __call__(self, batch: CompletionBatch) -> Weighted:
        """Return the estimate of each completion and its weight.

        Args:
            batch: Completions with ``old_logprobs``.

        Returns:
            Values and weights, shape (N,) each.
        """
        term = self.region.estimate(batch)
        return Weighted(term.losses, term.weights)


@dataclass(frozen=True)
class TrustRegion(BaseObjective):
    """``β [D_f(π_old‖π) - δ]₊²``: nothing inside a divergence of δ from the sampler, a squared hinge outside of it.

    D_f is estimated over all completions of an optimizer step: ``E_old[f̃(π/π_old)]`` with ``f̃(t) = t f(1/t)``, which is
    differentiated directly because π_old is fixed. The square is taken of the mean over the whole step
    (:class:`StepMean`), so the gradient ``2 β [D̂ - δ]₊ ∇D̂`` is that of the estimate, however the step is cut into
    micro-batches. In the first update on a rollout π is π_old, and the loss is 0.

    Attributes:
        divergence: f; the reverse KL is ``KL(π_old‖π)``.
        beta: β, positive.
        delta: δ, not negative; nats of the mean that ``level`` and ``reduction`` define.
        level: ``"token"``: the divergence at each token. ``"sequence"``: of whole completions.
        reduction: At token level, see :func:`completion_term`; None is ``"token_mean"``, the mean over all tokens. At
            sequence level there is one value per completion.

    Raises:
        ValueError: A choice is unknown or a number is out of range.

    Source:
        Li et al., DisCO (arXiv:2505.12366), Eq. 10, for ``KL(π_old‖π)`` and tokens. Their code has the gradient
        ``β [D̂ - δ]₊ ∇D̂``, half of this, and estimates the KL by ``log π_old - log π``, which may be negative; here the
        estimate is ``π/π_old - 1 - log π/π_old`` or its like for other f, never negative.

    Example:
        >>> from falign import divergences
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0, -2.0]]),
        ...     old_logprobs=torch.tensor([[-1.0, -1.0]]),
        ...     completion_mask=torch.ones(1, 2, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0]),
        ... )
        >>> TrustRegion(divergences.get("reverse_kl"), beta=10.0, delta=0.1)(batch).mean()  # 10 (e^-1/2 - 0.1)²
        tensor(0.0705)
    """

    divergence: Divergence
    beta: float = 500.0
    delta: float = 1e-4
    level: Literal["sequence", "token"] = "token"
    reduction: CompletionMean | None = None

    def __post_init__(self) -> None:
        if self.level not in ("sequence", "token"):
            raise ValueError(f"level={self.level!r}: choose 'sequence' or 'token'.")
        object.__setattr__(self, "reduction", completion_mean_at(self.level, self.reduction))
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta!r} must be positive and finite.")
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"delta={self.delta!r} must be finite and not negative.")

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logprobs"})

    @property
    @override
    def step_means(self) -> Mapping[str, StepMean]:
        return {"divergence": MeanDivergence(self)}

    @property
    @override
    def learns_from_samples(self) -> bool:
        return True  # beside an objective that moves the policy

    def estimate(self, batch: CompletionBatch) -> Term:
        """Return the estimate of ``D_f(π_old‖π)`` as a mean over completions.

        Args:
            batch: Completions with ``old_logprobs``.

        Returns:
            A term of shape (N,), differentiable.
        """
        assert self.reduction is not None
        log_ratio = batch.importance_log_ratio
        compared = log_ratio if self.level == "token" else log_ratio.sum(dim=-1, keepdim=True)
        values = loss_from_reference(self.divergence.dual(), compared).sum(dim=-1)
        return completion_term(values, batch.num_tokens, self.reduction, name="trust_region")

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per completion.

        Args:
            batch: Completions with ``old_logprobs`` and ``step_means["divergence"]``, without which the batch is the
                whole step.

        Returns:
            One term of shape (N,); the metrics ``divergence/<name>`` (the sum over the completion at token level) and
            ``excess`` (``[D̂ - δ]₊`` of the step) of each completion.
        """
        term = self.estimate(batch)
        mean = step_mean(batch, "divergence", self.step_means).to(term.losses.dtype)
        # A huge mean must not overflow when it is squared.
        excess = (mean - self.delta).clamp(min=0.0, max=math.sqrt(torch.finfo(mean.dtype).max) / 1e6)
        change = term.losses - term.losses.detach()
        losses = self.beta * excess * (excess + 2 * change)
        with torch.no_grad():
            total = term.losses * batch.num_tokens if self.reduction != "sequence_sum" else term.losses
            metrics = {f"divergence/{self.divergence.name}": total, "excess": excess}
        return ObjectiveOutput(
            (term._replace(losses=losses),), {name: value.detach() for name, value in metrics.items()}
        )
