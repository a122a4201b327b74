"""TRL's trainer on labeled completions, with an objective of falign."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from trl.trainer.kto_trainer import KTOTrainer
from typing_extensions import override

from falign.errors import ConfigError
from falign.integrations.trl.batch_forms import BatchForm, Labels
from falign.integrations.trl.objective_loss import GivenReference, LayoutName, ObjectiveLoss, Request
from falign.integrations.trl.settings import beta_of
from falign.objectives import BaseObjective, CompletionBatch, Objective, ObjectiveOutput
from falign.references import Reference
from falign.scoring import DEFAULT_CHUNK_TOKENS
from falign.training.step_means import MISMATCHED

__all__ = ["FKTOTrainer"]


class FKTOTrainer(ObjectiveLoss, KTOTrainer):
    """``KTOTrainer`` of TRL that minimizes an objective of falign on labeled completions.

    Args:
        model: As in TRL.
        ref_model: As in TRL.
        args: As in TRL, without ``loss_type``. ``beta``, ``desirable_weight`` and ``undesirable_weight`` may be left
            out; given, they must be the objective's.
        *others: TRL's further arguments, in its order.
        objective: Any objective on labels, for example ``falign.methods.KTO("jensen_shannon", beta=0.1)``.
        layout: As in :class:`FDPOTrainer`.
        reference: As in :class:`FDPOTrainer`.
        references: As in :class:`FDPOTrainer`.
        chunk_tokens: As in :class:`FDPOTrainer`.
        **further: TRL's further arguments, by name.

    Raises:
        ConfigError: A setting would be ignored, contradicts the objective, or cannot work with the layout.
        ModelError: The layout or the reference does not fit the model.

    Source:
        Ethayarajh et al., KTO (arXiv:2402.01306). TRL's reference point is a mean over one micro-batch of each
        process, here it is over the optimizer step; both are over TRL's mismatched rows.
    """

    form: ClassVar[BatchForm] = Labels()
    loss_settings: ClassVar[Mapping[str, str]] = {
        **ObjectiveLoss.loss_settings,
        "loss_type": "apo_zero_unpaired is KTO(..., reference_point='zero').",
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *others: Any,
        objective: Objective,
        layout: LayoutName = "trl",
        reference: GivenReference | None = None,
        references: Mapping[str, Reference | Callable[[Any], Reference]] | None = None,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        **further: Any,
    ) -> None:
        request = Request.checked(
            objective,
            self.form,
            layout=layout,
            reference=reference,
            references=references,
            chunk_tokens=chunk_tokens,
        )
        shared = {name: _weight(request.objective, name) for name in ("desirable_weight", "undesirable_weight")}
        args = request.settle(args, self.loss_settings, {"beta": beta_of(request.objective), **shared})
        super().__init__(model, ref_model, args, *others, **further)
        reads_mismatched = any(mean.rows == MISMATCHED for mean in request.objective.step_means.values())
        if reads_mismatched and self._is_vision_dataset:
            raise ConfigError(
                "objective: its reference point is a mean over mismatched completions, which cannot be scored with "
                "images: choose reference_point='zero' or 'samples'."
            )
        self.begin(request)

    @override
    def loss_of_trl(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        # The mean over mismatched rows is computed once for the whole step, in place of TRL's for each micro-batch.
        asked, self.calculate_KL = self.calculate_KL, False
        try:
            return super().loss_of_trl(model, inputs, return_outputs)
        finally:
            self.calculate_KL = asked

    @override
    def trl_metrics(self, batch: CompletionBatch, output: ObjectiveOutput) -> dict[str, Tensor]:
        if (rewards := self.rewards(batch)) is None:
            return {}
        desirable = batch.require("preference") > 0
        found = {"rewards/chosen": rewards[desirable], "rewards/rejected": rewards[~desirable]}
        logprobs = batch.sequence_sum(batch.logprobs)
        found |= {"logps/chosen": logprobs[desirable], "logps/rejected": logprobs[~desirable]}
        if desirable.any() and not desirable.all():
            found["rewards/margins"] = (rewards[desirable].mean() - rewards[~desirable].mean())[None]
        return found


def _weight(objective: BaseObjective, name: str) -> float | None:
    """Return a weight of the objective or of its only part that has one; None if there is none."""
    parts = objective.summands.values() or [objective]
    found = [value for each in parts if isinstance(value := getattr(each, name, None), float | int)]
    return float(found[0]) if len(found) == 1 else None
