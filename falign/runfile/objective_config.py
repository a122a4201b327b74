"""The section ``objective`` of the run file: one model per objective, distinguished by ``kind``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxtyping import Float
from pydantic import Field, WrapValidator, field_validator
from torch import Tensor
from typing_extensions import override

from falign.errors import ConfigError
from falign.objectives import (
    Anchored,
    Listwise,
    Objective,
    Pairwise,
    RankedRewardModel,
    RewardModel,
    Sum,
    TokenPairwise,
    TokenWeighting,
    Unpaired,
)
from falign.registry import Registry
from falign.runfile.base_config import ObjectiveSection, PythonObject, named_divergence, refusals
from falign.runfile.distillation_config import Completions, DistillationConfig, selected
from falign.runfile.group_objective_config import GROUP_OBJECTIVES
from falign.runfile.members import OwnSection, union_of_kinds
from falign.runfile.online_objective_config import FURTHER_OBJECTIVES
from falign.runfile.schedule_config import with_schedules

__all__ = [
    "OBJECTIVES",
    "AnchoredConfig",
    "ListwiseConfig",
    "ObjectiveConfig",
    "OwnObjectiveConfig",
    "PairwiseConfig",
    "PythonObjectiveConfig",
    "RankedRewardModelConfig",
    "RewardModelConfig",
    "SumConfig",
    "TokenPairwiseConfig",
    "UnpairedConfig",
]


class _RegularizedSection(ObjectiveSection):
    """An objective on preferences, with a divergence and its strength."""

    divergence: str = "reverse_kl"
    """A name (``falign divergences`` lists them), or ``module:attribute`` with a divergence of your own."""
    beta: float = Field(default=0.1, gt=0)

    @property
    @override
    def learns_from_preferences(self) -> bool:
        return True

    @property
    @override
    def title(self) -> str:
        return f"{self.divergence}, β = {self.beta:g}"


class PairwiseConfig(_RegularizedSection):
    """f-DPO on pairs; DPO with the reverse KL."""

    kind: Literal["pairwise"] = "pairwise"
    method = "f-DPO on pairs"
    margin_loss: str = "logistic"
    """``logistic`` (f-DPO), ``hinge``, ``ipo``, ``squared`` (IPO of whole completions), ``conservative(0.1)``
    (label smoothing), ``robust(0.1)``, ``exo(0.001)``."""
    length_norm: Literal["none", "token"] | None = None
    """``token`` divides log-ratios by length. Default: ``token`` with ``ipo``, otherwise ``none``."""
    weighting: Literal["none", "data"] = "none"
    """``data`` multiplies the log-ratio of each token by its weight in the data (``chosen_weights``)."""
    entropy_weight: float = Field(default=1.0, gt=0)
    """α of H-DPO: below 1 the policy becomes sharper, above 1 more diverse."""

    @override
    def build(self) -> Objective:
        with refusals():
            return Pairwise(
                named_divergence(self.divergence),
                self.margin_loss,
                self.beta,
                self.length_norm,
                self.weighting,
                self.entropy_weight,
            )


class AnchoredConfig(_RegularizedSection):
    """Keeps the implicit reward of completions above a value; a term beside a loss of pairs."""

    kind: Literal["anchored"] = "anchored"
    method = "anchored rewards"
    value: float = 0.0
    """The anchor, nats of reward."""
    weighting: Literal["none", "data"] = "none"
    """As under ``pairwise``."""
    completions: Completions | None = None
    """Of preference data, as under ``distillation``."""

    @override
    def build(self) -> Objective:
        with refusals():
            anchored = Anchored(named_divergence(self.divergence), self.beta, self.value, self.weighting)
            return selected(anchored, self.completions)


class ListwiseConfig(_RegularizedSection):
    """Plackett-Luce f-DPO on two or more ranked completions per prompt."""

    kind: Literal["listwise"] = "listwise"
    method = "f-DPO on ranked lists"
    length_norm: Literal["none", "token"] = "none"

    @override
    def build(self) -> Objective:
        with refusals():
            return Listwise(named_divergence(self.divergence), self.beta, self.length_norm)


class _RewardModelSection(ObjectiveSection):
    """A reward model: a scalar head on the model, trained with it on comparisons."""

    centering: float = Field(default=0.0, ge=0)
    """Strength of the square of the sum of the two rewards, which keeps them near 0; 0.01 is usual."""

    @property
    @override
    def learns_from_preferences(self) -> bool:
        return True


class RewardModelConfig(_RewardModelSection):
    """A Bradley-Terry reward model on pairs."""

    kind: Literal["reward_model"] = "reward_model"
    method = "reward model on pairs"
    margin_loss: str = "logistic"
    """``logistic`` (Bradley-Terry), ``conservative(0.1)`` (label smoothing), and others of ``pairwise`` but ``ipo``."""
    margin: Literal["none", "data"] = "none"
    """``data``: the rewards of a pair should differ by the number in the row's column ``margin``."""

    @override
    def build(self) -> Objective:
        with refusals():
            return RewardModel(self.centering, self.margin_loss, self.margin)


