"""Trainer of online runs: rollouts, their rewards, and several updates on each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from typing_extensions import override

from falign.data import PromptRow
from falign.errors import ConfigError, EngineError, NonFiniteRewardError, RewardError, TrainingError
from falign.models.heads import ValueHead
from falign.objectives import Objective, complete
from falign.objectives.batch import ONLINE
from falign.references import REFERENCE, ObjectiveInputs, Reference
from falign.rewards import RewardSum
from falign.rollouts.buffer import RolloutBuffer
from falign.runfile.prompts_config import RolloutConfig
from falign.scoring import Scorer
from falign.seeds import mixed
from falign.training.online.groups import DividedSampler, Draw
from falign.training.online.metrics import CompletionsTable, evaluation_metrics, rollout_metrics
from falign.training.online.rollout_scorer import RolloutScorer, gap_metrics, require_gap
from falign.training.online.rollout_source import PromptOrder, RolloutSource
from falign.training.processes import average_gradients, is_writer, num_processes, rank, stand_in
from falign.training.trainer import AlignmentTrainer
from falign.training.trl_metrics import kl_to_reference, sampling_metrics

__all__ = ["OnlineTrainer"]

MOST_CLIPPED = 0.95  # of the completions of a rollout
ROLLOUT_STATE = "rollout_state.json"
ROLLOUT = "rollout.safetensors"
VALUE_HEAD = "value_head.safetensors"


class Failures(NamedTuple):
    """Failed reward calls of a run.

    Attributes:
        timeouts: Calls that were stopped at their deadline.
        errors: Calls that raised and were counted.
        message: The first error's message; ``""`` without errors.
    """

    timeouts: int = 0
    errors: int = 0
    message: str = ""

    @override
    def __str__(self) -> str:
        return (
            f"in this run {self.errors} calls of rewards raised and {self.timeouts} were stopped at their deadline; "
            f"each is worth what the reward's field failed says. The first: {self.message}"
        )


class OnlineTrainer(AlignmentTrainer):
    """Minimize any objective on completions sampled from the policy.

    Each optimizer step takes ``rollout.prompts / rollout.minibatches`` prompts with all their completions. After
    ``rollout.num_updates`` steps the current policy samples a new rollout.

    Args:
        model: The policy.
        references: References by name.
        objective: The objective to minimize.
        args: Arguments of the underlying trainer; gradient accumulation follows from ``rollout``.
        sampler: Sampler of training completions.
        evaluation_sampler: Sampler of held-out completions.
        prompts: Training prompts.
        eval_prompts: Held-out prompts; may be empty.
        rollout: Sizes of rollouts.
        rehearsal: Stored completions of the reference with their log-probabilities, one for each prompt.
        rehearsal_size: Number of them in each optimizer step.
        scorer: Scorer with a layout that the model can read.
        table: File that completions are written to.
        value_head: Value head, for objectives that read values.
        warm_up: Number of rollouts at the beginning whose updates train the value head alone.
        max_gap: Bound of the mean difference between log-probabilities of sampler and policy, at temperature 1; None
            for no bound.
        skip_bad: True to skip and count steps and rollouts with values that are NaN or infinite.
        advise: Called with advice for the user.
        **kwargs: Passed on to ``transformers.Trainer``.
    """

    supplied = ONLINE

    def __init__(
        self,
        model: nn.Module,
        *,
        references: Mapping[str, Reference],
        objective: Objective,
        args: TrainingArguments,
        sampler: DividedSampler,
        evaluation_sampler: DividedSampler,
        prompts: Sequence[PromptRow],
        eval_prompts: Sequence[PromptRow],
        rollout: RolloutConfig,
        scorer: Scorer,
        table: CompletionsTable,
        rehearsal: RolloutBuffer | None = None,
        rehearsal_size: int = 0,
        value_head: ValueHead | None = None,
        warm_up: int = 0,
        max_gap: float | None = None,
        skip_bad: bool = False,
        advise: Callable[[str], None] = print,
        **kwargs: Any,
    ) -> None:
        self.rollout, self.evaluation_sampler, self.eval_prompts = rollout, evaluation_sampler, eval_prompts
        self.table, self.advise = table, advise
        compares = "pairs" in complete(objective).preference_kinds
        self.source = RolloutSource(sampler, prompts, rollout, compares=compares, seed=args.seed, keep=table.write)
        self.rehearsal, self.rehearsal_size = rehearsal or RolloutBuffer(), rehearsal_size
        self.rehearsal_order = PromptOrder(len(self.rehearsal), seed=mixed(args.seed, "rehearsal"))
        self.buffer = RolloutBuffer()
        self.failures = Failures()
        self.staleness, self.max_gap = 0, max_gap
        self._advised = rollout.ignore_stop or rollout.horizon is not None
        super().__init__(
            model,
            references=references,
            objective=objective,
            args=args,
            train_trees=range(args.max_steps * args.gradient_accumulation_steps),
            eval_trees=[],
            scorer=scorer,
            skip_bad=skip_bad,
            advise=advise,
            **kwargs,
        )
        for name, reference in self.references.items():
            place = name if name == REFERENCE else f"references.{name}"
            reference.check_rollouts(place=place, updates=rollout.num_updates)
        self.value_head, self.warm_up = value_head, warm_up
        self.rollout_scorer = RolloutScorer(
            self.policy,
            self.references,
            lambda: self.current,
            rollout,
            batch_size=args.per_device_train_batch_size,
            scorer=scorer,
            value_head=value_head,
        )
        if value_head is not None and num_processes() > 1:
            average_gradients(value_head)

    @property
    @override
    def evaluates(self) -> bool:
        return bool(self.eval_prompts)

    @property
    @override
    def rows(self) -> dict[str, Sequence[Any]]:
        rehearsal = [self.rehearsal.select([i]) for i in range(len(self.rehearsal))]
        return {"prompts.train": self.source.prompts, "prompts.eval": self.eval_prompts, "rehearsal": rehearsal}

    @property
    @override
    def schedule_step(self) -> int:
        # All updates on a rollout have the coefficients with which it was scored and prepared.
        return self.state.global_step - self.state.global_step % self.rollout.num_updates

    @property
    def rewards(self) -> RewardSum | None:
        """The reward of completions; None in a run without."""
        return self.source.sampler.sampler.rewards

    @override
    def require_same_schedule(self, began: TrainerState) -> None:
        super().require_same_schedule(began)
        # At its last rollout a run samples nothing ahead. A longer run would have sampled ahead there, from weights
        # that are gone.
        last = began.max_steps - self.rollout.num_updates
        if self.rollout.ahead and self.num_steps > began.max_steps and began.global_step > last:
            raise ConfigError(
                f"training.max_steps: with rollout.ahead, the rollout after step {began.max_steps} is sampled before "
                f"that step, which the run of {began.max_steps} steps did not do. Set max_steps as it was."
            )

    @override
    def get_train_dataloader(self) -> Any:
        # The loop only counts steps with this; get_batch_samples makes the batches.
        return self.train_dataset

    @override
    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.value_head is not None:
            values = [each for each in self.value_head.parameters() if each.requires_grad]
            optimizer.add_param_group({"params": values, "lr": self.args.learning_rate, "weight_decay": 0.0})
        return optimizer

    @override
    def accepts_gradient(self, norm: Any) -> bool:
        accepted = super().accepts_gradient(norm)
        if self.state.global_step < self.warm_up * self.rollout.num_updates:
            # Without gradients the optimizer changes neither weights nor moments.
            for parameter in self.policy.parameters():
                parameter.grad = None
        return accepted

    @override
    def move_references(self, *, step: int) -> None:
        # The updates on a rollout, which is scored once, have one reference.
        if step % self.rollout.num_updates == 0:
            super().move_references(step=step)

    @override
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of the next update, sampling when the last rollout is used up."""
        self.begin_step()
        if self.value_head is not None:
            self.value_head.zero_grad()  # the loop clears only the policy's gradients
            if self.state.global_step:
                self.value_head.follow(self.state.global_step)
        update = self.state.global_step % self.rollout.num_updates
        if update == 0:
            self.buffer = self._finite_rollout()
        chosen = self.buffer.part(update % self.rollout.minibatches, self.rollout.minibatches)
        rehearsed = self.rehearsal.select(self.rehearsal_order.take(self.rehearsal_size))
        count, batches = num_batches * num_processes(), []
        for number in range(rank(), count, num_processes()):  # processes compute neighboring parts at once
            rows = RolloutBuffer.concat([chosen.part(number, count), rehearsed.part(number, count)])
            batches.append(self._inputs(rows) if len(rows) else stand_in(self._inputs(chosen.select([0]))))
        return batches, self.step_weights(batches, device)

    def _inputs(self, rows: RolloutBuffer) -> dict[str, Any]:
        answers = self.current
        rows.require(samples=answers.needs_of_samples, stored=answers.needs_of_stored)
        return rows.inputs(self.scorer)

    def _finite_rollout(self) -> RolloutBuffer:
        """Return a rollout; if a reward is NaN or infinite, raise with the step, or skip to the next prompts."""
        while True:
            try:
                return self._roll_out()
            except NonFiniteRewardError as error:
                message = f"Step {self.state.global_step + 1}: {error}"
                if not self.guard.skip or num_processes() > 1:  # with several, the others would wait for this one
                    raise NonFiniteRewardError(
                        f"{message} `resume` with training.skip_bad=true skips such rollouts."
                    ) from error
                self.guard.count(message)

    def _roll_out(self) -> RolloutBuffer:
        """Sample and score one rollout, with its rewards and the fields computed from all of it."""
        step = self.state.global_step
        try:
            drawn = self.source.take(self.policy, step, goes_on=step + self.rollout.num_updates < self.state.max_steps)
        except EngineError:
            self._keep()
            raise
        except NonFiniteRewardError:
            raise
        except RewardError:
            if step and num_processes() == 1:  # else nothing was trained, or the others would wait
                self._keep()
            raise
        draw, self.staleness = drawn.draw, step - drawn.step
        rollout, scores = self.rollout_scorer(self.source.groups(draw))
        metrics = rollout_metrics(draw, pass_reward=self.rollout.pass_reward, outcome=self.source.sampler.outcome)
        if is_writer():  # every process has the whole rollout
            horizon = {} if self.rollout.horizon is None else {"horizon": self.rollout.tokens(drawn.step)}
            limits = {f"rollout/{name}": torch.tensor([float(value)]) for name, value in horizon.items()}
            self.means.add({**metrics, **scores, **limits})
            lengths = (
                len(group.row.prompt_ids) + len(each.completion_ids) for group in draw.groups for each in group.rollouts
            )
            self.tokens += sum(lengths)
        self._count_failures(draw)
        self._advise_on_length(metrics["completions/clipped"].mean().item())
        self.table.write(self.state.global_step, draw)
        return rollout

    def _count_failures(self, draw: Draw) -> None:
        """Report failed reward calls, and count them until the end of the run."""
        if draw.message:
            self.advise(f"reward: {draw.message}")
        before = self.failures
        self.failures = Failures(
            before.timeouts + draw.timeouts, before.errors + draw.errors, before.message or draw.message
        )

    @override
    def remarks(self) -> list[str]:
        return [f"warning: {self.failures}"] if self.failures.message else []

    def _keep(self) -> None:
        """Write a checkpoint between two steps, to resume once the engine or the reward is repaired."""
        self.write_checkpoint()
        self.advise(f"checkpoint-{self.state.global_step} is written: resume from there.")

    def close(self) -> None:
        """Release the engine's resources."""
        self.source.sampler.engine.close()

    def _advise_on_length(self, clipped: float) -> None:
        if clipped >= MOST_CLIPPED and not self._advised:
            self._advised = True
            self.advise(
                f"{clipped:.0%} of a rollout hit rollout.max_new_tokens={self.rollout.max_new_tokens} "
                "and have no end: raise it, ask for short answers in the prompt, or set rollout.ignore_stop if texts "
                "have no end here."
            )

    @override
    def count_tokens(self, batches: Sequence[dict[str, Any]]) -> None:
        """Leave them out: a rollout is counted when it is sampled."""

    @override
    def scored_metrics(self, scored: ObjectiveInputs, inputs: dict[str, Any]) -> dict[str, Tensor]:
        completions, sampled = scored.completions, inputs["columns"].get("sampler_logprobs")
        own = completions.completion_mask
        if completions.from_reference is not None:
            own = own & ~completions.from_reference[:, None]
        metrics = {"entropy": scored.entropy[own].detach(), **self.measured(scored, own)}
        if completions.reference_logprobs is not None and self.rollout.temperature == 1:
            metrics["kl"] = kl_to_reference(completions, own)
        if own.any() and sampled is not None and self.state.global_step % self.rollout.num_updates == 0:
            log_ratio = (completions.logprobs.detach() - sampled)[own]
            if self.max_gap is not None and self.rollout.temperature == 1 and self.staleness == 0:
                require_gap(log_ratio, self.max_gap, step=self.state.global_step + 1)
            metrics |= {**gap_metrics(log_ratio), **sampling_metrics(log_ratio)}
            if self.rollout.ahead:
                metrics["sampler/staleness"] = torch.tensor([float(self.staleness)])
        return metrics

    @override
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample completions of the held-out prompts; log their rewards and the divergence from the reference."""
        self.require_held_out("prompts")
        version = -1 - self.state.global_step
        self.source.ahead.wait()
        engine = self.evaluation_sampler.engine
        try:
            engine.publish(self.policy, version)
            draw = self.evaluation_sampler.sample(self.eval_prompts, version=version, number=0)
            engine.retire(version)
            self.evaluation_sampler.require_judged(draw, f"Evaluation at step {self.state.global_step}")
        except (EngineError, RewardError):
            if self.optimizer is not None and self.state.global_step and num_processes() == 1:
                self._keep()  # else nothing was trained, or the others would wait
            raise
        self._count_failures(draw)
        means = evaluation_metrics(
            draw,
            policy=self.policy,
            references={name: each for name, each in self.references.items() if each.normalized},
            pass_reward=self.rollout.pass_reward,
            outcome=self.evaluation_sampler.outcome,
            temperature=self.rollout.evaluation.temperature,
            batch_size=self.args.per_device_eval_batch_size,
            scorer=self.scorer,
        )
        self.table.write(self.state.global_step, draw, held_out=True)
        self.observe_evaluation(means)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The loop derives epochs from its own steps since the last resume; the source knows the prompts used.
        self.state.epoch = self.source.position / len(self.source.prompts)
        super().log(logs, start_time)

    @override
    def write_state(self, folder: Path) -> None:
        super().write_state(folder)
        state = {
            "source": self.source.save(folder, writes=is_writer()),
            "rehearsal_order": self.rehearsal_order.position,
            "partition": self.rollout_scorer.partition.state_dict(),
            "failures": self.failures,
        }
        if not is_writer():
            return
        (folder / ROLLOUT_STATE).write_text(json.dumps(state), encoding="utf-8")
        if self.state.global_step % self.rollout.num_updates:  # otherwise the last rollout is used up
            self.buffer.save(folder / ROLLOUT)
        if self.value_head is not None:
            save_file(self.value_head.state_dict(), folder / VALUE_HEAD)

    @override
    def read_state(self, folder: Path) -> None:
        super().read_state(folder)
        state = json.loads((folder / ROLLOUT_STATE).read_text(encoding="utf-8"))
        if "buffer" in state and (state["buffer"] or state["source"]["ahead"]):
            raise TrainingError(
                f"{folder} holds an unfinished rollout of an earlier release of falign, which this release does not "
                "read: finish the run with that release, or remove this checkpoint to resume from the one before it."
            )
        self.source.load(state["source"], folder)
        self.rehearsal_order.position = state["rehearsal_order"]
        self.rollout_scorer.partition.load_state_dict(state["partition"])
        unfinished = (folder / ROLLOUT).exists()
        self.buffer = RolloutBuffer.load(folder / ROLLOUT) if unfinished else RolloutBuffer()
        self.failures = Failures(*state["failures"])
        if self.value_head is not None:
            self.value_head.load_state_dict(load_file(folder / VALUE_HEAD))
