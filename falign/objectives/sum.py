"""Sums of objectives, and the completions that a term of a sum reads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from falign.objectives.base import (
    BaseObjective,
    CompletionBatch,
    Importance,
    Objective,
    ObjectiveOutput,
    PreferenceKind,
    complete,
)
from falign.objectives.controllers import Controller
from falign.objectives.groups import groups_of, largest
from falign.objectives.link import Link
from falign.objectives.measures import Measure
from falign.objectives.step_means import StepMean, StepRows, Weighted

__all__ = ["Selected", "Sum"]

TERM_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Selected(BaseObjective):
    """An objective that reads only the chosen or only the rejected completions of preference data.

    It reads ``preference``, so a run keeps both sides of its pairs.

    Attributes:
        objective: Any objective.
        completions: ``"chosen"``: the most preferred ones of each prompt, and those labeled true where a prompt has
            one completion. ``"rejected"``: all others. ``"all"``.

    Raises:
        ValueError: The choice is unknown.
        TypeError: The objective is not one.

    Example:
        >>> from falign.objectives import Supervised
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0], [-3.0]]),
        ...     completion_mask=torch.ones(2, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0]),
        ...     preference=torch.tensor([1.0, 0.0]),
        ... )
        >>> Selected(Supervised(), "chosen")(batch).mean()
        tensor(1.)
    """

    objective: Objective
    completions: Literal["chosen", "rejected", "all"]

    def __post_init__(self) -> None:
        if self.completions not in ("chosen", "rejected", "all"):
            raise ValueError(f"completions={self.completions!r}: choose 'chosen', 'rejected' or 'all'.")
        _ = self._whole  # refuses what is not an objective

    @cached_property
    def _whole(self) -> BaseObjective:
        return complete(self.objective)

    @property
    @override
    def needs(self) -> frozenset[str]:
        return self._whole.needs | {"preference"}

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        return self._whole.measures

    @property
    @override
    def reads_row_weights(self) -> bool:
        return self._whole.reads_row_weights

    @property
    @override
    def step_means(self) -> Mapping[str, StepMean]:
        return {
            name: _MeanOfRows(mean, lambda batch: batch.select(self.rows(batch)), frozenset({"preference"}))
            for name, mean in self._whole.step_means.items()
        }

    @property
    @override
    def preference_kinds(self) -> frozenset[PreferenceKind]:
        return self._whole.preference_kinds or super().preference_kinds

    @override
    def label_remark(self, desirable: int, undesirable: int) -> str | None:
        return self._whole.label_remark(desirable, undesirable)

    @property
    @override
    def needs_of_samples(self) -> frozenset[str]:
        return self._whole.needs_of_samples | {"preference"}

    @property
    @override
    def needs_of_stored(self) -> frozenset[str]:
        return self._whole.needs_of_stored | {"preference"}

    @property
    @override
    def reads_logprobs(self) -> bool:
        return self._whole.reads_logprobs

    @property
    @override
    def rests_at(self) -> str | None:
        return self._whole.rests_at

    @property
    @override
    def needs_to_prepare(self) -> frozenset[str]:
        return self._whole.needs_to_prepare

    @property
    @override
    def correction_level(self) -> Importance | None:
        return self._whole.correction_level

    @property
    @override
    def accepts_unnormalized(self) -> bool:
        return self._whole.accepts_unnormalized

    @override
    def at(self, step: int) -> BaseObjective:
        now = self._whole.at(step)
        return self if now is self._whole else Selected(now, self.completions)

    @override
    def coefficients(self, step: int) -> Mapping[str, float]:
        return self._whole.coefficients(step)

    @property
    @override
    def knots(self) -> tuple[int, ...]:
        return self._whole.knots

    @property
    @override
    def controllers(self) -> Mapping[str, Controller]:
        return self._whole.controllers

    @override
    def controlled(self, values: Mapping[str, float]) -> BaseObjective:
        return Selected(self._whole.controlled(values), self.completions) if values else self

    @override
    def observed(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        return self._whole.observed(metrics)

    def rows(self, batch: CompletionBatch) -> Bool[Tensor, " N"]:
        """Return which completions the objective reads.

        Args:
            batch: Completions with ``preference``.

        Returns:
            Shape (N,).

        Raises:
            ValueError: ``preference`` is None.
        """
        preference, groups = batch.require("preference"), groups_of(batch.prompt_index)
        alone = groups.size == 1
        chosen = torch.where(alone, preference > 0, preference == largest(preference, groups))
        return {"chosen": chosen, "rejected": ~chosen, "all": torch.ones_like(chosen)}[self.completions]

    @override
    def prepare(self, batch: CompletionBatch) -> CompletionBatch:
        rows = self.rows(batch)
        return CompletionBatch.of({**batch.tensors(), **batch.new_in(self._whole.prepare(batch.select(rows)), rows)})

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return the objective's terms and metrics on the selected completions.

        Args:
            batch: Completions with :attr:`needs`.

        Returns:
            The output of the objective.

        Raises:
            ValueError: ``preference`` is None, or a field that the objective reads.
        """
        return self._whole(batch.select(self.rows(batch)))


