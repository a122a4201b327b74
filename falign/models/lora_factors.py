"""Arithmetic of LoRA updates: exact sums by stacking, truncation to a rank, and merging into the weights."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from falign.errors import ModelError
from falign.models.base_weights import beyond_plain_lora
from falign.models.structure import adapted_layers, adapter_matrix, is_transposed, lora_layers

__all__ = ["Factors", "check_plain_lora", "cut_to_rank", "factors_of", "fold_adapter", "lora_delta", "weighted_sum"]


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
            layer.scaling[adapter] * adapter_matrix(layer.lora_B, adapter).detach().float(),
            adapter_matrix(layer.lora_A, adapter).detach().float(),
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


@torch.no_grad()
def fold_adapter(base: PreTrainedModel, adapted: PeftModel, *, adapter: str = "default") -> None:
    """Add the update of ``adapter`` to the weights of ``base``, in place.

    Each sum is computed in float32 and rounded once, to the dtype of ``base``. It works layer by layer, without a
    second copy of the weights. A head that shares the weights of the embeddings gets its own copy first, because its
    adapter does not act on the embeddings.

    Args:
        base: The 16- or 32-bit base, loaded from disk. For QLoRA these are not the 4-bit weights: a merge into those
            would have to be quantized again.
        adapted: The trained model.
        adapter: Name of the adapter.

    Raises:
        ModelError: Anything but plain LoRA, or another architecture.
    """
    check_plain_lora(adapted, adapter)
    embeddings = base.get_input_embeddings().weight
    for name, layer in lora_layers(adapted, adapter).items():
        module = base.get_submodule(name)
        weight = module.weight
        if not isinstance(weight, Tensor):
            raise ModelError(f"{name} has no weight to merge an adapter into: export the adapter instead.")
        if weight is embeddings:
            module.weight = weight = nn.Parameter(weight.clone(), requires_grad=False)
            base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
        delta = lora_delta(layer, adapter).to(weight.device)
        if is_transposed(module):
            delta = delta.T
        if delta.shape != weight.shape:
            raise ModelError(
                f"{name} is {tuple(weight.shape)} in the base and {tuple(delta.shape)} in the adapter: give the "
                "base that the adapter was trained over."
            )
        weight.copy_(weight.float() + delta)


def lora_delta(layer: LoraLayer, adapter: str) -> Tensor:
    """Return the update ``scaling · B A`` of a layer in float32, of shape (out, in)."""
    up, down = adapter_matrix(layer.lora_B, adapter), adapter_matrix(layer.lora_A, adapter)
    return layer.scaling[adapter] * (up.float() @ down.float())


def check_plain_lora(adapted: PeftModel, adapter: str) -> None:
    """Raise unless ``adapter`` consists only of LoRA matrices, which merging and vLLM support.

    Raises:
        ModelError: No such adapter, or one with more than such matrices, or one that changes its base.
    """
    layers = lora_layers(adapted, adapter)
    if not layers:
        raise ModelError(f"The model has no LoRA adapter named {adapter!r}; it has {list(adapted.peft_config)}.")
    for name, layer in adapted_layers(adapted, adapter).items():
        if name not in layers or layer.lora_variant or layer.lora_bias[adapter]:
            raise ModelError(
                f"{name}: adapter {adapter!r} is more than a pair of LoRA matrices on a linear layer (it is on an "
                "embedding, has a bias, or is a variant such as DoRA): train plain LoRA on linear layers to export it."
            )
    for what in beyond_plain_lora(vars(adapted.peft_config[adapter])):
        raise ModelError(
            f"Adapter {adapter!r} {what}: only plain LoRA, pairs of matrices on linear layers, can be trained further, "
            "averaged and exported. Merge it with PEFT (merge_and_unload) and give the merged model."
        )
