"""Sections of a run from Python objects: a loaded model, rows in memory, objectives, reward functions."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import PrivateAttr, ValidationError
from typing_extensions import override

from falign.choices import shown
from falign.data import DataSource, InMemory
from falign.divergences import Divergence
from falign.errors import ConfigError
from falign.objectives import Measure
from falign.rewards.identity import Identified
from falign.runfile.base_config import FrozenModel
from falign.runfile.config import SourceConfig
from falign.runfile.measure_config import PythonMeasureConfig
from falign.runfile.objective_config import ObjectiveConfig, PythonObjectiveConfig
from falign.runfile.policy_config import ModelConfig
from falign.runfile.reference_config import PythonReferenceConfig
from falign.runfile.reward_config import PythonRewardConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from falign.objectives import Objective

__all__ = [
    "LoadedModelConfig",
    "each_section",
    "is_section",
    "measure_section",
    "model_section",
    "objective_section",
    "parse_source",
    "reference_section",
    "reward_section",
    "reward_sections",
    "source_section",
    "with_sources",
]

SOURCE = frozenset({"path", "rows", "texts"})
"""Keys of a source of data, by which it differs from a row: a source has one of them."""


WITH_FUNCTION = ("name", "weight", "form", "transform")
"""Keys of a reward that may stand beside its function."""

FUNCTION_KIND = ("kind", "function")
"""The kind of such a reward, which need not be given."""


def is_section(value: Any) -> bool:
    """Return whether a value is a section of a run file, as a mapping or as its class."""
    return isinstance(value, Mapping | FrozenModel)


class LoadedModelConfig(ModelConfig):
    """A model that a program has loaded, recorded by the place it was loaded from.

    Its weights are not copied and never changed: an adapter is added to other modules over the same weights, and a run
    that trains all weights trains a copy.
    """

    _model: Any = PrivateAttr(default=None)
    _tokenizer: Any = PrivateAttr(default=None)

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> LoadedModelConfig:
        """Return the section of a model.

        Args:
            model: A causal language model of transformers, without an adapter.
            tokenizer: Its tokenizer; by default loaded from where the model was.

        Raises:
            ConfigError: The object is not such a model, or it has no tokenizer.
        """
        from transformers import PreTrainedModel

        from falign.models import describe, load_tokenizer
        from falign.models.loading import prepare_tokenizer
        from falign.models.structure import without_adapters

        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"model is a {type(model).__name__}: give a causal language model of transformers, or the name of one; "
                "of a PEFT model give the base, and adapter=dict(init=FOLDER)."
            )
        if any(without_adapters(module) is not module for module in model.modules()):
            raise ConfigError("model has an adapter in its layers: unload it, or load the base again.")
        path = str(model.name_or_path)
        if not path or (Path(path).is_absolute() and not Path(path).is_dir()):
            raise ConfigError(
                "model was not loaded from a folder or the Hub, which an adapter has to name: save it with its "
                "tokenizer, and load it from there."
            )
        dtype: Any = str(model.dtype).removeprefix("torch.")
        quantization: Any = describe(model).quantization
        section = cls(
            path=path,
            dtype=dtype if dtype in get_args(cls.model_fields["dtype"].annotation) else "auto",
            quantization=quantization if quantization in ("nf4", "int8") else None,
            attn_implementation=model.config._attn_implementation or "sdpa",
            trust_remote_code=type(model).__module__.startswith("transformers_modules"),
        )
        tokenizer = load_tokenizer(path) if tokenizer is None else copy.deepcopy(tokenizer)
        prepare_tokenizer(tokenizer, place=path)
        section._model, section._tokenizer = model, tokenizer
        return section

    @override
    def build_tokenizer(self, *, date: datetime | None = None) -> PreTrainedTokenizerBase:
        from falign.models.tokenizers import fix_date

        tokenizer = copy.deepcopy(self._tokenizer)
        self._add_tokens(tokenizer)
        if date is not None:
            fix_date(tokenizer, date)
        return tokenizer

    @override
    def new_token_ids(self) -> list[int]:
        return self._add_tokens(copy.deepcopy(self._tokenizer))

    @override
    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        from falign.models import stop_token_ids

        return stop_token_ids(self._model, tokenizer)

    @override
    def vocabulary_size(self) -> int | None:
        size = self._model.config.get_text_config().vocab_size
        return max([size, *(id_ + 1 for id_ in self.new_token_ids())])

    @override
    def build(self, *, trains: bool = False) -> PreTrainedModel:
        model = (copy.deepcopy(self._model) if trains else _with_shared_weights(self._model)).eval()
        if self.quantization == "int8":
            from falign.models.int8 import keep_int8_weights

            keep_int8_weights(model)
        return self.with_new_tokens(model)


def objective_section(objective: Objective) -> Any:
    """Return the section of the run file that builds an objective, or the record of the object if there is none.

    Raises:
        ConfigError: The object is not an objective.
    """
    from falign.objectives import Objective

    if not isinstance(objective, Objective):
        raise ConfigError(
            f"objective is a {type(objective).__name__}: give an objective, such as falign.FDPO('jensen_shannon', "
            "beta=0.1), or the section of a run file as a mapping."
        )
    if dataclasses.is_dataclass(objective):
        fields = {field.name: _as_setting(getattr(objective, field.name)) for field in dataclasses.fields(objective)}
        for section in _kinds():
            if section.model_fields.keys() >= fields.keys():
                try:
                    found = section(**fields)
                    if found.build() == objective:
                        return found
                except (ValidationError, ValueError):  # a value without a name, such as a user's divergence
                    continue
    return PythonObjectiveConfig.of(objective)


def _kinds() -> list[Any]:
    return [get_args(kind)[0] for kind in get_args(get_args(ObjectiveConfig)[0])]


def _as_setting(value: Any) -> Any:
    """Return a field of an objective in the form of a run file."""
    if isinstance(value, Divergence):
        return value.name
    if inspect.isfunction(value):
        return value.__name__
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a margin loss: robust(0.1), ipo
        numbers = ", ".join(repr(getattr(value, field.name)) for field in dataclasses.fields(value))
        name = type(value).__name__.lower()
        return name if name == "ipo" else f"{name}({numbers})"
    return value


def _with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return new modules over the same weights in memory."""
    from torch import nn

    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        # Quantized weights have their own classes, and a new parameter would lose their state.
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
    return copy.deepcopy(model, memo)


