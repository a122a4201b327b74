"""Interface of references, and the check that a reference equals the untrained policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.errors import ConfigError, ModelError
from falign.objectives import (
    CompletionBatch,
    Measure,
    Objective,
    TokenWeighting,
    complete,
    field_of,
    reference_names,
    references_of,
    token_weighting,
)
from falign.objectives.batch import REFERENCE, field_of_reference
from falign.references.scores import ReferenceScores, read_whole
from falign.scoring import (
    DEFAULT_CHUNK_TOKENS,
    CompletionStates,
    Predictions,
    PromptTree,
    TokenBatch,
    completion_scores,
    completion_states,
    detached_scores,
    evaluation_mode,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "REFERENCE",
    "MovingRule",
    "ObjectiveInputs",
    "Reference",
    "check_interval",
    "check_same_at_start",
    "completion_batch",
    "detached_logprobs",
    "detached_states",
    "field_of_reference",
    "objective_inputs",
]


@runtime_checkable
class MovingRule(Protocol):
    """Rule by which a reference follows the policy; a frozen dataclass, recorded field by field."""

    kind: ClassVar[str]

    @property
    def every(self) -> int:
        """Optimizer steps between two moves."""
        ...

    @property
    def reset_optimizer(self) -> bool:
        """True if a move also clears the optimizer's moments."""
        ...

    def add_adapter(self, policy_model: PeftModel, name: str) -> None:
        """Add the adapter that will follow the policy's, initially equal to it."""
        ...

    def move_adapter(self, policy_model: PeftModel, name: str) -> dict[str, float]:
        """Move the reference's adapter, and return metrics."""
        ...

    def move_weights(self, reference_model: nn.Module, policy_model: nn.Module) -> dict[str, float]:
        """Move a whole model, and return metrics."""
        ...


