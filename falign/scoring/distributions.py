"""Next-token distributions of references, as a visit to the vocabulary reads them.

A visit reads chunks of positions, and within a chunk blocks of them. What a model computes for a whole chunk, the
output of its embeddings, is computed once for all references that contain the model; its log-probabilities exist for
one block only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.objectives.vocabulary import TopTokens
from falign.scoring.model_parts import Head

__all__ = [
    "Distribution",
    "Predictions",
    "Reading",
    "Source",
    "StoredTokens",
    "VisitedReferences",
    "normalize",
]


class Reading(NamedTuple):
    """Distributions at a block of positions: whole ones, or their most likely tokens.

    Attributes:
        of_targets: Log-probability of the token at each position, shape (M,).
        logprobs: Log-probabilities of all tokens, shape (M, V); None if only the most likely ones are known.
        top: The most likely tokens; None if the whole distributions are known.
    """

    of_targets: Float[Tensor, " M"]
    logprobs: Float[Tensor, "M V"] | None = None
    top: TopTokens | None = None

    @classmethod
    def whole(cls, logprobs: Float[Tensor, "M V"], targets: Int[Tensor, " M"]) -> Reading:
        """Return the reading of whole distributions.

        Args:
            logprobs: Log-probabilities of all tokens.
            targets: The token at each position.

        Returns:
            The reading, with the log-probabilities of the targets.

        Example:
            >>> Reading.whole(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1])).of_targets.exp()
            tensor([0.7500])
        """
        return cls(logprobs.gather(-1, targets[:, None])[:, 0], logprobs)


@runtime_checkable
class Predictions(Protocol):
    """Interface of a reference's distributions at M positions; constants, without gradient.

    Attributes:
        sources: The models, or stored values, that they are computed from.
    """

    @property
    def sources(self) -> tuple[Source, ...]: ...

    def read(self, of: Callable[[Source], Reading]) -> Reading:
        """Return the distributions at a block of positions.

        Args:
            of: Returns what each of the `sources` gives for this block.

        Returns:
            The reading of the block.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """Interface of a model or of stored values that distributions are computed from.

    Attributes:
        inputs: Tensors with one row per position, which is how a visit splits them.
    """

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...

    def prepare(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what is computed once for a chunk of positions.

        Args:
            inputs: The rows of `inputs` of the chunk.

        Returns:
            As many tensors as there are inputs, with one row per position.
        """
        ...

    def at(self, prepared: Sequence[Tensor], rows: slice, targets: Int[Tensor, " m"]) -> Reading:
        """Return the distributions at some of the chunk's positions.

        Args:
            prepared: From `prepare`; left unchanged.
            rows: The positions, within the chunk.
            targets: The token at each of them.

        Returns:
            The reading of these rows.
        """
        ...


class Distribution(NamedTuple):
    """Next-token distributions of a model: its last hidden states and its head.

    Attributes:
        hidden: Last hidden states, shape (M, H).
        head: Map from a hidden state to logits.
    """

    hidden: Float[Tensor, "M H"]
    head: Head

    @property
    def sources(self) -> tuple[Source, ...]:
        """The distributions themselves."""
        return (self,)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The hidden states, without gradient."""
        return (self.hidden.detach(),)

    def read(self, of: Callable[[Source], Reading]) -> Reading:
        """Return the model's distributions at a block of positions.

        Args:
            of: Returns what a source gives for this block.

        Returns:
            The reading of the block.
        """
        return of(self)

    def prepare(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the output of the head's embeddings for a chunk of hidden states.

        Args:
            inputs: The hidden states of the chunk.

        Returns:
            Shape (m, V), before the head's scale and cap.
        """
        return (self.head.embeddings(inputs[0]),)

    def at(self, prepared: Sequence[Tensor], rows: slice, targets: Int[Tensor, " m"]) -> Reading:
        """Return the whole distributions at some of the chunk's positions.

        Args:
            prepared: From `prepare`.
            rows: The positions, within the chunk.
            targets: The token at each of them.

        Returns:
            The reading of these rows.
        """
        return Reading.whole(normalize(self.head.logits(prepared[0][rows]))[0], targets)


class StoredTokens(NamedTuple):
    """Stored values of a reference at M positions: its most likely tokens, and the log-probabilities of the targets.

    Attributes:
        of_targets: Log-probability of the target token, shape (M,).
        top: The most likely tokens.
    """

    of_targets: Float[Tensor, " M"]
    top: TopTokens

    @property
    def sources(self) -> tuple[Source, ...]:
        """The values themselves."""
        return (self,)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All values, with one row per position."""
        return (self.of_targets, *self.top)

    def read(self, of: Callable[[Source], Reading]) -> Reading:
        """Return the values at a block of positions.

        Args:
            of: Returns what a source gives for this block.

        Returns:
            The reading of the block.
        """
        return of(self)

    def prepare(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the values of a chunk; nothing is computed.

        Args:
            inputs: The rows of the chunk.

        Returns:
            The same tensors.
        """
        return inputs

    def at(self, prepared: Sequence[Tensor], rows: slice, targets: Int[Tensor, " m"]) -> Reading:
        """Return the values at some of the chunk's positions.

        Args:
            prepared: From `prepare`.
            rows: The positions, within the chunk.
            targets: The token at each of them, which the stored values belong to.

        Returns:
            The reading of these rows.
        """
        of_targets, logprobs, ids = (each[rows] for each in prepared)
        return Reading(of_targets, top=TopTokens(logprobs, ids))


class VisitedReferences:
    """The references of a visit by name; each source among them is prepared and read once, however many contain it.

    Args:
        references: Their distributions at the same M positions.
    """

    def __init__(self, references: Mapping[str, Predictions]) -> None:
        self.references = dict(references)
        found = {id(source): source for each in self.references.values() for source in each.sources}
        self.sources = list(found.values())

    def chunks(self, size: int) -> Iterator[list[Tensor]]:
        """Return the inputs of all sources, in chunks of `size` positions.

        Args:
            size: Number of positions in a chunk.

        Returns:
            Lists of tensors; without any source, no list.
        """
        columns = [tensor.split(size) for source in self.sources for tensor in source.inputs]
        return (list(chunk) for chunk in zip(*columns, strict=True))

    @torch.no_grad()
    def prepare(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what the sources compute once for a chunk, in the order of `inputs`.

        Args:
            inputs: One element of `chunks`.

        Returns:
            As many tensors.
        """
        return [tensor for source, mine in self._of_sources(inputs) for tensor in source.prepare(*mine)]

    def read(self, prepared: Sequence[Tensor], rows: slice, targets: Int[Tensor, " m"]) -> dict[str, Reading]:
        """Return the distributions of each reference at a block of positions.

        Args:
            prepared: From `prepare`.
            rows: The positions, within the chunk.
            targets: The token at each of them.

        Returns:
            The readings by the names of the references.
        """
        readings = {id(source): source.at(mine, rows, targets) for source, mine in self._of_sources(prepared)}
        return {name: each.read(lambda source: readings[id(source)]) for name, each in self.references.items()}

    def _of_sources(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Source, Sequence[Tensor]]]:
        start = 0
        for source in self.sources:
            stop = start + len(source.inputs)
            yield source, tensors[start:stop]
            start = stop


def normalize(logits: Float[Tensor, "M V"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, probabilities and ``logsumexp`` of logits, which are overwritten.

    Args:
        logits: Shape (M, V).

    Returns:
        Log-probabilities and probabilities, shape (M, V), and ``logsumexp``, shape (M, 1).

    Example:
        >>> normalize(torch.tensor([[0.0, 0.0]]))[1]
        tensor([[0.5000, 0.5000]])
    """
    # In place, because a [chunk, vocabulary] tensor is large; logsumexp and softmax would each allocate another one.
    largest = logits.amax(dim=-1, keepdim=True)
    logits.sub_(largest)
    probabilities = logits.exp()
    total = probabilities.sum(dim=-1, keepdim=True)
    log_total = total.log()
    return logits.sub_(log_total), probabilities.div_(total), largest.add_(log_total)
