"""The gradient of a loss in a world: its mean over all samples, or the slopes of every pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from falign.audit.functions import OF_PAIRS, Credit, LossLevel, Use, arguments_of, inputs_of, row_slopes
from falign.audit.world import COMPLETIONS, LONGEST, MASK, PREFIX, REWARDS, SHIFT, World
from falign.divergences import Divergence
from falign.errors import ConfigError

__all__ = ["CHOSEN", "REJECTED", "FunctionLoss", "MeanGradient", "PairSlopes", "Samples", "Subject", "pair_weights"]

Samples = Literal["policy", "reference", "old", "pairs"]
"""Where completions come from: the policy itself, the reference, an older policy (also: given data), or given pairs."""

N = len(COMPLETIONS)
CHOSEN, REJECTED = torch.tensor([(i, j) for i in range(N) for j in range(N) if REWARDS[i] > REWARDS[j]]).unbind(dim=-1)
"""The completions of every pair, the one with the higher reward first, shape (780,) each."""


def pair_weights(world: World) -> Float[Tensor, " P"]:
    """Return how often each pair occurs: two samples of the old policy."""
    law = world.law("old")
    return 2 * law[CHOSEN] * law[REJECTED]


class MeanGradient(NamedTuple):
    """The exact mean gradient of a loss.

    Attributes:
        gradient: By the policy's logits, shape (13, 4).
        size: Root mean square of the single samples' gradients, by which a mean of zero is recognized.
    """

    gradient: Float[Tensor, "S V"]
    size: float


class PairSlopes(NamedTuple):
    """The gradient of the loss of each pair by the log-probabilities of its tokens.

    Attributes:
        chosen: Shape (P, T), 0 outside the mask.
        rejected: Likewise.
        beside: Squared norm of each pair's gradient by anything else that carries the policy.
        of_ratios: Whether the slopes depend on ``π/π_ref`` alone.
    """

    chosen: Float[Tensor, "P T"]
    rejected: Float[Tensor, "P T"]
    beside: Float[Tensor, " P"]
    of_ratios: bool = True


@runtime_checkable
class Subject(Protocol):
    """Loss or objective under audit."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        ...

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the references that it reads."""
        ...

    @property
    def of_pairs(self) -> bool:
        """True if it is a loss of pairs."""
        ...

    @property
    def reads_rewards(self) -> bool:
        """True if it is given rewards."""
        ...

    @property
    def divergences(self) -> tuple[Divergence, ...]:
        """Divergences that it is made of, which are compared with beside those of the registry."""
        ...

    def mean_gradient(self, world: World, samples: Samples) -> MeanGradient:
        """Return the mean of its gradient over all samples."""
        ...

    def pair_slopes(self, world: World) -> PairSlopes:
        """Return its gradient at every pair."""
        ...


@dataclass(frozen=True)
class FunctionLoss:
    """A loss that is a function of log-probabilities, which it asks for by name.

    Attributes:
        function: The loss; see :func:`falign.audit`.
        name: Its name in messages.
        level: Whether it is given rows of tokens or sums over completions; None means tokens, of pairs sums.
        use: See :func:`falign.audit.functions.row_slopes`.
        credit: Likewise.

    Raises:
        ConfigError: The function asks for an unknown argument.
    """

    function: Callable[..., Any]
    name: str
    level: LossLevel | None = None
    use: Use = "loss"
    credit: Credit = "returns"

    def __post_init__(self) -> None:
        _ = self.asked

    @property
    def asked(self) -> list[str]:
        """Names of the arguments that it is given."""
        return arguments_of(self.function, self.name)

    @property
    def references(self) -> tuple[str, ...]:
        """See :class:`Subject`."""
        named = ("reference", "teacher", "base")
        found = [name for name in named if any(f"{name}_" in asked for asked in self.asked)]
        return tuple(found)

    @property
    def of_pairs(self) -> bool:
        """See :class:`Subject`."""
        return any(each in OF_PAIRS for each in self.asked)

    @property
    def reads_rewards(self) -> bool:
        """See :class:`Subject`."""
        return "rewards" in self.asked

    @property
    def divergences(self) -> tuple[Divergence, ...]:
        """See :class:`Subject`."""
        return ()

    def mean_gradient(self, world: World, samples: Samples) -> MeanGradient:
        """See :class:`Subject`.

        Raises:
            ConfigError: The loss cannot be enumerated.
        """
        level = self.level or "token"
        inputs = inputs_of(world, self.asked, self.name, level, on_policy=samples == "policy")
        slopes, weights = row_slopes(self.function, self.name, inputs, MASK, use=self.use, credit=self.credit)
        law = world.law(samples) / (world.law(samples) * weights).sum()
        leaves = {
            "logprobs": world.token_logprobs("policy"),
            "vocabulary_logprobs": world.table("policy")[PREFIX],
        }
        if level == "sequence" and self.use == "loss":
            leaves["logprobs"] = leaves["logprobs"].sum(dim=-1)
        return mean_of(world, law, {key: (slope, leaves[key]) for key, slope in slopes.items()})

    def pair_slopes(self, world: World) -> PairSlopes:
        """See :class:`Subject`.

        Raises:
            ConfigError: The loss cannot be enumerated.
        """
        if self.use != "loss":
            raise ConfigError(f"use={self.use!r} with samples='pairs': pairs have no rewards; set samples='policy'.")
        here, moved = (self._pair_slopes(world, shift) for shift in (torch.zeros(N, LONGEST).double(), SHIFT))
        return here._replace(of_ratios=same_slopes(here, moved))

    def _pair_slopes(self, world: World, shift: Tensor) -> PairSlopes:
        level, inputs = self.level or "sequence", {}
        for each in self.asked:
            if each not in OF_PAIRS:
                raise ConfigError(
                    f"{self.name} asks for {each!r} and for pairs: it must ask for {', '.join(OF_PAIRS)} only."
                )
            rows = CHOSEN if "chosen" in each else REJECTED
            if each.endswith("mask"):
                if level == "sequence":
                    raise ConfigError(f"{self.name} asks for {each!r}, which sums do not have: set level='token'.")
                inputs[each] = MASK[rows]
                continue
            model = "reference" if each.startswith("reference") else "policy"
            per_token = (world.token_logprobs(model).detach() + shift).masked_fill(~MASK, 0.0)[rows]
            inputs[each] = per_token if level == "token" else per_token.sum(dim=-1)
        masks = MASK[CHOSEN], MASK[REJECTED]
        slopes, _ = row_slopes(self.function, self.name, inputs, masks[0], rejected_mask=masks[1])
        sides = []
        for key, mask in zip(("chosen_logprobs", "rejected_logprobs"), masks, strict=True):
            slope = slopes.get(key, torch.zeros(mask.shape, dtype=torch.float64))
            per_token = slope if slope.ndim > 1 else slope[:, None].expand(mask.shape)
            sides.append(per_token.masked_fill(~mask, 0.0))
        chosen, rejected = sides
        return PairSlopes(chosen, rejected, torch.zeros(len(CHOSEN), dtype=torch.float64))


def same_slopes(first: PairSlopes, second: PairSlopes) -> bool:
    """Return True if two evaluations agree."""
    size = max(first.chosen.abs().max().item(), first.rejected.abs().max().item())
    return all(
        (one - other).abs().max().item() <= 1e-6 * size for one, other in zip(first[:2], second[:2], strict=True)
    )


def mean_of(world: World, law: Float[Tensor, " M"], parts: dict[str, tuple[Tensor, Tensor]]) -> MeanGradient:
    """Return ``Σ_i P(i) Σ slope · ∇leaf``.

    Args:
        world: The models.
        law: Weight of each row.
        parts: Slope and differentiable leaf by name, one row per sample.
    """
    total, size = torch.zeros((), dtype=torch.float64), 0.0
    for slope, leaf in parts.values():
        weight = law.view(-1, *[1] * (slope.ndim - 1))
        total = total + (weight * slope * leaf).sum()
        size += (weight * slope.square()).sum().item()
    (gradient,) = torch.autograd.grad(total, world.policy)
    return MeanGradient(gradient, size**0.5)
