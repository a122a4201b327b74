"""The layer between ``transformers.Trainer`` and falign's trainer: checkpoints, resuming, sharding, several processes.

falign overrides or reads private names of ``transformers.Trainer`` only here, and lists them in :data:`PRIVATE_NAMES`.
They may change with any release, so ``pyproject.toml`` sets an upper bound on the release of transformers, and a test
compares the list with this file and with the installed release.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType
from typing_extensions import override

from falign.errors import ConfigError, TrainingError, one_line
from falign.models.sharding import is_sharded
from falign.models.staging import reading, staged_folder
from falign.runfile.optimization import same_learning_rates
from falign.runs.checkpoints import rotate, seal, sync_logs, why_damaged
from falign.runs.folder import is_held_out
from falign.scoring import TokenBudgetBatches
from falign.training.batch_sharding import Batches, RowBatches, Share
from falign.training.course import Callbacks, Course
from falign.training.finite_guard import FiniteGuard
from falign.training.master_weights import MasterWeights
from falign.training.processes import Means, gathered, is_writer, num_processes, rank
from falign.training.sharded_checkpoint import read_optimizer, read_weights, whole_optimizer, whole_weights

__all__ = ["PRIVATE_NAMES", "ResumableTrainer", "reading_checkpoint"]

PRIVATE_NAMES = (
    "_finalize_training",
    "_get_grad_norm",
    "_get_num_items_in_batch",
    "_get_output_dir",
    "_globalstep_last_logged",
    "_init_training_state",
    "_initial_global_step",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_move_model_to_device",
    "_prepare_inputs",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
    "_total_loss_scalar",
    "_tr_loss",
    "is_distributed_loading_by_transformers",
    "loss_is_scaled_for_ga",
    "set_initial_training_values",
)
"""Private and undocumented names of ``transformers.Trainer`` that are overridden or read here."""

UNLOGGED = "unlogged.json"
"""File of a checkpoint with the sums since the last log."""

COURSE = "course.json"
"""File of a checkpoint with the states of callbacks, for runs that have some."""


@contextmanager
def _without_embeddings(model: nn.Module) -> Iterator[None]:
    """Save adapters without the base's embeddings, which PEFT adds where the vocabulary has grown."""
    if not isinstance(model, PeftModel):
        yield
        return
    without: Any = functools.partial(model.save_pretrained, save_embedding_layers=False)
    model.save_pretrained = without
    try:
        yield
    finally:
        del model.save_pretrained


