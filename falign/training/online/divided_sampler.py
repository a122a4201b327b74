"""A rollout sampled by all processes together."""

from __future__ import annotations

from collections.abc import Sequence

from falign.data import PromptRow
from falign.errors import RewardError
from falign.rollouts import Engine
from falign.training.online.groups import Draw, GroupSampler
from falign.training.processes import gathered, num_processes, part, rank

__all__ = ["DividedSampler"]


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
