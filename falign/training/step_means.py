"""The pass before an optimizer step that computes the means its losses read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from falign.data.labels import mismatched
from falign.objectives import BaseObjective, CompletionBatch, Measure, ObjectiveOutput
from falign.objectives.step_means import StepMean
from falign.scoring import PromptTree

__all__ = ["MISMATCHED", "FieldsOnly", "add_step_means", "with_mismatched"]

MISMATCHED = "mismatched"
"""The field of a micro-batch with its prompts laid out with the completions of other prompts."""


@dataclass(frozen=True)
class FieldsOnly:
    """Fields to compute for a batch, without a loss.

    Attributes:
        needs: As :attr:`Objective.needs`.
        measures: As :attr:`Objective.measures`.
    """

    needs: frozenset[str]
    measures: Mapping[str, Measure]

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Refuse: there is no loss."""
        raise TypeError("FieldsOnly names fields to compute; it has no loss.")


def with_mismatched(
    objective: BaseObjective, trees: Sequence[PromptTree], *, then: Sequence[PromptTree] = ()
) -> Sequence[PromptTree]:
    """Return the rows with mismatched completions, if a step mean of the objective reads them; else unchanged.

    Args:
        objective: The objective.
        trees: Rows of data; an empty sequence is returned as it is.
        then: Rows that follow the last one. Held-out rows are few and are followed by the training rows; the training
            rows follow themselves, because nothing of the held-out rows may enter training.

    Raises:
        DataError: All rows have the same prompt.
    """
    if not trees or all(mean.rows != MISMATCHED for mean in objective.step_means.values()):
        return trees
    return mismatched([*trees, *then])[: len(trees)]


def add_step_means(
    batches: Sequence[dict[str, Any]],
    means: Mapping[str, StepMean],
    *,
    score: Callable[[dict[str, Any], FieldsOnly], CompletionBatch],
    counts: Callable[[Mapping[str, Any]], bool],
    add_up: Callable[[Tensor], Tensor],
) -> None:
    """Add the step's means to the columns of its micro-batches.

    Args:
        batches: All micro-batches of a step in this process; changed in place.
        means: The means to compute, by name.
        score: Scores a micro-batch; called without gradient.
        counts: Whether a micro-batch counts.
        add_up: Sums over processes.
    """
    names = sorted(means)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for inputs in batches:
        for rows in sorted({mean.rows for mean in means.values()}):
            asked = [name for name in names if means[name].rows == rows]
            fields = FieldsOnly(frozenset[str]().union(*(means[name].needs for name in asked)), {})
            with torch.no_grad():
                scored = score(inputs[MISMATCHED] if rows == MISMATCHED else inputs, fields)
                if counts(inputs):
                    for name in asked:
                        sums[names.index(name)] += means[name](scored).sums().cpu()
    totals = add_up(sums)
    for inputs in batches:
        rows = len(inputs["completion_mask"])
        added = {
            f"step_means.{name}": (total / weight if weight > 0 else total).float().cpu().expand(rows)
            for name, (total, weight) in zip(names, totals, strict=True)
        }
        inputs["columns"] = {**inputs.get("columns", {}), **added}
