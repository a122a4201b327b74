"""TRL's trainer on preference pairs, with an objective of falign."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from typing_extensions import override

from falign.integrations.trl.batch_forms import BatchForm, Pairs
from falign.integrations.trl.objective_loss import GivenReference, LayoutName, ObjectiveLoss, Request
from falign.integrations.trl.settings import beta_of
from falign.objectives import CompletionBatch, Objective, ObjectiveOutput
from falign.objectives.groups import accuracies
from falign.references import Reference
from falign.scoring import DEFAULT_CHUNK_TOKENS

__all__ = ["FDPOTrainer"]


class FDPOTrainer(ObjectiveLoss, DPOTrainer):
    """``DPOTrainer`` of TRL that minimizes an objective of falign on pairs.

    The arguments, datasets, callbacks and adapters of a TRL script stay. ``docs/trl.md`` lists what is inherited, what
    is given up and what is refused.

    Args:
        model: As in TRL.
        ref_model: As in TRL.
        args: As in TRL, without the settings of its loss. ``beta`` may be left out; given, it must be the objective's.
        *others: TRL's further arguments, in its order.
        objective: Any objective on pairs, for example ``falign.FDPO("jensen_shannon", beta=0.1)``; a sum, or one of
            your own.
        layout: ``"trl"`` scores batches by TRL's own forward passes. ``"tree"`` computes each prompt once for its two
            completions and scores them with falign's chunked head, which measures (TDPO) and further references need.
            ``"padded"`` does the same on padded rows, for models that cannot read trees.
        reference: A rule by which TRL's reference follows the policy (:class:`falign.references.MovingAverage`,
            :class:`falign.references.PeriodicReset`), with LoRA too. With falign's layouts also a reference of falign,
            or a function that makes it from the policy. None: TRL's own.
        references: Further references by name, for objectives that read several; falign's layouts only.
        chunk_tokens: Number of positions that reach the head at once, in falign's layouts.
        **further: TRL's further arguments, by name.

    Raises:
        ConfigError: A setting would be ignored, contradicts the objective, or cannot work with the layout.
        ModelError: The layout or the reference does not fit the model.

    Example:
        ``FDPOTrainer(model, args=args, train_dataset=pairs, objective=falign.FDPO("jensen_shannon", beta=0.1))``
    """

    form: ClassVar[BatchForm] = Pairs()
    loss_settings: ClassVar[Mapping[str, str]] = {
        **ObjectiveLoss.loss_settings,
        "loss_type": "In FDPO, hinge, ipo, robust, exo_pair and sigmoid are margin_loss, sigmoid_norm is "
        "length_norm='token'; sft is a term of falign.objectives.Sum.",
        "loss_weights": "Give the weights in falign.objectives.Sum.",
        "f_divergence_type": "Name the divergence in the objective: FDPO('jensen_shannon', beta=0.1).",
        "f_alpha_divergence_coef": "falign's α is 1 minus this coefficient: FDPO('alpha(0.5)', beta=0.1).",
        "label_smoothing": "TRL's sigmoid loss ignores it. Choose a margin_loss: conservative(0.1), robust(0.1), "
        "or exo(0.001).",
        "ld_alpha": "falign has no counterpart of LD-DPO; length_norm='token' is another remedy for length.",
        "use_weighting": "falign has no counterpart of WPO.",
        "discopop_tau": "falign has no counterpart of DiscoPOP.",
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
        args = request.settle(args, self.loss_settings, {"beta": beta_of(request.objective)})
        super().__init__(model, ref_model, args, *others, **further)
        self.begin(request)

    @override
    def trl_metrics(self, batch: CompletionBatch, output: ObjectiveOutput) -> dict[str, Tensor]:
        if (rewards := self.rewards(batch)) is None:
            return {}
        chosen = batch.require("preference") > 0
        # Chosen and rejected rows are in the order of the pairs, in every layout.
        of_chosen, of_rejected = rewards[chosen], rewards[~chosen]
        margin = of_chosen - of_rejected
        return {
            "rewards/chosen": of_chosen,
            "rewards/rejected": of_rejected,
            "rewards/margins": margin,
            "rewards/accuracies": accuracies(margin, torch.maximum(of_chosen.abs(), of_rejected.abs())),
        }
