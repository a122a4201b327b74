"""Prompts without completions, for runs that sample their own; other columns go to the rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from typing_extensions import override

from falign.choices import require_choice, shown
from falign.data.chat_template import NO_INPUTS, TemplateInputs, Tokenizer
from falign.data.column_names import as_list, as_mapping, guess_columns, looks_like_system, renamed
from falign.data.conversations import Message, Text, parsed_conversation, read_messages, read_text
from falign.data.examples import prompt_key, prompt_turns
from falign.data.files import Row
from falign.data.foreign_formats import is_verl, verl_columns
from falign.data.memory import InMemory
from falign.data.recognition import refuse_unread_prompts
from falign.data.rendering import require_chat_choice
from falign.data.reports import BadRowPolicy, BadRows
from falign.data.side_columns import OPTIONS, TOOLS, template_inputs
from falign.data.sources import rows_of
from falign.data.splits import held_out_prompts
from falign.data.text_values import is_blank
from falign.data.tokenization import encode_prompt
from falign.data.windows import LengthPolicy, cut_left
from falign.errors import ConfigError, DataError
from falign.templates import Template, columns_of

__all__ = ["PromptData", "PromptReport", "PromptRow", "PromptSource", "RowCheck", "filled", "load_prompts"]


@dataclass(frozen=True)
class PromptSource:
    r"""One source of prompts.

    Attributes:
        path: As :attr:`falign.data.DataSource.path`.
        texts: The prompts themselves, in place of a path.
        split: As :attr:`falign.data.DataSource.split`.
        template: The prompt with the row's columns in braces (``"{question}\nAnswer:"``); None uses
            the column ``prompt``, or ``messages`` up to the last turn that is not the assistant's.
        columns: New names for columns, of the prompt or for rewards: new name to the file's, where ``"outer.inner"`` is
            an entry of a column of objects (``{"answer": "reward_model.ground_truth"}``).
        chat: Whether a plain prompt is a user turn, to be rendered by the chat template. With None a plain prompt is
            refused if the tokenizer has a chat template.
        system: A system turn for every prompt, which makes it a conversation. A column ``system`` gives a row its own.
        ignore: As :attr:`falign.data.DataSource.ignore`.
        limit: Keep at most this many, the first usable ones.
        rows: As :attr:`falign.data.DataSource.rows`; ``path`` is then their name.
    """

    path: str | None = None
    texts: tuple[str, ...] = ()
    split: str = "train"
    template: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    chat: bool | None = None
    system: str | None = None
    ignore: tuple[str, ...] = ()
    limit: int | None = None
    rows: InMemory | None = None


@dataclass(frozen=True)
class PromptRow:
    """One prompt.

    Attributes:
        prompt: Text or turns, as rewards receive it.
        prompt_ids: Its token ids, up to where the completion begins.
        columns: The other columns of the row, for rewards.
        place: The row it came from, for messages.
        inputs: What the chat template read besides the turns.
    """

    prompt: Text
    prompt_ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    inputs: TemplateInputs = NO_INPUTS


@dataclass(frozen=True)
class PromptReport:
    """Counts of the prompts of a run.

    Attributes:
        num_train: Prompts to train on.
        num_eval: Prompts held out.
        cut: Prompts that lost tokens on the left.
        dropped: Prompts that were left out because they were too long.
        bad: Rows that could not be used.
        messages: The first messages about bad rows.
        shared_prompts: Held-out prompts that also occur in training.
    """

    num_train: int
    num_eval: int
    cut: int
    dropped: int
    bad: int
    messages: tuple[str, ...]
    shared_prompts: int = 0


RowCheck = Callable[[Sequence[PromptRow]], list[str | None]]
"""Returns for each row the reason why it cannot be used, or None."""


class PromptData(NamedTuple):
    """The prompts of a run, and the counts of their rows."""

    train: list[PromptRow]
    eval: list[PromptRow]
    report: PromptReport


def load_prompts(
    sources: Sequence[PromptSource],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    long_prompt: LengthPolicy = "error",
    bad_rows: BadRowPolicy = "error",
    skip_by: str | None = "bad_rows=skip",
    eval_sources: Sequence[PromptSource] = (),
    eval_size: int = 0,
    seed: int = 0,
    check: RowCheck | None = None,
) -> PromptData:
    """Read, tokenize and split prompts.

    Args:
        sources: One or more; their rows are concatenated.
        tokenizer: The model's tokenizer.
        max_length: Maximum number of tokens of a prompt.
        long_prompt: A longer one stops the run, is cut from the left, or drops the row.
        bad_rows: ``"error"`` stops at the first row that cannot be used; ``"skip"`` counts such rows.
        skip_by: How the user sets ``bad_rows="skip"``, for messages; None if it is not possible.
        eval_sources: Separate evaluation prompts.
        eval_size: In place of those, the number of rows to hold out. All rows of a prompt go to the same side.
        seed: Seed of the split.
        check: Finds further rows that cannot be used, which count as bad.

    Raises:
        ConfigError: Options contradict each other, or leave one side empty.
        DataError: A source or a row cannot be used.
    """
    if eval_sources and eval_size:
        raise ConfigError("eval_sources excludes eval_size; choose one way to evaluate.")
    require_choice("long_prompt", long_prompt, LengthPolicy)
    reader = _Reader(tokenizer, max_length, long_prompt, BadRows(bad_rows, skip_by=skip_by), check)
    train, held_out = reader.read_all(sources), reader.read_all(eval_sources)
    if eval_size:
        keys = [prompt_key(row.prompt) for row in train]
        chosen = held_out_prompts(keys, size=eval_size, seed=seed)
        held_out = [row for row, key in zip(train, keys, strict=True) if key in chosen]
        train = [row for row, key in zip(train, keys, strict=True) if key not in chosen]
    report = PromptReport(
        len(train),
        len(held_out),
        reader.cut,
        reader.dropped,
        reader.bad.count,
        tuple(reader.bad.messages),
        _num_shared(train, held_out),
    )
    return PromptData(train, held_out, report)


def _num_shared(train: Sequence[PromptRow], held_out: Sequence[PromptRow]) -> int:
    """Count held-out prompts that also occur in training, as the same text or as the same row in another template."""
    texts = {_last_text(row.prompt) for row in train}
    rows = {_row_key(row) for row in train} - {None}
    return sum(_last_text(row.prompt) in texts or _row_key(row) in rows for row in held_out)


def _last_text(prompt: Text) -> str:
    # Two prompts that differ only in a system turn, or in being text or a turn, are the same question.
    if isinstance(prompt, str):
        return prompt_key(prompt)
    return prompt_key("\n".join(turn["content"] for turn in prompt if turn["role"] != "system"))


def _row_key(row: PromptRow) -> str | None:
    return json.dumps(row.columns, sort_keys=True, default=str) if row.columns else None


@dataclass
class _Reader:
    tokenizer: Tokenizer
    max_length: int
    long_prompt: LengthPolicy
    bad: BadRows
    check: RowCheck | None
    cut: int = 0
    dropped: int = 0

    def read_all(self, sources: Sequence[PromptSource]) -> list[PromptRow]:
        return [row for source in sources for row in self._read(source)]

    def _read(self, source: PromptSource) -> list[PromptRow]:
        found: list[PromptRow] = []
        candidates = self._candidates(source)
        missing = source.limit
        while missing != 0 and (chosen := list(islice(candidates, missing))):
            found += chosen if self.check is None else self._checked(chosen, self.check)
            missing = None if source.limit is None else source.limit - len(found)
        if not found:
            reason = f" The first bad row: {self.bad.messages[0]}" if self.bad.messages else ""
            reason += f" {self.dropped} are longer than {self.max_length} tokens." if self.dropped else ""
            raise DataError(f"{source.path or 'texts'}: none of its rows is a usable prompt.{reason}")
        return found

    def _candidates(self, source: PromptSource) -> Iterator[PromptRow]:
        for row in _rows(source, self.bad):
            try:
                prompt = self._tokenized(row, source)
            except DataError as error:
                self.bad.add(error)
                continue
            if prompt is not None:
                yield prompt

    def _checked(self, rows: list[PromptRow], check: RowCheck) -> list[PromptRow]:
        usable = []
        for row, reason in zip(rows, check(rows), strict=True):
            if reason is None:
                usable.append(row)
            else:
                self.bad.add(DataError(f"{row.place}: {reason}. Correct the row or remove it."))
        return usable

    def _tokenized(self, row: Row, source: PromptSource) -> PromptRow | None:
        row = renamed(row, source.columns, ignore=source.ignore)
        prompt = _prompt_of(row, source)
        require_chat_choice(prompt, self.tokenizer, source.chat, row.place)
        inputs = template_inputs(row)
        if isinstance(prompt, str) and inputs != NO_INPUTS:
            raise DataError(
                f"{row.place}: the row has {TOOLS!r} or {OPTIONS!r} and a plain prompt, which no template renders; "
                f"set chat=True, or ignore={as_list([name for name in (TOOLS, OPTIONS) if name in row.fields])}."
            )
        ids = encode_prompt(prompt, self.tokenizer, row.place, inputs=inputs)
        if len(ids) > self.max_length:
            if self.long_prompt == "error":
                raise DataError(
                    f"{row.place}: the prompt has {len(ids)} tokens, and max_length={self.max_length}. "
                    "Raise it, or set `long_prompt` to cut (from the left) or drop."
                )
            if self.long_prompt == "drop":
                self.dropped += 1
                return None
            self.cut += 1
            ids = cut_left(ids, self.max_length, self.tokenizer.bos_token_id)
        used = {"prompt", "messages"} if source.template is None else set()
        columns = {name: value for name, value in row.fields.items() if name not in used}
        if is_verl(row.fields):
            columns |= verl_columns(row.fields, row.place)
        return PromptRow(prompt, ids, columns, row.place, inputs)


def _rows(source: PromptSource, bad: BadRows) -> Iterable[Row]:
    if (source.path is None) == (not source.texts):
        raise ConfigError("prompts: a source has either a path or texts; give one of the two.")
    if source.path is not None:
        return rows_of(source.path, source.rows, split=source.split, bad_rows=bad)
    return [Row(f"texts:{number}", {"prompt": text}) for number, text in enumerate(source.texts, start=1)]


def _prompt_of(row: Row, source: PromptSource) -> Text:
    prompt, system = _raw_prompt(row, source.template), _system(row, source)
    unread = {name: value for name, value in row.fields.items() if name not in ("prompt", "messages", "system")}
    if source.template is not None:  # the template names the columns of the question; the others are for rewards
        unread = {name: value for name, value in unread.items() if looks_like_system(name)}
    refuse_unread_prompts(unread, [prompt], row.place, present=row.fields, rewarded=True)
    if isinstance(prompt, str) and not (source.chat or system):
        if not prompt.strip():
            raise DataError(f"{row.place}: the prompt is empty; it must contain text: correct the row or remove it.")
        return prompt
    return prompt_turns(prompt, system, row.place)


def _system(row: Row, source: PromptSource) -> str | None:
    """Return the system turn: the row's, or the source's for all rows."""
    own = row.fields.get("system")
    if is_blank(own):
        return source.system
    if not isinstance(own, str):
        raise DataError(f"{row.place}: 'system' is {shown(own)}; it must be text.")
    if source.system is not None and source.system != own:
        raise DataError(
            f"{row.place}: the row has a column 'system' ({shown(own)}), and the source sets system for all rows; "
            "leave one of them out (ignore=[system] leaves out the column)."
        )
    return own


class _TextTemplate(Template):
    """Fill a template with a row's columns; refuse lists, objects and nulls."""

    @override
    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        if isinstance(value, str):
            value = parsed_conversation(value, place="", field=field_name)
        if isinstance(value, Mapping | list | tuple) or value is None:
            raise TypeError(f"{field_name!r}, which is {shown(value)} and not text")
        return value, first


