"""The one interface of all objectives: a batch of completions in, unreduced losses with their weights out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from falign.divergences.dtypes import numbers
from falign.objectives.batch import CompletionBatch, field_of
from falign.objectives.link import Link
from falign.objectives.measures import Measure

__all__ = [
    "BaseObjective",
    "CompletionBatch",
    "Importance",
    "Objective",
    "ObjectiveOutput",
    "Term",
    "TokenWeighting",
    "complete",
    "reference_names",
    "token_weighting",
]


class Term(NamedTuple):
    """One mean of an objective: ``scale · Σ losses·weights / Σ weights``, both sums over the global batch.

    Attributes:
        losses: Any shape; carries the gradient.
        weights: Of the same shape, not negative. They must not depend on log-probabilities, values or divergences of
            the policy, not even detached: the trainer sums them over the whole step before its first forward pass,
            and stops where they then differ. What depends on the policy belongs into ``losses``.
        scale: Factor of the mean.
        name: What messages and metrics call it.
    """

    losses: Float[Tensor, ...]
    weights: Float[Tensor, ...]
    scale: float = 1.0
    name: str = "loss"

    def share(self, denominator: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return ``scale · Σ losses·weights / denominator``.

        Args:
            denominator: Sum of the weights over all batches that have a share in the mean.

        Returns:
            A scalar; where nothing has any weight (0/0) it is 0.

        Raises:
            ValueError: Losses and weights have different shapes.
        """
        if self.losses.shape != self.weights.shape:
            raise ValueError(
                f"Term {self.name} has losses of shape {tuple(self.losses.shape)} and weights of shape "
                f"{tuple(self.weights.shape)}; give one weight for each loss."
            )
        losses, weights = numbers(self.losses, "losses"), numbers(self.weights, "weights")
        tiny = torch.finfo(losses.dtype).tiny
        return self.scale * (losses * weights).sum() / denominator.clamp(min=tiny)


class ObjectiveOutput(NamedTuple):
    """The output of an objective.

    Attributes:
        terms: One for most objectives, two for a hybrid: each has its own denominator.
        metrics: Detached; one value per pair, list or completion, so that a mean over ranks and micro-batches is exact.
    """

    terms: tuple[Term, ...]
    metrics: dict[str, Tensor]

    def mean(self) -> Float[Tensor, ""]:
        """Return the loss of this batch alone, for a loop of one's own: the sum over terms of their weighted means."""
        return torch.stack([term.share(numbers(term.weights, "weights").sum()) for term in self.terms]).sum()


TokenWeighting = Literal["none", "activations", "mapo"]
"""Sources of ``CompletionBatch.token_weights``: none, falign's own weights, or the mask of SparsePO's MaPO."""

Importance = Literal["sequence", "token"]
"""The unit of an importance weight ``π/π_old``: a whole completion, or a single token."""


@runtime_checkable
class Objective(Protocol):
    """Anything that turns a batch into losses; these three members are enough, and nothing has to be inherited.

    The contract, which the trainer checks at every step:

    * each call returns as many terms as the others, with the same names, in the same order;
    * weights have the shape of their losses, are not negative, and do not depend on log-probabilities, values or
      measures of the policy (see :class:`Term`);
    * metrics are detached and have one dimension: one value per pair, list, completion or token, not their mean;
    * a field that :attr:`needs` names is there for every row.

    What else an objective may answer, with the answers that stand for one that says nothing, is
    :class:`BaseObjective`.

    Attributes:
        needs: The optional fields of :class:`CompletionBatch` that it reads; a trainer supplies just these.
            ``"references.NAME"`` is the log-probabilities of another reference, ``"token_weights.mapo"`` and
            ``"token_weights.activations"`` say what token weights are made of.
        measures: Quantities of whole next-token distributions, by the name under which ``CompletionBatch.measures``
            has their values.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def measures(self) -> Mapping[str, Measure]: ...

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return the losses of a batch.

        Args:
            batch: Completions with :attr:`needs` and :attr:`measures`. The trainer also calls with zeros for what the
                policy computes, to sum the weights of a step, which must not depend on it; see :class:`Term`.

        Returns:
            As many terms in each call, with weights of the shape of their losses.
        """
        ...


