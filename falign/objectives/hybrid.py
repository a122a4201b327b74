"""A policy gradient on fresh samples combined with rehearsal on samples of the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import override

from falign.divergences import Alpha, Divergence, ForwardKL, JensenShannon
from falign.objectives.base import BaseObjective, CompletionBatch, Importance, ObjectiveOutput
from falign.objectives.measures import Measure
from falign.objectives.policy_gradient import PolicyGradient
from falign.objectives.rehearsal import Rehearsal

__all__ = ["Hybrid", "dph_rl_coefficient"]

# The paper's η is the weight in one mean over all rows, with 8 fresh rows per row of the reference: 8 times the weight
# between two means. For Jensen-Shannon η is from the paper's tables; for the forward KL and α only the range 0.01 to
# 0.05 is published, and this is its upper end.
DPH_RL_COEFFICIENTS: dict[type[Divergence], float] = {JensenShannon: 0.2 / 8, ForwardKL: 0.05 / 8, Alpha: 0.05 / 8}


@dataclass(frozen=True)
class Hybrid(BaseObjective):
    """A policy gradient on fresh samples plus ``coefficient`` times rehearsal on samples of the reference.

    ``from_reference`` tells the rows apart. Each part is a mean with its own denominator, so that the coefficient does
    not depend on how many rows of either kind a batch has.

    Attributes:
        policy_gradient: For rows that are not from the reference.
        rehearsal: For rows that are from the reference.
        coefficient: Weight of the rehearsal, not negative.

    Raises:
        ValueError: The coefficient is negative or infinite.

    Source:
        Li et al., DPH-RL (arXiv:2509.07430), Eq. 6. Their code takes one mean over all rows; with its 8 fresh rows
        for each row of the reference, their η is about 8 times this coefficient.

    Example:
        >>> from falign import divergences
        >>> hybrid = Hybrid(PolicyGradient(), Rehearsal(divergences.get("jensen_shannon")), coefficient=0.1)
        >>> sorted(hybrid.needs)
        ['from_reference', 'old_logprobs', 'reference_logprobs', 'rewards']
    """

    policy_gradient: PolicyGradient
    rehearsal: Rehearsal
    coefficient: float

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < math.inf:
            raise ValueError(
                f"coefficient={self.coefficient!r} must be finite and not negative: a negative one rewards forgetting."
            )

    @property
    @override
    def needs(self) -> frozenset[str]:
        return self.policy_gradient.needs | self.rehearsal.needs | {"from_reference"}

    @property
    @override
    def needs_of_samples(self) -> frozenset[str]:
        return self.policy_gradient.needs | {"from_reference"}

    @property
    @override
    def needs_of_stored(self) -> frozenset[str]:
        return self.rehearsal.needs | {"from_reference"}

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        return self.policy_gradient.measures

    @property
    @override
    def needs_to_prepare(self) -> frozenset[str]:
        return self.policy_gradient.needs_to_prepare

    @property
    @override
    def correction_level(self) -> Importance | None:
        return self.policy_gradient.correction_level

    @override
    def prepare(self, batch: CompletionBatch) -> CompletionBatch:
        """Return the batch with the fields that the policy gradient prepares for its rows; 0 for the others.

        Args:
            batch: The whole rollout and its rehearsal rows, with :attr:`needs`.

        Returns:
            The same completions.

        Raises:
            ValueError: A needed field is None.
        """
        fresh = ~batch.require("from_reference")
        own = self.policy_gradient.prepare(batch.select(fresh))

        # Values of fresh rows go back to their places; rehearsal rows get 0, which no term reads.
        def in_place(rows: Tensor | None) -> Tensor | None:
            if rows is None:
                return None
            return rows.new_zeros(len(fresh), *rows.shape[1:]).index_put((fresh.nonzero().squeeze(-1),), rows)

        return replace(
            batch,
            advantages=in_place(own.advantages),
            baseline=in_place(own.baseline),
            old_values=in_place(own.old_values),
        )

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return the terms of both parts.

        Args:
            batch: Completions with :attr:`needs`, after :meth:`prepare` or before. ``rewards`` and ``old_logprobs``
                of rehearsal rows are not read, nor are ``reference_logprobs`` of the others without a penalty. One kind
                of row may be missing.

        Returns:
            The policy gradient's terms and metrics, then the rehearsal's: its term scaled by the coefficient and its
            metrics under ``rehearsal/``. A kind of row that is missing has no metrics.

        Raises:
            ValueError: A needed field is None.
        """
        stored = batch.require("from_reference")
        explored, kept = self.policy_gradient(batch.select(~stored)), self.rehearsal(batch.select(stored))
        scaled = tuple(term._replace(scale=self.coefficient * term.scale) for term in kept.terms)
        metrics = {**explored.metrics, **{f"rehearsal/{name}": values for name, values in kept.metrics.items()}}
        return ObjectiveOutput(explored.terms + scaled, {k: v for k, v in metrics.items() if len(v) > 0})


def dph_rl_coefficient(divergence: Divergence) -> float:
    """Return the published weight of DPH-RL's rehearsal for a divergence, as a weight between two means.

    Args:
        divergence: f of the rehearsal: Jensen-Shannon, the forward KL, or an α-divergence.

    Returns:
        An eighth of their η.

    Raises:
        ValueError: No weight is published for this divergence.

    Source:
        Li et al., DPH-RL (arXiv:2509.07430): η of the tables for Jensen-Shannon, 0.2; the upper end of the range in
        the authors' code for the forward KL and α, 0.01 to 0.05.

    Example:
        >>> dph_rl_coefficient(JensenShannon()), dph_rl_coefficient(ForwardKL())
        (0.025, 0.00625)
    """
    if type(divergence) not in DPH_RL_COEFFICIENTS:
        raise ValueError(
            f"no coefficient is published for DPH-RL under {divergence.name}: set coefficient. For comparison, it is "
            "0.025 for jensen_shannon, where f''(1) = 0.5, and 0.00625 for forward_kl, where f''(1) = 1."
        )
    return DPH_RL_COEFFICIENTS[type(divergence)]
