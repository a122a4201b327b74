"""The order of prompts in rollouts: each once before any is repeated, or only those within a difficulty range."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from falign.data import PromptRow
from falign.runfile.prompts_config import DifficultyConfig
from falign.seeds import mixed
from falign.training.online.divided_sampler import DividedSampler
from falign.training.online.groups import TOLERANCE, Draw, Group

__all__ = ["PromptOrder", "sample_within"]


class PromptOrder:
    """Prompts in an order that is drawn anew for each pass, from the seed and the number of the pass alone."""

    def __init__(self, num_prompts: int, *, seed: int) -> None:
        self.num_prompts, self.seed = num_prompts, seed
        self.position = 0

    def take(self, count: int) -> list[int]:
        """Return the next prompts, going through all of them before any comes again."""
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
    """Return groups whose share of passes lies in a range; other prompts are drawn in place of those left out.

    After ``difficulty.max_rounds`` draws the rest is taken from what was left out, the nearest to the range first.
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
            outside = max(difficulty.low - rate, rate - difficulty.high, 0.0)
            if outside > TOLERANCE:
                unfit.append((outside, group))
            else:
                fit.append(group)
        if len(fit) >= count:
            break
    missing = count - len(fit)
    nearest = [group for _, group in sorted(unfit, key=lambda pair: pair[0])[:missing]]
    return drawn._replace(groups=fit + nearest, num_unfit=len(nearest))
