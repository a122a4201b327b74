"""A guard against losses, gradients and rewards that are NaN or infinite: stop at the first, or skip and count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from falign.errors import TrainingError
from falign.objectives import CompletionBatch, Objective, ObjectiveOutput, complete

__all__ = ["FiniteGuard", "describe_loss"]

MOST_IN_A_ROW = 10
"""Steps skipped in a row, beyond which the policy itself counts as broken."""

ROWS_NAMED = 8
"""Rows that a message names."""

ADVICE = (
    "Look at these rows (`falign data check`) and at logratios/* of the steps before; a lower learning rate or a "
    "larger beta keeps the policy nearer to the reference. The checkpoints are intact: `resume` continues from the "
    "last one, and with training.skip_bad=true it skips such steps."
)


class FiniteGuard:
    """Check the loss and the gradient of each step, and count the steps that are skipped.

    Args:
        skip: Skip and count a step that is NaN or infinite; otherwise it stops the run.
        tell: Called with a message for each step that is skipped.

    Attributes:
        skipped: Steps skipped since the run began.
    """

    def __init__(self, *, skip: bool, tell: Callable[[str], None]) -> None:
        self.skip, self.tell = skip, tell
        self.skipped = self._in_a_row = 0
        self._steps = self._untaken = 0  # since the last log
        self._found: str | None = None
        self._places: dict[str, None] = {}

    def begin_step(self) -> None:
        """Forget the rows of the previous step."""
        self._found, self._places = None, {}

    def check_loss(self, loss: Tensor, *, step: int, places: Sequence[str], describe: Callable[[], str]) -> bool:
        """Return whether the loss of a micro-batch is finite.

        Args:
            loss: Loss of the micro-batch.
            step: Number of the step, for messages.
            places: Origin of each of its rows.
            describe: Returns the cause; called only if the loss is not finite.

        Raises:
            TrainingError: The loss is NaN or infinite, and such steps are not skipped.
        """
        self._places |= dict.fromkeys(places)
        if torch.isfinite(loss):
            return True
        self._refuse(f"Step {step}: {describe()}")
        return False

    def check_gradient(self, norm: Tensor | float | None, *, step: int, terms: Sequence[str]) -> bool:
        """Return whether a step may be taken.

        Args:
            norm: Norm of the gradient of the whole step.
            step: Number of the step, for messages.
            terms: Names of the objective's terms.

        Raises:
            TrainingError: The gradient is NaN or infinite, and such steps are not skipped; or too many were skipped.
        """
        self._steps += 1
        # The gradient is reduced over processes, so a bad loss in one process shows in the norm of all; `_found` is set
        # only in the process whose loss it was, which knows the rows.
        finite = norm is None or bool(torch.isfinite(torch.as_tensor(norm)).all())
        if finite and self._found is None:
            self._in_a_row = 0
            return True
        if self._found is None:
            kind = f"{'term' if len(terms) == 1 else 'terms'} {', '.join(terms)}"
            self._refuse(
                f"Step {step}: the gradient's norm is {float(norm or 0.0)} on {_listed(self._places)} ({kind})."
            )
        self._untaken += 1
        self.count(self._found or "")
        return False

    def count(self, message: str) -> None:
        """Count a skipped step, or a skipped rollout.

        Raises:
            TrainingError: More than ``MOST_IN_A_ROW`` were skipped in a row.
        """
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > MOST_IN_A_ROW:
            raise TrainingError(
                f"{message} This is the {self._in_a_row}th step in a row that is NaN or infinite, so not the data but "
                "the policy is broken. Resume from an earlier checkpoint with a lower learning rate."
            )
        self.tell(f"{message} Skipped (training.skip_bad); {self.skipped} so far.")

    def mean_over_taken(self, loss: float) -> float | None:
        """Return the mean loss of the steps taken since the last log; None if all were skipped.

        Args:
            loss: The trainer's mean, which counts each skipped step as a loss of 0.
        """
        steps, taken = self._steps, self._steps - self._untaken
        self._steps = self._untaken = 0
        return loss * steps / taken if taken else None

    def state_dict(self) -> dict[str, int]:
        """Return the counts as plain values."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "steps": self._steps,
            "untaken": self._untaken,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counts."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._steps, self._untaken = state["steps"], state["untaken"]

    def _refuse(self, message: str) -> None:
        if not self.skip:
            raise TrainingError(f"{message} {ADVICE}")
        self._found = self._found or message


def describe_loss(objective: Objective, batch: CompletionBatch, output: ObjectiveOutput, places: Sequence[str]) -> str:
    """Return the term and rows that are NaN or infinite, and which inputs already were.

    Args:
        objective: The objective that is minimized.
        batch: Its input.
        output: Its output for this batch.
        places: Origin of each completion, N strings.
    """
    sums = [(term.losses * term.weights).detach().sum() for term in output.terms]
    bad = [k for k, total in enumerate(sums) if not torch.isfinite(total)]
    terms = ", ".join(output.terms[k].name for k in bad) or "all together"  # each sum is finite, and their total is not
    rows = _rows(objective, batch, places, bad) or list(dict.fromkeys(places))
    value = sums[bad[0]].item() if bad else float("inf")
    causes = _not_finite(objective, batch)
    why = f"; NaN or infinite in the input: {', '.join(causes)}" if causes else ""
    return f"the loss is {value} on {_listed(rows)} (term {terms}{why})."


def _rows(objective: Objective, batch: CompletionBatch, places: Sequence[str], bad: Sequence[int]) -> list[str]:
    """Return the rows whose bad terms are NaN or infinite also if the objective gets the completions of one prompt."""
    plain = batch.map(Tensor.detach)
    found: dict[str, None] = {}
    for prompt in batch.prompt_index.unique():
        own = batch.prompt_index == prompt
        terms = objective(plain.select(own)).terms
        if any(not torch.isfinite((terms[k].losses * terms[k].weights).sum()) for k in bad if k < len(terms)):
            found[places[int(own.nonzero()[0])]] = None
    return list(found)


def _not_finite(objective: Objective, batch: CompletionBatch) -> list[str]:
    """Return the fields with a value that is NaN or infinite where the objective reads it."""
    found = []
    for name, value in batch.tensors().items():
        if value.is_floating_point():
            own = _read(objective, batch, name)
            inside = value[own[:, None] & batch.completion_mask] if value.shape == batch.logprobs.shape else value[own]
            found += [] if torch.isfinite(inside).all() else [name]
    return found


def _read(objective: Objective, batch: CompletionBatch, name: str) -> Tensor:
    """Return the rows in which the objective reads a field: stored and fresh samples may have different fields."""
    every = torch.ones_like(batch.prompt_index, dtype=torch.bool)
    if batch.from_reference is None or name not in objective.needs:
        return every
    answers = complete(objective)
    of_stored, of_samples = name in answers.needs_of_stored, name in answers.needs_of_samples
    return (batch.from_reference & of_stored) | (~batch.from_reference & of_samples)


def _listed(places: Any) -> str:
    rows = sorted(places)
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return ", ".join(rows[:ROWS_NAMED]) + more
