"""Prompt trees, and the two layouts that turn them into a batch of token rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import compress
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "LAYOUTS",
    "Layout",
    "PromptTree",
    "TokenBatch",
    "TreeSpan",
    "data_weights",
    "lay_out",
    "pack",
    "pad",
    "preferences",
    "row_weights",
    "token_rows",
]


T = TypeVar("T")


@dataclass(frozen=True)
class PromptTree:
    """One prompt and its K completions (2 for a pair, G for a group).

    Attributes:
        prompt_ids: Token ids of the prompt, shared by all completions.
        completion_ids: Token ids of each completion, at least one token each.
        preference: One value per completion, larger is preferred (a pair: 1 and 0); None without preferences.
        place: File and row of the example, for messages (``"pairs.jsonl:12"``).
        mismatched_ids: Token ids of completions of another prompt, for estimates that read them.
        token_weights: Weight of each token of each completion, from the data; None without.
        weight: How much the row counts in the means of an objective; positive.
        counted: Which tokens of each completion the policy answers for: in a dialogue of several turns those of the
            assistant, not those of users and tools between them. None for all.
        text_sha256: Hash of the text of prompt and completion, one per completion; empty if it is not needed.
        margin: Lead in reward that the data ask of the preferred side; None without.

    Raises:
        ValueError: If the prompt or a completion is empty, or preferences or weights do not fit the completions.

    Example:
        >>> pair = PromptTree(prompt_ids=(5, 6), completion_ids=((7, 2), (8, 9, 2)), preference=(1.0, 0.0))
        >>> len(pair.completion_ids)
        2
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[tuple[int, ...], ...]
    preference: tuple[float, ...] | None = None
    place: str = ""
    mismatched_ids: tuple[tuple[int, ...], ...] = ()
    token_weights: tuple[tuple[float, ...], ...] | None = None
    text_sha256: tuple[str, ...] = ()
    weight: float = 1.0
    counted: tuple[tuple[bool, ...], ...] | None = None
    margin: float | None = None

    @property
    def counted_ids(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of each completion that count.

        Example:
            >>> PromptTree((5,), ((7, 8, 2),), counted=((True, False, True),)).counted_ids
            ((7, 2),)
        """
        return tuple(_chosen(ids, own) for ids, own in zip(self.completion_ids, self.counted_or_none, strict=True))

    @property
    def counted_or_none(self) -> tuple[tuple[bool, ...] | None, ...]:
        """:attr:`counted` of each completion; None where all of its tokens count."""
        if self.counted is None:
            return (None,) * len(self.completion_ids)
        return tuple(None if all(own) else own for own in self.counted)

    @property
    def mismatched(self) -> PromptTree:
        """The prompt with the completions of another prompt in place of its own, without preferences."""
        return PromptTree(self.prompt_ids, self.mismatched_ids, place=self.place)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all completions."""
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))

    @property
    def longest_path(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt_ids) + max(map(len, self.completion_ids))

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(
                f"{self.place}: a prompt needs at least one token, which predicts the first token of the completion."
            )
        if not self.completion_ids or not all(self.completion_ids):
            raise ValueError(f"{self.place}: every completion needs at least one token.")
        if self.preference is not None and len(self.preference) != len(self.completion_ids):
            raise ValueError(
                f"{self.place}: {len(self.preference)} preference values for {len(self.completion_ids)} completions."
            )
        weights = self.token_weights
        if weights is not None and list(map(len, weights)) != list(map(len, self.completion_ids)):
            raise ValueError(
                f"{self.place}: token_weights has {list(map(len, weights))} numbers for completions of "
                f"{list(map(len, self.completion_ids))} tokens."
            )
        if self.counted is not None:
            if list(map(len, self.counted)) != list(map(len, self.completion_ids)):
                raise ValueError(
                    f"{self.place}: counted has {list(map(len, self.counted))} values for completions of "
                    f"{list(map(len, self.completion_ids))} tokens."
                )
            if not all(map(any, self.counted)):
                raise ValueError(f"{self.place}: no token of a completion counts; each needs at least one.")


def _chosen(values: Sequence[T], counted: Sequence[bool] | None) -> tuple[T, ...]:
    return tuple(values) if counted is None else tuple(compress(values, counted))


def token_rows(trees: Iterable[PromptTree]) -> Iterator[tuple[str, Sequence[int]]]:
    """Return the token ids of each prompt with each of its completions, and their place.

    Args:
        trees: The prompts and completions.

    Returns:
        Pairs of a place and token ids, one for each completion.

    Example:
        >>> list(token_rows([PromptTree((5, 6), ((7, 2), (8,)), place="pairs.jsonl:1")]))
        [('pairs.jsonl:1', (5, 6, 7, 2)), ('pairs.jsonl:1', (5, 6, 8))]
    """
    return ((tree.place, (*tree.prompt_ids, *ids)) for tree in trees for ids in tree.completion_ids)


