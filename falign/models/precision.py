"""Which floating-point type a model is loaded in."""

import torch

from falign.errors import ConfigError

__all__ = ["DTYPES", "multiplies_bfloat16", "resolve_dtype"]

_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = ("auto", *_NAMED, "fastest")


def resolve_dtype(dtype: str, *, device: torch.device) -> torch.dtype | None:
    """Return the type that a name means on ``device``; None for ``auto``, the checkpoint's own.

    ``fastest`` is bfloat16 where the device multiplies it natively and float32 elsewhere.

    Raises:
        ConfigError: an unknown name.
    """
    if dtype == "auto":
        return None
    if dtype == "fastest":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if dtype not in _NAMED:
        raise ConfigError(f"dtype={dtype!r} is unknown; choose one of {list(DTYPES)}.")
    return _NAMED[dtype]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether ``device`` has native bfloat16 multiplication: elsewhere it is emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        # oneDNN's own answer is yes for any AVX-512 CPU, where it converts to float32 and back.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
