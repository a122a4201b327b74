"""One completion's scores as a row of plain values."""

from __future__ import annotations

from typing import NotRequired

from torch import Tensor
from typing_extensions import TypedDict

__all__ = ["ScoreRow", "plain_floats"]


class ScoreRow(TypedDict):
    """The scores of one completion; lists have one value per token, logs are in nats.

    Attributes:
        place: The row of the source.
        completion: Index of the completion within the row, from 0.
        preference: Larger is preferred within the row; None where the source has none.
        num_tokens: Tokens of the completion, its stop token included.
        token_ids: Their ids.
        logprobs: log π.
        reference_logprobs: log π_ref.
        log_ratios: log π - log π_ref.
        log_ratio: Their sum.
        implicit_reward: What the objective takes for the completion's reward.
        entropy: Entropy of the policy's distribution.
        token_divergence: D_f of the policy's distribution from the reference's, where the objective has one per token.
    """

    place: str
    completion: int
    preference: float | None
    num_tokens: int
    token_ids: list[int]
    logprobs: list[float]
    reference_logprobs: list[float]
    log_ratios: list[float]
    log_ratio: float
    implicit_reward: float
    entropy: list[float]
    token_divergence: NotRequired[list[float]]


def plain_floats(values: Tensor) -> list[float]:
    """Return a vector's values with nine digits, which tell any two 32-bit numbers apart.

    Example:
        >>> import torch
        >>> plain_floats(torch.tensor([0.1]))
        [0.100000001]
    """
    return [float(f"{value:.9g}") for value in values.tolist()]
