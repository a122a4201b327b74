"""Loading the results of a run: its trained model, tokenizer and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from falign.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from falign.models.heads import RewardHead
    from falign.objectives import Objective
    from falign.runfile import RunConfig
    from falign.runfile.policy_config import ModelConfig
    from falign.runs import RunFolder
    from falign.runs.summary import RunSummary

__all__ = [
    "Given",
    "Named",
    "OpenRun",
    "Trained",
    "chat_of_run",
    "check_own_models",
    "checkpoint_folder",
    "chosen_chat",
    "each_named",
    "is_run",
    "load_trained",
    "named",
    "opened",
    "reference_name",
    "result_folder",
    "texts_of",
]


class Given:
    """Objects in memory that replace sections of a run file.

    Args:
        sections: By name, as fields of :class:`falign.runfile.RunConfig`.
    """

    def __init__(self, sections: Mapping[str, Any] | None = None) -> None:
        self.sections = dict(sections or {})

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        objective: Objective | None,
        reference: Any = None,
        references: Mapping[str, Any] | None = None,
    ) -> Given:
        """Return the sections of a model in memory, an objective and references."""
        from falign.runfile.objects import LoadedModelConfig, each_section, objective_section, reference_section

        if model is None and tokenizer is not None:
            raise ConfigError("tokenizer applies only to a loaded model: give `model` too, or leave it out.")
        sections: dict[str, Any] = {} if model is None else {"model": LoadedModelConfig.of(model, tokenizer)}
        if objective is not None:
            sections["objective"] = objective_section(objective)
        if reference is not None:
            sections["reference"] = reference_section(reference)
        if references:
            sections["references"] = each_section("references", reference_section, references)
        return cls(sections)

    def in_place(self, config: RunConfig, *, path: Path) -> RunConfig:
        """Return the settings of a run with the objects in their sections.

        Raises:
            ConfigError: The objective or a reference differs from the one that the run was trained with.
        """
        named = self.sections.get("references", {})
        recorded = {
            "objective": config.objective,
            "reference": config.reference,
            **{f"references.{name}": config.references.get(name) for name in named},
        }
        given = {**self.sections, **{f"references.{name}": each for name, each in named.items()}}
        for field in recorded.keys() & given.keys():
            before = recorded[field]
            if before is None or given[field].model_dump() != before.model_dump():
                raise ConfigError(f"{field} differs from the one that {path} was trained with: give the same one.")
        merged = {"references": {**config.references, **named}} if named else {}
        return config.model_copy(update={**self.sections, **merged})


class Trained(NamedTuple):
    """A finished run in memory.

    Attributes:
        model: The trained model.
        tokenizer: Its tokenizer.
        config: The run file.
        reward_head: The head of a reward model; None for other runs.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    config: RunConfig
    reward_head: RewardHead | None = None


class OpenRun:
    """A run in its folder: its results and its trained model, which is loaded at first use.

    Args:
        path: The run folder.
        given: Objects that replace sections of the run file.
        trust_code: Whether code that the run folder names may run.

    Raises:
        ConfigError: The path is not a run folder.
    """

    def __init__(self, path: str | Path, *, given: Given | None = None, trust_code: bool = False) -> None:
        from falign.runs import RunFolder

        self.folder = RunFolder.open(path)
        self.given = given or Given()
        self.trust_code = trust_code

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @cached_property
    def summary(self) -> RunSummary:
        """Held-out metrics and answers, before and after.

        Raises:
            ConfigError: The run has not ended, or a file is damaged.
        """
        from falign.runs.summary import RunSummary

        return RunSummary.read(self.folder)

    @cached_property
    def trained(self) -> Trained:
        """The model, its tokenizer, and the run file.

        Raises:
            ConfigError: The run is not finished, or names code that is not trusted.
            ModelError: The base differs from the one in training, or a file is damaged.
        """
        return load_trained(self.folder, given=self.given, trust_code=self.trust_code)

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        """The trained model, in evaluation mode; see :attr:`trained`."""
        return self.trained.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; see :attr:`trained`."""
        return self.trained.tokenizer

    @property
    def config(self) -> RunConfig:
        """The resolved run file; see :attr:`trained`."""
        return self.trained.config

    @property
    def model_section(self) -> ModelConfig:
        """The section of the base: of the run file, or of the model that was given in its place."""
        return self.given.sections.get("model", self.config.model)


Named = str | Path | OpenRun
"""A run, the path of a run folder, or the path or name of any model."""


def named(model: Named, *, trust_code: bool = False, field: str = "model") -> tuple[str, Given | None, bool]:
    """Return the path or name of a run or a model, the objects given with it, and whether its code is trusted.

    Args:
        model: The run or model.
        trust_code: Whether code that a run folder names may run.
        field: The argument's name in messages.

    Raises:
        ConfigError: It is another object, such as a loaded model.
    """
    if isinstance(model, OpenRun):
        return str(model.path), model.given, trust_code or model.trust_code
    if not isinstance(model, str | Path):
        raise ConfigError(
            f"{field} is a {type(model).__name__}: give a run, or the path or name of one or of a model; save a loaded "
            "model and its tokenizer to a folder first."
        )
    return str(model), None, trust_code


def each_named(models: Named | Sequence[Named], *, field: str) -> list[str]:
    """Return the paths or names of several runs or models, or of a single one.

    Raises:
        ConfigError: One is another object.
    """
    several = models if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    return [named(each, field=field)[0] for each in several]


def reference_name(reference: str | Path | None) -> str | None:
    """Return the path or name of a model to compare with, if there is one.

    Raises:
        ConfigError: It is another object.
    """
    return None if reference is None else named(reference, field="reference")[0]


def texts_of(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return several names, of which a single one may be given without a list."""
    return (value,) if isinstance(value, str) else tuple(value)