@dataclass(frozen=True)
class TreeSpan:
    """The span of one prompt and the completions that share it, side by side in one row.

    Attributes:
        row: Index of the row.
        start: Column of the prompt's first token.
        prompt_length: Tokens of the prompt.
        completion_lengths: Tokens of each completion, in their order in the row.
        counted: Which of them count, for each completion; None where all do.
    """

    row: int
    start: int
    prompt_length: int
    completion_lengths: tuple[int, ...]
    counted: tuple[tuple[bool, ...] | None, ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt and all completions."""
        return self.prompt_length + sum(self.completion_lengths)

    @property
    def depth(self) -> int:
        """Tokens of the longest path: one more than the largest position."""
        return self.prompt_length + max(self.completion_lengths)


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """N completions in R rows of L tokens; T is the largest number of tokens of a completion that count.

    Tokens that do not count (:attr:`PromptTree.counted`) are in the rows, where later ones attend to them, and nowhere
    else: the columns of ``completion_ids`` and of all scores are those that count, one after the other.

    Nothing is inferred from token values, so the filling may be the end-of-sequence token.

    Attributes:
        input_ids: Prompts, completions and filling, shape (R, L).
        position_ids: Position of each token on its path from the start of its prompt, shape (R, L).
        attention_mask: In the padded layout 1 on prompt and completion, shape (R, L). None in the tree layout, where
            `spans` determines which token attends to which.
        spans: One for each copy of a prompt, in the order of the completions.
        completion_ids: Only the counted tokens of the completions, each from column 0 on, shape (N, T).
        completion_mask: True on completion tokens, shape (N, T).
        predictor: Index, into the R·L positions, of the position that predicts each completion token, shape (N, T);
            0 where masked.
        prompt_index: Index, in this batch, of each completion's tree, shape (N,).
        preference: Larger is preferred among completions of one tree, shape (N,); None if the trees have none.
        place: File and row of each completion, for messages, N strings.
    """

    input_ids: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R L"]
    attention_mask: Int[Tensor, "R L"] | None
    spans: tuple[TreeSpan, ...]
    completion_ids: Int[Tensor, "N T"]
    completion_mask: Bool[Tensor, "N T"]
    predictor: Int[Tensor, "N T"]
    prompt_index: Int[Tensor, " N"]
    preference: Float[Tensor, " N"] | None
    place: tuple[str, ...]

    def to(self, device: torch.device | str | int) -> TokenBatch:
        """Return this batch with its tensors on another device.

        Args:
            device: The device.

        Returns:
            A new batch; tensors already on the device are shared, not copied.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def token_ids(self) -> list[tuple[list[int], list[int]]]:
        """Return prompt ids and completion ids of each completion, without the filling, and with all tokens.

        Returns:
            N pairs of lists, copied to the CPU.
        """
        rows = self.input_ids.tolist()
        pairs = []
        for span in self.spans:
            row, end = rows[span.row], span.start + span.prompt_length
            prompt = row[span.start : end]
            for length in span.completion_lengths:
                pairs.append((prompt, row[end : end + length]))
                end += length
        return pairs

    @property
    def counted(self) -> list[tuple[bool, ...] | None]:
        """Which tokens of each completion of :meth:`token_ids` count, N entries; None where all do."""
        return [own for span in self.spans for own in span.counted]

    @property
    def last_tokens(self) -> Int[Tensor, " N"]:
        """Index, into the R·L positions, of each completion's last token, shape (N,).

        Example:
            >>> pack([PromptTree((5, 6), ((7, 2), (8, 9, 2)))], pad_token_id=2).last_tokens
            tensor([3, 6])
        """
        width, found = self.input_ids.shape[1], []
        for span in self.spans:
            end = span.row * width + span.start + span.prompt_length
            for length in span.completion_lengths:
                end += length
                found.append(end - 1)
        return torch.tensor(found, device=self.input_ids.device)

    def scatter(self, values: Float[Tensor, " M"]) -> Float[Tensor, "N T"]:
        """Scatter one value per completion token to its position; 0 where masked.

        Args:
            values: In the order of the True entries of `completion_mask`, shape (M,).

        Returns:
            Shape (N, T), differentiable.
        """
        return values.new_zeros(self.completion_mask.shape).masked_scatter(self.completion_mask, values)


def lay_out(
    trees: Sequence[PromptTree],
    rows: Sequence[int],
    *,
    prompt_index: Sequence[int],
    preference: Float[Tensor, " N"] | None,
    pad_token_id: int,
    pad_to_multiple_of: int = 1,
) -> TokenBatch:
    """Write trees into rows, each after the trees already in its row.

    Args:
        trees: One or more prompts with their completions.
        rows: The row of each tree.
        prompt_index: `TokenBatch.prompt_index` of each tree's completions.
        preference: `TokenBatch.preference`.
        pad_token_id: Id of the filling.
        pad_to_multiple_of: L is rounded up to a multiple of this.

    Returns:
        The batch in the tree layout, on the CPU.
    """
    filled = [0] * (max(rows) + 1)
    spans = []
    for tree, row in zip(trees, rows, strict=True):
        lengths = tuple(map(len, tree.completion_ids))
        span = TreeSpan(row, filled[row], len(tree.prompt_ids), lengths, tree.counted_or_none)
        spans.append(span)
        filled[row] += span.length
    width = max(filled) + -max(filled) % pad_to_multiple_of  # -n % m is what n lacks to a multiple of m
    longest = max(len(ids) for tree in trees for ids in tree.counted_ids)

    input_ids = torch.full((len(filled), width), pad_token_id)
    position_ids = torch.zeros_like(input_ids)
    completion_ids = torch.full((sum(len(tree.completion_ids) for tree in trees), longest), pad_token_id)
    completion_mask = torch.zeros_like(completion_ids, dtype=torch.bool)
    predictor = torch.zeros_like(completion_ids)
    n = 0
    for tree, span in zip(trees, spans, strict=True):
        end = span.start + span.prompt_length
        # Position i predicts token i + 1. So the prompt's last token predicts the first token of every completion, and
        # a completion's token its next one. Each completion's positions continue from the prompt's.
        last = span.row * width + end - 1
        input_ids[span.row, span.start : end] = torch.tensor(tree.prompt_ids)
        position_ids[span.row, span.start : end] = torch.arange(span.prompt_length)
        for ids, own, counted in zip(tree.completion_ids, span.counted, tree.counted_ids, strict=True):
            length, begin = len(ids), end
            end += length
            input_ids[span.row, begin:end] = torch.tensor(ids)
            position_ids[span.row, begin:end] = torch.arange(span.prompt_length, span.prompt_length + length)
            before = [last, *range(span.row * width + begin, span.row * width + end - 1)]
            completion_ids[n, : len(counted)] = torch.tensor(counted)
            completion_mask[n, : len(counted)] = True
            predictor[n, : len(counted)] = torch.tensor(_chosen(before, own))
            n += 1
    counts = [len(tree.completion_ids) for tree in trees]
    return TokenBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=None,
        spans=tuple(spans),
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        predictor=predictor,
        prompt_index=torch.tensor(list(prompt_index)).repeat_interleave(torch.tensor(counts)),
        preference=preference,
        place=tuple(tree.place for tree, count in zip(trees, counts, strict=True) for _ in range(count)),
    )


