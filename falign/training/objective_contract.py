"""The contract of objectives, checked at every step; a violation stops the run with the rule that was broken."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from falign.errors import TrainingError
from falign.objectives import ObjectiveOutput, Term

__all__ = ["PLANNED_TERMS", "ObjectiveContract", "PlannedTerms"]

PLANNED_TERMS = "planned_terms"
"""The field of a micro-batch with the names and weights of its terms, as they entered the step's sums."""

PlannedTerms = tuple[list[str], list[Tensor], list[float]]
"""Names, weights and scales of the terms of a micro-batch; plain, because transformers moves those between devices."""

RESERVED = frozenset({"loss", "grad_norm", "learning_rate", "epoch", "step", "skipped_steps"})
"""Names in the log that are the trainer's."""

OUTPUT_RULE = (
    "An objective must return ObjectiveOutput(terms, metrics): a tuple of Term(losses, weights) and a mapping from "
    "names to tensors."
)
SCALE_RULE = (
    "A scale is a factor of the mean over the whole step, so it must be one number that all micro-batches share. "
    "Multiply the losses by factors that depend on the policy or on the batch."
)

WEIGHTS_RULE = (
    "The weights of a term must not depend on log-probabilities, values or measures of the policy: the losses are "
    "divided by their sum over the step, which is computed before the forward pass. Multiply the losses by factors "
    "that depend on the policy, and compute weights only from masks, preferences and other given fields."
)
TERMS_RULE = "An objective must return the same terms in the same order at every call."
METRICS_RULE = (
    "A metric must be a detached tensor of one dimension, with one value per pair, list, completion or token and not "
    "their mean: then the mean over micro-batches and processes is exact."
)