def opened(run: str | Path | OpenRun, *, trust_code: bool = False) -> OpenRun:
    """Return a run that can be loaded: of its folder, or one that is open.

    Raises:
        ConfigError: The path is not a run folder.
    """
    if not isinstance(run, OpenRun):
        return OpenRun(run, trust_code=trust_code)
    return OpenRun(run.path, given=run.given, trust_code=True) if trust_code and not run.trust_code else run


def is_run(path: str) -> bool:
    """Return whether a path is a run folder rather than a model."""
    return (Path(path) / "manifest.json").is_file()


def check_own_models(paths: Sequence[str | Path]) -> None:
    """Check the trained weights of those paths that are run folders.

    Raises:
        ModelError: A file is damaged or belongs to another run; the message names it and the remedy.
    """
    from falign.runs import RunFolder

    for path in paths:
        if is_run(str(path)):
            folder = RunFolder(Path(path))
            for trained in (folder.adapter, folder.weights):
                if trained.is_dir():
                    folder.require_own_model(trained)


def chat_of_run(path: str) -> bool | None:
    """Return whether a run read plain texts as turns; None for a model, or if the run's sources differ."""
    from falign.runs import RunFolder
    from falign.runs.named_code import read_run

    return read_run(RunFolder.open(path), uses=[], trust_code=False).chat if is_run(path) else None


def chosen_chat(chat: bool | None, tokenizer: PreTrainedTokenizerBase, console: Console) -> bool:
    """Return whether plain prompts are turns; by default they are if the model has a chat template.

    Args:
        chat: The choice of the user or the run; None if there is none.
        tokenizer: The model's tokenizer.
        console: Shows how plain text is read if nobody has chosen.
    """
    if chat is None and tokenizer.chat_template:
        console.print(
            "Prompts of plain text are read as a user's turns, because the model has a chat template; chat=False "
            "continues them as they are, and chat=True reads them as turns without this line.",
            style="yellow",
        )
    return bool(tokenizer.chat_template) if chat is None else chat


def result_folder(model: str, name: str, out: Path | None) -> Path:
    """Return the folder for results: in the run folder, or the given one.

    Raises:
        ConfigError: The name is a path, or the results are a model's and no folder is given.
    """
    if Path(name).name != name or name in {"", "..", "."}:
        raise ConfigError(f"name={name} must be the name of a folder, not a path; `out` takes a path.")
    if out is not None:
        return out
    if not is_run(model):
        raise ConfigError(f"{model} is not a run folder, so it has no place for results: give out=DIR.")
    folder = Path(model) / "evaluation" / name
    if not folder.resolve().is_relative_to(Path(model).resolve()):
        raise ConfigError(f"{folder} is a link that leads out of {model}: remove it, or give out=DIR.")
    return folder


