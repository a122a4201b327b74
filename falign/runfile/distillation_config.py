"""The section of distillation from a teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from typing_extensions import override

from falign.errors import ConfigError
from falign.objectives import CompletionMean, Distillation, Objective, Selected
from falign.objectives.distillation import TEACHER
from falign.runfile.base_config import ObjectiveSection, named_divergence, refusals
from falign.runfile.measure_config import MeasureConfig, build_measure
from falign.runfile.weight_config import TokenWeightConfig, build_weights

__all__ = ["Completions", "DistillationConfig", "selected"]

Completions = Literal["chosen", "rejected", "all"]


class DistillationConfig(ObjectiveSection):
    """A divergence to a teacher, on given completions or on fresh samples; it reads no rewards."""

    kind: Literal["distillation"] = "distillation"
    method = "distillation"
    divergence: str | None = None
    """As under ``pairwise``, without restriction; D_f of the policy from the teacher: ``reverse_kl``, the default, is
    KL(π‖teacher), ``forward_kl`` is KL(teacher‖π)."""
    measure: MeasureConfig | None = None
    """A measure to minimize in place of a divergence, written as under ``measures``: ``top_k(forward_kl, teacher)``."""
    reference: str | None = None
    """Name of the teacher under ``references``, ``teacher`` by default; a measure names its own."""
    level: Literal["sequence", "token", "vocabulary"] = "vocabulary"
    """``vocabulary``: over the whole vocabulary at each token, on any completions. ``token`` and ``sequence``: from the
    sampled tokens, on fresh samples."""
    credit: Literal["fixed_prefix", "returns"] = "fixed_prefix"
    """On fresh samples, as under ``policy_gradient``."""
    temperature: float = Field(default=1.0, gt=0)
    """At level ``vocabulary``, policy and teacher are compared at logits divided by it."""
    importance: Literal["sequence", "token"] = "sequence"
    """π/π_old of whole prefixes, which is exact, or of single tokens."""
    reduction: CompletionMean | None = None
    """As under ``policy_gradient``; by default ``token_mean``, and ``sequence_sum`` at sequence level."""
    weights: list[TokenWeightConfig] = []
    """Factors of each token's loss, multiplied: names, or sections with settings."""
    completions: Completions | None = None
    """Of preference data: the ``chosen`` ones, the ``rejected`` ones, or ``all``. By default all that the run reads:
    the chosen ones, or both sides beside terms of a sum that compare them."""

    @property
    @override
    def title(self) -> str:
        if self.measure is None:
            return f"{self._divergence} to {self.reference or TEACHER}"
        return self.measure if isinstance(self.measure, str) else str(self.measure.kind)

    @property
    def _divergence(self) -> str:
        return "reverse_kl" if self.divergence is None else self.divergence

    @property
    @override
    def is_surrogate(self) -> bool:
        return self.level != "vocabulary" or self.credit == "returns"

    @override
    def build(self) -> Objective:
        if self.divergence is not None and self.measure is not None:
            raise ConfigError(
                f"objective.divergence={self.divergence} beside objective.measure, which takes its place: give one."
            )
        fields = self.model_dump(exclude={"kind", "divergence", "measure", "weights", "completions"})
        with refusals():
            if self.measure is None:
                quantity = named_divergence(self._divergence)
            else:
                quantity = build_measure(self.measure, "objective.measure")
            distillation = Distillation(quantity, **fields, weights=build_weights(self.weights))
            return selected(distillation, self.completions)


def selected(objective: Objective, completions: Completions | None) -> Objective:
    """Return an objective that reads only some completions of preference data; None for those that the run has."""
    return objective if completions is None else Selected(objective, completions)
