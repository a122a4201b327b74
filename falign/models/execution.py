"""How a model runs: device, dtype, attention, dropout, gradient checkpointing."""

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)

from falign.errors import ConfigError
from falign.models.structure import base_of

__all__ = [
    "DTYPES",
    "check_attention",
    "disable_dropout",
    "enable_gradient_checkpointing",
    "multiplies_bfloat16",
    "named_device",
    "resolve_dtype",
]


def named_device(name: str | torch.device | None) -> torch.device:
    """Return a device; by default the GPU if there is one.

    Raises:
        ConfigError: The device is unknown or missing.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device={str(name)!r} is unknown: give cpu, cuda or cuda:0, or leave it out.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={str(name)!r} is missing: there are {torch.cuda.device_count()} GPUs; leave it out.")
    return device


_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = ("auto", *_NAMED, "fastest")


def resolve_dtype(dtype: str, *, device: torch.device) -> torch.dtype | None:
    """Return the dtype that a name means on ``device``; None for ``auto``, the checkpoint's own.

    ``fastest`` is bfloat16 if the device multiplies it natively, and float32 otherwise.

    Raises:
        ConfigError: An unknown name.
    """
    if dtype == "auto":
        return None
    if dtype == "fastest":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if dtype not in _NAMED:
        raise ConfigError(f"dtype={dtype!r} is unknown; choose one of {list(DTYPES)}.")
    return _NAMED[dtype]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether ``device`` has native bfloat16 multiplication; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        # oneDNN answers yes for any AVX-512 CPU, but without these instructions it converts to float32 and back.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
            "attn_implementation='flex_attention' has no backward pass on a CPU, and there is no GPU here: use 'sdpa' "
            "or 'eager'."
        )
    if name in _FLASH and not _FLASH[name]():
        raise ConfigError(
            f"attn_implementation={name!r} needs a GPU and its package, which are missing: install the package "
            "(flash-attn), or use 'sdpa' or 'eager'."
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of ``model`` to 0, in modules and in the attributes that attention reads.

    The policy would be scored with dropout and the reference without, which gives log-ratios of several nats of noise
    before the first step. Call it before adapters are added: their dropout is a separate setting.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def enable_gradient_checkpointing(model: PreTrainedModel | PeftModel, *, reentrant: bool = False) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them.

    ``reentrant`` is only for DeepSpeed ZeRO-3; under DDP it marks parameters as ready twice. It needs inputs that
    require a gradient; without it they do not, so that no graph reaches down to the frozen embeddings.
    """
    base = base_of(model)
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    if not reentrant:
        base.disable_input_require_grads()
