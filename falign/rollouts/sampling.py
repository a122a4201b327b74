"""From logits to drawn tokens: the distribution that is sampled from, and the draw."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.rollouts.base import SamplingParams

__all__ = ["Draw", "draw", "process_logits", "uniform_streams"]

_STREAMS = 1_000_003  # streams of different seeds do not overlap before this many rows


class Draw(NamedTuple):
    """One token per row.

    Attributes:
        token_ids: The drawn ids, shape (B,).
        logprobs: Their log-probabilities, nats, shape (B,); NaN if the logits are NaN or infinite.
    """

    token_ids: Int[Tensor, " B"]
    logprobs: Float[Tensor, " B"]


def process_logits(logits: Float[Tensor, "B V"], params: SamplingParams) -> Float[Tensor, "B V"]:
    """Return the logits to sample from: divided by the temperature, and -inf outside top-k and top-p.

    Args:
        logits: The model's, shape (B, V).
        params: Its temperature is above 0.

    Returns:
        Shape (B, V), in the type of `logits`.
    """
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        last_kept = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last_kept, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
        # A token is dropped if the likelier ones already have the mass, so the likeliest token always stays.
        outside = probabilities.cumsum(dim=-1) - probabilities >= params.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits


def draw(logits: Float[Tensor, "B V"], params: SamplingParams, uniforms: Float[Tensor, " B"]) -> Draw:
    """Draw a token per row by inverting the cumulative distribution.

    Args:
        logits: The model's, shape (B, V).
        params: How to draw.
        uniforms: One number in [0, 1) per row, float64, shape (B,); not read when decoding greedily.

    Returns:
        The tokens and their log-probabilities under the processed distribution.
    """
    if params.temperature == 0:
        peak = logits.max(dim=-1)
        return Draw(peak.indices, peak.values - peak.values)  # 0, or NaN if the logits are not finite
    logits = process_logits(logits, params)
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    # float64, because V rounding errors of a float32 sum would distort the tail.
    cumulative = shifted.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # The first token with a cumulative sum above the target: never a token of probability 0.
    token_ids = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True).clamp(max=logits.shape[-1] - 1)
    logprobs = shifted.gather(-1, token_ids) - total.log()
    return Draw(token_ids[:, 0], logprobs[:, 0])


def uniform_streams(rows: list[int], count: int, *, seed: int | list[int]) -> Float[Tensor, "B T"]:
    """Return random numbers in [0, 1); each row has its own stream, independent of the other rows.

    Args:
        rows: Indices of the streams in the whole call.
        count: Numbers per stream; a larger count begins with the same numbers.
        seed: Seed of the call, or one per row.

    Returns:
        float64 on the CPU, shape (B, T).
    """
    generator = torch.Generator()
    each = [seed] * len(rows) if isinstance(seed, int) else seed
    seeds = [(own * _STREAMS + row) % 2**63 for own, row in zip(each, rows, strict=True)]
    streams = [torch.rand(count, generator=generator.manual_seed(stream), dtype=torch.float64) for stream in seeds]
    # Below 1 even after rounding: a product equal to the total would select no token.
    return torch.stack(streams) * (1 - 2**-52)
