"""From prompt trees to scores, in one place: what trainers, references, evaluation and rewards hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from falign.objectives.measures import Measure
from falign.scoring.batch import PromptTree, TokenBatch
from falign.scoring.completions import completion_scores
from falign.scoring.layouts import LAYOUTS, Layout
from falign.scoring.vocabulary import DEFAULT_CHUNK_TOKENS, Distribution, TokenScores

__all__ = ["Scorer", "detached_scores", "evaluation_mode"]

T = TypeVar("T")


@dataclass(frozen=True)
class Scorer:
    """How prompt trees become scores, whichever model scores them.

    Attributes:
        layout: One that the models can read; see :func:`falign.scoring.choose_layout`.
        pad_token_id: What fills rows: any valid id, also the end-of-sequence token, since it is masked by position.
        chunk_tokens: Positions that reach the vocabulary at once; changes memory and speed alone.

    Raises:
        ValueError: The layout is unknown, or no position may reach the vocabulary.

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
            raise ValueError(f"chunk_tokens={self.chunk_tokens}: one position or more is scored at once.")

    def lay_out(self, trees: Sequence[PromptTree], *, model: nn.Module | None = None) -> TokenBatch:
        """Write trees into rows.

        Args:
            trees: Prompts and completions; all with a preference or none.
            model: The batch comes on its device; None leaves it on the CPU.

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
        references: Mapping[str, Distribution] | None = None,
        value_head: nn.Module | None = None,
    ) -> TokenScores:
        """Return what a model at rest says of each completion token: without gradient and dropout.

        Args:
            model: On the device of the batch; it is left in the mode that it was in.
            batch: From :meth:`lay_out`.
            measures: See :func:`falign.scoring.completion_scores`.
            references: See there.
            value_head: See there.

        Returns:
            Values of shape (N, T), 0 where masked.
        """
        return detached_scores(
            model,
            batch,
            measures=measures,
            references=references,
            value_head=value_head,
            chunk_tokens=self.chunk_tokens,
        )

    def num_tokens(self, tree: PromptTree) -> int:
        """Return how many tokens the model reads of a tree: a padded layout repeats the prompt for each completion."""
        repeats = len(tree.completion_ids) - 1 if self.layout == "padded" else 0
        return tree.num_tokens + repeats * len(tree.prompt_ids)

    def in_batches(
        self, trees: Sequence[PromptTree], function: Callable[[list[PromptTree]], Sequence[T]], *, max_tokens: int
    ) -> list[T]:
        """Call a function with one batch of trees after another, and return its results in the order of the trees.

        The longest trees come first, so that memory runs out at once or never, and those of a batch are of similar
        length, so that little of it is padding.

        Args:
            trees: Any number.
            function: From trees to one result for each.
            max_tokens: Tokens that a model reads at once, unless a single tree has more.

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
    references: Mapping[str, Distribution] | None = None,
    value_head: nn.Module | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> TokenScores:
    """Return :func:`falign.scoring.completion_scores` of a model at rest: no gradient, no dropout, modes restored.

    Args:
        model: See there.
        batch: See there.
        measures: See there.
        references: See there.
        value_head: See there.
        chunk_tokens: See there.

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
            chunk_tokens=chunk_tokens,
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and on leaving each of its modules back into the mode it had.

    ``model.train()`` on leaving would not do: it would wake the dropout of parts that were asleep before.

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
