"""The trainer: the loss from scoring, references and objective. Checkpoints and resuming are in ``resumable``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from typing_extensions import override

from falign.errors import ConfigError, MemberError, TrainingError
from falign.models.heads import REWARD_HEAD, RewardHead, ValueHead
from falign.models.sharding import is_sharded
from falign.objectives import (
    BaseObjective,
    CompletionBatch,
    Measure,
    Objective,
    ObjectiveOutput,
    complete,
    field_of,
    reduce_terms,
    reference_names,
    token_weighting,
    total_weights,
)
from falign.objectives.batch import OFFLINE, PER_TOKEN
from falign.raised import calling
from falign.references import REFERENCE, ObjectiveInputs, Reference, completion_batch, objective_inputs
from falign.scoring import PromptTree, Scorer, TokenBatch, data_margins, data_weights, evaluation_mode, row_weights
from falign.scoring.learned_masks import LearnedMasks
from falign.training.controls import Controls
from falign.training.finite_guard import describe_loss
from falign.training.objective_contract import PLANNED_TERMS, ObjectiveContract
from falign.training.processes import (
    STANDS_IN,
    Means,
    average_gradients,
    counts,
    gathered,
    num_processes,
    stand_in,
    stand_in_loss,
)
from falign.training.resumable import ResumableTrainer
from falign.training.step_means import MISMATCHED, add_step_means, with_mismatched
from falign.training.trl_metrics import clip_metrics, data_metrics, num_tokens

__all__ = ["AlignmentTrainer"]

MASK_HEAD, MASK_DECAY = "mask_head.safetensors", 0.01
"""File of a checkpoint with the parameters of learned masks, and their weight decay, SparsePO's."""

CONTROLS = "controllers.json"
"""File of a checkpoint with the states of controllers, for objectives that have some."""


