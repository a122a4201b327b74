"""The ways to compute attention that a model can be loaded with."""

import torch
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)

from falign.errors import ConfigError

__all__ = ["check_attention"]

_FLASH = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_4": is_flash_attn_4_available,
}
_OFFERED = ("sdpa", "eager", "flex_attention", *_FLASH)


def check_attention(name: str) -> None:
    """Refuse an ``attn_implementation`` that cannot work here, before anything is loaded.

    Kernels by the name of a Hub repository are refused too: they are code that would be fetched and run.

    Raises:
        ConfigError: The name is unknown, or needs a package or a GPU that is not here.
    """
    if name not in _OFFERED:
        raise ConfigError(f"attn_implementation={name!r} is unknown; choose one of {[*_OFFERED]}.")
    if name == "flex_attention" and not torch.cuda.is_available():
        raise ConfigError(
            "attn_implementation='flex_attention' has no backward pass on a CPU, and there is no GPU here: take 'sdpa' "
            "or 'eager'."
        )
    if name in _FLASH and not _FLASH[name]():
        raise ConfigError(
            f"attn_implementation={name!r} needs a GPU and its package, and they are not here: install the package "
            "(flash-attn), or take 'sdpa' or 'eager'."
        )
