"""Log-probabilities of the completions of a padded batch."""

from __future__ import annotations

from torch import nn

from falign.scoring.backbone import read_backbone
from falign.scoring.head import DEFAULT_CHUNK_TOKENS, TokenScores, read_head, token_logprobs
from falign.scoring.padded import PaddedBatch

__all__ = ["completion_logprobs"]


def completion_logprobs(
    model: nn.Module, batch: PaddedBatch, *, chunk_tokens: int = DEFAULT_CHUNK_TOKENS
) -> TokenScores:
    """Return log π(y_t | x, y_<t) and the entropy at each completion token.

    The backbone runs over the whole rows; only the positions that predict a completion token reach the head.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters, on the device of
            the batch.
        batch: The rows to score.
        chunk_tokens: How many positions reach the head at once; changes memory and speed alone.

    Returns:
        Log-probabilities, which carry the gradient, and detached entropies, each of shape (N, T) in float32
        (float64 for a float64 model), with 0 where `batch.completion_mask` is False.

    Raises:
        ModelError: If the model has no separate backbone and head.
    """
    outputs = read_backbone(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    rows, tokens = batch.completion_mask.nonzero(as_tuple=True)
    scores = token_logprobs(
        outputs[0][rows, batch.predictor[rows, tokens]],
        read_head(model),
        batch.completion_ids[rows, tokens],
        chunk_tokens=chunk_tokens,
    )
    nowhere = scores.entropy.new_zeros(batch.completion_mask.shape)
    return TokenScores(
        logprobs=nowhere.masked_scatter(batch.completion_mask, scores.logprobs),
        entropy=nowhere.masked_scatter(batch.completion_mask, scores.entropy),
    )
