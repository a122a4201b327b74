"""Which layout a source has, and its rows read in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from falign.data.bad_rows import BadRows, nearest, require_choice
from falign.data.conversations import looks_like_hh
from falign.data.examples import Example
from falign.data.files import Row
from falign.data.formats import COLUMNS, FORMATS, PAIR, missing_column
from falign.data.sources import DataSource, read_rows
from falign.errors import ConfigError, DataError

__all__ = ["RowReader", "read_examples", "recognise"]

_UNSUPPORTED = ("tools", "images", "image", "videos", "chat_template_kwargs")
_PROMPT_LIKE = ("question", "query", "problem", "input")


def recognise(row: Row) -> str:
    """Return the layout of a row, told by its columns (and for ``hh`` by how the text begins).

    Raises:
        DataError: No layout has these columns.
    """
    columns = row.fields.keys()
    if columns >= {"chosen", "rejected"}:
        if "prompt" in columns:
            return "preference"
        if "conversations" in columns:
            return "sharegpt"
        if "instruction" in columns:
            return "alpaca"
        return _recognise_without_prompt(row)
    if columns >= {"prompt", "completions"} and columns & {"scores", "ranks"}:
        return "ranked"
    if columns >= {"prompt", "completion"} or "messages" in columns:
        return "unpaired" if "label" in columns else "completion"
    if columns & set(PAIR) or not columns & COLUMNS:
        raise missing_column(row, "rejected" if "chosen" in columns else "chosen")
    raise DataError(
        f"{row.place}: the columns {sorted(columns)} are no layout that falign knows; "
        "a pair needs prompt, chosen and rejected: rename them in the file, or with the option columns."
    )


def _recognise_without_prompt(row: Row) -> str:
    chosen = row.fields["chosen"]
    if not isinstance(chosen, str):
        return "implicit"
    if looks_like_hh(chosen):
        return "hh"
    # Two answers often begin with the same word: beside a column that looks like the prompt that is no prompt.
    guess = nearest("prompt", row.fields) or next((name for name in _PROMPT_LIKE if name in row.fields), None)
    if guess:
        raise DataError(
            f"{row.place}: there is no column 'prompt', but {guess!r} looks like one; set columns={{prompt: {guess}}}, "
            "or format=implicit if the prompt is the common beginning of 'chosen' and 'rejected'."
        )
    return "implicit"


class RowReader:
    """Reads the rows of one source, all in the same layout.

    Args:
        format: A name of ``FORMATS``, or ``"auto"``: the layout of the first row that has one.
        columns: falign's column name to the file's.
        chat: As :attr:`falign.data.DataSource.chat`; None leaves plain texts plain.

    Attributes:
        format: The layout; ``"auto"`` until the first row is read.
    """

    def __init__(
        self, format: str = "auto", columns: Mapping[str, str] | None = None, *, chat: bool | None = None
    ) -> None:
        require_choice("format", format, ["auto", *FORMATS])
        self.format = format
        self._auto = format == "auto"
        self._columns = dict(columns or {})
        self._chat = chat
        for name in self._columns:
            if name not in COLUMNS:
                raise ConfigError(
                    f"columns={self._columns}: {name!r} is not a column that falign reads. The left side is "
                    f"falign's name, one of {sorted(COLUMNS)}; the right side is the file's."
                )

    def read(self, row: Row) -> Example:
        """Return the example in a row.

        Raises:
            DataError: The row cannot be used.
        """
        row = self._renamed(row)
        for name in _UNSUPPORTED:
            if row.fields.get(name):
                raise DataError(
                    f"{row.place}: the column {name!r} is not supported, and leaving it out would change the prompt."
                )
        if self.format == "auto":
            self.format = recognise(row)
        example = FORMATS[self.format](row)
        if self._auto and (found := recognise(row)) != self.format:
            raise DataError(
                f"{row.place}: this row looks like format {found!r}, those before it like {self.format!r}; "
                "set format, or give all rows the same columns."
            )
        return example

    def _renamed(self, row: Row) -> Row:
        for name, column in self._columns.items():
            if column not in row.fields:
                raise DataError(
                    f"{row.place}: columns={{{name}: {column}}} names a column that is missing; "
                    f"the row has {sorted(row.fields)}."
                )
        kept = {name: value for name, value in row.fields.items() if name not in self._columns.values()}
        # A system column, also an empty one, makes a conversation of plain texts.
        turns = {"system": ""} if self._chat else {}
        return Row(row.place, turns | kept | {name: row.fields[column] for name, column in self._columns.items()})


def read_examples(
    source: DataSource, *, reader: RowReader | None = None, bad_rows: BadRows | None = None
) -> Iterator[Example]:
    """Yield the examples of a source.

    Args:
        source: Where they are, and in which layout (``source.limit`` is the caller's to apply).
        reader: Made from the source by default; its ``format`` afterwards says which layout was found.
        bad_rows: Takes the rows that cannot be used; by default the first one raises.
    """
    reader = reader or RowReader(source.format, source.columns, chat=source.chat)
    bad_rows = bad_rows or BadRows()
    for row in read_rows(source.path, split=source.split, bad_rows=bad_rows):
        try:
            example = reader.read(row)
        except DataError as error:
            bad_rows.add(error)
            continue
        yield example
