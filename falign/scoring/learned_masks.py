"""Masks of tokens that are learned with the policy, from the reference's hidden states."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.scoring.batch import TokenBatch

__all__ = ["LearnedMasks", "layer_states"]


def layer_states(hidden_states: tuple[Tensor, ...], batch: TokenBatch) -> Float[Tensor, "M L H"]:
    """Return the output of each layer at the positions that predict completion tokens.

    Args:
        hidden_states: Embeddings and the output of each layer, shape (R, L, H) each.
        batch: The rows that the model read.

    Returns:
        Shape (M, layers, H), detached.
    """
    predictor = batch.predictor[batch.completion_mask]
    return torch.stack([layer.detach().flatten(0, 1)[predictor] for layer in hidden_states[1:]], dim=1)


class LearnedMasks(nn.Module):
    """Masks ``m_u`` of log-ratios and ``m_d`` of divergences, functions of a model's hidden states, not negative.

    For the output h of each layer: LayerNorm, a linear map to one number, ReLU, dropout; then a linear map over layers
    and ReLU. Both masks are one (``"common"``) or have parameters of their own (``"independent"``).

    Args:
        layers: Number of layers.
        hidden_size: Size of a hidden state.
        independent: Whether the masks have parameters of their own.
        dropout: Probability of leaving out a layer's number in training.

    Source:
        Christopoulou et al., SparsePO (arXiv:2410.05102): the learned masks, from its code. The mixer starts as a mean
        over layers, and the biases of both linear maps at 1, so that no mask starts at 0, where it would have no
        gradient.

    Example:
        >>> masks = LearnedMasks(layers=2, hidden_size=4, independent=False)
        >>> masks(torch.zeros(3, 2, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, layers: int, hidden_size: int, *, independent: bool, dropout: float = 0.1) -> None:
        super().__init__()
        count = 2 if independent else 1
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(layers))
        self.to_number = nn.ModuleList(nn.Linear(hidden_size, count) for _ in range(layers))
        self.mixers = nn.ModuleList(nn.Linear(layers, 1) for _ in range(count))
        self.dropout = nn.Dropout(dropout)
        for linear in (*self.to_number, *self.mixers):
            assert isinstance(linear, nn.Linear)
            nn.init.ones_(linear.bias)
        for mixer in self.mixers:
            assert isinstance(mixer, nn.Linear)
            nn.init.constant_(mixer.weight, 1 / layers)

    @override
    def forward(self, states: Float[Tensor, "M L H"]) -> Float[Tensor, "M 2"]:
        """Return ``m_u`` and ``m_d`` of each token.

        Args:
            states: From :func:`layer_states`.

        Returns:
            Shape (M, 2), not negative; equal columns if the masks are one.
        """
        states = states.to(next(self.parameters()).dtype)
        numbers = [
            linear(norm(states[:, i])) for i, (norm, linear) in enumerate(zip(self.norms, self.to_number, strict=True))
        ]
        kept = self.dropout(torch.stack(numbers, dim=-1).relu())  # (M, count, layers)
        mixed = [mixer(kept[:, i]).relu() for i, mixer in enumerate(self.mixers)]
        return torch.cat([mixed[0], mixed[-1]], dim=-1)
