"""The Python door: train with objects of a program, and use what a run has trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falign.data import InMemory
from falign.errors import ConfigError
from falign.runfile import AdapterConfig as Lora
from falign.runfile import RunConfig, parse_run
from falign.runfile.base_config import FrozenModel
from falign.runfile.objects import LoadedModelConfig, objective_section
from falign.runfile.reward_config import PythonRewardConfig
from falign.runs import RunFolder
from falign.runs.loading import Trained, load_trained
from falign.runs.summary import RunSummary

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from falign.objectives import Objective

__all__ = ["Lora", "Run", "load", "train"]

Section = Mapping[str, Any] | FrozenModel
"""A section of a run file, as a mapping or as its class."""

SOURCE = frozenset({"path", "rows", "texts"})
"""Keys of which a source of data has one, and a row has none."""


class Run:
    """A run in its folder: its results, and the model that it has trained, which is loaded where it is asked for.

    Args:
        path: The run folder.
        model: The base that was trained, where it is in memory.
        tokenizer: Its own.
        trust_code: Whether code that the run folder names may run.

    Raises:
        ConfigError: The path is not a run folder.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_code: bool = False,
    ) -> None:
        self.folder = RunFolder.open(path)
        self.trust_code = trust_code
        self._base = None if model is None else LoadedModelConfig.of(model, tokenizer)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

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
        return RunSummary.read(self.folder)

    @cached_property
    def trained(self) -> Trained:
        """The model, its tokenizer, and the run file.

        Raises:
            ConfigError: The run is not finished, or names code that is not trusted.
            ModelError: The base is not the one that was trained, or a file is damaged.
        """
        return load_trained(self.folder, base=self._base, trust_code=self.trust_code)

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


def load(
    path: str | Path,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_code: bool = False,
) -> Run:
    """Return a run in its folder.

    Args:
        path: The run folder.
        model: The base that was trained, where it is in memory, or was changed since it was loaded. Its weights are
            compared with those that were trained, and left as they are.
        tokenizer: Its own; by default the one where the model was loaded from.
        trust_code: Whether code that the run folder names may run: functions, divergences, its model's own code.

    Raises:
        ConfigError: The path is not a run folder.
    """
    return Run(path, model=model, tokenizer=tokenizer, trust_code=trust_code)


def train(
    model: str | Path | Section | PreTrainedModel,
    *,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    prompts: Any = None,
    objective: Objective | Section | None = None,
    reference: Section | None = None,
    adapter: Section | str | None = "lora",
    training: Section | None = None,
    rewards: Sequence[Callable[..., Any] | Section] | Callable[..., Any] = (),
    rollout: Section | None = None,
    rehearsal: Section | None = None,
    sampling: Section | None = None,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    new_rewards: bool = False,
    console: Console | None = None,
) -> Run:
    """Train, and return the run: everything that a run file says, with objects where it has names.

    The sections ``training``, ``rollout``, ``sampling`` ... are those of a run file, with the same fields, defaults and
    checks, as mappings or as their classes.

    Args:
        model: A name, a folder, a section ``model``, or a loaded model, which is left as it is.
        output_dir: The run folder.
        tokenizer: Of a loaded model; by default the one where it was loaded from.
        data: For offline runs: a ``Dataset``, a ``DataFrame``, a list of rows, the path of a file, or the section
            ``data``, whose sources may have ``rows`` in place of a ``path``: ``dict(train=dict(rows=..., chat=True),
            eval_size=100)``.
        prompts: For online runs, in place of ``data``, the same way; a list of texts is one, too.
        objective: An objective, or the section.
        reference: The section; by default what the policy starts from.
        adapter: The section (``falign.Lora(r=16)``), ``"lora"`` for its defaults, or None to train all weights.
        training: The section: learning rate, steps, batches ...
        rewards: For online runs: functions ``f(prompts, completions, **columns) -> list[float]``, other rewards, or
            sections; ``dict(function=f, weight=0.5, name="short")`` gives a function with its weight.
        rollout: The section of online runs.
        rehearsal: The section of DPH-RL's stored completions.
        sampling: The section of prompts that are answered before and after.
        seed: Of everything random.
        callbacks: Callbacks of transformers.
        resume: Go on from the newest whole checkpoint of the same run. Objects are compared by their content: data by
            their token ids, models by their weights, functions by their code.
        new_rewards: With ``resume``: go on with rewards that were changed.
        console: Where progress is shown; standard error by default.

    Raises:
        ConfigError: An argument or a combination of them cannot work; with its name and the remedy.
        DataError: A row cannot be used.
        FalignError: Something else of the run cannot work.
    """
    from falign.training import train as run

    sections = {
        "output_dir": str(output_dir),
        "seed": seed,
        "model": _model(model, tokenizer),
        "adapter": {} if adapter == "lora" else adapter,
        "data": None if data is None else _with_sources(data),
        "prompts": None if prompts is None else _with_sources(prompts, texts=True),
        "objective": objective if objective is None or _is_section(objective) else objective_section(objective),
        "reference": reference,
        "training": training,
        "rewards": [_reward(each) for each in ([rewards] if callable(rewards) else rewards)],
        "rollout": rollout,
        "rehearsal": rehearsal,
        "sampling": sampling,
    }
    given = {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in sections.items()
        if value is not None or name == "adapter"
    }
    config = parse_run(given, place="falign.train")
    run(config, console=console, resume=resume, new_rewards=new_rewards, callbacks=callbacks)
    base, own = config.model.loaded or (None, None)
    return Run(config.output_dir, model=base, tokenizer=own, trust_code=True)


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping | FrozenModel)


def _model(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    if not (isinstance(model, str | Path) or _is_section(model)):
        return LoadedModelConfig.of(model, tokenizer)
    if tokenizer is not None:
        raise ConfigError("tokenizer is of a loaded model: a name has its own; leave it out, or load the model.")
    return {"path": str(model)} if isinstance(model, str | Path) else model


def _with_sources(data: Any, *, texts: bool = False) -> Any:
    """Return the section of data or prompts; ``texts``: where a list of texts is a source, and not paths."""
    if isinstance(data, FrozenModel):
        return data
    if not isinstance(data, Mapping):
        return {"train": _sources(data, texts)}
    return {name: _sources(value, texts) if name in ("train", "eval") else value for name, value in data.items()}


def _sources(value: Any, texts: bool) -> list[Any]:
    """Return the sources of one side: a list of them, one of them, or rows."""
    if isinstance(value, list) and value:
        if texts and all(isinstance(each, str) for each in value):
            return [{"texts": value}]
        if not all(isinstance(each, Mapping) and not SOURCE & each.keys() for each in value):
            return [_source(each) for each in value]
    return [_source(value)]


def _source(value: Any) -> Any:
    if isinstance(value, str | Path):
        return {"path": str(value)}
    if isinstance(value, FrozenModel):
        return value
    if not isinstance(value, Mapping):
        return {"rows": InMemory(value)}
    return {name: InMemory(each) if name == "rows" else each for name, each in value.items()}


def _reward(value: Any) -> Any:
    if isinstance(value, Mapping) and callable(value.get("function")):
        fields = dict(value)
        return PythonRewardConfig.of(fields.pop("function"), **fields)
    return value if _is_section(value) else PythonRewardConfig.of(value)