class RankedRewardModelConfig(_RewardModelSection):
    """A Plackett-Luce reward model on ranked lists."""

    kind: Literal["ranked_reward_model"] = "ranked_reward_model"
    method = "reward model on ranked lists"

    @override
    def build(self) -> Objective:
        with refusals():
            return RankedRewardModel(self.centering)


class UnpairedConfig(_RegularizedSection):
    """KTO with any divergence: single completions with a label, or pairs as two labeled completions."""

    kind: Literal["unpaired"] = "unpaired"
    method = "KTO on labels"
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of desirable completions; balance the labels with one of the two weights."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    reference_point: Literal["mismatched", "samples", "vocabulary", "zero"] = "mismatched"
    """Reward that is neither gain nor loss: estimated as published, from prompts with the completions of other rows,
    over a whole step; the mean over a step's own ``samples``, for online runs; the divergence over the full
    ``vocabulary`` along each completion; or ``zero``."""

    @override
    def build(self) -> Objective:
        with refusals():
            return Unpaired(
                named_divergence(self.divergence),
                self.beta,
                self.desirable_weight,
                self.undesirable_weight,
                self.reference_point,
            )


class TokenPairwiseConfig(_RegularizedSection):
    """TDPO on pairs, with the divergence over the full vocabulary at each token."""

    kind: Literal["token_pairwise"] = "token_pairwise"
    method = "TDPO, a divergence per token"
    divergence: str = "forward_kl"
    """As under ``pairwise``, without restriction; the paper uses the forward KL."""
    alpha: float | None = Field(default=None, ge=0)
    """Weight of the divergences in variant 2, 0.5 by default."""
    variant: Literal[1, 2] = 2
    weighting: TokenWeighting = "none"
    """``mapo``: tokens count by the mask of SparsePO's MaPO, from the reference's activations, between 0 and 1; with
    variant 1 it is the paper's loss. ``activations``: by falign's own weights, the mean absolute activations of the
    reference's layers, with a mean of 1 in a completion. ``data``: by the weights of the data.
    ``learned`` and ``learned_independent``: by masks that are trained with the policy (SparsePO)."""
    mask_l1: float | None = Field(default=None, ge=0)
    """Only with learned masks: factor of their mean, 0.001 by default."""

    @override
    def build(self) -> Objective:
        with refusals():
            return TokenPairwise(
                named_divergence(self.divergence), self.beta, self.alpha, self.variant, self.weighting, self.mask_l1
            )


class PythonObjectiveConfig(PythonObject, ObjectiveSection):
    """The record of an objective that was given as an object."""

    @property
    @override
    def title(self) -> str:
        return self.name

    @override
    def build(self) -> Objective:
        return self.given("objective")


class OwnObjectiveConfig(OwnSection, ObjectiveSection, extra="allow"):
    """An objective of your own: ``module:Name``, called with the other keys of the section."""

    @override
    def build(self) -> Objective:
        with refusals():
            return self.make(OBJECTIVES, place="objective", protocol=Objective)


TERMS: dict[str, type[ObjectiveSection]] = {
    "pairwise": PairwiseConfig,
    "anchored": AnchoredConfig,
    "listwise": ListwiseConfig,
    "reward_model": RewardModelConfig,
    "ranked_reward_model": RankedRewardModelConfig,
    "unpaired": UnpairedConfig,
    "token_pairwise": TokenPairwiseConfig,
    **FURTHER_OBJECTIVES,
    **GROUP_OBJECTIVES,
    "distillation": DistillationConfig,
}

