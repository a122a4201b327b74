"""From a batch of tokens to hidden states and scores of each completion token."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.objectives import TokenWeighting
from falign.objectives.measures import Measure
from falign.scoring.batch import TokenBatch
from falign.scoring.distributions import Distribution, Predictions
from falign.scoring.learned_masks import layer_states
from falign.scoring.model_parts import read_head, run_backbone
from falign.scoring.token_weights import MapoMask, activation_weights
from falign.scoring.tree_attention import tree_masks
from falign.scoring.vocabulary import DEFAULT_CHUNK_TOKENS, TokenScores, token_scores

__all__ = ["CompletionStates", "completion_distribution", "completion_scores", "completion_states"]


class CompletionStates(NamedTuple):
    """Next-token distributions for a batch: of a model, before its head, or of a combination of models.

    Attributes:
        distribution: The prediction of each completion token, in the order of the mask's True entries.
        token_weights: Weights from the model's activations at the position that predicts each token, shape (N, T), 0
            where masked; None unless requested.
        layers: Output of each layer at the positions that predict completion tokens, shape (M, layers, H); None unless
            learned masks read it.
    """

    distribution: Predictions
    token_weights: Float[Tensor, "N T"] | None = None
    layers: Float[Tensor, "M layers H"] | None = None


def completion_states(model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none") -> CompletionStates:
    """Run the model without its head.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters, on the device of
            the batch.
        batch: The rows to score, in either layout.
        weighting: Also return token weights: ``"activations"``, falign's own
            (:func:`falign.scoring.token_weights.activation_weights`), or ``"mapo"``, the MaPO mask of SparsePO
            (:class:`falign.scoring.token_weights.MapoMask`). With ``"learned"`` and ``"learned_independent"`` return
            the layers' outputs, from which :class:`falign.scoring.learned_masks.LearnedMasks` are computed.

    Returns:
        The states at the positions that predict completion tokens.

    Raises:
        ModelError: The model has no separate backbone and head, or no activations that ``"mapo"`` can read.
    """
    states = _model_states(model, batch, weighting)
    return CompletionStates(states.distribution, states.token_weights, states.layers)


def completion_distribution(model: nn.Module, batch: TokenBatch) -> Distribution:
    """Return the hidden states that predict each completion token, with the head.

    Args:
        model: As for :func:`completion_states`.
        batch: The rows to score, in either layout.

    Returns:
        M states, in the order of the mask's True entries.

    Raises:
        ModelError: The model has no separate backbone and head.
    """
    return _model_states(model, batch, "none").distribution


class _ModelStates(NamedTuple):
    """`CompletionStates` of a model, and its last hidden states at all R·L positions."""

    distribution: Distribution
    hidden: Float[Tensor, "positions H"]
    token_weights: Float[Tensor, "N T"] | None = None
    layers: Float[Tensor, "M layers H"] | None = None

    @property
    def precision(self) -> torch.dtype:
        """The type that scores are computed in."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


def _model_states(model: nn.Module, batch: TokenBatch, weighting: TokenWeighting) -> _ModelStates:
    mask = tree_masks(model, batch) if batch.attention_mask is None else batch.attention_mask
    learns = weighting in ("learned", "learned_independent")
    mapo = MapoMask(model, batch) if weighting == "mapo" else None
    with nullcontext() if mapo is None else mapo.recording():
        outputs = run_backbone(
            model,
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=mask,
            use_cache=False,
            output_hidden_states=weighting == "activations" or learns,
        )
    predictor = batch.predictor[batch.completion_mask]
    hidden = outputs[0].flatten(0, 1)
    distribution = Distribution(hidden[predictor], read_head(model))
    if mapo is not None:
        return _ModelStates(distribution, hidden, mapo.weights(distribution, chunk_tokens=DEFAULT_CHUNK_TOKENS))
    if weighting == "activations":
        return _ModelStates(distribution, hidden, activation_weights(outputs.hidden_states, batch))
    return _ModelStates(distribution, hidden, layers=layer_states(outputs.hidden_states, batch) if learns else None)


def completion_scores(
    model: nn.Module,
    batch: TokenBatch,
    *,
    measures: Mapping[str, Measure] | None = None,
    references: Mapping[str, Predictions] | None = None,
    value_head: nn.Module | None = None,
    reward_head: nn.Module | None = None,
    with_vocabulary: bool = True,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> TokenScores:
    """Return log π(y_t | x, y_<t), the entropy and any measures of π(· | x, y_<t) at each completion token.

    The backbone runs over the rows; only the positions that predict a completion token reach the head.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters, on the device of
            the batch.
        batch: The rows to score, in either layout.
        measures: Functionals of the whole distribution at each position, by name.
        references: Each reference's distributions for the same batch, by name, for those that the measures read.
        value_head: From hidden states, shape (M, H), to values, shape (M, 1), or (M, 2) of two heads; its gradient
            stops at the hidden states.
        reward_head: From the hidden state at a completion's last token, shape (N, H), to a reward, shape (N, 1); its
            gradient reaches the model.
        with_vocabulary: False leaves out the head: log-probabilities and entropies are then NaN.
        chunk_tokens: Number of positions that reach the head at once; affects only memory and speed.

    Returns:
        Log-probabilities and measures, which carry the gradient, detached entropies, and the references'
        log-probabilities, each of shape (N, T) in float32 (float64 for a float64 model), with 0 where
        `batch.completion_mask` is False.

    Raises:
        ModelError: If the model has no separate backbone and head.
    """
    states = _model_states(model, batch, "none")
    distribution = states.distribution
    if with_vocabulary:
        scores = token_scores(
            distribution,
            batch.completion_ids[batch.completion_mask],
            measures=measures,
            references=references,
            chunk_tokens=chunk_tokens,
        )
    else:
        unknown = distribution.hidden.new_full((len(distribution.hidden),), torch.nan, dtype=states.precision)
        scores = TokenScores(unknown, unknown, {}, {}, unknown, unknown)
    rewards = None
    if reward_head is not None:
        rewards = reward_head(states.hidden[batch.last_tokens].to(states.precision)).squeeze(-1)
    if value_head is not None:
        first, *second = value_head(distribution.hidden.detach().to(scores.logprobs.dtype)).unbind(-1)
        scores = scores._replace(values=first, second_values=second[0] if second else None)
    return TokenScores(
        batch.scatter(scores.logprobs),
        batch.scatter(scores.entropy),
        {name: batch.scatter(values) for name, values in scores.measures.items()},
        {name: batch.scatter(values) for name, values in scores.references.items()},
        batch.scatter(scores.most_likely),
        batch.scatter(scores.mean_logits),
        None if scores.values is None else batch.scatter(scores.values),
        None if scores.second_values is None else batch.scatter(scores.second_values),
        rewards,
    )
