"""What was done to the rows of a source, counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from falign.data.bad_rows import BadRows
from falign.data.examples import Example, prompt_key
from falign.data.tokenization import Tokenized

__all__ = ["SourceReport", "Tally"]


@dataclass(frozen=True)
class SourceReport:
    """Counts of rows of one source.

    Attributes:
        path: The source.
        format: The layout it was read as.
        read: All rows that were read, bad ones included.
        bad: Rows that cannot be used.
        kept: Rows that are left to train on.
        dropped: Rows left out by a length policy, by reason.
        drifting: Kept rows whose last prompt tokens change once a completion follows.
        prompts_cut: Kept rows whose prompt was cut.
        completions_cut: Completions in kept rows that were cut.
        duplicates: Usable rows that are equal to an earlier one.
        contradictions: Usable rows that prefer otherwise than an earlier one with the same prompt and completions.
        messages: What was wrong with the first bad rows.
    """

    path: str
    format: str
    read: int
    bad: int
    kept: int
    dropped: Mapping[str, int]
    drifting: int
    prompts_cut: int
    completions_cut: int
    duplicates: int
    contradictions: int
    messages: tuple[str, ...]

    @property
    def drift_share(self) -> float:
        """Drifting rows as a share of the kept ones."""
        return self.drifting / self.kept if self.kept else 0.0

    def counts(self) -> list[tuple[str, int]]:
        """Return label and count, in the order to print."""
        return [
            ("rows read", self.read),
            ("bad rows", self.bad),
            *((f"dropped: {reason}", count) for reason, count in sorted(self.dropped.items())),
            ("rows kept", self.kept),
            ("prompts cut", self.prompts_cut),
            ("completions cut", self.completions_cut),
            ("rows whose prompt boundary drifts", self.drifting),
            ("duplicate rows", self.duplicates),
            ("contradicting rows", self.contradictions),
        ]


class Tally:
    """Counts rows as they pass, for a ``SourceReport``.

    Args:
        bad_rows: Holds the count of bad rows.
    """

    def __init__(self, bad_rows: BadRows) -> None:
        self.bad_rows = bad_rows
        self.kept = 0
        self._counts: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._preferences: dict[bytes, set[tuple[int, ...]]] = {}

    def add(self, example: Example, tokenized: Tokenized | None = None) -> None:
        """Count one usable row; ``tokenized`` is None where there is no tokenizer."""
        self._count_repetition(example)
        if tokenized is not None and tokenized.tree is None:
            self._dropped[str(tokenized.dropped)] += 1
            return
        self.kept += 1
        if tokenized is not None:
            self._counts["drifting"] += tokenized.drifting_tokens > 0
            self._counts["prompts_cut"] += tokenized.prompt_tokens_cut > 0
            self._counts["completions_cut"] += tokenized.completions_cut

    def report(self, path: str, format: str) -> SourceReport:
        """Return the counts so far."""
        return SourceReport(
            path=path,
            format=format,
            read=self.bad_rows.count + self._dropped.total() + self.kept,
            bad=self.bad_rows.count,
            kept=self.kept,
            dropped=dict(self._dropped),
            drifting=self._counts["drifting"],
            prompts_cut=self._counts["prompts_cut"],
            completions_cut=self._counts["completions_cut"],
            duplicates=self._counts["duplicates"],
            contradictions=self._counts["contradictions"],
            messages=tuple(self.bad_rows.messages),
        )

    def _count_repetition(self, example: Example) -> None:
        # Completions in one order whatever their order in the row, so that a swapped pair is found.
        preference = example.preference or (0.0,) * len(example.completions)
        ranked = sorted(zip(map(repr, example.completions), preference, strict=True))
        text = "\n".join([prompt_key(example.prompt), *(completion for completion, _ in ranked)])
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        values = [value for _, value in ranked]
        order = (
            tuple(sorted(set(values)).index(value) for value in values) if len(values) > 1 else (int(values[0] > 0),)
        )
        seen = self._preferences.setdefault(key, set())
        if order in seen:
            self._counts["duplicates"] += 1
        elif seen:
            self._counts["contradictions"] += 1
        seen.add(order)
