"""Common interface of objectives: from a batch of completions to unreduced losses and their weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from falign.divergences.base import numbers
from falign.numeric_fields import NumericFields
from falign.objectives.batch import WORTH, CompletionBatch, field_of
from falign.objectives.link import Link
from falign.objectives.measures import Measure
from falign.objectives.step_means import StepMean
from falign.raised import calling

if TYPE_CHECKING:
    from falign.objectives.controllers import Controller

__all__ = [
    "BaseObjective",
    "CompletionBatch",
    "Importance",
    "Objective",
    "ObjectiveOutput",
    "PreferenceKind",
    "Term",
    "TokenWeighting",
    "complete",
    "reduce_terms",
    "reference_names",
    "token_weighting",
    "total_weights",
]


class Term(NamedTuple):
    """One mean of an objective: ``scale · Σ losses·weights / Σ weights``, both sums over the global batch.

    Attributes:
        losses: Any shape; carries the gradient.
        weights: Same shape, not negative. They must not depend on the policy's log-probabilities, values or
            divergences, not even detached: the trainer sums them over the whole step before its first forward pass,
            and raises an error if they differ later. Factors that depend on the policy belong in ``losses``.
        scale: Factor of the mean.
        name: Name in messages and metrics.
    """

    losses: Float[Tensor, ...]
    weights: Float[Tensor, ...]
    scale: float = 1.0
    name: str = "loss"

    def share(self, denominator: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return ``scale · Σ losses·weights / denominator``.

        Args:
            denominator: Sum of the weights over all batches that contribute to the mean.

        Returns:
            A scalar; 0 if all weights are 0 (0/0).

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
        terms: One for most objectives, two for a hybrid; each has its own denominator.
        metrics: Detached; one value per pair, list or completion: means over ranks and micro-batches stay exact.
    """

    terms: tuple[Term, ...]
    metrics: dict[str, Tensor]

    def mean(self) -> Float[Tensor, ""]:
        """Return the loss of this batch alone, for a custom loop: the sum over terms of their weighted means."""
        return torch.stack([term.share(numbers(term.weights, "weights").sum()) for term in self.terms]).sum()


TokenWeighting = Literal["none", "activations", "mapo", "data", "learned", "learned_independent"]
"""Sources of ``CompletionBatch.token_weights``: none, falign's own weights, the MaPO mask of SparsePO, or the data; and
``learned`` and ``learned_independent`` for SparsePO's learned masks, which are ``CompletionBatch.learned_masks``."""

Importance = Literal["sequence", "token"]
"""The unit of an importance weight ``π/π_old``: a whole completion, or a single token."""

PreferenceKind = Literal["pairs", "labels"]
"""How an objective reads ``preference``: by comparing completions of a prompt, or as a label of each completion."""


@runtime_checkable
class Objective(Protocol):
    """Interface of an objective: it turns a batch into losses. These three members suffice; no base class is needed.

    The contract, which the trainer checks at every step:

    * every call returns the same number of terms, with the same names, in the same order;
    * weights have the shape of their losses, are not negative, and do not depend on log-probabilities, values or
      measures of the policy (see :class:`Term`);
    * metrics are detached and have one dimension: one value per pair, list, completion or token, not their mean;
    * every field in :attr:`needs` is present for every row.

    :class:`BaseObjective` has the optional members and their defaults.

    Attributes:
        needs: Optional fields of :class:`CompletionBatch` that it reads; a trainer supplies only these.
            ``"references.NAME"`` stands for the log-probabilities of another reference; ``"token_weights.mapo"``,
            ``"token_weights.activations"`` and ``"token_weights.data"`` name the source of the token weights.
        measures: Quantities of whole next-token distributions, by their name in ``CompletionBatch.measures``.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def measures(self) -> Mapping[str, Measure]: ...

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return the losses of a batch.

        Args:
            batch: Completions with :attr:`needs` and :attr:`measures`. To sum the weights of a step,
                the trainer also calls it with zeros for everything that the policy computes; see :class:`Term`.

        Returns:
            The same number of terms in every call, with weights of the shape of their losses.
        """
        ...