def load_trained(
    folder: RunFolder,
    checkpoint: int | None = None,
    *,
    given: Given | None = None,
    trust_code: bool = False,
) -> Trained:
    """Load the trained model of a run.

    Args:
        folder: The run.
        checkpoint: The step of a checkpoint to load instead of the last weights.
        given: Objects that replace sections of the run file.
        trust_code: Whether code that the run folder names may run.

    Raises:
        ConfigError: The run is not finished, has no such checkpoint, or names code for its model that is not trusted.
        ModelError: The base model, its configuration or its tokens differ from those of the training, or the trained
            weights are damaged.
    """
    from falign.models import load_adapter, load_model, load_tokenizer, weights_hash
    from falign.models.adapter_starts import mark_started
    from falign.models.heads import RewardHead
    from falign.models.tokenizers import fix_date
    from falign.runs.named_code import read_run

    config = read_run(folder, uses=["model", "adapter"], trust_code=trust_code)
    source = folder.weights if config.adapter is None else folder.adapter
    if checkpoint is not None:
        source = checkpoint_folder(folder, checkpoint)
    if not source.is_dir():
        raise ConfigError(f"{folder.path} has no trained model yet: finish it by `{folder.resume_command}`.")
    folder.require_own_model(source)
    if config.adapter is None:
        model = load_model(
            source,
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
        )
        if checkpoint is None:  # the files of a checkpoint have checksums
            _check_config(model, folder, str(source))
        tokenizer = load_tokenizer(source)
        fix_date(tokenizer, folder.read_date())
        _check_tokens(model, tokenizer, folder, str(source))
        return Trained(model, tokenizer, config, RewardHead.read(source, model))
    source_of_base = config.model if given is None else given.sections.get("model", config.model)
    model = source_of_base.build()
    _check_config(model, folder, config.model.path)
    weights = weights_hash(model)
    if weights != folder.read_manifest()["base_weights"]:
        raise ModelError(
            f"{config.model.path} holds other weights now than when {folder.path} was trained: restore them (or set "
            f"model.revision in {folder.run_file}), because the adapter fits only those."
        )
    tokenizer = source_of_base.build_tokenizer(date=folder.read_date())
    _check_tokens(model, tokenizer, folder, config.model.path)
    adapted = load_adapter(model, source, trainable=False, base_hash=weights)
    if checkpoint is not None and config.adapter.starts_from_weights:
        # A checkpoint holds the matrices as they are trained; the last weights are exported as plain LoRA.
        mark_started(adapted)
    return Trained(adapted, tokenizer, config, RewardHead.read(source, adapted))


def _check_config(model: PreTrainedModel, folder: RunFolder, path: str) -> None:
    from falign.models import config_hash

    if config_hash(model) != folder.read_manifest()["base_config"]:
        raise ModelError(
            f"{path} has another configuration now than when {folder.path} was trained, which changes what its weights "
            f"compute: restore its config.json{_or_revision(folder, path)}."
        )


def _or_revision(folder: RunFolder, path: str) -> str:
    """Return a further remedy for a model that is not in the run folder."""
    if Path(path).resolve().is_relative_to(folder.path.resolve()):
        return ""
    return f" (or set model.revision in {folder.run_file})"


def _check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: RunFolder, path: str) -> None:
    """Refuse token ids, a chat template or stop tokens that differ from those of the training."""
    from falign.models import stop_token_ids
    from falign.models.tokenizers import tokenizer_fingerprint
    from falign.runs.inputs import text_hash

    recorded = folder.read_inputs()["hashes"]
    # The template comes first, because the tokenizer's fingerprint includes it.
    for name, found, what, files in (
        ("chat_template", text_hash(str(tokenizer.chat_template)), "chat template", "chat_template.jinja"),
        ("tokenizer", tokenizer_fingerprint(tokenizer), "tokenizer", "tokenizer files"),
        ("stop_tokens", sorted(stop_token_ids(model, tokenizer)), "set of stop tokens", "generation_config.json"),
    ):
        if found != recorded[name]:
            changed = folder.other_versions()
            versions = f"; or install the versions of the training: {changed}" if changed else ""
            raise ModelError(
                f"{path} has another {what} now than when {folder.path} was trained, so its prompts or completions "
                f"would differ: restore its {files}{_or_revision(folder, path)}{versions}."
            )


def checkpoint_folder(folder: RunFolder, step: int) -> Path:
    """Return the folder of a checkpoint.

    Raises:
        ConfigError: The run has no checkpoint at that step.
    """
    path = folder.path / f"checkpoint-{step}"
    if not path.is_dir():
        steps = sorted(int(found.name.rpartition("-")[2]) for found in folder.path.glob("checkpoint-*"))
        there = steps or "none (training.save_steps writes them)"
        raise ConfigError(f"{folder.path} has no checkpoint of step {step}; it has {there}.")
    return path
