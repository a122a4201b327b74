"""Means under the policy of an advantage or of a cost between tokens, and the surprisal that they are balanced with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.numeric_fields import NumericFields
from falign.objectives.measures import Measure, block_of
from falign.objectives.vocabulary import Vocabulary

__all__ = ["Balanced", "Expected", "ExpectedCost", "Surprisal"]


@dataclass(frozen=True)
class Expected(NumericFields):
    """``Σ_v π(v) A(v)`` with ``A(v) = log π_a(v) - log π_b(v)`` of two references, at each position.

    It is large where the policy prefers the tokens that π_a prefers to π_b. An objective that minimizes its measure
    lowers it: to raise it, as ADPA does, exchange the two references.

    Attributes:
        reference: Name of π_a.
        base: Name of π_b.
        smallest: Probabilities of both are clamped to at least this, in (0, 1): a ratio of tiny probabilities means
            nothing, and would dominate the sum.
        k: Read only the k most likely tokens of each reference; all others count as improbable, as ``smallest``. None
            for all tokens.

    Raises:
        ValueError: A number is out of range, or the two names are the same.

    Source:
        Gao et al., ADPA (arXiv:2502.17927), with the published clamp 1e-7: π_a tuned by preferences, π_b its reference.
        The paper's factor β of A is left to the term's weight.

    Example:
        >>> p = torch.tensor([[0.5, 0.5]])
        >>> references = {"dpo": torch.tensor([[0.8, 0.2]]).log(), "sft": torch.tensor([[0.4, 0.6]]).log()}
        >>> Expected("dpo", "sft")(Vocabulary(p.log(), torch.tensor([0]), references))  # (log 2 - log 3)/2
        tensor([-0.2027])
    """

    reference: str
    base: str = "reference"
    smallest: float = 1e-7
    k: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.smallest < 1:
            raise ValueError(f"smallest={self.smallest!r} must be a probability in (0, 1).")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k!r} must be at least 1, or None for all tokens.")
        if self.reference == self.base:
            raise ValueError(f"reference and base are both {self.base!r}, and the advantage would be 0: name two.")

    @property
    def references(self) -> frozenset[str]:
        """The names of both references."""
        return frozenset({self.reference, self.base})

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the expected advantage at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,), nats.
        """
        advantage = self._logprobs(at, self.reference) - self._logprobs(at, self.base)
        return torch.linalg.vecdot(at.logprobs.exp(), advantage)

    def _logprobs(self, at: Vocabulary, name: str) -> Tensor:
        floor = math.log(self.smallest)
        if self.k is None:
            return at.reference(name).clamp(min=floor)
        top = at.top(name, self.k)
        return torch.full_like(at.logprobs, floor).scatter_(-1, top.ids, top.logprobs.clamp(min=floor))


@dataclass(frozen=True)
class ExpectedCost:
    """``1 - Σ_v π(v) cos(e_v, e_y)`` at each position, y its token and e the policy's output embeddings, constants.

    It is an upper bound of the earth mover's distance between π and the token, if moving mass from v to y costs
    ``1 - cos(e_v, e_y)``: unlike ``-log π(y)`` it forgives mass on tokens that are like y.

    Attributes:
        plus_target: Add π(y), as a constant, as the published code does. The gradient is the same; a factor that is
            computed from the value, such as that of EMO, is another.

    Source:
        Ren et al., EMO (arXiv:2310.04691), whose DEMD this is. The embeddings are those of the policy's head now, as in
        its "live" variant, without gradient.

    Example:
        >>> p = torch.tensor([[0.5, 0.25, 0.25]])
        >>> e = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
        >>> ExpectedCost()(Vocabulary(p.log(), torch.tensor([0]), embeddings=e))  # tokens 0 and 2 are alike
        tensor([0.2500])
    """

    plus_target: bool = False

    @property
    def references(self) -> frozenset[str]:
        """Empty: the cost reads no reference."""
        return frozenset()

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the expected cost at each position.

        Args:
            at: M positions, with ``embeddings``.

        Returns:
            Shape (M,), between 0 and 2; up to 3 with ``plus_target``.

        Raises:
            ConfigError: The policy's head is not one matrix.
        """
        probabilities = at.logprobs.exp()
        value = 1.0 - torch.linalg.vecdot(probabilities, at.cosines())
        if self.plus_target:
            value = value + probabilities.detach().gather(-1, at.targets[:, None])[:, 0]
        return value


@dataclass(frozen=True)
class Surprisal:
    """``-log π(y)`` at each position, y its token: the loss of supervised tuning, to be combined with other measures.

    Source:
        The definition. Alone, :class:`falign.objectives.Supervised` computes the same without a measure.

    Example:
        >>> Surprisal()(Vocabulary(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0])))  # log 2
        tensor([0.6931])
    """

    @property
    def references(self) -> frozenset[str]:
        """Empty: it reads no reference."""
        return frozenset()

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the surprisal of the token at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,), nats, not negative.
        """
        return -at.logprobs.gather(-1, at.targets[:, None])[:, 0]


@dataclass(frozen=True)
class Balanced(NumericFields):
    """``(a + sg(a/b) b) / 2`` of two measures a and b at each position: both pull equally, whatever their units.

    Its value is that of a, where ``a/b`` is not bounded. ``sg`` is a constant.

    Attributes:
        first: a.
        second: b, positive.
        largest: Upper bound of ``a/b``; None for no bound.

    Raises:
        ValueError: The bound is not positive and finite, or both measures mix positions, in different blocks.

    Source:
        Ren et al., EMO (arXiv:2310.04691): with a the :class:`Surprisal` and b the :class:`ExpectedCost`, per token;
        the code for instruction tuning bounds the ratio by 3, that for language models does not. Its second variant,
        ``sg(b/a) a + b``, is twice ``Balanced(b, a)``.

    Example:
        >>> at = Vocabulary(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0]), embeddings=torch.eye(2))
        >>> Balanced(Surprisal(), ExpectedCost())(at)
        tensor([0.6931])
    """

    first: Measure
    second: Measure
    largest: float | None = None

    def __post_init__(self) -> None:
        if self.largest is not None and not 0 < self.largest < math.inf:
            raise ValueError(f"largest={self.largest!r} must be positive and finite, or None for no bound.")
        if len({block_of(self.first), block_of(self.second), 1}) > 2:
            raise ValueError(
                f"first mixes {block_of(self.first)} positions and second {block_of(self.second)}: give both one block."
            )

    @property
    def references(self) -> frozenset[str]:
        """Those of both measures."""
        return self.first.references | self.second.references

    @property
    def block(self) -> int:
        """Number of positions that the measures mix, 1 for most."""
        return max(block_of(self.first), block_of(self.second))

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the balanced sum at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,).
        """
        first, second = self.first(at), self.second(at)
        ratio = first.detach() / (second.detach() + 1e-10)  # the published constant; b may round to 0
        if self.largest is not None:
            ratio = ratio.clamp(max=self.largest)
        return (first + ratio * second) / 2
