"""The loss of an objective in place of TRL's, in the trainers on given completions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from trl.trainer.utils import use_adapter
from typing_extensions import override

from falign.errors import ConfigError
from falign.integrations.trl.batch_forms import MISMATCHED_ROWS, OWN_ROWS, BatchForm
from falign.integrations.trl.layouts import FUSED, OwnRows, Scored, ScoringLayout, Trees
from falign.integrations.trl.moving import MovingReferenceCallback, moving_reference
from falign.integrations.trl.settings import beta_of, check_objective, of_objective, reads_sums, require_defaults
from falign.objectives import (
    BaseObjective,
    CompletionBatch,
    Objective,
    ObjectiveOutput,
    reduce_terms,
    reference_names,
    total_weights,
)
from falign.objectives.batch import REFERENCE
from falign.raised import calling
from falign.references import AdapterOff, AdapterReference, FrozenModel, MovingRule, Reference
from falign.scoring import Layout, Scorer, evaluation_mode
from falign.training.objective_contract import PLANNED_TERMS, ObjectiveContract
from falign.training.processes import gathered
from falign.training.step_means import MISMATCHED, add_step_means

__all__ = ["GivenReference", "LayoutName", "ObjectiveLoss", "Request"]

LayoutName = Literal["trl", "tree", "padded"]

GivenReference = Reference | MovingRule | Callable[[Any], Reference]
"""A reference, a rule by which TRL's own one follows the policy, or a function from the policy to a reference."""

TRL_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "kl")
"""Metrics of TRL that take the implicit reward to be ``β log u``, which it is for the reverse KL only."""


@dataclass(frozen=True)
class Request:
    """The arguments of a trainer beside TRL's own.

    Attributes:
        objective: The objective to minimize.
        layout: ``"trl"``, or falign's ``"tree"`` or ``"padded"``.
        reference: In place of TRL's reference, or how that moves; None for TRL's own.
        references: Further references by name.
        chunk_tokens: Number of positions that reach the head at once, in falign's layouts.
    """

    objective: BaseObjective
    layout: LayoutName
    reference: GivenReference | None
    references: Mapping[str, Reference | Callable[[Any], Reference]]
    chunk_tokens: int

    @classmethod
    def checked(
        cls,
        objective: Objective,
        form: BatchForm,
        *,
        layout: LayoutName,
        reference: GivenReference | None,
        references: Mapping[str, Reference | Callable[[Any], Reference]] | None,
        chunk_tokens: int,
    ) -> Request:
        """Return a request after refusing what cannot work with any model.

        Raises:
            ConfigError: The layout is unknown, or it cannot supply what the objective reads.
        """
        if layout not in get_args(LayoutName):
            raise ConfigError(f"layout={layout!r}: choose one of {', '.join(map(repr, get_args(LayoutName)))}.")
        whole = check_objective(objective, layout=layout, kind=form.kind, other_trainer=form.other_trainer)
        moves = isinstance(reference, MovingRule)
        if layout == "trl" and (references or not (reference is None or moves)):
            name = "references" if references else "reference"
            raise ConfigError(
                f"{name} with layout='trl': TRL scores only its own reference. Set layout='tree' (or 'padded'), or "
                "give a rule by which TRL's reference moves, such as falign.references.MovingAverage."
            )
        if references and REFERENCE in references:
            raise ConfigError(f"references[{REFERENCE!r}]: give this one as the argument reference.")
        return cls(whole, layout, reference, dict(references or {}), chunk_tokens)

    @property
    def moves(self) -> bool:
        """True if TRL's reference is to follow the policy by a rule."""
        return isinstance(self.reference, MovingRule)

    def settle(self, args: Any, remedies: Mapping[str, str], shared: Mapping[str, float | None]) -> Any:
        """Return TRL's configuration after refusing settings that would be ignored or contradict the request.

        Args:
            args: The configuration; None for TRL's defaults.
            remedies: Settings of TRL's loss that must be left out, with what to do instead.
            shared: Numbers that the objective has too, by the name of TRL's setting.

        Raises:
            ConfigError: A setting would be ignored, or differs from the objective's.
        """
        if args is None:
            return None
        require_defaults(args, remedies)
        for name, value in shared.items():
            args = of_objective(args, name, value)
        if args.precompute_ref_log_probs:
            self._check_precomputed()
        if args.sync_ref_model and self.reference is not None:
            raise ConfigError("sync_ref_model=True and reference: both move or replace the reference; leave one out.")
        if args.use_liger_kernel and not FUSED:
            raise ConfigError(
                "use_liger_kernel=True: this TRL then computes the loss inside its own function, where no objective "
                "can replace it: leave it out, or install trl>=1.15."
            )
        return args

    def _check_precomputed(self) -> None:
        name = type(self.objective).__name__
        if self.reference is not None:
            raise ConfigError(
                "precompute_ref_log_probs=True and reference: the columns hold TRL's own reference before training; "
                "leave one out."
            )
        if not reads_sums(self.objective):
            raise ConfigError(
                f"precompute_ref_log_probs=True: TRL keeps one sum per completion, and {name} reads the reference at "
                "single tokens: leave it out, so that the reference runs at every step."
            )


