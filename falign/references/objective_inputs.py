"""What an objective reads of a batch: the policy's side, and the reference's as far as it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from falign.objectives import CompletionBatch, Objective, WeightingObjective
from falign.references.base import Reference
from falign.scoring import DEFAULT_CHUNK_TOKENS, TokenBatch, Weighting, completion_scores

__all__ = ["ObjectiveInputs", "completion_batch", "objective_inputs", "token_weighting"]


class ObjectiveInputs(NamedTuple):
    """A scored batch.

    Attributes:
        completions: What the objective is called with.
        entropy: Entropy of the policy's distribution at each completion token, nats, shape (N, T); detached.
    """

    completions: CompletionBatch
    entropy: Float[Tensor, "N T"]


def objective_inputs(
    policy_model: nn.Module,
    batch: TokenBatch,
    *,
    reference: Reference,
    objective: Objective,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    wrapped: nn.Module | None = None,
    columns: Mapping[str, Tensor] | None = None,
    value_head: nn.Module | None = None,
) -> ObjectiveInputs:
    """Score a batch under reference and policy, as an objective needs it.

    Args:
        policy_model: The policy; it is run in the mode that it is in.
        batch: The rows to score.
        reference: What the policy is held to.
        objective: Its ``needs`` and ``token_divergence`` say what is computed.
        chunk_tokens: How many positions reach the head at once.
        wrapped: The policy in what makes it run on several devices, to be called in its place; the reference gets the
            policy itself, whose adapters it may have to switch.
        columns: Fields of the batch that are known; what is among them is not computed.
        value_head: See :func:`falign.scoring.completion_scores`; for objectives that read ``values``.

    Returns:
        The completions, whose log-probabilities and divergences carry the policy's gradient, and the entropies.
    """
    model = policy_model if wrapped is None else wrapped
    extra: dict[str, Tensor | None] = {**(columns or {})}
    wants_values = value_head if "values" in objective.needs else None
    if objective.token_divergence is not None:
        # Whole distributions of the reference first, so that its pass is over before the policy's graph is kept.
        states = reference.states(policy_model, batch, weighting=token_weighting(objective))
        scores = completion_scores(
            model,
            batch,
            divergence=objective.token_divergence,
            reference=states.distribution,
            value_head=wants_values,
            chunk_tokens=chunk_tokens,
        )
        extra |= {
            "token_divergence": scores.divergence,
            "reference_logprobs": scores.reference_logprobs,
            "token_weights": states.token_weights,
        }
    else:
        if "reference_logprobs" in objective.needs and "reference_logprobs" not in extra:
            extra["reference_logprobs"] = reference.logprobs(policy_model, batch)
        scores = completion_scores(model, batch, value_head=wants_values, chunk_tokens=chunk_tokens)
    if scores.values is not None:
        extra["values"] = scores.values
    # On the first update of a rollout the policy is the one that sampled.
    now = {"old_logprobs": scores.logprobs, "old_values": scores.values}
    extra |= {
        name: value.detach()
        for name, value in now.items()
        if name in objective.needs and name not in extra and value is not None
    }
    return ObjectiveInputs(completion_batch(batch, scores.logprobs, **extra), scores.entropy)


def token_weighting(objective: Objective) -> Weighting:
    """Return the kind of token weights that an objective needs, ``"none"`` where it reads none.

    Objectives that need ``token_weights`` and name no kind get ``"activations"``.
    """
    if "token_weights" not in objective.needs:
        return "none"
    return objective.weighting if isinstance(objective, WeightingObjective) else "activations"


def completion_batch(batch: TokenBatch, logprobs: Float[Tensor, "N T"], **fields: Tensor | None) -> CompletionBatch:
    """Return the completions of a batch with their log-probabilities and optional fields."""
    return CompletionBatch(
        logprobs=logprobs,
        completion_mask=batch.completion_mask,
        prompt_index=batch.prompt_index,
        preference=batch.preference,
        **fields,
    )
