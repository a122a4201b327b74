"""The files that lie beside the weights of a model and are copied as they are."""

import shutil
from collections.abc import Sequence
from pathlib import Path

__all__ = ["MODEL_FILES", "TOKENIZER_FILES", "copy_files"]

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken"),
)
MODEL_FILES = ("config.json", "generation_config.json", "*.py", *TOKENIZER_FILES)


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files of a folder whose names match one of the patterns."""
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, target / file.name)
