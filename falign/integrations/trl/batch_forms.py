"""The contents of TRL's batches: pairs as chosen rows before rejected rows, labeled completions as one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from falign.errors import DataError
from falign.scoring import PromptTree

__all__ = ["MISMATCHED_ROWS", "OWN_ROWS", "BatchForm", "Labels", "Pairs", "spread"]

OWN_ROWS, MISMATCHED_ROWS = "", "KL_"
"""Prefixes of a batch's fields: its rows, and for KTO the same prompts with the completions of other prompts."""


@runtime_checkable
class BatchForm(Protocol):
    """The order and the meaning of the rows of one trainer's batches.

    Attributes:
        kind: How the objective must read ``preference``; see :data:`falign.objectives.PreferenceKind`.
        other_trainer: The trainer for objectives of the other kind.
    """

    kind: ClassVar[str]
    other_trainer: ClassVar[str]

    def trees(self, inputs: Mapping[str, Any], rows: str = OWN_ROWS) -> list[PromptTree]:
        """Return the prompts with their completions.

        Raises:
            DataError: A completion is empty, or the prompts of a pair differ.
        """
        ...

    def order(self, inputs: Mapping[str, Any]) -> Int[Tensor, " N"]:
        """Return the row of each completion of :meth:`trees`, in their order."""
        ...

    def prompt_index(self, inputs: Mapping[str, Any]) -> Int[Tensor, " N"]:
        """Return the prompt of each row."""
        ...

    def preference(self, inputs: Mapping[str, Any]) -> Float[Tensor, " N"]:
        """Return the preference of each row."""
        ...

    def reference_sums(self, inputs: Mapping[str, Any], rows: str = OWN_ROWS) -> Float[Tensor, " N"]:
        """Return the precomputed ``log π_ref`` of each row's whole completion."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Batches of ``DPOTrainer``: B chosen rows, then the B rejected rows of the same prompts."""

    kind: ClassVar[str] = "pairs"
    other_trainer: ClassVar[str] = "FKTOTrainer"

    def trees(self, inputs: Mapping[str, Any], rows: str = OWN_ROWS) -> list[PromptTree]:
        """Return one tree for each pair, the chosen completion first."""
        parts = _token_ids(inputs, rows)
        half = len(parts) // 2
        found = []
        for number, ((prompt, chosen), (other, rejected)) in enumerate(zip(parts[:half], parts[half:], strict=True), 1):
            if prompt != other:
                raise DataError(
                    f"Pair {number} of a batch: chosen and rejected have different prompts of {len(prompt)} and "
                    f"{len(other)} tokens, so they do not form a tree: set layout='trl'."
                )
            found.append(PromptTree(prompt, (chosen, rejected), (1.0, 0.0), place=f"pair {number} of a batch"))
        return found

    def order(self, inputs: Mapping[str, Any]) -> Int[Tensor, " N"]:
        """Return the chosen and the rejected row of each pair."""
        ids = inputs["input_ids"]
        return torch.arange(len(ids), device=ids.device).view(2, -1).T.flatten()

    def prompt_index(self, inputs: Mapping[str, Any]) -> Int[Tensor, " N"]:
        """Return the number of each row's pair."""
        ids = inputs["input_ids"]
        return torch.arange(len(ids) // 2, device=ids.device).repeat(2)

    def preference(self, inputs: Mapping[str, Any]) -> Float[Tensor, " N"]:
        """Return 1 for the chosen rows and 0 for the rejected ones."""
        ids = inputs["input_ids"]
        return torch.tensor([1.0, 0.0], device=ids.device).repeat_interleave(len(ids) // 2)

    def reference_sums(self, inputs: Mapping[str, Any], rows: str = OWN_ROWS) -> Float[Tensor, " N"]:
        """Return the columns ``ref_chosen_logps`` and ``ref_rejected_logps``."""
        return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])


@dataclass(frozen=True)
class Labels:
    """Batches of ``KTOTrainer``: one row for each labeled completion, and its prompt with another completion."""

    kind: ClassVar[str] = "labels"
    other_trainer: ClassVar[str] = "FDPOTrainer"

    def trees(self, inputs: Mapping[str, Any], rows: str = OWN_ROWS) -> list[PromptTree]:
        """Return one tree for each row, with one completion."""
        parts, labels = _token_ids(inputs, rows), inputs["label"].tolist()
        return [
            PromptTree(prompt, (completion,), (float(label),), place=f"row {number} of a batch")
            for number, ((prompt, completion), label) in enumerate(zip(parts, labels, strict=True), 1)
        ]

    def order(self, inputs: Mapping[str, Any]) -> Int[Tensor, " N"]:
        """Return the rows in their order."""
        return torch.arange(len(inputs["label"]), device=inputs["input_ids"].device)

    def prompt_index(self, inputs: Mapping[str, Any]) -> Int[Tensor, " N"]:
        """Return another number for each row."""
        return self.order(inputs)

    def preference(self, inputs: Mapping[str, Any]) -> Float[Tensor, " N"]:
        """Return 1 for desirable completions and 0 for the others."""
        return inputs["label"].float()

    def reference_sums(self, inputs: Mapping[str, Any], rows: str = OWN_ROWS) -> Float[Tensor, " N"]:
        """Return the column ``ref_logps``, or ``ref_KL_logps`` of the mismatched rows."""
        return inputs[f"ref_{rows}logps"]


def spread(sums: Float[Tensor, " N"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return per-token values with the given sums: equal for all tokens of a completion, 0 where masked.

    Args:
        sums: One value per completion.
        mask: True on its tokens.

    Example:
        >>> spread(torch.tensor([-3.0, -4.0]), torch.tensor([[True, True, True], [True, False, False]]))
        tensor([[-1., -1., -1.],
                [-4.,  0.,  0.]])
    """
    each = sums / mask.sum(dim=-1).clamp(min=1)
    return each[:, None].expand(mask.shape).masked_fill(~mask, 0.0)


def _token_ids(inputs: Mapping[str, Any], rows: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return prompt and completion of each row, read by the masks alone."""
    fields = (inputs[f"{rows}{name}"].tolist() for name in ("input_ids", "attention_mask", "completion_mask"))
    found = []
    for number, (ids, attention, completion) in enumerate(zip(*fields, strict=True), 1):
        prompt = tuple(i for i, seen, own in zip(ids, attention, completion, strict=True) if seen and not own)
        answer = tuple(i for i, own in zip(ids, completion, strict=True) if own)
        if not prompt or not answer:
            empty = "prompt" if not prompt else "completion"
            raise DataError(
                f"Row {number} of a batch has an empty {empty}: leave such examples out of the dataset, or raise "
                "max_length."
            )
        found.append((prompt, answer))
    return found
