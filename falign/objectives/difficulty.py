"""Token weights by the difficulty of a prompt: functions of the share of its completions that pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from falign.numeric_fields import NumericFields
from falign.objectives.batch import CompletionBatch
from falign.objectives.groups import groups_of, total
from falign.objectives.measures import Measure

__all__ = ["Dads", "DifficultyKernel"]


def _passes(batch: CompletionBatch, pass_reward: float) -> tuple[Bool[Tensor, " N"], Float[Tensor, " N"]]:
    """Return which completions pass, and the pass rate of each one's prompt."""
    groups, rewards = groups_of(batch.prompt_index), batch.require("rewards")
    passed = rewards >= pass_reward
    return passed, total(passed.to(rewards.dtype), groups) / groups.size


def _check_pass_reward(pass_reward: float, name: str) -> None:
    if not math.isfinite(pass_reward):
        raise ValueError(f"{name}: pass_reward={pass_reward!r} must be finite.")


@dataclass(frozen=True)
class DifficultyKernel(NumericFields):
    """``p^a (1 - p)^b`` for every token of a prompt's completions, p the share of its completions that pass.

    With positive a and b it is 0 for prompts that always or never pass, and largest at ``p = a/(a + b)``. ``a = b = 0``
    is 1 everywhere.

    Attributes:
        a: Exponent of p, not negative.
        b: Exponent of 1 - p, not negative.
        pass_reward: A completion with at least this reward passes.

    Raises:
        ValueError: An exponent is negative or infinite, or ``pass_reward`` is not finite.

    Source:
        Xu et al., PACED (arXiv:2603.11178), with the current rollout's pass rate; ``a = b = 1`` is its default.
    """

    a: float = 1.0
    b: float = 1.0
    pass_reward: float = 1.0

    def __post_init__(self) -> None:
        for name, value in {"a": self.a, "b": self.b}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"difficulty_kernel: {name}={value!r} must be finite and not negative.")
        _check_pass_reward(self.pass_reward, "difficulty_kernel")

    @property
    def needs(self) -> frozenset[str]:
        """The rewards."""
        return frozenset({"rewards"})

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Empty."""
        return {}

    def __call__(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return the kernel of each prompt's pass rate.

        Args:
            batch: All completions of each prompt, with ``rewards``.

        Returns:
            Shape (N, T), within [0, 1].
        """
        _, rate = _passes(batch, self.pass_reward)
        return (rate**self.a * (1 - rate) ** self.b)[:, None].expand(batch.logprobs.shape)


@dataclass(frozen=True)
class Dads(NumericFields):
    """``1 - e^(-e p)`` for every token of a completion that passes, p the pass rate of its prompt; 1 for all others.

    It is 1 too where all completions of a prompt pass. As a weight of the penalty it lets right answers to hard prompts
    move away from the reference.

    Attributes:
        pass_reward: A completion with at least this reward passes.

    Raises:
        ValueError: ``pass_reward`` is not finite.

    Source:
        APO, asymmetric policy optimization: the part called DADS, from its code, with d = 1 - p.
    """

    pass_reward: float = 1.0

    def __post_init__(self) -> None:
        _check_pass_reward(self.pass_reward, "dads")

    @property
    def needs(self) -> frozenset[str]:
        """The rewards."""
        return frozenset({"rewards"})

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Empty."""
        return {}

    def __call__(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return the weight of each completion.

        Args:
            batch: All completions of each prompt, with ``rewards``.

        Returns:
            Shape (N, T), within (0, 1].
        """
        passed, rate = _passes(batch, self.pass_reward)
        weights = torch.where(passed & (rate < 1), -torch.expm1(-math.e * rate), torch.ones_like(rate))
        return weights[:, None].expand(batch.logprobs.shape)
