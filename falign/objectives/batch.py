"""The batch that every objective reads: completions, their log-probabilities and optional fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from falign.divergences.base import numbers

__all__ = ["OFFLINE", "ONLINE", "REFERENCE", "WORTH", "CompletionBatch", "field_of", "field_of_reference"]

REFERENCE = "reference"
"""Name of the main reference: it supplies ``reference_logprobs`` and the activations for token weights, and metrics and
evaluation compare with it."""


PER_TOKEN = frozenset(
    {
        *("logprobs", "completion_mask", "reference_logprobs", "references", "old_logprobs", "measures"),
        *("learned_masks", "token_weights", "values", "second_values", "old_values", "advantages"),
    }
)
PREPARED = "prepared"
OF_TERMS = ("measures", "step_means")  # fields of a sum in which each term has its own entries, NAME.KEY
MASKS = frozenset({"completion_mask", "from_reference"})
CARRY_GRADIENT = frozenset({"learned_masks", "learned_rewards", "logprobs", "measures", "values", "second_values"})

OFFLINE = frozenset(
    {
        *("reference_logprobs", "references", "preference", "token_weights", "row_weights"),
        *("learned_rewards", "margin"),
    }
)
"""Fields that a run on given completions can supply."""

ONLINE = (OFFLINE - {"row_weights", "learned_rewards", "margin"}) | {
    *("rewards", "features", "log_partition", "from_reference"),
    *("old_logprobs", "values", "second_values", "old_values"),
}
"""Fields that a run on the policy's own samples can supply."""

WORTH = frozenset({"rewards", "features", "preference"})
"""Fields that hold the value of a completion; an objective that reads none of them learns nothing from samples."""


def field_of(name: str) -> str:
    """Return the field of :class:`CompletionBatch` that a name in :attr:`Objective.needs` refers to.

    Args:
        name: A field, or ``FIELD.KEY``; ``prepared.TERM.NAME`` refers to the field of NAME.

    Returns:
        The part before the dot.

    Example:
        >>> field_of("references.teacher"), field_of("prepared.grpo.advantages")
        ('references', 'advantages')
    """
    field, _, rest = name.partition(".")
    return field_of(rest.partition(".")[2]) if field == PREPARED and "." in rest else field


def field_of_reference(name: str) -> str:
    """Return the name of a reference's log-probabilities in :meth:`CompletionBatch.tensors`.

    Args:
        name: Name of the reference.

    Returns:
        A name that :meth:`CompletionBatch.require` takes.

    Example:
        >>> field_of_reference("reference"), field_of_reference("teacher")
        ('reference_logprobs', 'references.teacher')
    """
    return "reference_logprobs" if name == REFERENCE else f"references.{name}"


class _ByReference(dict[str, Tensor]):
    """``CompletionBatch.references`` of a finished batch; its ``reference`` entry repeats ``reference_logprobs``."""


