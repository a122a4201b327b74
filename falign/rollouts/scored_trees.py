"""Prompt trees with what is known about each completion, and micro-batches of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from falign.errors import DataError
from falign.objectives import CompletionBatch, field_of
from falign.scoring import PromptTree, Scorer

__all__ = ["ScoredTree", "collate", "completion_rows", "require_columns", "whole_batch"]

Value = float | list[float]
"""Of a completion: one number, or one per token or feature."""

DTYPES = {"from_reference": torch.bool}
PER_FEATURE = frozenset({"features"})


@dataclass(frozen=True)
class ScoredTree:
    """One prompt, its completions, and what is known of each of them.

    Attributes:
        tree: Token ids.
        columns: Fields of :class:`CompletionBatch` by name, each with one value per completion.
    """

    tree: PromptTree
    columns: Mapping[str, Sequence[Value]]

    def with_columns(self, **columns: Sequence[Value]) -> ScoredTree:
        """Return the tree with more columns, or others under the same name."""
        return replace(self, columns={**self.columns, **columns})

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that :meth:`from_state` takes."""
        return {"tree": asdict(self.tree), "columns": {name: list(values) for name, values in self.columns.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ScoredTree:
        """Return the tree of a state, equal to the one that it was taken of."""
        tree = dict(state["tree"])
        tree["prompt_ids"] = tuple(tree["prompt_ids"])
        tree["completion_ids"] = tuple(map(tuple, tree["completion_ids"]))
        tree["preference"] = None if tree["preference"] is None else tuple(tree["preference"])
        return cls(PromptTree(**tree), state["columns"])


def collate(trees: Sequence[ScoredTree], scorer: Scorer) -> dict[str, Any]:
    """Return the fields of a ``TokenBatch`` and, under ``columns``, those of a ``CompletionBatch``.

    A column that only some of the trees have is NaN in the others, and a mask False: no row gets a plausible number.
    """
    batch = scorer.lay_out([tree.tree for tree in trees])
    return {**vars(batch), "columns": _columns(trees, batch.completion_mask.shape)}


def whole_batch(trees: Sequence[ScoredTree]) -> CompletionBatch:
    """Return a rollout as one batch without token ids, for what is computed once from all of it.

    Its log-probabilities are those before the first update, or, where these are not computed, the sampler's.
    """
    lengths = torch.tensor([len(ids) for tree in trees for ids in tree.tree.completion_ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    columns = _columns(trees, mask.shape)
    known = {field.name for field in fields(CompletionBatch)}
    return CompletionBatch.of(
        {
            "logprobs": columns["old_logprobs" if "old_logprobs" in columns else "sampler_logprobs"],
            "completion_mask": mask,
            "prompt_index": torch.repeat_interleave(torch.tensor([len(tree.tree.completion_ids) for tree in trees])),
            **{name: value for name, value in columns.items() if field_of(name) in known},
        }
    )


def require_columns(trees: Sequence[ScoredTree], *, samples: Collection[str], stored: Collection[str]) -> None:
    """Refuse a micro-batch of which some rows lack what others have and the objective reads of all.

    Args:
        trees: The micro-batch.
        samples: Fields that the objective reads of fresh samples.
        stored: Fields that it reads of stored samples of the reference.

    Raises:
        DataError: With the first such row and field.
    """
    names = {name for tree in trees for name in tree.columns}
    for tree in trees:
        read = stored if any(tree.columns.get("from_reference", ())) else samples
        if missing := sorted((names - tree.columns.keys()) & set(read)):
            raise DataError(
                f"{tree.tree.place}: its completions have no {missing[0]}, which the objective reads, and others of "
                "the same batch have: give it for all of them."
            )


def completion_rows(values: Tensor, mask: Tensor) -> list[Value]:
    """Return each completion's part of a tensor of shape (N,), (N, T) or (N, K), without what lies outside the mask."""
    if values.ndim == 1 or values.shape != mask.shape:
        return values.tolist()
    lengths = mask.sum(dim=-1).tolist()
    return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]


def _columns(trees: Sequence[ScoredTree], shape: torch.Size) -> dict[str, Tensor]:
    names = dict.fromkeys(name for tree in trees for name in tree.columns)
    return {name: _tensor(name, trees, shape) for name in names}


def _tensor(name: str, trees: Sequence[ScoredTree], shape: torch.Size) -> Tensor:
    rows = [value for tree in trees for value in tree.columns.get(name, [None] * len(tree.tree.completion_ids))]
    first = next(row for row in rows if row is not None)
    dtype = DTYPES.get(name, torch.float32)
    if not isinstance(first, list):
        missing = False if dtype == torch.bool else math.nan
        return torch.tensor([missing if row is None else row for row in rows], dtype=dtype)
    width = len(first) if name in PER_FEATURE else shape[1]
    result = torch.zeros(len(rows), width, dtype=dtype)
    for target, row in zip(result, rows, strict=True):
        if isinstance(row, list):
            target[: len(row)] = torch.tensor(row, dtype=dtype)
        else:
            target.fill_(math.nan)
    return result
