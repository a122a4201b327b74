"""Reading and tokenization of a source, row by row."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from typing import NamedTuple

from falign.data.blocks import BLOCK, Blocks, Processing, Result
from falign.data.chat_template import Tokenizer
from falign.data.examples import Example, require_preference
from falign.data.recognition import RowReader, read_examples
from falign.data.rendering import require_chat_choice
from falign.data.reports import BadRows
from falign.data.sources import DataSource
from falign.data.tokenization import Tokenized, tokenize
from falign.data.windows import Window
from falign.errors import DataError, FalignError

__all__ = ["TokenizedRow", "read_tokenized"]

PLAIN = Processing()


class TokenizedRow(NamedTuple):
    """A usable row, as text and as token ids."""

    example: Example
    tokenized: Tokenized


def read_tokenized(
    source: DataSource,
    tokenizer: Tokenizer,
    *,
    stop_token_ids: Collection[int],
    window: Window,
    preferences: bool = False,
    reader: RowReader | None = None,
    bad_rows: BadRows | None = None,
    processing: Processing = PLAIN,
) -> Iterator[TokenizedRow]:
    """Yield the usable rows of a source lazily.

    Args:
        source: Location and layout of the rows (the caller applies ``source.limit``).
        tokenizer: The model's tokenizer.
        stop_token_ids: All tokens at which the model's generation ends, besides the tokenizer's EOS.
        window: Maximum lengths, and the policies for longer rows; a dropped row is yielded without a tree.
        preferences: Whether a row must prefer one of its completions to another.
        reader: As for ``read_examples``.
        bad_rows: Receives the rows that cannot be used; by default the first one raises.
        processing: Number of processes, and a cache on disk.

    Raises:
        ConfigError: A required chat template or stop token is missing; or plain texts need ``chat`` to be set.
        DataError: The source, or under the policy ``"error"`` a row, cannot be used.
    """
    bad_rows = bad_rows or BadRows()
    rows = _checked(read_examples(source, reader=reader, bad_rows=bad_rows), tokenizer, source, preferences)
    if processing.plain:
        results = ((each, _tokenized(each, tokenizer, stop_token_ids, window)) for each in rows)
    else:
        blocks = Blocks(tokenizer, stop_token_ids=stop_token_ids, window=window, processing=processing)
        results = _in_blocks(rows, blocks, limit=source.limit)
    for (example, _), result in results:
        if isinstance(result, DataError):
            bad_rows.add(result)
        else:
            yield TokenizedRow(example, result)


class _Checked(NamedTuple):
    """A row, and what it is without being tokenized: left out, or bad; None for all others."""

    example: Example
    known: Result | None


def _checked(
    examples: Iterator[Example], tokenizer: Tokenizer, source: DataSource, preferences: bool
) -> Iterator[_Checked]:
    for example in examples:
        if example.left_out is not None:
            yield _Checked(example, Tokenized(None, dropped=example.left_out))
            continue
        require_chat_choice(example.prompt, tokenizer, source.chat, example.place)
        try:
            if preferences:
                require_preference(example)
        except DataError as error:
            yield _Checked(example, error)
            continue
        yield _Checked(example, None)


def _tokenized(row: _Checked, tokenizer: Tokenizer, stop_token_ids: Collection[int], window: Window) -> Result:
    if row.known is not None:
        return row.known
    try:
        return tokenize(row.example, tokenizer, stop_token_ids=stop_token_ids, window=window)
    except DataError as error:
        return error


def _in_blocks(rows: Iterator[_Checked], blocks: Blocks, *, limit: int | None) -> Iterator[tuple[_Checked, Result]]:
    """Yield the rows with their results, as they would come one by one."""
    kept = 0
    with blocks.open():
        while limit is None or kept < limit:
            # Not more rows than the limit still needs: a bad row behind them must not count.
            size = BLOCK if limit is None else min(BLOCK, limit - kept)
            block, problem = _taken(rows, size)
            found = iter(blocks.tokenized([row.example for row in block if row.known is None]))
            for row in block:
                result = next(found) if row.known is None else row.known
                kept += isinstance(result, Tokenized) and result.tree is not None
                yield row, result
            if problem is not None:
                raise problem
            if len(block) < size:
                return


def _taken(rows: Iterator[_Checked], size: int) -> tuple[list[_Checked], FalignError | None]:
    """Return the next rows, and the error at which reading them stopped, which comes after their own."""
    block: list[_Checked] = []
    try:
        block.extend(islice(rows, size))
    except FalignError as error:
        return block, error
    return block, None
