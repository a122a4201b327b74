"""The run file: one frozen model per component, each with ``build()``. This is the only documentation of its fields."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    model_serializer,
    model_validator,
)

from falign.choices import similar
from falign.data import DataSource, InMemory, LengthPolicy, PreferenceData, Processing, Window, load_preferences
from falign.data.memory import PYTHON
from falign.data.other_prompts import OtherPrompts
from falign.errors import ConfigError, ModelError
from falign.objectives import BaseObjective, Measure, Objective, complete, field_of, reference_names, token_weighting
from falign.objectives.batch import OFFLINE
from falign.objectives.measures import references_of
from falign.runfile.base_config import FrozenModel, refusals
from falign.runfile.measure_config import MeasureConfig, build_measure, is_known_measure
from falign.runfile.objective_config import ObjectiveConfig, PairwiseConfig
from falign.runfile.online_check import check_samples, check_without_rewards
from falign.runfile.policy_config import AdapterConfig, ModelConfig
from falign.runfile.prompts_config import CriticConfig, PromptsConfig, RehearsalDataConfig, RolloutConfig, with_rows
from falign.runfile.reference_config import AutoReferenceConfig, ReferenceConfig
from falign.runfile.reference_section import ReferenceSection
from falign.runfile.reward_config import RewardConfig
from falign.runfile.training_config import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataConfig", "RunConfig", "SamplingConfig", "SourceConfig"]


class SourceConfig(FrozenModel):
    """One source of preference data."""

    path: str
    """JSON, JSONL (also .gz), CSV, Parquet, a folder saved by ``datasets``, a Hub name, ``demo:polite-preference``."""
    split: str = "train"
    format: str = "auto"
    columns: dict[str, str] = {}
    """The file's name of each column: ``{prompt: question}``; ``outer.inner`` is inside a column of objects."""
    chat: bool | None = None
    """``true``: plain texts are turns, the prompt a user's, rendered by the chat template; ``false``: they are
    continued as they are. Must be set for plain texts if the model has a chat template."""
    ignore: list[str] = []
    """Columns, and keys of turns, that look like parts of the prompt but are not."""
    weight: float | None = Field(default=None, gt=0)
    """Share in a mixture; for all sources or for none."""
    limit: int | None = Field(default=None, ge=1)

    _rows: InMemory | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _with_rows(cls, value: Any, handler: Any) -> SourceConfig:
        return with_rows(value, handler)

    def build(self) -> DataSource:
        """Return the source in the form that :mod:`falign.data` reads."""
        return DataSource(**{**self.model_dump(), "ignore": tuple(self.ignore)}, rows=self._rows)


