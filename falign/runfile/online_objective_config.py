"""Sections of objectives on fresh samples, on samples of the reference, and on demonstrations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from falign.divergences import Divergence
from falign.objectives import (
    CompletionMean,
    DistributionMatching,
    Hybrid,
    Objective,
    PolicyGradient,
    Rehearsal,
    Supervised,
    Target,
    dph_rl_coefficient,
)
from falign.runfile.advantage_config import AdvantageConfig, built_advantage, compared_by
from falign.runfile.base_config import ObjectiveSection, named_divergence, refusals
from falign.runfile.distillation_config import Completions, selected
from falign.runfile.target_config import TargetConfig
from falign.runfile.weight_config import TokenWeightConfig, build_weights

__all__ = [
    "FURTHER_OBJECTIVES",
    "DistributionMatchingConfig",
    "HybridConfig",
    "PolicyGradientConfig",
    "RehearsalConfig",
    "SupervisedConfig",
]


class PolicyGradientConfig(ObjectiveSection):
    """Reward minus a divergence on fresh samples: REINFORCE, RLOO, GRPO, PPO; SALSA with a soup as the reference."""

    kind: Literal["policy_gradient"] = "policy_gradient"
    method = "policy gradient"
    divergence: str | None = None
    """As under ``pairwise``, without restriction; by default nothing is penalized."""
    beta: float = Field(default=0.0, ge=0)
    """Strength of the divergence, in units of reward; 0 penalizes nothing and needs no reference."""
    advantage: AdvantageConfig = "leave_one_out"
    """``none``, ``batch_mean``, ``leave_one_out`` (RLOO), ``group_centred``, ``group_normalised`` (GRPO), ``gae``; or
    ``module:function`` of your own, called with rewards and prompt_index, both of shape (N,). Or a list that begins
    with one of these and goes on with transforms: ``[group_normalised, {kind: ace, alpha: 1.0}]``."""
    clip_low: float | None = Field(default=None, gt=0, le=1)
    """Lower clip 1 - clip_low of π/π_old at negative advantages; none by default."""
    clip_high: float | None = Field(default=None, gt=0)
    """Upper clip 1 + clip_high of π/π_old at positive advantages; none by default."""
    importance: Literal["sequence", "token"] = "sequence"
    """π/π_old of whole completions, which is exact, or of single tokens, as in PPO and GRPO."""
    level: Literal["sequence", "token", "vocabulary"] = "sequence"
    """Divergence of whole completions, or of tokens: from the sampled ones, or over the full vocabulary."""
    credit: Literal["fixed_prefix", "returns"] = "fixed_prefix"
    """Below sequence level: ``returns`` charges each token with the divergence at later tokens, too."""
    reduction: Literal["sequence_sum", "sequence_mean", "token_mean"] = "sequence_sum"
    """Weight of completions: sums over tokens, means over tokens, or all tokens alike."""
    value_coefficient: float | None = Field(default=None, gt=0)
    """Only with ``gae``: weight of the value head's loss, 0.1 by default."""
    gamma: float | None = Field(default=None, ge=0, le=1)
    """Only with ``gae``: discount per token, 1 by default."""
    lam: float | None = Field(default=None, ge=0, le=1)
    """Only with ``gae``: λ, 0.95 by default."""
    weights: tuple[TokenWeightConfig, ...] = ()
    """Token weights of the policy gradient without its penalty; a list is a product."""
    penalty_weights: tuple[TokenWeightConfig, ...] = ()
    """Token weights of the penalty, such as ``dads``; at sequence level they must weight whole completions."""
    importance_reference: str | None = None
    """Name of a reference T: π is compared with π_old^a T^(1-a) in place of π_old, before clipping (RLAD)."""
    old_exponent: float = Field(default=1.0, ge=0, le=1)
    """Only with ``importance_reference``: a, which is the exponent of π_old; 1 does not read T."""

    @property
    @override
    def is_surrogate(self) -> bool:
        return True

    @property
    @override
    def title(self) -> str:
        return "reward alone" if self.divergence is None else f"{self.divergence}, β = {self.beta:g}"

    @property
    @override
    def compares(self) -> tuple[Literal["group", "rollout"], str] | None:
        return compared_by(self.advantage)

    @override
    def penalties(self) -> Iterator[tuple[str, float]]:
        if ("beta",) not in self._schedules:
            yield "beta", self.beta

    @override
    def build(self) -> Objective:
        fields = self.model_dump(exclude={"kind", "divergence"})
        with refusals():
            fields["advantage"] = built_advantage(self.advantage)
            fields["weights"], fields["penalty_weights"] = map(build_weights, (self.weights, self.penalty_weights))
            return PolicyGradient(None if self.divergence is None else named_divergence(self.divergence), **fields)


