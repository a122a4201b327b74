"""Soups as folders: averaged weights, with a record of the members."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from falign.errors import ConfigError
from falign.models.adapter_files import write_adapter_files
from falign.models.adapter_soup import adapter_soup
from falign.models.checkpoint_files import TOKENIZER_FILES, copy_files
from falign.models.checkpoint_soup import write_checkpoint_soup
from falign.models.execution import resolve_dtype
from falign.models.gguf import cache_folder
from falign.models.kept_folder import kept_folder
from falign.models.soup_members import SoupMember, content_hash, soup_members
from falign.models.staging import staged_folder

__all__ = ["cached_checkpoint_soup", "soup_record", "write_soup"]


def write_soup(
    paths: Sequence[str | Path],
    out_dir: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Write the weighted average of adapters, or of whole checkpoints, to ``out_dir``.

    The average of adapters is an adapter in PEFT's layout, and exact; the average of checkpoints is a checkpoint.
    Tokenizer, configuration and generation settings come from the first member. ``soup.json`` records paths, weights
    and content hashes.

    Args:
        paths: Two or more folders of one kind; a run folder stands for the model it has trained.
        out_dir: The folder to write; it appears complete or not at all.
        weights: One weight each, with sum 1; equal weights by default.
        dtype: Dtype of an average of checkpoints; ``auto`` is that of the first member.
        overwrite: Replace a folder that is not empty.

    Raises:
        ConfigError: A weight is negative, the sum is not 1, or ``dtype`` is unknown.
        ModelError: Members that have no average (the first mismatch is named), an occupied folder, or a full disk.
    """
    members, target = soup_members(paths, weights), Path(out_dir)
    written = resolve_dtype(dtype, device=torch.device("cpu"))
    if written is not None and members[0].kind == "adapter":
        raise ConfigError(f"dtype={dtype!r}: a soup of adapters is float32 so that it is exact; leave it out.")
    with staged_folder(target, existing="replace" if overwrite else "refuse") as staging:
        if members[0].kind == "adapter":
            soup = adapter_soup(members)
            write_adapter_files(staging, soup.config, soup.tensors, soup.base)
            copy_files(members[0].folder, staging, TOKENIZER_FILES)
        else:
            write_checkpoint_soup(members, staging, dtype=written)
        (staging / "soup.json").write_text(json.dumps(soup_record(members), indent=2) + "\n", encoding="utf-8")
    return target


def cached_checkpoint_soup(members: Sequence[SoupMember]) -> Path:
    """Return the folder of an average of checkpoints, which the first call writes into the cache.

    Raises:
        ModelError: As `write_checkpoint_soup` and `kept_folder`.
    """
    record = soup_record(members)
    ingredients = [record["kind"], *((each["sha256"], each["weight"]) for each in record["members"])]
    digest = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()
    folder = cache_folder() / f"soup-{digest[:16]}"

    def write(staging: Path) -> None:
        write_checkpoint_soup(members, staging)
        (staging / "soup.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    return kept_folder(folder, write)


def soup_record(members: Sequence[SoupMember]) -> dict[str, Any]:
    """Return the record that identifies a soup: kind, and each member's folder, weight and content hash."""
    return {
        "kind": members[0].kind,
        "members": [
            {"path": str(member.folder), "weight": member.weight, "sha256": content_hash(member.folder)}
            for member in members
        ],
    }
