"""The comparison of a loss's gradient with the true gradient of every divergence, over several policies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from falign.audit.samples import CHOSEN, REJECTED, MeanGradient, PairSlopes, pair_weights
from falign.audit.truth import TruthLevel, true_gradient
from falign.audit.world import MASK, World
from falign.divergences import Divergence

__all__ = ["PAIR_LEVELS", "Comparison", "compare_means", "compare_pairs", "is_zero", "sum_of_two"]

SAME_DIRECTION = 1e-9
"""Largest ``1 - cosine`` of two gradients that are called the same."""
SAME_FACTOR = 1e-7
"""Largest relative difference, between policies, of a factor that is called constant."""
ZERO = 1e-10
"""Largest norm of a mean gradient that is called zero, relative to the single samples' gradients."""

PAIR_LEVELS = ("sequence", "token_mean")
"""Of the implicit reward of pairs: ``f'(u)`` with u the ratio of whole completions, or its geometric mean per token."""


@dataclass(frozen=True)
class Comparison:
    """A loss's gradient beside the true gradient of one divergence at one level.

    Attributes:
        divergence: Name of the divergence.
        level: Its level; see :data:`falign.audit.truth.TruthLevel` and :data:`PAIR_LEVELS`.
        reference: Name of the reference that the policy is compared with.
        cosines: Cosine of the two gradients, one per policy. NaN where the true gradient is zero.
        ratios: Size of the loss's gradient along the true one, over that one's size, one per policy; of pairs empty,
            because each pair's size is set by the loss of its margin.
        constant: Whether the ratio is one number, whatever the policy; of pairs, whether their size depends on the
            probability ratios alone.
    """

    divergence: str
    level: str
    reference: str
    cosines: tuple[float, ...]
    ratios: tuple[float, ...]
    constant: bool

    @property
    def cosine(self) -> float:
        """Mean over policies."""
        return fmean(self.cosines)

    @property
    def ratio(self) -> float:
        """Mean over policies; NaN for pairs."""
        return fmean(self.ratios) if self.ratios else math.nan

    @property
    def same_direction(self) -> bool:
        """True if the gradients point the same way under every policy."""
        return all(1 - cosine <= SAME_DIRECTION for cosine in self.cosines)

    @property
    def opposite(self) -> bool:
        """True if they point in opposite ways under every policy."""
        return all(1 + cosine <= SAME_DIRECTION for cosine in self.cosines)

    @property
    def exact(self) -> bool:
        """True if the loss's gradient is a constant times the true one."""
        return self.same_direction and self.constant


def is_zero(mean: MeanGradient) -> bool:
    """Return True if a mean gradient vanishes beside those of single samples."""
    return mean.gradient.norm().item() <= ZERO * mean.size


def compare_means(
    means: Sequence[MeanGradient],
    worlds: Sequence[World],
    divergences: Sequence[Divergence],
    levels: Sequence[TruthLevel],
    references: Sequence[str],
) -> Iterator[Comparison]:
    """Yield the comparison with every divergence, level and reference.

    Args:
        means: The loss's gradient in each world.
        worlds: The worlds.
        divergences: Divergences to compare with.
        levels: Levels to compare with.
        references: Names of the references to compare with.
    """
    for reference, divergence, level in itertools.product(references, divergences, levels):
        truths = [true_gradient(divergence, world, level, reference).flatten() for world in worlds]
        own = [mean.gradient.flatten() for mean in means]
        cosines = [_cosine(a, b) for a, b in zip(own, truths, strict=True)]
        ratios = [(a @ b / (b @ b)).item() for a, b in zip(own, truths, strict=True)]
        constant = max(ratios) - min(ratios) <= SAME_FACTOR * max(map(abs, ratios))
        yield Comparison(divergence.name, level, reference, tuple(cosines), tuple(ratios), constant)


def _cosine(a: Tensor, b: Tensor) -> float:
    return (a / a.norm() @ (b / b.norm())).item()


def compare_pairs(
    slopes: Sequence[PairSlopes], worlds: Sequence[World], divergences: Sequence[Divergence]
) -> Iterator[Comparison]:
    """Yield the comparison of a pair loss with f-DPO under every divergence.

    A loss of the margin ``β f'(u_w) - β f'(u_l)``, whatever its shape and β, has slopes in the proportion
    ``-u f''(u)`` of the chosen to ``u f''(u)`` of the rejected side, at every pair. So each pair's slopes are compared
    with that direction, with a factor of its own: the slope of the margin's loss, which a squared loss turns around
    beyond its target. If the factors also depend on the probability ratios alone, the loss is a function of the margin.

    Args:
        slopes: The loss's slopes in each world.
        worlds: The worlds.
        divergences: Divergences to compare with; one whose ``u f''(u)`` is 0 everywhere is left out.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240), Theorem 1; the derivative of its margin.
    """
    for divergence, level in itertools.product(divergences, PAIR_LEVELS):
        cosines = [_pair_cosine(own, world, divergence, level) for own, world in zip(slopes, worlds, strict=True)]
        if not any(math.isnan(cosine) for cosine in cosines):
            constant = all(own.of_ratios for own in slopes)
            yield Comparison(divergence.name, level, "reference", tuple(cosines), (), constant)


def _pair_cosine(own: PairSlopes, world: World, divergence: Divergence, level: str) -> float:
    lengths = MASK.sum(dim=-1).double()
    log_u = (world.sequence_logprobs("policy") - world.sequence_logprobs("reference")).detach()
    log_u = log_u / lengths if level == "token_mean" else log_u
    leaf = log_u.requires_grad_()
    value = divergence.f_prime(leaf).sum()
    if not value.requires_grad:
        return math.nan
    (weight,) = torch.autograd.grad(value, leaf)
    per_token = weight / lengths if level == "token_mean" else weight
    if not per_token.any():
        return math.nan
    expected = torch.cat([-per_token[CHOSEN][:, None] * MASK[CHOSEN], per_token[REJECTED][:, None] * MASK[REJECTED]], 1)
    given = torch.cat([own.chosen, own.rejected], dim=1)
    along = (given * expected).sum(dim=-1) / expected.norm(dim=-1)
    often = pair_weights(world)
    size = (often * (given.square().sum(dim=-1) + own.beside)).sum()
    cosine = ((often * along.square()).sum() / size).sqrt().item()
    return -cosine if (along <= 0).all() else cosine


def sum_of_two(
    means: Sequence[MeanGradient],
    worlds: Sequence[World],
    divergences: Sequence[Divergence],
    level: TruthLevel,
    reference: str = "reference",
) -> tuple[tuple[float, str], tuple[float, str]] | None:
    """Return two divergences and the factors with which their gradients add up to the loss's, if there are any.

    Args:
        means: The loss's gradient in each world.
        worlds: The worlds.
        divergences: Divergences to choose from.
        level: Level of both.
        reference: Name of the reference.
    """
    own = torch.cat([mean.gradient.flatten() for mean in means])
    truths = [
        torch.cat([true_gradient(each, world, level, reference).flatten() for world in worlds]) for each in divergences
    ]
    for i, j in itertools.combinations(range(len(divergences)), 2):
        both = torch.stack([truths[i], truths[j]], dim=-1)
        if abs(_cosine(truths[i], truths[j])) > 1 - 1e-6:  # two names of one direction
            continue
        factors = torch.linalg.lstsq(both, own[:, None]).solution
        if (both @ factors - own[:, None]).norm() <= 1e-8 * own.norm():
            first, second = factors.flatten().tolist()
            return (first, divergences[i].name), (second, divergences[j].name)
    return None