def filled(template: str, fields: Mapping[str, Any], place: str) -> str:
    """Return a template filled with the columns of a row.

    Args:
        template: Text with columns in braces.
        fields: The columns.
        place: The row, for messages.

    Raises:
        ConfigError: The template cannot be read: braces that are not closed, or without a name.
        DataError: A column is missing, or is not text or a number.

    Example:
        >>> filled("{a} + {b}", {"a": 1, "b": "2"}, "rows:1")
        '1 + 2'
    """
    try:
        columns_of(template)
    except ValueError as error:
        raise ConfigError(
            f"the template {template!r} cannot be read ({error}): columns stand in braces by their names, as in "
            "{prompt}; write {{ and }} for braces of the text."
        ) from error
    try:
        return _TextTemplate().fill(template, fields)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{place}: the template {template!r} asks for {error}; the row has {sorted(fields)}."
        ) from error


def _raw_prompt(row: Row, template: str | None) -> Text:
    if template is not None:
        return filled(template, row.fields, row.place)
    if "prompt" in row.fields:
        return read_text(row.fields["prompt"], place=row.place, field="prompt")
    if "messages" in row.fields:
        turns: list[Message] = read_messages(row.fields["messages"], place=row.place, field="messages")
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return turns
    guess = guess_columns(row.fields, ("prompt",)).get("prompt", "question")
    raise DataError(
        f"{row.place}: there is no column 'prompt'; the row has {sorted(row.fields)}. Set the template of the prompt: "
        f"template='{{{guess}}}', or columns={as_mapping({'prompt': guess})}."
    )
