"""Arithmetic of LoRA updates: exact sums by stacking, and truncation to a rank."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor

from falign.models.structure import lora_layers, plain_matrix

__all__ = ["Factors", "cut_to_rank", "factors_of", "weighted_sum"]


class Factors(NamedTuple):
    """The update ``up @ down`` of one linear layer; the adapter's scale is in ``up``."""

    up: Float[Tensor, "out r"]
    down: Float[Tensor, "r in"]


class _Cut(NamedTuple):
    factors: Factors
    discarded: Float[Tensor, ""]  # squared Frobenius norm of the part that was cut off
    total: Float[Tensor, ""]  # squared Frobenius norm before the cut


def factors_of(model: PeftModel, adapter: str) -> dict[str, Factors]:
    """Return the updates of an adapter's layers in float32, by the layers' names in the base."""
    return {
        name: Factors(
            layer.scaling[adapter] * plain_matrix(layer.lora_B, adapter).float(),
            plain_matrix(layer.lora_A, adapter).float(),
        )
        for name, layer in lora_layers(model, adapter).items()
    }


def weighted_sum(weights: Sequence[float], members: Sequence[Factors]) -> Factors:
    """Return factors of ``Σ w_i B_i A_i``: the concatenated columns of the members, without rounding.

    ``(Σ w_i B_i)(Σ w_i A_i)``, the product of averages, also has the cross terms ``w_i w_j B_i A_j``. The rank here is
    the sum of the ranks.
    """
    ups = [weight * member.up for weight, member in zip(weights, members, strict=True)]
    return Factors(torch.cat(ups, dim=1), torch.cat([member.down for member in members], dim=0))


@torch.no_grad()
def cut_to_rank(factors: Factors, rank: int) -> _Cut:
    """Return the nearest update of at most ``rank``, as factors of exactly that rank, and the error.

    The singular values of ``B A`` are those of the small ``R_B R_Aᵀ``, where ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A``, so
    the update itself is never formed. float64 keeps the error of thousands of cuts below float32 rounding. If the rank
    of the update is at most ``rank``, nothing is lost.

    Source:
        Eckart & Young (1936): the leading singular vectors give the nearest matrix of a rank.
    """
    left, left_small = torch.linalg.qr(factors.up.double())
    right, right_small = torch.linalg.qr(factors.down.double().T)
    u, singular, v = torch.linalg.svd(left_small @ right_small.T)
    kept = singular[:rank]
    half = kept.sqrt()
    up = torch.zeros(factors.up.shape[0], rank, dtype=torch.float32, device=factors.up.device)
    down = torch.zeros(rank, factors.down.shape[1], dtype=torch.float32, device=factors.down.device)
    # Each factor gets the root of the singular values, so that both have similar magnitudes.
    up[:, : len(kept)] = (left @ u[:, : len(kept)] * half).float()
    down[: len(kept)] = (half[:, None] * (v[: len(kept)] @ right.T)).float()
    return _Cut(Factors(up, down), singular[rank:].square().sum(), singular.square().sum())
