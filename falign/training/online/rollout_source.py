"""Source of rollouts: order and difficulty of prompts, publishing of weights, and sampling ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from falign.data import PromptRow
from falign.errors import EngineError, NonFiniteRewardError, RewardError, RolloutError
from falign.rewards.groups import TOLERANCE, outside
from falign.runfile.prompts_config import DifficultyConfig, RolloutConfig
from falign.seeds import mixed
from falign.training.online.groups import DividedSampler, Draw, Group
from falign.training.online.prefetch import Drawn, RolloutAhead

__all__ = ["PromptOrder", "RolloutSource", "sample_within"]

MOST_DRAWS = 8  # rounds of sampling to find completions that differ in reward
AHEAD = "rollout_ahead.safetensors"


class RolloutSource:
    """Draws one rollout after another, each from the policy at its turn or, if sampled ahead, at the turn before.

    Args:
        sampler: The sampler.
        prompts: The training prompts.
        rollout: Sizes of rollouts.
        compares: True if completions of a prompt are compared, so that groups of equal rewards are useless.
        seed: Seed of the order of prompts.
        keep: Called with draws in which there was nothing to compare.
    """

    def __init__(
        self,
        sampler: DividedSampler,
        prompts: Sequence[PromptRow],
        rollout: RolloutConfig,
        *,
        compares: bool,
        seed: int,
        keep: Callable[[int, Draw], None],
    ) -> None:
        self.sampler, self.prompts, self.rollout, self.compares, self.keep = sampler, prompts, rollout, compares, keep
        self.order, self.ahead = PromptOrder(len(prompts), seed=seed), RolloutAhead()
        self.number = 0  # number of the next rollout to take
        self.position = 0  # index in the order of prompts up to which rollouts were taken

    def take(self, policy: nn.Module, step: int, *, goes_on: bool) -> Drawn:
        """Return the next rollout; if sampling ahead, start sampling the one after it.

        Args:
            policy: The policy to publish.
            step: Optimizer steps taken so far.
            goes_on: True if another rollout follows.

        Raises:
            EngineError: The source is unchanged; or, if the next rollout could not be started, this one is returned by
                the next call.
            NonFiniteRewardError: The rollout is skipped; the next call continues with the one after it.
            RewardError: The source is unchanged.
        """
        try:
            drawn = self.ahead.take() or self._publish(policy, step)()
        except EngineError:
            self.order.position = self.position
            raise
        except NonFiniteRewardError:
            self.sampler.engine.retire(self.number)
            self.number, self.position = self.number + 1, self.order.position
            raise
        except RewardError:
            self.order.position = self.position
            raise
        self.sampler.engine.retire(drawn.number)
        self.number, self.position = drawn.number + 1, drawn.position
        if self.rollout.ahead and goes_on:
            try:
                self.ahead.start(self._publish(policy, step))
            except EngineError:
                self.ahead.put(drawn)
                raise
        return drawn

    def groups(self, draw: Draw) -> list[Group]:
        """Return the useful groups: all, or, if completions are compared, those with different rewards."""
        return [group for group in draw.groups if not self.compares or len(set(group.rewards)) > 1]

    def save(self, folder: Path, *, writes: bool = True) -> dict[str, Any]:
        """Wait for the rollout being sampled, write it into a folder, and return the remaining state as plain values.

        Args:
            folder: Folder of the checkpoint.
            writes: False if another process writes the same.
        """
        drawn = self.ahead.drawn()
        order = self.position if drawn is None else drawn.position
        ahead = None if drawn is None or not writes else drawn.save(folder / AHEAD, self.prompts)
        return {"order": order, "number": self.number, "position": self.position, "ahead": ahead}

    def load(self, state: Mapping[str, Any], folder: Path) -> None:
        """Restore the state of another source."""
        self.order.position, self.number, self.position = state["order"], state["number"], state["position"]
        if state["ahead"] is not None:
            self.ahead.put(Drawn.load(state["ahead"], folder / AHEAD, self.prompts))

    def _publish(self, policy: nn.Module, step: int) -> Callable[[], Drawn]:
        """Publish the current policy; return a function that samples a rollout from it in any thread."""
        number = self.number
        self.sampler.engine.publish(policy, number)
        draw = self._draw_to_compare if self.compares else self._draw
        return lambda: Drawn(draw(number, number, step), number, step, self.order.position)

    def _draw_to_compare(self, version: int, number: int, step: int) -> Draw:
        """Sample until there is at least one prompt for each minibatch."""
        draw, found = Draw([], 0), 0
        for attempt in range(MOST_DRAWS):
            draw += self._draw(version, mixed(number, attempt) if attempt else number, step)
            if (found := len(self.groups(draw))) >= self.rollout.minibatches:
                return draw
        self.keep(step, draw)
        raise RolloutError(
            f"Step {step + 1}: of {draw.num_sampled} prompts, drawn in {MOST_DRAWS} rounds, "
            f"{found} have completions of different rewards, fewer than rollout.minibatches="
            f"{self.rollout.minibatches}, and the others give no gradient. Raise rollout.completions, or "
            "look at the rewards in completions.jsonl."
        )

    def _draw(self, version: int, number: int, step: int) -> Draw:
        draw = self._drawn(version, number)
        self.sampler.require_judged(draw, f"Step {step + 1}")
        return draw

    def _drawn(self, version: int, number: int) -> Draw:
        count, rows = self.rollout.prompts, self.prompts
        if self.rollout.difficulty is None:
            return self.sampler.sample([rows[i] for i in self.order.take(count)], version=version, number=number)
        return sample_within(
            self.sampler,
            rows,
            self.order,
            count,
            difficulty=self.rollout.difficulty,
            pass_reward=self.rollout.pass_reward,
            version=version,
            number=number,
        )


class PromptOrder:
    """Prompts in an order that is shuffled for each pass; it depends only on the seed and the number of the pass."""

    def __init__(self, num_prompts: int, *, seed: int) -> None:
        self.num_prompts, self.seed = num_prompts, seed
        self.position = 0

    def take(self, count: int) -> list[int]:
        """Return the next prompts; all are used before any is repeated."""
        places = [divmod(position, self.num_prompts) for position in range(self.position, self.position + count)]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        self.position += count
        return [orders[epoch][place] for epoch, place in places]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        return torch.randperm(self.num_prompts, generator=generator).tolist()


def sample_within(
    sampler: DividedSampler,
    rows: Sequence[PromptRow],
    order: PromptOrder,
    count: int,
    *,
    difficulty: DifficultyConfig,
    pass_reward: float,
    version: int,
    number: int,
) -> Draw:
    """Return groups with a share of passes within a range; groups outside are replaced by those of other prompts.

    After ``difficulty.max_rounds`` rounds the remainder comes from the groups outside, the nearest to the range first.
    """
    fit: list[Group] = []
    unfit: list[tuple[float, Group]] = []
    drawn = Draw([], 0)
    for attempt in range(difficulty.max_rounds):
        chosen = [rows[i] for i in order.take(count - len(fit))]
        draw = sampler.sample(chosen, version=version, number=mixed(number, attempt))
        drawn += draw
        for group in draw.groups:
            rate = group.num_passed(pass_reward, outcome=sampler.outcome) / len(group.rewards)
            distance = outside(torch.tensor(rate, dtype=torch.float64), difficulty.low, difficulty.high).item()
            if distance > TOLERANCE:
                unfit.append((distance, group))
            else:
                fit.append(group)
        if len(fit) >= count:
            break
    missing = count - len(fit)
    nearest = [group for _, group in sorted(unfit, key=lambda pair: pair[0])[:missing]]
    return drawn._replace(groups=fit + nearest, num_unfit=len(nearest))
