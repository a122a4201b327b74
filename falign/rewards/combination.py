"""The reward of a run: a weighted sum of named rewards with their parts, and the columns of rows that they receive."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from falign.data import PromptRow
from falign.errors import ConfigError, NonFiniteRewardError, RewardError
from falign.rewards.base import ARGUMENTS, ComparingReward, Reward, RowReward, Scores, call_reward, place_of

if TYPE_CHECKING:
    from falign.rewards.transforms import RewardTransform

__all__ = ["RewardSum", "Rewards", "WeightedReward", "reward_columns", "row_check"]


class WeightedReward(NamedTuple):
    """One part of the sum.

    Attributes:
        name: Name in the logs, ``reward/<name>``.
        reward: Any callable of :class:`falign.rewards.Reward`.
        weight: Its factor; 0 only logs it.
        transform: Applied to its values before the factor; None leaves them.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    transform: RewardTransform | None = None


class Rewards(NamedTuple):
    """Scores of a batch under a weighted sum.

    Attributes:
        total: One per completion.
        parts: By name, before transforms and weights; None where a part does not apply.
        timeouts: Calls that were stopped at their deadline, over all parts.
        errors: Calls that raised and were counted, over all parts.
        message: Message of the first error; ``""`` if there is none.
        failed: Number of calls of each part that were stopped or raised, by name.
        measured: Further values to log, by ``NAME/KEY``.
    """

    total: list[float]
    parts: dict[str, list[float | None]]
    timeouts: int = 0
    errors: int = 0
    message: str = ""
    failed: Mapping[str, int] = {}
    measured: Mapping[str, list[float]] = {}

    def metrics(self) -> dict[str, float]:
        """Return ``reward`` and ``reward/<name>``, means over the completions that have one, and the two counts."""
        parts = {**self.parts, **self.measured}
        means = {"reward": self.total, **{f"reward/{name}": values for name, values in parts.items()}}
        found = {name: [value for value in values if value is not None] for name, values in means.items()}
        averages = {name: math.fsum(values) / len(values) for name, values in found.items() if values}
        return {**averages, "reward/timeouts": float(self.timeouts), "reward/errors": float(self.errors)}