class ObjectiveContract:
    """The rules that an objective's terms and metrics must follow.

    Attributes:
        names: Names of its terms, in order; empty before the first call.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._scales: tuple[int, list[float]] = (-1, [])

    def read(self, output: object, *, step: int) -> ObjectiveOutput:
        """Return an objective's output, after checking that it is one.

        Args:
            output: The result of the call.
            step: Number of the step, for messages.

        Raises:
            TrainingError: A part is missing or of another type, a scale is not a number, or a metric has a name that
                the trainer logs.
        """
        place = f"Step {step}: the objective returned"
        if not isinstance(output, ObjectiveOutput):
            raise TrainingError(f"{place} a {type(output).__name__}. {OUTPUT_RULE}")
        terms, metrics = output
        if isinstance(terms, Term) or not isinstance(terms, tuple | list):
            raise TrainingError(f"{place} a {type(terms).__name__} in place of a tuple of terms. {OUTPUT_RULE}")
        if not terms:
            raise TrainingError(f"{place} no terms. {OUTPUT_RULE} Without anything to learn, give weights of 0.")
        for term in terms:
            if not isinstance(term, Term):
                raise TrainingError(f"{place} a {type(term).__name__} among the terms. {OUTPUT_RULE}")
            for part in ("losses", "weights"):
                value = getattr(term, part)
                if not isinstance(value, Tensor) or value.is_complex():
                    found = f"of {value.dtype}" if isinstance(value, Tensor) else f"as a {type(value).__name__}"
                    raise TrainingError(f"{place} {part} of term {term.name} {found}; they must be a real tensor.")
            if not isinstance(term.scale, Real) or not math.isfinite(term.scale):
                found = f"a {type(term.scale).__name__}" if isinstance(term.scale, Tensor) else repr(term.scale)
                raise TrainingError(f"{place} term {term.name} with {found} as its scale. {SCALE_RULE}")
        if not isinstance(metrics, Mapping):
            raise TrainingError(f"{place} a {type(metrics).__name__} in place of metrics. {OUTPUT_RULE}")
        for name, values in metrics.items():
            if not isinstance(values, Tensor):
                raise TrainingError(f"{place} the metric {name!r} as a {type(values).__name__}. {METRICS_RULE}")
        if taken := sorted(RESERVED & metrics.keys()):
            raise TrainingError(f"{place} a metric named {taken[0]!r}, which the trainer logs itself: rename it.")
        return output

    def plan(self, terms: Sequence[Term], *, step: int) -> PlannedTerms:
        """Return the names and weights of a micro-batch's terms before its forward pass, for :meth:`check`.

        Args:
            terms: The objective's terms, computed with zeros in place of log-probabilities.
            step: Number of the step, for messages.

        Raises:
            TrainingError: A weight is negative, or the terms differ from those of earlier calls, or the scales from
                those of another micro-batch of the step.
        """
        names = tuple(term.name for term in terms)
        if not self.names:
            self.names = names
        if names != self.names:
            raise TrainingError(
                f"Step {step}: the objective returned the terms {_listed(names)} before the forward pass, and "
                f"{_listed(self.names)} at the first call. {TERMS_RULE}"
            )
        for number, term in enumerate(terms):
            if (term.weights.detach() < 0).any():
                raise TrainingError(
                    f"Step {step}: term {self.called(number)} has a negative weight. A weight says how much a loss "
                    "counts in a mean: put the sign into the losses, or into the term's scale."
                )
        scales = [float(term.scale) for term in terms]
        if self._scales[0] == step and self._scales[1] != scales:
            raise TrainingError(
                f"Step {step}: the scales of the terms are {scales}, and {self._scales[1]} in another micro-batch of "
                f"the step. {SCALE_RULE}"
            )
        self._scales = (step, scales)
        return list(names), [term.weights.detach() for term in terms], scales

    def check(self, planned: PlannedTerms, output: ObjectiveOutput, *, step: int) -> None:
        """Refuse a micro-batch whose terms differ from the planned ones, or whose metrics break the rule.

        Args:
            planned: The result of :meth:`plan` for the micro-batch.
            output: The objective's output after the forward pass.
            step: Number of the step, for messages.

        Raises:
            TrainingError: A name, shape, weight or scale differs; a weight carries a gradient; no loss carries one; or
                a metric carries one or is not one-dimensional.
        """
        names, weights, scales = planned
        terms = output.terms
        if [term.name for term in terms] != names:
            raise TrainingError(
                f"Step {step}: the objective returned the terms {_listed([term.name for term in terms])}, and "
                f"{_listed(names)} before the forward pass. {TERMS_RULE}"
            )
        for number, (before, term) in enumerate(zip(weights, terms, strict=True)):
            if term.losses.shape != term.weights.shape:
                raise TrainingError(
                    f"Step {step}: term {self.called(number)} has losses of shape {tuple(term.losses.shape)} and "
                    f"weights of shape {tuple(term.weights.shape)}. Each loss must have one weight."
                )
            if (found := _difference(before, term.weights)) is not None:
                raise TrainingError(f"Step {step}: the weights of term {self.called(number)} {found}. {WEIGHTS_RULE}")
        if (found := [float(term.scale) for term in terms]) != scales:
            raise TrainingError(
                f"Step {step}: the scales of the terms are {found}, and {scales} before the forward pass. {SCALE_RULE}"
            )
        if not any(term.losses.requires_grad for term in terms):
            raise TrainingError(
                f"Step {step}: no loss of {_listed(names)} carries a gradient. Losses must be computed from "
                "batch.logprobs, batch.values or batch.measures, and not detached."
            )
        for name, values in output.metrics.items():
            if values.requires_grad or values.ndim != 1:
                found = "carries a gradient" if values.requires_grad else f"has shape {tuple(values.shape)}"
                raise TrainingError(f"Step {step}: the metric {name!r} of the objective {found}. {METRICS_RULE}")

    def called(self, number: int) -> str:
        """Return the name of a term, with its number if several terms share the name."""
        name = self.names[number]
        return name if Counter(self.names)[name] == 1 else f"{name} (number {number + 1} of {len(self.names)})"


def _difference(before: Tensor, weights: Tensor) -> str | None:
    """Describe how weights differ from those before the forward pass; None if they do not."""
    if weights.requires_grad:
        return "carry a gradient"
    if before.shape != weights.shape:
        return f"have shape {tuple(weights.shape)}, and {tuple(before.shape)} before the forward pass"
    # Only relative: weights may be tiny. NaN equals NaN here, because the finite guard reports it.
    if not torch.allclose(before.double(), weights.double(), rtol=1e-5, atol=0.0, equal_nan=True):
        gap = (before.double() - weights.double()).abs().max().item()
        return f"differ by up to {gap:.3g} from those before the forward pass"
    return None


def _listed(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"
