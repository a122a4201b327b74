"""A training run, from the run file to the trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from falign.data import PreferenceData, PromptData
from falign.errors import ConfigError, StoppedError
from falign.models import export_adapter, export_merged
from falign.models.heads import REWARD_HEAD
from falign.models.recorded_base import RecordedBase
from falign.models.sharding import gathered_weights, is_sharded
from falign.models.staging import save_tensors
from falign.models.tokenizers import tokenizer_fingerprint
from falign.objectives import Objective
from falign.references import REFERENCE
from falign.rewards.identity import reward_identities
from falign.rollouts.answers import answer
from falign.runfile.config import RunConfig
from falign.runs.checkpoints import checkpoints, remove_leftovers
from falign.runs.folder import RunFolder, is_held_out, versions
from falign.runs.inputs import RunInputs, RunRows, text_hash
from falign.runs.named_code import own_code
from falign.runs.progress import MetricsFile, ProgressBar, plot_curves
from falign.runs.summary import Answered, Best, RunSummary
from falign.terminal import Terminal
from falign.training.interrupts import StopAtStepEnd, prepare_trackers
from falign.training.memory import advising_on_memory
from falign.training.offline import offline_trainer
from falign.training.online.run import online_trainer
from falign.training.online.trainer import OnlineTrainer
from falign.training.parts import Language, load_language
from falign.training.processes import gathered, is_writer, join, num_processes, shards, wait
from falign.training.references import identities, keep_moved
from falign.training.start_notes import CheckpointAdvice, start_notes
from falign.training.trainer import AlignmentTrainer

__all__ = ["train"]


class Origin(NamedTuple):
    """Properties that a run gets when it begins, and keeps when it resumes.

    Attributes:
        run: The identifier in all its checkpoints.
        date: The date that chat templates write.
    """

    run: str
    date: datetime

    @classmethod
    def new(cls) -> Origin:
        """Return the properties of a new run; all processes must call it."""
        return gathered([cls(uuid4().hex, datetime.now().replace(microsecond=0))])[0]

    @classmethod
    def of(cls, folder: RunFolder) -> Origin:
        """Return the properties that a run recorded when it began."""
        return cls(folder.read_inputs()["run"], folder.read_date())

    @property
    def record(self) -> dict[str, str]:
        """The properties as the manifest stores them."""
        return {"run": self.run, "date": self.date.isoformat()}


def train(
    config: RunConfig,
    *,
    console: Console | None = None,
    resume: bool = False,
    new_rewards: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunSummary:
    """Train as a run file says.

    Args:
        config: The run.
        console: Shows progress.
        resume: Continue from the newest undamaged checkpoint of the same run, or begin again if it has none yet.
        new_rewards: Continue with rewards that have changed since, such as a corrected one; the manifest records the
            step and the former rewards.
        callbacks: Further callbacks of transformers.

    Raises:
        FalignError: The settings are invalid, an input is missing or has changed, or training failed; files already
            written are kept.
    """
    join()
    console = (console or Terminal(stderr=True)) if is_writer() else Terminal(quiet=True)
    objective, folder = config.check(own_measures=True), RunFolder(config.output_dir, writes=is_writer())
    config.training.check()
    origin = Origin.new()
    if resume:
        folder.require_same(config, new_rewards=new_rewards)
        if folder.writes:
            folder.lock.take()
        if folder.began:
            origin = Origin.of(folder)
    else:
        folder.require_free()
    try:
        with advising_on_memory(config):
            return _begin(
                config,
                objective,
                folder,
                origin,
                console=console,
                resume=resume,
                new_rewards=new_rewards,
                callbacks=callbacks,
            )
    finally:
        folder.lock.give_back()


def _begin(
    config: RunConfig,
    objective: Objective,
    folder: RunFolder,
    origin: Origin,
    *,
    console: Console,
    resume: bool,
    new_rewards: bool,
    callbacks: Sequence[TrainerCallback],
) -> RunSummary:
    """Load everything, check that a resumed run is the same run, and train."""
    if shards():
        if config.adapter is not None:
            config.adapter.check_sharding(new_tokens=bool(config.model.new_tokens))
        for name, section in config.reference_sections().items():
            section.check_sharding(field=config.section_of(name))
    folder.require_own_models(config)
    set_seed(config.seed)
    language = load_language(config, date=origin.date)
    bar = ProgressBar(console)
    build: Any = online_trainer if config.prompts is not None else offline_trainer
    trainer, data = build(
        config, language, objective, callbacks=[MetricsFile(folder.metrics_file), bar, *callbacks], console=console
    )
    with closing(trainer):
        trainer.run_id = origin.run
        rows, inputs = RunRows.of(trainer.rows), _inputs(config, trainer, language)
        changes = folder.changes(inputs, new_rewards=new_rewards) if resume and folder.began else []
        if resume and checkpoints(folder.path):
            folder.require_same_inputs(rows, inputs, new_rewards=new_rewards)
            if changed := folder.other_versions():
                _printer(console)(
                    f"warning: versions have changed since the run was last started: {changed}. The next steps may "
                    "differ from those with the old versions; install the old versions to avoid that."
                )
        record = {**origin.record, "hashes": inputs.hashes, "rows": rows.digest, "changes": changes}
        return _train(config, trainer, data, language, folder, bar, rows, record, console=console, resume=resume)


def _train(
    config: RunConfig,
    trainer: AlignmentTrainer,
    data: PreferenceData | PromptData,
    language: Language,
    folder: RunFolder,
    bar: ProgressBar,
    rows: RunRows,
    record: dict[str, Any],
    *,
    console: Console,
    resume: bool,
) -> RunSummary:
    """Evaluate, train, evaluate again, and write the results."""
    trainer.remove_callback(PrinterCallback)
    prepare_trackers(trainer, folder.path, evaluates=trainer.evaluates)
    checkpoint = _checkpoint(folder, console) if resume else None
    began = None if checkpoint is None else trainer.state_at(checkpoint)
    if began is not None:
        trainer.require_same_schedule(began)
    if late := [knot for knot in trainer.objective.knots if knot > trainer.num_steps]:
        _printer(console)(
            f"warning: a schedule of the objective changes until step {max(late)}, and the run has "
            f"{trainer.num_steps} steps, so that it does not reach its last value."
        )
    for note in start_notes(config, trainer.num_steps):
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)
    if config.training.save_minutes is None:
        trainer.add_callback(CheckpointAdvice(config.training.save_steps, _printer(console)))
    wait()  # the writer changes the folder only after all processes have read it
    if checkpoint is not None and began is not None and is_writer():
        folder.restore_logs(checkpoint, began.log_history, _printer(console))
        if not trainer.has_ended(checkpoint):
            folder.reopen()
    folder.claim(config)  # not earlier: a run that cannot start must leave no folder behind
    folder.write_rows(rows)
    _record(folder, config, trainer, data, record)

    if checkpoint is None:
        try:
            metrics = _evaluate(trainer)
            trainer.course.require_metrics(metrics)
            before = {"metrics": metrics, "answers": _answers(config, trainer, language)}
            folder.write_json("before.json", before)
        except BaseException:
            folder.release()
            raise
    wait()
    before = folder.read_json("before.json")
    try:
        if checkpoint is not None and trainer.has_ended(checkpoint):
            trainer.load_finished(checkpoint)
        else:
            _until_stopped(trainer, checkpoint, folder, config, console)
    finally:
        bar.close()
    summary = _finish(folder, config, trainer, language, before)
    for remark in trainer.remarks():
        _printer(console)(remark)
    return summary


def _until_stopped(
    trainer: AlignmentTrainer, checkpoint: Path | None, folder: RunFolder, config: RunConfig, console: Console
) -> None:
    """Train to the last step, or to the end of the step in which the user stops the run.

    Raises:
        StoppedError: The user stopped the run; it can be resumed from its last checkpoint.
    """
    stop = StopAtStepEnd(_printer(console))
    trainer.add_callback(stop)
    with stop.listening():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = trainer.state
    if stop.caught is not None and state.global_step < state.max_steps:
        launch = f" --launch {'fsdp2' if shards() else 'ddp'} --processes {num_processes()}"
        again = f"`{folder.resume_command}{launch if num_processes() > 1 else ''}`"
        if config.objects:
            again = f"falign.train, the same {', '.join(config.objects)}, and resume=True"
        raise StoppedError(
            f"stopped at step {state.global_step} of {state.max_steps}, with checkpoint-{state.global_step} in "
            f"{folder.path}. Resume with {again}.",
            signal=stop.caught,
        )


def _finish(
    folder: RunFolder, config: RunConfig, trainer: AlignmentTrainer, language: Language, before: dict[str, Any]
) -> RunSummary:
    """Evaluate the trained model, and write model and results."""
    after, best = _evaluate(trainer), _load_best(trainer)
    if best is not None:
        logged = next(log for log in trainer.state.log_history if log["step"] == best.step and is_held_out(log))
        after = _held_out(logged)
    samples = [
        Answered(prompt=prompt, before=first, after=last)
        for prompt, first, last in zip(
            config.sampling.prompts, before["answers"], _answers(config, trainer, language), strict=True
        )
    ]
    summary = RunSummary(folder, before["metrics"], after, samples, best)
    with gathered_weights(trainer.policy):
        if is_writer():
            _write_model(folder, config, trainer, language, best)
    if is_writer():
        policy = trainer.policy
        assert isinstance(policy, PreTrainedModel | PeftModel)
        keep_moved(folder, trainer.references, policy)
        summary.write()
        title = f"{config.objective.title}, {config.model.path}"
        plot_curves(folder.metrics(), folder.path / "curves.png", title=title)
    wait()
    return summary


def _checkpoint(folder: RunFolder, console: Console) -> Path | None:
    """Return the checkpoint to resume from; None if the run was killed before its first one and begins again."""
    tell = _printer(console)
    # Each process waits once: the others before they look, and the writer after it has cleaned up. So they see only
    # undamaged checkpoints.
    if not is_writer():
        wait()
    checkpoint = folder.last_checkpoint(tell)
    if checkpoint is not None:
        _require_as_many_processes(checkpoint)
    if is_writer():
        remove_leftovers(folder.path)
        if checkpoint is None:
            tell(f"{folder.path} has no checkpoint yet: the run begins again.")
            folder.release()
        wait()
    return checkpoint


def _printer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _require_as_many_processes(checkpoint: Path) -> None:
    """Refuse to resume with another number of processes, because each has its own random states."""
    # A single process writes rng_state.pth, several write rng_state_0.pth, rng_state_1.pth and so on.
    written = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if written != num_processes():
        raise ConfigError(
            f"{checkpoint} was written by {written} process{'es' * (written > 1)}, and this run has {num_processes()}: "
            + (
                f"resume with as many (falign train ... --launch ddp or fsdp2, as it began, --processes {written})."
                if written > 1
                else "resume with one process, without --launch."
            )
        )


def _evaluate(trainer: AlignmentTrainer) -> dict[str, float]:
    """Return the held-out means at this step, without the prefix ``eval_``; a logged evaluation is reused."""
    if not trainer.evaluates:
        return {}
    for log in reversed(trainer.state.log_history):
        if log["step"] == trainer.state.global_step and is_held_out(log):
            break
    else:
        log = trainer.evaluate()
    return _held_out(log)


def _held_out(log: Mapping[str, Any]) -> dict[str, float]:
    # Sorted, because the state of a checkpoint sorts them, and a resumed run must write the same file.
    return {name.removeprefix("eval_"): value for name, value in sorted(log.items()) if name.startswith("eval_")}


def _load_best(trainer: AlignmentTrainer) -> Best | None:
    """Load the best model of the run and return which it is; None if the run keeps the last one."""
    best, last_step = trainer.course.best, trainer.state.global_step
    if best is None or best.step is None or best.best is None:
        return None
    wait()  # the writer has written the checkpoint
    trainer.load_best()
    return Best(metric=best.compare.metric, value=best.best, step=best.step, last_step=last_step)


def _answers(config: RunConfig, trainer: AlignmentTrainer, language: Language) -> list[str]:
    return answer(
        trainer.policy,
        language.tokenizer,
        config.sampling.prompts,
        chat=config.chat is not False,
        stop_token_ids=language.stop_tokens,
        max_new_tokens=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
        seed=config.seed,
    )


def _inputs(config: RunConfig, trainer: AlignmentTrainer, language: Language) -> RunInputs:
    """Return the hashes of everything that decides the steps of a run besides its rows and settings."""
    return RunInputs(
        {
            "chat_template": text_hash(str(language.tokenizer.chat_template)),
            "tokenizer": tokenizer_fingerprint(language.tokenizer),
            "stop_tokens": sorted(language.stop_tokens),
            "base_weights": trainer.record["base_weights"],
            "base_config": trainer.record["base_config"],
            **_reference_hashes(trainer),
            "objective_code": own_code(config),
            "rewards": _reward_hashes(trainer),
        }
    )


def _reward_hashes(trainer: AlignmentTrainer) -> dict[str, Any]:
    rewards = trainer.rewards if isinstance(trainer, OnlineTrainer) else None
    return {} if rewards is None else reward_identities(rewards)


def _reference_hashes(trainer: AlignmentTrainer) -> dict[str, Any]:
    """Return the hashes of the references: of the one named ``reference``, and of the others by name."""
    found, record = _without_paths(identities(trainer.references)), trainer.record
    found[REFERENCE] |= {"config": record["reference_config"]}
    for name, config in record.get("reference_configs", {}).items():
        found["references"][name] |= {"config": config}
    return found


def _without_paths(value: Any) -> Any:
    """Return an identity without the paths of its models, which the hashes beside them identify."""
    if isinstance(value, Mapping):
        return {name: _without_paths(inner) for name, inner in value.items() if name != "path"}
    return [_without_paths(inner) for inner in value] if isinstance(value, list | tuple) else value


def _record(
    folder: RunFolder,
    config: RunConfig,
    trainer: AlignmentTrainer,
    data: PreferenceData | PromptData,
    inputs: dict[str, Any],
) -> None:
    policy = trainer.policy
    assert isinstance(policy, PreTrainedModel | PeftModel)
    manifest: dict[str, Any] = {
        "versions": versions(),
        **trainer.record,
        "processes": num_processes(),
        "sharded": is_sharded(policy),
        **identities(trainer.references),
        "layout": trainer.scorer.layout,
        "objective": config.objective.model_dump(),
        "data": asdict(data.report),
        "inputs": {**inputs, "settings": folder.settings(config)},
    }
    folder.write_json("manifest.json", manifest)


def _write_model(
    folder: RunFolder, config: RunConfig, trainer: AlignmentTrainer, language: Language, best: Best | None
) -> None:
    if isinstance(trainer.policy, PeftModel):
        recorded = RecordedBase(weights=trainer.record["base_weights"], storage=trainer.record["base_storage"])
        export_adapter(trainer.policy, language.tokenizer, folder.adapter, base=recorded, overwrite=True)
        _record_model(folder, trainer, folder.adapter, best)
    else:
        assert isinstance(trainer.policy, PreTrainedModel)
        export_merged(
            trainer.policy,
            language.tokenizer,
            folder.weights,
            dtype=str(trainer.policy.dtype).removeprefix("torch."),  # as it was evaluated, whatever the base has
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            new_token_ids=config.model.new_token_ids(),
            overwrite=True,
        )
        _record_model(folder, trainer, folder.weights, best)


def _record_model(folder: RunFolder, trainer: AlignmentTrainer, trained: Path, best: Best | None) -> None:
    """Add the head of a reward model, if there is one, and record the files; show a language model at the top."""
    if (head := trainer.reward_head) is not None:
        save_tensors(dict(head.state_dict()), trained / REWARD_HEAD, metadata={"format": "pt"})
    folder.record_model(trained, **({} if best is None else {"best": best.model_dump()}))
    # Without its head a reward model would load, and give no rewards.
    if head is None:
        folder.show_model(trained)