class DistributionMatchingConfig(ObjectiveSection):
    """f-DPG: minimizes a divergence to a target distribution that the rewards define."""

    kind: Literal["distribution_matching"] = "distribution_matching"
    method = "f-DPG"
    divergence: str = "jensen_shannon"
    """As under ``pairwise``, without restriction; if the target has zeros, f'(∞) must be finite."""
    target: TargetConfig
    """``{kind: binary}``, ``{kind: moments, moments: [0.5]}``, ``{kind: exponential, beta: 0.1}``, or a product."""
    baseline: Literal["leave_one_out", "constant", "none"] = "leave_one_out"
    """Mean pseudo-reward of the other samples of the prompt, or of all others of the rollout."""

    @property
    @override
    def is_surrogate(self) -> bool:
        return True

    @property
    @override
    def title(self) -> str:
        return f"{self.divergence} to a target ({self.target.kind})"

    @property
    @override
    def needs_samples(self) -> bool:
        return self.target.needs_samples

    @property
    @override
    def num_rewards(self) -> int:
        return self.target.num_features

    @override
    def unfitted(self) -> ObjectiveSection:
        return self.model_copy(update={"target": self.target.unfitted()})

    @override
    def build(self) -> Objective:
        return self._with_target(self.target.build())

    @override
    def build_on(self, features: Float[Tensor, "M K"]) -> Objective:
        return self._with_target(self.target.build(features))

    def _with_target(self, target: Target) -> Objective:
        with refusals():
            return DistributionMatching(named_divergence(self.divergence), target, self.baseline)


class HybridConfig(ObjectiveSection):
    """DPH-RL: a policy gradient without penalty on fresh samples, and a divergence on samples of the reference."""

    kind: Literal["hybrid"] = "hybrid"
    method = "DPH-RL"
    divergence: str = "jensen_shannon"
    """Divergence of the rehearsal; as under ``pairwise``, without restriction."""
    coefficient: float | None = Field(default=None, ge=0)
    """Weight of the rehearsal; each part is a separate mean, so it does not depend on the numbers of rows. By default
    the published one: 0.025 for Jensen-Shannon, 0.00625 for the forward KL and α; required for any other divergence."""
    level: Literal["sequence", "token"] = "token"
    """Level of the rehearsal: the divergence of whole completions, or of their tokens."""
    advantage: AdvantageConfig = "group_normalised"
    """As under ``policy_gradient``."""
    clip_low: float | None = Field(default=0.2, gt=0, le=1)
    clip_high: float | None = Field(default=0.28, gt=0)
    importance: Literal["sequence", "token"] = "token"
    reduction: CompletionMean = "token_mean"
    """Reduction of the policy gradient."""

    @property
    @override
    def is_surrogate(self) -> bool:
        return True

    @property
    @override
    def title(self) -> str:
        return (
            f"reward, and {self._weight(named_divergence(self.divergence)):g} × {self.divergence} on reference samples"
        )

    @property
    @override
    def compares(self) -> tuple[Literal["group", "rollout"], str] | None:
        return compared_by(self.advantage)

    def _weight(self, divergence: Divergence) -> float:
        return dph_rl_coefficient(divergence) if self.coefficient is None else self.coefficient

    @override
    def build(self) -> Objective:
        with refusals():
            exploration = PolicyGradient(
                advantage=built_advantage(self.advantage),
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                importance=self.importance,
                reduction=self.reduction,
            )
            divergence = named_divergence(self.divergence)
            return Hybrid(exploration, Rehearsal(divergence, self.level), self._weight(divergence))


class RehearsalConfig(ObjectiveSection):
    """Only a divergence to the reference, on the reference's samples."""

    kind: Literal["rehearsal"] = "rehearsal"
    method = "rehearsal of reference samples"
    divergence: str = "jensen_shannon"
    """As under ``pairwise``, without restriction."""
    level: Literal["sequence", "token"] = "token"
    """The divergence of whole completions, or of their tokens."""
    reduction: CompletionMean | None = None
    """At token level, as under ``policy_gradient``; ``token_mean`` by default."""
    reference: str = "reference"
    """Name of the reference under ``references``, such as that of a teacher whose samples are the data."""

    @property
    @override
    def title(self) -> str:
        return f"{self.divergence} on reference samples"

    @override
    def build(self) -> Objective:
        with refusals():
            return Rehearsal(named_divergence(self.divergence), self.level, self.reduction, self.reference)


class SupervisedConfig(ObjectiveSection):
    """Fine-tuning on demonstrations, plain or under a divergence."""

    kind: Literal["supervised"] = "supervised"
    method = "supervised tuning"
    divergence: str | None = None
    """Such as ``pearson_chi2``; by default plain fine-tuning."""
    beta: float | None = Field(default=None, gt=0)
    """Required with a divergence."""
    max_weight: float | None = Field(default=None, gt=1)
    """Largest weight of a token; required if f'(∞) is finite, as of ``squared_hellinger``."""
    completions: Completions | None = None
    """Of preference data, as under ``distillation``; by default the chosen ones. Required beside terms of a sum that
    compare completions."""

    @property
    @override
    def title(self) -> str:
        return "fine-tuning" if self.beta is None else f"fine-tuning, {self.divergence}, β = {self.beta:g}"

    @override
    def build(self) -> Objective:
        with refusals():
            divergence = None if self.divergence is None else named_divergence(self.divergence)
            return selected(Supervised(divergence, self.beta, self.max_weight), self.completions)


FURTHER_OBJECTIVES: dict[str, type[ObjectiveSection]] = {
    "policy_gradient": PolicyGradientConfig,
    "distribution_matching": DistributionMatchingConfig,
    "hybrid": HybridConfig,
    "rehearsal": RehearsalConfig,
    "supervised": SupervisedConfig,
}
"""The rows of these sections in :data:`falign.runfile.objective_config.OBJECTIVES`."""
