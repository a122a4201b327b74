"""The section of the run file that says what is minimised: one model per objective, told apart by ``kind``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from falign.objectives import Listwise, Objective, Pairwise, TokenPairwise, TokenWeighting
from falign.runfile.base_config import FrozenModel, PythonObject, named_divergence, refusals
from falign.runfile.online_objective_config import (
    DistributionMatchingConfig,
    HybridConfig,
    PolicyGradientConfig,
    RehearsalConfig,
    SupervisedConfig,
)

__all__ = ["ListwiseConfig", "ObjectiveConfig", "PairwiseConfig", "PythonObjectiveConfig", "TokenPairwiseConfig"]


class PairwiseConfig(FrozenModel):
    """f-DPO on pairs; DPO with the reverse KL."""

    kind: Literal["pairwise"] = "pairwise"
    divergence: str = "reverse_kl"
    """A name (``falign divergences`` lists them), or ``module:attribute`` with a divergence of your own."""
    beta: float = Field(default=0.1, gt=0)
    margin_loss: str = "logistic"
    """``logistic`` (f-DPO), ``hinge``, ``ipo``, ``squared`` (IPO of whole completions), ``robust(0.1)``,
    ``exo(0.001)``."""
    length_norm: Literal["none", "token"] | None = None
    """``token``: log-ratios are means over tokens; left out, they are with ``ipo`` alone."""

    @property
    def title(self) -> str:
        """The title of the run's plots."""
        return f"{self.divergence}, β = {self.beta:g}"

    def build(self) -> Objective:
        """Return the objective.

        Raises:
            ConfigError: The divergence is unknown or theory does not allow it here; the message has the reason.
        """
        with refusals():
            return Pairwise(named_divergence(self.divergence), self.margin_loss, self.beta, self.length_norm)


class ListwiseConfig(FrozenModel):
    """Plackett-Luce f-DPO on two or more ranked completions per prompt."""

    kind: Literal["listwise"] = "listwise"
    divergence: str = "reverse_kl"
    """As under ``pairwise``."""
    beta: float = Field(default=0.1, gt=0)
    length_norm: Literal["none", "token"] = "none"

    @property
    def title(self) -> str:
        """The title of the run's plots."""
        return f"{self.divergence}, β = {self.beta:g}"

    def build(self) -> Objective:
        """Return the objective.

        Raises:
            ConfigError: The divergence is unknown or theory does not allow it here; the message has the reason.
        """
        with refusals():
            return Listwise(named_divergence(self.divergence), self.beta, self.length_norm)


class TokenPairwiseConfig(FrozenModel):
    """TDPO on pairs, with the divergence over the full vocabulary at each token."""

    kind: Literal["token_pairwise"] = "token_pairwise"
    divergence: str = "forward_kl"
    """As under ``pairwise``, but any; the paper's is the forward KL."""
    beta: float = Field(default=0.1, gt=0)
    alpha: float | None = Field(default=None, ge=0)
    """Weight of the divergences in variant 2, 0.5 where left out."""
    variant: Literal[1, 2] = 2
    weighting: TokenWeighting = "none"
    """``mapo``: tokens count by the mask of SparsePO's MaPO, from the reference's activations, between 0 and 1; with
    variant 1 it is the paper's loss. ``activations``: by falign's own weights, the mean absolute activations of the
    reference's layers, with a mean of 1 in a completion."""

    @property
    def title(self) -> str:
        """The title of the run's plots."""
        return f"{self.divergence}, β = {self.beta:g}"

    def build(self) -> Objective:
        """Return the objective.

        Raises:
            ConfigError: The divergence is unknown, or two fields contradict each other; the message has the reason.
        """
        with refusals():
            return TokenPairwise(named_divergence(self.divergence), self.beta, self.alpha, self.variant, self.weighting)


class PythonObjectiveConfig(PythonObject):
    """An objective that a program gave as an object."""

    @property
    def title(self) -> str:
        """The title of the run's plots."""
        return self.name

    def build(self) -> Objective:
        """Return the objective.

        Raises:
            ConfigError: It is not at hand.
        """
        return self.given("objective")


def _kind(value: Any) -> str:
    return str(value.get("kind", "pairwise") if isinstance(value, dict) else getattr(value, "kind", "pairwise"))


ObjectiveConfig = Annotated[
    Annotated[PairwiseConfig, Tag("pairwise")]
    | Annotated[ListwiseConfig, Tag("listwise")]
    | Annotated[TokenPairwiseConfig, Tag("token_pairwise")]
    | Annotated[PolicyGradientConfig, Tag("policy_gradient")]
    | Annotated[DistributionMatchingConfig, Tag("distribution_matching")]
    | Annotated[HybridConfig, Tag("hybrid")]
    | Annotated[RehearsalConfig, Tag("rehearsal")]
    | Annotated[SupervisedConfig, Tag("supervised")]
    | Annotated[PythonObjectiveConfig, Tag("python")],
    Discriminator(_kind),
]
"""The objective: ``kind`` names one of these; the first is the default."""
