"""Recognition of the layout of a source, and reading of its rows in that layout."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from falign.choices import require_choice, shown
from falign.data.chat_template import NO_INPUTS
from falign.data.column_names import as_list, as_mapping, guess_columns, looks_like_prompt, looks_like_system, renamed
from falign.data.conversations import Text, looks_like_hh, parsed_conversation
from falign.data.examples import Example
from falign.data.files import Row
from falign.data.foreign_formats import INSIDE, foreign_format, is_verl
from falign.data.formats import COLUMNS, FORMATS, PAIR, columns_read, missing_column
from falign.data.reports import BadRows
from falign.data.side_columns import OPTIONS, TOOLS, WEIGHT, row_weight, template_inputs
from falign.data.sources import DataSource, rows_of
from falign.data.text_values import is_blank, parsed_list
from falign.data.token_weights import weights_in
from falign.errors import ConfigError, DataError

__all__ = ["RowReader", "read_examples", "recognize"]

_UNSUPPORTED = ("images", "image", "videos")


def recognize(row: Row) -> str:
    """Return the layout of a row, inferred from its columns (for ``hh``, from the beginning of the text).

    Raises:
        DataError: No layout has these columns.
    """
    columns = row.fields.keys()
    if (foreign := foreign_format(row)) is not None:
        return foreign
    if columns >= {"chosen", "rejected"}:
        by_prompt = {"prompt": "preference", "conversations": "sharegpt", "instruction": "alpaca"}
        return next((layout for name, layout in by_prompt.items() if name in columns), None) or _without_prompt(row)
    if columns >= {"prompt", "completions"} and columns & {"scores", "ranks"}:
        return "ranked"
    if columns >= {"prompt", "completion"} or "messages" in columns:
        return "unpaired" if "label" in columns else "completion"
    if columns >= {"instruction", "completion"}:
        return "alpaca"
    if is_verl(row.fields):
        raise DataError(
            f"{row.place}: this is a prompt without a completion, in verl's layout: give the source to an online run "
            "(prompts.train), which samples completions."
        )
    demonstration = _demonstration(row)
    if columns & set(PAIR) or not (columns & COLUMNS or demonstration):
        raise missing_column(row, "rejected" if "chosen" in columns else "chosen")
    remedy = f"set columns={as_mapping(demonstration)}" if demonstration else "set `columns`"
    raise DataError(
        f"{row.place}: the columns {sorted(columns)} are not a layout that falign knows. A pair needs prompt, chosen "
        f"and rejected; a demonstration needs prompt and completion, or messages: {remedy}, or rename them in the file."
    )


def _demonstration(row: Row) -> dict[str, str]:
    """Guess the ``columns`` that make a row a demonstration; empty if they cannot be inferred."""
    if "conversations" in row.fields:
        return {"messages": "conversations"}
    wanted = ("completion",) if row.fields.keys() & {"prompt", "instruction"} else ("prompt", "completion")
    guesses = guess_columns(row.fields, wanted)
    return guesses if len(guesses) == len(wanted) else {}


def _without_prompt(row: Row) -> str:
    chosen = parsed_conversation(row.fields["chosen"], place=row.place, field="chosen")
    if not isinstance(chosen, str):
        return "implicit"
    if looks_like_hh(chosen):
        return "hh"
    # Two answers often begin with the same word. If another column may hold the prompt, that word is not the prompt.
    others = {name: value for name, value in row.fields.items() if name not in {*PAIR, "system"}}
    guesses = guess_columns(others, ("prompt", "system"))
    texts = [name for name, value in others.items() if isinstance(value, str) and len(value.split()) > 1]
    guess = guesses.get("prompt") or next((name for name in texts if name not in guesses.values()), None)
    if guess:
        looks = "looks like one" if "prompt" in guesses else "holds text"
        columns = as_mapping({**guesses, "prompt": guess})
        raise DataError(
            f"{row.place}: there is no column 'prompt', but {guess!r} {looks}; set columns={columns}, "
            "or format=implicit if the prompt is the common beginning of 'chosen' and 'rejected'."
        )
    return "implicit"


class RowReader:
    """Read the rows of one source, all in the same layout.

    Args:
        format: A name of ``FORMATS``, or ``"auto"``: the layout of the first row that has one.
        columns: The file's column name by falign's.
        chat: As :attr:`falign.data.DataSource.chat`; None leaves plain texts plain.
        ignore: As :attr:`falign.data.DataSource.ignore`.

    Attributes:
        format: The layout; ``"auto"`` until the first row is read.
    """

    def __init__(
        self,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        *,
        chat: bool | None = None,
        ignore: Collection[str] = (),
    ) -> None:
        require_choice("format", format, ["auto", *FORMATS])
        self.format = format
        self._auto = format == "auto"
        self._columns = dict(columns or {})
        self._chat = chat
        self._ignore = frozenset(ignore)
        self._unused: dict[str, None] = {}
        self._weighted: bool | None = None
        for name in self._columns:
            if name not in COLUMNS:
                raise ConfigError(
                    f"columns={as_mapping(self._columns)}: {name!r} is not a column that falign reads. The left side "
                    f"is falign's name, one of {sorted(COLUMNS)}; the right side is the file's."
                )

    @classmethod
    def of(cls, source: DataSource) -> RowReader:
        """Return the reader of a source."""
        return cls(source.format, source.columns, chat=source.chat, ignore=source.ignore)

    @property
    def unused(self) -> tuple[str, ...]:
        """The columns of the rows so far that were not read, in their order."""
        return tuple(self._unused)

    def read(self, row: Row) -> Example:
        """Return the example in a row.

        Raises:
            DataError: The row cannot be used.
        """
        file = row.fields
        row = renamed(row, self._columns, ignore=self._ignore)
        for name in _UNSUPPORTED:
            if not is_blank(row.fields.get(name)):
                raise DataError(
                    f"{row.place}: the column {name!r} is not supported, and leaving it out would change the prompt."
                )
        if self.format == "auto":
            self.format = recognize(row)
        example = FORMATS[self.format](self._turned(row))
        inputs = template_inputs(row)
        if not example.conversational and inputs != NO_INPUTS:
            raise DataError(
                f"{row.place}: the row has {TOOLS!r} or {OPTIONS!r} and plain texts, which no template renders; "
                f"set chat=True, or ignore={as_list([name for name in (TOOLS, OPTIONS) if name in row.fields])}."
            )
        weights = weights_in(row, example.completions)
        example = replace(example, weights=weights, weight=self._weight(row), inputs=inputs)
        if self._auto and (found := recognize(row)) != self.format:
            raise DataError(
                f"{row.place}: this row looks like format {found!r}, those before it like {self.format!r}; "
                "set format, or give all rows the same columns."
            )
        unread = {name: row.fields[name] for name in row.fields.keys() - columns_read(self.format, row)}
        if self._auto or self.format != "implicit" or example.conversational:
            refuse_unread_prompts(unread, [example.prompt, *example.completions], row.place, present=row.fields)
        self._unused |= dict.fromkeys(name for name in row.fields if name in unread)
        self._unused |= dict.fromkeys(_inside(self.format, row))
        return replace(example, columns={**file, **row.fields})

    def _weight(self, row: Row) -> float:
        has_one = WEIGHT in row.fields
        if self._weighted is None:
            self._weighted = has_one
        if has_one != self._weighted:
            has, others = ("a", "those before it have none") if has_one else ("no", "those before it have one")
            raise DataError(
                f"{row.place}: the row has {has} column {WEIGHT!r}, and {others}; give every row of a source a weight, "
                f"or leave the column out (ignore={as_list([WEIGHT])})."
            )
        return row_weight(row.fields[WEIGHT], row.place) if has_one else 1.0

    def _turned(self, row: Row) -> Row:
        # A system column, even an empty one, turns plain texts into a conversation.
        return Row(row.place, {"system": "", **row.fields}) if self._chat else row


def _inside(format: str, row: Row) -> list[str]:
    """Return the parts of the columns of a row that its layout leaves out."""
    if format not in INSIDE:
        return []
    column, key = INSIDE[format]
    entries = parsed_list(row.fields[column])
    return [f"{column}.{key}"] if any(not is_blank(each.get(key)) for each in entries) else []


def refuse_unread_prompts(
    unread: Mapping[str, Any],
    read: Collection[Text],
    place: str,
    *,
    present: Mapping[str, Any],
    rewarded: bool = False,
) -> None:
    """Refuse a row with its prompt, or a part of it, in a column that was not read.

    A column that only repeats text that was read is accepted.

    Args:
        unread: The columns that were not read.
        read: The texts and conversations that were read.
        place: The row, for messages.
        present: All columns of the row.
        rewarded: Whether unread columns go to rewards, which may read a question: then only a system turn and a
            conversation are refused.

    Raises:
        DataError: There is such a column; the message names it and the field to set.
    """
    # Compared without white space: a column may repeat the text with other line breaks.
    all_read = "".join("".join(_contents(text)) for text in read)
    all_read = "".join(all_read.split())
    for name, value in unread.items():
        kind = "system" if looks_like_system(name) else "prompt" if looks_like_prompt(name) else None
        if kind is None or is_blank(value) or isinstance(value, bool | int | float):
            continue
        if rewarded and kind == "prompt" and not isinstance(value, list):
            continue
        missing = next((text for text in _contents(value) if "".join(text.split()) not in all_read), None)
        if missing is not None:
            part = "a system turn" if kind == "system" else "the prompt, or a part of it,"
            remedy = f"columns={as_mapping({kind: name})}"
            if not is_blank(present.get(kind)):
                remedy = f"{remedy} and ignore={as_list([kind])} if it stands for {kind!r}; join both in the file; "
                remedy += f"or set ignore={as_list([name])} if it is not part of the prompt."
            else:
                remedy += f", or ignore={as_list([name])} if it is not part of the prompt."
            raise DataError(
                f"{place}: the column {name!r} looks like {part} and is not read ({shown(missing)}); set {remedy}"
            )


def _contents(value: Any) -> list[str]:
    """Return the texts in a value; for a conversation, the contents of its turns."""
    value = parsed_conversation(value, place="", field="") if isinstance(value, str) else value
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        inner = value.get("content", value.get("value", list(value.values())))
        return _contents(inner)
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _contents(inner)]
    return []


def read_examples(
    source: DataSource, *, reader: RowReader | None = None, bad_rows: BadRows | None = None
) -> Iterator[Example]:
    """Yield the examples of a source.

    Args:
        source: Location and layout of the rows (the caller applies ``source.limit``).
        reader: By default the reader of the source; its ``format`` tells the layout afterwards.
        bad_rows: Receives the rows that cannot be used; by default the first one raises.
    """
    reader = reader or RowReader.of(source)
    bad_rows = bad_rows or BadRows()
    for row in rows_of(source.path, source.rows, split=source.split, bad_rows=bad_rows):
        try:
            example = reader.read(row)
        except DataError as error:
            bad_rows.add(error)
            continue
        yield example
