"""The padded layout: one row per completion, each with its own copy of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from falign.scoring.trees import PromptTree

__all__ = ["PaddedBatch", "pad"]


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """N completions in rows of L tokens, padded on the right, so that positions need no correction.

    T is the longest completion. Nothing is ever inferred from a token's value: the pad token may be the
    end-of-sequence token.

    Attributes:
        input_ids: Prompt, completion, padding, shape (N, L).
        attention_mask: 1 on prompt and completion tokens, shape (N, L).
        completion_ids: The completions alone, from column 0 on, shape (N, T).
        completion_mask: True on completion tokens, shape (N, T).
        predictor: Index in the row of the position that predicts each completion token, shape (N, T); 0 where
            masked.
        prompt_index: Which tree of this batch a row belongs to, counted from 0, shape (N,).
        preference: Larger is preferred among rows of one tree, shape (N,); None where the trees have none.
        place: Where each row came from, for messages, N strings.
    """

    input_ids: Int[Tensor, "N L"]
    attention_mask: Int[Tensor, "N L"]
    completion_ids: Int[Tensor, "N T"]
    completion_mask: Bool[Tensor, "N T"]
    predictor: Int[Tensor, "N T"]
    prompt_index: Int[Tensor, " N"]
    preference: Float[Tensor, " N"] | None
    place: tuple[str, ...]

    def to(self, device: torch.device | str | int) -> PaddedBatch:
        """Return this batch with its tensors on another device.

        Args:
            device: Where the tensors go.

        Returns:
            A new batch; a tensor that is already there is shared, not copied.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def token_ids(self) -> list[tuple[list[int], list[int]]]:
        """Return prompt ids and completion ids of each row: what `pad` was given, without the padding.

        Returns:
            N pairs of lists, copied to the CPU.
        """
        rows = self.input_ids.tolist()
        starts = (self.predictor[:, 0] + 1).tolist()
        lengths = self.completion_mask.sum(dim=-1).tolist()
        return [
            (row[:start], row[start : start + length]) for row, start, length in zip(rows, starts, lengths, strict=True)
        ]


def pad(trees: Sequence[PromptTree], *, pad_token_id: int, pad_to_multiple_of: int = 1) -> PaddedBatch:
    """Lay trees out as rows, tree after tree and completion after completion.

    Args:
        trees: The prompts and completions; all with a preference or none.
        pad_token_id: What fills a row after its completion; any valid id, also the end-of-sequence token.
        pad_to_multiple_of: L is rounded up to a multiple of this.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: If there is no tree, or only some of them have a preference.

    Example:
        >>> batch = pad([PromptTree((5, 6), ((7, 2), (8, 9, 2)))], pad_token_id=2)
        >>> batch.input_ids
        tensor([[5, 6, 7, 2, 2],
                [5, 6, 8, 9, 2]])
        >>> batch.completion_mask
        tensor([[ True,  True, False],
                [ True,  True,  True]])
        >>> batch.predictor
        tensor([[1, 2, 0],
                [1, 2, 3]])
    """
    if not trees:
        raise ValueError("A batch needs at least one tree.")
    rows = [(i, tree, completion) for i, tree in enumerate(trees) for completion in tree.completion_ids]
    longest_row = max(len(tree.prompt_ids) + len(completion) for _, tree, completion in rows)
    longest_row += -longest_row % pad_to_multiple_of
    longest_completion = max(len(completion) for _, _, completion in rows)

    input_ids = torch.full((len(rows), longest_row), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    completion_ids = torch.full((len(rows), longest_completion), pad_token_id)
    completion_mask = torch.zeros_like(completion_ids, dtype=torch.bool)
    predictor = torch.zeros_like(completion_ids)
    for n, (_, tree, completion) in enumerate(rows):
        start, length = len(tree.prompt_ids), len(completion)
        input_ids[n, : start + length] = torch.tensor(tree.prompt_ids + completion)
        attention_mask[n, : start + length] = 1
        completion_ids[n, :length] = torch.tensor(completion)
        completion_mask[n, :length] = True
        predictor[n, :length] = torch.arange(start - 1, start + length - 1)

    return PaddedBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        predictor=predictor,
        prompt_index=torch.tensor([i for i, _, _ in rows]),
        preference=_preference(trees),
        place=tuple(tree.place for _, tree, _ in rows),
    )


def _preference(trees: Sequence[PromptTree]) -> Float[Tensor, " N"] | None:
    without = [tree.place for tree in trees if tree.preference is None]
    if len(without) == len(trees):
        return None
    if without:
        raise ValueError(
            f"{len(without)} of {len(trees)} trees of a batch have no preference (first: {without[0]!r}): "
            "give it for all of them or for none."
        )
    return torch.tensor([value for tree in trees for value in tree.preference or ()], dtype=torch.float32)
