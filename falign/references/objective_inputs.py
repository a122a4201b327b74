"""The inputs of an objective: a batch scored under the policy and the required references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from falign.objectives import (
    CompletionBatch,
    Measure,
    Objective,
    field_of,
    reference_names,
    references_of,
    token_weighting,
)
from falign.references.base import REFERENCE, Reference
from falign.scoring import DEFAULT_CHUNK_TOKENS, Distribution, TokenBatch, completion_scores

__all__ = ["ObjectiveInputs", "completion_batch", "field_of_reference", "objective_inputs"]


class ObjectiveInputs(NamedTuple):
    """A scored batch.

    Attributes:
        completions: The objective's argument.
        entropy: Entropy of the policy's distribution at each completion token, nats, shape (N, T); detached.
    """

    completions: CompletionBatch
    entropy: Float[Tensor, "N T"]


def objective_inputs(
    policy_model: nn.Module,
    batch: TokenBatch,
    *,
    references: Mapping[str, Reference],
    objective: Objective,
    measures: Mapping[str, Measure] | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    wrapped: nn.Module | None = None,
    columns: Mapping[str, Tensor] | None = None,
    value_head: nn.Module | None = None,
) -> ObjectiveInputs:
    """Score a batch under the policy and the references that an objective needs.

    Args:
        policy_model: The policy; it runs in its current mode.
        batch: The rows to score.
        references: References by name. Each one that is needed runs once; the others do not run.
        objective: Its ``needs`` and ``measures`` determine what is computed.
        measures: Further measures to log, under names that differ from the objective's.
        chunk_tokens: Number of positions that reach the head at once.
        wrapped: The policy's data-parallel wrapper, to call in its place; references get the policy itself, because
            they may switch its adapters.
        columns: Known fields of the completions, by the names of :meth:`CompletionBatch.tensors`; not recomputed.
        value_head: See :func:`falign.scoring.completion_scores`; for objectives that read ``values``.

    Returns:
        The completions, with log-probabilities and measures that carry the policy's gradient, and the entropies.

    Raises:
        ValueError: The objective or a measure reads a reference that is missing.
    """
    found = dict(columns or {})
    asked = {**(measures or {}), **objective.measures}
    weighting = "none" if "token_weights" in found else token_weighting(objective.needs)
    open_needs = frozenset(name for name in objective.needs if name not in found and field_of(name) not in found)
    needed = reference_names(open_needs, asked)
    if missing := sorted(needed - references.keys()):
        raise ValueError(
            f"The objective or a measure reads the reference {missing[0]!r}, and the references are "
            f"{', '.join(sorted(references)) or 'none'}: add it under this name."
        )
    # References first, so that the memory of their passes is free before the policy's graph is kept.
    distributions: dict[str, Distribution] = {}
    for name in (name for name in references if name in needed):
        weighted = weighting if name == REFERENCE else "none"
        if name in references_of(asked.values()) or weighted != "none":
            distributions[name], weights = references[name].states(policy_model, batch, weighting=weighted)
            found |= {} if weights is None else {"token_weights": weights}
        else:
            found[field_of_reference(name)] = references[name].logprobs(policy_model, batch)
    scores = completion_scores(
        policy_model if wrapped is None else wrapped,
        batch,
        measures=asked,
        references=distributions,
        value_head=value_head if "values" in objective.needs else None,
        chunk_tokens=chunk_tokens,
    )
    # Known columns take precedence: the reference may have moved since, and a logged measure must change nothing.
    found = {**{field_of_reference(name): logprobs for name, logprobs in scores.references.items()}, **found}
    found |= {f"measures.{name}": values for name, values in scores.measures.items()}
    if scores.values is not None:
        found["values"] = scores.values
    # In the first update on a rollout, the policy is still the one that sampled.
    now = {"old_logprobs": scores.logprobs, "old_values": scores.values}
    found |= {
        name: value.detach()
        for name, value in now.items()
        if name in objective.needs and name not in found and value is not None
    }
    return ObjectiveInputs(completion_batch(batch, scores.logprobs, found), scores.entropy)


def field_of_reference(name: str) -> str:
    """Return the name of a reference's log-probabilities in :meth:`CompletionBatch.tensors`."""
    return "reference_logprobs" if name == REFERENCE else f"references.{name}"


def completion_batch(
    batch: TokenBatch, logprobs: Float[Tensor, "N T"], found: Mapping[str, Tensor] | None = None
) -> CompletionBatch:
    """Return the completions of a batch with their log-probabilities and optional fields.

    Args:
        batch: The rows.
        logprobs: ``log π`` of the completion tokens.
        found: Optional fields by the names of :meth:`CompletionBatch.tensors`.
    """
    preference = {} if batch.preference is None else {"preference": batch.preference}
    return CompletionBatch.of(
        {
            "logprobs": logprobs,
            "completion_mask": batch.completion_mask,
            "prompt_index": batch.prompt_index,
            **preference,
            **(found or {}),
        }
    )
