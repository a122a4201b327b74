"""Preference data from files of samples, ``falign.pairs``: from the files and their rewards to the written rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from falign.choices import require_choice, shown
from falign.data import BadRowPolicy, BadRows, read_rows
from falign.data.pairing import Paired, Pairing, PairLayout
from falign.data.samples import REWARD, Sample, read_samples, text_sha256
from falign.durable import write_whole
from falign.errors import ConfigError, DataError
from falign.evaluation.sample_inputs import given_rewards
from falign.evaluation.sampling_run import check_rows_file
from falign.rewards import RewardSum
from falign.runfile.objects import parse_source
from falign.terminal import Terminal

__all__ = ["PairsSummary", "pairs"]

SCORE_FILES = (".jsonl", ".parquet")
"""Suffixes of the files that ``falign score`` writes."""


class PairsSummary(BaseModel):
    """Counts of preference data made of samples."""

    model_config = ConfigDict(frozen=True)

    layout: PairLayout
    prompts: int
    completions: int
    rows: int
    prompts_used: int
    """Prompts that are in the rows."""
    mean_margin: float | None = None
    """Mean reward of chosen minus rejected completions; None without pairs or rewards."""
    left_out: dict[str, int] = {}
    """Numbers of what was left out, by reason (the keys of :data:`falign.data.pairing.LEFT_OUT`), without zeros."""
    first: dict[str, str] = {}
    """Place of the first by reason."""
    bad_rows: int = 0
    messages: tuple[str, ...] = ()
    """The first messages about bad rows."""


def pairs(
    samples: Any,
    rejected: Any = None,
    *,
    out: str | Path,
    rewards: Any = None,
    reward_column: str = REWARD,
    layout: str = "pairs",
    min_margin: float = 0.0,
    keep_truncated: bool = False,
    allow_unmatched: bool = False,
    bad_rows: str = "error",
    overwrite: bool = False,
    trust_code: bool = False,
    console: Console | None = None,
) -> PairsSummary:
    """Write preference data made of samples: pairs, ranked lists, or the best completion of each prompt.

    One source: completions of a prompt are compared by reward. Two: a completion of the first is chosen over one of the
    second (delta learning), and if they have rewards, only where its reward is higher.

    Args:
        samples: Rows in memory, a file as :func:`falign.write_samples` writes it, any file of prompts with completions,
            or a source with its fields.
        rejected: A second source, whose completions are rejected.
        out: The file for the rows, ``.jsonl``; :func:`falign.train` and ``falign train`` read it as it is.
        rewards: Rewards of the completions: one or more files of :func:`falign.score`, whose implicit reward is taken;
            a YAML file with a list of rewards; a run; or rewards in memory. By default the column `reward_column`, or
            the rows' scores or labels.
        reward_column: Column with the reward.
        layout: ``pairs``: best and worst of each prompt; ``all_pairs``; ``ranked``: lists with scores; ``best``: the
            best completion. Of two sources ``pairs`` joins the i-th completions, ``all_pairs`` each one with each.
        min_margin: Smaller differences in reward are ties.
        keep_truncated: Keep completions that hit the maximum length. They have no end: training on them teaches to
            stop in the middle.
        allow_unmatched: Of two sources, leave out and count prompts and completions without a partner; by default they
            are refused.
        bad_rows: ``error`` stops at a row that cannot be used; ``skip`` counts it and continues.
        overwrite: Replace an existing file.
        trust_code: Whether code that a run folder names may run.
        console: Where progress is shown; by default standard error.

    Raises:
        ConfigError: An argument is invalid or has no effect, or the file exists.
        DataError: A row cannot be used, a completion has no reward or no partner, or nothing is left.
        RewardError: A reward failed.
    """
    console = console or Terminal(stderr=True, highlight=False, soft_wrap=True)
    out = Path(out)
    policy: Any = bad_rows
    require_choice("layout", layout, PairLayout)
    require_choice("bad_rows", bad_rows, BadRowPolicy)
    check_rows_file(out, overwrite=overwrite)
    if rewards is not None and reward_column != REWARD:
        raise ConfigError(f"reward_column={reward_column!r} has no effect beside `rewards`: leave one of them out.")
    _check_effects(layout, two=rejected is not None, min_margin=min_margin, allow_unmatched=allow_unmatched)
    chosen_layout: Any = layout
    rules = Pairing(chosen_layout, min_margin, keep_truncated, allow_unmatched)
    bad = BadRows(policy, skip_by="bad_rows=skip")
    sources = [parse_source(each, place="samples") for each in (samples, rejected) if each is not None]
    read = [list(read_samples(source, reward=reward_column, bad_rows=bad)) for source in sources]
    for source, found in zip(sources, read, strict=True):
        if out.resolve() == Path(source.path).resolve():
            raise ConfigError(f"out={out} is a file of samples: give the rows another name.")
        if not found:
            raise DataError(f"{source.path} has no usable row: give a file with at least one.")
    if rewards is not None:
        with console.status("rewards"):
            read = _with_rewards(read, rewards, trust_code=trust_code, whole=not bad.count, console=console)
    if min_margin and all(sample.reward is None for found in read for sample in found):
        raise ConfigError(
            f"min_margin={min_margin} compares rewards, and the samples have none: give `rewards`, or leave it out."
        )
    paired = rules.of_one(read[0]) if len(read) == 1 else rules.of_two(*read)
    write_whole(out, (json.dumps(row, ensure_ascii=False) + "\n" for row in paired.rows))
    return _summary(chosen_layout, paired, bad)


def _check_effects(layout: str, *, two: bool, min_margin: float, allow_unmatched: bool) -> None:
    """Refuse arguments that are out of range or have no effect."""
    if not isinstance(min_margin, Real) or not 0 <= min_margin < float("inf"):
        raise ConfigError(f"min_margin={min_margin!r} must be a finite number ≥ 0.")
    if min_margin and layout == "best":
        raise ConfigError(
            f"min_margin={min_margin} has no effect with layout=best, which compares nothing: leave it out."
        )
    if two and layout not in ("pairs", "all_pairs"):
        raise ConfigError(
            f"layout={layout} compares completions of one file: leave the second out, or set layout=pairs."
        )
    if allow_unmatched and not two:
        raise ConfigError("`allow_unmatched` has no effect without a second file: leave it out.")


def _with_rewards(
    read: Sequence[Sequence[Sample]], rewards: Any, *, trust_code: bool, whole: bool, console: Console
) -> list[list[Sample]]:
    """Return the samples of each source with rewards from files of scores, or judged now."""
    several = [rewards] if isinstance(rewards, str | Path) else rewards
    named = isinstance(several, Sequence) and all(isinstance(each, str | Path) for each in several)
    if named and all(Path(each).suffix in SCORE_FILES for each in several):
        return _scored(read, several, whole=whole, console=console)
    if named and len(several) > 1:
        raise ConfigError("rewards: several names are files of scores (.jsonl, .parquet); give one other source.")
    judges = given_rewards(several[0] if named else rewards, trust_code=trust_code).rewards
    return [_judged(samples, judges) for samples in read]


def _scored(
    read: Sequence[Sequence[Sample]], files: Sequence[str | Path], *, whole: bool, console: Console
) -> list[list[Sample]]:
    """Return samples with the implicit reward that ``falign score`` gave to the completion at their place.

    A score of another text at this place is refused. Files without hashes of texts are taken with a remark.

    Args:
        read: The samples of each source.
        files: Files of scores.
        whole: Whether all rows of the sources were read, so that each score has a sample.
        console: Where the remark is shown.
    """
    shown_files, scores = ", ".join(map(str, files)), _scores_of(files)
    # The path of a file can be written in several ways, so its name is enough where no other file has it.
    by_name: dict[str, set[str]] = {}
    for place in (*(place for place, _ in scores), *(sample.place for samples in read for sample in samples)):
        by_name.setdefault(Path(place).name, set()).add(place)
    used: set[tuple[str, int]] = set()
    ours = {sample.place for samples in read for sample in samples}
    scored: list[list[Sample]] = []
    for samples in read:
        scored.append([])
        for sample in samples:
            key = (sample.place, sample.index)
            if key not in scores:
                others = [place for place in by_name[Path(sample.place).name] if (place, sample.index) in scores]
                if len(others) > 1 or any(place in ours for place in others):
                    raise DataError(
                        f"{sample.place}: {shown_files} has scores of {min(others)}, another file of this name: score "
                        "both files under the paths that they have here, or give them different names."
                    )
                key = (others[0], sample.index) if others else key
            if key not in scores and sample.completion.strip():
                raise DataError(
                    f"{sample.place}: {shown_files} has no score of this completion: score the same file again, all of "
                    "its rows."
                )
            score = scores.get(key)
            if score is not None and score.sha256 not in (None, text_sha256(sample.prompt, sample.completion)):
                raise DataError(
                    f"{sample.place}: {shown_files} has the score of another prompt or completion at this place: the "
                    "samples have changed since they were scored. Score this file again."
                )
            used.add(key)
            scored[-1].append(replace(sample, reward=None if score is None else score.reward))
    if whole and (left := [key for key in scores if key not in used]):
        raise DataError(
            f"{shown_files} has scores of {len(left)} completions that are not among the samples (the first is "
            f"{left[0][0]}): give the scores of these files alone, and score a file again after it was sampled again."
        )
    if any(scores[key].sha256 is None for key in used if key in scores):
        console.print(
            f"{shown_files}: no column text_sha256, so scores were matched by file and row only. If the samples may "
            "have changed since, score them again.",
            style="yellow",
            markup=False,
        )
    return scored


class _Score(NamedTuple):
    """An implicit reward, and the hash of the text that has it; None in files without hashes."""

    reward: float
    sha256: str | None


def _scores_of(files: Sequence[str | Path]) -> dict[tuple[str, int], _Score]:
    """Return the scores of files, by place and number of the completion."""
    found: dict[tuple[str, int], _Score] = {}
    for file in files:
        for row in read_rows(file):
            missing = [name for name in ("place", "completion", "implicit_reward") if name not in row.fields]
            if missing:
                raise DataError(
                    f"{row.place}: there is no column {missing[0]!r}, so this is not a file of `falign score`: give "
                    "one, or set reward_column to the column of the samples that holds their reward."
                )
            reward = row.fields["implicit_reward"]
            if not isinstance(reward, Real) or not math.isfinite(reward):
                raise DataError(
                    f"{row.place}: implicit_reward is {shown(reward)}; it must be a finite number: score the samples "
                    "again."
                )
            key = str(row.fields["place"]), int(row.fields["completion"])
            sha256 = row.fields.get("text_sha256")
            score = _Score(float(reward), None if sha256 is None else str(sha256))
            if (before := found.setdefault(key, score)) != score:
                raise DataError(
                    f"{row.place}: {key[0]} has the score {shown(reward)} here and {before.reward:g} before: give one "
                    "file of scores for each file of samples."
                )
    return found


def _judged(samples: Sequence[Sample], rewards: RewardSum) -> list[Sample]:
    """Return samples with the weighted sum of rewards."""
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    columns: dict[str, list[Any]] = {name: [sample.columns.get(name) for sample in samples] for name in names}
    columns["place"] = [sample.place for sample in samples]
    prompts = [sample.prompt for sample in samples]
    for sample, reason in zip(samples, rewards.row_errors(prompts, **columns), strict=True):
        if reason is not None:
            raise DataError(f"{sample.place}: {reason}. Correct the row or remove it.")
    total = rewards(prompts, [sample.completion for sample in samples], **columns).total
    return [replace(sample, reward=value) for sample, value in zip(samples, total, strict=True)]


def _summary(layout: PairLayout, paired: Paired, bad: BadRows) -> PairsSummary:
    margins = [row["chosen_reward"] - row["rejected_reward"] for row in paired.rows if "chosen_reward" in row]
    return PairsSummary(
        layout=layout,
        prompts=paired.prompts,
        completions=paired.completions,
        rows=len(paired.rows),
        prompts_used=paired.prompts_used,
        mean_margin=sum(margins) / len(margins) if margins else None,
        left_out=paired.left_out,
        first=paired.first,
        bad_rows=bad.count,
        messages=tuple(bad.messages),
    )
