"""The members of a soup: folders recognized by their files, with weights that sum to 1."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from falign.durable import checksum
from falign.errors import ConfigError, ModelError
from falign.models.checkpoint_files import MODEL_FILES
from falign.models.loading import load_tokenizer
from falign.models.sources import resolve
from falign.models.tokenizers import check_same_tokens

__all__ = ["SoupMember", "check_one_tokenizer", "check_weights", "content_hash", "soup_members"]


@dataclass(frozen=True, kw_only=True)
class SoupMember:
    """One of the adapters or checkpoints that are averaged.

    Attributes:
        folder: The folder of its weights.
        weight: Its weight in the average.
        kind: An adapter, or a whole checkpoint.
    """

    folder: Path
    weight: float
    kind: Literal["adapter", "checkpoint"]


def check_weights(weights: Sequence[float], *, members: int) -> None:
    """Raise unless there is one weight for each member, none is negative, and their sum is 1.

    Raises:
        ConfigError: The weights break one of these rules.
    """
    if members < 2:
        raise ConfigError(f"a soup of {members}: give at least two adapters or checkpoints.")
    if len(weights) != members:
        raise ConfigError(
            f"{len(weights)} weights for {members} members: give one for each, or none for equal weights."
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"weights={[*weights]}: {weight} is not a finite number of at least 0.")
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise ConfigError(
            f"weights={[*weights]} sum to {math.fsum(weights):g}, and an average needs a sum of 1: divide them by that "
            "sum."
        )


def soup_members(paths: Sequence[str | Path], weights: Sequence[float] | None = None) -> tuple[SoupMember, ...]:
    """Return the members of a soup.

    Args:
        paths: Folders of adapters or of checkpoints, or run folders, which stand for their results.
        weights: One weight each, with sum 1; equal weights by default.

    Raises:
        ConfigError: A weight is negative, or their sum is not 1.
        ModelError: A folder holds neither an adapter nor a checkpoint, or the folders are of two kinds.
    """
    shares = [1 / len(paths)] * len(paths) if weights is None and paths else [*(weights or ())]
    check_weights(shares, members=len(paths))
    members = tuple(_member(path, weight) for path, weight in zip(paths, shares, strict=True))
    for member in members:
        if member.kind != members[0].kind:
            raise ModelError(
                f"{members[0].folder} is of kind {members[0].kind} and {member.folder} of kind {member.kind}: a soup "
                "needs one kind; merge the adapters into their base models first."
            )
    return members


def check_one_tokenizer(members: Sequence[SoupMember]) -> None:
    """Refuse members with other token ids than the first.

    An adapter without a tokenizer in its folder was trained with its base's tokenizer.

    Raises:
        ConfigError: A token has different ids; the message names the first one.
    """
    with_tokenizer = [
        each for each in members if each.kind == "checkpoint" or (each.folder / "tokenizer_config.json").is_file()
    ]
    for member in with_tokenizer[1:]:
        first, other = load_tokenizer(with_tokenizer[0].folder), load_tokenizer(member.folder)
        check_same_tokens(first, other, f"{with_tokenizer[0].folder} and {member.folder}")


def content_hash(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights and configuration, or of all files that make up a checkpoint."""
    beside = ("adapter_config.json",) if (folder / "adapter_config.json").is_file() else MODEL_FILES
    files = sorted({file for pattern in ("*.safetensors", *beside) for file in folder.glob(pattern) if file.is_file()})
    sums = [(file.name, checksum(file)) for file in files]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _member(path: str | Path, weight: float) -> SoupMember:
    folder = Path(path).expanduser()
    if (folder / "manifest.json").is_file() and (folder / "run.yaml").is_file():
        return _run_member(folder, weight)
    if (folder / "adapter_config.json").is_file():
        return SoupMember(folder=folder.resolve(), weight=weight, kind="adapter")
    plain = Path(resolve(path))  # converts a GGUF file; a path that does not exist is refused with the nearest name
    if not plain.is_dir():
        raise ModelError(f"{path} is not a local folder, which a soup needs: download it first.")
    return SoupMember(folder=plain, weight=weight, kind="checkpoint")


def _run_member(run: Path, weight: float) -> SoupMember:
    if (run / "adapter").is_dir():
        return SoupMember(folder=(run / "adapter").resolve(), weight=weight, kind="adapter")
    if (run / "model").is_dir():
        return SoupMember(folder=(run / "model").resolve(), weight=weight, kind="checkpoint")
    raise ModelError(f"{run} is a run without a trained model yet: resume it to its end.")
