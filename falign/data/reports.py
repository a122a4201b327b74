"""Counts of a source's rows: read, bad, dropped, cut and kept."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from falign.choices import require_choice
from falign.data.examples import Example, prompt_key
from falign.data.tokenization import Tokenized
from falign.errors import DataError

__all__ = ["BadRowPolicy", "BadRows", "Notice", "SourceReport", "Tally"]


DRIFT = 0.05
"""Share of rows whose prompt changes when an answer follows, above which a warning is printed."""


class Notice(NamedTuple):
    """A line to print about data.

    Attributes:
        text: The line.
        is_warning: Whether it may point to a mistake.
    """

    text: str
    is_warning: bool = True


@dataclass(frozen=True)
class SourceReport:
    """Counts of rows of one source.

    Attributes:
        path: The source.
        format: The layout in which it was read.
        read: All rows, bad ones included.
        bad: Rows that cannot be used.
        kept: Rows that are left to train on.
        dropped: Rows left out by a length policy, or because nothing is preferred, by reason.
        drifting: Kept rows in which the last prompt tokens merge with the first characters of a completion.
        reopened: Kept rows in which the template opens an answer differently from its generation prompt.
        prompts_cut: Kept rows with a cut prompt.
        completions_cut: Completions in kept rows that were cut.
        duplicates: Usable rows that are equal to an earlier one.
        contradictions: Usable rows that contradict the preference of an earlier row with the same texts.
        messages: The messages of the first bad rows.
        prompts: Distinct prompts in the usable rows.
        unused: Columns of the source that were not read.
    """

    path: str
    format: str
    read: int
    bad: int
    kept: int
    dropped: Mapping[str, int]
    drifting: int
    reopened: int
    prompts_cut: int
    completions_cut: int
    duplicates: int
    contradictions: int
    messages: tuple[str, ...]
    prompts: int
    unused: tuple[str, ...] = ()

    @property
    def drift_share(self) -> float:
        """Share of kept rows in which the prompt changes when a completion follows."""
        return (self.drifting + self.reopened) / self.kept if self.kept else 0.0

    def remarks(self) -> list[str]:
        """Return likely mistakes: one prompt for all rows, columns that were not read, drifting prompts."""
        usable = self.kept + sum(self.dropped.values())
        found = []
        if usable > 1 and self.prompts == 1:
            found.append(f"{usable:,} rows have 1 distinct prompt")
        if self.unused:
            found.append(f"unused columns: {', '.join(self.unused)}")
        if self.drifting > DRIFT * self.kept:
            found.append(
                f"in {self.drifting:,} rows the prompt's last tokens merge with an answer: end prompts with a line "
                "break, not with a space"
            )
        if self.reopened > DRIFT * self.kept:
            found.append(
                f"in {self.reopened:,} rows the chat template opens the answer differently from its generation prompt, "
                "so training and sampling begin the answer differently: set model.chat_template"
            )
        return found

    def counts(self) -> list[tuple[str, int]]:
        """Return label and count, in the order to print."""
        return [
            ("rows read", self.read),
            ("bad rows", self.bad),
            *((f"dropped: {reason}", count) for reason, count in sorted(self.dropped.items())),
            ("rows kept", self.kept),
            ("prompts cut", self.prompts_cut),
            ("completions cut", self.completions_cut),
            ("prompts that merge with an answer", self.drifting),
            ("answers opened differently from the prompt", self.reopened),
            ("distinct prompts", self.prompts),
            ("duplicate rows", self.duplicates),
            ("contradicting rows", self.contradictions),
        ]


class Tally:
    """Count rows as they are read, for a ``SourceReport``.

    Args:
        bad_rows: Holds the count of bad rows.
    """

    def __init__(self, bad_rows: BadRows) -> None:
        self.bad_rows = bad_rows
        self.kept = 0
        self._counts: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._prompts: set[bytes] = set()
        self._preferences: dict[bytes, set[tuple[int, ...]]] = {}

    def add(self, example: Example, tokenized: Tokenized | None = None) -> None:
        """Count one usable row; ``tokenized`` is None without a tokenizer."""
        self._count_repetition(example)
        if tokenized is not None and tokenized.tree is None:
            self._dropped[str(tokenized.dropped)] += 1
            return
        self.kept += 1
        if tokenized is not None:
            self._counts["reopened"] += tokenized.reopened
            self._counts["drifting"] += tokenized.drifting_tokens > 0 and not tokenized.reopened
            self._counts["prompts_cut"] += tokenized.prompt_tokens_cut > 0
            self._counts["completions_cut"] += tokenized.completions_cut

    def report(self, path: str, format: str, *, unused: tuple[str, ...] = ()) -> SourceReport:
        """Return the counts so far, with the ``unused`` columns that the reader of the rows has found."""
        return SourceReport(
            path=path,
            format=format,
            read=self.bad_rows.count + self._dropped.total() + self.kept,
            bad=self.bad_rows.count,
            kept=self.kept,
            dropped=dict(self._dropped),
            drifting=self._counts["drifting"],
            reopened=self._counts["reopened"],
            prompts_cut=self._counts["prompts_cut"],
            completions_cut=self._counts["completions_cut"],
            duplicates=self._counts["duplicates"],
            contradictions=self._counts["contradictions"],
            messages=tuple(self.bad_rows.messages),
            prompts=len(self._prompts),
            unused=unused,
        )

    def _count_repetition(self, example: Example) -> None:
        # Sort the completions, so that a pair and its swapped copy have the same key. The order of their preferences
        # (values replaced by ranks) then tells a duplicate from a contradiction.
        preference = example.preference or (0.0,) * len(example.completions)
        ranked = sorted(zip(map(repr, example.completions), preference, strict=True))
        prompt = prompt_key(example.prompt)
        self._prompts.add(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest())
        text = "\n".join([prompt, *(completion for completion, _ in ranked)])
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        values = [value for _, value in ranked]
        order = tuple(sorted(set(values)).index(value) for value in values)
        if len(values) == 1:
            order = (int(values[0] > 0),)
        seen = self._preferences.setdefault(key, set())
        if order in seen:
            self._counts["duplicates"] += 1
        elif seen:
            self._counts["contradictions"] += 1
        seen.add(order)


BadRowPolicy = Literal["error", "skip"]

LENGTHS = re.compile(r"(?<![\w.])(?:max|long)_(?:length|completion_length|prompt|completion)(?=[=`])")
"""Names of a window's settings in messages; in a run file they stand in the same section as ``bad_rows``."""


class BadRows:
    """Receive the error of each bad row: raise it, or count it and keep the first messages.

    Args:
        policy: ``"error"`` raises; ``"skip"`` counts and continues.
        keep: Number of messages to keep.
        skip_by: How the user sets ``"skip"``, for messages; None if it is not possible.

    Attributes:
        count: Bad rows so far.
        messages: The messages of the first ``keep`` of them.
    """

    def __init__(self, policy: BadRowPolicy = "error", *, keep: int = 5, skip_by: str | None = None) -> None:
        require_choice("bad_rows", policy, BadRowPolicy)
        self._skip_by = skip_by
        self.policy = policy
        self.keep = keep
        self.count = 0
        self.messages: list[str] = []

    def add(self, error: DataError) -> None:
        """Raise or count one bad row.

        Raises:
            DataError: Under the policy ``"error"``.
        """
        if self.policy == "error":
            if self._skip_by is None:
                raise error
            section = self._skip_by.partition("bad_rows")[0]
            message = LENGTHS.sub(lambda name: section + name[0], str(error))
            raise DataError(f"{message} ({self._skip_by} leaves such rows out and counts them.)") from error
        self.count += 1
        if len(self.messages) < self.keep:
            self.messages.append(str(error))
