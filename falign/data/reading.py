"""Reading and tokenization of a source, row by row."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from falign.data.chat_template import Tokenizer
from falign.data.examples import Example, require_preference
from falign.data.recognition import RowReader, read_examples
from falign.data.rendering import require_chat_choice
from falign.data.reports import BadRows
from falign.data.sources import DataSource
from falign.data.tokenization import Tokenized, tokenize
from falign.data.windows import Window
from falign.errors import DataError

__all__ = ["TokenizedRow", "read_tokenized"]


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

    Raises:
        ConfigError: A required chat template or stop token is missing; or plain texts need ``chat`` to be set.
        DataError: The source, or under the policy ``"error"`` a row, cannot be used.
    """
    bad_rows = bad_rows or BadRows()
    for example in read_examples(source, reader=reader, bad_rows=bad_rows):
        if example.left_out is not None:
            yield TokenizedRow(example, Tokenized(None, dropped=example.left_out))
            continue
        require_chat_choice(example.prompt, tokenizer, source.chat, example.place)
        try:
            if preferences:
                require_preference(example)
            tokenized = tokenize(example, tokenizer, stop_token_ids=stop_token_ids, window=window)
        except DataError as error:
            bad_rows.add(error)
            continue
        yield TokenizedRow(example, tokenized)
