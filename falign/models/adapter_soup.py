"""The exact weighted average of LoRA adapters over one base: one adapter, with the sum of their ranks."""

from collections.abc import Sequence
from pathlib import Path

from falign.errors import ModelError
from falign.models.adapter_tensors import AdapterTensors, adapter_of, read_adapter
from falign.models.lora_factors import weighted_sum
from falign.models.soup_members import SoupMember, check_one_tokenizer

__all__ = ["adapter_soup"]


def adapter_soup(members: Sequence[SoupMember]) -> AdapterTensors:
    """Return the adapter with ``ΔW = Σ w_i s_i B_i A_i``, for members of any ranks, scales and target modules.

    The columns of all members are concatenated, so the average is exact on any base. Averaging the factors would add
    cross terms, and merging would need the base's weights, which a 4-bit base no longer has. A member without weight
    adds no columns, so a soup of one is that adapter, bit for bit.

    Args:
        members: Adapter folders with their weights.

    Raises:
        ConfigError: One id means different tokens in two members; the first of them is named.
        ModelError: A member is not plain LoRA, or is for another base than the first; the first mismatch is named.
    """
    adapters = [read_adapter(member.folder) for member in members]
    _check_one_base(members, adapters)
    check_one_tokenizer(members)
    used = [(member.weight, adapter) for member, adapter in zip(members, adapters, strict=True) if member.weight]
    first = adapters[0].config
    if len(used) == 1:
        return used[0][1]
    updates = [(weight, adapter.factors()) for weight, adapter in used]
    # A layer that a member does not adapt has a zero update there, so it adds no columns.
    layers = dict.fromkeys(name for _, factors in updates for name in factors)
    factors = {
        name: weighted_sum(
            [weight for weight, each in updates if name in each], [each[name] for _, each in updates if name in each]
        )
        for name in layers
    }
    soup = adapter_of(factors, base=first.base_model_name_or_path, transposed=first.fan_in_fan_out)
    soup.config.revision = first.revision
    return soup._replace(base=adapters[0].base)


def _check_one_base(members: Sequence[SoupMember], adapters: Sequence[AdapterTensors]) -> None:
    shapes: dict[str, tuple[tuple[int, int], Path]] = {}
    for member, adapter in zip(members, adapters, strict=True):
        if (difference := adapters[0].base.difference(adapter.base)) is not None:
            raise ModelError(
                f"{members[0].folder} and {member.folder} are adapters for different bases ({difference}): only "
                "adapters over one base have an average."
            )
        for name, shape in adapter.shapes().items():
            known, owner = shapes.setdefault(name, (shape, member.folder))
            if known != shape:
                raise ModelError(
                    f"{name} is {known} in {owner} and {shape} in {member.folder}: adapters for two bases have no "
                    "average; give adapters over one base."
                )
