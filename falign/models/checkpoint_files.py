"""The weight files of a checkpoint, and its configuration and tokenizer files."""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from falign.errors import ModelError
from falign.models.sources import check_weights, damaged
from falign.models.staging import reading

__all__ = ["MODEL_FILES", "TOKENIZER_FILES", "CheckpointFiles", "copy_files"]


_INDEX = "model.safetensors.index.json"
_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}


class CheckpointFiles:
    """The open safetensors files of a folder; tensors are read on demand.

    Args:
        folder: A checkpoint in one file or in shards.
        stack: Closes the files on exit.

    Raises:
        ModelError: No weights there, pickled ones, or a damaged file.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        check_weights(folder)
        self.folder = folder
        self._files: dict[str, Any] = {}
        for file in _weight_files(folder):
            with reading(partial(damaged, file)):
                handle = stack.enter_context(safe_open(file, framework="pt"))
            self._files |= dict.fromkeys(handle.keys(), handle)

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in file order."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header of its file."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, from the header of its file.

        Raises:
            ModelError: The dtype occurs only in quantized weights.
        """
        written = self._files[name].get_slice(name).get_dtype()
        if written not in _TYPES:
            raise ModelError(f"{self.folder}: {name} is of type {written}: give weights that are not quantized.")
        return _TYPES[written]

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._files[name].get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        with reading(partial(damaged, index)):
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [folder / file for file in sorted(set(weight_map.values()))]
    single = folder / "model.safetensors"  # some repositories contain the weights twice, in two layouts
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken"),
)
MODEL_FILES = ("config.json", "generation_config.json", "*.py", *TOKENIZER_FILES)


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files of a folder that match one of the patterns."""
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, target / file.name)
