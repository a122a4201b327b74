"""Sections of objectives on groups of samples, of trust regions, and of SequenceMatch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from typing_extensions import override

from falign.objectives import CompletionMean, Objective, get_advantage
from falign.objectives.cloning import Cloning
from falign.objectives.discriminative import Discriminative, TrustRegion
from falign.objectives.sequence_match import SequenceMatching
from falign.registry import is_own_name
from falign.runfile.base_config import ObjectiveSection, named_divergence, refusals
from falign.runfile.weight_config import TokenWeightConfig, build_weights

__all__ = [
    "GROUP_OBJECTIVES",
    "CloningConfig",
    "DiscriminativeConfig",
    "SequenceMatchConfig",
    "TrustRegionConfig",
]


class CloningConfig(ObjectiveSection):
    """Cloning of the samples that rewards select: best-of-n distillation, and OREAL's two halves."""

    kind: Literal["cloning"] = "cloning"
    method = "cloning of selected samples"
    completions: Literal["best", "passed", "failed", "all"] = "best"
    """The best of each prompt; those with a reward of at least ``pass_reward``; all others; or all."""
    pass_reward: float = 1.0
    advantage: str | None = None
    """Factor of each completion's loss, from the rewards of its prompt, as under ``policy_gradient``; 1 by default."""
    weights: tuple[TokenWeightConfig, ...] = ()
    """Factors of each token's loss, multiplied: names, or sections with settings."""
    reduction: CompletionMean = "token_mean"
    """As under ``policy_gradient``, over the selected completions."""

    @property
    @override
    def title(self) -> str:
        return f"cloning, {self.completions}"

    @property
    @override
    def compares(self) -> tuple[Literal["group", "rollout"], str] | None:
        return ("group", f"objective.completions={self.completions}") if self.completions == "best" else None

    @override
    def build(self) -> Objective:
        with refusals():
            advantage = self.advantage
            if advantage is not None and is_own_name(advantage):
                advantage = get_advantage(advantage, field="objective.advantage")
            weights = build_weights(self.weights)
            return Cloning(self.completions, self.pass_reward, advantage, weights, self.reduction)


class DiscriminativeConfig(ObjectiveSection):
    """DisCO's scores: completions that pass against those that fail; a trust region is a term beside it."""

    kind: Literal["discriminative"] = "discriminative"
    method = "DisCO"
    score: Literal["log_likelihood", "ratio"] = "log_likelihood"
    """Mean over tokens of log π, or of π/π_old."""
    tau: float | None = Field(default=None, gt=0)
    """Failed completions count by exp(score/τ); by default all alike (DisCO-b)."""
    pass_reward: float = 1.0
    """Lowest reward that passes."""

    @property
    @override
    def title(self) -> str:
        return f"{self.score} of passed and failed samples" + ("" if self.tau is None else f", τ = {self.tau:g}")

    @property
    @override
    def compares(self) -> tuple[Literal["group", "rollout"], str] | None:
        return "group", f"objective.kind={self.kind}"

    @override
    def build(self) -> Objective:
        with refusals():
            return Discriminative(self.score, self.tau, self.pass_reward)


class TrustRegionConfig(ObjectiveSection):
    """A squared hinge on the divergence from the sampler, as a term beside an objective on samples."""

    kind: Literal["trust_region"] = "trust_region"
    method = "trust region"
    divergence: str = "reverse_kl"
    """As under ``pairwise``, without restriction; D_f(π_old‖π): ``reverse_kl`` is KL(π_old‖π)."""
    beta: float = Field(default=500.0, gt=0)
    delta: float = Field(default=1e-4, ge=0)
    """Divergence up to which nothing is penalized: by default nats per token."""
    level: Literal["sequence", "token"] = "token"
    reduction: CompletionMean | None = None
    """At token level, as under ``policy_gradient``; ``token_mean`` by default."""

    @property
    @override
    def title(self) -> str:
        return f"{self.divergence} from the sampler up to {self.delta:g}, β = {self.beta:g}"

    @override
    def build(self) -> Objective:
        with refusals():
            divergence = named_divergence(self.divergence)
            return TrustRegion(divergence, self.beta, self.delta, self.level, self.reduction)


class SequenceMatchConfig(ObjectiveSection):
    """SequenceMatch without backspace: data are labeled true, samples of the model false."""

    kind: Literal["sequence_match"] = "sequence_match"
    method = "SequenceMatch"
    alpha: float = Field(default=0.5, gt=0)
    """α of φ(x) = x - x²/(4α)."""
    gamma: float = Field(default=0.998, gt=0, le=1)
    """Discount per token."""

    @property
    @override
    def title(self) -> str:
        return f"SequenceMatch, α = {self.alpha:g}, γ = {self.gamma:g}"

    @override
    def build(self) -> Objective:
        with refusals():
            return SequenceMatching(self.alpha, self.gamma)


GROUP_OBJECTIVES: dict[str, type[ObjectiveSection]] = {
    "cloning": CloningConfig,
    "discriminative": DiscriminativeConfig,
    "trust_region": TrustRegionConfig,
    "sequence_match": SequenceMatchConfig,
}
"""The rows of these sections in :data:`falign.runfile.objective_config.OBJECTIVES`."""