@dataclass(frozen=True)
class RewardSum:
    """``Σ_k w_k Φ_k(r_k)`` over the rewards that apply to a completion; Φ_k is the transform of a part, if it has one.

    A part that does not apply (None) is left out and the other weights stay, so that completions of one prompt, to
    which the same parts apply, are compared on one scale.

    Attributes:
        rewards: One or more, with different names.
        outcome: Name of the reward that decides whether a completion passes, for pass@k and difficulty. By default the
            sum if only one reward has a weight and no transform, else the first with a weight. It decides by its values
            before the transform.

    Raises:
        ConfigError: The sum is empty, a name comes twice, a weight is not finite, or the outcome is unknown.
    """

    rewards: tuple[WeightedReward, ...]
    outcome: str | None = None

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("rewards: the list is empty; give at least one.")
        twice = [name for name, n in Counter(reward.name for reward in self.rewards).items() if n > 1]
        if twice:
            raise ConfigError(f"rewards: the name {twice[0]!r} comes twice; give each a name of its own.")
        taken = {"timeouts", "errors"} & {reward.name for reward in self.rewards}
        if taken:
            raise ConfigError(f"rewards: the name {min(taken)!r} is that of a count; choose another.")
        names = [reward.name for reward in self.rewards]
        if self.outcome is not None and self.outcome not in names:
            raise ConfigError(f"rollout.outcome={self.outcome!r} is not the name of a reward; choose one of {names}.")
        for reward in self.rewards:
            if not math.isfinite(reward.weight):
                raise ConfigError(f"rewards: the weight of {reward.name} is {reward.weight}; give a finite number.")

    @property
    def passing(self) -> str | None:
        """Name of the reward that decides whether a completion passes; None for the sum."""
        counting = [reward for reward in self.rewards if reward.weight != 0]
        is_plain = len(counting) < 2 and all(reward.transform is None for reward in counting)
        return self.outcome or (None if is_plain else counting[0].name)

    def without_transforms(self) -> RewardSum:
        """Return the sum of the rewards themselves."""
        return RewardSum(tuple(reward._replace(transform=None) for reward in self.rewards), self.outcome)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> Rewards:
        """Call every reward.

        Args:
            prompts: The prompt of each completion.
            completions: Their texts, without the stop token.
            columns: One value per completion; ``place`` has the place of each prompt, ``prompt_ids`` and
                ``completion_ids`` are what implicit rewards read.

        Raises:
            RewardError: A reward failed, or no reward applies to some completion.
        """
        lists = {name: list(values) for name, values in columns.items()}
        scores = [
            call_reward(part.reward, list(prompts), list(completions), lists, name=part.name) for part in self.rewards
        ]
        counted = [
            score.values if part.transform is None else part.transform(score.values, list(prompts), **lists)
            for part, score in zip(self.rewards, scores, strict=True)
        ]
        total = [
            self._sum([values[i] for values in counted], place_of(lists.get("place"), i), scores)
            for i in range(len(completions))
        ]
        return Rewards(
            total,
            {part.name: score.values for part, score in zip(self.rewards, scores, strict=True)},
            timeouts=sum(score.timeouts for score in scores),
            errors=sum(score.errors for score in scores),
            message=next((score.message for score in scores if score.message), ""),
            failed={part.name: s.timeouts + s.errors for part, s in zip(self.rewards, scores, strict=True)},
            measured={
                f"{part.name}/{key}": values
                for part, score in zip(self.rewards, scores, strict=True)
                for key, values in score.measured.items()
            },
        )

    def require_group(self, completions: int, *, field: str) -> None:
        """Refuse a number of completions per prompt that a reward cannot compare.

        Args:
            completions: Completions per prompt.
            field: Where it is set, for the message.

        Raises:
            ConfigError: A reward compares completions, and there is only one.
        """
        for part in self.rewards:
            if completions < 2 and isinstance(part.reward, ComparingReward) and part.reward.compares:
                raise ConfigError(
                    f"{field}={completions}: the reward {part.name!r} compares completions of one prompt: sample two "
                    "or more, or give it the samples of another model to compare with."
                )

    def row_errors(self, prompts: Sequence[Any], **columns: Sequence[Any]) -> list[str | None]:
        """Return for each row why a reward cannot judge it; None if all can.

        Args:
            prompts: One per row.
            columns: One value per row; ``prompt_ids`` and ``place`` among them.

        Raises:
            RewardError: A column that a reward reads does not exist, or a reward cannot judge anything.
        """
        found: list[str | None] = [None] * len(prompts)
        lists = {name: list(values) for name, values in columns.items()}
        for part in self.rewards:
            for checked in (part.reward, part.transform):
                if not isinstance(checked, RowReward):
                    continue
                for i, reason in enumerate(checked.row_errors(list(prompts), **lists)):
                    if found[i] is None and reason is not None:
                        found[i] = f"reward {part.name}: {reason}"
        return found

    def _sum(self, values: Sequence[float | None], place: str, scores: Sequence[Scores]) -> float:
        applying = [part.weight * v for part, v in zip(self.rewards, values, strict=True) if v is not None]
        if not applying:
            names = ", ".join(part.name for part in self.rewards)
            failure = next((f" A failure: {score.message}." for score in scores if score.message), "")
            raise RewardError(
                f"{place}: no reward applies to a completion (None from {names}); add one that does, or remove the "
                f"row.{failure}"
            )
        total = sum(applying)
        if not math.isfinite(total):
            raise NonFiniteRewardError(f"{place}: the weighted sum of the rewards is {total}; lower rewards.weight.")
        return math.fsum(applying)


def reward_columns(rows: Sequence[PromptRow]) -> dict[str, list[Any]]:
    """Return one list per column of the rows, with ``place`` and ``prompt_ids``; None for rows without the column.

    Args:
        rows: One per completion, or one per prompt.

    Raises:
        ConfigError: A column has the name of another argument of rewards.
    """
    names = dict.fromkeys(name for row in rows for name in row.columns)
    if clashing := sorted(names.keys() & ARGUMENTS):
        row = next(row for row in rows if clashing[0] in row.columns)
        raise ConfigError(
            f"{row.place}: the column {clashing[0]!r} has the name of an argument of rewards, which is not the column: "
            "rename it, or remove it from the rows."
        )
    columns: dict[str, list[Any]] = {name: [row.columns.get(name) for row in rows] for name in names}
    return columns | {"place": [row.place for row in rows], "prompt_ids": [list(row.prompt_ids) for row in rows]}


def row_check(rewards: RewardSum) -> Callable[[Sequence[PromptRow]], list[str | None]]:
    """Return the check of prompts for :func:`falign.data.load_prompts`: the reason if completions cannot be judged.

    Args:
        rewards: The rewards of the run.
    """

    def check(rows: Sequence[PromptRow]) -> list[str | None]:
        return rewards.row_errors([row.prompt for row in rows], **reward_columns(rows))

    return check