class BaseObjective(NumericFields, ABC):
    """Base class with a default for every optional member that trainers and evaluation use.

    Built-in objectives inherit from it. So should a custom objective that has an implicit reward or that computes
    something once from a whole rollout.

    Raises:
        TypeError: A subclass overrides :meth:`completion_rewards` and inherits the :attr:`link` of another reward.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        rewards, link = (
            next(each for each in cls.__mro__ if name in vars(each)) for name in ("completion_rewards", "link")
        )
        if link is not BaseObjective and cls.__mro__.index(rewards) < cls.__mro__.index(link):
            raise TypeError(
                f"{rewards.__name__} defines completion_rewards and inherits link from {link.__name__}, from which "
                "evaluation would recompute other rewards: define link too (None if the reward is not a function of a "
                "completion's plain log-ratio), or inherit from BaseObjective and call the other objective."
            )

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """See :class:`Objective`."""

    @property
    def measures(self) -> Mapping[str, Measure]:
        """See :class:`Objective`; empty by default."""
        return {}

    @abstractmethod
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """See :class:`Objective`."""

    @property
    def reads_row_weights(self) -> bool:
        """True if its terms' weights have the factor ``CompletionBatch.row_weights`` of each row."""
        return "row_weights" in self.needs

    @property
    def step_means(self) -> Mapping[str, StepMean]:
        """Means over all completions of an optimizer step, by their name in ``CompletionBatch.step_means``.

        The trainer computes them before the step's first loss, in an extra pass without gradient; empty by default.
        """
        return {}

    @property
    def preference_kinds(self) -> frozenset[PreferenceKind]:
        """How it reads ``preference``, which decides what a row of data must have; empty if it does not."""
        return frozenset({"pairs"}) if "preference" in self.needs else frozenset()

    def label_remark(self, desirable: int, undesirable: int) -> str | None:
        """Return a remark on the numbers of labels in the training data, or None; for objectives that read labels."""
        return None

    @property
    def needs_of_samples(self) -> frozenset[str]:
        """Fields that it reads from fresh samples; without those of :attr:`needs` for stored samples only."""
        return self.needs

    @property
    def needs_of_stored(self) -> frozenset[str]:
        """Fields that it reads from stored samples of the reference, which are mixed into a rollout."""
        return self.needs

    @property
    def reads_logprobs(self) -> bool:
        """True if it reads ``logprobs``; where nothing does, a run leaves out the head and the vocabulary."""
        return True

    @property
    def learns_from_samples(self) -> bool:
        """True if it learns something from fresh samples of the policy: by default if it reads their worth."""
        return bool(self.needs & WORTH)

    @property
    def summands(self) -> Mapping[str, BaseObjective]:
        """The objectives that it is a sum of, by name; empty for one that stands for itself."""
        return {}

    @property
    def imitates(self) -> bool:
        """True if it makes all its completions more likely, so that rejected ones must be left out."""
        return False

    @property
    def rests_at(self) -> str | None:
        """Name of the reference at which its gradient is zero, so that a policy that equals it stays there; or None."""
        return None

    @property
    def needs_to_prepare(self) -> frozenset[str]:
        """Fields of :attr:`needs` that :meth:`prepare` reads, although :attr:`measures` give them later anyway."""
        return frozenset()

    @property
    def correction_level(self) -> Importance | None:
        """Unit of its importance weights ``π/π_old``, which a sampler correction bounds; None without weights."""
        return None

    @property
    def accepts_unnormalized(self) -> bool:
        """True if a factor per prompt in the references' probabilities of completions changes nothing."""
        return False

    def prepare(self, batch: CompletionBatch) -> CompletionBatch:
        """Return a whole rollout with the fields that are computed once from all of it; unchanged by default.

        The rollout is then split into micro-batches of whole prompts and used for several updates. Fields in ``needs``
        are supplied by the caller; fields that this method fills in are not in ``needs``.

        Args:
            batch: The whole rollout before its first update, so that ``logprobs`` are those of π_old.

        Returns:
            The same completions. If a batch reaches the objective without these fields, the objective prepares it.
        """
        return batch

    def at(self, step: int) -> BaseObjective:
        """Return the objective with the coefficients of a step as plain numbers; itself if none has a schedule.

        An objective of several parts returns the same of its parts.

        Args:
            step: Number of optimizer steps taken before; online, before the rollout was sampled.
        """
        return self

    @property
    def knots(self) -> tuple[int, ...]:
        """The steps where the course of a coefficient changes, in order; empty by default."""
        return ()

    def coefficients(self, step: int) -> Mapping[str, float]:
        """Return the values at a step of the coefficients that change, by path, for the log; empty by default.

        Args:
            step: As for :meth:`at`.
        """
        return {}

    @property
    def controllers(self) -> Mapping[str, Controller]:
        """The coefficients that follow a metric of the objective, by path; empty by default."""
        return {}

    def controlled(self, values: Mapping[str, float]) -> BaseObjective:
        """Return the objective with values in place of its controllers; itself if there are none.

        Args:
            values: By path, as in :attr:`controllers`.
        """
        return self

    def observed(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Return what the controllers follow, by their paths, without those whose metric is missing.

        Args:
            metrics: Means of the objective's metrics.

        Raises:
            ValueError: It is not clear which metric a controller follows, or its mean is NaN or infinite.
        """
        return {}

    def log_weights(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return the samples' log-weights from which ``log_partition`` is estimated, if the objective needs it.

        Args:
            batch: Samples with the fields that it reads, except ``log_partition``.

        Returns:
            Shape (N,), without gradient.

        Raises:
            TypeError: The objective has no log-weights.
        """
        raise TypeError(
            f"{type(self).__name__} needs log_partition but has no log_weights(batch) to estimate it from: add that "
            "method, or remove log_partition from needs."
        )

    @property
    def link(self) -> Link | None:
        """Function from a completion's log-ratio to its implicit reward; None if the reward needs more than that.

        Evaluation recomputes rewards from it in float64, so that rewards that saturate keep their order. It must agree
        with :meth:`completion_rewards`, and be None for a reward of weighted log-ratios.
        """
        return None

    @property
    def rewarding(self) -> bool:
        """True if :meth:`completion_rewards` or :attr:`link` is defined; scoring and reward benchmarks need one."""
        has_own = type(self).completion_rewards is not BaseObjective.completion_rewards
        return has_own or self.link is not None

    def completion_rewards(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return the implicit reward of each completion, as in the metrics ``rewards/*``; by default that of the link.

        Args:
            batch: Completions with all fields that the objective reads, except ``preference``.

        Returns:
            Shape (N,); known up to a constant per prompt.

        Raises:
            TypeError: The objective defines no implicit reward.
        """
        if self.link is None:
            raise TypeError(f"{type(self).__name__} defines no implicit reward.")
        return self.link.rewards_of(batch).rewards


@dataclass(frozen=True)
class _Completed(BaseObjective):
    """An objective with only the three required members, completed with defaults."""

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
        with calling("objective", self.objective):
            return self.objective(batch)


REQUIRED = frozenset({"needs", "measures"})
OPTIONAL = frozenset(name for name in vars(BaseObjective) if not name.startswith("_")) - REQUIRED


def complete(objective: Objective) -> BaseObjective:
    """Return an objective with all members, given one that may have only the required ones.

    Args:
        objective: Any objective.

    Returns:
        The objective itself if it is a :class:`BaseObjective`; otherwise one with its losses and the defaults.

    Raises:
        TypeError: A required member is missing or of another type, or the objective defines an optional one without
            inheriting from ``BaseObjective``, so that the member would never be called.
        ValueError: A name in ``needs`` has a key that its field does not take.

    Example:
        >>> from falign.objectives import Supervised
        >>> complete(Supervised()) == Supervised()
        True
    """
    name = type(objective).__name__
    if isinstance(objective, BaseObjective):
        _check_members(objective, name)
        return objective
    if not isinstance(objective, Objective):
        missing = [member for member in ("needs", "measures", "__call__") if member not in dir(objective)]
        raise TypeError(
            f"{name} has no {' and no '.join(missing)}: an objective has needs (a frozenset of fields), measures (a "
            "mapping, {} for none) and __call__(batch)."
        )
    if unasked := sorted(OPTIONAL & set(dir(objective))):
        raise TypeError(
            f"{name} defines {', '.join(unasked)}, which would never be called: inherit from "
            "falign.objectives.BaseObjective."
        )
    _check_members(objective, name)
    return _Completed(objective)


def _check_members(objective: Objective, name: str) -> None:
    """Refuse ``needs`` and ``measures`` that would be misread."""
    needs, measures = objective.needs, objective.measures
    if not isinstance(needs, Set) or not all(isinstance(each, str) for each in needs):
        raise TypeError(
            f"{name}.needs is {needs!r}; it must be a frozenset of names, as in frozenset({{'preference'}})."
        )
    if not isinstance(measures, Mapping):
        raise TypeError(f"{name}.measures is {measures!r}; it must be a mapping from names to measures, {{}} for none.")
    for key, measure in measures.items():
        if isinstance(measure, type) or not isinstance(measure, Measure):
            raise TypeError(
                f"{name}.measures[{key!r}] is {measure!r}; it must be a measure: an object with references (a "
                "frozenset of names) and a call, such as falign.objectives.Entropy()."
            )
    for each in sorted(needs):
        field, dot, key = each.partition(".")
        if each == "references.reference":
            raise ValueError(f"{name}.needs has {each!r}: the reference of this name is called 'reference_logprobs'.")
        if (field == "references" and not key) or (dot and field not in ("references", "token_weights")):
            raise ValueError(
                f"{name}.needs has {each!r}: give a field of CompletionBatch, 'references.NAME' or "
                "'token_weights.SOURCE'; measures belong in measures."
            )
    token_weighting(frozenset(needs))


def reference_names(needs: frozenset[str], measures: Mapping[str, Measure]) -> frozenset[str]:
    """Return the names of all references that an objective reads, in its needs or its measures.

    Args:
        needs: As :attr:`Objective.needs`.
        measures: As :attr:`Objective.measures`, and any others to compute.

    Returns:
        Names. ``reference`` supplies ``reference_logprobs`` and the activations for token weights.

    Example:
        >>> sorted(reference_names(frozenset({"preference", "references.teacher", "reference_logprobs"}), {}))
        ['reference', 'teacher']
    """
    named = {name.partition(".")[2] for name in needs if field_of(name) == "references"}
    of_reference = {"reference_logprobs", "token_weights"}
    if any(field_of(name) in of_reference and name != "token_weights.data" for name in needs):
        named.add("reference")
    return frozenset(named | {name for measure in measures.values() for name in measure.references})


def token_weighting(needs: frozenset[str]) -> TokenWeighting:
    """Return the source of ``CompletionBatch.token_weights`` that an objective names.

    Args:
        needs: As :attr:`Objective.needs`.

    Returns:
        ``"none"`` if it reads no token weights, ``"activations"`` if it names no source.

    Raises:
        ValueError: The source is unknown, or more than one is named.

    Example:
        >>> token_weighting(frozenset({"reference_logprobs", "token_weights.mapo"}))
        'mapo'
    """
    sources = [name.partition(".")[2] or "activations" for name in needs if field_of(name) == "token_weights"]
    if not sources:
        return "none"
    known = get_args(TokenWeighting)[1:]
    if len(sources) > 1 or sources[0] not in known:
        raise ValueError(
            f"needs has token_weights from {' and '.join(sorted(sources))}: name one of {', '.join(known)}."
        )
    return sources[0]  # pyright: ignore[reportReturnType] - one of the known


def total_weights(terms: Sequence[Term]) -> Float[Tensor, " K"]:
    """Return ``Σ weights`` of each term; summed over micro-batches and ranks, they are the step's denominators.

    Args:
        terms: The K terms of one micro-batch.

    Returns:
        Shape (K,), detached.

    Example:
        >>> total_weights([Term(torch.zeros(3), torch.ones(3))])
        tensor([3.])
    """
    return torch.stack([numbers(term.weights, "weights").detach().sum() for term in terms])


def reduce_terms(terms: Sequence[Term], denominators: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """Return ``Σ_k scale_k Σ losses_k·weights_k / denominator_k``: this micro-batch's share of the step's loss.

    Args:
        terms: The K terms of one micro-batch.
        denominators: Sum of each term's weights over the whole step, shape (K,).

    Returns:
        A scalar; summed over micro-batches and ranks it is the loss of the global batch.

    Raises:
        ValueError: The numbers of denominators and terms differ.

    Example:
        >>> reduce_terms([Term(torch.tensor([1.0, 3.0]), torch.ones(2))], torch.tensor([4.0]))
        tensor(1.)
    """
    if denominators.shape != (len(terms),):
        raise ValueError(f"denominators has shape {tuple(denominators.shape)} for {len(terms)} terms.")
    return torch.stack([term.share(total) for term, total in zip(terms, denominators, strict=True)]).sum()