class Reference(ABC):
    """The distribution π_ref that the divergence keeps the policy close to.

    A fixed reference defines `identity`, `logprobs` and `states`. The defaults of the other methods suit a reference
    that is not a separate model and never changes.

    Attributes:
        starts_as_policy: True if it should equal the policy before the first step; this is then checked.
        moves: True if it changes during training. It is then saved in checkpoints and never cached.
        every: Optimizer steps between two moves; None if it does not move, or at no fixed interval.
        cannot_shard: Reason why it does not work with weights sharded over processes (FSDP2); ``""`` if it works.
    """

    starts_as_policy: bool = False
    moves: bool = False
    every: int | None = None
    cannot_shard: str = ""

    @property
    def own_model(self) -> nn.Module | None:
        """The second model in memory; None for an adapter in the policy, the policy's base, or cached values."""
        return None

    @property
    def can_shard(self) -> bool:
        """True if it works with weights sharded over processes."""
        return not self.cannot_shard

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return the record for a run folder: ``kind`` and ``weights``, the content hash if known."""

    @abstractmethod
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        """Return log π_ref of the completion tokens, without gradient and dropout, 0 where masked.

        Args:
            policy_model: The policy, which contains some references; it is left unchanged.
            batch: The rows to score.

        Returns:
            Log-probabilities in nats, shape (N, T).
        """

    @abstractmethod
    def states(
        self, policy_model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none"
    ) -> CompletionStates:
        """Return whole next-token distributions, for objectives with a divergence over the vocabulary.

        Args:
            policy_model: The policy, which contains some references; it is left unchanged.
            batch: The rows to score.
            weighting: Also return token weights (see :func:`falign.scoring.completion_states`).

        Returns:
            The states that predict each completion token, without gradient and dropout.
        """

    @property
    def members(self) -> Mapping[str, Reference]:
        """The references that this one is computed from, by name; empty for a model of its own.

        A trainer moves, saves and checks them under their own names, so each must be one of its references.
        """
        return {}

    @property
    def reads_whole(self) -> bool:
        """True if the log-probabilities of single tokens need the members' whole distributions."""
        return False

    @property
    def normalized(self) -> bool:
        """False if its probabilities are known only up to a factor per prompt."""
        return True

    def with_members(self, members: Mapping[str, Reference]) -> Reference:
        """Return this reference with other members of the same names; itself if it has none.

        Args:
            members: By name; others may be among them.
        """
        return self

    def with_cache(
        self, make: Callable[[Reference, Sequence[PromptTree]], Reference], trees: Sequence[PromptTree]
    ) -> Reference:
        """Return this reference with cached log-probabilities.

        Args:
            make: Returns the cache of a reference with the values of some rows.
            trees: The rows.
        """
        return make(self, trees)

    def logprobs_in(self, scores: ReferenceScores) -> Float[Tensor, "N T"]:
        """Return `logprobs` of a batch under several references; a combination takes its members' from there.

        Args:
            scores: The batch, and the scores of the references that ran so far.
        """
        return self.logprobs(scores.policy_model, scores.batch)

    def states_in(self, scores: ReferenceScores, *, weighting: TokenWeighting = "none") -> CompletionStates:
        """Return `states` of a batch under several references; a combination takes its members' from there.

        Args:
            scores: The batch, and the scores of the references that ran so far.
            weighting: As for `states`.
        """
        return self.states(scores.policy_model, scores.batch, weighting=weighting)

    def acting(self, policy_model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Return a context that gives this reference as a model: its own, or the policy with adapters switched.

        Args:
            policy_model: The policy, which contains some references; it is restored on exit.

        Raises:
            ModelError: The reference is not a model.
        """
        raise ModelError(
            f"A {type(self).__name__} cannot generate completions, only score them: define its method acting, or use a "
            "reference that is a model."
        )

    def check_fits(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
        """Check that the reference uses the policy's token ids, and drop further ids from its distributions.

        Args:
            tokenizer: The policy's tokenizer.
            vocabulary: Number of ids in the policy's distributions.

        Returns:
            Number of ids that both have; the policy's own for a reference inside the policy.

        Raises:
            ConfigError: A token has different ids; the message names the first one.
        """
        return vocabulary

    def check_length(self, longest: int, *, place: str) -> None:  # noqa: B027 - most models are checked elsewhere
        """Refuse prompts and completions that are longer than the reference reads.

        Args:
            longest: Tokens of the longest possible prompt with its completion.
            place: The reference in messages.

        Raises:
            ConfigError: They are too long.
        """

    def check_rollouts(self, *, place: str, updates: int) -> None:
        """Refuse a reference that would move between the updates on one rollout, which are all scored once.

        Args:
            place: The reference in messages.
            updates: Optimizer steps on each rollout.

        Raises:
            ConfigError: Its interval is not a multiple of the updates, or unknown.
        """
        if self.moves:
            check_interval(self.every, place=place, updates=updates)

    def move(self, policy_model: nn.Module, step: int, optimizer: Any) -> None:  # noqa: B027 - a fixed reference stays
        """Follow the policy if a move is due; a fixed reference does nothing.

        Call it at the beginning of a step, before anything is sampled or scored for it, not at the end. Metrics,
        evaluations and checkpoints of a step then use the reference of that step. Right after a reset every log-ratio
        is zero, so a reset at the end of the last step would leave nothing to measure.

        Args:
            policy_model: The policy after the last step.
            step: Optimizer steps taken so far.
            optimizer: The policy's optimizer; a reset may clear its moments.
        """

    def observe(self, metrics: Mapping[str, float]) -> None:  # noqa: B027 - most references ignore them
        """Take note of a held-out evaluation, on which the next move may depend.

        Args:
            metrics: Means over the held-out data, as logged without ``eval_``.

        Raises:
            ConfigError: The metric that the reference depends on is not among them.
        """

    def save(self, folder: Path, policy_model: nn.Module) -> None:  # noqa: B027 - a fixed reference has no state
        """Write the state of a moving reference into an existing folder."""

    def load(self, folder: Path, policy_model: nn.Module) -> None:  # noqa: B027
        """Restore the state written by `save`.

        Raises:
            ModelError: The state is that of another reference.
        """

    def metrics(self) -> dict[str, float]:
        """Return metrics to log with each loss; their names leave out the reference's own name."""
        return {}


def check_interval(every: int | None, *, place: str, updates: int) -> None:
    """Refuse an interval of moves within which rollouts begin and end.

    Args:
        every: Optimizer steps between two moves; None if unknown.
        place: The reference in messages.
        updates: Optimizer steps on each rollout.

    Raises:
        ConfigError: A move would come between two updates on one rollout, or may come there.
    """
    if updates == 1:
        return
    if every is None:
        raise ConfigError(
            f"{place} moves during training at an unknown interval, so it may move between the {updates} optimizer "
            "steps on a rollout: set its attribute `every`, the number of optimizer steps between two moves, to a "
            "multiple of these."
        )
    if every % updates:
        raise ConfigError(
            f"{place}.every={every} is not a multiple of the {updates} optimizer steps per rollout (updates times "
            "minibatches), so the reference would move between them: choose a multiple."
        )


def detached_logprobs(
    model: nn.Module, batch: TokenBatch, *, chunk_tokens: int = DEFAULT_CHUNK_TOKENS
) -> Float[Tensor, "N T"]:
    """Return a model's log-probabilities without gradient and dropout; its modes are restored.

    Args:
        model: The model to score with.
        batch: The rows to score.
        chunk_tokens: Number of positions that reach the head at once.

    Returns:
        Log-probabilities in nats, shape (N, T), 0 where masked.
    """
    return detached_scores(model, batch, chunk_tokens=chunk_tokens).logprobs


def detached_states(model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none") -> CompletionStates:
    """Return a model's next-token distributions without gradient and dropout; its modes are restored.

    Args:
        model: The model to score with.
        batch: The rows to score.
        weighting: Also return token weights.

    Returns:
        The states at the positions that predict completion tokens.
    """
    with torch.no_grad(), evaluation_mode(model):
        return completion_states(model, batch, weighting=weighting)


def check_same_at_start(
    policy_model: nn.Module, reference: Reference, batch: TokenBatch, *, tolerance: float = 1e-5
) -> None:
    """Check that the reference equals the untrained policy, if the two should be the same model.

    Args:
        policy_model: The policy before its first update.
        reference: The reference that it should start from.
        batch: Any rows.
        tolerance: Largest difference of a token's log-probability, nats. In 16-bit models, scores cached from
            batches of another width need a larger one.

    Raises:
        ModelError: A difference is larger, or is NaN.
    """
    policy_logprobs = detached_logprobs(policy_model, batch)
    difference = (policy_logprobs - reference.logprobs(policy_model, batch)).abs()
    # argmax treats NaN as the largest, and the comparison below is false for NaN, so NaN is refused.
    row, token = divmod(int(difference.argmax()), difference.shape[1])
    largest = difference[row, token].item()
    if not largest <= tolerance:
        raise ModelError(
            f"Policy and reference differ by {largest:.3g} nats before training (at most {tolerance:.3g} "
            f"allowed), most at completion token {token} of {batch.place[row] or f'row {row}'}: the "
            f"reference {reference.identity()} is not the model that the policy starts from."
        )


class ObjectiveInputs(NamedTuple):
    """A scored batch.

    Attributes:
        completions: The objective's argument.
        entropy: Entropy of the policy's distribution at each completion token, nats, shape (N, T); detached.
        most_likely: 1 where the token is the policy's most likely one, else 0, shape (N, T).
        mean_logits: Mean of the policy's logits over the vocabulary, shape (N, T).
    """

    completions: CompletionBatch
    entropy: Float[Tensor, "N T"]
    most_likely: Float[Tensor, "N T"]
    mean_logits: Float[Tensor, "N T"]


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
    mask_head: nn.Module | None = None,
    reward_head: nn.Module | None = None,
    with_vocabulary: bool = True,
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
        mask_head: :class:`falign.scoring.learned_masks.LearnedMasks`, for objectives that read learned masks.
        reward_head: See :func:`falign.scoring.completion_scores`; for objectives that read ``learned_rewards``.
        with_vocabulary: False leaves out log-probabilities and entropies, which are then NaN.

    Returns:
        The completions, with log-probabilities and measures that carry the policy's gradient, and the entropies.

    Raises:
        ValueError: The objective or a measure reads a reference that is missing.
        ConfigError: A reference is known only up to a factor, and the objective needs its probabilities.
    """
    found = dict(columns or {})
    asked = {**(measures or {}), **objective.measures}
    weighting = "none" if "token_weights" in found else token_weighting(objective.needs)
    if weighting == "data":
        raise ValueError(
            "The objective reads weights of tokens from the data, and these completions have none: it learns from "
            "given completions only."
        )
    missing_needs = frozenset(name for name in objective.needs if name not in found and field_of(name) not in found)
    needed = reference_names(missing_needs, asked)
    if missing := sorted(needed - references.keys()):
        raise ValueError(
            f"The objective or a measure reads the reference {missing[0]!r}, and the references are "
            f"{', '.join(sorted(references)) or 'none'}: add it under this name."
        )
    read = {name: references[name] for name in references if name in needed}
    if REFERENCE in read and weighting != "none":  # first, because the weights come with its first pass
        read = {REFERENCE: read.pop(REFERENCE), **read}
    _require_normalized(read, objective)
    # References first, so that the memory of their passes is free before the policy's graph is kept.
    of_references = ReferenceScores(policy_model, batch, chunk_tokens=chunk_tokens)
    distributions: dict[str, Predictions] = {}
    whole = read_whole(read, references_of(asked.values())) | ({REFERENCE} if weighting != "none" else set())
    for name in (name for name in read if name in whole):
        weighted = weighting if name == REFERENCE else "none"
        distributions[name], weights, layers = of_references.states(read[name], weighting=weighted)
        found |= {} if weights is None else {"token_weights": weights}
        if layers is not None:
            found |= _learned(mask_head, layers, batch)
    others = {name: each for name, each in read.items() if name not in whole}
    found |= {field_of_reference(name): values for name, values in of_references.all_logprobs(others).items()}
    scores = completion_scores(
        policy_model if wrapped is None else wrapped,
        batch,
        measures=asked,
        references=distributions,
        value_head=value_head if "values" in objective.needs else None,
        reward_head=_given_head(reward_head) if "learned_rewards" in objective.needs else None,
        with_vocabulary=with_vocabulary or bool(asked or distributions),
        chunk_tokens=chunk_tokens,
    )
    # Given columns win over recomputed ones: a reference may have moved since the rollout, and logging a measure must
    # not alter training.
    recomputed = {field_of_reference(name): logprobs for name, logprobs in scores.references.items()}
    found = {**recomputed, **found}
    found |= {f"measures.{name}": values for name, values in scores.measures.items()}
    if scores.values is not None:
        found["values"] = scores.values
    if scores.learned_rewards is not None:
        found["learned_rewards"] = scores.learned_rewards
    if scores.second_values is not None:
        found["second_values"] = scores.second_values
    # In the first update on a rollout, the policy is still the one that sampled.
    of_sampler = {"old_logprobs": scores.logprobs, "old_values": scores.values}
    found |= {
        name: value.detach()
        for name, value in of_sampler.items()
        if name in objective.needs and name not in found and value is not None
    }
    completions = completion_batch(batch, scores.logprobs, found)
    return ObjectiveInputs(completions, scores.entropy, scores.most_likely, scores.mean_logits)


def _given_head(reward_head: nn.Module | None) -> nn.Module:
    if reward_head is None:
        raise ValueError("The objective reads learned_rewards, and reward_head is None: give the head that makes them.")
    return reward_head


def _learned(mask_head: nn.Module | None, layers: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    if mask_head is None:
        raise ValueError("The objective reads learned masks, and mask_head is None: give the module that makes them.")
    masks = mask_head(layers)
    return {f"learned_masks.{name}": batch.scatter(masks[:, i]) for i, name in enumerate(("ratio", "divergence"))}


def _require_normalized(references: Mapping[str, Reference], objective: Objective) -> None:
    for name, reference in references.items():
        if not reference.normalized and not complete(objective).accepts_unnormalized:
            raise ConfigError(
                f"{type(objective).__name__} reads the probabilities of the reference {name!r}, which is known only up "
                "to a factor per prompt (level sequence): set its level to 'token'."
            )


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
