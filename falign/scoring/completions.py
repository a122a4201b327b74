"""From a batch of tokens to what is known about each completion token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.divergences import Divergence
from falign.scoring.attention_masks import tree_masks
from falign.scoring.backbone import run_backbone
from falign.scoring.batch import TokenBatch
from falign.scoring.head import read_head
from falign.scoring.vocabulary import DEFAULT_CHUNK_TOKENS, Distribution, TokenScores, token_scores

__all__ = ["CompletionStates", "completion_scores", "completion_states"]


class CompletionStates(NamedTuple):
    """A batch as a model without its head sees it.

    Attributes:
        distribution: The prediction of each completion token, in the order of the mask's True places, shape (M, H).
        token_weights: How much the model is activated where it predicts each token, shape (N, T), 0 where masked;
            None unless asked for.
    """

    distribution: Distribution
    token_weights: Float[Tensor, "N T"] | None = None


def completion_states(model: nn.Module, batch: TokenBatch, *, token_weights: bool = False) -> CompletionStates:
    """Run the model without its head.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters, on the device of
            the batch.
        batch: The rows to score, in either layout.
        token_weights: Also return activation weights: for each layer the mean absolute activation, divided by its
            mean over the completion, averaged over layers; so their mean over a completion is 1.

    Returns:
        The states at the positions that predict completion tokens.

    Raises:
        ModelError: If the model has no separate backbone and head.

    Source:
        The weights are falign's own, a function of the prefix alone with a mean of 1, so that β keeps its meaning. The
        MaPO mask of SparsePO (arXiv:2410.05102) is another one: of signed means, scaled to [0, 1].
    """
    mask = tree_masks(model, batch) if batch.attention_mask is None else batch.attention_mask
    outputs = run_backbone(
        model,
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=mask,
        use_cache=False,
        output_hidden_states=token_weights,
    )
    predictor = batch.predictor[batch.completion_mask]
    distribution = Distribution(outputs[0].flatten(0, 1)[predictor], read_head(model))
    if not token_weights:
        return CompletionStates(distribution)
    return CompletionStates(distribution, _activation_weights(outputs.hidden_states, batch))


def completion_scores(
    model: nn.Module,
    batch: TokenBatch,
    *,
    divergence: Divergence | None = None,
    reference: Distribution | None = None,
    value_head: nn.Module | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> TokenScores:
    """Return log π(y_t | x, y_<t), the entropy and, if asked for, D_f(π‖π_ref) at each completion token.

    The backbone runs over the rows; only the positions that predict a completion token reach the head.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters, on the device of
            the batch.
        batch: The rows to score, in either layout.
        divergence: f, taken over the whole vocabulary at each position.
        reference: The reference's states of the same batch, for f; given together with `divergence`.
        value_head: From hidden states, shape (M, H), to values, shape (M, 1); its gradient ends at the hidden states.
        chunk_tokens: How many positions reach the head at once; changes memory and speed alone.

    Returns:
        Log-probabilities and divergences, which carry the gradient, detached entropies and the reference's
        log-probabilities, each of shape (N, T) in float32 (float64 for a float64 model), with 0 where
        `batch.completion_mask` is False.

    Raises:
        ModelError: If the model has no separate backbone and head.
    """
    distribution = completion_states(model, batch).distribution
    scores = token_scores(
        distribution,
        batch.completion_ids[batch.completion_mask],
        divergence=divergence,
        reference=reference,
        chunk_tokens=chunk_tokens,
    )
    if value_head is not None:
        scores = scores._replace(values=value_head(distribution.hidden.detach().to(scores.logprobs.dtype)).squeeze(-1))
    placed = {name: batch.scatter(values) for name, values in scores._asdict().items() if values is not None}
    return TokenScores(**placed)


def _activation_weights(hidden_states: Sequence[Tensor], batch: TokenBatch) -> Float[Tensor, "N T"]:
    predictor = batch.predictor[batch.completion_mask]
    weights = torch.zeros(batch.completion_mask.shape, device=predictor.device)
    num_tokens = batch.completion_mask.sum(dim=-1, keepdim=True)
    layers = hidden_states[1:]  # the first one is the embeddings
    for layer in layers:
        size = batch.scatter(layer.detach().flatten(0, 1)[predictor].float().abs().mean(dim=-1))
        weights += size * num_tokens / size.sum(dim=-1, keepdim=True)
    return weights / len(layers)
