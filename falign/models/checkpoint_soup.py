"""The weighted average of checkpoints, computed tensor by tensor, so that memory never holds a whole model."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from falign.errors import ModelError, one_line
from falign.models.checkpoint_files import MODEL_FILES, CheckpointFiles, copy_files
from falign.models.soup_members import SoupMember, check_one_tokenizer
from falign.models.sources import damaged
from falign.models.staging import reading

__all__ = ["write_checkpoint_soup"]

# Fields of a configuration that do not belong to the architecture: its location, and settings of generation.
_NOT_THE_ARCHITECTURE = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
)
_TIED_HEADS = frozenset({"lm_head.weight", "embed_out.weight"})  # written by some programs and left out by others


def write_checkpoint_soup(
    members: Sequence[SoupMember], folder: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 2 << 30
) -> None:
    """Write ``θ = Σ w_i θ_i`` with the configuration, generation settings and tokenizer of the first member.

    Each tensor is read from one member after another, summed in float32, rounded once, and kept until its file is full.
    So memory holds at most one file of the result.

    Args:
        members: Folders of checkpoints with their weights.
        folder: An empty folder.
        dtype: Dtype of the result; by default each tensor has that of the first member.
        max_shard_bytes: Maximum size of a file.

    Raises:
        ConfigError: One id means different tokens in two members; the first of them is named.
        ModelError: The members differ in architecture, tensors or shapes; the first mismatch is named.
    """
    tied = _check_architecture(members)
    check_one_tokenizer(members)
    with ExitStack() as stack:
        checkpoints = [CheckpointFiles(member.folder, stack) for member in members]
        names = _check_tensors(checkpoints, tied=tied)
        first = checkpoints[0]
        types = {name: _target_type(first.dtype(name), dtype) for name in names}
        sizes = {name: types[name].itemsize * torch.Size(first.shape(name)).numel() for name in names}
        used = [(member.weight, each) for member, each in zip(members, checkpoints, strict=True) if member.weight]
        shards = _shards(sizes, max_shard_bytes)
        for file, inside in shards.items():
            tensors = {name: _average(name, used).to(types[name]).contiguous() for name in inside}
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, inside in shards.items() for name in inside}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    copy_files(members[0].folder, folder, MODEL_FILES)
    if dtype is not None:
        _record_type(folder / "config.json", dtype)


def _average(name: str, used: Sequence[tuple[float, CheckpointFiles]]) -> Tensor:
    total: Tensor | None = None
    for weight, checkpoint in used:
        tensor = checkpoint.read(name)
        if not tensor.is_floating_point():
            if total is not None and not torch.equal(total, tensor):
                raise ModelError(
                    f"{name} holds integers, and {checkpoint.folder} has others than {used[0][1].folder}: they have no "
                    "average; give checkpoints of one origin."
                )
            total = tensor
            continue
        # In place: one tensor of a member beside the sum.
        part = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True).mul_(weight)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _check_architecture(members: Sequence[SoupMember]) -> bool:
    """Compare configurations in the form of this version of transformers; return whether heads are tied."""
    configs = [_architecture(member.folder) for member in members]
    for member, config in zip(members[1:], configs[1:], strict=True):
        for key in sorted(configs[0].keys() | config.keys()):
            known, found = configs[0].get(key), config.get(key)
            if known != found:
                raise ModelError(
                    f"{members[0].folder} and {member.folder} are different architectures ({key} is {known!r} and "
                    f"{found!r}): only checkpoints from one parent have an average."
                )
    return bool(configs[0].get("tie_word_embeddings"))


def _architecture(folder: Path) -> dict[str, object]:
    with reading(lambda error: damaged(folder / "config.json", one_line(error))):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
    if config.get("quantization_config") is not None:
        raise ModelError(f"{folder} has quantized weights, which have no average: give the 16- or 32-bit ones.")
    return {key: value for key, value in config.items() if key not in _NOT_THE_ARCHITECTURE}


def _check_tensors(checkpoints: Sequence[CheckpointFiles], *, tied: bool) -> list[str]:
    """Return the names of all tensors in the order of the first member; all members must have them in one shape."""
    first, left_out = checkpoints[0], _TIED_HEADS if tied else frozenset()
    names = [name for name in first.names if name not in left_out]
    for checkpoint in checkpoints[1:]:
        differing = sorted((set(names) ^ set(checkpoint.names)) - left_out)
        if differing:
            owner, other = (first, checkpoint) if differing[0] in set(names) else (checkpoint, first)
            raise ModelError(
                f"{differing[0]} is in {owner.folder} and not in {other.folder}: only checkpoints with the same "
                "tensors have an average."
            )
        for name in names:
            if first.shape(name) != checkpoint.shape(name):
                raise ModelError(
                    f"{name} is {first.shape(name)} in {first.folder} and {checkpoint.shape(name)} in "
                    f"{checkpoint.folder}: only checkpoints of one shape have an average."
                )
    return names


def _target_type(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return own if wanted is None or not own.is_floating_point else wanted


def _shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _record_type(config: Path, dtype: torch.dtype) -> None:
    content = json.loads(config.read_text(encoding="utf-8"))
    content.pop("torch_dtype", None)
    content["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(content, indent=2), encoding="utf-8")
