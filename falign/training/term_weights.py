"""The rule of term weights: they are summed over a step before its first forward pass, so no policy may change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from falign.errors import TrainingError
from falign.objectives import Term

__all__ = ["PLANNED_WEIGHTS", "check_planned", "planned_weights"]

PLANNED_WEIGHTS = "planned_weights"
"""The field of a micro-batch that holds the weights of each term as they were summed."""
RULE = (
    "The weights of a term must not depend on log-probabilities, values or divergences of the policy: their sum over "
    "the step is what the losses are divided by, and it is taken before the forward pass. Multiply the losses by what "
    "depends on the policy, and make weights of masks, preferences and other given fields alone."
)


def planned_weights(terms: Sequence[Term]) -> list[Tensor]:
    """Return what :func:`check_planned` compares with, of an objective called without log-probabilities."""
    return [term.weights.detach() for term in terms]


def check_planned(inputs: Mapping[str, Any], terms: Sequence[Term], *, step: int, names: Sequence[str]) -> None:
    """Refuse a micro-batch whose terms have other weights than those that the step's losses are divided by.

    Args:
        inputs: The micro-batch, with :data:`PLANNED_WEIGHTS`.
        terms: What the objective returned for it.
        step: Which step, for messages.
        names: What the objective's terms are called.

    Raises:
        TrainingError: A weight carries a gradient or differs, or the number of terms does.
    """
    planned: list[Tensor] = inputs[PLANNED_WEIGHTS]
    if len(planned) != len(terms):
        raise TrainingError(
            f"Step {step}: the objective returned {len(terms)} terms, and {len(planned)} before the forward pass. "
            f"{RULE}"
        )
    for number, (before, term) in enumerate(zip(planned, terms, strict=True), start=1):
        if term.weights.requires_grad:
            found = "carry a gradient"
        elif before.shape != term.weights.shape:
            found = f"have shape {tuple(term.weights.shape)}, and {tuple(before.shape)} before the forward pass"
        elif not torch.allclose(before.double(), term.weights.double(), rtol=1e-5, atol=0.0, equal_nan=True):
            gap = (before.double() - term.weights.double()).abs().max().item()
            found = f"differ by up to {gap:.3g} from those before the forward pass"
        else:
            continue
        name = names[number - 1] if len(names) == len(terms) else f"{number} of {', '.join(names)}"
        raise TrainingError(f"Step {step}: the weights of term {name} {found}. {RULE}")