class ResumableTrainer(Trainer, ABC):
    """A trainer whose runs can be resumed exactly, with the denominators of a step's loss (:meth:`step_weights`).

    Args:
        model: The policy.
        args: Arguments of the underlying trainer.
        collate: Makes a micro-batch from trees; the list is empty if another process has one batch more.
        train_trees: Prompts with their completions; online, the range of micro-batch indices, since trees do not exist
            yet.
        eval_trees: Held-out ones; may be empty.
        tokens_per_batch: Token limit of a micro-batch, which takes as many trees as fit; replaces
            ``args.per_device_train_batch_size``.
        skip_bad: Skip and count steps whose loss or gradient is NaN or infinite, instead of stopping.
        advise: Called with messages for the user.
        master_weights: Let the optimizer step on float32 copies of weights of a lower precision.
        course: Callbacks whose states are in checkpoints.
        callbacks: Further callbacks.
        **kwargs: Passed on to ``transformers.Trainer``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        args: TrainingArguments,
        collate: Callable[[list[Any]], dict[str, Any]],
        train_trees: Sequence[Any],
        eval_trees: Sequence[Any],
        tokens_per_batch: int | None,
        skip_bad: bool,
        advise: Callable[[str], None],
        master_weights: bool = False,
        course: Course | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        self.course, self.master_weights = course or Course(), master_weights
        if is_sharded(model):
            # FSDP2 would otherwise skip the reduction of gradients until the last micro-batch and keep them unsharded.
            accelerator_config: Any = args.accelerator_config
            accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_trees,  # pyright: ignore[reportArgumentType] - a list is a map-style dataset
            eval_dataset=eval_trees,  # pyright: ignore[reportArgumentType]
            callbacks=[*(callbacks or ()), *self.course.callbacks],
            **kwargs,
        )
        self.callback_handler = Callbacks.of(self.callback_handler)
        self.policy = model
        self.run_dir = Path(str(args.output_dir))
        self.tokens_per_batch = tokens_per_batch
        self.record: dict[str, Any] = {}  # description and hashes of the model, for the manifest
        self.run_id = ""  # the run's identifier, written into its checkpoints
        self.means = Means()
        self.tokens = 0  # of this process, since the start of the run
        self.guard = FiniteGuard(skip=skip_bad, tell=advise)
        self.loss_is_scaled_for_ga = True  # falign divides each term by its weights over the whole step
        self._loss_before = torch.zeros(())
        self._staging: Path | None = None
        self._initial_global_step = 0
        # With True, transformers leaves placement and the reduction of gradients to the model.
        self.is_distributed_loading_by_transformers = is_sharded(model)

    @abstractmethod
    def term_weights(self, inputs: dict[str, Any]) -> Tensor:
        """Return the sum of weights of each term of the loss over one micro-batch, shape (K,)."""

    @abstractmethod
    def accepts_gradient(self, norm: Any) -> bool:
        """Return whether to take a step, given the norm of its gradient."""

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Bring a micro-batch to the model's device."""
        return self._prepare_inputs(inputs)

    def write_checkpoint(self) -> None:
        """Write a checkpoint between two steps."""
        self._save_checkpoint(self.policy, trial=None)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def state_at(self, checkpoint: Path) -> TrainerState:
        """Return the state of a checkpoint.

        Raises:
            TrainingError: The checkpoint cannot be read.
        """
        with reading_checkpoint(checkpoint):
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME):  # transformers ignores missing ones, and would start anew
                (checkpoint / name).stat()
            return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def require_same_schedule(self, began: TrainerState) -> None:
        """Refuse to resume with another number of steps if that would change a step already taken.

        Args:
            began: The state of the checkpoint to resume from.

        Raises:
            ConfigError: Past learning rates would differ, or more steps than the new number are already taken.
        """
        steps, taken = self.num_steps, began.global_step
        if steps == began.max_steps:
            return
        if steps < taken:
            raise ConfigError(
                f"The run has taken {taken} steps and would now end after {steps}: raise training.max_steps."
            )
        if not same_learning_rates(self.args, began.max_steps, steps, until=taken):
            schedule = SchedulerType(self.args.lr_scheduler_type).value
            raise ConfigError(
                f"training.max_steps or num_train_epochs: the run began with {began.max_steps} steps. With {steps}, "
                f"training.lr_scheduler_type={schedule} would have given the {taken} steps already taken other "
                "learning rates. Set it as it was; or continue from the trained model in a new run, with "
                "adapter.init=RUN (without adapter, model.path=RUN/model)."
            )

    def has_ended(self, checkpoint: Path) -> bool:
        """Return whether a run had taken all its steps, or was ended by a callback, when a checkpoint was written."""
        state = self.state_at(checkpoint)
        with reading_checkpoint(checkpoint):
            stopped = json.loads((checkpoint / UNLOGGED).read_text(encoding="utf-8"))[rank()].get("stopped", False)
        # At its last step a run is always stopped; it may have become longer since.
        return state.global_step >= self.num_steps or (stopped and state.global_step < state.max_steps)

    def load_best(self) -> None:
        """Load the checkpoint of the best step, if that is not the step of the present weights.

        Raises:
            TrainingError: The checkpoint is missing or damaged.
        """
        assert self.course.best is not None
        step = self.course.best.step
        if step is None or step == self.state.global_step:
            return
        checkpoint = self.run_dir / f"checkpoint-{step}"
        if (reason := why_damaged(checkpoint, run=self.run_id)) is not None:
            raise TrainingError(
                f"{checkpoint}, the best model so far, is missing or damaged ({reason}): restore it, or remove the "
                "checkpoints after it and resume."
            )
        self._load_from_checkpoint(str(checkpoint))
        with reading_checkpoint(checkpoint):
            self.read_beside(checkpoint)

    def read_beside(self, folder: Path) -> None:
        """Restore what is trained or moves beside the weights, from a checkpoint: heads, references; none here."""

    def load_finished(self, checkpoint: Path) -> None:
        """Load the last checkpoint of a run that has taken all its steps, and end training as the loop would."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = self.state_at(checkpoint)
        # The training loop sets these fields before its first step, and _finalize_training reads them.
        self._initial_global_step = self.state.global_step
        self._tr_loss = torch.tensor(0.0, device=self.args.device)
        with reading_checkpoint(checkpoint):
            self.read_state(checkpoint)
            self._read_unlogged(checkpoint)
        self._finalize_training(None, num_train_samples=0, start_time=time.time())

    @override
    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        # super() resets the history, which already has the evaluation before the first step.
        history = self.state.log_history
        progress = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.compute_steps(self.args, max_steps)  # the checkpoint may come from a run of another length
        self.state.log_history = self.state.log_history or history
        return progress

    @override
    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):  # a sharded model is already on its devices
            super()._move_model_to_device(model, device)

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading_checkpoint(resume_from_checkpoint):
            if is_sharded(self.policy):
                read_weights(self.policy, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading_checkpoint(checkpoint):
            if checkpoint is not None and is_sharded(self.policy):
                read_optimizer(self.policy, self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
                scheduler: Any = self.lr_scheduler
                scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self.read_state(Path(checkpoint))

    @override
    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.master_weights:
            MasterWeights(optimizer)  # held by its hooks
        return optimizer

    def write_state(self, folder: Path) -> None:
        """Add state that transformers does not save to a checkpoint; subclasses add their own."""
        state = {
            "loss": self._tr_loss.item(),
            "logged": self._total_loss_scalar,
            "since": self._globalstep_last_logged,
            "means": self.means.state_dict(),
            "tokens": self.tokens,
            "guard": self.guard.state_dict(),
            "stopped": self.control.should_training_stop,
        }
        states, course = gathered([state]), self.course.state_dict()
        if is_writer():
            (folder / UNLOGGED).write_text(json.dumps(states), encoding="utf-8")
            if course:
                (folder / COURSE).write_text(json.dumps(course), encoding="utf-8")

    def read_state(self, folder: Path) -> None:
        """Restore the states of callbacks; subclasses restore what they wrote."""
        if self.course.state_dict():
            self.course.load_state_dict(json.loads((folder / COURSE).read_text(encoding="utf-8")))

    @override
    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)
            if checkpoint is not None:
                self._read_unlogged(Path(checkpoint))

    def _read_unlogged(self, checkpoint: Path) -> None:
        """Restore the sums since the last log before a checkpoint, which the next log includes."""
        state = json.loads((checkpoint / UNLOGGED).read_text(encoding="utf-8"))[rank()]
        self._loss_before = self._tr_loss.fill_(state["loss"]).clone()
        self._total_loss_scalar = state["logged"]
        self._globalstep_last_logged = state["since"]
        self.means.load_state_dict(state["means"], self.args.device)
        # Transformers reads this after it has fetched the first step's batches, whose tokens are counted already.
        self.tokens += state.get("tokens", 0)  # checkpoints of earlier releases have none
        self.guard.load_state_dict(state["guard"])

    @override
    def get_train_dataloader(self) -> DataLoader:
        trees: Any = self.train_dataset
        if self.tokens_per_batch is None:
            shuffle = self.args.train_sampling_strategy != "sequential"
            batches = RowBatches(
                len(trees), size=self.args.per_device_train_batch_size, seed=self.args.seed, shuffle=shuffle
            )
        else:
            batches = TokenBudgetBatches(
                [tree.num_tokens for tree in trees], max_tokens=self.tokens_per_batch, seed=self.args.seed
            )
        return self._loader(trees, batches)

    @override
    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        trees: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = RowBatches(len(trees), size=self.args.per_device_eval_batch_size, seed=0, shuffle=False)
        return self._loader(trees, batches)

    def _loader(self, trees: Any, batches: Batches) -> DataLoader:
        # Accelerate would repeat rows to give all processes the same number.
        share = Share(batches, rank=rank(), processes=num_processes())
        return DataLoader(
            trees,
            batch_sampler=share,  # pyright: ignore[reportArgumentType]
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    @override
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        self.begin_step()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def close(self) -> None:
        """Release resources outside this process; there are none here."""

    def remarks(self) -> list[str]:
        """Return messages for the user at the end of the run."""
        return []

    def begin_step(self) -> None:
        """Prepare the next step, before anything of it is sampled or scored."""
        if self._evaluation_is_missing():
            self.evaluate()
        self.guard.begin_step()
        self._loss_before = self._tr_loss.clone()

    def _evaluation_is_missing(self) -> bool:
        """True if the run resumes from a checkpoint whose step has no evaluation, because that failed."""
        step, every = self.state.global_step, self.state.eval_steps
        if step == 0 or step != self._initial_global_step or self.args.eval_strategy != "steps" or step % every:
            return False
        if step < self.args.eval_delay:
            return False
        return not any(log["step"] == step and is_held_out(log) for log in self.state.log_history)

    @override
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accepts_gradient(norm):
            return norm
        # Without gradients the optimizer changes neither weights nor moments. The loss of the step is subtracted again.
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.zero_grad(set_to_none=True)  # the optimizer may hold copies of its weights
        self._tr_loss.copy_(self._loss_before)
        return None

    @override
    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        return self.step_weights(batch_samples, device)

    def step_weights(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Sum each term's weights over the micro-batches and processes of one step, shape (K,)."""
        if not batch_samples:
            return None
        totals = torch.stack([self.term_weights(inputs) for inputs in batch_samples]).sum(dim=0)
        return self.accelerator.reduce(totals.to(device), reduction="sum")  # pyright: ignore[reportReturnType]

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # of the whole run, not only since the last resume
            logs = {**logs, "train_loss": self._total_loss_scalar / max(self.state.global_step, 1)}
        super().log(logs, start_time)

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if is_sharded(self.policy):
            state_dict = whole_weights(self.policy)
        if not is_writer():
            return
        with _without_embeddings(self.policy):
            super()._save(output_dir, state_dict)
        # PEFT writes every adapter; those of references, which are frozen, go into subfolders.
        written = Path(str(self.args.output_dir if output_dir is None else output_dir))
        for name in self.policy.peft_config if isinstance(self.policy, PeftModel) else ():
            if (written / name).is_dir():
                shutil.rmtree(written / name)

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.policy):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer(self.policy, self.optimizer)
        if is_writer():
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @override
    def _save_rng_state(self, output_dir: str) -> None:
        if num_processes() == 1:
            super()._save_rng_state(output_dir)
            return
        # Each process has its own random state, but only the writer has the staged folder, so it collects them all.
        with TemporaryDirectory() as own:
            super()._save_rng_state(own)
            states = gathered([(file.name, file.read_bytes()) for file in Path(own).iterdir()])
        for name, state in states if is_writer() else ():
            (Path(output_dir) / name).write_bytes(state)

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target = self.run_dir / f"checkpoint-{self.state.global_step}"
        if not is_writer():  # takes part in gathering weights and states, but writes nothing
            super()._save_checkpoint(model, trial)
            self.write_state(target)
            return
        # transformers writes to _get_output_dir()/checkpoint-N; its files are moved up into the staged folder, which
        # gets its final name only once all files are on the disk. The seal is written last: a folder without a seal is
        # never resumed from. The logs are synced first: a checkpoint must not outlive the logs of its steps.
        marks = sync_logs(self.run_dir)
        with staged_folder(target, existing="replace") as self._staging:
            super()._save_checkpoint(model, trial)
            self.write_state(self._staging / target.name)
            written = self._staging / target.name
            for item in written.iterdir():
                item.rename(self._staging / item.name)
            written.rmdir()
            seal(self._staging, run=self.run_id, step=self.state.global_step, logs=marks)
        self._staging = None
        best = None if self.course.best is None else self.course.best.step
        rotate(self.run_dir, run=self.run_id, keep=self.args.save_total_limit, best=best)

    @override
    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run_dir if self._staging is None else self._staging)


@contextmanager
def reading_checkpoint(checkpoint: str | Path | None) -> Iterator[None]:
    """Turn errors of reading a checkpoint into a TrainingError: pickle, safetensors and JSON each raise their own."""
    with reading(
        lambda error: TrainingError(
            f"{checkpoint} is undamaged but cannot be read ({one_line(error)}, {type(error).__name__}): resume with "
            "the versions in manifest.json, or remove that folder to resume from the checkpoint before it."
        )
    ):
        yield
