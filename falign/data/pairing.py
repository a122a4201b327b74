"""Preference data from samples: pairs, ranked lists and best-of-n demonstrations, with a count of all that is left out.

One source: completions of a prompt are compared by their rewards. Two sources: a completion of the first is chosen over
one of the second, with or without rewards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from falign.data.samples import Sample, completion_of, same_prompt
from falign.errors import DataError

__all__ = ["LEFT_OUT", "PairLayout", "Paired", "Pairing"]

PairLayout = Literal["pairs", "all_pairs", "ranked", "best"]

LEFT_OUT: dict[str, str] = {
    "empty": "empty completions",
    "truncated": "completions that hit the maximum length",
    "duplicates": "completions equal to an earlier one of the prompt",
    "alone": "prompts with a single completion",
    "ties": "prompts with a tie, or pairs of the two files with one",
    "worse": "pairs in which the first file's completion has the lower reward",
    "equal": "pairs of equal completions",
    "unmatched_prompts": "prompts in only one of the two files",
    "unmatched_completions": "completions without a partner in the other file",
}
"""Reasons for which a completion, a prompt or a pair is left out, with the words of a table."""


class Paired(NamedTuple):
    """Rows of preference data, and what was left out.

    Attributes:
        rows: The rows, in a format that :func:`falign.data.read_examples` reads.
        prompts: Prompts in the samples.
        completions: Completions in the samples.
        prompts_used: Prompts that are in the rows.
        left_out: Number by reason, without zeros; see :data:`LEFT_OUT`.
        first: Place of the first by reason.
    """

    rows: list[dict[str, Any]]
    prompts: int
    completions: int
    prompts_used: int
    left_out: dict[str, int]
    first: dict[str, str]


@dataclass(frozen=True)
class Pairing:
    """Rules by which samples become preference data.

    Attributes:
        layout: ``pairs``: the best and the worst completion of each prompt; ``all_pairs``: every pair that differs in
            reward; ``ranked``: all completions with their rewards; ``best``: the best one alone. Of two sources
            ``pairs`` joins the i-th completions of a prompt, and ``all_pairs`` each one with each.
        min_margin: Smaller differences in reward are ties; 0 accepts every difference.
        keep_truncated: Keep completions that ended at the maximum length, which have no end to learn.
        allow_unmatched: Of two sources: leave out, and count, what only one of them has; False refuses it.
    """

    layout: PairLayout = "pairs"
    min_margin: float = 0.0
    keep_truncated: bool = False
    allow_unmatched: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_margin < math.inf:
            raise ValueError(f"min_margin={self.min_margin} must be a finite number ≥ 0.")

    def of_one(self, samples: Iterable[Sample]) -> Paired:
        """Return rows that compare the completions of each prompt by reward.

        Args:
            samples: With rewards.

        Raises:
            DataError: A completion has no reward.
        """
        made = _Made(self)
        groups = made.groups(_with_rewards(samples))
        for group in groups.values():
            if usable := made.distinct(made.usable(group)):
                self._compare(usable, made)
        return made.paired(prompts=len(groups))

    def of_two(self, chosen: Iterable[Sample], rejected: Iterable[Sample]) -> Paired:
        """Return pairs of completions of the same prompts: chosen from one source and rejected from the other.

        If both have rewards, only pairs are kept in which the chosen one's is higher.

        Args:
            chosen: Completions of the better model.
            rejected: Completions of the worse model.

        Raises:
            DataError: Only one source has rewards, a prompt or a completion has no partner and `allow_unmatched` is
                False.
            ValueError: The layout is of one source.
        """
        if self.layout not in ("pairs", "all_pairs"):
            raise ValueError(f"layout={self.layout!r} is of one source: choose 'pairs' or 'all_pairs'.")
        made = _Made(self)
        first, second = list(chosen), list(rejected)
        _require_rewards_of_both(first, second)
        better, worse = made.groups(first), made.groups(second)
        keys = dict.fromkeys([*better, *worse])
        for key in keys:
            ours, theirs = better.get(key, []), worse.get(key, [])
            if ours and theirs:
                self._join(ours, theirs, made)
            else:
                made.unmatched("unmatched_prompts", (ours or theirs)[0], 1)
        return made.paired(prompts=len(keys))

    def _compare(self, group: Sequence[Sample], made: _Made) -> None:
        rewards = [_reward_of(sample) for sample in group]
        best, worst = (group[rewards.index(extreme(rewards))] for extreme in (max, min))
        if self.layout == "best":
            made.add([{"prompt": best.prompt, "completion": completion_of(best), "reward": best.reward}])
        elif len(group) < 2:
            made.leave_out("alone", group[0])
        elif not self._differ(best, worst):
            made.leave_out("ties", group[0])
        elif self.layout == "pairs":
            made.add([_pair(best, worst)])
        elif self.layout == "all_pairs":
            made.add([_pair(a, b) for a in group for b in group if self._differ(a, b)])
        else:
            texts = [completion_of(sample) for sample in group]
            made.add([{"prompt": best.prompt, "completions": texts, "scores": rewards}])

    def _join(self, ours: Sequence[Sample], theirs: Sequence[Sample], made: _Made) -> None:
        if self.layout == "all_pairs":
            ours, theirs = (made.distinct(made.usable(group)) for group in (ours, theirs))
            pairs = [(a, b) for a in ours for b in theirs]
        else:
            joined = list(zip(ours, theirs, strict=False))
            longer = ours if len(ours) > len(theirs) else theirs
            if extra := longer[len(joined) :]:
                made.unmatched("unmatched_completions", extra[0], len(extra))
            pairs = [pair for pair in joined if len(made.usable(pair)) == len(pair)]
        rows = []
        for a, b in pairs:
            if a.completion == b.completion:
                made.leave_out("equal", a)
            elif a.reward is None or self._differ(a, b):
                rows.append(_pair(a, b))
            else:
                made.leave_out("worse" if self._differ(b, a) else "ties", a)
        made.add(rows)

    def _differ(self, a: Sample, b: Sample) -> bool:
        difference = _reward_of(a) - _reward_of(b)
        return difference > 0 and difference >= self.min_margin


class _Made:
    """Rows so far, with the counts of what was left out."""

    def __init__(self, rules: Pairing) -> None:
        self.rules = rules
        self.rows: list[dict[str, Any]] = []
        self.num_completions = self.num_used = 0
        self.left_out: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def groups(self, samples: Iterable[Sample]) -> dict[str, list[Sample]]:
        """Return the completions by prompt, in order."""
        found: dict[str, list[Sample]] = {}
        for sample in samples:
            found.setdefault(same_prompt(sample.prompt), []).append(sample)
            self.num_completions += 1
        return found

    def usable(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the completions that can be trained on."""
        found = []
        for sample in samples:
            if not sample.completion.strip():
                self.leave_out("empty", sample)
            elif sample.truncated and not self.rules.keep_truncated:
                self.leave_out("truncated", sample)
            else:
                found.append(sample)
        return found

    def distinct(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return each text once, with the mean of its rewards: a judge may give equal texts different ones."""
        found: dict[str, list[Sample]] = {}
        for sample in samples:
            found.setdefault(sample.completion, []).append(sample)
            if len(found[sample.completion]) > 1:
                self.leave_out("duplicates", sample)
        return [_mean(equal) for equal in found.values()]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the rows of one prompt."""
        self.rows += rows
        self.num_used += bool(rows)

    def leave_out(self, reason: str, sample: Sample, count: int = 1) -> None:
        """Count what is left out."""
        self.left_out[reason] = self.left_out.get(reason, 0) + count
        self.first.setdefault(reason, sample.place)

    def unmatched(self, reason: str, sample: Sample, count: int) -> None:
        """Count what only one of two sources has, or refuse it."""
        if not self.rules.allow_unmatched:
            missing = "prompt" if reason == "unmatched_prompts" else "completion"
            raise DataError(
                f"{sample.place}: this {missing} has no partner in the other file. Sample the same prompts equally "
                "often with both models, or set allow_unmatched=True to leave such rows out and count them."
            )
        self.leave_out(reason, sample, count)

    def paired(self, *, prompts: int) -> Paired:
        """Return the result.

        Raises:
            DataError: There is no row.
        """
        if not self.rows:
            reasons = "; ".join(
                f"{LEFT_OUT[name]}: {count} (the first: {self.first[name]})" for name, count in self.left_out.items()
            )
            raise DataError(f"No row can be made of {self.num_completions} completions. Left out: {reasons or 'none'}.")
        return Paired(self.rows, prompts, self.num_completions, self.num_used, dict(self.left_out), dict(self.first))


def _with_rewards(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        if sample.reward is None and sample.completion.strip():
            raise DataError(
                f"{sample.place}: the completion has no reward, and completions of one file are compared by reward. "
                "Give `rewards`, or a column `reward`; or a second file to choose over."
            )
        yield sample


def _pair(chosen: Sample, rejected: Sample) -> dict[str, Any]:
    row = {"prompt": chosen.prompt, "chosen": completion_of(chosen), "rejected": completion_of(rejected)}
    rewards: Mapping[str, Any] = {"chosen_reward": chosen.reward, "rejected_reward": rejected.reward}
    return row | {name: value for name, value in rewards.items() if value is not None}


def _mean(equal: Sequence[Sample]) -> Sample:
    rewards = [sample.reward for sample in equal if sample.reward is not None]
    return replace(equal[0], reward=math.fsum(rewards) / len(rewards)) if len(rewards) > 1 else equal[0]


def _reward_of(sample: Sample) -> float:
    assert sample.reward is not None
    return sample.reward


def _require_rewards_of_both(first: Sequence[Sample], second: Sequence[Sample]) -> None:
    """Refuse samples of which only some have rewards."""
    written = [sample for sample in (*first, *second) if sample.completion.strip()]
    known = [sample.reward is not None for sample in written]
    if any(known) and not all(known):
        missing = written[known.index(False)]
        raise DataError(
            f"{missing.place}: this completion has no reward, and others have: give one to all, or to none."
        )
