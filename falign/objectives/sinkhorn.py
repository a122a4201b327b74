"""A measure that mixes positions: the cost of moving a batch of the policy's distributions to a reference's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign.numeric_fields import NumericFields
from falign.objectives.vocabulary import Vocabulary

__all__ = ["Plan", "Sinkhorn"]

Plan = Literal["differentiated", "constant"]
"""Whether the gradient of :class:`Sinkhorn` goes through its transport plan."""


@dataclass(frozen=True)
class Sinkhorn(NumericFields):
    """``Σ_j P_ij D_ij`` for each row i of a block: Sinkhorn's transport of the policy's rows to the reference's rows.

    With the distributions ``p_i`` of the policy and ``q_j`` of the reference at the n positions of a block::

        D_ij = ‖p_i - q_j‖₁,   K = exp(-D/ε),   P = K, its rows then its columns divided by their sums, in turn

    So a position may be matched with the reference at another one, which is cheaper where both are alike. The sum over
    the block is the published loss. Its columns sum to 1; its rows do so only in the limit of many iterations, because
    columns come last.

    The measure mixes positions, and says so by ``block``: the completion tokens of a micro-batch are split into blocks
    of this many, the last one shorter. Its values therefore depend on the composition of micro-batches. In a block of
    one position it is ``‖p - q‖₁``, twice the total variation. Memory and time grow as ``block² · V``.

    Attributes:
        block: Number of positions in a block, at least 2.
        reference: Name of the reference.
        epsilon: ε, positive: the smaller, the closer P is to a matching.
        iterations: Number of times that rows and columns are divided, at least 1.
        temperature: T, positive: both distributions are computed from ``logits/T``.
        plan: ``"differentiated"``: the gradient goes through the iterations, as in the published code. ``"constant"``:
            P is taken as given, so that each p_i moves toward its matched q_j only; in the limit of many iterations
            that is the gradient of the cost with an entropy of P, ``Σ P D + ε Σ P log P``.

    Raises:
        ValueError: A number or choice is out of range.

    Source:
        Cui et al., Sinkhorn distance for knowledge distillation, SinKD (arXiv:2402.17110): ε = 0.1, 20 iterations,
        T = 2, the loss times 0.001. Here K is normalized in log space: exp(-D/ε) underflows for a small ε.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> at = Vocabulary(p.log(), torch.tensor([0, 0]), {"reference": p.flip(0).log()})
        >>> Sinkhorn(block=2)(at).round(decimals=3)  # the same two rows in another order: there is nothing to move
        tensor([0., 0.])
    """

    block: int
    reference: str = "reference"
    epsilon: float = 0.1
    iterations: int = 20
    temperature: float = 1.0
    plan: Plan = "differentiated"

    def __post_init__(self) -> None:
        if self.block < 2:
            raise ValueError(f"block={self.block!r} must be at least 2 positions, which are matched with each other.")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations!r} must be at least 1.")
        for name in ("epsilon", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive and finite.")
        if self.plan not in get_args(Plan):
            raise ValueError(f"plan={self.plan!r}: choose one of {', '.join(get_args(Plan))}.")

    @property
    def references(self) -> frozenset[str]:
        """The name of the reference."""
        return frozenset({self.reference})

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the cost of each row of one block.

        Args:
            at: The positions of the block.

        Returns:
            Shape (M,), not negative.
        """
        policy, reference = at.logprobs, at.reference(self.reference)
        if self.temperature != 1.0:
            policy, reference = (each.div(self.temperature).log_softmax(dim=-1) for each in (policy, reference))
        distance = torch.cdist(policy.exp(), reference.exp(), p=1.0)  # without a tensor of block² · V
        log_plan = (distance if self.plan == "differentiated" else distance.detach()) / -self.epsilon
        for _ in range(self.iterations):
            log_plan = log_plan.log_softmax(dim=1).log_softmax(dim=0)
        return (log_plan.exp() * distance).sum(dim=1)
