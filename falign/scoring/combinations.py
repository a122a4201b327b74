"""Combinations of next-token distributions: mixtures of probabilities, and geometric ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.errors import ConfigError
from falign.scoring.distributions import Predictions, Reading, Source, normalize

__all__ = ["GeometricPredictions", "MixturePredictions", "geometric", "mixture"]


def mixture(members: Mapping[str, Float[Tensor, "*shape"]], weights: Mapping[str, float]) -> Float[Tensor, "*shape"]:
    """Return ``log Σ_k w_k p_k``.

    Args:
        members: ``log p_k``, of whole distributions or of single tokens, nats.
        weights: ``w_k``, positive, with sum 1.

    Returns:
        A new tensor of the members' shape, nats.

    Example:
        >>> members = {"a": torch.tensor([0.2]).log(), "b": torch.tensor([0.6]).log()}
        >>> mixture(members, {"a": 0.75, "b": 0.25}).exp()
        tensor([0.3000])
    """
    first, *others = weights
    total = members[first] + math.log(weights[first])
    for name in others:
        torch.logaddexp(total, members[name] + math.log(weights[name]), out=total)
    return total


def geometric(members: Mapping[str, Float[Tensor, "*shape"]], weights: Mapping[str, float]) -> Float[Tensor, "*shape"]:
    """Return ``Σ_k w_k log p_k``, which is not normalized.

    Args:
        members: ``log p_k``, of whole distributions or of single tokens, nats.
        weights: ``w_k``, with sum 1; some may be negative.

    Returns:
        A new tensor of the members' shape, nats.

    Example:
        >>> members = {"teacher": torch.tensor([-1.0]), "base": torch.tensor([-2.0])}
        >>> geometric(members, {"teacher": 1.25, "base": -0.25})
        tensor([-0.7500])
    """
    # A token that all members exclude would give -inf + inf: finite bounds, with a finite sum, keep it excluded.
    bound = torch.finfo(next(iter(members.values())).dtype).min / (2 * sum(map(abs, weights.values())))
    first, *others = weights
    total = members[first].clamp(min=bound).mul_(weights[first])
    for name in others:
        total.add_(members[name].clamp(min=bound), alpha=weights[name])
    return total


@dataclass(frozen=True, eq=False)
class MixturePredictions:
    """``p(v) = Σ_k w_k p_k(v)`` at each position.

    Attributes:
        members: ``p_k``, by name.
        weights: ``w_k``, by name; positive, with sum 1.
    """

    members: Mapping[str, Predictions]
    weights: Mapping[str, float]

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of all members."""
        return _sources(self.members)

    def read(self, of: Callable[[Source], Reading]) -> Reading:
        """Return the mixture at a block of positions.

        Args:
            of: Returns what a source gives for this block.

        Returns:
            The reading of the block.

        Raises:
            ConfigError: Of a member only the most likely tokens are known.
        """
        readings = {name: member.read(of) for name, member in self.members.items()}
        of_targets = mixture({name: each.of_targets for name, each in readings.items()}, self.weights)
        return Reading(of_targets, mixture(_whole(readings), self.weights))


@dataclass(frozen=True, eq=False)
class GeometricPredictions:
    """``p(v) ∝ Π_k p_k(v)^{w_k}`` at each position, normalized over the vocabulary.

    Attributes:
        members: ``p_k``, by name.
        weights: ``w_k``, by name; with sum 1, some may be negative.
    """

    members: Mapping[str, Predictions]
    weights: Mapping[str, float]

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of all members."""
        return _sources(self.members)

    def read(self, of: Callable[[Source], Reading]) -> Reading:
        """Return the normalized combination at a block of positions.

        Args:
            of: Returns what a source gives for this block.

        Returns:
            The reading of the block.

        Raises:
            ConfigError: Of a member only the most likely tokens are known.
        """
        readings = {name: member.read(of) for name, member in self.members.items()}
        logprobs, _, log_normalizer = normalize(geometric(_whole(readings), self.weights))
        of_targets = geometric({name: each.of_targets for name, each in readings.items()}, self.weights)
        return Reading(of_targets - log_normalizer[:, 0], logprobs)


def _sources(members: Mapping[str, Predictions]) -> tuple[Source, ...]:
    return tuple(source for member in members.values() for source in member.sources)


def _whole(readings: Mapping[str, Reading]) -> dict[str, Tensor]:
    found = {name: each.logprobs for name, each in readings.items() if each.logprobs is not None}
    if missing := sorted(readings.keys() - found.keys()):
        raise ConfigError(
            f"A combination of references reads the whole distributions of its members, and of {missing[0]!r} only the "
            "most likely tokens are stored: leave out that cache."
        )
    return found
