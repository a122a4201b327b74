"""Cloning of the policy's own samples that their rewards select: the best of n, those that pass, or those that fail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from falign.objectives.advantages import Advantage, get_advantage
from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput
from falign.objectives.groups import CompletionMean, check_completion_mean, completion_term, groups_of, largest, total
from falign.objectives.measures import Measure
from falign.objectives.weights import TokenWeight, check_weights, measures_of_weights, needs_of_weights, token_factor

__all__ = ["Cloning", "Selection"]

Selection = Literal["best", "passed", "failed", "all"]


@dataclass(frozen=True)
class Cloning(BaseObjective):
    """``-A Σ_t w_t log π(y_t|s_t)`` of the selected completions of each prompt; A = 1 and ``w_t = 1`` by default.

    The mean is over the selected completions alone. If n completions come from a frozen sampler q, the optimum of
    ``"best"`` is the best-of-n law ``P(the best of n is y)``.

    Attributes:
        completions: ``"best"``: those with the highest reward of their prompt, which share its weight if there are
            several. ``"passed"``: rewards of at least ``pass_reward``. ``"failed"``: all others. ``"all"``.
        pass_reward: The lowest reward that passes.
        advantage: A, from the rewards of all completions of a prompt: a name (:func:`get_advantage`) or a function;
            None for 1. Where it is negative, the completion becomes less likely: on samples of π the gradient is then
            that of a policy gradient, without importance weights.
        weights: ``w_t``: factors of each token's loss (:class:`TokenWeight`), multiplied.
        reduction: See :func:`completion_term`.

    Raises:
        ValueError: A choice is unknown, or ``pass_reward`` is not finite.

    Source:
        ``"best"``: best-of-n distillation, Mukobi et al., SuperHF (arXiv:2310.16763). ``"passed"`` and ``"failed"``
        with advantages: Lyu et al., OREAL (arXiv:2502.06781).

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0], [-2.0], [-3.0]]),
        ...     completion_mask=torch.ones(3, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0, 0]),
        ...     rewards=torch.tensor([0.0, 1.0, 1.0]),
        ... )
        >>> Cloning("best")(batch).mean()
        tensor(2.5000)
    """

    completions: Selection = "best"
    pass_reward: float = 1.0
    advantage: Advantage | str | None = None
    weights: Sequence[TokenWeight] = ()
    reduction: CompletionMean = "token_mean"

    def __post_init__(self) -> None:
        if self.completions not in get_args(Selection):
            raise ValueError(f"completions={self.completions!r}: choose one of {', '.join(get_args(Selection))}.")
        if not math.isfinite(self.pass_reward):
            raise ValueError(f"pass_reward={self.pass_reward!r} must be finite.")
        check_completion_mean(self.reduction)
        check_weights(self.weights)
        _ = self._advantage

    @property
    def _advantage(self) -> Advantage | None:
        return get_advantage(self.advantage) if isinstance(self.advantage, str) else self.advantage

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"rewards"}) | needs_of_weights(self.weights)

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        return measures_of_weights(self.weights)

    def shares(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return how often each completion counts: 1 or 0, or its share among equally good ones.

        Args:
            batch: Completions of whole prompts with ``rewards``.

        Returns:
            Shape (N,), constants; NaN where the reward is.
        """
        rewards, groups = batch.require("rewards"), groups_of(batch.prompt_index)
        passed = rewards >= self.pass_reward
        chosen = {
            "best": rewards == largest(rewards, groups),
            "passed": passed,
            "failed": ~passed,
            "all": torch.ones_like(passed),
        }[self.completions].to(rewards.dtype)
        if self.completions == "best":
            chosen = chosen / total(chosen, groups).clamp(min=1)
        return chosen.masked_fill(rewards.isnan(), torch.nan)  # a comparison would leave the completion out unseen

    @override
    def prepare(self, batch: CompletionBatch) -> CompletionBatch:
        """Return the rollout with ``advantages``, if there is an advantage.

        Args:
            batch: The whole rollout, with ``rewards``.

        Returns:
            The same completions.
        """
        if (advantage := self._advantage) is None:
            return batch
        values = advantage(batch.require("rewards"), batch.prompt_index)
        return replace(batch, advantages=values[:, None].expand(batch.logprobs.shape))

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per completion, with weight 0 for those that are not selected.

        Args:
            batch: Completions of whole prompts with ``rewards`` and the fields of the token weights.

        Returns:
            One term of shape (N,), and the metrics ``reward`` of all completions, and of the selected ones ``nll``
            (mean over tokens) and ``reward/selected``.

        Raises:
            ValueError: A needed field is None.
        """
        rewards, shares = batch.require("rewards"), self.shares(batch)
        if self._advantage is not None and batch.advantages is None:
            batch = self.prepare(batch)
        nll = -batch.logprobs.masked_fill(~batch.completion_mask, 0.0)
        factor = token_factor(self.weights, batch)
        if batch.advantages is not None and self._advantage is not None:
            factor = factor * batch.advantages.masked_fill(~batch.completion_mask, 0.0)
        losses = batch.sequence_sum(factor * nll)
        # A completion that is not selected has no loss at all: its weight alone would leave 0 · inf.
        term = completion_term(losses.masked_fill(shares == 0, 0.0), batch.num_tokens, self.reduction, name="cloning")
        with torch.no_grad():
            selected = shares > 0
            metrics = {"reward": rewards, "nll": (batch.sequence_sum(nll) / batch.num_tokens)[selected]}
            metrics["reward/selected"] = rewards[selected]
        weights = term.weights * shares.to(term.weights.dtype)
        return ObjectiveOutput(
            (term._replace(weights=weights),), {name: value.detach() for name, value in metrics.items()}
        )
