"""Rehearsal: the divergence itself, estimated on stored samples of the reference, keeps the policy near it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from typing_extensions import override

from falign.divergences import Divergence
from falign.divergences.estimators import loss_from_reference, value_from_reference
from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput
from falign.objectives.batch import REFERENCE, field_of_reference
from falign.objectives.groups import CompletionMean, completion_mean_at, completion_term

__all__ = ["Rehearsal"]


@dataclass(frozen=True)
class Rehearsal(BaseObjective):
    """``E_ref[f(u)]`` on stored samples of the reference, whose gradient is exactly that of ``D_f(π‖π_ref)``.

    The distribution of the samples does not depend on the policy, so the loss is differentiated directly. The
    reference's log-probs are stored with the samples; no reference model is needed.

    Attributes:
        divergence: Any f.
        level: ``"token"``: ``Σ_t f(u_t)``, whose mean is ``Σ_t D_f(π(·|s_t)‖π_ref(·|s_t))`` on the reference's
            prefixes. ``"sequence"``: ``f(u)`` of whole completions.
        reduction: At token level, see :func:`completion_term`; None means ``"token_mean"``. At sequence level there is
            one loss per completion, and the reduction must be None or ``"sequence_sum"``.
        reference: Name of the reference, such as that of a teacher whose samples are the data.

    Raises:
        ValueError: A choice is unknown, or the reduction divides by tokens at sequence level.

    Source:
        Li et al., DPH-RL (arXiv:2509.07430), the generator form, at token level and as a mean over tokens. In
        normal form ``c (u - 1)`` is added to f, a control variate of mean 0; theirs has it for the forward KL.

    Example:
        >>> from falign import divergences
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0, -2.0]]),
        ...     reference_logprobs=torch.tensor([[-1.0, -1.0]]),
        ...     completion_mask=torch.ones(1, 2, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0]),
        ... )
        >>> Rehearsal(divergences.get("forward_kl"))(batch).mean()  # (0 + (e^-1 - 1 + 1))/2
        tensor(0.1839)
    """

    divergence: Divergence
    level: Literal["sequence", "token"] = "token"
    reduction: CompletionMean | None = None
    reference: str = REFERENCE

    def __post_init__(self) -> None:
        if self.level not in ("sequence", "token"):
            raise ValueError(f"level={self.level!r}: choose 'sequence' or 'token'.")
        object.__setattr__(self, "reduction", completion_mean_at(self.level, self.reduction))

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({field_of_reference(self.reference)})

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per completion.

        Args:
            batch: Samples of the reference with its log-probabilities.

        Returns:
            One term of shape (N,), and the metrics ``divergence/<name>`` (the sum over the completion) and
            ``logratios/reference_samples`` (``log u`` of the whole) of each.

        Raises:
            ValueError: The reference's log-probabilities are missing.
        """
        assert self.reduction is not None
        log_ratio = batch.log_ratio_to(self.reference)
        whole = log_ratio.sum(dim=-1, keepdim=True)
        compared = log_ratio if self.level == "token" else whole
        losses = loss_from_reference(self.divergence, compared).sum(dim=-1)
        with torch.no_grad():
            metrics = {
                f"divergence/{self.divergence.name}": value_from_reference(self.divergence, compared).sum(dim=-1),
                "logratios/reference_samples": whole.squeeze(-1),
            }
        term = completion_term(losses, batch.num_tokens, self.reduction, name="rehearsal")
        return ObjectiveOutput((term,), {name: value.detach() for name, value in metrics.items()})