class ObjectiveLoss(Trainer):
    """Compute the loss of a falign objective in ``compute_loss``, in front of a trainer of TRL.

    Everything else stays the trainer's. Losses are divided by the weights of the whole optimizer step, which
    ``get_batch_samples`` sums, so that gradient accumulation changes nothing.
    """

    loss_is_scaled_for_ga = True
    form: ClassVar[BatchForm]
    loss_settings: ClassVar[Mapping[str, str]] = {
        "label_smoothing_factor": "For label noise in pairs see the margin losses of falign.objectives."
    }

    def begin(self, request: Request) -> None:
        """Set up references and layout, and try them, after the trainer of TRL is built.

        Raises:
            ConfigError: The request does not fit the model, the data or the way of training.
            ModelError: A model or a reference cannot be scored.
        """
        trainer = cast("Any", self)
        self.request, self.objective = request, request.objective
        self.contract = ObjectiveContract()
        self._window: list[dict[str, Any]] | None = None
        self._step_means: dict[str, Tensor] = {}
        self.precomputed = bool(trainer.precompute_ref_logps)
        if request.layout != "trl":
            self._require_text_in_one_piece()
        if request.moves and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ConfigError("reference: one that moves needs whole weights in each process; train without sharding.")
        self.references = self._references()
        self._require_references()
        self.moving = MovingReferenceCallback.of(self.references)
        self.add_callback(self.moving)
        self.layout = self._layout()
        if (beta := beta_of(request.objective)) is not None:
            trainer.beta = beta

    def _require_text_in_one_piece(self) -> None:
        """Refuse what falign's layouts cannot score, by the name of the setting."""
        trainer, layout = cast("Any", self), f"layout={self.request.layout!r}"
        if trainer._is_vision_dataset:
            raise ConfigError(f"{layout}: batches with images cannot be laid out as trees; set layout='trl'.")
        if trainer.aux_loss_enabled:
            raise ConfigError(
                f"{layout} has no load-balancing loss for a mixture of experts: set router_aux_loss_coef=0.0 to train "
                "without it, or layout='trl'."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError(
                f"{layout} works in one process and under DDP; under DeepSpeed and FSDP set layout='trl', or use "
                "falign train --launch fsdp2."
            )
        if getattr(self.args, "truncation_mode", "keep_start") == "keep_end" and trainer.args.max_length is not None:
            raise ConfigError(
                f"{layout} with truncation_mode='keep_end': the prompts of a pair are cut at different places; set "
                "truncation_mode='keep_start' or layout='trl'."
            )

    def _references(self) -> dict[str, Reference]:
        """Return the references by name: the one that replaces TRL's, or TRL's own, and further ones."""
        policy, given = cast("nn.Module", self.model), self.request.reference
        found: dict[str, Reference] = {}
        if isinstance(given, MovingRule):
            found[REFERENCE] = moving_reference(given, policy, self._reference_model)
        elif given is not None:
            found[REFERENCE] = _built(given, policy)
        elif self._reference_model is not None:
            found[REFERENCE] = FrozenModel(self._reference_model, chunk_tokens=self.request.chunk_tokens)
        elif isinstance(policy, PeftModel):
            has_copy = "ref" in policy.peft_config
            chunk_tokens = self.request.chunk_tokens
            found[REFERENCE] = (
                AdapterReference(adapter="ref", chunk_tokens=chunk_tokens)
                if has_copy
                else AdapterOff(chunk_tokens=chunk_tokens)
            )
        return {**found, **{name: _built(each, policy) for name, each in self.request.references.items()}}

    def _require_references(self) -> None:
        objective = self.request.objective
        known = self.references.keys() | ({REFERENCE} if self.precomputed else set())
        if missing := sorted(reference_names(objective.needs, objective.measures) - known):
            raise ConfigError(
                f"objective: {type(objective).__name__} reads the reference {missing[0]!r}: give "
                f"references={{{missing[0]!r}: falign.references.FrozenModel(model)}}."
            )

    @property
    def _reference_model(self) -> nn.Module | None:
        model = cast("Any", self).ref_model
        return None if model is None else self.accelerator.unwrap_model(model)

    def _layout(self) -> ScoringLayout:
        policy, request = cast("nn.Module", self.model), self.request
        if request.layout == "trl":
            return OwnRows(self.form, policy, cast("Any", self).ref_model, self._acting, self.precomputed)
        scorer = Scorer(cast("Layout", request.layout), chunk_tokens=request.chunk_tokens)
        trees = Trees(self.form, policy, scorer, self.references, self.precomputed)
        rows = list(itertools.islice(cast("Any", self.train_dataset), 2))
        trees.try_on(self._prepare_inputs(self.data_collator(rows)), self.current)
        return trees

    @contextmanager
    def _acting(self) -> Iterator[nn.Module]:
        """Give TRL's reference as a model: its own, or the policy with adapters switched."""
        if (model := cast("Any", self).ref_model) is not None:
            yield model
            return
        policy = cast("PeftModel", self.model)
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            yield policy

    @property
    def current(self) -> BaseObjective:
        """The objective with the coefficients of the step under way."""
        return self.objective.at(self.state.global_step)

    @override
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self.moving.resume_from = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @override
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        # The means are computed later, by the first loss of the step: references move between this call and that.
        self._window, self._step_means = batches, {}
        weights = torch.stack([self._plan(inputs) for inputs in batches]).sum(dim=0)
        return batches, self.accelerator.reduce(weights.to(device), reduction="sum")

    def _plan(self, inputs: dict[str, Any]) -> Tensor:
        """Return the weights of a micro-batch's terms, which do not depend on log-probabilities."""
        objective, batch, step = self.current, self.layout.fields(inputs), self.state.global_step + 1
        names = [name for name in objective.needs if name != "preference"]
        names += [f"measures.{name}" for name in objective.measures]
        fields = dict.fromkeys(names, batch.logprobs)
        fields |= dict.fromkeys([f"step_means.{name}" for name in objective.step_means], batch.logprobs[:, 0])
        terms = self._output(objective, CompletionBatch.of({**fields, **batch.tensors()})).terms
        inputs[PLANNED_TERMS] = self.contract.plan(terms, step=step)
        return total_weights(terms)

    def _output(self, objective: BaseObjective, batch: CompletionBatch) -> ObjectiveOutput:
        with calling("objective", objective):
            return self.contract.read(objective(batch), step=self.state.global_step + 1)

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        trainer, objective, step = cast("Any", self), self.current, self.state.global_step + 1
        planned = inputs.get(PLANNED_TERMS)
        inputs = {name: value for name, value in inputs.items() if name != PLANNED_TERMS}
        columns = self._means_for(objective, inputs, whole_step=num_items_in_batch is not None)
        mode = "train" if trainer.model.training else "eval"
        logged: dict[str, list[float]] = trainer._metrics[mode]
        before = {name: len(values) for name, values in logged.items()}

        def run_trl() -> Any:
            return self.loss_of_trl(model, inputs, return_outputs)

        with self.accelerator.autocast():  # accelerate does so in the model's forward, which trees do not call
            scored = self.layout.score(model, inputs, objective, run_trl, columns)
        for name in TRL_REWARDS:
            del logged[name][before.get(name, 0) :]
        output = self._output(objective, scored.completions)
        if planned is not None:
            self.contract.check(planned, output, step=step)
        if num_items_in_batch is None:
            loss = output.mean()
        else:  # gradients are averaged over processes, and each term needs their sum
            loss = reduce_terms(output.terms, num_items_in_batch) * self.accelerator.num_processes
        if trainer.aux_loss_enabled and scored.aux_loss is not None:
            share = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + trainer.router_aux_loss_coef * scored.aux_loss / share
        self._log_metrics(logged, before, scored, output, inputs)
        if not return_outputs:
            return loss
        if scored.outputs is not None:
            return loss, scored.outputs[1]
        with torch.no_grad():
            return loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    def loss_of_trl(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Return what TRL's ``compute_loss`` returns, which also logs its metrics."""
        return super().compute_loss(model, inputs, return_outputs=return_outputs)

    def _means_for(self, objective: BaseObjective, inputs: dict[str, Any], *, whole_step: bool) -> dict[str, Tensor]:
        """Return the means over the step's completions that the objective reads; those of one batch in evaluation."""
        if not (means := objective.step_means):
            return {}
        if not whole_step:
            return self._step_means_of([inputs], means)
        if self._window is not None:
            self._step_means = {name: values[:1] for name, values in self._step_means_of(self._window, means).items()}
            self._window = None
        rows = len(inputs["completion_mask"])
        return {name: values.expand(rows) for name, values in self._step_means.items()}

    def _step_means_of(self, batches: Sequence[dict[str, Any]], means: Mapping[str, Any]) -> dict[str, Tensor]:
        prepared = [self._prepare_inputs({k: v for k, v in each.items() if k != PLANNED_TERMS}) for each in batches]
        wrapped: list[dict[str, Any]] = [
            {
                "completion_mask": each["completion_mask"],
                "batch": each,
                "rows": OWN_ROWS,
                MISMATCHED: {"batch": each, "rows": MISMATCHED_ROWS},
            }
            for each in prepared
        ]
        with evaluation_mode(cast("nn.Module", self.model)), self.accelerator.autocast():
            add_step_means(
                wrapped,
                means,
                score=lambda each, fields: self.layout.score_rows(each["batch"], fields, each["rows"]),
                counts=lambda _: True,
                add_up=lambda sums: cast("Tensor", self.accelerator.reduce(sums.to(self.args.device), "sum")),
            )
        return {name: values.to(self.args.device) for name, values in wrapped[0]["columns"].items()}

    def _log_metrics(
        self,
        logged: dict[str, list[float]],
        before: Mapping[str, int],
        scored: Scored,
        output: ObjectiveOutput,
        inputs: Mapping[str, Any],
    ) -> None:
        """Add one value per pair or completion to TRL's lists, whose means are then exact over micro-batches."""
        trainer = cast("Any", self)
        metrics = {**self.trl_metrics(scored.completions, output), **output.metrics}
        if scored.entropy is not None:
            metrics["entropy"] = scored.entropy
        plain = {name: values.detach().flatten().tolist() for name, values in metrics.items()}
        everywhere = gathered([plain])
        for name in plain:
            del logged[name][before.get(name, 0) :]
            logged[name].extend(value for each in everywhere for value in each.get(name, ()))
        if trainer.model.training:
            now = self.objective.coefficients(self.state.global_step)
            coefficients = {f"coefficients/{path}": value for path, value in now.items()}
            moved = {
                f"{name}/{metric}": value
                for name, reference in self.references.items()
                for metric, value in reference.metrics().items()
            }
            for name, value in {**coefficients, **moved}.items():
                logged[name] = [value]
        if scored.outputs is None and trainer.model.training:
            tokens = sum(gathered([int(inputs["attention_mask"].sum())]))
            trainer._total_train_tokens += tokens // trainer._tp_size
            logged["num_tokens"] = [trainer._total_train_tokens]
        for name in [name for name, values in logged.items() if not values]:
            del logged[name]

    def trl_metrics(self, batch: CompletionBatch, output: ObjectiveOutput) -> dict[str, Tensor]:
        """Return the metrics that users of TRL know, with the rewards of the objective, one value per pair or row."""
        raise NotImplementedError

    def rewards(self, batch: CompletionBatch) -> Tensor | None:
        """Return the implicit reward of each completion; None if the objective defines none."""
        objective = self.current
        if not objective.rewarding:
            return None
        with torch.no_grad():
            return objective.completion_rewards(batch)


def _built(reference: Reference | Callable[[Any], Reference] | Any, policy: nn.Module) -> Reference:
    built = reference(policy) if callable(reference) else reference
    if not isinstance(built, Reference):
        raise ConfigError(
            f"reference: a {type(built).__name__} is not a reference of falign: give a falign.references.Reference, "
            "such as FrozenModel(model), a rule such as MovingAverage, or a function that returns one."
        )
    return built
