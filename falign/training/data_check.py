"""Checks of data before a run: ``falign.check_data``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falign.data import DataReport, Notice, Window, check
from falign.data.foreign_formats import VERL
from falign.errors import ConfigError, FalignError
from falign.runfile.config import DataConfig, RunConfig, SourceConfig
from falign.runfile.objects import model_section, parse_source
from falign.runfile.policy_config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DataCheck", "check_data", "is_run_file"]

WITHOUT_PREFERENCES = ("unpaired", "completion")
"""Formats whose rows have no preferences."""

NO_PREFERENCES = Notice(
    "Rows of this format have no preferences, which pairwise, listwise and token_pairwise objectives need; labels are "
    "enough for unpaired. Give the run file in place of the data to check it under its objective."
)


PROMPTS_ONLY = Notice(
    "These are prompts without completions: give them to an online run (prompts.train). Its rewards get the column "
    "ground_truth, and its verifiers the same as answer."
)


@dataclass(frozen=True)
class DataCheck:
    """The findings of ``check_data``.

    Attributes:
        sources: The report of each source: counts, lengths, the first bad rows, likely mistakes.
        notices: Further remarks; for a run file, those that its run prints about the data.
        refusal: Why a run would not start on the data; None if it would.
    """

    sources: tuple[DataReport, ...]
    notices: tuple[Notice, ...] = ()
    refusal: FalignError | None = None

    @property
    def ok(self) -> bool:
        """True if a run would start on the data."""
        return self.refusal is None

    def require_ok(self) -> None:
        """Raise the refusal, if there is one.

        Raises:
            FalignError: A run would not start on the data.
        """
        if self.refusal is not None:
            raise self.refusal


def check_data(
    data: Any,
    *,
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template: str | Path | None = None,
    format: str = "auto",
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    chat: bool | None = None,
    ignore: Sequence[str] = (),
    max_length: int | None = None,
    max_completion_length: int | None = None,
    long_prompt: str | None = None,
    long_completion: str | None = None,
    max_drift: float | None = None,
    keep: int = 10,
    trust_code: bool = False,
) -> DataCheck:
    """Read data as a run would, and report on all rows instead of stopping at a bad one; print nothing.

    Args:
        data: Pairs, lists or single completions: rows, the path of a file, or a source with its fields, such as
            ``dict(rows=..., chat=True)``. Or a run: the path of its file (``.yaml``) or its settings; its data are
            checked under its model and its objective, as it reads them, and only the last three options apply.
        model: Count lengths in the tokens of this model, given by its name or loaded; by default in words.
        tokenizer: Tokenizer of a loaded model; by default the one in the folder that it was loaded from.
        chat_template: A Jinja template or a file that contains one, in place of that of a model given by its name.
        format: As :attr:`falign.data.DataSource.format`.
        split: As :attr:`falign.data.DataSource.split`.
        columns: As :attr:`falign.data.DataSource.columns`.
        chat: As :attr:`falign.data.DataSource.chat`.
        ignore: As :attr:`falign.data.DataSource.ignore`.
        max_length: Maximum tokens of prompt and completion together; by default 1024.
        max_completion_length: As :attr:`falign.data.Window.max_completion_length`.
        long_prompt: ``error``, ``cut`` or ``drop`` for prompts that are too long; by default ``error``.
        long_completion: The same for completions; by default ``cut``.
        max_drift: Highest allowed share of rows whose last prompt tokens change when a completion follows; by default
            this is only a remark.
        keep: Maximum number of messages about bad rows in each report.
        trust_code: Whether code that the ``run.yaml`` of a run folder names may run.

    Raises:
        ConfigError: An option is invalid or does not apply; the run file is invalid; or ``chat`` is missing for plain
            texts and a model with a chat template.
        DataError: A source cannot be read.
        ModelError: The model has no tokenizer.
    """
    if max_drift is not None and not 0 <= max_drift <= 1:
        raise ConfigError(f"max_drift={max_drift} must be a share, from 0 to 1.")
    # list() would split a text into its letters; a text is refused below.
    ignore = ignore if isinstance(ignore, str) else list(ignore)
    fields = {"format": format, "split": split, "columns": dict(columns or {}), "chat": chat, "ignore": ignore}
    fields = {name: value for name, value in fields.items() if value != SourceConfig.model_fields[name].default}
    lengths: dict[str, Any] = {
        "max_length": max_length,
        "max_completion_length": max_completion_length,
        "long_prompt": long_prompt,
        "long_completion": long_completion,
    }
    lengths = {name: value for name, value in lengths.items() if value is not None}
    model_options = {"tokenizer": tokenizer, "chat_template": chat_template}
    token_options = [*lengths, *(name for name, value in model_options.items() if value is not None)]
    if is_run_file(data):
        given = [*([] if model is None else ["model"]), *token_options, *fields]
        if given:
            raise ConfigError(f"`{given[0]}`: {_name(data)} is a run file, which sets this itself; leave it out.")
        return _check_run(data, max_drift=max_drift, keep=keep, trust_code=trust_code)
    source, options = parse_source(data, place="data", beside=fields), {}
    if model is not None:
        section = _model(model, tokenizer, chat_template)
        tokenizer = section.build_tokenizer()
        options = {
            "tokenizer": tokenizer,
            "stop_token_ids": section.stop_token_ids(tokenizer),
            "window": Window(**{"max_length": DataConfig.model_fields["max_length"].default, **lengths}),
        }
    elif token_options:
        raise ConfigError(f"`{token_options[0]}` needs a tokenizer: give `model`.")
    report = check(source, keep=keep, **options)
    notices = [NO_PREFERENCES] if report.source.format in WITHOUT_PREFERENCES else []
    notices += [PROMPTS_ONLY] if report.source.format == VERL else []
    return DataCheck((report,), tuple(notices), report.refusal(skip_by="data.bad_rows=skip", max_drift=max_drift))


def is_run_file(data: Any) -> bool:
    """Return whether the data are those of a run, given by the path of its file or by its settings."""
    return isinstance(data, RunConfig) or (isinstance(data, str | Path) and Path(data).suffix in (".yaml", ".yml"))


def _model(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, chat_template: str | Path | None
) -> ModelConfig:
    section = model_section(model, tokenizer)
    if chat_template is None:
        return ModelConfig.model_validate(section)
    if not isinstance(section, Mapping):
        raise ConfigError("`chat_template` applies to a model by name: set the template of the loaded tokenizer.")
    return ModelConfig.model_validate({**section, "chat_template": str(chat_template)})


def _check_run(run: str | Path | RunConfig, *, max_drift: float | None, keep: int, trust_code: bool) -> DataCheck:
    """Check all rows of each source, then everything else that a run checks before it loads weights."""
    from falign.objectives import complete
    from falign.runs.named_code import load_own_run_file
    from falign.training.offline import read_data
    from falign.training.parts import load_language

    config = load_own_run_file(str(run), trust_code=trust_code) if isinstance(run, str | Path) else run
    objective = config.check(own_measures=True)
    if config.data is None:
        raise ConfigError(
            f"{_name(run)} has prompts and no data, so there is nothing to check here: falign train checks prompts "
            "before it loads weights."
        )
    language = load_language(config)
    reports = tuple(
        check(
            source.build(),
            tokenizer=language.tokenizer,
            stop_token_ids=language.stop_tokens,
            window=config.data.window,
            preferences="pairs" in complete(objective).preference_kinds,
            keep=keep,
        )
        for source in (*config.data.train, *config.data.eval)
    )
    skips, notices = config.data.bad_rows == "skip", list[Notice]()
    refusals = (report.refusal(skips=skips, section="data.", max_drift=max_drift) for report in reports)
    refusal: FalignError | None = next(filter(None, refusals), None)
    if refusal is None:
        try:
            read_data(config, language, objective, tell=notices.append)
        except FalignError as error:  # returned with the reports rather than raised
            refusal = error
    return DataCheck(reports, tuple(notices), refusal)


def _name(run: str | Path | RunConfig) -> str:
    return str(run) if isinstance(run, str | Path) else f"the run of {run.output_dir}"