def model_section(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """Return the section of a model: of a name, a loaded model, or the section itself.

    Raises:
        ConfigError: The value is not a model, or a tokenizer is given together with a name.
    """
    if not (isinstance(model, str | Path) or is_section(model)):
        return LoadedModelConfig.of(model, tokenizer)
    if tokenizer is not None:
        raise ConfigError("tokenizer applies only to a loaded model: leave it out, or load the model.")
    return {"path": str(model)} if isinstance(model, str | Path) else model


def with_sources(data: Any, *, texts: bool = False) -> Any:
    """Return the section of data or prompts; with ``texts``, a list of strings is a list of prompts, not of paths."""
    if isinstance(data, FrozenModel):
        return data
    if not isinstance(data, Mapping):
        return {"train": _sources(data, texts)}
    if SOURCE & data.keys() and "train" not in data:
        return {"train": [source_section(data)]}
    if type(data).__name__ == "DatasetDict" and (others := sorted(set(data) - {"train", "eval"})):
        raise ConfigError(
            f"the DatasetDict has the splits {shown(list(data))}: give one of them, or "
            f"dict(train=splits['train'], eval=splits[{others[0]!r}])."
        )
    return {name: _sources(value, texts) if name in ("train", "eval") else value for name, value in data.items()}


def _sources(value: Any, texts: bool) -> list[Any]:
    """Return the sources of one side: a list of them, one of them, or rows."""
    if isinstance(value, list) and value:
        if texts and all(isinstance(each, str) for each in value):
            return [{"texts": value}]
        if not all(isinstance(each, Mapping) and not SOURCE & each.keys() for each in value):
            return [source_section(each) for each in value]
    return [source_section(value)]


def parse_source(data: Any, *, place: str, beside: Mapping[str, Any] | None = None) -> DataSource:
    """Return one source of data.

    Args:
        data: Rows, the path of a file, or the section as a mapping, which may have ``rows`` in place of a ``path``.
        place: The source's name in messages.
        beside: Fields of the section that are given beside it.

    Raises:
        ConfigError: A key is wrong, or given twice; the message names it.
        DataError: The rows are invalid.
    """
    section = source_section(data)
    if beside:
        if twice := beside.keys() & (section.keys() if isinstance(section, Mapping) else beside.keys()):
            raise ConfigError(f"`{min(twice)}`: {place} is a section, which has this itself; give it there alone.")
        section = {**section, **beside}
    try:
        return SourceConfig.model_validate(section).build()
    except ValidationError as error:
        messages = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)]
        known = ", ".join(SourceConfig.model_fields)
        raise ConfigError(f"{place}: {'; '.join(messages)}. A source has rows or a path, and {known}.") from error