class DataConfig(FrozenModel):
    """Training and held-out data."""

    train: list[SourceConfig] = Field(min_length=1)
    eval: list[SourceConfig] = []
    """Separate sources of held-out data. Alternatively, ``eval_fraction`` or ``eval_size`` holds out some of the
    training data."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    eval_size: int = Field(default=0, ge=0)
    max_length: int = Field(default=1024, ge=2)
    """Tokens of the prompt and its longest completion together."""
    max_completion_length: int | None = Field(default=None, ge=1)
    long_prompt: LengthPolicy = "error"
    long_completion: LengthPolicy = "cut"
    bad_rows: Literal["error", "skip"] = "error"
    num_proc: int = Field(default=1, ge=1)
    """Processes that tokenize the rows; the tokens are the same."""
    cache: str | None = None
    """A folder that keeps the tokens of rows, identified by the contents of rows, tokenizer, template and lengths."""

    @property
    def window(self) -> Window:
        """Length limits, and the handling of longer rows."""
        return Window(self.max_length, self.max_completion_length, self.long_prompt, self.long_completion)

    def build(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: frozenset[int],
        seed: int,
        preferences: bool,
        other_prompts: Collection[OtherPrompts] = (),
    ) -> PreferenceData:
        """Read, tokenize, mix and split the data.

        Args:
            tokenizer: The policy's tokenizer.
            stop_token_ids: All tokens that end a completion.
            seed: Seed of drawing and splitting.
            preferences: Whether each row must prefer one of its completions.
            other_prompts: Further prompts of the rows, which are added to these.
        """
        return load_preferences(
            [source.build() for source in self.train],
            tokenizer,
            stop_token_ids=stop_token_ids,
            window=self.window,
            preferences=preferences,
            bad_rows=self.bad_rows,
            skip_by="data.bad_rows=skip",
            eval_sources=[source.build() for source in self.eval],
            eval_fraction=self.eval_fraction,
            eval_size=self.eval_size,
            seed=seed,
            other_prompts=other_prompts,
            processing=Processing(self.num_proc, self.cache),
        )


class SamplingConfig(FrozenModel):
    """Prompts answered before and after training, in ``samples.json``."""

    prompts: list[Annotated[str, Field(pattern=r"\S")]] = []
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    """0 decodes greedily."""


def _objects(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value.get("kind") == "python":
        yield place.strip(".")
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        yield from (found for name, inner in items for found in _objects(inner, f"{place}.{name}"))
    elif isinstance(value, str) and value.startswith(PYTHON) and place.endswith(".path"):
        yield place.removesuffix(".path").strip(".")


def _refuse_cycle(sections: Mapping[str, ReferenceSection], path: Sequence[str]) -> None:
    for member in sections[path[-1]].members if path[-1] in sections else ():
        if member == path[0]:
            cycle = " -> ".join(f"references.{name}" for name in (*path, member))
            raise ConfigError(f"{cycle}: a combination that contains itself has no distribution: remove one member.")
        if member not in path:
            _refuse_cycle(sections, [*path, member])


REFERENCE = "reference"  # falign.references.REFERENCE; importing it would load the model libraries
REFERENCE_NAME = re.compile(r"[a-z][a-z0-9_]*")

OF_ALL_WEIGHTS = 1e-6
"""The default learning rate with ``adapter: null``; adapters have that of :class:`TrainingConfig`."""

ONLINE_SECTIONS = ("rollout", "rewards", "rehearsal", "critic")


class RunConfig(FrozenModel):
    """A run: ``falign train RUN.yaml``."""

    output_dir: Path
    """The run folder; it must not hold another run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: ModelConfig
    adapter: AdapterConfig | None = AdapterConfig()
    reference: ReferenceConfig = AutoReferenceConfig()
    """The model that the divergence is measured to. Replaced by ``references`` for an objective that reads several."""
    references: dict[str, ReferenceConfig] = {}
    """References by the names that the objective reads; metrics and evaluation compare with ``reference``."""
    data: DataConfig | None = None
    """Given completions; replaced by ``prompts`` in an online run."""
    prompts: PromptsConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    rewards: list[RewardConfig] = []
    """Rewards of completions; an online run needs one unless its objective reads none, as in distillation."""
    rehearsal: RehearsalDataConfig | None = None
    critic: CriticConfig = CriticConfig()
    objective: ObjectiveConfig = PairwiseConfig()
    measures: dict[str, MeasureConfig] = {}
    """Quantities of the policy's next-token distributions to log as ``measures/NAME``, besides what the objective
    reads: ``entropy``, ``divergence_to(jensen_shannon)``, or ``module:Name`` of your own."""
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _rate_of_all_weights(self) -> RunConfig:
        """Lower the default learning rate where all weights are trained."""
        if self.adapter is not None or "learning_rate" in self.training.model_fields_set:
            return self
        training = self.training.model_copy(update={"learning_rate": OF_ALL_WEIGHTS})
        training.model_fields_set.discard("learning_rate")
        return self.model_copy(update={"training": training})

    @model_serializer(mode="wrap")
    def _without_the_other_form(self, handler: Any) -> dict[str, Any]:
        dropped = "reference" if self.references else "references"
        return {name: value for name, value in handler(self).items() if name != dropped}

    def reference_sections(self) -> dict[str, ReferenceSection]:
        """Return the sections of the references by name, with ``auto`` resolved."""
        given = self.references or {REFERENCE: self.reference}
        return {name: section.resolved(self) for name, section in given.items()}

    def other_prompts(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, OtherPrompts]:
        """Return empty collections of the prompts of references that have their own, by the references' names."""
        sections = self.reference_sections()
        return {
            name: OtherPrompts(section.prompt, tokenizer)
            for name, section in sections.items()
            if section.prompt is not None
        }

    def with_members(self, names: Collection[str]) -> frozenset[str]:
        """Return names of references, and those of all references that they are computed from."""
        sections, found, left = self.reference_sections(), set[str](), [*names]
        while left:
            if (name := left.pop()) not in found:
                found.add(name)
                left += sections[name].members
        return frozenset(found)

    def section_of(self, reference: str) -> str:
        """Return the section of a reference in the run file."""
        return f"references.{reference}" if self.references else "reference"

    @property
    def chat(self) -> bool | None:
        """True if all sources render plain text as turns, false if none does, None if they differ."""
        section = self.data or self.prompts
        said = set() if section is None else {source.chat for source in section.train}
        return said.pop() if len(said) == 1 else None

    @property
    def objects(self) -> list[str]:
        """The fields that only record a Python object, which a run file cannot hold."""
        return list(_objects(self.model_dump(mode="json")))

    def check(self, *, own_measures: bool = False) -> Objective:
        """Refuse settings that cannot work, before anything is loaded, and return the objective.

        Args:
            own_measures: Also import the measures of the user's own, which only training needs.

        Raises:
            ConfigError: Fields contradict each other; the message names them.
        """
        if self.adapter is None and self.model.quantization is not None:
            raise ConfigError(
                f"model.quantization={self.model.quantization} with adapter=null: quantized weights do not train; add "
                "an adapter."
            )
        if self.training.master_weights is not None and self.adapter is not None:
            raise ConfigError(
                "training.master_weights=float32 with an adapter has no effect: an adapter's weights are float32 "
                "already, and those of the model do not change. Leave it out, or set adapter: null."
            )
        self.model.check()
        if self.adapter is not None:
            self.adapter.check(weight_decay=self.training.weight_decay)
        objective = self.objective.objective()
        self._check_references(objective, self._measures(own=own_measures))
        self._check_course()
        if self.prompts is None:
            self._check_offline(objective)
        else:
            self._check_online(objective)
        return objective

    def require_files(self) -> None:
        """Refuse missing models and data, before heavy libraries are imported.

        Raises:
            ModelError: A model or adapter is missing.
            DataError: A file of data is missing.
        """
        from falign.data.sources import require_source
        from falign.models.sources import require_model, require_path

        for section in (self.data, self.prompts):
            for source in () if section is None else (*section.train, *section.eval):
                if source.path is not None:
                    require_source(source.path)
        for part in self.rewards:
            for path in part.data_paths():
                require_source(path)
        if self.rehearsal is not None:
            require_path(self.rehearsal.path)
        require_model(self.model.path)
        if self.adapter is not None and self.adapter.init is not None:
            require_path(self.adapter.init)
        references = {self.section_of(name): section for name, section in self.reference_sections().items()}
        for field, part in (*references.items(), *((f"rewards.{i}", part) for i, part in enumerate(self.rewards))):
            for path in part.model_paths():
                try:
                    require_path(path)
                except ModelError as error:
                    raise ModelError(f"{field}: {error}") from error

    def build_measures(self) -> dict[str, Measure]:
        """Return the measures to log, by name.

        Raises:
            ConfigError: A name is unknown, or a user's measure cannot be imported or is invalid.
        """
        return {field.removeprefix("measures."): measure for field, measure in self._measures(own=True).items()}

    def _measures(self, *, own: bool) -> dict[str, Measure]:
        """Return the measures by their fields; without ``own``, only those that need no import of a user's code."""
        fields = {f"measures.{name}": value for name, value in self.measures.items() if own or is_known_measure(value)}
        with refusals("measures"):
            return {field: build_measure(value, field) for field, value in fields.items()}

    def models_that_read_ids(self) -> Iterator[tuple[str, str]]:
        """Return the field and path of each other model that reads the policy's token ids."""
        for name, section in self.reference_sections().items():
            yield from section.models_that_read_ids(field=self.section_of(name), own=self.model.path)
        for i, reward in enumerate(self.rewards):
            yield from ((f"rewards.{i}.{field}", path) for field, path in reward.models_that_read_ids())

    def check_token_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Refuse token ids for which a model has no embedding, before any weights are loaded.

        Args:
            tokenizer: The policy's tokenizer.
            rows: Token ids, each with their place in the data.
        """
        from falign.models.loading import vocabulary_size
        from falign.models.tokenizers import check_token_rows

        sizes = {self.model.path: self.model.vocabulary_size()}
        for _, path in self.models_that_read_ids():
            if path not in sizes:
                sizes[path] = vocabulary_size(path, trust_remote_code=self.model.trust_remote_code)
        for path, size in sizes.items():
            if size is not None:
                check_token_rows(rows, num_rows=size, model=path, tokenizer=tokenizer)

    def _check_references(self, objective: Objective, measures: Mapping[str, Measure]) -> None:
        """Refuse references that contradict each other or do not fit the objective."""
        if self.references and "reference" in self.model_fields_set:
            raise ConfigError(
                "reference and references exclude each other: write the one under references, as "
                "`references: {reference: {...}, teacher: {...}}`."
            )
        for name, section in self.reference_sections().items():
            if not REFERENCE_NAME.fullmatch(name):
                raise ConfigError(
                    f"references.{name}: a name is a lower-case letter, then letters, digits and underscores."
                )
            section.check(field=self.section_of(name), adapter=self.adapter is not None)
            section.check_evaluation(field=self.section_of(name), every=self.training.eval_steps)
        try:
            whole = complete(objective)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"objective.kind={self.objective.kind}: {error}") from error
        given, read = self.reference_sections().keys(), reference_names(whole.needs, {**whole.measures, **measures})
        self._check_members(whole)
        self._check_whole(whole, measures)
        if missing := sorted(read - given):
            readers = (field for field, measure in measures.items() if missing[0] in references_of([measure]))
            by_objective = missing[0] in reference_names(whole.needs, whole.measures)
            reader = f"objective.kind={self.objective.kind}" if by_objective else next(readers)
            close = similar(missing[0], sorted(given - read), cutoff=0.75)
            hint = "" if close is None else f" is {close!r} the one that is meant? Give both the same name; or"
            raise ConfigError(
                f"{reader} reads the reference {missing[0]!r}, and the run has "
                f"{', '.join(sorted(given))}:{hint} add it under references, as "
                f"`references: {{{', '.join(f'{name}: {{kind: ...}}' for name in sorted({*given, *read}))}}}`."
            )
        rest = None if whole.rests_at is None else self.reference_sections()[whole.rests_at]
        if rest is not None and rest.prompt is None and rest.starts_as_policy(self):
            assert whole.rests_at is not None
            raise ConfigError(
                f"{self.section_of(whole.rests_at)}.kind={rest.kind} is the model that the policy starts from, and "
                f"objective.kind={self.objective.kind} has no gradient where the two are equal, so nothing would be "
                "learned: give the path of another model, or a prompt that the policy does not read."
            )
        unread = sorted(given - self.with_members({*read, REFERENCE} & given))
        if unread and len(measures) == len(self.measures):  # a measure of the user's own may read it
            raise ConfigError(
                f"references.{unread[0]}: neither objective.kind={self.objective.kind} nor a measure reads a reference "
                f"of this name (they read {', '.join(sorted(read)) or 'none'}): leave it out."
            )

    def _check_members(self, objective: BaseObjective) -> None:
        """Refuse combinations of references that are missing, contain themselves, or lack what their reader needs."""
        sections = self.reference_sections()
        for name, section in sections.items():
            for member in section.members:
                if member not in sections:
                    raise ConfigError(
                        f"{self.section_of(name)}.weights names the reference {member!r}, and the run has "
                        f"{', '.join(sorted(sections))}: add it under references, as "
                        f"`references: {{{name}: {{kind: {section.kind}, ...}}, {member}: {{kind: ...}}}}`."
                    )
                if section.normalized and not sections[member].normalized:
                    raise ConfigError(
                        f"{self.section_of(member)} is known only up to a factor per prompt (level: sequence), and "
                        f"{self.section_of(name)} needs its probabilities: set its level to token."
                    )
            _refuse_cycle(sections, [name])
            if not section.normalized and not objective.accepts_unnormalized:
                raise ConfigError(
                    f"{self.section_of(name)}.level=sequence: this reference is known only up to a factor per prompt, "
                    f"and objective.kind={self.objective.kind} needs its probabilities: set level to token."
                )

    def _check_whole(self, objective: BaseObjective, measures: Mapping[str, Measure]) -> None:
        """Refuse readers of whole distributions of references that have none."""
        sections = self.reference_sections()
        readers = {
            self.section_of(name): {*section.members} for name, section in sections.items() if section.reads_whole
        }
        readers |= {field: {*references_of([measure])} for field, measure in measures.items()}
        of_objective = {*references_of(objective.measures.values())}
        if token_weighting(objective.needs) not in ("none", "data"):
            of_objective.add(REFERENCE)
        readers[f"objective.kind={self.objective.kind}"] = of_objective
        for reader, names in readers.items():
            for name in sorted(self.with_members(names & sections.keys())):
                sections[name].check_whole(field=self.section_of(name), reader=reader)

    def _check_course(self) -> None:
        """Refuse settings that compare models by evaluations that the run does not have."""
        for name in ("early_stopping", "keep_best"):
            if getattr(self.training, name) is not None and self.training.eval_steps is None:
                raise ConfigError(
                    f"training.{name} compares evaluations during training: set training.eval_steps, and held-out data."
                )

    def _check_offline(self, objective: Objective) -> None:
        if self.data is None:
            raise ConfigError(
                "data is missing: set data.train, or prompts.train for a run that samples its completions."
            )
        # A resolved run file has all sections, so a section counts as given if it differs from its default.
        fields = type(self).model_fields
        if online := [name for name in ONLINE_SECTIONS if getattr(self, name) != fields[name].default]:
            raise ConfigError(
                f"{online[0]} is a section of online runs, which sample their completions: add prompts.train."
            )
        if self.training.log_completions:
            raise ConfigError(
                "training.log_completions is for online runs, which sample completions at every step: leave it out. "
                "sampling.prompts samples some before and after training."
            )
        if missing := sorted(name for name in objective.needs if field_of(name) not in OFFLINE):
            raise ConfigError(
                f"objective.kind={self.objective.kind} reads {', '.join(missing)} of each completion, which come from "
                "rollouts: give prompts and rollout, with rewards if it reads them, in place of data."
            )
        if self.training.eval_steps and not (self.data.eval or self.data.eval_size or self.data.eval_fraction):
            raise ConfigError("training.eval_steps needs data.eval, data.eval_size or data.eval_fraction.")

    def _check_online(self, objective: Objective) -> None:
        assert self.prompts is not None
        if self.data is not None:
            raise ConfigError(
                "data and prompts exclude each other: a run learns from given or from sampled completions."
            )
        if not self.rewards:
            check_without_rewards(self.rollout, self.objective, objective)
        wanted = self.objective.num_rewards
        if self.rewards and wanted not in (None, len(self.rewards)):
            raise ConfigError(
                f"objective.target reads {wanted} rewards, one after the other, and rewards has {len(self.rewards)}."
            )
        if self.training.tokens_per_batch is not None or self.training.gradient_accumulation_steps != 1:
            raise ConfigError(
                "training.tokens_per_batch and training.gradient_accumulation_steps apply only to offline runs: here "
                "an update takes rollout.prompts / rollout.minibatches prompts, per_device_train_batch_size at a time."
            )
        if self.rollout.minibatches > self.rollout.prompts:
            raise ConfigError(
                f"rollout.minibatches={self.rollout.minibatches} is more than rollout.prompts={self.rollout.prompts}: "
                "a minibatch needs at least one prompt."
            )
        check_samples(self.rollout, self.objective, self.rewards, objective)
        self.rollout.engine.check_policy(new_tokens=bool(self.model.new_tokens))
        if self.critic != CriticConfig() and "values" not in objective.needs:
            raise ConfigError(
                f"critic is the value head of advantage=gae, and objective.kind={self.objective.kind} reads no values: "
                "leave it out, or choose that advantage."
            )
        for name, section in self.reference_sections().items():
            section.check_rollouts(field=self.section_of(name), updates=self.rollout.num_updates)
            if section.cache is not None:
                raise ConfigError(
                    f"{self.section_of(name)}.cache: every completion of an online run is new, so nothing could "
                    "be reused: leave it out."
                )
        if ("from_reference" in objective.needs) != (self.rehearsal is not None):
            raise ConfigError("rehearsal belongs to objective.kind=hybrid, which needs it: give both or neither.")
        if "train_sampling_strategy" in self.training.extra:
            raise ConfigError(
                "training.extra.train_sampling_strategy orders given completions; in an online run, prompts are always "
                "shuffled: leave it out."
            )
        if self.training.eval_steps and not (self.prompts.eval or self.prompts.eval_size):
            raise ConfigError("training.eval_steps needs prompts.eval or prompts.eval_size.")
