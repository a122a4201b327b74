"""From prompt trees to scores: settings shared by trainers, references, evaluation and rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from falign.objectives.measures import Measure
from falign.scoring.batch import LAYOUTS, Layout, PromptTree, TokenBatch
from falign.scoring.completions import completion_scores
from falign.scoring.distributions import Predictions
from falign.scoring.vocabulary import DEFAULT_CHUNK_TOKENS, TokenScores

__all__ = ["Scorer", "detached_scores", "evaluation_mode"]

T = TypeVar("T")


@dataclass(frozen=True)
class Scorer:
    """Settings for scoring prompt trees with any model.

    Attributes:
        layout: A layout that the models can read; see :func:`falign.scoring.choose_layout`.
        pad_token_id: Id of the filling: any valid id, also the end-of-sequence token, since masks go by position.
        chunk_tokens: Number of positions that reach the head at once; affects only memory and speed.

    Raises:
        ValueError: The layout is unknown, or `chunk_tokens` is not positive.

    Example:
        >>> Scorer("tree", pad_token_id=2).lay_out([PromptTree((5, 6), ((7, 2), (8, 9, 2)))]).input_ids
        tensor([[5, 6, 7, 2, 8, 9, 2]])
    """

    layout: Layout = "padded"
    pad_token_id: int = 0
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r}: choose one of {', '.join(map(repr, LAYOUTS))}.")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={self.chunk_tokens}: must be at least 1.")

    def lay_out(self, trees: Sequence[PromptTree], *, model: nn.Module | None = None) -> TokenBatch:
        """Write trees into rows.

        Args:
            trees: Prompts and completions; preferences for all trees or for no tree.
            model: The batch is moved to its device; None leaves it on the CPU.

        Returns:
            The batch, its completions in the order of the trees.

        Raises:
            ValueError: There is no tree, or only some of them have a preference.
        """
        batch = LAYOUTS[self.layout](trees, pad_token_id=self.pad_token_id)
        return batch if model is None else batch.to(next(model.parameters()).device)

    def scores(
        self,
        model: nn.Module,
        batch: TokenBatch,
        *,
        measures: Mapping[str, Measure] | None = None,
        references: Mapping[str, Predictions] | None = None,
        value_head: nn.Module | None = None,
        reward_head: nn.Module | None = None,
        with_vocabulary: bool = True,
    ) -> TokenScores:
        """Score each completion token without gradient and without dropout.

        Args:
            model: On the device of the batch; its mode is restored.
            batch: From :meth:`lay_out`.
            measures: See :func:`falign.scoring.completion_scores`.
            references: See :func:`falign.scoring.completion_scores`.
            value_head: See :func:`falign.scoring.completion_scores`.
            reward_head: See :func:`falign.scoring.completion_scores`.
            with_vocabulary: See :func:`falign.scoring.completion_scores`.

        Returns:
            Values of shape (N, T), 0 where masked.
        """
        return detached_scores(
            model,
            batch,
            measures=measures,
            references=references,
            value_head=value_head,
            reward_head=reward_head,
            with_vocabulary=with_vocabulary,
            chunk_tokens=self.chunk_tokens,
        )

    def num_tokens(self, tree: PromptTree) -> int:
        """Return the number of tokens that a tree takes: the padded layout repeats the prompt for each completion."""
        repeats = len(tree.completion_ids) - 1 if self.layout == "padded" else 0
        return tree.num_tokens + repeats * len(tree.prompt_ids)

    def in_batches(
        self, trees: Sequence[PromptTree], function: Callable[[list[PromptTree]], Sequence[T]], *, max_tokens: int
    ) -> list[T]:
        """Call a function with one batch of trees after another, and return its results in the order of the trees.

        The longest trees come first, so that memory runs out at once or never. Trees of a batch have similar lengths,
        so that padding is small.

        Args:
            trees: Any number.
            function: From a list of trees to one result per tree.
            max_tokens: Largest number of tokens in a batch; a longer tree gets a batch alone.

        Example:
            >>> trees = [PromptTree((5,), ((6,) * n,)) for n in (1, 9, 2)]
            >>> Scorer().in_batches(trees, lambda batch: [len(batch) for _ in batch], max_tokens=5)
            [2, 1, 2]
        """
        batches: list[list[int]] = []
        room = 0
        for i in sorted(range(len(trees)), key=lambda i: trees[i].longest_path, reverse=True):
            if not batches or self.num_tokens(trees[i]) > room:
                batches.append([])
                room = max_tokens
            batches[-1].append(i)
            room -= self.num_tokens(trees[i])
        results: dict[int, T] = {}
        for batch in batches:
            results |= zip(batch, function([trees[i] for i in batch]), strict=True)
        return [results[i] for i in range(len(trees))]


def detached_scores(
    model: nn.Module,
    batch: TokenBatch,
    *,
    measures: Mapping[str, Measure] | None = None,
    references: Mapping[str, Predictions] | None = None,
    value_head: nn.Module | None = None,
    reward_head: nn.Module | None = None,
    with_vocabulary: bool = True,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> TokenScores:
    """Return :func:`falign.scoring.completion_scores` without gradient and dropout; the model's modes are restored.

    All arguments are those of :func:`falign.scoring.completion_scores`.

    Args:
        model: The model.
        batch: The rows to score.
        measures: Measures by name.
        references: States of the references by name.
        value_head: From hidden states to values.
        reward_head: From the hidden state at a completion's last token to a reward.
        with_vocabulary: False leaves out log-probabilities and entropies.
        chunk_tokens: Number of positions that reach the head at once.

    Returns:
        The scores, without gradient.
    """
    with torch.no_grad(), evaluation_mode(model):
        return completion_scores(
            model,
            batch,
            measures=measures,
            references=references,
            value_head=value_head,
            reward_head=reward_head,
            with_vocabulary=with_vocabulary,
            chunk_tokens=chunk_tokens,
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; on exit, restore the mode of each of its modules.

    ``model.train()`` on exit would be wrong: it would enable dropout in parts that were in evaluation mode before.

    Args:
        model: The model; gradients are not touched.

    Example:
        >>> layer = torch.nn.Dropout()
        >>> with evaluation_mode(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
