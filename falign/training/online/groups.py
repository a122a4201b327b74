"""Groups: prompts, the completions that the policy gives to them, and what these are worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from falign.data import PromptRow
from falign.data.chat_template import Tokenizer
from falign.errors import RolloutError
from falign.rewards import RewardSum
from falign.rewards.columns import reward_columns
from falign.rollouts import Engine, Rollout, SamplingParams
from falign.rollouts.buffer import RolloutBuffer, padded
from falign.scoring import PromptTree
from falign.seeds import mixed

__all__ = ["TOLERANCE", "Draw", "Group", "GroupSampler", "rollout_buffer"]

TOLERANCE = 1e-6  # of a reward that is compared with the one that passes


@dataclass(frozen=True)
class Group:
    """One prompt and its completions.

    Attributes:
        row: The prompt.
        rollouts: Its completions, as token ids.
        texts: The same as the rewards saw them.
        rewards: One per completion.
        parts: The rewards that these were combined of, by name.
    """

    row: PromptRow
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    rewards: tuple[float, ...]
    parts: Mapping[str, tuple[float | None, ...]]

    def num_passed(self, pass_reward: float, *, outcome: str | None = None) -> int:
        """Return how many completions have the reward that passes, or more.

        Args:
            pass_reward: What passes.
            outcome: Name of the part that decides; one that does not apply does not pass. None for the sum.
        """
        values = self.rewards if outcome is None else self.parts[outcome]
        return sum(value is not None and value >= pass_reward - TOLERANCE for value in values)

    def features(self) -> list[list[float]]:
        """Return the parts of each completion's reward, before weights: what a target reads.

        Raises:
            RolloutError: A part gives no value to a completion.
        """
        if missing := [name for name, values in self.parts.items() if None in values]:
            raise RolloutError(
                f"{self.row.place}: the reward {missing[0]!r} gives no value to a completion, and the target needs "
                "every reward of every completion."
            )
        return [[float(values[i] or 0.0) for values in self.parts.values()] for i in range(len(self.rollouts))]

    def best_and_worst(self) -> Group:
        """Return the group with the completions of the highest and of the lowest reward alone."""
        kept = [self.rewards.index(extreme(self.rewards)) for extreme in (max, min)]
        return Group(
            self.row,
            tuple(self.rollouts[i] for i in kept),
            tuple(self.texts[i] for i in kept),
            tuple(self.rewards[i] for i in kept),
            {name: tuple(values[i] for i in kept) for name, values in self.parts.items()},
        )


class Draw(NamedTuple):
    """The groups of one rollout, and how they came together.

    Attributes:
        groups: As many as were asked for.
        num_sampled: Prompts that were answered, those that were left out included.
        num_unfit: Groups outside the difficulty range that were taken because not enough others were found.
        timeouts: Calls of rewards that were stopped at their deadline.
        errors: Calls of rewards that raised and were counted.
        message: Of the first of these; ``""`` where there is none.
        failed: By the name of each reward, how many of its calls were stopped or raised.
    """

    groups: list[Group]
    num_sampled: int
    num_unfit: int = 0
    timeouts: int = 0
    errors: int = 0
    message: str = ""
    failed: Mapping[str, int] = {}

    def __add__(self, other: Draw) -> Draw:  # pyright: ignore[reportIncompatibleMethodOverride] - not a tuple's
        """Return the groups of both."""
        return Draw(
            self.groups + other.groups,
            self.num_sampled + other.num_sampled,
            self.num_unfit + other.num_unfit,
            self.timeouts + other.timeouts,
            self.errors + other.errors,
            self.message or other.message,
            dict(Counter(self.failed) + Counter(other.failed)),
        )


def rollout_buffer(groups: Sequence[Group], *, compared: bool = False) -> RolloutBuffer:
    """Return the completions of some groups with the log-probabilities that the sampler reported.

    Args:
        groups: One or more.
        compared: Whether rewards become preferences.
    """
    trees = tuple(
        PromptTree(
            group.row.prompt_ids,
            tuple(rollout.completion_ids for rollout in group.rollouts),
            group.rewards if compared else None,
            group.row.place,
        )
        for group in groups
    )
    logprobs = padded([rollout.logprobs for group in groups for rollout in group.rollouts])
    return RolloutBuffer(trees).with_columns({"sampler_logprobs": logprobs})


class GroupSampler:
    """Samples completions and has them rewarded.

    Args:
        engine: What samples.
        rewards: What completions are worth.
        tokenizer: Turns completions into what rewards read.
        params: How is sampled.
        completions: Completions per prompt.
        seed: Of the run; each rollout has a seed of its own, made of this and its number.
    """

    def __init__(
        self,
        engine: Engine,
        rewards: RewardSum,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        completions: int,
        seed: int,
    ) -> None:
        self.engine, self.rewards, self.tokenizer, self.params = engine, rewards, tokenizer, params
        self.completions, self.seed = completions, seed

    def with_completions(self, completions: int) -> GroupSampler:
        """Return a sampler of groups of another size."""
        return GroupSampler(
            self.engine, self.rewards, self.tokenizer, self.params, completions=completions, seed=self.seed
        )

    def sample(self, rows: Sequence[PromptRow], *, version: int, number: int, first: int = 0) -> Draw:
        """Return one group per prompt; the same version, number and prompts give the same.

        Args:
            rows: The prompts.
            version: Which published weights answer.
            number: Of the rollout.
            first: Place of the first prompt among those of the whole rollout, where others sample the rest of it.
        """
        return self._sample(rows, version=version, seed=mixed(self.seed, number), first=first)

    def sample_each(self, rows: Sequence[PromptRow], *, version: int, repeats: Sequence[int]) -> Draw:
        """Return one group per prompt, of which each depends on the seed and the prompt alone.

        Args:
            rows: The prompts.
            version: Which published weights answer.
            repeats: For each prompt, how often it has come before: completions of equal prompts are to be independent.
        """
        seeds = [mixed(self.seed, repeat, *row.prompt_ids) for row, repeat in zip(rows, repeats, strict=True)]
        return self._sample(rows, version=version, seed=seeds)

    def _sample(self, rows: Sequence[PromptRow], *, version: int, seed: int | list[int], first: int = 0) -> Draw:
        rollouts = self.engine.sample(
            [row.prompt_ids for row in rows], self.completions, self.params, version=version, seed=seed, first=first
        )
        texts = [self.text(rollout) for rollout in rollouts]
        owners = [row for row in rows for _ in range(self.completions)]
        rewards = self.rewards(
            [row.prompt for row in owners],
            texts,
            **reward_columns(owners),
            completion_ids=[rollout.completion_ids for rollout in rollouts],
        )
        groups = []
        for i, row in enumerate(rows):
            part = slice(i * self.completions, (i + 1) * self.completions)
            groups.append(
                Group(
                    row,
                    tuple(rollouts[part]),
                    tuple(texts[part]),
                    tuple(rewards.total[part]),
                    {name: tuple(values[part]) for name, values in rewards.parts.items()},
                )
            )
        return Draw(groups, len(rows), 0, rewards.timeouts, rewards.errors, rewards.message, rewards.failed)

    def text(self, rollout: Rollout) -> str:
        """Return a completion as text, without special tokens."""
        return str(self.tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True))
