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
        weight: Its share.
        kind: An adapter, or a whole checkpoint.
    """

    folder: Path
    weight: float
    kind: Literal["adapter", "checkpoint"]


def check_weights(weights: Sequence[float], *, members: int) -> None:
    """Raise unless there is one share for each member, each at least 0, together 1.

    Raises:
        ConfigError: Names the wrong weight.
    """
    if members < 2:
        raise ConfigError(f"a soup of {members}: give at least two adapters or checkpoints.")
    if len(weights) != members:
        raise ConfigError(f"{len(weights)} weights for {members} members: give one for each, or none for equal shares.")
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(
                f"weights={[*weights]}: a share of an average is a number of at least 0, and {weight} is not."
            )
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise ConfigError(
            f"weights={[*weights]} sum to {math.fsum(weights):g}: an average has shares that sum to 1; divide them by "
            "their sum."
        )


def soup_members(paths: Sequence[str | Path], weights: Sequence[float] | None = None) -> tuple[SoupMember, ...]:
    """Return the members of a soup.

    Args:
        paths: Folders of adapters or of checkpoints, or run folders, which stand for their results.
        weights: One share each; default: equal shares.

    Raises:
        ConfigError: The weights are not shares of 1.
        ModelError: A folder holds neither, or the folders are of two kinds.
    """
    shares = [1 / len(paths)] * len(paths) if weights is None and paths else [*(weights or ())]
    check_weights(shares, members=len(paths))
    members = tuple(_member(path, weight) for path, weight in zip(paths, shares, strict=True))
    for member in members:
        if member.kind != members[0].kind:
            raise ModelError(
                f"{members[0].folder} is of kind {members[0].kind} and {member.folder} of kind {member.kind}: a soup "
                "is of one kind; merge the adapters first (`falign export --format merged`)."
            )
    return members


def check_one_tokenizer(members: Sequence[SoupMember]) -> None:
    """Refuse members with other token ids than the first.

    An adapter without a tokenizer in its folder was trained with its base's tokenizer.

    Raises:
        ConfigError: Names the first token that differs.
    """
    beside = [
        each for each in members if each.kind == "checkpoint" or (each.folder / "tokenizer_config.json").is_file()
    ]
    for member in beside[1:]:
        first, other = load_tokenizer(beside[0].folder), load_tokenizer(member.folder)
        check_same_tokens(first, other, f"{beside[0].folder} and {member.folder}")


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
    plain = Path(resolve(path))  # also a GGUF file, and refusals that name the nearest folder
    if not plain.is_dir():
        raise ModelError(f"{path} is not a local folder, and a soup is made of local ones: download it first.")
    return SoupMember(folder=plain, weight=weight, kind="checkpoint")


def _run_member(run: Path, weight: float) -> SoupMember:
    if (run / "adapter").is_dir():
        return SoupMember(folder=(run / "adapter").resolve(), weight=weight, kind="adapter")
    if (run / "model").is_dir():
        return SoupMember(folder=(run / "model").resolve(), weight=weight, kind="checkpoint")
    raise ModelError(f"{run} is a run that has no result yet: finish it by `falign train ... --resume`.")
