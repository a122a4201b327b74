"""Safetensors files with metadata: equal contents give equal bytes."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["save_tensors"]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write tensors, and metadata with sorted keys.

    The library writes metadata in random order, so two files with the same contents could differ.

    Args:
        tensors: By name; contiguous, and on any device.
        path: The file to write.
        metadata: Text by key.
    """
    save_file(dict(tensors), path, metadata=dict(metadata))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(metadata.items()))
        # The format allows spaces after the header, which fill it up to the library's length.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))