def preferences(trees: Sequence[PromptTree]) -> Float[Tensor, " N"] | None:
    """Return the preference of each completion, or None if no tree has one.

    Args:
        trees: The trees of a batch.

    Returns:
        Shape (N,), or None.

    Raises:
        ValueError: If there is no tree, or only some of them have a preference.
    """
    if not trees:
        raise ValueError("A batch needs at least one tree.")
    without = [tree.place for tree in trees if tree.preference is None]
    if len(without) == len(trees):
        return None
    if without:
        raise ValueError(
            f"{len(without)} of {len(trees)} trees of a batch have no preference (first: {without[0]!r}): "
            "give one for all trees or for no tree."
        )
    return torch.tensor([value for tree in trees for value in tree.preference or ()], dtype=torch.float32)


def data_weights(trees: Sequence[PromptTree]) -> Float[Tensor, "N T"]:
    """Return the weights of tokens that the data have.

    Args:
        trees: The trees of a batch.

    Returns:
        Shape (N, T), in the order of the trees, of the tokens that count, 0 where masked.

    Raises:
        ValueError: A tree has none.

    Example:
        >>> data_weights([PromptTree((5,), ((7, 2), (8,)), token_weights=((0.5, 1.0), (2.0,)))])
        tensor([[0.5000, 1.0000],
                [2.0000, 0.0000]])
    """
    if missing := [tree.place for tree in trees if tree.token_weights is None]:
        raise ValueError(
            f"{missing[0]} has no weights of tokens, which the objective reads: give every row chosen_weights and "
            "rejected_weights (or completion_weights), [] for weights of 1."
        )
    rows = [
        torch.tensor(_chosen(weights, own))
        for tree in trees
        for weights, own in zip(tree.token_weights or (), tree.counted_or_none, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def row_weights(trees: Sequence[PromptTree]) -> Float[Tensor, " N"]:
    """Return the weight of the row of each completion.

    Args:
        trees: The trees of a batch.

    Returns:
        Shape (N,), in the order of the trees.

    Example:
        >>> row_weights([PromptTree((5,), ((7, 2), (8,)), weight=0.5), PromptTree((5,), ((9,),))])
        tensor([0.5000, 0.5000, 1.0000])
    """
    return torch.tensor([tree.weight for tree in trees for _ in tree.completion_ids])


def data_margins(trees: Sequence[PromptTree]) -> Float[Tensor, " N"]:
    """Return the margins that the data have, repeated for the completions of each tree.

    Args:
        trees: The trees of a batch.

    Returns:
        Shape (N,), in the order of the trees.

    Raises:
        ValueError: A tree has none.

    Example:
        >>> data_margins([PromptTree((5,), ((7, 2), (8,)), margin=0.5)])
        tensor([0.5000, 0.5000])
    """
    if missing := [tree.place for tree in trees if tree.margin is None]:
        raise ValueError(
            f"{missing[0]} has no margin, which the objective reads: give every row a finite number in the column "
            "margin (columns={margin: NAME} if it has another name), or set the objective's margin to none."
        )
    return torch.tensor([tree.margin for tree in trees for _ in tree.completion_ids], dtype=torch.float32)


Layout = Literal["tree", "padded"]


def pack(
    trees: Sequence[PromptTree],
    *,
    pad_token_id: int,
    row_tokens: int | None = None,
    pad_to_multiple_of: int = 1,
) -> TokenBatch:
    """Lay out each prompt once, followed by all its completions, and pack these trees into rows.

    Args:
        trees: The prompts and completions; preferences for all trees or for no tree.
        pad_token_id: Id of the filling; any valid id, also the end-of-sequence token.
        row_tokens: Largest number of tokens in a row, raised to that of the longest tree. None puts all trees into one
            row without filling: attention costs the sum over trees, not the square of the row.
        pad_to_multiple_of: L is rounded up to a multiple of this.

    Returns:
        The batch, on the CPU; its completions are in the order of the trees.

    Raises:
        ValueError: If there is no tree, or only some of them have a preference.

    Example:
        >>> batch = pack([PromptTree((5, 6), ((7, 2), (8, 9, 2)))], pad_token_id=2)
        >>> batch.input_ids
        tensor([[5, 6, 7, 2, 8, 9, 2]])
        >>> batch.position_ids
        tensor([[0, 1, 2, 3, 2, 3, 4]])
        >>> batch.predictor
        tensor([[1, 2, 0],
                [1, 4, 5]])
    """
    preference = preferences(trees)
    rows = [0] * len(trees)
    if row_tokens is not None:
        lengths = [tree.num_tokens for tree in trees]
        rows = _first_fit(lengths, max(row_tokens, *lengths))
    return lay_out(
        trees,
        rows,
        prompt_index=range(len(trees)),
        preference=preference,
        pad_token_id=pad_token_id,
        pad_to_multiple_of=pad_to_multiple_of,
    )


def pad(trees: Sequence[PromptTree], *, pad_token_id: int, pad_to_multiple_of: int = 1) -> TokenBatch:
    """Give every completion a row with its own copy of the prompt, padded on the right; every model can read this.

    Args:
        trees: The prompts and completions; preferences for all trees or for no tree.
        pad_token_id: Id of the filling after a completion; any valid id, also the end-of-sequence token.
        pad_to_multiple_of: L is rounded up to a multiple of this.

    Returns:
        The batch, on the CPU; its completions are in the order of the trees.

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
                [6, 7, 8]])
    """
    preference = preferences(trees)
    singles = [
        PromptTree(tree.prompt_ids, (ids,), place=tree.place, counted=None if own is None else (own,))
        for tree in trees
        for ids, own in zip(tree.completion_ids, tree.counted_or_none, strict=True)
    ]
    batch = lay_out(
        singles,
        range(len(singles)),
        prompt_index=[i for i, tree in enumerate(trees) for _ in tree.completion_ids],
        preference=preference,
        pad_token_id=pad_token_id,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    lengths = torch.tensor([span.length for span in batch.spans])
    columns = torch.arange(batch.input_ids.shape[1])
    # Positions continue through the padding, as in the models' own default numbering.
    positions = columns.expand_as(batch.input_ids).contiguous()
    return replace(batch, position_ids=positions, attention_mask=(columns < lengths[:, None]).long())


LAYOUTS: dict[Layout, Callable[..., TokenBatch]] = {"tree": pack, "padded": pad}


def _first_fit(lengths: Sequence[int], room: int) -> list[int]:
    """Return the row of each item by first-fit decreasing: longest first, each into the first row with room."""
    rows, used = [0] * len(lengths), []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, total in enumerate(used) if total + lengths[i] <= room), len(used))
        if row == len(used):
            used.append(0)
        used[row] += lengths[i]
        rows[i] = row
    return rows