if TYPE_CHECKING:
    TermConfig = ObjectiveSection
else:
    TermConfig = union_of_kinds(TERMS, own=OwnObjectiveConfig)


class SumConfig(ObjectiveSection):
    """A weighted sum of objectives on the same completions; each keeps its own denominators."""

    kind: Literal["sum"] = "sum"
    method = "sum of objectives"
    terms: dict[str, TermConfig]
    """Objectives by names of your choice, which metrics begin with: ``{dpo: {kind: pairwise}, sft: {kind: supervised,
    completions: chosen}}``."""
    weights: dict[str, float] = {}
    """Factors of terms, 1 by default; a negative one maximizes."""

    @field_validator("terms", mode="before")
    @classmethod
    def _names(cls, terms: Any) -> Any:
        example = "{dpo: {kind: pairwise}, sft: {kind: supervised, completions: chosen}}"
        if not isinstance(terms, Mapping) or not terms:
            raise ValueError(f"give one objective or more, each by a name of your choice, as in {example}")
        if numbers := [name for name in terms if not isinstance(name, str)]:
            raise ValueError(f"{numbers[0]!r} is not the name of a term: give each objective a name, as in {example}")
        return terms

    @property
    @override
    def title(self) -> str:
        return " + ".join(f"{self.weights.get(name, 1.0):g} × {term.title}" for name, term in self.terms.items())

    @property
    @override
    def learns_from_preferences(self) -> bool:
        return any(term.learns_from_preferences for term in self.terms.values())

    @property
    @override
    def is_surrogate(self) -> bool:
        return any(term.is_surrogate for term in self.terms.values())

    @property
    @override
    def needs_samples(self) -> bool:
        return any(term.needs_samples for term in self.terms.values())

    @property
    @override
    def num_rewards(self) -> int | None:
        return next((term.num_rewards for term in self.terms.values() if term.num_rewards is not None), None)

    @property
    @override
    def compares(self) -> tuple[Literal["group", "rollout"], str] | None:
        return next((term.compares for term in self.terms.values() if term.compares is not None), None)

    @override
    def penalties(self) -> Iterator[tuple[str, float]]:
        for name, term in self.terms.items():
            for field, beta in term.penalties():
                # A term without a penalty of its own may have it from another term.
                if beta > 0 and ("terms", name, field) not in self._schedules:
                    yield f"terms.{name}.{field}", beta

    @override
    def unfitted(self) -> ObjectiveSection:
        return self.model_copy(update={"terms": {name: term.unfitted() for name, term in self.terms.items()}})

    @override
    def build(self) -> Objective:
        return self._of({name: term.build for name, term in self.terms.items()})

    @override
    def build_on(self, features: Float[Tensor, "M K"]) -> Objective:
        return self._of({name: partial(term.build_on, features) for name, term in self.terms.items()})

    def _of(self, terms: Mapping[str, Callable[[], Objective]]) -> Objective:
        if unknown := sorted(self.weights.keys() - self.terms.keys()):
            raise ConfigError(
                f"objective.weights.{unknown[0]}: the terms are {', '.join(self.terms)}; name one of them."
            )
        built: dict[str, tuple[Objective, float]] = {}
        for name, build in terms.items():
            try:
                built[name] = (build(), self.weights.get(name, 1.0))
            except ConfigError as error:  # a section names its fields as if it were the whole objective
                message = str(error).removeprefix("objective")
                raise ConfigError(f"objective.terms.{name}{message}") from error
        with refusals():
            return Sum(built)


OBJECTIVES: Registry[Any] = Registry(
    "objective",
    {
        **TERMS,
        "sum": SumConfig,
        "unpaired": UnpairedConfig,
        "python": PythonObjectiveConfig,
    },
    wanted="class or function",
)
"""Sections by kind; an own member is called with its settings and makes a :class:`falign.objectives.Objective`."""

if TYPE_CHECKING:
    ObjectiveConfig = ObjectiveSection
else:
    ObjectiveConfig = Annotated[
        union_of_kinds(OBJECTIVES.members, default="pairwise", own=OwnObjectiveConfig), WrapValidator(with_schedules)
    ]
"""The objective: ``kind`` names one of these; the first is the default."""