class AlignmentTrainer(ResumableTrainer):
    """Minimize any objective against any reference.

    Args:
        model: The policy.
        reference: The reference; it gives ``reference_logprobs`` if the objective needs them.
        references: Several references by name, in place of ``reference``; metrics compare with the one named
            ``reference``.
        objective: The objective to minimize.
        args: Arguments of the underlying trainer.
        train_trees: Prompts with their completions; online, the range of micro-batch indices, since trees do not exist
            yet.
        eval_trees: Held-out prompts with their completions; may be empty.
        scorer: Scorer with a layout that the model can read.
        tokens_per_batch: Token limit of a micro-batch, which takes as many trees as fit; replaces
            ``args.per_device_train_batch_size``.
        measures: Measures to log as ``measures/NAME``, besides those that the objective reads.
        skip_bad: Skip and count steps whose loss or gradient is NaN or infinite, instead of stopping.
        advise: Called with messages for the user.
        **kwargs: Passed on to ``transformers.Trainer`` (``processing_class``, ``callbacks``, ``optimizers``).
    """

    supplied = OFFLINE

    def __init__(
        self,
        model: nn.Module,
        *,
        reference: Reference | None = None,
        references: Mapping[str, Reference] | None = None,
        objective: Objective,
        args: TrainingArguments,
        train_trees: Sequence[PromptTree] | range,
        eval_trees: Sequence[PromptTree],
        scorer: Scorer,
        tokens_per_batch: int | None = None,
        measures: Mapping[str, Measure] | None = None,
        skip_bad: bool = False,
        advise: Callable[[str], None] = print,
        **kwargs: Any,
    ) -> None:
        try:
            objective = complete(objective)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"objective: {error}") from error
        if unknown := sorted(name for name in objective.needs if field_of(name) not in self.supplied):
            raise ConfigError(
                f"This objective reads {unknown} of a batch, which {type(self).__name__} does not supply."
            )
        self.references = _by_name(reference, references)
        _require_members(self.references)
        if is_sharded(model):
            _require_shardable(self.references)
        self.objective, self.measures = objective, dict(measures or {})
        if twice := sorted(self.measures.keys() & objective.measures.keys()):
            raise ConfigError(f"measures.{twice[0]}: the objective has a measure of this name; give another name.")
        all_measures = {**self.measures, **objective.measures}
        if missing := sorted(reference_names(objective.needs, all_measures) - self.references.keys()):
            raise ConfigError(
                f"The objective or a measure reads the reference {missing[0]!r}, which is not among the references "
                f"({', '.join(self.references) or 'none'}): add it under this name."
            )
        self.scorer = scorer
        if not isinstance(train_trees, range):
            eval_trees = with_mismatched(objective, eval_trees, then=train_trees)
            train_trees = with_mismatched(objective, train_trees)

        # For all batches or for none, so that every process has the same fields.
        weighted = any(tree.weight != 1 for tree in (*train_trees, *eval_trees) if isinstance(tree, PromptTree))

        def collate(trees: list[PromptTree]) -> dict[str, Any]:
            rows = trees or [self._shortest]
            inputs, columns = dict(vars(scorer.lay_out(rows))), dict[str, Tensor]()
            if token_weighting(objective.needs) == "data":
                columns["token_weights"] = data_weights(rows)
            if weighted or "row_weights" in objective.needs:
                columns["row_weights"] = row_weights(rows)
            if "margin" in objective.needs:
                columns["margin"] = data_margins(rows)
            if columns:
                inputs["columns"] = columns
            if rows[0].mismatched_ids:
                inputs[MISMATCHED] = vars(scorer.lay_out([tree.mismatched for tree in rows]))
            return inputs if trees else stand_in(inputs)  # empty if another process has one batch more

        super().__init__(
            model,
            args=args,
            collate=collate,
            train_trees=train_trees,
            eval_trees=eval_trees,
            tokens_per_batch=tokens_per_batch,
            skip_bad=skip_bad,
            advise=advise,
            **kwargs,
        )
        self.contract = ObjectiveContract()
        self.value_head: ValueHead | None = None
        self.mask_head = _mask_head(self.objective, self.policy)
        self.reward_head = _reward_head(self.objective, self.policy, seed=self.args.seed)
        try:
            self.controls = Controls(self.objective)
        except MemberError as error:
            raise ConfigError(f"objective: {error}") from error.__cause__
        self._coefficients: Mapping[str, float] = {}

    @property
    def reference(self) -> Reference | None:
        """The reference that metrics compare with, if there is one."""
        return self.references.get(REFERENCE)

    @property
    def schedule_step(self) -> int:
        """The step whose coefficients the objective has now."""
        return self.state.global_step

    @property
    def current(self) -> BaseObjective:
        """The objective with the coefficients of the step under way."""
        return self.controls.objective.at(self.schedule_step)

    @property
    def _moving(self) -> dict[str, Reference]:
        return {name: reference for name, reference in self.references.items() if reference.moves}

    @property
    def evaluates(self) -> bool:
        """True if there is held-out data."""
        return bool(self.eval_dataset)

    @property
    def rows(self) -> dict[str, Sequence[Any]]:
        """Training rows and held-out rows, by section of the run file."""
        train, held_out = self.train_dataset, self.eval_dataset
        return {"data.train": train, "data.eval": held_out}  # pyright: ignore[reportReturnType]

    @property
    def _heads(self) -> dict[str, nn.Module]:
        """The heads that are trained with the policy, by their file in a checkpoint."""
        heads = {MASK_HEAD: self.mask_head, REWARD_HEAD: self.reward_head}
        return {file: head for file, head in heads.items() if head is not None}

    @property
    def _with_vocabulary(self) -> bool:
        """True if log-probabilities and entropies are computed: the objective reads them, or a measure is logged."""
        return self.current.reads_logprobs or bool(self.measures)

    @cached_property
    def _shortest(self) -> PromptTree:
        trees: Any = [*self.train_dataset, *(self.eval_dataset or ())]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        return min(trees, key=lambda tree: tree.num_tokens)

    @override
    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.mask_head is not None:
            masks = {"params": list(self.mask_head.parameters()), "lr": self.args.learning_rate}
            optimizer.add_param_group({**masks, "weight_decay": MASK_DECAY})
        if self.reward_head is not None:
            head = {"params": list(self.reward_head.parameters()), "lr": self.args.learning_rate}
            optimizer.add_param_group({**head, "weight_decay": self.args.weight_decay})
        return optimizer

    @override
    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_its_place(lambda: f"Step {self.state.global_step + 1}"):
            return super().train(*args, **kwargs)

    @contextmanager
    def _at_its_place(self, place: Callable[[], str]) -> Iterator[None]:
        """Add the place to the error of a user's own part, which only knows its own name."""
        try:
            yield
        except MemberError as error:
            raise TrainingError(f"{place()}: {error}") from error.__cause__

    @override
    def begin_step(self) -> None:
        super().begin_step()
        for head in self._heads.values():
            head.zero_grad()  # the loop clears only the policy's gradients
        if self.schedule_step == self.state.global_step:
            self.controls.advance(step=self.state.global_step + 1)
        self._coefficients = self.controls.objective.coefficients(self.schedule_step)
        self.move_references(step=self.state.global_step)

    def observe_evaluation(self, means: Mapping[str, float]) -> None:
        """Tell the references the held-out means, by names without prefix: some move when these stall."""
        for reference in self.references.values():
            reference.observe(means)

    def move_references(self, *, step: int) -> None:
        """Update the references that follow the policy, if they are due at this step."""
        for reference in self.references.values():
            reference.move(self.policy, step, self.optimizer)

    @override
    def write_state(self, folder: Path) -> None:
        if self.args.should_save:
            for name, reference in self._moving.items():
                (state := state_folder(folder, name)).mkdir(parents=True, exist_ok=True)
                reference.save(state, self.policy)
        if self.controls.states:
            controls = json.dumps(self.controls.state_dict())
            if self.args.should_save:
                (folder / CONTROLS).write_text(controls, encoding="utf-8")
        for file, head in self._heads.items() if self.args.should_save else ():
            save_file(head.state_dict(), folder / file)
        super().write_state(folder)

    @override
    def read_state(self, folder: Path) -> None:
        super().read_state(folder)
        self.read_beside(folder)
        if self.controls.states:
            controls = json.loads((folder / CONTROLS).read_text(encoding="utf-8"))
            self.controls.load_state_dict(controls, self.args.device)

    @override
    def read_beside(self, folder: Path) -> None:
        for file, head in self._heads.items():
            head.load_state_dict(load_file(folder / file))
        for name, reference in self._moving.items():
            reference.load(state_folder(folder, name), self.policy)

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        scored = self.score(model, inputs)
        if not counts(inputs):
            return stand_in_loss(scored.completions)
        output = self.evaluate_objective(scored, inputs)
        self.contract.check(inputs[PLANNED_TERMS], output, step=self.state.global_step + 1)
        denominators = num_items_in_batch
        assert isinstance(denominators, Tensor), "the step's weights come from step_weights"
        loss = reduce_terms(output.terms, denominators)
        if self.guard.check_loss(
            loss,
            step=self.state.global_step + 1,
            places=inputs["place"],
            describe=lambda: describe_loss(self.current, scored.completions, output, inputs["place"]),
        ):
            self.means.add(output.metrics)
            self.controls.add(output.metrics)
        else:
            loss = loss * torch.nan  # so that the reduced gradient is NaN in all processes, which then skip together
        return loss * num_processes()  # gradients are averaged over processes, and each term needs their sum

    def score(self, model: nn.Module, inputs: dict[str, Any], fields: Objective | None = None) -> ObjectiveInputs:
        """Return the scores of a batch under policy and references that the objective needs, or ``fields`` alone."""
        batch, columns = split_columns(inputs)
        if self.mask_head is not None:
            self.mask_head.train(self.policy.training)
        return objective_inputs(
            self.policy,
            batch,
            references=self.references,
            objective=self.current if fields is None else fields,
            measures=self.measures if fields is None else {},
            chunk_tokens=self.scorer.chunk_tokens,
            wrapped=model,
            columns=columns,
            value_head=self.value_head,
            mask_head=self.mask_head,
            reward_head=self.reward_head,
            with_vocabulary=self._with_vocabulary,
        )

    def evaluate_objective(self, scored: ObjectiveInputs, inputs: dict[str, Any]) -> ObjectiveOutput:
        """Return the objective's output for a scored batch, with further metrics added."""
        step = self.state.global_step + 1
        output = self.contract.read(self._losses(scored.completions), step=step)
        further = {
            **self.scored_metrics(scored, inputs),
            **clip_metrics(output.metrics, scored.completions.num_tokens),
        }
        if twice := sorted(output.metrics.keys() & further.keys()):
            raise TrainingError(
                f"Step {step}: the objective returned a metric named {twice[0]!r}, which the trainer logs itself: "
                "rename it."
            )
        return output._replace(metrics={**output.metrics, **further})

    def _losses(self, batch: CompletionBatch) -> Any:
        objective = self.current
        with calling("objective", objective):
            return objective(batch)

    def scored_metrics(self, scored: ObjectiveInputs, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return the metrics of a scored micro-batch that do not come from the objective."""
        mask = scored.completions.completion_mask
        if not self._with_vocabulary:
            return self.measured(scored, mask)
        return {"entropy": scored.entropy[mask].detach(), **data_metrics(scored), **self.measured(scored, mask)}

    def measured(self, scored: ObjectiveInputs, counted: Tensor) -> dict[str, Tensor]:
        """Return the values of the logged measures at the tokens where a mask is True."""
        measures = scored.completions.measures
        return {f"measures/{name}": measures[name][counted].detach() for name in self.measures}

    @override
    def accepts_gradient(self, norm: Any) -> bool:
        for head in (*([] if self.value_head is None else [self.value_head]), *self._heads.values()):
            values = [value.grad.norm() for value in head.parameters() if value.grad is not None]
            norm = torch.stack([torch.as_tensor(norm), *values]).norm()
        self.controls.check(step=self.state.global_step + 1)
        return self.guard.check_gradient(norm, step=self.state.global_step + 1, terms=self.contract.names)

    @override
    def step_weights(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        self._add_step_means(batch_samples)
        self.count_tokens(batch_samples)
        return super().step_weights(batch_samples, device)

    def count_tokens(self, batches: Sequence[dict[str, Any]]) -> None:
        """Add the tokens of the micro-batches of a step to those of the run."""
        self.tokens += sum(num_tokens(split_columns(inputs)[0]) for inputs in batches if counts(inputs))

    def _add_step_means(self, batches: Sequence[dict[str, Any]]) -> None:
        """Give all micro-batches the means over them that the objective reads."""
        if not (means := self.current.step_means):
            return
        with evaluation_mode(self.policy):
            add_step_means(
                batches,
                means,
                score=lambda inputs, fields: self.score(self.policy, self.prepare(inputs), fields).completions,
                counts=counts,
                add_up=lambda sums: self.accelerator.reduce(sums.to(self.args.device), reduction="sum"),  # pyright: ignore[reportArgumentType, reportReturnType]
            )

    @override
    def term_weights(self, inputs: dict[str, Any]) -> Tensor:
        # The loss is divided by the weights of the whole step, which are needed before its first forward pass. Weights
        # depend only on masks and given fields, so the objective gives them with zeros in place of log-probabilities.
        batch, columns = split_columns(inputs)
        zeros = torch.zeros(batch.completion_mask.shape, device=batch.completion_mask.device)
        step = self.state.global_step + 1
        planned = self._losses(completion_batch(batch, zeros, {**self._unknown(zeros), **columns}))
        terms = self.contract.read(planned, step=step).terms
        inputs[PLANNED_TERMS] = self.contract.plan(terms, step=step)
        weights = total_weights(terms)
        return weights if counts(inputs) else torch.zeros_like(weights)

    def _unknown(self, zeros: Tensor) -> dict[str, Tensor]:
        """Return zeros for the fields that the objective reads and only the forward pass computes."""
        needs = [name if field_of(name) == "references" else field_of(name) for name in self.current.needs]
        measures = [f"measures.{name}" for name in self.current.measures]
        masks = [] if self.mask_head is None else ["learned_masks.ratio", "learned_masks.divergence"]
        unknown = {*needs, *measures, *masks} - {"preference"}
        return {name: zeros if field_of(name) in PER_TOKEN else zeros[:, 0] for name in unknown}

    @override
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the exact means over all held-out completions, each counted once."""
        self.require_held_out("data")
        with self._at_its_place(lambda: f"Evaluation at step {self.state.global_step}"):
            found = self._held_out_means(eval_dataset)
        self.observe_evaluation(found)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def require_held_out(self, section: str) -> None:
        """Refuse an evaluation without held-out data, which only a callback can ask for.

        Args:
            section: The section of the run file that holds data out.

        Raises:
            TrainingError: There are none.
        """
        if not self.evaluates:
            raise TrainingError(
                f"Step {self.state.global_step}: a callback asks for an evaluation (should_evaluate), and the run has "
                f"no held-out data: set {section}.eval or {section}.eval_size, or change the callback."
            )

    def _held_out_means(self, eval_dataset: Any) -> dict[str, float]:
        means, totals = Means(), []
        # Iterating a loader draws from the CPU's generator; without the fork, dropout in later steps would change.
        with torch.no_grad(), evaluation_mode(self.policy), torch.random.fork_rng(devices=[]):
            loader = self.get_eval_dataloader(eval_dataset)
            if self.current.step_means:
                self._add_step_means(loader := list(loader))
            for inputs in loader:
                batch = self.prepare(inputs)
                scored = self.score(self.policy, batch)
                if not counts(inputs):
                    continue
                output = self.evaluate_objective(scored, batch)
                means.add(output.metrics)
                losses = [term.scale * (term.losses * term.weights).sum() for term in output.terms]
                totals.append(torch.stack([torch.stack(losses), total_weights(output.terms)]).cpu())
        # Each term is divided by its own weights, summed over all batches and processes: shape (2, K).
        loss_sums, weight_sums = torch.stack(gathered(totals)).sum(dim=0)
        return {"loss": (loss_sums / weight_sums).sum().item(), **means.take()}

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Only training logs have a loss; they take the metrics since the last one.
        moved = {
            f"{name}/{metric}": value
            for name, reference in self.references.items()
            for metric, value in reference.metrics().items()
        }
        if "loss" in logs:
            # Those of the last step, not means: a schedule is read off the log.
            coefficients = {f"coefficients/{path}": value for path, value in self._coefficients.items()}
            tokens = {"num_tokens": float(sum(gathered([self.tokens])))}
            logs = {**logs, **self.means.take(), **moved, **coefficients, **tokens}
            if self.guard.skip:
                loss = self.guard.mean_over_taken(logs.pop("loss"))
                logs = {**({} if loss is None else {"loss": loss}), **logs, "skipped_steps": self.guard.skipped}
        super().log(logs, start_time)


def _mask_head(objective: Objective, policy: nn.Module) -> LearnedMasks | None:
    """Return the module of learned masks, if the objective reads them, made from the run's seed."""
    weighting = token_weighting(objective.needs)
    if weighting not in ("learned", "learned_independent"):
        return None
    if num_processes() > 1:
        raise ConfigError(
            f"objective.weighting={weighting}: the masks are trained in one process; run without --launch."
        )
    config: Any = policy.config
    text = config.get_text_config()
    independent = weighting == "learned_independent"
    head = LearnedMasks(text.num_hidden_layers, text.hidden_size, independent=independent)
    return head.to(next(policy.parameters()).device)


def _reward_head(objective: Objective, policy: nn.Module, *, seed: int) -> RewardHead | None:
    """Return the head of a reward model, if the objective reads one, made from the run's seed."""
    if "learned_rewards" not in objective.needs:
        return None
    if is_sharded(policy):
        raise ConfigError(
            "objective: the head of a reward model is not sharded: train with DDP (--launch ddp), or in one process."
        )
    assert isinstance(policy, PreTrainedModel | PeftModel)
    head = RewardHead.of(policy, seed=seed)
    if not complete(objective).reads_logprobs:
        _freeze_unused_head(policy)
    if num_processes() > 1:
        average_gradients(head)
    return head


def _freeze_unused_head(policy: PreTrainedModel | PeftModel) -> None:
    """Freeze the language-model head where it computes nothing: DDP waits for the gradient of each trained weight."""
    output, inputs = policy.get_output_embeddings(), policy.get_input_embeddings()
    assert output is not None
    for parameter in output.parameters():
        if all(parameter is not tied for tied in inputs.parameters()):
            parameter.requires_grad_(False)


def _by_name(reference: Reference | None, references: Mapping[str, Reference] | None) -> dict[str, Reference]:
    if reference is None:
        return dict(references or {})
    if references is not None:
        raise ConfigError("reference and references exclude each other: give references={'reference': ..., ...}.")
    return {REFERENCE: reference}


def _require_members(references: Mapping[str, Reference]) -> None:
    """Refuse a combination of references that the run would neither move nor save nor check."""
    known = {id(reference) for reference in references.values()}
    for name, reference in references.items():
        for member, each in reference.members.items():
            if id(each) not in known:
                raise ConfigError(
                    f"{name} ({type(reference).__name__}) has the member {member!r}, which is not among the references "
                    "itself, so it would not be moved, saved or checked: add the same object under a name."
                )


def _require_shardable(references: Mapping[str, Reference]) -> None:
    for name, reference in references.items():
        if not reference.can_shard:
            raise ConfigError(
                f"{name} ({type(reference).__name__}) under FSDP2: {reference.cannot_shard}. Train with DDP (--launch "
                "ddp), or use another reference."
            )


def state_folder(checkpoint: Path, name: str) -> Path:
    """Return the folder of a moving reference's state: the checkpoint itself for the one named ``reference``."""
    return checkpoint if name == REFERENCE else checkpoint / "references" / name


BESIDE = frozenset({"columns", MISMATCHED, STANDS_IN, PLANNED_TERMS})
"""Fields of a micro-batch besides its rows of tokens."""


def split_columns(inputs: dict[str, Any]) -> tuple[TokenBatch, dict[str, Tensor]]:
    """Split a micro-batch into its rows of tokens and the further fields of its completions."""
    rows = {name: value for name, value in inputs.items() if name not in BESIDE}
    known = {field.name for field in fields(CompletionBatch)}
    columns = inputs.get("columns", {})
    return TokenBatch(**rows), {name: value for name, value in columns.items() if field_of(name) in known}
