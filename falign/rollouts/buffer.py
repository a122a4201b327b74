"""A rollout as one batch of tensors, from sampling to the last update on it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, reduce
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from falign.errors import DataError
from falign.objectives import CompletionBatch, field_of
from falign.scoring import PromptTree, Scorer

__all__ = ["Column", "RolloutBuffer", "padded"]

PER_FEATURE = frozenset({"features"})
"""Columns whose second dimension is not the tokens."""

_KNOWN = {each.name for each in fields(CompletionBatch)}


class Column(NamedTuple):
    """One quantity of each of N completions.

    Attributes:
        values: Shape (N,), (N, T) per token with 0 after the end of a completion, or (N, K) per feature. Unknown rows
            are NaN, or False in a mask, so that an objective cannot take them for values.
        known: True for completions that have the quantity, shape (N,).
    """

    values: Shaped[Tensor, "N ..."]
    known: Bool[Tensor, " N"]


@dataclass(frozen=True, eq=False)
class RolloutBuffer:
    """P prompts with their N completions and the known quantities of each completion; on the CPU.

    Attributes:
        trees: Token ids of each prompt and its completions.
        columns: By name: fields of :class:`falign.objectives.CompletionBatch` as its ``tensors()`` names them, and
            quantities that no objective reads, such as ``sampler_logprobs``.
    """

    trees: tuple[PromptTree, ...] = ()
    columns: Mapping[str, Column] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.trees)

    @cached_property
    def mask(self) -> Bool[Tensor, "N T"]:
        """True on completion tokens, shape (N, T), with T the length of the longest completion."""
        lengths = torch.tensor([len(ids) for tree in self.trees for ids in tree.completion_ids], dtype=torch.long)
        return torch.arange(int(lengths.max()) if len(lengths) else 0) < lengths[:, None]

    @property
    def prompt_index(self) -> Int[Tensor, " N"]:
        """The prompt of each completion, counted from 0, shape (N,)."""
        counts = torch.tensor([len(tree.completion_ids) for tree in self.trees], dtype=torch.long)
        return torch.repeat_interleave(counts)

    def values(self, name: str) -> Tensor:
        """Return a column that all completions have.

        Raises:
            DataError: Some completion lacks it.
        """
        self._require(name, torch.ones(len(self.mask), dtype=torch.bool))
        return self.columns[name].values

    def with_columns(self, columns: Mapping[str, Tensor]) -> RolloutBuffer:
        """Return the rollout with columns added or replaced; all completions have them.

        Args:
            columns: By name, shape (N,), (N, T) or (N, K), on any device.
        """
        known = torch.ones(len(self.mask), dtype=torch.bool)
        return self._with({name: Column(values.detach().cpu(), known) for name, values in columns.items()})

    def without(self, names: Collection[str]) -> RolloutBuffer:
        """Return the rollout with unknown columns per token, so that it can be joined with rows that have them."""
        nowhere = torch.full(self.mask.shape, torch.nan)
        return self._with({name: Column(nowhere, torch.zeros(len(nowhere), dtype=torch.bool)) for name in names})

    def select(self, prompts: Sequence[int]) -> RolloutBuffer:
        """Return the given prompts with their completions, in the given order."""
        # Completions of prompt i are the rows starts[i] to starts[i + 1].
        starts = [0, *accumulate(len(tree.completion_ids) for tree in self.trees)]
        rows = torch.tensor([row for i in prompts for row in range(starts[i], starts[i + 1])], dtype=torch.long)
        chosen = RolloutBuffer(tuple(self.trees[i] for i in prompts))
        width = chosen.mask.shape[1]  # that of the longest chosen completion: later positions are padding
        columns = {
            name: Column(values[rows] if self._is_whole(name, values) else values[rows, :width], known[rows])
            for name, (values, known) in self.columns.items()
        }
        return replace(chosen, columns=columns)

    def part(self, number: int, parts: int) -> RolloutBuffer:
        """Return one of several consecutive parts; their numbers of prompts differ by at most one."""
        return self.select(range(len(self) * number // parts, len(self) * (number + 1) // parts))

    @staticmethod
    def concat(buffers: Sequence[RolloutBuffer]) -> RolloutBuffer:
        """Join rollouts; where one lacks a column of another, its rows are unknown in it."""
        buffers = [each for each in buffers if len(each)]
        whole = RolloutBuffer(tuple(tree for each in buffers for tree in each.trees))
        names = dict.fromkeys(name for each in buffers for name in each.columns)
        return replace(whole, columns={name: _joined(name, buffers, whole.mask.shape[1]) for name in names})

    def require(self, *, samples: Collection[str], stored: Collection[str]) -> None:
        """Refuse a micro-batch in which some rows lack a field that the objective reads.

        Args:
            samples: Fields that the objective reads of fresh samples.
            stored: Fields that it reads of stored samples of the reference.

        Raises:
            DataError: A row lacks a field; the message names the first.
        """
        column = self.columns.get("from_reference")
        of_reference = torch.zeros(len(self.mask), dtype=torch.bool) if column is None else column.values
        # A column that no row has is not checked here: the objective itself refuses a batch without the field.
        for name in sorted(self.columns):
            if name in samples:
                self._require(name, ~of_reference)
            if name in stored:
                self._require(name, of_reference)

    def inputs(self, scorer: Scorer) -> dict[str, Any]:
        """Return a micro-batch: the fields of a ``TokenBatch``, and the columns under ``columns``."""
        return {**vars(scorer.lay_out(self.trees)), "columns": self._tensors()}

    def batch(self) -> CompletionBatch:
        """Return the rollout as one batch without token ids, for quantities that are computed once from all of it.

        Its log-probabilities are those before the first update, or the sampler's if those are not computed.
        """
        columns = self._tensors()
        return CompletionBatch.of(
            {
                "logprobs": columns["old_logprobs" if "old_logprobs" in columns else "sampler_logprobs"],
                "completion_mask": self.mask,
                "prompt_index": self.prompt_index,
                **{name: value for name, value in columns.items() if field_of(name) in _KNOWN},
            }
        )

    def save(self, file: Path) -> None:
        """Write the rollout as safetensors, without loss; :meth:`load` reads it back."""
        completions = [ids for tree in self.trees for ids in tree.completion_ids]
        tensors = {
            **_ragged("prompt_ids", [tree.prompt_ids for tree in self.trees]),
            **_ragged("completion_ids", completions),
            "completions": torch.tensor([len(tree.completion_ids) for tree in self.trees], dtype=torch.long),
        }
        preferences = [tree.preference for tree in self.trees]
        if self.trees and None not in preferences:
            tensors["preference"] = torch.tensor([v for row in preferences for v in row or ()], dtype=torch.float64)
        for name, (values, known) in self.columns.items():
            # Copied, because safetensors refuses tensors that share memory.
            tensors |= {f"values of {name}": values.contiguous().clone(), f"known of {name}": known.clone()}
        save_file(tensors, file, metadata={"places": json.dumps([tree.place for tree in self.trees])})

    @classmethod
    def load(cls, file: Path) -> RolloutBuffer:
        """Return the rollout that :meth:`save` wrote."""
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            places = json.loads(opened.metadata()["places"])
        completions, prompts = _rows("completion_ids", tensors), _rows("prompt_ids", tensors)
        preference = tensors["preference"].tolist() if "preference" in tensors else None
        starts = [0, *accumulate(tensors["completions"].tolist())]
        trees = tuple(
            PromptTree(ids, tuple(completions[a:b]), None if preference is None else tuple(preference[a:b]), place)
            for ids, (a, b), place in zip(prompts, pairwise(starts), places, strict=True)
        )
        names = [name.removeprefix("values of ") for name in tensors if name.startswith("values of ")]
        return cls(trees, {name: Column(tensors[f"values of {name}"], tensors[f"known of {name}"]) for name in names})

    def _with(self, columns: Mapping[str, Column]) -> RolloutBuffer:
        for name, (values, _) in columns.items():
            if len(values) != len(self.mask) or not (self._is_whole(name, values) or values.shape == self.mask.shape):
                raise ValueError(
                    f"{name} has shape {tuple(values.shape)}, and the completions are {tuple(self.mask.shape)}."
                )
        return replace(self, columns={**self.columns, **columns})

    @staticmethod
    def _is_whole(name: str, values: Tensor) -> bool:
        return values.ndim == 1 or name in PER_FEATURE

    def _require(self, name: str, rows: Bool[Tensor, " N"]) -> None:
        missing = rows & ~self.columns[name].known
        if missing.any():
            place = self.trees[int(self.prompt_index[missing.nonzero()[0, 0]])].place
            raise DataError(
                f"{place}: its completions have no {name}, which the objective reads, and others of the same batch "
                "have: give it for all of them."
            )

    def _tensors(self) -> dict[str, Tensor]:
        """Return the columns in the dtypes of a batch."""
        return {
            name: values.float() if values.is_floating_point() else values for name, (values, _) in self.columns.items()
        }


def padded(rows: Sequence[Sequence[float]]) -> Shaped[Tensor, "N T"]:
    """Return one number per token of N completions, as float64 like Python's, with 0 after the end of each."""
    return pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)