@dataclass(frozen=True)
class Sum(BaseObjective):
    """``Σ_k weight_k · objective_k``: any mix of objectives on the same completions.

    Each objective keeps its own denominators. Its terms are named ``NAME.term``, its metrics ``NAME/metric`` and its
    measures ``NAME.measure``; what its ``prepare`` computes is its own (``CompletionBatch.prepared``).

    An objective that does not read ``from_reference`` gets only the fresh samples of a rollout with stored ones.

    Attributes:
        terms: By name, an objective, or an objective and its weight; 1 by default. A name is a lower-case letter, then
            letters, digits and underscores. Negative weights maximize.

    Raises:
        ValueError: There is no term, a name is not one, a weight is 0 or not finite, two terms need ``log_partition``,
            or a term would imitate the rejected completions that another one reads.
        TypeError: A term is not an objective.

    Example:
        >>> from falign.methods import FDPO
        >>> from falign.objectives import Supervised
        >>> both = Sum({"dpo": FDPO(beta=0.1), "sft": (Selected(Supervised(), "chosen"), 0.2)})
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0], [-3.0]]),
        ...     reference_logprobs=torch.tensor([[-1.0], [-3.0]]),
        ...     completion_mask=torch.ones(2, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0]),
        ...     preference=torch.tensor([1.0, 0.0]),
        ... )
        >>> [(term.name, term.scale) for term in both(batch).terms]
        [('dpo.pairwise', 1.0), ('sft.supervised', 0.2)]
        >>> both(batch).mean()  # log 2 + 0.2 · 1
        tensor(0.8931)
    """

    terms: Mapping[str, Objective | tuple[Objective, float]]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("terms is empty: give at least one objective.")
        for name, weight in self.weights.items():
            if not TERM_NAME.fullmatch(name):
                raise ValueError(
                    f"terms has {name!r}: a name is a lower-case letter, then letters, digits and underscores."
                )
            if weight == 0 or not math.isfinite(weight):
                raise ValueError(
                    f"terms[{name!r}] has weight {weight!r}: give a finite number other than 0, or leave the term out."
                )
        whole = {name: (each, self.weights[name]) for name, each in self.objectives.items()}
        object.__setattr__(self, "terms", whole)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse terms that work alone, and not beside each other."""
        estimated = [name for name, each in self.objectives.items() if "log_partition" in each.needs]
        if len(estimated) > 1:
            raise ValueError(
                f"terms {' and '.join(estimated)} each need log_partition, of which a batch has one: leave one out."
            )
        for name, each in self.objectives.items():
            if each.imitates and "preference" in self.needs and "preference" not in each.needs:
                raise ValueError(
                    f"term {name} makes all its completions more likely, the rejected ones among them, which another "
                    f"term reads: give it only some, with completions: chosen in a run file, as "
                    f"Selected({type(each).__name__}(...), completions='chosen') in Python."
                )

    @cached_property
    def objectives(self) -> dict[str, BaseObjective]:
        """The objectives by name."""
        return {name: complete(term[0] if isinstance(term, tuple) else term) for name, term in self.terms.items()}

    @property
    def weights(self) -> dict[str, float]:
        """The weights by name."""
        return {name: float(term[1]) if isinstance(term, tuple) else 1.0 for name, term in self.terms.items()}

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(each.needs for each in self.objectives.values()))

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        return {
            f"{name}.{key}": measure for name, each in self.objectives.items() for key, measure in each.measures.items()
        }

    @property
    @override
    def reads_row_weights(self) -> bool:
        return all(each.reads_row_weights for each in self.objectives.values())

    @property
    @override
    def step_means(self) -> Mapping[str, StepMean]:
        return {
            f"{name}.{key}": _MeanOfRows(mean, partial(self._completions_of, name), self.needs & {"from_reference"})
            for name, each in self.objectives.items()
            for key, mean in each.step_means.items()
        }

    @property
    @override
    def preference_kinds(self) -> frozenset[PreferenceKind]:
        return frozenset().union(*(each.preference_kinds for each in self.objectives.values()))

    @override
    def label_remark(self, desirable: int, undesirable: int) -> str | None:
        remarks = {name: each.label_remark(desirable, undesirable) for name, each in self.objectives.items()}
        return "; ".join(f"{name}: {remark}" for name, remark in remarks.items() if remark is not None) or None

    @property
    @override
    def needs_of_samples(self) -> frozenset[str]:
        return frozenset().union(*(each.needs_of_samples for each in self.objectives.values()))

    @property
    @override
    def needs_of_stored(self) -> frozenset[str]:
        readers = [each for each in self.objectives.values() if "from_reference" in each.needs]
        return frozenset().union(*(each.needs_of_stored for each in readers or self.objectives.values()))

    @property
    @override
    def needs_to_prepare(self) -> frozenset[str]:
        return frozenset().union(*(each.needs_to_prepare for each in self.objectives.values()))

    @property
    @override
    def summands(self) -> Mapping[str, BaseObjective]:
        return self.objectives

    @property
    @override
    def reads_logprobs(self) -> bool:
        return any(each.reads_logprobs for each in self.objectives.values())

    @property
    @override
    def learns_from_samples(self) -> bool:
        return all(each.learns_from_samples for each in self.objectives.values())

    @property
    @override
    def accepts_unnormalized(self) -> bool:
        return all(each.accepts_unnormalized for each in self.objectives.values())

    @property
    @override
    def imitates(self) -> bool:
        return any(each.imitates for each in self.objectives.values())

    @property
    @override
    def correction_level(self) -> Importance | None:
        # A correction bounds weights of one unit; for terms of both there is none.
        levels = [each.correction_level for each in self.objectives.values()]
        found: list[Importance] = [level for level in ("sequence", "token") if level in levels]
        return found[0] if len(found) == 1 else None

    @override
    def at(self, step: int) -> BaseObjective:
        now = {name: each.at(step) for name, each in self.objectives.items()}
        if all(each is self.objectives[name] for name, each in now.items()):
            return self
        return Sum({name: (each, self.weights[name]) for name, each in now.items()})

    @override
    def coefficients(self, step: int) -> Mapping[str, float]:
        found = {name: each.coefficients(step) for name, each in self.objectives.items()}
        return {f"{name}.{path}": value for name, values in found.items() for path, value in values.items()}

    @property
    @override
    def knots(self) -> tuple[int, ...]:
        return tuple(sorted({knot for each in self.objectives.values() for knot in each.knots}))

    @property
    @override
    def controllers(self) -> Mapping[str, Controller]:
        found = {name: each.controllers for name, each in self.objectives.items()}
        return {f"{name}.{path}": each for name, own in found.items() for path, each in own.items()}

    @override
    def controlled(self, values: Mapping[str, float]) -> BaseObjective:
        if not values:
            return self
        own = {name: each.controlled(_inside(values, f"{name}.")) for name, each in self.objectives.items()}
        return Sum({name: (each, self.weights[name]) for name, each in own.items()})

    @override
    def observed(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        found = {name: each.observed(_inside(metrics, f"{name}/")) for name, each in self.objectives.items()}
        return {f"{name}.{path}": value for name, own in found.items() for path, value in own.items()}

    @override
    def prepare(self, batch: CompletionBatch) -> CompletionBatch:
        """Return the rollout with what each term computes from all of it, kept apart as ``prepared``.

        Args:
            batch: The whole rollout before its first update, with :attr:`needs`.

        Returns:
            The same completions.
        """
        found: dict[str, Tensor] = {}
        for name, each in self.objectives.items():
            own, rows = self._of_term(name, batch)
            new = batch.term(name).new_in(each.prepare(own), rows)
            found |= {f"prepared.{name}.{key}": value for key, value in new.items()}
        return CompletionBatch.of({**batch.tensors(), **found})

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return the terms and metrics of all objectives.

        Args:
            batch: Completions with :attr:`needs` and :attr:`measures`, after :meth:`prepare` or before.

        Returns:
            ``NAME.term`` with its scale times the weight, in order, and ``NAME/metric``; a metric without values is
            left out.

        Raises:
            ValueError: A field that an objective reads is None.
        """
        terms, metrics = [], {}
        for name in self.measures:
            batch.require(f"measures.{name}")  # by its whole name: the objective knows only its own part
        for name, each in self.objectives.items():
            output, weight = each(self._completions_of(name, batch)), self.weights[name]
            terms += [term._replace(name=f"{name}.{term.name}", scale=weight * term.scale) for term in output.terms]
            metrics |= {f"{name}/{key}": values for key, values in output.metrics.items() if len(values)}
        return ObjectiveOutput(tuple(terms), metrics)

    def _completions_of(self, name: str, batch: CompletionBatch) -> CompletionBatch:
        """Return the batch of a term."""
        return self._of_term(name, batch)[0]

    def _of_term(self, name: str, batch: CompletionBatch) -> tuple[CompletionBatch, Bool[Tensor, " N"] | None]:
        """Return the batch of a term, and which completions it has; None for all."""
        own, needs = batch.term(name), self.objectives[name].needs
        if "from_reference" in needs or "from_reference" not in self.needs:
            return own, None
        rows = ~batch.require("from_reference")
        return own.select(rows), rows

    @override
    def log_weights(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        for name, each in self.objectives.items():
            if "log_partition" in each.needs:
                return each.log_weights(batch.term(name))
        return super().log_weights(batch)

    @property
    def _rewarding(self) -> list[str]:
        return [name for name, each in self.objectives.items() if each.rewarding]

    @property
    @override
    def link(self) -> Link | None:
        return self.objectives[self._rewarding[0]].link if len(self._rewarding) == 1 else None

    @property
    @override
    def rewarding(self) -> bool:
        return len(self._rewarding) == 1

    @override
    def completion_rewards(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return the implicit reward of the one term that defines one.

        Args:
            batch: Completions with the fields that the objective reads, except ``preference``.

        Returns:
            Shape (N,).

        Raises:
            TypeError: No term defines an implicit reward, or several do.
        """
        if not self.rewarding:
            found = ", ".join(self._rewarding) or "none"
            raise TypeError(f"Sum defines an implicit reward if exactly one of its terms does; here {found}.")
        (name,) = self._rewarding
        return self.objectives[name].completion_rewards(batch.term(name))


def _inside(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return the values whose names have a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class _MeanOfRows:
    """A step mean over the rows that a part of an objective reads.

    Attributes:
        mean: The part's step mean.
        selection: From a batch to the part's rows.
        reads: Fields that the selection reads.
    """

    mean: StepMean
    selection: Callable[[CompletionBatch], CompletionBatch]
    reads: frozenset[str]

    @property
    def rows(self) -> StepRows:
        return self.mean.rows

    @property
    def needs(self) -> frozenset[str]:
        return self.mean.needs | self.reads if self.rows == "own" else self.mean.needs

    def __call__(self, batch: CompletionBatch) -> Weighted:
        return self.mean(self.selection(batch) if self.rows == "own" else batch)
