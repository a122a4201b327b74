"""A language small enough to enumerate: four tokens, one of which ends a completion, and at most three tokens each.

The policy has one free logit vector for each of the 13 prefixes; there are 40 completions. Every expectation is a sum.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

END, VOCABULARY, LONGEST = 0, 4, 3


def _completions() -> list[tuple[int, ...]]:
    found = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            ends = tokens[-1] == END or length == LONGEST
            if ends and END not in tokens[:-1]:
                found.append(tokens)
    return found


COMPLETIONS = _completions()
PREFIXES = sorted({tokens[:t] for tokens in COMPLETIONS for t in range(len(tokens))})


@dataclass(frozen=True)
class Enumeration:
    """All completions: token ids, mask, and the row of the logit table that predicts each token; shape (N, T)."""

    tokens: Tensor
    mask: Tensor
    prefix: Tensor


def enumerate_world() -> Enumeration:
    tokens = torch.zeros(len(COMPLETIONS), LONGEST, dtype=torch.long)
    mask, prefix = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens)
    for row, completion in enumerate(COMPLETIONS):
        for t, token in enumerate(completion):
            tokens[row, t], mask[row, t], prefix[row, t] = token, True, PREFIXES.index(completion[:t])
    return Enumeration(tokens, mask, prefix)


WORLD = enumerate_world()


def random_logits(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(PREFIXES), VOCABULARY, generator=generator, dtype=torch.float64)


def token_logprobs(logits: Tensor) -> Tensor:
    """``log π(y_t | y_<t)`` of every completion, shape (N, T), zero outside the mask."""
    table = logits.log_softmax(dim=-1)
    return table[WORLD.prefix, WORLD.tokens].masked_fill(~WORLD.mask, 0.0)


def sequence_logprobs(logits: Tensor) -> Tensor:
    return token_logprobs(logits).sum(dim=-1)