def _joined(name: str, buffers: Sequence[RolloutBuffer], width: int) -> Column:
    found = [each.columns[name].values for each in buffers if name in each.columns]
    per_token = found[0].ndim == 2 and name not in PER_FEATURE
    values, known = [], []
    for each in buffers:
        number = len(each.mask)
        if name in each.columns:
            own = each.columns[name]
            room = width - own.values.shape[1] if per_token else 0
            # Padding is 0 after the end of known rows, and unknown rows are NaN throughout.
            blank = torch.nn.functional.pad(own.values, (0, room)) if room else own.values
            values.append(blank.masked_fill(~own.known[:, None], torch.nan) if room else blank)
            known.append(own.known)
        else:
            shape = (number, width) if per_token else (number, *found[0].shape[1:])
            fill = torch.nan if found[0].is_floating_point() else False  # masks have no NaN
            values.append(torch.full(shape, fill, dtype=found[0].dtype))
            known.append(torch.zeros(number, dtype=torch.bool))
    dtype = reduce(torch.promote_types, [each.dtype for each in found])
    return Column(torch.cat([each.to(dtype) for each in values]), torch.cat(known))


def _ragged(name: str, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return rows of different lengths as one tensor of all values, and their lengths."""
    return {
        name: torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long),
        f"lengths of {name}": torch.tensor([len(row) for row in rows], dtype=torch.long),
    }


def _rows(name: str, tensors: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    lengths = tensors[f"lengths of {name}"].tolist()
    return [tuple(row.tolist()) for row in tensors[name].split(lengths)]