class BaseObjective(ABC):
    """An objective with answers to all that trainers and evaluation ask, each with a default.

    Built-in objectives inherit from it. So does one of your own that has an implicit reward, or computes something
    once from a whole rollout.
    """

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """See :class:`Objective`."""

    @property
    def measures(self) -> Mapping[str, Measure]:
        """See :class:`Objective`; none."""
        return {}

    @abstractmethod
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """See :class:`Objective`."""

    @property
    def needs_of_samples(self) -> frozenset[str]:
        """Fields that it reads of fresh samples; less than :attr:`needs` where it reads some of stored ones alone."""
        return self.needs

    @property
    def needs_of_stored(self) -> frozenset[str]:
        """Fields that it reads of stored samples of the reference, which a rollout is mixed with."""
        return self.needs

    @property
    def correction_level(self) -> Importance | None:
        """The unit of its weights ``π/π_old``, which a correction of the sampler's law bounds; None without weights."""
        return None

    def prepare(self, batch: CompletionBatch) -> CompletionBatch:
        """Return a whole rollout with what is computed once from all of it; nothing.

        A rollout is then cut into micro-batches of whole prompts and updated on several times. What is in ``needs``
        must be supplied from outside; what this fills in is not in it.

        Args:
            batch: The whole rollout before its first update, so that ``logprobs`` are those of π_old.

        Returns:
            The same completions. A batch that comes to the objective without these fields is prepared by it.
        """
        return batch

    def log_weights(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return the log-weights of samples of which ``log_partition`` is estimated, for those that need it.

        Args:
            batch: Samples with what it reads, ``log_partition`` excepted.

        Returns:
            Shape (N,), without gradient.

        Raises:
            TypeError: It has none.
        """
        raise TypeError(
            f"{type(self).__name__} needs log_partition and does not say of what: give it log_weights(batch), or leave "
            "log_partition out of needs."
        )

    @property
    def link(self) -> Link | None:
        """The function of a completion's log-ratio that its implicit reward is; None where it is none of it alone."""
        return None

    @property
    def rewarding(self) -> bool:
        """Whether it defines an implicit reward: what its policy was made to prefer, read off its probabilities."""
        return False

    def completion_rewards(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return the implicit reward of each completion, of which ``rewards/*`` of the metrics are made.

        Args:
            batch: Completions with all that the objective reads, ``preference`` excepted.

        Returns:
            Shape (N,); known up to a constant per prompt.

        Raises:
            TypeError: It defines none.
        """
        raise TypeError(f"{type(self).__name__} defines no implicit reward.")


@dataclass(frozen=True)
class _Completed(BaseObjective):
    """An objective that has the three required members alone, with the defaults for the others."""

    objective: Objective

    @property
    @override
    def needs(self) -> frozenset[str]:
        return self.objective.needs

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        return self.objective.measures

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        return self.objective(batch)


REQUIRED = frozenset({"needs", "measures"})
OPTIONAL = frozenset(name for name in vars(BaseObjective) if not name.startswith("_")) - REQUIRED


def complete(objective: Objective) -> BaseObjective:
    """Return an objective that answers all questions, from one that may answer the required ones alone.

    Args:
        objective: Any.

    Returns:
        Itself if it is a :class:`BaseObjective`; else one with its losses and the defaults.

    Raises:
        TypeError: A required member is missing, or it defines an optional one without being a ``BaseObjective``, so
            that it would never be asked.

    Example:
        >>> from falign.objectives import FDPO
        >>> complete(FDPO()) == FDPO()
        True
    """
    if isinstance(objective, BaseObjective):
        return objective
    name = type(objective).__name__
    if not isinstance(objective, Objective):
        missing = [member for member in ("needs", "measures", "__call__") if member not in dir(objective)]
        raise TypeError(
            f"{name} has no {' and no '.join(missing)}: an objective has needs (a frozenset of fields), measures (a "
            "mapping, {} for none) and __call__(batch)."
        )
    if unasked := sorted(OPTIONAL & set(dir(objective))):
        raise TypeError(
            f"{name} defines {', '.join(unasked)} and would not be asked for it: let it inherit from "
            "falign.objectives.BaseObjective."
        )
    return _Completed(objective)


def reference_names(needs: frozenset[str], measures: Mapping[str, Measure]) -> frozenset[str]:
    """Return the names of all references that an objective reads, in whatever way.

    Args:
        needs: As :attr:`Objective.needs`.
        measures: As :attr:`Objective.measures`, and others that are to be computed.

    Returns:
        Names. ``reference`` is the one whose log-probabilities are ``reference_logprobs``, and the one whose
        activations make token weights.

    Example:
        >>> sorted(reference_names(frozenset({"preference", "references.teacher", "reference_logprobs"}), {}))
        ['reference', 'teacher']
    """
    named = {name.partition(".")[2] for name in needs if field_of(name) == "references"}
    if any(field_of(name) in ("reference_logprobs", "token_weights") for name in needs):
        named.add("reference")
    return frozenset(named | {name for measure in measures.values() for name in measure.references})


def token_weighting(needs: frozenset[str]) -> TokenWeighting:
    """Return the source of ``CompletionBatch.token_weights`` that an objective names.

    Args:
        needs: As :attr:`Objective.needs`.

    Returns:
        ``"none"`` where it reads none, ``"activations"`` where it names no source.

    Raises:
        ValueError: It names one that is unknown, or two.

    Example:
        >>> token_weighting(frozenset({"reference_logprobs", "token_weights.mapo"}))
        'mapo'
    """
    sources = [name.partition(".")[2] or "activations" for name in needs if field_of(name) == "token_weights"]
    if not sources:
        return "none"
    known = get_args(TokenWeighting)[1:]
    if len(sources) > 1 or sources[0] not in known:
        raise ValueError(f"needs has token_weights of {' and '.join(sorted(sources))}: name one of {', '.join(known)}.")
    return sources[0]  # pyright: ignore[reportReturnType] - one of the known
