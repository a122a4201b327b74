"""Check of a data source before a run: counts, lengths, and the reasons for bad rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from falign.data.chat_template import Tokenizer
from falign.data.conversations import Text, read_text
from falign.data.examples import Example, prompt_turns, require_preference
from falign.data.foreign_formats import VERL, is_verl, verl_columns
from falign.data.recognition import RowReader, read_examples
from falign.data.rendering import require_chat_choice
from falign.data.reports import BadRows, SourceReport, Tally
from falign.data.side_columns import template_inputs
from falign.data.sources import DataSource, rows_of
from falign.data.tokenization import Tokenized, encode, encode_prompt, fitted
from falign.data.windows import Window
from falign.errors import DataError

__all__ = ["DataReport", "Lengths", "check"]


@dataclass(frozen=True)
class Lengths:
    """Percentiles (nearest rank) of the lengths of one kind of text.

    Attributes:
        name: ``"prompt"``, ``"chosen"`` or ``"rejected"``.
        count: Number of texts.
        median: The 50th percentile.
        p90: The 90th percentile.
        p99: The 99th percentile.
        longest: The maximum.
    """

    name: str
    count: int
    median: int
    p90: int
    p99: int
    longest: int

    @classmethod
    def of(cls, name: str, values: Sequence[int]) -> Lengths:
        """Return the percentiles of a non-empty list.

        Example:
            >>> Lengths.of("prompt", range(1, 201))
            Lengths(name='prompt', count=200, median=100, p90=180, p99=198, longest=200)
        """
        ordered = sorted(values)
        # Nearest rank: the ceil(n p/100)-th value; -(-a // b) is the ceiling of a/b.
        median, p90, p99 = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 90, 99))
        return cls(name, len(ordered), median, p90, p99, ordered[-1])


@dataclass(frozen=True)
class DataReport:
    """The findings of ``check``.

    Attributes:
        source: Counts, and the messages of the first bad rows.
        unit: The unit of lengths, ``"tokens"`` or ``"words"``.
        lengths: Before anything is cut, dropped or refused for its length, for each kind of text that occurs. In a
            ranked list, ``chosen`` is the best completion; tokens of a completion include its stop token.
    """

    source: SourceReport
    unit: str
    lengths: tuple[Lengths, ...]

    @property
    def ok(self) -> bool:
        """True if a run with ``bad_rows="error"`` would start on this source."""
        return self.refusal() is None

    def refusal(
        self, *, skips: bool = False, section: str = "", skip_by: str | None = None, max_drift: float | None = None
    ) -> DataError | None:
        """Return why a run would not start on this source; None if it would.

        Args:
            skips: Whether the run leaves bad rows out.
            section: Stands before the names of arguments in messages, such as ``data.`` of a run file.
            skip_by: Setting with which a user leaves bad rows out, for messages; by default the argument's name.
            max_drift: Highest allowed share of rows whose last prompt tokens change when a completion follows.
        """
        source = self.source
        if not source.read:
            return DataError(f"{source.path} has no rows: give a file with at least one.")
        if source.bad and not (skips and source.kept):
            # Skipping bad rows helps only if good ones remain.
            skip_by = f"{section}bad_rows=skip" if skip_by is None else skip_by
            remedy = f"fix the file, or set {skip_by} to leave them out" if source.kept else "fix the file"
            return DataError(f"{source.path}: {source.bad} bad {'row' if source.bad == 1 else 'rows'}; {remedy}.")
        if not source.kept:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in source.dropped.items())
            return DataError(
                f"{source.path}: the window drops all {source.read} rows ({reasons}): raise `{section}max_length`, or "
                f"cut long texts ({section}long_prompt=cut, {section}long_completion=cut)."
            )
        if max_drift is not None and source.drift_share > max_drift:
            return DataError(
                f"{source.path}: in {source.drift_share:.1%} of the rows the last prompt tokens change when a "
                f"completion follows (at most {max_drift:.1%} are allowed): end prompts with a line break or a "
                "template's header."
            )
        return None

    def counts(self) -> list[tuple[str, int]]:
        """Return label and count, in the order to print."""
        return self.source.counts()

    def length_rows(self) -> list[tuple[str, int, int, int, int, int]]:
        """Return name, count, median, 90th and 99th percentile and maximum, in the order to print."""
        return [(each.name, each.count, each.median, each.p90, each.p99, each.longest) for each in self.lengths]


def check(
    source: str | DataSource,
    *,
    tokenizer: Tokenizer | None = None,
    stop_token_ids: Collection[int] = (),
    window: Window | None = None,
    preferences: bool = False,
    keep: int = 10,
) -> DataReport:
    """Read a source as a run would, and report on all its rows instead of stopping at a bad one.

    Args:
        source: A path, or a source with options.
        tokenizer: The model's tokenizer; without it, lengths are in words, and boundaries and the window are not
            checked.
        stop_token_ids: As in ``load_preferences``.
        window: The run's lengths and policies; a row at which they would stop the run is a bad row.
        preferences: Whether a row must prefer one of its completions to another, as pairwise objectives need.
        keep: Number of messages about bad rows to keep.

    Raises:
        ConfigError: An option cannot work, such as conversations without a chat template.
        DataError: The source cannot be read.
    """
    source = DataSource(source) if isinstance(source, str) else source
    bad_rows = BadRows("skip", keep=keep)
    if source.format == "auto" and _holds_verl(source):
        return _check_prompts(source, tokenizer, window, bad_rows)
    reader = RowReader.of(source)
    tally = Tally(bad_rows)
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}

    def record(example: Example, numbers: list[int]) -> None:
        for name, number in zip(_names(example), numbers, strict=True):
            lengths[name].append(number)

    for example in read_examples(source, reader=reader, bad_rows=bad_rows):
        tokenized = None
        if example.left_out is not None:
            tally.add(example, Tokenized(None, dropped=example.left_out))
            continue
        if tokenizer is not None:
            require_chat_choice(example.prompt, tokenizer, source.chat, example.place)
        try:
            if preferences:
                require_preference(example)
            if tokenizer is None:
                record(example, [_num_words(text) for text in (example.prompt, *example.completions)])
            else:
                encoded = encode(example, tokenizer, stop_token_ids=stop_token_ids)
                tree = encoded.tree
                record(example, [len(ids) for ids in (tree.prompt_ids, *tree.completion_ids)])
                tokenized = Tokenized(tree, encoded.drifting_tokens, encoded.reopened)
                if window is not None:
                    tokenized = fitted(encoded, window, bos_token_id=tokenizer.bos_token_id)
        except DataError as error:
            bad_rows.add(error)
            continue
        tally.add(example, tokenized)
        if tally.kept == source.limit:
            break
    return DataReport(
        source=tally.report(source.path, reader.format, unused=reader.unused),
        unit="words" if tokenizer is None else "tokens",
        lengths=tuple(Lengths.of(name, values) for name, values in lengths.items() if values),
    )


def _holds_verl(source: DataSource) -> bool:
    first = next(iter(rows_of(source.path, source.rows, split=source.split, bad_rows=BadRows("skip"))), None)
    return first is not None and is_verl(first.fields)


def _check_prompts(
    source: DataSource, tokenizer: Tokenizer | None, window: Window | None, bad_rows: BadRows
) -> DataReport:
    """Report on the prompts of verl, which have no completions, and on their ground truths."""
    tally, lengths, unused = Tally(bad_rows), list[int](), dict[str, None]()
    for row in rows_of(source.path, source.rows, split=source.split, bad_rows=bad_rows):
        try:
            verl_columns(row.fields, row.place)
            prompt = prompt_turns(read_text(row.fields["prompt"], place=row.place, field="prompt"), None, row.place)
            example = Example(prompt, (), None, row.place, inputs=template_inputs(row))
            number = _num_words(prompt)
            if tokenizer is not None:
                number = len(encode_prompt(prompt, tokenizer, row.place, inputs=example.inputs))
            if tokenizer is not None and window is not None and number >= window.max_length:
                raise DataError(f"{row.place}: the prompt has {number} tokens, and max_length={window.max_length}.")
        except DataError as error:
            bad_rows.add(error)
            continue
        tally.add(example)
        lengths.append(number)
        unused |= dict.fromkeys(name for name in row.fields if name not in ("prompt", "reward_model", "data_source"))
        if tally.kept == source.limit:
            break
    return DataReport(
        source=tally.report(source.path, VERL, unused=tuple(unused)),
        unit="words" if tokenizer is None else "tokens",
        lengths=(Lengths.of("prompt", lengths),) if lengths else (),
    )


def _num_words(text: Text) -> int:
    return len(text.split()) if isinstance(text, str) else sum(len(turn["content"].split()) for turn in text)


def _names(example: Example) -> list[str]:
    values = example.preference or (1.0,)
    # A single completion is chosen if its label is true; among several, the best is chosen.
    chosen = max(values) if len(values) > 1 else 1.0
    return ["prompt", *("chosen" if value == chosen else "rejected" for value in values)]
