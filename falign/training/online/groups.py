"""Groups: prompts with the completions that the policy samples for them, and their rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from falign.data import PromptRow
from falign.data.chat_template import Tokenizer
from falign.errors import RewardError, RolloutError
from falign.rewards import RewardSum
from falign.rewards.combination import Rewards, reward_columns
from falign.rewards.groups import passes
from falign.rollouts import Engine, SampledCompletion, SamplingParams
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
        texts: The completions as text, as the rewards read them.
        rewards: One per completion; empty in a run without rewards.
        parts: The rewards before they were combined, by name.
    """

    row: PromptRow
    rollouts: tuple[SampledCompletion, ...]
    texts: tuple[str, ...]
    rewards: tuple[float, ...]
    parts: Mapping[str, tuple[float | None, ...]]

    def num_passed(self, pass_reward: float, *, outcome: str | None = None) -> int:
        """Return the number of completions that pass: their reward is at least `pass_reward`.

        Args:
            pass_reward: The threshold.
            outcome: Name of the reward that decides; a completion to which it does not apply fails. None for the sum.
        """
        values = self.rewards if outcome is None else self.parts[outcome]
        return sum(value is not None and passes(value, pass_reward) for value in values)

    def features(self) -> list[list[float]]:
        """Return the single rewards of each completion, before weighting, as the features of a target.

        Raises:
            RolloutError: A reward gives no value to a completion.
        """
        if missing := [name for name, values in self.parts.items() if None in values]:
            raise RolloutError(
                f"{self.row.place}: the reward {missing[0]!r} gives no value to a completion, but the target needs "
                "every reward of every completion."
            )
        return [[float(values[i] or 0.0) for values in self.parts.values()] for i in range(len(self.rollouts))]

    def best_and_worst(self) -> Group:
        """Return the group reduced to the completions with the highest and the lowest reward."""
        kept = [self.rewards.index(extreme(self.rewards)) for extreme in (max, min)]
        return Group(
            self.row,
            tuple(self.rollouts[i] for i in kept),
            tuple(self.texts[i] for i in kept),
            tuple(self.rewards[i] for i in kept),
            {name: tuple(values[i] for i in kept) for name, values in self.parts.items()},
        )


class Draw(NamedTuple):
    """The groups of one rollout, and statistics of drawing them.

    Attributes:
        groups: As many as requested.
        num_sampled: Number of prompts sampled, including discarded ones.
        num_unfit: Number of groups outside the difficulty range, used because there were not enough others.
        timeouts: Number of reward calls stopped at their deadline.
        errors: Number of reward calls that raised and were counted.
        message: Message of the first of these errors; ``""`` without errors.
        failed: Number of calls that were stopped or raised, by the name of the reward.
        measured: Further values of rewards to log, by ``NAME/KEY``.
    """

    groups: list[Group]
    num_sampled: int
    num_unfit: int = 0
    timeouts: int = 0
    errors: int = 0
    message: str = ""
    failed: Mapping[str, int] = {}
    measured: Mapping[str, list[float]] = {}

    def __add__(self, other: Draw) -> Draw:  # pyright: ignore[reportIncompatibleMethodOverride] - not a tuple's
        """Return both draws together."""
        return Draw(
            self.groups + other.groups,
            self.num_sampled + other.num_sampled,
            self.num_unfit + other.num_unfit,
            self.timeouts + other.timeouts,
            self.errors + other.errors,
            self.message or other.message,
            dict(Counter(self.failed) + Counter(other.failed)),
            {
                name: [*self.measured.get(name, ()), *other.measured.get(name, ())]
                for name in dict.fromkeys([*self.measured, *other.measured])
            },
        )


