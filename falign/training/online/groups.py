"""Groups: prompts, the completions that the policy gives to them, and what these are worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from falign.data import PromptRow
from falign.data.chat_template import Tokenizer
from falign.errors import RewardError, RolloutError
from falign.rewards import RewardSum
from falign.rewards.columns import reward_columns
from falign.rewards.combination import Rewards
from falign.rewards.groups import passes
from falign.rollouts import Engine, Rollout, SamplingParams
from falign.rollouts.buffer import RolloutBuffer, padded
from falign.scoring import PromptTree
from falign.seeds import mixed
from falign.training.processes import gathered, num_processes, part, rank

__all__ = ["DividedSampler", "Draw", "Group", "GroupSampler", "judged", "rollout_buffer"]


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
        return sum(value is not None and passes(value, pass_reward) for value in values)

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
        owners = [row for row in rows for _ in range(self.completions)]
        texts, rewards = judged(self.rewards, owners, rollouts, self.tokenizer)
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


def judged(
    rewards: RewardSum, rows: Sequence[PromptRow], rollouts: Sequence[Rollout], tokenizer: Tokenizer
) -> tuple[list[str], Rewards]:
    """Return completions as texts without special tokens, and what they are worth.

    Args:
        rewards: The rewards.
        rows: The prompt of each completion.
        rollouts: The completions.
        tokenizer: Decodes them.
    """
    texts = [str(tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True)) for rollout in rollouts]
    scores = rewards(
        [row.prompt for row in rows],
        texts,
        **reward_columns(rows),
        completion_ids=[rollout.completion_ids for rollout in rollouts],
    )
    return texts, scores


class DividedSampler:
    """Divides the prompts among the processes, and gives each of them all groups.

    Every completion's random numbers follow from its number in the whole rollout, which is therefore the same however
    many processes sample it.

    Args:
        sampler: Samples and rewards the prompts of this process.
    """

    def __init__(self, sampler: GroupSampler) -> None:
        self.sampler = sampler

    @property
    def engine(self) -> Engine:
        """The engine that samples."""
        return self.sampler.engine

    @property
    def outcome(self) -> str | None:
        """Name of the reward that decides whether a completion passes; None for the sum of all."""
        return self.sampler.rewards.passing

    def with_completions(self, completions: int) -> DividedSampler:
        """Return a sampler of groups of another size."""
        return DividedSampler(self.sampler.with_completions(completions))

    def require_judged(self, draw: Draw, place: str) -> None:
        """Refuse a draw in which every call of a reward failed: what each completion is worth says nothing then.

        Args:
            draw: From :meth:`sample`, or a sum of these.
            place: The beginning of the message.

        Raises:
            RewardError: With the name of the reward and the first failure.
        """
        count = draw.num_sampled * self.sampler.completions
        for name, failed in draw.failed.items():
            if failed == count:
                raise RewardError(
                    f"{place}: the reward {name!r} failed for all {count} completions. The first failure: "
                    f"{draw.message}"
                )

    def sample(self, rows: Sequence[PromptRow], *, version: int, number: int) -> Draw:
        """Return one group per prompt, in their order; all processes have to call it, with the same arguments."""
        places = part(range(len(rows)), rank(), num_processes())
        own = [rows[place] for place in places]
        if not own:  # where weights are sharded none may stay away
            self.sampler.sample(rows[:1], version=version, number=number)
        draws = [self.sampler.sample(own, version=version, number=number, first=places[0])] if own else []
        whole = Draw([], 0)
        for draw in gathered(draws):
            whole += draw
        return whole