@dataclass(frozen=True)
class CompletionBatch:
    """N completions of at most T tokens; logs in nats. Pairs, lists, samples and rollouts all use this class.

    ``logprobs``, ``measures``, ``values`` and ``learned_rewards`` carry the gradient. Every other field is a constant
    and is detached here. Numbers are kept in float32 or better, because sums over tokens overflow in half precision.
    Integers and booleans are converted to floats, except in the masks and in ``prompt_index``.

    Attributes:
        logprobs: ``log π(y_t | x, y_<t)``, shape (N, T); carries the gradient.
        completion_mask: True on completion tokens (the stop token included), shape (N, T).
        prompt_index: Which prompt, shape (N,); equal values form a group.
        reference_logprobs: ``log π_ref`` of the same tokens, under the reference named ``reference``, shape (N, T).
        references: Log-probabilities of the same tokens under each reference, by name, shape (N, T) each. Other
            references are passed here; ``reference`` is passed as ``reference_logprobs`` and repeated here.
        old_logprobs: ``log π_old``, the distribution that was sampled from, shape (N, T); None if that is π.
        measures: Value at each token of each measure that the objective names, shape (N, T) each; carries the
            gradient.
        learned_masks: ``ratio`` and ``divergence``, shape (N, T) each: masks whose parameters are trained with the
            policy and whose gradient they carry, for objectives that need ``token_weights.learned`` or
            ``token_weights.learned_independent``.
        preference: Larger is preferred within a prompt, shape (N,) (a pair: 1 and 0; an unpaired label: 1 or 0).
        margin: Lead in reward that the data ask of the preferred side of each prompt, repeated for its completions,
            shape (N,).
        rewards: External scores, shape (N,).
        learned_rewards: A reward head's value at each completion's last token, shape (N,); carries the gradient, of the
            head and of the model under it.
        from_reference: True where the completion was sampled from the reference, shape (N,).
        token_weights: How much each token counts, ``≥ 0``, shape (N, T); taken as a constant. Only objectives that name
            it in their ``needs`` read it.
        row_weights: How much the row of each completion counts in the means of an objective, positive, equal within a
            prompt, shape (N,); None counts every row once. Read by :meth:`weighted`.
        features: Features of each completion that a target reads, shape (N, K); a single reward is K = 1.
        log_partition: Estimate of ``log Z(x)`` for each completion, made without its own term, shape (N,).
        step_means: Means over the whole optimizer step, by name, each repeated for every row, shape (N,); constants.
        values: A value head's estimate of the future reward at each token, shape (N, T); carries the gradient.
        second_values: Those of the second of two value heads, shape (N, T); carries the gradient.
        old_values: The same before the first update on this rollout, shape (N, T); constants. Of two value heads, the
            soft minimum of their slow copies.
        advantages: Weight of each token's log-probability, shape (N, T); constants, set by
            :meth:`BaseObjective.prepare`.
        baseline: Subtracted from each completion's pseudo-reward or penalty, shape (N,); constants, set by
            :meth:`BaseObjective.prepare`.

        prepared: Fields that :meth:`BaseObjective.prepare` of a term of a :class:`Sum` has set, by ``TERM.NAME``;
            constants. :meth:`term` gives them to the term.

    Raises:
        ValueError: Two shapes disagree (broadcasting would be silently wrong), or ``reference`` is given twice.
        TypeError: A mask is not boolean, ``prompt_index`` is not integer, or a field is complex or not a tensor.

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
    preference: Shaped[Tensor, " N"] | None = None
    margin: Shaped[Tensor, " N"] | None = None
    rewards: Shaped[Tensor, " N"] | None = None
    learned_rewards: Shaped[Tensor, " N"] | None = None
    from_reference: Shaped[Tensor, " N"] | None = None
    token_weights: Shaped[Tensor, "N T"] | None = None
    row_weights: Shaped[Tensor, " N"] | None = None
    features: Shaped[Tensor, "N K"] | None = None
    log_partition: Shaped[Tensor, " N"] | None = None
    values: Shaped[Tensor, "N T"] | None = None
    second_values: Shaped[Tensor, "N T"] | None = None
    old_values: Shaped[Tensor, "N T"] | None = None
    advantages: Shaped[Tensor, "N T"] | None = None
    baseline: Shaped[Tensor, " N"] | None = None
    # Shapes are checked in __post_init__: `dataclasses.replace` passes in the old batch's `reference` entry too.
    references: Mapping[str, Tensor] = field(default_factory=dict)
    measures: Mapping[str, Shaped[Tensor, "N T"]] = field(default_factory=dict)
    learned_masks: Mapping[str, Shaped[Tensor, "N T"]] = field(default_factory=dict)
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    step_means: Mapping[str, Shaped[Tensor, " N"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._name_reference()
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                object.__setattr__(self, each.name, _each(each.name, value, _of_field))
        repeated = {} if self.reference_logprobs is None else {"reference": self.reference_logprobs}
        object.__setattr__(self, "references", _ByReference({**self.references, **repeated}))
        if self.logprobs.ndim != 2:
            raise ValueError(f"logprobs has shape {tuple(self.logprobs.shape)}; it must be (completions, tokens).")
        for name, value in self.tensors().items():
            expected = self.logprobs.shape if field_of(name) in PER_TOKEN else self.logprobs.shape[:1]
            if field_of(name) == "features":
                expected = (*expected, *value.shape[-1:])
            if value.shape != expected:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; logprobs of shape {tuple(self.logprobs.shape)} "
                    f"needs {tuple(expected)}."
                )

    def _name_reference(self) -> None:
        """Set ``reference_logprobs`` from ``references["reference"]`` if only the latter was given."""
        given = dict(self.references)
        if isinstance(self.references, _ByReference):  # from the batch that `replace` copies
            given.pop("reference", None)
        if self.reference_logprobs is None:
            object.__setattr__(self, "reference_logprobs", given.get("reference"))
        elif "reference" in given:
            raise ValueError("references['reference'] and reference_logprobs are the same field: give one of them.")
        object.__setattr__(self, "references", {name: each for name, each in given.items() if name != "reference"})

    @property
    def num_tokens(self) -> Int[Tensor, " N"]:
        """Length of each completion in tokens, shape (N,)."""
        return self.completion_mask.sum(dim=-1)

    def sequence_sum(self, per_token: Float[Tensor, "N T"]) -> Float[Tensor, " N"]:
        """Return the sum of a per-token quantity over each completion; values outside the mask are ignored."""
        return per_token.masked_fill(~self.completion_mask, 0.0).sum(dim=-1)

    @property
    def log_ratio(self) -> Float[Tensor, "N T"]:
        """``log π - log π_ref`` of each token, 0 outside the mask, shape (N, T); carries the gradient.

        Raises:
            ValueError: ``reference_logprobs`` is None.
        """
        return self.log_ratio_to(REFERENCE)

    def log_ratio_to(self, reference: str) -> Float[Tensor, "N T"]:
        """Return ``log π - log π_k`` of each token for the reference of a name; otherwise as :attr:`log_ratio`.

        Args:
            reference: Name of the reference π_k.

        Returns:
            Shape (N, T); carries the gradient.

        Raises:
            ValueError: Its log-probabilities are missing.
        """
        of_reference = self.require(field_of_reference(reference))
        return (self.logprobs - of_reference).masked_fill(~self.completion_mask, 0.0)

    @property
    def sampling_logprobs(self) -> Float[Tensor, "N T"]:
        """``log π`` of the policy that drew the completions: ``old_logprobs``, or the current ones, as a constant."""
        return self.logprobs.detach() if self.old_logprobs is None else self.old_logprobs

    @property
    def importance_log_ratio(self) -> Float[Tensor, "N T"]:
        """``log π - log π_old`` of each token, 0 outside the mask, shape (N, T); carries the gradient.

        Its value is 0 if ``old_logprobs`` is None: the completions were then sampled from π itself.
        """
        return (self.logprobs - self.sampling_logprobs).masked_fill(~self.completion_mask, 0.0)

    def weighted(self, weights: Float[Tensor, " P"], rows: Int[Tensor, " P"] | None = None) -> Float[Tensor, " P"]:
        """Return the weights of losses times :attr:`row_weights`, for the weights of a :class:`Term`.

        Args:
            weights: Weights of losses of whole completions, pairs or prompts, shape (P,).
            rows: A completion of each of these, shape (P,); None if there is one loss per completion.

        Returns:
            Shape (P,); unchanged without ``row_weights``.
        """
        if self.row_weights is None:
            return weights
        own = self.row_weights if rows is None else self.row_weights[rows]
        return weights * own.to(weights.dtype)

    def require(self, name: str) -> Tensor:
        """Return an optional field.

        Args:
            name: The field, or ``"references.NAME"`` or ``"measures.NAME"``.

        Returns:
            Its tensor.

        Raises:
            ValueError: It is missing.
        """
        whole, _, key = name.partition(".")
        value = getattr(self, whole)
        if key:
            value = value.get(key)
        if value is None:
            place, how = (f"{whole}[{key!r}]", "missing") if key else (name, "None")
            raise ValueError(
                f"This objective reads CompletionBatch.{place}, which is {how}: name it in the objective's needs, or "
                "set it when building the batch."
            )
        return value

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that are present, by the names that :meth:`require` takes.

        Returns:
            References and measures are named ``references.NAME`` and ``measures.NAME``; the reference named
            ``reference`` appears once, as ``reference_logprobs``.
        """
        found: dict[str, Tensor] = {}
        for each in fields(self):
            value: Any = getattr(self, each.name)
            # A mapping has one tensor per key, an absent field none, and any other field is one tensor.
            parts = {f"{each.name}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {}
            found |= parts if isinstance(value, Mapping) else {} if value is None else {each.name: value}
        found.pop("references.reference", None)
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> CompletionBatch:
        """Build a batch from tensors by name.

        Args:
            tensors: As returned by :meth:`tensors`.

        Returns:
            The batch.
        """
        given: dict[str, Any] = {}
        for name, value in tensors.items():
            whole, _, key = name.partition(".")
            if key:
                given.setdefault(whole, {})[key] = value
            else:
                given[name] = value
        return cls(**given)

    def map(self, change: Callable[[Tensor], Tensor]) -> CompletionBatch:
        """Return the batch with a function applied to each of its tensors.

        Args:
            change: From a tensor to a tensor.

        Returns:
            A new batch.
        """
        return CompletionBatch.of({name: change(value) for name, value in self.tensors().items()})

    def select(self, rows: Bool[Tensor, " N"]) -> CompletionBatch:
        """Return the completions selected by a mask, with all their fields.

        Args:
            rows: True on the completions to keep, shape (N,).

        Returns:
            A batch of the selected completions; it may be empty.
        """
        return self.map(lambda tensor: tensor[rows])

    def term(self, name: str) -> CompletionBatch:
        """Return the batch that a term of a :class:`Sum` reads: with its own measures, step means and prepared fields.

        Args:
            name: The term.

        Returns:
            The same completions.
        """
        own: dict[str, Tensor] = {}
        for key, value in self.tensors().items():
            whole, _, rest = key.partition(".")
            if whole not in (PREPARED, *OF_TERMS):
                own.setdefault(key, value)  # a field that the term has prepared takes precedence
            elif rest.startswith(f"{name}."):
                of_term = rest.removeprefix(f"{name}.")
                own[of_term if whole == PREPARED else f"{whole}.{of_term}"] = value
        return CompletionBatch.of(own)

    def new_in(self, prepared: CompletionBatch, rows: Bool[Tensor, " N"] | None = None) -> dict[str, Tensor]:
        """Return the tensors of a prepared selection that this batch lacks, with 0 in all other rows.

        Args:
            prepared: The completions that ``rows`` selects, in order, with further fields.
            rows: True on its completions, shape (N,); None if it has them all.

        Returns:
            Tensors by name, with N rows.
        """
        known = self.tensors()
        new = {name: value for name, value in prepared.tensors().items() if name not in known}
        if rows is None:
            return new
        places = (rows.nonzero().squeeze(-1),)
        return {
            name: value.new_zeros(len(rows), *value.shape[1:]).index_put(places, value) for name, value in new.items()
        }


def _each(name: str, value: Tensor | Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> Any:
    """Apply a function to a named tensor, or to each value of a mapping."""
    if isinstance(value, Mapping):
        return {key: change(f"{name}.{key}", each) for key, each in value.items()}
    return change(name, value)


def _of_field(name: str, value: Tensor) -> Tensor:
    """Check and convert the value of a field."""
    field = field_of(name)
    if field in MASKS:
        if value.dtype != torch.bool:
            raise TypeError(f"{name} has dtype {value.dtype}; it must be bool: pass {name}.bool().")
        return value
    if field == "prompt_index":
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {value.dtype}; it must be an integer that numbers the prompts.")
        return value
    value = numbers(value, name)
    return value if name.partition(".")[0] in CARRY_GRADIENT else value.detach()