def rollout_buffer(groups: Sequence[Group], *, compared: bool = False) -> RolloutBuffer:
    """Return the completions of groups with the log-probabilities recorded by the sampler.

    Args:
        groups: One or more groups.
        compared: True to use the rewards as preferences.
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
    """Sample completions, and compute their rewards.

    Args:
        engine: The engine that samples.
        rewards: The rewards; None for a run without.
        tokenizer: Decodes completions.
        params: Sampling parameters.
        completions: Completions per prompt.
        seed: Seed of the run; the seed of each rollout is derived from it and the rollout's number.
    """

    def __init__(
        self,
        engine: Engine,
        rewards: RewardSum | None,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        completions: int,
        seed: int,
    ) -> None:
        self.engine, self.rewards, self.tokenizer, self.params = engine, rewards, tokenizer, params
        self.completions, self.seed = completions, seed

    def with_completions(self, completions: int) -> GroupSampler:
        """Return a sampler for another group size."""
        return GroupSampler(
            self.engine, self.rewards, self.tokenizer, self.params, completions=completions, seed=self.seed
        )

    def with_tokens(self, max_new_tokens: int) -> GroupSampler:
        """Return a sampler for another maximum number of tokens."""
        params = replace(self.params, max_new_tokens=max_new_tokens)
        return GroupSampler(
            self.engine, self.rewards, self.tokenizer, params, completions=self.completions, seed=self.seed
        )

    def sample(self, rows: Sequence[PromptRow], *, version: int, number: int, first: int = 0) -> Draw:
        """Return one group per prompt; the same version, number and prompts give the same groups.

        Args:
            rows: The prompts.
            version: Version of the published weights to sample from.
            number: Number of the rollout.
            first: Index of the first prompt in the whole rollout, if other processes sample the rest of it.
        """
        return self._sample(rows, version=version, seed=mixed(self.seed, number), first=first)

    def sample_each(self, rows: Sequence[PromptRow], *, version: int, repeats: Sequence[int]) -> Draw:
        """Return one group per prompt; each depends only on the seed and the prompt.

        Args:
            rows: The prompts.
            version: Version of the published weights to sample from.
            repeats: How often each prompt occurred before, so that completions of equal prompts are independent.
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
        return Draw(
            groups,
            len(rows),
            timeouts=rewards.timeouts,
            errors=rewards.errors,
            message=rewards.message,
            failed=rewards.failed,
            measured=rewards.measured,
        )


def judged(
    rewards: RewardSum | None, rows: Sequence[PromptRow], rollouts: Sequence[SampledCompletion], tokenizer: Tokenizer
) -> tuple[list[str], Rewards]:
    """Return completions as text without special tokens, and their rewards.

    Args:
        rewards: The rewards; None for none.
        rows: The prompt of each completion.
        rollouts: The completions.
        tokenizer: Decodes the completions.
    """
    texts = [str(tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True)) for rollout in rollouts]
    if rewards is None:
        return texts, Rewards([], {})
    scores = rewards(
        [row.prompt for row in rows],
        texts,
        **reward_columns(rows),
        completion_ids=[rollout.completion_ids for rollout in rollouts],
    )
    return texts, scores


class DividedSampler:
    """Divide the prompts among the processes, and return all groups in each of them.

    The random numbers of a completion depend on its index in the whole rollout, so the rollout does not depend on the
    number of processes.

    Args:
        sampler: Samples the prompts of this process and computes their rewards.
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
        return None if self.sampler.rewards is None else self.sampler.rewards.passing

    def with_completions(self, completions: int) -> DividedSampler:
        """Return a sampler for another group size."""
        return DividedSampler(self.sampler.with_completions(completions))

    def with_tokens(self, max_new_tokens: int) -> DividedSampler:
        """Return a sampler for another maximum number of tokens."""
        return DividedSampler(self.sampler.with_tokens(max_new_tokens))

    def require_judged(self, draw: Draw, place: str) -> None:
        """Refuse a draw in which every call of a reward failed, because its values mean nothing.

        Args:
            draw: From :meth:`sample`, or a sum of such draws.
            place: The beginning of the message.

        Raises:
            RewardError: All calls failed; the message has the reward's name and the first failure.
        """
        count = draw.num_sampled * self.sampler.completions
        for name, failed in draw.failed.items():
            if failed == count:
                raise RewardError(
                    f"{place}: the reward {name!r} failed for all {count} completions. The first failure: "
                    f"{draw.message}"
                )

    def sample(self, rows: Sequence[PromptRow], *, version: int, number: int) -> Draw:
        """Return one group per prompt, in order; all processes must call it with the same arguments."""
        places = part(range(len(rows)), rank(), num_processes())
        own = [rows[place] for place in places]
        if not own:  # with sharded weights, every process must take part in the forward passes of the others
            self.sampler.sample(rows[:1], version=version, number=number)
        draws = [self.sampler.sample(own, version=version, number=number, first=places[0])] if own else []
        # gathered() keeps the order of the processes, and each has a consecutive part of the prompts: the groups stay
        # in order.
        whole = Draw([], 0)
        for draw in gathered(draws):
            whole += draw
        return whole
