"""References that follow the policy during a run of TRL, with their state in TRL's checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from falign.errors import ConfigError, TrainingError
from falign.references import REFERENCE, FrozenModel, MovingReference, MovingRule, Reference
from falign.training.trainer import state_folder

__all__ = ["MovingReferenceCallback", "moving_reference"]

MARK = "moving_references.json"
"""File of a checkpoint that says which policy the references' states belong to."""


def moving_reference(rule: MovingRule, policy: nn.Module, reference_model: nn.Module | None) -> MovingReference:
    """Return a reference that follows the policy, where TRL's trainers look for theirs.

    Args:
        rule: The rule by which it moves.
        policy: The policy, without wrapper. With LoRA, the reference is held in its adapter ``ref``, which TRL's
            trainers activate in place of the base; a copy that TRL made is replaced.
        reference_model: TRL's separate reference model, for a policy without adapter; its weights will change.

    Raises:
        ConfigError: There is neither an adapter nor a reference model.
    """
    if reference_model is not None:
        return MovingReference(FrozenModel(reference_model), rule=rule)
    if not isinstance(policy, PeftModel):
        raise ConfigError(
            "A reference that follows a policy without adapter needs a second model: give ref_model, to the trainer "
            "and to MovingReferenceCallback(rule, ref_model), and leave out precompute_ref_log_probs."
        )
    if "ref" in policy.peft_config:
        policy.delete_adapter("ref")
    return MovingReference.beside(policy, rule=rule)


class MovingReferenceCallback(TrainerCallback):
    """Move a reference before each optimizer step, and keep its state in the checkpoints.

    ``FDPOTrainer(reference=MovingAverage(...))`` adds it itself. In ``callbacks=[...]`` it works with any trainer of
    TRL whose reference is the adapter ``ref``, or the ``ref_model`` given to both.

    Args:
        rule: The rule, for example :class:`falign.references.MovingAverage` or
            :class:`falign.references.PeriodicReset`.
        ref_model: The trainer's ``ref_model``, for a policy without adapter.

    Source:
        Gorbatovski et al., TR-DPO (arXiv:2404.09656). TRL's ``sync_ref_model`` mixes whole weights and refuses LoRA;
        here the updates ``ΔW`` of adapters are averaged exactly (:class:`falign.references.MovingAverage`).

    Example:
        ``DPOTrainer(model, args=args, peft_config=lora, callbacks=[MovingReferenceCallback(PeriodicReset(every=64))],
        ...)``
    """

    def __init__(self, rule: MovingRule | None = None, ref_model: nn.Module | None = None) -> None:
        self.references: dict[str, Reference] = {}
        self.resume_from: str | None = None
        self._rule, self._reference_model = rule, ref_model

    @classmethod
    def of(cls, references: Mapping[str, Reference]) -> MovingReferenceCallback:
        """Return the callback for references that exist already; those that do not move are left out."""
        callback = cls()
        callback.references = {name: each for name, each in references.items() if each.moves}
        return callback

    @override
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._rule is not None:
            reference = moving_reference(self._rule, kwargs["model"], self._reference_model)
            self.references = {REFERENCE: reference}

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0 or not self.references:
            return
        policy, name = kwargs["model"], f"checkpoint-{state.global_step}"
        folder = Path(self.resume_from or args.resume_from_checkpoint or Path(str(args.output_dir)) / name)
        mark = folder / MARK
        if not mark.is_file():
            raise TrainingError(
                f"The run resumes at step {state.global_step}, and {folder} has no {MARK}, so the state of the moving "
                f"reference is missing: resume from a checkpoint in output_dir that was written with this callback."
            )
        recorded = json.loads(mark.read_text(encoding="utf-8"))
        if recorded != (found := self._mark(policy)):
            differing = sorted(key for key in {*recorded, *found} if recorded.get(key) != found.get(key))
            raise TrainingError(
                f"{mark} was written by another run ({', '.join(differing)} differ), so its references do not belong "
                "to the weights that training resumes from: resume from a checkpoint in output_dir, with the same "
                "references."
            )
        for name, reference in self.references.items():
            reference.load(state_folder(folder, name), policy)

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for reference in self.references.values():
            reference.move(kwargs["model"], state.global_step, kwargs["optimizer"])

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics = {name.removeprefix("eval_"): value for name, value in kwargs["metrics"].items()}
        for reference in self.references.values():
            reference.observe(metrics)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.references or not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for name, reference in self.references.items():
            (own := state_folder(folder, name)).mkdir(parents=True, exist_ok=True)
            reference.save(own, kwargs["model"])
        (folder / MARK).write_text(json.dumps(self._mark(kwargs["model"])), encoding="utf-8")

    def _mark(self, policy: nn.Module) -> dict[str, str]:
        """Return a fingerprint of the trained weights, and the references' kinds and settings."""
        digest = hashlib.sha256()
        for name, parameter in sorted(policy.named_parameters()):
            if parameter.requires_grad:
                few = parameter.detach().flatten()[:256].float().cpu().numpy().tobytes()
                digest.update(name.encode() + few)
        changing = ("moves", "start")
        identities = {
            name: {key: value for key, value in each.identity().items() if key not in changing}
            for name, each in self.references.items()
        }
        plain = cast("dict[str, str]", {name: json.dumps(each, default=str) for name, each in identities.items()})
        return {"policy": digest.hexdigest(), **plain}
