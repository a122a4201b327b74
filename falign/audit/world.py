"""A language small enough to enumerate: four tokens, one of which ends a completion, and at most three tokens each.

A model has one free logit vector for each of the 13 prefixes, the empty one included; there are 40 completions. Every
expectation is a finite sum, so every gradient below is exact up to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from falign.objectives import Measure, Vocabulary

__all__ = ["COMPLETIONS", "END", "LONGEST", "MASK", "PREFIX", "PREFIXES", "SYMBOLS", "TOKENS", "World", "worlds"]

END, SYMBOLS, LONGEST = 0, 4, 3


def _completions() -> list[tuple[int, ...]]:
    found = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(SYMBOLS), repeat=length):
            if END not in tokens[:-1] and (tokens[-1] == END or length == LONGEST):
                found.append(tokens)
    return found


COMPLETIONS = _completions()
PREFIXES = sorted({tokens[:t] for tokens in COMPLETIONS for t in range(len(tokens))})


def _tables() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.zeros(len(COMPLETIONS), LONGEST, dtype=torch.long)
    mask, prefix = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens)
    for row, completion in enumerate(COMPLETIONS):
        for t, token in enumerate(completion):
            tokens[row, t], mask[row, t], prefix[row, t] = token, True, PREFIXES.index(completion[:t])
    return tokens, mask, prefix


TOKENS, MASK, PREFIX = _tables()
"""Of every completion, shape (40, 3): its tokens, the positions that count, and the prefix that predicts each token."""


def _passes_through() -> Float[Tensor, "S N"]:
    """1 where a completion has a prefix and another token after it."""
    through = torch.zeros(len(PREFIXES), len(COMPLETIONS), dtype=torch.float64)
    for row in range(len(COMPLETIONS)):
        through[PREFIX[row][MASK[row]], row] = 1.0
    return through


PASSES_THROUGH = _passes_through()


@dataclass(frozen=True, eq=False)
class World:
    """A policy and the fixed models beside it, each a table of logits with one row per prefix, shape (13, 4).

    Attributes:
        policy: Logits of π; a leaf that requires a gradient.
        fixed: Logits of the other models by name: ``reference``, ``old`` (the distribution that old samples and given
            data come from), and any further reference.
    """

    policy: Float[Tensor, "S V"]
    fixed: Mapping[str, Float[Tensor, "S V"]] = field(default_factory=dict)

    def table(self, model: str) -> Float[Tensor, "S V"]:
        """Return the log-probabilities of each token after each prefix; ``"policy"`` is differentiable."""
        return (self.policy if model == "policy" else self.fixed[model]).log_softmax(dim=-1)

    def token_logprobs(self, model: str) -> Float[Tensor, "N T"]:
        """Return the log-probability of each token of each completion, 0 outside the mask."""
        return self.table(model)[PREFIX, TOKENS].masked_fill(~MASK, 0.0)

    def sequence_logprobs(self, model: str) -> Float[Tensor, " N"]:
        """Return the log-probability of each completion."""
        return self.token_logprobs(model).sum(dim=-1)

    def law(self, model: str) -> Float[Tensor, " N"]:
        """Return the probability of each completion, a constant."""
        return self.sequence_logprobs(model).detach().exp()

    def visits(self, model: str) -> Float[Tensor, " S"]:
        """Return the probability that a sample passes through each prefix; ``"policy"`` is differentiable."""
        return PASSES_THROUGH @ self.sequence_logprobs(model).exp()

    def measure(self, measure: Measure) -> Float[Tensor, "N T"]:
        """Return the value of a measure at each token of each completion, 0 outside the mask; differentiable."""
        at = Vocabulary(
            logprobs=self.table("policy")[PREFIX[MASK]],
            targets=TOKENS[MASK],
            references={name: self.table(name)[PREFIX[MASK]] for name in measure.references},
            log_normalizer=torch.logsumexp(self.policy, dim=-1, keepdim=True)[PREFIX[MASK]],
            embeddings=EMBEDDINGS,
        )
        return torch.zeros(MASK.shape, dtype=torch.float64).masked_scatter(MASK, measure(at))


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EMBEDDINGS = _normal(90, SYMBOLS, 5)
REWARDS = _normal(91, len(COMPLETIONS))
"""A random value of each completion, by which given pairs are labeled."""

SHIFT = 0.7 * _normal(92, len(COMPLETIONS), LONGEST)
"""Added to the log-probabilities of policy and reference alike, it leaves every probability ratio as it is."""

SCALES = (1.0, 0.4, 1.6, 0.8)


@lru_cache(maxsize=16)
def worlds(references: tuple[str, ...] = ()) -> tuple[World, ...]:
    """Return several policies beside the same fixed models: a constant factor must be the same under all of them.

    Args:
        references: Names of further references.

    Returns:
        Four worlds; their policies are far from the reference, not near it, where all divergences agree to first order.
    """
    shape = len(PREFIXES), SYMBOLS
    fixed = {"reference": _normal(101, *shape), "old": _normal(102, *shape)}
    for i, name in enumerate(sorted(set(references) - set(fixed))):
        fixed[name] = _normal(103 + i, *shape)
    return tuple(World((scale * _normal(i, *shape)).requires_grad_(), fixed) for i, scale in enumerate(SCALES))