def source_section(value: Any) -> Any:
    """Return the section of one source: of a path, rows, or the section itself."""
    if isinstance(value, str | Path):
        return {"path": str(value)}
    if isinstance(value, FrozenModel):
        return value
    if not isinstance(value, Mapping):
        return {"rows": InMemory(value)}
    return {name: InMemory(each) if name == "rows" else each for name, each in value.items()}


def reward_section(value: Any) -> Any:
    """Return the section of a reward: of a function, another object, or the section itself."""
    if isinstance(value, Mapping) and callable(value.get("function")):
        fields = {name: each for name, each in value.items() if name != "function" and (name, each) != FUNCTION_KIND}
        if wrong := sorted(map(str, fields.keys() - WITH_FUNCTION)):
            known = ", ".join(WITH_FUNCTION)
            raise ConfigError(f"rewards: unknown key {wrong[0]!r} beside a function, which takes {known}.")
        try:
            return PythonRewardConfig.of(value["function"], **fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ConfigError(f"rewards: {first['loc'][0]}={shown(first['input'])}: {first['msg']}.") from error
    if is_section(value):
        return value
    if isinstance(value, Identified) and not inspect.isclass(value):
        # It says itself which of its settings change a value; limits of an LLM judge, for example, do not.
        return PythonRewardConfig.of(value, hashed=(type(value), value.identity()))
    return PythonRewardConfig.of(value)


def reward_sections(value: Any) -> list[Any]:
    """Return the sections of a list of rewards, or of a single one.

    Raises:
        ConfigError: A reward is neither a function, another object that can be called, nor a section.
    """
    several = [value] if callable(value) or is_section(value) else value
    wrong = [each for each in several if not (callable(each) or is_section(each))] if _is_list(several) else [several]
    if wrong:
        raise ConfigError(
            f"rewards has {shown(wrong[0])}: give functions f(prompts, completions, **columns) -> list[float], other "
            "rewards, or sections of a run file as mappings, such as dict(kind='math', answer='answer')."
        )
    return [reward_section(each) for each in several]


def each_section(name: str, section: Callable[[Any], Any], values: Any) -> dict[str, Any]:
    """Return sections by name, as ``references`` and ``measures`` have them.

    Args:
        name: Of the argument.
        section: Makes the section of one value.
        values: By name.

    Raises:
        ConfigError: They are not a mapping.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} is {shown(values)}: give a mapping from a name to each.")
    sections = {}
    for key, value in values.items():
        try:
            sections[key] = section(value)
        except ConfigError as error:
            raise ConfigError(f"{name}[{key!r}]: {error}") from error
    return sections


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def reference_section(value: Any) -> Any:
    """Return the section of a reference: of an object, a function of the policy that makes one, or the section itself.

    Raises:
        ConfigError: It is none of these, or an object that moves during training.
    """
    return value if is_section(value) else PythonReferenceConfig.of(value)


def measure_section(value: Any) -> Any:
    """Return a measure as the run file has it: its name, or the record of an object.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(value, str) or is_section(value):
        return value
    if isinstance(value, type) or not isinstance(value, Measure):
        raise ConfigError(
            f"measures has a {value.__name__ if isinstance(value, type) else type(value).__name__}: give a measure, an "
            "object with references and a call, or a name such as 'divergence_to(jensen_shannon)'."
        )
    return PythonMeasureConfig.of(value)
