"""The one batch of all objectives: completions with their log-probabilities, and what else an objective may read."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from falign.divergences.dtypes import numbers

__all__ = ["OFFLINE", "ONLINE", "CompletionBatch"]

PER_TOKEN = frozenset(
    {
        *("logprobs", "completion_mask", "reference_logprobs", "old_logprobs", "token_divergence", "token_weights"),
        *("values", "old_values", "advantages"),
    }
)
MASKS = frozenset({"completion_mask", "from_reference"})
CARRY_GRADIENT = frozenset({"logprobs", "token_divergence", "values"})

OFFLINE = frozenset({"reference_logprobs", "preference", "token_divergence", "token_weights"})
"""Fields that a run on given completions can supply."""

ONLINE = OFFLINE | {
    *("rewards", "features", "log_partition", "from_reference"),
    *("old_logprobs", "values", "old_values"),
}
"""Fields that a run on the policy's own samples can supply."""


@dataclass(frozen=True)
class CompletionBatch:
    """N completions of at most T tokens; logs in nats. Pairs, lists, samples and rollouts are all this.

    ``logprobs``, ``token_divergence`` and ``values`` carry the gradient. Everything else is a constant and is detached
    here, whatever it was computed from. Numbers are kept in float32 at least: sums over tokens leave the range of half
    precisions. Integers and booleans are taken as numbers, except in the masks and in ``prompt_index``.

    Attributes:
        logprobs: ``log π(y_t | x, y_<t)``, shape (N, T); carries the gradient.
        completion_mask: True on completion tokens (the stop token included), shape (N, T).
        prompt_index: Which prompt, shape (N,); equal values form a group.
        reference_logprobs: ``log π_ref`` of the same tokens, shape (N, T).
        old_logprobs: ``log π_old``, the law that the completions were drawn from, shape (N, T); None where that is π.
        token_divergence: Full-vocabulary ``D_f`` at each position, shape (N, T); carries the gradient.
        preference: Larger is preferred within a prompt, shape (N,) (a pair: 1 and 0; an unpaired label: 1 or 0).
        rewards: External scores, shape (N,).
        from_reference: True where the completion was sampled from the reference, shape (N,).
        token_weights: How much each token counts, ``≥ 0``, shape (N, T); taken as a constant.
        features: What a target reads of each completion, shape (N, K); a single reward is K = 1.
        log_partition: Estimate of ``log Z(x)`` for each completion, made without its own term, shape (N,).
        values: A value head's estimate of the reward to come at each token, shape (N, T); carries the gradient.
        old_values: The same before the first update on this rollout, shape (N, T); constants.
        advantages: What weights each token's log-probability, shape (N, T); constants, of
            :meth:`RolloutObjective.prepare`.
        baseline: What is subtracted from each completion's pseudo-reward or penalty, shape (N,); constants, of
            :meth:`RolloutObjective.prepare`.

    Raises:
        ValueError: Two shapes disagree. (A broadcast would be silent and wrong.)
        TypeError: A mask is not boolean, ``prompt_index`` is not integer, or a field is complex or no tensor.

    Source:
        docs/own-loop.md.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        ...     completion_mask=torch.tensor([[True, True], [True, False]]),
        ...     prompt_index=torch.tensor([0, 0]),
        ... )
        >>> batch.sequence_sum(batch.logprobs)
        tensor([-3., -3.])
    """

    logprobs: Shaped[Tensor, "N T"]
    completion_mask: Shaped[Tensor, "N T"]
    prompt_index: Shaped[Tensor, " N"]
    reference_logprobs: Shaped[Tensor, "N T"] | None = None
    old_logprobs: Shaped[Tensor, "N T"] | None = None
    token_divergence: Shaped[Tensor, "N T"] | None = None
    preference: Shaped[Tensor, " N"] | None = None
    rewards: Shaped[Tensor, " N"] | None = None
    from_reference: Shaped[Tensor, " N"] | None = None
    token_weights: Shaped[Tensor, "N T"] | None = None
    features: Shaped[Tensor, "N K"] | None = None
    log_partition: Shaped[Tensor, " N"] | None = None
    values: Shaped[Tensor, "N T"] | None = None
    old_values: Shaped[Tensor, "N T"] | None = None
    advantages: Shaped[Tensor, "N T"] | None = None
    baseline: Shaped[Tensor, " N"] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, _of_field(field.name, value))
        if self.logprobs.ndim != 2:
            raise ValueError(f"logprobs has shape {tuple(self.logprobs.shape)}; it must be (completions, tokens).")
        for field in fields(self):
            value = getattr(self, field.name)
            expected = self.logprobs.shape if field.name in PER_TOKEN else self.logprobs.shape[:1]
            if field.name == "features" and value is not None:
                expected = (*expected, *value.shape[-1:])
            if value is not None and value.shape != expected:
                raise ValueError(
                    f"{field.name} has shape {tuple(value.shape)}; logprobs of shape {tuple(self.logprobs.shape)} "
                    f"needs {tuple(expected)}."
                )

    @property
    def num_tokens(self) -> Int[Tensor, " N"]:
        """Length of each completion in tokens, shape (N,)."""
        return self.completion_mask.sum(dim=-1)

    def sequence_sum(self, per_token: Float[Tensor, "N T"]) -> Float[Tensor, " N"]:
        """Return the sum of a per-token quantity over each completion; what lies outside the mask is never read."""
        return per_token.masked_fill(~self.completion_mask, 0.0).sum(dim=-1)

    def require(self, name: str) -> Tensor:
        """Return an optional field.

        Args:
            name: The field.

        Returns:
            Its tensor.

        Raises:
            ValueError: It is None.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"This objective reads CompletionBatch.{name}, which is None; set it when building the batch."
            )
        return value

    def select(self, rows: Bool[Tensor, " N"]) -> CompletionBatch:
        """Return the completions that a mask names, with all their fields.

        Args:
            rows: True on the completions to keep, shape (N,).

        Returns:
            A batch of as many completions as the mask has True, which may be none.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in given.items() if value is not None})


def _of_field(name: str, value: Tensor) -> Tensor:
    """The value of a field under the rules of the batch."""
    if name in MASKS:
        if value.dtype != torch.bool:
            raise TypeError(f"{name} has dtype {value.dtype}; it must be bool: pass {name}.bool().")
        return value
    if name == "prompt_index":
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {value.dtype}; it must be an integer that numbers the prompts.")
        return value
    value = numbers(value, name)
    return value if name in CARRY_GRADIENT else value.detach()
